// Products of activations as integers with codes of up to 4 bits: int8 dot products, float32 scales.
//
// Activations of a block of columns become integers with one scale: one int8 piece each (W4A8), or two, the high and
// the low byte of an int16 (W4A16: 2^-16 of the block's largest, well under what bfloat16 or float16 outputs round).
// A sum over a group of columns is then
//
//   sum of w x = scale * sum over blocks d * (sum of code q) + offset * sum over blocks d * (sum of q)
//
// A Weight (one format's arrangement, in blocks of 16 rows, 8 codes a word) offers
//
//   int64_t n, k, group;                 group: columns that share a scale
//   static constexpr int kSteps;         how many dot4 may be added up for its codes
//   const uint32_t* words;               [blocks, stride]: k / 8 words of 16 rows, and what fills up
//   int64_t stride;
//   static void codes(I32 word, Bytes& even, Bytes& odd);   the codes of columns 0 2 4 6 and of columns 1 3 5 7
//   F32 scale(int64_t block, int64_t group, int vector), offset(...);
//
// All numbers of tokens run the same loop: it keeps all sums of a tile of tokens and a block of rows in registers over
// the whole of K, so that a tile reads a block's words once, from memory or from the second-level cache.
#pragma once

#include <algorithm>
#include <cmath>

#include "float_gemm.h"

namespace lowbit {

// Activations as integers, made once a call.
template <int kPieces>
struct IntegerTokens {
  static_assert(kPieces == 1 || kPieces == 2, "int8 or int16");
  static constexpr int kWordBytes = 8 * kPieces;  // of each piece, low byte first: columns 0 2 4 6, then 1 3 5 7

  int64_t k, block, groups;
  Room bytes_room, d_room, sums_room;
  int8_t* bytes;  // [m, k / 8, kPieces, 8]
  float* d;       // [m, k / block]
  float* sums;    // [m, groups]: d times the sum of the integers

  IntegerTokens(const Activations& x, int64_t columns_a_scale, int64_t group, int threads)
      : k(x.k),
        block(columns_a_scale),
        groups(x.k / group),
        bytes_room(x.m * x.k * kPieces / 4 + 16),
        d_room(x.m * (x.k / block)),
        sums_room(x.m * groups),
        bytes(reinterpret_cast<int8_t*>(bytes_room.data())),
        d(d_room.data()),
        sums(sums_room.data()) {
    parallel_for(x.m, x.m * k >= 32768 ? threads : 1, [&](int64_t m) {
      Room row(k);
      row_to_f32(x, m, row.data());
      for (int64_t g = 0; g < groups; ++g) sums[m * groups + g] = 0.0f;
      for (int64_t b = 0; b < k / block; ++b) {
        const int64_t sum = quantize(row.data() + b * block, bytes + (m * k + b * block) * kPieces, d[m * (k / block) + b]);
        sums[m * groups + b * block / group] += d[m * (k / block) + b] * static_cast<float>(sum);
      }
    });
  }

  const int8_t* row(int64_t m) const { return bytes + m * k * kPieces; }

 private:
  // One block: its integers, their sum and their scale.
  int64_t quantize(const float* x, int8_t* to, float& scale) const {
    using namespace simd;
    float most = 0.0f;
    for (int64_t c = 0; c < block; c += 8) {
      for (int j = 0; j < 8; ++j) most = std::max(most, std::fabs(x[c + j]));
    }
    constexpr float kMost = kPieces == 1 ? 127.0f : 127.0f * 256.0f;
    scale = most / kMost;
    // The reciprocal of a scale that is subnormal would overflow: such a block is zero beside any weight.
    const float inverse = most > 1e-30f ? kMost / most : 0.0f;
    if (!(most > 1e-30f) && most == most) scale = 0.0f;
    int64_t sum = 0;
    for (int64_t c = 0; c < block; c += 8) {
      for (int j = 0; j < 8; ++j) {
        const int32_t q = static_cast<int32_t>(std::nearbyint(x[c + j] * inverse));
        sum += q;
        int8_t* at = to + c * kPieces + (j % 2) * 4 + j / 2;
        if constexpr (kPieces == 1) {
          *at = static_cast<int8_t>(q);
        } else {
          const int32_t high = (q + 128) >> 8;
          at[0] = static_cast<int8_t>(q - high * 256);
          at[8] = static_cast<int8_t>(high);
        }
      }
    }
    return sum;
  }
};

#if defined(LOWBIT_ISA_AVX512) || defined(LOWBIT_ISA_AMX)
constexpr int kInt4Blocks = 2;  // 24 sums in 32 registers
template <int kPieces>
constexpr int kInt4Tokens = kPieces == 1 ? 12 : 6;
#elif defined(LOWBIT_ISA_NEON)
constexpr int kInt4Blocks = 1;
template <int kPieces>
constexpr int kInt4Tokens = kPieces == 1 ? 4 : 2;  // 16 sums in 32 registers
#else
constexpr int kInt4Blocks = 1;
template <int kPieces>
constexpr int kInt4Tokens = kPieces == 1 ? 4 : 2;  // 8 sums in 16 registers
#endif

// The whole product of kTokens tokens with kBlocks blocks of rows.
template <class Weight, int kPieces, int kTokens, int kBlocks>
inline void int4_tile(const Weight& w, const IntegerTokens<kPieces>& x, int64_t block, int64_t token,
                      simd::F32 (&sums)[kTokens][kBlocks * kBlockVectors]) {
  using namespace simd;
  constexpr int kVectors = kBlocks * kBlockVectors;
  const int64_t groups = w.k / w.group, blocks_a_group = w.group / x.block;
  const int64_t unit = std::min<int64_t>(x.block, Weight::kSteps * 4) / 8;  // words between two totals
  const uint32_t* from[kBlocks];
  for (int b = 0; b < kBlocks; ++b) from[b] = w.words + (block + b) * w.stride;
  const int8_t* rows[kTokens];
  for (int t = 0; t < kTokens; ++t) rows[t] = x.row(token + t);
  for (auto& row : sums)
    for (auto& sum : row) sum = zero_f32();

  int64_t word = 0;
  for (int64_t g = 0; g < groups; ++g) {
    F32 group_sums[kTokens][kVectors];
    for (auto& row : group_sums)
      for (auto& sum : row) sum = zero_f32();
    for (int64_t b = g * blocks_a_group; b < (g + 1) * blocks_a_group; ++b) {
      I32 block_sums[kTokens][kVectors];
      const int64_t block_end = (b + 1) * (x.block / 8);
      bool first = true;
      while (word < block_end) {
        Dot4 dots[kTokens][kVectors][kPieces];
        for (auto& row : dots)
          for (auto& pieces : row)
            for (auto& dot : pieces) dot = zero_dot4();
        for (const int64_t end = word + unit; word < end; ++word) {
          Bytes even[kVectors], odd[kVectors];
          for (int v = 0; v < kVectors; ++v)
            Weight::codes(load_i32(from[v / kBlockVectors] + word * kBlockRows + v % kBlockVectors * kLanes), even[v], odd[v]);
          for (int t = 0; t < kTokens; ++t) {
            const int8_t* q = rows[t] + word * (8 * kPieces);
            for (int p = 0; p < kPieces; ++p) {
              const Bytes q_even = set4_bytes(q + p * 8), q_odd = set4_bytes(q + p * 8 + 4);
              for (int v = 0; v < kVectors; ++v) dots[t][v][p] = dot4(dots[t][v][p], even[v], q_even);
              for (int v = 0; v < kVectors; ++v) dots[t][v][p] = dot4(dots[t][v][p], odd[v], q_odd);
            }
          }
        }
        for (int t = 0; t < kTokens; ++t)
          for (int v = 0; v < kVectors; ++v) {
            I32 sum = total(dots[t][v][0]);
            if constexpr (kPieces == 2) sum = add(sum, shift_left<8>(total(dots[t][v][1])));
            block_sums[t][v] = first ? sum : add(block_sums[t][v], sum);
          }
        first = false;
      }
      for (int t = 0; t < kTokens; ++t) {
        const F32 d = set1_f32(x.d[(token + t) * (x.k / x.block) + b]);
        for (int v = 0; v < kVectors; ++v) group_sums[t][v] = fma(to_f32(block_sums[t][v]), d, group_sums[t][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const F32 scale = w.scale(block + v / kBlockVectors, g, v % kBlockVectors);
      const F32 offset = w.offset(block + v / kBlockVectors, g, v % kBlockVectors);
      for (int t = 0; t < kTokens; ++t) {
        const F32 x_sum = set1_f32(x.sums[(token + t) * x.groups + g]);
        sums[t][v] = fma(offset, x_sum, fma(group_sums[t][v], scale, sums[t][v]));
      }
    }
  }
}

template <class Weight, int kPieces, int kTokens, int kBlocks>
inline void int4_store(const Weight& w, const IntegerTokens<kPieces>& x, int64_t block, int64_t token, const Output& out) {
  simd::F32 sums[kTokens][kBlocks * kBlockVectors];
  int4_tile<Weight, kPieces, kTokens, kBlocks>(w, x, block, token, sums);
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) {
      simd::F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) row[v] = sums[t][b * kBlockVectors + v];
      store_block(row, block + b, w.n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
    }
}

template <class Weight, int kPieces, int kBlocks, int kMost>
inline void int4_store_of(int tokens, const Weight& w, const IntegerTokens<kPieces>& x, int64_t block, int64_t token, const Output& out) {
  if constexpr (kMost > 0) {
    if (tokens == kMost) return int4_store<Weight, kPieces, kMost, kBlocks>(w, x, block, token, out);
    int4_store_of<Weight, kPieces, kBlocks, kMost - 1>(tokens, w, x, block, token, out);
  }
}

constexpr int64_t kInt4ChunkTokens = 192;        // their integers fill the second-level cache beside the words
constexpr int64_t kInt4TaskBytes = 192 * 1024;  // words of a task, which every tile of tokens reads again

template <class Weight, int kPieces>
void int4_gemm(const Weight& w, const IntegerTokens<kPieces>& x, int64_t m, const Output& out, int threads) {
  constexpr int kMost = kInt4Tokens<kPieces>;
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows, block_bytes = w.k * kBlockRows / 2;
  const int64_t chunks = (m + kInt4ChunkTokens - 1) / kInt4ChunkTokens;
  int64_t run = std::max<int64_t>(1, kInt4TaskBytes / block_bytes);
  run = std::max<int64_t>(1, std::min(run, blocks * chunks / (8 * std::max(threads, 1))));
  if (run > kInt4Blocks) run -= run % kInt4Blocks;
  const int64_t runs = (blocks + run - 1) / run;
  parallel_for(runs * chunks, threads, [&](int64_t task) {
    const int64_t first_block = task % runs * run, last_block = std::min(first_block + run, blocks);
    const int64_t first = task / runs * kInt4ChunkTokens, last = std::min(first + kInt4ChunkTokens, m);
    // Tiles of nearly equal size: 5 tokens are 3 + 2, not 4 + 1.
    const int64_t tiles = (last - first + kMost - 1) / kMost;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t token = first + (last - first) * t / tiles, end = first + (last - first) * (t + 1) / tiles;
      const int tokens = static_cast<int>(end - token);
      int64_t block = first_block;
      for (; block + kInt4Blocks <= last_block; block += kInt4Blocks)
        int4_store_of<Weight, kPieces, kInt4Blocks, kMost>(tokens, w, x, block, token, out);
      if constexpr (kInt4Blocks > 1)
        for (; block < last_block; ++block) int4_store_of<Weight, kPieces, 1, kMost>(tokens, w, x, block, token, out);
    }
  });
}

}  // namespace lowbit
