// Threads: the OpenMP pool that torch itself computes on, found at run time.
//
// torch's threads spin for a while after every operation. A second pool would compete with them for the same cores, and
// linking any OpenMP library here could bring a second one into the process; so nothing is linked, and the library that
// torch depends on is asked for its own entry points.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>

namespace lowbit {

// Runs work(context) once on each of `threads` threads, this one among them, or returns false: there is no pool, this
// is inside a parallel region, or this process was forked (a child has none of its parent's threads).
bool run_on_pool(int threads, void (*work)(void*), void* context);

// The library whose pool is used, or why there is none, in words; `used` tells which it is.
std::string describe_pool(bool& used);

// f(task) for every task in [0, tasks), on up to `threads` threads; or f(task, worker) with worker in [0, threads), for
// room that a thread keeps from task to task. Tasks are claimed one after another as threads become free, so no result
// may depend on which thread takes which: a task owns its outputs. The first exception is thrown here, after all
// threads have left; tasks that had not begun are dropped.
template <class F>
void parallel_for(int64_t tasks, int threads, const F& f) {
  struct Region {
    const F& f;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    Region(const F& f, int64_t tasks) : f(f), tasks(tasks) {}

    void call(int64_t task, int worker) const {
      if constexpr (std::is_invocable_v<const F&, int64_t, int>) {
        f(task, worker);
      } else {
        f(task);
      }
    }

    void work() noexcept {
      const int worker = workers.fetch_add(1, std::memory_order_relaxed);
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        try {
          call(task, worker);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
          next.store(tasks, std::memory_order_relaxed);
        }
      }
    }
  };
  Region region(f, tasks);
  // All threads are asked for even if there are fewer tasks: OpenMP ends the threads that a smaller team does not
  // need, and the next operation of torch would have to start them again.
  if (threads > 1 && tasks > 1 && run_on_pool(threads, [](void* at) { static_cast<Region*>(at)->work(); }, &region)) {
    if (region.error) std::rethrow_exception(region.error);
    return;
  }
  for (int64_t task = 0; task < tasks; ++task) region.call(task, 0);
}

}  // namespace lowbit
