// Packed format v1, the layout of `qweight` in memory and in files (docs/design.md, "Packed format v1").
//
// A byte holds P = 8 / bits codes. K is padded to blocks of 128 codes and N to 16 rows; padding is code 0.
// Row n, block b takes L = 128 / P bytes, and byte j of it holds plane p in its bits [bits*p, bits*p + bits):
//     code of k = 128*b + p*L + j.
// So one plane is a contiguous run of K, and activations are never permuted.
#pragma once
#include <cstdint>

#include "dqk/shape.h"

namespace dqk {

constexpr int32_t kFormatVersion = 1;
constexpr int64_t kBlockK = 128;
constexpr int64_t kBlockN = 16;

constexpr bool valid_bits(int32_t bits) {
    return bits == 2 || bits == 4 || bits == 8;
}
constexpr int32_t planes(int32_t bits) {
    return 8 / bits;
}
constexpr int64_t block_bytes(int32_t bits) {
    return kBlockK / planes(bits);
}

// Codes are two's complement; the quantizer uses less of it (4 bits: -7..7), storage admits all.
constexpr int32_t code_min(int32_t bits) {
    return -(1 << (bits - 1));
}
constexpr int32_t code_max(int32_t bits) {
    return (1 << (bits - 1)) - 1;
}

// The bits that a code adds to its byte.
constexpr uint8_t plane_bits(int32_t code, int32_t bits, int32_t plane) {
    return static_cast<uint8_t>((static_cast<uint32_t>(code) & ((1u << bits) - 1u)) << (bits * plane));
}
// Kernels unpack into the TOP bits of a byte, so the sign needs no work: the result is code * 2^(8 - bits),
// and that power of two comes off the exact int32 sum.
constexpr int8_t top_bits(uint8_t byte, int32_t bits, int32_t plane) {
    return static_cast<int8_t>(static_cast<uint8_t>((byte << (8 - bits - bits * plane)) & (0xFF00u >> bits)));
}
constexpr int8_t code_of(uint8_t byte, int32_t bits, int32_t plane) {
    return static_cast<int8_t>(top_bits(byte, bits, plane) >> (8 - bits));
}

struct PackedShape {
    int64_t rows;       // N padded
    int64_t row_bytes;  // K padded, in bytes
    int64_t bytes;      // rows * row_bytes
};

// False if the sizes do not fit in int64.
constexpr bool packed_shape(int64_t n, int64_t k, int32_t bits, PackedShape* out) {
    int64_t padded_k = 0;
    if (!checked_round_up(n, kBlockN, &out->rows) || !checked_round_up(k, kBlockK, &padded_k)) return false;
    out->row_bytes = padded_k / planes(bits);
    return checked_mul(out->rows, out->row_bytes, &out->bytes);
}

static_assert(block_bytes(8) == 128 && block_bytes(4) == 64 && block_bytes(2) == 32, "bytes of 128 codes");
static_assert(plane_bits(-1, 4, 0) == 0x0F && plane_bits(-1, 4, 1) == 0xF0, "plane 0 is the low nibble");
static_assert(plane_bits(-2, 2, 3) == 0x80 && plane_bits(1, 2, 1) == 0x04, "plane p sits at bit 2p");
static_assert(top_bits(0xF3, 4, 0) == 0x30 && top_bits(0xF3, 4, 1) == -16, "code * 16");
static_assert(code_of(0xF3, 4, 0) == 3 && code_of(0xF3, 4, 1) == -1, "sign extends");
static_assert(code_of(0xE4, 2, 0) == 0 && code_of(0xE4, 2, 1) == 1 && code_of(0xE4, 2, 2) == -2 &&
                  code_of(0xE4, 2, 3) == -1,
              "four 2-bit codes, plane 0 lowest");
static_assert(code_of(0x80, 8, 0) == -128, "one plane at 8 bits");

}  // namespace dqk
