// int4_plain_mm: 4-bit weights in plain rows, [N, K / 2] with scales and zero points [N, G], times int8 activations.
//
// Few tokens: rows are read as they lie, some at a time, and lanes are columns. Else a block of 16 rows is interleaved
// just before it is multiplied (rows16.h), once for all tiles of tokens, and the product is that of int4_gemm.h.
#include <memory>
#include <vector>

#include "native/bind.h"
#include "native/grouped_codes.h"
#include "native/int4_tiles.h"
#include "native/transpose.h"

namespace lowbit {
namespace {

using namespace simd;

constexpr int64_t kActivationBlock = 32;  // columns that share a scale of the activations
constexpr int64_t kStrip = 64;            // words of a row that are read on before the next rows

struct PlainRows {
  const uint8_t* codes;  // [n, k / 2]
  const void* scales;    // [n, k / group]
  const void* zeros;
  int dtype;  // of both
  int64_t n, k, group;

  int64_t words() const { return k / 8; }
  int64_t groups() const { return k / group; }
};

// Values of 32 bits, [16, count] in rows `stride` apart, as [count, 16].
template <class T>
void interleave(const T* from, int64_t stride, int64_t count, T* to) {
  static_assert(sizeof(T) == 4, "they pass through vectors of float32, which leave bits alone");
  const auto* values = reinterpret_cast<const float*>(from);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    for (int r = 0; r < kBlockRows; r += kLanes) {
      F32 rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = load_f32(values + (r + i) * stride + c);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store_f32(reinterpret_cast<float*>(to) + (c + i) * kBlockRows + r, rows[i]);
    }
  for (; c < count; ++c)
    for (int r = 0; r < kBlockRows; ++r) to[c * kBlockRows + r] = from[r * stride + c];
}

// Room for blocks of rows in the arrangement of rows16.
struct Arranged {
  int64_t blocks;
  Room words, scales, zeros, rows;  // `rows`: one block's codes, scales or zero points where they must be copied first

  Arranged(const PlainRows& w, int64_t blocks)
      : blocks(blocks),
        words(blocks * w.words() * kBlockRows),
        scales(blocks * w.groups() * kBlockRows),
        zeros(blocks * w.groups() * kBlockRows),
        rows((w.words() + kLanes) * kBlockRows) {}

  void arrange(const PlainRows& w, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * kBlockRows, count = std::min<int64_t>(kBlockRows, w.n - row), at = block - first;
      const auto* codes = reinterpret_cast<const uint32_t*>(w.codes + row * w.k / 2);
      if (count < kBlockRows) {  // rows of zeros fill up the last block
        std::memset(rows.data(), 0, static_cast<size_t>(w.words() * kBlockRows) * 4);
        std::memcpy(rows.data(), codes, static_cast<size_t>(count * w.words()) * 4);
        codes = reinterpret_cast<const uint32_t*>(rows.data());
      }
      auto* to = reinterpret_cast<uint32_t*>(words.data()) + at * w.words() * kBlockRows;
      // 16 rows at a time are more than the processor fetches by itself; the block that this thread needs next is asked
      // for meanwhile. Its rows lie behind each other, so that a strip stands for as much of them.
      const uint8_t* next = w.codes + std::min(row + kBlockRows, w.n - 1) * w.k / 2;
      for (int64_t word = 0; word < w.words(); word += kStrip) {
        const int64_t some = std::min(kStrip, w.words() - word);
        for (int64_t line = 0; line < some; ++line) __builtin_prefetch(next + (word + line) * 64, 0, 2);
        interleave(codes + word, w.words(), some, to + word * kBlockRows);
      }
      arrange_values(w, w.scales, row, count, scales.data() + at * w.groups() * kBlockRows);
      arrange_values(w, w.zeros, row, count, zeros.data() + at * w.groups() * kBlockRows);
    }
  }

  GroupedCodes<4> weight(const PlainRows& w) const {
    return {reinterpret_cast<const uint32_t*>(words.data()),
            w.words() * kBlockRows,
            scales.data(),
            zeros.data(),
            kFloat32,
            kFloatCodes,
            w.n,
            w.k,
            w.group};
  }

