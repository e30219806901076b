// quantize and scale_search for the K-quants of gguf: their scales and codes (native/gguf_search.h), one code a byte.
//
// A thread takes as many blocks at a time as there are lanes, and turns them so that a vector holds one column of each.
#include "native/bind.h"
#include "native/encode.h"
#include "native/gguf_search.h"

namespace lowbit {
namespace {

using namespace simd;
using gguf::kSearchColumns;
using gguf::Scales;
using gguf::Search;

constexpr float kSmall = 0x1p-14f;  // of a block's largest value: below, its float16 may be the smallest there is

struct Found {
  float *factor, *zero_factor;  // one a block
  float *scales, *minima;       // of all units, block after block
  uint8_t* codes;
};

struct Tile {
  alignas(64) float x[kSearchColumns * kLanes];
  alignas(64) float weights[kSearchColumns * kLanes];

  static void put(float* to, const float* block, int lane) {
    for (int c = 0; c < kSearchColumns; ++c) to[c * kLanes + lane] = block[c];
  }
  F32 column(int c) const { return load_f32(x + c * kLanes); }
};

// Turns blocks over whose units lie above 0 rather than below it; -1 for these and 1 for others.
F32 turn(Tile& tile, int unit) {
  F32 above = zero_f32(), below = zero_f32();
  for (int first = 0; first < kSearchColumns; first += unit) {
    F32 low = tile.column(first), high = low;
    for (int c = first; c < first + unit; ++c) {
      low = min(low, tile.column(c));
      high = max(high, tile.column(c));
    }
    low = max(low, zero_f32());
    high = min(high, zero_f32());
    above = fma(low, low, above);
    below = fma(high, high, below);
  }
  const F32 sign = select(less(below, above), set1_f32(-1.0f), set1_f32(1.0f));
  for (int c = 0; c < kSearchColumns; ++c) store_f32(tile.x + c * kLanes, mul(tile.column(c), sign));
  return sign;
}

// Codes under what is stored, divided as they are read back: `offset` is the one of level 0.
void encode(const Tile& tile, const Search& how, const Scales& found, float offset, uint8_t* codes) {
  for (int u = 0; u < how.units(); ++u) {
    const F32 step = found.step(u), zero = how.zeros() ? found.zero(u) : zero_f32();
    const Mask used = less(zero_f32(), abs(step));
    const F32 divisor = select(used, step, set1_f32(std::numeric_limits<float>::infinity()));
    for (int c = u * how.unit; c < (u + 1) * how.unit; ++c) {
      const F32 level = gguf::nearest_whole(div(sub(tile.column(c), zero), divisor), how.low, how.high);
      store_low_bytes(codes + c * kLanes, to_i32(add(level, set1_f32(offset))));
    }
  }
}

template <bool kWeighted>
void search_tile(Tile& tile, const Search& how, float offset, bool small, Scales& found, uint8_t* codes) {
  const F32 sign = how.zeros() ? turn(tile, how.unit) : set1_f32(1.0f);
  const gguf::SearchedBlocks<kWeighted> blocks(how, tile.x, tile.weights);
  found = blocks.run();
  if (small) blocks.at_least_zeros(found);
  encode(tile, how, found, offset, codes);
  found.factor = mul(found.factor, sign);
  found.zero_factor = mul(found.zero_factor, sign);
}

// The scales and codes of `count` lanes, from block `first` on.
void put_away(const Scales& found, const uint8_t* codes, int units, int64_t first, int count, const Found& to) {
  alignas(64) float values[4][kLanes];
  store_f32(values[0], found.factor);
  store_f32(values[1], found.zero_factor);
  for (int lane = 0; lane < count; ++lane) {
    to.factor[first + lane] = values[0][lane];
    to.zero_factor[first + lane] = values[1][lane];
    for (int c = 0; c < kSearchColumns; ++c) to.codes[(first + lane) * kSearchColumns + c] = codes[c * kLanes + lane];
  }
  for (int u = 0; u < units; ++u) {
    store_f32(values[2], found.scales[u]);
    store_f32(values[3], found.minima[u]);
    for (int lane = 0; lane < count; ++lane) {
      to.scales[(first + lane) * units + u] = values[2][lane];
      to.minima[(first + lane) * units + u] = values[3][lane];
    }
  }
}

bool search(const Matrix& w, const float* weights, const Search& how, float offset, const Found& to, int threads) {
  const std::vector<float> columns = weights ? gguf::relative(weights, w.k, kSearchColumns) : std::vector<float>{};
  const int64_t blocks = w.n * w.k / kSearchColumns, in_row = w.k / kSearchColumns;
  const float most = 65504.0f * how.last;  // beyond, a sum of squares may overflow
  std::atomic<bool> finite{true};
  with_dtype(w.dtype, [&](auto dtype) {
    parallel_for((blocks + kLanes - 1) / kLanes, threads, [&](int64_t task) {
      Tile tile;
      alignas(64) float block[kSearchColumns + kLanes];  // a compiler sees loads of what is behind, which never run
      alignas(64) uint8_t codes[kSearchColumns * kLanes];
      const int64_t first = task * kLanes;
      const auto count = static_cast<int>(std::min<int64_t>(kLanes, blocks - first));
      bool small = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t at = first + std::min(lane, count - 1);
        const int32_t bits =
            load_row<dtype.value>(w.values, at * kSearchColumns, kSearchColumns, block, kSearchColumns);
        if (bits >= kInfinityBits) {
          finite = false;
          return;
        }
        small |= float_of(bits) < kSmall;
        for (int c = 0; c < kSearchColumns; ++c) block[c] = std::clamp(block[c], -most, most);
        Tile::put(tile.x, block, lane);
        if (weights) Tile::put(tile.weights, columns.data() + at % in_row * kSearchColumns, lane);
      }
      Scales found;
      if (weights)
        search_tile<true>(tile, how, offset, small, found, codes);
      else
        search_tile<false>(tile, how, offset, small, found, codes);
      put_away(found, codes, how.units(), first, count, to);
    });
  });
  return finite;
}

}  // namespace

// False: the weight holds NaN or infinity, and what was written means nothing. tries, factors: as many as their counts.
bool quantize_gguf_k(Ptr<const void> w, int dtype, int64_t n, int64_t k, Ptr<const float> weights, int unit, float low,
                     float high, float offset, float first, float last, Ptr<const float> tries, int64_t try_count,
                     int64_t passes, Ptr<const float> factors, int64_t factor_count, int64_t rounds, bool both_signs,
                     Ptr<float> factor, Ptr<float> zero_factor, Ptr<float> scales, Ptr<float> minima,
                     Ptr<uint8_t> codes, int threads) {
  const Search how{tries, try_count, passes, factors, factor_count, rounds, both_signs, unit, low, high, first, last};
  return search({w, dtype, n, k}, weights, how, offset, {factor, zero_factor, scales, minima, codes}, threads);
}

void bind_quantize_gguf_k(nb::module_& m) {
  m.def("quantize_gguf_k", &quantize_gguf_k, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("dtype"),
        nb::arg("n"), nb::arg("k"), nb::arg("weights"), nb::arg("unit"), nb::arg("low"), nb::arg("high"),
        nb::arg("offset"), nb::arg("first"), nb::arg("last"), nb::arg("tries"), nb::arg("try_count"), nb::arg("passes"),
        nb::arg("factors"), nb::arg("factor_count"), nb::arg("rounds"), nb::arg("both_signs"), nb::arg("factor"),
        nb::arg("zero_factor"), nb::arg("scales"), nb::arg("minima"), nb::arg("codes"), nb::arg("threads"));
}

}  // namespace lowbit
