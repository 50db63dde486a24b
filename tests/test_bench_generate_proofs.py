"""What a candidate of `bench generate` owes before it is timed, our own decoding loop and other projects among them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from generate_cases import (  # noqa: F401 - few_rounds is for every test here
    CELL,
    CPU,
    CUDA,
    SHAPES,
    T5,
    a_lineup,
    a_work,
    assert_fits,
    few_rounds,
    judged,
    of,
    run,
    text_of,
)

from dqkernels import backends
from dqkernels.bench import generate, peers, size
from dqkernels.bench import generate_candidates as ours
from dqkernels.bench import generate_cells as cells
from dqkernels.bench import generate_lineup as lineups
from dqkernels.bench import generate_proofs as proofs
from dqkernels.bench.generate_cells import Cell
from dqkernels.bench.peers import ctranslate2
from dqkernels.models import attention

# ------------------------------------------------------------------------------------------ proofs


class Spoiled(ours.Transformers):
    """A float model whose results are changed on the way out."""

    def __init__(self, model, change):
        super().__init__("spoiled", "torch", model, ours.BOUNDS["fp32"], 32, 32)
        self.change = change

    def logits(self, inputs, new_tokens):
        return self.change(*super().logits(inputs, new_tokens))


def one_logit(tokens, logits):
    logits[1, 2, 100] += logits.std()
    return tokens, logits


def not_a_number(tokens, logits):
    logits[0, 0, 5] = float("nan")
    return tokens, logits


def masked(tokens, logits):
    logits[..., 2] = -3.4e38
    return tokens, logits


def all_masked(tokens, logits):
    logits[..., : logits.shape[-1] // 2] = float("-inf")
    return tokens, logits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokens, logits: (tokens, logits), None),
        (masked, None),
        (one_logit, "logits differ from the reference's by"),
        (lambda tokens, logits: (tokens, logits * 1.01), "logits differ from the reference's by 0.01, allowed 0.001"),
        (lambda tokens, logits: (tokens, logits[:, [0, 0, 1]]), "logits differ"),
        (not_a_number, "logits are not finite"),
        (all_masked, "logits are not finite"),
        (lambda tokens, logits: (tokens, logits[..., 1:]), "logits have shape"),
        (lambda tokens, logits: (tokens[:, :2], logits[:, :2]), "generated 2 new tokens, wanted 3"),
        (lambda tokens, logits: (tokens, None), None),
        (lambda tokens, logits: (tokens.flip(0), None), "deviations of the logits below the reference's best"),
        (lambda tokens, logits: (torch.full_like(tokens, 7), None), "deviations of the logits below"),
    ],
)
def test_a_candidate_that_computes_something_else_is_refused(change, words):
    lineup = a_lineup()
    found = judged(Spoiled(lineup.float32, change), lineup)
    assert found is None if words is None else words in found


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "int8", "4 bit"])
def test_other_weights_are_refused_whatever_the_bound(kind):
    lineup = a_lineup()
    other = ours.set_generation(size.random_model(size.SHAPES["tiny"].with_layers(1, 1), seed=1))
    one = ours.Transformers("other", "torch", other, ours.BOUNDS[kind], 32, 32)
    assert "logits differ from the reference's" in judged(one, lineup)


def test_the_best_logit_decides_where_the_end_is_not_allowed():
    wanted = torch.zeros(1, 2, 8, dtype=torch.float64)
    wanted[..., 3], wanted[..., 5] = 9.0, 8.0
    assert proofs.margin(torch.tensor([[3, 3]]), wanted, None) is None
    assert proofs.margin(torch.tensor([[5, 5]]), wanted, end=3) is None
    assert "deviations" in proofs.margin(torch.tensor([[5, 1]]), wanted, end=3)


def test_ours_is_refused_where_it_is_not_eager(monkeypatch):
    """And never timed; the float model beside it is."""
    from dqkernels.nn import QLinear

    honest = QLinear.forward

    def dishonest(self, input):
        y = honest(self, input)
        return y if self.backend == "eager" else y + 0.5

    monkeypatch.setattr(QLinear, "forward", dishonest)
    made = run()
    (row,) = of(made, "dqkernels 4-4-8 plain")
    assert row["status"] == "refused" and "logits differ from the reference's" in row["reason"]
    assert "latency_ms" not in row and of(made, "torch fp32")[0]["status"] == "timed"
    assert "refused: 4-4-8 plain: logits differ" in assert_fits(made).replace("\n", " ")


@pytest.mark.parametrize(
    ("family", "shape"),
    [("plain", size.SHAPES["tiny"]), ("plain", T5), ("ours", T5)],
    ids=["plain", "plain-t5", "ours"],
)
def test_attention_that_is_not_eagers_is_refused(monkeypatch, family, shape):
    """The reference runs eager attention, not the kernel that is to be proven; behind it all is as it was.

    Our own loop calls this op in the encoder alone, whose attention moves little in the smallest BART.
    """
    facts = {"mode": "per_token", "head_dim": 16}
    if backends.choose("qattention", "cpu", "auto", False, **facts).backend != "cpu":
        pytest.skip("the compiled core is absent: attention is eager anyway")
    lineup = a_lineup(("torch", family), shape=shape.with_layers(2, 2), attention="int8")
    one = {name: get for name, get in lineup.candidates()}[f"dqkernels 4-4-8{' plain' * (family == 'plain')}"]()
    first = next(module for module in one.model.modules() if attention.in_use(module) is not None)
    attention.configure(one.model, "auto", True)
    attention.configure(first, "cpu", False)
    before = [attention.in_use(module) for module in one.model.modules()]
    assert judged(one, lineup) is None
    monkeypatch.setattr(backends.cpu, "qattention", lambda q, *_, **__: torch.zeros_like(q))
    assert "logits differ from the reference's" in judged(one, lineup)
    after = [attention.in_use(module) for module in one.model.modules()]
    assert all(now is was for now, was in zip(after, before, strict=True))


def test_what_raises_is_refused_if_it_is_ours_and_not_compared_if_it_is_not(monkeypatch):
    lineup = a_lineup()
    one = Spoiled(lineup.float32, lambda tokens, logits: 1 / 0)
    assert generate._prepare(one, a_work(lineup), lineup.inputs(CELL))["status"] == "refused"
    one.foreign = True
    row = generate._prepare(one, a_work(lineup), lineup.inputs(CELL))
    assert row["status"] == "not compared" and row["reason"].startswith("ZeroDivisionError")

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(one, "logits", exhausted)
    assert generate._prepare(one, a_work(lineup), lineup.inputs(CELL))["status"] == "out of memory"


def test_less_work_than_asked_for_is_refused():
    lineup = a_lineup()

    class Lazy(ours.Transformers):
        def tokens(self, result):
            return result[:, 1:3] if result.shape[0] == 2 and result.shape[1] == 4 else result[:, 1:]

        def logits(self, inputs, new_tokens):
            found = self._generate(inputs, new_tokens, 1, return_dict_in_generate=True, output_logits=True)
            return found.sequences[:, 1:], torch.stack(found.logits, dim=1)

    one = Lazy("lazy", "torch", lineup.float32, ours.BOUNDS["fp32"], 32, 32)
    row = generate._prepare(one, a_work(lineup), lineup.inputs(CELL))
    assert row["status"] == "refused" and row["reason"] == "generated tokens [2, 2], wanted [2, 3]"


# ------------------------------------------------------------------------------------------- the engine


class StandIn(ours.Plain):
    """For an engine: its reference is the float model's own."""

    def reference(self, inputs, tokens):
        return ours.teacher_forced(self.model, inputs, tokens)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_search_is_its_twins_or_as_good(beams):
    lineup = a_lineup(shape=size.SHAPES["tiny"])
    one = StandIn("one", "ours", lineup.float32, 1.0, 32, 32)
    inputs = lineup.inputs(Cell("2-2", 3, beams, 7, 6))
    wanted = one.tokens(one.bind(inputs, 6, beams)())
    assert proofs.search(one, inputs, beams, wanted, wanted) == (None, 1.0)
    worse = wanted.clone()
    worse[1, 3:] = (worse[1, 3:] + 1) % 500 + 4
    reason, share = proofs.search(one, inputs, beams, worse, wanted)
    assert reason.startswith("17% of the tokens are not those of Hugging Face's loop") and share == pytest.approx(
        5 / 6, 1e-3
    )
    assert "gives tokens [3, 5]" in proofs.search(one, inputs, beams, wanted[:, 1:], wanted)[0]
    if beams > 1:
        # Greedy tokens are no beam search's, and what a search finds may be as good as its twin's.
        greedy = one.tokens(one.bind(inputs, 6, 1)())
        assert not torch.equal(greedy, wanted)
        assert "per token less probable" in proofs.search(one, inputs, beams, greedy, wanted)[0]
        assert proofs.search(one, inputs, beams, wanted, greedy)[0] is None


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("preset", ["tiny", "t5"])
def test_our_own_loop_is_proven_and_timed(monkeypatch, preset, beams):
    monkeypatch.setitem(cells.SHAPES, "t5", T5)
    made = run(preset, candidates=["torch", "plain", "ours"], num_beams=[beams])
    float32, plain, engine = (of(made, name)[0] for name in ("torch fp32", "dqkernels 4-4-8 plain", "dqkernels 4-4-8"))
    assert engine["status"] == "timed" and engine["equal_tokens_fraction"] == 1 and engine["logits_error"] < 0.05
    assert engine["kernel"].startswith("decode engine; ") and plain["weights_bytes"] == engine["weights_bytes"]
    # Int8 and a scale of 4 bytes per 16 elements where float has 4 bytes each; a source's keys once for all its beams.
    own, source = engine["cache_bytes"], float32["cache_bytes"]
    assert 0 < own < source * 20 / 64 * 32, (own, source)  # rooms of 32 keys at least, of which 3 and 7 are used
    assert "tokens of our loop: those of Hugging Face's, every one." in assert_fits(made).replace("\n", " ")


