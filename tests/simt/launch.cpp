// A launch: its blocks one after the other, and what is set for all launches.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "simt/runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace d2net::simt {

Runtime rt;

namespace {

std::atomic<int64_t> all_enqueued{0};

// The threads of a failed launch, which stopped halfway.
void forget_threads() {
  for (auto& block : rt.tsan_blocks) {
    for (TsanFiber& fiber : block->fibers) {
      fiber.become();
      TsanFiber::release(rt.end_sync);
      rt.caller.become();
      fiber.destroy();
    }
  }
  rt.tsan_blocks.clear();
  rt.idle_tsan_blocks.clear();
  TsanFiber::acquire(rt.end_sync);
}

// The one that has been idle for longest, of one more than there are blocks: never that of the block that just ended.
TsanBlock* take_tsan_block(int residents) {
  while (int(rt.tsan_blocks.size()) <= residents) {
    rt.tsan_blocks.push_back(std::make_unique<TsanBlock>());
    rt.idle_tsan_blocks.push_back(rt.tsan_blocks.back().get());
  }
  TsanBlock* longest = rt.idle_tsan_blocks.front();
  rt.idle_tsan_blocks.pop_front();
  while (int(longest->fibers.size()) < rt.size) longest->fibers.push_back(TsanFiber::create());
  return longest;
}

// As many as the setting asks for and there is room for.
int resident_blocks() {
  return int(std::min<int64_t>({rt.resident_blocks, kMaxResidentThreads / rt.size, rt.grid_size}));
}

void begin_launch() {
  if (rt.stack_memory == nullptr) rt.stack_memory = map_pages(nullptr, kMaxResidentThreads * kStackBytes);
  rt.caller = TsanFiber::caller();
  rt.main = Stack();
  running = &rt.main;
  rt.begun = rt.unfinished = rt.ready_begin = rt.ready_count = 0;
  rt.random = rt.seed ^ (++rt.launches << 32);
  for (int slot = 0; slot < kMaxResident; ++slot) {
    Block& block = rt.blocks[slot];
    block.slot = slot;
    block.exited = rt.size;  // it is empty
    block.used_stacks = 0;
    block.idle.clear();
  }
}

void begin_threads(Block& block) {
  block.threads.resize(kMaxThreads);
  for (int i = 0; i < rt.size; ++i) {
    const unsigned number = unsigned(block.odd ? rt.size - 1 - i : i);
    Thread& thread = block.threads[number];
    thread = Thread();
    thread.block = &block;
    thread.number = int(number);
    thread.state = State::kFresh;
    thread.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
    append(thread);
  }
  rt.changes += rt.size;
}

void begin_block(Block& block) {
  const uint64_t number = uint64_t(rt.begun++), row = number / gridDim.x;
  ++rt.unfinished;
  block.index = {unsigned(number % gridDim.x), unsigned(row % gridDim.y), unsigned(row / gridDim.y)};
  block.serial = ++rt.serial;
  block.odd = (rt.launches + number) % 2 == 1;
  if (rt.seed != 0) block.slow = uint32_t(random_number());
  block.waiting = block.in_barrier = block.exited = 0;
  std::fill(std::begin(block.waiting_lanes), std::end(block.waiting_lanes), 0);
  if (kThreadSanitizer) block.tsan = take_tsan_block(resident_blocks());
  renew_shared_memory(block);
  if (kThreadSanitizer) TsanFiber::release(rt.begin_sync);  // new pages come before what the threads do
  begin_threads(block);
}

// Runs threads until a block has ended or the launch has failed.
void run_until_a_block_ends() {
  run_next_thread();
  if (rt.failed) {
    rt.failed = false;
    if (kThreadSanitizer) forget_threads();
    throw std::runtime_error(rt.failure);
  }
  --rt.unfinished;
  if (kThreadSanitizer) rt.idle_tsan_blocks.push_back(rt.ended->tsan);
}

}  // namespace

void set_schedule(int resident_blocks, uint64_t seed) {
  if (resident_blocks < 1 || resident_blocks > kMaxResident) {
    throw std::runtime_error("1 to " + std::to_string(kMaxResident) + " blocks can be resident");
  }
  std::lock_guard<std::mutex> lock(rt.one_launch_at_a_time);
  rt.resident_blocks = resident_blocks;
  rt.seed = seed;
  rt.launches = 0;
}

int64_t enqueued() { return all_enqueued; }
void enqueue() { ++all_enqueued; }

void run(const std::string& name, Size3 grid, Size3 block, int64_t shared_bytes, void (*body)(void*), void* context) {
  std::lock_guard<std::mutex> lock(rt.one_launch_at_a_time);
  rt.name = &name;
  rt.body = body;
  rt.context = context;
  rt.size = int(block.x * block.y * block.z);
  rt.grid_size = grid.x * grid.y * grid.z;
  rt.dynamic_bytes = size_t(shared_bytes);
  blockDim = {unsigned(block.x), unsigned(block.y), unsigned(block.z)};
  gridDim = {unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)};
  begin_launch();
  for (int slot = 0; slot < resident_blocks(); ++slot) begin_block(rt.blocks[slot]);
  while (rt.unfinished > 0) {
    run_until_a_block_ends();
    if (rt.begun < rt.grid_size) begin_block(*rt.ended);
  }
  if (kThreadSanitizer) TsanFiber::acquire(rt.end_sync);
}

}  // namespace d2net::simt
