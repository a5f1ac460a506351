// What the threads of a warp or of a block compute together. All threads of the warp or block must call, blocks are
// one-dimensional, and block sizes are multiples of 32. Every combination has a fixed order, so results are the same in
// every run, and every thread gets the result.
#pragma once

#include "cuda/common/device.h"

namespace d2net::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // of floating numbers: NaN loses against a number
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return max(a, b);
  }
};
struct Min {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return min(a, b);
  }
};

// combine must be associative up to rounding and commutative: the lanes then agree bit by bit.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Of these there are instructions.
__device__ __forceinline__ int warp_reduce(int value, Sum) { return __reduce_add_sync(kAllLanes, value); }
__device__ __forceinline__ int warp_reduce(int value, Min) { return __reduce_min_sync(kAllLanes, value); }
__device__ __forceinline__ int warp_reduce(int value, Max) { return __reduce_max_sync(kAllLanes, value); }
#endif

// Costs two barriers; may be called again at once.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine) {
  D2NET_SHARED(T, of_warp, [32]);
  value = warp_reduce(value, combine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warp[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = combine(value, of_warp[warp]);
  __syncthreads();
  return value;
}

// The same for several values of each thread, at the price of one.
template <typename T, int n, typename Combine>
__device__ __forceinline__ void block_reduce(T (&values)[n], Combine combine) {
  D2NET_SHARED(T, of_warp, [n][32]);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values[i] = warp_reduce(values[i], combine);
    if (threadIdx.x % 32 == 0) of_warp[i][threadIdx.x / 32] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values[i] = of_warp[i][0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) values[i] = combine(values[i], of_warp[i][warp]);
  }
  __syncthreads();
}

// The sum of the lanes below.
template <typename T>
__device__ __forceinline__ T warp_exclusive_sum(T value) {
  T sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, sum, step);
    if (int(threadIdx.x % 32) >= step) sum += below;
  }
  const T before = __shfl_up_sync(kAllLanes, sum, 1);
  return threadIdx.x % 32 == 0 ? T(0) : before;
}

// The sum of the threads below; `total` becomes that of all. Costs two barriers; may be called again at once.
template <typename T>
__device__ __forceinline__ T block_exclusive_sum(T value, T* total) {
  D2NET_SHARED(T, of_warp, [32]);
  const T in_warp = warp_exclusive_sum(value);
  if (threadIdx.x % 32 == 31) of_warp[threadIdx.x / 32] = in_warp + value;
  __syncthreads();
  T before = 0, sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    if (warp == threadIdx.x / 32) before = sum;
    sum += of_warp[warp];
  }
  __syncthreads();
  *total = sum;
  return before + in_warp;
}

// Whether this block is the last of `blocks` to come here, all of which count in *arrived, 0 at first. It sees what the
// others wrote before: memory that is not const and __restrict__, which may be read from a cache that does not know.
__device__ __forceinline__ bool is_last_block(unsigned* arrived, unsigned blocks) {
  D2NET_SHARED(bool, is_last, );
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(arrived, 1u) + 1 == blocks;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace d2net::cuda
