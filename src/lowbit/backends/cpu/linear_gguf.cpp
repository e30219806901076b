// linear for gguf: blocks as they lie in the file, 16 rows at a time (native/gguf_blocks.h).
//
// Few tokens of 16 bits: activations become int16 with a scale a block of columns, as for other 4-bit weights
// (int4_gemm.h), and codes are multiplied with them as integers, whole columns of pairs. All else: panels of float32.
#include "native/bind.h"
#include "native/gguf_blocks.h"
#include "native/int4_gemm.h"

namespace lowbit {
namespace {

using namespace simd;

constexpr int64_t kAheadOfRow = 512;  // bytes of a row that are asked for before they are needed

template <class T>
struct GgufWeight {
  const uint8_t* codes;
  int64_t stride, n, k;
  float factor;  // of all values

  void decode(int64_t block, int64_t first, int64_t last, float* panel) const {
    const gguf::Rows rows(codes, stride, block * kBlockRows, n);
    gguf::Words<T> words;
    for (int64_t c = first; c < last; c += T::kColumns) {
      words.gather(rows.at, c / T::kColumns * T::kSize);
      gguf::decode(words, panel + (c - first) * kPanelRows, kPanelRows, factor);
    }
  }
};

using Tokens = IntegerTokens<2, 4>;

// Steps and what is added to a unit's sum for each of 16 rows.
template <class T>
struct Units {
  static constexpr int kCount = T::kColumns / T::kUnit;
  static constexpr bool kAdds = T::kZero || T::kOffset;
  alignas(64) float steps[kCount * kBlockRows];
  alignas(64) float added[kAdds ? kCount * kBlockRows : 1];

  explicit Units(const gguf::Words<T>& words) {
    for (int v = 0; v < kBlockVectors; ++v) {
      F32 step[kCount], zero[kCount];
      T::steps(words, v, step, zero);
      for (int u = 0; u < kCount; ++u) {
        store_f32(steps + u * kBlockRows + v * kLanes, step[u]);
        if constexpr (T::kZero) store_f32(added + u * kBlockRows + v * kLanes, zero[u]);
        if constexpr (T::kOffset != 0)
          store_f32(added + u * kBlockRows + v * kLanes, mul(step[u], set1_f32(-T::kOffset)));
      }
    }
  }
};

// sums[t][row] += the products of one block, which begins at `column`, with tokens [token, token + kTokens).
template <class T, int kTokens>
inline void multiply_block(const gguf::Words<T>& words, const Units<T>& units, const Tokens& x, int64_t token,
                           int64_t column, float* sums) {
  constexpr int kQuads = T::kUnit / 4;
  const int8_t* rows[kTokens];
  for (int t = 0; t < kTokens; ++t) rows[t] = x.row(token + t) + column / 4 * Tokens::kWordBytes;
  const int64_t first = token * x.groups + column / T::kUnit;
  F32 acc[kTokens][kBlockVectors];
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kBlockVectors; ++v) acc[t][v] = load_f32(sums + t * kBlockRows + v * kLanes);
  for (int span = 0; span < T::kColumns / T::kSpan; ++span)
    for_each_place<T::kSpan / T::kUnit>([&](auto part) {
      constexpr int u = decltype(part)::value;
      const int unit = span * (T::kSpan / T::kUnit) + u;
      I32 dots[kTokens][kBlockVectors];
      for (auto& row : dots)
        for (auto& dot : row) dot = zero_i32();
      for_each_place<kQuads>([&](auto place) {
        constexpr int q = decltype(place)::value;
        I32 even[kBlockVectors], odd[kBlockVectors];
        for (int v = 0; v < kBlockVectors; ++v) {
          const Bytes codes = T::template codes<u * kQuads + q>(words, span, v);
          even[v] = T::kSigned ? even_bytes(codes) : bit_and(as_i32(codes), set1_i32(0x00ff00ff));
          odd[v] = odd_bytes(codes);
        }
        for (int t = 0; t < kTokens; ++t) {
          int32_t pairs[2];
          std::memcpy(pairs, rows[t] + (unit * kQuads + q) * Tokens::kWordBytes, sizeof(pairs));
          for (int v = 0; v < kBlockVectors; ++v) {
            dots[t][v] = dot2(dots[t][v], even[v], set1_i32(pairs[0]));
            dots[t][v] = dot2(dots[t][v], odd[v], set1_i32(pairs[1]));
          }
        }
      });
      for (int v = 0; v < kBlockVectors; ++v) {
        const F32 step = load_f32(units.steps + unit * kBlockRows + v * kLanes);
        for (int t = 0; t < kTokens; ++t) {
          const int64_t at = first + t * x.groups + unit;
          acc[t][v] = fma(to_f32(dots[t][v]), mul(step, set1_f32(x.d[at])), acc[t][v]);
          if constexpr (Units<T>::kAdds)
            acc[t][v] = fma(load_f32(units.added + unit * kBlockRows + v * kLanes), set1_f32(x.sums[at]), acc[t][v]);
        }
      }
    });
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kBlockVectors; ++v) store_f32(sums + t * kBlockRows + v * kLanes, acc[t][v]);
}

