// R⁻¹, upper triangular, of RᵀR = S + shift·I, batched: what a CholeskyQR pass multiplies by, so that orth(Y) = Y·R⁻¹ is a GEMM.
//
//     S = LLᵀ (left-looking, panels of 8);  X = L⁻¹ (forward substitution, in place);  R⁻¹ = Xᵀ
//
// Flops a matrix: l³/3 to factor, l³/3 to invert. Memory: l² / 2 elements read, l² written. One thread block a matrix; the only storage
// is one packed lower triangle in shared memory, l(l + 1)/2 elements, which holds S, then L, then X:
//
//     shared memory a block   fp32      fp64
//     163 KB (sm_80)          l ≤ 288   l ≤ 203
//     227 KB (sm_90, sm_100)  l ≤ 340   l ≤ 240
//
// Everything is computed in T, sums in a fixed order. Where a pivot is not positive and finite, which includes every S with a NaN or an
// infinity in its lower triangle, the matrix's result is the identity.
//
// Sources: Higham, Accuracy and Stability of Numerical Algorithms, chapters 10 and 14; Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci.
// Comput. 42 (2020), for the use.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lowrank_kernels::cuda {

// Dynamic shared memory of a block, in bytes.
int64_t cholesky_inverse_shared_bytes(int l, size_t itemsize);

// The largest l for a device whose cudaDevAttrMaxSharedMemoryPerBlockOptin is shared_limit.
int cholesky_inverse_max_columns(int64_t shared_limit, size_t itemsize);

// gram (batch, l, l) row-major, of which only the lower triangle is read → inverse (batch, l, l) row-major, zeros below the diagonal.
// They may not overlap. T is float or double. Asynchronous; cudaErrorInvalidValue where l does not fit the device.
template <typename T>
cudaError_t cholesky_inverse(const T* gram, T* inverse, int l, int64_t batch, T shift, cudaStream_t stream);

extern template cudaError_t cholesky_inverse(const float*, float*, int, int64_t, float, cudaStream_t);
extern template cudaError_t cholesky_inverse(const double*, double*, int, int64_t, double, cudaStream_t);

}  // namespace lowrank_kernels::cuda
