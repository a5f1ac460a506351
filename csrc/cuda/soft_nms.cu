// Soft-NMS in one block: which segment comes next depends on every decay before it, so the steps are a chain, and a
// block is what can take a step without a launch or a wait for the whole chip. A step is one pass: each thread decays
// its scores for the segment taken last and looks for the highest left, then the block agrees on it with one barrier.
// K results from n segments take K steps of n / 1024 a thread. Scores live in shared memory as long as they fit; the
// segments are read only and stay in the L1 cache.
#include <algorithm>

#include "cuda/block.h"
#include "cuda/segment.h"
#include "nms.h"

namespace d2net::cuda {
namespace {

constexpr int64_t kMaxBlock = 1024;

template <typename T>
struct Best {
  T score;
  int index;
};

// Higher score, then lower index. The lanes of a warp agree.
template <typename T>
__device__ __forceinline__ Best<T> best_of_warp(Best<T> best) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const T score = __shfl_xor_sync(kAllLanes, best.score, step);
    const int index = __shfl_xor_sync(kAllLanes, best.index, step);
    if (score > best.score || (score == best.score && index < best.index)) best = {score, index};
  }
  return best;
}

template <typename T>
struct Decay {
  T threshold, sigma, floor;
  bool gaussian;
};

template <typename T>
__device__ __forceinline__ T decayed(T score, Segment<T> taken, Segment<T> other, Decay<T> rule) {
  const T shared = overlap(taken, other);
  if (!(shared > 0)) return score;
  const T together = taken.length() + other.length() - shared;
  const T iou = together > 0 ? shared / together : T(0);  // inf - inf: endless segments have IoU 0
  if (rule.gaussian) return score * exp(-(iou * iou) / rule.sigma);
  return iou >= rule.threshold ? score * (1 - iou) : score;
}

// `current`: scratch for the scores where shared memory is too small, else null.
template <typename T>
__global__ void __launch_bounds__(kMaxBlock)
    soft_nms_kernel(const T* __restrict__ segments, const T* __restrict__ scores, int n, Decay<T> rule, T* current,
                    int64_t* keep, T* new_scores, int64_t* result) {
  D2NET_DYNAMIC_SHARED(T, in_shared);
  // Two sets, in turn: one barrier a step is enough.
  D2NET_SHARED(T, score_of_warp, [2][32]);
  D2NET_SHARED(int, index_of_warp, [2][32]);
  if (current == nullptr) current = in_shared;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  constexpr T kGone = -1;  // below any floor
  const Best<T> none = {kGone, n};

  int bad = n;
  Best<T> best = none;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (is_bad(segment_at(segments, i), scores[i])) bad = min(bad, i);
    current[i] = scores[i] >= rule.floor ? scores[i] : kGone;
    if (current[i] > best.score) best = {current[i], i};
  }
  bad = block_reduce(bad, Min());
  if (threadIdx.x == 0) result[1] = bad < n ? bad : -1;
  if (bad < n) return;

  for (int64_t count = 0;; ++count) {
    best = best_of_warp(best);
    const int set = count % 2;
    if (lane == 0) {
      score_of_warp[set][threadIdx.x / 32] = best.score;
      index_of_warp[set][threadIdx.x / 32] = best.index;
    }
    __syncthreads();
    best = none;
    if (lane < warps) best = {score_of_warp[set][lane], index_of_warp[set][lane]};
    const Best<T> taken = best_of_warp(best);
    if (taken.index == n) {
      if (threadIdx.x == 0) result[0] = count;
      return;
    }
    if (threadIdx.x == 0) {
      keep[count] = taken.index;
      new_scores[count] = taken.score;
    }
    const Segment<T> s = segment_at(segments, taken.index);
    best = none;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const T old = current[i];
      if (!(old >= rule.floor)) continue;
      T now = i == taken.index ? kGone : decayed(old, s, segment_at(segments, i), rule);
      if (!(now >= rule.floor)) now = kGone;  // NaN too, which infinity * 0 is
      if (now != old) current[i] = now;
      if (now > best.score) best = {now, i};
    }
  }
}

}  // namespace

template <typename T>
void soft_nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, double sigma, double min_score,
                 bool gaussian, T* scratch, int64_t* keep, T* new_scores, int64_t* result, int device, void* stream) {
  const Stream on("soft_nms_1d", device, stream);
  const int64_t shared_bytes = n * int64_t(sizeof(T));
  const bool fits = shared_bytes + 1024 <= on.shared_memory_limit();  // with the arrays of fixed size
  const int64_t threads = std::min((n + 31) / 32 * 32, kMaxBlock);
  on.launch(soft_nms_kernel<T>, 1, threads, fits ? shared_bytes : 0, segments, scores, n,
            Decay<T>{T(iou_threshold), T(sigma), T(min_score), gaussian}, fits ? nullptr : scratch, keep, new_scores,
            result);
}

#define D2NET_INSTANTIATE(T)                                                                                          \
  template void soft_nms_1d<T>(const T*, const T*, int64_t, double, double, double, bool, T*, int64_t*, T*, int64_t*, \
                               int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda
