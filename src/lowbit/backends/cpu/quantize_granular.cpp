// quantize and scale_search for fp8_e4m3, fp8_e5m2, int8 and convrot_w4a4: a byte or half of one a weight, a float32
// scale of the weight, of a row or of a tile; integers may be those of a rotated row. See native/encode.h.
#include <optional>

#include "native/bind.h"
#include "native/encode.h"
#include "native/fp8_lookup.h"
#include "native/rotation.h"

namespace lowbit {
namespace {

constexpr float kMinScale = 1e-8f;
constexpr int kTogether = 4;      // candidates whose errors are summed in one pass over a row
constexpr int64_t kAhead = 1024;  // values
constexpr int64_t kTable = 128;
constexpr int64_t kSummed = 512;  // columns that are summed in float32, before float64 takes over

template <int kBits_>
struct IntegerGrid {
  static constexpr int kBits = kBits_;  // of a code
  static constexpr float kLargest = (1 << (kBits - 1)) - 1;
};
template <class Grid>
constexpr bool kIntegers = false;
template <int kBits>
constexpr bool kIntegers<IntegerGrid<kBits>> = true;
template <class Grid>
constexpr bool kNibbles = std::is_same_v<Grid, IntegerGrid<4>>;
template <class Grid>
constexpr int kByteCodes = kNibbles<Grid> ? 2 : 1;  // codes in a byte

template <class Grid>
simd::I32 codes_of(simd::F32 value, simd::F32 sign) {
  if constexpr (kIntegers<Grid>) {
    return integer_codes(value, -Grid::kLargest, Grid::kLargest);
  } else {
    return float8_codes<Grid>(value, sign);
  }
}

// Of two bfloat16 in a lane, whose codes lie side by side as they do: nothing is widened and narrowed again.
template <class Grid>
simd::I32 codes_of_two(simd::I32 two, const Divisor& by) {
  using namespace simd;
  const I32 upper = set1_i32(static_cast<int32_t>(0xffff0000));
  if constexpr (kIntegers<Grid>) {
    const F32 low = as_f32(shift_left<16>(two)), high = as_f32(bit_and(two, upper));
    const I32 above = shift_left<8>(codes_of<Grid>(by(high), high));
    return bit_or(bit_and(codes_of<Grid>(by(low), low), set1_i32(0xff)), bit_and(above, set1_i32(0xff00)));
  } else {
    const I32 sizes = bit_and(two, set1_i32(0x7fff7fff));
    const I32 low = float8_magnitudes<Grid>(by(as_f32(shift_left<16>(sizes))));
    const I32 high = shift_left<8>(float8_magnitudes<Grid>(by(as_f32(bit_and(sizes, upper)))));
    const I32 code = bit_or(bit_and(low, set1_i32(0x7f)), bit_and(high, set1_i32(0x7f00)));
    const I32 sign =
        bit_or(bit_and(shift_right<8>(two), set1_i32(0x80)), bit_and(shift_right<16>(two), set1_i32(0x8000)));
    return bit_or(code, sign);
  }
}

template <class Grid>
simd::F32 miss_of(simd::F32 value) {
  if constexpr (kIntegers<Grid>) {
    return integer_miss(value, simd::set1_f32(-Grid::kLargest), simd::set1_f32(Grid::kLargest));
  } else {
    return float8_miss<Grid>(value);
  }
}

// How a weight is cut, and what is tried besides the fitted scales.
struct Granularity {
  int64_t rows, columns;  // of a tile
  bool whole;             // one scale for all; tiles are then only pieces of work
  const float* factors;   // [count], that a scale may be multiplied by
  int count;
  const float* weights;  // of columns, or null
  int64_t rotation;      // columns that are rotated together, where a tile is a row; 0: none
};

// Makes the codes of weights of a dtype under one scale.
template <class Grid, int kDtype>
class Coder {
 public:
  // `count`: about how many weights there are, which decides whether tables are worth while.
  Coder(float scale, [[maybe_unused]] int64_t count) : by_(simd::set1_f32(scale)) {
#if defined(LOWBIT_FP8_TABLES)
    if constexpr (kLooksUp)
      if (count >= kWorthTable && uses_fp8_tables())
        lookup_.emplace(scale, [&](const uint16_t* values, uint8_t* codes) {
          for (int64_t c = 0; c < kTable; c += 4 * simd::kLanes) put_four(values + c, codes + c);
        });
#endif
  }

