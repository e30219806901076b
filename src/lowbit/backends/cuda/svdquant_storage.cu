// Packed 4-bit codes of activations, and their scales, as the products of svdquant_w4a4 take them.
#include "activation_tiles.cuh"
#include "dtypes.cuh"

namespace lowbit {

// The low nibbles of four bytes as int8.
template <bool kUnsigned>
LOWBIT_DEVICE uint32_t nibbles_to_bytes(uint32_t word) {
  word &= 0x0F0F0F0Fu;
  return kUnsigned ? word : word | (word & 0x08080808u) * 0x1Eu;  // a sign to the bits above it
}

// A thread stores the codes of eight columns of a token of each of eight eights: act [m, groups, 32 bytes] and scales
// [groups, m] -> codes of `padded` tokens, float32 scales [groups, padded]. Tokens behind the last have zeros.
template <Storage storage, bool kUnsigned, Dtype scale_type>
__global__ void __launch_bounds__(256)
    store_codes(const uint4* __restrict__ act, const void* __restrict__ scales, unsigned char* __restrict__ codes,
                float* __restrict__ token_scale, int m, int padded, int groups) {
  const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x;  // groups of 2 padded: neighbours have one token
  if (at >= int64_t(groups) * padded * 2) return;
  const int half = at % 2, token = at / 2 % padded, group = at / 2 / padded;
  const bool present = token < m;
  uint4 words{};
  if (present) words = __ldg(act + (int64_t(token) * groups + group) * 2 + half);
  const uint32_t eights[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto store = [&](int odd, uint32_t word) {
      const int64_t to = word_at<storage>(group, groups, padded, token, 4 * half + i, odd);
      *reinterpret_cast<uint32_t*>(codes + to) = word;
    };
    if constexpr (kTakesBytes<storage>) {
      store(0, nibbles_to_bytes<kUnsigned>(eights[i]));
      store(1, nibbles_to_bytes<kUnsigned>(eights[i] >> 4));
    } else {
      store(0, eights[i]);
    }
  }
  if (half == 0)
    token_scale[int64_t(group) * padded + token] =
        present ? load_number<scale_type>(scales, int64_t(group) * m + token) : 0.0f;
}

}  // namespace lowbit
