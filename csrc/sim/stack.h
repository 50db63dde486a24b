// A call stack of its own for a function, switched by hand (swapcontext would enter the kernel at every
// switch), with every switch announced to ASan.
#pragma once
#if !defined(__x86_64__) || !defined(__linux__)
#error "the simulator switches stacks by hand, and knows how on x86-64 Linux only"
#endif
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define DQK_ASAN(call) call
#else
#define DQK_ASAN(call) ((void)0)
#endif

// Keeps this stack pointer in *save and goes on where `load` was kept. Outside of C++, so that the compiler
// assumes nothing about it.
extern "C" void dqk_sim_switch(void** save, void* load);
asm(R"(
    .pushsection .text.dqk_sim_switch, "axG", @progbits, dqk_sim_switch, comdat
    .weak dqk_sim_switch
    .type dqk_sim_switch, @function
dqk_sim_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
    .size dqk_sim_switch, .-dqk_sim_switch
    .popsection
)");

namespace dqk {
namespace sim {

class Stack {
  public:
    static constexpr size_t kBytes = 64 * 1024;

    // The next resume() calls body() on this stack, which must be new or have left for good. False: no
    // memory.
    bool start(void (*body)()) {
        constexpr size_t kPage = 4096;
        if (memory_ == nullptr) {  // above an unreadable page; for the process's life
            void* memory = mmap(nullptr, kPage + kBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) return false;
            memory_ = static_cast<char*>(memory) + kPage;
        }
        DQK_ASAN(ASAN_UNPOISON_MEMORY_REGION(memory_, kBytes));
        void** top = reinterpret_cast<void**>(memory_ + kBytes) - 2;
        top[1] = nullptr;  // where first() would return to
        top[0] = reinterpret_cast<void*>(&first);
        for (int32_t i = 1; i <= 6; ++i) top[-i] = nullptr;  // the registers that a switch keeps
        pointer_ = top - 6;
        body_ = body;
        return true;
    }

    // Runs on this stack until it leaves.
    void resume() {
        running_ = this;
        void* fake_stack = nullptr;  // ASan's, of the caller
        DQK_ASAN(__sanitizer_start_switch_fiber(&fake_stack, memory_, kBytes));
        dqk_sim_switch(&outside_pointer_, pointer_);
        DQK_ASAN(__sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr));
        (void)fake_stack;
    }

    // Called on this stack: back to resume(). `for_good`: start() comes next, not resume().
    void leave(bool for_good) {
        void* fake_stack = nullptr;
        DQK_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, outside_, outside_bytes_));
        dqk_sim_switch(&pointer_, outside_pointer_);
        DQK_ASAN(__sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr));
        (void)fake_stack;
        (void)for_good;
    }

    bool holds(const void* p) const {
        const char* at = static_cast<const char*>(p);
        return at >= memory_ && at < memory_ + kBytes;
    }

  private:
    static void first() {
        DQK_ASAN(__sanitizer_finish_switch_fiber(nullptr, &outside_, &outside_bytes_));
        running_->body_();
        running_->leave(true);
        std::abort();
    }

    char* memory_ = nullptr;
    void* pointer_ = nullptr;
    void (*body_)() = nullptr;
    // One caller, one running stack at a time.
    static inline Stack* running_ = nullptr;
    static inline void* outside_pointer_ = nullptr;
    static inline const void* outside_ = nullptr;
    static inline size_t outside_bytes_ = 0;
};

}  // namespace sim
}  // namespace dqk
