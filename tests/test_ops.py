"""The ops as torch sees them: registration, refusals, layouts, gradients. Their numbers: test_exactness."""

import itertools
import os

import grids
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from compare import assert_bounded, assert_equal, assert_same_bits

from dqkernels import backends, ops, packing, qmath

N, K = 19, 70
FORMATS = {
    "w8": (8, "absmax", -1),
    "w4": (4, "absmax", -1),
    "w4-g32": (4, "absmax", 32),
    "w2-ternary": (2, "ternary", -1),
    "w2-four_level": (2, "four_level", -1),
    "w2-four_level-g64": (2, "four_level", 64),
}


def weight_of(name, n=N, k=K, granularity="per_channel"):
    """qweight, weight_scale, group_mult or None, and (bits, four_level, group_size)."""
    bits, quantizer, group_size = FORMATS[name]
    qweight, scale, mult = ops.quantize_weight(torch.randn(n, k), bits, quantizer, granularity, group_size)
    return qweight, scale, None if group_size == -1 else mult, (bits, quantizer == "four_level", group_size)


def linear(x, name="w4", weight=None, bias=None, residual=None, mode="per_token", clip=None, act_scale=None,
           activation="none", dtype=None, **where):  # fmt: skip
    qweight, scale, mult, format_ = weight if weight is not None else weight_of(name)
    return ops.qlinear(
        x, qweight, scale, mult, bias, residual, *format_, N, mode, clip, act_scale, activation,
        dtype or x.dtype, **where,
    )  # fmt: skip


def samples(op):
    """Arguments of every kind that the op takes, as (args, kwargs); small: each is traced several times."""
    x = torch.randn(2, 3, K)
    every_mode = [("per_token", None, None), ("per_tensor", 2.5, None), ("static", None, torch.tensor([0.02]))]
    if op == "quantize_weight":
        for bits, quantizer, group_size in FORMATS.values():
            yield (torch.randn(N, K), bits, quantizer, "per_channel", group_size), {}
        yield (torch.randn(N, K).t(), 4, "mse", "per_tensor"), {"clip": 2.5, "backend": "eager"}
    elif op == "quantize_activation":
        for mode, clip, act_scale in every_mode:
            yield (x, mode, clip, mode != "static", act_scale), {}
        yield (torch.randn(K, 3, 2).transpose(0, 2), "per_token", None, True), {}
        yield (x.to(torch.bfloat16), "per_token"), {"backend": "eager"}
    elif op == "dequantize_weight":
        for name in FORMATS:
            *packed, format_ = weight_of(name)
            yield (*packed, *format_, N, K), {}
    elif op == "qgemm":
        for name in FORMATS:
            qweight, scale, mult, format_ = weight_of(name)
            q, act_scale, row_sum = ops.quantize_activation(x, "per_token", None, True)
            bias, residual = torch.randn(N), torch.randn(2, 3, N)
            yield (
                q, act_scale, row_sum, qweight, scale, mult, bias, residual, *format_, N, "relu", torch.float16
            ), {}  # fmt: skip
        flipped = q.transpose(0, 1).contiguous().transpose(0, 1)
        yield (flipped, act_scale, None, qweight, scale, mult, None, None, *format_, N, "none", torch.float32), {}
    elif op == "qlinear":
        for name, (mode, clip, act_scale) in zip(FORMATS, every_mode * 2, strict=True):
            qweight, scale, mult, format_ = weight_of(name)
            for grad in (False, True):
                bias, residual = torch.randn(N, requires_grad=grad), torch.randn(2, 3, N, requires_grad=grad)
                tensors = (x.clone().requires_grad_(grad), qweight, scale, mult, bias, residual)
                yield (*tensors, *format_, N, mode, clip, act_scale, "gelu" if grad else "none", torch.float32), {}
    elif op == "qembedding":
        for name in FORMATS:
            *packed, format_ = weight_of(name)
            ids, position = torch.randint(0, N, (2, 3)), torch.randn(3, K, requires_grad=True)
            yield (ids, *packed, position, *format_, N, K, 1.5, torch.bfloat16), {}
            yield (ids.int().t(), *packed, None, *format_, N, K, 1.0, torch.float32), {}
    elif op == "layernorm_quantize":
        for mode, clip, act_scale in every_mode:
            norm = (torch.randn(K), torch.randn(K), 1e-5)
            yield (x, torch.randn(2, 3, K), *norm, mode, clip, True, act_scale), {}
        yield (x.transpose(0, 1), None, torch.randn(K), None, 1e-5, "per_token"), {}
    elif op == "gelu_quantize":
        for mode, clip, act_scale in every_mode:
            yield (x.transpose(0, 1), mode, clip, True, act_scale), {}
    elif op == "qattention":
        q = torch.randn(2, 4, 3, 8).transpose(1, 2)
        k = torch.randn(2, 5, 3, 8).transpose(1, 2)
        mask, bias = torch.rand(2, 1, 1, 5) > 0.2, torch.randn(1, 3, 4, 5)
        yield (q, k, k, mask, bias, False, 0.35), {}
        yield (q, q, q, None, None, True, 0.35, "per_tensor", 2.5), {}
        empty = k[:, :, :0]
        yield (q, empty, empty, None, None, False, 0.35), {}
        leaves = [x.clone().requires_grad_() for x in (q, k, k)]
        yield (*leaves, mask, bias.clone().requires_grad_(), True, 0.35), {}
        yield (*leaves, None, None, False, 0.35, "per_tensor", 1.0), {}
    elif op == "qattention_decode":
        q = torch.randn(2, 2, 3, 8).transpose(1, 2)
        for source, bias, rest in (
            (None, torch.randn(1, 3, 1, 5), (False, 0.35)),
            (torch.tensor([1, 1], dtype=torch.int32), None, (True, 0.35, "per_tensor", 2.5)),
            (torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 1, 0]], dtype=torch.int32), None, (True, 0.35)),
        ):
            yield (q, *decode_cache(2), torch.tensor([5, 2], dtype=torch.int32), source, bias, *rest), {}
        yield (q[:0], *decode_cache(0), torch.zeros(0, dtype=torch.int32), None, None, False, 0.35), {}
    else:
        raise AssertionError(f"{op} has no samples: every op needs some")


