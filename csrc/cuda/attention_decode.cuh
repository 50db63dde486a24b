// Decode attention over an int8 cache, from float queries to float output in one launch (docs/design.md,
// "Attention").
//
// A block has one head of a set of slots, (row, query) pairs that see the same keys: the queries of a row, or
// those of all rows that share a cache. Its warps take tiles of 32 keys. First pass: K is the A operand of
// mma.m16n8k32.s8 and slots are its n = 8; the scores go to shared memory, their maximum and that of the V
// scales are kept. Second pass, when the maxima are final: a lane takes 8 keys of one slot, rounds their
// shares to codes, and those are the B operand as they stand; V is the A operand, its dimensions the rows,
// four keys of a dimension in one register: a 4 x 4 transposition of bytes. The order of K inside a dot
// product is free, and so is which dimension is which row.
//
// Every sum and maximum is one of integers or has no order, so a result depends on no warp, split, mate or
// hidden key. attention_shape.h tells the two forms apart.
#pragma once
#include "cuda/attention_input.cuh"

namespace dqk {

// What a launch does; `both` needs no other.
enum class AttentionPart : int32_t { both = 0, scores, values };

// ---- the two passes of a warp -----------------------------------------------------------------------------

template <int32_t kSegments, int32_t kTiles>
struct AttentionWarp {
    int32_t g, t;  // of the lane
    int32_t slots;
    float top[kTiles][2];    // largest score so far of slots 8 tile + 2t and the next; a NaN counts as +inf,
                             // which nothing finite reaches
    float v_max[kTiles][2];  // and largest V scale

