// Activations rounded to int8 by blocks of 32 columns (numerics.w4a8), and the integer products with 4-bit codes.
//
// Of a block the codes of the 16 even columns lie before those of the odd ones: word i of either half belongs to
// columns 8 i .. + 7, which are the low and the high nibbles of word i of a row of 4-bit codes.
#pragma once

#include "dtypes.cuh"

namespace lowbit {

// 2**23 + 2**22 as a float, and its bits: the bits plus an integer below 2**22 in size are the float plus that integer.
constexpr float kMagic = 12582912.0f;
constexpr int kMagicBits = 0x4B400000;

// a * b, rounded on its own: the compiler may not join it with a sum.
LOWBIT_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC_RTC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Four products of bytes, those of `a` unsigned and those of `b` signed, and a sum.
LOWBIT_DEVICE int dot4_unsigned(uint32_t a, uint32_t b, int sum) {
#ifdef __CUDACC_RTC__
  int out;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
  return out;
#else
  for (int i = 0; i < 32; i += 8) sum += int(a >> i & 0xFF) * int8_t(b >> i);
  return sum;
#endif
}

// Half a block, 16 columns, as a thread rounds it: words of even and of odd columns. The other half is the neighbour's.
struct HalfBlock {
  uint32_t even[2], odd[2];
  float scale;

  // The sum of the codes of word i.
  LOWBIT_DEVICE int sum(int i) const { return dot4(odd[i], 0x01010101u, dot4(even[i], 0x01010101u, 0)); }
};

// The largest of sixteen values, NaN before all others, as bits: a scale that is not finite makes results so.
LOWBIT_DEVICE uint32_t largest_magnitude(const float (&values)[2][8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = max(largest, __float_as_uint(values[i / 8][i % 8]) & 0x7FFFFFFFu);
  return largest;
}

// Columns at .. at + 15 of x, half a block; lanes 2 i and 2 i + 1 have the two halves of one. All lanes take part.
// Where the reciprocal of the scale is infinite codes are 0; where the scale is not finite they may be anything.
template <Dtype dtype>
LOWBIT_DEVICE HalfBlock round_half_block(const void* x, int64_t at) {
  float values[2][8];
  load_eight<dtype>(x, at, values[0]);
  load_eight<dtype>(x, at + 8, values[1]);
  uint32_t largest = largest_magnitude(values);
  largest = max(largest, from_lane_xor(largest, 1));
  HalfBlock made;
  made.scale = __uint_as_float(largest) / 127.0f;
  float inverse = 1.0f / made.scale;
  if (!is_finite(inverse)) inverse = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t bits[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) bits[j] = __float_as_uint(rounded_product(values[i][j], inverse) + kMagic);
    made.even[i] = pick_bytes<0x5410>(pick_bytes<0x0040>(bits[0], bits[2]), pick_bytes<0x0040>(bits[4], bits[6]));
    made.odd[i] = pick_bytes<0x5410>(pick_bytes<0x0040>(bits[1], bits[3]), pick_bytes<0x0040>(bits[5], bits[7]));
  }
  return made;
}

// The sums of codes over the groups that a half block lies in, times `unit`: kPieces groups a block, of which this half
// has kPieces / 2, or shares one. put(piece, sum) is called once for each.
template <int kPieces, typename Put>
LOWBIT_DEVICE void put_sums(const HalfBlock& made, int half, float unit, const Put& put) {
  const int first = made.sum(0), second = made.sum(1);
  if constexpr (kPieces == 4) {
    put(2 * half, unit * float(first));
    put(2 * half + 1, unit * float(second));
  } else if constexpr (kPieces == 2) {
    put(half, unit * float(first + second));
  } else {
    const int both = first + second + from_lane_xor(first + second, 1);
    if (half == 0) put(0, unit * float(both));
  }
}

}  // namespace lowbit
