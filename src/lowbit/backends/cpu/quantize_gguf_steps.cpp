// quantize and scale_search for the types of gguf whose blocks have one step, or a step and a zero: Q4_0 to Q8_0 and
// MXFP4, 32 weights each. numerics/gguf_encode.py and gguf_step_search.py tell what is made, what is tried, and why.
//
// Lanes are blocks: as many as there are lanes are turned so that a vector holds one column of each, and nothing is
// summed or compared across lanes. Plain blocks are the reference's bit for bit. Of the steps in a search sums are
// taken in another order and products added in one rounding, so that what lies within float32's error may be chosen
// here.
#include <array>

#include "native/bind.h"
#include "native/encode.h"
#include "native/gguf_search.h"

namespace lowbit {
namespace {

using namespace simd;
using gguf::clamped;
using gguf::inverse_or_zero;
using gguf::nearest_half;

constexpr int kColumns = 32;
constexpr int64_t kRun = kTaskElements / kColumns;  // blocks that a thread takes at a time
constexpr float kRoundsToMaxHalf = 65519.99609375f;
constexpr float kMagic = 0x1.8p23f;  // added to a number, it leaves a whole one in the low bits: half to even
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kBeyond =
    1.0f + 0x1p-20f;  // a value that is put halfway between two codes gets the larger one for sure

// What is tried in a search; see gguf_step_search.py.
struct Tries {
  const float* values;
  int64_t count, passes;
};

struct Tile {
  alignas(64) float x[kColumns * kLanes];
  alignas(64) float weights[kColumns * kLanes];

  F32 column(int c) const { return load_f32(x + c * kLanes); }
  F32 weight(int c) const { return load_f32(weights + c * kLanes); }

  // `count` blocks from `first` on, the last one again in the lanes behind; false where one holds NaN or infinity.
  template <int kDtype>
  bool load(const void* from, int64_t first, int count) {
    return !any(not_a_number(turn(x, [&](int lane, int column) {
      return load_as_f32(from, (first + std::min(lane, count - 1)) * kColumns + column, kDtype);
    })));
  }
  // The weights of the columns of the same blocks, of `in_row` in a row.
  void weigh(const float* columns, int64_t first, int count, int64_t in_row) {
    turn(weights, [&](int lane, int column) {
      return load_f32(columns + (first + std::min(lane, count - 1)) % in_row * kColumns + column);
    });
  }

 private:
  // Zero times what was loaded: zero, or NaN.
  template <class F>
  static F32 turn(float* to, const F& at) {
    F32 nothing = zero_f32();
    for (int column = 0; column < kColumns; column += kLanes) {
      F32 rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        rows[lane] = at(lane, column);
        nothing = fma(rows[lane], zero_f32(), nothing);
      }
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store_f32(to + (column + i) * kLanes, rows[i]);
    }
    return nothing;
  }
};

// Blocks as they are stored: the step and the zero as float16 have them, the fifth bits of all codes (of MXFP4 the code
// of the scale), and the other bits, a word of each block at a time.
struct Coded {
  F32 step = zero_f32(), zero = zero_f32();
  I32 high = zero_i32();
  I32 words[8];
};

// code(column) -> 0..2^kBits - 1, for columns that are known when compiling.
template <int kBits, class F>
inline void pack(const F& code, Coded& to) {
  if constexpr (kBits == 8) {
    for_each_place<8>([&](auto word) {
      constexpr int kFirst = 4 * decltype(word)::value;
      const I32 low = bit_or(code(kFirst), shift_left<8>(code(kFirst + 1)));
      const I32 upper = bit_or(code(kFirst + 2), shift_left<8>(code(kFirst + 3)));
      to.words[decltype(word)::value] = bit_or(low, shift_left<16>(upper));
    });
  } else {
    if constexpr (kBits == 5) to.high = zero_i32();
    for_each_place<4>([&](auto word) {
      I32 made = zero_i32();
      for_each_place<4>([&](auto place) {
        constexpr int kByte = decltype(place)::value, kAt = 4 * decltype(word)::value + kByte;
        I32 first = code(kAt), second = code(kAt + 16);
        if constexpr (kBits == 5) {
          to.high = bit_or(to.high, shift_left<kAt>(shift_right<4>(first)));
          to.high = bit_or(to.high, shift_left<kAt + 16>(shift_right<4>(second)));
          first = bit_and(first, set1_i32(15));
          second = bit_and(second, set1_i32(15));
        }
        made = bit_or(made, shift_left<8 * kByte>(bit_or(first, shift_left<4>(second))));
      });
      to.words[decltype(word)::value] = made;
    });
  }
}

// The whole part of 0..2^22.
inline I32 whole_part(F32 x) {
  const F32 sum = add(x, set1_f32(0x1p23f));  // half to even, so one too large or not
  const Mask above = less(x, sub(sum, set1_f32(0x1p23f)));
  return sub(as_i32(sum), select(above, set1_i32(0x4b000001), set1_i32(0x4b000000)));
}

inline F32 largest_magnitude(const Tile& tile) {
  F32 found = zero_f32();
  for (int c = 0; c < kColumns; ++c) found = max(abs(tile.column(c)), found);
  return found;
}

inline void extent(const Tile& tile, F32& low, F32& high) {
  low = high = tile.column(0);
  for (int c = 1; c < kColumns; ++c) {
    low = min(tile.column(c), low);
    high = max(tile.column(c), high);
  }
}

// The value of the largest magnitude, the first of equals.
inline F32 extreme(const Tile& tile) {
  F32 low, high;
  extent(tile, low, high);
  if (!any(equal(as_i32(abs(low)), as_i32(abs(high))))) return select(less(high, sub(zero_f32(), low)), low, high);
  F32 found = tile.column(0);
  for (int c = 1; c < kColumns; ++c) found = select(less(abs(found), abs(tile.column(c))), tile.column(c), found);
  return found;
}

// ---- integer levels ------------------------------------------------------------------------------------------------

template <int kLowest, int kHighest, int kCodeBits>
struct Integers {
  static constexpr int kBits = kCodeBits, kWords = kBits == 8 ? 8 : 4;
  static constexpr bool kZeros = kLowest == 0, kBothSigns = !kZeros && kLowest != -kHighest;
  static constexpr int kOffset = kBothSigns ? -kLowest : 0;  // the code of level 0
  static constexpr float kLow = kLowest, kHigh = kHighest;
  static constexpr int64_t kBytes = 2 + 2 * kZeros + 4 * (kBits == 5) + 4 * kWords;

  // The step before it is rounded to float16, and the zero.
  static F32 step(const Tile& tile, F32& zero) {
    zero = zero_f32();
    if constexpr (kZeros) {
      F32 high;
      extent(tile, zero, high);
      return min(div(sub(high, zero), set1_f32(kHigh)), set1_f32(kRoundsToMaxHalf));
    } else if constexpr (kBothSigns) {
      return clamped(div(extreme(tile), set1_f32(kLow)), -kRoundsToMaxHalf, kRoundsToMaxHalf);
    } else {
      return min(div(largest_magnitude(tile), set1_f32(kHigh)), set1_f32(kRoundsToMaxHalf));
    }
  }

  static Coded rounded(const Tile& tile) {
    Coded made;
    F32 zero;
    const F32 exact = step(tile, zero), inverse = inverse_or_zero(exact);
    pack<kBits>(
        [&](int c) {
          const F32 x = tile.column(c);
          if constexpr (!kZeros && !kBothSigns) return half_away(x, mul(x, inverse));
          const F32 level = mul(kZeros ? sub(x, zero) : x, inverse);
          return whole_part(clamped(add(level, set1_f32(kOffset + 0.5f)), 0.0f, kHigh - kLow));
        },
        made);
    made.step = nearest_half(exact);
    made.zero = nearest_half(zero);
    return made;
  }

  // Of a level that has the sign of x.
  static I32 half_away(F32 x, F32 level) {
    const F32 almost_half = set1_f32(0x1.fffffep-2f);  // with which no sum carries
    const I32 size = whole_part(min(add(abs(level), almost_half), set1_f32(kHigh)));
    const I32 sign = shift_right_signed<31>(as_i32(x));
    return bit_and(sub(bit_xor(size, sign), sign), set1_i32(255));
  }

  // The nearest codes under a step and a zero as they are stored.
  static Coded nearest(const Tile& tile, F32 step, F32 zero) {
    Coded made;
    made.step = step;
    made.zero = zero;
    const F32 size = abs(step), none = set1_f32(std::numeric_limits<float>::infinity());
    const Divisor by(select(less(zero_f32(), size), size, none));
    const I32 sign = bit_and(as_i32(step), set1_i32(INT32_MIN));
    pack<kBits>(
        [&](int c) {
          F32 level = by(kZeros ? sub(tile.column(c), zero) : tile.column(c));
          if constexpr (!kZeros) level = as_f32(bit_xor(as_i32(level), sign));
          const I32 sum = as_i32(add(clamped(level, kLow, kHigh), set1_f32(kMagic)));
          const I32 code = sub(sum, set1_i32(kMagicBits - kOffset));
          return kBits == 8 ? bit_and(code, set1_i32(255)) : code;
        },
        made);
    return made;
  }
};

// Searching the steps of a tile: `x` has a vector a column.
template <class Type, bool kWeighted>
class StepSearch {
 public:
  StepSearch(const Tile& tile, const Tries& tries) : tile_(tile), tries_(tries) {}

  Coded operator()() const {
    F32 start_zero, step, zero = zero_f32();
    const F32 start = nearest_half(Type::step(tile_, start_zero));
    start_zero = nearest_half(start_zero);
    if constexpr (Type::kZeros) {
      step_and_zero(step, zero);
    } else if constexpr (Type::kBothSigns) {
      step = step_of_either_sign();
    } else {
      step = step_by_error();
    }
    step = nearest_half(step);
    zero = nearest_half(zero);
    const Mask better = less(error(step, zero), error(start, start_zero));
    return Type::nearest(tile_, select(better, step, start), select(better, zero, start_zero));
  }

 private:
  // Sums of weighted products of codes and values, in two parts that do not wait for each other.
  struct Sums {
    F32 ones[2] = {zero_f32(), zero_f32()}, curve[2] = {zero_f32(), zero_f32()}, lean[2] = {zero_f32(), zero_f32()};

    F32 all_ones() const { return add(ones[0], ones[1]); }
    F32 all_curve() const { return add(curve[0], curve[1]); }
    F32 all_lean() const { return add(lean[0], lean[1]); }
  };

  // f(column, its half) for all columns.
  template <class F>
  static void for_columns(const F& f) {
    for (int c = 0; c < kColumns; c += 4) for_each_place<4>([&](auto place) { f(c + place, place % 2); });
  }

  F32 weighted(F32 value, int c) const { return kWeighted ? mul(value, tile_.weight(c)) : value; }

  // A code from a sum with kMagic.
  static F32 code(F32 sum, float low, float high) {
    return sub(clamped(sum, kMagic + low, kMagic + high), set1_f32(kMagic));
  }

  F32 error(F32 step, F32 zero) const {
    const F32 inverse = sub(zero_f32(), inverse_or_zero(step));
    Sums sums;
    for_columns([&](int c, int half) {
      const F32 away = sub(zero, tile_.column(c));
      const F32 q = code(fma(away, inverse, set1_f32(kMagic)), Type::kLow, Type::kHigh);
      const F32 missed = fma(q, step, away);
      sums.curve[half] = fma(weighted(missed, c), missed, sums.curve[half]);
    });
    return sums.all_curve();
  }

  // ---- levels around 0: the best step of given codes is lean / curve, and spares lean^2 / curve of the error

  struct Best {
    F32 lean = zero_f32(), curve = set1_f32(1.0f);

