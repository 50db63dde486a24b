"""Checks of Triton's attention kernels against tests/oracle_attention.py, as triton_checks.py does for the GEMM.

By hand: `TRITON_INTERPRET=1 python tests/triton_checks_attention.py`.
"""

import itertools

import numpy as np
import oracle_attention
import torch
import triton_checks
from compare import assert_bounded
from triton_checks import DTYPES, assert_same, refuses

CHECKS = {}
NAN, INF = float("nan"), float("inf")


def check(function):
    CHECKS[function.__name__] = function
    return function


def wide(tensor):
    return None if tensor is None else tensor.detach().cpu().float().numpy()


def attend(q, k, v, mask=None, bias=None, causal=False, scale=None, mode="per_token", clip=None, tile=None):
    """The launcher with its defaults filled in."""
    from dqkernels.kernels import attention

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention.qattention(q, k, v, mask, bias, causal, scale, mode, clip, tile)


def assert_attention(q, k, v, mask=None, bias=None, causal=False, scale=None, mode="per_token", clip=None, tile=None):
    """One call equals the oracle within its bound; returns the result and (rows, possible flips)."""
    got = attend(q, k, v, mask, bias, causal, scale, mode, clip, tile)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    assert got.dtype == q.dtype and got.shape == q.shape and got.is_contiguous()
    with np.errstate(all="ignore"):
        scaled = wide(q) * np.float32(head_dim**-0.5 if scale is None else scale)
    codes = [oracle_attention.quantize(x, mode, clip) for x in (scaled, wide(k), wide(v))]
    mask = None if mask is None else mask.cpu().expand(batch, heads, queries, keys).numpy()
    seen = np.broadcast_to(oracle_attention.visible_keys(queries, keys, causal, mask), (batch, heads, queries, keys))
    bias = None if bias is None else wide(bias.expand(batch, heads, queries, keys))
    what = f"{list(q.shape)} on {keys} keys, causal {causal}, {mode}, {q.dtype}, tile {tile}"
    (q8, qs), (k8, ks), (v8, vs) = codes
    found = oracle_attention.assert_attention(
        wide(got), q8, qs, k8, ks, v8, vs, seen, bias, str(q.dtype).split(".")[1], what
    )
    return got, found


def qkv(seed, batch, heads, queries, keys, head_dim, device, dtype=torch.float32, values=1.0):
    """Random q, k, v in the memory layout of a model: [batch, tokens, heads, head_dim], transposed."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, heads, head_dim, generator=g) for n in (queries, keys, keys))
    v = v * torch.exp(values * torch.randn(batch, keys, heads, 1, generator=g))  # so that the V scales differ
    return tuple(x.to(dtype).to(device).transpose(1, 2) for x in (q, k, v))


# Queries around the tiles of 16, 64 and 128, keys around those of 64 and the padding of 128, head_dims below, at
# and between the powers of two. (batch, heads, queries, keys, head_dim)
SHAPES = (
    (1, 1, 1, 1, 1), (2, 3, 1, 65, 64), (1, 2, 7, 3, 8), (2, 1, 15, 64, 40), (1, 2, 16, 63, 32), (1, 1, 17, 129, 80),
    (1, 1, 33, 128, 96), (2, 2, 5, 191, 128), (1, 1, 64, 31, 33), (1, 1, 65, 130, 64), (1, 1, 130, 66, 127),
)  # fmt: skip
MASKS = ("none", "keys", "pairs", "full")
BIASES = ("none", "heads", "keys")


def mask_of(kind, g, batch, heads, queries, keys, device):
    if kind == "none":
        return None
    shape = {"keys": (batch, 1, 1, keys), "pairs": (queries, keys), "full": (batch, heads, queries, keys)}[kind]
    return (torch.rand(shape, generator=g) < 0.7).to(device)


def bias_of(kind, g, heads, queries, keys, device):
    if kind == "none":
        return None
    if kind == "heads":  # T5's
        return torch.randn(1, heads, queries, keys, generator=g).to(device)
    return (torch.randn(keys, generator=g) * 2).to(torch.bfloat16).to(device)


@check
def attention_grid(device):
    """11 shapes x 4 masks; bias, causal, scale granularity, clip and type dealt around: 44 cases, few flips."""
    rest = list(itertools.product(BIASES, (False, True), ("per_token", "per_tensor"), (None, 1.5), DTYPES))
    total = np.zeros(2, int)
    for i, (shape, mask) in enumerate(itertools.product(SHAPES, MASKS)):
        bias, causal, mode, clip, dtype = rest[(i * 31 + i // 4) % len(rest)]
        batch, heads, queries, keys, _ = shape
        g = torch.Generator().manual_seed(i)
        _, found = assert_attention(
            *qkv(i, *shape, device, dtype),
            mask_of(mask, g, batch, heads, queries, keys, device), bias_of(bias, g, heads, queries, keys, device),
            causal, None, mode, clip,
        )  # fmt: skip
        total += found
    rows, flips = total
    assert rows > 1000 and flips < rows / 50, f"{flips} possible flips in {rows} rows: the bound proves little"


#: Lengths of whole documents, and one beyond a power of two; as many queries, and few. Few heads: the oracle is numpy.
#: (batch, heads, queries, keys, head_dim, causal, mask, bias)
LONG = (
    (1, 1, 512, 512, 64, True, "none", "none"), (2, 2, 640, 1024, 64, False, "keys", "none"),
    (1, 2, 1025, 1025, 40, True, "keys", "heads"), (1, 1, 5, 4096, 128, False, "pairs", "heads"),
    (1, 1, 1024, 4096, 64, True, "none", "none"), (1, 2, 700, 4096, 64, False, "keys", "none"),
    (1, 1, 4095, 4095, 32, True, "keys", "keys"),
)  # fmt: skip


def assert_long(shape, device, dtype, mode="per_token"):
    """A case of LONG against the oracle; (rows, possible flips)."""
    batch, heads, queries, keys, head_dim, causal, mask, bias = shape
    g = torch.Generator().manual_seed(keys)
    masks = mask_of(mask, g, batch, heads, queries, keys, device), bias_of(bias, g, heads, queries, keys, device)
    got, found = assert_attention(
        *qkv(keys, batch, heads, queries, keys, head_dim, device, dtype), *masks, causal, None, mode
    )
    assert got.any() and found[1] <= 1 + found[0] / 4, f"{found}: the bound proves little"
    return found


@check
def attention_long(device):
    """4,096 keys, for few queries (test_gpu_triton.py has as many queries): sums of many shares, to the very last."""
    assert_long((1, 1, 3, 4096, 64, False, "keys", "none"), device, torch.float16)
    q, k, v = qkv(9, 1, 1, 1, 4096, 16, device)
    k[:, :, -1] = 8 * q[:, :, 0]
    assert (attend(q, k, v) != attend(q, k[:, :, :-1], v[:, :, :-1])).any(), "the last key has its share"


@check
def attention_every_tile(device):
    """Each tile of the tables gives the same bits."""
    from dqkernels.kernels import attention

    q, k, v = qkv(1, 1, 1, 70, 150, 64, device)
    g = torch.Generator().manual_seed(2)
    rest = (mask_of("pairs", g, 1, 1, 70, 150, device), bias_of("heads", g, 1, 70, 150, device), True)
    first, _ = assert_attention(q, k, v, *rest)
    tiles = {attention.attention_tile(*key) for key in itertools.product((1, 17, 65), (False, True))}
    assert len(tiles) == 5
    for tile in tiles | {attention.AttentionTile(16, 128, 4, 2)}:
        assert_same(attend(q, k, v, *rest, tile=tile), first.cpu(), f"{tile}")


@check
def attention_batch_and_padding_change_no_bit(device):
    """A sequence alone, beside a longer one, padded with hidden rubbish, and run again: the same bits."""
    q, k, v = qkv(3, 3, 2, 9, 100, 40, device)
    mask = torch.rand(3, 1, 1, 100, generator=torch.Generator().manual_seed(4)).to(device) < 0.8
    whole = attend(q, k, v, mask)
    assert whole.any()
    for _ in range(3):
        assert_same(attend(q, k, v, mask), whole.cpu(), "repeated")
    for i in range(3):
        alone = slice(i, i + 1)
        assert_same(attend(q[alone], k[alone], v[alone], mask[alone]), whole[alone].cpu(), f"sequence {i} alone")
    for rubbish in (0.0, 1e30, NAN, INF):
        tail = torch.full((3, 2, 37, 40), rubbish, device=device)
        longer = torch.cat([k, tail], 2), torch.cat([v, tail], 2)
        hidden = torch.cat([mask, torch.zeros(3, 1, 1, 37, dtype=torch.bool, device=device)], 3)
        assert_same(attend(q, *longer, hidden), whole.cpu(), f"padded with {rubbish}")
        rows = hidden.expand(3, 1, 9, 137).contiguous()
        assert_same(attend(q, *longer, rows), whole.cpu(), f"padded with {rubbish}, a mask per query")
    shown = [mask[i, 0, 0] for i in range(3)]
    for i in range(3):
        one = slice(i, i + 1)
        assert_same(attend(q[one], k[one][:, :, shown[i]], v[one][:, :, shown[i]]), whole[one].cpu(), "removed keys")


@check
def attention_causal(device):
    """A causal mask is a triangle of a mask, for more and for fewer queries than keys; decoding agrees with it."""
    for queries, keys in ((20, 70), (70, 70), (70, 20)):
        q, k, v = qkv(5, 1, 2, queries, keys, 32, device)
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        got, _ = assert_attention(q, k, v, causal=True)
        assert_same(attend(q, k, v, triangle), got.cpu(), f"{queries} x {keys}")
        blind = max(queries - keys, 0)
        assert not got[:, :, :blind].any() and got[:, :, blind:].any(dim=-1).all()
    q, k, v = qkv(6, 1, 1, 70, 70, 32, device)
    whole = attend(q, k, v, causal=True)
    for i in (0, 1, 40, 63, 64, 69):
        step = attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True)
        assert_same(step, whole[:, :, i : i + 1].cpu(), f"step {i}")


@check
def attention_special_values(device):
    """NaN and Inf mark the rows that see them and no other; zeros, huge scores and infinite biases."""
    q, k, v = qkv(7, 1, 1, 6, 70, 16, device)
    mask = torch.ones(6, 70, dtype=torch.bool, device=device)
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
        assert_same(got[:, :, spared], clean[:, :, spared].cpu(), f"{bad} in {'qkv'[which]}")
        assert_attention(*spoilt, mask, mode="per_tensor")
    for scale in (0.0, 1e-30, 1e25, 1e36):
        assert_attention(q * scale, k * 100, v, mask)
        assert_attention(q, k, v * min(scale, 1e25), mask)
    for value in (-INF, INF, NAN, -3.4e38):
        for at in (slice(0, 1), slice(None)):
            bias = torch.zeros(70, device=device)
            bias[at] = value
            got, _ = assert_attention(q, k, v, mask, bias)
            assert got.isnan().any() == (value != -INF and value != -3.4e38)
    assert_attention(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), mask)
    zero_row = v.clone()
    zero_row[0, 0, 5] = 0
    assert_attention(q, k, zero_row, mask)
    assert_attention(q, k, zero_row * 1e-3, mask)  # its scale, 1 by convention, must not become the largest


@check
def attention_layouts(device):
    """Sliced, expanded, contiguous and element-strided inputs; masks and biases broadcast along any dimension."""
    q, k, v = qkv(8, 2, 2, 6, 20, 24, device)
    want = attend(q, k, v).cpu()
    assert_same(attend(*(x.contiguous() for x in (q, k, v))), want, "contiguous")
    assert_same(attend(*(torch.cat([x, x], 3)[..., :24] for x in (q, k, v))), want, "rows within longer rows")
    assert_same(attend(*(torch.stack([x, x], 4)[..., 0] for x in (q, k, v))), want, "every other element")
    shared = attend(q[:1].expand(2, 2, 6, 24), k[:1].expand(2, 2, 20, 24), v[:1].expand(2, 2, 20, 24))
    assert_same(shared, want[:1].expand(2, 2, 6, 24), "one batch for all")
    g = torch.Generator().manual_seed(9)
    for shape in itertools.product((1, 2), (1, 2), (1, 6), (1, 20)):
        mask, bias = (torch.rand(shape, generator=g) < 0.8).to(device), torch.randn(shape, generator=g).to(device)
        assert_attention(q, k, v, mask, bias)
    flipped = torch.randn(20, 6, generator=g).to(device).T
    assert_attention(q, k, v, flipped > 0, flipped)


@check
def attention_of_nothing(device):
    """No batch, query or key: zeros or empties of q's type."""
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q, k, v = qkv(10, batch, 2, queries, keys, 8, device, torch.float16)
        for mode in ("per_token", "per_tensor"):
            got = attend(q, k, v, mode=mode)
            assert got.shape == q.shape and got.dtype == q.dtype and not got.any()


