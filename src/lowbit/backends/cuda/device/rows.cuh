// Rows of float32, bfloat16 or float16, eight columns at a time, and what may be done to a value before it is
// quantized.
#pragma once

#include "dtypes.cuh"

namespace lowbit {

enum Activation { kNone = 0, kGelu = 1, kGeluTanh = 2, kSwiGLU = 3 };

// Eight values from `at` on, or the `left` that there are, and zeros. kAligned: all or none are there, at a multiple of
// 16 bytes.
template <Dtype dtype, bool kAligned>
LOWBIT_DEVICE void load_columns(const void* from, int64_t at, int left, float (&values)[8]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < left ? load_number<dtype>(from, at + i) : 0.0f;
  } else if constexpr (dtype == kFloat32) {
    const auto* words = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at);
    uint4 low{}, high{};
    if (left > 0) low = __ldg(words), high = __ldg(words + 1);
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __uint_as_float(bits[i]);
  } else {
    uint4 words{};
    if (left > 0) words = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at));
    const uint32_t bits[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = half_to_float<kHalfOf<dtype>>(uint16_t(bits[i / 2] >> 16 * (i % 2)));
  }
}

// float32 -> the nearest value of the dtype.
template <Dtype dtype>
LOWBIT_DEVICE float rounded_to(float value) {
  if constexpr (dtype == kFloat32) return value;
  return half_to_float<kHalfOf<dtype>>(float_to_half<kHalfOf<dtype>>(value));
}

LOWBIT_DEVICE float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

// In float32; `up` is what SwiGLU multiplies by.
template <Activation activation>
LOWBIT_DEVICE float activated(float value, float up) {
  if constexpr (activation == kGelu) return value * 0.5f * (1.0f + erff(value * 0.7071067811865476f));
  if constexpr (activation == kGeluTanh)
    return value * sigmoid(1.5957691216057308f * (value + 0.044715f * value * value * value));
  if constexpr (activation == kSwiGLU) return value * sigmoid(value) * up;
  return value;
}

// The larger of two magnitudes; NaN when there is one.
LOWBIT_DEVICE float larger(float largest, float value) {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(largest), "f"(fabsf(value)));
  return out;
#else
  value = fabsf(value);
  return not_a_number(largest) || largest > value ? largest : value;
#endif
}

// The largest of a warp's magnitudes, none of them negative; NaN when there is one, whose bits are the highest.
LOWBIT_DEVICE float warp_largest(float value) {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
  return __uint_as_float(__reduce_max_sync(0xFFFFFFFFu, __float_as_uint(value)));
#else
  return warp_max(value);
#endif
}

}  // namespace lowbit
