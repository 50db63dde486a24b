"""The decode loop writes the tokens of transformers' own loop over the same blocks, whatever it is asked for."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers
from attention_models import peaked
from decode_models import ALL, CONFIG, FAMILIES, SOURCES, VOCAB, alike, assert_same_returned, both, build, given, lively
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dqkernels import DQConfig, decode, quantize_
from dqkernels.decode import engine, stopping
from dqkernels.decode import t5 as t5_file

KINDS = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 30, "temperature": 1.3},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
    "two beams": {"num_beams": 2},
    "beams": {"num_beams": 4},
    "five beams": {"num_beams": 5, "num_return_sequences": 5},
    "beam sample": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
}
#: Padded sources with a mask, without one (so that padding is read), and one source alone.
INPUTS = {"padded": given(), "no mask": {"input_ids": SOURCES}, "one": given(1)}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    "kind, inputs",
    [(kind, inputs) for inputs in INPUTS for kind in (KINDS if inputs == "padded" else ("greedy", "beams"))],
)
def test_tokens(family, kind, inputs):
    alike(lively(family), INPUTS[inputs], lively=inputs == "padded", **KINDS[kind])


class Prefers(LogitsProcessor):
    """Raises the score of a token that depends on everything that was written so far, in place."""

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] and input_ids.dtype == torch.int64
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        wanted = (input_ids * places).sum(1) % VOCAB
        scores[torch.arange(len(wanted)), wanted] += 3.0
        return scores


PROCESSED = {
    "no_repeat": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat": {"encoder_no_repeat_ngram_size": 1},
    "repetition": {"repetition_penalty": 1.7, "encoder_repetition_penalty": 1.3},
    "min_length": {"min_length": 9},
    "min_new_tokens": {"min_new_tokens": 10},
    "forced": {"forced_bos_token_id": 17, "forced_eos_token_id": 2},
    "bad_words": {"bad_words_ids": [[96], [15, 7], [45]]},
    "bias": {"sequence_bias": [[[80, 81], 4.0], [[69], -6.0]]},
    "suppressed": {"suppress_tokens": [96, 3], "begin_suppress_tokens": [45, 71]},
    "typical": {"do_sample": True, "typical_p": 0.7, "top_p": 0.9, "min_p": 0.01},
    "eta": {"do_sample": True, "eta_cutoff": 1e-3, "epsilon_cutoff": 1e-3},
    "decay": {"exponential_decay_length_penalty": (3, 1.6)},
    "ends": {"eos_token_id": [1, 2, 96, 15]},
    "no end": {"eos_token_id": None, "pad_token_id": 3},
    "renormalized": {"renormalize_logits": True, "remove_invalid_values": True, "do_sample": True},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids.sum()) + i + row) % VOCAB for i in range(7)]},
    "one allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [(7 * int(ids.sum()) + row) % VOCAB]},
    "own": {"logits_processor": LogitsProcessorList([Prefers()])},
    "guided": {"watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash"}},
}


def test_samples_of_one_source_differ():
    """Or several of them would be one sample, written several times."""
    tokens = alike(lively("bart"), **KINDS["samples"])
    different = [len(set(map(tuple, rows.tolist()))) for rows in tokens.view(4, 3, -1)]
    assert max(different) == 3 and sum(different) > 6, different


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("processor", PROCESSED)
def test_processors(processor, beams):
    family = FAMILIES[sorted(PROCESSED).index(processor) % len(FAMILIES)]
    options = PROCESSED[processor]
    model = lively(family)
    tokens = alike(model, num_beams=beams, **options)
    if "logits_processor" in options:
        free = alike(model, num_beams=beams)
        assert tokens.shape != free.shape or not torch.equal(tokens, free), "the processor has its say"


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.5, 0.0, 0.6, 2.5])
def test_length_penalty_and_early_stopping(penalty, early):
    for family in ("bart", "marian"):
        options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": penalty, "early_stopping": early}
        alike(lively(family), max_new_tokens=14, **options)


def test_length_penalties_matter():
    """Or the test above compares one search with itself."""
    found = {
        tuple(alike(lively("bart"), num_beams=3, length_penalty=penalty, early_stopping=early).flatten().tolist())
        for penalty in (-1.5, 2.5)
        for early in (True, "never")
    }
    assert len(found) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ALL)
def test_a_prefix_of_several_tokens(family, kind):
    prefix = torch.randint(5, VOCAB, (4, 5), generator=torch.Generator().manual_seed(4))
    inputs = {**given(), "decoder_input_ids": prefix}
    # transformers puts the start token in front: seven of the ten tokens are chosen.
    tokens = alike(lively(family), inputs, max_new_tokens=7, **KINDS[kind])
    every = tokens.shape[0] // 4
    assert torch.equal(tokens[::every, 1:6], prefix), "the prefix stands in front"
    whole = {**inputs, "decoder_attention_mask": torch.ones(4, 5, dtype=torch.long)}
    assert torch.equal(alike(lively(family), whole, max_new_tokens=7, **KINDS[kind]), tokens)


class Sums(StoppingCriteria):
    """Stops a sequence whose sum is divisible by `by`; notes the shapes it is shown."""

    def __init__(self, by: int):
        self.by, self.seen = by, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((tuple(input_ids.shape), None if scores is None else len(scores)))
        return input_ids.sum(dim=1) % self.by == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"return_dict_in_generate": True, "output_scores": True}])
def test_criteria_of_the_callers(options):
    criteria = [Sums(3), Sums(3)]
    model = lively("mbart")
    found = []
    for i, context in enumerate((True, False)):
        with decode.plain(model) if context else torch.no_grad():
            out = model.generate(**given(), stopping_criteria=StoppingCriteriaList([criteria[i]]), **options)
        found.append(getattr(out, "sequences", out))
    assert torch.equal(*found) and criteria[0].seen == criteria[1].seen and len(criteria[0].seen) > 1


def test_criteria_by_time_and_by_words():
    model = lively("bart")
    alike(model, max_time=60.0)
    alike(model, max_time=60.0, num_beams=2)


def test_a_criterion_alone_stops_every_row():
    """One that says so of the whole batch, as those of time do."""

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 5)

    for beams in (1, 3):
        tokens = alike(lively("bart"), num_beams=beams, stopping_criteria=StoppingCriteriaList([After()]))
        assert tokens.shape[1] == 5


def test_short_forms_are_the_long_ones():
    """What `Stop.quick` says is what the criteria of transformers say."""
    eos, length = transformers.EosTokenCriteria([3, 7]), transformers.MaxLengthCriteria(9)
    criteria = StoppingCriteriaList([length, eos, transformers.EosTokenCriteria(4)])
    stop = stopping.Stop(criteria)
    assert stop.simple and stop.pads and stop.most == 9
    ids = torch.randint(0, 9, (50, 9))
    for size in (3, 9):
        assert torch.equal(stop.quick(ids[:, size - 1], size), criteria(ids[:, :size], None))
    assert not stopping.Stop(StoppingCriteriaList([length, Sums(2)])).simple
    assert not stopping.Stop(StoppingCriteriaList([transformers.MaxLengthCriteria(9, 8)])).simple, "it would warn"

    class Other(transformers.EosTokenCriteria):
        pass

    assert not stopping.Stop(StoppingCriteriaList([Other(3)])).simple
    assert not stopping.Stop(StoppingCriteriaList([length])).pads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_returned(family, kind):
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(lively(family), **asked, **KINDS[kind])
    assert_same_returned(ours, theirs)
    assert ours.sequences is not None and ours.logits
    if "num_beams" in KINDS[kind]:
        lengths = {int((row >= 0).sum()) for row in ours.beam_indices}
        assert len(lengths) > 1 and ours.beam_indices.max() > 3, "beams of several sources, of several lengths"
        model = lively(family)
        transition = model.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
        assert torch.isfinite(transition).all()


def test_scores_alone():
    theirs, ours = both(lively("bart"), num_beams=3, return_dict_in_generate=True, output_scores=True)
    assert ours.logits is None and torch.equal(ours.sequences_scores, theirs.sequences_scores)
    theirs, ours = both(lively("bart"), num_beams=3, return_dict_in_generate=True)
    assert ours.scores is None and ours.sequences_scores is None and theirs.sequences_scores is None
    assert torch.equal(ours.beam_indices, theirs.beam_indices)


class Heard:
    """A streamer that remembers."""

    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_streamers(options):
    heard = Heard(), Heard()
    model = lively("marian")
    torch.manual_seed(0)
    with decode.plain(model):
        model.generate(**given(3), streamer=heard[0], max_new_tokens=9, **options)
    torch.manual_seed(0)
    out = model.generate(**given(3), streamer=heard[1], max_new_tokens=9, **options)
    assert engine.state_of(model).last == "" and heard[0].heard == heard[1].heard and heard[0].ended == heard[1].ended
    assert len(heard[1].heard) == out.shape[1] and heard[1].ended == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_one_beam(family):
    """A search of one beam, which `generate` would not make: transformers calls it greedy."""
    from dqkernels.decode import beams

    model = lively(family)
    tokens = alike(model)
    calls = []

    def one_beam(self, input_ids, logits_processor, stopping_criteria, generation_config, **rest):
        with torch.no_grad():
            for key in ("synced_gpus", "streamer"):
                rest.pop(key, None)
            with engine.Running(self, input_ids, generation_config, rest, True) as step:
                calls.append(1)
                return beams.search(step, input_ids, logits_processor, stopping_criteria, generation_config).sequences

    found = model.generate(**given(), max_new_tokens=11, do_sample=False, custom_generate=one_beam)
    ends = model.generation_config.eos_token_id
    for greedy, beam in zip(tokens.tolist(), found.tolist(), strict=True):
        upto = greedy.index(ends) + 1 if ends in greedy else len(greedy)
        assert greedy[:upto] == beam[:upto]
    assert calls == [1]


CONFIGS = {
    "W8": DQConfig(weight_bits=8, attention="int8"),
    "W4 groups": DQConfig(weight_bits=4, group_size=32, attention="int8"),
    "W2": DQConfig(weight_bits=2, embedding_bits=2, weight_quantizer="four_level", attention="int8"),
    "clip": DQConfig(weight_bits=4, act_clip=2.5, attention="int8"),
    "linears per tensor": DQConfig(
        weight_bits=4, act_granularity="per_tensor", attention="int8",
        overrides={r"(self|encoder)_attn$|(Self|EncDec)Attention$": {"act_granularity": "per_token"}},
    ),
    "mixed": DQConfig(
        weight_bits=4, attention="int8",
        overrides={
            r"v_proj|fc1|wi_0|Attention.v": {"weight_bits": 8},
            r"k_proj|fc2|lm_head|Attention.k|wo": {"skip": True},
        },
    ),
    "float head": DQConfig(weight_bits=4, attention="int8", head="float"),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["bart", "pegasus", "t5_v1_1"])
def test_packed_in_many_ways(family, config):
    model = build(family, CONFIGS[config])
    prefix = {**given(), "decoder_input_ids": torch.randint(5, VOCAB, (4, 3))}
    for options in (KINDS["greedy"], KINDS["beams"]):
        alike(model, lively=False, **options)
        alike(model, prefix, lively=False, max_new_tokens=5, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ALL)
def test_sixteen_bits(family, dtype):
    """Every step is rounded where the blocks round it."""
    model = build(family, CONFIG, dtype)
    prefix = {**given(), "decoder_input_ids": SOURCES[:, :3]}
    asked = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}
    for options in (KINDS["greedy"], KINDS["beams"]):
        for inputs in (given(), prefix):
            theirs, ours = both(model, inputs, **asked, **options)
            assert torch.equal(ours.sequences, theirs.sequences)
            assert all(map(torch.equal, ours.logits, theirs.logits))


def test_masks_with_holes():
    """Cross-attention knows no order of its keys: whatever is visible is put in front."""
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 9, [1] * 9])
    inputs = {"input_ids": SOURCES, "attention_mask": mask}
    for family in ("bart", "marian", "t5"):
        for kind in ("greedy", "beams"):
            tokens = alike(lively(family), inputs, **KINDS[kind])
            assert tokens.shape != (free := alike(lively(family), **KINDS[kind])).shape or not torch.equal(tokens, free)


def test_encoder_outputs_of_the_callers():
    model = lively("mbart")
    with torch.no_grad():
        outputs = model.get_encoder()(SOURCES, attention_mask=given()["attention_mask"])
    tokens = alike(model)
    for options in ({}, {"num_beams": 3}):
        inputs = {"encoder_outputs": outputs.copy(), "attention_mask": given()["attention_mask"]}
        theirs = model.generate(**given(), max_new_tokens=11, **options)
        ours = model.generate(**inputs, max_new_tokens=11, **options)
        assert torch.equal(ours, theirs) and engine.state_of(model).last == ""
    assert tokens.shape[0] == 4


def test_static_caches_asked_for():
    """`cache_implementation` is about transformers' caches; the tokens are the same with all of them."""
    for cache in ("static", "dynamic"):
        alike(lively("bart"), cache_implementation=cache)


def test_long_texts_make_room(monkeypatch):
    """Caches start smaller than a call's limit and grow when they are used up."""
    from dqkernels.decode import caches

    model = build("bart")
    monkeypatch.setattr(caches, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(caches, "STEP", 4)
    inputs = {**given(), "decoder_input_ids": SOURCES[:, :3]}
    for options in ({}, {"num_beams": 3}):
        alike(model, inputs, max_new_tokens=26, **options)
    assert max(each.shape.capacity for each in engine.state_of(model).pool.idle()) >= 28


def test_positions_end_where_they_end():
    """Beyond the learned positions both loops fail in one way."""
    model = build("bart")
    model.generation_config.eos_token_id = None
    for context in (decode.plain(model), torch.no_grad()):
        with context, pytest.raises(IndexError):
            model.generate(**given(), max_new_tokens=40)
    assert engine.state_of(model).last == ""


# ---- T5 --------------------------------------------------------------------------------------------------------


def t5(**settings):
    """A decoder whose distances have buckets of their own up to the last one."""
    model = peaked("t5")
    for key, value in settings.items():
        for stack in (model, model.encoder, model.decoder):
            setattr(stack.config, key, value)
        for module in model.modules():
            if hasattr(module, key):
                setattr(module, key, value)
    return decode.attach(quantize_(model, CONFIG))


@pytest.mark.parametrize("most", [20, 48, 128])
def test_relative_positions(most):
    """Far beyond the last distance that has a bucket of its own, and beyond the room that the bias had at first."""
    model = t5(relative_attention_max_distance=most)
    model.generation_config.eos_token_id = None
    assert model.decoder.block[0].layer[0].SelfAttention.relative_attention_max_distance == most
    assert t5_file._safe(32, most)
    alike(model, given(2), max_new_tokens=150 if most == 128 else 70, lively=False)
    alike(model, given(1), max_new_tokens=66, num_beams=2, lively=False)


def test_a_row_of_biases_is_their_table():
    attention = lively("t5").decoder.block[0].layer[0].SelfAttention
    bias = t5_file._Bias(attention)
    assert bias.safe
    for keys in (1, 5, 64, 65, 200):
        whole = attention.compute_bias(keys, keys)
        for position in {0, keys // 2, keys - 1}:
            row = bias.of_one(position, keys)
            assert row.shape == (1, 2, 1, keys)
            seen = slice(0, position + 1)
            assert torch.equal(row[0, :, 0, seen], whole[0, :, position, seen])
            assert torch.equal(bias.at(torch.tensor([position]), keys), row)
    assert torch.equal(bias.of_first(7), attention.compute_bias(7, 7))


def test_borders_of_buckets_are_seen():
    assert t5_file._safe(32, 128) and t5_file._safe(64, 250)
    assert not t5_file._safe(32, 256), "log(32 / 16) / log(256 / 16) * 16 is 4"
    assert not t5_file._safe(32, 16) and not t5_file._safe(1, 16)


def test_no_relative_positions():
    model = t5()
    first = model.decoder.block[0].layer[0].SelfAttention
    first.has_relative_attention_bias = False
    alike(model, lively=False)
    alike(model, {**given(), "decoder_input_ids": SOURCES[:, :4]}, lively=False, num_beams=2)


@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_mt5(kind):
    alike(decode.attach(quantize_(peaked("mt5"), CONFIG)), lively=False, **KINDS[kind])


def test_an_embedding_of_ones_own_keeps_its_place():
    """A subclass that adds nothing is served as its base is; the small Blenderbot norms before it adds positions."""
    model = build("blenderbot-small")
    positions = model.get_decoder().embed_positions
    positions.__class__ = type("Own", (type(positions),), {})
    alike(model)


def test_a_decoder_without_layers_is_left_to_transformers(monkeypatch):
    monkeypatch.setitem(tiny_models._SEQ2SEQ, "decoder_layers", 0)
    model = build("bart")
    assert "the decoder has no layers" in decode.describe(model)
    assert model.generate(**given(), max_new_tokens=3, num_beams=1).shape[0] == 4


def test_half_is_clamped_as_its_blocks_clamp_it():
    """An infinity anywhere lowers the limit for all rows."""
    model = build("t5", CONFIG, torch.float16)
    for block in model.decoder.block:
        block.layer[2].DenseReluDense.wo.weight_scale.mul_(3e5)
    asked = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    theirs, ours = both(model, **asked)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    x = torch.tensor([65000.0, float("inf"), -65504.0], dtype=torch.float16)
    assert t5_file._clamped(x).tolist() == [64512.0, 64512.0, -64512.0]
    assert t5_file._clamped(x[[0, 2]]).tolist() == [65000.0 // 32 * 32, -65504.0]


def test_inference_mode():
    model = build("marian")
    with torch.inference_mode():
        first = model.generate(**given(), max_new_tokens=6)
    assert torch.equal(first, model.generate(**given(), max_new_tokens=6)) and engine.state_of(model).served == 2
