// linear for more than 8 tokens and 4-bit codes in the layout words128, by a warpgroup's products (sm_90a): weights are
// decoded in registers, where they are operand A of 64 rows, and tokens come from shared memory as operand B.
//
//   out[m, r] = alpha * sum over groups g of (scale[g, r] * sum of x * value + zero[g, r] * sum of x)  + bias[r]
//
// A block of threads has 128 * kTiles rows of the weight and kTokens tokens. Two warpgroups multiply, each kTiles * 64
// rows; a third fetches: codes and tokens of 128 columns at a time by asynchronous copies, into a ring of kStages
// places, and scales, which it converts once for all lanes that need them. Mailboxes tell of full and of free places,
// so the two warpgroups need not keep in step: one decodes and scales while the other's products run.
//
// Scales of 16 bits or more multiply float32 sums over their group: none is rounded. A warpgroup has two sets of such
// partial sums; products write one while the other is scaled. For 128 tokens the sets are the two halves of them,
// otherwise they take turns. Scales of 8 bits multiply the decoded values where that is exact (exact_pairs.cuh); then
// products add to the sums themselves. Where there are zeros, the sums of x over the groups are needed anyhow: the
// fetching warps have tensor cores multiply x with ones, and what biased codes (words.cuh) add comes off with the
// zeros.
#include "async.cuh"
#include "exact_pairs.cuh"
#include "mma.cuh"
#include "token_products.cuh"
#include "wgmma.cuh"

namespace lowbit {

enum Threads { kMultiplying = 256, kFetching = 128 };

constexpr int kCodeBytes = 64;  // of a row of codes, 128 columns
constexpr int kRowBytes = 128;  // of a token, 64 columns: the width of the swizzle

// Barriers of some threads: of those that fetch, and of those that multiply. Their numbers are constants wherever they
// are used: for one that is not, the assembler would set all 16 of a block aside.
enum Meeting { kFetchers = 1, kMultipliers = 2 };

// Where 16 bytes of a row of codes are put: rows 2 and 3 of every four the other way round, so that the 32 bytes that
// four rows are read by at a time lie in different banks.
LOWBIT_DEVICE int code_place(int row, int piece) { return row * kCodeBytes + (piece ^ (row & 2)) * 16; }

LOWBIT_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }

// What a variant of the kernel needs of threads' registers and of shared memory.
template <Half half, ScaleType scale_type, bool zeros, int kSixteens, int kTokens, int kTiles>
struct Plan {
  static constexpr int kRows = 128 * kTiles;
  static constexpr bool kPairs = kScalesPairs<half, scale_type>;          // scales multiply decoded values
  static constexpr int kGroups = 8 / kSixteens;                           // in 128 columns
  static constexpr int kColumns = kPairs || kTokens < 64 ? kTokens : 64;  // tokens of a product
  static constexpr int kHalves = kTokens / kColumns;
  // Sixteens of columns of a partial sum: those of a group, or fewer where the two sets could not take turns.
  static constexpr int kSpan = kPairs || (kSixteens == 8 && kTiles == 1 && kHalves == 1) ? 4 : kSixteens;
  // Blocks on a multiprocessor. Fetching threads keep kRaw scales and zeros from one turn to the next.
  static constexpr int kRaw = kTiles * kGroups * (zeros ? 2 : 1);
  static constexpr int kBlocks = kTiles == 1 && kTokens <= 32 && kRaw <= 8 ? 2 : 1;
  // Sixteens of columns that are decoded before they are multiplied: fewer where registers are short. The most sums
  // leave none for nibbles that are not decoded yet: those are read again.
  static constexpr bool kFull = !kPairs && kTokens == 128 && kTiles == 2;
  static constexpr int kUnit = smaller(kSpan, kBlocks == 2 || kFull ? 2 : 4);
  static constexpr int kRead = kFull ? kUnit : 4;

  // A place of the ring, in bytes: tokens [2][kTokens][128], codes [kRows][64], scales and what is added for each x
  // [kGroups][kRows], sums of x [kGroups][kTokens].
  static constexpr int kCodes = 2 * kTokens * kRowBytes;
  static constexpr int kScales = kCodes + kRows * kCodeBytes;
  static constexpr int kShifts = kScales + kGroups * kRows * 4;
  static constexpr int kTotals = kShifts + (zeros ? kGroups * kRows * 4 : 0);
  static constexpr int kEnd = kTotals + (zeros ? kGroups * kTokens * 4 : 0);
  static constexpr int kStage = (kEnd + 1023) / 1024 * 1024;
  static constexpr int kStages = smaller(6, (kBlocks == 2 ? 112 : 225) * 1024 / kStage);
  static constexpr int kLag = smaller(3, kStages - 2);  // places whose copies go on while an earlier one's are awaited

  // Registers: all threads begin with as many, and those that fetch pass some on.
  static constexpr int kRegisters = kBlocks == 2 ? 80 : 168;
  static constexpr bool kFew = kRaw <= 4 && !zeros;
  static constexpr int kFewRegisters = kBlocks == 2 ? (kFew ? 32 : 48)
                                       : kFew       ? 40
                                       : kRaw <= 8  ? 56
                                       : kRaw <= 16 ? 88
                                                    : 104;
  static constexpr int kManyRegisters = (3 * kRegisters - kFewRegisters) / 16 * 8;
};

// Pair j of four, j constant once its loop is unrolled, of half of the nibbles of two words: see the scheme at the top.
template <Code code, Half half, bool biased, int j>
LOWBIT_DEVICE uint32_t value_pair(uint32_t nibbles) {
  if constexpr (code == kE2M1) return tiny_pair<half, j>(nibbles);
  if constexpr (biased) return integer_pair<half, j>(nibbles);
  return centred_pair<half, j>(nibbles);
}
template <Code code, Half half, bool biased>
LOWBIT_DEVICE uint32_t value_pair(uint32_t nibbles, int j) {
  switch (j) {
    case 0:
      return value_pair<code, half, biased, 0>(nibbles);
    case 1:
      return value_pair<code, half, biased, 1>(nibbles);
    case 2:
      return value_pair<code, half, biased, 2>(nibbles);
    default:
      return value_pair<code, half, biased, 3>(nibbles);
  }
}

// What a fetching thread has of the scales of 128 columns, as stored: those of rows `thread` and, with two tiles,
// `thread` + 128. Rows behind the last repeat it.
template <typename P, ScaleType scale_type, bool zeros>
struct RawScales {
  uint32_t scale[P::kGroups][P::kRows / kFetching];
  uint32_t zero[zeros ? P::kGroups : 1][zeros ? P::kRows / kFetching : 1];

  LOWBIT_DEVICE void load(const void* scales, const void* zero_parts, int block, int blocks_a_group, int first, int n) {
#pragma unroll
    for (int g = 0; g < P::kGroups; ++g) {
      const uint32_t group = P::kGroups == 1 ? uint32_t(block) / uint32_t(blocks_a_group) : block * P::kGroups + g;
#pragma unroll
      for (int i = 0; i < P::kRows / kFetching; ++i) {
        const uint32_t at = group * uint32_t(n) + min(first + i * kFetching + int(threadIdx.x) % kFetching, n - 1);
        scale[g][i] = stored_scale<scale_type>(scales, at);
        if constexpr (zeros) zero[g][i] = stored_scale<scale_type>(zero_parts, at);
      }
    }
  }

  template <Code code, Half half>
  LOWBIT_DEVICE void store(unsigned char* stage) const {
#pragma unroll
    for (int g = 0; g < P::kGroups; ++g)
#pragma unroll
      for (int i = 0; i < P::kRows / kFetching; ++i) {
        const int at = g * P::kRows + i * kFetching + int(threadIdx.x) % kFetching;
        if constexpr (P::kPairs) {
          reinterpret_cast<uint32_t*>(stage + P::kScales)[at] = scale_pair<half, scale_type>(scale[g][i]);
        } else {
          const float value = scale_value<half, scale_type>(scale[g][i]);
          reinterpret_cast<float*>(stage + P::kScales)[at] = code == kE2M1 ? value * kE2M1Scale<half> : value;
          if constexpr (zeros)
            reinterpret_cast<float*>(stage + P::kShifts)[at] =
                scale_value<half, scale_type>(zero[g][i]) - kBias * value;
        }
      }
  }
};

