"""The skinny CUDA GEMM on a GPU: eager's bits over poisoned outputs, whatever the sizes, values, layouts and cuts."""

from __future__ import annotations

import functools

import compare
import pairwise
import pytest
import skinny_calls
import torch
from skinny_calls import assert_expected, call_of, cases, outputs_of, plain, poison, same, weight_of
from torch.nn import functional

from dqkernels import ops, packing, qmath
from dqkernels.kernels import native, skinny

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROWS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 257, 1023)
#: One before, at and after the edges of what a fragment, a warp, a block, a segment and a slice hold.
EDGES = sorted({edge + step for edge in (16, 32, 64, 128, 256) for step in (-1, 0, 1)})
FORMS = cases.FORMS


@pytest.fixture(scope="module", autouse=True)
def usable():
    from dqkernels.backends import cuda

    available, reason = cuda.available("cuda")
    if not available:
        pytest.skip(reason)


# ------------------------------------------------------------------------------------------------ eager's bits


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: case.name)
def test_covering_cases(case):
    """Parts, plans, int8 outputs, wide, odd, expanded and unaligned rows: the simulator's cases, over poison."""
    call, built = call_of(case)
    for _ in range(2):  # with counters that are new, and that the first launch left
        poison(outputs_of(call))
        assert_expected(skinny_calls.gemm(call), built.expected, case.name)


VALUES = {
    "m": ROWS,
    "n": (1, 2, *EDGES),
    "k": (1, 2, 100, *EDGES, 383, 384, 1000, 1041),
    "form": FORMS,
    "x": ("fp16", "bf16", "fp32"),
    "mode": ("per_token", "per_tensor", "static"),
    "clip": (None, 1.5),
    "bias": (None, "fp16", "fp32"),
    "residual": (None, "bf16", "fp16"),
    "activation": ("none", "relu"),
    "granularity": ("per_channel", "per_tensor"),
    "rows": ("random", "saturated", "hard"),
    "op": ("qlinear", "qgemm"),
}


def allowed(row: dict) -> bool:
    return row.get("granularity") != "per_tensor" or not row.get("form", (0, 0, 0))[2]


@functools.cache
def sweep():
    """About 400 calls: every M meets every N, K and form."""
    return pairwise.covering(VALUES, allowed, candidates=2)


def input_rows(kind, m, k, dtype, draw):
    x = torch.randn(m, k, generator=draw) * 2
    if kind == "saturated":  # every code +-127
        x = torch.where(x < 0, -3.0, 3.0)
    elif kind == "hard" and m:
        for row, value in enumerate((0.0, float("nan"), float("inf"), float("-inf"), 2.0**-110, 6e4)):
            at = slice(None) if row == 0 else row % k
            x[row % m, at] = value
        x[-1] *= 1e-4
    return x.to(dtype)


def call_through_ops(row, seed, device, backend):
    """The op's result; its tensors are drawn on the CPU, the same for every device."""
    draw = torch.Generator().manual_seed(seed)
    bits, rule, group = row["form"]
    m, n = row["m"], row["n"]
    dtype = cases.DTYPES[row["x"]]
    x = input_rows(row["rows"], m, row["k"], dtype, draw)
    weight = weight_of(row, draw)
    bias = None if row["bias"] is None else torch.randn(n, generator=draw).to(cases.DTYPES[row["bias"]])
    residual = None if row["residual"] is None else torch.randn(m, n, generator=draw).to(cases.DTYPES[row["residual"]])
    act_scale = torch.tensor([0.0213]) if row["mode"] == "static" else None
    facts = {"bits": bits, "four_level": rule == "four_level", "group_size": group or -1, "out_features": n,
             "activation": row["activation"], "out_dtype": dtype, "backend": backend}  # fmt: skip

    def there(tensor):
        return None if tensor is None else tensor.to(device)

    operands = [there(tensor) for tensor in (*weight, bias, residual)]
    if device != "cpu":
        poison([((m, n), dtype)])
    if row["op"] == "qlinear":
        act = {"act_mode": row["mode"], "act_clip": row["clip"], "act_scale": there(act_scale)}
        return ops.qlinear(there(x), *operands, **facts, **act)
    q, scale, row_sum = qmath.quantize_activation(x, row["mode"], row["clip"], act_scale, True)
    return ops.qgemm(there(q), there(scale), there(row_sum), *operands, **facts)


