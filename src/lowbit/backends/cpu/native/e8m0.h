// Scales that are powers of two, one byte each (OCP Microscaling).
#pragma once

#include "simd.h"

namespace lowbit {

// kLanes codes of powers of two: 2^(code - 127); 0 is a float32 subnormal, 255 NaN.
inline simd::F32 load_e8m0(const uint8_t* from) {
  using namespace simd;
  const I32 codes = widen_u8(from);
  const I32 lowest = select(equal(codes, zero_i32()), set1_i32(0x400000), shift_left<23>(codes));
  return as_f32(select(equal(codes, set1_i32(255)), set1_i32(0x7fc00000), lowest));
}

}  // namespace lowbit
