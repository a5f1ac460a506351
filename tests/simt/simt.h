// The CUDA of csrc/cuda/*.cu as ordinary C++, so that g++ compiles the same sources and the tests run every kernel
// without a GPU. For tests only. What it finds and what it cannot: docs/simt.md.
//
// A few blocks are resident at a time; when one ends, the next one takes its place. Their threads are fibers of the
// calling OS thread: each runs until it has to wait for others (a barrier, a shuffle, a vote), then the next one runs,
// of whatever block. A wait that can never end is an error that names who waits where. Memory is ordinary memory: an
// address sanitizer sees the ends of shared arrays, and for the thread sanitizer every fiber is a thread, with
// __syncthreads, __syncwarp and nothing else as synchronisation.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "shared arrays are declared with D2NET_SHARED(type, name, [size])");

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace d2net::simt {

// What threads meet for; all who meet must have come for the same.
enum class Op : uint8_t {
  kSyncthreads,
  kSyncthreadsOr,
  kSyncthreadsAnd,
  kSyncthreadsCount,
  kSyncwarp,
  kShuffle,
  kBallot,
  kAny,
  kAll
};

// Waits for every thread of the block; returns the combined `predicate` for the last three.
int meet_block(Op op, bool predicate, const char* file, int line);

// Waits for the lanes of `mask`; returns the value of lane `source` (shuffle) or the combined value.
uint64_t meet_warp(Op op, unsigned mask, uint64_t value, int source, const char* file, int line);

int lane();  // of the fiber that runs

// How many blocks can be resident, and how many are unless a test asks for another number.
constexpr int kMaxResident = 32, kResidentBlocks = 2;

// Storage of one D2NET_SHARED declaration: the same for all threads of a block, filled with garbage for each block.
struct SharedSite {
  struct Storage {
    uint64_t block;
    void* address;
  };
  Storage of_slot[kMaxResident];
};
void* shared(SharedSite& site, size_t bytes, size_t alignment);
void* dynamic_shared();

struct Size3 {
  int64_t x, y, z;
};

// Runs body(context) for every thread of every block. Throws std::runtime_error when threads wait in vain.
void run(const std::string& name, Size3 grid, Size3 block, int64_t shared_bytes, void (*body)(void*), void* context);

// Which thread goes on when one has to wait. Seed 0: the one that has been ready for longest; another seed: a random
// one. The launches that follow are the same every time.
void set_schedule(int resident_blocks, uint64_t seed);

// What has been enqueued since the program began: launches, fills and copies.
int64_t enqueued();
void enqueue();

// Of the device that is imitated: 227 KiB unless a test asks for a smaller one.
int64_t shared_memory_limit();
void set_shared_memory_limit(int64_t bytes);

enum class Direction { kFrom, kUp, kDown, kXor };

template <typename T>
T shuffle(unsigned mask, T value, Direction direction, int by, int width, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move up to 8 bytes");
  const int me = lane(), first = me & ~(width - 1), end = first + width;
  int source = me;
  if (direction == Direction::kFrom) source = first | (by & (width - 1));
  if (direction == Direction::kUp && me - by >= first) source = me - by;
  if (direction == Direction::kDown && me + by < end) source = me + by;
  if (direction == Direction::kXor && (me ^ by) < end) source = me ^ by;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(Op::kShuffle, mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// A thread has looked at memory that others may change, or has changed it. Both let others run now and then.
void polled();
void updated();

// What a thread did before its fence comes before what any thread does after a later one.
void fence();

// What threads of any block have written by now: for a loop that waits for it.
template <typename T>
T load_now(const T* address) {
  polled();
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

template <typename T, typename Combine>
T atomic_update(T* address, Combine&& combine) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = combine(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (std::memcmp(&old, &next, sizeof(T)) == 0) {
    polled();
  } else {
    updated();
  }
  return old;
}

// Keeps the value's type from taking part in deduction, as with CUDA's overloads: atomicAdd(&unsigned_counter, 1).
template <typename T>
struct NotDeduced {
  using type = T;
};
template <typename T>
using Same = typename NotDeduced<T>::type;

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

}  // namespace d2net::simt

// The place of a call, for reports and to tell one barrier from another.
#define D2NET_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(D2NET_SITE) { d2net::simt::meet_block(d2net::simt::Op::kSyncthreads, false, file, line); }
inline int __syncthreads_or(int predicate, D2NET_SITE) {
  return d2net::simt::meet_block(d2net::simt::Op::kSyncthreadsOr, predicate != 0, file, line);
}
inline int __syncthreads_and(int predicate, D2NET_SITE) {
  return d2net::simt::meet_block(d2net::simt::Op::kSyncthreadsAnd, predicate != 0, file, line);
}
inline int __syncthreads_count(int predicate, D2NET_SITE) {
  return d2net::simt::meet_block(d2net::simt::Op::kSyncthreadsCount, predicate != 0, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, D2NET_SITE) {
  d2net::simt::meet_warp(d2net::simt::Op::kSyncwarp, mask, 0, d2net::simt::lane(), file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, D2NET_SITE) {
  return unsigned(d2net::simt::meet_warp(d2net::simt::Op::kBallot, mask, predicate != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int predicate, D2NET_SITE) {
  return int(d2net::simt::meet_warp(d2net::simt::Op::kAny, mask, predicate != 0, 0, file, line));
}
inline int __all_sync(unsigned mask, int predicate, D2NET_SITE) {
  return int(d2net::simt::meet_warp(d2net::simt::Op::kAll, mask, predicate != 0, 0, file, line));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, D2NET_SITE) {
  return d2net::simt::shuffle(mask, value, d2net::simt::Direction::kFrom, source, width, file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, D2NET_SITE) {
  return d2net::simt::shuffle(mask, value, d2net::simt::Direction::kUp, int(delta), width, file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, D2NET_SITE) {
  return d2net::simt::shuffle(mask, value, d2net::simt::Direction::kDown, int(delta), width, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, D2NET_SITE) {
  return d2net::simt::shuffle(mask, value, d2net::simt::Direction::kXor, lane_mask, width, file, line);
}
#undef D2NET_SITE

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

inline int __float_as_int(float x) { return d2net::simt::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return d2net::simt::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return d2net::simt::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return d2net::simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return d2net::simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return d2net::simt::bit_cast<double>(x); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / ::sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }

#define D2NET_MIN_MAX(T)                           \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
D2NET_MIN_MAX(int)
D2NET_MIN_MAX(unsigned)
D2NET_MIN_MAX(long)
D2NET_MIN_MAX(unsigned long)
D2NET_MIN_MAX(long long)
D2NET_MIN_MAX(unsigned long long)
#undef D2NET_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() { d2net::simt::fence(); }
inline void __nanosleep(unsigned) {}

template <typename T>
T atomicAdd(T* address, d2net::simt::Same<T> value) {
  return d2net::simt::atomic_update(address, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* address, d2net::simt::Same<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMax of floating numbers: use ordered integer keys");
  return d2net::simt::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, d2net::simt::Same<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMin of floating numbers: use ordered integer keys");
  return d2net::simt::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicOr(T* address, d2net::simt::Same<T> value) {
  return d2net::simt::atomic_update(address, [=](T old) { return T(old | value); });
}
template <typename T>
T atomicAnd(T* address, d2net::simt::Same<T> value) {
  return d2net::simt::atomic_update(address, [=](T old) { return T(old & value); });
}
template <typename T>
T atomicExch(T* address, d2net::simt::Same<T> value) {
  return d2net::simt::atomic_update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, d2net::simt::Same<T> expected, d2net::simt::Same<T> value) {
  static_assert(std::is_integral_v<T>);
  return d2net::simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
