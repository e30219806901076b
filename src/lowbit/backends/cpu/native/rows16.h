// The layout "rows16": rows in blocks of 16, their 32-bit words interleaved.
//
//   plain [N, W] words          here [ceil(N / 16), W, 16] words        (W words of codes a row; rows of zeros fill up)
//   plain [N, G] or [G, N]      here [ceil(N / 16), G, 16]              (scales, offsets)
//
// One load takes the same word of as many rows as a vector has lanes, so that lanes are rows everywhere: a scale is a
// vector, a sum over columns needs no horizontal addition, and a block is read from its begin to its end.
#pragma once

#include <algorithm>

#include "simd.h"

namespace lowbit {

constexpr int kBlockRows = 16;
constexpr int kBlockVectors = kBlockRows / simd::kLanes;
static_assert(kBlockRows % simd::kLanes == 0, "a block is whole vectors");

// One output row of a block: 16 sums of token m, or as many as the weight has rows left, with the bias added.
inline void store_block(const simd::F32 (&sums)[kBlockVectors], int64_t block, int64_t n, const void* bias,
                        int bias_dtype, void* out, int64_t m, int out_dtype) {
  using namespace simd;
  for (int v = 0; v < kBlockVectors; ++v) {
    const int64_t row = block * kBlockRows + v * kLanes;
    const int64_t left = n - row;
    if (left >= kLanes) {
      const F32 sum = bias ? add(sums[v], load_as_f32(bias, row, bias_dtype)) : sums[v];
      store_from_f32(out, m * n + row, sum, out_dtype);
    } else if (left > 0) {
      const int count = static_cast<int>(left);
      const F32 sum = bias ? add(sums[v], load_first(bias, row, count, bias_dtype)) : sums[v];
      store_first(out, m * n + row, count, sum, out_dtype);
    }
  }
}

// Where `store_block` will write: asked for before a product begins, the lines are there when it ends. Every row of
// the result lies on another page, and a store alone would wait for the page and for the line.
inline void expect_block(int64_t block, int64_t n, const void* out, int64_t m, int out_dtype) {
  const int64_t at = m * n + block * kBlockRows;
  __builtin_prefetch(static_cast<const unsigned char*>(out) + at * element_size(out_dtype), 1);
}

// What a product asks for while it has time: words that come next, from memory to the second-level cache.
struct Ahead {
  const unsigned char* at;
  int64_t step;  // bytes, for every word of the product

  // The share of tile `index` of `tiles` that pass: of `blocks` blocks from `words` on, each of `size` words of 16
  // rows.
  static Ahead share(const uint32_t* words, int64_t blocks, int64_t size, int64_t index, int64_t tiles) {
    const int64_t step = std::max<int64_t>(1, blocks * kBlockRows * 4 / tiles);
    return {reinterpret_cast<const unsigned char*>(words) + index * step * size, step};
  }
  void ask() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

}  // namespace lowbit
