// refit_unit: the best step (and zero) of the columns that share one, with their levels as they are. In two halves,
// between which the format says what it can store.
#include "native/bind.h"
#include "native/grid_refit.h"

namespace lowbit {
namespace {

// What the first half finds and the second needs, a row [n] each: the step and the zero to aim at, then the terms of
// `Refit`.
constexpr int kTerms = 6;

// A unit of n rows: rows of slope and values are n apart.
struct Rows {
  const ColumnGrid& grid;
  const Unit& unit;
  const UnitHessian& hessian;
  int64_t n;

  // Of rows `row` on, `count` of them.
  Stored<Wide> steps(const float* step, const float* zero, int64_t row, int64_t count) const {
    Stored<Wide> made{Wide::load(step + row, count), {}};
    for (auto& lanes : made.zero.v) lanes = simd::zero_f32();
    if (grid.zero) made.zero = Wide::load(zero + row, count);
    return made;
  }
  void levels(const Stored<Wide>& now, const float* values, int64_t row, int64_t count, float* to) const {
    const Wide divisor = Wide::load(grid.divisor + row, count);
    const auto find = grid.floating ? find_levels<true, Wide> : find_levels<false, Wide>;
    find(grid, divisor, now.zero, values + row, n, unit.count, count, to);
  }
};

}  // namespace

void refit_propose(Ptr<const float> step, Ptr<const float> divisor, Ptr<const float> zero, int64_t unit_columns,
                   bool floating, float low, float high, float smallest_normal, float magic, int64_t begin,
                   int64_t count, int64_t block, int64_t n, Ptr<const float> slope, Ptr<const float> inner,
                   int64_t down, int64_t across, Ptr<const float> values, Ptr<float> terms, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit_columns, floating, low, high, smallest_normal, magic};
  const Unit unit{begin, count, block};
  const UnitHessian hessian({inner, down, across}, unit);
  const Rows of{grid, unit, hessian, n};
  for_pieces<Wide>(n, threads, [&](int64_t row, int64_t rows) {
    const Room levels(count * Wide::kWidth);
    const Stored<Wide> now = of.steps(grid.step, grid.zero, row, rows);
    of.levels(now, values, row, rows, levels.data());
    const Refit<Wide> found = best_steps(unit, hessian, now, grid.zero != nullptr, levels.data(), slope + row, n, rows);
    const Wide* all[kTerms] = {&found.aim.step, &found.aim.zero, &found.ss, &found.sz, &found.s, &found.z};
    for (int i = 0; i < kTerms; ++i) all[i]->store(terms + i * n + row, rows);
  });
}

// Takes the stored step (and zero) where the error falls: writes steps, values and slope.
void refit_apply(Ptr<float> step, Ptr<float> divisor, Ptr<float> zero, int64_t unit_columns, bool floating, float low,
                 float high, float smallest_normal, float magic, Ptr<const float> stored, Ptr<const float> stored_zero,
                 int64_t begin, int64_t count, int64_t block, int64_t n, Ptr<float> slope, Ptr<const float> inner,
                 int64_t down, int64_t across, Ptr<float> values, Ptr<const float> terms, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit_columns, floating, low, high, smallest_normal, magic};
  const Unit unit{begin, count, block};
  const UnitHessian hessian({inner, down, across}, unit);
  const Rows of{grid, unit, hessian, n};
  const bool zeros = grid.zero != nullptr;
  for_pieces<Wide>(n, threads, [&](int64_t row, int64_t rows) {
    const Room levels(count * Wide::kWidth);
    const Stored<Wide> old = of.steps(grid.step, grid.zero, row, rows);
    of.levels(old, values, row, rows, levels.data());
    const auto term = [&](int i) { return Wide::load(terms + i * n + row, rows); };
    const Refit<Wide> found{old, term(2), term(3), term(4), term(5)};
    const Stored<Wide> now = better_steps(found, hessian, old, zeros, of.steps(stored, stored_zero, row, rows));
    now.step.store(step + row, rows);
    divisor_of(now.step).store(divisor + row, rows);
    if (zeros) now.zero.store(zero + row, rows);
    take_steps(unit, hessian, old, now, zeros, levels.data(), slope + row, values + row, n, n, rows, rows);
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
