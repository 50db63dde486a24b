"""The row kernels as machine code, like triton_sass.py. test_triton_compile_rows.py holds the budgets.

By hand: `python tests/triton_sass_rows.py 80 90` prints one line per kernel.
"""

import json
import os
import sys

from triton_sass import compiled, counts

from dqkernels import qmath
from dqkernels.kernels import embedding, norm, quantize, weight, weight_step

_QUANTIZED = {"q_ptr": "*i8", "scale_ptr": "*fp32", "row_sum_ptr": "*i32"}
_FLOATS = {"eps", "clip", "length", "embed_scale", "mult_limit"}
MODES = quantize._MODES


def _row_kernel(kernel, capability, signature, constants, mode, collects, k):
    """A kernel of norm.py for rows of k; `collects`: the launch that takes the tensor's maximum."""
    if not collects:
        signature |= _QUANTIZED
    if mode == "per_tensor":
        signature["amax_bits_ptr"] = "*i32"
    elif mode == "static":
        signature["act_scale_ptr"] = "*fp32"
    signature |= {"clip": "fp32", "k": "i32", "stride_x": "i32"}
    shape = quantize.launch_shape(k)
    constants |= {"BLOCK": shape["BLOCK"], "ONE_BLOCK": shape["ONE_BLOCK"], "USE_ASM": True}
    # The maximum's launch leaves what the codes would need unread, so that it is never None there but unused here.
    return compiled(kernel, signature, constants, _FLOATS, shape["num_warps"], 3, capability)


def layernorm_kernel(capability, dtype, mode, k, residual=True, bias=True):
    signature = {"x_ptr": dtype, "weight_ptr": dtype, "y_ptr": dtype, "eps": "fp32", "length": "fp32"}
    signature |= {"stride_residual": "i32"}
    if residual:
        signature["residual_ptr"] = dtype
    if bias:
        signature["bias_ptr"] = dtype
    return _row_kernel(
        norm._layernorm_kernel, capability, signature, {"MODE": MODES[mode]}, mode, mode == "per_tensor", k
    )


def gelu_kernel(capability, dtype, mode, k, collects=False):
    constants = {"MODE": 0 if collects else MODES[mode], "AMAX_ONLY": collects}
    return _row_kernel(norm._gelu_kernel, capability, {"x_ptr": dtype}, constants, mode, collects, k)


