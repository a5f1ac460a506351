// Launches: pool_columns (TCAM), pool_over_time (Eq. 2), discriminative_kernel (Eq. 3, 4 and x_ref) and score_kernel
// (Eq. 8 and 9). A launch leaves a few thousand numbers in L2 to the next one. What needs all of a recording, or all of
// the batch, is computed by the block that ends last.
//
// The condition number of U_2 (Eq. 10) takes one block longer than all launches that follow pool_columns: it runs
// beside them.
#include <algorithm>
#include <limits>
#include <optional>

#include "attention_pool.h"
#include "cuda/common/loss_denoising.h"
#include "cuda/common/loss_discriminative.h"
#include "cuda/common/pool_columns.h"
#include "cuda/common/pool_over_time.h"
#include "loss.h"

namespace d2net::cuda {
namespace {

// The TCAM for pool_columns, with lengths of 0 for recordings that do not count; writes these lengths to `counted`.
template <typename A>
struct Tcam : Plain<A> {
  const A* __restrict__ labels;
  int64_t c;
  double min_snippets;
  bool skip_unlabelled;
  int64_t* counted;
  unsigned* arrived;  // n_arrived counters, which it sets to 0 for the launches that follow
  int64_t n_arrived;

  __device__ __forceinline__ int64_t length(const TopkPool<A>& pool, int64_t recording, bool first) const {
    if (blockIdx.x == 0) {
      for (int64_t i = threadIdx.x; i < n_arrived; i += blockDim.x) arrived[i] = 0;
    }
    int64_t length = pool.rows.length(pool.lengths, recording, pool.t);
    bool counts = double(given_length(pool.rows, pool.lengths, recording, length)) >= min_snippets;
    if (skip_unlabelled) {
      bool any = false;
      for (int64_t k = threadIdx.x; k < c; k += blockDim.x) any = any || labels[recording * c + k] > A(0);
      counts = __syncthreads_or(any) && counts;
    }
    length = counts ? length : 0;
    if (first && threadIdx.x == 0) counted[recording] = length;
    return length;
  }
};

}  // namespace

template <typename X>
int64_t loss_scratch_bytes(int64_t b, int64_t t, int64_t c, int64_t d, int, void*) {
  Pieces pieces(nullptr, std::numeric_limits<int64_t>::max());
  LossScratch<accumulator_t<X>>(pieces, b, t, c, d);
  return pieces.used();
}

template <typename X>
void loss(const Loss<X>& arguments, int device, void* stream) {
  using A = accumulator_t<X>;
  const Stream on("d2net_loss", device, stream);
  const LossTask<X> x(arguments);
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
  TopkPool<A> pool{x.tcam, x.lengths, b, t, c, divisor, x.attention, x.w.argmax, x.pooled, x.w.kth, x.w.last};
  pool.rows = x.rows;
  pool_columns(on, tcam, pool);
  const bool score = with.score != 0,
             discriminative = with.classify != 0 || with.update != 0 || !(score || x.has_video);
  const int64_t term_blocks = with.classify != 0 ? b : 0,
                x_ref_blocks = with.update != 0 ? (d + kLossThreads - 1) / kLossThreads : 0;
  const int64_t discriminative_blocks = discriminative ? std::max<int64_t>(1, term_blocks + x_ref_blocks) : 0;
  const int64_t score_blocks = score ? b * x.groups : 0;
  const unsigned final_blocks = unsigned((with.snippet != 0 ? b
                                          : score           ? score_blocks
                                                            : discriminative_blocks) +
                                         x.has_video);

  std::optional<SideStream> side;
  if (x.has_video) {
    const double tolerance = orthogonality<A>(std::min(b, c));
    const int64_t bytes = JointLayout(c, b).total * int64_t(sizeof(double)) + 2 * b * c * int64_t(sizeof(A));
    const bool in_shared = bytes <= on.shared_memory_limit() - 2048;  // less what block_reduce uses
    side.emplace(on);
    side->stream().launch(in_shared ? video_kernel<A, true> : video_kernel<A, false>, 1, joint_threads(c, b),
                          in_shared ? bytes : 0, LossTask<A>(without_embeddings(arguments)), tolerance, final_blocks);
  }
  if (with.embed != 0) {
    pool_over_time(on, PoolOverTime<X>{x.embeddings, x.attention, x.counted, b, t, d, A(with.threshold),
                                       A(with.background_threshold), with.mean_embeddings != 0, x.s.partial,
                                       x.s.arrived, x.x, x.x + b * d, x.valid, x.valid + b, x.w.weights,
                                       with.lowest_attention != 0 ? x.s.lowest : nullptr, x.rows});
  }
  on.launch(discriminative_kernel<X>, discriminative_blocks, kLossThreads, 0, x, unsigned(term_blocks),
            score ? 0u : final_blocks);
  const bool packs = fits_packs(d, x.embeddings) && fits_packs(d, x.latest_x_ref());
  on.launch(packs ? score_kernel<X, kPackOf<X>> : score_kernel<X, 1>, score_blocks, kLossThreads, 0, x, final_blocks);
  if (side) side->join();
}

D2NET_INSTANTIATE_CUDA_HALF(loss, Loss)
template int64_t loss_scratch_bytes<float>(int64_t, int64_t, int64_t, int64_t, int, void*);
template int64_t loss_scratch_bytes<double>(int64_t, int64_t, int64_t, int64_t, int, void*);
template int64_t loss_scratch_bytes<float16>(int64_t, int64_t, int64_t, int64_t, int, void*);
template int64_t loss_scratch_bytes<bfloat16>(int64_t, int64_t, int64_t, int64_t, int, void*);

}  // namespace d2net::cuda
