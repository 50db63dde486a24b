"""The reference ops piece by piece: integer products, groups, epilogue order, chunks, attention and its edges."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import grids
import numpy as np
import oracle
import oracle_attention
import pytest
import torch
import torch.nn.functional as F
from compare import assert_bounded, assert_equal, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from dqkernels import packing, qmath, reference
from dqkernels.config import LayerConfig

NAN, INF = float("nan"), float("inf")


def int8(shape, low=-127, high=127, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8))


# ----------------------------------------------------------------------------------------- integer products


@pytest.fixture(params=["torch._int_mm", "float32"])
def both_matmuls(request, monkeypatch):
    """torch._int_mm where it is exact, fast here or not, and the float path that other machines take."""
    monkeypatch.setattr(reference, "_cpu_int_mm_is_fast", lambda: request.param == "torch._int_mm")


@pytest.mark.parametrize("m, n, k, why", grids.GEMM_SHAPES, ids=lambda value: str(value).replace(" ", "_")[:20])
def test_int_matmul_is_exact(m, n, k, why, both_matmuls):
    a, b = int8((m, k), seed=1), int8((n, k), -128, 127, seed=2)
    got = reference.int_matmul(a, b)
    assert got.dtype == torch.int32
    assert_equal(got, a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T, why, may_be_zero=m == 0)


def test_int_matmul_of_few_products(both_matmuls):
    """torch 2.13's int8 matmul returns uninitialised memory for K = 1, N > 1: the last group of K = 33 is that."""
    for m, n, k in itertools.product((1, 2, 5, 17), (1, 2, 3, 16, 33), (1, 2, 3, 4)):
        a, b = int8((m, k), seed=m), int8((n, k), seed=n)
        wanted = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
        assert_equal(reference.int_matmul(a, b), wanted, f"{m}x{n}x{k}")


@pytest.mark.parametrize("m", [1, 2, 16, 17, 64])
def test_int_matmul_saturated(m, both_matmuls):
    """Pairs of 127 * 127 overflow int16: a matmul that adds pairs in 16 bits (AVX2 maddubs) fails here."""
    for k in (2, 64, 1040, 1041, 4096):
        a = torch.full((m, k), 127, dtype=torch.int8)
        b = torch.full((5, k), -127, dtype=torch.int8)
        b[1], b[2, ::2] = 127, 127
        wanted = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
        assert_equal(reference.int_matmul(a, b), wanted, f"K={k}")


def test_int_matmul_at_the_largest_k(both_matmuls):
    k = qmath.MAX_K
    a = torch.full((2, k), 127, dtype=torch.int8)
    a[1] = -127
    got = reference.int_matmul(a, torch.full((1, k), 127, dtype=torch.int8))
    assert got.tolist() == [[127 * 127 * k], [-127 * 127 * k]]
    assert 127 * 127 * k < 2**31 - 1


# --------------------------------------------------------------------------------------------------- groups