def test_work_that_our_loop_hands_on_is_not_taken_for_its_own():
    made = run(candidates=["torch", "plain", "ours"], attention="float")
    (row,) = of(made, "dqkernels 4-4-8")
    assert row["status"] == "not supported" and row["reason"].startswith("Hugging Face's loop ran it: "), row
    assert of(made, "dqkernels 4-4-8 plain")[0]["status"] == "timed"


def test_a_loop_that_writes_other_texts_is_refused(monkeypatch):
    """Its logits may be right and its search wrong: beams that are not reordered."""
    from dqkernels.decode import step

    monkeypatch.setattr(step.Step, "reorder", lambda self, *_: None)
    made = run(candidates=["torch", "plain", "ours"], num_beams=[4], new_tokens=[8], layers=["2-2"])
    (row,) = of(made, "dqkernels 4-4-8")
    assert row["status"] == "refused" and "are not those of Hugging Face's loop" in row["reason"], row
    assert "latency_ms" not in row


def test_a_model_that_cannot_be_packed_is_a_reason_and_no_crash(monkeypatch):
    def none(*_):
        raise ValueError("head_dim must be at most 128")

    monkeypatch.setattr(ours, "packed", none)
    made = run(candidates=["torch", "ours"])
    (row,) = of(made, "dqkernels 4-4-8")
    assert row["status"] == "not compared" and row["reason"] == "there is no packed model: head_dim must be at most 128"
    assert of(made, "torch fp32")[0]["status"] == "timed"


# -------------------------------------------------------------------------------------------- peers


def test_the_memory_of_ctranslate2_is_not_known():
    """On a CPU it grew when it was proven, and keeps that: the call that is looked at would take nothing."""
    lineup = a_lineup()
    peaks = []
    for family in ("torch", "ctranslate2"):
        one = ours.Transformers(family, family, lineup.float32, ours.BOUNDS["fp32"], 32, 32)
        peaks.append(generate._prepare(one, a_work(lineup), lineup.inputs(CELL))["peak_bytes"])
    assert peaks[1] is None


def test_torchs_dynamic_int8_is_proven_and_weighed():
    lineup = a_lineup(("torch", "dynamic"))
    one = peers.generate("dynamic", "torch dynamic int8", lineup.float32, torch.float32, CPU)
    assert judged(one, lineup) is None
    counts = size.counts(size.SHAPES["tiny"].with_layers(1, 1))
    # Codes of the linears and of a head that is tied no more, an embedding and the rest in float32.
    codes = counts.linear + counts.embedding
    rest = 4 * (counts.embedding + counts.bias + counts.layernorm + counts.positions + counts.logits_bias)
    assert one.weights_bytes() == codes + rest
    with pytest.raises(peers.NotCompared, match="CPU only"):
        peers.generate("dynamic", "torch dynamic int8", lineup.float32, torch.float32, CUDA)


def test_another_version_of_a_peer_is_a_reason_and_no_crash(monkeypatch):
    def adapter(*_):
        raise TypeError("unexpected keyword argument 'x'\nand more")

    changed = dataclasses.replace(peers.PEERS["bitsandbytes"], generate=lambda device: {"bitsandbytes int8": adapter})
    monkeypatch.setitem(peers.PEERS, "bitsandbytes", changed)
    made = run(candidates=["bitsandbytes"])
    (row,) = of(made, "bitsandbytes int8")
    assert row["status"] == "not compared" and row["reason"] == "TypeError: unexpected keyword argument 'x'"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize(
    "name",
    [
        "ctranslate2 fp32",
        "ctranslate2 int8",
        "bitsandbytes int8",
        "bitsandbytes nf4",
        "torchao int8 dynamic",
        "torchao int8 weights",
        "onnxruntime fp32",
        "onnxruntime int8",
    ],
)
def test_peers_compute_the_same_function_and_leave_the_model_alone(name, shape):
    """CTranslate2's converter once scaled the weights of the model that all other candidates were copies of."""
    family = name.partition(" ")[0]
    pytest.importorskip(family, reason=f"{family} is not installed")
    if family == "onnxruntime":
        pytest.importorskip("onnx", reason="onnx is not installed")
    lineup = a_lineup((family,), shape)
    if family == "onnxruntime" and shape is T5:
        with pytest.raises(peers.NotCompared, match="takes bart and mbart"):
            peers.generate(family, name, lineup.float32, torch.float32, CPU)
        return
    before = {key: tensor.clone() for key, tensor in lineup.float32.state_dict().items()}
    one = peers.generate(family, name, lineup.float32, torch.float32, CPU)
    assert judged(one, lineup) is None
    # Two graphs of ONNX Runtime, each with a table of its own, and small ones are names as much as numbers.
    more = 1.6 if family == "onnxruntime" else 1.05
    assert one.foreign and 0 < one.weights_bytes() < more * size.weights_bytes(lineup.float32)
    beams = 1 if family == "onnxruntime" else 3
    row = generate._prepare(one, a_work(lineup, cell=Cell("1-1", 2, beams, 7, 3)), lineup.inputs(CELL))
    assert row["status"] == "timed", row
    assert all(torch.equal(before[key], tensor) for key, tensor in lineup.float32.state_dict().items())


