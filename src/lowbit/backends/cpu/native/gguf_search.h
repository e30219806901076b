// The search for the scales of K-quants (numerics/gguf_k_encode.py and gguf_units.py tell what and why), with blocks as
// lanes: no block is in more than one, so none depends on another, and no sum goes across a vector.
//
// What is compared and chosen is the reference's. Sums are taken column by column and products are added in one
// rounding, so that what lies within float32's error of another choice may be chosen here.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "float_gemm.h"

namespace lowbit {
namespace gguf {

using namespace simd;

constexpr int kSearchColumns = 256, kMostUnits = 16;
constexpr float kLeastWeight = 1e-6f;  // of the largest of a block

// What is tried for a type: `Effort` and `Shared` there, and the levels of its codes.
struct Search {
  const float* tries;
  int64_t try_count, passes;
  const float* factors;
  int64_t factor_count, rounds;
  bool both_signs;
  int unit;           // columns
  float low, high;    // levels
  float first, last;  // multiples; with zeros, those are from 0 to `last`

  bool zeros() const { return first == 0.0f; }
  int units() const { return kSearchColumns / unit; }
};

// The scales of as many blocks as there are lanes.
struct Scales {
  F32 factor, zero_factor;
  F32 scales[kMostUnits], minima[kMostUnits];

  F32 step(int unit) const { return mul(factor, scales[unit]); }
  F32 zero(int unit) const { return sub(zero_f32(), mul(zero_factor, minima[unit])); }
};

// Weights of columns as each block of `columns` takes them: relative to the largest among them, and none so small that
// its column may become anything.
inline std::vector<float> relative(const float* weights, int64_t k, int64_t columns) {
  std::vector<float> made(weights, weights + k);
  for (int64_t first = 0; first < k; first += columns) {
    const auto begin = made.begin() + first, end = begin + columns;
    const float inverse = 1.0f / *std::max_element(begin, end), by = std::isinf(inverse) ? 0.0f : inverse;
    for (auto at = begin; at != end; ++at) *at = std::max(*at * by, kLeastWeight);
  }
  return made;
}

// 1 / x, and 0 where there is none.
inline F32 inverse_or_zero(F32 x) {
  const F32 found = div(set1_f32(1.0f), x);
  return select(less(abs(found), set1_f32(std::numeric_limits<float>::infinity())), found, zero_f32());
}

inline F32 clamped(F32 x, float low, float high) { return max(min(x, set1_f32(high)), set1_f32(low)); }

// The nearest whole number between two others, half to even.
inline F32 nearest_whole(F32 x, float low, float high) {
  const F32 magic = set1_f32(0x1.8p23f);
  return sub(add(clamped(x, low, high), magic), magic);
}

inline F32 nearest_half(F32 x) {
  alignas(64) uint16_t halves[kLanes];
  store_f16(halves, clamped(x, -65504.0f, 65504.0f));
  return load_f16(halves);
}

// Columns of a unit: `x` and `weights` have a vector for each. All sums are weighted.
template <bool kWeighted>
struct Unit {
  const float* x;
  const float* weights;
  int count;
  float low, high;

  struct Sums {
    F32 one, q, qq, x, qx;
  };

  F32 value(int column) const { return load_f32(x + column * kLanes); }
  F32 weighted(F32 value, int column) const {
    return kWeighted ? mul(value, load_f32(weights + column * kLanes)) : value;
  }
  F32 rounded(F32 value, F32 zero, F32 inverse) const {
    return nearest_whole(mul(sub(value, zero), inverse), low, high);
  }

  // Under a step and a zero.
  Sums sums(F32 step, F32 zero) const {
    const F32 inverse = inverse_or_zero(step);
    Sums found{zero_f32(), zero_f32(), zero_f32(), zero_f32(), zero_f32()};
    for (int c = 0; c < count; ++c) {
      const F32 at = value(c), q = rounded(at, zero, inverse), heavy = weighted(q, c);
      found.one = add(found.one, weighted(set1_f32(1.0f), c));
      found.q = add(found.q, heavy);
      found.qq = fma(heavy, q, found.qq);
      found.x = add(found.x, weighted(at, c));
      found.qx = fma(heavy, at, found.qx);
    }
    return found;
  }

