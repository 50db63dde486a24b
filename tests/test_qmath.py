"""The quantizers against the numpy oracle: activations, weights, groups, and the rows nobody thinks of."""

import math

import grids
import numpy as np
import oracle
import pytest
import torch
from compare import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from dqkernels import qmath
from dqkernels.config import LayerConfig

NAN, INF = float("nan"), float("inf")


def check_activation(x, mode, clip=None, act_scale=None, may_be_zero=False):
    scale_tensor = None if act_scale is None else torch.tensor([act_scale], dtype=torch.float32)
    q, scale, row_sum = qmath.quantize_activation(x, mode, clip, scale_tensor, want_sum=True)
    rows = x.float().reshape(-1, x.shape[-1]).numpy()
    codes, scales, sums = oracle.quantize_activation(rows, mode, clip, act_scale)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and row_sum.dtype == torch.int32
    assert q.is_contiguous() and scale.is_contiguous() and row_sum.is_contiguous()
    assert q.shape == x.shape and scale.shape == row_sum.shape == x.shape[:-1]
    assert_equal(q, codes.reshape(x.shape), f"{mode} codes", may_be_zero=may_be_zero)
    assert_equal(scale, scales.reshape(x.shape[:-1]), f"{mode} scale")
    assert_equal(row_sum, sums.reshape(x.shape[:-1]), f"{mode} row_sum", may_be_zero=True)
    return q, scale, row_sum


# ---------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
@pytest.mark.parametrize("clip", [None, 2.5, 0.1])
@pytest.mark.parametrize("mode", grids.ACT_MODES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (2, 3, 5, 31), (33,)], ids=str)
def test_activation_equals_the_oracle(shape, mode, clip, dtype):
    x = (torch.randn(shape) * 2).to(dtype)
    check_activation(x, mode, clip, 0.013 if mode == "static" else None)


@pytest.mark.parametrize("mode", grids.ACT_MODES)
def test_halves_round_to_even(mode):
    """amax 127 makes inv exactly 1, so these inputs are exact ties: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2."""
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    q, _, _ = check_activation(x, mode, act_scale=1.0 if mode == "static" else None)
    assert q.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


