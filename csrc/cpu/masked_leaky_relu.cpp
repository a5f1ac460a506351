#include "masked_leaky_relu.h"

#include <algorithm>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/topk.h"

namespace d2net::cpu {
namespace {

// out = x where sign > 0, slope * x elsewhere. Forward: sign is x itself.
template <typename T>
[[gnu::always_inline]] inline void scaled(const T* sign, const T* x, int64_t n, T slope, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = sign[i] > 0 ? x[i] : slope * x[i];
}
D2NET_SIMD void scale(const float* sign, const float* x, int64_t n, float slope, float* out) {
  scaled(sign, x, n, slope, out);
}
D2NET_SIMD void scale(const double* sign, const double* x, int64_t n, double slope, double* out) {
  scaled(sign, x, n, slope, out);
}

template <typename T>
void within_lengths(const MaskedLeakyRelu<T>& g, const T* sign, const T* x, T* out, int threads) {
  if (g.t == 0 || g.d == 0) return;
  const MaskedRows rows(g);
  const T slope = T(g.slope);
  parallel_for(g.b * g.t * g.d, 1 << 15, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / rows.size, from = begin % rows.size;
      const int64_t to = std::min(rows.size, from + end - begin);
      const int64_t length = math::clamped_length(g.lengths, row / rows.of_recording, g.t);
      const int64_t valid = std::clamp(length * rows.step, from, to);
      scale(sign + begin, x + begin, valid - from, slope, out + begin);
      std::fill_n(out + begin + valid - from, to - valid, T(0));
      begin += to - from;
    }
  });
}

}  // namespace

template <typename T>
void masked_leaky_relu(const MaskedLeakyRelu<T>& g, int threads) {
  within_lengths(g, g.x, g.x, g.y, threads);
}

template <typename T>
void masked_leaky_relu_backward(const MaskedLeakyRelu<T>& g, int threads) {
  within_lengths<T>(g, g.y, g.grad_y, g.grad_x, threads);
}

D2NET_INSTANTIATE_CPU(masked_leaky_relu, MaskedLeakyRelu)
D2NET_INSTANTIATE_CPU(masked_leaky_relu_backward, MaskedLeakyRelu)

}  // namespace d2net::cpu
