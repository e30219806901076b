// The module of one instruction set: every kernel, and the thread pool that they run on.
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
#define LOWBIT_BIND(name) lowbit::bind_##name(m);
#include "binds.inc"
#undef LOWBIT_BIND
}
