// csrc/cpu/gemm_amx.cpp as it is, on modelled tiles; what needs AVX-512 is that source on
// modelled registers (gemm_avx512_model.cpp).
#define DQK_TARGET __attribute__((target("avx2,f16c")))
#define avx512_vnni_gemm model_avx512_vnni_gemm
#define amx_int8_gemm model_amx_gemm
#include "amx_model.h"
//
#include "cpu/gemm_amx.cpp"

namespace dqk::amx_model {

thread_local Tiles tiles;
std::atomic<int64_t> configured{0};

}  // namespace dqk::amx_model
