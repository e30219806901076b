// The product of svdquant_w4a4 on Hopper: int8 products of warpgroups (wgmma), scaled for each group of 64 columns.
//
//   out[m, r] = sum over groups g of scale[g, m] * weight_scale[g, r] * sum of codes * weight
//             + sum over c of low[m, c] * up[r, c] + bias[r]
//
// A block has 128 rows of the weight, 64 for each of two warpgroups, and kTokens tokens. One thread more asks for bulk
// copies of the groups to come into a ring of slots. Weights are operand A, made in registers: a word has eight codes,
// its low nibbles are the even columns and its high ones the odd columns, either 16 times too large. Activations are
// operand B as they lie in memory.
//
// The tensor cores are faster than the scaling of what they make, so the scaling is what there is to save on. A sum is
// converted, multiplied by the row's scale, and by the token's while it is added: three instructions. In the parts of
// kOffset it is two: one product of constants more, 32 * 64 * 64 = 2**17, makes the sum positive, and the bits of a
// small positive integer are those of the float 2**-149 times as large. That times (2**96 * scale) minus (2**-36 *
// scale), both exact, is 2**-53 * sum * scale, rounded once. 2**49 at the end puts that right, and the 16.
//
// kTokens are cut into parts of up to 64. While the sums of one are scaled, the products of the next are under way into
// other registers: those of the next group at the end of one.
//
// With `whole` this is the whole result: the product of the low rank is added by the tensor cores, with `low` cut in
// two halves whose sum it is to 16 bits (bfloat16) or 22 (float16), which come through the same ring. Without, the
// groups are shared out among blocks, whose sums another kernel adds up in order.
#include "floats.cuh"
#include "transpose.cuh"
#include "wgmma.cuh"

namespace lowbit {

enum ScaleType { kScaleBFloat16 = 0, kScaleFloat16 = 1, kScaleFloat32 = 2 };

inline constexpr int kWarpgroups = 2, kRows = 64 * kWarpgroups, kConsumers = 128 * kWarpgroups;
inline constexpr int kThreads =
    kConsumers + 128;                    // registers are given to whole warpgroups: a third one asks for copies
inline constexpr int kLowColumns = 32;   // of the low rank, in a slot: as many bytes of a token as a group has
inline constexpr int kTileBytes = 2048;  // of the weight: 64 rows, a group

template <ScaleType type>
constexpr int kScaleBytes = type == kScaleFloat32 ? 4 : 2;

// What a slot of the ring holds of kGroups groups, and where.
template <int kTokens, int kGroups, ScaleType type>
struct Slot {
  static constexpr int kCodes = 0;
  static constexpr int kWeight = kCodes + kGroups * kTokens * 64;
  static constexpr int kTokenScale = kWeight + kWarpgroups * kGroups * kTileBytes;
  static constexpr int kRowScale = kTokenScale + kGroups * kTokens * 4;
  static constexpr int kBytes = (kRowScale + kGroups * kRows * kScaleBytes<type> + 1023) / 1024 * 1024;
};

template <ScaleType type>
LOWBIT_DEVICE float scale_at(const unsigned char* scales, int row) {
  if constexpr (type == kScaleFloat32) return reinterpret_cast<const float*>(scales)[row];
  constexpr Half half = type == kScaleFloat16 ? kFloat16 : kBFloat16;
  return half_to_float<half>(reinterpret_cast<const uint16_t*>(scales)[row]);
}

// Two columns of a row of `up` side by side, zero behind the last.
LOWBIT_DEVICE uint32_t up_pair(const uint16_t* row, int column, int rank) {
  if (rank % 2 == 0) return column < rank ? __ldg(reinterpret_cast<const uint32_t*>(row + column)) : 0;
  const uint32_t first = column < rank ? __ldg(row + column) : 0;
  return first | uint32_t(column + 1 < rank ? __ldg(row + column + 1) : 0) << 16;
}

// 1 / 2**e.
LOWBIT_DEVICE float inverse_power(float power) { return __uint_as_float(0x7F000000u - __float_as_uint(power)); }

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Of the groups, the block with blockIdx.z takes its share. `padded`: tokens of codes, token_scale and low. row_step:
// rows of weight_scale, a multiple of 8. low: pieces of kLowColumns columns, first halves and second halves in turn,
// [2 pieces, padded, 64] bytes, with low_factor what they are to be multiplied by (float16 only). sums [splits, n,
// padded] is written unless `whole`.
template <int kTokens, int kGroups, int kSlots, int kOffset, ScaleType type, Half half, bool whole>
__global__ void __launch_bounds__(kThreads, kTokens <= 16 ? 2 : 1)
    svdquant_product(const unsigned char* __restrict__ codes, const float* __restrict__ token_scale,
                     const unsigned char* __restrict__ weight, const unsigned char* __restrict__ weight_scale,
                     const unsigned char* __restrict__ low, const float* __restrict__ low_factor,
                     const uint16_t* __restrict__ up, const uint16_t* __restrict__ bias, uint16_t* __restrict__ out,
                     float* __restrict__ sums, int m, int padded, int n, int row_step, int groups, int rank) {
  using Here = Slot<kTokens, kGroups, type>;
  constexpr int kPart = kTokens < 64 ? kTokens : 64, kParts = kTokens / kPart, kSums = kPart / 2;
  constexpr int kSixtyFours = kOffset ? 64 * kPart : 0;  // bytes of them, which make the offset
  static_assert(!whole || kGroups == 1, "a slot has a piece of the low rank");
  unsigned char* ring = dynamic_shared();
  unsigned char* offsets = ring + kSlots * Here::kBytes;
  auto* full = reinterpret_cast<Mailbox*>(offsets + kSixtyFours);
  Mailbox* empty = full + kSlots;
  // The compiler must see that all lanes of a warp go the same way: products on a path where some lanes are not would
  // be made to wait for one another.
  const bool copies = from_lane(int(threadIdx.x / 128), 0) == kWarpgroups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      open_mailbox(full + i, 1);
      open_mailbox(empty + i, kConsumers / 32);
    }
    publish_mailboxes();
  }
  if constexpr (kSixtyFours != 0) {
    if (threadIdx.x < kSixtyFours / 16)
      *reinterpret_cast<uint4*>(offsets + 16 * threadIdx.x) =
          make_uint4(0x40404040u, 0x40404040u, 0x40404040u, 0x40404040u);
    publish_shared();
  }
  __syncthreads();

  const int first_row = blockIdx.x * kRows, first_token = blockIdx.y * kTokens;
  // Less than 2**25 groups, times 16 splits: a division of 64 bits would be a call.
  const int begin = int(uint32_t(groups) * blockIdx.z / gridDim.z);
  const int count = int(uint32_t(groups) * (blockIdx.z + 1) / gridDim.z) - begin;

  if (copies) {  // asks for copies
    if constexpr (kTokens > 64) give_registers<24>();
    if (threadIdx.x != kConsumers) return;
    const int pieces = whole ? (rank + kLowColumns - 1) / kLowColumns : 0;
    const uint32_t tokens = min(kTokens, padded - first_token);
    const uint32_t rows = min(kRows, row_step - first_row);
    const int blocks = (n + 63) / 64;
    int slot = 0, parity = 1;
    const auto next = [&] {
      if (++slot == kSlots) slot = 0, parity ^= 1;
    };
    for (int g = 0; g < count; g += kGroups) {
      const uint32_t some = min(kGroups, count - g);
      unsigned char* to = ring + slot * Here::kBytes;
      wait_for(empty + slot, parity);
      arrive_expecting(full + slot, some * (tokens * 68 + kWarpgroups * kTileBytes + rows * kScaleBytes<type>));
      const int64_t group = begin + g;
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        const int64_t block = min(int(blockIdx.x) * kWarpgroups + w, blocks - 1);  // the last is there twice
        copy_bulk(to + Here::kWeight + w * kGroups * kTileBytes, weight + (block * groups + group) * kTileBytes,
                  some * kTileBytes, full + slot);
      }
      for (uint32_t i = 0; i < some; ++i) {
        const int64_t token = (group + i) * padded + first_token;
        copy_bulk(to + Here::kCodes + i * (kTokens * 64), codes + token * 64, tokens * 64, full + slot);
        copy_bulk(to + Here::kTokenScale + i * (kTokens * 4), token_scale + token, tokens * 4, full + slot);
        copy_bulk(to + Here::kRowScale + i * (kRows * kScaleBytes<type>),
                  weight_scale + ((group + i) * row_step + first_row) * kScaleBytes<type>, rows * kScaleBytes<type>,
                  full + slot);
      }
      next();
    }
    for (int i = 0; i < 2 * pieces; ++i) {
      wait_for(empty + slot, parity);
      arrive_expecting(full + slot, tokens * 64);
      copy_bulk(ring + slot * Here::kBytes, low + (int64_t(i) * padded + first_token) * 64, tokens * 64, full + slot);
      next();
    }
    return;
  }

  if constexpr (kTokens > 64) take_registers<240>();
  const int owner = lane / 4, place = lane % 4;
  const int row_here = 16 * warp + owner;  // and + 8
  const int weight_here = Here::kWeight + warp / 4 * (kGroups * kTileBytes) + warp % 4 * 512 + lane * 16;
  int slot = 0, parity = 0, within = 0;
  using Sums = int[kSums];  // NVRTC before 13.4 dies of a lambda that takes an array by its size
  float total[kParts][kSums];
  Sums made[2];
  uint32_t even[4], odd[4], sixty_fours[4] = {0x40404040u, 0x40404040u, 0x40404040u, 0x40404040u};
  if constexpr (kOffset != 0) hold(sixty_fours);  // they stay, and are not made anew for each product
  uint4 word;
  float plain[2], raised[2], lowered[2];  // the rows' scales
