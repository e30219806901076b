// Rows to int8 codes, by pieces of 1024 columns that a warp holds as float32, 32 a lane.
//
//   scale = absmax / 127, at least 1e-30        code = value / scale, rounded half to even
#pragma once

#include "regular_hadamard.cuh"
#include "rows.cuh"

namespace lowbit {

constexpr int kPiece = 1024;  // columns of a warp

// NaN stays NaN.
LOWBIT_DEVICE float int8_scale(float largest) {
  const float scale = largest / 127.0f;
  return scale < 1e-30f ? 1e-30f : scale;
}

// The code of value / scale, as the lowest byte. The quotient is IEEE's: a product with the reciprocal, corrected by
// its exact remainder. It is below 127.5 for every value of the row.
LOWBIT_DEVICE uint32_t int8_code(float value, float scale, float reciprocal) {
  const float near = value * reciprocal;
  const float quotient = fmaf(fmaf(-near, scale, value), reciprocal, near);
  return __float_as_uint(quotient + 12582912.0f);  // 1.5 * 2**23: its last bit is worth 1
}

LOWBIT_DEVICE uint32_t four_int8_codes(const float* values, float scale, float reciprocal) {
  const uint32_t a = int8_code(values[0], scale, reciprocal), b = int8_code(values[1], scale, reciprocal);
  const uint32_t c = int8_code(values[2], scale, reciprocal), d = int8_code(values[3], scale, reciprocal);
  return pick_bytes<0x5410>(pick_bytes<0x0040>(a, b), pick_bytes<0x0040>(c, d));
}

// kAligned: rows begin at multiples of 16 bytes, and their length is a multiple of 8.
template <Dtype dtype, Activation activation, int kRotation, bool kAligned>
struct Int8Piece {
  float values[32];

  // The first of the eight columns in chunk 0..3 of a lane.
  LOWBIT_DEVICE static int column(int piece, int lane, int chunk) {
    return piece * kPiece + (kRotation ? rotated_column(lane, chunk) : chunk * 256 + lane * 8);
  }

  // Piece `piece` of a row of x [m, k], of SwiGLU [m, 2 k], activated and rotated. present: k, or 0 for no row.
  LOWBIT_DEVICE void read(const void* x, int row, int piece, int k, int present, int lane) {
    const int64_t start = int64_t(row) * (activation == kSwiGLU ? 2 : 1) * k;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const int from = column(piece, lane, chunk);
      float eight[8], up[8] = {};
      load_columns<dtype, kAligned>(x, start + from, present - from, eight);
      if constexpr (activation == kSwiGLU) load_columns<dtype, kAligned>(x, start + k + from, present - from, up);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float value = eight[i];
        if constexpr (activation != kNone) value = rounded_to<dtype>(activated<activation>(value, up[i]));
        if constexpr (kRotation != 0) value *= kNorm<kRotation>;
        values[8 * chunk + i] = value;
      }
    }
    if constexpr (kRotation != 0) rotate<kRotation>(values);
  }

  // The largest magnitude of a lane.
  LOWBIT_DEVICE float largest() const {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) found = larger(found, values[i]);
    return found;
  }

  // The codes to their places in a row. All are zero where the scale is not finite.
  LOWBIT_DEVICE void write(signed char* row, float scale, int piece, int present, int lane) const {
    const float reciprocal = 1.0f / scale;
    const uint32_t mask = is_finite(scale) ? 0xFFFFFFFFu : 0u;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const int to = column(piece, lane, chunk);
      if (to >= present) continue;
      const uint32_t low = four_int8_codes(values + 8 * chunk, scale, reciprocal) & mask;
      const uint32_t high = four_int8_codes(values + 8 * chunk + 4, scale, reciprocal) & mask;
      if constexpr (kAligned) {
        *reinterpret_cast<uint2*>(row + to) = make_uint2(low, high);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (to + i < present) row[to + i] = (signed char)((i < 4 ? low : high) >> 8 * (i % 4));
      }
    }
  }
};

}  // namespace lowbit
