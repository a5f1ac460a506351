// Bytes. Forward: every row of x that is on a side is read once for both sums; each chunk of 32 snippets leaves two
// rows of partial sums, 1/16 of x, which the second launch adds up. Backward: the same rows of x are read once, all
// rows of its gradient written once; the two gradients that come in stay in registers for the 20 snippets of a block.
//
// Layout. A thread owns a pack of columns, so a warp reads neighbouring bytes of a row. Blocks split recordings, time
// and columns: 480 of 128 threads forward, 380 of 256 backward (an H100 holds 396 at once), for 10 recordings of 750
// snippets and 1024 floats. Several rows are on their way to a thread: forward loads the next ones before it uses those
// of the last round, for without a loop in between the compiler puts each load where the row is used. For the same
// reason what is not selected is replaced by 0, without a branch (and not multiplied by 0, for it may be NaN).
#include "attention_pool.h"
#include "cuda/block.h"
#include "cuda/device.h"
#include "cuda/vector.h"

namespace d2net::cuda {
namespace {

constexpr int kSumThreads = 128;
constexpr int kCombineWarps = 8;
constexpr int kTermsThreads = 256;
constexpr int kBackwardThreads = 256, kBackwardRows = 20, kRowsAtOnce = 4;
static_assert(kPoolChunk == 32 && kBackwardRows <= 32, "one lane weighs one snippet");
static_assert(kBackwardRows % kRowsAtOnce == 0, "rows are taken in full rounds");

__device__ __forceinline__ int64_t length_of(const int64_t* lengths, int64_t recording, int64_t t) {
  return lengths == nullptr ? t : min(max(lengths[recording], int64_t(0)), t);
}

// The weights of one snippet on both sides. NaN: not on that side, for no selected weight is NaN.
template <typename A>
struct Weights {
  A fg, bg;
};

template <typename A>
__device__ __forceinline__ bool selected(A weight) {
  return weight == weight;
}

template <typename A>
__device__ __forceinline__ Weights<A> weigh(A lambda, A over, A background_over) {
  const A background = 1 - lambda;
  return {lambda > over ? lambda : A(NAN), background > background_over ? background : A(NAN)};
}

// Every lane weighs one snippet: `lane` of those from `first` on, up to `last` (exclusive).
template <typename A>
__device__ __forceinline__ Weights<A> weigh_mine(const A* attention, int64_t first, int64_t last, A over,
                                                 A background_over) {
  const int64_t mine = first + threadIdx.x % 32;
  return weigh(mine < last ? attention[mine] : A(NAN), over, background_over);
}

template <typename A>
__device__ __forceinline__ Weights<A> of_lane(const Weights<A>& mine, int lane) {
  return {__shfl_sync(kAllLanes, mine.fg, lane), __shfl_sync(kAllLanes, mine.bg, lane)};
}

// A block sums one chunk of one recording (blockIdx.x) over one tile of columns (blockIdx.y), in order of time.
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kSumThreads)
    sum_chunks(const T* __restrict__ x, const A* __restrict__ attention, const int64_t* __restrict__ lengths,
               int64_t chunks, int64_t t, int64_t d, A over, A background_over, A* __restrict__ partial,
               double* __restrict__ totals) {
  const int64_t recording = blockIdx.x / chunks, first = blockIdx.x % chunks * kPoolChunk;
  const int64_t last = min(first + kPoolChunk, length_of(lengths, recording, t));
  if (first >= last) return;  // combine_chunks stops before
  const Weights<A> mine = weigh_mine(attention + recording * t, first, last, over, background_over);
  if (blockIdx.y == 0 && threadIdx.x < 32) {
    const double fg = warp_reduce(selected(mine.fg) ? double(mine.fg) : 0.0, Sum());
    const double bg = warp_reduce(selected(mine.bg) ? double(mine.bg) : 0.0, Sum());
    if (threadIdx.x == 0) {
      totals[2 * int64_t(blockIdx.x)] = fg;
      totals[2 * int64_t(blockIdx.x) + 1] = bg;
    }
  }
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const bool has_column = column < d;
  const T* rows = x + (recording * t + first) * d + column;
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
  if (!has_column) return;
  A* sums = partial + 2 * int64_t(blockIdx.x) * d + column;
  store(sums, fg);
  store(sums + d, bg);
}

// A block adds the chunks of one side of one recording (blockIdx.x) for 32 columns (blockIdx.y): its warps take the
// chunks in turn, then the warps' sums are added in order, all in double.
template <typename A>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_chunks(const A* __restrict__ partial, const double* __restrict__ totals,
                   const int64_t* __restrict__ lengths, int64_t chunks, int64_t t, int64_t d, bool mean, A* x_fg,
                   A* x_bg, bool* valid_fg, bool* valid_bg) {
  D2NET_SHARED(double, of_warp, [kCombineWarps][32]);
  const int64_t recording = blockIdx.x / 2, side = blockIdx.x % 2, row = 2 * recording * chunks + side;
  const int64_t used = (length_of(lengths, recording, t) + kPoolChunk - 1) / kPoolChunk;
  double total = 0;
  for (int64_t i = threadIdx.x; i < used; i += blockDim.x) total += totals[row + 2 * i];
  total = block_reduce(total, Sum());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t(blockIdx.y) * 32 + lane;
  double sum = 0;
  if (column < d) {
#pragma unroll 4
    for (int64_t i = warp; i < used; i += kCombineWarps) sum += partial[(row + 2 * i) * d + column];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < d) {
    for (int other = 1; other < kCombineWarps; ++other) sum += of_warp[other][lane];
    const double divisor = mean && total > 0 ? total : 1;
    (side == 0 ? x_fg : x_bg)[recording * d + column] = A(sum / divisor);
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) (side == 0 ? valid_fg : valid_bg)[recording] = total > 0;
}

// What `mean` adds to the gradients of one side of one recording (blockIdx.x): pooled = scale * (weighted sum), and the
// quotient rule takes shift = scale * (pooled . grad) off every scale * (x . grad).
template <typename A>
__global__ void __launch_bounds__(kTermsThreads)
    mean_terms(const A* __restrict__ attention, const int64_t* __restrict__ lengths, const A* __restrict__ x_fg,
               const A* __restrict__ x_bg, const A* __restrict__ grad_fg, const A* __restrict__ grad_bg, int64_t t,
               int64_t d, A over, A background_over, A* __restrict__ terms) {
  const int64_t recording = blockIdx.x / 2, length = length_of(lengths, recording, t);
  const bool foreground = blockIdx.x % 2 == 0;
  double total = 0;
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    const Weights<A> weights = weigh(attention[recording * t + i], over, background_over);
    const A weight = foreground ? weights.fg : weights.bg;
    if (selected(weight)) total += weight;
  }
  total = block_reduce(total, Sum());
  A dot = 0;
  if (x_fg != nullptr) {
    const A* pooled = (foreground ? x_fg : x_bg) + recording * d;
    const A* grad = (foreground ? grad_fg : grad_bg) + recording * d;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x) dot += pooled[i] * grad[i];
    dot = block_reduce(dot, Sum());
  }
  if (threadIdx.x == 0) {
    const A scale = total > 0 ? A(1 / total) : A(1);
    terms[2 * int64_t(blockIdx.x)] = scale;
    terms[2 * int64_t(blockIdx.x) + 1] = total > 0 ? scale * dot : A(0);
  }
}

