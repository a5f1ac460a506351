// Fibers: stacks of their own on one OS thread, and switches between them.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "simt/sanitizers.h"

namespace d2net::simt {

constexpr size_t kStackBytes = 256 * 1024;  // of a fiber; only touched pages exist, and a sanitizer's report needs much

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

extern Stack* running;

// Fresh zero pages at `at` (or anywhere), unknown to the thread sanitizer.
char* map_pages(void* at, size_t bytes);
void unmap_pages(char* pages, size_t bytes);

// A switch to this stack will call `entry`, which never returns. index: of the stack among all.
void prepare(Stack& stack, void (*entry)(), int index);

// Goes on where `to` was left; returns when someone switches back.
void switch_to(Stack& to);

// The first thing that an entry does. main: the caller's stack, which is learnt from the first fiber that it enters.
void entered(Stack& main);

}  // namespace d2net::simt
