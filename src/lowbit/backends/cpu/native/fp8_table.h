// Codes of one-byte floats looked up, 64 at once: for x86 processors with AVX512-VBMI beside what the set asks for.
//
// A code without its sign is one of 128, and what it stands for is a bfloat16, exactly: its two bytes come from two
// tables of 128, and two bfloat16 beside each other are two float32 by a shift and a mask. 64 products keep the vector
// units for 18 operations, where the conversion from float16 takes 22, and have the same float32 values.
#pragma once

#include <atomic>

#include "simd.h"

namespace lowbit {
// A test sets it to false, so that both ways are tested where there are two.
inline std::atomic<bool> fp8_tables_wanted{true};
}  // namespace lowbit

#if defined(LOWBIT_ISA_AVX512) && !defined(LOWBIT_EMULATE)
// Of a function that is only called where `uses_fp8_tables()`. Lambdas inside it do not inherit it.
#define LOWBIT_FP8_TABLES __attribute__((target("avx512vbmi")))

namespace lowbit {

inline bool uses_fp8_tables() {
  static const bool can = __builtin_cpu_supports("avx512vbmi");
  return can && fp8_tables_wanted;
}

struct Fp8Bytes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

// Of codes with kMantissa bits behind an exponent that counts from 2^-15, as that of float16 does. kFinite: all ones
// are the only NaN, and there is no infinity. kMarked: the lowest bit, which no other value has, is set in zeros, which
// are then subnormal, and in NaN.
template <int kMantissa, bool kFinite, bool kMarked>
constexpr Fp8Bytes make_fp8_bytes() {
  constexpr int kBias = 127 - 15, kOnes = (1 << kMantissa) - 1;
  Fp8Bytes bytes{};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> kMantissa, mantissa = code & kOnes;
    if (kFinite ? code == 127 : exponent == 31) {
      exponent = 255;
    } else if (exponent > 0) {
      exponent += kBias;
    } else if (mantissa > 0) {  // below the normal numbers of the code, but not below those of bfloat16
      exponent = kBias + 1;
      for (; mantissa <= kOnes; mantissa *= 2) --exponent;
      mantissa &= kOnes;
    }
    const int marked = kMarked && (exponent == 0 || exponent == 255);
    const int bits = exponent << 7 | mantissa << (7 - kMantissa) | marked;
    bytes.low[code] = static_cast<uint8_t>(bits & 255);
    bytes.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return bytes;
}

// Where each byte of a line, which has four columns of 16 rows, goes: in every quarter four rows, of columns 0 and 1
// side by side, then of columns 2 and 3.
struct Fp8Order {
  alignas(64) uint8_t from[64];
};
constexpr Fp8Order make_fp8_order() {
  Fp8Order order{};
  for (int i = 0; i < 64; ++i) {
    const int quarter = i / 16, half = i / 8 % 2, row = quarter * 4 + i % 8 / 2, column = half * 2 + i % 2;
    order.from[i] = static_cast<uint8_t>(column * 16 + row);
  }
  return order;
}

constexpr int kFp8Line = 4;  // columns of a line

template <class Codes, bool kMarked = false>
struct Fp8Tables {
  static constexpr Fp8Bytes kBytes = make_fp8_bytes<Codes::kMantissa, Codes::kFinite, kMarked>();
  static constexpr Fp8Order kOrder = make_fp8_order();

  const __m512i order = _mm512_load_si512(kOrder.from);
  const __m512i low[2] = {_mm512_load_si512(kBytes.low), _mm512_load_si512(kBytes.low + 64)};
  const __m512i high[2] = {_mm512_load_si512(kBytes.high), _mm512_load_si512(kBytes.high + 64)};

  // The bfloat16 values of a line, as Codes::load gives them: in the lane of a row, columns 0 and 1, and 2 and 3.
  LOWBIT_FP8_TABLES __attribute__((always_inline)) void load_pairs(const uint8_t* line, __m512i (&pairs)[2]) const {
    const __m512i codes = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(line));
    const __m512i lows = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    const __m512i magnitudes = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    const __m512i highs = _mm512_ternarylogic_epi32(magnitudes, codes, _mm512_set1_epi8(-128), 0xf8);  // | sign
    pairs[0] = _mm512_unpacklo_epi8(lows, highs);
    pairs[1] = _mm512_unpackhi_epi8(lows, highs);
  }

  // The float32 values of a line, as Codes::load gives them.
  LOWBIT_FP8_TABLES __attribute__((always_inline)) void load(const uint8_t* line, simd::F32 (&to)[kFp8Line]) const {
    __m512i pairs[2];
    load_pairs(line, pairs);
    for (int i = 0; i < 2; ++i) {
      to[2 * i] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16))};
      to[2 * i + 1] = {_mm512_castsi512_ps(_mm512_and_si512(pairs[i], _mm512_set1_epi32(-0x10000)))};
    }
  }
};

}  // namespace lowbit
#else
namespace lowbit {
inline bool uses_fp8_tables() { return false; }
}  // namespace lowbit
#endif
