// The whole surface of the core, on one page. Raw pointers, int64 sizes, a stream handle, a Status; no
// Python, no torch.
#pragma once
#include <cstdint>

#include "dqk/status.h"

namespace dqk {

// Raised whenever a signature below or the packed format changes; dqkernels/kernels/native.py holds its twin.
constexpr int32_t kAbiVersion = 8;

// ---- CPU instruction sets ---------------------------------------------------------------------------------

enum class Isa : int32_t { scalar = 0, avx2, avx_vnni, avx512_vnni, amx_int8, dotprod };
constexpr int32_t kIsaCount = 6;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// The set that kernels run with: $DQKERNELS_CPU where set, else the best one here. Decided once per process.
Status active_isa(Isa* isa);

// ---- packed weights (format.h) ----------------------------------------------------------------------------

// codes int8 [n, k] row-major -> out uint8 [ceil16(n), ceil128(k) * bits / 8], every byte written, padding 0.
Status pack(const int8_t* codes, int64_t n, int64_t k, int32_t bits, uint8_t* out);

// The inverse: sign-extended codes int8 [n, k].
Status unpack(const uint8_t* packed, int64_t n, int64_t k, int32_t bits, int8_t* codes);

// ---- activations ------------------------------------------------------------------------------------------

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2, int8 = 3 };
enum class ActMode : int32_t { per_token = 0, per_tensor = 1, static_scale = 2 };

// q = round_half_even(clamp(clip(x) * inv, -127, 127)), one (inv, scale) per row; rounding.h holds the rule.
struct QuantizeRows {
    const void* x;       // [rows, k], elements of a row adjacent
    DType dtype;         //
    int64_t rows;        //
    int64_t k;           //
    int64_t row_stride;  // in elements; 0 for an expanded row
    ActMode mode;        // per_tensor treats x as one row and repeats its scale
    float clip;          // 0 = none
    float act_scale;     // read under static_scale only
    int8_t* q;           // [rows, k] contiguous
    float* scale;        // [rows]; NaN marks a row with a non-finite input, whose codes are 0
    int32_t* row_sum;    // [rows], sum of the row's codes; nullptr = not wanted
};

// What every implementation refuses; called by both below.
Status check(const QuantizeRows& args);

Status quantize_rows(const QuantizeRows& args);

// The same on the current CUDA device, queued on `stream` (a cudaStream_t). Returns before it has run.
// `act_scale`, if not null, is a device pointer read in place of args.act_scale: a layer's own tensor, so
// that no call waits for the device.
Status cuda_quantize_rows(const QuantizeRows& args, const float* act_scale, void* stream);

// ---- LayerNorm and GELU on a CPU --------------------------------------------------------------------------

// y = LayerNorm of x (+ residual, in fp32), rounded to the type of x, then the codes of y.
struct NormQuantize {
    const void* x;            // [rows, k], elements of a row adjacent, of codes.dtype
    int64_t row_stride;       // in elements
    const void* residual;     // [rows, k] likewise, or nullptr
    DType residual_dtype;     //
    int64_t residual_stride;  //
    const void* weight;       // [k]
    DType weight_dtype;       //
    const void* bias;         // [k] or nullptr
    DType bias_dtype;         //
    double eps;               //
    void* y;                  // [rows, k] contiguous
    QuantizeRows codes;       // of y: its x and row_stride are not read
    int32_t threads;          // that may take part
};

Status norm_quantize(const NormQuantize& args);

// The codes of GELU (the erf form) of x, rounded to its type in between.
struct GeluQuantize {
    QuantizeRows codes;  // of gelu(x); its x is the input
    int32_t threads;
};

Status gelu_quantize(const GeluQuantize& args);

// ---- attention on a CPU (docs/design.md, "Attention") -----------------------------------------------------

// Elements [batch, heads, tokens, last]; a stride in elements is 0 where the operand is broadcast.
struct Operand {
    const void* data;  // nullptr: not given
    DType dtype;
    int64_t stride[4];
};

constexpr int64_t kMaxHeadDim = 1040;  // fp32 products of codes stay exact in the reference
constexpr int64_t kMaxKeys = 131071;   // and int32 sums of shares in a kernel

