// quantize and scale_search for svdquant_w4a4: the passes that its low rank is found by, and the rows beside it.
//
// Rows are taken two vectors at a time and turned, so that lanes are rows: scales are vectors, and what is summed over
// columns crosses no lanes. A piece stays in the cache while it is multiplied, rounded and multiplied again.
#include <numeric>

#include "native/bind.h"
#include "native/encode.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::I32;
using simd::kLanes;

constexpr int64_t kGroup = 64;
constexpr int kVectors = 2;                   // that the inner loop of a product takes together
constexpr int64_t kRows = kVectors * kLanes;  // of a piece
constexpr float kMinLargest = 1e-10f;         // of a group, where it is rounded to find the low rank
constexpr float kMinScale = 0x1p-24f;         // as it is stored
constexpr float kMost = 7.0f, kLowest = -8.0f;
#if defined(LOWBIT_ISA_AVX512) || defined(LOWBIT_ISA_NEON)
constexpr int kTogether = 12;  // times two vectors of sums, in 32 registers
#else
constexpr int kTogether = 6;
#endif

using Lanes = F32[kVectors];

// A matrix of which single numbers are wanted: at(i, j) = at[i * down + j * across].
struct Numbers {
  const float* at;
  int64_t down, across;
};

// out[j][:] (+)= the sum over i < depth of a[i][:] * b(i, j), for j < kCount; a and out have kRows values in a row.
template <int kCount>
void multiply_some(const float* a, Numbers b, int64_t depth, float* out, bool add_up) {
  using namespace simd;
  F32 sums[kCount][kVectors];
  // Numbered when compiling: of loops that are unrolled later, GCC keeps the sums in memory before and after the next.
  const auto for_each_sum = [&](auto&& f) {
    for_each_place<kCount>([&](auto j) { for_each_place<kVectors>([&](auto v) { f(j, v); }); });
  };
  for_each_sum([&](auto j, auto v) { sums[j][v] = zero_f32(); });
  for (int64_t i = 0; i < depth; ++i) {
    Lanes x;
    for_each_place<kVectors>([&](auto v) { x[v] = load_f32(a + i * kRows + v * kLanes); });
    for_each_sum(
        [&](auto j, auto v) { sums[j][v] = fma(x[v], set1_f32(b.at[i * b.down + j * b.across]), sums[j][v]); });
  }
  if (add_up)
    for_each_sum([&](auto j, auto v) { sums[j][v] = add(load_f32(out + j * kRows + v * kLanes), sums[j][v]); });
  for_each_sum([&](auto j, auto v) { store_f32(out + j * kRows + v * kLanes, sums[j][v]); });
}

template <int kCount = kTogether>
void multiply_up_to(int64_t count, const float* a, Numbers b, int64_t depth, float* out, bool add_up) {
  if constexpr (kCount > 1) {
    if (count < kCount) return multiply_up_to<kCount - 1>(count, a, b, depth, out, add_up);
  }
  multiply_some<kCount>(a, b, depth, out, add_up);
}

// The same for any number of j.
void multiply(const float* a, Numbers b, int64_t depth, float* out, int64_t count, bool add_up) {
  const int64_t steps = (count + kTogether - 1) / kTogether;
  for (int64_t step = 0, j = 0; step < steps; ++step) {
    const int64_t some = (count - j) / (steps - step);
    multiply_up_to(some, a, {b.at + j * b.across, b.down, b.across}, depth, out + j * kRows, add_up);
    j += some;
  }
}

// Rows [row, row + kRows) times the factors of their columns, or as they are -> to[k][kRows]; zeros after the last.
template <int kDtype>
void turn_rows(const Matrix& w, int64_t row, const float* factors, float* to) {
  using namespace simd;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t first = row + v * kLanes;
    for (int64_t c = 0; c < w.k; c += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = first + i < w.n ? load_as_f32(w.values, (first + i) * w.k + c, kDtype) : zero_f32();
      if (factors) {
        const F32 factor = load_f32(factors + c);
        for (int i = 0; i < kLanes; ++i) square[i] = mul(square[i], factor);
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store_f32(to + (c + i) * kRows + v * kLanes, square[i]);
    }
  }
}

