// linear for more than 8 tokens and 4-bit codes in the layout words128, or integers in plain bytes: weights are decoded
// in registers, and meet tokens from shared memory on the tensor cores of a warp (sm_80 and later).
//
//   out[m, r] = alpha * sum over groups g of (scale[g, r] * sum of x * value + zero[g, r] * sum of x)  + bias[r]
//
// A block of threads has kRows rows of the weight and kTokens tokens. Its warps are arranged as kRowWarps * kTokenWarps
// over that tile, and kParts times over K: each part takes every kParts-th block of 128 columns. Codes and tokens come
// by asynchronous copies, kStages - 1 steps ahead; a step is kParts blocks.
//
// A lane's columns of operand A are those of operand B in words128. In plain bytes the 8 columns of a word stand for
// the columns of two products, of which a lane has four each; so groups must have 32 columns or more (mma.cuh: the
// order of columns is free, if both operands have the same).
//
// Scales of 16 bits or more multiply float32 sums over their group, or over 64 columns of it: none is rounded. Those of
// 8 bits multiply the decoded values where that is exact (exact_pairs.cuh). The sums of x that zeros need come from
// products with ones, of which each warp makes those of some tokens; they are shared, and used a step later.
#include "async.cuh"
#include "exact_pairs.cuh"
#include "mma.cuh"

namespace lowbit {

constexpr int kBlockBytes = 64;   // of a row of codes, 128 columns
constexpr int kTokenBytes = 256;  // of a token, as many columns

// Where 16 bytes of a row of codes are put: moved by the row's number, so that what lanes read at a time lies in
// different banks, be it 8 bytes of four rows' neighbouring pieces or 4 bytes of eight rows' same piece.
LOWBIT_DEVICE int code_place(int row, int piece) {
  return row * kBlockBytes + (piece ^ (row & 2) ^ (row >> 2 & 1)) * 16;
}

// Where 16 bytes of a token are put, likewise: eight tokens' same piece, or two tokens' four neighbouring ones.
LOWBIT_DEVICE int token_turn(int token) { return (token & 1) << 2 | (token >> 1 & 3); }
LOWBIT_DEVICE int token_place(int token, int piece) { return token * kTokenBytes + (piece ^ token_turn(token)) * 16; }

// Words that are loaded and stored at a time.
template <int count>
struct alignas(4 * count) Together {
  uint32_t words[count];
};

// Pair j of four of one half of the spread words, j constant once its loop is unrolled.
template <Code code, Half half>
LOWBIT_DEVICE uint32_t value_pair(uint32_t spread, int j) {
  if constexpr (code == kIntegers) {
    switch (j) {
      case 0:
        return centred_pair<half, 0>(spread);
      case 1:
        return centred_pair<half, 1>(spread);
      case 2:
        return centred_pair<half, 2>(spread);
      default:
        return centred_pair<half, 3>(spread);
    }
  } else {
    switch (j) {
      case 0:
        return tiny_pair<half, 0>(spread);
      case 1:
        return tiny_pair<half, 1>(spread);
      case 2:
        return tiny_pair<half, 2>(spread);
      default:
        return tiny_pair<half, 3>(spread);
    }
  }
}

// Pair of columns 2 b and 2 b + 1 of a word of plain bytes, which are the nibbles of byte b, as integers.
template <Half half>
LOWBIT_DEVICE uint32_t pair_of_bytes(uint32_t word, int b) {
  const Spread spread = spread_words(word, word >> 4);  // byte 0 and byte 1, byte 2 and byte 3
  return b % 2 ? centred_pair<half, 2>(b < 2 ? spread.low : spread.high)
               : centred_pair<half, 0>(b < 2 ? spread.low : spread.high);
}

// kSixteens: sixteens of columns that share a scale, 8 where a group has 128 or more. A warp has kTiles * 16 rows and
// kColumns * 8 tokens. With `sums` [splits, m, n], blocks z > 0 have later columns, and store what add_splits adds.
template <Code code, Half half, ScaleType scale_type, bool zeros, Storage storage, int kSixteens, int kTiles,
          int kColumns, int kRowWarps, int kTokenWarps, int kParts, int kStages>
__global__ void __launch_bounds__(32 * kRowWarps * kTokenWarps * kParts,
                                  kColumns == 2 && (code == kE2M1 || kSixteens > 1) ? 2 : 1)
    words_gemm(const uint16_t* __restrict__ x, const unsigned char* __restrict__ codes, const void* __restrict__ scale,
               const void* __restrict__ zero, const float* __restrict__ alpha, int alpha_kind,
               const uint16_t* __restrict__ bias, uint16_t* __restrict__ out, float* __restrict__ sums, int m, int n,
               int k, int blocks_a_group) {
  constexpr int kRows = 16 * kTiles * kRowWarps, kTokens = 8 * kColumns * kTokenWarps;
  constexpr int kThreads = 32 * kRowWarps * kTokenWarps * kParts;
  constexpr int kGroups = 8 / kSixteens;  // of a block of columns
  constexpr int kChunkSixteens = 4;       // sixteens of columns whose decoded values are held at a time
  constexpr int kCodeBytes = kRows * kBlockBytes, kPartBytes = kCodeBytes + kTokens * kTokenBytes;
  constexpr int kStageBytes = kParts * kPartBytes;
  constexpr int kFactors = kParts * kGroups * kRows;  // of a step
  constexpr int kPieces = kGroups > 2 ? kGroups : 2;  // sums of x in a block of columns
  constexpr bool kScaled = code == kE2M1 && kScalesPairs<half, scale_type>;

  unsigned char* const stages = dynamic_shared();
  auto* const factors = reinterpret_cast<uint32_t*>(stages + kStages * kStageBytes);  // [2, kFactors]
  uint32_t* const added = factors + 2 * kFactors;                                     // the same, of zeros
  auto* const totals = reinterpret_cast<float*>(added + (zeros ? 2 * kFactors : 0));  // [2, parts, pieces, tokens]

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, owner = lane / 4, place = lane % 4;
  const int row_warp = warp % kRowWarps, token_warp = warp / kRowWarps % kTokenWarps;
  const int part = warp / (kRowWarps * kTokenWarps);
  const int first_token = blockIdx.x * kTokens, first_row = blockIdx.y * kRows;
  const int blocks = k / 128;
  const int first = int(int64_t(blocks) * blockIdx.z / gridDim.z);
  const int last = int(int64_t(blocks) * (blockIdx.z + 1) / gridDim.z);
  const int steps = (last - first + kParts - 1) / kParts;

  // ---- copies: a thread's pieces of 16 bytes are the same ones of other rows
  constexpr int kCodePieces = 4 * kParts, kTokenPieces = 16 * kParts;
  constexpr int kCodeRows = kThreads / kCodePieces, kTokenRows = kThreads / kTokenPieces;
  static_assert(kRows % kCodeRows == 0 && kTokens % kTokenRows == 0, "every thread copies as much as any other");
  const int code_row = thread / kCodePieces, code_piece = thread % kCodePieces;
  const int token_row = thread / kTokenPieces, token_piece = thread % kTokenPieces;
  static_assert(kCodeRows % 8 == 0, "a thread's rows all have their pieces in the same place");
  const unsigned char* const code_from =
      codes + int64_t(first_row + code_row) * (k / 2) + int64_t(first) * kBlockBytes + code_piece * 16;
  const auto* const token_from = reinterpret_cast<const unsigned char*>(x) +
                                 int64_t(first_token + token_row) * (2 * k) + int64_t(first) * kTokenBytes +
                                 token_piece * 16;
  const int code_to = code_piece / 4 * kPartBytes + code_place(code_row, code_piece % 4);
  const int token_to = token_piece / 16 * kPartBytes + kCodeBytes + token_place(token_row, token_piece % 16);
  const int64_t code_stride = int64_t(kCodeRows) * (k / 2), token_stride = int64_t(kTokenRows) * (2 * k);
  const int rows_left = n - first_row - code_row, tokens_left = m - first_token - token_row;
  const auto fetch = [&](int step, int stage) {
    const int block = first + step * kParts;
    const unsigned char* from = code_from + int64_t(step) * (kParts * kBlockBytes);
    const bool codes_here = block + code_piece / 4 < last;
#pragma unroll
    for (int i = 0; i < kRows / kCodeRows; ++i, from += code_stride)
      copy_async(stages + stage + code_to + i * (kCodeRows * kBlockBytes), from,
                 codes_here && i * kCodeRows < rows_left);
    from = token_from + int64_t(step) * (kParts * kTokenBytes);
    const bool tokens_here = block + token_piece / 16 < last;
#pragma unroll
    for (int i = 0; i < kTokens / kTokenRows; ++i, from += token_stride)
      copy_async(stages + stage + (token_to ^ (token_turn(i * kTokenRows) * 16)) + i * (kTokenRows * kTokenBytes), from,
                 tokens_here && i * kTokenRows < tokens_left);
  };

  // ---- scales and zeros of a step, [kParts, kRows, kGroups], through registers: a thread's are neighbours of one row
  static_assert(kThreads % kRows == 0, "a thread's scales are all of one row");
  constexpr int kHeld = (kFactors + kThreads - 1) / kThreads;
  const int factor_row = min(first_row + thread % kRows, n - 1), factor_group = thread / kRows * kHeld;
  const int factor_at = (factor_group / kGroups * kRows + thread % kRows) * kGroups + factor_group % kGroups;
  const bool has_factors = factor_group < kParts * kGroups;
  const auto load_factors = [&](const void* from, int step, uint32_t (&held)[kHeld]) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      // Those behind the last repeat it: they are not used.
      uint32_t group = min((first + step * kParts) * kGroups + factor_group + i, last * kGroups - 1);
      if (kSixteens == 8 && blocks_a_group > 1) group /= uint32_t(blocks_a_group);
      held[i] = stored_scale<scale_type>(from, group * uint32_t(n) + factor_row);
    }
  };
  const auto store_factors = [&](uint32_t* to, const uint32_t (&bits)[kHeld]) {
    constexpr int kTogether = kHeld < 4 ? kHeld : 4;
    if (!has_factors) return;
#pragma unroll
    for (int i = 0; i < kHeld; i += kTogether) {
      Together<kTogether> some;
#pragma unroll
      for (int e = 0; e < kTogether; ++e) some.words[e] = bits[i + e];
      *reinterpret_cast<Together<kTogether>*>(to + factor_at + i) = some;
    }
  };
  const auto store_scales = [&](int step, const uint32_t (&held)[kHeld]) {
    uint32_t bits[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if constexpr (kScaled)
        bits[i] = scale_pair<half, scale_type>(held[i]);
      else
        bits[i] = __float_as_uint(scale_value<half, scale_type>(held[i]) * (code == kE2M1 ? kE2M1Scale<half> : 1.0f));
    }
    store_factors(factors + step % 2 * kFactors, bits);
  };
  const auto store_zeros = [&](int step, const uint32_t (&held)[kHeld]) {
    uint32_t bits[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) bits[i] = __float_as_uint(scale_value<half, scale_type>(held[i]));
    store_factors(added + step % 2 * kFactors, bits);
  };

  float acc[kTiles][kColumns][4] = {};
  const int own_row = 16 * kTiles * row_warp + owner;  // of the tile's rows; + 8 and + 16 t are the lane's, too
  const int own_token = 8 * kColumns * token_warp;     // the first of the warp
  // Of words, a lane reads two for columns place * 2 .. + 1 of every sixteen, and two for columns + 8; of bytes, the
  // four with columns place * 8 .. + 7 of every 32.
  const int codes_at =
      storage == kWords ? code_place(own_row, place / 2) + place % 2 * 8 : code_place(own_row, 0) + place * 4;
  // What it names for ldmatrix: tokens 0..7 first half of a sixteen, second half, tokens 8..15 likewise. With bytes it
  // reads 16 bytes of a token, which are two sixteens' share of x for a lane.
  const int tokens_at =
      kCodeBytes + (storage == kWords ? token_place(own_token + lane % 8 + lane / 16 * 8, lane / 8 % 2)
                                      : token_place(own_token + owner, place));

  const auto multiply = [&](int step, int stage) {
    if (kParts > 1 && first + step * kParts + part >= last) return;
    const unsigned char* const mine = stages + stage + part * kPartBytes;
    const uint32_t* const scales = factors + ((step % 2 * kParts + part) * kRows + own_row) * kGroups;
#pragma unroll 1
    for (int chunk = 0; chunk < 2; ++chunk) {
      // Words: rows, rows + 8; columns, columns + 8, each of four sixteens. Bytes: rows, rows + 8; 32 columns, 32 more.
      uint32_t spread[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto* const at = mine + (16 * t + i % 2 * 8) * kBlockBytes;
          if constexpr (storage == kWords) {
            const uint2 words = *reinterpret_cast<const uint2*>(at + (codes_at ^ (i / 2 * 32)));
            spread[t][i] = spread_half(words.x, words.y, chunk);
          } else {
            spread[t][i] = *reinterpret_cast<const uint32_t*>(at + (codes_at ^ ((2 * chunk + i / 2) * 16)));
          }
        }
      constexpr int kWide = kSixteens < kChunkSixteens ? kSixteens : kChunkSixteens;  // of one scale, here
      constexpr int kSpans = kChunkSixteens / kWide;
      uint32_t a[kTiles][kChunkSixteens][4];
      float factor[kTiles][kSpans][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto stored = *reinterpret_cast<const Together<kSpans>*>(scales + (16 * t + 8 * h) * kGroups +
                                                                         (kSixteens == 8 ? 0 : chunk * kSpans));
#pragma unroll
          for (int span = 0; span < kSpans; ++span) {
            if constexpr (!kScaled) factor[t][span][h] = __uint_as_float(stored.words[span]);
#pragma unroll
            for (int j = span * kWide; j < (span + 1) * kWide; ++j)
#pragma unroll
              for (int i = h; i < 4; i += 2) {
                uint32_t pair;
                if constexpr (storage == kWords)
                  pair = value_pair<code, half>(spread[t][i], j);
                else
                  pair = pair_of_bytes<half>(spread[t][j / 2 * 2 + i % 2], j % 2 * 2 + i / 2);
                if constexpr (kScaled)
                  a[t][j][i] = scaled_pair<half, scale_type>(pair, stored.words[span]);
                else
                  a[t][j][i] = pair;
              }
          }
        }
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        uint32_t b[kChunkSixteens][4];
        if constexpr (storage == kWords) {
#pragma unroll
          for (int j = 0; j < kChunkSixteens; ++j)
            load_matrices(b[j], mine + (tokens_at ^ ((chunk * kChunkSixteens + j) * 32)) + 8 * c * kTokenBytes);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // tokens, tokens + 8; 32 columns, 32 more
            const uint4 found = *reinterpret_cast<const uint4*>(mine + (tokens_at ^ ((2 * chunk + i / 2) * 64)) +
                                                                8 * (c + i % 2) * kTokenBytes);
            b[i / 2 * 2][i % 2 * 2] = found.x;
            b[i / 2 * 2][i % 2 * 2 + 1] = found.y;
            b[i / 2 * 2 + 1][i % 2 * 2] = found.z;
            b[i / 2 * 2 + 1][i % 2 * 2 + 1] = found.w;
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float (&sum)[4] = acc[t][c + e];
            if constexpr (kScaled) {
#pragma unroll
              for (int j = 0; j < kChunkSixteens; ++j)
                mma<half>(sum, a[t][j][0], a[t][j][1], a[t][j][2], a[t][j][3], b[j][2 * e], b[j][2 * e + 1]);
            } else {
#pragma unroll
              for (int span = 0; span < kSpans; ++span) {
                float local[4] = {};
#pragma unroll
                for (int j = span * kWide; j < (span + 1) * kWide; ++j)
                  mma<half>(local, a[t][j][0], a[t][j][1], a[t][j][2], a[t][j][3], b[j][2 * e], b[j][2 * e + 1]);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] = fmaf(factor[t][span][i / 2], local[i], sum[i]);
              }
            }
          }
        if constexpr (zeros) {
          constexpr uint32_t ones = half == kBFloat16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((c + e) % kRowWarps != row_warp) continue;
#pragma unroll
            for (int span = 0; span < kSpans; ++span) {
              float total[4] = {};
#pragma unroll
              for (int j = span * kWide; j < (span + 1) * kWide; ++j)
                mma<half>(total, ones, ones, ones, ones, b[j][2 * e], b[j][2 * e + 1]);
              if (owner == 0)
                *reinterpret_cast<float2*>(totals +
                                           ((step % 2 * kParts + part) * kPieces + chunk * kSpans + span) * kTokens +
                                           own_token + 8 * (c + e) + 2 * place) = make_float2(total[0], total[1]);
            }
          }
        }
      }
    }
  };

  // What zeros add for the columns of a step that was multiplied before the last barrier.
  const auto add_zeros = [&](int step) {
    if (kParts > 1 && first + step * kParts + part >= last) return;
    const uint32_t* const from = added + ((step % 2 * kParts + part) * kRows + own_row) * kGroups;
    const float* const of_x = totals + (step % 2 * kParts + part) * (kPieces * kTokens) + own_token + 2 * place;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      float shift[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) shift[t][h] = __uint_as_float(from[(16 * t + 8 * h) * kGroups + group]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float2 total = *reinterpret_cast<const float2*>(of_x + group * kTokens + 8 * c);
        if constexpr (kPieces > kGroups) {
          const float2 more = *reinterpret_cast<const float2*>(of_x + kTokens + 8 * c);
          total.x += more.x;
          total.y += more.y;
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[t][c][i] = fmaf(shift[t][i / 2], i % 2 ? total.y : total.x, acc[t][c][i]);
      }
    }
  };

  uint32_t held[kHeld], held_zeros[kHeld];
  load_factors(scale, 0, held);
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step, step * kStageBytes);
    commit_copies();
  }
  store_scales(0, held);
  int stage = 0, free_stage = (kStages - 1) * kStageBytes;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) fetch(step + kStages - 1, free_stage);
    commit_copies();
    free_stage = stage;
    if (step + 1 < steps) load_factors(scale, step + 1, held);
    if constexpr (zeros) {
      load_factors(zero, step, held_zeros);
      if (step > 0) add_zeros(step - 1);
    }
    multiply(step, stage);
    if (step + 1 < steps) store_scales(step + 1, held);
    if constexpr (zeros) store_zeros(step, held_zeros);
    stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }
  wait_copies<0>();
  __syncthreads();
  if constexpr (zeros) {
    if (steps > 0) add_zeros(steps - 1);
    __syncthreads();
  }

  // ---- the tile through shared memory, so that neighbouring threads store neighbouring rows
  constexpr int kStride = kRows + 4;  // the four tokens of a lane's neighbours lie in different banks
  auto* const tile = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        tile[(part * kTokens + own_token + 8 * c + 2 * place + i % 2) * kStride + own_row + 16 * t + i / 2 * 8] =
            acc[t][c][i];
  __syncthreads();
  const int present = min(kTokens, m - first_token);
  const auto value_at = [&](int token, int row) {
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) total += tile[(p * kTokens + token) * kStride + row];
    return kScaled ? total * kPairsScale<scale_type> : total;
  };
  if (sums != nullptr) {
    float* const to = sums + int64_t(blockIdx.z) * m * n + int64_t(first_token) * n + first_row;
    for (int at = thread; at < present * kRows; at += kThreads) {
      const int row = at % kRows, token = at / kRows;
      if (first_row + row < n) to[int64_t(token) * n + row] = value_at(token, row);
    }
    return;
  }
  uint16_t* const to = out + int64_t(first_token) * n + first_row;
  const auto finished = [&](int token, int row) {
    float total = value_at(token, row);
    total *= factor_of_row(alpha, alpha_kind, first_row + row);
    if (bias != nullptr) total += half_to_float<half>(__ldg(bias + first_row + row));
    return uint32_t(float_to_half<half>(total));
  };
  if (n % 2 == 0) {
    for (int at = thread; at < present * (kRows / 2); at += kThreads) {
      const int row = at % (kRows / 2) * 2, token = at / (kRows / 2);
      if (first_row + row >= n) continue;
      *reinterpret_cast<uint32_t*>(to + int64_t(token) * n + row) = finished(token, row) | finished(token, row + 1)
                                                                                               << 16;
    }
  } else {
    for (int at = thread; at < present * kRows; at += kThreads) {
      const int row = at % kRows, token = at / kRows;
      if (first_row + row < n) to[int64_t(token) * n + row] = uint16_t(finished(token, row));
    }
  }
}

// out [m, n] = alpha * (sum over splits of sums [splits, m, n], in their order) + bias
template <Half half>
__global__ void __launch_bounds__(256)
    add_splits(const float* __restrict__ sums, const float* __restrict__ alpha, int alpha_kind,
               const uint16_t* __restrict__ bias, uint16_t* __restrict__ out, int splits, int m, int n) {
  const int row = blockIdx.x * 256 + threadIdx.x;
  if (row >= n) return;
  const int64_t at = int64_t(blockIdx.y) * n + row, size = int64_t(m) * n;
  float total = 0.0f;
  for (int split = 0; split < splits; ++split) total += sums[split * size + at];
  total *= factor_of_row(alpha, alpha_kind, row);
  if (bias != nullptr) total += half_to_float<half>(bias[row]);
  out[at] = float_to_half<half>(total);
}

}  // namespace lowbit
