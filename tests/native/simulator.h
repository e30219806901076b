// A GPU on one CPU thread: CUDA kernels compiled by a C++ compiler, every thread of a block a fiber.
//
// Fibers run until they meet others, at a barrier or in a warp's matrix product; then another one runs. Blocks run one
// after another, so a static variable serves as shared memory. It is slow; but index arithmetic, fragment maps,
// decoding and the order of sums are those of the kernel itself.
//
// What the hardware leaves open is drawn by chance, from LOWBIT_SIMULATOR_SEED: which thread runs first, and whether an
// asynchronous copy or product happens at once or as late as it may, when it is waited for. Registers that a product is
// still writing hold garbage, and so does shared memory that nobody wrote. A kernel that gives the same right result
// for several seeds has its barriers and waits where they must be.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__ inline
#define __forceinline__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx (::simulator::fiber().thread)
#define blockIdx (::simulator::block().index)
#define blockDim (::simulator::block().size)
#define gridDim (::simulator::block().grid)
#define __syncthreads() (::simulator::block().barrier.wait())
#define __syncwarp() (::simulator::fiber().warp->barrier.wait())

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
using std::max;
using std::min;

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}

namespace simulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simulator: %s\n", what);
  std::abort();
}

// Numbers by chance that repeat from run to run.
inline uint64_t mixed(uint64_t number) {
  number = (number ^ number >> 31) * 0x9E3779B97F4A7C15u;
  number = (number ^ number >> 29) * 0xBF58476D1CE4E5B9u;
  return number ^ number >> 32;
}
inline uint64_t seed() {
  const char* given = std::getenv("LOWBIT_SIMULATOR_SEED");
  return given ? std::strtoull(given, nullptr, 10) : 1;
}

// A point that all of some fibers pass together.
struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
  void wait();
};

struct Fragments {
  uint32_t a[4], b[2];
  uint32_t value;
};

struct Warp {
  Barrier barrier;
  Fragments held[32];
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, read;
  void run() const {
    std::memcpy(to, from, read);
    std::memset(static_cast<char*>(to) + read, 0, bytes - read);
  }
};

// A product of four warps that is under way: its own thread's share of it.
struct Product {
  void* sums;
  const uint32_t* left;
  std::vector<uint32_t> before;  // the sums when it began, unless another that is under way writes them
  std::function<void(Product&)> run;
};

struct Fiber {
  dim3 thread;
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false;
  std::vector<Copy> copies;                 // not committed yet
  std::deque<std::vector<Copy>> groups;     // committed, not waited for
  std::vector<Product> products;            // not committed yet
  std::deque<std::vector<Product>> issued;  // committed, not waited for
  bool ordered = false;                     // products may begin: what was written to registers before is in them
  uint64_t chances = 0;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Mailbox;
struct Bulk {
  Copy copy;
  Mailbox* mailbox;
};

struct Block {
  dim3 index, size, grid;
  Barrier barrier, named[16];
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Bulk> bulks;  // under way
  std::unique_ptr<char[]> shared;
  char* dynamic = nullptr;
  size_t running = 0;
  long events = 0;  // what a waiting thread may be waiting for
  uint64_t chances = 0;
  ucontext_t scheduler;
  std::function<void()> kernel;
};

inline Block*& current() {
  static Block* found = nullptr;
  return found;
}
inline Block& block() { return *current(); }
inline Fiber& fiber() { return block().fibers[block().running]; }
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block().dynamic); }

inline uint64_t chance() { return mixed(seed() * 0x10001u + mixed(block().chances++) + block().index.x); }
// The same for all threads of a warp that ask it equally often.
inline bool warp_chance() {
  Fiber& own = fiber();
  return mixed(seed() + mixed(own.chances++) + own.thread.x / 32) & 1;
}

inline void yield() {
  Fiber& from = fiber();
  swapcontext(&from.context, &block().scheduler);
}

// Where a thread may be overtaken by others: as often as not it is.
inline void maybe_yield() {
  if (chance() & 1) return;
  ++block().events;  // it goes on by itself
  yield();
}

inline void Barrier::wait() {
  const long before = generation;
  if (++arrived == members) {
    arrived = 0;
    ++generation;
    ++block().events;
    return;
  }
  while (generation == before) yield();
}

inline void enter() {
  block().kernel();
  fiber().done = true;
  yield();
}

void land_bulks(bool all);

