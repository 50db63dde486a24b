"""Compiles the shipped Triton kernels for GPUs that need not be there, and counts what the machine code holds.

Uses the ptxas, cuobjdump and nvdisasm inside Triton's wheel. test_triton_compile.py holds the budgets. By hand:
`python tests/triton_sass.py 80 90` prints one line per kernel.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dqkernels.kernels import backward, gemm, quantize, tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# name: (output, bias, residual, activation, K a multiple of BLOCK_K)
EPILOGUES = {
    "half": ("*fp16", "*fp16", None, 0, True),
    "full": ("*fp32", "*fp32", "*fp32", 1, False),
    "gelu": ("*bf16", "*bf16", "*bf16", 2, True),
    "int8": ("*i8", "*fp16", None, 0, True),
}


def compiled(kernel, signature, constants, unaligned, num_warps, num_stages, capability):
    """The kernel as a launch on aligned tensors would compile it; parameters absent from `signature` are None."""
    names = kernel.arg_names
    constants = {name: constants.get(name) for name in names if name not in signature}
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in signature if name not in unaligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def gemm_kernel(capability, bits, four_level, tile, epilogue, group_size=-1, split=False):
    out, bias, residual, activation, even_k = EPILOGUES[epilogue]
    signature = {"x_ptr": "*i8", "act_scale_ptr": "*fp32", "w_ptr": "*u8", "weight_scale_ptr": "*fp32"}
    signature |= {"bias_ptr": bias, "y_ptr": out}
    signature |= dict.fromkeys(("m", "n", "k", "row_bytes", "groups"), "i32")
    if four_level and group_size == -1:
        signature["row_sum_ptr"] = "*i32"
    if residual:
        signature["residual_ptr"] = residual
    if group_size != -1:
        signature["group_mult_ptr"] = "*u8"
    if out == "*i8":
        signature["out_scale_ptr"] = "*fp32"
    if split:
        signature |= {"slab_ptr": "*i32", "counter_ptr": "*i32"}
    constants = {"BITS": bits, "GROUP": group_size, "FOUR_LEVEL": four_level, "TENSOR_SCALE": False,
                 "ACTIVATION": activation, "EVEN_K": even_k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                 "BLOCK_K": tile.block_k, "USE_ASM": True}  # fmt: skip
    unaligned = {"m", "groups"}  # and a launch without groups passes 0
    return compiled(gemm._gemm_kernel, signature, constants, unaligned, tile.num_warps, tile.num_stages, capability)


def quantize_kernel(capability, dtype, mode, k):
    shape = quantize.launch_shape(k)
    signature = {"x_ptr": dtype, "q_ptr": "*i8", "scale_ptr": "*fp32", "row_sum_ptr": "*i32", "clip": "fp32",
                 "k": "i32", "stride_x": "i32"}  # fmt: skip
    extra = {"per_tensor": "amax_bits_ptr", "static": "act_scale_ptr"}.get(mode)
    if extra:
        signature[extra] = "*i32" if mode == "per_tensor" else "*fp32"
    constants = {"MODE": quantize._MODES[mode], "BLOCK": shape["BLOCK"], "ONE_BLOCK": shape["ONE_BLOCK"]}
    return compiled(quantize._quantize_kernel, signature, constants, {"clip"}, shape["num_warps"], 3, capability)


def amax_kernel(capability, dtype, k):
    shape = quantize.launch_shape(k)
    signature = {"x_ptr": dtype, "amax_bits_ptr": "*i32", "m": "i32", "k": "i32", "stride_x": "i32"}
    constants = {"BLOCK": min(shape["BLOCK"], 4096)}
    return compiled(quantize._tensor_amax_kernel, signature, constants, {"m"}, shape["num_warps"], 3, capability)


def handed_over(ptx):
    """Of a split-K kernel: slab stores, a barrier, the acq_rel count, a barrier, loads from L2, in this order."""
    before, count, after = ptx.partition("atom.global.gpu.acq_rel.add")
    stored, barrier = before.rfind("st.global"), before.rfind("bar.sync")
    seen, loaded = after.find("bar.sync"), after.find("ld.global.cg")
    return bool(count) and 0 <= stored < barrier and 0 <= seen < loaded and "atom." not in after


def backward_kernel(capability, which, dtype, bits=8, grouped=False):
    """grad_x from packed weights with a clip mask, or grad_w, of gradients in `dtype`."""
    kernel = {"grad_x": backward._grad_input_kernel, "grad_w": backward._grad_weight_kernel}[which]
    tiles_of = {"grad_x": backward.INPUT_TILE, "grad_w": backward.WEIGHT_TILE}[which]
    constants = backward.blocks(tiles_of[4 if dtype == "*fp32" else 2])
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    signature = {"g_ptr": dtype, "out_ptr": dtype, "m": "i32", "n": "i32", "k": "i32"}
    if which == "grad_w":
        signature |= {"q_ptr": "*i8", "act_scale_ptr": "*fp32"}
    else:
        signature |= {
            "w_ptr": "*u8",
            "weight_scale_ptr": "*fp32",
            "passed_ptr": "*u8",
            "row_bytes": "i32",
            "groups": "i32",
        }
        signature |= {"mult_ptr": "*u8"} if grouped else {}
        constants |= {"BITS": bits, "FOUR_LEVEL": bits == 2, "TENSOR_SCALE": False, "GROUP_SIZE": 64 if grouped else -1}
    return compiled(kernel, signature, constants | {"USE_ASM": True}, {"m"}, num_warps, num_stages, capability)


def counts(kernel):
    """Registers, stack, spills and instruction counts of the machine code, and what the PTX says of rounding."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()

        def read(tool, *flags):
            command = [TOOLS / tool, *flags, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = read("cuobjdump", "--dump-resource-usage")
        code = read("nvdisasm", "-c")
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.M)
    by_name = Counter(opcode.split(".")[0] for opcode in opcodes)
    assert len(opcodes) > 50, "the disassembly was not understood"
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": by_name["STL"] + by_name["LDL"],
        "shared": kernel.metadata.shared,
        **{name: by_name[name] for name in ("IMMA", "IGMMA", "UTCIMMA", "HMMA", "HGMMA", "UTCHMMA", "PRMT", "LOP3")},
        # The packed forms of Blackwell do two.
        "FFMA": by_name["FFMA"] + 2 * by_name["FFMA2"],
        "FMUL": by_name["FMUL"] + 2 * by_name["FMUL2"],
        "FADD": by_name["FADD"] + 2 * by_name["FADD2"],
        "FFMA2": by_name["FFMA2"],
        "SHFL": by_name["SHFL"],
        "wide_stores": sum(opcode.startswith("STG") and opcode.endswith("128") for opcode in opcodes),
        "wide_loads": sum(bool(re.match(r"LDG.*\.(128|256)", opcode)) for opcode in opcodes),
        "narrow_loads": sum(bool(re.match(r"LDG.*\.[US](8|16)\b", opcode)) for opcode in opcodes),
        "narrow_stores": sum(bool(re.match(r"STG.*\.[US](8|16)\b", opcode)) for opcode in opcodes),
        "ptx_fma": len(re.findall(r"\bfma\.", ptx)),
        "ptx_div_rn": len(re.findall(r"\bdiv\.rn\.f32", ptx)),
        "ptx_div_f64": len(re.findall(r"\bdiv\.rn\.f64", ptx)),
        "ptx_atomics": Counter(re.findall(r"\b(?:atom|red)\.[\w.]*?(add\.\w+|max\.\w+)", ptx)),
        "ptx_div_fast": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
        "ptx_ftz": ptx.count(".ftz"),
        "handed_over": handed_over(ptx),
        "ptx_magic": ptx.count("0f4B400000"),
    }


