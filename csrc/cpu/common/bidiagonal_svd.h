// The largest singular value of a bidiagonal matrix and the smallest one that counts, by bisection, and their vectors,
// by inverse iteration.
//
// Singular triplets of B are eigenpairs of the symmetric tridiagonal matrix of order 2n that has a zero diagonal and
// beside it the entries of B in their order, b = (d_0, e_0, d_1, ..., e_{n-2}, d_{n-1}): its eigenvalues are the
// singular values and their negatives, and the eigenvector of sigma is (v_0, u_0, v_1, u_1, ...) / sqrt(2). Unlike
// B^T B it keeps the relative accuracy of small singular values. Entries are of order 1 or smaller.
#pragma once

#include <cstdint>

namespace d2net::cpu {

// b (2 n) -> sigma (2): the largest singular value and the smallest above rank_tol. proper: there are two of them.
// squares: scratch (2 n).
void extreme_values_of_one(const double* b, int64_t n, const double* rank_tol, double precision, double* squares,
                           double* sigma, bool* proper);

// The same of kGroup matrices b (2 n, kGroup): sigma (2, kGroup), rank_tol and proper (kGroup), squares
// (2 n, 2 kGroup).
void extreme_values_of_group(const double* b, int64_t n, const double* rank_tol, double precision, double* squares,
                             double* sigma, bool* proper);

// b (2 n, 2), the same matrix twice, and sigma (2) -> rows u (2, n), v (2, n) of unit length, u_side and v_side apart.
// work: scratch (12 n, 2).
void singular_vectors_of_one(const double* b, int64_t n, const double* sigma, double* work, double* u, int64_t u_side,
                             double* v, int64_t v_side);

// The same of kGroup matrices: b (2 n, 2, kGroup), sigma (2, kGroup), u and v (2, n, kGroup), work (12 n, 2, kGroup).
void singular_vectors_of_group(const double* b, int64_t n, const double* sigma, double* work, double* u, int64_t u_side,
                               double* v, int64_t v_side);

}  // namespace d2net::cpu
