// row_errors: how far rows of a quantized weight are from the true ones, decoded and compared while they are in the
// cache.
#include "native/bind.h"
#include "native/coded_rows.h"

namespace lowbit {
namespace {

// The sums of squares of w, of what the row decodes to minus w, and of the latter: to[0], to[n], to[2 n].
template <int kDtype>
void sum_row(const void* w, int64_t at, const float* decoded, int64_t k, float* to, int64_t n) {
  using namespace simd;
  constexpr int kChains = 2;  // independent sums, so that an addition need not wait for the last
  F32 signal[kChains], noise[kChains], approx[kChains];
  for (int i = 0; i < kChains; ++i) signal[i] = noise[i] = approx[i] = zero_f32();
  auto take = [&](int i, F32 value, F32 made) {
    const F32 miss = sub(made, value);
    signal[i] = fma(value, value, signal[i]);
    noise[i] = fma(miss, miss, noise[i]);
    approx[i] = fma(made, made, approx[i]);
  };
  int64_t c = 0;
  for (; c + kChains * kLanes <= k; c += kChains * kLanes)
    for (int i = 0; i < kChains; ++i)
      take(i, load_as_f32(w, at + c + i * kLanes, kDtype), load_f32(decoded + c + i * kLanes));
  for (; c < k; c += kLanes) {
    const int left = static_cast<int>(std::min<int64_t>(kLanes, k - c));
    take(0, load_first(w, at + c, left, kDtype), load_first(decoded, c, left, kFloat32));
  }
  to[0] = reduce_add(add(signal[0], signal[1]));
  to[n] = reduce_add(add(noise[0], noise[1]));
  to[2 * n] = reduce_add(add(approx[0], approx[1]));
}

}  // namespace

void row_errors(Ptr<const int64_t> weight, Ptr<const void> w, int dtype, Ptr<float> sums, int threads) {
  const CodedWeight coded = CodedWeight::read(weight);
  const int64_t n = coded.n, k = coded.k, run = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k));
  parallel_for((n + run - 1) / run, threads, [&](int64_t task) {
    RowDecoder decoder(coded);
    const Room room(k + 16);
    for (int64_t row = task * run; row < std::min(n, (task + 1) * run); ++row) {
      decoder.decode(row, coded.codes + row * coded.stride, room.data(), 0, kFloat32);
      switch (dtype) {
        case kFloat32:
          sum_row<kFloat32>(w, row * k, room.data(), k, sums + row, n);
          break;
        case kBfloat16:
          sum_row<kBfloat16>(w, row * k, room.data(), k, sums + row, n);
          break;
        default:
          sum_row<kFloat16>(w, row * k, room.data(), k, sums + row, n);
      }
    }
  });
}

void bind_row_errors(nb::module_& m) {
  m.def("row_errors", &row_errors, nb::call_guard<nb::gil_scoped_release>(), nb::arg("weight"), nb::arg("w"),
        nb::arg("dtype"), nb::arg("sums"), nb::arg("threads"));
}

}  // namespace lowbit
