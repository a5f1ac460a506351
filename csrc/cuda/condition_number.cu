// Condition numbers of batches of small matrices. Every matrix is read once into shared memory (and, for the singular
// vectors of one side, once more from cache); what goes out is a value and two pairs of vectors, never the dense
// gradient. float32 inputs are computed in double too: the smallest of 1e-5 would else drown in rounding.
//
// 2x2, the most frequent, has a closed form: one thread a matrix. Others have a block each, as large as their pairs of
// columns need (one warp for up to 8 columns), and their columns as doubles in shared memory: 138 KiB for 128x128.
// Where a block may not have as much, the columns lie in `scratch`, global memory of the caller.
#include <algorithm>
#include <limits>

#include "condition_number.h"
#include "cuda/jacobi.h"
#include "math/svd2x2.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 512;  // of jacobi_threads(128); one such block may have all registers, none is spilled

// Cosine of columns that count as orthogonal: results of type T do not show it.
template <typename T>
double orthogonality(int64_t length) {
  return sizeof(T) == 4 ? 1e-12 : 1e-15 * std::sqrt(double(length));
}

// ---- 2x2

template <typename T>
struct alignas(16) Matrix2x2 {
  T a, b, c, d;
};

// aligned: u may be read as Matrix2x2.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    two_by_two_kernel(const T* __restrict__ u, int64_t n, bool aligned, double rank_tol, T* __restrict__ value,
                      Matrix2x2<T>* __restrict__ left, Matrix2x2<T>* __restrict__ right) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  Matrix2x2<T> m;
  if (aligned) {
    m = reinterpret_cast<const Matrix2x2<T>*>(u)[i];
  } else {
    m = {u[4 * i], u[4 * i + 1], u[4 * i + 2], u[4 * i + 3]};
  }
  const Condition2x2 x = condition_2x2(m.a, m.b, m.c, m.d, rank_tol);
  value[i] = T(log1p(x.excess));
  // The gradient is written as its product with the identity.
  left[i] = {T(x.da), T(x.dc), T(x.db), T(x.dd)};
  right[i] = {T(1), T(0), T(0), T(1)};
}

// ---- any size

// Doubles for one matrix: its columns, and two a column for their norms or what is left of a factorization.
__host__ __device__ int64_t matrix_doubles(int64_t longer, int64_t shorter) {
  return shorter * (column_stride(longer) + 2);
}

