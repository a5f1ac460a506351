#include <algorithm>
#include <numeric>

#include "check.h"
#include "nms.h"

TEST(cuda_batched_nms_equals_the_cpu) {
  const int64_t n = 150, n_groups = 4;
  auto segments = check::uniform<float>(2 * n, 1, 0, 20);
  for (int64_t i = 0; i < n; ++i) segments[2 * i + 1] = segments[2 * i] + segments[2 * i + 1] / 4;
  std::vector<int64_t> offsets = {0, 0, 3, 70, n}, groups(n);  // the first group is empty
  for (int64_t g = 0; g < n_groups; ++g) std::fill(groups.begin() + offsets[g], groups.begin() + offsets[g + 1], g);
  std::vector<float> scores(n);
  for (int64_t i = 0; i < n; ++i) scores[i] = float(n - i);  // by falling score in every group
  for (double threshold : {0.0, 0.3, 1.0}) {
    std::vector<uint8_t> alive(n, 1), expected(n, 0);
    d2net::cuda::batched_nms_1d(segments.data(), offsets.data(), n, n_groups, threshold, alive.data(), 0, nullptr);
    std::vector<int64_t> keep(n);
    keep.resize(
        d2net::cpu::batched_nms_1d(segments.data(), scores.data(), groups.data(), n, threshold, keep.data(), 1));
    for (int64_t i : keep) expected[i] = 1;
    CHECK(alive == expected);
  }
}
