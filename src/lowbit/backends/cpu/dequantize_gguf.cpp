// dequantize and embedding for gguf: 16 rows at a time, any of them, become columns of 16 values and then rows.
#include "native/bind.h"
#include "native/gguf_blocks.h"

namespace lowbit {
namespace {

using namespace simd;

struct Factors {
  const float* global;  // one, or null
  const void* columns;  // [k] or null
  int columns_dtype;
};

// Columns [0, count) of up to 16 rows, from a panel of such columns; at[r]: where a row begins in the output.
void store_rows(const float* panel, int64_t count, int64_t column, const int64_t (&at)[kBlockRows], int rows,
                const Factors& by, void* out, int dtype) {
  for (int64_t c = 0; c < count; c += kLanes)
    for (int v = 0; v < kBlockVectors; ++v) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load_f32(panel + (c + i) * kBlockRows + v * kLanes);
      transpose(square);
      for (int r = 0; r < kLanes && v * kLanes + r < rows; ++r) {
        F32 value = square[r];
        if (by.global) value = mul(value, set1_f32(*by.global));
        if (by.columns) value = mul(value, load_as_f32(by.columns, column + c, by.columns_dtype));
        store_from_f32(out, at[v * kLanes + r] + column + c, value, dtype);
      }
    }
}

// The rows of a strip; at[r]: where one begins in the output.
template <class T, class Blocks>
void decode_strip(const typename Blocks::Strip& strip, const int64_t (&at)[kBlockRows], int count, int64_t k,
                  const Factors& by, void* out, int dtype) {
  constexpr int kPiece = T::kColumns * (256 / T::kColumns);  // columns that a first-level cache has room for
  typename Blocks::Words words;
  alignas(64) float panel[kPiece * kBlockRows];
  for (int64_t first = 0; first < k; first += kPiece) {
    const int64_t last = std::min<int64_t>(first + kPiece, k);
    for (int64_t c = first; c < last; c += T::kColumns) {
      strip.read(c / T::kColumns, words);
      gguf::decode(words, panel + (c - first) * kBlockRows, kBlockRows);
    }
    store_rows(panel, last - first, first, at, count, by, out, dtype);
  }
}

int64_t index_at(const void* indices, int64_t i, bool wide) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

}  // namespace

// Rows of a weight [n, k] -> [count, k] of a dtype: those that `indices` (of 64 or 32 bits) name, or without them
// `first` and those that follow. Where the first index lies that names no row, and nothing is decoded; -1: all do.
// packed: the blocks are in the layout gguf_rows16, `stride` is the bytes of a strip, and all rows are wanted.
int64_t dequantize_gguf(int type, Ptr<const uint8_t> codes, int64_t stride, bool packed, int64_t n, int64_t k,
                        Ptr<const void> indices, bool wide, int64_t first, int64_t count, Ptr<const float> global,
                        Ptr<const void> columns, int columns_dtype, Ptr<void> out, int dtype, int threads) {
  const auto row = [&](int64_t i) { return indices ? index_at(indices, i, wide) : first + i; };
  for (int64_t i = 0; indices && i < count; ++i)
    if (row(i) < 0 || row(i) >= n) return i;
  const Factors by{global, columns, columns_dtype};
  gguf::with_type(type, [&](auto kind) {
    using T = decltype(kind);
    parallel_for((count + kBlockRows - 1) / kBlockRows, threads, [&](int64_t task) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, count - task * kBlockRows));
      const auto decode = [&](auto blocks, const auto& strip) {
        int64_t at[kBlockRows];
        for (int r = 0; r < kBlockRows; ++r) at[r] = (task * kBlockRows + r) * k;
        decode_strip<T, decltype(blocks)>(strip, at, rows, k, by, out, dtype);
      };
      if (packed) {
        const gguf::PackedBlocks<T> blocks{codes, stride, n, k};
        return decode(blocks, blocks.strip(task));
      }
      typename gguf::PlainBlocks<T>::Strip strip;
      for (int r = 0; r < kBlockRows; ++r)
        strip.rows[r] = codes + row(std::min(task * kBlockRows + r, count - 1)) * stride;
      decode(gguf::PlainBlocks<T>{codes, stride, n, k}, strip);
    });
  });
  return -1;
}

void bind_dequantize_gguf(nb::module_& m) {
  m.def("dequantize_gguf", &dequantize_gguf, nb::call_guard<nb::gil_scoped_release>(), nb::arg("type"),
        nb::arg("codes"), nb::arg("stride"), nb::arg("packed"), nb::arg("n"), nb::arg("k"), nb::arg("indices"),
        nb::arg("wide"), nb::arg("first"), nb::arg("count"), nb::arg("global"), nb::arg("columns"),
        nb::arg("columns_dtype"), nb::arg("out"), nb::arg("dtype"), nb::arg("threads"));
}

}  // namespace lowbit
