"""The layers of a decode step in one call of the compiled core: the bits of the calls made one by one, and when not.

test_decode_tokens.py runs on this step, too: tokens are those of transformers' loop there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import tiny_models
import torch
from decode_models import CONFIG, FAMILIES, SOURCES, alike, build, given
from torch import nn
from transformers.generation import logits_process

from dqkernels import DQConfig, decode, models, report
from dqkernels.convert import calibrate
from dqkernels.decode import caches, engine, native_step, stopping
from dqkernels.kernels import cpu_attention, cpu_gemm, cpu_norm, native
from dqkernels.kernels.cpu_step import Tape
from dqkernels.models import norms
from dqkernels.nn import QLinear

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
#: Kernel calls of a layer: qkv, write, attend, out; q, attend, out; fc1, fc2. Norms: two before linears and one behind,
#: or three before.
CALLS = 9 + 3
#: And of the two ends: tokens, positions, a norm of theirs; a norm before the head, the head, its largest.
ENDS = {
    "bart": 3 + 2, "mbart": 3 + 3, "marian": 2 + 2, "pegasus": 2 + 3, "plbart": 3 + 2, "blenderbot": 2 + 3,
    "m2m_100": 0 + 3, "blenderbot-small": 0 + 2,
}  # fmt: skip
#: Whose embedding torch computes, and why.
BY_TORCH = {
    "m2m_100": "positions count the tokens that are no padding",
    "blenderbot-small": "the norm stands before the positions",
}


def layers_of(model) -> list[native_step.Layers]:
    """What was written down for the caches that are kept."""
    idle = engine.state_of(model).pool.idle()
    return [kept for each in idle for _, kept in each.captured.values()]


def logits(model, rows: int, **options):
    """Tokens and the raw logits of every step."""
    asked = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(**given(rows), **asked, **options)
    assert engine.state_of(model).last == ""
    return found.sequences, torch.stack(found.logits)


def assert_one_by_one(model, monkeypatch, rows: int = 4, **options):
    """Layer by layer the same bits come out; returns what was written down."""
    decode.free(model)
    with monkeypatch.context() as without:
        without.setattr(native_step, "why_not", lambda *_: "not now")
        tokens, wanted = logits(model, rows, **options)
        assert layers_of(model) == []
    found, got = logits(model, rows, **options)
    assert torch.equal(got, wanted) and torch.equal(found, tokens) and wanted.std() > 0.1
    (written,) = layers_of(model)
    return written


@pytest.mark.parametrize("num_beams", [1, 2])
def test_first_tokens_of_32_bits(num_beams):
    """Those of a caller: what int64 ones give."""
    model, start = build("bart"), torch.zeros((3, 1), dtype=torch.int64)  # the decoder's start
    asked = {**given(3), "num_beams": num_beams, "do_sample": False, "max_new_tokens": 4}
    found = [model.generate(**asked, decoder_input_ids=start.to(kind)) for kind in (torch.int64, torch.int32)]
    assert torch.equal(*found) and engine.state_of(model).last == "" and layers_of(model)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_the_calls_one_by_one(family, threads, monkeypatch):
    monkeypatch.setitem(tiny_models._SEQ2SEQ, "decoder_layers", 3)  # the third one writes where the first one did
    model, before = build(family), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows, beams in ((1, 1), (4, 1), (2, 3)):
            written = assert_one_by_one(model, monkeypatch, rows, num_beams=beams)
            assert len(written.tape.core) == 3 * CALLS + ENDS[family]
            assert (written.x is None) == (family not in BY_TORCH)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "family, config, dtype",
    [
        ("bart", {"weight_bits": 2, "embedding_bits": 2, "weight_quantizer": "four_level"}, torch.bfloat16),
        ("mbart", {"weight_bits": 4, "group_size": 32, "act_clip": 2.5}, torch.float16),
        ("marian", {"weight_bits": 8, "weight_granularity": "per_tensor"}, torch.float32),
        ("pegasus", {"weight_bits": 4, "act_granularity": "per_tensor"}, torch.float32),
    ],
)
def test_formats_and_types(family, config, dtype, monkeypatch):
    model = build(family, DQConfig(**config, attention="int8"), dtype)
    if config.get("act_granularity") == "per_tensor":  # as is attention then, which no decode step serves
        assert "one scale for all its keys" in decode.describe(model)
        return
    assert_one_by_one(model, monkeypatch, num_beams=2)


def test_what_was_written_down_is_used_again(monkeypatch):
    """By later calls, under inference_mode or not; anew over other weights or options, and with more room."""
    model = build("mbart")
    with torch.inference_mode():
        model.generate(**given(), max_new_tokens=4)
    (first,) = layers_of(model)
    alike(model, max_new_tokens=12)
    assert layers_of(model) == [first]
    for change in (
        lambda layer: setattr(layer.fc1, "weight_scale", layer.fc1.weight_scale * 1.5),
        lambda layer: setattr(layer.final_layer_norm, "eps", 0.3),
        lambda layer: setattr(layer, "activation_fn", nn.ReLU().eval()),
        lambda layer: setattr(layer.encoder_attn, "scaling", 0.5),
    ):
        with torch.no_grad():
            change(model.get_decoder().layers[0])
        before = layers_of(model)
        alike(model, lively=False)
        assert len(layers_of(model)) == 1 and layers_of(model) != before
    (last,) = layers_of(model)
    with torch.no_grad():
        model.get_decoder().layers[0].fc1.weight_scale.mul_(1.5)  # what stands there is read
    alike(model, lively=False)
    assert layers_of(model) == [last]
    monkeypatch.setattr(caches, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(caches, "STEP", 4)
    decode.free(model)
    alike(model, max_new_tokens=26, num_beams=2, lively=False)


REPLACED = {
    "bias": (lambda layer: layer.fc1.bias, lambda t: t[:3], r"bias must be \[56\], got \[3\]"),
    "norm": (lambda layer: layer.final_layer_norm.weight, lambda t: t[:3], r"weight must be \[40\], got \[3\]"),
    "codes": (lambda layer: layer.fc2.qweight, lambda t: t[:16], "qweight must be uint8"),
    "scale": (lambda layer: layer.fc2.weight_scale, torch.Tensor.half, "weight_scale must be float32"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_was_replaced_is_checked_as_layer_by_layer(what):
    """The core gets addresses: a shorter tensor would be read beyond its end."""
    model = build("bart")
    model.generate(**given(), max_new_tokens=3)
    find, change, message = REPLACED[what]
    tensor = find(model.get_decoder().layers[0])
    tensor.data = change(tensor.data).clone()
    with pytest.raises(ValueError, match=message):
        model.generate(**given(), max_new_tokens=3)


def test_a_static_scale_counts_by_its_value(monkeypatch):
    """It became a number when the call was written down."""
    model = build("bart", DQConfig(weight_bits=4, attention="int8", overrides={"fc2": {"act_granularity": "static"}}))
    with pytest.raises(ValueError, match="run dqkernels.calibrate"):
        model.generate(**given(), max_new_tokens=3)
    calibrate(model, [{**given(), "decoder_input_ids": SOURCES[:, :3]}])
    _, before = logits(model, 4)
    model.get_decoder().layers[0].fc2.act_scale.data.mul_(3)  # without a new version of the tensor
    _, after = logits(model, 4)
    assert not torch.equal(before, after)
    assert_one_by_one(model, monkeypatch)


def test_memory_that_is_exchanged_within_a_call_is_read_until_its_end():
    """By a processor, or another thread. Nothing is read that was given back."""
    model = build("bart")
    tokens = model.generate(**given(), max_new_tokens=8)

    def exchange(input_ids, scores):
        for parameter in model.get_decoder().layers.parameters():
            parameter.data = parameter.data.clone()
        rubbish.extend(torch.full((56,), float("nan")) for _ in range(200))
        return scores

    rubbish: list[torch.Tensor] = []
    assert torch.equal(model.generate(**given(), max_new_tokens=8, logits_processor=[exchange]), tokens)


def test_idle_tapes_over_other_weights_are_let_go():
    model = build("bart")
    model.generate(**given(), max_new_tokens=3)
    model.generate(**given(1), max_new_tokens=3)
    assert len(layers_of(model)) == 2
    linear = model.get_decoder().layers[0].fc1
    old = weakref.ref(linear.qweight.untyped_storage())
    linear.qweight = nn.Parameter(linear.qweight.clone(), requires_grad=False)
    model.generate(**given(1), max_new_tokens=3)
    gc.collect()
    assert len(layers_of(model)) == 1 and old() is None


def test_a_hook_on_the_body_is_heard():
    model, heard = build("bart"), []
    handle = model.model.register_forward_hook(lambda *_: heard.append(1))
    model.generate(**given(), max_new_tokens=3)
    handle.remove()
    assert heard and "a hook watches model.model" in engine.state_of(model).last


def test_it_is_named():
    model = build("bart")
    assert decode.describe(model) == "own loop over static int8 caches, a step in one native call"
    model.generate(**given(), max_new_tokens=3)
    (written,) = layers_of(model)
    assert decode.memory(model)[1] > written.pool_bytes > 0
    assert "a step in one native call" in " ".join(str(report(model)).split())


WHY = {
    "two formats": "Q, K and V of decoder.layers.0 are launches of their own (they are packed in different formats)",
    "an activation": "SiLU of decoder.layers.0 has no epilogue",
    "another norm": "a norm of decoder.layers.0 is a Other, or has no weight",
    "a backend": "qgemm of Q, K and V of decoder.layers.0 runs on eager",
    "attention": "quantize_into_cache of decoder.layers.0.self_attn runs on eager",
    "a family": "its blocks are not fused",
}


class Other(nn.LayerNorm):
    """A user's."""


