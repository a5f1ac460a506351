// Two launches: the gradients of what is not (b, t, ...), then one pass over time.
#include "attention_pool.h"
#include "cuda/common/loss_task.h"
#include "loss.h"

namespace d2net::cuda {
namespace {

constexpr int kColumns = 4;  // of a thread, of gradients of x_fg and x_bg

// What the gradient of a row takes from a pair that it is in: `other` times the pair's other row, `own` times itself.
struct Hit {
  int64_t row;  // the other row; -1: not in the pair
  Share share;
};

// Candidate j of 6 b: the row as x (j / b even) or as x~ (odd) of pair j % b of kind j / 2b. grad: of every term that
// counts.
template <typename X>
__device__ __forceinline__ Hit candidate(const LossTask<X>& x, int64_t j, int64_t row, double grad) {
  const int64_t b = x.b, i = j % b;
  const int kind = int(j / (2 * b));
  const bool as_x = j / b % 2 == 0;
  const Pair pair = x.pairs.of(kind, i);
  if (pair.x < 0 || (as_x ? pair.x : pair.other) != row) return {-1, {0, 0}};
  const auto* norms = x.w.saved + kInverseNorm * b;
  const double x_norm = norms[pair.x], other_norm = norms[pair.other];
  const double by = (x.counted[i] > 0 ? double(accumulator_t<X>(grad)) : 0) * x.w.saved[(kToCosine + kind) * b + i];
  const double cosine = x.w.saved[(kCosine + kind) * b + i];
  return as_x ? Hit{pair.other, cosine_gradient(by, cosine, x_norm, other_norm)}
              : Hit{pair.x, cosine_gradient(by, cosine, other_norm, x_norm)};
}

// Row r of grad_x, 0 ... 2 b - 1, and its terms of PoolGradient.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void gradient_of_embedding(const LossTask<X>& x, int64_t r, double grad) {
  D2NET_SHARED(Hit, hits, [kLossThreads]);
  const int64_t b = x.b, d = x.d;
  const A* row = x.x + r * d;
  A* out = x.s.grad_x + r * d;
  double dot = 0;
  for (int64_t tile = threadIdx.x; tile - threadIdx.x < d; tile += kLossThreads * kColumns) {
    double sum[kColumns] = {}, own = 0;
    for (int64_t first = 0; first < 6 * b; first += kLossThreads) {
      Hit mine = {-1, {0, 0}};
      if (first + threadIdx.x < 6 * b) mine = candidate(x, first + threadIdx.x, r, grad);
      int found = 0;
      const int place = block_exclusive_sum(int(mine.row >= 0), &found);
      if (mine.row >= 0) hits[place] = mine;
      __syncthreads();
      for (int hit = 0; hit < found; ++hit) {
        own += hits[hit].share.own;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int64_t k = tile + n * kLossThreads;
          if (k < d) sum[n] += hits[hit].share.other * x.x[hits[hit].row * d + k];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int64_t k = tile + n * kLossThreads;
      if (k >= d) continue;
      const A gradient = A(sum[n] + own * row[k] + (x.of_x == nullptr ? 0 : double(x.of_x[r * d + k])));
      out[k] = gradient;
      dot += double(gradient) * row[k];
    }
  }
  if (x.with.mean_embeddings == 0) return;
  dot = block_reduce(dot, Sum{});
  if (threadIdx.x > 0) return;
  const double total = x.w.weights[r];
  A* terms = x.s.terms + 4 * (r % b) + 2 * (r / b);
  terms[0] = total > 0 ? A(1 / total) : A(1);
  terms[1] = total > 0 ? A(dot / total) : A(0);
}

// Row i of grad_pooled. grad: of a term that counts; grad_video: of L_DV.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void gradient_of_scores(const LossTask<X>& x, int64_t i, A grad, A grad_video, bool video) {
  const int64_t b = x.b, c = x.c;
  const A* row = x.pooled + i * c;
  const auto of_p = [&](int64_t k) {
    return grad_video * x.w.p_left[k] * x.w.p_right[i] + grad_video * x.w.p_left[c + k] * x.w.p_right[b + i];
  };
  // By one warp, for there are few classes.
  if (threadIdx.x >= 32) return;
  const Peaks<A> peaks = row_peaks<32>(row, c, A(x.with.probability_floor), A(x.with.peak_share));
  double along = 0;  // the gradient times the value
  if (video && peaks.share >= A(0)) {
    for (int64_t k = threadIdx.x; k < c; k += 32) along += double(of_p(k)) * peaks.value(row[k]);
    along = warp_reduce(along, Sum{});
  }
  for (int64_t k = threadIdx.x; k < c; k += 32) {
    A gradient = x.of_pooled == nullptr ? A(0) : x.of_pooled[i * c + k];
    if (video) gradient += peaks.gradient(row[k], of_p(k), along);
    if (x.with.classify != 0 && x.counted[i] > 0) gradient += grad * x.w.to_pooled[i * c + k];
    x.s.grad_pooled[i * c + k] = gradient;
  }
}

// The first b blocks have a recording and its row of grad_fg each, the next ones a row of grad_bg.
template <typename X, typename A = accumulator_t<X>>
__global__ void __launch_bounds__(kLossThreads, 1)
    gradients_kernel(const LossTask<X> x, bool embed, bool video, bool snippet) {
  const double total = or_zero(x.of_total), counted = block_count(x.counted, x.b);
  const double grad = x.with.classify != 0 ? (total + or_zero(x.of_discriminative)) / max(counted, 1.0) : 0;
  if (blockIdx.x < x.b) {
    const double of_video = weighted(x.with.alpha_video, total) + or_zero(x.of_video);
    gradient_of_scores(x, blockIdx.x, A(grad), A(of_video), video);
    const double comparable = snippet ? block_count(x.w.comparable, x.b) : 0;
    if (threadIdx.x < 2) {
      const double of_snippet = weighted(x.with.alpha_snippet, total) + or_zero(x.of_snippet);
      const int64_t at = 2 * int64_t(blockIdx.x) + threadIdx.x;
      const bool counts = snippet && x.w.comparable[blockIdx.x];
      x.s.of_snippets[at] = counts ? A(of_snippet / comparable) * x.w.to_attention[at] : A(0);
    }
  }
  if (embed) gradient_of_embedding(x, blockIdx.x, grad);
}

// From the gradient of attention to that of the TCAM.
template <typename X>
struct ToTcam {
  using A = accumulator_t<X>;
  static constexpr int64_t kLeastThreads = 128;
  LossTask<X> x;
  bool snippet;

