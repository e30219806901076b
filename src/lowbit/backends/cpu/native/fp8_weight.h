// A weight of one-byte floating-point codes in the layout rows16, interleaved by single bytes:
//
//   codes    [blocks, stride] bytes: column c of row r of a block is byte 16 c + r, and what fills up
//   scales   one, one a row, one a tile, or a power of two for every 32 columns of a row
//
// Few tokens: codes become float32 in registers, and what all columns under one scale add up to is multiplied with it.
#pragma once

#include "bf16_gemm.h"
#include "e8m0.h"
#include "fp8_table.h"

namespace lowbit {

// Of kFp8Columns columns of a block.
using Fp8Values = simd::F32[simd::kFp8Columns][kBlockVectors];

// float8_e4m3fn: values come out 2^8 too small.
struct E4M3 {
  static constexpr float kUnit = 256.0f;
  static constexpr int kMantissa = 3;
  static constexpr bool kFinite = true;
  static void load(const uint8_t* from, Fp8Values& to) { simd::load_e4m3_columns(from, to); }
};

struct E5M2 {
  static constexpr float kUnit = 1.0f;
  static constexpr int kMantissa = 2;
  static constexpr bool kFinite = false;
  static void load(const uint8_t* from, Fp8Values& to) { simd::load_e5m2_columns(from, to); }
};

// float32 scales of a tensor, of rows, or of tiles.
struct Fp8Scales {
  enum Kind : int { kTensor = 0, kRow = 1, kTile = 2 };
  const float* values;  // [], [blocks, 1, 16], [ceil(n / tile_rows), across], or [blocks, across, 16] of tiles of a row
  int kind;
  int64_t n, tile_rows, across;

  simd::F32 of(int64_t block, int64_t group, int v) const {
    using namespace simd;
    const int64_t row = block * kBlockRows + v * kLanes;
    if (kind == kTensor) return set1_f32(values[0]);
    if (kind == kRow) return load_f32(values + row);
    if (tile_rows == 1) return load_f32(values + (block * across + group) * kBlockRows + v * kLanes);
    if (tile_rows % kLanes == 0) return set1_f32(values[std::min(row, n - 1) / tile_rows * across + group]);
    alignas(64) float lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) lanes[r] = values[std::min(row + r, n - 1) / tile_rows * across + group];
    return load_f32(lanes);
  }
};

// Codes of powers of two, one for every group of columns of a row.
struct E8m0Scales {
  const uint8_t* codes;  // [blocks, groups, 16]
  int64_t groups;

  simd::F32 of(int64_t block, int64_t group, int v) const {
    return load_e8m0(codes + (block * groups + group) * kBlockRows + v * simd::kLanes);
  }

#if defined(LOWBIT_BF16_DOTS)
  // The least codes of 16 rows among these groups, and whether none is NaN or more than kMostRaise above its row's.
  bool near(int64_t block, int64_t first, int64_t last, __m128i& least) const {
    const auto* at = reinterpret_cast<const __m128i*>(codes + (block * groups + first) * kBlockRows);
    least = _mm_set1_epi8(-1);
    __m128i most = _mm_setzero_si128();
    for (; first < last; ++first, ++at) {
      const __m128i group = _mm_loadu_si128(at);
      least = _mm_min_epu8(least, group);
      most = _mm_max_epu8(most, group);
    }
    return !_mm_cmpgt_epu8_mask(_mm_sub_epi8(most, least), _mm_set1_epi8(kMostRaise)) &&
           !_mm_cmpeq_epi8_mask(most, _mm_set1_epi8(-1));
  }
  // By how much a group's codes exceed the least ones: what to add to two bfloat16, in their exponents.
  __m512i raise(int64_t block, int64_t group, __m128i least) const {
    const void* at = codes + (block * groups + group) * kBlockRows;
    const __m512i rows = _mm512_cvtepu8_epi32(_mm_sub_epi8(_mm_loadu_si128(static_cast<const __m128i*>(at)), least));
    return _mm512_or_si512(_mm512_slli_epi32(rows, 7), _mm512_slli_epi32(rows, 23));
  }
  static constexpr int kMostRaise = 16;  // of weights, so that few activations are left with which sums overflow
#endif
};

#if defined(LOWBIT_ISA_AVX512)
constexpr int kFp8FewTokens = 16;  // 16 sums and 2 weights in 32 registers
#else
constexpr int kFp8FewTokens = 6;  // 12 sums, 2 weights and a token in 16 registers
#endif

template <class Codes, class Scales>
struct Fp8Weight {
  static constexpr int kStep = 4;  // columns in one go: K and groups are multiples of it
  static constexpr int64_t kAheadOfPanel = kPanelColumns * kBlockRows;  // bytes: the block's part of the next panel
  // Independent sums of a row, so that one multiplication need not wait for the last.
  static constexpr int chains(int tokens) { return std::min(kStep, std::max(1, 8 / (tokens * kBlockVectors))); }

  const uint8_t* codes;
  int64_t stride;
  Scales scales;
  int64_t n, k, group;              // group: columns under one scale, K where a row has one
  bool tables = uses_fp8_tables();  // looked up, the codes of a few tokens give the same sums in the same order

  struct Few : TokenTiles {
    Few(const Fp8Weight&, const Activations& x, int threads) : TokenTiles(x, kFp8FewTokens, threads) {}
  };

  template <int kTokens>
  void multiply(int64_t block, const Few& few, int64_t token, simd::F32 (&sums)[kTokens][kBlockVectors]) const {
    using namespace simd;
#if defined(LOWBIT_FP8_TABLES)
    if (tables) return multiply_by_tables<kTokens>(block, few, token, sums);
#endif
    constexpr int kChains = chains(kTokens);
    const uint8_t* at = codes + block * stride;
    const float* x = few.of(token);
    for (auto& row : sums)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t g = 0, c = 0; c < k; ++g) {
      F32 acc[kTokens][kBlockVectors][kChains];
      for (auto& row : acc)
        for (auto& lanes : row)
          for (auto& sum : lanes) sum = zero_f32();
      for (const int64_t end = std::min(c + group, k); c < end; c += kStep, at += kStep * kBlockRows) {
        ask_ahead(at);
        for_each_place<kStep / kFp8Columns>([&](auto place) {
          Fp8Values w;
          Codes::load(at + decltype(place)::value * kFp8Columns * kBlockRows, w);
          for_each_place<kFp8Columns>([&](auto column) {
            constexpr int i = decltype(column)::value, j = decltype(place)::value * kFp8Columns + i;
            for (int t = 0; t < kTokens; ++t) {
              const F32 token_x = set1_f32(x[j * kTokens + t]);
              for (int v = 0; v < kBlockVectors; ++v)
                acc[t][v][j % kChains] = fma(w[i][v], token_x, acc[t][v][j % kChains]);
            }
          });
        });
        x += kStep * kTokens;
      }
      add_scaled(acc, block, g, sums);
    }
    for (auto& row : sums)
      for (auto& sum : row) sum = mul(sum, set1_f32(Codes::kUnit));
  }

#if defined(LOWBIT_FP8_TABLES)
  // The same, where `uses_fp8_tables()`.
  template <int kTokens>
  LOWBIT_FP8_TABLES void multiply_by_tables(int64_t block, const Few& few, int64_t token,
                                            simd::F32 (&sums)[kTokens][kBlockVectors]) const {
    using namespace simd;
    constexpr int kChains = chains(kTokens);
    const Fp8Tables<Codes> table;
    const uint8_t* at = codes + block * stride;
    const float* x = few.of(token);
    for (auto& row : sums) row[0] = zero_f32();
    for (int64_t g = 0, c = 0; c < k; ++g) {
      F32 acc[kTokens][kBlockVectors][kChains];
      for (auto& row : acc)
        for (auto& sum : row[0]) sum = zero_f32();
      for (const int64_t end = std::min(c + group, k); c < end; c += kStep, at += kStep * kBlockRows) {
        ask_ahead(at);
        F32 w[kStep];
        table.load(at, w);
        for_each_place<kStep>([&](auto column) __attribute__((always_inline)) {
          constexpr int j = decltype(column)::value;
          for (int t = 0; t < kTokens; ++t)
            acc[t][0][j % kChains] = fma(w[j], set1_f32(x[j * kTokens + t]), acc[t][0][j % kChains]);
        });
        x += kStep * kTokens;
      }
      add_scaled(acc, block, g, sums);
    }
    for (auto& row : sums) row[0] = mul(row[0], set1_f32(Codes::kUnit));
  }
#endif

  // Without the unit, and without the scale where a row has one: `finish` multiplies with them.
  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    using namespace simd;
    const uint8_t* at = codes + block * stride + first * kBlockRows;
    const bool scaled = group < k;
    for (int64_t c = first; c < last;) {
      const int64_t g = c / group, end = std::min((g + 1) * group, last);
      F32 scale[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) scale[v] = scaled ? scales.of(block, g, v) : set1_f32(1.0f);
      for (; c < end; c += kStep, at += kStep * kBlockRows) {
        __builtin_prefetch(at + kAheadOfPanel);
        for_each_place<kStep / kFp8Columns>([&](auto place) {
          Fp8Values w;
          Codes::load(at + decltype(place)::value * kFp8Columns * kBlockRows, w);
          for (int i = 0; i < kFp8Columns; ++i, panel += kPanelRows)
            for (int v = 0; v < kBlockVectors; ++v) store_f32(panel + v * kLanes, mul(w[i][v], scale[v]));
        });
      }
    }
  }

