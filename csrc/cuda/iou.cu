// Bytes: the n * m results, each written once; the segments come from the caches. A thread keeps one segment of b and
// goes through 8 segments of a, so a warp writes neighbouring results, and an index needs no division.
#include "cuda/common/device.h"
#include "iou.h"
#include "math/interval.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256, kRows = 8;  // of a thread

template <typename T>
__global__ void __launch_bounds__(kThreads) iou_kernel(const T* __restrict__ a, int64_t n, const T* __restrict__ b,
                                                       int64_t m, int64_t tiles, T* __restrict__ iou) {
  const int64_t column = blockIdx.x % tiles * blockDim.x + threadIdx.x;
  if (column >= m) return;
  const Interval<T> mine = interval_of(b[2 * column], b[2 * column + 1]);
  const int64_t first = (blockIdx.x / tiles * blockDim.y + threadIdx.y) * kRows;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i;
    if (row >= n) return;
    iou[row * m + column] = iou_of(interval_of(a[2 * row], a[2 * row + 1]), mine);
  }
}

}  // namespace

template <typename T>
void iou_1d(const Iou<T>& x, int device, void* stream) {
  const Stream on("iou_1d", device, stream);
  int64_t width = kThreads;  // with few columns a block takes more rows
  while (width > 32 && width / 2 >= x.m) width /= 2;
  const int64_t height = kThreads / width, rows = height * kRows;
  // One dimension: the others end at 65535 blocks, which either number of segments may need more of.
  const int64_t tiles = (x.m + width - 1) / width;
  on.launch(iou_kernel<T>, (x.n + rows - 1) / rows * tiles, {width, height}, 0, x.a, x.n, x.b, x.m, tiles, x.iou);
}

D2NET_INSTANTIATE_CUDA(iou_1d, Iou)

}  // namespace d2net::cuda
