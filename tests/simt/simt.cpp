// Runs the threads of blocks as fibers; see simt.h. This file is never instrumented by the thread sanitizer: it tells
// it (D2NET_SIMT_TSAN) which fiber runs and who waited for whom.
#include "simt/simt.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(D2NET_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace d2net::simt {
namespace {

constexpr int kMaxThreads = 1024,
              kMaxResidentThreads = 2048;   // of a block; of all resident ones, as on a multiprocessor
constexpr size_t kStaticLimit = 48 * 1024;  // of D2NET_SHARED arrays together, as on the device
constexpr size_t kArenaBytes = 512 * 1024, kRedzone = 64;
constexpr int kTurn = 16;                // polls and atomic updates before others get their turn
constexpr int64_t kMostPolls = 1 << 20;  // in vain
#if defined(D2NET_SIMT_TSAN)
constexpr bool kThreadSanitizer = true;
constexpr size_t kStackBytes = 64 * 1024;  // renewed for every block
#else
constexpr bool kThreadSanitizer = false;
constexpr size_t kStackBytes = 256 * 1024;  // of which only touched pages exist; a sanitizer's report needs much
#endif

// ---- what the sanitizers are told

void poison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(address, bytes);
#endif
}

void unpoison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
#endif
}

// To the thread sanitizer, a thread of a block or the caller of run().
class Identity {
 public:
#if defined(D2NET_SIMT_TSAN)
  static Identity caller() { return Identity(__tsan_get_current_fiber()); }
  static Identity create() { return Identity(__tsan_create_fiber(0)); }
  void destroy() { __tsan_destroy_fiber(id_); }
  void become() { __tsan_switch_to_fiber(id_, 1); }  // 1: switching is no synchronisation
  static void acquire(char& what) { __tsan_acquire(&what); }
  static void release(char& what) { __tsan_release(&what); }

 private:
  explicit Identity(void* id) : id_(id) {}
  void* id_;
#else
  static Identity caller() { return {}; }
  static Identity create() { return {}; }
  void destroy() {}
  void become() {}
  static void acquire(char&) {}
  static void release(char&) {}
#endif
};

// Fresh zero pages at `at` (or anywhere), unknown to the thread sanitizer.
char* map_pages(void* at, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at == nullptr ? 0 : MAP_FIXED);
  void* pages = mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(pages);
}

// ---- stacks

struct Stack {
  char* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // the address sanitizer's
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
};

[[noreturn]] void thread_loop();

#if defined(__x86_64__)

// Saves the callee-saved registers on this stack and goes on where `to` was left. swapcontext would do the same with a
// system call each time.
extern "C" void d2net_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type d2net_simt_switch, @function
d2net_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size d2net_simt_switch, .-d2net_simt_switch
)");

void prepare(Stack& stack, int index) {
  // Tops at different offsets in a page, or all stacks would compete for the same lines of the cache.
  void** top = reinterpret_cast<void**>(stack.bottom + stack.bytes - 64 - index % (kStackBytes / 1024) * 192);
  *--top = nullptr;  // the return address of thread_loop, which never returns; keeps the stack aligned
  *--top = reinterpret_cast<void*>(&thread_loop);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack.sp = top;
}

void raw_switch(Stack& from, Stack& to) { d2net_simt_switch(&from.sp, to.sp); }

#else

void prepare(Stack& stack, int) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.bottom;
  stack.context.uc_stack.ss_size = stack.bytes;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, reinterpret_cast<void (*)()>(&thread_loop), 0);
}

void raw_switch(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }

#endif

// ---- the launch that runs

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

// Who the threads of a block are to the thread sanitizer, and what they synchronise on. A later block goes on as them
// and inherits what they had synchronised: not the next one, see take_cast().
struct Cast {
  std::vector<Identity> identities;
  char block_sync;
  std::map<uint64_t, char> warp_sync;  // by warp and mask
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
  Cast* cast;

  char* arena;
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
  char *stack_memory = nullptr, *arenas = nullptr;
  Stack main;
  Stack* running = nullptr;

  std::vector<std::unique_ptr<Cast>> casts;
  std::deque<Cast*> idle_casts;
  Identity caller = Identity::caller();
  char begin_sync, end_sync;

  size_t dynamic_bytes = 0;
  int64_t shared_limit = 227 * 1024;
};

Runtime rt;

Identity& identity(const Thread& thread) { return thread.block->cast->identities[thread.number]; }

