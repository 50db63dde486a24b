"""The compiled core's LayerNorm and GELU with quantization: bounded, codes exact, equal with each instruction set."""

from __future__ import annotations

import json

import cpu_norm_checks
import programs
import pytest
import torch

from dqkernels import backends, ops, reference
from dqkernels.kernels import cpu_norm, native

pytestmark = pytest.mark.skipif(native.native() is None, reason=native.why_absent() or "present")
ISAS = native.native().cpu_isas() if native.native() else ["scalar"]


@pytest.fixture(scope="module")
def reports():
    return {isa: programs.run(cpu_norm_checks, isa) for isa in ISAS}


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_keeps_the_contract(isa, reports):
    done = reports[isa]
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["isa"] == isa
    counts = {name: report[name] for name in cpu_norm_checks.CHECKS}
    assert all(counts.values()), counts


def test_every_instruction_set_gives_the_same_bits(reports):
    digests = {isa: json.loads(done.stdout)["digest"] for isa, done in reports.items() if done.returncode == 0}
    assert len(set(digests.values())) == 1, digests


def test_one_element_too_many_faults():
    assert programs.run(cpu_norm_checks, ISAS[-1], "--trip").returncode < 0  # killed by a signal


def test_auto_takes_the_core():
    for op in ("layernorm_quantize", "gelu_quantize"):
        assert backends.choose(op, "cpu", strict=True, mode="per_token").backend == "cpu"
    x = torch.randn(3, 40)
    for got, want in zip(
        ops.layernorm_quantize(x, None, torch.ones(40), None, 1e-5, "per_token"),
        cpu_norm.layernorm_quantize(x, None, torch.ones(40), None, 1e-5, "per_token", None, None, False),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert (ops.gelu_quantize(x, "per_token")[0].int() - reference.gelu_quantize(
        x, mode="per_token", clip=None, act_scale=None, want_sum=False
    )[0].int()).abs().max() <= 1  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 0}, "columns >= 1"),
        ({"rows": -1}, "rows must be >= 0"),
        ({"x": (8, 0, -1)}, "row stride >= 0"),
        ({"x": (8, 0, 2**62)}, "63 bits"),
        ({"residual": (8, 0, -1)}, "row stride >= 0"),
        ({"residual": (8, 0, 2**62)}, "63 bits"),
        ({"x": (8, 3, 8)}, "dtype code must be 0"),
        ({"weight": (8, 4, 0)}, "dtype code must be 0"),
        ({"x": (0, 0, 8)}, "x_ptr is a null pointer"),
        ({"weight": (2, 0, 0)}, "weight_ptr must be aligned to 4 bytes"),
        ({"y_ptr": 0}, "y_ptr is a null pointer"),
        ({"codes": (3, 0.0, 0.0, 8, 8, 0)}, "mode must be 0"),
        ({"codes": (0, -1.0, 0.0, 8, 8, 0)}, "clip must be positive"),
        ({"codes": (2, 0.0, 0.0, 8, 8, 0)}, "act_scale must lie"),
        ({"codes": (0, 0.0, 0.0, 8, 0, 0)}, "scale_ptr is a null pointer"),
    ],
)
def test_the_core_refuses_with_one_sentence(change, sentence):
    x, y, weight = torch.ones(2, 8), torch.ones(2, 8), torch.ones(8)
    q, scale = torch.ones(2, 8, dtype=torch.int8), torch.ones(2)
    arguments = {
        "x": (x.data_ptr(), 0, 8), "residual": None, "weight": (weight.data_ptr(), 0, 0), "bias": None, "eps": 1e-5,
        "y_ptr": y.data_ptr(), "rows": 2, "k": 8, "codes": (0, 0.0, 0.0, q.data_ptr(), scale.data_ptr(), 0),
        "threads": 1,
    }  # fmt: skip
    native.native().norm_quantize(**arguments)
    assert not y.any() and not q.any() and (scale == 1).all()
    with pytest.raises(ValueError, match=sentence):
        native.native().norm_quantize(**arguments | change)


def test_the_launchers_refuse_by_name():
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match="residual must be on cpu, got meta"):
        cpu_norm.layernorm_quantize(x, x.to("meta"), torch.ones(8), None, 1e-5, "per_token", None, None, False)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, got torch.float64"):
        cpu_norm.gelu_quantize(x.double(), "per_token", None, None, False)
    with pytest.raises(ValueError, match="one element, got None"):
        cpu_norm.gelu_quantize(x, "static", None, None, False)
