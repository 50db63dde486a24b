"""Every file of checks of the Triton kernels: test_kernels_triton.py and test_gpu_triton.py run what is named here."""

import triton_checks
import triton_checks_attention
import triton_checks_attention_backward
import triton_checks_backward
import triton_checks_gemm
import triton_checks_guard
import triton_checks_kv_cache
import triton_checks_packed
import triton_checks_rows
import triton_checks_weight
import triton_grid_ops

FILES = (
    triton_checks,
    triton_checks_gemm,
    triton_checks_rows,
    triton_checks_packed,
    triton_checks_weight,
    triton_checks_attention,
    triton_checks_attention_backward,
    triton_checks_backward,
    triton_checks_kv_cache,
    triton_checks_guard,
    triton_grid_ops,
)
