// A few thousand numbers: what counts is the number of launches, one for each function.
#include "batch_loss.h"
#include "cuda/block.h"
#include "math/peaks.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;

// How many of flags[0 ... n) are above 0, of all threads. Flag: of recordings that count, bool or int64_t.
template <typename Flag>
__device__ __forceinline__ int64_t block_count(const Flag* flags, int64_t n) {
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) count += flags[i] > 0;
  return block_reduce(count, Sum{});
}

template <typename T>
__device__ __forceinline__ Peaks<T> block_peaks(const T* row, int64_t c, T floor, T peak_share) {
  Peaks<T> peaks(floor, peak_share);
  if (peak_share < T(0)) return peaks;
  for (int64_t k = threadIdx.x; k < c; k += kThreads) peaks.compare(row[k]);
  peaks.best = block_reduce(peaks.best, Max{});
  for (int64_t k = threadIdx.x; k < c; k += kThreads) peaks.add(row[k]);
  peaks.sum = block_reduce(peaks.sum, Sum{});
  return peaks;
}

// A block a recording.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    video_factors_kernel(const T* __restrict__ pooled, const T* __restrict__ labels,
                         const int64_t* __restrict__ counted, int64_t b, int64_t c, T floor, T peak_share,
                         bool per_class, T* __restrict__ p, T* __restrict__ y) {
  const int64_t i = blockIdx.x;
  const T* row = pooled + i * c;
  const double all = per_class ? 0 : double(block_count(counted, b));
  const Peaks<T> peaks = block_peaks(row, c, floor, peak_share);
  for (int64_t k = threadIdx.x; k < c; k += kThreads) {
    double size = all;
    for (int64_t j = 0; per_class && j < b; ++j) size += counted[j] > 0 ? double(labels[j * c + k]) : 0.0;
    p[k * b + i] = peaks.value(row[k]);
    y[i * c + k] = counted[i] > 0 ? T(labels[i * c + k] / max(size, 1.0)) : T(0);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    video_factors_backward_kernel(const T* __restrict__ grad, const T* __restrict__ pooled, int64_t b, int64_t c,
                                  T floor, T peak_share, T* __restrict__ grad_pooled) {
  const int64_t i = blockIdx.x;
  const T* row = pooled + i * c;
  const Peaks<T> peaks = block_peaks(row, c, floor, peak_share);
  double along = 0;  // the gradient times the value
  if (peak_share >= T(0)) {
    for (int64_t k = threadIdx.x; k < c; k += kThreads) along += double(grad[k * b + i]) * peaks.value(row[k]);
    along = block_reduce(along, Sum{});
  }
  for (int64_t k = threadIdx.x; k < c; k += kThreads) {
    grad_pooled[i * c + k] = peaks.gradient(row[k], grad[k * b + i], along);
  }
}

// The mean of values[i] where counted[i] > 0, of all threads.
template <typename T, typename Flag>
__device__ __forceinline__ double block_mean(const T* values, const Flag* counted, int64_t b) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < b; i += kThreads) sum += counted[i] > 0 ? double(values[i]) : 0.0;
  sum = block_reduce(sum, Sum{});
  const int64_t count = block_count(counted, b);
  return count > 0 ? sum / count : 0;
}

template <typename T>
__device__ __forceinline__ double or_zero(const T* x) {
  return x == nullptr ? 0 : double(*x);
}

// A term of weight 0 is off, whatever it is: NaN * 0 would be NaN.
__device__ __forceinline__ double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

// One block.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    total_loss_kernel(const T* __restrict__ discriminative, const int64_t* __restrict__ counted,
                      const T* __restrict__ snippet, const bool* __restrict__ valid, const T* __restrict__ video,
                      const T* __restrict__ other, int64_t b, double alpha_snippet, double alpha_video, double weight,
                      T* __restrict__ total, T* __restrict__ mean, T* __restrict__ snippet_mean,
                      T* __restrict__ video_out, T* __restrict__ other_out) {
  const double dis = block_mean(discriminative, counted, b);
  const double snip = snippet == nullptr ? 0 : block_mean(snippet, valid, b);
  if (threadIdx.x > 0) return;
  *video_out = T(or_zero(video));
  *other_out = T(or_zero(other));
  *total =
      T(dis + weighted(alpha_snippet, snip) + weighted(alpha_video, or_zero(video)) + weighted(weight, or_zero(other)));
  *mean = T(dis);
  *snippet_mean = T(snip);
}

// gradient[i] = grad / count where counted[i] > 0.
template <typename T, typename Flag>
__device__ __forceinline__ void spread_mean(double grad, const Flag* counted, int64_t b, T* gradient) {
  const int64_t count = block_count(counted, b);
  for (int64_t i = threadIdx.x; i < b; i += kThreads) gradient[i] = counted[i] > 0 ? T(grad / count) : T(0);
}

// One block.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    total_loss_backward_kernel(const T* __restrict__ to_total, const T* __restrict__ to_mean,
                               const T* __restrict__ to_snippet, const T* __restrict__ to_video,
                               const T* __restrict__ to_other, const int64_t* __restrict__ counted,
                               const bool* __restrict__ valid, int64_t b, double alpha_snippet, double alpha_video,
                               double weight, T* __restrict__ grad_discriminative, T* __restrict__ grad_snippet,
                               T* __restrict__ grad_video, T* __restrict__ grad_other) {
  const double total = or_zero(to_total);
  spread_mean(total + or_zero(to_mean), counted, b, grad_discriminative);
  if (grad_snippet != nullptr)
    spread_mean(weighted(alpha_snippet, total) + or_zero(to_snippet), valid, b, grad_snippet);
  if (threadIdx.x > 0) return;
  if (grad_video != nullptr) *grad_video = T(weighted(alpha_video, total) + or_zero(to_video));
  if (grad_other != nullptr) *grad_other = T(weighted(weight, total) + or_zero(to_other));
}

// A thread an element.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    update_reference_kernel(T* __restrict__ reference, const T* __restrict__ background, const bool* __restrict__ valid,
                            int64_t b, int64_t d, double momentum) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= d) return;
  double sum = 0;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = 0; i < b; ++i) {
    const double value = background[i * d + k];  // read before `valid` is known, so that no load waits for another
    sum += valid[i] ? value : 0;
    count += valid[i];
  }
  if (count > 0) reference[k] = T(momentum * reference[k] + (1 - momentum) / count * sum);
}

}  // namespace

template <typename T>
void video_factors(const T* pooled, const T* labels, const int64_t* counted, int64_t b, int64_t c, double floor,
                   double peak_share, bool per_class, T* p, T* y, int device, void* stream) {
  const Stream on("video_factors", device, stream);
  on.launch(video_factors_kernel<T>, b, kThreads, 0, pooled, labels, counted, b, c, T(floor), T(peak_share), per_class,
            p, y);
}

template <typename T>
void video_factors_backward(const T* grad, const T* pooled, int64_t b, int64_t c, double floor, double peak_share,
                            T* grad_pooled, int device, void* stream) {
  const Stream on("video_factors_backward", device, stream);
  on.launch(video_factors_backward_kernel<T>, b, kThreads, 0, grad, pooled, b, c, T(floor), T(peak_share), grad_pooled);
}

template <typename T>
void total_loss(const T* discriminative, const int64_t* counted, const T* snippet, const bool* valid, const T* video,
                const T* other, int64_t b, double alpha_snippet, double alpha_video, double weight, T* total, T* mean,
                T* snippet_mean, T* video_out, T* other_out, int device, void* stream) {
  const Stream on("total_loss", device, stream);
  on.launch(total_loss_kernel<T>, 1, kThreads, 0, discriminative, counted, snippet, valid, video, other, b,
            alpha_snippet, alpha_video, weight, total, mean, snippet_mean, video_out, other_out);
}

template <typename T>
void total_loss_backward(const T* to_total, const T* to_mean, const T* to_snippet, const T* to_video, const T* to_other,
                         const int64_t* counted, const bool* valid, int64_t b, double alpha_snippet, double alpha_video,
                         double weight, T* grad_discriminative, T* grad_snippet, T* grad_video, T* grad_other,
                         int device, void* stream) {
  const Stream on("total_loss_backward", device, stream);
  on.launch(total_loss_backward_kernel<T>, 1, kThreads, 0, to_total, to_mean, to_snippet, to_video, to_other, counted,
            valid, b, alpha_snippet, alpha_video, weight, grad_discriminative, grad_snippet, grad_video, grad_other);
}

template <typename T>
void update_reference(T* reference, const T* background, const bool* valid, int64_t b, int64_t d, double momentum,
                      int device, void* stream) {
  const Stream on("update_reference", device, stream);
  on.launch(update_reference_kernel<T>, (d + kThreads - 1) / kThreads, kThreads, 0, reference, background, valid, b, d,
            momentum);
}

#define D2NET_INSTANTIATE(T)                                                                                          \
  template void video_factors<T>(const T*, const T*, const int64_t*, int64_t, int64_t, double, double, bool, T*, T*,  \
                                 int, void*);                                                                         \
  template void video_factors_backward<T>(const T*, const T*, int64_t, int64_t, double, double, T*, int, void*);      \
  template void total_loss<T>(const T*, const int64_t*, const T*, const bool*, const T*, const T*, int64_t, double,   \
                              double, double, T*, T*, T*, T*, T*, int, void*);                                        \
  template void total_loss_backward<T>(const T*, const T*, const T*, const T*, const T*, const int64_t*, const bool*, \
                                       int64_t, double, double, double, T*, T*, T*, T*, int, void*);                  \
  template void update_reference<T>(T*, const T*, const bool*, int64_t, int64_t, double, int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda
