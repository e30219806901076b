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

// A row of activations as float32: to[0..k).
inline void row_to_f32(const Activations& x, int64_t m, float* to) {
  using namespace simd;
  const int64_t begin = m * x.k;
  int64_t c = 0;
  for (; c + kLanes <= x.k; c += kLanes) store_f32(to + c, load_as_f32(x.data, begin + c, x.dtype));
  if (c < x.k)
    store_first(to, c, static_cast<int>(x.k - c), load_first(x.data, begin + c, static_cast<int>(x.k - c), x.dtype),
                kFloat32);
}

// Activations as float32, made once a call: what a few-token way needs that does nothing else to them.
class FloatRows {
 public:
  template <class Weight>
  FloatRows(const Weight& w, const Activations& x, int threads) : k_(w.k), room_(x.m * w.k) {
    parallel_for(x.m, x.m * k_ >= 32768 ? threads : 1, [&](int64_t m) { row_to_f32(x, m, room_.data() + m * k_); });
  }
  const float* row(int64_t m) const { return room_.data() + m * k_; }

 private:
  int64_t k_;
  Room room_;  // [m, k]
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

// [m, k] -> [ceil(m / tile), k, tile] float32; tokens of zeros fill up the last tile.
inline void pack_tokens(const Activations& x, int tile, float* packed, int threads) {
  const int64_t tiles = (x.m + tile - 1) / tile;
  parallel_for(tiles, threads, [&](int64_t index) {
    float* to = packed + index * x.k * tile;
    Room row(x.k);
    for (int t = 0; t < tile; ++t) {
      const int64_t m = index * tile + t;
      if (m < x.m) row_to_f32(x, m, row.data());
      for (int64_t c = 0; c < x.k; ++c) to[c * tile + t] = m < x.m ? row.data()[c] : 0.0f;
    }
  });
}

template <class Weight>
void gemm_many(const Weight& w, const Activations& x, const Output& out, int threads) {
  using namespace simd;
  // Tiles of equal size: 8 tokens are 4 + 4, not 6 + 2.
  const int64_t least = (x.m + kTileTokens - 1) / kTileTokens;
  const int tile = static_cast<int>((x.m + least - 1) / least);
  Room packed((x.m + tile - 1) / tile * tile * x.k);
  pack_tokens(x, tile, packed.data(), threads);

  const int64_t tiles = (x.m + tile - 1) / tile, chunk_tiles = std::max<int64_t>(1, kChunkTokens / tile);
  const int64_t chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
  const int64_t blocks = (w.n + kBlockRows - 1) / kBlockRows, panels = (blocks + kPanelBlocks - 1) / kPanelBlocks;
  const int64_t group = panels * chunks >= 4 * kTaskPanels * threads ? kTaskPanels : 1;
  const int64_t groups = (panels + group - 1) / group;

  parallel_for(groups * chunks, threads, [&](int64_t task) {
    const int64_t chunk = task / groups, first_panel = task % groups * group;
    const int64_t last_panel = std::min(first_panel + group, panels);
    const int64_t first_tile = chunk * chunk_tiles, last_tile = std::min(first_tile + chunk_tiles, tiles);
    const int64_t tokens = (last_tile - first_tile) * tile;
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
        for (int64_t t = first_tile; t < last_tile; ++t)
          multiply_panel_of<kTileTokens>(tile, panel, packed.data() + (t * x.k + first) * tile, last - first,
                                         sums + ((p - first_panel) * tokens + (t - first_tile) * tile) * kPanelRows);
      }
    }
    for (int64_t p = first_panel; p < last_panel; ++p)
      for (int64_t t = 0; t < std::min(tokens, x.m - first_tile * tile); ++t)
        for (int64_t b = 0; b < kPanelBlocks; ++b) {
          F32 row[kBlockVectors];
          const float* from = sums + ((p - first_panel) * tokens + t) * kPanelRows + b * kBlockRows;
          for (int v = 0; v < kBlockVectors; ++v) row[v] = load_f32(from + v * kLanes);
          store_block(row, p * kPanelBlocks + b, w.n, out.bias, out.bias_dtype, out.data, first_tile * tile + t,
                      out.dtype);
        }
  });
}

// What a few tokens' loop asks for before it needs it: as far as reading memory alone is fastest with.
constexpr int64_t kAheadBytes = 2048;

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
