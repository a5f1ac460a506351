// Bytes: numbers within the lengths are read once (backward: with their sign), and all results are written once. A
// thread takes one pack of 16 bytes.
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/vector.h"
#include "masked_leaky_relu.h"
#include "math/topk.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;

// out = x where sign > 0, slope * x elsewhere. Forward: sign is x itself.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads)
    within_lengths_kernel(const MaskedLeakyRelu<T> g, const MaskedRows rows, int64_t packs, const T* __restrict__ sign,
                          const T* __restrict__ x, T* __restrict__ out) {
  using A = accumulator_t<T>;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= packs) return;
  const int64_t of_row = rows.size / N;
  // Dividing 64 bits takes several times as long.
  const bool small = packs <= 0xffffffffLL;
  const int64_t row = small ? unsigned(index) / unsigned(of_row) : index / of_row;
  const int64_t recording = small ? unsigned(row) / unsigned(rows.of_recording) : row / rows.of_recording;
  const int64_t first = (index - row * of_row) * N;
  const int64_t valid = math::clamped_length(g.lengths, recording, g.t) * rows.step;
  Pack<T, N> result = {};
  if (first < valid) {
    const Pack<T, N> values = load<N>(x + index * N), signs = load<N>(sign + index * N);
    const A slope = A(g.slope);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const A value = to_float(values.at[l]);
      if (first + l < valid) result.at[l] = from_float<T>(to_float(signs.at[l]) > 0 ? value : slope * value);
    }
  }
  store(out + index * N, result);
}

template <typename T>
void within_lengths(const Stream& on, const MaskedLeakyRelu<T>& g, const T* sign, const T* x, T* out) {
  if (g.t == 0 || g.d == 0) return;
  constexpr int N = kWidePackOf<T>;
  const MaskedRows rows(g);
  const int64_t n = g.b * g.t * g.d;
  const auto launch = [&](auto kernel, int64_t packs) {
    on.launch(kernel, (packs + kThreads - 1) / kThreads, kThreads, 0, g, rows, packs, sign, x, out);
  };
  if (fits_packs_of<N>(rows.size, sign, x, out)) {
    launch(within_lengths_kernel<N, T>, n / N);
  } else {
    launch(within_lengths_kernel<1, T>, n);
  }
}

}  // namespace

template <typename T>
void masked_leaky_relu(const MaskedLeakyRelu<T>& g, int device, void* stream) {
  within_lengths(Stream("masked_leaky_relu", device, stream), g, g.x, g.x, g.y);
}

template <typename T>
void masked_leaky_relu_backward(const MaskedLeakyRelu<T>& g, int device, void* stream) {
  within_lengths<T>(Stream("masked_leaky_relu_backward", device, stream), g, g.y, g.grad_y, g.grad_x);
}

D2NET_INSTANTIATE_CUDA_HALF(masked_leaky_relu, MaskedLeakyRelu)
D2NET_INSTANTIATE_CUDA_HALF(masked_leaky_relu_backward, MaskedLeakyRelu)

}  // namespace d2net::cuda
