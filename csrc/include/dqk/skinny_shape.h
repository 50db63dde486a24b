// How the skinny GEMM is cut into blocks, warps and trips to shared memory: sizes only, no pointer is read.
//
// K is counted in units of 256 codes, which every width reads in whole segments: a warp takes the 64 bytes of
// a segment (32 where a group is shorter than what 64 bytes hold) from each of 16 weight rows. A block owns
// 16 * warps_n rows and one slice of K; its warps_k warps take the segments of the slice in turn.
#pragma once
#include <cstdint>

#include "dqk/api.h"
#include "dqk/format.h"
#include "dqk/shape.h"

namespace dqk {

constexpr int32_t kSkinnyWarps = 8;
constexpr int32_t kSkinnyThreads = 32 * kSkinnyWarps;
constexpr int32_t kTileRows = 16;      // weight rows of one mma
constexpr int32_t kTileTokens = 8;     // tokens of one mma
constexpr int32_t kSkinnyTokens = 64;  // of one slice of M: the z of the grid
constexpr int32_t kUnitCodes = 256;    // what a slice of K is counted in
// int32 per token in the exchange of partial sums: 16 rows, no bank twice.
constexpr int32_t kSlabStride = 20;
// Bytes; with the static arrays under the 48 KiB that need no opt-in.
constexpr int32_t kSkinnyShared = 40960;

// Bytes that a lane takes of a row at once. All four lanes of a row must stay inside one group (and at 2 bits
// 64 bytes are two blocks, so any group asks for 32).
constexpr int32_t lane_bytes(int32_t bits, int32_t group_size) {
    const bool narrow = group_size != 0 && (bits == 2 || group_size < 64);
    return narrow ? 8 : 16;
}
constexpr int32_t segment_codes(int32_t bits, int32_t lane) {
    return 4 * lane * planes(bits);
}

// Token tiles of a kernel, of which there are four: 1, 2, 4 and 8.
constexpr int32_t token_tiles(int64_t m) {
    return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8;
}

struct SkinnyShape {
    int32_t tiles;        // of tokens, the kernel's template argument
    int32_t lane;         // lane_bytes
    int32_t warps_n;      //
    int32_t warps_k;      // 8 / warps_n
    int32_t row_bits;     // 16 * warps_n = 1 << row_bits
    int32_t splits;       //
    int32_t slice_units;  // units of a block; the last split may have fewer
    int32_t chunk_units;  // of them in shared memory at a time
    int32_t chunk_steps;  // segments a warp takes of a chunk
    int32_t steps;        // and of the slice
    int32_t buffers;      // 1 if the slice fits, else 2
    int32_t part_blocks[kMaxParts];
    int32_t grid_x;        // blocks along N, over all parts
    int32_t grid_z;        // slices of 64 tokens
    int32_t shared_bytes;  //
    int64_t tile_ints;     // workspace of one block
};

// Everything but the choice of warps_n and splits; false if that choice has no room for the activations.
constexpr bool skinny_cut(const SkinnyGemm& args, int32_t warps_n, int32_t splits, SkinnyShape* out) {
    SkinnyShape s = {};
    const int64_t units = ceil_div(args.k, kUnitCodes);
    if ((warps_n != 1 && warps_n != 2 && warps_n != 4 && warps_n != 8) || splits < 1 || splits > units)
        return false;
    s.tiles = token_tiles(args.m);
    s.lane = lane_bytes(args.bits, args.group_size);
    s.warps_n = warps_n;
    s.warps_k = kSkinnyWarps / warps_n;
    s.row_bits = warps_n == 1 ? 4 : warps_n == 2 ? 5 : warps_n == 4 ? 6 : 7;
    s.splits = splits;
    s.slice_units = static_cast<int32_t>(ceil_div(units, splits));
    if ((splits - 1) * static_cast<int64_t>(s.slice_units) >= units) return false;  // a split without work

    const int32_t unit_segments = kUnitCodes / segment_codes(args.bits, s.lane);
    const int64_t tokens = args.m < kSkinnyTokens ? args.m : kSkinnyTokens;
    s.steps = static_cast<int32_t>(ceil_div(static_cast<int64_t>(s.slice_units) * unit_segments, s.warps_k));
    int64_t x_bytes = tokens * s.slice_units * kUnitCodes;
    if (x_bytes <= kSkinnyShared) {
        s.buffers = 1;
        s.chunk_units = s.slice_units;
        s.chunk_steps = s.steps;
    } else {
        // Two buffers, one filled while the other is read; a chunk gives every warp the same number of
        // segments.
        const int32_t granule = s.warps_k > unit_segments ? s.warps_k / unit_segments : 1;
        const int64_t room = kSkinnyShared / (2 * tokens * kUnitCodes);
        s.buffers = 2;
        s.chunk_units = static_cast<int32_t>(room) / granule * granule;
        if (s.chunk_units == 0) return false;
        s.chunk_steps = s.chunk_units * unit_segments / s.warps_k;
        x_bytes = 2 * tokens * s.chunk_units * kUnitCodes;
    }
    const int64_t slab_bytes = int64_t{4} * kSkinnyWarps * s.tiles * kTileTokens * kSlabStride;
    s.shared_bytes = static_cast<int32_t>(x_bytes > slab_bytes ? x_bytes : slab_bytes);

    int64_t blocks = 0;
    for (int32_t part = 0; part < args.part_count; ++part) {
        const int64_t here = ceil_div(args.parts[part].n, kTileRows * warps_n);
        blocks += here;
        if (blocks > 0x7FFFFFFF) return false;
        s.part_blocks[part] = static_cast<int32_t>(here);
    }
    s.grid_x = static_cast<int32_t>(blocks);
    s.grid_z = static_cast<int32_t>(ceil_div(args.m, kSkinnyTokens));
    s.tile_ints = int64_t{kTileRows} * warps_n * s.tiles * kTileTokens;
    *out = s;
    return true;
}

// Picoseconds that a launch is thought to take: what one SM moves, times the rounds of blocks. An argument,
// not a measurement: HBM gives an SM about 24 bytes a ns and L2 about twice that, of which a single block of
// eight warps reaches three quarters; an mma takes an SM about 1.2 ns; blocks that share a tile meet for
// about 2 us (their counters are zeroed before, inside a graph).
constexpr int64_t skinny_cost(const SkinnyGemm& args, const SkinnyShape& s) {
    const int64_t tokens = args.m < kSkinnyTokens ? args.m : kSkinnyTokens;
    const int64_t slice = static_cast<int64_t>(s.slice_units) * kUnitCodes;
    const int64_t rows = kTileRows * s.warps_n;
    const int64_t weights = rows * slice * args.bits / 8;
    const int64_t element = args.x_dtype == DType::int8 ? 1 : args.x_dtype == DType::float32 ? 4 : 2;
    const int64_t x =
        tokens * slice * element + (args.x_dtype == DType::int8 ? 0 : tokens * args.k * element);
    const int64_t products = rows / kTileRows * (slice / 32) * s.tiles * 1200;
    const int64_t rounds = ceil_div(int64_t{s.grid_x} * s.grid_z * s.splits, args.sms);
    int64_t moved = weights * 42 + x * 21;
    if (rounds == 1 && s.tiles <= 2) moved += moved / 3;  // alone on its SM, where two would fit
    const int64_t meeting = s.splits == 1 ? 0 : 2000000 + s.splits * s.tile_ints * 4 * 21;
    return rounds * ((moved > products ? moved : products) + 100000) + meeting;
}

// The choice itself: that of the caller, or the cheapest.
constexpr bool skinny_shape(const SkinnyGemm& args, SkinnyShape* out) {
    if (args.warps_n != 0 && args.splits != 0) return skinny_cut(args, args.warps_n, args.splits, out);
    const int64_t units = ceil_div(args.k, kUnitCodes);
    int64_t best = -1;
    for (int32_t warps_n = 1; warps_n <= kSkinnyWarps; warps_n *= 2) {
        if (args.warps_n != 0 && warps_n != args.warps_n) continue;
        for (int32_t splits = 1; splits <= units && splits <= 16; ++splits) {
            SkinnyShape s = {};
            if ((args.splits != 0 && splits != args.splits) || !skinny_cut(args, warps_n, splits, &s))
                continue;
            const int64_t cost = skinny_cost(args, s);
            if (best >= 0 && cost >= best) continue;
            best = cost;
            *out = s;
        }
    }
    return best >= 0;
}

constexpr int64_t workspace_ints(const SkinnyShape& s) {
    return s.splits == 1 ? 0 : s.tile_ints * s.splits * s.grid_x * s.grid_z;
}
constexpr int64_t counter_count(const SkinnyShape& s) {
    return s.splits == 1 ? 0 : int64_t{s.grid_x} * s.grid_z;
}

}  // namespace dqk
