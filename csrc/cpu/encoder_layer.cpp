// See encoder_layer.h.
#include "cpu/encoder_layer.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/gemm_loops.h"
#include "cpu/threads.h"
#include "dqk/element.h"
#include "dqk/shape.h"

namespace dqk {
namespace {

// The memory between the calls of a run.
struct Between {
    char* wide;  // Q, K, V and what attention gives one after the other, then what `up` gives
    char* sum;   // behind attention, with its residual
    char* normed;
    int8_t* codes;  // of a norm
    float* scale;
};

class Run {
  public:
    explicit Run(const EncoderLayer& layer)
        : layer_(layer),
          width_(layer.qkv.call.k),
          dtype_(layer.qkv.call.y_dtype),
          row_bytes_(width_ * element_bytes(dtype_)) {}

    // The memory for so many rows, with what a Buffer adds to its parts.
    bool bytes(int64_t rows, int64_t* all) const {
        return checked_mul(rows, wide_bytes() + 2 * row_bytes_ + width_ + 4 + 5 * 64, all);
    }
    void place(Buffer& buffer, int64_t rows) {
        at_.wide = buffer.take<char>(rows * wide_bytes());
        at_.sum = buffer.take<char>(rows * row_bytes_);
        at_.normed = buffer.take<char>(rows * row_bytes_);
        at_.codes = buffer.take<int8_t>(rows * width_);
        at_.scale = buffer.take<float>(rows);
    }

    // No more rows than there is memory for.
    Status operator()(const EncoderRows& rows) {
        rows_ = rows;
        m_ = rows.batch * rows.tokens;
        return layer_.post_norm ? post() : pre();
    }

  private:
    int64_t wide_bytes() const {
        return std::max(4 * row_bytes_, layer_.up.parts[0].n * element_bytes(dtype_));
    }

    Status pre() const {
        Status status = norm(0, rows_.x, at_.normed);
        if (status == Status::ok) status = attend(at_.codes, rows_.x);
        if (status == Status::ok) status = norm(1, at_.sum, at_.normed);
        if (status == Status::ok) status = feed_forward(at_.sum, rows_.y);
        return status;
    }

    Status post() const {
        Status status = attend(rows_.x, rows_.x);
        if (status == Status::ok) status = norm(0, at_.sum, at_.normed);
        if (status == Status::ok) status = feed_forward(at_.normed, at_.sum);
        if (status == Status::ok) status = norm(1, at_.sum, rows_.y);
        return status;
    }

    // y = norm(x), its codes and their scales.
    Status norm(int which, const void* x, void* y) const {
        const LayerNorm& given = layer_.norms[which];
        NormQuantize call = {};
        call.x = x;
        call.row_stride = width_;
        call.weight = given.weight;
        call.weight_dtype = given.weight_dtype;
        call.bias = given.bias;
        call.bias_dtype = given.bias_dtype;
        call.eps = given.eps;
        call.y = y;
        call.codes.dtype = dtype_;
        call.codes.rows = m_;
        call.codes.k = width_;
        call.codes.row_stride = width_;
        call.codes.mode = layer_.mode[which];
        call.codes.clip = layer_.clip[which];
        call.codes.act_scale = layer_.static_scale[which];
        call.codes.q = at_.codes;
        call.codes.scale = at_.scale;
        call.threads = rows_.threads;
        return norm_quantize(call);
    }

    // y: of each part behind the one before it. x: codes, whose scales are those of a norm, or floats.
    Status linears(const KeptLinears& kept, const void* x, void* y, const void* residual) const {
        CpuGemm call = kept.call;
        CpuPart parts[kMaxParts];
        call.m = m_;
        call.row_stride = call.k;
        call.x = x;
        call.act_scale = call.x_dtype == DType::int8 ? at_.scale : nullptr;
        call.parts = parts;
        call.threads = rows_.threads;
        char* out = static_cast<char*>(y);
        for (int32_t i = 0; i < call.part_count; ++i) {
            parts[i] = kept.parts[i];
            parts[i].y = out;
            parts[i].residual = residual;
            parts[i].residual_dtype = dtype_;
            out += m_ * parts[i].n * element_bytes(dtype_);
        }
        return cpu_gemm(call);
    }

    // sum = x + out(attention(qkv(input)))
    Status attend(const void* input, const void* x) const {
        Status status = linears(layer_.qkv, input, at_.wide, nullptr);
        if (status != Status::ok) return status;
        Attention call = {};
        call.sizes = {rows_.batch,           layer_.heads, rows_.tokens,         rows_.tokens,
                      layer_.head_dim,       false,        layer_.softmax_scale, layer_.attention_mode,
                      layer_.attention_clip, rows_.threads};
        Operand* const operands[3] = {&call.q, &call.k, &call.v};
        for (int64_t i = 0; i < 3; ++i)  // [batch, tokens, heads, head_dim] each
            *operands[i] = {
                at_.wide + i * m_ * row_bytes_, dtype_, {rows_.tokens * width_, layer_.head_dim, width_, 1}};
        call.mask = rows_.mask;
        call.bias = rows_.bias;
        call.out = at_.wide + 3 * m_ * row_bytes_;
        call.by_token = true;
        status = attention(call);
        return status == Status::ok ? linears(layer_.out, call.out, at_.sum, x) : status;
    }