// The sums of x over each group of 128 columns that lie in `stage`, by the four fetching warps.
template <typename P, Half half, int kTokens>
LOWBIT_DEVICE void add_up_tokens(unsigned char* stage) {
  constexpr uint32_t ones = half == kBFloat16 ? 0x3F803F80u : 0x3C003C00u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kFetching / 32;
  constexpr int kSixteens = 8 / P::kGroups;
#pragma unroll 1
  for (int item = warp; item < kTokens / 16 * P::kGroups; item += 4) {
    const int first = item / P::kGroups * 16, group = item % P::kGroups;
    const int token = first + lane % 16;  // whose row this lane names
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kSixteens; ++i) {
      const int sixteen = group * kSixteens + i, piece = sixteen % 4 * 2 + lane / 16;
      uint32_t a[4];
      load_matrices(a, stage + (sixteen / 4 * kTokens + token) * kRowBytes + (piece ^ (token & 7)) * 16);
      mma<half>(sums, a[0], a[1], a[2], a[3], ones, ones);
    }
    if (lane % 4 == 0) {
      auto* totals = reinterpret_cast<float*>(stage + P::kTotals) + group * kTokens + first + lane / 4;
      totals[0] = sums[0];
      totals[8] = sums[2];
    }
  }
}

// Results of kTokens tokens and kRows rows from shared memory, by 128 threads: 16 bytes at a time where rows of the
// output begin at multiples of that.
template <int kTokens, int kRows>
LOWBIT_DEVICE void store_results(const uint16_t* results, int pitch, uint16_t* out, int first_token, int first_row,
                                 int m, int n) {
  const int thread = threadIdx.x % 128;
  if (n % 8 == 0) {
    for (int i = thread; i < kTokens * kRows / 8; i += 128) {
      const int token = i / (kRows / 8), row = i % (kRows / 8) * 8;
      if (first_token + token < m && first_row + row < n)
        *reinterpret_cast<uint4*>(out + int64_t(first_token + token) * n + first_row + row) =
            *reinterpret_cast<const uint4*>(results + token * pitch + row);
    }
  } else {
    for (int i = thread; i < kTokens * kRows; i += 128) {
      const int token = i / kRows, row = i % kRows;
      if (first_token + token < m && first_row + row < n)
        out[int64_t(first_token + token) * n + first_row + row] = results[token * pitch + row];
    }
  }
}

