// add_column_ranges: sums, least and largest values of columns, and how often magnitudes begin with which bits.
#include <vector>

#include "native/bind.h"
#include "native/encode.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::kLanes;

constexpr int kVectors = 4;
constexpr int64_t kWide = kVectors * kLanes;  // columns of a task
constexpr int64_t kRun = 64;                  // rows whose sum is float32; sums of these are float64
constexpr int64_t kBins = 4096;
constexpr int kShift = 19;  // what is left of 31 bits has 12

struct Ranges {
  double* total;
  float *minimum, *maximum;
};

// Up to kWide columns from the one at `at`, of all rows.
template <int kDtype>
void add_columns(const void* x, int64_t at, int64_t rows, int64_t k, int64_t columns, Ranges to) {
  using namespace simd;
  F32 low[kVectors], high[kVectors];
  double total[kWide] = {};
  const auto row_at = [&](int64_t row, int v) {
    const int64_t left = columns - v * kLanes;
    const int64_t first = at + row * k + v * kLanes;
    if (left >= kLanes) return load_as_f32(x, first, kDtype);
    return left > 0 ? load_first(x, first, static_cast<int>(left), kDtype) : zero_f32();
  };
  for (int v = 0; v < kVectors; ++v) low[v] = high[v] = row_at(0, v);
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    F32 sums[kVectors];
    for (auto& sum : sums) sum = zero_f32();
    for (int64_t row = begin; row < std::min(rows, begin + kRun); ++row)
      for (int v = 0; v < kVectors; ++v) {
        const F32 value = row_at(row, v);
        sums[v] = add(sums[v], value);
        low[v] = min(low[v], value);
        high[v] = max(high[v], value);
      }
    alignas(64) float lanes[kWide];
    for (int v = 0; v < kVectors; ++v) store_f32(lanes + v * kLanes, sums[v]);
    for (int64_t c = 0; c < kWide; ++c) total[c] += static_cast<double>(lanes[c]);
  }
  alignas(64) float lows[kWide], highs[kWide];
  for (int v = 0; v < kVectors; ++v) {
    store_f32(lows + v * kLanes, low[v]);
    store_f32(highs + v * kLanes, high[v]);
  }
  for (int64_t c = 0; c < columns; ++c) {
    to.total[c] += total[c];
    to.minimum[c] = std::min(to.minimum[c], lows[c]);
    to.maximum[c] = std::max(to.maximum[c], highs[c]);
  }
}

template <class Bits>  // of a float32, or its upper half
void count_magnitudes(const Bits* x, int64_t rows, int64_t k, int64_t step, int64_t* magnitudes) {
  std::vector<uint32_t> room(2 * kBins, 0);  // two, as neighbours often fall into one bin
  uint32_t* counts[2] = {room.data(), room.data() + kBins};
  for (int64_t row = 0; row < rows; row += step)
    for (int64_t c = 0; c < k; ++c) {
      Bits found;
      std::memcpy(&found, x + row * k + c, sizeof found);
      const uint32_t bits = uint32_t{found} << (32 - 8 * sizeof found);
      ++counts[c & 1][(bits & 0x7fffffff) >> kShift];
    }
  for (int64_t bin = 0; bin < kBins; ++bin) magnitudes[bin] += int64_t{counts[0][bin]} + counts[1][bin];
}

}  // namespace

// x: [rows, k] of float32 or bfloat16 without gaps, at least one row, finite. Each task has columns of its own, and one
// the magnitudes.
void add_column_ranges(Ptr<const void> x, int dtype, int64_t rows, int64_t k, Ptr<double> total, Ptr<float> minimum,
                       Ptr<float> maximum, Ptr<int64_t> magnitudes, int64_t step, int threads) {
  const int64_t blocks = (k + kWide - 1) / kWide;
  const void* rows_at = x;
  parallel_for(blocks + 1, threads, [&](int64_t task) {
    const int64_t c = task * kWide;
    const auto add = dtype == kBfloat16 ? add_columns<kBfloat16> : add_columns<kFloat32>;
    if (task < blocks) return add(rows_at, c, rows, k, std::min(kWide, k - c), {total + c, minimum + c, maximum + c});
    if (dtype == kBfloat16) return count_magnitudes(static_cast<const uint16_t*>(rows_at), rows, k, step, magnitudes);
    count_magnitudes(static_cast<const uint32_t*>(rows_at), rows, k, step, magnitudes);
  });
}

void bind_add_column_ranges(nb::module_& m) {
  m.def("add_column_ranges", &add_column_ranges, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("dtype"), nb::arg("rows"), nb::arg("k"), nb::arg("total"), nb::arg("minimum"), nb::arg("maximum"),
        nb::arg("magnitudes"), nb::arg("step"), nb::arg("threads"));
}

}  // namespace lowbit
