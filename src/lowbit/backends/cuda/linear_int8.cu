// linear for int8 weights and up to 8 tokens: every weight is read once, and multiplied by tensor cores, whose eight
// columns are the tokens.
//
//   out[m, n] = (sum over k of x[m, k] * w[n, k]) * (step[m] * scale[n]) + bias[n]
//
// x is int8 codes with a step a token, or 16-bit floats without. A block takes 16 rows; its warps share out the blocks
// of 64 columns among them and add their sums through shared memory, in a fixed order. Of 64 columns a lane reads 16
// bytes of each of two rows, columns 16 place .. + 15, and of a token the same (mma.cuh: the order of columns is free).
// What it multiplies in the next kDepth turns is on its way meanwhile, x with the weights.
//
// Where rounding the tokens to codes is little work, every block does it for itself while its first weights are on
// their way: that takes less time than a kernel of its own before this one.
#include "int8_pairs.cuh"
#include "int8_rows.cuh"
#include "mma.cuh"

namespace lowbit {

constexpr int kRows = 16;   // of a block
constexpr int kTokens = 8;  // at most

// Sixteen columns of a token: what they are loaded as, and their products with those of rows `owner` and `owner` + 8.
struct Codes {
  using Sum = int;
  uint4 words[1];

  LOWBIT_DEVICE void multiply(int (&sums)[4], uint4 a, uint4 b) const {
    const uint32_t low[4] = {a.x, b.x, a.y, b.y}, high[4] = {a.z, b.z, a.w, b.w};
    mma_int8(sums, low, words[0].x, words[0].y, sums);
    mma_int8(sums, high, words[0].z, words[0].w, sums);
  }
};

template <Half half>
struct Halves {
  using Sum = float;
  uint4 words[2];

  // Four columns of both rows and of the token.
  LOWBIT_DEVICE static void four(float (&sums)[4], uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
    mma<half>(sums, int8_pair<half, false>(a), int8_pair<half, false>(b), int8_pair<half, true>(a),
              int8_pair<half, true>(b), x, y);
  }

  LOWBIT_DEVICE void multiply(float (&sums)[4], uint4 a, uint4 b) const {
    four(sums, a.x, b.x, words[0].x, words[0].y);
    four(sums, a.y, b.y, words[0].z, words[0].w);
    four(sums, a.z, b.z, words[1].x, words[1].y);
    four(sums, a.w, b.w, words[1].z, words[1].w);
  }
};

// The product as float32 on its own: not contracted with a sum behind it.
LOWBIT_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC_RTC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

LOWBIT_DEVICE float load_any(int dtype, const void* from, int at) {
  if (dtype == kFloat32) return load_number<kFloat32>(from, at);
  return dtype == kBFloat16Type ? load_number<kBFloat16Type>(from, at) : load_number<kFloat16Type>(from, at);
}

LOWBIT_DEVICE void store_any(int dtype, void* to, int64_t at, float value) {
  if (dtype == kFloat32) return store_number<kFloat32>(to, at, value);
  dtype == kBFloat16Type ? store_number<kBFloat16Type>(to, at, value) : store_number<kFloat16Type>(to, at, value);
}

// What a lane multiplies of the 16 rows from `first` on, of codes [n, 16 * sixteens], and what of it is on its way.
template <int kDepth>
struct Weights {
  const uint4 *upper, *lower;
  int sixteens;
  uint4 held[kDepth][2];

  LOWBIT_DEVICE Weights(const uint4* w, int first, int owner, int n, int sixteens) : sixteens(sixteens) {
    upper = w + int64_t(min(first + owner, n - 1)) * sixteens;  // rows behind the last repeat it: they are never stored
    lower = w + int64_t(min(first + owner + 8, n - 1)) * sixteens;
  }

  LOWBIT_DEVICE void fetch(int depth, int at) {
    held[depth][0] = at < sixteens ? __ldcs(upper + at) : uint4{};
    held[depth][1] = at < sixteens ? __ldcs(lower + at) : uint4{};
  }
};

// Where results go, and what sums are multiplied by: step [m] or null; scale [n], or one value with a scale_step of 0.
// bias_type, out_type: a Dtype each.
struct Results {
  const float* step;
  const float* scale;
  int scale_step;
  const void* bias;
  int bias_type;
  void* out;
  int out_type, m, n;

  // The sums of a block's warps: sums 0 and 1 of row `owner`, 2 and 3 of row `owner` + 8, of tokens 2 place and + 1.
  template <class Sum, int kWarps>
  LOWBIT_DEVICE void store(const Sum (&sums)[4], int first) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
    __shared__ Sum shared[kWarps][kTokens][kRows];
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[warp][2 * place + i % 2][owner + 8 * (i / 2)] = sums[i];
    __syncthreads();
    const int row = first + threadIdx.x % kRows, token = threadIdx.x / kRows;  // what this thread stores
    if (token >= m || row >= n) return;
    Sum total = 0;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) total += shared[from][token][threadIdx.x % kRows];
    float factor = scale[scale_step * row];
    if (step != nullptr) factor = rounded_product(step[token], factor);
    float value = rounded_product(float(total), factor);
    if (bias != nullptr) value += load_any(bias_type, bias, row);
    store_any(out_type, out, int64_t(token) * n + row, value);
  }
};

