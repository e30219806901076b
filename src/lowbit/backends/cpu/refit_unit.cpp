// refit_unit: the best step (and zero) of the columns that share one, with their levels as they are. In two halves,
// between which the format says what it can store.
#include <cmath>
#include <vector>

#include "native/bind.h"
#include "native/grid_columns.h"

namespace lowbit {
namespace {

// `count` columns of a unit from column `begin` on of a block; all [.., n].
struct Unit {
  int64_t begin, count, block, n;
};

// What the first half finds and the second needs, a row [n] each. With l the levels and H between the columns of the
// unit: 0: the step to aim at, 1: the zero, 2: l H l, 3: l H 1, 4: l slope, 5: 1 slope
constexpr int kTerms = 6;

// Sums of H over the unit, for each column of the block, and their sum within the unit.
struct RowSums {
  std::vector<float> of;
  float total = 0;

  RowSums(const Square& hessian, const Unit& unit) : of(static_cast<size_t>(unit.block), 0.0f) {
    for (int64_t k = 0; k < unit.block; ++k)
      for (int64_t j = 0; j < unit.count; ++j) of[static_cast<size_t>(k)] += hessian(k, unit.begin + j);
    for (int64_t j = unit.begin; j < unit.begin + unit.count; ++j) total += of[static_cast<size_t>(j)];
  }
};

// What the columns of the block feel of those of the unit: H between them, [block, count].
inline Room felt_of(const Square& hessian, const Unit& unit) {
  Room made(unit.block * unit.count);
  for (int64_t k = 0; k < unit.block; ++k)
    for (int64_t j = 0; j < unit.count; ++j) made.data()[k * unit.count + j] = hessian(k, unit.begin + j);
  return made;
}

// The levels of the unit's values, [count, kWidth].
template <bool kFloating>
void find_levels(const ColumnGrid& grid, const Unit& unit, const float* values, float* levels, int64_t row,
                 int64_t count) {
  using namespace simd;
  const Piece divisor = load_piece(grid.divisor + row, count);
  Piece zero = {};
  if (grid.zero) zero = load_piece(grid.zero + row, count);
  for (int64_t j = 0; j < unit.count; ++j) {
    Piece level = load_piece(values + j * unit.n + row, count);
    for (int v = 0; v < kWidthVectors; ++v) {
      if (grid.zero) level.v[v] = sub(level.v[v], zero.v[v]);
      level.v[v] = nearest_level<kFloating>(div(level.v[v], divisor.v[v]), grid);
    }
    store_piece(levels + j * kWidth, kWidth, level);
  }
}

// hessian: of `felt_of`.
template <bool kFloating>
void propose_piece(const ColumnGrid& grid, const Unit& unit, const float* hessian, const RowSums& sums,
                   const float* slope, const float* values, float* terms, int64_t row, int64_t count) {
  using namespace simd;
  const Room levels(unit.count * kWidth);
  find_levels<kFloating>(grid, unit, values, levels.data(), row, count);
  const Piece step = load_piece(grid.step + row, count);
  Piece zero = {};
  if (grid.zero) zero = load_piece(grid.zero + row, count);
  Piece ss = {}, sz = {}, s = {}, z = {};
  for (int64_t k = unit.begin; k < unit.begin + unit.count; ++k) {
    Piece felt = {};
    add_products(felt, hessian + k * unit.count, levels.data(), 0, 1, unit.count);
    const Piece level = load_piece(levels.data() + (k - unit.begin) * kWidth, kWidth);
    const Piece lean = load_piece(slope + k * unit.n + row, count);
    const F32 one = set1_f32(sums.of[static_cast<size_t>(k)]);
    for (int v = 0; v < kWidthVectors; ++v) {
      ss.v[v] = fma(felt.v[v], level.v[v], ss.v[v]);
      sz.v[v] = fma(one, level.v[v], sz.v[v]);
      s.v[v] = fma(lean.v[v], level.v[v], s.v[v]);
      z.v[v] = add(z.v[v], lean.v[v]);
    }
  }
  Piece wanted, wanted_zero = zero;
  const F32 nothing = zero_f32(), zz = set1_f32(sums.total);
  for (int v = 0; v < kWidthVectors; ++v) {
    if (!grid.zero) {
      wanted.v[v] = add(step.v[v], select(less(nothing, ss.v[v]), div(s.v[v], ss.v[v]), nothing));
      continue;
    }
    const F32 product = mul(ss.v[v], zz), determinant = sub(product, mul(sz.v[v], sz.v[v]));
    const Mask solvable = less(mul(set1_f32(1e-6f), product), determinant);
    const F32 move = div(sub(mul(s.v[v], zz), mul(z.v[v], sz.v[v])), determinant);
    const F32 move_zero = div(sub(mul(z.v[v], ss.v[v]), mul(s.v[v], sz.v[v])), determinant);
    wanted.v[v] = add(step.v[v], select(solvable, move, nothing));
    wanted_zero.v[v] = add(zero.v[v], select(solvable, move_zero, div(z.v[v], zz)));
  }
  const Piece* all[kTerms] = {&wanted, &wanted_zero, &ss, &sz, &s, &z};
  for (int i = 0; i < kTerms; ++i) store_piece(terms + i * unit.n + row, count, *all[i]);
}

struct Steps {
  float *step, *divisor, *zero;
  const float *stored, *stored_zero;
};

// Takes the stored step (and zero) where the error falls: writes steps, values and slope.
template <bool kFloating>
void apply_piece(const Steps& to, const ColumnGrid& grid, const Unit& unit, const float* hessian, const RowSums& sums,
                 float* slope, float* values, const float* terms, int64_t row, int64_t count) {
  using namespace simd;
  const Room levels(unit.count * kWidth);
  find_levels<kFloating>(grid, unit, values, levels.data(), row, count);
  Piece term[kTerms], zero = {}, moved_zero = {};
  for (int i = 2; i < kTerms; ++i) term[i] = load_piece(terms + i * unit.n + row, count);
  const Piece old = load_piece(to.step + row, count), stored = load_piece(to.stored + row, count);
  Piece step, divisor, moved;
  const F32 nothing = zero_f32(), zz = set1_f32(sums.total), infinity = set1_f32(HUGE_VALF);
  Piece stored_zero = {};
  if (to.zero) {
    zero = load_piece(to.zero + row, count);
    stored_zero = load_piece(to.stored_zero + row, count);
  }
  for (int v = 0; v < kWidthVectors; ++v) {
    const F32 ss = term[2].v[v], sz = term[3].v[v], s = term[4].v[v], z = term[5].v[v];
    const F32 a = sub(stored.v[v], old.v[v]), b = sub(stored_zero.v[v], zero.v[v]);
    if (to.zero) {
      const F32 of_step = mul(a, sub(add(mul(a, ss), mul(add(b, b), sz)), add(s, s)));
      const Mask better = less(add(of_step, mul(b, sub(mul(b, zz), add(z, z)))), nothing);
      const F32 chosen = select(better, stored_zero.v[v], zero.v[v]);
      moved_zero.v[v] = sub(chosen, zero.v[v]);
      zero.v[v] = chosen;
      step.v[v] = select(better, stored.v[v], old.v[v]);
    } else {
      const Mask better = less(mul(a, sub(mul(a, ss), add(s, s))), nothing), live = less(nothing, abs(old.v[v]));
      step.v[v] = select(live, select(better, stored.v[v], old.v[v]), old.v[v]);
    }
    moved.v[v] = sub(step.v[v], old.v[v]);
    divisor.v[v] = select(less(nothing, abs(step.v[v])), step.v[v], infinity);
  }
  store_piece(to.step + row, count, step);
  store_piece(to.divisor + row, count, divisor);
  if (to.zero) store_piece(to.zero + row, count, zero);
  for (int64_t k = 0; k < unit.block; ++k) {
    Piece lean = load_piece(slope + k * unit.n + row, count);
    Piece felt = {};
    add_products(felt, hessian + k * unit.count, levels.data(), 0, 1, unit.count);
    const F32 one = set1_f32(-sums.of[static_cast<size_t>(k)]);
    for (int v = 0; v < kWidthVectors; ++v) {
      if (to.zero) lean.v[v] = fma(one, moved_zero.v[v], lean.v[v]);
      lean.v[v] = sub(lean.v[v], mul(felt.v[v], moved.v[v]));
    }
    store_piece(slope + k * unit.n + row, count, lean);
  }
  for (int64_t j = 0; j < unit.count; ++j) {
    Piece value = load_piece(levels.data() + j * kWidth, kWidth);
    for (int v = 0; v < kWidthVectors; ++v) {
      value.v[v] = mul(step.v[v], value.v[v]);
      if (to.zero) value.v[v] = add(value.v[v], zero.v[v]);
    }
    store_piece(values + j * unit.n + row, count, value);
  }
}

}  // namespace

void refit_propose(Ptr<const float> step, Ptr<const float> divisor, Ptr<const float> zero, int64_t unit_columns,
                   bool floating, float low, float high, float smallest_normal, float magic, int64_t begin,
                   int64_t count, int64_t block, int64_t n, Ptr<const float> slope, Ptr<const float> inner,
                   int64_t down, int64_t across, Ptr<const float> values, Ptr<float> terms, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit_columns, floating, low, high, smallest_normal, magic};
  const Unit unit{begin, count, block, n};
  const RowSums sums({inner, down, across}, unit);
  const Room hessian = felt_of({inner, down, across}, unit);
  for_pieces(n, threads, [&](int64_t row, int64_t rows) {
    if (grid.floating) {
      propose_piece<true>(grid, unit, hessian.data(), sums, slope, values, terms, row, rows);
    } else {
      propose_piece<false>(grid, unit, hessian.data(), sums, slope, values, terms, row, rows);
    }
  });
}

