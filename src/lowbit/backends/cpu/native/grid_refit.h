// The best step (and zero) of a unit, columns that share one, with their levels l as they are: least squares in one or
// two unknowns, then what the format can store, where that is better.
//
// A change of the step by a and of the zero by b changes the error by a^2 l H l + 2 a b l H 1 + b^2 1 H 1 - 2 a l slope
// - 2 b 1 slope, with H between the columns of the unit and the slope that they have.
#pragma once

#include <cmath>

#include "grid_columns.h"

namespace lowbit {

// `count` columns of a unit from column `begin` on of a block.
struct Unit {
  int64_t begin, count, block;
};

// H [block, count] between the columns of a block and those of a unit, and its sums over the unit.
struct UnitHessian {
  Room room;
  const float *felt, *sums;  // [block, count], [block]
  float total = 0;           // of the sums within the unit

  UnitHessian(const Square& hessian, const Unit& unit) : room(unit.block * (unit.count + 1)) {
    float *made = room.data(), *made_sums = made + unit.block * unit.count;
    for (int64_t k = 0; k < unit.block; ++k) {
      made_sums[k] = 0;
      for (int64_t j = 0; j < unit.count; ++j) made_sums[k] += made[k * unit.count + j] = hessian(k, unit.begin + j);
    }
    for (int64_t j = unit.begin; j < unit.begin + unit.count; ++j) total += made_sums[j];
    felt = made, sums = made_sums;
  }
};

// A unit's step and zero (0 where it has none) for a piece of rows.
template <class P>
struct Stored {
  P step, zero;
};

// The terms of the error, and the step and zero that it is least at.
template <class P>
struct Refit {
  Stored<P> aim;
  P ss, sz, s, z;  // l H l, l H 1, l slope, 1 slope
};

// The levels of the unit's values, [count, P::kWidth]. Values lie `stride` apart.
template <bool kFloating, class P>
inline void find_levels(const ColumnGrid& grid, const P& divisor, const P& zero, const float* values, int64_t stride,
                        int64_t columns, int64_t count, float* levels) {
  using namespace simd;
  for (int64_t j = 0; j < columns; ++j) {
    P level = P::load(values + j * stride, count);
    for (auto& lanes : level.v) {
      const int v = static_cast<int>(&lanes - level.v);
      if (grid.zero) lanes = sub(lanes, zero.v[v]);
      lanes = nearest_level<kFloating>(div(lanes, divisor.v[v]), grid);
    }
    level.store(levels + j * P::kWidth);
  }
}

// slope: of the block, `stride` apart.
template <class P>
inline Refit<P> best_steps(const Unit& unit, const UnitHessian& hessian, const Stored<P>& now, bool zeros,
                           const float* levels, const float* slope, int64_t stride, int64_t count) {
  using namespace simd;
  constexpr int kVectors = P::kWidth / kLanes;
  Refit<P> made{now, {}, {}, {}, {}};
  for (P* term : {&made.ss, &made.sz, &made.s, &made.z})
    for (auto& lanes : term->v) lanes = zero_f32();
  for (int64_t k = unit.begin; k < unit.begin + unit.count; ++k) {
    P felt;
    for (auto& lanes : felt.v) lanes = zero_f32();
    add_products(felt, hessian.felt + k * unit.count, levels, 0, 1, unit.count);
    const P level = P::load(levels + (k - unit.begin) * P::kWidth), lean = P::load(slope + k * stride, count);
    const F32 one = set1_f32(hessian.sums[k]);
    for (int v = 0; v < kVectors; ++v) {
      made.ss.v[v] = fma(felt.v[v], level.v[v], made.ss.v[v]);
      made.sz.v[v] = fma(one, level.v[v], made.sz.v[v]);
      made.s.v[v] = fma(lean.v[v], level.v[v], made.s.v[v]);
      made.z.v[v] = add(made.z.v[v], lean.v[v]);
    }
  }
  const F32 nothing = zero_f32(), zz = set1_f32(hessian.total);
  for (int v = 0; v < kVectors; ++v) {
    const F32 ss = made.ss.v[v], sz = made.sz.v[v], s = made.s.v[v], z = made.z.v[v];
    F32 &step = made.aim.step.v[v], &zero = made.aim.zero.v[v];
    if (!zeros) {
      step = add(step, select(less(nothing, ss), div(s, ss), nothing));
      continue;
    }
    const F32 product = mul(ss, zz), determinant = sub(product, mul(sz, sz));
    const Mask solvable = less(mul(set1_f32(1e-6f), product), determinant);
    step = add(step, select(solvable, div(sub(mul(s, zz), mul(z, sz)), determinant), nothing));
    zero = add(zero, select(solvable, div(sub(mul(z, ss), mul(s, sz)), determinant), div(z, zz)));
  }
  return made;
}

// What can be stored, `offered`, where the error falls, else what there is.
template <class P>
inline Stored<P> better_steps(const Refit<P>& terms, const UnitHessian& hessian, const Stored<P>& now, bool zeros,
                              const Stored<P>& offered) {
  using namespace simd;
  const F32 nothing = zero_f32(), zz = set1_f32(hessian.total);
  Stored<P> made = now;
  for (int v = 0; v < P::kWidth / kLanes; ++v) {
    const F32 ss = terms.ss.v[v], sz = terms.sz.v[v], s = terms.s.v[v], z = terms.z.v[v];
    const F32 old = now.step.v[v], a = sub(offered.step.v[v], old);
    if (zeros) {
      const F32 b = sub(offered.zero.v[v], now.zero.v[v]);
      const F32 of_step = mul(a, sub(add(mul(a, ss), mul(add(b, b), sz)), add(s, s)));
      const Mask better = less(add(of_step, mul(b, sub(mul(b, zz), add(z, z)))), nothing);
      made.zero.v[v] = select(better, offered.zero.v[v], now.zero.v[v]);
      made.step.v[v] = select(better, offered.step.v[v], old);
    } else {
      const Mask better = less(mul(a, sub(mul(a, ss), add(s, s))), nothing), live = less(nothing, abs(old));
      made.step.v[v] = select(live, select(better, offered.step.v[v], old), old);
    }
  }
  return made;
}

// What is divided by to find levels: infinity for a step of 0.
template <class P>
inline P divisor_of(const P& step) {
  using namespace simd;
  P made;
  for (int v = 0; v < P::kWidth / kLanes; ++v)
    made.v[v] = select(less(zero_f32(), abs(step.v[v])), step.v[v], set1_f32(HUGE_VALF));
  return made;
}

// The slope of the block and the values of the unit after its step and zero went from `old` to `now`; both lie `stride`
// apart.
template <class P>
inline void take_steps(const Unit& unit, const UnitHessian& hessian, const Stored<P>& old, const Stored<P>& now,
                       bool zeros, const float* levels, float* slope, float* values, int64_t slope_stride,
                       int64_t stride, int64_t slope_count, int64_t count) {
  using namespace simd;
  constexpr int kVectors = P::kWidth / kLanes;
  for (int64_t k = 0; k < unit.block; ++k) {
    P lean = P::load(slope + k * slope_stride, slope_count), felt;
    for (auto& lanes : felt.v) lanes = zero_f32();
    add_products(felt, hessian.felt + k * unit.count, levels, 0, 1, unit.count);
    const F32 one = set1_f32(-hessian.sums[k]);
    for (int v = 0; v < kVectors; ++v) {
      if (zeros) lean.v[v] = fma(one, sub(now.zero.v[v], old.zero.v[v]), lean.v[v]);
      lean.v[v] = sub(lean.v[v], mul(felt.v[v], sub(now.step.v[v], old.step.v[v])));
    }
    lean.store(slope + k * slope_stride, slope_count);
  }
  for (int64_t j = 0; j < unit.count; ++j) {
    P value = P::load(levels + j * P::kWidth);
    for (int v = 0; v < kVectors; ++v) {
      value.v[v] = mul(now.step.v[v], value.v[v]);
      if (zeros) value.v[v] = add(value.v[v], now.zero.v[v]);
    }
    value.store(values + j * stride, count);
  }
}

}  // namespace lowbit
