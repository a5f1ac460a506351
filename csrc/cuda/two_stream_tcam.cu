// The kernels: pool_columns.h and pooled_gradient.h.
#include "cuda/common/pool_columns.h"
#include "cuda/common/pooled_gradient.h"
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
void tcam_pool(const TopkPool<T>& x, int device, void* stream) {
  pool_columns(Stream("tcam_pool", device, stream), Plain<T>{x.x}, x);
}

template <typename T>
void two_stream_tcam(const TwoStreamTcam<T>& x, int device, void* stream) {
  const TwoStreams<T> streams{x.logits_a, x.logits_b, x.tcam};
  pool_columns(Stream("two_stream_tcam", device, stream), streams, x.pool);
}

template <typename T>
void two_stream_tcam_backward(const TwoStreamTcam<T>& x, int device, void* stream) {
  const ToLogits<T> logits{x.logits_a, x.logits_b, x.grad_a, x.grad_b};
  pooled_gradient(Stream("two_stream_tcam_backward", device, stream), x.pool, logits);
}

D2NET_INSTANTIATE_CUDA_HALF(tcam_pool, TopkPool)
D2NET_INSTANTIATE_CUDA_HALF(two_stream_tcam, TwoStreamTcam)
D2NET_INSTANTIATE_CUDA_HALF(two_stream_tcam_backward, TwoStreamTcam)

}  // namespace d2net::cuda
