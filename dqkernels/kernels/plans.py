"""How the skinny CUDA GEMM may be cut up: the plans that a measurement chooses from, and which of them fit.

The rule itself is C++ (csrc/include/dqk/skinny_shape.h), since a launch needs it. Here is what a table of measured
plans (measured.py) and `dqkernels tune` need of it without the compiled core; tests/test_plans.py holds the two
together. No plan ever changes a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Plan(NamedTuple):
    """warps_n: of a block's 8 warps, those side by side in N; the others share its K. splits: blocks that share K."""

    warps_n: int
    splits: int


#: Where `skinny.gemm` is asked for this, the rule chooses.
BY_RULE = Plan(0, 0)
WARPS_N = (1, 2, 4, 8)
#: What `dqkernels tune` tries; the rule goes up to `MOST_SPLITS`, and so may a table.
SPLITS = (1, 2, 3, 4, 6, 8)
MOST_SPLITS = 16
#: Rows that share an entry, by the largest: one token of one sequence, then the kernels' 1, 2, 4 and 8 tiles of tokens.
ROWS = (1, 8, 16, 32, 64)
#: Above so many rows Triton's GEMM is taken where no table says otherwise (docs/measured.md: an H200, 16 and 64 rows).
FASTER_ROWS = 8
#: Above so many rows the input is int8: it was quantized by a launch of its own.
FLOAT_ROWS = 16
#: What comes in: float rows that the GEMM quantizes itself, or codes.
INPUTS = ("float", "int8")

_UNIT = 256  # codes that K is counted in
_WARPS = 8
_SHARED = 40960  # bytes for the activations


def bucket(m: int) -> int | None:
    """The entry of `ROWS` for M rows; None above 64, where no plan is measured."""
    return next((limit for limit in ROWS if m <= limit), None)


def fits(m: int, k: int, bits: int, group_size: int, plan: Plan) -> bool:
    """Whether the kernel takes this plan at M <= 64 rows of K codes: every split has work, the activations have room.

    `skinny_cut` of csrc/include/dqk/skinny_shape.h, which refuses exactly the others.
    """
    units = -(-k // _UNIT)
    if plan.warps_n not in WARPS_N or not 1 <= plan.splits <= min(units, MOST_SPLITS):
        return False
    slice_units = -(-units // plan.splits)
    if (plan.splits - 1) * slice_units >= units:
        return False
    if m * slice_units * _UNIT <= _SHARED:
        return True
    # Two buffers; a chunk gives each of the warps along K as many segments of a row as the others.
    narrow = group_size != -1 and (bits == 2 or group_size < 64)
    segments = _UNIT * bits // (8 * 4 * (8 if narrow else 16))  # of a unit
    granule = max(_WARPS // plan.warps_n // segments, 1)
    return _SHARED // (2 * m * _UNIT) >= granule


def candidates(m: int, k: int, bits: int, group_size: int) -> Iterator[Plan]:
    """Every plan that a measurement tries at these sizes."""
    for warps_n in WARPS_N:
        for splits in SPLITS:
            if fits(m, k, bits, group_size, plan := Plan(warps_n, splits)):
                yield plan
