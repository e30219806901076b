// svdquant_w4a4: int4 activations times int4 weights in groups of 64, beside a low-rank branch in float32.
//
//   y = sum over groups of d_x * d_w * (sum of codes) + (x proj_down) proj_up^T + bias
//
// The activations are smoothed, quantized and multiplied with proj_down in one pass over pieces of their columns;
// proj_up and the bias are added to a tile's sums while they are in registers. A weight in the layout rows16 is read as
// it lies; of plain rows or kitchen's tiles, a task first arranges its blocks in the cache, for all its tokens.
#include <cmath>

#include "native/bind.h"
#include "native/int4_activations.h"
#include "native/transpose.h"

namespace lowbit {
namespace {

using namespace simd;

constexpr int64_t kGroup = 64;
constexpr int64_t kGroupWords = kGroup / kWordColumns;
// A sum begins at -8 times that of 64 activations and is taken after a whole group.
static_assert(kGroup / 4 <= kDot4StepsInt4, "one total a group");
static_assert(8 * kGroup * 15 + kGroup / 4 * 2 * 15 * 15 < (1 << 15), "an int16 holds a sum");

// ---- activations ----------------------------------------------------------------------------------------------------

// What makes codes, scales and low-rank activations of x.
struct Smoothing {
  Activations x, raw;  // what is quantized, and what proj_down multiplies
  float shift;         // added to x
  const void* smooth;  // [k]
  int smooth_dtype;
  const void* down;  // [k, rank]
  int down_dtype;
  int64_t rank;
  bool is_unsigned;
};

constexpr int64_t kPiece = 512;  // columns of a task: one token is enough for several threads
constexpr int kPieceTokens = 4;

// One group: its codes in order, and their scale.
inline float quantize_group(const Smoothing& s, int64_t token, int64_t first, int8_t* codes) {
  F32 values[kGroup / kLanes];
  I32 most = zero_i32();  // the bits of magnitudes are ordered as they are, with NaN above all
  for (int i = 0; i < kGroup / kLanes; ++i) {
    F32 x = load_as_f32(s.x.data, token * s.x.k + first + i * kLanes, s.x.dtype);
    if (s.shift != 0.0f) x = add(x, set1_f32(s.shift));
    F32 factor = load_as_f32(s.smooth, first + i * kLanes, s.smooth_dtype);
    factor = select(equal(as_i32(abs(factor)), zero_i32()), set1_f32(HUGE_VALF), factor);  // 0 switches a channel off
    values[i] = div(x, factor);
    most = max(most, as_i32(abs(values[i])));
  }
  alignas(64) int32_t lanes[kLanes];
  store_i32(lanes, most);
  const int32_t bits = *std::max_element(lanes, lanes + kLanes);
  float amax;
  std::memcpy(&amax, &bits, 4);
  const int limit = s.is_unsigned ? 15 : 7;
  const float scale = (amax < 1e-10f ? 1e-10f : amax) / static_cast<float>(limit);
  const I32 low = set1_i32(s.is_unsigned ? 0 : -limit), high = set1_i32(limit);
  for (int i = 0; i < kGroup / kLanes; ++i) {
    const I32 q = min(max(to_i32(div(values[i], set1_f32(scale))), low), high);
    store_low_bytes(reinterpret_cast<uint8_t*>(codes) + i * kLanes, q);
  }
  return scale;
}

#if defined(LOWBIT_ISA_AVX512)
constexpr int kDownChains = 2;  // sums side by side, where a row of `down` gives too few to keep the multipliers busy
#else
constexpr int kDownChains = 1;
#endif

// kVectors vectors of raw[t][columns] @ down[columns]; load(column, vector) gives those of `down`, store takes the
// sums.
template <int kTokens, int kVectors, class Load, class Store>
inline __attribute__((always_inline)) void project_columns(const float* raw, int64_t columns, const Load& load,
                                                           const Store& store) {
  F32 sums[kDownChains][kTokens][kVectors];
  for (auto& chain : sums)
    for (auto& row : chain)
      for (auto& sum : row) sum = zero_f32();
  for (int64_t c = 0; c < columns; c += kDownChains)  // their number is a multiple of a group
    for (int i = 0; i < kDownChains; ++i) {
      F32 down[kVectors];
      for (int v = 0; v < kVectors; ++v) down[v] = load(c + i, v);
      for (int t = 0; t < kTokens; ++t) {
        const F32 x = set1_f32(raw[t * kPiece + c + i]);
        for (int v = 0; v < kVectors; ++v) sums[i][t][v] = fma(x, down[v], sums[i][t][v]);
      }
    }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) {
      F32 sum = sums[0][t][v];
      for (int i = 1; i < kDownChains; ++i) sum = add(sum, sums[i][t][v]);
      store(t, v, sum);
    }
}

// Whole vectors of `down`, which is bfloat16 or any dtype.
template <int kTokens, int kVectors, bool kHalf>
__attribute__((noinline)) void project_vectors(const Smoothing& s, const float* raw, int64_t first, int64_t columns,
                                               int64_t r, float* const (&partial)[kTokens]) {
  const int dtype = s.down_dtype;
  const int64_t rank = s.rank, at = first * rank + r;
  const void* down = s.down;
  project_columns<kTokens, kVectors>(
      raw, columns,
      [=](int64_t c, int v) {
        const int64_t index = at + c * rank + v * kLanes;
        return kHalf ? load_bf16(static_cast<const uint16_t*>(down) + index) : load_as_f32(down, index, dtype);
      },
      [&](int t, int v, F32 sum) { store_f32(partial[t] + r + v * kLanes, sum); });
}

// partial[t][..] = raw[t][columns] @ down[columns], for kTokens tokens; raw is float32 [kTokens, kPiece].
template <int kTokens>
inline void project_down(const Smoothing& s, const float* raw, int64_t first, int64_t columns,
                         float* const (&partial)[kTokens]) {
  constexpr int kDownVectors = kTokens * kDownChains <= 2 ? 4 : 2;  // enough sums side by side, and not too many
  int64_t r = 0;
  const auto project = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    for (; r + kVectors * kLanes <= s.rank; r += kVectors * kLanes) {
      if (s.down_dtype == kBfloat16) {
        project_vectors<kTokens, kVectors, true>(s, raw, first, columns, r, partial);
      } else {
        project_vectors<kTokens, kVectors, false>(s, raw, first, columns, r, partial);
      }
    }
  };
  project(std::integral_constant<int, kDownVectors>{});
  project(std::integral_constant<int, 1>{});
  if (const int left = static_cast<int>(s.rank - r); left)
    project_columns<kTokens, 1>(
        raw, columns, [&](int64_t c, int) { return load_first(s.down, (first + c) * s.rank + r, left, s.down_dtype); },
        [&](int t, int, F32 sum) { store_first(partial[t], r, left, sum, kFloat32); });
}

// put(token, first column, codes of a group, scale) for all groups, and low [m, rank] = raw @ down.
template <class Put>
void quantize_and_project(const Smoothing& s, float* low, int threads, const Put& put) {
  const int64_t m = s.x.m, k = s.x.k;
  const int64_t pieces = (k + kPiece - 1) / kPiece, tiles = (m + kPieceTokens - 1) / kPieceTokens;
  Room partials(pieces * m * s.rank);  // [pieces, m, rank]
  parallel_for(tiles * pieces, threads, [&](int64_t task) {
    const int64_t first = task % pieces * kPiece, columns = std::min(kPiece, k - first);
    const int64_t token = task / pieces * kPieceTokens;
    const int tokens = static_cast<int>(std::min<int64_t>(kPieceTokens, m - token));
    Room raw(kPieceTokens * kPiece);
    alignas(64) int8_t codes[kGroup];
    for (int t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < columns; c += kGroup) {
        const float scale = quantize_group(s, token + t, first + c, codes);
        put(token + t, first + c, codes, scale);
      }
      for (int64_t c = 0; c < columns; c += kLanes)
        store_f32(raw.data() + t * kPiece + c, load_as_f32(s.raw.data, (token + t) * k + first + c, s.raw.dtype));
    }
    with_count<kPieceTokens>(tokens, [&](auto count) {
      float* partial[decltype(count)::value];
      for (int t = 0; t < count; ++t) partial[t] = partials.data() + (first / kPiece * m + token + t) * s.rank;
      project_down<decltype(count)::value>(s, raw.data(), first, columns, partial);
    });
  });
  for (int64_t i = 0; i < m * s.rank; ++i) {
    float sum = partials.data()[i];
    for (int64_t p = 1; p < pieces; ++p) sum += partials.data()[p * m * s.rank + i];
    low[i] = sum;
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

enum Arrangement : int { kRows16 = 0, kPlain = 1, kTiles = 2 };

struct SvdquantWeight {
  int arrangement;
  const uint32_t* words;  // rows16: [blocks, stride]; plain [n, k / 8]; tiles [n / 128, groups, 128, 8]
  int64_t stride;         // of rows16: words of a block, with what fills up
  const void* scales;     // [blocks, groups, 16]; [groups, n]; [n / 128, groups, 128]
  int scale_dtype;
  const void* up;  // [blocks, rank, 16]; [n, rank]; [n / 128, rank, 128]
  int up_dtype;
  int64_t n, k, rank;

  int64_t groups() const { return k / kGroup; }

  // As a tile finds them: in rows16 as they are stored, else in float32.
  int tile_scale_dtype() const { return arrangement == kRows16 ? scale_dtype : static_cast<int>(kFloat32); }
  int tile_up_dtype() const { return arrangement == kRows16 ? up_dtype : static_cast<int>(kFloat32); }

  template <class F>
  void blocks(int64_t first, int64_t count, const F& f) const {
    std::vector<Int4Block> found(static_cast<size_t>(count));
    if (arrangement == kRows16) {
      for (int64_t b = 0; b < count; ++b) {
        const int64_t block = first + b;
        found[b] = {words + block * stride, at(scales, block * groups() * kBlockRows, scale_dtype),
                    at(up, block * rank * kBlockRows, up_dtype)};
      }
      return f(found.data());
    }
    const int64_t words_size = k / kWordColumns * kBlockRows, scales_size = groups() * kBlockRows;
    const int64_t size = words_size + scales_size + rank * kBlockRows;
    Room room(count * size);
    for (int64_t b = 0; b < count; ++b) {
      float* to = room.data() + b * size;
      arrange(first + b, reinterpret_cast<uint32_t*>(to), to + words_size, to + words_size + scales_size);
      found[b] = {reinterpret_cast<uint32_t*>(to), to + words_size, to + words_size + scales_size};
    }
    f(found.data());
  }

 private:
  static const void* at(const void* from, int64_t index, int dtype) {
    return static_cast<const unsigned char*>(from) + index * element_size(dtype);
  }

  // A block of 16 rows of plain or tiled parts; rows that are not there are zero.
  void arrange(int64_t block, uint32_t* to_words, float* to_scales, float* to_up) const {
    constexpr int64_t kTileRows = 128;
    const bool tiled = arrangement == kTiles;
    const int64_t row = block * kBlockRows, count = std::min<int64_t>(kBlockRows, n - row);
    const int64_t tile = row / kTileRows, in_tile = row % kTileRows;
    const int64_t row_step = tiled ? kGroupWords : k / kWordColumns;
    const int64_t group_step = tiled ? kTileRows * kGroupWords : kGroupWords;
    const uint32_t* from = words + (tiled ? tile * groups() * group_step + in_tile * row_step : row * row_step);
    if (count < kBlockRows) std::fill_n(to_words, k / kWordColumns * kBlockRows, 0u);
    for (int64_t g = 0; g < groups(); ++g, from += group_step, to_words += kGroupWords * kBlockRows) {
      int64_t r = 0;
      for (; r + 4 <= count; r += 4)
        for (int64_t w = 0; w < kGroupWords; w += 4) {
          Quad<uint32_t> four[4];
          for (int j = 0; j < 4; ++j) std::memcpy(&four[j], from + (r + j) * row_step + w, sizeof four[j]);
          transpose_quads(four);
          for (int j = 0; j < 4; ++j) std::memcpy(to_words + (w + j) * kBlockRows + r, &four[j], sizeof four[j]);
        }
      for (; r < count; ++r)
        for (int64_t w = 0; w < kGroupWords; ++w) to_words[w * kBlockRows + r] = from[r * row_step + w];
    }
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t scale_at = tiled ? (tile * groups() + g) * kTileRows + in_tile : g * n + row;
      if (count < kBlockRows) std::fill_n(to_scales + g * kBlockRows, kBlockRows, 0.0f);
      copy_values(scales, scale_at, count, scale_dtype, to_scales + g * kBlockRows);
    }
    if (tiled) {
      for (int64_t r = 0; r < rank; ++r)
        copy_values(up, (tile * rank + r) * kTileRows + in_tile, kBlockRows, up_dtype, to_up + r * kBlockRows);
      return;
    }
    if (count < kBlockRows) std::fill_n(to_up, rank * kBlockRows, 0.0f);
    Room line(rank);
    for (int64_t i = 0; i < count; ++i) {
      copy_values(up, (row + i) * rank, rank, up_dtype, line.data());
      for (int64_t r = 0; r < rank; ++r) to_up[r * kBlockRows + i] = line.data()[r];
    }
  }

  static void copy_values(const void* from, int64_t at, int64_t count, int dtype, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_f32(to + i, load_as_f32(from, at + i, dtype));
    const int rest = static_cast<int>(count - i);
    if (rest) store_first(to, i, rest, load_first(from, at + i, rest, dtype), kFloat32);
  }
};

