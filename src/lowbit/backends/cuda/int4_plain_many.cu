// int4_plain_mm for many tokens: both operands as numbers of 16 bits, for a product that others do.
#include "int8_blocks.cuh"

namespace lowbit {

constexpr int kThreads = 256;

// x rounded to int8 by blocks of 32 columns, and times its scale again: 16 columns a thread, `halves` of them.
template <Dtype dtype>
__global__ void __launch_bounds__(kThreads)
    rounded_blocks(const void* __restrict__ x, void* __restrict__ out, int halves) {
  const int64_t begins = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t at = begins < halves ? begins : halves - 2 + begins % 2;
  const HalfBlock made = round_half_block<dtype>(x, at * 16);
  if (begins >= halves) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t codes = j % 2 ? made.odd[i] : made.even[i];
      values[j] = float((signed char)(codes >> j / 2 * 8)) * made.scale;
    }
    store_eight<dtype>(out, at * 16 + 8 * i, values);
  }
}

// `words` words of 8 codes -> (code - zero) * scale. A thread decodes kWords of them, kThreads apart; a group has
// 2**shift words, and groups lie as their words do: row after row.
template <Dtype dtype, Dtype scale_type, bool kZeros, int kWords>
__global__ void __launch_bounds__(kThreads)
    decoded_rows(const unsigned* __restrict__ codes, const void* __restrict__ scale, const void* __restrict__ zero,
                 void* __restrict__ out, int words, int shift) {
  uint32_t found[kWords], factors[kWords], offsets[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = min((int(blockIdx.x) * kWords + i) * kThreads + int(threadIdx.x), words - 1);
    found[i] = __ldcs(codes + at);
    factors[i] = load_bits<scale_type>(scale, (uint32_t(at) >> shift) * kSizeOf<scale_type>);
    if constexpr (kZeros) offsets[i] = load_bits<scale_type>(zero, (uint32_t(at) >> shift) * kSizeOf<scale_type>);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = (int(blockIdx.x) * kWords + i) * kThreads + int(threadIdx.x);
    const float factor = number<scale_type>(factors[i]), offset = kZeros ? number<scale_type>(offsets[i]) : 8.0f;
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float code = __uint_as_float(masked<0xFu, uint32_t(kMagicBits)>(found[i] >> 4 * j)) - kMagic;
      values[j] = (code - offset) * factor;
    }
    if (at < words) store_eight<dtype>(out, int64_t(at) * 8, values);
  }
}

}  // namespace lowbit
