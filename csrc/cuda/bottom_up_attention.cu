// Bytes: every row of x before its length is read once, and 8 bytes a row written. The rest: cuda/common/bottom_up.h.
#include "bottom_up_attention.h"
#include "cuda/common/bottom_up.h"

namespace d2net::cuda {
namespace {

// A block takes 32 snippets of one recording (blockIdx.x).
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kScoreThreads, 2) bottom_up(const BottomUpAttention<T> x, int64_t groups) {
  const int64_t t = x.t, d = x.d;
  const int lane = threadIdx.x % 32;
  const int64_t recording = blockIdx.x / groups;
  const int64_t first = blockIdx.x % groups * kScoreBlockRows + threadIdx.x / 32 * kScoreRows;
  const int64_t length = x.rows.length(x.lengths, recording, t), written = x.rows.written(x.lengths, recording, t);
  if (first >= written) return;  // whole warps; no barrier of the block follows
  const int rows = int(max(min(length - first, int64_t(kScoreRows)), int64_t(0)));
  const int64_t first_row = x.rows.first(recording, t) + first, to = first_row + lane;
  const Angle<A> mine = angles_of<N>(x.x + first_row * d, x.x_ref, rows, d);
  if (lane >= kScoreRows || first + lane >= written) return;
  x.attention[to] = A(0.5) * (1 - mine.cosine);
  x.norms[to] = mine.norm;
}

}  // namespace

template <typename T>
void bottom_up_attention(const BottomUpAttention<T>& x, int device, void* stream) {
  if (x.b == 0 || x.t == 0) return;
  const Stream on("bottom_up_attention", device, stream);
  const int64_t groups = (x.t + kScoreBlockRows - 1) / kScoreBlockRows;
  on.launch(fits_packs(x.d, x.x, x.x_ref) ? bottom_up<T, kPackOf<T>> : bottom_up<T, 1>, x.b * groups, kScoreThreads, 0,
            x, groups);
}

D2NET_INSTANTIATE_CUDA_HALF(bottom_up_attention, BottomUpAttention)

}  // namespace d2net::cuda
