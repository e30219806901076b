// One-byte float codes of bfloat16 weights under one scale, looked up 64 at once: for x86 processors with AVX512-VBMI.
//
// Twice a weight is twice its quotient, exactly, and its code lies one exponent further. So the codes of the 128
// mantissas of one octave, made as all others are, give those of every octave above it: 64 codes take 20 operations,
// where rounding quotients takes 75. The few octaves below, in which the steps between codes no longer shrink, are not
// in the table: where one of their values lies, 64 are calculated.
#pragma once

#include "encode.h"
#include "fp8_table.h"

#if defined(LOWBIT_FP8_TABLES)

namespace lowbit {

constexpr int64_t kLookedUp = 64;      // weights at once
constexpr int64_t kWorthTable = 1024;  // weights under one scale: to make a table takes as long as 128 codes

// Which bytes of two vectors of bfloat16 are the lower ones, and which the upper ones.
struct Fp8Halves {
  alignas(64) uint8_t even[64];
  alignas(64) uint8_t odd[64];
};
constexpr Fp8Halves make_fp8_halves() {
  Fp8Halves halves{};
  for (int i = 0; i < 64; ++i) {
    halves.even[i] = static_cast<uint8_t>(2 * i);
    halves.odd[i] = static_cast<uint8_t>(2 * i + 1);
  }
  return halves;
}

template <class Grid>
class Fp8Lookup {
 public:
  // calculate(values, codes) gives the codes of 128 bfloat16 under the scale.
  template <class Calculate>
  Fp8Lookup(float scale, const Calculate& calculate) {
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof bits);
    first_ = static_cast<int>(bits >> 23) + 1 + kSmallest;
    useful_ = first_ > kLow;
    if (!useful_) return;
    alignas(64) uint16_t values[128];
    for (int i = 0; i < 128; ++i) values[i] = static_cast<uint16_t>(first_ << 7 | i);
    calculate(values, codes_);
  }

  bool useful() const { return useful_; }

  // Codes of finite x[0 .. count), up to the first 64 of which some are not in the table: gives how many were made.
  // With `ahead`, what lies so many values behind is asked for.
  LOWBIT_FP8_TABLES int64_t encode(const uint16_t* x, int64_t count, uint8_t* to, int64_t ahead) const {
    const __m512i table[2] = {_mm512_load_si512(codes_), _mm512_load_si512(codes_ + 64)};
    const __m512i even = _mm512_load_si512(kOrder.even), odd = _mm512_load_si512(kOrder.odd);
    const __m512i first = _mm512_set1_epi8(static_cast<char>(first_)), ones = _mm512_set1_epi8(-1);
    const __m512i zeros = _mm512_set1_epi8(static_cast<char>(first_ - kLow));
    const bool stream = reinterpret_cast<uintptr_t>(to) % 64 == 0;
    int64_t at = 0;
    for (; at + kLookedUp <= count; at += kLookedUp) {
      if (ahead) {
        __builtin_prefetch(x + at + ahead);
        __builtin_prefetch(x + at + ahead + 32);
      }
      const __m512i a = _mm512_loadu_si512(x + at), b = _mm512_loadu_si512(x + at + 32);
      const __m512i low = _mm512_permutex2var_epi8(a, even, b), high = _mm512_permutex2var_epi8(a, odd, b);
      __m512i exponent = _mm512_add_epi8(high, high);
      exponent = _mm512_mask_sub_epi8(exponent, _mm512_movepi8_mask(low), exponent, ones);
      __m512i code = _mm512_permutex2var_epi8(table[0], low, table[1]);  // of the lowest seven bits
      const __m512i steps = _mm512_min_epu8(_mm512_subs_epu8(exponent, first), _mm512_set1_epi8(kMostOctaves));
      code = _mm512_add_epi8(code, _mm512_slli_epi16(steps, kMantissa));
      code = _mm512_min_epu8(code, _mm512_set1_epi8(Grid::kLastCode));
      const __mmask64 below = _mm512_cmplt_epu8_mask(exponent, first);
      if (__builtin_expect(below != 0, 0)) {
        if (below != _mm512_cmplt_epu8_mask(exponent, zeros)) break;
        code = _mm512_maskz_mov_epi8(~below, code);
      }
      code = _mm512_ternarylogic_epi32(code, high, _mm512_set1_epi8(-128), 0xf8);  // | sign
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), code);
      } else {
        _mm512_storeu_si512(to + at, code);
      }
    }
    return at;
  }

 private:
  static constexpr int kMantissa = 23 - Grid::kShift;
  static constexpr int kSmallest = (Grid::kBias >> kMantissa) + 1 - 127;  // exponent of the smallest normal value
  static constexpr int kLow = kMantissa + 2;  // so many octaves below the first of the table, codes are zeros
  static constexpr int kMostOctaves = 127 >> kMantissa;
  static constexpr Fp8Halves kOrder = make_fp8_halves();

  int first_;  // exponent, as bfloat16 has it, from which on quotients are surely normal numbers of the code
  bool useful_;
  alignas(64) uint8_t codes_[128];
};

}  // namespace lowbit
#endif
