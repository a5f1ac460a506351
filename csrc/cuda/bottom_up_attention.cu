// Bytes: every row of x before its length is read once, and 8 bytes a row written. The rest: cuda/bottom_up.h.
#include "bottom_up_attention.h"
#include "cuda/bottom_up.h"

namespace d2net::cuda {
namespace {

// A block takes 32 snippets of one recording (blockIdx.x).
template <typename T, int N, typename A = accumulator_t<T>>
__global__ void __launch_bounds__(kScoreThreads, 2)
    bottom_up(const T* __restrict__ x, const A* __restrict__ reference, const int64_t* __restrict__ lengths,
              int64_t groups, int64_t t, int64_t d, A* __restrict__ attention, A* __restrict__ norms) {
  const int lane = threadIdx.x % 32;
  const int64_t recording = blockIdx.x / groups;
  const int64_t first = blockIdx.x % groups * kScoreBlockRows + threadIdx.x / 32 * kScoreRows;
  if (first >= t) return;  // whole warps; no barrier of the block follows
  const int64_t length = lengths == nullptr ? t : min(lengths[recording], t);
  const int rows = int(max(min(length - first, int64_t(kScoreRows)), int64_t(0)));
  const Angle<A> mine = angles_of<N>(x + (recording * t + first) * d, reference, rows, d);
  if (lane >= kScoreRows || first + lane >= t) return;
  const int64_t to = recording * t + first + lane;
  attention[to] = A(0.5) * (1 - mine.cosine);
  norms[to] = mine.norm;
}

}  // namespace

template <typename T>
void bottom_up_attention(const T* x, const accumulator_t<T>* reference, const int64_t* lengths, int64_t b, int64_t t,
                         int64_t d, accumulator_t<T>* attention, accumulator_t<T>* norms, int device, void* stream) {
  if (b == 0 || t == 0) return;
  const Stream on("bottom_up_attention", device, stream);
  const int64_t groups = (t + kScoreBlockRows - 1) / kScoreBlockRows;
  on.launch(fits_packs(d, x, reference) ? bottom_up<T, kPackOf<T>> : bottom_up<T, 1>, b * groups, kScoreThreads, 0, x,
            reference, lengths, groups, t, d, attention, norms);
}

#define INSTANTIATE(T)                                                                                               \
  template void bottom_up_attention<T>(const T*, const accumulator_t<T>*, const int64_t*, int64_t, int64_t, int64_t, \
                                       accumulator_t<T>*, accumulator_t<T>*, int, void*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(float16)
INSTANTIATE(bfloat16)
#undef INSTANTIATE

}  // namespace d2net::cuda
