"""The grids of everything but linears: quantizers, norms, packed tables, attention, backward; see triton_grid.py.

Exact where the contract is; norms, GELU, softmax and float products within the bounds that the checks of
triton_checks_rows.py, _attention.py and _backward.py hold them to.

By hand: `TRITON_INTERPRET=1 python tests/triton_grid_ops.py NAME [PART/PARTS]` prints the figures of one grid, `linear`
too, as JSON.
"""

import json
import os
import random
import sys

import grids
import oracle
import torch
import triton_checks
import triton_checks_attention as attention
import triton_checks_backward as backward
import triton_checks_rows as rows
import triton_grid
from triton_checks import DTYPES, assert_same, pack, random_codes
from triton_grid import FORMS, SIZES, grid, rows_of, size

CHECKS = {}
LAYOUTS = list(grids.LAYOUTS)
MODES = [("per_token", None), ("per_tensor", None), ("static", 0.0213), ("static", 1e-3)]
ROWS = {"one": (1, 1), "few": (2, 9), "some": (17, 40)}
WIDTHS = {"2": (2, 2), "below a block": (3, 127), "128": (128, 128), "above": (129, 1023), "1024": (1024, 1024)}


def place(x, layout, device):
    return None if x is None else grids.LAYOUTS[layout](x.to(device))


def static_scale(mode, device):
    return None if mode[1] is None else torch.tensor([mode[1]], device=device)


def spoil(x, kind, seed):
    """Float values [M, K] of a kind that has broken a quantizer somewhere."""
    draw = random.Random(seed)
    last = x.shape[0] - 1
    if kind == "zero_rows":
        x[last] = 0.0
    elif kind == "non_finite":
        x[last, draw.randrange(x.shape[1])] = draw.choice([float("nan"), float("inf"), float("-inf")])
    elif kind == "saturated":
        x = x.sign() * 30000
    elif kind == "tiny":
        x = x * 2.0**-101
    elif kind == "outlier":
        x[last, draw.randrange(x.shape[1])] = 60000.0
    return x


# ------------------------------------------------------------------------------------------------ row quantizers

VALUES = ["normal", "zero_rows", "non_finite", "saturated", "tiny", "outlier"]
ROW_AXES = {
    "rows": list(ROWS),
    "width": [*WIDTHS, "long"],  # beyond the 8,192 that one program keeps in registers
    "mode": MODES,
    "clip": [None, 2.5, 1e-3],
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "values": VALUES,
}


def row_shape(case):
    draw = random.Random(case.seed)
    m = draw.randint(*ROWS[case.rows])
    return (min(m, 3), 8193 + draw.randrange(40)) if case.width == "long" else (m, draw.randint(*WIDTHS[case.width]))


def row_input(case, device):
    shape = row_shape(case)
    x = spoil(torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)) * 3, case.values, case.seed)
    return shape, place(x.to(case.dtype), case.layout, device)


@grid("quantize_activation", lambda: rows_of(ROW_AXES | {"want_sum": [False, True]}))
def run_quantize(case, device):
    from dqkernels.backends import eager
    from dqkernels.backends import triton as backend

    shape, x = row_input(case, device)
    scale = static_scale(case.mode, "cpu")
    facts = {"mode": case.mode[0], "clip": case.clip, "want_sum": case.want_sum}
    got = backend.quantize_activation(x, act_scale=None if scale is None else scale.to(device), **facts)
    spec = eager.quantize_activation(x.cpu(), act_scale=scale, **facts)
    q, s, total = oracle.quantize_activation(x.cpu().float().numpy(), case.mode[0], case.clip, case.mode[1])
    total = torch.from_numpy(total).int() if case.want_sum else torch.empty(0, dtype=torch.int32)
    for name, mine, theirs, known in zip(
        ("codes", "scale", "row_sum"), got, spec, (torch.from_numpy(q).to(torch.int8), torch.from_numpy(s), total),
        strict=True,
    ):  # fmt: skip
        assert_same(mine, theirs, f"{case}: {name}")
        assert_same(theirs, known, f"eager {case}: {name}")
    return shape, x.numel()


NORM = ROW_AXES | {
    "weight_dtype": DTYPES,
    "residual": [None, *DTYPES],
    "bias": [False, True],
    "eps": [1e-5, 1e-12],
    "values": ["normal", "non_finite", "constant", "large mean"],
}


