"""Scales, codes and their floats in plain torch: the specification of every quantizer.

The numbers here are exact contracts (docs/design.md section 3). Two habits keep them so: a quotient is taken
tensor by tensor (torch turns `127 / tensor`, and on CUDA `tensor / 127`, into a multiplication by a rounded
reciprocal), and rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dqkernels.config import LayerConfig

ACT_MAX = 127
#: Rows whose largest magnitude is below this count as zero, so that 127 / amax cannot overflow.
ZERO_AMAX = 2.0**-100
#: A static `act_scale` lies between these, so that it and its reciprocal are normal numbers.
ACT_SCALE_RANGE = (2.0**-126, 2.0**126)
#: int32 sums of K products of int8 codes cannot overflow up to here (design section 3).
MAX_K = 131_071
#: Largest magnitude of an integer level, for the overflow bound of group multipliers.
_MAX_LEVEL = {"absmax": {4: 8, 8: 127}, "mse": {4: 8, 8: 127}, "ternary": {2: 1}, "four_level": {2: 3}}

# Candidate grids of the two searching quantizers, as fractions of the row's maximum (mse) and multiples of its
# mean magnitude (four_level). The best step of a Gaussian is 1.25 mean magnitudes, of a Laplacian 1.54.
_MSE_RATIOS = tuple(1.0 - 0.02 * i for i in range(36))
_FOUR_LEVEL_RATIOS = tuple(0.80 + 0.04 * i for i in range(41))
#: Elements handled at once by the searching quantizers, to bound their float64 temporaries (16 MiB each).
_SEARCH_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight matrix and what turns them back into floats.

    Attributes:
        codes: int8 [N, K].
        scale: fp32 [N], or [1] under `per_tensor`. The factor of an integer level: s, and s / 2 for four_level.
        group_mult: uint8 [N, ceil(K / group_size)] integer multipliers, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    group_mult: torch.Tensor | None = None


def quant_max(bits: int, quantizer: str) -> int:
    """Largest code: 127, 7, or 1 (`four_level` codes are -2..1)."""
    return 1 if bits == 2 else (1 << (bits - 1)) - 1


def mult_max(bits: int, quantizer: str, k: int) -> int:
    """Largest group multiplier for which the int32 sum over K cannot overflow (design section 3)."""
    return min(127, (2**31 - 1) // (ACT_MAX * _MAX_LEVEL[quantizer][bits] * k))


def round_half_even(x: torch.Tensor) -> torch.Tensor:
    """Rounds to the nearest integer, ties to even, as every backend does."""
    return torch.round(x)


def divide(numerator: float, denominator: torch.Tensor) -> torch.Tensor:
    """`numerator / denominator` as one IEEE quotient per element, never a multiplication by a reciprocal."""
    return torch.full_like(denominator, numerator) / denominator


def divide_by(numerator: torch.Tensor, denominator: float) -> torch.Tensor:
    """`numerator / denominator` as one IEEE quotient per element, never a multiplication by a reciprocal."""
    return numerator / torch.full_like(numerator, denominator)


# ---------------------------------------------------------------------------------------------- activations


def quantize_activation(
    x: torch.Tensor, mode: str, clip: float | None = None, act_scale: torch.Tensor | None = None, want_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes activations to int8.

    `inv = 127 / amax`, `scale = amax / 127`, `q = round_half_even(clamp(x * inv, -127, 127))` with amax over a
    row (`per_token`) or over everything (`per_tensor`, the rule of DQ-BART); `static` uses `act_scale`. A row
    with a NaN or Inf gets codes 0 and scale NaN; a row of zeros gets codes 0 and scale 1.

    Args:
        x: fp32, fp16 or bf16 [..., K].
        mode: `per_token`, `per_tensor` or `static`.
        clip: clamp x to [-clip, clip] first (non-finite values are judged before).
        act_scale: fp32 [1], for `static`.
        want_sum: also return the sum of each row's codes.

    Returns:
        q int8 [..., K], scale fp32 [...] (one per row in every mode), row_sum int32 [...] or [0] if not wanted.
    """
    values = x.float()
    finite = torch.isfinite(values).all(dim=-1)
    if mode == "per_tensor":
        finite = finite.all().expand(finite.shape)
    values = torch.where(finite.unsqueeze(-1), values, 0.0)
    if clip is not None:
        values = values.clamp(-clip, clip)
    if mode == "static":
        scale = act_scale.reshape(()).expand(finite.shape)
        inv = divide(1.0, scale)
    else:
        amax = values.abs().amax(dim=-1) if values.numel() else values.new_zeros(finite.shape)
        if mode == "per_tensor" and amax.numel():
            amax = amax.max().expand(finite.shape)
        is_zero = amax < ZERO_AMAX
        safe = torch.where(is_zero, 1.0, amax)
        inv = torch.where(is_zero, 0.0, divide(float(ACT_MAX), safe))
        scale = torch.where(is_zero, 1.0, divide_by(safe, float(ACT_MAX)))
    q = round_half_even((values * inv.unsqueeze(-1)).clamp(-ACT_MAX, ACT_MAX)).to(torch.int8).contiguous()
    scale = torch.where(finite, scale, float("nan")).contiguous()
    row_sum = q.sum(dim=-1, dtype=torch.int32) if want_sum else q.new_empty(0, dtype=torch.int32)
    return q, scale, row_sum


