// csrc/cpu/gemm_dotprod.cpp as it is, on modelled NEON registers.
#define DQK_NEON_MODEL
#define dotprod_gemm model_dotprod_gemm
#include "cpu/gemm_dotprod.cpp"
