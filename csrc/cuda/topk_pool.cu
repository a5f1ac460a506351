// The kernels: pool_columns.h and pooled_gradient.h.
#include "cuda/pool_columns.h"
#include "cuda/pooled_gradient.h"
#include "topk_pool.h"

namespace d2net::cuda {

template <typename T>
void topk_pool(const T* x, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* pooled,
               accumulator_t<T>* kth, int32_t* last, int device, void* stream) {
  const Stream on("topk_pool", device, stream);
  pool_columns(on, Plain<T>{x}, Pool<T>{lengths, b, t, c, divisor, nullptr, nullptr, pooled, kth, last});
}

template <typename T>
void topk_pool_backward(const T* grad, const T* x, const int64_t* lengths, const accumulator_t<T>* kth,
                        const int32_t* last, int64_t b, int64_t t, int64_t c, int64_t divisor, T* grad_x, int device,
                        void* stream) {
  const Stream on("topk_pool_backward", device, stream);
  const PooledGradient<T> gradient{nullptr, nullptr, grad, x, lengths, nullptr, kth, last, b, t, c, divisor};
  pooled_gradient(on, gradient, ToActivations<T>{grad_x});
}

#define D2NET_INSTANTIATE(T)                                                                                       \
  template void topk_pool<T>(const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, T*, accumulator_t<T>*,  \
                             int32_t*, int, void*);                                                                \
  template void topk_pool_backward<T>(const T*, const T*, const int64_t*, const accumulator_t<T>*, const int32_t*, \
                                      int64_t, int64_t, int64_t, int64_t, T*, int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
D2NET_INSTANTIATE(float16)
D2NET_INSTANTIATE(bfloat16)

}  // namespace d2net::cuda
