"""csrc/cuda/skinny.cuh on the simulator, through the host API that the binding calls: eager's bits, any schedule."""

from __future__ import annotations

from types import SimpleNamespace

import compare
import harness
import numpy as np
import pytest
import skinny_cases as skinny
import torch
from torch.nn import functional

from dqkernels import packing, qmath, reference

SOURCES = ("skinny_host.cpp", "csrc/cuda/skinny.cpp", *(f"csrc/cuda/skinny_w{bits}.cu" for bits in (2, 4, 8)))
CASES = skinny.cases()


@pytest.fixture(scope="session")
def program(sim_program):
    return sim_program(*SOURCES)


def memory_of(program, scalars) -> tuple[int, int, int, int]:
    """workspace bytes, counter bytes, warps_n, splits."""
    status, (out,) = program.call("memory", scalars, [harness.wanted((4,), np.int64)], 0)
    assert status == 0
    return tuple(int(value) for value in out)


def run(program, case, function="launch") -> None:
    built = skinny.build(case)
    workspace, counters, _, _ = memory_of(program, built.scalars)
    given, expected = skinny.buffers(built, workspace, counters)
    harness.run_cases(program, [harness.Case(case.name, function, built.scalars, given, expected)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eager_bits_under_every_schedule(program, case):
    run(program, case)


def test_every_kernel_ran():
    """The covering rows reach each instance: width, groups or not, and each number of token tiles."""
    tiles = {case.form: set() for case in CASES}
    for case in CASES:
        tiles[case.form].add(next(t for t in (1, 2, 4, 8) if min(case.m, 64) <= 8 * t))
    assert all(found == {1, 2, 4, 8} for found in tiles.values()), tiles
    assert len(CASES) >= 60


# ------------------------------------------------------------------------------------- saturation, batch, LayerNorm


def plain(form, m, n, k, x="fp16", y="fp32", **more) -> SimpleNamespace:
    facts = {
        **{"layout": "contiguous", "mode": "per_token", "clip": None, "bias": None, "residual": None},
        **{"activation": "none", "granularity": "per_channel", "plan": (0, 0), "parts": 1, "seed": 5},
        **more,
    }
    return SimpleNamespace(form=form, m=m, n=n, k=k, x=x, y=y, name=f"W{form[0]} {form[1]} m{m} n{n} k{k} {x}", **facts)


def launch(program, built, norm=(), seed=0) -> list[np.ndarray]:
    workspace, counters, _, _ = memory_of(program, built.scalars)
    given, _ = skinny.buffers(built, workspace, counters, norm)
    status, outputs = program.call("launch", built.scalars, given, seed)
    assert status == 0
    return outputs


@pytest.mark.parametrize("form", [(8, "absmax", 0), (4, "absmax", 0), (2, "four_level", 0), (2, "four_level", 32)])
def test_sums_at_the_end_of_int32(program, form):
    """The largest codes of one sign over the longest K: int32 holds the sum, and no partial sum leaves it either."""
    k, bits = 131071, form[0]
    built = skinny.build(plain(form, 2, 1, k, x="fp32", plan=(8, 1)))  # one warp adds up all of K
    built.memory[:] = 1.0
    part = built.parts[0]
    codes = torch.full((1, k), -(1 << (bits - 1)), dtype=torch.int8)
    part.weight.packed, part.weight.scale = packing.pack(codes, bits), torch.ones(1)
    if part.weight.mult is not None:
        part.weight.mult.fill_(qmath.mult_max(bits, "four_level", k))
    y = launch(program, built)[-1]
    level = -(1 << (bits - 1)) if form[1] == "absmax" else -3
    exact = 127 * level * k * (1 if part.weight.mult is None else int(part.weight.mult[0, 0]))
    assert abs(exact) < 1 << 31
    assert y.flatten().tolist() == [float(np.float32(np.float32(exact) * np.float32(1 / np.float32(127))))] * 2


@pytest.mark.parametrize("form", [(4, "absmax", 0), (2, "ternary", 64)])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_row_does_not_know_its_batch(program, form, normalized):
    """The same bits for a row alone and among 2 .. 16, also where a LayerNorm sums floats, and the rows it leaves."""
    k, x = 392, "fp32" if normalized else "fp16"
    norm = (torch.linspace(0.5, 1.5, k), torch.linspace(-1, 1, k))
    built = skinny.build(plain(form, 16, 24, k, x=x, bias="fp16", y="fp16"))
    whole = launch(program, built, norm_buffers(built, *norm) if normalized else ())
    for m in (1, 2, 5, 8, 9):
        part = skinny.build(plain(form, 16, 24, k, x=x, bias="fp16", y="fp16"))
        part.memory, part.scalars = built.memory[:m], [m, *built.scalars[1:]]
        part.expected = [built.expected[0][:m]]
        for got, all_rows in zip(
            launch(program, part, norm_buffers(part, *norm) if normalized else ()), whole, strict=True
        ):
            np.testing.assert_array_equal(got, all_rows[:m])


def norm_buffers(built, weight: torch.Tensor, bias: torch.Tensor | None, eps: float = 1e-5) -> tuple:
    built.scalars[6] = eps
    dtype = skinny.DTYPES[built.case.x]
    y = skinny.raw(torch.zeros(built.memory.shape[0], built.case.k, dtype=dtype))
    given = (skinny.given(weight.to(dtype)), skinny.given(None if bias is None else bias.to(dtype)))
    return (*given, harness.wanted(y.shape, y.dtype))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("k", [7, 264, 2056])
@pytest.mark.parametrize("x", ["fp16", "bf16", "fp32"])
def test_layernorm_on_the_way_in(program, x, k, m, with_bias):
    """The normalized rows within the bound; their codes, and so the results, exactly those of the rows stored."""
    case = plain((4, "absmax", 0), m, 17, k, x=x, mode="per_tensor" if m == 3 else "per_token", plan=(2, 0))
    built = skinny.build(case)
    draw = torch.Generator().manual_seed(k + m)
    stride = k + 8 if m == 3 else k
    built.memory = (torch.randn(m, stride, generator=draw) * 3 + 40).to(skinny.DTYPES[x])
    built.scalars[NAMES.index("row_stride")], rows = stride, built.memory[:, :k]
    weight, bias = torch.rand(k, generator=draw) + 0.5, torch.randn(k, generator=draw) if with_bias else None
    norm = norm_buffers(built, weight, bias)
    first = launch(program, built, norm)
    for seed in harness.SEEDS[1:]:
        for again, before in zip(launch(program, built, norm, seed), first, strict=True):
            np.testing.assert_array_equal(again, before)
    y = skinny.from_raw(first[0], x)
    weight, bias = (None if t is None else t.to(skinny.DTYPES[x]) for t in (weight, bias))
    truth = functional.layer_norm(rows.double(), (k,), weight.double(), None if bias is None else bias.double(), 1e-5)
    compare.assert_bounded(y, truth, functional.layer_norm(rows, (k,), weight, bias, 1e-5))
    q, scale, _ = qmath.quantize_activation(y, case.mode)
    w = built.parts[0].weight
    expected = reference.qgemm(
        *(q, scale, None, w.packed, w.scale, None, None, None),
        **{"bits": 4, "four_level": False, "group_size": -1, "out_features": 17, "activation": "none"},
        out_dtype=torch.float32,
    )
    compare.assert_same_bits(torch.from_numpy(first[-1].copy()), expected)


def test_layernorm_where_the_mean_is_not_a_float(program):
    """A mean far beyond the spread: its rounding is taken back, and the variance does not see it."""
    k = 392
    built = skinny.build(plain((4, "absmax", 0), 2, 16, k, x="fp32"))
    draw = torch.Generator().manual_seed(3)
    built.memory = torch.randint(0, 4, (2, k), generator=draw) * 0.0625 + 999999.9
    built.memory[1] += 0.5
    y = torch.from_numpy(launch(program, built, norm_buffers(built, torch.ones(k), None))[0].copy())
    truth = functional.layer_norm(built.memory.double(), (k,), eps=1e-5)
    assert (y - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "odd rows"])
@pytest.mark.parametrize("x", ["fp16", "fp32"])
def test_layernorm_of_rows_with_one_that_is_not_finite(program, x, layout):
    """It is NaN in all that comes of it, and its neighbours' bits do not notice."""
    k = 72
    case = plain((8, "absmax", 0), 5, 16, k, x=x, layout=layout)
    norm = (torch.linspace(0.5, 1.5, k), torch.linspace(-1, 1, k))
    built = skinny.build(case)
    stride = built.scalars[2]
    clean = launch(program, built, norm_buffers(built, *norm))
    for value in (float("nan"), float("inf")):
        built.memory.view(-1)[3 * stride + 70] = value
        got = launch(program, built, norm_buffers(built, *norm))
        for array, before in zip(got, clean, strict=True):
            assert np.isnan(array[3]).all() and np.isfinite(before).all()
            np.testing.assert_array_equal(np.delete(array, 3, 0), np.delete(before, 3, 0))


CHUNKED = [
    plain((8, "absmax", 0), 64, 33, 999, x="int8", layout="odd rows", plan=(8, 1)),
    plain((4, "absmax", 0), 20, 17, 3000, x="int8", layout="wide rows", plan=(1, 1)),
    plain((2, "four_level", 0), 16, 33, 3000, x="fp16", plan=(2, 1)),
    plain((2, "four_level", 64), 16, 17, 2999, x="bf16", plan=(2, 1)),
    plain((4, "absmax", 128), 65, 16, 1800, x="int8", layout="wide rows", plan=(8, 2)),
]


@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: case.name)
def test_a_slice_of_more_than_one_chunk(program, case):
    """Rows that shared memory does not hold at once go through two buffers in turn."""
    run(program, case)