def test_names_of_ctranslate2_go_there_and_back():
    for shape in SHAPES:
        names = ctranslate2.Names(shape.hf_config())
        assert len(set(names.names)) == 512 and {"<pad>", "</s>", "<unk>"} <= set(names.names)
        ids = torch.arange(512).reshape(4, 128)
        assert torch.equal(names.numbers(names.words(ids)), ids)
        assert names.names.index("</s>") == shape.hf_config().eos_token_id
        assert names.names[names.unk_token_id] == "<unk>"


def test_float_candidates_by_device():
    def names(device, **more):
        return [name for name, _ in a_lineup(lineups.FAMILIES, device=device, **more).candidates()]

    on_cpu, on_gpu = names(CPU), names(CUDA, dtype=torch.float16)
    assert on_cpu[0] == "torch fp32" and on_cpu[-1] == "torch bf16" and "torch fp16" not in on_cpu
    assert on_gpu[:3] == ["torch fp16", "dqkernels 4-4-8 plain", "dqkernels 4-4-8"]
    assert on_gpu[-2:] == ["torch bf16", "torch fp32"] and "ctranslate2 int8_fp16" in on_gpu
    assert "torch fp16 compiled" in on_gpu and "torch fp16 static" in on_gpu


def test_a_cpu_compiles_only_when_it_is_told_to(monkeypatch):
    monkeypatch.setattr(generate, "measure", lambda work: [{**work.cell.row(), "candidate": "a", "status": "refused"}])
    assert "compile" not in run(candidates=None)["settings"]["candidates"]
    assert run(candidates=["compile", "torch"])["settings"]["candidates"] == ["torch", "compile"]


def test_beams_are_not_compiled():
    one = ours.Compiled("compiled", a_lineup().float32, 1.0, 32, CPU)
    assert one.cannot(CELL) is None
    assert one.cannot(Cell("1-1", 1, 2, 7, 3)) == "transformers compiles no beam search"
    row = generate._prepare(one, a_work(a_lineup(), cell=Cell("1-1", 1, 2, 7, 3)), {})
    assert row["status"] == "not supported"


def test_a_static_cache_is_not_as_long_as_that_of_longer_work_before():
    lineup = a_lineup()
    one = ours.static("static", lineup.float32, 1.0, 32)
    inputs = lineup.inputs(CELL)
    few = one.cache_bytes(inputs, 3, 1)
    assert one.cache_bytes(inputs, 20, 1) > few
    one.free()
    assert one.cache_bytes(inputs, 3, 1) == few


def test_a_slow_candidate_is_given_up_by_name_but_none_like_the_float_model():
    lineup = a_lineup(("torch", "plain"))
    work = a_work(lineup, deadline=1e12, must=True, seconds=1e-9)
    rows = {name: {"status": "timed"} for name in ("torch fp32", "b", "c")}
    work.call_s = {"torch fp32": 50.0, "b": 200.0, "c": 300.0}
    work.deadline = 0.0

    def call(took):
        return lambda: None if took < 250 else work.call_s.update(c=300.0)

    calls = {(name, "all"): call(took) for name, took in work.call_s.items()}
    # The second look takes no time here, so that none is too slow; with the first one's time, one is.
    generate._time(dict(rows), calls, work)
    assert all(row["status"] == "timed" for row in rows.values())
    work.call_s = {"torch fp32": 50.0, "b": 200.0, "c": 300.0}
    sampled = generate.protocol.wall_sampler
    try:
        generate.protocol.wall_sampler = lambda call, device: generate.protocol.Sampler(lambda: 300.0, "test")
        generate._time(rows, calls, work)
    finally:
        generate.protocol.wall_sampler = sampled
    assert [row["status"] for row in rows.values()] == ["timed", "timed", "too slow"]
    assert rows["c"]["reason"].startswith("one call takes 3e+02 s of")
