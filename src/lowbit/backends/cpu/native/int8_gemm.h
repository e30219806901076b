// Products of int8 activations with int8 weights: the integers are exact, their scales float32.
//
// Activations are quantized once a call, by row or by blocks of columns of a row, as `numerics.int8_matmul` does; then
//
//   out = sum over blocks of float(sum of code * q) * (scale of x * scale of w)
//
// in this order and without fused roundings, so that the result is the reference's, bit for bit.
//
// Three ways. Where four products to a lane are one instruction, or for few tokens, bytes are multiplied as they lie
// and the sums of a tile stay in registers over all columns. Elsewhere, for many tokens, a panel of weights is widened
// to int16 and multiplied in pairs: as many products a cycle as bytes have there, from fewer instructions. A set that
// has tiles (amx.h) multiplies many tokens by them, bytes as they lie as well.
//
// A Weight (in blocks of 16 rows) offers
//
//   int64_t n, k, tile;                  tile: columns that share a scale
//   int64_t room(int64_t blocks) const;  how many floats of room `open` needs
//   Int8Blocks open(int64_t first, int64_t last, uint32_t* room) const;
//       the words of blocks [first, last) where they lie, or copied to `room` in that order
//   F32 scale(int64_t block, int64_t tile, int vector) const;
#pragma once

#include <algorithm>
#include <cmath>

#include "amx.h"
#include "float_gemm.h"
#include "rotation.h"

namespace lowbit {

// Blocks of 16 rows: k / 4 words of each of them, interleaved.
struct Int8Blocks {
  const uint32_t* words;
  int64_t stride, first;

  const uint32_t* of(int64_t block) const { return words + (block - first) * stride; }
};

constexpr float kSmallestInt8Scale = 1e-30f;

// One block of float32 activations -> codes in [-largest, largest], rounded half to even, their scale and their sum.
// A NaN or an infinity makes the scale one, too.
inline void quantize_int8(const float* x, int64_t count, float largest, int8_t* codes, float& scale, int32_t& sum) {
  using namespace simd;
  // Magnitudes are ordered as their bits are, and NaN is above all of them.
  const int64_t whole = count / kLanes * kLanes;
  I32 most_bits = zero_i32();
  for (int64_t c = 0; c < whole; c += kLanes) most_bits = max(most_bits, as_i32(abs(load_f32(x + c))));
  if (whole < count)
    most_bits = max(most_bits, as_i32(abs(load_first(x, whole, static_cast<int>(count - whole), kFloat32))));
  alignas(64) float magnitudes[kLanes];
  store_f32(magnitudes, as_f32(most_bits));
  float most = 0.0f;
  for (const float magnitude : magnitudes)
    if (!(magnitude <= most)) most = magnitude != magnitude || most != most ? NAN : magnitude;
  scale = most / largest;
  if (scale < kSmallestInt8Scale) scale = kSmallestInt8Scale;

  const F32 divisor = set1_f32(scale);
  const I32 high = set1_i32(static_cast<int>(largest)), low = set1_i32(-static_cast<int>(largest));
  I32 sums = zero_i32();
  for (int64_t c = 0; c < whole; c += kLanes) {
    const I32 q = max(min(to_i32(div(load_f32(x + c), divisor)), high), low);
    sums = add(sums, q);
    store_low_bytes(reinterpret_cast<uint8_t*>(codes) + c, q);
  }
  sum = reduce_add(sums);
  if (whole < count) {
    const int rest = static_cast<int>(count - whole);
    alignas(64) uint8_t room[kLanes];
    const I32 q = max(min(to_i32(div(load_first(x, whole, rest, kFloat32), divisor)), high), low);
    store_low_bytes(room, q);
    for (int j = 0; j < rest; ++j) sum += codes[whole + j] = static_cast<int8_t>(room[j]);
  }
}

#if defined(LOWBIT_ISA_AVX512)
constexpr int kInt8Tokens = 12, kInt8Blocks = 2;  // 24 sums and 2 weights in 32 registers
#elif defined(LOWBIT_ISA_NEON)
constexpr int kInt8Tokens = 5, kInt8Blocks = 1;  // 20 sums, 4 weights and 5 tokens in 32 registers
#else
constexpr int kInt8Tokens = 4, kInt8Blocks = 1;  // 8 sums, 2 weights of two parts and a token in 16 registers
#endif

// How tokens lie: one after the other, or in tiles of those that are multiplied together (int8_dots).
enum class Int8Order { kRows, kTiles };

// Activations as int8.
struct Int8Tokens {
  int64_t m, k, tile, tiles;
  int64_t together;  // tokens of a tile, nearly as many in each: 8 + 8, not 12 + 4
  Room codes_room, scales_room, sums_room;
  int8_t* codes;  // [m, k]; or of each tile [k / 4, tokens] words
  float* scales;  // [m, tiles]
  int32_t* sums;  // [m, tiles]: of the codes

  Int8Tokens(const Activations& x, int64_t columns_a_scale, int64_t rotation, int threads,
             Int8Order order = Int8Order::kRows)
      : m(x.m),
        k(x.k),
        tile(columns_a_scale),
        tiles((x.k + columns_a_scale - 1) / columns_a_scale),
        together(order == Int8Order::kRows ? 1 : evenly(x.m)),
        codes_room(x.m * x.k / 4 + simd::kLanes),
        scales_room(x.m * tiles),
        sums_room(x.m * tiles),
        codes(reinterpret_cast<int8_t*>(codes_room.data())),
        scales(scales_room.data()),
        sums(reinterpret_cast<int32_t*>(sums_room.data())) {
    const int most = m * k >= 32768 ? threads : 1;
    if (together > 1) {
      fill_tiles(x, rotation, most);
    } else {
      parallel_for(m, most, [&](int64_t t) { quantize(x, t, rotation, codes + t * k); });
    }
  }

  int64_t tile_count() const { return (m + together - 1) / together; }
  const uint32_t* of_tile(int64_t index) const {
    return reinterpret_cast<const uint32_t*>(codes + index * together * k);
  }

 private:
  static int64_t evenly(int64_t m) {
    const int64_t least = std::max<int64_t>(1, (m + kInt8Tokens - 1) / kInt8Tokens);
    return std::max<int64_t>(1, (m + least - 1) / least);
  }

  void fill_tiles(const Activations& x, int64_t rotation, int threads) const {
    const int64_t words = k / 4;
    const auto tokens = [&](int64_t index) { return std::min(together, m - index * together); };
    if (tile_count() >= 2 * threads)
      return parallel_for(tile_count(), threads, [&](int64_t index) {
        const Room rows(together * words);
        auto* to = reinterpret_cast<int8_t*>(rows.data());
        for (int64_t t = 0; t < tokens(index); ++t) quantize(x, index * together + t, rotation, to + t * k);
        arrange(reinterpret_cast<const uint32_t*>(to), tokens(index), 0, words, index);
      });
    const Room rows(m * words);
    auto* to = reinterpret_cast<int8_t*>(rows.data());
    parallel_for(m, threads, [&](int64_t t) { quantize(x, t, rotation, to + t * k); });
    constexpr int64_t kPiece = 256;  // words of a task
    const int64_t pieces = (words + kPiece - 1) / kPiece;
    parallel_for(tile_count() * pieces, threads, [&](int64_t task) {
      const int64_t index = task / pieces, first = task % pieces * kPiece;
      arrange(reinterpret_cast<const uint32_t*>(to) + index * together * words, tokens(index), first,
              std::min(first + kPiece, words), index);
    });
  }

