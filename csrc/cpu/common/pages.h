// Huge pages. Fresh memory is mapped page by page when it is first written, which for pages of 4 KiB costs several
// times more than writing. Linux maps pages of 2 MiB where it is advised to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace d2net::cpu {

// Call it before a large output is written. It is advice only, and stays with the addresses when the memory is freed
// and used again.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (bytes < 2 * int64_t(kHugePage)) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage,
                  end = (address + uintptr_t(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The allocator of a std::vector with huge pages.
template <typename T>
struct HugePages : std::allocator<T> {
  HugePages() = default;
  template <typename U>
  HugePages(const HugePages<U>&) noexcept {}
  template <typename U>
  struct rebind {
    using other = HugePages<U>;
  };
  T* allocate(std::size_t n) {
    T* memory = std::allocator<T>::allocate(n);
    prefer_huge_pages(memory, int64_t(n * sizeof(T)));
    return memory;
  }
};
template <typename T>
using HugeVector = std::vector<T, HugePages<T>>;

}  // namespace d2net::cpu
