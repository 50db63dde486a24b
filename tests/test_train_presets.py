"""Presets: the published settings, that transformers takes their arguments, and what may be changed."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("accelerate")

import transformers

from dqkernels.config import DQConfig
from dqkernels.train.losses import KDConfig
from dqkernels.train.presets import LEARNED_SCALE, PRESETS, describe, preset, quantization

NAMES = ["dq-bart", "dq-bart-plus", "quant-only", "distill-only", "sft", "distilbart-kd", "ternarybert"]


def test_names_and_help():
    assert list(PRESETS) == NAMES and all(PRESETS[name].name == name for name in NAMES)
    lines = describe()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == NAMES
    assert all(len(line) <= 80 for line in lines), "a terminal's width"
    column = lines[0].index(PRESETS["dq-bart"].summary[:10])
    assert all(line[:column].strip() in (*NAMES, "") and not line[column].isspace() for line in lines)
    told = " ".join(line[column:] for line in lines)
    assert told == " ".join(PRESETS[name].summary for name in NAMES)
    assert all(each.source.endswith((".", ".)")) for each in PRESETS.values())
    with pytest.raises(ValueError, match=r"preset must be one of \['dq-bart', .*'ternarybert'\], got 'dqbart'"):
        preset("dqbart")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_takes_the_arguments(name, tmp_path):
    arguments = PRESETS[name].arguments
    made = transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **arguments)
    assert {key: getattr(made, key) for key in arguments} == dict(arguments)
    # A share of the steps, not a number of them
    expected = {"dq-bart": 50, "distilbart-kd": 500, "ternarybert": 100, "sft": 0}.get(name, 50)
    assert made.get_warmup_steps(1000) == expected


def test_dq_bart_is_the_paper():
    paper = PRESETS["dq-bart"]
    assert paper.kd == KDConfig(
        task=1, logits=1, hidden=1, attention=1, logits_loss="mse", masked=False, encoder_last_hidden=1
    )
    assert paper.quantize(2, 2) == DQConfig.preset("dq-bart-2-2-8", attention="int8")
    assert paper.quantize(2, 2, head="float").head == "float"
    assert not paper.learned_scale and paper.keep == "last"
    batch = paper.arguments["per_device_train_batch_size"] * paper.arguments["gradient_accumulation_steps"]
    wanted = {
        "learning_rate": 3e-5,
        "warmup_steps": 0.05,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "num_train_epochs": 20,
    }
    assert batch == 16 and wanted.items() <= paper.arguments.items()


def test_the_other_recipes():
    plus = PRESETS["dq-bart-plus"]
    assert plus.kd == KDConfig(task=1, logits=1, hidden=1, attention=1, logits_loss="kl", temperature=1, masked=True)
    assert plus.learned_scale and 1e-4 <= plus.arguments["learning_rate"] <= 3e-4
    assert PRESETS["quant-only"].kd == PRESETS["sft"].kd == KDConfig()
    assert PRESETS["quant-only"].quantize(4, 8) == plus.quantize(4, 8)
    assert PRESETS["distill-only"].kd == plus.kd
    assert [name for name in NAMES if PRESETS[name].quantize is None] == ["distill-only", "sft", "distilbart-kd"]
    distilbart = PRESETS["distilbart-kd"]
    assert distilbart.kd == KDConfig(task=0.2, logits=0.8, hidden=3, attention=0, temperature=2, masked=True)
    assert distilbart.freeze_encoder and distilbart.freeze_embeddings and distilbart.keep == "first"
    ternary = PRESETS["ternarybert"]
    assert ternary.kd == KDConfig(task=0, logits=1, hidden=1, attention=1, temperature=1, masked=False)
    assert ternary.quantize(2, 2).for_embedding("shared").granularity == "per_channel"
    linear = ternary.quantize(2, 2).for_linear("fc1")
    assert (linear.quantizer, linear.granularity, linear.act_granularity) == ("ternary", "per_tensor", "per_tensor")
    assert (linear.act_clip, linear.weight_clip) == (2.5, 2.5)


@pytest.mark.parametrize("rules", LEARNED_SCALE)
@pytest.mark.parametrize(("weight_bits", "embedding_bits"), [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (2, 16)])
def test_quantization_at_every_width(rules, weight_bits, embedding_bits):
    config = quantization(weight_bits, embedding_bits, rules=rules)
    assert config.name == f"{weight_bits}-{embedding_bits}-8"
    assert config.attention == "int8" and config.head == "quantized"
    two = "four_level" if rules == "dq-bart-plus" else "ternary"
    assert config.for_linear("fc1").quantizer == (two if weight_bits == 2 else "absmax")
    assert config.for_linear("fc1").granularity == ("per_channel" if rules == "dq-bart-plus" else "per_tensor")
    embedding = config.for_embedding("shared")
    if embedding_bits == 16:
        assert embedding is None
    else:
        assert embedding.quantizer == (two if embedding_bits == 2 else "absmax")
        assert embedding.granularity == "per_channel"
    assert DQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rules_of_another_recipe():
    paper = preset("quant-only", rules="dq-bart")
    assert paper.quantize(2, 2) == PRESETS["dq-bart"].quantize(2, 2) and not paper.learned_scale
    assert paper.kd == KDConfig() and paper.name == "quant-only"
    assert PRESETS["quant-only"].learned_scale  # the entry itself is untouched
    assert preset("quant-only") is PRESETS["quant-only"]
    assert preset("dq-bart", rules="dq-bart-plus").learned_scale
    assert all(
        each.quantize is None or each.learned_scale == LEARNED_SCALE[each.quantize.keywords["rules"]]
        for each in PRESETS.values()
    )
    for call in (lambda: preset("quant-only", rules="twn"), lambda: quantization(2, 2, rules="twn")):
        with pytest.raises(
            ValueError, match=r"rules must be one of \['dq-bart', 'dq-bart-plus', 'ternarybert'\], got 'twn'"
        ):
            call()
    with pytest.raises(ValueError, match="preset 'sft' does not quantize, so it takes no rules; got 'dq-bart'"):
        preset("sft", rules="dq-bart")
    for rules in LEARNED_SCALE:
        with pytest.raises(ValueError, match="weight_bits must be one of|preset must look like|got 3"):
            quantization(3, 2, rules=rules)
    with pytest.raises(TypeError, match="no_such_field"):
        quantization(2, 2, no_such_field=1)


def test_a_preset_is_changed_by_replacing_fields():
    mine = dataclasses.replace(PRESETS["dq-bart"], kd=KDConfig(logits=0.8, hidden=3, attention=3, masked=False))
    assert mine.kd.hidden == 3 and PRESETS["dq-bart"].kd.hidden == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.name = "other"