def gather_kernel(capability, bits, out, k, position=None, four_level=False, group_size=-1, whole=False):
    signature = {"qweight_ptr": "*u8", "weight_scale_ptr": "*fp32", "out_ptr": out, "embed_scale": "fp32"}
    signature |= dict.fromkeys(("rows", "table_rows", "row_bytes", "k", "groups", "position_rows"), "i32")
    if not whole:
        signature["ids_ptr"] = "*i64"
    if position:
        signature["position_ptr"] = position
    if group_size != -1:
        signature["mult_ptr"] = "*u8"
    constants = {"BITS": bits, "FOUR_LEVEL": four_level, "TENSOR_SCALE": False, "GROUP": group_size, "USE_ASM": True}
    constants |= embedding.tile(k * bits // 8)
    unaligned = _FLOATS | {"rows", "table_rows", "groups", "position_rows"}
    return compiled(embedding._gather_kernel, signature, constants, unaligned, 4, 3, capability)


def weight_kernel(capability, bits, dtype, k, group_size=-1, per_tensor=False):
    signature = {"w_ptr": dtype, "q_ptr": "*u8", "scale_ptr": "*fp32", "clip": "fp32", "mult_limit": "fp32"}
    signature |= dict.fromkeys(("n", "k", "stride_w", "row_bytes", "groups"), "i32")
    if group_size != -1:
        signature["mult_ptr"] = "*u8"
    if per_tensor:
        signature["amax_bits_ptr"] = "*i32"
    shape = weight.launch_shape(k)
    constants = {"BITS": bits, "GROUP": group_size, "BLOCK": shape["BLOCK"]}
    unaligned = _FLOATS | {"n", "groups"}
    return compiled(weight._absmax_kernel, signature, constants, unaligned, shape["num_warps"], 3, capability)


def rule_kernel(capability, which, quantizer, bits, dtype, k, group_size=64):
    """A kernel of the weight rules that sum: `rule` has a scale per row, `steps` and `codes` are the two of groups,
    `total`, `parts` and `tensor` those of a whole matrix."""
    kernel = {
        "rule": weight._row_kernel,
        "steps": weight._group_step_kernel,
        "codes": weight._group_codes_kernel,
        "total": weight._tensor_total_kernel,
        "parts": weight._tensor_parts_kernel,
        "tensor": weight._tensor_codes_kernel,
    }[which]
    types = dict.fromkeys(("n", "k", "stride_w", "row_bytes", "groups"), "i32")
    types |= {"w_ptr": dtype, "q_ptr": "*u8", "mult_ptr": "*u8", "sums_ptr": "*i64", "clip": "fp32"}
    types |= {"mult_limit": "fp32", "scale_ptr": "*fp32", "step_ptr": "*fp32", "threshold_ptr": "*fp32"}
    if quantizer != "ternary":
        del types["threshold_ptr"]
    shape = weight.launch_shape(k)
    constants = {"RULE": weight.RULES[quantizer], "BITS": bits, "LEVELS": float(qmath.quant_max(bits, quantizer))}
    constants |= {"CANDIDATES": weight._CANDIDATES[quantizer], "SHIFT": 6, "GROUP": group_size, "BLOCK": shape["BLOCK"]}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return compiled(kernel, signature, constants, _FLOATS | {"n", "groups"}, shape["num_warps"], 3, capability)


def learned_kernel(capability, quantizer, bits, dtype, k, per_tensor=False):
    signature = {"w_ptr": dtype, "step_ptr": "*fp32", "q_ptr": "*u8", "scale_ptr": "*fp32", "clip": "fp32"}
    signature |= dict.fromkeys(("n", "k", "stride_w", "row_bytes"), "i32")
    if per_tensor:
        signature["amax_bits_ptr"] = "*i32"
    shape = weight.launch_shape(k)
    constants = {"RULE": weight.RULES[quantizer], "BITS": bits, "LEVELS": float(qmath.quant_max(bits, quantizer))}
    constants |= {"PER_TENSOR": per_tensor, "BLOCK": shape["BLOCK"]}
    kernel, unaligned = weight_step._by_step_kernel, _FLOATS | {"n"}
    return compiled(kernel, signature, constants, unaligned, shape["num_warps"], 3, capability)


# name: (function, its keywords); the name's first word is the kind of kernel. The first of each kind is compiled for
# every capability, the rest for sm_80 and sm_90.
CASES = {
    "layernorm fp16 per_token 1024": (layernorm_kernel, {"dtype": "*fp16", "mode": "per_token", "k": 1024}),
    "layernorm fp32 static 8192": (layernorm_kernel, {"dtype": "*fp32", "mode": "static", "k": 8192}),
    "layernorm bf16 per_token 65536": (layernorm_kernel, {"dtype": "*bf16", "mode": "per_token", "k": 65536}),
    "layernorm fp16 per_tensor 768": (
        layernorm_kernel,
        {"dtype": "*fp16", "mode": "per_tensor", "k": 768, "residual": False, "bias": False},
    ),
    "gelu fp16 per_token 4096": (gelu_kernel, {"dtype": "*fp16", "mode": "per_token", "k": 4096}),
    "gelu fp32 static 8192": (gelu_kernel, {"dtype": "*fp32", "mode": "static", "k": 8192}),
    "gelu bf16 per_token 65536": (gelu_kernel, {"dtype": "*bf16", "mode": "per_token", "k": 65536}),
    "gelu fp16 per_tensor 3072": (gelu_kernel, {"dtype": "*fp16", "mode": "per_tensor", "k": 3072}),
    "gelu fp16 collects 3072": (gelu_kernel, {"dtype": "*fp16", "mode": "per_tensor", "k": 3072, "collects": True}),
    "gather W8 fp16 1024": (gather_kernel, {"bits": 8, "out": "*fp16", "k": 1024, "position": "*fp16"}),
    "gather W4 bf16 1024": (gather_kernel, {"bits": 4, "out": "*bf16", "k": 1024, "position": "*bf16"}),
    "gather W2 fp32 768": (
        gather_kernel,
        {"bits": 2, "out": "*fp32", "k": 768, "position": "*fp32", "four_level": True, "group_size": 64},
    ),
    "gather W4 fp32 16384": (gather_kernel, {"bits": 4, "out": "*fp32", "k": 16384, "group_size": 128, "whole": True}),
    "weight W4 fp32 1024": (weight_kernel, {"bits": 4, "dtype": "*fp32", "k": 1024}),
    "weight W8 bf16 4096": (weight_kernel, {"bits": 8, "dtype": "*bf16", "k": 4096}),
    "weight W4 fp32 4096 groups": (weight_kernel, {"bits": 4, "dtype": "*fp32", "k": 4096, "group_size": 64}),
    "weight W8 fp32 1024 per_tensor": (weight_kernel, {"bits": 8, "dtype": "*fp32", "k": 1024, "per_tensor": True}),
    "learned four_level W2 fp32 1024": (
        learned_kernel,
        {"quantizer": "four_level", "bits": 2, "dtype": "*fp32", "k": 1024},
    ),
    "learned mse W4 bf16 4096": (learned_kernel, {"quantizer": "mse", "bits": 4, "dtype": "*bf16", "k": 4096}),
    "learned mse W8 fp32 768": (learned_kernel, {"quantizer": "mse", "bits": 8, "dtype": "*fp32", "k": 768}),
    "learned ternary W2 fp32 4096 per_tensor": (
        learned_kernel,
        {"quantizer": "ternary", "bits": 2, "dtype": "*fp32", "k": 4096, "per_tensor": True},
    ),
    **{
        f"{which} {quantizer} W{bits} {dtype[1:]} {k}": (
            rule_kernel,
            {"which": which, "quantizer": quantizer, "bits": bits, "dtype": dtype, "k": k},
        )
        for which, quantizer, bits, dtype, k in (
            ("rule", "four_level", 2, "*fp32", 1024),
            ("rule", "mse", 4, "*bf16", 4096),
            ("rule", "mse", 8, "*fp32", 768),
            ("rule", "ternary", 2, "*fp32", 1024),
            ("steps", "mse", 4, "*fp32", 1024),
            ("steps", "four_level", 2, "*bf16", 4096),
            ("steps", "ternary", 2, "*fp32", 1024),
            ("codes", "ternary", 2, "*fp32", 1024),
            ("codes", "four_level", 2, "*fp32", 4096),
            ("codes", "mse", 4, "*bf16", 1024),
            ("total", "four_level", 2, "*fp32", 1024),
            ("parts", "mse", 8, "*fp32", 1024),
            ("parts", "four_level", 2, "*fp32", 4096),
            ("parts", "ternary", 2, "*bf16", 1024),
            ("tensor", "four_level", 2, "*fp32", 1024),
            ("tensor", "mse", 8, "*fp32", 1024),
            ("tensor", "ternary", 2, "*fp32", 1024),
        )
    },
}


def every_kernel(capabilities):
    """(name, counts and keywords) of the cases of each capability."""
    for capability in capabilities:
        kinds = set()
        for name, (build, keywords) in CASES.items():
            kind = name.split()[0]
            if kind not in kinds or capability in (80, 90):
                yield f"sm_{capability} {name}", keywords | counts(build(capability, **keywords))
            kinds.add(kind)


def main():
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    for name, found in every_kernel([int(capability) for capability in sys.argv[1:]]):
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
