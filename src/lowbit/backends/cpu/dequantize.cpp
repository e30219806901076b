// dequantize: rows of any format of native/coded_rows.h as floats.
#include "native/bind.h"
#include "native/coded_rows.h"

namespace lowbit {

void dequantize(Ptr<const int64_t> weight, int64_t first, int64_t last, Ptr<void> out, int dtype, int threads) {
  decode_rows(CodedWeight::read(weight), first, last, out, dtype, threads);
}

void bind_dequantize(nb::module_& m) {
  m.def("dequantize", &dequantize, nb::call_guard<nb::gil_scoped_release>(), nb::arg("weight"), nb::arg("first"),
        nb::arg("last"), nb::arg("out"), nb::arg("dtype"), nb::arg("threads"));
}

}  // namespace lowbit
