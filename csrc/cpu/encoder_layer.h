// A layer of an encoder on a CPU as one call: what its calls compute made one by one, with their bits.
//
//   pre-norm:   t = x + out(attention(qkv(norm 0 (x))))      y = t + down(up(norm 1 (t)))
//   post-norm:  t = norm 0 (x + out(attention(qkv(x))))      y = norm 1 (t + down(up(t)))
//
// Unlike a decode step it is run over any number of rows, each time over others. So it keeps the addresses of
// weights alone, and what lies between its calls is memory of the run: it may be run by several threads at
// once.
#pragma once
#include <cstdint>

#include "dqk/api.h"

namespace dqk {

struct LayerNorm {
    const void* weight;  // [width]
    DType weight_dtype;
    const void* bias;  // [width] or nullptr
    DType bias_dtype;
    double eps;
};

// Linears on one input, as cpu_gemm takes them, but for what belongs to a run: rows, x, the scales of its
// codes, y, the residual and threads.
struct KeptLinears {
    CpuGemm call;
    CpuPart parts[kMaxParts];
};

struct EncoderLayer {
    bool post_norm;
    LayerNorm norms[2];
    // Of qkv and up: x is the codes that a norm gives (int8), or what the layer is given (qkv of post-norm).
    KeptLinears qkv, out, up, down;
    ActMode mode[2];  // how the norms quantize, for the linears behind them
    float clip[2], static_scale[2];
    int64_t heads, head_dim;
    float softmax_scale;
    ActMode attention_mode;
    float attention_clip;
};

struct EncoderRows {
    const void* x;  // [batch, tokens, width] contiguous, of the dtype of the layer's results
    void* y;        // likewise, apart from x
    int64_t batch, tokens;
    Operand mask, bias;  // as of Attention
    int32_t threads;     // that may take part
};

Status encoder_layer(const EncoderLayer& layer, const EncoderRows& rows);

}  // namespace dqk
