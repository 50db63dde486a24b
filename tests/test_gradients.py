"""The backward ops: closed forms in float64, refusals in words, opcheck, bits of the clip mask; attention's against
torch's own autograd of the formula."""

from __future__ import annotations

import numpy as np
import oracle
import oracle_attention
import pytest
import torch
from compare import assert_bounded, assert_equal, assert_same_bits

from dqkernels import gradients, ops, packing, reference

M, N, K = 6, 21, 150
FORMATS = {"w8": (8, "absmax", -1), "w4": (4, "absmax", -1), "w4g": (4, "mse", 64), "w2": (2, "ternary", -1),
           "w2f": (2, "four_level", -1), "w2fg": (2, "four_level", 32)}  # fmt: skip


def packed(name, granularity="per_channel"):
    bits, quantizer, group_size = FORMATS[name]
    qweight, scale, mult = ops.quantize_weight(torch.randn(N, K), bits, quantizer, granularity, group_size)
    mult = None if group_size == -1 else mult
    return (qweight, scale, mult), (bits, quantizer == "four_level", group_size)


def matrix64(weight, format_):
    """What the packed weight stands for, from the oracle: the identity times it."""
    qweight, scale, mult = weight
    bits, four_level, group_size = format_
    codes = packing.unpack(qweight, N, K, bits).numpy()  # exhaustively tested in test_packing
    multipliers = None if mult is None else mult.numpy()
    level = oracle.accumulate(np.eye(K, dtype=np.int64), codes, multipliers, four_level, group_size).T
    return torch.from_numpy(level * scale.double().reshape(-1, 1).numpy())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_grad_input_is_the_float_linears(name, dtype):
    weight, format_ = packed(name)
    grad = torch.randn(2, 3, N).to(dtype)
    keep = torch.rand(M, K) < 0.6
    matrix = matrix64(weight, format_)
    for passed in (None, reference.pack_bits(keep)):
        got = gradients.qlinear_grad_input(grad, *weight, passed, *format_, K, torch.float32)
        mask = 1.0 if passed is None else keep.double().reshape(2, 3, K)
        truth = (grad.double() @ matrix) * mask
        assert_bounded(got, truth, (grad.float() @ matrix.float()) * torch.as_tensor(mask).float(), name)
        assert bool((got != 0).any()) and (passed is None or bool((got.reshape(M, K)[~keep] == 0).all()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_grad_weight_is_the_float_linears(dtype):
    x, grad = torch.randn(2, 3, K), torch.randn(2, 3, N).to(dtype)
    q, scale, _ = ops.quantize_activation(x, "per_token")
    got = gradients.qlinear_grad_weight(grad, q, scale, torch.float32)
    dequantized = (q.double() * scale.double().unsqueeze(-1)).reshape(M, K)
    truth = grad.double().reshape(M, N).t() @ dequantized
    assert_bounded(got, truth, grad.float().reshape(M, N).t() @ dequantized.float(), "grad_w")
    assert got.shape == (N, K)


def test_per_tensor_scale():
    weight, format_ = packed("w8", "per_tensor")
    grad = torch.eye(N)
    got = gradients.qlinear_grad_input(grad, *weight, None, *format_, K, torch.float32)
    assert weight[1].numel() == 1
    assert_equal(got, matrix64(weight, format_).float().numpy())


@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 65])
def test_bits_of_a_mask(k):
    mask = torch.rand(5, k) < 0.5
    bits = reference.pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (5, -(-k // 8))
    assert torch.equal(reference.unpack_bits(bits, k), mask)
    want = np.packbits(mask.numpy(), axis=1, bitorder="little")
    assert (bits.numpy() == want).all()


def random_qkv(queries=4, keys=5, batch=2, heads=3, head_dim=8):
    return [torch.randn(batch, heads, n, head_dim) for n in (queries, keys, keys)]


def attention_codes(q, k, v, scale=0.3, mode="per_token", clip=None):
    """q8, q_scale, k8, k_scale, v8, v_scale as the forward pass leaves them, from the oracle."""
    found = []
    for x in (q * scale, k, v):
        codes, one = oracle_attention.quantize(x.float().numpy(), mode, clip)
        if x is v:
            one = np.where((codes == 0).all(axis=-1), np.float32(0), one)
        found += [torch.from_numpy(codes).to(torch.int8), torch.from_numpy(one)]
    return found


def samples(name):
    weight, format_ = packed("w4g")
    grad = torch.randn(2, 3, N)
    if name == "qlinear_grad_input":
        yield grad, *weight, None, *format_, K, torch.float32
        yield grad, *weight, reference.pack_bits(torch.rand(M, K) < 0.5), *format_, K, torch.bfloat16
    elif name == "qattention_backward":
        codes, bias = attention_codes(*random_qkv()), torch.randn(3, 4, 5)
        grad, passed = torch.randn(2, 4, 3, 8).transpose(1, 2), [torch.full((2 * 3 * n, 1), 0xA5) for n in (4, 5, 5)]
        passed = [x.to(torch.uint8) for x in passed]
        for out_dtype in (torch.float32, torch.bfloat16):
            yield grad, *codes, torch.rand(5) < 0.7, bias, *passed, True, 0.3, True, out_dtype
            yield grad.half(), *codes, None, None, None, None, None, False, 0.3, False, out_dtype
        yield grad, *codes, None, bias, None, None, None, False, 0.3, False, out_dtype
    else:
        q = torch.randint(-127, 128, (2, 3, K), dtype=torch.int8)
        yield grad, q, torch.rand(2, 3), torch.float32
        yield grad.half(), q, torch.rand(2, 3), torch.float16


@pytest.mark.parametrize("name", gradients.SCHEMAS)
def test_opcheck(name):
    for arguments in samples(name):
        torch.library.opcheck(getattr(torch.ops.dqkernels, name).default, arguments)


def call_input(grad=None, passed=None, in_features=K, out_dtype=torch.float32):
    weight, format_ = packed("w4")
    grad = torch.randn(M, N) if grad is None else grad
    return gradients.qlinear_grad_input(grad, *weight, passed, *format_, in_features, out_dtype)


def call_attention(**changes):
    """`qattention_backward` of [1, 2, 3, 8] on 4 keys."""
    names = ("grad", "q8", "q_scale", "k8", "k_scale", "v8", "v_scale")
    codes = attention_codes(*random_qkv(3, 4, 1, 2))
    arguments = dict(zip(names, (torch.randn(1, 2, 3, 8), *codes), strict=True))
    arguments |= dict.fromkeys(("mask", "bias", "q_passed", "k_passed", "v_passed"))
    arguments |= {"causal": False, "softmax_scale": 0.3, "want_bias": False, "out_dtype": torch.float32, **changes}
    return gradients.qattention_backward(**arguments)


Q = torch.zeros(M, K, dtype=torch.int8)
REFUSED = {
    "grad of integers": (lambda: call_input(torch.ones(M, N, dtype=torch.int32)), "grad must be float32"),
    "a row too long": (lambda: call_input(torch.randn(M, 40)), "qweight"),
    "mask as bool": (lambda: call_input(passed=torch.ones(M, K, dtype=torch.bool)), r"passed must be uint8 \[6, 19\]"),
    "mask of other rows": (
        lambda: call_input(passed=torch.ones(M - 1, 19, dtype=torch.uint8)),
        r"passed must be uint8 \[6, 19\], one bit per input, got torch.uint8 \[5, 19\]",
    ),
    "integers out": (lambda: call_input(out_dtype=torch.int8), "out_dtype must be float32, float16 or bfloat16"),
    "other rows": (
        lambda: gradients.qlinear_grad_weight(torch.randn(5, N), Q, torch.ones(M), torch.float32),
        r"grad and q must have the same rows, got \[5, 21\] and \[6, 150\]",
    ),
    "q of floats": (
        lambda: gradients.qlinear_grad_weight(torch.randn(M, N), Q.float(), torch.ones(M), torch.float32),
        "q must be int8",
    ),
    "integers out of grad_w": (
        lambda: gradients.qlinear_grad_weight(torch.randn(M, N), Q, torch.ones(M), torch.int32),
        "out_dtype must be float32, float16 or bfloat16, got torch.int32",
    ),
    "attention, grad of other queries": (
        lambda: call_attention(grad=torch.randn(1, 2, 4, 8)),
        r"grad and q8 must be \[batch, heads, queries, head_dim\], got \[1, 2, 4, 8\] and \[1, 2, 3, 8\]",
    ),
    "attention, float keys": (
        lambda: call_attention(k8=torch.zeros(1, 2, 4, 8)),
        r"k8 must be int8 \[1, 2, length, 8\], got torch.float32 \[1, 2, 4, 8\]",
    ),
    "attention, values of another head_dim": (
        lambda: call_attention(v8=torch.zeros(1, 2, 4, 9, dtype=torch.int8)),
        r"v8 must be int8 \[1, 2, length, 8\]",
    ),
    "attention, fewer values than keys": (
        lambda: call_attention(v8=torch.zeros(1, 2, 3, 8, dtype=torch.int8), v_scale=torch.ones(1, 2, 3)),
        r"k8 and v8 differ: \[1, 2, 4, 8\], \[1, 2, 3, 8\]",
    ),
    "attention, scale of a head": (
        lambda: call_attention(q_scale=torch.ones(1, 2)),
        r"q_scale must be float32 \[1, 2, 3\], got torch.float32 \[1, 2\]",
    ),
    "attention, additive mask": (lambda: call_attention(mask=torch.zeros(3, 4)), "mask must be bool"),
    "attention, bias of other keys": (
        lambda: call_attention(bias=torch.zeros(3, 5)),
        r"bias must broadcast to \[1, 2, 3, 4\], got \[3, 5\]",
    ),
    "attention, gradient of no bias": (lambda: call_attention(want_bias=True), "want_bias=True needs the bias"),
    "attention, mask of a clip": (
        lambda: call_attention(v_passed=torch.ones(8, 2, dtype=torch.uint8)),
        r"passed must be uint8 \[8, 1\], one bit per input, got torch.uint8 \[8, 2\]",
    ),
    "attention, integers out": (lambda: call_attention(out_dtype=torch.int8), "out_dtype must be float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_in_words(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_no_second_derivative():
    grad = torch.randn(M, N, requires_grad=True)
    out = call_input(grad)
    with pytest.raises(RuntimeError, match="qlinear_grad_input has no gradient: a straight-through estimator"):
        out.sum().backward()


# ----------------------------------------------------------------------------------------------- attention


def formula64(codes, mask, bias, causal, grad):
    """torch's autograd of the float64 formula: gradients of the dequantized q^, k^, v^ and of bias; and the output.

    Straight through the rounding of the shares: the value is P^, the derivative p's.
    """
    q8, qs, k8, ks, v8, vs = codes
    leaves = [(x.double() * s.double().unsqueeze(-1)).requires_grad_() for x, s in ((q8, qs), (k8, ks), (v8, vs))]
    bias = None if bias is None else bias.double().requires_grad_()
    queries, keys = q8.shape[2], k8.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else torch.tensor(True)
    seen = (seen if mask is None else seen & mask).expand(*q8.shape[:3], keys)

    def softmax(s):
        return torch.nan_to_num(s.masked_fill(~seen, -float("inf")).softmax(dim=-1))

    score = leaves[0] @ leaves[1].mT
    p = softmax(score if bias is None else score + bias)
    # The codes of the shares, in float64: no seed of this file puts one beside a half integer.
    top = p.amax(dim=-1, keepdim=True)
    t = 127 * p.detach() / torch.where(top > 0, top, 1.0)
    v_max = torch.where(seen, vs.double().unsqueeze(-2), 0.0).amax(dim=-1, keepdim=True)
    row = vs.double().unsqueeze(-2)
    e, c = t.round(), (t * row / torch.where(v_max > 0, v_max, 1.0) * seen).round()
    share = torch.where(row > 0, c * v_max / torch.where(row > 0, row, 1.0), e) / e.sum(dim=-1, keepdim=True).clamp(
        min=1
    )
    out = (p + (share - p).detach()) @ leaves[2]
    found = torch.autograd.grad(out, leaves + ([] if bias is None else [bias]), grad.double())
    return [*found, None][:4], out.detach()


ATTENTION_CASES = [
    (4, 5, False, "per_token", None), (1, 1, False, "per_token", None), (6, 9, True, "per_tensor", None),
    (9, 6, True, "per_token", 1.2), (3, 17, False, "per_tensor", 0.9),
]  # fmt: skip


@pytest.mark.parametrize("queries, keys, causal, mode, clip", ATTENTION_CASES)
@pytest.mark.parametrize("has_mask, has_bias", [(False, False), (True, True)])
def test_attention_gradients_are_autograds(queries, keys, causal, mode, clip, has_mask, has_bias):
    """The op, its reference in float64 and the oracle, against torch's autograd; zero where the clip saturates."""
    torch.manual_seed(1)
    q, k, v = random_qkv(queries, keys)
    if clip is not None:
        k[0, 0, 0, :3] = torch.tensor([clip, -clip, np.nextafter(np.float32(clip), np.float32(0))])
        q[1, 2, 0, :2] = torch.tensor([clip, 2 * clip]) / 0.5
    if keys > 2:
        v[0, 1, 2] = 0  # a zero row of V has a gradient
    mask = torch.rand(2, 1, queries, keys) < 0.8 if has_mask else None
    bias = torch.randn(1, 3, queries, keys, requires_grad=True) if has_bias else None
    grad = torch.randn(q.shape)
    codes = attention_codes(q, k, v, 0.5, mode, clip)
    (dq, dk, dv, dbias), out = formula64(codes, mask, None if bias is None else bias.detach(), causal, grad)
    limits = [torch.ones_like(x) if clip is None else (x.abs() < clip).double() for x in (q * 0.5, k, v)]
    truth = [0.5 * dq * limits[0], dk * limits[1], dv * limits[2]] + ([dbias] if has_bias else [])

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = ops.qattention(*leaves, mask, bias, causal, 0.5, mode, clip)
    assert float((got.detach().double() - out).abs().max()) < 1e-6 * float(out.abs().max()), "P^ is not the forward's"
    got.backward(grad)
    found = [x.grad for x in leaves] + ([bias.grad] if has_bias else [])

    passed = [None if clip is None else reference.pack_bits((x.abs() < clip).reshape(-1, 8)) for x in (q * 0.5, k, v)]
    facts = {"causal": causal, "softmax_scale": 0.5, "want_bias": has_bias, "out_dtype": torch.float64}
    detached = None if bias is None else bias.detach()
    wide = reference.qattention_backward(
        grad, *codes, mask, detached, *passed, **facts, compute_dtype=torch.float64
    )  # fmt: skip
    for name, want, one, exact in zip(("q", "k", "v", "bias"), truth, found, wide, strict=False):
        largest = float(want.abs().max())
        assert float((exact - want).abs().max()) <= 1e-13 + 1e-12 * largest, f"{name}, reference in float64"
        assert float((one.double() - want).abs().max()) <= 1e-5 * max(largest, 0.1), name
        assert keys == 1 or largest > 0.01
    if clip is not None:
        assert k.numel() > int((limits[1] == 0).sum()) > 2 and leaves[1].grad[0, 0, 0, :2].tolist() == [0.0, 0.0]
        assert leaves[0].grad[1, 2, 0, :2].tolist() == [0.0, 0.0]

    seen = oracle_attention.visible_keys(queries, keys, causal, None if mask is None else mask.numpy())
    seen = np.broadcast_to(seen, (2, 3, queries, keys))
    for at in np.ndindex(2, 3):
        numbers = [x[at].numpy().astype(np.int64) if i % 2 == 0 else x[at].numpy() for i, x in enumerate(codes)]
        added = None if bias is None else detached[0, at[1]].numpy()
        one = oracle_attention.backward(grad[at].double().numpy(), *numbers, seen[at], added, 0.5)
        for mine, want in zip((one.dq, one.dk, one.dv), (0.5 * dq, dk, dv), strict=True):
            np.testing.assert_allclose(mine, want[at].numpy(), rtol=1e-9, atol=1e-12)


def test_attention_of_zero_values_learns():
    """V = 0, as behind a projection that starts at zero: its share is that of the scores."""
    q, k, v = random_qkv()
    v = torch.zeros_like(v, requires_grad=True)
    grad = torch.randn(q.shape)
    ops.qattention(q, k, v, None, None, False, 0.3).backward(grad)
    p = (q @ k.mT * 0.3).softmax(dim=-1)
    assert float((v.grad - p.mT @ grad).abs().max()) < 0.05 * float(grad.abs().max())
    assert bool((v.grad != 0).any(dim=-1).all())


def test_attention_rows_that_are_spoilt_or_blind():
    """A NaN query spoils its dQ and what it sees; a query that sees nothing gives nothing; a hidden NaN is unseen."""
    q, k, v = random_qkv(4, 6, 1, 1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, :3], mask[2], mask[:, 5] = False, False, False

    def gradients_of(q, k, v, grad):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        ops.qattention(*leaves, mask, None, False, 0.3).backward(grad)
        return [x.grad[0, 0] for x in leaves]

    grad = torch.randn(q.shape)
    clean = gradients_of(q, k, v, grad)
    assert not clean[0][2].any() and not clean[1][5].any() and not clean[2][5].any()
    assert bool(clean[0][[0, 1, 3]].any(dim=-1).all()) and bool(clean[2][:5].any())
    for bad in (float("nan"), float("inf")):
        hidden = k.clone(), v.clone()
        for x in hidden:
            x[..., 5, 2] = bad
        for got, want in zip(gradients_of(q, *hidden, grad), clean, strict=True):
            assert_same_bits(got, want, "behind the mask")
        spoilt = q.clone()
        spoilt[0, 0, 1, 2] = bad
        dq, dk, dv = gradients_of(spoilt, k, v, grad)
        assert dq.isnan().any(dim=-1).tolist() == [False, True, False, False]
        for x, want in ((dk, clean[1]), (dv, clean[2])):
            assert x.isnan().all(dim=-1).tolist() == [False] * 3 + [True] * 2 + [False]
            assert bool(x[:3].isfinite().all()) and bool((x[5] == want[5]).all())
        spoilt = grad.clone()
        spoilt[0, 0, 1, 2] = bad
        dq, dk, _ = gradients_of(q, k, v, spoilt)
        assert dq.isnan().all(dim=-1).tolist() == [False, True, False, False]
        assert dk.isnan().all(dim=-1).tolist() == [False] * 3 + [True] * 2 + [False]


def test_attention_keeps_int8_between_the_passes():
    """A byte per element and its scales, a bit more with a clip; never q, k, v or anything of queries x keys."""
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in random_qkv(64, 48, 2, 3, 64))
    elements = sum(x.numel() for x in (q, k, v))
    scales = 4 * sum(x.numel() // 64 for x in (q, k, v))
    for clip in (None, 1.5):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            ops.qattention(q, k, v, None, None, False, 0.1, "per_token", clip)
        assert sum(x.numel() * x.element_size() for x in kept) == elements + scales + (elements // 8 if clip else 0)


def test_attention_gradients_have_the_dtypes_of_their_inputs():
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (x.to(dtype).requires_grad_() for x, dtype in zip(random_qkv(), dtypes, strict=True))
    bias = torch.randn(5).to(torch.bfloat16).requires_grad_()
    ops.qattention(q, k, v, None, bias, False, 0.3).float().square().sum().backward()
    assert [x.grad.dtype for x in (q, k, v, bias)] == [*dtypes, torch.bfloat16]
    assert all(x.grad.shape == x.shape and bool(x.grad.any()) for x in (q, k, v, bias))


def test_attention_gives_only_the_gradients_that_are_needed():
    q, k, v = random_qkv()
    bias = torch.randn(4, 5, requires_grad=True)
    ops.qattention(q, k, v, None, bias, False, 0.3).sum().backward()
    assert bool(bias.grad.any()) and all(x.grad is None for x in (q, k, v))
    k.requires_grad_()
    ops.qattention(q, k, v, None, bias.detach(), False, 0.3).square().sum().backward()
    assert bool(k.grad.any())