@pytest.mark.parametrize("case", WHY)
def test_where_it_cannot_be_it_says_so(case):
    """And the tokens stay those of transformers' loop."""
    config = dataclasses.replace(CONFIG, overrides={"v_proj": {"weight_bits": 8}} if case == "two formats" else {})
    model = build("t5" if case == "a family" else "marian", config)
    for layer in () if case == "a family" else model.get_decoder().layers:
        if case == "an activation":
            layer.activation_fn = nn.SiLU().eval()
        if case == "another norm":
            layer.final_layer_norm.__class__ = Other
        if case == "a backend":
            layer.self_attn.q_proj.backend = layer.self_attn.k_proj.backend = layer.self_attn.v_proj.backend = "eager"
    if case == "attention":
        models.attention.configure(model, "eager", False)
    told = decode.describe(model)
    assert told == f"own loop over static int8 caches, layer by layer ({WHY[case]})"
    alike(model, lively=False)
    assert layers_of(model) == []


@pytest.mark.parametrize("family", BY_TORCH)
def test_an_embedding_of_another_kind_says_so(family):
    words = f"the layers of a step in one native call, its embedding by torch ({BY_TORCH[family]})"
    assert decode.describe(build(family)) == f"own loop over static int8 caches, {words}"


ENDS_APART = {
    "a float table": "its embedding by torch (embed_tokens is a Embedding)",
    "a table elsewhere": "its embedding by torch (qembedding of embed_tokens runs on eager)",
    "another norm": "its embedding by torch (layernorm_embedding is a test_decode_native.Other)",
    "a norm of torch's": "its embedding by torch (layernorm_embedding is a torch.nn.modules.normalization.LayerNorm)",
    "positions": "its embedding by torch (positions are torch.float64, tokens torch.float32)",
    "a head elsewhere": "its head by torch (qgemm of the head runs on eager)",
    "a float head": "its head by torch (of the head one is not packed)",
}