constexpr int kStep = 4;  // sixteens of columns that a warp takes at a time

// x [m, 16 * sixteens], w [n, 16 * sixteens] of int8. kBlocks: how many run on a multiprocessor side by side.
template <class X, int kDepth, int kWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    linear_int8(const uint4* __restrict__ x, const float* __restrict__ step, const uint4* __restrict__ w,
                const float* __restrict__ scale, int scale_step, const void* __restrict__ bias, int bias_type,
                void* __restrict__ out, int out_type, int m, int n, int sixteens) {
  constexpr int kWords = sizeof(X) / sizeof(uint4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
  const int first = blockIdx.x * kRows;
  const uint4* token = x + int64_t(owner) * sixteens * kWords;
  const int present = owner < m ? sixteens : 0;

  X values[kDepth];
  Weights<kDepth> weights(w, first, owner, n, sixteens);
  const auto fetch = [&](int depth, int at) {
    weights.fetch(depth, at);
#pragma unroll
    for (int i = 0; i < kWords; ++i) values[depth].words[i] = at < present ? __ldg(token + at * kWords + i) : uint4{};
  };
#pragma unroll
  for (int depth = 0; depth < kDepth; ++depth) fetch(depth, (warp + kWarps * depth) * kStep + place);

  typename X::Sum sums[4] = {};
  for (int begin = warp * kStep; begin < sixteens; begin += kWarps * kStep * kDepth) {
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      values[depth].multiply(sums, weights.held[depth][0], weights.held[depth][1]);
      fetch(depth, begin + kWarps * kStep * (kDepth + depth) + place);
      __syncwarp();  // else the compiler works on several turns at once, and runs out of registers
    }
  }
  const Results results{step, scale, scale_step, bias, bias_type, out, out_type, m, n};
  results.template store<typename X::Sum, kWarps>(sums, first);
}

// The same of x [m, 16 * sixteens] of `dtype`, which are rotated and rounded to codes here: 32 pieces of 1024
// columns at most. Dynamic shared memory: a byte for each value of x.
template <Dtype dtype, int kRotation, int kDepth, int kWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    quantize_linear_int8(const void* __restrict__ x, const uint4* __restrict__ w, const float* __restrict__ scale,
                         int scale_step, const void* __restrict__ bias, int bias_type, void* __restrict__ out,
                         int out_type, int m, int n, int sixteens) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
  const int first = blockIdx.x * kRows;
  Weights<kDepth> weights(w, first, owner, n, sixteens);
#pragma unroll
  for (int depth = 0; depth < kDepth; ++depth) weights.fetch(depth, (warp + kWarps * depth) * kStep + place);

  __shared__ float largest[32];
  __shared__ float step[kTokens];
  auto* codes = reinterpret_cast<signed char*>(dynamic_shared());
  const int k = 16 * sixteens, pieces = (k + kPiece - 1) / kPiece;  // of a token
  Int8Piece<dtype, kNone, kRotation, true> piece;
  for (int at = warp; at < m * pieces; at += kWarps) {
    const int token = at / pieces;
    piece.read(x, token, at - token * pieces, k, k, lane);
    const float found = warp_largest(piece.largest());
    if (lane == 0) largest[at] = found;
  }
  __syncthreads();
  for (int at = warp; at < m * pieces; at += kWarps) {
    const int token = at / pieces, part = at - token * pieces;
    const float found = int8_scale(warp_largest(lane < pieces ? largest[token * pieces + lane] : 0.0f));
    if (m * pieces > kWarps) piece.read(x, token, part, k, k, lane);  // else it is still there
    piece.write(codes + token * k, found, part, k, lane);
    if (part == 0 && lane == 0) step[token] = found;
  }
  __syncthreads();

  const uint4* token = reinterpret_cast<const uint4*>(codes) + owner * sixteens;
  const int present = owner < m ? sixteens : 0;
  int sums[4] = {};
  for (int begin = warp * kStep; begin < sixteens; begin += kWarps * kStep * kDepth) {
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const int at = begin + kWarps * kStep * depth + place;
      const Codes values{at < present ? token[at] : uint4{}};
      values.multiply(sums, weights.held[depth][0], weights.held[depth][1]);
      weights.fetch(depth, at + kWarps * kStep * kDepth);
      __syncwarp();  // as above
    }
  }
  const Results results{step, scale, scale_step, bias, bias_type, out, out_type, m, n};
  results.store<int, kWarps>(sums, first);
}

}  // namespace lowbit
