// Products of activations of 4 bits with signed weights of 4 bits: int8 dot products, float32 scales.
//
// A weight's nibble is read as code + 8, which is its lowest three bits with the sign turned over, so that it fits the
// unsigned side of a dot product. Every sum therefore begins at -8 times the sum of the activations it is made with:
// what comes out is the sum of products of codes, exactly.
#pragma once

#include <algorithm>

#include "amx.h"
#include "float_gemm.h"

namespace lowbit {

constexpr int64_t kWordColumns = 8;  // of 4 bits in a word of 32

// Where a byte of two codes may be multiplied as it is, once its nibbles are code + 8. With columns c (the low nibble)
// and c + 1 of activations within -7..7:
//   byte * x[c + 1] + low nibble * (16 x[c] - x[c + 1]) = 16 * (sum of the two products)
// It saves a shift and a mask for every word. Where sums are int16, 16 times a sum of 64 columns just fits, half of
// them in each.
#if defined(LOWBIT_ISA_AVX2)
constexpr bool kTakesBytes = true, kStartsInPairs = true;
#elif defined(LOWBIT_ISA_AVX512)
constexpr bool kTakesBytes = true, kStartsInPairs = false;
#else
constexpr bool kTakesBytes = false, kStartsInPairs = false;
#endif

#if defined(LOWBIT_ISA_AVX512)
constexpr int kW4A4Blocks = 2;  // 24 sums in 32 registers
constexpr int kW4A4Tokens = 12;
constexpr bool kAsksAhead = true;  // elsewhere a word takes so long that it comes by itself
#else
constexpr bool kAsksAhead = false;
constexpr int kW4A4Blocks = 1;
constexpr int kW4A4Tokens = 4;  // 8 sums in 16 registers (16 in 32 where a block is 4 vectors)
#endif

// Activations as integers, in tiles of tokens that are multiplied together. For every tile and every group of columns
// that share a scale a record: [group / 4, tokens] words of codes, of each eight columns 0 2 4 6 and then 1 3 5 7;
// where the tokens' sums begin, int32; and their scales, float32. One address leads to all of it.
struct CodedTokens {
  static constexpr int64_t kTail = 8;  // bytes of a record behind the codes, for each token

  int64_t m, k, group, row_bytes;
  int64_t together;  // tokens of a tile, nearly as many in each: 8 + 8, not 12 + 4
  bool as_bytes;     // arranged for bytes of two codes; then activations are within -7..7
  Room room;
  int8_t* records;  // [m / together] tiles of tokens * row_bytes

  // `in_rows`: a token is a tile of its own.
  CodedTokens(int64_t m, int64_t k, int64_t group, bool as_bytes, bool in_rows)
      : m(m),
        k(k),
        group(group),
        row_bytes(k / group * (group + kTail)),
        together(in_rows ? 1 : evenly(m)),
        as_bytes(as_bytes),
        room(m * row_bytes / 4 + 16),  // as much as may be read behind the last record
        records(reinterpret_cast<int8_t*>(room.data())) {}

  const int8_t* row(int64_t token) const { return records + token * row_bytes; }  // of the first token of a tile
  int64_t tile_count() const { return (m + together - 1) / together; }

  // Takes over the codes of a group, which lie in order.
  void put(int64_t token, int64_t index, const int8_t* codes, float scale) {
    const int64_t first = token / together * together, tokens = std::min(together, m - first);
    int8_t* to = records + first * row_bytes + index * (group + kTail) * tokens + (token - first) * 4;
    const int64_t step = 4 * tokens;
    int32_t start;
    if (as_bytes) {
      start = put_for_bytes(to, step, codes);
      scale *= 0.0625f;
    } else {
      int32_t sum = 0;
      for (int64_t c = 0; c < group; ++c) sum += codes[c];
      for (int64_t c = 0; c < group; c += kWordColumns)
        put_eight(to + c / 4 * step, step, evens_first(eight_at(codes + c)));
      start = -8 * sum;
    }
    std::memcpy(to + group / 4 * step, &start, 4);
    std::memcpy(to + (group / 4 + 1) * step, &scale, 4);
  }

  // Of the record at `codes` of one token with a group of `columns`.
  static float scale(const int8_t* codes, int64_t columns) {
    float found;
    std::memcpy(&found, codes + columns + 4, 4);
    return found;
  }

 private:
  static int64_t evenly(int64_t m) {
    const int64_t least = std::max<int64_t>(1, (m + kW4A4Tokens - 1) / kW4A4Tokens);
    return std::max<int64_t>(1, (m + least - 1) / least);
  }

  static uint64_t eight_at(const int8_t* codes) {
    uint64_t eight;
    std::memcpy(&eight, codes, 8);
    return eight;
  }
  static void put_eight(int8_t* to, int64_t step, uint64_t eight) {
    const uint32_t low = static_cast<uint32_t>(eight), high = static_cast<uint32_t>(eight >> 32);
    std::memcpy(to, &low, 4);
    std::memcpy(to + step, &high, 4);
  }

  // Of each eight columns x1 x3 x5 x7, then 16 x0 - x1 and so on; returns where sums begin: one, or two int16.
  int32_t put_for_bytes(int8_t* to, int64_t step, const int8_t* codes) const {
    for (int64_t c = 0; c < group; c += kWordColumns) {
      const uint64_t eight = evens_first(eight_at(codes + c));
      const uint32_t even = static_cast<uint32_t>(eight) << 4 & 0xf0f0f0f0u, odd = static_cast<uint32_t>(eight >> 32);
      // Byte by byte: no borrow passes the highest bit, which is put right afterwards.
      const uint32_t less = ((even | 0x80808080u) - (odd & 0x7f7f7f7fu)) ^ ((even ^ ~odd) & 0x80808080u);
      put_eight(to + c / 4 * step, step, odd | static_cast<uint64_t>(less) << 32);
    }
    int32_t sums[2] = {0, 0};  // of columns 0 to 3 and 4 to 7 of each eight
    for (int64_t c = 0; c < group; c += kWordColumns)
      for (int j = 0; j < 4; ++j) {
        sums[0] += codes[c + j];
        sums[1] += codes[c + 4 + j];
      }
    if (!kStartsInPairs) return -8 * 16 * (sums[0] + sums[1]);
    const int16_t starts[2] = {static_cast<int16_t>(-8 * 16 * sums[0]), static_cast<int16_t>(-8 * 16 * sums[1])};
    int32_t both;
    std::memcpy(&both, starts, 4);
    return both;
  }

  // Bytes 0 1 2 .. 7 -> 0 2 4 6 1 3 5 7.
  static uint64_t evens_first(uint64_t eight) {
    const auto evens = [](uint64_t bytes) {
      bytes &= 0x00ff00ff00ff00ff;
      bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffff;
      return (bytes | bytes >> 16) & 0x00000000ffffffff;
    };
    return evens(eight) | evens(eight >> 8) << 32;
  }
};

// 16 rows of a weight, as a tile reads them.
struct Int4Block {
  const uint32_t* words;  // [k / 8, 16]
  const void* scales;     // [groups, 16]
  const void* up;         // [rank, 16], the low-rank branch's
};

// dots += the products of kWords words of every vector of rows with the codes of every token: [2 kWords, kTokens]
// words. kBytes: the codes are arranged for bytes of two weights.
template <int kWords, bool kBytes = false, int kTokens, int kVectors>
inline __attribute__((always_inline)) void add_products(simd::Dot4 (&dots)[kTokens][kVectors],
                                                        const uint32_t* const (&words)[kVectors], const uint32_t* codes,
                                                        Ahead& ahead) {
  using namespace simd;
  // Few tokens wait for memory, many for the second-level cache, which is asked too late without it as well.
  constexpr bool kFew = kTokens <= 4;
#pragma GCC unroll 8
  for (int word = 0; word < kWords; ++word) {
    I32 read[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* at = words[v] + word * kBlockRows;
      if constexpr (kAsksAhead)
        if (v % kBlockVectors == 0) kFew ? ask_ahead(at) : __builtin_prefetch(at + kNearBytes / 4);
      read[v] = bit_xor(load_i32(at), set1_i32(static_cast<int32_t>(0x88888888)));
    }
    if constexpr (kAsksAhead && !kFew) ahead.ask();
    for (int half = 0; half < 2; ++half) {
      Bytes w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const Bytes both = as_bytes(read[v]);
        if constexpr (kBytes) {
          w[v] = half ? low_nibbles(both) : both;
        } else {
          w[v] = half ? high_nibbles(both) : low_nibbles(both);
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        const Bytes x = set4_bytes(codes + (2 * word + half) * kTokens + t);
        for (int v = 0; v < kVectors; ++v) dots[t][v] = dot4(dots[t][v], w[v], x);
      }
    }
  }
}

#if defined(LOWBIT_TILES)
// Blocks as they were found -> room for [count, k / 4, 16] words of signed bytes, as tiles of a weight have them: of
// each eight columns 0 2 4 6 and then 1 3 5 7.
class SignedBytes {
 public:
  SignedBytes(const Int4Block* blocks, int64_t count, int64_t k) : stride_(k / 4 * kBlockRows), room_(count * stride_) {
    using namespace simd;
    alignas(16) static constexpr int8_t kSigned[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    for (int64_t b = 0; b < count; ++b)
      for (int64_t word = 0; word < k / kWordColumns; ++word)
        for (int v = 0; v < kBlockVectors; ++v) {
          const Bytes both = load_bytes(blocks[b].words + word * kBlockRows + v * kLanes);
          float* to = room_.data() + b * stride_ + 2 * word * kBlockRows + v * kLanes;
          store_bytes(to, lookup_bytes(kSigned, low_nibbles(both)));
          store_bytes(to + kBlockRows, lookup_bytes(kSigned, high_nibbles(both)));
        }
  }
  const uint32_t* of(int64_t index) const { return reinterpret_cast<const uint32_t*>(room_.data()) + index * stride_; }

 private:
  int64_t stride_;
  Room room_;
};
#endif

// Where the sums of a token's group begin.
template <bool kBytes>
inline simd::Dot4 start_products(int32_t start) {
#if defined(LOWBIT_ISA_AVX2)
  if (kBytes) return simd::start_dot4_pairs(simd::set1_i32(start));
#endif
  return simd::start_dot4(simd::set1_i32(start));
}

// Runs tile(first token, number of tokens, first block, number of blocks) over all of a product: runs of blocks that
// stay in the second-level cache while some hundred tokens pass. blocks_of(first block, count, f) calls f with the
// count blocks' Int4Block.
template <class BlocksOf, class Tile>
void for_each_w4a4_tile(const CodedTokens& x, int64_t n, int threads, const BlocksOf& blocks_of, const Tile& tile) {
  constexpr int64_t kChunkTokens = 192, kTaskBytes = 192 * 1024;
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows, block_bytes = x.k * kBlockRows / 2;
  const int64_t tiles = x.tile_count(), chunk_tiles = std::max<int64_t>(1, kChunkTokens / x.together);
  const int64_t chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
  int64_t run = std::max<int64_t>(1, kTaskBytes / block_bytes);
  run = std::max<int64_t>(1, std::min(run, blocks * chunks / (8 * std::max(threads, 1))));
  if (run > kW4A4Blocks) run -= run % kW4A4Blocks;
  const int64_t runs = (blocks + run - 1) / run;
  parallel_for(runs * chunks, threads, [&](int64_t task) {
    const int64_t first_block = task % runs * run, last_block = std::min(first_block + run, blocks);
    const int64_t chunk = task / runs;
    blocks_of(first_block, last_block - first_block, [&](const Int4Block* found) {
      const int64_t first_tile = tiles * chunk / chunks, last_tile = tiles * (chunk + 1) / chunks;
      for (int64_t block = first_block; block < last_block; block += kW4A4Blocks) {
        const int together = static_cast<int>(std::min<int64_t>(kW4A4Blocks, last_block - block));
        const Int4Block* at = found + (block - first_block);
        // While the tiles pass, the words of the next blocks come; behind the last, of what the next task may take.
        const uint32_t* next =
            block + together < last_block ? at[together].words : at[together - 1].words + x.k / 8 * kBlockRows;
        for (int64_t t = first_tile; t < last_tile; ++t) {
          const int64_t token = t * x.together;
          const Ahead ahead = Ahead::share(next, together, x.k / kWordColumns, t - first_tile, last_tile - first_tile);
          tile(token, static_cast<int>(std::min(x.together, x.m - token)), block, together, at, ahead);
        }
      }
    });
  });
}

// f(std::integral_constant<int, count>{}) for a count in 1..kMost that is known at run time.
template <int kMost, class F>
inline void with_count(int count, const F& f) {
  if constexpr (kMost > 0) {
    if (count == kMost) return f(std::integral_constant<int, kMost>{});
    with_count<kMost - 1>(count, f);
  }
}

}  // namespace lowbit