@pytest.mark.parametrize("case", ENDS_APART)
def test_an_end_that_stays_with_torch_says_so(case):
    """The layers are one call all the same, and tokens those of transformers' loop; greedy ones and beams."""
    model = build("bart")
    decoder = model.get_decoder()
    match case:
        case "a float table":
            decoder.embed_tokens = nn.Embedding(*decoder.embed_tokens.weight.shape).eval()
        case "a table elsewhere":
            decoder.embed_tokens.backend = "eager"
        case "another norm":
            decoder.layernorm_embedding.__class__ = Other
        case "a norm of torch's":
            decoder.layernorm_embedding = nn.LayerNorm(40).eval()
        case "positions":
            decoder.embed_positions.double()
        case "a head elsewhere":
            model.lm_head.backend = "eager"
        case "a float head":
            model.lm_head = nn.Linear(40, model.config.vocab_size).eval()
    words = "own loop over static int8 caches, the layers of a step in one native call, "
    assert decode.describe(model) == words + ENDS_APART[case]
    if case == "positions":  # a sum in float64 is for no kernel: transformers' loop refuses it, too
        return
    alike(model, lively=False)
    alike(model, num_beams=3, lively=False)
    assert all((kept.x is None) == ("head" in case) for kept in layers_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "of the model", "fp32"])
