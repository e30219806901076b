// Every vector operation of one instruction set against plain C++, lane by lane and bit by bit. Exits with 1 and names
// what differs.
#include "native/simd.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace lowbit;
using namespace lowbit::simd;

constexpr float kInf = std::numeric_limits<float>::infinity();

int g_checks = 0, g_failures = 0;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void expect(bool right, const char* what, const std::string& about) {
  ++g_checks;
  if (right) return;
  if (++g_failures <= 40) std::printf("%s: %s\n", what, about.c_str());
}
template <class T>
void expect_bits(const char* what, T found, T wanted, const std::string& about = "") {
  char text[96];
  std::snprintf(text, sizeof text, "found %llx, wanted %llx ", static_cast<unsigned long long>(found),
                static_cast<unsigned long long>(wanted));
  expect(found == wanted, what, found == wanted ? "" : text + about);
}
void expect_float(const char* what, float found, float wanted, float x, float y = 0) {
  if (std::isnan(wanted) && std::isnan(found)) return expect(true, what, "");  // which NaN is nobody's business
  if (bits_of(found) == bits_of(wanted)) return expect(true, what, "");
  char text[128];
  std::snprintf(text, sizeof text, "found %a, wanted %a, for %a and %a", found, wanted, x, y);
  expect(false, what, text);
}

struct Floats {
  float at[kLanes];
  explicit Floats(F32 a) { store_f32(at, a); }
};
struct Ints {
  int32_t at[kLanes];
  explicit Ints(I32 a) { store_i32(at, a); }
};

std::mt19937 g_random(20240607);
uint32_t random_bits() { return static_cast<uint32_t>(g_random()); }

// Floats where something may go wrong, and random ones of all sizes; a multiple of kLanes of them.
std::vector<float> floats() {
  std::vector<float> made = {0.0f,
                             -0.0f,
                             1.0f,
                             -1.0f,
                             0.5f,
                             1.5f,
                             2.5f,
                             -0.5f,
                             -1.5f,
                             -2.5f,
                             0.49999997f,
                             kInf,
                             -kInf,
                             std::nanf(""),
                             -std::nanf(""),
                             float_of(0x7f800001),
                             float_of(0xff812345),
                             float_of(1),
                             float_of(0x80000001),
                             float_of(0x007fffff),
                             0x1p-126f,
                             0x1p-149f,
                             0x1p127f,
                             -0x1p127f,
                             std::numeric_limits<float>::max(),
                             std::numeric_limits<float>::lowest(),
                             0x1p31f,
                             -0x1p31f,
                             0x1.fffffep30f,
                             -0x1.fffffep30f,
                             0x1p32f,
                             0x1p63f,
                             -0x1p64f,
                             8388607.5f,
                             8388608.0f,
                             -8388607.5f,
                             4194303.5f,
                             4194304.5f,
                             16777217.0f,
                             126.5f,
                             127.5f,
                             -127.5f,
                             -128.5f};
  for (int i = 0; i < 4000; ++i) made.push_back(float_of(random_bits()));
  for (int i = 0; i < 2000; ++i) made.push_back(std::ldexp(static_cast<float>(random_bits() % 4096) - 2048, -2));
  while (made.size() % 16) made.push_back(3.0f);
  return made;
}
std::vector<int32_t> ints() {
  std::vector<int32_t> made = {0,   1,    -1,   INT32_MAX, INT32_MIN, INT32_MIN + 1, 255,
                               256, -128, -129, 65535,     65536,     0xff00,        16777217};
  for (int i = 0; i < 1000; ++i) made.push_back(static_cast<int32_t>(random_bits()));
  while (made.size() % 16) made.push_back(3);
  return made;
}

