// Packing blocks of GGUF files into the layout gguf_rows16 and unpacking them from it.
#include <cstring>

#include "native/bind.h"
#include "native/gguf_blocks.h"
#include "native/parallel.h"

namespace lowbit {
namespace {

// copy(packed, plain, bytes), of every piece of a block of each of 16 rows that stays together.
template <class T, class Packed, class Plain, class F>
void for_each_piece(Packed* strip, int64_t blocks, int64_t block, Plain* const (&rows)[kBlockRows], const F& copy) {
  using Words = gguf::PackedWords<T>;
  constexpr int kHalves = static_cast<int>(T::kHalves.size()), kWordBytes = 4 * kBlockRows * Words::kCount;
  Packed* words = strip + block * kWordBytes;
  Packed* halves = strip + blocks * kWordBytes + block * 2 * kBlockRows * kHalves;
  Packed* bytes = strip + blocks * (kWordBytes + 2 * kBlockRows * kHalves) + block * kBlockRows;
  for (int word = 0; word < Words::kCount; ++word) {
    const int at = Words::kLooseWord && !word ? T::kLoose : T::kBody + 4 * (word - Words::kFirst);
    for (int r = 0; r < kBlockRows; ++r) copy(words + 4 * (word * kBlockRows + r), rows[r] + at, 4);
  }
  for (int half = 0; half < kHalves; ++half)
    for (int r = 0; r < kBlockRows; ++r) copy(halves + 2 * (half * kBlockRows + r), rows[r] + T::kHalves[half], 2);
  if constexpr (Words::kByte)
    for (int r = 0; r < kBlockRows; ++r) copy(bytes + r, rows[r] + T::kLoose, 1);
}

// Rows [n, row bytes] of blocks and strips of 16 of them, `stride` bytes each. Rows that are not there are zeros.
template <class T, class Packed, class Plain, class F>
void for_each_strip(Plain* plain, int64_t n, int64_t row_bytes, Packed* packed, int64_t stride, int threads,
                    const F& copy) {
  parallel_for((n + kBlockRows - 1) / kBlockRows, threads, [&](int64_t strip) {
    uint8_t none[T::kSize] = {};
    Plain* rows[kBlockRows];
    for (int64_t at = 0; at < row_bytes; at += T::kSize) {
      for (int r = 0; r < kBlockRows; ++r) {
        const int64_t row = strip * kBlockRows + r;
        rows[r] = row < n ? plain + row * row_bytes + at : none;
      }
      for_each_piece<T>(packed + strip * stride, row_bytes / T::kSize, at / T::kSize, rows, copy);
    }
  });
}

}  // namespace

// plain [n, row_bytes] -> packed [ceil(n / 16), stride] bytes.
void interleave_gguf(int type, Ptr<const uint8_t> plain, int64_t n, int64_t row_bytes, Ptr<uint8_t> packed,
                     int64_t stride, int threads) {
  gguf::with_type(type, [&](auto kind) {
    using T = decltype(kind);
    for_each_strip<T>(static_cast<const uint8_t*>(plain), n, row_bytes, static_cast<uint8_t*>(packed), stride, threads,
                      [](uint8_t* to, const uint8_t* from, size_t size) { std::memcpy(to, from, size); });
    parallel_for((n + kBlockRows - 1) / kBlockRows, threads, [&](int64_t strip) {
      std::memset(packed + strip * stride + kBlockRows * row_bytes, 0, stride - kBlockRows * row_bytes);
    });
  });
}

// packed [ceil(n / 16), stride] bytes -> plain [n, row_bytes].
void separate_gguf(int type, Ptr<const uint8_t> packed, int64_t stride, Ptr<uint8_t> plain, int64_t n,
                   int64_t row_bytes, int threads) {
  gguf::with_type(type, [&](auto kind) {
    using T = decltype(kind);
    for_each_strip<T>(static_cast<uint8_t*>(plain), n, row_bytes, static_cast<const uint8_t*>(packed), stride, threads,
                      [](const uint8_t* from, uint8_t* to, size_t size) { std::memcpy(to, from, size); });
  });
}

void bind_pack_gguf_rows16(nb::module_& m) {
  m.def("interleave_gguf", &interleave_gguf, nb::call_guard<nb::gil_scoped_release>(), nb::arg("type"),
        nb::arg("plain"), nb::arg("n"), nb::arg("row_bytes"), nb::arg("packed"), nb::arg("stride"), nb::arg("threads"));
  m.def("separate_gguf", &separate_gguf, nb::call_guard<nb::gil_scoped_release>(), nb::arg("type"), nb::arg("packed"),
        nb::arg("stride"), nb::arg("plain"), nb::arg("n"), nb::arg("row_bytes"), nb::arg("threads"));
}

}  // namespace lowbit
