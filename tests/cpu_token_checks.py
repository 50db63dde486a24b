"""Checks of what only a decode step has in the compiled core, positions and logits, with the set of DQKERNELS_CPU.

`python tests/cpu_token_checks.py` runs all checks and prints what it counted, and a digest of every result.
test_cpu_token.py starts it as a program, once per instruction set.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
import torch.nn.functional as F
from cpu_attention_checks import DTYPES, INF, NAN, SEEN, note, same
from guarded import guarded_tensor

from dqkernels.kernels import cpu_token, native

CHECKS = {}
# Around the chunk of 1024, the 16 columns of the search, vectors of 8; BART's width.
WIDTHS = (1, 7, 8, 15, 16, 17, 768, 1023, 1024, 1025, 2050)
FACTORS = (1.0, 768**0.5, 0.3)


def check(function):
    CHECKS[function.__name__] = function
    return function


def torchs(x, factor, table, positions, offset):
    """The operations that a decoder of transformers makes, one after the other."""
    x = x if factor == 1.0 else x * factor
    return x + F.embedding(positions.long() + offset, table)


def finish(x, bias=None, rounded=False):
    y, best = cpu_token.finish_logits(x.clone(), bias, rounded)
    return note(y), note(best)


@check
def positions_as_torch():
    """Widths x types x factors: the bits of multiplying, rounding, adding and rounding."""
    done = 0
    for i, (k, dtype, factor) in enumerate(itertools.product(WIDTHS, DTYPES, FACTORS)):
        g = torch.Generator().manual_seed(i)
        x, table = torch.randn(3, 1, k, generator=g).to(dtype), torch.randn(9, k, generator=g).to(dtype)
        positions = torch.tensor([5, 0, 6], dtype=torch.int32)
        want = torchs(x.squeeze(1), factor, table, positions, 2).unsqueeze(1)
        got = cpu_token.add_position(x, factor, table, positions, 2)
        assert got is x
        same(note(got), want, f"{k} {dtype} {factor}")
        done += 1
    one_rounding = (torch.full((1, 1), 1.0078125).bfloat16(), torch.full((1, 1), 0.00390625).bfloat16())
    x, table = one_rounding[0].clone(), one_rounding[1]
    together = (x.float() * 1.0078125 + table.float()).bfloat16()
    got = cpu_token.add_position(x, 1.0078125, table, torch.zeros(1, dtype=torch.int32), 0)
    assert torch.equal(got, one_rounding[0] * 1.0078125 + table) and not torch.equal(got, together)
    return done


@check
def logits_as_torch():
    """Widths x types x biases: the sum, its roundings, and the largest."""
    done = 0
    for i, (n, dtype) in enumerate(itertools.product((*WIDTHS, 5000), DTYPES)):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(4, n, generator=g).to(dtype)
        for kind in (None, *DTYPES):
            bias = None if kind is None else torch.randn(n, generator=g).to(kind)
            want = x if bias is None else x + bias  # torch promotes: of two 16-bit types to fp32
            got, best = finish(x, bias, rounded=bias is not None and kind == dtype)
            same(got, want.float(), f"{n} {dtype} {kind}")
            assert torch.equal(best, want.float().argmax(-1)), f"{n} {dtype} {kind}"
            done += 1
    return done


@check
def the_largest_as_torch():
    """Ties, zeros of both signs, infinities and NaN, in every place of a row."""
    done = 0
    for n in (1, 2, 16, 17, 40, 1024, 1030, 3000):
        g = torch.Generator().manual_seed(n)
        rows = [torch.zeros(n), -torch.zeros(n), torch.full((n,), -INF), torch.full((n,), INF), torch.full((n,), NAN)]
        rows += [torch.randint(0, 3, (n,), generator=g).float() for _ in range(4)]  # full of ties
        zeros = torch.zeros(n)
        zeros[::2] = -0.0
        rows += [zeros, -torch.rand(n, generator=g) - 1]
        base = torch.randn(n, generator=g).clamp(-2, 2)
        for at in {0, 1 % n, n // 2, n - 1}:
            for value in (3.0, NAN, INF, -INF):
                row = base.clone()
                row[at] = value
                rows.append(row)
            twice = base.clone()
            twice[at], twice[n - 1] = 3.0, 3.0
            late = base.clone()
            late[at], late[n - 1], late[0] = NAN, NAN, INF
            rows += [twice, late]
        x = torch.stack(rows)
        best = finish(x)[1]
        assert torch.equal(best, x.argmax(-1)), (n, (best != x.argmax(-1)).nonzero().flatten().tolist())
        done += len(rows)
    return done


@check
def threads_change_nothing():
    """Rows shared among threads: those of one."""
    before = torch.get_num_threads()
    x = torch.randn(9, 50265, generator=torch.Generator().manual_seed(3))
    try:
        torch.set_num_threads(1)
        want = finish(x)
        for count in (2, 5):
            torch.set_num_threads(count)
            got = cpu_token.finish_logits(x.clone(), None, False)
            assert all(map(torch.equal, got, want)), f"{count} threads"
    finally:
        torch.set_num_threads(before)
    return 2


@check
def guard_pages():
    """Each operand against a page that cannot be read, before and behind it; results too."""
    done, core = 0, native.native()
    for at_end, (m, k), dtype in itertools.product((True, False), ((1, 1), (3, 17), (2, 1025), (4, 9)), DTYPES):
        g = torch.Generator().manual_seed(k)
        x, table = torch.randn(m, k, generator=g).to(dtype), torch.randn(5, k, generator=g).to(dtype)
        positions = torch.arange(m, dtype=torch.int32) % 3 + 1  # with the offset the last row is among them
        want = torchs(x, 0.5, table, positions, 1)
        there = [guarded_tensor(t, at_end) for t in (x, table, positions)]
        cpu_token.add_position(there[0], 0.5, there[1], there[2], 1)
        same(there[0], want, "positions")
        bias = torch.randn(k, generator=g).to(dtype)
        want, best = cpu_token.finish_logits(x.clone(), bias, True)
        there = [guarded_tensor(t, at_end) for t in (x, bias, torch.zeros(m, k), torch.zeros(m, dtype=torch.int64))]
        code = native.DTYPES[dtype]
        core.finish_logits(
            x=there[0].data_ptr(), dtype=code, rows=m, n=k, bias=there[1].data_ptr(), bias_dtype=code, rounded=True,
            y=there[2].data_ptr(), best=there[3].data_ptr(), threads=1,
        )  # fmt: skip
        assert torch.equal(there[2], want) and torch.equal(there[3], best)
        done += 2
    return done


def trip_the_guard():
    """The positive control: one element too many must fault."""
    x = guarded_tensor(torch.ones(1, 17), True)
    best = torch.zeros(1, dtype=torch.int64)
    native.native().finish_logits(
        x=x.data_ptr(), dtype=0, rows=1, n=18, bias=0, bias_dtype=0, rounded=False, y=x.data_ptr(),
        best=best.data_ptr(), threads=1,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--trip"]:
        trip_the_guard()
        sys.exit(0)
    counts = {name: function() for name, function in CHECKS.items() if name in sys.argv[1:] or not sys.argv[1:]}
    print(json.dumps({"isa": native.native().cpu_isa(), "digest": SEEN.hexdigest(), **counts}))