@pytest.mark.parametrize("mode", ["per_token", "static"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_value_marks_its_row_and_no_other(mode, bad):
    """At every position of the row: a float maximum drops NaN, and vector loops have tails."""
    x = torch.randn(3, 67)
    act_scale = torch.tensor([0.02]) if mode == "static" else None
    clean = qmath.quantize_activation(x, mode, None, act_scale, True)
    for position in range(67):
        marked = x.clone()
        marked[1, position] = bad
        # The clip would turn Inf into a number: the row is judged before.
        for clip in (None, 100.0):
            q, scale, row_sum = qmath.quantize_activation(marked, mode, clip, act_scale, True)
            assert (q[1] == 0).all() and scale[1].isnan() and row_sum[1] == 0
            for got, wanted in zip((q, scale, row_sum), clean, strict=True):
                assert torch.equal(got[[0, 2]], wanted[[0, 2]])


def test_per_tensor_is_one_row():
    x = torch.randn(2, 3, 8)
    x[1, 2, 7] = 9.0
    q, scale, _ = check_activation(x, "per_tensor")
    assert (scale == scale[0, 0]).all() and q[1, 2, 7] == 127
    x[0, 0, 0] = NAN
    q, scale, _ = check_activation(x, "per_tensor", may_be_zero=True)
    assert (q == 0).all() and scale.isnan().all()


@pytest.mark.parametrize("mode", ["per_token", "per_tensor"])
@pytest.mark.parametrize("amax", [0.0, -0.0, 1e-45, 2.0**-126, 2.0**-101, 2.0**-100, 2.0**-99, 3e38, 65504.0])
def test_zero_tiny_and_huge_rows(mode, amax):
    """Below 2^-100 a row is zero: codes 0, scale 1, so that 127 / amax never overflows. 2^-100 itself is not."""
    x = torch.tensor([[amax, -amax / 2, 0.0]])
    zero = abs(amax) < 2.0**-100
    q, scale, _ = check_activation(x, mode, may_be_zero=zero)
    assert q.tolist() == ([[0, 0, 0]] if zero else [[127, -64, 0]])
    assert (scale == 1.0).all() if zero else scale.isfinite().all()


def test_an_outlier_saturates_and_never_wraps():
    x = torch.full((2, 5), 1e-3)
    x[0, 3], x[1, 0] = 3e38, -3e38
    q, _, _ = check_activation(x, "per_token")
    assert q[0].tolist() == [0, 0, 0, 127, 0] and q[1].tolist() == [-127, 0, 0, 0, 0]
    q, _, _ = check_activation(x, "static", act_scale=1e-30)
    assert set(q.flatten().tolist()) == {127, -127}


def test_clip_limits_the_maximum_and_the_codes():
    x = torch.tensor([[10.0, 2.5, -2.5, 1.25, -40.0]])
    q, scale, _ = check_activation(x, "per_token", clip=2.5)
    assert q.tolist() == [[127, 127, -127, 64, -127]]
    assert scale.item() == np.float32(2.5) / np.float32(127)


def test_static_reads_its_scale_only():
    x = torch.tensor([[1.0, -1.0, 0.25], [0.0, 0.0, 0.0]])
    q, scale, _ = check_activation(x, "static", act_scale=0.25)
    assert q.tolist() == [[4, -4, 1], [0, 0, 0]] and (scale == 0.25).all()


def test_no_sum_unless_wanted():
    assert qmath.quantize_activation(torch.randn(2, 3), "per_token")[2].shape == (0,)


@pytest.mark.parametrize("mode", grids.ACT_MODES)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_empty_batches(mode, shape):
    q, scale, row_sum = qmath.quantize_activation(torch.empty(shape), mode, None, torch.ones(1), True)
    assert q.shape == shape and scale.shape == row_sum.shape == shape[:-1]


@pytest.mark.parametrize("layout", grids.LAYOUTS)
@pytest.mark.parametrize("mode", grids.ACT_MODES)
def test_layouts_and_untouched_inputs(layout, mode):
    x = grids.LAYOUTS[layout](torch.randn(4, 5, 7))
    before = x.clone()
    check_activation(x, mode, 2.5, 0.02 if mode == "static" else None)
    assert torch.equal(x, before)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
    st.sampled_from(["per_token", "per_tensor", "static"]),
    st.none() | st.floats(min_value=2.0**-20, max_value=1e6, width=32),
)
def test_any_float32_row(values, mode, clip):
    x = torch.tensor([values], dtype=torch.float32)
    check_activation(x, mode, clip, 0.37 if mode == "static" else None, may_be_zero=True)


def test_quotients_are_ieee_quotients():
    """torch turns `127 / tensor` into `127 * (1 / tensor)` and, on CUDA, `tensor / 127` into a product as well."""
    values = torch.rand(20_000) + 2.0**-10
    x = values.numpy()
    assert_equal(qmath.divide(127.0, values), np.float32(127) / x)
    assert_equal(qmath.divide_by(values, 127.0), x / np.float32(127))
    shortcut = torch.tensor(127.0) * values.reciprocal()
    assert not torch.equal(shortcut, qmath.divide(127.0, values)), "the two forms agree here: the test is blind"


# -------------------------------------------------------------------------------------------------- weights

WEIGHT_SHAPES = [(1, 1), (3, 2), (5, 129), (17, 64), (8, 211)]


def weights(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n, k", WEIGHT_SHAPES)
def test_absmax_equals_the_oracle(n, k, bits, granularity):
    w = weights(n, k)
    got = qmath.quantize_weight(w, LayerConfig(bits, "absmax", granularity))
    codes, scale = oracle.absmax(w.numpy(), bits, granularity == "per_tensor")
    assert_equal(got.codes, codes, "codes")
    assert_equal(got.scale, scale, "scale")
    assert got.group_mult is None and int(got.codes.abs().max()) == {4: 7, 8: 127}[bits]


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("n, k", WEIGHT_SHAPES)
def test_ternary_equals_the_oracle(n, k, granularity):
    w = weights(n, k)
    got = qmath.quantize_weight(w, LayerConfig(2, "ternary", granularity))
    codes, scale = oracle.ternary(w.numpy(), granularity == "per_tensor")
    assert_equal(got.codes, codes, "codes")
    assert_equal(got.scale, scale, "scale")


def test_ternary_threshold_is_strict():
    """|w| = D exactly is dropped: mean 10, D = 7 as float32 has it."""
    w = torch.tensor([[7.0, 13.0, 10.0, 10.0]])
    assert np.float32(10) * np.float32(0.7) == 7.0
    got = qmath.quantize_weight(w, LayerConfig(2, "ternary"))
    assert got.codes.tolist() == [[0, 1, 1, 1]] and got.scale.item() == 11.0


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("n, k", WEIGHT_SHAPES)
def test_four_level_codes_and_the_best_step_of_its_grid(n, k, granularity):
    w = weights(n, k)
    got = qmath.quantize_weight(w, LayerConfig(2, "four_level", granularity))
    rows = w.reshape(1, -1) if granularity == "per_tensor" else w
    codes = got.codes.reshape(rows.shape).numpy()
    assert got.scale.shape == (len(rows),)
    for row, found, scale in zip(rows.numpy(), codes, got.scale.numpy(), strict=True):
        step = np.float32(2) * scale  # exact: the stored scale is half a step
        assert_equal(found, oracle.four_level_codes(row, step), "codes", may_be_zero=True)
        mean = np.float32(oracle._mean(np.abs(row)))
        errors = []
        for i in range(41):
            candidate = mean * np.float32(0.80 + 0.04 * i)
            errors.append(oracle.squared_error(row, oracle.four_level_codes(row, candidate) + 0.5, candidate))
        mine = oracle.squared_error(row, found + 0.5, step)
        assert mine <= min(errors) * (1 + 1e-5), "a better step of the grid was passed over"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n, k", WEIGHT_SHAPES)
def test_mse_takes_the_best_step_of_its_grid(n, k, bits):
    w = weights(n, k)
    largest = {4: 7, 8: 127}[bits]
    got = qmath.quantize_weight(w, LayerConfig(bits, "mse"))
    for row, found, step in zip(w.numpy(), got.codes.numpy(), got.scale.numpy(), strict=True):
        inv = np.float32(1) / step
        assert_equal(found, np.rint(np.clip(row * inv, -largest, largest)).astype(np.int8), "codes")
        errors = []
        for i in range(36):
            candidate = np.abs(row).max() * np.float32(1.0 - 0.02 * i) / np.float32(largest)
            code = np.rint(np.clip(row * (np.float32(1) / candidate), -largest, largest))
            errors.append(oracle.squared_error(row, code, candidate))
        assert oracle.squared_error(row, found, step) <= min(errors) * (1 + 1e-5) + 1e-12


def test_mse_is_never_worse_than_absmax():
    w = weights(32, 300)
    errors = {}
    for quantizer in ("mse", "absmax"):
        layer = LayerConfig(4, quantizer)
        errors[quantizer] = (qmath.fake_quantize(w, layer).double() - w.double()).square().sum(dim=1)
    assert bool((errors["mse"] <= errors["absmax"] * (1 + 1e-5)).all())
    assert bool((errors["mse"] < errors["absmax"] * 0.9).any()), "the search never helped: is it a search?"


LAYERS = [
    LayerConfig(bits, quantizer, granularity, group)
    for bits, quantizer in [(2, "ternary"), (2, "four_level"), (4, "absmax"), (4, "mse"), (8, "absmax"), (8, "mse")]
    for granularity, group in [("per_channel", -1), ("per_tensor", -1), ("per_channel", 32), ("per_channel", 128)]
    if bits < 8 or group == -1
]
layer_ids = [f"w{layer.bits}-{layer.quantizer}-{layer.granularity}-g{layer.group_size}" for layer in LAYERS]


def check_weight(w, layer):
    """codes, scale and multipliers of the oracle, bit by bit."""
    got = qmath.quantize_weight(w, layer)
    codes, scale, mult = oracle.quantize_weight(
        w.float().numpy(), layer.bits, layer.quantizer, layer.granularity, layer.group_size, layer.weight_clip
    )
    assert_equal(got.scale, scale, "scale", may_be_zero=True)
    assert_equal(got.codes, codes, "codes", may_be_zero=True)
    assert (got.group_mult is None) == (mult is None)
    if mult is not None:
        assert_equal(got.group_mult, mult, "multipliers")
    return got


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
@pytest.mark.parametrize("n, k", [(1, 1), (3, 31), (5, 129), (2, 300)])
def test_every_rule_equals_the_oracle(n, k, layer):
    for clip, dtype in ((None, torch.float32), (0.7, torch.bfloat16)):
        choice = LayerConfig(layer.bits, layer.quantizer, layer.granularity, layer.group_size, weight_clip=clip)
        assert check_weight(weights(n, k, seed=k).to(dtype), choice).scale.any()


def special_rows(k=70):
    """Tiny, huge, tied, lopsided and constant rows; the smallest and largest amax that count; zero groups."""
    w = torch.randn(11, k)
    w[1] = w[1].sign() * 3.4e38
    w[2] *= 2.0**-98
    w[3] = 2.0**-100
    w[4] = 0.0
    w[4, 3] = -1.0
    w[5, 40:] *= 2.0**-30
    w[6] = torch.arange(k) % 15 - 7.5
    w[7] = torch.where(torch.rand(k) < 0.5, 1.0, -1.0)
    w[8] = w[8].sign() * 2.0**-128
    w[9, :32] *= 2.0**-110
    w[9, 32] = 0.0
    w[10] = torch.rand(k) * 3e38
    return w


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
def test_special_rows_equal_the_oracle(layer):
    w = special_rows()
    check_weight(w, layer)
    for row in range(len(w)):
        got = check_weight(w[row : row + 1], layer)
        # Rows 2 and 3: alive, but the part of them that multipliers count in is below 2^-100.
        zero = row == 8 or (row in (2, 3) and layer.group_size != -1)
        assert got.scale.isfinite().all() and bool(got.scale.any()) != zero


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
def test_the_order_of_the_weights_does_not_count(layer):
    """Sums have no order: columns that change places (within their group) take their codes along, and that is all."""
    w = weights(3, 4096) * torch.exp(2 * torch.randn(3, 4096))
    first = qmath.quantize_weight(w, layer)
    size = 4096 if layer.group_size == -1 else layer.group_size
    for _ in range(5):
        order = torch.cat([start + torch.randperm(size) for start in range(0, 4096, size)])
        moved = qmath.quantize_weight(w[:, order], layer)
        assert torch.equal(moved.scale, first.scale) and torch.equal(moved.codes, first.codes[:, order])
        if size < 4096:
            assert torch.equal(moved.group_mult, first.group_mult)


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
@pytest.mark.parametrize("power", [-90, -40, 30, 120])
def test_powers_of_two_change_the_scale_alone(layer, power):
    w = weights(4, 130)
    first, scaled = qmath.quantize_weight(w, layer), qmath.quantize_weight(w * 2.0**power, layer)
    assert torch.equal(scaled.codes, first.codes) and torch.equal(scaled.scale, first.scale * 2.0**power)


def test_fixed_point_fits():
    """amax of any exponent becomes 2^27..2^28; the sums below int64's limit for every count up to 2^32."""
    for exponent in range(-100, 128):
        for mantissa in (1.0, 1.9999999):
            amax = torch.tensor([mantissa * 2.0**exponent])
            unit = qmath.fixed_unit(amax)
            assert math.frexp(unit.item())[0] == 0.5 and 2**27 <= float(amax * unit) < 2**28
    for count in [2**power + d for power in range(33) for d in (-1, 0, 1)][1:]:
        shift = qmath.error_shift(count)
        assert shift == oracle.error_shift(count)
        assert (int(1.2 * 2**28) >> shift) ** 2 * count < 2**63 and 2**28 * count < 2**63
        assert shift == 6 or (int(1.2 * 2**28) >> (shift - 1)) ** 2 * 2 ** count.bit_length() >= 2**63


@pytest.mark.parametrize("quantizer, bits", [("ternary", 2), ("four_level", 2), ("mse", 4), ("mse", 8)])
def test_the_largest_sums(quantizer, bits):
    """K at its limit with every weight at amax, and a matrix long enough for a larger shift: no sum wraps."""
    w = torch.full((1, qmath.MAX_K), -1.9999999)
    w[0, ::3] = 1.0
    check_weight(w, LayerConfig(bits, quantizer))
    assert qmath.error_shift(9 * qmath.MAX_K) > 6
    whole = w.expand(9, -1)
    got = qmath.quantize_weight(whole, LayerConfig(bits, quantizer, "per_tensor"))
    row = qmath.quantize_weight(w, LayerConfig(bits, quantizer))
    assert torch.equal(got.scale, row.scale) and torch.equal(got.codes, row.codes.expand(9, -1))


def test_means_are_exact_to_the_last_bits():
    """Cut magnitudes leave a mean short by less than 2^-27 amax; here by at most a last digit."""
    w = weights(200, 768)
    got = qmath.quantize_weight(w, LayerConfig(2, "ternary"))
    ulps = 0
    for row, codes, scale in zip(w.numpy(), got.codes.numpy(), got.scale.numpy(), strict=True):
        exact = oracle._mean(np.abs(row)[codes != 0])
        assert abs(scale - exact) <= 2.0**-27 * np.abs(row).max() + np.spacing(scale) / 2
        ulps = max(ulps, abs(float(scale) - float(np.float32(exact))) / float(np.spacing(scale)))
    assert ulps <= 1


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_matrix_without_rows(layer):
    got = qmath.quantize_weight(torch.empty(0, 70), layer)
    assert got.codes.shape == (0, 70) and got.codes.dtype == torch.int8 and got.scale.dtype == torch.float32
    assert got.scale.tolist() == ([0.0] if layer.granularity == "per_tensor" else [])
    groups = -(-70 // layer.group_size)
    assert got.group_mult is None if layer.group_size == -1 else got.group_mult.shape == (0, groups)
    if layer.group_size != -1:
        assert got.group_mult.shape == (0, -(-70 // layer.group_size))


def test_a_group_of_zeros_is_zero_in_ternary():
    w = torch.randn(2, 64)
    w[0, :32] = 2.0**-110
    got = qmath.quantize_weight(w, LayerConfig(2, "ternary", group_size=32))
    assert (got.codes[0, :32] == 0).all() and got.codes[0, 32:].any()


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
def test_zero_rows_and_bad_rows(layer):
    w = weights(5, 70)
    w[1], w[3] = 0.0, 1e-38
    clean = qmath.quantize_weight(w, layer)
    if layer.granularity == "per_channel":
        for row in (1, 3):
            assert (clean.codes[row] == 0).all() and clean.scale[row] == 0
        assert (clean.scale[[0, 2, 4]] > 0).all()
    everything = qmath.quantize_weight(torch.zeros(2, 70), layer)
    assert (everything.codes == 0).all() and (everything.scale == 0).all()
    # Every position of a row, and Inf under a clip that would make it a number.
    for position in range(70):
        for bad in (NAN, INF):
            marked = w.clone()
            marked[2, position] = bad
            clipped = LayerConfig(layer.bits, layer.quantizer, layer.granularity, layer.group_size, weight_clip=2.5)
            for choice in (layer, clipped):
                got = qmath.quantize_weight(marked, choice)
                if layer.granularity == "per_tensor":
                    assert got.scale.isnan().all()
                else:
                    assert got.scale[2].isnan() and (got.codes[2] == 0).all()
                    assert got.scale[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
def test_codes_stay_in_range_and_float_types_agree(layer):
    w = weights(6, 130).to(torch.bfloat16)
    low, high = {2: (-2, 1) if layer.four_level else (-1, 1), 4: (-7, 7), 8: (-127, 127)}[layer.bits]
    first = qmath.quantize_weight(w, layer)
    assert int(first.codes.min()) >= low and int(first.codes.max()) <= high
    for dtype in (torch.float32, torch.float64):
        other = qmath.quantize_weight(w.to(dtype), layer)
        assert torch.equal(other.codes, first.codes) and torch.equal(other.scale, first.scale)
    back = qmath.fake_quantize(w, layer)
    assert back.dtype == torch.bfloat16
    # Half a step per element, ternary's dead zone aside: the codes do stand for these weights.
    assert (back.float() - w.float()).norm() < 0.75 * w.float().norm()


def test_weight_clip_comes_before_everything():
    w = torch.tensor([[5.0, -1.0, 0.5, 2.5]])
    for layer in (LayerConfig(4, "absmax", weight_clip=2.5), LayerConfig(2, "ternary", weight_clip=2.5)):
        got = qmath.quantize_weight(w, layer)
        wanted = qmath.quantize_weight(w.clamp(-2.5, 2.5), LayerConfig(layer.bits, layer.quantizer))
        unclipped = qmath.quantize_weight(w, LayerConfig(layer.bits, layer.quantizer))
        assert torch.equal(got.codes, wanted.codes) and torch.equal(got.scale, wanted.scale)
        assert not torch.equal(got.scale, unclipped.scale)


GROUPED = [(2, "ternary"), (2, "four_level"), (4, "absmax"), (4, "mse")]


@pytest.mark.parametrize("bits, quantizer", GROUPED)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("k", [31, 33, 129, 300])
def test_groups(k, size, bits, quantizer):
    """Steps per group are multiples 1..mult_max of one fp32 scale; codes are those of the step that is stored."""
    w = weights(6, k)
    layer = LayerConfig(bits, quantizer, "per_channel", size)
    got = qmath.quantize_weight(w, layer)
    limit = oracle.mult_max(bits, quantizer == "four_level", k)
    groups = -(-k // size)
    mult = got.group_mult.to(torch.int64)
    assert got.group_mult.dtype == torch.uint8 and tuple(mult.shape) == (6, groups)
    assert int(mult.min()) >= 1 and int(mult.max()) == limit == qmath.mult_max(bits, quantizer, k)
    row_step = got.scale * 2 if quantizer == "four_level" else got.scale
    for group in range(groups):
        part = w[:, group * size : (group + 1) * size]
        whole = qmath.quantize_weight(part, LayerConfig(bits, quantizer))
        own = whole.scale * 2 if quantizer == "four_level" else whole.scale
        # The group's own step, rounded to a multiple of the row's.
        wanted = np.clip(np.rint(own.numpy() / row_step.numpy()), 1, limit)
        assert_equal(mult[:, group], wanted.astype(np.int64), f"multiplier of group {group}")
        step = row_step.numpy() * mult[:, group].numpy().astype(np.float32)
        inv = (np.float32(1) / step)[:, None]
        values = part.numpy()
        if quantizer == "four_level":
            codes = np.clip(np.floor(values * inv), -2, 1)
        elif quantizer == "ternary":
            codes = oracle.ternary(values, False)[0]
        else:
            codes = np.rint(np.clip(values * inv, -7, 7))
        assert_equal(got.codes[:, group * size : (group + 1) * size], codes.astype(np.int64), f"group {group}")


@pytest.mark.parametrize("bits, quantizer", GROUPED)
@pytest.mark.parametrize("k", [1, 127, 768, 1041, 4096, 16_500, 131_071])
def test_mult_max_is_the_largest_that_cannot_overflow(bits, quantizer, k):
    limit = qmath.mult_max(bits, quantizer, k)
    level = {"absmax": 8, "mse": 8, "ternary": 1, "four_level": 3}[quantizer]
    assert limit == oracle.mult_max(bits, quantizer == "four_level", k)
    assert 1 <= limit <= 127 and limit * 127 * level * k <= 2**31 - 1
    assert limit == 127 or (limit + 1) * 127 * level * k > 2**31 - 1


def test_grouping_helps_where_rows_are_uneven():
    w = weights(16, 256) * torch.exp(torch.randn(1, 8)).repeat_interleave(32, dim=1)
    errors = [
        float((qmath.fake_quantize(w, LayerConfig(4, "absmax", "per_channel", size)) - w).square().sum())
        for size in (32, -1)
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("layer", LAYERS, ids=layer_ids)
def test_dequantize_equals_the_oracle(layer):
    w = weights(6, 130)
    got = qmath.quantize_weight(w, layer)
    mult = None if got.group_mult is None else got.group_mult.numpy()
    wanted = oracle.dequantize(got.codes.numpy(), got.scale.numpy(), mult, layer.four_level, layer.group_size)
    assert_equal(qmath.dequantize_weight(got, layer), wanted)


@pytest.mark.parametrize("quantizer, bits", [("four_level", 2), ("mse", 4)])
def test_the_search_does_not_depend_on_its_chunks(quantizer, bits, monkeypatch):
    w = weights(9, 50)
    layer = LayerConfig(bits, quantizer)
    whole = qmath.quantize_weight(w, layer)
    for elements in (100, 17):  # two rows at a time; parts of a row
        monkeypatch.setattr(qmath, "_SEARCH_ELEMENTS", elements)
        parts = qmath.quantize_weight(w, layer)
        assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scale, parts.scale)


def test_quantizing_leaves_the_weight_alone():
    w = weights(5, 40).requires_grad_()
    before = w.detach().clone()
    for layer in LAYERS:
        got = qmath.quantize_weight(w, LayerConfig(layer.bits, layer.quantizer, weight_clip=0.5))
        assert not got.scale.requires_grad
    assert torch.equal(w, before)


def test_refuses_what_could_overflow():
    layer = LayerConfig(2, "ternary")
    assert qmath.MAX_K == 131_071
    with pytest.raises(ValueError, match="in_features must be 1..131071 so that int32 sums stay exact, got 131072"):
        qmath.quantize_weight(torch.ones(1, 131_072), layer)
    assert int(qmath.quantize_weight(torch.ones(1, 131_071), layer).codes.sum()) == 131_071  # the limit itself
    with pytest.raises(ValueError, match=r"in_features must be 1\.\.131071.*got 0"):
        qmath.quantize_weight(torch.ones(1, 0), layer)
    with pytest.raises(ValueError, match=r"weight must be \[out_features, in_features\], got shape \[4\]"):
        qmath.quantize_weight(torch.ones(4), layer)
