// linear for up to 8 tokens and 4-bit codes: every weight is read once, and multiplied by tensor cores, whose eight
// columns are the tokens.
//
//   out[m, r] = alpha * sum over groups g of (scale[g, r] * sum of x * value + zero[g, r] * sum of x)  + bias[r]
//
// A block of warps has kTiles * 16 rows of the weight; its warps share out the blocks of 128 columns among them and add
// their sums through shared memory, in a fixed order. Of 128 columns a lane reads 16 bytes of a row, as four words:
//
//   words128     words 4 place .. + 3, which hold the columns 16 j + 4 place .. + 3 of all eight sixteens j. They stand
//                for its four columns of operand A in sixteen j, and the same four of x make its operand B.
//   plain bytes  words that lie in as few groups as they can: 8 columns of one word are two products' share of a lane,
//                nibbles i and i + 4 side by side, and of x the columns i and i + 4.
//
// (mma.cuh: the order of columns is free, if both operands have the same.)
//
// Integer codes are multiplied with a bias still in them (words.cuh). What it adds to the sum, and what zeros add, is
// the sum of x over the group times a number of the row; that sum comes from the tensor cores, too, as a product with
// ones. An e2m1 code times the e4m3 scale of its 16 columns has six bits, and is exact in 16: such scales are
// multiplied in before the product. Nothing is rounded but x.
//
// Codes and scales of the next kDepth blocks of a warp are on their way: memory answers after some 800 ns, in which it
// could send a multiprocessor of an H200 30 KiB, and a long weight leaves a warp three blocks in all.
//
// A scale is loaded by one lane and told to the others that need it, by itself each would load as many as four do.
// Those of one byte are read by the warp as a whole, 4 rows a lane, made floats once and handed out through shared
// memory.
#include "mma.cuh"
#include "weight_scales.cuh"