  __device__ __forceinline__ void operator()(int64_t recording, int64_t first, int rows, A gradient) const {
    D2NET_SHARED(A, of_peak, [kBackwardRows]);
    D2NET_SHARED(A, of_seen, [kBackwardRows]);
    D2NET_SHARED(int32_t, peaks, [kBackwardRows]);
    D2NET_SHARED(int32_t, seen_peaks, [kBackwardRows]);
    const int64_t t = x.t, c = x.c, length = x.counted[recording];
    if (int(threadIdx.x) < rows) {
      const int64_t row = recording * t + first + threadIdx.x;
      const bool inside = first + threadIdx.x < length, own = x.with.own_classes != 0;
      const bool is_fg = inside && snippet && x.scores[row] > A(x.with.fg_threshold);
      const bool is_bg = inside && snippet && x.scores[row] < A(x.with.bg_threshold);
      const A* of = x.s.of_snippets + 2 * recording;
      const A of_snippet = (is_fg ? of[0] : A(0)) + (is_bg ? of[1] : A(0));
      const A of_attention = inside && x.of_attention != nullptr ? x.of_attention[row] : A(0);
      of_peak[threadIdx.x] = gradient + of_attention + (own ? A(0) : of_snippet);
      of_seen[threadIdx.x] = of_snippet;
      peaks[threadIdx.x] = inside ? x.w.peak[row] : -1;
      seen_peaks[threadIdx.x] = own && (is_fg || is_bg) ? x.w.seen_peak[row] : -1;
    }
    __syncthreads();
    const A k_of_top = A(math::topk_count(length, int64_t(x.with.topk_divisor)));
    for (unsigned i = threadIdx.x; i < unsigned(rows) * unsigned(c); i += blockDim.x) {
      const int row = int(i / unsigned(c)), k = int(i % unsigned(c));
      const int64_t at = (recording * t + first) * c + i, column = recording * c + k;
      A sum = 0;
      if (first + row < length) {
        const auto kth = math::ordered_key(x.w.kth[column]);
        if (math::among_topk(x.tcam[at], int32_t(first + row), kth, x.w.last[column])) {
          sum = x.s.grad_pooled[column] / k_of_top;
        }
        if (peaks[row] == k) sum += of_peak[row];
        if (seen_peaks[row] == k) sum += of_seen[row];
      }
      x.grad_tcam[at] = sum;
    }
  }
};

}  // namespace

template <typename X>
void loss_backward(const Loss<X>& arguments, int device, void* stream) {
  using A = accumulator_t<X>;
  const Stream on("d2net_loss_backward", device, stream);
  const LossTask<X> x(arguments);
  const LossSettings& with = x.with;
  const bool embed = with.embed != 0 && with.separate != 0;
  // A term that nothing asks for is left out, for its gradient may be NaN.
  const bool video = x.has_video && (x.of_video != nullptr || with.alpha_video != 0);
  const bool snippet = with.snippet != 0 && (x.of_snippet != nullptr || with.alpha_snippet != 0);
  on.launch(gradients_kernel<X>, embed ? 2 * x.b : x.b, kLossThreads, 0, x, embed, video, snippet);
  PoolGradient<X> gradient = {};
  gradient.attention = x.attention, gradient.lengths = x.counted;
  gradient.over = A(with.threshold), gradient.background_over = A(with.background_threshold);
  gradient.b = x.b, gradient.t = x.t, gradient.grad_x = x.grad_embeddings;
  if (embed) {
    gradient.x = x.embeddings, gradient.d = x.d;
    gradient.grad_fg = x.s.grad_x, gradient.grad_bg = x.s.grad_x + x.b * x.d;
    gradient.terms = with.mean_embeddings != 0 ? x.s.terms : nullptr;
  }
  pool_gradient(on, gradient, ToTcam<X>{x, snippet});
}

D2NET_INSTANTIATE_CUDA_HALF(loss_backward, Loss)

}  // namespace d2net::cuda
