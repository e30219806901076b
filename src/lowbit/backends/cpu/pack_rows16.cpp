// Packing into the layout rows16 and unpacking from it: units (words or bytes) of 16 rows interleaved.
#include <algorithm>
#include <cstring>

#include "native/bind.h"
#include "native/rows16.h"

namespace lowbit {
namespace {

// As many units of each row at a time as are one cache line.
template <class Unit>
constexpr int64_t kRun = 64 / sizeof(Unit);

template <class Unit>
void interleave_block(const Unit* from, int64_t units, int64_t rows, Unit* to) {
  for (int64_t first = 0; first < units; first += kRun<Unit>) {
    const int64_t last = std::min(first + kRun<Unit>, units);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t u = first; u < last; ++u) to[u * kBlockRows + r] = from[r * units + u];
    for (int64_t r = rows; r < kBlockRows; ++r)
      for (int64_t u = first; u < last; ++u) to[u * kBlockRows + r] = 0;
  }
}

template <class Unit>
void separate_block(const Unit* from, int64_t units, int64_t rows, Unit* to) {
  for (int64_t first = 0; first < units; first += kRun<Unit>) {
    const int64_t last = std::min(first + kRun<Unit>, units);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t u = first; u < last; ++u) to[r * units + u] = from[u * kBlockRows + r];
  }
}

template <class Unit>
void interleave_all(const void* from, int64_t n, int64_t units, void* to, int64_t stride, int threads) {
  const auto* source = static_cast<const Unit*>(from);
  parallel_for((n + kBlockRows - 1) / kBlockRows, threads, [&](int64_t block) {
    const int64_t row = block * kBlockRows, rows = std::min<int64_t>(kBlockRows, n - row);
    auto* begin = static_cast<int32_t*>(to) + block * stride;
    interleave_block(source + row * units, units, rows, reinterpret_cast<Unit*>(begin));
    const int64_t words = units * kBlockRows * static_cast<int64_t>(sizeof(Unit)) / 4;
    std::fill(begin + words, begin + stride, 0);
  });
}

template <class Unit>
void separate_all(const void* from, int64_t n, int64_t units, void* to, int64_t stride, int threads) {
  parallel_for((n + kBlockRows - 1) / kBlockRows, threads, [&](int64_t block) {
    const int64_t row = block * kBlockRows, rows = std::min<int64_t>(kBlockRows, n - row);
    const auto* begin = reinterpret_cast<const Unit*>(static_cast<const int32_t*>(from) + block * stride);
    separate_block(begin, units, rows, static_cast<Unit*>(to) + row * units);
  });
}

}  // namespace

// from [n, row_bytes] -> to [ceil(n / 16), stride] words; `unit` is 1 or 4 bytes.
void interleave_rows16(Ptr<const void> from, int64_t n, int64_t row_bytes, int unit, Ptr<void> to, int64_t stride,
                       int threads) {
  if (unit == 4) return interleave_all<uint32_t>(from, n, row_bytes / 4, to, stride, threads);
  interleave_all<uint8_t>(from, n, row_bytes, to, stride, threads);
}

void separate_rows16(Ptr<const void> from, int64_t n, int64_t row_bytes, int unit, Ptr<void> to, int64_t stride,
                     int threads) {
  if (unit == 4) return separate_all<uint32_t>(from, n, row_bytes / 4, to, stride, threads);
  separate_all<uint8_t>(from, n, row_bytes, to, stride, threads);
}

void bind_pack_rows16(nb::module_& m) {
  m.def("interleave_rows16", &interleave_rows16, nb::call_guard<nb::gil_scoped_release>(), nb::arg("from"),
        nb::arg("n"), nb::arg("row_bytes"), nb::arg("unit"), nb::arg("to"), nb::arg("stride"), nb::arg("threads"));
  m.def("separate_rows16", &separate_rows16, nb::call_guard<nb::gil_scoped_release>(), nb::arg("from"), nb::arg("n"),
        nb::arg("row_bytes"), nb::arg("unit"), nb::arg("to"), nb::arg("stride"), nb::arg("threads"));
}

}  // namespace lowbit