// ---- product --------------------------------------------------------------------------------------------------------

#if defined(LOWBIT_ISA_AVX512)
#define LOWBIT_OF_ITS_OWN __attribute__((noinline))
#else
#define LOWBIT_OF_ITS_OWN inline __attribute__((always_inline))
#endif

// sums[token][row] += the scaled products of a group, whose codes, starts and scales are at `record`. With tiles of
// many tokens a function of its own: the compiler would keep sums in registers that the products need.
template <int kTokens, int kBlocks, bool kBytes>
LOWBIT_OF_ITS_OWN void add_group(const uint32_t* const (&words)[kBlocks * kBlockVectors], const int8_t* record,
                                 const F32 (&scales)[kBlocks * kBlockVectors], Ahead& ahead, float* sums) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const auto* codes = reinterpret_cast<const uint32_t*>(record);
  const auto* starts = reinterpret_cast<const int32_t*>(record + kGroup * kTokens);
  const auto* factors = reinterpret_cast<const float*>(starts + kTokens);
  Dot4 dots[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    const Dot4 start = start_products<kBytes>(starts[t]);
    for (int v = 0; v < kVectors; ++v) dots[t][v] = start;
  }
  add_products<kGroupWords, kBytes>(dots, words, codes, ahead);
  for (int t = 0; t < kTokens; ++t) {
    const F32 d = set1_f32(factors[t]);
    for (int v = 0; v < kVectors; ++v) {
      float* sum = sums + (t * kVectors + v) * kLanes;
      store_f32(sum, fma(mul(to_f32(total(dots[t][v])), d), scales[v], load_f32(sum)));
    }
  }
}

// low: of the tile [rank, kTokens].
template <int kTokens, int kBlocks, bool kBytes>
__attribute__((noinline)) void multiply(const SvdquantWeight& w, const CodedTokens& x, const float* low, int64_t token,
                                        int64_t block, const Int4Block* blocks, Ahead ahead, const Output& out) {
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) expect_block(block + b, w.n, out.data, token + t, out.dtype);
  constexpr int kVectors = kBlocks * kBlockVectors;
  constexpr int64_t kRecord = (kGroup + CodedTokens::kTail) * kTokens;
  const int scale_dtype = w.tile_scale_dtype(), up_dtype = w.tile_up_dtype();
  const auto load = [](const void* from, int64_t row, int v, int dtype) {
    return load_as_f32(from, row * kBlockRows + v % kBlockVectors * kLanes, dtype);
  };
  alignas(64) float found[kTokens * kVectors * kLanes];
  for (int i = 0; i < kTokens * kVectors; ++i) store_f32(found + i * kLanes, zero_f32());
  const int8_t* record = x.row(token);
  const uint32_t* words[kVectors];
  for (int v = 0; v < kVectors; ++v) words[v] = blocks[v / kBlockVectors].words + v % kBlockVectors * kLanes;
  for (int64_t g = 0; g < w.groups(); ++g) {
    F32 scales[kVectors];
    for (int v = 0; v < kVectors; ++v) scales[v] = load(blocks[v / kBlockVectors].scales, g, v, scale_dtype);
    add_group<kTokens, kBlocks, kBytes>(words, record, scales, ahead, found);
    record += kRecord;
    for (int v = 0; v < kVectors; ++v) words[v] += kGroupWords * kBlockRows;
  }
  F32 sums[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kVectors; ++v) sums[t][v] = load_f32(found + (t * kVectors + v) * kLanes);
  for (int64_t r = 0; r < w.rank; ++r) {
    F32 up[kVectors];
    for (int v = 0; v < kVectors; ++v) up[v] = load(blocks[v / kBlockVectors].up, r, v, up_dtype);
    for (int t = 0; t < kTokens; ++t) {
      const F32 factor = set1_f32(low[r * kTokens + t]);
      for (int v = 0; v < kVectors; ++v) sums[t][v] = fma(up[v], factor, sums[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kBlocks; ++b) {
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) row[v] = sums[t][b * kBlockVectors + v];
      store_block(row, block + b, w.n, out.bias, out.bias_dtype, out.data, token + t, out.dtype);
    }
}

// [m, rank] -> of every tile of tokens [rank, tokens].
void arrange_low(const CodedTokens& x, int64_t rank, const float* low, float* to) {
  for (int64_t first = 0; first < x.m; first += x.together) {
    const int64_t tokens = std::min(x.together, x.m - first);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < rank; ++r) to[first * rank + r * tokens + t] = low[(first + t) * rank + r];
  }
}

template <bool kBytes>
void product_of(const SvdquantWeight& w, const CodedTokens& x, const float* low, const Output& out, int threads) {
  Room arranged(x.m * w.rank);
  arrange_low(x, w.rank, low, arranged.data());
  for_each_w4a4_tile(
      x, w.n, threads, [&](int64_t first, int64_t count, const auto& f) { w.blocks(first, count, f); },
      [&](int64_t token, int tokens, int64_t block, int together, const Int4Block* blocks, const Ahead& ahead) {
        with_count<kW4A4Tokens>(tokens, [&](auto count) {
          with_count<kW4A4Blocks>(together, [&](auto side_by_side) {
            constexpr int kTokens = decltype(count)::value, kBlocks = decltype(side_by_side)::value;
            multiply<kTokens, kBlocks, kBytes>(w, x, arranged.data() + token * w.rank, token, block, blocks, ahead,
                                               out);
          });
        });
      });
}

#if defined(LOWBIT_TILES)
// The sums of a tile's groups, in the order of `multiply`.
template <int kX, int kW>
void add_groups(const amx::Tiles& tiles, const SvdquantWeight& w, const CodedTokens& x, const int64_t (&tokens)[kX],
                const Int4Block* blocks, const uint32_t* const (&words)[kW], amx::Sums<kX, kW>& sums) {
  constexpr int64_t kRecord = kGroup + CodedTokens::kTail;
  sums.each([&](int i, int j, int t, int v) { store_f32(sums.total[i][j][t] + v * kLanes, zero_f32()); });
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int8_t* codes[kX];
    const uint32_t* from[kW];
    F32 scales[kW][kBlockVectors];
    for (int i = 0; i < kX; ++i) codes[i] = x.row(tokens[i]) + g * kRecord;
    for (int j = 0; j < kW; ++j) {
      from[j] = words[j] + g * kGroup / 4 * kBlockRows;
      for (int v = 0; v < kBlockVectors; ++v)
        scales[j][v] = load_as_f32(blocks[j].scales, g * kBlockRows + v * kLanes, w.tile_scale_dtype());
    }
    tiles.multiply(codes, x.row_bytes, from, kGroup / 4, sums.found);
    sums.each([&](int i, int j, int t, int v) {
      const F32 d = set1_f32(CodedTokens::scale(codes[i] + t * x.row_bytes, kGroup));
      float* total = sums.total[i][j][t] + v * kLanes;
      const F32 found = to_f32(load_i32(sums.found[i][j][t] + v * kLanes));
      store_f32(total, fma(mul(found, d), scales[j][v], load_f32(total)));
    });
  }
}

