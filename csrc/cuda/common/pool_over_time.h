// Weighted sums of embeddings over time, and their backward, for attention_pool and for the loss, which uses the
// gradient with respect to attention further.
//
// Backward: rows of x that are on a side are read once, all rows of its gradient written once; grad_fg and grad_bg stay
// in registers for the 20 snippets of a block. 380 blocks of 256 threads (half precision: 128) for 10 recordings of 750
// snippets of 1024 numbers: an H100 runs all of them at once. A thread loads several rows at once. What is not selected
// is replaced by 0, without a branch (and not multiplied by 0, for it may be NaN).
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/common/block.h"
#include "cuda/common/device.h"
#include "cuda/common/vector.h"
#include "math/topk.h"

namespace d2net::cuda {

constexpr int kBackwardThreads = 256, kBackwardRows = 20, kRowsAtOnce = 4;
static_assert(kBackwardRows <= 32, "a lane has the weights of one snippet");
static_assert(kBackwardRows % kRowsAtOnce == 0, "a round has kRowsAtOnce rows");

// x (b, t, d), attention (b, t) -> x_fg, x_bg (b, d); see attention_pool.h.
template <typename T>
struct PoolOverTime {
  using A = accumulator_t<T>;
  const T* x;
  const A* attention;
  const int64_t* lengths;
  int64_t b, t, d;
  A threshold, background_threshold;
  bool mean;
  A* partial;         // (b, chunks, 2, d) of scratch, chunks = ceil(t / kPoolChunk)
  unsigned* arrived;  // pool_counters(b, d) counters, 0 before the launch
  A *x_fg, *x_bg;
  bool *valid_fg, *valid_bg;
  double* weights = nullptr;  // (2, b): sums of the weights; null: not computed
  int64_t* lowest = nullptr;  // (b): the snippet of the lowest attention; null: not computed
  Rows rows = {};             // (b, t, ...) are (n, ...) in a packed batch
};

inline int64_t pool_counters(int64_t b, int64_t d) { return b * (d / 32 + 1); }  // a tile has 32 columns at least

// One launch.
template <typename T>
void pool_over_time(const Stream& on, const PoolOverTime<T>& pool);

// The weights of one snippet on both sides; NaN where it is not on that side, as no selected weight is NaN.
template <typename A>
struct Weights {
  A fg, bg;
};

template <typename A>
__device__ __forceinline__ bool selected(A weight) {
  return weight == weight;
}

template <typename A>
__device__ __forceinline__ Weights<A> weights_of(A lambda, A threshold, A background_threshold) {
  const A background = 1 - lambda;
  return {lambda > threshold ? lambda : A(NAN), background > background_threshold ? background : A(NAN)};
}

// The weights of snippet first + lane, of those before `last`, in every lane.
template <typename A>
__device__ __forceinline__ Weights<A> weights_of_lane(const A* attention, int64_t first, int64_t last, A threshold,
                                                      A background_threshold) {
  const int64_t mine = first + threadIdx.x % 32;
  return weights_of(mine < last ? attention[mine] : A(NAN), threshold, background_threshold);
}

template <typename A>
__device__ __forceinline__ Weights<A> of_lane(const Weights<A>& mine, int lane) {
  return {__shfl_sync(kAllLanes, mine.fg, lane), __shfl_sync(kAllLanes, mine.bg, lane)};
}

// The gradient of one thread's columns, times the scale.
template <int N, typename A>
__device__ __forceinline__ Pack<A, N> scaled(const A* grad, A scale) {
  Pack<A, N> values = load<N>(grad);
#pragma unroll
  for (int j = 0; j < N; ++j) values.at[j] *= scale;
  return values;
}

template <typename T>
struct PoolGradient {
  using A = accumulator_t<T>;
  const T* x;  // null: the gradient with respect to attention is not computed
  const A* attention;
  const int64_t* lengths;
  const A* terms;  // (b, 2, 2): scale and shift of each side, for means; null for sums
  const A *grad_fg, *grad_bg;
  int64_t b, t, d;
  A threshold, background_threshold;
  T* grad_x;       // null: not computed
  Rows rows = {};  // (b, t, ...) are (n, ...) in a packed batch
};

// A block takes 20 snippets of one recording (blockIdx.x) and all columns, tile by tile. At the end all threads call
// use(recording, first, rows, gradient): thread i with the gradient with respect to the attention of snippet first + i.
// Without the bound for float the compiler takes so many registers that an H100 would run two blocks a multiprocessor.
template <typename T, int N, typename Use, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(T) == 4 ? 3 : 2)
    pool_gradient_kernel(const PoolGradient<T> g, int64_t groups, const Use use) {
  D2NET_SHARED(A, dots, [kBackwardRows][kBackwardThreads / 32]);
  const T* __restrict__ x = g.x;
  T* __restrict__ grad_x = g.grad_x;
  const int64_t d = g.d, recording = blockIdx.x / groups, first = blockIdx.x % groups * kBackwardRows;
  const int64_t length = g.rows.length(g.lengths, recording, g.t), first_row = g.rows.first(recording, g.t) + first;
  const int rows = int(min(g.rows.written(g.lengths, recording, g.t) - first, int64_t(kBackwardRows)));
  if (rows <= 0) return;  // the whole block, of a packed batch
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t inside = min(int64_t(rows), length - first);
  const Weights<A> mine = weights_of_lane(g.attention + first_row, 0, inside, g.threshold, g.background_threshold);
  const A* term = g.terms + 4 * recording;
  const A scale_fg = g.terms == nullptr ? A(1) : term[0], scale_bg = g.terms == nullptr ? A(1) : term[2];
  if (lane < kBackwardRows) dots[lane][warp] = 0;
  __syncwarp();
  for (int64_t tile = 0; tile < d; tile += int64_t(blockDim.x) * N) {
    const int64_t column = tile + threadIdx.x * N;
    // The row is computed again: kept until here, it takes registers that the bound above does not leave.
    const int64_t from = (g.rows.first(recording, g.t) + first) * d + column;
    const bool has_column = column < d;
    Pack<A, N> fg = {}, bg = {};
    if (has_column) {
      fg = scaled<N>(g.grad_fg + recording * d + column, scale_fg);
      bg = scaled<N>(g.grad_bg + recording * d + column, scale_bg);
    }
    for (int begin = 0; begin < rows; begin += kRowsAtOnce) {
      Pack<T, N> values[kRowsAtOnce] = {};
      Weights<A> weights[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        weights[i] = of_lane(mine, begin + i);  // past `rows`: selected nowhere
        const bool used = selected(weights[i].fg) || selected(weights[i].bg);
        if (x != nullptr && used && has_column) values[i] = load<N>(x + from + (begin + i) * d);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const bool in_fg = selected(weights[i].fg), in_bg = selected(weights[i].bg);
        const A weight_fg = in_fg ? weights[i].fg : 0, weight_bg = in_bg ? weights[i].bg : 0;
        Pack<T, N> grad;
        A dot = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A f = in_fg ? fg.at[j] : 0, b = in_bg ? bg.at[j] : 0;
          grad.at[j] = from_float<T>(weight_fg * f + weight_bg * b);
          dot += to_float(values[i].at[j]) * (f - b);
        }
        if (grad_x != nullptr && has_column && begin + i < rows) store(grad_x + from + (begin + i) * d, grad);
        if (x != nullptr) {
          dot = warp_reduce(dot, Sum());
          if (lane == 0) dots[begin + i][warp] += dot;
        }
      }
    }
  }
  __syncthreads();
  A grad_attention = 0;
  if (int(threadIdx.x) < rows) {  // `mine` is of the same row
    for (unsigned other = 0; other < blockDim.x / 32; ++other) grad_attention += dots[threadIdx.x][other];
    if (g.terms != nullptr && selected(mine.fg)) grad_attention -= term[1];
    if (g.terms != nullptr && selected(mine.bg)) grad_attention += term[3];
  }
  use(recording, first, rows, grad_attention);
}

template <typename T, typename Use>
void pool_gradient(const Stream& on, const PoolGradient<T>& g, const Use& use) {
  const int64_t groups = (g.t + kBackwardRows - 1) / kBackwardRows;
  constexpr int N = kWidePackOf<T>;
  const bool packs = fits_packs_of<N>(g.d, g.x, g.grad_x, g.grad_fg, g.grad_bg);
  const int64_t threads = threads_for(packs ? g.d / N : g.d, kBackwardThreads);
  on.launch(packs ? pool_gradient_kernel<T, N, Use> : pool_gradient_kernel<T, 1, Use>, g.b * groups,
            std::max<int64_t>(threads, Use::kLeastThreads), 0, g, groups, use);
}

}  // namespace d2net::cuda
