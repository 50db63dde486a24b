"""The table of int8 attention against torch's: its cases, its errors against those worked out here, its rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dqkernels import ops
from dqkernels.bench import attention, kernels, record
from dqkernels.bench.kernel_cases import Case

CPU = torch.device("cpu")


def test_cases_reach_the_longest():
    found = attention.groups()
    assert {shape[3] for _, shape, _ in found} == {64, 128, 256, 512, 1024, 2048, 4096}
    assert all(kernels._checked(*group) == group for group in found)
    assert max(shape[2] * shape[3] for op, shape, _ in found if op == "qattention") == 1024 * 1024
    assert sum(op == "qattention_decode" for op, _, _ in found) == 14


@pytest.mark.parametrize("variant", ["", "causal"])
def test_errors_are_those_to_float64(variant):
    case = Case("qattention", (1, 2, 48, 48, 64), variant, torch.float32, CPU, ["eager"])
    found = attention.errors(case)
    assert list(found) == ["torch sdpa", "dqkernels eager"]
    q, k, v = case.ways[0].inputs
    causal = variant == "causal"
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    y = ops.qattention(q, k, v, None, None, causal, 64**-0.5, "per_token", None, "eager")
    wanted = float((y.double() - truth).norm() / truth.norm())
    assert found["dqkernels eager"] == pytest.approx(wanted, rel=1e-3) and 1e-3 < wanted < 5e-2
    assert found["torch sdpa"] < 1e-6


def test_decoding_has_no_error_of_its_own():
    """Over a cache the formula is the same; the copy beside it is no attention."""
    found = attention.errors(Case("qattention_decode", (1, 2, 2, 40, 64), "", torch.float32, CPU, ["eager"]))
    assert list(found) == ["torch sdpa", "dqkernels eager"] and 1e-3 < found["dqkernels eager"] < 5e-2


def test_a_run_and_its_table(tmp_path):
    made = attention.run([16], device="cpu", backends=["eager"], seconds=10, out=tmp_path / "attention.json")
    assert record.read(tmp_path / "attention.json") == made and made["kind"] == "kernels"
    assert any(row["status"] == "timed" for row in made["rows"])
    assert all(("norm_error" in row) == (row["candidate"] != "torch copy") for row in made["rows"])
    lines = attention.markdown(made).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| prefill", "16 x 16"], ["| causal prefill", "16 x 16"], ["| decode, 1 beam", "1 x 16"],
        ["| decode, 4 beams", "1 x 16"],
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1 and "eager us" in lines[0]
    for row in made["rows"]:  # what the time did not reach has no time, and its error all the same
        row.pop("median_us", None), row.pop("speedup_ratio", None)
    assert attention.markdown(made).splitlines()[2].startswith("| prefill | 16 x 16 | - | ")
