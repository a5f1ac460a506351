// Forward, bytes: every row of x that is on a side is read once for both sums; each chunk of 32 snippets leaves two
// rows of partial sums, 1/16 of x, which the last block of a recording's tile adds up. The launch waits for that block,
// so it does nothing else, and has 16 loads in flight. The backward: pool_over_time.h.
//
// Layout. A thread owns a pack of columns, so a warp reads neighbouring bytes of a row. Blocks split recordings, time
// and columns: 480 of 128 threads for 10 recordings of 750 snippets and 1024 floats. The next rows are loaded before
// those of the last round are used: without a loop in between, the compiler moves each load to where the row is used.
// For the same reason what is not selected is replaced by 0, without a branch (and not multiplied by 0, for it may be
// NaN).
#include "attention_pool.h"
#include "cuda/common/pool_over_time.h"
#include "math/ordered_float.h"

namespace d2net::cuda {
namespace {

constexpr int kSumThreads = 128;
constexpr int kTermsThreads = 256;
static_assert(kPoolChunk == 32, "a lane has the weights of one snippet");

// The snippet of the lowest attention, the first among equals; NaN is lower than any number.
template <typename A>
__device__ __forceinline__ int64_t lowest_of(const A* attention, int64_t length) {
  using Key = typename math::Ordered<A>::Key;
  Key best = -math::kLargest<Key> - 1;
  for (int64_t s = threadIdx.x; s < length; s += blockDim.x) best = max(best, math::ordered_key(1 - attention[s]));
  best = block_reduce(best, Max());
  int64_t first = length;
  for (int64_t s = threadIdx.x; s < length && first == length; s += blockDim.x) {
    if (math::ordered_key(1 - attention[s]) == best) first = s;
  }
  return block_reduce(first, Min());
}

// A block sums one chunk of one recording (blockIdx.x) over one tile of columns (blockIdx.y), in order of time. The
// last one of a recording and a tile adds the chunks, in order, in double.
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kSumThreads, 4) pool_over_time_kernel(const PoolOverTime<T> pool, int64_t chunks) {
  const int64_t t = pool.t, d = pool.d, recording = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * kPoolChunk, length = pool.rows.length(pool.lengths, recording, t);
  const int64_t last = min(first + kPoolChunk, length);
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const bool has_column = column < d;
  if (first < last) {
    const int64_t origin = pool.rows.first(recording, t);
    const Weights<A> mine =
        weights_of_lane(pool.attention + origin, first, last, pool.threshold, pool.background_threshold);
    const T* __restrict__ rows = pool.x + (origin + first) * d + column;
    Pack<A, N> fg = {}, bg = {};
    unsigned left = __ballot_sync(kAllLanes, selected(mine.fg) || selected(mine.bg)), ahead = left;
    constexpr int kAhead = sizeof(Pack<T, N>) < 16 ? 8 : 4;
    Pack<T, N> next[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i, ahead &= ahead - 1) {
      if (ahead != 0 && has_column) next[i] = load<N>(rows + (__ffs(int(ahead)) - 1) * d);
    }
    while (left != 0) {  // the same for the whole warp
      Pack<T, N> values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i, ahead &= ahead - 1) {
        values[i] = next[i];
        if (ahead != 0 && has_column) next[i] = load<N>(rows + (__ffs(int(ahead)) - 1) * d);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i, left &= left - 1) {
        const Weights<A> weights = of_lane(mine, __ffs(int(left)) - 1);
        const bool in_fg = left != 0 && selected(weights.fg), in_bg = left != 0 && selected(weights.bg);
        const A weight_fg = in_fg ? weights.fg : 0, weight_bg = in_bg ? weights.bg : 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A value = to_float(values[i].at[j]);
          fg.at[j] += weight_fg * (in_fg ? value : 0);
          bg.at[j] += weight_bg * (in_bg ? value : 0);
        }
      }
    }
    if (has_column) {
      A* sums = pool.partial + 2 * int64_t(blockIdx.x) * d + column;
      store(sums, fg);
      store(sums + d, bg);
    }
  }
  const bool is_last = is_last_block(pool.arrived + recording * gridDim.y + blockIdx.y, unsigned(chunks));
  // What depends on attention alone is computed by a recording's first block.
  const bool is_first = blockIdx.x % chunks == 0 && blockIdx.y == 0;
  const A* attention = pool.attention + pool.rows.first(recording, t);
  double totals[2] = {};
  if (is_first || (is_last && pool.mean)) {
#pragma unroll 4
    for (int64_t s = threadIdx.x; s < length; s += blockDim.x) {
      const Weights<A> weights = weights_of(attention[s], pool.threshold, pool.background_threshold);
      totals[0] += selected(weights.fg) ? double(weights.fg) : 0.0;
      totals[1] += selected(weights.bg) ? double(weights.bg) : 0.0;
    }
    block_reduce(totals, Sum());
  }
  if (is_last && has_column) {
    const int64_t used = (length + kPoolChunk - 1) / kPoolChunk;
    const A* sums = pool.partial + 2 * recording * chunks * d + column;
    double fg[N] = {}, bg[N] = {};
#pragma unroll 8
    for (int64_t i = 0; i < used; ++i) {
      const Pack<A, N> chunk_fg = load<N>(sums + 2 * i * d), chunk_bg = load<N>(sums + (2 * i + 1) * d);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        fg[j] += chunk_fg.at[j];
        bg[j] += chunk_bg.at[j];
      }
    }
    const double by_fg = pool.mean && totals[0] > 0 ? totals[0] : 1, by_bg = pool.mean && totals[1] > 0 ? totals[1] : 1;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      pool.x_fg[recording * d + column + j] = A(fg[j] / by_fg);
      pool.x_bg[recording * d + column + j] = A(bg[j] / by_bg);
    }
  }
  if (!is_first) return;
  if (threadIdx.x == 0) {
    pool.valid_fg[recording] = totals[0] > 0;
    pool.valid_bg[recording] = totals[1] > 0;
    if (pool.weights != nullptr) {
      pool.weights[recording] = totals[0];
      pool.weights[pool.b + recording] = totals[1];
    }
  }
  if (pool.lowest != nullptr) {
    const int64_t lowest = lowest_of(attention, length);
    if (threadIdx.x == 0) pool.lowest[recording] = lowest;
  }
}

