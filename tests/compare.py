"""Two ways to compare: `assert_equal` for what the contract calls exact, `assert_bounded` for what it does not.

There is no third: cosine similarity cannot see a wrong scale, and a mean error cannot see one wrong element.
"""

from __future__ import annotations

import numpy as np
import torch

#: Coordinates printed when something differs.
SHOWN = 8


def as_tensor(value) -> torch.Tensor:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def assert_equal(got, expected, what: str = "", *, may_be_zero: bool = False) -> None:
    """Every element the same; NaN equals NaN, and -0.0 equals 0.0.

    A comparison of nothing, or of zeros with zeros, passes for the wrong reason: where that is what a case is
    about, it says `may_be_zero=True`. Floats of different width are compared as values (widening is exact).
    """
    got, expected = as_tensor(got), as_tensor(expected)
    assert tuple(got.shape) == tuple(expected.shape), (
        f"{what}: shape {list(got.shape)}, expected {list(expected.shape)}"
    )
    if not may_be_zero:
        for side, tensor in (("got", got), ("expected", expected)):
            assert tensor.numel() and bool((tensor != 0).any()), f"{what}: {side} is all zero: the case proves nothing"
    wide = torch.float64 if got.is_floating_point() or expected.is_floating_point() else torch.int64
    a, b = got.to(wide), expected.to(wide)
    wrong = a != b
    if wide == torch.float64:
        wrong &= ~(a.isnan() & b.isnan())
    count = int(wrong.sum())
    if count:
        lines = [
            f"  {tuple(at)}: got {a[tuple(at)].item()!r}, expected {b[tuple(at)].item()!r}"
            for at in wrong.nonzero()[:SHOWN].tolist()
        ]
        raise AssertionError(f"{what}: {count} of {a.numel()} elements differ\n" + "\n".join(lines))


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, what: str = "", *, may_be_zero: bool = False) -> None:
    """`assert_equal` for two results of the package itself: the dtype must agree as well."""
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    if torch.equal(got, expected) and (may_be_zero or bool((expected != 0).any())):
        return  # the common case, without widening
    assert_equal(got, expected, what, may_be_zero=may_be_zero)


def assert_bounded(got, truth64, eager, what: str = "", *, factor: float = 2.0) -> None:
    """FlashAttention's bound: error to float64 <= `factor` * (what plain PyTorch errs by) + one rounding.

    Args:
        got: our result in some float dtype.
        truth64: the same thing in float64.
        eager: what plain PyTorch computes from the same inputs in the same dtype.
    """
    got, truth, eager = as_tensor(got), as_tensor(truth64), as_tensor(eager)
    assert got.shape == truth.shape == eager.shape, f"{what}: {got.shape}, {truth.shape}, {eager.shape}"
    assert truth.dtype == torch.float64 and bool((truth != 0).any()), f"{what}: no truth to compare with"
    rounding = torch.finfo(got.dtype).eps / 2 * truth.abs().max()
    allowed = factor * (eager.double() - truth).abs().max() + rounding
    error = (got.double() - truth).abs()
    worst = int(error.argmax())
    assert bool((error <= allowed).all()), (
        f"{what}: error {error.flatten()[worst]:.3e} at flat index {worst}, allowed {allowed:.3e} "
        f"(eager's own error {(eager.double() - truth).abs().max():.3e})"
    )
