// Bytes: weights, gradients and both moments are read once, all but gradients written once, and the copies: 28 and up
// to 4 an element, where PyTorch's fused Adam and a cast of the weights take 28 and 6 to 14.
#include <cstdint>

#include "adam.h"
#include "cuda/common/device.h"
#include "cuda/common/vector.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256, kAtOnce = 4, kRounds = 8;  // elements of a thread in one access, and accesses
constexpr int64_t kBlock = int64_t(kThreads) * kAtOnce * kRounds;

template <typename T>
struct Rates {
  T rest_1, beta_2, rest_2, epsilon, weight_decay;  // 1 - beta_1, 1 - beta_2: in float they have few digits
};

// Elements from `at` on, N of them.
template <int N, typename T>
__device__ __forceinline__ void step(const AdamStep<T>& g, const Rates<T>& rates, int w, int64_t at, T step_size,
                                     T root_of_correction) {
  Pack<T, N> weight = load<N>(g.weight[w] + at), average = load<N>(g.average[w] + at);
  Pack<T, N> square = load<N>(g.square[w] + at);
  const Pack<T, N> grads = load<N>(g.grad[w] + at);
  Pack<bfloat16, N> copy;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T grad = grads.at[i] + rates.weight_decay * weight.at[i];
    average.at[i] += rates.rest_1 * (grad - average.at[i]);
    square.at[i] = rates.beta_2 * square.at[i] + rates.rest_2 * grad * grad;
    weight.at[i] -= step_size * average.at[i] / (sqrt(square.at[i]) / root_of_correction + rates.epsilon);
    copy.at[i] = from_float<bfloat16>(weight.at[i]);
  }
  store(g.weight[w] + at, weight);
  store(g.average[w] + at, average);
  store(g.square[w] + at, square);
  if (g.copy[w] != nullptr) store(g.copy[w] + at, copy);
  if (g.turned[w] == nullptr) return;
  const int64_t width = g.width[w], row = at / width, k = g.k[w], out = row / k, tap = row % k;
  store(g.turned[w] + ((k - 1 - tap) * (g.size[w] / (k * width)) + out) * width + at % width, copy);
}

template <typename T, typename... P>
__device__ __forceinline__ bool aligned(const P*... addresses) {
  return ((reinterpret_cast<std::uintptr_t>(addresses) % alignof(Pack<T, kAtOnce>) == 0) && ...);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) adam_step_kernel(const AdamStep<T> g, const Rates<T> rates) {
  int64_t block = blockIdx.x;
  int w = 0;
  for (; block >= (g.size[w] + kBlock - 1) / kBlock; ++w) block -= (g.size[w] + kBlock - 1) / kBlock;
  D2NET_SHARED(T, shared, [2]);
  if (threadIdx.x == 0) {  // powers take long
    const double steps = double(*g.step);
    shared[0] = T(g.lr / (1 - pow(g.beta_1, steps)));
    shared[1] = T(sqrt(1 - pow(g.beta_2, steps)));
  }
  __syncthreads();
  const T step_size = shared[0], root_of_correction = shared[1];
  // A gradient may be part of a larger tensor and begin anywhere.
  const bool packs = g.size[w] % kAtOnce == 0 && (g.turned[w] == nullptr || g.width[w] % kAtOnce == 0) &&
                     aligned<T>(g.weight[w], g.grad[w], g.average[w], g.square[w]) &&
                     aligned<bfloat16>(g.copy[w], g.turned[w]);
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = block * kBlock + (int64_t(round) * kThreads + threadIdx.x) * kAtOnce;
    if (packs) {
      if (at < g.size[w]) step<kAtOnce>(g, rates, w, at, step_size, root_of_correction);
    } else {
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + i < g.size[w]) step<1>(g, rates, w, at + i, step_size, root_of_correction);
      }
    }
  }
}

}  // namespace

template <typename T>
void adam_step(const AdamStep<T>& g, int device, void* stream) {
  int64_t blocks = 0;
  for (int w = 0; w < int(g.count); ++w) blocks += (g.size[w] + kBlock - 1) / kBlock;
  const Rates<T> rates{T(1 - g.beta_1), T(g.beta_2), T(1 - g.beta_2), T(g.epsilon), T(g.weight_decay)};
  Stream("adam_step", device, stream).launch(adam_step_kernel<T>, blocks, kThreads, 0, g, rates);
}

template void adam_step<float>(const AdamStep<float>&, int, void*);

}  // namespace d2net::cuda
