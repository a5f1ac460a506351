// Nearest smaller numbers of a column: a tree of minima, which all threads of a block read.
#pragma once

#include "cuda/common/device.h"

namespace d2net::cuda {

// Minima of neighbouring pairs of numbers (the leaves), of those in turn, and so on up to one. A column of n snippets
// has the leaves 0, its levels, 0, so that every search finds one.
struct MinTree {
  int32_t* nodes;
  int32_t leaves;

  static int64_t size(int64_t snippets) { return 2 * (snippets + 2) + 32; }  // a level may be odd: one more for each

  __device__ int32_t operator[](int32_t leaf) const { return nodes[leaf]; }

  // All threads of the block, which have written the leaves.
  __device__ void build() const {
    int32_t base = 0;
    for (int32_t width = leaves; width > 1;) {
      const int32_t above = (width + 1) / 2;
      __syncthreads();
      for (int32_t i = threadIdx.x; i < above; i += blockDim.x) {
        const int32_t left = nodes[base + 2 * i];
        nodes[base + width + i] = 2 * i + 1 < width ? min(left, nodes[base + 2 * i + 1]) : left;
      }
      base += width;
      width = above;
    }
    __syncthreads();
  }

  // The nearest leaf before i that is at most `bound`; there must be one. (Up until such a leaf lies under the node
  // before, then down to it. That node is not the last of its level, so it has two children.)
  __device__ int32_t last_at_most(int32_t i, int32_t bound) const {
    int32_t base = 0;
    int height = 0;
    for (; i % 2 == 0 || nodes[base + i - 1] > bound; i /= 2) base += width_at(height++);
    --i;
    while (height > 0) {
      base -= width_at(--height);
      i = 2 * i + 1;
      if (nodes[base + i] > bound) --i;
    }
    return i;
  }

  // The same after i.
  __device__ int32_t next_at_most(int32_t i, int32_t bound) const {
    int32_t base = 0;
    int height = 0;
    for (; i % 2 == 1 || i + 1 == width_at(height) || nodes[base + i + 1] > bound; i /= 2) base += width_at(height++);
    ++i;
    while (height > 0) {
      base -= width_at(--height);
      i = 2 * i;
      if (nodes[base + i] > bound) ++i;
    }
    return i;
  }

 private:
  __device__ int32_t width_at(int height) const { return ((leaves - 1) >> height) + 1; }
};

}  // namespace d2net::cuda
