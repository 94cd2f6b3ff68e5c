// The kernels of this folder on tensors, on the current stream of the tensors' device. Nothing here waits for it.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "eigensolvers.h"

namespace lowrank_kernels::cuda {

// See ../small.h. Nothing where l is too large for the device's shared memory. Where fp64 does not fit but fp32 does, and is what is
// asked for, the factor is fp32, of an S that was summed in fp64, with a shift for its own rounding.
std::optional<at::Tensor> inverse_factor(const at::Tensor& gram, double shift, at::ScalarType dtype);

// See ../eigh.h; fp64.
std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& gram, int64_t terms, std::optional<Eigensolver> solver);

// (seeds, count).
at::Tensor normal(at::IntArrayRef seeds, int64_t count, uint32_t stream, const at::TensorOptions& options);
at::Tensor gumbel(at::IntArrayRef seeds, int64_t count, uint32_t stream, const at::Device& device);

}  // namespace lowrank_kernels::cuda
