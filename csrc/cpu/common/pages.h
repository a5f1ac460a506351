// Memory that comes fresh from the system is given out page by page as it is first written, which for 4 KiB pages costs
// several times more than writing. Linux gives larger ones to who asks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace d2net::cpu {

// To be called before a large output is written. Advice only: nothing depends on whether the system takes it. It stays
// with the addresses when the memory is freed and used again.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  if (bytes < 2 * int64_t(kLarge)) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kLarge - 1) / kLarge * kLarge,
                  end = (address + uintptr_t(bytes)) / kLarge * kLarge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A std::vector with such memory.
template <typename T>
struct LargePages : std::allocator<T> {
  LargePages() = default;
  template <typename U>
  LargePages(const LargePages<U>&) noexcept {}
  template <typename U>
  struct rebind {
    using other = LargePages<U>;
  };
  T* allocate(std::size_t n) {
    T* memory = std::allocator<T>::allocate(n);
    prefer_large_pages(memory, int64_t(n * sizeof(T)));
    return memory;
  }
};
template <typename T>
using LargeVector = std::vector<T, LargePages<T>>;

}  // namespace d2net::cpu
