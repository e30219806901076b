// Products of activations as integers with codes of up to 4 bits: int8 dot products, float32 scales.
//
// Activations of a block of columns become integers with one scale: int8 (W4A8), or int16 (W4A16: 2^-16 of the block's
// largest, well under what bfloat16 or float16 outputs round). int16 are multiplied as pairs with codes widened to
// pairs, or as two pieces of int8, the high and the low byte: few tokens, and all where a set has an instruction for
// products of int8 but none for pairs.
// A sum over a group of columns is then
//
//   sum of w x = scale * sum over blocks d * (sum of code q) + offset * sum over blocks d * (sum of q)
//
// A Weight (one format's arrangement, in blocks of 16 rows, 8 codes of 4 bits a word or 4 of 8) offers
//
//   int64_t n, k, group;                 group: columns that share a scale
//   static constexpr int kSteps;         how many dot4 may be added up for its codes
//   const uint32_t* words;               [blocks, stride]: the words of 16 rows, and what fills up
//   int64_t stride;
//   static void codes(I32 word, Bytes& even, Bytes& odd);   4 bits: codes of columns 0 2 4 6 and of columns 1 3 5 7
//   static I32 pair<at>(I32 word);       int16: 4 bits: columns at and at + 4 of 0..7; 8 bits: at and at + 2 of 0..3
//   void read_factors(int64_t block, float* scales, float* offsets) const;     [groups, 16] each
//   static constexpr bool kOffsets;      false: there are none. `pair` gives integers with their sign, and `codes`
//   gives static constexpr int kZero;          them with kZero added
//   static constexpr bool kSpans;        true: groups are short, and the activations' scale is multiplied with once for
//   F32 span_scale(int64_t block, int v) const;   all that share it, with this factor, which the scales then lack; so
//                                                 that what adds up before stays far from infinity
//
// All numbers of tokens run the same loop: it keeps the integer sums of a tile of tokens and some blocks of rows in
// registers, so that a tile reads a block's words once, from memory or from the second-level cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "float_gemm.h"

namespace lowbit {

// kInt4Tokens: of a tile; pairs have one sum as int8 have, int16 in two pieces have two.
#if defined(LOWBIT_ISA_AVX512)
constexpr int kInt4Blocks = 2;
constexpr bool kInt16Pairs = true;
template <int kPieces>
constexpr int kInt4Tokens = 12;  // 24 sums in 32 registers; two pieces are for kTooFewForPairs alone
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

  int64_t m, k, quantized, block, groups;  // quantized: columns that share a scale; block: those of them in one group
  Room bytes_room, d_room, sums_room, whole_room;
  int8_t* bytes;   // [m, k / kColumns, kWordBytes]; kPlanes [kPieces, m, k]
  float* d;        // [m, k / block]
  float* sums;     // [m, groups]: d times the sum of the integers
  int32_t* whole;  // [m, k / block]: the sum of the integers

  IntegerTokens(const Activations& x, int64_t columns_a_scale, int64_t group, int threads)
      : m(x.m),
        k(x.k),
        quantized(columns_a_scale),
        block(std::min(columns_a_scale, group)),
        groups(x.k / group),
        bytes_room(x.m * x.k * kPieces / 4 + 16),
        d_room(x.m * (x.k / block)),
        sums_room(x.m * groups),
        whole_room(x.m * (x.k / block)),
        bytes(reinterpret_cast<int8_t*>(bytes_room.data())),
        d(d_room.data()),
        sums(sums_room.data()),
        whole(reinterpret_cast<int32_t*>(whole_room.data())) {
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
          const int32_t sum = sum_of(reinterpret_cast<const int32_t*>(row + c), block);
          scales[c / block] = scale;
          whole[token * (k / block) + c / block] = sum;
          group_sums[c / group] += scale * static_cast<float>(sum);
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

// Tokens in tiles of one size, as the loops read them: what the tokens of a tile have in common lies side by side, so
// that one address serves them all. Tokens of zeros fill up the last tile.
template <class Tokens, bool kSpans>
struct IntegerTiles {
  static constexpr int kParts = Tokens::kWordBytes / 4;  // words of a token beside a word of the weight
  static constexpr int kMostTokens = Tokens::kPairs || Tokens::kPieces == 1 ? kInt4Tokens<1>
                                     : kInt16Pairs                          ? static_cast<int>(kTooFewForPairs)
                                                                            : kInt4Tokens<2>;

  int64_t m, tile, tiles, block, span;  // span: columns of one scale here: a block, or all that share it
  Room room;
  const int32_t* words;  // [tiles, k / Tokens::kColumns, kParts, tile]
  const float* d;        // [tiles, k / span, tile]
  const float* sums;     // [tiles, groups, tile]
  const int32_t* whole;  // [tiles, k / block, tile]

  IntegerTiles(const Tokens& x, int threads)
      : m(x.m),
        tile(size(x.m, kMostTokens)),
        tiles((x.m + tile - 1) / tile),
        block(x.block),
        span(kSpans ? x.quantized : x.block),
        room(tiles * tile * (word_count(x) + x.k / span + x.groups + x.k / x.block)) {
    auto* packed = reinterpret_cast<int32_t*>(room.data());
    float* packed_d = room.data() + tiles * tile * word_count(x);
    float* packed_sums = packed_d + tiles * tile * (x.k / span);
    auto* packed_whole = reinterpret_cast<int32_t*>(packed_sums + tiles * tile * x.groups);
    parallel_for(tiles, m * x.k >= 32768 ? threads : 1, [&](int64_t at) {
      const int64_t first = at * tile, spans = x.k / span, blocks = x.k / x.block;
      pack(x, first, packed + first * word_count(x));
      pack(x.d, 4 * blocks, 4 * (span / x.block), first, 0, spans, packed_d + first * spans);
      pack(x.sums, 4 * x.groups, 4, first, 0, x.groups, packed_sums + first * x.groups);
      pack(x.whole, 4 * blocks, 4, first, 0, blocks, packed_whole + first * blocks);
    });
    words = packed, d = packed_d, sums = packed_sums, whole = packed_whole;
  }

 private:
  // Of the sizes that there are loops for, the one of the least work: a tile costs its tokens and what decodes weights.
  static int64_t size(int64_t m, int64_t most) {
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t some = 1; some <= most; some += some < 4 ? 1 : 2) {
      const int64_t work = (m + some - 1) / some * (2 * some + 3);
      if (work <= least) best = some, least = work;
    }
    return best;
  }
  static int64_t word_count(const Tokens& x) { return x.k / Tokens::kColumns * kParts; }

  // Words of tokens first.. [tokens, count] -> [count, tile].
  void pack(const Tokens& x, int64_t first, int32_t* to) const {
    using namespace simd;
    static_assert(kMostTokens <= kLanes, "a vector holds a word of every token of a tile");
    const int64_t count = word_count(x), there = std::min(tile, m - first);
    const auto* from = reinterpret_cast<const float*>(x.bytes) + first * count;
    int64_t c = 0;
    for (; c + 2 * kLanes <= count; c += kLanes) {  // a vector is stored over the end of the last one, so not the last
      F32 rows[kLanes];
      for (int t = 0; t < kLanes; ++t) rows[t] = t < there ? load_f32(from + t * count + c) : zero_f32();
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store_f32(reinterpret_cast<float*>(to) + (c + i) * tile, rows[i]);
    }
    pack(x.bytes, 4 * count, 4, first, c, count, to);
  }
  // Values [tokens, stride] of 4 bytes, in columns begin..end `step` bytes apart -> [end, tile].
  template <class T>
  void pack(const void* from, int64_t stride, int64_t step, int64_t first, int64_t begin, int64_t end, T* to) const {
    const int64_t there = std::min(tile, m - first);
    const auto* at = static_cast<const char*>(from) + first * stride;
    for (int64_t c = begin; c < end; ++c)
      for (int64_t t = 0; t < tile; ++t) {
        to[c * tile + t] = T{};
        if (t < there) std::memcpy(to + c * tile + t, at + t * stride + c * step, sizeof(T));
      }
  }
};

// The sums of products of one block of columns, as int32: `count` words of kVectors vectors of rows, of which the first
// lies at from[vector], with the tokens of a tile at x. What it asks for lies `more` bytes farther than it does in a
// row of blocks.
template <class Weight, class Tokens, int kTokens, int kVectors, int kUnit>
inline __attribute__((always_inline)) void int4_block(const uint32_t* const (&from)[kVectors], int64_t more,
                                                      const int32_t* x, int64_t count,
                                                      simd::I32 (&found)[kTokens][kVectors]) {
  using namespace simd;
  constexpr int kParts = Tokens::kWordBytes / 4;
  if constexpr (Tokens::kPairs) {
    for (auto& row : found)
      for (auto& sum : row) sum = zero_i32();
    for (int64_t word = 0; word < count; ++word, x += kParts * kTokens) {
      for (int v = 0; v < kVectors; v += 64 / (4 * kLanes)) ask_ahead(from[v] + word * kBlockRows, more);
      auto step = [&](auto place) __attribute__((always_inline)) {
        constexpr int kAt = decltype(place)::value;
        I32 pair[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const uint32_t* at = from[v] + word * kBlockRows;
          // Read anew for every pair: to keep a word, too, takes more registers than there are.
          if constexpr (kTokens > 2) asm("" : "+r"(at));
          pair[v] = Weight::template pair<kAt>(load_i32(at));
        }
        for (int t = 0; t < kTokens; ++t) {
          const I32 two = set1_i32(x[kAt * kTokens + t]);
          for (int v = 0; v < kVectors; ++v) found[t][v] = dot2(found[t][v], pair[v], two);
        }
      };
      for_each_place<kParts>(step);
    }
  } else {
    // Few sums are two each, of even and of odd columns: an addition waits for the last one to the same sum. Units of
    // two words are so short that the processor adds to the sums of several at once.
    constexpr int kPieces = Tokens::kPieces, kChains = kTokens * kVectors * kPieces <= 8 && kUnit != 2 ? 2 : 1;
    bool first = true;
    for (int64_t word = 0; word < count; first = false) {
      Dot4 dots[kTokens][kVectors][kPieces][kChains];
      for (auto& row : dots)
        for (auto& pieces : row)
          for (auto& chains : pieces)
            for (auto& dot : chains) dot = zero_dot4();
      const int64_t unit = kUnit ? kUnit : std::min<int64_t>(count - word, Weight::kSteps / 2);
      auto step = [&](int64_t at) __attribute__((always_inline)) {
        for (int v = 0; v < kVectors; v += 64 / (4 * kLanes)) ask_ahead(from[v] + at * kBlockRows, more);
        Bytes codes[2][kVectors];
        for (int v = 0; v < kVectors; ++v) Weight::codes(load_i32(from[v] + at * kBlockRows), codes[0][v], codes[1][v]);
        for (int p = 0; p < kParts; ++p)  // even and odd columns, of the low bytes and of the high ones
          for (int t = 0; t < kTokens; ++t) {
            const Bytes q = as_bytes(set1_i32(x[(at * kParts + p) * kTokens + t]));
            for (int v = 0; v < kVectors; ++v) {
              Dot4& dot = dots[t][v][p / 2][p % kChains];
              dot = dot4(dot, codes[p % 2][v], q);
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
          I32 pieces[kPieces];
          for (int p = 0; p < kPieces; ++p) {
            pieces[p] = total(dots[t][v][p][0]);
            if constexpr (kChains == 2) pieces[p] = add(pieces[p], total(dots[t][v][p][1]));
          }
          I32 sum = pieces[0];
          if constexpr (kPieces == 2) sum = add(sum, shift_left<8>(pieces[1]));
          found[t][v] = first ? sum : add(found[t][v], sum);
        }
      if constexpr (kUnit) return;
    }
  }
}

// The factors of some blocks of rows, [blocks, groups, 16] each, made once for all tiles of tokens.
struct Int4Factors {
  const float *scales, *offsets;
  int64_t groups;

  int64_t at(int64_t block, int64_t g, int v) const { return (block * groups + g) * kBlockRows + v * simd::kLanes; }
};

// The product of a tile of kTokens tokens with groups [first, last) of some blocks of rows, added to sums
// [kTokens, kVectors, kLanes]; `from` is where the words of group `first` lie, block[vector] whose factors to take, of
// which the first is block first_block of the weight.
//
// What adds up over groups lies in memory: the integer sums of one group need all the registers.
template <class Weight, class Tokens, int kTokens, int kVectors, int kUnit>
inline __attribute__((always_inline)) void int4_groups(const Weight& w, const Int4Factors& factors,
                                                       const int64_t (&block)[kVectors], int64_t first_block,
                                                       const IntegerTiles<Tokens, Weight::kSpans>& x, int64_t tile,
                                                       int64_t first, int64_t last, const uint32_t* (&from)[kVectors],
                                                       float* sums) {
  using namespace simd;
  constexpr int kParts = Tokens::kWordBytes / 4;
  const int64_t columns = Weight::kSpans ? w.group : x.span, words = columns / Tokens::kColumns;
  const int32_t* q = x.words + (tile * w.k + first * w.group) / Tokens::kColumns * kParts * kTokens;
  const float* d = x.d + (tile * w.k + first * w.group) / x.span * kTokens;

  const int32_t* whole = x.whole + (tile * w.k + first * w.group) / x.block * kTokens;
  // Behind the end of a block lies the one that is read beside it; what comes next lies behind that.
  const int64_t beyond = (kInt4Blocks - 1) * w.stride * 4;                 // bytes
  int64_t left = (w.k - first * w.group) / Tokens::kColumns * kBlockRows;  // words of this block

  // to[t][v] += the products of the next columns, times what scale_of(t)(v) says.
  const auto multiply = [&](float* to, const auto& scale_of) __attribute__((always_inline)) {
    I32 found[kTokens][kVectors];
    int4_block<Weight, Tokens, kTokens, kVectors, kUnit>(from, left > kAheadBytes / 4 ? 0 : beyond, q, words, found);
    left -= words * kBlockRows;
    q += words * kParts * kTokens;
    for (auto& at : from) at += words * kBlockRows;
    for (int t = 0; t < kTokens; ++t) {
      // One token after the other: all at once take more registers than there are.
      if constexpr (kTokens > 2) asm volatile("" ::: "memory");
      const auto scale = scale_of(t);
      for (int v = 0; v < kVectors; ++v) {
        float* at = to + (t * kVectors + v) * kLanes;
        I32 sum = found[t][v];
        if constexpr (!Weight::kOffsets && !Tokens::kPairs) sum = sub(sum, set1_i32(Weight::kZero * whole[t]));
        store_f32(at, fma(to_f32(sum), scale(v), load_f32(at)));
      }
    }
    if constexpr (!Weight::kOffsets && !Tokens::kPairs) whole += kTokens;
  };
  const auto scales_of = [&](int64_t g, F32(&scale)[kVectors]) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) scale[v] = load_f32(factors.scales + factors.at(block[v], g, v % kBlockVectors));
  };

  if constexpr (Weight::kSpans) {
    F32 whole_scale[kVectors];
    for (int v = 0; v < kVectors; ++v) whole_scale[v] = w.span_scale(first_block + block[v], v % kBlockVectors);
    alignas(64) float span[kTokens * kVectors * kLanes];
    const int64_t groups_a_span = x.span / w.group;
    for (int64_t begin = first; begin < last; begin += groups_a_span, d += kTokens) {
      for (int i = 0; i < kTokens * kVectors; ++i) store_f32(span + i * kLanes, zero_f32());
      for (int64_t g = begin; g < begin + groups_a_span; ++g) {
        F32 scale[kVectors];
        scales_of(g, scale);
        multiply(span, [&](int) { return [&](int v) { return scale[v]; }; });
      }
      for (int t = 0; t < kTokens; ++t) {
        const F32 step = set1_f32(d[t]);
        for (int v = 0; v < kVectors; ++v) {
          const int at = (t * kVectors + v) * kLanes;
          store_f32(sums + at, fma(load_f32(span + at), mul(whole_scale[v], step), load_f32(sums + at)));
        }
      }
    }
  } else {
    for (int64_t g = first; g < last; ++g) {
      F32 scale[kVectors];
      scales_of(g, scale);
      for (int64_t b = 0; b < w.group / columns; ++b, d += kTokens)
        multiply(sums, [&](int t) {
          const F32 step = set1_f32(d[t]);
          return [&scale, step](int v) { return mul(scale[v], step); };
        });
    }
  }
}

// sums += the offsets of all groups times the sums of the activations there.
template <class Weight, class Tokens, int kTokens, int kVectors>
inline __attribute__((always_inline)) void int4_offsets(const Int4Factors& factors, const int64_t (&block)[kVectors],
                                                        const IntegerTiles<Tokens, Weight::kSpans>& x, int64_t tile,
                                                        float* sums) {
  using namespace simd;
  if constexpr (Weight::kOffsets) {
    const float* x_sums = x.sums + tile * factors.groups * kTokens;
    F32 acc[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) acc[t][v] = load_f32(sums + (t * kVectors + v) * kLanes);
    for (int64_t g = 0; g < factors.groups; ++g, x_sums += kTokens) {
      F32 offset[kVectors];
      for (int v = 0; v < kVectors; ++v)
        offset[v] = load_f32(factors.offsets + factors.at(block[v], g, v % kBlockVectors));
      for (int t = 0; t < kTokens; ++t) {
        const F32 sum = set1_f32(x_sums[t]);
        for (int v = 0; v < kVectors; ++v) acc[t][v] = fma(offset[v], sum, acc[t][v]);
      }
    }
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) store_f32(sums + (t * kVectors + v) * kLanes, acc[t][v]);
  }
}

constexpr int64_t kInt4PieceBytes = 24 * 1024;  // of a tile's integers: half of a first-level cache
constexpr int64_t kInt4ChunkTokens = 192;       // their integers fill the second-level cache beside the words
constexpr int64_t kInt4TaskBytes = 192 * 1024;  // words of a task, which every tile of tokens reads again

// A tile of tokens times the blocks [first, last) of rows, of which w.words and the factors begin with block `base`.
// Columns go in pieces, so that a tile's integers stay in the first cache while the blocks pass; `sums` is room for
// 16 floats a token and block, and block.
template <class Weight, class Tokens, int kTokens, int kUnit>
__attribute__((noinline)) void int4_store(const Weight& w, const Int4Factors& factors,
                                          const IntegerTiles<Tokens, Weight::kSpans>& x, int64_t tile, int64_t first,
                                          int64_t last, int64_t base, int64_t n, float* sums, const Output& out) {
  using namespace simd;
  constexpr int kVectors = kInt4Blocks * kBlockVectors;
  constexpr int64_t kSums = kTokens * kVectors * kLanes;
  const int64_t groups = factors.groups, blocks = (last - first + kInt4Blocks - 1) / kInt4Blocks;
  const int64_t together = Weight::kSpans ? x.span / w.group : 1;  // groups
  const int64_t piece =
      std::max<int64_t>(1, kInt4PieceBytes / (kTokens * Tokens::kPieces * w.group * together)) * together;
  int64_t of[kVectors];
  const auto open = [&](int64_t i) {
    for (int v = 0; v < kVectors; ++v)  // a block that is not there is the last one again, and not stored
      of[v] = std::min(first + i * kInt4Blocks + v / kBlockVectors, last - 1) - first;
  };
  std::fill_n(sums, blocks * kSums, 0.0f);
  for (int64_t begin = 0; begin < groups; begin += piece)
    for (int64_t i = 0; i < blocks; ++i) {
      open(i);
      const uint32_t* from[kVectors];
      for (int v = 0; v < kVectors; ++v)
        from[v] = w.words + (first - base + of[v]) * w.stride + begin * w.group / Tokens::kColumns * kBlockRows +
                  v % kBlockVectors * kLanes;
      int4_groups<Weight, Tokens, kTokens, kVectors, kUnit>(w, factors, of, first - base, x, tile, begin,
                                                            std::min(begin + piece, groups), from, sums + i * kSums);
    }
  const int64_t token = tile * kTokens, there = std::min<int64_t>(kTokens, x.m - token);
  for (int64_t i = 0; i < blocks; ++i) {
    open(i);
    float* found = sums + i * kSums;
    int4_offsets<Weight, Tokens, kTokens, kVectors>(factors, of, x, tile, found);
    for (int64_t t = 0; t < there; ++t)
      for (int b = 0; b < kInt4Blocks && first + i * kInt4Blocks + b < last; ++b) {
        F32 row[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v)
          row[v] = load_f32(found + (t * kVectors + b * kBlockVectors + v) * kLanes);
        store_block(row, first + i * kInt4Blocks + b, n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
      }
  }
}

// f(size), an integral_constant, for the size of tiles: 1 2 3 4 6 8 10 12, as far as kMost.
template <int kMost, class F>
inline void with_tile_size(int64_t size, const F& f) {
  if constexpr (kMost > 1) {
    constexpr int kLess = kMost > 4 ? (kMost - 1) / 2 * 2 : kMost - 1;
    if (size <= kLess) return with_tile_size<kLess>(size, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// `weight_of(first, last, worker)` gives a Weight that holds these blocks of rows: the whole one, or, not kWhole, one
// that begins with them.
template <class Weight, bool kWhole, int kUnit, class Tokens, class WeightOf>
void int4_gemm_by(const WeightOf& weight_of, const Tokens& tokens, int64_t n, const Output& out, int threads) {
  static_assert(kUnit <= Weight::kSteps / 2, "a word is two steps, and the sums of a unit hold no more than kSteps");
  constexpr int kMost = IntegerTiles<Tokens, Weight::kSpans>::kMostTokens;
  const int64_t k = tokens.k, groups = tokens.groups, m = tokens.m;
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows, block_bytes = k * kBlockRows * 4 / Tokens::kColumns;
  const IntegerTiles<Tokens, Weight::kSpans> x(tokens, threads);
  const int64_t chunk_tiles = std::max<int64_t>(1, kInt4ChunkTokens / x.tile);
  const int64_t chunks = (x.tiles + chunk_tiles - 1) / chunk_tiles;
  int64_t run = std::max<int64_t>(1, kInt4TaskBytes / block_bytes);
  run = std::max<int64_t>(1, std::min(run, blocks * chunks / (8 * std::max(threads, 1))));
  if (!kWhole && m <= kMost) run = kInt4Blocks;  // no tile reads its words again: what is made stays in the first cache
  if (run > kInt4Blocks) run -= run % kInt4Blocks;
  const int64_t runs = (blocks + run - 1) / run;
  parallel_for(runs * chunks, threads, [&](int64_t task, int worker) {
    const int64_t first = task % runs * run, last = std::min(first + run, blocks), base = kWhole ? 0 : first;
    const int64_t first_tile = x.tiles * (task / runs) / chunks, last_tile = x.tiles * (task / runs + 1) / chunks;
    const Weight w = weight_of(first, last, worker);
    const int64_t values = (last - first) * groups * kBlockRows;
    const int64_t sum_count = (last - first + kInt4Blocks) * kBlockRows * x.tile;
    const Room room((Weight::kOffsets ? 2 : 1) * values + sum_count);
    float* const sums = room.data() + (Weight::kOffsets ? 2 : 1) * values;
    for (int64_t block = first; block < last; ++block) {
      float* to = room.data() + (block - first) * groups * kBlockRows;
      w.read_factors(block - base, to, to + values);
    }
    const Int4Factors factors{room.data(), room.data() + values, groups};
    with_tile_size<kMost>(x.tile, [&](auto size) {
      for (int64_t tile = first_tile; tile < last_tile; ++tile)
        int4_store<Weight, Tokens, decltype(size)::value, kUnit>(w, factors, x, tile, first, last, base, n, sums, out);
    });
  });
}

template <class Weight, bool kWhole, class Tokens, class WeightOf>
void int4_gemm_of(const WeightOf& weight_of, const Tokens& x, int64_t n, const Output& out, int threads) {
  // Loops over the words of a block, unrolled for the usual sizes.
  if constexpr (!Tokens::kPairs && Weight::kSpans) {
    if (x.block == 16) return int4_gemm_by<Weight, kWhole, 2>(weight_of, x, n, out, threads);
  } else if constexpr (!Tokens::kPairs && Weight::kSteps >= 8) {
    if (x.block == 32) return int4_gemm_by<Weight, kWhole, 4>(weight_of, x, n, out, threads);
  }
  int4_gemm_by<Weight, kWhole, 0>(weight_of, x, n, out, threads);
}

template <class Weight, class Tokens>
void int4_gemm(const Weight& w, const Tokens& x, const Output& out, int threads) {
  int4_gemm_of<Weight, true>([&](int64_t, int64_t, int) { return w; }, x, w.n, out, threads);
}

}  // namespace lowbit
