// What the kernels of the loss share: their argument, scratch memory, and Eq. 1.
#pragma once

#include <algorithm>

#include "cuda/common/bottom_up.h"
#include "cuda/common/joint.h"
#include "cuda/common/pool_over_time.h"
#include "loss.h"
#include "math/kept_scores.h"

namespace d2net::cuda {

constexpr int kLossThreads = kScoreThreads;
constexpr int64_t kSharedJoint = 32 * 1024;  // bytes that a block has on every chip, beside its static ones

template <typename A>
struct LossScratch {
  A* partial;         // see PoolOverTime
  double* sums;       // (b, groups, 4): the sums of Eq. 9 over 32 snippets
  int64_t* lowest;    // (b): the snippet of the lowest attention
  unsigned* arrived;  // counters of blocks: of each tile of PoolOverTime, of each recording, of all
  int64_t n_arrived;
  A *p, *y;  // (c, b), (b, c): the factors of U_2
  double* joint;
  // Totals of gradients (b, c), (2, b, d); terms (b, 2, 2) of PoolGradient; with respect to the attention of any
  // pseudo-foreground and of any pseudo-background snippet (b, 2).
  A *grad_pooled, *grad_x, *terms, *grad_sides;

  LossScratch(Pieces& pieces, int64_t b, int64_t t, int64_t c, int64_t d) {
    n_arrived = pool_counters(b, d) + b + 1;
    pieces.take(partial, b * (t / kPoolChunk + 1) * 2 * d);
    pieces.take(sums, b * (t / kScoreBlockRows + 1) * 4);
    pieces.take(lowest, b);
    pieces.take(arrived, n_arrived);
    pieces.take(p, b * c);
    pieces.take(y, b * c);
    const int64_t joint_doubles = std::min(b, c) > 0 && std::min(b, c) <= 128 ? JointLayout(c, b).total : 0;
    const int64_t joint_bytes = joint_doubles * int64_t(sizeof(double)) + 2 * b * c * int64_t(sizeof(A));
    pieces.take(joint, joint_bytes > kSharedJoint ? joint_doubles : 0);
    pieces.take(grad_pooled, b * c);
    pieces.take(grad_x, 2 * b * d);
    pieces.take(terms, 4 * b);
    pieces.take(grad_sides, 2 * b);
  }
};

// The argument of every kernel.
template <typename X>
struct LossTask : Loss<X> {
  using A = accumulator_t<X>;
  LossWorkspace<X> w;
  LossScratch<A> s;
  Pairs pairs;
  int64_t groups;  // of kScoreBlockRows snippets, of a recording
  bool has_video;

  explicit LossTask(const Loss<X>& x) : LossTask(x, Pieces(x.scratch, x.scratch_bytes)) {}
  LossTask(const Loss<X>& x, Pieces pieces)
      : Loss<X>(x),
        w(x),
        s(pieces, x.b, x.t, x.c, x.d),
        pairs(w.pairs(x)),
        groups(std::max<int64_t>(1, (x.t + kScoreBlockRows - 1) / kScoreBlockRows)),
        has_video(x.with.video != 0 && x.c > 0) {}

  __host__ __device__ const A* x_fg() const { return this->x; }
  __host__ __device__ const A* x_bg() const { return this->x + this->b * this->d; }
  __host__ __device__ const A* latest_x_ref() const { return this->with.update != 0 ? this->new_x_ref : this->x_ref; }
  __device__ unsigned* arrived_of(int64_t recording) const { return s.arrived + s.n_arrived - 1 - this->b + recording; }
  __device__ unsigned* arrived_of_all() const { return s.arrived + s.n_arrived - 1; }
};

template <typename T>
__device__ __forceinline__ double or_zero(const T* x) {
  return x == nullptr ? 0 : double(*x);
}

// A term of weight 0 is off, even if it is NaN: NaN * 0 would be NaN.
__device__ __forceinline__ double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

// How many of flags[0 ... n) are above 0, for all threads. Flag: bool, or int64_t above 0 for recordings that count.
template <typename Flag>
__device__ __forceinline__ double block_count(const Flag* flags, int64_t n) {
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) count += flags[i] > 0;
  return double(block_reduce(count, Sum{}));
}

// The scores of one recording, by `lanes` neighbouring lanes of a warp. All lanes of the warp must call; those without
// a row with c = 0.
template <int lanes, typename A>
__device__ __forceinline__ KeptScores<A> kept_scores(const A* row, int64_t c, A eps, A fraction) {
  KeptScores<A> scores(eps, fraction);
  if (fraction < A(0)) return scores;
  for (int64_t k = threadIdx.x % lanes; k < c; k += lanes) scores.compare(row[k]);
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
    scores.largest = max(scores.largest, __shfl_xor_sync(kAllLanes, scores.largest, step));
  }
  for (int64_t k = threadIdx.x % lanes; k < c; k += lanes) scores.add(row[k]);
  scores.sum = group_sum<lanes>(scores.sum);
  return scores;
}

// Eq. 1. Called by each of the `final_blocks`, the blocks after which no other computes a term; the last one adds up.
template <typename X>
__device__ __forceinline__ void total_loss(const LossTask<X>& x, unsigned final_blocks) {
  using A = accumulator_t<X>;
  if (!is_last_block(x.arrived_of_all(), final_blocks)) return;
  const double video = x.has_video ? double(*x.video) : 0;
  double sums[4] = {};  // of the terms of Eq. 4 and 9, and how many there are
  for (int64_t i = threadIdx.x; i < x.b; i += blockDim.x) {
    const bool counts = x.with.classify != 0 && x.counted[i] > 0;
    const bool has_snippet = x.with.snippet != 0 && x.w.snippet_valid[i];
    sums[0] += counts ? double(x.w.terms[i]) : 0.0;
    sums[1] += counts ? 1.0 : 0.0;
    sums[2] += has_snippet ? double(x.w.snippet_loss[i]) : 0.0;
    sums[3] += has_snippet ? 1.0 : 0.0;
  }
  block_reduce(sums, Sum{});
  if (threadIdx.x > 0) return;
  const double discriminative = sums[0] / max(sums[1], 1.0), snippet = sums[2] / max(sums[3], 1.0);
  *x.discriminative = A(discriminative);
  *x.snippet = A(snippet);
  *x.video = A(video);
  *x.total = A(discriminative + weighted(x.with.alpha_snippet, snippet) + weighted(x.with.alpha_video, video));
}

}  // namespace d2net::cuda