  // x[at .. at + count); what lies `ahead` values behind is asked for meanwhile. Codes of 4 bits are even in number;
  // those of a row begin with a byte.
  void encode(const void* x, int64_t at, int64_t count, uint8_t* to, int64_t ahead = 0) const {
    int64_t done = 0;
#if defined(LOWBIT_FP8_TABLES)
    if constexpr (kLooksUp)
      while (lookup_ && lookup_->useful() && done + kLookedUp <= count) {
        const int64_t made =
            lookup_->encode(static_cast<const uint16_t*>(x) + at + done, count - done, to + done, ahead);
        done += made;
        const int64_t left = std::min(count - done, made ? kLookedUp : kCalculated);
        calculate(x, at + done, left, to + done, ahead);
        done += left;
      }
#endif
    if (done < count) calculate(x, at + done, count - done, to + done / kPer, ahead);
  }

 private:
  static constexpr int kPer = kByteCodes<Grid>;
  static constexpr bool kLooksUp = kDtype == kBfloat16 && !kIntegers<Grid>;
  static constexpr int64_t kCalculated = 512;  // at once, where weights are too small for the table one after the other

  // Of 4 * kLanes bfloat16.
  void put_four(const uint16_t* x, uint8_t* to) const {
    const auto codes = [&](int i) { return codes_of_two<Grid>(simd::load_i32(x + i * 2 * simd::kLanes), by_); };
    simd::store_low_halves(to, codes(0), codes(1));
  }

  void calculate(const void* x, int64_t at, int64_t count, uint8_t* to, int64_t ahead) const {
    using namespace simd;
    constexpr int64_t kPiece = 2048;
    alignas(64) uint8_t made[kPiece / kPer + 4 * kLanes];
    const auto put = [&](int64_t c, F32 value) {
      const I32 codes = codes_of<Grid>(by_(value), value);
      if constexpr (kNibbles<Grid>) {
        store_nibbles(made + c / kPer, codes);
      } else {
        store_low_bytes(made + c, codes);
      }
    };
    const auto* from = static_cast<const unsigned char*>(x) + ahead * element_size(kDtype);
    for (int64_t first = 0; first < count; first += kPiece) {
      const int64_t size = std::min(kPiece, count - first), begin = at + first;
      int64_t c = 0;
      if constexpr (kDtype == kBfloat16 && !kNibbles<Grid>)
        for (; c + 4 * kLanes <= size; c += 4 * kLanes) {
          if (ahead)
            for (int64_t line = 0; line < 4 * kLanes; line += 2 * kLanes)
              __builtin_prefetch(from + (begin + c + line) * 2);
          put_four(static_cast<const uint16_t*>(x) + begin + c, made + c);
        }
      for (; c + kLanes <= size; c += kLanes) {
        if (ahead) __builtin_prefetch(from + (begin + c) * element_size(kDtype));
        put(c, load_as_f32(x, begin + c, kDtype));
      }
      if (c < size) put(c, load_first(x, begin + c, static_cast<int>(size - c), kDtype));
      stream_bytes(to + first / kPer, made, size / kPer);
    }
  }

  const Divisor by_;
#if defined(LOWBIT_FP8_TABLES)
  std::optional<Fp8Lookup<std::conditional_t<kIntegers<Grid>, E4m3Grid, Grid>>> lookup_;
#endif
};

// Adds to sums[i] the squared error, in units of its scale, of a row [padded] under each of the scales.
template <class Grid, bool kWeighted>
void add_errors(const float* x, int64_t padded, const float* weights, const float* scales, int count, double* sums) {
  using namespace simd;
  for (int first = 0; first < count; first += kTogether) {
    F32 inverse[kTogether];
    for (int i = 0; i < kTogether; ++i) inverse[i] = set1_f32(1.0f / scales[std::min(first + i, count - 1)]);
    for (int64_t c = 0; c < padded;) {
      F32 acc[kTogether];
      for (auto& sum : acc) sum = zero_f32();
      for (const int64_t end = std::min(padded, c + kSummed); c < end; c += kLanes) {
        const F32 value = load_f32(x + c);
        for (int i = 0; i < kTogether; ++i) {
          const F32 miss = miss_of<Grid>(mul(value, inverse[i]));
          acc[i] = fma(kWeighted ? mul(miss, load_f32(weights + c)) : miss, miss, acc[i]);
        }
      }
      for (int i = 0; i < kTogether && first + i < count; ++i) sums[first + i] += reduce_add(acc[i]);
    }
  }
}

// The same of a rotated row [k], whose columns' weights are those of the columns before the rotation; `room` is [k].
template <class Grid>
void add_rotated_errors(const float* x, int64_t k, int64_t rotation, const float* weights, const float* scales,
                        int count, float* room, double* sums) {
  using namespace simd;
  for (int i = 0; i < count; ++i) {
    const F32 inverse = set1_f32(1.0f / scales[i]);
    for (int64_t c = 0; c < k; c += kLanes) store_f32(room + c, miss_of<Grid>(mul(load_f32(x + c), inverse)));
    rotate_groups(room, k, rotation);  // its own inverse
    for (int64_t c = 0; c < k;) {
      F32 sum = zero_f32();
      for (const int64_t end = std::min(k, c + kSummed); c < end; c += kLanes) {
        const F32 miss = load_f32(room + c);
        sum = fma(mul(miss, load_f32(weights + c)), miss, sum);
      }
      sums[i] += reduce_add(sum);
    }
  }
}

template <class Grid>
class Granular {
 public:
  Granular(const Matrix& w, const Granularity& how, uint8_t* codes, float* scales, int threads)
      : w_(w),
        how_(how),
        codes_(codes),
        scales_(scales),
        threads_(threads),
        across_((w.k + how.columns - 1) / how.columns),
        weights_(padded_weights(how.weights, how.weights ? w.k : 0, how.weights ? round_up(w.k, 16) + 16 : 0)) {}