// Blocks: x rows of the weight, y tokens, z splits of K. With `parts`, sums go there as add_word_splits takes them:
// float32 [splits, tiles of 64 rows, eights of tokens, 128 threads, 4].
template <Code code, Half half, ScaleType scale_type, bool zeros, int kSixteens, int kTokens, int kTiles>
__global__ void __launch_bounds__(kMultiplying + kFetching,
                                  (Plan<half, scale_type, zeros, kSixteens, kTokens, kTiles>::kBlocks))
    words_gemm(const uint16_t* __restrict__ x, const uint4* __restrict__ codes, const void* __restrict__ scale,
               const void* __restrict__ zero, const float* __restrict__ alpha, int alpha_kind,
               const uint16_t* __restrict__ bias, uint16_t* __restrict__ out, float* __restrict__ parts, int m, int n,
               int k, int blocks_a_group) {
  using P = Plan<half, scale_type, zeros, kSixteens, kTokens, kTiles>;
  constexpr int kStages = P::kStages;
  static_assert(P::kLag >= 1, "the ring has three places or more");
  static_assert(kStages * P::kStage >= 2 * kTokens * (64 * kTiles + 8) * 2, "results go through the ring's memory");
  unsigned char* shared = dynamic_shared();
  auto* full = reinterpret_cast<Mailbox*>(shared + kStages * P::kStage);
  Mailbox* empty = full + kStages;
  const int first_row = blockIdx.x * P::kRows, first_token = blockIdx.y * kTokens;
  const uint32_t blocks = k / 128;  // less than 2**24, times 16 splits: a division of 64 bits would be a call
  const int begin = int(blocks * blockIdx.z / gridDim.z), end = int(blocks * (blockIdx.z + 1) / gridDim.z);
  const int count = end - begin;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      open_mailbox(full + i, kFetching);
      open_mailbox(empty + i, kMultiplying / 32);
    }
    publish_mailboxes();
  }
  __syncthreads();

  if (threadIdx.x >= kMultiplying) {
    give_registers<P::kFewRegisters>();
    const int thread = threadIdx.x - kMultiplying;
    // A thread's pieces of codes lie kCodeRows rows apart, those of tokens kTokenRows; what is behind the last is zero.
    constexpr int kCodeRows = kFetching / 4, kTokenRows = kFetching / 16;
    const int rows_left = n - first_row - thread / 4, tokens_left = m - first_token - thread / 16;
    const uint4* next_codes = codes + int64_t(first_row + thread / 4) * (k / 32) + begin * 4 + thread % 4;
    const uint16_t* next_x = x + int64_t(first_token + thread / 16) * k + begin * 128 + thread % 16 * 8;
    const int to_codes = P::kCodes + code_place(thread / 4, thread % 4);
    const int to_x = (thread % 16 / 8 * kTokens + thread / 16) * kRowBytes + (thread % 8 ^ thread / 16) * 16;
    using Raw = RawScales<P, scale_type, zeros>;
    Raw held;
#pragma unroll 1
    for (int s = 0; s < count + P::kLag; ++s) {
      Raw loaded;
      if (s < count) {
        const int slot = s % kStages;
        unsigned char* stage = shared + slot * P::kStage;
        wait_for(empty + slot, (s / kStages + 1) % 2);
        loaded.load(scale, zero, begin + s, blocks_a_group, first_row, n);
        const uint4* from_codes = next_codes;
#pragma unroll 4
        for (int i = 0; i < P::kRows; i += kCodeRows) {
          const bool here = i < rows_left;
          copy_async(stage + to_codes + i * kCodeBytes, here ? from_codes : codes, here);
          from_codes += int64_t(kCodeRows) * (k / 32);
        }
        const uint16_t* from_x = next_x;
#pragma unroll 4
        for (int i = 0; i < kTokens; i += kTokenRows) {
          const bool here = i < tokens_left;
          copy_async(stage + to_x + i * kRowBytes, here ? from_x : x, here);
          from_x += int64_t(kTokenRows) * k;
        }
        next_codes += 4;
        next_x += 128;
      }
      commit_copies();
      if (s > 0 && s <= count) held.template store<code, half>(shared + (s - 1) % kStages * P::kStage);
      held = loaded;
      if (s >= P::kLag) {
        const int slot = (s - P::kLag) % kStages;
        wait_copies<P::kLag>();
        publish_shared();
        if constexpr (zeros) {
          meet(kFetchers, kFetching);
          add_up_tokens<P, half, kTokens>(shared + slot * P::kStage);
        }
        arrive(full + slot);
      }
    }
    return;
  }

  take_registers<P::kManyRegisters>();
  constexpr int kUnit = P::kUnit, kHalves = P::kHalves, kColumns = P::kColumns;
  constexpr int kTileUnits = 8 / kUnit, kUnits = kTiles * kTileUnits;  // of 128 columns
  constexpr int kSpanUnits = P::kSpan / kUnit;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, owner = lane / 4, place = lane % 4;
  const int group_row = threadIdx.x / 128 * 64 * kTiles;  // the warpgroup's first row in the block's
  const int own_row = group_row + warp * 16 + owner;
  const int own_codes =
      code_place(own_row, place / 2) + place % 2 * 8;  // words 2 place, + 1; 2 place + 8 a bit further

  float sums[kTiles][kHalves][kColumns / 2] = {};
  float partial[2][P::kPairs ? 1 : kColumns / 2] = {};
  uint32_t a[2][kUnit][4];

  uint32_t nibbles[2][2];  // of a tile's 64 columns: rows, columns
  const auto decode = [&](int unit, const unsigned char* stage) {
    const int tile = unit / kTileUnits, first = unit % kTileUnits * kUnit;
    if (first % P::kRead == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const auto* at = stage + P::kCodes + (tile * 64 + 8 * h) * kCodeBytes + (own_codes ^ 32 * c);
          const uint2 words = *reinterpret_cast<const uint2*>(at);
          const Spread spread = spread_words(words.x, words.y);
          nibbles[h][c] = first < 4 ? spread.low : spread.high;
        }
    }
    auto& left = a[unit % 2];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) left[i][r] = value_pair<code, half, zeros>(nibbles[r % 2][r / 2], (first + i) % 4);
      if constexpr (P::kPairs) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = (first + i) / kSixteens * P::kRows + own_row + tile * 64 + 8 * h;
          const uint32_t pair = reinterpret_cast<const uint32_t*>(stage + P::kScales)[at];
          left[i][h] = scaled_pair<half, scale_type>(left[i][h], pair);
          left[i][2 + h] = scaled_pair<half, scale_type>(left[i][2 + h], pair);
        }
      }
      hold(left[i]);  // here, not between products
    }
  };

  // Products of one unit with a half of the tokens.
  const auto multiply = [&](int unit, int part, const Tokens& place_tokens) {
    const int tile = unit / kTileUnits, first = unit % kTileUnits * kUnit;
    begin_products();
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int sixteen = first + i;
      const Tokens tokens =
          place_tokens.behind((sixteen / 4 * kTokens + part * kColumns) * kRowBytes + sixteen % 4 * 32);
      if constexpr (P::kPairs)
        multiply_tokens<half, kTokens>(sums[tile][0], a[unit % 2][i], tokens, true);
      else
        multiply_tokens<half, kColumns>(partial[kHalves == 2 ? part : unit / kSpanUnits % 2], a[unit % 2][i], tokens,
                                        sixteen % P::kSpan > 0);
    }
    commit_products();
  };

  // Scales the partial sums that these products, which have ended, complete.
  const auto finish = [&](int unit, int part, const unsigned char* stage) {
    const int tile = unit / kTileUnits, first = unit % kTileUnits * kUnit;
    if constexpr (!P::kPairs) {
      if (unit % kSpanUnits != kSpanUnits - 1) return;
      const int at = first / kSixteens * P::kRows + own_row + tile * 64;
      const auto* factor = reinterpret_cast<const float*>(stage + P::kScales) + at;
      [[maybe_unused]] const auto* shift = reinterpret_cast<const float*>(stage + P::kShifts) + at;
      [[maybe_unused]] const auto* totals =
          reinterpret_cast<const float*>(stage + P::kTotals) + first / kSixteens * kTokens + part * kColumns;
      auto& from = partial[kHalves == 2 ? part : unit / kSpanUnits % 2];
      auto& to = sums[tile][part];
      hold(from);
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4) {
        if constexpr (zeros) {
          const float2 total = *reinterpret_cast<const float2*>(totals + i * 2 + 2 * place);
          to[i] = fmaf(shift[0], total.x, to[i]);
          to[i + 1] = fmaf(shift[0], total.y, to[i + 1]);
          to[i + 2] = fmaf(shift[8], total.x, to[i + 2]);
          to[i + 3] = fmaf(shift[8], total.y, to[i + 3]);
        }
        to[i] = fmaf(factor[0], from[i], to[i]);
        to[i + 1] = fmaf(factor[0], from[i + 1], to[i + 1]);
        to[i + 2] = fmaf(factor[8], from[i + 2], to[i + 2]);
        to[i + 3] = fmaf(factor[8], from[i + 3], to[i + 3]);
      }
      hold(to);  // here, not between products
    }
  };

  wait_for(full, 0);
  decode(0, shared);
  for (int s = 0; s < count; ++s) {
    const int slot = s % kStages, next = (s + 1) % kStages;
    const unsigned char* stage = shared + slot * P::kStage;
    const Tokens tokens(stage);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int part = 0; part < kHalves; ++part) {
        multiply(unit, part, tokens);
        if (unit > 0 || part > 0) {
          wait_products<1>();
          finish((unit * kHalves + part - 1) / kHalves, (part + kHalves - 1) % kHalves, stage);
        }
      }
      if (unit < kUnits - 1) {
        decode(unit + 1, stage);
      } else {
        // What no products follow in this turn must end in it: the compiler makes all products wait for each other
        // where some of several sums are under way from one turn of the loop to the next.
        if (s + 1 < count) wait_for(full + next, (s + 1) / kStages % 2);
        decode(0, shared + next * P::kStage);  // of what was there before, behind the last
        wait_products<0>();
        finish(unit, kHalves - 1, stage);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(empty + slot);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int p = 0; p < kHalves; ++p) hold(sums[t][p]);
  const auto sum = [&](int tile, int i) {
    const float found = sums[tile][i / (kColumns / 2)][i % (kColumns / 2)];
    return P::kPairs ? found * kPairsScale<scale_type> : found;
  };

  if (parts != nullptr) {
    const int64_t tiles = int64_t(gridDim.x) * 2 * kTiles, eights = int64_t(gridDim.y) * (kTokens / 8);
    const int64_t tile = blockIdx.x * 2 * kTiles + threadIdx.x / 128 * kTiles;
    auto* to = reinterpret_cast<float4*>(parts) + threadIdx.x % 128;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
        to[((blockIdx.z * tiles + tile + t) * eights + blockIdx.y * (kTokens / 8) + j) * 128] =
            make_float4(sum(t, 4 * j), sum(t, 4 * j + 1), sum(t, 4 * j + 2), sum(t, 4 * j + 3));
    return;
  }

  // Rows lie side by side in a token's result: they are put so in the ring, whose last codes both groups have used.
  constexpr int kPitch = 64 * kTiles + 8;
  meet(kMultipliers, kMultiplying);
  auto* results = reinterpret_cast<uint16_t*>(shared) + threadIdx.x / 128 * (kTokens * kPitch);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int local = warp * 16 + owner + t * 64 + 8 * h, row = min(first_row + group_row + local, n - 1);
      const float all = factor_of_row(alpha, alpha_kind, row);
      const float added = bias == nullptr ? 0.0f : half_to_float<half>(bias[row]);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          results[(8 * j + 2 * place + i) * kPitch + local] =
              float_to_half<half>(fmaf(sum(t, 4 * j + 2 * h + i), all, added));
    }
  meet(kMultipliers, kMultiplying);
  store_results<kTokens, 64 * kTiles>(results, kPitch, out, first_token, first_row + group_row, m, n);
}

