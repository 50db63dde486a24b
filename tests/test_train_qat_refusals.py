"""What prepare_qat, packed_copy and load_trained refuse, in words; training checkpoints as they come back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_train_qat import RECIPES, one_thread, tied_sets, trained  # noqa: F401 - a fixture
from torch import nn

import dqkernels
from dqkernels import DQConfig
from dqkernels.models import blocks
from dqkernels.train import export, load_trained, packed_copy, prepare_qat
from dqkernels.train.qat import CONFIG_KEY, is_prepared

# ------------------------------------------------------------------------------------------------ load_trained


CHECKPOINTS = [("bart", "2-2-8 learned"), ("mbart", "float head"), ("t5", "2-2-8 learned"), ("t5_v1_1", "paper")]


@pytest.mark.parametrize("family, recipe", CHECKPOINTS)
def test_load_trained_gives_the_model_back(family, recipe, tmp_path):
    config, learned = RECIPES[recipe]
    model = trained(family, config, learned)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if learned else "5GB")
    again = load_trained(tmp_path)
    assert not again.training and tied_sets(again) == tied_sets(model)
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    for (name, mine), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs), name
    came_to = "int8" if model.config.model_type in blocks.FAMILIES else "float"  # of "auto"
    assert again.dqkernels_qat == dataclasses.replace(
        config, attention=came_to if config.attention == "auto" else config.attention
    )
    packed = export(again, tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(tiny_models.logits(packed), tiny_models.logits(model))


def test_load_trained_takes_a_float_model_too(tmp_path):
    model = tiny_models.make("bart")
    model.save_pretrained(tmp_path)
    again = load_trained(tmp_path, device="cpu")
    assert not is_prepared(again) and torch.equal(tiny_models.logits(again), tiny_models.logits(model))


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


BROKEN = {
    "a missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.encoder.layers.0.fc1.weight")),
        r"missing, unknown or of another shape: .*encoder.layers.0.fc1.weight",
    ),
    "an unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.encoder.extra.weight": torch.ones(3)})),
        r"missing, unknown or of another shape: .*extra.weight",
    ),
    "a missing step": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.encoder.layers.0.fc1.weight_log_step")),
        r"learned steps missing or without a module: .*fc1.weight_log_step",
    ),
    "a step too many": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.encoder.weight_log_step": torch.ones(3)})),
        "learned steps missing or without a module: model.encoder.weight_log_step",
    ),
    "steps of a model without": (
        lambda f: edit_config(f, lambda c: c[CONFIG_KEY].update(learned_scale=False)),
        "learned steps missing or without a module",
    ),
    "steps of a float model": (
        lambda f: edit_config(f, lambda c: c.pop(CONFIG_KEY)),
        "missing, unknown or of another shape: .*weight_log_step",
    ),
    "steps of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.encoder.layers.0.fc1.weight_log_step": torch.ones(1)})),
        r"model.encoder.layers.0.fc1.weight_log_step has shape \[1\], wanted \[56\]",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no class": (
        lambda f: edit_config(f, lambda c: c.pop("architectures")), "must name a model class of transformers, got None"
    ),
    "not a class": (
        lambda f: edit_config(f, lambda c: c.update(architectures=["Trainer"])), "must name a model class .* 'Trainer'"
    ),
    "learned_scale as a word": (
        lambda f: edit_config(f, lambda c: c[CONFIG_KEY].update(learned_scale="yes")),
        "dqkernels_qat.learned_scale must be true or false, got 'yes'",
    ),
    "an unknown key": (lambda f: edit_config(f, lambda c: c[CONFIG_KEY].update(colour=1)), "colour"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    prepare_qat(tiny_models.make("bart"), DQConfig(weight_bits=2), True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_in_words(name, checkpoint, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_trained(folder)  # as it is, it loads
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_trained(folder)


def test_a_packed_folder_and_no_folder_are_refused(tmp_path):
    export(trained("bart", steps=0), tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed already: read it with dqkernels.load"):
        load_trained(tmp_path / "packed")
    with pytest.raises(ValueError, match="folder must hold a trained model, .*nowhere.* has no config.json"):
        load_trained(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------- refusals


def with_nan():
    model = tiny_models.make("bart")
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight[3, 5] = float("nan")
    return model


def on_meta():
    return tiny_models.make("bart").to("meta")


REFUSED = {
    "packed": (lambda: prepare_qat(dqkernels.quantize_(tiny_models.make("bart"))), "packed and cannot be trained"),
    "twice": (lambda: prepare_qat(prepare_qat(tiny_models.make("bart"))), "prepared already: prepare_qat takes"),
    "static": (
        lambda: prepare_qat(tiny_models.make("bart"), DQConfig(act_granularity="static")),
        "act_granularity must be 'per_token' or 'per_tensor' while training, got 'static'",
    ),
    "static in an override": (
        lambda: prepare_qat(tiny_models.make("bart"), DQConfig(overrides={".*fc1": {"act_granularity": "static"}})),
        "while training, got 'static'",
    ),
    "groups with learned steps": (
        lambda: prepare_qat(tiny_models.make("bart"), DQConfig(group_size=32), learned_scale=True),
        "learned_scale needs group_size=-1, got 32",
    ),
    "NaN with learned steps": (
        lambda: prepare_qat(with_nan(), learned_scale=True), "encoder.layers.0.fc1: weight has NaN or Inf values"
    ),
    "meta": (lambda: prepare_qat(on_meta()), "weight is on the meta device and has no values: load the weights first"),
    "meta with learned steps": (lambda: prepare_qat(on_meta(), learned_scale=True), "is on the meta device"),
    "a single layer": (lambda: prepare_qat(nn.Linear(4, 4)), "model is a single layer, .*: use QATLinear.from_linear"),
    "nothing": (lambda: prepare_qat(nn.Sequential(nn.LayerNorm(4))), "nothing to quantize in Sequential"),
    "everything skipped": (
        lambda: prepare_qat(nn.Sequential(nn.Linear(4, 4)), DQConfig(overrides={".*": {"skip": True}})),
        "nothing to quantize in Sequential",
    ),
    "a dict": (lambda: prepare_qat(tiny_models.make("bart"), {"weight_bits": 2}), "must be a DQConfig, got dict"),
    "export of a float model": (
        lambda: packed_copy(tiny_models.make("bart")), "model has no quantized layer to export: prepare_qat"
    ),
    "export in float64": (
        lambda: packed_copy(prepare_qat(tiny_models.make("bart")), torch.float64), "dtype must be float32, float16 or"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_in_words(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_model_is_as_it_was():
    """Refused half way through its layers: no module was swapped, no parameter added."""
    model = with_nan()
    names = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match="NaN"):
        prepare_qat(model, learned_scale=True)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert not hasattr(model.config, CONFIG_KEY) and not hasattr(model, "dqkernels_qat")


def test_a_model_that_diverged_is_not_exported(tmp_path):
    model = trained("bart", DQConfig(weight_bits=4))
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="decoder.layers.0.fc2: weight has NaN or Inf values: the training diverged"):
        export(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_swapped_modules_are_noticed_at_export():
    model = prepare_qat(tiny_models.make("bart"))
    layer = model.model.encoder.layers[0]
    layer.fc1 = nn.Linear(40, 56)
    with pytest.raises(ValueError, match="modules changed since prepare_qat: model.encoder.layers.0.fc1"):
        packed_copy(model)


def test_a_master_that_a_tied_float_head_was_cast_with_is_refused():
    model = prepare_qat(tiny_models.make("bart"), DQConfig(head="float")).eval()
    tiny_models.logits(model)
    with pytest.raises(RuntimeError, match="must be float32 and was cast to torch.bfloat16, by a float layer"):
        tiny_models.logits(model.to(torch.bfloat16))
