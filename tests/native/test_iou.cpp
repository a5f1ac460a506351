#include <limits>

#include "check.h"
#include "iou.h"

TEST(iou_equals_its_definition) {
  const int64_t n = 300, m = 217;
  const auto a = check::uniform<double>(2 * n, 1, 0, 10), b = check::uniform<double>(2 * m, 2, 0, 10);
  for (int threads : check::kThreads) {
    std::vector<double> iou(n * m);
    d2net::cpu::iou_1d(d2net::Iou<double>{a.data(), n, b.data(), m, iou.data()}, threads);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        const double overlap = std::fmax(0, std::fmin(a[2 * i + 1], b[2 * j + 1]) - std::fmax(a[2 * i], b[2 * j]));
        const double together = std::fmax(0, a[2 * i + 1] - a[2 * i]) + std::fmax(0, b[2 * j + 1] - b[2 * j]) - overlap;
        CHECK(check::close(iou[i * m + j], together > 0 ? overlap / together : 0.0, 1e-12, 0));
      }
    }
  }
}

TEST(iou_of_nothing) {
  d2net::cpu::iou_1d(d2net::Iou<float>{nullptr, 0, nullptr, 0, nullptr}, 2);
  const float a[2] = {std::numeric_limits<float>::quiet_NaN(), 1};
  float iou = 0;
  d2net::cpu::iou_1d(d2net::Iou<float>{a, 1, a, 1, &iou}, 2);
  CHECK(iou != iou);
}
