// csrc/cpu/gemm_avx512_vnni.cpp as it is, on modelled registers.
#include "avx512_names.h"
//
#define avx512_vnni_gemm model_avx512_vnni_gemm
#include "cpu/gemm_avx512_vnni.cpp"
