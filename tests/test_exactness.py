"""Promise P1: no element differs. Every op and every backend of this machine against the int64 oracle.

An oracle row is an int64 sum and four float32 roundings in numpy (tests/oracle.py); it shares no line with the
package. `activation="gelu"` and the attention are float ops and stand in test_reference with a bound.
"""

import json

import cpu_grid_checks
import grids
import numpy as np
import oracle
import programs
import pytest
import torch
from compare import assert_equal, assert_same_bits
from cpu_grid_checks import as_numpy, draw

from dqkernels import backends, ops, packing, qmath
from dqkernels.kernels import native

CASES = grids.gemm_cases()


def backends_for(op, **facts):
    """Every backend that takes CPU tensors for this op here; eager is always one of them."""
    backends.refresh()
    return [name for name in backends.NAMES if backends.refusal(name, op, "cpu", facts) is None]


def test_the_grid_is_what_it_claims():
    assert len(CASES) == len(grids.GEMM_SHAPES) * len(grids.FORMATS) >= 200
    for field, wanted in (
        ("bits", {2, 4, 8}),
        ("mode", set(grids.ACT_MODES)),
        ("dtype", set(grids.DTYPES)),
        ("layout", set(grids.LAYOUTS)),
        ("group_size", {-1, 32, 64, 128}),
        ("granularity", {"per_channel", "per_tensor"}),
        ("clip", {None, 2.5}),
        ("activation", {"none", "relu"}),
    ):
        assert {getattr(case, field) for case in CASES} == wanted
    pairs = {(case.bits, case.mode, case.dtype) for case in CASES}
    assert len(pairs) == 3 * 3 * 3, "some width never meets some mode in some dtype"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_qlinear_has_no_element_that_differs_from_the_oracle(case):
    names = backends_for("qgemm", bits=case.bits, group_size=case.group_size)
    assert "eager" in names
    cpu_grid_checks.assert_qlinear(case, [*names, "auto"])


@pytest.fixture(scope="module")
def on_every_set():
    """{instruction set: the whole grid on the compiled core with it}."""
    if native.native() is None:
        pytest.skip(native.why_absent())
    return {isa: programs.run(cpu_grid_checks, isa) for isa in native.native().cpu_isas()}


def test_every_instruction_set_of_this_cpu_has_the_oracles_bits(on_every_set):
    for isa, done in on_every_set.items():
        assert done.returncode == 0, f"{isa}: {done.stderr[-3000:]}"
        report = json.loads(done.stdout)
        assert report["isa"] == isa and report["cases"] == len(CASES)
    assert len({json.loads(done.stdout)["digest"] for done in on_every_set.values()}) == 1


@pytest.mark.parametrize("case", CASES[:: len(grids.FORMATS) + 1], ids=str)
def test_qgemm_and_the_quantizers_apart(case):
    """The two halves of qlinear on every backend that has them, with the row sum given and not."""
    codes, scale, mult, x, bias, residual, act_scale = draw(case)
    static = None if act_scale is None else torch.tensor([act_scale])
    flat = as_numpy(x).reshape(case.m, case.k)
    wanted_q, wanted_scale, wanted_sum = oracle.quantize_activation(flat, case.mode, case.clip, act_scale)
    for backend in backends_for("quantize_activation", mode=case.mode):
        q, act, row_sum = ops.quantize_activation(x, case.mode, case.clip, True, static, backend)
        assert_equal(q, wanted_q, f"{backend} codes", may_be_zero=case.m == 0)
        assert_equal(act, wanted_scale, f"{backend} scale", may_be_zero=case.m == 0)
        assert_equal(row_sum, wanted_sum, f"{backend} row_sum", may_be_zero=True)
    acc = oracle.accumulate(wanted_q, codes, mult, case.four_level, case.group_size)
    exact = oracle.epilogue(acc, wanted_scale, scale, as_numpy(bias), as_numpy(residual), case.activation)
    wanted = oracle.round_to(exact, str(case.dtype).removeprefix("torch."))
    qweight = torch.from_numpy(oracle.pack_fast(codes, case.bits))
    multipliers = None if mult is None else torch.from_numpy(mult)
    for backend in backends_for("qgemm", bits=case.bits, group_size=case.group_size):
        for sums in (row_sum, None):
            got = ops.qgemm(
                q, act, sums, qweight, torch.from_numpy(scale), multipliers, bias, residual, case.bits,
                case.four_level, case.group_size, case.n, case.activation, case.dtype, backend,
            )  # fmt: skip
            assert_equal(got, wanted, f"{backend} {case}", may_be_zero=case.m * case.n < 8)


# -------------------------------------------------------------------------------------- packing, both writers


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m, n, k, why", grids.GEMM_SHAPES, ids=lambda value: str(value).replace(" ", "_")[:20])
def test_eager_and_native_pack_are_the_oracle(m, n, k, why, bits):
    low, high = packing.code_range(bits)
    codes = np.random.default_rng(k).integers(low, high + 1, (n, k)).astype(np.int8)
    wanted = oracle.pack_fast(codes, bits)
    tensor = torch.from_numpy(codes)
    assert_equal(packing.pack(tensor, bits), wanted, f"eager, {why}", may_be_zero=n * k < 8)
    if native.native() is None:
        pytest.skip(f"the native half: {native.why_absent()}")
    assert_equal(native.pack(tensor, bits), wanted, f"native, {why}", may_be_zero=n * k < 8)
    assert_equal(native.unpack(torch.from_numpy(wanted), n, k, bits), codes, f"native, {why}", may_be_zero=n * k < 8)


@pytest.mark.parametrize("layout", grids.LAYOUTS)
@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
@pytest.mark.parametrize("mode", grids.ACT_MODES)
def test_native_quantizer_is_the_oracle(mode, dtype, layout):
    if native.native() is None:
        pytest.skip(native.why_absent())
    for k in (1, 3, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 1041):
        x = torch.randn(7, k) * 3
        x[1], x[2], x[3] = 0.0, 2.0**-101, 3e4
        if mode != "per_tensor":
            x[4, k // 2], x[5, -1] = float("nan"), float("-inf")
        x = grids.LAYOUTS[layout](x.to(dtype))
        for clip in (None, 2.5):
            static = 0.017 if mode == "static" else None
            wanted = oracle.quantize_activation(x.float().numpy(), mode, clip, static)
            got = native.quantize_rows(x, mode, clip, None if static is None else torch.tensor([static]), True)
            for name, g, w in zip(("codes", "scale", "row_sum"), got, wanted, strict=True):
                assert_equal(g, w, f"{name} K={k} clip={clip}", may_be_zero=True)


# ---------------------------------------------------------------------------------------------- end to end

WHOLE = [(bits, quantizer, granularity, group) for bits, quantizer, group, granularity in grids.FORMATS]


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
@pytest.mark.parametrize("mode", grids.ACT_MODES)
@pytest.mark.parametrize("k", [1, 40, 300])
def test_native_codes_behind_a_norm_and_gelu_are_eagers(mode, dtype, k):
    """The float op is bounded (test_cpu_norm), but whatever it says, the codes behind it are exact: those of y."""
    torch.manual_seed(k)
    x = torch.randn(3, 5, k).to(dtype)
    if mode != "per_tensor":
        x[1, 2, k // 2] = float("nan")
    static = torch.tensor([0.03]) if mode == "static" else None
    weight, bias = torch.rand(k).to(dtype), torch.randn(k).to(dtype)
    for residual, added, clip in ((None, bias, None), (torch.randn(3, 5, k).to(dtype), None, 0.7)):
        for backend in ("eager", "cpu"):
            y, *codes = ops.layernorm_quantize(
                x, residual, weight, added, 1e-5, mode, clip, True, static, backend=backend
            )
            again = ops.quantize_activation(y, mode, clip, True, static, backend="eager")
            for a, b in zip(codes, again, strict=True):
                assert_same_bits(a, b, may_be_zero=k == 1)
        near, mine = (
            ops.gelu_quantize(x.transpose(0, 1), mode, clip, True, static, backend=backend)
            for backend in ("eager", "cpu")
        )
        assert (near[0].int() - mine[0].int()).abs().max() <= 1
        assert torch.equal(near[1].isnan(), mine[1].isnan())


@pytest.mark.parametrize("bits, quantizer, granularity, group_size", [*WHOLE, (4, "mse", "per_channel", 64)])
def test_quantize_weight_then_qlinear(bits, quantizer, granularity, group_size):
    """What `quantize_weight` stores is what the GEMM and `dequantize_weight` read."""
    n, k, m = 21, 131, 5
    w, x = torch.randn(n, k), torch.randn(m, k)
    four_level = quantizer == "four_level"
    names = backends_for("quantize_weight", bits=bits, quantizer=quantizer, group_size=group_size)
    first = None
    for backend in names:
        stored = ops.quantize_weight(w, bits, quantizer, granularity, group_size, None, backend)
        if first is None:
            first = stored
        for got, wanted in zip(stored, first, strict=True):
            assert_same_bits(got, wanted, backend, may_be_zero=True)
    qweight, scale, mult = first
    mult = None if group_size == -1 else mult
    codes = np.array([[oracle.code_at(row, i, bits) for i in range(k)] for row in qweight.numpy()[:n]])
    assert_equal(oracle.pack(codes, bits), qweight, "padding included")
    y = ops.qlinear(
        x, qweight, scale, mult, None, None, bits, four_level, group_size, n, "per_token", None, None, "none",
        torch.float32,
    )  # fmt: skip
    wanted = oracle.qlinear(
        x.numpy(), codes, scale.numpy(), None if mult is None else mult.numpy(), four_level=four_level,
        group_size=group_size, mode="per_token", clip=None, act_scale=None, bias=None, residual=None,
        activation="none", dtype="float32",
    )  # fmt: skip
    assert_equal(y, wanted)
    multipliers = None if mult is None else mult.numpy()
    for backend in backends_for("dequantize_weight", bits=bits, group_size=group_size):
        matrix = ops.dequantize_weight(qweight, scale, mult, bits, four_level, group_size, n, k, backend)
        assert_equal(matrix, oracle.dequantize(codes, scale.numpy(), multipliers, four_level, group_size), backend)
    assert float((y - x @ matrix.t()).abs().max()) < 0.1 * float(y.abs().max()), "8-bit activations are that close"


@pytest.mark.parametrize("bits, quantizer, granularity, group_size", WHOLE)
@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
def test_qembedding_is_the_oracle(bits, quantizer, granularity, group_size, dtype):
    rows, width = 53, 70
    rng = np.random.default_rng(bits)
    low, high = grids.CODE_RANGE.get(quantizer, (-7, 7))
    codes = rng.integers(low, high + 1, (rows, width))
    scale = rng.random(1 if granularity == "per_tensor" else rows).astype(np.float32)
    groups = -(-width // group_size)
    mult = None if group_size == -1 else rng.integers(1, 128, (rows, groups)).astype(np.uint8)
    ids = torch.from_numpy(rng.integers(0, rows, (3, 4)))
    qweight = torch.from_numpy(oracle.pack_fast(codes, bits))
    name = str(dtype).removeprefix("torch.")
    for embed_scale in (1.0, np.sqrt(768.0)):
        for position in (None, torch.randn(3, 4, width), torch.randn(4, width).to(dtype)):
            wanted = oracle.qembedding(
                ids.numpy(), codes, scale, mult, four_level=quantizer == "four_level", group_size=group_size,
                embed_scale=embed_scale, position=as_numpy(position), dtype=name,
            )  # fmt: skip
            for backend in [*backends_for("qembedding", bits=bits), "auto"]:
                for indices in (ids, ids.int()):
                    got = ops.qembedding(
                        indices, qweight, torch.from_numpy(scale),
                        None if mult is None else torch.from_numpy(mult), position, bits,
                        quantizer == "four_level", group_size, rows, width, embed_scale, dtype, backend,
                    )  # fmt: skip
                    assert got.dtype == dtype
                    assert_equal(got, wanted, f"{backend} embed_scale={embed_scale}")


# ------------------------------------------------------------------------------------------------- extremes


def saturated_case(k, bits, four_level, group_size, sign):
    largest = {2: 1, 4: -8, 8: 127}[bits]
    codes = np.full((3, k), largest, np.int64)
    codes[1, ::2] = 1
    mult = None
    if group_size != -1:
        limit = oracle.mult_max(bits, four_level, k)
        mult = np.full((3, -(-k // group_size)), limit, np.uint8)
    return codes, mult, torch.full((2, k), 3.0 * sign)


@pytest.mark.parametrize("bits, four_level, group_size", [
    (8, False, -1), (4, False, -1), (4, False, 128), (2, False, -1), (2, True, -1), (2, False, 32), (2, True, 32),
])  # fmt: skip
@pytest.mark.parametrize("k", [127, 1041, 8192, qmath.MAX_K])
def test_saturated_sums_are_exact_up_to_the_largest_k(k, bits, four_level, group_size):
    """Every code at its largest, every activation at +-127: the largest int32 that the format can ask for."""
    for sign in (1, -1):
        codes, mult, x = saturated_case(k, bits, four_level, group_size, sign)
        q, act, _ = oracle.quantize_activation(x.numpy(), "per_token")
        assert (np.abs(q) == 127).all()
        acc = oracle.accumulate(q, codes, mult, four_level, group_size)
        scale = np.full(3, 2.0**-20, np.float32)
        wanted = oracle.epilogue(acc, act, scale)
        got = ops.qlinear(
            x, torch.from_numpy(oracle.pack_fast(codes, bits)), torch.from_numpy(scale),
            None if mult is None else torch.from_numpy(mult), None, None, bits, four_level, group_size, 3,
            "per_token", None, None, "none", torch.float32,
        )  # fmt: skip
        assert_equal(got, wanted, f"sign {sign}")
    if k == qmath.MAX_K and group_size != -1:
        assert np.abs(acc).max() > 2**29, "the multipliers do not use the range: this is no extreme"


@pytest.mark.parametrize("quantizer, bits", [("ternary", 2), ("four_level", 2), ("absmax", 4), ("absmax", 8)])
def test_non_finite_rows_stay_in_their_row(quantizer, bits):
    x = torch.randn(6, 40)
    qweight, scale, _ = ops.quantize_weight(torch.randn(9, 40), bits, quantizer, "per_channel")
    tail = (bits, quantizer == "four_level", -1, 9, "per_token", None, None, "none", torch.float32)
    clean = ops.qlinear(x, qweight, scale, None, None, None, *tail)
    for position in range(40):
        bad = x.clone()
        bad[2, position], bad[4, 39 - position] = float("inf"), float("nan")
        y = ops.qlinear(bad, qweight, scale, None, None, None, *tail)
        assert y[[2, 4]].isnan().all()
        assert_same_bits(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


# ---------------------------------------------------------------------------------------- batch invariance


def batched(mode, activation, dtype=torch.float32, name=(4, "absmax", -1)):
    bits, quantizer, group_size = name
    n, k = 37, 75
    qweight, scale, mult = ops.quantize_weight(torch.randn(n, k), bits, quantizer, "per_channel", group_size)
    bias = torch.randn(n)
    act_scale = torch.tensor([0.02]) if mode == "static" else None

    def run(x, backend="auto"):
        return ops.qlinear(
            x, qweight, scale, None if group_size == -1 else mult, bias, None, bits, quantizer == "four_level",
            group_size, n, mode, 2.5, act_scale, activation, dtype, backend,
        )  # fmt: skip

    return run, torch.randn(64, k).to(dtype)


@pytest.mark.parametrize("activation, backend", [("none", "eager"), ("gelu", "auto")])
@pytest.mark.parametrize("name", [(4, "absmax", -1), (2, "four_level", -1), (2, "four_level", 32)], ids=str)
@pytest.mark.parametrize("mode", ["per_token", "static"])
def test_a_row_does_not_depend_on_its_batch(mode, name, activation, backend):
    """Batch 1 to 64, at its start or end, in another order, beside padding of any content, in 3 dimensions."""
    run, x = batched(mode, activation, name=name)
    whole = run(x, backend)
    for batch in range(1, 65):
        assert_same_bits(run(x[:batch], backend), whole[:batch], f"the first {batch}")
    for batch in (1, 2, 3, 16, 17, 63):
        assert_same_bits(run(x[64 - batch :], backend), whole[64 - batch :], f"the last {batch}")
    order = torch.randperm(64)
    assert_same_bits(run(x[order], backend), whole[order], "another order")
    assert_same_bits(run(x.reshape(4, 16, -1), backend).reshape(64, -1), whole, "sequences")
    for padding in (0.0, 1e30, float("nan"), float("inf")):
        padded = torch.cat([torch.full((3, x.shape[1]), padding), x, torch.full((5, x.shape[1]), padding)])
        assert_same_bits(run(padded, backend)[3:67], whole, f"padding of {padding}")


def test_per_tensor_is_the_mode_without_that_promise():
    """Not a wish but a fact to be known: one loud batch mate changes every row (DQ-BART's rule)."""
    run, x = batched("per_tensor", "none")
    loud = x.clone()
    loud[63, 0] = 2.5
    quiet = x.clamp(-1, 1)
    loud[:63] = quiet[:63]
    assert not torch.equal(run(loud)[:63], run(quiet)[:63])
    assert_same_bits(run(x), run(x.clone()), "it does repeat")


def test_runs_repeat():
    run, x = batched("per_token", "gelu")
    first = run(x)
    for _ in range(50):
        assert_same_bits(run(x), first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_same_bits(run(x), first, "one thread")
    finally:
        torch.set_num_threads(threads)