// The gradients that reach one thread's columns, times the scale.
template <int N, typename A>
__device__ __forceinline__ Pack<A, N> scaled(const A* grad, A scale) {
  Pack<A, N> values = load<N>(grad);
#pragma unroll
  for (int j = 0; j < N; ++j) values.at[j] *= scale;
  return values;
}

// A block takes 20 snippets of one recording (blockIdx.x) and all columns, tile by tile. x is null where only grad_x is
// wanted, and terms without `mean`.
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    backward(const T* __restrict__ x, const A* __restrict__ attention, const int64_t* __restrict__ lengths,
             const A* __restrict__ terms, const A* __restrict__ grad_fg, const A* __restrict__ grad_bg, int64_t groups,
             int64_t t, int64_t d, A over, A background_over, T* __restrict__ grad_x, A* __restrict__ grad_attention) {
  D2NET_SHARED(A, dots, [kBackwardRows][kBackwardThreads / 32]);
  const int64_t recording = blockIdx.x / groups, first = blockIdx.x % groups * kBackwardRows;
  const int rows = int(min(t - first, int64_t(kBackwardRows)));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t last = min(first + rows, length_of(lengths, recording, t));
  const Weights<A> mine = weigh_mine(attention + recording * t, first, last, over, background_over);
  const A* term = terms + 4 * recording;
  const A scale_fg = terms == nullptr ? A(1) : term[0], scale_bg = terms == nullptr ? A(1) : term[2];
  if (lane < kBackwardRows) dots[lane][warp] = 0;
  __syncwarp();
  for (int64_t tile = 0; tile < d; tile += int64_t(blockDim.x) * N) {
    const int64_t column = tile + threadIdx.x * N, from = (recording * t + first) * d + column;
    const bool has_column = column < d;
    Pack<A, N> fg = {}, bg = {};
    if (has_column) {
      fg = scaled<N>(grad_fg + recording * d + column, scale_fg);
      bg = scaled<N>(grad_bg + recording * d + column, scale_bg);
    }
    for (int begin = 0; begin < rows; begin += kRowsAtOnce) {
      Pack<T, N> values[kRowsAtOnce] = {};
      Weights<A> weights[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        weights[i] = of_lane(mine, begin + i);  // past `rows`: selected nowhere
        const bool used = selected(weights[i].fg) || selected(weights[i].bg);
        if (grad_attention != nullptr && used && has_column) values[i] = load<N>(x + from + (begin + i) * d);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const bool in_fg = selected(weights[i].fg), in_bg = selected(weights[i].bg);
        const A weight_fg = in_fg ? weights[i].fg : 0, weight_bg = in_bg ? weights[i].bg : 0;
        Pack<T, N> grad;
        A dot = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A f = in_fg ? fg.at[j] : 0, g = in_bg ? bg.at[j] : 0;
          grad.at[j] = from_float<T>(weight_fg * f + weight_bg * g);
          dot += to_float(values[i].at[j]) * (f - g);
        }
        if (grad_x != nullptr && has_column && begin + i < rows) {
          store(grad_x + from + (begin + i) * d, grad);
        }
        if (grad_attention != nullptr) {
          dot = warp_reduce(dot, Sum());
          if (lane == 0) dots[begin + i][warp] += dot;
        }
      }
    }
  }
  __syncthreads();
  if (grad_attention == nullptr || int(threadIdx.x) >= rows) return;
  A grad = 0;  // threads 0 to 19: `mine` is that of the same row
  for (unsigned other = 0; other < blockDim.x / 32; ++other) grad += dots[threadIdx.x][other];
  if (terms != nullptr && selected(mine.fg)) grad -= term[1];
  if (terms != nullptr && selected(mine.bg)) grad += term[3];
  grad_attention[recording * t + first + threadIdx.x] = grad;
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