@pytest.mark.parametrize("k", [264, 129])
@pytest.mark.parametrize("x", ["fp16", "bf16", "fp32"])
def test_the_maximum_is_found_at_every_place(program, x, k):
    run(program, plain((4, "absmax", 0), 16, 16, k, x=x, peaks=True))


@pytest.mark.parametrize("form", [(8, "absmax", 0), (2, "four_level", 32)])
@pytest.mark.parametrize("x", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("k", [96, 31])
def test_rows_further_apart_than_int32_counts(program, form, x, k):
    run(program, plain(form, 3, 16, k, x=x), function="launch far rows")


@pytest.mark.parametrize("y", ["fp16", "bf16"])
def test_results_halfway_between_two_numbers(program, y):
    """Ties to even on both sides, the subnormals of fp16, the edge of its range, NaN: as torch rounds."""
    built = skinny.build(plain((8, "absmax", 0), 3, 16, 4, x="int8", y=y))
    # Accumulators 0 .. 17 and 127 .. 142, odd multiples of half a step of the results with one scale or another.
    codes = torch.zeros(16, 4, dtype=torch.int8)
    codes[:, 0], codes[:, 1] = torch.arange(16), 1
    built.memory = torch.tensor([[1, 0, 0, 0], [1, 2, 0, 0], [1, 127, 0, 0]], dtype=torch.int8)
    weight = built.parts[0].weight
    weight.packed = packing.pack(codes, 8)
    acc = built.memory.float() @ codes.T.float()
    for exponent in (-25, -24, -133, -9, 0, 13):
        for numerator in (1.0, 129.0, 257.0, 1025.0, 2049.0, 4095.0, float("nan")):
            weight.scale = torch.full((16,), numerator * 2.0**exponent)
            built.scale = torch.ones(3)
            expected = skinny.raw((acc * weight.scale).to(skinny.DTYPES[y]))
            said = harness.difference(launch(program, built)[-1], expected)
            assert said is None, f"{numerator} * 2^{exponent}: {said}"


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, 0xFFC00000])
def test_no_nan_becomes_a_code(program, bits):
    built = skinny.build(plain((8, "absmax", 0), 2, 16, 4, y="int8", residual="fp32"))
    built.parts[0].residual.numpy().view(np.uint32)[1, 3] = bits
    built.expected[0][1, 3] = 0
    np.testing.assert_array_equal(launch(program, built)[-1], built.expected[0].numpy())


