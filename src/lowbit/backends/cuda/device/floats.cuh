// Floats of 16 and of 8 bits as float32, and back.
#pragma once

#include "primitives.cuh"
#include "words.cuh"

namespace lowbit {

// Not by CUDA's own headers, which come in a package of their own: the compiler alone is enough.
template <Half half>
LOWBIT_DEVICE float half_to_float(uint16_t bits) {
  if constexpr (half == kBFloat16) return __uint_as_float(uint32_t(bits) << 16);
#ifdef __CUDACC_RTC__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
#else
  return simulator::float16_to_float(bits);
#endif
}

// The nearest bfloat16, of two as near the even one: before sm_80 there is no instruction for it.
LOWBIT_DEVICE uint16_t nearest_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return not_a_number(value) ? uint16_t(0x7FFF) : uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

template <Half half>
LOWBIT_DEVICE uint16_t float_to_half(float value) {
#ifdef __CUDACC_RTC__
  uint16_t out;
  if constexpr (half == kFloat16) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  } else {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
#else
    out = nearest_bfloat16(value);
#endif
  }
  return out;
#else
  return half == kBFloat16 ? nearest_bfloat16(value) : simulator::float_to_float16(value);
#endif
}

// float8_e4m3fn, NaN included.
LOWBIT_DEVICE float e4m3_to_float(uint32_t code) {
#if __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(uint16_t(code)));
  return half_to_float<kFloat16>(uint16_t(pair));
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
