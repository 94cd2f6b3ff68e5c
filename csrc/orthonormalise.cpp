#include "orthonormalise.h"

#include <cmath>
#include <limits>

#include "philox.h"
#include "products.h"
#include "small.h"

namespace lowrank_kernels {
namespace {

double roundoff(const at::Tensor& t) {  // from 1 to the next number
    return t.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

double smallest(const at::Tensor& t) {
    return t.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
}

// Rows scaled to length 1, in two steps so that no square overflows; `substitute` where a row is zero or not finite.
at::Tensor unit_rows(const at::Tensor& rows, const at::Tensor& substitute) {
    const at::Tensor peak = rows.abs().amax(-1, true);
    const at::Tensor usable = at::isfinite(peak).logical_and_(peak > 0);
    const at::Tensor scaled = at::where(usable, rows / at::where(usable, peak, 1), substitute);
    return scaled / at::linalg_vector_norm(scaled, 2, at::IntArrayRef{-1}, true).clamp_min_(smallest(rows));
}

// Of the factor of unit rows: below it two unshifted passes may not reach full accuracy.
constexpr double LEAST_PIVOT = 0x1p-7;

// L⁻¹·D⁻¹ for one matrix on a CPU, with L·Lᵀ = D⁻¹·Y·Yᵀ·D⁻¹ + shift·I and D the lengths of the rows; nothing where squares of the
// lengths leave the range in which all products are accurate, where Y is not finite, or where a pivot is not above `least_pivot`.
std::optional<at::Tensor> scaled_inverse_factor(const at::Tensor& rows, double shift, double least_pivot) {
    at::Tensor products = gram(rows);
    const at::Tensor lengths = products.diagonal().sqrt(), inverse_lengths = lengths.reciprocal();
    const double least = lengths.min().item<double>(), most = lengths.max().item<double>();
    if (!(least > 1e-12 && most < 1e12)) return std::nullopt;  // also NaN
    products.mul_(inverse_lengths).mul_(inverse_lengths.unsqueeze(-1));
    if (shift != 0) products.diagonal().add_(shift);
    const auto [factor, failed] = at::linalg_cholesky_ex(products);
    if (failed.item<int>() != 0 || !(factor.diagonal().min().item<double>() > least_pivot)) return std::nullopt;
    return at::linalg_solve_triangular(factor, inverse_lengths.diag(), /*upper=*/false);
}

}  // namespace

at::Tensor cholesky_pass(const at::Tensor& rows, bool shifted) {
    const auto l = static_cast<double>(rows.size(-2)), m = static_cast<double>(rows.size(-1));
    if (one_on_cpu(rows)) {
        // Looked at, and so good enough without fp64 where it succeeds.
        if (const auto inverse = scaled_inverse_factor(rows, shifted ? 2 * roundoff(rows) * l : 0.0, 0.0)) {
            return full_times_transposed(*inverse, rows.mT());
        }
    }
    const at::Tensor unit = unit_rows(rows, at::zeros({}, rows.options()));
    const double shift = shifted ? 11 * (m + l) * l * std::numeric_limits<double>::epsilon() / 2 : 0.0;
    return full_times_transposed(inverse_factor(gram(unit.to(at::kDouble)), shift, rows.scalar_type()), unit.mT());
}

std::optional<at::Tensor> well_conditioned_pass(const at::Tensor& rows) {
    const auto inverse = scaled_inverse_factor(rows, 0.0, LEAST_PIVOT);
    return inverse ? std::optional(full_times_transposed(*inverse, rows.mT())) : std::nullopt;
}

at::Tensor orthonormalise(const at::Tensor& rows, int64_t seed) {
    if (one_on_cpu(rows)) {
        if (const auto once = well_conditioned_pass(rows)) {
            if (auto twice = well_conditioned_pass(*once)) return *twice;
        }
    }
    const int64_t l = rows.size(-2), m = rows.size(-1);
    const at::Tensor noise = normal(seed, {l, m}, philox::COMPLETION, rows.options()).div_(std::sqrt(static_cast<double>(m)));
    // Dependent rows become distinct, by less than the rounding of Y hides anyway.
    at::Tensor result = unit_rows(rows, noise) + 8 * roundoff(rows) * noise;
    if (one_on_cpu(rows)) {
        const at::Tensor basis = std::get<0>(at::linalg_qr(result.mT())).mT().contiguous();
        return polish(basis.to(at::kDouble)).to(rows.scalar_type());
    }
    for (const bool shifted : {true, true, true, false}) result = cholesky_pass(result, shifted);
    return result;
}

at::Tensor polish(const at::Tensor& rows) {
    const at::Tensor correction = gram(rows).mul_(-0.5);
    correction.diagonal(0, -2, -1).add_(1.5);
    return full_times_transposed(correction, rows.mT());
}

}  // namespace lowrank_kernels
