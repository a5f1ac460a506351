// Vectors without intrinsics: the hot loops are plain loops, compiled once for each of a few instruction sets, and the
// loader picks the best that the machine has. One build runs everywhere and no flag asks for this machine's chip.
//
//   D2NET_SIMD void scale(float* x, int64_t n) { for (int64_t i = 0; i < n; ++i) x[i] *= 2; }
//
// Put it on a free, non-template function that holds whole loops; mark what the loop calls [[gnu::always_inline]] (a
// mere `inline` may stay a call to a version without vectors, several times slower). Write sums that
// may be reordered with `#pragma omp simd reduction(+ : sum)` (needs no OpenMP runtime).
#pragma once

// The loader's choice runs before a sanitizer is ready, so sanitized builds take the plain version.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define D2NET_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define D2NET_SIMD
#endif
