// Eq. 8 to 10: attention compared with the angles to x_ref, scores compared with labels.
#pragma once

#include "cuda/common/loss_task.h"
#include "math/svd2x2.h"

namespace d2net::cuda {

// L_DV: the factors of U_2, p (c, b) and y (b, c), and log(sigma_1 / sigma_r), by one block. memory: see JointLayout.
template <typename A>
__device__ __forceinline__ void video_term(const LossTask<A>& x, double tolerance, double* memory, A* p, A* y) {
  const int64_t b = x.b, c = x.c;
  // Half of the warps compute P_2, half Y_2: neither waits for what the other loads.
  const int half = blockDim.x / 64 * 32, lane = threadIdx.x % kGroup;
  if (int(threadIdx.x) < half) {
    for (int64_t base = 0; base < b; base += half / kGroup) {  // the lanes of a warp stay together
      const int64_t i = base + threadIdx.x / kGroup, classes = i < b ? c : 0;
      const A* row = x.pooled + i * c;
      const KeptScores<A> scores = kept_scores<kGroup>(row, classes, A(x.with.probability_floor), A(x.with.peak_share));
      for (int64_t k = lane; k < classes; k += kGroup) p[k * b + i] = scores.value(row[k]);
    }
  } else {
    const bool per_class = x.with.video_per_class != 0;
    int64_t all = 0;
    for (int64_t first = 0; first < b; first += 32) {
      const int64_t j = first + threadIdx.x % 32;
      all += __popc(__ballot_sync(kAllLanes, j < b && x.counted[j] > 0));
    }
    for (int64_t i = (int(threadIdx.x) - half) / kGroup; i < b; i += (int(blockDim.x) - half) / kGroup) {
      const bool counts = x.counted[i] > 0;
      for (int64_t k = lane; k < c; k += kGroup) {
        double size = per_class ? 0 : double(all);
        for (int64_t j = 0; per_class && j < b; ++j) size += x.counted[j] > 0 ? double(x.labels[j * c + k]) : 0.0;
        y[i * c + k] = counts ? A(x.labels[i * c + k] / max(size, 1.0)) : A(0);
      }
    }
  }
  __syncthreads();
  A* const unwanted = nullptr;
  joint_condition_number(p, y, int(c), int(b), kVideoRankTol, tolerance, x.video, x.w.p_left, x.w.p_right, unwanted,
                         unwanted, memory);
}

// in_shared: all of its memory is shared memory, P_2 and Y_2 behind the rest. Otherwise it is scratch memory.
template <typename A, bool in_shared>
__global__ void __launch_bounds__(512, 1) video_kernel(const LossTask<A> x, double tolerance, unsigned final_blocks) {
  D2NET_DYNAMIC_SHARED(double, shared);
  auto* p = in_shared ? reinterpret_cast<A*>(shared + JointLayout(x.c, x.b).total) : x.s.p;
  video_term(x, tolerance, in_shared ? shared : x.s.joint, p, in_shared ? p + x.b * x.c : x.s.y);
  total_loss(x, final_blocks);
}

// The maximum over a recording's own classes at one snippet, and its class; 0 and -1 without one. By a whole warp.
template <typename A>
__device__ __forceinline__ A maximum_over_own_classes(const A* row, const A* labels, int64_t c, int32_t* argmax) {
  using Key = typename math::Ordered<A>::Key;
  Key best = math::ordered_key(A(0)) - 1;
  int32_t found = -1;
  for (int64_t k = threadIdx.x % 32; k < c; k += 32) {
    const Key key = math::ordered_key(row[k]);
    if (!(labels[k] > A(0)) || key <= best) continue;
    best = key;
    found = int32_t(k);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Key other = __shfl_xor_sync(kAllLanes, best, step);
    const int32_t at = __shfl_xor_sync(kAllLanes, found, step);
    found = other > best || (other == best && at < found) ? at : found;
    best = other > best ? other : best;
  }
  *argmax = found;
  return found < 0 ? A(0) : math::ordered_value<A>(best);
}

// Eq. 9 of a recording by one thread, from the numbers of pseudo-foreground and pseudo-background snippets and the sums
// of their attention.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void snippet_term(const LossTask<X>& x, int64_t i, double n_fg, double sum_fg, double n_bg,
                                             double sum_bg) {
  x.w.snippet_valid[i] = n_fg > 0 && n_bg > 0;
  if (!x.w.snippet_valid[i]) {
    x.w.snippet_loss[i] = x.w.side_grad[2 * i] = x.w.side_grad[2 * i + 1] = 0;
    return;
  }
  const bool per_class = x.with.snippet_per_class != 0;
  const double by_fg = 1 / (per_class ? n_fg : n_fg + n_bg), by_bg = 1 / (per_class ? n_bg : n_fg + n_bg);
  // Rows: lambda and 1 - lambda; columns: pseudo-foreground and pseudo-background.
  const Condition2x2 u = clamped_condition_2x2(sum_fg * by_fg, sum_bg * by_bg, (n_fg - sum_fg) * by_fg,
                                               (n_bg - sum_bg) * by_bg, x.with.entry_floor, x.with.rank_tol);
  x.w.snippet_loss[i] = A(log1p(u.excess));
  x.w.side_grad[2 * i] = A((u.da - u.dc) * by_fg);
  x.w.side_grad[2 * i + 1] = A((u.db - u.dd) * by_bg);
}

