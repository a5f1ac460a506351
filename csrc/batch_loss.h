// What the loss sums over the recordings of a batch: the factors of U_2, the total, and the background reference.
// A recording i counts where counted[i] > 0: its length will do.
#pragma once

#include <cstdint>

namespace d2net {

namespace cpu {

// pooled, labels (b, c), counted (b) -> P_2 (c, b) and Y_2 (b, c) of Eq. 10. P_2 holds p, `pooled` clamped to
// [floor, 1 - floor]; with peak_share >= 0, p where it is above that share of the recording's best, else 0, divided by
// its sum. Y_2 holds the labels of recordings that count, divided by their number; per_class: by the class's sum.
template <typename T>
void video_factors(const T* pooled, const T* labels, const int64_t* counted, int64_t b, int64_t c, double floor,
                   double peak_share, bool per_class, T* p, T* y, int threads);

// grad (c, b), of P_2 -> grad_pooled (b, c)
template <typename T>
void video_factors_backward(const T* grad, const T* pooled, int64_t b, int64_t c, double floor, double peak_share,
                            T* grad_pooled, int threads);

// Means of `discriminative` and `snippet` (b), over the recordings that `counted` and `valid` (b) name, 0 where they
// name none, and total = mean + alpha_snippet snippet_mean + alpha_video video + weight other (Eq. 1 and 11), without
// the terms whose weight is 0, whatever they are. snippet with valid, video and other (scalars) may be null: 0, also in
// video_out and other_out.
template <typename T>
void total_loss(const T* discriminative, const int64_t* counted, const T* snippet, const bool* valid, const T* video,
                const T* other, int64_t b, double alpha_snippet, double alpha_video, double weight, T* total, T* mean,
                T* snippet_mean, T* video_out, T* other_out, int threads);

// to_*: gradients of the five results, null for 0. grad_discriminative, grad_snippet (b), grad_video, grad_other; the
// last three may be null.
template <typename T>
void total_loss_backward(const T* to_total, const T* to_mean, const T* to_snippet, const T* to_video, const T* to_other,
                         const int64_t* counted, const bool* valid, int64_t b, double alpha_snippet, double alpha_video,
                         double weight, T* grad_discriminative, T* grad_snippet, T* grad_video, T* grad_other,
                         int threads);

// reference (d) becomes momentum reference + (1 - momentum) mean of background (b, d) over the valid (b); without any
// it stays.
template <typename T>
void update_reference(T* reference, const T* background, const bool* valid, int64_t b, int64_t d, double momentum,
                      int threads);

}  // namespace cpu

// The same on a device, enqueued on `stream` (a cudaStream_t); every pointer is device memory.
namespace cuda {

template <typename T>
void video_factors(const T* pooled, const T* labels, const int64_t* counted, int64_t b, int64_t c, double floor,
                   double peak_share, bool per_class, T* p, T* y, int device, void* stream);

template <typename T>
void video_factors_backward(const T* grad, const T* pooled, int64_t b, int64_t c, double floor, double peak_share,
                            T* grad_pooled, int device, void* stream);

template <typename T>
void total_loss(const T* discriminative, const int64_t* counted, const T* snippet, const bool* valid, const T* video,
                const T* other, int64_t b, double alpha_snippet, double alpha_video, double weight, T* total, T* mean,
                T* snippet_mean, T* video_out, T* other_out, int device, void* stream);

template <typename T>
void total_loss_backward(const T* to_total, const T* to_mean, const T* to_snippet, const T* to_video, const T* to_other,
                         const int64_t* counted, const bool* valid, int64_t b, double alpha_snippet, double alpha_video,
                         double weight, T* grad_discriminative, T* grad_snippet, T* grad_video, T* grad_other,
                         int device, void* stream);

template <typename T>
void update_reference(T* reference, const T* background, const bool* valid, int64_t b, int64_t d, double momentum,
                      int device, void* stream);

}  // namespace cuda

}  // namespace d2net