  void quantize(const Activations& x, int64_t token, int64_t rotation, int8_t* to) const {
    const Room room(k);
    float* row = room.data();
    row_to_f32(x, token, row);
    if (rotation) rotate_groups(row, k, rotation);
    for (int64_t b = 0; b < tiles; ++b) {
      const int64_t first = b * tile, at = token * tiles + b;
      quantize_int8(row + first, std::min(tile, k - first), 127.0f, to + first, scales[at], sums[at]);
    }
  }

  // Words [first, last) of a tile's rows of words, the same word of all tokens beside each other: one address leads to
  // all of them, where rows would take more addresses than there are registers.
  void arrange(const uint32_t* rows, int64_t tokens, int64_t first, int64_t last, int64_t index) const {
    using namespace simd;
    uint32_t* to = reinterpret_cast<uint32_t*>(codes + index * together * k);
    int64_t word = first;
    if (tokens <= kLanes)
      for (; (word + kLanes - 1) * tokens + kLanes <= last * tokens; word += kLanes) {
        F32 square[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          const int64_t row = std::min<int64_t>(t, tokens - 1);  // not all are tokens
          square[t] = as_f32(load_i32(rows + row * (k / 4) + word));
        }
        transpose(square);
        // What a vector has beyond the tokens is written over by the next ones, and behind the last one below.
        for (int64_t w = 0; w < kLanes; ++w) store_i32(to + (word + w) * tokens, as_i32(square[w]));
      }
    for (; word < last; ++word)
      for (int64_t t = 0; t < tokens; ++t) to[word * tokens + t] = rows[t * (k / 4) + word];
  }
};

// sums[token][row] = start of the token + the products of `words` words. A function of its own, or what its callers
// hold would leave too few registers.
template <int kTokens, int kBlocks>
__attribute__((noinline)) void int8_dots(const uint32_t* const (&from)[kBlocks], const uint32_t* codes, int64_t words,
                                         const int32_t (&starts)[kTokens], Ahead& ahead, int32_t* sums) {
  using namespace simd;
  constexpr int kVectors = kBlocks * kBlockVectors;
  // Few tokens wait for memory, many for the second-level cache, which is asked too late without it as well. Asking
  // twice (ask_ahead) is slower here: an int8 weight keeps memory busy with one request a line.
  constexpr bool kFew = kTokens <= 4;
  constexpr int64_t kNear = (kFew ? 2048 : kNearBytes) / 4;
  I32 dots[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) dots[t][v] = set1_i32(starts[t]);
  const uint32_t* at[kBlocks];
  Ahead next = ahead;
  for (int b = 0; b < kBlocks; ++b) at[b] = from[b];
  for (const uint32_t* const end = codes + words * kTokens; codes != end; codes += kTokens) {
    Weights8 weights[kVectors];
    for (int v = 0; v < kVectors; ++v)
      weights[v] = prepare8(load_bytes(at[v / kBlockVectors] + v % kBlockVectors * kLanes));
    for (int b = 0; b < kBlocks; ++b) {
      __builtin_prefetch(at[b] + kNear);
      at[b] += kBlockRows;
    }
    if constexpr (!kFew) {
      __builtin_prefetch(codes + kNear);
      next.ask();
    }
    for (int t = 0; t < kTokens; ++t) {
      const Bytes q = set4_bytes(codes + t);
      for (int v = 0; v < kVectors; ++v) dots[t][v] = dot8(dots[t][v], weights[v], q);
    }
  }
  ahead = next;
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) store_i32(sums + (t * kVectors + v) * kLanes, dots[t][v]);
}