// What both forms share.
struct AttentionSizes {
    int64_t batch;  // of a cache: rows
    int64_t heads;
    int64_t queries;
    int64_t keys;  // of a cache: its capacity
    int64_t head_dim;
    bool causal;  // query i sees keys up to keys - queries + i; of a cache, lengths[row] - queries + i
    float softmax_scale;
    ActMode mode;     // per_token or per_tensor
    float clip;       // 0 = none
    int32_t threads;  // that may take part
};

// Float q, k, v, quantized here.
struct Attention {
    AttentionSizes sizes;
    Operand q, k, v;  // of one dtype; elements of a row adjacent
    Operand mask;     // bool bytes [batch, heads, queries, keys], not 0 where a key is visible
    Operand bias;     // [batch, heads, queries, keys]
    void* out;        // [batch, heads, queries, head_dim] contiguous, of q's dtype
    bool by_token;    // out is [batch, queries, heads, head_dim]
};

Status attention(const Attention& args);

// Codes and scales of keys or values: int8 [caches, heads, capacity, head_dim] with elements of a row
// adjacent, fp32 [caches, heads, capacity].
struct Cache {
    int8_t* codes;
    int64_t stride[3];
    float* scale;
    int64_t scale_stride[3];
};

// Over codes in a cache.
struct AttentionDecode {
    AttentionSizes sizes;
    Operand q;
    int64_t caches;
    Cache k, v;              // only read
    const int32_t* lengths;  // [batch], visible keys of each row
    const int32_t* source;   // [batch] or, with source_per_key, [batch, keys]; nullptr: row r reads cache r
    bool source_per_key;     //
    Operand bias;            //
    void* out;               // as above
};

Status attention_decode(const AttentionDecode& args);

// Writes the codes of new keys and values into a cache: row r's token t to place position[r] + t of cache r.
struct CacheWrite {
    Operand k, v;  // [batch, heads, tokens, head_dim] of one dtype; elements of a row adjacent
    int64_t batch, heads, tokens, head_dim;
    int64_t caches, capacity;
    const int32_t* position;  // [batch]; nullptr: 0
    ActMode mode;             // per_tensor: only without positions
    float clip;
    int32_t threads;
    Cache k_cache, v_cache;
};

Status cache_write(const CacheWrite& args);

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2 };

// ---- the GEMM of a CPU ------------------------------------------------------------------------------------

// Weights of one linear. Up to kMaxCpuParts of them share the input: Q, K and V, or K and V of all layers of
// a decoder. A call that is kept (cpu/decoder_step.h) has kMaxParts at most.
constexpr int32_t kMaxCpuParts = 64;
struct CpuPart {
    const uint8_t* qweight;     // packed v1 [ceil16(n), ceil128(k) * bits / 8]
    const float* weight_scale;  // [n], or [1] with tensor_scale
    bool tensor_scale;
    const uint8_t* group_mult;  // [n, ceil(k / group_size)], read when group_size > 0
    const void* bias;           // [n] of bias_dtype, or nullptr
    DType bias_dtype;
    const void* residual;  // [m, n] of residual_dtype, or nullptr
    DType residual_dtype;
    void* y;  // [m, n] of y_dtype
    int64_t n;
};

// y = act(float(q . code) * act_scale[m] * weight_scale[n] + bias[n]) + residual, each step rounded on its
// own (docs/design.md, section 3). A float x is quantized on the way in, once for all parts; an int8 x brings
// its scales, and its codes lie in -127..127.
struct CpuGemm {
    const void* x;  // [m, k], elements of a row adjacent
    DType x_dtype;
    int64_t m;
    int64_t k;
    int64_t row_stride;      // of x, in elements
    ActMode mode;            // of a float x
    float clip;              // of a float x; 0 = none
    float static_scale;      // of a float x under static_scale
    const float* act_scale;  // int8 x: [m]; else not read

    int32_t bits;
    bool four_level;
    int32_t group_size;  // 0 = per channel or per tensor
    const CpuPart* parts;
    int32_t part_count;
    Activation activation;
    DType y_dtype;

    // Results do not depend on these.
    int32_t threads;  // at most so many
    int32_t kernel;   // 0: the one for active_isa(); 1 + i: gemm_kernel_name(i), where this CPU has it
};

