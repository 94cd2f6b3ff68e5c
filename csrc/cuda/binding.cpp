#include "binding.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <limits>

#include "cholesky_inverse.h"
#include "cusolver.h"
#include "jacobi.h"
#include "sketch.h"

namespace lowrank_kernels::cuda {
namespace {

// Sweeps until a pair that does not turn is met everywhere: 8 to 10 on spread spectra, 15 on clusters. Later launches return at once.
constexpr int MAX_SWEEPS = 20;

int64_t shared_limit(const at::Tensor& tensor) {
    int bytes = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, tensor.device().index()));
    return bytes;
}

cudaStream_t stream_of(const at::Device& device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

// From pinned memory, so that the host goes on; torch keeps that memory until the copy is done.
at::Tensor on_device(at::IntArrayRef values, const at::Device& device) {
    const auto options = at::TensorOptions(at::kLong).pinned_memory(true);
    const at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, options);
    std::copy(values.begin(), values.end(), host.mutable_data_ptr<int64_t>());
    return host.to(device, /*non_blocking=*/true);
}

template <typename T>
at::Tensor inverse_factor_of(const at::Tensor& gram, double shift) {
    const at::Tensor dense = gram.contiguous();
    at::Tensor inverse = at::empty_like(dense);
    const int64_t l = dense.size(-1);
    C10_CUDA_CHECK(cholesky_inverse<T>(dense.const_data_ptr<T>(), inverse.mutable_data_ptr<T>(), static_cast<int>(l),
                                       dense.numel() / (l * l), static_cast<T>(shift), stream_of(dense.device())));
    return inverse.mT();  // the kernel's R⁻¹ is (L⁻¹)ᵀ
}

}  // namespace

std::optional<at::Tensor> inverse_factor(const at::Tensor& gram, double shift, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(gram.device());
    const int64_t l = gram.size(-1), shared = shared_limit(gram);
    if (l <= cholesky_inverse_max_columns(shared, sizeof(double))) return inverse_factor_of<double>(gram, shift).to(dtype);
    if (dtype != at::kFloat || l > cholesky_inverse_max_columns(shared, sizeof(float))) return std::nullopt;
    const double least = 2 * std::numeric_limits<float>::epsilon() * static_cast<double>(l);
    return inverse_factor_of<float>(gram.to(at::kFloat), shift > 0 ? std::max(shift, least) : 0.0);
}

namespace {

std::tuple<at::Tensor, at::Tensor> eigh_by_jacobi(const at::Tensor& gram, int64_t terms) {
    const int64_t k = gram.size(-1);
    const at::Tensor identity = at::eye(k, gram.options());
    const at::Tensor largest = gram.diagonal(0, -2, -1).amax(-1, true);
    const at::Tensor usable = at::isfinite(largest).logical_and_(largest > 0);
    // The shift keeps the factorisation from failing, and the vectors of a null space apart: sums of `terms` products may all err alike.
    const double shift = std::numeric_limits<double>::epsilon() * static_cast<double>(2 * k + terms);
    auto [factor, failed] = at::linalg_cholesky_ex(gram / at::where(usable, largest, 1.0).unsqueeze(-1) + shift * identity);
    factor = at::where((failed != 0).unsqueeze(-1).unsqueeze(-1), identity, factor);
    // The columns of L, as rows: L·J = W·Σ.
    const at::Tensor turned = factor.mT().contiguous();
    const int64_t batch = turned.numel() / (k * k);
    const at::Tensor flags = at::empty({MAX_SWEEPS, batch}, gram.options().dtype(at::kInt));
    C10_CUDA_CHECK(jacobi<double>(turned.mutable_data_ptr<double>(), static_cast<int>(k), k, batch, flags.mutable_data_ptr<int>(),
                                  MAX_SWEEPS, stream_of(gram.device())));
    const auto [lengths, order] = at::linalg_vector_norm(turned, 2, at::IntArrayRef{-1}).sort(-1, /*descending=*/true);
    const at::Tensor vectors = turned.gather(-2, order.unsqueeze(-1).expand_as(turned)) / lengths.unsqueeze(-1);
    return {(lengths.square() - shift).clamp_min_(0.0).mul_(at::where(usable, largest, 0.0)), vectors};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& gram, int64_t terms, std::optional<Eigensolver> solver) {
    const c10::cuda::CUDAGuard guard(gram.device());
    const int64_t l = gram.size(-1);
    TORCH_CHECK(l > 0, "eigh takes matrices of one row or more, got ", gram.sizes());
    if (!solver) solver = eigensolver_for(l, gram.numel() / (l * l), cusolver_serves());
    return *solver == Eigensolver::CUSOLVER ? eigh_by_cusolver(gram) : eigh_by_jacobi(gram, terms);
}

at::Tensor normal(at::IntArrayRef seeds, int64_t count, uint32_t stream, const at::TensorOptions& options) {
    const c10::cuda::CUDAGuard guard(options.device());
    const auto rows = static_cast<int64_t>(seeds.size());
    const at::Tensor keys = on_device(seeds, options.device()), out = at::empty({rows, count}, options);
    const auto fill = [&](auto* values) {
        C10_CUDA_CHECK(normal(values, count, keys.const_data_ptr<int64_t>(), rows, stream, stream_of(options.device())));
    };
    switch (out.scalar_type()) {
        case at::kDouble:
            fill(out.mutable_data_ptr<double>());
            break;
        case at::kFloat:
            fill(out.mutable_data_ptr<float>());
            break;
        case at::kBFloat16:
            fill(static_cast<__nv_bfloat16*>(out.mutable_data_ptr()));
            break;
        default:
            TORCH_CHECK(false, "a sketch is fp64, fp32 or bf16, got ", out.scalar_type());
    }
    return out;
}

at::Tensor gumbel(at::IntArrayRef seeds, int64_t count, uint32_t stream, const at::Device& device) {
    const c10::cuda::CUDAGuard guard(device);
    const auto rows = static_cast<int64_t>(seeds.size());
    const at::Tensor keys = on_device(seeds, device), out = at::empty({rows, count}, at::TensorOptions(at::kFloat).device(device));
    C10_CUDA_CHECK(gumbel(out.mutable_data_ptr<float>(), count, keys.const_data_ptr<int64_t>(), rows, stream, stream_of(device)));
    return out;
}

}  // namespace lowrank_kernels::cuda
