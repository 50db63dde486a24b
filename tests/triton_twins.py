"""One-launch kernels around the helpers of dqkernels.kernels, so that tests can call a helper by itself."""

import triton
import triton.language as tl

from dqkernels.kernels.gemm import _top_bits
from dqkernels.kernels.norm import _load_gelu


@triton.jit
def unpack_kernel(packed_ptr, out_ptr, PLANE: tl.constexpr, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, _top_bits(tl.load(packed_ptr + at), PLANE, BITS, USE_ASM))


@triton.jit
def gelu_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, USE_ASM: tl.constexpr):
    """The GELU that gelu_quantize quantizes and never stores."""
    offset = tl.program_id(0) * BLOCK
    at = offset + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _load_gelu(x_ptr, offset, n, BLOCK, USE_ASM).to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    """y = x, with the load's or the store's mask left out on request: what the guard pages must notice."""
    at = tl.arange(0, BLOCK)
    if MASK_LOAD:
        x = tl.load(x_ptr + at, mask=at < n, other=0)
    else:
        x = tl.load(x_ptr + at)
    if MASK_STORE:
        tl.store(y_ptr + at, x, mask=at < n)
    else:
        tl.store(y_ptr + at, x)
