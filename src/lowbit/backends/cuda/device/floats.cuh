// Floats of 16 and of 8 bits as float32, and back.
#pragma once

#include "primitives.cuh"
#include "words.cuh"

namespace lowbit {

template <Half half>
LOWBIT_DEVICE float half_to_float(uint16_t bits) {
  if constexpr (half == kBFloat16) return __uint_as_float(uint32_t(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

template <Half half>
LOWBIT_DEVICE uint16_t float_to_half(float value) {
  if constexpr (half == kBFloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

// float8_e4m3fn, NaN included.
LOWBIT_DEVICE float e4m3_to_float(uint32_t code) {
#if __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(uint16_t(code)));
  return __half2float(__ushort_as_half(uint16_t(pair)));
#else
  const float magnitude = __uint_as_float((code & 127) << 20) * 0x1p120f;
  const float value = (code & 127) == 127 ? __uint_as_float(0x7FC00000u) : magnitude;
  return code > 127 ? -value : value;
#endif
}

// 2**(code - 127): the smallest is half of the smallest normal float, and 255 is NaN. Both have the same mantissa bit.
LOWBIT_DEVICE float e8m0_to_float(uint32_t code) {
  return __uint_as_float(code << 23 | ((code + 1 & 255u) < 2 ? 1u << 22 : 0));
}

}  // namespace lowbit
