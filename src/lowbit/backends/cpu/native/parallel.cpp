#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define LOWBIT_POSIX 1
#endif

namespace lowbit {
namespace {

#if LOWBIT_POSIX
constexpr const char* kTorch[] = {"libtorch_cpu.so", "libtorch_cpu.dylib", "@rpath/libtorch_cpu.dylib"};
#endif

// Only the thread that forked lives on in the child; a region would wait for the others forever.
std::atomic<bool> g_forked{false};

struct Pool {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*in_parallel)() = nullptr;                                          // omp_in_parallel
  int (*thread_number)() = nullptr;                                        // omp_get_thread_num
  std::string about = "torch's OpenMP library is only looked for on Linux and macOS";

  Pool() {
#if LOWBIT_POSIX
    void* torch = nullptr;
    for (const char* name : kTorch)
      if (!torch) torch = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) {
      about = "torch's libtorch_cpu is not in this process";
      return;
    }
    // A search through torch's handle follows torch's own dependencies: it finds the library that torch computes on,
    // whatever other OpenMP libraries the process holds. LLVM's and Intel's libraries have GCC's entry points, too.
    auto* start = dlsym(torch, "GOMP_parallel");
    auto* inside = dlsym(torch, "omp_in_parallel");
    auto* number = dlsym(torch, "omp_get_thread_num");
    if (!start || !inside || !number) {
      about = "torch depends on no OpenMP library that has GOMP_parallel";
      return;
    }
    parallel = reinterpret_cast<decltype(parallel)>(start);
    in_parallel = reinterpret_cast<decltype(in_parallel)>(inside);
    thread_number = reinterpret_cast<decltype(thread_number)>(number);
    Dl_info info{};
    const std::string path = dladdr(start, &info) && info.dli_fname ? info.dli_fname : "OpenMP library";
    about = "torch's " + path.substr(path.rfind('/') + 1);
    pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
#endif
  }
};

// torch is imported before this module is (native.py), so one look is enough.
const Pool& pool() {
  static const Pool found;
  return found;
}

struct Team {
  void (*work)(void*, int);
  void* context;
};

}  // namespace

bool run_on_pool(int threads, void (*work)(void*, int), void* context) {
  const Pool& found = pool();
  if (!found.parallel || g_forked || found.in_parallel()) return false;
  Team team{work, context};
  const auto run = [](void* at) {
    const Team& of = *static_cast<Team*>(at);
    of.work(of.context, pool().thread_number());
  };
  found.parallel(run, &team, static_cast<unsigned>(threads), 0);
  return true;
}

std::string describe_pool(bool& used) {
  used = pool().parallel && !g_forked;
  return g_forked ? "a forked process has none of its parent's threads" : pool().about;
}

}  // namespace lowbit
