// Products of the blocks of GGUF files with activations as int16, where a set multiplies four pairs of bytes at once.
//
// Codes stay bytes: 0..63, or int8 with 128 added. Activations are the two bytes of an int16, and a unit's sum is that
// of the low ones and 256 times that of the high ones. Two blocks of 16 rows share what is read of the activations, in
// whose tiles the tokens lie beside each other.
#pragma once

#include "gguf_blocks.h"
#include "int4_gemm.h"

namespace lowbit {
namespace gguf {

constexpr int kByteTokens = 6;  // 24 sums of two pieces and two blocks in 32 registers
constexpr int kByteRowBlocks = 2;
// Packed blocks are decoded in registers, once for every tile, up to so many tokens of so many a tile.
constexpr int64_t kInPlaceMost = 8;
constexpr int kInPlaceTokens = 4;

// Integers as int4_gemm.h makes them, in tiles of nearly equal size.
class ByteTokens {
 public:
  // Of each four columns: for every token its low bytes, then its high ones. Whole units share a scale. A tile has at
  // most `most` tokens.
  ByteTokens(const Activations& x, int64_t columns_a_scale, int64_t unit, int most, int threads)
      : ByteTokens(IntegerRows(x, columns_a_scale, unit, threads), x, unit, most, threads) {}

  bool few() const { return m_ <= kInPlaceMost; }
  int64_t count() const { return count_; }
  int64_t begin(int64_t tile) const { return m_ * tile / count_; }  // its first token
  int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
  // From a column on of the tile that a token begins.
  const int8_t* bytes(int64_t token, int size, int64_t column) const {
    return reinterpret_cast<const int8_t*>(bytes_.data()) + (token * k_ + column * size) * 2;
  }
  // From a unit on: the scales of the tile's tokens, their sums, and the sums of their integers, which are int32.
  const float* scales(int64_t token, int size, int64_t unit) const {
    return scales_.data() + (token * units_ + unit * size) * kFactors;
  }

 private:
  using IntegerRows = IntegerTokens<2, 4, false, true>;
  static constexpr int kFactors = 3;  // of a token and a unit

  ByteTokens(const IntegerRows& rows, const Activations& x, int64_t unit, int most, int threads)
      : m_(x.m),
        k_(x.k),
        units_(x.k / unit),
        count_((x.m + most - 1) / most),
        bytes_(x.m * x.k / 2),
        scales_(x.m * units_ * kFactors) {
    parallel_for(count_, m_ * k_ >= 32768 ? threads : 1, [&](int64_t tile) {
      const int64_t token = begin(tile), tokens = size(tile);
      auto* words = reinterpret_cast<int32_t*>(bytes_.data()) + token * k_ / 2;
      float* scales = scales_.data() + token * units_ * kFactors;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int piece = 0; piece < 2; ++piece) {
          const int8_t* from = rows.row(token + t, piece);
          int32_t* to = words + t * 2 + piece;
          for (int64_t quad = 0; quad < k_ / 4; ++quad, to += tokens * 2) std::memcpy(to, from + quad * 4, 4);
        }
        for (int64_t u = 0; u < units_; ++u) {
          const int64_t from = (token + t) * units_ + u;
          float* to = scales + u * kFactors * tokens + t;
          to[0] = rows.d[from];
          to[tokens] = rows.sums[from];
          std::memcpy(to + 2 * tokens, rows.whole + from, sizeof(float));
        }
      }
    });
  }

  int64_t m_, k_, units_, count_;
  Room bytes_, scales_;
};

// Some blocks of columns of two blocks of rows.
template <class T>
struct ByteBlocks {
  static constexpr int kBlocks = std::max(1, 128 / T::kColumns);
  static constexpr int kUnits = T::kColumns / T::kUnit, kQuads = T::kColumns / 4;  // of a block
  static constexpr bool kAdds = T::kZero || T::kOffset != 0;
  static_assert(!T::kSigned || !kAdds, "a byte that gets 128 has no other offset");
  static constexpr int kStride = kByteRowBlocks * kBlockRows;

  alignas(64) int32_t codes[kBlocks * kQuads * kStride];
  alignas(64) float steps[kBlocks * kUnits * kStride];
  alignas(64) float added[kAdds ? kBlocks * kUnits * kStride : kStride];  // to a unit's sum, times its activations'

  template <class W>
  void put(int block, int row_block, const W& words) {
    for (int v = 0; v < kBlockVectors; ++v) {
      const int lanes = row_block * kBlockRows + v * kLanes;
      F32 step[kUnits], zero[kUnits];
      T::steps(words, v, step, zero);
      for (int u = 0; u < kUnits; ++u) {
        store_f32(steps + (block * kUnits + u) * kStride + lanes, step[u]);
        if constexpr (!T::kZero) zero[u] = mul(step[u], set1_f32(-T::kOffset));
        if constexpr (kAdds) store_f32(added + (block * kUnits + u) * kStride + lanes, zero[u]);
      }
      for (int span = 0; span < T::kColumns / T::kSpan; ++span)
        for_each_place<T::kSpan / 4>([&](auto place) {
          constexpr int q = decltype(place)::value;
          const I32 quad = as_i32(T::template codes<q>(words, span, v));
          int32_t* to = codes + (block * kQuads + span * (T::kSpan / 4) + q) * kStride + lanes;
          store_i32(to, T::kSigned ? bit_xor(quad, every_byte(0x80)) : quad);
        });
    }
  }
};

// sum + what the integer sums of a unit, of low and of high bytes, come to for token t of a tile. kSigned: codes have
// 128 added.
template <bool kSigned, bool kAdds, int kTokens>
inline __attribute__((always_inline)) F32 add_unit(const Dot4 (&dots)[2], F32 step, F32 added, const float* scales,
                                                   int t, F32 sum) {
  I32 dot = add(total(dots[0]), shift_left<8>(total(dots[1])));
  if constexpr (kSigned) {  // while they are integers: 128 times a step may be infinite
    int32_t whole;
    std::memcpy(&whole, scales + 2 * kTokens + t, sizeof whole);
    dot = sub(dot, set1_i32(128 * whole));
  }
  if constexpr (kAdds) sum = fma(added, set1_f32(scales[kTokens + t]), sum);
  return fma(to_f32(dot), mul(step, set1_f32(scales[t])), sum);
}

// sums[t][row] += the products of some units with a tile of kTokens tokens. kSigned: codes have 128 added.
template <int kUnit, bool kSigned, bool kAdds, int kTokens>
__attribute__((noinline)) void multiply_bytes(int units, const int32_t* codes, const float* steps, const float* added,
                                              const int8_t* x, const float* scales, float* sums) {
  constexpr int kVectors = kByteRowBlocks * kBlockVectors;
  for (int unit = 0; unit < units; ++unit) {
    Dot4 dots[kTokens][kVectors][2];
    for (auto& row : dots)
      for (auto& pieces : row)
        for (auto& dot : pieces) dot = zero_dot4();
    for_each_place<kUnit / 4>([&](auto) __attribute__((always_inline)) {
      Bytes w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = load_bytes(codes + v * kLanes);
      for (int t = 0; t < kTokens; ++t)
        for (int piece = 0; piece < 2; ++piece) {
          const Bytes four = set4_bytes(x + t * 8 + piece * 4);
          for (int v = 0; v < kVectors; ++v) dots[t][v][piece] = dot4(dots[t][v][piece], w[v], four);
        }
      codes += kVectors * kLanes;
      x += kTokens * 8;
    });
    for (int v = 0; v < kVectors; ++v) {
      const F32 step = load_f32(steps + v * kLanes);
      for (int t = 0; t < kTokens; ++t) {
        float* sum = sums + t * kVectors * kLanes + v * kLanes;
        const F32 zero = kAdds ? load_f32(added + v * kLanes) : zero_f32();
        store_f32(sum, add_unit<kSigned, kAdds, kTokens>(dots[t][v], step, zero, scales, t, load_f32(sum)));
      }
    }
    steps += kVectors * kLanes;
    if constexpr (kAdds) added += kVectors * kLanes;
    scales += 3 * kTokens;
  }
}

template <class T, int kMost = kByteTokens>
inline void multiply_bytes_of(int tokens, int count, const ByteBlocks<T>& blocks, const ByteTokens& x, int64_t token,
                              int64_t column, float* sums) {
  if constexpr (kMost > 0) {
    if (tokens < kMost) return multiply_bytes_of<T, kMost - 1>(tokens, count, blocks, x, token, column, sums);
    multiply_bytes<T::kUnit, T::kSigned, ByteBlocks<T>::kAdds, kMost>(
        count * ByteBlocks<T>::kUnits, blocks.codes, blocks.steps, blocks.added, x.bytes(token, kMost, column),
        x.scales(token, kMost, column / T::kUnit), sums);
  }
}

// The product of kTokens tokens with two strips of packed blocks, which are decoded in registers: [kTokens, 32] sums,
// the same bit for bit as those of ByteBlocks. Of other strips the next lies `more` bytes behind the end of these two.
template <class T, int kTokens>
__attribute__((noinline)) void multiply_in_place(const typename PackedBlocks<T>::Strip (&strips)[kByteRowBlocks],
                                                 int64_t more, const int8_t* x, const float* scales, float* sums) {
  using Words = PackedWords<T>;
  static_assert(kBlockVectors == 1, "a strip is a vector wide");
  constexpr int kUnits = T::kColumns / T::kUnit, kUnitQuads = T::kUnit / 4, kSpanUnits = T::kSpan / T::kUnit;
  constexpr int kQuads = T::kColumns / 4;
  constexpr bool kAdds = ByteBlocks<T>::kAdds;
  F32 acc[kTokens][kByteRowBlocks];
  for (auto& row : acc)
    for (auto& sum : row) sum = zero_f32();
  for (int64_t block = 0; block < strips[0].blocks; ++block) {
    Words words[kByteRowBlocks];
    F32 step[kByteRowBlocks][kUnits], zero[kByteRowBlocks][kUnits];
    for (int b = 0; b < kByteRowBlocks; ++b) {
      strips[b].read(block, words[b]);
      T::steps(words[b], 0, step[b], zero[b]);
    }
    const int64_t left = (strips[0].blocks - block) * T::kSize * kBlockRows;  // bytes of a strip
    const int64_t beyond = left > kAheadBytes ? 0 : more;
    for (int span = 0; span < T::kColumns / T::kSpan; ++span)
      for_each_place<kSpanUnits>([&](auto place) __attribute__((always_inline)) {
        constexpr int kAt = decltype(place)::value;
        const int unit = span * kSpanUnits + kAt;
        Dot4 dots[kTokens][kByteRowBlocks][2];
        for (auto& row : dots)
          for (auto& pieces : row)
            for (auto& dot : pieces) dot = zero_dot4();
        for_each_place<kUnitQuads>([&](auto quad) __attribute__((always_inline)) {
          constexpr int kQuad = kAt * kUnitQuads + decltype(quad)::value;
          const int at = span * (T::kSpan / 4) + kQuad;
          for (int line = at * Words::kCount / kQuads; line < (at + 1) * Words::kCount / kQuads; ++line)
            for (int b = 0; b < kByteRowBlocks; ++b) ask_ahead(words[b].words + line * kBlockRows, beyond);
          Bytes w[kByteRowBlocks];
          for (int b = 0; b < kByteRowBlocks; ++b) {
            w[b] = T::template codes<kQuad>(words[b], span, 0);
            if constexpr (T::kSigned) w[b] = as_bytes(bit_xor(as_i32(w[b]), every_byte(0x80)));
          }
          for (int t = 0; t < kTokens; ++t)
            for (int piece = 0; piece < 2; ++piece) {
              const Bytes four = set4_bytes(x + t * 8 + piece * 4);
              for (int b = 0; b < kByteRowBlocks; ++b) dots[t][b][piece] = dot4(dots[t][b][piece], w[b], four);
            }
          x += kTokens * 8;
        });
        for (int b = 0; b < kByteRowBlocks; ++b) {
          const F32 added = T::kZero ? zero[b][unit] : mul(step[b][unit], set1_f32(-T::kOffset));
          for (int t = 0; t < kTokens; ++t)
            acc[t][b] = add_unit<T::kSigned, kAdds, kTokens>(dots[t][b], step[b][unit], added, scales, t, acc[t][b]);
        }
        scales += 3 * kTokens;
      });
  }
  for (int t = 0; t < kTokens; ++t)
    for (int b = 0; b < kByteRowBlocks; ++b) store_f32(sums + (t * kByteRowBlocks + b) * kBlockRows, acc[t][b]);
}

template <class T, int kMost = kInPlaceTokens>
inline void multiply_in_place_of(int tokens, const typename PackedBlocks<T>::Strip (&strips)[kByteRowBlocks],
                                 int64_t more, const ByteTokens& x, int64_t token, float* sums) {
  if constexpr (kMost > 0) {
    if (tokens < kMost) return multiply_in_place_of<T, kMost - 1>(tokens, strips, more, x, token, sums);
    multiply_in_place<T, kMost>(strips, more, x.bytes(token, kMost, 0), x.scales(token, kMost, 0), sums);
  }
}

// A weight (PlainBlocks or PackedBlocks) all of whose values are times a factor.
template <class T, class Blocks>
class BytesGemm {
 public:
  BytesGemm(const Blocks& w, float factor, const ByteTokens& x, const Output& out)
      : w_(w), factor_(factor), x_(x), out_(out) {}

  void run(int threads) const {
    const int64_t groups = (w_.n + kRows - 1) / kRows, chunks = (x_.count() + kChunkTiles - 1) / kChunkTiles;
    // Some groups a task, so that a thread reads on where it has read.
    const int64_t run = std::max<int64_t>(1, std::min<int64_t>(8, groups * chunks / (8 * std::max(threads, 1))));
    const int64_t runs = (groups + run - 1) / run;
    parallel_for(runs * chunks, threads, [&](int64_t task) {
      const int64_t chunk = task / runs, first = task % runs * run, last = std::min(first + run, groups);
      for (int64_t group = first; group < last; ++group)
        multiply(group, x_.count() * chunk / chunks, x_.count() * (chunk + 1) / chunks);
    });
  }

 private:
  using Strip = typename Blocks::Strip;
  static constexpr int kRows = kByteRowBlocks * kBlockRows;
  static constexpr int64_t kChunkTiles = 192 / kByteTokens;
  // Blocks that are read before the first is used: what was just interleaved is stored.
  static constexpr int kTogether = ByteBlocks<T>::kBlocks;

  // The rows of a group with some tiles.
  void multiply(int64_t group, int64_t first_tile, int64_t last_tile) const {
    const int64_t first_token = x_.begin(first_tile), tokens = x_.begin(last_tile) - first_token;
    const Room sums_room(tokens * kRows);
    float* sums = sums_room.data();
    const Strip strips[kByteRowBlocks] = {w_.strip(group * kByteRowBlocks), w_.strip(group * kByteRowBlocks + 1)};
    if constexpr (Blocks::kInPlace) {
      if (x_.few()) {
        for (int64_t tile = 0; tile < x_.count(); ++tile)
          multiply_in_place_of<T>(x_.size(tile), strips, (kByteRowBlocks - 1) * w_.stride, x_, x_.begin(tile),
                                  sums + x_.begin(tile) * kRows);
        return store(group, 0, tokens, sums);
      }
    }
    std::fill_n(sums, tokens * kRows, 0.0f);
    // Rows follow each other in memory: what the next group reads is asked for in the order in which it lies there.
    const uint8_t* ahead = w_.from((group + 1) * kByteRowBlocks);
    for (int64_t first = 0; first < w_.k; first += kTogether * T::kColumns) {
      const int count = static_cast<int>(std::min<int64_t>(kTogether, (w_.k - first) / T::kColumns));
      for (const uint8_t* end = ahead + count * kRows * T::kSize; ahead < end; ahead += 64)
        __builtin_prefetch(ahead, 0, 2);
      ByteBlocks<T> blocks;
      for (int b = 0; b < kByteRowBlocks; ++b) {
        typename Blocks::Words words[kTogether];
        for (int i = 0; i < count; ++i) strips[b].read(first / T::kColumns + i, words[i]);
        for (int i = 0; i < count; ++i) blocks.put(i, b, words[i]);
      }
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t token = x_.begin(tile);
        multiply_bytes_of<T>(x_.size(tile), count, blocks, x_, token, first, sums + (token - first_token) * kRows);
      }
    }
    store(group, first_token, tokens, sums);
  }

  void store(int64_t group, int64_t first_token, int64_t tokens, const float* sums) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int b = 0; b < kByteRowBlocks; ++b) {
        F32 row_sums[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v)
          row_sums[v] = mul(load_f32(sums + t * kRows + b * kBlockRows + v * kLanes), set1_f32(factor_));
        store_block(row_sums, group * kByteRowBlocks + b, w_.n, out_.bias, out_.bias_dtype, out_.data, first_token + t,
                    out_.dtype);
      }
  }

  Blocks w_;
  float factor_;
  const ByteTokens& x_;
  const Output& out_;
};

}  // namespace gguf
}  // namespace lowbit
