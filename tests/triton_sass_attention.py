"""Compiles the attention kernels for named architectures, as triton_sass.py does for the others, and counts.

test_triton_compile_attention.py holds the budgets. By hand: `python tests/triton_sass_attention.py 80 90`.
"""

import json
import os
import sys

from triton_sass import compiled, counts

from dqkernels.kernels import attention, attention_backward, attention_decode, kv_cache, tiles


def strided(name, kind, rows):
    """Signature and constants of a mask or bias pointer and its strides; `rows`: it differs between queries."""
    letter = name[0]
    strides = [f"stride_{letter}{axis}" for axis in "bhqk"]
    if kind is None:
        return {}, dict.fromkeys(strides, 0)
    signature = {name: kind, strides[0]: "i32", strides[1]: "i32"} | ({strides[2]: "i32"} if rows else {})
    return signature, {strides[3]: 1} | ({} if rows else {strides[2]: 0})


def attention_kernel(capability, dim, tile, causal=False, mask=None, bias=None, dtype="*fp16"):
    """mask, bias: None, "keys" (one row for all queries) or "pairs"."""
    signature = {"q_ptr": "*i8", "q_scale_ptr": "*fp32", "k_ptr": "*i8", "k_scale_ptr": "*fp32", "v_ptr": "*i8",
                 "v_scale_ptr": "*fp32", "out_ptr": dtype}  # fmt: skip
    signature |= dict.fromkeys(("heads", "queries", "keys", "padded_q", "padded", "head_dim"), "i32")
    constants = {"CAUSAL": causal, "MASK_ROWS": mask == "pairs", "BIAS_ROWS": bias == "pairs", "DIM": dim,
                 "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "USE_ASM": True}  # fmt: skip
    for name, kind, rows in (
        ("mask_ptr", mask and "*u8", mask == "pairs"),
        ("bias_ptr", bias and dtype, bias == "pairs"),
    ):
        more, fixed = strided(name, kind, rows)
        signature, constants = signature | more, constants | fixed
    unaligned = {
        "heads",
        "queries",
        "keys",
        "stride_mb",
        "stride_mh",
        "stride_mq",
        "stride_bb",
        "stride_bh",
        "stride_bq",
    }
    kernel = attention._attention_kernel
    return compiled(kernel, signature, constants, unaligned, tile.num_warps, tile.num_stages, capability)


def decode_kernel(capability, dim, source=None, bias=False, dtype="*fp16"):
    """head_dim equal to `dim`; a causal step. source: None, "beams" that share caches, or "keys", a cache for each."""
    signature = {"q_ptr": dtype, "k_ptr": "*i8", "k_scale_ptr": "*fp32", "v_ptr": "*i8", "v_scale_ptr": "*fp32",
                 "lengths_ptr": "*i32", "out_ptr": dtype, "softmax_scale": "fp32", "clip": "fp32"}  # fmt: skip
    numbers = ("rows", "heads", "queries", "caches", "capacity", "head_dim", "stride_qb", "stride_qh", "stride_qt")
    signature |= dict.fromkeys(numbers, "i32")
    if source:
        signature["source_ptr"] = "*i32"
    more, fixed = strided("bias_ptr", dtype if bias else None, True)
    constants = fixed | {"BY_KEY": source == "keys", "CAUSAL": True, "EVEN_DIM": True, "DIM": dim, "USE_ASM": True,
                         "SLOTS": attention_decode.SLOTS, "BLOCK_N": attention_decode.BLOCK_N}  # fmt: skip
    unaligned = {"softmax_scale", "clip", "rows", "heads", "queries", "caches", "capacity", "stride_bb", "stride_bh"}
    return compiled(
        attention_decode._decode_kernel, signature | more, constants, unaligned | {"stride_bq"},
        attention_decode.NUM_WARPS, attention_decode.NUM_STAGES, capability,
    )  # fmt: skip


def quantize_kernel(capability, dim, transpose, per_tensor=False, dtype="*fp16"):
    signature = {"x_ptr": dtype, "q_ptr": "*i8", "scale_ptr": "*fp32", "factor": "fp32", "clip": "fp32"}
    numbers = ("heads", "count", "padded", "head_dim", "stride_b", "stride_h", "stride_t")
    signature |= dict.fromkeys(numbers, "i32") | ({"amax_bits_ptr": "*i32"} if per_tensor else {})
    constants = {"TRANSPOSE": transpose, "DIM": dim, "BLOCK": 64}
    return compiled(
        attention._quantize_tokens_kernel, signature, constants, {"factor", "clip", "heads", "count"}, 4, 3, capability
    )


def write_kernel(capability, dim, position=True, dtype="*fp16"):
    """K and V into their caches: one token at a position, or a whole cache under `per_tensor`."""
    signature = dict.fromkeys(("k_ptr", "v_ptr"), dtype) | dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*i8")
    signature |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32") | {"clip": "fp32"}
    signature |= {"position_ptr": "*i32"} if position else dict.fromkeys(("k_amax_bits_ptr", "v_amax_bits_ptr"), "*i32")
    numbers = ("count", "heads", "tokens", "capacity", "head_dim")
    signature |= dict.fromkeys((*numbers, *(f"stride_{x}{axis}" for x in "kv" for axis in "bht")), "i32")
    constants = {"DIM": dim, "BLOCK": kv_cache.BLOCK}
    return compiled(
        kv_cache._write_kernel, signature, constants, {"clip", "count", "heads", "tokens", "capacity"}, 4, 3, capability
    )


def backward_kernel(capability, which, dim, dtype, causal=False, mask=None, bias=None, clip=False, tile=None):
    """`which`: "query" (dQ, and dS where there is a bias per pair) or "key" (dK and dV)."""
    kernel = {"query": attention_backward._grad_query_kernel, "key": attention_backward._grad_key_kernel}[which]
    size, pairs = 4 if dtype == "*fp32" else 2, "pairs" in (mask, bias)
    tile = tile or tiles.attention_grad_tiles(dim, size, pairs)[which == "key"]
    signature = {"g_ptr": dtype, "stats_ptr": "*fp32"}
    signature |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*i8")
    signature |= dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    numbers = ("heads", "queries", "keys", "head_dim", "stride_gb", "stride_gh", "stride_gt")
    signature |= dict.fromkeys(numbers, "i32")
    if which == "query":
        signature |= {"out_ptr": dtype, "softmax_scale": "fp32"}
        signature |= {"passed_ptr": "*u8"} if clip else {}
        signature |= {"ds_ptr": "*fp32"} if bias == "pairs" else {}
    else:
        signature |= {"dk_ptr": dtype, "dv_ptr": dtype}
        signature |= {"k_passed_ptr": "*u8", "v_passed_ptr": "*u8"} if clip else {}
    constants = {"CAUSAL": causal, "MASK_ROWS": mask == "pairs", "BIAS_ROWS": bias == "pairs", "DIM": dim,
                 "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "USE_ASM": True}  # fmt: skip
    unaligned = {"softmax_scale", "heads", "queries", "keys"}
    for name, kind, rows in (
        ("mask_ptr", mask and "*u8", mask == "pairs"),
        ("bias_ptr", bias and dtype, bias == "pairs"),
    ):
        more, fixed = strided(name, kind, rows)
        signature, constants = signature | more, constants | fixed
        unaligned |= {stride for stride in more if stride.startswith("stride")}
    return compiled(kernel, signature, constants, unaligned, tile.num_warps, tile.num_stages, capability)


#: (causal, mask, bias): BART's encoder and decoder, T5's decoder, and a mask per pair
VARIANTS = ((False, "keys", None), (True, None, None), (True, "keys", "pairs"), (False, "pairs", None))


#: (dim, gradient's type, variant) of both backward kernels: every tile of the table; elsewhere than on sm_80 and sm_90
#: the first four.
BACKWARD = (
    (64, "*fp16", VARIANTS[2]), (128, "*fp16", VARIANTS[2]), (64, "*fp32", VARIANTS[2]), (64, "*fp16", VARIANTS[3]),
    (32, "*fp16", VARIANTS[2]), (64, "*fp16", VARIANTS[0]), (64, "*bf16", VARIANTS[1]), (128, "*fp16", VARIANTS[3]),
    (128, "*fp32", VARIANTS[3]),
)  # fmt: skip


def backward_kernels(capability):
    """(name, counts) of the two backward kernels, with a clip's mask where there is a mask or bias per pair."""
    for dim, dtype, (causal, mask, bias) in BACKWARD if capability in (80, 90) else BACKWARD[:4]:
        for which in ("query", "key"):
            kernel = backward_kernel(capability, which, dim, dtype, causal, mask, bias, "pairs" in (mask, bias))
            words = f"{'causal' if causal else 'whole'} mask-{mask} bias-{bias}"
            yield f"backward sm_{capability} {dim} {dtype[1:]} {which} {words}", {"dim": dim, **counts(kernel)}


def every_kernel(capabilities):
    """(name, counts): each tile on sm_80 and sm_90 with the masks dealt around, a sample elsewhere."""
    for capability in capabilities:
        main_line = capability in (80, 90)
        for dim in (64, 128):
            for i, queries in enumerate((16, 64, 1024)):
                for j, (causal, mask, bias) in enumerate(VARIANTS):
                    dealt = queries == 1024 or j == (i + dim // 64) % 3
                    if not (dealt if main_line else (queries, j) == (64, 1)):
                        continue
                    tile = attention.attention_tile(queries, "pairs" in (mask, bias))
                    kernel = attention_kernel(capability, dim, tile, causal, mask, bias)
                    words = ["causal" if causal else "whole", f"mask-{mask}", f"bias-{bias}"]
                    name = f"attention sm_{capability} {dim} {'x'.join(map(str, tile))} {' '.join(words)}"
                    yield name, {"dim": dim, "tile": tile, **counts(kernel)}
            for source in (None, "beams", "keys"):
                name = f"decode sm_{capability} {dim} {source or 'own'}"
                yield name, {"dim": dim, **counts(decode_kernel(capability, dim, source, bias=source != "beams"))}
            for position in (True, False):
                name = f"write sm_{capability} {dim} {'token' if position else 'all'}"
                yield name, {"dim": dim, **counts(write_kernel(capability, dim, position))}
        yield from backward_kernels(capability)
        for transpose in (False, True):
            name = f"tokens sm_{capability} 64 {'transposed' if transpose else 'rows'}"
            yield name, {"dim": 64, **counts(quantize_kernel(capability, 64, transpose, per_tensor=transpose))}


def main():
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    for name, found in every_kernel([int(capability) for capability in sys.argv[1:]]):
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()