// f(x, y) of vectors against g(x, y) of numbers, over pairs that put everything beside everything at some time.
template <class F, class G>
void binary_f32(const char* what, const F& f, const G& g) {
  const auto all = floats();
  const size_t n = all.size();
  std::vector<float> other(n);
  for (const size_t shift : {size_t{0}, size_t{1}, size_t{5}, size_t{13}, n / 2 + 3}) {
    for (size_t i = 0; i < n; ++i) other[i] = all[(i + shift) % n];
    for (size_t i = 0; i < n; i += kLanes) {
      const Floats found(f(load_f32(&all[i]), load_f32(&other[i])));
      for (int j = 0; j < kLanes; ++j)
        expect_float(what, found.at[j], g(all[i + j], other[i + j]), all[i + j], other[i + j]);
    }
  }
}
template <class F, class G>
void binary_i32(const char* what, const F& f, const G& g) {
  const auto all = ints();
  const size_t n = all.size();
  std::vector<int32_t> other(n);
  for (const size_t shift : {size_t{0}, size_t{1}, size_t{3}, n / 2 + 3}) {
    for (size_t i = 0; i < n; ++i) other[i] = all[(i + shift) % n];
    for (size_t i = 0; i < n; i += kLanes) {
      const Ints found(f(load_i32(&all[i]), load_i32(&other[i])));
      for (int j = 0; j < kLanes; ++j)
        expect_bits(what, found.at[j], static_cast<int32_t>(g(all[i + j], other[i + j])));
    }
  }
}

void test_float32() {
  binary_f32("add", [](F32 a, F32 b) { return add(a, b); }, [](float a, float b) { return a + b; });
  binary_f32("sub", [](F32 a, F32 b) { return sub(a, b); }, [](float a, float b) { return a - b; });
  binary_f32("mul", [](F32 a, F32 b) { return mul(a, b); }, [](float a, float b) { return a * b; });
  binary_f32("div", [](F32 a, F32 b) { return div(a, b); }, [](float a, float b) { return a / b; });
  binary_f32("min", [](F32 a, F32 b) { return min(a, b); }, [](float a, float b) { return a < b ? a : b; });
  binary_f32("max", [](F32 a, F32 b) { return max(a, b); }, [](float a, float b) { return a > b ? a : b; });
  binary_f32("abs", [](F32 a, F32) { return abs(a); }, [](float a, float) { return std::fabs(a); });
#if defined(LOWBIT_ISA_PORTABLE) && !defined(__FP_FAST_FMAF)
  const auto multiply_add = [](float a, float b, float c) { return a * b + c; };
#else
  const auto multiply_add = [](float a, float b, float c) { return std::fma(a, b, c); };
#endif
  binary_f32(
      "fma", [](F32 a, F32 b) { return fma(a, b, sub(b, a)); },
      [&](float a, float b) { return multiply_add(a, b, b - a); });
  binary_f32(
      "set1_f32, zero_f32", [](F32, F32) { return add(set1_f32(3.25f), zero_f32()); },
      [](float, float) { return 3.25f; });

  // min and max give the second of what has no order, to the bit: a NaN, and a zero of either sign.
  const Floats low(min(set1_f32(0.0f), set1_f32(-0.0f))), high(max(set1_f32(0.0f), set1_f32(-0.0f)));
  expect_bits("min of zeros", bits_of(low.at[0]), 0x80000000u);
  expect_bits("max of zeros", bits_of(high.at[kLanes - 1]), 0x80000000u);
  expect_float("max of NaN and a number", Floats(max(set1_f32(std::nanf("")), set1_f32(2))).at[0], 2, 0);

  for (int round = 0; round < 100; ++round) {
    float lanes[kLanes], sum = 0, most = -kInf;
    for (float& lane : lanes) {
      lane = static_cast<float>(static_cast<int>(random_bits() % 20001) - 10000) / 8;
      sum += lane;  // exact in any order
      most = std::fmax(most, lane);
    }
    expect_float("reduce_add", reduce_add(load_f32(lanes)), sum, lanes[0]);
    expect_float("reduce_max", reduce_max(load_f32(lanes)), most, lanes[0]);
  }
}

template <int kBits>
void test_shifts() {
  binary_i32(
      "shift_left", [](I32 a, I32) { return shift_left<kBits>(a); },
      [](int32_t a, int32_t) { return static_cast<uint32_t>(a) << kBits; });
  binary_i32(
      "shift_right", [](I32 a, I32) { return shift_right<kBits>(a); },
      [](int32_t a, int32_t) { return static_cast<uint32_t>(a) >> kBits; });
  binary_i32(
      "shift_right_signed", [](I32 a, I32) { return shift_right_signed<kBits>(a); },
      [](int32_t a, int32_t) { return a >> kBits; });
}