// Any m; returns when it is done. GELU aside, every kernel and every number of threads gives the same bits;
// with GELU too, since all of them compute it in the same way.
Status cpu_gemm(const CpuGemm& args);

// The kernels of this build: nullptr behind the last one. An instruction set without a kernel of its own
// takes the one of the best set that it includes.
const char* gemm_kernel_name(int32_t index);
Status active_gemm_kernel(int32_t* index);

// Rows of a packed table, as floats: y = level * weight_scale, * embed_scale, + position, one rounding.
struct CpuEmbedding {
    const void* ids;  // [count] int64, or int32 with ids32
    bool ids32;
    int64_t count;
    const uint8_t* qweight;     // packed v1 of [rows, k]
    const float* weight_scale;  // [rows], or [1] with tensor_scale
    bool tensor_scale;
    const uint8_t* group_mult;  // [rows, ceil(k / group_size)], read when group_size > 0
    int64_t rows;
    int64_t k;
    int32_t bits;
    bool four_level;
    int32_t group_size;
    float embed_scale;
    const void* position;  // [count, k] of position_dtype, position_stride elements a row, or nullptr
    DType position_dtype;
    int64_t position_stride;  // 0: the same row for all
    void* y;                  // [count, k] of y_dtype
    DType y_dtype;
    int32_t threads;
    int32_t kernel;  // as in CpuGemm
};

// An id outside 0..rows-1 is refused before anything is written.
Status cpu_embedding(const CpuEmbedding& args);

// Reads `bytes` bytes and does nothing else: the yardstick of kernels that must read as many. sum: of the
// 64-bit words, and of the bytes left over.
Status read_bytes(const void* data, int64_t bytes, int32_t threads, uint64_t* sum);

// Multiplies ones in registers, at least `products` pairs of bytes, and does nothing else: the yardstick of
// products of many rows. sum: of the products, so their number. The instruction is the widest byte product of
// active_isa(); nullptr, and Status::bad_kernel, where there is no loop for it (scalar, amx_int8, dotprod).
const char* multiply_instruction();
Status multiply_bytes(int64_t products, int32_t threads, int64_t* sum);

// ---- the two ends of a decode step on a CPU --------------------------------------------------------------

// x = x * factor, then + the row of `table` for the position that the row stands at; each step rounded to the
// type of x, as separate operations of torch are.
struct AddPosition {
    void* x;  // [rows, k] contiguous
    DType dtype;
    int64_t rows;
    int64_t k;
    float factor;             // 1: no step of its own
    const void* table;        // [table_rows, k] contiguous, of dtype
    int64_t table_rows;       //
    const int32_t* position;  // [rows]
    int64_t offset;           // of position 0 in the table
};

// A position without a row is refused before anything is written.
Status add_position(const AddPosition& args);

// y = x (+ bias) as fp32, and the place of the largest in each row: the first of them; a NaN is larger than
// any number.
struct FinishLogits {
    const void* x;  // [rows, n] contiguous
    DType dtype;
    int64_t rows;
    int64_t n;
    const void* bias;  // [n] of bias_dtype, or nullptr
    DType bias_dtype;
    bool rounded;   // the sum is rounded to dtype first
    float* y;       // [rows, n] contiguous; x itself where that is fp32
    int64_t* best;  // [rows], or nullptr: not wanted
    int32_t threads;
};

Status finish_logits(const FinishLogits& args);

// ---- beam search on a CPU --------------------------------------------------------------------------------

// The k largest of n numbers in the order of torch.topk on a CPU: a NaN above all, and of equal ones those
// that its algorithm (of the C++ library, top_k.h) comes to first.
struct TopK {
    const float* x;  // [n]
    int64_t n;       // below 2^31
    int64_t k;       // 1..n
    float* value;    // [k]
    int64_t* index;  // [k]
};
Status top_k(const TopK& args);

// The best continuations over all beams of a source: the largest of score + running, in the order above.
struct BeamCandidates {
    const float* scores;   // [sources * beams, n]
    const float* running;  // [sources * beams]
    int64_t sources, beams;
    int64_t n;       // beams * n below 2^31
    int64_t kept;    // 1..beams * n
    float* value;    // [sources, kept]
    int64_t* beam;   // [sources, kept], of the source
    int64_t* token;  // [sources, kept]
    int32_t threads;
};
Status beam_candidates(const BeamCandidates& args);

