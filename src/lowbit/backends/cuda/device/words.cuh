// Codes of 4 bits from the layout words128, two at a time, as 16-bit floats for the tensor cores.
//
// A word holds the codes of one column of eight sixteens. From two words, pair j is {nibble j of the first, nibble j of
// the second}. An integer code goes to the upper end of the mantissa of 16: such a value is 16 + code, and what the 16
// adds to a sum is taken off the sum. (In the lower end, where a nibble could stay in place, it would stand beside 128
// or 1024, and the sums would lose as much.) An e2m1 code is put where the exponent and the first mantissa bit are, and
// a power of two makes up for the exponent's bias.
#pragma once

#include "primitives.cuh"

namespace lowbit {

enum Code { kIntegers = 0, kE2M1 = 1 };
enum Half { kBFloat16 = 0, kFloat16 = 1 };

// What the decoded value of an integer code is too large by: it is 16 + code, and the code 8 stands for 0.
constexpr float kBias = 24.0f;

// Bits moved up by `left` places, or down.
template <int left>
LOWBIT_DEVICE uint32_t moved(uint32_t bits) {
  if constexpr (left >= 0) return bits << left;
  return bits >> (left < 0 ? -left : 0);
}

// The four highest bits of the mantissa of 16 are worth 8, 4, 2 and 1.
template <Half half, int j>
LOWBIT_DEVICE uint32_t integer_pair(uint32_t spread) {
  constexpr int place = half == kBFloat16 ? 3 : 6;
  constexpr uint32_t sixteen = half == kBFloat16 ? 0x41804180u : 0x4C004C00u;
  return masked<(0xFu << place) * 0x00010001u, sixteen>(moved<place - 4 * (j % 4)>(spread));
}

// Bit 3 of a nibble goes to the sign, bits 0..2 to 9..11 of float16 or 6..8 of bfloat16. The exponent biases are 15 and
// 127, that of e2m1 is 1: what stands there is the 2**-14-th or the 2**-126-th part of the value.
template <Half half, int j>
LOWBIT_DEVICE uint32_t e2m1_pair(uint32_t spread) {
  constexpr int at = 4 * (j % 4);
  constexpr int place = half == kBFloat16 ? 6 : 9;
  constexpr uint32_t low = (0x7u << place) * 0x00010001u;
  const uint32_t value = moved<place - at>(spread);
  return merged<0x80008000u>(spread << (12 - at), value & low);
}

// Nibbles 0..3 of two words side by side, and nibbles 4..7.
struct Spread {
  uint32_t low, high;
};

LOWBIT_DEVICE Spread spread_words(uint32_t first, uint32_t second) {
  return {pick_bytes<0x5410>(first, second), pick_bytes<0x7632>(first, second)};
}

// Pair j of two words.
template <Code code, Half half, int j>
LOWBIT_DEVICE uint32_t decode_pair(Spread words) {
  const uint32_t from = j < 4 ? words.low : words.high;
  if constexpr (code == kIntegers) return integer_pair<half, j>(from);
  return e2m1_pair<half, j>(from);
}

// What the sums of decoded e2m1 values must be multiplied by. A bfloat16 so small that it is subnormal is not left to
// the tensor cores: its pairs are multiplied by 2**126 first, which makes this 1.
template <Half half>
constexpr float kE2M1Scale = half == kBFloat16 ? 1.0f : 16384.0f;

}  // namespace lowbit
