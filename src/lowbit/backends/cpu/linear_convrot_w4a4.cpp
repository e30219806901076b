// convrot_w4a4 in the layout rows16: int4 weights with a scale a row, times rows of rotated activations of 4 or 8 bits.
//
//   y = d_x * d_w * (sum of products of codes, an int32) + bias
#include "native/bind.h"
#include "native/int4_activations.h"
#include "native/int8_gemm.h"

namespace lowbit {
namespace {

using namespace simd;

struct ConvrotWeight {
  const uint32_t* words;  // [blocks, stride]: k / 8 words of 16 rows, and what fills up
  int64_t stride;
  const float* scales;  // [blocks, 16]
  int64_t n, k;
};

// sums[token][row] += the products of `count` words, kTogether of them in a step, from `codes` and `words` on. kUnit:
// words between two totals.
template <int kTogether, int kUnit, int kTokens, int kBlocks>
__attribute__((noinline)) void add_words(const uint32_t* const (&from)[kBlocks * kBlockVectors], const uint32_t* codes,
                                         int64_t count, Ahead& ahead, int32_t* sums) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const uint32_t* words[kVectors];
  for (int v = 0; v < kVectors; ++v) words[v] = from[v];
  for (int64_t left = count; left > 0; left -= kUnit) {
    Dot4 dots[kTokens][kVectors];
    for (auto& row : dots)
      for (auto& dot : row) dot = zero_dot4();
    const uint32_t* const end = codes + 2 * std::min<int64_t>(left, kUnit) * kTokens;
    for (; codes != end; codes += 2 * kTogether * kTokens) {
      add_products<kTogether, false>(dots, words, codes, ahead);
      for (auto& at : words) at += kTogether * kBlockRows;
    }
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) {
        int32_t* sum = sums + (t * kVectors + v) * kLanes;
        store_i32(sum, add(load_i32(sum), total(dots[t][v])));
      }
  }
}

// kUnit: words between two totals.
template <int kTokens, int kBlocks, int kUnit>
__attribute__((noinline)) void multiply(const ConvrotWeight& w, const CodedTokens& x, int64_t token, int64_t block,
                                        const Int4Block* blocks, Ahead ahead, const Output& out) {
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) expect_block(block + b, w.n, out.data, token + t, out.dtype);
  constexpr int kVectors = kBlocks * kBlockVectors, kTogether = 4;
  static_assert(kUnit % kTogether == 0, "a total is taken between them");
  const auto* codes = reinterpret_cast<const uint32_t*>(x.row(token));
  const auto* starts = reinterpret_cast<const int32_t*>(codes + w.k / 4 * kTokens);
  const auto* factors = reinterpret_cast<const float*>(starts + kTokens);
  alignas(64) int32_t sums[kTokens * kVectors * kLanes];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) store_i32(sums + (t * kVectors + v) * kLanes, set1_i32(starts[t]));
  const int64_t all = w.k / kWordColumns, whole = all / kTogether * kTogether;
  const uint32_t* words[kVectors];
  for (int v = 0; v < kVectors; ++v) words[v] = blocks[v / kBlockVectors].words + v % kBlockVectors * kLanes;
  add_words<kTogether, kUnit, kTokens, kBlocks>(words, codes, whole, ahead, sums);
  for (auto& at : words) at += whole * kBlockRows;
  if (whole < all) add_words<1, kUnit, kTokens, kBlocks>(words, codes + 2 * whole * kTokens, all - whole, ahead, sums);
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) {
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 of_row = load_f32(w.scales + (block + b) * kBlockRows + v * kLanes);
        const I32 found = load_i32(sums + (t * kVectors + b * kBlockVectors + v) * kLanes);
        row[v] = mul(to_f32(found), mul(set1_f32(factors[t]), of_row));
      }
      store_block(row, block + b, w.n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
    }
}