  F32 error(F32 step, F32 zero) const {
    const F32 inverse = inverse_or_zero(step);
    F32 sum = zero_f32();
    for (int c = 0; c < count; ++c) {
      const F32 at = value(c), missed = sub(fma(rounded(at, zero, inverse), step, zero), at);
      sum = fma(weighted(missed, c), missed, sum);
    }
    return sum;
  }

  F32 whole() const {
    F32 sum = zero_f32();
    for (int c = 0; c < count; ++c) sum = fma(weighted(value(c), c), value(c), sum);
    return sum;
  }

  F32 search_step(const Search& how) const {
    F32 extreme = zero_f32(), largest = set1_f32(-1.0f);
    for (int c = 0; c < count; ++c) {
      const Mask larger = less(largest, abs(value(c)));
      extreme = select(larger, value(c), extreme);
      largest = select(larger, abs(value(c)), largest);
    }
    F32 best = zero_f32(), gained = set1_f32(-1.0f);
    const auto take = [&](F32 step) {
      const F32 inverse = inverse_or_zero(step);
      F32 curve = zero_f32(), lean = zero_f32();
      for (int c = 0; c < count; ++c) {
        const F32 at = value(c), q = rounded(at, zero_f32(), inverse), heavy = weighted(q, c);
        curve = fma(heavy, q, curve);
        lean = fma(heavy, at, lean);
      }
      const F32 fitted = mul(lean, inverse_or_zero(curve)), gain = mul(fitted, lean);
      const Mask better = less(gained, gain);
      best = select(better, fitted, best);
      gained = select(better, gain, gained);
    };
    for (float sign : {1.0f, -1.0f})
      if (sign > 0 || how.both_signs)
        for (int64_t i = 0; i < how.try_count; ++i) take(div(extreme, set1_f32(sign * (low + how.tries[i]))));
    for (int64_t i = 0; i < how.passes; ++i) take(best);
    return best;
  }

  void search_step_and_zero(const Search& how, F32& best, F32& zero) const {
    F32 least = zero_f32(), most = value(0);
    for (int c = 0; c < count; ++c) {
      least = min(least, value(c));
      most = max(most, value(c));
    }
    alignas(64) float above[32 * kLanes];  // what is small beside its zero keeps its bits
    F32 mass = zero_f32(), all = zero_f32();
    for (int c = 0; c < count; ++c) {
      const F32 y = sub(value(c), least);
      store_f32(above + c * kLanes, y);
      mass = add(mass, weighted(set1_f32(1.0f), c));
      all = add(all, weighted(y, c));
    }
    F32 gained = set1_f32(-1.0f);
    best = zero = zero_f32();
    const F32 end = sub(zero_f32(), least), two = set1_f32(2.0f);
    const auto take = [&](F32 step, F32 start) {
      const F32 inverse = inverse_or_zero(step);
      F32 ones = zero_f32(), curve = zero_f32(), lean = zero_f32();
      for (int c = 0; c < count; ++c) {
        const F32 y = load_f32(above + c * kLanes), q = rounded(y, start, inverse), heavy = weighted(q, c);
        ones = add(ones, heavy);
        curve = fma(heavy, q, curve);
        lean = fma(heavy, y, lean);
      }
      const F32 determinant = sub(mul(mass, curve), mul(ones, ones));
      F32 fitted = mul(sub(mul(mass, lean), mul(all, ones)), inverse_or_zero(determinant));
      F32 shift = div(sub(all, mul(fitted, ones)), mass);
      const Mask outside = less(end, shift);
      shift = select(outside, end, shift);
      fitted = select(outside, mul(sub(lean, mul(shift, ones)), inverse_or_zero(curve)), fitted);
      fitted = max(fitted, zero_f32());
      const F32 by_step = sub(sub(mul(two, lean), mul(fitted, curve)), mul(two, mul(shift, ones)));
      const F32 by_zero = sub(mul(two, all), mul(shift, mass));
      const F32 gain = add(mul(fitted, by_step), mul(shift, by_zero));
      const Mask better = less(gained, gain);
      best = select(better, fitted, best);
      zero = select(better, shift, zero);
      gained = select(better, gain, gained);
    };
    for (int64_t i = 0; i < how.try_count; ++i) {
      const F32 step = div(sub(most, least), set1_f32(high + how.tries[i]));
      for (float below : {0.0f, 0.5f, 1.0f}) take(step, mul(step, set1_f32(how.tries[i] * below)));
    }
    for (int64_t i = 0; i < how.passes; ++i) take(best, zero);
    zero = add(zero, least);
  }
};

// As many blocks as there are lanes: `x` and `weights` have a vector for each column.
template <bool kWeighted>
class SearchedBlocks {
 public:
  SearchedBlocks(const Search& how, const float* x, const float* weights) : how_(how), x_(x), weights_(weights) {}

