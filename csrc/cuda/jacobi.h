// The singular value decomposition of small matrices, batched, with no host synchronisation: one-sided Jacobi.
//
//     A = U·Σ·Vᵀ:  A·V = U·Σ, where V is a product of plane rotations that make the columns of A orthogonal in pairs
//
// Applied to a factor A of S = A·Aᵀ it solves the symmetric eigenproblem of S: columns of U are eigenvectors, Σ² eigenvalues. The
// columns are scaled by any factor without loss: singular values come out with relative errors of about u·κ(A·D⁻¹), D the columns'
// lengths, where eigh(S) loses all under √u·σ₁.
//
// A sweep lets every two columns meet once, in rounds of l / 2 disjoint pairs: one launch a round, one block a pair, so l − 1 launches
// (l for odd l) a sweep. A pair rotates while |p·q| > 2⁻²³·‖p‖‖q‖ (2⁻⁵² in fp64). A sweep in which no pair of a matrix was above 2⁻²⁰
// (2⁻⁴⁹) ends it: later launches return at once. Columns keep their places: exchanging them on the way, as a serial Jacobi does to sort,
// makes pairs miss each other and took half as many sweeps again.
// Flops a sweep and matrix: about 7·l²·rows. Memory: l²·rows elements read twice and written once, mostly in L2.
//
// Squares of lengths must neither overflow nor underflow: scale the largest column to about 1. Zero columns, and those whose square
// underflows, are left as they are; so is what holds a NaN. Columns of length under u·l·σ₁ of a rank-deficient A are rounding errors
// and shrink further with every sweep, possibly until that happens.
//
// Sources: Hestenes, J. SIAM 6 (1958); Demmel, Veselić, SIAM J. Matrix Anal. Appl. 13 (1992) for the accuracy; Rutishauser, Numer. Math. 9
// (1966) for the form of the rotation; Brent, Luk, SIAM J. Sci. Stat. Comput. 6 (1985) for the rounds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lowrank_kernels::cuda {

// vectors (batch, l, rows) row-major: each of the l columns of A is contiguous. In place U·Σ, the columns in no order.
// flags (max_sweeps, batch), workspace: flags[s][b] = 1 if sweep s met a pair far from orthogonal in matrix b. A 0 in the last row says
// that b converged. Cholesky factors of spread spectra took 5 to 10 sweeps up to l = 340, clustered or rank-deficient matrices up to 16.
// T is float or double. Asynchronous, the same bits on every run and in every batch.
template <typename T>
cudaError_t jacobi(T* vectors, int l, int64_t rows, int64_t batch, int* flags, int max_sweeps, cudaStream_t stream);

extern template cudaError_t jacobi(float*, int, int64_t, int64_t, int*, int, cudaStream_t);
extern template cudaError_t jacobi(double*, int, int64_t, int64_t, int*, int, cudaStream_t);

}  // namespace lowrank_kernels::cuda
