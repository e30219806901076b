// Threads: the OpenMP pool that torch itself computes on, found at run time.
//
// torch's threads spin for a while after every operation. A second pool would compete with them for the same cores, and
// linking any OpenMP library here could bring a second one into the process; so nothing is linked, and the library that
// torch depends on is asked for its own entry points.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>

namespace lowbit {

// Runs work(context, i) once on each of `threads` threads, this one among them as number 0, or returns false: there is
// no pool, this is inside a parallel region, or this process was forked (a child has none of its parent's threads).
// A thread of the pool has the same number in every call.
bool run_on_pool(int threads, void (*work)(void*, int), void* context);

// The library whose pool is used, or why there is none, in words; `used` tells which it is.
std::string describe_pool(bool& used);

constexpr int kMostShares = 64;  // of tasks; of more threads some have one in common

// f(task) for every task in [0, tasks), on up to `threads` threads; or f(task, worker) with worker in [0, threads), for
// room that a thread keeps from task to task.
//
// A thread first takes a share of its own, in order: it reads on where it has read, so that what was asked for ahead of
// time serves it and not another, and in the next call it finds the same part of a weight in its cache. Then it takes
// what others have not begun. So no result may depend on which thread takes which: a task owns its outputs. The first
// exception is thrown here, after all threads have left; tasks that had not begun are dropped.
template <class F>
void parallel_for(int64_t tasks, int threads, const F& f) {
  struct alignas(64) Share {  // a line of the cache for each counter, as each is one thread's for most of the time
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Region {
    const F& f;
    const int count;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    Share shares[kMostShares];

    Region(const F& f, int64_t tasks, int threads) : f(f), count(std::min(threads, kMostShares)) {
      for (int64_t i = 0; i < count; ++i) {
        shares[i].next.store(tasks * i / count, std::memory_order_relaxed);
        shares[i].end = tasks * (i + 1) / count;
      }
    }

    static void call(const F& f, int64_t task, int worker) {
      if constexpr (std::is_invocable_v<const F&, int64_t, int>) {
        f(task, worker);
      } else {
        f(task);
      }
    }

    void work(int worker) noexcept {
      try {
        for (int i = 0; i < count; ++i) {
          Share& share = shares[(worker + i) % count];
          for (int64_t task; !failed.load(std::memory_order_relaxed) &&
                             (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
            call(f, task, worker);
        }
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  };
  // All threads are asked for even if there are fewer tasks: OpenMP ends the threads that a smaller team does not
  // need, and the next operation of torch would have to start them again.
  if (threads > 1 && tasks > 1) {
    Region region(f, tasks, threads);
    if (run_on_pool(threads, [](void* at, int worker) { static_cast<Region*>(at)->work(worker); }, &region)) {
      if (region.error) std::rethrow_exception(region.error);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) Region::call(f, task, 0);
}

// Of a call with as many tasks and threads: the task that lies in the same thread's share, as far from its end as this
// one is from its beginning. A second pass that takes these begins with what its thread has read last.
inline int64_t mirrored(int64_t task, int64_t tasks, int threads) {
  const int64_t count = std::clamp(threads, 1, kMostShares);
  const int64_t share = ((task + 1) * count - 1) / tasks;
  return tasks * share / count + tasks * (share + 1) / count - 1 - task;
}

}  // namespace lowbit