  bool run() {
    if (!how_.whole) return encode(nullptr);
    const int32_t bits = largest_bits(w_, threads_);
    if (bits >= kInfinityBits) return false;
    float scale = fitted(bits);
    if (how_.count) scale = searched(scale);
    scales_[0] = scale;
    return encode(&scale);
  }

 private:
  static float fitted(int32_t bits) { return std::max(float_of(bits) / Grid::kLargest, kMinScale); }

  std::vector<float> options(float scale) const {
    std::vector<float> made{scale};
    for (int i = 0; i < how_.count; ++i) made.push_back(std::max(scale * how_.factors[i], kMinScale));
    return made;
  }

  // The first of the best.
  static float best(const std::vector<float>& scales, const std::vector<double>& sums) {
    size_t chosen = 0;
    double least = sums[0] * scales[0] * scales[0];
    for (size_t i = 1; i < scales.size(); ++i) {
      const double error = sums[i] * scales[i] * scales[i];
      if (error < least) least = error, chosen = i;
    }
    return scales[chosen];
  }

  void add(const float* x, int64_t first, int64_t padded, const std::vector<float>& scales, double* sums) const {
    const int count = static_cast<int>(scales.size());
    if (how_.weights && how_.rotation) {
      const Room turned(padded);
      return add_rotated_errors<Grid>(x, padded, how_.rotation, weights_.data(), scales.data(), count, turned.data(),
                                      sums);
    }
    if (!how_.weights) return add_errors<Grid, false>(x, padded, nullptr, scales.data(), count, sums);
    add_errors<Grid, true>(x, padded, weights_.data() + first, scales.data(), count, sums);
  }

  float searched(float scale) const {
    const std::vector<float> scales = options(scale);
    const auto width = static_cast<int64_t>(scales.size());
    const int64_t padded = round_up(w_.k, 16);
    std::vector<double> by_row(static_cast<size_t>(w_.n * width), 0.0), sums(scales.size(), 0.0);
    with_dtype(w_.dtype, [&](auto dtype) {
      for_rows(w_.n, w_.k, padded, threads_, [&](int64_t row, float* room) {
        load_row<dtype.value>(w_.values, row * w_.k, w_.k, room, padded);
        add(room, 0, padded, scales, by_row.data() + row * width);
      });
    });
    for (int64_t row = 0; row < w_.n; ++row)
      for (int64_t i = 0; i < width; ++i) sums[static_cast<size_t>(i)] += by_row[static_cast<size_t>(row * width + i)];
    return best(scales, sums);
  }

  // With the scale of the whole weight, or that of each tile. The former were all read before: a thread begins with
  // what it read last, as that is in its cache.
  bool encode(const float* scale) const {
    const int64_t tall = std::min(how_.rows, w_.n), stride = round_up(std::min(how_.columns, w_.k), 16);
    const int64_t down = (w_.n + how_.rows - 1) / how_.rows, tiles = down * across_;
    const int64_t run = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, tall * stride));
    std::atomic<bool> finite{true};
    with_dtype(w_.dtype, [&](auto dtype) {
      const int64_t tasks = (tiles + run - 1) / run;
      std::optional<Coder<Grid, dtype.value>> coder;
      if (scale) coder.emplace(*scale, w_.n * w_.k);
      parallel_for(tasks, threads_, [&](int64_t index) {
        const int64_t task = scale ? mirrored(index, tasks, threads_) : index;
        const Room room(buffered(scale) ? tall * stride : 0);
        for (int64_t tile = task * run; tile < std::min(tiles, (task + 1) * run); ++tile)
          if (!encode_tile<dtype.value>(tile, room.data(), stride, scale, coder ? &*coder : nullptr)) finite = false;
        streamed();
      });
    });
    return finite;
  }

  // Whether a tile is made float32 for more than its codes: to be rotated, or to be searched.
  bool buffered(const float* shared) const { return how_.rotation || (how_.count && !shared); }