    // Scores of 32 keys from `first` on, and their V scales: rows of `scores`, by slot, the scales behind the
    // last one. What it needs of the slots comes from shared memory each time: registers are scarcer than
    // loads.
    __device__ __forceinline__ void score(const CudaAttentionDecode& args, const SlotFacts& facts,
                                          const KeyTile<kSegments>& keys, int32_t first, float* scores,
                                          int32_t stride) {
        constexpr int32_t kDims = kSegments * kDimSegment;
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
            int32_t dots[kTiles][4] = {};
#pragma unroll
            for (int32_t segment = 0; segment < kSegments; ++segment) {
                const uint32_t (&low)[4] = keys.row[2 * half][segment];
                const uint32_t (&high)[4] = keys.row[2 * half + 1][segment];
#pragma unroll
                for (int32_t tile = 0; tile < kTiles; ++tile) {
                    if (tile * kSlotTile >= slots) continue;
                    const uint4 q = *reinterpret_cast<const uint4*>(
                        facts.codes + (tile * kSlotTile + g) * kDims + segment * kDimSegment + 16 * t);
                    const uint32_t a[2][4] = {{low[0], high[0], low[1], high[1]},
                                              {low[2], high[2], low[3], high[3]}};
                    const uint32_t b[2][2] = {{q.x, q.y}, {q.z, q.w}};
                    mma_m16n8k32(dots[tile], a[0], b[0]);
                    mma_m16n8k32(dots[tile], a[1], b[1]);
                }
            }
#pragma unroll
            for (int32_t tile = 0; tile < kTiles; ++tile) {
                if (tile * kSlotTile >= slots) continue;
#pragma unroll
                for (int32_t j = 0; j < 2; ++j) {
                    const int32_t slot = tile * kSlotTile + 2 * t + j;
                    const float q_scale = facts.scale[slot];
                    const int32_t length = facts.length[slot];
#pragma unroll
                    for (int32_t i = 0; i < 2; ++i) {
                        const int32_t at = 16 * half + 8 * i + g;
                        const float k_scale = keys.k_scale[2 * half + i],
                                    v_scale = keys.v_scale[2 * half + i];
                        const bool seen = first + at < length;
                        float s = mul_rn(mul_rn(static_cast<float>(dots[tile][2 * i + j]), q_scale), k_scale);
                        if (args.bias != nullptr && seen)
                            s = add_rn(
                                s, bias_element(args, facts.bias[slot] + (first + at) * args.bias_stride[3]));
                        s = seen ? s : -kInfinity;
                        top[tile][j] = larger(top[tile][j], not_nan(s));
                        v_max[tile][j] = larger(v_max[tile][j], seen ? not_nan(v_scale) : 0.0f);
                        if (slot < slots) scores[slot * stride + at] = s;
                    }
                }
            }
        }
        if (t == 0) {
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) scores[slots * stride + 8 * i + g] = keys.v_scale[i];
        }
    }

    // sums[tile][segment][m][..] += shares . V of 32 keys, and e[tile] += the rounded shares of slot 8 tile +
    // g. shift, v_inv, spoilt: of that slot.
    __device__ __forceinline__ void add_values(const ValueTile<kSegments>& values, const float* scores,
                                               int32_t stride, const float (&shift)[kTiles],
                                               const float (&v_inv)[kTiles], const bool (&spoilt)[kTiles],
                                               int32_t (&e)[kTiles],
                                               int32_t (&sums)[kTiles][kSegments][4][4]) const {
        uint32_t b[kTiles][2] = {};
#pragma unroll
        for (int32_t tile = 0; tile < kTiles; ++tile) {
            const int32_t slot = tile * kSlotTile + g;
            if (slot >= slots || spoilt[tile]) continue;
#pragma unroll
            for (int32_t half = 0; half < 2; ++half) {
                const auto s4 = *reinterpret_cast<const float4*>(scores + slot * stride + 8 * t + 4 * half);
                const auto v4 = *reinterpret_cast<const float4*>(scores + slots * stride + 8 * t + 4 * half);
                const float s[4] = {s4.x, s4.y, s4.z, s4.w}, v[4] = {v4.x, v4.y, v4.z, v4.w};
                uint32_t c[4];
#pragma unroll
                for (int32_t j = 0; j < 4; ++j) {
                    const float x = mul_rn(add_rn(s[j], -shift[tile]), 1.4426950408889634f);
                    const float share = mul_rn(kQuantMax, exp2_approx(x));
                    const float ratio = mul_rn(v[j], v_inv[tile]);
                    // Below 2^22 both: the integer stands in the low bits (rounding.h). What is hidden has
                    // share 0, and its scale may be anything.
                    e[tile] += static_cast<int32_t>(float_bits(add_rn(share, kMagic)) - kMagicBits);
                    const float scaled = share > 0.0f ? mul_rn(share, ratio < 1.0f ? ratio : 1.0f) : 0.0f;
                    c[j] = float_bits(add_rn(scaled, kMagic));
                }
                b[tile][half] = permute_bytes(permute_bytes(c[0], c[1], 0x0040u),
                                              permute_bytes(c[2], c[3], 0x0040u), 0x5410u);
            }
        }
#pragma unroll
        for (int32_t segment = 0; segment < kSegments; ++segment) {
#pragma unroll
            for (int32_t quad = 0; quad < 2; ++quad) {
                uint32_t low[4], high[4];
                transpose4(values.row[0][segment][quad], values.row[1][segment][quad],
                           values.row[2][segment][quad], values.row[3][segment][quad], low);
                transpose4(values.row[4][segment][quad], values.row[5][segment][quad],
                           values.row[6][segment][quad], values.row[7][segment][quad], high);
#pragma unroll
                for (int32_t pair = 0; pair < 2; ++pair) {
                    const uint32_t a[4] = {low[2 * pair], low[2 * pair + 1], high[2 * pair],
                                           high[2 * pair + 1]};
#pragma unroll
                    for (int32_t tile = 0; tile < kTiles; ++tile)
                        if (tile * kSlotTile < slots)
                            mma_m16n8k32(sums[tile][segment][2 * quad + pair], a, b[tile]);
                }
            }
        }
    }
};

// ---- the kernel -------------------------------------------------------------------------------------------

