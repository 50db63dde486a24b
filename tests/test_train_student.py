"""Students: which layers are copied, that they are the teacher's, that caches work, and what can be compared."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch import nn

from dqkernels import DQConfig, quantize_
from dqkernels.train.losses import KDConfig
from dqkernels.train.student import (
    COPIED_LAYERS,
    SUPERVISED_LAYERS,
    LayerMap,
    copied_layers,
    freeze_,
    layer_map_of,
    make_student,
    set_attention_,
    supervised_layers,
)

FAMILIES = ("bart", "mbart", "marian", "pegasus", "t5", "t5_v1_1")
IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [11, 12, 13, 2, 1, 1]])
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
IN_A_NORM = ("mbart", "pegasus", "t5", "t5_v1_1")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def deep(family: str, encoder: int = 6, decoder: int = 6, **changes) -> nn.Module:
    """A random model of `tiny_models` with as many layers as asked for; every parameter is random."""
    shallow = tiny_models.make(family)
    config = copy.deepcopy(shallow.config)
    if hasattr(config, "encoder_layers"):
        config.encoder_layers, config.decoder_layers = encoder, decoder
    else:
        config.num_layers, config.num_decoder_layers = encoder, decoder
    for name, value in changes.items():
        setattr(config, name, value)
    model = type(shallow)(config).eval()
    if family == "t5_v1_1":
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:  # Marian's and Pegasus' are sines, which no file holds
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stack(model: nn.Module, name: str) -> nn.Module:
    return getattr(getattr(model, model.base_model_prefix, model), name)


def layers(model: nn.Module, name: str) -> nn.ModuleList:
    found = stack(model, name)
    return found.layers if hasattr(found, "layers") else found.block


def same_values(ours: nn.Module, theirs: nn.Module) -> bool:
    """Equal tensors under equal names, but for the position bias that only a first T5 block has."""
    pair = [{k: v for k, v in m.state_dict().items() if "relative_attention_bias" not in k} for m in (ours, theirs)]
    return pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][k], pair[1][k]) for k in pair[0])


def tied_names(model: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


# The tables, written out a second time from paper.md section 1.6


@pytest.mark.parametrize(
    ("depth", "keep", "table"),
    [
        (6, "last", {1: "5", 2: "0 5", 3: "0 2 5", 4: "0 2 3 5", 5: "0 1 3 4 5", 6: "0 1 2 3 4 5"}),
        (6, "first", {1: "0", 2: "0 5", 3: "0 2 5", 4: "0 1 3 5"}),
        (12, "last", {1: "11", 2: "0 6", 3: "0 6 11", 4: "0 4 8 11", 6: "0 2 4 7 9 11", 9: "0 1 2 4 5 7 9 10 11"}),
        (12, "first", {1: "0", 2: "0 6", 3: "0 6 11", 4: "0 4 8 11", 6: "0 2 4 7 9 11", 9: "0 1 2 4 5 7 9 10 11"}),
        # By the rule: ends held, halves up (15 / 2 -> 8)
        (16, "last", {1: "15", 2: "0 15", 3: "0 8 15", 4: "0 5 10 15"}),
        (16, "first", {1: "0", 2: "0 15"}),
        (12, "last", {5: "0 3 6 8 11"}),
        (1, "last", {1: "0"}),
    ],
)
def test_copied_layers(depth, keep, table):
    for number, expected in table.items():
        assert copied_layers(depth, number, keep) == tuple(int(i) for i in expected.split()), number


def test_every_depth_gives_layers_in_order_with_both_ends_or_its_table():
    for depth in range(1, 26):
        for number in range(1, depth + 1):
            for chosen in (copied_layers(depth, number), supervised_layers(depth, number)):
                assert len(chosen) == number and list(chosen) == sorted(set(chosen)), (depth, number, chosen)
                assert chosen[-1] == depth - 1 or chosen == COPIED_LAYERS[12][2], (depth, number, chosen)
            if number > 1:
                assert copied_layers(depth, number)[0] == 0


def test_supervised_layers():
    assert supervised_layers(12, 6) == (1, 3, 5, 8, 10, 11)
    assert supervised_layers(12, 4) == (2, 5, 8, 11)  # the rule: equal runs of three
    assert supervised_layers(16, 5) == (3, 6, 9, 12, 15)
    # Where the rule would say otherwise, the table stands; elsewhere both agree.
    assert [k for k, v in SUPERVISED_LAYERS[12].items() if v != tuple(-(-(i + 1) * 12 // k) - 1 for i in range(k))] == [
        6
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"encoder_layers": 7}, "encoder_layers: a student of a 6-layer teacher: 1 to 6 layers, got 7"),
        ({"decoder_layers": 0}, "decoder_layers: a student of a 6-layer teacher: 1 to 6 layers, got 0"),
        ({"decoder_layers": [0, 6]}, r"decoder_layers must be one or more indices from 0 to 5, got \[0, 6\]"),
        ({"decoder_layers": [-1]}, r"from 0 to 5, got \[-1\]"),
        ({"decoder_layers": []}, r"one or more indices from 0 to 5, got \[\]"),
        ({"decoder_layers": "3"}, "a number, a list of teacher indices or None, got '3'"),
        ({"decoder_layers": True}, "got True"),
        ({"decoder_layers": 3, "keep": "middle"}, r"keep must be one of \['last', 'first'\], got 'middle'"),
        ({"decoder_layers": [1], "keep": "middle"}, "keep must be one of"),
    ],
)
def test_refused_layers(bart, arguments, says):
    with pytest.raises(ValueError, match=says):
        make_student(bart, **arguments)


def test_other_models_are_refused():
    for model in (tiny_models.make("llama"), nn.Linear(4, 4)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no encoder and decoder of layers"):
            make_student(model, 1, 1)


def test_a_packed_teacher_is_refused(bart):
    packed = quantize_(copy.deepcopy(bart), DQConfig(weight_bits=8))
    with pytest.raises(ValueError, match=r"the teacher is quantized already \(model\.\S+\).*from the float model"):
        make_student(packed, 3, 3)
    other = copy.copy(bart)
    other.hf_quantizer = KDConfig()  # any foreign one
    with pytest.raises(ValueError, match=r"quantized already \(by KDConfig\)"):
        make_student(other, 3, 3)


@pytest.fixture(scope="module")
def bart() -> nn.Module:
    torch.manual_seed(1)
    return deep("bart")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_the_teachers_layers(family, tmp_path):
    teacher = deep(family)
    teacher.requires_grad_(False).train()
    teacher.generation_config.num_beams = 3
    calls = []
    layers(teacher, "decoder")[5].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(teacher.state_dict())

    student = make_student(teacher, 3, [4, 5])

    assert student.config.dqkernels_student == {"encoder": [0, 2, 5], "decoder": [4, 5]}
    assert type(student) is type(teacher) and not student.training and teacher.training
    for name, indices in student.config.dqkernels_student.items():
        assert len(layers(student, name)) == len(indices)
        for layer, index in zip(layers(student, name), indices, strict=True):
            assert same_values(layer, layers(teacher, name)[index])
    depth_free = {k: v for k, v in teacher.state_dict().items() if ".layers." not in k and ".block." not in k}
    assert len(depth_free) >= 2 and all(torch.equal(student.state_dict()[k], v) for k, v in depth_free.items())
    # Nothing is shared, what was tied is tied, all of it can be trained
    theirs = {t.untyped_storage().data_ptr() for t in (*teacher.parameters(), *teacher.buffers())}
    ours = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
    assert not ours & theirs
    assert tied_names(student) == tied_names(teacher) != set()
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight or family == "t5_v1_1"
    assert frozen(student) == formulas(student)
    assert student.generation_config.num_beams == 3 and student.generation_config is not teacher.generation_config
    # It trains alone: a step on the student moves nothing of the teacher, and the teacher's hook stays there
    student(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS).logits.sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert not calls
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not hasattr(teacher.config, "dqkernels_student")
    assert len(layers(teacher, "encoder")) == 6 and teacher.generation_config.num_beams == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_student_computes_what_the_teacher_does(family):
    teacher = deep(family, 3, 2)
    student = make_student(teacher)
    assert student.config.dqkernels_student == {"encoder": [0, 1, 2], "decoder": [0, 1]}
    assert torch.equal(tiny_models.logits(student), tiny_models.logits(teacher))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "decoder"), [*((family, [1, 4, 5]) for family in FAMILIES), ("bart", [5]), ("t5", [3, 0])], ids=str
)
def test_caches_configs_and_files(family, decoder, tmp_path):
    """Layer numbers of the teacher left in a copy would miss their place in the cache."""
    teacher = deep(family)
    student = make_student(teacher, 2, decoder)
    arguments = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "decoder_start_token_id": 2,
    }
    ids = student.generate(IDS, attention_mask=MASK, use_cache=True, **arguments)
    assert torch.equal(ids, student.generate(IDS, attention_mask=MASK, use_cache=False, **arguments))
    step = student(input_ids=IDS, attention_mask=MASK, decoder_input_ids=ids, output_hidden_states=True)
    assert len(step.encoder_hidden_states) == 3 and len(step.decoder_hidden_states) == len(decoder) + 1
    cache = step["cache"] if "cache" in step else step.past_key_values  # its name from transformers 5.24 on, and before
    assert len(cache.self_attention_cache.layers) == len(decoder)

    config = student.config
    if hasattr(config, "encoder_layers"):
        assert (config.encoder_layers, config.decoder_layers) == (2, len(decoder))
    else:
        assert (config.num_layers, config.num_decoder_layers) == (2, len(decoder))
        assert stack(student, "decoder").config.num_layers == len(decoder)
        assert stack(student, "encoder").config.num_layers == 2
    assert config.num_hidden_layers == 2
    assert config.get_text_config(decoder=True).num_hidden_layers == len(decoder)  # what `generate` reads

    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert again.config.dqkernels_student == {"encoder": [0, 5], "decoder": decoder}
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(student))


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "t5_v1_1"])
def test_t5_keeps_its_position_bias_in_the_first_block(family):
    teacher = deep(family)
    biases = {n: layers(teacher, n)[0].layer[0].SelfAttention.relative_attention_bias for n in ("encoder", "decoder")}
    student = make_student(teacher, [2, 0, 1], 1)
    for name, bias in biases.items():
        first, *rest = (layer.layer[0].SelfAttention for layer in layers(student, name))
        assert torch.equal(first.relative_attention_bias.weight, bias.weight) and first.has_relative_attention_bias
        assert first.relative_attention_bias.weight is not bias.weight
        for attention in rest:
            assert not hasattr(attention, "relative_attention_bias") and not attention.has_relative_attention_bias
    # The same values in a model built anew give the same logits: no flag was forgotten
    fresh = type(student)(student.config).eval()
    if family == "t5_v1_1":
        fresh.lm_head.weight = nn.Parameter(torch.empty_like(fresh.lm_head.weight))
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(tiny_models.logits(fresh), tiny_models.logits(student))


def test_a_layer_given_twice_is_two_layers(bart):
    student = make_student(bart, 1, [5, 5])
    first, second = layers(student, "decoder")
    assert same_values(first, second) and not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert [layer.self_attn.layer_idx for layer in (first, second)] == [0, 1]


def test_keep_first(bart):
    assert make_student(bart, 4, 1, keep="first").config.dqkernels_student == {"encoder": [0, 1, 3, 5], "decoder": [0]}
    assert make_student(bart, 4, 1).config.dqkernels_student == {"encoder": [0, 2, 3, 5], "decoder": [5]}


def test_a_student_of_a_student_counts_the_layers_of_its_own_teacher(bart):
    student = make_student(make_student(bart, 3, 3), 2, 1)
    assert student.config.dqkernels_student == {"encoder": [0, 2], "decoder": [2]}
    assert same_values(layers(student, "decoder")[0], layers(bart, "decoder")[5])


def test_a_16_bit_teacher_gives_a_16_bit_student(bart):
    student = make_student(copy.deepcopy(bart).bfloat16(), 1, 1)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def frozen(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def formulas(model):
    """Sinusoidal positions: never trained."""
    found = {n for n, _ in model.named_parameters() if "embed_positions" in n}
    return found if model.config.model_type in ("marian", "pegasus") else set()


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze(family):
    student = make_student(deep(family, 2, 2), 1, 1)
    assert freeze_(student) is student and frozen(student) == formulas(student)
    prefix = "" if family.startswith("t5") else "model."
    tables = {
        n for n, _ in student.named_parameters(remove_duplicate=False) if "embed_" in n or n.endswith("shared.weight")
    }
    if student.lm_head.weight is student.get_input_embeddings().weight:
        tables.add("lm_head.weight")
    encoder = {
        n for n, _ in student.named_parameters() if n.startswith(f"{prefix}encoder.") and "embed_tokens" not in n
    }

    assert frozen(freeze_(student, encoder=True)) == encoder | formulas(student)
    assert student.get_input_embeddings().weight.requires_grad
    student.requires_grad_(True)
    assert frozen(freeze_(student, embeddings=True)) == tables
    assert frozen(freeze_(student, encoder=True)) == encoder | tables


@torch.no_grad()
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_set_attention_reaches_both_stacks(family):
    model = deep(family, 2, 1)
    for implementation, maps in (("eager", True), ("sdpa", False), ("eager", True)):
        assert set_attention_(model, implementation) is model
        out = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS, output_attentions=True)
        found = [len(out[f"{name}_attentions"]) for name in ("encoder", "decoder", "cross")]
        assert found == ([2, 1, 1] if maps else [0, 0, 0])
    with pytest.raises(ValueError, match="no_such"):
        set_attention_(model, "no_such")


# What can be compared


def test_map_of_copied_and_of_equal_models(bart):
    student = make_student(bart, 3, 1)
    assert layer_map_of(student, bart) == LayerMap((0, 2, 5), (5,))
    assert layer_map_of(bart, copy.deepcopy(bart)) == LayerMap(tuple(range(6)), tuple(range(6)))
    kd = KDConfig(hidden=1, encoder_targets="supervised", decoder_targets=[3])
    assert layer_map_of(student, bart, kd) == LayerMap((1, 4, 5), (3,))


def test_map_of_another_size_says_which_term_cannot_be_formed(bart):
    other = deep("bart", 2, 6)
    with pytest.raises(ValueError, match="which of the teacher's 6 encoder layers each of the student's 2"):
        layer_map_of(other, bart)
    assert layer_map_of(other, bart, KDConfig(logits=1)) == LayerMap(None, tuple(range(6)))
    kd = KDConfig(attention=1, encoder_targets=[1, 5])
    assert layer_map_of(other, bart, kd) == LayerMap((1, 5), tuple(range(6)))

    narrow = deep("bart", d_model=20)
    for kd in (None, KDConfig(hidden=1), KDConfig(encoder_last_hidden=1)):
        with pytest.raises(ValueError, match="hidden term .* d_model must agree: student 20, teacher 40"):
            layer_map_of(narrow, bart, kd)
    assert layer_map_of(narrow, bart, KDConfig(attention=1)).encoder == tuple(range(6))
    many = deep("bart", decoder_attention_heads=4)
    with pytest.raises(ValueError, match="attention term .* number of decoder heads must agree: student 4, teacher 2"):
        layer_map_of(many, bart, KDConfig(attention=1))
    assert layer_map_of(many, bart, KDConfig(hidden=1, logits=1)).decoder == tuple(range(6))
    words = deep("bart", vocab_size=64)
    with pytest.raises(ValueError, match="logits term .* vocabulary must agree: student 64, teacher 100"):
        layer_map_of(words, bart, KDConfig(logits=1))


def test_map_that_does_not_fit(bart):
    student = make_student(bart, 3, 1)
    with pytest.raises(ValueError, match=r"config.dqkernels_student maps the encoder layers to \[0, 2, 5\]"):
        layer_map_of(student, deep("bart", 4, 6))
    with pytest.raises(ValueError, match=r"decoder_targets maps the decoder layers to \[0, 5\], but the student has 1"):
        layer_map_of(student, bart, KDConfig(hidden=1, decoder_targets=[0, 5]))
    with pytest.raises(ValueError, match=r"decoder_targets maps the decoder layers to \[6\]"):
        layer_map_of(student, bart, KDConfig(attention=1, decoder_targets=[6]))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_state_behind_a_norm_is_compared_with_its_like(family):
    """12 layers to 2 copies 0 and 6: where a norm ends the stack, layer 6 has no normalized state to compare with."""
    teacher = deep(family, 12, 2)
    student = make_student(teacher, 2)
    assert student.config.dqkernels_student["encoder"] == [0, 6]
    expected = (0, 11) if family in IN_A_NORM else (0, 6)
    assert layer_map_of(student, teacher).encoder == expected
    assert layer_map_of(student, teacher, KDConfig(attention=1)).encoder == (0, 6)
    for targets in ([0, 6], [11, 11]):
        kd = KDConfig(hidden=1, encoder_targets=targets)
        if family in IN_A_NORM:
            with pytest.raises(ValueError, match=r"ends in a norm.*teacher's last \(11\)"):
                layer_map_of(student, teacher, kd)
        else:
            assert layer_map_of(student, teacher, kd).encoder == tuple(targets)
    # The premise: transformers returns the last entry behind the norm, and the others not
    out = teacher(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS, output_hidden_states=True)
    raw = {}
    for index in (6, 11):
        layers(teacher, "encoder")[index].register_forward_hook(
            lambda _m, _a, o, i=index: raw.__setitem__(i, o[0] if isinstance(o, tuple) else o)
        )
    teacher(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)
    assert torch.equal(out.encoder_hidden_states[7], raw[6])
    assert torch.equal(out.encoder_hidden_states[12], raw[11]) == (family not in IN_A_NORM)
