"""The backward ops: closed forms in float64, refusals in words, opcheck, bits of the clip mask."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from compare import assert_bounded, assert_equal

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


def samples(name):
    weight, format_ = packed("w4g")
    grad = torch.randn(2, 3, N)
    if name == "qlinear_grad_input":
        yield grad, *weight, None, *format_, K, torch.float32
        yield grad, *weight, reference.pack_bits(torch.rand(M, K) < 0.5), *format_, K, torch.bfloat16
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
