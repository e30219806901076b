// linear for w4a8_codebook: rows of the rotated activations become int8, codes the int8 that they stand for, some
// blocks of rows at a time and in the cache; the product is exact (native/int8_gemm.h).
#include "native/bind.h"
#include "native/codebook_rows.h"
#include "native/int8_gemm.h"

namespace lowbit {
namespace {

using namespace simd;

struct ExpandedWeight {
  const CodebookRows& rows;
  int64_t n, k, tile;

  int64_t room(int64_t blocks) const { return blocks * kBlockRows * (k / 4); }

  Int8Blocks open(int64_t first, int64_t last, uint32_t* to) const {
    const int64_t group = rows.weight().group, piece = std::max<int64_t>(group, 1024 / group * group);
    const int64_t width = piece + CodebookRows::kPad, across = k / 4;
    const Room room(width / 4 * (kBlockRows + 1) + 16);
    auto* codes = reinterpret_cast<uint8_t*>(room.data());
    const uint8_t* at[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) at[r] = codes + (r + 1) * width;
    for (int64_t block = first; block < last; ++block)
      for (int64_t c = 0; c < k; c += piece) {
        const int64_t end = std::min(c + piece, k);
        for (int r = 0; r < kBlockRows; ++r)  // the last one for those that are not there: nobody stores their sums
          rows.expand(std::min(block * kBlockRows + r, n - 1), c, end, codes,
                      reinterpret_cast<int8_t*>(codes + (r + 1) * width));
        uint32_t* words = to + ((block - first) * across + c / 4) * kBlockRows;
        for (int64_t byte = 0; byte < end - c; byte += 16) interleave_words(at, byte, words + byte / 4 * kBlockRows);
      }
    return {to, across * kBlockRows, first};
  }

  F32 scale(int64_t block, int64_t, int v) const {
    const int64_t row = block * kBlockRows + v * kLanes;
    if (row + kLanes <= n) return load_f32(rows.weight().rows + row);
    return load_first(rows.weight().rows, row, static_cast<int>(std::max<int64_t>(n - row, 0)), kFloat32);
  }
};

}  // namespace

void linear_w4a8_codebook(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint8_t> codes,
                          int64_t stride, int bits, int64_t group, Ptr<const void> scales, int64_t scale_stride,
                          bool wide_scales, Ptr<const float> levels, Ptr<const float> row_scales, int64_t rotation,
                          Ptr<const void> bias, int bias_dtype, Ptr<void> out, int64_t few, int threads) {
  const CodebookRows rows({codes, stride, n, k, group, scales, scale_stride, wide_scales, levels, bits, row_scales});
  const ExpandedWeight weight{rows, n, k, k};
  if (m) int8_gemm(weight, {x, x_dtype, m, k}, rotation, {out, x_dtype, bias, bias_dtype}, few, threads);
}

void bind_linear_w4a8_codebook(nb::module_& m) {
  m.def("linear_w4a8_codebook", &linear_w4a8_codebook, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("codes"), nb::arg("stride"),
        nb::arg("bits"), nb::arg("group"), nb::arg("scales"), nb::arg("scale_stride"), nb::arg("wide_scales"),
        nb::arg("levels"), nb::arg("row_scales"), nb::arg("rotation"), nb::arg("bias"), nb::arg("bias_dtype"),
        nb::arg("out"), nb::arg("few"), nb::arg("threads"));
}

}  // namespace lowbit