// Where the sum of a dimension stands among those of its slot: neighbouring lanes have dimensions 8 apart.
__device__ __forceinline__ int32_t sum_place(int32_t dim) {
    return dim / kDimSegment * kDimSegment + dim % 8 * 8 + dim % kDimSegment / 8;
}

// vs_max * sum(c v) / sum(e); 0 where no key was seen.
__device__ __forceinline__ float attention_output(float top, float v_max, int32_t sum, int32_t e) {
    if (top == kInfinity || v_max == kInfinity) return bits_float(kNanBits);
    return div_rn(mul_rn(v_max, static_cast<float>(sum)), static_cast<float>(e == 0 ? 1 : e));
}

// grid.x: groups * heads, head first; grid.y: splits.
template <int32_t kSegments, int32_t kTiles, bool kVector, bool kKeep>
__global__ void __launch_bounds__(32 * kMaxWarps<kSegments, kTiles, kKeep>, 1)
    attention_decode_kernel(const __grid_constant__ CudaAttentionDecode args,
                            const __grid_constant__ AttentionShape shape, const AttentionPart which) {
    constexpr int32_t kDims = kSegments * kDimSegment;
    constexpr int32_t kWarps = kMaxWarps<kSegments, kTiles, kKeep>;
    constexpr int32_t kSumStride = kDims + 4;  // no bank twice
    DQK_DYNAMIC_SHARED(dynamic);
    DQK_SHARED(int32_t, slot_row, kSlots);
    DQK_SHARED(int32_t, slot_query, kSlots);
    DQK_SHARED(int32_t, slot_length, kSlots);
    DQK_SHARED(int64_t, slot_bias, kSlots);
    DQK_SHARED(float, slot_scale, kSlots);
    DQK_SHARED(int8_t, codes, kSlots* kDims);
    DQK_SHARED(uint32_t, counts, kMaxAttentionWarps);
    DQK_SHARED(float, tops, kWarps* kSlots);
    DQK_SHARED(float, v_maxima, kWarps* kSlots);
    DQK_SHARED(int32_t, sums, kSlots* kSumStride);
    DQK_SHARED(int32_t, e_sums, kSlots);
    DQK_SHARED(float, slot_top, kSlots);
    DQK_SHARED(float, slot_v_max, kSlots);
    DQK_SHARED(uint32_t, arrived, 1);

    const int32_t thread = static_cast<int32_t>(threadIdx.x), threads = 32 * shape.warps;
    const int32_t lane = thread % 32, warp = thread / 32;
    const auto heads = static_cast<uint32_t>(args.heads);
    const int64_t group = blockIdx.x / heads, head = blockIdx.x % heads;
    const int32_t split = kKeep ? 0 : static_cast<int32_t>(blockIdx.y);
    const auto part = kKeep ? AttentionPart::both : which;
    const SlotFacts facts = {slot_row, slot_query, slot_length, slot_bias, codes, slot_scale, counts};

    if (args.shared && group == args.caches) {  // rows whose source is no cache
        if (part == AttentionPart::scores || split > 0) return;
#pragma unroll 1
        for (int64_t row = thread; row < args.rows; row += threads) {
            if (args.source[row] >= 0 && args.source[row] < args.caches) continue;
            const int64_t at = (row * args.heads + head) * args.queries * args.head_dim;
#pragma unroll 1
            for (int64_t i = 0; i < args.queries * args.head_dim; ++i)
                store_element(args.out, args.dtype, at + i, bits_float(kNanBits));
        }
        return;
    }

    AttentionKeys<kSegments, kVector> keys = {};
    const int64_t plane = (args.by_key ? head : group * args.heads + head) * args.capacity;
    keys.k = args.k + plane * args.head_dim;
    keys.v = args.v + plane * args.head_dim;
    keys.k_scale = args.k_scale + plane;
    keys.v_scale = args.v_scale + plane;
    keys.source = args.by_key ? args.source + group * args.capacity : nullptr;
    keys.cache_keys = static_cast<int32_t>(args.heads * args.capacity);
    keys.caches = static_cast<int32_t>(args.caches);
    keys.head_dim = static_cast<int32_t>(args.head_dim);

    auto* workspace = static_cast<unsigned char*>(args.workspace) + shape.amax_bytes;
    auto* split_tops = reinterpret_cast<float2*>(workspace);  // [rows, heads, queries][splits]
    auto* split_sums = reinterpret_cast<int32_t*>(workspace + shape.top_bytes);
    constexpr int32_t kPartInts = kDims + 1;
    const auto vector_of = [&](int32_t slot) {
        return (slot_row[slot] * args.heads + head) * args.queries + slot_query[slot];
    };

    const int32_t pass = kKeep ? shape.pass : kTiles * kSlotTile;
    // Names the slots of the pass that begins with `first_slot`; how many there are.
    const auto name_slots = [&](int64_t first_slot) {
        if (args.shared) return find_mates(args, facts, group, first_slot, pass);
        const int64_t left = args.queries - first_slot;
        const int32_t slots = left < pass ? static_cast<int32_t>(left) : pass;
        if (thread < slots) {
            slot_row[thread] = static_cast<int32_t>(group);
            slot_query[thread] = static_cast<int32_t>(first_slot) + thread;
        }
        return slots;
    };
#pragma unroll 1
    for (int64_t first_slot = 0;; first_slot += pass) {
        const int32_t slots = name_slots(first_slot);
        if (slots <= 0) break;
        if (thread < kSlots) {
            int64_t length = 0;
            if (thread < slots) {
                const int64_t row = slot_row[thread], query = slot_query[thread];
                length = args.lengths[row] < args.capacity ? args.lengths[row] : args.capacity;
                if (args.causal) length += query + 1 - args.queries;
                slot_bias[thread] =
                    row * args.bias_stride[0] + head * args.bias_stride[1] + query * args.bias_stride[2];
            }
            slot_length[thread] = static_cast<int32_t>(length);
            e_sums[thread] = 0;
        }
#pragma unroll 1
        for (int32_t i = thread; i < kSlots * kSumStride; i += threads) sums[i] = 0;
        __syncthreads();
        int32_t end = 0;
#pragma unroll 1
        for (int32_t slot = 0; slot < slots; ++slot) end = slot_length[slot] > end ? slot_length[slot] : end;
        keys.last = end - 1;
        const int32_t begin = split * shape.split_keys;
        end = end < begin + shape.split_keys ? end : begin + shape.split_keys;  // of this block
        const int32_t step = shape.warps * kTileKeys;
        const int32_t first_key = begin + warp * kTileKeys;

        // Scores of all keys, or of one tile per warp.
        const int32_t stride = ((!kKeep    ? kTileKeys
                                 : end > 0 ? end
                                           : 0) +
                                kTileKeys - 1) /
                                   kTileKeys * kTileKeys +
                               4;
        float* scores =
            reinterpret_cast<float*>(dynamic) + (kKeep ? warp * kTileKeys : warp * (slots + 1) * stride);

        AttentionWarp<kSegments, kTiles> w = {};
        w.g = lane / 4, w.t = lane % 4, w.slots = slots;
        KeyTile<kSegments> ready = {}, after = {};
        constexpr bool kTwoAhead = kKeep && kSegments == 1;
        if (part != AttentionPart::values && first_key < end) {  // on their way while Q is quantized
            load_keys(keys, first_key, w.g, w.t, ready);
            if (kTwoAhead && first_key + step < end) load_keys(keys, first_key + step, w.g, w.t, after);
        }
        quantize_slots<kDims>(args, shape, facts, slots, head);
        __syncthreads();

#pragma unroll
        for (int32_t tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int32_t j = 0; j < 2; ++j) w.top[tile][j] = -kInfinity, w.v_max[tile][j] = 0.0f;
        }
        if (part != AttentionPart::values) {
#pragma unroll 1
            for (int32_t key = first_key; key < end; key += step) {
                const KeyTile<kSegments> tile = ready;
                if constexpr (kTwoAhead) {
                    ready = after;
                    if (key + 2 * step < end) load_keys(keys, key + 2 * step, w.g, w.t, after);
                } else {
                    if (key + step < end) load_keys(keys, key + step, w.g, w.t, ready);
                }
                w.score(args, facts, tile, key, kKeep ? scores + (key - first_key) : scores, stride);
            }
#pragma unroll
            for (int32_t tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int32_t j = 0; j < 2; ++j) {
                    float top = w.top[tile][j], v_max = w.v_max[tile][j];
#pragma unroll
                    for (int32_t other = 4; other < 32; other *= 2) {
                        top = larger(top, __shfl_xor_sync(kWholeWarp, top, other));
                        v_max = larger(v_max, __shfl_xor_sync(kWholeWarp, v_max, other));
                    }
                    if (w.g == 0) {
                        tops[warp * kSlots + tile * kSlotTile + 2 * w.t + j] = top;
                        v_maxima[warp * kSlots + tile * kSlotTile + 2 * w.t + j] = v_max;
                    }
                }
            }
        }

        // V is on its way while the maxima meet.
        ValueTile<kSegments> next = {};
        if (kKeep && first_key < end) load_values(keys, first_key, w.g, w.t, next);
        __syncthreads();

        // The final maxima of slot `lane % 16`, and then of the lane's own.
        float top = -kInfinity, v_max = 0.0f;
        const int32_t lane_slot = lane % kSlots;
        if (lane_slot < kTiles * kSlotTile) {
            if (part != AttentionPart::values) {
#pragma unroll 1
                for (int32_t i = lane / kSlots; i < shape.warps; i += 2) {
                    top = larger(top, tops[i * kSlots + lane_slot]);
                    v_max = larger(v_max, v_maxima[i * kSlots + lane_slot]);
                }
            } else if (lane_slot < slots) {
                const float2* from = split_tops + vector_of(lane_slot) * shape.splits;
#pragma unroll 1
                for (int32_t i = lane / kSlots; i < shape.splits; i += 2) {
                    top = larger(top, from[i].x);
                    v_max = larger(v_max, from[i].y);
                }
            }
        }
        top = larger(top, __shfl_xor_sync(kWholeWarp, top, kSlots));
        v_max = larger(v_max, __shfl_xor_sync(kWholeWarp, v_max, kSlots));
        if (part == AttentionPart::scores) {
            if (thread < slots)
                split_tops[vector_of(thread) * shape.splits + split] = make_float2(top, v_max);
            __syncthreads();
            continue;
        }
        float shift[kTiles], v_inv[kTiles];
        bool spoilt[kTiles];
