// One block finds the proposals of one column (one class of one recording); copy_proposals then moves those of all
// columns together.
//
// The first of the lowest snippets of a component (a maximal run above a threshold) represents it: no two components
// share one. So a thread finds, for each of its snippets t, whether t represents a component, its start and end, and
// the snippet that represents the next larger one. These are nearest snippets of a lower level (the number of
// thresholds that a snippet exceeds), which a tree of minima finds in O(log snippets).
//
// Memory: a column is read once by the threads that compare it with the thresholds and once by the warp that sums it;
// as it strides over the classes, a snippet costs 32 bytes, shared by up to 8 neighbouring classes through the L2
// cache. All else happens in 32 bytes (float; 36 double) a snippet of shared memory or, for recordings too long for
// that (about 7000 snippets on sm_90), in as much scratch memory for each of a few blocks a multiprocessor. What is
// found goes to 12 (16) bytes a snippet of every column, of which only those that hold proposals are touched.
#include <algorithm>

#include "cuda/common/block.h"
#include "cuda/common/device.h"
#include "cuda/common/device_algorithms.h"
#include "cuda/common/min_tree.h"
#include "math/contrast.h"
#include "proposals.h"

namespace d2net::cuda {
namespace {

constexpr int32_t kNone = -1;

// More threads wait longer at barriers, which pays off only for long recordings.
constexpr int kShort = 1024, kShortThreads = 256, kLongThreads = 512;

// The state of a component in NMS.
enum State : int32_t { kGone, kUndecided, kJustKept, kKept };

// The memory of one column. start, end, parent and score are of the component that a snippet represents; start is kNone
// where there is none, parent where none is larger.
template <typename T>
struct Workspace {
  double* prefix;  // prefix[t]: sum of the first t values
  T* score;
  int32_t *start, *end, *parent;
  int32_t* tree;
  // In memory that is no longer used by then:
  int32_t *state, *mark;  // of NMS, in place of the tree
  int32_t* order;         // of those kept, in place of the prefix sums

  static int64_t bytes(int64_t snippets) {
    const int64_t snippet_bytes = snippets * (sizeof(double) + sizeof(T) + 3 * sizeof(int32_t));
    const int64_t all = snippet_bytes + sizeof(double) + MinTree::size(snippets) * sizeof(int32_t);
    return (all + 15) / 16 * 16;
  }

  __device__ Workspace(void* memory, int64_t snippets) {
    prefix = static_cast<double*>(memory);
    score = reinterpret_cast<T*>(prefix + snippets + 1);
    start = reinterpret_cast<int32_t*>(score + snippets);
    end = start + snippets;
    parent = end + snippets;
    tree = parent + snippets;
    state = tree;
    mark = tree + snippets;
    order = static_cast<int32_t*>(memory);
  }

  __device__ double length(int32_t i) const { return double(end[i] - start[i]); }

