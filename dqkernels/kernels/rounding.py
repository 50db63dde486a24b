"""Float steps that must be rounded one by one, spelled so that no compiler and no interpreter merges or drops one.

Importing this file imports Triton; nothing imports it when the package is imported.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add(a, b, USE_ASM: tl.constexpr):
    """a + b, rounded on its own.

    Spelled as an instruction because LLVM pairs plain adds and multiplies into f32x2 on sm_100 and sm_120, and
    ptxas 12.9 (Triton 3.6) then contracts the pairs into FFMA2 in spite of `.rn` and `--fmad=false`.
    """
    if USE_ASM:
        a, b = tl.broadcast(a, b)
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a + b


@triton.jit
def _round_to(t, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """One round-to-nearest-even to `dtype`; spelled out for bf16 in the interpreter, which truncates."""
    if dtype == tl.bfloat16 and not USE_ASM:
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(t == t, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return t.to(dtype)
