"""Checks of the compiled core's attention over caches, of what fills them, of threads and of memory.

`python tests/cpu_attention_checks_decode.py` runs all checks, those of prefill too, with the instruction set of
DQKERNELS_CPU, and prints what it counted and a digest of every result, which is the same for each instruction set.
test_cpu_attention.py starts it as a program, once per set: the set is chosen once per process, and a read past an
operand ends in a fault. Names of checks as arguments run these alone.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading

import numpy as np
import oracle_attention
import torch
from cpu_attention_checks import (
    BIASES,
    CHECKS,
    DTYPES,
    INF,
    MODES,
    NAN,
    SEEN,
    attend,
    bias_of,
    cache_of,
    check,
    decode,
    note,
    qkv,
    same,
    wide,
)
from guarded import guarded_tensor

from dqkernels import kv_cache, ops, reference
from dqkernels.kernels import cpu_attention, native


def assert_decode(q, cache, lengths, source=None, bias=None, causal=False, mode="per_token", clip=None):
    """One call equals the oracle within its bound."""
    got = decode(q, cache, lengths, source, bias, causal, None, mode, clip)
    rows, heads, queries, head_dim = q.shape
    capacity = cache[0].shape[2]
    assert got.dtype == q.dtype and got.shape == q.shape
    q8, qs = oracle_attention.quantize(wide(q) * np.float32(head_dim**-0.5), mode, clip)
    k8, ks, v8, vs = (t.numpy()[list(range(rows) if source is None else source)] for t in cache)
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
def decode_grid():
    """Rows x lengths x head_dims, the options dealt around; rubbish behind the last key."""
    g = torch.Generator().manual_seed(11)
    shapes = (
        (1, 1, 1, 1, 64), (3, 2, 1, 70, 40), (2, 1, 3, 64, 128), (2, 3, 2, 65, 32), (1, 2, 17, 20, 80),
        (2, 1, 1, 300, 33), (1, 1, 2, 40, 1040), (2, 2, 4, 29, 7), (1, 1, 1, 4000, 24),
    )  # fmt: skip
    for i, ((rows, heads, queries, keys, head_dim), causal) in enumerate(itertools.product(shapes, (False, True))):
        dtype, mode = DTYPES[i % 3], MODES[i // 2 % 2]
        q, k, v = qkv(i, rows, heads, queries, keys, head_dim, dtype)
        lengths = [keys, *torch.randint(0, keys + 1, (rows - 1,), generator=g).tolist()]
        bias = bias_of(BIASES[i % 3], g, heads, queries, keys + 9)
        assert_decode(q, cache_of(k, v, keys + 9, mode, 2.5), lengths, None, bias, causal, mode, 2.5)
    return 18


@check
def decode_beams():
    """Rows that share a source: in any order, many, none, of different lengths, unused caches; 1, 2 and 5 queries."""
    g = torch.Generator().manual_seed(12)
    _, k, v = qkv(12, 5, 2, 1, 70, 48)
    cache = cache_of(k, v, 75)
    many = torch.randint(0, 5, (131,), generator=g).tolist()
    for source in ([0, 0, 0, 0], [3, 1, 3, 0, 1, 3], [2] * 19 + [4] + [2] * 3, many, [4], [1, 0], []):
        rows = len(source)
        for queries, causal in ((1, False), (2, True), (5, True)):
            q = torch.randn(rows, 2, queries, 48, generator=g)
            lengths = torch.randint(0, 71, (rows,), generator=g).tolist()
            got = assert_decode(q, cache, lengths, source, None, causal)
            alone = [t[source].contiguous() for t in cache]
            same(decode(q, alone, lengths, None, None, causal), got, "each with a copy of its cache")
            for r in range(0, rows, 7):
                one = slice(r, r + 1)
                same(decode(q[one], cache, lengths[one], source[one], None, causal), got[one], f"row {r} alone")
    return 21


@check
def decode_a_cache_per_key():
    """Beams that were reordered: the keys of a row gathered by hand, and rubbish behind its length."""
    g = torch.Generator().manual_seed(13)
    for rows, caches, heads, queries, capacity, head_dim in (
        (1, 1, 1, 1, 1, 1), (4, 4, 2, 1, 70, 64), (3, 5, 2, 2, 33, 40), (2, 3, 1, 6, 65, 24), (5, 2, 2, 1, 300, 8),
    ):  # fmt: skip
        q = torch.randn(rows, heads, queries, head_dim, generator=g)
        _, k, v = qkv(rows, caches, heads, 1, capacity, head_dim)
        cache = cache_of(k, v, capacity)
        lengths = torch.randint(0, capacity + 1, (rows,), generator=g)
        lengths[0] = capacity
        source = torch.randint(0, caches, (rows, capacity), generator=g)
        at = torch.arange(capacity)
        alone = [t[source, :, at].transpose(1, 2).contiguous() for t in cache]
        hidden = at >= lengths.unsqueeze(1)
        source = torch.where(hidden, torch.tensor([-(2**31), 2**31 - 1, -1])[at % 3], source)
        for causal in (False, True):
            want = decode(q, alone, lengths, None, None, causal)
            same(decode(q, cache, lengths, source, None, causal), want, f"{rows} rows of {capacity}")
            facts = {"causal": causal, "softmax_scale": head_dim**-0.5, "mode": "per_token", "clip": None}
            spec = reference.qattention_decode(q, *cache, lengths.int(), source.int(), None, **facts)
            assert (spec - want).abs().max() <= v.abs().max() / 60
            assert want.any()
    return 10


@check
def decode_is_prefill():
    """The bits of qattention on the same tokens: causal step by step, several at once, and across."""
    for head_dim, dtype in ((64, torch.float16), (40, torch.float32), (33, torch.bfloat16)):
        q, k, v = qkv(13, 2, 2, 67, 67, head_dim, dtype)
        bias = torch.randn(1, 2, 67, 80, generator=torch.Generator().manual_seed(14))
        cache = cache_of(k, v, 80)
        whole = attend(q, k, v, None, bias[..., :67], causal=True)
        assert whole.any()
        for last in range(1, 68):
            new = slice(last - 1, last)
            got = decode(q[:, :, new], cache, [last, last], None, bias[:, :, new], causal=True)
            same(got, whole[:, :, new], f"token {last}")
        for queries in (2, 3, 4, 5, 31, 66):
            new = slice(67 - queries, 67)
            got = decode(q[:, :, new], cache, [67, 67], None, bias[:, :, new], causal=True)
            same(got, whole[:, :, new], f"the last {queries} tokens")
        across = attend(q[:, :, :5], k, v)
        same(decode(q[:, :, :5], cache, [67, 67]), across, "across")
    return 222


@check
def decode_special_values():
    """A NaN reaches the rows that see it; lengths of 0, caches of any strides, empty things."""
    q, k, v = qkv(15, 3, 1, 1, 40, 32)
    k[1, 0, 20] = NAN
    v[2, 0, 30] = INF
    cache = cache_of(k, v, 40)
    got = assert_decode(q, cache, [40, 40, 40])
    assert got.isnan().any(dim=-1).flatten().tolist() == [False, True, True]
    got = assert_decode(q, cache, [40, 20, 30])
    assert not got.isnan().any() and got.any(dim=-1).all()
    assert not assert_decode(q, cache, [0, 0, 0]).any()
    for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)):  # heads or keys outermost in memory
        back = [order.index(i) for i in range(3)]
        moved = [t.permute(*order, *range(3, t.dim())).contiguous().permute(*back, *range(3, t.dim())) for t in cache]
        same(decode(q, moved, [40, 20, 30]), got, f"strides in order {order}")
    apart = [torch.stack([t, t], -1)[..., 0] for t in cache]
    same(decode(q, apart, [40, 20, 30]), got, "elements apart")
    odd = torch.tensor([1, 2, 0], dtype=torch.int32)
    strided = torch.stack([odd, odd], 1)[:, 0]
    same(decode(q, cache, [40, 20, 30], strided), decode(q, cache, [40, 20, 30], odd), "a strided source")
    for empty in (decode(q[:0], [t[:0] for t in cache], []), decode(q, [t[:, :, :0] for t in cache], [0, 0, 0])):
        assert not empty.any()
    every = torch.randint(-128, 128, (3, 1, 40, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scales = torch.full((3, 1, 40), 0.01)
    odd_cache = [every, scales, every.flip(2).contiguous(), scales]
    assert (every == -128).any()
    assert_decode(q, odd_cache, [40, 39, 38])  # no quantizer writes -128, but a cache could hold it
    assert_decode(q.expand(3, 1, 5, 32), odd_cache, [40, 39, 38])
    return 12


# -------------------------------------------------------------------------------------------------- the cache


@check
def cache_writes():
    """The bits of the reference, at any position, of any layout and type, and not a byte beside them."""
    g = torch.Generator().manual_seed(21)
    done = 0
    shapes = ((1, 1, 1, 1, 1), (2, 3, 1, 40, 9), (3, 2, 5, 64, 20), (2, 1, 7, 33, 7))
    for rows, heads, tokens, head_dim, capacity in shapes:
        for dtype, mode, clip in itertools.product(DTYPES, MODES, (None, 1.5)):
            k, v = (torch.randn(rows, tokens, heads, head_dim, generator=g).to(dtype).transpose(1, 2) for _ in range(2))
            k[0, 0, 0, 0], v[-1, -1, -1] = NAN, 0.0
            positions = (None,) if mode == "per_tensor" else (
                None, torch.randint(0, capacity - tokens + 1, (rows,), generator=g, dtype=torch.int32)
            )  # fmt: skip
            for position in positions:
                mine = empty_cache(rows + 1, heads, capacity, head_dim)
                theirs = [t.clone() for t in mine]
                cpu_attention.quantize_into_cache(k, v, *mine, position, mode, clip)
                reference.quantize_into_cache(k, v, *theirs, position, mode=mode, clip=clip)
                for a, b in zip(mine, theirs, strict=True):
                    assert torch.equal(a.nan_to_num(-9.0), b.nan_to_num(-9.0)), (rows, dtype, mode, position)
                    note(a)
                done += 1
    long = torch.randn(2, 300, 4, 64, generator=g).transpose(1, 2)
    mine = empty_cache(2, 4, 512, 64)
    kv_cache.quantize_into_cache(long, long, *mine, torch.tensor([7, 200], dtype=torch.int32), backend="cpu")
    assert (mine[0][:, :, :7] == -128).all() and (mine[0][0, :, 7:307] != -128).all()
    return done


def empty_cache(caches, heads, capacity, head_dim):
    """Codes, scales, codes, scales, of values that no quantizer gives."""
    sizes = caches, heads, capacity
    return [t for _ in "kv" for t in (torch.full((*sizes, head_dim), -128, dtype=torch.int8), torch.full(sizes, -7.0))]


# ------------------------------------------------------------------------------------- threads and guard pages


@check
def threads_change_nothing():
    """1, 2 and 5 threads of ours, and 8 of Python's at once: the same bits."""
    q, k, v = qkv(31, 3, 4, 70, 300, 64)
    cache = cache_of(k, v, 310)
    new, lengths = q[:, :, -1:], [300, 299, 17]
    source = [1, 1, 0]

    def calls():
        out = (
            cpu_attention.qattention(q, k, v, None, None, True, 0.125, "per_token", None),
            cpu_attention.qattention_decode(
                new, *cache, torch.tensor(lengths, dtype=torch.int32), torch.tensor(source, dtype=torch.int32), None,
                False, 0.125, "per_token", None,
            ),
        )  # fmt: skip
        written = empty_cache(3, 4, 310, 64)
        cpu_attention.quantize_into_cache(k, v, *written, None, "per_token", None)
        return (*out, *written)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = calls()
    assert want[0].any() and want[1].any()
    for count in (2, 5):
        torch.set_num_threads(count)
        assert all(map(torch.equal, calls(), want)), f"{count} threads"
    start, wrong = threading.Barrier(8), []

    def work():
        start.wait()
        for _ in range(3):
            if not all(map(torch.equal, calls(), want)):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    assert not wrong
    return 8