    void consider(F32 new_lean, F32 new_curve) {
      const Mask better = less(mul(mul(lean, lean), new_curve), mul(mul(new_lean, new_lean), curve));
      lean = select(better, new_lean, lean);
      curve = select(better, new_curve, curve);
    }
    F32 step() const { return mul(lean, inverse_or_zero(curve)); }
  };

  F32 step_of_either_sign() const {
    const F32 inverse = inverse_or_zero(extreme(tile_));
    Best best;
    for (int64_t i = 0; i < tries_.count; ++i) {
      const float level = Type::kLow + tries_.values[i];
      const F32 by = mul(inverse, set1_f32(level * kBeyond));
      // Codes that reach neither end are of the other sign the same ones.
      if (-level > Type::kHigh + 0.49f) {
        take_both(by, best);
      } else {
        take<false>(by, best);
      }
    }
    for (int64_t i = 0; i < tries_.passes; ++i) take<true>(inverse_or_zero(best.step()), best);
    return best.step();
  }

  template <bool kClamps>
  void take(F32 inverse, Best& best) const {
    Sums sums;
    for_columns([&](int c, int half) {
      const F32 x = tile_.column(c), sum = fma(x, inverse, set1_f32(kMagic));
      add_code(kClamps ? code(sum, Type::kLow, Type::kHigh) : sub(sum, set1_f32(kMagic)), x, c, half, sums);
    });
    best.consider(sums.all_lean(), sums.all_curve());
  }

  // By a step, and by what it is with the other sign.
  void take_both(F32 inverse, Best& best) const {
    Sums sums, other;
    for_columns([&](int c, int half) {
      const F32 x = tile_.column(c), sum = fma(x, inverse, set1_f32(kMagic));
      add_code(code(sum, Type::kLow, Type::kHigh), x, c, half, sums);
      add_code(code(sum, -Type::kHigh, -Type::kLow), x, c, half, other);
    });
    best.consider(sums.all_lean(), sums.all_curve());
    best.consider(sub(zero_f32(), other.all_lean()), other.all_curve());  // these codes with the other sign
  }

  void add_code(F32 q, F32 x, int c, int half, Sums& sums) const {
    const F32 heavy = weighted(q, c);
    sums.curve[half] = fma(heavy, q, sums.curve[half]);
    sums.lean[half] = fma(heavy, x, sums.lean[half]);
  }

  // The same of codes so fine that the error is lost beside the sums of the values: by what each step misses.
  F32 step_by_error() const {
    const F32 largest = extreme(tile_);
    F32 best = zero_f32(), least = set1_f32(std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < tries_.count; ++i)
      take_missed(div(largest, set1_f32((Type::kLow + tries_.values[i]) * kBeyond)), best, least);
    for (int64_t i = 0; i < tries_.passes; ++i) take_missed(best, best, least);
    return best;
  }

  void take_missed(F32 step, F32& best, F32& least) const {
    const F32 inverse = inverse_or_zero(step), minus = sub(zero_f32(), step);
    Sums sums;  // with the squares of what is missed in the place of ones
    for_columns([&](int c, int half) {
      const F32 x = tile_.column(c), q = code(fma(x, inverse, set1_f32(kMagic)), Type::kLow, Type::kHigh);
      const F32 missed = fma(q, minus, x), heavy = weighted(missed, c);
      sums.ones[half] = fma(heavy, missed, sums.ones[half]);
      sums.lean[half] = fma(heavy, q, sums.lean[half]);
      sums.curve[half] = fma(weighted(q, c), q, sums.curve[half]);
    });
    const F32 lean = sums.all_lean(), more = mul(lean, inverse_or_zero(sums.all_curve()));
    const F32 found = sub(sums.all_ones(), mul(more, lean));
    const Mask better = less(found, least);
    best = select(better, add(step, more), best);
    least = select(better, found, least);
  }

  // ---- levels from 0 up: with mass and whole the sums of weights and of weighted values, the best step of given codes
  // is n / d for n = mass lean - whole ones and d = mass curve - ones^2, and spares n^2 / (d mass). Codes are counted
  // from that of the mean value, so that these differences are not small beside their terms.

