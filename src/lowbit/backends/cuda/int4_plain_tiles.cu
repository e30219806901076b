// int4_plain_mm for more tokens than int4_plain_mm.cu serves well: tensor cores with int8.
//
//   out[m, n] = sum over blocks b of  scale[n, g] * d[m, b] * (sum of q * a  -  zero[n, g] * sum of a)  + bias[n]
//
// One product is of 16 rows of the weight, 8 tokens, and exactly the 32 columns of a block, so that its exact integer
// sums are scaled and corrected before they are added. (With kPieces groups in a block, the words of 8 columns that the
// four places hold are multiplied one group at a time, the others set to zero.)
//
// A block of warps has kRowWarps * 16 rows and kTokenTiles * 8 tokens. Each of its kSplit teams of
// kRowWarps warps takes every kSplit-th chunk of 128 columns; the teams' sums are added at the end, in a fixed order. A
// team copies codes of both operands, and the scales and sums of the activations, to its shared memory kStages - 1
// chunks ahead. A lane asks for the scales of its rows one chunk ahead, those of the block that its place is the number
// of, and gets the others' from their lanes.
//
// In shared memory units of 16 bytes of a row change places, so that the eight rows of a matrix lie in different banks:
// unit u of the four of a row r of weights is at u ^ r / 2 % 4, of the eight of a token t at u ^ t % 8.
#include "async.cuh"
#include "int8_blocks.cuh"
#include "mma.cuh"

namespace lowbit {

constexpr int kChunk = 4;  // blocks of 32 columns in a chunk

// Two floats side by side, those of two tokens.
struct alignas(8) Pair {
  float first, second;
};

// steps [blocks, 1 + kPieces, wide]: the scale of a block and the sums of its codes by groups (round_blocks, unit 1).
template <Dtype dtype, Dtype scale_type, bool kZeros, int kTokenTiles, int kRowWarps, int kSplit, int kPieces,
          int kStages>
__global__ void __launch_bounds__(32 * kRowWarps * kSplit, scale_type == kFloat32 && kPieces == 4 ? 1 : 2)
    int4_tiles(const void* __restrict__ codes, const void* __restrict__ steps, const void* __restrict__ weights,
               const void* __restrict__ scale, const void* __restrict__ zero, const void* __restrict__ bias,
               void* __restrict__ out, int m, int n, int blocks, int shift, int wide) {
  constexpr int kTeam = 32 * kRowWarps, kRows = kRowWarps * 16, kTokens = kTokenTiles * 8;
  constexpr int kPlanes = 1 + kPieces;
  // Bytes of a chunk; the launcher has the same sum. [kRows, 64], [kTokens, 128], float [kChunk, kPlanes, kTokens].
  constexpr int kCodes = kRows * 64, kSteps = kCodes + kTokens * 128;
  constexpr int kStage = kSteps + kChunk * kPlanes * kTokens * 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, owner = lane / 4, place = lane % 4;
  const int team = warp / kRowWarps, row_warp = warp % kRowWarps, member = row_warp * 32 + lane;
  const int first_row = blockIdx.x * kRows, first_token = blockIdx.y * kTokens;
  const int chunks = (blocks + kChunk - 1) / kChunk;
  const uint32_t groups = kPieces > 1 ? uint32_t(blocks) * kPieces : uint32_t(blocks) >> shift;
  unsigned char* memory = dynamic_shared() + team * kStages * kStage;

  // What each member copies of a chunk: where from, in bytes, and where to. Rows and tokens behind the last repeat it:
  // they are never stored. What lies behind the last column is zero.
  constexpr int kWeightCopies = kRows * 4 / kTeam, kCodeCopies = (kTokens * 8 + kTeam - 1) / kTeam;
  constexpr int kStepUnits = kChunk * kPlanes * kTokens / 4, kStepCopies = (kStepUnits + kTeam - 1) / kTeam;
  uint32_t weights_at[kWeightCopies], codes_at[kCodeCopies], steps_at[kStepCopies];
  const int unit = member % 4, half = member % 8;
#pragma unroll
  for (int i = 0; i < kWeightCopies; ++i)
    weights_at[i] = (uint32_t(min(first_row + member / 4 + i * (kTeam / 4), n - 1)) * blocks + unit) * 16;
#pragma unroll
  for (int i = 0; i < kCodeCopies; ++i)
    codes_at[i] = uint32_t(min(first_token + member / 8 + i * (kTeam / 8), m - 1)) * (blocks * 32) + half * 16;
#pragma unroll
  for (int i = 0; i < kStepCopies; ++i) {
    const int at = member + i * kTeam;
    steps_at[i] = uint32_t(at / (kTokens / 4) * wide + first_token + at % (kTokens / 4) * 4) * 4;
  }
  const uint32_t steps_a_chunk = uint32_t(kChunk * kPlanes * 4) * wide;
  const auto copy = [&](int chunk, int stage) {
    unsigned char* to = memory + stage * kStage;
    const bool here = chunk * kChunk + unit < blocks, half_here = chunk * kChunk + half / 2 < blocks;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int row = member / 4 + i * (kTeam / 4);
      copy_async(to + row * 64 + (unit ^ row / 2 % 4) * 16,
                 behind<unsigned char>(weights, here ? weights_at[i] + chunk * (kChunk * 16) : 0), here);
    }
#pragma unroll
    for (int i = 0; i < kCodeCopies; ++i) {
      const int token = member / 8 + i * (kTeam / 8);
      if (kTokens * 8 % kTeam != 0 && token >= kTokens) break;
      copy_async(to + kCodes + token * 128 + (half ^ token % 8) * 16,
                 behind<unsigned char>(codes, half_here ? codes_at[i] + chunk * (kChunk * 32) : 0), half_here);
    }
#pragma unroll
    for (int i = 0; i < kStepCopies; ++i) {
      const int at = member + i * kTeam;
      if (kStepUnits % kTeam != 0 && at >= kStepUnits) break;
      const bool step_here = chunk * kChunk + at / (kPlanes * kTokens / 4) < blocks;
      copy_async(to + kSteps + at * 16,
                 behind<unsigned char>(steps, step_here ? steps_at[i] + chunk * steps_a_chunk : 0), step_here);
    }
  };

