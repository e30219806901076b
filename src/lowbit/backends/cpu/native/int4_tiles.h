// The products of int4_gemm.h by tiles, where a set has them (amx.h) and tokens are many; else by int4_gemm.h.
//
// Codes are unpacked to bytes once a task, for all its tokens. int16 activations are two tiles, of low and of high
// bytes, x = 256 high + low, both with a sign: the integers are those of int4_gemm.h, and the roundings behind them
// come in its order.
#pragma once

#include "amx.h"
#include "int4_gemm.h"

namespace lowbit {

#if defined(LOWBIT_TILES)
// `count` words of 16 rows of codes -> words of bytes, as a tile of a weight has them: two of 4 columns for one of 8.
template <class Weight, int kColumns>
void unpack_codes(const uint32_t* from, int64_t count, uint32_t* to) {
  using namespace simd;
  for (int64_t word = 0; word < count; ++word)
    for (int v = 0; v < kBlockVectors; ++v) {
      const I32 codes = load_i32(from + word * kBlockRows + v * kLanes);
      if constexpr (kColumns == 8) {
        Bytes even, odd;
        if constexpr (Weight::kOffsets) {
          Weight::codes(codes, even, odd);
        } else {
          Weight::signed_codes(codes, even, odd);
        }
        store_bytes(to + 2 * word * kBlockRows + v * kLanes, even);
        store_bytes(to + (2 * word + 1) * kBlockRows + v * kLanes, odd);
      } else {
        store_bytes(to + word * kBlockRows + v * kLanes, Weight::bytes(codes));
      }
    }
}

// A tile of tokens, or two of them, times a weight whose blocks from `first_block` on begin at `words`, unpacked. The
// roundings come in the order of int4_groups and int4_offsets.
template <class Weight, class Tokens, int kTiles, int kW>
void int4_tiles(const amx::Tiles& tiles, const Weight& w, const Tokens& x, const int64_t (&tokens)[kTiles],
                int64_t block, const uint32_t* words, amx::Sums<kTiles, kW>& sums) {
  using namespace simd;
  static_assert(!Weight::kSpans, "groups so short are not for tiles");
  constexpr int kX = kTiles * Tokens::kPieces;
  const int64_t groups = w.k / w.group, across = w.k / 4, blocks = w.k / x.block, blocks_a_group = w.group / x.block;
  alignas(64) int32_t found[kX][kW][amx::kTokens][kBlockRows];
  const auto each = [&](const auto& f) { amx::Sums<kTiles, kW>::each(f); };
  each([&](int i, int j, int t, int v) { store_f32(sums.total[i][j][t] + v * kLanes, zero_f32()); });
  for (int64_t b = 0; b < blocks; ++b) {
    const int8_t* codes[kX];
    const uint32_t* from[kW];
    for (int i = 0; i < kX; ++i) codes[i] = x.row(tokens[i / Tokens::kPieces], i % Tokens::kPieces) + b * x.block;
    for (int j = 0; j < kW; ++j) from[j] = words + (j * across + b * x.block / 4) * kBlockRows;
    tiles.multiply(codes, x.k, from, x.block / 4, found);
    each([&](int i, int j, int t, int v) {
      I32 sum = load_i32(found[i * Tokens::kPieces][j][t] + v * kLanes);
      if constexpr (Tokens::kPieces == 2) sum = add(sum, shift_left<8>(load_i32(found[2 * i + 1][j][t] + v * kLanes)));
      const F32 step = set1_f32(x.d[(tokens[i] + t) * blocks + b]);
      float* at = sums.total[i][j][t] + v * kLanes;
      store_f32(at, fma(to_f32(sum), mul(w.scale(block + j, b / blocks_a_group, v), step), load_f32(at)));
    });
  }
  if constexpr (Weight::kOffsets)
    for (int64_t g = 0; g < groups; ++g)
      each([&](int i, int j, int t, int v) {
        float* at = sums.total[i][j][t] + v * kLanes;
        store_f32(at, fma(w.offset(block + j, g, v), set1_f32(x.sums[(tokens[i] + t) * x.groups + g]), load_f32(at)));
      });
}

template <class Weight, bool kWhole, class Tokens, class WeightOf>
void int4_gemm_tiles(const WeightOf& weight_of, const Tokens& x, int64_t n, const Output& out, int threads) {
  constexpr int kTiles = 2 / Tokens::kPieces;
  amx::for_each_task(x.m, n, x.k, threads, [&](const amx::Task& task) {
    const Weight w = weight_of(task.first_block, task.last_block, task.worker);
    const int64_t base = kWhole ? 0 : task.first_block, across = x.k / 4;
    Room room(task.blocks() * across * kBlockRows);
    auto* words = reinterpret_cast<uint32_t*>(room.data());
    for (int64_t b = 0; b < task.blocks(); ++b)
      unpack_codes<Weight, Tokens::kColumns>(w.words + (task.first_block - base + b) * w.stride, x.k / Tokens::kColumns,
                                             words + b * across * kBlockRows);
    const amx::Tiles tiles(x.block / 4);
    task.each<kTiles>([&](const auto& tokens, int64_t block, auto blocks) {
      constexpr int kSome = std::extent_v<std::remove_reference_t<decltype(tokens)>>;
      amx::Sums<kSome, decltype(blocks)::value> sums;
      int4_tiles(tiles, w, x, tokens, block - base, words + (block - task.first_block) * across * kBlockRows, sums);
      sums.store(tokens, block, n, out);
    });
  });
}
#endif

// As int4_gemm_of, for activations that may come as planes.
template <class Weight, bool kWhole, class Tokens, class WeightOf>
void int4_product_of(const WeightOf& weight_of, const Tokens& x, int64_t n, const Output& out, int threads) {
#if defined(LOWBIT_TILES)
  if (amx::takes(x.m, x.block)) return int4_gemm_tiles<Weight, kWhole>(weight_of, x, n, out, threads);
#endif
  int4_gemm_of<Weight, kWhole>(weight_of, x, n, out, threads);
}

// The product of activations as integers of kPieces bytes, of which `columns_a_scale` share a scale.
template <int kPieces, class Weight>
void int4_product(const Weight& w, const Activations& x, int64_t columns_a_scale, const Output& out, int threads) {
  constexpr int kColumns = Weight::kWordCodes;
  const auto weight_of = [&](int64_t, int64_t, int) { return w; };
#if defined(LOWBIT_TILES)
  if constexpr (!Weight::kSpans)
    if (amx::takes(x.m, std::min(columns_a_scale, w.group))) {
      const IntegerTokens<kPieces, kColumns, false, true> tokens(x, columns_a_scale, w.group, threads);
      return int4_gemm_tiles<Weight, true>(weight_of, tokens, w.n, out, threads);
    }
#endif
  const IntegerTokens<kPieces, kColumns> tokens(x, columns_a_scale, w.group, threads);
  int4_gemm_of<Weight, true>(weight_of, tokens, w.n, out, threads);
}

}  // namespace lowbit