def test_the_bias_behind_the_head(kind, dtype, monkeypatch):
    """Rounded as torch rounds it; one that came, changed or went since the last call counts."""
    model = build("marian", dtype=dtype)
    bias = torch.randn(1, model.config.vocab_size)
    model.final_logits_bias = torch.zeros_like(bias).to(dtype) if kind == "none" else bias
    if kind == "of the model":
        model.final_logits_bias = bias.to(dtype)
    before = alike(model, lively=False)
    assert_one_by_one(model, monkeypatch)
    model.final_logits_bias = bias.flip(1)
    after = alike(model, lively=False)
    assert not torch.equal(before, after)
    model.final_logits_bias.zero_()
    assert not torch.equal(alike(model, lively=False), after)


def test_positions_that_the_model_does_not_have():
    """Torch refuses them by an IndexError, on both ways."""
    model = build("bart")
    limit = model.config.max_position_embeddings
    for way in (decode.plain(model), contextlib.nullcontext()):
        with way, pytest.raises(IndexError):
            model.generate(**given(1), max_new_tokens=limit + 4, do_sample=False, eos_token_id=None, pad_token_id=1)


def test_norms_around_the_decoder_run_on_the_kernel():
    """Where the layers' do, so that both loops give the same bits; torch's for whoever is trained, or in float."""
    model = build("mbart")
    decoder, x = model.get_decoder(), torch.randn(2, 3, 40)
    assert {type(getattr(decoder, name)) for name in norms.NAMES} == {norms.LayerNorm}
    norm = decoder.layernorm_embedding
    torchs = nn.LayerNorm.forward(norm, x)
    kernel = cpu_norm.layernorm_quantize(x, None, norm.weight, norm.bias, norm.eps, "per_token", None, None, False)[0]
    assert not torch.equal(torchs, kernel)
    with torch.no_grad():
        assert torch.equal(norm(x), kernel) and isinstance(norm, nn.LayerNorm)
        norm.train()
        assert torch.equal(norm(x), torchs)
        norm.eval()
        linear = decoder.layers[-1].fc2
        linear.backend = "eager"
        assert torch.equal(norm(x), torchs)
        linear.backend = "auto"
    norm.weight.requires_grad_(True)
    assert torch.equal(norm(x), torchs)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again.get_decoder().layer_norm) is norms.LayerNorm
    assert norms.linear_of(again.get_decoder().layer_norm) is again.get_decoder().layers[-1].fc2
    models.unpatch(model)
    assert type(norm) is nn.LayerNorm and not hasattr(norm, "dqkernels_layers")