void test_int32() {
  const auto wrap = [](auto f) {
    return [f](int32_t a, int32_t b) { return f(static_cast<uint32_t>(a), static_cast<uint32_t>(b)); };
  };
  binary_i32("add", [](I32 a, I32 b) { return add(a, b); }, wrap([](uint32_t a, uint32_t b) { return a + b; }));
  binary_i32("sub", [](I32 a, I32 b) { return sub(a, b); }, wrap([](uint32_t a, uint32_t b) { return a - b; }));
  binary_i32("mul", [](I32 a, I32 b) { return mul(a, b); }, wrap([](uint32_t a, uint32_t b) { return a * b; }));
  binary_i32("bit_and", [](I32 a, I32 b) { return bit_and(a, b); }, [](int32_t a, int32_t b) { return a & b; });
  binary_i32("bit_or", [](I32 a, I32 b) { return bit_or(a, b); }, [](int32_t a, int32_t b) { return a | b; });
  binary_i32("bit_xor", [](I32 a, I32 b) { return bit_xor(a, b); }, [](int32_t a, int32_t b) { return a ^ b; });
  binary_i32("min", [](I32 a, I32 b) { return min(a, b); }, [](int32_t a, int32_t b) { return a < b ? a : b; });
  binary_i32("max", [](I32 a, I32 b) { return max(a, b); }, [](int32_t a, int32_t b) { return a > b ? a : b; });
  binary_i32(
      "set1_i32, zero_i32", [](I32, I32) { return add(set1_i32(-7), zero_i32()); },
      [](int32_t, int32_t) { return -7; });
  test_shifts<0>();
  test_shifts<1>();
  test_shifts<4>();
  test_shifts<16>();
  test_shifts<28>();
  test_shifts<31>();
  for (const int32_t first : ints()) {
    int32_t lanes[kLanes];
    uint32_t sum = 0;
    for (int32_t& lane : lanes) {
      lane = &lane == lanes ? first : static_cast<int32_t>(random_bits());
      sum += static_cast<uint32_t>(lane);
    }
    expect_bits("reduce_add", static_cast<uint32_t>(reduce_add(load_i32(lanes))), sum);
  }
}

void test_conversions() {
  binary_i32(
      "to_f32", [](I32 a, I32) { return as_i32(to_f32(a)); },
      [](int32_t a, int32_t) { return bits_of(static_cast<float>(a)); });
  binary_i32("as_f32", [](I32 a, I32) { return as_i32(as_f32(a)); }, [](int32_t a, int32_t) { return a; });
  binary_i32("as_bytes", [](I32 a, I32) { return as_i32(as_bytes(a)); }, [](int32_t a, int32_t) { return a; });
  const auto all = floats();
  for (size_t i = 0; i < all.size(); i += kLanes) {
    const Ints found(to_i32(load_f32(&all[i])));
    for (int j = 0; j < kLanes; ++j) {
      const float x = all[i + j];
      const int32_t wanted =
          std::fabs(x) < 0x1p31f ? static_cast<int32_t>(std::nearbyint(static_cast<double>(x))) : INT32_MIN;
      expect_bits("to_i32", found.at[j], wanted, std::to_string(x));
    }
  }
  for (int round = 0; round < 64; ++round) {
    uint8_t from[kLanes + 1];
    int8_t from_signed[kLanes + 1];
    uint16_t wide[kLanes + 1];
    for (int j = 0; j <= kLanes; ++j) {
      from[j] = static_cast<uint8_t>(random_bits());
      std::memcpy(&from_signed[j], &from[j], 1);
      wide[j] = static_cast<uint16_t>(random_bits());
    }
    const Ints bytes(widen_u8(from + 1)), signs(widen_s8(from_signed + 1)), halves(widen_u16(wide + 1));
    uint8_t low[kLanes + 2] = {};
    store_low_bytes(low + 1, load_i32(bytes.at));
    for (int j = 0; j < kLanes; ++j) {
      expect_bits<int32_t>("widen_u8", bytes.at[j], from[j + 1]);
      expect_bits<int32_t>("widen_s8", signs.at[j], from_signed[j + 1]);
      expect_bits<int32_t>("widen_u16", halves.at[j], wide[j + 1]);
      expect_bits("store_low_bytes", low[j + 1], from[j + 1]);
    }
    expect(low[0] == 0 && low[kLanes + 1] == 0, "store_low_bytes", "writes beside its bytes");
  }
  for (size_t i = 0; i < ints().size(); i += kLanes) {
    const auto values = ints();
    uint8_t low[kLanes];
    store_low_bytes(low, load_i32(&values[i]));
    for (int j = 0; j < kLanes; ++j) expect_bits("store_low_bytes cuts", low[j], static_cast<uint8_t>(values[i + j]));
  }
}

