// Codes of 4 bits as pairs of 16-bit floats that have the code's very value, for kernels that use each pair for many
// tokens; and the scales that belong to them.
//
// words.cuh leaves a bias in integer codes, which costs an addition a token and group. With more than 8 tokens it is
// cheaper to take it off the pair, and nothing is lost of the sums. An integer code is put where it stands, or near, in
// the mantissa of a large power of two, and one fma takes that away. An e2m1 code is multiplied with the scale of its
// group, where the product is exact: e4m3 in both types, powers of two in bfloat16.
#pragma once

#include "floats.cuh"
#include "primitives.cuh"
#include "weight_scales.cuh"
#include "words.cuh"

namespace lowbit {

// a * b + c for two 16-bit floats side by side, each rounded once.
template <Half half>
LOWBIT_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (half == kBFloat16) {
    return fma_bfloat16_pair(a, b, c);
  } else {
#ifdef __CUDACC_RTC__
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
#else
    uint32_t out = 0;
    for (int at = 0; at < 32; at += 16) {
      const auto value = [at](uint32_t bits) { return double(simulator::float16_to_float(uint16_t(bits >> at))); };
      out |= uint32_t(simulator::float_to_float16(float(value(a) * value(b) + value(c)))) << at;
    }
    return out;
#endif
  }
}

// The product of two pairs: a sum with -0, which changes nothing.
template <Half half>
LOWBIT_DEVICE uint32_t multiplied_pair(uint32_t a, uint32_t b) {
  return fma_pair<half>(a, b, 0x80008000u);
}

// Half of what spread_words gives: nibbles 0..3 of two words side by side, or 4..7.
LOWBIT_DEVICE uint32_t spread_half(uint32_t first, uint32_t second, bool high) {
#ifdef __CUDACC_RTC__
  return __byte_perm(first, second, high ? 0x7632u : 0x5410u);
#else
  const Spread both = spread_words(first, second);
  return high ? both.high : both.low;
#endif
}

// Pair j of four, code - 8: nibble j of both halves of `spread`.
template <Half half, int j>
LOWBIT_DEVICE uint32_t centred_pair(uint32_t spread) {
  if constexpr (half == kBFloat16) {
    const uint32_t raised = masked<0x000F000Fu, 0x43004300u>(spread >> 4 * j);  // 128 + code
    return fma_pair<half>(raised, 0x3F803F80u, 0xC308C308u);
  } else if constexpr (j % 2 == 0) {
    const uint32_t raised = masked<0x000F000Fu, 0x64006400u>(spread >> 4 * j);  // 1024 + code
    return fma_pair<half>(raised, 0x3C003C00u, 0xE408E408u);
  } else {
    const uint32_t raised = masked<0x00F000F0u, 0x64006400u>(spread >> 4 * (j - 1));  // 1024 + 16 code
    return fma_pair<half>(raised, 0x2C002C00u, 0xD480D480u);
  }
}

// Pair j of four of e2m1 values, times 2**-126 (bfloat16) or 2**-14. Of a product with two powers of two at once, sign
// and magnitude are taken where each is right; its other bits are masked away.
template <Half half, int j>
LOWBIT_DEVICE uint32_t tiny_pair(uint32_t spread) {
  if constexpr (half == kFloat16) return e2m1_pair<half, j>(spread);
  constexpr int at = j % 2 * 4;
  const uint32_t code = (spread >> 4 * (j - j % 2)) & (0x000F000Fu << at);
  return code * ((1u << (12 - at)) + (1u << (6 - at))) & 0x81C081C0u;
}

// Whether pairs of e2m1 are multiplied with their scales before the products.
template <Half half, ScaleType type>
constexpr bool kScalesPairs = type == kE4M3 || (type == kE8M0 && half == kBFloat16);

// What the sums must be multiplied by then: scales of e4m3 are raised so far that products with tiny pairs lose
// nothing, which is 2**7 less than would make up for the pairs.
template <ScaleType type>
constexpr float kPairsScale = type == kE4M3 ? 128.0f : 1.0f;

// As a pair of twice the same, for `scaled_pair`.
template <Half half, ScaleType type>
LOWBIT_DEVICE uint32_t scale_pair(uint32_t stored) {
  if constexpr (type == kE8M0) {
    const uint32_t bits = stored == 255 ? 0x7FC0u : stored ? stored << 7 : 0x40u;
    return bits * 0x10001u;
  }
  const float raised = e4m3_to_float(stored) * (half == kBFloat16 ? 0x1p119f : 128.0f);
  return uint32_t(float_to_half<half>(raised)) * 0x10001u;
}

// A tiny pair times its scale; see kPairsScale.
template <Half half, ScaleType type>
LOWBIT_DEVICE uint32_t scaled_pair(uint32_t tiny, uint32_t scale) {
  if constexpr (type == kE8M0) tiny = multiplied_pair<half>(tiny, 0x7E807E80u);  // times 2**126: not a subnormal one
  return multiplied_pair<half>(tiny, scale);
}

}  // namespace lowbit