// Takes away what would repeat `size` tokens of a row: its score becomes -inf. What the head has no score for
// (a token of n and above) cannot be repeated.
struct BanRepeats {
    const int64_t* tokens;  // rows of `row_stride`
    int64_t rows;
    int64_t row_stride;
    int64_t length;  // tokens of a row that are there
    int64_t size;    // >= 1
    float* scores;   // [rows, n]
    int64_t n;
};
Status ban_repeats(const BanRepeats& args);

// Running and finished hypotheses. All arrays contiguous.
struct BeamState {
    int64_t sources, beams;
    int64_t start;              // first tokens, the same for all beams of a source
    int64_t most;               // tokens that a hypothesis has room for
    int64_t filling;            // what stands behind the end of a finished one
    int64_t* running;           // [sources, beams, most]
    int32_t* came_from;         // [sources, beams, most - start], the row of each token; or nullptr
    float* scores;              // [sources, beams]
    int64_t* finished;          // as running
    int32_t* finished_from;     // as came_from, -1 behind the end
    float* finished_scores;     // [sources, beams]
    int64_t* finished_lengths;  // [sources, beams], new tokens
    uint8_t* is_finished;       // [sources, beams]
    uint8_t* improvable;        // [sources]: a running one might still beat a finished one
};

// Takes every source one token further, by the arithmetic of transformers.
struct BeamExtend {
    BeamState state;
    int64_t length;        // of the running ones, before: start..most - 1
    int64_t kept;          // candidates of a source, >= beams
    const float* value;    // [sources, kept], best first
    const int64_t* beam;   // [sources, kept]
    const int64_t* token;  // [sources, kept]
    const uint8_t* ends;   // [sources, kept], which end here; or nullptr: those with an end token
    const int64_t* end_tokens;
    int64_t end_count;
    bool all_end;        // there is no room for more
    float divisor;       // of the score of one that ends now
    float best_divisor;  // of the best score that may still come
    bool early;          // a source is done when all its beams have finished
    int64_t* parents;    // [sources * beams], the row that each running one goes on from
    int64_t* tokens;     // [sources * beams], and with what
    bool* goes_on;       // one, of the whole search
};

// Refused before anything is written: a beam outside 0..beams-1.
Status beam_extend(const BeamExtend& args);

// ---- the skinny GEMM: few tokens, packed weights ---------------------------------------------------------

// One linear of a launch. Up to kMaxParts of them share the input: Q, K and V, or K and V of a
// cross-attention.
struct SkinnyPart {
    const uint8_t* qweight;     // packed v1 [ceil16(n), ceil128(k) * bits / 8], 16-byte aligned
    const float* weight_scale;  // [n], or [1] with tensor_scale
    const uint8_t* group_mult;  // [n, ceil(k / group_size)], read when group_size > 0
    const void* bias;           // [n] of bias_dtype, or nullptr
    const void* residual;       // [m, n] of residual_dtype, or nullptr
    void* y;                    // [m, n] of y_dtype
    int64_t n;
};
constexpr int32_t kMaxParts = 3;

// y = act(float(q . code) * act_scale[m] * weight_scale[n] + bias[n]) + residual, each step rounded on its
// own (docs/design.md, section 3). A float x is quantized on the way in (and normalized before, with
// norm_weight), an int8 x brings its scales.
struct SkinnyGemm {
    const void* x;            // [m, k], elements of a row adjacent; float types need m <= kPrologueTokens
    DType x_dtype;            //
    int64_t m;                //
    int64_t k;                //
    int64_t row_stride;       // of x, in elements
    ActMode mode;             // of a float x
    float clip;               // of a float x; 0 = none
    const float* act_scale;   // int8 x: [m]; static: [1]; else not read
    const void* norm_weight;  // LayerNorm of a float x: [k] of x_dtype, or nullptr for none
    const void* norm_bias;    // [k] of x_dtype, or nullptr
    float norm_eps;           //
    void* norm_y;             // [m, k] of x_dtype: the normalized rows, for the next residual

    int32_t bits;
    bool four_level;
    int32_t group_size;  // 0 = per channel or per tensor
    bool tensor_scale;
    SkinnyPart parts[kMaxParts];
    int32_t part_count;
    DType bias_dtype;
    DType residual_dtype;
    Activation activation;
    DType y_dtype;
    const float* out_scale;  // [1], for an int8 y

