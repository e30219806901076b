// The product of svdquant_w4a4 by a warp's own tensor-core instructions (mma).
//
//   out[m, n] = sum over groups g of sx[g, m] * sw[g, n] * (sum over k in g of x[m, k] * w[n, k])
//               + sum over r of low[m, r] * up[n, r] + bias[n]
//
// The weight is operand A, so that its rows go along 16 and tokens along 8 of an instruction, and a lane's 16 bytes of
// the layout svdquant_fragments are its four registers. As int4 they are used as they are. For int8 two operands are
// made of them: the low nibbles moved up, which are the even columns, and the high ones, the odd columns, both 16 times
// too large; three instructions a word.
//
// Scaling the sums is most of the work, two instructions a sum and group. A sum starts from 2**17, more than any is
// below 0 (16 * 64 * 15 * 8), from registers that no product writes. So it is not negative, and its bits are those of
// the float 2**-149 times as large: a subnormal, which a fused multiply-add takes as it takes any other. That times
// 2**96 sw, minus 2**-36 sw, both exact, is 2**-53 times sum times sw, rounded once. Another one multiplies by sx and
// adds. No conversion to float, and one power of two at the end.
//
// Everything comes through shared memory by asynchronous copies of 16 bytes, kStages steps of kDepth groups: with few
// tokens a block waits for memory, and registers could not hold as many weights under way. All operands lie there as
// lanes hold them, or are read by ldmatrix, so no two lanes meet in a bank. A step has one barrier: behind it a step is
// there for all, and all are done with the step before it, whose place the next copies take.
#include "activation_tiles.cuh"
#include "async.cuh"
#include "dtypes.cuh"
#include "float_pairs.cuh"
#include "mma.cuh"
#include "mma_tf32.cuh"

namespace lowbit {

// How the weight, its scales and the low rank's second factor lie in memory: in the layout svdquant_fragments, plain,
// or in the layout kitchen_tile_packed_w4a4.
enum Arrangement { kFragments = 0, kRowMajor = 1, kTiled = 2 };

// What a group takes in shared memory, in bytes: the weight's codes, then these.
template <Storage storage, Dtype parts, int kTokens, int kRows>
struct Group {
  static constexpr int kWeight = kRows * 32, kCodes = kTokens * (kTakesBytes<storage> ? 64 : 32);
  static constexpr int kTokenScales = kTokens * 4, kRowScales = kRows * kSizeOf<parts>;
  static constexpr int kCodesAt = kWeight, kTokenScalesAt = kCodesAt + kCodes;
  static constexpr int kRowScalesAt = kTokenScalesAt + kTokenScales, kBytes = kRowScalesAt + kRowScales;
};

// The low nibbles of signed codes as int8 operands, and the high ones, 16 times too large.
LOWBIT_DEVICE void split_nibbles(uint4 words, uint32_t (&low)[4], uint32_t (&high)[4]) {
  const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low[i] = all[i] << 4 & 0xF0F0F0F0u;
    high[i] = all[i] & 0xF0F0F0F0u;
  }
}

// A number that lies in shared memory.
template <Dtype dtype>
LOWBIT_DEVICE float number_in_shared(const unsigned char* from, int at) {
  if constexpr (dtype == kFloat32) return reinterpret_cast<const float*>(from)[at];
  return half_to_float<kHalfOf<dtype>>(reinterpret_cast<const uint16_t*>(from)[at]);
}

// The number at `at` of a dtype that only the launch knows.
LOWBIT_DEVICE float load_any(const void* from, int64_t at, int dtype) {
  if (dtype == kFloat32) return load_number<kFloat32>(from, at);
  if (dtype == kBFloat16Type) return load_number<kBFloat16Type>(from, at);
  return load_number<kFloat16Type>(from, at);
}