void test_masks() {
  binary_f32(
      "less and select", [](F32 a, F32 b) { return select(less(a, b), a, set1_f32(7)); },
      [](float a, float b) { return a < b ? a : 7; });
  binary_f32(
      "not_a_number", [](F32 a, F32 b) { return select(not_a_number(a), set1_f32(7), b); },
      [](float a, float b) { return a != a ? 7 : b; });
  binary_i32(
      "less and select", [](I32 a, I32 b) { return select(less(a, b), a, set1_i32(7)); },
      [](int32_t a, int32_t b) { return a < b ? a : 7; });
  binary_i32(
      "equal", [](I32 a, I32 b) { return select(equal(a, bit_and(b, set1_i32(-2))), b, set1_i32(7)); },
      [](int32_t a, int32_t b) { return a == (b & -2) ? b : 7; });
  for (int lane = -1; lane < kLanes; ++lane) {
    int32_t lanes[kLanes] = {};
    if (lane >= 0) lanes[lane] = 5;
    expect(any(equal(load_i32(lanes), set1_i32(5))) == (lane >= 0), "any", "one lane");
  }
}

// What a 16-bit float with so many bits of fraction stands for, and which of them is nearest to a float32.
float decode_half(uint32_t half) {
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023, sign = half >> 15;
  if (exponent == 31) return float_of(sign << 31 | 0x7f800000 | (fraction ? 0x400000 : 0) | fraction << 13);
  const double size =
      exponent ? std::ldexp(1024.0 + fraction, static_cast<int>(exponent) - 25) : std::ldexp(fraction, -24);
  return static_cast<float>(sign ? -size : size);
}
uint32_t encode_half(float x) {
  const uint32_t sign = bits_of(x) >> 31 << 15;
  if (x != x) return sign | 0x7e00 | (bits_of(x) >> 13 & 0x3ff);
  const double size = std::fabs(static_cast<double>(x));
  if (size >= 65520) return sign | 0x7c00;
  if (size < 0x1p-14) return sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24));
  const int exponent = std::ilogb(size);
  return sign | (static_cast<uint32_t>(exponent + 14) * 1024 +
                 static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent))));
}
uint32_t encode_bf16(float x) {
  const uint32_t below = bits_of(x) >> 16;
  if (x != x) return below | 0x40;
  if (std::isinf(x)) return below;
  const auto value = [](uint32_t bf16) {
    return bf16 % 0x8000 == 0x7f80 ? 0x1p128 : std::fabs(static_cast<double>(float_of(bf16 << 16)));
  };
  const double size = std::fabs(static_cast<double>(x)), down = size - value(below), up = value(below + 1) - size;
  return up < down || (up == down && below % 2) ? below + 1 : below;
}

