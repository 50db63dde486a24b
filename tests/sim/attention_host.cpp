// cuda_attention_decode on the simulator, called as the binding calls it; `memory` asks attention_memory
// instead, `launch far caches` puts more than 4 GiB of other caches before the given ones first.
#include <sys/mman.h>

#include "dqk/api.h"
#include "protocol.h"

namespace {

// `bytes` at the end of memory that begins `before` bytes earlier. Memory that nobody touches costs nothing.
template <class T>
const T* far(const T* from, size_t before, size_t bytes) {
    void* at = mmap(nullptr, before + bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) std::abort();
    std::memcpy(static_cast<char*>(at) + before, from, bytes);
    return static_cast<const T*>(at);
}

// By key: the given caches become the last ones of many.
void move_far(dqk::CudaAttentionDecode* args, std::vector<int32_t>* source) {
    const auto keys = static_cast<size_t>(args->heads * args->capacity);
    const auto row = static_cast<size_t>(args->head_dim);
    const size_t others = (size_t{1} << 32) / (keys * row) + 1, given = static_cast<size_t>(args->caches);
    args->k = far(args->k, others * keys * row, given * keys * row);
    args->v = far(args->v, others * keys * row, given * keys * row);
    args->k_scale = far(args->k_scale, 4 * others * keys, 4 * given * keys);
    args->v_scale = far(args->v_scale, 4 * others * keys, 4 * given * keys);
    args->caches += static_cast<int64_t>(others);
    source->assign(args->source, args->source + args->rows * args->capacity);
    for (int32_t& cache : *source) cache += static_cast<int32_t>(others);
    args->source = source->data();
}

// scalars: dtype, rows, heads, queries, head_dim, caches, capacity, 3 strides of q, aligned, shared, by_key,
// bias_dtype, 4 strides of the bias, causal, softmax_scale, mode, clip, form, splits, warps, sms. buffers: q,
// k, k_scale, v, v_scale, lengths, source, bias, out, workspace, counters. For `memory` a single one, int64
// [4].
dqk::Status run(const dqk::sim::Request& request) {
    dqk::CudaAttentionDecode args = {};
    size_t i = 0;
    const auto next = [&] { return request.integer(i++); };
    args.dtype = static_cast<dqk::DType>(next());
    args.rows = next();
    args.heads = next();
    args.queries = next();
    args.head_dim = next();
    args.caches = next();
    args.capacity = next();
    for (int64_t& stride : args.q_stride) stride = next();
    args.aligned = next() != 0;
    args.shared = next() != 0;
    args.by_key = next() != 0;
    args.bias_dtype = static_cast<dqk::DType>(next());
    for (int64_t& stride : args.bias_stride) stride = next();
    args.causal = next() != 0;
    args.softmax_scale = static_cast<float>(request.real(i++));
    args.mode = static_cast<dqk::ActMode>(next());
    args.clip = static_cast<float>(request.real(i++));
    args.form = static_cast<dqk::AttentionForm>(next());
    args.splits = static_cast<int32_t>(next());
    args.warps = static_cast<int32_t>(next());
    args.sms = static_cast<int32_t>(next());
    if (request.function == "memory") {
        dqk::AttentionMemory memory = {};
        const dqk::Status status = dqk::attention_memory(args, &memory);
        auto* out = request.pointer<int64_t>(0);
        out[0] = memory.workspace_bytes, out[1] = memory.counter_bytes;
        out[2] = memory.splits, out[3] = memory.warps;
        return status;
    }
    size_t b = 0;
    args.q = request.pointer<const void>(b++);
    args.k = request.pointer<const int8_t>(b++);
    args.k_scale = request.pointer<const float>(b++);
    args.v = request.pointer<const int8_t>(b++);
    args.v_scale = request.pointer<const float>(b++);
    args.lengths = request.pointer<const int32_t>(b++);
    args.source = request.pointer<const int32_t>(b++);
    args.bias = request.pointer<const void>(b++);
    args.out = request.pointer<void>(b++);
    args.workspace = request.pointer<void>(b++);
    args.counters = request.pointer<uint32_t>(b++);
    std::vector<int32_t> source;
    if (request.function == "launch far caches") move_far(&args, &source);
    return dqk::cuda_attention_decode(args, nullptr);
}

}  // namespace

int main() {
    dqk::sim::serve(run);
}