// sums += A B for two ranks a place: A's four numbers, which are exact in TF32 unless they are float32, and B's in two
// parts.
template <Dtype left>
LOWBIT_DEVICE void add_ranks(float (&sums)[4], float a0, float a1, float a2, float a3, float high0, float high1,
                             float rest0, float rest1) {
  const float a[4] = {tf32_part(a0), tf32_part(a1), tf32_part(a2), tf32_part(a3)};
  mma_tf32(sums, a, rest0, rest1);
  if constexpr (left == kFloat32) {
    const float more[4] = {tf32_rest(a0), tf32_rest(a1), tf32_rest(a2), tf32_rest(a3)};
    mma_tf32(sums, more, high0, high1);
  }
  mma_tf32(sums, a, high0, high1);
}

// A block: kTokens tokens (blockIdx.x), kRows rows of the weight (y), a split of the groups (z), of kRowWarps times
// kTokenWarps warps. Blocks of the same rows follow one another, so that few tokens' read the weight from memory once.
// `padded`: tokens that codes and their scales have room for. `scale_rows`: numbers of a row of the weight's scales, a
// multiple of 16 bytes. `low`: [lows, low_rows, rank], to be added. With more than one split `out` is float32 [splits,
// m, n], and of the low rank each has its share of pieces.
template <Storage storage, bool kUnsigned, Arrangement arrangement, Dtype parts, Dtype result, int kTokens, int kRows,
          int kRowWarps, int kTokenWarps, int kDepth, int kStages, int kWarps>
__global__ void __launch_bounds__(32 * kRowWarps * kTokenWarps, kWarps / (kRowWarps * kTokenWarps))
    svdquant_product(const unsigned char* __restrict__ codes, const float* __restrict__ token_scale,
                     const float* __restrict__ low, const unsigned char* __restrict__ weight,
                     const void* __restrict__ row_scale, const void* __restrict__ up, const void* __restrict__ bias,
                     void* __restrict__ out, int m, int n, int groups, int padded, int scale_rows, int rank, int lows,
                     int low_rows, int bias_type) {
  static_assert(storage == kFragments4 || storage == kFragments8, "the storages of a warp's products");
  static_assert(kTokens / kTokenWarps % 16 == 0 && kRows / kRowWarps % 16 == 0, "whole sixteens for a warp");
  constexpr int kStart = 1 << 17;
  constexpr float kRaise = 0x1p96f, kOffset = -0x1p-36f;
  constexpr int kRanks = 32;          // of the low rank, at a time
  constexpr int kPitch = kRanks + 4;  // floats, so that no two lanes' 16 bytes meet in a bank
  constexpr int kTileRows = 128;      // of kTiled
  constexpr bool kBytes = kTakesBytes<storage>;
  constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  constexpr int kSixteens = kRows / kRowWarps / 16, kEights = kTokens / kTokenWarps / 8;
  constexpr int kSize = kSizeOf<parts>, kPerUnit = 16 / kSize, kCodeTokens = kBytes ? 8 : 16;
  using G = Group<storage, parts, kTokens, kRows>;

  const int lane = threadIdx.x % 32, owner = lane / 4, place = lane % 4, warp = threadIdx.x / 32;
  const int row_warp = warp % kRowWarps, token_warp = warp / kRowWarps;
  const int first_row = blockIdx.y * kRows, first_token = blockIdx.x * kTokens;
  const int split = blockIdx.z, splits = gridDim.z;
  const int begin = groups * split / splits, end = groups * (split + 1) / splits;
  const int steps = (end - begin + kDepth - 1) / kDepth;
  unsigned char* memory = dynamic_shared();

  // What this thread copies of every group: 16 bytes of the weight, or several times 16, the same of the codes, and, of
  // the first threads, 16 bytes of the tokens' or the rows' scales. Rows and tokens behind the last, which are never
  // stored, are others once more.
  constexpr int kWeightUnits = G::kWeight / 16 / kThreads, kCodeUnits = (G::kCodes / 16 + kThreads - 1) / kThreads;
  static_assert(G::kWeight / 16 % kThreads == 0, "all threads copy equally much of the weight");
  static_assert(G::kCodes / 16 <= kThreads || G::kCodes / 16 % kThreads == 0, "and of the codes");
  constexpr int kCopyTokens = kThreads / 32 * kCodeTokens;  // whose codes all threads copy at a time
  const int thread = threadIdx.x;
  const unsigned char* weight_from[kWeightUnits];
  int weight_to = thread * 16;
#pragma unroll
  for (int i = 0; i < kWeightUnits; ++i) {
    if constexpr (arrangement == kFragments) {
      const int unit = thread + i * kThreads, block = min(first_row / 64 + unit / 128, (n + 63) / 64 - 1);
      weight_from[i] = weight + ((int64_t(block) * groups + begin) * 128 + unit % 128) * 16;
    } else {
      // Two threads side by side copy a row, to where ldmatrix wants it: eight halves of rows in different banks.
      const int row = thread / 2, half = thread % 2, held = min(first_row + i * (kThreads / 2) + row, n - 1);
      const int64_t at = arrangement == kTiled
                             ? (int64_t(held / kTileRows) * groups + begin) * kTileRows + held % kTileRows
                             : int64_t(held) * groups + begin;
      weight_from[i] = weight + at * 32 + half * 16;
      weight_to = row / 16 * 512 + (half * 2 + row % 16 / 8) * 128 + row % 8 * 16;
    }
  }
  const int64_t code_step = group_bytes<storage>(padded);
  const unsigned char* code_from[kCodeUnits];
#pragma unroll
  for (int i = 0; i < kCodeUnits; ++i) {
    const int tile = (first_token + i * kCopyTokens) / kCodeTokens + thread / 32;
    code_from[i] = codes + begin * code_step + (min(tile, padded / kCodeTokens - 1) * 32 + thread % 32) * int64_t(16);
  }
  const bool copies_codes = thread < G::kCodes / 16, copies_scales = thread < (G::kTokenScales + G::kRowScales) / 16;
  const unsigned char* scale_from;
  int64_t scale_step;
  if (thread < G::kTokenScales / 16) {
    scale_from = reinterpret_cast<const unsigned char*>(token_scale + int64_t(begin) * padded +
                                                        min(first_token + thread * 4, padded - 4));
    scale_step = int64_t(padded) * 4;
  } else {
    const int row = first_row + (thread - G::kTokenScales / 16) * kPerUnit;
    const int held = min(row, scale_rows - kPerUnit);
    const int64_t at = arrangement == kTiled
                           ? (int64_t(held / kTileRows) * groups + begin) * kTileRows + held % kTileRows
                           : int64_t(begin) * scale_rows + held;
    scale_from = static_cast<const unsigned char*>(row_scale) + at * kSize;
    scale_step = int64_t(arrangement == kTiled ? kTileRows : scale_rows) * kSize;
  }

  const auto request = [&](int step, int slot) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const bool valid = kDepth == 1 || begin + step * kDepth + d < end;  // the groups behind the last are zeros
      unsigned char* to = memory + (slot * kDepth + d) * G::kBytes;
#pragma unroll
      for (int i = 0; i < kWeightUnits; ++i) {
        copy_async(to + weight_to + i * kThreads * 16, weight_from[i], valid);
        weight_from[i] += arrangement == kRowMajor ? 32 : arrangement == kTiled ? kTileRows * 32 : 2048;
      }
#pragma unroll
      for (int i = 0; i < kCodeUnits; ++i) {
        if (copies_codes) copy_async(to + G::kCodesAt + (thread + i * kThreads) * 16, code_from[i], valid);
        code_from[i] += code_step;
      }
      if (copies_scales) copy_async(to + G::kTokenScalesAt + thread * 16, scale_from, valid);
      scale_from += scale_step;
    }
  };

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) request(stage, stage);
    commit_copies();
  }

  const int start[4] = {kStart, kStart, kStart, kStart};
  float sums[kSixteens][kEights][4] = {};
  int slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) request(step + kStages - 1, slot == 0 ? kStages - 1 : slot - 1);
    commit_copies();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const unsigned char* at = memory + (slot * kDepth + d) * G::kBytes;
      uint32_t left[kSixteens][kBytes ? 2 : 1][4];
      float raise[kSixteens][2], offset[kSixteens][2];
