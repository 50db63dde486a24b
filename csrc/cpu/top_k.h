// The order in which torch.topk gives the largest of a row on a CPU (ATen/native/TopKImpl.h):
// std::partial_sort where k is at most a 64th of the row, else std::nth_element and std::sort, all of the C++
// library. They compare values alone, so which of equal ones comes first is the algorithm's; it is repeated
// here with the library's own functions. Whether torch's are the same is asked of a probe
// (`dqkernels.kernels.cpu_beams.orders_as_torch`).
#pragma once
#include <algorithm>
#include <cstdint>

namespace dqk {

struct Scored {
    float value;
    int32_t index;
};

// A NaN is larger than any number.
inline bool is_larger(float x, float y) {
    return (x != x && y == y) || x > y;
}
inline bool scored_larger(const Scored& x, const Scored& y) {
    return is_larger(x.value, y.value);
}

inline bool takes_partial_sort(int64_t k, int64_t n) {
    return k * 64 <= n;
}

// std::partial_sort of a row that is never written out: numbers come one by one, in their order.
class Largest {
  public:
    // all: room for k + 1; the first k numbers stand in it.
    Largest(Scored* all, int64_t k) : all_(all), k_(k) { std::make_heap(all, all + k, scored_larger); }

    // The least of the largest so far: what is not larger changes nothing.
    float least() const { return all_[0].value; }

    void offer(float value, int64_t index) {
        if (!is_larger(value, least())) return;
        // What std::partial_sort does: the new one takes the place of the least, which goes behind the heap.
        all_[k_] = {value, static_cast<int32_t>(index)};
        std::pop_heap(all_, all_ + k_ + 1, scored_larger);
    }

    void sort() { std::sort_heap(all_, all_ + k_, scored_larger); }

  private:
    Scored* all_;
    int64_t k_;
};

// all[0..n) -> all[0..k) the largest, for rows where `takes_partial_sort` says no.
inline void select_largest(Scored* all, int64_t n, int64_t k) {
    std::nth_element(all, all + k - 1, all + n, scored_larger);
    std::sort(all, all + k - 1, scored_larger);
}

// The places of the k largest of x[0..n), in order, at the front of `all`, which has room for n + 1.
template <typename Value>
void order_largest(const Value& x, int64_t n, int64_t k, Scored* all) {
    if (!takes_partial_sort(k, n)) {
        for (int64_t i = 0; i < n; ++i) all[i] = {x(i), static_cast<int32_t>(i)};
        select_largest(all, n, k);
        return;
    }
    for (int64_t i = 0; i < k; ++i) all[i] = {x(i), static_cast<int32_t>(i)};
    Largest largest(all, k);
    for (int64_t i = k; i < n; ++i) largest.offer(x(i), i);
    largest.sort();
}

}  // namespace dqk
