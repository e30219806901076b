// dequantize for svdquant_w4a4: w = codes * scale / smooth + proj_up proj_down^T in float32, rounded once.
//
// Nearly all of the time goes into the low-rank product: 32 multiplications a weight, beside a handful for its code. So
// it is blocked as a product is: proj_down lies in panels of a few columns whose rows of all ranks a loop goes through
// with a tile of sums in registers, and a group of 64 columns stays in the first-level cache for all rows of a task.
// The sums of a tile are finished while they are in that cache, too, and each weight is written once.
#include "native/bind.h"
#include "native/coded_rows.h"

namespace lowbit {
namespace {

using simd::F32;
using simd::kLanes;

constexpr int64_t kGroup = 64;
#if defined(LOWBIT_ISA_AVX512)
constexpr int kRows = 6, kVectors = 4;  // of a tile: 24 sums, 4 columns and a row in 32 registers
#elif defined(LOWBIT_ISA_NEON)
constexpr int kRows = 6, kVectors = 4;
#elif defined(LOWBIT_ISA_AVX2)
constexpr int kRows = 6, kVectors = 2;  // 12 sums, 2 columns and a row in 16 registers
#else
constexpr int kRows = 3, kVectors = 4;
#endif
constexpr int64_t kColumns = kVectors * kLanes;  // of a panel
static_assert(kGroup % kColumns == 0, "a group is whole panels");
constexpr int64_t kTaskRows = 48;  // that share one pass over proj_down, which comes from the second-level cache

struct Svdquant {
  int64_t n, k, rank;
  const uint8_t* codes;  // [n, k / 2], the even column in the low nibble
  const void* scales;    // [k / 64, n], `scale_stride` elements from a group to the next
  int64_t scale_stride;
  int scale_dtype;
  const void* smooth;  // [k]
  int smooth_dtype;
  const void* down;  // [k, rank]
  int down_dtype;
  const void* up;  // [n, rank]
  int up_dtype;
};

// Values first .. first + count of a part as float32, to[0..count).
void copy_values(const void* from, int64_t first, int64_t count, int dtype, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) simd::store_f32(to + i, simd::load_as_f32(from, first + i, dtype));
  if (const int rest = static_cast<int>(count - i); rest > 0)
    store_first(to, i, rest, load_first(from, first + i, rest, dtype), kFloat32);
}

// 64 columns of proj_down from column c on -> [64 / kColumns][rank][kColumns].
void pack_down(const Svdquant& w, int64_t c, float* to) {
  using namespace simd;
  for (int64_t r = 0; r < w.rank; r += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, w.rank - r));
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      F32 square[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        const int64_t at = (c + i + j) * w.rank + r;
        square[j] =
            count == kLanes ? load_as_f32(w.down, at, w.down_dtype) : load_first(w.down, at, count, w.down_dtype);
      }
      transpose(square);
      float* panel = to + i / kColumns * kColumns * w.rank + i % kColumns;
      for (int j = 0; j < count; ++j) store_f32(panel + (r + j) * kColumns, square[j]);
    }
  }
}

// to[t][column] = the sum over r of up[r][t] * panel[r][column]; `to` has kGroup values in a row.
template <int kCount>
__attribute__((noinline)) void multiply_panel(const float* up, const float* panel, int64_t rank, float* to) {
  using namespace simd;
  F32 sums[kCount][kVectors];
  // Numbered when compiling: of loops that are unrolled later, GCC keeps the sums in memory before and after the next.
  const auto for_each_sum = [&](auto&& f) {
    for_each_place<kCount>([&](auto t) { for_each_place<kVectors>([&](auto v) { f(t, v); }); });
  };
  for_each_sum([&](auto t, auto v) { sums[t][v] = zero_f32(); });
  for (int64_t r = 0; r < rank; ++r) {
    F32 down[kVectors];
    for_each_place<kVectors>([&](auto v) { down[v] = load_f32(panel + r * kColumns + v * kLanes); });
    for_each_sum([&](auto t, auto v) { sums[t][v] = fma(set1_f32(up[r * kCount + t]), down[v], sums[t][v]); });
  }
  for_each_sum([&](auto t, auto v) { store_f32(to + t * kGroup + v * kLanes, sums[t][v]); });
}

// The same for the 64 columns of a group and a tile of so many rows.
template <int kCount = kRows>
void multiply_group(int64_t count, const float* up, const float* group, int64_t rank, float* to) {
  if constexpr (kCount > 1) {
    if (count < kCount) return multiply_group<kCount - 1>(count, up, group, rank, to);
  }
  for (int64_t c = 0; c < kGroup; c += kColumns) multiply_panel<kCount>(up, group + c * rank, rank, to + c);
}

// One row of a group: the decoded residual is added to the sums. factors: what it is multiplied with, or divided by.
template <int kDtype, bool kDivides>
void finish_group(const uint8_t* codes, float scale, const float* factors, const float* sums, void* out, int64_t at) {
  using namespace simd;
  const F32 by = set1_f32(scale);
  __builtin_prefetch(codes + kGroup);  // of the next groups: a row's lines are too far apart to be seen coming
  for (int64_t c = 0; c < kGroup; c += 16) {
    detail::Row16 values;
    detail::load_codes<Codec::kInt4>(codes + c / 2, values);
    for (int v = 0; v < kBlockVectors; ++v) {
      const F32 value = mul(values[v], by), factor = load_f32(factors + c + v * kLanes);
      const F32 sum = load_f32(sums + c + v * kLanes);
      values[v] = kDivides ? add(div(value, factor), sum) : fma(value, factor, sum);
    }
    if constexpr (kDtype == kBfloat16) {
      store16_bf16(static_cast<uint16_t*>(out) + at + c, values);
    } else {
      for (int v = 0; v < kBlockVectors; ++v) store_from_f32(out, at + c + v * kLanes, values[v], kDtype);
    }
  }
}