#pragma unroll
      for (int r = 0; r < kSixteens; ++r) {
        const unsigned char* tile = at + (row_warp * kSixteens + r) * 512 + lane * 16;
        uint4 words;
        if constexpr (arrangement == kFragments) {
          words = *reinterpret_cast<const uint4*>(tile);
        } else {
          uint32_t loaded[4];
          load_matrices(loaded, tile);
          words = make_uint4(loaded[0], loaded[1], loaded[2], loaded[3]);
        }
        if constexpr (kBytes) {
          split_nibbles(words, left[r][0], left[r][1]);
        } else {
          left[r][0][0] = words.x, left[r][0][1] = words.y, left[r][0][2] = words.z, left[r][0][3] = words.w;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale =
              number_in_shared<parts>(at + G::kRowScalesAt, (row_warp * kSixteens + r) * 16 + owner + 8 * i);
          raise[r][i] = scale * kRaise;
          offset[r][i] = scale * kOffset;
        }
      }
      uint4 right{};
#pragma unroll
      for (int t = 0; t < kEights; ++t) {
        const int eight = token_warp * kEights + t;
        const int tile = kBytes ? eight : eight / 2;  // of int4, 16 bytes hold those of 16 tokens
        if (kBytes || t % 2 == 0) right = *reinterpret_cast<const uint4*>(at + G::kCodesAt + (tile * 32 + lane) * 16);
        const float2 scale = *reinterpret_cast<const float2*>(at + G::kTokenScalesAt + (eight * 8 + 2 * place) * 4);
#pragma unroll
        for (int r = 0; r < kSixteens; ++r) {
          int whole[4];
          if constexpr (kBytes) {
            mma_int8(whole, left[r][0], right.x, right.y, start);
            mma_int8(whole, left[r][1], right.z, right.w, whole);
          } else {
            mma_int4<kUnsigned>(whole, left[r][0], t % 2 ? right.z : right.x, t % 2 ? right.w : right.y, start);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float* to = sums[r][t] + 2 * i;
            const float2 whole_pair = {__int_as_float(whole[2 * i]), __int_as_float(whole[2 * i + 1])};
            const float2 scaled = fma_pair(whole_pair, {raise[r][i], raise[r][i]}, {offset[r][i], offset[r][i]});
            const float2 sum = fma_pair(scaled, scale, {to[0], to[1]});
            to[0] = sum.x, to[1] = sum.y;
          }
        }
      }
    }
    if (++slot == kStages) slot = 0;
  }
  wait_copies<0>();

  constexpr float kFinish = kBytes ? 0x1p49f : 0x1p53f;
#pragma unroll
  for (int r = 0; r < kSixteens; ++r)
