// Soft-NMS in one block. Which segment comes next depends on every decay before it, so the steps are sequential, and a
// block can take one without a launch or a barrier of the whole chip. It saves work in two ways: a decay reaches only
// some tiles, and steps that do not affect each other are taken together.
//
//   Segments are sorted by octave of length and then by start, and 32 of them, neighbours of similar length, are a tile
//   (more of them from 32,768 segments on). A tile has the interval that it covers and its two highest scores. A
//   segment that is taken decays only the tiles that it overlaps, and these search their highest scores again only
//   where one of the two has fallen.
//
//   Each warp offers the best segment of its tiles, which are every 32nd. The block takes the offers that are certainly
//   the next ones: those above every score that is not offered, in order, up to the first that an earlier one decays.
//   All of them are then applied in one pass, in that order, so that every product is the same as one step at a time.
//
// Counted in the emulator for 8,192 segments of 0.5 to 60 s in 819 s (linear, threshold 0.3, min_score 0.001; gaussian,
// sigma 0.5, in brackets), 3,619 (3,746) results: 556 (639) passes of two barriers each, 11 (12) tiles touched for a
// result, of 256, and highest scores found again in 2 (7). One at a time, every result would cost a barrier and all
// 256. The sort adds 91 barriers.
#include <algorithm>
#include <limits>

#include "cuda/common/block.h"
#include "cuda/common/segment.h"
#include "nms.h"

