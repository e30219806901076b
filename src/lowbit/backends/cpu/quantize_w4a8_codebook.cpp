// quantize for w4a8_codebook: rows are rotated; each group's float8_e4m3fn scale is the best of the five codes around
// the one that just fits, by the error after all roundings.
//
// Lanes are groups, as in quantize_nvfp4: a vector holds one column of each, so that nothing is summed across lanes and
// the levels, which all groups share, stay in registers.
#include <type_traits>

#include "native/bind.h"
#include "native/encode.h"
#include "native/rotation.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::I32;
using simd::kLanes;

constexpr float kMinScale = 1e-8f, kLargestInteger = 127.0f;
constexpr int32_t kLargestScale = 0x7e;  // the e4m3 code of 448
constexpr int32_t kNeighbours[] = {0, -1, 1, -2, 2};

// The two levels around a value in units of the scale, and the lower one's code.
struct Enclosed {
  F32 lower, upper;
  I32 code;
};

// A sorted table of 16 levels.
class TableLevels {
 public:
  explicit TableLevels(const float* levels) : largest_(std::max(levels[15], -levels[0])) {
    // x >= level where x > the float below it: of the two, the one that a masked addition can follow.
    float below[16], shifted[16];
    for (int i = 0; i < 15; ++i) below[i] = std::nextafter(levels[i], -float_of(kInfinityBits));
    below[15] = float_of(kInfinityBits);  // the last two levels enclose what is beyond them
    const auto from = [&](const float* table, int first) {
      for (int i = 0; i < 16; ++i) shifted[i] = table[std::min(i + first, 15)];
      return simd::make_table(shifted);
    };
    lower_ = from(levels, 0);
    upper_ = from(levels, 1);
    by_four_ = from(below, 4);
    by_two_ = from(below, 2);
    by_one_ = from(below, 1);
    middle_ = simd::set1_f32(below[8]);
  }

  static constexpr int kBits = 4;
  float largest() const { return largest_; }

  Enclosed around(F32 x) const {
    using namespace simd;
    I32 code = select(less(middle_, x), set1_i32(8), zero_i32());
    code = select(less(lookup(by_four_, code), x), add(code, set1_i32(4)), code);
    code = select(less(lookup(by_two_, code), x), add(code, set1_i32(2)), code);
    code = select(less(lookup(by_one_, code), x), add(code, set1_i32(1)), code);
    return {lookup(lower_, code), lookup(upper_, code), code};
  }

 private:
  float largest_;
  F32 middle_;
  simd::Table16 lower_, upper_, by_four_, by_two_, by_one_;
};

// The integers of a code less the middle one, from `low` on; 4 bits use all, 6 bits all but -32.
template <int kBits_>
class UniformLevels {
 public:
  static constexpr int kBits = kBits_;
  static constexpr int kMiddle = 1 << (kBits - 1);
  static constexpr float kHigh = kMiddle - 1, kLow = kBits == 6 ? -kHigh : -kMiddle;
  static constexpr float largest() { return -kLow; }

  Enclosed around(F32 x) const {
    using namespace simd;
    const F32 one = set1_f32(1.0f), near = to_f32(to_i32(x));
    const F32 below = select(less(x, near), sub(near, one), near);
    const F32 lower = max(min(below, set1_f32(kHigh - 1.0f)), set1_f32(kLow));
    return {lower, add(lower, one), add(to_i32(lower), set1_i32(kMiddle))};
  }
};

// level * scale, rounded half to even, within int8.
inline F32 integers(F32 level, F32 scale) {
  using namespace simd;
  const F32 magic = set1_f32(0x1.8p23f), limit = set1_f32(kLargestInteger);
  const F32 rounded = sub(add(mul(level, scale), magic), magic);
  return max(min(rounded, limit), sub(zero_f32(), limit));
}

// What a launcher says of a weight and its format.
struct Job {
  Matrix w;
  int64_t group, rotation;
  float reach;    // what the largest magnitude of a group is divided by; of a group with a shift, half its range
  float low;      // the lowest level
  float to_rows;  // the largest scale of a row's groups times this is the row's
  uint8_t *codes, *scales;
  int64_t stride;     // bytes of a row of codes
  float* row_scales;  // [n]
  void* corrections;  // [K/g, n], or null
  int correction_dtype;
};

