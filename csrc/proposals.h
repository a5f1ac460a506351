// Segment proposals from class activations over time (Sec. 3.3 of the paper). A column is one class of one recording.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "float16.h"

namespace d2net::cpu {

// The number of proposals is known only when they are found: find_proposals keeps them here until copy_proposals writes
// them to tensors of that size. In order of recording, class, falling score.
template <typename T>
struct FoundProposals {
  struct Span {
    int32_t start, end;
    T score;
  };
  struct Column {
    int64_t recording, label, spans;
  };
  static constexpr int64_t kRefused = -1;

  int64_t count = 0;  // kRefused: the activations read hold NaN or Inf, or are so large that their sum overflows
  std::vector<Column> columns;
  std::vector<std::vector<Span>> spans;  // of all columns, one after the other, in parts of any size
};

// The element (b, t, c) of the (batch, snippets, width) activations is activations[b * by_recording + t * by_snippet +
// c * by_class]. classes (batch, width) is true where a class is looked at; activations of others are not read. lengths
// (batch) may be null: all snippets; values are clamped to [0, snippets]. Thresholds come in any order and may repeat;
// they are rounded to T. snippets is below 2^31.
//
// A proposal is a maximal run of snippets above a threshold, of at least min_length; runs of equal extent are one. Its
// score is the mean inside minus that of the max(1, floor(inflation * length)) snippets on either side: of both sides
// together, or the mean of the means of those sides there are. Sums are differences of prefix sums in double.
// Proposals with a score below min_contrast go, and those whose IoU with a better one of their class and recording is
// >= nms_iou. Of equal scores, the earlier start, then the earlier end, is better.
template <typename T>
FoundProposals<T> find_proposals(const T* activations, int64_t batch, int64_t snippets, int64_t width,
                                 int64_t by_recording, int64_t by_snippet, int64_t by_class, const bool* classes,
                                 const int64_t* lengths, const double* thresholds, int64_t n_thresholds,
                                 int64_t min_length, double inflation, bool mean_of_sides, double min_contrast,
                                 double nms_iou, int threads);

// Writes places (4, found.count), rows recording, label, start (inclusive) and end (exclusive), and scores
// (found.count).
template <typename T>
void copy_proposals(const FoundProposals<T>& found, int64_t* places, T* scores, int threads);

}  // namespace d2net::cpu

namespace d2net::cuda {

// The type in which activations of type X are computed.
template <typename X>
using Computed = std::conditional_t<std::is_same_v<X, double>, double, float>;

// Errors in the input, as bits of offsets[batch * width + 1].
constexpr int64_t kUnusable = 1;   // activations read hold NaN or Inf, or are so large that their sum overflows
constexpr int64_t kBadLength = 2;  // a length lies outside of 0 to snippets

// As cpu::find_proposals, with the same results, bit for bit; snippets is below 2^29. thresholds are rising. i =
// recording * width + class counts the columns: the proposals of i, best first, are left in starts[i][0], ... of
// starts, ends and scores (batch * width, snippets). offsets[i] of offsets (batch * width + 2) is how many proposals
// the columns before i have, so the last but one element is the number of all; the last one has the errors.
template <typename X>
void find_proposals(const X* activations, int64_t batch, int64_t snippets, int64_t width, int64_t by_recording,
                    int64_t by_snippet, int64_t by_class, const bool* classes, const int64_t* lengths,
                    const Computed<X>* thresholds, int64_t n_thresholds, int64_t min_length, double inflation,
                    bool mean_of_sides, double min_contrast, double nms_iou, int32_t* starts, int32_t* ends,
                    Computed<X>* scores, int64_t* offsets, void* scratch, int device, void* stream);

// Of the scratch memory of find_proposals.
template <typename X>
int64_t find_proposals_scratch_bytes(int64_t batch, int64_t snippets, int64_t width, int device, void* stream);

// As cpu::copy_proposals, of what find_proposals left; count is the total number.
template <typename T>
void copy_proposals(const int32_t* starts, const int32_t* ends, const T* scores, const int64_t* offsets, int64_t batch,
                    int64_t snippets, int64_t width, int64_t count, int64_t* places, T* sorted_scores, int device,
                    void* stream);

}  // namespace d2net::cuda
