// Launches, forward: pool_columns (TCAM), pool_over_time (Eq. 2), compare (Eq. 3, 4 and x_ref), and score (Eq. 8 and
// 9). Backward: the gradients of what is not (b, t, ...), then one pass over time. What is left to the next launch is a
// few thousand numbers in L2; what needs all of a recording, or all of the batch, is done by the block that ends last.
//
// The condition number of U_2 (Eq. 10) takes one block longer than all that follows pool_columns: it runs beside it.
#include <algorithm>
#include <limits>
#include <optional>

#include "attention_pool.h"
#include "cuda/common/bottom_up.h"
#include "cuda/common/joint.h"
#include "cuda/common/pool_columns.h"
#include "cuda/common/pool_over_time.h"
#include "loss.h"
#include "math/focal.h"
#include "math/peaks.h"
#include "math/svd2x2.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = kScoreThreads;
constexpr int kColumns = 4;                  // of a thread, of gradients of x_fg and x_bg
constexpr int64_t kSharedJoint = 32 * 1024;  // bytes that a block has on every chip, beside its static ones

template <typename A>
struct Scratch {
  A* partial;         // see PoolOverTime
  double* sums;       // (b, groups, 4): what Eq. 9 adds up, of 32 snippets
  int64_t* lowest;    // (b)
  unsigned* arrived;  // blocks: of each tile of PoolOverTime, of each recording, of all
  int64_t n_arrived;
  A *p, *y;  // (c, b), (b, c): the factors of U_2
  double* joint;
  A *grad_pooled, *grad_x, *terms, *of_snippets;  // (b, c), (2, b, d), (b, 2, 2) of PoolGradient, (b, 2)

  Scratch(Pieces& pieces, int64_t b, int64_t t, int64_t c, int64_t d) {
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
    pieces.take(of_snippets, 2 * b);
  }
};

// What every kernel gets.
template <typename X>
struct Task : Loss<X> {
  using A = accumulator_t<X>;
  LossWorkspace<X> w;
  Scratch<A> s;
  Pairs pairs;
  int64_t groups;  // of a recording's snippets, of kScoreBlockRows
  bool has_video;

  explicit Task(const Loss<X>& x) : Task(x, Pieces(x.scratch, x.scratch_bytes)) {}
  Task(const Loss<X>& x, Pieces pieces)
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

// ---- which recordings count

// The TCAM for pool_columns; the lengths are those of recordings that count, and go to `counted`.
template <typename A>
struct Tcam : Plain<A> {
  const A* __restrict__ labels;
  int64_t c;
  double min_snippets;
  bool skip_unlabelled;
  int64_t* counted;
  unsigned* arrived;  // n_arrived counters to be set to 0 for the launches that follow
  int64_t n_arrived;

  __device__ __forceinline__ int64_t length(const int64_t* lengths, int64_t recording, int64_t t, bool first) const {
    if (blockIdx.x == 0) {
      for (int64_t i = threadIdx.x; i < n_arrived; i += blockDim.x) arrived[i] = 0;
    }
    bool counts = double(lengths == nullptr ? t : lengths[recording]) >= min_snippets;
    if (skip_unlabelled) {
      bool any = false;
      for (int64_t k = threadIdx.x; k < c; k += blockDim.x) any = any || labels[recording * c + k] > A(0);
      counts = __syncthreads_or(any) && counts;
    }
    const int64_t length = counts ? math::clamped_length(lengths, recording, t) : 0;
    if (first && threadIdx.x == 0) counted[recording] = length;
    return length;
  }
};

// ---- Eq. 1

template <typename T>
__device__ __forceinline__ double or_zero(const T* x) {
  return x == nullptr ? 0 : double(*x);
}

// A term of weight 0 is off, whatever it is: NaN * 0 would be NaN.
__device__ __forceinline__ double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

// How many of flags[0 ... n) are above 0, of all threads. Flag: of recordings that count, bool or int64_t.
template <typename Flag>
__device__ __forceinline__ double block_count(const Flag* flags, int64_t n) {
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) count += flags[i] > 0;
  return double(block_reduce(count, Sum{}));
}

// By each of the `enders`, the blocks that nothing but each other comes after, when it is done.
template <typename X>
__device__ __forceinline__ void add_up(const Task<X>& x, unsigned enders) {
  using A = accumulator_t<X>;
  if (!is_last_block(x.arrived_of_all(), enders)) return;
  const double video = x.has_video ? double(*x.video) : 0;
  double sums[4] = {};  // of the terms of Eq. 4 and 9, and how many there are
  for (int64_t i = threadIdx.x; i < x.b; i += blockDim.x) {
    const bool counts = x.with.classify != 0 && x.counted[i] > 0, compares = x.with.snippet != 0 && x.w.comparable[i];
    sums[0] += counts ? double(x.w.terms[i]) : 0.0;
    sums[1] += counts ? 1.0 : 0.0;
    sums[2] += compares ? double(x.w.snippets[i]) : 0.0;
    sums[3] += compares ? 1.0 : 0.0;
  }
  block_reduce(sums, Sum{});
  if (threadIdx.x > 0) return;
  const double discriminative = sums[0] / max(sums[1], 1.0), snippet = sums[2] / max(sums[3], 1.0);
  *x.discriminative = A(discriminative);
  *x.snippet = A(snippet);
  *x.video = A(video);
  *x.total = A(discriminative + weighted(x.with.alpha_snippet, snippet) + weighted(x.with.alpha_video, video));
}

// ---- Eq. 3 and 4, x_ref

// Keys and numbers of recordings as one number each, in the order of cycles: the key, NaN last, then the number.
__device__ __forceinline__ unsigned long long place_of(const float* keys, int64_t i) {
  const unsigned key = unsigned(math::ordered_key(keys[i])) ^ 0x80000000u;
  return (unsigned long long)(key) << 32 | unsigned(i);
}

// Draws the partners of recording i: warp `kind` those of that kind. Ends with a barrier.
template <typename X>
__device__ __forceinline__ void draw_partners(const Task<X>& x, int64_t i) {
  const int64_t b = x.b;
  const int kind = threadIdx.x / 32;
  if (kind < 3) {
    const float* keys = x.keys + kind * b;
    const bool* takes_part = x.valid + (kind == 1 ? 0 : b);  // in the cycle; of w_fb all do
    const unsigned long long mine = place_of(keys, i), none = ~0ull;
    unsigned long long next = none, first = none;  // the first of all comes after the last
    for (int64_t j = threadIdx.x % 32; j < b; j += 32) {
      if (kind > 0 && !takes_part[j]) continue;
      const unsigned long long place = place_of(keys, j);
      first = min(first, place);
      if (place > mine) next = min(next, place);
    }
    next = warp_reduce(next, Min{});
    first = warp_reduce(first, Min{});
    const bool has_one = kind == 0 || takes_part[i];
    if (threadIdx.x % 32 == 0) {
      x.w.partner[kind * b + i] = has_one ? int64_t(unsigned(next == none ? first : next)) : -1;
    }
  }
  __syncthreads();
}

// The weights of recording i by all threads: w_fb, w_fg and w_bg of Eq. 3, and their derivatives by the cosines.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void separate(const Task<X>& x, int64_t i, double (&weight)[3], double (&slope)[3]) {
  const int64_t b = x.b, d = x.d;
  if (x.keys != nullptr) draw_partners(x, i);
  Pair pair[3];
  double sums[11] = {};  // the squares of x_fg and x_bg; and for each pair u v, and the squares of u and of v
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) pair[kind] = x.pairs.of(kind, i);
  for (int64_t k = threadIdx.x; k < d; k += kThreads) {
    const double fg = double(x.x_fg()[i * d + k]), bg = double(x.x_bg()[i * d + k]);
    sums[0] += fg * fg;
    sums[1] += bg * bg;
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      if (pair[kind].x < 0) continue;  // the same for all threads
      const double u = double(x.x[pair[kind].x * d + k]), v = double(x.x[pair[kind].other * d + k]);
      sums[2 + 3 * kind] += u * v;
      sums[3 + 3 * kind] += u * u;
      sums[4 + 3 * kind] += v * v;
    }
  }
  block_reduce(sums, Sum{});
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) {
    double w = 0;
    if (pair[kind].x >= 0) {
      w = sums[2 + 3 * kind] * inverse_norm(sums[3 + 3 * kind]) * inverse_norm(sums[4 + 3 * kind]);
      weight[kind] = kind > 0 ? x.with.gamma * (1 - w) : w < 0 ? 0 : w;
      slope[kind] = kind > 0 ? -x.with.gamma : w < 0 ? 0 : 1;
    }
    if (threadIdx.x == 0) x.w.saved[(kCosine + kind) * b + i] = A(w);
  }
  if (threadIdx.x == 0) {
    x.w.saved[kInverseNorm * b + i] = A(inverse_norm(sums[0]));
    x.w.saved[(kInverseNorm + 1) * b + i] = A(inverse_norm(sums[1]));
  }
}

