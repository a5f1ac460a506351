// Forward: attention and scores are read once, one block a recording, and three numbers a recording come out. Backward:
// scores are read once and the gradient written once; a block has 256 runs of 16 bytes. Accesses are 16 bytes wide
// where rows are aligned; a thread has the same snippets in either case, so alignment changes no result.
#include <cmath>

#include "cuda/common/block.h"
#include "math/svd2x2.h"
#include "snippet_pdmi.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;

// Neighbouring snippets of one thread.
template <typename T>
struct alignas(16) Run {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Run<T>) == 0;
}

// row[begin], ...; 0 from `end` on. wide: the row is aligned.
template <typename T>
__device__ __forceinline__ Run<T> load(const T* row, int64_t begin, int64_t end, bool wide) {
  if (wide && begin + Run<T>::kSize <= end) return *reinterpret_cast<const Run<T>*>(row + begin);
  Run<T> run;
#pragma unroll
  for (int k = 0; k < Run<T>::kSize; ++k) run.x[k] = begin + k < end ? row[begin + k] : T(0);
  return run;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) snippet_pdmi_kernel(const SnippetPdmi<T> x) {
  const T fg_threshold = T(x.fg_threshold), bg_threshold = T(x.bg_threshold);
  const int64_t i = blockIdx.x, length = x.rows.length(x.lengths, i, x.t), first = x.rows.first(i, x.t);
  const T *row = x.attention + first, *row_scores = x.scores + first;
  const bool wide = is_aligned(row) && is_aligned(row_scores);
  int64_t count_fg = 0, count_bg = 0;
  double sum_fg = 0, sum_bg = 0;
  for (int64_t k = threadIdx.x * Run<T>::kSize; k < length; k += kThreads * Run<T>::kSize) {
    const Run<T> a = load(row, k, length, wide), s = load(row_scores, k, length, wide);
#pragma unroll
    for (int j = 0; j < Run<T>::kSize; ++j) {
      const bool inside = k + j < length, fg = inside && s.x[j] > fg_threshold, bg = inside && s.x[j] < bg_threshold;
      count_fg += fg;
      count_bg += bg;
      sum_fg += fg ? double(a.x[j]) : 0.0;
      sum_bg += bg ? double(a.x[j]) : 0.0;
    }
  }
  count_fg = block_reduce(count_fg, Sum{});
  count_bg = block_reduce(count_bg, Sum{});
  sum_fg = block_reduce(sum_fg, Sum{});
  sum_bg = block_reduce(sum_bg, Sum{});
  if (threadIdx.x > 0) return;
  x.valid[i] = count_fg > 0 && count_bg > 0;
  if (!x.valid[i]) {
    x.loss[i] = x.side_grad[2 * i] = x.side_grad[2 * i + 1] = 0;
    return;
  }
  const double n_fg = double(count_fg), n_bg = double(count_bg);
  const double fg = 1 / (x.per_class ? n_fg : n_fg + n_bg), bg = 1 / (x.per_class ? n_bg : n_fg + n_bg);
  // Rows: lambda and 1 - lambda; columns: pseudo-foreground and pseudo-background.
  const Condition2x2 u = clamped_condition_2x2(sum_fg * fg, sum_bg * bg, (n_fg - sum_fg) * fg, (n_bg - sum_bg) * bg,
                                               x.entry_floor, x.rank_tol);
  x.loss[i] = T(log1p(u.excess));
  x.side_grad[2 * i] = T((u.da - u.dc) * fg);
  x.side_grad[2 * i + 1] = T((u.db - u.dd) * bg);
}

// blocks: of each recording.
template <typename T>
__global__ void __launch_bounds__(kThreads) snippet_pdmi_backward_kernel(const SnippetPdmi<T> x, unsigned blocks) {
  const T fg_threshold = T(x.fg_threshold), bg_threshold = T(x.bg_threshold);
  const int64_t i = blockIdx.x / blocks;
  const int64_t k = (int64_t(blockIdx.x % blocks) * kThreads + threadIdx.x) * Run<T>::kSize;
  const int64_t length = x.rows.length(x.lengths, i, x.t), written = x.rows.written(x.lengths, i, x.t);
  if (k >= written) return;
  const T* row = x.scores + x.rows.first(i, x.t);
  T* out = x.grad_attention + x.rows.first(i, x.t);
  const Run<T> s = load(row, k, length, is_aligned(row));
  const T fg = x.grad_loss[i] * x.side_grad[2 * i], bg = x.grad_loss[i] * x.side_grad[2 * i + 1];
  Run<T> result;
#pragma unroll
  for (int j = 0; j < Run<T>::kSize; ++j) {
    const bool inside = k + j < length;
    result.x[j] = (inside && s.x[j] > fg_threshold ? fg : T(0)) + (inside && s.x[j] < bg_threshold ? bg : T(0));
  }
  if (is_aligned(out) && k + Run<T>::kSize <= written) {
    *reinterpret_cast<Run<T>*>(out + k) = result;
    return;
  }
#pragma unroll
  for (int j = 0; j < Run<T>::kSize; ++j) {
    if (k + j < written) out[k + j] = result.x[j];
  }
}

}  // namespace

template <typename T>
void snippet_pdmi(const SnippetPdmi<T>& x, int device, void* stream) {
  const Stream on("snippet_pdmi", device, stream);
  on.launch(snippet_pdmi_kernel<T>, x.b, kThreads, 0, x);
}

template <typename T>
void snippet_pdmi_backward(const SnippetPdmi<T>& x, int device, void* stream) {
  const Stream on("snippet_pdmi_backward", device, stream);
  const int64_t run = kThreads * Run<T>::kSize, blocks = (x.t + run - 1) / run;
  on.launch(snippet_pdmi_backward_kernel<T>, x.b * blocks, kThreads, 0, x, unsigned(blocks));
}

D2NET_INSTANTIATE_CUDA(snippet_pdmi, SnippetPdmi)
D2NET_INSTANTIATE_CUDA(snippet_pdmi_backward, SnippetPdmi)

}  // namespace d2net::cuda
