// int4_plain_mm: 4-bit weights in plain rows, [N, K / 2] with scales and zero points [N, G], times int8 activations.
//
// A block of 16 rows is interleaved just before it is multiplied (rows16.h): for one token while it is in the first
// cache, for many once for all tiles of tokens. The product is that of int4_gemm.h.
#include <memory>
#include <vector>

#include "native/bind.h"
#include "native/grouped_codes.h"
#include "native/transpose.h"

namespace lowbit {
namespace {

using namespace simd;

constexpr int64_t kActivationBlock = 32;  // columns that share a scale of the activations
constexpr int64_t kStrip = 64;            // words of a row that are read on before the next rows

struct PlainRows {
  const uint8_t* codes;  // [n, k / 2]
  const void* scales;    // [n, k / group]
  const void* zeros;
  int dtype;  // of both
  int64_t n, k, group;

  int64_t words() const { return k / 8; }
  int64_t groups() const { return k / group; }
};

// Values [16, count] in rows `stride` apart, as [count, 16]; T is 32 bits.
template <class T>
void interleave(const T* from, int64_t stride, int64_t count, T* to) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4)
    for (int r = 0; r < kBlockRows; r += 4) {
      Quad<T> rows[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&rows[i], from + (r + i) * stride + c, sizeof rows[i]);
      transpose_quads(rows);
      for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * kBlockRows + r, &rows[i], sizeof rows[i]);
    }
  for (; c < count; ++c)
    for (int r = 0; r < kBlockRows; ++r) to[c * kBlockRows + r] = from[r * stride + c];
}

// Room for blocks of rows in the arrangement of rows16.
struct Arranged {
  int64_t blocks;
  Room words, scales, zeros, rows;  // `rows`: one block's codes, scales or zero points where they must be copied first

  Arranged(const PlainRows& w, int64_t blocks)
      : blocks(blocks),
        words(blocks * w.words() * kBlockRows),
        scales(blocks * w.groups() * kBlockRows),
        zeros(blocks * w.groups() * kBlockRows),
        rows((w.words() + kLanes) * kBlockRows) {}

  void arrange(const PlainRows& w, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * kBlockRows, count = std::min<int64_t>(kBlockRows, w.n - row), at = block - first;
      const auto* codes = reinterpret_cast<const uint32_t*>(w.codes + row * w.k / 2);
      if (count < kBlockRows) {  // rows of zeros fill up the last block
        std::memset(rows.data(), 0, static_cast<size_t>(w.words() * kBlockRows) * 4);
        std::memcpy(rows.data(), codes, static_cast<size_t>(count * w.words()) * 4);
        codes = reinterpret_cast<const uint32_t*>(rows.data());
      }
      auto* to = reinterpret_cast<uint32_t*>(words.data()) + at * w.words() * kBlockRows;
      for (int64_t word = 0; word < w.words(); word += kStrip)
        interleave(codes + word, w.words(), std::min(kStrip, w.words() - word), to + word * kBlockRows);
      arrange_values(w, w.scales, row, count, scales.data() + at * w.groups() * kBlockRows);
      arrange_values(w, w.zeros, row, count, zeros.data() + at * w.groups() * kBlockRows);
    }
  }

  GroupedCodes<4> weight(const PlainRows& w) const {
    return {reinterpret_cast<const uint32_t*>(words.data()), w.words() * kBlockRows, scales.data(), zeros.data(), kFloat32, kFloatCodes, w.n, w.k, w.group};
  }

 private:
  void arrange_values(const PlainRows& w, const void* from, int64_t row, int64_t count, float* to) {
    const int64_t total = w.groups() * count;
    float* plain = rows.data();
    int64_t i = 0;
    for (; i + kLanes <= total; i += kLanes) store_f32(plain + i, load_as_f32(from, row * w.groups() + i, w.dtype));
    if (i < total) store_f32(plain + i, load_first(from, row * w.groups() + i, static_cast<int>(total - i), w.dtype));
    for (i = total; i < w.groups() * kBlockRows; ++i) plain[i] = 0.0f;
    interleave(plain, w.groups(), w.groups(), to);
  }
};

}  // namespace

void int4_plain_mm(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint8_t> codes,
                   Ptr<const void> scales, Ptr<const void> zeros, int scale_dtype, int64_t group, Ptr<const void> bias,
                   int bias_dtype, Ptr<void> out, int threads) {
  const PlainRows rows{codes, scales, zeros, scale_dtype, n, k, group};
  std::vector<std::unique_ptr<Arranged>> rooms(std::max(threads, 1));
  const auto weight_of = [&](int64_t first, int64_t last, int worker) {
    auto& room = rooms[worker];
    if (!room || room->blocks < last - first) room = std::make_unique<Arranged>(rows, last - first);
    room->arrange(rows, first, last);
    return room->weight(rows);
  };
  const IntegerTokens<1> tokens({x, x_dtype, m, k}, kActivationBlock, group, threads);
  int4_gemm_of<GroupedCodes<4>, false>(weight_of, tokens, m, n, Output{out, x_dtype, bias, bias_dtype}, threads);
}

void bind_int4_plain_mm(nb::module_& m) {
  m.def("int4_plain_mm", &int4_plain_mm, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"),
        nb::arg("scale_dtype"), nb::arg("group"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"),
        nb::arg("threads"));
}

}  // namespace lowbit
