// Groups of 16, 64, 256 or 1024 columns times the regular Hadamard matrix, as float32 in the registers of a warp.
//
// The matrix of 4**n is a Kronecker power of  1 1 1 -1, 1 1 -1 1, 1 -1 1 1, -1 1 1 1:  each pair of bits of a column's
// number is a digit of its own, along which four values are replaced by
//
//   out[i] = x[i] + x[i ^ 1] + x[i ^ 2] - x[i ^ 3]
//
// A warp holds 1024 columns, 32 a lane. Where a digit has one bit within a lane and one between lanes, the two values
// of a lane have the same sum, and differences that differ in sign: one exchange serves both. So the columns are laid
// out with the bits 0, 1, 2, 5 and 7 of their numbers within a lane: eight neighbours in each of four chunks, and of
// digits after the first only that of 1024 is wholly between lanes.
#pragma once

#include "primitives.cuh"

namespace lowbit {

// The first of the eight columns in chunk 0..3 of a lane.
LOWBIT_DEVICE int rotated_column(int lane, int chunk) {
  return (lane & 3) * 8 + (chunk & 1) * 32 + (lane >> 2 & 1) * 64 + (chunk >> 1) * 128 + (lane >> 3) * 256;
}

// A digit whose bits are the bits `first` and `second` of the number of a register.
template <int first, int second>
LOWBIT_DEVICE void rotate_registers(float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (i & (first | second)) continue;
    const float sum = v[i] + v[i | first], less = v[i] - v[i | first];
    const float other = v[i | second] + v[i | first | second], rest = v[i | second] - v[i | first | second];
    v[i] = sum + rest;
    v[i | first] = sum - rest;
    v[i | second] = other + less;
    v[i | first | second] = other - less;
  }
}

// A digit with a bit of the number of a register and one of the lane's.
template <int bit, int lane_bit>
LOWBIT_DEVICE void rotate_straddling(float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (i & bit) continue;
    const float sum = v[i] + v[i | bit], rest = from_lane_xor(v[i] - v[i | bit], lane_bit);
    v[i] = sum + rest;
    v[i | bit] = sum - rest;
  }
}

// A digit of two bits of the lane's number.
template <int first, int second>
LOWBIT_DEVICE void rotate_lanes(float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float other = from_lane_xor(v[i], first);
    v[i] = v[i] + other + from_lane_xor(v[i] - other, second);
  }
}

// One over the root of the size: what the sums of a rotation are to be multiplied by.
template <int kRotation>
constexpr float kNorm = kRotation == 16    ? 0.25f
                        : kRotation == 64  ? 0.125f
                        : kRotation == 256 ? 0.0625f
                                           : 0.03125f;

// 1024 columns of a warp, laid out as `rotated_column` says, register 8 * chunk + i for column i of a chunk. The values
// were multiplied by `kNorm` before: a sum could overflow.
template <int kRotation>
LOWBIT_DEVICE void rotate(float (&v)[32]) {
  rotate_registers<1, 2>(v);
  rotate_straddling<4, 1>(v);
  if constexpr (kRotation >= 64) rotate_straddling<8, 2>(v);
  if constexpr (kRotation >= 256) rotate_straddling<16, 4>(v);
  if constexpr (kRotation >= 1024) rotate_lanes<8, 16>(v);
}

}  // namespace lowbit
