// linear for up to 8 tokens and 4-bit codes in the layout words128: every weight is read once, and multiplied by tensor
// cores, whose eight columns are the tokens.
//
//   out[m, r] = alpha * sum over groups g of (scale[g, r] * sum of x * value + zero[g, r] * sum of x)  + bias[r]
//
// A block of warps has kTiles * 16 rows of the weight; its warps share out the blocks of 128 columns among them and add
// their sums through shared memory, in a fixed order. Of 128 columns a lane reads 16 bytes of a row: words 4 place .. +
// 3, which hold the columns 16 j + 4 place .. + 3 of all eight sixteens j. They stand for its four columns of operand A
// in sixteen j, and the same four of x make its operand B (mma.cuh: the order of columns is free).
//
// Integer codes are multiplied with a bias still in them (words.cuh). What it adds to the sum, and what zeros add, is
// the sum of x over the group times a number of the row; that sum comes from the tensor cores, too, as a product with
// ones. Nothing is rounded but x.
#include "floats.cuh"
#include "mma.cuh"

namespace lowbit {

enum ScaleType { kHalfScale = 0, kFloatScale = 1, kE4M3 = 2, kE8M0 = 3 };

template <Half half, ScaleType type>
LOWBIT_DEVICE float load_scale(const void* from, uint32_t at) {
  if constexpr (type == kFloatScale) return __ldg(static_cast<const float*>(from) + at);
  if constexpr (type == kHalfScale) return half_to_float<half>(__ldg(static_cast<const uint16_t*>(from) + at));
  if constexpr (type == kE8M0) return e8m0_to_float(__ldg(static_cast<const uint8_t*>(from) + at));
  return e4m3_to_float(__ldg(static_cast<const uint8_t*>(from) + at));
}

// decode_pair of a j that is constant once its loop is unrolled.
template <Code code, Half half>
LOWBIT_DEVICE uint32_t pair_of(Spread words, int j) {
  switch (j) {
    case 0:
      return decode_pair<code, half, 0>(words);
    case 1:
      return decode_pair<code, half, 1>(words);
    case 2:
      return decode_pair<code, half, 2>(words);
    case 3:
      return decode_pair<code, half, 3>(words);
    case 4:
      return decode_pair<code, half, 4>(words);
    case 5:
      return decode_pair<code, half, 5>(words);
    case 6:
      return decode_pair<code, half, 6>(words);
    default:
      return decode_pair<code, half, 7>(words);
  }
}

// kTiles: tiles of 16 rows of a warp. kSixteens: sixteens of columns that share a scale, 8 where a group has 128 or
// more.
template <Code code, Half half, ScaleType scale_type, bool zeros, int kSixteens, int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kSixteens == 1 ? 1 : 2)
    linear_words(const uint16_t* __restrict__ x, const uint4* __restrict__ codes, const void* __restrict__ scale,
                 const void* __restrict__ zero, const float* __restrict__ alpha, int alpha_step,
                 const uint16_t* __restrict__ bias, uint16_t* __restrict__ out, int m, int n, int k,
                 int blocks_a_group) {
  constexpr bool kBiased = code == kIntegers;
  constexpr bool kSums = kBiased || zeros;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
  const int first = blockIdx.x * kTiles * 16;
  const bool here = owner < m;
  const int blocks = k / 128;

  uint32_t row[kTiles][2];  // rows behind the last repeat it: they are never stored
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) row[t][h] = min(first + 16 * t + owner + 8 * h, n - 1);

  const auto* tokens = reinterpret_cast<const uint2*>(x + int64_t(here ? owner : 0) * k) + place;
  float sums[kTiles][4] = {};
  uint4 ahead[kTiles][2];
  const auto fetch = [&](int block) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) ahead[t][h] = __ldcs(codes + int64_t(row[t][h]) * (k / 32) + block * 4 + place);
  };
  if (warp < blocks) fetch(warp);

  for (int block = warp; block < blocks; block += kWarps) {
    Spread spread[kTiles][2][2];  // tile, rows, columns
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        spread[t][h][0] = spread_words(ahead[t][h].x, ahead[t][h].y);
        spread[t][h][1] = spread_words(ahead[t][h].z, ahead[t][h].w);
      }
    uint2 values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = here ? __ldg(tokens + block * 32 + j * 4) : make_uint2(0, 0);
    if (block + kWarps < blocks) fetch(block + kWarps);

#pragma unroll
    for (int begin = 0; begin < 8; begin += kSixteens) {
      float totals[4] = {};
      if constexpr (kSums) {
        constexpr uint32_t ones = half == kBFloat16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
        for (int j = begin; j < begin + kSixteens; ++j)
          mma<half>(totals, ones, ones, ones, ones, values[j].x, values[j].y);
      }
      const uint32_t group = kSixteens == 8 ? uint32_t(block) / uint32_t(blocks_a_group)
                                            : uint32_t(block) * (8 / kSixteens) + begin / kSixteens;
      const uint32_t at = group * uint32_t(n);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float part[4] = {};
#pragma unroll
        for (int j = begin; j < begin + kSixteens; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = pair_of<code, half>(spread[t][i % 2][i / 2], j);
          if constexpr (code == kE2M1 && half == kBFloat16)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fma_bfloat16_pair(a[i], 0x7E807E80u, 0x80008000u);  // times 2**126
          mma<half>(part, a[0], a[1], a[2], a[3], values[j].x, values[j].y);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float factor = load_scale<half, scale_type>(scale, at + row[t][h]);
          if constexpr (kSums) {
            float shift = kBiased ? -kBias * factor : 0.0f;
            if constexpr (zeros) shift += load_scale<half, scale_type>(zero, at + row[t][h]);
            sums[t][2 * h] = fmaf(shift, totals[0], sums[t][2 * h]);
            sums[t][2 * h + 1] = fmaf(shift, totals[1], sums[t][2 * h + 1]);
          }
          if constexpr (code == kE2M1) factor *= kE2M1Scale<half>;
          sums[t][2 * h] = fmaf(factor, part[2 * h], sums[t][2 * h]);
          sums[t][2 * h + 1] = fmaf(factor, part[2 * h + 1], sums[t][2 * h + 1]);
        }
      }
    }
  }

  __shared__ float shared[kWarps][kTiles * 16][8];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[warp][16 * t + owner + 8 * (i / 2)][2 * place + i % 2] = sums[t][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTiles * 16 * 8; i += 32 * kWarps) {
    const int r = i % (kTiles * 16), token = i / (kTiles * 16);
    if (first + r >= n || token >= m) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[w][r][token];
    if (alpha != nullptr) total *= alpha[alpha_step * (first + r)];
    if (bias != nullptr) total += half_to_float<half>(bias[first + r]);
    out[int64_t(token) * n + first + r] = float_to_half<half>(total);
  }
}

}  // namespace lowbit