@given(
    m=st.integers(1, 4), n=st.integers(1, 5), k=st.integers(1, 200), size=st.sampled_from([32, 64, 128]),
    four_level=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_accumulate_equals_the_int64_sum(m, n, k, size, four_level, seed):
    q, codes = int8((m, k), seed=seed), int8((n, k), -2, 1, seed=seed + 1)
    mult = torch.from_numpy(np.random.default_rng(seed).integers(1, 128, (n, -(-k // size))).astype(np.uint8))
    for group_mult, group_size in ((None, -1), (mult, size)):
        got = reference.accumulate(q, None, codes, group_mult, four_level, group_size)
        m_ = None if group_mult is None else group_mult.numpy()
        wanted = oracle.accumulate(q.numpy(), codes.numpy(), m_, four_level, group_size)
        assert_equal(got, wanted, f"group_size={group_size}", may_be_zero=True)


def test_accumulate_takes_the_row_sum_it_is_given():
    q, codes = int8((2, 9)), int8((3, 9), -2, 1)
    own = reference.accumulate(q, None, codes, None, True, -1)
    given_sum = q.sum(dim=1, dtype=torch.int32)
    assert_same_bits(reference.accumulate(q, given_sum, codes, None, True, -1), own)
    assert_same_bits(reference.accumulate(q, given_sum + 1, codes, None, True, -1), own + 1)


# -------------------------------------------------------------------------------------------------- epilogue


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
def test_epilogue_has_one_order(dtype):
    """Bits of the order `acc, act_scale, weight_scale, bias, activation, residual, round`, and of no other."""
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**30), 2**30, (40, 50)).astype(np.int64)
    act, weight = rng.random(40).astype(np.float32) * 1e-3, rng.random(50).astype(np.float32) * 1e-4
    bias, residual = rng.standard_normal(50).astype(np.float32), rng.standard_normal((40, 50)).astype(np.float32)
    tensors = [torch.from_numpy(a) for a in (acc.astype(np.int32), act, weight, bias, residual)]
    got = reference.epilogue(*tensors, "relu", dtype)
    assert got.dtype == dtype
    name = str(dtype).removeprefix("torch.")
    assert_equal(got, oracle.round_to(oracle.epilogue(acc, act, weight, bias, residual, "relu"), name), "epilogue")
    # The neighbours that are easily written instead do differ on this data.
    a, s, w, b, r = tensors
    scaled = a.float() * s[:, None] * w[None]
    others = {"residual before the activation": (scaled + b + r).relu(), "no bias": scaled.relu() + r}
    if dtype == torch.float32:  # 16 bits hide most of these
        others["scales multiplied first"] = (a.float() * (s[:, None] * w[None]) + b).relu() + r
        others["float64 inside"] = (a.double() * s[:, None].double() * w.double() + b.double()).relu() + r.double()
    else:
        others["rounded twice"] = (scaled + b).relu().to(dtype) + r.to(dtype)
    for what, other in others.items():
        assert not torch.equal(other.to(dtype), got), what


@pytest.mark.parametrize("scale_shape", [(1,), (50,)])
def test_epilogue_broadcasts_one_weight_scale(scale_shape):
    acc = torch.arange(100, dtype=torch.int32).reshape(2, 50)
    got = reference.epilogue(acc, torch.ones(2), torch.full(scale_shape, 0.5), None, None, "none", torch.float32)
    assert_equal(got, acc.numpy() * 0.5)


def test_16_bit_results_round_to_nearest_even_once():
    """Exact halves between two representable values, both parities, and overflow to infinity."""
    acc = torch.tensor([[257, 259, 2049, 2051, 70_000]], dtype=torch.int32)
    one = torch.ones(1)
    half = reference.epilogue(acc, one, one, None, None, "none", torch.float16)
    assert half.tolist() == [[257.0, 259.0, 2048.0, 2052.0, INF]]
    brain = reference.epilogue(acc, one, one, None, None, "none", torch.bfloat16)
    assert brain.tolist() == [[256.0, 260.0, 2048.0, 2048.0, 70144.0]]
    assert_equal(oracle.round_to(acc.numpy().astype(np.float32), "bfloat16"), brain, "the oracle's bit arithmetic")


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=50))
def test_the_oracle_rounds_to_bfloat16_as_torch_does(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert_equal(oracle.round_to(x.numpy(), "bfloat16"), x.to(torch.bfloat16), may_be_zero=True)
    assert_equal(oracle.round_to(x.numpy(), "float16"), x.to(torch.float16), may_be_zero=True)


def test_gelu_is_the_erf_form():
    x = torch.linspace(-6, 6, 401)
    truth = torch.from_numpy(oracle.gelu64(x.numpy()))
    assert_bounded(reference.activate(x, "gelu"), truth, F.gelu(x), "gelu")
    tanh_form = F.gelu(x, approximate="tanh")
    with pytest.raises(AssertionError):
        assert_bounded(tanh_form, truth, F.gelu(x), "the tanh form must not pass")


# ------------------------------------------------------------------------------------------------ whole GEMM


def packed_case(n, k, bits=4, four_level=False, group_size=-1, seed=0):
    low, high = (-2, 1) if bits == 2 else (-7, 7)
    codes = int8((n, k), low, high, seed)
    mult = None if group_size == -1 else int8((n, -(-k // group_size)), 1, 7, seed).to(torch.uint8)
    return codes, packing.pack(codes, bits), torch.rand(n) + 0.1, mult


@pytest.mark.parametrize("group_size", [-1, 32])
def test_qgemm_does_not_depend_on_its_chunks(group_size, monkeypatch):
    """A 250027-row head is unpacked in pieces; each must find its own scales, bias, residual and multipliers."""
    n, k, m = 77, 70, 3
    _, qweight, scale, mult = packed_case(n, k, group_size=group_size)
    q, act = int8((m, k)), torch.rand(m)
    bias, residual = torch.randn(n), torch.randn(m, n)
    settings = dict(bits=4, four_level=False, group_size=group_size, out_features=n, activation="none")
    arguments = (q, act, None, qweight, scale, mult, bias, residual)
    whole = reference.qgemm(*arguments, **settings, out_dtype=torch.float32)
    monkeypatch.setattr(reference, "_UNPACK_BYTES", 1)  # 16 rows at a time
    assert_same_bits(reference.qgemm(*arguments, **settings, out_dtype=torch.float32), whole)


def test_dequantize_is_the_matrix_that_the_gemm_multiplies_by():
    codes, qweight, scale, mult = packed_case(20, 70, bits=2, four_level=True, group_size=32)
    got = reference.dequantize(
        qweight, scale, mult, bits=2, four_level=True, group_size=32, out_features=20, in_features=70
    )
    assert_equal(got, oracle.dequantize(codes.numpy(), scale.numpy(), mult.numpy(), True, 32))


# ---------------------------------------------------------------------------------------------- float ops


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_layernorm_quantize(dtype, with_residual):
    x = torch.randn(4, 3, 40).to(dtype)
    residual = torch.randn(4, 3, 40).to(dtype) if with_residual else None
    weight, bias = torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    y, q, scale, row_sum = reference.layernorm_quantize(
        x, residual, weight, bias, eps=1e-5, mode="per_token", clip=2.5, act_scale=None, want_sum=True
    )
    total = x.double() + (0 if residual is None else residual.double())
    truth = F.layer_norm(total, (40,), weight.double(), bias.double(), 1e-5)
    eager_in = x if residual is None else x + residual
    assert y.dtype == dtype
    assert_bounded(y, truth, F.layer_norm(eager_in, (40,), weight, bias, 1e-5), "layernorm")
    codes, scales, sums = oracle.quantize_activation(y.float().reshape(-1, 40).numpy(), "per_token", 2.5)
    assert_equal(q.reshape(-1, 40), codes, "codes")
    assert_equal(scale.reshape(-1), scales, "scale")
    assert_equal(row_sum.reshape(-1), sums, "row_sum")


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
def test_gelu_quantize(dtype):
    x = (torch.randn(5, 33) * 3).to(dtype)
    q, scale, _ = reference.gelu_quantize(x, mode="per_token", clip=None, act_scale=None, want_sum=False)
    y = F.gelu(x.float()).to(dtype)
    assert_bounded(y, torch.from_numpy(oracle.gelu64(x.float().numpy())), F.gelu(x), "gelu")
    codes, scales, _ = oracle.quantize_activation(y.float().numpy(), "per_token")
    assert_equal(q, codes, "codes")
    assert_equal(scale, scales, "scale")


@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
def test_an_activation_does_not_depend_on_where_the_row_stands(activation):
    """A vector loop may round its tail otherwise than its body; then a row would change with its batch mates."""
    t = torch.randn(64, 37) * 3
    whole = reference.activate(t, activation)
    for first in range(0, 63):
        assert_same_bits(reference.activate(t[first : first + 1].clone(), activation)[0], whole[first])


# ----------------------------------------------------------------------------------------------- attention


def attention64(q, k, v, mask=None, bias=None, causal=False, scale=1.0):
    """Softmax attention in float64, without any quantization."""
    score = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is not None:
        score = score + bias.double()
    queries, keys = q.shape[2], k.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        visible = visible.tril(keys - queries)
    if mask is not None:
        visible = visible & mask
    return torch.nan_to_num(score.masked_fill(~visible, -INF).softmax(dim=-1)) @ v.double()


def attend(q, k, v, mask=None, bias=None, causal=False, scale=0.25, mode="per_token", clip=None):
    return reference.qattention(q, k, v, mask, bias, causal=causal, softmax_scale=scale, mode=mode, clip=clip)


@pytest.mark.parametrize("mode", ["per_token", "per_tensor"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 5), (3, 9), (1, 17)])
def test_qattention_is_attention_up_to_8_bits(queries, keys, causal, mode):
    q, k, v = torch.randn(2, 3, queries, 16), torch.randn(2, 3, keys, 16), torch.randn(2, 3, keys, 16)
    mask = torch.rand(2, 1, 1, keys) > 0.3
    mask[..., 0] = True
    bias = torch.randn(1, 3, queries, keys)
    got = attend(q, k, v, mask, bias, causal, mode=mode)
    truth = attention64(q, k, v, mask, bias, causal, 0.25)
    # Codes carry half a unit in 127 of the largest value each: 4 % of max|v| covers Q, K, the probabilities and V.
    assert float((got.double() - truth).abs().max()) < 0.04 * float(v.abs().max())
    assert float(truth.abs().max()) > 0.1


def test_qattention_follows_its_formula():
    """One query, three keys, written out with the numbers of docs/design.md section 3."""
    q = torch.tensor([[[[1.0, -2.0]]]])
    k = torch.tensor([[[[1.0, 0.5], [0.0, 0.0], [-3.0, 1.0]]]])
    v = torch.tensor([[[[1.0, 2.0], [4.0, -4.0], [0.5, 0.25]]]])
    codes = {}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        codes[name] = oracle.quantize_activation(tensor.reshape(-1, 2).numpy(), "per_token")
    (q8, qs, _), (k8, ks, _), (v8, vs, _) = codes["q"], codes["k"], codes["v"]
    s = [float(q8[0] @ k8[j]) * float(qs[0]) * float(ks[j]) for j in range(3)]
    p = [np.exp(value - max(s)) for value in s]
    e = [np.rint(127 * value) for value in p]
    c = [np.rint(127 * p[j] * vs[j] / vs.max()) for j in range(3)]
    wanted = vs.max() * sum(c[j] * v8[j] for j in range(3)) / sum(e)
    got = attend(q, k, v, scale=1.0)[0, 0, 0]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=4 * 2**-23)


def test_qattention_masks():
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    mask = torch.tensor([True, True, False, True, False, False])
    got = attend(q, k, v, mask)
    assert_same_bits(got, attend(q, k[:, :, mask], v[:, :, mask]), "an invisible key is no key")
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, :, 2], poisoned_v[:, :, 4] = NAN, INF
    assert_same_bits(attend(q, poisoned_k, poisoned_v, mask), got, "nor are its values looked at")
    blind = mask.expand(1, 1, 4, 6).clone()
    blind[0, 0, 2] = False
    out = attend(q, k, v, blind)
    assert (out[:, :, 2] == 0).all()
    assert_same_bits(out[:, :, [0, 1, 3]], got[:, :, [0, 1, 3]], "the other queries")


def test_qattention_causal_is_a_mask_and_decoding_step_by_step_agrees():
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    whole = attend(q, k, v, causal=True)
    assert_same_bits(whole, attend(q, k, v, torch.ones(7, 7, dtype=torch.bool).tril()))
    for i in range(7):
        step = attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True)
        assert_same_bits(step, whole[:, :, i : i + 1], f"step {i}")


def test_qattention_zero_and_non_finite_tokens():
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    clean = attend(q, k, v)
    zero_v = v.clone()
    zero_v[0, 0, 1] = 0
    assert attend(q, k, zero_v).isfinite().all()
    # The scale of a zero row is 1 by convention. Small values beside it must keep their 8 bits.
    small = attend(q, k, zero_v * 1e-3)
    torch.testing.assert_close(small, attend(q, k, zero_v) * 1e-3, rtol=1e-5, atol=0)
    assert small.abs().max() > 0
    assert (attend(q, k, torch.zeros_like(v)) == 0).all()
    assert attend(q, torch.zeros_like(k), v).isfinite().all()
    bad_q = q.clone()
    bad_q[0, 0, 1, 3] = NAN
    out = attend(bad_q, k, v)
    assert out[0, 0, 1].isnan().all()
    assert_same_bits(out[:, :, [0, 2]], clean[:, :, [0, 2]], "its neighbours")
    bad_v = v.clone()
    bad_v[0, 0, 2, 0] = INF
    assert attend(q, k, bad_v).isnan().all()


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0)])
def test_qattention_of_nothing(queries, keys):
    q, k = torch.randn(1, 2, queries, 8), torch.randn(1, 2, keys, 8)
    assert attend(q, k, k).shape == q.shape and (attend(q, k, k) == 0).all()


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
def test_qattention_keeps_its_dtype_and_scales_before_it_quantizes(dtype):
    q, k, v = (torch.randn(1, 2, 5, 8).to(dtype) * 8 for _ in range(3))
    got = attend(q, k, v, scale=0.125, clip=2.5)
    assert got.dtype == dtype
    # The clip meets q after the factor (paper.md section 5.1, item 9): scaling first by hand changes nothing.
    scaled = attend((q.float() * 0.125).to(torch.float32), k.float(), v.float(), scale=1.0, clip=2.5)
    assert_same_bits(got, scaled.to(dtype))
    assert not torch.equal(got, attend(q, k, v, scale=0.125))


