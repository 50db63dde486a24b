"""How the decode loop gets into a model and out of it, and which calls it leaves to transformers, by name."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import transformers
from attention_models import peaked
from decode_models import ALL, CONFIG, SOURCES, alike, both, build, given, lively
from tiny_models import make
from transformers import StaticCache
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from dqkernels import DQConfig, decode, load, models, quantize_, report
from dqkernels.decode import engine, plug

# ---- in and out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_attach_and_detach(family):
    model = build(family)
    kind = type(model)
    base = kind.__mro__[2]
    assert decode.is_attached(model) and decode.serves(model) and isinstance(model, base)
    assert (kind.__name__, kind.__module__) == (base.__name__, base.__module__)
    before = model.state_dict()
    assert decode.attach(model) is model and type(model) is kind, "twice is once"
    tokens = alike(model)
    assert engine.state_of(model).pool.idle()
    assert decode.detach(model) is model and type(model) is base and not decode.is_attached(model)
    assert engine.state_of(model).pool.idle() == [] and "dqkernels_decode_graphs" not in model.__dict__
    served = engine.state_of(model).served
    assert torch.equal(model.generate(**given(), max_new_tokens=11, do_sample=False), tokens)
    assert engine.state_of(model).served == served and decode.detach(model) is model
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert decode.describe(model) == "" and report(model).decode == "" and "Decoding" not in str(report(model))


def test_copies_pickles_and_files(tmp_path):
    model = decode.attach(build("marian"), graphs=False)
    tokens = alike(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert decode.is_attached(other) and type(other) is type(model) and not plug.uses_graphs(other)
        assert torch.equal(alike(other), tokens)
        assert engine.state_of(other) is not engine.state_of(model)
    model = decode.attach(models.patch(quantize_(peaked("mbart"), CONFIG)))  # a head that a file may hold
    model.save_pretrained(tmp_path)
    loaded = decode.attach(models.patch(load(tmp_path, dtype="float32")))
    assert torch.equal(alike(loaded, lively=False), alike(model, lively=False))


def test_a_model_takes_its_caches_along():
    model = build("bart")
    alike(model)
    count = len(engine._STATES)
    del model
    import gc

    gc.collect()
    assert len(engine._STATES) < count


def test_others_are_refused():
    for family in ("bert", "llama"):
        model = make(family)
        assert not decode.serves(model)
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no decoder that is known here: BartFor"):
            decode.attach(model)
    with pytest.raises(ValueError, match="BartModel has no decoder"):
        decode.attach(peaked("bart").model)


def test_methods_of_the_users_own_are_kept():
    class Mine(transformers.BartForConditionalGeneration):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    class Same(transformers.BartForConditionalGeneration):
        pass

    model = peaked("bart")
    model.__class__ = Mine
    assert not decode.serves(model)
    with pytest.raises(ValueError, match="Mine has a prepare_inputs_for_generation of its own"):
        decode.attach(model)
    model.__class__ = Same
    assert isinstance(decode.attach(model), Same)
    other = peaked("bart")
    other._sample = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="has a _sample of its own"):
        decode.attach(other)


def test_attach_before_everything_else():
    """Attention and blocks are asked call by call."""
    model = decode.attach(peaked("mbart"))
    both(model, why="self_attn is sdpa, not int8", max_new_tokens=3)
    quantize_(model, CONFIG)
    models.unpatch(model)  # where `quantize_` has fused them already
    both(model, why="decoder.layers.0 is not fused: dqkernels.models.patch(model) fuses it", max_new_tokens=3)
    models.patch(model)
    both(model, max_new_tokens=3)
    models.unpatch(model)
    assert decode.is_attached(model)
    both(model, why="decoder.layers.0 is not fused", max_new_tokens=3)


# ---- transformers' own loop, asked for ------------------------------------------------------------------------


def test_plain_is_of_one_model_and_one_thread():
    model, other = lively("bart"), lively("marian")
    served = engine.state_of(model).served, engine.state_of(other).served
    inside, leave = threading.Event(), threading.Event()

    def elsewhere():
        with decode.plain(model):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert inside.wait(60)
    model.generate(**given(2), max_new_tokens=2)
    with decode.plain(other):
        model.generate(**given(2), max_new_tokens=2)
        other.generate(**given(2), max_new_tokens=2)
        with decode.plain(model):
            model.generate(**given(2), max_new_tokens=2)
            other.generate(**given(2), max_new_tokens=2)
        model.generate(**given(2), max_new_tokens=2)
    leave.set()
    thread.join()
    assert (engine.state_of(model).served, engine.state_of(other).served) == (served[0] + 3, served[1])


def test_plain_ends_with_an_error():
    model = lively("bart")
    with pytest.raises(KeyError), decode.plain(model):
        raise KeyError
    both(model, max_new_tokens=2)


# ---- calls that are for transformers' own loop ----------------------------------------------------------------


def _mask(model):
    return {"decoder_input_ids": SOURCES[:, :4], "decoder_attention_mask": torch.tensor([[1, 1, 0, 1]] * 4)}


def _own_cache(model):
    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


CALLS = {
    "output_attentions=True": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states=True": {"output_hidden_states": True, "return_dict_in_generate": True},
    "use_cache=False": {"use_cache": False},
    "decoder_attention_mask hides tokens": _mask,
    "a cache of the caller's": _own_cache,
    "it is given decoder_position_ids": {"decoder_position_ids": None},
}


@pytest.mark.parametrize("why", CALLS)
@pytest.mark.parametrize("beams", [1, 2])
def test_calls_that_are_passed_on(why, beams):
    model = build("bart")
    if why.startswith("it is given"):
        if beams > 1:
            pytest.skip("one way is enough")
        # A forward that takes more than transformers' does is another one, too.
        given_ = {"encoder_outputs": (torch.zeros(2, 3, 40),), "decoder_position_ids": None}
        config = transformers.GenerationConfig()
        ids = torch.zeros(2, 1, dtype=torch.long)
        with torch.no_grad():
            assert engine.why_not(model, ids, config, False, given_, False) == why
        return
    options = CALLS[why]
    found = []
    for context in (decode.plain(model), torch.no_grad()):
        made = options(model) if callable(options) else options
        with context:
            out = model.generate(**given(), max_new_tokens=4, num_beams=beams, **made)
        found.append(getattr(out, "sequences", out))
    assert torch.equal(*found)
    state = engine.state_of(model)
    assert why in state.last and state.passed == 1 and state.served == 0
    expected = f"; 1 of 1 calls went to Hugging Face's own loop, the last one ({state.last})"
    if "output" not in why:  # hooks that transformers leaves behind are the next reason
        told = decode.describe(model)
        assert told.startswith("own loop over static int8 caches, ") and told.endswith(expected)


def test_texts_longer_than_a_table_of_positions_that_grows():
    """M2M100's does so in transformers' loop, at the step that needs it."""
    model = build("m2m_100")
    rows = model.model.decoder.embed_positions.weights.shape[0]
    most = rows - model.model.decoder.embed_positions.padding_idx - 1  # tokens that are fed; one more is written
    options = {"max_new_tokens": None, "eos_token_id": None}
    alike(model, max_length=most + 1, **options)
    longer = {"eos_token_id": None, "max_length": most + 3}
    found = model.generate(**given(), **longer)  # before transformers' loop makes the table longer
    assert f"may need {most + 2} positions, and M2M100's table has {most} " in engine.state_of(model).last
    theirs, ours = both(model, **options, max_length=most + 3)  # now it is
    assert torch.equal(found, theirs) and torch.equal(ours, theirs) and ours.shape[1] == most + 3


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_output_of_another_width(family):
    """40 features and 44 are packed into codes of one shape."""
    model = build(family)
    outputs = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.randn(2, 5, 44))
    with pytest.raises(ValueError, match=r"input must be \[..., in_features=40\], got \[2, 5, 44\]"):
        model.generate(encoder_outputs=outputs, max_new_tokens=3)


def test_a_cache_of_the_callers_is_filled():
    model = build("bart")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model.generate(**given(), max_new_tokens=4, past_key_values=cache)
    assert cache.get_seq_length() > 1
    assert StaticCache is not None


def test_gradients_autocast_and_training():
    model = build("bart")
    with torch.autocast("cpu", torch.bfloat16):
        both(model, why="autocast is on", max_new_tokens=3)
    for dropped in (model, model.model.decoder, model.model.decoder.layers[0].fc1):
        model.eval()
        dropped.training = True
        torch.manual_seed(0)
        model.generate(**given(), max_new_tokens=2)
        assert "is in training mode" in engine.state_of(model).last
    model.eval()
    both(model, max_new_tokens=3)
    ids = torch.zeros(4, 1, dtype=torch.long)
    with torch.enable_grad():
        why = engine.why_not(model, ids, model.generation_config, False, {}, False)
    assert why == "gradients are on"
    with torch.no_grad():
        why = engine.why_not(model, ids, model.generation_config, True, {}, False)
    assert "synced_gpus" in why
    model.generation_config.cache_implementation = "offloaded"  # needs a GPU to be run
    with torch.no_grad():
        why = engine.why_not(model, ids, model.generation_config, False, {}, False)
    assert why == "cache_implementation='offloaded'"


WATCHED = {
    "the model": "", "the head": "lm_head", "the decoder": "model.decoder",
    "decoder.layers.0.fc1": "model.decoder.layers.0.fc1", "decoder.embed_tokens": "model.decoder.embed_tokens",
    "decoder.layers.0.encoder_attn.v_proj": "model.decoder.layers.0.encoder_attn.v_proj",
}  # fmt: skip


@pytest.mark.parametrize("name", WATCHED)
def test_hooks_are_called(name):
    model = build("bart")
    seen = []
    handle = model.get_submodule(WATCHED[name]).register_forward_hook(lambda *_: seen.append(1))
    with decode.plain(model):
        model.generate(**given(), max_new_tokens=4)
    count = len(seen)
    both(model, why=f"a hook watches {name}", max_new_tokens=4)
    assert len(seen) == 3 * count > 0
    assert f"Hugging Face's own loop (a hook watches {name}" in report(model).decode
    handle.remove()
    alike(model)
    model.get_submodule(WATCHED[name]).forward = model.get_submodule(WATCHED[name]).forward
    both(model, why="or its forward was replaced", max_new_tokens=3)


def test_hooks_in_the_encoder_are_none_of_ours():
    model = build("bart")
    seen = []
    model.get_encoder().layers[0].fc1.register_forward_hook(lambda *_: seen.append(1))
    alike(model)
    assert len(seen) == 2


def test_attention_that_is_not_ours():
    model = build("pegasus")
    model.set_attn_implementation("sdpa")
    both(model, why="self_attn is sdpa, not int8", max_new_tokens=3)
    tensor = build("bart", DQConfig(weight_bits=4, act_granularity="per_tensor", attention="int8"))
    both(tensor, why="has one scale for all its keys (per_tensor)", max_new_tokens=3)
    assert "per_tensor" in decode.describe(tensor)


def test_parts_that_are_not_transformers(monkeypatch):
    model = build("bart")

    class Positions(torch.nn.Embedding):
        offset = 2

        def forward(self, input_ids, *args, position_ids=None, **kwargs):
            return super().forward(position_ids.unsqueeze(0) + 1)

    old = model.model.decoder.embed_positions
    model.model.decoder.embed_positions = Positions.from_pretrained(old.weight.data)
    both(model, why="its positions are a Positions", max_new_tokens=3)
    bart = transformers.models.bart.modeling_bart
    other = build("bart")
    forward = bart.BartDecoder.forward
    monkeypatch.setattr(bart.BartDecoder, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    both(other, why="the decoder has a forward of its own", max_new_tokens=3)
    t5 = transformers.models.t5.modeling_t5

    class Block(t5.T5Block):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    third = build("t5")
    third.decoder.block[1].__class__ = Block
    both(third, why="decoder.block.1 has a forward of its own", max_new_tokens=3)


def test_strict_models_are_passed_on():
    """No slow kernel behind the user's back: where only plain torch decodes, `strict` keeps transformers' loop."""
    from dqkernels import backends

    model = build("bart")
    models.attention.configure(model, "auto", True)
    try:
        slow = backends.choose("qattention_decode", "cpu", "auto", True, mode="per_token", head_dim=20, by_key=False)
    except backends.BackendError:
        slow = None
    with torch.no_grad():
        reason = next(engine.obstacles(model), None)
    if slow is None:
        assert "strict=True refuses" in reason
    else:
        assert reason is None
    models.attention.configure(model, "eager", True)
    both(model, max_new_tokens=3)


def test_what_is_reported():
    model = build("bart")
    assert decode.describe(model).startswith("own loop over static int8 caches, ") and decode.memory(model) == (0, 0)
    both(model, num_beams=2)
    found = report(model)
    layers, heads, head_dim = 1, 2, 20
    keys = 8 * 64 + 4 * 64
    assert found.cache_bytes == keys * layers * heads * 2 * (head_dim + 4)
    rows = 8
    (kept,) = engine.state_of(model).pool.idle()
    steps = sum(each.pool_bytes for _, each in kept.captured.values())
    assert found.workspace_bytes == rows * (8 + 4 + 4 + 4 + 4 + 4) + 8 + 4 * rows * 64 + steps
    assert "Decoding: own loop over static int8 caches, " in str(found)
    assert "Kept for the next calls of generate: caches 0.07 MB, workspace 0.0" in str(found)
    body = found.to_dict()
    assert body["cache_bytes"] == found.cache_bytes and body["decode"] == found.decode
    decode.free(model)
    assert decode.memory(model) == (0, 0)
    model.generate(**given(), max_new_tokens=2, use_cache=False)
    model.generate(**given(), max_new_tokens=2)
    told = decode.describe(model)
    assert told.endswith("; 1 of 3 calls went to Hugging Face's own loop (use_cache=False)")
