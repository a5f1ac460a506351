// What the sanitizers are told: which memory exists, which fiber runs, and who waited for whom. The files that include
// this are never instrumented by the thread sanitizer themselves.
#pragma once

#include <cstddef>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
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

namespace d2net::simt {

#if defined(D2NET_SIMT_TSAN)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

inline void poison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(address, bytes);
#endif
}

inline void unpoison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
#endif
}

// A fiber as the thread sanitizer knows it: a thread of a block, or the caller of run().
class TsanFiber {
 public:
#if defined(D2NET_SIMT_TSAN)
  static TsanFiber caller() { return TsanFiber(__tsan_get_current_fiber()); }
  static TsanFiber create() { return TsanFiber(__tsan_create_fiber(0)); }
  void destroy() { __tsan_destroy_fiber(id_); }
  void become() { __tsan_switch_to_fiber(id_, 1); }  // 1: switching is no synchronisation
  static void acquire(char& what) { __tsan_acquire(&what); }
  static void release(char& what) { __tsan_release(&what); }

 private:
  explicit TsanFiber(void* id) : id_(id) {}
  void* id_;
#else
  static TsanFiber caller() { return {}; }
  static TsanFiber create() { return {}; }
  void destroy() {}
  void become() {}
  static void acquire(char&) {}
  static void release(char&) {}
#endif
};

}  // namespace d2net::simt
