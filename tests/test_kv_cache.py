"""The op that writes keys and values into int8 caches: what it writes, what it leaves alone, what it refuses."""

import pytest
import torch
from compare import assert_same_bits

from dqkernels import kv_cache, ops, qmath

NAN, INF = float("nan"), float("inf")
HEADS, CAPACITY, DIM = 2, 7, 8


def caches(count=3, capacity=CAPACITY, fill=-77):
    """k_cache, k_scale, v_cache, v_scale, full of rubbish."""
    codes = [torch.full((count, HEADS, capacity, DIM), fill, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((count, HEADS, capacity), float(fill)) for _ in range(2)]
    return [codes[0], scales[0], codes[1], scales[1]]


def tokens(rows=3, count=2, dtype=torch.float32):
    """Keys and values, a zero row and rows that are not finite among them."""
    k, v = torch.randn(2, rows, HEADS, count, DIM) * 3
    k[0, 0, 0], v[0, 1, 0] = 0, 0
    k[-1, 1, -1, 3], v[-1, 0, -1, 2] = NAN, INF
    return k.to(dtype), v.to(dtype)


def position(*where):
    return torch.tensor(where, dtype=torch.int32)


def expected(k, v, mode="per_token", clip=None):
    """What stands where something was written: codes and scales [rows, HEADS, tokens, ...]."""
    k8, k_scale, _ = qmath.quantize_activation(k, mode, clip)
    v8, v_scale, _ = qmath.quantize_activation(v, mode, clip)
    return k8, k_scale, v8, torch.where((v8 == 0).all(-1) & v_scale.isfinite(), 0.0, v_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [None, 2.5])
@pytest.mark.parametrize("count, where", [(2, (5, 0, 3)), (1, (6, 0, 2)), (7, (0, 0, 0)), (3, None), (7, None)])
def test_writes_the_tokens_and_nothing_else(dtype, clip, count, where):
    k, v = tokens(3, count, dtype)
    got = caches(4)
    kv_cache.quantize_into_cache(k, v, *got, None if where is None else position(*where), clip=clip)
    want = caches(4)
    for tensor, written in zip(want, expected(k, v, clip=clip), strict=True):
        for row in range(3):
            start = 0 if where is None else where[row]
            tensor[row, :, start : start + count] = written[row]
    for name, mine, theirs in zip(("k", "k_scale", "v", "v_scale"), got, want, strict=True):
        assert_same_bits(mine, theirs, name)
    assert got[1].isnan().any() and got[3].isnan().any() and (got[3][0, 1] == 0).any() and (got[1][0, 0] == 1).any()


def test_token_by_token_is_all_at_once():
    k, v = tokens(2, 5)
    whole, steps = caches(2), caches(2)
    kv_cache.quantize_into_cache(k, v, *whole, None)
    for i in range(5):
        kv_cache.quantize_into_cache(k[:, :, i : i + 1], v[:, :, i : i + 1], *steps, position(i, i))
    for mine, theirs in zip(steps, whole, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    "mode, clip", [("per_token", None), ("per_token", 1.5), ("per_tensor", None), ("per_tensor", 1.5)]
)
def test_decoding_over_it_is_attention_without_a_cache(mode, clip):
    """`per_tensor` where the cache is written at once, as that of an encoder's output is."""
    q, (k, v) = torch.randn(3, HEADS, 1, DIM), (torch.randn(3, HEADS, 6, DIM) for _ in range(2))
    v[1, :, 2] = 0  # its scale must not become the largest
    cache = caches(3)
    kv_cache.quantize_into_cache(k, v, *cache, None, mode, clip)
    got = ops.qattention_decode(q, *cache, position(6, 6, 6), None, None, False, 0.3, mode, clip)
    want = ops.qattention(q, k, v, None, None, False, 0.3, mode, clip)
    assert_same_bits(got, want)
    other = ops.qattention(q, k, v, None, None, False, 0.3, "per_token" if mode == "per_tensor" else "per_tensor", clip)
    assert not torch.equal(got, other)


def test_keys_that_are_values_are_written_as_both():
    """One tensor for both: the zero row has scale 1 as a key and 0 as a value."""
    x = tokens(3, 2)[1]
    cache = caches(3)
    kv_cache.quantize_into_cache(x, x, *cache, None)
    assert cache[1][0, 1, 0] == 1 and cache[3][0, 1, 0] == 0


def samples():
    k, v = tokens(3, 2)
    yield (k, v, *caches(3), None), {"act_mode": "per_tensor", "clip": 2.5}
    heads = [t[:2, :1].expand(2, 3, *t.shape[2:]).contiguous() for t in caches(3)]
    yield (k.transpose(0, 1), v.transpose(0, 1), *heads, position(1, 5)), {}
    yield (k.half(), v.half(), *caches(4), position(5, 0, 2)), {"backend": "eager"}
    yield (k[:0], v[:0], *caches(2), position()), {}
    yield (k[:, :, :0], v[:, :, :0], *caches(3), position(7, 0, 2)), {}


def test_opcheck():
    """Schema, mutation, shapes of the fake, AOT with dynamic shapes."""
    for args, kwargs in samples():
        torch.library.opcheck(kv_cache.quantize_into_cache, args, kwargs)


def test_python_spelling_and_schema():
    assert kv_cache.quantize_into_cache is torch.ops.dqkernels.quantize_into_cache.default
    arguments = kv_cache.quantize_into_cache._schema.arguments
    assert [a.name for a in arguments][-2:] == ["backend", "strict"]
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["k_cache", "k_scale", "v_cache", "v_scale"]


def test_inside_a_compiled_function_and_under_autocast():
    k, v = tokens(3, 1)

    def step(k, v, k_cache, k_scale, v_cache, v_scale, where):
        kv_cache.quantize_into_cache(k * 2, v * 2, k_cache, k_scale, v_cache, v_scale, where)
        return k_scale + 1

    plain, traced, cast = caches(3), caches(3), caches(3)
    step(k, v, *plain, position(1, 2, 0))
    torch.compile(step, fullgraph=True, backend="aot_eager")(k, v, *traced, position(1, 2, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(k, v, *cast, position(1, 2, 0))
    for a, b, c in zip(plain, traced, cast, strict=True):
        assert_same_bits(b, a)
        assert_same_bits(c, a)


def case(error=ValueError, **changes):
    names = "k_cache", "k_scale", "v_cache", "v_scale"
    k, v = tokens(3, 2)
    arguments = {"k": k, "v": v, **dict(zip(names, caches(3), strict=True)), "position": position(0, 5, 1), **changes}
    return error, arguments


REFUSED = {
    "integers": (
        case(k=torch.ones(3, 2, 2, 8, dtype=torch.int8)),
        "k must be float32, float16 or bfloat16, got torch.int8",
    ),
    "rank 3": (case(v=torch.ones(3, 2, 8)), r"v must be \[rows, heads, tokens, head_dim\], got \[3, 2, 8\]"),
    "another v": (
        case(v=torch.ones(3, 2, 1, 8)),
        r"k and v differ: torch.float32 \[3, 2, 2, 8\], torch.float32 \[3, 2, 1",
    ),
    "another dtype of v": (case(v=torch.ones(3, 2, 2, 8).half()), r"k and v differ: .* torch.float16"),
    "float cache": (
        case(k_cache=torch.ones(3, 2, 7, 8)),
        r"k_cache must be int8 \[caches, 2, capacity, 8\], got torch.fl",
    ),
    "other heads": (
        case(v_cache=torch.ones(3, 1, 7, 8, dtype=torch.int8)),
        r"v_cache must be int8 .* got torch.int8 \[3, 1",
    ),
    "other capacity": (case(v_cache=torch.ones(3, 2, 6, 8, dtype=torch.int8)), "k_cache and v_cache differ"),
    "scale of a head": (
        case(v_scale=torch.ones(3, 2)),
        r"v_scale must be float32 \[3, 2, 7\], got torch.float32 \[3, 2\]",
    ),
    "a view": (
        case(k_cache=torch.ones(3, 7, 2, 8, dtype=torch.int8).transpose(1, 2)),
        r"k_cache must be contiguous, it is written in place: got strides \[112, 8, 16, 1\]",
    ),
    "an expanded scale": (case(v_scale=torch.ones(1, 2, 7).expand(3, 2, 7)), "v_scale must be contiguous"),
    "too few caches": (
        case(**dict(zip(("k_cache", "k_scale", "v_cache", "v_scale"), caches(2), strict=True))),
        r"a cache for each of 3 rows and room for 2 tokens, got \[2, 2, 7, 8\]",
    ),
    "too many tokens": (
        case(k=torch.ones(3, 2, 8, 8), v=torch.ones(3, 2, 8, 8), position=None),
        r"room for 8 tokens, got \[3, 2, 7, 8\]",
    ),
    "int64 positions": (case(position=torch.tensor([0, 1, 2])), r"position must be int32 \[3\], got torch.int64 \[3\]"),
    "a position for two": (case(position=position(0, 1)), r"position must be int32 \[3\], got torch.int32 \[2\]"),
    "behind the end": (
        case(IndexError, position=position(0, 6, 1)),
        "position must be in 0..5 for 2 tokens in 7 places, got 0..6",
    ),
    "before the start": (case(IndexError, position=position(0, -1, 1)), "position must be in 0..5 .* got -1..1"),
    "static": (case(act_mode="static"), "act_mode must be 'per_token' or 'per_tensor', got 'static'"),
    "one scale, token by token": (
        case(act_mode="per_tensor"),
        "act_mode='per_tensor' needs position=None: its one scale is that of all keys, and adding some changes it",
    ),
    "clip": (case(clip=0.0), "clip must be None or a finite number above 0, got 0.0"),
    "a gradient": (
        case(RuntimeError, k=torch.ones(3, 2, 2, 8, requires_grad=True)),
        "has no gradient: .* torch.no_grad",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument_what_was_found_and_what_is_wanted(name):
    (error, arguments), message = REFUSED[name]
    before = [t.clone() for t in arguments.values() if isinstance(t, torch.Tensor)]
    with pytest.raises(error, match=message):
        kv_cache.quantize_into_cache(**arguments)
    after = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(after, before, strict=True))


def test_the_nearest_call_is_taken():
    for changes in ({}, {"position": position(0, 5, 5)}, {"position": None, "act_mode": "per_tensor"}):
        arguments = case(**changes)[1]
        kv_cache.quantize_into_cache(**arguments)
        assert (arguments["k_cache"] != -77).any()
    with torch.no_grad():
        kv_cache.quantize_into_cache(**case(k=torch.ones(3, 2, 2, 8, requires_grad=True))[1])
