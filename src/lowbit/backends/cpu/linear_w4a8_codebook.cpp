// linear for w4a8_codebook: rows of the rotated activations become int8, codes the int8 that they stand for, some
// blocks of rows at a time and in the cache; the product is exact (native/int8_gemm.h).
#include "native/bind.h"
#include "native/codebook_rows.h"
#include "native/int8_gemm.h"

namespace lowbit {
namespace {

using namespace simd;

struct ExpandedWeight {
  const CodebookRows& rows;
  int64_t n, k, tile;

  int64_t room(int64_t blocks) const { return blocks * kBlockRows * (k / 4); }

  Int8Blocks open(int64_t first, int64_t last, uint32_t* to) const {
    const int64_t size = k / 4 * kBlockRows;
    for (int64_t block = first; block < last; ++block) {
      uint32_t* words = to + (block - first) * size;
      const int64_t done = rows.has_values() ? transpose_values(block, words) : 0;
      if (done < k) expand(block, done, words);
    }
    return {to, size, first};
  }

  // The last row for those that are not there: nobody stores their sums.
  int64_t row_of(int64_t block, int r) const { return std::min(block * kBlockRows + r, n - 1); }

  // The columns that fill whole vectors; returns how many they are.
  int64_t transpose_values(int64_t block, uint32_t* words) const {
    const int64_t end = k / CodebookRows::kValues * CodebookRows::kValues;
    const uint8_t* tables = rows.tables();
    for (int first = 0; first < kBlockRows; first += kLanes) {
      CodebookRows::Place places[kLanes];
      for (int r = 0; r < kLanes; ++r) places[r] = rows.place(row_of(block, first + r));
      for (int64_t c = 0; c < end; c += CodebookRows::kValues) {
        F32 square[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          square[r] = as_f32(as_i32(CodebookRows::values(tables, places[r])));
          places[r].advance();
        }
        transpose(square);
        for (int w = 0; w < kLanes; ++w) store_i32(words + (c / 4 + w) * kBlockRows + first, as_i32(square[w]));
      }
    }
    return end;
  }

  // Columns [begin, k), a piece at a time.
  void expand(int64_t block, int64_t begin, uint32_t* words) const {
    const int64_t group = rows.weight().group, piece = std::max<int64_t>(group, 1024 / group * group);
    const int64_t width = piece + CodebookRows::kPad;
    const Room room(width / 4 * (kBlockRows + 1) + 16);
    auto* codes = reinterpret_cast<uint8_t*>(room.data());
    const uint8_t* at[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) at[r] = codes + (r + 1) * width;
    for (int64_t c = begin; c < k; c += piece) {
      const int64_t end = std::min(c + piece, k);
      for (int r = 0; r < kBlockRows; ++r)
        rows.expand(row_of(block, r), c, end, codes, reinterpret_cast<int8_t*>(codes + (r + 1) * width));
      for (int64_t byte = 0; byte < end - c; byte += 16)
        interleave_words(at, byte, words + (c + byte) / 4 * kBlockRows);
    }
  }

