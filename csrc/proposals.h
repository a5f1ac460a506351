// Segment proposals from activation sequences (Sec. 3.3 of the paper).
#pragma once

#include <cstdint>
#include <vector>

namespace d2net::cpu {

// How many proposals there are is known only once they are found: find_proposals keeps them here until copy_proposals
// writes them to tensors of that size. In order: by recording, class, falling score.
template <typename T>
struct FoundProposals {
  struct Span {
    int32_t start, end;
    T score;
  };
  struct Sequence {
    int64_t recording, label, spans;
  };
  static constexpr int64_t kRefused = -1;

  int64_t count = 0;  // kRefused: the activations read hold NaN or Inf, or are so large that their sum overflows
  std::vector<Sequence> sequences;
  std::vector<std::vector<Span>> spans;  // of all sequences, one after the other, however cut into parts
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
