// The activations of the skinny GEMM on their way into shared memory: int8 rows are copied, float rows are
// normalized where asked, and quantized. docs/design.md, section 3, has the rule, rounding.h its arithmetic.
//
// In shared memory a token's row is made of 16-byte pieces in the order of K, except that `swizzle` exchanges
// pieces within each 128 codes, so that the lanes which read together never meet in a bank.
#pragma once
#include "cuda/launch.h"
#include "cuda/primitives.cuh"
#include "dqk/element.h"
#include "dqk/rounding.h"
#include "dqk/skinny_shape.h"

namespace dqk {

constexpr int32_t kVector = 8;                         // elements a thread takes of a row at once
constexpr int32_t kStride = kSkinnyThreads * kVector;  // and how far apart it takes them
constexpr int32_t kMaxTokens = static_cast<int32_t>(kPrologueTokens);

// Where in its row `code` of a chunk stands. Only bits 5 and 6 differ, and by nothing that they hold:
// changing them before or after is the same.
__device__ __forceinline__ int32_t swizzled(int32_t token, int32_t code) {
    return code ^ ((token & 1) << 6) ^ ((token & 2) << 4) ^ ((code & 128) >> 2);
}
// Where in its chunk.
__device__ __forceinline__ int32_t code_offset(int32_t token, int32_t code, int32_t chunk_codes) {
    return token * chunk_codes + swizzled(token, code);
}

// ---- int8 rows --------------------------------------------------------------------------------------------

// Queues the copy of codes first .. first + chunk_codes of every row; zeros past the end of a row.
__device__ __forceinline__ void copy_codes(const SkinnyGemm& args, int64_t first_row, int32_t tokens,
                                           int64_t first, int32_t chunk_codes, int8_t* chunk) {
    const auto* x = static_cast<const int8_t*>(args.x);
    const bool vector = args.row_stride % 16 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    // Sixteen threads copy the 256 codes of a unit of one row.
    const int32_t code0 = static_cast<int32_t>(threadIdx.x) % 16 * 16;
    for (int32_t token = static_cast<int32_t>(threadIdx.x) / 16; token < tokens;
         token += kSkinnyThreads / 16) {
        const int8_t* row = x + (first_row + token) * args.row_stride;
        for (int32_t code = code0; code < chunk_codes; code += kUnitCodes) {
            int8_t* to = chunk + code_offset(token, code, chunk_codes);
            const int64_t left = args.k - (first + code);
            const int32_t count = left >= 16 ? 16 : left > 0 ? static_cast<int32_t>(left) : 0;
            if (vector) {
                copy_async16(to, count > 0 ? row + first + code : x, count);
            } else {
                for (int32_t j = 0; j < 16; ++j) to[j] = j < count ? row[first + code + j] : int8_t{0};
            }
        }
    }
}

// ---- float rows -------------------------------------------------------------------------------------------

// What a block knows of its rows, in shared memory.
struct RowFacts {
    float* part;   // [kMaxTokens][kSkinnyWarps], one value per row and warp
    float* part2;  // the same
    float* mean;   // [kMaxTokens]
    float* rest;   // [kMaxTokens], what the rounding of `mean` left over
    float* rstd;   // [kMaxTokens]
    float* inv;    // [kMaxTokens], 0: all codes are 0
    float* scale;  // [kMaxTokens], for the epilogue
};

// Every thread takes the same elements of every row, whatever the number of rows: sums of floats then do not
// depend on the batch. The first pass asks for four rows before it looks at one, and so brings them into L1;
// the passes after it are short loops over rows, for this code is compiled into every kernel that takes
// floats.
struct FloatRows {
    const SkinnyGemm& args;
    const RowFacts& facts;
    int32_t tokens;
    bool wide;    // fp32
    bool vector;  // 16-bit elements and rows on 16 bytes: one load or store for eight
    float clip;