template <typename T, bool kScratch>
__global__ void __launch_bounds__(kMostThreads, 1)
    log_condition_number_kernel(const T* __restrict__ u, int64_t n, int rows, int cols, double rank_tol,
                                double tolerance, T* __restrict__ value, T* __restrict__ left, T* __restrict__ right,
                                double* scratch) {
  D2NET_DYNAMIC_SHARED(double, shared);
  // Columns are the shorter side: rows of a wide or square matrix, which are contiguous in u.
  const bool transpose = rows <= cols;
  const int length = transpose ? cols : rows, count = transpose ? rows : cols, stride = int(column_stride(length));
  const bool factored = factored_first(count);
  const int column_length = factored ? count : length;
  double* a = kScratch ? scratch + blockIdx.x * matrix_doubles(length, count) : shared;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const T* x = u + i * rows * cols;
    int exponent = 0;  // its barrier is also the one between two matrices
    const bool finite = block_exponent(rows * cols, [=](int64_t k) { return x[k]; }, &exponent);
    const PowerOfTwo scaled(-exponent);
    Extremes found;
    bool proper = false;
    if (finite) {
      for (int k = threadIdx.x; k < rows * cols; k += blockDim.x) {
        const int r = k / cols, c = k % cols;
        a[transpose ? r * stride + c : c * stride + r] = scaled(x[k]);
      }
      __syncthreads();
      const double least = ldexp(rank_tol, -exponent);
      double* rest = a + count * stride;
      if (factored) replace_by_factor(a, length, count, stride, rest, rest + count);
      orthogonalize(a, column_length, count, stride, tolerance, least);
      proper = extreme_columns(a, column_length, count, stride, least, rest, &found);
    }
    if (threadIdx.x == 0) {
      value[i] = proper ? T(max(0.0, log(found.sigma[0] / found.sigma[1]))) : T(finite ? 0 : NAN);
    }
    T* of_long = transpose ? right + 2 * i * cols : left + 2 * i * rows;
    T* of_short = transpose ? left + 2 * i * rows : right + 2 * i * cols;
    if (!proper) {
      for (int k = threadIdx.x; k < 2 * length; k += blockDim.x) of_long[k] = T(finite ? 0 : NAN);
      for (int k = threadIdx.x; k < 2 * count; k += blockDim.x) of_short[k] = T(finite ? 0 : NAN);
    } else {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const double* column = a + found.column[s] * stride;  // sigma times a vector of one side; the other follows
        const double inverse = 1 / found.sigma[s], by = ldexp(s == 0 ? inverse : -inverse, -exponent);
        const double long_by = transpose ? 1 : by, short_by = transpose ? by : 1;  // `left` holds the quotient
        T *to_long = of_long + s * length, *to_short = of_short + s * count;
        for (int k = threadIdx.x; k < column_length; k += blockDim.x) {
          (factored ? to_short : to_long)[k] = T(column[k] * inverse * (factored ? short_by : long_by));
        }
        const auto element = [=](int64_t r, int64_t c) { return scaled(x[transpose ? c * cols + r : r * cols + c]); };
        group_sums(
            factored ? length : count, column_length,
            [=](int64_t i, int64_t k) { return (factored ? element(i, k) : element(k, i)) * column[k]; },
            [=](int64_t i, double sum) {
              (factored ? to_long : to_short)[i] = T(sum * inverse * inverse * (factored ? long_by : short_by));
            });
      }
    }
  }
}

// ---- products P Y

// Where things lie in the memory of a block, in doubles.
struct JointLayout {
  int64_t p, y, stride;         // columns of P and Y^T and their stride, if they are factored
  int64_t tau, diagonal;        // of both factors
  int64_t small, small_stride;  // the matrix that is decomposed
  int64_t rest;                 // two a column: norms, or what is left of its factorization
  int64_t left, right, by_p;    // u and v (2, classes), P^T u (2, items)
  int64_t total;

  __host__ __device__ JointLayout(int64_t classes, int64_t items) {
    const bool reduce = items < classes;
    const int64_t order = reduce ? items : classes, factored = reduce ? items : 0;
    stride = column_stride(classes);
    small_stride = column_stride(order);
    p = 0;
    y = p + factored * stride;
    tau = y + factored * stride;
    diagonal = tau + 2 * factored;
    small = diagonal + 2 * factored;
    rest = small + order * small_stride;
    left = rest + 2 * order;
    right = left + 2 * classes;
    by_p = right + 2 * classes;
    total = by_p + 2 * items;
  }
};

// x = H_0 ... H_{n-1} x, by one warp whose lanes own the elements as in factor().
__device__ void apply_reflectors(const double* columns, const double* tau, int length, int n, int64_t stride,
                                 double* x) {
  const int lane = threadIdx.x % 32;
  for (int k = n - 1; k >= 0; --k) {
    const double* v = columns + k * stride;
    const int begin = k / 32 * 32 + lane;
    double dot = 0;
    for (int i = begin; i < length; i += 32) {
      if (i >= k) dot += v[i] * x[i];
    }
    dot = tau[k] * warp_reduce(dot, Sum{});
    for (int i = begin; i < length; i += 32) {
      if (i >= k) x[i] -= dot * v[i];
    }
  }
}

