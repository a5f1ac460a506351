// Greedy NMS of few segments in one launch of one block: everything between the inputs and the results lies in shared
// memory.
//
// A stable sort by falling score gives every segment a rank: warps sort runs of 32, then runs are merged two by two,
// each key finding its place in the other run by binary search. 32 ranks are a tile. Tiles are decided one after the
// other, each by the warp that holds it, a barrier a tile. The decision is short: what collides within a tile was found
// beforehand by all warps at once, what collides with the kept of earlier tiles by the tile's warp. Warps that do not
// decide test their tiles against the kept so far, in batches of 16, so that little is left to test when a tile's turn
// comes. What is suppressed is not tested again.
//
// A matrix of all collisions would test suppressed segments as well, nearly all of dense detections; windows of
// positions, as in nms.cu, would need a second sort. Segments without collisions need n^2 / 2 tests, which limits n; so
// a test divides only for the few pairs near the threshold (Rule).
//
// Estimates for an H100; whole calls were measured (nms.h). A test is 9 instructions a warp of 32 (counted in the
// machine code), four warps issue one a cycle. 2048 segments: sort 13,000 cycles, collisions within tiles 7,000, 64
// tiles in turn 400 each, tests 32,000 where one in seven is kept (60,000 cycles in all, as some of it overlaps: 35 us)
// and 180,000 where all are (200,000 cycles: 110 us). 1000 segments, one in seven kept: 26,000 cycles; 200: 7,000.
// Barriers: 4 + the merges + one a tile, 73 for 2048 segments.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/common/block.h"
#include "cuda/common/nms_rules.h"
#include "nms.h"

namespace d2net::cuda {
namespace {

constexpr int kTile = 32, kBatch = 16, kMaxBlock = 1024;
constexpr double kTooSmall = 1e-30;  // near the smallest numbers of T, where products and quotients lose digits

template <typename T>
using Key = decltype(ordered_bits(T()));

// A segment that cannot collide is stored as a point, which overlaps nothing.
template <typename T>
struct alignas(16) Candidate {
  T start, end;
  T part;          // of its length, see Rule
  unsigned group;  // a hash

  __device__ __forceinline__ Segment<T> segment() const { return {start, end}; }
};

template <typename T>
struct Rule {
  T threshold, fraction;
  const int64_t* groups;  // null: one group

  // An IoU of t needs an overlap of t / (1 + t) of the sum of the lengths; fraction is less, by more than rounding.
  __device__ __forceinline__ Candidate<T> candidate(Segment<T> s, unsigned group) const {
    if (!can_collide(s, threshold)) return {s.start, s.start, 0, group};
    const T part = fraction * s.length();
    return {s.start, s.end, part >= T(kTooSmall) ? part : T(0), group};  // 0 for NaN, which 0 * infinity is
  }

  // True wherever they collide, and sometimes elsewhere; cheap.
  __device__ __forceinline__ bool may_collide(Candidate<T> a, Candidate<T> b) const {
    // "&": both sides cost less than a branch.
    return !(overlap(a.segment(), b.segment()) < a.part + b.part) & (a.group == b.group);
  }

  __device__ __forceinline__ bool collides(const Candidate<T>& a, int a_index, const Candidate<T>& b,
                                           int b_index) const {
    return collide(a.segment(), b.segment(), threshold) && (groups == nullptr || groups[a_index] == groups[b_index]);
  }
};

__device__ __forceinline__ unsigned group_hash(const int64_t* groups, int index) {
  if (groups == nullptr) return 0;
  const uint64_t group = uint64_t(groups[index]);
  return unsigned(group ^ group >> 32);
}

// Sorts 0 … n - 1 by falling score, equal scores by index, then 0 … padded - n - 1 more. Both arrays have room for two
// times padded, a multiple of 32; returns the half of `order` that holds the result, for all threads to read.
template <typename T>
__device__ __forceinline__ uint16_t* sort_by_score(const T* scores, int n, int padded, Key<T>* keys, uint16_t* order) {
  constexpr Key<T> kLast = ~Key<T>(1);  // after every score's, and not the largest, so that 1 can be added
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    const Key<T> key = i < n ? ~ordered_bits(scores[i]) : kLast;
    int place = 0;
#pragma unroll
    for (int other = 0; other < 32; ++other) {
      place += __shfl_sync(kAllLanes, key, other) < key + (other < lane);  // equal keys: the lower lane is first
    }
    keys[i - lane + place] = key;
    order[i - lane + place] = uint16_t(i);
  }
  __syncthreads();