// A block has 32 snippets of one recording. The last launch.
template <typename X, int N, typename A = accumulator_t<X>>
__global__ void __launch_bounds__(kLossThreads, 2) score_kernel(const LossTask<X> x, unsigned final_blocks) {
  const int64_t recording = blockIdx.x / x.groups, group = blockIdx.x % x.groups;
  const int64_t d = x.d, c = x.c;
  const int64_t first = group * kScoreBlockRows + threadIdx.x / 32 * kScoreRows;
  const int rows = int(max(min(x.counted[recording] - first, int64_t(kScoreRows)), int64_t(0)));
  const int lane = threadIdx.x % 32;
  const int64_t first_row = x.rows.first(recording, x.t) + first, row = first_row + lane;
  const int64_t written = x.rows.written(x.lengths, recording, x.t);
  A attention = x.with.snippet != 0 && lane < rows ? x.attention[row] : A(0);  // loads meanwhile
  const Angle<A> mine = angles_of<N>(x.embeddings + first_row * d, x.latest_x_ref(), rows, d);
  const A score = A(0.5) * (1 - mine.cosine);
  if (lane < kScoreRows && first + lane < written) x.scores[row] = score;
  if (x.with.snippet != 0) {
    const bool fg = lane < rows && score > A(x.with.fg_threshold), bg = lane < rows && score < A(x.with.bg_threshold);
    if (x.with.own_classes != 0) {
      int32_t argmax = fg || bg ? x.w.argmax[row] : -1;
      for (unsigned left = __ballot_sync(kAllLanes, fg); left != 0; left &= left - 1) {
        const int of = __ffs(int(left)) - 1;
        int32_t found;
        const A own = maximum_over_own_classes(x.tcam + (first_row + of) * c, x.labels + recording * c, c, &found);
        if (lane == of) {
          attention = own;
          argmax = found;
        }
      }
      if (fg || bg) x.w.own_argmax[row] = argmax;
    }
    double sums[4] = {fg ? 1.0 : 0.0, fg ? double(attention) : 0.0, bg ? 1.0 : 0.0, bg ? double(attention) : 0.0};
    block_reduce(sums, Sum{});
    double* of_recording = x.s.sums + 4 * recording * x.groups;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < 4; ++k) of_recording[4 * group + k] = sums[k];
    }
    if (!is_last_block(x.arrived_of(recording), unsigned(x.groups))) return;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums[k] = 0;
      for (int64_t g = threadIdx.x; g < x.groups; g += kLossThreads) sums[k] += of_recording[4 * g + k];
    }
    block_reduce(sums, Sum{});
    if (threadIdx.x == 0) snippet_term(x, recording, sums[0], sums[1], sums[2], sums[3]);
  }
  total_loss(x, final_blocks);
}

}  // namespace d2net::cuda