# ----------------------------------------------------------------------------------------------- decode


def cache_of(k, v, capacity, mode="per_token", clip=None):
    """k_cache, k_scale, v_cache, v_scale of float K and V; rubbish behind the last key, as in unwritten memory."""
    out = []
    for x in (k, v):
        codes, scale = oracle_attention.quantize(wide(x), mode, clip)
        if x is v:
            scale = np.where((codes == 0).all(axis=-1) & np.isfinite(scale), np.float32(0), scale)
        batch, heads, keys, head_dim = x.shape
        cache = torch.full((batch, heads, capacity, head_dim), -128, dtype=torch.int8)
        cache[:, :, :keys] = torch.from_numpy(codes).to(torch.int8)
        scales = torch.full((batch, heads, capacity), NAN)
        scales[:, :, keys::2] = -INF
        scales[:, :, :keys] = torch.from_numpy(scale)
        out += [cache.to(x.device), scales.to(x.device)]
    return out


def decode(q, cache, lengths, source=None, bias=None, causal=False, scale=None, mode="per_token", clip=None):
    from dqkernels.kernels import attention_decode

    def numbers(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=q.device)

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_decode.qattention_decode(
        q, *cache, numbers(lengths), numbers(source), bias, causal, scale, mode, clip
    )


def gathered(tensors, lengths, source):
    """Of caches [caches, heads, capacity, ...] a copy for each row; `source` counts rows, or rows and keys."""
    if not isinstance(source[0], list):
        return [t[source] for t in tensors]
    keys = np.arange(tensors[0].shape[2])
    of_key = np.where(keys < np.asarray(lengths)[:, None], np.asarray(source), 0)
    return [np.moveaxis(t[of_key, :, keys], 1, 2) for t in tensors]


def assert_decode(q, cache, lengths, source=None, bias=None, causal=False, mode="per_token", clip=None):
    """One call equals the oracle within its bound."""
    got = decode(q, cache, lengths, source, bias, causal, None, mode, clip)
    rows, heads, queries, head_dim = q.shape
    capacity = cache[0].shape[2]
    assert got.dtype == q.dtype and got.shape == q.shape
    q8, qs = oracle_attention.quantize(wide(q) * np.float32(head_dim**-0.5), mode, clip)
    k8, ks, v8, vs = gathered(
        [t.cpu().numpy() for t in cache], lengths, list(range(rows)) if source is None else source
    )
    last = np.asarray(lengths)[:, None] - (queries - 1 - np.arange(queries) if causal else np.zeros(queries, int))
    seen = np.arange(capacity) < last[:, None, :, None]
    seen = np.broadcast_to(seen, (rows, heads, queries, capacity))
    bias = None if bias is None else wide(bias.expand(rows, heads, queries, capacity))
    oracle_attention.assert_attention(
        wide(got), q8, qs, k8.astype(np.int64), ks, v8.astype(np.int64), vs, seen, bias, str(q.dtype).split(".")[1],
        f"decode {list(q.shape)}, lengths {lengths}, source {source}",
    )  # fmt: skip
    return got


