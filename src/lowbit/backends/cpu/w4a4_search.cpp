// input_noise and lost_to_lowest of a search for W4A4 parameters: rounding by groups of 64 columns of float32 rows.
#include "native/bind.h"
#include "native/encode.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::kLanes;

constexpr int64_t kGroup = 64;
constexpr int kVectors = kGroup / kLanes;
constexpr float kMinLargest = 1e-10f;  // of a group of activations
constexpr float kSmallestStep = 1e-30f;
constexpr float kLowest = -8.0f, kMost = 7.0f;
constexpr float kToLowest = static_cast<float>(0.97 / -8);

using Group = F32[kVectors];

F32 nearest(F32 value) {  // half to even, of what is below 2^22
  const F32 magic = simd::set1_f32(0x1.8p23f);
  return simd::sub(simd::add(value, magic), magic);
}

// sums[c] += (value - rounded)^2 of one group of a row, with steps of the largest magnitude / most.
void add_noise(const float* x, const float* inverse, F32 shift, float low, float most, Group& sums) {
  using namespace simd;
  Group value;
  F32 largest = zero_f32();
  for (int v = 0; v < kVectors; ++v) {
    value[v] = mul(add(load_f32(x + v * kLanes), shift), load_f32(inverse + v * kLanes));
    largest = max(largest, abs(value[v]));
  }
  const float step = std::max(reduce_max(largest), kMinLargest) / most;
  const F32 steps = set1_f32(step), per_step = set1_f32(1.0f / step);
  for (int v = 0; v < kVectors; ++v) {
    const F32 code = min(max(nearest(mul(value[v], per_step)), set1_f32(low)), set1_f32(most));
    const F32 lost = sub(value[v], mul(code, steps));
    sums[v] = fma(lost, lost, sums[v]);
  }
}

// One group of a row of m - rounded(rest), with the step that puts its largest value slightly beyond code -8.
void miss_group(const float* m, const float* rest, float* out) {
  using namespace simd;
  Group value;
  for (int v = 0; v < kVectors; ++v) value[v] = load_f32(rest + v * kLanes);
  F32 high = value[0], low = value[0];
  for (int v = 1; v < kVectors; ++v) {
    high = max(high, value[v]);
    low = min(low, value[v]);
  }
  const float highest = reduce_max(high), lowest = -reduce_max(sub(zero_f32(), low));
  float step = (highest > -lowest ? highest : lowest) * kToLowest;
  if (std::abs(step) < kSmallestStep) step = kSmallestStep;
  const F32 steps = set1_f32(step), per_step = set1_f32(1.0f / step);
  for (int v = 0; v < kVectors; ++v) {
    const F32 code = min(max(nearest(mul(value[v], per_step)), set1_f32(kLowest)), set1_f32(kMost));
    store_f32(out + v * kLanes, sub(load_f32(m + v * kLanes), mul(code, steps)));
  }
}

}  // namespace

// noise: [k], the mean square of what rounding takes from (x + shift) * inverse: signed by the largest / 7, unsigned by
// the largest / 15. Each group of columns is one task, so no sum depends on the number of threads.
void input_noise(Ptr<const float> x, int64_t rows, int64_t k, Ptr<const float> inverse, float shift, bool is_unsigned,
                 Ptr<float> noise, int threads) {
  const float low = is_unsigned ? 0.0f : -7.0f, most = is_unsigned ? 15.0f : 7.0f;
  parallel_for(k / kGroup, threads, [&](int64_t group) {
    using namespace simd;
    const int64_t c = group * kGroup;
    Group sums;
    for (auto& sum : sums) sum = zero_f32();
    for (int64_t row = 0; row < rows; ++row) add_noise(x + row * k + c, inverse + c, set1_f32(shift), low, most, sums);
    const F32 count = set1_f32(static_cast<float>(rows));
    for (int v = 0; v < kVectors; ++v) store_f32(noise + c + v * kLanes, div(sums[v], count));
  });
}

// out = m - rounded(rest), all [n, k] without gaps; out may be either of them.
void lost_to_lowest(Ptr<const float> m, Ptr<const float> rest, int64_t n, int64_t k, Ptr<float> out, int threads) {
  for_rows(n, k, 0, threads, [&](int64_t row, float*) {
    for (int64_t at = row * k; at < (row + 1) * k; at += kGroup) miss_group(m + at, rest + at, out + at);
  });
}

void bind_w4a4_search(nb::module_& m) {
  m.def("input_noise", &input_noise, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("rows"),
        nb::arg("k"), nb::arg("inverse"), nb::arg("shift"), nb::arg("is_unsigned"), nb::arg("noise"),
        nb::arg("threads"));
  m.def("lost_to_lowest", &lost_to_lowest, nb::call_guard<nb::gil_scoped_release>(), nb::arg("m"), nb::arg("rest"),
        nb::arg("n"), nb::arg("k"), nb::arg("out"), nb::arg("threads"));
}

}  // namespace lowbit
