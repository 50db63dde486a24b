"""What `quantize_`, `from_pretrained`, `load`, `prepare_qat` and `export` do unasked: fused blocks, int8 attention."""

from __future__ import annotations

import copy
import functools
import json
import logging
import re

import pytest
import tiny_models
import torch
import torch_floats
import transformers
from attention_models import peaked, run
from torch import nn

import dqkernels
from dqkernels import DQConfig, checks, decode, quantize_, report
from dqkernels.decode import engine
from dqkernels.models import attention, blocks
from dqkernels.train import export, load_trained, packed_copy, prepare_qat

PATCHED = list(blocks.FAMILIES)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return run(model).logits


def fused(model) -> int:
    return sum(map(blocks.is_fused, model.modules()))


@pytest.fixture
def one_norm(monkeypatch):
    """For tests that compare fused and unfused models bit by bit: LayerNorm and GELU by torch in both."""
    torch_floats.put_in(monkeypatch)


# ---- fused blocks ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_norm")
@pytest.mark.parametrize("family", PATCHED)
def test_quantize_fuses(family):
    model = quantize_(peaked(family))
    assert fused(model) == 4 + 3 and report(model).blocks == "3 fused layers"
    apart = quantize_(peaked(family), DQConfig(fused=False))
    assert fused(apart) == 0 and report(apart).blocks == "not fused: fused=False, or unpatched"
    assert torch.equal(logits(model), logits(apart))


@pytest.mark.usefixtures("one_norm")
@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_every_way_to_a_packed_model_fuses(family, tmp_path):
    peaked(family).save_pretrained(tmp_path / "float")
    made = quantize_(peaked(family))
    wanted = logits(made)
    read = functools.partial(type(made).from_pretrained, dtype=torch.float32)
    made.save_pretrained(tmp_path / "packed")
    assert "fused" not in (tmp_path / "packed" / "config.json").read_text()
    off = DQConfig(fused=False)
    ways = {
        "quantized while loading": (read(tmp_path / "float", quantization_config=DQConfig()), 7),
        "the same, off": (read(tmp_path / "float", quantization_config=off), 0),
        "packed": (read(tmp_path / "packed"), 7),
        "packed, off": (read(tmp_path / "packed", quantization_config=off), 0),
        "load": (dqkernels.load(tmp_path / "packed", dtype="float32"), 7),
        "load, off": (dqkernels.load(tmp_path / "packed", dtype="float32", fused=False), 0),
        "a copy": (copy.deepcopy(made), 7),
    }
    for way, (model, count) in ways.items():
        assert fused(model) == count and torch.equal(logits(model), wanted), way
        assert model.config.quantization_config.fused == ("auto" if count else False), way
        model.save_pretrained(tmp_path / "again")
        assert fused(dqkernels.load(tmp_path / "again")) == 7, f"{way}: no file holds it"


def test_fused_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"fused must be one of \['auto', False\], got True"):
        dqkernels.load(tmp_path, fused=True)
    assert DQConfig(fused=False).get_loading_attributes()["fused"] is False


def test_others_run_module_by_module_and_are_named(caplog):
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        t5 = quantize_(peaked("t5"), DQConfig(strict=True, backend="eager"))
        plain = quantize_(nn.Sequential(nn.Linear(8, 8)))
    assert not caplog.records and fused(t5) == fused(plain) == 0
    for model, name in ((t5, "T5ForConditionalGeneration"), (plain, "Sequential")):
        assert report(model).blocks.startswith(f"not fused: {name} has no attention of bart, mbart, marian, pegasus")
    assert report(peaked("bart")).blocks == "", "nothing is packed"


def test_a_transformers_that_is_not_known_runs_module_by_module(monkeypatch, caplog):
    """P4: a warning and the report name it; `strict` refuses, before anything is changed."""
    wanted = logits(quantize_(peaked("bart"), DQConfig(fused=False)))
    bart = transformers.models.bart.modeling_bart.BartDecoderLayer
    forward = bart.forward

    def later(self, hidden_states, *args, memory=None, **kwargs):
        return forward(self, hidden_states, *args, **kwargs)

    later.__module__ = bart.__module__
    monkeypatch.setattr(bart, "forward", later)
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        model = quantize_(peaked("bart"))
    told = "BartDecoderLayer.forward of transformers"
    assert len(caplog.records) == 1 and told in caplog.text and "do not know args, memory" in caplog.text
    assert fused(model) == 0 and report(model).blocks.startswith(f"not fused: {told}")
    assert torch.equal(logits(model), wanted)
    strict = DQConfig(strict=True, backend="eager")
    for way in (quantize_, prepare_qat):
        untouched = peaked("bart")
        with pytest.raises(ValueError, match=told):
            way(untouched, strict)
        assert not any("dqkernels" in type(m).__module__ for m in untouched.modules())


