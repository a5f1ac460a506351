#include <cstring>
#include <limits>

#include "check.h"
#include "iou.h"

namespace {

template <typename T>
void compare(int64_t n, int64_t m) {
  auto a = check::uniform<T>(2 * n, 1, 0, 9), b = check::uniform<T>(2 * m, 2, 0, 9);  // half of them reversed
  a[0] = std::numeric_limits<T>::infinity();
  b[1] = -0.0;
  std::vector<T> expected(n * m), got(n * m);
  d2net::cpu::iou_1d(d2net::Iou<T>{a.data(), n, b.data(), m, expected.data()}, 1);
  d2net::cuda::iou_1d(d2net::Iou<T>{a.data(), n, b.data(), m, got.data()}, 0, nullptr);
  CHECK(std::memcmp(expected.data(), got.data(), n * m * sizeof(T)) == 0);
}

}  // namespace

TEST(cuda_iou_equals_the_cpu) {
  for (int64_t n : {1, 9, 70}) {
    for (int64_t m : {1, 33, 257}) {
      compare<float>(n, m);
      compare<double>(n, m);
    }
  }
  d2net::cuda::iou_1d(d2net::Iou<float>{nullptr, 0, nullptr, 3, nullptr}, 0, nullptr);
  d2net::cuda::iou_1d(d2net::Iou<float>{nullptr, 3, nullptr, 0, nullptr}, 0, nullptr);
}