@check
def guard_pages():
    """Each operand and result against a page that cannot be read, before and behind it."""
    g = torch.Generator().manual_seed(41)
    done = 0
    for at_end, (queries, keys, head_dim) in itertools.product(
        (True, False), ((1, 1, 1), (1, 9, 64), (3, 17, 33), (5, 8, 40), (4, 31, 7), (2, 70, 128), (6, 5, 63))
    ):
        for dtype in DTYPES:
            q, k, v = (torch.randn(2, 2, n, head_dim, generator=g).to(dtype) for n in (queries, keys, keys))
            mask = torch.rand(2, 2, queries, keys, generator=g) < 0.8
            bias = torch.randn(2, 2, queries, keys, generator=g)
            want = attend(q, k, v, mask, bias, True)
            there = [guarded_tensor(t, at_end) for t in (q, k, v, mask, bias)]
            same(attend(*there, True), want, "guarded prefill")
            cache = [t.contiguous() for t in cache_of(k, v, keys)]
            lengths = torch.tensor([keys, max(keys - 1, 0)], dtype=torch.int32)
            each = torch.tensor([1, 0], dtype=torch.int32).unsqueeze(1).expand(2, keys).contiguous()
            for source in (None, torch.tensor([1, 1], dtype=torch.int32), each):
                want = decode(q, cache, lengths, source, bias, True)
                there = [guarded_tensor(t, at_end) for t in (q, *cache, lengths)]
                placed = None if source is None else guarded_tensor(source, at_end)
                got = decode(there[0], there[1:5], there[5], placed, guarded_tensor(bias, at_end), True)
                same(got, want, "guarded decode")
                done += 1
            into = [guarded_tensor(t, at_end) for t in empty_cache(2, 2, keys, head_dim)]
            cpu_attention.quantize_into_cache(
                guarded_tensor(k, at_end), guarded_tensor(v, at_end), *into, None, "per_token", None
            )
            for mine, theirs in zip(into, cache, strict=True):
                assert torch.equal(mine, theirs)
            done += 2
    return done