  Scales run() const {
    Scales found = begin();
    for (int64_t i = 0; i < how_.rounds; ++i) {
      move(found);
      refit(found);
    }
    return found;
  }

  // `found`, or zeros where even those lose less.
  void at_least_zeros(Scales& found) const {
    F32 lost = zero_f32(), all = zero_f32();
    for (int u = 0; u < how_.units(); ++u) {
      lost = add(lost, unit(u).error(found.step(u), zero(found, u)));
      all = add(all, unit(u).whole());
    }
    const Mask worse = less(all, lost);
    found.factor = select(worse, zero_f32(), found.factor);
    found.zero_factor = select(worse, zero_f32(), found.zero_factor);
  }

 private:
  Unit<kWeighted> unit(int u) const {
    const int at = u * how_.unit * kLanes;
    return {x_ + at, kWeighted ? weights_ + at : nullptr, how_.unit, how_.low, how_.high};
  }
  F32 zero(const Scales& found, int u) const { return how_.zeros() ? found.zero(u) : zero_f32(); }

  Scales begin() const {
    Scales found;
    F32 step[kMostUnits], zero[kMostUnits], curve[kMostUnits];
    found.zero_factor = zero_f32();
    const int units = how_.units();
    if (!how_.zeros()) {
      for (int u = 0; u < units; ++u) {
        step[u] = unit(u).search_step(how_);
        curve[u] = unit(u).sums(step[u], zero_f32()).qq;
        found.minima[u] = zero_f32();
      }
      found.factor = multiples(step, curve, found.scales);
      return found;
    }
    for (int u = 0; u < units; ++u) {
      unit(u).search_step_and_zero(how_, step[u], zero[u]);
      const auto sums = unit(u).sums(step[u], zero[u]);
      // What an error of the zero costs when the step makes up for it as far as it can.
      curve[u] = max(sub(sums.one, mul(mul(sums.q, sums.q), inverse_or_zero(sums.qq))), zero_f32());
      zero[u] = sub(zero_f32(), zero[u]);
    }
    found.zero_factor = multiples(zero, curve, found.minima);
    for (int u = 0; u < units; ++u)
      for (int64_t i = 0; i < how_.passes; ++i) {
        const F32 stored = found.zero(u);
        const auto sums = unit(u).sums(step[u], stored);
        step[u] = max(mul(sub(sums.qx, mul(stored, sums.q)), inverse_or_zero(sums.qq)), zero_f32());
        curve[u] = sums.qq;
      }
    found.factor = multiples(step, curve, found.scales);
    return found;
  }

