"""The hypotheses of the compiled core are those of plain torch, bit by bit, and say so where they are not made."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decode_models import alike, build, given
from transformers import EosTokenCriteria, LogitsProcessor, MaxLengthCriteria, StoppingCriteriaList

from dqkernels import decode, report
from dqkernels.decode import beams, native_hypotheses
from dqkernels.decode.hypotheses import Hypotheses, Rules
from dqkernels.decode.native_hypotheses import NativeHypotheses
from dqkernels.decode.stopping import Stop
from dqkernels.kernels import native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")

RULES = Rules(beams=3, kept=6, most=14, filling=1, early=False, penalty=1.0, samples=False, tracks=True)
MINE = ("running", "came_from", "finished", "finished_from")
BOTH = ("scores", "finished_scores", "finished_lengths", "is_finished")


def stop_of(most: int, ends=(2,)) -> Stop:
    return Stop(StoppingCriteriaList([MaxLengthCriteria(most), *([EosTokenCriteria(list(ends))] if ends else [])]))


def assert_same(found: NativeHypotheses, wanted: Hypotheses) -> None:
    ours, length = found.found, wanted.length
    assert found.length == length and found.ended == wanted.ended
    for name in BOTH:
        mine, theirs = getattr(ours, name), getattr(wanted, name)
        assert (
            torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
            if mine.is_floating_point()
            else (torch.equal(mine, theirs))
        ), name
    assert torch.equal(ours.improvable, wanted.improvable.squeeze(1))
    assert torch.equal(found.rows(), wanted.rows()) and torch.equal(ours.finished, wanted.finished)
    if wanted.came_from is not None:
        assert torch.equal(ours.came_from[:, :, : length - wanted.start].long(), wanted.came_from)
        assert torch.equal(ours.finished_from.long(), wanted.finished_from)


def scores_of(kind: str, rows: int, n: int, g: torch.Generator) -> torch.Tensor:
    if kind == "lively":
        scores = torch.randn(rows, n, generator=g)
        scores[:, 2] += 1.5  # an end of sequence now and then
        return torch.log_softmax(scores, -1)
    scores = -torch.randint(0, 3, (rows, n), generator=g).float()  # ties nearly everywhere
    if kind == "forbidden":
        scores[torch.rand(rows, n, generator=g) < 0.97] = -torch.inf
    if kind == "broken":
        scores[torch.rand(rows, n, generator=g) < 0.02] = torch.nan
    return scores


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("kind", ["lively", "ties", "forbidden", "broken"])
def test_every_step_is_that_of_torch(kind, early):
    """Rows that torch sorts whole and those of which it keeps a heap, few beams and many, every penalty."""
    ended = steps = 0
    for seed, (count, n, penalty, ends) in enumerate(
        (count, n, penalty, ends)
        for count in (1, 2, 3, 5)
        for n in (40, 700)
        for penalty, ends in ((1.0, (2,)), (-1.5, (2,)), (2, (2, 7, 11)), (0.6, ()), (0.0, (2,)))
    ):
        g = torch.Generator().manual_seed(seed)
        kept = max(2, 1 + len(ends)) * count
        rules = dataclasses.replace(RULES, beams=count, kept=kept, early=early, penalty=penalty, tracks=seed % 3 > 0)
        ids = torch.randint(3, 9, (2, 1, 3), generator=g).expand(2, count, 3).reshape(-1, 3)
        stop = stop_of(14, ends)
        assert not native_hypotheses.why_not_this(ids, torch.zeros(1), rules, stop)
        found, wanted = NativeHypotheses(ids, rules, stop), Hypotheses(ids, rules, stop)
        while not wanted.ended:
            scores = scores_of(kind, 2 * count, n, g)
            got = [each.clone() for each in found.extend(scores, None)]
            assert all(map(torch.equal, got, wanted.extend(scores, None)))
            assert_same(found, wanted)
            steps += 1
        ended += wanted.length < 14
        for one in range(1, count + 1):
            for mine, theirs in zip(found.best(one), wanted.best(one), strict=True):
                assert mine is None and theirs is None or torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    assert steps > 40 and (ended or kind != "lively"), "some end before the limit"


def test_criteria_of_the_callers_read_what_is_written():
    seen = []

    class Sums(EosTokenCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen[-1].append(input_ids.clone())
            return input_ids.sum(dim=1) % 3 == 0

    ids, g = torch.full((6, 2), 4), torch.Generator().manual_seed(3)
    stop = Stop(StoppingCriteriaList([MaxLengthCriteria(9), Sums([2])]))
    assert not stop.simple
    rules = dataclasses.replace(RULES, most=9)
    every = [torch.log_softmax(torch.randn(6, 50, generator=g), -1) for _ in range(7)]
    for kind in (Hypotheses, NativeHypotheses):
        seen.append([])
        one = kind(ids, rules, stop)
        for scores in every:
            one.extend(scores, None)
            if one.ended:
                break
    assert len(seen[0]) == len(seen[1]) > 2 and all(map(torch.equal, *seen))


def test_what_is_not_served():
    ids, scores = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 9)
    stop = stop_of(14)
    assert not native_hypotheses.why_not_this(ids, scores, RULES, stop)
    assert native_hypotheses.why_not_this(ids, scores.double(), RULES, stop)
    whole = dataclasses.replace(RULES, penalty=30)
    assert native_hypotheses.why_not_this(ids, scores, whole, stop) == "length_penalty is 30", "14**30 is no float"
    assert not native_hypotheses.why_not_this(ids, scores, dataclasses.replace(RULES, penalty=30.0), stop)
    assert native_hypotheses.why_not_this(ids, scores, RULES, stop_of(15)), "longer than a hypothesis may be"
    assert native_hypotheses.why_not_this(ids, scores, RULES, Stop(StoppingCriteriaList([EosTokenCriteria(2)])))
    assert native_hypotheses.why_not_this(torch.zeros(3, 14), scores, RULES, stop)


class Doubles(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.double()


class Keeps(LogitsProcessor):
    """Remembers what it was given and what it returned."""

    def __init__(self):
        self.kept = []

    def __call__(self, input_ids, scores):
        out = scores - 1
        self.kept += [(scores, scores.clone()), (out, out.clone())]
        return out


def test_who_keeps_the_beams(monkeypatch):
    """The core does where it can; tokens are transformers' either way, in long rows and short ones."""
    made, real = [], beams._hypotheses
    monkeypatch.setattr(beams, "_hypotheses", lambda *given: made.append(type(real(*given))) or real(*given))
    model = build("bart")
    alike(model, num_beams=4)
    assert made == [NativeHypotheses] and "by torch" not in decode.describe(model)
    alike(model, num_beams=2, logits_processor=[Doubles()], lively=False)
    assert "; beams of the last call by torch: a processor made the scores float64" in decode.describe(model)
    monkeypatch.setattr(native_hypotheses, "why_not", lambda: "not now")
    alike(model, num_beams=4)
    assert made[1:] == [Hypotheses, Hypotheses] and decode.describe(model).endswith(", beams by torch (not now)")


PROCESSORS = {
    "summaries": {"no_repeat_ngram_size": 3, "min_length": 8, "forced_bos_token_id": 17, "forced_eos_token_id": 2},
    "new": {"min_new_tokens": 7, "no_repeat_ngram_size": 1, "eos_token_id": [2, 5]},
    "outside": {"repetition_penalty": 1.4, "min_length": 7, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("what", PROCESSORS)
def test_processors_in_place(what):
    """As transformers' own, in tokens and scores; those that are called themselves are named."""
    from decode_models import both

    model = build("marian")
    asked = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3, "max_new_tokens": 12}
    theirs, ours = both(model, given(), **asked, **PROCESSORS[what])
    assert torch.equal(theirs.sequences, ours.sequences) and all(map(torch.equal, theirs.scores, ours.scores))
    assert any(each.isneginf().any() for each in ours.scores), "they have something to say"
    text = " ".join(str(report(model)).split())
    assert ("RepetitionPenaltyLogitsProcessor" in text) == (what == "outside") and "NoRepeat" not in text


def test_minimal_lengths_are_taken_together():
    """Each with its own ends of sequence, and as long as it speaks up."""
    from transformers.generation import logits_process

    from dqkernels.decode.processing import Processing

    lengths = logits_process.MinLengthLogitsProcessor(5, [2]), logits_process.MinLengthLogitsProcessor(3, [1, 2])
    new = logits_process.MinNewTokensLengthLogitsProcessor(1, 6, [4, 90])
    asked = logits_process.LogitsProcessorList([*lengths, new])
    process, found = Processing(asked), []
    for length in range(1, 9):
        ids, scores = torch.zeros(2, length, dtype=torch.int64), torch.randn(2, 9)
        want = asked(ids, scores.clone())
        double = scores.double()  # no step of our own takes those: each processor is called
        assert torch.equal(process(length, lambda ids=ids: ids, scores), want)
        assert torch.equal(process(length, lambda ids=ids: ids, double), asked(ids, double.clone()))
        found.append(int(want.isneginf().sum()))
    assert found == [6, 6, 4, 4, 2, 2, 0, 0]


def test_what_a_processor_keeps_is_its_own():
    """Those in place write nothing that a user's processor was given, or gave."""
    from transformers.generation.logits_process import LogitsProcessorList, MinLengthLogitsProcessor

    from dqkernels.decode.processing import Processing

    keeps = Keeps()
    process = Processing(LogitsProcessorList([keeps, MinLengthLogitsProcessor(9, 2)]))
    assert process.outside == ("Keeps",)
    scores = process(3, lambda: torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 5))
    assert scores[:, 2].isneginf().all() and all(torch.equal(*pair) for pair in keeps.kept)
    keeps = Keeps()
    alike(build("bart"), num_beams=2, logits_processor=[keeps])
    assert len(keeps.kept) > 8 and all(torch.equal(*pair) for pair in keeps.kept), "nor does a later step"

    class Mine(MinLengthLogitsProcessor):
        """Of the same name's sake not known."""

        def __call__(self, input_ids, scores):
            return scores + 1

    process = Processing(LogitsProcessorList([Mine(9, 2)]))
    assert process.outside == ("Mine",) and (process(3, lambda: None, torch.zeros(2, 5)) == 1).all()
