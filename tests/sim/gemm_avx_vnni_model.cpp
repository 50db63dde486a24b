// csrc/cpu/gemm_avx_vnni.cpp as it is, on the modelled dot product.
#include "avx512_names.h"
//
#define avx_vnni_gemm model_avx_vnni_gemm
#include "cpu/gemm_avx_vnni.cpp"
