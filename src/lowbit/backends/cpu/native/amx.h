// Products of bytes by tiles (Intel AMX-INT8), in sets that have LOWBIT_TILES: 16 tokens times 16 rows of a weight, up
// to 64 columns of them, in one instruction.
//
// A tile of a weight is what the layout rows16 has: words of 4 columns, the same word of 16 rows beside each other. A
// tile of activations is as many columns of 16 tokens, in rows. Both are int8 with a sign; the sums are int32 and
// exact.
//
// The tile registers belong to a thread. A task configures them when it begins and releases them when it ends
// (`Tiles`), so that no other code and no forked process finds them in use. That the process may use them at all is
// asked for before this module is loaded (tile_permission.h).
#pragma once

#include "float_gemm.h"

#if defined(LOWBIT_TILES)

#if defined(LOWBIT_EMULATE)
#include "amx_emulated.h"
#else

namespace lowbit::amx {

// What LDTILECFG reads.
struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as the processor reads it");

// Not the compiler's own functions: GCC's take the number of a tile as text, which a template has not, and do not say
// that they read memory.
inline void configure(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }
template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows of a tile, `stride` bytes apart.
template <int kTile>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += the products of x[m][4 k..4 k + 3] and w[k][4 n..4 n + 3] for every k.
template <int kSum, int kX, int kW>
inline void add_products() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
}

}  // namespace lowbit::amx
#endif

namespace lowbit::amx {

constexpr int kTokens = 16;     // of a tile
constexpr int64_t kWords = 16;  // of 4 columns, the most of an instruction

// From how many tokens on, and from how many columns that share a scale, tiles are used: what fills a tile, and half of
// what fills an instruction. Not measured: these instructions have run emulated only.
constexpr int64_t kLeastTokens = kTokens, kLeastColumns = 32;
inline bool takes(int64_t tokens, int64_t columns) { return tokens >= kLeastTokens && columns >= kLeastColumns; }

// The sums of kX tiles of tokens and kW blocks of rows.
template <int kX, int kW>
struct Sums {
  alignas(64) int32_t found[kX][kW][kTokens][kBlockRows];
  alignas(64) float total[kX][kW][kTokens][kBlockRows];

  // f(tile, block, token in the tile, vector of rows), and again for all that there is.
  template <class F>
  static void each(const F& f) {
    for (int i = 0; i < kX; ++i)
      for (int j = 0; j < kW; ++j)
        for (int t = 0; t < kTokens; ++t)
          for (int v = 0; v < kBlockVectors; ++v) f(i, j, t, v);
  }

  void store(const int64_t (&tokens)[kX], int64_t block, int64_t n, const Output& out) const {
    for (int i = 0; i < kX; ++i)
      for (int j = 0; j < kW; ++j)
        for (int t = 0; t < kTokens; ++t) {
          simd::F32 row[kBlockVectors];
          for (int v = 0; v < kBlockVectors; ++v) row[v] = simd::load_f32(total[i][j][t] + v * simd::kLanes);
          store_block(row, block + j, n, out.bias, out.bias_dtype, out.data, tokens[i] + t, out.dtype);
        }
  }
};

// This thread's tile registers, for as long as this lives: 4 of sums, 2 of tokens, 2 of a weight.
class Tiles {
 public:
  // `words`: how many share a scale, of which as many as fit are multiplied at once.
  explicit Tiles(int64_t words) : depth_(std::min(words, kWords)) {
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool of_tokens = tile == 4 || tile == 5, of_weight = tile >= 6;
      config.rows[tile] = static_cast<uint8_t>(of_weight ? depth_ : kTokens);
      config.row_bytes[tile] = static_cast<uint16_t>(of_tokens ? 4 * depth_ : 4 * kBlockRows);
    }
    configure(config);
  }
  ~Tiles() { release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // found[i][j]: the products of `words` words of the tokens at x[i], `stride` bytes apart, with the block at w[j]. Up
  // to 60 bytes behind a token's are read, too.
  template <int kX, int kW>
  void multiply(const int8_t* const (&x)[kX], int64_t stride, const uint32_t* const (&w)[kW], int64_t words,
                int32_t (&found)[kX][kW][kTokens][kBlockRows]) const {
    zero<0>();
    if constexpr (kW > 1) zero<1>();
    if constexpr (kX > 1) zero<2>();
    if constexpr (kX > 1 && kW > 1) zero<3>();
    const int64_t depth = depth_;  // not read again after every load
    int64_t word = 0;
    for (; word + depth <= words; word += depth) {
      const uint32_t* at[kW];
      for (int j = 0; j < kW; ++j) at[j] = w[j] + word * kBlockRows;
      step(x, word * 4, stride, at);
    }
    if (word < words) {  // the rest, with zeros behind it
      alignas(64) uint32_t rest[kW][kWords * kBlockRows] = {};
      const uint32_t* at[kW];
      for (int j = 0; j < kW; ++j) {
        std::memcpy(rest[j], w[j] + word * kBlockRows, static_cast<size_t>((words - word) * kBlockRows) * 4);
        at[j] = rest[j];
      }
      step(x, word * 4, stride, at);
    }
    store<0>(found[0][0], 4 * kBlockRows);
    if constexpr (kW > 1) store<1>(found[0][1], 4 * kBlockRows);
    if constexpr (kX > 1) store<2>(found[1][0], 4 * kBlockRows);
    if constexpr (kX > 1 && kW > 1) store<3>(found[1][1], 4 * kBlockRows);
  }

 private:
  template <int kX, int kW>
  static void step(const int8_t* const (&x)[kX], int64_t first, int64_t stride, const uint32_t* const (&w)[kW]) {
    load<6>(w[0], 4 * kBlockRows);
    load<4>(x[0] + first, stride);
    add_products<0, 4, 6>();
    if constexpr (kW > 1) {
      load<7>(w[1], 4 * kBlockRows);
      add_products<1, 4, 7>();
    }
    if constexpr (kX > 1) {
      load<5>(x[1] + first, stride);
      add_products<2, 5, 6>();
      if constexpr (kW > 1) add_products<3, 5, 7>();
    }
  }

  int64_t depth_;
};

// A piece of a product: blocks of rows whose bytes stay in the second-level cache while 16 or more tokens pass.
struct Task {
  int64_t first_block, last_block, first_token, last_token;
  int worker;

  int64_t blocks() const { return last_block - first_block; }

  // f(tokens, block) for every tile: int64_t tokens[1..kMost] says where 16 tokens begin; 1 or 2 blocks from `block`
  // on, as an integral_constant. What is left of the tokens is the end of a whole tile, whose begin is multiplied
  // again.
  template <int kMost, class F>
  void each(const F& f) const {
    static_assert(kMost == 1 || kMost == 2, "as many as there are registers for");
    const auto begin = [&](int64_t tile) { return std::min(first_token + tile * kTokens, last_token - kTokens); };
    const int64_t tiles = (last_token - first_token + kTokens - 1) / kTokens;
    int64_t tile = 0;
    if constexpr (kMost == 2)
      for (; tile + 2 <= tiles; tile += 2) each_block<2>({begin(tile), begin(tile + 1)}, f);
    for (; tile < tiles; ++tile) each_block<1>({begin(tile)}, f);
  }

 private:
  template <int kX, class F>
  void each_block(const int64_t (&tokens)[kX], const F& f) const {
    int64_t block = first_block;
    for (; block + 2 <= last_block; block += 2) f(tokens, block, std::integral_constant<int, 2>{});
    for (; block < last_block; ++block) f(tokens, block, std::integral_constant<int, 1>{});
  }
};

constexpr int64_t kChunkTokens = 192, kTaskBytes = 256 * 1024;

// f(Task) over all of a product of m >= 16 tokens.
template <class F>
void for_each_task(int64_t m, int64_t n, int64_t k, int threads, const F& f) {
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows, chunks = (m + kChunkTokens - 1) / kChunkTokens;
  int64_t run = std::max<int64_t>(1, kTaskBytes / (k * kBlockRows));
  run = std::max<int64_t>(1, std::min(run, blocks * chunks / (8 * std::max(threads, 1))));
  if (run > 2) run -= run % 2;
  const int64_t runs = (blocks + run - 1) / run, tiles = (m + kTokens - 1) / kTokens;
  parallel_for(runs * chunks, threads, [&](int64_t task, int worker) {
    const int64_t first = task % runs * run, chunk = task / runs;
    const int64_t first_tile = tiles * chunk / chunks, last_tile = tiles * (chunk + 1) / chunks;
    f(Task{first, std::min(first + run, blocks), first_tile * kTokens, std::min(last_tile * kTokens, m), worker});
  });
}

}  // namespace lowbit::amx

#endif