 private:
  void arrange_values(const PlainRows& w, const void* from, int64_t row, int64_t count, float* to) {
    const int64_t total = w.groups() * count;
    float* plain = rows.data();
    int64_t i = 0;
    for (; i + kLanes <= total; i += kLanes) store_f32(plain + i, load_as_f32(from, row * w.groups() + i, w.dtype));
    if (i < total) store_f32(plain + i, load_first(from, row * w.groups() + i, static_cast<int>(total - i), w.dtype));
    for (i = total; i < w.groups() * kBlockRows; ++i) plain[i] = 0.0f;
    interleave(plain, w.groups(), w.groups(), to);
  }
};

// Few tokens. A load takes kLanes words of a row, eight columns to a lane.
constexpr int64_t kLoadColumns = 8 * kLanes;
template <int kTokens>
constexpr int kTogether = kTokens == 1 ? 4 : 2;  // rows, for which activations are loaded once
constexpr int64_t kTaskRows = 64;

struct LaneTokens {
  Room even, odd, d;  // [m, k / 8] words of codes of columns 0 2 4 6, of columns 1 3 5 7; the scale of each word

  LaneTokens(const IntegerTokens<1>& x, int64_t m) : even(m * x.k / 8), odd(m * x.k / 8), d(m * x.k / 8) {
    for (int64_t word = 0; word < m * x.k / 8; ++word) {
      std::memcpy(even.data() + word, x.bytes + word * 8, 4);
      std::memcpy(odd.data() + word, x.bytes + word * 8 + 4, 4);
      d.data()[word] = x.d[word * 8 / x.block];
    }
  }
};

// Floats of a row's scales, which whole vectors and tables of 16 may touch behind its end.
inline int64_t scale_room(const PlainRows& w) { return w.groups() + std::max(kLanes, 16); }

// The sums of some rows for all of kTokens tokens; `scales` is room for the rows' scales as float32.
template <int kTokens, int kRows>
void multiply_rows(const PlainRows& w, const IntegerTokens<1>& x, const LaneTokens& lanes, int64_t row, float* scales,
                   float (&out)[kTokens][kTogether<kTokens>]) {
  F32 sums[kTokens][kRows];
  const int64_t groups = w.groups(), words = w.words();
  for (int r = 0; r < kRows; ++r) {  // what the zero points take away
    for (int t = 0; t < kTokens; ++t) sums[t][r] = zero_f32();
    for (int64_t g = 0; g < groups; g += kLanes) {
      const int64_t at = (row + r) * groups + g;
      const int count = static_cast<int>(std::min<int64_t>(kLanes, groups - g));
      const bool whole = count == kLanes;
      const F32 scale = whole ? load_as_f32(w.scales, at, w.dtype) : load_first(w.scales, at, count, w.dtype);
      const F32 zero = whole ? load_as_f32(w.zeros, at, w.dtype) : load_first(w.zeros, at, count, w.dtype);
      store_f32(scales + r * scale_room(w) + g, scale);
      const F32 product = mul(scale, zero);
      for (int t = 0; t < kTokens; ++t) {
        const float* x_sums = x.sums + t * groups + g;
        sums[t][r] = sub(sums[t][r], mul(product, whole ? load_f32(x_sums) : load_first(x_sums, 0, count, kFloat32)));
      }
    }
  }
  const auto* from = reinterpret_cast<const uint32_t*>(w.codes) + row * words;
  // What lanes hold of row r's load at `word` and of a token: the products of its columns, times the token's scale.
  const auto products = [&](int64_t word, int r, const auto& take) __attribute__((always_inline)) {
    // Rows are short, what the processor reads ahead ends with each: the rows that come next are asked for.
    __builtin_prefetch(from + (r + 2 * kRows) * words + word, 0, 2);
    __builtin_prefetch(from + r * words + word + kNearBytes / 4);
    Bytes even, odd;
    GroupedCodes<4>::codes(load_i32(from + r * words + word), even, odd);
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = t * words + word;
      const Dot4 dot =
          dot4(dot4(zero_dot4(), even, load_bytes(lanes.even.data() + at)), odd, load_bytes(lanes.odd.data() + at));
      take(t, to_f32(total(dot)), load_f32(lanes.d.data() + at));
    }
  };
  const auto scales_of = [&](int r) { return scales + r * scale_room(w); };
  if (w.group % kLoadColumns) {  // a load holds several groups
    const int64_t groups_a_load = kLoadColumns / w.group;
    alignas(64) int32_t of_lane[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) of_lane[lane] = static_cast<int32_t>(lane * groups_a_load / kLanes);
    for (int64_t word = 0, g = 0; word < words; word += kLanes, g += groups_a_load) {
      const int64_t base = g / 16 * 16;
      const I32 index = add(load_i32(of_lane), set1_i32(static_cast<int32_t>(g - base)));
      for (int r = 0; r < kRows; ++r) {
        const F32 scale = lookup(make_table(scales_of(r) + base), index);
        products(word, r, [&](int t, F32 sum, F32 step) { sums[t][r] = fma(mul(sum, step), scale, sums[t][r]); });
      }
    }
  } else {
    const int64_t group_words = w.group / 8;
    for (int64_t g = 0; g < groups; ++g) {
      F32 found[kTokens][kRows];
      for (auto& token : found)
        for (auto& sum : token) sum = zero_f32();
      for (int64_t word = g * group_words; word < (g + 1) * group_words; word += kLanes)
        for (int r = 0; r < kRows; ++r)
          products(word, r, [&](int t, F32 sum, F32 step) { found[t][r] = fma(sum, step, found[t][r]); });
      for (int r = 0; r < kRows; ++r) {
        const F32 scale = set1_f32(scales_of(r)[g]);
        for (int t = 0; t < kTokens; ++t) sums[t][r] = fma(found[t][r], scale, sums[t][r]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) out[t][r] = reduce_add(sums[t][r]);
}

template <int kTokens>
void multiply_few(const PlainRows& w, const IntegerTokens<1>& x, const Output& out, int threads) {
  const LaneTokens lanes(x, kTokens);
  parallel_for((w.n + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    Room scales(kTogether<kTokens> * scale_room(w)), sums(kTokens * (kTaskRows + kLanes));
    const int64_t first = task * kTaskRows, last = std::min(first + kTaskRows, w.n);
    const auto take = [&](auto rows, int64_t row) {
      constexpr int kRows = decltype(rows)::value;
      float found[kTokens][kTogether<kTokens>];
      multiply_rows<kTokens, kRows>(w, x, lanes, row, scales.data(), found);
      for (int t = 0; t < kTokens; ++t)
        for (int r = 0; r < kRows; ++r) sums.data()[t * (kTaskRows + kLanes) + row - first + r] = found[t][r];
    };
    int64_t row = first;
    for (; row + kTogether<kTokens> <= last; row += kTogether<kTokens>)
      take(std::integral_constant<int, kTogether<kTokens>>{}, row);
    for (; row < last; ++row) take(std::integral_constant<int, 1>{}, row);
    for (int t = 0; t < kTokens; ++t)
      for (int64_t r = first; r < last; r += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, last - r));
        F32 sum = load_first(sums.data(), t * (kTaskRows + kLanes) + r - first, count, kFloat32);
        if (out.bias) sum = add(sum, load_first(out.bias, r, count, out.bias_dtype));
        store_first(out.data, t * w.n + r, count, sum, out.dtype);
      }
  });
}

}  // namespace

