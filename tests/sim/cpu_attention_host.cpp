// The CPU's attention, what fills its caches, its quantizer of rows, LayerNorm and GELU, called as the
// binding calls them, with the instruction set of DQKERNELS_CPU. Tensors are contiguous; the seed: threads
// less one.
#include "cpu/attention.h"
#include "cpu/norm.h"
#include "cpu/quantize_row.h"
#include "dqk/api.h"
#include "protocol.h"
#include "quantize_request.h"

namespace dqk {
namespace {

Operand dense(const void* data, DType dtype, int64_t b, int64_t c, int64_t d) {
    return {data, dtype, {b * c * d, c * d, d, 1}};
}
Cache dense(const sim::Request& request, size_t buffer, int64_t heads, int64_t capacity, int64_t head_dim) {
    return {request.pointer<int8_t>(buffer),
            {heads * capacity * head_dim, capacity * head_dim, head_dim},
            request.pointer<float>(buffer + 1),
            {heads * capacity, capacity, 1}};
}

// The first scalars: dtype, batch, heads, queries, keys, head_dim, causal, softmax_scale, mode, clip.
AttentionSizes sizes_of(const sim::Request& request) {
    AttentionSizes sizes = {};
    sizes.batch = request.integer(1);
    sizes.heads = request.integer(2);
    sizes.queries = request.integer(3);
    sizes.keys = request.integer(4);
    sizes.head_dim = request.integer(5);
    sizes.causal = request.integer(6) != 0;
    sizes.softmax_scale = static_cast<float>(request.real(7));
    sizes.mode = static_cast<ActMode>(request.integer(8));
    sizes.clip = static_cast<float>(request.real(9));
    sizes.threads = static_cast<int32_t>(request.seed) + 1;
    return sizes;
}

// buffers: q, k, v, mask or absent, fp32 bias or absent, out.
Status prefill(const sim::Request& request) {
    Attention args = {};
    args.sizes = sizes_of(request);
    const AttentionSizes& s = args.sizes;
    const auto dtype = static_cast<DType>(request.integer(0));
    args.q = dense(request.pointer<const void>(0), dtype, s.heads, s.queries, s.head_dim);
    args.k = dense(request.pointer<const void>(1), dtype, s.heads, s.keys, s.head_dim);
    args.v = dense(request.pointer<const void>(2), dtype, s.heads, s.keys, s.head_dim);
    args.mask = dense(request.pointer<const void>(3), DType::int8, s.heads, s.queries, s.keys);
    args.bias = dense(request.pointer<const void>(4), DType::float32, s.heads, s.queries, s.keys);
    args.out = request.pointer<void>(5);
    return attention(args);
}

// scalars: then caches, source_per_key. buffers: q, k, its scale, v, its scale, lengths, source or absent,
// fp32 bias or absent, out.
Status decode(const sim::Request& request) {
    AttentionDecode args = {};
    args.sizes = sizes_of(request);
    const AttentionSizes& s = args.sizes;
    args.q = dense(request.pointer<const void>(0), static_cast<DType>(request.integer(0)), s.heads, s.queries,
                   s.head_dim);
    args.caches = request.integer(10);
    args.k = dense(request, 1, s.heads, s.keys, s.head_dim);
    args.v = dense(request, 3, s.heads, s.keys, s.head_dim);
    args.lengths = request.pointer<const int32_t>(5);
    args.source = request.pointer<const int32_t>(6);
    args.source_per_key = request.integer(11) != 0;
    args.bias = dense(request.pointer<const void>(7), DType::float32, s.heads, s.queries, s.keys);
    args.out = request.pointer<void>(8);
    return attention_decode(args);
}

// scalars: dtype, rows, heads, tokens, capacity, head_dim, clip. buffers: k, v, position, k's cache and
// scale, v's.
Status write(const sim::Request& request) {
    CacheWrite args = {};
    const auto dtype = static_cast<DType>(request.integer(0));
    args.batch = args.caches = request.integer(1);
    args.heads = request.integer(2);
    args.tokens = request.integer(3);
    args.capacity = request.integer(4);
    args.head_dim = request.integer(5);
    args.clip = static_cast<float>(request.real(6));
    args.threads = static_cast<int32_t>(request.seed) + 1;
    args.k = dense(request.pointer<const void>(0), dtype, args.heads, args.tokens, args.head_dim);
    args.v = dense(request.pointer<const void>(1), dtype, args.heads, args.tokens, args.head_dim);
    args.position = request.pointer<const int32_t>(2);
    args.k_cache = dense(request, 3, args.heads, args.capacity, args.head_dim);
    args.v_cache = dense(request, 5, args.heads, args.capacity, args.head_dim);
    return cache_write(args);
}

// quantize_request.h, and a buffer: act_scale, in place of the scalar where it is there.
Status quantize(const sim::Request& request) {
    QuantizeRows args = sim::quantize_request(request);
    const auto* scale = request.pointer<const float>(4);
    if (scale != nullptr) args.act_scale = *scale;
    return quantize_rows(args);
}

// What norm and gelu begin with. scalars: dtype, rows, k, mode, clip, act_scale.
QuantizeRows codes_of(const sim::Request& request) {
    QuantizeRows codes = {};
    codes.dtype = static_cast<DType>(request.integer(0));
    codes.rows = request.integer(1);
    codes.k = codes.row_stride = request.integer(2);
    codes.mode = static_cast<ActMode>(request.integer(3));
    codes.clip = static_cast<float>(request.real(4));
    codes.act_scale = static_cast<float>(request.real(5));
    return codes;
}

// scalars: then residual's dtype, weight's, bias's, eps. buffers: x, residual or absent, weight, bias or
// absent, y, q, scale, row_sum.
Status norm(const sim::Request& request) {
    NormQuantize args = {};
    args.codes = codes_of(request);
    args.row_stride = args.residual_stride = args.codes.k;
    args.residual_dtype = static_cast<DType>(request.integer(6));
    args.weight_dtype = static_cast<DType>(request.integer(7));
    args.bias_dtype = static_cast<DType>(request.integer(8));
    args.eps = request.real(9);
    args.threads = static_cast<int32_t>(request.seed) + 1;
    args.x = request.pointer<const void>(0);
    args.residual = request.pointer<const void>(1);
    args.weight = request.pointer<const void>(2);
    args.bias = request.pointer<const void>(3);
    args.y = request.pointer<void>(4);
    args.codes.q = request.pointer<int8_t>(5);
    args.codes.scale = request.pointer<float>(6);
    args.codes.row_sum = request.pointer<int32_t>(7);
    return norm_quantize(args);
}

// buffers: x, q, scale, row_sum.
Status gelu(const sim::Request& request) {
    GeluQuantize args = {};
    args.codes = codes_of(request);
    args.threads = static_cast<int32_t>(request.seed) + 1;
    args.codes.x = request.pointer<const void>(0);
    args.codes.q = request.pointer<int8_t>(1);
    args.codes.scale = request.pointer<float>(2);
    args.codes.row_sum = request.pointer<int32_t>(3);
    return gelu_quantize(args);
}

// buffers: the name of the instruction set in use, 16 bytes.
Status name(const sim::Request& request) {
    Isa isa = Isa::scalar;
    const Status status = active_isa(&isa);
    std::strncpy(request.pointer<char>(0), isa_name(isa), 16);
    return status;
}

// buffers: 3 bytes, 1 where the instruction set in use has attention, a quantizer of rows, norms of its own.
Status loops(const sim::Request& request) {
    Isa isa = Isa::scalar;
    const Status status = active_isa(&isa);
    auto* own = request.pointer<uint8_t>(0);
    own[0] = &attention_functions(isa) != &scalar_attention_functions();
    own[1] = row_functions(DType::float32, isa).codes != scalar_row_functions(DType::float32).codes;
    own[2] = &row_loops(isa) != &scalar_row_loops();
    return status;
}

Status run(const sim::Request& request) {
    if (request.function == "loops") return loops(request);
    if (request.function == "name") return name(request);
    if (request.function == "prefill") return prefill(request);
    if (request.function == "decode") return decode(request);
    if (request.function == "norm") return norm(request);
    if (request.function == "gelu") return gelu(request);
    return request.function == "write" ? write(request) : quantize(request);
}

}  // namespace
}  // namespace dqk

int main() {
    dqk::sim::serve(dqk::run);
}
