// Products of bfloat16 activations with weights that are decoded to bfloat16 on the way, two columns at once: for x86
// processors with AVX512-BF16 and AVX512-VBMI beside what the set asks for.
//
// A lane of vdpbf16ps is a row of the weight: it adds to a float32 sum what two columns give, which lie beside each
// other in a row of activations as they are. So there are half as many products as in float32, and activations stay
// what they are. The instruction takes a subnormal number for zero and gives zero for one, among activations as among
// sums; infinities and NaN are what they are elsewhere.
//
// A Weight, in blocks of 16 rows, offers
//
//   int64_t n, k;
//   void decode_pairs(int64_t block, int64_t first, int64_t last, uint32_t* panel) const;
//       columns first..last of 16 rows as bfloat16, exactly: columns c and c + 1 to the lower and the upper half of
//       panel[(c - first) / 2 * kPanelRows + row]; both ends are multiples of kPairColumns, or k
//   void soon(int64_t block, int64_t first, int64_t last, int64_t pieces, Soon (&from)[2]) const;
//       the memory that these columns are decoded from: codes and scales
//   F32 finish(F32 sum, int64_t block, int v) const;
//       what a sum over all columns becomes
//   static constexpr bool kGroupScales;
//       whether there may be scales of fewer columns than k that decode_pairs leaves out, and then
//   int64_t group;
//       the columns under one of them: all k where `finish` multiplies with the scale
//   F32 group_scale(int64_t block, int64_t g, int v) const;
//   bool decode_joined(int64_t block, int64_t first, int64_t last, uint32_t* panel, float* scales) const;
//       as decode_pairs, but under one scale a row, scales[row]; or false, where that would not be exact
#pragma once

#include "float_gemm.h"

#if defined(LOWBIT_ISA_AVX512) && !defined(LOWBIT_EMULATE)
#if __has_include(<avx512bf16intrin.h>)  // GCC 10, Clang 9
// Of a function that is only called where `can_bf16_dots()`. Lambdas inside it do not inherit it.
#define LOWBIT_BF16_DOTS __attribute__((target("avx512bf16,avx512vbmi")))
#endif
#endif

namespace lowbit {

#if defined(LOWBIT_BF16_DOTS)
inline bool can_bf16_dots() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }

// Whether one takes no longer than a float32 product of one column. By vendor, so that all machines of a kind give the
// same bits: on Zen 4 PyTorch's products are twice as fast in bfloat16 as in float32, on Emerald Rapids (Intel) half as
// fast, 151 and 285 GFLOP/s.
inline bool has_fast_bf16_dots() { return can_bf16_dots() && __builtin_cpu_is("amd"); }

constexpr int64_t kPairColumns = 256;  // 16 KiB of pairs: half of a first-level cache
constexpr int64_t kPairTokens = 192;   // a chunk: their sums and activations beside a panel fit the second-level cache

// Memory that will be read soon, asked for in pieces while there is other work: without a division for each of them.
struct Soon {
  const char *at = nullptr, *end = nullptr;
  int64_t step = 0;  // bytes of a piece, whole lines

  Soon() = default;
  Soon(const void* from, int64_t bytes, int64_t pieces)
      : at(static_cast<const char*>(from)), end(at + bytes), step((bytes / 64 + pieces) / pieces * 64) {}
  void ask() {
    for (const char* const to = std::min(at + step, end); at < to; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Activations in tiles, as TokenTiles has them: the pairs of columns of a tile's tokens beside each other.
class PairTiles : public EvenTiles {
 public:
  PairTiles(const Activations& x, int most, int threads) : EvenTiles(x.m, most), pairs_(x.k / 2), room_(m() * pairs_) {
    const int64_t pieces = (pairs_ + kPiece - 1) / kPiece;
    parallel_for(count() * pieces, m() * pairs_ >= 16384 ? threads : 1, [&](int64_t task) {
      const int64_t tile = task / pieces, first = task % pieces * kPiece, last = std::min(first + kPiece, pairs_);
      const int64_t tokens = size(tile);
      uint32_t* to = data() + begin(tile) * pairs_ + first * tokens;
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* row = static_cast<const uint16_t*>(x.data) + (begin(tile) + t) * x.k;
        for (int64_t p = first; p < last; ++p) std::memcpy(to + (p - first) * tokens + t, row + 2 * p, sizeof *to);
      }
    });
  }
  const uint32_t* of(int64_t token) const { return data() + token * pairs_; }  // [k / 2, size] of the tile it begins

 private:
  static constexpr int64_t kPiece = 256;

  uint32_t* data() const { return reinterpret_cast<uint32_t*>(room_.data()); }

  int64_t pairs_;
  Room room_;
};

// sums[t][row] += panel[p][row] * x[p][t] over the pairs, times scales[row] where they are given; x is
// [pairs, kTokens].
template <int kTokens, bool kScaled>
LOWBIT_BF16_DOTS __attribute__((noinline)) void multiply_pairs(const uint32_t* panel, const uint32_t* x, int64_t pairs,
                                                               const float* scales, float* sums) {
  __m512 acc[kTokens][kPanelVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kPanelVectors; ++v)
      acc[t][v] = kScaled ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * kPanelRows + v * simd::kLanes);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i w[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) w[v] = _mm512_loadu_si512(panel + p * kPanelRows + v * simd::kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const __m512i token = _mm512_set1_epi32(static_cast<int>(x[p * kTokens + t]));
      for (int v = 0; v < kPanelVectors; ++v) acc[t][v] = _mm512_dpbf16_ps(acc[t][v], (__m512bh)w[v], (__m512bh)token);
    }
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    const __m512 scale = kScaled ? _mm512_loadu_ps(scales + v * simd::kLanes) : _mm512_setzero_ps();
    for (int t = 0; t < kTokens; ++t) {
      float* to = sums + t * kPanelRows + v * simd::kLanes;
      _mm512_storeu_ps(to, kScaled ? _mm512_fmadd_ps(acc[t][v], scale, _mm512_loadu_ps(to)) : acc[t][v]);
    }
  }
}

template <int kMost, bool kScaled>
inline void multiply_pairs_of(int tokens, const uint32_t* panel, const uint32_t* x, int64_t pairs, const float* scales,
                              float* sums) {
  if constexpr (kMost > 0) {
    if (tokens == kMost) return multiply_pairs<kMost, kScaled>(panel, x, pairs, scales, sums);
    multiply_pairs_of<kMost - 1, kScaled>(tokens, panel, x, pairs, scales, sums);
  }
}

// Columns first..last, of which a panel is, times a tile of tokens, added to sums; `group` of them are under one of the
// scales, 0 where there are none.
inline void multiply_tile(int tokens, const uint32_t* panel, const uint32_t* x, int64_t first, int64_t last,
                          int64_t group, const float* scales, float* sums) {
  if (!group) return multiply_pairs_of<kTileTokens, false>(tokens, panel, x, (last - first) / 2, nullptr, sums);
  for (int64_t c = first; c < last; scales += kPanelRows) {
    const int64_t end = std::min((c / group + 1) * group, last), pairs = (end - c) / 2;
    multiply_pairs_of<kTileTokens, true>(tokens, panel, x, pairs, scales, sums);
    panel += pairs * kPanelRows;
    x += pairs * tokens;
    c = end;
  }
}

// Decodes columns first..last of the blocks of a panel; scales[i][row] are what is left out of their groups. Gives how
// many columns are under one of these scales, 0 where nothing is left out.
template <class Weight>
inline int64_t decode_panel(const Weight& w, int64_t first_block, int64_t blocks, int64_t first, int64_t last,
                            uint32_t* panel, float* scales) {
  // A block that is not there is the last one again, whose products nobody stores.
  const auto block = [&](int b) { return std::min(first_block + b, blocks - 1); };
  if constexpr (Weight::kGroupScales) {
    if (w.group < w.k) {
      int joined = 0;
      while (joined < kPanelBlocks &&
             w.decode_joined(block(joined), first, last, panel + joined * kBlockRows, scales + joined * kBlockRows))
        ++joined;
      if (joined == kPanelBlocks) return w.k;
      for (int b = 0; b < kPanelBlocks; ++b) {
        w.decode_pairs(block(b), first, last, panel + b * kBlockRows);
        float* to = scales + b * kBlockRows;
        for (int64_t g = first / w.group; g * w.group < last; ++g, to += kPanelRows)
          for (int v = 0; v < kBlockVectors; ++v) simd::store_f32(to + v * simd::kLanes, w.group_scale(block(b), g, v));
      }
      return w.group;
    }
  }
  for (int b = 0; b < kPanelBlocks; ++b) w.decode_pairs(block(b), first, last, panel + b * kBlockRows);
  return 0;
}

template <class Weight>
void gemm_pairs(const Weight& w, const Activations& x, const Output& out, int threads) {
  const PairTiles packed(x, kTileTokens, threads);
  const PanelTasks tasks(w.n, packed, kPairTokens, threads);
  const int64_t blocks = tasks.blocks();
  int64_t scales = 0;  // of a row of a panel, at most
  if constexpr (Weight::kGroupScales) scales = kPairColumns / std::min(w.group, kPairColumns) + 2;

  parallel_for(tasks.count(), threads, [&](int64_t index) {
    const PanelTask task = tasks.task(index);
    const Room panel_room(kPairColumns / 2 * kPanelRows), scales_room(scales * kPanelRows);
    const PanelSums sums(task);
    auto* panel = reinterpret_cast<uint32_t*>(panel_room.data());
    for (int64_t first = 0; first < w.k; first += kPairColumns) {
      const int64_t last = std::min(first + kPairColumns, w.k);
      for (int64_t p = task.first_panel; p < task.last_panel; ++p) {
        const int64_t group = decode_panel(w, p * kPanelBlocks, blocks, first, last, panel, scales_room.data());
        // What comes next: these columns of other rows, other columns, or a thread's next task.
        const bool same = p + 1 < task.last_panel, deeper = !same && last < w.k;
        const int64_t next = (same ? p + 1 : deeper ? task.first_panel : task.last_panel) * kPanelBlocks;
        const int64_t next_first = same ? first : deeper ? last : 0;
        const int64_t next_last = std::min(next_first + kPairColumns, w.k), pieces = task.last_tile - task.first_tile;
        Soon soon[kPanelBlocks][2];
        for (int64_t b = 0; b < std::min<int64_t>(kPanelBlocks, blocks - next); ++b)
          w.soon(next + b, next_first, next_last, pieces, soon[b]);
        for (int64_t t = task.first_tile; t < task.last_tile; ++t) {
          for (auto& block : soon)
            for (Soon& source : block) source.ask();
          const int64_t token = packed.begin(t);
          multiply_tile(packed.size(t), panel, packed.of(token) + first / 2 * packed.size(t), first, last, group,
                        scales_room.data(), sums.of(p, token));
        }
      }
    }
    sums.store(w, out);
  });
}
#else
inline bool can_bf16_dots() { return false; }
inline bool has_fast_bf16_dots() { return false; }
#endif

}  // namespace lowbit
