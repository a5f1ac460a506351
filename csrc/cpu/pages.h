// Memory that comes fresh from the system is given out page by page as it is first written, which for 4 KiB pages costs
// several times more than writing. Linux gives larger ones to who asks.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace d2net::cpu {

// To be called before a large output is written. Advice only: nothing depends on whether the system takes it.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  if (bytes < 8 * int64_t(kLarge)) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kLarge - 1) / kLarge * kLarge,
                  end = (address + uintptr_t(bytes)) / kLarge * kLarge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace d2net::cpu
