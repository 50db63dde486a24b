"""ONNX Runtime on a CPU. Tried with 1.32.0.

A layer is a graph of one matmul, dynamic int8 or 4-bit blocks; a model is two graphs, float or dynamic int8
(`onnx_bart`), and a greedy search over them.
"""

from __future__ import annotations

import functools

import numpy
import torch
from torch import nn

from dqkernels.bench import candidates
from dqkernels.bench import generate_candidates as generators
from dqkernels.bench.peers.base import NotCompared, Peer, Weights, load, named, only
from dqkernels.bench.peers.onnx_bart import Exported

#: Weights that share a scale at 4 bits.
_BLOCK = 32


class Session:
    """x fp32 [M, K] -> [M, N]. A clone is a session of its own, with weights of its own."""

    def __init__(self, graph: bytes, threads: int):
        self.graph, self.threads = graph, threads
        self.session = _runtime(graph, threads, **{"session.intra_op.allow_spinning": "0"})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])

    def clone(self) -> Session:
        return Session(self.graph, self.threads)


def _runtime(graph: bytes, threads: int, **entries: str):
    """ONNX Runtime's own session. Threads that wait would take time from the candidates whose turn it is: `entries` say
    how they do not."""
    runtime = load("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    options.log_severity_level = 3
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


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


# ------------------------------------------------------------------------------------------- whole models


class Generator(generators.Candidate):
    """Greedy search over the two graphs of a model: keys and values go from one call to the next as they are."""

    family, foreign, dtype = "onnxruntime", True, "fp32"

    def __init__(self, name: str, model: nn.Module, int8: bool):
        self.name, self.int8 = name, int8
        self.weight_bits = self.embedding_bits = 8 if int8 else 32
        self.bound = generators.BOUNDS["int8" if int8 else "fp32"]
        made, threads = Exported(model, int8), torch.get_num_threads()
        # Between two nodes threads may wait busily, as they do by default, and behind a call they may not.
        stop = {"session.force_spinning_stop": "1"}
        self.encoder, self.decoder = _runtime(made.encoder, threads, **stop), _runtime(made.decoder, threads, **stop)
        self.made, self.bytes = made, len(made.encoder) + len(made.decoder)
        made.encoder = made.decoder = b""
        settings = model.generation_config
        self.start, self._end = settings.decoder_start_token_id, settings.eos_token_id
        self.vocabulary = model.lm_head.weight.shape[0]

    def cannot(self, cell):
        return None if cell.num_beams == 1 else "the adapter searches greedily only"

    def bind(self, inputs, new_tokens, num_beams):
        if not bool(inputs["attention_mask"].all()):
            raise NotCompared("the adapter takes sources without padding")
        return functools.partial(self._search, inputs["input_ids"].numpy(), new_tokens)

    def _search(self, ids: numpy.ndarray, new_tokens: int, logits: list | None = None) -> numpy.ndarray:
        value, made = load("onnxruntime").OrtValue.ortvalue_from_numpy, self.made
        given = dict(zip(made.cross, self.encoder.run_with_ort_values(made.cross, {"ids": value(ids)}), strict=True))
        empty = numpy.zeros((len(ids), made.heads, 0, made.head_dim), dtype=numpy.float32)
        given |= {name: value(empty) for name in made.past}
        free = numpy.zeros(self.vocabulary, dtype=numpy.float32)
        forbidden = free.copy()
        if self._end is not None:
            forbidden[self._end] = -numpy.inf
        forbidden, free = value(forbidden), value(free)
        given["ids"] = value(numpy.full((len(ids), 1), self.start, dtype=numpy.int64))
        wanted = ["token", *made.present] if logits is None else ["token", *made.present, "logits"]
        found = []
        for step in range(new_tokens):
            given["position"] = value(numpy.array([step + made.offset], dtype=numpy.int64))
            given["forbidden"] = free if step == new_tokens - 1 else forbidden
            given["ids"], *kept = self.decoder.run_with_ort_values(wanted, given)
            if logits is not None:
                logits.append(torch.from_numpy(kept.pop().numpy()))
            given |= zip(made.past, kept, strict=True)
            found.append(given["ids"].numpy())
        return numpy.concatenate(found, axis=1)

    def tokens(self, result):
        return torch.from_numpy(result)

    def logits(self, inputs, new_tokens):
        found: list[torch.Tensor] = []
        tokens = self._search(inputs["input_ids"].numpy(), new_tokens, found)
        return self.tokens(tokens), torch.stack(found, dim=1)

    def weights_bytes(self):
        return self.bytes

    def end(self):
        return self._end

    def kernel(self):
        return f"onnxruntime {'MatMulInteger, codes of 7 bits' if self.int8 else 'fp32'}, MultiHeadAttention"


def generate(model: nn.Module, dtype: torch.dtype, device: torch.device, name: str, int8: bool) -> Generator:
    """Both graphs of a float model."""
    return Generator(name, model, int8)


MODELS = {"onnxruntime fp32": {"int8": False}, "onnxruntime int8": {"int8": True}}
PEER = Peer(
    "onnxruntime",
    "pip install --no-deps onnxruntime onnx ml_dtypes flatbuffers",
    "onnxruntime",
    ("cpu",),
    linear={"onnxruntime int8 dynamic": dynamic_int8, "onnxruntime int4": int4},
    generate=lambda device: named(generate, **MODELS),
)