# -------------------------------------------------------------------------------------------------- weights


def quantize_weight(weight: torch.Tensor, layer: LayerConfig) -> QuantizedWeight:
    """Quantizes a float matrix by the rule of `layer`.

    Rules (w in fp32, per row; sources in paper.md sections 1.2 and 5.3):
        absmax: `q = round(w * L / max|w|)`, L = 7 or 127.
        mse: the same with max|w| shrunk by the factor of a fixed grid that has the least squared error.
        ternary: TWN. D = 0.7 * mean|w|; q = sign(w) where |w| > D; scale = mean|w| over those.
        four_level: q = clamp(floor(w / s), -2, 1) for the levels (q + 1/2) * s, s by least squared error.

    A row of zeros has codes 0 and scale 0. A row with a NaN or Inf has codes 0 and scale NaN.

    Args:
        weight: float [N, K], any float dtype.
        layer: the resolved choice; `act_*` fields are not read.

    Raises:
        ValueError: if K could overflow the int32 sum (K > 131,071), or the matrix is empty in K.
    """
    n, k = weight_shape(weight)
    weight = weight.detach().float()
    if layer.weight_clip is not None:
        # NaN must survive the clamp; Inf must not become a number.
        weight = torch.where(torch.isfinite(weight), weight.clamp(-layer.weight_clip, layer.weight_clip), weight)
    if layer.group_size != -1:
        return _quantize_groups(weight, layer)
    rows = weight.reshape(1, -1) if layer.granularity == "per_tensor" else weight
    step = _step(rows, layer)
    codes = _codes(rows, step, layer).reshape(n, k)
    return QuantizedWeight(codes, _level_scale(step, layer))


def weight_shape(weight: torch.Tensor) -> tuple[int, int]:
    """[N, K] of a matrix that can be quantized; the refusals of `quantize_weight`."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {list(weight.shape)}")
    n, k = weight.shape
    if not 0 < k <= MAX_K:
        raise ValueError(f"in_features must be 1..{MAX_K} so that int32 sums stay exact, got {k}")
    return n, k


def dequantize_weight(quantized: QuantizedWeight, layer: LayerConfig) -> torch.Tensor:
    """Floats of the codes: fp32 [N, K], `level * (scale * group multiplier)`."""
    return dequantize_codes(quantized.codes, quantized.scale, quantized.group_mult, layer.four_level, layer.group_size)


def dequantize_codes(
    codes: torch.Tensor, scale: torch.Tensor, group_mult: torch.Tensor | None, four_level: bool, group_size: int
) -> torch.Tensor:
    """fp32 [N, K] of int8 codes [N, K]; see `QuantizedWeight` for the other shapes."""
    level = levels(codes, four_level).float()
    if group_mult is not None:
        mult = group_mult.float().repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]
        level = level * mult  # an exact integer: |level| <= 8, mult <= 127
    return level * scale.reshape(-1, 1)


def levels(codes: torch.Tensor, four_level: bool) -> torch.Tensor:
    """The integers that codes stand for, int8: the code, or 2 * code + 1 for four_level."""
    return 2 * codes + 1 if four_level else codes


def fake_quantize(weight: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """Quantizes and dequantizes: the float weight that the packed layer stands for, in `weight`'s dtype."""
    return dequantize_weight(quantize_weight(weight, layer), layer).to(weight.dtype)


