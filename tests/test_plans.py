"""kernels/plans.py against the compiled core, whose rules it repeats."""

from __future__ import annotations

import itertools

import pytest

from dqkernels import backends, fused
from dqkernels.kernels import native, plans, skinny

FORMATS = ((8, 0), *((4, group) for group in (0, 32, 64, 128)), *((2, group) for group in (0, 32, 64, 128)))


def test_rows_are_those_of_the_launcher():
    assert plans.FLOAT_ROWS == skinny.PROLOGUE_ROWS == fused.PROLOGUE_ROWS
    assert plans.ROWS[-1] == skinny.ROWS == backends.FEW_ROWS
    assert plans.FASTER_ROWS in plans.ROWS, "else rows on both sides of it would share an entry"
    assert [plans.bucket(m) for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65)] == [1, 8, 8, 16, 16, 32, 32, 64, 64, None]


def test_fits_is_what_the_core_takes():
    """Every plan at the edges of the rows, of the units of K and of shared memory; and what the rule takes fits."""
    core = native.native()
    if not hasattr(core, "SkinnyPlan"):
        pytest.skip(f"no SkinnyPlan: {native.why_absent() or native.why_no_cuda(native.build_info())}")

    def made(bits, group, m, k, warps_n, splits):
        return core.SkinnyPlan(
            m=m, k=k, row_stride=k, x_dtype=3, mode=0, clip=0.0, norm_eps=0.0, bits=bits, four_level=False,
            group_size=group, tensor_scale=False, bias_dtype=2, residual_dtype=0, activation=0, y_dtype=2, n=[100],
            warps_n=warps_n, splits=splits, sms=132, overlap=False,
        )  # fmt: skip

    seen = {True: 0, False: 0}
    sizes = (1, 8, 9, 16, 17, 20, 32, 33, 40, 41, 64), (1, 256, 257, 768, 1024, 3072, 4096, 5000)
    for (bits, group), m, k in itertools.product(FORMATS, *sizes):
        for warps_n, splits in itertools.product((1, 2, 3, 4, 8), range(1, plans.MOST_SPLITS + 1)):
            try:
                made(bits, group, m, k, warps_n, splits)
                taken = True
            except ValueError:
                taken = False
            fits = plans.fits(m, k, bits, group or -1, plans.Plan(warps_n, splits))
            assert fits == taken, f"W{bits} g{group} {m}x100x{k} {warps_n}, {splits}"
            seen[taken] += 1
        rule = made(bits, group, m, k, 0, 0)
        assert plans.fits(m, k, bits, group or -1, plans.Plan(rule.warps_n, rule.splits))
    assert min(seen.values()) > 5000


def test_candidates_are_those_that_fit():
    found = list(plans.candidates(64, 4096, 2, -1))
    assert len(set(found)) == len(found) and all(plans.fits(64, 4096, 2, -1, plan) for plan in found)
    assert {plan.splits for plan in found} == set(plans.SPLITS)
    assert plans.Plan(1, 1) not in found and plans.Plan(8, 8) in found
    assert {plan.splits for plan in plans.candidates(1, 256, 8, -1)} == {1}
    # 64 rows leave room for one unit of K at a time, of which two warps take the two segments.
    assert [plan for plan in plans.candidates(64, 4096, 4, -1) if plan.splits == 1] == [(4, 1), (8, 1)]
