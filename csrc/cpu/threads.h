// Work shared among threads on a CPU: `parallel_for`. Which threads, and why, is in threads.cpp.
#pragma once
#include <cstdint>

namespace dqk {

// One of the tasks of a call; runs on any thread, with any other.
using Task = void (*)(const void* context, int64_t index);

// Runs task(context, 0) ... task(context, tasks - 1), each once, and returns when all have run. At most
// `threads` threads take part, the caller's among them; with fewer than asked for (a busy pool, a process
// that cannot make more) the rest of them do all the work. Never throws; may be called from several threads
// at once, from inside a task, and in a process that was forked.
void run_tasks(int64_t tasks, int32_t threads, Task task, const void* context);

// The same for body(index). A task must not throw.
template <typename Body>
void parallel_for(int64_t tasks, int32_t threads, const Body& body) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t i = 0; i < tasks; ++i) body(i);
        return;
    }
    run_tasks(
        tasks, threads, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
        &body);
}

// Runs body(context) once, on the caller's thread, with `threads` threads called together for as long as it
// takes: what it shares by run_tasks meanwhile finds them waiting for work (what asks for fewer threads than
// that runs on the caller alone). For many short calls in a row: waking threads anew for each costs more than
// some of them take. The body must not throw. Where the process has no processor left for each thread that
// waits so, it is run as if called.
void run_together(int32_t threads, void (*body)(void* context), void* context);

template <typename Body>
void together(int32_t threads, const Body& body) {
    run_together(
        threads, [](void* context) noexcept { (*static_cast<const Body*>(context))(); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Whose threads `run_tasks` borrows in this process: "OpenMP of the process" or "own pool".
const char* thread_source();

}  // namespace dqk
