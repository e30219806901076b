// Products of activations as integers with codes of up to 4 bits: int8 dot products, float32 scales.
//
// Activations of a block of columns become integers with one scale: int8 (W4A8), or int16 (W4A16: 2^-16 of the block's
// largest, well under what bfloat16 or float16 outputs round). int16 are multiplied as pairs with codes widened to
// pairs, or, where a set has an instruction for products of int8, as two pieces of int8, the high and the low byte.
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
//                                        where a word is 4 columns of 8 bits: static Bytes bytes(I32 word), signed
//   F32 scale(int64_t block, int64_t group, int vector), offset(...);
//
// All numbers of tokens run the same loop: it keeps all sums of a tile of tokens and a block of rows in registers over
// the whole of K, so that a tile reads a block's words once, from memory or from the second-level cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "float_gemm.h"

namespace lowbit {

#if defined(LOWBIT_ISA_AVX512)
constexpr int kInt4Blocks = 2;  // 24 sums in 32 registers
constexpr bool kInt16Pairs = false;
template <int kPieces>
constexpr int kInt4Tokens = kPieces == 1 ? 12 : 6;
#elif defined(LOWBIT_ISA_NEON)
constexpr int kInt4Blocks = 1;
constexpr bool kInt16Pairs = false;
template <int kPieces>
constexpr int kInt4Tokens = kPieces == 1 ? 4 : 2;  // 16 sums in 32 registers
#else
constexpr int kInt4Blocks = 1;
constexpr bool kInt16Pairs = true;
template <int kPieces>
constexpr int kInt4Tokens = 4;  // 8 sums in 16 registers
#endif

// Tokens that are too few for int16 pairs: widening a code to 16 bits then costs more than the second product saves.
constexpr int64_t kTooFewForPairs = 2;

// Activations as integers, made once a call, in words of as many columns as the weight's have. kPlanes, for tiles
// (int4_tiles.h): the low bytes of all tokens, then the high ones.
template <int kPieces_, int kColumns_ = 8, bool kPaired_ = kInt16Pairs, bool kPlanes_ = false>
struct IntegerTokens {
  static_assert(kPieces_ == 1 || kPieces_ == 2, "int8 or int16");
  static_assert(kColumns_ == 8 || (kColumns_ == 4 && kPieces_ == 2), "codes of 4 bits, or of 8 beside int16");
  static constexpr int kPieces = kPieces_, kColumns = kColumns_;
  static constexpr bool kPlanes = kPieces == 1 || kPlanes_;
  static constexpr bool kPairs = !kPlanes && (kPaired_ || kColumns == 4);
  static constexpr int kWordBytes = kColumns * kPieces;

  int64_t m, k, block, groups;
  Room bytes_room, d_room, sums_room;
  int8_t* bytes;  // [m, k / kColumns, kWordBytes]; kPlanes [kPieces, m, k]
  float* d;       // [m, k / block]
  float* sums;    // [m, groups]: d times the sum of the integers

  IntegerTokens(const Activations& x, int64_t columns_a_scale, int64_t group, int threads)
      : m(x.m),
        k(x.k),
        block(std::min(columns_a_scale, group)),
        groups(x.k / group),
        bytes_room(x.m * x.k * kPieces / 4 + 16),
        d_room(x.m * (x.k / block)),
        sums_room(x.m * groups),
        bytes(reinterpret_cast<int8_t*>(bytes_room.data())),
        d(d_room.data()),
        sums(sums_room.data()) {
    const int64_t quantized = columns_a_scale;  // several blocks where groups are shorter
    parallel_for(m, m * k >= 32768 ? threads : 1, [&](int64_t token) {
      Room room(k + simd::kLanes);
      float* row = room.data();
      row_to_f32(x, token, row);
      float* scales = d + token * (k / block);
      float* group_sums = sums + token * groups;
      for (int64_t g = 0; g < groups; ++g) group_sums[g] = 0.0f;
      for (int64_t first = 0; first < k; first += quantized) {
        const float scale = round_block(row + first, quantized);
        for (int64_t c = first; c < first + quantized; c += block) {
          scales[c / block] = scale;
          group_sums[c / group] += scale * static_cast<float>(sum_of(reinterpret_cast<const int32_t*>(row + c), block));
        }
      }
      arrange(reinterpret_cast<const int32_t*>(row), bytes + token * (kPlanes ? k : k * kPieces));
    });
  }

