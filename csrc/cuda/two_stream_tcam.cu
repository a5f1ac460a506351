// The kernels: pool_columns.h and pooled_gradient.h.
#include "cuda/pool_columns.h"
#include "cuda/pooled_gradient.h"
#include "math/sigmoid.h"
#include "two_stream_tcam.h"

namespace d2net::cuda {
namespace {

// The mean of two streams' sigmoids in the type of the TCAM: whoever computes an entry anew gets the one in memory.
template <typename T>
struct TwoStreams {
  using Number = T;
  const T* __restrict__ a, * __restrict__ b;
  T* __restrict__ tcam;

  template <int N>
  struct Raw {
    Pack<T, N> a, b;
  };
  template <int N>
  __device__ __forceinline__ Raw<N> fetch(int64_t i) const {
    return {load<N>(a + i), load<N>(b + i)};
  }
  template <int N>
  __device__ __forceinline__ Pack<T, N> value(const Raw<N>& of) const {
    Pack<T, N> mean;
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const accumulator_t<T> both = math::sigmoid(to_float(of.a.at[l])) + math::sigmoid(to_float(of.b.at[l]));
      mean.at[l] = from_float<T>(accumulator_t<T>(0.5) * both);
    }
    return mean;
  }
  template <int N>
  __device__ __forceinline__ void keep(int64_t i, const Pack<T, N>& values) const {
    store(tcam + i, values);
  }
  bool packs(int64_t c) const { return fits_packs(c, a, b, tcam); }
  __device__ __forceinline__ int64_t length(const int64_t* lengths, int64_t recording, int64_t t, bool) const {
    return math::clamped_length(lengths, recording, t);
  }
};

}  // namespace

template <typename T>
void tcam_pool(const T* tcam, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* attention,
               int32_t* peak, T* pooled, accumulator_t<T>* kth, int32_t* last, int device, void* stream) {
  const Stream on("tcam_pool", device, stream);
  pool_columns(on, Plain<T>{tcam}, Pool<T>{lengths, b, t, c, divisor, attention, peak, pooled, kth, last});
}

template <typename T>
void tcam_pool_backward(const T* grad_attention, const T* grad_pooled, const T* tcam, const int64_t* lengths,
                        const int32_t* peak, const accumulator_t<T>* kth, const int32_t* last, int64_t b, int64_t t,
                        int64_t c, int64_t divisor, T* grad_tcam, int device, void* stream) {
  const Stream on("tcam_pool_backward", device, stream);
  const PooledGradient<T> gradient{nullptr, grad_attention, grad_pooled, tcam, lengths, peak,
                                   kth,     last,           b,           t,    c,       divisor};
  pooled_gradient(on, gradient, ToActivations<T>{grad_tcam});
}

template <typename T>
void two_stream_tcam(const T* logits_a, const T* logits_b, const int64_t* lengths, int64_t b, int64_t t, int64_t c,
                     int64_t divisor, T* tcam, T* attention, int32_t* peak, T* pooled, accumulator_t<T>* kth,
                     int32_t* last, int device, void* stream) {
  const Stream on("two_stream_tcam", device, stream);
  pool_columns(on, TwoStreams<T>{logits_a, logits_b, tcam},
               Pool<T>{lengths, b, t, c, divisor, attention, peak, pooled, kth, last});
}

template <typename T>
void two_stream_tcam_backward(const T* grad_tcam, const T* grad_attention, const T* grad_pooled, const T* logits_a,
                              const T* logits_b, const T* tcam, const int64_t* lengths, const int32_t* peak,
                              const accumulator_t<T>* kth, const int32_t* last, int64_t b, int64_t t, int64_t c,
                              int64_t divisor, T* grad_a, T* grad_b, int device, void* stream) {
  const Stream on("two_stream_tcam_backward", device, stream);
  const PooledGradient<T> gradient{grad_tcam, grad_attention, grad_pooled, tcam, lengths, peak,
                                   kth,       last,           b,           t,    c,       divisor};
  pooled_gradient(on, gradient, ToLogits<T>{logits_a, logits_b, grad_a, grad_b});
}

#define D2NET_INSTANTIATE(T)                                                                                           \
  template void tcam_pool<T>(const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, T*, int32_t*, T*,           \
                             accumulator_t<T>*, int32_t*, int, void*);                                                 \
  template void tcam_pool_backward<T>(const T*, const T*, const T*, const int64_t*, const int32_t*,                    \
                                      const accumulator_t<T>*, const int32_t*, int64_t, int64_t, int64_t, int64_t, T*, \
                                      int, void*);                                                                     \
  template void two_stream_tcam<T>(const T*, const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, T*, T*,     \
                                   int32_t*, T*, accumulator_t<T>*, int32_t*, int, void*);                             \
  template void two_stream_tcam_backward<T>(const T*, const T*, const T*, const T*, const T*, const T*,                \
                                            const int64_t*, const int32_t*, const accumulator_t<T>*, const int32_t*,   \
                                            int64_t, int64_t, int64_t, int64_t, T*, T*, int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
D2NET_INSTANTIATE(float16)
D2NET_INSTANTIATE(bfloat16)

}  // namespace d2net::cuda