    __device__ __forceinline__ FloatRows(const SkinnyGemm& a, const RowFacts& f)
        : args(a),
          facts(f),
          tokens(static_cast<int32_t>(a.m)),
          wide(a.x_dtype == DType::float32),
          vector(!wide && a.k % kVector == 0 && a.row_stride % kVector == 0 && on_16_bytes(a.x) &&
                 (a.norm_weight == nullptr ||
                  (on_16_bytes(a.norm_weight) && on_16_bytes(a.norm_bias) && on_16_bytes(a.norm_y)))),
          clip(a.clip == 0.0f ? kNoClip : a.clip) {}

    // inv and scale of every row. With a norm its moments too, and the normalized rows go to norm_y if
    // `store`.
    __device__ __forceinline__ void scales(bool store) const {
        if (vector) raw_amax();
        if (args.norm_weight != nullptr) moments();
        if (args.norm_weight != nullptr || !vector) amax(store);
        __syncthreads();
        if (static_cast<int32_t>(threadIdx.x) < tokens) {
            // per_tensor: one row made of all of them.
            const bool whole = args.mode == ActMode::per_tensor;
            const int32_t first = whole ? 0 : static_cast<int32_t>(threadIdx.x);
            const int32_t last = whole ? tokens : first + 1;
            uint32_t bits = 0;
#pragma unroll 1
            for (int32_t i = first * kSkinnyWarps; i < last * kSkinnyWarps; ++i)
                bits = larger(bits, float_bits(facts.part[i]));
            const RowScale s = args.mode == ActMode::static_scale ? static_scale(bits, *args.act_scale)
                                                                  : dynamic_scale(bits, clip);
            facts.inv[threadIdx.x] = s.inv;
            facts.scale[threadIdx.x] = s.scale;
        }
        __syncthreads();
    }

    // Codes first .. first + chunk_codes of every row, zeros past the end of a row.
    __device__ __forceinline__ void codes(int64_t first, int32_t chunk_codes, int8_t* chunk) const {
#pragma unroll 1
        for (int32_t code = threadIdx.x * kVector; code < chunk_codes; code += kStride) {
#pragma unroll 1
            for (int32_t token = 0; token < tokens; ++token) {
                const float inv = facts.inv[token];
                uint32_t words[2] = {0u, 0u};
                if (inv != 0.0f && first + code < args.k) {
                    float x[kVector];
                    load(token, first + code, x);
#pragma unroll
                    for (int32_t j = 0; j < kVector; ++j)
                        words[j / 4] |= (static_cast<uint32_t>(quantize_one(x[j], inv, clip)) & 0xFFu)
                                        << (8 * (j % 4));
                }
                int8_t* to = chunk + code_offset(token, code, chunk_codes);
                *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
            }
        }
    }

  private:
    static __device__ __forceinline__ bool on_16_bytes(const void* pointer) {
        return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    }
    static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

    __device__ __forceinline__ float widen(uint32_t bits) const {
        const auto half = static_cast<uint16_t>(bits);
        return args.x_dtype == DType::float16 ? half_to_float(half) : bfloat16_to_float(half);
    }

    // Elements k .. k + 7 of an array of x's type that is `args.k` long; zeros past its end.
    __device__ __forceinline__ void load_array(const void* base, int64_t k, float (&x)[kVector]) const {
        uint32_t words[4] = {0u, 0u, 0u, 0u};
        if (wide) {
            const auto* from = static_cast<const float*>(base);
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j) x[j] = k + j < args.k ? from[k + j] : 0.0f;
            return;
        }
        const auto* from = static_cast<const uint16_t*>(base);
        if (vector) {
            const uint4 v = *reinterpret_cast<const uint4*>(from + k);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j)
                if (k + j < args.k) words[j / 2] |= static_cast<uint32_t>(from[k + j]) << (16 * (j % 2));
        }
        if (args.x_dtype == DType::float16) {
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j)
                x[j] = half_to_float(static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2))));
        } else {
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j)
                x[j] = bfloat16_to_float(static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2))));
        }
    }
    __device__ __forceinline__ void load_row(int32_t token, int64_t k, float (&x)[kVector]) const {
        const int64_t offset = token * args.row_stride * (wide ? 4 : 2);
        load_array(static_cast<const uint8_t*>(args.x) + offset, k, x);
    }
    // What is quantized: the row, or its LayerNorm rounded to the row's type, as a layer of its own would
    // leave it.
    __device__ __forceinline__ void load(int32_t token, int64_t k, float (&x)[kVector]) const {
        load_row(token, k, x);
        if (args.norm_weight == nullptr) return;
        const float mean = facts.mean[token], rest = facts.rest[token], rstd = facts.rstd[token];
        float factor[kVector];
        load_array(args.norm_weight, k, factor);
#pragma unroll
        for (int32_t j = 0; j < kVector; ++j)
            x[j] = mul_rn(mul_rn(add_rn(add_rn(x[j], -mean), -rest), rstd), factor[j]);
        if (args.norm_bias != nullptr) {
            load_array(args.norm_bias, k, factor);
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j) x[j] = add_rn(x[j], factor[j]);
        }
        if (args.x_dtype == DType::float16) {
            round_each<DType::float16>(x);
        } else if (args.x_dtype == DType::bfloat16) {
            round_each<DType::bfloat16>(x);
        }
