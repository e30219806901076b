// Quotients of float32, where many values have one divisor: value * first + value * second, rounded once, for a
// reciprocal in two parts. Their sum is off by 2**-47 of itself at most, so that the quotient is off from the one
// rounded to nearest only where the true one is that near to the middle between two floats. By a divisor of b bits no
// quotient is nearer to a middle than 2**-(25 + b) of itself: for float16, bfloat16 and small whole numbers all have
// IEEE's bits. So they have for magnitudes from 2**-100 to 2**100; where the value or the divisor is not finite, or the
// divisor is 0, the quotient is NaN.
#pragma once

#include "primitives.cuh"

namespace lowbit {

// 1 / value to a unit in the last place.
LOWBIT_DEVICE float near_reciprocal(float value) {
#ifdef __CUDACC_RTC__
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
  return out;
#else
  return 1.0f / value;
#endif
}

// 1 / divisor, rounded to nearest but for one in a million, given one that is a unit in the last place off. (A divisor
// of 24 ones is such a one: its reciprocal stays as it is given.)
LOWBIT_DEVICE float nearest_reciprocal(float divisor, float near) {
  return fmaf(fmaf(-divisor, near, 1.0f), near, near);
}

// The two parts, given the nearest reciprocal.
LOWBIT_DEVICE float2 reciprocal_in_two(float divisor, float nearest) {
  const float rest = fmaf(-divisor, nearest, 1.0f);
  return {nearest, fmaf(rest, rest, rest) * nearest};
}

LOWBIT_DEVICE float times_two_parts(float value, float first, float second) {
  return fmaf(value, first, value * second);
}

// For divisors of 24 bits, an instruction more: the remainder is exact, and corrects the quotient.
LOWBIT_DEVICE float corrected_quotient(float value, float divisor, float nearest) {
  const float quotient = value * nearest;
  return fmaf(fmaf(-divisor, quotient, value), nearest, quotient);
}

}  // namespace lowbit
