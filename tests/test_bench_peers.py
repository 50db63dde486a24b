"""Other projects' adapters: what each owes before it is timed, and what is said of those that are not here.

Libraries are stood in for by the few calls that an adapter makes of them; where one is installed (`dqkernels bench
peers` names the commands) the real one is asked as well.
"""

from __future__ import annotations

import copy
import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
from rich.console import Console
from torch import nn

from dqkernels.bench import candidates, linear, peers, protocol
from dqkernels.bench.peers import base

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
N, K = 24, 64
#: (peer, candidate) of `bench linear`.
WAYS = [(peer.name, name) for peer in peers.of("linear") for name in peer.linear]


def a_layer(dtype=torch.float32) -> nn.Linear:
    return candidates.make_linear(N, K, dtype, CPU)


def an_input() -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------- stand-ins


class Graph(SimpleNamespace):
    def SerializeToString(self):
        return self


class Session:
    """ONNX's operators, as far as the adapter uses them."""

    def __init__(self, graph, options, providers):
        assert providers == ["CPUExecutionProvider"] and options.intra_op_num_threads == torch.get_num_threads()
        self.graph = graph
        self.constants = {name: array.copy() for name, array in graph.constants.items()}

    def run(self, outputs, given):
        values = {"": None, **self.constants, **given}
        for kind, names, results, more in self.graph.nodes:
            out = getattr(self, kind)(*(values[name] for name in names), **more)
            values.update(zip(results, out if isinstance(out, tuple) else (out,), strict=True))
        return [values["y"]]

    def DynamicQuantizeLinear(self, x):
        low, high = min(0.0, x.min()), max(0.0, x.max())
        scale = numpy.float32((high - low) / 255)
        zero = numpy.round(-low / scale)
        return numpy.clip(numpy.round(x / scale) + zero, 0, 255).astype(numpy.uint8), scale, numpy.uint8(zero)

    def MatMulInteger(self, q, codes, zero):
        assert codes.dtype == numpy.int8 and abs(codes).max() <= 63  # more would saturate without VNNI
        return (q.astype(numpy.int32) - zero) @ codes.astype(numpy.int32)

    def Cast(self, x, to):
        return x.astype(numpy.float32)

    def Mul(self, a, b):
        return a * b

    def Add(self, a, b):
        return a + b

    def MatMulNBits(self, x, codes, scale, zero, order, bias, *, K, N, bits, block_size, **_):
        low, high = codes & 15, codes >> 4
        whole = numpy.stack([low, high], axis=-1).reshape(N, K // block_size, block_size).astype(numpy.float32) - 8
        return x @ (whole * scale.reshape(N, -1, 1)).reshape(N, K).T + bias


class Ops:
    """OpenVINO's: each a function of the model's input."""

    def parameter(shape, type, name):
        return lambda x: x

    def constant(array):
        kept = numpy.array(array)
        return lambda x: kept

    def convert(value, type):
        return lambda x: value(x).astype(numpy.float32)

    def multiply(a, b):
        return lambda x: a(x) * b(x)

    def add(a, b):
        return lambda x: a(x) + b(x)

    def matmul(a, b, transpose_a, transpose_b):
        assert transpose_b and not transpose_a
        return lambda x: a(x) @ b(x).T


class Core:
    def compile_model(self, model, device, config):
        assert device == "CPU" and config["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
        infer = SimpleNamespace(infer=lambda inputs, share_inputs: [model(inputs[0])])
        return SimpleNamespace(create_infer_request=lambda: infer)


def quantize_(model, config):
    """torchao's, in which a weight is a tensor with others inside."""
    weights = base.Weights.rounded(model[0], 127, 8)
    weight = nn.Parameter(weights.dequantize(), requires_grad=False)
    weight.qdata, weight.scale, weight.zero_point = weights.codes, weights.scale, None
    weight.__tensor_flatten__ = lambda: (["qdata", "scale", "zero_point"], None)
    weight.dequantize = weights.dequantize
    model[0].weight = weight


@pytest.fixture
def fakes(monkeypatch):
    def plant(name, **members):
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    options = {"add_session_config_entry": lambda *_: None}
    plant("onnxruntime", InferenceSession=Session, SessionOptions=lambda: SimpleNamespace(**options))
    helper = SimpleNamespace(
        make_node=lambda kind, names, results, domain="", **more: (kind, names, results, more),
        make_tensor_value_info=lambda *facts: facts,
        make_opsetid=lambda domain, version: (domain, version),
        make_graph=lambda nodes, name, inputs, outputs, values: Graph(nodes=nodes, constants=dict(values)),
        make_model=lambda graph, **_: graph,
    )
    arrays = SimpleNamespace(from_array=lambda array, name: (name, array))
    plant("onnx", helper=helper, TensorProto=SimpleNamespace(FLOAT=1), numpy_helper=arrays)
    plant("openvino", Core=Core, Model=lambda outputs, inputs: outputs[0], Type=SimpleNamespace(f32="f32"))
    plant("openvino.opset14", **{name: value for name, value in vars(Ops).items() if callable(value)})
    plant("torchao")
    configs = {name: object for name in ("Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig")}
    plant("torchao.quantization", quantize_=quantize_, **configs)


# ---------------------------------------------------------------------------------------------- proofs


def judge(one: candidates.Candidate) -> None:
    """It computes the layer, and would not have passed otherwise."""
    x = an_input()
    y = one.module(x)
    assert one.prove(x, y) is None, one.name
    for wrong in (y * 1.05, y.roll(1, -1), y.roll(1, 0), y * float("nan"), torch.zeros_like(y)):
        assert "relative error" in one.prove(x, wrong), one.name
    assert "shape" in one.prove(x, y[:, 1:])
    column = y.clone()
    column[:, 7] = y[:, 8]
    assert "relative error" in one.prove(x, column), one.name
    assert 0 < one.weight_bytes < 4 * N * K and torch.equal(one.clone(one.module)(x), y)


@pytest.mark.parametrize(("peer", "name"), WAYS, ids=[name for _, name in WAYS])
def test_what_is_installed_is_proven(peer, name):
    if (reason := peers.missing(peers.PEERS[peer], "cpu")) is not None:
        pytest.skip(f"{peer}: {reason}")
    if name == "torchao int4 weights":
        with pytest.raises(peers.NotCompared, match="no kernel"):
            peers.PEERS[peer].linear[name](a_layer())
        return
    with torch.inference_mode():
        try:
            one = peers.PEERS[peer].linear[name](a_layer())
        except peers.NotCompared as reason:
            assert peer == "dynamic", reason  # it may be left out of torch; nobody else has an excuse
            pytest.skip(str(reason))
        assert one.name == name
        judge(one)


@pytest.mark.parametrize(
    "name", ["onnxruntime int8 dynamic", "onnxruntime int4", "openvino int8 weights", "torchao int8 weights"]
)
def test_adapters_give_a_library_this_layer(fakes, name):
    with torch.inference_mode():
        one = peers.PEERS[name.partition(" ")[0]].linear[name](a_layer())
        assert one.name == name and one.foreign and one.backend is None
        judge(one)


def test_clones_of_runtimes_have_weights_of_their_own(fakes):
    """Or the cold rows would walk through one copy."""
    one = peers.PEERS["onnxruntime"].linear["onnxruntime int4"](a_layer())
    clone = one.clone(one.module)
    clone.session.constants["codes"][:] = 0
    x = an_input()
    assert one.prove(x, one.module(x)) is None and one.prove(x, clone(x)) is not None
    vino = peers.PEERS["openvino"].linear["openvino int8 weights"](a_layer())
    assert vino.clone(vino.module).request is not vino.module.request


def test_a_library_that_holds_other_weights_is_refused(fakes, monkeypatch):
    """It computes what it holds; that is another layer."""

    def other(model, config):
        quantize_(model, config)
        weight = model[0].weight
        wrong = weight.data.roll(1, 0)
        weight.data = wrong
        weight.dequantize = lambda: wrong

    monkeypatch.setattr(sys.modules["torchao.quantization"], "quantize_", other)
    one = peers.PEERS["torchao"].linear["torchao int8 weights"](a_layer())
    x = an_input()
    assert one.prove(x, one.module(x)).startswith("weights: relative error")


def test_bytes_of_what_is_inside_a_tensor(fakes):
    one = peers.PEERS["torchao"].linear["torchao int8 dynamic"](a_layer())
    assert one.weight_bytes == N * K + 4 * N
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    assert base.model_bytes(tied) == 64


def test_a_layer_that_a_library_left_alone_is_not_compared(fakes, monkeypatch):
    monkeypatch.setattr(sys.modules["torchao.quantization"], "quantize_", lambda model, config: None)
    with pytest.raises(peers.NotCompared, match="left the layer as it was"):
        peers.PEERS["torchao"].linear["torchao int8 weights"](a_layer())


def test_a_peer_is_timed_beside_ours(fakes, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_COPIES", 4)
    monkeypatch.setattr(linear, "_MAX_ROUNDS", 2)
    with torch.inference_mode():
        layer = linear.Layer(N, K, torch.float32, CPU, (4,), ["eager"])
        rows = linear.measure(5, layer, 1000, None)
    found = {(row["candidate"], row["cache"]): row for row in rows}
    for name in ("onnxruntime int8 dynamic", "onnxruntime int4", "openvino int8 weights", "torchao int8 dynamic"):
        assert [found[name, cache]["status"] for cache in ("cold", "warm")] == ["timed", "timed"], name
        assert found[name, "cold"]["foreign"] and found[name, "cold"]["float_error"] < 0.2
    assert "torchao int4 weights" in layer.absent


def test_weights_rounded_to_blocks():
    layer = a_layer()
    layer.weight[3] = 0
    for levels, bits, group, step in ((127, 8, -1, 1 / 127), (7, 4, 32, 1 / 7)):
        weights = base.Weights.rounded(layer, levels, bits, group)
        assert weights.codes.dtype == torch.int8 and int(weights.codes.abs().max()) == levels
        assert weights.scale.shape == (N, 1 if group == -1 else K // group)
        error = (weights.dequantize() - layer.weight).abs()
        assert float(error.max()) <= 0.51 * step * float(layer.weight.abs().max()) and not weights.codes[3].any()


# ---------------------------------------------------------------------------------------- who is not here


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if peer.module is not None])
def test_peers_that_are_not_here_say_why(monkeypatch, name):
    peer = peers.PEERS[name]
    monkeypatch.setitem(sys.modules, peer.module, None)
    assert peers.missing(peer, peer.devices[0]) == "not installed"
    real = base.importlib.import_module

    def broken(wanted):
        if wanted == peer.module:
            raise OSError("libcublas.so.12: cannot open shared object file\nand more")
        return real(wanted)

    monkeypatch.setattr(base.importlib, "import_module", broken)
    words = "import failed: OSError: libcublas.so.12: cannot open shared object file"
    assert peers.missing(peer, peer.devices[0]) == words
    before = logging.root.manager.disable
    with pytest.raises(peers.NotCompared, match="import failed"):
        base.load(peer.module)
    assert logging.root.manager.disable == before


def test_what_a_peer_itself_lacks_is_no_absence_of_the_peer(monkeypatch):
    def lacks(wanted):
        raise ModuleNotFoundError("No module named 'ml_dtypes'", name="ml_dtypes")

    monkeypatch.setattr(base.importlib, "import_module", lacks)
    with pytest.raises(peers.NotCompared, match="import failed: ModuleNotFoundError: No module named 'ml_dtypes'"):
        base.load("onnx")


def test_a_layer_lists_who_is_not_here(monkeypatch):
    for peer in peers.PEERS.values():
        if peer.module is not None:
            monkeypatch.setitem(sys.modules, peer.module, None)
    found, absent = peers.linear(a_layer())
    assert {one.name for one in found} <= {"torch dynamic int8"}
    for name in ("onnxruntime", "openvino", "torchao", "bitsandbytes"):
        assert absent[name] == "not installed"
    for name in ("gemlite", "humming", "bitblas"):
        assert absent[name] == "is in bench gemm, with our codes"
    # Another dtype may be compared in the same run: its reason does not take the name.
    assert peers.linear(a_layer(torch.bfloat16))[1]["torch dynamic int8 bf16"] == "takes float32 only"


def test_peers_by_device():
    assert peers.missing(peers.PEERS["gemlite"], "cpu") == "takes CUDA tensors, not cpu"
    assert peers.missing(peers.PEERS["dynamic"], "cuda") == "runs on a CPU only"
    assert peers.generators("ctranslate2", CPU) == ["ctranslate2 fp32", "ctranslate2 int8"]
    assert peers.generators("ctranslate2", CUDA) == ["ctranslate2 fp16", "ctranslate2 int8_fp16"]
    assert peers.generators("onnxruntime", CPU) == ["onnxruntime fp32", "onnxruntime int8"]
    assert peers.generators("onnxruntime", CUDA) == ["onnxruntime"]
    with pytest.raises(peers.NotCompared, match="CPU only"):
        peers.generate("onnxruntime", "onnxruntime", nn.Module(), torch.float32, CUDA)
    with pytest.raises(peers.NotCompared, match="CPU only"):
        peers.generate("dynamic", "torch dynamic int8", nn.Module(), torch.float32, CUDA)


def test_another_version_of_a_peer_is_a_reason_and_no_crash(fakes, monkeypatch):
    monkeypatch.delattr(sys.modules["torchao.quantization"], "Int8WeightOnlyConfig")
    found, absent = peers.linear(a_layer())
    assert "Int8WeightOnlyConfig" in absent["torchao int8 weights"]
    assert "torchao int8 dynamic" in {one.name for one in found}


def test_every_peer_is_in_a_bench_and_says_how_to_install():
    rows = peers.listed(CPU)
    assert [row["peer"] for row in rows] == list(peers.PEERS)
    for row in rows:
        assert row["benches"] and (row["install"].startswith("pip install --no-deps ") or row["peer"] == "dynamic")
        # A bench has an adapter or a reason, never both.
        assert not set(row["benches"]) & set(row["without"])
    console = Console(width=80, record=True, file=open("/dev/null", "w"), color_system=None)
    console.print(peers.render(copy.deepcopy(rows), CPU))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "takes CUDA tensors" in text and "runs whole models only" in text