  __device__ bool better(int32_t i, int32_t j) const {
    if (score[i] != score[j]) return score[i] > score[j];
    return start[i] != start[j] ? start[i] < start[j] : end[i] < end[j];
  }
};

template <typename X>
struct Task {
  const X* activations;
  int64_t batch, snippets, width, by_recording, by_snippet, by_class;
  const bool* classes;
  const int64_t* lengths;
  const Computed<X>* thresholds;
  int64_t n_thresholds, min_length;
  double inflation;
  bool mean_of_sides;
  double min_contrast, nms_iou;
  int32_t *starts, *ends;
  Computed<X>* scores;
  int64_t* counts;             // (batch * width), zero
  unsigned long long* taken;   // how many columns beyond the first of each block, zero
  unsigned long long* errors;  // zero
};

// How many of the rising thresholds x lies above; none if it is NaN.
template <typename T>
__device__ int32_t level_of(T x, const T* thresholds, int64_t count) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (thresholds[middle] < x) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return int32_t(low);
}

// One warp. The additions are in the order of the CPU, one after another, as another order could change the last bit:
// every lane adds all values and keeps the sum up to its own. False when they are NaN or Inf, or so large that a
// difference or sum of prefix sums could overflow.
template <typename X>
__device__ bool sum_up(const X* x, int64_t stride, int32_t n, double* prefix) {
  using T = Computed<X>;
  const int32_t lane = threadIdx.x % 32;
  const auto at = [&](int32_t t) { return t < n ? T(to_float(x[t * stride])) : T(0); };
  double sum = 0, magnitude = 0;
  if (lane == 0) prefix[0] = 0;
  T next = at(lane);
  for (int32_t first = 0; first < n; first += 32) {
    const T value = next;
    next = at(first + 32 + lane);
    double own = 0;
#pragma unroll
    for (int32_t i = 0; i < 32; ++i) {
      const double term = double(__shfl_sync(kAllLanes, value, i));
      sum += term;
      magnitude += fabs(term);
      if (i == lane) own = sum;
    }
    if (first + lane < n) prefix[first + lane + 1] = own;
  }
  return magnitude <= 1.7976931348623157e308 / 4;
}

// The components, from the tree of levels and the prefix sums.
template <typename X>
__device__ void find_components(const Task<X>& task, const Workspace<Computed<X>>& work, const MinTree& tree,
                                int32_t n) {
  for (int32_t t = threadIdx.x; t < n; t += blockDim.x) {
    work.start[t] = kNone;
    const int32_t level = tree[t + 1];
    if (level == 0) continue;
    const int32_t left = tree.last_at_most(t + 1, level);
    if (tree[left] == level) continue;  // the snippet at `left`, or one before it, represents the component
    const int32_t right = tree.next_at_most(t + 1, level - 1);
    const int32_t start = left, end = right - 1;  // a leaf is the one after its snippet
    if (end - start < task.min_length) continue;
    work.start[t] = start;
    work.end[t] = end;
    work.score[t] = Computed<X>(math::contrast(work.prefix, start, end, n, task.inflation, task.mean_of_sides));
    // The next larger one reaches over the higher neighbour, and its lowest snippets are on that level.
    const int32_t outside = max(tree[left], tree[right]);
    if (outside == 0) {
      work.parent[t] = kNone;
    } else if (tree[left] < outside) {
      work.parent[t] = right - 1;
    } else {
      work.parent[t] = tree.next_at_most(tree.last_at_most(left, outside - 1), outside) - 1;
    }
  }
}

// Greedy NMS in rounds. Components are nested or disjoint, and the IoU of nested ones is the ratio of their lengths, so
// all collisions are found on the way from an inner one to its ancestors. A round keeps those that no better undecided
// one collides with; in the next they suppress the others. Each round decides at least the best one left.
template <typename T>
__device__ void suppress(const Workspace<T>& work, int32_t n, double nms_iou) {
  constexpr int32_t kSuppressed = 2147483647;  // marks: this, or the last round in which a better one was there
  for (int32_t round = 1;; ++round) {
    for (int32_t t = threadIdx.x; t < n; t += blockDim.x) {
      const int32_t state = work.state[t];
      if (state != kUndecided && state != kJustKept) continue;
      const double length = work.length(t);
      int32_t own = 0;
      for (int32_t i = work.parent[t]; i != kNone && length / work.length(i) >= nms_iou; i = work.parent[i]) {
        const int32_t other = work.state[i];
        if (state == kUndecided && (other == kJustKept || other == kKept)) {
          own = kSuppressed;
          break;
        }
        if (other != kUndecided) continue;
        if (state == kJustKept) {
          atomicMax(&work.mark[i], kSuppressed);
        } else if (work.better(t, i)) {
          atomicMax(&work.mark[i], round);
        } else {
          own = round;
        }
      }
      if (own > 0) atomicMax(&work.mark[t], own);
    }
    __syncthreads();
    bool undecided = false;
    for (int32_t t = threadIdx.x; t < n; t += blockDim.x) {
      const int32_t state = work.state[t];
      if (state == kJustKept) work.state[t] = kKept;
      if (state != kUndecided) continue;
      const int32_t mark = work.mark[t];
      if (mark == round) {
        undecided = true;
      } else {
        work.state[t] = mark == kSuppressed ? kGone : kJustKept;
      }
    }
    if (!__syncthreads_or(undecided)) return;
  }
}

// A bitonic sort, in the form where each comparison moves the better one to the front, so that count need be no power
// of two: the missing ones would be worse than all and never move.
template <typename T>
__device__ void sort_kept(const Workspace<T>& work, int32_t count) {
  for (int32_t size = 2; size < 2 * count; size *= 2) {
    for (int32_t step = size / 2; step > 0; step /= 2) {
      const int32_t turned = step == size / 2 ? size - 1 : step;
      for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
        const int32_t j = i ^ turned;
        if (j < i || j >= count) continue;
        const int32_t first = work.order[i], second = work.order[j];
        if (work.better(second, first)) {
          work.order[i] = second;
          work.order[j] = first;
        }
      }
      __syncthreads();
    }
  }
}