  // A float16 and whole multiples of it that miss what is wanted by least, errors counting `curve`.
  F32 multiples(const F32 (&wanted)[kMostUnits], const F32 (&curve)[kMostUnits], F32 (&best_of)[kMostUnits]) const {
    const int units = how_.units();
    F32 extreme = zero_f32(), largest = set1_f32(-1.0f);
    for (int u = 0; u < units; ++u) {
      const Mask larger = less(largest, abs(wanted[u]));
      extreme = select(larger, wanted[u], extreme);
      largest = select(larger, abs(wanted[u]), largest);
      best_of[u] = zero_f32();
    }
    extreme = div(extreme, set1_f32(how_.first != 0.0f ? how_.first : how_.last));
    F32 least = set1_f32(std::numeric_limits<float>::infinity()), best = zero_f32();
    for (int64_t i = 0; i <= how_.factor_count; ++i) {
      // The last one is the next float16, where they are far apart.
      const F32 tiny = select(less(extreme, zero_f32()), set1_f32(-0x1p-24f), set1_f32(0x1p-24f));
      const F32 near = i < how_.factor_count ? mul(extreme, set1_f32(how_.factors[i])) : add(extreme, tiny);
      const F32 factor = nearest_half(near), inverse = inverse_or_zero(factor);
      F32 missed = zero_f32(), made[kMostUnits];
      for (int u = 0; u < units; ++u) {
        made[u] = nearest_whole(mul(wanted[u], inverse), how_.first, how_.last);
        const F32 off = sub(wanted[u], mul(factor, made[u]));
        missed = fma(mul(curve[u], off), off, missed);
      }
      const Mask better = less(missed, least);
      least = select(better, missed, least);
      best = select(better, factor, best);
      for (int u = 0; u < units; ++u) best_of[u] = select(better, made[u], best_of[u]);
    }
    return best;
  }

  // The best of the multiples beside those of each unit.
  void move(Scales& found) const {
    for (int u = 0; u < how_.units(); ++u) {
      const F32 scale = found.scales[u], minimum = found.minima[u];
      F32 least = set1_f32(std::numeric_limits<float>::infinity());
      for (int i : {0, -1, 1})  // of equals the first stays: zeros have multiples of 0
        for (int j : {0, -1, 1}) {
          if (j && !how_.zeros()) continue;
          const F32 other = clamped(add(scale, set1_f32(static_cast<float>(i))), how_.first, how_.last);
          const F32 other_minimum = clamped(add(minimum, set1_f32(static_cast<float>(j))), 0.0f, how_.last);
          const F32 zero = how_.zeros() ? sub(zero_f32(), mul(found.zero_factor, other_minimum)) : zero_f32();
          const F32 error = unit(u).error(mul(found.factor, other), zero);
          const Mask better = less(error, least);
          least = select(better, error, least);
          found.scales[u] = select(better, other, found.scales[u]);
          found.minima[u] = select(better, other_minimum, found.minima[u]);
        }
    }
  }

  // The best float16 for the multiples as they are and the nearest codes under them; the old ones if none is.
  void refit(Scales& found) const {
    F32 curve = zero_f32(), lean = zero_f32(), both = zero_f32(), zero_curve = zero_f32(), zero_lean = zero_f32();
    for (int u = 0; u < how_.units(); ++u) {
      const auto sums = unit(u).sums(found.step(u), zero(found, u));
      const F32 s = found.scales[u], m = found.minima[u];
      curve = fma(mul(s, s), sums.qq, curve);
      lean = fma(s, sums.qx, lean);
      both = sub(both, mul(mul(s, m), sums.q));
      zero_curve = fma(mul(m, m), sums.one, zero_curve);
      zero_lean = sub(zero_lean, mul(m, sums.x));
    }
    const F32 determinant = sub(mul(curve, zero_curve), mul(both, both)), down = inverse_or_zero(determinant);
    const Mask solvable = less(mul(set1_f32(1e-6f), mul(curve, zero_curve)), determinant);
    const F32 alone = mul(lean, inverse_or_zero(curve));
    const F32 step = mul(sub(mul(lean, zero_curve), mul(zero_lean, both)), down);
    const F32 zero = mul(sub(mul(zero_lean, curve), mul(lean, both)), down);
    const F32 new_factor = nearest_half(select(solvable, step, alone));
    const F32 new_zero = nearest_half(select(solvable, zero, found.zero_factor));
    const auto cost = [&](F32 a, F32 b) {
      const F32 two = set1_f32(2.0f);
      const F32 by_step = sub(fma(a, curve, mul(two, mul(b, both))), mul(two, lean));
      return fma(a, by_step, mul(b, sub(mul(b, zero_curve), mul(two, zero_lean))));
    };
    const Mask better = less(cost(new_factor, new_zero), cost(found.factor, found.zero_factor));
    found.factor = select(better, new_factor, found.factor);
    found.zero_factor = select(better, new_zero, found.zero_factor);
  }

  const Search& how_;
  const float* x_;
  const float* weights_;
};

}  // namespace gguf
}  // namespace lowbit