void refit_apply(Ptr<float> step, Ptr<float> divisor, Ptr<float> zero, int64_t unit_columns, bool floating, float low,
                 float high, float smallest_normal, float magic, Ptr<const float> stored, Ptr<const float> stored_zero,
                 int64_t begin, int64_t count, int64_t block, int64_t n, Ptr<float> slope, Ptr<const float> inner,
                 int64_t down, int64_t across, Ptr<float> values, Ptr<const float> terms, int threads) {
  const Steps to{step, divisor, zero, stored, stored_zero};
  const ColumnGrid grid{to.step, to.divisor, to.zero, unit_columns, floating, low, high, smallest_normal, magic};
  const Unit unit{begin, count, block, n};
  const RowSums sums({inner, down, across}, unit);
  const Room hessian = felt_of({inner, down, across}, unit);
  for_pieces(n, threads, [&](int64_t row, int64_t rows) {
    if (grid.floating) {
      apply_piece<true>(to, grid, unit, hessian.data(), sums, slope, values, terms, row, rows);
    } else {
      apply_piece<false>(to, grid, unit, hessian.data(), sums, slope, values, terms, row, rows);
    }
  });
}

void bind_refit_unit(nb::module_& m) {
  m.def("refit_propose", &refit_propose, nb::call_guard<nb::gil_scoped_release>(), nb::arg("step"), nb::arg("divisor"),
        nb::arg("zero"), nb::arg("unit_columns"), nb::arg("floating"), nb::arg("low"), nb::arg("high"),
        nb::arg("smallest_normal"), nb::arg("magic"), nb::arg("begin"), nb::arg("count"), nb::arg("block"),
        nb::arg("n"), nb::arg("slope"), nb::arg("inner"), nb::arg("down"), nb::arg("across"), nb::arg("values"),
        nb::arg("terms"), nb::arg("threads"));
  m.def("refit_apply", &refit_apply, nb::call_guard<nb::gil_scoped_release>(), nb::arg("step"), nb::arg("divisor"),
        nb::arg("zero"), nb::arg("unit_columns"), nb::arg("floating"), nb::arg("low"), nb::arg("high"),
        nb::arg("smallest_normal"), nb::arg("magic"), nb::arg("stored"), nb::arg("stored_zero"), nb::arg("begin"),
        nb::arg("count"), nb::arg("block"), nb::arg("n"), nb::arg("slope"), nb::arg("inner"), nb::arg("down"),
        nb::arg("across"), nb::arg("values"), nb::arg("terms"), nb::arg("threads"));
}

}  // namespace lowbit
