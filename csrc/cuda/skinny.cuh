// The skinny GEMM: W2/W4/W8 x A8 for up to 64 tokens at a time, from fp16 in to fp16 out in one launch.
//
// Weights are the A operand of mma.m16n8k32.s8 and tokens its n = 8, so one token costs one instruction per
// 16 x 32 weights. Lane (g, t) reads 16 bytes of weight rows g and g + 8 as they lie in memory (planar format
// v1); plane by plane those are its slots of consecutive mma steps, because the order of K inside a dot
// product is free and the activations are read at the same k. A shift and a mask put a plane into the top
// bits of its bytes; the power of two comes off the exact int32 sum. For four_level a set bit below the code
// makes the byte (2 * code + 1) * 2^5, so that no row sum is needed.
//
// A warp holds kDepth segments of its 16 rows in flight, the first of them asked for before the activations
// are looked at. Its sums meet those of the warps (and, split over blocks, of the blocks) that share its rows
// as int32, whose order cannot matter, and the float epilogue runs once.
#pragma once
#include "cuda/launch.h"
#include "cuda/primitives.cuh"
#include "cuda/skinny_input.cuh"
#include "dqk/skinny_shape.h"

namespace dqk {

// ---- weights ----------------------------------------------------------------------------------------------

// 4 * kBytes of each of 16 rows: this lane's share, kBytes of rows g and g + 8.
template <int32_t kBytes>
struct Segment {
    uint32_t low[kBytes / 4];
    uint32_t high[kBytes / 4];
};

__device__ __forceinline__ void load_lane(const uint8_t* from, uint32_t (&to)[4]) {
    const uint4 v = load_weights16(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void load_lane(const uint8_t* from, uint32_t (&to)[2]) {
    const uint2 v = load_weights8(from);
    to[0] = v.x, to[1] = v.y;
}

// Four codes of one plane, each in the top bits of its byte. Bits that a shift moves over from the next byte
// fall outside the mask.
template <int32_t kBits, int32_t kPlane>
__device__ __forceinline__ uint32_t top_codes(uint32_t word, uint32_t half) {
    if constexpr (kBits == 8) {
        return word;
    } else {
        constexpr uint32_t kMask = 0x01010101u * (0xFFu & (0xFF00u >> kBits));
        return ((word << (8 - kBits - kBits * kPlane)) & kMask) | half;
    }
}

// What does not change along K. kBits: width; kBytes: of a lane's load; kTiles: of 8 tokens; kGroups: with
// groups.
template <int32_t kBits, int32_t kBytes, int32_t kTiles, bool kGroups>
struct SkinnyWarp {
    static constexpr int32_t kPlanes = 8 / kBits;
    static constexpr int32_t kRun = 128 / kPlanes;  // consecutive codes of a plane, and bytes of a block
    static constexpr int32_t kSteps = kBytes / 8;   // of mma, per plane and segment
    static constexpr int32_t kSegmentBytes = 4 * kBytes;

    const uint8_t* low;    // row g of the warp's 16, at the slice
    const uint8_t* high;   // row g + 8
    const uint8_t* mult;   // row g of the multipliers
    const uint8_t* mult8;  // row g + 8
    int32_t slice_bytes;   // of a row; 0 for a warp without rows
    int32_t first_code;    // of the slice
    int32_t ends;          // bit p: a group ends with plane p of every segment
    int32_t group_shift;   // of codes in a group, as a power of two
    int32_t last_group;
    int32_t shift;
    uint32_t half;  // the bit below each code, for four_level
    int32_t lane_g;
    int32_t lane_t;
    int32_t lane_at;  // of this lane's first code in a row of the chunk, were the segment the first
    int32_t tokens;

    // Past the end of a row `to` stays as it is: the activations are 0 there.
    __device__ __forceinline__ void load(int32_t segment, Segment<kBytes>& to) const {
        const int32_t byte = segment * kSegmentBytes + lane_t * kBytes;
        if (byte >= slice_bytes) return;
        load_lane(low + static_cast<uint32_t>(byte), to.low);
        load_lane(high + static_cast<uint32_t>(byte), to.high);
    }

    // Byte `byte` of a row is plane p of code 128 * (byte / kRun) + p * kRun + byte % kRun.
    static __device__ __forceinline__ int32_t code_of_byte(int32_t byte, int32_t plane) {
        const auto unsigned_byte = static_cast<uint32_t>(byte);
        return static_cast<int32_t>(unsigned_byte / kRun * 128 + unsigned_byte % kRun) + plane * kRun;
    }

    // Whether a group ends with this plane of a segment.
    __device__ __forceinline__ bool ends_group(int32_t plane) const { return (ends >> plane & 1) != 0; }
    static __device__ __forceinline__ int32_t planes_that_end(int32_t size) {
        int32_t planes = 0;
#pragma unroll
        for (int32_t plane = 0; plane < kPlanes; ++plane)
            if (size <= kSegmentBytes || ((plane + 1) * kRun & (size - 1)) == 0) planes |= 1 << plane;
        return planes;
    }
    // The multipliers of the groups that end in a segment; the other places of `to` stay as they are.
    __device__ __forceinline__ void load_mult(int32_t segment, uint32_t (&to)[2][kPlanes]) const {
        if (segment * kSegmentBytes >= slice_bytes) return;
        // The first plane of a segment begins a group, or a group is as long as a segment.
        const int32_t group0 = (first_code + code_of_byte(segment * kSegmentBytes, 0)) >> group_shift;
#pragma unroll
        for (int32_t plane = 0; plane < kPlanes; ++plane) {
            if (!ends_group(plane)) continue;
            const int32_t group = group0 + (plane * kRun >> group_shift);
            const auto at =
                static_cast<uint32_t>(group < last_group ? group : last_group);  // past K all is 0
            to[0][plane] = mult[at];
            to[1][plane] = mult8[at];
        }
    }

    // sums += the segment's product with the tokens; `codes` is where the slice's first code of token 0 would
    // stand in shared memory (before it, if an earlier chunk held it).
    __device__ __forceinline__ void multiply(const Segment<kBytes>& w, const uint32_t (&scale)[2][kPlanes],
                                             int32_t segment, SharedBytes shared, int32_t codes,
                                             int32_t chunk_codes, int32_t (&sums)[kTiles][4],
                                             int32_t (&group_sums)[kTiles][4]) const {
        // Segment, lane and plane are different bits of a code: what each of them gives is joined by
        // exclusive or, and the tokens of all tiles are swizzled alike.
        const int32_t at = lane_at ^ swizzled(0, code_of_byte(segment * kSegmentBytes, 0));
        multiply_plane<0>(w, scale, at, shared, codes, chunk_codes, sums, group_sums);
        if constexpr (kPlanes > 1)
            multiply_plane<1>(w, scale, at, shared, codes, chunk_codes, sums, group_sums);
        if constexpr (kPlanes > 2)
            multiply_plane<2>(w, scale, at, shared, codes, chunk_codes, sums, group_sums);
        if constexpr (kPlanes > 2)
            multiply_plane<3>(w, scale, at, shared, codes, chunk_codes, sums, group_sums);
    }

  private:
    template <int32_t kPlane>
    __device__ __forceinline__ void multiply_plane(const Segment<kBytes>& w,
                                                   const uint32_t (&scale)[2][kPlanes], int32_t at,
                                                   SharedBytes shared, int32_t codes, int32_t chunk_codes,
                                                   int32_t (&sums)[kTiles][4],
                                                   int32_t (&group_sums)[kTiles][4]) const {
        uint32_t x[kTiles][kBytes / 4];
#pragma unroll
        for (int32_t tile = 0; tile < kTiles; ++tile) {
            const int32_t token = tile * kTileTokens + lane_g;
            load_tokens(shared, codes + token * chunk_codes + (at ^ kPlane * kRun), token < tokens, x[tile]);
        }
#pragma unroll
        for (int32_t step = 0; step < kSteps; ++step) {
            const uint32_t a[4] = {top_codes<kBits, kPlane>(w.low[2 * step], half),
                                   top_codes<kBits, kPlane>(w.high[2 * step], half),
                                   top_codes<kBits, kPlane>(w.low[2 * step + 1], half),
                                   top_codes<kBits, kPlane>(w.high[2 * step + 1], half)};
#pragma unroll
            for (int32_t tile = 0; tile < kTiles; ++tile) {
                const uint32_t b[2] = {x[tile][2 * step], x[tile][2 * step + 1]};
                mma_m16n8k32(kGroups ? group_sums[tile] : sums[tile], a, b);
            }
        }
        if constexpr (kGroups) {
            if (!ends_group(kPlane)) return;
#pragma unroll
            for (int32_t tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int32_t j = 0; j < 4; ++j) {
                    // The power of two first: with it the sum over groups could leave int32.
                    sums[tile][j] +=
                        (group_sums[tile][j] >> shift) * static_cast<int32_t>(scale[j / 2][kPlane]);
                    group_sums[tile][j] = 0;
                }
            }
        }
    }

    static __device__ __forceinline__ void load_tokens(SharedBytes shared, int32_t at, bool valid,
                                                       uint32_t (&x)[4]) {
        const uint4 v = valid ? load_shared16(shared, at) : make_uint4(0u, 0u, 0u, 0u);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    static __device__ __forceinline__ void load_tokens(SharedBytes shared, int32_t at, bool valid,
                                                       uint32_t (&x)[2]) {
        const uint2 v = valid ? load_shared8(shared, at) : make_uint2(0u, 0u);
        x[0] = v.x, x[1] = v.y;
    }
};

// ---- epilogue ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float activate(float t, Activation activation) {
    if (activation == Activation::relu) return t < 0.0f ? 0.0f : t;  // keeps NaN
    if (activation == Activation::gelu)
        return mul_rn(mul_rn(0.5f, t), add_rn(1.0f, erff(mul_rn(t, 0.7071067811865476f))));
    return t;
}

// One element of Y; every step rounded on its own, in the order of docs/design.md, section 3.
__device__ __forceinline__ void finish(const SkinnyGemm& args, const SkinnyPart& part, int32_t acc,
                                       float act_scale, int64_t token, int64_t n) {
    float t = mul_rn(static_cast<float>(acc), act_scale);
    t = mul_rn(t, part.weight_scale[args.tensor_scale ? 0 : n]);
    if (part.bias != nullptr) t = add_rn(t, load_element(part.bias, args.bias_dtype, n));
    t = activate(t, args.activation);
    const int64_t at = token * part.n + n;
    if (part.residual != nullptr) t = add_rn(t, load_element(part.residual, args.residual_dtype, at));
    if (args.y_dtype == DType::int8) {
        const float inv = div_rn(1.0f, *args.out_scale);
        static_cast<int8_t*>(part.y)[at] =
            t == t ? static_cast<int8_t>(quantize_one(t, inv, kNoClip)) : int8_t{0};
    } else {
        store_element(part.y, args.y_dtype, at, t);
    }
}

// ---- the kernel -------------------------------------------------------------------------------------------

template <int32_t kBits, int32_t kBytes, int32_t kTiles, bool kGroups>
__global__ void __launch_bounds__(kSkinnyThreads, (kTiles > 2 || kGroups) ? 1 : 2)
    skinny_kernel(const __grid_constant__ SkinnyGemm args, const __grid_constant__ SkinnyShape shape) {
    using Warp = SkinnyWarp<kBits, kBytes, kTiles, kGroups>;
    constexpr int32_t kDepth = kTiles > 4 ? 2 : 4;
    constexpr bool kMayQuantize = kTiles * kTileTokens <= kMaxTokens;
    constexpr int32_t kFacts = kMayQuantize ? kMaxTokens : 1;

    DQK_DYNAMIC_SHARED(shared);
    DQK_SHARED(float, part_values, kFacts* kSkinnyWarps);
    DQK_SHARED(float, part_values2, kFacts* kSkinnyWarps);
    DQK_SHARED(float, mean, kFacts);
    DQK_SHARED(float, rest, kFacts);
    DQK_SHARED(float, rstd, kFacts);
    DQK_SHARED(float, inv, kFacts);
    DQK_SHARED(float, scale, kFacts);
    DQK_SHARED(uint32_t, arrived, 1);

    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const int32_t warp = thread / 32;
    const int32_t warp_n = warp & (shape.warps_n - 1);
    const int32_t warp_k = warp >> (shape.row_bits - 4);
    const int64_t first_token = int64_t{blockIdx.z} * kSkinnyTokens;
    const int64_t tokens_left = args.m - first_token;
    const int32_t tokens = tokens_left < kSkinnyTokens ? static_cast<int32_t>(tokens_left) : kSkinnyTokens;

    // Which linear, and which of its rows.
    int32_t block = static_cast<int32_t>(blockIdx.x);
    int32_t which = 0;
    while (which + 1 < args.part_count && block >= shape.part_blocks[which])
        block -= shape.part_blocks[which++];
    const SkinnyPart& part = args.parts[which];
    const int64_t first_row = (int64_t{block} * shape.warps_n + warp_n) * kTileRows;

    // Which part of K.
    const int32_t row_bytes = static_cast<int32_t>((args.k + 127) / 128 * (16 * kBits));
    constexpr int32_t kUnitBytes = 32 * kBits;
    const int32_t first_unit = static_cast<int32_t>(blockIdx.y) * shape.slice_units;
    const int32_t slice_left = row_bytes - first_unit * kUnitBytes;
    const int32_t slice_most = shape.slice_units * kUnitBytes;

    Warp w = {};
    w.lane_g = thread % 32 / 4;
    w.lane_t = thread % 4;
    w.lane_at = held(swizzled(w.lane_g, Warp::code_of_byte(w.lane_t * kBytes, 0)));
    w.slice_bytes = first_row >= part.n ? 0 : slice_left < slice_most ? slice_left : slice_most;
    w.low = part.qweight + (first_row + w.lane_g) * row_bytes + first_unit * kUnitBytes;
    w.high = w.low + 8 * row_bytes;
    w.first_code = first_unit * kUnitCodes;
    w.half = args.four_level ? 0x20202020u : 0u;
    w.shift = args.four_level ? 5 : 8 - kBits;
    w.tokens = tokens;
    if constexpr (kGroups) {
        // Padding rows have no multipliers: they read the last row's, and nobody stores their sums.
        const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
        const int64_t last_row = part.n - 1, row = first_row + w.lane_g;
        w.mult = part.group_mult + (row < last_row ? row : last_row) * groups;
        w.mult8 = part.group_mult + (row + 8 < last_row ? row + 8 : last_row) * groups;
        w.ends = held(Warp::planes_that_end(args.group_size));
        w.group_shift = held(args.group_size == 32 ? 5 : args.group_size == 64 ? 6 : 7);
        w.last_group = static_cast<int32_t>(groups - 1);
    }

    // Weights first: they depend on no kernel before this one.
    release_dependents();
    Segment<kBytes> ring[kDepth] = {};
    uint32_t mults[kDepth][2][Warp::kPlanes] = {};
#pragma unroll
    for (int32_t i = 0; i < kDepth; ++i) {
        w.load(i * shape.warps_k + warp_k, ring[i]);
        if constexpr (kGroups) w.load_mult(i * shape.warps_k + warp_k, mults[i]);
    }
    wait_for_producer();

    // The activations of the first chunk.
    const RowFacts facts = {part_values, part_values2, mean, rest, rstd, inv, scale};
    const bool quantize = kMayQuantize && args.x_dtype != DType::int8;
    const int32_t chunk_codes = shape.chunk_units * kUnitCodes;
    const int32_t buffer_bytes = tokens * chunk_codes;
    const auto fill = [&](int32_t chunk) {
        auto* to = reinterpret_cast<int8_t*>(shared) + (chunk & (shape.buffers - 1)) * buffer_bytes;
        const int64_t first = w.first_code + int64_t{chunk} * chunk_codes;
        if constexpr (kMayQuantize) {
            if (quantize) {
                FloatRows(args, facts).codes(first, chunk_codes, to);
                return;
            }
        }
        copy_codes(args, first_token, tokens, first, chunk_codes, to);
        copy_async_commit();
    };
    if constexpr (kMayQuantize) {
        if (quantize) FloatRows(args, facts).scales(blockIdx.x == 0 && blockIdx.y == 0);
    }

    // A chunk is brought in while the one before it is multiplied. Steps keep their place in the ring,
    // wherever a chunk begins, and the code that fills stands here once: it is most of the kernel.
    int32_t sums[kTiles][4] = {};
    int32_t group_sums[kTiles][4] = {};
    const SharedBytes chunks = shared_bytes(shared);
    int32_t end = 0;
#pragma unroll 1
    for (int32_t chunk = 0; end < shape.steps; ++chunk) {
        if (chunk > 0) {
            copy_async_wait<0>();
            __syncthreads();  // the chunk before is complete, and all are done with the one before that
        }
        if (chunk * shape.chunk_steps < shape.steps) fill(chunk);
        if (chunk == 0) continue;
        const int32_t codes = ((chunk - 1) & (shape.buffers - 1)) * buffer_bytes - (chunk - 1) * chunk_codes;
        const int32_t begin = end;
        end = begin + shape.chunk_steps < shape.steps ? begin + shape.chunk_steps : shape.steps;
#pragma unroll 1
        for (int32_t step0 = begin / kDepth * kDepth; step0 < end; step0 += kDepth) {
#pragma unroll
            for (int32_t i = 0; i < kDepth; ++i) {
                const int32_t step = step0 + i;
                const int32_t segment = step * shape.warps_k + warp_k;
                if (step < begin || step >= end || segment * Warp::kSegmentBytes >= w.slice_bytes) continue;
                w.multiply(ring[i], mults[i], segment, chunks, codes, chunk_codes, sums, group_sums);
                const int32_t next = segment + kDepth * shape.warps_k;
                w.load(next, ring[i]);
                if constexpr (kGroups) w.load_mult(next, mults[i]);
            }
        }
    }

    // Sums of the warps meet in shared memory, where the activations were.
    __syncthreads();
    auto* slabs = reinterpret_cast<int32_t*>(shared);
    constexpr int32_t kSlab = kTiles * kTileTokens * kSlabStride;
#pragma unroll
    for (int32_t tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int32_t j = 0; j < 4; ++j) {
            const int32_t token = tile * kTileTokens + 2 * w.lane_t + j % 2;
            slabs[warp * kSlab + token * kSlabStride + w.lane_g + 8 * (j / 2)] =
                kGroups ? sums[tile][j] : sums[tile][j] >> w.shift;
        }
    }
    __syncthreads();

    const int32_t rows = kTileRows * shape.warps_n;
    const auto block_sum = [&](int32_t token, int32_t row) {
        const int32_t* at = slabs + row / kTileRows * kSlab + token * kSlabStride + row % kTileRows;
        int32_t sum = 0;
        for (int32_t k = 0; k < shape.warps_k; ++k) sum += at[k * shape.warps_n * kSlab];
        return sum;
    };
    const int64_t block_row = int64_t{block} * rows;
    int32_t* all_splits = nullptr;
    if (shape.splits > 1) {
        // Each split leaves its tile in the workspace; the last to arrive adds them up. No block waits.
        const int64_t tile_index = int64_t{blockIdx.z} * shape.grid_x + blockIdx.x;
        all_splits = args.workspace + tile_index * shape.splits * shape.tile_ints;
        int32_t* mine = all_splits + blockIdx.y * shape.tile_ints;
        for (int32_t i = thread; i < rows * tokens; i += kSkinnyThreads)
            mine[i] = block_sum(i >> shape.row_bits, i & (rows - 1));
        fence();
        __syncthreads();
        if (thread == 0)
            arrived[0] = arrive(args.counters + tile_index, static_cast<uint32_t>(shape.splits - 1));
        __syncthreads();
        if (arrived[0] != static_cast<uint32_t>(shape.splits - 1)) return;
        fence();
    }
    for (int32_t i = thread; i < rows * tokens; i += kSkinnyThreads) {
        const int32_t token = i >> shape.row_bits, row = i & (rows - 1);
        if (block_row + row >= part.n) continue;
        int32_t sum = 0;
        if (all_splits == nullptr) {
            sum = block_sum(token, row);
        } else {
            for (int32_t split = 0; split < shape.splits; ++split)
                sum += load_fresh(all_splits + split * shape.tile_ints + i);
        }
        const float act_scale = quantize ? scale[token] : args.act_scale[first_token + token];
        finish(args, part, sum, act_scale, first_token + token, block_row + row);
    }
}

}  // namespace dqk
