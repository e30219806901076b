// The module of one instruction set: every kernel, and the thread pool that they run on.
#include "bf16_gemm.h"
#include "bind.h"

namespace lowbit {
#define LOWBIT_BIND(name) void bind_##name(nb::module_& m);
#include "binds.inc"
#undef LOWBIT_BIND
}  // namespace lowbit

NB_MODULE(LOWBIT_MODULE, m) {
  namespace nb = nanobind;
  m.attr("ISA") = LOWBIT_ISA_NAME;
  m.def("pool", [] {
    bool used = false;
    const std::string about = lowbit::describe_pool(used);
    return nb::make_tuple(used, nb::str(about.c_str(), about.size()));
  });
  // Whether products by pairs of bfloat16 columns are there, and whether they are fast.
  m.def("bf16_dots", [] { return nb::make_tuple(lowbit::can_bf16_dots(), lowbit::has_fast_bf16_dots()); });
#define LOWBIT_BIND(name) lowbit::bind_##name(m);
#include "binds.inc"
#undef LOWBIT_BIND
}
