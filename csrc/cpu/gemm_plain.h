// The operations of the CPU GEMM in plain C++: what runs where no instruction set is known. Four products
// added to an int32 lane, wrapping, are what vpdpbusd does, so that Plain<32> takes the paths of AVX-VNNI.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/gemm_table.h"

namespace dqk {
namespace {

template <int kLanes>
struct PlainDot {
    static constexpr int64_t kCodes = kLanes, kGrain = kLanes, kXBytes = 1, kVecBytes = kLanes, kSteps = 0;
    static constexpr int kTokens = 2, kPanelRows = 6;
    static constexpr int64_t kPanelSteps = 0;
    static constexpr int32_t kOffset8 = 128, kMultiplierWord = 1;

    struct Vec {
        uint8_t code[kLanes];
    };
    struct X {
        int8_t code[kLanes];
    };
    struct Sum {
        uint32_t lane[kLanes / 4];
    };
    using Partial = Sum;

    static DQK_TARGET Sum zero() { return Sum{}; }
    static DQK_TARGET Sum sum_zero() { return Sum{}; }
    static DQK_TARGET Vec splat(int32_t code) {
        Vec v;
        std::memset(v.code, code, sizeof v.code);
        return v;
    }

    template <typename T>
    static DQK_TARGET T at(const uint8_t* base, int64_t i) {
        T value;
        std::memcpy(&value, base + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        return value;
    }
    template <typename T>
    static DQK_TARGET void put(const T& value, uint8_t* base, int64_t i) {
        std::memcpy(base + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
    }
    static DQK_TARGET Vec load(const uint8_t* base, int64_t i) { return at<Vec>(base, i); }
    static DQK_TARGET void store(const Vec& v, uint8_t* base, int64_t i) { put(v, base, i); }
    static DQK_TARGET X load_x(const uint8_t* row, int64_t i) { return at<X>(row, i); }
    static DQK_TARGET void store_x(const int8_t* q, uint8_t* row, int64_t i) {
        std::memcpy(row + i * kLanes, q, kLanes);
    }
    static DQK_TARGET Partial load_partial(const uint8_t* base, int64_t i) { return at<Partial>(base, i); }
    static DQK_TARGET void store_partial(const Partial& p, uint8_t* base, int64_t i) { put(p, base, i); }

    // vpdpbusd
    static DQK_TARGET Partial multiply(Partial p, const Vec& u, const X& x) {
        for (int i = 0; i < kLanes / 4; ++i) {
            int32_t products = 0;
            for (int j = 4 * i; j < 4 * i + 4; ++j) products += u.code[j] * x.code[j];
            p.lane[i] += static_cast<uint32_t>(products);
        }
        return p;
    }
    static DQK_TARGET void pin(Partial&) {}
    static DQK_TARGET Partial negate(Partial p) {
        for (uint32_t& lane : p.lane) lane = 0u - lane;
        return p;
    }
    static DQK_TARGET Sum drain(Sum s, const Partial& p) {
        for (int i = 0; i < kLanes / 4; ++i) s.lane[i] += p.lane[i];
        return s;
    }

    // Those of the groups that one vector holds, lane by lane.
    template <int kGroup>
    static DQK_TARGET Sum multipliers(const int32_t* words) {
        Sum m;
        for (int i = 0; i < kLanes / 4; ++i) m.lane[i] = static_cast<uint32_t>(words[4 * i / kGroup]);
        return m;
    }
    static DQK_TARGET Sum drain_scaled(Sum s, const Partial& p, const Sum& m) {
        for (int i = 0; i < kLanes / 4; ++i) s.lane[i] += p.lane[i] * m.lane[i];
        return s;
    }

    // Panels: a lane is a column.
    static DQK_TARGET Sum drain_columns(Sum s, const Partial& p, const Sum& m) {
        return drain_scaled(s, p, m);
    }
    static DQK_TARGET X broadcast(const uint8_t* word) {
        X x;
        for (int i = 0; i < kLanes; i += 4) std::memcpy(x.code + i, word, 4);
        return x;
    }
    static DQK_TARGET Partial broadcast_start(const uint8_t* word) {
        Partial p;
        for (uint32_t& lane : p.lane) std::memcpy(&lane, word, 4);
        return p;
    }
    static DQK_TARGET Sum load_sum(const int32_t* from) {
        return at<Sum>(reinterpret_cast<const uint8_t*>(from), 0);
    }
    static DQK_TARGET void store_sum(const Sum& s, int32_t* to) { put(s, reinterpret_cast<uint8_t*>(to), 0); }
    static DQK_TARGET int32_t start(const uint8_t* x, int64_t codes, int32_t offset) {
        int32_t sum = 0;
        for (int64_t i = 0; i < codes; ++i) sum += static_cast<int8_t>(x[i]);
        return -offset * sum;
    }
    template <typename F>
    static DQK_TARGET void pack_block(const uint8_t* rows, int64_t row_bytes, uint8_t* panel, int64_t step) {
        for (int64_t r = 0; r < 8; ++r) {
            Vec u[kBlockK / kCodes];
            unpack<F>(rows + r * row_bytes, u);
            for (int64_t k = 0; k < kBlockK; ++k)
                panel[k / 4 * step + r * 4 + k % 4] = u[k / kLanes].code[k % kLanes];
        }
    }

    static DQK_TARGET int32_t total(const Sum& s) {
        uint32_t sum = 0;
        for (const uint32_t lane : s.lane) sum += lane;
        return static_cast<int32_t>(sum);
    }
    static DQK_TARGET void reduce(const Sum (&s)[kGemmRows], int32_t* acc) {
        for (int64_t r = 0; r < kGemmRows; ++r) acc[r] = total(s[r]);
    }
    static DQK_TARGET void add_reduced(const Sum (&s)[kGemmRows], int32_t* acc) {
        for (int64_t r = 0; r < kGemmRows; ++r) acc[r] = wrap_add(acc[r], total(s[r]));
    }

    // The 128 codes of a block, in the order of k.
    template <typename F>
    static DQK_TARGET void unpack(const uint8_t* block, Vec (&u)[kBlockK / kCodes]) {
        constexpr int kRun = static_cast<int>(block_bytes(F::kBits)), kMask = (1 << F::kBits) - 1;
        for (int p = 0; p < planes(F::kBits); ++p)
            for (int j = 0; j < kRun; ++j) {
                const int field = (block[j] >> (F::kBits * p)) & kMask, k = p * kRun + j;
                const int flipped = field ^ (1 << (F::kBits - 1));
                u[k / kLanes].code[k % kLanes] = static_cast<uint8_t>(flipped * F::kFactor);
            }
    }
};

template <int kLanes>
struct Plain {
    using One8 = PlainDot<kLanes>;
    using Many8 = PlainDot<kLanes>;
    using Narrow4 = PlainDot<kLanes>;
    using Narrow2 = PlainDot<kLanes>;

    static DQK_TARGET void widen(const void* from, DType dtype, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = load_element(from, dtype, i);
    }
    static DQK_TARGET void narrow(const float* from, int64_t count, void* to, DType dtype) {
        for (int64_t i = 0; i < count; ++i) store_element(to, dtype, i, from[i]);
    }
};

}  // namespace
}  // namespace dqk