def trip_the_guard():
    """The positive control: one key more than there are must fault."""
    codes, scales = guarded_tensor(torch.ones(64, 64, dtype=torch.int8), True), torch.ones(65)
    cache = codes.data_ptr(), (4160, 4160, 64), scales.data_ptr(), (65, 65, 1)
    q, out, lengths = torch.ones(64), torch.ones(64), torch.tensor([65], dtype=torch.int32)
    query = q.data_ptr(), 0, (64, 64, 64, 1)
    sizes = (1, 1, 1, 65, 64)
    core = native.native()
    core.attention_decode(
        query, cache, cache, 1, lengths.data_ptr(), 0, False, None, out.data_ptr(), sizes, False, 1.0, 0, 0.0, 1
    )


@check
def ops_reach_the_core():
    """`auto` takes the core, and what it gives is what the launcher gives."""
    q, k, v = qkv(51, 1, 2, 3, 9, 16)
    same(ops.qattention(q, k, v, None, None, False, 0.25), attend(q, k, v, scale=0.25), "prefill")
    cache, lengths = cache_of(k, v, 12), torch.tensor([9], dtype=torch.int32)
    got = ops.qattention_decode(q, *cache, lengths, None, None, False, 0.25, backend="cpu")
    same(got, decode(q, cache, lengths, scale=0.25), "decode")
    return 2


if __name__ == "__main__":
    if sys.argv[1:] == ["--trip"]:
        trip_the_guard()
        sys.exit(0)
    with np.errstate(all="ignore"):
        counts = {name: function() for name, function in CHECKS.items() if name in sys.argv[1:] or not sys.argv[1:]}
    print(json.dumps({"isa": native.native().cpu_isa(), "digest": SEEN.hexdigest(), **counts}))