  F32 scale(int64_t block, int64_t, int v) const {
    const int64_t row = block * kBlockRows + v * kLanes;
    if (row + kLanes <= n) return load_f32(rows.weight().rows + row);
    return load_first(rows.weight().rows, row, static_cast<int>(std::max<int64_t>(n - row, 0)), kFloat32);
  }
};

// ---- few tokens: rows as they lie
// ------------------------------------------------------------------------------------

// A row's products are added up along its columns, so that nothing has to change places.
#if defined(LOWBIT_ISA_AVX512)
constexpr int kRowTokens = 12;
template <int kTokens>
constexpr int kTogether = kTokens <= 8 ? 2 : 1;  // 16 sums, and what decodes two rows, in 32 registers
#else
constexpr int kRowTokens = 4;
template <int kTokens>
constexpr int kTogether = 1;
#endif

// sums[token][row] of kTogether rows with all tokens, x: [kTokens, width], over `columns` that fill whole vectors.
template <int kTokens>
__attribute__((noinline)) void dot_rows(const uint8_t* tables, CodebookRows::Place (&places)[kTogether<kTokens>],
                                        const int8_t* x, int64_t width, int64_t columns,
                                        I32 (&found)[kTokens][kTogether<kTokens>]) {
  I32 sums[kTokens][kTogether<kTokens>];
  for (auto& of_token : sums)
    for (auto& sum : of_token) sum = zero_i32();
  CodebookRows::Place at[kTogether<kTokens>];
  for (int r = 0; r < kTogether<kTokens>; ++r) at[r] = places[r];
  for (const int8_t* const end = x + columns; x != end; x += CodebookRows::kValues) {
    Weights8 weights[kTogether<kTokens>];
    for (int r = 0; r < kTogether<kTokens>; ++r) {
      ask_ahead(at[r].codes);
      weights[r] = prepare8(CodebookRows::values(tables, at[r]));
      at[r].advance();
    }
    for (int t = 0; t < kTokens; ++t) {
      const Bytes q = load_bytes(x + t * width);
      for (int r = 0; r < kTogether<kTokens>; ++r) sums[t][r] = dot8(sums[t][r], weights[r], q);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kTogether<kTokens>; ++r) found[t][r] = sums[t][r];
}

// dots[token][row]: rows [row, row + kTogether) of a block.
template <int kTokens>
void dot_rows_of(const ExpandedWeight& w, int64_t block, int row, const int8_t* x, int64_t width,
                 const Int8Tokens& tokens, int32_t* dots) {
  constexpr int64_t kStep = CodebookRows::kValues;
  const int64_t whole = w.k / kStep * kStep;
  CodebookRows::Place places[kTogether<kTokens>];
  for (int r = 0; r < kTogether<kTokens>; ++r) places[r] = w.rows.place(w.row_of(block, row + r));
  I32 sums[kTokens][kTogether<kTokens>];
  dot_rows<kTokens>(w.rows.tables(), places, x, width, whole, sums);
  if (whole < w.k)
    for (int r = 0; r < kTogether<kTokens>; ++r) {  // zeros of x are behind its end
      alignas(64) uint8_t codes[kStep + CodebookRows::kPad];
      alignas(64) int8_t values[kStep + CodebookRows::kPad] = {};
      w.rows.expand(w.row_of(block, row + r), whole, w.k, codes, values);
      const Weights8 weights = prepare8(load_bytes(values));
      for (int t = 0; t < kTokens; ++t) sums[t][r] = dot8(sums[t][r], weights, load_bytes(x + t * width + whole));
    }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kTogether<kTokens>; ++r)
      // Both may leave int32 where their difference does not.
      dots[t * kBlockRows + row + r] =
          static_cast<int32_t>(static_cast<uint32_t>(reduce_add(sums[t][r])) -
                               static_cast<uint32_t>(kDot8Offset) * static_cast<uint32_t>(tokens.sums[t]));
}

template <int kTokens>
void product_of_rows(const ExpandedWeight& w, const Int8Tokens& tokens, const Output& out, int threads) {
  constexpr int64_t kStep = CodebookRows::kValues;
  const int64_t width = (w.k + kStep - 1) / kStep * kStep, blocks = (w.n + kBlockRows - 1) / kBlockRows;
  const Room room(kTokens * width / 4);
  auto* x = reinterpret_cast<int8_t*>(room.data());
  for (int t = 0; t < kTokens; ++t) {
    std::memcpy(x + t * width, tokens.codes + t * w.k, static_cast<size_t>(w.k));
    std::memset(x + t * width + w.k, 0, static_cast<size_t>(width - w.k));
  }
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(8, blocks / (8 * std::max(threads, 1))));
  parallel_for((blocks + run - 1) / run, threads, [&](int64_t task) {
    for (int64_t block = task * run; block < std::min((task + 1) * run, blocks); ++block) {
      alignas(64) int32_t dots[kTokens * kBlockRows];
      for (int row = 0; row < kBlockRows; row += kTogether<kTokens>)
        dot_rows_of<kTokens>(w, block, row, x, width, tokens, dots);
      for (int t = 0; t < kTokens; ++t) {
        F32 sums[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v)
          sums[v] = mul(to_f32(load_i32(dots + t * kBlockRows + v * kLanes)),
                        mul(set1_f32(tokens.scales[t]), w.scale(block, 0, v)));
        store_block(sums, block, w.n, out.bias, out.bias_dtype, out.data, t, out.dtype);
      }
    }
  });
}

template <int kMost>
void product_of_rows_for(const ExpandedWeight& w, const Int8Tokens& tokens, const Output& out, int threads) {
  if constexpr (kMost > 0) {
    if (tokens.m == kMost) return product_of_rows<kMost>(w, tokens, out, threads);
    product_of_rows_for<kMost - 1>(w, tokens, out, threads);
  }
}

}  // namespace

void linear_w4a8_codebook(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint8_t> codes,
                          int64_t stride, int bits, int64_t group, Ptr<const void> scales, int64_t scale_stride,
                          bool wide_scales, Ptr<const float> levels, Ptr<const float> row_scales, int64_t rotation,
                          Ptr<const void> bias, int bias_dtype, Ptr<void> out, int64_t few, int threads) {
  const CodebookRows rows({codes, stride, n, k, group, scales, scale_stride, wide_scales, levels, bits, row_scales});
  const ExpandedWeight weight{rows, n, k, k};
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  if (!m) return;
  if (m <= kRowTokens && rows.has_values())
    return product_of_rows_for<kRowTokens>(weight, Int8Tokens(from, k, rotation, threads), to, threads);
  int8_gemm(weight, from, rotation, to, few, threads);
}

void bind_linear_w4a8_codebook(nb::module_& m) {
  m.def("linear_w4a8_codebook", &linear_w4a8_codebook, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("codes"), nb::arg("stride"),
        nb::arg("bits"), nb::arg("group"), nb::arg("scales"), nb::arg("scale_stride"), nb::arg("wide_scales"),
        nb::arg("levels"), nb::arg("row_scales"), nb::arg("rotation"), nb::arg("bias"), nb::arg("bias_dtype"),
        nb::arg("out"), nb::arg("few"), nb::arg("threads"));
}

}  // namespace lowbit