template <typename X>
__device__ void find_in_column(const Task<X>& task, const Workspace<Computed<X>>& work, int64_t column) {
  using T = Computed<X>;
  D2NET_SHARED(int32_t, usable, );
  D2NET_SHARED(int32_t, n_kept, );
  const int64_t recording = column / task.width, label = column % task.width;
  const int32_t n =
      int32_t(task.lengths ? max(int64_t(0), min(task.lengths[recording], task.snippets)) : task.snippets);
  const X* x = task.activations + recording * task.by_recording + label * task.by_class;

  const MinTree levels{work.tree, n + 2};
  if (threadIdx.x < 32) {  // the sum is sequential: one warp
    const bool sound = sum_up(x, task.by_snippet, n, work.prefix);
    if (threadIdx.x == 0) usable = sound;
  } else {
    for (int32_t leaf = threadIdx.x - 32; leaf < n + 2; leaf += blockDim.x - 32) {
      const bool inside = leaf > 0 && leaf <= n;
      work.tree[leaf] =
          inside ? level_of(T(to_float(x[(leaf - 1) * task.by_snippet])), task.thresholds, task.n_thresholds) : 0;
    }
  }
  levels.build();
  if (!usable) {
    if (threadIdx.x == 0) atomicOr(task.errors, kUnusable);
    return;
  }
  find_components(task, work, levels, n);
  __syncthreads();

  const T least = T(task.min_contrast);
  for (int32_t t = threadIdx.x; t < n; t += blockDim.x) {
    work.state[t] = work.start[t] != kNone && work.score[t] >= least ? kUndecided : kGone;
    work.mark[t] = 0;
  }
  if (threadIdx.x == 0) n_kept = 0;
  __syncthreads();
  suppress(work, n, task.nms_iou);

  for (int32_t t = threadIdx.x; t < n; t += blockDim.x) {
    if (work.state[t] != kGone) work.order[atomicAdd(&n_kept, 1)] = t;
  }
  __syncthreads();
  sort_kept(work, n_kept);  // whatever order the threads came in
  for (int32_t i = threadIdx.x; i < n_kept; i += blockDim.x) {
    const int64_t place = column * task.snippets + i;
    task.starts[place] = work.start[work.order[i]];
    task.ends[place] = work.end[work.order[i]];
    task.scores[place] = work.score[work.order[i]];
  }
  if (threadIdx.x == 0) task.counts[column] = n_kept;
}

// Few columns are of classes that are kept. So each block begins with one column, and then takes the next one that is
// kept. workspaces: null where a workspace fits in shared memory.
template <typename X>
__global__ void __launch_bounds__(kLongThreads, 1)
    find_kernel(const Task<X> task, unsigned char* workspaces, int64_t workspace_bytes) {
  D2NET_DYNAMIC_SHARED(unsigned char, shared_workspace);
  D2NET_SHARED(int64_t, next, );
  if (task.lengths) {
    for (int64_t b = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; b < task.batch; b += gridDim.x * blockDim.x) {
      if (task.lengths[b] < 0 || task.lengths[b] > task.snippets) atomicOr(task.errors, kBadLength);
    }
  }
  const Workspace<Computed<X>> work(workspaces ? workspaces + blockIdx.x * workspace_bytes : shared_workspace,
                                    task.snippets);
  const int64_t columns = task.batch * task.width;
  for (int64_t column = blockIdx.x; column < columns; column = next) {
    if (task.classes[column]) find_in_column(task, work, column);
    __syncthreads();
    if (threadIdx.x == 0) {
      do {
        next = int64_t(gridDim.x) + int64_t(atomicAdd(task.taken, 1));
      } while (next < columns && !task.classes[next]);
    }
    __syncthreads();
  }
}

// One warp for each column.
template <typename T>
__global__ void copy_kernel(const int32_t* starts, const int32_t* ends, const T* scores, const int64_t* offsets,
                            int64_t columns, int64_t snippets, int64_t width, int64_t count, int64_t* places,
                            T* sorted_scores) {
  const int64_t column = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
  if (column >= columns) return;
  const int64_t first = offsets[column], n = offsets[column + 1] - first;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
    int64_t* place = places + first + i;
    place[0] = column / width;
    place[count] = column % width;
    place[2 * count] = starts[column * snippets + i];
    place[3 * count] = ends[column * snippets + i];
    sorted_scores[first + i] = scores[column * snippets + i];
  }
}

// How the launch and its scratch memory are laid out.
struct Plan {
  bool in_shared;
  int64_t blocks, workspace_bytes, scan_bytes, workspaces_at, scan_at, bytes;

