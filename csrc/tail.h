// The singular values that a sketch leaves out: the C++ half of lowrank_kernels/subspaces/tail.py, where the model stands.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace lowrank_kernels {

// Weights (…, count) of the values left out, from Bt (…, s, m), B = (I − U·Uᵀ)·G·Ω, and the σ (…, h) that are known. All E / S, t = S² / E
// times, the last in part, and zero after that.
at::Tensor tail_weights(const at::Tensor& block, const at::Tensor& sigma, int64_t count, int64_t anchor);

}  // namespace lowrank_kernels