@grid("layernorm_quantize", lambda: rows_of(NORM))
def run_layernorm(case, device):
    shape, x = row_input(case, device)
    g = torch.Generator().manual_seed(case.seed + 1)
    if case.values == "constant" and shape[0] > 1:  # y is the bias there
        x[-1] = 7.25
    elif case.values == "large mean":
        x += 100
    residual = None
    if case.residual is not None:
        residual = place(torch.randn(shape, generator=g).to(case.residual), case.layout, device)
    weight = (torch.randn(shape[1], generator=g) + 1).to(case.weight_dtype)
    bias = torch.randn(shape[1], generator=g).to(case.weight_dtype) if case.bias else None
    rows.assert_layernorm(
        x, residual, *rows.here(device, weight, bias), case.mode[0], case.clip, static_scale(case.mode, device),
        case.eps, bounded=case.values != "non_finite",
    )  # fmt: skip
    return shape, x.numel()


@grid("gelu_quantize", lambda: rows_of(ROW_AXES))
def run_gelu(case, device):
    from dqkernels.backends import triton as backend

    shape, x = row_input(case, device)
    facts = {"mode": case.mode[0], "clip": case.clip, "act_scale": static_scale(case.mode, device)}
    with_sum, bare = (backend.gelu_quantize(x, **facts, want_sum=wanted) for wanted in (True, False))
    y = rows.gelu_of(x)
    facts["act_scale"] = static_scale(case.mode, "cpu")
    from dqkernels import qmath

    want = qmath.quantize_activation(y.cpu(), **facts, want_sum=True)
    for name, got, exact in zip(("codes", "scale", "row_sum"), with_sum, want, strict=True):
        assert_same(got, exact, f"{case}: {name}")
    assert_same(bare[0], want[0], f"{case}: codes without sums")
    finite = x.isfinite()
    if finite.any():
        kept = x[finite].cpu()
        truth = torch.from_numpy(oracle.gelu64(kept.double().numpy()))
        eager = torch.nn.functional.gelu(kept.float()).to(case.dtype)
        if (truth != 0).any():
            rows.assert_bounded(y[finite], truth, eager, f"{case}")
    return shape, x.numel()


# ------------------------------------------------------------------------------------------------- packed tables


