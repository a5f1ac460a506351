// Runs the threads of a block as fibers; see simt.h. This file is never instrumented by the thread sanitizer: it tells
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
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace d2net::simt {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStaticLimit = 48 * 1024;  // of D2NET_SHARED arrays together, as on the device
constexpr size_t kArenaBytes = 512 * 1024, kRedzone = 64;
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

// To the thread sanitizer, a thread of the running block or the caller of run().
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
  bool started = false;
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
  void** top = reinterpret_cast<void**>(stack.bottom + stack.bytes - 64 - (index % 64) * 192);
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

// ---- the block that runs

enum class State : uint8_t { kFresh, kRunning, kWaiting, kReady, kExited };

struct Thread {
  uint3 index;
  State state;
  Stack* stack;  // where it waits
  // What it waits for:
  Op op;
  unsigned mask;  // warp operations
  int source;
  int line;
  const char* file;
  uint64_t value;
  uint64_t result;
};

struct Runtime {
  std::mutex one_launch_at_a_time;
  const std::string* name;
  void (*body)(void*);
  void* context;

  int size = 0;  // threads of the block
  Thread threads[kMaxThreads];
  uint32_t waiting_lanes[kMaxThreads / 32];
  int current = 0, started = 0, exited = 0, in_barrier = 0;
  bool descending = false;
  int ready[kMaxThreads];  // a ring
  unsigned ready_begin = 0, ready_count = 0;

  std::vector<std::unique_ptr<Stack>> stacks;
  std::vector<Stack*> idle;
  char* stack_memory = nullptr;
  Stack main;
  Stack* running = nullptr;
  bool failed = false;
  std::string failure;

  // Two sets: a block does not inherit from its predecessor what that one had synchronised.
  std::vector<Identity> identities[2];
  Identity caller = Identity::caller();
  char begin_sync, end_sync, block_sync;
  std::map<uint64_t, char> warp_sync;  // by warp and mask

  uint64_t block = 0;  // counts blocks of all launches
  char* arena = nullptr;
  size_t arena_used = 0, static_bytes = 0, dynamic_bytes = 0;
  void* dynamic = nullptr;
  int64_t shared_limit = 227 * 1024;
};

Runtime rt;

Identity& identity(int thread) { return rt.identities[rt.block % 2][thread]; }

void set_current(int thread) {
  rt.current = thread;
  rt.threads[thread].state = State::kRunning;
  threadIdx = rt.threads[thread].index;
  if (kThreadSanitizer) identity(thread).become();
}

void switch_to(Stack& to) {
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

// Gives up the launch: its stacks are left as they are, without destructors (so take the text away), and run() throws.
[[noreturn]] void fail(std::string&& what) {
  if (kThreadSanitizer) rt.caller.become();
  rt.failed = true;
  rt.failure = *rt.name + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
               std::to_string(blockIdx.z) + ") of " + std::to_string(rt.size) + " threads: " + what;
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
  if (thread.state != State::kWaiting) return "exited";
  std::string text =
      std::string("wait in ") + name_of(thread.op) + " at " + thread.file + ":" + std::to_string(thread.line);
  if (!of_block(thread.op)) {
    char mask[16];
    std::snprintf(mask, sizeof(mask), "0x%08x", thread.mask);
    text += std::string(" for lanes ") + mask;
  }
  return text;
}

[[noreturn]] void deadlock() {
  if (kThreadSanitizer) rt.caller.become();
  std::string text = "divergence: threads wait for others that never come: ";
  for (int begin = 0; begin < rt.size;) {
    const std::string what = describe(rt.threads[begin]);
    int end = begin + 1;
    while (end < rt.size && describe(rt.threads[end]) == what) ++end;
    text += (begin > 0 ? "; " : "") + std::string(end - begin > 1 ? "threads " : "thread ") + std::to_string(begin);
    if (end - begin > 1) text += "-" + std::to_string(end - 1);
    text += " " + what;
    begin = end;
  }
  fail(std::move(text));
}

Stack& take_idle_stack() {
  if (rt.idle.empty()) deadlock();  // cannot be: there are as many stacks as threads
  Stack& stack = *rt.idle.back();
  rt.idle.pop_back();
  return stack;
}

// The stack on which to go on when the current thread cannot.
Stack& next_stack() {
  if (rt.started < rt.size) return take_idle_stack();
  if (rt.ready_count == 0) deadlock();
  const int thread = rt.ready[rt.ready_begin];
  rt.ready_begin = (rt.ready_begin + 1) % kMaxThreads;
  --rt.ready_count;
  set_current(thread);
  return *rt.threads[thread].stack;
}

void wake(int thread) {
  rt.threads[thread].state = State::kReady;
  rt.ready[(rt.ready_begin + rt.ready_count++) % kMaxThreads] = thread;
}

// Starts threads until none is left that has not started; a thread that waits keeps the stack, and another takes over.
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
    while (rt.started < rt.size) {
      set_current(rt.descending ? rt.size - 1 - rt.started : rt.started);
      ++rt.started;
      if (kThreadSanitizer) Identity::acquire(rt.begin_sync);
      rt.body(rt.context);
      rt.threads[rt.current].state = State::kExited;
      ++rt.exited;
      if (kThreadSanitizer) {
        Identity::release(rt.end_sync);
        break;  // to it, two threads on one stack would be a race
      }
    }
    if (rt.exited == rt.size) {
      if (kThreadSanitizer) rt.caller.become();
      rt.idle.push_back(rt.running);
      switch_to(rt.main);
    } else {
      Stack& next = next_stack();
      if (!kThreadSanitizer) rt.idle.push_back(rt.running);
      switch_to(next);
    }
  }
}

