// gptq_columns: a block of columns rounded from the last to the first, each made up for by those before it.
#include "native/bind.h"
#include "native/grid_columns.h"

namespace lowbit {
namespace {

struct Block {
  const int64_t* columns;
  int64_t count, n;
  const float *wanted, *target;
  float *values, *error;
};

// What a column owes is added up when its turn comes, the last column's share first. shares: [count, count], in row i
// the shares of column i in the errors of all.
template <bool kFloating>
void round_piece(const ColumnGrid& grid, const Block& block, const float* shares, int64_t row, int64_t count) {
  const Room room(block.count * Wide::kWidth);
  float* missed = room.data();
  for (int64_t i = block.count - 1; i >= 0; --i) {
    const int64_t at = i * block.n + row, place = block.columns[i] * block.n + row;
    Wide wanted = Wide::load(block.wanted + at, count);
    add_products(wanted, shares + i * block.count, missed, block.count - 1, -1, block.count - 1 - i);
    const Wide value = nearest_values<kFloating>(wanted, grid, block.columns[i], block.n, row, count);
    Wide lost = Wide::load(block.target + place, count);
    for (int v = 0; v < kWideVectors; ++v) lost.v[v] = simd::sub(lost.v[v], value.v[v]);
    value.store(block.values + place, count);
    lost.store(block.error + at, count);
    lost.store(missed + i * Wide::kWidth);
  }
}

}  // namespace

void gptq_columns(Ptr<const float> step, Ptr<const float> divisor, Ptr<const float> zero, int64_t unit, bool floating,
                  float low, float high, float smallest_normal, float magic, Ptr<const int64_t> columns, int64_t count,
                  int64_t n, Ptr<const float> wanted, Ptr<const float> target, Ptr<const float> inner, int64_t down,
                  int64_t across, Ptr<float> values, Ptr<float> error, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit, floating, low, high, smallest_normal, magic};
  const Block block{columns, count, n, wanted, target, values, error};
  const Room shares(count * count);
  Square{inner, down, across}.by_columns(count, 1.0f, shares.data());
  for_pieces<Wide>(n, threads, [&](int64_t row, int64_t rows) {
    if (grid.floating) {
      round_piece<true>(grid, block, shares.data(), row, rows);
    } else {
      round_piece<false>(grid, block, shares.data(), row, rows);
    }
  });
}

void bind_gptq_columns(nb::module_& m) {
  m.def("gptq_columns", &gptq_columns, nb::call_guard<nb::gil_scoped_release>(), nb::arg("step"), nb::arg("divisor"),
        nb::arg("zero"), nb::arg("unit"), nb::arg("floating"), nb::arg("low"), nb::arg("high"),
        nb::arg("smallest_normal"), nb::arg("magic"), nb::arg("columns"), nb::arg("count"), nb::arg("n"),
        nb::arg("wanted"), nb::arg("target"), nb::arg("inner"), nb::arg("down"), nb::arg("across"), nb::arg("values"),
        nb::arg("error"), nb::arg("threads"));
}

}  // namespace lowbit
