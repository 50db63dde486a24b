// What decode attention reads: queries, quantized on the way into shared memory; tiles of K and V as lanes
// want them; and the slots, (row, query) pairs, of a block.
//
// Keys behind the last visible one are read as that one, dimensions behind head_dim as some that exist: their
// scores are -inf, the codes of Q there are 0, and no load needs a condition.
#pragma once
#include "cuda/launch.h"
#include "cuda/primitives.cuh"
#include "dqk/attention_shape.h"
#include "dqk/element.h"
#include "dqk/rounding.h"

namespace dqk {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint32_t kNanBits = 0x7FC00000u;
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

__device__ __forceinline__ float not_nan(float x) {
    return x == x ? x : kInfinity;
}
__device__ __forceinline__ float larger(float a, float b) {
    return fmaxf(a, b);  // of numbers
}
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

// ---- queries ----------------------------------------------------------------------------------------------

// Where the query's elements begin, and one of them after softmax_scale.
__device__ __forceinline__ int64_t query_start(const CudaAttentionDecode& args, int64_t row, int64_t head,
                                               int64_t query) {
    return row * args.q_stride[0] + head * args.q_stride[1] + query * args.q_stride[2];
}
__device__ __forceinline__ float query_element(const CudaAttentionDecode& args, int64_t at) {
    return mul_rn(load_element(args.q, args.dtype, at), args.softmax_scale);
}
// An element of the bias without a branch: this stands in the longest loop, eight times and more.
__device__ __forceinline__ float bias_element(const CudaAttentionDecode& args, int64_t at) {
    const bool wide = args.bias_dtype == DType::float32;
    const uint32_t bits =
        wide ? static_cast<const uint32_t*>(args.bias)[at] : static_cast<const uint16_t*>(args.bias)[at];
    const auto half = static_cast<uint16_t>(bits);
    const float narrow = args.bias_dtype == DType::float16 ? half_to_float(half) : bfloat16_to_float(half);
    return wide ? bits_float(bits) : narrow;
}
__device__ __forceinline__ uint32_t warp_max(uint32_t bits) {
#pragma unroll
    for (int32_t lane = 16; lane > 0; lane /= 2) bits = larger(bits, __shfl_xor_sync(kWholeWarp, bits, lane));
    return bits;
}

// ---- keys -------------------------------------------------------------------------------------------------

// Rows of the caches as a lane (g, t) = (lane / 4, lane % 4) reads them.
template <int32_t kSegments, bool kVector>
struct AttentionKeys {
    const int8_t* k;  // of the block's cache and head; by key of its head in cache 0
    const int8_t* v;
    const float* k_scale;
    const float* v_scale;
    const int32_t* source;  // of the block's row, by key; else nullptr
    int32_t cache_keys;     // from one cache to the next
    int32_t caches;
    int32_t head_dim;
    int32_t last;  // the largest key that any slot sees

    // Where keys first, first + kStep ... stand, in keys, and a bit for each that is in no cache; its place
    // is then some that exists.
    template <int32_t kStep, int32_t kCount>
    __device__ __forceinline__ uint32_t places(int32_t first, int32_t (&to)[kCount]) const {
#pragma unroll
        for (int32_t i = 0; i < kCount; ++i) to[i] = first + kStep * i < last ? first + kStep * i : last;
        if (source == nullptr) return 0;
        uint32_t lost = 0;
#pragma unroll
        for (int32_t i = 0; i < kCount; ++i) {
            const int32_t cache = source[to[i]];
            const bool inside = cache >= 0 && cache < caches;
            if (inside) to[i] += cache * cache_keys;
            lost |= (inside ? 0u : 1u) << i;
        }
        return lost;
    }

    __device__ __forceinline__ const int8_t* row(const int8_t* base, int32_t place) const {
        return base + int64_t{place} * head_dim;
    }

    // Bytes d .. d + 15 of a row, d a multiple of 16.
    __device__ __forceinline__ void load16(const int8_t* row, int32_t d, uint32_t (&to)[4]) const {
        if constexpr (kVector) {
            const uint4 x = load_weights16(row + (d < head_dim ? d : 0));
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        } else {
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) to[i] = word(row, d + 4 * i);
        }
    }
    // Bytes d .. d + 7, d a multiple of 8.
    __device__ __forceinline__ void load8(const int8_t* row, int32_t d, uint32_t (&to)[2]) const {
        if constexpr (kVector) {
            const uint2 x = load_weights8(row + (d < head_dim ? d : 0));
            to[0] = x.x, to[1] = x.y;
        } else {
            to[0] = word(row, d), to[1] = word(row, d + 4);
        }
    }

  private:
    __device__ __forceinline__ uint32_t word(const int8_t* row, int32_t d) const {
        return *reinterpret_cast<const uint32_t*>(row + (d < head_dim ? d : 0));
    }
};

// A lane's share of 32 rows of K: bytes 16t .. of every segment of keys g, g + 8, g + 16, g + 24.
template <int32_t kSegments>
struct KeyTile {
    uint32_t row[4][kSegments][4];
    float k_scale[4];
    float v_scale[4];
};
template <int32_t kSegments, bool kVector>
__device__ __forceinline__ void load_keys(const AttentionKeys<kSegments, kVector>& keys, int32_t first,
                                          int32_t g, int32_t t, KeyTile<kSegments>& to) {
    int32_t place[4];
    const uint32_t lost = keys.template places<8>(first + g, place);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
        for (int32_t segment = 0; segment < kSegments; ++segment)
            keys.load16(keys.row(keys.k, place[i]), segment * kDimSegment + 16 * t, to.row[i][segment]);
        // A key in no cache spoils the slots that see it.
        to.k_scale[i] = (lost >> i & 1u) != 0 ? bits_float(kNanBits) : keys.k_scale[place[i]];
        to.v_scale[i] = keys.v_scale[place[i]];
    }
}

// A lane's share of 32 rows of V: bytes 8g .. of every segment of keys 8t .. 8t + 7.
template <int32_t kSegments>
struct ValueTile {
    uint32_t row[8][kSegments][2];
};
template <int32_t kSegments, bool kVector>
__device__ __forceinline__ void load_values(const AttentionKeys<kSegments, kVector>& keys, int32_t first,
                                            int32_t g, int32_t t, ValueTile<kSegments>& to) {
    int32_t place[8];
    keys.template places<1>(first + 8 * t, place);
#pragma unroll
    for (int32_t i = 0; i < 8; ++i)
#pragma unroll
        for (int32_t segment = 0; segment < kSegments; ++segment)
            keys.load8(keys.row(keys.v, place[i]), segment * kDimSegment + 8 * g, to.row[i][segment]);
}

// Four rows of four bytes become four columns of four bytes.
__device__ __forceinline__ void transpose4(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                           uint32_t (&to)[4]) {
    const uint32_t ab01 = permute_bytes(a, b, 0x5140u), cd01 = permute_bytes(c, d, 0x5140u);
    const uint32_t ab23 = permute_bytes(a, b, 0x7362u), cd23 = permute_bytes(c, d, 0x7362u);
    to[0] = permute_bytes(ab01, cd01, 0x5410u);
    to[1] = permute_bytes(ab01, cd01, 0x7632u);
    to[2] = permute_bytes(ab23, cd23, 0x5410u);
    to[3] = permute_bytes(ab23, cd23, 0x7632u);
}

// ---- slots ------------------------------------------------------------------------------------------------

// What a block knows of the slots of a pass, in shared memory; unused slots see no key.
struct SlotFacts {
    int32_t* row;      // [kSlots]
    int32_t* query;    // [kSlots]
    int32_t* length;   // [kSlots], keys it sees
    int64_t* bias;     // [kSlots], offset of its first element
    int8_t* codes;     // [kSlots][dims]
    float* scale;      // [kSlots]
    uint32_t* counts;  // [kMaxAttentionWarps]
};

// Names slots first .. first + most - 1 of the rows whose source is `cache`, in the order of the rows; how
// many there are from `first` on, and no more than `most`.
__device__ __forceinline__ int32_t find_mates(const CudaAttentionDecode& args, const SlotFacts& facts,
                                              int64_t cache, int64_t first, int32_t most) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);
    int64_t rank0 = 0;  // of the first row looked at, among the mates
#pragma unroll 1
    for (int64_t row0 = 0; row0 < args.rows; row0 += threads) {
        const int64_t row = row0 + thread;
        const bool mate = row < args.rows && args.source[row] == cache;
        const uint32_t votes = __ballot_sync(kWholeWarp, mate ? 1 : 0);
        if (thread % 32 == 0) facts.counts[thread / 32] = static_cast<uint32_t>(count_bits(votes));
        __syncthreads();
        int64_t rank = rank0 + count_bits(votes & ((1u << (thread % 32)) - 1u));
#pragma unroll 1
        for (int32_t warp = 0; warp < threads / 32; ++warp) {
            if (warp < thread / 32) rank += facts.counts[warp];
            rank0 += facts.counts[warp];
        }
        if (mate) {
#pragma unroll 1
            for (int64_t query = 0; query < args.queries; ++query) {
                const int64_t slot = rank * args.queries + query - first;
                if (slot < 0 || slot >= most) continue;
                facts.row[slot] = static_cast<int32_t>(row);
                facts.query[slot] = static_cast<int32_t>(query);
            }
        }
        __syncthreads();  // the counts may be written again, and the slots read
    }
    const int64_t left = rank0 * args.queries - first;
    return left < most ? static_cast<int32_t>(left) : most;
}

// Codes of the slots' queries, zeros behind head_dim and for unused slots. A warp takes every `warps`-th
// slot.
template <int32_t kDims>
__device__ __forceinline__ void quantize_slots(const CudaAttentionDecode& args, const AttentionShape& shape,
                                               const SlotFacts& facts, int32_t slots, int64_t head) {
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
    const float clip = args.clip == 0.0f ? kNoClip : args.clip;
    uint32_t all = 0;
    if (shape.amax_blocks > 0) {
        const auto* amax = static_cast<const uint32_t*>(args.workspace);
#pragma unroll 1
        for (int32_t i = lane; i < shape.amax_blocks; i += 32) all = larger(all, amax[i]);
        all = warp_max(all);
    }
#pragma unroll 1
    for (int32_t slot = static_cast<int32_t>(threadIdx.x) / 32; slot < kSlots; slot += shape.warps) {
        float x[kDims / 32] = {};
        if (slot < slots) {
            const int64_t start = query_start(args, facts.row[slot], head, facts.query[slot]);
#pragma unroll
            for (int32_t i = 0; i < kDims / 32; ++i)
                if (lane + 32 * i < args.head_dim) x[i] = query_element(args, start + lane + 32 * i);
        }
        uint32_t bits = 0;
#pragma unroll
        for (int32_t i = 0; i < kDims / 32; ++i) bits = larger(bits, magnitude_bits(x[i]));
        bits = warp_max(bits);
        const RowScale s = dynamic_scale(shape.amax_blocks > 0 ? all : bits, clip);
#pragma unroll
        for (int32_t i = 0; i < kDims / 32; ++i)
            facts.codes[slot * kDims + lane + 32 * i] =
                s.inv == 0.0f ? int8_t{0} : static_cast<int8_t>(quantize_one(x[i], s.inv, clip));
        if (lane == 0) facts.scale[slot] = s.scale;
    }
}

}  // namespace dqk
