// dequantize and embedding for w4a8_codebook: w = R (v * s_channel [+ correction]), a row at a time.
#include "native/bind.h"
#include "native/codebook_rows.h"

namespace lowbit {
namespace {

using namespace simd;

// What beside the integers makes a value.
struct CodebookFactors {
  const void* correction;  // [groups, n] or null
  int correction_dtype;
  const void* columns;  // [k] or null
  int columns_dtype;
  int64_t rotation;
};

// codes: one a byte, what `expand` left of them.
void finish_row(const CodebookRows& rows, int64_t row, const uint8_t* codes, const int8_t* integers,
                const CodebookFactors& by, float* values, void* out, int64_t at, int dtype) {
  const CodebookWeight& w = rows.weight();
  const F32 scale = set1_f32(w.rows[row]);
  for (int64_t c = 0; c < w.k; c += kLanes) store_f32(values + c, mul(to_f32(widen_s8(integers + c)), scale));
  for (int64_t c = 0, g = 0; by.correction && c < w.k; ++g) {
    alignas(64) float added[kLanes];
    store_f32(added, load_first(by.correction, g * w.n + row, 1, by.correction_dtype));
    for (const int64_t end = c + w.group; c < end; ++c) values[c] += added[0];
  }
  rows.put_nan(row, codes, values);
  rotate_groups(values, w.k, by.rotation);
  for (int64_t c = 0; c < w.k; c += kLanes) {
    F32 value = load_f32(values + c);
    if (by.columns) value = mul(value, load_as_f32(by.columns, c, by.columns_dtype));
    store_from_f32(out, at + c, value, dtype);
  }
}

}  // namespace

// Rows of a weight [n, k] -> [count, k] of a dtype: those that `indices` (of 64 or 32 bits) name, or without them all.
// Where the first index lies that names no row, and nothing is decoded; -1: all do.
int64_t dequantize_w4a8_codebook(int64_t n, int64_t k, Ptr<const uint8_t> codes, int64_t stride, int bits,
                                 int64_t group, Ptr<const void> scales, int64_t scale_stride, bool wide_scales,
                                 Ptr<const float> levels, Ptr<const float> row_scales, Ptr<const void> correction,
                                 int correction_dtype, int64_t rotation, Ptr<const void> columns, int columns_dtype,
                                 Ptr<const void> indices, bool wide, int64_t count, Ptr<void> out, int dtype,
                                 int threads) {
  const auto row_at = [&](int64_t i) {
    if (!indices) return i;
    return wide ? static_cast<const int64_t*>(static_cast<const void*>(indices))[i]
                : static_cast<int64_t>(static_cast<const int32_t*>(static_cast<const void*>(indices))[i]);
  };
  for (int64_t i = 0; indices && i < count; ++i)
    if (row_at(i) < 0 || row_at(i) >= n) return i;
  const CodebookRows rows({codes, stride, n, k, group, scales, scale_stride, wide_scales, levels, bits, row_scales});
  const CodebookFactors by{correction, correction_dtype, columns, columns_dtype, rotation};
  const int64_t run = std::max<int64_t>(1, 32768 / k);
  parallel_for((count + run - 1) / run, threads, [&](int64_t task) {
    const int64_t width = k + CodebookRows::kPad;
    const Room bytes(width / 2 + 16), values(k);
    auto* room = reinterpret_cast<uint8_t*>(bytes.data());
    auto* integers = reinterpret_cast<int8_t*>(room + width);
    for (int64_t i = task * run; i < std::min(count, (task + 1) * run); ++i) {
      rows.expand(row_at(i), 0, k, room, integers);
      finish_row(rows, row_at(i), room, integers, by, values.data(), out, i * k, dtype);
    }
  });
  return -1;
}

void bind_dequantize_w4a8_codebook(nb::module_& m) {
  m.def("dequantize_w4a8_codebook", &dequantize_w4a8_codebook, nb::call_guard<nb::gil_scoped_release>(), nb::arg("n"),
        nb::arg("k"), nb::arg("codes"), nb::arg("stride"), nb::arg("bits"), nb::arg("group"), nb::arg("scales"),
        nb::arg("scale_stride"), nb::arg("wide_scales"), nb::arg("levels"), nb::arg("row_scales"),
        nb::arg("correction"), nb::arg("correction_dtype"), nb::arg("rotation"), nb::arg("columns"),
        nb::arg("columns_dtype"), nb::arg("indices"), nb::arg("wide"), nb::arg("count"), nb::arg("out"),
        nb::arg("dtype"), nb::arg("threads"));
}

}  // namespace lowbit
