// Rows of a quantized weight as floats, by the operations of the reference in its order, so that every value is the
// same:
//
//   w = (code - zero point) * scale + offset        the scale times or over a global one; then the rotation undone
//   w * column factor                               the pre-quant scale of a column
//
// in float32, rounded once to the dtype that is wanted. Lanes are columns here, and codes lie in their plain order;
// those of the layout rows16 are put in order first, where they are read.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "float_gemm.h"
#include "rotation.h"
#include "transpose.h"

namespace lowbit {

enum class Codec : int64_t { kE4m3, kE5m2, kInt8, kE2m1, kUint4, kUint8, kInt4 };
enum class Arrangement : int64_t { kPlain, kWords, kBytes };  // of rows16: interleaved by words of 4 bytes, or by bytes
enum class ScaleKind : int64_t { kFloat32, kBfloat16, kFloat16, kE4m3, kE8m0 };  // the first three number as Dtype does
enum class GlobalScale : int64_t { kNone, kTimes, kOver };

// What a launcher writes, in this order, each as an int64.
struct CodedWeight {
  Codec codec;
  Arrangement arrangement;
  const uint8_t* codes;
  int64_t row_bytes, stride;  // stride: bytes from a row to the next, or from a block of 16 rows
  int64_t n, k, group;        // group: columns that share a scale; the last one may be shorter
  int64_t rotation;           // of groups of so many columns, or 0

  // Scales; zero points (uint8) and offsets, where there are any, lie as they do.
  const void* scales;
  ScaleKind scale_kind;
  int64_t tile_rows;                         // rows that share a scale
  int64_t block_step, row_step, group_step;  // in elements: for 16 rows (or rows of tiles), for one, for a group
  int64_t zero;                              // the code that stands for 0, without zero points
  const uint8_t* zero_points;                // or null
  const void* offsets;                       // or null
  int64_t offset_dtype;

  const float* global;
  GlobalScale global_use;
  int64_t global_by_row;

  const void* columns;  // or null
  int64_t columns_dtype;

  static CodedWeight read(const int64_t* fields) {
    CodedWeight made;
    static_assert(sizeof made == 24 * sizeof(int64_t), "every field is an int64");
    std::memcpy(static_cast<void*>(&made), fields, sizeof made);
    return made;
  }

  int64_t groups() const { return group ? (k + group - 1) / group : 1; }
};

namespace detail {

using Row16 = simd::F32[kBlockVectors];

// 16 codes from where they begin; four bits take 8 bytes, the others 16.
template <Codec kCodec>
inline void load_codes(const uint8_t* from, Row16& to) {
  using namespace simd;
  if constexpr (kCodec == Codec::kE5m2) {
    load16_e5m2(from, to);
    return;
  }
  static const float kE2m1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  static const float kInt4Values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  for (int v = 0; v < kBlockVectors; ++v) {
    if constexpr (kCodec == Codec::kE4m3) to[v] = mul(load_e4m3(from + v * kLanes), set1_f32(256.0f));
    if constexpr (kCodec == Codec::kInt8) to[v] = to_f32(widen_s8(reinterpret_cast<const int8_t*>(from) + v * kLanes));
    if constexpr (kCodec == Codec::kUint8) to[v] = to_f32(widen_u8(from + v * kLanes));
    if constexpr (kCodec == Codec::kUint4)
      to[v] = to_f32(bit_and(spread_nibbles(from + v * (kLanes / 2)), set1_i32(15)));
    if constexpr (kCodec == Codec::kInt4)
      to[v] = lookup(make_table(kInt4Values), spread_nibbles(from + v * (kLanes / 2)));
    if constexpr (kCodec == Codec::kE2m1)
      to[v] = lookup(make_table(kE2m1Values), spread_nibbles(from + v * (kLanes / 2)));
  }
}

constexpr bool is_unsigned(Codec codec) { return codec == Codec::kUint4 || codec == Codec::kUint8; }
constexpr int64_t code_bytes(Codec codec, int64_t codes) {
  return codec == Codec::kUint4 || codec == Codec::kE2m1 || codec == Codec::kInt4 ? (codes + 1) / 2 : codes;
}

inline float e4m3_value(int code) {
  const int magnitude = code & 0x7f;
  if (magnitude == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const int exponent = magnitude >> 3, mantissa = magnitude & 7;
  const float value =
      exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
  return code & 0x80 ? -value : value;
}
inline float e8m0_value(int code) {
  return code == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, code - 127);
}

struct ByteValues {
  std::array<float, 256> e4m3, e8m0;

  ByteValues() {
    for (int code = 0; code < 256; ++code) {
      e4m3[static_cast<size_t>(code)] = e4m3_value(code);
      e8m0[static_cast<size_t>(code)] = e8m0_value(code);
    }
  }
  static const ByteValues& get() {
    static const ByteValues values;
    return values;
  }
};

}  // namespace detail

// Decodes row after row of a weight, with room for the factors of one; a thread has its own.
class RowDecoder {
 public:
  explicit RowDecoder(const CodedWeight& w)
      : w_(w),
        groups_(w.groups()),
        room_(4 * (groups_ + kPad) + (w.rotation || w.columns ? w.k + kPad : 0)),
        scales_(room_.data()),
        zeros_(scales_ + groups_ + kPad),
        offsets_(zeros_ + groups_ + kPad),
        raw_(offsets_ + groups_ + kPad),
        row_(raw_ + groups_ + kPad) {}

  // Codes in plain order -> to[at .. at + k) of a dtype.
  void decode(int64_t row, const uint8_t* codes, void* to, int64_t at, int dtype) {
    read_factors(row);
    if (w_.rotation || w_.columns) {
      decode_to(codes, row_, 0, kFloat32);
      if (w_.rotation) rotate_groups(row_, w_.k, w_.rotation);
      finish(to, at, dtype);
      return;
    }
    decode_to(codes, to, at, dtype);
  }

 private:
  static constexpr int64_t kPad = 16;  // floats behind each part, which whole vectors may touch

  void read_factors(int64_t row) {
    const int64_t tile = w_.tile_rows > 1 ? row / w_.tile_rows : row;
    const int64_t first = tile / kBlockRows * w_.block_step + tile % kBlockRows * w_.row_step;
    read(w_.scales, w_.scale_kind, first, scales_);
    if (w_.zero_points)
      for (int64_t g = 0; g < groups_; ++g) zeros_[g] = static_cast<float>(w_.zero_points[first + g * w_.group_step]);
    if (w_.offsets) read(w_.offsets, static_cast<ScaleKind>(w_.offset_dtype), first, offsets_);
    if (w_.global_use == GlobalScale::kNone) return;
    const float global = w_.global[w_.global_by_row ? row : 0];
    if (w_.global_use == GlobalScale::kTimes) {
      for (int64_t g = 0; g < groups_; ++g) scales_[g] *= global;
    } else {
      for (int64_t g = 0; g < groups_; ++g) scales_[g] /= global;
    }
  }

  void read(const void* from, ScaleKind kind, int64_t first, float* to) const {
    const int64_t step = w_.group_step;
    if (kind == ScaleKind::kE4m3 || kind == ScaleKind::kE8m0) {
      const auto& values = kind == ScaleKind::kE4m3 ? detail::ByteValues::get().e4m3 : detail::ByteValues::get().e8m0;
      const uint8_t* at = static_cast<const uint8_t*>(from) + first;
      for (int64_t g = 0; g < groups_; ++g) to[g] = values[at[g * step]];
      return;
    }
    if (kind == ScaleKind::kFloat32) {
      const float* at = static_cast<const float*>(from) + first;
      for (int64_t g = 0; g < groups_; ++g) to[g] = at[g * step];
      return;
    }
    const uint16_t* at = static_cast<const uint16_t*>(from) + first;
    auto* bits = reinterpret_cast<uint16_t*>(raw_);
    for (int64_t g = 0; g < groups_; ++g) bits[g] = at[g * step];
    for (int64_t g = 0; g < groups_; g += simd::kLanes)
      simd::store_f32(to + g, kind == ScaleKind::kBfloat16 ? simd::load_bf16(bits + g) : simd::load_f16(bits + g));
  }

  void decode_to(const uint8_t* codes, void* to, int64_t at, int dtype) const {
    switch (dtype) {
      case kFloat32:
        return decode_by<kFloat32>(codes, to, at);
      case kBfloat16:
        return decode_by<kBfloat16>(codes, to, at);
      default:
        return decode_by<kFloat16>(codes, to, at);
    }
  }

  template <int kDtype>
  void decode_by(const uint8_t* codes, void* to, int64_t at) const {
    switch (w_.codec) {
      case Codec::kE4m3:
        return decode_groups<Codec::kE4m3, kDtype>(codes, to, at);
      case Codec::kE5m2:
        return decode_groups<Codec::kE5m2, kDtype>(codes, to, at);
      case Codec::kInt8:
        return decode_groups<Codec::kInt8, kDtype>(codes, to, at);
      case Codec::kE2m1:
        return decode_groups<Codec::kE2m1, kDtype>(codes, to, at);
      case Codec::kUint4:
        return decode_groups<Codec::kUint4, kDtype>(codes, to, at);
      case Codec::kUint8:
        return decode_groups<Codec::kUint8, kDtype>(codes, to, at);
      case Codec::kInt4:
        return decode_groups<Codec::kInt4, kDtype>(codes, to, at);
    }
  }

