"""How `dqkernels tune` finds the fastest of many ways to launch one GEMM: each has to give the rule's bits first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from dqkernels.bench import protocol, record

MAX_ROUNDS = 60
#: A choice replaces the rule's only where it is faster by more than the noise of a median.
GAIN = 1.02
_FINALISTS = 6


@dataclass
class Race:
    """What came out: the choice taken, statistics by finalist, and who was left out.

    Attributes:
        best: the fastest, or the rule's where that is as good; never a rival.
        stats: by finalist, the rule and the rivals that computed the same included.
        count: choices that gave the rule's bits where they were timed.
        mismatched: choices that gave other bits in any form, in words.
        refused: reasons of those that cannot run on this GPU.
    """

    best: Hashable
    stats: dict[Hashable, protocol.Stats]
    count: int
    mismatched: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def row(self, rule: Hashable) -> dict:
        """Of a record: the time of the best, the rule's beside it, and the proof."""
        return {
            **self.stats[self.best].row("us"),
            "rule_us": self.median_us(rule),
            "is_rule": self.best == rule,
            "candidates": self.count,
            "mismatched": self.mismatched,
            "refused": self.refused,
        }

    def median_us(self, choice: Hashable) -> float | None:
        return self.stats[choice].row("us")["median_us"] if choice in self.stats else None


def run(
    choices: Iterable[Hashable],
    rule: Hashable,
    call: Callable,
    forms: Sequence[dict],
    copies: Sequence[torch.Tensor],
    *,
    describe: Callable[[Hashable], str],
    device: torch.device,
    seconds: float,
    rivals: Sequence[Hashable] = (),
) -> Race:
    """Proves every choice against the rule's, then times them: one look at each, the best few by turns, weights cold.

    Args:
        choices: the rule's among them.
        call: `call(choice, **form)` gives a tensor or a list of them.
        forms: arguments of calls that differ in their epilogue or input. The first is timed; the choice serves all.
        copies: of the first form's `qweight`, for the rotation.
        describe: a choice in words.
        seconds: of timing.
        rivals: other kernels, timed beside the finalists. They prove the timed form alone: nothing else is theirs here.
    """
    timed, *others = forms
    wanted = _results(call, rule, timed)
    samplers, refused, mismatched = {}, {}, []
    for choice in [*choices, *rivals]:
        try:
            if not _same(_results(call, choice, timed), wanted):
                mismatched.append(describe(choice))
                continue
            calls = [functools.partial(call, choice, **{**timed, "qweight": copy}) for copy in copies]
            samplers[choice] = protocol.sampler(calls, device, weight_bytes=copies[0].numel()).sample
        except Exception as error:  # noqa: BLE001 - a choice that does not fit this GPU is refused, the others go on
            if choice == rule:
                raise
            refused[choice] = f"{type(error).__name__}: {error}"
    own = {choice: sample for choice, sample in samplers.items() if choice not in rivals}
    quick = protocol.interleave(own, seconds=seconds / 3, max_rounds=5, patience=float("inf"))
    order = sorted(quick.stats, key=lambda choice: quick.stats[choice].median)
    finalists = dict.fromkeys([rule, *order[:_FINALISTS]])
    # What is not timed must at least fit this GPU and be right.
    for form in others:
        wanted = _results(call, rule, form)
        for choice in [choice for choice in finalists if choice != rule]:
            try:
                if not _same(_results(call, choice, form), wanted):
                    mismatched.append(describe(choice))
                    del finalists[choice]
            except Exception as error:  # noqa: BLE001 - as above
                refused[choice] = f"{type(error).__name__}: {error}"
                del finalists[choice]
    final = protocol.interleave(
        {choice: samplers[choice] for choice in [*finalists, *(rival for rival in rivals if rival in samplers)]},
        seconds=seconds,
        max_rounds=MAX_ROUNDS,
        patience=float("inf"),
    )
    return Race(
        decide({choice: final.stats[choice].median for choice in finalists}, rule),
        final.stats,
        len(own),
        sorted(set(mismatched)),
        sorted({record.scrub(reason.splitlines()[0]) for reason in refused.values()}),
    )


def decide(times: dict[Hashable, float], rule: Hashable) -> Hashable:
    """The fastest, or the rule's own where that is not slower by more than `GAIN`."""
    best = min(times, key=times.__getitem__)
    return best if times[rule] > GAIN * times[best] else rule


def _results(call: Callable, choice: Hashable, form: dict) -> list[torch.Tensor]:
    found = call(choice, **form)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def _same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
