// A weight of 4-bit floating-point codes (e2m1) in the layout rows16: w = value * scale, a scale a group of a row.
//
// Values are multiples of a half: 0 1 2 3 4 6 8 12 halves and a sign. Activations as integers are multiplied as
// int4_gemm.h says: with pairs of int16 and in tiles a value is its number of halves; as a byte without a sign it has
// 12 added. float32 activations stay what they are. Few of them: the four bytes of a word stay where they lie. Masked
// in place such a byte is its number times 256^j, exactly a float32, and the activation of its column carries the
// 256^-j; what the 12 add is taken off once a group, by the sum of activations.
#pragma once

#include "bf16_gemm.h"
#include "int4_tiles.h"

namespace lowbit {

alignas(16) constexpr uint8_t kE2m1Halves[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
alignas(16) constexpr int8_t kE2m1SignedHalves[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Scales offers `static constexpr int64_t kGroup` and `F32 halves(block, group, v)`: what a half is worth. With kSpans,
// too (int4_gemm.h), that is own(block, group, v) * common(block, v).
template <class Scales>
struct E2m1Weight {
  static constexpr int kWordCodes = 8, kZero = 12;
  // Steps that a sum holds: codes go up to 24, not to the 15 of kDot4Steps. Of int16: 4 * 2 * 24 * 128 < 2**15.
  static constexpr int kSteps = simd::kDot4Steps / 2;

  const uint32_t* words;  // [blocks, stride]: k / 8 words of 16 rows, and what fills up
  int64_t stride;
  Scales scales;
  int64_t n, k, group;

  static void codes(simd::I32 word, simd::Bytes& even, simd::Bytes& odd) {
    using namespace simd;
    even = lookup_bytes(kE2m1Halves, low_nibbles(as_bytes(word)));
    odd = lookup_bytes(kE2m1Halves, high_nibbles(as_bytes(word)));
  }
  // As bytes with a sign.
  static void signed_codes(simd::I32 word, simd::Bytes& even, simd::Bytes& odd) {
    using namespace simd;
    even = lookup_bytes(kE2m1SignedHalves, low_nibbles(as_bytes(word)));
    odd = lookup_bytes(kE2m1SignedHalves, high_nibbles(as_bytes(word)));
  }
  template <int kAt>
  static simd::I32 pair(simd::I32 word) {
    return simd::lookup_pair<kAt>(simd::make_pair_table(kE2m1SignedHalves), word);
  }
  static constexpr bool kOffsets = false, kSpans = Scales::kSpans;
  void read_factors(int64_t block, float* to, float*) const {
    if constexpr (kSpans) return scales.read_own(block, to);
    for (int64_t g = 0; g < k / group; ++g)
      for (int v = 0; v < kBlockVectors; ++v, to += simd::kLanes) simd::store_f32(to, scales.halves(block, g, v));
  }
  simd::F32 span_scale(int64_t block, int v) const { return scales.common(block, v); }
  simd::F32 scale(int64_t block, int64_t g, int v) const { return scales.halves(block, g, v); }

  // x times the power of 256 that its code's place asks for, and the sum of each group of plain x.
  struct Few {
    int64_t k, groups;
    Room x, sums;  // [m, k], [m, groups]

    Few(const E2m1Weight& w, const Activations& from, int threads)
        : k(w.k), groups(w.k / w.group), x(from.m * w.k), sums(from.m * groups) {
      static const float kPlace[kWordCodes] = {1, 1, 0x1p-8f, 0x1p-8f, 0x1p-16f, 0x1p-16f, 0x1p-24f, 0x1p-24f};
      parallel_for(from.m, from.m * k >= 32768 ? threads : 1, [&](int64_t m) {
        float* row = x.data() + m * k;
        row_to_f32(from, m, row);
        for (int64_t g = 0; g < groups; ++g) {
          float lanes[kWordCodes] = {};
          for (int64_t c = g * w.group; c < (g + 1) * w.group; c += kWordCodes)
            for (int j = 0; j < kWordCodes; ++j) {
              lanes[j] += row[c + j];
              row[c + j] *= kPlace[j];
            }
          sums.data()[m * groups + g] =
              ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        }
      });
    }
  };

  template <int kPlace>
  static simd::F32 byte_in_place(simd::Bytes bytes) {  // its number * 256^kPlace, which is below 2^31
    using namespace simd;
    constexpr uint32_t kMask = 0xffu << (8 * kPlace);
    return to_f32(bit_and(as_i32(bytes), set1_i32(static_cast<int32_t>(kMask))));
  }

  template <int kTokens>
  void multiply(int64_t block, const Few& few, int64_t token, simd::F32 (&sums)[kTokens][kBlockVectors]) const {
    using namespace simd;
    // Independent sums, so that one multiplication need not wait for the last.
    constexpr int kChains = std::max(1, 8 / (kTokens * kBlockVectors));
    const uint32_t* word = words + block * stride;
    const float *x = few.x.data() + token * k, *x_sums = few.sums.data() + token * few.groups;
    for (auto& row : sums)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t g = 0; g < few.groups; ++g) {
      F32 acc[kTokens][kBlockVectors][kChains];
      for (auto& row : acc)
        for (auto& lanes : row)
          for (auto& sum : lanes) sum = zero_f32();
      for (int64_t c = g * group; c < (g + 1) * group; c += kWordCodes, word += kBlockRows) {
        Bytes even[kBlockVectors], odd[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) codes(load_i32(word + v * kLanes), even[v], odd[v]);
        auto step = [&](auto place) {
          constexpr int j = decltype(place)::value;
          F32 token_x[kTokens];
          for (int t = 0; t < kTokens; ++t) token_x[t] = set1_f32(x[t * k + c + j]);
          for (int v = 0; v < kBlockVectors; ++v) {
            const F32 q = byte_in_place<j / 2>(j % 2 ? odd[v] : even[v]);
            for (int t = 0; t < kTokens; ++t) acc[t][v][j % kChains] = fma(q, token_x[t], acc[t][v][j % kChains]);
          }
        };
        for_each_place<kWordCodes>(step);
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 half = scale(block, g, v);
        for (int t = 0; t < kTokens; ++t) {
          F32 dot = mul(set1_f32(x_sums[t * few.groups + g]), set1_f32(-kZero));
          for (int i = 0; i < kChains; ++i) dot = add(dot, acc[t][v][i]);
          sums[t][v] = fma(half, dot, sums[t][v]);
        }
      }
    }
  }

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    using namespace simd;
    const uint32_t* word = words + block * stride + first / kWordCodes * kBlockRows;
    F32 half[kBlockVectors];
    for (int64_t c = first; c < last; c += kWordCodes, word += kBlockRows, panel += kWordCodes * kPanelRows) {
      if (c % group == 0)
        for (int v = 0; v < kBlockVectors; ++v) half[v] = scale(block, c / group, v);
      for (int v = 0; v < kBlockVectors; ++v) {
        Bytes even, odd;
        codes(load_i32(word + v * kLanes), even, odd);
        auto step = [&](auto place) {
          constexpr int j = decltype(place)::value;
          constexpr float kInverse = 1.0f / static_cast<float>(1u << (8 * (j / 2)));
          const F32 halves = fma(byte_in_place<j / 2>(j % 2 ? odd : even), set1_f32(kInverse), set1_f32(-kZero));
          store_f32(panel + j * kPanelRows + v * kLanes, mul(halves, half[v]));
        };
        for_each_place<kWordCodes>(step);
      }
    }
  }

#if defined(LOWBIT_BF16_DOTS)
  void soon(int64_t block, int64_t first, int64_t last, int64_t pieces, Soon (&from)[2]) const {
    from[0] = {words + block * stride + first / kWordCodes * kBlockRows, (last - first) * kBlockRows / 2, pieces};
    from[1] = {scales.own_codes(block, first / group), (last - first) / group * kBlockRows, pieces};
  }
  // With `own` scales, of which a product with a number of halves has six bits, and without the common ones.
  LOWBIT_BF16_DOTS void decode_pairs(int64_t block, int64_t first, int64_t last, uint32_t* panel) const {
    using namespace simd;
    alignas(64) static const float kHalves[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const Table16 table = make_table(kHalves);
    const __m512i upper = _mm512_set4_epi32(0x0f0e, 0x0b0a, 0x0706, 0x0302);  // the upper half of a lane to the lower
    const uint32_t* word = words + block * stride + first / kWordCodes * kBlockRows;
    F32 own = zero_f32();
    for (int64_t c = first; c < last; c += kWordCodes, word += kBlockRows) {
      if (c % group == 0) own = scales.own(block, c / group, 0);
      __m512i left = _mm512_loadu_si512(word);
      for (int i = 0; i < kWordCodes / 2; ++i, panel += kPanelRows, left = _mm512_srli_epi32(left, 8)) {
        const F32 even = mul(lookup(table, {left}), own), odd = mul(lookup(table, {_mm512_srli_epi32(left, 4)}), own);
        const __m512i pairs = _mm512_mask_shuffle_epi8(_mm512_castps_si512(odd.v), 0x3333333333333333,
                                                       _mm512_castps_si512(even.v), upper);
        _mm512_store_si512(panel, pairs);
      }
    }
  }
#endif
};

// Which way a call goes; the launcher knows from how many tokens on which is the faster one, and where there are pairs.
enum class E2m1Way : int { kInt16 = 0, kRegisters = 1, kPanels = 2, kPairs = 3 };

// Whether a way takes weights or activations apart, so that what is not finite is for multiply_not_finite.
constexpr bool takes_apart(E2m1Way way) { return way == E2m1Way::kInt16 || way == E2m1Way::kRegisters; }

#if defined(LOWBIT_BF16_DOTS)
// A weight with `own` scales as bf16_gemm.h takes it.
template <class Scales>
struct E2m1Pairs : E2m1Weight<Scales> {
  static constexpr bool kGroupScales = false;

  explicit E2m1Pairs(const E2m1Weight<Scales>& w) : E2m1Weight<Scales>(w) {}
  simd::F32 finish(simd::F32 sum, int64_t block, int v) const { return simd::mul(sum, this->scales.common(block, v)); }
};
#endif

template <class Scales>
void linear_e2m1(const E2m1Weight<Scales>& w, const Activations& x, const Output& out, E2m1Way way,
                 int64_t integer_block, int threads) {
  if (way == E2m1Way::kRegisters) return gemm_few(w, x, out, threads);
  if (way == E2m1Way::kPanels) return gemm_many(w, x, out, threads);
#if defined(LOWBIT_BF16_DOTS)
  if constexpr (Scales::kSpans)
    if (way == E2m1Way::kPairs) return gemm_pairs(E2m1Pairs<Scales>(w), x, out, threads);
#endif
  if (simd::kDot8IsOneStep && x.m <= kTooFewForPairs)
    return int4_gemm(w, IntegerTokens<2, 8, false>(x, integer_block, w.group, threads), out, threads);
  int4_product<2>(w, x, integer_block, out, threads);
}

}  // namespace lowbit