// With fewer items than classes, QR of both, P = Q_p R_p and Y^T = Q_y R_y, leaves the small R_p R_y^T with the same
// singular values; else the product itself is small. Of its vectors only u is needed: u^T P, v^T = u^T P Y / sigma and
// Y v follow from the inputs.
template <typename T, bool kScratch>
__global__ void __launch_bounds__(kMostThreads, 1)
    joint_kernel(const T* __restrict__ p, const T* __restrict__ y, int64_t n, int classes, int items, double rank_tol,
                 double tolerance, T* __restrict__ value, T* __restrict__ p_left, T* __restrict__ p_right,
                 T* __restrict__ y_left, T* __restrict__ y_right, double* scratch) {
  D2NET_DYNAMIC_SHARED(double, shared);
  const JointLayout at(classes, items);
  const bool reduce = items < classes;
  const int order = reduce ? items : classes, stride = int(at.small_stride);
  const bool factored = factored_first(order);  // the matrix is transposed then: its right vectors are found
  double* memory = kScratch ? scratch + blockIdx.x * at.total : shared;
  double *a = memory + at.small, *u = memory + at.left, *v = memory + at.right, *by_p = memory + at.by_p;
  const int64_t size = int64_t(classes) * items;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const T *pi = p + i * size, *yi = y + i * size;
    T *pl = p_left + 2 * i * classes, *pr = p_right + 2 * i * items;
    T *yl = y_left + 2 * i * items, *yr = y_right + 2 * i * classes;
    int p_exponent = 0, y_exponent = 0, exponent = 0;  // the barrier for these also parts two products
    const bool p_finite = block_exponent(size, [=](int64_t k) { return pi[k]; }, &p_exponent);
    const bool finite = block_exponent(size, [=](int64_t k) { return yi[k]; }, &y_exponent) && p_finite;
    const PowerOfTwo p_scaled(-p_exponent), y_scaled(-y_exponent);
    Extremes found;
    bool proper = false;
    if (finite) {
      if (reduce) {
        double *ps = memory + at.p, *ys = memory + at.y, *diagonal = memory + at.diagonal;
        for (int64_t k = threadIdx.x; k < size; k += blockDim.x) {
          ps[k % items * at.stride + k / items] = p_scaled(pi[k]);
          ys[k / classes * at.stride + k % classes] = y_scaled(yi[k]);
        }
        __syncthreads();
        factor(ps, 2, classes, items, at.stride, memory + at.tau, diagonal);
        for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
          const int r = k % order, c = k / order;
          double sum = 0;
          for (int l = max(r, c); l < order; ++l) {
            sum +=
                (l == r ? diagonal[l] : ps[l * at.stride + r]) * (l == c ? diagonal[items + l] : ys[l * at.stride + c]);
          }
          a[factored ? r * stride + c : c * stride + r] = sum;
        }
      } else {
        for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
          const int r = k / order, c = k % order;
          double sum = 0;
          for (int64_t l = 0; l < items; ++l)
            sum += p_scaled(pi[r * int64_t(items) + l]) * y_scaled(yi[l * classes + c]);
          a[factored ? r * stride + c : c * stride + r] = sum;
        }
      }
      __syncthreads();
      block_exponent(order * order, [=](int64_t k) { return a[k / order * stride + k % order]; }, &exponent);
      const PowerOfTwo scaled(-exponent);
      for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
        double* x = a + k / order * stride + k % order;
        *x = scaled(*x);
      }
      __syncthreads();
      const double least = ldexp(rank_tol, -exponent - p_exponent - y_exponent);
      double* rest = memory + at.rest;
      if (factored) replace_by_factor(a, order, order, stride, rest, rest + order);
      orthogonalize(a, order, order, stride, tolerance, least);
      proper = extreme_columns(a, order, order, stride, least, rest, &found);
    }
    if (threadIdx.x == 0) {
      value[i] = proper ? T(max(0.0, log(found.sigma[0] / found.sigma[1]))) : T(finite ? 0 : NAN);
    }
    if (!proper) {
      const T none = T(finite ? 0 : NAN);
      for (int k = threadIdx.x; k < 2 * classes; k += blockDim.x) pl[k] = yr[k] = none;
      for (int k = threadIdx.x; k < 2 * items; k += blockDim.x) pr[k] = yl[k] = none;
      continue;
    }
    const int warp = threadIdx.x / 32;
    if (warp < 2) {
      const double* column = a + (warp == 0 ? found.column[0] : found.column[1]) * stride;
      const double inverse = 1 / (warp == 0 ? found.sigma[0] : found.sigma[1]);
      double* x = u + warp * classes;
      for (int k = threadIdx.x % 32; k < classes; k += 32) x[k] = k < order ? column[k] * inverse : 0;
      if (reduce) apply_reflectors(memory + at.p, memory + at.tau, classes, items, at.stride, x);
    }
    __syncthreads();
    // 1 / sigma of P Y, both scaled.
    const double inverse_first = ldexp(1 / found.sigma[0], -exponent);
    const double inverse_last = ldexp(1 / found.sigma[1], -exponent);
    for (int k = threadIdx.x; k < 2 * classes; k += blockDim.x) pl[k] = T(u[k]);
    group_sums(
        2 * int64_t(items), classes,
        [=](int64_t k, int64_t c) {
          const int64_t s = k >= items;
          return p_scaled(pi[c * items + k - s * items]) * u[s * classes + c];
        },
        [=](int64_t k, double sum) {
          by_p[k] = sum;
          yl[k] = T(ldexp(k < items ? sum * inverse_first : -sum * inverse_last, -y_exponent));
        });
    __syncthreads();
    group_sums(
        2 * int64_t(classes), items,
        [=](int64_t c, int64_t k) {
          const int64_t s = c >= classes;
          return y_scaled(yi[k * classes + c - s * classes]) * by_p[s * items + k];
        },
        [=](int64_t c, double sum) {
          v[c] = sum * (c < classes ? inverse_first : inverse_last);
          yr[c] = T(v[c]);
        });
    __syncthreads();
    group_sums(
        2 * int64_t(items), classes,
        [=](int64_t k, int64_t c) {
          const int64_t s = k >= items;
          return y_scaled(yi[(k - s * items) * classes + c]) * v[s * classes + c];
        },
        [=](int64_t k, double sum) {
          pr[k] = T(ldexp(k < items ? sum * inverse_first : -sum * inverse_last, -p_exponent));
        });
  }
}

