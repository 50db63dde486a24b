// The tile instructions that csrc/cpu/gemm_amx.cpp uses, in plain C++ after Intel's description of each: its
// real source then runs on any machine with AVX2. What a processor answers with a fault (a tile that is not
// configured, operands whose shapes do not fit) ends the program with a sentence.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dqk::amx_model {

struct Tile {
    int rows, row_bytes;  // 0: not configured
    uint8_t data[16][64];
};
struct Tiles {
    bool configured;
    Tile tile[8];
};
extern thread_local Tiles tiles;
extern std::atomic<int64_t> configured;  // threads whose tiles are in use

inline void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "model of AMX: %s\n", what);
    std::abort();
}
inline Tile& usable(int t) {
    require(tiles.configured && tiles.tile[t].rows > 0, "a tile that is not configured");
    return tiles.tile[t];
}

inline void load_config(const void* memory) {
    uint8_t raw[64];
    std::memcpy(raw, memory, sizeof raw);
    require(raw[0] == 1 && raw[1] == 0, "palette 1 from row 0 on");
    for (int i = 2; i < 16; ++i) require(raw[i] == 0, "reserved bytes are zeros");
    if (!tiles.configured) ++configured;
    tiles.configured = true;
    for (int t = 0; t < 16; ++t) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, raw + 16 + 2 * t, sizeof row_bytes);
        const int rows = raw[48 + t];
        require(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "16 rows of 64 bytes");
        require(t < 8 || rows == 0, "eight tiles");
        if (t < 8) {
            tiles.tile[t] = {};
            tiles.tile[t].rows = rows;
            tiles.tile[t].row_bytes = row_bytes;
        }
    }
}
inline void release() {
    if (tiles.configured) --configured;
    tiles = {};
}
// Rows and bytes outside of the shape become zeros.
inline void load(int t, const void* base, int64_t stride) {
    Tile& to = usable(t);
    std::memset(to.data, 0, sizeof to.data);
    for (int r = 0; r < to.rows; ++r)
        std::memcpy(to.data[r], static_cast<const uint8_t*>(base) + r * stride,
                    static_cast<size_t>(to.row_bytes));
}
inline void store(int t, void* base, int64_t stride) {
    const Tile& from = usable(t);
    for (int r = 0; r < from.rows; ++r)
        std::memcpy(static_cast<uint8_t*>(base) + r * stride, from.data[r],
                    static_cast<size_t>(from.row_bytes));
}
// sums[m][n] += a[m][4k + i] * b[k][4n + i]; sums wrap. A: type of a's bytes, B: of b's.
template <typename A, typename B>
void dot(int sums, int a, int b) {
    Tile &c = usable(sums), &x = usable(a), &w = usable(b);
    require(c.rows == x.rows && c.row_bytes == w.row_bytes && x.row_bytes == 4 * w.rows,
            "shapes that do not fit together");
    for (int m = 0; m < c.rows; ++m)
        for (int n = 0; n < c.row_bytes / 4; ++n) {
            uint32_t sum;
            std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
            for (int k = 0; k < w.rows; ++k)
                for (int i = 0; i < 4; ++i)
                    sum += static_cast<uint32_t>(static_cast<A>(x.data[m][4 * k + i]) *
                                                 static_cast<B>(w.data[k][4 * n + i]));
            std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
        }
}

}  // namespace dqk::amx_model

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig(memory) ::dqk::amx_model::load_config(memory)
#define _tile_release() ::dqk::amx_model::release()
#define _tile_loadd(t, base, stride) ::dqk::amx_model::load(t, base, stride)
#define _tile_stored(t, base, stride) ::dqk::amx_model::store(t, base, stride)
#define _tile_dpbssd(c, a, b) ::dqk::amx_model::dot<int8_t, int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) ::dqk::amx_model::dot<int8_t, uint8_t>(c, a, b)
