// csrc/cpu/isa.cpp as it is, on a processor that has every instruction set: those of avx512_model.h, of
// amx_model.h, and that of neon_model.h in a program that is built on it (DQK_NEON_MODEL).
#define DQK_EVERY_ISA
#include "cpu/isa.cpp"
