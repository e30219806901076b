// The blocks of GGUF files, of 16 rows at a time, with rows as lanes:
//
//   w = (code - kOffset) * step + zero        one step (and zero) for every kUnit columns
//
// Where rows lie as they do in the file, the words of one block of 16 rows are interleaved in the cache; in the layout
// gguf_rows16 they lie like that. From there on everything is done lane by lane: what the headers pack in six bits is
// unpacked for as many rows as a vector has lanes. Steps, zeros and values are made by the operations of the reference
// (`numerics.gguf_blocks`) in its order, so that they are the same bit for bit.
//
// A type states
//
//   kColumns, kSize, kUnit        the columns and bytes of a block, the columns that share a step
//   kOffset, kSigned              the code of level 0; whether codes are int8 (elsewhere they are 0..63)
//   kZero                         whether there are zeros
//   kHalves                       where the float16 of the header lie
//   kBody, kBodyWords             where the words lie that are interleaved, four at a time: at least four
//   kLoose, kLooseBytes           a word behind them that lies elsewhere (-1: none), and how many of its bytes count
//   kSpan                         after how many columns the pattern of the codes begins again
//   codes<q>(words, span, v)      columns 4 q .. 4 q + 3 of a span, for the rows of vector v
//   steps(words, v, step, zero)   of all units
#pragma once

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "float_gemm.h"
#include "transpose.h"

namespace lowbit {
namespace gguf {

using namespace simd;

inline I32 every_byte(int byte) { return set1_i32(static_cast<int32_t>(0x01010101u * static_cast<uint32_t>(byte))); }

// One block of 16 rows.
template <class T>
struct Words {
  using Type = T;
  static constexpr int kCount = T::kBodyWords + (T::kLoose >= 0);
  alignas(64) uint32_t words[kCount * kBlockRows];
  alignas(64) uint16_t halves[T::kHalves.size() + 1][kBlockRows];

  // The last four overlap with those before where there are not as many: behind a block there may be nothing to read.
  static constexpr int four_words_at(int from) { return std::min(from, T::kBodyWords - 4); }

  // From byte `at` of every row on.
  void gather(const uint8_t* const (&rows)[kBlockRows], int64_t at) {
#if defined(LOWBIT_ISA_AVX512) && !defined(LOWBIT_EMULATE)
    // Whole vectors: what is stored in pieces would have to reach the cache before it can be loaded.
    for (int from = 0; from < T::kBodyWords; from += 4) {
      const int word = four_words_at(from);
      simd::interleave_words(rows, at + T::kBody + 4 * word, words + word * kBlockRows);
    }
    if constexpr (T::kLoose >= 0) {
      const I32 mask = set1_i32(T::kLooseBytes == 4 ? -1 : (1 << 8 * (T::kLooseBytes % 4)) - 1);
      store_i32(words + T::kBodyWords * kBlockRows, bit_and(gather_words(rows, at + T::kLoose), mask));
    }
    for (size_t half = 0; half < T::kHalves.size(); ++half) {
      // Four bytes are read: behind the last of a block there may be none, so that one there is read with those before.
      constexpr int kLast = T::kSize - 4;
      const int from = std::min(T::kHalves[half], kLast);
      const I32 word = gather_words(rows, at + from);
      store_low_halves(halves[half], from == T::kHalves[half] ? word : shift_right<16>(word));
    }
#else
    for (int from = 0; from < T::kBodyWords; from += 4) {
      const int word = four_words_at(from);
      interleave_words(rows, at + T::kBody + 4 * word, words + word * kBlockRows);
    }
    if constexpr (T::kLoose >= 0) {
      for (int r = 0; r < kBlockRows; ++r) {
        uint32_t word = 0;  // whose low bytes come first on every machine that there are kernels for
        std::memcpy(&word, rows[r] + at + T::kLoose, T::kLooseBytes);
        words[T::kBodyWords * kBlockRows + r] = word;
      }
    }
    for (size_t half = 0; half < T::kHalves.size(); ++half)
      for (int r = 0; r < kBlockRows; ++r) std::memcpy(&halves[half][r], rows[r] + at + T::kHalves[half], 2);
#endif
  }

