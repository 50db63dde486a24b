// Which instruction sets this CPU and its operating system offer, read with cpuid rather than the compiler's
// __builtin_cpu_supports: the names the latter knows differ between compilers.
#include <cstdlib>
#include <cstring>

#include "dqk/api.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dqk {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar",      "avx2",     "avx_vnni",
                                           "avx512_vnni", "amx_int8", "dotprod"};

struct Support {
    bool has[kIsaCount] = {true, false, false, false, false, false};
    bool& operator[](Isa isa) { return has[static_cast<int32_t>(isa)]; }
};

#if defined(DQK_EVERY_ISA)  // tests/sim: the sources for x86-64 on models of their instructions

Support detect() {
    Support found;
    for (bool& has : found.has) has = true;
#if !defined(DQK_NEON_MODEL)
    found[Isa::dotprod] = false;
#endif
    return found;
}

#elif defined(__x86_64__)

bool bit(uint32_t word, int index) {
    return (word >> index) & 1u;
}

// The operating system must save the registers too: XCR0 says which.
uint64_t enabled_state() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the AMX tile registers per process and on request only; without it the first tile
// instruction traps.
bool request_amx() {
#if defined(__linux__)
    constexpr long kArchReqXcompPerm = 0x1023;
    constexpr long kTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
    return false;
#endif
}

Support detect() {
    Support found;
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
    const bool osxsave = bit(ecx, 27), f16c = bit(ecx, 29);
    if (!osxsave || !f16c) return found;
    const uint64_t state = enabled_state();
    const bool ymm = (state & 0x06u) == 0x06u;
    const bool zmm = (state & 0xE6u) == 0xE6u;
    const bool tiles = (state & 0x60000u) == 0x60000u;
    if (!ymm || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    const uint32_t last_subleaf = eax;
    const bool avx2 = bit(ebx, 5);
    const bool avx512 = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);  // F, DQ, BW, VL
    const bool avx512_vnni = bit(ecx, 11), amx = bit(edx, 24) && bit(edx, 25);
    uint32_t leaf1_eax = 0;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) leaf1_eax = eax;

    found[Isa::avx2] = avx2;
    found[Isa::avx_vnni] = avx2 && bit(leaf1_eax, 4);
    found[Isa::avx512_vnni] = avx2 && zmm && avx512 && avx512_vnni;
    found[Isa::amx_int8] = found[Isa::avx512_vnni] && tiles && amx && request_amx();
    return found;
}

#elif defined(__aarch64__)

Support detect() {
    Support found;
#if defined(__linux__)
    constexpr unsigned long kAsimdDp = 1ul << 20;
    found[Isa::dotprod] = (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
    found[Isa::dotprod] = true;  // every Apple arm64 processor has it
#endif
    return found;
}

#else

Support detect() {
    return Support();
}

#endif

Support& support() {
    static Support found = detect();
    return found;
}

struct Choice {
    Status status;
    Isa isa;
};

Choice choose() {
    const char* forced = std::getenv("DQKERNELS_CPU");
    if (forced == nullptr || *forced == '\0') {
        Isa best = Isa::scalar;  // the enum ascends in worth within one architecture
        // AMX tiles, a unit with a state of its own that the system grants, were executed over modelled
        // instructions only: they are asked for by name until they ran on a processor.
        for (int32_t i = 0; i < kIsaCount; ++i)
            if (support().has[i] && static_cast<Isa>(i) != Isa::amx_int8) best = static_cast<Isa>(i);
        return {Status::ok, best};
    }
    for (int32_t i = 0; i < kIsaCount; ++i) {
        if (std::strcmp(forced, kNames[i]) != 0) continue;
        return {support().has[i] ? Status::ok : Status::unsupported_isa, static_cast<Isa>(i)};
    }
    return {Status::unknown_isa, Isa::scalar};
}

}  // namespace

const char* isa_name(Isa isa) {
    return kNames[static_cast<int32_t>(isa)];
}

bool isa_supported(Isa isa) {
    return support()[isa];
}

Status active_isa(Isa* isa) {
    static const Choice choice = choose();
    *isa = choice.isa;
    return choice.status;
}

}  // namespace dqk
