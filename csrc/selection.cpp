#include "selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "orthonormalise.h"
#include "philox.h"
#include "small.h"
#include "tail.h"

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
    if (method.svd != "exact") return leading(grad, count, method.accuracy, peak);
    const Spectrum all = exact(grad, peak);
    return {all.vectors.narrow(-2, 0, count), all.sigma.narrow(-1, 0, count)};
}

// Rows `index` (…, r) of vectors (…, k, m).
at::Tensor pick(const at::Tensor& vectors, const at::Tensor& index) {
    std::vector<int64_t> shape = vectors.sizes().vec();
    shape[shape.size() - 2] = index.size(-1);
    return vectors.gather(-2, index.unsqueeze(-1).expand(shape));
}

at::Tensor sample(const at::Tensor& sigma, int64_t rank, at::IntArrayRef seeds) {
    if (sigma.dim() > 1) return sample_importance(sigma, rank, seeds);
    return sample_importance(sigma.unsqueeze(0), rank, seeds).squeeze(0);
}

// On a CPU the eigenproblem of the whole Gram matrix costs less than a sketch of 2r and a block beside it where 5·r ≥ min(m, n), or
// where the short side is no longer than 128.
constexpr int64_t WHOLE_FROM = 5, WHOLE_TO = 128;
// Columns of the block that the tail is measured by, where fewer than that may be drawn from it.
constexpr int64_t LEAST_BLOCK = 8;

bool whole_is_cheaper(int64_t short_side, int64_t rank, const Method& method, bool one_on_cpu) {
    if (2 * rank + method.accuracy.oversample >= short_side) return true;
    return one_on_cpu && (WHOLE_FROM * rank >= short_side || short_side <= WHOLE_TO);
}

// I3S (arXiv 2502.05790): r directions drawn from the singular vectors with probability ∝ σ. Where not all are known but the leading
// l = 2r + oversample, the others get weights that have their sum and energy, see tail.h, and one that is drawn becomes a random direction of
// (I − U·Uᵀ)·G·ω, orthonormalised: among themselves those come ∝ σ². On a GPU nothing hangs on how many are drawn, so nothing waits.
at::Tensor importance(const Gradients& grad, int64_t rank, const Method& method, at::IntArrayRef seeds, const at::Tensor& peak) {
    const int64_t short_side = std::min(grad.rows(), grad.columns()), known = 2 * rank + method.accuracy.oversample;
    if (method.svd == "exact") {
        const auto [directions, sigma] = exact(grad, peak);
        return pick(directions, sample(sigma, rank, seeds));
    }
    const bool may_look = peak.dim() == 0 && peak.is_cpu();
    if (whole_is_cheaper(short_side, rank, method, may_look)) {
        const auto [vectors, sigma] = short_side_spectrum(grad, rank);
        return left_vectors(grad, pick(vectors, sample(sigma, rank, seeds)), method.accuracy.seed);
    }
    const Accuracy accuracy{0, method.accuracy.power_iters, method.accuracy.seed};
    const auto [directions, sigma] = leading(grad, known, accuracy, peak);
    const int64_t unknown = short_side - known, columns = std::min(std::max(rank, LEAST_BLOCK), unknown);
    const at::Tensor omega = normal(method.accuracy.seed, {columns, grad.columns()}, philox::TAIL, grad.options());
    const at::Tensor block = clear(directions, grad.image(omega));
    const at::Tensor chosen = sample(at::cat({sigma, tail_weights(block, sigma, unknown, rank + rank / 2)}, -1), rank, seeds);
    // Tail directions are interchangeable: the first one drawn takes the first of them.
    const at::Tensor tail = chosen >= known;
    const int64_t most = may_look ? tail.sum().item<int64_t>() : std::min(rank, unknown);
    if (most == 0) return pick(directions, chosen);
    const at::Tensor outside = complement(directions, block.narrow(-2, 0, most), method.accuracy.seed);
    return pick(at::cat({directions, outside}, -2), at::where(tail, tail.cumsum(-1) + (known - 1), chosen));
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
    TORCH_CHECK_VALUE(method.svd == "exact" || method.svd == "randomized", "unknown svd ", method.svd);
    if (method.selection == "importance") return importance(grad, rank, method, seeds, peak);
    if (method.selection == "dominant") return known_directions(grad, rank, method, peak).vectors;  // GaLore (arXiv 2403.03507)
    TORCH_CHECK_VALUE(method.selection == "random", "unknown selection ", method.selection);
    // The orthonormalised Gaussian is uniform over subspaces, and needs no gradient.
    at::Tensor gaussian = normals(seeds, {grad.rows(), rank}, philox::BASIS, grad.options()).mT().contiguous();
    return orthonormalise(peak.dim() == 0 ? gaussian.squeeze(0) : gaussian, 0);
}

}  // namespace lowrank_kernels
