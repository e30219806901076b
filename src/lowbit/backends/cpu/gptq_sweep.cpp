// gptq_sweep: all columns of a few rows rounded, from the last to the first in an order, each made up for by those
// before it in that order.
//
// A piece of rows goes through all columns by itself. What a block of columns owes the columns done is added up several
// columns side by side; within the block a column's turn comes when its own sum is complete.
#include "native/bind.h"
#include "native/grid_columns.h"

namespace lowbit {
namespace {

constexpr int kWidth = Thin::kWidth;
constexpr int64_t kBlock = 64;    // columns
constexpr int kTurn = 8;          // columns whose sums are brought up to date together
constexpr int64_t kAtOnce = 128;  // errors that stay in the first cache with their factors

struct Rounding {
  const ColumnGrid& grid;
  const int64_t* order;
  Square lower;         // unit lower triangular, in that order
  const float* target;  // [k, n]
  float* values;        // [k, n]
  int64_t k, n;
};

// wanted += what columns first.. owe the columns begin..end that are done; of each the share in an error lies in its
// column of L.
void add_debts(const Rounding& on, int64_t first, int64_t count, int64_t begin, int64_t end, const float* error,
               float* wanted) {
  for (; begin < end; begin += kAtOnce) {
    const int64_t errors = std::min(kAtOnce, end - begin);
    const float *shares = on.lower.at + begin * on.lower.down + first * on.lower.across, *rows = error + begin * kWidth;
    int64_t i = 0;
    for (; i + kColumnsAtOnce <= count; i += kColumnsAtOnce) {
      Thin sums[kColumnsAtOnce];
      for (int j = 0; j < kColumnsAtOnce; ++j) sums[j] = Thin::load(wanted + (i + j) * kWidth);
      add_many_products(sums, shares + i * on.lower.across, on.lower.across, on.lower.down, rows, errors);
      for (int j = 0; j < kColumnsAtOnce; ++j) sums[j].store(wanted + (i + j) * kWidth);
    }
    for (; i < count; ++i) {
      Thin sums[1] = {Thin::load(wanted + i * kWidth)};
      add_many_products(sums, shares + i * on.lower.across, on.lower.across, on.lower.down, rows, errors);
      sums[0].store(wanted + i * kWidth);
    }
  }
}

template <bool kFloating>
void round_piece(const Rounding& on, int64_t row, int64_t count) {
  const Room room((on.k + kBlock) * kWidth);
  float *error = room.data(), *wanted = error + on.k * kWidth;
  for (int64_t last = on.k; last > 0;) {
    const int64_t first = std::max<int64_t>(0, last - kBlock);
    for (int64_t c = first; c < last; ++c)
      Thin::load(on.target + on.order[c] * on.n + row, count).store(wanted + (c - first) * kWidth);
    add_debts(on, first, last - first, last, on.k, error, wanted);
    for (int64_t end = last; end > first;) {
      const int64_t turn = std::max(first, end - kTurn);
      if (end < last) add_debts(on, turn, end - turn, end, last, error, wanted + (turn - first) * kWidth);
      for (int64_t c = end - 1; c >= turn; --c) {
        Thin sums[1] = {Thin::load(wanted + (c - first) * kWidth)};
        const float* shares = on.lower.at + (c + 1) * on.lower.down + c * on.lower.across;
        add_many_products(sums, shares, 0, on.lower.down, error + (c + 1) * kWidth, end - 1 - c);
        const int64_t place = on.order[c] * on.n + row;
        const Thin value = nearest_values<kFloating>(sums[0], on.grid, on.order[c], on.n, row, count);
        Thin lost = Thin::load(on.target + place, count);
        for (int v = 0; v < kThinVectors; ++v) lost.v[v] = simd::sub(lost.v[v], value.v[v]);
        value.store(on.values + place, count);
        lost.store(error + c * kWidth);
      }
      end = turn;
    }
    last = first;
  }
}

}  // namespace

void gptq_sweep(Ptr<const float> step, Ptr<const float> divisor, Ptr<const float> zero, int64_t unit, bool floating,
                float low, float high, float smallest_normal, float magic, Ptr<const int64_t> order,
                Ptr<const float> lower, int64_t down, int64_t across, int64_t k, int64_t n, Ptr<const float> target,
                Ptr<float> values, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit, floating, low, high, smallest_normal, magic};
  const Rounding on{grid, order, {lower, down, across}, target, values, k, n};
  for_pieces<Thin>(n, threads, [&](int64_t row, int64_t rows) {
    if (floating) {
      round_piece<true>(on, row, rows);
    } else {
      round_piece<false>(on, row, rows);
    }
  });
}

void bind_gptq_sweep(nb::module_& m) {
  m.def("gptq_sweep", &gptq_sweep, nb::call_guard<nb::gil_scoped_release>(), nb::arg("step"), nb::arg("divisor"),
        nb::arg("zero"), nb::arg("unit"), nb::arg("floating"), nb::arg("low"), nb::arg("high"),
        nb::arg("smallest_normal"), nb::arg("magic"), nb::arg("order"), nb::arg("lower"), nb::arg("down"),
        nb::arg("across"), nb::arg("k"), nb::arg("n"), nb::arg("target"), nb::arg("values"), nb::arg("threads"));
}

}  // namespace lowbit
