// How a call of decode attention is cut up. Host arithmetic, the same on every machine; no choice made here
// changes a result.
//
// Two forms. `keep`: a block keeps the scores of all its slots and keys in shared memory between its two
// passes over the keys, and K is read once. `redo`: it works the scores of each tile out again, so that any
// number of keys will do, and the keys may be split over blocks: then one launch finds the maxima of all
// splits, a second one their sums.
#pragma once
#include <cstdint>

#include "dqk/api.h"
#include "dqk/shape.h"

namespace dqk {

constexpr int32_t kTileKeys = 32;    // keys a warp handles at once
constexpr int32_t kSlotTile = 8;     // slots, (row, query) pairs, side by side in one mma
constexpr int32_t kSlots = 16;       // and of one pass over the keys, at most
constexpr int32_t kDimSegment = 64;  // dimensions a warp loads at once: 16 bytes per lane and key
constexpr int32_t kMaxAttentionDim = 128;
constexpr int32_t kMaxAttentionWarps = 16;
constexpr int32_t kMaxAttentionSplits = 64;
constexpr int32_t kMaxAmaxBlocks = 256;  // that take the largest |q| under per_tensor

struct AttentionShape {
    int64_t groups;        // sets of slots that see the same keys: a row, or all rows of one cache
    int32_t segments;      // of 64 dimensions, 1 or 2
    int32_t tiles;         // of 8 slots, 1 or 2
    bool vector;           // rows of the caches are whole multiples of 16 bytes
    bool keep;             //
    int32_t pass;          // slots of one pass over the keys, at most
    int32_t warps;         // of a block
    int32_t splits;        // blocks that share the keys of a group and head
    int32_t split_keys;    // keys of one of them, a multiple of kTileKeys
    int32_t shared_bytes;  // for scores
    int32_t amax_blocks;   // 0: not per_tensor
    int64_t amax_bytes;    // of the workspace, first
    int64_t top_bytes;     // maxima of every split: [rows, heads, queries][splits] pairs of floats
    int64_t part_bytes;    // and sums: [rows, heads, queries][splits][dims + 1] int32, the last one of e
};

// Of a block: 16, with 128 registers a thread, where 64 dimensions, 8 slots and kept scores leave that few
// alive.
template <int32_t kSegments, int32_t kTiles, bool kKeep>
constexpr int32_t kMaxWarps =
    kSegments == 1 && kTiles == 1 && kKeep ? kMaxAttentionWarps : kMaxAttentionWarps / 2;
// Bytes for scores: of 48 KiB what the arrays of fixed size leave.
template <int32_t kSegments>
constexpr int32_t kScoreBytes = (kSegments == 1 ? 39 : 35) * 1024;

// Floats from one slot's scores to the next, behind which the V scales stand like those of a slot. Rows that
// are 4 apart modulo 32 banks do not meet, neither when lanes store (slots 2t, keys g) nor when they read
// (slots g, keys 8t).
constexpr int64_t score_stride(int64_t keys) {
    return ceil_div(keys, kTileKeys) * kTileKeys + 4;
}

// False where a choice of the caller's is not to be had.
constexpr bool attention_shape(const CudaAttentionDecode& a, AttentionShape* out) {
    AttentionShape s = {};
    s.groups = a.shared ? a.caches + 1 : a.rows;  // the last one: rows whose source is no cache
    s.segments = a.head_dim > kDimSegment ? 2 : 1;
    s.vector = a.head_dim % 16 == 0 && a.aligned;
    const int64_t mates = a.shared ? ceil_div(a.rows, a.caches) : 1;  // expected to be equally many
    s.tiles = mates * a.queries <= kSlotTile ? 1 : 2;
    if (!s.vector) s.segments = 2, s.tiles = 1;  // one kernel for all such sizes

    const int64_t blocks = (a.shared ? a.caches : a.rows) * a.heads;
    const int64_t tiles = ceil_div(a.capacity, kTileKeys);
    int64_t splits = a.splits;
    if (splits == 0) {
        // A block with 16 warps has 64 KiB under way, so a few thousand keys cost it little more than two
        // round trips to memory; a second launch costs about as much. Beyond, where SMs would be idle, keys
        // are shared.
        splits = 1;
        if (a.capacity >= 4096 && blocks * 2 <= a.sms && a.form != AttentionForm::keep) {
            const int64_t most = a.capacity / 1024, wanted = a.sms / blocks;
            splits = wanted < most ? wanted : most;
            if (splits > kMaxAttentionSplits) splits = kMaxAttentionSplits;
            splits = ceil_div(tiles, ceil_div(tiles, splits));  // each of them with keys
        }
    }
    if (splits > kMaxAttentionSplits || splits > tiles) return false;
    const int64_t split_tiles = ceil_div(tiles, splits);
    if ((splits - 1) * split_tiles >= tiles) return false;  // one of them would have no key
    s.splits = static_cast<int32_t>(splits);
    s.split_keys = static_cast<int32_t>(split_tiles * kTileKeys);

    // Kept where all slots that are expected fit; a pass of fewer, if more come, reads K and V once more.
    const int64_t most = s.segments == 1 ? kScoreBytes<1> : kScoreBytes<2>, stride = score_stride(a.capacity);
    const int64_t full = s.tiles * kSlotTile, room = most / 4 / stride - 1;
    const int64_t expected = mates * a.queries < full ? mates * a.queries : full;
    s.keep = splits == 1 && s.vector && room >= 1 && (room >= expected || a.form == AttentionForm::keep) &&
             a.form != AttentionForm::redo;
    if (a.form == AttentionForm::keep && !s.keep) return false;
    const int64_t slots = a.shared ? a.rows * a.queries : a.queries;
    s.pass = static_cast<int32_t>(full);
    if (s.keep && room < s.pass) s.pass = static_cast<int32_t>(room);
    if (slots < s.pass) s.pass = static_cast<int32_t>(slots);

    const int64_t most_warps =
        s.segments == 1 && s.tiles == 1 && s.keep ? kMaxWarps<1, 1, true> : kMaxWarps<2, 2, false>;
    int64_t warps = a.warps;
    if (warps == 0) {
        // Two blocks on an SM where there are enough of them: one computes while the other waits.
        warps = s.keep && blocks > a.sms ? kMaxAttentionWarps / 2 : most_warps;
        if (split_tiles < warps) warps = split_tiles;
    }
    if (warps < 1 || warps > most_warps) return false;
    s.warps = static_cast<int32_t>(warps);
    s.shared_bytes =
        static_cast<int32_t>((s.pass + 1) * (s.keep ? stride : warps * score_stride(kTileKeys)) * 4);

    if (a.mode == ActMode::per_tensor) {
        const int64_t wanted = ceil_div(a.rows * a.heads * a.queries, 64);
        s.amax_blocks = static_cast<int32_t>(wanted < kMaxAmaxBlocks ? wanted : kMaxAmaxBlocks);
        s.amax_bytes = kMaxAmaxBlocks * 4;
    }
    if (splits > 1) {
        const int64_t parts = a.rows * a.heads * a.queries * splits;  // the caller has seen that it fits
        s.top_bytes = parts * 8;
        s.part_bytes = parts * (s.segments * kDimSegment + 1) * 4;
    }
    *out = s;
    return true;
}

constexpr int64_t workspace_bytes(const AttentionShape& s) {
    return s.amax_bytes + s.top_bytes + s.part_bytes;
}

}  // namespace dqk