    // How it is cut up; results do not depend on it. 0 = by the rule of skinny_shape.h for a GPU of `sms`.
    int32_t warps_n;  // warps of a block side by side in N (1, 2, 4, 8); the other 8 / warps_n share K
    int32_t splits;   // blocks that share the K of one tile
    int32_t sms;
    bool overlap;  // sm_90: start while the previous kernel ends, and read the weights meanwhile. Only for
                   // weights which that kernel did not write.

    int32_t* workspace;  // skinny_memory() says how much; needs no zeros
    uint32_t* counters;  // zeros before the first launch, and zeros again after each
};

constexpr int64_t kPrologueTokens = 16;

struct SkinnyMemory {
    int64_t workspace_bytes;
    int64_t counter_bytes;
    int32_t warps_n;  // what the rule chose
    int32_t splits;
};

// What a launch needs besides its operands; both 0 without a split. Reads the sizes of `args`, no pointer.
Status skinny_memory(const SkinnyGemm& args, SkinnyMemory* out);

// On the current CUDA device, queued on `stream`. Any m: slices of 64 tokens. Allocates and waits for
// nothing.
Status cuda_skinny_gemm(const SkinnyGemm& args, void* stream);

// ---- decode attention: a few queries per row over an int8 cache ------------------------------------------

enum class AttentionForm : int32_t { rule = 0, keep, redo };

// docs/design.md, "Attention". Row r sees the first lengths[r] keys (at most `capacity`; with `causal` query
// i those up to lengths[r] - queries + i) of cache source[r], of cache r without a source, or with by_key key
// j of cache source[r * capacity + j]. A source that is no cache makes NaN of the row, or of the queries that
// see the key.
struct CudaAttentionDecode {
    const void* q;           // [rows, heads, queries, head_dim] by strides, the last one 1
    DType dtype;             // of q and out
    int64_t rows;            //
    int64_t heads;           //
    int64_t queries;         //
    int64_t head_dim;        // 4, 8 .. 128
    int64_t caches;          // rows of them without a source
    int64_t capacity;        // 1 .. 131071
    int64_t q_stride[3];     // in elements
    const int8_t* k;         // [caches, heads, capacity, head_dim] contiguous
    const float* k_scale;    // [caches, heads, capacity]
    const int8_t* v;         // as k
    const float* v_scale;    // as k_scale; 0 of a zero row
    bool aligned;            // k and v start on 16 bytes, else on 4: pointers are held to it
    const int32_t* lengths;  // [rows]
    const int32_t* source;   // [rows], or [rows, capacity] with by_key, or nullptr
    bool shared;             // there is a source per row
    bool by_key;             // there is one per key
    const void* bias;        // [rows, heads, queries, capacity] by strides, or nullptr
    DType bias_dtype;        //
    int64_t bias_stride[4];  // in elements; 0 where it is repeated
    bool causal;             //
    float softmax_scale;     //
    ActMode mode;            // of Q: per_token or per_tensor
    float clip;              // of Q; 0 = none
    void* out;               // [rows, heads, queries, head_dim] contiguous

    // How it is cut up; results do not depend on it. 0 = by the rule of attention_shape.h for a GPU of `sms`.
    AttentionForm form;  // `keep` the scores of all keys in shared memory, or `redo` them
    int32_t splits;      // blocks that share the keys of a row and head; above 1 a second launch
    int32_t warps;       // of a block
    int32_t sms;

    void* workspace;     // attention_memory() says how much, on 8 bytes; needs no zeros
    uint32_t* counters;  // zeros before the first launch, and zeros again after each
};

struct AttentionMemory {
    int64_t workspace_bytes;
    int64_t counter_bytes;
    int32_t splits;  // what the rule chose
    int32_t warps;
};

// What a call needs besides its operands. Reads the sizes of `args`, no pointer.
Status attention_memory(const CudaAttentionDecode& args, AttentionMemory* out);

// On the current CUDA device, queued on `stream`. Allocates and waits for nothing.
Status cuda_attention_decode(const CudaAttentionDecode& args, void* stream);

}  // namespace dqk
