// L_Dis from pooled scores and embeddings (Eq. 3 and 4), and who is compared with whom.
#pragma once

#include <cstdint>

namespace d2net {

// Rows of `saved` (8, b), what the forward leaves to the backward: the gradient of a recording's term to its cosines of
// w_fb, w_fg and w_bg; those cosines; 1 / |x_fg| and 1 / |x_bg|.
constexpr int kToCosine = 0, kCosine = 3, kInverseNorm = 6, kDiscriminativeSaved = 8;

namespace cpu {

// partner (3, b): for w_fb, w_fg and w_bg of Eq. 3 the next recording in a cycle through all, those with a foreground
// and those with a background embedding, in the order of keys (3, b), NaN last; -1 where that is the recording
// itself or one of the two has no such embedding.
void different_partners(const float* keys, const bool* valid_fg, const bool* valid_bg, int64_t b, int64_t* partner,
                        int threads);

// pooled, labels (b, c), counted (b), x_fg, x_bg (b, d) -> terms (b): Eq. 4 of each recording with counted[i] > 0
// (its length will do), 0 for others; sum over classes, or their mean; positive ones c times, if balanced. partner (3,
// b): whose embedding is x~, with weight 0 where it is not in [0, b); null: all weights are 0, and x_fg, x_bg, source,
// saved may be null. source (b): the recording whose x_fg stands in w_fb; null: the recording itself; weight 0 where it
// is not in [0, b). to_pooled (b, c): gradient of terms[i] to pooled[i].
template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x_fg, const T* x_bg,
                          const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d, double beta,
                          double gamma, double floor, bool mean, bool balanced, T* terms, T* to_pooled, T* saved,
                          int threads);

// grad (b) -> grad_pooled (b, c), grad_fg, grad_bg (b, d); partner null: only the first.
template <typename T>
void discriminative_terms_backward(const T* grad, const T* to_pooled, const T* saved, const T* x_fg, const T* x_bg,
                                   const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d,
                                   T* grad_pooled, T* grad_fg, T* grad_bg, int threads);

}  // namespace cpu

// The same on a device, enqueued on `stream` (a cudaStream_t); every pointer is device memory.
namespace cuda {

void different_partners(const float* keys, const bool* valid_fg, const bool* valid_bg, int64_t b, int64_t* partner,
                        int device, void* stream);

template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x_fg, const T* x_bg,
                          const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d, double beta,
                          double gamma, double floor, bool mean, bool balanced, T* terms, T* to_pooled, T* saved,
                          int device, void* stream);

template <typename T>
void discriminative_terms_backward(const T* grad, const T* to_pooled, const T* saved, const T* x_fg, const T* x_bg,
                                   const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d,
                                   T* grad_pooled, T* grad_fg, T* grad_bg, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
