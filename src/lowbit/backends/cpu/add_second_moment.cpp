// add_second_moment: x^T x of rows of float32 added to the upper triangle of a sum, by products of pairs of int16.
//
// A run of 128 rows of a column becomes integers of up to 4095, in units of its own: 128 products of two of them fit
// in int32. Two rows share a 32-bit lane, as dot2 multiplies them. Packed once, the columns are factors of both sides:
// a vector of them from one panel, and one at a time, in all lanes, from another.
#include "native/bind.h"
#include "native/float_gemm.h"

namespace lowbit {
namespace {

using simd::kLanes;

constexpr int64_t kRun = 128;  // rows
constexpr float kLargest = 4095;
static_assert(kRun * 4095 * 4095 <= INT32_MAX, "sums of a run fit");
constexpr float kSmallest = 0x1p-100F;  // columns that nowhere exceed it have squares that float32 cannot tell from 0

constexpr int kAcross = 3;                   // panels that a tile is wide
constexpr int kDown = kLanes >= 16 ? 8 : 2;  // columns that it is high: all sums lie in registers
constexpr int64_t kPairs = kRun / 2, kWide = kAcross * kLanes;
constexpr int64_t kHigh = 64;  // columns, on the left side, of a task: its panels stay in the first cache for a run

// Columns as integers. A panel is kLanes columns: of each run of rows [kPairs][kLanes] pairs, and a unit a column.
class Packed {
 public:
  Packed(const float* x, int64_t rows, int64_t k, int threads)
      : panels_((k + kWide - 1) / kWide * kAcross),
        runs_((rows + kRun - 1) / kRun),
        room_(runs_ * panels_ * (kPairs + 1) * kLanes) {
    parallel_for(panels_, threads, [&](int64_t panel) {
      for (int64_t run = 0; run < runs_; ++run) {
        const int64_t first = run * kRun;
        pack(x + first * k, std::min(kRun, rows - first), k, run, panel);
      }
    });
  }

  int64_t runs() const { return runs_; }
  const int32_t* pairs(int64_t run, int64_t panel) const {
    return reinterpret_cast<int32_t*>(units(run, panel)) + kLanes;
  }
  float* units(int64_t run, int64_t panel) const {
    return room_.data() + (run * panels_ + panel) * (kPairs + 1) * kLanes;
  }

 private:
  void pack(const float* x, int64_t rows, int64_t k, int64_t run, int64_t panel) {
    using namespace simd;
    const int64_t column = panel * kLanes;
    const int count = static_cast<int>(std::clamp<int64_t>(k - column, 0, kLanes));
    const auto load = [&](int64_t row) {
      if (row >= rows || count == 0) return zero_f32();
      const float* at = x + row * k + column;
      return count == kLanes ? load_f32(at) : load_first(at, 0, count, kFloat32);
    };
    F32 most = zero_f32(), broken = zero_f32();  // NaN where a value is infinite or NaN
    for (int64_t row = 0; row < rows; ++row) {
      const F32 value = load(row);
      most = max(most, abs(value));
      broken = fma(value, zero_f32(), broken);
    }
    const Mask none = less(most, set1_f32(kSmallest));
    const F32 inverse = select(none, zero_f32(), div(set1_f32(kLargest), most));
    store_f32(units(run, panel), add(select(none, zero_f32(), mul(most, set1_f32(1 / kLargest))), broken));
    auto* to = reinterpret_cast<int32_t*>(units(run, panel)) + kLanes;
    for (int64_t pair = 0; pair < kPairs; ++pair, to += kLanes) {
      const I32 low = to_i32(mul(load(2 * pair), inverse)), high = to_i32(mul(load(2 * pair + 1), inverse));
      store_i32(to, bit_or(bit_and(low, set1_i32(0xffff)), shift_left<16>(high)));
    }
  }

  int64_t panels_, runs_;
  Room room_;
};

// sums[kDown][kWide] += the products of one run: of kDown columns of a panel with those of kAcross panels.
void add_products(const int32_t* left, const float* left_units, const int32_t* right, const float* right_units,
                  int64_t next_panel, float* sums) {
  using namespace simd;
  I32 found[kDown][kAcross];
  for (auto& row : found)
    for (auto& sum : row) sum = zero_i32();
  for (int64_t pair = 0; pair < kPairs; ++pair, left += kLanes, right += kLanes) {
    I32 across[kAcross];
    for (int v = 0; v < kAcross; ++v) across[v] = load_i32(right + v * next_panel);
    for (int i = 0; i < kDown; ++i) {
      const I32 one = set1_i32(left[i]);
      for (int v = 0; v < kAcross; ++v) found[i][v] = dot2(found[i][v], one, across[v]);
    }
  }
  for (int v = 0; v < kAcross; ++v) {
    const F32 unit = load_f32(right_units + v * next_panel);
    for (int i = 0; i < kDown; ++i) {
      float* at = sums + i * kWide + v * kLanes;
      store_f32(at, fma(to_f32(found[i][v]), mul(unit, set1_f32(left_units[i])), load_f32(at)));
    }
  }
}

// Columns first.. (at most kHigh) times the kWide columns from `wide` on, of all runs.
void add_block(const Packed& x, int64_t first, int64_t wide, int64_t k, float* total) {
  alignas(64) float sums[kHigh][kWide] = {};
  const int64_t high = std::min({kHigh, k - first, wide + kWide - first});
  for (int64_t run = 0; run < x.runs(); ++run) {
    const int64_t right = wide / kLanes, next = x.pairs(run, right + 1) - x.pairs(run, right);
    for (int64_t i = 0; i < high; i += kDown) {
      const int64_t left = (first + i) / kLanes, within = (first + i) % kLanes;
      add_products(x.pairs(run, left) + within, x.units(run, left) + within, x.pairs(run, right), x.units(run, right),
                   next, sums[i]);
    }
  }
  for (int64_t i = 0; i < high; ++i)
    for (int64_t j = 0; j < std::min(kWide, k - wide); ++j) total[(first + i) * k + wide + j] += sums[i][j];
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
