// Errors of a launch that cannot go on: who waits where.
#include <cstdio>
#include <string>
#include <utility>

#include "simt/runtime.h"

namespace d2net::simt {
namespace {

std::string text_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
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

}  // namespace

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

void fail(std::string&& what) {
  if (kThreadSanitizer) rt.caller.become();
  rt.failed = true;
  rt.failure = *rt.name + ", block " + text_of(blockIdx) + " of " + std::to_string(rt.size) + " threads: " + what;
  what = std::string();
  what.shrink_to_fit();
  switch_to(rt.main);
  __builtin_unreachable();
}

void deadlock() {
  if (kThreadSanitizer) rt.caller.become();
  std::string text = "divergence: threads wait for others that never come: ";
  text += describe(*rt.current->block);
  fail(std::move(text));
}

void polled_in_vain() {
  if (kThreadSanitizer) rt.caller.become();
  std::string text = "thread " + std::to_string(rt.current->number) + " has polled memory " +
                     std::to_string(kMostPolls) + " times, and no thread ended or updated it: ";
  for (const Block& block : rt.blocks) {
    if (block.exited < rt.size) text += "block " + text_of(block.index) + ": " + describe(block) + "; ";
  }
  text += std::to_string(rt.grid_size - rt.begun) + " blocks have not begun";
  fail(std::move(text));
}

}  // namespace d2net::simt