  struct BestOfTwo {
    F32 mass, whole, n = zero_f32(), d = set1_f32(1.0f), ones = zero_f32(), centre = zero_f32();

    F32 mean() const { return div(whole, mass); }
    void consider(const Sums& sums, F32 new_centre) {
      const F32 zeros = zero_f32(), new_ones = sums.all_ones();
      F32 new_d = sub(mul(mass, sums.all_curve()), mul(new_ones, new_ones));
      F32 new_n = sub(mul(mass, sums.all_lean()), mul(whole, new_ones));
      new_n = select(less(zeros, new_d), max(new_n, zeros), zeros);  // a step is not below 0
      new_d = max(new_d, zeros);
      const Mask better = less(mul(mul(n, n), new_d), mul(mul(new_n, new_n), d));
      n = select(better, new_n, n);
      d = select(better, new_d, d);
      ones = select(better, new_ones, ones);
      centre = select(better, new_centre, centre);
    }
    F32 step() const { return mul(n, inverse_or_zero(d)); }
    F32 zero() const { return sub(div(sub(whole, mul(step(), ones)), mass), mul(step(), centre)); }
  };

  void step_and_zero(F32& step, F32& zero) const {
    alignas(64) float above[kColumns * kLanes];  // what is small beside its zero keeps its bits
    F32 low, high;
    extent(tile_, low, high);
    Sums sums;
    for_columns([&](int c, int half) {
      const F32 y = sub(tile_.column(c), low);
      store_f32(above + c * kLanes, y);
      sums.ones[half] = add(sums.ones[half], weighted(set1_f32(1.0f), c));
      sums.lean[half] = add(sums.lean[half], weighted(y, c));
    });
    BestOfTwo best{sums.all_ones(), sums.all_lean()};
    const F32 inverse = inverse_or_zero(sub(high, low)), mean = best.mean();
    for (int64_t i = 0; i < tries_.count; ++i) {
      const float more = tries_.values[i];
      const F32 by = mul(inverse, set1_f32(Type::kHigh + more));
      take_above<true>(above, mean, by, zero_f32(), best);
      take_above<false>(above, mean, by, set1_f32(-0.5f * more), best);
      take_above<false>(above, mean, by, set1_f32(-more), best);
    }
    for (int64_t i = 0; i < tries_.passes; ++i) {
      const F32 by = inverse_or_zero(best.step());
      take_above<false>(above, mean, by, sub(zero_f32(), mul(best.zero(), by)), best);
    }
    step = best.step();
    zero = add(best.zero(), low);
  }

  // Codes are the nearest to the values, none of which is below 0, times `inverse` and, unless kFromZero, plus `start`.
  template <bool kFromZero>
  void take_above(const float* above, F32 mean, F32 inverse, F32 start, BestOfTwo& best) const {
    const F32 magic = set1_f32(kMagic);
    const F32 middle = clamped(add(fma(mean, inverse, start), magic), kMagic, kMagic + Type::kHigh);
    Sums sums;
    for_columns([&](int c, int half) {
      const F32 y = load_f32(above + c * kLanes);
      F32 sum = kFromZero ? fma(y, inverse, magic) : add(fma(y, inverse, start), magic);
      sum = min(sum, set1_f32(kMagic + Type::kHigh));
      const F32 q = sub(kFromZero ? sum : max(sum, magic), middle), heavy = weighted(q, c);
      sums.ones[half] = add(sums.ones[half], heavy);
      sums.curve[half] = fma(heavy, q, sums.curve[half]);
      sums.lean[half] = fma(heavy, y, sums.lean[half]);
    });
    best.consider(sums, sub(middle, magic));
  }