// The whole product of kTokens tokens with kBlocks blocks of rows.
template <class Weight, int kTokens, int kBlocks>
inline void int8_tile(const Weight& w, const Int8Blocks& words, const Int8Tokens& x, const uint32_t* codes,
                      int64_t block, int64_t token, Ahead ahead, simd::F32 (&sums)[kTokens][kBlocks * kBlockVectors]) {
  using namespace simd;
  constexpr int kVectors = kBlocks * kBlockVectors;
  alignas(64) int32_t dots[kTokens * kBlocks * kBlockRows];
  for (int64_t tile = 0; tile < x.tiles; ++tile) {
    const int64_t first = tile * x.tile / 4, end = std::min((tile + 1) * x.tile, x.k) / 4;
    const uint32_t* from[kBlocks];
    for (int b = 0; b < kBlocks; ++b) from[b] = words.of(block + b) + first * kBlockRows;
    int32_t starts[kTokens];
    for (int t = 0; t < kTokens; ++t) starts[t] = -kDot8Offset * x.sums[(token + t) * x.tiles + tile];
    int8_dots<kTokens, kBlocks>(from, codes + first * kTokens, end - first, starts, ahead, dots);
    for (int v = 0; v < kVectors; ++v) {
      const F32 scale = w.scale(block + v / kBlockVectors, tile, v % kBlockVectors);
      for (int t = 0; t < kTokens; ++t) {
        const I32 dot = load_i32(dots + (t * kVectors + v) * kLanes);
        const F32 product = mul(to_f32(dot), mul(set1_f32(x.scales[(token + t) * x.tiles + tile]), scale));
        sums[t][v] = tile ? add(sums[t][v], product) : product;
      }
    }
  }
}

template <class Weight, int kTokens, int kBlocks>
__attribute__((noinline)) void int8_store(const Weight& w, const Int8Blocks& words, const Int8Tokens& x,
                                          const uint32_t* codes, int64_t block, int64_t token, const Ahead& ahead,
                                          const Output& out) {
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) expect_block(block + b, w.n, out.data, token + t, out.dtype);
  simd::F32 sums[kTokens][kBlocks * kBlockVectors];
  int8_tile<Weight, kTokens, kBlocks>(w, words, x, codes, block, token, ahead, sums);
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) {
      simd::F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) row[v] = sums[t][b * kBlockVectors + v];
      store_block(row, block + b, w.n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
    }
}

template <class Weight, int kBlocks, int kMost>
inline void int8_store_of(int tokens, const Weight& w, const Int8Blocks& words, const Int8Tokens& x,
                          const uint32_t* codes, int64_t block, int64_t token, const Ahead& ahead, const Output& out) {
  if constexpr (kMost > 0) {
    if (tokens == kMost) return int8_store<Weight, kMost, kBlocks>(w, words, x, codes, block, token, ahead, out);
    int8_store_of<Weight, kBlocks, kMost - 1>(tokens, w, words, x, codes, block, token, ahead, out);
  }
}

constexpr int64_t kInt8TaskBytes = 192 * 1024;  // words of a task, which every tile of tokens reads again

// Tokens that pass while the words of a task stay in the second-level cache, themselves beside them.
inline int64_t int8_chunk_tokens([[maybe_unused]] int64_t k) {
  constexpr int64_t kLeast = 96;
#if defined(LOWBIT_ISA_AVX512)
  return std::max<int64_t>(kLeast, 640 * 1024 / k);  // these processors have 1 MiB or more
#else
  return kLeast;
#endif
}