def decode_cache(caches, heads=3, capacity=5, head_dim=8):
    """k_cache, k_scale, v_cache, v_scale of random tokens."""
    k, v = torch.randn(2, caches, heads, capacity, head_dim)
    return *qmath.quantize_activation(k, "per_token")[:2], *qmath.quantize_activation(v, "per_token")[:2]


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(op):
    """Schema, aliasing, mutation, autograd registration, shapes and strides of fakes, AOT with dynamic shapes."""
    overload = getattr(torch.ops.dqkernels, op).default
    few = int(os.environ.get("TEST_OPCHECK_SAMPLES", 100))  # test_triton_ops.py runs this in an interpreter
    for args, kwargs in itertools.islice(samples(op), few):
        torch.library.opcheck(overload, args, kwargs)


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_every_op_has_its_python_spelling_and_its_backends(op):
    assert getattr(ops, op) is getattr(torch.ops.dqkernels, op).default
    arguments = [argument.name for argument in getattr(ops, op)._schema.arguments]
    assert arguments[-2:] == ["backend", "strict"]
    assert op in backends.OPS or op == "qlinear"  # a quantizer and a GEMM


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_ops_are_functional(op):
    """No input changes, and no output is a view of an input."""
    for args, kwargs in samples(op):
        tensors = [a.detach() if isinstance(a, torch.Tensor) else None for a in args]
        before = [None if t is None else t.clone() for t in tensors]
        with torch.no_grad():
            out = getattr(ops, op)(*args, **kwargs)
        for tensor, copy in zip(tensors, before, strict=True):
            assert tensor is None or torch.equal(tensor, copy)
        outputs = out if isinstance(out, tuple | list) else [out]
        inside = {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()}
        assert all(o.untyped_storage().data_ptr() not in inside for o in outputs if o.numel())


# ------------------------------------------------------------------------------------------------- layouts


def relaid(value, layout):
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not value.numel():
        return value
    if layout == "expanded":
        return value[:1].expand(value.shape)
    return grids.LAYOUTS[layout](value.detach())


@pytest.mark.parametrize("layout", [*grids.LAYOUTS, "expanded"])
@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_any_strides_give_the_bits_of_contiguous_inputs(op, layout):
    """Every tensor of every sample in another layout at once, weights and scales included."""
    for args, kwargs in samples(op):
        other = [relaid(a, layout) for a in args]
        plain = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in other]
        with torch.no_grad():
            got, wanted = getattr(ops, op)(*other, **kwargs), getattr(ops, op)(*plain, **kwargs)
        if isinstance(got, torch.Tensor):
            got, wanted = (got,), (wanted,)
        for g, w in zip(got, wanted, strict=True):
            assert g.is_contiguous(), f"{op} {layout}"
            assert_same_bits(g, w, f"{op} {layout}", may_be_zero=True)
        empty = any(isinstance(a, torch.Tensor) and not a.numel() for a in args)
        assert empty or any(bool((w != 0).any()) for w in wanted)


# ------------------------------------------------------------------------------------------------ refusals


def case_qgemm(**changes):
    qweight, scale, mult, (bits, four_level, group_size) = weight_of("w4")
    arguments = dict(
        q=torch.ones(2, K, dtype=torch.int8), act_scale=torch.ones(2), row_sum=None, qweight=qweight,
        weight_scale=scale, group_mult=mult, bias=None, residual=None, bits=bits, four_level=four_level,
        group_size=group_size, out_features=N, activation="none", out_dtype=torch.float32,
    )  # fmt: skip
    arguments.update(changes)
    return lambda: ops.qgemm(**arguments)


def case_embedding(ids=None, **changes):
    qweight, scale, mult, (bits, four_level, group_size) = weight_of("w8")
    arguments = dict(
        qweight=qweight, weight_scale=scale, group_mult=mult, position=None, bits=bits, four_level=four_level,
        group_size=group_size, num_embeddings=N, embedding_dim=K, embed_scale=1.0, out_dtype=torch.float32,
    )  # fmt: skip
    arguments.update(changes)
    return lambda: ops.qembedding(torch.tensor([0, N - 1]) if ids is None else ids, **arguments)


def quantize(x, mode="per_token", **kwargs):
    return lambda: ops.quantize_activation(x, mode, **kwargs)


def pack(weight=None, bits=4, quantizer="absmax", granularity="per_channel", group_size=-1, **kwargs):
    weight = torch.randn(N, K) if weight is None else weight
    return lambda: ops.quantize_weight(weight, bits, quantizer, granularity, group_size, **kwargs)


X = torch.randn(2, K)
ACT_SCALE = "mode='static' needs act_scale, one fp32 number: run dqkernels.calibrate"


def case_decode(**changes):
    arguments = dict(zip(("k_cache", "k_scale", "v_cache", "v_scale"), decode_cache(2), strict=True))
    arguments |= {"q": torch.randn(2, 3, 1, 8), "lengths": torch.tensor([1, 5], dtype=torch.int32), "source": None,
                  "bias": None, "causal": False, "softmax_scale": 1.0, **changes}  # fmt: skip
    return lambda: ops.qattention_decode(**arguments)


def case_long_head(head_dim):
    x = torch.randn(1, 1, 2, head_dim)
    return lambda: ops.qattention(x, x, x, *ATTENTION)


def test_the_nearest_attention_is_taken():
    """Beside each refusal of the table stands what is just allowed."""
    assert case_decode()().shape == (2, 3, 1, 8)
    assert case_long_head(1040)().any()
    with pytest.raises(IndexError, match=r"source must be in 0..1, got 0..2"):
        case_decode(source=torch.tensor([0, 2], dtype=torch.int32))()
    assert case_decode(source=torch.tensor([1, 1], dtype=torch.int32))().any()
    by_key = torch.tensor([[1, 7, 7, 7, 7], [0, 1, 1, 0, 1]], dtype=torch.int32)  # one key is visible, and five
    assert case_decode(source=by_key)().any()
    by_key[0, 0] = 2
    with pytest.raises(IndexError, match=r"source must be in 0..1, got 0..2"):
        case_decode(source=by_key)()