  const Tile& tile_;
  const Tries& tries_;
};

// ---- MXFP4 ---------------------------------------------------------------------------------------------------------

// How many float32 below 2^e, the nearest first, have a logarithm that is e in float32: as many as half of the last
// place of that. By the exponent bits of these values.
std::array<int32_t, 256> make_carried() {
  std::array<int32_t, 256> made{};
  for (int bits = 1; bits < 255; ++bits) {
    const int e = bits - 126, beside = e > 0 ? e - 1 : -e;  // of the same binade as what lies just below e
    if (beside) made[static_cast<size_t>(bits)] = static_cast<int32_t>(std::ldexp(std::log(2.0), std::ilogb(beside)));
  }
  return made;
}

// Codes of scales: 2^(code - 127) for e2m1 values.
struct Mxfp4 {
  static constexpr int kBits = 4, kWords = 4;
  static constexpr int64_t kBytes = 17;
  static constexpr int32_t kLargestScale = 254;

  static I32 scale(const Tile& tile) {
    static const std::array<int32_t, 256> carried = make_carried();
    alignas(64) int32_t bits[kLanes];
    store_i32(bits, as_i32(largest_magnitude(tile)));
    for (int32_t& lane : bits) lane = std::max(((lane + carried[static_cast<size_t>(lane >> 23)]) >> 23) - 2, 0);
    return load_i32(bits);
  }

  static Coded rounded(const Tile& tile) {
    return coded(tile, scale(tile), [](F32 size) { return half_down(size); });
  }

  // code(magnitude in units of the scale) -> 0..7. A zero has no sign.
  template <class F>
  static Coded coded(const Tile& tile, I32 scale, const F& code) {
    Coded made;
    made.high = scale;
    const F32 inverse = power(scale);
    pack<kBits>(
        [&](int c) {
          const F32 x = tile.column(c);
          const I32 found = code(mul(abs(x), inverse)), sign = bit_and(shift_right<28>(as_i32(x)), set1_i32(8));
          return bit_or(found, select(equal(found, zero_i32()), zero_i32(), sign));
        },
        made);
    return made;
  }

  // 1 / scale.
  static F32 power(I32 scale) {
    const I32 code = sub(set1_i32(254), scale);
    return as_f32(select(equal(code, zero_i32()), set1_i32(0x400000), shift_left<23>(code)));
  }

  // The code of the nearest magnitude, the smaller of two: from 1 on half of a bit less than the last place is added.
  static I32 half_down(F32 size) {
    const I32 large = sub(shift_right<22>(add(as_i32(size), set1_i32(0x1fffff))), set1_i32(252));
    const I32 one = set1_i32(1), none = zero_i32();
    const I32 small =
        add(select(less(set1_f32(0.25f), size), one, none), select(less(set1_f32(0.75f), size), one, none));
    return min(max(large, small), set1_i32(7));
  }

  template <bool kWeighted>
  static F32 error(const Tile& tile, I32 scale) {  // in units of the scale
    const F32 inverse = power(scale);
    F32 sums[2] = {zero_f32(), zero_f32()};
    for (int c = 0; c < kColumns; c += 4)
      for_each_place<4>([&](auto place) {
        const F32 miss = e2m1_miss(mul(abs(tile.column(c + place)), inverse));
        const F32 heavy = kWeighted ? mul(miss, tile.weight(c + place)) : miss;
        sums[place % 2] = fma(heavy, miss, sums[place % 2]);
      });
    return add(sums[0], sums[1]);
  }