void largest_of(const float* group, Lanes& largest) {
  for (auto& lane : largest) lane = simd::zero_f32();
  for (int64_t c = 0; c < kGroup; ++c)
    for (int v = 0; v < kVectors; ++v)
      largest[v] = simd::max(largest[v], simd::abs(simd::load_f32(group + c * kRows + v * kLanes)));
}

// What rounding a group's rest to nearest loses is taken from x: E = x - rounded(rest). rest: [64][kRows]. Adds the
// squared errors, times the weights of the columns, and with kNoise the squares of what is rounded, times its noise.
template <bool kNoise = false>
void round_group(const float* x, const float* rest, const float* weights, float* to, Lanes& errors,
                 const float* noise = nullptr) {
  using namespace simd;
  const F32 magic = set1_f32(0x1.8p23f);
  Lanes scale, inverse;
  largest_of(rest, scale);
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = div(max(scale[v], set1_f32(kMinLargest)), set1_f32(kMost));
    inverse[v] = div(set1_f32(1.0f), scale[v]);
  }
  for (int64_t c = 0; c < kGroup; ++c) {
    const F32 weight = set1_f32(weights[c]);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c * kRows + v * kLanes;
      const F32 value = load_f32(rest + at);
      const F32 rounded = mul(sub(add(mul(value, inverse[v]), magic), magic), scale[v]);
      const F32 miss = sub(value, rounded);
      errors[v] = fma(mul(miss, weight), miss, errors[v]);
      if constexpr (kNoise) errors[v] = fma(mul(rounded, set1_f32(noise[c])), rounded, errors[v]);
      store_f32(to + at, sub(load_f32(x + at), rounded));
    }
  }
}

// rest = x - low basis^T of the group from column c on. low: [rank][kRows], basis: [K, columns] of which `rank` count.
void subtract_low_rank(const float* x, const float* low, const float* basis, int64_t columns, int64_t c, int64_t rank,
                       float* rest) {
  using namespace simd;
  multiply(low, {basis + c * columns, 1, columns}, rank, rest, kGroup, false);
  for (int64_t i = 0; i < kGroup * kRows; i += kLanes)
    store_f32(rest + i, sub(load_f32(x + c * kRows + i), load_f32(rest + i)));
}

// ---- passes over the whole weight ----------------------------------------------------------------------------------

struct Pass {
  Matrix w;
  const float *factors, *weights, *noise;  // of columns; no noise where it is null
  const float* basis;                      // [K, columns]
  int64_t columns, rank;                   // rank 0: no rounding, E is the weight
  bool step;                               // whether E^T E V is wanted
};

// Adds a piece of rows to image, [K / kRows][columns][kRows], and returns its error.
class PassPiece {
 public:
  explicit PassPiece(const Pass& pass)
      : pass_(pass),
        x_(pass.w.k * kRows),
        low_(pass.columns * kRows),
        seen_(pass.columns * kRows),
        rest_(kGroup * kRows),
        lines_(kRows * kRows) {}

  template <int kDtype>
  double run(int64_t row, float* image) {
    const int64_t k = pass_.w.k, q = pass_.columns, rank = pass_.rank;
    float* x = x_.data();
    turn_rows<kDtype>(pass_.w, row, pass_.factors, x);
    for (int64_t c = 0; rank && c < k; c += kGroup)
      multiply(x + c * kRows, {pass_.basis + c * q, q, 1}, kGroup, low_.data(), rank, c > 0);
    Lanes errors = {simd::zero_f32(), simd::zero_f32()};
    for (int64_t c = 0; c < k; c += kGroup) {
      float* group = x + c * kRows;
      if (rank) {
        subtract_low_rank(x, low_.data(), pass_.basis, q, c, rank, rest_.data());
        if (pass_.noise)
          round_group<true>(group, rest_.data(), pass_.weights + c, group, errors, pass_.noise + c);
        else
          round_group(group, rest_.data(), pass_.weights + c, group, errors);
      }
      if (pass_.step) multiply(group, {pass_.basis + c * q, q, 1}, kGroup, seen_.data(), q, c > 0);
    }
    if (pass_.step) add_image(image);
    return static_cast<double>(simd::reduce_add(simd::add(errors[0], errors[1])));
  }

 private:
  // E^T seen: rows are lines again, so that lanes are columns.
  void add_image(float* image) const {
    const int64_t k = pass_.w.k;
    for (int64_t c = 0; c < k; c += kRows) {
      for (int64_t first = 0; first < kRows; first += kLanes)
        for (int v = 0; v < kVectors; ++v) {
          F32 square[kLanes];
          for (int i = 0; i < kLanes; ++i) square[i] = simd::load_f32(x_.data() + (c + first + i) * kRows + v * kLanes);
          simd::transpose(square);
          for (int i = 0; i < kLanes; ++i) simd::store_f32(lines_.data() + (v * kLanes + i) * kRows + first, square[i]);
        }
      multiply(lines_.data(), {seen_.data(), 1, kRows}, kRows, image + c * pass_.columns, pass_.columns, true);
    }
  }

  const Pass& pass_;
  const Room x_, low_, seen_, rest_, lines_;
};

// ---- rows beside the low rank --------------------------------------------------------------------------------------

struct Rows {
  Matrix w;
  const float *smooth, *weights;      // of columns
  const float *basis, *solve, *down;  // [K, rank]
  int64_t rank, turns;
  const float *factors, *searched;  // [count] of scales to try; the weights [K] of errors in doing so
  int64_t count;
  int dtype;                     // of up and scale
  void *up, *scale;              // [n, rank], [K/64, n]
  uint8_t* codes;                // [n, K/2], or null: only scales are wanted
  const float* given = nullptr;  // [n, rank] instead of an `up` that is fitted and stored
};

class RowsPiece {
 public:
  explicit RowsPiece(const Rows& rows)
      : rows_(rows),
        x_(rows.w.k * kRows),
        up_(rows.rank * kRows),
        tried_(rows.rank * kRows),
        next_(rows.rank * kRows),
        rest_(kGroup * kRows),
        left_(kGroup * kRows) {}

  // Whether the factors and scales are finite.
  template <int kDtype>
  bool run(int64_t row) {
    const auto count = static_cast<int>(std::min<int64_t>(kRows, rows_.w.n - row));
    bool finite = true;
    if (rows_.given) {
      take_up(row, count);
    } else {
      turn_rows<kDtype>(rows_.w, row, rows_.smooth, x_.data());
      fit();
      finite = store_up(row, count);
    }
    turn_rows<kDtype>(rows_.w, row, nullptr, x_.data());
    for (int64_t c = 0; c < rows_.w.k; c += kGroup) finite &= encode(row, count, c);
    return finite;
  }

 private:
  // Least squares and rounding alternate; of all factors, as they are stored, the best ones are kept, row by row.
  void fit() {
    using namespace simd;
    const int64_t k = rows_.w.k, rank = rows_.rank;
    Lanes least;
    for (auto& lane : least) lane = as_f32(set1_i32(kInfinityBits));
    for (int64_t c = 0; c < k; c += kGroup) project(x_.data() + c * kRows, c);
    for (int64_t turn = 0; turn <= rows_.turns; ++turn) {
      for (int64_t i = 0; i < rank * kRows; i += kLanes)
        store_f32(tried_.data() + i, as_stored(load_f32(next_.data() + i)));
      Lanes errors = {zero_f32(), zero_f32()};
      for (int64_t c = 0; c < k; c += kGroup) {
        subtract_low_rank(x_.data(), tried_.data(), rows_.basis, rank, c, rank, rest_.data());
        round_group(x_.data() + c * kRows, rest_.data(), rows_.weights + c, left_.data(), errors);
        if (turn < rows_.turns) project(left_.data(), c);
      }
      for (int v = 0; v < kVectors; ++v) {
        const Mask better = less(errors[v], least[v]);
        least[v] = select(better, errors[v], least[v]);
        for (int64_t i = v * kLanes; i < rank * kRows; i += kRows)
          store_f32(up_.data() + i, turn ? select(better, load_f32(tried_.data() + i), load_f32(up_.data() + i))
                                         : load_f32(tried_.data() + i));
      }
    }
  }

  void project(const float* group, int64_t c) {
    multiply(group, {rows_.solve + c * rows_.rank, rows_.rank, 1}, kGroup, next_.data(), rows_.rank, c > 0);
  }

  F32 as_stored(F32 exact) const {
    alignas(64) unsigned char room[4 * kLanes];
    simd::store_from_f32(room, 0, exact, rows_.dtype);
    return simd::load_as_f32(room, 0, rows_.dtype);
  }

  bool store_up(int64_t row, int count) const {
    bool finite = true;
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < rows_.rank; ++r) {
        const float value = up_.data()[r * kRows + i];
        finite &= std::isfinite(value);
        Stored(value, rows_.dtype).put(rows_.up, (row + i) * rows_.rank + r, rows_.dtype);
      }
    return finite;
  }

  void take_up(int64_t row, int count) const {
    std::fill_n(up_.data(), rows_.rank * kRows, 0.0f);
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < rows_.rank; ++r) up_.data()[r * kRows + i] = rows_.given[(row + i) * rows_.rank + r];
  }

  // The residual's scale and codes in the group from column c on.
  bool encode(int64_t row, int count, int64_t c) {
    using namespace simd;
    subtract_low_rank(x_.data(), up_.data(), rows_.down, rows_.rank, c, rows_.rank, rest_.data());
    for (int64_t i = 0; i < kGroup; ++i)
      for (int64_t at = i * kRows; at < (i + 1) * kRows; at += kLanes)
        store_f32(rest_.data() + at, mul(load_f32(rest_.data() + at), set1_f32(rows_.smooth[c + i])));
    bool finite = true;
    for (int v = 0; v < kVectors && v * kLanes < count; ++v) {
      const F32 scale = chosen_scale(v, c);
      const int some = std::min(count - v * kLanes, kLanes);
      alignas(64) float scales[kLanes];
      store_f32(scales, scale);
      for (int i = 0; i < some; ++i) {
        finite &= std::isfinite(scales[i]);
        Stored(scales[i], rows_.dtype).put(rows_.scale, c / kGroup * rows_.w.n + row + v * kLanes + i, rows_.dtype);
      }
      if (rows_.codes) store_codes(Divisor(scale), v, row, some, c);
    }
    return finite;
  }

  // absmax / 7, or of it and scales that put the largest value beyond or short of code -8 the one with the least error.
  F32 chosen_scale(int v, int64_t c) const {
    using namespace simd;
    const float* rest = rest_.data() + v * kLanes;
    F32 low = load_f32(rest), high = low;
    for (int64_t i = 1; i < kGroup; ++i) {
      low = min(low, load_f32(rest + i * kRows));
      high = max(high, load_f32(rest + i * kRows));
    }
    const F32 least = sub(zero_f32(), low), floor = set1_f32(kMinScale);
    F32 best = as_stored(max(div(max(least, high), set1_f32(kMost)), floor));
    if (!rows_.count) return best;
    const F32 to_lowest = div(select(less(least, high), high, low), set1_f32(kLowest));
    F32 error = error_of(rest, best, c);
    for (int64_t i = 0; i < rows_.count; ++i) {
      const F32 wanted = mul(to_lowest, set1_f32(rows_.factors[i]));
      const F32 scale = as_stored(select(less(abs(wanted), floor), floor, wanted));
      const F32 found = error_of(rest, scale, c);
      const Mask better = less(found, error);
      best = select(better, scale, best);
      error = select(better, found, error);
    }
    return best;
  }

  F32 error_of(const float* rest, F32 scale, int64_t c) const {
    using namespace simd;
    const F32 inverse = div(set1_f32(1.0f), scale), low = set1_f32(kLowest), high = set1_f32(kMost);
    F32 sums[2] = {zero_f32(), zero_f32()};
    for (int64_t i = 0; i < kGroup; i += 2)
      for (int j = 0; j < 2; ++j) {
        const F32 miss = integer_miss(mul(load_f32(rest + (i + j) * kRows), inverse), low, high);
        sums[j] = fma(mul(miss, set1_f32(rows_.searched[c + i + j])), miss, sums[j]);
      }
    return mul(add(sums[0], sums[1]), mul(scale, scale));
  }

  void store_codes(const Divisor& by, int v, int64_t row, int count, int64_t c) const {
    using namespace simd;
    if (count <= 0) return;
    alignas(64) uint32_t words[kGroup / 8][kLanes];
    for (int64_t word = 0; word < kGroup / 8; ++word) {
      I32 packed = zero_i32();
      for_each_place<8>([&](auto place) {
        constexpr int kAt = decltype(place)::value;
        const F32 value = by(load_f32(rest_.data() + (8 * word + kAt) * kRows + v * kLanes));
        const I32 code = bit_and(integer_codes(value, kLowest, kMost), set1_i32(15));
        packed = bit_or(packed, shift_left<4 * kAt>(code));
      });
      store_i32(words[word], packed);
    }
    for (int i = 0; i < count; ++i) {
      uint8_t* to = rows_.codes + (row + v * kLanes + i) * (rows_.w.k / 2) + c / 2;
      for (int64_t word = 0; word < kGroup / 8; ++word) std::memcpy(to + 4 * word, &words[word][i], 4);
    }
  }

  const Rows& rows_;
  const Room x_, up_, tried_, next_, rest_, left_;
};

bool run_rows(const Rows& rows, int threads) {
  const int64_t pieces = (rows.w.n + kRows - 1) / kRows,
                run = std::max<int64_t>(1, std::min<int64_t>(8, pieces / (4 * threads)));
  std::atomic<bool> finite{true};
  with_dtype(rows.w.dtype, [&](auto known) {
    parallel_for((pieces + run - 1) / run, threads, [&](int64_t task) {
      RowsPiece piece(rows);
      for (int64_t i = task * run; i < std::min(pieces, (task + 1) * run); ++i)
        if (!piece.run<known.value>(i * kRows)) finite = false;
    });
  });
  return finite;
}

}  // namespace

// image: [K, columns], where `step`; error: one number. room: [slabs, K * columns]. Each slab is a run of rows, however
// many threads there are, and what they give is added up in their order.
void svdquant_pass(Ptr<const void> w, int dtype, int64_t n, int64_t k, Ptr<const float> factors,
                   Ptr<const float> weights, Ptr<const float> noise, Ptr<const float> basis, int64_t columns,
                   int64_t rank, bool step, int64_t slabs, Ptr<float> room, Ptr<float> image, Ptr<double> error,
                   int threads) {
  const Pass pass{{w, dtype, n, k}, factors, weights, noise, basis, columns, rank, step};
  const int64_t rows = round_up((n + slabs - 1) / slabs, kRows);
  std::vector<double> errors(static_cast<size_t>(slabs), 0.0);
  with_dtype(dtype, [&](auto known) {
    parallel_for(slabs, threads, [&](int64_t slab) {
      float* sums = room + slab * columns * k;
      if (step) std::fill_n(sums, columns * k, 0.0f);
      PassPiece piece(pass);
      for (int64_t row = slab * rows; row < std::min(n, (slab + 1) * rows); row += kRows)
        errors[static_cast<size_t>(slab)] += piece.run<known.value>(row, sums);
    });
  });
  error[0] = std::accumulate(errors.begin(), errors.end(), 0.0);
  if (!step) return;
  parallel_for(k / kRows, threads, [&](int64_t block) {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t c = 0; c < kRows; c += kLanes) {
        const int64_t at = (block * columns + j) * kRows + c;
        F32 sum = simd::load_f32(room + at);
        for (int64_t slab = 1; slab < slabs; ++slab)
          sum = simd::add(sum, simd::load_f32(room + slab * columns * k + at));
        alignas(64) float lanes[kLanes];
        simd::store_f32(lanes, sum);
        for (int i = 0; i < kLanes; ++i) image[(block * kRows + c + i) * columns + j] = lanes[i];
      }
  });
}

// False: factors or scales are not finite.
bool svdquant_rows(Ptr<const void> w, int dtype, int64_t n, int64_t k, Ptr<const float> smooth,
                   Ptr<const float> weights, Ptr<const float> basis, Ptr<const float> solve, Ptr<const float> down,
                   int64_t rank, int64_t turns, Ptr<const float> factors, Ptr<const float> searched, int64_t count,
                   int stored, Ptr<void> up, Ptr<void> scale, Ptr<uint8_t> codes, int threads) {
  return run_rows({{w, dtype, n, k},
                   smooth,
                   weights,
                   basis,
                   solve,
                   down,
                   rank,
                   turns,
                   factors,
                   searched,
                   count,
                   stored,
                   up,
                   scale,
                   codes},
                  threads);
}

// Only the scales, beside factors up [n, rank] that are known. False: scales are not finite.
bool svdquant_scales(Ptr<const float> w, int64_t n, int64_t k, Ptr<const float> smooth, Ptr<const float> down,
                     Ptr<const float> up, int64_t rank, Ptr<const float> factors, Ptr<const float> searched,
                     int64_t count, int stored, Ptr<void> scale, int threads) {
  const Matrix rows{w, kFloat32, n, k};
  return run_rows({rows, smooth, nullptr, nullptr, nullptr, down, rank, 0, factors, searched, count, stored, nullptr,
                   scale, nullptr, up},
                  threads);
}

void bind_quantize_svdquant_w4a4(nb::module_& m) {
  m.def("svdquant_pass", &svdquant_pass, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("dtype"),
        nb::arg("n"), nb::arg("k"), nb::arg("factors"), nb::arg("weights"), nb::arg("noise"), nb::arg("basis"),
        nb::arg("columns"), nb::arg("rank"), nb::arg("step"), nb::arg("slabs"), nb::arg("room"), nb::arg("image"),
        nb::arg("error"), nb::arg("threads"));
  m.def("svdquant_rows", &svdquant_rows, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("dtype"),
        nb::arg("n"), nb::arg("k"), nb::arg("smooth"), nb::arg("weights"), nb::arg("basis"), nb::arg("solve"),
        nb::arg("down"), nb::arg("rank"), nb::arg("turns"), nb::arg("factors"), nb::arg("searched"), nb::arg("count"),
        nb::arg("stored"), nb::arg("up"), nb::arg("scale"), nb::arg("codes"), nb::arg("threads"));
  m.def("svdquant_scales", &svdquant_scales, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("n"),
        nb::arg("k"), nb::arg("smooth"), nb::arg("down"), nb::arg("up"), nb::arg("rank"), nb::arg("factors"),
        nb::arg("searched"), nb::arg("count"), nb::arg("stored"), nb::arg("scale"), nb::arg("threads"));
}

}  // namespace lowbit