  int from = 0;
#pragma unroll
  for (int width = 32; width < kNmsBlockLimit<T>; width *= 2) {
    if (width >= padded) break;
    const int to = padded - from;
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
      const Key<T> key = keys[from + i];
      const int own = i & -width, other = own ^ width, length = min(width, padded - other);
      const Key<T> bound = key + (own > other);  // the run on the left goes first where keys are equal
      const Key<T>* run = keys + from + other - 1;
      int below = 0;
#pragma unroll
      for (int step = width; step > 0; step /= 2) {
        if (below + step <= length && run[below + step] < bound) below += step;
      }
      const int place = min(own, other) + (i - own) + below;
      keys[to + place] = key;
      order[to + place] = order[from + i];
    }
    __syncthreads();
    from = to;
  }
  return order + from;
}

// Reads the candidates of a tile, and writes to `blocked` which of those that rank before it each collides with.
template <typename T>
__device__ __forceinline__ void prepare(const T* segments, Rule<T> rule, int ranks, const uint16_t* order,
                                        Candidate<T>* tile, unsigned* blocked) {
  const int lane = threadIdx.x % 32;
  Candidate<T> own = {0, 0, 0, 0};
  if (lane < ranks) own = rule.candidate(segment_at(segments, order[lane]), group_hash(rule.groups, order[lane]));
  tile[lane] = own;
  __syncwarp();
  unsigned near = 0;
#pragma unroll 8
  for (int other = 0; other < kTile; ++other) {
    if (rule.may_collide(own, tile[other])) near |= 1u << other;
  }
  near = lane < ranks ? near & ((1u << lane) - 1) : 0;
  unsigned by = lane < ranks ? 0 : 1u << lane;
  for (; near != 0; near &= near - 1) {
    const int other = __ffs(int(near)) - 1;
    if (rule.collides(own, order[lane], tile[other], order[other])) by |= 1u << other;
  }
  blocked[lane] = by;
}

// Whether a candidate collides with one of the kept begin … end - 1; begin is a multiple of 8.
template <typename T>
__device__ __forceinline__ bool collides_with_kept(const Candidate<T>& own, int index, const Candidate<T>* kept,
                                                   const uint16_t* kept_index, int begin, int end, Rule<T> rule) {
  for (int first = begin; first < end; first += 8) {  // past the end too: there are rows, and their bits are cleared
    unsigned near = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (rule.may_collide(own, kept[first + k])) near |= 1u << k;
    }
    for (near &= 0xffu >> max(8 - (end - first), 0); near != 0; near &= near - 1) {
      const int k = first + __ffs(int(near)) - 1;
      if (rule.collides(own, index, kept[k], kept_index[k])) return true;
    }
  }
  return false;
}

// Decides the candidates of a tile that do not collide with any of the `total` kept before. In each round those that no
// undecided one blocks are kept, and those that these block are suppressed. The first undecided one is never blocked,
// so a round decides at least one; a few rounds are usual. Returns the new total.
template <typename T>
__device__ __forceinline__ int decide(const Candidate<T>& own, int index, unsigned blocked, int total,
                                      Candidate<T>* kept, uint16_t* kept_index, int64_t* keep) {
  const unsigned self = 1u << threadIdx.x % 32;
  unsigned undecided = __ballot_sync(kAllLanes, (blocked & self) == 0), chosen = 0;
  while (undecided != 0) {
    const unsigned next = __ballot_sync(kAllLanes, (undecided & self) != 0 && (blocked & undecided) == 0);
    chosen |= next;
    undecided &= ~(next | __ballot_sync(kAllLanes, (blocked & next) != 0));
  }
  __syncwarp();  // all lanes have read the candidates that the kept overwrite
  if (chosen & self) {
    const int place = total + __popc(chosen & (self - 1));
    kept[place] = own;
    kept_index[place] = uint16_t(index);
    keep[place] = index;
  }
  return total + __popc(chosen);
}

