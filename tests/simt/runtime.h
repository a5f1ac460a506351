// The launch that runs: its blocks, their threads, and what the files of this folder call of each other.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "simt/fibers.h"
#include "simt/sanitizers.h"
#include "simt/simt.h"

namespace d2net::simt {

constexpr int kMaxThreads = 1024;          // of a block
constexpr int kMaxResidentThreads = 2048;  // of all resident blocks, as on a multiprocessor
constexpr int64_t kMostPolls = 1 << 20;    // in vain

enum class State : uint8_t { kFresh, kRunning, kWaiting, kReady, kExited };

struct Block;

struct Thread {
  Block* block;
  int number;  // in its block
  State state;
  uint3 index;
  Stack* stack;    // where it waits
  int64_t polls;   // since rt.changes became
  int64_t during;  // this
  // What it waits for:
  Op op;
  unsigned mask;  // warp operations
  int source;
  int line;
  const char* file;
  uint64_t value;
  uint64_t result;
};

// What the thread sanitizer takes for the threads of a block, their stacks, and what they synchronise on. A later block
// goes on as them and inherits what they had synchronised: not the next one, see take_tsan_block(). Who went before on
// a stack was the same thread to it, and so no race.
struct TsanBlock {
  std::vector<TsanFiber> fibers;
  std::vector<Stack> stacks = std::vector<Stack>(kMaxThreads);
  char* stack_memory = map_pages(nullptr, kMaxThreads* kStackBytes);
  char block_sync;
  std::map<uint64_t, char> warp_sync;  // by warp and mask

  TsanBlock() = default;
  TsanBlock(const TsanBlock&) = delete;
  TsanBlock& operator=(const TsanBlock&) = delete;
  ~TsanBlock() { unmap_pages(stack_memory, kMaxThreads * kStackBytes); }
};

// A resident block. When it has ended, the next one takes its slot.
struct Block {
  int slot;
  uint3 index;
  uint64_t serial;  // no other block of any launch has it
  bool odd;         // runs its threads in falling order
  uint32_t slow;    // its warps that seldom get a turn
  std::vector<Thread> threads;
  uint32_t waiting_lanes[kMaxThreads / 32];
  int waiting, in_barrier, exited;

  int used_stacks;
  std::vector<Stack*> idle;  // of the used ones
  TsanBlock* tsan;

  char* arena;  // shared memory
  size_t arena_used, static_bytes;
  void* dynamic;
};

struct Runtime {
  std::mutex one_launch_at_a_time;
  const std::string* name;
  void (*body)(void*);
  void* context;
  int size = 0;                      // threads of a block
  int64_t grid_size = 0, begun = 0;  // blocks
  int64_t unfinished = 0;            // of those begun
  bool failed = false;
  std::string failure;

  std::vector<Block> blocks = std::vector<Block>(kMaxResident);
  Block* ended = nullptr;  // whose slot is free
  Thread* current = nullptr;
  Thread* ready[kMaxResidentThreads];  // a ring
  unsigned ready_begin = 0, ready_count = 0;
  int64_t changes = 0;  // threads that began or ended, updates of memory
  int atomics_in_turn = 0;

  int resident_blocks = kResidentBlocks;
  uint64_t seed = 0, random = 0, launches = 0, serial = 0;

  std::vector<Stack> stacks = std::vector<Stack>(kMaxResidentThreads);
  char* stack_memory = nullptr;
  Stack main;

  std::vector<std::unique_ptr<TsanBlock>> tsan_blocks;
  std::deque<TsanBlock*> idle_tsan_blocks;
  TsanFiber caller = TsanFiber::caller();
  char begin_sync, end_sync;

  size_t dynamic_bytes = 0;
  int64_t shared_limit = 227 * 1024;
};

extern Runtime rt;

inline TsanFiber& fiber_of(const Thread& thread) { return thread.block->tsan->fibers[thread.number]; }

// ---- scheduler.cpp

uint64_t random_number();

// Puts a thread behind those that are ready: one that begins, or one that has waited.
inline void append(Thread& thread) { rt.ready[(rt.ready_begin + rt.ready_count++) % kMaxResidentThreads] = &thread; }
inline void wake(Thread& thread) {
  thread.state = State::kReady;
  append(thread);
}

// Lets others run until someone wakes the current thread.
void wait();

// Switches to the thread that is next. To the caller of run() it returns when a block has ended or the launch failed.
void run_next_thread();

// ---- shared_memory.cpp

// For a block that begins.
void renew_shared_memory(Block& block);

// ---- reports.cpp

// Gives up the launch: its stacks are left as they are, without destructors (so take the text away), and run() throws.
[[noreturn]] void fail(std::string&& what);
[[noreturn]] void deadlock();
[[noreturn]] void polled_in_vain();

std::string describe(const Thread& thread);

}  // namespace d2net::simt
