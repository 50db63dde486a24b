"""Checks of LayerNorm and GELU fused with the quantizer, in Triton; run like triton_checks.py.

Float ops with a bound (compare.assert_bounded); their codes are exact given the rounded y.
"""

import itertools

import oracle
import torch
import torch.nn.functional as F
from compare import assert_bounded
from triton_checks import DTYPES, assert_same, main, modes

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def here(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


# ------------------------------------------------------------------------------------------ LayerNorm and GELU


def assert_codes_of(y, quantized, mode, clip, act_scale, what):
    """q, scale and row_sum are those of the specification's quantizer on this very y."""
    from dqkernels import qmath

    static = None if act_scale is None else act_scale.cpu()
    wanted = qmath.quantize_activation(y.cpu(), mode, clip, static, want_sum=True)
    for name, got, want in zip(("codes", "scale", "row_sum"), quantized, wanted, strict=True):
        assert_same(got, want, f"{what}: {name}")
    assert y.numel() < 8 or wanted[0].any() or wanted[1].isnan().all(), f"{what}: codes all 0, which proves nothing"


def assert_layernorm(x, residual, weight, bias, mode, clip=None, act_scale=None, eps=1e-5, bounded=True):
    from dqkernels import reference
    from dqkernels.backends import triton as backend

    facts = {"eps": eps, "mode": mode, "clip": clip}
    y, *quantized = backend.layernorm_quantize(x, residual, weight, bias, **facts, act_scale=act_scale, want_sum=True)
    what = f"layernorm {mode} {x.dtype} {list(x.shape)} residual {residual is not None} clip {clip}"
    assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous(), what
    assert_codes_of(y, quantized, mode, clip, act_scale, what)
    bare = backend.layernorm_quantize(x, residual, weight, bias, **facts, act_scale=act_scale, want_sum=False)
    assert_same(bare[0], y.cpu(), what)
    assert_same(bare[1], quantized[0].cpu(), what)
    assert bare[3].shape == (0,) and bare[3].dtype == torch.int32
    if bounded:
        x, residual, weight, bias = here("cpu", x, residual, weight, bias)
        total = x.double() if residual is None else x.double() + residual.double()
        wide_bias = None if bias is None else bias.double()
        truth = F.layer_norm(total, (x.shape[-1],), weight.double(), wide_bias, eps)
        static = None if act_scale is None else act_scale.cpu()
        eager = reference.layernorm_quantize(
            x, residual, weight, bias, **facts, act_scale=static, want_sum=False
        )  # fmt: skip
        assert_bounded(y, truth, eager[0], what)
    return y


def norm_inputs(seed, shape, dtype, weight_dtype, residual=True, bias=True):
    g = torch.Generator().manual_seed(seed)
    k = shape[-1]
    return (
        (torch.randn(shape, generator=g) * 3 + 1).to(dtype),
        torch.randn(shape, generator=g).to(weight_dtype) if residual else None,
        (torch.randn(k, generator=g) + 1).to(weight_dtype),
        torch.randn(k, generator=g).to(weight_dtype) if bias else None,
    )


@check
def layernorm_grid(device):
    """Shapes x modes, with every pair of input and weight dtype, residual, bias and clip dealt around."""
    shapes = ((1, 2), (3, 5), (2, 3, 127), (4, 128), (2, 129), (3, 1000), (2, 1024), (7,))
    for i, (shape, (mode, act_scale)) in enumerate(itertools.product(shapes, modes(device))):
        inputs = norm_inputs(i, shape, DTYPES[i % 3], DTYPES[i // 3 % 3], i % 4 != 1, i % 5 != 2)
        assert_layernorm(*here(device, *inputs), mode, (None, 1.5)[i % 2], act_scale)


@check
def layernorm_a_row_does_not_depend_on_its_batch_or_its_strides(device):
    """Alone, in a batch, in wider rows, expanded, from an odd address: the same bits."""
    from dqkernels.backends import triton as backend

    facts = {"eps": 1e-5, "mode": "per_token", "clip": None, "act_scale": None, "want_sum": True}
    for k, dtype in ((160, torch.float16), (135, torch.bfloat16), (1040, torch.float32)):
        x, residual, weight, bias = here(device, *norm_inputs(k, (9, k), dtype, dtype))
        whole = backend.layernorm_quantize(x, residual, weight, bias, **facts)
        wide, odd = (
            torch.zeros(9, k + 7, dtype=dtype, device=device),
            torch.zeros(9 * k + 1, dtype=dtype, device=device),
        )
        wide[:, 3:-4], odd[1:] = x, x.flatten()
        shift = torch.zeros(k + 1, dtype=dtype, device=device)
        shift[1:] = weight
        layouts = {
            "wider rows": (wide[:, 3:-4], residual, weight),
            "an odd address": (odd[1:].view(9, k), residual, shift[1:]),
            "transposed": (x.t().contiguous().t(), residual, weight),
            "strided residual": (x, residual.repeat(1, 2)[:, :k], weight),
        }
        for name, (rows, added, factor) in layouts.items():
            for got, want in zip(backend.layernorm_quantize(rows, added, factor, bias, **facts), whole, strict=True):
                assert_same(got, want.cpu(), f"K = {k}, {name}")
        for rows in (slice(0, 1), slice(3, 4), slice(2, 9), slice(None, None, 4)):
            part = backend.layernorm_quantize(x[rows], residual[rows], weight, bias, **facts)
            for got, want in zip(part, whole, strict=True):
                assert_same(got, want[rows].cpu(), f"K = {k}, rows {rows}")
        same = backend.layernorm_quantize(x[:1].expand(3, k), residual[:1].expand(3, k), weight, bias, **facts)
        assert_same(same[0], whole[0][:1].expand(3, k).cpu(), f"K = {k}, expanded")


@check
def layernorm_long_rows_and_large_means(device):
    """Rows in several blocks; a mean of 4000 standard deviations, where E[x^2] - E[x]^2 has no digit left."""
    for mode, act_scale in modes(device):
        inputs = norm_inputs(1, (2, 8209), torch.float32, torch.float32)
        assert_layernorm(*here(device, *inputs), mode, 2.5, act_scale)
    for k in (100, 8209):
        x, residual, weight, bias = norm_inputs(2, (2, k), torch.float32, torch.float32)
        assert_layernorm(*here(device, x + 12_000, residual, weight, bias), "per_token")
    inputs = norm_inputs(3, (2, 8195), torch.bfloat16, torch.float16, residual=False, bias=False)
    assert_layernorm(*here(device, *inputs), "per_token")


@check
def layernorm_special_rows(device):
    """NaN and Inf mark their row alone, constant rows are the bias, a y beyond fp16 marks its row."""
    from dqkernels.backends import triton as backend

    k = 70
    x, _, weight, bias = norm_inputs(4, (7, k), torch.float32, torch.float32)
    clean = assert_layernorm(*here(device, x, None, weight, bias), "per_token")
    for bad, place in itertools.product((float("nan"), float("inf"), float("-inf")), (0, k // 2, k - 1)):
        marked = x.clone()
        marked[2, place] = bad
        for mode, act_scale in modes(device):
            y = assert_layernorm(*here(device, marked, None, weight, bias), mode, None, act_scale, bounded=False)
            assert y[2].isnan().all()
            assert_same(y[[0, 1, 3, 4, 5, 6]], clean[[0, 1, 3, 4, 5, 6]].cpu(), f"{bad} at {place}")
    x[1], x[3] = 0.0, 7.25
    y = assert_layernorm(*here(device, x, None, weight, bias), "per_token")
    assert_same(y[[1, 3]], bias.expand(2, k), "constant rows")
    half = x.half()
    y = assert_layernorm(*here(device, half, None, weight * 65504, bias), "per_token", bounded=False)
    assert y[0].isinf().any() and not y[1].isinf().any()
    empty = backend.layernorm_quantize(
        *here(device, x[:0], None, weight, None), eps=1e-5, mode="per_tensor", clip=None, act_scale=None, want_sum=True
    )
    assert [tuple(t.shape) for t in empty] == [(0, k), (0, k), (0,), (0,)]


def gelu_of(x):
    """The kernels' GELU by itself, rounded to x's dtype."""
    from triton_twins import gelu_kernel

    from dqkernels.kernels import norm

    flat = x.contiguous().flatten()
    y = torch.empty_like(flat)
    if flat.numel():
        gelu_kernel[(-(-flat.numel() // 1024),)](
            flat, y, flat.numel(), BLOCK=1024, USE_ASM=not norm._gelu_quantize.interpreted, enable_fp_fusion=False
        )
    return y.view(x.shape)


def assert_gelu(x, mode, clip=None, act_scale=None):
    from dqkernels.backends import triton as backend

    what = f"gelu {mode} {x.dtype} {list(x.shape)} clip {clip}"
    facts = {"mode": mode, "clip": clip, "act_scale": act_scale}
    quantized = backend.gelu_quantize(x, **facts, want_sum=True)
    assert_codes_of(gelu_of(x), quantized, mode, clip, act_scale, what)
    bare = backend.gelu_quantize(x, **facts, want_sum=False)
    assert_same(bare[0], quantized[0].cpu(), what)
    assert bare[2].shape == (0,) and bare[2].dtype == torch.int32
    return quantized


@check
def gelu_is_bounded(device):
    """Error to float64 <= 2x that of torch's fp32 GELU + one rounding, tails and tiny inputs included."""
    g = torch.Generator().manual_seed(5)
    tails = torch.cat([torch.linspace(-14, 14, 3001), torch.randn(999, generator=g) * 1e-3, torch.tensor([0.0, -0.0])])
    for dtype in DTYPES:
        for x in (tails.to(dtype), (torch.randn(2000, generator=g) * 2).to(dtype)):
            truth = torch.from_numpy(oracle.gelu64(x.double().numpy()))
            assert_bounded(gelu_of(x.to(device)), truth, F.gelu(x.float()).to(dtype), f"{dtype}")


@check
def gelu_grid(device):
    """Shapes, layouts and modes: the codes of the rounded GELU."""
    g = torch.Generator().manual_seed(6)
    shapes = ((1, 1), (3, 5), (2, 3, 127), (4, 129), (2, 1024), (9,), (0, 7))
    for i, (shape, (mode, act_scale)) in enumerate(itertools.product(shapes, modes(device))):
        x = (torch.randn(shape, generator=g) * 3).to(DTYPES[i % 3]).to(device)
        assert_gelu(x, mode, (None, 2.5)[i % 2], act_scale)
    base = torch.randn(3, 4, 70, generator=g).to(device)
    views = (
        base[:, ::2, 3:],
        base[:, :2, :20].transpose(0, 2),
        base[..., ::3],
        base[0, 0].expand(5, 70),
        base[..., :1],
    )
    for x, (mode, act_scale) in itertools.product(views, modes(device)):
        assert_gelu(x, mode, None, act_scale)


@check
def gelu_special_and_long_rows(device):
    """Non-finite inputs mark their row, and under per_tensor every row; rows in several blocks."""
    x = torch.randn(5, 90, generator=torch.Generator().manual_seed(7))
    x[1, 0], x[2, 89], x[3, 40] = float("nan"), float("inf"), float("-inf")
    for (mode, act_scale), clip in itertools.product(modes(device), (None, 1.0)):
        scale = assert_gelu_marked(x.to(device), mode, clip, act_scale)
        assert scale.isnan().tolist() == [mode == "per_tensor", True, True, True, mode == "per_tensor"]
    long = torch.randn(2, 8209, generator=torch.Generator().manual_seed(8))
    long[1, 8208] = 60.0
    for mode, act_scale in modes(device):
        assert_gelu(long.to(device), mode, None, act_scale)


def assert_gelu_marked(x, mode, clip, act_scale):
    """The scales of an input with non-finite values; rows of codes 0 where they are NaN."""
    from dqkernels.backends import triton as backend

    q, scale, row_sum = backend.gelu_quantize(x, mode=mode, clip=clip, act_scale=act_scale, want_sum=True)
    assert not q[scale.isnan()].any() and not row_sum[scale.isnan()].any()
    assert mode == "per_tensor" or q[0].any()
    return scale.cpu()


if __name__ == "__main__":
    main(CHECKS)