void test_small_floats() {
  std::vector<float> rounded = floats();
  for (uint32_t half = 0; half < 65536; half += kLanes) {
    uint16_t from[kLanes];
    for (int j = 0; j < kLanes; ++j) from[j] = static_cast<uint16_t>(half + j);
    const Ints halves(as_i32(load_f16(from))), brains(as_i32(load_bf16(from)));
    for (int j = 0; j < kLanes; ++j) {
      expect_bits("load_f16", static_cast<uint32_t>(halves.at[j]), bits_of(decode_half(from[j])),
                  std::to_string(from[j]));
      expect_bits("load_bf16", static_cast<uint32_t>(brains.at[j]), static_cast<uint32_t>(from[j]) << 16);
      // What lies between two of them: the tie, and the floats beside it. Each is rounded to both formats.
      for (const uint32_t wide :
           {bits_of(decode_half(from[j])) + 0x1000, static_cast<uint32_t>(from[j]) << 16 | 0x8000})
        for (const uint32_t near : {wide - 1, wide, wide + 1}) rounded.push_back(float_of(near));
      const float half_step = (decode_half(from[j]) + decode_half((from[j] + 1) & 0xffff)) / 2;  // of subnormals, too
      if (half_step == half_step) rounded.push_back(half_step);
    }
  }
  while (rounded.size() % 16) rounded.push_back(1.0f);
  for (size_t i = 0; i < rounded.size(); i += kLanes) {
    uint16_t half[kLanes + 2] = {1}, brain[kLanes + 2] = {1};
    half[kLanes + 1] = brain[kLanes + 1] = 1;
    store_f16(half + 1, load_f32(&rounded[i]));
    store_bf16(brain + 1, load_f32(&rounded[i]));
    const Ints brain_bits(bf16_bits(load_f32(&rounded[i])));
    for (int j = 0; j < kLanes; ++j) {
      const float x = rounded[i + j];
      expect_bits<uint32_t>("store_f16", half[j + 1], encode_half(x), std::to_string(x));
      expect_bits<uint32_t>("store_bf16", brain[j + 1], encode_bf16(x), std::to_string(x));
      expect_bits<uint32_t>("bf16_bits", static_cast<uint32_t>(brain_bits.at[j]), encode_bf16(x), std::to_string(x));
    }
    if (i % 16 == 0) {
      F32 sixteen[16 / kLanes];
      uint16_t stored[16];
      for (int v = 0; v < 16 / kLanes; ++v) sixteen[v] = load_f32(&rounded[i + v * kLanes]);
      store16_bf16(stored, sixteen);
      for (int j = 0; j < 16; ++j)
        expect_bits<uint32_t>("store16_bf16", stored[j], encode_bf16(rounded[i + j]), std::to_string(rounded[i + j]));
    }
    expect(half[0] == 1 && half[kLanes + 1] == 1 && brain[0] == 1 && brain[kLanes + 1] == 1, "store_f16, store_bf16",
           "writes beside its values");
  }
  for (uint32_t code = 0; code < 256; code += 16) {
    uint8_t from[17];
    for (uint32_t j = 0; j < 16; ++j) from[j + 1] = static_cast<uint8_t>(code + j);
    F32 e4m3[16 / kLanes], e5m2[16 / kLanes];
    load16_e4m3(from + 1, e4m3);
    load16_e5m2(from + 1, e5m2);
    for (int v = 0; v < 16 / kLanes; ++v) {
      const Floats by_16(e4m3[v]), by_lanes(load_e4m3(from + 1 + v * kLanes)), wide(e5m2[v]);
      for (int j = 0; j < kLanes; ++j) {
        const uint32_t c = from[1 + v * kLanes + j], exponent = c >> 3 & 15, fraction = c & 7;
        const double size =
            exponent ? std::ldexp(8.0 + fraction, static_cast<int>(exponent) - 10) : std::ldexp(fraction, -9);
        const float wanted = (c & 127) == 127 ? std::nanf("") : static_cast<float>((c & 128 ? -size : size) / 256);
        expect_float("load_e4m3", by_lanes.at[j], wanted, static_cast<float>(c));
        expect_float("load16_e4m3", by_16.at[j], wanted, static_cast<float>(c));
        expect_float("load16_e5m2", wide.at[j], decode_half(c << 8), static_cast<float>(c));
      }
    }
  }
  for (uint32_t code = 0; code < 256; code += 16 * kFp8Columns) {
    uint8_t from[16 * kFp8Columns + 1];
    for (uint32_t j = 0; j < 16 * kFp8Columns; ++j) from[j + 1] = static_cast<uint8_t>(code + j);
    F32 e4m3[kFp8Columns][16 / kLanes], e5m2[kFp8Columns][16 / kLanes];
    load_e4m3_columns(from + 1, e4m3);
    load_e5m2_columns(from + 1, e5m2);
    for (int column = 0; column < kFp8Columns; ++column) {
      F32 one_e4m3[16 / kLanes], one_e5m2[16 / kLanes];
      load16_e4m3(from + 1 + 16 * column, one_e4m3);
      load16_e5m2(from + 1 + 16 * column, one_e5m2);
      for (int v = 0; v < 16 / kLanes; ++v) {
        const Floats small(e4m3[column][v]), small_one(one_e4m3[v]), wide(e5m2[column][v]), wide_one(one_e5m2[v]);
        for (int j = 0; j < kLanes; ++j) {
          const auto c = static_cast<float>(from[1 + 16 * column + v * kLanes + j]);
          expect_float("load_e4m3_columns", small.at[j], small_one.at[j], c);
          expect_float("load_e5m2_columns", wide.at[j], wide_one.at[j], c);
        }
      }
    }
  }
}

