// Rows to int8: codes and a float32 scale a row, of x, of an activation of x, and of either rotated in groups.
//
//   scale = absmax / 127, at least 1e-30        code = value / scale, rounded half to even
//
// The values stay in registers between the maximum and the division: as many warps take a row as it has pieces of 1024
// columns, and a block has several rows where they are short. Rows of more pieces than a block has warps are read
// twice.
#include "int8_rows.cuh"

namespace lowbit {

// Values of 32 bits, and SwiGLU's two for one, take more registers while they are on their way.
template <Dtype dtype, Activation activation>
constexpr int kMostWarps = dtype == kFloat32 || activation == kSwiGLU ? 16 : 20;

// x [m, k], of SwiGLU [m, 2 k]. A block has `rows` rows, more than one only where a row has one or two warps. kAligned:
// rows begin at multiples of 16 bytes, and k is a multiple of 8. kTwice: a row has more pieces than warps.
template <Dtype dtype, Activation activation, int kRotation, bool kAligned, bool kTwice>
__global__ void __launch_bounds__(32 * kMostWarps<dtype, activation>, 1)
    quantize_rows_int8(const void* __restrict__ x, signed char* __restrict__ codes, float* __restrict__ scales, int m,
                       int k, int warps_a_row, int rows) {
  using Piece = Int8Piece<dtype, activation, kRotation, kAligned>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int below = warps_a_row <= 2 ? warp >> (warps_a_row - 1) : 0, part = warp - below * warps_a_row;
  const int row = blockIdx.x * rows + below;
  const int present = row < m ? k : 0;

  Piece piece;
  float largest = 0.0f;
  for (int at = part; at == part || (kTwice && at * kPiece < k); at += warps_a_row) {
    piece.read(x, row, at, k, present, lane);
    largest = larger(largest, piece.largest());
  }
  largest = warp_largest(largest);
  __shared__ float found[32];
  if (warps_a_row > 1) {
    if (lane == 0) found[warp] = largest;
    __syncthreads();
    largest = warp_largest(lane < warps_a_row ? found[warp - part + lane] : 0.0f);
  }

  const float scale = int8_scale(largest);
  if (row < m && part == 0 && lane == 0) scales[row] = scale;
  for (int at = part; at == part || (kTwice && at * kPiece < k); at += warps_a_row) {
    if constexpr (kTwice) piece.read(x, row, at, k, present, lane);
    piece.write(codes + int64_t(row) * k, scale, at, present, lane);
  }
}

}  // namespace lowbit
