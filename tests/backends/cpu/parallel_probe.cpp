// What tests ask parallel.h: compiled together with parallel.cpp into a library of its own, called through ctypes.
#include "native/parallel.h"

#include <chrono>
#include <set>
#include <stdexcept>
#include <thread>

namespace {

void wait_a_little() { std::this_thread::sleep_for(std::chrono::milliseconds(2)); }

}  // namespace

extern "C" {

// counts[t] += 1 for every task; returns on how many threads tasks ran.
int probe_tasks(int64_t tasks, int threads, int32_t* counts) {
  std::set<std::thread::id> seen[64];
  lowbit::parallel_for(tasks, threads, [&](int64_t task, int worker) {
    ++counts[task];
    wait_a_little();
    seen[worker].insert(std::this_thread::get_id());
  });
  int used = 0;
  for (const auto& ids : seen) used += static_cast<int>(ids.size());  // one thread a worker, or this counts too many
  return used;
}

// workers[t]: which worker ran task t, order[t]: as its how manieth. With `slow` a worker, it does not end its first
// task before all tasks of others have; else nobody does before all have begun one.
void probe_shares(int64_t tasks, int threads, int slow, int32_t* workers, int32_t* order) {
  std::atomic<int64_t> begun{0}, done{0};
  int32_t count[64] = {};
  lowbit::parallel_for(tasks, threads, [&](int64_t task, int worker) {
    workers[task] = worker;
    order[task] = count[worker]++;
    if (order[task] == 0) {
      ++begun;
      while (slow < 0 ? begun < threads : worker == slow && done + 1 < tasks) wait_a_little();
    }
    wait_a_little();
    ++done;
  });
}

// 1 if every worker is the same thread in all of some regions, and this one is number 0.
int probe_numbers(int threads) {
  std::thread::id ids[64] = {};
  std::atomic<int> wrong{0};
  for (int round = 0; round < 5; ++round)
    lowbit::parallel_for(4 * threads, threads, [&](int64_t, int worker) {
      wait_a_little();
      const auto here = std::this_thread::get_id();
      if (ids[worker] == std::thread::id()) ids[worker] = here;
      wrong += ids[worker] != here;
    });
  return !wrong && ids[0] == std::this_thread::get_id();
}

// Regions in a region: on how many other threads their tasks ran than on the one that began them.
int probe_nested(int threads) {
  std::atomic<int> elsewhere{0};
  lowbit::parallel_for(threads, threads, [&](int64_t) {
    const auto here = std::this_thread::get_id();
    lowbit::parallel_for(4, threads, [&](int64_t) { elsewhere += std::this_thread::get_id() != here; });
  });
  return elsewhere;
}

// Every task throws: 1 if one exception comes out here, as what it was.
int probe_exception(int64_t tasks, int threads) {
  try {
    lowbit::parallel_for(tasks, threads, [](int64_t) {
      wait_a_little();
      throw std::range_error("a task");
    });
  } catch (const std::range_error&) {
    return 1;
  }
  return 0;
}

int probe_pool() {
  bool used = false;
  lowbit::describe_pool(used);
  return used;
}
}