  template <int kDtype>
  bool encode_tile(int64_t tile, float* room, int64_t stride, const float* shared,
                   const Coder<Grid, kDtype>* coder) const {
    const int64_t top = tile / across_ * how_.rows, bottom = std::min(w_.n, top + how_.rows);
    const int64_t left = tile % across_ * how_.columns, count = std::min(w_.k, left + how_.columns) - left;
    if (!buffered(shared)) return encode_directly<kDtype>(tile, top, bottom, left, count, coder);
    const int64_t padded = round_up(count, 16);
    int32_t largest = 0;
    for (int64_t row = top; row < bottom; ++row)
      largest =
          std::max(largest, load_row<kDtype>(w_.values, row * w_.k + left, count, room + (row - top) * stride, padded));
    if (how_.rotation && largest < kInfinityBits) {
      rotate_groups(room, count, how_.rotation);
      largest = largest_bits<kFloat32>(room, count);  // which may have become infinite
    }
    if (largest >= kInfinityBits) return false;  // also where a scale is shared: rotated values, which nobody has seen
    const float scale = shared ? *shared : chosen(largest, room, bottom - top, left, padded, stride);
    if (!shared) scales_[tile] = scale;
    const Coder<Grid, kFloat32> own(scale, count);
    for (int64_t row = top; row < bottom; ++row) own.encode(room, (row - top) * stride, count, place(row, left));
    return true;
  }

  // A tile whose values need not be kept: without a shared scale it is read twice, the second time from the cache.
  template <int kDtype>
  bool encode_directly(int64_t tile, int64_t top, int64_t bottom, int64_t left, int64_t count,
                       const Coder<Grid, kDtype>* shared) const {
    const auto encode_with = [&](const Coder<Grid, kDtype>& coder, int64_t ahead) {
      for (int64_t row = top; row < bottom; ++row)
        coder.encode(w_.values, row * w_.k + left, count, place(row, left), ahead);
      return true;
    };
    if (shared) return encode_with(*shared, kAhead);
    int32_t largest = 0;
    for (int64_t row = top; row < bottom; ++row) {
      const int64_t begin = (row * w_.k + left) * element_size(kDtype);
      largest = std::max(largest, largest_bits<kDtype>(static_cast<const unsigned char*>(w_.values) + begin, count));
    }
    if (largest >= kInfinityBits) return false;
    scales_[tile] = fitted(largest);
    return encode_with(Coder<Grid, kDtype>(scales_[tile], (bottom - top) * count), w_.k);
  }

  uint8_t* place(int64_t row, int64_t column) const { return codes_ + (row * w_.k + column) / kByteCodes<Grid>; }

  float chosen(int32_t largest, const float* room, int64_t rows, int64_t left, int64_t padded, int64_t stride) const {
    if (!how_.count) return fitted(largest);
    const std::vector<float> scales = options(fitted(largest));
    std::vector<double> sums(scales.size(), 0.0);
    for (int64_t row = 0; row < rows; ++row) add(room + row * stride, left, padded, scales, sums.data());
    return best(scales, sums);
  }

  const Matrix w_;
  const Granularity how_;
  uint8_t* const codes_;
  float* const scales_;
  const int threads_;
  const int64_t across_;
  const std::vector<float> weights_;
};

}  // namespace

// False: the weight holds NaN or infinity, or does once it is rotated, and what was written means nothing.
bool quantize_granular(Ptr<const void> w, int dtype, int64_t n, int64_t k, int grid, bool whole, int64_t tile_rows,
                       int64_t tile_columns, int64_t rotation, Ptr<const float> factors, int count,
                       Ptr<const float> weights, Ptr<uint8_t> codes, Ptr<float> scales, int threads) {
  const Matrix matrix{w, dtype, n, k};
  const Granularity how{tile_rows, tile_columns, whole, factors, count, weights, rotation};
  switch (grid) {
    case 0:
      return Granular<E4m3Grid>(matrix, how, codes, scales, threads).run();
    case 1:
      return Granular<E5m2Grid>(matrix, how, codes, scales, threads).run();
    case 2:
      return Granular<IntegerGrid<8>>(matrix, how, codes, scales, threads).run();
    default:
      return Granular<IntegerGrid<4>>(matrix, how, codes, scales, threads).run();
  }
}

void bind_quantize_granular(nb::module_& m) {
  m.def("quantize_granular", &quantize_granular, nb::call_guard<nb::gil_scoped_release>(), nb::arg("w"),
        nb::arg("dtype"), nb::arg("n"), nb::arg("k"), nb::arg("grid"), nb::arg("whole"), nb::arg("tile_rows"),
        nb::arg("tile_columns"), nb::arg("rotation"), nb::arg("factors"), nb::arg("count"), nb::arg("weights"),
        nb::arg("codes"), nb::arg("scales"), nb::arg("threads"));
}

}  // namespace lowbit