template <class Levels, bool kShifts>
class CodebookEncoder {
 public:
  CodebookEncoder(const Job& job, const Levels& levels)
      : job_(job), levels_(levels), groups_(job.w.k / job.group), turns_(round_up(groups_, kLanes)) {}

  bool run(int threads) const {
    const int64_t padded = turns_ * job_.group;
    std::atomic<bool> finite{true};
    with_dtype(job_.w.dtype, [&](auto dtype) {
      for_rows(job_.w.n, job_.w.k, 2 * padded + job_.group * kLanes + 2 * turns_, threads,
               [&](int64_t row, float* room) {
                 if (!encode_row<dtype.value>(row, room, padded)) finite = false;
               });
    });
    return finite;
  }

 private:
  // Whether all was finite. room: the row, its columns turned, those of some groups in units of the row's scale, and a
  // step and a shift for every group.
  template <int kDtype>
  bool encode_row(int64_t row, float* room, int64_t padded) const {
    const int64_t group = job_.group, k = job_.w.k;
    float *turned = room + padded, *target = turned + padded, *steps = target + group * kLanes,
          *shifts = steps + turns_;
    const int32_t largest = load_row<kDtype>(job_.w.values, row * k, k, room, padded);
    if (largest >= kInfinityBits) return false;
    rotate_groups(room, k, job_.rotation);
    if (float_of(largest) > 0x1p120f && largest_bits<kFloat32>(room, k) >= kInfinityBits) return false;

    F32 widest = simd::zero_f32();
    for (int64_t g = 0; g < turns_; g += kLanes) {
      turn(room + g * group, turned + g * group);
      widest = simd::max(widest, fit(turned + g * group, steps + g, shifts + g));
    }
    const float scale = std::max(simd::reduce_max(widest) * job_.to_rows, kMinScale);
    if (!std::isfinite(scale)) return false;
    job_.row_scales[row] = scale;
    for (int64_t g = 0; g < groups_; g += kLanes) {
      prefetch(job_.w, (row + 1) * k + g * group, kLanes * group);
      encode_groups(row, g, turned + g * group, target, simd::load_f32(steps + g), simd::load_f32(shifts + g), scale);
    }
    return true;
  }

  // kLanes groups beside each other -> columns of kLanes.
  void turn(const float* groups, float* to) const {
    const int64_t group = job_.group;
    if (group % kLanes) {  // narrower than a vector
      for (int64_t c = 0; c < group; ++c)
        for (int64_t i = 0; i < kLanes; ++i) to[c * kLanes + i] = groups[i * group + c];
      return;
    }
    for (int64_t first = 0; first < group; first += kLanes) {
      F32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = simd::load_f32(groups + i * group + first);
      simd::transpose(block);
      for (int i = 0; i < kLanes; ++i) simd::store_f32(to + (first + i) * kLanes, block[i]);
    }
  }

  // The steps that take the levels over what the groups hold, and where these begin.
  F32 fit(const float* columns, float* steps, float* shifts) const {
    using namespace simd;
    F32 low = load_f32(columns), high = kShifts ? low : abs(low);
    for (int64_t c = 1; c < job_.group; ++c) {
      const F32 x = load_f32(columns + c * kLanes);
      if constexpr (kShifts) low = min(low, x);
      high = max(high, kShifts ? x : abs(x));
    }
    const F32 half = set1_f32(0.5f);
    const F32 range = kShifts ? sub(mul(high, half), mul(low, half)) : high;
    const F32 step = div(range, set1_f32(job_.reach));
    store_f32(steps, step);
    store_f32(shifts, kShifts ? sub(low, mul(step, set1_f32(job_.low))) : zero_f32());
    return step;
  }

  void encode_groups(int64_t row, int64_t g, const float* columns, float* target, F32 step, F32 shift,
                     float row_scale) const {
    using namespace simd;
    const Divisor by_row(set1_f32(row_scale));
    const auto aim = [&](F32 from) {
      for (int64_t c = 0; c < job_.group * kLanes; c += kLanes)
        store_f32(target + c, by_row(kShifts ? sub(load_f32(columns + c), from) : load_f32(columns + c)));
    };
    aim(shift);
    const I32 code = best_scale(target, div(step, set1_f32(row_scale)));
    const F32 scale = e4m3_values(code);
    const auto count = static_cast<int>(std::min<int64_t>(kLanes, groups_ - g));
    alignas(64) uint8_t bytes[4 * kLanes];
    store_low_bytes(bytes, code);
    std::memcpy(job_.scales + row * groups_ + g, bytes, static_cast<size_t>(count));
    if constexpr (kShifts) aim(corrected(row, g, count, target, shift, scale, row_scale));
    store_codes(target, scale, row, g, count);
  }

  // The code of the neighbour with the least error; the first of equals.
  I32 best_scale(const float* target, F32 wanted) const {
    using namespace simd;
    const I32 nearest = float8_codes<E4m3Grid>(wanted, wanted);
    I32 best = nearest;
    F32 least = as_f32(set1_i32(kInfinityBits));
    for (const int32_t offset : kNeighbours) {
      const I32 code = min(max(add(nearest, set1_i32(offset)), set1_i32(1)), set1_i32(kLargestScale));
      const F32 found = error(target, e4m3_values(code));
      const Mask better = less(found, least);
      best = select(better, code, best);
      least = select(better, found, least);
    }
    return best;
  }

  F32 error(const float* target, F32 scale) const {
    using namespace simd;
    const Mask beyond = less(set1_f32(kLargestInteger), mul(scale, set1_f32(levels_.largest())));
    return any(beyond) ? error<true>(target, scale) : error<false>(target, scale);
  }

  // The lower integer is at most 127 and the upper one at least -127 wherever their place matters: no target is beyond.
  template <bool kClamps>
  F32 error(const float* target, F32 scale) const {
    using namespace simd;
    const F32 inverse = div(set1_f32(1.0f), scale), magic = set1_f32(0x1.8p23f), limit = set1_f32(kLargestInteger);
    F32 sums[2] = {zero_f32(), zero_f32()};
    for (int64_t c = 0; c < job_.group; c += 2)
      for (int i = 0; i < 2; ++i) {
        const F32 x = load_f32(target + (c + i) * kLanes);
        const Enclosed of = levels_.around(mul(x, inverse));
        F32 lower = sub(fma(of.lower, scale, magic), magic), upper = sub(fma(of.upper, scale, magic), magic);
        if constexpr (kClamps) lower = max(lower, sub(zero_f32(), limit)), upper = min(upper, limit);
        const F32 miss = min(sub(x, lower), sub(upper, x));  // of two magnitudes: at most one is negative, and smaller
        sums[i] = fma(miss, miss, sums[i]);
      }
    return add(sums[0], sums[1]);
  }

  // The nearest of the integers, the lower code of equals.
  I32 rounded(F32 x, F32 scale, const Divisor& by_scale, F32* integer) const {
    using namespace simd;
    const F32 most = set1_f32(kLargestInteger + 1.0f);
    const F32 within = max(min(x, most), sub(zero_f32(), most));
    const Enclosed of = levels_.around(by_scale(within));
    const F32 lower = integers(of.lower, scale), upper = integers(of.upper, scale);
    const Mask up = less(abs(sub(upper, within)), abs(sub(within, lower)));
    if (integer) *integer = select(up, upper, lower);
    return select(up, add(of.code, set1_i32(1)), of.code);
  }

  // The corrections as they are stored: the shifts and the means of what the integers leave.
  F32 corrected(int64_t row, int64_t g, int count, const float* target, F32 shift, F32 scale, float row_scale) const {
    using namespace simd;
    const Divisor by_scale(scale);
    F32 sum = zero_f32(), integer = sum;
    for (int64_t c = 0; c < job_.group * kLanes; c += kLanes) {
      const F32 x = load_f32(target + c);
      rounded(x, scale, by_scale, &integer);
      sum = add(sum, sub(x, integer));
    }
    const F32 mean = div(sum, set1_f32(static_cast<float>(job_.group)));
    alignas(64) float lanes[kLanes];
    store_f32(lanes, add(shift, mul(mean, set1_f32(row_scale))));
    for (int i = 0; i < count; ++i) {
      const Stored stored(lanes[i], job_.correction_dtype);
      stored.put(job_.corrections, (g + i) * job_.w.n + row, job_.correction_dtype);
      lanes[i] = stored.value;
    }
    return load_f32(lanes);
  }