def table(seed, n, k, form, tensor_scale):
    """Packed codes, scale (one of them zero), multipliers on the CPU, and the facts that ops take."""
    bits, rule, group_size = form
    g = torch.Generator().manual_seed(seed)
    codes = random_codes(g, n, k, bits, rule == "four_level")
    scale = torch.rand(1 if tensor_scale else n, generator=g) * 0.1 + 1e-3
    if scale.numel() > 2:
        scale[n // 2] = 0.0
    mult = None if group_size == -1 else torch.randint(1, 128, (n, -(-k // group_size)), generator=g).to(torch.uint8)
    facts = {"bits": bits, "four_level": rule == "four_level", "group_size": group_size}
    return (pack(codes, bits, "cpu"), scale, mult), facts


def scale_fits(case):
    return not (case.get("tensor_scale") and case.get("form", (0, 0, -1))[2] != -1)


TABLE = {"form": FORMS, "tensor_scale": [False, True], "n": SIZES, "k": SIZES}


@grid("dequantize_weight", lambda: rows_of(TABLE, scale_fits))
def run_dequantize(case, device):
    from dqkernels.backends import eager
    from dqkernels.backends import triton as backend

    draw = random.Random(case.seed)
    n, k = size(draw, case.n, 128), size(draw, case.k, 640)
    packed, facts = table(case.seed, n, k, case.form, case.tensor_scale)
    facts |= {"out_features": n, "in_features": k}
    got = backend.dequantize_weight(*rows.here(device, *packed), **facts)
    assert_same(got, eager.dequantize_weight(*packed, **facts), f"{case}")
    return (n, k), got.numel()


EMBEDDING = {axis: choices for axis, choices in TABLE.items() if axis != "n"} | {
    "ids": ["one", "row", "matrix", "transposed", "int32"],
    "position": ["none", "full", "row", "tokens", "strided"],
    "position_dtype": DTYPES,
    "embed_scale": [1.0, 27.712812921102035],
    "out_dtype": DTYPES,
}


@grid("qembedding", lambda: rows_of(EMBEDDING, scale_fits))
def run_embedding(case, device):
    from dqkernels.backends import eager
    from dqkernels.backends import triton as backend

    draw, g = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    k, n = size(draw, case.k, 1300), draw.choice([1, 16, 37])
    shape = {"one": (1,), "row": (draw.randint(2, 40),)}.get(case.ids, (draw.randint(2, 5), draw.randint(2, 9)))
    ids = torch.randint(0, n, shape, generator=g)
    ids = {"transposed": ids.T, "int32": ids.int()}.get(case.ids, ids) if len(shape) == 2 else ids
    wide = {"full": (*ids.shape, k), "row": (k,), "tokens": (ids.shape[-1], k), "strided": (ids.shape[-1], 2 * k)}
    position = None
    if case.position != "none":
        position = torch.randn(wide[case.position], generator=g).to(case.position_dtype)
        position = position[:, ::2] if case.position == "strided" else position
    packed, facts = table(case.seed, n, k, case.form, case.tensor_scale)
    facts |= {"embedding_dim": k, "embed_scale": case.embed_scale, "out_dtype": case.out_dtype}
    got = backend.qembedding(*rows.here(device, ids, *packed, position), **facts)
    assert_same(got, eager.qembedding(ids, *packed, position, **facts), f"{case}")
    return (*ids.shape, k), got.numel()


WEIGHT = {
    "layer": [(8, "absmax", "per_channel", -1), (4, "absmax", "per_channel", -1), (8, "absmax", "per_tensor", -1),
              (4, "absmax", "per_tensor", -1), (4, "absmax", "per_channel", 32), (4, "absmax", "per_channel", 64),
              (4, "absmax", "per_channel", 128), (8, "mse", "per_channel", -1), (4, "mse", "per_tensor", -1),
              (4, "mse", "per_channel", 64), (2, "ternary", "per_channel", -1), (2, "ternary", "per_tensor", -1),
              (2, "ternary", "per_channel", 32), (2, "four_level", "per_channel", -1),
              (2, "four_level", "per_tensor", -1), (2, "four_level", "per_channel", 128)],
    "n": SIZES,
    "k": [*SIZES, "long"],
    "dtype": [*DTYPES, torch.float64],
    "layout": LAYOUTS,
    "clip": [None, 0.7],
    "values": VALUES,
}  # fmt: skip


@grid("quantize_weight", lambda: rows_of(WEIGHT))
def run_weight(case, device):
    from dqkernels.backends import eager
    from dqkernels.backends import triton as backend
    from dqkernels.config import LayerConfig

    draw = random.Random(case.seed)
    n = size(draw, case.n, 128)
    n, k = (min(n, 3), 4100 + draw.randrange(99)) if case.k == "long" else (n, size(draw, case.k, 512))
    bits, quantizer, granularity, group_size = case.layer
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(case.seed))
    w = place(spoil(w, case.values, case.seed).to(case.dtype), case.layout, device)
    layer = LayerConfig(bits, quantizer, granularity, group_size, weight_clip=case.clip)
    got, want = backend.quantize_weight(w, layer), eager.quantize_weight(w.cpu(), layer)
    for name, mine, theirs in zip(("qweight", "scale", "group_mult"), got, want, strict=True):
        assert (mine is None) == (theirs is None), f"{case}: {name}"
        if mine is not None:
            assert_same(mine, theirs, f"{case}: {name}")
    return (n, k), w.numel()


# ----------------------------------------------------------------------------------------------------- attention

HEAD_DIMS = [1, 8, 31, 32, 40, 64, 80, 96, 127, 128]
KEYS = [(1, 1), (2, 31), (32, 32), (33, 63), (64, 64), (65, 127), (128, 128), (129, 200)]
LAYOUTS_4D = ["model", "contiguous", "wider rows", "every second"]
PREFILL = {
    "batch": [1, 2],
    "heads": [1, 2, 3],
    "queries": [(1, 1), (2, 15), (16, 16), (17, 63), (64, 64), (65, 130)],
    "keys": KEYS,
    "head_dim": HEAD_DIMS,
    "mask": attention.MASKS,
    "bias": attention.BIASES,
    "causal": [False, True],
    "mode": ["per_token", "per_tensor"],
    "clip": [None, 1.5],
    "dtype": DTYPES,
    "scale": [None, 1.0],
    "tile": range(6),  # the table's choice, then each entry with and without a mask or bias per query
    "layout": LAYOUTS_4D,
    "values": ["normal", "zero_rows", "non_finite"],
}


def four(x, layout):
    """[batch, heads, tokens, head_dim] on other strides."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "wider rows":
        return torch.cat([x, x], 3)[..., : x.shape[3]]
    return torch.stack([x, x], 4)[..., 0] if layout == "every second" else x


def seen_by_all(case):
    """A NaN under per_tensor is in every row."""
    return (case.get("values"), case.get("mode")) != ("non_finite", "per_tensor")


@grid("qattention", lambda: rows_of(PREFILL, seen_by_all))
def run_attention(case, device):
    from dqkernels.kernels.tiles import attention_tile

    draw, g = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    queries, keys = draw.randint(*case.queries), draw.randint(*case.keys)
    shape = case.batch, case.heads, queries, keys, case.head_dim
    qkv = [four(x, case.layout) for x in attention.qkv(case.seed, *shape, device, case.dtype)]
    if case.values != "normal":
        x = qkv[draw.randrange(3)]
        x[-1, -1, x.shape[2] // 2] = 0.0 if case.values == "zero_rows" else draw.choice([float("nan"), float("inf")])
    mask = attention.mask_of(case.mask, g, case.batch, case.heads, queries, keys, device)
    bias = attention.bias_of(case.bias, g, case.heads, queries, keys, device)
    tile = None
    if case.tile:
        queries_of, pairs = [(16, False), (64, False), (65, False), (16, True), (65, True)][case.tile - 1]
        tile = attention_tile(queries_of, pairs)
    got, found = attention.assert_attention(
        *qkv, mask, bias, case.causal, case.scale, case.mode, case.clip, tile
    )  # fmt: skip
    FLIPS.append(found)
    return shape, got.numel()


FLIPS = []  # (rows, codes that may honestly differ by one) of each attention case

DECODE = {
    "rows": [1, 2, 5, 19],
    "caches": [1, 3],
    "heads": [1, 2],
    "queries": [1, 2, 5, 17],
    "keys": KEYS,
    "spare": [0, 1, 9],  # of the capacity, behind the last key
    "head_dim": HEAD_DIMS,
    "source": ["none", "beams", "one", "by key"],
    "lengths": ["full", "random", "empty"],
    "bias": attention.BIASES,
    "causal": [False, True],
    "mode": ["per_token", "per_tensor"],
    "clip": [None, 2.5],
    "dtype": DTYPES,
}


@grid("qattention_decode", lambda: rows_of(DECODE))
def run_decode(case, device):
    draw = random.Random(case.seed)
    g = torch.Generator().manual_seed(case.seed)
    keys = draw.randint(*case.keys)
    caches = case.rows if case.source == "none" else case.caches
    capacity = keys + case.spare
    _, k, v = attention.qkv(case.seed, caches, case.heads, 1, keys, case.head_dim, device, case.dtype)
    q = torch.randn(case.rows, case.heads, case.queries, case.head_dim, generator=g).to(case.dtype).to(device)
    source = None
    if case.source != "none":
        source = [draw.randrange(caches) if case.source == "beams" else caches - 1 for _ in range(case.rows)]
    if case.source == "by key":
        source = attention.ancestors(g, case.rows, caches, capacity).tolist()
    lengths = {"full": [keys] * case.rows, "random": [draw.randint(0, keys) for _ in range(case.rows)]}
    lengths = lengths.get(case.lengths, [0] + [keys] * (case.rows - 1))
    bias = attention.bias_of(case.bias, g, case.heads, case.queries, capacity, device)
    cache = attention.cache_of(k, v, capacity, case.mode, case.clip)
    got = attention.assert_decode(q, cache, lengths, source, bias, case.causal, case.mode, case.clip)
    return (case.rows, case.heads, case.queries, keys, case.head_dim), got.numel()


# ------------------------------------------------------------------------------------------------------ backward

GRAD = {"m": [(1, 1), (2, 31), (32, 32), (33, 130)], "n": SIZES, "k": SIZES, "dtype": DTYPES, "exact": [True, False]}


def grad_shape(case):
    draw = random.Random(case.seed)
    return draw.randint(*case.m), size(draw, case.n, 160), size(draw, case.k, 384)


@grid("grad_input", lambda: rows_of(TABLE | GRAD | {"masked": [False, True]}, scale_fits))
def run_grad_input(case, device):
    bits, rule, group_size = case.form
    shape = grad_shape(case)
    backward.run_input(
        case.seed, shape, case.dtype, (bits, rule == "four_level"), group_size, case.masked, case.exact, device,
        case.tensor_scale,
    )  # fmt: skip
    return shape, shape[0] * shape[2]


@grid("grad_weight", lambda: rows_of(GRAD))
def run_grad_weight(case, device):
    shape = grad_shape(case)
    backward.run_weight(case.seed, shape, case.dtype, case.exact, device)
    return shape, shape[1] * shape[2]


def check(function):
    CHECKS[function.__name__] = function
    return function


def sample(name, device, cases):
    """About so many cases of one grid, evenly over it."""
    figures = triton_grid.run(name, device, 0, len(triton_grid.GRIDS[name][0]()) // cases + 1)
    assert figures["cases"] >= 3 and not figures["failures"], figures["failures"][0]
    return figures


@check
def grid_linear_sample(device):
    assert sample("linear", device, 40)["shapes"] >= 35


@check
def grid_ops_sample(device):
    for name in triton_grid.GRIDS:
        if name != "linear":
            sample(name, device, 4)


def main():
    if len(sys.argv) < 2 or sys.argv[1] in CHECKS:
        triton_checks.main(CHECKS)
        return
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: the grid runs on the CPU here"
    part, parts = map(int, sys.argv[2].split("/")) if len(sys.argv) > 2 else (1, 1)
    print(json.dumps(triton_grid.run(sys.argv[1], "cpu", part - 1, parts)))


if __name__ == "__main__":
    main()
