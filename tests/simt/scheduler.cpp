// Whose turn it is.
#include <utility>

#include "simt/runtime.h"

namespace d2net::simt {
namespace {

constexpr int kTurn = 16;  // polls and atomic updates before others get their turn

// With a seed any thread may be the next, but one of a slow warp is mostly passed over: warps run ahead of others.
void choose_next() {
  Thread*& next = rt.ready[rt.ready_begin];
  do {
    std::swap(next, rt.ready[(rt.ready_begin + random_number() % rt.ready_count) % kMaxResidentThreads]);
  } while ((next->block->slow >> next->number / 32 & 1) && random_number() % 8 != 0);
}

void thread_loop();

Stack& renew(Stack& stack, char* memory, int index) {
  stack.bottom = memory + index * kStackBytes;
  stack.bytes = kStackBytes;
  unpoison(stack.bottom, kStackBytes);  // frames left behind
  prepare(stack, &thread_loop, index);
  return stack;
}

// For a thread that begins: where others have ended, or else a new one.
Stack& idle_stack(const Thread& thread) {
  Block& block = *thread.block;
  if (kThreadSanitizer) return renew(block.tsan->stacks[thread.number], block.tsan->stack_memory, thread.number);
  if (block.idle.empty()) {
    const int index = block.slot * rt.size + block.used_stacks++;
    return renew(rt.stacks[index], rt.stack_memory, index);
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
  if (kThreadSanitizer) fiber_of(thread).become();
  return fresh ? idle_stack(thread) : *thread.stack;
}

// The current thread of a block cannot go on. What its threads wait for, only they can bring.
void check_for_deadlock(const Block& block) {
  if (block.waiting > 0 && block.waiting + block.exited == rt.size) deadlock();
}

void let_others_run() {
  rt.current->stack = running;
  wake(*rt.current);
  run_next_thread();
}

// After an atomic or a poll. A thread that polls must not keep others from what it waits for; with a seed, others may
// come between any two of them.
void maybe_let_others_run() {
  if (rt.seed == 0 ? ++rt.atomics_in_turn == kTurn : random_number() % 4 == 0) let_others_run();
}

// Runs the current thread, then others from their beginning: a thread that waits keeps the stack.
void thread_loop() {
  entered(rt.main);
  for (;;) {
    if (kThreadSanitizer) TsanFiber::acquire(rt.begin_sync);
    rt.body(rt.context);
    if (kThreadSanitizer) TsanFiber::release(rt.end_sync);
    Block& block = *rt.current->block;
    rt.current->state = State::kExited;
    ++block.exited;
    ++rt.changes;
    check_for_deadlock(block);
    if (!kThreadSanitizer) block.idle.push_back(running);  // to it, two threads on one stack would be a race
    if (block.exited < rt.size) {
      run_next_thread();
    } else {
      if (kThreadSanitizer) rt.caller.become();
      rt.ended = &block;
      switch_to(rt.main);
    }
  }
}

}  // namespace

uint64_t random_number() {  // splitmix64
  uint64_t x = rt.random += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

void run_next_thread() { switch_to(next_stack()); }

void wait() {
  Thread& me = *rt.current;
  me.state = State::kWaiting;
  me.stack = running;
  ++me.block->waiting;
  check_for_deadlock(*me.block);
  run_next_thread();
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

}  // namespace d2net::simt
