// csrc/cpu/isa.cpp as it is, on a processor that has every instruction set: those of avx512_model.h, and of
// amx_model.h.
#define DQK_EVERY_ISA
#include "cpu/isa.cpp"