#pragma unroll
  for (int p = 0; p < kParts; ++p)
#pragma unroll
    for (int i = 0; i < kSums; ++i) total[p][i] = 0.0f;

  // Waits for the group that `slot` and `within` name, and reads its weights.
  const auto fetch = [&] {
    if (within == 0) wait_for(full + slot, parity);
    word = *reinterpret_cast<const uint4*>(ring + slot * Here::kBytes + weight_here + within * kTileBytes);
  };
  const auto decode = [&] {
    const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) even[i] = words[i] << 4 & 0xF0F0F0F0u, odd[i] = words[i] & 0xF0F0F0F0u;
    hold(even);  // ready before a product begins: it would be cut off from the next one
    hold(odd);
  };
  const auto take_scales = [&](int which, int group) {
    const unsigned char* from = ring + which * Here::kBytes + Here::kRowScale + group * (kRows * kScaleBytes<type>);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = scale_at<type>(from, row_here + 8 * h);
      plain[h] = kOffset ? scale * 0x1p-53f : scale;
      raised[h] = scale * 0x1p96f;
      lowered[h] = scale * -0x1p-36f;
    }
  };
  const auto begin_part = [&](Sums& into, auto part) {
    constexpr int p = decltype(part)::value;
    constexpr bool adds = (kOffset >> p & 1) != 0;
    const unsigned char* at = ring + slot * Here::kBytes + Here::kCodes + within * (kTokens * 64) + p * (kPart * 64);
    begin_products();
    if constexpr (adds) {
      wgmma_int8<kPart>(into, sixty_fours, Tile<64>{offsets}, false);
    }
    wgmma_int8<kPart>(into, even, Tile<64>{at}, adds);
    wgmma_int8<kPart>(into, odd, Tile<64>{at + 32}, true);
    commit_products();
  };
  const auto scale_part = [&](const Sums& from, auto part, const float* scales) {
    constexpr int p = decltype(part)::value;
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const float2 token = *reinterpret_cast<const float2*>(scales + kPart * p + 8 * j + 2 * place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int sum = from[4 * j + i];
        const float scaled =
            kOffset >> p & 1 ? fmaf(__int_as_float(sum), raised[i / 2], lowered[i / 2]) : float(sum) * plain[i / 2];
        total[p][4 * j + i] = fmaf(scaled, i % 2 ? token.y : token.x, total[p][4 * j + i]);
      }
    }
  };
  const auto release = [&](int which) {
    __syncwarp();
    if (lane == 0) arrive(empty + which);
  };

  const auto scales_of = [&](int which, int group) {
    return reinterpret_cast<const float*>(ring + which * Here::kBytes + Here::kTokenScale) + group * kTokens;
  };
  // One group. Its first part begins, then the last one of the group before is scaled. Nothing is under way at the end,
  // when the sums of the group's last part are in made[kNow ^ (kParts - 1) % 2], and the next group's weights are
  // fetched: registers that products read or write are the same ones whenever the loop begins.
  const auto finish_group = [&](auto now) {
    __syncwarp();  // the assembler reads no scale before, so that all products are under way when scaling begins
    hold(made[decltype(now)::value]);
    const int before = within != 0 ? slot : slot != 0 ? slot - 1 : kSlots - 1;
    const int last = within != 0 ? within - 1 : kGroups - 1;
    take_scales(before, last);  // once more: there are registers for them only now
    scale_part(made[decltype(now)::value], Constant<kParts - 1>{}, scales_of(before, last));
    if (within == 0) release(before);
  };
  const auto later_parts = [&](auto self, auto part, auto now) -> void {
    constexpr int p = decltype(part)::value, kNow = decltype(now)::value;
    if constexpr (p < kParts) {
      begin_part(made[kNow], part);
      if constexpr (p == 1) take_scales(slot, within);
      wait_products<1>();
      hold(made[1 - kNow]);
      scale_part(made[1 - kNow], Constant<p - 1>{}, scales_of(slot, within));
      self(self, Constant<p + 1>{}, Constant<1 - kNow>{});
    }
  };
  const auto group = [&](auto now, auto is_first, bool more) {
    constexpr int kNow = decltype(now)::value, kLast = kNow ^ (kParts - 1) % 2;
    decode();
    begin_part(made[kNow], Constant<0>{});
    if constexpr (!decltype(is_first)::value) finish_group(Constant<1 - kNow>{});
    later_parts(later_parts, Constant<1>{}, Constant<1 - kNow>{});
    if (++within == kGroups) {
      within = 0;
      if (++slot == kSlots) slot = 0, parity ^= 1;
    }
    if (more) fetch();
    wait_products<0>();
    hold(made[kLast]);
    hold(even);
    hold(odd);
  };

  fetch();
  group(Constant<0>{}, Constant<1>{}, count > 1);
  if constexpr (kParts % 2 == 0) {
    for (int left = count - 1; left > 0; --left) group(Constant<0>{}, Constant<0>{}, left > 1);
    finish_group(Constant<1>{});
  } else {
    int left = count - 1;
    for (; left > 1; left -= 2) {
      group(Constant<1>{}, Constant<0>{}, true);
      group(Constant<0>{}, Constant<0>{}, left > 2);
    }
    if (left) {
      group(Constant<1>{}, Constant<0>{}, false);
      finish_group(Constant<1>{});
    } else {
      finish_group(Constant<0>{});
    }
  }

  constexpr float kFinish = kOffset ? 0x1p49f : 0x1p-4f;
  const int row = first_row + row_here;
  if constexpr (!whole) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h >= n) continue;
      float* to = sums + (int64_t(blockIdx.z) * n + row + 8 * h) * padded;
