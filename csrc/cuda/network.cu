// Bytes: every operand is read once, every result written once; signs and dropout are kept as bits, an eighth of a byte
// an element. A thread takes 8 elements, which share a byte of them.
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/vector.h"
#include "math/dropout.h"
#include "network.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBits = int(kBitsOf);

template <typename T>
constexpr int kBytePack = kWidePackOf<T> < kBits ? kWidePackOf<T> : kBits;  // elements of one access

// 8 neighbouring elements of a row. packs: that all of them are there, and aligned.
template <typename T>
struct Eight {
  accumulator_t<T> at[kBits];

  __device__ __forceinline__ static Eight read(const T* from, int present, bool packs) {
    Eight result;
    if (packs) {
      Pack<T, kBytePack<T>> parts[kBits / kBytePack<T>];
#pragma unroll
      for (int p = 0; p < kBits / kBytePack<T>; ++p) parts[p] = load<kBytePack<T>>(from + p * kBytePack<T>);
#pragma unroll
      for (int i = 0; i < kBits; ++i) result.at[i] = to_float(parts[i / kBytePack<T>].at[i % kBytePack<T>]);
    } else {
#pragma unroll
      for (int i = 0; i < kBits; ++i) result.at[i] = i < present ? to_float(from[i]) : 0;
    }
    return result;
  }