@pytest.mark.parametrize("part", range(8))
def test_sweep_equals_eager_on_the_cpu(part):
    """M in 0 .. 1023, N and K at and around every edge, every form: exact, also saturated and with NaN and Inf."""
    wrong = []
    for seed, row in list(enumerate(sweep()))[part::8]:
        want = call_through_ops(row, seed, "cpu", "eager")
        said = skinny_calls.wrong([call_through_ops(row, seed, DEVICE, "cuda")], [want])
        wrong += [f"{row}: {said}"] if said else []
    assert not wrong, f"{len(wrong)} calls: " + "\n".join(wrong[:5])


@pytest.mark.parametrize("form", [(8, "absmax", 0), (4, "absmax", 0), (2, "four_level", 0), (2, "four_level", 32)],
                         ids=str)  # fmt: skip
def test_sums_at_the_end_of_int32(form):
    """The largest codes of one sign over the longest K: int32 holds the sum, and every partial one."""
    k, (bits, rule, group) = 131071, form
    lowest = -(1 << (bits - 1))
    packed = packing.pack(torch.full((1, k), lowest, dtype=torch.int8), bits).to(DEVICE)
    most = qmath.mult_max(bits, rule, k) if group else 1
    mult = torch.full((1, -(-k // group)), most, dtype=torch.uint8, device=DEVICE) if group else None
    exact = 127 * (-3 if rule == "four_level" else lowest) * k * most
    assert 1 << 24 < abs(exact) < 1 << 31
    options = {"bits": bits, "four_level": rule == "four_level", "group_size": group or -1, "activation": "none"}
    part = skinny.Part(packed, torch.ones(1, device=DEVICE), mult, None, None, 1)
    for m in (1, 16, 64):
        codes = torch.full((m, k), 127, dtype=torch.int8, device=DEVICE)
        one = torch.ones(m, device=DEVICE)
        (y,) = skinny.gemm(codes, [part], **options, out_dtype=torch.float32, act_scale=one)
        assert y.flatten().tolist() == [float(torch.tensor(exact, dtype=torch.float32))] * m


def test_gelu_within_the_bound():
    call, built = call_of(plain((8, "absmax", 0), 6, 300, 770, y="fp32", bias="fp32"))
    t = built.expected[0]
    (y,) = skinny_calls.gemm(call, activation="gelu")
    compare.assert_bounded(y, functional.gelu(t.double()), functional.gelu(t))


@pytest.mark.parametrize("x", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("m", "k", "with_bias"), [(1, 7, True), (3, 264, False), (16, 2056, True), (16, 768, False)])
def test_layernorm_on_the_way_in(x, m, k, with_bias):
    """The normalized rows within the bound; their codes, and so the results, exactly those of the rows stored."""
    built, norm = skinny_calls.norm_case(m, k, x, with_bias)
    call = skinny_calls.placed(built, DEVICE)
    there = skinny_calls.norm_on(norm, DEVICE)
    poison([((m, k), call.x.dtype), *outputs_of(call)])
    normalized, y = skinny_calls.gemm(call, norm=there)
    bias64 = None if norm.bias is None else norm.bias.double()
    truth = functional.layer_norm(built.x.double(), (k,), norm.weight.double(), bias64, norm.eps)
    plainly = functional.layer_norm(built.x, (k,), norm.weight, norm.bias, norm.eps)
    compare.assert_bounded(normalized, truth, plainly)
    compare.assert_same_bits(y.cpu(), skinny_calls.expected_after_norm(built, normalized))
    for cut in ((1, 1), (8, 1), (0, 1 + (k > 256))):
        again = skinny_calls.gemm(call, norm=there, warps_n=cut[0], splits=cut[1])
        assert same(again, [normalized, y]), cut


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("form", [(8, "absmax", 0), (4, "absmax", 0), (2, "ternary", 64)], ids=str)
def test_a_row_does_not_know_its_batch(form, normalized):
    """M of 1 .. 64: the bits of a row are those of the row alone, also where a LayerNorm sums floats."""
    most, k, n = 16 if normalized else 64, 1032, 80
    row = {"form": form, "n": n, "k": k, "rows": "random", "granularity": "per_channel"}
    weight = [None if t is None else t.to(DEVICE) for t in weight_of(row, torch.Generator().manual_seed(3))]
    bits, rule, group = form
    facts = {"bits": bits, "four_level": False, "group_size": group or -1, "activation": "none",
             "out_dtype": torch.float16}  # fmt: skip
    x = torch.randn(most, k, generator=torch.Generator().manual_seed(4)).half().to(DEVICE)
    norm = skinny.Norm(torch.rand(k).half().to(DEVICE), torch.rand(k).half().to(DEVICE), 1e-5) if normalized else None

    def rows(lines):
        if normalized:
            return skinny.gemm(lines, [skinny.Part(*weight, None, None, n)], **facts, norm=norm)
        act = {"act_mode": "per_token", "act_clip": None, "act_scale": None, "backend": "cuda"}
        return [ops.qlinear(lines, *weight, None, None, out_features=n, **facts, **act)]

    alone = [rows(x[i : i + 1]) for i in range(most)]
    alone = [torch.cat(results) for results in zip(*alone, strict=True)]
    assert alone[-1].any()
    for m in range(1, most + 1):
        assert same(rows(x[:m]), [results[:m] for results in alone]), m
        assert same(rows(x[most - m :]), [results[most - m :] for results in alone]), m


# --------------------------------------------------------------------------------------- devices and refusals


CASES_ELSEWHERE = (
    plain((4, "absmax", 64), 5, 200, 2048, y="fp16", bias="fp16", residual="fp16", plan=(2, 4)),
    plain((2, "four_level", 0), 16, 770, 768, y="fp16", parts=3),
)


def test_tensors_of_another_device():
    """The device of x counts, not the current one; and the current one is what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        for case in CASES_ELSEWHERE:
            built = cases.build(case)
            call = skinny_calls.placed(built, "cuda:1")
            for _ in range(2):
                results = skinny_calls.gemm(call)
                assert all(y.device == torch.device("cuda:1") for y in results)
                assert_expected(results, built.expected)
            assert torch.cuda.current_device() == 0
        part = call.parts[0]
        with pytest.raises(ValueError, match="must be on cuda:1 like x"):
            call.parts = [part._replace(weight_scale=part.weight_scale.to("cuda:0"))]
            skinny_calls.gemm(call)


@pytest.mark.parametrize("name", ["qweight", "weight_scale", "group_mult", "bias", "residual"])
def test_a_tensor_on_the_cpu_is_refused(name):
    call, _ = call_of(plain((4, "absmax", 32), 2, 18, 64, bias="fp16", residual="fp16"))
    part = call.parts[0]
    call.parts = [part._replace(**{name: getattr(part, name).cpu()})]
    with pytest.raises(ValueError, match=f"{name} must be on cuda:0 like x, got cpu"):
        skinny_calls.gemm(call)
    call.parts, call.x = [part], call.x.cpu()
    with pytest.raises(ValueError, match="x must be on cuda, got cpu"):
        skinny_calls.gemm(call)


def test_auto_takes_this_kernel_for_few_rows():
    """Through the op: no backend named, the plan of this launcher is what runs."""
    assert hasattr(native.native(), "SkinnyPlan")
    row = {"form": (4, "absmax", 0), "m": 3, "n": 40, "k": 130, "x": "fp16", "mode": "per_token", "clip": None,
           "bias": "fp16", "residual": None, "activation": "none", "granularity": "per_channel", "rows": "random",
           "op": "qlinear"}  # fmt: skip
    skinny._plan.cache_clear()
    got = call_through_ops(row, 0, DEVICE, "auto")
    assert skinny._plan.cache_info().currsize == 1
    assert_expected([got], [call_through_ops(row, 0, "cpu", "eager")])
