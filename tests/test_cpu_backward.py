"""The backward ops of the native CPU backend: eager's bits, whatever the pieces; training with nothing else allowed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_equal, assert_same_bits

from dqkernels import gradients, ops, reference
from dqkernels.kernels import cpu_backward, native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: bits, quantizer, granularity, group_size
FORMATS = {
    "w8": (8, "absmax", "per_channel", -1),
    "w8 per_tensor": (8, "absmax", "per_tensor", -1),
    "w4": (4, "absmax", "per_channel", -1),
    "w4 g64": (4, "mse", "per_channel", 64),
    "w2": (2, "ternary", "per_channel", -1),
    "w2f per_tensor": (2, "four_level", "per_tensor", -1),
    "w2f g32": (2, "four_level", "per_channel", 32),
}
SHAPES = ((1, 1), (17, 130), (16, 128), (70, 384))


def packed(name, n, k):
    bits, quantizer, granularity, group_size = FORMATS[name]
    qweight, scale, mult = ops.quantize_weight(torch.randn(n, k), bits, quantizer, granularity, group_size)
    weight = qweight, scale, None if group_size == -1 else mult
    return weight, (bits, quantizer == "four_level", group_size)


@pytest.mark.parametrize("name", FORMATS)
def test_floats_of_a_weight(name):
    for n, k in SHAPES:
        weight, format_ = packed(name, n, k)
        both = [ops.dequantize_weight(*weight, *format_, n, k, backend=backend) for backend in ("cpu", "eager")]
        assert both[0].shape == (n, k) and both[0].any()
        assert_equal(*both, f"{n} x {k}")


def test_a_weight_of_other_sizes_is_refused():
    weight, format_ = packed("w4", 17, 130)
    bits, four_level, group_size = format_
    facts = {"bits": bits, "four_level": four_level, "group_size": group_size}
    for n, k in ((33, 130), (17, 300)):
        with pytest.raises(ValueError, match="qweight"):
            cpu_backward.dequantize(*weight, **facts, out_features=n, in_features=k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_a_linear(name, dtype):
    for n, k in SHAPES:
        weight, format_ = packed(name, n, k)
        grad = torch.randn(5, n).to(dtype)
        for passed in (None, reference.pack_bits(torch.rand(5, k) < 0.6)):
            given = grad, *weight, passed, *format_, k, dtype
            both = [gradients.qlinear_grad_input(*given, backend=backend) for backend in ("cpu", "eager")]
            assert_equal(*both, f"grad_x {n} x {k}")
        q, scale, _ = ops.quantize_activation(torch.randn(5, k), "per_token")
        both = [gradients.qlinear_grad_weight(grad, q, scale, dtype, backend=backend) for backend in ("cpu", "eager")]
        assert both[0].any()
        assert_equal(*both, f"grad_w {n} x {k}")


def attention_operands(batch, heads, queries, keys, head_dim=8, dtype=torch.float32):
    made = [torch.randn(batch, heads, queries, head_dim).to(dtype)]
    for length in (queries, keys, keys):
        codes, scale, _ = ops.quantize_activation(torch.randn(batch, heads, length, head_dim), "per_token")
        made += [codes, scale]
    return made


#: Shapes of a mask or a bias for [batch, heads, queries, keys] = [3, 4, 5, 6].
BROADCAST = ((6,), (5, 1), (4, 1, 6), (3, 1, 5, 6), (1, 4, 5, 6), (3, 4, 1, 1), (3, 4, 5, 6), (1, 1, 1, 1))


@pytest.mark.parametrize("heads_at_once", [1, 3, 4, 8, 100])
def test_attention_in_pieces(monkeypatch, heads_at_once):
    """Parts of the heads of a batch, all of one, of two, and of all: no bit of dQ, dK and dV moves."""
    seen, whole = [], reference.qattention_backward

    def look(grad, *rest, **facts):
        seen.append(grad.shape[:2].numel())
        return whole(grad, *rest, **facts)

    operands = attention_operands(3, 4, 5, 6)
    passed = [reference.pack_bits(torch.rand(12 * n, 8) < 0.7) for n in (5, 6, 6)]
    for mask_shape, bias_shape in itertools.zip_longest(BROADCAST, (None, *reversed(BROADCAST))):
        mask = None if mask_shape is None else torch.rand(mask_shape) < 0.7
        bias = None if bias_shape is None else torch.randn(bias_shape)
        for clipped, causal in ((False, True), (True, False)):
            given = *operands, mask, bias, *(passed if clipped else [None] * 3)
            facts = {"causal": causal, "softmax_scale": 0.3, "want_bias": bias is not None, "out_dtype": torch.float32}
            want = whole(*given, **facts)
            with monkeypatch.context() as patch:
                patch.setattr(cpu_backward, "PIECE", heads_at_once * 5 * 6)
                patch.setattr(reference, "qattention_backward", look)
                got = cpu_backward.qattention_backward(*given, **facts)
            for name, mine, theirs in zip("qkv", got, want, strict=False):
                assert_same_bits(mine, theirs, f"d{name}, mask {mask_shape}, bias {bias_shape}")
            if bias is not None:
                assert got[3].shape == bias.shape
                torch.testing.assert_close(got[3], want[3], rtol=1e-5, atol=1e-6)
    assert {1: {1}, 3: {3, 1}, 4: {4}, 8: {8, 4}, 100: {12}}[heads_at_once] == set(seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_by_either_backend(dtype):
    """Longer than a piece; and a NaN stays in its batch and head."""
    operands = attention_operands(2, 3, 600, 500, dtype=dtype)
    assert 600 * 500 * 2 > cpu_backward.PIECE
    operands[0][1, 2, 7] = float("nan")
    given = *operands, torch.rand(2, 1, 1, 500) < 0.9, None, None, None, None, False, 0.3, False, dtype
    both = [gradients.qattention_backward(*given, backend=backend) for backend in ("cpu", "eager")]
    for name, mine, theirs in zip("qkv", *both, strict=False):
        assert_same_bits(mine, theirs, f"d{name}")
        assert mine[1, 2].isnan().any() and not mine[0].isnan().any() and not mine[1, :2].isnan().any()


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_attention_of_nothing(batch, queries, keys):
    operands = attention_operands(batch, 2, queries, keys)
    bias = torch.randn(2, queries, keys)
    given = *operands, None, bias, None, None, None, False, 0.3, True, torch.float32
    both = [gradients.qattention_backward(*given, backend=backend) for backend in ("cpu", "eager")]
    for mine, theirs in zip(*both, strict=True):
        assert mine.shape == theirs.shape and torch.equal(mine, theirs)


def test_training_where_only_the_core_is_allowed():
    """`strict` refuses eager, and DQKERNELS_BACKEND=cpu knows no other: the gradients of both are eager's."""
    program = """
import sys
import torch, tiny_models
from dqkernels import DQConfig
from dqkernels.train import prepare_qat
ids = torch.tensor([[5, 6, 7, 8, 9, 2], [11, 12, 13, 2, 1, 1]])
torch.manual_seed(0)
strict = sys.argv[1] == "strict"
config = DQConfig(weight_bits=4, attention="int8", act_clip=2.5, strict=strict)
model = prepare_qat(tiny_models.make("bart"), config, True)
model.eval()(input_ids=ids, labels=ids).loss.backward()
grads = [p.grad.double().abs().sum() for p in model.parameters() if p.grad is not None]
assert len(grads) > 20
print(float(sum(grads)))
"""
    found = {}
    root = Path(__file__).resolve().parents[1]
    for how, backend in (("strict", "auto"), ("forced", "cpu"), ("forced", "eager")):
        env = {"PYTHONPATH": f"{root}:{root / 'tests'}", "DQKERNELS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", program, how], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found[how, backend] = float(done.stdout)
    assert found["strict", "auto"] == found["forced", "cpu"]
    assert found["forced", "cpu"] == pytest.approx(found["forced", "eager"], rel=1e-2)