@check
def decode_grid(device):
    """Rows x lengths x head_dims, the options dealt around; rubbish behind the last key."""
    g = torch.Generator().manual_seed(11)
    shapes = ((1, 1, 1, 1, 64), (3, 2, 1, 70, 40), (2, 1, 3, 64, 128), (2, 3, 2, 65, 32), (1, 2, 17, 20, 80))
    for i, ((rows, heads, queries, keys, head_dim), causal) in enumerate(itertools.product(shapes, (False, True))):
        dtype, mode = DTYPES[i % 3], ("per_token", "per_tensor")[i // 2 % 2]
        q, k, v = qkv(i, rows, heads, queries, keys, head_dim, device, dtype)
        lengths = [keys, *torch.randint(0, keys + 1, (rows - 1,), generator=g).tolist()]
        bias = bias_of(BIASES[i % 3], g, heads, queries, keys + 9, device)
        assert_decode(q, cache_of(k, v, keys + 9, mode, 2.5), lengths, None, bias, causal, mode, 2.5)


@check
def decode_beams(device):
    """Rows that share a source: in any order, more than fit one program, none, of different lengths, unused caches."""
    g = torch.Generator().manual_seed(12)
    _, k, v = qkv(12, 5, 2, 1, 70, 48, device)
    cache = cache_of(k, v, 75)
    many = torch.randint(0, 5, (131,), generator=g).tolist()
    for source in ([0, 0, 0, 0], [3, 1, 3, 0, 1, 3], [2] * 19 + [4] + [2] * 3, many):
        rows = len(source)
        heads = 2 if rows < 100 else 1  # the interpreter takes its time
        for queries, causal in ((1, False), (2, True))[:heads]:
            q = torch.randn(rows, heads, queries, 48, generator=g).to(device)
            lengths = torch.randint(0, 71, (rows,), generator=g).tolist()
            there = [t[:, :heads] for t in cache]
            got = assert_decode(q, there, lengths, source, None, causal)
            alone = [t[source].contiguous() for t in there]
            assert_same(decode(q, alone, lengths, None, None, causal), got.cpu(), "each with a copy of its cache")


def ancestors(g, rows, caches, capacity):
    """A cache per key, as beams that were reordered have: runs of one cache, then of another."""
    source = torch.randint(0, caches, (rows, capacity), generator=g)
    for _ in range(4):
        again = torch.rand(rows, capacity - 1, generator=g) < 0.4
        source[:, 1:] = torch.where(again, source[:, :-1], source[:, 1:])
    return source


@check
def decode_by_key(device):
    """Every key of a row in a cache of its own: the bits of a gathered copy; rubbish behind the lengths, lost keys."""
    g = torch.Generator().manual_seed(18)
    for rows, caches, heads, queries, keys, head_dim, dtype, mode in (
        (4, 4, 2, 1, 70, 48, torch.float32, "per_token"), (3, 5, 1, 3, 33, 64, torch.float16, "per_tensor"),
        (2, 1, 2, 17, 40, 128, torch.bfloat16, "per_token"),
    ):  # fmt: skip
        capacity, causal = keys + 5, queries > 1
        _, k, v = qkv(19, caches, heads, 1, keys, head_dim, device, dtype)
        cache = cache_of(k, v, capacity, mode)
        q = torch.randn(rows, heads, queries, head_dim, generator=g).to(dtype).to(device)
        lengths = [keys, *torch.randint(0, keys + 1, (rows - 1,), generator=g).tolist()]
        source = ancestors(g, rows, caches, capacity)
        source = torch.where(torch.arange(capacity) < torch.tensor(lengths)[:, None], source, 1 << 30)
        source[:, -1] = -5
        bias = bias_of("heads", g, heads, queries, capacity, device)
        got = assert_decode(q, cache, lengths, source.tolist(), bias, causal, mode)
        alone = gathered([t.cpu().numpy() for t in cache], lengths, source.tolist())
        alone = [torch.from_numpy(np.ascontiguousarray(t)).to(device) for t in alone]
        assert_same(decode(q, alone, lengths, None, bias, causal, None, mode), got.cpu(), "a copy of each key")
        for row, lost in ((0, caches), (1, -1)):
            if not lengths[row]:
                continue
            at = lengths[row] - queries if causal else lengths[row] - 1  # under causal all queries but one see the next
            at = max(at, 0)
            wrong = source.clone()
            wrong[row, at] = lost
            spoilt = decode(q, cache, lengths, wrong.tolist(), bias, causal, None, mode)
            others = [i for i in range(rows) if i != row]
            assert_same(spoilt[others], got[others].cpu(), "its neighbours")
            sees = [at < (lengths[row] - queries + 1 + i if causal else lengths[row]) for i in range(queries)]
            assert spoilt[row].isnan().all(dim=-1).all(dim=0).tolist() == sees and any(sees)
            spared = [i for i in range(queries) if not sees[i]]
            assert_same(spoilt[row][:, spared], got[row][:, spared].cpu(), "queries that do not see it")
    one = [1, 0, 1]
    q, k, v = qkv(20, 3, 2, 1, 20, 32, device)
    cache = [t[:2] for t in cache_of(k, v, 24)]
    repeated = [[number] * 24 for number in one]
    assert_same(decode(q, cache, [20, 3, 11], repeated), decode(q, cache, [20, 3, 11], one).cpu(), "one for all keys")


@check
def decode_equals_prefill(device):
    """The bits of qattention on the same tokens: causal step by step, several at once, and across."""
    for head_dim, dtype in ((64, torch.float16), (40, torch.float32)):
        q, k, v = qkv(13, 2, 2, 67, 67, head_dim, device, dtype)
        bias = torch.randn(1, 2, 67, 80, generator=torch.Generator().manual_seed(14)).to(device)
        cache = cache_of(k, v, 80)
        whole = attend(q, k, v, None, bias[..., :67], causal=True)
        assert whole.any()
        for last, queries in ((1, 1), (2, 1), (64, 1), (65, 1), (67, 1), (67, 3), (67, 66)):
            new = slice(last - queries, last)
            got = decode(q[:, :, new], cache, [last, last], None, bias[:, :, new], causal=True)
            assert_same(got, whole[:, :, new].cpu(), f"{queries} of {last} tokens")
        across = attend(q[:, :, :5], k, v)
        assert_same(decode(q[:, :, :5], cache, [67, 67]), across.cpu(), "across")


@check
def decode_special_values(device):
    """A NaN reaches the rows that see it; a length past the capacity, a source that is none, empty things."""
    q, k, v = qkv(15, 3, 1, 1, 40, 32, device)
    k[1, 0, 20] = NAN
    v[2, 0, 30] = INF
    cache = cache_of(k, v, 40)
    got = assert_decode(q, cache, [40, 40, 40])
    assert got.isnan().any(dim=-1).flatten().tolist() == [False, True, True]
    got = assert_decode(q, cache, [40, 20, 30])
    assert not got.isnan().any() and got.any(dim=-1).all()
    assert not assert_decode(q, cache, [0, 0, 0]).any()
    assert_same(decode(q, cache, [4000, 20, 30]), got.cpu(), "a length past the capacity")
    lost = decode(q, cache, [40, 20, 30], [0, 3, -1])
    assert_same(lost[:1], got[:1].cpu(), "its neighbours")
    assert lost[1:].isnan().all()
    for empty in (decode(q[:0], [t[:0] for t in cache], []), decode(q, [t[:, :, :0] for t in cache], [0, 0, 0])):
        assert not empty.any()


@check
def attention_error_is_the_references(device):
    """Error to unquantized attention in float64 <= twice that of the plain-torch specification, plus one rounding."""
    from dqkernels import reference

    for seed, (dtype, mode, causal) in enumerate(itertools.product(DTYPES, ("per_token", "per_tensor"), (False, True))):
        q, k, v = (x.cpu() for x in qkv(seed, 1, 2, 20, 90, 64, device, dtype, values=0.3))
        score = q.double() @ k.double().mT / 8
        if causal:
            score = score.masked_fill(~torch.ones(20, 90, dtype=torch.bool).tril(70), -INF)
        truth = score.softmax(dim=-1) @ v.double()
        eager = reference.qattention(q, k, v, None, None, causal=causal, softmax_scale=0.125, mode=mode, clip=None)
        got = attend(q.to(device), k.to(device), v.to(device), causal=causal, mode=mode)
        assert_bounded(got, truth, eager, f"{dtype}, {mode}, causal {causal}")


@check
def attention_backend(device):
    """The backend's functions reach these kernels, refuse by name what they cannot, and agree with the reference."""
    from dqkernels import reference
    from dqkernels.backends import triton as backend

    assert backend.supports("qattention", mode="per_token", head_dim=128) is None
    assert "head_dim=129" in backend.supports("qattention", mode="per_token", head_dim=129)
    assert "head_dim=256" in backend.supports("qattention_decode", mode="per_token", head_dim=256)
    q, k, v = qkv(16, 1, 1, 3, 5, 129, device)
    refuses("head_dim", lambda: attend(q, k, v))
    q, k, v = qkv(17, 1, 2, 4, 9, 16, device)
    rest = {"causal": True, "softmax_scale": 0.25, "mode": "per_token", "clip": 2.0}
    got = backend.qattention(q, k, v, None, None, **rest)
    want = reference.qattention(q.cpu(), k.cpu(), v.cpu(), None, None, **rest)
    assert (got.cpu() - want).abs().max() <= want.abs().max() / 127
    cache = cache_of(k, v, 12, clip=2.0)
    lengths = torch.tensor([9], dtype=torch.int32)
    mine = backend.qattention_decode(q, *cache, lengths.to(device), None, None, **rest)
    assert_same(mine, got.cpu(), "decode")
    spec = reference.qattention_decode(q.cpu(), *(t.cpu() for t in cache), lengths, None, None, **rest)
    assert_same(spec, want, "the reference's decode")


if __name__ == "__main__":
    triton_checks.main(CHECKS)
