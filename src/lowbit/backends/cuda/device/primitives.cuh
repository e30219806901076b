// The few instructions that kernels are written in: as they are on a GPU, and in plain C++ for a CPU, where the tests
// run whole kernels with a simulator in the place of CUDA's own headers (simulator.h).
#pragma once

#ifdef __CUDACC_RTC__
#define LOWBIT_DEVICE __device__ __forceinline__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
#else
#define LOWBIT_DEVICE inline
#include "simulator.h"
#endif

namespace lowbit {

// Bytes of `low` (0..3) and `high` (4..7), picked by the four nibbles of `selector`.
template <uint32_t selector>
LOWBIT_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high) {
#ifdef __CUDACC_RTC__
  return __byte_perm(low, high, selector);
#else
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
#endif
}

// (bits & mask) | set, one instruction.
template <uint32_t mask, uint32_t set>
LOWBIT_DEVICE uint32_t masked(uint32_t bits) {
#ifdef __CUDACC_RTC__
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(bits), "n"(mask), "n"(set));
  return out;
#else
  return (bits & mask) | set;
#endif
}

// (bits & mask) | other, one instruction.
template <uint32_t mask>
LOWBIT_DEVICE uint32_t merged(uint32_t bits, uint32_t other) {
#ifdef __CUDACC_RTC__
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(bits), "n"(mask), "r"(other));
  return out;
#else
  return (bits & mask) | other;
#endif
}

// a * b + c for two bfloat16 side by side, each rounded once.
LOWBIT_DEVICE uint32_t fma_bfloat16_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC_RTC__
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#else
  return simulator::fma_bfloat16_pair(a, b, c);
#endif
}

// a * b for two float16 side by side, each rounded once.
LOWBIT_DEVICE uint32_t multiply_float16_pair(uint32_t a, uint32_t b) {
#ifdef __CUDACC_RTC__
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#else
  return simulator::multiply_float16_pair(a, b);
#endif
}

// Four products of bytes, signed, and a sum.
LOWBIT_DEVICE int dot4(uint32_t a, uint32_t b, int sum) {
#ifdef __CUDACC_RTC__
  return __dp4a(int(a), int(b), sum);
#else
  for (int i = 0; i < 32; i += 8) sum += int(int8_t(a >> i)) * int8_t(b >> i);
  return sum;
#endif
}

// The value of the lane whose number differs in the bits of `mask`.
LOWBIT_DEVICE uint32_t from_lane_xor(uint32_t value, int mask) {
#ifdef __CUDACC_RTC__
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#else
  return simulator::exchanged(value, [=](int lane) { return lane ^ mask; });
#endif
}
LOWBIT_DEVICE int from_lane_xor(int value, int mask) { return int(from_lane_xor(uint32_t(value), mask)); }
LOWBIT_DEVICE float from_lane_xor(float value, int mask) {
  return __uint_as_float(from_lane_xor(__float_as_uint(value), mask));
}

// The value of a lane, which each names for itself.
LOWBIT_DEVICE uint32_t from_lane(uint32_t value, int lane) {
#ifdef __CUDACC_RTC__
  return __shfl_sync(0xFFFFFFFFu, value, lane);
#else
  return simulator::exchanged(value, [=](int) { return lane; });
#endif
}
LOWBIT_DEVICE int from_lane(int value, int lane) { return int(from_lane(uint32_t(value), lane)); }
LOWBIT_DEVICE float from_lane(float value, int lane) {
  return __uint_as_float(from_lane(__float_as_uint(value), lane));
}

// The value of lane `place` (0..3) of this lane's four neighbours. A constant place takes no register.
LOWBIT_DEVICE float from_place(float value, int place) {
#ifdef __CUDACC_RTC__
  return __shfl_sync(0xFFFFFFFFu, value, place, 4);
#else
  return from_lane(value, int(threadIdx.x % 32 & ~3u) + place);
#endif
}

// The compiler has these registers ready at this point, and keeps them as they are: around waits, for sums that
// products write, or so that what they were made of need not be kept.
template <typename T, int count>
LOWBIT_DEVICE void hold(T (&registers)[count]) {
#ifdef __CUDACC_RTC__
#pragma unroll
  for (int i = 0; i < count; ++i)
    if constexpr (sizeof(T) == 4 && T(0.5f) != T(0))
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
#endif
}

// The shared memory whose size the launch gives, at a multiple of 1024 bytes.
LOWBIT_DEVICE unsigned char* dynamic_shared() {
#ifdef __CUDACC_RTC__
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
#else
  return simulator::dynamic_shared();
#endif
}

// The sum over a warp, the same bits in every lane.
LOWBIT_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += from_lane_xor(value, mask);
  return value;
}

LOWBIT_DEVICE bool not_a_number(float value) { return value != value; }
LOWBIT_DEVICE bool is_finite(float value) { return value - value == 0.0f; }

// The largest value of a warp; NaN when there is one.
LOWBIT_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const float other = from_lane_xor(value, mask);
    value = not_a_number(other) || other > value ? other : value;
  }
  return value;
}

}  // namespace lowbit
