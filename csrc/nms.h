// Non-maximum suppression of 1-D segments: the contract of every implementation.
//
// Segments are (n, 2) row-major (start, end), T is float or double and all arithmetic is done in T.
// IoU = overlap / (length_a + length_b - overlap), 0 where the union is 0; a segment with end <= start
// overlaps nothing. Two segments collide when they overlap and IoU >= iou_threshold (0 <= threshold <= 1).
// Of equal scores the lower index comes first.
#pragma once

#include <cstdint>

namespace d2net {

namespace cpu {

// All three refuse coordinates that are not finite and scores that are NaN: they then return -1 - i, where i is the
// first such row, and write nothing.

// Greedy NMS. Writes the kept indices by falling score to keep (room for n) and returns their number.
template <typename T>
int64_t nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, int64_t* keep, int threads);

// The same, but only segments of equal group (any integer) collide. keep is by falling score over all groups.
template <typename T>
int64_t batched_nms_1d(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold,
                       int64_t* keep, int threads);

// Soft-NMS: takes the segment of highest score, multiplies the scores of those that overlap it by
// 1 - IoU where IoU >= iou_threshold (linear) or by exp(-IoU^2 / sigma) (gaussian), and repeats. Segments whose
// score is or falls below min_score (>= 0) are dropped. Writes indices and decayed scores by falling score
// (room for n each) and returns their number.
template <typename T>
int64_t soft_nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, double sigma, double min_score,
                    bool gaussian, int64_t* keep, T* new_scores, int threads);

}  // namespace cpu

namespace cuda {

// Enqueued on `stream` (a cudaStream_t) of `device`; every pointer is device memory, 1 <= n < 2^31 - 1024. Results are
// those of the CPU functions; result[0] becomes their number, and result[1] the first row that is refused (its outputs
// mean nothing then), or -1. Throw std::runtime_error when a launch fails.

// Greedy NMS, per group where groups is not null, in one launch of one block, for n up to kNmsBlockLimit<T>. keep has
// room for n. Estimated for float at the limit on an H100: 60,000 cycles (35 us) where one segment in seven is kept,
// 200,000 where all are; the eleven launches of nms_1d, two of them sorts, 50 to 60 us. Measured on one, of whole calls
// from Python where one in four is kept (53 us for 128 segments): 144 us at the limit, 161 us by nms_1d for one more.
// A test of two doubles takes twice as long, and far longer on chips made for graphics.
template <typename T>
constexpr int64_t kNmsBlockLimit = sizeof(T) == 4 ? 2048 : 1024;
template <typename T>
void nms_1d_block(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold,
                  int64_t* keep, int64_t* result, int device, void* stream);

// The same for any n, on the whole chip. keep has room for n, scratch is scratch_bytes = nms_1d_scratch_bytes<T>(n).
template <typename T>
int64_t nms_1d_scratch_bytes(int64_t n, int device, void* stream);
template <typename T>
void nms_1d(const T* segments, const T* scores, const int64_t* groups, int64_t n, double iou_threshold, void* scratch,
            int64_t scratch_bytes, int32_t* keep, int64_t* result, int device, void* stream);

// keep and new_scores have room for n, scratch (4 n, aligned to 2 T) is overwritten.
template <typename T>
void soft_nms_1d(const T* segments, const T* scores, int64_t n, double iou_threshold, double sigma, double min_score,
                 bool gaussian, T* scratch, int64_t* keep, T* new_scores, int64_t* result, int device, void* stream);

}  // namespace cuda

}  // namespace d2net
