// quantize and scale_search for awq_w4a16 and wna16 of 4 and 8 bits: unsigned integers, a scale and an offset or a zero
// point for every group of columns.
#include "native/bind.h"
#include "native/encode.h"

namespace lowbit {
namespace {

constexpr float kMinScale = 0x1p-24f;
constexpr int64_t kSummed = 512;  // columns that are summed in float32, before float64 takes over

// The grid of a group: w = (code - middle - zero) * scale + offset, with codes from low to high before the middle.
struct Grid {
  Stored scale, offset;  // the offset of awq_w4a16
  float zero;            // the zero point of wna16
};

struct Bounds {
  float low, high;
};

Bounds bounds_of(const float* x, int64_t padded) {
  using namespace simd;
  F32 low = load_f32(x), high = low;
  for (int64_t c = kLanes; c < padded; c += kLanes) {
    const F32 value = load_f32(x + c);
    low = min(low, value);
    high = max(high, value);
  }
  return {-reduce_max(sub(zero_f32(), low)), reduce_max(high)};
}

// What a format makes of the bounds of a group. `tried` are pairs, or single numbers, that narrow them.
struct AwqFormat {
  int stored;  // dtype of scales and offsets
  static constexpr float kLow = -8.0f, kHigh = 7.0f, kMiddle = 8.0f;
  static constexpr int kPer = 2;

  float low() const { return kLow; }
  float high() const { return kHigh; }
  float middle() const { return kMiddle; }
  float divided(const Bounds& b) const { return std::max((b.high * 0.5f - b.low * 0.5f) / 7.5f, kMinScale); }

  // Fitted in float32, then stored.
  Grid fitted(const Bounds& b) const {
    const float scale = divided(b);
    return {Stored(scale, stored), Stored(b.low + 8.0f * scale, stored), 0.0f};
  }
  // The offset of a candidate is that of its stored scale.
  Grid narrowed(const Bounds& b, const float* tried) const {
    const float span = b.high - b.low;
    const Bounds cut{b.low + span * tried[0], b.high - span * tried[1]};
    const Stored scale(divided(cut), stored);
    return {scale, Stored(cut.low + 8.0f * scale.value, stored), 0.0f};
  }
};

struct WnaFormat {
  int stored;
  int bits;
  bool zero_point;
  float largest;  // scale that may be stored

  float low() const { return zero_point ? 0.0f : 1.0f - static_cast<float>(1 << (bits - 1)); }
  float high() const {
    return zero_point ? static_cast<float>((1 << bits) - 1) : static_cast<float>((1 << (bits - 1)) - 1);
  }
  float middle() const { return zero_point ? 0.0f : static_cast<float>(1 << (bits - 1)); }
  Stored kept(float scale) const { return Stored(std::min(std::max(scale, kMinScale), largest), stored); }