  __device__ __forceinline__ void write(T* to, int present, bool packs) const {
    if (packs) {
#pragma unroll
      for (int p = 0; p < kBits / kBytePack<T>; ++p) {
        Pack<T, kBytePack<T>> part;
#pragma unroll
        for (int i = 0; i < kBytePack<T>; ++i) part.at[i] = from_float<T>(at[p * kBytePack<T> + i]);
        store(to + p * kBytePack<T>, part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        if (i < present) to[i] = from_float<T>(at[i]);
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    stream_layer_kernel(const StreamLayer<T> g, const math::Dropout dropout, unsigned bytes_of_row, int64_t bytes,
                        bool packs) {
  using A = accumulator_t<T>;
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= bytes) return;
  // Dividing 64 bits takes several times as long.
  const int64_t row = bytes <= 0xffffffffLL ? unsigned(place) / bytes_of_row : place / bytes_of_row;
  const int64_t column = (place - row * bytes_of_row) * kBits, at = row * g.d + column;
  const int present = int(min(g.d - column, int64_t(kBits)));
  Eight<T> x = {}, dropped = {};
  unsigned signs = 0, kept = 0;
  if (g.mask[row]) {
    x = Eight<T>::read(g.y + at, present, packs);
    const A slope = A(g.slope);
    Eight<A> bias = Eight<A>::read(g.bias + column, present, packs);
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const A y = x.at[i] + bias.at[i];
      const bool positive = y > 0;
      signs |= unsigned(positive) << i;
      x.at[i] = positive ? y : slope * y;
    }
    if (g.residual != nullptr) {
      const Eight<T> residual = Eight<T>::read(g.residual + at, present, packs);
#pragma unroll
      for (int i = 0; i < kBits; ++i) x.at[i] += residual.at[i];
    }
    if (g.seed != nullptr) {
      kept = dropout.kept(uint64_t(*g.seed) + uint64_t(g.stream), uint64_t(place));
      const A scale = A(dropout.scale);
#pragma unroll
      for (int i = 0; i < kBits; ++i) dropped.at[i] = (kept >> i & 1) != 0 ? x.at[i] * scale : A(0);
    }
  }
  x.write(g.x + at, present, packs);
  if (g.signs != nullptr) g.signs[place] = uint8_t(signs);
  if (g.seed != nullptr) {
    dropped.write(g.dropped + at, present, packs);
    if (g.kept != nullptr) g.kept[place] = uint8_t(kept);
  }
  if (g.other == nullptr) return;
  Eight<T> mean = {};
  if (g.mask[row]) {
    const Eight<T> other = Eight<T>::read(g.other + at, present, packs);
    const A share = A(g.share);
    const bool of_dropped = g.mean_of_dropped != 0 && g.seed != nullptr;
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      mean.at[i] = share * ((of_dropped ? dropped.at[i] : x.at[i]) + other.at[i]);
    }
  }
  mean.write(g.mean + at, present, packs);
}

// A block takes kBlockRows rows of 8 kLanes columns: a thread a byte of every kThreads / kLanes-th row.
constexpr int kLanes = 64, kRowGroups = kThreads / kLanes;
static_assert(kBlockRows % kRowGroups == 0, "every thread takes as many rows");

template <typename T>
__global__ void __launch_bounds__(kThreads)
    stream_layer_backward_kernel(const StreamLayer<T> g, const math::Dropout dropout, unsigned bytes_of_row,
                                 unsigned tiles, bool packs) {
  using A = accumulator_t<T>;
  D2NET_SHARED(A, sums, [kRowGroups][kLanes][kBits + 1]);
  const unsigned tile = blockIdx.x % tiles, lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t block = blockIdx.x / tiles, byte = int64_t(tile) * kLanes + lane, column = byte * kBits;
  const int present = int(min(g.d - column, int64_t(kBits)));
  const A slope = A(g.slope), share = A(g.share);
  const A scale = g.kept == nullptr ? A(1) : A(dropout.scale);
  A sum[kBits] = {};
#pragma unroll
  for (int step = 0; step < int(kBlockRows) / kRowGroups; ++step) {
    const int64_t row = block * kBlockRows + step * kRowGroups + group;
    if (row >= g.n || column >= g.d) continue;
    const int64_t at = row * g.d + column;
    Eight<T> grad = {}, grad_y = {};
    if (g.mask[row]) {
      const unsigned signs = g.signs[row * bytes_of_row + byte];
      const unsigned kept = g.kept == nullptr ? 0xffu : g.kept[row * bytes_of_row + byte];
      Eight<T> dropped = {}, mean = {};
      if (g.grad_dropped != nullptr) dropped = Eight<T>::read(g.grad_dropped + at, present, packs);
      if (g.grad_mean != nullptr) mean = Eight<T>::read(g.grad_mean + at, present, packs);
#pragma unroll
      for (int i = 0; i < kBits; ++i) {
        const A passed = (kept >> i & 1) != 0 ? scale : A(0);
        const A of_mean = share * mean.at[i];
        grad.at[i] = g.mean_of_dropped != 0 ? passed * (dropped.at[i] + of_mean) : passed * dropped.at[i] + of_mean;
        grad_y.at[i] = (signs >> i & 1) != 0 ? grad.at[i] : slope * grad.at[i];
        sum[i] += grad_y.at[i];
      }
    }
    grad_y.write(g.grad_y + at, present, packs);
    if (g.grad_residual != nullptr) grad.write(g.grad_residual + at, present, packs);
  }
#pragma unroll
  for (int i = 0; i < kBits; ++i) sums[group][lane][i] = sum[i];
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kLanes * kBits; i += kThreads) {
    const int64_t k = int64_t(tile) * kLanes * kBits + i;
    A total = 0;
    for (int other = 0; other < kRowGroups; ++other) total += sums[other][i / kBits][i % kBits];
    if (k < g.d) g.grad_bias[block * g.d + k] = total;
  }
}

template <typename A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + exp(-x));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) class_head_kernel(const ClassHead<T> g) {
  using A = accumulator_t<T>;
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= g.n * g.c) return;
  const int64_t row = place / g.c, of = place % g.c;
  const bool inside = g.mask[row];
  A tcam = 0;
  for (int64_t s = 0; s < g.streams; ++s) {
    A logit = 0;
    if (inside) {
      logit = g.bias[s * g.c + of];
      for (int64_t j = 0; j < g.k; ++j) {
        const int64_t from = row + (j - g.k / 2) * g.dilation;
        if (from >= 0 && from < g.n) logit += A(to_float(g.products[((s * g.n + from) * g.c + of) * g.k + j]));
      }
      tcam += sigmoid(logit);
    }
    (s == 0 ? g.logits_a : g.logits_b)[place] = logit;
  }
  g.tcam[place] = tcam / A(g.streams);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) class_head_backward_kernel(const ClassHead<T> g) {
  using A = accumulator_t<T>;
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x, row_size = g.k * g.c, of_stream = g.n * row_size;
  if (place >= g.streams * of_stream) return;
  const int64_t s = place / of_stream, in_stream = place % of_stream;
  const int64_t of = in_stream % row_size / g.k, j = in_stream % g.k;
  const int64_t row = in_stream / row_size - (j - g.k / 2) * g.dilation;  // the logit that the product is part of
  A gradient = 0;
  if (row >= 0 && row < g.n && g.mask[row]) {
    const int64_t at = row * g.c + of;
    const A* grad_logits = s == 0 ? g.grad_logits_a : g.grad_logits_b;
    if (g.grad_tcam != nullptr) {
      const A probability = sigmoid((s == 0 ? g.logits_a : g.logits_b)[at]);
      gradient = g.grad_tcam[at] / A(g.streams) * probability * (1 - probability);
    }
    if (grad_logits != nullptr) gradient += grad_logits[at];
  }
  g.grad_products[place] = from_float<T>(gradient);
}

