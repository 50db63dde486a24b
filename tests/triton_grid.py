"""The full grid of the Triton kernels against eager and the oracle: options covered pairwise (pairwise.py).

Here stand the linears and what runs a grid; the other ops, and the sample that every change runs, are in
triton_grid_ops.py. tests/long/test_triton_grid.py runs all of it, in Triton's interpreter and on a GPU.
"""

import functools
import itertools
import random
import time
import traceback
import unittest.mock
from types import SimpleNamespace

import grids
import numpy as np
import oracle
import pairwise
import torch
from triton_checks import DTYPES, assert_same, floats, pack, random_codes

GRIDS = {}  # name: (cases, run(case, device))

FORMS = [(8, "absmax", -1)] + [
    (bits, rule, group_size)
    for (bits, rule), group_size in itertools.product(
        ((4, "absmax"), (2, "ternary"), (2, "four_level")), (-1, 32, 64, 128)
    )
]
SIZES = ("1", "odd", "x16", "x32", "x128")  # of N, and of K's last block: one, no multiple of 16, of 16, of 32, of 128
BUCKETS = 5


def grid(name, cases):
    """Registers the decorated function(case, device) as the check of each of cases()."""

    def register(function):
        GRIDS[name] = functools.cache(cases), function
        return function

    return register


def rows_of(values, allowed=pairwise.anything, seed=0):
    """The covering rows as objects with a seed each."""
    return [SimpleNamespace(**row, seed=i) for i, row in enumerate(pairwise.covering(values, allowed, seed))]


def size(draw, kind, most=256):
    """A number of the kind: 1; else at most `most`."""
    if kind == "1":
        return 1
    step = {"odd": 1, "x16": 16, "x32": 32, "x128": 128}[kind]
    larger = {1: 16, 16: 32, 32: 128, 128: 1 << 30}[step]
    return draw.choice([n for n in range(step, most + 1, step) if n % larger and n > 1])


# ------------------------------------------------------------------------------------------------------ linears

LINEAR = {
    "form": FORMS,
    "tile": list(itertools.product(("sm80", "sm90"), range(BUCKETS))),
    "split_k": [1, 2, 4, 8],
    "granularity": ["per_channel", "per_tensor"],
    "mode": ["per_token", "per_tensor", "static"],
    "clip": [None, 2.5],
    "bias": [False, True],
    "residual": [False, True],
    "activation": ["none", "relu", "gelu"],
    "x_dtype": DTYPES,
    "out_dtype": [*DTYPES, torch.int8],
    "layout": list(grids.LAYOUTS),
    "values": ["normal", "zero_rows", "non_finite", "saturated", "ties"],
    "m": [(1, 1), (2, 16), (17, 64), (65, 130)],
    "n": SIZES,
    "k": SIZES,
}


def linear_allowed(options):
    """Groups have a scale per channel; a NaN under per_tensor leaves no number to compare, and has cases of its own."""
    grouped = options.get("form", (0, 0, -1))[2] != -1
    lost = options.get("values") == "non_finite" and options.get("mode") == "per_tensor"
    return not (grouped and options.get("granularity") == "per_tensor") and not lost


def tile_of(case, device="cpu"):
    """The entry of the tables that the case names: (arch, bucket); a GPU takes only those of its own family."""
    from dqkernels.kernels import tiles

    arch, bucket = case.tile
    arch = arch if device == "cpu" else tiles.family(torch.device(device))
    found = list(tiles.table(arch, case.form[0], case.form[2]).values())
    return found[min(bucket, len(found) - 1)]


@functools.cache
def linear_cases():
    """Two covering arrays, a shape each; then M = 0, and a NaN under per_tensor."""
    cases = rows_of(LINEAR, linear_allowed) + rows_of(LINEAR, linear_allowed, seed=1)
    alone = ({"m": [(0, 0)]}, {"mode": ["per_tensor"], "values": ["non_finite"]})
    for change, seed in itertools.product(alone, range(8)):
        draw = random.Random(seed)
        row = {axis: draw.choice(choices) for axis, choices in (LINEAR | change).items()}
        row["granularity"] = "per_channel"
        cases.append(SimpleNamespace(**row))
    for i, case in enumerate(cases):
        case.seed = i
    return cases


