// linear for gguf: blocks as they lie in the file or in the layout gguf_rows16, 16 rows at a time
// (native/gguf_blocks.h).
//
// Activations of 16 bits become int16 with a scale a block of columns, as for other 4-bit weights (int4_gemm.h), and
// codes are multiplied with them as integers. Those of 32 bits stay what they are.
#include "native/bind.h"
#include "native/gguf_blocks.h"
#if defined(LOWBIT_ISA_AVX512)
#include "native/gguf_bytes.h"
#else
#include "native/gguf_pairs.h"
#endif
#include "native/not_finite.h"

namespace lowbit {
namespace {

using namespace simd;

template <class T, class Blocks>
struct GgufWeight {
  Blocks blocks;
  int64_t n, k;
  float factor;  // of all values

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    const auto strip = blocks.strip(block);
    typename Blocks::Words words;
    for (int64_t c = first; c < last; c += T::kColumns) {
      strip.read(c / T::kColumns, words);
      gguf::decode(words, panel + (c - first) * kPanelRows, kPanelRows, factor);
    }
  }
};

template <class T, class Blocks>
void multiply(const Blocks& blocks, float factor, const Activations& from, int64_t integer_block, const Output& to,
              int threads) {
  const GgufWeight<T, Blocks> weight{blocks, blocks.n, blocks.k, factor};
  if (!integer_block) return gemm_many(weight, from, to, threads);
#if defined(LOWBIT_ISA_AVX512)
  const int most = Blocks::kInPlace && from.m <= gguf::kInPlaceMost ? gguf::kInPlaceTokens : gguf::kByteTokens;
  const gguf::ByteTokens tokens(from, integer_block, T::kUnit, most, threads);
  gguf::BytesGemm<T, Blocks>(blocks, factor, tokens, to).run(threads);
#else
  const gguf::PairTokens tokens(from, integer_block, T::kUnit, threads);
  gguf::pairs_gemm<T>(blocks, factor, tokens, from.m, to, threads);
#endif
  multiply_not_finite(weight, from, to, threads);
}

}  // namespace

// packed: the blocks are in the layout gguf_rows16, and `stride` is the bytes of a strip; else those of a row.
// integer_block: the columns of the activations that share a scale; 0 where they stay what they are.
void linear_gguf(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, int type, Ptr<const uint8_t> codes,
                 int64_t stride, bool packed, Ptr<const float> global, int64_t integer_block, Ptr<const void> bias,
                 int bias_dtype, Ptr<void> out, int threads) {
  if (!m) return;
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  const float factor = global ? *global : 1.0f;
  gguf::with_type(type, [&](auto kind) {
    using T = decltype(kind);
    if (packed)
      return multiply<T>(gguf::PackedBlocks<T>{codes, stride, n, k}, factor, from, integer_block, to, threads);
    multiply<T>(gguf::PlainBlocks<T>{codes, stride, n, k}, factor, from, integer_block, to, threads);
  });
}

void bind_linear_gguf(nb::module_& m) {
  m.def("linear_gguf", &linear_gguf, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("type"), nb::arg("codes"), nb::arg("stride"),
        nb::arg("packed"), nb::arg("global"), nb::arg("integer_block"), nb::arg("bias"), nb::arg("bias_dtype"),
        nb::arg("out"), nb::arg("threads"));
}

}  // namespace lowbit