#pragma unroll
      for (int p = 0; p < kParts; ++p)
#pragma unroll
        for (int j = 0; j < kSums / 4; ++j) {
          const int token = first_token + kPart * p + 8 * j + 2 * place;
          const float* two = total[p] + 4 * j + 2 * h;
          if (token < padded) *reinterpret_cast<float2*>(to + token) = make_float2(two[0] * kFinish, two[1] * kFinish);
        }
    }
    return;
  } else {
    // ---- the low rank -----------------------------------------------------------------------------------------------
    const int pieces = (rank + kLowColumns - 1) / kLowColumns;
    const uint16_t* up_rows[2];
    float added[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int inside = min(row + 8 * h, n - 1);
      up_rows[h] = up + int64_t(inside) * rank;
      added[h] = bias == nullptr ? 0.0f : half_to_float<half>(__ldg(bias + inside));
    }
    uint32_t ahead[2][4];
    const auto load_up = [&](int piece) {
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ahead[s][i] = up_pair(up_rows[i % 2], piece * kLowColumns + 16 * s + 8 * (i / 2) + 2 * place, rank);
    };
    if (pieces) load_up(0);

    // What a column of sums is multiplied by, before the low rank is added and after.
    const auto token_factor = [&](int p, int j) {
      const int token = first_token + kPart * p + 8 * j + 2 * place;  // those behind the last are not stored
      return token < padded ? *reinterpret_cast<const float2*>(low_factor + token) : make_float2(1.0f, 1.0f);
    };
    const bool factors = half == kFloat16 && pieces != 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j) {
        float2 factor = make_float2(kFinish, kFinish);
        if (factors) {
          const float2 token = token_factor(p, j);
          factor = make_float2(kFinish * inverse_power(token.x), kFinish * inverse_power(token.y));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) total[p][4 * j + i] *= i % 2 ? factor.y : factor.x;
      }

    for (int piece = 0; piece < pieces; ++piece) {
      uint32_t left[2][4];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[s][i] = ahead[s][i];
      const int slot_of_first = slot;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        wait_for(full + slot, parity);
        const unsigned char* at = ring + slot * Here::kBytes;
        begin_products();
#pragma unroll
        for (int p = 0; p < kParts; ++p)
#pragma unroll
          for (int s = 0; s < 2; ++s)
            wgmma<half, kPart>(total[p], left[s], Tile<64>{at + p * (kPart * 64) + 32 * s}, true);
        commit_products();
        if (++slot == kSlots) slot = 0, parity ^= 1;
      }
      if (piece + 1 < pieces) load_up(piece + 1);
      wait_products<0>();
