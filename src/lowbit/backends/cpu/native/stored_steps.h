// The nearest steps and zeros that a format can store, as formats/stored_steps.py gives them.
#pragma once

#include "grid_refit.h"

namespace lowbit {

enum class Steps : int { kFloats = 0, kE4m3 = 1, kPowers = 2 };

struct StoredSteps {
  Steps kind;
  int dtype, zero_dtype;  // kFloats
  float least, most;      // of the step; with_sign, which allows negative ones: `least` of its magnitude alone
  bool with_sign;
  const float* common;  // kE4m3: what steps are counted by, [n] or one
  bool common_by_row, common_divides;

  template <class P>
  Stored<P> nearest(const Stored<P>& wanted, bool zeros, int64_t row, int64_t count) const {
    Stored<P> made = wanted;
    const P by = kind == Steps::kE4m3 ? common_of<P>(row, count) : P{};
    for (int v = 0; v < P::kWidth / simd::kLanes; ++v) {
      const simd::F32 step = wanted.step.v[v];
      made.step.v[v] = kind == Steps::kFloats ? as_stored(limited(step), dtype)
                       : kind == Steps::kE4m3 ? as_e4m3(step, by.v[v])
                                              : as_power(limited(step));
      if (zeros) made.zero.v[v] = as_stored(wanted.zero.v[v], zero_dtype);
    }
    return made;
  }

 private:
  simd::F32 limited(simd::F32 step) const {
    using namespace simd;
    const F32 smallest = set1_f32(least);
    if (with_sign) return select(less(abs(step), smallest), smallest, step);
    return min(max(step, smallest), set1_f32(most));
  }

  static simd::F32 as_stored(simd::F32 x, int dtype) {
    if (dtype == kFloat32) return x;
    uint16_t halves[simd::kLanes];
    simd::store_from_f32(halves, 0, x, dtype);
    return simd::load_as_f32(halves, 0, dtype);
  }

  template <class P>
  P common_of(int64_t row, int64_t count) const {
    if (common_by_row) return P::load(common + row, count);
    P made;
    for (auto& lanes : made.v) lanes = simd::set1_f32(*common);
    return made;
  }

  simd::F32 as_e4m3(simd::F32 step, simd::F32 by) const {
    using namespace simd;
    const ColumnGrid levels{nullptr, nullptr, nullptr, 0, true, least, most, 0x1p-6f, 0x1.8p20f};
    const F32 level = nearest_level<true>(common_divides ? mul(step, by) : div(step, by), levels);
    return common_divides ? div(level, by) : mul(level, by);
  }

  static simd::F32 as_power(simd::F32 step) {  // at least 2^-126
    using namespace simd;
    const F32 below = as_f32(bit_and(as_i32(step), set1_i32(0x7f800000)));
    return select(less(mul(below, set1_f32(1.5f)), step), add(below, below), below);
  }
};

}  // namespace lowbit