#if defined(LOWBIT_BF16_DOTS)
  static constexpr bool kGroupScales = true;
  void soon(int64_t block, int64_t first, int64_t last, int64_t pieces, Soon (&from)[2]) const {
    from[0] = {codes + block * stride + first * kBlockRows, (last - first) * kBlockRows, pieces};
    if constexpr (std::is_same_v<Scales, E8m0Scales>)
      from[1] = {scales.codes + (block * scales.groups + first / group) * kBlockRows,
                 (last - first) / group * kBlockRows, pieces};
  }
  simd::F32 group_scale(int64_t block, int64_t g, int v) const { return scales.of(block, g, v); }

  // As `decode`, but without any scale.
  LOWBIT_BF16_DOTS void decode_pairs(int64_t block, int64_t first, int64_t last, uint32_t* panel) const {
    const Fp8Tables<Codes> table;
    const uint8_t* at = codes + block * stride + first * kBlockRows;
    for (int64_t c = first; c < last; c += kFp8Line, at += kFp8Line * kBlockRows, panel += 2 * kPanelRows) {
      __m512i pairs[2];
      table.load_pairs(at, pairs);
      for (int i = 0; i < 2; ++i) _mm512_store_si512(panel + i * kPanelRows, pairs[i]);
    }
  }

  // The same under one scale a row, the least one of these columns, where the others are near.
  LOWBIT_BF16_DOTS bool decode_joined(int64_t block, int64_t first, int64_t last, uint32_t* panel,
                                      float* row_scales) const {
    if constexpr (std::is_same_v<Scales, E8m0Scales>) {
      static_assert(Codes::kFinite, "an infinity would become NaN");
      __m128i least;
      if (!scales.near(block, first / group, (last + group - 1) / group, least)) return false;
      alignas(16) uint8_t least_codes[kBlockRows];
      _mm_store_si128(reinterpret_cast<__m128i*>(least_codes), least);
      simd::store_f32(row_scales, load_e8m0(least_codes));
      const Fp8Tables<Codes, true> table;
      const __m512i marks = _mm512_set1_epi16(1);
      const uint8_t* at = codes + block * stride + first * kBlockRows;
      for (int64_t c = first; c < last;) {
        const __m512i raise = scales.raise(block, c / group, least);
        for (const int64_t end = std::min((c / group + 1) * group, last); c < end; c += kFp8Line) {
          __m512i pairs[2];
          table.load_pairs(at, pairs);
          for (int i = 0; i < 2; ++i) {
            const __mmask32 numbers = _mm512_testn_epi16_mask(pairs[i], marks);
            _mm512_store_si512(panel + i * kPanelRows, _mm512_mask_add_epi16(pairs[i], numbers, pairs[i], raise));
          }
          at += kFp8Line * kBlockRows;
          panel += 2 * kPanelRows;
        }
      }
      return true;
    }
    return false;
  }
#endif

  simd::F32 finish(simd::F32 sum, int64_t block, int v) const {
    using namespace simd;
    // One after the other: a scale times the unit could overflow where the weight does not.
    sum = mul(sum, set1_f32(Codes::kUnit));
    return group < k ? sum : mul(sum, scales.of(block, 0, v));
  }

 private:
  // sums += what the columns of a group add up to, times its scale.
  template <int kTokens, int kChains>
  __attribute__((always_inline)) void add_scaled(const simd::F32 (&acc)[kTokens][kBlockVectors][kChains], int64_t block,
                                                 int64_t g, simd::F32 (&sums)[kTokens][kBlockVectors]) const {
    using namespace simd;
    for (int v = 0; v < kBlockVectors; ++v) {
      const F32 scale = scales.of(block, g, v);
      for (int t = 0; t < kTokens; ++t) {
        F32 dot = acc[t][v][0];
        for (int i = 1; i < kChains; ++i) dot = add(dot, acc[t][v][i]);
        sums[t][v] = fma(scale, dot, sums[t][v]);
      }
    }
  }
};

// Which way a call goes; the launcher knows from how many tokens on which is the faster one, and where there are pairs.
enum class Fp8Way : int { kRegisters = 0, kPanels = 1, kPairs = 2 };

template <class Weight>
void linear_by(Fp8Way way, const Weight& w, const Activations& x, const Output& out, int threads) {
  if (way == Fp8Way::kRegisters) return gemm_few<kFp8FewTokens>(w, x, out, threads);
#if defined(LOWBIT_BF16_DOTS)
  if (way == Fp8Way::kPairs) return gemm_pairs(w, x, out, threads);
#endif
  gemm_many(w, x, out, threads);
}

}  // namespace lowbit
