#include "spectrum.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "eigh.h"
#include "orthonormalise.h"
#include "philox.h"
#include "small.h"

namespace lowrank_kernels {
namespace {

// Forming G·Gᵀ costs less than four products with G where 5·l reaches the short side.
constexpr int64_t SQUARE_FROM = 5;
// Products with the Gram matrix: this many for each power iteration, beside the first.
constexpr int64_t GRAM_STEPS = 3;
// … and this many at most once the spectrum turns out to be steep, which makes every one of them worth more.
constexpr int64_t STEEP_STEPS = 1;
// λ_r / λ₁ under which eigenvalues of a Gram matrix formed in fp32 no longer give σ to 1 %: a few rounding errors of λ₁ over 2 %.
constexpr double STEEP = 0x1p-13;
// Of σ₁: what the lengths of images of vectors of an fp32 Gram matrix are known to, the root of fp32's rounding. Measured at 512 × 1280,
// where the values are below 1e-8: lengths up to 1.7e-4.
constexpr double FLOOR = 0x1p-12;

// All k left singular vectors, as rows, and values of B (…, k, n), k ≤ n. The Gram matrix and its eigenproblem are fp64: in fp32 all
// σ under 3e-4·σ₁ would be noise, and vectors orthonormal to 1e-5 only.
Spectrum left_singular(const at::Tensor& rows) {
    at::Tensor scaled = rows.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true), peak;
    if (!one_on_cpu(rows)) {  // which is finite and in range
        peak = peak_of(rows).unsqueeze(-1).unsqueeze(-1);
        const at::Tensor usable = at::isfinite(peak).logical_and_(peak > 0);
        peak = at::where(usable, peak, 1.0);
        scaled = at::where(usable, scaled.div_(peak), 0.0);
    }
    const auto [values, vectors] = eigh(large_gram(scaled), rows.size(-1));
    at::Tensor sigma = values.clamp_min(0.0).sqrt_();
    if (peak.defined()) sigma.mul_(peak.squeeze(-1));
    return {vectors.to(rows.scalar_type()), sigma.to(rows.scalar_type())};
}

Spectrum head(const Spectrum& spectrum, int64_t count) {
    return {spectrum.vectors.narrow(-2, 0, count), spectrum.sigma.narrow(-1, 0, count)};
}

// From orthonormal rows Q whose span holds the wanted directions: the singular vectors of QᵀG, turned back.
Spectrum rayleigh_ritz(const at::Tensor& basis, const at::Tensor& projected, int64_t count) {
    const auto [vectors, sigma] = head(left_singular(projected), count);
    return {full_times_transposed(vectors, basis.mT()), sigma};
}

at::Tensor sketch(int64_t l, int64_t length, const Accuracy& accuracy, const at::TensorOptions& options) {
    return normal(accuracy.seed, {l, length}, philox::SKETCH, options);
}

// G seen from its short side: `to_long` multiplies rows over the short side into rows over the long one.
struct ShortSide {
    explicit ShortSide(const Gradients& grad) : grad(grad), tall(grad.rows() > grad.columns()) {}
    int64_t size() const { return tall ? grad.columns() : grad.rows(); }
    at::Tensor to_long(const at::Tensor& rows) const { return tall ? grad.image(rows) : grad.coimage(rows); }
    at::Tensor to_short(const at::Tensor& rows) const { return tall ? grad.coimage(rows) : grad.image(rows); }
    at::Tensor matrix() const { return tall ? grad.joined().mT() : grad.joined(); }
    // The left singular vectors of G from singular vectors on the short side.
    Spectrum left(const Spectrum& spectrum, int64_t seed) const {
        if (!tall) return spectrum;
        at::Tensor vectors = orthonormalise(grad.image(spectrum.vectors), seed);
        if (!one_on_cpu(vectors)) {  // whose eigenproblem was not solved has no directions, where random ones would hide it
            vectors = at::where(at::isnan(spectrum.sigma.narrow(-1, 0, 1)).unsqueeze(-1), NAN, vectors);
        }
        return {vectors, spectrum.sigma};
    }
    const Gradients& grad;
    const bool tall;
};

Spectrum whole_spectrum(const Gradients& grad, int64_t count, const Accuracy& accuracy) {
    const ShortSide side(grad);
    return side.left(head(left_singular(side.matrix()), count), accuracy.seed);
}

// Rows of one matrix on a CPU that are nearly orthonormal, fully so. Passes over ill-conditioned rows leave a defect of up to a few per
// cent, fp32 eigenvectors one of 1e-5.
at::Tensor finished(const at::Tensor& rows, int64_t seed) {
    const double defect = gram(rows).sub_(at::eye(rows.size(0), rows.options())).norm().item<double>();
    if (defect < 1e-3) return polish(rows);
    const auto exact = well_conditioned_pass(rows);
    return exact ? polish(*exact) : orthonormalise(rows, seed);
}

at::Tensor squared_norm(const at::Tensor& t) { return at::linalg_vector_norm(t, 2, at::IntArrayRef{-2, -1}).square_(); }

// Half of Σλ² / Σλ over the eigenvalues that a basis leaves out, which is less than half the largest of them, and so a safe shift. Zero
// where the sums are rounding errors of those they are the difference of.
at::Tensor half_left_out(const at::Tensor& sum, const at::Tensor& all, const at::Tensor& squares, const at::Tensor& all_squares) {
    const double noise =
        64 * (sum.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon());
    const at::Tensor real = (sum > noise * all).logical_and_(squares > noise * all_squares);
    return at::where(real, squares.div(at::where(real, sum, 1.0)).mul_(0.5), 0.0);
}

// A = G·Gᵀ on the short side;  Y = A·Ω;  several times: Y = (A − s·I)·orth(Y), s about half the largest eigenvalue that orth(Y) leaves
// out, which halves those and hardly changes the wanted ones (shifted power iteration; Feng, Yu, Xie, Tang, arXiv 2404.09276).
//
// An fp32 Gram matrix knows no σ under about 1e-3·σ₁. Where the spectrum is that steep one more half-step with G itself, and Rayleigh
// and Ritz in fp64, restore it. A CPU looks; a GPU, which cannot without stalling, always does so.
Spectrum iterate_on_gram(const Gradients& grad, int64_t count, int64_t l, const Accuracy& accuracy, const at::Tensor& peak) {
    const ShortSide side(grad);
    at::Tensor matrix = side.matrix();
    const bool may_look = one_on_cpu(matrix);
    if (!may_look) {
        const at::Tensor usable = at::isfinite(peak).logical_and_(peak > 0);
        const at::Tensor half = at::where(usable, peak, 1.0).rsqrt_().to(matrix.scalar_type()).unsqueeze(-1).unsqueeze(-1);
        matrix = matrix.mul(half).mul_(half).nan_to_num_(0.0, 0.0, 0.0);  // in two steps: 1 / peak may overflow
    }
    at::Tensor squares = large_gram(matrix);
    matrix.reset();
    double unit = 1;  // the mean eigenvalue, divided by which products of several A stay in range
    at::Tensor trace, energy;
    if (may_look) {
        const double total = squares.trace().item<double>();
        unit = total > 0 ? total / static_cast<double>(side.size()) : 1;
        squares.mul_(1 / unit);
        trace = squares.trace();
        energy = squared_norm(squares);
    }
    at::Tensor rows = sketch(l, side.size(), accuracy, grad.options());
    const auto multiply = [&squares](const at::Tensor& thin) { return full_times_transposed(thin, squares); };
    // On a CPU: two products to an orthonormalisation while that is safe, then one, then shifted passes and the half-step below.
    bool steep = !may_look, pairs = may_look;
    at::Tensor image = multiply(rows), shift;
    for (int64_t left = 1 + GRAM_STEPS * accuracy.power_iters;;) {
        if (shift.defined()) image.sub_(rows.mul(shift));
        --left;
        std::optional<at::Tensor> next;
        if (pairs && left > 0) {
            at::Tensor twice = multiply(image);
            if (shift.defined()) twice.sub_(image.mul(shift));
            next = well_conditioned_pass(twice);
            pairs = next.has_value();
            left -= pairs;
        }
        if (!next && !steep) {
            next = well_conditioned_pass(image);
            steep = !next;
            if (steep) left = std::min(left, STEEP_STEPS);
        }
        rows = next ? *next : cholesky_pass(image);
        image = multiply(rows);
        if (left == 0) break;
        shift = at::Tensor();
        if (!steep) {  // shifted passes do not quite make a basis, of which alone it can be told what it leaves out
            const at::Tensor sum = trace - rows.mul(image).sum(), square_sum = energy - squared_norm(image);
            shift = half_left_out(sum, trace, square_sum, energy);
        }
    }
    if (!steep) {
        const auto [values, vectors] = eigh(full_times_transposed(rows, image), side.size());
        if (values[count - 1].item<double>() > STEEP * values[0].item<double>()) {
            const at::Tensor turned = full_times_transposed(vectors.narrow(0, 0, count), rows.mT());
            return side.left({finished(turned, accuracy.seed), values.narrow(0, 0, count).mul(unit).sqrt_()}, accuracy.seed);
        }
    }
    rows = orthonormalise(side.to_short(cholesky_pass(side.to_long(rows))), accuracy.seed);
    return side.left(rayleigh_ritz(rows, side.to_long(rows), count), accuracy.seed);
}

Spectrum iterate_on_products(const Gradients& grad, int64_t count, int64_t l, const Accuracy& accuracy) {
    at::Tensor image = grad.image(sketch(l, grad.columns(), accuracy, grad.product_options()));
    for (int64_t iteration = 0; iteration < accuracy.power_iters; ++iteration) {
        image = grad.image(cholesky_pass(grad.coimage(cholesky_pass(image))));
    }
    const at::Tensor basis = orthonormalise(image, accuracy.seed);
    return rayleigh_ritz(basis, grad.coimage(basis), count);
}

}  // namespace

Spectrum short_side_spectrum(const Gradients& grad, int64_t count) {
    const ShortSide side(grad);
    const at::Tensor matrix = side.matrix();
    if (!one_on_cpu(matrix) || matrix.scalar_type() != at::kFloat) return left_singular(matrix);
    const auto [values, vectors] = eigh(large_gram(matrix), matrix.size(-1));
    const at::Tensor sigma = values.clamp_min(0).sqrt_();
    const int64_t good = values.gt(STEEP * values[0]).sum().item<int64_t>(), rest = side.size() - good;
    if (rest == 0) return {vectors, sigma};
    at::Tensor small = sigma.narrow(0, good, rest);
    small.copy_(at::linalg_vector_norm(side.to_long(vectors.narrow(0, good, rest)), 2, at::IntArrayRef{-1}));
    const int64_t real = good + small.gt(FLOOR * sigma[0]).sum().item<int64_t>();
    if (real >= std::min(2 * count, side.size())) return {vectors, sigma};
    // Eigenvalues in fp64 know no σ under 1e-8·σ₁, lengths of fp64 vectors' images do.
    const at::Tensor wide = matrix.to(at::kDouble), exact = eigh(large_gram(wide), matrix.size(-1)).vectors;
    const at::Tensor lengths = at::linalg_vector_norm(full_times_transposed(exact, wide.mT()), 2, at::IntArrayRef{-1});
    return {exact.to(matrix.scalar_type()), lengths.to(matrix.scalar_type())};
}

Spectrum leading(const Gradients& grad, int64_t count, const Accuracy& accuracy, const at::Tensor& peak) {
    const int64_t l = count + accuracy.oversample;
    if (l >= std::min(grad.rows(), grad.columns())) return whole_spectrum(grad, count, accuracy);
    if (SQUARE_FROM * l >= std::min(grad.rows(), grad.columns())) return iterate_on_gram(grad, count, l, accuracy, peak);
    return iterate_on_products(grad, count, l, accuracy);
}

}  // namespace lowrank_kernels