// Eq. 4 of recording i, by all threads.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void classify(const Task<X>& x, int64_t i) {
  const int64_t b = x.b, c = x.c;
  double weight[3] = {}, slope[3] = {};
  if (x.with.separate != 0) separate(x, i, weight, slope);
  const A of_positive = A(weight[1] + weight[0]), of_negative = A(weight[2] + weight[0]);
  const double scale = x.with.mean_over_classes != 0 ? 1.0 / c : 1.0;
  double sums[3] = {};  // of the loss, and of its slopes by the weights of positive and of negative classes
  for (int64_t k = i * c + threadIdx.x; k < (i + 1) * c; k += kThreads) {
    A gradient = 0;
    if (x.counted[i] > 0) {
      const bool positive = x.labels[k] > A(0);
      const Focal<A> term = focal(x.pooled[k], positive, positive ? of_positive : of_negative, A(x.with.beta),
                                  A(x.with.probability_floor));
      const double by = x.with.balanced != 0 && positive ? scale * c : scale;
      sums[0] += by * term.loss;
      sums[1] += positive ? by * term.to_weight : 0;
      sums[2] += positive ? 0 : by * term.to_weight;
      gradient = A(by * term.to_score);
    }
    x.w.to_pooled[k] = gradient;
  }
  block_reduce(sums, Sum{});
  if (threadIdx.x > 0) return;
  x.w.terms[i] = A(sums[0]);
  if (x.with.separate == 0) return;
  x.w.saved[(kToCosine + 0) * b + i] = A(slope[0] * (sums[1] + sums[2]));
  x.w.saved[(kToCosine + 1) * b + i] = A(slope[1] * sums[1]);
  x.w.saved[(kToCosine + 2) * b + i] = A(slope[2] * sums[2]);
}

// Element k of x_ref, by one thread.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void update_x_ref(const Task<X>& x, int64_t k) {
  const int64_t b = x.b, t = x.t, d = x.d;
  const bool lowest = x.with.lowest_attention != 0;
  const bool* valid = x.valid + b;
  double sum = 0;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = 0; i < b; ++i) {
    double value = x.x_bg()[i * d + k];  // read before `valid` is known, so that no load waits for another
    if (lowest) value = valid[i] ? double(to_float(x.embeddings[(i * t + x.s.lowest[i]) * d + k])) : 0;
    sum += valid[i] ? value : 0;
    count += valid[i];
  }
  x.new_x_ref[k] = count > 0 ? A(x.with.momentum * x.x_ref[k] + (1 - x.with.momentum) / count * sum) : x.x_ref[k];
}

// `compared` blocks have a recording each, the others 256 elements of x_ref. enders: 0 where another launch follows.
template <typename X>
__global__ void __launch_bounds__(kThreads, 1) compare_kernel(const Task<X> x, unsigned compared, unsigned enders) {
  if (blockIdx.x < compared) {
    classify(x, blockIdx.x);
  } else {
    const int64_t k = int64_t(blockIdx.x - compared) * kThreads + threadIdx.x;
    if (x.with.update != 0 && k < x.d) update_x_ref(x, k);
  }
  if (enders > 0) add_up(x, enders);
}

// ---- Eq. 8 to 10

// By `lanes` neighbouring lanes of a warp. All lanes of the warp must call; those without a row with c = 0.
template <int lanes, typename A>
__device__ __forceinline__ Peaks<A> row_peaks(const A* row, int64_t c, A floor, A share) {
  Peaks<A> peaks(floor, share);
  if (share < A(0)) return peaks;
  for (int64_t k = threadIdx.x % lanes; k < c; k += lanes) peaks.compare(row[k]);
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
    peaks.best = max(peaks.best, __shfl_xor_sync(kAllLanes, peaks.best, step));
  }
  for (int64_t k = threadIdx.x % lanes; k < c; k += lanes) peaks.add(row[k]);
  peaks.sum = group_sum<lanes>(peaks.sum);
  return peaks;
}

// The factors of U_2, p (c, b) and y (b, c), and log(sigma_1 / sigma_r), by one block. memory: as JointLayout says.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void agree(const Task<X>& x, double tolerance, double* memory, A* p, A* y) {
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
__global__ void __launch_bounds__(512, 1) agree_kernel(const Task<X> x, double tolerance, unsigned enders) {
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
__device__ __forceinline__ void condition(const Task<X>& x, int64_t i, double n_f, double f_sum, double n_b,
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
__global__ void __launch_bounds__(kThreads, 2) score_kernel(const Task<X> x, unsigned enders) {
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
      for (int64_t g = threadIdx.x; g < x.groups; g += kThreads) sums[k] += of_recording[4 * g + k];
    }
    block_reduce(sums, Sum{});
    if (threadIdx.x == 0) condition(x, recording, sums[0], sums[1], sums[2], sums[3]);
  }
  add_up(x, enders);
}

// ---- backward

// What the gradient of a row takes from a pair that it is in: `other` times the pair's other row, `own` times itself.
struct Hit {
  int64_t row;  // the other row; -1: not in the pair
  Share share;
};

// Candidate j of 6 b: the row as x (j / b even) or as x~ (odd) of pair j % b of kind j / 2b. grad: of every term that
// counts.
template <typename X>
__device__ __forceinline__ Hit candidate(const Task<X>& x, int64_t j, int64_t row, double grad) {
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
__device__ __forceinline__ void gradient_of_embedding(const Task<X>& x, int64_t r, double grad) {
  D2NET_SHARED(Hit, hits, [kThreads]);
  const int64_t b = x.b, d = x.d;
  const A* row = x.x + r * d;
  A* out = x.s.grad_x + r * d;
  double dot = 0;
  for (int64_t tile = threadIdx.x; tile - threadIdx.x < d; tile += kThreads * kColumns) {
    double sum[kColumns] = {}, own = 0;
    for (int64_t first = 0; first < 6 * b; first += kThreads) {
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
          const int64_t k = tile + n * kThreads;
          if (k < d) sum[n] += hits[hit].share.other * x.x[hits[hit].row * d + k];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int64_t k = tile + n * kThreads;
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
__device__ __forceinline__ void gradient_of_scores(const Task<X>& x, int64_t i, A grad, A grad_video, bool video) {
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
__global__ void __launch_bounds__(kThreads, 1) gradients_kernel(const Task<X> x, bool embed, bool video, bool snippet) {
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
  Task<X> x;
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
int64_t loss_scratch_bytes(int64_t b, int64_t t, int64_t c, int64_t d, int, void*) {
  Pieces pieces(nullptr, std::numeric_limits<int64_t>::max());
  Scratch<accumulator_t<X>>(pieces, b, t, c, d);
  return pieces.used();
}

template <typename X>
void loss(const Loss<X>& arguments, int device, void* stream) {
  using A = accumulator_t<X>;
  const Stream on("d2net_loss", device, stream);
  const Task<X> x(arguments);
  const LossSettings& with = x.with;
  const int64_t b = x.b, t = x.t, c = x.c, d = x.d;
  if (b == 0) {
    on.fill(x.total, 0, 1);
    on.fill(x.discriminative, 0, 1);
    on.fill(x.snippet, 0, 1);
    on.fill(x.video, 0, 1);
    if (with.update != 0) on.copy(x.new_x_ref, x.x_ref, d);
    return;
  }
  const Tcam<A> tcam{{x.tcam},    x.labels,     c, with.min_snippets, with.skip_unlabelled != 0, x.counted,
                     x.s.arrived, x.s.n_arrived};
  const int64_t divisor = int64_t(with.topk_divisor);
  const TopkPool<A> pool{x.tcam, x.lengths, b, t, c, divisor, x.attention, x.w.peak, x.pooled, x.w.kth, x.w.last};
  pool_columns(on, tcam, pool);
  const bool score = with.score != 0, compare = with.classify != 0 || with.update != 0 || !(score || x.has_video);
  const int64_t compared = with.classify != 0 ? b : 0, updated = with.update != 0 ? (d + kThreads - 1) / kThreads : 0;
  const int64_t comparing = compare ? std::max<int64_t>(1, compared + updated) : 0, scoring = score ? b * x.groups : 0;
  const unsigned enders = unsigned((with.snippet != 0 ? b : score ? scoring : comparing) + x.has_video);

  std::optional<Beside> beside;
  if (x.has_video) {
    const double tolerance = orthogonality<A>(std::min(b, c));
    const int64_t bytes = JointLayout(c, b).total * int64_t(sizeof(double)) + 2 * b * c * int64_t(sizeof(A));
    const bool shares = bytes <= on.shared_memory_limit() - 2048;  // some is taken by what blocks reduce
    beside.emplace(on);
    beside->second().launch(shares ? agree_kernel<X, true> : agree_kernel<X, false>, 1, joint_threads(c, b),
                            shares ? bytes : 0, x, tolerance, enders);
  }
  if (with.embed != 0) {
    pool_over_time(on, PoolOverTime<X>{x.embeddings, x.attention, x.counted, b, t, d, A(with.threshold),
                                       A(with.background_threshold), with.mean_embeddings != 0, x.s.partial,
                                       x.s.arrived, x.x, x.x + b * d, x.valid, x.valid + b, x.w.weights,
                                       with.lowest_attention != 0 ? x.s.lowest : nullptr});
  }
  on.launch(compare_kernel<X>, comparing, kThreads, 0, x, unsigned(compared), score ? 0u : enders);
  const bool packs = fits_packs(d, x.embeddings) && fits_packs(d, x.latest_x_ref());
  on.launch(packs ? score_kernel<X, kPackOf<X>> : score_kernel<X, 1>, scoring, kThreads, 0, x, enders);
  if (beside) beside->join();
}

template <typename X>
void loss_backward(const Loss<X>& arguments, int device, void* stream) {
  using A = accumulator_t<X>;
  const Stream on("d2net_loss_backward", device, stream);
  const Task<X> x(arguments);
  const LossSettings& with = x.with;
  const bool embed = with.embed != 0 && with.separate != 0;
  // A term that nothing asks for is left out, for its gradient may be NaN.
  const bool video = x.has_video && (x.of_video != nullptr || with.alpha_video != 0);
  const bool snippet = with.snippet != 0 && (x.of_snippet != nullptr || with.alpha_snippet != 0);
  on.launch(gradients_kernel<X>, embed ? 2 * x.b : x.b, kThreads, 0, x, embed, video, snippet);
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

D2NET_INSTANTIATE_CUDA_HALF(loss, Loss)
D2NET_INSTANTIATE_CUDA_HALF(loss_backward, Loss)
template int64_t loss_scratch_bytes<float>(int64_t, int64_t, int64_t, int64_t, int, void*);
template int64_t loss_scratch_bytes<double>(int64_t, int64_t, int64_t, int64_t, int, void*);
template int64_t loss_scratch_bytes<float16>(int64_t, int64_t, int64_t, int64_t, int, void*);
template int64_t loss_scratch_bytes<bfloat16>(int64_t, int64_t, int64_t, int64_t, int, void*);

}  // namespace d2net::cuda