template <class T, int kMost>
inline void multiply_block_of(int tokens, const gguf::Words<T>& words, const Units<T>& units, const Tokens& x,
                              int64_t token, int64_t column, float* sums) {
  if constexpr (kMost > 0) {
    if (tokens == kMost) return multiply_block<T, kMost>(words, units, x, token, column, sums);
    multiply_block_of<T, kMost - 1>(tokens, words, units, x, token, column, sums);
  }
}

template <class T>
void multiply_integers(const GgufWeight<T>& w, const Tokens& x, int64_t m, const Output& out, int threads) {
  constexpr int kMost = kInt4Tokens<2>;
  const int64_t tiles = (m + kMost - 1) / kMost;  // of nearly equal size: 5 tokens are 3 + 2, not 4 + 1
  parallel_for((w.n + kBlockRows - 1) / kBlockRows, threads, [&](int64_t block) {
    const gguf::Rows rows(w.codes, w.stride, block * kBlockRows, w.n);
    Room sums_room(m * kBlockRows);
    float* sums = sums_room.data();
    std::fill_n(sums, m * kBlockRows, 0.0f);
    gguf::Words<T> words;
    for (int64_t column = 0, at = 0; column < w.k; column += T::kColumns, at += T::kSize) {
      for (const uint8_t* row : rows.at) __builtin_prefetch(row + at + kAheadOfRow);
      words.gather(rows.at, at);
      const Units<T> units(words);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t token = m * tile / tiles, end = m * (tile + 1) / tiles;
        multiply_block_of<T, kMost>(static_cast<int>(end - token), words, units, x, token, column,
                                    sums + token * kBlockRows);
      }
    }
    for (int64_t t = 0; t < m; ++t) {
      F32 row[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v)
        row[v] = mul(load_f32(sums + t * kBlockRows + v * kLanes), set1_f32(w.factor));
      store_block(row, block, w.n, out.bias, out.bias_dtype, out.data, t, out.dtype);
    }
  });
}

}  // namespace

// integer_block: the columns of the activations that share a scale; 0 where they stay what they are.
void linear_gguf(Ptr<const void> x, int x_dtype, int64_t m, int64_t n, int64_t k, int type, Ptr<const uint8_t> codes,
                 int64_t stride, Ptr<const float> global, int64_t integer_block, Ptr<const void> bias, int bias_dtype,
                 Ptr<void> out, int threads) {
  const Output to{out, x_dtype, bias, bias_dtype};
  gguf::with_type(type, [&](auto kind) {
    using T = decltype(kind);
    const GgufWeight<T> weight{codes, stride, n, k, global ? *global : 1.0f};
    const Activations from{x, x_dtype, m, k};
    if (integer_block) return multiply_integers(weight, Tokens(from, integer_block, T::kUnit, threads), m, to, threads);
    gemm_many(weight, from, to, threads);
  });
}

void bind_linear_gguf(nb::module_& m) {
  m.def("linear_gguf", &linear_gguf, nb::call_guard<nb::gil_scoped_release>(), nb::arg("x"), nb::arg("x_dtype"),
        nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("type"), nb::arg("codes"), nb::arg("stride"),
        nb::arg("global"), nb::arg("integer_block"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("out"),
        nb::arg("threads"));
}

}  // namespace lowbit