template <int kUnit>
void product(const ConvrotWeight& w, const CodedTokens& x, const Output& out, int threads) {
  for_each_w4a4_tile(
      x, w.n, threads,
      [&](int64_t first, int64_t count, const auto& f) {
        std::vector<Int4Block> found(static_cast<size_t>(count));
        for (int64_t b = 0; b < count; ++b) found[b] = {w.words + (first + b) * w.stride, nullptr, nullptr};
        f(found.data());
      },
      [&](int64_t token, int tokens, int64_t block, int together, const Int4Block* blocks, const Ahead& ahead) {
        with_count<kW4A4Tokens>(tokens, [&](auto count) {
          with_count<kW4A4Blocks>(together, [&](auto side_by_side) {
            constexpr int kTokens = decltype(count)::value, kBlocks = decltype(side_by_side)::value;
            multiply<kTokens, kBlocks, kUnit>(w, x, token, block, blocks, ahead, out);
          });
        });
      });
}

#if defined(LOWBIT_TILES)
void product_of_tiles(const ConvrotWeight& w, const CodedTokens& x, const Output& out, int threads) {
  amx::for_each_task(x.m, w.n, w.k, threads, [&](const amx::Task& task) {
    std::vector<Int4Block> found(static_cast<size_t>(task.blocks()));
    for (int64_t b = 0; b < task.blocks(); ++b)
      found[b] = {w.words + (task.first_block + b) * w.stride, nullptr, nullptr};
    const SignedBytes bytes(found.data(), task.blocks(), w.k);
    const amx::Tiles tiles(w.k / 4);
    task.each<2>([&](const auto& tokens, int64_t block, auto side_by_side) {
      constexpr int kX = std::extent_v<std::remove_reference_t<decltype(tokens)>>;
      constexpr int kW = decltype(side_by_side)::value;
      const int8_t* codes[kX];
      const uint32_t* words[kW];
      F32 scales[kW][kBlockVectors];
      for (int i = 0; i < kX; ++i) codes[i] = x.row(tokens[i]);
      for (int j = 0; j < kW; ++j) {
        words[j] = bytes.of(block + j - task.first_block);
        for (int v = 0; v < kBlockVectors; ++v)
          scales[j][v] = load_f32(w.scales + (block + j) * kBlockRows + v * kLanes);
      }
      amx::Sums<kX, kW> sums;
      tiles.multiply(codes, x.row_bytes, words, w.k / 4, sums.found);
      sums.each([&](int i, int j, int t, int v) {
        const F32 scale = mul(set1_f32(CodedTokens::scale(codes[i] + t * x.row_bytes, w.k)), scales[j][v]);
        store_f32(sums.total[i][j][t] + v * kLanes, mul(to_f32(load_i32(sums.found[i][j][t] + v * kLanes)), scale));
      });
      sums.store(tokens, block, w.n, out);
    });
  });
}
#endif

}  // namespace

void linear_convrot_w4a4(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint32_t> words,
                         int64_t stride, Ptr<const float> scales, int64_t rotation, int largest, Ptr<const void> bias,
                         int bias_dtype, Ptr<void> out, int threads) {
  const Activations from{x, x_dtype, m, k};
#if defined(LOWBIT_TILES)
  const bool in_rows = amx::takes(m, k);
#else
  const bool in_rows = false;
#endif
  CodedTokens tokens(m, k, k, false, in_rows);
  parallel_for(m, m * k >= 32768 ? threads : 1, [&](int64_t token) {
    Room row(k), codes(k / 4 + 1);
    row_to_f32(from, token, row.data());
    if (rotation) rotate_groups(row.data(), k, rotation);
    auto* bytes = reinterpret_cast<int8_t*>(codes.data());
    float scale;
    int32_t sum;
    quantize_int8(row.data(), k, static_cast<float>(largest), bytes, scale, sum);
    tokens.put(token, 0, bytes, scale);
  });
  const ConvrotWeight weight{words, stride, scales, n, k};
  const Output to{out, x_dtype, bias, bias_dtype};
#if defined(LOWBIT_TILES)
  if (in_rows) return product_of_tiles(weight, tokens, to, threads);
#endif
  if (largest <= 15) return product<kDot4StepsInt4 / 2>(weight, tokens, to, threads);
  product<kDot4Steps / 2>(weight, tokens, to, threads);
}

void bind_linear_convrot_w4a4(nb::module_& m) {
  m.def("linear_convrot_w4a4", &linear_convrot_w4a4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("words"), nb::arg("stride"),
        nb::arg("scales"), nb::arg("rotation"), nb::arg("largest"), nb::arg("bias"), nb::arg("bias_dtype"),
        nb::arg("out"), nb::arg("threads"));
}

}  // namespace lowbit
