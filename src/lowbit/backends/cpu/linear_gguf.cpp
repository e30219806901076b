// linear for gguf: blocks as they lie in the file, 16 rows at a time (native/gguf_blocks.h).
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

template <class T>
struct GgufWeight {
  const uint8_t* codes;
  int64_t stride, n, k;
  float factor;  // of all values

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    const gguf::Rows rows(codes, stride, block * kBlockRows, n);
    gguf::Words<T> words;
    for (int64_t c = first; c < last; c += T::kColumns) {
      words.gather(rows.at, c / T::kColumns * T::kSize);
      gguf::decode(words, panel + (c - first) * kPanelRows, kPanelRows, factor);
    }
  }
};

}  // namespace

// integer_block: the columns of the activations that share a scale; 0 where they stay what they are.
void linear_gguf(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, int type, Ptr<const uint8_t> codes,
                 int64_t stride, Ptr<const float> global, int64_t integer_block, Ptr<const void> bias, int bias_dtype,
                 Ptr<void> out, int threads) {
  if (!m) return;
  const Output to{out, x_dtype, bias, bias_dtype};
  gguf::with_type(type, [&](auto kind) {
    using T = decltype(kind);
    const GgufWeight<T> weight{codes, stride, n, k, global ? *global : 1.0f};
    const Activations from{x, x_dtype, m, k};
    if (!integer_block) return gemm_many(weight, from, to, threads);
#if defined(LOWBIT_ISA_AVX512)
    const gguf::ByteTokens tokens(from, integer_block, T::kUnit, threads);
    gguf::BytesGemm<T>(codes, stride, n, k, weight.factor, tokens, to).run(threads);
#else
    const gguf::PairTokens tokens(from, integer_block, T::kUnit, threads);
    gguf::pairs_gemm<T>(codes, stride, n, k, weight.factor, tokens, m, to, threads);
#endif
    multiply_not_finite(weight, from, to, threads);
  });
}

void bind_linear_gguf(nb::module_& m) {
  m.def("linear_gguf", &linear_gguf, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("type"), nb::arg("codes"), nb::arg("stride"),
        nb::arg("global"), nb::arg("integer_block"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"),
        nb::arg("threads"));
}

}  // namespace lowbit
