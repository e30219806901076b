// Rounding columns of weights to a grid, one column after the other.
//
// Tensors are transposed, [columns, n] for n rows of a weight, and lanes are rows: the rows of a weight know nothing of
// each other, so they are cut into pieces that stay in the first cache while all columns of a block go by.
#pragma once

#include <algorithm>

#include "float_gemm.h"

namespace lowbit {

constexpr int kWidth = 64;  // rows of a weight in a piece: 8 sums at once with 8 lanes, 16 KiB with 64 columns
constexpr int kWidthVectors = kWidth / simd::kLanes;

// value = zero + step * level. step, divisor (infinite where the step is zero), zero: [units, n]; zero may be null.
struct ColumnGrid {
  const float *step, *divisor, *zero;
  int64_t columns;  // of a unit
  bool floating;    // levels: floating-point values, or integers
  float low, high;
  float smallest_normal, magic;  // of floating-point levels: 2^min_exponent, and 1.5 * 2^23 / 2^mantissa
};

// kWidth values of one column.
struct Piece {
  simd::F32 v[kWidthVectors];
};

inline Piece load_piece(const float* from, int64_t count) {
  Piece made;
  if (count >= kWidth) {
    for (int i = 0; i < kWidthVectors; ++i) made.v[i] = simd::load_f32(from + i * simd::kLanes);
    return made;
  }
  alignas(64) float room[kWidth] = {};
  std::copy_n(from, count, room);
  for (int i = 0; i < kWidthVectors; ++i) made.v[i] = simd::load_f32(room + i * simd::kLanes);
  return made;
}

inline void store_piece(float* to, int64_t count, const Piece& piece) {
  if (count >= kWidth) {
    for (int i = 0; i < kWidthVectors; ++i) simd::store_f32(to + i * simd::kLanes, piece.v[i]);
    return;
  }
  alignas(64) float room[kWidth];
  for (int i = 0; i < kWidthVectors; ++i) simd::store_f32(room + i * simd::kLanes, piece.v[i]);
  std::copy_n(room, count, to);
}

// sum + factors[first] * rows[first] + factors[first + stride] * rows[first + stride] + ..., count of them, in this
// order. rows: [.., kWidth]
inline void add_products(Piece& sum, const float* factors, const float* rows, int64_t first, int64_t stride,
                         int64_t count) {
  Piece made = sum;
  for (int64_t i = 0, j = first; i < count; ++i, j += stride) {
    const simd::F32 factor = simd::set1_f32(factors[j]);
    for (int v = 0; v < kWidthVectors; ++v)
      made.v[v] = simd::fma(factor, simd::load_f32(rows + j * kWidth + v * simd::kLanes), made.v[v]);
  }
  sum = made;
}

// The nearest level, half to even. A number added and taken off again leaves the multiples of what its last bit is
// worth.
template <bool kFloating>
inline simd::F32 nearest_level(simd::F32 x, const ColumnGrid& grid) {
  using namespace simd;
  x = max(min(x, set1_f32(grid.high)), set1_f32(grid.low));
  F32 magic = set1_f32(0x1.8p23f);
  if constexpr (kFloating) {
    const F32 power = as_f32(bit_and(as_i32(x), set1_i32(0x7f800000)));
    magic = mul(max(power, set1_f32(grid.smallest_normal)), set1_f32(grid.magic));
  }
  return sub(add(x, magic), magic);
}

// The grid values nearest to x, for `count` rows of one column.
template <bool kFloating>
inline Piece nearest_values(const Piece& x, const ColumnGrid& grid, int64_t column, int64_t n, int64_t row,
                            int64_t count) {
  using namespace simd;
  const int64_t at = column / grid.columns * n + row;
  const Piece step = load_piece(grid.step + at, count), divisor = load_piece(grid.divisor + at, count);
  Piece made;
  if (grid.zero) {
    const Piece zero = load_piece(grid.zero + at, count);
    for (int v = 0; v < kWidthVectors; ++v) {
      const F32 level = nearest_level<kFloating>(div(sub(x.v[v], zero.v[v]), divisor.v[v]), grid);
      made.v[v] = add(mul(level, step.v[v]), zero.v[v]);
    }
    return made;
  }
  for (int v = 0; v < kWidthVectors; ++v)
    made.v[v] = mul(nearest_level<kFloating>(div(x.v[v], divisor.v[v]), grid), step.v[v]);
  return made;
}

// A matrix [count, count], with its strides.
struct Square {
  const float* at;
  int64_t down, across;

  float operator()(int64_t row, int64_t column) const { return at[row * down + column * across]; }

  // The elements, times `sign`, column by column.
  void by_columns(int64_t count, float sign, float* to) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < count; ++j) to[i * count + j] = sign * (*this)(j, i);
  }
};

// f(first row, rows) for all pieces of n rows, on threads.
template <class F>
inline void for_pieces(int64_t n, int threads, const F& f) {
  parallel_for((n + kWidth - 1) / kWidth, threads,
               [&](int64_t task) { f(task * kWidth, std::min<int64_t>(kWidth, n - task * kWidth)); });
}

}  // namespace lowbit