#pragma unroll
      for (int p = 0; p < kParts; ++p) hold(total[p]);
#pragma unroll
      for (int s = 0; s < 2; ++s) hold(left[s]);
      release(slot_of_first);
      release(slot_of_first + 1 == kSlots ? 0 : slot_of_first + 1);
    }

    // ---- bias, the cast, and rows of tokens through shared memory ---------------------------------------------------
    constexpr int kStride = 2 * kRows + 16;  // 16 bytes on, so that eight tokens lie in different banks
    static_assert(kTokens * kStride <= kSlots * Here::kBytes, "the ring has room for the result");
    meet(1, kConsumers);  // nobody reads the ring any more
    int thread[1] = {int(threadIdx.x)};
    hold(thread);  // places are reckoned anew: no register is kept for them
#pragma unroll
    for (int p = 0; p < kParts; ++p)
#pragma unroll
      for (int j = 0; j < kSums / 4; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int from = 4 * (j + i / 2) + 2 * (i % 2);
          float2 two = make_float2(total[p][from], total[p][from + 1]);
          if (factors) {
            const float2 token = token_factor(p, j + i / 2);
            two = make_float2(two.x * token.x, two.y * token.y);
          }
          words[i] = float_to_half<half>(two.x + added[i % 2]) | uint32_t(float_to_half<half>(two.y + added[i % 2]))
                                                                     << 16;
        }
        const int token = kPart * p + 8 * (j + thread[0] % 32 / 16) + thread[0] % 8;
        store_transposed(words, ring + token * kStride + 2 * (thread[0] / 32 * 16 + 8 * (thread[0] / 8 % 2)));
      }
    meet(1, kConsumers);
    constexpr int kPieces = kRows / 8;
    for (int i = threadIdx.x; i < kTokens * kPieces; i += kConsumers) {
      const int token = i / kPieces, begins = first_row + i % kPieces * 8;
      if (first_token + token >= m || begins >= n) continue;
      const uint4 values = *reinterpret_cast<const uint4*>(ring + token * kStride + i % kPieces * 16);
      uint16_t* to = out + int64_t(first_token + token) * n + begins;
      if (n % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = values;
      } else {
        const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (begins + e < n) to[e] = uint16_t(words[e / 2] >> 16 * (e % 2));
      }
    }
  }
}

// low [splits, padded, rank], added over the splits in order, as halves that add up to it: [2 pieces, padded, 64]
// bytes, 32 columns in a piece, zero behind the last, in the order that a product wants (wgmma.cuh). A warp has a
// token. In float16 they are low / factor[token], a power of two, so that the largest has room and the smallest keep
// their bits.
template <Half half>
__global__ void __launch_bounds__(128) split_low(const float* __restrict__ low, uint4* __restrict__ out,
                                                 float* __restrict__ factor, int splits, int padded, int rank) {
  const int lane = threadIdx.x % 32, token = blockIdx.x * 4 + threadIdx.x / 32;
  const int eights = (rank + kLowColumns - 1) / kLowColumns * (kLowColumns / 8);
  if (token >= padded) return;
  const auto low_at = [&](float (&values)[8], int eight) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = 0.0f;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float* from = low + (int64_t(s) * padded + token) * rank + 8 * eight;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (8 * eight + i < rank) values[i] += __ldg(from + i);
    }
  };
  float by = 1.0f;
  if constexpr (half == kFloat16) {
    float most = 0.0f;
    for (int eight = lane; eight < eights; eight += 32) {
      float values[8];
      low_at(values, eight);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float size = fabsf(values[i]);
        most = not_a_number(size) || size > most ? size : most;
      }
    }
    const int exponent = int(__float_as_uint(warp_max(most)) >> 23) - 127 - 14;
    const int power = min(max(exponent, -20), 112);
    by = __uint_as_float(uint32_t(127 - power) << 23);
    if (lane == 0) factor[token] = __uint_as_float(uint32_t(127 + power) << 23);
  }
  for (int eight = lane; eight < eights; eight += 32) {
    uint32_t first[4] = {}, second[4] = {};
    float values[8];
    low_at(values, eight);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = values[i] * by;
      const uint16_t high = float_to_half<half>(value);
      const float rest = is_finite(half_to_float<half>(high)) ? value - half_to_float<half>(high) : 0.0f;
      first[i / 2] |= uint32_t(high) << 16 * (i % 2);
      second[i / 2] |= uint32_t(float_to_half<half>(rest)) << 16 * (i % 2);
    }
    const int piece = eight / 4, to = eight % 4 ^ token / 2 % 4;
    out[(int64_t(2 * piece) * padded + token) * 4 + to] = make_uint4(first[0], first[1], first[2], first[3]);
    out[(int64_t(2 * piece + 1) * padded + token) * 4 + to] = make_uint4(second[0], second[1], second[2], second[3]);
  }
}

// What blocks without the whole result left: sums [splits, n, padded], low [low_splits, padded, rank], either added
// over its splits in order. A block has 64 rows and 16 tokens, a thread a row and four of them.
template <Half half>
__global__ void __launch_bounds__(256)
    finish_sums(const float* __restrict__ sums, const float* __restrict__ low, const uint16_t* __restrict__ up,
                const uint16_t* __restrict__ bias, uint16_t* __restrict__ out, int splits, int low_splits, int m,
                int padded, int n, int rank) {
  constexpr int kColumns = 64, kEach = 16 * kColumns / 256;
  __shared__ float4 pieces[kColumns][4];
  const int first_token = blockIdx.y * 16, four = threadIdx.x % 4, row = blockIdx.x * 64 + threadIdx.x / 4;
  const int inside = min(row, n - 1);
  float total[4] = {};
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const float4 some =
        *reinterpret_cast<const float4*>(sums + (int64_t(s) * n + inside) * padded + first_token + 4 * four);
    total[0] += some.x, total[1] += some.y, total[2] += some.z, total[3] += some.w;
  }
  const auto add = [&](uint16_t factor, int column) {
    const float by = half_to_float<half>(factor);
    const float4 some = pieces[column][four];
    total[0] = fmaf(by, some.x, total[0]), total[1] = fmaf(by, some.y, total[1]);
    total[2] = fmaf(by, some.z, total[2]), total[3] = fmaf(by, some.w, total[3]);
  };
  const uint16_t* factors = up + int64_t(inside) * rank;
  for (int begin = 0; begin < rank; begin += kColumns) {
    const int columns = min(kColumns, rank - begin), mine = threadIdx.x % kColumns;
    float values[kEach] = {};
#pragma unroll 4
    for (int s = 0; s < low_splits; ++s)
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int token = first_token + threadIdx.x / kColumns + 256 / kColumns * e;
        if (mine < columns && token < m) values[e] += __ldg(low + (int64_t(s) * padded + token) * rank + begin + mine);
      }
    __syncthreads();  // the columns before are used
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      reinterpret_cast<float*>(pieces[mine])[threadIdx.x / kColumns + 256 / kColumns * e] = values[e];
    __syncthreads();
    if (rank % 8 == 0) {
#pragma unroll 2
      for (int column = 0; column < columns; column += 8) {
        const uint4 some = __ldg(reinterpret_cast<const uint4*>(factors + begin + column));
        const uint32_t words[4] = {some.x, some.y, some.z, some.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) add(uint16_t(words[i / 2] >> 16 * (i % 2)), column + i);
      }
    } else {
      for (int column = 0; column < columns; ++column) add(__ldg(factors + begin + column), column);
    }
  }
  if (row >= n) return;
  const float added = bias == nullptr ? 0.0f : half_to_float<half>(__ldg(bias + row));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = first_token + 4 * four + i;
    if (token < m) out[int64_t(token) * n + row] = float_to_half<half>(total[i] + added);
  }
}

}  // namespace lowbit
