// Threads that wait for each other: barriers, votes, shuffles and fences.
#include <string>

#include "simt/runtime.h"

namespace d2net::simt {

int lane() { return rt.current->number % 32; }

void fence() {
  static char all;
  TsanFiber::acquire(all);
  TsanFiber::release(all);
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
      fiber_of(block.threads[i]).become();
      TsanFiber::release(block.tsan->block_sync);
    }
    for (int i = 0; i < rt.size; ++i) {
      fiber_of(block.threads[i]).become();
      TsanFiber::acquire(block.tsan->block_sync);
    }
    fiber_of(me).become();
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
    char& sync = block.tsan->warp_sync[uint64_t(warp) << 32 | mask];
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      fiber_of(lanes[i]).become();
      TsanFiber::release(sync);
    }
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      fiber_of(lanes[i]).become();
      TsanFiber::acquire(sync);
    }
    fiber_of(me).become();
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

}  // namespace d2net::simt