PROCESSORS = {
    "bos": (logits_process.ForcedBOSTokenLogitsProcessor(7), {1}),
    "eos": (logits_process.ForcedEOSTokenLogitsProcessor(6, 2), {5}),
    "min": (logits_process.MinLengthLogitsProcessor(4, 2), {1, 2, 3}),
    "new": (logits_process.MinNewTokensLengthLogitsProcessor(2, 3, 2), {1, 2, 3, 4}),
    "ngram": (logits_process.NoRepeatNGramLogitsProcessor(2), set(range(1, 9))),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_have_nothing_to_say_are_not_asked(name):
    one, lengths = PROCESSORS[name]
    unheard = stopping.silent(logits_process.LogitsProcessorList([one]))
    for length in range(1, 9):
        ids, scores = torch.full((1, length), 4), torch.arange(9.0).unsqueeze(0)
        changed = not torch.equal(one(ids, scores.clone()), scores)
        assert changed <= (not unheard(length)) and (length in lengths) == (not unheard(length))
        for token in (2, 8):  # the end of sequence, or another one, is the largest
            scores[0, token] = 20.0 + token
            if unheard(length, [token]):
                assert one(ids, scores.clone()).argmax() == token
        assert unheard(length, [8]) or name in ("bos", "eos", "ngram")
        assert unheard(length, [8, 2]) == unheard(length)
    both = logits_process.LogitsProcessorList([one, PROCESSORS["eos"][0]])
    assert not stopping.silent(both)(5) and not stopping.silent([one])(8), "a list of the user's is called"

    class Mine(type(one)):
        pass

    mine = Mine.__new__(Mine)
    mine.__dict__.update(one.__dict__)
    assert not stopping.silent(logits_process.LogitsProcessorList([mine]))(8)


def test_greedy_settings_on_the_short_way():
    """What the loop of a step that finds its largest logit has to keep: ends, padding, processors, streams."""
    model = build("bart")
    for options in (
        {"max_new_tokens": 9, "forced_eos_token_id": 2},
        {"max_new_tokens": 9, "forced_bos_token_id": 7, "min_new_tokens": 4},
        {"max_new_tokens": 12, "eos_token_id": [2, 9, 11], "pad_token_id": 3},
        {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 1},
        {"max_new_tokens": 8, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 6, "decoder_input_ids": SOURCES[:, :3]},
    ):
        alike(model, lively=False, **options)
    texts = []
    for way in (decode.plain(model), contextlib.nullcontext()):
        heard = Heard()
        with way:
            model.generate(**given(1), max_new_tokens=9, min_new_tokens=6, do_sample=False, streamer=heard)
        assert heard.said.pop() == "end"
        texts.append([value.tolist() for value in heard.said])
    assert texts[0] == texts[1] and len(texts[0]) > 3 and len(set(map(str, texts[0]))) > 2


class Heard:
    """A streamer that writes down what it is given."""

    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value)  # as a tensor: it may look at it later

    def end(self):
        self.said.append("end")


def test_static_scales(monkeypatch):
    """Q, K and V with scales of their own are launches of their own; the rest of the model would fit."""
    model = build("pegasus", DQConfig(weight_bits=8, act_granularity="static", attention="int8"))
    calibrate(model, [{"input_ids": SOURCES, "decoder_input_ids": SOURCES[:, :5]}])
    assert "static scales are measured" in decode.describe(model)
    alike(model, lively=False)


# ---- the tape alone -------------------------------------------------------------------------------------------


def test_nothing_runs_before_it_is_told_to():
    tape, x, weight = Tape(), torch.randn(2, 8), torch.ones(8)
    y, q, scale, _ = cpu_norm.layernorm_quantize(x, None, weight, None, 1e-5, "per_token", None, None, False, into=tape)
    for tensor in (y, q, scale):
        tensor.zero_()
    assert len(tape.core) == 1 and tape.pool_bytes == y.nbytes + q.nbytes + scale.nbytes
    tape.run()
    wanted = cpu_norm.layernorm_quantize(x, None, weight, None, 1e-5, "per_token", None, None, False)
    assert all(map(torch.equal, (y, q, scale), wanted))
    x.mul_(torch.randn(2, 8))  # what stands in the operands then
    tape.run()
    wanted = cpu_norm.layernorm_quantize(x, None, weight, None, 1e-5, "per_token", None, None, False)
    assert all(map(torch.equal, (y, q, scale), wanted)) and y.any()


