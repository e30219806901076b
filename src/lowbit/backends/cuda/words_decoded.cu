// Weights of 4-bit codes as numbers of 16 bits, each rounded once, for a product that others do.
//
//   out[r, c] = alpha * (scale[g, r] * value + zero[g, r])
//
// A thread takes 16 bytes of a row: 32 columns side by side of plain bytes; of words128 four columns of each of eight
// sixteens, which four neighbouring lanes make whole pieces of 32 bytes.
#include "weight_scales.cuh"
#include "words.cuh"

namespace lowbit {

// The value of a nibble.
template <Code code>
LOWBIT_DEVICE float value_of(uint32_t nibble) {
  if constexpr (code == kIntegers) return float(int(nibble) - 8);
  const uint32_t size = nibble & 7;
  const float value = size < 2 ? 0.5f * float(size) : __uint_as_float((126 + size / 2) << 23 | (size & 1) << 22);
  return nibble & 8 ? -value : value;
}

// Rows first .. first + rows - 1 of a weight [n, k] -> out [rows, k]. group: columns that share a scale.
template <Code code, Half half, ScaleType scale_type, bool zeros, Storage storage>
__global__ void __launch_bounds__(256)
    decoded_weights(const uint4* __restrict__ codes, const void* __restrict__ scale, const void* __restrict__ zero,
                    const float* __restrict__ alpha, int alpha_kind, uint16_t* __restrict__ out, int first, int rows,
                    int n, int k, int group) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int pieces = k / 32, row = int(index / pieces), piece = int(index % pieces);
  if (row >= rows) return;
  const uint4 found = __ldcs(codes + int64_t(first + row) * pieces + piece);
  const uint32_t words[4] = {found.x, found.y, found.z, found.w};
  const float factor = factor_of_row(alpha, alpha_kind, first + row);
  uint16_t* to = out + int64_t(row) * k;
  int last = -1;
  float by = 0.0f, more = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {  // four columns
    const int column = storage == kWords ? piece / 4 * 128 + 16 * j + 4 * (piece % 4) : 32 * piece + 4 * j;
    if (column / group != last) {
      last = column / group;
      const int64_t at = int64_t(last) * n + first + row;
      by = load_scale<half, scale_type>(scale, at) * factor;
      if constexpr (zeros) more = load_scale<half, scale_type>(zero, at) * factor;
    }
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = storage == kWords ? words[i] >> 4 * j & 15 : words[j / 2] >> (4 * i + 16 * (j % 2)) & 15;
      const float value = zeros ? fmaf(value_of<code>(nibble), by, more) : value_of<code>(nibble) * by;
      const uint32_t bits = float_to_half<half>(value);
      pairs[i / 2] = i % 2 ? pairs[i / 2] | bits << 16 : bits;
    }
    *reinterpret_cast<uint2*>(to + column) = make_uint2(pairs[0], pairs[1]);
  }
}

}  // namespace lowbit
