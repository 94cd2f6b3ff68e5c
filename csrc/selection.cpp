#include "selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "orthonormalise.h"
#include "philox.h"
#include "small.h"

namespace lowrank_kernels {
namespace {

// Of G over its peak, for cuSOLVER does not scale as LAPACK does. fp32 vectors of either are orthonormal to some 2e-5 only, and where many
// elements are equal the rounding errors of a polish in fp32 add up to as much.
Spectrum exact(const Gradients& grad, const at::Tensor& peak) {
    const at::Tensor matrix = grad.joined();
    const at::Tensor usable = at::isfinite(peak).logical_and_(peak > 0);
    const at::Tensor unit = at::where(usable, peak, 1.0).to(matrix.scalar_type()).unsqueeze(-1);
    const auto [vectors, sigma, _] = at::linalg_svd(at::nan_to_num(matrix / unit.unsqueeze(-1), 0.0, 0.0, 0.0), /*full_matrices=*/false);
    return {polish(vectors.mT().to(at::kDouble)).to(matrix.scalar_type()), sigma * unit};
}

Spectrum known_directions(const Gradients& grad, int64_t count, const Method& method, const at::Tensor& peak) {
    TORCH_CHECK_VALUE(method.svd == "exact" || method.svd == "randomized", "unknown svd ", method.svd);
    if (method.svd != "exact") return leading(grad, count, method.accuracy, std::nullopt, peak);
    const Spectrum all = exact(grad, peak);
    return {all.vectors.narrow(-2, 0, count), all.sigma.narrow(-1, 0, count)};
}

// The weight of each of `count` unknown directions, sqrt(E / count) with E = ‖G‖²_F − Σσ²; zero where E is within the rounding error
// of the sums it is the difference of, or ‖G‖²_F is out of range.
at::Tensor tail_weight(const at::Tensor& squares, const at::Tensor& sigma, int64_t count) {
    const double roundoff = sigma.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                                : std::numeric_limits<float>::epsilon();
    const at::Tensor left_over = squares - sigma.to(at::kDouble).square().sum(-1);
    const at::Tensor real = at::where(at::isfinite(squares).logical_and_(left_over > 16 * roundoff * squares), left_over, 0.0);
    return real.div(static_cast<double>(count)).sqrt_().to(sigma.scalar_type());
}

// I3S (arXiv 2502.05790): r directions drawn from the singular vectors with probability ∝ σ. Where only the leading h < min(m, n) are
// known, the others share the left-over energy, and one that is drawn becomes a random direction of (I − U·Uᵀ)·G·ω, orthonormalised.
// Nothing hangs on how many are drawn, so nothing waits for a GPU.
at::Tensor importance(const Gradients& grad, int64_t rank, const Method& method, at::IntArrayRef seeds, const at::Tensor& peak) {
    const int64_t short_side = std::min(grad.rows(), grad.columns());
    const bool all = method.svd == "exact" || 2 * rank + method.accuracy.oversample >= short_side;
    const int64_t known = all ? short_side : 2 * rank, unknown = short_side - known;
    auto [directions, sigma] = known_directions(grad, known, method, peak);
    if (unknown > 0) {
        std::vector<int64_t> shape = sigma.sizes().vec();
        shape.back() = unknown;
        sigma = at::cat({sigma, tail_weight(grad.squares(peak), sigma, unknown).unsqueeze(-1).expand(shape)}, -1);
        const int64_t count = std::min(rank, unknown);
        const at::Tensor omega = normal(method.accuracy.seed, {count, grad.columns()}, philox::TAIL, grad.options());
        directions = at::cat({directions, complement(directions, grad.image(omega), method.accuracy.seed)}, -2);
    }
    const bool one = sigma.dim() == 1;
    at::Tensor chosen = sample_importance(one ? sigma.unsqueeze(0) : sigma, rank, seeds);
    if (one) chosen = chosen.squeeze(0);
    // Tail directions are interchangeable: the first one drawn takes the first of them.
    const at::Tensor tail = chosen >= known;
    const at::Tensor row = at::where(tail, tail.cumsum(-1) + (known - 1), chosen);
    std::vector<int64_t> shape = directions.sizes().vec();
    shape[shape.size() - 2] = rank;
    return directions.gather(-2, row.unsqueeze(-1).expand(shape));
}

}  // namespace

at::Tensor sample_importance(const at::Tensor& sigma, int64_t rank, at::IntArrayRef seeds) {
    constexpr double tiny = std::numeric_limits<double>::min();
    const at::Tensor weights = sigma.to(at::kDouble);
    const at::Tensor keys = weights.div(weights.amax(-1, true).clamp_min_(tiny)).clamp_min_(tiny).log_();
    const at::Tensor noisy = keys + gumbel(seeds, sigma.size(-1), philox::GUMBEL, sigma.device()).reshape(sigma.sizes());
    const at::Tensor chosen = std::get<0>(std::get<1>(noisy.topk(rank, -1)).sort(-1));
    const at::Tensor order = std::get<1>(sigma.gather(-1, chosen).sort(/*stable=*/true, -1, /*descending=*/true));
    return chosen.gather(-1, order);
}

at::Tensor choose(const Gradients& grad, int64_t rank, const Method& method, at::IntArrayRef seeds, const at::Tensor& peak) {
    if (method.selection == "importance") return importance(grad, rank, method, seeds, peak);
    if (method.selection == "dominant") return known_directions(grad, rank, method, peak).vectors;  // GaLore (arXiv 2403.03507)
    TORCH_CHECK_VALUE(method.selection == "random", "unknown selection ", method.selection);
    // The orthonormalised Gaussian is uniform over subspaces, and needs no gradient.
    at::Tensor gaussian = normals(seeds, {grad.rows(), rank}, philox::BASIS, grad.options()).mT().contiguous();
    return orthonormalise(peak.dim() == 0 ? gaussian.squeeze(0) : gaussian, 0);
}

}  // namespace lowrank_kernels