template <class Weight>
void int8_gemm_bytes(const Weight& w, const Int8Tokens& x, const Output& out, int threads) {
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows, tiles = x.tile_count();
  const int64_t chunk_tiles = std::max<int64_t>(1, int8_chunk_tokens(x.k) / x.together);
  const int64_t chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
  int64_t run = std::max<int64_t>(1, kInt8TaskBytes / (w.k * kBlockRows));
  run = std::max<int64_t>(1, std::min(run, blocks * chunks / (8 * std::max(threads, 1))));
  if (run > kInt8Blocks) run -= run % kInt8Blocks;
  const int64_t runs = (blocks + run - 1) / run;
  parallel_for(runs * chunks, threads, [&](int64_t task) {
    const int64_t first_block = task % runs * run, last_block = std::min(first_block + run, blocks);
    const int64_t chunk = task / runs, first_tile = tiles * chunk / chunks, last_tile = tiles * (chunk + 1) / chunks;
    const Room room(w.room(last_block - first_block));
    const Int8Blocks words = w.open(first_block, last_block, reinterpret_cast<uint32_t*>(room.data()));
    for (int64_t block = first_block; block < last_block;) {
      const int64_t together = block + kInt8Blocks <= last_block ? kInt8Blocks : 1;
      // While the tiles pass, the words of the next blocks come; behind the last ones, of what the next task may take.
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t token = tile * x.together;
        const int tokens = static_cast<int>(std::min(x.together, x.m - token));
        const Ahead ahead =
            Ahead::share(words.of(block + together), together, x.k / 4, tile - first_tile, last_tile - first_tile);
        if (together == kInt8Blocks) {
          int8_store_of<Weight, kInt8Blocks, kInt8Tokens>(tokens, w, words, x, x.of_tile(tile), block, token, ahead,
                                                          out);
        } else if constexpr (kInt8Blocks > 1) {
          int8_store_of<Weight, 1, kInt8Tokens>(tokens, w, words, x, x.of_tile(tile), block, token, ahead, out);
        }
      }
      block += together;
    }
  });
}

// ---- pairs of int16 ------------------------------------------------------------------------------------------------

constexpr int kPairTokens = 6;             // 12 sums, 2 weights and a token in 16 registers
constexpr int64_t kPairColumns = 512;      // a panel of 16 KiB of int16: half of a first-level cache
constexpr int64_t kPairChunkTokens = 192;  // 192 KiB of activations beside a panel in the second-level cache
constexpr int64_t kPairTaskBlocks = 4;

// sums[t][row] += the products of `words` words: panel is [words, 2, 16 rows] pairs, x is [words, 2, kTokens] pairs.
template <int kTokens>
inline void multiply_pairs(const int32_t* panel, const int32_t* x, int64_t words, int32_t* sums) {
  using namespace simd;
  I32 acc[kTokens][kBlockVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kBlockVectors; ++v) acc[t][v] = load_i32(sums + t * kBlockRows + v * kLanes);
  for (int64_t pair = 0; pair < 2 * words; ++pair) {
    I32 w[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) w[v] = load_i32(panel + pair * kBlockRows + v * kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const I32 q = set1_i32(x[pair * kTokens + t]);
      for (int v = 0; v < kBlockVectors; ++v) acc[t][v] = dot2(acc[t][v], w[v], q);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kBlockVectors; ++v) store_i32(sums + t * kBlockRows + v * kLanes, acc[t][v]);
}

template <int kMost>
inline void multiply_pairs_of(int tokens, const int32_t* panel, const int32_t* x, int64_t words, int32_t* sums) {
  if constexpr (kMost > 0) {
    if (tokens == kMost) return multiply_pairs<kMost>(panel, x, words, sums);
    multiply_pairs_of<kMost - 1>(tokens, panel, x, words, sums);
  }
}

inline int32_t pair_of(int8_t low, int8_t high) {
  return static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(low)) | static_cast<uint32_t>(high) << 16);
}

template <class Weight>
void int8_gemm_pairs(const Weight& w, const Int8Tokens& x, const Output& out, int threads) {
  using namespace simd;
  // Groups of equal size: 8 tokens are 4 + 4, not 6 + 2. The last one is filled with zeros.
  const int64_t least = (x.m + kPairTokens - 1) / kPairTokens;
  const int group = static_cast<int>((x.m + least - 1) / least);
  const int64_t groups = (x.m + group - 1) / group, words = w.k / 4;
  Room pairs_room(groups * words * 2 * group);
  auto* pairs = reinterpret_cast<int32_t*>(pairs_room.data());  // [groups, words, 2, group]
  parallel_for(groups, threads, [&](int64_t index) {
    int32_t* to = pairs + index * words * 2 * group;
    for (int t = 0; t < group; ++t) {
      const int64_t m = index * group + t;
      const int8_t* q = x.codes + m * x.k;
      for (int64_t word = 0; word < words; ++word) {
        to[(2 * word) * group + t] = m < x.m ? pair_of(q[4 * word], q[4 * word + 2]) : 0;
        to[(2 * word + 1) * group + t] = m < x.m ? pair_of(q[4 * word + 1], q[4 * word + 3]) : 0;
      }
    }
  });

  const int64_t chunk_groups = std::max<int64_t>(1, kPairChunkTokens / group);
  const int64_t chunks = (groups + chunk_groups - 1) / chunk_groups;
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows;
  const int64_t run = blocks * chunks >= 4 * kPairTaskBlocks * threads ? kPairTaskBlocks : 1;
  const int64_t runs = (blocks + run - 1) / run;
  parallel_for(runs * chunks, threads, [&](int64_t task) {
    const int64_t first_block = task % runs * run, last_block = std::min(first_block + run, blocks);
    const int64_t first_group = task / runs * chunk_groups, last_group = std::min(first_group + chunk_groups, groups);
    const int64_t tokens = (last_group - first_group) * group, size = (last_block - first_block) * tokens * kBlockRows;
    const Room words_room(w.room(last_block - first_block));
    const Int8Blocks opened = w.open(first_block, last_block, reinterpret_cast<uint32_t*>(words_room.data()));
    Room panel_room(kPairColumns / 2 * kBlockRows), dots_room(size), sums_room(x.tiles > 1 ? size : 0);
    auto *panel = reinterpret_cast<int32_t*>(panel_room.data()), *dots = reinterpret_cast<int32_t*>(dots_room.data());
    float* sums = sums_room.data();
    if (x.tiles > 1) std::fill_n(sums, size, 0.0f);

    // The scaled sums of a tile of columns of one token and block.
    auto scaled = [&](int64_t block, int64_t token, int64_t tile, F32(&row)[kBlockVectors]) {
      const int64_t at = ((block - first_block) * tokens + token) * kBlockRows, m = first_group * group + token;
      for (int v = 0; v < kBlockVectors; ++v)
        row[v] = mul(to_f32(load_i32(dots + at + v * kLanes)),
                     mul(set1_f32(x.scales[m * x.tiles + tile]), w.scale(block, tile, v)));
      return at;
    };
    const int64_t there = std::min(tokens, x.m - first_group * group);
    for (int64_t tile = 0; tile < x.tiles; ++tile) {
      std::fill_n(dots, size, 0);
      const int64_t end = std::min((tile + 1) * x.tile, w.k);
      for (int64_t first = tile * x.tile; first < end; first += kPairColumns) {
        const int64_t last = std::min(first + kPairColumns, end);
        for (int64_t block = first_block; block < last_block; ++block) {
          const uint32_t* from = opened.of(block) + first / 4 * kBlockRows;
          for (int64_t word = 0; word < (last - first) / 4; ++word)
            for (int v = 0; v < kBlockVectors; ++v) {
              const Bytes codes = load_bytes(from + word * kBlockRows + v * kLanes);
              store_i32(panel + (2 * word) * kBlockRows + v * kLanes, even_bytes(codes));
              store_i32(panel + (2 * word + 1) * kBlockRows + v * kLanes, odd_bytes(codes));
            }
          for (int64_t g = first_group; g < last_group; ++g)
            multiply_pairs_of<kPairTokens>(
                group, panel, pairs + (g * words + first / 4) * 2 * group, (last - first) / 4,
                dots + ((block - first_block) * tokens + (g - first_group) * group) * kBlockRows);
        }
      }
      if (x.tiles > 1)
        for (int64_t block = first_block; block < last_block; ++block)
          for (int64_t t = 0; t < there; ++t) {
            F32 row[kBlockVectors];
            const int64_t at = scaled(block, t, tile, row);
            for (int v = 0; v < kBlockVectors; ++v)
              store_f32(sums + at + v * kLanes, add(load_f32(sums + at + v * kLanes), row[v]));
          }
    }
    for (int64_t block = first_block; block < last_block; ++block)
      for (int64_t t = 0; t < there; ++t) {
        F32 row[kBlockVectors];
        if (x.tiles > 1) {
          const int64_t at = ((block - first_block) * tokens + t) * kBlockRows;
          for (int v = 0; v < kBlockVectors; ++v) row[v] = load_f32(sums + at + v * kLanes);
        } else {
          scaled(block, t, 0, row);
        }
        store_block(row, block, w.n, out.bias, out.bias_dtype, out.data, first_group * group + t, out.dtype);
      }
  });
}

