// Before one of csrc/cpu's sources for AVX-512 or VNNI: its intrinsics become the model's (avx512_model.h),
// its registers the model's, and its functions are compiled for AVX2. An intrinsic that is missing here stays
// the real one, which does not compile for AVX2 and does not take the model's registers.
#pragma once
#include <functional>  // before `target` is a macro: std::function has a member of that name

#include "avx512_model.h"

#define DQK_AVX512_MODEL
#define target(...) target("avx2,f16c")
#define __m512i ::dqk::avx512_model::Ints
#define __m512 ::dqk::avx512_model::Floats

// Some are macros of the compiler's headers where it does not optimize.
#undef _mm512_srli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi32
#undef _mm512_ternarylogic_epi32
#undef _mm512_inserti64x4
#undef _mm512_extracti64x4_epi64
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpbusd_epi32
#undef _mm512_dpbusd_epi32
#define _mm512_setzero_si512 ::dqk::avx512_model::setzero_si512
#define _mm512_set1_epi8 ::dqk::avx512_model::set1_epi8
#define _mm512_set1_epi32 ::dqk::avx512_model::set1_epi32
#define _mm512_set1_ps ::dqk::avx512_model::set1_ps
#define _mm512_loadu_si512 ::dqk::avx512_model::loadu_si512
#define _mm512_storeu_si512 ::dqk::avx512_model::storeu_si512
#define _mm512_maskz_loadu_ps ::dqk::avx512_model::maskz_loadu_ps
#define _mm256_maskz_loadu_epi16 ::dqk::avx512_model::maskz_loadu_epi16_256
#define _mm512_mask_cvtepi32_storeu_epi8 ::dqk::avx512_model::mask_cvtepi32_storeu_epi8
#define _mm512_castsi256_si512 ::dqk::avx512_model::castsi256_si512
#define _mm512_castsi512_si256 ::dqk::avx512_model::castsi512_si256
#define _mm512_extracti64x4_epi64 ::dqk::avx512_model::extracti64x4_epi64
#define _mm512_inserti64x4 ::dqk::avx512_model::inserti64x4
#define _mm512_broadcast_i64x4 ::dqk::avx512_model::broadcast_i64x4
#define _mm512_castps_si512 ::dqk::avx512_model::castps_si512
#define _mm512_castsi512_ps ::dqk::avx512_model::castsi512_ps
#define _mm512_add_epi8 ::dqk::avx512_model::add_epi8
#define _mm512_add_epi32 ::dqk::avx512_model::add_epi32
#define _mm512_sub_epi32 ::dqk::avx512_model::sub_epi32
#define _mm512_mullo_epi32 ::dqk::avx512_model::mullo_epi32
#define _mm512_and_si512 ::dqk::avx512_model::and_si512
#define _mm512_xor_si512 ::dqk::avx512_model::xor_si512
#define _mm512_max_epu32 ::dqk::avx512_model::max_epu32
#define _mm512_srli_epi16 ::dqk::avx512_model::srli_epi16
#define _mm512_slli_epi32 ::dqk::avx512_model::slli_epi32
#define _mm512_srai_epi32 ::dqk::avx512_model::srai_epi32
#define _mm512_srav_epi32 ::dqk::avx512_model::srav_epi32
#define _mm512_ternarylogic_epi32 ::dqk::avx512_model::ternarylogic_epi32
#define _mm512_srlv_epi16 ::dqk::avx512_model::srlv_epi16
#define _mm512_madd_epi16 ::dqk::avx512_model::madd_epi16
#define _mm512_dpbusd_epi32 ::dqk::avx512_model::dpbusd_epi32
#define _mm256_dpbusd_epi32 ::dqk::avx512_model::dpbusd_epi32_256
#define _mm256_dpbusd_avx_epi32 ::dqk::avx512_model::dpbusd_epi32_256
#define _mm512_cvtepu16_epi32 ::dqk::avx512_model::cvtepu16_epi32
#define _mm512_reduce_add_epi32 ::dqk::avx512_model::reduce_add_epi32
#define _mm512_reduce_max_epu32 ::dqk::avx512_model::reduce_max_epu32
#define _mm512_add_ps ::dqk::avx512_model::add_ps
#define _mm512_mul_ps ::dqk::avx512_model::mul_ps
#define _mm512_min_ps ::dqk::avx512_model::min_ps
#define _mm512_max_ps ::dqk::avx512_model::max_ps
#define _mm512_xor_ps ::dqk::avx512_model::xor_ps
#define _mm512_cvtph_ps ::dqk::avx512_model::cvtph_ps