  // Low nibbles, eight columns to a word, and of 6 bits the upper two, sixteen to a word.
  void store_codes(const float* target, F32 scale, int64_t row, int64_t g, int count) const {
    using namespace simd;
    constexpr bool kUpper = Levels::kBits == 6;
    const int64_t group = job_.group;
    uint8_t *low = job_.codes + row * job_.stride + g * group / 2,
            *high = low + (job_.w.k - g * group) / 2 + g * group / 4;
    const Divisor by_scale(scale);
    I32 upper = zero_i32();
    for (int64_t c = 0; c < group; c += 8) {
      const int64_t together = std::min<int64_t>(group, 8);
      I32 word = zero_i32(), more = zero_i32();
      const auto take = [&](auto place) {
        constexpr int kAt = decltype(place)::value;
        if (kAt >= together) return;
        const I32 code = rounded(load_f32(target + (c + kAt) * kLanes), scale, by_scale, nullptr);
        word = bit_or(word, shift_left<4 * kAt>(kUpper ? bit_and(code, set1_i32(15)) : code));
        if constexpr (kUpper) more = bit_or(more, shift_left<2 * kAt>(shift_right<4>(code)));
      };
      for_each_place<8>(take);
      put(low + c / 2, word, together / 2, group / 2, count);
      if constexpr (kUpper) {
        upper = c % 16 ? bit_or(upper, shift_left<16>(more)) : more;
        if (c % 16) put(high + (c - 8) / 4, upper, 4, group / 4, count);
      }
    }
  }

  // The first bytes of each of `count` lanes, `apart` bytes from each other.
  static void put(uint8_t* to, I32 word, int64_t bytes, int64_t apart, int count) {
    alignas(64) uint32_t words[kLanes];
    simd::store_i32(words, word);
    if (bytes == 4) {
      for (int i = 0; i < count; ++i) std::memcpy(to + i * apart, &words[i], 4);
    } else {
      for (int i = 0; i < count; ++i) std::memcpy(to + i * apart, &words[i], 2);
    }
  }

  const Job job_;
  const Levels levels_;
  const int64_t groups_, turns_;  // of a row, and filled up to whole vectors
};

template <class Levels>
bool encode(const Job& job, const Levels& levels, int threads) {
  if (job.corrections) return CodebookEncoder<Levels, true>(job, levels).run(threads);
  return CodebookEncoder<Levels, false>(job, levels).run(threads);
}

}  // namespace

// False: the weight holds NaN or infinity, or does once it is rotated, and what was written means nothing.
bool quantize_w4a8_codebook(Ptr<const void> w, int dtype, int64_t n, int64_t k, int bits, int64_t group,
                            int64_t rotation, Ptr<const float> levels, float reach, float low, float to_rows,
                            Ptr<uint8_t> codes, int64_t stride, Ptr<uint8_t> scales, Ptr<float> row_scales,
                            Ptr<void> corrections, int correction_dtype, int threads) {
  const Job job{{w, dtype, n, k}, group,      rotation,    reach,           low, to_rows, codes, scales,
                stride,           row_scales, corrections, correction_dtype};
  if (levels) return encode(job, TableLevels(levels), threads);
  if (bits == 6) return encode(job, UniformLevels<6>(), threads);
  return encode(job, UniformLevels<4>(), threads);
}

void bind_quantize_w4a8_codebook(nb::module_& m) {
  m.def("quantize_w4a8_codebook", &quantize_w4a8_codebook, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"),
        nb::arg("dtype"), nb::arg("n"), nb::arg("k"), nb::arg("bits"), nb::arg("group"), nb::arg("rotation"),
        nb::arg("levels"), nb::arg("reach"), nb::arg("low"), nb::arg("to_rows"), nb::arg("codes"), nb::arg("stride"),
        nb::arg("scales"), nb::arg("row_scales"), nb::arg("corrections"), nb::arg("correction_dtype"),
        nb::arg("threads"));
}

}  // namespace lowbit