ATTENTION = (None, None, False, 1.0)
A4 = torch.randn(1, 2, 3, 4)
REFUSED = {
    "x of another dtype": (quantize(X.double()), "x must be float32, float16 or bfloat16, got torch.float64"),
    "x without rows": (quantize(torch.tensor(1.0)), r"x must be \[..., K\] with K in 1..131071, got shape \[\]"),
    "x with K = 0": (quantize(torch.empty(3, 0)), r"K in 1..131071, got shape \[3, 0\]"),
    "x with K too large": (quantize(torch.empty(0, 131_072)), r"got shape \[0, 131072\]"),
    "unknown mode": (quantize(X, "per_row"), "mode must be 'per_token', 'per_tensor' or 'static', got 'per_row'"),
    "static without a scale": (quantize(X, "static"), ACT_SCALE),
    "static with two scales": (quantize(X, "static", act_scale=torch.ones(2)), ACT_SCALE),
    "static with a 16-bit scale": (quantize(X, "static", act_scale=torch.ones(1).half()), ACT_SCALE),
    "static without calibration": (quantize(X, "static", act_scale=torch.tensor([float("nan")])), "got nan: run dqk"),
    "negative clip": (quantize(X, clip=-1.0), "clip must be None or a finite number above 0, got -1.0"),
    "clip of zero": (quantize(X, clip=0.0), "clip must be None or a finite number above 0, got 0.0"),
    "clip of NaN": (quantize(X, clip=float("nan")), "clip must be None or a finite number above 0, got nan"),
    "weight of three bits": (pack(bits=3), "bits must be 2, 4 or 8, got 3"),
    "weight of rank 1": (pack(torch.randn(5)), r"weight must be \[out_features, in_features\], got shape \[5\]"),
    "weight of integers": (pack(torch.ones(2, 3, dtype=torch.int8)), "weight must be a float matrix, got torch.int8"),
    "weight with K too large": (pack(torch.empty(0, 131_072)), "in_features must be 1..131071"),
    "unknown quantizer": (
        pack(quantizer="int4"),
        r"quantizer must be one of \['absmax', 'mse'\] at 4 bits, got 'int4'",
    ),
    "quantizer of another width": (pack(bits=2), r"one of \['ternary', 'four_level'\] at 2 bits, got 'absmax'"),
    "unknown granularity": (pack(granularity="per_row"), "granularity must be one of .* got 'per_row'"),
    "odd group": (pack(group_size=48), r"group_size must be one of \[-1, 32, 64, 128\], got 48"),
    "groups at 8 bits": (pack(bits=8, group_size=64), "group_size=64 needs 2 or 4 bits and granularity='per_channel'"),
    "groups per tensor": (pack(granularity="per_tensor", group_size=64), "needs 2 or 4 bits and granularity"),
    "weight clip": (pack(clip=0.0), "clip must be None or a finite number above 0, got 0.0"),
    "float codes": (case_qgemm(q=X), "q must be int8, got torch.float32"),
    "no codes": (
        case_qgemm(q=torch.ones(2, 0, dtype=torch.int8), qweight=torch.zeros(32, 0, dtype=torch.uint8)),
        r"q must be \[..., K\] with K in 1..131071, got shape \[2, 0\]",
    ),
    "codes of a K that overflows": (
        case_qgemm(
            q=torch.ones(1, 131_072, dtype=torch.int8),
            act_scale=torch.ones(1),
            qweight=torch.zeros(32, 65_536, dtype=torch.uint8),
        ),
        r"K in 1..131071, got shape \[1, 131072\]",
    ),
    "too few activation scales": (
        case_qgemm(act_scale=torch.ones(1)),
        r"act_scale must be float32 \[2\], one per row of q, got torch.float32 \[1\]",
    ),
    "16-bit activation scales": (case_qgemm(act_scale=torch.ones(2).half()), r"act_scale must be float32 \[2\]"),
    "too few row sums": (
        case_qgemm(row_sum=torch.ones(1, dtype=torch.int32)),
        r"row_sum must be int32 \[2\], one per row of q, got torch.int32 \[1\]",
    ),
    "row sums of another type": (case_qgemm(row_sum=torch.ones(2)), r"row_sum must be int32 \[2\]"),
    "qweight of another K": (
        case_qgemm(q=torch.ones(2, 129, dtype=torch.int8)),
        r"uint8 \[32, 128\] for out_features=19, in_features=129, bits=4, got torch.uint8 \[32, 64\]",
    ),
    "qweight of another N": (case_qgemm(out_features=33), r"qweight must be uint8 \[48, 64\]"),
    "qweight of another width": (case_qgemm(bits=2), r"qweight must be uint8 \[32, 32\]"),
    "16-bit weight_scale": (
        case_qgemm(weight_scale=torch.ones(N).half()),
        "weight_scale must be float32 with 19 values or 1, got torch.float16 with 19",
    ),
    "weight_scale of another length": (case_qgemm(weight_scale=torch.ones(18)), "got torch.float32 with 18"),
    "group_size without multipliers": (case_qgemm(group_size=32), "group_size=32 and group_mult=None"),
    "multipliers without group_size": (
        case_qgemm(group_mult=torch.ones(N, 3, dtype=torch.uint8)),
        "group_size=-1 and group_mult=given",
    ),
    "too few multipliers": (
        case_qgemm(group_size=32, group_mult=torch.ones(N, 2, dtype=torch.uint8)),
        r"group_mult must be uint8 \[19, 3\], got torch.uint8 \[19, 2\]",
    ),
    "multipliers of another type": (
        case_qgemm(group_size=32, group_mult=torch.ones(N, 3)),
        r"group_mult must be uint8 \[19, 3\], got torch.float32 \[19, 3\]",
    ),
    "bias of another length": (case_qgemm(bias=torch.ones(20)), r"bias must be \[19\], got \[20\]"),
    "residual that would broadcast": (
        case_qgemm(residual=torch.ones(1, N)),
        r"residual must be \[2, 19\], got \[1, 19\]",
    ),
    "64-bit bias": (
        case_qgemm(bias=torch.ones(N).double()),
        "bias must be float32, float16 or bfloat16, got torch.float64",
    ),
    "integer residual": (
        case_qgemm(residual=torch.ones(2, N, dtype=torch.int32)),
        "residual must be float32, float16 or bfloat16, got torch.int32",
    ),
    "groups of 7": (
        case_qgemm(group_size=7, group_mult=torch.ones(N, 10, dtype=torch.uint8)),
        r"group_size must be one of \[-1, 32, 64, 128\], got 7",
    ),
    "unknown activation": (case_qgemm(activation="silu"), "activation must be one of .* got 'silu'"),
    "integer output": (case_qgemm(out_dtype=torch.int8), "out_dtype must be float32, float16 or bfloat16"),
    "linear of another K": (lambda: linear(torch.randn(2, 200)), "qweight must be uint8"),
    "linear, residual": (lambda: linear(X, residual=torch.ones(N)), r"residual must be \[2, 19\], got \[19\]"),
    "float ids": (case_embedding(torch.ones(2)), "ids must be int64 or int32, got torch.float32"),
    "table of another width": (case_embedding(embedding_dim=200), "qweight must be uint8"),
    "position that does not fit": (
        case_embedding(position=torch.ones(3, 2, K)),
        r"position must broadcast to \[2, 70\], got \[3, 2, 70\]",
    ),
    "layernorm residual": (
        lambda: ops.layernorm_quantize(X, X[:1], torch.ones(K), None, 1e-5, "per_token"),
        r"residual must be \[2, 70\], got \[1, 70\]",
    ),
    "layernorm weight": (
        lambda: ops.layernorm_quantize(X, None, torch.ones(K - 1), None, 1e-5, "per_token"),
        r"weight must be \[70\], got \[69\]",
    ),
    "64-bit position": (
        case_embedding(position=torch.ones(2, K).double()),
        "position must be float32, float16 or bfloat16, got torch.float64",
    ),
    "layernorm weight of another type": (
        lambda: ops.layernorm_quantize(X, None, torch.ones(K).double(), None, 1e-5, "per_token"),
        "weight must be float32, float16 or bfloat16, got torch.float64",
    ),
    "layernorm bias": (
        lambda: ops.layernorm_quantize(X, None, torch.ones(K), torch.ones(1, K), 1e-5, "per_token"),
        r"bias must be \[70\], got \[1, 70\]",
    ),
    "dequantize with the scales of another matrix": (
        lambda: ops.dequantize_weight(*weight_of("w4")[:2], None, 4, False, -1, 18, K),
        "weight_scale must be float32 with 18 values or 1, got torch.float32 with 19",
    ),
    "gelu of integers": (lambda: ops.gelu_quantize(X.int(), "per_token"), "x must be float32"),
    "attention of rank 3": (lambda: ops.qattention(A4[0], A4, A4, *ATTENTION), r"q must be \[batch, heads, length"),
    "keys and values": (lambda: ops.qattention(A4, A4, A4[:, :, :2], *ATTENTION), "q, k, v do not fit"),
    "static attention": (lambda: ops.qattention(A4, A4, A4, *ATTENTION, "static"), "'per_token' or 'per_tensor'"),
    "attention of a long head": (case_long_head(1041), r"head_dim must be 1..1040, .* got 1041"),
    "additive mask": (
        lambda: ops.qattention(A4, A4, A4, torch.zeros(3, 3), None, False, 1.0),
        "mask must be bool, True where a key is visible, got torch.float32",
    ),
    "mask of other keys": (
        lambda: ops.qattention(A4, A4, A4, torch.ones(1, 2, 1, 4, dtype=torch.bool), None, False, 1.0),
        r"mask must broadcast to \[1, 2, 3, 3\], got \[1, 2, 1, 4\]",
    ),
    "bias of more batches": (
        lambda: ops.qattention(A4, A4, A4, None, torch.ones(2, 2, 3, 3), False, 1.0),
        r"bias must broadcast to \[1, 2, 3, 3\], got \[2, 2, 3, 3\]",
    ),
    "too many keys": (
        lambda: ops.qattention(A4, *[A4[:, :, :1].expand(1, 2, 131_072, 4)] * 2, *ATTENTION),
        "at most 131071 keys keep the int32 sums exact, got 131072",
    ),
    "decode, float cache": (
        case_decode(k_cache=torch.ones(2, 3, 5, 8)),
        r"k_cache must be int8 \[caches, 3, capacity, 8",
    ),
    "decode, other heads": (
        case_decode(v_cache=torch.ones(2, 4, 5, 8, dtype=torch.int8)),
        r"v_cache must be int8 .* got torch.int8 \[2, 4, 5, 8\]",
    ),
    "decode, other capacity": (
        case_decode(v_cache=torch.ones(2, 3, 6, 8, dtype=torch.int8)),
        "k_cache and v_cache differ",
    ),
    "decode, scale of a head": (case_decode(v_scale=torch.ones(2, 3)), r"v_scale must be float32 \[2, 3, 5\], got"),
    "decode, int64 lengths": (
        case_decode(lengths=torch.tensor([1, 2])),
        r"lengths must be int32 \[2\], got torch.int64",
    ),
    "decode, too long": (
        case_decode(lengths=torch.tensor([1, 6], dtype=torch.int32)),
        r"lengths must be in 0..5, got 1..6",
    ),
    "decode, shared by whom": (
        case_decode(q=torch.randn(3, 3, 1, 8), lengths=torch.ones(3, dtype=torch.int32)),
        "source must name the cache of each row: q has 3 rows, k_cache 2 caches",
    ),
    "decode, a cache for some keys": (
        case_decode(source=torch.zeros(2, 4, dtype=torch.int32)),
        r"source must be int32 \[2\], or \[2, 5\] with a cache per key, got torch.int32 \[2, 4\]",
    ),
    "decode, static": (case_decode(mode="static"), "mode must be 'per_token' or 'per_tensor'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument_what_was_found_and_what_is_wanted(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_limits_themselves_pass():
    """Positive controls: what stands next to a refused value works."""
    assert case_qgemm()().shape == (2, N)
    assert case_qgemm(row_sum=torch.zeros(0, dtype=torch.int32))().shape == (2, N)
    # What quantize_weight returns goes in as it is.
    qweight, scale, mult = ops.quantize_weight(torch.randn(N, K), 4, "absmax", "per_channel")
    assert mult.shape == (0,)
    q, act_scale, _ = ops.quantize_activation(X, "per_token")
    tail = (None, None, 4, False, -1, N, "none", torch.float32)
    assert_same_bits(ops.qgemm(q, act_scale, None, qweight, scale, mult, *tail),
                     ops.qgemm(q, act_scale, None, qweight, scale, None, *tail))  # fmt: skip
    assert case_embedding()().shape == (2, K)
    assert case_embedding(position=torch.ones(1, K))().shape == (2, K)
    assert case_embedding(position=torch.ones(K))().shape == (2, K)
    assert quantize(torch.empty(0, qmath.MAX_K))()[0].shape == (0, qmath.MAX_K)
    assert quantize(X, "static", act_scale=torch.ones(1))()[0].shape == (2, K)
    assert pack(group_size=128)()[2].shape == (N, 1)


@pytest.mark.parametrize("ids", [[0, N], [-1, 0], [N + 12]])
def test_ids_outside_the_table_are_an_error_although_padding_rows_exist(ids):
    assert packing.padded_n(N) == 32
    with pytest.raises(IndexError, match=rf"ids must be in 0..{N - 1}, got"):
        case_embedding(torch.tensor(ids))()
    assert case_embedding(torch.tensor([N - 1]))().shape == (1, K)
    assert case_embedding(torch.empty(0, dtype=torch.int64))().shape == (0, K)


# ----------------------------------------------------------------------------------------------- gradients


def parts64(x, weight, mode, clip, act_scale):
    """What the straight-through estimator differentiates, in float64: pre-activation, matrix and clip mask."""
    qweight, scale, mult, (bits, four_level, group_size) = weight
    flat = x.detach().float().reshape(-1, K).numpy()
    q, act, _ = oracle.quantize_activation(flat, mode, clip, None if act_scale is None else act_scale.item())
    codes = packing.unpack(qweight, N, K, bits).numpy()
    m = None if mult is None else mult.numpy()
    level = oracle.accumulate(np.eye(K, dtype=np.int64), codes, m, four_level, group_size).T
    matrix = level * scale.double().reshape(-1, 1).numpy()
    pre = (q * act.astype(np.float64)[:, None]) @ matrix.T
    mask = np.ones_like(flat) if clip is None else (np.abs(flat) < clip)
    return torch.from_numpy(pre), torch.from_numpy(matrix), torch.from_numpy(mask.astype(np.float64))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("mode, clip", [("per_token", None), ("per_tensor", 1.5), ("static", 1.5)])
def test_qlinear_gradient_is_the_closed_form_of_the_straight_through_estimator(name, activation, mode, clip):
    """Zero where |x| >= clip, boundary included (paper.md section 1.5); no gradient through scales or codes."""
    weight = weight_of(name)
    act_scale = torch.tensor([0.01]) if mode == "static" else None
    x = torch.randn(2, 3, K)
    if clip is not None:
        x[0, 0, :4] = torch.tensor([clip, -clip, 3 * clip, np.nextafter(np.float32(clip), np.float32(0))])
    x.requires_grad_()
    bias, residual = torch.randn(N, requires_grad=True), torch.randn(2, 3, N, requires_grad=True)
    upstream = torch.randn(2, 3, N)
    y = linear(x, weight=weight, bias=bias, residual=residual, mode=mode, clip=clip, act_scale=act_scale,
               activation=activation)  # fmt: skip
    y.backward(upstream)

    pre, matrix, mask = parts64(x, weight, mode, clip, act_scale)

    def closed_form(dtype):
        inner = (pre.to(dtype) + bias.detach().to(dtype)).requires_grad_()
        out = {"none": lambda t: t * 1, "relu": F.relu, "gelu": F.gelu}[activation](inner)
        (grad,) = torch.autograd.grad(out, inner, upstream.reshape(-1, N).to(dtype))
        return (grad @ matrix.to(dtype)) * mask.to(dtype), grad.sum(dim=0)

    (truth_x, truth_bias), (eager_x, eager_bias) = closed_form(torch.float64), closed_form(torch.float32)
    assert_bounded(x.grad.reshape(-1, K), truth_x, eager_x, "x")
    assert_bounded(bias.grad, truth_bias, eager_bias, "bias")
    assert_same_bits(residual.grad, upstream, "residual")
    if clip is not None:
        assert x.grad[0, 0, :4].tolist()[:3] == [0.0, 0.0, 0.0] and x.grad[0, 0, 3] != 0
        assert int((mask == 0).sum()) > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_their_inputs(dtype):
    x = torch.randn(3, K).to(dtype).requires_grad_()
    bias = torch.randn(N, requires_grad=True)
    residual = torch.randn(3, N).to(dtype).requires_grad_()
    weight = weight_of("w4")
    linear(x, weight=weight, bias=bias, residual=residual).sum().backward()
    assert x.grad.dtype == residual.grad.dtype == dtype and bias.grad.dtype == torch.float32
    matrix = ops.dequantize_weight(*weight[:3], *weight[3], N, K)
    assert_same_bits(x.grad, matrix.sum(dim=0).expand(3, K).to(dtype).contiguous(), "a sum's gradient")
    assert_equal(bias.grad, np.full(N, 3.0))


def test_only_what_needs_a_gradient_gets_one():
    x, bias = torch.randn(3, K), torch.randn(N, requires_grad=True)
    linear(x, bias=bias).sum().backward()
    assert x.grad is None and bool((bias.grad != 0).all())
    x.requires_grad_()
    linear(x).sum().backward()
    assert bool((x.grad != 0).any())


@pytest.mark.parametrize("shape", [(2, 3, K), (3, K), (K,), (1, 1, K)])
def test_position_gradient_of_qembedding(shape):
    position = torch.randn(shape, requires_grad=True)
    ids = torch.randint(0, N, (2, 3))
    qweight, scale, mult, format_ = weight_of("w4")
    out = ops.qembedding(ids, qweight, scale, mult, position, *format_, N, K, 1.0, torch.float32)
    upstream = torch.randn(2, 3, K)
    out.backward(upstream)
    truth = upstream.double().sum_to_size(shape)
    assert_bounded(position.grad, truth, upstream.sum_to_size(shape), "position")


@pytest.mark.parametrize("op", ["quantize_activation", "gelu_quantize", "layernorm_quantize", "qattention_decode"])
def test_inference_ops_refuse_backward_in_words(op):
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    arguments = {
        "quantize_activation": (x, "per_token"),
        "gelu_quantize": (x, "per_token"),
        "layernorm_quantize": (x, None, torch.ones(4), None, 1e-5, "per_token"),
        "qattention_decode": (
            x,
            *decode_cache(1, 2, 6, 4),
            torch.tensor([6], dtype=torch.int32),
            None,
            None,
            True,
            1.0,
        ),
    }[op]
    out = getattr(ops, op)(*arguments)
    floats = [t for t in (out if isinstance(out, tuple | list) else [out]) if t.requires_grad]
    assert floats
    with pytest.raises(RuntimeError, match=f"dqkernels::{op} has no gradient: it is an inference op"):
        floats[0].sum().backward()
