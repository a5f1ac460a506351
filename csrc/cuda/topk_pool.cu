// The kernels: pool_columns.h and pooled_gradient.h.
#include "cuda/common/pool_columns.h"
#include "cuda/common/pooled_gradient.h"
#include "topk_pool.h"

namespace d2net::cuda {

template <typename T>
void topk_pool(const TopkPool<T>& x, int device, void* stream) {
  pool_columns(Stream("topk_pool", device, stream), Plain<T>{x.x}, x);
}

template <typename T>
void topk_pool_backward(const TopkPool<T>& x, int device, void* stream) {
  pooled_gradient(Stream("topk_pool_backward", device, stream), x, ToActivations<T>{x.grad_x});
}

D2NET_INSTANTIATE_CUDA_HALF(topk_pool, TopkPool)
D2NET_INSTANTIATE_CUDA_HALF(topk_pool_backward, TopkPool)

}  // namespace d2net::cuda