void switch_to(Stack& to) {
  if (&to == rt.running) return;
  Stack& from = *rt.running;
  rt.running = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
  raw_switch(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// ---- reports

std::string text_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// Gives up the launch: its stacks are left as they are, without destructors (so take the text away), and run() throws.
[[noreturn]] void fail(std::string&& what) {
  if (kThreadSanitizer) rt.caller.become();
  rt.failed = true;
  rt.failure = *rt.name + ", block " + text_of(blockIdx) + " of " + std::to_string(rt.size) + " threads: " + what;
  what = std::string();
  what.shrink_to_fit();
  switch_to(rt.main);
  __builtin_unreachable();
}

const char* name_of(Op op) {
  switch (op) {
    case Op::kSyncthreads:
      return "__syncthreads";
    case Op::kSyncthreadsOr:
      return "__syncthreads_or";
    case Op::kSyncthreadsAnd:
      return "__syncthreads_and";
    case Op::kSyncthreadsCount:
      return "__syncthreads_count";
    case Op::kSyncwarp:
      return "__syncwarp";
    case Op::kShuffle:
      return "a shuffle";
    case Op::kBallot:
      return "__ballot_sync";
    case Op::kAny:
      return "__any_sync";
    case Op::kAll:
      return "__all_sync";
  }
  return "";
}

bool of_block(Op op) { return op < Op::kSyncwarp; }

std::string describe(const Thread& thread) {
  if (thread.state == State::kExited) return "exited";
  if (thread.state != State::kWaiting) return "poll memory";
  std::string text =
      std::string("wait in ") + name_of(thread.op) + " at " + thread.file + ":" + std::to_string(thread.line);
  if (!of_block(thread.op)) {
    char mask[16];
    std::snprintf(mask, sizeof(mask), "0x%08x", thread.mask);
    text += std::string(" for lanes ") + mask;
  }
  return text;
}

std::string describe(const Block& block) {
  std::string text;
  for (int begin = 0; begin < rt.size;) {
    const std::string what = describe(block.threads[begin]);
    int end = begin + 1;
    while (end < rt.size && describe(block.threads[end]) == what) ++end;
    text += (begin > 0 ? "; " : "") + std::string(end - begin > 1 ? "threads " : "thread ") + std::to_string(begin);
    if (end - begin > 1) text += "-" + std::to_string(end - 1);
    text += " " + what;
    begin = end;
  }
  return text;
}

[[noreturn]] void deadlock() {
  if (kThreadSanitizer) rt.caller.become();
  std::string text = "divergence: threads wait for others that never come: ";
  text += describe(*rt.current->block);
  fail(std::move(text));
}

[[noreturn]] void polled_in_vain() {
  if (kThreadSanitizer) rt.caller.become();
  std::string text = "thread " + std::to_string(rt.current->number) + " has polled memory " +
                     std::to_string(kMostPolls) + " times, and no thread ended or updated it: ";
  for (const Block& block : rt.blocks) {
    if (block.exited < rt.size) text += "block " + text_of(block.index) + ": " + describe(block) + "; ";
  }
  text += std::to_string(rt.grid_size - rt.begun) + " blocks have not begun";
  fail(std::move(text));
}

// ---- whose turn it is

uint64_t random_number() {  // splitmix64
  uint64_t x = rt.random += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

void append(Thread& thread) { rt.ready[(rt.ready_begin + rt.ready_count++) % kMaxResidentThreads] = &thread; }

void wake(Thread& thread) {
  thread.state = State::kReady;
  append(thread);
}

// With a seed any thread may be the next, but one of a slow warp is mostly passed over: warps run ahead of others.
void choose_next() {
  Thread*& next = rt.ready[rt.ready_begin];
  do {
    std::swap(next, rt.ready[(rt.ready_begin + random_number() % rt.ready_count) % kMaxResidentThreads]);
  } while ((next->block->slow >> next->number / 32 & 1) && random_number() % 8 != 0);
}

// For a thread that begins: where others have ended, or else a new one.
Stack& idle_stack(Block& block) {
  if (block.idle.empty()) {
    const int index = block.slot * rt.size + block.used_stacks++;
    Stack& stack = rt.stacks[index];
    stack.bottom = rt.stack_memory + index * kStackBytes;
    stack.bytes = kStackBytes;
    unpoison(stack.bottom, kStackBytes);  // frames left behind
    prepare(stack, index);
    return stack;
  }
  Stack& stack = *block.idle.back();
  block.idle.pop_back();
  return stack;
}

// Makes the next thread the current one; returns its stack. There is one: see deadlock().
Stack& next_stack() {
  if (rt.seed != 0) choose_next();
  Thread& thread = *rt.ready[rt.ready_begin];
  rt.ready_begin = (rt.ready_begin + 1) % kMaxResidentThreads;
  --rt.ready_count;
  const bool fresh = thread.state == State::kFresh;
  rt.current = &thread;
  rt.atomics_in_turn = 0;
  thread.state = State::kRunning;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  if (kThreadSanitizer) identity(thread).become();
  return fresh ? idle_stack(*thread.block) : *thread.stack;
}

// The current thread of a block cannot go on. What its threads wait for, only they can bring.
void check_for_deadlock(const Block& block) {
  if (block.waiting > 0 && block.waiting + block.exited == rt.size) deadlock();
}

void wait() {
  Thread& me = *rt.current;
  me.state = State::kWaiting;
  me.stack = rt.running;
  ++me.block->waiting;
  check_for_deadlock(*me.block);
  switch_to(next_stack());
}

void let_others_run() {
  rt.current->stack = rt.running;
  wake(*rt.current);
  switch_to(next_stack());
}

// After an atomic or a poll. A thread that polls must not keep others from what it waits for; with a seed, others may
// come between any two of them.
void maybe_let_others_run() {
  if (rt.seed == 0 ? ++rt.atomics_in_turn == kTurn : random_number() % 4 == 0) let_others_run();
}

// Runs the current thread, then others from their beginning: a thread that waits keeps the stack.
void thread_loop() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (rt.main.bottom == nullptr) {  // the first stack of a launch is entered from the caller's
    rt.main.bottom = const_cast<char*>(static_cast<const char*>(bottom));
    rt.main.bytes = bytes;
  }
#endif
  for (;;) {
    if (kThreadSanitizer) Identity::acquire(rt.begin_sync);
    rt.body(rt.context);
    if (kThreadSanitizer) Identity::release(rt.end_sync);
    Block& block = *rt.current->block;
    rt.current->state = State::kExited;
    ++block.exited;
    ++rt.changes;
    check_for_deadlock(block);
    if (!kThreadSanitizer) block.idle.push_back(rt.running);  // to it, two threads on one stack would be a race
    if (block.exited < rt.size) {
      switch_to(next_stack());
    } else {
      if (kThreadSanitizer) rt.caller.become();
      rt.ended = &block;
      switch_to(rt.main);
    }
  }
}

// ---- blocks

// The threads of a failed launch, which stopped halfway.
void forget_threads() {
  for (auto& cast : rt.casts) {
    for (Identity& id : cast->identities) {
      id.become();
      Identity::release(rt.end_sync);
      rt.caller.become();
      id.destroy();
    }
  }
  rt.casts.clear();
  rt.idle_casts.clear();
  Identity::acquire(rt.end_sync);
}

// The one that has been idle for longest, of one more than there are blocks: never that of the block that just ended.
Cast* take_cast(int residents) {
  while (int(rt.casts.size()) <= residents) {
    rt.casts.push_back(std::make_unique<Cast>());
    rt.idle_casts.push_back(rt.casts.back().get());
  }
  Cast* cast = rt.idle_casts.front();
  rt.idle_casts.pop_front();
  while (int(cast->identities.size()) < rt.size) cast->identities.push_back(Identity::create());
  return cast;
}

void* take_shared(Block& block, size_t bytes, size_t alignment) {
  const size_t begin = (block.arena_used + kRedzone + alignment - 1) / alignment * alignment;
  block.arena_used = (begin + bytes + 15) / 16 * 16;
  char* address = block.arena + begin;
  unpoison(address, bytes);
  // NaN and -1, or a large number: what nobody wrote shall not pass for a zero, nor lose in every maximum.
  // (The thread sanitizer would take this for an access of the calling thread; its pages are new anyway.)
  if (!kThreadSanitizer) std::memset(address, block.odd ? 0x7b : 0xff, bytes);
  return address;
}

// As many as the setting asks for and there is room for.
int resident_blocks() {
  return int(std::min<int64_t>({rt.resident_blocks, kMaxResidentThreads / rt.size, rt.grid_size}));
}

void begin_launch() {
  if (rt.stack_memory == nullptr) {
    rt.stack_memory = map_pages(nullptr, kMaxResidentThreads * kStackBytes);
    rt.arenas = map_pages(nullptr, kMaxResident * kArenaBytes);
  }
  rt.caller = Identity::caller();
  rt.main = Stack();
  rt.running = &rt.main;
  rt.begun = rt.unfinished = rt.ready_begin = rt.ready_count = 0;
  rt.random = rt.seed ^ (++rt.launches << 32);
  for (int slot = 0; slot < kMaxResident; ++slot) {
    Block& block = rt.blocks[slot];
    block.slot = slot;
    block.exited = rt.size;  // it is empty
    block.used_stacks = 0;
    block.idle.clear();
    block.arena = rt.arenas + slot * kArenaBytes;
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
  if (kThreadSanitizer) {
    // New pages: what another block did in this memory is no race with what this one does.
    map_pages(rt.stack_memory + block.slot * rt.size * kStackBytes, rt.size * kStackBytes);
    map_pages(block.arena, kArenaBytes);
    block.used_stacks = 0;
    block.cast = take_cast(resident_blocks());
    Identity::release(rt.begin_sync);
  }
  poison(block.arena, kArenaBytes);
  block.arena_used = block.static_bytes = 0;
  block.dynamic = take_shared(block, rt.dynamic_bytes, 128);
  begin_threads(block);
}

// Runs threads until a block has ended or the launch has failed.
void run_until_a_block_ends() {
  switch_to(next_stack());
  if (rt.failed) {
    rt.failed = false;
    if (kThreadSanitizer) forget_threads();
    throw std::runtime_error(rt.failure);
  }
  --rt.unfinished;
  if (kThreadSanitizer) rt.idle_casts.push_back(rt.ended->cast);
}

}  // namespace

// ---- what kernels call

int lane() { return rt.current->number % 32; }

void* shared(SharedSite& site, size_t bytes, size_t alignment) {
  Block& block = *rt.current->block;
  SharedSite::Storage& storage = site.of_slot[block.slot];
  if (storage.block != block.serial) {
    block.static_bytes += bytes;
    if (block.static_bytes > kStaticLimit || int64_t(block.static_bytes + rt.dynamic_bytes) > rt.shared_limit) {
      if (kThreadSanitizer) rt.caller.become();
      std::string text = std::to_string(block.static_bytes) + " bytes of D2NET_SHARED and " +
                         std::to_string(rt.dynamic_bytes) + " bytes of dynamic shared memory: too much";
      fail(std::move(text));
    }
    storage = {block.serial, take_shared(block, bytes, std::max<size_t>(alignment, 16))};
  }
  return storage.address;
}

void* dynamic_shared() { return rt.current->block->dynamic; }

void fence() {
  static char all;
  Identity::acquire(all);
  Identity::release(all);
}

void polled() {
  Thread& me = *rt.current;
  if (me.during != rt.changes) {
    me.during = rt.changes;
    me.polls = 0;
  }
  if (++me.polls > kMostPolls) polled_in_vain();
  maybe_let_others_run();
}

void updated() {
  ++rt.changes;
  maybe_let_others_run();
}

int meet_block(Op op, bool predicate, const char* file, int line) {
  Thread& me = *rt.current;
  Block& block = *me.block;
  me.op = op;
  me.file = file;
  me.line = line;
  me.value = predicate;
  if (++block.in_barrier < rt.size) {
    wait();
    return int(me.result);
  }
  me.state = State::kWaiting;  // for a report
  int count = 0;
  for (int i = 0; i < rt.size; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.op != op || thread.line != line) deadlock();  // different barriers
    count += int(thread.value);
  }
  me.state = State::kRunning;
  block.in_barrier = block.waiting = 0;
  const int combined = op == Op::kSyncthreadsCount ? count : op == Op::kSyncthreadsAnd ? count == rt.size : count > 0;
  if (kThreadSanitizer) {
    for (int i = 0; i < rt.size; ++i) {
      identity(block.threads[i]).become();
      Identity::release(block.cast->block_sync);
    }
    for (int i = 0; i < rt.size; ++i) {
      identity(block.threads[i]).become();
      Identity::acquire(block.cast->block_sync);
    }
    identity(me).become();
  }
  // In the order in which they came, which is the order in which they started.
  for (int i = 0; i < rt.size; ++i) {
    Thread& thread = block.threads[block.odd ? rt.size - 1 - i : i];
    thread.result = combined;
    if (&thread != &me) wake(thread);
  }
  return combined;
}

uint64_t meet_warp(Op op, unsigned mask, uint64_t value, int source, const char* file, int line) {
  Thread& me = *rt.current;
  Block& block = *me.block;
  const int warp = me.number / 32, first = warp * 32, my_lane = me.number % 32;
  Thread* lanes = &block.threads[first];
  me.op = op;
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.file = file;
  me.line = line;
  if (!(mask >> my_lane & 1)) {
    if (kThreadSanitizer) rt.caller.become();
    me.state = State::kWaiting;
    std::string text =
        "thread " + std::to_string(me.number) + " is not among the lanes that it names: it would " + describe(me);
    fail(std::move(text));
  }
  uint32_t& waiting = block.waiting_lanes[warp];
  waiting |= 1u << my_lane;
  bool all = (waiting & mask) == mask;
  for (int i = 0; all && i < 32; ++i) {
    all = !(mask >> i & 1) || (lanes[i].op == op && lanes[i].line == line && lanes[i].mask == mask);
  }
  if (!all) {
    wait();
    return me.result;
  }
  uint32_t ballot = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && lanes[i].value != 0) ballot |= 1u << i;
  }
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& thread = lanes[i];
    if (op == Op::kShuffle) {
      if (!(mask >> thread.source & 1)) {
        if (kThreadSanitizer) rt.caller.become();
        std::string text = "thread " + std::to_string(first + i) + " reads lane " + std::to_string(thread.source) +
                           ", which takes no part in the shuffle at " + file + ":" + std::to_string(line);
        fail(std::move(text));
      }
      thread.result = lanes[thread.source].value;
    } else {
      thread.result = op == Op::kBallot ? ballot : op == Op::kAny ? ballot != 0 : ballot == mask;
    }
  }
  // Only __syncwarp orders memory; shuffles and votes do not.
  if (kThreadSanitizer && op == Op::kSyncwarp) {
    char& sync = block.cast->warp_sync[uint64_t(warp) << 32 | mask];
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      identity(lanes[i]).become();
      Identity::release(sync);
    }
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      identity(lanes[i]).become();
      Identity::acquire(sync);
    }
    identity(me).become();
  }
  waiting &= ~mask;
  for (int i = 0; i < 32; ++i) {
    const int lane = block.odd ? 31 - i : i;
    if (!(mask >> lane & 1) || lane == my_lane) continue;
    --block.waiting;
    wake(lanes[lane]);
  }
  return me.result;
}