    // y = residual + down(up(the codes of a norm))
    Status feed_forward(const void* residual, void* y) const {
        const Status status = linears(layer_.up, at_.codes, at_.wide, nullptr);
        return status == Status::ok ? linears(layer_.down, at_.wide, y, residual) : status;
    }

    const EncoderLayer& layer_;
    EncoderRows rows_ = {};
    int64_t m_ = 0, width_;
    DType dtype_;
    int64_t row_bytes_;
    Between at_ = {};
};

// The linears fit each other, and the heads.
bool fits(const EncoderLayer& layer) {
    const int64_t width = layer.qkv.call.k, inner = layer.up.parts[0].n;
    const DType dtype = layer.qkv.call.y_dtype;
    if (layer.qkv.call.part_count != 3 || layer.heads < 1 || layer.head_dim < 1 ||
        layer.heads * layer.head_dim != width)
        return false;
    const auto single = [dtype](const KeptLinears& kept, DType x, int64_t k, int64_t n) {
        return kept.call.part_count == 1 && kept.call.x_dtype == x && kept.call.y_dtype == dtype &&
               kept.call.k == k && kept.parts[0].n == n;
    };
    for (int32_t i = 0; i < layer.qkv.call.part_count; ++i)
        if (layer.qkv.parts[i].n != width) return false;
    return layer.qkv.call.x_dtype == (layer.post_norm ? dtype : DType::int8) &&
           single(layer.out, dtype, width, width) && single(layer.up, DType::int8, width, inner) &&
           single(layer.down, dtype, inner, width);
}

// Sequences are independent of each other unless one scale is that of all of them. So many rows at a time
// keep what lies between the calls in the third cache; much more would be new pages of the system each time.
constexpr int64_t kRowsAtOnce = 512;

int64_t sequences_at_once(const EncoderLayer& layer, const EncoderRows& rows) {
    const ActMode modes[] = {layer.mode[0],       layer.mode[1],      layer.qkv.call.mode,
                             layer.out.call.mode, layer.up.call.mode, layer.down.call.mode,
                             layer.attention_mode};
    for (const ActMode mode : modes)
        if (mode == ActMode::per_tensor) return rows.batch;
    return std::max<int64_t>(1, kRowsAtOnce / std::max<int64_t>(1, rows.tokens));
}

// Sequences first .. first + count.
EncoderRows part_of(const EncoderRows& rows, int64_t first, int64_t count, int64_t sequence_bytes) {
    EncoderRows part = rows;
    part.batch = count;
    part.x = static_cast<const char*>(rows.x) + first * sequence_bytes;
    part.y = static_cast<char*>(rows.y) + first * sequence_bytes;
    for (Operand* const operand : {&part.mask, &part.bias})
        if (operand->data != nullptr)
            operand->data = static_cast<const char*>(operand->data) +
                            first * operand->stride[0] * element_bytes(operand->dtype);
    return part;
}

}  // namespace

Status encoder_layer(const EncoderLayer& layer, const EncoderRows& rows) {
    if (!fits(layer)) return Status::bad_cpu_part;
    if (rows.batch < 0 || rows.tokens < 0) return Status::bad_size;
    int64_t most = 0, bytes = 0;
    if (!checked_mul(rows.batch, rows.tokens, &most)) return Status::size_overflow;
    if (most == 0) return Status::ok;
    const int64_t step = std::min(rows.batch, sequences_at_once(layer, rows));
    most = step * rows.tokens;
    Run run(layer);
    if (!run.bytes(most, &bytes)) return Status::size_overflow;
    Buffer buffer(bytes);
    if (buffer.empty()) return Status::no_memory;
    run.place(buffer, most);
    const int64_t sequence_bytes = rows.tokens * layer.qkv.call.k * element_bytes(layer.qkv.call.y_dtype);
    CpuGemm up = layer.up.call;
    up.m = most;
    up.parts = layer.up.parts;
    Status status = Status::ok;
    together(worth_sharing(up) ? rows.threads : 1, [&] {
        for (int64_t first = 0; first < rows.batch && status == Status::ok; first += step)
            status = run(part_of(rows, first, std::min(step, rows.batch - first), sequence_bytes));
    });
    return status;
}

}  // namespace dqk
