// Eq. 8 to 10: attention against x_ref, scores against labels.
#pragma once

#include "cuda/common/loss_task.h"
#include "math/svd2x2.h"

namespace d2net::cuda {

// The factors of U_2, p (c, b) and y (b, c), and log(sigma_1 / sigma_r), by one block. memory: as JointLayout says.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void agree(const LossTask<X>& x, double tolerance, double* memory, A* p, A* y) {
  const int64_t b = x.b, c = x.c;
  // One half of the warps makes P_2, the other Y_2, so that neither waits for what the other loads.
  const int half = blockDim.x / 64 * 32, lane = threadIdx.x % kGroup;
  if (int(threadIdx.x) < half) {
    for (int64_t base = 0; base < b; base += half / kGroup) {  // the lanes of a warp stay together
      const int64_t i = base + threadIdx.x / kGroup, classes = i < b ? c : 0;
      const A* row = x.pooled + i * c;
      const Peaks<A> peaks = row_peaks<kGroup>(row, classes, A(x.with.probability_floor), A(x.with.peak_share));
      for (int64_t k = lane; k < classes; k += kGroup) p[k * b + i] = peaks.value(row[k]);
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

// shares: all that it needs is in shared memory, P_2 and Y_2 behind the rest. Else it is in scratch memory.
template <typename X, bool shares>
__global__ void __launch_bounds__(512, 1) agree_kernel(const LossTask<X> x, double tolerance, unsigned enders) {
  D2NET_DYNAMIC_SHARED(double, shared);
  auto* p = shares ? reinterpret_cast<accumulator_t<X>*>(shared + JointLayout(x.c, x.b).total) : x.s.p;
  agree(x, tolerance, shares ? shared : x.s.joint, p, shares ? p + x.b * x.c : x.s.y);
  add_up(x, enders);
}

// The maximum over a recording's own classes at one snippet, and its class; 0 and -1 without one. By a whole warp.
template <typename A>
__device__ __forceinline__ A own_attention(const A* row, const A* labels, int64_t c, int32_t* peak) {
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
  *peak = found;
  return found < 0 ? A(0) : math::ordered_value<A>(best);
}

// Eq. 9 of a recording from its sums, by one thread.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void condition(const LossTask<X>& x, int64_t i, double n_f, double f_sum, double n_b,
                                          double b_sum) {
  x.w.comparable[i] = n_f > 0 && n_b > 0;
  if (!x.w.comparable[i]) {
    x.w.snippets[i] = x.w.to_attention[2 * i] = x.w.to_attention[2 * i + 1] = 0;
    return;
  }
  const bool per_class = x.with.snippet_per_class != 0;
  const double f = 1 / (per_class ? n_f : n_f + n_b), g = 1 / (per_class ? n_b : n_f + n_b);
  // Rows: lambda and 1 - lambda; columns: pseudo-foreground and pseudo-background.
  const Condition2x2 u = floored_condition_2x2(f_sum * f, b_sum * g, (n_f - f_sum) * f, (n_b - b_sum) * g,
                                               x.with.entry_floor, x.with.rank_tol);
  x.w.snippets[i] = A(log1p(u.excess));
  x.w.to_attention[2 * i] = A((u.da - u.dc) * f);
  x.w.to_attention[2 * i + 1] = A((u.db - u.dd) * g);
}

// A block has 32 snippets of one recording. The last launch.
template <typename X, int N, typename A = accumulator_t<X>>
__global__ void __launch_bounds__(kLossThreads, 2) score_kernel(const LossTask<X> x, unsigned enders) {
  const int64_t recording = blockIdx.x / x.groups, group = blockIdx.x % x.groups;
  const int64_t t = x.t, d = x.d, c = x.c;
  const int64_t first = group * kScoreBlockRows + threadIdx.x / 32 * kScoreRows;
  const int rows = int(max(min(x.counted[recording] - first, int64_t(kScoreRows)), int64_t(0)));
  const int lane = threadIdx.x % 32;
  const int64_t row = recording * t + first + lane;
  A attention = x.with.snippet != 0 && lane < rows ? x.attention[row] : A(0);  // on its way meanwhile
  const Angle<A> mine = angles_of<N>(x.embeddings + (recording * t + first) * d, x.latest_x_ref(), rows, d);
  const A score = A(0.5) * (1 - mine.cosine);
  if (lane < kScoreRows && first + lane < t) x.scores[row] = score;
  if (x.with.snippet != 0) {
    const bool fg = lane < rows && score > A(x.with.fg_threshold), bg = lane < rows && score < A(x.with.bg_threshold);
    if (x.with.own_classes != 0) {
      int32_t peak = fg || bg ? x.w.peak[row] : -1;
      for (unsigned left = __ballot_sync(kAllLanes, fg); left != 0; left &= left - 1) {
        const int of = __ffs(int(left)) - 1;
        int32_t found;
        const A own = own_attention(x.tcam + (recording * t + first + of) * c, x.labels + recording * c, c, &found);
        if (lane == of) {
          attention = own;
          peak = found;
        }
      }
      if (fg || bg) x.w.seen_peak[row] = peak;
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
    if (threadIdx.x == 0) condition(x, recording, sums[0], sums[1], sums[2], sums[3]);
  }
  add_up(x, enders);
}

}  // namespace d2net::cuda