// ---- backward

// One thread an element, in the order of memory.
template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    outer_kernel(const T* __restrict__ grad, const T* __restrict__ left, const T* __restrict__ right, Index rows,
                 Index cols, Index total, T* __restrict__ gradient) {
  const Index k = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= total) return;
  const Index row = k / cols, c = k % cols, i = row / rows, r = row % rows;
  const T *l = left + 2 * i * rows + r, *x = right + 2 * i * cols + c;
  gradient[k] = grad[i] * l[0] * x[0] + grad[i] * l[rows] * x[cols];
}

// ---- memory

bool fits(const Stream& on, int64_t doubles) {
  return doubles * int64_t(sizeof(double)) <= on.shared_memory_limit() - 1024;  // that of block_reduce
}
// With scratch in global memory a few blocks take turns, so that it stays small.
int64_t scratch_blocks(const Stream& on, int64_t n) { return std::min(n, 2 * on.multiprocessors()); }
int64_t scratch_doubles(const Stream& on, int64_t n, int64_t doubles) {
  return fits(on, doubles) ? 0 : doubles * scratch_blocks(on, n);
}

}  // namespace

int64_t log_condition_number_scratch(int64_t n, int64_t rows, int64_t cols, int device, void* stream) {
  const Stream on("log_condition_number", device, stream);
  return scratch_doubles(on, n, matrix_doubles(std::max(rows, cols), std::min(rows, cols)));
}

int64_t joint_log_condition_number_scratch(int64_t n, int64_t classes, int64_t items, int device, void* stream) {
  const Stream on("joint_log_condition_number", device, stream);
  return scratch_doubles(on, n, JointLayout(classes, items).total);
}

template <typename T>
void log_condition_number(const T* u, int64_t n, int64_t rows, int64_t cols, double rank_tol, T* value, T* left,
                          T* right, double* scratch, int device, void* stream) {
  const Stream on("log_condition_number", device, stream);
  if (rows == 2 && cols == 2) {
    const bool aligned = reinterpret_cast<uintptr_t>(u) % 16 == 0;
    on.launch(two_by_two_kernel<T>, (n + kThreads - 1) / kThreads, kThreads, 0, u, n, aligned, rank_tol, value,
              reinterpret_cast<Matrix2x2<T>*>(left), reinterpret_cast<Matrix2x2<T>*>(right));
    return;
  }
  const int64_t longer = std::max(rows, cols), shorter = std::min(rows, cols);
  const int64_t threads = jacobi_threads(shorter);
  const double tolerance = orthogonality<T>(longer);
  if (scratch == nullptr) {
    on.launch(log_condition_number_kernel<T, false>, n, threads, matrix_doubles(longer, shorter) * sizeof(double), u, n,
              int(rows), int(cols), rank_tol, tolerance, value, left, right, scratch);
  } else {
    on.launch(log_condition_number_kernel<T, true>, scratch_blocks(on, n), threads, 0, u, n, int(rows), int(cols),
              rank_tol, tolerance, value, left, right, scratch);
  }
}

template <typename T>
void joint_log_condition_number(const T* p, const T* y, int64_t n, int64_t classes, int64_t items, double rank_tol,
                                T* value, T* p_left, T* p_right, T* y_left, T* y_right, double* scratch, int device,
                                void* stream) {
  const Stream on("joint_log_condition_number", device, stream);
  const int64_t order = std::min(classes, items);
  const int64_t threads = std::max<int64_t>(128, jacobi_threads(order));
  const double tolerance = orthogonality<T>(order);
  if (scratch == nullptr) {
    on.launch(joint_kernel<T, false>, n, threads, JointLayout(classes, items).total * sizeof(double), p, y, n,
              int(classes), int(items), rank_tol, tolerance, value, p_left, p_right, y_left, y_right, scratch);
  } else {
    on.launch(joint_kernel<T, true>, scratch_blocks(on, n), threads, 0, p, y, n, int(classes), int(items), rank_tol,
              tolerance, value, p_left, p_right, y_left, y_right, scratch);
  }
}

template <typename T>
void log_condition_number_backward(const T* grad, const T* left, const T* right, int64_t n, int64_t rows, int64_t cols,
                                   T* gradient, int device, void* stream) {
  const Stream on("log_condition_number_backward", device, stream);
  const int64_t total = n * rows * cols, blocks = (total + kThreads - 1) / kThreads;
  if (total < std::numeric_limits<int>::max() / 2) {  // divisions of 32 bits are much cheaper
    on.launch(outer_kernel<T, unsigned>, blocks, kThreads, 0, grad, left, right, unsigned(rows), unsigned(cols),
              unsigned(total), gradient);
  } else {
    on.launch(outer_kernel<T, int64_t>, blocks, kThreads, 0, grad, left, right, rows, cols, total, gradient);
  }
}

#define D2NET_INSTANTIATE(T)                                                                                           \
  template void log_condition_number<T>(const T*, int64_t, int64_t, int64_t, double, T*, T*, T*, double*, int, void*); \
  template void joint_log_condition_number<T>(const T*, const T*, int64_t, int64_t, int64_t, double, T*, T*, T*, T*,   \
                                              T*, double*, int, void*);                                                \
  template void log_condition_number_backward<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, T*, int,     \
                                                 void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda
