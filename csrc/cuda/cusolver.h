// Symmetric eigenproblems by cuSOLVER's cusolverDnXsyevBatched, through its C API, on torch's handle and the current stream.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace lowrank_kernels::cuda {

// Whether cuSOLVER may be called now: this build has seen headers of 11.7.1 or newer (CUDA 12.6.2), and the current stream is not being
// captured. What cuSOLVER does on the host during a call would be missing from a replay.
bool cusolver_serves();

// As eigh_by in syev_batched.h. An error where cuSOLVER does not serve, or refuses the call.
std::tuple<at::Tensor, at::Tensor> eigh_by_cusolver(const at::Tensor& gram);

}  // namespace lowrank_kernels::cuda
