// The whole surface of the core, on one page. Raw pointers, int64 sizes, a stream handle, a Status; no
// Python, no torch.
#pragma once
#include <cstdint>

#include "dqk/status.h"

namespace dqk {

// Raised whenever a signature below or the packed format changes; dqkernels/kernels/native.py holds its twin.
constexpr int32_t kAbiVersion = 1;

// ---- CPU instruction sets ---------------------------------------------------------------------------------

enum class Isa : int32_t { scalar = 0, avx2, avx_vnni, avx512_vnni, amx_int8, dotprod };
constexpr int32_t kIsaCount = 6;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The set that kernels run with: $DQKERNELS_CPU where set, else the best one here. Decided once per process.
Status active_isa(Isa* isa);

// ---- packed weights (format.h) ----------------------------------------------------------------------------

// codes int8 [n, k] row-major -> out uint8 [ceil16(n), ceil128(k) * bits / 8], every byte written, padding 0.
Status pack(const int8_t* codes, int64_t n, int64_t k, int32_t bits, uint8_t* out);

// The inverse: sign-extended codes int8 [n, k].
Status unpack(const uint8_t* packed, int64_t n, int64_t k, int32_t bits, int8_t* codes);

// ---- activations ------------------------------------------------------------------------------------------

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class ActMode : int32_t { per_token = 0, per_tensor = 1, static_scale = 2 };

// q = round_half_even(clamp(clip(x) * inv, -127, 127)), one (inv, scale) per row; rounding.h holds the rule.
struct QuantizeRows {
    const void* x;       // [rows, k], elements of a row adjacent
    DType dtype;         //
    int64_t rows;        //
    int64_t k;           //
    int64_t row_stride;  // in elements; 0 for an expanded row
    ActMode mode;        // per_tensor treats x as one row and repeats its scale
    float clip;          // 0 = none
    float act_scale;     // read under static_scale only
    int8_t* q;           // [rows, k] contiguous
    float* scale;        // [rows]; NaN marks a row with a non-finite input, whose codes are 0
    int32_t* row_sum;    // [rows], sum of the row's codes; nullptr = not wanted
};

// What every implementation refuses; called by both below.
Status check(const QuantizeRows& args);

Status quantize_rows(const QuantizeRows& args);

// The same on the current CUDA device, queued on `stream` (a cudaStream_t). Returns before it has run.
// `act_scale`, if not null, is a device pointer read in place of args.act_scale: a layer's own tensor, so
// that no call waits for the device.
Status cuda_quantize_rows(const QuantizeRows& args, const float* act_scale, void* stream);

}  // namespace dqk
