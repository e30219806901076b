// Rounding columns of weights to a grid, one column after the other.
//
// Tensors are transposed, [columns, n] for n rows of a weight, and lanes are rows: the rows of a weight know nothing of
// each other, so they are cut into pieces that stay in the first cache while all columns of a block go by.
// Where a block of columns is all that a call sees, pieces are wide, for sums in a row do not wait for each other then;
// where it sees all columns (thin), for they then stay in the second cache and sums of several columns go side by side.
#pragma once

#include <algorithm>

#include "float_gemm.h"

namespace lowbit {

constexpr int kWideVectors = 64 / simd::kLanes;  // 64 rows: 8 sums at once with 8 lanes, 16 KiB with 64 columns
constexpr int kThinVectors = 2;
#if defined(LOWBIT_ISA_AVX512)
constexpr int kColumnsAtOnce = 12;  // 24 sums in 32 registers
#else
constexpr int kColumnsAtOnce = 6;  // 12 sums in the 16 registers that every other set has
#endif

// value = zero + step * level. step, divisor (infinite where the step is zero), zero: [units, n]; zero may be null.
struct ColumnGrid {
  const float *step, *divisor, *zero;
  int64_t columns;  // of a unit
  bool floating;    // levels: floating-point values, or integers
  float low, high;
  float smallest_normal, magic;  // of floating-point levels: 2^min_exponent, and 1.5 * 2^23 / 2^mantissa
};

// Values of one column, for a piece of rows.
template <int kVectors>
struct Piece {
  static constexpr int kWidth = kVectors * simd::kLanes;
  simd::F32 v[kVectors];

  // Of `count` rows, zeros behind them.
  static Piece load(const float* from, int64_t count = kWidth) {
    alignas(64) float room[kWidth];
    if (count < kWidth) {
      std::fill(std::copy_n(from, count, room), room + kWidth, 0.0f);
      from = room;
    }
    Piece made;
    for (int i = 0; i < kVectors; ++i) made.v[i] = simd::load_f32(from + i * simd::kLanes);
    return made;
  }
  void store(float* to, int64_t count = kWidth) const {
    alignas(64) float room[kWidth];
    float* at = count < kWidth ? room : to;
    for (int i = 0; i < kVectors; ++i) simd::store_f32(at + i * simd::kLanes, v[i]);
    if (count < kWidth) std::copy_n(room, count, to);
  }
};
using Wide = Piece<kWideVectors>;
using Thin = Piece<kThinVectors>;

// sum + factors[first] * rows[first] + factors[first + stride] * rows[first + stride] + ..., count of them, in this
// order. rows: [.., kWidth]
template <int kVectors>
inline void add_products(Piece<kVectors>& sum, const float* factors, const float* rows, int64_t first, int64_t stride,
                         int64_t count) {
  Piece<kVectors> made = sum;
  for (int64_t i = 0, j = first; i < count; ++i, j += stride) {
    const simd::F32 factor = simd::set1_f32(factors[j]);
    for (int v = 0; v < kVectors; ++v)
      made.v[v] = simd::fma(factor, simd::load_f32(rows + j * sum.kWidth + v * simd::kLanes), made.v[v]);
  }
  sum = made;
}

// The same for kCount sums side by side, in the order of the rows [count, kWidth]: the factor of sum i and row j lies
// at factors[i * down + j * across].
template <int kCount, int kVectors>
inline void add_many_products(Piece<kVectors> (&sums)[kCount], const float* factors, int64_t down, int64_t across,
                              const float* rows, int64_t count) {
  Piece<kVectors> made[kCount];
  for (int i = 0; i < kCount; ++i) made[i] = sums[i];
  for (int64_t j = 0; j < count; ++j, factors += across, rows += sums[0].kWidth) {
    simd::F32 row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = simd::load_f32(rows + v * simd::kLanes);
    for (int i = 0; i < kCount; ++i) {
      const simd::F32 factor = simd::set1_f32(factors[i * down]);
      for (int v = 0; v < kVectors; ++v) made[i].v[v] = simd::fma(factor, row[v], made[i].v[v]);
    }
  }
  for (int i = 0; i < kCount; ++i) sums[i] = made[i];
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
template <bool kFloating, int kVectors>
inline Piece<kVectors> nearest_values(const Piece<kVectors>& x, const ColumnGrid& grid, int64_t column, int64_t n,
                                      int64_t row, int64_t count) {
  using namespace simd;
  using P = Piece<kVectors>;
  const int64_t at = column / grid.columns * n + row;
  const P step = P::load(grid.step + at, count), divisor = P::load(grid.divisor + at, count);
  P made;
  if (grid.zero) {
    const P zero = P::load(grid.zero + at, count);
    for (int v = 0; v < kVectors; ++v) {
      const F32 level = nearest_level<kFloating>(div(sub(x.v[v], zero.v[v]), divisor.v[v]), grid);
      made.v[v] = add(mul(level, step.v[v]), zero.v[v]);
    }
    return made;
  }
  for (int v = 0; v < kVectors; ++v)
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
template <class P, class F>
inline void for_pieces(int64_t n, int threads, const F& f) {
  parallel_for((n + P::kWidth - 1) / P::kWidth, threads,
               [&](int64_t task) { f(task * P::kWidth, std::min<int64_t>(P::kWidth, n - task * P::kWidth)); });
}

}  // namespace lowbit
