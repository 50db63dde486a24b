"""The shipped Triton kernels as machine code for sm_80, sm_90, sm_100 and sm_120, compiled here without a GPU.

What it guards: Triton 3.8 spills int8 fragments on sm_80 where a loop body holds one dot; the compiler widens
bytes where the unpacking is spelled in plain operators; ptxas 12.9 contracts paired multiplies and adds on
Blackwell. The interpreter sees none of this, and only the last one changes a result.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # sm_80's own 163 KB, but sm_86 has 99


def compile_all(tool, least):
    """{name: counts} of every kernel that the script `tool` names, from two compiling processes."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tool.parents[1]), env.get("PYTHONPATH")]))
    # CI compiles with the oldest Triton as well, for the three that must not spill there.
    wanted = os.environ.get("TEST_SASS_ARCHS", "80 90 100 120").split()
    runs = [
        subprocess.Popen([sys.executable, tool, *capabilities], env=env, stdout=subprocess.PIPE, text=True)
        for capabilities in (wanted[::2], wanted[1::2])
    ]
    try:
        lines = [line for run in runs for line in run.communicate(timeout=1800)[0].splitlines()]
    finally:
        for run in runs:
            run.kill()
    assert not any(run.returncode for run in runs), "compiling failed, see the captured stderr"
    found = dict(json.loads(line) for line in lines)
    assert len(found) >= least * len(wanted) // 4
    return found


@pytest.fixture(scope="module")
def kernels():
    return compile_all(Path(__file__).with_name("triton_sass.py"), 100)


def each(kernels, *words):
    """Kernels whose name holds every word; all failures in one message, not the first."""
    chosen = {name: found for name, found in kernels.items() if all(word in name.split() for word in words)}
    assert chosen, f"no kernel is named {words}"
    return chosen.items()


def report(failures):
    assert not failures, "\n".join(failures)


def capability(name):
    return int(name.split("sm_")[1].split()[0])


def outputs(found):
    """Elements of Y per thread."""
    block_m, block_n, _, num_warps, _ = found["tile"]
    return block_m * block_n // (32 * num_warps)


def test_nothing_spills(kernels):
    report([f"{name}: {found}" for name, found in kernels.items() if found["spills"] or found["stack"]])


def test_tensor_cores_do_the_work_once(kernels):
    """Exactly the multiply instructions that the tile needs: none missing, no warp repeating another's."""
    failures = []
    for name, found in each(kernels, "gemm"):
        block_m, block_n, block_k, num_warps, _ = found["tile"]
        if capability(name) in (80, 120):
            got, wanted = found["IMMA"], block_m * block_n * block_k // (16 * 8 * 32 * num_warps)
        elif capability(name) == 90:
            got, wanted = found["IGMMA"], block_k // 32 * block_n // (16 * num_warps)
        else:  # tcgen05 from Triton 3.8 on, mma.sync before
            got = found["UTCIMMA"] + found["IMMA"]
            wanted = max(got, 1)
        if got != wanted:
            failures.append(f"{name}: {got} instead of {wanted} multiply instructions")
    report(failures)


def test_unpacking_permutes_no_bytes(kernels):
    """With an fp32 output no PRMT is left but one or two of address arithmetic; half outputs pack two per PRMT."""
    budget = {
        "full": lambda found: 2,
        "half": lambda found: outputs(found) * 5 // 8 + 2,
        "int8": lambda found: outputs(found) * 2,
    }
    report(
        [
            f"{name}: {found['PRMT']} PRMT"
            for name, found in each(kernels, "gemm")
            if found["epilogue"] in budget and found["PRMT"] > budget[found["epilogue"]](found)
        ]
    )


def test_unpacking_costs_a_shift_and_a_mask(kernels):
    """At most one LOP3 per 4 codes unpacked (W2, W4), beside the few of addresses and the epilogue."""
    failures = []
    for name, found in each(kernels, "gemm", "half"):
        _, block_n, block_k, num_warps, _ = found["tile"]
        words = block_n * block_k // (4 * 32 * num_warps) if found["bits"] < 8 else 0
        if found["LOP3"] > words + outputs(found) + 64 and capability(name) in (80, 90):
            failures.append(f"{name}: {found['LOP3']} LOP3 for {words} words")
    report(failures)


def test_epilogue_is_not_contracted(kernels):
    """Two multiplies per output, one add for the bias and one for the residual, and no fused one."""
    failures = []
    for name, found in each(kernels, "gemm"):
        adds = {"half": 1, "full": 2}.get(found["epilogue"])
        if adds is None:
            continue  # erf is made of FMAs; its own test holds int8
        per_output = [found[op] / outputs(found) for op in ("FMUL", "FADD", "FFMA")]
        if per_output != [2, adds, 0] or found["ptx_fma"]:
            failures.append(f"{name}: FMUL, FADD, FFMA per output {per_output}, not {[2, adds, 0]}")
    report(failures)


def test_splits_hand_over_in_order(kernels):
    """The interpreter runs one block after another, so a missing barrier would show on a GPU only, and rarely."""
    report([name for name, found in each(kernels, "gemm") if found["handed_over"] != ("split" in name.split())])


def test_int8_output_is_rounded_as_specified(kernels):
    """Three multiplies and two adds per output (bias, magic number); FMAs only in the one IEEE quotient per block."""
    failures = []
    for name, found in each(kernels, "gemm", "int8"):
        n = outputs(found)
        fine = found["FMUL"] == 3 * n and 0 <= found["FADD"] - 2 * n <= 4 and found["FFMA"] <= 16
        if not (fine and found["ptx_div_rn"] == 1 and found["ptx_magic"] and not found["ptx_fma"]):
            failures.append(f"{name}: {found}")
    report(failures)


def test_backward_products_run_on_tensor_cores(kernels):
    """In 16 bits; fp32 gradients keep their bits and have no tensor core."""
    failures = []
    for name, found in each(kernels, "backward"):
        products = found["HMMA"] + found["HGMMA"] + found["UTCHMMA"]
        if (products == 0) != ("fp32" in name.split()):
            failures.append(f"{name}: {products} matrix instructions")
    report(failures)


def test_quantizer_rounds_as_specified(kernels):
    """IEEE quotients once per row, one multiply per code on its own, and the magic number added by an fp32 add."""
    failures = []
    for name, found in each(kernels, "quantize"):
        mode, k = name.split()[3], int(name.split()[4])
        block = 1 << (k - 1).bit_length() if k <= 8192 else 4096
        codes = block // (32 * (4 if block <= 2048 else 8))
        quotients = 1 if mode == "static" else 2
        fine = (
            found["FMUL"] == codes
            and found["FADD"] >= codes
            and found["ptx_div_rn"] == quotients
            and not (found["ptx_fma"] or found["ptx_div_fast"] or found["ptx_ftz"])
            and found["ptx_magic"]
        )
        if not fine:
            failures.append(f"{name}: {found}")
    report(failures)


def test_shared_memory_fits_the_smallest_part(kernels):
    report(
        [
            f"{name}: {found['shared']} bytes"
            for name, found in kernels.items()
            if found["shared"] > SHARED_BYTES[capability(name)]
        ]
    )


def test_tiles_store_16_bytes_at_a_time(kernels):
    """The transposed tile leaves through shared memory, coalesced."""
    report([name for name, found in each(kernels, "gemm") if not found["wide_stores"]])
