#include "cuda/device.h"
#include "nms.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;

// One block per group. Rows are by falling score, so row i is final when the loop reaches it: if it is still alive it
// strikes out every later row that collides with it. All threads read the same alive[i], so they agree on the branch.
template <typename T>
__global__ void batched_nms_kernel(const T* __restrict__ segments, const int64_t* __restrict__ offsets, T threshold,
                                   uint8_t* alive) {
  const int64_t last = offsets[blockIdx.x + 1];
  for (int64_t i = offsets[blockIdx.x]; i < last; ++i) {
    if (!alive[i]) continue;
    const T start = segments[2 * i], end = segments[2 * i + 1];
    for (int64_t j = i + 1 + threadIdx.x; j < last; j += blockDim.x) {
      const T other_start = segments[2 * j], other_end = segments[2 * j + 1];
      const T shared = min(end, other_end) - max(start, other_start);
      if (shared > 0 && shared / ((end - start) + (other_end - other_start) - shared) >= threshold) alive[j] = 0;
    }
    __syncthreads();
  }
}

}  // namespace

template <typename T>
void batched_nms_1d(const T* segments, const int64_t* offsets, int64_t n, int64_t n_groups, double iou_threshold,
                    uint8_t* alive, int device, void* stream) {
  if (n == 0) return;
  const Stream on("batched_nms_1d", device, stream);
  on.launch(batched_nms_kernel<T>, n_groups, kThreads, 0, segments, offsets, T(iou_threshold), alive);
}

template void batched_nms_1d<float>(const float*, const int64_t*, int64_t, int64_t, double, uint8_t*, int, void*);
template void batched_nms_1d<double>(const double*, const int64_t*, int64_t, int64_t, double, uint8_t*, int, void*);

}  // namespace d2net::cuda
