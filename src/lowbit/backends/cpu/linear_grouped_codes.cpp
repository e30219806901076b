// linear for weights of 4 or 8 bits in groups, in the layout rows16: awq_w4a16 and wna16 (grouped_codes.h).
//
// Activations of 16 bits become int16 with one scale a block of columns, and the products are those of integers; asked
// for, they become int8 (W4A8). float32 activations stay what they are.
#include "native/bind.h"
#include "native/grouped_codes.h"
#include "native/int4_tiles.h"
#include "native/not_finite.h"

namespace lowbit {

// Which way a call goes; the launcher knows from how many tokens on which is the faster one.
enum Way : int { kInt16 = 0, kRegisters = 1, kPanels = 2, kInt8 = 3 };

template <int kBits>
static void multiply(const GroupedCodes<kBits>& weight, const Activations& x, const Output& out, int64_t integer_block,
                     int way, int threads) {
  if (way == kRegisters) return gemm_few(weight, x, out, threads);
  if (way == kPanels) return gemm_many(weight, x, out, threads);
  if constexpr (kBits == 4) {
    if (way == kInt8) return int4_product<1>(weight, x, integer_block, out, threads);
    if (x.m <= kTooFewForPairs) {
      // Where few products fit in a sum, it is emptied after every scale: then short blocks, which are loops unrolled.
      const bool short_blocks = GroupedCodes<4>::kSteps < integer_block / 4 && weight.group % 32 == 0;
      return int4_gemm(weight, IntegerTokens<2, 8, false>(x, short_blocks ? 32 : integer_block, weight.group, threads),
                       out, threads);
    }
  }
  int4_product<2>(weight, x, integer_block, out, threads);
}

void linear_grouped_codes(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint32_t> words,
                          int64_t stride, int bits, Ptr<const void> scales, int scale_dtype, Ptr<const void> zeros,
                          int zeros_kind, int64_t group, int64_t integer_block, Ptr<const void> bias, int bias_dtype,
                          Ptr<void> out, int way, int threads) {
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  const auto run = [&](const auto& weight) {
    multiply(weight, from, to, integer_block, way, threads);
    if (way != kPanels) multiply_not_finite(weight, from, to, threads);
  };
  if (bits == 4) return run(GroupedCodes<4>{words, stride, scales, zeros, scale_dtype, zeros_kind, n, k, group});
  run(GroupedCodes<8>{words, stride, scales, zeros, scale_dtype, zeros_kind, n, k, group});
}

void bind_linear_grouped_codes(nb::module_& m) {
  m.def("linear_grouped_codes", &linear_grouped_codes, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("words"), nb::arg("stride"),
        nb::arg("bits"), nb::arg("scales"), nb::arg("scale_dtype"), nb::arg("zeros"), nb::arg("zeros_kind"),
        nb::arg("group"), nb::arg("integer_block"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"),
        nb::arg("way"), nb::arg("threads"));
}

}  // namespace lowbit