// Adds the splits of words_gemm, in order. Blocks of 128 threads: x tiles of 64 rows, y sixteens of tokens.
template <Half half>
__global__ void __launch_bounds__(128)
    add_word_splits(const float4* __restrict__ parts, int splits, int tiles, int eights,
                    const float* __restrict__ alpha, int alpha_kind, const uint16_t* __restrict__ bias,
                    uint16_t* __restrict__ out, int m, int n) {
  constexpr int kPitch = 64 + 8;
  __shared__ uint4 memory[16 * kPitch / 8];
  auto* results = reinterpret_cast<uint16_t*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
  float sums[2][4] = {};
#pragma unroll 4
  for (int s = 0; s < splits; ++s)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 part =
          __ldcs(parts + ((int64_t(s) * tiles + blockIdx.x) * eights + blockIdx.y * 2 + j) * 128 + threadIdx.x);
      sums[j][0] += part.x;
      sums[j][1] += part.y;
      sums[j][2] += part.z;
      sums[j][3] += part.w;
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int local = warp * 16 + owner + 8 * h, row = min(int(blockIdx.x) * 64 + local, n - 1);
    const float all = factor_of_row(alpha, alpha_kind, row);
    const float added = bias == nullptr ? 0.0f : half_to_float<half>(bias[row]);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        results[(8 * j + 2 * place + i) * kPitch + local] = float_to_half<half>(fmaf(sums[j][2 * h + i], all, added));
  }
  __syncthreads();
  store_results<16, 64>(results, kPitch, out, blockIdx.y * 16, blockIdx.x * 64, m, n);
}

}  // namespace lowbit
