// Rows of w4a8_codebook as the int8 that a matrix product sees:
//
//   v = clamp(round(level[code] * s_rel), -127, 127)          0 where that is NaN, as an int8 is none
//
// Codes have 4 bits, and a table of 16 levels or code - 8; or 6 bits, and stand for code - 32. A scale is one of 256
// where it is float8_e4m3fn: then all tables of 16 integers are made once a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "coded_rows.h"

namespace lowbit {

// What a launcher says of a weight.
struct CodebookWeight {
  const uint8_t* codes;  // [n, stride] bytes
  int64_t stride, n, k, group;
  const void* scales;  // s_rel: [n, scale_stride] float8_e4m3fn, or float32
  int64_t scale_stride;
  bool wide_scales;
  const float* levels;  // [16] or null
  int bits;
  const float* rows;  // s_channel: [n]
};

class CodebookRows {
 public:
  static constexpr int64_t kPad = 4 * simd::kLanes;  // bytes behind a row that whole vectors may touch

  explicit CodebookRows(const CodebookWeight& w) : w_(w), tables_(w.wide_scales || w.bits != 4 ? 0 : 256 * 16 / 4) {
    for (int code = 0; code < 16; ++code) levels_[code] = w.levels ? w.levels[code] : static_cast<float>(code - 8);
    finite_levels_ = std::all_of(levels_, levels_ + 16, [](float level) { return std::isfinite(level); });
    if (w.wide_scales || w.bits != 4) return;
    const auto& values = detail::ByteValues::get().e4m3;
    auto* to = reinterpret_cast<uint8_t*>(tables_.data());
    for (size_t scale = 0; scale < 256; ++scale) make_table(values[scale], to + scale * 16);
  }

  const CodebookWeight& weight() const { return w_; }

  float scale(int64_t row, int64_t group) const {
    const int64_t at = row * w_.scale_stride + group;
    if (w_.wide_scales) return static_cast<const float*>(w_.scales)[at];
    return detail::ByteValues::get().e4m3[static_cast<const uint8_t*>(w_.scales)[at]];
  }

  // Columns [first, last) of a row, both multiples of 16 and of the group -> to[0 .. last - first + kPad).
  void expand(int64_t row, int64_t first, int64_t last, uint8_t* room, int8_t* to) const {
    read_codes(row, first, last, room);
    if (w_.bits == 6) return multiply(row, first, last, room, to);
    std::memset(room + (last - first), 0, kPad);  // codes, too
    if (!w_.wide_scales) return look_up(row, first, last, room, to);
    alignas(16) uint8_t table[16];
    for (int64_t c = 0; c < last - first; c += w_.group) {
      make_table(scale(row, (first + c) / w_.group), table);
      look_up_group(table, room + c, w_.group, to + c);
    }
  }

  // Whether `values` gives what `expand` does: groups are those of a table, and all tables are there.
  bool has_values() const { return w_.bits == 4 && !w_.wide_scales && w_.group == 16; }
  static constexpr int64_t kValues = 4 * simd::kLanes;  // columns that `values` takes at once

  // Where a row's codes and scales lie.
  struct Place {
    const uint8_t *codes, *scales;

    void advance() { codes += kValues / 2, scales += kValues / 16; }
  };
  Place place(int64_t row) const {
    return {w_.codes + row * w_.stride, static_cast<const uint8_t*>(w_.scales) + row * w_.scale_stride};
  }

  // The next kValues columns of a row that has them.
  static simd::Bytes values(const uint8_t* tables, const Place& at) {
    return simd::lookup_bytes(simd::choose_tables(tables, at.scales), simd::nibbles_in_order(at.codes));
  }
  const uint8_t* tables() const { return reinterpret_cast<const uint8_t*>(tables_.data()); }

  // NaN to those of a row's values [0, k) that are none as an int8; `room` as `expand` left it for the whole row.
  void put_nan(int64_t row, const uint8_t* room, float* values) const {
    if (finite_levels_ && has_finite_scales(row)) return;
    for (int64_t c = 0; c < w_.k; ++c) {
      const float level = w_.bits == 4 ? levels_[room[c]] : static_cast<float>(room[c] - 32);
      if (std::isnan(level * scale(row, c / w_.group))) values[c] = NAN;
    }
  }

 private:
  // round(level * scale), half to even, within int8. Clamped before it is rounded: a scale may be infinite.
  static simd::I32 integers(simd::F32 level, simd::F32 scale) {
    using namespace simd;
    const F32 value = mul(level, scale);
    const I32 within = to_i32(max(min(value, set1_f32(127.0f)), set1_f32(-127.0f)));
    return select(not_a_number(value), zero_i32(), within);
  }

  // Loops without a branch, of which the compiler makes vectors.
  bool has_finite_scales(int64_t row) const {
    const int64_t first = row * w_.scale_stride, groups = w_.k / w_.group;
    bool finite = true;
    if (w_.wide_scales) {
      const float* scales = static_cast<const float*>(w_.scales) + first;
      for (int64_t g = 0; g < groups; ++g) finite &= std::fabs(scales[g]) <= std::numeric_limits<float>::max();
    } else {
      const uint8_t* scales = static_cast<const uint8_t*>(w_.scales) + first;
      for (int64_t g = 0; g < groups; ++g) finite &= (scales[g] & 0x7f) != 0x7f;
    }
    return finite;
  }

  void make_table(float scale, uint8_t* to) const {
    using namespace simd;
    for (int i = 0; i < 16; i += kLanes) store_low_bytes(to + i, integers(load_f32(levels_ + i), set1_f32(scale)));
  }

  // The end of a vector that is wider than a group is written again with the next one.
  static void look_up_group(const uint8_t* table, const uint8_t* codes, int64_t group, int8_t* to) {
    for (int64_t c = 0; c < group; c += kPad)
      simd::store_bytes(to + c, simd::lookup_bytes(table, simd::load_bytes(codes + c)));
  }

  void look_up(int64_t row, int64_t first, int64_t last, const uint8_t* codes, int8_t* to) const {
    const int64_t group = w_.group, count = last - first;
    const auto* tables = reinterpret_cast<const uint8_t*>(tables_.data());
    const uint8_t* scale = static_cast<const uint8_t*>(w_.scales) + row * w_.scale_stride + first / group;
    __builtin_prefetch(scale + count / group);
    for (int64_t c = 0; c < count; c += group, ++scale) look_up_group(tables + *scale * 16, codes + c, group, to + c);
  }

  void read_codes(int64_t row, int64_t first, int64_t last, uint8_t* to) const {
    const uint8_t* low = w_.codes + row * w_.stride;
    const uint8_t* from = low + first / 2;
    const int64_t bytes = (last - first) / 2;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + bytes + i);  // what is likely to be read next
    for (int64_t i = 0; i < bytes; ++i) {
      to[2 * i] = from[i] & 15;
      to[2 * i + 1] = from[i] >> 4;
    }
    if (w_.bits != 6) return;
    const uint8_t* upper = low + w_.k / 2 + first / 4;
    for (int64_t i = 0; i < (last - first) / 4; ++i)
      for (int j = 0; j < 4; ++j) to[4 * i + j] |= static_cast<uint8_t>((upper[i] >> (2 * j) & 3) << 4);
  }

  void multiply(int64_t row, int64_t first, int64_t last, const uint8_t* codes, int8_t* to) const {
    using namespace simd;
    for (int64_t c = 0, g = first / w_.group; c < last - first; ++g) {
      const F32 by = set1_f32(scale(row, g));
      for (const int64_t end = c + w_.group; c < end; c += kLanes) {
        const F32 level = to_f32(sub(widen_u8(codes + c), set1_i32(32)));
        store_low_bytes(reinterpret_cast<uint8_t*>(to) + c, integers(level, by));
      }
    }
  }

  const CodebookWeight w_;
  Room tables_;  // [256, 16] int8
  alignas(64) float levels_[16];
  bool finite_levels_;
};

}  // namespace lowbit
