// Factors of l × l matrices and random numbers: what a device does with its own code. Nothing here waits for a GPU.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace lowrank_kernels {

// L⁻¹ of S + shift·I = L·Lᵀ, lower triangular: fp64 (…, l, l) → (…, l, l) of `dtype`. The identity where the factorisation fails.
// CUDA: one kernel for every l whose packed triangle fits shared memory (cuda/cholesky_inverse.h), cuSOLVER and cuBLAS above.
at::Tensor inverse_factor(const at::Tensor& gram, double shift, at::ScalarType dtype);

// N(0, 1) of shape (seeds, *shape): philox.normal in Python, whose words it shares bit for bit.
at::Tensor normals(at::IntArrayRef seeds, at::IntArrayRef shape, uint32_t stream, const at::TensorOptions& options);
// … for one seed, of that shape.
at::Tensor normal(int64_t seed, at::IntArrayRef shape, uint32_t stream, const at::TensorOptions& options);
// Standard Gumbel (seeds, count) in fp32: philox.gumbel.
at::Tensor gumbel(at::IntArrayRef seeds, int64_t count, uint32_t stream, const at::Device& device);

// Successive sampling without replacement, P(i) ∝ σᵢ: (batch, k) → (batch, r) int64 indices, sorted by σ, descending. The top r of
// log σ + Gumbel noise (Efraimidis, Spirakis, Inf. Process. Lett. 97, 2006). One seed a row.
at::Tensor sample_importance(const at::Tensor& sigma, int64_t rank, at::IntArrayRef seeds);

}  // namespace lowrank_kernels
