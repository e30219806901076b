// int4_plain_mm for few tokens: activations are rounded to int8 by blocks of 32 columns, and rows of 4-bit codes are
// multiplied with them four products at a time.
//
//   out[m, n] = sum over blocks b of  scale[n, g] * d[m, b] * (sum of q * a  -  zero[n, g] * sum of a)  + bias[n]
//
// A lane takes the 32 columns of a block, 16 bytes of a row; a warp takes kRows rows, 32 blocks at a time, so that its
// lanes read neighbouring bytes and neighbouring scales (the layout coalesced_int4). The next bytes are asked for
// before the last ones are used, and the first of all before the activations are rounded. Where rows are few, kSplit
// warps share the blocks of the same rows. Sums over blocks stay in a lane, and are added across warps once, at the
// end, in a fixed order.
//
// High nibbles are multiplied where they stand, 16 times too large; so is, with a shift of the low ones' sum, every
// product, which is set right at the end.
#include "int8_blocks.cuh"

namespace lowbit {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// x [m, 32 blocks] -> codes of the same shape (int8_blocks.cuh); and for tokens below m `steps`, [blocks, 1 + kPieces,
// wide]: the scale of the block, and the sums of its codes, times `unit`, by groups. A thread rounds half a block.
template <Dtype dtype, int kPieces>
__global__ void __launch_bounds__(kThreads)
    round_blocks(const void* __restrict__ x, unsigned char* __restrict__ codes, float* __restrict__ steps, float unit,
                 int m, int blocks, int wide) {
  const int64_t halves = int64_t(m) * blocks * 2;
  const int64_t begins = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t at = begins < halves ? begins : halves - 2 + begins % 2;
  const HalfBlock made = round_half_block<dtype>(x, at * 16);
  const int half = int(at % 2), token = int(at / 2 / blocks), block = int(at / 2 % blocks);
  const bool mine = begins < halves;
  float* own = steps + int64_t(block) * (1 + kPieces) * wide + token;
  put_sums<kPieces>(made, half, unit, [&](int piece, float sum) {
    if (mine) own[(1 + piece) * wide] = sum;
  });
  if (!mine) return;
  auto* to = reinterpret_cast<uint2*>(codes + at / 2 * 32) + half;
  to[0] = make_uint2(made.even[0], made.even[1]);
  to[2] = make_uint2(made.odd[0], made.odd[1]);
  if (half == 0) *own = made.scale;
}

// Adds kCount values, of each lane its own, over the warp: the sum of value i is in values[0] of the lanes that
// `index_of_sum` says.
template <int kCount>
LOWBIT_DEVICE void add_over_warp(float (&values)[kCount], int lane) {
  int mask = 16;
#pragma unroll
  for (int half = kCount / 2; half; half /= 2, mask /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & mask;
      const float sent = upper ? values[i] : values[i + half];
      values[i] = (upper ? values[i + half] : values[i]) + from_lane_xor(sent, mask);
    }
  }
#pragma unroll
  for (; mask; mask /= 2) values[0] += from_lane_xor(values[0], mask);
}

// The highest bits of the lane's number, of which there are as many as in that of a value.
template <int kCount>
LOWBIT_DEVICE int index_of_sum(int lane) {
  return lane / (32 / kCount);
}

// x is rounded here where kFused, into dynamic shared memory: 32 bytes of codes, a scale and kPieces sums a block and
// token. Else codes and steps are round_blocks', with unit 16 and wide 8. A group has 2**shift blocks, or there are
// kPieces groups in a block. kNative: scale and zero are [groups, n], which costs a memory line a number.
template <Dtype dtype, Dtype scale_type, bool kZeros, int kTokens, int kRows, int kSplit, int kPieces, bool kFused,
          bool kNative>