// Scale and shift of one side of one recording (blockIdx.x) with `mean`: pooled = scale * (weighted sum), and the
// quotient rule subtracts shift = scale * (pooled . grad) from every scale * (x . grad).
template <typename T, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kTermsThreads)
    mean_terms_kernel(const AttentionPool<T> x, bool has_grad_attention, A threshold, A background_threshold) {
  const int64_t recording = blockIdx.x / 2, length = x.rows.length(x.lengths, recording, x.t), d = x.d;
  const A* attention = x.attention + x.rows.first(recording, x.t);
  const bool foreground = blockIdx.x % 2 == 0;
  double total = 0;
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    const Weights<A> weights = weights_of(attention[i], threshold, background_threshold);
    const A weight = foreground ? weights.fg : weights.bg;
    if (selected(weight)) total += weight;
  }
  total = block_reduce(total, Sum());
  A dot = 0;
  if (has_grad_attention) {
    const A* pooled = (foreground ? x.x_fg : x.x_bg) + recording * d;
    const A* grad = (foreground ? x.grad_fg : x.grad_bg) + recording * d;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) dot += pooled[i] * grad[i];
    dot = block_reduce(dot, Sum());
  }
  if (threadIdx.x == 0) {
    const A scale = total > 0 ? A(1 / total) : A(1);
    x.terms[2 * int64_t(blockIdx.x)] = scale;
    x.terms[2 * int64_t(blockIdx.x) + 1] = total > 0 ? scale * dot : A(0);
  }
}

template <typename A>
struct WriteAttention {
  static constexpr int64_t kLeastThreads = 32;
  A* grad_attention;  // (b, t), or null
  int64_t t;
  Rows of_batch;

  __device__ __forceinline__ void operator()(int64_t recording, int64_t first, int rows, A gradient) const {
    if (grad_attention == nullptr || int(threadIdx.x) >= rows) return;
    grad_attention[of_batch.first(recording, t) + first + threadIdx.x] = gradient;
  }
};

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

template <typename T>
void pool_over_time(const Stream& on, const PoolOverTime<T>& pool) {
  // Without snippets or columns there are still results.
  const int64_t chunks = pool.t == 0 ? 1 : divide_up(pool.t, kPoolChunk);
  const bool packs = fits_packs(pool.d, pool.x, pool.partial);
  const int64_t n = divide_up(pool.d, packs ? kPackOf<T> : 1), threads = threads_for(n, kSumThreads);
  on.launch(packs ? pool_over_time_kernel<T, kPackOf<T>> : pool_over_time_kernel<T, 1>,
            {pool.b * chunks, n == 0 ? 1 : divide_up(n, threads)}, threads, 0, pool, chunks);
}

template <typename T>
void attention_pool(const AttentionPool<T>& x, int device, void* stream) {
  using A = accumulator_t<T>;
  const Stream on("attention_pool", device, stream);
  on.fill(x.arrived, 0, pool_counters(x.b, x.d));
  pool_over_time(on, PoolOverTime<T>{x.x, x.attention, x.lengths, x.b, x.t, x.d, A(x.threshold),
                                     A(x.background_threshold), x.mean != 0, x.partial, x.arrived, x.x_fg, x.x_bg,
                                     x.valid_fg, x.valid_bg, nullptr, nullptr, x.rows});
}

template <typename T>
void attention_pool_backward(const AttentionPool<T>& x, int device, void* stream) {
  using A = accumulator_t<T>;
  const Stream on("attention_pool_backward", device, stream);
  const A threshold = A(x.threshold), background_threshold = A(x.background_threshold);
  const bool has_grad_attention = x.grad_attention != nullptr;
  if (x.mean)
    on.launch(mean_terms_kernel<T>, 2 * x.b, kTermsThreads, 0, x, has_grad_attention, threshold, background_threshold);
  const PoolGradient<T> gradient{has_grad_attention ? x.x : nullptr,
                                 x.attention,
                                 x.lengths,
                                 x.mean ? x.terms : nullptr,
                                 x.grad_fg,
                                 x.grad_bg,
                                 x.b,
                                 x.t,
                                 x.d,
                                 threshold,
                                 background_threshold,
                                 x.grad_x,
                                 x.rows};
  pool_gradient(on, gradient, WriteAttention<A>{x.grad_attention, x.t, x.rows});
}

template void pool_over_time<float>(const Stream&, const PoolOverTime<float>&);
template void pool_over_time<double>(const Stream&, const PoolOverTime<double>&);
template void pool_over_time<float16>(const Stream&, const PoolOverTime<float16>&);
template void pool_over_time<bfloat16>(const Stream&, const PoolOverTime<bfloat16>&);
D2NET_INSTANTIATE_CUDA_HALF(attention_pool, AttentionPool)
D2NET_INSTANTIATE_CUDA_HALF(attention_pool_backward, AttentionPool)

}  // namespace d2net::cuda