  Grid affine(float low_end, float high_end) const {
    const Stored scale = kept(high_end / high() - low_end / high());
    const float zero = std::nearbyint(-low_end / scale.value);
    return {scale, Stored(0.0f, stored), std::min(std::max(zero, 0.0f), high())};
  }
  static Bounds with_zero(const Bounds& b) { return {std::min(b.low, 0.0f), std::max(b.high, 0.0f)}; }
  Grid fitted(const Bounds& found) const {
    const Bounds b = with_zero(found);
    if (zero_point) return affine(b.low, b.high);
    return {kept(std::max(-b.low, b.high) / high()), Stored(0.0f, stored), 0.0f};
  }
  Grid narrowed(const Bounds& found, const float* tried) const {
    const Bounds b = with_zero(found);
    if (zero_point) return affine(b.low * tried[0], b.high * tried[1]);
    return {kept(std::max(b.low / low(), b.high / high()) * tried[0]), Stored(0.0f, stored), 0.0f};
  }
};

template <class Format>
struct Job {
  Matrix w;
  Format format;
  int64_t group;       // columns; the last one may be shorter
  const float* tried;  // [count, 2]
  int count;
  const float* weights;
  uint8_t* codes;
  int64_t stride;  // bytes of a row of codes
  int bits;
  void* scales;
  void* offsets;                 // or null
  uint8_t* zero_points;          // or null
  int64_t row_step, group_step;  // of scales, offsets and zero points
};

template <class Format, bool kWeighted>
double error(const Format& format, const float* x, int64_t padded, const Grid& grid, const float* weights) {
  using namespace simd;
  const F32 offset = set1_f32(grid.offset.value), inverse = set1_f32(1.0f / grid.scale.value);
  const F32 low = set1_f32(format.low() - grid.zero), high = set1_f32(format.high() - grid.zero);
  double total = 0.0;
  for (int64_t c = 0; c < padded;) {
    F32 sum = zero_f32();
    for (const int64_t end = std::min(padded, c + kSummed); c < end; c += kLanes) {
      const F32 miss = integer_miss(mul(sub(load_f32(x + c), offset), inverse), low, high);
      sum = fma(kWeighted ? mul(miss, load_f32(weights + c)) : miss, miss, sum);
    }
    total += reduce_add(sum);
  }
  return total * grid.scale.value * grid.scale.value;
}

template <class Format>
Grid chosen(const Job<Format>& job, const float* x, int64_t first, int64_t padded, const float* weights) {
  const Bounds bounds = bounds_of(x + first, padded);
  Grid best = job.format.fitted(bounds);
  if (!job.count) return best;
  auto loss = [&](const Grid& grid) {
    return weights ? error<Format, true>(job.format, x + first, padded, grid, weights + first)
                   : error<Format, false>(job.format, x + first, padded, grid, nullptr);
  };
  double least = loss(best);
  for (int i = 0; i < job.count; ++i) {
    const Grid grid = job.format.narrowed(bounds, job.tried + 2 * i);
    const double found = loss(grid);
    if (found < least) least = found, best = grid;
  }
  return best;
}

template <class Format, class Codes>
void encode_group(const Format& format, const float* x, int64_t padded, const Grid& grid, const Codes& store) {
  using namespace simd;
  const F32 offset = set1_f32(grid.offset.value);
  const Divisor by(set1_f32(grid.scale.value));
  // Where there is a middle it is added before the rounding in one format, after it in the other: to the even code.
  for (int64_t c = 0; c < padded; c += kLanes) {
    const F32 value = by(sub(load_f32(x + c), offset));
    if constexpr (std::is_same_v<Format, AwqFormat>) {
      store(c, integer_codes(add(value, set1_f32(8.0f)), 0.0f, 15.0f));
    } else {
      const I32 code = integer_codes(add(value, set1_f32(grid.zero)), format.low(), format.high());
      store(c, add(code, set1_i32(static_cast<int32_t>(format.middle()))));
    }
  }
}

template <class Format>
bool quantize(const Job<Format>& job, int threads) {
  using namespace simd;
  const Matrix& w = job.w;
  const int64_t padded = round_up(w.k, 16), group = std::min(job.group, padded), groups = (w.k + group - 1) / group;
  const std::vector<float> columns = padded_weights(job.weights, job.weights ? w.k : 0, job.weights ? padded : 0);
  const float* weights = job.weights ? columns.data() : nullptr;
  std::atomic<bool> finite{true};
  with_dtype(w.dtype, [&](auto dtype) {
    for_rows(w.n, w.k, padded + padded / 4 + 16, threads, [&](int64_t row, float* room) {
      if (load_row<dtype.value>(w.values, row * w.k, w.k, room, padded) >= kInfinityBits) {
        finite = false;
        return;
      }
      auto* packed = reinterpret_cast<uint8_t*>(room + padded);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group, last = std::min(first + group, padded);
        prefetch(w, (row + 1) * w.k + first, last - first);
        const Grid grid = chosen(job, room, first, last - first, weights);
        const int64_t at = row * job.row_step + g * job.group_step;
        grid.scale.put(job.scales, at, job.format.stored);
        if (job.offsets) grid.offset.put(job.offsets, at, job.format.stored);
        if (job.zero_points) job.zero_points[at] = static_cast<uint8_t>(grid.zero);
        // Rows end with whole bytes, and the codes of columns that are not there are those of zeros.
        const int64_t end = g + 1 == groups ? padded : last;
        encode_group(job.format, room + first, end - first, grid, [&](int64_t c, I32 codes) {
          if (job.bits == 4) return store_nibbles(packed + (first + c) / 2, codes);
          store_low_bytes(packed + first + c, codes);
        });
      }
      std::memcpy(job.codes + row * job.stride, packed, static_cast<size_t>(job.stride));
    });
  });
  return finite;
}

}  // namespace

// K is a multiple of the group. False: the weight holds NaN or infinity, and what was written means nothing.
bool quantize_awq_w4a16(Ptr<const void> w, int dtype, int64_t n, int64_t k, int64_t group, Ptr<const float> tried,
                        int count, Ptr<const float> weights, Ptr<uint8_t> codes, Ptr<void> scales, Ptr<void> zeros,
                        int stored, int threads) {
  return quantize(
      Job<AwqFormat>{
          {w, dtype, n, k}, {stored}, group, tried, count, weights, codes, k / 2, 4, scales, zeros, nullptr, 1, n},
      threads);
}

bool quantize_wna16(Ptr<const void> w, int dtype, int64_t n, int64_t k, int64_t group, int bits, bool zero_point,
                    float largest, Ptr<const float> tried, int count, Ptr<const float> weights, Ptr<uint8_t> codes,
                    int64_t stride, Ptr<void> scales, Ptr<uint8_t> zero_points, int stored, int threads) {
  const int64_t groups = (k + group - 1) / group;
  return quantize(Job<WnaFormat>{{w, dtype, n, k},
                                 {stored, bits, zero_point, largest},
                                 group,
                                 tried,
                                 count,
                                 weights,
                                 codes,
                                 stride,
                                 bits,
                                 scales,
                                 nullptr,
                                 zero_points,
                                 groups,
                                 1},
                  threads);
}

void bind_quantize_integer_groups(nb::module_& m) {
  m.def("quantize_awq_w4a16", &quantize_awq_w4a16, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"),
        nb::arg("dtype"), nb::arg("n"), nb::arg("k"), nb::arg("group"), nb::arg("tried"), nb::arg("count"),
        nb::arg("weights"), nb::arg("codes"), nb::arg("scales"), nb::arg("zeros"), nb::arg("stored"),
        nb::arg("threads"));
  m.def("quantize_wna16", &quantize_wna16, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"), nb::arg("dtype"),
        nb::arg("n"), nb::arg("k"), nb::arg("group"), nb::arg("bits"), nb::arg("zero_point"), nb::arg("largest"),
        nb::arg("tried"), nb::arg("count"), nb::arg("weights"), nb::arg("codes"), nb::arg("stride"), nb::arg("scales"),
        nb::arg("zero_points"), nb::arg("stored"), nb::arg("threads"));
}

}  // namespace lowbit
