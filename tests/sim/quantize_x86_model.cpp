// csrc/cpu/quantize_x86.cpp as it is, on modelled registers.
#include "avx512_names.h"
//
#include "cpu/quantize_x86.cpp"