#if defined(LOWBIT_TILES)
// ---- tiles ---------------------------------------------------------------------------------------------------------

template <class Weight>
void int8_gemm_tiles(const Weight& w, const Int8Tokens& x, const Output& out, int threads) {
  using namespace simd;
  amx::for_each_task(x.m, w.n, w.k, threads, [&](const amx::Task& task) {
    const Room room(w.room(task.blocks()));
    const Int8Blocks words = w.open(task.first_block, task.last_block, reinterpret_cast<uint32_t*>(room.data()));
    const amx::Tiles tiles(std::min(x.tile, x.k) / 4);
    task.each<2>([&](const auto& tokens, int64_t block, auto blocks) {
      constexpr int kX = std::extent_v<std::remove_reference_t<decltype(tokens)>>, kW = decltype(blocks)::value;
      amx::Sums<kX, kW> sums;
      for (int64_t tile = 0; tile < x.tiles; ++tile) {
        const int64_t first = tile * x.tile, columns = std::min(x.tile, x.k - first);
        const int8_t* codes[kX];
        const uint32_t* from[kW];
        F32 scales[kW][kBlockVectors];
        for (int i = 0; i < kX; ++i) codes[i] = x.codes + tokens[i] * x.k + first;
        for (int j = 0; j < kW; ++j) {
          from[j] = words.of(block + j) + first / 4 * kBlockRows;
          for (int v = 0; v < kBlockVectors; ++v) scales[j][v] = w.scale(block + j, tile, v);
        }
        tiles.multiply(codes, x.k, from, columns / 4, sums.found);
        sums.each([&](int i, int j, int t, int v) {
          const F32 scale = mul(set1_f32(x.scales[(tokens[i] + t) * x.tiles + tile]), scales[j][v]);
          const F32 product = mul(to_f32(load_i32(sums.found[i][j][t] + v * kLanes)), scale);
          float* total = sums.total[i][j][t] + v * kLanes;
          store_f32(total, tile ? add(load_f32(total), product) : product);
        });
      }
      sums.store(tokens, block, w.n, out);
    });
  });
}
#endif

// The product of x, quantized with a scale for every `tile` columns of w. `few`: up to how many tokens bytes are
// faster, where four products are no instruction: measured.
template <class Weight>
void int8_gemm(const Weight& w, const Activations& x, int64_t rotation, const Output& out, int64_t few, int threads) {
  const bool bytes = simd::kDot8IsOneStep || x.m <= few;
#if defined(LOWBIT_TILES)
  if (amx::takes(x.m, std::min(w.tile, x.k)))
    return int8_gemm_tiles(w, Int8Tokens(x, w.tile, rotation, threads), out, threads);
#endif
  const Int8Tokens tokens(x, w.tile, rotation, threads, bytes ? Int8Order::kTiles : Int8Order::kRows);
  if (bytes) return int8_gemm_bytes(w, tokens, out, threads);
  if constexpr (!simd::kDot8IsOneStep) int8_gemm_pairs(w, tokens, out, threads);
}

}  // namespace lowbit
