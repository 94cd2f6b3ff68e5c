// How a basis is chosen: the C++ half of lowrank_kernels/subspaces/.
#pragma once

#include <string_view>
#include <vector>

#include "spectrum.h"

namespace lowrank_kernels {

// svd = "randomized" (range finder) or "exact" (full SVD; on a GPU it waits for the host).
struct Method {
    std::string_view selection, svd;
    Accuracy accuracy;
};

// Successive sampling without replacement, P(i) ∝ σᵢ: (batch, k) → (batch, r) int64 indices, sorted by σ, descending. The top r of
// log σ + Gumbel noise (Efraimidis, Spirakis, Inf. Process. Lett. 97, 2006). One seed a row.
at::Tensor sample_importance(const at::Tensor& sigma, int64_t rank, at::IntArrayRef seeds);

// Bases as orthonormal rows: (…, m, n) gradients → (…, r, m), one seed a matrix.
at::Tensor choose(const Gradients& grad, int64_t rank, const Method& method, at::IntArrayRef seeds, const at::Tensor& peak);

}  // namespace lowrank_kernels
