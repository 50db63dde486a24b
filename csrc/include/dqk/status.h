// Status codes and their sentences. The core never throws, prints or exits: entry points return one of these.
#pragma once
#include <cstdint>

namespace dqk {

enum class Status : int32_t {
    ok = 0,
    bad_bits,
    bad_dtype,
    bad_mode,
    bad_size,
    size_overflow,
    k_too_large,
    bad_clip,
    bad_act_scale,
    code_out_of_range,
    bad_group_size,
    bad_part,
    bad_activation,
    bad_output,
    bad_prologue,
    bad_plan,
    no_workspace,
    bad_attention,
    bad_keys,
    no_memory,
    bad_cpu_part,
    bad_kernel,
    bad_id,
    bad_cuda_attention,
    bad_attention_plan,
    unknown_isa,
    unsupported_isa,
    cuda_no_driver,
    cuda_no_device,
    cuda_no_kernel_image,
    cuda_bad_stream,
    cuda_failed,
    cuda_shared_memory,
    out_of_memory,
};

// One sentence, without the caller's values: those are added where they are known, in the binding.
constexpr const char* sentence(Status status) {
    switch (status) {
        case Status::ok:
            return "ok";
        case Status::bad_bits:
            return "bits must be 2, 4 or 8";
        case Status::bad_dtype:
            return "dtype code must be 0 (float32), 1 (float16) or 2 (bfloat16); for codes and an int8 "
                   "output of the skinny GEMM also 3";
        case Status::bad_mode:
            return "mode must be 0 (per_token), 1 (per_tensor) or 2 (static)";
        case Status::bad_size:
            return "rows must be >= 0, columns >= 1 and the row stride >= 0";
        case Status::size_overflow:
            return "the product of the sizes does not fit in 63 bits, or the rows not in one launch";
        case Status::k_too_large:
            return "K is so large that an int32 sum of int8 codes could overflow";
        case Status::bad_clip:
            return "clip must be positive and finite, or 0 for none";
        case Status::bad_act_scale:
            return "act_scale must lie between 2^-126 and 2^126, so that it and its reciprocal are normal "
                   "numbers";
        case Status::code_out_of_range:
            return "a code lies outside the signed range of its width";
        case Status::bad_group_size:
            return "group_size must be 32, 64 or 128 at 2 and 4 bits, or 0 for none";
        case Status::bad_part:
            return "a launch takes 1 to 3 parts, each with n >= 1, weights on a 16-byte boundary, scales, an "
                   "output and, with groups, multipliers";
        case Status::bad_activation:
            return "activation code must be 0 (none), 1 (relu) or 2 (gelu)";
        case Status::bad_output:
            return "an int8 output needs its static scale, and a float one takes none";
        case Status::bad_prologue:
            return "a float input is quantized inside the GEMM for up to 16 rows only, and only a float "
                   "input is normalized";
        case Status::bad_plan:
            return "warps_n must be 1, 2, 4 or 8 and splits such that each has a part of K, with room for "
                   "the activations in 40 KiB of shared memory";
        case Status::no_workspace:
            return "a GEMM that is split over blocks needs its workspace and its counters, attention its "
                   "workspace "
                   "on 8 bytes";
        case Status::bad_attention:
            return "attention needs sizes >= 0, head_dim 1 to 1040, at most 131071 keys, strides >= 0 with "
                   "elements "
                   "of a row adjacent, and mode per_token or per_tensor";
        case Status::bad_keys:
            return "lengths and positions must lie inside the capacity, and source must name caches that "
                   "exist";
        case Status::no_memory:
            return "no memory was left for the buffers of a kernel";
        case Status::bad_cpu_part:
            return "a call takes 1 to 64 parts (1 to 3 where it is kept), each with n >= 1, weights, scales, "
                   "an output and, with "
                   "groups, "
                   "multipliers; codes as input bring their scales";
        case Status::bad_kernel:
            return "kernel must be 0, or 1 + the index of a kernel that this CPU can run";
        case Status::bad_id:
            return "ids must lie in 0..rows-1";
        case Status::bad_cuda_attention:
            return "decode attention takes a head_dim of 4, 8 .. 128, at least one cache and one key, a "
                   "cache "
                   "for each "
                   "row unless a source per row or per key names them, and caches that start on 16 bytes "
                   "where that "
                   "was promised";
        case Status::bad_attention_plan:
            return "splits must be 1 to 64 such that each has keys, warps 1 to 16 (8 above a head_dim of 64, "
                   "for more than 8 queries of one cache and without kept scores), and scores are kept only "
                   "without splits, where they fit";
        case Status::unknown_isa:
            return "DQKERNELS_CPU must be one of scalar, avx2, avx_vnni, avx512_vnni, amx_int8, dotprod";
        case Status::unsupported_isa:
            return "DQKERNELS_CPU names an instruction set that this CPU or this build does not have";
        case Status::cuda_no_driver:
            return "no usable CUDA driver was found";
        case Status::cuda_no_device:
            return "no CUDA device was found";
        case Status::cuda_no_kernel_image:
            return "the extension was not built for this GPU's architecture (set DQKERNELS_CUDA_ARCHS and "
                   "reinstall)";
        case Status::cuda_bad_stream:
            return "the stream does not belong to the current CUDA device";
        case Status::cuda_failed:
            return "the CUDA runtime refused the launch";
        case Status::cuda_shared_memory:
            return "a kernel was asked to run with more than 48 KiB of dynamic shared memory";
        case Status::out_of_memory:
            return "there is no memory for the activations of this call";
    }
    return "unknown status";
}

}  // namespace dqk