  template <typename T>
  static Plan of(const Stream& on, int64_t columns, int64_t snippets) {
    Plan plan;
    plan.workspace_bytes = Workspace<T>::bytes(snippets);
    plan.in_shared = plan.workspace_bytes <= on.shared_memory_limit() - 256;  // leaves room for single variables
    const int64_t most = on.multiprocessors() * (plan.in_shared ? 8 : 2);
    plan.blocks = std::max<int64_t>(1, std::min(columns, most));  // at least one, which checks the lengths
    plan.scan_bytes = exclusive_sum_scratch_bytes<int64_t>(on, columns + 1);
    plan.workspaces_at = (columns + 2) * int64_t(sizeof(int64_t)) / 16 * 16 + 16;  // after the counts and `taken`
    plan.scan_at = plan.workspaces_at + (plan.in_shared ? 0 : plan.blocks * plan.workspace_bytes);
    plan.bytes = plan.scan_at + plan.scan_bytes;
    return plan;
  }
};

}  // namespace

template <typename X>
int64_t find_proposals_scratch_bytes(int64_t batch, int64_t snippets, int64_t width, int device, void* stream) {
  return Plan::of<Computed<X>>(Stream("extract_proposals", device, stream), batch * width, snippets).bytes;
}

template <typename X>
void find_proposals(const X* activations, int64_t batch, int64_t snippets, int64_t width, int64_t by_recording,
                    int64_t by_snippet, int64_t by_class, const bool* classes, const int64_t* lengths,
                    const Computed<X>* thresholds, int64_t n_thresholds, int64_t min_length, double inflation,
                    bool mean_of_sides, double min_contrast, double nms_iou, int32_t* starts, int32_t* ends,
                    Computed<X>* scores, int64_t* offsets, void* scratch, int device, void* stream) {
  const Stream on("extract_proposals", device, stream);
  const int64_t columns = batch * width;
  const Plan plan = Plan::of<Computed<X>>(on, columns, snippets);
  auto* const memory = static_cast<unsigned char*>(scratch);
  auto* const counts = static_cast<int64_t*>(scratch);
  auto* const taken = reinterpret_cast<unsigned long long*>(counts + columns + 1);
  auto* const errors = reinterpret_cast<unsigned long long*>(offsets + columns + 1);
  on.fill(counts, 0, columns + 2);
  on.fill(errors, 0, 1);
  const Task<X> task{activations, batch,         snippets,     width,      by_recording, by_snippet,
                     by_class,    classes,       lengths,      thresholds, n_thresholds, min_length,
                     inflation,   mean_of_sides, min_contrast, nms_iou,    starts,       ends,
                     scores,      counts,        taken,        errors};
  on.launch(find_kernel<X>, plan.blocks, snippets <= kShort ? kShortThreads : kLongThreads,
            plan.in_shared ? plan.workspace_bytes : 0, task, plan.in_shared ? nullptr : memory + plan.workspaces_at,
            plan.workspace_bytes);
  exclusive_sum(on, memory + plan.scan_at, plan.scan_bytes, counts, offsets, columns + 1);
}

template <typename T>
void copy_proposals(const int32_t* starts, const int32_t* ends, const T* scores, const int64_t* offsets, int64_t batch,
                    int64_t snippets, int64_t width, int64_t count, int64_t* places, T* sorted_scores, int device,
                    void* stream) {
  const Stream on("extract_proposals", device, stream);
  constexpr int64_t kThreads = 256;
  on.launch(copy_kernel<T>, (batch * width * 32 + kThreads - 1) / kThreads, kThreads, 0, starts, ends, scores, offsets,
            batch * width, snippets, width, count, places, sorted_scores);
}

#define D2NET_INSTANTIATE(X)                                                                                          \
  template int64_t find_proposals_scratch_bytes<X>(int64_t, int64_t, int64_t, int, void*);                            \
  template void find_proposals<X>(const X*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const bool*,        \
                                  const int64_t*, const Computed<X>*, int64_t, int64_t, double, bool, double, double, \
                                  int32_t*, int32_t*, Computed<X>*, int64_t*, void*, int, void*);
D2NET_INSTANTIATE(float16)
D2NET_INSTANTIATE(bfloat16)
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE
template void copy_proposals<float>(const int32_t*, const int32_t*, const float*, const int64_t*, int64_t, int64_t,
                                    int64_t, int64_t, int64_t*, float*, int, void*);
template void copy_proposals<double>(const int32_t*, const int32_t*, const double*, const int64_t*, int64_t, int64_t,
                                     int64_t, int64_t, int64_t*, double*, int, void*);

}  // namespace d2net::cuda
