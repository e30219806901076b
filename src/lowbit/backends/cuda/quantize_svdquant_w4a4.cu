// Activations of svdquant_w4a4, read once: smoothing, 4-bit codes by groups of 64 columns, and the low rank's first
// product.
//
//   value = (x + shift) / smooth[k]     step = absmax of a group / 7 (15: unsigned codes), at least 1e-10 / 7
//   code = value / step, rounded half to even            low = x (or what is given in its place) @ down
//
// A warp takes 16 tokens and a group at a time. A lane loads two runs of 8 columns of two tokens, 16 bytes each, which
// are operand B of the tensor cores' products as they are (low_rank_tiles.cuh), and, after two exchanges with its three
// neighbours, words of codes (activation_tiles.cuh). Each load is under way while the warp works on another tile. All
// that belongs to columns is staged in shared memory, for all warps of a block: `down`, and what divides a column.
//
// Quotients are IEEE's (quotients.cuh), in two instructions, or three for factors in float32. The reciprocal of a step,
// which has 24 bits, is in two parts all the same: only codes are made of what it gives, and all the quotients that are
// near enough to where a code begins for the last bit to matter have been tried (test_quotients_of_codes). The one in
// doubt is by a step of 24 ones, if the GPU's approximate reciprocal of it is not the nearest.
#include "activation_tiles.cuh"
#include "async.cuh"
#include "low_rank_tiles.cuh"
#include "quotients.cuh"
#include "rows.cuh"

