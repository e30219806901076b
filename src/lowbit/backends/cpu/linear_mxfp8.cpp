// linear for mxfp8 in the layout rows16: w = code * 2^(scale - 127), a scale for every 32 columns of a row.
#include "native/bind.h"
#include "native/fp8_weight.h"

namespace lowbit {

void linear_mxfp8(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint8_t> codes,
                  int64_t stride, Ptr<const uint8_t> scales, Ptr<const void> bias, int bias_dtype, Ptr<void> out,
                  int way, int threads) {
  constexpr int64_t kGroup = 32;
  const Fp8Weight<E4M3, E8m0Scales> weight{codes, stride, {scales, k / kGroup}, n, k, kGroup};
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  linear_by(static_cast<Fp8Way>(way), weight, from, to, threads);
}

void bind_linear_mxfp8(nb::module_& m) {
  m.def("linear_mxfp8", &linear_mxfp8, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("codes"), nb::arg("stride"), nb::arg("scales"),
        nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"), nb::arg("way"), nb::arg("threads"));
}

}  // namespace lowbit