  I32 word(int index, int v) const { return load_i32(words + index * kBlockRows + v * kLanes); }
  I32 loose(int v) const { return word(T::kBodyWords, v); }
  F32 half(int index, int v) const { return load_f16(halves[index] + v * kLanes); }
};

// The same of a block in the layout gguf_rows16, where it lies.
template <class T>
struct PackedWords {
  using Type = T;
  static constexpr int kHeaderWords = T::kHalves.size() && T::kHalves[0] >= T::kBody &&
                                      T::kHalves[0] < T::kBody + 4 * T::kBodyWords;  // float16 at the body's begin
  static constexpr bool kLooseWord = T::kLoose >= 0 && T::kLooseBytes == 4, kByte = T::kLoose >= 0 && !kLooseWord;
  static constexpr int kFirst = kLooseWord - kHeaderWords;  // where the body's first word would lie
  static constexpr int kCount = kFirst + T::kBodyWords;
  static_assert(4 * kCount + 2 * static_cast<int>(T::kHalves.size()) + kByte == T::kSize, "every byte lies somewhere");

  const uint32_t* words;
  const uint16_t* halves;
  const uint8_t* bytes;

  I32 word(int index, int v) const { return load_i32(words + (index + kFirst) * kBlockRows + v * kLanes); }
  I32 loose(int v) const {
    if constexpr (kByte) return widen_u8(bytes + v * kLanes);
    return load_i32(words + v * kLanes);
  }
  F32 half(int index, int v) const { return load_f16(halves + index * kBlockRows + v * kLanes); }
};

// Where codes of four bits lie in runs of kRun words: the low nibbles of a run, then its high ones.
template <int kRun, int q, class W>
inline Bytes nibbles(const W& words, int first, int v) {
  static_assert(q < 2 * kRun, "a quad of one pair of runs");
  const Bytes both = as_bytes(words.word(first + q % kRun, v));
  return q / kRun ? high_nibbles(both) : low_nibbles(both);
}

// Bit kFrom of every byte moved to bit kTo, with its neighbours; what `mask` keeps of them.
template <int kFrom, int kTo>
inline I32 moved_bits(I32 word, int mask) {
  if constexpr (kFrom > kTo) return bit_and(shift_right<kFrom - kTo>(word), every_byte(mask));
  if constexpr (kFrom < kTo) return bit_and(shift_left<kTo - kFrom>(word), every_byte(mask));
  return bit_and(word, every_byte(mask));
}

// Byte kByte of every lane as float32.
template <int kByte, bool kSigned = false>
inline F32 byte_value(I32 word) {
  if constexpr (kSigned) return to_f32(shift_right_signed<24>(kByte == 3 ? word : shift_left<24 - 8 * kByte>(word)));
  const I32 low = kByte ? shift_right<8 * kByte>(word) : word;
  return to_f32(kByte == 3 ? low : bit_and(low, set1_i32(0xff)));
}

// ---- types of one step a block ------------------------------------------------------------------------------------

struct OneUnit {
  static constexpr int kColumns = 32, kUnit = 32, kSpan = 32, kBodyWords = 4, kOffset = 0;
  static constexpr int kLoose = -1, kLooseBytes = 4;
  static constexpr bool kSigned = false, kZero = false;
  static constexpr std::array<int, 1> kHalves{0};

