// Products of float activations with weights that are decoded to float32 on the way: out = x @ w.T + bias.
//
// A Weight (one format's arrangement in memory, in blocks of 16 rows) offers
//
//   int64_t n, k;
//   void decode(int64_t block, int64_t first, int64_t last, float* panel) const;
//       columns first..last of 16 rows, column c to panel[(c - first) * kPanelRows + row]; both ends are multiples of
//       kPanelColumns, or k
//   template <int kTokens> void multiply(int64_t block, const FewTokens& x, int64_t token, F32
//   (&sums)[kTokens][kBlockVectors]) const;
//       the whole product for a few tokens, decoding in registers
//   F32 finish(F32 sum, int64_t block, int v) const;
//       optional: what a sum over decoded columns becomes, where a factor is left out of them
//
// Few tokens: a thread takes blocks of rows and reads them once; the bus is the limit. Many tokens: a panel of decoded
// weights stays in the first cache while a tile of tokens after the other is multiplied with it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"
#include "rows16.h"

namespace lowbit {

// Activations as the launcher hands them over: [m, k] without gaps.
struct Activations {
  const void* data;
  int dtype;
  int64_t m, k;
};

struct Output {
  void* data;  // [m, n]
  int dtype;
  const void* bias;  // [n] or null
  int bias_dtype;
};

// float32 room that is aligned to a cache line and not cleared.
class Room {
 public:
  explicit Room(int64_t count) : bytes_(new unsigned char[static_cast<size_t>(count) * sizeof(float) + 64]) {}
  float* data() const {
    const auto at = reinterpret_cast<uintptr_t>(bytes_.get());
    return reinterpret_cast<float*>((at + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
};

// Columns first..last of a row of activations as float32: to[0..last - first).
inline void columns_to_f32(const Activations& x, int64_t m, int64_t first, int64_t last, float* to) {
  using namespace simd;
  const int64_t begin = m * x.k;
  for (; first + kLanes <= last; first += kLanes, to += kLanes)
    store_f32(to, load_as_f32(x.data, begin + first, x.dtype));
  if (const int rest = static_cast<int>(last - first); rest > 0)
    store_first(to, 0, rest, load_first(x.data, begin + first, rest, x.dtype), kFloat32);
}

// A row of activations as float32: to[0..k).
inline void row_to_f32(const Activations& x, int64_t m, float* to) { columns_to_f32(x, m, 0, x.k, to); }

// Tokens in tiles of nearly equal size: 8 tokens are 4 + 4, not 6 + 2.
class EvenTiles {
 public:
  EvenTiles(int64_t m, int most) : m_(m), count_((m + most - 1) / most) {}
  int64_t m() const { return m_; }
  int64_t count() const { return count_; }
  int64_t begin(int64_t tile) const { return m_ * tile / count_; }  // its first token
  int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }

 private:
  int64_t m_, count_;
};

// Activations as float32, made once a call, in tiles: the tokens of a tile lie beside each other, column after column,
// so that one address serves all of them.
class TokenTiles : public EvenTiles {
 public:
  TokenTiles(const Activations& x, int most, int threads) : EvenTiles(x.m, most), k_(x.k), room_(m() * k_) {
    const int64_t pieces = (k_ + kPiece - 1) / kPiece;
    parallel_for(count() * pieces, m() * k_ >= 32768 ? threads : 1, [&](int64_t task) {
      const int64_t tile = task / pieces, first = task % pieces * kPiece, last = std::min(first + kPiece, k_);
      put(x, tile, first, last, room_.data() + begin(tile) * k_ + first * size(tile));
    });
  }
  const float* of(int64_t token) const { return room_.data() + token * k_; }  // [k, size] of the tile it begins

 private:
  static constexpr int64_t kPiece = 256;

  void put(const Activations& x, int64_t tile, int64_t first, int64_t last, float* to) const {
    const int64_t token = begin(tile), tokens = size(tile);
    if (tokens == 1) return columns_to_f32(x, token, first, last, to);
    alignas(64) float row[kPiece];
    for (int64_t t = 0; t < tokens; ++t) {
      columns_to_f32(x, token + t, first, last, row);
      float* column = to + t;
      for (int64_t c = 0; c < last - first; ++c, column += tokens) *column = row[c];
    }
  }

  int64_t k_;
  Room room_;
};

#if defined(LOWBIT_ISA_AVX512)
constexpr int kTileTokens = 12;  // 24 sums, 2 weights and a token in 32 registers
constexpr int kPanelBlocks = 2;
#elif defined(LOWBIT_ISA_NEON)
constexpr int kTileTokens = 6;  // 24 sums and 4 weights in 32 registers
constexpr int kPanelBlocks = 1;
#else
constexpr int kTileTokens = 6;  // 12 sums, 2 weights and a token in 16 registers
constexpr int kPanelBlocks = 1;
#endif
constexpr int kPanelRows = kPanelBlocks * kBlockRows;
constexpr int kPanelVectors = kPanelRows / simd::kLanes;
constexpr int64_t kPanelColumns = 256;  // 16 KiB or 32 KiB of float32: half of a first-level cache
constexpr int64_t kChunkTokens = 96;    // 96 KiB of activations beside a panel in the second-level cache
constexpr int64_t kTaskPanels = 4;

// sums[t][row] += panel[c][row] * x[c][t] over the columns; x is [columns, kTokens]. Not inlined: what a caller keeps
// in registers, such as constants of its decoding, would be one sum in memory, and half the speed.
template <int kTokens>
__attribute__((noinline)) void multiply_panel(const float* panel, const float* x, int64_t columns, float* sums) {
  using namespace simd;
  F32 acc[kTokens][kPanelVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kPanelVectors; ++v) acc[t][v] = load_f32(sums + t * kPanelRows + v * kLanes);
  for (int64_t c = 0; c < columns; ++c) {
    F32 w[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) w[v] = load_f32(panel + c * kPanelRows + v * kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const F32 token = set1_f32(x[c * kTokens + t]);
      for (int v = 0; v < kPanelVectors; ++v) acc[t][v] = fma(w[v], token, acc[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kPanelVectors; ++v) store_f32(sums + t * kPanelRows + v * kLanes, acc[t][v]);
}

template <int kMost>
inline void multiply_panel_of(int tokens, const float* panel, const float* x, int64_t columns, float* sums) {
  if constexpr (kMost > 0) {
    if (tokens == kMost) return multiply_panel<kMost>(panel, x, columns, sums);
    multiply_panel_of<kMost - 1>(tokens, panel, x, columns, sums);
  }
}

template <class Weight, class = void>
struct LeavesFactor : std::false_type {};
template <class Weight>
struct LeavesFactor<Weight, std::void_t<decltype(&Weight::finish)>> : std::true_type {};

// Sums of [tokens, kPanelRows] of a panel, as rows of the output.
template <class Weight>
inline void store_panel(const Weight& w, const float* sums, int64_t panel, int64_t first_token, int64_t tokens,
                        const Output& out) {
  using namespace simd;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t b = 0; b < kPanelBlocks; ++b) {
      const int64_t block = panel * kPanelBlocks + b;
      if (block * kBlockRows >= w.n) break;
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) {
        row[v] = load_f32(sums + t * kPanelRows + b * kBlockRows + v * kLanes);
        if constexpr (LeavesFactor<Weight>::value) row[v] = w.finish(row[v], block, v);
      }
      store_block(row, block, w.n, out.bias, out.bias_dtype, out.data, first_token + t, out.dtype);
    }
}

template <class Weight>
void gemm_many(const Weight& w, const Activations& x, const Output& out, int threads) {
  const TokenTiles packed(x, kTileTokens, threads);
  const int64_t chunks = (x.m + kChunkTokens - 1) / kChunkTokens;
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows, panels = (blocks + kPanelBlocks - 1) / kPanelBlocks;
  const int64_t group = panels * chunks >= 4 * kTaskPanels * threads ? kTaskPanels : 1;
  const int64_t groups = (panels + group - 1) / group;

  parallel_for(groups * chunks, threads, [&](int64_t task) {
    const int64_t chunk = task / groups, first_panel = task % groups * group;
    const int64_t last_panel = std::min(first_panel + group, panels);
    const int64_t first_tile = packed.count() * chunk / chunks, last_tile = packed.count() * (chunk + 1) / chunks;
    const int64_t first_token = packed.begin(first_tile), tokens = packed.begin(last_tile) - first_token;
    Room panel_room(kPanelColumns * kPanelRows), sums_room((last_panel - first_panel) * tokens * kPanelRows);
    float *panel = panel_room.data(), *sums = sums_room.data();
    std::fill_n(sums, (last_panel - first_panel) * tokens * kPanelRows, 0.0f);
    for (int64_t first = 0; first < w.k; first += kPanelColumns) {
      const int64_t last = std::min(first + kPanelColumns, w.k);
      for (int64_t p = first_panel; p < last_panel; ++p) {
        for (int64_t b = 0; b < kPanelBlocks; ++b) {
          // A block that is not there leaves numbers of an earlier one, whose products nobody stores.
          const int64_t block = std::min(p * kPanelBlocks + b, blocks - 1);
          w.decode(block, first, last, panel + b * kBlockRows);
        }
        for (int64_t t = first_tile; t < last_tile; ++t) {
          const int64_t token = packed.begin(t);
          multiply_panel_of<kTileTokens>(packed.size(t), panel, packed.of(token) + first * packed.size(t), last - first,
                                         sums + ((p - first_panel) * tokens + token - first_token) * kPanelRows);
        }
      }
    }
    for (int64_t p = first_panel; p < last_panel; ++p)
      store_panel(w, sums + (p - first_panel) * tokens * kPanelRows, p, first_token, tokens, out);
  });
}

// How far ahead the loops ask for memory: what takes its time in a first-level cache, and what comes from farther away.
constexpr int64_t kNearBytes = 1024, kAheadBytes = simd::kLanes == 16 ? 6144 : 2048;

// What a few tokens' loop needs after what lies at `at`; `more` bytes farther where that comes next. Asked for twice
// where vectors are a line of the cache: few lines can be on their way to the first-level cache at once, and from the
// second they do not take long. Always inline: GCC drops calls of a function that does nothing but this.
inline __attribute__((always_inline)) void ask_ahead(const void* at, int64_t more = 0) {
  const auto* from = static_cast<const char*>(at);
  if constexpr (simd::kLanes == 16) {
    __builtin_prefetch(from + kNearBytes);
    __builtin_prefetch(from + kAheadBytes + more, 0, 2);
  } else {
    __builtin_prefetch(from + kAheadBytes + more);
  }
}

constexpr int kFewTokens = 4;  // that share one pass over a block

template <class Weight, int kMost>
inline void few_of_block(int tokens, const Weight& w, const typename Weight::Few& x, const Output& out, int64_t block,
                         int64_t token) {
  if constexpr (kMost > 0) {
    if (tokens < kMost) return few_of_block<Weight, kMost - 1>(tokens, w, x, out, block, token);
    simd::F32 sums[kMost][kBlockVectors];
    w.template multiply<kMost>(block, x, token, sums);
    for (int t = 0; t < kMost; ++t)
      store_block(sums[t], block, w.n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
  }
}

// kMost: of the tokens that share one pass, as many as their sums leave a decoder's registers.
template <int kMost = kFewTokens, class Weight>
void gemm_few(const Weight& w, const Activations& x, const Output& out, int threads) {
  const typename Weight::Few few(w, x, threads);
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows;
  // Some blocks a task, so that a thread reads on where it has read.
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(8, blocks / (8 * std::max(threads, 1))));
  const int64_t passes = (x.m + kMost - 1) / kMost;
  parallel_for((blocks + run - 1) / run, threads, [&](int64_t task) {
    for (int64_t block = task * run; block < std::min((task + 1) * run, blocks); ++block)
      // All tokens while the block is in a cache, in passes of nearly equal size: 5 tokens are 3 + 2, not 4 + 1.
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t token = x.m * pass / passes;
        few_of_block<Weight, kMost>(static_cast<int>(x.m * (pass + 1) / passes - token), w, few, out, block, token);
      }
  });
}

}  // namespace lowbit
