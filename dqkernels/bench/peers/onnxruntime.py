"""ONNX Runtime on a CPU: the layer as a graph of one matmul, dynamic int8 or 4-bit blocks. Tried with 1.32.0."""

from __future__ import annotations

import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench.peers.base import NotCompared, Peer, Weights, load, only

#: Weights that share a scale at 4 bits.
_BLOCK = 32


class Session:
    """x fp32 [M, K] -> [M, N]. A clone is a session of its own, with weights of its own."""

    def __init__(self, graph: bytes, threads: int):
        runtime = load("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Waiting threads would take time from the candidates whose turn it is.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.graph, self.threads = graph, threads
        self.session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])

    def clone(self) -> Session:
        return Session(self.graph, self.threads)


def _session(nodes: list, constants: dict[str, torch.Tensor], n: int, k: int, **domains: int) -> Session:
    onnx = load("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    values = [onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in constants.items()]
    ends = [helper.make_tensor_value_info(name, real, ["tokens", size]) for name, size in (("x", k), ("y", n))]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], values)
    versions = [helper.make_opsetid("", 21), *(helper.make_opsetid(*domain) for domain in domains.items())]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    return Session(model.SerializeToString(), torch.get_num_threads())


def dynamic_int8(layer: nn.Linear) -> candidates.Candidate:
    """What its `quantize_dynamic` writes: uint8 inputs of one scale and zero point per call, int8 weights per channel.

    Codes of 7 bits, as its documentation advises on processors without VNNI: two products of 8-bit codes and a sum
    overflow the 16 bits that its kernel has for them there.
    """
    only(layer, torch.float32)
    node = load("onnx").helper.make_node
    weights, (n, k) = Weights.rounded(layer, 63, 8), layer.weight.shape
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "x_scale", "x_zero"]),
        node("MatMulInteger", ["q", "codes", "x_zero"], ["sum"]),
        node("Cast", ["sum"], ["real"], to=1),
        node("Mul", ["x_scale", "scale"], ["both"]),
        node("Mul", ["real", "both"], ["scaled"]),
        node("Add", ["scaled", "bias"], ["y"]),
    ]
    constants = {"codes": weights.codes.t(), "scale": weights.scale.squeeze(1), "bias": weights.bias}
    module = _session(nodes, constants, n, k)
    words = "onnxruntime MatMulInteger, codes of 7 bits"
    return _candidate("onnxruntime int8 dynamic", module, weights, n * k + 4 * n, words)


def int4(layer: nn.Linear) -> candidates.Candidate:
    """`MatMulNBits`, accuracy level 4: blocks of 4-bit weights, inputs quantized to int8 in blocks by itself."""
    only(layer, torch.float32)
    (n, k), node = layer.weight.shape, load("onnx").helper.make_node
    if k % _BLOCK:
        raise NotCompared(f"adapter takes inputs that are a multiple of {_BLOCK}, got {k}")
    weights = Weights.rounded(layer, 7, 4, _BLOCK)
    codes = (weights.codes.to(torch.int16) + weights.offset).to(torch.uint8).reshape(n, k // _BLOCK, _BLOCK // 2, 2)
    options = {"domain": "com.microsoft", "K": k, "N": n, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    constants = {"codes": codes[..., 0] | codes[..., 1] << 4, "scale": weights.scale.flatten(), "bias": weights.bias}
    nodes = [node("MatMulNBits", ["x", "codes", "scale", "", "", "bias"], ["y"], **options)]
    module = _session(nodes, constants, n, k, **{"com.microsoft": 1})
    words = "onnxruntime MatMulNBits, accuracy level 4"
    return _candidate("onnxruntime int4", module, weights, n * k // 2 + 4 * weights.scale.numel(), words)


def _candidate(name: str, module: Session, weights: Weights, weight_bytes: int, words: str) -> candidates.Candidate:
    def prove(x: torch.Tensor, y: torch.Tensor) -> str | None:
        return candidates.bounded(weights.float_layer(), candidates.INT8_BOUND)(x, y)

    more = {"group_size": weights.group_size, "foreign": True, "clone": Session.clone}
    return candidates.Candidate(name, module, weights.bits, weight_bytes, prove, words, **more)


PEER = Peer(
    "onnxruntime",
    "pip install --no-deps onnxruntime onnx ml_dtypes flatbuffers",
    "onnxruntime",
    ("cpu",),
    linear={"onnxruntime int8 dynamic": dynamic_int8, "onnxruntime int4": int4},
    without={
        # Tried with torch 2.13 and transformers 5.24, on BART.
        "generate": "no adapter: torch's exporter wants onnxscript, the older one gave a decoder's step other logits"
    },
)