template <typename T>
void attention_pool(const T* x, const accumulator_t<T>* attention, const int64_t* lengths, int64_t b, int64_t t,
                    int64_t d, double threshold, double background_threshold, bool mean, accumulator_t<T>* partial,
                    double* totals, accumulator_t<T>* x_fg, accumulator_t<T>* x_bg, bool* valid_fg, bool* valid_bg,
                    int device, void* stream) {
  using A = accumulator_t<T>;
  const Stream on("attention_pool", device, stream);
  const int64_t chunks = divide_up(t, kPoolChunk);
  const bool packs = fits_packs(d, x, partial);
  const int64_t n = divide_up(d, packs ? kPackOf<T> : 1), threads = threads_for(n, kSumThreads);
  // Without columns the weights must be summed all the same.
  const Extent grid{b * chunks, n == 0 ? 1 : divide_up(n, threads)};
  on.launch(packs ? sum_chunks<T, kPackOf<T>> : sum_chunks<T, 1>, grid, threads, 0, x, attention, lengths, chunks, t, d,
            A(threshold), A(background_threshold), partial, totals);
  on.launch(combine_chunks<A>, {2 * b, d == 0 ? 1 : divide_up(d, 32)}, 32 * kCombineWarps, 0, partial, totals, lengths,
            chunks, t, d, mean, x_fg, x_bg, valid_fg, valid_bg);
}

template <typename T>
void attention_pool_backward(const T* x, const accumulator_t<T>* attention, const int64_t* lengths,
                             const accumulator_t<T>* x_fg, const accumulator_t<T>* x_bg,
                             const accumulator_t<T>* grad_fg, const accumulator_t<T>* grad_bg, int64_t b, int64_t t,
                             int64_t d, double threshold, double background_threshold, bool mean,
                             accumulator_t<T>* terms, T* grad_x, accumulator_t<T>* grad_attention, int device,
                             void* stream) {
  using A = accumulator_t<T>;
  const Stream on("attention_pool_backward", device, stream);
  const A over = A(threshold), background_over = A(background_threshold);
  if (mean) {
    on.launch(mean_terms<A>, 2 * b, kTermsThreads, 0, attention, lengths, x_fg, x_bg, grad_fg, grad_bg, t, d, over,
              background_over, terms);
  }
  const int64_t groups = divide_up(t, kBackwardRows);
  const bool packs = fits_packs(d, x, grad_fg, grad_bg, grad_x);
  const int64_t threads = threads_for(divide_up(d, packs ? kPackOf<T> : 1), kBackwardThreads);
  on.launch(packs ? backward<T, kPackOf<T>> : backward<T, 1>, b * groups, threads, 0, x, attention, lengths,
            mean ? terms : nullptr, grad_fg, grad_bg, groups, t, d, over, background_over, grad_x, grad_attention);
}

#define INSTANTIATE(T)                                                                                                 \
  template void attention_pool<T>(const T*, const accumulator_t<T>*, const int64_t*, int64_t, int64_t, int64_t,        \
                                  double, double, bool, accumulator_t<T>*, double*, accumulator_t<T>*,                 \
                                  accumulator_t<T>*, bool*, bool*, int, void*);                                        \
  template void attention_pool_backward<T>(const T*, const accumulator_t<T>*, const int64_t*, const accumulator_t<T>*, \
                                           const accumulator_t<T>*, const accumulator_t<T>*, const accumulator_t<T>*,  \
                                           int64_t, int64_t, int64_t, double, double, bool, accumulator_t<T>*, T*,     \
                                           accumulator_t<T>*, int, void*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(float16)
INSTANTIATE(bfloat16)
#undef INSTANTIATE

}  // namespace d2net::cuda