#pragma unroll
    for (int t = 0; t < kEights; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[r][t][i] *= kFinish;

  // The low rank in TF32, `low` in two parts, and `up`, too, where it is float32. Place p has ranks 8 p .. + 7 of 32.
  const int own_row = first_row + row_warp * kSixteens * 16 + owner;
  float* high = reinterpret_cast<float*>(memory);
  float* rest = high + kTokens * kPitch;
  for (int chunk = split; chunk * kRanks < rank; chunk += splits) {
    __syncthreads();  // before anything is written where others still read
    const bool has_rank = chunk * kRanks + lane < rank;
#pragma unroll 1
    for (int token = warp; token < kTokens; token += kThreads / 32) {
      float sum = 0.0f;
      if (has_rank && first_token + token < m) {
        const float* from = low + int64_t(first_token + token) * rank + (chunk * kRanks + lane);
#pragma unroll 4
        for (int s = 0; s < lows; ++s, from += int64_t(low_rows) * rank) sum += __ldg(from);
      }
      high[token * kPitch + lane] = tf32_part(sum);
      rest[token * kPitch + lane] = tf32_rest(sum);
    }
    __syncthreads();
#pragma unroll 1
    for (int four = 0; four < 8; four += 4) {  // of a place's eight ranks, for fewer registers
      const int first_rank = chunk * kRanks + 8 * place + four;
#pragma unroll
      for (int r = 0; r < kSixteens; ++r) {
        float factors[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = min(own_row + 16 * r + 8 * i, n - 1);  // never stored if it is behind the last
          const int64_t from = arrangement == kTiled ? int64_t(row / kTileRows) * rank * kTileRows + row % kTileRows
                                                     : int64_t(row) * rank;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int column = first_rank + j;
            const int64_t at = from + int64_t(column) * (arrangement == kTiled ? kTileRows : 1);
            factors[i][j] = column < rank ? load_number<parts>(up, at) : 0.0f;
          }
        }
#pragma unroll
        for (int t = 0; t < kEights; ++t) {
          const int at = ((token_warp * kEights + t) * 8 + owner) * kPitch + 8 * place + four;
          const float4 upper = *reinterpret_cast<const float4*>(high + at);
          const float4 lower = *reinterpret_cast<const float4*>(rest + at);
          add_ranks<parts>(sums[r][t], factors[0][0], factors[1][0], factors[0][1], factors[1][1], upper.x, upper.y,
                           lower.x, lower.y);
          add_ranks<parts>(sums[r][t], factors[0][2], factors[1][2], factors[0][3], factors[1][3], upper.z, upper.w,
                           lower.z, lower.w);
        }
      }
    }
  }

  if (bias != nullptr) {
#pragma unroll
    for (int r = 0; r < kSixteens; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = load_any(bias, min(own_row + 16 * r + 8 * i, n - 1), bias_type);
#pragma unroll
        for (int t = 0; t < kEights; ++t) sums[r][t][2 * i] += value, sums[r][t][2 * i + 1] += value;
      }
  }

  // Eight tokens at a time, turned in the warp's own shared memory so that rows lie side by side.
  constexpr int kWide = 16 / kSizeOf<result>, kWarpRows = 16 * kSixteens, kLine = kWarpRows + kWide;
  unsigned char* lines = memory + warp * 8 * kLine * kSizeOf<result>;
  const int64_t to = int64_t(split) * m * n + first_row + row_warp * kWarpRows;
  const int rows_left = n - first_row - row_warp * kWarpRows;
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kEights; ++t) {
    const int token = first_token + (token_warp * kEights + t) * 8;
#pragma unroll
    for (int r = 0; r < kSixteens; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_number<result>(lines, (2 * place + i % 2) * kLine + 16 * r + owner + 8 * (i / 2), sums[r][t][i]);
    __syncwarp();
    if (n % kWide == 0) {
#pragma unroll
      for (int i = lane; i < 8 * kWarpRows / kWide; i += 32) {
        const int line = i / (kWarpRows / kWide), row = i % (kWarpRows / kWide) * kWide;
        if (token + line < m && row < rows_left)
          *reinterpret_cast<uint4*>(static_cast<unsigned char*>(out) +
                                    (to + int64_t(token + line) * n + row) * kSizeOf<result>) =
              *reinterpret_cast<const uint4*>(lines + (line * kLine + row) * kSizeOf<result>);
      }
    } else {
      for (int i = lane; i < 8 * kWarpRows; i += 32) {
        const int line = i / kWarpRows, row = i % kWarpRows;
        if (token + line < m && row < rows_left)
          store_number<result>(out, to + int64_t(token + line) * n + row,
                               number_in_shared<result>(lines, line * kLine + row));
      }
    }
    __syncwarp();
  }
}

// float32 sums [splits, m, n], added in their order, and a bias -> out [m, n].
template <Dtype result>
__global__ void __launch_bounds__(256) svdquant_add(const float* __restrict__ sums, const void* __restrict__ bias,
                                                    void* __restrict__ out, int splits, int m, int n, int bias_type) {
  const int64_t size = int64_t(m) * n, at = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (at >= size) return;
  float total = 0.0f;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) total += __ldg(sums + split * size + at);
  if (bias != nullptr) total += load_any(bias, at % n, bias_type);
  store_number<result>(out, at, total);
}

}  // namespace lowbit
