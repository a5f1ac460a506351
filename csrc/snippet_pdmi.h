// Snippet-level pDMI of every recording: log condition number of U_1 = P_1 Y_1 (Eq. 7 and 9).
#pragma once

#include <cstdint>

namespace d2net {

namespace cpu {

// attention, scores (b, t) -> loss, valid (b), weights (b, 2): the gradient of loss to the attention of snippets with
// scores > fg_threshold and of those with scores < bg_threshold (a snippet that is both has the sum). Snippets from
// lengths[i] on (clamped to [0, t]; null: t) are not read. Columns of U_1 are divided by the number of their snippets
// (per_class) or of both, and its entries are at least entry_floor. Without snippets on one side loss and weights are 0
// and valid is false.
template <typename T>
void snippet_pdmi(const T* attention, const T* scores, const int64_t* lengths, int64_t b, int64_t t,
                  double fg_threshold, double bg_threshold, bool per_class, double entry_floor, double rank_tol,
                  T* loss, bool* valid, T* weights, int threads);

// gradient (b, t) = grad[i] weights[i], where they apply
template <typename T>
void snippet_pdmi_backward(const T* grad, const T* weights, const T* scores, const int64_t* lengths, int64_t b,
                           int64_t t, double fg_threshold, double bg_threshold, T* gradient, int threads);

}  // namespace cpu

// The same on a device, enqueued on `stream` (a cudaStream_t); every pointer is device memory.
namespace cuda {

template <typename T>
void snippet_pdmi(const T* attention, const T* scores, const int64_t* lengths, int64_t b, int64_t t,
                  double fg_threshold, double bg_threshold, bool per_class, double entry_floor, double rank_tol,
                  T* loss, bool* valid, T* weights, int device, void* stream);

template <typename T>
void snippet_pdmi_backward(const T* grad, const T* weights, const T* scores, const int64_t* lengths, int64_t b,
                           int64_t t, double fg_threshold, double bg_threshold, T* gradient, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
