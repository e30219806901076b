// linear for int8: activations become int8, too (int8_gemm.h), or the weight alone is coded.
//
// In the layout rows16 a word is four columns of a row. Plain codes are put in that order a few blocks at a time, in
// the cache. A scale is one of all rows, one a row, or one a tile of rows and columns.
#include "native/bind.h"
#include "native/int8_gemm.h"
#include "native/transpose.h"

namespace lowbit {
namespace {

using namespace simd;

enum Granularity : int { kTensor = 0, kRow = 1, kTile = 2 };

struct Int8Weight {
  const uint32_t* words;  // [blocks, stride]: k / 4 words of 16 rows, and what fills up; plain: [n, stride]
  int64_t stride;
  bool plain;
  // One; [blocks, 16]; or [ceil(n / tile_rows), tiles of columns], in rows16 [blocks, tiles, 16] where a tile is a row.
  const float* scales;
  int granularity;
  int64_t n, k, tile_rows, tile;  // tile: columns; k but for kTile

  int64_t room(int64_t blocks) const { return plain ? blocks * kBlockRows * (k / 4) : 0; }
  Int8Blocks open(int64_t first, int64_t last, uint32_t* to) const {
    if (!plain) return {words + first * stride, stride, first};
    const int64_t across = k / 4;
    for (int64_t block = first; block < last; ++block) {
      const uint32_t* rows[kBlockRows];  // the last one for those that are not there: nobody stores their sums
      for (int r = 0; r < kBlockRows; ++r) rows[r] = words + std::min(block * kBlockRows + r, n - 1) * stride;
      uint32_t* at = to + (block - first) * across * kBlockRows;
      int64_t word = 0;
      for (; word + 4 <= across; word += 4) interleave_words(rows, word, at + word * kBlockRows);
      for (; word < across; ++word)
        for (int r = 0; r < kBlockRows; ++r) std::memcpy(at + word * kBlockRows + r, rows[r] + word, 4);
    }
    return {to, across * kBlockRows, first};
  }

  F32 scale(int64_t block, int64_t column_tile, int v) const {
    if (granularity == kTensor) return set1_f32(scales[0]);
    const int64_t tiles = (k + tile - 1) / tile, row = block * kBlockRows + v * kLanes;
    if (granularity == kRow) {
      if (!plain || row + kLanes <= n) return load_f32(scales + row);
      return load_first(scales, row, static_cast<int>(std::max<int64_t>(n - row, 0)), kFloat32);
    }
    if (tile_rows == 1 && !plain) return load_f32(scales + (block * tiles + column_tile) * kBlockRows + v * kLanes);
    if (tile_rows % kBlockRows == 0) return set1_f32(scales[row / tile_rows * tiles + column_tile]);
    alignas(64) float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = scales[std::min(row + i, n - 1) / tile_rows * tiles + column_tile];
    return load_f32(lanes);
  }

  struct Few {
    Room x;  // [m, k]

    Few(const Int8Weight& w, const Activations& from, int threads) : x(from.m * w.k) {
      parallel_for(from.m, from.m > 1 ? threads : 1, [&](int64_t m) { row_to_f32(from, m, x.data() + m * w.k); });
    }
  };

  template <int kColumn>
  static F32 column(I32 word) {
    return to_f32(shift_right_signed<24>(shift_left<24 - 8 * kColumn>(word)));
  }