#pragma unroll
        for (int32_t tile = 0; tile < kTiles; ++tile) {
            const float mine = __shfl_sync(kWholeWarp, top, tile * kSlotTile + w.g);
            const float largest = __shfl_sync(kWholeWarp, v_max, tile * kSlotTile + w.g);
            shift[tile] = mine == -kInfinity ? 0.0f : mine;
            v_inv[tile] = div_rn(1.0f, largest > 0.0f ? largest : 1.0f);
            spoilt[tile] = mine == kInfinity || largest == kInfinity;
        }

        int32_t e[kTiles] = {};
        int32_t acc[kTiles][kSegments][4][4] = {};
        if constexpr (kKeep) {
#pragma unroll 1
            for (int32_t key = first_key; key < end; key += step) {
                const ValueTile<kSegments> values = next;
                if (key + step < end) load_values(keys, key + step, w.g, w.t, next);
                w.add_values(values, scores + (key - first_key), stride, shift, v_inv, spoilt, e, acc);
            }
        } else {
#pragma unroll 1
            for (int32_t key = first_key; key < end; key += step) {
                __syncwarp();  // the tile before has been read
                load_keys(keys, key, w.g, w.t, ready);
                w.score(args, facts, ready, key, scores, stride);
                __syncwarp();
                load_values(keys, key, w.g, w.t, next);
                w.add_values(next, scores, stride, shift, v_inv, spoilt, e, acc);
            }
        }

        // The warps' sums meet; integers, so in any order.