  template <class W>
  static void steps(const W& words, int v, F32* step, F32* zero) {
    step[0] = words.half(0, v);
    if constexpr (W::Type::kZero) zero[0] = words.half(1, v);
  }
  template <int q, class W>
  static Bytes codes(const W& words, int, int v) {
    return nibbles<4, q>(words, 0, v);
  }
};

struct Q4_0 : OneUnit {
  static constexpr int kSize = 18, kBody = 2, kOffset = 8;
};

struct Q4_1 : OneUnit {
  static constexpr int kSize = 20, kBody = 4;
  static constexpr bool kZero = true;
  static constexpr std::array<int, 2> kHalves{0, 2};
};

// The fifth bits lie in a word of their own, in the order of the columns.
struct FiveBits : OneUnit {
  template <int q, class W>
  static Bytes codes(const W& words, int, int v) {
    const I32 four = bit_and(q ? shift_right<4 * q>(words.loose(v)) : words.loose(v), set1_i32(15));
    const I32 spread = bit_and(mul(four, set1_i32(0x00204081)), every_byte(1));  // bit j to byte j
    return as_bytes(bit_or(as_i32(nibbles<4, q>(words, 0, v)), shift_left<4>(spread)));
  }
};

struct Q5_0 : FiveBits {
  static constexpr int kSize = 22, kLoose = 2, kBody = 6, kOffset = 16;
};

struct Q5_1 : FiveBits {
  static constexpr int kSize = 24, kLoose = 4, kBody = 8;
  static constexpr bool kZero = true;
  static constexpr std::array<int, 2> kHalves{0, 2};
};

struct Q8_0 : OneUnit {
  static constexpr int kSize = 34, kBody = 2, kBodyWords = 8;
  static constexpr bool kSigned = true;

  template <int q, class W>
  static Bytes codes(const W& words, int, int v) {
    return as_bytes(words.word(q, v));
  }
};

// ---- K-quants: 256 columns ----------------------------------------------------------------------------------------

struct Q2_K {
  static constexpr int kColumns = 256, kSize = 84, kUnit = 16, kSpan = 128, kOffset = 0;
  static constexpr int kBody = 0, kBodyWords = 20, kLoose = -1, kLooseBytes = 4;  // 16 bytes of steps, then codes
  static constexpr bool kSigned = false, kZero = true;
  static constexpr std::array<int, 2> kHalves{80, 82};

  template <class W>
  static void steps(const W& words, int v, F32* step, F32* zero) {
    const F32 d = words.half(0, v), least = mul(words.half(1, v), set1_f32(-1.0f));
    for_each_place<16>([&](auto unit) {
      constexpr int u = decltype(unit)::value;
      const I32 word = words.word(u / 4, v);
      step[u] = mul(d, byte_value<u % 4>(as_i32(low_nibbles(as_bytes(word)))));
      zero[u] = mul(least, byte_value<u % 4>(as_i32(high_nibbles(as_bytes(word)))));
    });
  }
  template <int q, class W>
  static Bytes codes(const W& words, int span, int v) {
    return as_bytes(moved_bits<2 * (q / 8), 0>(words.word(4 + span * 8 + q % 8, v), 3));
  }
};

struct Q3_K {
  static constexpr int kColumns = 256, kSize = 110, kUnit = 16, kSpan = 256, kOffset = 4;
  static constexpr int kBody = 0, kBodyWords = 27, kLoose = -1, kLooseBytes = 4;  // third bits, two bits, steps
  static constexpr bool kSigned = false, kZero = false;
  static constexpr std::array<int, 1> kHalves{108};

