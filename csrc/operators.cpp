// The operators of lowrank_kernels/ops/parts.py, where their schemas stand.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "eigh.h"
#include "orthonormalise.h"
#include "small.h"
#include "spectrum.h"

namespace lowrank_kernels {
namespace {

// What the body of an operator runs outside of, whoever calls it: autograd, which its in-place steps would confuse, and autocast, in which
// no basis would come out orthonormal.
struct OutsideTraining {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard below_autocast{c10::autocast_dispatch_keyset};
};

// Matrices on a CPU are worked on one by one: each takes what its own spectrum needs, and nothing is copied together.
bool one_by_one(at::TensorList grads) { return one_on_cpu(grads[0]); }

// Vectors as columns, of which Python thinks.
template <typename Find>
std::tuple<at::Tensor, at::Tensor> found_in(at::TensorList grads, Find&& find) {
    if (!one_by_one(grads)) {
        const Spectrum found = find(Gradients(grads));
        return {found.vectors.contiguous().mT(), found.sigma.contiguous()};
    }
    const auto count = static_cast<int64_t>(grads.size());
    at::Tensor vectors, sigma;
    for (int64_t i = 0; i < count; ++i) {
        const Spectrum found = find(Gradients(grads[i]));
        if (i == 0) {
            vectors = at::empty({count, found.vectors.size(0), found.vectors.size(1)}, found.vectors.options());
            sigma = at::empty({count, found.sigma.size(0)}, found.sigma.options());
        }
        vectors[i].copy_(found.vectors);
        sigma[i].copy_(found.sigma);
    }
    return {vectors.mT(), sigma};
}

std::tuple<at::Tensor, at::Tensor> leading_of_each(at::TensorList grads, const at::Tensor& peak, int64_t count, int64_t oversample,
                                                   int64_t power_iters, int64_t seed) {
    const OutsideTraining guard;
    return found_in(grads, [&](const Gradients& grad) { return leading(grad, count, {oversample, power_iters, seed}, peak); });
}

std::tuple<at::Tensor, at::Tensor> short_side_spectrum_of_each(at::TensorList grads, int64_t count) {
    const OutsideTraining guard;
    return found_in(grads, [&](const Gradients& grad) { return short_side_spectrum(grad, count); });
}

std::optional<cuda::Eigensolver> solver_called(c10::string_view name) {
    if (name == "auto") return std::nullopt;
    if (name == "jacobi") return cuda::Eigensolver::JACOBI;
    if (name == "cusolver") return cuda::Eigensolver::CUSOLVER;
    TORCH_CHECK(false, "solver must be auto, jacobi or cusolver, got ", name);
}

std::tuple<at::Tensor, at::Tensor> eigenvectors(const at::Tensor& gram, int64_t terms, c10::string_view solver) {
    const OutsideTraining guard;
    const Eigen found = lowrank_kernels::eigh(gram, terms, solver_called(solver));
    return {found.vectors.contiguous().mT(), found.values.contiguous()};
}

at::Tensor multiply(at::TensorList grads, const at::Tensor& factor) {
    const OutsideTraining guard;
    const at::Tensor rows = factor.mT();
    if (!one_by_one(grads)) return Gradients(grads).image(rows).to(factor.scalar_type()).mT();
    std::vector<at::Tensor> products;
    for (size_t i = 0; i < grads.size(); ++i) products.push_back(Gradients(grads[i]).image(rows.dim() == 2 ? rows : rows[i]));
    return at::stack(products).to(factor.scalar_type()).mT();
}

at::Tensor peaks(at::TensorList grads) {
    const OutsideTraining guard;
    std::vector<at::Tensor> found;
    for (const at::Tensor& grad : grads) found.push_back(peak_of(grad).reshape({-1}));
    return at::cat(found);
}

at::Tensor normal_like(const at::Tensor& like, at::IntArrayRef shape, at::IntArrayRef seeds, int64_t stream) {
    const OutsideTraining guard;
    const auto dtype = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return normals(seeds, shape, static_cast<uint32_t>(stream), like.options().dtype(dtype));
}

at::Tensor orthonormalise_columns(const at::Tensor& matrix, int64_t seed) {
    const OutsideTraining guard;
    return orthonormalise(matrix.mT().contiguous(), seed).contiguous().mT();
}

at::Tensor sample(const at::Tensor& sigma, int64_t rank, at::IntArrayRef seeds) {
    const OutsideTraining guard;
    return sample_importance(sigma, rank, seeds);
}

void implement(torch::Library& library) {
    library.impl("peaks", peaks);
    library.impl("leading", leading_of_each);
    library.impl("short_side_spectrum", short_side_spectrum_of_each);
    library.impl("eigh", eigenvectors);
    library.impl("multiply", multiply);
    library.impl("normal", normal_like);
    library.impl("orthonormalise", orthonormalise_columns);
    library.impl("sample_importance", sample);
}

}  // namespace
}  // namespace lowrank_kernels

TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, library) { lowrank_kernels::implement(library); }

#if defined(LOWRANK_KERNELS_CUDA)
TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, library) { lowrank_kernels::implement(library); }
#endif
