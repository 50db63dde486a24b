"""Checks of beam search in the compiled core, with the set of DQKERNELS_CPU: the bits and the order of torch's calls.

`python tests/cpu_beam_checks.py` runs all checks and prints what it counted. test_cpu_beams.py starts it as a program.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
from cpu_attention_checks import INF, NAN
from guarded import guarded_tensor
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from dqkernels.kernels import cpu_beams, native

CHECKS = {}
#: Around the blocks of 512 scores, the 16 that are looked at together, the tasks of 8192; rows that are sorted whole.
WIDTHS = (2, 17, 97, 300, 511, 512, 513, 1031, 8191, 8192, 8193, 20001)


def check(function):
    CHECKS[function.__name__] = function
    return function


def same(found, wanted, what):
    """Places, and values with their NaN."""
    (values, index), (want, at) = found, wanted
    assert torch.equal(index, at), (what, (index != at).nonzero().flatten().tolist()[:4])
    assert torch.equal(values.isnan(), want.isnan()) and torch.equal(values.nan_to_num(7), want.nan_to_num(7)), what


def row(n: int, g: torch.Generator, kind: int) -> torch.Tensor:
    """Numbers that are all different, few, mostly -inf, with NaN and infinities, rising, falling."""
    x = torch.randn(n, generator=g)
    if kind == 1:
        return torch.randint(-2, 2, (n,), generator=g).float()
    if kind == 2:
        x[torch.rand(n, generator=g) < 0.98] = -INF
    if kind == 3:
        x[torch.rand(n, generator=g) < 0.01], x[torch.rand(n, generator=g) < 0.01], x[n // 2] = INF, -INF, NAN
    return x.sort(descending=kind == 5)[0] if kind > 3 else x


@check
def the_order_of_topk():
    """Short and long rows, for which torch takes two algorithms, around the border between them."""
    done = 0
    for n, kind in itertools.product((1, 5, 63, 64, 65, 128, 511, 512, 513, 3000), range(6)):
        g = torch.Generator().manual_seed(n * 10 + kind)
        for k in {1, min(n, 2), min(n, 8), min(n, 17), max(1, n // 64), n}:
            x = row(n, g, kind)
            same(cpu_beams.top_k(x, k), torch.topk(x, k), f"{n} {k} {kind}")
            done += 1
    return done


def candidates(scores, running, kept, place=lambda t: t):
    """Values, and places in all beams of a source, of `beam_candidates`. place: puts an operand somewhere else."""
    (sources, beams), n = running.shape, scores.shape[-1]
    scores, running = place(scores.contiguous()), place(running)
    value, beam, token = (place(torch.zeros(sources, kept, dtype=t)) for t in (torch.float32, torch.int64, torch.int64))
    native.native().beam_candidates(
        scores=scores.data_ptr(), running=running.data_ptr(), sources=sources, beams=beams, n=n, kept=kept,
        value=value.data_ptr(), beam=beam.data_ptr(), token=token.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return value, beam * n + token


def by_torch(scores, running, kept):
    return torch.topk((scores.view(*running.shape, -1) + running.unsqueeze(2)).flatten(1), kept)


RUNNING = ((0.0, -1e9, -1e9), (-1.5, -2.25, -0.5), (-INF, 0.0, NAN), (INF, 3.0, -INF), (-1e9, -1e9, -1e9))


@check
def candidates_as_torch():
    done = 0
    for n, kind, kept in itertools.product(WIDTHS, range(6), (6, 24)):
        if kept > 3 * n:
            continue
        g = torch.Generator().manual_seed(n + kind)
        rows = torch.stack([row(n, g, kind) for _ in range(3 * len(RUNNING))])
        running = torch.tensor(RUNNING)
        same(candidates(rows, running, kept), by_torch(rows, running, kept), f"{n} {kind} {kept}")
        done += 1
    return done


@check
def threads_change_nothing():
    before = torch.get_num_threads()
    scores, running = torch.randn(8, 50265, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 4)
    wanted = by_torch(scores, running, 8)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            same(candidates(scores, running, 8), wanted, f"{count} threads")
    finally:
        torch.set_num_threads(before)
    return 3


@check
def repeats_as_transformers():
    done = 0
    for length, size, few in itertools.product((1, 2, 5, 30), (1, 2, 3, 4), (2, 9)):
        g = torch.Generator().manual_seed(length * size)
        tokens = torch.randint(0, few, (3, length), generator=g)
        wanted = NoRepeatNGramLogitsProcessor(size)(tokens, torch.randn(3, 11, generator=g.manual_seed(1)))
        got = torch.randn(3, 11, generator=g.manual_seed(1))
        cpu_beams.ban_repeats(tokens, size, got)
        assert torch.equal(got, wanted), f"{length} {size} {few}"
        wide = torch.cat([tokens, torch.full((3, 4), 1)], 1)  # what stands behind the length is not read
        again = torch.randn(3, 11, generator=g.manual_seed(1))
        cpu_beams.ban_repeats(wide[:, :length], size, again)
        assert torch.equal(again, wanted)
        done += int((wanted == -INF).any())
    beyond = torch.zeros(1, 4)
    cpu_beams.ban_repeats(torch.tensor([[9, 9]]), 1, beyond)  # a head of fewer words than the embedding
    assert not beyond.any()
    return done


@check
def guard_pages():
    """Each operand against a page that cannot be read, before and behind it; results and hypotheses too."""
    done = 0
    for at_end, n in itertools.product((True, False), (17, 513, 1024)):

        def place(tensor, at_end=at_end):
            return guarded_tensor(tensor, at_end)

        g = torch.Generator().manual_seed(n)
        scores, running = torch.randn(6, n, generator=g), torch.randn(2, 3, generator=g)
        same(candidates(scores, running, 6, place), by_torch(scores, running, 6), "guarded")
        x = place(scores[0])
        same(cpu_beams.top_k(x, 5), torch.topk(x, 5), "guarded")
        cpu_beams.ban_repeats(place(torch.randint(0, n, (6, 5), generator=g)), 2, place(scores))
        hypotheses(place, n)
        done += 4
    return done


def hypotheses(place, n: int) -> None:
    """A search to its end over guarded arrays; a write too many faults."""
    made = cpu_beams._address
    kept_alive = []

    def guarded(tensor):
        if tensor is None:
            return 0
        kept_alive.append(place(tensor))
        return made(kept_alive[-1])

    cpu_beams._address = guarded
    try:
        found = cpu_beams.Beams(torch.zeros(6, 2, dtype=torch.int64), 3, 6, 6, 1, [2], True)
    finally:
        cpu_beams._address = made
    g = torch.Generator().manual_seed(n)
    for step in range(4):
        found.choose(torch.randn(6, n, generator=g))
        found.token[:, ::2] = 2
        found.extend(None, step == 3, 1.0, 1.0, True)
    assert found.length == 6 and (kept_alive[0][:, :, 2:] != 1).any() and (kept_alive[3][:, :, 2:] != 1).any()


def trip_the_guard():
    """The positive control: one score too many must fault."""
    scores = guarded_tensor(torch.ones(3, 17), True)
    running = torch.zeros(1, 3)
    value, beam = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    native.native().beam_candidates(
        scores=scores.data_ptr(), running=running.data_ptr(), sources=1, beams=3, n=18, kept=6,
        value=value.data_ptr(), beam=beam.data_ptr(), token=beam.data_ptr(), threads=1,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--trip"]:
        trip_the_guard()
        sys.exit(0)
    counts = {name: function() for name, function in CHECKS.items() if name in sys.argv[1:] or not sys.argv[1:]}
    print(json.dumps({"isa": native.native().cpu_isa(), **counts}))