@pytest.mark.parametrize("mode", ["per_token", "per_tensor"])
@pytest.mark.parametrize("dtype", grids.DTYPES, ids=str)
def test_qattention_is_its_oracle_but_for_flips(dtype, mode):
    """Rows in which no code stands beside a half integer are exact; the others within oracle_attention's bound."""
    rows = flips = 0
    for seed, (queries, keys, causal) in enumerate(((1, 1, False), (7, 40, True), (5, 90, False), (9, 4, True))):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(2, 2, n, 16, generator=g).to(dtype) for n in (queries, keys, keys))
        v = (v * torch.randn(2, 2, keys, 1, generator=g).exp()).to(dtype)
        mask = torch.rand(2, 1, 1, keys, generator=g) < 0.8
        bias = torch.randn(2, queries, keys, generator=g)
        got = attend(q, k, v, mask, bias, causal, 0.25, mode, 2.5)
        codes = [
            oracle_attention.quantize(x.numpy(), mode, 2.5)
            for x in (q.float() * torch.tensor(0.25), k.float(), v.float())
        ]
        seen = oracle_attention.visible_keys(queries, keys, causal, mask.expand(2, 2, queries, keys).numpy())
        found = oracle_attention.assert_attention(
            got.float().numpy(), *(part for pair in codes for part in pair), seen,
            bias.expand(2, 2, queries, keys).numpy(), str(dtype).split(".")[1], f"{queries} x {keys}",
        )  # fmt: skip
        rows, flips = rows + found[0], flips + found[1]
    assert rows == 88 and flips < 10, f"{flips} possible flips: the bound proves little"


