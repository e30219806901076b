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

// kUnit: words between two totals.
template <int kTokens, int kBlocks, int kUnit>
__attribute__((noinline)) void multiply(const ConvrotWeight& w, const CodedTokens& x, int64_t token, int64_t block,
                                        const Int4Block* blocks, const Output& out) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const int8_t *begin[kTokens], *codes[kTokens];
  for (int t = 0; t < kTokens; ++t) begin[t] = codes[t] = x.row(token + t);
  const uint32_t* words[kVectors];
  for (int v = 0; v < kVectors; ++v) words[v] = blocks[v / kBlockVectors].words + v % kBlockVectors * kLanes;
  I32 sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t)
    for (auto& sum : sums[t]) sum = set1_i32(CodedTokens::start(begin[t], w.k));
  const auto add_some = [&](auto count, int64_t times) __attribute__((always_inline)) {
    Dot4 dots[kTokens][kVectors];
    for (auto& row : dots)
      for (auto& dot : row) dot = zero_dot4();
    for (int64_t i = 0; i < times; ++i) {
      add_products<decltype(count)::value>(dots, words, codes);
      for (auto& at : codes) at += count * kWordColumns;
      for (auto& at : words) at += count * kBlockRows;
    }
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) sums[t][v] = add(sums[t][v], total(dots[t][v]));
  };
  constexpr int kTogether = 4;
  static_assert(kUnit % kTogether == 0, "a total is taken between them");
  int64_t left = w.k / kWordColumns;
  while (left >= kTogether) {
    const int64_t times = std::min<int64_t>(left, kUnit) / kTogether;
    add_some(std::integral_constant<int, kTogether>{}, times);
    left -= times * kTogether;
  }
  if (left) add_some(std::integral_constant<int, 1>{}, left);
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) {
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 of_row = load_f32(w.scales + (block + b) * kBlockRows + v * kLanes);
        const F32 scale = mul(set1_f32(CodedTokens::scale(begin[t], w.k)), of_row);
        row[v] = mul(to_f32(sums[t][b * kBlockVectors + v]), scale);
      }
      store_block(row, block + b, w.n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
    }
}

template <int kUnit>
void product(const ConvrotWeight& w, const CodedTokens& x, const Output& out, int threads) {
  for_each_w4a4_tile(
      x.m, w.n, w.k, threads,
      [&](int64_t first, int64_t count, const auto& f) {
        std::vector<Int4Block> found(static_cast<size_t>(count));
        for (int64_t b = 0; b < count; ++b) found[b] = {w.words + (first + b) * w.stride, nullptr, nullptr};
        f(found.data());
      },
      [&](int64_t token, int tokens, int64_t block, int together, const Int4Block* blocks) {
        with_count<kW4A4Tokens>(tokens, [&](auto count) {
          with_count<kW4A4Blocks>(together, [&](auto side_by_side) {
            multiply<decltype(count)::value, decltype(side_by_side)::value, kUnit>(w, x, token, block, blocks, out);
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
  CodedTokens tokens(m, k, k);
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
  if (amx::takes(m, k)) return product_of_tiles(weight, tokens, to, threads);
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
