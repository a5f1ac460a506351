// Inputs of a few thousand numbers, on the caller's thread.
#include "batch_loss.h"

#include <algorithm>
#include <vector>

#include "math/peaks.h"

namespace d2net::cpu {
namespace {

// Flag: of recordings that count, bool or a number above 0.
template <typename Flag>
int64_t count_of(const Flag* counted, int64_t b) {
  return std::count_if(counted, counted + b, [](Flag flag) { return flag > 0; });
}

// The mean of values[i] where counted[i] > 0.
template <typename T, typename Flag>
double mean_of(const T* values, const Flag* counted, int64_t b) {
  double sum = 0;
  for (int64_t i = 0; i < b; ++i) sum += counted[i] > 0 ? double(values[i]) : 0;
  const int64_t count = count_of(counted, b);
  return count > 0 ? sum / count : 0;
}

// gradient[i] = grad / count where counted[i] > 0.
template <typename T, typename Flag>
void spread_mean(double grad, const Flag* counted, int64_t b, T* gradient) {
  const int64_t count = count_of(counted, b);
  for (int64_t i = 0; i < b; ++i) gradient[i] = counted[i] > 0 ? T(grad / count) : T(0);
}

template <typename T>
double or_zero(const T* x) {
  return x == nullptr ? 0 : double(*x);
}

// A term of weight 0 is off, whatever it is: NaN * 0 would be NaN.
double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

}  // namespace

template <typename T>
void video_factors(const T* pooled, const T* labels, const int64_t* counted, int64_t b, int64_t c, double floor,
                   double peak_share, bool per_class, T* p, T* y, int) {
  std::vector<double> size(c, per_class ? 0 : double(count_of(counted, b)));
  for (int64_t i = 0; per_class && i < b; ++i) {
    for (int64_t k = 0; k < c; ++k) size[k] += counted[i] > 0 ? double(labels[i * c + k]) : 0;
  }
  for (int64_t i = 0; i < b; ++i) {
    const T* row = pooled + i * c;
    Peaks<T> peaks{T(floor), T(peak_share)};
    for (int64_t k = 0; k < c; ++k) peaks.compare(row[k]);
    for (int64_t k = 0; k < c; ++k) peaks.add(row[k]);
    for (int64_t k = 0; k < c; ++k) {
      p[k * b + i] = peaks.value(row[k]);
      y[i * c + k] = counted[i] > 0 ? T(labels[i * c + k] / std::max(size[k], 1.0)) : T(0);
    }
  }
}

template <typename T>
void video_factors_backward(const T* grad, const T* pooled, int64_t b, int64_t c, double floor, double peak_share,
                            T* grad_pooled, int) {
  for (int64_t i = 0; i < b; ++i) {
    const T* row = pooled + i * c;
    Peaks<T> peaks{T(floor), T(peak_share)};
    for (int64_t k = 0; k < c; ++k) peaks.compare(row[k]);
    for (int64_t k = 0; k < c; ++k) peaks.add(row[k]);
    double along = 0;  // the gradient times the value
    for (int64_t k = 0; k < c; ++k) along += double(grad[k * b + i]) * peaks.value(row[k]);
    for (int64_t k = 0; k < c; ++k) grad_pooled[i * c + k] = peaks.gradient(row[k], grad[k * b + i], along);
  }
}

template <typename T>
void total_loss(const T* discriminative, const int64_t* counted, const T* snippet, const bool* valid, const T* video,
                const T* other, int64_t b, double alpha_snippet, double alpha_video, double weight, T* total, T* mean,
                T* snippet_mean, T* video_out, T* other_out, int) {
  const double dis = mean_of(discriminative, counted, b), snip = snippet == nullptr ? 0 : mean_of(snippet, valid, b);
  *video_out = T(or_zero(video));
  *other_out = T(or_zero(other));
  *total =
      T(dis + weighted(alpha_snippet, snip) + weighted(alpha_video, or_zero(video)) + weighted(weight, or_zero(other)));
  *mean = T(dis);
  *snippet_mean = T(snip);
}

template <typename T>
void total_loss_backward(const T* to_total, const T* to_mean, const T* to_snippet, const T* to_video, const T* to_other,
                         const int64_t* counted, const bool* valid, int64_t b, double alpha_snippet, double alpha_video,
                         double weight, T* grad_discriminative, T* grad_snippet, T* grad_video, T* grad_other, int) {
  const double total = or_zero(to_total);
  spread_mean(total + or_zero(to_mean), counted, b, grad_discriminative);
  if (grad_snippet != nullptr)
    spread_mean(weighted(alpha_snippet, total) + or_zero(to_snippet), valid, b, grad_snippet);
  if (grad_video != nullptr) *grad_video = T(weighted(alpha_video, total) + or_zero(to_video));
  if (grad_other != nullptr) *grad_other = T(weighted(weight, total) + or_zero(to_other));
}

template <typename T>
void update_reference(T* reference, const T* background, const bool* valid, int64_t b, int64_t d, double momentum,
                      int) {
  const int64_t count = count_of(valid, b);
  if (count == 0) return;
  std::vector<double> sum(d);
  for (int64_t i = 0; i < b; ++i) {
    if (!valid[i]) continue;
    for (int64_t k = 0; k < d; ++k) sum[k] += background[i * d + k];
  }
  for (int64_t k = 0; k < d; ++k) reference[k] = T(momentum * reference[k] + (1 - momentum) / count * sum[k]);
}

#define D2NET_INSTANTIATE(T)                                                                                          \
  template void video_factors<T>(const T*, const T*, const int64_t*, int64_t, int64_t, double, double, bool, T*, T*,  \
                                 int);                                                                                \
  template void video_factors_backward<T>(const T*, const T*, int64_t, int64_t, double, double, T*, int);             \
  template void total_loss<T>(const T*, const int64_t*, const T*, const bool*, const T*, const T*, int64_t, double,   \
                              double, double, T*, T*, T*, T*, T*, int);                                               \
  template void total_loss_backward<T>(const T*, const T*, const T*, const T*, const T*, const int64_t*, const bool*, \
                                       int64_t, double, double, double, T*, T*, T*, T*, int);                         \
  template void update_reference<T>(T*, const T*, const bool*, int64_t, int64_t, double, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu
