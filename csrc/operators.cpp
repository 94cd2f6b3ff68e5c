// The operators of lowrank_kernels/ops/refresh.py, where their schemas stand and their arguments are checked.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "orthonormalise.h"
#include "philox.h"
#include "selection.h"
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

// Elements that one chunk of a list of gradients on a GPU copies, or makes thin: 512 MiB in fp32, of which some four are held at a time.
constexpr int64_t CHUNK_ELEMENTS = int64_t{1} << 27;

// The dtype that products run in: fp32 where they cannot run in the gradient's own (fp16 overflows, and CPUs are slow in 16 bits).
at::ScalarType product_dtype(const at::Tensor& grad) {
    const bool native = grad.scalar_type() == at::kDouble || (grad.is_cuda() && grad.scalar_type() == at::kBFloat16);
    return native ? grad.scalar_type() : at::kFloat;
}

at::ScalarType basis_dtype(const at::Tensor& grad) { return grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor multipliable(const at::Tensor& grad) { return grad.to(product_dtype(grad)); }

// What a matrix gets that is not finite: any orthonormal rows, and NaN for sigma.
Spectrum of_nothing(const at::Tensor& grad, int64_t count, int64_t seed) {
    const auto options = grad.options().dtype(basis_dtype(grad));
    const at::Tensor noise = normal(seed, {count, grad.size(-2)}, philox::COMPLETION, options);
    return {orthonormalise(noise, seed), at::full({count}, std::nan(""), options)};
}

// One matrix on a CPU, brought into the range where fourth powers of its elements neither overflow nor vanish; 2^`exponent` times it is the matrix.
struct InRange {
    at::Tensor grad;
    at::Tensor peak;  // of `grad`
    int exponent = 0;
};

// In two steps, for a power of two may itself be out of range.
at::Tensor times_power_of_two(const at::Tensor& tensor, int exponent) {
    const int half = exponent / 2;
    return tensor.mul(std::ldexp(1.0, half)).mul_(std::ldexp(1.0, exponent - half));
}

InRange in_range(const at::Tensor& stored) {
    InRange matrix{multipliable(stored), {}};
    matrix.peak = peak_of(matrix.grad);
    const double peak = matrix.peak.item<double>();
    if (!std::isfinite(peak) || peak == 0) return matrix;
    int exponent = 0;
    std::frexp(peak, &exponent);
    if (std::abs(exponent) <= (matrix.grad.scalar_type() == at::kFloat ? 20 : 150)) return matrix;
    matrix.grad = times_power_of_two(matrix.grad, -exponent);
    matrix.peak = peak_of(matrix.grad);
    matrix.exponent = exponent;
    return matrix;
}

bool is_finite(const InRange& matrix) { return std::isfinite(matrix.peak.item<double>()); }

std::tuple<at::Tensor, at::Tensor> range_finder_of_one(const at::Tensor& grad, int64_t rank, const Accuracy& accuracy) {
    const InRange matrix = in_range(grad);
    const Spectrum found = is_finite(matrix) ? leading(Gradients(matrix.grad), rank, accuracy, matrix.peak)
                                             : of_nothing(matrix.grad, rank, accuracy.seed);
    return {found.vectors.mT().clone(at::MemoryFormat::Contiguous), times_power_of_two(found.sigma, matrix.exponent)};
}

std::tuple<at::Tensor, at::Tensor> range_finder_of_batch(const at::Tensor& grad, int64_t rank, int64_t oversample, int64_t power_iters,
                                                         int64_t seed) {
    const OutsideTraining guard;
    const Gradients batch(multipliable(grad));
    const at::Tensor peak = batch.peak();
    const auto [vectors, sigma] = leading(batch, rank, {oversample, power_iters, seed}, peak);
    return {vectors.mT().clone(at::MemoryFormat::Contiguous), at::where(at::isfinite(peak).unsqueeze(-1), sigma, std::nan(""))};
}

// One by one: each matrix takes what its own spectrum needs, and nothing is copied together.
std::tuple<at::Tensor, at::Tensor> range_finder_on_cpu(const at::Tensor& grad, int64_t rank, int64_t oversample, int64_t power_iters,
                                                       int64_t seed) {
    const OutsideTraining guard;
    const Accuracy accuracy{oversample, power_iters, seed};
    if (grad.dim() == 2) return range_finder_of_one(grad, rank, accuracy);
    const at::Tensor grads = grad.flatten(0, -3);
    std::vector<at::Tensor> bases, sigmas;
    for (int64_t i = 0; i < grads.size(0); ++i) {
        auto [basis, sigma] = range_finder_of_one(grads.select(0, i), rank, accuracy);
        bases.push_back(std::move(basis));
        sigmas.push_back(std::move(sigma));
    }
    const auto batch = grad.sizes().slice(0, grad.dim() - 2);
    return {at::stack(bases).unflatten(0, batch), at::stack(sigmas).unflatten(0, batch)};
}

at::Tensor orthonormalise_columns(const at::Tensor& matrix, int64_t seed) {
    const OutsideTraining guard;
    const at::Tensor rows = matrix.mT().contiguous();
    if (!rows.is_cpu() || rows.dim() == 2) return orthonormalise(rows, seed).mT().clone(at::MemoryFormat::Contiguous);
    if (rows.numel() == 0) return at::empty_like(matrix, at::MemoryFormat::Contiguous);
    std::vector<at::Tensor> parts;
    for (const at::Tensor& part : rows.flatten(0, -3).unbind()) parts.push_back(orthonormalise(part, seed));
    return at::stack(parts).view_as(rows).mT().clone(at::MemoryFormat::Contiguous);
}

// A copy of a basis given as rows that keeps nothing else alive, in the order that the device's products want: by columns on a CPU,
// where its transpose then needs no copy, by rows on a GPU, where kernels read r neighbours at a time.
at::Tensor own_basis(const at::Tensor& rows, at::ScalarType dtype) {
    at::Tensor basis = at::empty(rows.sizes(), rows.options().dtype(dtype)).mT();
    if (!rows.is_cpu()) basis = at::empty({rows.size(-1), rows.size(-2)}, rows.options().dtype(dtype));
    return basis.copy_(rows.mT());
}

void check_lists(at::TensorList grads, at::TensorList previous, at::IntArrayRef seeds) {
    TORCH_CHECK_VALUE(!grads.empty(), "grads must hold at least one matrix");
    TORCH_CHECK_VALUE(seeds.size() == grads.size(), "there must be a seed for each of the ", grads.size(), " gradients, got ", seeds.size());
    TORCH_CHECK_VALUE(previous.empty() || previous.size() == grads.size(), "previous must be empty or hold a basis for each of the ",
                      grads.size(), " gradients, got ", previous.size());
}

at::Tensor oriented(const at::Tensor& grad, bool right) { return right ? grad.mT() : grad; }

// Of lists of matrices of equal shape, as stored: the right side works on their transposes. `previous` is empty or holds the bases in use.
std::vector<at::Tensor> choose_of_batch(at::TensorList grads, at::TensorList previous, int64_t rank, bool right, const Method& method,
                                        at::IntArrayRef seeds, at::ScalarType dtype, const std::optional<at::Tensor>& found_inf) {
    const int64_t count = static_cast<int64_t>(grads.size());
    const int64_t m = oriented(grads[0], right).size(0), n = oriented(grads[0], right).size(1);
    const int64_t l = 2 * rank + method.accuracy.oversample, thin = (m + n) * std::min(l, std::min(m, n));
    const bool copies = method.svd == "exact" || works_on_gram(m, n, l);
    const int64_t chunk = std::max<int64_t>(1, CHUNK_ELEMENTS / std::max(thin, copies ? m * n : 0));
    std::vector<at::Tensor> bases;
    bases.reserve(count);
    for (int64_t begin = 0; begin < count; begin += chunk) {
        const int64_t end = std::min(begin + chunk, count);
        std::vector<at::Tensor> matrices;
        for (int64_t i = begin; i < end; ++i) matrices.push_back(multipliable(oriented(grads[i], right)));
        const Gradients batch(std::move(matrices));
        const at::Tensor peak = batch.peak();
        const at::Tensor rows = choose(batch, rank, method, seeds.slice(begin, end - begin), peak);
        const at::Tensor some = method.selection == "random" ? at::ones_like(peak, at::kBool) : peak.ne(0);
        at::Tensor usable = at::isfinite(peak).logical_and_(some);
        if (found_inf) usable = usable.logical_and(found_inf->to(usable.device()).reshape({}) == 0);
        for (int64_t i = begin; i < end; ++i) {
            const at::Tensor fresh = rows.select(0, i - begin).to(dtype);
            const at::Tensor kept = previous.empty() ? at::where(some.select(0, i - begin), fresh, 0.0)
                                                     : at::where(usable.select(0, i - begin), fresh, previous[i].mT());
            bases.push_back(own_basis(kept, dtype));
        }
    }
    return bases;
}

std::vector<at::Tensor> choose_on_cpu(at::TensorList grads, at::TensorList previous, int64_t rank, bool right, const Method& method,
                                      at::IntArrayRef seeds, at::ScalarType dtype, const std::optional<at::Tensor>& found_inf) {
    const bool skipped = found_inf && found_inf->item<double>() != 0;
    std::vector<at::Tensor> bases;
    for (size_t i = 0; i < grads.size(); ++i) {
        const InRange matrix = in_range(oriented(grads[i], right));
        const bool is_zero = method.selection != "random" && matrix.peak.item<double>() == 0;
        at::Tensor rows;
        if (!previous.empty() && (skipped || !is_finite(matrix) || is_zero)) {
            rows = previous[i].mT();
        } else if (is_zero) {
            rows = at::zeros({rank, matrix.grad.size(0)}, matrix.grad.options());
        } else if (is_finite(matrix) || method.selection == "random") {
            rows = choose(Gradients(matrix.grad), rank, method, seeds.slice(i, 1), matrix.peak);
        } else {
            rows = of_nothing(matrix.grad, rank, seeds[i]).vectors;
        }
        bases.push_back(own_basis(rows, dtype));
    }
    return bases;
}

template <auto WAY>
std::vector<at::Tensor> choose_bases(at::TensorList grads, at::TensorList previous, int64_t rank, bool right, std::string_view selection,
                                     std::string_view svd, int64_t oversample, int64_t power_iters, int64_t seed, at::IntArrayRef seeds,
                                     at::ScalarType dtype, const std::optional<at::Tensor>& found_inf) {
    const OutsideTraining guard;
    check_lists(grads, previous, seeds);
    return WAY(grads, previous, rank, right, {selection, svd, {oversample, power_iters, seed}}, seeds, dtype, found_inf);
}

}  // namespace
}  // namespace lowrank_kernels

TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, library) {
    library.impl("range_finder", lowrank_kernels::range_finder_on_cpu);
    library.impl("orthonormalise", lowrank_kernels::orthonormalise_columns);
    library.impl("sample_importance", lowrank_kernels::sample_importance);
    library.impl("choose_bases", lowrank_kernels::choose_bases<lowrank_kernels::choose_on_cpu>);
}

#if defined(LOWRANK_KERNELS_CUDA)
TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, library) {
    library.impl("range_finder", lowrank_kernels::range_finder_of_batch);
    library.impl("orthonormalise", lowrank_kernels::orthonormalise_columns);
    library.impl("sample_importance", lowrank_kernels::sample_importance);
    library.impl("choose_bases", lowrank_kernels::choose_bases<lowrank_kernels::choose_of_batch>);
}
#endif

// The way that a GPU takes, open to any device, so that tests can walk it on a CPU: one way for a whole batch, nothing looked at.
TORCH_LIBRARY_FRAGMENT(lowrank_kernels, library) {
    library.def("_range_finder_of_batch(Tensor grad, int rank, int oversample, int power_iters, int seed) -> (Tensor, Tensor)",
                lowrank_kernels::range_finder_of_batch);
    library.def(
        "_choose_bases_of_batch(Tensor[] grads, Tensor[] previous, int rank, bool right, str selection, str svd, int oversample, "
        "int power_iters, int seed, int[] seeds, ScalarType dtype, Tensor? found_inf) -> Tensor[]",
        lowrank_kernels::choose_bases<lowrank_kernels::choose_of_batch>);
}
