// The activation quantizer on a GPU: one block per row, blocks striding over rows. The arithmetic is
// rounding.h's.
//
// per_tensor needs the largest magnitude of all rows before the first code. Its rows pass it through `scale`,
// so that no scratch memory is needed: row maxima, then one block spreads their maximum, then every block
// reads only its own entry.
#include "cuda/launch.h"
#include "dqk/api.h"
#include "dqk/element.h"
#include "dqk/rounding.h"

namespace dqk {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kMaxThreads = 256;
constexpr int32_t kMaxWarps = kMaxThreads / kWarp;
constexpr int64_t kMaxBlocks = 65536;  // more rows than this are reached by striding
constexpr int32_t kStep = 8;           // elements per thread and step: one 16-byte load of 16-bit floats

// ---- device helpers ---------------------------------------------------------------------------------------

struct MaxOf {
    static DQK_HD uint32_t of(uint32_t a, uint32_t b) { return a > b ? a : b; }
};
struct SumOf {
    static DQK_HD uint32_t of(uint32_t a, uint32_t b) { return a + b; }  // two's complement: signed sums too
};

// Reduces `v` over the block; every thread gets the result. Safe to call again at once.
template <typename Op>
__device__ uint32_t block_reduce(uint32_t v, uint32_t* shared) {
    for (int32_t lane = kWarp / 2; lane > 0; lane /= 2) v = Op::of(v, __shfl_xor_sync(0xFFFFFFFFu, v, lane));
    const int32_t warps = static_cast<int32_t>(blockDim.x) / kWarp;
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    v = shared[0];
    for (int32_t warp = 1; warp < warps; ++warp) v = Op::of(v, shared[warp]);
    __syncthreads();
    return v;
}

// kVector: rows start on 16 bytes and k is a multiple of kStep, so that a step is whole 16-byte loads.
template <DType kType, bool kVector>
__device__ void load_step(const typename Element<kType>::type* row, int64_t i, int32_t count, float* out) {
    using T = typename Element<kType>::type;
    if constexpr (kVector) {
        (void)count;
        constexpr int32_t kLoads = kStep * static_cast<int32_t>(sizeof(T)) / 16;
        alignas(16) T raw[kStep];
        for (int32_t j = 0; j < kLoads; ++j)
            reinterpret_cast<uint4*>(raw)[j] = reinterpret_cast<const uint4*>(row + i)[j];
        for (int32_t j = 0; j < kStep; ++j) out[j] = Element<kType>::widen(raw[j]);
    } else {
        for (int32_t j = 0; j < count; ++j) out[j] = Element<kType>::widen(row[i + j]);
    }
}

// Without vectors a thread takes one element a step, so that neighbours still read neighbours.
template <bool kVector>
constexpr int32_t kElements = kVector ? kStep : 1;

template <DType kType, bool kVector>
__device__ uint32_t row_amax_bits(const typename Element<kType>::type* row, int64_t k, uint32_t* shared) {
    constexpr int32_t kCount = kElements<kVector>;
    uint32_t amax = 0;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kCount; i < k;
         i += static_cast<int64_t>(blockDim.x) * kCount) {
        float values[kCount];
        load_step<kType, kVector>(row, i, kCount, values);
        for (int32_t j = 0; j < kCount; ++j) amax = MaxOf::of(amax, magnitude_bits(values[j]));
    }
    return block_reduce<MaxOf>(amax, shared);
}

// ---- kernels ----------------------------------------------------------------------------------------------

// per_tensor, step 1: amax[row] = the row's largest magnitude, NaN and Inf on top.
template <DType kType, bool kVector>
__global__ void row_amax_kernel(const typename Element<kType>::type* x, int64_t rows, int64_t k,
                                int64_t row_stride, float* amax) {
    DQK_SHARED(uint32_t, shared, kMaxWarps);
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const uint32_t bits = row_amax_bits<kType, kVector>(x + row * row_stride, k, shared);
        if (threadIdx.x == 0) amax[row] = bits_float(bits);
    }
}

// per_tensor, step 2, one block: amax[*] = max over rows.
__global__ void spread_max_kernel(float* amax, int64_t rows) {
    DQK_SHARED(uint32_t, shared, kMaxWarps);
    uint32_t bits = 0;
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
        bits = MaxOf::of(bits, float_bits(amax[row]));
    bits = block_reduce<MaxOf>(bits, shared);
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) amax[row] = bits_float(bits);
}