namespace lowbit {

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

// The place in 16 words of plain bytes of a lane's word w, so that products of one group of columns have words of it.
template <int kSixteens>
LOWBIT_DEVICE int word_of(int place, int w) {
  if constexpr (kSixteens == 8) return 4 * place + w;
  if constexpr (kSixteens == 4) return w / 2 * 8 + 2 * place + w % 2;
  return 4 * w + place;
}

// An e4m3 scale as a pair of 16-bit floats that brings decoded e2m1 values, which are too small (words.cuh), to
// 1 / kPairScale of what they are times the scale: nothing overflows, and nothing is too small to be exact.
template <Half half>
LOWBIT_DEVICE uint32_t scale_pair(float scale) {
  if constexpr (half == kBFloat16) {
    const uint32_t bits = __float_as_uint(scale * 0x1p117f);  // 4 bits of mantissa: the upper half is all of it
    return pick_bytes<0x3232>(bits, bits);
  }
  return uint32_t(float_to_half<kFloat16>(scale * 128.0f)) * 0x00010001u;
}
template <Half half>
constexpr float kPairScale = half == kBFloat16 ? 512.0f : 128.0f;

template <Half half>
LOWBIT_DEVICE uint32_t scaled_pair(uint32_t pair, uint32_t scale) {
  if constexpr (half == kBFloat16) return fma_bfloat16_pair(pair, scale, 0x80008000u);
  return multiply_float16_pair(pair, scale);
}

// kTiles: tiles of 16 rows of a warp. kSixteens: sixteens of columns that share a scale, 8 where a group has 128 or
// more.
template <Code code, Half half, ScaleType scale_type, bool zeros, Storage storage, int kSixteens, int kTiles,
          int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 2)
    words_gemv(const uint16_t* __restrict__ x, const uint4* __restrict__ codes, const void* __restrict__ scale,
               const void* __restrict__ zero, const float* __restrict__ alpha, int alpha_kind,
               const uint16_t* __restrict__ bias, uint16_t* __restrict__ out, int m, int n, int k, int blocks_a_group) {
  constexpr bool kBiased = code == kIntegers;
  constexpr bool kSums = kBiased || zeros;
  constexpr bool kByteScales = scale_type == kE4M3 || scale_type == kE8M0;
  constexpr bool kPairs = scale_type == kE4M3;       // scales are multiplied into the weights
  constexpr int kGroups = 8 / kSixteens;             // of a block of 128 columns
  constexpr int kRow = kGroups == 8 ? 12 : kGroups;  // words of shared memory of a row's scales: few bank conflicts
  // Blocks of columns of a warp that are on their way; scales of many groups take registers, too.
  constexpr int kDepth = kByteScales || kGroups <= 2 ? 4 / kTiles : kGroups == 4 ? 3 : 2;
  constexpr int kLoad = storage == kWords || kSixteens == 8 ? 16 : kSixteens == 4 ? 8 : 4;  // bytes side by side
  constexpr int kHeldScales = kByteScales ? kGroups : 1;                                    // of a row in a lane
  constexpr bool kOwnZeros = zeros && kTiles == 2;  // with one tile half of the lanes load zeros, not scales
  static_assert(!kPairs || (code == kE2M1 && kSixteens == 1), "scales in the weights are for groups of 16");
  static_assert(!kByteScales || (storage == kWords && kSixteens <= 2), "scales of a byte are for groups of 16 and 32");
  static_assert(storage == kWords || kSixteens > 1, "8 columns of a word lie in one group, and so do 4 lanes' words");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
  const int first = blockIdx.x * kTiles * 16;
  const int blocks = k / 128;

  uint32_t row[kTiles][2];  // rows behind the last repeat it: they are never stored
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) row[t][h] = min(first + 16 * t + owner + 8 * h, n - 1);

  // A lane without a token takes the first one's: what it makes of it is a column of the sums that nobody stores.
  const auto* next_x = reinterpret_cast<const unsigned char*>(x + int64_t(owner < m ? owner : 0) * k + warp * 128) +
                       (storage == kWords ? place * 8 : word_of<kSixteens>(place, 0) * 16);
  const unsigned char* next[kTiles][2];
  const uint8_t* next_scales[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      next[t][h] =
          reinterpret_cast<const unsigned char*>(codes + int64_t(row[t][h]) * (k / 32) + warp * 4) + place * kLoad;
    next_scales[t] = static_cast<const uint8_t*>(scale) + int64_t(warp * kGroups + owner % kGroups) * n +
                     min(first + 16 * t + 4 * place, n - 4);
  }
  const uint32_t own_row = min(first + 8 * (place % (2 * kTiles)) + owner, n - 1);
  const void* own_scale = zeros && kTiles == 1 && place / 2 ? zero : scale;
  float sums[kTiles][4] = {};
  uint4 ahead[kDepth][kTiles][2];
  uint32_t scales_ahead[kDepth][kByteScales ? kTiles : kGroups], zeros_ahead[kDepth][kOwnZeros ? kGroups : 1];
  const auto fetch = [&](int depth, int block) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned char* from = next[t][h];
        next[t][h] += kWarps * 64;
        uint4& to = ahead[depth][t][h];
        if constexpr (kLoad == 16) {
          to = __ldcs(reinterpret_cast<const uint4*>(from));
        } else if constexpr (kLoad == 8) {
          const auto* pair = reinterpret_cast<const uint2*>(from);
          const uint2 low = __ldcs(pair), high = __ldcs(pair + 4);
          to = make_uint4(low.x, low.y, high.x, high.y);
        } else {
          const auto* word = reinterpret_cast<const uint32_t*>(from);
          to = make_uint4(__ldcs(word), __ldcs(word + 4), __ldcs(word + 8), __ldcs(word + 12));
        }
      }
    if constexpr (kByteScales) {  // of 16 rows and the block's groups, rows 4 place .. + 3 of group `owner`
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        scales_ahead[depth][t] = __ldcs(reinterpret_cast<const uint32_t*>(next_scales[t]));
        next_scales[t] += int64_t(kWarps * kGroups) * n;
      }
    } else {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t group =
            kSixteens == 8 ? uint32_t(block) / uint32_t(blocks_a_group) : uint32_t(block) * kGroups + g;
        const uint32_t at = group * uint32_t(n) + own_row;
        scales_ahead[depth][g] = stored_scale<scale_type>(own_scale, at);
        if constexpr (kOwnZeros) zeros_ahead[depth][g] = stored_scale<scale_type>(zero, at);
      }
    }
  };