#pragma unroll
        for (int32_t j = 0; j < kVector; ++j) x[j] = k + j < args.k ? x[j] : 0.0f;
    }
    template <DType kType>
    static __device__ __forceinline__ void round_each(float (&x)[kVector]) {
#pragma unroll
        for (int32_t j = 0; j < kVector; ++j) x[j] = round_to(kType, x[j]);
    }

    // Elements k .. k + 7 of a normalized row, rounded already, on their way out.
    __device__ __forceinline__ void store_norm(int32_t token, int64_t k, const float (&x)[kVector]) const {
        const int64_t at = token * args.k + k;
        if (args.x_dtype == DType::float32) {
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j)
                if (k + j < args.k) static_cast<float*>(args.norm_y)[at + j] = x[j];
            return;
        }
        uint32_t words[4] = {0u, 0u, 0u, 0u};
        if (args.x_dtype == DType::float16) {
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j)
                words[j / 2] |= static_cast<uint32_t>(float_to_half(x[j])) << (16 * (j % 2));
        } else {  // the bits that rounding has left are the upper ones
#pragma unroll
            for (int32_t j = 0; j < kVector; ++j) words[j / 2] |= float_bits(x[j]) >> 16 << (16 * (j % 2));
        }
        auto* to = static_cast<uint16_t*>(args.norm_y) + at;
        if (vector) {
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
            return;
        }
#pragma unroll
        for (int32_t j = 0; j < kVector; ++j)
            if (k + j < args.k) to[j] = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
    }

    // body(token, slot of this row and warp) for every row, this thread's steps of a row being k.
    template <class Body>
    __device__ __forceinline__ void each_row(Body body) const {
#pragma unroll 1
        for (int32_t token = 0; token < tokens; ++token)
            body(token, token * kSkinnyWarps + static_cast<int32_t>(threadIdx.x) / 32);
    }
    template <class Body>
    __device__ __forceinline__ void each_step(Body body) const {
#pragma unroll 1
        for (int64_t k = static_cast<int64_t>(threadIdx.x) * kVector; k < args.k; k += kStride) body(k);
    }

    __device__ __forceinline__ void store_max(int32_t slot, uint32_t bits) const {
#pragma unroll
        for (int32_t lane = 16; lane > 0; lane /= 2)
            bits = larger(bits, __shfl_xor_sync(0xFFFFFFFFu, bits, lane));
        if (threadIdx.x % 32 == 0) facts.part[slot] = bits_float(bits);
    }
    __device__ __forceinline__ void store_sum(float* part, int32_t slot, float sum) const {
#pragma unroll
        for (int32_t lane = 16; lane > 0; lane /= 2)
            sum = add_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, lane));
        if (threadIdx.x % 32 == 0) part[slot] = sum;
    }
    __device__ __forceinline__ float total(const float* part, int32_t token) const {
        float sum = 0.0f;
#pragma unroll 1
        for (int32_t warp = 0; warp < kSkinnyWarps; ++warp)
            sum = add_rn(sum, part[token * kSkinnyWarps + warp]);
        return sum;
    }

    // The largest magnitude of 16-bit elements, on their bits: those of two halves order like the halves.
    __device__ __forceinline__ void raw_amax() const {
        constexpr int32_t kRows = 4;
#pragma unroll 1
        for (int32_t token0 = 0; token0 < tokens; token0 += kRows) {
            uint32_t high[kRows] = {}, low[kRows] = {};
            each_step([&](int64_t k) {
                uint4 v[kRows];
#pragma unroll
                for (int32_t r = 0; r < kRows; ++r) {
                    const int64_t token =
                        token0 + r < tokens ? token0 + r : token0;  // the first again, at no cost
                    v[r] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) +
                                                           token * args.row_stride + k);
                }
#pragma unroll
                for (int32_t r = 0; r < kRows; ++r) {
                    const uint32_t words[4] = {v[r].x, v[r].y, v[r].z, v[r].w};
#pragma unroll
                    for (int32_t j = 0; j < 4; ++j) {
                        high[r] = larger(high[r], words[j] & 0x7FFFFFFFu);
                        low[r] = larger(low[r], (words[j] << 16) & 0x7FFF0000u);
                    }
                }
            });
#pragma unroll
            for (int32_t r = 0; r < kRows; ++r) {
                if (token0 + r >= tokens) break;
                const uint32_t bits = larger(high[r] >> 16, low[r] >> 16);
                store_max((token0 + r) * kSkinnyWarps + static_cast<int32_t>(threadIdx.x) / 32,
                          float_bits(widen(bits)));
            }
        }
    }

    __device__ __forceinline__ void amax(bool store) const {
        each_row([&](int32_t token, int32_t slot) {
            uint32_t best = 0;
            each_step([&](int64_t k) {
                float x[kVector];
                load(token, k, x);
#pragma unroll
                for (int32_t j = 0; j < kVector; ++j) best = larger(best, magnitude_bits(x[j]));
                if (store && args.norm_weight != nullptr) store_norm(token, k, x);
            });
            store_max(slot, best);
        });
    }

    // mean, rest and rstd of every row. A second pass over x - mean, since E[x^2] - E[x]^2 cancels where the
    // mean is large; it also sums x - mean, which tells what the rounding of `mean` left over.
    __device__ __forceinline__ void moments() const {
        const float length = static_cast<float>(args.k);
        const int32_t mine = static_cast<int32_t>(threadIdx.x);
        if (vector) __syncthreads();  // raw_amax used `part` before
        // x - 0 is x: the first pass sums the row itself, and its squares go unused. One loop for both, for
        // its loads are compiled into every kernel.
#pragma unroll 1
        for (int32_t pass = 0; pass < 2; ++pass) {
            each_row([&](int32_t token, int32_t slot) {
                const float mean = pass == 0 ? 0.0f : facts.mean[token];
                float sum = 0.0f, squares = 0.0f;
                each_step([&](int64_t k) {
                    float x[kVector];
                    load_row(token, k, x);
#pragma unroll
                    for (int32_t j = 0; j < kVector; ++j) {
                        const float d = k + j < args.k ? add_rn(x[j], -mean) : 0.0f;
                        sum = add_rn(sum, d);
                        squares = add_rn(squares, mul_rn(d, d));
                    }
                });
                store_sum(facts.part, slot, sum);
                if (pass == 1) store_sum(facts.part2, slot, squares);
            });
            __syncthreads();
            if (pass == 0 && mine < tokens) facts.mean[mine] = div_rn(total(facts.part, mine), length);
            if (pass == 0) __syncthreads();
        }
        if (mine < tokens) {
            const float rest = div_rn(total(facts.part, mine), length);
            float var = add_rn(div_rn(total(facts.part2, mine), length), -mul_rn(rest, rest));
            var = var < 0.0f ? 0.0f : var;  // keeps NaN
            facts.rest[mine] = rest;
            facts.rstd[mine] = div_rn(1.0f, sqrt_rn(add_rn(var, args.norm_eps)));
        }
        __syncthreads();
    }
};

}  // namespace dqk
