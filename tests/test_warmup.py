"""warmup: which modules are run, at which sizes, and what it says where nothing is compiled."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch

import dqkernels
from dqkernels import fused, warmup
from dqkernels.backends import Choice
from dqkernels.cli import main
from dqkernels.models import blocks, native_layer
from dqkernels.nn import PackedModule, QEmbedding, QLinear


@pytest.fixture
def model():
    return dqkernels.quantize_(tiny_models.make("bart"), dqkernels.DQConfig(weight_bits=4, embedding_bits=8))


@pytest.fixture
def on_triton(monkeypatch):
    """Packed modules run on a stand-in of Triton that compiles two kernels for each new shape of input."""
    seen, compiled = [], {"count": 7}

    def forward(self, input):
        seen.append((type(self), tuple(self.weight.shape), tuple(input.shape), input.dtype))
        compiled["count"] += 2

    for kind in (QLinear, QEmbedding):
        monkeypatch.setattr(kind, "forward", forward)
    choice = Choice("triton", "stand-in")
    monkeypatch.setattr(warmup, "ops", SimpleNamespace(choose_qlinear=lambda *_: (choice, choice)))
    monkeypatch.setattr(warmup, "backends", SimpleNamespace(choose=lambda *_, **__: choice))
    monkeypatch.setattr(warmup, "_variants", lambda: compiled["count"])
    return seen


def test_every_kind_at_every_number_of_tokens_once(model, on_triton):
    steps = []
    found = warmup.warmup(model, (1, 64, 1), lambda *step: steps.append(step))
    shapes = {(type(m), tuple(m.weight.shape)) for m in model.modules() if isinstance(m, PackedModule)}
    assert {(kind, shape) for kind, shape, _, _ in on_triton} == shapes and len(on_triton) == 2 * len(shapes)
    assert {shape[0] for _, _, shape, _ in on_triton} == {1, 64}
    assert found.compiled == 2 * len(on_triton) and found.modules == len(shapes) and found.tokens == (1, 64)
    # Two kinds of fused layers: 1 token; 64 sequences of one, and one of 64.
    total = len(on_triton) + 2 * 3
    assert steps[0] == (0, total, "QEmbedding (100, 40) at 1") and steps[-1][:2] == (total, total)
    assert [words for _, _, words in steps[-7:-1]] == [
        f"Bart{part}Layer at {count}" for part in ("Encoder", "Decoder") for count in (1, 64, 64)
    ]
    assert f"{found.compiled} new kernels ready in " in str(found) and "1, 64 tokens" in str(found)
    assert "kinds of modules and 2 of fused layers at" in str(found) and found.to_dict()["layers"] == 2


def test_fused_layers_run_as_they_serve(model, on_triton, monkeypatch):
    """Their launches: a norm, GELU and residuals inside, which no module alone has."""
    ops_called = []
    multi = fused.linears
    monkeypatch.setattr(fused, "linears", lambda x, *a: ops_called.append(tuple(x.shape)) or multi(x, *a))
    monkeypatch.setattr(native_layer, "run", lambda *_: None)  # the tensors are a CPU's, where a layer is one call
    warmup.warmup(model, [5])
    # Encoder: qkv and fc1; decoder: qkv, cross q, cross kv and fc1; five sequences of one token and one of five.
    assert sorted(ops_called) == [(1, 5, 40)] * 6 + [(5, 1, 40)] * 6
    ops_called.clear()
    for layer in blocks.fused_layers(model):
        layer.fc1.register_forward_pre_hook(lambda *_: None)
    assert warmup.warmup(model, [5]).layers == 0 and not ops_called
    assert warmup.warmup(blocks.unpatch(model), [5]).layers == 0 and not ops_called


def test_what_makes_another_kernel_is_another_kind(on_triton):
    """Equal shapes, but another width, another bias or another dtype."""

    def make(bits=4, bias=True, dtype=torch.float32):
        linear = torch.nn.Linear(16, 16, bias=bias).to(dtype)
        return QLinear.from_linear(linear, dqkernels.DQConfig(weight_bits=bits))

    different = [make(), make(bits=8), make(bias=False), make(dtype=torch.bfloat16)]
    model = torch.nn.Sequential(*different, make(), make(bits=8))
    assert warmup.warmup(model, [3]).modules == 4
    assert [dtype for *_, dtype in on_triton].count(torch.bfloat16) == 1


def test_outputs_that_are_too_large_are_not_made(model, on_triton, monkeypatch):
    """The head of 100 words at 64 tokens, not the table of 100 rows of which 64 are read."""
    monkeypatch.setattr(warmup, "_MAX_ELEMENTS", 64 * 60)
    warmup.warmup(model, (1, 64))
    shapes = {(kind, shape, given[0]) for kind, shape, given, _ in on_triton}
    assert (QLinear, (100, 40), 1) in shapes and (QLinear, (100, 40), 64) not in shapes
    assert (QEmbedding, (100, 40), 64) in shapes and (QLinear, (56, 40), 64) in shapes


def test_hooks_are_not_called_with_zeros(model, on_triton):
    called = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: called.append(1))
    warmup.warmup(model, [1])
    assert on_triton and not called


def test_nothing_to_compile(model):
    """On a CPU: every module is named with the backend that runs it, and none is run."""
    if torch.cuda.is_available():
        model.cpu()
    packed = sum(isinstance(module, PackedModule) for module in model.modules())
    found = warmup.warmup(model)
    assert found.modules == found.compiled == 0 and sum(found.skipped.values()) == packed
    assert "compiles nothing" in str(found) and json.dumps(found.to_dict())


@pytest.mark.parametrize("tokens", [[], [0], [4, -1]])
def test_tokens_are_checked(model, tokens):
    with pytest.raises(ValueError, match="tokens must be numbers above 0"):
        warmup.warmup(model, tokens)


def test_a_float_model_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="quantize it first"):
        warmup.warmup(torch.nn.Linear(2, 2))
    tiny_models.make("bart").save_pretrained(tmp_path / "float")
    assert main(["warmup", str(tmp_path / "float")]) == 2
    assert "model has no packed module" in capsys.readouterr().err


def test_the_verb(tmp_path, capsys, model):
    model.save_pretrained(tmp_path / "w4")
    assert main(["warmup", str(tmp_path / "w4"), "--device", "cpu", "--tokens", "1,16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [1, 16] and found["compiled"] == 0 and found["skipped"]
    assert main(["warmup", str(tmp_path / "w4"), "--tokens", "0"]) == 2
    assert "--tokens must be" in capsys.readouterr().err
