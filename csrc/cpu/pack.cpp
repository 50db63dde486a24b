// Pack and unpack planar codes (format.h). Inner loops run over contiguous bytes, so that compilers
// vectorise.
#include <algorithm>
#include <cstring>

#include "dqk/api.h"
#include "dqk/format.h"

namespace dqk {
namespace {

// One block of up to 128 codes, `count` of them real -> its bytes. Returns whether every code fits its width.
template <int32_t kBits>
bool pack_block(const int8_t* codes, int64_t count, uint8_t* out) {
    constexpr int64_t kLength = block_bytes(kBits);
    constexpr int32_t kMask = (1 << kBits) - 1;
    uint8_t excess = 0;  // the bits of code - min above the width, gathered without a branch in the loop
    std::memset(out, 0, kLength);
    for (int32_t plane = 0; plane < planes(kBits); ++plane) {
        const int64_t first = plane * kLength;
        const int64_t real = std::min(kLength, count - first);
        for (int64_t j = 0; j < real; ++j) {
            const int8_t code = codes[first + j];
            excess = static_cast<uint8_t>(excess | ((code - code_min(kBits)) & ~kMask));
            out[j] = static_cast<uint8_t>(out[j] | plane_bits(code, kBits, plane));
        }
    }
    return excess == 0;
}

template <int32_t kBits>
void unpack_block(const uint8_t* packed, int64_t count, int8_t* codes) {
    constexpr int64_t kLength = block_bytes(kBits);
    for (int32_t plane = 0; plane < planes(kBits); ++plane) {
        const int64_t first = plane * kLength;
        const int64_t real = std::min(kLength, count - first);
        for (int64_t j = 0; j < real; ++j) codes[first + j] = code_of(packed[j], kBits, plane);
    }
}

template <int32_t kBits>
Status pack_rows(const int8_t* codes, int64_t n, int64_t k, const PackedShape& shape, uint8_t* out) {
    bool fits = true;
    for (int64_t row = 0; row < n; ++row)
        for (int64_t first = 0, block = 0; first < k; first += kBlockK, ++block)
            fits &= pack_block<kBits>(codes + row * k + first, std::min(kBlockK, k - first),
                                      out + row * shape.row_bytes + block * block_bytes(kBits));
    std::memset(out + n * shape.row_bytes, 0, static_cast<size_t>((shape.rows - n) * shape.row_bytes));
    return fits ? Status::ok : Status::code_out_of_range;
}

template <int32_t kBits>
Status unpack_rows(const uint8_t* packed, int64_t n, int64_t k, const PackedShape& shape, int8_t* codes) {
    for (int64_t row = 0; row < n; ++row)
        for (int64_t first = 0, block = 0; first < k; first += kBlockK, ++block)
            unpack_block<kBits>(packed + row * shape.row_bytes + block * block_bytes(kBits),
                                std::min(kBlockK, k - first), codes + row * k + first);
    return Status::ok;
}

Status check_shape(int64_t n, int64_t k, int32_t bits, PackedShape* shape) {
    int64_t codes = 0;
    if (!valid_bits(bits)) return Status::bad_bits;
    if (n < 0 || k < 1) return Status::bad_size;
    if (!checked_mul(n, k, &codes) || !packed_shape(n, k, bits, shape)) return Status::size_overflow;
    return Status::ok;
}

}  // namespace

Status pack(const int8_t* codes, int64_t n, int64_t k, int32_t bits, uint8_t* out) {
    PackedShape shape = {};
    const Status status = check_shape(n, k, bits, &shape);
    if (status != Status::ok || n == 0) return status;
    switch (bits) {
        case 2:
            return pack_rows<2>(codes, n, k, shape, out);
        case 4:
            return pack_rows<4>(codes, n, k, shape, out);
        default:
            return pack_rows<8>(codes, n, k, shape, out);
    }
}

Status unpack(const uint8_t* packed, int64_t n, int64_t k, int32_t bits, int8_t* codes) {
    PackedShape shape = {};
    const Status status = check_shape(n, k, bits, &shape);
    if (status != Status::ok || n == 0) return status;
    switch (bits) {
        case 2:
            return unpack_rows<2>(packed, n, k, shape, codes);
        case 4:
            return unpack_rows<4>(packed, n, k, shape, codes);
        default:
            return unpack_rows<8>(packed, n, k, shape, codes);
    }
}

}  // namespace dqk
