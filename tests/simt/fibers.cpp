#include "simt/fibers.h"

#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include <new>

namespace d2net::simt {

Stack* running = nullptr;

char* map_pages(void* at, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at == nullptr ? 0 : MAP_FIXED);
  void* pages = mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(pages);
}

void unmap_pages(char* pages, size_t bytes) { munmap(pages, bytes); }

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

void prepare(Stack& stack, void (*entry)(), int index) {
  // Tops at different offsets in a page, or all stacks would compete for the same lines of the cache.
  void** top = reinterpret_cast<void**>(stack.bottom + stack.bytes - 64 - index % (kStackBytes / 1024) * 192);
  *--top = nullptr;  // the return address of `entry`; keeps the stack aligned
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack.sp = top;
}

namespace {
void raw_switch(Stack& from, Stack& to) { d2net_simt_switch(&from.sp, to.sp); }
}  // namespace

#else

void prepare(Stack& stack, void (*entry)(), int) {
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.bottom;
  stack.context.uc_stack.ss_size = stack.bytes;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
}

namespace {
void raw_switch(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }
}  // namespace

#endif

void switch_to(Stack& to) {
  if (&to == running) return;
  Stack& from = *running;
  running = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
  raw_switch(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

void entered([[maybe_unused]] Stack& main) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main.bottom == nullptr) {
    main.bottom = const_cast<char*>(static_cast<const char*>(bottom));
    main.bytes = bytes;
  }
#endif
}

}  // namespace d2net::simt
