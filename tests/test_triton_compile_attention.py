"""The attention kernels as machine code for sm_80, sm_90, sm_100 and sm_120, compiled here without a GPU.

What it guards: two dots per loop body (with one, Triton 3.8 spills int8 fragments on sm_80), probabilities that stay
in their thread between the two products, maxima taken in the layout of the product, and no contraction.
"""

from pathlib import Path

import pytest
from test_triton_compile import SHARED_BYTES, capability, compile_all, each, report


@pytest.fixture(scope="module")
def kernels():
    return compile_all(Path(__file__).with_name("triton_sass_attention.py"), 100)


def test_nothing_spills(kernels):
    report([f"{name}: {found}" for name, found in kernels.items() if found["spills"] or found["stack"]])


def test_both_products_run_on_tensor_cores(kernels):
    """Exactly the multiply instructions of two products in the first loop and two in the second."""
    failures = []
    for name, found in each(kernels, "attention"):
        block_m, block_n, num_warps, _ = found["tile"]
        dim, arch = found["dim"], capability(name)
        if arch == 90 and block_m >= 64:  # wgmma: 64 rows, 32 deep, one of any width
            got, wanted = found["IGMMA"], (3 * dim // 32 + block_n // 32) * block_m * 4 // (64 * num_warps)
        elif arch == 100:  # tcgen05 from Triton 3.8 on, mma.sync before
            got = found["UTCIMMA"] + found["IMMA"]
            wanted = max(got, 4)
        else:
            got, wanted = found["IMMA"], 4 * block_m * block_n * dim // (16 * 8 * 32 * num_warps)
        if got != wanted:
            failures.append(f"{name}: {got} instead of {wanted} multiply instructions")
    for name, found in each(kernels, "decode"):
        wanted = 3 * 16 * 32 * found["dim"] // (16 * 8 * 32 * 4)
        if found["IMMA"] != wanted:
            failures.append(f"{name}: {found['IMMA']} instead of {wanted} multiply instructions")
    report(failures)


def test_backward_products_run_on_tensor_cores(kernels):
    """The scores on integer ones for every type of gradient; the float products on those of 16 bits, where it has 16.

    Each warp takes its part: no product is done twice, but in the small tiles of fp32.
    """
    failures = []
    for name, found in each(kernels, "backward"):
        scores = found["IMMA"] + found["IGMMA"] + found["UTCIMMA"]
        products = found["HMMA"] + found["HGMMA"] + found["UTCHMMA"]
        if not scores or (products == 0) != ("fp32" in name.split()):
            failures.append(f"{name}: {scores} integer and {products} float matrix instructions")
        if capability(name) == 80 and "64 fp16 key" in name:  # dV, dP, and two parts of dS
            wanted = 4 * 32 * 32 * 64 // (16 * 8 * 16 * 4)
            if products != wanted or scores != 32 * 32 * 64 // (16 * 8 * 32 * 4):
                failures.append(f"{name}: {products} instead of {wanted} float products, {scores} of scores")
    report(failures)


def test_only_row_maxima_and_sums_cross_threads(kernels):
    """Tiles of 64 and more rows: three reductions in two steps for each half and row of a thread, and no others."""
    report(
        [
            f"{name}: {found['SHFL']} SHFL"
            for name, found in each(kernels, "attention")
            if found["tile"][0] >= 64 and capability(name) in (80, 90) and found["SHFL"] > 56
        ]
    )


def test_nothing_is_contracted(kernels):
    """No fused multiply-add but those of the divisions, and none of the paired form that ptxas makes on Blackwell."""
    report(
        [
            f"{name}: {found}"
            for name, found in kernels.items()
            if "fp32" not in name.split()  # the products of fp32 gradients are sums of FMAs
            if found["ptx_fma"] or found["FFMA2"] or found["ptx_div_fast"] or not found["ptx_div_rn"]
        ]
    )


def test_shared_memory_fits_the_smallest_part(kernels):
    report(
        [
            f"{name}: {found['shared']} bytes"
            for name, found in kernels.items()
            if found["shared"] > SHARED_BYTES[capability(name)]
        ]
    )
