"""What the other implementations say of the skinny GEMM's cases; prints one line of JSON.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/sim/skinny_others.py PART PARTS

The Triton kernels in their interpreter on every case, and the native quantizer on every case with a float input. The
variable must be set before Triton is imported, so this is a program of its own (test_skinny_others.py starts it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness  # noqa: E402
import skinny_cases as skinny  # noqa: E402
import torch  # noqa: E402

from dqkernels.backends import triton  # noqa: E402
from dqkernels.kernels import native  # noqa: E402


def native_difference(built) -> str | None:
    """Codes and scales of the native quantizer, from the rows as they lie in memory."""
    case = built.case
    x = torch.as_strided(built.memory, (case.m, case.k), (built.stride, 1))
    q, scale, _ = native.quantize_rows(x, case.mode, case.clip, built.act_scale)
    return harness.difference(q.numpy(), built.q.numpy()) or harness.difference(
        scale.numpy(), built.scale.expand(case.m).numpy()
    )


def triton_difference(built) -> str | None:
    """The results of every part; int8 ones are made of fp32 ones, as eager's are."""
    case = built.case
    bits, rule, group = case.form
    for number, (part, expected) in enumerate(zip(built.parts, built.expected, strict=True)):
        options = {
            **{"bits": bits, "four_level": rule == "four_level", "group_size": group or -1, "out_features": part.n},
            **{"activation": case.activation, "out_dtype": skinny.DTYPES.get(case.y, torch.float32)},
        }
        operands = (part.weight.packed, part.weight.scale, part.weight.mult, part.bias, part.residual)
        if case.x == "int8":
            q = torch.as_strided(built.memory, (case.m, case.k), (built.stride, 1))
            got = triton.qgemm(q, built.scale, None, *operands, **options)
        else:
            x = torch.as_strided(built.memory, (case.m, case.k), (built.stride, 1))
            mode = {"act_mode": case.mode, "act_clip": case.clip, "act_scale": built.act_scale}
            got = triton.qlinear(x, *operands, **options, **mode)
        got = got if built.out_scale is None else skinny.coded(got, built.out_scale)
        said = harness.difference(skinny.raw(got), skinny.raw(expected))
        if said is not None:
            return f"part {number}: {said}"
    return None


def run(part: int, parts: int) -> dict:
    """Every `parts`-th case from `part` on; cases of each implementation, and what differs."""
    figures = {"cases": 0, "triton": 0, "native": 0, "failures": []}
    for case in skinny.cases()[part::parts]:
        built = skinny.build(case)
        checks = {"triton": triton_difference}
        if case.x != "int8" and native.native() is not None:
            checks["native"] = native_difference
        figures["cases"] += 1
        for name, check in checks.items():
            figures[name] += 1
            said = check(built)
            if said is not None:
                figures["failures"].append(f"{name}, {case.name}: {said}")
    return figures


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