def _quantize_groups(weight: torch.Tensor, layer: LayerConfig) -> QuantizedWeight:
    """Integer multipliers per group inside an fp32 scale per row, so that the sum over K stays an exact int32."""
    n, k = weight.shape
    size = layer.group_size
    whole = k // size * size
    steps = []
    if whole:
        steps.append(_step(weight[:, :whole].reshape(-1, size), layer).reshape(n, whole // size))
    if whole < k:
        steps.append(_step(weight[:, whole:], layer).reshape(n, 1))
    group_step = torch.cat(steps, dim=1)
    limit = mult_max(layer.bits, layer.quantizer, k)
    largest = group_step.amax(dim=1)
    # amax drops no NaN in torch; a row with one keeps scale NaN and codes 0.
    row_step = divide_by(largest, float(limit))
    live = row_step >= ZERO_AMAX
    safe = torch.where(live, row_step, 1.0).unsqueeze(1)
    mult = round_half_even(group_step / safe).clamp(1, limit)
    mult = torch.where(live.unsqueeze(1), mult, 1.0)
    row_step = torch.where(live | row_step.isnan(), row_step, 0.0)
    step = (row_step.unsqueeze(1) * mult).repeat_interleave(size, dim=1)[:, :k]
    codes = _codes(weight, step, layer, group_size=size)
    return QuantizedWeight(codes, _level_scale(row_step, layer), mult.to(torch.uint8))


def _level_scale(step: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """From the distance of two levels to the factor of an integer level; exact halving."""
    return (step * 0.5 if layer.four_level else step).contiguous()


def _step(rows: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """Distance of two levels, fp32 [rows]: 0 for rows of zeros, NaN for rows with non-finite values."""
    finite = torch.isfinite(rows).all(dim=1)
    rows = torch.where(finite.unsqueeze(1), rows, 0.0)
    amax = rows.abs().amax(dim=1)
    is_zero = amax < ZERO_AMAX
    if layer.quantizer == "absmax":
        step = divide_by(amax, float(quant_max(layer.bits, layer.quantizer)))
    elif layer.quantizer == "mse":
        step = _search(rows, amax, _MSE_RATIOS, layer)
        step = divide_by(step, float(quant_max(layer.bits, layer.quantizer)))
    elif layer.quantizer == "ternary":
        magnitude = rows.abs()
        kept = magnitude > _ternary_threshold(magnitude)
        # float64 sums: their rounding to fp32 then hardly depends on the order of the sum.
        total = torch.where(kept, magnitude, 0.0).sum(dim=1, dtype=torch.float64)
        step = (total / kept.sum(dim=1).clamp(min=1)).float()
    else:
        mean = rows.abs().mean(dim=1, dtype=torch.float64).float()
        step = _search(rows, mean, _FOUR_LEVEL_RATIOS, layer)
    step = torch.where(is_zero, 0.0, step)
    return torch.where(finite, step, float("nan"))


def _codes(rows: torch.Tensor, step: torch.Tensor, layer: LayerConfig, group_size: int | None = None) -> torch.Tensor:
    """int8 codes of `rows` for a step of shape [rows] or of the shape of `rows`."""
    step = step.unsqueeze(1) if step.dim() == 1 else step
    live = step >= ZERO_AMAX / ACT_MAX  # false for 0 and for NaN
    inv = torch.where(live, divide(1.0, torch.where(live, step, 1.0)), 0.0)
    rows = torch.where(live, rows, 0.0)
    if layer.quantizer == "ternary":
        magnitude = rows.abs()
        kept = magnitude > _ternary_threshold(magnitude, group_size)
        return torch.where(kept & live, torch.sign(rows), 0.0).to(torch.int8)
    if layer.quantizer == "four_level":
        return torch.where(live, torch.floor(rows * inv).clamp(-2, 1), 0.0).to(torch.int8)
    largest = quant_max(layer.bits, layer.quantizer)
    if layer.quantizer == "absmax" and group_size is None:
        # One rounding less than 1 / (amax / L), and the form of the paper's code: w * (L / amax).
        amax = rows.abs().amax(dim=1, keepdim=True)
        inv = torch.where(live, divide(float(largest), torch.where(live, amax, 1.0)), 0.0)
    return round_half_even((rows * inv).clamp(-largest, largest)).to(torch.int8)


def _ternary_threshold(magnitude: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """TWN's 0.7 * mean|w| (paper.md section 1.2) per row, or per group of a row, broadcast to `magnitude`."""
    if group_size is None:
        mean = magnitude.mean(dim=1, keepdim=True, dtype=torch.float64).float()
        return mean * torch.full_like(mean, 0.7)
    means = [
        run.mean(dim=1, keepdim=True, dtype=torch.float64).float().expand_as(run)
        for run in magnitude.split(group_size, dim=1)
    ]
    return torch.cat(means, dim=1) * torch.full_like(magnitude, 0.7)


def _search(rows: torch.Tensor, base: torch.Tensor, ratios: tuple[float, ...], layer: LayerConfig) -> torch.Tensor:
    """Per row, the `ratio * base` with the least squared error (the first such ratio of the grid)."""
    chunk = max(1, _SEARCH_ELEMENTS // rows.shape[1])
    parts = [_search_rows(r, b, ratios, layer) for r, b in zip(rows.split(chunk), base.split(chunk), strict=True)]
    return torch.cat(parts) if parts else base


def _search_rows(rows: torch.Tensor, base: torch.Tensor, ratios: tuple[float, ...], layer: LayerConfig) -> torch.Tensor:
    divisor = 1.0 if layer.four_level else float(quant_max(layer.bits, layer.quantizer))
    best = base
    least = torch.full_like(base, float("inf"), dtype=torch.float64)
    for ratio in ratios:
        candidate = base * torch.full_like(base, ratio)
        step = divide_by(candidate, divisor)
        code = _codes(rows, step, layer)
        level = code.float() + 0.5 if layer.four_level else code.float()
        error = (rows - level * step.unsqueeze(1)).square().sum(dim=1, dtype=torch.float64)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, candidate, best)
    return best
