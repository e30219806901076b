// quantize and scale_search for nvfp4: e2m1 codes, an e4m3 scale for every 16 weights, a global scale.
//
// Lanes are groups: kLanes of them are turned so that a vector holds one column of each, and nothing is summed or
// compared across lanes. What the search tries, and in which order, is what Nvfp4.candidates proves to be enough.
#include "native/bind.h"
#include "native/encode.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::I32;
using simd::kLanes;

constexpr int kGroup = 16;
constexpr int32_t kLargestCode = 0x7e;    // 448
constexpr int32_t kOctave = 8;            // codes from a scale to its double
constexpr int32_t kLowestNormals = 15;    // up to this code values lie 2^-9 apart
constexpr float kLargestGroup = 2688.0f;  // 6 * 448
constexpr float kMinGlobal = 0x1p-117f;

using Columns = F32[kGroup];  // column c of kLanes groups

// kLanes groups beside each other in memory -> columns.
inline void turn(const float* groups, Columns& to) {
  for (int first = 0; first < kGroup; first += kLanes) {
    F32 block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = simd::load_f32(groups + i * kGroup + first);
    simd::transpose(block);
    for (int i = 0; i < kLanes; ++i) to[first + i] = block[i];
  }
}

inline I32 clamp_code(I32 code) { return simd::min(simd::max(code, simd::set1_i32(1)), simd::set1_i32(kLargestCode)); }

class Nvfp4Encoder {
 public:
  Nvfp4Encoder(const Matrix& w, bool divides, bool search, const float* weights)
      : groups_((w.k + kGroup - 1) / kGroup),
        padded_(round_up(groups_, kLanes) * kGroup),
        divides_(divides),
        search_(search),
        weights_(padded_weights(weights, weights ? w.k : 0, weights ? padded_ : 0)),
        lightest_(weights ? *std::min_element(weights, weights + w.k) : 1.0f) {
    alignas(64) float lanes[kLanes];
    for (int64_t at = 0; at < static_cast<int64_t>(weights_.size()); at += kLanes * kGroup) {
      Columns turned;
      turn(weights_.data() + at, turned);
      for (int c = 0; c < kGroup; ++c) {
        simd::store_f32(lanes, turned[c]);
        turned_.insert(turned_.end(), lanes, lanes + kLanes);
      }
    }
  }

  int64_t groups() const { return groups_; }
  int64_t padded() const { return padded_; }

  // The global scale with which a group of this largest magnitude gets the largest scale; 1 for zeros.
  float fitted(int32_t bits) const {
    const float amax = float_of(bits);
    if (!(amax > 0.0f)) return 1.0f;
    // PyTorch divides a number by a tensor as its reciprocal times the number.
    if (divides_) return std::min(1.0f / amax * kLargestGroup, 1.0f / kMinGlobal);
    return std::max(amax / kLargestGroup, kMinGlobal);
  }

  // x: a row with zeros up to `padded()`. at(first) is called before the work on each piece of it.
  template <class At>
  void encode_row(const float* x, float global, uint8_t* codes, uint8_t* scales, const At& at) const {
    const F32 factor = simd::set1_f32(global);
    alignas(64) uint8_t room[4 * kLanes];
    for (int64_t g = 0; g < groups_; g += kLanes) {
      at(g * kGroup);
      Columns columns;
      turn(x + g * kGroup, columns);
      const auto count = static_cast<int>(std::min<int64_t>(kLanes, groups_ - g));
      const I32 scale = chosen(columns, factor, turned_.empty() ? nullptr : turned_.data() + g * kGroup);
      simd::store_low_bytes(room, scale);
      std::memcpy(scales + g, room, static_cast<size_t>(count));
      store(columns, times(e4m3_values(scale), factor), codes + g * (kGroup / 2), count);
    }
  }

 private:
  F32 over(F32 x, F32 global) const { return divides_ ? simd::mul(x, global) : simd::div(x, global); }
  F32 times(F32 x, F32 global) const { return divides_ ? simd::div(x, global) : simd::mul(x, global); }

  I32 chosen(const Columns& x, F32 global, const float* weights) const {
    using namespace simd;
    Columns sizes;
    for (int c = 0; c < kGroup; ++c) sizes[c] = abs(x[c]);
    F32 amax = sizes[0];
    for (int c = 1; c < kGroup; ++c) amax = max(amax, sizes[c]);
    const F32 wanted = over(div(amax, set1_f32(6.0f)), global);
    const I32 nearest = float8_codes<E4m3Grid>(wanted, wanted);
    if (!search_) return nearest;
    return weights ? searched<true>(sizes, amax, nearest, global, weights)
                   : searched<false>(sizes, amax, nearest, global, weights);
  }

  // The squared error of each group under its scale, in units of the global scale.
  template <bool kWeighted>
  F32 error(const Columns& sizes, I32 code, F32 global, const float* weights) const {
    using namespace simd;
    const F32 value = e4m3_values(code), step = times(value, global);
    const F32 inverse = div(set1_f32(1.0f), step);
    F32 sums[2] = {zero_f32(), zero_f32()};
    for_each_place<kGroup>([&](auto place) {
      constexpr int c = decltype(place)::value;
      const F32 miss = e2m1_miss(mul(sizes[c], inverse));
      sums[c % 2] = fma(kWeighted ? mul(miss, load_f32(weights + c * kLanes)) : miss, miss, sums[c % 2]);
    });
    return mul(add(sums[0], sums[1]), mul(value, value));
  }