namespace lowbit {

// What a column's values are divided by, for `divided`. A factor of 0 switches a column off, as an infinite one does.
template <Dtype factor_type>
LOWBIT_DEVICE float2 divisor_of(float factor) {
  const bool off = factor == 0.0f || fabsf(factor) == __uint_as_float(0x7F800000u);
  const float nearest = nearest_reciprocal(factor, near_reciprocal(factor));
  if (off) return {factor_type == kFloat32 ? 1.0f : 0.0f, 0.0f};
  return factor_type == kFloat32 ? float2{factor, nearest} : reciprocal_in_two(factor, nearest);
}

template <Dtype factor_type>
LOWBIT_DEVICE float divided(float value, float first, float second) {
  if constexpr (factor_type == kFloat32) return corrected_quotient(value, first, second);
  return times_two_parts(value, first, second);
}

// a * b + 0, rounded once, between 0 and 1; 0 for NaN.
LOWBIT_DEVICE float saturated_product(float a, float b) {
#ifdef __CUDACC_RTC__
  float out;
  asm("fma.rn.sat.f32 %0, %1, %2, 0f00000000;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  const float product = a * b;
  return product > 0.0f ? fminf(product, 1.0f) : 0.0f;
#endif
}

// The nearest code in the lowest bits: in a byte, or, of nibbles, above 0 by 8 if signed.
template <bool kBytes, bool kUnsigned>
LOWBIT_DEVICE uint32_t rounded_code(float steps) {
  constexpr float kUnit = 0x1p-149f;  // the smallest float: of it, whole numbers are their own bits
  if constexpr (kUnsigned) return __float_as_uint(saturated_product(steps, kUnit));
  if constexpr (kBytes) return __float_as_uint(steps + 12582912.0f);
  return __float_as_uint(fmaf(steps, kUnit, 8 * kUnit));
}

LOWBIT_DEVICE uint32_t packed_nibbles(const uint32_t (&codes)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = (codes[2 * i + 1] << 4) + codes[2 * i];
  return (((pairs[3] << 8) + pairs[2]) << 16) + ((pairs[1] << 8) + pairs[0]);
}

LOWBIT_DEVICE uint32_t packed_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return pick_bytes<0x5410>(pick_bytes<0x0040>(a, b), pick_bytes<0x0040>(c, d));
}

LOWBIT_DEVICE uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The largest magnitude of 16 values in each of four neighbouring lanes; NaN when there is one.
LOWBIT_DEVICE float largest_of_group(const float (&values)[16]) {
  float parts[2] = {fabsf(values[0]), fabsf(values[1])};
#pragma unroll
  for (int i = 2; i < 16; ++i) parts[i % 2] = larger(parts[i % 2], values[i]);
  float largest = larger(parts[0], parts[1]);
  largest = larger(largest, from_lane_xor(largest, 1));
  return larger(largest, from_lane_xor(largest, 2));
}

// A block's warps: kAcross groups side by side, kTokenWarps times kTiles tiles of 16 tokens. `rows` is M with padding.
// blockIdx: tokens, split of K, kRanks ranks.
template <Storage storage, Dtype dtype, Dtype factor_type, Dtype scale_type, bool kUnsigned, bool kApart, bool kWide,
          int kRanks, int kTiles, int kTokenWarps, int kAcross>
__global__ void __launch_bounds__(32 * kTokenWarps * kAcross,
                                  kTiles == 2 && kRanks <= 32 ? 12 / kTokenWarps / kAcross : 1)
    quantize_svdquant(const uint4* __restrict__ x, const uint4* __restrict__ raw, const void* __restrict__ smooth,
                      const void* __restrict__ down, unsigned char* __restrict__ codes, void* __restrict__ scale,
                      float* __restrict__ low, int m, int rows, int groups, int rank, float shift) {
  constexpr int kGroup = 64;
  constexpr float kSmallest = 1e-10f;  // absmax
  constexpr Half half = kHalfOf<dtype>;
  constexpr bool kBytes = kTakesBytes<storage>;
  constexpr int kEights = kRanks / 8, kThreads = 32 * kTokenWarps * kAcross, kTokens = 16 * kTiles * kTokenWarps;
  constexpr int kPiece = kGroup * kRanks * 2, kDivisors = kGroup * 8;  // bytes, of a group
  constexpr int kStage = kAcross * (kPiece + kDivisors);
  constexpr int kColumns = kAcross * kGroup, kFactors = (kColumns + kThreads - 1) / kThreads;
  constexpr int kAhead = 2 / kTiles;  // stages whose x is loaded, or under way: two tiles
  constexpr float kLargest = kUnsigned ? 15.0f : 7.0f, kInverse = 1.0f / kLargest;
  constexpr float kInverseRest = float(1.0 / double(kLargest) - double(kInverse));

  const int lane = threadIdx.x % 32, owner = lane / 4, place = lane % 4, warp = threadIdx.x / 32;
  const int across = warp % kAcross, first = blockIdx.x * kTokens + warp / kAcross * (16 * kTiles);
  const int all = (groups + kAcross - 1) / kAcross;  // stages
  const int begin = all * int(blockIdx.y) / int(gridDim.y) * kAcross;
  const int end = min(groups, all * int(blockIdx.y + 1) / int(gridDim.y) * kAcross);
  const int stages = (end - begin + kAcross - 1) / kAcross, first_rank = blockIdx.z * kRanks;
  unsigned char* const memory = dynamic_shared();
  unsigned char* const scratch = memory + 2 * kStage + warp * 1024;  // of this warp, for kSwizzled8

  // ---- what belongs to columns ----
  const auto piece_of = [&](int stage, int group) { return memory + stage % 2 * kStage + group * kPiece; };
  const auto divisors_of = [&](int stage, int group) {
    return memory + stage % 2 * kStage + kAcross * kPiece + group * kDivisors;
  };
  // Ranks and columns that are not there are not copied: what is made of them is not stored.
  constexpr int kAtOnce = kThreads / kEights;  // rows of `down`
  static_assert(kColumns % kAtOnce == 0, "");
  const int thread = threadIdx.x % kThreads, eight = thread % kEights, first_k = thread / kEights;
  const int some = min(8, rank - first_rank - eight * 8);
  const uint16_t* from_down =
      static_cast<const uint16_t*>(down) + int64_t(begin * kGroup + first_k) * rank + first_rank + eight * 8;
  const auto stage_down = [&](int stage) {
    const int left = (end - begin - stage * kAcross) * kGroup;
#pragma unroll
    for (int n = 0; n < kColumns / kAtOnce; ++n) {
      const int k = n * kAtOnce + first_k;
      void* const to = piece_of(stage, k / kGroup) + rank_bytes_at(k % kGroup, eight, kEights);
      const uint16_t* const at = from_down + int64_t(rank) * (n * kAtOnce);
      if (k >= left || some <= 0) continue;
      if (kWide) {
        copy_async(to, at);
      } else {
#pragma unroll
        for (int r = 0; r < 8; ++r)
          if (r < some) static_cast<uint16_t*>(to)[r] = __ldg(at + r);
      }
    }
    from_down += int64_t(rank) * kColumns;
    commit_copies();
  };
  float factors[kFactors];
  const auto load_factors = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kFactors; ++i) {
      const int column = (begin + stage * kAcross) * kGroup + i * kThreads + threadIdx.x;
      const bool there = i * kThreads + threadIdx.x < kColumns && column < end * kGroup;
      factors[i] = there ? load_number<factor_type>(smooth, column) : 1.0f;
    }
  };
  const auto stage_divisors = [&](int stage) {  // neighbouring places side by side, two columns of each at a time
#pragma unroll
    for (int i = 0; i < kFactors; ++i) {
      const int at = i * kThreads + threadIdx.x, c = at % kGroup;
      if (kColumns % kThreads != 0 && at >= kColumns) break;
      const int to = ((c / 32 * 4 + c % 8 / 2) * 4 + c % 32 / 8) * 16 + c % 2 * 8;
      *reinterpret_cast<float2*>(divisors_of(stage, at / kGroup) + to) = divisor_of<factor_type>(factors[i]);
    }
  };

  // ---- what belongs to tokens ----
  // Rows behind the last repeat it: nothing of them is kept. Of a group behind the last nothing is loaded, nor used.
  const int token = first + owner;
  uint32_t rows_at[kTiles][2];  // in 16 bytes
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i)
    rows_at[i / 2][i % 2] = uint32_t(min(token + i * 8, m - 1)) * uint32_t(groups * 8);
  const auto load_tile = [&](const uint4* from, int tile, bool there, uint4(&words)[2][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (there) words[r][h] = __ldg(from + rows_at[tile][r] + h * 4);
  };
  const int own = begin + across;
  const uint4* from = x + own * 8 + place;  // of the group whose x is to be loaded next
  const uint4* from_raw = raw + own * 8 + place;
  unsigned char* to = codes + word_at<storage>(own, groups, rows, token, place, 0);
  int64_t scale_at = int64_t(own) * rows + token + 8 * place;
  int scratch_at[4];  // of kSwizzled8: where a lane's words of a token lie
#pragma unroll
  for (int i = 0; i < 4; ++i) scratch_at[i] = int(word_at<kSwizzled8>(0, 1, 16, owner, i % 2 * 4 + place, i / 2));
  if constexpr (storage == kSwizzled8) to = codes + (int64_t(own) * rows + first) * kGroup + lane * 16;
  const int64_t group_step = kAcross * group_bytes<storage>(rows);

  uint4 held[2][2][2] = {};
  float sums[kTiles][2][kEights / 2][4] = {};
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    load_tile(from, slot % kTiles, own + slot / kTiles * kAcross < end, held[slot]);
    if (slot % kTiles == kTiles - 1) from += kAcross * 8;
  }
  const int lane_at = rank_lane_at<kEights>();
  if (stages > 0) {
    stage_down(0);
    load_factors(0);
    stage_divisors(0);
    load_factors(1);
  }
  for (int turn = 0; turn < stages; turn += kAhead) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int stage = turn + ahead, group = begin + stage * kAcross + across;
      if (stage >= stages) break;
      wait_copies<0>();
      __syncthreads();
      if (stage + 1 < stages) {
        stage_down(stage + 1);
        stage_divisors(stage + 1);
        load_factors(stage + 2);
      }
      if (group >= end) continue;
      const unsigned char* const piece = piece_of(stage, across);
      float4 divisors[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        divisors[i] = *reinterpret_cast<const float4*>(divisors_of(stage, across) + (i * 4 + place) * 16);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint4(&words)[2][2] = held[ahead * kTiles + tile];
        const bool more = group + kAhead * kAcross < end;
        uint4 apart[2][2];
        if constexpr (kApart) load_tile(from_raw, tile, true, apart);
        const uint4(&right)[2][2] = kApart ? apart : words;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int sixteen = 0; sixteen < kEights / 2; ++sixteen) {
              uint32_t left[4];
              load_ranks<kEights>(left, piece, lane_at, h, j, sixteen);
#pragma unroll
              for (int r = 0; r < 2; ++r)
                mma<half>(sums[tile][r][sixteen], left[0], left[1], left[2], left[3], word_of(right[r][h], 2 * j),
                          word_of(right[r][h], 2 * j + 1));
            }
        if (blockIdx.z != 0) {  // of the programs of a long rank the first writes codes
          load_tile(from, tile, more, words);
          continue;
        }

        float values[2][16], step[2];
        bool keeps[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int c = 0; c < 16; ++c) {
            const float value = half_to_float<half>(uint16_t(word_of(words[r][c / 8], c % 8 / 2) >> 16 * (c % 2)));
            const float4 divisor = divisors[c / 2];
            values[r][c] = divided<factor_type>(kUnsigned ? value + shift : value, c % 2 ? divisor.z : divisor.x,
                                                c % 2 ? divisor.w : divisor.y);
          }
          const float largest = larger(largest_of_group(values[r]), kSmallest);
          step[r] = times_two_parts(largest, kInverse, kInverseRest);
          keeps[r] = token + tile * 16 + 8 * r < m && is_finite(step[r]);
        }
        load_tile(from, tile, more, words);

        uint32_t packed[2][4];  // of a token: word h of nibbles, or words 2 odd + h of bytes
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 inverse = reciprocal_in_two(step[r], nearest_reciprocal(step[r], near_reciprocal(step[r])));
          const uint32_t keep = keeps[r] ? 0xFFFFFFFFu : 0u;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t bits[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const float value = values[r][8 * h + c];
              bits[c] = rounded_code<kBytes, kUnsigned>(times_two_parts(value, inverse.x, inverse.y));
            }
            if constexpr (kBytes) {
              packed[r][h] = packed_bytes(bits[0], bits[2], bits[4], bits[6]) & keep;
              packed[r][2 + h] = packed_bytes(bits[1], bits[3], bits[5], bits[7]) & keep;
            } else {
              packed[r][h] = (packed_nibbles(bits) ^ (kUnsigned ? 0u : 0x88888888u)) & keep;
            }
          }
        }

        if constexpr (storage == kPlain) {
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              if (token + tile * 16 + 8 * r < rows)
                *reinterpret_cast<uint32_t*>(to + int64_t(tile * 16 + r * 8) * groups * 32 + h * 16) = packed[r][h];
        } else if (first + tile * 16 < rows) {  // all 16 tokens have room, or none
          if constexpr (storage == kFragments4) {
            *reinterpret_cast<uint4*>(to + tile * 512) =
                make_uint4(packed[0][0], packed[0][1], packed[1][0], packed[1][1]);
          } else if constexpr (storage == kFragments8) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
              *reinterpret_cast<uint4*>(to + tile * 1024 + r * 512) =
                  make_uint4(packed[r][0], packed[r][1], packed[r][2], packed[r][3]);
          } else {  // 16 tokens are 1024 bytes side by side: written in their order, by way of shared memory
            __syncwarp();
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                *reinterpret_cast<uint32_t*>(scratch + scratch_at[i] + r * 512) = packed[r][i];
            __syncwarp();
#pragma unroll
            for (int r = 0; r < 2; ++r)
              *reinterpret_cast<uint4*>(to + tile * 1024 + r * 512) =
                  *reinterpret_cast<const uint4*>(scratch + r * 512 + lane * 16);
          }
        }
        // One place writes the scales of the first eight tokens, the next one those of the others.
        const int row = token + tile * 16 + 8 * place;
        if (place < 2 && row < rows) {
          const float value = row < m ? place ? step[1] : step[0] : 0.0f;
          if constexpr (scale_type == kFloat32)
            static_cast<float*>(scale)[scale_at + tile * 16] = value;
          else
            static_cast<uint16_t*>(scale)[scale_at + tile * 16] = float_to_half<half>(value);
        }
      }
      from += kAcross * 8;
      if constexpr (kApart) from_raw += kAcross * 8;
      to += group_step;
      scale_at += int64_t(kAcross) * rows;
    }
  }

  // ---- the sums of the groups side by side, added in their order ----
  constexpr int kRow = kRanks + 4;
  auto* const parts = reinterpret_cast<float*>(memory);
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTiles * kEights * 4; ++i) {
    const int tile = i / 4 / kEights, r = i / 2 / kEights % 2, sixteen = i / 4 % (kEights / 2);
    const int at = warp / kAcross * (16 * kTiles) + tile * 16 + r * 8 + place * 2 + i % 2;
    parts[(across * kTokens + at) * kRow + sixteen * 16 + i % 4 / 2 * 8 + owner] = sums[tile][r][sixteen][i % 4];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRanks; i += kThreads) {
    const int token = i / kRanks, row = blockIdx.x * kTokens + token, own_rank = i % kRanks;
    if (row >= rows || first_rank + own_rank >= rank) continue;
    float total = parts[token * kRow + own_rank];
#pragma unroll
    for (int a = 1; a < kAcross; ++a) total += parts[(a * kTokens + token) * kRow + own_rank];
    low[(int64_t(blockIdx.y) * rows + row) * rank + first_rank + own_rank] = row < m ? total : 0.0f;
  }
}

// Sums [splits, size] of pieces of K -> out [size], added in their order.
__global__ void __launch_bounds__(256)
    add_splits(const float* __restrict__ sums, float* __restrict__ out, int size, int splits) {
  const int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= size) return;
  float total = sums[at];
  for (int split = 1; split < splits; ++split) total += sums[int64_t(split) * size + at];
  out[at] = total;
}

}  // namespace lowbit