def test_gelu_within_the_bound(program):
    built = skinny.build(plain((8, "absmax", 0), 5, 33, 130, y="fp32", bias="fp32", activation="gelu", parts=2))
    for part, got in zip(built.parts, launch(program, built), strict=True):
        options = {"bits": 8, "four_level": False, "group_size": -1, "out_features": part.n, "out_dtype": torch.float32}
        w = part.weight
        operands = (built.q, built.scale, None, w.packed, w.scale, None, part.bias, None)
        t = reference.qgemm(*operands, **options, activation="none")
        truth = functional.gelu(t.double())
        compare.assert_bounded(torch.from_numpy(got.copy()), truth, functional.gelu(t))


# ------------------------------------------------------------------------------------------------ refusals, the plan

#: scalar, value, Status: what the host refuses before anything is launched.
REFUSED = [
    ("bits", 3, "bad_bits"),
    ("m", -1, "bad_size"),
    ("k", 0, "bad_size"),
    ("k", 131072, "k_too_large"),
    ("m", 17, "bad_prologue"),
    ("m", 1 << 61, "bad_prologue"),
    ("mode", 3, "bad_mode"),
    ("x_dtype", 4, "bad_dtype"),
    ("y_dtype", 9, "bad_dtype"),
    ("y_dtype", 3, "bad_output"),
    ("clip", float("nan"), "bad_clip"),
    ("clip", -1.0, "bad_clip"),
    ("four_level", 1, "bad_bits"),
    ("group_size", 48, "bad_group_size"),
    ("activation", 3, "bad_activation"),
    ("part_count", 0, "bad_part"),
    ("part_count", 4, "bad_part"),
    ("n", 0, "bad_part"),
    ("n", 1 << 60, "size_overflow"),
    ("warps_n", 3, "bad_plan"),
    ("splits", 9, "bad_plan"),
    ("sms", 0, "bad_plan"),
]
NAMES = ("m k row_stride x_dtype mode clip norm_eps bits four_level group_size tensor_scale bias_dtype residual_dtype "
         "activation y_dtype warps_n splits sms part_count n").split()  # fmt: skip


