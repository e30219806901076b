// embedding: the rows that indices name, and only those, as floats.
#include "native/bind.h"
#include "native/coded_rows.h"

namespace lowbit {
namespace {

int64_t index_at(const void* indices, int64_t i, bool wide) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

}  // namespace

// Where the first index lies that names no row; nothing is decoded then. -1: all do.
int64_t embedding(Ptr<const int64_t> weight, Ptr<const void> indices, int64_t count, bool wide, Ptr<void> out,
                  int dtype, int threads) {
  const CodedWeight w = CodedWeight::read(weight);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = index_at(indices, i, wide);
    if (row < 0 || row >= w.n) return i;
  }
  const int64_t run = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, w.k));
  parallel_for((count + run - 1) / run, threads, [&](int64_t task) {
    RowDecoder decoder(w);
    Room room(w.arrangement == Arrangement::kPlain ? 0 : w.row_bytes / 4 + 1);
    auto* unpacked = reinterpret_cast<uint8_t*>(room.data());
    for (int64_t i = task * run; i < std::min(count, (task + 1) * run); ++i) {
      const int64_t row = index_at(indices, i, wide);
      const uint8_t* codes = w.codes + row * w.stride;
      if (w.arrangement != Arrangement::kPlain) {
        unpack_row(w, row, unpacked);
        codes = unpacked;
      }
      decoder.decode(row, codes, out, i * w.k, dtype);
    }
  });
  return -1;
}

void bind_embedding(nb::module_& m) {
  m.def("embedding", &embedding, nb::call_guard<nb::gil_scoped_release>(), nb::arg("weight"), nb::arg("indices"),
        nb::arg("count"), nb::arg("wide"), nb::arg("out"), nb::arg("dtype"), nb::arg("threads"));
}

}  // namespace lowbit
