// The device interface that every kernel is written against: CUDA under nvcc, tests/simt under D2NET_SIMT (tests on a
// machine without a GPU). A kernel may use what both have (list: docs/simt.md) and the following.
//
//   D2NET_SHARED(float, tile, [32][33]);    a shared array (or D2NET_SHARED(int, count, ) a shared variable)
//   D2NET_DYNAMIC_SHARED(float, values);    float* values: the launch's shared_bytes, one declaration a kernel
//   to_float(x), from_float<T>(f)           between float and T = float16, bfloat16, float (double: unchanged)
//
//   const Stream on("topk_pool", device, stream);                             // first line of every host function
//   on.launch(topk_kernel<T>, {classes, recordings}, 256, shared_bytes, x, ...);
//   on.fill(counts, 0, n);  on.copy(to, from, n);
//
// Everything throws std::runtime_error that names the operator, the device and the sizes.
#pragma once

#ifdef D2NET_SIMT
#include "simt/simt.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "float16.h"

#ifdef D2NET_SIMT
#define D2NET_SHARED(T, name, extents)          \
  static ::d2net::simt::SharedSite name##_site; \
  using name##_type = T extents;                \
  name##_type& name =                           \
      *static_cast<name##_type*>(::d2net::simt::shared(name##_site, sizeof(name##_type), alignof(name##_type)))
#define D2NET_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::d2net::simt::dynamic_shared())
#else
#define D2NET_SHARED(T, name, extents) __shared__ T name extents
#define D2NET_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char d2net_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(d2net_dynamic_shared)
#endif

namespace d2net::cuda {

// ---- numbers

template <typename T>
__device__ __forceinline__ T to_float(T x) {  // float and double: as they are
  return x;
}
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ float to_float(float16 x) {
#ifdef D2NET_SIMT
  return simt::half_to_float(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

namespace detail {

template <typename T>
struct FromFloat {
  template <typename F>
  static __device__ __forceinline__ T get(F x) {
    return T(x);
  }
};
template <>
struct FromFloat<bfloat16> {
  static __device__ __forceinline__ bfloat16 get(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bfloat16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
#else
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};             // stays NaN
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
#endif
  }
};
template <>
struct FromFloat<float16> {
  static __device__ __forceinline__ float16 get(float x) {
#ifdef D2NET_SIMT
    return {simt::float_to_half(x)};
#else
    return {__half_as_ushort(__float2half_rn(x))};
#endif
  }
};

}  // namespace detail

// Rounds to nearest, ties to even; what is too large for float16 becomes infinite.
template <typename T, typename F>
__device__ __forceinline__ T from_float(F x) {
  return detail::FromFloat<T>::get(x);
}

// ---- host side

constexpr int64_t kMaxThreads = 1024, kMaxGridX = 2147483647, kMaxGridYZ = 65535;

// 64-bit, so that a size too large for a grid is seen and not cut off.
struct Extent {
  int64_t x = 1, y = 1, z = 1;

  Extent(int64_t x_, int64_t y_ = 1, int64_t z_ = 1) : x(x_), y(y_), z(z_) {}
  std::string text() const { return std::to_string(x) + "x" + std::to_string(y) + "x" + std::to_string(z); }
};

// Where one call of an operator enqueues its work; makes its device the current one.
class Stream {
 public:
  // `stream`: a cudaStream_t.
  Stream(const char* operator_name, int device, void* stream) : name_(operator_name), device_(device), stream_(stream) {
#ifndef D2NET_SIMT
    check(cudaSetDevice(device), "");
#endif
  }

  // One thread of `kernel` for each of grid x block. A grid with nothing in it is no launch.
  template <typename... P, typename... A>
  void launch(void (*kernel)(P...), Extent grid, Extent block, int64_t shared_bytes, A&&... args) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (grid.x < 0 || grid.x > kMaxGridX || grid.y < 0 || grid.y > kMaxGridYZ || grid.z < 0 || grid.z > kMaxGridYZ) {
      refuse(grid, block, shared_bytes, "a grid must be within 2147483647x65535x65535");
    }
    if (block.x <= 0 || block.y <= 0 || block.z <= 0 || block.x > kMaxThreads || block.y > kMaxThreads ||
        block.z > 64 || block.x * block.y * block.z > kMaxThreads) {
      refuse(grid, block, shared_bytes, "a block must have 1 to 1024 threads");
    }
    if (shared_bytes < 0 || (shared_bytes > kPlainShared && shared_bytes > shared_memory_limit())) {
      refuse(grid, block, shared_bytes, "a block may use at most " + std::to_string(shared_memory_limit()) + " bytes");
    }
#ifdef D2NET_SIMT
    simt::enqueue();
    auto thread = [&] { kernel(static_cast<P>(args)...); };
    simt::run(
        name_, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
        [](void* t) { (*static_cast<decltype(thread)*>(t))(); }, &thread);
#else
    cudaError_t status = shared_bytes > 0 ? allow_shared(kernel, shared_bytes) : cudaSuccess;
    if (status == cudaSuccess) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
      config.blockDim = dim3(unsigned(block.x), unsigned(block.y), unsigned(block.z));
      config.dynamicSmemBytes = size_t(shared_bytes);
      config.stream = raw();
      status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
    }
    if (status != cudaSuccess) refuse(grid, block, shared_bytes, cudaGetErrorString(status));
#endif
  }

  // Sets n elements to repetitions of `byte`.
  template <typename T>
  void fill(T* to, int byte, int64_t n) const {
    if (n == 0) return;
#ifdef D2NET_SIMT
    simt::enqueue();
    std::memset(static_cast<void*>(to), byte, n * sizeof(T));
#else
    check(cudaMemsetAsync(to, byte, n * sizeof(T), raw()), "filling " + std::to_string(n) + " elements");
#endif
  }

  // Copies n elements from device memory to device memory.
  template <typename T>
  void copy(T* to, const T* from, int64_t n) const {
    if (n == 0) return;
#ifdef D2NET_SIMT
    simt::enqueue();
    std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
#else
    check(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDeviceToDevice, raw()),
          "copying " + std::to_string(n) + " elements");
#endif
  }

  // Most bytes of shared memory that a block can have: 64 KiB on sm_75, 163 on sm_80, 99 on sm_86, 227 on sm_90.
  int64_t shared_memory_limit() const {
#ifdef D2NET_SIMT
    return simt::shared_memory_limit();
#else
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#endif
  }

  int64_t multiprocessors() const {
#ifdef D2NET_SIMT
    return 4;
#else
    return attribute(cudaDevAttrMultiProcessorCount);
#endif
  }

#ifndef D2NET_SIMT
  cudaStream_t raw() const { return static_cast<cudaStream_t>(stream_); }

  void check(cudaError_t status, const std::string& what) const {
    if (status != cudaSuccess) fail(what + (what.empty() ? "" : ": ") + cudaGetErrorString(status));
  }
#endif

 private:
  static constexpr int64_t kPlainShared = 48 * 1024;  // with the static arrays; more must be asked for

  [[noreturn]] void fail(const std::string& what) const {
#ifndef D2NET_SIMT
    cudaGetLastError();  // forget it: CUB would report it again after its next launch
#endif
    throw std::runtime_error(std::string(name_) + " on CUDA device " + std::to_string(device_) + ": " + what);
  }
  [[noreturn]] void refuse(Extent grid, Extent block, int64_t shared_bytes, const std::string& why) const {
    fail("grid " + grid.text() + ", block " + block.text() + ", " + std::to_string(shared_bytes) +
         " bytes of shared memory: " + why);
  }
#ifndef D2NET_SIMT
  // Lets the kernel have all the memory there is, as a rule the same amount for every launch: another thread may launch
  // it in between.
  template <typename... P>
  cudaError_t allow_shared(void (*kernel)(P...), int64_t shared_bytes) const {
    cudaFuncAttributes attributes = {};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    const int64_t fixed = int64_t(attributes.sharedSizeBytes);  // its static arrays
    if (status != cudaSuccess || shared_bytes + fixed <= kPlainShared) return status;
    const int64_t most = shared_memory_limit() - fixed;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(most > shared_bytes ? most : shared_bytes));
  }

  int64_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_), "asking for its properties");
    return value;
  }
#endif

  friend class SideStream;
  const char* name_;
  int device_;
  [[maybe_unused]] void* stream_;
};

// A second stream for work that may overlap with the first one's. It begins after what was enqueued on the first so
// far; join() makes the first wait for it. Every thread keeps one per device, because creating one takes long.
class SideStream {
 public:
  explicit SideStream(const Stream& main) : main_(main), side_(main) {
#ifndef D2NET_SIMT  // there the kernels run in the order of their launches
    thread_local std::map<int, Kept> kept;
    const auto [place, is_new] = kept.try_emplace(main.device_);
    kept_ = &place->second;
    if (is_new) create();
    main.check(cudaEventRecord(kept_->begun, main.raw()), "a second stream");
    main.check(cudaStreamWaitEvent(kept_->stream, kept_->begun, 0), "a second stream");
    side_.stream_ = kept_->stream;
#endif
  }

  const Stream& stream() const { return side_; }

  void join() const {
#ifndef D2NET_SIMT
    main_.check(cudaEventRecord(kept_->ended, kept_->stream), "a second stream");
    main_.check(cudaStreamWaitEvent(main_.raw(), kept_->ended, 0), "a second stream");
#endif
  }

 private:
#ifndef D2NET_SIMT
  struct Kept {
    cudaStream_t stream;
    cudaEvent_t begun, ended;
  };

  // Works while a graph is captured, too; creating the stream is no part of the graph.
  void create() {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    main_.check(cudaThreadExchangeStreamCaptureMode(&mode), "a second stream");
    main_.check(cudaStreamCreateWithFlags(&kept_->stream, cudaStreamNonBlocking), "a second stream");
    main_.check(cudaEventCreateWithFlags(&kept_->begun, cudaEventDisableTiming), "a second stream");
    main_.check(cudaEventCreateWithFlags(&kept_->ended, cudaEventDisableTiming), "a second stream");
    main_.check(cudaThreadExchangeStreamCaptureMode(&mode), "a second stream");
  }

  Kept* kept_ = nullptr;
#endif
  const Stream& main_;
  Stream side_;
};

}  // namespace d2net::cuda
