"""One-launch kernels around the helpers of dqkernels.kernels, so that tests can call a helper by itself."""

import triton
import triton.language as tl

from dqkernels.kernels.gemm import _top_bits


@triton.jit
def unpack_kernel(packed_ptr, out_ptr, PLANE: tl.constexpr, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, _top_bits(tl.load(packed_ptr + at), PLANE, BITS, USE_ASM))