def linear_shape(case):
    """(M, N, K): K as long as the splits of the tile need, and one block more or less."""
    draw = random.Random(case.seed)
    m, n, tail = draw.randint(*case.m), size(draw, case.n), size(draw, case.k, 128)
    blocks = case.split_k - 1 + draw.choice([0, 0, 1])
    return m, n, blocks * tile_of(case).block_k + tail


def linear_input(draw, case, m, k):
    """x [M, K] in its dtype, on the CPU."""
    g = torch.Generator().manual_seed(case.seed)
    x = torch.randn(m, k, generator=g) * 2
    if case.values == "saturated":
        x = torch.where(torch.rand(m, k, generator=g) < 0.5, x.sign() * 30000, x)
    elif case.values == "ties":  # codes half way between two integers, under per_token where amax is 127
        x = torch.randint(-126, 127, (m, k), generator=g) + 0.5
        x[:, k // 2] = 127
    rows = range(m // 2, m) if m > 1 else ()
    for row in rows:
        if case.values == "zero_rows" and row % 2:
            x[row] = 0.0
        elif case.values == "non_finite" and row % 2:
            x[row, draw.randrange(k)] = draw.choice([float("nan"), float("inf"), float("-inf")])
    return x.to(case.x_dtype)


def gelu_bound(t, residual):
    """GELU in float64, and what fp32 may err by: 4 ulp on the scale of its input (erf), half an ulp for the sum."""
    truth = oracle.gelu64(t)
    bound = 4 * 2.0**-23 * np.maximum(np.abs(t.astype(np.float64)), 2.0**-20)
    if residual is not None:
        truth = truth + residual.astype(np.float64)
        bound = bound + 2.0**-24 * (np.abs(truth) + bound)
    return truth, bound


def assert_gelu(got, truth, bound, out_scale, what):
    """One rounding to the output's type on top of the bound; what it rounds to infinity may be infinite."""
    known = torch.from_numpy(np.isfinite(truth))
    got, truth, bound = got.cpu(), torch.from_numpy(truth), torch.from_numpy(bound)
    if got.dtype == torch.int8:
        inv = float(np.float32(1) / np.float32(out_scale))
        truth, bound = (truth * inv).clamp(-127, 127), bound * inv + 0.5 + 127 * 2.0**-22
        known_codes = got[~known]
        assert not known_codes.any(), f"{what}: a NaN has a code"
    else:
        info = torch.finfo(got.dtype)
        assert got[~known].isnan().all() and not got[known].isnan().any(), f"{what}: NaN elsewhere"
        bound = bound + info.eps / 2 * (truth.abs() + bound) + info.tiny * info.eps
        large = truth.abs() + bound >= info.max
        known &= ~(large & got.isinf() & (got.sign() == truth.sign()))
    off = ((got.double() - truth).abs() > bound) & known
    assert not off.any(), f"{what}: {int(off.sum())} of {off.numel()} beyond the bound"


@grid("linear", linear_cases)
def run_linear(case, device):
    """Quantizer and GEMM with a forced tile and split; every element equal to the oracle's and to eager's."""
    from dqkernels.backends import eager
    from dqkernels.backends import triton as backend
    from dqkernels.kernels import gemm

    draw = random.Random(case.seed)
    m, n, k = linear_shape(case)
    bits, rule, group_size = case.form
    four_level = rule == "four_level"
    g = torch.Generator().manual_seed(case.seed)
    codes = random_codes(g, n, k, bits, four_level)
    scale = torch.rand(1 if case.granularity == "per_tensor" else n, generator=g) * 0.02
    if scale.numel() > 2:
        scale[n // 2] = 0.0
    mult = None
    if group_size != -1:
        limit = oracle.mult_max(bits, four_level, k) + 1
        mult = torch.randint(1, limit, (n, -(-k // group_size)), generator=g).to(torch.uint8)
    float_out = torch.float32 if case.out_dtype == torch.int8 else case.out_dtype
    bias = torch.randn(n, generator=g).to(float_out) if case.bias else None
    residual = torch.randn(m, n, generator=g).to(float_out) if case.residual else None
    x = linear_input(draw, case, m, k)
    act_scale = torch.tensor([draw.choice([0.0213, 3.0, 1e-3])]) if case.mode == "static" else None

    static = None if act_scale is None else act_scale.item()
    q, row_scale, _ = oracle.quantize_activation(x.float().numpy(), case.mode, case.clip, static)
    acc = oracle.accumulate(q, codes, None if mult is None else mult.numpy(), four_level, group_size)
    gelu = case.activation == "gelu"
    addends = floats(bias), None if gelu else floats(residual)
    t = oracle.epilogue(acc, row_scale, scale.numpy(), *addends, "none" if gelu else case.activation)
    truth, bound = gelu_bound(t, floats(residual)) if gelu else (t, None)
    finite = truth[np.isfinite(truth)]
    assert min(m, n) < 3 or case.values == "non_finite" or finite.any(), f"{case}: all zero, which proves nothing"
    out_scale = max(float(np.abs(finite).max(initial=0)), 1e-3) / 150 if case.out_dtype == torch.int8 else None

    def there(tensor, layout="contiguous"):
        return None if tensor is None else grids.LAYOUTS[layout](tensor.to(device))

    placed = there(x, case.layout)
    facts = {"bits": bits, "four_level": four_level, "group_size": group_size, "out_features": n}
    weight = there(pack(codes, bits, "cpu")), there(scale), there(mult), there(bias)
    forced = tile_of(case, device), case.split_k
    gemm._plan.cache_clear()  # plans keep the choice of their first call
    with unittest.mock.patch.object(gemm.measured, "choose", lambda *anything: forced):
        if out_scale is None:
            got = backend.qlinear(
                placed, *weight, there(residual, case.layout), act_mode=case.mode, act_clip=case.clip,
                act_scale=there(act_scale), activation=case.activation, out_dtype=float_out, **facts,
            )  # fmt: skip
        else:
            xq, s, sums = backend.quantize_activation(placed, case.mode, case.clip, there(act_scale), four_level)
            got = gemm.qgemm(
                xq, s, sums, weight[0], weight[1], bias=weight[3], activation=case.activation,
                residual=there(residual), out_dtype=torch.int8, group_mult=weight[2],
                out_scale=torch.tensor([out_scale], device=device), **facts,
            )  # fmt: skip
    gemm._plan.cache_clear()
    what = f"{m}x{n}x{k} {case}"
    assert got.shape == (m, n) and got.dtype == case.out_dtype, what
    spec = eager.quantize_activation(x, case.mode, case.clip, act_scale, four_level)
    spec = eager.qgemm(*spec, pack(codes, bits, "cpu"), scale, mult, bias, residual, activation=case.activation,
                       out_dtype=float_out, **facts)  # fmt: skip
    if gelu:
        assert_gelu(got, truth, bound, out_scale, what)
        assert_gelu(spec, truth, bound, None, f"eager {what}")
        return (m, n, k), got.numel()
    assert_same(spec, torch.from_numpy(truth).to(float_out), f"eager {what}")
    if out_scale is not None:
        truth = oracle.quantize_activation(truth, "static", None, out_scale)[0]
        truth[~np.isfinite(t)] = 0
        assert_same(got, torch.from_numpy(truth).to(torch.int8), what)
    else:
        assert_same(got, spec, what)
    return (m, n, k), got.numel()


# ------------------------------------------------------------------------------------------------------ running


def run(name, device, part=0, parts=1):
    """Every `parts`-th case of a grid: its figures. A failed case is kept in words and the others go on."""
    cases, check = GRIDS[name]
    figures = {"grid": name, "part": f"{part + 1}/{parts}", "cases": 0, "elements": 0, "failures": []}
    shapes, start = set(), time.perf_counter()
    for case in cases()[part::parts]:
        figures["cases"] += 1
        try:
            with np.errstate(all="ignore"):  # numpy plays the GPU in the interpreter, and warns where a GPU is silent
                shape, elements = check(case, device)
        except Exception:
            figures["failures"].append(f"{case}\n{traceback.format_exc()}")
            continue
        shapes.add(shape)
        figures["elements"] += elements
    return figures | {"shapes": len(shapes), "seconds": round(time.perf_counter() - start, 1)}
