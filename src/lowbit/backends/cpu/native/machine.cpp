// Which instruction sets this machine can run, as its processor and its operating system say.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "tile_permission.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#define LOWBIT_X86 1
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace lowbit {
namespace {

#if LOWBIT_X86
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &eax, &ebx, &ecx, &edx); }
};

bool all(unsigned value, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(value >> bit & 1)) return false;
  return true;
}

// Which registers the operating system saves when it switches threads.
uint64_t saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}
#endif

// Names as in LOWBIT_CPU_ISA, from the plainest to the one with the most.
std::vector<const char*> runnable_sets() {
  std::vector<const char*> sets{"portable"};
#if LOWBIT_X86
  const Leaf basic(1, 0), more(7, 0), extended(0x80000001, 0);
  if (!all(basic.ecx, {27})) return sets;  // OSXSAVE: xgetbv may be asked
  const uint64_t saved = saved_state();
  const bool avx2 = (saved & 0x6) == 0x6 && all(basic.ecx, {12, 23, 28, 29}) &&  // FMA, POPCNT, AVX, F16C
                    all(more.ebx, {3, 5, 8}) && all(extended.ecx, {5});          // BMI1, AVX2, BMI2; LZCNT
  if (!avx2) return sets;
  sets.push_back("avx2");
  sets.push_back("avx512_emulated");  // compiled for AVX2
  sets.push_back("amx_emulated");
  const bool avx512 = (saved & 0xe0) == 0xe0 && all(more.ebx, {16, 17, 30, 31}) &&  // F, DQ, BW, VL
                      all(more.ecx, {11});                                          // VNNI
  if (!avx512) return sets;
  sets.push_back("avx512");
  // TILE, INT8. Whether this process may use them is asked for separately.
  if ((saved >> 17 & 3) == 3 && all(more.edx, {24, 25})) sets.push_back("amx");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & kDotProduct) sets.push_back("neon");
#elif defined(__aarch64__) && defined(__APPLE__)
  sets.push_back("neon");  // every Mac with an ARM processor has it
#endif
  return sets;
}

}  // namespace
}  // namespace lowbit

NB_MODULE(_machine, m) {
  namespace nb = nanobind;
  m.def("runnable", [] {
    nb::list names;
    for (const char* name : lowbit::runnable_sets()) names.append(nb::str(name));
    return names;
  });
  m.def("why_no_tiles", [] { return nb::str(lowbit::why_no_tiles().c_str()); });
}