  // What is lost where a group becomes zeros.
  template <bool kWeighted>
  F32 energy(const Columns& sizes, F32 global, const float* weights) const {
    using namespace simd;
    F32 sum = zero_f32();
    for (int c = 0; c < kGroup; ++c) {
      const F32 size = over(sizes[c], global);
      sum = fma(kWeighted ? mul(size, load_f32(weights + c * kLanes)) : size, size, sum);
    }
    return sum;
  }

  template <bool kWeighted>
  I32 searched(const Columns& sizes, F32 amax, I32 nearest, F32 global, const float* weights) const {
    using namespace simd;
    const F32 six = set1_f32(6.0f);
    const Mask clips = less(times(mul(e4m3_values(nearest), six), global), amax);
    const I32 one = set1_i32(1), none = zero_i32();
    const I32 first = min(add(nearest, select(clips, one, none)), set1_i32(kLargestCode));
    const I32 at_first = select(equal(nearest, first), one, none);

    I32 code = nearest;
    F32 best = error<kWeighted>(sizes, max(nearest, one), global, weights);
    const Mask zeros = equal(nearest, none);  // a scale of 0, which makes all of its group zeros
    if (any(zeros)) best = select(zeros, energy<kWeighted>(sizes, global, weights), best);
    auto attempt = [&](I32 candidate) {
      const F32 found = error<kWeighted>(sizes, candidate, global, weights);
      const Mask better = less(found, best);
      best = select(better, found, best);
      code = select(better, candidate, code);
    };
    attempt(clamp_code(sub(first, at_first)));
    for (int32_t up = 1; up < kOctave; ++up) attempt(clamp_code(add(first, set1_i32(up))));
    if (any(less(first, set1_i32(kOctave)))) {
      for (int32_t up = kOctave; up < kLowestNormals; ++up) {
        const I32 candidate = add(first, set1_i32(up));
        const F32 bound = select(less(set1_i32(kLowestNormals), candidate), infinity(), zero_f32());
        if (any(less(bound, best))) attempt(clamp_code(candidate));
      }
    }
    const F32 wanted = over(amax, global), lightest = set1_f32(lightest_);
    for (int32_t down = 2; down < kOctave; ++down) {  // 1 has been tried, or is where the search began
      const I32 candidate = clamp_code(sub(first, set1_i32(down)));
      const F32 clipped = max(sub(wanted, mul(e4m3_values(candidate), six)), zero_f32());
      const F32 bound = select(less(set1_i32(down), first), mul(mul(clipped, clipped), lightest), infinity());
      if (any(less(bound, best))) attempt(candidate);
    }
    return code;
  }

  // The codes of `count` groups, eight to a word. A group whose step is 0 holds nothing but +0.
  static void store(const Columns& x, F32 step, uint8_t* to, int count) {
    using namespace simd;
    const Mask dead = equal(as_i32(step), zero_i32());
    const Divisor by(select(dead, infinity(), step));
    alignas(64) uint32_t words[2][kLanes];
    for_each_place<2>([&](auto half) {
      I32 word = zero_i32();
      for_each_place<8>([&](auto place) {
        constexpr int c = decltype(place)::value;
        const F32 value = x[8 * decltype(half)::value + c];
        const I32 code = e2m1_codes(by(value), value);
        word = bit_or(word, shift_left<4 * c>(code));
      });
      store_i32(words[decltype(half)::value], select(dead, zero_i32(), word));
    });
    for (int i = 0; i < count; ++i) {
      std::memcpy(to + 8 * i, &words[0][i], 4);
      std::memcpy(to + 8 * i + 4, &words[1][i], 4);
    }
  }

  static F32 infinity() { return simd::as_f32(simd::set1_i32(kInfinityBits)); }

  const int64_t groups_, padded_;
  const bool divides_, search_;
  const std::vector<float> weights_;
  const float lightest_;
  std::vector<float> turned_;
};

}  // namespace

// False: the weight holds NaN or infinity, and what was written means nothing. given: the global scales are there, and
// stay.
bool quantize_nvfp4(Ptr<const void> w, int dtype, int64_t n, int64_t k, bool divides, bool by_row, bool search,
                    Ptr<const float> weights, Ptr<uint8_t> codes, Ptr<uint8_t> scales, Ptr<float> globals, bool given,
                    int threads) {
  const Matrix matrix{w, dtype, n, k};
  const Nvfp4Encoder encoder(matrix, divides, search, weights);
  if (!by_row && !given) {
    const int32_t bits = largest_bits(matrix, threads);
    if (bits >= kInfinityBits) return false;
    globals[0] = encoder.fitted(bits);
  }
  std::atomic<bool> finite{true};
  with_dtype(dtype, [&](auto known) {
    for_rows(n, k, encoder.padded(), threads, [&](int64_t row, float* room) {
      const int32_t bits = load_row<known.value>(w, row * k, k, room, encoder.padded());
      if (bits >= kInfinityBits) {
        finite = false;
        return;
      }
      if (by_row && !given) globals[row] = encoder.fitted(bits);
      const int64_t at = row * encoder.groups();
      encoder.encode_row(room, globals[by_row ? row : 0], codes + at * (kGroup / 2), scales + at,
                         [&](int64_t first) { prefetch(matrix, (row + 1) * k + first, kLanes * kGroup); });
    });
  });
  return finite;
}

void bind_quantize_nvfp4(nb::module_& m) {
  m.def("quantize_nvfp4", &quantize_nvfp4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("dtype"),
        nb::arg("n"), nb::arg("k"), nb::arg("divides"), nb::arg("by_row"), nb::arg("search"), nb::arg("weights"),
        nb::arg("codes"), nb::arg("scales"), nb::arg("globals"), nb::arg("given"), nb::arg("threads"));
}

}  // namespace lowbit
