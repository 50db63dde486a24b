// Whose threads: those of the OpenMP runtime that the process has loaded, which are torch's; else a small
// pool of our own.
//
// torch's OpenMP threads spin for some milliseconds after every parallel op of torch. A second pool would
// have to run beside the spinners, on the same cores (docs/design.md has the figures); the same pool finds
// them awake. torch's wheels export nothing else to borrow them by: at::parallel_for needs libtorch, which
// the core does not link. GOMP_parallel is the entry point that a compiler calls for `#pragma omp parallel`;
// GNU's and LLVM's runtime both have it. It is looked up, never linked: a second copy of the runtime would be
// a second pool.
//
// Without such a runtime (no torch in the process), and in a forked child, where the runtime waits for
// threads that the fork did not copy, a pool of our own sleeps on a condition variable and never spins.
#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace dqk {
namespace {

// Tasks are handed out one by one, so it does not matter how many threads turn up.
struct Job {
    Task task;
    const void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
             i = next.fetch_add(1, std::memory_order_relaxed))
            task(context, i);
    }
};

// ---- the OpenMP runtime of the process --------------------------------------------------------------------

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

GompParallel find_openmp() {
    void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return reinterpret_cast<GompParallel>(found);
}

// ---- a pool of our own ------------------------------------------------------------------------------------

class Pool {
  public:
    // False: the pool is at work for somebody else, perhaps for the caller.
    bool run(Job& job, int32_t helpers) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        {
            std::lock_guard<std::mutex> guard(lock_);
            grow(helpers);
            if (workers_ < helpers) helpers = workers_;
            job_ = &job;
            wanted_ = helpers;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> guard(lock_);
        wanted_ = 0;  // who did not come yet need not
        job_ = nullptr;
        done_.wait(guard, [this] { return running_ == 0; });
        busy_.store(false, std::memory_order_release);
        return true;
    }

  private:
    void grow(int32_t helpers) {
        while (workers_ < helpers) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: those that are there do the work
            }
            ++workers_;
        }
    }

    void serve() {
        std::unique_lock<std::mutex> guard(lock_);
        for (;;) {
            wake_.wait(guard, [this] { return wanted_ > 0; });
            --wanted_;
            ++running_;
            Job* job = job_;
            guard.unlock();
            job->work();
            guard.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::atomic<bool> busy_{false};
    std::mutex lock_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int32_t workers_ = 0, wanted_ = 0, running_ = 0;
};

// Never destroyed: its threads wait in it until the process ends.
std::atomic<Pool*> own_pool{nullptr};
std::atomic<bool> in_child{false};

Pool* pool() {
    Pool* found = own_pool.load(std::memory_order_acquire);
    if (found != nullptr) return found;
    Pool* made = new (std::nothrow) Pool();
    if (made == nullptr) return nullptr;
    if (own_pool.compare_exchange_strong(found, made)) return made;
    delete made;  // it has no threads yet
    return found;
}

// The child has none of the parent's threads, and its locks are in whatever state they were.
void forget_threads() {
    own_pool.store(nullptr);
    in_child.store(true);
}

GompParallel openmp() {
    static const GompParallel found = [] {
        pthread_atfork(nullptr, nullptr, forget_threads);
        return find_openmp();
    }();
    return in_child.load(std::memory_order_relaxed) ? nullptr : found;
}

}  // namespace

void run_tasks(int64_t tasks, int32_t threads, Task task, const void* context) {
    Job job{task, context, tasks};
    if (threads > 1 && tasks > 1) {
        if (const GompParallel parallel = openmp()) {
            // As many as were asked for, even if there are fewer tasks: GNU's runtime ends the threads that a
            // smaller team leaves over, and the next op of torch would have to make them again.
            parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job,
                     static_cast<unsigned>(threads), 0);
        } else if (Pool* own = pool()) {
            own->run(job, static_cast<int32_t>(tasks < threads ? tasks : threads) - 1);
        }
    }
    job.work();  // what is left: all of it, or nothing
}

const char* thread_source() {
    return openmp() != nullptr ? "OpenMP of the process" : "own pool";
}

}  // namespace dqk
