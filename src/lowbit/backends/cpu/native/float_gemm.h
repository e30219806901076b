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

// Some panels of a weight with some tiles of tokens.
struct PanelTask {
  int64_t first_panel, last_panel, first_tile, last_tile, first_token, tokens;
};

// How the product of the rows of a weight with tiles of tokens is shared out. A task has a few panels where there are
// enough of them for all threads, and so many tiles that what is made of them stays in the second-level cache.
class PanelTasks {
 public:
  PanelTasks(int64_t rows, const EvenTiles& tiles, int64_t chunk_tokens, int threads)
      : tiles_(tiles),
        blocks_((rows + kBlockRows - 1) / kBlockRows),
        panels_((blocks_ + kPanelBlocks - 1) / kPanelBlocks),
        chunks_((tiles.m() + chunk_tokens - 1) / chunk_tokens),
        run_(panels_ * chunks_ >= 4 * kTaskPanels * threads ? kTaskPanels : 1),
        runs_((panels_ + run_ - 1) / run_) {}

  int64_t blocks() const { return blocks_; }  // of rows
  int64_t count() const { return runs_ * chunks_; }
  PanelTask task(int64_t index) const {
    const int64_t chunk = index / runs_, panel = index % runs_ * run_;
    const int64_t first = tiles_.count() * chunk / chunks_, last = tiles_.count() * (chunk + 1) / chunks_;
    const int64_t token = tiles_.begin(first);
    return {panel, std::min(panel + run_, panels_), first, last, token, tiles_.begin(last) - token};
  }

 private:
  const EvenTiles& tiles_;
  int64_t blocks_, panels_, chunks_, run_, runs_;
};

// The sums of a task, [panels, tokens, kPanelRows], zeros at first.
class PanelSums {
 public:
  explicit PanelSums(const PanelTask& task)
      : task_(task), room_((task.last_panel - task.first_panel) * task.tokens * kPanelRows) {
    std::fill_n(room_.data(), (task.last_panel - task.first_panel) * task.tokens * kPanelRows, 0.0f);
  }

  float* of(int64_t panel, int64_t token) const {
    return room_.data() + ((panel - task_.first_panel) * task_.tokens + token - task_.first_token) * kPanelRows;
  }

  // As rows of the output.
  template <class Weight>
  void store(const Weight& w, const Output& out) const {
    for (int64_t panel = task_.first_panel; panel < task_.last_panel; ++panel)
      for (int64_t token = task_.first_token; token < task_.first_token + task_.tokens; ++token)
        store_row(w, of(panel, token), panel, token, out);
  }

 private:
  template <class Weight>
  static void store_row(const Weight& w, const float* sums, int64_t panel, int64_t token, const Output& out) {
    using namespace simd;
    for (int64_t b = 0; b < kPanelBlocks; ++b) {
      const int64_t block = panel * kPanelBlocks + b;
      if (block * kBlockRows >= w.n) break;
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) {
        row[v] = load_f32(sums + b * kBlockRows + v * kLanes);
        if constexpr (LeavesFactor<Weight>::value) row[v] = w.finish(row[v], block, v);
      }
      store_block(row, block, w.n, out.bias, out.bias_dtype, out.data, token, out.dtype);
    }
  }

  const PanelTask task_;
  const Room room_;
};

template <class Weight>
void gemm_many(const Weight& w, const Activations& x, const Output& out, int threads) {
  const TokenTiles packed(x, kTileTokens, threads);
  const PanelTasks tasks(w.n, packed, kChunkTokens, threads);

  parallel_for(tasks.count(), threads, [&](int64_t index) {
    const PanelTask task = tasks.task(index);
    const Room panel_room(kPanelColumns * kPanelRows);
    const PanelSums sums(task);
    float* panel = panel_room.data();
    for (int64_t first = 0; first < w.k; first += kPanelColumns) {
      const int64_t last = std::min(first + kPanelColumns, w.k);
      for (int64_t p = task.first_panel; p < task.last_panel; ++p) {
        for (int64_t b = 0; b < kPanelBlocks; ++b) {
          // A block that is not there leaves numbers of an earlier one, whose products nobody stores.
          const int64_t block = std::min(p * kPanelBlocks + b, tasks.blocks() - 1);
          w.decode(block, first, last, panel + b * kBlockRows);
        }
        for (int64_t t = task.first_tile; t < task.last_tile; ++t) {
          const int64_t token = packed.begin(t);
          multiply_panel_of<kTileTokens>(packed.size(t), panel, packed.of(token) + first * packed.size(t), last - first,
                                         sums.of(p, token));
        }
      }
    }
    sums.store(w, out);
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