// scale: [rows]; under per_tensor it comes in holding amax and goes out holding the scale.
template <DType kType, bool kVector>
__global__ void quantize_rows_kernel(const typename Element<kType>::type* x, int64_t rows, int64_t k,
                                     int64_t row_stride, ActMode mode, float clip, float act_scale,
                                     const float* act_scale_pointer, int8_t* q, float* scale,
                                     int32_t* row_sum) {
    constexpr int32_t kCount = kElements<kVector>;
    DQK_SHARED(uint32_t, shared, kMaxWarps);
    if (act_scale_pointer != nullptr) act_scale = *act_scale_pointer;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const typename Element<kType>::type* in = x + row * row_stride;
        uint32_t amax = 0;
        if (mode == ActMode::per_tensor) {
            amax = float_bits(scale[row]);
            __syncthreads();  // all have read it before thread 0 overwrites it below
        } else {
            amax = row_amax_bits<kType, kVector>(in, k, shared);
        }
        const RowScale s =
            mode == ActMode::static_scale ? static_scale(amax, act_scale) : dynamic_scale(amax, clip);

        uint32_t sum = 0;
        for (int64_t i = static_cast<int64_t>(threadIdx.x) * kCount; i < k;
             i += static_cast<int64_t>(blockDim.x) * kCount) {
            alignas(8) int8_t codes[kCount] = {};
            if (s.inv != 0.0f) {
                float values[kCount];
                load_step<kType, kVector>(in, i, kCount, values);
                for (int32_t j = 0; j < kCount; ++j) {
                    const int32_t code = quantize_one(values[j], s.inv, clip);
                    codes[j] = static_cast<int8_t>(code);
                    sum += static_cast<uint32_t>(code);
                }
            }
            int8_t* out = q + row * k + i;
            if constexpr (kVector)
                *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(codes);
            else
                *out = codes[0];
        }
        if (threadIdx.x == 0) scale[row] = s.scale;
        if (row_sum != nullptr) {
            sum = block_reduce<SumOf>(sum, shared);
            if (threadIdx.x == 0) row_sum[row] = static_cast<int32_t>(sum);
        }
    }
}

// ---- launcher ---------------------------------------------------------------------------------------------

template <DType kType, bool kVector>
Status launch_rows(const QuantizeRows& args, const float* act_scale, void* stream) {
    const auto* x = static_cast<const typename Element<kType>::type*>(args.x);
    const float clip = args.clip == 0.0f ? kNoClip : args.clip;
    const int64_t wanted = (args.k + kElements<kVector> - 1) / kElements<kVector>;
    const int64_t whole_warps = (wanted + kWarp - 1) / kWarp * kWarp;
    Launch shape;
    shape.grid_x = static_cast<uint32_t>(args.rows < kMaxBlocks ? args.rows : kMaxBlocks);
    shape.threads = static_cast<uint32_t>(whole_warps < kMaxThreads ? whole_warps : kMaxThreads);
    shape.stream = stream;

    if (args.mode == ActMode::per_tensor) {
        Status status =
            launch(row_amax_kernel<kType, kVector>, shape, x, args.rows, args.k, args.row_stride, args.scale);
        if (status != Status::ok) return status;
        Launch one_block;
        one_block.threads = kMaxThreads;
        one_block.stream = stream;
        status = launch(spread_max_kernel, one_block, args.scale, args.rows);
        if (status != Status::ok) return status;
    }
    return launch(quantize_rows_kernel<kType, kVector>, shape, x, args.rows, args.k, args.row_stride,
                  args.mode, clip, args.act_scale, act_scale, args.q, args.scale, args.row_sum);
}

template <DType kType>
Status launch_rows(const QuantizeRows& args, const float* act_scale, void* stream) {
    const bool vector = args.k % kStep == 0 && aligned(args.x, 16) && aligned(args.q, 8) &&
                        (args.row_stride * element_bytes(kType)) % 16 == 0;
    return vector ? launch_rows<kType, true>(args, act_scale, stream)
                  : launch_rows<kType, false>(args, act_scale, stream);
}

}  // namespace

Status cuda_quantize_rows(const QuantizeRows& args, const float* act_scale, void* stream) {
    QuantizeRows checked = args;
    if (act_scale != nullptr)
        checked.act_scale = 1.0f;  // the real one is on the device; its loader has judged it
    const Status status = check(checked);
    if (status != Status::ok || args.rows == 0) return status;
    switch (args.dtype) {
        case DType::float16:
            return launch_rows<DType::float16>(args, act_scale, stream);
        case DType::bfloat16:
            return launch_rows<DType::bfloat16>(args, act_scale, stream);
        default:
            return launch_rows<DType::float32>(args, act_scale, stream);
    }
}

}  // namespace dqk