namespace d2net::cuda {
namespace {

// Not in the kernel: nvcc takes a function of the host there, even for a constant.
template <typename T>
constexpr T kFar = std::numeric_limits<T>::max();

constexpr int64_t kMaxBlock = 1024;
constexpr int kLanes = 32;
constexpr int kGone = -1;  // a score below any min_score

// In scratch memory or shared memory.
template <typename T>
struct alignas(2 * sizeof(T)) Row {
  T start, end, score;
  int index;
  __device__ __forceinline__ Segment<T> segment() const { return {start, end}; }
};

template <typename T>
struct Best {
  T score;
  int index;
};

// Higher score, then lower index.
template <typename T>
__device__ __forceinline__ bool better(Best<T> a, Best<T> b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// The highest scores of a tile or a warp.
template <typename T>
struct Top {
  Best<T> best;
  int row;   // where it is
  T second;  // no other has a higher score
};

// A segment that a warp offers, and one that the block took.
template <typename T>
struct Offer {
  Segment<T> segment;
  Top<T> top;
};
template <typename T>
struct Taken {
  Segment<T> segment;
  int row;
};

template <typename T>
struct Decay {
  T threshold, sigma, min_score;
  bool gaussian;
};

template <typename T>
__device__ __forceinline__ T decayed(T score, Segment<T> taken, Segment<T> other, Decay<T> rule) {
  const T intersection = overlap(taken, other);
  if (!(intersection > 0)) return score;
  const T union_length = taken.length() + other.length() - intersection;
  const T iou = union_length > 0 ? intersection / union_length : T(0);  // inf - inf: endless segments have IoU 0
  if (rule.gaussian) return score * exp(-(iou * iou) / rule.sigma);
  return iou >= rule.threshold ? score * (1 - iou) : score;
}

// The lanes of a warp agree.
template <typename T>
__device__ __forceinline__ Top<T> top_of_warp(Top<T> own) {
  Best<T> best = own.best;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Best<T> other = {__shfl_xor_sync(kAllLanes, best.score, step), __shfl_xor_sync(kAllLanes, best.index, step)};
    if (better(other, best)) best = other;
  }
  const bool mine = own.best.index == best.index;  // of all lanes where there is none
  const int owner = __ffs(int(__ballot_sync(kAllLanes, mine))) - 1;
  return {best, __shfl_sync(kAllLanes, own.row, owner), warp_reduce(mine ? own.second : own.best.score, Max())};
}

// The order in which neighbours are in one tile; removed rows come last.
template <typename T>
__device__ __forceinline__ bool comes_before(const Row<T>& a, const Row<T>& b) {
  const auto octave = [](const Row<T>& row) {
    return row.score < 0 ? 1 << 30 : __float_as_int(float(row.end - row.start)) >> 23;
  };
  const int octave_a = octave(a), octave_b = octave(b);
  return octave_a != octave_b ? octave_a < octave_b : a.start < b.start;
}

// Bitonic sort whose comparisons all put the lesser row first, so that n need be no power of two.
template <typename T>
__device__ __forceinline__ void sort(Row<T>* rows, unsigned n) {
  const auto compare = [&](unsigned i, unsigned other) {
    if (other <= i || other >= n || !comes_before(rows[other], rows[i])) return;
    const Row<T> row = rows[i];
    rows[i] = rows[other];
    rows[other] = row;
  };
  for (unsigned run = 1; run < n; run *= 2) {
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) compare(i, i ^ (2 * run - 1));
    __syncthreads();
    for (unsigned step = run / 2; step > 0; step /= 2) {
      for (unsigned i = threadIdx.x; i < n; i += blockDim.x) compare(i, i ^ step);
      __syncthreads();
    }
  }
}

// By the warp of the tile begin … end - 1.
template <typename T>
__device__ __forceinline__ Top<T> top_of_tile(const Row<T>* rows, int begin, int end, int n) {
  Top<T> own = {{kGone, n}, n, kGone};
  for (int i = begin + threadIdx.x % kLanes; i < end; i += kLanes) {
    const Best<T> row = {rows[i].score, rows[i].index};
    if (row.score < 0) continue;
    if (better(row, own.best)) {
      own = {row, i, own.best.score};
    } else {
      own.second = max(own.second, row.score);
    }
  }
  return top_of_warp(own);
}

// Decays the rows of a tile for those of `taken` whose bit is set in `which`. True if one of its two highest scores may
// have fallen.
template <typename T>
__device__ __forceinline__ bool decay_tile(Row<T>* rows, int begin, int end, const Taken<T>* taken, unsigned which,
                                           Decay<T> rule, T second) {
  bool fallen = false;
  for (int i = begin + threadIdx.x % kLanes; i < end; i += kLanes) {
    const T old = rows[i].score;
    T now = old;
    for (unsigned left = which; left != 0 && now >= rule.min_score; left &= left - 1) {
      const Taken<T>& one = taken[__ffs(int(left)) - 1];
      now = i == one.row ? T(kGone) : decayed(now, one.segment, rows[i].segment(), rule);
    }
    if (now == old) continue;
    rows[i].score = now >= rule.min_score ? now : T(kGone);  // NaN is removed too, which infinity * 0 is
    fallen |= old >= second;
  }
  return __any_sync(kAllLanes, fallen);
}

// By one warp, a lane for each offer: which of them come next, and how many.
template <typename T>
__device__ __forceinline__ int take(const Offer<T>* offers, int warps, int n, Decay<T> rule, Taken<T>* taken,
                                    int64_t* keep, T* new_scores) {
  const int lane = threadIdx.x % kLanes;
  Offer<T> own = {{0, 0}, {{kGone, n}, n, kGone}};
  if (lane < warps) own = offers[lane];
  const Top<T> first = top_of_warp(Top<T>{own.top.best, lane, own.top.second});
  if (first.best.index == n) return 0;
  const T others = warp_reduce(own.top.second, Max());
  const bool certain = own.top.best.index == first.best.index || own.top.best.score > others;
  int rank = 0;
  bool decays = false;  // by one that comes before
  for (unsigned left = __ballot_sync(kAllLanes, certain); left != 0; left &= left - 1) {
    const Offer<T>& other = offers[__ffs(int(left)) - 1];
    if (!certain || !better(other.top.best, own.top.best)) continue;
    ++rank;
    decays |= decayed(own.top.best.score, other.segment, own.segment, rule) != own.top.best.score;
  }
  const int end = warp_reduce(decays ? rank : kLanes, Min());
  const bool mine = certain && rank < end;
  if (mine) {
    taken[rank] = {own.segment, own.top.row};
    keep[rank] = own.top.best.index;
    new_scores[rank] = own.top.best.score;
  }
  return __popc(__ballot_sync(kAllLanes, mine));
}

// `rows`: scratch where shared memory is too small, else null. A multiple of 32 rows is a tile; there are at most 32
// for each warp, and lane l of warp w knows tile l * warps + w.
template <typename T>
__global__ void __launch_bounds__(kMaxBlock)
    soft_nms_kernel(const T* __restrict__ segments, const T* __restrict__ scores, int n, int tile_rows, Decay<T> rule,
                    Row<T>* rows, int64_t* keep, T* new_scores, int64_t* result) {
  D2NET_DYNAMIC_SHARED(Row<T>, in_shared);
  D2NET_SHARED(Offer<T>, offers, [kLanes]);
  D2NET_SHARED(Taken<T>, taken, [kLanes]);
  D2NET_SHARED(int, taken_now, );
  if (rows == nullptr) rows = in_shared;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;

  int bad = n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const Segment<T> s = segment_at(segments, i);
    if (is_bad(s, scores[i])) bad = min(bad, i);
    rows[i] = {s.start, s.end, scores[i] >= rule.min_score ? scores[i] : T(kGone), i};
  }
  bad = block_reduce(bad, Min());
  if (threadIdx.x == 0) result[1] = bad < n ? bad : -1;
  if (bad < n) return;
  sort(rows, unsigned(n));

