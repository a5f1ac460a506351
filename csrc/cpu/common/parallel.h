// Threads of the CPU operators: a small pool of our own. torch's wheels carry their own OpenMP, and a second OpenMP
// runtime in the process would oversubscribe the cores and break after fork.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace d2net::cpu {

namespace detail {

// Calls body(context, chunk) once for every chunk in [0, chunks) on up to `threads` threads, the caller among them.
void run_chunks(int64_t chunks, int threads, void (*body)(void* context, int64_t chunk), void* context);

}  // namespace detail

// Calls body(begin, end) for disjoint ranges that cover [0, n), on up to `threads` threads. No range is shorter than
// `grain` unless n is, so that small work stays on the caller's thread. Ranges and the threads that take them are not
// fixed: a result must not depend on them. The first exception of a body is rethrown here; the ranges not yet started
// are then skipped.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, int threads, Body&& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  // A few chunks a thread even out ranges of unequal cost.
  const int64_t chunks = std::min<int64_t>(n / grain, int64_t(threads) * 4);
  if (threads <= 1 || chunks <= 1) {
    body(int64_t(0), n);
    return;
  }
  struct Context {
    std::remove_reference_t<Body>* body;
    int64_t n, chunks;
  } context{&body, n, chunks};
  detail::run_chunks(
      chunks, threads,
      [](void* c, int64_t chunk) {
        const Context& x = *static_cast<Context*>(c);
        // Cut evenly without overflow: the first n % chunks ranges are one longer.
        const int64_t size = x.n / x.chunks, longer = x.n % x.chunks;
        const int64_t begin = chunk * size + std::min(chunk, longer);
        (*x.body)(begin, begin + size + (chunk < longer));
      },
      &context);
}

}  // namespace d2net::cpu