// The low-rank branch, some tokens at a time in registers.
template <int kX, int kW>
void add_low_rank(const SvdquantWeight& w, const float* low, const int64_t (&tokens)[kX], const Int4Block* blocks,
                  amx::Sums<kX, kW>& sums) {
  constexpr int kTogether = 4;
  for (int i = 0; i < kX; ++i)
    for (int t = 0; t < amx::kTokens; t += kTogether)
      for (int j = 0; j < kW; ++j) {
        F32 rows[kTogether][kBlockVectors];
        const auto each = [&](const auto& f) __attribute__((always_inline)) {
          for (int s = 0; s < kTogether; ++s)
            for (int v = 0; v < kBlockVectors; ++v) f(s, v, sums.total[i][j][t + s] + v * kLanes);
        };
        each([&](int s, int v, const float* total) { rows[s][v] = load_f32(total); });
        for (int64_t r = 0; r < w.rank; ++r) {
          F32 up[kBlockVectors];
          for (int v = 0; v < kBlockVectors; ++v)
            up[v] = load_as_f32(blocks[j].up, r * kBlockRows + v * kLanes, w.tile_up_dtype());
          for (int s = 0; s < kTogether; ++s) {
            const F32 factor = set1_f32(low[(tokens[i] + t + s) * w.rank + r]);
            for (int v = 0; v < kBlockVectors; ++v) rows[s][v] = fma(up[v], factor, rows[s][v]);
          }
        }
        each([&](int s, int v, float* total) { store_f32(total, rows[s][v]); });
      }
}

void product_of_tiles(const SvdquantWeight& w, const CodedTokens& x, const float* low, const Output& out, int threads) {
  amx::for_each_task(x.m, w.n, w.k, threads, [&](const amx::Task& task) {
    w.blocks(task.first_block, task.blocks(), [&](const Int4Block* found) {
      const SignedBytes bytes(found, task.blocks(), w.k);
      const amx::Tiles tiles(kGroup / 4);
      task.each<2>([&](const auto& tokens, int64_t block, auto side_by_side) {
        constexpr int kX = std::extent_v<std::remove_reference_t<decltype(tokens)>>;
        constexpr int kW = decltype(side_by_side)::value;
        const int64_t at = block - task.first_block;
        const uint32_t* words[kW];
        for (int j = 0; j < kW; ++j) words[j] = bytes.of(at + j);
        amx::Sums<kX, kW> sums;
        add_groups(tiles, w, x, tokens, found + at, words, sums);
        add_low_rank(w, low, tokens, found + at, sums);
        sums.store(tokens, block, w.n, out);
      });
    });
  });
}
#endif

// Whether so many tokens are multiplied by tiles.
bool takes_tiles([[maybe_unused]] int64_t m) {
#if defined(LOWBIT_TILES)
  return amx::takes(m, kGroup);
#else
  return false;
#endif
}

// Tokens as they are multiplied. `small`: all of their codes are within -7..7.
CodedTokens tokens_for(int64_t m, int64_t k, bool small) {
  const bool in_rows = takes_tiles(m);
  return {m, k, kGroup, kTakesBytes && small && !in_rows, in_rows};
}

void product(const SvdquantWeight& w, const CodedTokens& x, const float* low, const Output& out, int threads) {
#if defined(LOWBIT_TILES)
  if (takes_tiles(x.m)) return product_of_tiles(w, x, low, out, threads);
#endif
  if constexpr (kTakesBytes)
    if (x.as_bytes) return product_of<true>(w, x, low, out, threads);
  product_of<false>(w, x, low, out, threads);
}

}  // namespace

void linear_svdquant_w4a4(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, int64_t rank, float shift,
                          bool is_unsigned, Ptr<const void> smooth, int smooth_dtype, Ptr<const void> down,
                          int down_dtype, int arrangement, Ptr<const uint32_t> words, int64_t stride,
                          Ptr<const void> scales, int scale_dtype, Ptr<const void> up, int up_dtype,
                          Ptr<const void> bias, int bias_dtype, Ptr<void> out, int threads) {
  const Activations from{x, x_dtype, m, k};
  CodedTokens tokens = tokens_for(m, k, !is_unsigned);
  Room low(m * rank);
  const Smoothing smoothing{from, from, shift, smooth, smooth_dtype, down, down_dtype, rank, is_unsigned};
  const auto put = [&](int64_t token, int64_t first, const int8_t* codes, float scale) {
    tokens.put(token, first / kGroup, codes, scale);
  };
  quantize_and_project(smoothing, low.data(), threads, put);
  const SvdquantWeight weight{arrangement, words, stride, scales, scale_dtype, up, up_dtype, n, k, rank};
  product(weight, tokens, low.data(), {out, x_dtype, bias, bias_dtype}, threads);
}

// codes [m, k / 2], the even column in the low nibble; scales float32 [m, k / 64]; low [m, rank].
void quantize_svdquant_w4a4(Ptr<const void> x, int x_dtype, Ptr<const void> raw, int raw_dtype, int64_t m, int64_t k,
                            int64_t rank, bool is_unsigned, Ptr<const void> smooth, int smooth_dtype,
                            Ptr<const void> down, int down_dtype, Ptr<uint8_t> codes, Ptr<float> scales, Ptr<float> low,
                            int threads) {
  uint8_t* to = codes;
  float* to_scales = scales;
  const Activations from{x, x_dtype, m, k}, from_raw{raw, raw_dtype, m, k};
  const Smoothing smoothing{from, from_raw, 0.0f, smooth, smooth_dtype, down, down_dtype, rank, is_unsigned};
  quantize_and_project(smoothing, low, threads, [&](int64_t token, int64_t first, const int8_t* group, float scale) {
    for (int64_t c = 0; c < kGroup; c += 2)
      to[(token * k + first + c) / 2] = static_cast<uint8_t>((group[c] & 15) | (group[c + 1] & 15) << 4);
    to_scales[token * (k / kGroup) + first / kGroup] = scale;
  });
}

// codes as the function above makes them; scales [m, k / 64] and low [m, rank] float32.
void scaled_mm_svdquant_w4a4(Ptr<const uint8_t> codes, int64_t m, int64_t n, int64_t k, int64_t rank, bool is_unsigned,
                             Ptr<const float> x_scales, Ptr<const float> low, int arrangement,
                             Ptr<const uint32_t> words, Ptr<const void> scales, int scale_dtype, Ptr<const void> up,
                             int up_dtype, Ptr<const void> bias, int bias_dtype, Ptr<void> out, int out_dtype,
                             int threads) {
  CodedTokens tokens = tokens_for(m, k, false);  // others may have made codes of -8
  const uint8_t* from = codes;
  const float* from_scales = x_scales;
  parallel_for(m, m >= 8 ? threads : 1, [&](int64_t token) {
    alignas(64) int8_t group[kGroup];
    const int sign = is_unsigned ? 0 : 8;
    for (int64_t first = 0; first < k; first += kGroup) {
      for (int64_t c = 0; c < kGroup; c += 2) {
        const int byte = from[(token * k + first + c) / 2];
        group[c] = static_cast<int8_t>(((byte & 15) ^ sign) - sign);
        group[c + 1] = static_cast<int8_t>(((byte >> 4) ^ sign) - sign);
      }
      tokens.put(token, first / kGroup, group, from_scales[token * (k / kGroup) + first / kGroup]);
    }
  });
  const SvdquantWeight weight{arrangement, words, 0, scales, scale_dtype, up, up_dtype, n, k, rank};
  product(weight, tokens, low, {out, out_dtype, bias, bias_dtype}, threads);
}

void bind_linear_svdquant_w4a4(nb::module_& m) {
  m.def("linear_svdquant_w4a4", &linear_svdquant_w4a4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("rank"), nb::arg("shift"),
        nb::arg("is_unsigned"), nb::arg("smooth"), nb::arg("smooth_dtype"), nb::arg("down"), nb::arg("down_dtype"),
        nb::arg("arrangement"), nb::arg("words"), nb::arg("stride"), nb::arg("scales"), nb::arg("scale_dtype"),
        nb::arg("up"), nb::arg("up_dtype"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"), nb::arg("threads"));
  m.def("quantize_svdquant_w4a4", &quantize_svdquant_w4a4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"),
        nb::arg("x_dtype"), nb::arg("raw"), nb::arg("raw_dtype"), nb::arg("m"), nb::arg("k"), nb::arg("rank"),
        nb::arg("is_unsigned"), nb::arg("smooth"), nb::arg("smooth_dtype"), nb::arg("down"), nb::arg("down_dtype"),
        nb::arg("codes"), nb::arg("scales"), nb::arg("low"), nb::arg("threads"));
  m.def("scaled_mm_svdquant_w4a4", &scaled_mm_svdquant_w4a4, nb::call_guard<nb::gil_scoped_release>(), nb::arg("codes"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("rank"), nb::arg("is_unsigned"), nb::arg("x_scales"),
        nb::arg("low"), nb::arg("arrangement"), nb::arg("words"), nb::arg("scales"), nb::arg("scale_dtype"),
        nb::arg("up"), nb::arg("up_dtype"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"),
        nb::arg("out_dtype"), nb::arg("threads"));
}

}  // namespace lowbit
