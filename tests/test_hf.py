"""The transformers plug-in: packing while loading, saving, reloading, tying, refusals; bit-exact throughout."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, auto_class, logits, make
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM

import dqkernels
from dqkernels import DQConfig, QLinear
from dqkernels.nn import PackedModule
from dqkernels.serialize import FileFormatError

transformers.utils.logging.disable_progress_bar()
CONFIG = DQConfig(weight_bits=4, embedding_bits=8)


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    """`folder(family)`: a float checkpoint of it, written once."""
    root = tmp_path_factory.mktemp("float")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            make(family).save_pretrained(path)
        return path

    return folder


@pytest.fixture
def load_log(caplog):
    """Warnings of transformers while loading (its logger does not propagate by itself)."""
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield caplog
    transformers.utils.logging.disable_propagation()


def tables(model) -> dict[tuple, list[str]]:
    """Names of packed modules by the storage they read."""
    found: dict[tuple, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            key = (module.qweight.data_ptr(), module.weight_scale.data_ptr())
            found.setdefault(key, []).append(name)
    return found


def largest_table(model) -> int:
    return max(len(names) for names in tables(model).values())


def layers(model) -> dict[str, object]:
    return {name: module.layer for name, module in model.named_modules() if isinstance(module, PackedModule)}


def stored_names(folder) -> set[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return set(file.keys())


# ------------------------------------------------------------------------------------------------ the families

#: Tied to a parameter of a module that is not packed, and trained with it.
BIASES_OF_OTHERS = ("cls.predictions.decoder",)


@pytest.mark.parametrize("family", FAMILIES)
def test_pack_while_loading_save_and_reload(family, float_folder, tmp_path, load_log):
    auto, readers = auto_class(family), FAMILIES[family][2]
    flying = auto.from_pretrained(float_folder(family), dtype="bfloat16", quantization_config=CONFIG)
    in_memory = auto.from_pretrained(float_folder(family), dtype="bfloat16")
    float_logits = logits(in_memory)
    dqkernels.quantize_(in_memory, CONFIG)
    expected = logits(flying)
    assert torch.equal(logits(in_memory), expected)
    assert torch.isfinite(expected).all() and not torch.equal(expected, float_logits)
    assert largest_table(flying) == largest_table(in_memory) == readers

    flying.save_pretrained(tmp_path / "flying")
    in_memory.save_pretrained(tmp_path / "in_memory")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("flying", "in_memory"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    per_table = [name for name in first if name.endswith(".qweight")]
    assert len(per_table) == len(tables(flying)), "a tied table must be in the file once"

    load_log.clear()
    reloaded = auto.from_pretrained(tmp_path / "flying")
    assert "LOAD REPORT" not in load_log.text
    for model in (reloaded, dqkernels.load(tmp_path / "in_memory")):
        assert torch.equal(logits(model), expected)
        assert largest_table(model) == readers
        assert model.dtype == model.config.dtype == torch.bfloat16
        assert all(m.weight_scale.dtype == torch.float32 for m in model.modules() if isinstance(m, PackedModule))
        assert not any(isinstance(m, nn.Linear) for m in model.modules())

    for model in (flying, in_memory, reloaded):
        biases = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(".bias")}
        assert biases == {
            n: p.requires_grad for n, p in in_memory.named_parameters(remove_duplicate=False) if n in biases
        }
        assert not any(biases.get(f"{name}.bias") for name in layers(model) if name not in BIASES_OF_OTHERS)
        model.tie_weights()  # computes its mapping anew
        assert model.get_expanded_tied_weights_keys(all_submodels=True) == model.all_tied_weights_keys
        assert torch.equal(logits(model), expected)
        assert largest_table(model) == readers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_other_dtypes(family, dtype, float_folder, tmp_path):
    auto = auto_class(family)
    flying = auto.from_pretrained(float_folder(family), dtype=dtype, quantization_config=CONFIG)
    in_memory = dqkernels.quantize_(auto.from_pretrained(float_folder(family), dtype=dtype), CONFIG)
    assert torch.equal(logits(flying), logits(in_memory))
    flying.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    reloaded = auto.from_pretrained(tmp_path)
    assert flying.dtype == reloaded.dtype == dtype
    assert torch.equal(logits(flying), logits(reloaded))
    if family == "t5":  # transformers keeps wo in float32 beside float16, because its sums overflow
        feed_forward = reloaded.encoder.block[0].layer[1].DenseReluDense
        assert isinstance(feed_forward.wo, QLinear) and feed_forward.wo.weight.dtype == torch.float32
    other = torch.float16 if dtype == torch.float32 else torch.bfloat16
    cast = dqkernels.load(tmp_path, dtype=other)
    assert cast.dtype == other and torch.isfinite(logits(cast)).all()
    assert torch.equal(cast.get_input_embeddings().weight_scale, flying.get_input_embeddings().weight_scale)


CONFIGS = {
    "paper": DQConfig.preset("dq-bart-2-2-8"),
    "groups": DQConfig(weight_bits=2, embedding_bits=4, group_size=32),
    "ternary_groups": DQConfig(weight_bits=2, weight_quantizer="ternary", embedding_bits=2, group_size=32),
    "w8": DQConfig(weight_bits=8),
    "float_embedding": DQConfig(embedding_bits=16),
    "float_head": DQConfig(head="float"),
    "overrides": DQConfig(overrides={"fc2": {"weight_bits": 8}, r"encoder\.layers\.0": {"skip": True}}),
    "float_embedding_by_override": DQConfig(overrides={"shared|embed_tokens|lm_head": {"skip": True}}),
    # Out of alphabetical order, in which transformers writes the keys of every JSON object.
    "order_of_activations": DQConfig(
        overrides={"fc1": {"act_granularity": "per_tensor"}, "encoder": {"act_granularity": "per_token"}}
    ),
    "order_of_quantizers": DQConfig(
        weight_bits=2, overrides={"fc": {"weight_quantizer": "ternary"}, "encoder": {"weight_quantizer": "four_level"}}
    ),
    "order_of_skips": DQConfig(overrides={"encoder": {"skip": True}, "0.fc1": {"skip": False}}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_configs(name, float_folder, tmp_path, load_log):
    config = CONFIGS[name]
    flying = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=config)
    in_memory = dqkernels.quantize_(AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart")), config)
    assert torch.equal(logits(flying), logits(in_memory))
    assert flying.dqkernels_skipped == in_memory.dqkernels_skipped
    flying.save_pretrained(tmp_path / "flying")
    in_memory.save_pretrained(tmp_path / "in_memory")
    assert stored_names(tmp_path / "flying") == stored_names(tmp_path / "in_memory")
    load_log.clear()
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "flying")
    assert "LOAD REPORT" not in load_log.text
    for model in (reloaded, dqkernels.load(tmp_path / "in_memory")):
        assert torch.equal(logits(model), logits(flying))
        assert layers(model) == layers(in_memory) == layers(flying)
    assert reloaded.dqkernels_skipped == flying.dqkernels_skipped
    # A file says what "auto" came to.
    assert reloaded.config.quantization_config.to_dict() == {**config.to_dict(), "attention": "int8"}
    for model in (flying, in_memory, reloaded):
        model.tie_weights()
        assert torch.equal(logits(model), logits(flying))
        if name.startswith("float_embedding"):
            assert model.lm_head.weight is model.model.shared.weight, "the float table stays tied"
        elif name == "float_head":
            assert type(model.lm_head) is nn.Linear
            assert isinstance(model.model.shared, PackedModule)


def test_static_activations_are_calibrated_saved_and_reloaded(float_folder, tmp_path):
    config = DQConfig(act_granularity="static")
    model = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=config)
    with pytest.raises(FileFormatError, match="act_scale.*calibrate"):
        model.save_pretrained(tmp_path / "never")
    ids = torch.tensor([[5, 6, 7, 8]])
    dqkernels.calibrate(model, [{"input_ids": ids, "decoder_input_ids": ids}])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(model)) and torch.isfinite(logits(model)).all()
    assert "lm_head.act_scale" in stored_names(tmp_path), "the head shares the table but not the input"


def test_generate_gives_the_same_tokens_after_reload(float_folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    model.save_pretrained(tmp_path)
    reloaded = dqkernels.load(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    kwargs = {"num_beams": 2, "min_new_tokens": 4, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids, **kwargs), reloaded.generate(ids, **kwargs))


def test_base_model_of_a_packed_checkpoint(float_folder, tmp_path):
    """Names in the file carry the prefix `model.` that a bare BartModel does not have, and the other way round."""
    full = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), dtype="bfloat16", quantization_config=CONFIG)
    full.save_pretrained(tmp_path / "full")
    base = AutoModel.from_pretrained(tmp_path / "full")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = full.model(input_ids=ids, decoder_input_ids=ids).last_hidden_state
        assert torch.equal(base(input_ids=ids, decoder_input_ids=ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(again), logits(full))


def test_sharded_checkpoint(float_folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)), logits(model))
    assert torch.equal(logits(dqkernels.load(tmp_path)), logits(model))


def test_variant(float_folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    model.save_pretrained(tmp_path, variant="w4")
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path, variant="w4")), logits(model))


@pytest.mark.parametrize("save", ["save_pretrained", "serialize"])
def test_saving_over_the_folder_it_was_loaded_from(save, float_folder, tmp_path):
    """The loaded tensors are a map of that very file."""
    AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG).save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    if save == "serialize":
        dqkernels.serialize.save(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    expected = logits(model)
    assert len((tmp_path / "model.safetensors").read_bytes()) == len(before)
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)), expected)


# --------------------------------------------------------------------------------------- float checkpoints as found


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose dict of tensors went through `change`."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    with safe_open(source / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(change(tensors), target / "model.safetensors", metadata=metadata)
    return target


def test_float_file_that_holds_a_tied_weight_twice(float_folder, tmp_path, load_log):
    def twice(tensors):
        table = tensors["model.shared.weight"]
        return {**tensors, "model.encoder.embed_tokens.weight": table.clone(), "lm_head.weight": table.clone()}

    folder = rewritten(float_folder("bart"), tmp_path / "twice", twice)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=CONFIG)
    once = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    assert largest_table(model) == 4 and torch.equal(logits(model), logits(once))
    assert "LOAD REPORT" not in load_log.text


def test_float_file_that_holds_only_the_tied_target(float_folder, tmp_path, load_log):
    def head_only(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.shared.weight")
        return tensors

    folder = rewritten(float_folder("bart"), tmp_path / "head", head_only)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=CONFIG)
    once = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    assert largest_table(model) == 4 and torch.equal(logits(model), logits(once))
    assert "LOAD REPORT" not in load_log.text


def test_a_layer_the_float_checkpoint_lacks_is_reported_and_initialised(float_folder, load_log):
    model = transformers.BartForSequenceClassification.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    assert "classification_head.dense" in load_log.text and "MISSING" in load_log.text
    head = model.classification_head.dense
    assert isinstance(head, QLinear) and "weight" not in head._parameters
    assert head.dequantize().abs().max() > 0 and torch.isfinite(head.dequantize()).all()


@pytest.fixture
def dirty_memory(monkeypatch):
    """What `torch.empty_like` may hand out: here it always holds garbage, on a CPU often zeros."""
    empty_like = torch.empty_like

    def dirty(tensor, **kwargs):
        new = empty_like(tensor, **kwargs)
        return new.fill_(1.7e38) if new.is_floating_point() and not new.is_meta else new

    monkeypatch.setattr(torch, "empty_like", dirty)


def test_a_bias_the_float_checkpoint_lacks_is_zero(float_folder, tmp_path, dirty_memory):
    model = transformers.BartForSequenceClassification.from_pretrained(float_folder("bart"), quantization_config=CONFIG)
    assert torch.count_nonzero(model.classification_head.dense.bias) == 0
    assert torch.count_nonzero(model.classification_head.out_proj.bias) == 0
    assert torch.count_nonzero(model.model.encoder.layers[0].fc1.bias) > 0, "what the file has stays"
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    folder = rewritten(float_folder("bert"), tmp_path / "bert", lambda t: {k: v for k, v in t.items() if k != name})
    bert = transformers.AutoModelForMaskedLM.from_pretrained(folder, quantization_config=CONFIG)
    assert torch.count_nonzero(bert.get_parameter(name)) == 0
    assert torch.count_nonzero(bert.cls.predictions.decoder.bias) > 0


def test_non_finite_weights_are_refused_by_name(float_folder, tmp_path, load_log):
    name = "model.decoder.layers.0.fc1.weight"

    def spoil(tensors):
        tensors[name][3, 5] = float("nan")
        return tensors

    folder = rewritten(float_folder("bart"), tmp_path / "nan", spoil)
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=CONFIG)
    assert f"{name}: weight has NaN or Inf" in load_log.text


# -------------------------------------------------------------------------------------- packed checkpoints, strictly


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory, float_folder):
    folder = tmp_path_factory.mktemp("packed") / "bart"
    AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=CONFIG).save_pretrained(folder)
    return folder


FC1 = "model.encoder.layers.1.fc1"
NORM = "model.encoder.layers.0.self_attn_layer_norm.weight"
POSITIONS = "model.decoder.embed_positions.weight"


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if not k.startswith(FC1)}, rf"{FC1}.qweight.*missing"),
        (lambda t: {**t, f"{FC1}.qweight": t[f"{FC1}.qweight"][:16]}, rf"{FC1}"),
        (lambda t: {**t, f"{FC1}.bias": t[f"{FC1}.bias"][:5]}, rf"{FC1}.bias.*shape is \[5\], wanted \[56\]"),
        (lambda t: {**t, f"{FC1}.weight_scale": -t[f"{FC1}.weight_scale"]}, rf"{FC1}.weight_scale.*not below 0"),
        (lambda t: {**t, f"{FC1}.weight_scale": t[f"{FC1}.weight_scale"] / 0}, rf"{FC1}.weight_scale.*finite"),
        (lambda t: {**t, f"{FC1}.weight_scale": t[f"{FC1}.weight_scale"][:1]}, rf"{FC1}.weight_scale.*shape"),
        (lambda t: without(t, f"{FC1}.bias"), rf"tensor '{FC1}.bias' is missing"),
        (lambda t: without(t, NORM), rf"tensor '{NORM}' is missing"),
        (lambda t: without(t, POSITIONS), rf"tensor '{POSITIONS}' is missing"),
        (lambda t: without(t, NORM, POSITIONS), rf"tensor '{POSITIONS}' \(and 1 more\) is missing"),
        (lambda t: {**t, "model.hook.bias": torch.ones(1)}, "'model.hook.bias' is in the file, wanted none"),
        (lambda t: {**t, f"{FC1}.weight": torch.ones(1)}, rf"'{FC1}.weight' is in the file, wanted none"),
        (lambda t: {**t, NORM: t[NORM].long()}, rf"{NORM}.*dtype is I64, wanted torch.float32"),
        (lambda t: {**t, NORM: torch.ones(40, dtype=torch.uint8)}, rf"{NORM}.*dtype is U8, wanted torch.float32"),
    ],
    ids=[
        "missing",
        "qweight rows",
        "bias shape",
        "negative scale",
        "infinite scale",
        "scale rows",
        "no bias",
        "no norm",
        "no positions",
        "two missing",
        "unknown tensor",
        "a float beside the codes",
        "a norm of whole numbers",
        "a norm of bytes",
    ],
)
@pytest.mark.parametrize("how", ["from_pretrained", "load"])
def test_packed_checkpoints_load_strictly(change, message, how, packed_folder, tmp_path):
    folder = rewritten(packed_folder, tmp_path / "changed", change)
    with pytest.raises(FileFormatError, match=message):
        dqkernels.load(folder) if how == "load" else AutoModelForSeq2SeqLM.from_pretrained(folder)


def test_what_the_architecture_ignores_may_be_absent_or_too_many(packed_folder, float_folder, tmp_path):
    """BART's own lists of names, T5's, and the float64 that a file may hold instead of another float."""
    expected = logits(dqkernels.load(packed_folder))

    def change(t):
        return {**without(t, "final_logits_bias"), "encoder.version": torch.ones(1), NORM: t[NORM].double()}

    folder = rewritten(packed_folder, tmp_path / "bart", change)
    assert torch.equal(logits(dqkernels.load(folder)), expected)
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(folder)), expected)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(float_folder("t5"), quantization_config=CONFIG)
    t5.save_pretrained(tmp_path / "t5")
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    folder = rewritten(tmp_path / "t5", tmp_path / "t5_old", lambda t: {**t, name: torch.ones(32, 2)})
    assert torch.equal(logits(dqkernels.load(folder)), logits(t5))


def test_another_class_of_a_packed_folder(packed_folder, float_folder, tmp_path):
    """Without a head: the rest of the file is not its business. With a head the file lacks: refused."""
    encoder = transformers.BartModel.from_pretrained(packed_folder)
    assert largest_table(encoder) == 3
    with pytest.raises(FileFormatError, match=r"classification_head.*\.qweight' \(and 5 more\) is missing"):
        transformers.BartForSequenceClassification.from_pretrained(packed_folder)
    bert = transformers.AutoModelForMaskedLM.from_pretrained(float_folder("bert"), quantization_config=CONFIG)
    bert.save_pretrained(tmp_path)
    base = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert torch.equal(base.embeddings.word_embeddings.weight_scale, bert.bert.embeddings.word_embeddings.weight_scale)


def test_unknown_key_in_the_stored_config(packed_folder, tmp_path):
    folder = rewritten(packed_folder, tmp_path / "changed", lambda tensors: tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["zero_point"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="unknown keys.*zero_point"):
        AutoModelForSeq2SeqLM.from_pretrained(folder)


def test_config_for_an_already_packed_checkpoint_warns(packed_folder):
    with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
        model = AutoModelForSeq2SeqLM.from_pretrained(packed_folder, quantization_config=DQConfig(weight_bits=2))
    assert model.model.encoder.layers[0].fc1.layer.bits == 4


def where(model) -> set[tuple[str, bool]]:
    """Backends and strictness of its packed modules and of its config."""
    modules = [m for m in model.modules() if isinstance(m, PackedModule)]
    return {(m.backend, m.strict) for m in (*modules, model.config.quantization_config)}


def test_backend_and_strict_are_of_the_machine_and_not_of_the_folder(float_folder, tmp_path, recwarn):
    config = DQConfig(backend="cuda", strict=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(float_folder("bart"), quantization_config=config)
    in_memory = dqkernels.quantize_(make("bart"), config)
    assert where(model) == where(in_memory) == {("cuda", True)}
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "backend" not in stored and "strict" not in stored
    for reloaded in (AutoModelForSeq2SeqLM.from_pretrained(tmp_path), dqkernels.load(tmp_path)):
        assert where(reloaded) == {("auto", False)}
        assert torch.isfinite(logits(reloaded)).all()

    recwarn.clear()
    loaded = dqkernels.load(tmp_path, backend="eager", strict=True)
    assert where(loaded) == {("eager", True)} and not recwarn.list
    # Of one backend: LayerNorm has other last bits on another.
    forced = AutoModelForSeq2SeqLM.from_pretrained(
        float_folder("bart"), quantization_config=DQConfig(backend="eager", strict=True)
    )
    assert torch.equal(logits(loaded), logits(forced))
    with pytest.raises(ValueError, match="backend must be one of"):
        dqkernels.load(tmp_path, backend="gpu")
    with pytest.raises(ValueError, match="strict must be one of"):
        dqkernels.load(tmp_path, strict=1)

    given = DQConfig(weight_bits=2, backend="eager", strict=True)
    with pytest.warns(UserWarning, match="from the model will be used.*'backend', 'strict'.*The rest will be ignored"):
        passed = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=given)
    assert where(passed) == {("eager", True)}
    assert passed.config.quantization_config.weight_bits == 4
    assert torch.equal(logits(passed), logits(forced))
    with pytest.raises(dataclasses.FrozenInstanceError):
        passed.config.quantization_config.weight_bits = 2
    with pytest.raises(ValueError, match="backend must be one of"):
        passed.config.quantization_config.backend = "gpu"


# ------------------------------------------------------------------------------------------------ a packed model


@pytest.fixture
def packed(packed_folder):
    return AutoModelForSeq2SeqLM.from_pretrained(packed_folder)


def test_config_serialises(packed):
    stored = json.loads(packed.config.to_json_string())["quantization_config"]
    wanted = {**CONFIG.to_dict(), "attention": "int8"}  # what "auto" came to
    assert stored == json.loads(json.dumps(wanted))
    assert copy.deepcopy(packed.config).quantization_config.to_dict() == wanted
    assert isinstance(packed.config.quantization_config, DQConfig)
    again = AutoModelForSeq2SeqLM.from_pretrained(packed.config.name_or_path, config=packed.config)
    assert torch.equal(logits(again), logits(packed))


def test_casts_keep_scales_and_ties(packed):
    before = packed.get_input_embeddings().weight_scale.clone()
    packed.to(torch.float16)
    assert packed.dtype == torch.float16 and largest_table(packed) == 4
    assert torch.equal(packed.get_input_embeddings().weight_scale, before)
    twin = copy.deepcopy(packed)
    assert largest_table(twin) == 4 and torch.equal(logits(twin), logits(packed))


def test_resize_is_refused_in_words(packed):
    with pytest.raises(ValueError, match="packed and cannot be resized: resize the float model"):
        packed.resize_token_embeddings(128)
    assert packed.get_input_embeddings().weight.shape == (tiny_models.VOCAB, 40), "what scripts compare with"


def test_trainer_is_refused_in_words(packed, tmp_path):
    from transformers.trainer_utils import validate_quantization_for_training

    assert packed.hf_quantizer.is_trainable is False and packed.hf_quantizer.is_compileable is True
    with pytest.raises(ValueError, match="prepare_qat"):
        validate_quantization_for_training(packed)


def test_a_model_its_config_does_not_describe_is_not_saved(tmp_path):
    model = dqkernels.quantize_(make("bart"), DQConfig(overrides={"fc1": {"skip": True}}))
    dqkernels.quantize_(model, DQConfig(weight_bits=8))
    with pytest.raises(ValueError, match="cannot be saved.*fc1.*Quantize the float model once"):
        model.save_pretrained(tmp_path / "mixed")
    swapped = dqkernels.quantize_(make("bart"), CONFIG)
    swapped.model.encoder.layers[0].fc1 = nn.Linear(40, 56)
    with pytest.raises(ValueError, match="fc1 is a float module"):
        swapped.save_pretrained(tmp_path / "swapped")


@pytest.mark.parametrize("family", ["bart", "bert", "t5", "marian"])
def test_dequantize(family, tmp_path):
    model = make(family)
    reference = dqkernels.quantize_(make(family), DQConfig(weight_bits=8, embedding_bits=8))
    weights = {n: m.dequantize() for n, m in reference.named_modules() if isinstance(m, PackedModule)}
    back = reference.dequantize()
    assert not any(isinstance(m, PackedModule) for m in back.modules())
    for name, weight in weights.items():
        assert torch.equal(back.get_submodule(name).weight, weight)
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    assert back.all_tied_weights_keys == model.all_tied_weights_keys
    # 8-bit weights without activation rounding: within the error of the weights, far from any other model.
    assert (logits(back) - logits(model)).abs().max() < 0.1 * logits(model).abs().max()
    back.tie_weights()
    back.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(type(back).from_pretrained(tmp_path)), logits(back))


def test_bert_bias_stays_one_parameter():
    model = dqkernels.quantize_(make("bert"), CONFIG)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_packing_in_chunks_gives_the_bits_of_the_whole(monkeypatch):
    torch.manual_seed(1)
    linear = nn.Linear(200, 83)
    for settings in ({}, {"weight_quantizer": "mse"}, {"weight_bits": 2}, {"weight_bits": 2, "group_size": 64}):
        layer = DQConfig(**settings).for_linear("x")
        whole = QLinear.from_linear(linear, layer)
        monkeypatch.setattr("dqkernels.nn._PACK_ELEMENTS", 16 * 200)
        chunked = QLinear.from_linear(linear, layer)
        monkeypatch.undo()
        assert torch.equal(whole.qweight, chunked.qweight)
        assert torch.equal(whole.weight_scale, chunked.weight_scale)
        assert whole.group_mult is None or torch.equal(whole.group_mult, chunked.group_mult)


# ------------------------------------------------------------------------------------ what else a model may hold


def vit() -> nn.Module:
    """A float convolution (rank 4) and class token (rank 3) beside packed linears."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=56,
            image_size=16,
            patch_size=8,
        )
        return transformers.ViTModel(config).eval()


@torch.no_grad()
def test_a_model_with_convolutions_is_saved_and_reloaded(tmp_path):
    model = dqkernels.quantize_(vit(), DQConfig(weight_bits=4))
    pixels = torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    for reloaded in (dqkernels.load(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(reloaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


class WithBuffers(transformers.BartForConditionalGeneration):
    """Of every dtype and rank that a float model may hold beside its weights."""

    def __init__(self, config):
        super().__init__(config)
        for dtype in (torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
            self.register_buffer(f"a_{str(dtype).removeprefix('torch.')}", torch.ones(1, 2, 1, 1, 2, dtype=dtype))


def test_tensors_of_other_dtypes_are_saved_and_reloaded(float_folder, tmp_path, monkeypatch):
    # transformers puts another object in its module's place when its own import ends.
    monkeypatch.setattr(sys.modules["transformers"], "WithBuffers", WithBuffers, raising=False)
    model = WithBuffers(make("bart").config)
    dqkernels.quantize_(model, CONFIG).save_pretrained(tmp_path)
    reloaded = dqkernels.load(tmp_path)
    expected = dict(model.named_buffers())
    for name, buffer in reloaded.named_buffers():
        if name.startswith("a_") and name != "a_float64":  # transformers brings every float to the model's dtype
            assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name])
    assert torch.equal(reloaded.a_float64.double(), expected["a_float64"])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda m: m.register_buffer("x", torch.ones(1, 1, 1, 1, 1, 1)), r"'x': its shape is .*at most 5 numbers"),
        (lambda m: m.register_buffer("x", torch.ones(1, dtype=torch.complex64)), "'x': its dtype is torch.complex64"),
        (lambda m: m.register_buffer("n" * (4 << 20), torch.ones(1)), "the header of its weight file is .* tensors"),
        (lambda m: setattr(m.config, "notes", "x" * (4 << 20)), "its config.json is .* bytes, wanted at most 4194304"),
        (lambda m: setattr(m.config, "max_position_embeddings", 1 << 23), "max_position_embeddings is 8388608"),
    ],
    ids=["rank", "dtype", "header", "config", "sizes"],
)
def test_what_could_not_be_loaded_is_not_saved(spoil, message, packed, tmp_path):
    spoil(packed)
    with pytest.raises(FileFormatError, match=f"the model to save: .*{message}"):
        packed.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------- memory

_PEAK = """
import resource, sys
import torch, transformers, dqkernels
from transformers import BartForConditionalGeneration
transformers.utils.logging.disable_progress_bar()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = BartForConditionalGeneration.from_pretrained(sys.argv[1], quantization_config=dqkernels.DQConfig())
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_peak_memory_of_packing_while_loading(tmp_path):
    """Floats go as they are packed: the peak is the file (its mapped pages count), the packed model and a margin."""
    config = transformers.BartConfig(
        vocab_size=16_000,
        d_model=512,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    float_bytes = (tmp_path / "model.safetensors").stat().st_size
    # Memory that glibc keeps after free() is no part of what loading needs.
    quiet = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    where = {"PYTHONPATH": str(Path(dqkernels.__file__).parents[1])}
    result = subprocess.run(command, env={**os.environ, **quiet, **where}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, packed_bytes = map(int, result.stdout.split())
    assert packed_bytes < float_bytes / 4
    assert peak < float_bytes + packed_bytes + (48 << 20), f"{peak / 1e6:.0f} MB for a {float_bytes / 1e6:.0f} MB file"
