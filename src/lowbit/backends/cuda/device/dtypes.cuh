// Numbers in memory whose dtype the launch names: float32, bfloat16 or float16.
#pragma once

#include "floats.cuh"

namespace lowbit {

enum Dtype { kFloat32 = 0, kBFloat16Type = 1, kFloat16Type = 2 };

template <Dtype dtype>
constexpr Half kHalfOf = dtype == kBFloat16Type ? kBFloat16 : kFloat16;

template <Dtype dtype>
constexpr uint32_t kSizeOf = dtype == kFloat32 ? 4 : 2;

// What lies so many bytes behind an address that all threads share: the sum is made by the load itself.
template <typename T>
LOWBIT_DEVICE const T* behind(const void* from, uint32_t bytes) {
  return reinterpret_cast<const T*>(static_cast<const unsigned char*>(from) + bytes);
}

// The bits of a number as they lie, at a distance in bytes: a load that nothing waits for yet.
template <Dtype dtype>
LOWBIT_DEVICE uint32_t load_bits(const void* from, uint32_t bytes) {
  if constexpr (dtype == kFloat32) return __ldg(behind<uint32_t>(from, bytes));
  return __ldg(behind<uint16_t>(from, bytes));
}

template <Dtype dtype>
LOWBIT_DEVICE float number(uint32_t bits) {
  if constexpr (dtype == kFloat32) return __uint_as_float(bits);
  return half_to_float<kHalfOf<dtype>>(uint16_t(bits));
}

template <Dtype dtype>
LOWBIT_DEVICE float load_number(const void* from, int64_t at) {
  if constexpr (dtype == kFloat32) return __ldg(static_cast<const float*>(from) + at);
  return half_to_float<kHalfOf<dtype>>(__ldg(static_cast<const uint16_t*>(from) + at));
}

template <Dtype dtype>
LOWBIT_DEVICE void store_number(void* to, int64_t at, float value) {
  if constexpr (dtype == kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<uint16_t*>(to)[at] = float_to_half<kHalfOf<dtype>>(value);
  }
}

// 8 numbers that begin at a multiple of 16 bytes.
template <Dtype dtype>
LOWBIT_DEVICE void load_eight(const void* from, int64_t at, float (&values)[8]) {
  if constexpr (dtype == kFloat32) {
    const auto* source = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = __ldg(source + i);
      const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * i + j] = __uint_as_float(bits[j]);
    }
  } else {
    const uint4 eight = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at));
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values[i] = half_to_float<kHalfOf<dtype>>(uint16_t(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2]));
  }
}

// 8 numbers of 16 bits to a multiple of 16 bytes.
template <Dtype dtype>
LOWBIT_DEVICE void store_eight(void* to, int64_t at, const float (&values)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = uint32_t(float_to_half<kHalfOf<dtype>>(values[2 * i])) |
               uint32_t(float_to_half<kHalfOf<dtype>>(values[2 * i + 1])) << 16;
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

}  // namespace lowbit