  template <bool kWeighted>
  static Coded searched(const Tile& tile) {
    const I32 first = scale(tile), one = set1_i32(1);
    I32 best = first;
    F32 least = error<kWeighted>(tile, first);
    const auto attempt = [&](I32 scale, float square) {
      const F32 found = mul(error<kWeighted>(tile, scale), set1_f32(square));
      const Mask better = less(select(equal(scale, first), least, found), least);
      best = select(better, scale, best);
      least = select(better, found, least);
    };
    attempt(max(sub(first, one), zero_i32()), 0.25f);
    attempt(min(add(first, one), set1_i32(kLargestScale)), 4.0f);
    return coded(tile, best, [](F32 size) { return e2m1_codes(size, zero_f32()); });
  }
};

// ---- all types -----------------------------------------------------------------------------------------------------

template <class Type, bool kWeighted>
Coded searched(const Tile& tile, const Tries& tries) {
  if constexpr (std::is_same_v<Type, Mxfp4>)
    return Mxfp4::searched<kWeighted>(tile);
  else
    return StepSearch<Type, kWeighted>(tile, tries)();
}

// The blocks of `count` lanes.
template <class Type>
void put_away(const Coded& made, int count, uint8_t* to) {
  alignas(64) uint16_t halves[2][kLanes];
  alignas(64) uint32_t words[9][kLanes];
  store_f16(halves[0], made.step);
  store_f16(halves[1], made.zero);
  store_i32(words[8], made.high);
  for (int i = 0; i < Type::kWords; ++i) store_i32(words[i], made.words[i]);
  for (int lane = 0; lane < count; ++lane) {
    const auto put = [&](const auto& value, size_t bytes) {
      std::memcpy(to, &value, bytes);
      to += bytes;
    };
    if constexpr (std::is_same_v<Type, Mxfp4>) {
      put(words[8][lane], 1);
    } else {
      put(halves[0][lane], 2);
      if constexpr (Type::kZeros) put(halves[1][lane], 2);
      if constexpr (Type::kBits == 5) put(words[8][lane], 4);
    }
    for (int i = 0; i < Type::kWords; ++i) put(words[i][lane], 4);
  }
}

template <class Type>
bool encode(const Matrix& w, bool search, const float* weights, const Tries& tries, uint8_t* to, int threads) {
  const std::vector<float> columns = weights ? gguf::relative(weights, w.k, kColumns) : std::vector<float>{};
  const int64_t blocks = w.n * w.k / kColumns, in_row = w.k / kColumns;
  std::atomic<bool> finite{true};
  with_dtype(w.dtype, [&](auto dtype) {
    parallel_for((blocks + kRun - 1) / kRun, threads, [&](int64_t task) {
      Tile tile;
      const int64_t end = std::min(blocks, (task + 1) * kRun);
      for (int64_t first = task * kRun; first < end; first += kLanes) {
        const auto count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
        if (!tile.load<dtype.value>(w.values, first, count)) {
          finite = false;
          return;
        }
        if (weights) tile.weigh(columns.data(), first, count, in_row);
        const Coded made = !search   ? Type::rounded(tile)
                           : weights ? searched<Type, true>(tile, tries)
                                     : searched<Type, false>(tile, tries);
        put_away<Type>(made, count, to + first * Type::kBytes);
      }
    });
  });
  return finite;
}

}  // namespace

// False: the weight holds NaN or infinity, and what was written means nothing. type: ggml's number of it.
bool quantize_gguf_steps(Ptr<const void> w, int dtype, int64_t n, int64_t k, int type, bool search,
                         Ptr<const float> weights, Ptr<const float> tries, int64_t try_count, int64_t passes,
                         Ptr<uint8_t> blocks, int threads) {
  const auto run = [&](auto kind) {
    return encode<decltype(kind)>({w, dtype, n, k}, search, weights, {tries, try_count, passes}, blocks, threads);
  };
  switch (type) {
    case 2:
      return run(Integers<-8, 7, 4>{});
    case 3:
      return run(Integers<0, 15, 4>{});
    case 6:
      return run(Integers<-16, 15, 5>{});
    case 7:
      return run(Integers<0, 31, 5>{});
    case 8:
      return run(Integers<-127, 127, 8>{});
    default:
      return run(Mxfp4{});
  }
}

void bind_quantize_gguf_steps(nb::module_& m) {
  m.def("quantize_gguf_steps", &quantize_gguf_steps, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"),
        nb::arg("dtype"), nb::arg("n"), nb::arg("k"), nb::arg("type"), nb::arg("search"), nb::arg("weights"),
        nb::arg("tries"), nb::arg("try_count"), nb::arg("passes"), nb::arg("blocks"), nb::arg("threads"));
}

}  // namespace lowbit
