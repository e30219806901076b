// How codes of 4 bits with activations of 16 bits are stored, and the scales that belong to them.
#pragma once

#include "floats.cuh"
#include "quotients.cuh"

namespace lowbit {

// Codes as the layout words128 arranges them, or as files hold them.
enum Storage { kWords = 0, kBytes = 1 };

// Scales of 16 bits are of the type of the activations.
enum ScaleType { kHalfScale = 0, kFloatScale = 1, kE4M3 = 2, kE8M0 = 3 };

// A stored scale as it lies in memory. `at` counts scales.
template <ScaleType type>
LOWBIT_DEVICE uint32_t stored_scale(const void* from, uint32_t at) {
  if constexpr (type == kFloatScale) return __ldg(static_cast<const uint32_t*>(from) + at);
  if constexpr (type == kHalfScale) return __ldg(static_cast<const uint16_t*>(from) + at);
  return __ldg(static_cast<const uint8_t*>(from) + at);
}

// As float32.
template <Half half, ScaleType type>
LOWBIT_DEVICE float scale_value(uint32_t stored) {
  if constexpr (type == kFloatScale) return __uint_as_float(stored);
  if constexpr (type == kHalfScale) return half_to_float<half>(uint16_t(stored));
  if constexpr (type == kE8M0) return e8m0_to_float(stored);
  return e4m3_to_float(stored);
}

// What the products of a row are multiplied by: 1 without `alpha`, alpha[row] where `kind` has bit 0, else alpha[0]; or
// its reciprocal, where `kind` has bit 1. (A division would be a call, which makes a warpgroup's products wait.)
LOWBIT_DEVICE float factor_of_row(const float* alpha, int kind, int64_t row) {
  if (alpha == nullptr) return 1.0f;
  const float value = __ldg(alpha + (kind & 1 ? row : 0));
  if (!(kind & 2)) return value;
  const float near = near_reciprocal(value);
  return near == 0.0f || !is_finite(near) ? near : nearest_reciprocal(value, near);
}

template <Half half, ScaleType type>
LOWBIT_DEVICE float load_scale(const void* from, int64_t at) {
  if constexpr (type == kFloatScale) return __ldg(static_cast<const float*>(from) + at);
  if constexpr (type == kHalfScale) return half_to_float<half>(__ldg(static_cast<const uint16_t*>(from) + at));
  if constexpr (type == kE8M0) return e8m0_to_float(__ldg(static_cast<const uint8_t*>(from) + at));
  return e4m3_to_float(__ldg(static_cast<const uint8_t*>(from) + at));
}

}  // namespace lowbit
