// descent_sweep: one pass over all columns of a few rows, each code moved to its best value with all others as they
// are, and each step and zero then refitted.
//
// A piece of rows goes through all columns by itself. In a block of columns a slope takes the moves of those before it
// when its turn comes; behind the block the slopes of all other columns take its moves, several columns side by side.
#include "native/bind.h"
#include "native/stored_steps.h"

namespace lowbit {
namespace {

constexpr int kWidth = Thin::kWidth;
constexpr int kTurn = 8;  // columns whose slopes are brought up to date together

struct Sweep {
  float *step, *divisor, *zero;  // [units, n]
  const ColumnGrid& grid;        // of the same
  const StoredSteps* stored;     // null: steps stay
  int64_t k, n, block;
  const float* hessian;      // [k, k]
  float *gradient, *values;  // [k, n]
  bool codes, last;          // last: the gradient of columns done is of no use
};

// Room for a piece of rows and a block of columns, [block, kWidth] each.
struct Block {
  int64_t first, count;
  float *slope, *before, *unmoved, *levels;
};

// The rows `row` on of a draft, `count` of them.
struct Part {
  int64_t row, count;
};

// Moves the columns of a block. slope: up to date for each when its turn comes, and where `whole`, afterwards, too.
template <bool kFloating>
void move_codes(const Sweep& on, const Block& block, const Part& part, bool whole) {
  const float* inner = on.hessian + block.first * on.k + block.first;
  for (int64_t turn = 0; turn < block.count; turn += kTurn) {
    const int64_t end = std::min<int64_t>(turn + kTurn, block.count);
    Thin slopes[kTurn];
    for (int64_t i = turn; i < end; ++i) slopes[i - turn] = Thin::load(block.slope + i * kWidth);
    if (end - turn == kTurn) {
      add_many_products(slopes, inner + turn * on.k, on.k, 1, block.unmoved, turn);
    } else {
      for (int64_t i = turn; i < end; ++i) add_products(slopes[i - turn], inner + i * on.k, block.unmoved, 0, 1, turn);
    }
    for (int64_t i = turn; i < end; ++i) {
      Thin& slope = slopes[i - turn];
      add_products(slope, inner + i * on.k, block.unmoved, turn, 1, i - turn);
      float* at = on.values + (block.first + i) * on.n + part.row;
      Thin old = Thin::load(at, part.count), wanted;
      const simd::F32 inverse = simd::set1_f32(1.0f / inner[i * on.k + i]);
      for (int v = 0; v < kThinVectors; ++v) wanted.v[v] = simd::fma(slope.v[v], inverse, old.v[v]);
      const Thin value = nearest_values<kFloating>(wanted, on.grid, block.first + i, on.n, part.row, part.count);
      value.store(at, part.count);
      for (int v = 0; v < kThinVectors; ++v) old.v[v] = simd::sub(old.v[v], value.v[v]);
      old.store(block.unmoved + i * kWidth);
      slope.store(block.slope + i * kWidth);
    }
  }
  for (int64_t i = 0; whole && i < block.count; ++i) {
    Thin slope = Thin::load(block.slope + i * kWidth);
    add_products(slope, inner + i * on.k, block.unmoved, i, 1, block.count - i);
    slope.store(block.slope + i * kWidth);
  }
}

// Refits the units of a block, one after the other.
template <bool kFloating>
void refit(const Sweep& on, const Block& block, const Part& part) {
  const Square inner{on.hessian + block.first * on.k + block.first, on.k, 1};
  const bool zeros = on.zero != nullptr;
  for (int64_t begin = 0; begin < block.count; begin += on.grid.columns) {
    const Unit unit{begin, std::min(on.grid.columns, block.count - begin), block.count};
    const UnitHessian hessian(inner, unit);
    const int64_t at = (block.first + begin) / on.grid.columns * on.n + part.row;
    Stored<Thin> old{Thin::load(on.step + at, part.count), {}};
    for (auto& lanes : old.zero.v) lanes = simd::zero_f32();
    if (zeros) old.zero = Thin::load(on.zero + at, part.count);
    float* values = on.values + (block.first + begin) * on.n + part.row;
    find_levels<kFloating>(on.grid, divisor_of(old.step), old.zero, values, on.n, unit.count, part.count, block.levels);
    const Refit<Thin> found = best_steps(unit, hessian, old, zeros, block.levels, block.slope, kWidth, kWidth);
    const Stored<Thin> offered = on.stored->nearest(found.aim, zeros, part.row, part.count);
    const Stored<Thin> now = better_steps(found, hessian, old, zeros, offered);
    now.step.store(on.step + at, part.count);
    divisor_of(now.step).store(on.divisor + at, part.count);
    if (zeros) now.zero.store(on.zero + at, part.count);
    take_steps(unit, hessian, old, now, zeros, block.levels, block.slope, values, kWidth, on.n, kWidth, part.count);
  }
}

// The slopes of columns first.. of all take the moves of a block.
template <int kCount>
int64_t take_moves(const Sweep& on, const Block& block, const Part& part, int64_t first) {
  for (; first + kCount <= on.k; first += kCount) {
    const float* felt = on.hessian + first * on.k + block.first;
    for (int i = 0; i < kCount; ++i)  // which no row before has told of
      for (int64_t j = 0; j < block.count; j += 16) __builtin_prefetch(felt + (kCount + i) * on.k + j);
    Thin slopes[kCount];
    for (int i = 0; i < kCount; ++i) slopes[i] = Thin::load(on.gradient + (first + i) * on.n + part.row, part.count);
    add_many_products(slopes, felt, on.k, 1, block.unmoved, block.count);
    for (int i = 0; i < kCount; ++i) slopes[i].store(on.gradient + (first + i) * on.n + part.row, part.count);
  }
  return first;
}

template <bool kFloating>
void sweep_piece(const Sweep& on, const Part& part) {
  const Room room(4 * on.block * kWidth);
  for (int64_t first = 0; first < on.k; first += on.block) {
    float* at = room.data();
    const Block block{first,
                      std::min(on.block, on.k - first),
                      at,
                      at + on.block * kWidth,
                      at + 2 * on.block * kWidth,
                      at + 3 * on.block * kWidth};
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t from = (first + i) * on.n + part.row;
      Thin::load(on.gradient + from, part.count).store(block.slope + i * kWidth);
      Thin::load(on.values + from, part.count).store(block.before + i * kWidth);
    }
    if (on.codes) move_codes<kFloating>(on, block, part, on.stored != nullptr);
    if (on.stored) {
      refit<kFloating>(on, block, part);
      for (int64_t i = 0; i < block.count; ++i) {
        Thin before = Thin::load(block.before + i * kWidth);
        const Thin now = Thin::load(on.values + (first + i) * on.n + part.row, part.count);
        for (int v = 0; v < kThinVectors; ++v) before.v[v] = simd::sub(before.v[v], now.v[v]);
        before.store(block.unmoved + i * kWidth);
      }
    }
    const int64_t rest = take_moves<kColumnsAtOnce>(on, block, part, on.last ? first + block.count : 0);
    take_moves<1>(on, block, part, rest);
  }
}

}  // namespace

void descent_sweep(Ptr<float> step, Ptr<float> divisor, Ptr<float> zero, int64_t unit, bool floating, float low,
                   float high, float smallest_normal, float magic, int stored, int dtype, int zero_dtype, float least,
                   float most, bool with_sign, Ptr<const float> common, bool common_by_row, bool common_divides,
                   int64_t k, int64_t n, int64_t block, Ptr<const float> hessian, Ptr<float> gradient,
                   Ptr<float> values, bool codes, bool scales, bool last, int threads) {
  const ColumnGrid grid{step, divisor, zero, unit, floating, low, high, smallest_normal, magic};
  const StoredSteps steps{
      static_cast<Steps>(stored), dtype, zero_dtype, least, most, with_sign, common, common_by_row, common_divides};
  const Sweep on{step,     divisor, zero,  grid, scales ? &steps : nullptr, k, n, block, hessian,
                 gradient, values,  codes, last};
  for_pieces<Thin>(n, threads, [&](int64_t row, int64_t rows) {
    if (floating) {
      sweep_piece<true>(on, {row, rows});
    } else {
      sweep_piece<false>(on, {row, rows});
    }
  });
}

void bind_descent_sweep(nb::module_& m) {
  m.def("descent_sweep", &descent_sweep, nb::call_guard<nb::gil_scoped_release>(), nb::arg("step"), nb::arg("divisor"),
        nb::arg("zero"), nb::arg("unit"), nb::arg("floating"), nb::arg("low"), nb::arg("high"),
        nb::arg("smallest_normal"), nb::arg("magic"), nb::arg("stored"), nb::arg("dtype"), nb::arg("zero_dtype"),
        nb::arg("least"), nb::arg("most"), nb::arg("with_sign"), nb::arg("common"), nb::arg("common_by_row"),
        nb::arg("common_divides"), nb::arg("k"), nb::arg("n"), nb::arg("block"), nb::arg("hessian"),
        nb::arg("gradient"), nb::arg("values"), nb::arg("codes"), nb::arg("scales"), nb::arg("last"),
        nb::arg("threads"));
}

}  // namespace lowbit
