// Memory for the length of a call, on a boundary of 64 bytes. Never throws: an empty one says there was none.
#pragma once
#include <cstdint>
#include <new>

namespace dqk {

class Buffer {
  public:
    explicit Buffer(int64_t bytes)
        : data_(::operator new(static_cast<size_t>(bytes < 1 ? 1 : bytes), kAlign, std::nothrow)) {}
    ~Buffer() { ::operator delete(data_, kAlign); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    bool empty() const { return data_ == nullptr; }

    // The next `count` elements of a buffer whose size was the sum of `bytes_of` its parts.
    template <typename T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
        used_ += bytes_of<T>(count);
        return part;
    }
    template <typename T>
    static constexpr int64_t bytes_of(int64_t count) {
        return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    }

  private:
    static constexpr std::align_val_t kAlign{64};
    void* data_;
    int64_t used_ = 0;
};

}  // namespace dqk
