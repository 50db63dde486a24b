"""The Triton row kernels as machine code for sm_80, sm_90, sm_100 and sm_120, compiled here without a GPU.

What it guards: spills where a row is held in registers, narrow memory instructions where rows are aligned, fast
quotients, and multiplies contracted into adds where a result is promised bit for bit.
"""

from pathlib import Path

import pytest
from test_triton_compile import compile_all, each, report

REGISTERS = 128  # two blocks of 8 warps on a multiprocessor
SUM_REGISTERS = 80  # of the weight rules that sum: four warps each, six blocks on a multiprocessor
LEARNED_REGISTERS = 48  # learned steps: four warps each, ten blocks on a multiprocessor
# The weight rules that sum: their kernels, and the means that each takes.
SUMS = {"rule", "steps", "codes", "total", "parts", "tensor"}
MEANS = {kind: {"ternary": 2, "four_level": 1} for kind in ("rule", "steps", "tensor")}
MEANS["parts"] = {"ternary": 1, "four_level": 1}
# kind: IEEE quotients of one launch per mode; LayerNorm has mean, rest, variance and 1 / sqrt besides scale and inv.
QUOTIENTS = {
    "layernorm": {"per_token": 6, "static": 5, "per_tensor": 4},
    "gelu": {"per_token": 2, "static": 1, "per_tensor": 2, "collects": 0},
}


@pytest.fixture(scope="module")
def kernels():
    return compile_all(Path(__file__).with_name("triton_sass_rows.py"), 40)


def registers_of(kind):
    return SUM_REGISTERS if kind in SUMS else LEARNED_REGISTERS if kind == "learned" else REGISTERS


def test_nothing_spills(kernels):
    report(
        [
            f"{name}: {found}"
            for name, found in kernels.items()
            if found["spills"] or found["stack"] or found["registers"] > registers_of(name.split()[1])
        ]
    )


def test_what_is_exact_is_not_contracted(kernels):
    """No fused multiply-add in the PTX (erf is made of them), and none in machine code that holds no quotient."""
    failures = []
    for name, found in kernels.items():
        kind = name.split()[1]
        if (kind != "gelu" and found["ptx_fma"]) or (kind == "gather" and found["FFMA"]):
            failures.append(f"{name}: {found['ptx_fma']} fma in PTX, {found['FFMA']} FFMA")
        if found["ptx_div_fast"] or (kind != "gelu" and found["ptx_ftz"]):
            failures.append(f"{name}: {found['ptx_div_fast']} fast quotients, {found['ptx_ftz']} flushing instructions")
    report(failures)


def test_gather_multiplies_twice_and_adds_once_per_element(kernels):
    """float32(level) * weight_scale, * embed_scale, + position: each an instruction of its own."""
    failures = []
    for name, found in each(kernels, "gather"):
        outputs = 2048 // 128 * 8 // found["bits"]  # 2048 packed bytes on 4 warps
        adds = outputs if "position" in found else 0
        if (found["FMUL"], found["FADD"]) != (2 * outputs, adds):
            failures.append(f"{name}: {found['FMUL']} FMUL, {found['FADD']} FADD for {outputs} outputs")
    report(failures)


def test_quotients_are_ieee(kernels):
    """div.rn, and as many of them as the formulas have: none replaced by a reciprocal."""
    failures = []
    for kind, by_mode in QUOTIENTS.items():
        for name, found in each(kernels, kind):
            wanted = by_mode[name.split()[3]]
            if found["ptx_div_rn"] != wanted:
                failures.append(f"{name}: {found['ptx_div_rn']} quotients, not {wanted}")
    for name, found in each(kernels, "weight"):
        enough = found["ptx_div_rn"] > 3 if "groups" in name else found["ptx_div_rn"] == 2
        if not enough:
            failures.append(f"{name}: {found['ptx_div_rn']} quotients")
    for name, found in each(kernels, "learned"):
        if found["ptx_div_rn"] != ("ternary" not in name):  # 1 / step; ternary compares with half of it
            failures.append(f"{name}: {found['ptx_div_rn']} quotients")
    report(failures)


def test_means_are_ieee_quotients_in_float64(kernels):
    """div.rn.f64, once per mean: ternary takes two, mse none. In `steps` a thread has the means of several groups."""
    failures = []
    for name, found in kernels.items():
        kind, quantizer = name.split()[1:3]
        means = MEANS[kind].get(quantizer, 0) if kind in MEANS else 0
        if found["ptx_div_f64"] < means if kind == "steps" and means else found["ptx_div_f64"] != means:
            failures.append(f"{name}: {found['ptx_div_f64']} float64 quotients, not {means}")
    report(failures)


def test_sums_of_a_matrix_are_integer_atomics(kernels):
    """One 64-bit integer atomic per launch that sums, and no other kernel of the weight rules has any."""
    failures = []
    for name, found in kernels.items():
        if name.split()[1] in SUMS:
            wanted = {"add.u64": 1} if name.split()[1] in ("total", "parts") else {}
            if found["ptx_atomics"] != wanted:
                failures.append(f"{name}: {found['ptx_atomics']}")
    report(failures)


def test_rounding_is_by_the_magic_number(kernels):
    failures = []
    for name, found in kernels.items():
        kind, quantizer = name.split()[1:3]
        if kind in SUMS or kind == "learned":  # multipliers, and the codes of mse
            if bool(found["ptx_magic"]) != (kind == "codes" or quantizer == "mse"):
                failures.append(f"{name}: magic number {found['ptx_magic']} times")
            continue
        quantizes = name.split()[1] != "gather" and "collects" not in name
        if name.split()[1] == "layernorm" and "per_tensor" in name:
            quantizes = False  # that launch takes the maximum
        if bool(found["ptx_magic"]) != quantizes:
            failures.append(f"{name}: magic number {found['ptx_magic']} times")
    report(failures)


def test_aligned_rows_move_16_bytes_at_a_time(kernels):
    """No load of a byte or of 16 bits; codes leave 16 bytes at a time where a thread has that many."""
    failures = []
    for name, found in kernels.items():
        kind = name.split()[1]
        grouped = kind == "gather" and "group_size" in found  # their multipliers are single bytes
        if not found["wide_loads"] or (found["narrow_loads"] and not grouped):
            failures.append(f"{name}: {found['wide_loads']} wide loads, {found['narrow_loads']} narrow ones")
        if kind in ("gather", "layernorm") and not found["wide_stores"]:
            failures.append(f"{name}: no wide store")
        if kind not in SUMS | {"weight", "learned"} and found["narrow_stores"]:
            failures.append(f"{name}: {found['narrow_stores']} narrow stores")
    report(failures)
