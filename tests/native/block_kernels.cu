#include <algorithm>

#include "block_kernels.h"
#include "cuda/common/block.h"
#include "cuda/common/device.h"
#include "cuda/common/device_algorithms.h"

namespace d2net::cuda {
namespace {

const int kDevice = 0;
void* const kStream = nullptr;

__global__ void block_results_kernel(const int64_t* x, int64_t* sum, int64_t* max, int64_t* before) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  int64_t total;
  before[i] = block_exclusive_sum(x[i], &total);
  const int64_t most = block_reduce(x[i], Max());
  const int64_t again = block_reduce(x[i], Sum());
  int64_t both[2] = {x[i], -2 * x[i]};
  block_reduce(both, Sum());
  if (threadIdx.x == 0) {
    sum[blockIdx.x] = total == again && total == both[0] && total == both[1] / -2 ? total : -1;
    max[blockIdx.x] = most;
  }
}

__global__ void warp_results_kernel(const int* x, int by, unsigned* ballot, int* below, int* any, int* all) {
  const int i = int(threadIdx.x), lane = i % 32;
  ballot[i] = __ballot_sync(kAllLanes, x[i] > 0);
  below[i] = __shfl_up_sync(kAllLanes, x[i], by);
  any[i] = all[i] = 0;
  if (lane >= 16) {
    any[i] = __any_sync(0xffff0000u, x[i] > 0);
    all[i] = __all_sync(0xffff0000u, x[i] > 0);
    __syncwarp(0xffff0000u);
  } else {
    any[i] = __shfl_xor_sync(0x0000ffffu, x[i], 1);
  }
}

__global__ void histogram_kernel(const int* x, int64_t n, int bins, unsigned* counts, int* odd) {
  D2NET_DYNAMIC_SHARED(unsigned, local);
  for (int b = threadIdx.x; b < bins; b += blockDim.x) local[b] = 0;
  __syncthreads();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&local[x[i]], 1);
  const int here = __syncthreads_count(i < n && x[i] % 2 == 1);
  for (int b = threadIdx.x; b < bins; b += blockDim.x) atomicAdd(&counts[b], local[b]);
  if (threadIdx.x == 0) atomicAdd(odd, here);
}

template <typename T>
__global__ void convert_kernel(const T* x, int64_t n, float* y, T* back) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    y[i] = to_float(x[i]);
    back[i] = from_float<T>(y[i]);
  }
}

__global__ void round_kernel(const float* x, int64_t n, float16* y) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = from_float<float16>(x[i]);
}

__global__ void nothing_kernel() {}

}  // namespace

void block_results(const int64_t* x, int64_t blocks, int64_t threads, int64_t* sum, int64_t* max, int64_t* before) {
  Stream("block_results", kDevice, kStream).launch(block_results_kernel, blocks, threads, 0, x, sum, max, before);
}

void warp_results(const int* x, int64_t threads, int by, unsigned* ballot, int* below, int* any, int* all) {
  Stream("warp_results", kDevice, kStream).launch(warp_results_kernel, 1, threads, 0, x, by, ballot, below, any, all);
}

void histogram(const int* x, int64_t n, int bins, unsigned* counts, int* odd) {
  const Stream on("histogram", kDevice, kStream);
  on.fill(counts, 0, bins);
  on.fill(odd, 0, 1);
  on.launch(histogram_kernel, (n + 63) / 64, 64, bins * sizeof(unsigned), x, n, bins, counts, odd);
}

void convert(const float16* x, int64_t n, float* y, float16* back) {
  Stream("convert", kDevice, kStream).launch(convert_kernel<float16>, 2, 64, 0, x, n, y, back);
}

void convert(const bfloat16* x, int64_t n, float* y, bfloat16* back) {
  Stream("convert", kDevice, kStream).launch(convert_kernel<bfloat16>, 2, 64, 0, x, n, y, back);
}

void round_to_half(const float* x, int64_t n, float16* y) {
  Stream("round_to_half", kDevice, kStream).launch(round_kernel, (n + 255) / 256, 256, 0, x, n, y);
}

void algorithms(const uint64_t* keys, const int64_t* values, const uint8_t* keep, int64_t n, uint64_t* sorted_keys,
                int64_t* sorted_values, int64_t* selected, int64_t* count, int64_t* sums, void* scratch,
                int64_t scratch_bytes) {
  const Stream on("algorithms", kDevice, kStream);
  sort_pairs(on, scratch, scratch_bytes, keys, sorted_keys, values, sorted_values, n);
  select(on, scratch, scratch_bytes, values, keep, selected, count, n);
  exclusive_sum(on, scratch, scratch_bytes, values, sums, n);
}

int64_t algorithms_scratch_bytes(int64_t n) {
  const Stream on("algorithms", kDevice, kStream);
  return std::max({sort_pairs_scratch_bytes<uint64_t, int64_t>(on, n), select_scratch_bytes<int64_t>(on, n),
                   exclusive_sum_scratch_bytes<int64_t>(on, n)});
}

void launch_nothing(int64_t grid_x, int64_t grid_y, int64_t block, int64_t shared_bytes) {
  Stream("nothing", kDevice, kStream).launch(nothing_kernel, {grid_x, grid_y}, block, shared_bytes);
}

}  // namespace d2net::cuda
