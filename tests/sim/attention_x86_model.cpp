// csrc/cpu/attention_x86.cpp as it is, on the modelled dot product.
#include "avx512_names.h"
//
#include "cpu/attention_x86.cpp"