void int4_plain_mm(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, Ptr<const uint8_t> codes,
                   Ptr<const void> scales, Ptr<const void> zeros, int scale_dtype, int64_t group, Ptr<const void> bias,
                   int bias_dtype, Ptr<void> out, int threads) {
  const PlainRows rows{codes, scales, zeros, scale_dtype, n, k, group};
  std::vector<std::unique_ptr<Arranged>> rooms(std::max(threads, 1));
  const auto weight_of = [&](int64_t first, int64_t last, int worker) {
    auto& room = rooms[worker];
    if (!room || room->blocks < last - first) room = std::make_unique<Arranged>(rows, last - first);
    room->arrange(rows, first, last);
    return room->weight(rows);
  };
  const IntegerTokens<1> tokens({x, x_dtype, m, k}, kActivationBlock, group, threads);
  const Output to{out, x_dtype, bias, bias_dtype};
  // In lanes where a load is whole groups, or, with a fast look-up of their scales, a few of them.
  const bool parts_of_load = kLanes >= 8 && kLoadColumns % group == 0 && k % kLoadColumns == 0;
  if (group % kLoadColumns == 0 || parts_of_load) {
    if (m == 1) return multiply_few<1>(rows, tokens, to, threads);
    if (m == 2) return multiply_few<2>(rows, tokens, to, threads);
    if (m == 3) return multiply_few<3>(rows, tokens, to, threads);
  }
  int4_product_of<GroupedCodes<4>, false>(weight_of, tokens, n, to, threads);
}

void bind_int4_plain_mm(nb::module_& m) {
  m.def("int4_plain_mm", &int4_plain_mm, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"),
        nb::arg("scale_dtype"), nb::arg("group"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"),
        nb::arg("threads"));
}

}  // namespace lowbit
