// Orthonormal rows by shifted CholeskyQR (Fukaya, Nakatsukasa, Yanagisawa, Yamamoto, SIAM J. Sci. Comput. 42, 2020).
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace lowrank_kernels {

// Yt → L⁻¹·Yt with L·Lᵀ = Y·Yᵀ + shift·I, the rows scaled to length 1 first: (…, l, m) → (…, l, m).
//
// The shift, 11·(m + l)·l·u as Fukaya et al. have it, keeps the factorisation from failing and lifts small singular values by up to
// 1/sqrt(shift): one such pass is all that a power iteration needs between its products. For that to be much the Gram matrix is fp64: in
// fp32 a shift large enough for sums of m products, which may all err alike, would lift by ten, and lengths be off by 1e-5. Without it,
// well-conditioned rows become orthonormal.
at::Tensor cholesky_pass(const at::Tensor& rows, bool shifted = true);

// The unshifted pass over one matrix (l, m) on a CPU, or nothing where its rows are too near to dependent for it (condition above
// about 10³), not finite, or zero.
std::optional<at::Tensor> well_conditioned_pass(const at::Tensor& rows);

// Q with Q·Qᵀ = I, whose first k rows span the first k of Yt: (…, l, m), l ≤ m, fp32 or fp64 → the same shape.
//
// Rows that are zero, not finite or dependent on earlier ones come back as random directions (a function of `seed`) orthogonal to the
// rest: ‖Q·Qᵀ − I‖ ≤ 1e-5 in fp32 for every input. One matrix on a CPU: two unshifted passes where they are enough, else Householder's
// QR, which takes less time there. Otherwise, and always on a GPU, where asking would stall it: three shifted passes and one without.
at::Tensor orthonormalise(const at::Tensor& rows, int64_t seed);

// U ← (3/2·I − 1/2·U·Uᵀ)·U, which squares the defect of nearly orthonormal rows.
at::Tensor polish(const at::Tensor& rows);

}  // namespace lowrank_kernels
