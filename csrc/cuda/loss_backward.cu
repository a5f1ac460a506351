// Two launches: the gradients of (b), (b, c) and (2, b, d), then one pass over time.
#include "attention_pool.h"
#include "cuda/common/loss_task.h"
#include "loss.h"

namespace d2net::cuda {
namespace {

constexpr int kColumns = 4;  // of a thread, of gradients of x_fg and x_bg

// A pair that a row is in.
struct Hit {
  int64_t row;  // the other row; -1: the row is not in the pair
  CosineGradient gradient;
};

// Candidate j of 6 b: the row as x (j / b even) or as x~ (odd) of pair j / 2b of recording j % b. grad: with respect to
// every term that counts.
template <typename A>
__device__ __forceinline__ Hit candidate(const LossTask<A>& x, int64_t j, int64_t row, double grad) {
  const int64_t b = x.b, i = j % b;
  const int p = int(j / (2 * b));
  const bool as_x = j / b % 2 == 0;
  const Pair pair = x.pairs.of(p, i);
  if (pair.x < 0 || (as_x ? pair.x : pair.other) != row) return {-1, {0, 0}};
  const auto* norms = x.w.saved + kInverseNormFg * b;
  const double x_norm = norms[pair.x], other_norm = norms[pair.other];
  const double grad_term = x.counted[i] > 0 ? double(A(grad)) : 0;
  const double grad_cosine = grad_term * x.w.saved[(kGradCosine + p) * b + i];
  const double cosine = x.w.saved[(kCosine + p) * b + i];
  return as_x ? Hit{pair.other, cosine_gradient(grad_cosine, cosine, x_norm, other_norm)}
              : Hit{pair.x, cosine_gradient(grad_cosine, cosine, other_norm, x_norm)};
}

// Row r of grad_x, 0 ... 2 b - 1, and its terms of PoolGradient.
template <typename A>
__device__ __forceinline__ void grad_embedding(const LossTask<A>& x, int64_t r, double grad) {
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
        own += hits[hit].gradient.own;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int64_t k = tile + n * kLossThreads;
          if (k < d) sum[n] += hits[hit].gradient.other * x.x[hits[hit].row * d + k];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int64_t k = tile + n * kLossThreads;
      if (k >= d) continue;
      const A gradient = A(sum[n] + own * row[k] + (x.grad_x == nullptr ? 0 : double(x.grad_x[r * d + k])));
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

// Row i of grad_pooled. grad: with respect to a term that counts; grad_video: to L_DV.
template <typename A>
__device__ __forceinline__ void grad_scores(const LossTask<A>& x, int64_t i, A grad, A grad_video, bool video) {
  const int64_t b = x.b, c = x.c;
  const A* row = x.pooled + i * c;
  const auto grad_p = [&](int64_t k) {
    return grad_video * x.w.p_left[k] * x.w.p_right[i] + grad_video * x.w.p_left[c + k] * x.w.p_right[b + i];
  };
  // By one warp: there are few classes.
  if (threadIdx.x >= 32) return;
  const KeptScores<A> scores = kept_scores<32>(row, c, A(x.with.probability_floor), A(x.with.peak_share));
  double dot = 0;  // gradient times value
  if (video && scores.fraction >= A(0)) {
    for (int64_t k = threadIdx.x; k < c; k += 32) dot += double(grad_p(k)) * scores.value(row[k]);
    dot = warp_reduce(dot, Sum{});
  }
  for (int64_t k = threadIdx.x; k < c; k += 32) {
    A gradient = x.grad_pooled == nullptr ? A(0) : x.grad_pooled[i * c + k];
    if (video) gradient += scores.gradient(row[k], grad_p(k), dot);
    if (x.with.classify != 0 && x.counted[i] > 0) gradient += grad * x.w.grad_terms[i * c + k];
    x.s.grad_pooled[i * c + k] = gradient;
  }
}

// The first b blocks compute grad_pooled and grad_sides of a recording and its row of grad_fg, the others a row of
// grad_bg.
template <typename A>
__global__ void __launch_bounds__(kLossThreads, 1)
    gradients_kernel(const LossTask<A> x, bool embed, bool video, bool snippet) {
  const double total = or_zero(x.grad_total), counted = block_count(x.counted, x.b);
  const double grad = x.with.classify != 0 ? (total + or_zero(x.grad_discriminative)) / max(counted, 1.0) : 0;
  if (blockIdx.x < x.b) {
    const double grad_video = weighted(x.with.alpha_video, total) + or_zero(x.grad_video);
    grad_scores(x, blockIdx.x, A(grad), A(grad_video), video);
    const double snippets = snippet ? block_count(x.w.snippet_valid, x.b) : 0;
    if (threadIdx.x < 2) {
      const double grad_snippet = weighted(x.with.alpha_snippet, total) + or_zero(x.grad_snippet);
      const int64_t at = 2 * int64_t(blockIdx.x) + threadIdx.x;
      const bool counts = snippet && x.w.snippet_valid[blockIdx.x];
      x.s.grad_sides[at] = counts ? A(grad_snippet / snippets) * x.w.side_grad[at] : A(0);
    }
  }
  if (embed) grad_embedding(x, blockIdx.x, grad);
}

// Gets the gradient with respect to attention, and writes that with respect to the TCAM.
template <typename X>
struct WriteGradTcam {
  using A = accumulator_t<X>;
  static constexpr int64_t kLeastThreads = 128;
  LossTask<X> x;
  bool snippet;

  __device__ __forceinline__ void operator()(int64_t recording, int64_t first, int rows, A gradient) const {
    // With respect to the activations at argmax and, with own_classes, at own_argmax.
    D2NET_SHARED(A, grad_max, [kBackwardRows]);
    D2NET_SHARED(A, grad_own_max, [kBackwardRows]);
    D2NET_SHARED(int32_t, argmax, [kBackwardRows]);
    D2NET_SHARED(int32_t, own_argmax, [kBackwardRows]);
    const int64_t c = x.c, length = x.rows.length(x.counted, recording, x.t);
    const int64_t first_row = x.rows.first(recording, x.t) + first;
    if (int(threadIdx.x) < rows) {
      const int64_t row = first_row + threadIdx.x;
      const bool inside = first + threadIdx.x < length, own = x.with.own_classes != 0;
      const bool is_fg = inside && snippet && x.scores[row] > A(x.with.fg_threshold);
      const bool is_bg = inside && snippet && x.scores[row] < A(x.with.bg_threshold);
      const A* grad_side = x.s.grad_sides + 2 * recording;
      const A grad_snippet = (is_fg ? grad_side[0] : A(0)) + (is_bg ? grad_side[1] : A(0));
      const A grad_attention = inside && x.grad_attention != nullptr ? x.grad_attention[row] : A(0);
      grad_max[threadIdx.x] = gradient + grad_attention + (own ? A(0) : grad_snippet);
      grad_own_max[threadIdx.x] = grad_snippet;
      argmax[threadIdx.x] = inside ? x.w.argmax[row] : -1;
      own_argmax[threadIdx.x] = own && (is_fg || is_bg) ? x.w.own_argmax[row] : -1;
    }
    __syncthreads();
    const A topk = A(math::topk_count(length, int64_t(x.with.topk_divisor)));
    for (unsigned i = threadIdx.x; i < unsigned(rows) * unsigned(c); i += blockDim.x) {
      const int row = int(i / unsigned(c)), k = int(i % unsigned(c));
      const int64_t at = first_row * c + i, column = recording * c + k;
      A sum = 0;
      if (first + row < length) {
        const auto kth = math::ordered_key(x.w.kth[column]);
        if (math::among_topk(x.tcam[at], int32_t(first + row), kth, x.w.last[column])) {
          sum = x.s.grad_pooled[column] / topk;
        }
        if (argmax[row] == k) sum += grad_max[row];
        if (own_argmax[row] == k) sum += grad_own_max[row];
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
  // A term without a gradient and of weight 0 is left out: its own gradient may be NaN.
  const bool video = x.has_video && (x.grad_video != nullptr || with.alpha_video != 0);
  const bool snippet = with.snippet != 0 && (x.grad_snippet != nullptr || with.alpha_snippet != 0);
  on.launch(gradients_kernel<A>, embed ? 2 * x.b : x.b, kLossThreads, 0, LossTask<A>(without_embeddings(arguments)),
            embed, video, snippet);
  PoolGradient<X> gradient = {};
  gradient.attention = x.attention, gradient.lengths = x.counted;
  gradient.threshold = A(with.threshold), gradient.background_threshold = A(with.background_threshold);
  gradient.b = x.b, gradient.t = x.t, gradient.rows = x.rows, gradient.grad_x = x.grad_embeddings;
  if (embed) {
    gradient.x = x.embeddings, gradient.d = x.d;
    gradient.grad_fg = x.s.grad_x, gradient.grad_bg = x.s.grad_x + x.b * x.d;
    gradient.terms = with.mean_embeddings != 0 ? x.s.terms : nullptr;
  }
  pool_gradient(on, gradient, WriteGradTcam<X>{x, snippet});
}

D2NET_INSTANTIATE_CUDA_HALF(loss_backward, Loss)

}  // namespace d2net::cuda