  const int8_t* row(int64_t token) const { return bytes + token * k * kPieces; }
  const int8_t* row(int64_t token, int piece) const { return bytes + (piece * m + token) * k; }  // kPlanes

 private:
  // Replaces a block by its integers, as int32, and returns their scale. What is not finite counts as 0, with a scale
  // that is not finite either.
  static float round_block(float* x, int64_t count) {
    using namespace simd;
    constexpr float kMost = kPieces == 1 ? 127.0f : 127.0f * 256.0f;
    int64_t c = 0;
    I32 bits = zero_i32();  // of absolute values: ordered as they are, NaN last
    for (; c + kLanes <= count; c += kLanes) bits = max(bits, as_i32(abs(load_f32(x + c))));
    if (c < count) bits = max(bits, as_i32(abs(load_first(x, c, static_cast<int>(count - c), kFloat32))));
    const bool nan = any(less(set1_i32(0x7f800000), bits));
    const float most = nan ? std::numeric_limits<float>::quiet_NaN() : reduce_max(as_f32(bits));
    const float scale = most / kMost;
    float inverse = 1.0f / scale;
    if (!std::isfinite(inverse)) inverse = 0.0f;  // also where the scale is all but nothing
    const F32 factor = set1_f32(inverse);
    for (c = 0; c + kLanes <= count; c += kLanes) store_i32(x + c, rounded(mul(load_f32(x + c), factor)));
    if (c < count) {
      const int rest = static_cast<int>(count - c);
      store_first(x, c, rest, as_f32(rounded(mul(load_first(x, c, rest, kFloat32), factor))), kFloat32);
    }
    return scale;
  }
  static simd::I32 rounded(simd::F32 x) { return select(not_a_number(x), simd::zero_i32(), simd::to_i32(x)); }

  static int32_t sum_of(const int32_t* q, int64_t count) {
    using namespace simd;
    I32 lanes = zero_i32();
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) lanes = add(lanes, load_i32(q + c));
    int32_t sum = reduce_add(lanes);
    for (; c < count; ++c) sum += q[c];
    return sum;
  }

  // int32 [k] -> the words of a row.
  void arrange(const int32_t* q, int8_t* to) const {
    using namespace simd;
    if constexpr (kPieces == 1) {
      auto* bytes = reinterpret_cast<uint8_t*>(to);
      int64_t c = 0;
      for (; c + kLanes <= k; c += kLanes) store_low_bytes(bytes + c, load_i32(q + c));
      for (; c < k; ++c) bytes[c] = static_cast<uint8_t>(q[c]);
      for (c = 0; c < k; c += 8) evens_first(bytes + c);
    } else if constexpr (kPlanes) {
      for (int64_t c = 0; c < k; ++c) {
        const int64_t at = kColumns == 8 ? c / 8 * 8 + c % 2 * 4 + c % 8 / 2 : c;
        to[at] = static_cast<int8_t>(q[c]);
        to[m * k + at] = static_cast<int8_t>((q[c] + 128) >> 8);
      }
    } else if constexpr (kPairs) {
      constexpr int kHalf = kColumns / 2;
      for (int64_t c = 0; c < k; c += kColumns, to += kWordBytes) {
        uint32_t pairs[kHalf];
        for (int j = 0; j < kHalf; ++j)
          pairs[j] = (static_cast<uint32_t>(q[c + j]) & 0xffff) | static_cast<uint32_t>(q[c + j + kHalf]) << 16;
        std::memcpy(to, pairs, sizeof(pairs));
      }
    } else {
      for (int64_t c = 0; c < k; c += 8, to += kWordBytes)
        for (int j = 0; j < 8; ++j) {
          to[j % 2 * 4 + j / 2] = static_cast<int8_t>(q[c + j]);
          to[8 + j % 2 * 4 + j / 2] = static_cast<int8_t>((q[c + j] + 128) >> 8);
        }
    }
  }

  // Bytes 0 1 2 3 4 5 6 7 -> 0 2 4 6 1 3 5 7.
  static void evens_first(uint8_t* eight) {
    uint64_t bytes;
    std::memcpy(&bytes, eight, 8);
    uint64_t swap = (bytes ^ bytes >> 8) & 0x0000ff000000ff00;
    bytes ^= swap ^ swap << 8;
    swap = (bytes ^ bytes >> 16) & 0x00000000ffff0000;
    bytes ^= swap ^ swap << 16;
    std::memcpy(eight, &bytes, 8);
  }
};

// The sums of products of one block of columns, as int32: words [first, first + count) of kVectors vectors of rows.
template <class Weight, class Tokens, int kTokens, int kVectors, int kUnit>
inline __attribute__((always_inline)) void int4_block(const uint32_t* const (&from)[kVectors],
                                                      const int8_t* const (&rows)[kTokens], int64_t word, int64_t count,
                                                      simd::I32 (&found)[kTokens][kVectors]) {
  using namespace simd;
  if constexpr (Tokens::kPairs) {
    for (auto& row : found)
      for (auto& sum : row) sum = zero_i32();
    for (const int64_t end = word + count; word < end; ++word) {
      if constexpr (kTokens <= 2) __builtin_prefetch(from[0] + word * kBlockRows + kAheadBytes / 4);
      auto step = [&](auto place) __attribute__((always_inline)) {
        constexpr int kAt = decltype(place)::value;  // columns 0 4, then 1 5, 2 6, 3 7; or 0 2, then 1 3
        I32 pair[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const uint32_t* at = from[v] + word * kBlockRows;
          // Read anew for every pair: to keep a word, too, takes more registers than there are.
          if constexpr (kTokens > 2) asm("" : "+r"(at));
          if constexpr (Tokens::kColumns == 4) {
            const Bytes bytes = Weight::bytes(load_i32(at));
            pair[v] = kAt ? odd_bytes(bytes) : even_bytes(bytes);
          } else {
            Bytes even, odd;
            Weight::codes(load_i32(at), even, odd);
            const Bytes codes = kAt % 2 ? odd : even;
            pair[v] = kAt / 2 ? odd_bytes(codes) : bit_and(as_i32(codes), set1_i32(0x00ff00ff));
          }
        }
        for (int t = 0; t < kTokens; ++t) {
          int32_t two;
          std::memcpy(&two, rows[t] + word * Tokens::kWordBytes + kAt * 4, 4);
          for (int v = 0; v < kVectors; ++v) found[t][v] = dot2(found[t][v], pair[v], set1_i32(two));
        }
      };
      for_each_place<Tokens::kColumns / 2>(step);
    }
  } else {
    bool first = true;
    for (const int64_t end = word + count; word < end; first = false) {
      Dot4 dots[kTokens][kVectors][Tokens::kPieces];
      for (auto& row : dots)
        for (auto& pieces : row)
          for (auto& dot : pieces) dot = zero_dot4();
      const int64_t unit = kUnit ? kUnit : std::min<int64_t>(end - word, Weight::kSteps / 2);
      auto step = [&](int64_t at) __attribute__((always_inline)) {
        if constexpr (kTokens <= 2) __builtin_prefetch(from[0] + at * kBlockRows + kAheadBytes / 4);
        Bytes even[kVectors], odd[kVectors];
        for (int v = 0; v < kVectors; ++v) Weight::codes(load_i32(from[v] + at * kBlockRows), even[v], odd[v]);
        for (int t = 0; t < kTokens; ++t) {
          const int8_t* q = rows[t] + at * Tokens::kWordBytes;
          for (int p = 0; p < Tokens::kPieces; ++p) {
            const Bytes q_even = set4_bytes(q + p * 8);
            for (int v = 0; v < kVectors; ++v) dots[t][v][p] = dot4(dots[t][v][p], even[v], q_even);
            const Bytes q_odd = set4_bytes(q + p * 8 + 4);
            for (int v = 0; v < kVectors; ++v) dots[t][v][p] = dot4(dots[t][v][p], odd[v], q_odd);
          }
        }
      };
      if constexpr (kUnit) {
#pragma GCC unroll 4
        for (int w = 0; w < kUnit; ++w) step(word + w);
      } else {
        for (int64_t w = 0; w < unit; ++w) step(word + w);
      }
      word += unit;
      for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kVectors; ++v) {
          I32 sum = total(dots[t][v][0]);
          if constexpr (Tokens::kPieces == 2) sum = add(sum, shift_left<8>(total(dots[t][v][1])));
          found[t][v] = first ? sum : add(found[t][v], sum);
        }
      if constexpr (kUnit) return;
    }
  }
}

// The whole product of kTokens tokens with kBlocks blocks of rows.
template <class Weight, class Tokens, int kTokens, int kBlocks, int kUnit>
inline void int4_tile(const Weight& w, const Tokens& x, int64_t block, int64_t token,
                      simd::F32 (&sums)[kTokens][kBlocks * kBlockVectors]) {
  using namespace simd;
  constexpr int kVectors = kBlocks * kBlockVectors;
  const int64_t groups = w.k / w.group, blocks_a_group = w.group / x.block, words = x.block / Tokens::kColumns;
  const uint32_t* from[kVectors];
  for (int v = 0; v < kVectors; ++v)
    from[v] = w.words + (block + v / kBlockVectors) * w.stride + v % kBlockVectors * kLanes;
  const int8_t* rows[kTokens];
  for (int t = 0; t < kTokens; ++t) rows[t] = x.row(token + t);
  const float* d = x.d + token * (x.k / x.block);
  const float* x_sums = x.sums + token * x.groups;
  for (auto& row : sums)
    for (auto& sum : row) sum = zero_f32();

  int64_t word = 0;
  for (int64_t g = 0; g < groups; ++g) {
    F32 scale[kVectors];
    for (int v = 0; v < kVectors; ++v) scale[v] = w.scale(block + v / kBlockVectors, g, v % kBlockVectors);
    for (int64_t b = g * blocks_a_group; b < (g + 1) * blocks_a_group; ++b, word += words) {
      I32 found[kTokens][kVectors];
      int4_block<Weight, Tokens, kTokens, kVectors, kUnit>(from, rows, word, words, found);
      for (int t = 0; t < kTokens; ++t) {
        const F32 step = set1_f32(d[t * (x.k / x.block) + b]);
        for (int v = 0; v < kVectors; ++v) sums[t][v] = fma(to_f32(found[t][v]), mul(scale[v], step), sums[t][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const F32 offset = w.offset(block + v / kBlockVectors, g, v % kBlockVectors);
      for (int t = 0; t < kTokens; ++t) sums[t][v] = fma(offset, set1_f32(x_sums[t * x.groups + g]), sums[t][v]);
    }
  }
}

template <class Weight, class Tokens, int kTokens, int kBlocks, int kUnit>
__attribute__((noinline)) void int4_store(const Weight& w, const Tokens& x, int64_t block, int64_t token,
                                          const Output& out, int64_t n, int64_t first_block) {
  simd::F32 sums[kTokens][kBlocks * kBlockVectors];
  int4_tile<Weight, Tokens, kTokens, kBlocks, kUnit>(w, x, block - first_block, token, sums);
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) {
      simd::F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) row[v] = sums[t][b * kBlockVectors + v];
      store_block(row, block + b, n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
    }
}

template <class Weight, class Tokens, int kBlocks, int kUnit, int kMost>
inline void int4_store_of(int tokens, const Weight& w, const Tokens& x, int64_t block, int64_t token, const Output& out,
                          int64_t n, int64_t first_block) {
  if constexpr (kMost > 0) {
    if (tokens == kMost)
      return int4_store<Weight, Tokens, kMost, kBlocks, kUnit>(w, x, block, token, out, n, first_block);
    int4_store_of<Weight, Tokens, kBlocks, kUnit, kMost - 1>(tokens, w, x, block, token, out, n, first_block);
  }
}

constexpr int64_t kInt4ChunkTokens = 192;       // their integers fill the second-level cache beside the words
constexpr int64_t kInt4TaskBytes = 192 * 1024;  // words of a task, which every tile of tokens reads again

// `weight_of(first, last, worker)` gives a Weight that holds these blocks of rows: the whole one, or, not kWhole, one
// that begins with them.
template <class Weight, bool kWhole, int kUnit, class Tokens, class WeightOf>
void int4_gemm_by(const WeightOf& weight_of, const Tokens& x, int64_t m, int64_t n, const Output& out, int threads) {
  constexpr int kMost = kInt4Tokens<Tokens::kPieces>;
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows, block_bytes = x.k * kBlockRows * 4 / Tokens::kColumns;
  const int64_t chunks = (m + kInt4ChunkTokens - 1) / kInt4ChunkTokens;
  int64_t run = std::max<int64_t>(1, kInt4TaskBytes / block_bytes);
  run = std::max<int64_t>(1, std::min(run, blocks * chunks / (8 * std::max(threads, 1))));
  if (!kWhole && m <= kMost) run = kInt4Blocks;  // no tile reads its words again: what is made stays in the first cache
  if (run > kInt4Blocks) run -= run % kInt4Blocks;
  const int64_t runs = (blocks + run - 1) / run;
  parallel_for(runs * chunks, threads, [&](int64_t task, int worker) {
    const int64_t first_block = task % runs * run, last_block = std::min(first_block + run, blocks);
    const int64_t first = task / runs * kInt4ChunkTokens, last = std::min(first + kInt4ChunkTokens, m);
    const Weight w = weight_of(first_block, last_block, worker);
    const int64_t base = kWhole ? 0 : first_block;
    // Tiles of nearly equal size: 5 tokens are 3 + 2, not 4 + 1.
    const int64_t tiles = (last - first + kMost - 1) / kMost;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t token = first + (last - first) * t / tiles, end = first + (last - first) * (t + 1) / tiles;
      const int tokens = static_cast<int>(end - token);
      int64_t block = first_block;
      for (; block + kInt4Blocks <= last_block; block += kInt4Blocks)
        int4_store_of<Weight, Tokens, kInt4Blocks, kUnit, kMost>(tokens, w, x, block, token, out, n, base);
      if constexpr (kInt4Blocks > 1)
        for (; block < last_block; ++block)
          int4_store_of<Weight, Tokens, 1, kUnit, kMost>(tokens, w, x, block, token, out, n, base);
    }
  });
}

template <class Weight, bool kWhole, class Tokens, class WeightOf>
void int4_gemm_of(const WeightOf& weight_of, const Tokens& x, int64_t m, int64_t n, const Output& out, int threads) {
  if constexpr (!Tokens::kPairs && Weight::kSteps >= 8)
    if (x.block == 32) return int4_gemm_by<Weight, kWhole, 4>(weight_of, x, m, n, out, threads);
  int4_gemm_by<Weight, kWhole, 0>(weight_of, x, m, n, out, threads);
}

template <class Weight, class Tokens>
void int4_gemm(const Weight& w, const Tokens& x, int64_t m, const Output& out, int threads) {
  int4_gemm_of<Weight, true>([&](int64_t, int64_t, int) { return w; }, x, m, w.n, out, threads);
}

}  // namespace lowbit
