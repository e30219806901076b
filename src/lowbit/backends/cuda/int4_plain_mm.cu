// int4_plain_mm for up to 8 tokens: activations are rounded to int8 by blocks of 32 columns, and rows of 4-bit codes
// are multiplied with them four products at a time.
//
//   out[m, n] = sum over blocks b of  scale[n, g] * d[m, b] * (sum of q * a  -  zero[n, g] * sum of a)  + bias[n]
//
// A lane takes the 32 columns of a block, 16 bytes of a row; a warp takes kRows rows, 32 blocks at a time, so that its
// lanes read neighbouring bytes and neighbouring scales (the layout coalesced_int4). Sums over blocks stay in a lane,
// and are added across the warp once, at the end, in a fixed order.
#include "floats.cuh"

namespace lowbit {

enum Dtype { kFloat32 = 0, kBFloat16Type = 1, kFloat16Type = 2 };

template <Dtype dtype>
LOWBIT_DEVICE float load(const void* from, int64_t at) {
  if constexpr (dtype == kFloat32) return static_cast<const float*>(from)[at];
  constexpr Half half = dtype == kBFloat16Type ? kBFloat16 : kFloat16;
  return half_to_float<half>(static_cast<const uint16_t*>(from)[at]);
}

template <Dtype dtype>
LOWBIT_DEVICE void store(void* to, int64_t at, float value) {
  if constexpr (dtype == kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else {
    constexpr Half half = dtype == kBFloat16Type ? kBFloat16 : kFloat16;
    static_cast<uint16_t*>(to)[at] = float_to_half<half>(value);
  }
}

// One warp a block of 32 columns of a token: codes int8 [m, k], of each 8 columns the even ones first; and its scale
// and the sum of its codes, [m, k / 32]. A scale that is not finite, and its codes, are those of numerics.w4a8.
template <Dtype dtype>
__global__ void __launch_bounds__(256) quantize_blocks(const void* __restrict__ x, signed char* __restrict__ codes,
                                                       float2* __restrict__ scales, int blocks) {
  const int block = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (block >= blocks) return;
  const float value = load<dtype>(x, int64_t(block) * 32 + lane);
  const float scale = warp_max(not_a_number(value) ? value : fabsf(value)) / 127.0f;
  float inverse = 1.0f / scale;
  if (!is_finite(inverse)) inverse = 0.0f;
  float rounded = rintf(value * inverse);
  if (not_a_number(rounded)) rounded = 0.0f;
  const int code = int(fminf(fmaxf(rounded, -128.0f), 127.0f));
  codes[int64_t(block) * 32 + lane / 8 * 8 + lane % 2 * 4 + lane % 8 / 2] = (signed char)code;
  const float sum = warp_sum(float(code));
  if (lane == 0) scales[block] = {scale, sum};
}

template <Dtype dtype, Dtype scale_type, int kTokens, int kRows, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1)
    int4_rows(const uint4* __restrict__ codes, const float2* __restrict__ steps, const uint4* __restrict__ weights,
              const void* __restrict__ scale, const void* __restrict__ zero, const void* __restrict__ bias,
              void* __restrict__ out, int m, int n, int blocks, int blocks_a_group) {
  const int lane = threadIdx.x % 32, first = (blockIdx.x * kWarps + threadIdx.x / 32) * kRows;
  const int groups = blocks / blocks_a_group;
  float sums[kRows][kTokens] = {};
  for (int block = lane; block < blocks; block += 32) {
    uint4 row[kRows];
    float factor[kRows], offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = min(first + r, n - 1);  // rows behind the last repeat it: they are never stored
      row[r] = __ldcs(weights + at * blocks + block);
      factor[r] = load<scale_type>(scale, at * groups + block / blocks_a_group);
      offset[r] = load<scale_type>(zero, at * groups + block / blocks_a_group);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= m) break;
      const uint4 low = __ldg(codes + (int64_t(t) * blocks + block) * 2);
      const uint4 high = __ldg(codes + (int64_t(t) * blocks + block) * 2 + 1);
      const float2 step = __ldg(steps + int64_t(t) * blocks + block);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        int dot = dot4(row[r].x & 0x0F0F0F0Fu, low.x, 0);
        dot = dot4(row[r].x >> 4 & 0x0F0F0F0Fu, low.y, dot);
        dot = dot4(row[r].y & 0x0F0F0F0Fu, low.z, dot);
        dot = dot4(row[r].y >> 4 & 0x0F0F0F0Fu, low.w, dot);
        dot = dot4(row[r].z & 0x0F0F0F0Fu, high.x, dot);
        dot = dot4(row[r].z >> 4 & 0x0F0F0F0Fu, high.y, dot);
        dot = dot4(row[r].w & 0x0F0F0F0Fu, high.z, dot);
        dot = dot4(row[r].w >> 4 & 0x0F0F0F0Fu, high.w, dot);
        sums[r][t] = fmaf(factor[r] * step.x, fmaf(-offset[r], step.y, float(dot)), sums[r][t]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float total = warp_sum(sums[r][t]);
      if (lane != 0 || first + r >= n || t >= m) continue;
      if (bias != nullptr) total += load<dtype>(bias, first + r);
      store<dtype>(out, int64_t(t) * n + first + r, total);
    }
}

}  // namespace lowbit
