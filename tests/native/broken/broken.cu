// Kernels with one defect each, which test_sanitizers.py wants to see reported: ./broken NAME [SEED]
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/common/device.h"

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

// Blocks 0 and 2 do, with a block between them that does not.
// The last block adds what all wrote, but no fence says that it sees it.
__global__ void missing_fence(int* out) {
  D2NET_SHARED(bool, is_last, );
  if (threadIdx.x == 0) {
    out[1 + blockIdx.x] = int(blockIdx.x);
    is_last = atomicAdd(out, 1) + 1 == int(gridDim.x);
  }
  __syncthreads();
  if (is_last && threadIdx.x == 1) out[3] = out[1] + out[2];
}

__global__ void distant_blocks_write_one_place(int* out) {
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x != 1) out[0] = int(blockIdx.x);
}

// A barrier orders the threads of its block, not those of two blocks.
__global__ void read_after_a_barrier(int* out) {
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = 1;
  __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x == 1) out[1] = out[0];
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

// Sound: a block waits for the one that took a ticket before it, which therefore runs.
__global__ void waits_for_an_earlier_block(int* out) {
  D2NET_SHARED(int, ticket, );
  if (threadIdx.x == 0) ticket = atomicAdd(out + kThreads - 1, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    while (d2net::simt::load_now(out) != ticket) {
    }
    atomicAdd(out, 1);
  }
}

// Not sound: block b waits for block b + 1, which perhaps cannot begin before b has ended.
__global__ void waits_for_a_later_block(int* out) {
  if (blockIdx.x + 1 < gridDim.x && threadIdx.x == 0) {
    while (d2net::simt::load_now(out) != int(gridDim.x - 1 - blockIdx.x)) {
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, 1);
}

// The holder of the lock waits for a lane that waits for the lock.
__global__ void lock_in_a_warp(int* out) {
  if (threadIdx.x > 1) return;
  while (atomicCAS(out, 0, 1) != 0) {
  }
  __syncwarp(3);
  atomicExch(out, 0);
}

// Counts on zeros.
__global__ void not_initialised(int* out) {
  D2NET_SHARED(int, values, [kThreads]);
  values[threadIdx.x] += 1;
  out[threadIdx.x] = values[threadIdx.x];
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = arguments[1];
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  d2net::simt::set_schedule(d2net::simt::kResidentBlocks, seed);
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
    if (name == "missing_fence") launch(missing_fence, 2);
    if (name == "distant_blocks_write_one_place") launch(distant_blocks_write_one_place, 3);
    if (name == "read_after_a_barrier") launch(read_after_a_barrier, 2);
    if (name == "static_index") launch(static_index);
    if (name == "dynamic_index") launch(dynamic_index);
    if (name == "global_index") launch(global_index);
    if (name == "skipped_barrier") launch(skipped_barrier);
    if (name == "different_barriers") launch(different_barriers);
    if (name == "lane_left_out") launch(lane_left_out);
    if (name == "lane_not_named") launch(lane_not_named);
    if (name == "source_not_named") launch(source_not_named);
    if (name == "waits_for_an_earlier_block") launch(waits_for_an_earlier_block, 9);
    if (name == "waits_for_a_later_block") launch(waits_for_a_later_block, 9);
    if (name == "lock_in_a_warp") launch(lock_in_a_warp);
    if (name == "not_initialised") launch(not_initialised);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    launch(correct);  // a failed launch leaves nothing behind
    return out[0] == 1 ? 3 : 4;
  }
  std::printf("%d\n", out[0]);
  return 0;
}
