// descent_columns: each column of a block moved to its best value with all others as they are.
#include "native/bind.h"
#include "native/grid_columns.h"

namespace lowbit {
namespace {

struct Block {
  int64_t first, count, n;
  float *slope, *values;
};

// A column's slope takes the moves of the columns before it when its turn comes, and the others in the end, in the
// order of the columns. felt: [count, count], in row k what column k feels of the moves of all, negative; inverse:
// 1 / H_kk.
template <bool kFloating>
void move_piece(const ColumnGrid& grid, const Block& block, const float* felt, const float* inverse, int64_t row,
                int64_t count) {
  const Room room(2 * block.count * Wide::kWidth);
  float *moved = room.data(), *slopes = moved + block.count * Wide::kWidth;
  for (int64_t k = 0; k < block.count; ++k) {
    const int64_t at = k * block.n + row;
    Wide slope = Wide::load(block.slope + at, count), old = Wide::load(block.values + at, count), wanted;
    add_products(slope, felt + k * block.count, moved, 0, 1, k);
    const simd::F32 scale = simd::set1_f32(inverse[k]);
    for (int v = 0; v < kWideVectors; ++v) wanted.v[v] = simd::fma(slope.v[v], scale, old.v[v]);
    const Wide value = nearest_values<kFloating>(wanted, grid, block.first + k, block.n, row, count);
    for (int v = 0; v < kWideVectors; ++v) old.v[v] = simd::sub(value.v[v], old.v[v]);
    value.store(block.values + at, count);
    old.store(moved + k * Wide::kWidth);
    slope.store(slopes + k * Wide::kWidth);
  }
  for (int64_t k = 0; k < block.count; ++k) {
    Wide slope = Wide::load(slopes + k * Wide::kWidth);
    add_products(slope, felt + k * block.count, moved, k, 1, block.count - k);
    slope.store(block.slope + k * block.n + row, count);
  }
}

}  // namespace

void descent_columns(Ptr<const float> step, Ptr<const float> divisor, Ptr<const float> zero, int64_t unit,
                     bool floating, float low, float high, float smallest_normal, float magic, int64_t first,
                     int64_t count, int64_t n, Ptr<float> slope, Ptr<const float> inner, int64_t down, int64_t across,
                     Ptr<float> values, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit, floating, low, high, smallest_normal, magic};
  const Block block{first, count, n, slope, values};
  const Room felt(count * count), inverse(count);
  const Square hessian{inner, down, across};
  hessian.by_columns(count, -1.0f, felt.data());
  for (int64_t k = 0; k < count; ++k) inverse.data()[k] = 1.0f / hessian(k, k);
  for_pieces<Wide>(n, threads, [&](int64_t row, int64_t rows) {
    if (grid.floating) {
      move_piece<true>(grid, block, felt.data(), inverse.data(), row, rows);
    } else {
      move_piece<false>(grid, block, felt.data(), inverse.data(), row, rows);
    }
  });
}

void bind_descent_columns(nb::module_& m) {
  m.def("descent_columns", &descent_columns, nb::call_guard<nb::gil_scoped_release>(), nb::arg("step"),
        nb::arg("divisor"), nb::arg("zero"), nb::arg("unit"), nb::arg("floating"), nb::arg("low"), nb::arg("high"),
        nb::arg("smallest_normal"), nb::arg("magic"), nb::arg("first"), nb::arg("count"), nb::arg("n"),
        nb::arg("slope"), nb::arg("inner"), nb::arg("down"), nb::arg("across"), nb::arg("values"), nb::arg("threads"));
}

}  // namespace lowbit