def test_operands_live_as_long_as_the_tape():
    """Also copies of them that the launcher made."""
    torch.manual_seed(0)
    linear = QLinear.from_linear(nn.Linear(40, 24), DQConfig(weight_bits=4))
    x = torch.randn(3, 40)
    tape = Tape()
    part = cpu_gemm.part(*linear.packed(), linear.bias.detach().double(), torch.randn(24, 3).t(), 24)
    options = {"bits": 4, "four_level": False, "group_size": -1, "activation": "gelu", "out_dtype": torch.float32}
    (wanted,) = cpu_gemm.gemm(x, [part], **options)
    (found,) = cpu_gemm.gemm(x, [part], **options, into=tape)
    del part, x
    rubbish = [torch.full((n,), 7.0) for n in (24, 72, 120) for _ in range(50)]
    tape.run()
    assert torch.equal(found, wanted) and len(rubbish) == 150


def test_results_of_the_layer_before_last_are_overwritten():
    tape = Tape()
    made = []
    for _ in range(3):
        made.append((tape.empty((2, 4), torch.float32), tape.empty((8,), torch.float32)))
        tape.next_layer()
    addresses = [[each.data_ptr() for each in layer] for layer in made]
    assert addresses[0] == addresses[2] and not {*addresses[0]} & {*addresses[1]} and len({*addresses[0]}) == 2
    other = tape.empty((2, 5), torch.float32)
    assert other.data_ptr() not in sum(addresses, []) and tape.pool_bytes == (8 + 8 + 10 + 16) * 4, "all that is held"


def test_what_a_run_refuses():
    tape, shape = Tape(), (2, 1, 4, 8)
    k, v = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
    codes, scales = torch.zeros(2, *shape, dtype=torch.int8), torch.zeros(2, *shape[:3])
    position = torch.tensor([0, 3], dtype=torch.int32)
    where = (codes[0], scales[0], codes[1], scales[1], position)
    cpu_attention.quantize_into_cache(k, v, *where, "per_token", None, into=tape)
    assert not codes.any()
    tape.run()
    assert codes[:, 0, 0, 0].any() and codes[:, 1, 0, 3].any()
    position[1] = 4
    with pytest.raises(ValueError, match=r"CpuStep\.run: "):
        tape.run()
    with pytest.raises(ValueError, match="v must be on cpu, got meta"):
        cpu_attention.quantize_into_cache(k, v.to("meta"), *where, "per_token", None, into=tape)
    assert len(tape.core) == 1


def test_what_stands_in_the_way_is_asked_once(monkeypatch):
    """And again over other weights or options, for beams, and once `free` has let go of all that is kept."""
    model, asked = build("bart"), []
    inner = native_step.why_not
    monkeypatch.setattr(native_step, "why_not", lambda *given: asked.append(given[1]) or inner(*given))
    layer = model.get_decoder().layers[0]
    for change, wanted in (
        (lambda: None, [False]),
        (lambda: None, []),
        (lambda: setattr(layer.fc1, "backend", "cpu"), [False]),
        (lambda: setattr(layer.fc1, "bias", nn.Parameter(layer.fc1.bias.clone(), False)), [False]),
        (lambda: decode.free(model), [False]),
        (lambda: monkeypatch.setenv("DQKERNELS_BACKEND", "cpu"), [False]),
        (lambda: None, []),
    ):
        change()
        alike(model, max_new_tokens=3)
        assert asked == wanted
        asked.clear()
    alike(model, max_new_tokens=3, num_beams=2)
    assert asked == [True]
    assert layers_of(model)
    layer.fc1.backend = "eager"  # an obstacle: asked at every call, and never remembered as none
    for _ in range(2):
        decode.free(model)
        asked.clear()
        alike(model, max_new_tokens=3)
        assert asked == [False] and layers_of(model) == []


def test_a_tensor_in_the_place_of_a_parameter_is_seen():
    """As some code leaves it: a plain attribute, which no list of parameters has."""
    model = build("bart")
    layer = model.get_decoder().layers[0]
    for module, name in ((layer.fc1, "bias"), (layer.final_layer_norm, "bias")):
        tensor = getattr(module, name).detach().clone()
        delattr(module, name)
        for factor in (1.0, -2.0):
            setattr(module, name, factor * tensor)
            alike(model, max_new_tokens=4)
            assert layers_of(model)
