// Memory that a thread keeps between calls: a call of a few microseconds cannot afford to allocate.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace dqk {

// Grows as needed and stays, unless it grew beyond kKept: then the next `trim` gives it back.
class Scratch {
  public:
    static constexpr int64_t kKept = 4 << 20, kAlignment = 64;

    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    // `bytes` aligned to 64, with whatever the last call left in them; nullptr without memory.
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
            memory_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, static_cast<size_t>(rounded)));
            size_ = memory_ == nullptr ? 0 : rounded;
        }
        return memory_;
    }

    void trim() {
        if (size_ <= kKept) return;
        std::free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }

  private:
    uint8_t* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace dqk