def gemm_variants(capability):
    """(bits, group_size, split, tile, epilogue): on sm_80 and sm_90 every tile of the tables, elsewhere a sample."""
    arch, main_line = "sm90" if capability in (90, 100) else "sm80", capability in (80, 90)
    for bits in (8, 4, 2):
        shipped = list(dict.fromkeys(tiles.table(arch, bits).values()))
        for tile in shipped if main_line else shipped[1:2]:
            for epilogue in ("half", "full", "gelu") if bits == 4 and tile == shipped[-1] else ("half", "full"):
                yield bits, -1, False, tile, epilogue
        yield bits, -1, True, shipped[0], "half"
        if main_line:
            yield bits, -1, True, shipped[3], "full"  # the largest tile that K is split for
            yield bits, -1, False, shipped[2 if bits == 4 else -1], "int8"
    for bits in (4, 2):
        grouped = list(dict.fromkeys(tiles.table(arch, bits, 64).values()))
        for group_size, tile in itertools.product((32, 64, 128), grouped) if main_line else [(64, grouped[1])]:
            yield bits, group_size, False, tile, "full"
        yield bits, 64, True, grouped[1], "half"


def every_kernel(capabilities):
    """(name, counts) of the GEMMs of `gemm_variants` and of the quantizers."""
    for capability in capabilities:
        main_line = capability in (80, 90)
        for bits, group_size, split, tile, epilogue in gemm_variants(capability):
            kernel = gemm_kernel(capability, bits, bits == 2, tile, epilogue, group_size, split)
            words = [f"gemm sm_{capability} W{bits} {'x'.join(map(str, tile))} {epilogue}"]
            words += [f"group{group_size}"] * (group_size != -1) + ["split"] * split
            yield " ".join(words), {"bits": bits, "tile": tile, "epilogue": epilogue, **counts(kernel)}
        cases = [("*fp16", "per_token", 1024), ("*bf16", "per_token", 65536)]
        if capability == 80:
            cases += [("*fp32", "per_token", 8192), ("*fp16", "static", 768), ("*fp16", "per_tensor", 768)]
        for dtype, mode, k in cases if main_line else cases[:1]:
            name = f"quantize sm_{capability} {dtype[1:]} {mode} {k}"
            yield name, counts(quantize_kernel(capability, dtype, mode, k))
        for dtype in ("*bf16", "*fp16", "*fp32") if main_line else ("*bf16",):
            for bits, grouped in ((8, False), (4, True), (2, False)):
                name = f"backward sm_{capability} grad_x {dtype[1:]} W{bits} {'groups' if grouped else 'channels'}"
                yield name, counts(backward_kernel(capability, "grad_x", dtype, bits, grouped))
            yield f"backward sm_{capability} grad_w {dtype[1:]}", counts(backward_kernel(capability, "grad_w", dtype))
        if main_line:
            yield f"amax sm_{capability} fp16 768", counts(amax_kernel(capability, "*fp16", 768))


def main():
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    for name, found in every_kernel([int(capability) for capability in sys.argv[1:]]):
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