@pytest.mark.parametrize(("name", "value", "status"), REFUSED)
def test_the_host_refuses(program, name, value, status):
    built = skinny.build(plain((4, "absmax", 0), 2, 16, 64))
    built.scalars[NAMES.index(name)] = value
    if name in ("warps_n", "splits"):
        built.scalars[NAMES.index("warps_n" if name == "splits" else "splits")] = 1
    given, _ = skinny.buffers(built, 0, 0)
    got, _ = program.call("launch", built.scalars, given, 0)
    assert harness.statuses()[got] == status


#: which buffer to leave out, in which case; the Status.
POINTERS = [
    (0, {}, "bad_size"),
    (1, {"x": "int8"}, "bad_act_scale"),
    (1, {"mode": "static"}, "bad_act_scale"),
    (4, {}, "bad_prologue"),
    (5, {"y": "int8"}, "bad_output"),
    (8, {}, "bad_part"),
    (9, {}, "bad_part"),
    (10, {"form": (4, "absmax", 32)}, "bad_part"),
    (13, {}, "bad_part"),
]


@pytest.mark.parametrize(("place", "facts", "status"), POINTERS)
def test_the_host_refuses_a_missing_buffer(program, place, facts, status):
    built = skinny.build(plain(**{"form": (4, "absmax", 0), "m": 2, "n": 16, "k": 64, **facts}))
    norm = norm_buffers(built, torch.ones(64), None) if place == 4 else ()
    given, _ = skinny.buffers(built, 0, 0, norm)
    given[place] = harness.ABSENT
    got, _ = program.call("launch", built.scalars, given, 0)
    assert harness.statuses()[got] == status


@pytest.mark.parametrize("refused", ["a norm of int8 rows", "a scale for a float output", "weights off 16 bytes"])
def test_the_host_refuses_what_does_not_belong(program, refused):
    int8 = refused == "a norm of int8 rows"
    built = skinny.build(plain((4, "absmax", 0), 2, 16, 64, x="int8" if int8 else "fp16"))
    norm = tuple(harness.given(np.zeros(256, np.uint8)) for _ in range(3)) if int8 else ()
    given, _ = skinny.buffers(built, 0, 0, norm)
    if refused == "a scale for a float output":
        given[5] = harness.given(np.ones(1, np.float32))
    if refused == "weights off 16 bytes":
        given[8] = harness.given(given[8].array, 8)
    got, _ = program.call("launch", built.scalars, given, 0)
    assert harness.statuses()[got] == {"a n": "bad_prologue", "a s": "bad_output", "wei": "bad_part"}[refused[:3]]


def test_no_rows_no_launch(program):
    built = skinny.build(plain((4, "absmax", 0), 2, 16, 64))
    built.scalars[0] = 0
    y = launch(program, built)[0]
    assert (y.view(np.uint8) == 0xA5).all()


def test_a_split_needs_its_workspace(program):
    built = skinny.build(plain((4, "absmax", 0), 2, 16, 512, plan=(1, 2)))
    given, _ = skinny.buffers(built, 0, 0)
    got, _ = program.call("launch", built.scalars, given, 0)
    assert harness.statuses()[got] == "no_workspace"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("x", ["fp16", "int8"])
def test_the_rule_has_a_plan_for_every_size(program, bits, x):
    """Sizes up to the largest heads and longest K, no memory touched: a choice exists and its memory is bounded."""
    for m in (1, 8, 16) if x == "fp16" else (1, 16, 33, 64, 100_000):
        for n, k in ((1, 1), (768, 768), (1024, 4096), (250027, 1024), (4096, 131071), (22016, 4096), (16, 131071)):
            scalars = [m, k, k, skinny.CODES[x], 0, 0.0, 0.0, bits, 0, 0, 0, 0, 0, 0, 1, 0, 0, 132, 1, n]
            workspace, counters, warps_n, splits = memory_of(program, scalars)
            assert warps_n in (1, 2, 4, 8) and 1 <= splits <= max(1, -(-k // 256))
            assert (workspace > 0) == (counters > 0) == (splits > 1)
            assert workspace <= 16 * 4 * (-(-n // 128) * 128) * (-(-m // 64) * 64)


def test_the_rule_fills_the_gpu(program):
    """Small layers get a block per 16 rows, a head gets 128 rows a block, and 64 tokens share what they load."""

    def plan(m, n, k, x="fp16", bits=4):
        return memory_of(program, [m, k, k, skinny.CODES[x], 0, 0.0, 0.0, bits, 0, 0, 0, 0, 0, 0, 1, 0, 0, 132, 1, n])

    assert plan(1, 768, 768)[2:] == (1, 1)
    assert plan(16, 50265, 1024)[2] == 8
    warps_n, splits = plan(64, 4096, 4096, "int8")[2:]
    assert warps_n * splits >= 4
