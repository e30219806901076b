// linear for fp8_e4m3 and fp8_e5m2 in the layout rows16: w = code * scale, the scale one of all, of a row or of a tile.
#include "native/bind.h"
#include "native/fp8_weight.h"

namespace lowbit {

void linear_fp8(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint8_t> codes,
                int64_t stride, bool e5m2, Ptr<const float> scales, int scale_kind, int64_t tile_rows,
                int64_t tile_columns, Ptr<const void> bias, int bias_dtype, Ptr<void> out, int way, int threads) {
  const Activations from{x, x_dtype, m, k};
  const Output to{out, x_dtype, bias, bias_dtype};
  const Fp8Scales by{scales, scale_kind, n, tile_rows, (k + tile_columns - 1) / tile_columns};
  const auto run = [&](const auto& weight) { linear_by(static_cast<Fp8Way>(way), weight, from, to, threads); };
  if (e5m2) return run(Fp8Weight<E5M2, Fp8Scales>{codes, stride, by, n, k, tile_columns});
  run(Fp8Weight<E4M3, Fp8Scales>{codes, stride, by, n, k, tile_columns});
}

// For tests and measurements: whether linears of fp8 and mxfp8 may look codes up; gives whether they do so now.
bool want_fp8_tables(bool wanted) {
  fp8_tables_wanted = wanted;
  return uses_fp8_tables();
}

void bind_linear_fp8(nb::module_& m) {
  m.def("linear_fp8", &linear_fp8, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("codes"), nb::arg("stride"), nb::arg("e5m2"),
        nb::arg("scales"), nb::arg("scale_kind"), nb::arg("tile_rows"), nb::arg("tile_columns"), nb::arg("bias"),
        nb::arg("bias_dtype"), nb::arg("out"), nb::arg("way"), nb::arg("threads"));
  m.def("want_fp8_tables", &want_fp8_tables, nb::arg("wanted"));
  // Of this format and of others: whether products by pairs of bfloat16 columns are there, and whether they are fast.
  m.def("can_bf16_dots", &can_bf16_dots);
  m.def("has_fast_bf16_dots", &has_fast_bf16_dots);
}

}  // namespace lowbit