def test_dequantized_is_transformers_own(tmp_path):
    model = quantize_(peaked("bart"))
    assert fused(model) and not fused(model.dequantize())
    assert type(model.get_decoder().layers[0]) is transformers.models.bart.modeling_bart.BartDecoderLayer
    kept = quantize_(peaked("bart"))
    layer = kept.get_decoder().layers[0]
    layer._old_forward = layer.forward  # as accelerate keeps it
    wanted = logits(model)
    assert torch.equal(logits(kept.dequantize()), wanted), "it may stay: on floats it runs what it is made of"


@pytest.mark.usefixtures("one_norm")
def test_layers_that_accelerate_holds_are_told_apart():
    """A device_map puts a `forward` on modules, which keeps the one it found: of transformers, or the fused one."""
    hooks = pytest.importorskip("accelerate.hooks")
    wanted = logits(quantize_(peaked("bart")))
    for late in (True, False):
        model = quantize_(peaked("bart"), DQConfig(fused=False if late else "auto"))
        layer = model.get_decoder().layers[0]
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
        blocks.patch(model)
        instead = "; a forward put on it before patch runs instead in 1" if late else ""
        assert report(model).blocks == "3 fused layers" + instead
        assert torch.equal(logits(model), wanted)


# ---- int8 attention -------------------------------------------------------------------------------------------


def is_int8(model) -> bool:
    return report(model).attention.startswith("int8 per_token on ")


@pytest.mark.parametrize("family", PATCHED)
def test_attention_is_int8_where_blocks_are_fused(family):
    model = quantize_(peaked(family))
    asked = quantize_(peaked(family), DQConfig(attention="int8"))
    off = quantize_(peaked(family), DQConfig(attention="float"))
    assert is_int8(model) and report(model).attention.count("self_attn") and model.config._attn_implementation
    assert report(off).attention == "float (attention='float')"
    assert torch.equal(logits(model), logits(asked)) and not torch.equal(logits(model), logits(off))


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_attention_is_float_elsewhere_and_the_report_says_so(family):
    model = quantize_(peaked(family))
    told = f"float (attention='auto' is int8 in {', '.join(blocks.FAMILIES)} alone)"
    assert report(model).attention == told
    assert torch.equal(logits(model), logits(quantize_(peaked(family), DQConfig(attention="float"))))
    pair = nn.ModuleDict({"one": peaked("bart"), "other": peaked(family)})
    assert attention.resolved(pair, DQConfig()).attention == "float"
    assert attention.resolved(pair["one"], DQConfig()).attention == "int8"


def test_heads_that_are_too_wide_stay_in_float(monkeypatch):
    monkeypatch.setattr(checks, "MAX_HEAD_DIM", 16)
    model = quantize_(peaked("bart"))
    wide = r"float \(model.encoder.layers.0.self_attn: head_dim must be at most 16 for int8 attention, got 20\)"
    assert re.fullmatch(wide, report(model).attention)
    with pytest.raises(ValueError, match="head_dim must be at most 16"):
        quantize_(peaked("bart"), DQConfig(attention="int8"))


@pytest.mark.parametrize("family, says", [("bart", "int8"), ("t5", "float")])
def test_a_file_says_what_it_was(family, says, tmp_path):
    """Not "auto", which may mean more in a later release, and meant less in an earlier one."""
    peaked(family).save_pretrained(tmp_path / "source")
    model = quantize_(peaked(family))
    direct = type(model).from_pretrained(tmp_path / "source", dtype=torch.float32, quantization_config=DQConfig())
    for made in (model, direct, packed_copy(prepare_qat(peaked(family)), torch.float32)):
        made.save_pretrained(tmp_path / "x")
        stored = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
        assert stored["attention"] == says == made.config.quantization_config.attention
        assert torch.equal(logits(dqkernels.load(tmp_path / "x", dtype="float32")), logits(model))


