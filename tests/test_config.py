"""DQConfig: what it accepts, what it refuses and in which words, and how it resolves for one module."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqkernels import config as config_module
from dqkernels.config import DQConfig, LayerConfig

BAD_VALUES = [
    ("weight_bits", 3),
    ("weight_bits", 16),
    ("weight_bits", True),
    ("weight_bits", 4.0),
    ("weight_bits", "4"),
    ("act_bits", 4),
    ("act_bits", None),
    ("embedding_bits", 32),
    ("weight_quantizer", "int4"),
    ("weight_quantizer", None),
    ("embedding_quantizer", "int4"),
    ("weight_granularity", "per_group"),
    ("group_size", 0),
    ("group_size", 16),
    ("group_size", 64.0),
    ("act_granularity", "per_channel"),
    ("attention", True),
    ("head", "fp32"),
    ("backend", "gpu"),
    ("backend", "Eager"),
    ("strict", 1),
    ("strict", "true"),
    ("fused", True),
    ("fused", 0),
]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_refuses_by_name_value_and_choices(name, value):
    with pytest.raises(ValueError) as error:
        DQConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be one of [") and message.endswith(f"got {value!r}")


@pytest.mark.parametrize("name", ["act_clip", "weight_clip"])
@pytest.mark.parametrize("value", [0, -2.5, float("inf"), float("nan"), True, "2.5"])
def test_refuses_a_clip_that_is_not_a_finite_number_above_zero(name, value):
    with pytest.raises(ValueError, match=f"{name} must be None or a finite number above 0"):
        DQConfig(**{name: value})
    assert getattr(DQConfig(**{name: 2}), name) == 2  # an integer is a number


def test_default_is_w4a8_with_an_8_bit_embedding():
    config = DQConfig()
    assert config.name == "4-8-8"
    assert config.for_linear("fc1") == LayerConfig(4, "absmax")
    assert config.for_embedding("shared") == LayerConfig(8, "absmax")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("quantizer", ["auto", "absmax", "mse", "ternary", "four_level"])
def test_a_quantizer_of_another_width_gives_the_default_of_this_width(bits, quantizer):
    fits = {2: ("ternary", "four_level"), 4: ("absmax", "mse"), 8: ("absmax", "mse")}[bits]
    wanted = quantizer if quantizer in fits else {2: "four_level", 4: "absmax", 8: "absmax"}[bits]
    layer = DQConfig(weight_bits=bits, weight_quantizer=quantizer).for_linear("fc1")
    assert layer.quantizer == wanted
    assert layer.four_level == (wanted == "four_level")


def test_groups_are_for_2_and_4_bits_and_per_channel_only():
    assert DQConfig(weight_bits=2, group_size=64).for_linear("fc1").group_size == 64
    config = DQConfig(weight_bits=4, embedding_bits=4, group_size=32)
    assert config.for_embedding("shared").group_size == 32
    with pytest.raises(ValueError, match="group_size=64 needs weight_granularity='per_channel'"):
        DQConfig(group_size=64, weight_granularity="per_tensor")


@pytest.mark.parametrize(
    "settings",
    [
        {"embedding_bits": 8},
        {"embedding_bits": 16},
        {"overrides": {"fc1": {"weight_bits": 8}}},
        {"group_size": -1, "overrides": {"fc1": {"group_size": 64}}},
    ],
)
def test_groups_without_any_2_or_4_bit_tensor_are_refused(settings):
    with pytest.raises(ValueError, match="group_size=64 is for 2 and 4 bits, and nothing here has so few"):
        DQConfig(**{"weight_bits": 8, "group_size": 64, **settings})


def test_8_bit_tensors_beside_grouped_ones_stay_per_channel():
    weights = DQConfig(weight_bits=4, embedding_bits=8, group_size=64, overrides={"fc2": {"weight_bits": 8}})
    assert weights.for_linear("fc1").group_size == 64
    assert weights.for_linear("fc2").group_size == weights.for_embedding("shared").group_size == -1
    embeddings = DQConfig(weight_bits=8, embedding_bits=4, group_size=64)
    assert embeddings.for_linear("fc1").group_size == -1 and embeddings.for_embedding("shared").group_size == 64
    by_override = DQConfig(weight_bits=8, group_size=64, overrides={"fc1": {"weight_bits": 2}})
    assert by_override.for_linear("fc1").group_size == 64 and by_override.for_linear("fc2").group_size == -1


def test_embedding_quantizer_is_weight_quantizer_unless_set():
    config = DQConfig(weight_bits=4, embedding_bits=4, weight_quantizer="mse")
    assert config.for_embedding("shared").quantizer == "mse"
    config = dataclasses.replace(
        config, embedding_quantizer="absmax", overrides={"small": {"embedding_quantizer": None}}
    )
    assert (config.for_linear("fc1").quantizer, config.for_embedding("shared").quantizer) == ("mse", "absmax")
    assert config.for_embedding("small").quantizer == "mse"


def test_embeddings_stay_row_wise_and_16_bits_stay_float():
    config = DQConfig(weight_granularity="per_tensor", embedding_bits=2)
    assert config.for_linear("fc1").granularity == "per_tensor"
    assert config.for_embedding("shared").granularity == "per_channel"
    assert DQConfig(embedding_bits=16).for_embedding("shared") is None
    assert DQConfig(embedding_bits=16).for_linear("lm_head") is not None


@pytest.mark.parametrize("name, weights, embeddings", [("dq-bart-2-2-8", 2, 2), ("dq-bart-8-4-8", 8, 4)])
def test_preset(name, weights, embeddings):
    config = DQConfig.preset(name)
    assert config.name == name.removeprefix("dq-bart-")
    wanted = {2: "ternary", 4: "absmax", 8: "absmax"}
    assert config.for_linear("fc1") == LayerConfig(weights, wanted[weights], "per_tensor", -1, "per_tensor", 2.5, 2.5)
    table = config.for_embedding("shared")
    assert table == LayerConfig(embeddings, wanted[embeddings], "per_channel", -1, "per_tensor", 2.5, 2.5)
    assert config.head == "quantized"


PAPER = {2: "ternary", 4: "absmax", 8: "absmax"}


@pytest.mark.parametrize("weights", [2, 4, 8])
@pytest.mark.parametrize("embeddings", [2, 4, 8, 16])
def test_the_paper_s_rule_does_not_move_with_the_measured_defaults(weights, embeddings, monkeypatch):
    monkeypatch.setattr(config_module, "DEFAULT_QUANTIZER", {2: "four_level", 4: "mse", 8: "mse"})
    config = DQConfig.preset(f"dq-bart-{weights}-{embeddings}-8")
    assert config.weight_quantizer == config.for_linear("fc1").quantizer == PAPER[weights], "it prints what it does"
    assert config.embedding_quantizer == PAPER.get(embeddings)
    table = config.for_embedding("shared")
    assert table is None if embeddings == 16 else table.quantizer == PAPER[embeddings]


def test_preset_with_changes():
    config = DQConfig.preset("dq-bart-2-2-8", head="float", act_clip=None, overrides={"fc1": {"skip": True}})
    assert config == dataclasses.replace(
        DQConfig.preset("dq-bart-2-2-8"), head="float", act_clip=None, overrides={"fc1": {"skip": True}}
    )
    with pytest.raises(ValueError, match="head must be one of"):
        DQConfig.preset("dq-bart-2-2-8", head="none")
    with pytest.raises(TypeError, match="heads"):
        DQConfig.preset("dq-bart-2-2-8", heads="float")


@pytest.mark.parametrize("name", ["dq-bart", "dq-bart-2-2", "dq-bart-2-2-8 ", "DQ-BART-2-2-8", "dq-bart-3-2-8"])
def test_preset_refuses(name):
    with pytest.raises(ValueError, match=r"preset must look like|weight_bits must be one of"):
        DQConfig.preset(name)


def test_preset_refuses_activations_other_than_8_bits():
    with pytest.raises(ValueError, match="act_bits must be one of"):
        DQConfig.preset("dq-bart-2-2-4")


def test_overrides_last_match_wins_and_skip_leaves_float():
    config = DQConfig(
        overrides={
            r"decoder": {"weight_bits": 8, "act_granularity": "static"},
            r"fc[12]$": {"weight_bits": 2, "weight_quantizer": "ternary"},
            r"layers\.0\.": {"skip": True},
        }
    )
    assert config.for_linear("encoder.layers.1.q_proj") == LayerConfig(4, "absmax")
    assert config.for_linear("decoder.layers.1.q_proj") == LayerConfig(8, "absmax", act_granularity="static")
    assert config.for_linear("decoder.layers.1.fc1") == LayerConfig(2, "ternary", act_granularity="static")
    assert config.for_linear("decoder.layers.0.fc1") is None
    assert config.for_linear("encoder.layers.1.fc10").bits == 4


@pytest.mark.parametrize("wide", [True, False])
def test_a_later_skip_wins_as_any_other_key(wide):
    entries = {"decoder": {"skip": wide, "weight_bits": 8}, "fc1": {"skip": not wide}}
    packed, skipped = LayerConfig(8, "absmax"), None
    config = DQConfig(overrides=entries)
    assert config.for_linear("decoder.fc1") == (packed if wide else skipped)
    assert config.for_linear("decoder.fc2") == (skipped if wide else packed)
    turned = DQConfig(overrides=dict(reversed(entries.items())))
    assert turned.for_linear("decoder.fc1") == (skipped if wide else packed)


def test_overrides_that_contradict_each_other_name_the_module():
    config = DQConfig(overrides={"fc": {"group_size": 64}, "decoder": {"weight_granularity": "per_tensor"}})
    assert config.for_linear("encoder.fc1").group_size == 64
    with pytest.raises(ValueError, match=r"^decoder\.fc1: the overrides.*group_size=64 needs"):
        config.for_linear("decoder.fc1")
    with pytest.raises(ValueError, match=r"^overrides\['fc1'\]: group_size=64 needs"):
        DQConfig(overrides={"fc1": {"group_size": 64, "weight_granularity": "per_tensor"}})
    # Neither entry contradicts once a third one settles it.
    settled = DQConfig(overrides={**config.overrides, r"decoder\.fc1": {"group_size": -1}})
    assert settled.for_linear("decoder.fc1").granularity == "per_tensor"


def test_an_override_can_change_a_clip_and_embedding_bits():
    config = DQConfig(act_clip=2.5, overrides={"fc2": {"act_clip": None}, "shared": {"embedding_bits": 16}})
    assert config.for_linear("fc1").act_clip == 2.5
    assert config.for_linear("fc2").act_clip is None
    assert config.for_embedding("model.shared") is None


BAD_OVERRIDES = [
    (["fc1"], "overrides must be a dict"),
    ({"(": {}}, "is not a regular expression"),
    ({3: {}}, "is not a regular expression"),
    ({"fc1": 8}, r"overrides\['fc1'\] must be a dict, got int"),
    ({"fc1": {"bits": 8}}, r"has unknown keys \['bits'\]; known are"),
    ({"fc1": {"skip": 1}}, r"\['skip'\] must be true or false, got 1"),
    ({"fc1": {"weight_bits": 5}}, r"weight_bits must be one of \[2, 4, 8\], got 5"),
    ({"fc1": {"group_size": 64, "weight_granularity": "per_tensor"}}, "group_size=64 needs"),
]


@pytest.mark.parametrize("overrides, message", BAD_OVERRIDES)
def test_bad_overrides_are_refused_when_written(overrides, message):
    with pytest.raises(ValueError, match=message):
        DQConfig(overrides=overrides)


def test_config_is_frozen_and_keeps_its_own_copy_of_overrides():
    entry = {"weight_bits": 8}
    config = DQConfig(overrides={"fc1": entry})
    entry["weight_bits"] = 2
    assert config.for_linear("fc1").bits == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 2
    body = config.to_dict()
    body["overrides"][0][1]["weight_bits"] = 2
    assert config.for_linear("fc1").bits == 8


clips = st.none() | st.floats(min_value=1e-3, max_value=1e3) | st.integers(1, 100)


def build(**settings) -> DQConfig:
    """A config of any settings; groups only where a tensor can have them."""
    try:
        return DQConfig(**settings)
    except ValueError as error:
        assert "group_size" in str(error)
        return DQConfig(**{**settings, "group_size": -1})


configs = st.builds(
    build,
    weight_bits=st.sampled_from(config_module.WEIGHT_BITS),
    embedding_bits=st.sampled_from(config_module.EMBEDDING_BITS),
    weight_quantizer=st.sampled_from(config_module.WEIGHT_QUANTIZERS),
    embedding_quantizer=st.sampled_from((None, *config_module.WEIGHT_QUANTIZERS)),
    group_size=st.sampled_from(config_module.GROUP_SIZES),
    act_granularity=st.sampled_from(config_module.ACT_GRANULARITIES),
    act_clip=clips,
    weight_clip=clips,
    attention=st.sampled_from(config_module.ATTENTION),
    head=st.sampled_from(config_module.HEADS),
    overrides=st.dictionaries(
        st.sampled_from(["fc1", r"layers\.0", "lm_head", "decoder"]),
        st.fixed_dictionaries(
            {},
            optional={
                "weight_bits": st.sampled_from((2, 4, 8)),
                "act_granularity": st.sampled_from(config_module.ACT_GRANULARITIES),
                "skip": st.booleans(),
            },
        ),
    ),
)
MODULES = ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1", "model.encoder.layers.0.fc1", "lm_head", "x"]


@given(configs)
def test_json_round_trip(config):
    # As transformers writes it: the keys of every object sorted.
    text = json.dumps(config.to_dict(), sort_keys=True)
    again = DQConfig.from_dict(json.loads(text))
    assert again == config
    assert json.dumps(again.to_dict(), sort_keys=True) == text
    assert [again.for_linear(name) for name in MODULES] == [config.for_linear(name) for name in MODULES]


def test_the_order_of_overrides_survives_sorted_keys():
    entries = {"fc": {"act_granularity": "per_tensor"}, "encoder": {"act_granularity": "per_token"}}
    config = DQConfig(overrides=entries)
    body = config.to_dict()
    assert body["overrides"] == [[pattern, entry] for pattern, entry in entries.items()]
    again = DQConfig.from_dict(json.loads(json.dumps(body, sort_keys=True)))
    assert again.for_linear("encoder.fc1").act_granularity == "per_token"
    assert DQConfig.from_dict({**body, "overrides": entries}) == config, "a dict is how one writes it by hand"


def test_what_describes_the_machine_is_not_in_a_file():
    body = DQConfig(backend="cuda", strict=True, fused=False).to_dict()
    assert body == DQConfig().to_dict() and not {"backend", "strict", "fused"} & set(body)


def test_to_dict_names_method_and_version():
    body = DQConfig().to_dict()
    assert body["quant_method"] == "dqkernels" and body["format_version"] == 1
    fields = {f.name for f in dataclasses.fields(DQConfig)} - {"backend", "strict", "fused"}
    assert set(body) == fields | {"quant_method", "format_version"}


BAD_DICTS = [
    ({"quant_method": "gptq"}, "quant_method must be 'dqkernels', got 'gptq'"),
    ({"format_version": 2}, "format_version is 2, this dqkernels reads format_version 1"),
    ({"weight_bit": 4, "zero_point": True}, r"unknown keys \['weight_bit', 'zero_point'\]"),
    ({"weight_bits": 5}, "weight_bits must be one of"),
    ({"format_version": True}, "format_version is True"),
    ({"backend": "cuda"}, r"unknown keys \['backend'\]: they are of a machine.*dqkernels.load"),
    ({"strict": False}, r"unknown keys \['strict'\]"),
    ({"fused": False}, r"unknown keys \['fused'\]"),
    ({"overrides": "fc1"}, "overrides must be a dict"),
    ({"overrides": [{"fc1": {}}]}, r"must be a list of \[regex, dict\], one of them is \{'fc1'"),
    ({"overrides": [["fc1", {}, {}]]}, r"must be a list of \[regex, dict\]"),
    ({"overrides": ["ab"]}, r"must be a list of \[regex, dict\]"),
    ({"overrides": [[["fc1"], {}]]}, r"must be a list of \[regex, dict\]"),
    ({"overrides": [["fc1", {}], ["fc1", {"skip": True}]]}, "has the regex 'fc1' twice"),
    ({"overrides": [["fc1", 8]]}, r"overrides\['fc1'\] must be a dict, got int"),
    ({"overrides": [["(", {}]]}, "is not a regular expression"),
]


@pytest.mark.parametrize("body, message", BAD_DICTS)
def test_from_dict_refuses(body, message):
    with pytest.raises(ValueError, match=message):
        DQConfig.from_dict(body)


def test_from_dict_ignores_transformers_bookkeeping_and_leaves_its_argument_alone():
    body = {**DQConfig(weight_bits=2).to_dict(), "modules_to_not_convert": ["lm_head"]}
    before = dict(body)
    assert DQConfig.from_dict(body) == DQConfig(weight_bits=2)
    assert body == before
