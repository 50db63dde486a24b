"""Fused blocks on the native core as they serve: its own LayerNorm and GELU, where modules take torch's.

What fusing itself changes is compared bit by bit in test_models_blocks.py, with torch's float ops in both.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_models import IDS, peaked, run
from compare import assert_bounded

from dqkernels import DQConfig, ops, quantize_, report
from dqkernels.kernels import native
from dqkernels.models import blocks, steps
from dqkernels.nn import QLinear

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linears(count: int, dtype: torch.dtype = torch.float32, **config) -> list[QLinear]:
    torch.manual_seed(0)
    config = DQConfig(**{"weight_bits": 4, "backend": "cpu", **config})
    return [QLinear.from_linear(torch.nn.Linear(40, 24).to(dtype), config) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["per_token", "per_tensor"])
def test_a_step_behind_a_norm(dtype, mode):
    """The norm is bounded; what the linears make of it is exact, as if they had been given it."""
    norm = torch.nn.LayerNorm(40).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2), norm.bias.normal_()
        x = (torch.randn(3, 5, 40) * 3 + 1).to(dtype)
        three = linears(3, dtype, act_granularity=mode)
        normed, found = steps.project(x, three, norm)
        truth = F.layer_norm(x.double(), (40,), norm.weight.double(), norm.bias.double(), norm.eps)
        assert_bounded(normed, truth, norm(x), f"{dtype}")
        for linear, out in zip(three, found, strict=True):
            assert torch.equal(out, linear(normed))
        for row in range(3):  # no bit depends on the batch
            if mode == "per_token":
                alone = steps.project(x[row : row + 1], three, norm)
                assert torch.equal(alone[0][0], normed[row]) and torch.equal(alone[1][2][0], found[2][row])


def test_gelu_behind_a_linear_is_gelu_before_the_next():
    """The GEMM's epilogue and `gelu_quantize` are one function: the same codes by either way."""
    (linear,) = linears(1)
    x = torch.randn(64, 40) * 4
    with torch.no_grad():
        bare = linear(x)
        _, (out,) = steps.project(x, [linear], None, transformers.activations.ACT2FN["gelu"])
        assert_bounded(out, F.gelu(bare.double()), F.gelu(bare), "GELU")
        for mode in ("per_token", "per_tensor"):
            codes = ops.quantize_activation(out, mode, None, True, backend="eager")
            for a, b in zip(ops.gelu_quantize(bare, mode, None, True, backend="cpu"), codes, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("attention", ["float", "int8"])
@pytest.mark.parametrize("family", blocks.FAMILIES)
def test_a_model_stays_near_its_modules(family, attention):
    """Last bits of a norm move a code by one now and then. All of that stays far below what 8 bits cost at all."""
    exact = run(peaked(family)).logits
    model = quantize_(peaked(family), DQConfig(weight_bits=8, attention=attention))
    with torch.no_grad():
        fused, again = run(model).logits, run(model).logits
        alone = run(model, padded=False).logits
        plain = run(blocks.unpatch(model)).logits
    apart, cost = ((each - plain).pow(2).mean().sqrt() for each in (fused, exact))
    assert torch.equal(fused, again) and torch.isfinite(alone).all()
    assert apart <= 0.3 * cost and cost > 0, (float(apart), float(cost))


def test_the_report_names_the_instruction_set():
    found = report(quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8))))
    assert found.instructions.partition(" ")[0] == native.native().cpu_isa()
    assert f"Instructions: {found.instructions}" in str(found)
    eager = report(quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), DQConfig(backend="eager")))
    assert eager.instructions == "" and "Instructions" not in str(eager)


def test_a_pickle_is_whole_in_another_process(tmp_path):
    """Nothing there has made the attention of a model int8 before, which transformers looks up by a name."""
    model = quantize_(peaked("marian"), DQConfig(weight_bits=4))
    with torch.no_grad():
        torch.save({"model": model, "ids": IDS, "logits": run(model, padded=False).logits}, tmp_path / "model.pt")
    code = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False); ids = saved['ids']\n"
        "with torch.no_grad(): logits = saved['model'](input_ids=ids, decoder_input_ids=ids[:, :5]).logits\n"
        "assert torch.equal(logits, saved['logits'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
