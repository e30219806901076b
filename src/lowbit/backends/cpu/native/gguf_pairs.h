// Products of the blocks of GGUF files with activations as int16, where a set multiplies pairs of int16.
//
// Codes become int16, in pairs of columns: measured on AVX2, that is faster than panels of float32 for few tokens as
// for 64.
#pragma once

#include "gguf_blocks.h"
#include "int4_gemm.h"

namespace lowbit {
namespace gguf {

using PairTokens = IntegerTokens<2, 4>;

// Some blocks of 16 rows as the integers that tokens are multiplied with, made once for all of them.
template <class T>
struct Integers {
  static constexpr int kBlocks = std::max(1, 128 / T::kColumns);
  static constexpr int kUnits = T::kColumns / T::kUnit, kQuads = T::kColumns / 4;  // of a block
  static constexpr bool kAdds = T::kZero || T::kOffset != 0;
  // Of columns 4 q and 4 q + 2, then 4 q + 1 and 4 q + 3.
  alignas(64) int32_t pairs[kBlocks * kQuads * 2 * kBlockRows];
  alignas(64) float steps[kBlocks * kUnits * kBlockRows];
  // To a unit's sum, times that of its activations.
  alignas(64) float added[kAdds ? kBlocks * kUnits * kBlockRows : kBlockRows];

  template <class W>
  void put(int block, const W& words) {
    const int first = block * kUnits;
    for (int v = 0; v < kBlockVectors; ++v) {
      F32 step[kUnits], zero[kUnits];
      T::steps(words, v, step, zero);
      for (int u = 0; u < kUnits; ++u) {
        store_f32(steps + (first + u) * kBlockRows + v * kLanes, step[u]);
        if constexpr (T::kZero) store_f32(added + (first + u) * kBlockRows + v * kLanes, zero[u]);
        if constexpr (T::kOffset != 0)
          store_f32(added + (first + u) * kBlockRows + v * kLanes, mul(step[u], set1_f32(-T::kOffset)));
      }
    }
    for (int v = 0; v < kBlockVectors; ++v)
      for (int span = 0; span < T::kColumns / T::kSpan; ++span)
        for_each_place<T::kSpan / 4>([&](auto place) {
          constexpr int q = decltype(place)::value;
          const Bytes codes = T::template codes<q>(words, span, v);
          int32_t* to = pairs + (block * kQuads + span * (T::kSpan / 4) + q) * 2 * kBlockRows + v * kLanes;
          store_i32(to, T::kSigned ? even_bytes(codes) : bit_and(as_i32(codes), set1_i32(0x00ff00ff)));
          store_i32(to + kBlockRows, odd_bytes(codes));
        });
  }
};

// sums[t][row] += the products of the units of a block with kTokens tokens: x is where their integers of the block's
// first column lie, d and x_sums have a value a unit.
template <int kUnit, bool kAdds, int kTokens>
__attribute__((noinline)) void multiply_units(int units, const int32_t* pairs, const float* steps, const float* added,
                                              const int8_t* const (&x)[kTokens], const float* d, const float* x_sums,
                                              int64_t groups, float* sums) {
  F32 acc[kTokens][kBlockVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kBlockVectors; ++v) acc[t][v] = load_f32(sums + t * kBlockRows + v * kLanes);
  for (int unit = 0; unit < units; ++unit) {
    I32 dots[kTokens][kBlockVectors];
    for (auto& row : dots)
      for (auto& dot : row) dot = zero_i32();
    for_each_place<kUnit / 2>([&](auto place) __attribute__((always_inline)) {
      const int pair = unit * (kUnit / 2) + decltype(place)::value;
      I32 w[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) w[v] = load_i32(pairs + pair * kBlockRows + v * kLanes);
      for (int t = 0; t < kTokens; ++t) {
        int32_t two;
        std::memcpy(&two, x[t] + pair * 4, 4);
        for (int v = 0; v < kBlockVectors; ++v) dots[t][v] = dot2(dots[t][v], w[v], set1_i32(two));
      }
    });
    for (int v = 0; v < kBlockVectors; ++v) {
      const F32 step = load_f32(steps + unit * kBlockRows + v * kLanes);
      for (int t = 0; t < kTokens; ++t) {
        acc[t][v] = fma(to_f32(dots[t][v]), mul(step, set1_f32(d[t * groups + unit])), acc[t][v]);
        if constexpr (kAdds)
          acc[t][v] =
              fma(load_f32(added + unit * kBlockRows + v * kLanes), set1_f32(x_sums[t * groups + unit]), acc[t][v]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kBlockVectors; ++v) store_f32(sums + t * kBlockRows + v * kLanes, acc[t][v]);
}

// The same of some blocks that begin at `column`, with tokens [token, token + tokens).
template <class T, int kMost>
inline void multiply_blocks(int count, int tokens, const Integers<T>& blocks, const PairTokens& x, int64_t token,
                            int64_t column, float* sums) {
  if constexpr (kMost > 0) {
    if (tokens < kMost) return multiply_blocks<T, kMost - 1>(count, tokens, blocks, x, token, column, sums);
    const int8_t* rows[kMost];
    for (int t = 0; t < kMost; ++t) rows[t] = x.row(token + t) + column / 4 * PairTokens::kWordBytes;
    const int64_t first = token * x.groups + column / T::kUnit;
    multiply_units<T::kUnit, Integers<T>::kAdds, kMost>(count * Integers<T>::kUnits, blocks.pairs, blocks.steps,
                                                        blocks.added, rows, x.d + first, x.sums + first, x.groups,
                                                        sums);
  }
}

// A weight (PlainBlocks or PackedBlocks) all of whose values are times a factor.
template <class T, class Blocks>
void pairs_gemm(const Blocks& w, float factor, const PairTokens& x, int64_t m, const Output& out, int threads) {
  constexpr int kMost = kInt4Tokens<2>;
  // Blocks that are read before the first is used: what was just stored in halves cannot be loaded whole.
  constexpr int kTogether = Integers<T>::kBlocks;
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows, chunks = (m + kInt4ChunkTokens - 1) / kInt4ChunkTokens;
  parallel_for(blocks * chunks, threads, [&](int64_t task) {
    const int64_t block = task % blocks, first_token = m * (task / blocks) / chunks;
    const int64_t tokens = m * (task / blocks + 1) / chunks - first_token;
    const int64_t tiles = (tokens + kMost - 1) / kMost;  // of nearly equal size: 5 tokens are 3 + 2, not 4 + 1
    const auto strip = w.strip(block);
    Room sums_room(tokens * kBlockRows);
    float* sums = sums_room.data();
    std::fill_n(sums, tokens * kBlockRows, 0.0f);
    for (int64_t first = 0; first < w.k; first += kTogether * T::kColumns) {
      const int64_t begin = first / T::kColumns;
      const int count = static_cast<int>(std::min<int64_t>(kTogether, w.k / T::kColumns - begin));
      strip.template ask<kTogether>(begin);
      typename Blocks::Words words[kTogether];
      for (int i = 0; i < count; ++i) strip.read(begin + i, words[i]);
      Integers<T> integers;
      for (int i = 0; i < count; ++i) integers.put(i, words[i]);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t token = tokens * tile / tiles, end = tokens * (tile + 1) / tiles;
        multiply_blocks<T, kMost>(count, static_cast<int>(end - token), integers, x, first_token + token, first,
                                  sums + token * kBlockRows);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v)
        row[v] = mul(load_f32(sums + t * kBlockRows + v * kLanes), set1_f32(factor));
      store_block(row, block, w.n, out.bias, out.bias_dtype, out.data, first_token + t, out.dtype);
    }
  });
}

}  // namespace gguf
}  // namespace lowbit