int64_t blocks_for(int64_t n) { return (n + kThreads - 1) / kThreads; }

template <typename T>
bool fits(const StreamLayer<T>& g) {
  constexpr int N = kBytePack<T>;
  return g.d % kBits == 0 && fits_packs_of<N>(g.d, g.y, g.residual, g.x, g.dropped, g.other) &&
         fits_packs_of<N>(g.d, g.mean, g.grad_dropped, g.grad_mean, g.grad_y, g.grad_residual) &&
         fits_packs_of<kBytePack<accumulator_t<T>>>(g.d, g.bias);
}

}  // namespace

template <typename T>
void stream_layer(const StreamLayer<T>& g, int device, void* stream) {
  const int64_t bytes_of_row = (g.d + kBits - 1) / kBits, bytes = g.n * bytes_of_row;
  Stream("stream_layer", device, stream)
      .launch(stream_layer_kernel<T>, blocks_for(bytes), kThreads, 0, g, math::Dropout(g.dropout),
              unsigned(bytes_of_row), bytes, fits(g));
}

template <typename T>
void stream_layer_backward(const StreamLayer<T>& g, int device, void* stream) {
  const int64_t bytes_of_row = (g.d + kBits - 1) / kBits, tiles = (bytes_of_row + kLanes - 1) / kLanes;
  Stream("stream_layer_backward", device, stream)
      .launch(stream_layer_backward_kernel<T>, (g.n + kBlockRows - 1) / kBlockRows * tiles, kThreads, 0, g,
              math::Dropout(g.dropout), unsigned(bytes_of_row), unsigned(tiles), fits(g));
}

template <typename T>
void class_head(const ClassHead<T>& g, int device, void* stream) {
  Stream("class_head", device, stream).launch(class_head_kernel<T>, blocks_for(g.n * g.c), kThreads, 0, g);
}

template <typename T>
void class_head_backward(const ClassHead<T>& g, int device, void* stream) {
  Stream("class_head_backward", device, stream)
      .launch(class_head_backward_kernel<T>, blocks_for(g.streams * g.n * g.k * g.c), kThreads, 0, g);
}

D2NET_INSTANTIATE_CUDA_HALF(stream_layer, StreamLayer)
D2NET_INSTANTIATE_CUDA_HALF(stream_layer_backward, StreamLayer)
D2NET_INSTANTIATE_CUDA_HALF(class_head, ClassHead)
D2NET_INSTANTIATE_CUDA_HALF(class_head_backward, ClassHead)

}  // namespace d2net::cuda
