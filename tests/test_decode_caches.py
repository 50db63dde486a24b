"""Caches, steps and captured steps of the decode loop: what is shared, what is reused, what nothing may depend on."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from attention_models import peaked
from decode_models import CONFIG, MASK, SOURCES, VOCAB, alike, build, given, lively

from dqkernels import DQConfig, decode, models, quantize_
from dqkernels.decode import caches, engine, graphs, prepared, step
from dqkernels.kernels import native
from dqkernels.models import steps


def poison(model) -> int:
    """Fills every idle set of caches with rubbish; how many there were."""
    idle = engine.state_of(model).pool.idle()
    for each in idle:
        for cache in (*each.own, *each.cross):
            cache.k.fill_(127)
            cache.v.fill_(-127)
            cache.k_scale.fill_(float("nan"))
            cache.v_scale.fill_(float("inf"))
        each.ancestors.fill_(-7)
        for small in (each.tokens, each.position, each.positions, each.lengths, each.source_lengths):
            small.fill_(-7)
    return len(idle)


# ---- sets of caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_reuse_behind_longer_and_shorter_calls(family, beams):
    model = build(family)
    calls = [(9, 20), (3, 4), (9, 12), (5, 20)]
    inputs = {"attention_mask": MASK, "input_ids": SOURCES}
    for tokens, new in calls:
        some = {key: value[:, :tokens] for key, value in inputs.items()}
        alike(model, some, lively=False, max_new_tokens=new, num_beams=beams)
        assert poison(model) == 1, "one shape serves them all"
    prefix = {**inputs, "decoder_input_ids": SOURCES[:, :6]}
    alike(model, prefix, lively=False, max_new_tokens=5, num_beams=beams)
    assert poison(model) == 1


def test_sets_of_other_shapes():
    model = build("bart")
    for rows in (1, 2, 3, 4, 1):
        alike(model, given(rows), lively=False, max_new_tokens=4)
    idle = engine.state_of(model).pool.idle()
    assert [each.shape.rows for each in idle] == [2, 3, 4, 1] and len(idle) == caches.KEPT_SETS
    taken = idle[-1]
    alike(model, given(1), lively=False, max_new_tokens=4)
    assert engine.state_of(model).pool.idle()[-1] is taken
    decode.free(model)
    assert engine.state_of(model).pool.idle() == []


def shape(rows=2, capacity=64, sources=2):
    return caches.Shape(rows, sources, 1, 2, 20, capacity, 64, torch.device("cpu"))


def test_what_is_kept_is_bounded(monkeypatch):
    pool = caches.Pool()
    sets = [caches.Caches(shape(capacity=64 * i)) for i in (1, 2, 3)]
    monkeypatch.setattr(caches, "KEPT_BYTES", sets[0].cache_bytes() + 1)
    pool.give(sets[2])
    assert pool.idle() == [sets[2]], "the last one is kept, however large"
    pool.give(sets[0])
    assert pool.idle() == [sets[0]]
    pool.give(sets[1])
    assert pool.idle() == [sets[0], sets[1]]
    assert pool.take(sets[0].shape) is sets[0] and pool.idle() == [sets[1]]
    assert pool.take(sets[0].shape) is not sets[0]
    own = sets[2].own[0]
    counted = sum(t.numel() * t.element_size() for t in (own.k, own.k_scale, own.v, own.v_scale))
    cross = sets[2].cross[0]
    counted += sum(t.numel() * t.element_size() for t in (cross.k, cross.k_scale, cross.v, cross.v_scale))
    assert sets[2].cache_bytes() == counted


def test_buckets():
    assert [caches.bucket(n) for n in (0, 1, 64, 65, 1000, 1024, 1025, 2049)] == [
        64,
        64,
        64,
        128,
        1024,
        1024,
        1152,
        2304,
    ]
    sizes = [caches.bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert max(size / n for n, size in enumerate(sizes, 1) if n > 512) <= 1.125


def test_growing_keeps_what_was_written():
    made = caches.Caches(shape(rows=4, sources=2))
    made.own[0].k.copy_(torch.randint(-127, 128, made.own[0].k.shape))
    made.own[0].v_scale.copy_(torch.rand(made.own[0].v_scale.shape))
    made.ancestors.copy_(torch.randint(0, 4, made.ancestors.shape))
    before = made.own[0].k.clone(), made.own[0].v_scale.clone(), made.ancestors.clone()
    made.captured[True] = (), None
    made.grow(192)
    assert made.shape.capacity == 192 and made.captured == {}
    after = made.own[0].k[:, :, :64], made.own[0].v_scale[:, :, :64], made.ancestors[:, :64]
    assert all(map(torch.equal, before, after))


def test_a_failed_call_gives_its_caches_back():
    class Fails(torch.nn.Module):
        def __call__(self, input_ids, scores):
            raise KeyError("no")

    model = build("bart")
    with pytest.raises(KeyError):
        model.generate(**given(), max_new_tokens=4, logits_processor=_list(Fails()))
    assert len(engine.state_of(model).pool.idle()) == 1
    alike(model)


def _list(*processors):
    from transformers import LogitsProcessorList

    return LogitsProcessorList(processors)


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("beams", [1, 3])
def test_threads_share_a_model_and_no_cache(beams, count):
    """The calls meet in the middle: at every token all have taken their caches, and none is done."""
    model = build("mbart")
    orders = itertools.islice(itertools.permutations(range(4)), 0, None, 3)
    inputs = [{"input_ids": SOURCES[[*order]], "attention_mask": MASK[[*order]]} for order in orders][:count]
    options = {"max_new_tokens": 8, "num_beams": beams, "min_new_tokens": 8, "do_sample": False}
    alone = [model.generate(**each, **options) for each in inputs]
    assert len({str(each.tolist()) for each in alone}) == count
    meeting = threading.Barrier(count, timeout=120)

    class Meets:
        def __call__(self, input_ids, scores):
            meeting.wait()
            return scores

    found, errors = [None] * count, []

    def run(i):
        try:
            found[i] = model.generate(**inputs[i], **options, logits_processor=_list(Meets()))
        except BaseException as error:  # or the test waits for nothing
            meeting.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors, errors
    assert all(map(torch.equal, found, alone))
    assert len(engine.state_of(model).pool.idle()) == min(count, caches.KEPT_SETS)
    if native.native() is not None:
        said = decode.describe(model)
        assert "caches, a step in one native call;" in said and "by torch" not in said


# ---- rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5"])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_row_does_not_know_its_batch(family, beams):
    model = lively(family)
    options = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False}
    batch = model.generate(**given(), **options)
    end = model.generation_config.eos_token_id
    for row in range(4):
        tokens = int(MASK[row].sum())
        alone = model.generate(input_ids=SOURCES[row : row + 1, :tokens], **options)
        padded = torch.full((2, 14), 1)
        padded[:, :tokens] = SOURCES[row, :tokens]
        more = model.generate(
            input_ids=padded, attention_mask=(torch.arange(14) < tokens).long().repeat(2, 1), **options
        )
        for other in (alone, more):
            for mine in other.tolist():
                assert _until(mine, end) == _until(batch[row].tolist(), end)


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end, 1) + 1] if end in tokens[1:] else tokens


def running(model, beams: int, rows: int = 4):
    """A `Step` over caches in which the sources stand, as a call would have it."""
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=beams, num_return_sequences=1, max_length=20)
    with torch.no_grad():
        hidden = model.get_encoder()(SOURCES[:rows], attention_mask=MASK[:rows]).last_hidden_state
    inputs = {"encoder_outputs": (hidden.repeat_interleave(beams, 0),)}
    inputs["attention_mask"] = MASK[:rows].repeat_interleave(beams, 0)
    ids = torch.zeros(rows * beams, 1, dtype=torch.long)
    return engine.Running(model, ids, config, inputs, beams > 1)


@torch.no_grad()
def test_sources_are_stored_once_and_no_key_moves():
    model = build("bart")
    with running(model, 3) as run:
        made = run.caches
        assert (made.shape.rows, made.shape.sources) == (12, 4) and made.source.tolist() == [0] * 3 + [1] * 3 + [
            2
        ] * 3 + [3] * 3
        assert made.cross[0].k.shape[0] == 4
        torch.manual_seed(0)
        run.prefill(torch.zeros(12, 1, dtype=torch.long))
        written = []
        for position in range(1, 6):
            parents = torch.randint(0, 3, (4, 3)) + torch.arange(4).unsqueeze(1) * 3
            before = made.own[0].k.data_ptr(), made.own[0].k[:, :, :position].clone()
            run.reorder(parents.view(-1))
            run.step(torch.randint(5, VOCAB, (12,)), position)
            assert made.own[0].k.data_ptr() == before[0]
            assert torch.equal(made.own[0].k[:, :, :position], before[1]), "nothing that was written is touched"
            written.append(parents.view(-1))
        # The table says what following the parents back says.
        row = torch.arange(12)
        for position in range(5, -1, -1):
            assert torch.equal(made.ancestors[:, position].long(), row)
            if position:
                row = written[position - 1][row]


@torch.no_grad()
def test_beams_of_one_source_alone_are_shared():
    """What only looks like a repetition, and float projections, get a cache per row."""
    hidden = torch.randn(6, 5, 8)
    assert engine.sources_of(hidden.repeat_interleave(3, 0), None, 3) == 6
    assert engine.sources_of(hidden, None, 3) == 6 and engine.sources_of(hidden, None, 1) == 6
    mask = torch.ones(6, 5, dtype=torch.bool)
    same = hidden[:2].repeat_interleave(3, 0)
    assert engine.sources_of(same, mask, 3) == 2
    mask[1, 4] = False
    assert engine.sources_of(same, mask, 3) == 6
    mixed = build("bart", DQConfig(weight_bits=4, attention="int8", overrides={"encoder_attn.k_proj": {"skip": True}}))
    with running(mixed, 3) as run:
        assert run.caches.shape.sources == 12
    alike(mixed, num_beams=3)


@torch.no_grad()
def test_any_mask_becomes_a_length():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    order, lengths = step.visible_first(mask)
    assert lengths.tolist() == [2, 2, 0, 4] and lengths.dtype == torch.int32
    assert order[1].tolist() == [1, 3, 0, 2] and order[3].tolist() == [0, 1, 2, 3]
    assert step.visible_first(mask[[0, 2, 3]])[0] is None


# ---- prepared steps -------------------------------------------------------------------------------------------

KINDS = {
    "W4": DQConfig(weight_bits=4),
    "W2 clip": DQConfig(weight_bits=2, act_clip=2.5, weight_quantizer="four_level", group_size=32),
    "per tensor": DQConfig(weight_bits=8, act_granularity="per_tensor"),
    "mixed": DQConfig(weight_bits=4, overrides={"v_proj|fc1": {"weight_bits": 8}, "k_proj|fc2": {"skip": True}}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prepared_steps_are_those_of_the_blocks(kind, dtype):
    model = quantize_(peaked("bart").to(dtype), KINDS[kind])
    layer = model.model.decoder.layers[0]
    own, norm = layer.self_attn, layer.self_attn_layer_norm
    linears = (own.q_proj, own.k_proj, own.v_proj)
    x = torch.randn(3, 2, 40, dtype=dtype)
    for given_ in (norm, None, torch.nn.LayerNorm(40, elementwise_affine=False)):
        for activation in (None, layer.activation_fn, torch.nn.SiLU()):
            for some in (linears, linears[:1]):
                normed, found = prepared.projection(some, given_, activation)(x)
                wanted, outputs = steps.project(x, some, given_, activation)
                assert torch.equal(normed, wanted) and all(map(torch.equal, found, outputs))
    for linear, base in ((own.out_proj, x), (layer.fc2, x), (own.out_proj, None)):
        y = torch.randn(3, 2, linear.in_features, dtype=dtype)
        assert torch.equal(prepared.onto(linear)(y, base), steps.project_onto(y, linear, base))


# ---- captured steps -------------------------------------------------------------------------------------------


class Counted(graphs.Repeated):
    """How often a step was captured, and replayed."""

    made, replayed = 0, 0

    def __init__(self, body, device):
        Counted.made += 1
        super().__init__(body, device)

    def replay(self):
        Counted.replayed += 1
        return super().replay()


@pytest.fixture
def captured(monkeypatch):
    """Lets every model on the CPU replay steps over the same tensors, as a graph would."""
    Counted.made = Counted.replayed = 0

    def replays(self, model, decoder, is_beams, most):
        weights = graphs.weights_of(model)
        return graphs.GraphStep(decoder, self.caches, is_beams, most, weights, self._refused, Counted)

    monkeypatch.setattr(engine.Running, "_step", replays)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("family", ["bart", "pegasus", "t5"])
def test_steps_over_the_same_tensors(family, options, captured):
    model = build(family)
    tokens = alike(model, max_new_tokens=12, **options)
    assert Counted.made == 1 and Counted.replayed >= tokens.shape[1] - 1
    assert poison(model) == 1
    prefix = {**given(), "decoder_input_ids": SOURCES[:, :5]}
    alike(model, prefix, max_new_tokens=6, **options)
    assert Counted.made == 1, "later calls, at other positions, replay the same one"
    with torch.no_grad():
        model.lm_head.weight_scale.mul_(1.5)
    alike(model, max_new_tokens=4, lively=False, **options)
    assert Counted.made == 2, "over other weights it is captured anew"


def test_room_is_made_for_captured_steps(captured, monkeypatch):
    monkeypatch.setattr(caches, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(caches, "STEP", 4)
    alike(build("bart"), max_new_tokens=26, num_beams=2)
    assert Counted.made > 1


def test_a_refused_capture_is_told(captured, monkeypatch, caplog):
    def refuse(self, body, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Counted, "__init__", refuse)
    model = build("marian")
    alike(model)
    assert engine.state_of(model).refused == "no CUDA graph: operation not permitted when stream is capturing"
    assert "decode steps are launched one by one" in caplog.text


# ---- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bart", "pegasus", "t5"])
def test_graphs_on_a_gpu(family, dtype, options):
    """One graph serves all positions and later calls; tokens are transformers' own, and those without a graph."""
    model = build(family, CONFIG, dtype).to("cuda")
    inputs = {key: value.cuda() for key, value in given().items()}
    tokens = alike(model, inputs, max_new_tokens=12, **options)
    (kept,) = engine.state_of(model).pool.idle()
    assert engine.state_of(model).refused == "" and list(kept.captured) == ["num_beams" in options]
    graph = kept.captured["num_beams" in options][1]
    assert poison(model) == 1
    prefix = {**inputs, "decoder_input_ids": SOURCES[:, :5].cuda()}
    alike(model, prefix, max_new_tokens=6, **options)
    assert kept.captured["num_beams" in options][1] is graph
    assert "steps in CUDA graphs" in decode.describe(model) and decode.memory(model)[1] >= graph.pool_bytes
    torch.manual_seed(0)
    again = decode.attach(model, graphs=False).generate(**inputs, max_new_tokens=12, **{"do_sample": False, **options})
    assert torch.equal(again, tokens) and "no CUDA graphs" in decode.describe(model)
    models.unpatch(model) if family != "t5" else None
