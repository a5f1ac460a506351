// Shared memory: an arena for each resident block, poisoned but for what was asked for.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "simt/runtime.h"

namespace d2net::simt {
namespace {

constexpr size_t kStaticLimit = 48 * 1024;  // of D2NET_SHARED arrays together, as on the device
constexpr size_t kArenaBytes = 512 * 1024, kRedzone = 64;

void* take_shared(Block& block, size_t bytes, size_t alignment) {
  const size_t begin = (block.arena_used + kRedzone + alignment - 1) / alignment * alignment;
  block.arena_used = (begin + bytes + 15) / 16 * 16;
  char* address = block.arena + begin;
  unpoison(address, bytes);
  // NaN and -1, or a large number: what nobody wrote shall not pass for a zero, nor lose in every maximum.
  // (The thread sanitizer would take this for an access of the calling thread; its pages are new anyway.)
  if (!kThreadSanitizer) std::memset(address, block.odd ? 0x7b : 0xff, bytes);
  return address;
}

}  // namespace

void renew_shared_memory(Block& block) {
  static char* const arenas = map_pages(nullptr, kMaxResident * kArenaBytes);
  block.arena = arenas + block.slot * kArenaBytes;
  // New pages: what another block did in this memory is no race with what this one does.
  if (kThreadSanitizer && block.arena_used > 0) map_pages(block.arena, block.arena_used);
  poison(block.arena, kArenaBytes);
  block.arena_used = block.static_bytes = 0;
  block.dynamic = take_shared(block, rt.dynamic_bytes, 128);
}

void* shared(SharedSite& site, size_t bytes, size_t alignment) {
  Block& block = *rt.current->block;
  SharedSite::Storage& storage = site.of_slot[block.slot];
  if (storage.block != block.serial) {
    block.static_bytes += bytes;
    if (block.static_bytes > kStaticLimit || int64_t(block.static_bytes + rt.dynamic_bytes) > rt.shared_limit) {
      if (kThreadSanitizer) rt.caller.become();
      std::string text = std::to_string(block.static_bytes) + " bytes of D2NET_SHARED and " +
                         std::to_string(rt.dynamic_bytes) + " bytes of dynamic shared memory: too much";
      fail(std::move(text));
    }
    storage = {block.serial, take_shared(block, bytes, std::max<size_t>(alignment, 16))};
  }
  return storage.address;
}

void* dynamic_shared() { return rt.current->block->dynamic; }

int64_t shared_memory_limit() { return rt.shared_limit; }
void set_shared_memory_limit(int64_t bytes) { rt.shared_limit = bytes; }

}  // namespace d2net::simt