#pragma unroll
  for (int depth = 0; depth < kDepth; ++depth)
    if (warp + depth * kWarps < blocks) fetch(depth, warp + depth * kWarps);

  __shared__ __align__(16) uint32_t staged[kByteScales ? kWarps : 1][kTiles][16][kRow];
  const auto multiply = [&](int depth, int block) {
    uint32_t words[kTiles][2][4];  // of words128 as two Spreads
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 found = ahead[depth][t][h];
        words[t][h][0] = found.x, words[t][h][1] = found.y, words[t][h][2] = found.z, words[t][h][3] = found.w;
        if constexpr (storage == kWords) {
          const Spread left = spread_words(found.x, found.y), right = spread_words(found.z, found.w);
          words[t][h][0] = left.low, words[t][h][1] = left.high, words[t][h][2] = right.low,
          words[t][h][3] = right.high;
        }
        hold(words[t][h]);  // what comes next may take the place of `found`
      }
    uint32_t scales[kTiles][2][kHeldScales];
    float own_factor[kGroups], own_shift[kGroups];  // of one row, which other lanes are to be told
    if constexpr (kByteScales) {
      __syncwarp();  // all lanes have read those of the last block
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t byte = scales_ahead[depth][t] >> 8 * i & 255u;
          uint32_t made;
          if constexpr (kPairs)
            made = scale_pair<half>(e4m3_to_float(byte));
          else
            made = __float_as_uint(e8m0_to_float(byte));
          if (owner < kGroups) staged[warp][t][4 * place + i][owner] = made;
        }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int q = 0; q < kGroups; q += 4) {
            const uint4 found = *reinterpret_cast<const uint4*>(&staged[warp][t][owner + 8 * h][q]);
            scales[t][h][q] = found.x, scales[t][h][q + 1] = found.y;
            scales[t][h][q + 2] = found.z, scales[t][h][q + 3] = found.w;
          }
    } else {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        own_factor[g] = scale_value<half, scale_type>(scales_ahead[depth][g]);
        own_shift[g] = kBiased ? -kBias * own_factor[g] : 0.0f;
        if constexpr (kOwnZeros) own_shift[g] += scale_value<half, scale_type>(zeros_ahead[depth][g]);
      }
    }
    uint2 values[8];
    if constexpr (storage == kWords) {
      const auto* from = reinterpret_cast<const uint2*>(next_x);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = __ldg(from + j * 4);
    } else {
      const auto* from = reinterpret_cast<const uint4*>(next_x);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint4 found = __ldg(from + word_of<kSixteens>(0, w));
        values[2 * w] = make_uint2(pick_bytes<0x5410>(found.x, found.z), pick_bytes<0x7632>(found.x, found.z));
        values[2 * w + 1] = make_uint2(pick_bytes<0x5410>(found.y, found.w), pick_bytes<0x7632>(found.y, found.w));
      }
    }
    next_x += kWarps * 256;
    if (block + kDepth * kWarps < blocks) fetch(depth, block + kDepth * kWarps);

    // Operand A of product j of tile t: register i is of row i % 2 and of the columns i / 2.
    const auto operand = [&](int t, int i, int j) {
      const auto& of = words[t][i % 2];
      if constexpr (storage == kWords) return pair_of<code, half>({of[i / 2 * 2], of[i / 2 * 2 + 1]}, j);
      return pair_of<code, half>({of[j / 2], 0}, j % 2 * 2 + i / 2);
    };
#pragma unroll
    for (int begin = 0; begin < 8; begin += kSixteens) {
      float totals[4] = {};
      if constexpr (kSums) {
        constexpr uint32_t ones = half == kBFloat16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
        for (int j = begin; j < begin + kSixteens; ++j)
          mma<half>(totals, ones, ones, ones, ones, values[j].x, values[j].y);
      }
      const int group = begin / kSixteens;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if constexpr (kPairs) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = scaled_pair<half>(operand(t, i, begin), scales[t][i % 2][group]);
          mma<half>(sums[t], a[0], a[1], a[2], a[3], values[begin].x, values[begin].y);
          continue;
        }
        float part[4] = {};
#pragma unroll
        for (int j = begin; j < begin + kSixteens; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = operand(t, i, j);
          if constexpr (code == kE2M1 && half == kBFloat16)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fma_bfloat16_pair(a[i], 0x7E807E80u, 0x80008000u);  // times 2**126
          mma<half>(part, a[0], a[1], a[2], a[3], values[j].x, values[j].y);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float factor;
          if constexpr (kByteScales)
            factor = __uint_as_float(scales[t][h][group]);
          else
            factor = from_place(own_factor[group], 2 * t + h);
          if constexpr (kSums) {
            float shift;
            if constexpr (zeros && kTiles == 1)
              shift = fmaf(-kBias, kBiased ? factor : 0.0f, from_place(own_factor[group], 2 + h));
            else
              shift = from_place(own_shift[group], 2 * t + h);
            sums[t][2 * h] = fmaf(shift, totals[0], sums[t][2 * h]);
            sums[t][2 * h + 1] = fmaf(shift, totals[1], sums[t][2 * h + 1]);
          }
          if constexpr (code == kE2M1) factor *= kE2M1Scale<half>;
          sums[t][2 * h] = fmaf(factor, part[2 * h], sums[t][2 * h]);
          sums[t][2 * h + 1] = fmaf(factor, part[2 * h + 1], sums[t][2 * h + 1]);
        }
      }
    }
  };
  for (int begin = warp; begin < blocks; begin += kDepth * kWarps)
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth)
      if (begin + depth * kWarps < blocks) multiply(depth, begin + depth * kWarps);

  __shared__ float shared[kWarps][8][kTiles * 16 + 4];  // a warp writes, and reads, different banks
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[warp][2 * place + i % 2][16 * t + owner + 8 * (i / 2)] = sums[t][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTiles * 16 * 8; i += 32 * kWarps) {
    const int r = i % (kTiles * 16), token = i / (kTiles * 16);
    if (first + r >= n || token >= m) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[w][token][r];
    if constexpr (kPairs) total *= kPairScale<half>;
    total *= factor_of_row(alpha, alpha_kind, first + r);
    if (bias != nullptr) total += half_to_float<half>(bias[first + r]);
    out[int64_t(token) * n + first + r] = float_to_half<half>(total);
  }
}

}  // namespace lowbit
