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

#: Candidates of the two searching quantizers: fractions 1.00, 0.98 .. 0.30 of the row's maximum (mse), multiples 0.80,
#: 0.84 .. 2.40 of its mean magnitude (four_level). The best step of a Gaussian is 1.25 means, of a Laplacian 1.54.
MSE_CANDIDATES, FOUR_LEVEL_CANDIDATES = 36, 41
#: Elements handled at once by the search: its int32 and int64 temporaries stay in a CPU's cache.
_SEARCH_ELEMENTS = 1 << 18


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

    Means and squared errors are sums of integers (`fixed_unit`, `error_shift`), so they have no order: every backend
    and every tile finds the same bits.

    A row of zeros has codes 0 and scale 0. A row with a NaN or Inf has codes 0 and scale NaN.

    Args:
        weight: float [N, K], any float dtype.
        layer: the resolved choice; `act_*` fields are not read.

    Raises:
        ValueError: if K could overflow the int32 sum (K > 131,071), or the matrix is empty in K.
    """
    n, k = weight_shape(weight)
    weight = weight.detach().float()
    if n == 0:
        per_tensor, groups = layer.granularity == "per_tensor", -(-k // layer.group_size)
        mult = None if layer.group_size == -1 else weight.new_empty((0, groups), dtype=torch.uint8)
        return QuantizedWeight(weight.to(torch.int8), weight.new_zeros(1 if per_tensor else 0), mult)
    if layer.weight_clip is not None:
        # NaN must survive the clamp; Inf must not become a number.
        weight = torch.where(torch.isfinite(weight), weight.clamp(-layer.weight_clip, layer.weight_clip), weight)
    if layer.group_size != -1:
        return _quantize_groups(weight, layer)
    rows = weight.reshape(1, -1) if layer.granularity == "per_tensor" else weight
    step, threshold = _step(rows, layer)
    codes = _codes(rows, step, layer, threshold).reshape(n, k)
    return QuantizedWeight(codes, _level_scale(step, layer))


def quantize_by_step(
    weight: torch.Tensor, step: torch.Tensor, bits: int, quantizer: str, clip: float | None = None
) -> QuantizedWeight:
    """Quantizes a float matrix by steps that were learned (LSQ, Esser et al. 2020) rather than found.

    `q = round_half_even(clamp(w * (1 / s), -L, L))` for 4 and 8 bits, `q = clamp(floor(w * (1 / s)), -2, 1)` for
    four_level, `q = sign(w) where |w| > s / 2` for ternary. Means are not taken, so nothing has an order.

    Args:
        weight: float [N, K], any float dtype.
        step: fp32 [N] or [1], the distance of two levels. Below 2^-100 / 127, or NaN: codes 0, and scale 0 or NaN.
        bits, quantizer: as in `LayerConfig`; `absmax` and `mse` name the same levels here.
        clip: clamp the weights to [-clip, clip] first, or None.

    Returns:
        Codes and scale ([N] or [1]) as of `quantize_weight`. A row with a NaN or Inf has codes 0 and scale NaN (with
        one step for the matrix: the whole matrix).

    Raises:
        ValueError: if K could overflow the int32 sum (K > 131,071), or the matrix is empty in K.
    """
    n, _ = weight_shape(weight)
    weight, step = weight.detach().float(), step.detach().float()
    low, high = torch.aminmax(weight, dim=1)  # a NaN comes through
    finite = torch.isfinite(low) & torch.isfinite(high)
    if step.numel() == 1 and n:
        finite = finite.all().reshape(1)
    finite = finite & torch.isfinite(step)
    step = torch.where(finite, step, 0.0)
    live = step >= ZERO_AMAX / ACT_MAX
    step = torch.where(live, step, 0.0)
    scale = torch.where(finite, step * 0.5 if quantizer == "four_level" else step, float("nan"))
    # From here on in place, for this runs at every training step.
    if clip is not None:
        weight = weight.clamp(-clip, clip)
    if quantizer == "ternary":
        threshold = torch.where(live, step * 0.5, float("inf")).unsqueeze(1)
        return QuantizedWeight((weight > threshold).char() - (weight < -threshold).char(), scale)
    inv = torch.where(live, divide(1.0, torch.where(live, step, 1.0)), 0.0)
    codes = weight * inv.unsqueeze(1)
    if quantizer == "four_level":
        codes.floor_().clamp_(-2, 1)
    else:
        largest = quant_max(bits, quantizer)
        codes.clamp_(-largest, largest).round_()
    # A NaN is an Inf times the 0 of a row that is not finite.
    return QuantizedWeight(codes.nan_to_num_(0.0).to(torch.int8), scale)


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


# Sums of weights are sums of integers: float sums would depend on their order, which no two backends share.


def fixed_unit(amax: torch.Tensor) -> torch.Tensor:
    """The power of two that takes amax (>= 2^-100, finite) to 2^27..2^28: magnitudes times it, cut to integers, add
    up exactly. One of amax / 16 or more loses nothing, a smaller one less than 2^-27 amax. int64 holds 2^35 of them.
    """
    exponent = amax.contiguous().view(torch.int32) >> 23  # biased by 127
    return ((127 + 127 + 27 - exponent) << 23).view(torch.float32)


def error_shift(count: int) -> int:
    """Low bits dropped from the distances of `count` weights to their levels, so that int64 holds the squares' sum.

    A distance is at most 1.2 * 2^28 units: the levels of four_level reach 2.4 / 2 means, those of mse end at amax. With
    count < 2^c the sum is below 2^(56.53 - 2 * shift + c), and 2 * shift >= c - 6. Rows and groups share the least
    shift, 6, which leaves distances 22 bits; only whole matrices need more.
    """
    return max(6, (count.bit_length() - 5) // 2)


def _mean(total: torch.Tensor, count: int | torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Of integers in `unit` that add up to `total`: one float64 quotient (the divisor is exact), rounded to fp32."""
    return (total.double() / (unit.double() * count)).float()


