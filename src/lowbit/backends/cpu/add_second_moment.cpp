// add_second_moment: x^T x of rows of float32 added to the upper triangle of a sum.
//
// Both factors are the same columns, packed once: of a vector of them beside each other in one panel, and of one at a
// time, in all lanes, in another. A tile's sums of a run of rows lie in registers, those of all runs in the first-level
// cache beside the panels of a run.
#include <vector>

#include "native/bind.h"
#include "native/float_gemm.h"

namespace lowbit {
namespace {

using simd::kLanes;

constexpr int64_t kRun = 64;   // rows
constexpr int64_t kHigh = 64;  // columns of a task, as the left factor
constexpr int kAcross = 3;     // panels that a tile is wide
// Columns that it is high: its sums, and what they are made of, fit the registers.
constexpr int kDown = kLanes >= 16 ? 8 : 4;
constexpr int64_t kWide = kAcross * kLanes;
static_assert(kLanes % kDown == 0 && kHigh % kLanes == 0, "a task begins with a panel, a tile's columns are of one");

// Panels of kLanes columns, of each run of rows [kRun, kLanes]; zeros fill up the last panels and the last run.
class Packed {
 public:
  Packed(const float* x, int64_t rows, int64_t k, int threads)
      : panels_((k + kWide - 1) / kWide * kAcross), runs_((rows + kRun - 1) / kRun), room_(runs_ * panels_ * kPanel) {
    parallel_for(runs_, threads,
                 [&](int64_t run) { pack(x + run * kRun * k, std::min(kRun, rows - run * kRun), k, run); });
  }

  int64_t runs() const { return runs_; }
  const float* panel(int64_t run, int64_t panel) const { return room_.data() + (run * panels_ + panel) * kPanel; }
  // From a panel to the next; a line more than its values, so that equal rows of panels share no set of a cache.
  static constexpr int64_t kPanel = (kRun + 1) * kLanes;

 private:
  void pack(const float* x, int64_t rows, int64_t k, int64_t run) {
    using namespace simd;
    float* const to = room_.data() + run * panels_ * kPanel;
    const int64_t whole = k / kLanes;
    for (int64_t begin = 0; begin < panels_; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, panels_);
      for (int64_t row = 0; row < kRun; ++row) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const float* from = x + row * k + panel * kLanes;
          F32 value = zero_f32();
          if (row < rows && panel < whole) value = load_f32(from);
          if (row < rows && panel == whole && k % kLanes)
            value = load_first(from, 0, static_cast<int>(k % kLanes), kFloat32);
          store_f32(to + panel * kPanel + row * kLanes, value);
        }
      }
    }
  }

  static constexpr int64_t kTogether = 8;  // panels: so much of a row is read at once
  int64_t panels_, runs_;
  Room room_;
};

// sums[kDown][kWide] += the products, over a run, of kDown columns of a panel with the kAcross panels at `right`. This
// call's share of the next run's panels, at `next_left` and `next_right`, is asked for meanwhile: kDown values a row
// are all of the left factor, and more than all of the right one.
void add_products(const float* left, const float* right, const float* next_left, const float* next_right, float* sums) {
  using namespace simd;
  F32 found[kDown][kAcross];
  for (auto& row : found)
    for (auto& sum : row) sum = zero_f32();
  for (int64_t row = 0; row < kRun; ++row, left += kLanes, right += kLanes) {
    __builtin_prefetch(next_left + row * kDown);
    __builtin_prefetch(next_right + row * kDown);
    F32 across[kAcross];
    for (int v = 0; v < kAcross; ++v) across[v] = load_f32(right + v * Packed::kPanel);
    for (int i = 0; i < kDown; ++i) {
      const F32 one = set1_f32(left[i]);
      for (int v = 0; v < kAcross; ++v) found[i][v] = fma(one, across[v], found[i][v]);
    }
  }
  for (int i = 0; i < kDown; ++i)
    for (int v = 0; v < kAcross; ++v) {
      float* at = sums + i * kWide + v * kLanes;
      store_f32(at, add(load_f32(at), found[i][v]));
    }
}

// Columns first.. (at most kHigh) times the kWide columns from `wide` on, of all runs, added to the sum.
void add_block(const Packed& x, int64_t first, int64_t wide, int64_t k, float* total) {
  alignas(64) float sums[kHigh][kWide] = {};
  const int64_t high = std::min({kHigh, k - first, wide + kWide - first});
  for (int64_t run = 0; run < x.runs(); ++run) {
    const float *left = x.panel(run, first / kLanes), *right = x.panel(run, wide / kLanes);
    const int64_t next = std::min(run + 1, x.runs() - 1);
    const float *next_left = x.panel(next, first / kLanes), *next_right = x.panel(next, wide / kLanes);
    for (int64_t i = 0; i < high; i += kDown) {
      const int64_t asked = i * kRun;
      add_products(left + i / kLanes * Packed::kPanel + i % kLanes, right, next_left + asked, next_right + asked,
                   sums[i]);
    }
  }
  const int64_t columns = std::min(kWide, k - wide);
  for (int64_t i = 0; i < high; ++i) {
    float* to = total + (first + i) * k + wide;
    int64_t j = 0;
    for (; j + simd::kLanes <= columns; j += simd::kLanes)
      simd::store_f32(to + j, simd::add(simd::load_f32(to + j), simd::load_f32(sums[i] + j)));
    for (; j < columns; ++j) to[j] += sums[i][j];
  }
}

}  // namespace

void add_second_moment(Ptr<float> total, Ptr<const float> x, int64_t rows, int64_t k, int threads) {
  const Packed packed(x, rows, k, threads);
  std::vector<std::pair<int64_t, int64_t>> blocks;
  for (int64_t wide = 0; wide < k; wide += kWide)
    for (int64_t first = 0; first < std::min(k, wide + kWide); first += kHigh) blocks.emplace_back(first, wide);
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t task) { add_block(packed, blocks[task].first, blocks[task].second, k, total); });
}

void bind_add_second_moment(nb::module_& m) {
  m.def("add_second_moment", &add_second_moment, nb::call_guard<nb::gil_scoped_release>(), nb::arg("total"),
        nb::arg("x"), nb::arg("rows"), nb::arg("k"), nb::arg("threads"));
}

}  // namespace lowbit