__global__ void __launch_bounds__(kThreads, kTokens* kPieces > 1 ? 2
                                            : kRows > 2          ? 3
                                                                 : 5)
    int4_rows(const void* __restrict__ x, const uint4* __restrict__ codes, const float* __restrict__ steps,
              const void* __restrict__ weights, const void* __restrict__ scale, const void* __restrict__ zero,
              const void* __restrict__ bias, void* __restrict__ out, int m, int n, int blocks, int shift) {
  constexpr int kWide = 8, kOutputs = kRows * kTokens, kStep = 32 * kSplit;
  constexpr uint32_t kSize = kSizeOf<scale_type>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = kWarps / kSplit * kRows;  // of this block of warps
  const int first = blockIdx.x * rows + warp / kSplit * kRows;
  const uint32_t groups = kPieces > 1 ? uint32_t(blocks) * kPieces : uint32_t(blocks) >> shift;
  int block = warp % kSplit * 32 + lane;

  uint32_t weights_at[kRows], scales_at[kRows];  // in bytes
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t row = min(first + r, n - 1);  // rows behind the last repeat it: they are never stored
    weights_at[r] = (row * uint32_t(blocks) + block) * 16;
    scales_at[r] = (kNative ? row : row * groups) * kSize;
  }
  uint4 ahead[kRows];
  uint32_t factor_ahead[kRows][kPieces], offset_ahead[kRows][kPieces];
  const auto fetch = [&](int block) {
    const uint32_t group = kPieces > 1 ? uint32_t(block) * kPieces : uint32_t(block) >> shift;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      ahead[r] = __ldcs(behind<uint4>(weights, weights_at[r]));
      weights_at[r] += kStep * 16;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const uint32_t at = scales_at[r] + (group + p) * (kNative ? uint32_t(n) : 1u) * kSize;
        factor_ahead[r][p] = load_bits<scale_type>(scale, at);
        if constexpr (kZeros) offset_ahead[r][p] = load_bits<scale_type>(zero, at);
      }
    }
  };
  if (block < blocks) fetch(block);

  auto* even = reinterpret_cast<uint4*>(dynamic_shared());  // [m, blocks], then the odd columns'
  auto* odd = even + m * blocks;
  auto* own_steps = reinterpret_cast<float*>(odd + m * blocks);  // [m, blocks]
  auto* own_sums = own_steps + m * blocks;                       // [m, blocks, kPieces]
  if constexpr (kFused) {
    const int halves = m * blocks * 2;
#pragma unroll 1
    for (int begins = warp * 32; begins < halves; begins += kThreads) {
      const int at = min(begins + lane, halves - 2 + lane % 2);
      const HalfBlock made = round_half_block<dtype>(x, int64_t(at) * 16);
      put_sums<kPieces>(made, at % 2, 16.0f, [&](int piece, float sum) { own_sums[at / 2 * kPieces + piece] = sum; });
      reinterpret_cast<uint2*>(even)[at] = make_uint2(made.even[0], made.even[1]);
      reinterpret_cast<uint2*>(odd)[at] = make_uint2(made.odd[0], made.odd[1]);
      if (at % 2 == 0) own_steps[at / 2] = made.scale;
    }
    __syncthreads();
  }

  float totals[kOutputs] = {};
#pragma unroll 1
  for (; block < blocks; block += kStep) {
    uint32_t low[kRows][4], high[kRows][4];
    float factor[kRows][kPieces], offset[kRows][kPieces];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t words[4] = {ahead[r].x, ahead[r].y, ahead[r].z, ahead[r].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) low[r][i] = words[i] & 0x0F0F0F0Fu, high[r][i] = words[i] & 0xF0F0F0F0u;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        factor[r][p] = number<scale_type>(factor_ahead[r][p]);
        offset[r][p] = kZeros ? number<scale_type>(offset_ahead[r][p]) : 8.0f;
      }
    }
    if (block + kStep < blocks) fetch(block + kStep);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (kTokens > 2 && t >= m) break;
      uint4 left, right;
      float step, moments[kPieces];
      if constexpr (kFused) {
        left = even[t * blocks + block], right = odd[t * blocks + block], step = own_steps[t * blocks + block];
#pragma unroll
        for (int p = 0; p < kPieces; ++p) moments[p] = own_sums[(t * blocks + block) * kPieces + p];
      } else {
        const auto* from = behind<uint4>(codes, (uint32_t(t) * blocks + block) * 32);
        const auto* by = behind<float>(steps, (block * (1 + kPieces) * kWide + t) * 4);
        left = __ldg(from), right = __ldg(from + 1), step = __ldg(by);
#pragma unroll
        for (int p = 0; p < kPieces; ++p) moments[p] = __ldg(by + (1 + p) * kWide);
      }
      const uint32_t lefts[4] = {left.x, left.y, left.z, left.w}, rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          int evens = 0, odds = kMagicBits;
#pragma unroll
          for (int i = 4 * p / kPieces; i < 4 * (p + 1) / kPieces; ++i) {
            evens = dot4(low[r][i], lefts[i], evens);
            odds = dot4_unsigned(high[r][i], rights[i], odds);
          }
          const float product = __uint_as_float(uint32_t(16 * evens + odds)) - kMagic;
          float& total = totals[r * kTokens + t];
          total = fmaf(factor[r][p] * step, fmaf(-offset[r][p], moments[p], product), total);
        }
    }
  }

  __shared__ float shared[kWarps][kOutputs];
  add_over_warp<kOutputs>(totals, lane);
  if (lane % (32 / kOutputs) == 0) shared[warp][index_of_sum<kOutputs>(lane)] = totals[0];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kTokens; i += kThreads) {
    const int row = i % rows, token = i / rows, at = blockIdx.x * rows + row;
    if (at >= n || token >= m) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < kSplit; ++s) total += shared[row / kRows * kSplit + s][row % kRows * kTokens + token];
    total *= 0.0625f;
    if (bias != nullptr) total += load_number<dtype>(bias, at);
    store_number<dtype>(out, int64_t(token) * n + at, total);
  }
}

}  // namespace lowbit
