// linear for mxfp4 in the layout rows16: w = value * 2^(scale - 127), a scale for every 32 columns of a row.
#include "native/bind.h"
#include "native/e2m1_weight.h"
#include "native/e8m0.h"
#include "native/not_finite.h"

namespace lowbit {
namespace {

struct Mxfp4Scales {
  static constexpr int64_t kGroup = 32;
  static constexpr bool kSpans = false;
  const uint8_t* codes;  // [blocks, groups, 16]
  int64_t groups;

  simd::F32 halves(int64_t block, int64_t group, int v) const {
    const simd::F32 scale = load_e8m0(codes + (block * groups + group) * kBlockRows + v * simd::kLanes);
    return simd::mul(scale, simd::set1_f32(0.5f));
  }
};

}  // namespace

void linear_mxfp4(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint32_t> words,
                  int64_t stride, Ptr<const uint8_t> scales, int64_t integer_block, Ptr<const void> bias,
                  int bias_dtype, Ptr<void> out, int way, int threads) {
  const Mxfp4Scales by{scales, k / Mxfp4Scales::kGroup};
  const E2m1Weight<Mxfp4Scales> weight{words, stride, by, n, k, Mxfp4Scales::kGroup};
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  linear_e2m1(weight, from, to, static_cast<E2m1Way>(way), integer_block, threads);
  if (takes_apart(static_cast<E2m1Way>(way))) multiply_not_finite(weight, from, to, threads);
}

void bind_linear_mxfp4(nb::module_& m) {
  m.def("linear_mxfp4", &linear_mxfp4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("words"), nb::arg("stride"), nb::arg("scales"),
        nb::arg("integer_block"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"), nb::arg("way"),
        nb::arg("threads"));
}

}  // namespace lowbit