template <typename T>
__global__ void __launch_bounds__(kMaxBlock, 1)
    nms_block_kernel(const T* __restrict__ segments, const T* __restrict__ scores, int n, Rule<T> rule, int64_t* keep,
                     int64_t* result) {
  D2NET_DYNAMIC_SHARED(Candidate<T>, candidates);  // by rank; those of decided tiles make room for the kept
  D2NET_SHARED(int, totals, [2]);                  // kept up to a tile and up to the next, in turn
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int tiles = (n + kTile - 1) / kTile, padded = tiles * kTile;

  int bad = n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (is_bad(segment_at(segments, i), scores[i])) bad = min(bad, i);
  }
  bad = block_reduce(bad, Min());
  if (threadIdx.x == 0) result[1] = bad < n ? bad : -1;
  if (bad < n) return;

  // The sort's keys lie where the candidates will be.
  static_assert(sizeof(Candidate<T>) >= 2 * sizeof(Key<T>));
  Key<T>* keys = reinterpret_cast<Key<T>*>(candidates);
  unsigned* blocked = reinterpret_cast<unsigned*>(candidates + padded);
  uint16_t* order = sort_by_score(scores, n, padded, keys, reinterpret_cast<uint16_t*>(blocked + padded));
  for (int first = warp * kTile; first < n; first += warps * kTile) {
    prepare(segments, rule, min(kTile, n - first), order + first, candidates + first, blocked + first);
  }

  int total = 0;   // kept in the tiles decided by now
  int tested = 0;  // of these, the ones that all undecided tiles have been tested against
  int first_own = warp;
  for (int next = 0; next < tiles; ++next) {
    const int batch_end = total / kBatch * kBatch;
    for (int tile = first_own; tile < tiles && (tile == next || batch_end > tested); tile += warps) {
      const int rank = tile * kTile + lane;
      const Candidate<T> own = candidates[rank];
      unsigned by = blocked[rank];
      const int end = tile == next ? total : batch_end;
      if ((by & 1u << lane) == 0 && collides_with_kept(own, order[rank], candidates, order, tested, end, rule)) {
        blocked[rank] = by |= 1u << lane;
      }
      if (tile == next) {
        const int new_total = decide(own, order[rank], by, total, candidates, order, keep);
        if (lane == 0) totals[next % 2] = new_total;
      }
    }
    tested = batch_end;
    if (first_own == next) first_own += warps;
    __syncthreads();
    total = totals[next % 2];
  }
  if (threadIdx.x == 0) result[0] = total;
}

}  // namespace

template <typename T>
void nms_1d_block(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold,
                  int64_t* keep, int64_t* result, int device, void* stream) {
  const Stream on(groups == nullptr ? "nms_1d" : "batched_nms_1d", device, stream);
  if (n > kNmsBlockLimit<T>) {
    throw std::runtime_error("nms_1d_block: at most " + std::to_string(kNmsBlockLimit<T>) + " segments, not " +
                             std::to_string(n));
  }
  const T threshold = T(iou_threshold);
  // With 0, the IoU of every pair that overlaps is computed.
  const double fraction = threshold < T(kTooSmall) ? 0 : double(threshold) / (1 + double(threshold)) * (1 - kSlack);
  const int64_t padded = (n + kTile - 1) / kTile * kTile;
  const int64_t rank_bytes = sizeof(Candidate<T>) + sizeof(unsigned) + 2 * sizeof(uint16_t);
  on.launch(nms_block_kernel<T>, 1, std::min<int64_t>(padded, kMaxBlock), padded * rank_bytes, segments, scores, int(n),
            Rule<T>{threshold, T(fraction), groups}, keep, result);
}

#define D2NET_INSTANTIATE(T) \
  template void nms_1d_block<T>(const T*, const T*, const int64_t*, int64_t, double, int64_t*, int64_t*, int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda
