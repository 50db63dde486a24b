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
// GNU's runtime lets its threads spin for the next call only while it counts no more of them than there are
// processors. A second thread of the process that ever shared work by it (CTranslate2's, a server's) ends
// that: from then on every call wakes a thread that sleeps, and a decode step makes dozens of calls. So a
// step calls its threads together once (`run_together`), and hands its work to them itself. They spin
// meanwhile; so this is done only while all such threads have a processor each.
//
// Without such a runtime (no torch in the process), and in a forked child, where the runtime waits for
// threads that the fork did not copy, a pool of our own sleeps on a condition variable, but for the length of
// a step.
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

// ---- threads called together -----------------------------------------------------------------------------

// Waits for another thread: a while on the processor, then behind whoever else wants it.
class Patience {
  public:
    void wait() {
        if (++pauses_ > kPauses) {
            std::this_thread::yield();
            return;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

  private:
    static constexpr int32_t kPauses = 4000;
    int32_t pauses_ = 0;
};

class Team {
  public:
    Team(int32_t threads, void (*body)(void*), void* context)
        : threads_(threads), caller_(std::this_thread::get_id()), body_(body), context_(context) {}

    // What each thread does that comes. There are as many tasks as threads and a helper keeps the one it
    // took, so that one is left for the caller, however many come.
    static void join(const void* team, int64_t) {
        auto* self = const_cast<Team*>(static_cast<const Team*>(team));
        if (std::this_thread::get_id() == self->caller_)
            self->lead();
        else
            self->serve();
    }

    int32_t threads() const { return threads_; }

    // By the caller, from within the body. False: it is at a job already, and this one comes out of that.
    bool run(Job& job) {
        if (job_ != nullptr) return false;
        job_ = &job;
        epoch_.fetch_add(1);  // odd: open
        job.work();
        epoch_.fetch_add(1);
        for (Patience patience; working_.load() > 0;) patience.wait();
        job_ = nullptr;
        return true;
    }

    static thread_local Team* current;  // of a caller within its body

    // Threads that spin want a processor each: of all teams of the process no more come together than there
    // are. Those that find no room share each call as it comes, by threads that sleep.
    static bool admitted(int32_t threads) {
#if defined(DQK_TEAM_ALWAYS)  // tests/long: more of them than this machine has
        (void)threads;
        return true;
#else
        static const auto processors = static_cast<int32_t>(std::thread::hardware_concurrency());
        if (at_work.fetch_add(threads) + threads <= processors) return true;
        at_work.fetch_sub(threads);
        return false;
#endif
    }
    static void dismiss(int32_t threads) { at_work.fetch_sub(threads); }
    static std::atomic<int32_t> at_work;

  private:
    void lead() {
        if (led_) return;
        led_ = true;
        current = this;
        body_(context_);
        current = nullptr;
        over_.store(true);
    }

    void serve() {
        uint64_t seen = 0;
        for (;;) {
            uint64_t now = epoch_.load();
            for (Patience patience; now == seen || now % 2 == 0; now = epoch_.load()) {
                if (over_.load()) return;
                patience.wait();
            }
            // Announced first, then looked at again: either the job is still open, or the caller, who closes
            // it before it looks at `working_`, does not wait for this thread, which leaves it alone.
            working_.fetch_add(1);
            if (epoch_.load() == now) job_->work();
            working_.fetch_sub(1);
            seen = now;
        }
    }

    const int32_t threads_;
    const std::thread::id caller_;
    void (*const body_)(void*);
    void* const context_;
    bool led_ = false;
    Job* job_ = nullptr;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int32_t> working_{0};
    std::atomic<bool> over_{false};
};

thread_local Team* Team::current = nullptr;
std::atomic<int32_t> Team::at_work{0};

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
    Team::at_work.store(0);
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
    Team* team = Team::current;
    if (team != nullptr) {
        if (threads >= team->threads() && tasks > 1) team->run(job);
    } else if (threads > 1 && tasks > 1) {
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

void run_together(int32_t threads, void (*body)(void*), void* context) {
    if (threads <= 1 || Team::current != nullptr || !Team::admitted(threads)) {
        body(context);
        return;
    }
    Team team(threads, body, context);
    run_tasks(threads, threads, Team::join, &team);
    Team::dismiss(threads);
}

const char* thread_source() {
    return openmp() != nullptr ? "OpenMP of the process" : "own pool";
}

}  // namespace dqk
