// Kernels with one defect each, which test_native.py wants to see reported: ./broken NAME
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.h"

using d2net::cuda::Stream;

namespace {

constexpr int kThreads = 64;

// Sound: the next thread's number, through shared memory.
__global__ void correct(int* out) {
  D2NET_SHARED(int, values, [kThreads]);
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void missing_barrier(int* out) {
  D2NET_SHARED(int, values, [kThreads]);
  values[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

// A shuffle does not order memory.
__global__ void missing_syncwarp(int* out) {
  D2NET_SHARED(int, values, [kThreads]);
  values[threadIdx.x] = int(threadIdx.x);
  __shfl_sync(0xffffffffu, 0, 0);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void blocks_write_one_place(int* out) {
  __syncthreads();
  if (threadIdx.x == 0) out[0] = int(blockIdx.x);
}

__global__ void static_index(int* out) {
  D2NET_SHARED(int, values, [kThreads]);
  values[threadIdx.x] = 0;
  __syncthreads();
  int* v = values;
  out[threadIdx.x] = v[threadIdx.x + 1];
}

__global__ void dynamic_index(int* out) {
  D2NET_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void global_index(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void skipped_barrier(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void different_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void lane_left_out(int* out) {
  if (threadIdx.x % 32 < 31) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void lane_not_named(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void source_not_named(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

// Counts on zeros.
__global__ void not_initialised(int* out) {
  D2NET_SHARED(int, values, [kThreads]);
  values[threadIdx.x] += 1;
  out[threadIdx.x] = values[threadIdx.x];
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  std::vector<int> out(kThreads);
  const Stream on(arguments[1], 0, nullptr);
  auto launch = [&](void (*kernel)(int*), int64_t blocks = 1) {
    on.launch(kernel, blocks, kThreads, kThreads * sizeof(int), out.data());
  };
  try {
    if (name == "correct") launch(correct);
    if (name == "missing_barrier") launch(missing_barrier);
    if (name == "missing_syncwarp") launch(missing_syncwarp);
    if (name == "blocks_write_one_place") launch(blocks_write_one_place, 2);
    if (name == "static_index") launch(static_index);
    if (name == "dynamic_index") launch(dynamic_index);
    if (name == "global_index") launch(global_index);
    if (name == "skipped_barrier") launch(skipped_barrier);
    if (name == "different_barriers") launch(different_barriers);
    if (name == "lane_left_out") launch(lane_left_out);
    if (name == "lane_not_named") launch(lane_not_named);
    if (name == "source_not_named") launch(source_not_named);
    if (name == "not_initialised") launch(not_initialised);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    launch(correct);  // a failed launch leaves nothing behind
    return out[0] == 1 ? 3 : 4;
  }
  std::printf("%d\n", out[0]);
  return 0;
}