  template <int kTokens>
  void multiply(int64_t block, const Few& few, int64_t token, F32 (&sums)[kTokens][kBlockVectors]) const {
    // Independent sums, so that one multiplication need not wait for the last.
    constexpr int kChains = kTokens * kBlockVectors >= 8 ? 1 : kTokens * kBlockVectors >= 4 ? 2 : 4;
    const uint32_t* word = words + block * stride;
    const float* x = few.x.data() + token * k;
    for (auto& row : sums)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t first = 0, at = 0; first < k; first += tile, ++at) {
      F32 acc[kTokens][kBlockVectors][kChains];
      for (auto& row : acc)
        for (auto& lanes : row)
          for (auto& sum : lanes) sum = zero_f32();
      for (int64_t c = first; c < std::min(first + tile, k); c += 4, word += kBlockRows) {
        I32 codes[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) codes[v] = load_i32(word + v * kLanes);
        for_each_place<4>([&](auto place) {
          constexpr int j = decltype(place)::value;
          F32 token_x[kTokens];
          for (int t = 0; t < kTokens; ++t) token_x[t] = set1_f32(x[t * k + c + j]);
          for (int v = 0; v < kBlockVectors; ++v) {
            const F32 q = column<j>(codes[v]);
            for (int t = 0; t < kTokens; ++t) acc[t][v][j % kChains] = fma(q, token_x[t], acc[t][v][j % kChains]);
          }
        });
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 factor = scale(block, at, v);
        for (int t = 0; t < kTokens; ++t) {
          F32 dot = acc[t][v][0];
          for (int i = 1; i < kChains; ++i) dot = add(dot, acc[t][v][i]);
          sums[t][v] = fma(factor, dot, sums[t][v]);
        }
      }
    }
  }

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    const uint32_t* word = words + block * stride + first / 4 * kBlockRows;
    F32 factors[kBlockVectors];
    int64_t tile_end = first;
    for (int64_t c = first; c < last; c += 4, word += kBlockRows) {
      if (c >= tile_end) {
        for (int v = 0; v < kBlockVectors; ++v) factors[v] = scale(block, c / tile, v);
        tile_end = (c / tile + 1) * tile;
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        const I32 codes = load_i32(word + v * kLanes);
        for_each_place<4>([&](auto place) {
          constexpr int j = decltype(place)::value;
          store_f32(panel + (c - first + j) * kPanelRows + v * kLanes, mul(column<j>(codes), factors[v]));
        });
      }
    }
  }
};

}  // namespace

// Which way a call goes; the launcher knows from how many tokens on which is the faster one.
enum Int8Way : int { kBytes = 0, kPairs = 1, kRegisters = 2, kPanels = 3 };  // the last two keep x as it is

void linear_int8(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint32_t> words,
                 int64_t stride, bool plain, Ptr<const float> scales, int granularity, int64_t tile_rows,
                 int64_t tile_columns, int64_t rotation, Ptr<const void> bias, int bias_dtype, Ptr<void> out,
                 int out_dtype, int way, int threads) {
  const int64_t tile = granularity == kTile ? tile_columns : k;
  const Int8Weight weight{words, stride, plain, scales, granularity, n, k, tile_rows, tile};
  const Activations from{x, x_dtype, m, k};
  const Output to{out, out_dtype, bias, bias_dtype};
  if (way == kBytes || way == kPairs) return int8_gemm(weight, from, rotation, to, way == kBytes ? m : 0, threads);
  auto multiply = [&](const Activations& rows) {
    way == kRegisters ? gemm_few(weight, rows, to, threads) : gemm_many(weight, rows, to, threads);
  };
  if (!rotation) return multiply(from);
  Room rotated(m * k);
  parallel_for(m, threads, [&](int64_t row) {
    row_to_f32(from, row, rotated.data() + row * k);
    rotate_groups(rotated.data() + row * k, k, rotation);
  });
  multiply({rotated.data(), kFloat32, m, k});
}

void bind_linear_int8(nb::module_& m) {
  m.def("linear_int8", &linear_int8, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("words"), nb::arg("stride"), nb::arg("plain"),
        nb::arg("scales"), nb::arg("granularity"), nb::arg("tile_rows"), nb::arg("tile_columns"), nb::arg("rotation"),
        nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"), nb::arg("out_dtype"), nb::arg("way"),
        nb::arg("threads"));
}

}  // namespace lowbit
