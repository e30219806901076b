// The tile instructions of amx.h in plain C++, for machines that have none: Intel's "Software Developer's Manual",
// volume 2, LDTILECFG to TILEZERO. What a processor answers with a fault ends the process with a line that says why.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace lowbit::amx {

constexpr int kMostTiles = 8, kMostRows = 16, kMostBytes = 64;

// What LDTILECFG reads.
struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "as the processor reads it");

namespace emulated {

struct State {
  bool configured = false;
  Config config{};
  uint8_t tiles[kMostTiles][kMostRows][kMostBytes]{};
};

inline State& state() {
  static thread_local State of_thread;
  return of_thread;
}

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline void demand_tile(int tile) {
  const State& now = state();
  demand(now.configured, "no configuration was loaded (#UD)");
  demand(now.config.rows[tile] && now.config.row_bytes[tile], "a tile that is not configured (#UD)");
}

}  // namespace emulated

inline void configure(const Config& config) {
  using namespace emulated;
  demand(config.palette == 1 && config.start_row == 0, "palette 1 is the one there is, from row 0 on (#GP)");
  for (int i = 0; i < 14; ++i) demand(!config.reserved[i], "reserved bytes are not zero (#GP)");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    demand(tile < kMostTiles || (!rows && !bytes), "more than 8 tiles (#GP)");
    demand(rows <= kMostRows && bytes <= kMostBytes && !rows == !bytes, "a tile of a size that there is not (#GP)");
  }
  State& now = state();
  now = State();
  now.configured = true;
  now.config = config;
}

inline void release() { emulated::state() = emulated::State(); }

template <int kTile>
inline void zero() {
  emulated::demand_tile(kTile);
  std::memset(emulated::state().tiles[kTile], 0, sizeof emulated::state().tiles[kTile]);
}

// Rows of a tile, `stride` bytes apart; what the tile has not is zero.
template <int kTile>
inline void load(const void* from, int64_t stride) {
  zero<kTile>();
  emulated::State& now = emulated::state();
  for (int row = 0; row < now.config.rows[kTile]; ++row)
    std::memcpy(now.tiles[kTile][row], static_cast<const uint8_t*>(from) + row * stride, now.config.row_bytes[kTile]);
}

template <int kTile>
inline void store(void* to, int64_t stride) {
  emulated::demand_tile(kTile);
  const emulated::State& now = emulated::state();
  for (int row = 0; row < now.config.rows[kTile]; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, now.tiles[kTile][row], now.config.row_bytes[kTile]);
}

// TDPBSSD: sum[m][n] += the products of x[m][4 k..4 k + 3] and w[k][4 n..4 n + 3] for every k, signed bytes both. Sums
// wrap around.
template <int kSum, int kX, int kW>
inline void add_products() {
  using namespace emulated;
  static_assert(kSum != kX && kSum != kW && kX != kW, "three tiles");
  demand_tile(kSum), demand_tile(kX), demand_tile(kW);
  State& now = state();
  const Config& config = now.config;
  const int rows = config.rows[kSum], depth = config.row_bytes[kX] / 4, columns = config.row_bytes[kSum] / 4;
  demand(config.row_bytes[kX] % 4 == 0 && config.row_bytes[kSum] % 4 == 0, "a row that is not whole words (#UD)");
  demand(config.rows[kX] == rows && config.rows[kW] == depth && config.row_bytes[kW] == 4 * columns,
         "tiles whose sizes do not fit (#UD)");
  for (int m = 0; m < rows; ++m) {
    uint32_t sums[kMostBytes / 4];
    std::memcpy(sums, now.tiles[kSum][m], kMostBytes);
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < columns; ++n)
        for (int j = 0; j < 4; ++j)
          sums[n] += static_cast<uint32_t>(static_cast<int8_t>(now.tiles[kX][m][4 * k + j]) *
                                           static_cast<int8_t>(now.tiles[kW][k][4 * n + j]));
    std::memset(now.tiles[kSum][m], 0, kMostBytes);
    std::memcpy(now.tiles[kSum][m], sums, static_cast<size_t>(4 * columns));
  }
  for (int m = rows; m < kMostRows; ++m) std::memset(now.tiles[kSum][m], 0, kMostBytes);
}

}  // namespace lowbit::amx