void wait() {
  const int me = rt.current;
  Thread& thread = rt.threads[me];
  thread.state = State::kWaiting;
  thread.stack = rt.running;
  switch_to(next_stack());
}

// ---- blocks

void start_stacks() {
  if (rt.stack_memory == nullptr) {
    rt.stack_memory = map_pages(nullptr, kMaxThreads * kStackBytes);
    rt.arena = map_pages(nullptr, kArenaBytes);
  }
  while (int(rt.stacks.size()) < rt.size) {
    auto stack = std::make_unique<Stack>();
    stack->bottom = rt.stack_memory + rt.stacks.size() * kStackBytes;
    stack->bytes = kStackBytes;
    rt.stacks.push_back(std::move(stack));
  }
  rt.idle.clear();
  for (int i = rt.size - 1; i >= 0; --i) {
    unpoison(rt.stacks[i]->bottom, kStackBytes);  // frames left behind
    prepare(*rt.stacks[i], i);
    rt.idle.push_back(rt.stacks[i].get());
  }
}

// The threads of a failed launch, which stopped halfway.
void forget_threads() {
  for (auto& set : rt.identities) {
    for (Identity& id : set) {
      id.become();
      Identity::release(rt.end_sync);
      rt.caller.become();
      id.destroy();
    }
    set.clear();
  }
  Identity::acquire(rt.end_sync);
}

void* take_shared(size_t bytes, size_t alignment) {
  const size_t begin = (rt.arena_used + kRedzone + alignment - 1) / alignment * alignment;
  rt.arena_used = (begin + bytes + 15) / 16 * 16;
  char* address = rt.arena + begin;
  unpoison(address, bytes);
  // NaN and -1, or a large number: what nobody wrote shall not pass for a zero, nor lose in every maximum.
  // (The thread sanitizer would take this for an access of the calling thread; its pages are new anyway.)
  if (!kThreadSanitizer) std::memset(address, rt.block % 2 == 0 ? 0xff : 0x7b, bytes);
  return address;
}

void run_block() {
  ++rt.block;
  rt.descending = rt.block % 2 == 1;
  rt.started = rt.exited = rt.in_barrier = rt.ready_begin = rt.ready_count = 0;
  for (int i = 0; i < rt.size; ++i) rt.threads[i].state = State::kFresh;
  std::fill(std::begin(rt.waiting_lanes), std::end(rt.waiting_lanes), 0);
  if (kThreadSanitizer) {
    // New pages: what another block did in this memory is no race with what this one does.
    map_pages(rt.stack_memory, rt.size * kStackBytes);
    map_pages(rt.arena, kArenaBytes);
    start_stacks();
    auto& set = rt.identities[rt.block % 2];
    while (int(set.size()) < rt.size) set.push_back(Identity::create());
    Identity::release(rt.begin_sync);
  }
  poison(rt.arena, kArenaBytes);
  rt.arena_used = rt.static_bytes = 0;
  rt.dynamic = take_shared(rt.dynamic_bytes, 128);
  rt.running = &rt.main;
  switch_to(take_idle_stack());
}

}  // namespace

// ---- what kernels call

int lane() { return rt.current % 32; }

void* shared(SharedSite& site, size_t bytes, size_t alignment) {
  if (site.block != rt.block) {
    rt.static_bytes += bytes;
    if (rt.static_bytes > kStaticLimit || int64_t(rt.static_bytes + rt.dynamic_bytes) > rt.shared_limit) {
      if (kThreadSanitizer) rt.caller.become();
      std::string text = std::to_string(rt.static_bytes) + " bytes of D2NET_SHARED and " +
                         std::to_string(rt.dynamic_bytes) + " bytes of dynamic shared memory: too much";
      fail(std::move(text));
    }
    site = {rt.block, take_shared(bytes, std::max<size_t>(alignment, 16))};
  }
  return site.address;
}

void* dynamic_shared() { return rt.dynamic; }

int meet_block(Op op, bool predicate, const char* file, int line) {
  Thread& me = rt.threads[rt.current];
  me.op = op;
  me.file = file;
  me.line = line;
  me.value = predicate;
  if (++rt.in_barrier < rt.size) {
    wait();
    return int(me.result);
  }
  me.state = State::kWaiting;  // for a report
  int count = 0;
  for (int i = 0; i < rt.size; ++i) {
    if (rt.threads[i].op != op || rt.threads[i].line != line) deadlock();  // different barriers
    count += int(rt.threads[i].value);
  }
  rt.in_barrier = 0;
  const int combined = op == Op::kSyncthreadsCount ? count : op == Op::kSyncthreadsAnd ? count == rt.size : count > 0;
  const int self = rt.current;
  if (kThreadSanitizer) {
    for (int i = 0; i < rt.size; ++i) {
      identity(i).become();
      Identity::release(rt.block_sync);
    }
    for (int i = 0; i < rt.size; ++i) {
      identity(i).become();
      Identity::acquire(rt.block_sync);
    }
    identity(self).become();
  }
  // In the order in which they came, which is the order in which they started.
  for (int i = 0; i < rt.size; ++i) {
    const int thread = rt.descending ? rt.size - 1 - i : i;
    rt.threads[thread].result = combined;
    if (thread != self) wake(thread);
  }
  me.state = State::kRunning;
  return combined;
}

uint64_t meet_warp(Op op, unsigned mask, uint64_t value, int source, const char* file, int line) {
  const int self = rt.current, warp = self / 32, first = warp * 32, my_lane = self % 32;
  Thread& me = rt.threads[self];
  Thread* lanes = rt.threads + first;
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
        "thread " + std::to_string(self) + " is not among the lanes that it names: it would " + describe(me);
    fail(std::move(text));
  }
  uint32_t& waiting = rt.waiting_lanes[warp];
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
    char& sync = rt.warp_sync[uint64_t(warp) << 32 | mask];
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      identity(first + i).become();
      Identity::release(sync);
    }
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      identity(first + i).become();
      Identity::acquire(sync);
    }
    identity(self).become();
  }
  waiting &= ~mask;
  for (int i = 0; i < 32; ++i) {
    const int lane = rt.descending ? 31 - i : i;
    if ((mask >> lane & 1) && first + lane != self) wake(first + lane);
  }
  return me.result;
}

// ---- the host's side

int64_t shared_memory_limit() { return rt.shared_limit; }
void set_shared_memory_limit(int64_t bytes) { rt.shared_limit = bytes; }

void run(const std::string& name, Size3 grid, Size3 block, int64_t shared_bytes, void (*body)(void*), void* context) {
  std::lock_guard<std::mutex> lock(rt.one_launch_at_a_time);
  rt.name = &name;
  rt.body = body;
  rt.context = context;
  rt.size = int(block.x * block.y * block.z);
  rt.dynamic_bytes = size_t(shared_bytes);
  blockDim = {unsigned(block.x), unsigned(block.y), unsigned(block.z)};
  gridDim = {unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)};
  for (unsigned i = 0; i < unsigned(rt.size); ++i) {
    rt.threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  rt.caller = Identity::caller();
  rt.main = Stack();
  start_stacks();
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
        if (rt.failed) {
          rt.failed = false;
          forget_threads();
          throw std::runtime_error(rt.failure);
        }
      }
    }
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
