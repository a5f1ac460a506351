// The CPU extension that the field's repositories ship for NMS, restated without torch: a double loop over segments
// sorted by score with a flag for each suppressed one, and soft-NMS that looks for the next best score among all.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" {

// `order` holds the indices by falling score; writes the kept ones to keep and returns their number.
int64_t peer_nms_1d(const float* start, const float* end, const int64_t* order, int64_t n, float iou_threshold,
                    int64_t* keep) {
  std::vector<float> length(n);
  for (int64_t i = 0; i < n; ++i) length[i] = end[i] - start[i];
  std::vector<char> suppressed(n, 0);
  int64_t count = 0;
  for (int64_t a = 0; a < n; ++a) {
    const int64_t i = order[a];
    if (suppressed[i]) continue;
    keep[count++] = i;
    const float i_start = start[i], i_end = end[i], i_length = length[i];
    for (int64_t b = a + 1; b < n; ++b) {
      const int64_t j = order[b];
      if (suppressed[j]) continue;
      const float shared = std::max(0.0f, std::min(i_end, end[j]) - std::max(i_start, start[j]));
      if (shared / (i_length + length[j] - shared) >= iou_threshold) suppressed[j] = 1;
    }
  }
  return count;
}

// The arrays are working copies; indices and decayed scores of the kept come first in them afterwards.
int64_t peer_soft_nms_1d(float* start, float* end, float* score, int64_t* index, int64_t n, float iou_threshold,
                         float sigma, float min_score, int gaussian) {
  const auto exchange = [&](int64_t a, int64_t b) {
    std::swap(start[a], start[b]);
    std::swap(end[a], end[b]);
    std::swap(score[a], score[b]);
    std::swap(index[a], index[b]);
  };
  for (int64_t i = 0; i < n; ++i) {
    int64_t best = i;
    for (int64_t j = i + 1; j < n; ++j) {
      if (score[j] > score[best]) best = j;
    }
    exchange(i, best);
    const float length = end[i] - start[i];
    for (int64_t j = i + 1; j < n;) {
      const float shared = std::max(0.0f, std::min(end[i], end[j]) - std::max(start[i], start[j]));
      const float iou = shared / (length + (end[j] - start[j]) - shared);
      float weight = 1;
      if (gaussian) {
        weight = std::exp(-(iou * iou) / sigma);
      } else if (iou >= iou_threshold) {
        weight = 1 - iou;
      }
      score[j] *= weight;
      if (score[j] < min_score) {
        exchange(j, --n);
      } else {
        ++j;
      }
    }
  }
  return n;
}
}
