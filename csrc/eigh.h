// Eigenvalues and eigenvectors of small symmetric matrices, on each device by its own means. Nothing here waits for a GPU.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "cuda/eigensolvers.h"

namespace lowrank_kernels {

struct Eigen {
    at::Tensor values, vectors;
};

// Eigenvalues, descending, and eigenvectors, as rows, of Gram matrices (…, k, k) of vectors of length `terms`: symmetric, and positive
// semidefinite to the rounding of such sums. fp64; on a CPU also fp32, whose vectors are orthonormal to some 1e-5 only.
// CPU: LAPACK. CUDA: the solver that cuda/eigensolvers.h names for the size, or `solver`. A matrix that cuSOLVER reports a failure of has
// NaN for its values and vectors; the report itself stays on the device.
Eigen eigh(const at::Tensor& gram, int64_t terms, std::optional<cuda::Eigensolver> solver = std::nullopt);

}  // namespace lowrank_kernels