  // Of six bits each, 32 more than they mean: the nibbles of two words, then the upper two bits of one.
  template <class W>
  static void steps(const W& words, int v, F32* step, F32*) {
    const F32 d = words.half(0, v);
    const I32 upper = words.word(26, v);
    for_each_place<4>([&](auto quarter) {
      constexpr int k = decltype(quarter)::value;
      const Bytes both = as_bytes(words.word(24 + k % 2, v));
      const I32 low = as_i32(k / 2 ? high_nibbles(both) : low_nibbles(both));
      const I32 six = bit_or(low, moved_bits<2 * k, 4>(upper, 0x30));
      for_each_place<4>([&](auto byte) {
        constexpr int j = decltype(byte)::value;
        step[4 * k + j] = mul(d, sub(byte_value<j>(six), set1_f32(32.0f)));
      });
    });
  }
  template <int q, class W>
  static Bytes codes(const W& words, int, int v) {
    const I32 low = moved_bits<2 * (q / 8 % 4), 0>(words.word(8 + q / 32 * 8 + q % 8, v), 3);
    return as_bytes(bit_or(low, moved_bits<q / 8, 2>(words.word(q % 8, v), 4)));
  }
};

// Eight scales and eight minima of six bits, in three words.
template <class W>
inline void six_bit_steps(const W& words, int v, F32* step, F32* zero) {
  const F32 d = words.half(0, v), least = mul(words.half(1, v), set1_f32(-1.0f));
  const I32 first = words.word(1, v), second = words.word(2, v), upper = words.word(3, v);
  const auto low = [](I32 word) { return bit_and(word, every_byte(0x3f)); };
  const auto high = [](I32 four, I32 two) { return bit_or(four, bit_and(shift_right<2>(two), every_byte(0x30))); };
  const I32 scales[2] = {low(first), high(as_i32(low_nibbles(as_bytes(upper))), first)};
  const I32 minima[2] = {low(second), high(as_i32(high_nibbles(as_bytes(upper))), second)};
  for_each_place<8>([&](auto unit) {
    constexpr int u = decltype(unit)::value;
    step[u] = mul(d, byte_value<u % 4>(scales[u / 4]));
    zero[u] = mul(least, byte_value<u % 4>(minima[u / 4]));
  });
}

struct Q4_K {
  static constexpr int kColumns = 256, kSize = 144, kUnit = 32, kSpan = 64, kOffset = 0;
  static constexpr int kBody = 0, kBodyWords = 36, kLoose = -1, kLooseBytes = 4;
  static constexpr bool kSigned = false, kZero = true;
  static constexpr std::array<int, 2> kHalves{0, 2};

  template <class W>
  static void steps(const W& words, int v, F32* step, F32* zero) {
    six_bit_steps(words, v, step, zero);
  }
  template <int q, class W>
  static Bytes codes(const W& words, int span, int v) {
    return nibbles<8, q>(words, 4 + span * 8, v);
  }
};

struct Q5_K {
  static constexpr int kColumns = 256, kSize = 176, kUnit = 32, kSpan = 256, kOffset = 0;
  static constexpr int kBody = 0, kBodyWords = 44, kLoose = -1, kLooseBytes = 4;  // fifth bits before the others
  static constexpr bool kSigned = false, kZero = true;
  static constexpr std::array<int, 2> kHalves{0, 2};

  template <class W>
  static void steps(const W& words, int v, F32* step, F32* zero) {
    six_bit_steps(words, v, step, zero);
  }
  template <int q, class W>
  static Bytes codes(const W& words, int, int v) {
    const Bytes low = nibbles<8, q % 16>(words, 12 + q / 16 * 8, v);
    return as_bytes(bit_or(as_i32(low), moved_bits<q / 8, 4>(words.word(4 + q % 8, v), 0x10)));
  }
};

struct Q6_K {
  static constexpr int kColumns = 256, kSize = 210, kUnit = 16, kSpan = 128, kOffset = 32;
  static constexpr int kBody = 0, kBodyWords = 52, kLoose = -1, kLooseBytes = 4;  // four bits, two bits, steps
  static constexpr bool kSigned = false, kZero = false;
  static constexpr std::array<int, 1> kHalves{208};

