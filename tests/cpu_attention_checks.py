"""Checks of the compiled core's prefill attention against tests/oracle_attention.py, and what those of decoding share.

cpu_attention_checks_decode.py is the program that runs them.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import oracle_attention
import torch

from dqkernels import qmath, reference
from dqkernels.kernels import cpu_attention

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("per_token", "per_tensor")
CHECKS = {}
SEEN = hashlib.sha256()


def check(function):
    CHECKS[function.__name__] = function
    return function


def wide(tensor):
    return None if tensor is None else tensor.float().numpy()


def same(got, want, what):
    """Equal bits; NaN equals NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {list(got.shape)}"
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    wrong = (got.contiguous().view(bits) != want.contiguous().view(bits)) & ~(got.isnan() & want.isnan())
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ"


def note(given):
    """Into the digest; one NaN is as good as another."""
    result = torch.where(given.isnan(), NAN, given) if given.is_floating_point() else given
    SEEN.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return given


def attend(q, k, v, mask=None, bias=None, causal=False, scale=None, mode="per_token", clip=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return note(cpu_attention.qattention(q, k, v, mask, bias, causal, scale, mode, clip))


def assert_attention(q, k, v, mask=None, bias=None, causal=False, scale=None, mode="per_token", clip=None):
    """One call equals the oracle within its bound; returns the result and (rows, possible flips)."""
    got = attend(q, k, v, mask, bias, causal, scale, mode, clip)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    assert got.dtype == q.dtype and got.shape == q.shape and got.is_contiguous()
    with np.errstate(all="ignore"):
        scaled = wide(q) * np.float32(head_dim**-0.5 if scale is None else scale)
    codes = [oracle_attention.quantize(x, mode, clip) for x in (scaled, wide(k), wide(v))]
    mask = None if mask is None else mask.expand(batch, heads, queries, keys).numpy()
    seen = np.broadcast_to(oracle_attention.visible_keys(queries, keys, causal, mask), (batch, heads, queries, keys))
    bias = None if bias is None else wide(bias.expand(batch, heads, queries, keys))
    what = f"{list(q.shape)} on {keys} keys, causal {causal}, {mode}, {q.dtype}"
    (q8, qs), (k8, ks), (v8, vs) = codes
    found = oracle_attention.assert_attention(
        wide(got), q8, qs, k8, ks, v8, vs, seen, bias, str(q.dtype).split(".")[1], what
    )
    return got, found


def qkv(seed, batch, heads, queries, keys, head_dim, dtype=torch.float32, spread=1.0):
    """Random q, k, v in the memory layout of a model: [batch, tokens, heads, head_dim], transposed."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, head_dim, generator=g) for n in (queries, keys, keys))
    v = v * torch.exp(spread * torch.randn(batch, keys, heads, 1, generator=g))  # so that the V scales differ
    return tuple(x.to(dtype).transpose(1, 2) for x in (q, k, v))


# Queries around the 4 that share a pass and the 32 of a task, keys around vectors of 8 and blocks of 256, head_dims
# around vectors of 4, 8, 32 and 64 elements. (batch, heads, queries, keys, head_dim)
SHAPES = (
    (1, 1, 1, 1, 1), (2, 3, 1, 65, 64), (1, 2, 7, 3, 8), (2, 1, 3, 64, 40), (1, 2, 4, 63, 32), (1, 1, 5, 129, 80),
    (1, 1, 31, 128, 96), (2, 2, 5, 191, 128), (1, 1, 33, 7, 33), (1, 1, 65, 9, 63), (1, 1, 6, 257, 127),
    (1, 1, 3, 513, 31), (1, 2, 2, 15, 5), (1, 1, 9, 16, 2), (1, 1, 2, 8, 1040), (2, 1, 3, 17, 1039), (1, 1, 5, 24, 200),
)  # fmt: skip
MASKS = ("none", "keys", "pairs", "full")
BIASES = ("none", "heads", "keys")


def mask_of(kind, g, batch, heads, queries, keys):
    if kind == "none":
        return None
    shape = {"keys": (batch, 1, 1, keys), "pairs": (queries, keys), "full": (batch, heads, queries, keys)}[kind]
    return torch.rand(shape, generator=g) < 0.7


def bias_of(kind, g, heads, queries, keys):
    if kind == "none":
        return None
    if kind == "heads":  # T5's
        return torch.randn(1, heads, queries, keys, generator=g)
    return (torch.randn(keys, generator=g) * 2).to(torch.bfloat16)


@check
def attention_grid():
    """17 shapes x 4 masks; bias, causal, scale granularity, clip and type dealt around: 68 cases, few flips."""
    rest = list(itertools.product(BIASES, (False, True), MODES, (None, 1.5), DTYPES))
    total = np.zeros(2, int)
    for i, (shape, mask) in enumerate(itertools.product(SHAPES, MASKS)):
        bias, causal, mode, clip, dtype = rest[(i * 31 + i // 4) % len(rest)]
        batch, heads, queries, keys, _ = shape
        g = torch.Generator().manual_seed(i)
        _, found = assert_attention(
            *qkv(i, *shape, dtype), mask_of(mask, g, batch, heads, queries, keys),
            bias_of(bias, g, heads, queries, keys), causal, None, mode, clip,
        )  # fmt: skip
        total += found
    rows, flips = total
    assert rows > 800 and flips < rows / 50, f"{flips} possible flips in {rows} rows: the bound proves little"
    return int(rows)


@check
def lengths_up_to_4096():
    """Whole sequences and single queries over up to 4096 keys; what most keys share is nothing, or all the same."""
    for i, (queries, keys, spread) in enumerate(
        ((3, 1000, 1.0), (1, 4095, 8.0), (5, 4096, 0.05), (2, 2049, 30.0), (40, 640, 3.0))
    ):
        q, k, v = qkv(100 + i, 1, 1, queries, keys, 64, torch.float32)
        assert_attention(q * spread, k, v, causal=i % 2 == 1)
    # Every share at its largest, every value too: the largest sums there are, in 16 bits and in 32.
    q, k, v = torch.ones(1, 1, 5, 64), torch.ones(1, 1, 4096, 64), torch.full((1, 1, 4096, 64), -3.0)
    got, _ = assert_attention(q, k, v)
    assert (got == -3).all()
    for keys in (1, 2, 3, 5, 4096):
        last = torch.full((1,), keys, dtype=torch.int32)
        out = decode(q[:, :, :1], cache_of(k[:, :, :keys], v[:, :, :keys], keys), last)
        assert (out == -3).all()
    return 10


@check
def every_head_dim():
    """1 to 136, prefill and decoding of one query, against the reference, which has no vectors."""
    for head_dim in range(1, 137):
        q, k, v = qkv(head_dim, 1, 1, 4, 11, head_dim)
        want = reference.qattention(q, k, v, None, None, causal=True, softmax_scale=0.3, mode="per_token", clip=None)
        got = attend(q, k, v, causal=True, scale=0.3)
        close(got, want, v, f"head_dim {head_dim}")
        cache = cache_of(k, v, 13)
        for i in range(4):
            last = torch.tensor([8 + i], dtype=torch.int32)
            same(decode(q[:, :, i : i + 1], cache, last, scale=0.3), got[:, :, i : i + 1], f"{head_dim}, query {i}")
    return 136


def close(got, want, v, what):
    """At most a flip of one code in a row: so few keys that it would be seen."""
    assert (got - want).abs().max() <= 2 * v.abs().max() / 127, what
    assert (got != want).any(dim=-1).sum() <= 1, f"{what}: more rows differ than codes can have flipped"


@check
def no_bit_depends_on_company():
    """A sequence alone, beside a longer one, padded with hidden rubbish, and run again: the same bits."""
    q, k, v = qkv(3, 3, 2, 9, 100, 40)
    mask = torch.rand(3, 1, 1, 100, generator=torch.Generator().manual_seed(4)) < 0.8
    whole = attend(q, k, v, mask)
    assert whole.any()
    for _ in range(3):
        same(attend(q, k, v, mask), whole, "repeated")
    for i in range(3):
        alone = slice(i, i + 1)
        same(attend(q[alone], k[alone], v[alone], mask[alone]), whole[alone], f"sequence {i} alone")
    for i in range(9):
        same(attend(q[:, :, i : i + 1], k, v, mask), whole[:, :, i : i + 1], f"query {i} alone")
    for rubbish in (0.0, 1e30, NAN, INF):
        tail = torch.full((3, 2, 37, 40), rubbish)
        longer = torch.cat([k, tail], 2), torch.cat([v, tail], 2)
        hidden = torch.cat([mask, torch.zeros(3, 1, 1, 37, dtype=torch.bool)], 3)
        same(attend(q, *longer, hidden), whole, f"padded with {rubbish}")
        same(attend(q, *longer, hidden.expand(3, 1, 9, 137).contiguous()), whole, f"{rubbish}, a mask per query")
        before = torch.cat([tail, k], 2), torch.cat([tail, v], 2)
        same(attend(q, *before, torch.cat([hidden[..., 100:], mask], 3)), whole, f"{rubbish} in front")
    shown = [mask[i, 0, 0] for i in range(3)]
    for i in range(3):
        one = slice(i, i + 1)
        same(attend(q[one], k[one][:, :, shown[i]], v[one][:, :, shown[i]]), whole[one], "removed keys")
    return 40


@check
def neighbours_that_look_elsewhere():
    """Queries that share a pass over the values: each at keys of its own, all at the same, and some of both. The keys
    are so far apart that hardly any group of 4 has a share of two of them."""
    g = torch.Generator().manual_seed(6)
    k, v = torch.randn(1, 1, 700, 64, generator=g), torch.randn(1, 1, 700, 64, generator=g)
    k[..., 0] = 0.0
    own, same_key = torch.arange(9) * 70 + 5, torch.full((9,), 333)
    for name, at in (("own keys", own), ("one key", same_key), ("both", torch.where(own % 4 == 1, own, same_key))):
        q = 40 * k[:, :, at]
        got, _ = assert_attention(q, k, v)
        for i in range(9):
            same(attend(q[:, :, i : i + 1], k, v), got[:, :, i : i + 1], f"{name}, query {i} alone")
            assert (got[0, 0, i] - v[0, 0, at[i]]).abs().max() < 0.05, f"{name}: query {i} sees another key"
    return 27


@check
def a_triangle_is_a_mask():
    """A causal mask is a triangle of a mask, for more and for fewer queries than keys; decoding agrees with it."""
    for queries, keys in ((20, 70), (70, 70), (70, 20)):
        q, k, v = qkv(5, 1, 2, queries, keys, 32)
        triangle = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        got, _ = assert_attention(q, k, v, causal=True)
        same(attend(q, k, v, triangle), got, f"{queries} x {keys}")
        blind = max(queries - keys, 0)
        assert not got[:, :, :blind].any() and got[:, :, blind:].any(dim=-1).all()
    return 3


@check
def special_values():
    """NaN and Inf mark the rows that see them and no other; zeros, huge scores and infinite biases."""
    q, k, v = qkv(7, 1, 1, 6, 70, 16)
    mask = torch.ones(6, 70, dtype=torch.bool)
    mask[2, 65], mask[3] = False, False
    mask[4, 1:] = False
    clean, _ = assert_attention(q, k, v, mask)
    assert not clean[0, 0, 3].any() and clean[0, 0, [0, 1, 2, 4, 5]].any(dim=-1).all()
    for bad, which in itertools.product((NAN, INF, -INF), range(3)):
        spoilt = [q.clone(), k.clone(), v.clone()]
        spoilt[which][0, 0, 1 if which == 0 else 65, 3] = bad
        got, _ = assert_attention(*spoilt, mask)
        wrong = got[0, 0].isnan().all(dim=-1).tolist()
        # Query 2 does not look at key 65, query 3 at none, query 4 only at key 0.
        assert wrong == ([False, True] + [False] * 4 if which == 0 else [True, True, False, False, False, True]), wrong
        spared = [i for i in range(6) if not wrong[i]]
        same(got[:, :, spared], clean[:, :, spared], f"{bad} in {'qkv'[which]}")
        assert_attention(*spoilt, mask, mode="per_tensor")
    for scale in (0.0, 1e-30, 1e25, 1e36):
        assert_attention(q * scale, k * 100, v, mask)
        assert_attention(q, k, v * min(scale, 1e25), mask)
    for value in (-INF, INF, NAN, -3.4e38):
        for at in (slice(0, 1), slice(None)):
            bias = torch.zeros(70)
            bias[at] = value
            got, _ = assert_attention(q, k, v, mask, bias)
            assert got.isnan().any() == (value != -INF and value != -3.4e38)
    assert_attention(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), mask)
    zero_row = v.clone()
    zero_row[0, 0, 5] = 0
    assert_attention(q, k, zero_row, mask)
    assert_attention(q, k, zero_row * 1e-3, mask)  # its scale, 1 by convention, must not become the largest
    tiny = v.clone()
    tiny[0, 0, 6] *= 1e-6  # under per_tensor all its codes are 0, though its scale is everybody's
    assert_attention(q, k, tiny, mask, mode="per_tensor")
    return 40


@check
def layouts():
    """Sliced, expanded, contiguous, element-strided and unaligned inputs; masks and biases broadcast along any axis."""
    q, k, v = qkv(8, 2, 2, 6, 20, 24)
    want = attend(q, k, v)
    same(attend(*(x.contiguous() for x in (q, k, v))), want, "contiguous")
    same(attend(*(torch.cat([x, x], 3)[..., :24] for x in (q, k, v))), want, "rows within longer rows")
    same(attend(*(torch.stack([x, x], 4)[..., 0] for x in (q, k, v))), want, "every other element")
    same(attend(*(unaligned(x) for x in (q, k, v))), want, "unaligned")
    shared = attend(q[:1].expand(2, 2, 6, 24), k[:1].expand(2, 2, 20, 24), v[:1].expand(2, 2, 20, 24))
    same(shared, want[:1].expand(2, 2, 6, 24), "one batch for all")
    same(attend(q, k.half(), v.bfloat16()), attend(q, k.half().float(), v.bfloat16().float()), "three types")
    half = q.half()
    same(attend(half, k, v), attend(half.float(), k, v).half(), "a narrow q")
    g = torch.Generator().manual_seed(9)
    for shape in itertools.product((1, 2), (1, 2), (1, 6), (1, 20)):
        mask, bias = torch.rand(shape, generator=g) < 0.8, torch.randn(shape, generator=g)
        assert_attention(q, k, v, mask, bias)
    flipped = torch.randn(20, 6, generator=g).T
    assert_attention(q, k, v, flipped > 0, flipped)
    assert_attention(q, k, v, None, unaligned(flipped))
    wide_mask = torch.rand(2, 2, 6, 40, generator=g) < 0.8
    assert_attention(q, k, v, wide_mask[..., ::2], None)
    single = [x[..., :1] for x in (q, k, v)]  # a last axis of one element has any stride
    same(attend(*single), attend(*(x.contiguous() for x in single)), "head_dim 1")
    return 30


def unaligned(x):
    flat = torch.frombuffer(bytearray(1 + x.numel() * x.element_size()), dtype=x.dtype, offset=1, count=x.numel())
    return flat.view(x.shape).copy_(x)


@check
def nothing():
    """No batch, query or key: zeros or empties of q's type."""
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q, k, v = qkv(10, batch, 2, queries, keys, 8, torch.float16)
        for mode in MODES:
            got = attend(q, k, v, mode=mode)
            assert got.shape == q.shape and got.dtype == q.dtype and not got.any()
    return 6


def cache_of(k, v, capacity, mode="per_token", clip=None):
    """k_cache, k_scale, v_cache, v_scale of float K and V; rubbish behind the last key, as in unwritten memory."""
    out = []
    for x in (k, v):
        codes, scale, _ = qmath.quantize_activation(x, mode, clip)
        scale = reference.value_scale(codes, scale) if x is v else scale
        batch, heads, keys, head_dim = x.shape
        cache = torch.full((batch, heads, capacity, head_dim), -128, dtype=torch.int8)
        cache[:, :, :keys] = codes
        scales = torch.full((batch, heads, capacity), NAN)
        scales[:, :, keys::2] = -INF
        scales[:, :, :keys] = scale
        out += [cache, scales]
    return out


def decode(q, cache, lengths, source=None, bias=None, causal=False, scale=None, mode="per_token", clip=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths, source = (None if x is None else torch.as_tensor(x, dtype=torch.int32) for x in (lengths, source))
    return note(cpu_attention.qattention_decode(q, *cache, lengths, source, bias, causal, scale, mode, clip))
