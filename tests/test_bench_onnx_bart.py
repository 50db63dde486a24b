"""The graphs of whole models for ONNX Runtime: read back by its operators' descriptions, they are the model.

ONNX and ONNX Runtime are stood in for by what the adapter calls of them, so that this runs where neither is installed;
`test_bench_generate_proofs.py` asks the real ones where they are.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from generate_cases import CELL, CPU, SHAPES, T5, a_lineup, judged

from dqkernels.bench import generate_proofs as proofs
from dqkernels.bench import peers, size
from dqkernels.bench.generate_cells import Cell
from dqkernels.bench.peers import onnx_bart, onnxruntime

BART, MBART = SHAPES[0], SHAPES[1]
NAMES = ["onnxruntime fp32", "onnxruntime int8"]


class File:
    """A graph, as long as its constants."""

    def __init__(self, nodes, inputs, outputs, constants):
        self.nodes, self.constants = nodes, constants
        self.inputs = {name: (kind, shape) for name, kind, shape in inputs}
        self.outputs = {name: (kind, shape) for name, kind, shape in outputs}

    def SerializeToString(self):
        return self

    def __len__(self):
        return sum(array.nbytes for array in self.constants.values())


class Value:
    def __init__(self, array):
        self.array = array

    ortvalue_from_numpy = classmethod(lambda cls, array: cls(array.copy()))

    def numpy(self):
        return self.array


class Session:
    """Runs the nodes in their order; what is given and asked for has to be of the types and shapes that were said."""

    KINDS = {1: torch.float32, 7: torch.int64}

    def __init__(self, file, options, providers):
        assert providers == ["CPUExecutionProvider"] and options.intra_op_num_threads == torch.get_num_threads()
        assert options.entries == {"session.force_spinning_stop": "1"}
        self.file = file
        self.constants = {name: torch.from_numpy(array.copy()) for name, array in file.constants.items()}

    def run_with_ort_values(self, wanted, given):
        given = {name: torch.from_numpy(value.array) for name, value in given.items()}
        assert given.keys() == self.file.inputs.keys()
        sizes = {}
        for name, tensor in given.items():
            self.fits(tensor, *self.file.inputs[name], sizes)
        values = {"": None, **self.constants, **given}
        for op, inputs, outputs, options in self.file.nodes:
            found = getattr(Operators, op)(*(values[name] for name in inputs), **options)
            values.update(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))
        for name in wanted:
            self.fits(values[name], *self.file.outputs[name], sizes)
        return [Value(values[name].numpy()) for name in wanted]

    def fits(self, tensor, kind, shape, sizes):
        assert tensor.dtype == self.KINDS[kind] and tensor.dim() == len(shape)
        for size_, said in zip(tensor.shape, shape, strict=True):
            assert size_ == (sizes.setdefault(said, size_) if isinstance(said, str) else said)


class Operators:
    """ONNX's, and one of ONNX Runtime's, after their descriptions."""

    Add, Mul, MatMul = torch.add, torch.mul, torch.matmul
    Relu, Gelu = F.relu, F.gelu

    def Identity(x):
        return x

    def Shape(x):
        return torch.tensor(x.shape)

    def Range(first, last, step):
        return torch.arange(int(first), int(last), int(step))

    def Gather(table, ids):
        assert int(ids.min()) >= 0
        return table[ids]

    def Cast(x, to):
        assert to == 1
        return x.float()

    def Reshape(x, shape):
        return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())])

    def Transpose(x, perm):
        return x.permute(perm)

    def Gemm(a, b, transB):
        assert transB == 1 and a.dim() == b.dim() == 2
        return a @ b.t()

    def ArgMax(x, axis, keepdims):
        return x.argmax(axis, keepdim=bool(keepdims))

    def LayerNormalization(x, weight, bias, axis, epsilon):
        assert axis == -1
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    def DynamicQuantizeLinear(x):
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        zero = torch.round(-low / scale)
        return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)

    def MatMulInteger(q, codes, zero):
        assert codes.dtype == torch.int8 and int(codes.abs().amax()) <= 63  # more would saturate without VNNI
        return ((q.double() - zero.double()) @ codes.double()).to(torch.int32)

    def MultiHeadAttention(
        query, key, value, bias=None, hidden=None, added=None, past_key=None, past_value=None, *, num_heads, scale
    ):
        assert bias is hidden is added is None

        def heads(x):
            return x if x.dim() == 4 else x.unflatten(2, (num_heads, -1)).transpose(1, 2)

        q, k, v = map(heads, (query, key, value))
        if past_key is not None:
            k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        out = (scale * q @ k.transpose(2, 3)).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        return out if past_key is None else (out, k, v)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def plant(name, **members):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # others look for it
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    class Options(SimpleNamespace):
        def __init__(self):
            super().__init__(entries={})

        def add_session_config_entry(self, name, value):
            self.entries[name] = value

    def make_model(graph, opset_imports, ir_version):
        assert opset_imports == [("", 20), ("com.microsoft", 1)]
        return graph

    def make_node(op, inputs, outputs, domain="", **options):
        assert (domain == "com.microsoft") == (op == "MultiHeadAttention")
        return op, inputs, outputs, options

    helper = SimpleNamespace(
        make_node=make_node,
        make_tensor_value_info=lambda *facts: facts,
        make_opsetid=lambda *facts: facts,
        make_graph=lambda nodes, _, inputs, outputs, constants: File(nodes, inputs, outputs, dict(constants)),
        make_model=make_model,
    )
    plant("onnx", helper=helper, numpy_helper=SimpleNamespace(from_array=lambda array, name: (name, array)))
    plant("onnxruntime", InferenceSession=Session, SessionOptions=Options, OrtValue=Value)


def made(name: str, shape, change=lambda model: None, **config):
    """A candidate, and the lineup of the model that it was made of."""
    lineup = a_lineup(("onnxruntime",), shape)
    model = lineup.float32
    for key, value in config.items():
        setattr(model.config, key, value)
    change(model)
    return peers.generate("onnxruntime", name, model, torch.float32, CPU), lineup


def lively(model) -> None:
    """Biases that count, and norms that are none of them the identity."""
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.normal_(0, 0.3)
        elif "norm" in key:
            parameter.data.uniform_(0.5, 1.5)
    model.final_logits_bias.normal_()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [BART, MBART], ids=lambda shape: shape.name)
def test_they_compute_the_model(shape, layers, name):
    one, lineup = made(name, shape.with_layers(*layers), lively)
    reason, error = proofs.function(one, lineup.inputs(CELL), 6, lineup.reference)
    assert reason is None and error < (1e-5 if "fp32" in name else 0.1)
    # The table once in each graph, as codes or floats, and no layer forgotten.
    floats = size.weights_bytes(lineup.float32)
    table = lineup.float32.lm_head.weight.nbytes
    low, high = (floats, floats + 1.5 * table) if "fp32" in name else (0.25 * floats, 0.6 * floats + table)
    assert low < one.weights_bytes() < high


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_best_of_its_logits(name):
    """None of them the end before the last, which may be it."""
    one, lineup = made(name, BART, lively)
    inputs = lineup.inputs(Cell("1-1", 3, 1, 7, 5))
    tokens, logits = one.logits(inputs, 5)
    assert tokens.shape == (3, 5) and logits.shape == (3, 5, 512)
    allowed = logits.clone()
    allowed[:, :-1, one.end()] = -numpy.inf
    assert torch.equal(allowed.argmax(-1), tokens)
    assert torch.equal(one.tokens(one.bind(inputs, 5, 1)()), tokens)
    # A model that wants to end at once.
    one, lineup = made(name, BART, lambda model: model.final_logits_bias[:, one.end()].fill_(100.0))
    tokens = one.tokens(one.bind(inputs, 3, 1)())
    assert not (tokens[:, :-1] == one.end()).any() and (tokens[:, -1] == one.end()).all()


@pytest.mark.parametrize("name", NAMES)
def test_scaled_embeddings_and_another_activation(name):
    def change(model):
        lively(model)
        for side in (model.model.encoder, model.model.decoder):
            side.embed_tokens.embed_scale = 3.0
            for layer in side.layers:
                layer.activation_fn = torch.nn.ReLU()

    one, lineup = made(name, MBART, change, activation_function="relu")
    assert judged(one, lineup) is None


def test_a_wrong_graph_would_not_pass(monkeypatch):
    """The proof is one of these graphs too: positions that are off by one, keys for values, a norm left out."""
    for change in (lambda made: setattr(made, "offset", made.offset + 1), lambda made: made.present.reverse()):
        one, lineup = made("onnxruntime fp32", BART, lively)
        assert judged(one, lineup) is None
        change(one.made)
        assert "logits differ" in judged(one, lineup)
    monkeypatch.setattr(onnx_bart.Graph, "norm", lambda self, x, norm: x)
    assert "logits differ" in judged(*made("onnxruntime fp32", MBART, lively))


def test_what_it_does_not_take_is_said():
    one, lineup = made("onnxruntime int8", BART)
    assert one.foreign and one.bound == 0.3 and one.weight_bits == 8 and one.dtype == "fp32"
    assert one.kernel() == "onnxruntime MatMulInteger, codes of 7 bits, MultiHeadAttention"
    assert one.cannot(CELL) is None and "greedily only" in one.cannot(Cell("1-1", 2, 3, 7, 3))
    inputs = lineup.inputs(CELL)
    inputs["attention_mask"][0, -1] = 0
    with pytest.raises(peers.NotCompared, match="without padding"):
        one.bind(inputs, 3, 1)
    with pytest.raises(peers.NotCompared, match="adapter takes bart and mbart, got t5"):
        made("onnxruntime fp32", T5)
    with pytest.raises(peers.NotCompared, match="knows gelu and relu, got silu"):
        made("onnxruntime fp32", BART, activation_function="silu")
    assert peers.generators("onnxruntime", CPU) == NAMES == list(onnxruntime.MODELS)
