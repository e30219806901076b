// add_second_moment: x^T x of rows of float32, or of bfloat16, added to the upper triangle of a sum of float32.
//
// Both factors are the same columns, packed once. A step is what one instruction multiplies in a lane: a row of
// float32, or two of bfloat16. A tile's sums of a run of steps lie in registers, those of all runs in the first-level
// cache beside the panels of a run.
#include <vector>

#include "native/bf16_gemm.h"
#include "native/bind.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::kLanes;

constexpr int64_t kRun = 64;   // steps
constexpr int64_t kHigh = 64;  // columns of a task, as the left factor
constexpr int kAcross = 3;     // panels that a tile is wide
// Columns that it is high: its sums, and what they are made of, fit the registers.
constexpr int kDown = kLanes >= 16 ? 8 : 4;
constexpr int64_t kWide = kAcross * kLanes;
static_assert(kLanes % kDown == 0 && kHigh % kLanes == 0, "a task begins with a panel, a tile's columns are of one");
// From a panel to the next; a line more than its values, so that equal steps of panels share no set of a cache.
constexpr int64_t kPanel = (kRun + 1) * kLanes;

// The products of a tile over a run, added to sums[kDown][kWide]: kDown columns of the panel at `left` with the kAcross
// panels at `right`. This call's share of the next run's panels, at `next_left` and `next_right`, is asked for
// meanwhile: kDown values a step are all of the left factor, and more than all of the right one.
using AddProducts = void(const float* left, const float* right, const float* next_left, const float* next_right,
                         float* sums);

// A row of float32 a step.
struct Rows {
  using Value = float;
  static constexpr int64_t kRows = 1;
  static constexpr int kDtype = kFloat32;
  static F32 step(const F32 (&rows)[kRows]) { return rows[0]; }

  static void add_products(const float* left, const float* right, const float* next_left, const float* next_right,
                           float* sums) {
    using namespace simd;
    F32 found[kDown][kAcross];
    for (auto& row : found)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t row = 0; row < kRun; ++row, left += kLanes, right += kLanes) {
      __builtin_prefetch(next_left + row * kDown);
      __builtin_prefetch(next_right + row * kDown);
      F32 across[kAcross];
      for (int v = 0; v < kAcross; ++v) across[v] = load_f32(right + v * kPanel);
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
};

#if defined(LOWBIT_BF16_DOTS)
// Two rows of bfloat16 a step, the earlier one in the lower half of a lane. Products are exact; subnormal numbers count
// as zeros.
struct RowPairs {
  using Value = uint16_t;
  static constexpr int64_t kRows = 2;
  static constexpr int kDtype = kBfloat16;
  static F32 step(const F32 (&rows)[kRows]) {
    using namespace simd;
    return as_f32(bit_or(shift_right<16>(as_i32(rows[0])), as_i32(rows[1])));
  }

  LOWBIT_BF16_DOTS static void add_products(const float* left, const float* right, const float* next_left,
                                            const float* next_right, float* sums) {
    __m512 found[kDown][kAcross];
    for (auto& row : found)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t step = 0; step < kRun; ++step, left += kLanes, right += kLanes) {
      __builtin_prefetch(next_left + step * kDown);
      __builtin_prefetch(next_right + step * kDown);
      __m512i across[kAcross];
      for (int v = 0; v < kAcross; ++v) across[v] = _mm512_loadu_si512(right + v * kPanel);
      for (int i = 0; i < kDown; ++i) {
        int pair;
        std::memcpy(&pair, left + i, sizeof pair);
        const __m512i one = _mm512_set1_epi32(pair);
        for (int v = 0; v < kAcross; ++v)
          found[i][v] = _mm512_dpbf16_ps(found[i][v], (__m512bh)one, (__m512bh)across[v]);
      }
    }
    for (int i = 0; i < kDown; ++i)
      for (int v = 0; v < kAcross; ++v) {
        float* at = sums + i * kWide + v * kLanes;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), found[i][v]));
      }
  }
};
#endif

// Panels of kLanes columns, of each run of steps [kRun, kLanes]; zeros fill up the last panels and the last run.
template <class Steps>
class Packed {
 public:
  using Value = typename Steps::Value;

  Packed(const Value* x, int64_t rows, int64_t k, int threads)
      : panels_((k + kWide - 1) / kWide * kAcross),
        runs_((rows + kRunRows - 1) / kRunRows),
        room_(runs_ * panels_ * kPanel) {
    parallel_for(runs_, threads,
                 [&](int64_t run) { pack(x + run * kRunRows * k, std::min(kRunRows, rows - run * kRunRows), k, run); });
  }

  int64_t runs() const { return runs_; }
  const float* panel(int64_t run, int64_t panel) const { return room_.data() + (run * panels_ + panel) * kPanel; }

 private:
  void pack(const Value* x, int64_t rows, int64_t k, int64_t run) {
    using namespace simd;
    float* const to = room_.data() + run * panels_ * kPanel;
    const int64_t whole = k / kLanes;
    for (int64_t begin = 0; begin < panels_; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, panels_);
      for (int64_t step = 0; step < kRun; ++step) {
        for (int64_t panel = begin; panel < end; ++panel) {
          F32 values[Steps::kRows];
          for (int64_t i = 0; i < Steps::kRows; ++i) {
            const int64_t row = step * Steps::kRows + i, at = row * k + panel * kLanes;
            values[i] = zero_f32();
            if (row < rows && panel < whole) values[i] = load_as_f32(x, at, Steps::kDtype);
            if (row < rows && panel == whole && k % kLanes)
              values[i] = load_first(x, at, static_cast<int>(k % kLanes), Steps::kDtype);
          }
          store_f32(to + panel * kPanel + step * kLanes, Steps::step(values));
        }
      }
    }
  }

  static constexpr int64_t kRunRows = kRun * Steps::kRows;
  static constexpr int64_t kTogether = 8;  // panels: so much of a row is read at once
  int64_t panels_, runs_;
  Room room_;
};

// Columns first.. (at most kHigh) times the kWide columns from `wide` on, of all runs, added to the sum.
template <class Steps>
void add_block(const Packed<Steps>& x, int64_t first, int64_t wide, int64_t k, float* total) {
  static_assert(std::is_same_v<decltype(Steps::add_products), AddProducts>);
  alignas(64) float sums[kHigh][kWide] = {};
  const int64_t high = std::min({kHigh, k - first, wide + kWide - first});
  for (int64_t run = 0; run < x.runs(); ++run) {
    const float *left = x.panel(run, first / kLanes), *right = x.panel(run, wide / kLanes);
    const int64_t next = std::min(run + 1, x.runs() - 1);
    const float *next_left = x.panel(next, first / kLanes), *next_right = x.panel(next, wide / kLanes);
    for (int64_t i = 0; i < high; i += kDown) {
      const int64_t asked = i * kRun;
      Steps::add_products(left + i / kLanes * kPanel + i % kLanes, right, next_left + asked, next_right + asked,
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

template <class Steps>
void add_products_of(float* total, const typename Steps::Value* x, int64_t rows, int64_t k, int threads) {
  const Packed<Steps> packed(x, rows, k, threads);
  std::vector<std::pair<int64_t, int64_t>> blocks;
  for (int64_t wide = 0; wide < k; wide += kWide)
    for (int64_t first = 0; first < std::min(k, wide + kWide); first += kHigh) blocks.emplace_back(first, wide);
  parallel_for(static_cast<int64_t>(blocks.size()), threads,
               [&](int64_t task) { add_block(packed, blocks[task].first, blocks[task].second, k, total); });
}

}  // namespace

void add_second_moment(Ptr<float> total, Ptr<const float> x, int64_t rows, int64_t k, int threads) {
  add_products_of<Rows>(total, x, rows, k, threads);
}

// Where `can_bf16_dots()`.
void add_second_moment_bf16(Ptr<float> total, Ptr<const uint16_t> x, int64_t rows, int64_t k, int threads) {
#if defined(LOWBIT_BF16_DOTS)
  if (can_bf16_dots()) return add_products_of<RowPairs>(total, x, rows, k, threads);
#endif
  throw std::invalid_argument("add_second_moment_bf16: this processor has no products of bfloat16");
}

void bind_add_second_moment(nb::module_& m) {
  m.def("add_second_moment", &add_second_moment, nb::call_guard<nb::gil_scoped_release>(), nb::arg("total"),
        nb::arg("x"), nb::arg("rows"), nb::arg("k"), nb::arg("threads"));
  m.def("add_second_moment_bf16", &add_second_moment_bf16, nb::call_guard<nb::gil_scoped_release>(), nb::arg("total"),
        nb::arg("x"), nb::arg("rows"), nb::arg("k"), nb::arg("threads"));
}

}  // namespace lowbit
