"""How a candidate shows that it computes the function, before it is timed: a reason why not, or None.

Three rules and no other. `bits`: what the contract calls exact. `relative`: a float peer against the float64 result.
`within`: a float op of ours, whose error to float64 may be twice that of plain torch and one rounding (the bound of
docs/design.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dqkernels import qmath

#: Relative error of a float peer to float64. One rounding of the output is 2^-9 (bf16), 2^-12 (fp16), 2^-25; a factor
#: for inner roundings of their sums.
FLOAT_BOUND = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18}
#: The worst output column may exceed the whole by this much: a single wrong column must not hide in the mean.
_COLUMN_FACTOR = 8.0
#: By how much 127 exp(s - m) of two backends may differ, relatively (docs/design.md, "Attention").
_EXP_RELATIVE = 2.0**-20
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def bits(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Same dtype, same shape, every element the same."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"gives {found.dtype} {list(found.shape)}, the reference {wanted.dtype} {list(wanted.shape)}"
    if torch.equal(found, wanted):
        return None
    return f"{int((found != wanted).sum())} of {wanted.numel()} values differ from the reference"


def all_bits(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> str | None:
    """`bits` of each of an op's outputs."""
    if len(found) != len(wanted):
        return f"gives {len(found)} tensors, the reference {len(wanted)}"
    return next((why for pair in zip(found, wanted, strict=True) if (why := bits(*pair)) is not None), None)


def relative(y: torch.Tensor, wanted: torch.Tensor, bound: float) -> str | None:
    """Within a relative error of the float64 result [..., N], as a whole and in every column."""
    if y.shape != wanted.shape:
        return f"gives shape {list(y.shape)}, the float result {list(wanted.shape)}"
    error, wanted = (t.reshape(-1, t.shape[-1]) for t in (y.double() - wanted, wanted))
    whole = float(error.norm() / wanted.norm())
    if not whole <= bound:  # also catches NaN
        return f"relative error {whole:.2g} to the float64 result, bound {bound:.2g}"
    column = float(error.norm(dim=0).max() / (wanted.norm() / wanted.shape[1] ** 0.5))
    if not column <= bound * _COLUMN_FACTOR:
        return f"relative error {column:.2g} in one output column, bound {bound * _COLUMN_FACTOR:.2g}"
    return None


def allowance(truth: torch.Tensor, eager: torch.Tensor, factor: float = 2.0) -> float:
    """What `within` allows: `factor` times eager's largest error to float64, and one rounding of the largest value."""
    rounding = torch.finfo(eager.dtype).eps / 2 * truth.abs().max()
    return float(factor * (eager.double() - truth).abs().max() + rounding)


def within(y: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor) -> str | None:
    """Error to float64 <= 2x eager's + one rounding, in every element."""
    if y.shape != eager.shape or y.dtype != eager.dtype:
        return f"gives {y.dtype} {list(y.shape)}, the reference {eager.dtype} {list(eager.shape)}"
    return bounded(y.double() - truth, torch.full_like(truth, allowance(truth, eager)))


def bounded(error: torch.Tensor, allowed: torch.Tensor) -> str | None:
    """|error| <= allowed in every element."""
    inside = error.abs() <= allowed  # false for NaN
    if bool(inside.all()):
        return None
    worst = float((error.abs() / allowed).nan_to_num(nan=float("inf")).max())
    return f"{int((~inside).sum())} of {error.numel()} values err by more than their bound, the worst {worst:.2g} times"


def gelu_codes(
    found: Sequence[torch.Tensor], truth: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype
) -> str | None:
    """Per-token codes and scales of some y that keeps the bound of `within`: y itself stays inside the kernel.

    Args:
        found: q int8 [M, K], scale fp32 [M], and an empty row_sum: nobody wanted it.
        truth: GELU in float64 [M, K]; eager: torch's in fp32.
        dtype: to which y is rounded before it is quantized.
    """
    q, scale, row_sum = found
    empty = row_sum.new_empty(0, dtype=torch.int32)
    shapes = truth.to(torch.int8), truth[..., 0].float(), empty
    for got, wanted in zip(found, shapes, strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"gives {got.dtype} {list(got.shape)}, wanted {wanted.dtype} {list(wanted.shape)}"
    kind = torch.finfo(dtype)
    allowed = 2 * (eager.double() - truth).abs().max() + kind.eps / 2 * truth.abs() + kind.tiny
    step = scale.double().unsqueeze(-1)
    # The fp32 quotient, product and scale are three roundings of a value of at most 127 steps.
    slack = qmath.ACT_MAX * 2.0**-22
    largest = truth.abs().amax(dim=-1, keepdim=True)
    wrong = bounded(step * qmath.ACT_MAX - largest, allowed.amax(dim=-1, keepdim=True) + step * slack)
    if wrong is not None:
        return f"scales: {wrong}"
    wrong = bounded(q.double() * step - truth, allowed + step * (0.5 + slack))
    return None if wrong is None else f"codes: {wrong}"


def attention(
    y: torch.Tensor,
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v8: torch.Tensor,
    v_scale: torch.Tensor,
    visible: torch.Tensor,
) -> str | None:
    """Attention of these codes by the formula of docs/design.md, but for the codes that its `exp` may flip.

    Codes int8 [..., tokens, head_dim], scales fp32 [..., tokens], y [..., queries, head_dim], `visible` bool
    broadcastable to [..., queries, keys]. The scores are exact; what a flip may move is 127 vs_max / sum(e).
    """
    score = (q8.double() @ k8.double().mT).float() * q_scale.unsqueeze(-1) * k_scale.unsqueeze(-2)
    visible = visible.expand(score.shape)
    score = score.masked_fill(~visible, float("-inf"))
    top = score.amax(dim=-1, keepdim=True)
    t = 127 * torch.exp((score - torch.where(top == float("-inf"), 0.0, top)).double())
    v_max = torch.where(visible, v_scale.unsqueeze(-2), 0.0).amax(dim=-1, keepdim=True)
    ratio = (v_scale.unsqueeze(-2) * qmath.divide(1.0, torch.where(v_max > 0, v_max, 1.0))).clamp(max=1.0)
    u = t * ratio.double()
    flips = sum(((x - x.floor() - 0.5).abs() <= _EXP_RELATIVE * x).sum(dim=-1, keepdim=True) for x in (t, u))
    weight = t.round().sum(dim=-1, keepdim=True).clamp(min=1)
    truth = v_max.double() * (u.round() @ v8.double()) / weight
    if y.shape != truth.shape:
        return f"gives shape {list(y.shape)}, the reference {list(truth.shape)}"
    kind = torch.finfo(y.dtype)
    slack = flips * qmath.ACT_MAX * v_max.double() / weight * 1.01
    return bounded(y.double() - truth, slack + (kind.eps + 2.0**-22) * truth.abs() + kind.tiny * kind.eps)