// ---- the host's side

int64_t shared_memory_limit() { return rt.shared_limit; }
void set_shared_memory_limit(int64_t bytes) { rt.shared_limit = bytes; }

void set_schedule(int resident_blocks, uint64_t seed) {
  if (resident_blocks < 1 || resident_blocks > kMaxResident) {
    throw std::runtime_error("1 to " + std::to_string(kMaxResident) + " blocks can be resident");
  }
  std::lock_guard<std::mutex> lock(rt.one_launch_at_a_time);
  rt.resident_blocks = resident_blocks;
  rt.seed = seed;
  rt.launches = 0;
}

namespace {
std::atomic<int64_t> all_enqueued{0};
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
  if (kThreadSanitizer) Identity::acquire(rt.end_sync);
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else {
    magnitude = exponent == 0 ? ldexpf(float(fraction), -24) : ldexpf(float(fraction + 1024), exponent - 25);
  }
  return bits >> 15 ? -magnitude : magnitude;
}

uint16_t float_to_half(float value) {
  const uint16_t sign = uint16_t(bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const float magnitude = fabsf(value);
  if (value != value) return uint16_t(sign | 0x7e00);
  if (magnitude >= 65520) return uint16_t(sign | 0x7c00);
  int exponent = 0;
  frexpf(magnitude, &exponent);                                 // magnitude < 2^exponent
  const int unit = std::max(exponent, -13) - 11;                // the last of 11 bits, or the smallest denormal
  const int steps = int(nearbyintf(ldexpf(magnitude, -unit)));  // to nearest, ties to even
  // Carrying into the exponent is what rounding up to the next power of two means.
  return uint16_t(sign | (steps < 1024 ? steps : steps + ((unit + 24) << 10)));
}

}  // namespace d2net::simt
