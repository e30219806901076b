// Rows to int8: codes and a float32 scale a row, of x, of an activation of x, and of either rotated in groups.
//
//   scale = absmax / 127, at least 1e-30        code = value / scale, rounded half to even
//
// A warp takes 1024 columns, 32 a lane, which stay in registers between the maximum and the division; as many warps
// take a row as it has such pieces, and a block has several rows where they are short. Rows of more pieces than a block
// has warps are read twice.
#include "regular_hadamard.cuh"
#include "rows.cuh"

namespace lowbit {

constexpr int kPiece = 1024;  // columns of a warp

// Values of 32 bits, and SwiGLU's two for one, take more registers while they are on their way.
template <Dtype dtype, Activation activation>
constexpr int kMostWarps = dtype == kFloat32 || activation == kSwiGLU ? 16 : 20;

template <int kRotation>
LOWBIT_DEVICE int column_of(int lane, int chunk) {
  return kRotation ? rotated_column(lane, chunk) : chunk * 256 + lane * 8;
}

// The code of value / scale, as the lowest byte. The quotient is IEEE's: a product with the reciprocal, corrected by
// its exact remainder. It is below 127.5 for every value of the row.
LOWBIT_DEVICE uint32_t code_of(float value, float scale, float reciprocal) {
  const float near = value * reciprocal;
  const float quotient = fmaf(fmaf(-near, scale, value), reciprocal, near);
  return __float_as_uint(quotient + 12582912.0f);  // 1.5 * 2**23: its last bit is worth 1
}

LOWBIT_DEVICE uint32_t four_codes(const float* values, float scale, float reciprocal) {
  const uint32_t a = code_of(values[0], scale, reciprocal), b = code_of(values[1], scale, reciprocal);
  const uint32_t c = code_of(values[2], scale, reciprocal), d = code_of(values[3], scale, reciprocal);
  return pick_bytes<0x5410>(pick_bytes<0x0040>(a, b), pick_bytes<0x0040>(c, d));
}

// x [m, k], of SwiGLU [m, 2 k]. A block has `rows` rows, more than one only where a row has one or two warps. kAligned:
// rows begin at multiples of 16 bytes, and k is a multiple of 8. kTwice: a row has more pieces than warps.
template <Dtype dtype, Activation activation, int kRotation, bool kAligned, bool kTwice>
__global__ void __launch_bounds__(32 * kMostWarps<dtype, activation>, 1)
    quantize_rows_int8(const void* __restrict__ x, signed char* __restrict__ codes, float* __restrict__ scales, int m,
                       int k, int warps_a_row, int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int below = warps_a_row <= 2 ? warp >> (warps_a_row - 1) : 0, part = warp - below * warps_a_row;
  const int row = blockIdx.x * rows + below;
  const int columns = row < m ? k : 0;
  const int64_t start = int64_t(row) * (activation == kSwiGLU ? 2 : 1) * k;

  const auto read = [&](int piece, float (&values)[32]) {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const int column = piece * kPiece + column_of<kRotation>(lane, chunk);
      float eight[8], up[8] = {};
      load_columns<dtype, kAligned>(x, start + column, columns - column, eight);
      if constexpr (activation == kSwiGLU) load_columns<dtype, kAligned>(x, start + k + column, columns - column, up);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float value = eight[i];
        if constexpr (activation != kNone) value = rounded_to<dtype>(activated<activation>(value, up[i]));
        if constexpr (kRotation != 0) value *= kNorm<kRotation>;
        values[8 * chunk + i] = value;
      }
    }
    if constexpr (kRotation != 0) rotate<kRotation>(values);
  };

  float values[32];
  float largest = 0.0f;
  for (int piece = part; piece == part || (kTwice && piece * kPiece < k); piece += warps_a_row) {
    read(piece, values);
#pragma unroll
    for (int i = 0; i < 32; ++i) largest = larger(largest, values[i]);
  }
  largest = warp_largest(largest);
  __shared__ float found[32];
  if (warps_a_row > 1) {
    if (lane == 0) found[warp] = largest;
    __syncthreads();
    largest = warp_largest(lane < warps_a_row ? found[warp - part + lane] : 0.0f);
  }

  float scale = largest / 127.0f;
  if (scale < 1e-30f) scale = 1e-30f;  // NaN stays
  if (row < m && part == 0 && lane == 0) scales[row] = scale;
  const float reciprocal = 1.0f / scale;
  const uint32_t mask = is_finite(scale) ? 0xFFFFFFFFu : 0u;  // no value of the row has a code otherwise
  for (int piece = part; piece == part || (kTwice && piece * kPiece < k); piece += warps_a_row) {
    if constexpr (kTwice) read(piece, values);
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const int column = piece * kPiece + column_of<kRotation>(lane, chunk);
      if (column >= columns) continue;
      const uint32_t low = four_codes(values + 8 * chunk, scale, reciprocal) & mask;
      const uint32_t high = four_codes(values + 8 * chunk + 4, scale, reciprocal) & mask;
      signed char* to = codes + int64_t(row) * k + column;
      if constexpr (kAligned) {
        *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (column + i < columns) to[i] = (signed char)((i < 4 ? low : high) >> 8 * (i % 4));
      }
    }
  }
}

}  // namespace lowbit