  template <class W>
  static void steps(const W& words, int v, F32* step, F32*) {
    const F32 d = words.half(0, v);
    for_each_place<16>([&](auto unit) {
      constexpr int u = decltype(unit)::value;
      step[u] = mul(d, byte_value<u % 4, true>(words.word(48 + u / 4, v)));
    });
  }
  template <int q, class W>
  static Bytes codes(const W& words, int span, int v) {
    const Bytes low = nibbles<16, q>(words, span * 16, v);
    return as_bytes(bit_or(as_i32(low), moved_bits<2 * (q / 8), 4>(words.word(32 + span * 8 + q % 8, v), 0x30)));
  }
};

// ---- 4-bit floats, doubled, so that they are integers ---------------------------------------------------------------

alignas(16) constexpr int8_t kDoubledE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct MXFP4 {
  static constexpr int kColumns = 32, kSize = 17, kUnit = 32, kSpan = 32, kOffset = 0;
  static constexpr int kBody = 1, kBodyWords = 4, kLoose = 0, kLooseBytes = 1;
  static constexpr bool kSigned = true, kZero = false;
  static constexpr std::array<int, 0> kHalves{};

  template <class W>
  static void steps(const W& words, int v, F32* step, F32*) {  // 2^(e - 128)
    const I32 e = words.loose(v), one = set1_i32(1);
    const I32 subnormal = shift_left<21>(add(e, one));  // 2^-128 and 2^-127
    step[0] = as_f32(select(less(one, e), shift_left<23>(sub(e, one)), subnormal));
  }
  template <int q, class W>
  static Bytes codes(const W& words, int, int v) {
    return lookup_bytes(kDoubledE2m1, nibbles<4, q>(words, 0, v));
  }
};

struct NVFP4 {
  static constexpr int kColumns = 64, kSize = 36, kUnit = 16, kSpan = 16, kOffset = 0;
  static constexpr int kBody = 4, kBodyWords = 8, kLoose = 0, kLooseBytes = 4;
  static constexpr bool kSigned = true, kZero = false;
  static constexpr std::array<int, 0> kHalves{};

  // Half of an e4m3 value whose sign does not count; 0x7f is zero.
  template <class W>
  static void steps(const W& words, int v, F32* step, F32*) {
    for_each_place<4>([&](auto unit) {
      constexpr int u = decltype(unit)::value;
      const I32 byte = bit_and(shift_right<8 * u>(words.loose(v)), set1_i32(0xff));
      const I32 magnitude = bit_and(byte, set1_i32(0x7f));
      const F32 normal = as_f32(add(shift_left<20>(magnitude), set1_i32((127 - 8) << 23)));
      const F32 small = mul(to_f32(magnitude), set1_f32(0x1p-10f));
      const F32 value = select(less(magnitude, set1_i32(8)), small, normal);
      step[u] = select(equal(byte, set1_i32(0x7f)), zero_f32(), value);
    });
  }
  template <int q, class W>
  static Bytes codes(const W& words, int span, int v) {
    return lookup_bytes(kDoubledE2m1, nibbles<2, q>(words, span * 2, v));
  }
};

// f(T{}) of the type with that number, which is its place in TYPES of gguf_rows.py. Another number throws.
template <class F>
void with_type(int type, const F& f) {
  switch (type) {
    case 0:
      return f(Q4_0{});
    case 1:
      return f(Q4_1{});
    case 2:
      return f(Q5_0{});
    case 3:
      return f(Q5_1{});
    case 4:
      return f(Q8_0{});
    case 5:
      return f(Q2_K{});
    case 6:
      return f(Q4_K{});
    case 7:
      return f(Q5_K{});
    case 8:
      return f(Q6_K{});
    case 9:
      return f(MXFP4{});
    case 10:
      return f(NVFP4{});
    case 11:
      return f(Q3_K{});
    default:
      throw std::invalid_argument("no GGUF type has the number " + std::to_string(type) +
                                  " here; TYPES of gguf_rows.py lists them");
  }
}

// The values of one block: column c of row r to panel[c * stride + r]. factor: what steps and zeros are times.
template <class W>
inline void decode(const W& words, float* panel, int64_t stride, float factor = 1.0f) {
  using T = typename W::Type;
  constexpr int kUnits = T::kColumns / T::kUnit;
  for (int v = 0; v < kBlockVectors; ++v) {
    F32 step[kUnits], zero[kUnits];
    T::steps(words, v, step, zero);
    for (int u = 0; u < kUnits; ++u) {
      step[u] = mul(step[u], set1_f32(factor));
      if constexpr (T::kZero) zero[u] = mul(zero[u], set1_f32(factor));
    }
    for (int span = 0; span < T::kColumns / T::kSpan; ++span)
      for_each_place<T::kSpan / 4>([&](auto quad) {
        constexpr int q = decltype(quad)::value;
        const I32 codes = as_i32(T::template codes<q>(words, span, v));
        const int column = span * T::kSpan + 4 * q, unit = column / T::kUnit;
        for_each_place<4>([&](auto place) {
          constexpr int j = decltype(place)::value;
          F32 level = byte_value<j, T::kSigned>(codes);
          if constexpr (T::kOffset) level = sub(level, set1_f32(T::kOffset));
          F32 value = mul(level, step[unit]);
          if constexpr (T::kZero) value = add(value, zero[unit]);
          store_f32(panel + (column + j) * stride + v * kLanes, value);
        });
      });
  }
}

// A weight is read strip after strip of 16 rows: `strip(i)` is one, and its `read(block, words)` gives a block of each
// row. The last row stands for those that are not there, or zeros do, and the last strip for one that is not.

constexpr int64_t kAheadOfRow = 512;  // bytes of a plain row that are asked for before they are needed

// Blocks as they lie in the file, rows `stride` bytes apart.
template <class T>
struct PlainBlocks {
  using Words = gguf::Words<T>;
  static constexpr bool kInPlace = false;

  struct Strip {
    const uint8_t* rows[kBlockRows];  // any of the weight

    void read(int64_t block, Words& words) const { words.gather(rows, block * T::kSize); }
    // Ask for kCount blocks that follow some others.
    template <int kCount>
    void ask(int64_t block) const {
      for (const uint8_t* row : rows)
        for (int line = 0; line < kCount * T::kSize; line += 64)
          __builtin_prefetch(row + block * T::kSize + kAheadOfRow + line);
    }
  };

  const uint8_t* codes;
  int64_t stride, n, k;

  Strip strip(int64_t i) const {
    Strip found;
    for (int r = 0; r < kBlockRows; ++r) found.rows[r] = codes + std::min(i * kBlockRows + r, n - 1) * stride;
    return found;
  }
  const uint8_t* from(int64_t strip) const { return codes + std::min(strip * kBlockRows, n) * stride; }
};

// Blocks in the layout gguf_rows16, strips `stride` bytes apart.
template <class T>
struct PackedBlocks {
  using Words = PackedWords<T>;
  static constexpr bool kInPlace = true;

  struct Strip {
    const uint8_t* at;
    int64_t blocks;

    void read(int64_t block, Words& words) const {
      constexpr int kWordBytes = 4 * Words::kCount * kBlockRows;
      const uint8_t *halves = at + blocks * kWordBytes, *bytes = halves + blocks * kHalfBytes;
      words.words = reinterpret_cast<const uint32_t*>(at + block * kWordBytes);
      words.halves = reinterpret_cast<const uint16_t*>(halves + block * kHalfBytes);
      words.bytes = bytes + block * kBlockRows;
    }
    template <int kCount>
    void ask(int64_t block) const {
      const uint8_t* from = at + block * T::kSize * kBlockRows + kAheadBytes;
      for (int line = 0; line < kCount * T::kSize * kBlockRows; line += 64) __builtin_prefetch(from + line);
    }
  };
  static constexpr int kHalfBytes = 2 * static_cast<int>(T::kHalves.size()) * kBlockRows;

  const uint8_t* codes;
  int64_t stride, n, k;

  Strip strip(int64_t i) const { return {codes + std::min(i, (n - 1) / kBlockRows) * stride, k / T::kColumns}; }
  const uint8_t* from(int64_t strip) const { return codes + strip * stride; }
};

}  // namespace gguf
}  // namespace lowbit