// Runs a kernel, blocks in order. Fails when all fibers wait for ever.
inline void launch(dim3 grid, unsigned threads, unsigned shared, const std::function<void()>& kernel) {
  constexpr size_t kStack = 1 << 17, kAlignment = 1024, kBehind = 1024;
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    Block made;
    current() = &made;
    made.index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    made.grid = grid;
    made.size.x = threads;
    made.barrier.members = int(threads);
    made.kernel = kernel;
    made.shared = std::make_unique<char[]>(kAlignment + shared + kBehind);
    std::memset(made.shared.get(), 0xFF, kAlignment + shared + kBehind);
    const auto begins = reinterpret_cast<uintptr_t>(made.shared.get());
    made.dynamic = made.shared.get() + (kAlignment - begins % kAlignment) % kAlignment;
    made.fibers.resize(threads);
    made.warps.resize(threads / 32);
    for (Warp& warp : made.warps) warp.barrier.members = 32;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& one = made.fibers[t];
      one.thread.x = t;
      one.warp = &made.warps[t / 32];
      one.lane = int(t % 32);
      one.stack = std::make_unique<char[]>(kStack);
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.get();
      one.context.uc_stack.ss_size = kStack;
      one.context.uc_link = nullptr;
      makecontext(&one.context, enter, 0);
    }
    std::vector<unsigned> order(threads);
    for (unsigned t = 0; t < threads; ++t) order[t] = t;
    // Some warps stay behind for a while, others do then; where the rest cannot go on without them, all run.
    constexpr int kWhile = 32;
    bool all = true;
    long round = 0;
    for (size_t left = threads; left; ++round) {
      const long before = made.events;
      const auto waits = [&](unsigned t) {
        return !all && threads > 32 && mixed(seed() * 7919 + uint64_t(round / kWhile) * 131 + t / 32 + b) % 3 == 0;
      };
      left = 0;
      bool skipped = false;
      for (unsigned t = threads; t > 1; --t) std::swap(order[t - 1], order[chance() % t]);
      for (unsigned t : order) {
        made.running = t;
        Fiber& one = made.fibers[t];
        if (one.done) continue;
        ++left;
        if (waits(t)) {
          skipped = true;
          continue;
        }
        swapcontext(&made.scheduler, &one.context);
        made.events += one.done;
        left -= one.done;
      }
      all = made.events == before;
      land_bulks(all && !skipped);
      if (left && made.events == before && !skipped) fail("threads wait for others that never come");
    }
    for (const Fiber& one : made.fibers)
      if (!one.issued.empty() || !one.products.empty()) fail("a thread ended before its products did");
    if (!made.bulks.empty()) fail("a block ended before its copies did");
    for (size_t i = 0; i < kBehind; ++i)
      if (made.dynamic[shared + i] != char(0xFF)) fail("a block wrote behind the shared memory that it was given");
  }
}

// ---- asynchronous copies ------------------------------------------------------------------------------------------

inline void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("an asynchronous copy between addresses that are not aligned");
  const Copy copy{to, from, bytes, valid ? bytes : 0};
  if (chance() & 1) return copy.run();
  std::memset(to, 0xFF, bytes);
  fiber().copies.push_back(copy);
}
inline void commit_copies() {
  maybe_yield();
  fiber().groups.push_back(std::move(fiber().copies));
  fiber().copies.clear();
}
inline void wait_copies(size_t left) {
  maybe_yield();
  auto& groups = fiber().groups;
  for (; groups.size() > left; groups.pop_front())
    for (const Copy& copy : groups.front()) copy.run();
}

// The 8 bytes of an mbarrier: arrivals and bytes that its phase still waits for.
struct Mailbox {
  int32_t bytes;
  uint32_t phase : 1, count : 15, pending : 16;

  void arrived(uint32_t threads, int32_t landed) {
    pending -= threads;
    bytes -= landed;
    if (pending || bytes) return;
    phase ^= 1;
    pending = count;
    ++block().events;
  }
};
static_assert(sizeof(Mailbox) == 8, "an mbarrier has 8 bytes");

inline void copy_bulk(void* to, const void* from, uint32_t bytes, void* mailbox) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
    fail("a bulk copy wants addresses and sizes in multiples of 16 bytes");
  std::memset(to, 0xFF, bytes);
  block().bulks.push_back({{to, from, bytes, bytes}, static_cast<Mailbox*>(mailbox)});
  maybe_yield();
}
// Bulk copies that are under way end by chance, in any order; all of them where nothing else can happen.
inline void land_bulks(bool all) {
  auto& bulks = block().bulks;
  for (size_t i = 0; i < bulks.size();) {
    if (!all && chance() % 3) {
      ++i;
      continue;
    }
    const Bulk bulk = bulks[i];
    bulks.erase(bulks.begin() + long(i));
    bulk.copy.run();
    ++block().events;
    bulk.mailbox->arrived(0, int32_t(bulk.copy.bytes));
  }
}

inline float bits_to_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline uint32_t float_to_bits(float value) {
  uint32_t out;
  std::memcpy(&out, &value, 4);
  return out;
}

inline float bfloat16_to_float(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  bits += 0x7FFFu + (bits >> 16 & 1);
  return uint16_t(bits >> 16);
}

inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t float_to_float16(float value) {
  const uint16_t sign = uint16_t(float_to_bits(value) >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (!(size == size)) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
  uint32_t bits = float_to_bits(size);
  bits += 0x0FFFu + (bits >> 13 & 1);
  return sign | uint16_t((bits - (112u << 23)) >> 13);
}

// a * b + c of two pairs, the product exact in double, rounded once.
inline uint32_t fma_bfloat16_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int at = 0; at < 32; at += 16) {
    const double product = double(bfloat16_to_float(uint16_t(a >> at))) * bfloat16_to_float(uint16_t(b >> at));
    out |= uint32_t(float_to_bfloat16(float(product + bfloat16_to_float(uint16_t(c >> at))))) << at;
  }
  return out;
}

inline uint32_t multiply_float16_pair(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int at = 0; at < 32; at += 16)
    out |= uint32_t(float_to_float16(float16_to_float(uint16_t(a >> at)) * float16_to_float(uint16_t(b >> at)))) << at;
  return out;
}

// The sum of a float and exact products as tensor cores make it: terms are brought to the largest one's exponent, and
// what is below one bit more than float32 has is cut off, and so is the result. (Measured for Ampere: Fasi, Higham,
// Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021.)
inline float cut_sum(float start, const double* terms, int count) {
  double sum = start;
  for (int i = 0; i < count; ++i) sum += terms[i];
  if (!std::isfinite(sum)) return float(sum);
  double largest = std::fabs(start);
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(terms[i]));
  if (largest == 0.0) return 0.0f;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest) - 24, -150));
  sum = std::trunc(start / unit);
  for (int i = 0; i < count; ++i) sum += std::trunc(terms[i] / unit);
  const float rounded = float(sum * unit);
  return std::fabs(double(rounded)) > std::fabs(sum * unit) ? std::nextafterf(rounded, 0.0f) : rounded;
}

// The sum of `start` and of term(place) for eight places, as many at a time as tensor cores add.
template <typename T, typename Term>
T summed(T start, int at_once, Term term) {
  if constexpr (std::is_same_v<T, float>) {
    for (int first = 0; first < 8; first += at_once) {
      double terms[8];
      for (int i = 0; i < at_once; ++i) terms[i] = term(first + i);
      start = cut_sum(start, terms, at_once);
    }
  } else {
    for (int place = 0; place < 8; ++place) start += term(place);
  }
  return start;
}

// D = A B + C of a warp, by the fragments that the PTX ISA documents for m16n8 and 32 bytes of K. `term(a, b)` is the
// sum of the products of two registers.
template <typename T, typename Term>
void mma_m16n8(T (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const T (&start)[4], Term term) {
  Fiber& own = fiber();
  Warp& warp = *own.warp;
  warp.held[own.lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}, 0};
  warp.barrier.wait();
  for (int i = 0; i < 4; ++i) {
    const int row = own.lane / 4 + 8 * (i / 2), column = own.lane % 4 * 2 + i % 2;
    sums[i] = summed(T(start[i]), 4, [&](int place) {
      return term(warp.held[row % 8 * 4 + place % 4].a[row / 8 + 2 * (place / 4)],
                  warp.held[column * 4 + place % 4].b[place / 4]);
    });
  }
  warp.barrier.wait();
}

template <bool bfloat16>
double dot_halves(uint32_t a, uint32_t b) {
  const auto value = [](uint32_t bits) {
    return double(bfloat16 ? bfloat16_to_float(uint16_t(bits)) : float16_to_float(uint16_t(bits)));
  };
  return value(a) * value(b) + value(a >> 16) * value(b >> 16);
}
inline int dot_bytes(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += int(int8_t(a >> i)) * int8_t(b >> i);
  return sum;
}
template <bool unsigned_right>
int dot_nibbles(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 4) {
    const int left = int(a >> i & 15), right = int(b >> i & 15);
    sum += ((left ^ 8) - 8) * (unsigned_right ? right : (right ^ 8) - 8);
  }
  return sum;
}

// The value of lane `from(lane)`.
template <typename From>
uint32_t exchanged(uint32_t value, From from) {
  Fiber& own = fiber();
  own.warp->held[own.lane].value = value;
  own.warp->barrier.wait();
  const uint32_t found = own.warp->held[from(own.lane) & 31].value;
  own.warp->barrier.wait();
  return found;
}

// ldmatrix.x4: lanes 8 i .. + 7 name the rows, of 16 bytes, of matrix i.
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  static const void* rows[32][32];
  Fiber& own = fiber();
  const auto** mine = rows[own.thread.x / 32];
  mine[own.lane] = row;
  own.warp->barrier.wait();
  for (int i = 0; i < 4; ++i) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      const auto at = reinterpret_cast<uintptr_t>(mine[8 * i + r]);
      if (at % 16) fail("a row of a matrix does not begin at a multiple of 16 bytes");
      banks |= 1u << at / 16 % 8;
    }
    if (banks != 0xFF) fail("the rows of a matrix lie in the same banks of shared memory");
    std::memcpy(&out[i], static_cast<const char*>(mine[8 * i + own.lane / 4]) + own.lane % 4 * 4, 4);
  }
  own.warp->barrier.wait();
}

// ---- products of a warpgroup --------------------------------------------------------------------------------------

// 4 bytes of B [N, K], K bytes side by side, in shared memory of `width` bytes a row with the swizzle of that width.
inline uint32_t swizzled_word(const char* tile, int width, int column, int byte) {
  // The hardware swizzles addresses: bits 4.. are exchanged with bits 7.., so that a tile may begin within a row.
  uintptr_t at = reinterpret_cast<uintptr_t>(tile) + uintptr_t(column) * unsigned(width) + unsigned(byte);
  const uintptr_t mask = uintptr_t(width / 16 - 1);
  at ^= (at >> 7 & mask) << 4;
  uint32_t word;
  std::memcpy(&word, reinterpret_cast<const void*>(at), 4);
  return word;
}

// One product m64 n(kColumns) with 32 bytes of K: a thread's rows are those of m16n8 in its warp. `term` as above.
template <int kColumns, typename T, typename Term>
void wgmma(T (&sums)[kColumns / 2], const uint32_t (&a)[4], const void* tile, int width, bool adds, Term term) {
  static_assert(sizeof(T) == 4, "");
  if (reinterpret_cast<uintptr_t>(tile) % unsigned(8 * width) >= unsigned(width))
    fail("a tile of a product does not begin with eight rows of its swizzle");
  Fiber& own = fiber();
  if (!own.ordered) fail("products begin without begin_products()");
  Product made{&sums, a, {}, nullptr};
  bool writing = false;
  for (const auto& group : own.issued)
    for (const Product& other : group) writing |= other.sums == made.sums;
  for (const Product& other : own.products) writing |= other.sums == made.sums;
  if (!writing) {
    made.before.resize(kColumns / 2);
    std::memcpy(made.before.data(), &sums, sizeof sums);
    std::memset(&sums, 0xFF, sizeof sums);
  }
  made.run = [tile, width, adds, term](Product& product) {
    Fiber& own = fiber();
    Warp& warp = *own.warp;
    for (int i = 0; i < 4; ++i) warp.held[own.lane].a[i] = product.left[i];
    warp.barrier.wait();
    T values[kColumns / 2];
    std::memcpy(values, product.before.empty() ? product.sums : product.before.data(), sizeof values);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = own.lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + own.lane % 4 * 2 + i % 2;
      values[i] = summed(adds ? values[i] : T(0), 8, [&](int place) {
        return term(warp.held[row % 8 * 4 + place % 4].a[row / 8 + 2 * (place / 4)],
                    swizzled_word(static_cast<const char*>(tile), width, column, 4 * place));
      });
    }
    std::memcpy(product.sums, values, sizeof values);
    warp.barrier.wait();
  };
  if (!writing && warp_chance()) return made.run(made);
  own.products.push_back(std::move(made));
}
inline void begin_products() { fiber().ordered = true; }
inline void commit_products() {
  fiber().ordered = false;
  maybe_yield();
  fiber().issued.push_back(std::move(fiber().products));
  fiber().products.clear();
}
inline void wait_products(size_t left) {
  maybe_yield();
  auto& issued = fiber().issued;
  for (; issued.size() > left; issued.pop_front())
    for (Product& product : issued.front()) product.run(product);
}

}  // namespace simulator

// CUDA's own functions, as kernels call them.
inline float __int_as_float(int bits) { return simulator::bits_to_float(uint32_t(bits)); }
inline int __float_as_int(float value) { return int(simulator::float_to_bits(value)); }
inline float __uint_as_float(uint32_t bits) { return simulator::bits_to_float(bits); }
inline uint32_t __float_as_uint(float value) { return simulator::float_to_bits(value); }
