// csrc/cpu/threads.cpp as it is, with a team even where the machine has fewer processors: that threads which
// were called together really share the work, whoever asks for it and however. test_cpu_step_sim.py runs it.
#define DQK_TEAM_ALWAYS
#include "cpu/threads.cpp"

#include <chrono>
#include <cstdio>
#include <set>
#include <vector>

namespace {

std::atomic<int> failures{0};

void expect(bool found, const char* what) {
    if (found) return;
    ++failures;
    std::printf("FAILED %s\n", what);
}

// Tasks that wait for each other, so that each takes a thread of its own. False: somebody waited in vain.
bool meet(int64_t tasks, int32_t threads, std::set<std::thread::id>* seen) {
    std::atomic<int64_t> arrived{0};
    std::atomic<bool> vain{false};
    std::mutex lock;
    dqk::parallel_for(tasks, threads, [&](int64_t) {
        {
            const std::lock_guard<std::mutex> guard(lock);
            seen->insert(std::this_thread::get_id());
        }
        ++arrived;
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (arrived < tasks && !vain) {
            if (std::chrono::steady_clock::now() > end) vain = true;
            std::this_thread::yield();
        }
    });
    return !vain;
}

int64_t sum_of(int64_t tasks, int32_t threads) {
    std::atomic<int64_t> sum{0};
    dqk::parallel_for(tasks, threads, [&](int64_t i) { sum += i; });
    return sum;
}

void shared() {
    std::set<std::thread::id> seen;
    int times = 0;
    bool met = true;
    dqk::together(3, [&] {
        ++times;
        for (int round = 0; round < 50 && met; ++round) met = meet(3, 3, &seen);
    });
    expect(met, "threads called together take a task each");
    expect(times == 1, "the body runs once");
    expect(!met || seen.size() == 3, "the same threads for as long as the body takes");
}

void asked_otherwise() {
    dqk::together(3, [&] {
        const auto caller = std::this_thread::get_id();
        bool alone = true;
        dqk::parallel_for(8, 2, [&](int64_t) { alone = alone && std::this_thread::get_id() == caller; });
        expect(alone, "what asks for fewer threads runs on the caller");
        expect(sum_of(1000, 9) == 499500, "more threads than there are");
        expect(sum_of(2, 3) == 1, "fewer tasks than threads");
        std::atomic<int64_t> inner{0};
        dqk::parallel_for(4, 3, [&](int64_t) { inner += sum_of(100, 3); });
        expect(inner == 4 * 4950, "a task that shares work itself");
        int64_t nested = 0;
        dqk::together(3, [&] { nested = sum_of(1000, 3); });
        expect(nested == 499500, "together within together");
    });
    std::set<std::thread::id> seen;
    expect(meet(3, 3, &seen) && seen.size() == 3, "afterwards calls are shared one by one again");
}

void several_callers() {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([] {
            for (int round = 0; round < 100; ++round)
                dqk::together(3, [] { expect(sum_of(300, 3) == 44850, "several callers at once"); });
        });
    for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
    shared();
    asked_otherwise();
    several_callers();
    std::printf("%d failures\n", failures.load());
    return failures == 0 ? 0 : 1;
}