def _quantize_groups(weight: torch.Tensor, layer: LayerConfig) -> QuantizedWeight:
    """Integer multipliers per group inside an fp32 scale per row, so that the sum over K stays an exact int32."""
    n, k = weight.shape
    size = layer.group_size
    whole = k // size * size
    steps, thresholds = [], []
    for part, groups in ((weight[:, :whole].reshape(-1, size), whole // size), (weight[:, whole:], 1)):
        if part.shape[1] and groups:
            step, threshold = _step(part, layer)
            steps.append(step.reshape(n, groups))
            thresholds += [] if threshold is None else [threshold.reshape(n, groups)]
    group_step = torch.cat(steps, dim=1)
    threshold = torch.cat(thresholds, dim=1).repeat_interleave(size, dim=1)[:, :k] if thresholds else None
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
    codes = _codes(weight, step, layer, threshold)
    return QuantizedWeight(codes, _level_scale(row_step, layer), mult.to(torch.uint8))


def _level_scale(step: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """From the distance of two levels to the factor of an integer level; exact halving."""
    return (step * 0.5 if layer.four_level else step).contiguous()


def _step(rows: torch.Tensor, layer: LayerConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Distance of two levels, fp32 [rows]: 0 for rows of zeros, NaN for rows with non-finite values; and the
    magnitude that a ternary weight must exceed to count, fp32 [rows] (infinite for those rows), None for other rules.
    """
    finite = torch.isfinite(rows).all(dim=1)
    rows = torch.where(finite.unsqueeze(1), rows, 0.0)
    amax = rows.abs().amax(dim=1)
    is_zero = amax < ZERO_AMAX
    threshold = None
    if layer.quantizer == "absmax":
        step = divide_by(amax, float(quant_max(layer.bits, layer.quantizer)))
    else:
        amax = torch.where(is_zero, 1.0, amax)
        unit = fixed_unit(amax)
        if layer.quantizer == "mse":
            step = divide_by(_search(rows, amax, unit, layer), float(quant_max(layer.bits, layer.quantizer)))
        else:
            magnitude = rows.abs()
            fixed = (magnitude * unit.unsqueeze(1)).to(torch.int32)  # cut towards zero
            mean = _mean(fixed.sum(dim=1), rows.shape[1], unit)
            if layer.quantizer == "ternary":
                threshold = mean * torch.full_like(mean, 0.7)  # TWN's (paper.md section 1.2)
                kept = magnitude > threshold.unsqueeze(1)
                step = _mean(torch.where(kept, fixed, 0).sum(dim=1), kept.sum(dim=1).clamp(min=1), unit)
                threshold = torch.where(is_zero, float("inf"), threshold)
            else:
                # The bound matters to means beyond 2^124 alone: a step and its reciprocal are normal numbers.
                step = _search(rows, mean, unit, layer).clamp(max=ACT_SCALE_RANGE[1])
    step = torch.where(is_zero, 0.0, step)
    return torch.where(finite, step, float("nan")), threshold


def _codes(
    rows: torch.Tensor, step: torch.Tensor, layer: LayerConfig, threshold: torch.Tensor | None = None
) -> torch.Tensor:
    """int8 codes of `rows` for a step (and ternary's threshold) of shape [rows] or of the shape of `rows`."""
    per_row = step.dim() == 1
    if per_row:
        step, threshold = step.unsqueeze(1), None if threshold is None else threshold.unsqueeze(1)
    live = step >= ZERO_AMAX / ACT_MAX  # false for 0 and for NaN
    inv = torch.where(live, divide(1.0, torch.where(live, step, 1.0)), 0.0)
    rows = torch.where(live, rows, 0.0)
    if layer.quantizer == "ternary":
        return torch.where(rows.abs() > threshold, torch.sign(rows), 0.0).to(torch.int8)
    if layer.quantizer == "four_level":
        return torch.where(live, torch.floor(rows * inv).clamp(-2, 1), 0.0).to(torch.int8)
    largest = quant_max(layer.bits, layer.quantizer)
    if layer.quantizer == "absmax" and per_row:
        # One rounding less than 1 / (amax / L), and the form of the paper's code: w * (L / amax).
        amax = rows.abs().amax(dim=1, keepdim=True)
        inv = torch.where(live, divide(float(largest), torch.where(live, amax, 1.0)), 0.0)
    return round_half_even((rows * inv).clamp(-largest, largest)).to(torch.int8)


def _search(rows: torch.Tensor, base: torch.Tensor, unit: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """Per row, the `ratio * base` whose levels have the least squared error (the first such ratio of the grid)."""
    n, count = rows.shape
    candidates = FOUR_LEVEL_CANDIDATES if layer.four_level else MSE_CANDIDATES
    at_once = _SEARCH_ELEMENTS << (3 if rows.is_cuda else 0)  # there launches cost more than memory
    width = min(count, at_once)
    height = at_once // width
    errors = torch.zeros(n, candidates, dtype=torch.int64, device=rows.device)
    for top in range(0, n, height):
        part = slice(top, top + height)
        for left in range(0, count, width):
            # From here on everything is in units: an exact change of scale, free of overflow and underflow.
            scaled = rows[part, left : left + width].abs() * unit[part].unsqueeze(1)
            fixed = scaled.to(torch.int32)
            for i in range(candidates):
                candidate = base[part] * unit[part]
                candidate = (candidate * _ratio(torch.full_like(candidate, i), layer)).unsqueeze(1)
                distance = (_distance(scaled, fixed, candidate, layer) >> error_shift(count)).long()
                errors[part, i] += (distance * distance).sum(dim=1)
    return base * _ratio(errors.argmin(dim=1).float(), layer)  # the first of equals


def _ratio(i: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """Number i of the grid, correctly rounded."""
    return divide_by(20 + i, 25.0) if layer.four_level else divide_by(50 - i, 50.0)


def _distance(scaled: torch.Tensor, fixed: torch.Tensor, candidate: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """int32, from magnitudes (fp32, and cut to int32) to the nearest level of a candidate, all in units."""
    if layer.four_level:
        half = (candidate * 0.5).to(torch.int32)
        return torch.minimum((fixed - half).abs_(), (fixed - 3 * half).abs_())
    largest = float(quant_max(layer.bits, layer.quantizer))
    step = divide_by(candidate, largest)
    code = round_half_even((scaled * divide(1.0, step)).clamp(max=largest))
    return fixed - code.to(torch.int32) * step.to(torch.int32)
