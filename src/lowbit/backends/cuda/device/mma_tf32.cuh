// Tensor-core products of a warp in TF32, for numbers of more bits than 16-bit floats have.
//
// TF32 has the exponent of float32 and 11 bits of its mantissa: bfloat16 and, but for the range, float16 are exact in
// it. A float32 is the sum of two such numbers to 22 bits. Lanes hold what they hold of m16n8 and 32 bytes of K
// (mma.cuh), 4 bytes an element: of A row `group` and `group` + 8 of column `place`, then of column `place` + 4.
#pragma once

#include "mma.cuh"

namespace lowbit {

constexpr uint32_t kTF32Bits = 0xFFFFE000u;

// What TF32 holds of a number, cut off, not rounded; and of what is left, which is exact but for that.
LOWBIT_DEVICE float tf32_part(float value) { return __uint_as_float(__float_as_uint(value) & kTF32Bits); }
LOWBIT_DEVICE float tf32_rest(float value) { return tf32_part(value - tf32_part(value)); }

// sums += A B, m16n8k8. Every number must be one that TF32 holds.
LOWBIT_DEVICE void mma_tf32(float (&sums)[4], const float (&a)[4], float b0, float b1) {
#ifdef __CUDACC_RTC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#else
  const uint32_t bits[4] = {__float_as_uint(a[0]), __float_as_uint(a[1]), __float_as_uint(a[2]), __float_as_uint(a[3])};
  const float start[4] = {sums[0], sums[1], sums[2], sums[3]};
  simulator::mma_m16n8(sums, bits, __float_as_uint(b0), __float_as_uint(b1), start, [](uint32_t x, uint32_t y) {
    if (((x | y) & ~kTF32Bits) != 0) simulator::fail("an operand that is no TF32");
    return double(__uint_as_float(x)) * __uint_as_float(y);
  });
#endif
}

}  // namespace lowbit