def test_a_file_from_before_stays_in_float(tmp_path):
    made = quantize_(peaked("bart"), DQConfig(attention="float"))
    student = prepare_qat(peaked("bart"), DQConfig(attention="float"))
    for model, read in ((made, dqkernels.load), (student, load_trained)):
        model.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(file.read_text().replace('"attention": "float"', '"attention": "auto"'))
        found = read(tmp_path)
        assert '"auto"' in file.read_text() and torch.equal(logits(found), logits(made))
        key = "quantization_config" if model is made else "dqkernels_qat"
        assert found.config.to_dict()[key]["attention"] == "float"


def test_packed_in_two_calls(caplog):
    """What the first one left to the second is packed, and attention stays as it was made."""
    for first, says in (("float", "float (attention='float')"), ("int8", "int8 per_token")):
        model = quantize_(peaked("bart"), DQConfig(attention=first, overrides={"fc1": {"skip": True}}))
        quantize_(model, DQConfig(act_granularity="per_tensor", overrides={"fc1": {"act_granularity": "per_token"}}))
        assert report(model).attention.startswith(says)


def test_dropout_is_named_where_it_means_something(caplog):
    model = peaked("bart")
    for module in model.modules():
        if hasattr(module, "is_decoder"):
            module.dropout = 0.25
    with caplog.at_level(logging.WARNING, logger="dqkernels"):
        quantize_(copy.deepcopy(model))
        assert not caplog.records
        prepare_qat(model)
    assert "attention dropout 0.25 is now 0 in BartForConditionalGeneration" in caplog.text


# ---- training -------------------------------------------------------------------------------------------------


def trained(family: str, config: DQConfig, learned: bool = False, steps: int = 2):
    model = prepare_qat(peaked(family), config, learned).train()
    torch.manual_seed(0)  # of dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        run(model).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "family, dtype",
    [*((family, torch.bfloat16) for family in PATCHED), ("bart", torch.float32), ("mbart", torch.float16)],
)
def test_p2_with_both_sides_fused(family, dtype, tmp_path):
    """In 16 bits a fused step rounds once less, so both sides have to be."""
    model = trained(family, DQConfig(weight_bits=2, embedding_bits=2), learned=True)
    with torch.no_grad():  # what a loss on maps leaves behind: hooks, in the model in training alone
        run(model, output_attentions=True, output_hidden_states=True)
    assert fused(model) == 7 and blocks.describe(model) == "3 fused layers"
    same = copy.deepcopy(model).to(dtype)
    wanted = logits(same)
    assert torch.isfinite(wanted).all()
    exported = export(model, tmp_path / "x", dtype=dtype)
    for packed in (packed_copy(model, dtype), exported, dqkernels.load(tmp_path / "x")):
        assert fused(packed) == 7 and torch.equal(logits(packed), wanted)
    if dtype != torch.float32:
        assert not torch.equal(logits(blocks.unpatch(same)), wanted), "or one side could be left out"


def test_training_is_what_it_was():
    """Fused steps have no gradients: the same hundred steps as without, bit for bit."""
    begun = prepare_qat(peaked("mbart"), DQConfig(weight_bits=4)).state_dict()
    states = [trained("mbart", DQConfig(weight_bits=4, fused=fuse), steps=100).state_dict() for fuse in ("auto", False)]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    weights = [name for name in begun if name.endswith("proj.weight")]
    assert len(weights) > 8 and not any(torch.equal(begun[name], states[0][name]) for name in weights)


def test_a_checkpoint_is_fused_again(tmp_path):
    model = trained("bart", DQConfig(weight_bits=4))
    model.save_pretrained(tmp_path)
    assert "fused" not in (tmp_path / "config.json").read_text()
    again = load_trained(tmp_path)
    assert fused(again) == 7 and torch.equal(logits(again), logits(model))


def test_int8_attention_brings_the_decode_loop(tmp_path):
    """Without being asked for, by every way to a packed model; a float attention keeps transformers' loop."""
    model = quantize_(tiny_models.make("bart").eval(), DQConfig(weight_bits=4))
    assert decode.is_attached(model)
    assert not decode.is_attached(quantize_(tiny_models.make("bart").eval(), DQConfig(attention="float")))
    given = {"input_ids": torch.arange(4, 12).reshape(1, 8), "max_new_tokens": 6, "min_new_tokens": 6}
    ours = model.generate(**given)
    assert engine.state_of(model).served == 1
    with decode.plain(model):
        assert torch.equal(ours, model.generate(**given))
    model.save_pretrained(tmp_path)
    again = dqkernels.load(tmp_path)
    assert decode.is_attached(again) and torch.equal(ours, again.generate(**given))
