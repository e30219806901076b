// A GPU on one CPU thread: CUDA kernels compiled by a C++ compiler, every thread of a block a fiber.
//
// Fibers run until they meet others, at __syncthreads or in a warp's matrix product; then the next one runs. Blocks run
// one after another, so a static variable serves as shared memory. It is slow, and says nothing of races between two
// barriers; but index arithmetic, fragment maps, decoding and the order of sums are those of the kernel itself.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__ inline
#define __forceinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx (::simulator::fiber().thread)
#define blockIdx (::simulator::block().index)
#define blockDim (::simulator::block().size)
#define __syncthreads() (::simulator::block().barrier.wait())

struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
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

// A point that all of some fibers pass together.
struct Barrier {
  int members = 0, arrived = 0;
  long generation = 0;
  void wait();
};

struct Fragments {
  uint32_t a[4], b[2];
  float value;
};

struct Warp {
  Barrier barrier;
  Fragments held[32];
};

struct Fiber {
  dim3 thread;
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Block {
  dim3 index, size;
  Barrier barrier;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  size_t running = 0;
  ucontext_t scheduler;
  std::function<void()> kernel;
};

inline Block*& current() {
  static Block* found = nullptr;
  return found;
}
inline Block& block() { return *current(); }
inline Fiber& fiber() { return block().fibers[block().running]; }

inline void yield() {
  Fiber& from = fiber();
  swapcontext(&from.context, &block().scheduler);
}

inline void Barrier::wait() {
  const long before = generation;
  if (++arrived == members) {
    arrived = 0;
    ++generation;
    return;
  }
  while (generation == before) yield();
}

inline void enter() {
  block().kernel();
  fiber().done = true;
  yield();
}

// Runs a kernel, blocks in order. Fails when all fibers wait for ever.
inline void launch(unsigned grid, unsigned threads, const std::function<void()>& kernel) {
  constexpr size_t kStack = 1 << 17;
  for (unsigned b = 0; b < grid; ++b) {
    Block made;
    current() = &made;
    made.index.x = b;
    made.size.x = threads;
    made.barrier.members = int(threads);
    made.kernel = kernel;
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
    for (size_t left = threads; left;) {
      long before = made.barrier.generation;
      for (const Warp& warp : made.warps) before += warp.barrier.generation;
      left = 0;
      bool ended = false;
      for (made.running = 0; made.running < threads; ++made.running) {
        Fiber& one = made.fibers[made.running];
        if (one.done) continue;
        swapcontext(&made.scheduler, &one.context);
        ended |= one.done;
        left += !one.done;
      }
      long after = made.barrier.generation;
      for (const Warp& warp : made.warps) after += warp.barrier.generation;
      if (left && !ended && before == after) fail("threads wait for others that never come");
    }
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

// D = A B + D of a warp, by the fragments that the PTX ISA documents for m16n8k16 of 16-bit floats.
template <bool bfloat16>
void mma_m16n8k16(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto value = [](uint32_t pair, int at) {
    const uint16_t bits = uint16_t(pair >> 16 * at);
    return bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
  };
  Fiber& own = fiber();
  Warp& warp = *own.warp;
  warp.held[own.lane] = {{a0, a1, a2, a3}, {b0, b1}, 0.0f};
  warp.barrier.wait();
  for (int i = 0; i < 4; ++i) {
    const int row = own.lane / 4 + 8 * (i / 2), column = own.lane % 4 * 2 + i % 2;
    double total = sums[i];
    for (int k = 0; k < 16; ++k) {
      const Fragments& left = warp.held[row % 8 * 4 + k % 8 / 2];
      const Fragments& right = warp.held[column * 4 + k % 8 / 2];
      total += double(value(left.a[row / 8 + 2 * (k / 8)], k % 2)) * value(right.b[k / 8], k % 2);
    }
    sums[i] = float(total);
  }
  warp.barrier.wait();
}

inline float from_lane_xor(float value, int mask) {
  Fiber& own = fiber();
  own.warp->held[own.lane].value = value;
  own.warp->barrier.wait();
  const float found = own.warp->held[own.lane ^ mask].value;
  own.warp->barrier.wait();
  return found;
}

}  // namespace simulator

// CUDA's own functions, as kernels call them.
using __half = uint16_t;
using __nv_bfloat16 = uint16_t;
inline float __uint_as_float(uint32_t bits) { return simulator::bits_to_float(bits); }
inline uint32_t __float_as_uint(float value) { return simulator::float_to_bits(value); }
inline uint16_t __ushort_as_half(uint16_t bits) { return bits; }
inline uint16_t __half_as_ushort(uint16_t bits) { return bits; }
inline uint16_t __bfloat16_as_ushort(uint16_t bits) { return bits; }
inline float __half2float(uint16_t bits) { return simulator::float16_to_float(bits); }
inline uint16_t __float2half_rn(float value) { return simulator::float_to_float16(value); }
inline uint16_t __float2bfloat16_rn(float value) { return simulator::float_to_bfloat16(value); }
