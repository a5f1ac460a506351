// Condition numbers of batches of small matrices. Every matrix is read once into shared memory (and, for the singular
// vectors of one side, once more from cache); what goes out is a value and two pairs of vectors, never the dense
// gradient. float32 inputs are computed in double too: singular values near 1e-5 would be lost in rounding.
//
// 2x2, the most frequent, has a closed form: one thread a matrix. Other sizes have a block for each matrix, as large as
// its pairs of columns need (one warp for up to 8 columns), and the columns as doubles in shared memory: 138 KiB for
// 128x128. On chips with less shared memory the columns lie in `scratch`, global memory of the caller.
#include <algorithm>
#include <limits>

#include "condition_number.h"
#include "cuda/common/joint.h"
#include "math/svd2x2.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 512;  // jacobi_threads(128); one block a multiprocessor, so that no register is spilled

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
  // left is the gradient, transposed; right the identity.
  left[i] = {T(x.da), T(x.dc), T(x.db), T(x.dd)};
  right[i] = {T(1), T(0), T(0), T(1)};
}

// ---- any size

// Doubles for one matrix: its columns, and two more for each, for norms or for tau and diagonal of a factorization.
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
  const bool factored = factored_first(length, count);
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
    T* long_vectors = transpose ? right + 2 * i * cols : left + 2 * i * rows;
    T* short_vectors = transpose ? left + 2 * i * rows : right + 2 * i * cols;
    if (!proper) {
      for (int k = threadIdx.x; k < 2 * length; k += blockDim.x) long_vectors[k] = T(finite ? 0 : NAN);
      for (int k = threadIdx.x; k < 2 * count; k += blockDim.x) short_vectors[k] = T(finite ? 0 : NAN);
    } else {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const double* column = a + found.column[s] * stride;  // sigma times a vector of one side; the other follows
        const double inverse = 1 / found.sigma[s], by = scaled(s == 0 ? inverse : -inverse);
        const double long_by = transpose ? 1 : by, short_by = transpose ? by : 1;  // `left` holds the quotient
        T *to_long = long_vectors + s * length, *to_short = short_vectors + s * count;
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

// One block for each product; a loop over products would need more registers.
template <typename T, bool kScratch>
__global__ void __launch_bounds__(kMostThreads, 1)
    joint_kernel(const T* __restrict__ p, const T* __restrict__ y, int classes, int items, double rank_tol,
                 double tolerance, T* __restrict__ value, T* __restrict__ p_left, T* __restrict__ p_right,
                 T* __restrict__ y_left, T* __restrict__ y_right, double* scratch) {
  D2NET_DYNAMIC_SHARED(double, shared);
  double* memory = kScratch ? scratch + blockIdx.x * JointLayout(classes, items).total : shared;
  const int64_t i = blockIdx.x, size = int64_t(classes) * items;
  joint_condition_number(p + i * size, y + i * size, classes, items, rank_tol, tolerance, value + i,
                         p_left + 2 * i * classes, p_right + 2 * i * items, y_left + 2 * i * items,
                         y_right + 2 * i * classes, memory);
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
  return doubles * int64_t(sizeof(double)) <= on.shared_memory_limit() - 1024;  // less what block_reduce uses
}
// With scratch in global memory there are few blocks, so that it stays small.
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
void log_condition_number(const LogConditionNumber<T>& x, int device, void* stream) {
  const Stream on("log_condition_number", device, stream);
  if (x.rows == 2 && x.cols == 2) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.u) % 16 == 0;
    on.launch(two_by_two_kernel<T>, (x.n + kThreads - 1) / kThreads, kThreads, 0, x.u, x.n, aligned, x.rank_tol,
              x.value, reinterpret_cast<Matrix2x2<T>*>(x.left), reinterpret_cast<Matrix2x2<T>*>(x.right));
    return;
  }
  const int64_t longer = std::max(x.rows, x.cols), shorter = std::min(x.rows, x.cols);
  const int64_t threads = jacobi_threads(shorter);
  const double tolerance = orthogonality<T>(longer);
  if (x.scratch == nullptr) {
    on.launch(log_condition_number_kernel<T, false>, x.n, threads, matrix_doubles(longer, shorter) * sizeof(double),
              x.u, x.n, int(x.rows), int(x.cols), x.rank_tol, tolerance, x.value, x.left, x.right, x.scratch);
  } else {
    on.launch(log_condition_number_kernel<T, true>, scratch_blocks(on, x.n), threads, 0, x.u, x.n, int(x.rows),
              int(x.cols), x.rank_tol, tolerance, x.value, x.left, x.right, x.scratch);
  }
}

template <typename T>
void joint_log_condition_number(const JointLogConditionNumber<T>& x, int device, void* stream) {
  const Stream on("joint_log_condition_number", device, stream);
  const int64_t threads = joint_threads(x.classes, x.items);
  const double tolerance = orthogonality<T>(std::min(x.classes, x.items));
  const bool shared = x.scratch == nullptr;
  const auto kernel = shared ? joint_kernel<T, false> : joint_kernel<T, true>;
  const int64_t bytes = shared ? JointLayout(x.classes, x.items).total * sizeof(double) : 0;
  const int64_t blocks = shared ? x.n : scratch_blocks(on, x.n), size = x.classes * x.items;
  for (int64_t i = 0; i < x.n; i += blocks) {
    on.launch(kernel, std::min(blocks, x.n - i), threads, bytes, x.p + i * size, x.y + i * size, int(x.classes),
              int(x.items), x.rank_tol, tolerance, x.value + i, x.p_left + 2 * i * x.classes,
              x.p_right + 2 * i * x.items, x.y_left + 2 * i * x.items, x.y_right + 2 * i * x.classes, x.scratch);
  }
}

template <typename T>
void log_condition_number_backward(const LogConditionNumber<T>& x, int device, void* stream) {
  const Stream on("log_condition_number_backward", device, stream);
  const int64_t total = x.n * x.rows * x.cols, blocks = (total + kThreads - 1) / kThreads;
  if (total < std::numeric_limits<int>::max() / 2) {  // divisions of 32 bits are much cheaper
    on.launch(outer_kernel<T, unsigned>, blocks, kThreads, 0, x.grad_value, x.left, x.right, unsigned(x.rows),
              unsigned(x.cols), unsigned(total), x.grad_u);
  } else {
    on.launch(outer_kernel<T, int64_t>, blocks, kThreads, 0, x.grad_value, x.left, x.right, x.rows, x.cols, total,
              x.grad_u);
  }
}

D2NET_INSTANTIATE_CUDA(log_condition_number, LogConditionNumber)
D2NET_INSTANTIATE_CUDA(log_condition_number_backward, LogConditionNumber)
D2NET_INSTANTIATE_CUDA(joint_log_condition_number, JointLogConditionNumber)

}  // namespace d2net::cuda
