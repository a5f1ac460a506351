// How operators are declared and instantiated. An operator has one struct for all devices, and takes nothing else:
//
//   template <typename T> struct Scale { static constexpr int kSettings = 1; double by; int64_t n; const T* x; T* y; };
//
// Every member fills 8 bytes: first kSettings numbers (double), then sizes and flags (int64_t) and pointers, in any
// order. Python passes a tuple of as many. What a call does not use may be null. Pointers of cuda:: are memory of
// `device`, and its work is enqueued on `stream` (a cudaStream_t); it throws std::runtime_error when a launch fails.
#pragma once

#include <cstdint>

#include "float16.h"

#define D2NET_DECLARE(function, Struct)                      \
  namespace cpu {                                            \
  template <typename T>                                      \
  void function(const Struct<T>&, int threads);              \
  }                                                          \
  namespace cuda {                                           \
  template <typename T>                                      \
  void function(const Struct<T>&, int device, void* stream); \
  }

// In namespace d2net::cpu, behind the definition.
#define D2NET_INSTANTIATE_CPU(function, Struct)             \
  template void function<float>(const Struct<float>&, int); \
  template void function<double>(const Struct<double>&, int);

// In namespace d2net::cuda, behind the definition; the second where half precision is taken as it is.
#define D2NET_INSTANTIATE_CUDA(function, Struct)                   \
  template void function<float>(const Struct<float>&, int, void*); \
  template void function<double>(const Struct<double>&, int, void*);
#define D2NET_INSTANTIATE_CUDA_HALF(function, Struct)                  \
  D2NET_INSTANTIATE_CUDA(function, Struct)                             \
  template void function<float16>(const Struct<float16>&, int, void*); \
  template void function<bfloat16>(const Struct<bfloat16>&, int, void*);