void test_tables() {
  float values[16];
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) {
    values[i] = i == 3 ? -kInf : static_cast<float>(i * i) - 20.5f;
    bytes[i] = static_cast<uint8_t>(random_bits());
  }
  const Table16 table = make_table(values);
  binary_i32(
      "lookup", [&](I32 a, I32) { return as_i32(lookup(table, a)); },
      [&](int32_t a, int32_t) { return bits_of(values[a & 15]); });
  for (int round = 0; round < 64; ++round) {
    uint8_t from[4 * kLanes], low[4 * kLanes], high[4 * kLanes], found[4 * kLanes];
    for (uint8_t& byte : from) byte = static_cast<uint8_t>(random_bits());
    store_bytes(low, low_nibbles(load_bytes(from)));
    store_bytes(high, high_nibbles(load_bytes(from)));
    store_bytes(found, lookup_bytes(bytes, high_nibbles(load_bytes(from))));
    for (int j = 0; j < 4 * kLanes; ++j) {
      expect_bits("low_nibbles", low[j], static_cast<uint8_t>(from[j] & 15));
      expect_bits("high_nibbles", high[j], static_cast<uint8_t>(from[j] >> 4));
      expect_bits("lookup_bytes", found[j], bytes[from[j] >> 4]);
    }
    store_bytes(found, set4_bytes(from + 1));
    for (int j = 0; j < 4 * kLanes; ++j) expect_bits("set4_bytes", found[j], from[1 + j % 4]);
    const Ints nibbles(bit_and(spread_nibbles(from), set1_i32(15)));
    for (int j = 0; j < kLanes; ++j)
      expect_bits<int32_t>("spread_nibbles", nibbles.at[j], from[j / 2] >> (j % 2 * 4) & 15);
  }
}

void test_transpose() {
  float values[kLanes][kLanes];
  F32 rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) values[i][j] = static_cast<float>(100 * i + j);
    rows[i] = load_f32(values[i]);
  }
  transpose(rows);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) expect_float("transpose", Floats(rows[i]).at[j], values[j][i], values[i][j]);
}

// Four bytes a lane, either random ones within limits or the limits themselves.
template <class T>
void fill(T (&bytes)[4 * kLanes], int least, int most, int round) {
  for (T& byte : bytes) {
    const int random = least + static_cast<int>(random_bits() % static_cast<uint32_t>(most - least + 1));
    byte = static_cast<T>(round == 0 ? most : round == 1 ? least : random);
  }
}
template <class W, class X>
int32_t products(const W* w, const X* x, int lane) {
  int32_t sum = 0;
  for (int j = 4 * lane; j < 4 * lane + 4; ++j) sum += static_cast<int32_t>(w[j]) * x[j];
  return sum;
}

void test_dot4(const char* what, int64_t steps, int most) {
  for (int round = 0; round < 20; ++round) {
    uint8_t codes[4 * kLanes];
    int8_t x[4 * kLanes];
    Dot4 sum = zero_dot4();
    int64_t wanted[kLanes] = {};
    for (int64_t step = 0; step < (round < 2 ? steps : 8); ++step) {
      if (step == 0 || round >= 2) {
        fill(codes, 0, 15, round == 1 ? 0 : round);
        fill(x, most == 127 ? -128 : -most, most, round);
      }
      sum = dot4(sum, load_bytes(codes), load_bytes(x));
      for (int lane = 0; lane < kLanes; ++lane) wanted[lane] += products(codes, x, lane);
    }
    const Ints found(total(sum));
    for (int lane = 0; lane < kLanes; ++lane) expect_bits<int64_t>(what, found.at[lane], wanted[lane]);
  }
}

