"""Promise P1 on every instruction set: each case of grids.gemm_cases() against the oracle.

`python tests/cpu_grid_checks.py` runs `qlinear` of the compiled core on all of them with the instruction set of
DQKERNELS_CPU, and prints how many there were and a digest of the results. test_exactness.py starts it as a program,
once per set, and runs the same cases on every other backend.
"""

from __future__ import annotations

import hashlib
import json

import grids
import numpy as np
import oracle
import torch
from compare import assert_equal

from dqkernels import ops
from dqkernels.kernels import native


def draw(case: grids.Case):
    """Random codes over all that storage admits, packed by the oracle; scales with a zero among them."""
    rng = np.random.default_rng(case.seed)
    low, high = grids.CODE_RANGE.get(case.quantizer, (-(1 << (case.bits - 1)), (1 << (case.bits - 1)) - 1))
    if case.bits == 8:
        low = -127
    codes = rng.integers(low, high + 1, (case.n, case.k))
    scale = rng.random(1 if case.granularity == "per_tensor" else case.n).astype(np.float32) * 0.01 + 1e-4
    if scale.size > 3:
        scale[rng.integers(case.n)] = 0.0  # a zero weight row
    mult = None
    if case.group_size != -1:
        limit = oracle.mult_max(case.bits, case.four_level, case.k)
        mult = rng.integers(1, limit + 1, (case.n, -(-case.k // case.group_size))).astype(np.uint8)
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.m, case.k, generator=generator) * 2
    if case.m > 2:
        x[1], x[2, case.k // 2] = 0.0, float("nan") if case.mode != "per_tensor" else 40.0
    x = grids.LAYOUTS[case.layout](x.to(case.dtype))
    bias = torch.randn(case.n, generator=generator).to(case.dtype) if case.bias else None
    residual = torch.randn(case.m, case.n, generator=generator).to(case.dtype) if case.residual else None
    act_scale = 0.021 if case.mode == "static" else None
    return codes, scale, mult, x, bias, residual, act_scale


def as_numpy(tensor):
    return None if tensor is None else tensor.float().numpy()


def assert_qlinear(case: grids.Case, backends) -> list[torch.Tensor]:
    """`qlinear` on each backend has the oracle's bits; returns the results."""
    codes, scale, mult, x, bias, residual, act_scale = draw(case)
    wanted = oracle.qlinear(
        as_numpy(x).reshape(case.m, case.k), codes, scale, mult,
        four_level=case.four_level, group_size=case.group_size, mode=case.mode, clip=case.clip,
        act_scale=act_scale, bias=as_numpy(bias), residual=as_numpy(residual), activation=case.activation,
        dtype=str(case.dtype).removeprefix("torch."),
    )  # fmt: skip
    qweight = torch.from_numpy(oracle.pack_fast(codes, case.bits))
    multipliers = None if mult is None else torch.from_numpy(mult)
    results = []
    for backend in backends:
        got = ops.qlinear(
            x, qweight, torch.from_numpy(scale), multipliers, bias, residual, case.bits, case.four_level,
            case.group_size, case.n, case.mode, case.clip,
            None if act_scale is None else torch.tensor([act_scale]), case.activation, case.dtype, backend,
        )  # fmt: skip
        assert got.dtype == case.dtype
        assert_equal(got, wanted, f"{backend} {case}", may_be_zero=case.m * case.n < 8)
        results.append(got)
    return results


def main() -> None:
    seen, cases = hashlib.sha256(), grids.gemm_cases()
    for case in cases:
        (got,) = assert_qlinear(case, ["cpu"])
        seen.update(torch.where(got.isnan(), float("nan"), got).contiguous().view(torch.uint8).numpy().tobytes())
    print(json.dumps({"isa": native.native().cpu_isa(), "cases": len(cases), "digest": seen.hexdigest()}))


if __name__ == "__main__":
    main()