  template <Codec kCodec, int kDtype>
  void decode_groups(const uint8_t* codes, void* to, int64_t at) const {
    using namespace simd;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t first = g * w_.group, last = w_.group ? std::min(first + w_.group, w_.k) : w_.k;
      const F32 scale = set1_f32(scales_[g]), offset = set1_f32(w_.offsets ? offsets_[g] : 0.0f);
      const F32 zero = set1_f32(w_.zero_points ? zeros_[g] : static_cast<float>(w_.zero));
      auto value = [&](F32 code) {
        if constexpr (detail::is_unsigned(kCodec)) code = sub(code, zero);
        const F32 product = mul(code, scale);
        if constexpr (kCodec == Codec::kUint4) return w_.offsets ? add(product, offset) : product;
        return product;
      };
      int64_t c = first;
      detail::Row16 values;
      for (; c + 16 <= last; c += 16) {
        detail::load_codes<kCodec>(codes + detail::code_bytes(kCodec, c), values);
        for (auto& one : values) one = value(one);
        if constexpr (kDtype == kBfloat16) {
          store16_bf16(static_cast<uint16_t*>(to) + at + c, values);
        } else {
          for (int v = 0; v < kBlockVectors; ++v) store_from_f32(to, at + c + v * kLanes, values[v], kDtype);
        }
      }
      if (c < last) {
        const int left = static_cast<int>(last - c);
        alignas(64) uint8_t room[16] = {};
        std::memcpy(room, codes + detail::code_bytes(kCodec, c), static_cast<size_t>(detail::code_bytes(kCodec, left)));
        detail::load_codes<kCodec>(room, values);
        for (int v = 0; v * kLanes < left; ++v)
          store_first(to, at + c + v * kLanes, std::min(kLanes, left - v * kLanes), value(values[v]), kDtype);
      }
    }
  }

  // The row buffer times the factors of columns -> the output.
  void finish(void* to, int64_t at, int dtype) const {
    using namespace simd;
    for (int64_t c = 0; c < w_.k; c += kLanes) {
      const int left = static_cast<int>(std::min<int64_t>(kLanes, w_.k - c));
      F32 value = load_f32(row_ + c);
      const int columns_dtype = static_cast<int>(w_.columns_dtype);
      if (left == kLanes) {
        if (w_.columns) value = mul(value, load_as_f32(w_.columns, c, columns_dtype));
        store_from_f32(to, at + c, value, dtype);
      } else {
        if (w_.columns) value = mul(value, load_first(w_.columns, c, left, columns_dtype));
        store_first(to, at + c, left, value, dtype);
      }
    }
  }

  const CodedWeight& w_;
  const int64_t groups_;
  Room room_;
  float *scales_, *zeros_, *offsets_, *raw_, *row_;
};

// The codes of one row of a block of rows16, in plain order: to[0 .. row_bytes).
inline void unpack_row(const CodedWeight& w, int64_t row, uint8_t* to) {
  const uint8_t* block = w.codes + row / kBlockRows * w.stride;
  const int64_t r = row % kBlockRows;
  if (w.arrangement == Arrangement::kBytes) {
    for (int64_t c = 0; c < w.row_bytes; ++c) to[c] = block[c * kBlockRows + r];
    return;
  }
  for (int64_t word = 0; word < w.row_bytes / 4; ++word)
    std::memcpy(to + 4 * word, block + (word * kBlockRows + r) * 4, 4);
}

// The codes of a whole block, row after row: to[16 * row_bytes].
inline void unpack_block(const CodedWeight& w, int64_t block, uint8_t* to) {
  const uint8_t* from = w.codes + block * w.stride;
  int64_t byte = 0;  // 16 of a row at a time
  for (; byte + 16 <= w.row_bytes; byte += 16) {
    if (w.arrangement == Arrangement::kBytes) {
      transpose_bytes(from + byte * kBlockRows, to + byte, w.row_bytes);
    } else {
      transpose_words(from + byte * kBlockRows, to + byte, w.row_bytes);
    }
  }
  const int64_t unit = w.arrangement == Arrangement::kBytes ? 1 : 4;
  for (; byte < w.row_bytes; byte += unit)
    for (int64_t r = 0; r < kBlockRows; ++r)
      std::memcpy(to + r * w.row_bytes + byte, from + byte * kBlockRows + r * unit, static_cast<size_t>(unit));
}

// Rows [first, last) of the weight -> to [last - first, k] of a dtype.
inline void decode_rows(const CodedWeight& w, int64_t first, int64_t last, void* to, int dtype, int threads) {
  // Tasks of whole blocks, large beside the price of claiming one.
  const int64_t run = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, w.k * kBlockRows)) * kBlockRows;
  const int64_t begin = first / kBlockRows * kBlockRows;
  parallel_for((last - begin + run - 1) / run, threads, [&](int64_t task) {
    const int64_t start = std::max(first, begin + task * run), stop = std::min(last, begin + (task + 1) * run);
    RowDecoder decoder(w);
    const bool plain = w.arrangement == Arrangement::kPlain;
    Room room(plain ? 0 : kBlockRows * w.row_bytes / 4);
    auto* unpacked = reinterpret_cast<uint8_t*>(room.data());
    for (int64_t row = start; row < stop; ++row) {
      if (!plain && (row == start || row % kBlockRows == 0)) unpack_block(w, row / kBlockRows, unpacked);
      const uint8_t* codes = plain ? w.codes + row * w.stride : unpacked + row % kBlockRows * w.row_bytes;
      decoder.decode(row, codes, to, (row - first) * w.k, dtype);
    }
  });
}

}  // namespace lowbit