void test_dot_products() {
  static_assert((kDot4Steps & (kDot4Steps - 1)) == 0 && kDot4Steps >= 8,
                "kernels take parts of K of this many columns");
  static_assert((kDot4StepsInt4 & (kDot4StepsInt4 - 1)) == 0 && kDot4StepsInt4 >= kDot4Steps, "the same");
  test_dot4("dot4", kDot4Steps, 127);
  test_dot4("dot4 of int4", kDot4StepsInt4, 15);
  for (int round = 0; round < 200; ++round) {
    uint8_t codes[4 * kLanes], raw[4 * kLanes];
    int8_t w[4 * kLanes], x[4 * kLanes];
    int32_t start[kLanes];
    fill(codes, 0, 15, round);
    fill(w, -128, 127, round);
    fill(x, -127, 127, round % 7);
    std::memcpy(raw, w, sizeof raw);
    for (int32_t& value : start) value = static_cast<int32_t>(random_bits() % 20001) - 10000;
    const Ints begun(total(dot4(start_dot4(load_i32(start)), load_bytes(codes), load_bytes(x))));
    const Ints only(total(start_dot4(load_i32(start))));
    I32 sum = load_i32(start);
    const Weights8 prepared = prepare8(load_bytes(raw));
    for (int step = 0; step < 300; ++step) sum = dot8(sum, prepared, load_bytes(x));
    const Ints found(sum), even_w(even_bytes(load_bytes(raw))), odd_w(odd_bytes(load_bytes(raw)));
    for (int lane = 0; lane < kLanes; ++lane) {
      expect_bits("start_dot4", begun.at[lane], start[lane] + products(codes, x, lane));
      expect_bits("start_dot4 alone", only.at[lane], start[lane]);
      int32_t x_sum = 0;
      for (int j = 4 * lane; j < 4 * lane + 4; ++j) x_sum += x[j];
      expect_bits("dot8", found.at[lane], start[lane] + 300 * (products(w, x, lane) + kDot8Offset * x_sum));
      const auto pair = [](int low, int high) {
        return static_cast<int32_t>(static_cast<uint32_t>(low & 0xffff) | static_cast<uint32_t>(high) << 16);
      };
      expect_bits("even_bytes", even_w.at[lane], pair(w[4 * lane], w[4 * lane + 2]));
      expect_bits("odd_bytes", odd_w.at[lane], pair(w[4 * lane + 1], w[4 * lane + 3]));
    }
  }
  binary_i32(
      "dot2", [](I32 a, I32 b) { return dot2(a, a, b); },
      [](int32_t a, int32_t b) {
        const auto low = [](int32_t pair) { return static_cast<int64_t>(static_cast<int16_t>(pair & 0xffff)); };
        return static_cast<uint32_t>(a + low(a) * low(b) + static_cast<int64_t>(a >> 16) * (b >> 16));
      });
}

// The parts of simd.h that all sets share.
void test_rows() {
  float values[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) values[i] = static_cast<float>(i) - 3;
  for (const int dtype : {kFloat32, kBfloat16, kFloat16}) {
    unsigned char row[8 * kLanes];
    for (int at = 0; at < 2 * kLanes; at += kLanes) store_from_f32(row, at, load_f32(values + at), dtype);
    for (int count = 0; count <= kLanes; ++count) {
      const Floats found(load_first(row, 1, count, dtype));
      unsigned char to[8 * kLanes];
      std::memset(to, 0x5a, sizeof to);
      store_first(to, 2, count, load_as_f32(row, 0, dtype), dtype);
      const int size = element_size(dtype);
      for (int j = 0; j < kLanes; ++j)
        expect_float("load_first", found.at[j], j < count ? values[1 + j] : 0, values[j]);
      for (int byte = 0; byte < 8 * kLanes; ++byte) {
        const int at = byte - 2 * size;
        expect_bits<int>("store_first", to[byte], at >= 0 && at < count * size ? row[at] : 0x5a);
      }
    }
  }
  int sum = 0;
  for_each_place<5>([&](auto place) { sum = 10 * sum + decltype(place)::value; });
  expect_bits("for_each_place", sum, 1234);
}

}  // namespace

int main() {
  test_float32();
  test_int32();
  test_conversions();
  test_masks();
  test_small_floats();
  test_tables();
  test_transpose();
  test_dot_products();
  test_rows();
  std::printf("%d lanes: %d checks, %d failures\n", kLanes, g_checks, g_failures);
  return g_failures > 0;
}