def decode(q, cache, lengths, source=None, bias=None, causal=False, scale=0.25, mode="per_token"):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    source = None if source is None else torch.tensor(source, dtype=torch.int32)
    return reference.qattention_decode(
        q, *cache, lengths, source, bias, causal=causal, softmax_scale=scale, mode=mode, clip=None
    )


def cache_of(k, v, capacity):
    """Codes and scales as a cache holds them, with rubbish behind the last key."""
    out = []
    for x in (k, v):
        codes, scale, _ = qmath.quantize_activation(x, "per_token")
        missing = capacity - x.shape[2]
        out += [F.pad(codes, (0, 0, 0, missing), value=-128), F.pad(scale, (0, missing), value=NAN)]
    return out


def test_qattention_decode_is_qattention_on_what_the_cache_holds():
    q, k, v = (torch.randn(3, 2, 7, 8) for _ in range(3))
    bias = torch.randn(1, 2, 7, 10)
    cache = cache_of(k, v, 10)
    whole = attend(q, k, v, None, bias[..., :7], causal=True)
    for i in range(7):
        step = decode(q[:, :, i : i + 1], cache, [i + 1] * 3, None, bias[:, :, i : i + 1])
        assert_same_bits(step, whole[:, :, i : i + 1], f"step {i}")
    assert_same_bits(
        decode(q[:, :, 4:], cache, [7] * 3, None, bias[:, :, 4:], causal=True), whole[:, :, 4:], "three new"
    )
    lengths = [2, 7, 0]
    got = decode(q, cache, lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = attend(q[one], k[one, :, :length], v[one, :, :length])
        assert_same_bits(got[one], alone, f"length {length}", may_be_zero=length == 0)


def test_qattention_decode_reads_the_cache_of_its_source():
    k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    q, source, lengths = torch.randn(4, 2, 1, 8), [1, 0, 1, 1], [5, 3, 4, 1]
    cache = cache_of(k, v, 6)
    got = decode(q, cache, lengths, source)
    assert_same_bits(got, decode(q, [t[source] for t in cache], lengths))
    assert not torch.equal(got, decode(q, [t[[0, 0, 1, 1]] for t in cache], lengths))


def test_qattention_decode_finds_each_key_in_the_cache_of_its_own():
    """Beams after reorderings: the past of a row lies in the caches of its ancestors, position by position."""
    k, v = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    q, lengths = torch.randn(4, 2, 1, 8), [5, 3, 0, 1]
    cache = cache_of(k, v, 6)
    source = torch.tensor([[2, 2, 0, 1, 1], [0, 1, 2, 0, 0], [0, 0, 0, 0, 0], [1, 0, 2, 2, 1]])
    own = [torch.stack([x[source[r], :, range(5)].transpose(0, 1) for r in range(4)]) for x in (k, v)]
    wanted = decode(q, cache_of(*own, 6), lengths)
    rubbish = torch.cat((source, torch.full((4, 1), 99)), dim=1)
    rubbish[1, 3:], rubbish[2], rubbish[3, 1:] = -7, 1 << 30, 99  # behind the lengths
    got = decode(q, cache, lengths, rubbish.tolist())
    assert_same_bits(got, wanted)
    assert not torch.equal(got, decode(q, cache, lengths, source[:, 0].tolist()))
    one = torch.tensor([1, 0, 2, 2], dtype=torch.int32)
    assert_same_bits(
        decode(q, cache, lengths, one.unsqueeze(1).expand(4, 6).tolist()), decode(q, cache, lengths, one.tolist())
    )


# --------------------------------------------------------------------------------------------------- embedding


def table(rows=24, columns=8):
    layer = LayerConfig(8, "absmax")
    quantized = qmath.quantize_weight(torch.randn(rows, columns), layer)
    facts = dict(bits=8, four_level=False, group_size=-1, embedding_dim=columns, embed_scale=1.0)
    packed = packing.pack(quantized.codes, 8), quantized.scale, None, None
    return lambda ids: reference.qembedding(ids, *packed, **facts, out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, -24, 24, 31, 32])
def test_no_id_reads_a_padding_row_or_counts_from_the_end(bad, dtype):
    """The gather itself refuses: on a GPU nobody looks at the ids before (it would wait for the device)."""
    gather = table()
    assert packing.padded_n(24) == 32 and bool((gather(torch.tensor([0, 23], dtype=dtype)) != 0).any(dim=1).all())
    with pytest.raises(IndexError):
        gather(torch.tensor([0, bad], dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-1, 24, 31])
def test_on_a_gpu_such_an_id_stops_the_process(bad):
    """In a process of its own: after a failed device-side assertion the context is gone."""
    code = (
        "import torch; from torch import nn; from dqkernels.nn import QEmbedding, LayerConfig; "
        "t = QEmbedding.from_embedding(nn.Embedding(24, 8), LayerConfig(8, 'absmax')).cuda(); t.backend = 'eager'; "
        f"t(torch.tensor([0], device='cuda')).cpu(); print('good'); t(torch.tensor([0, {bad}], device='cuda')).cpu()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(reference.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "good\n" and done.returncode != 0
    assert "assert" in done.stderr