#pragma unroll
        for (int32_t tile = 0; tile < kTiles; ++tile) {
            int32_t total = e[tile];
            total += __shfl_xor_sync(kWholeWarp, total, 1);
            total += __shfl_xor_sync(kWholeWarp, total, 2);
            if (w.t == 0 && tile * kSlotTile + w.g < slots)
                atomic_add(e_sums + tile * kSlotTile + w.g, total);
#pragma unroll
            for (int32_t j = 0; j < 4; ++j) {
                const int32_t slot = tile * kSlotTile + 2 * w.t + j % 2;
                if (slot >= slots) continue;
#pragma unroll
                for (int32_t segment = 0; segment < kSegments; ++segment) {
#pragma unroll
                    for (int32_t m = 0; m < 4; ++m)
                        atomic_add(
                            sums + slot * kSumStride + segment * kDimSegment + (2 * m + j / 2) * 8 + w.g,
                            acc[tile][segment][m][j]);
                }
            }
        }
        if (thread < slots) slot_top[thread] = top, slot_v_max[thread] = v_max;
        __syncthreads();
        const int32_t dims = static_cast<int32_t>(args.head_dim);
        if (part == AttentionPart::both) {
#pragma unroll 1
            for (int32_t i = thread; i < slots * dims; i += threads) {
                const int32_t slot = i / dims, dim = i % dims;
                const float y = attention_output(slot_top[slot], slot_v_max[slot],
                                                 sums[slot * kSumStride + sum_place(dim)], e_sums[slot]);
                store_element(args.out, args.dtype, vector_of(slot) * dims + dim, y);
            }
        } else {
#pragma unroll 1
            for (int32_t i = thread; i < slots * kPartInts; i += threads) {
                const int32_t slot = i / kPartInts, place = i % kPartInts;
                split_sums[(vector_of(slot) * shape.splits + split) * kPartInts + place] =
                    place < kDims ? sums[slot * kSumStride + place] : e_sums[slot];
            }
        }
        __syncthreads();  // before the next slots' facts are written
    }
    if (part != AttentionPart::values) return;

    // The last block of a group and head adds up what its splits left. No block waits.
    fence();
    __syncthreads();
    if (thread == 0) arrived[0] = arrive(args.counters + blockIdx.x, static_cast<uint32_t>(shape.splits - 1));
    __syncthreads();
    if (arrived[0] != static_cast<uint32_t>(shape.splits - 1)) return;
    fence();
    const int32_t dims = static_cast<int32_t>(args.head_dim);
#pragma unroll 1
    for (int64_t first_slot = 0;; first_slot += pass) {
        const int32_t slots = name_slots(first_slot);
        if (slots <= 0) break;
        __syncthreads();
        for (int32_t i = thread; i < slots * dims; i += threads) {
            const int32_t slot = i / dims, dim = i % dims;
            const float2* maxima = split_tops + vector_of(slot) * shape.splits;
            const int32_t* from = split_sums + vector_of(slot) * shape.splits * kPartInts;
            float top = -kInfinity, v_max = 0.0f;
            int32_t sum = 0, e = 0;
            for (int32_t j = 0; j < shape.splits; ++j) {
                top = larger(top, maxima[j].x);
                v_max = larger(v_max, maxima[j].y);
                sum += load_fresh(from + j * kPartInts + sum_place(dim));
                e += load_fresh(from + j * kPartInts + kDims);
            }
            store_element(args.out, args.dtype, vector_of(slot) * dims + dim,
                          attention_output(top, v_max, sum, e));
        }
        __syncthreads();  // before the next slots are named
    }
}

}  // namespace dqk