  uint32_t scales_at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) scales_at[h] = uint32_t(min(first_row + row_warp * 16 + h * 8 + owner, n - 1)) * groups;
  uint32_t factor_ahead[2][kPieces], offset_ahead[2][kPieces];
  const auto fetch = [&](int chunk) {
    const uint32_t block = min(chunk * kChunk + place, blocks - 1);
#pragma unroll
    for (int i = 0; i < 2 * kPieces; ++i) {
      const int h = i / kPieces, p = i % kPieces;
      const uint32_t at = scales_at[h] + (kPieces > 1 ? block * kPieces + p : block >> shift);
      factor_ahead[h][p] = load_bits<scale_type>(scale, at * kSizeOf<scale_type>);
      if constexpr (kZeros) offset_ahead[h][p] = load_bits<scale_type>(zero, at * kSizeOf<scale_type>);
    }
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (team + i * kSplit < chunks) copy(team + i * kSplit, i);
    commit_copies();
  }
  if (team < chunks) fetch(team);

  float totals[kTokenTiles][4] = {};
  int stage = 0, next = kStages - 1;
#pragma unroll 1
  for (int chunk = team; chunk < chunks; chunk += kSplit) {
    wait_copies<kStages - 2>();
    meet(1 + team, kTeam);  // this chunk's bytes are there, and all have left the one whose place is filled next
    if (chunk + (kStages - 1) * kSplit < chunks) copy(chunk + (kStages - 1) * kSplit, next);
    commit_copies();
    uint32_t factors[2][kPieces], offsets[2][kPieces];
#pragma unroll
    for (int i = 0; i < 2 * kPieces; ++i) {
      const int h = i / kPieces, p = i % kPieces;
      factors[h][p] = factor_ahead[h][p];
      if constexpr (kZeros && scale_type != kFloat32) factors[h][p] |= offset_ahead[h][p] << 16;
      if constexpr (kZeros && scale_type == kFloat32) offsets[h][p] = offset_ahead[h][p];
    }
    if (chunk + kSplit < chunks) fetch(chunk + kSplit);

    const unsigned char* from = memory + stage * kStage;
    const unsigned char* own_weights = from + (row_warp * 16 + lane % 16) * 64;
    const auto* own_steps = reinterpret_cast<const Pair*>(from + kSteps) + place;
    uint32_t words[4];                        // of two blocks, two halves of 16 rows
#pragma unroll kTokenTiles == 8 ? 2 : kChunk  // all four at once would take more registers than there are
    for (int b = 0; b < kChunk; ++b) {
      if (b % 2 == 0) load_matrices(words, own_weights + ((b + lane / 16) ^ lane % 16 / 2 % 4) * 16);
      float factor[2][kPieces], offset[2][kPieces];
#pragma unroll
      for (int i = 0; i < 2 * kPieces; ++i) {
        const int h = i / kPieces, p = i % kPieces;
        const uint32_t found = from_lane(factors[h][p], owner * 4 + b);
        factor[h][p] = number<scale_type>(found);
        offset[h][p] = 8.0f;
        if constexpr (kZeros && scale_type != kFloat32) offset[h][p] = number<scale_type>(found >> 16);
        if constexpr (kZeros && scale_type == kFloat32)
          offset[h][p] = __uint_as_float(from_lane(offsets[h][p], owner * 4 + b));
      }
      uint32_t left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = words[b % 2 * 2 + i % 2] >> i / 2 * 4 & 0x0F0F0F0Fu;
      uint32_t values[4];  // of two tiles of tokens; of one alone, twice the same
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        if (j % 2 == 0) {
          const int token = 8 * (j + (kTokenTiles > 1 ? lane / 16 : 0)) + lane % 8;
          load_matrices(values, from + kCodes + token * 128 + ((2 * b + lane / 8 % 2) ^ lane % 8) * 16);
        }
        const Pair step = own_steps[(b * kPlanes * kTokens + 8 * j) / 2];
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          const Pair sum = own_steps[((b * kPlanes + 1 + p) * kTokens + 8 * j) / 2];
          constexpr int start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
          uint32_t some[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) some[i] = kPieces == 1 || place * kPieces / 4 == p ? left[i] : 0u;
          int products[4];
          mma_int8(products, some, values[j % 2 * 2], values[j % 2 * 2 + 1], start);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float product = __uint_as_float(uint32_t(products[i])) - kMagic;
            const float corrected = fmaf(-offset[i / 2][p], i % 2 ? sum.second : sum.first, product);
            const float by = factor[i / 2][p] * (i % 2 ? step.second : step.first);
            totals[j][i] = fmaf(by, corrected, totals[j][i]);
          }
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  wait_copies<0>();
  __syncthreads();

  // Sums [kSplit, kTokens, kRows + 4] in the place of the stages: written by fragments, read by rows.
  constexpr int kLine = kRows + 4;
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shared[(team * kTokens + 8 * j + 2 * place + i % 2) * kLine + row_warp * 16 + owner + 8 * (i / 2)] = totals[j][i];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kTokens; i += kTeam * kSplit) {
    const int row = first_row + i % kRows, token = first_token + i / kRows;
    if (row >= n || token >= m) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < kSplit; ++s) total += shared[(s * kTokens + i / kRows) * kLine + i % kRows];
    if (bias != nullptr) total += load_number<dtype>(bias, row);
    store_number<dtype>(out, int64_t(token) * n + row, total);
  }
}

}  // namespace lowbit