// Rows [first, first + rows), at most kTaskRows of them, with the packed proj_down and the factors of all columns.
template <int kDtype, bool kDivides>
void decode_rows_of(const Svdquant& w, int64_t first, int64_t rows, const float* down, const float* factors,
                    void* out) {
  const int64_t tiles = (rows + kRows - 1) / kRows, groups = w.k / kGroup;
  const Room up_room(rows * w.rank), line(w.rank), scale_room(groups * rows), sums_room(kRows * kGroup);
  float *up = up_room.data(), *scales = scale_room.data(), *sums = sums_room.data();
  const auto begin = [&](int64_t tile) { return rows * tile / tiles; };
  for (int64_t tile = 0; tile < tiles; ++tile) {  // each as [rank][its rows]
    const int64_t count = begin(tile + 1) - begin(tile);
    for (int64_t t = 0; t < count; ++t) {
      copy_values(w.up, (first + begin(tile) + t) * w.rank, w.rank, w.up_dtype, line.data());
      for (int64_t r = 0; r < w.rank; ++r) up[begin(tile) * w.rank + r * count + t] = line.data()[r];
    }
  }
  for (int64_t g = 0; g < groups; ++g)
    copy_values(w.scales, g * w.scale_stride + first, rows, w.scale_dtype, scales + g * rows);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = begin(tile), count = begin(tile + 1) - row;
      multiply_group(count, up + row * w.rank, down + g * kGroup * w.rank, w.rank, sums);
      for (int64_t t = row; t < row + count; ++t)
        finish_group<kDtype, kDivides>(w.codes + (first + t) * (w.k / 2) + g * (kGroup / 2), scales[g * rows + t],
                                       factors + g * kGroup, sums + (t - row) * kGroup, out,
                                       (first + t) * w.k + g * kGroup);
    }
}

// What a column is multiplied with, 1 / smooth, and true; where that is not as exact as a division, what it is divided
// by, and false. A factor of 0 switches its column off.
bool column_factors(const Svdquant& w, float* to) {
  copy_values(w.smooth, 0, w.k, w.smooth_dtype, to);
  const auto inexact = [](float factor) {
    const float size = std::abs(factor), inverse = 1.0f / size;
    return size != 0.0f && std::isfinite(size) && (!std::isfinite(inverse) || inverse < 0x1p-126f);
  };
  const bool divides = std::any_of(to, to + w.k, inexact);
  for (int64_t c = 0; c < w.k; ++c) {
    const float factor = to[c] == 0.0f ? HUGE_VALF : to[c];
    to[c] = divides ? factor : 1.0f / factor;
  }
  return !divides;
}

}  // namespace

// -> out [n, k] of a dtype.
void dequantize_svdquant_w4a4(int64_t n, int64_t k, int64_t rank, Ptr<const uint8_t> codes, Ptr<const void> scales,
                              int64_t scale_stride, int scale_dtype, Ptr<const void> smooth, int smooth_dtype,
                              Ptr<const void> down, int down_dtype, Ptr<const void> up, int up_dtype, Ptr<void> out,
                              int dtype, int threads) {
  const Svdquant w{n,    k,          rank, codes,   scales, scale_stride, scale_dtype, smooth, smooth_dtype,
                   down, down_dtype, up,   up_dtype};
  const Room packed(k * rank), factors(k);
  parallel_for(k / kGroup, k * rank >= 32768 ? threads : 1,
               [&](int64_t group) { pack_down(w, group * kGroup, packed.data() + group * kGroup * rank); });
  const bool multiplies = column_factors(w, factors.data());
  const int64_t share = (n + threads - 1) / std::max(threads, 1);
  const int64_t run = std::max<int64_t>(1, std::min(kTaskRows, (share + kRows - 1) / kRows * kRows));
  with_dtype(dtype, [&](auto known) {
    parallel_for((n + run - 1) / run, threads, [&](int64_t task) {
      const int64_t first = task * run, rows = std::min(run, n - first);
      if (multiplies) {
        decode_rows_of<known.value, false>(w, first, rows, packed.data(), factors.data(), out);
      } else {
        decode_rows_of<known.value, true>(w, first, rows, packed.data(), factors.data(), out);
      }
    });
  });
}

void bind_dequantize_svdquant_w4a4(nb::module_& m) {
  m.def("dequantize_svdquant_w4a4", &dequantize_svdquant_w4a4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("n"),
        nb::arg("k"), nb::arg("rank"), nb::arg("codes"), nb::arg("scales"), nb::arg("scale_stride"),
        nb::arg("scale_dtype"), nb::arg("smooth"), nb::arg("smooth_dtype"), nb::arg("down"), nb::arg("down_dtype"),
        nb::arg("up"), nb::arg("up_dtype"), nb::arg("out"), nb::arg("dtype"), nb::arg("threads"));
}

}  // namespace lowbit