  // Of the lane's tile: the interval that its rows cover, and its highest scores.
  T from = kFar<T>, to = -kFar<T>;
  Top<T> top = {{kGone, n}, n, kGone};
  const auto begin_of = [&](int of_lane) { return (of_lane * warps + warp) * tile_rows; };
  const auto end_of = [&](int of_lane) { return begin_of(of_lane) + min(tile_rows, n - begin_of(of_lane)); };
  for (int l = 0; l < kLanes && begin_of(l) < n; ++l) {
    T first = kFar<T>, last = -kFar<T>;
    for (int i = begin_of(l) + lane; i < end_of(l); i += kLanes) {
      if (rows[i].score < 0) continue;
      first = min(first, rows[i].start);
      last = max(last, rows[i].end);
    }
    first = warp_reduce(first, Min());
    last = warp_reduce(last, Max());
    const Top<T> found = top_of_tile(rows, begin_of(l), end_of(l), n);
    if (l == lane) {
      from = first;
      to = last;
      top = found;
    }
  }

  bool changed = true;  // what this warp offers
  for (int64_t count = 0;;) {
    if (changed) {
      const Top<T> offered = top_of_warp(top);
      if (lane == 0) {
        offers[warp] = {offered.row < n ? rows[offered.row].segment() : Segment<T>{0, 0}, offered};
      }
    }
    __syncthreads();
    if (warp == 0) {
      const int now = take(offers, warps, n, rule, taken, keep + count, new_scores + count);
      if (lane == 0) taken_now = now;
    }
    __syncthreads();
    const int now = taken_now;
    if (now == 0) {
      if (threadIdx.x == 0) result[0] = count;
      return;
    }
    count += now;

    unsigned which = 0;
    for (int k = 0; k < now; ++k) {
      const Taken<T> one = taken[k];
      const bool inside = one.row >= begin_of(lane) && one.row < end_of(lane);
      if (inside || (one.segment.start < to && one.segment.end > from)) which |= 1u << k;
    }
    changed = false;
    for (unsigned tiles = __ballot_sync(kAllLanes, which != 0); tiles != 0; tiles &= tiles - 1) {
      const int l = __ffs(int(tiles)) - 1;
      const unsigned of_tile = __shfl_sync(kAllLanes, which, l);
      const T second = __shfl_sync(kAllLanes, top.second, l);
      if (!decay_tile(rows, begin_of(l), end_of(l), taken, of_tile, rule, second)) continue;
      __syncwarp();
      const Top<T> found = top_of_tile(rows, begin_of(l), end_of(l), n);
      if (l == lane) top = found;
      changed = true;
    }
  }
}

}  // namespace

template <typename T>
void soft_nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, double sigma, double min_score,
                 bool gaussian, T* scratch, int64_t* keep, T* new_scores, int64_t* result, int device, void* stream) {
  const Stream on("soft_nms_1d", device, stream);
  static_assert(sizeof(Row<T>) == 4 * sizeof(T));
  const int64_t shared_bytes = n * int64_t(sizeof(Row<T>));
  const bool fits = shared_bytes + 4096 <= on.shared_memory_limit();  // with the arrays of fixed size
  const int64_t threads = std::min((n + 31) / 32 * 32, kMaxBlock);
  const int64_t tile_rows = (n + kMaxBlock * kLanes - 1) / (kMaxBlock * kLanes) * kLanes;
  on.launch(soft_nms_kernel<T>, 1, threads, fits ? shared_bytes : 0, segments, scores, int(n), int(tile_rows),
            Decay<T>{T(iou_threshold), T(sigma), T(min_score), gaussian},
            fits ? nullptr : reinterpret_cast<Row<T>*>(scratch), keep, new_scores, result);
}

#define D2NET_INSTANTIATE(T)                                                                                          \
  template void soft_nms_1d<T>(const T*, const T*, int64_t, double, double, double, bool, T*, int64_t*, T*, int64_t*, \
                               int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda
