// A weight of one-byte floating-point codes in the layout rows16, interleaved by single bytes:
//
//   codes    [blocks, stride] bytes: column c of row r of a block is byte 16 c + r, and what fills up
//   scales   one, one a row, one a tile, or a power of two for every 32 columns of a row
//
// Few tokens: codes become float32 in registers, and what all columns under one scale add up to is multiplied with it.
#pragma once

#include "e8m0.h"
#include "float_gemm.h"

namespace lowbit {

// float8_e4m3fn: values come out 2^8 too small.
struct E4M3 {
  static constexpr float kUnit = 256.0f;
  static void load16(const uint8_t* from, simd::F32 (&to)[kBlockVectors]) { simd::load16_e4m3(from, to); }
};

struct E5M2 {
  static constexpr float kUnit = 1.0f;
  static void load16(const uint8_t* from, simd::F32 (&to)[kBlockVectors]) { simd::load16_e5m2(from, to); }
};

// float32 scales of a tensor, of rows, or of tiles.
struct Fp8Scales {
  enum Kind : int { kTensor = 0, kRow = 1, kTile = 2 };
  const float* values;  // [], [blocks, 1, 16], [ceil(n / tile_rows), across]
  int kind;
  int64_t n, tile_rows, across;

  simd::F32 of(int64_t block, int64_t group, int v) const {
    using namespace simd;
    const int64_t row = block * kBlockRows + v * kLanes;
    if (kind == kTensor) return set1_f32(values[0]);
    if (kind == kRow) return load_f32(values + row);
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
};

constexpr int kFp8FewTokens = 6;  // 12 sums, 2 weights and a token in 16 registers

template <class Codes, class Scales>
struct Fp8Weight {
  static constexpr int kStep = 4;  // columns in one go: K and groups are multiples of it

  const uint8_t* codes;
  int64_t stride;
  Scales scales;
  int64_t n, k, group;  // group: columns under one scale, K where a row has one

  using Few = FloatRows;

  template <int kTokens>
  void multiply(int64_t block, const Few& few, int64_t token, simd::F32 (&sums)[kTokens][kBlockVectors]) const {
    using namespace simd;
    // Independent sums, so that one multiplication need not wait for the last.
    constexpr int kChains = std::min(kStep, std::max(1, 8 / (kTokens * kBlockVectors)));
    const uint8_t* at = codes + block * stride;
    const float* x = few.row(token);
    for (auto& row : sums)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t g = 0, c = 0; c < k; ++g) {
      F32 acc[kTokens][kBlockVectors][kChains];
      for (auto& row : acc)
        for (auto& lanes : row)
          for (auto& sum : lanes) sum = zero_f32();
      for (const int64_t end = std::min(c + group, k); c < end; c += kStep, at += kStep * kBlockRows) {
        if constexpr (kTokens <= 2) __builtin_prefetch(at + kAheadBytes);
        for_each_place<kStep>([&](auto place) {
          constexpr int j = decltype(place)::value;
          F32 w[kBlockVectors];
          Codes::load16(at + j * kBlockRows, w);
          for (int t = 0; t < kTokens; ++t) {
            const F32 token_x = set1_f32(x[t * k + c + j]);
            for (int v = 0; v < kBlockVectors; ++v) acc[t][v][j % kChains] = fma(w[v], token_x, acc[t][v][j % kChains]);
          }
        });
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 scale = scales.of(block, g, v);
        for (int t = 0; t < kTokens; ++t) {
          F32 dot = acc[t][v][0];
          for (int i = 1; i < kChains; ++i) dot = add(dot, acc[t][v][i]);
          sums[t][v] = fma(scale, dot, sums[t][v]);
        }
      }
    }
    for (auto& row : sums)
      for (auto& sum : row) sum = mul(sum, set1_f32(Codes::kUnit));
  }

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    using namespace simd;
    const uint8_t* at = codes + block * stride + first * kBlockRows;
    for (int64_t c = first; c < last;) {
      const int64_t g = c / group, end = std::min((g + 1) * group, last);
      F32 scale[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) scale[v] = scales.of(block, g, v);
      for (; c < end; ++c, at += kBlockRows, panel += kPanelRows) {
        F32 w[kBlockVectors];
        Codes::load16(at, w);
        // One after the other: a scale times the unit could overflow where the weight does not.
        for (int v = 0; v < kBlockVectors; ++v)
          store_f32(panel + v * kLanes, mul(mul(w[v], set1_f32(Codes::kUnit)), scale[v]));
      }
    }
  }
};

}  // namespace lowbit
