#include "products.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "precision.h"

namespace lowrank_kernels {
namespace {

// Flops from which oneDNN beats the BLAS behind at::matmul, in spite of its dearer call (benchmarks/NOTES.md).
constexpr int64_t ONEDNN_FROM_FLOPS = 1 << 20;

// a·bᵀ of two fp32 matrices by oneDNN, where this torch has it. The same operator that kernels/cpu.py calls.
std::optional<at::Tensor> onednn(const at::Tensor& a, const at::Tensor& b) {
    static const auto linear = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    static const bool available = linear.has_value() && at::globalContext().hasMKLDNN();
    if (!available) return std::nullopt;
    // It falls back to a loop on a transposed matrix whose columns are not adjacent: 1.5 s instead of 1 ms.
    const auto dense = [](const at::Tensor& t) { return t.is_contiguous() || t.mT().is_contiguous() ? t : t.contiguous(); };
    torch::jit::Stack stack;
    stack.reserve(6);
    stack.emplace_back(dense(a));
    stack.emplace_back(dense(b));
    stack.emplace_back();  // no bias
    stack.emplace_back("none");
    stack.emplace_back(c10::List<std::optional<at::Scalar>>());
    stack.emplace_back("");
    linear->callBoxed(&stack);
    return stack.back().toTensor();
}

// The part above the diagonal of a square row-major matrix, copied below it in tiles that fit the cache.
template <typename T>
void mirror_upper(T* values, int64_t size) {
    constexpr int64_t TILE = 16;
    const int64_t tiles = (size + TILE - 1) / TILE;
    at::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t top = tile * TILE, bottom = std::min(top + TILE, size);
            for (int64_t left = 0; left <= top; left += TILE) {
                for (int64_t row = top; row < bottom; ++row) {
                    for (int64_t column = left; column < std::min(left + TILE, row); ++column) {
                        values[row * size + column] = values[column * size + row];
                    }
                }
            }
        }
    });
}

// Largest magnitude of contiguous memory in one pass without a copy; NaN where something is not finite.
double peak_of_contiguous(const float* values, int64_t count) {
    constexpr int64_t BLOCK = 1 << 14, LANES = 16;
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<float> peaks(blocks);
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const float* at = values + block * BLOCK;
            const int64_t size = std::min(BLOCK, count - block * BLOCK);
            // Lanes that the compiler turns into vectors. x − x is 0, or NaN where x is not finite, which a maximum would drop.
            float peak[LANES] = {}, flaw[LANES] = {};
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) {
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    peak[lane] = std::max(peak[lane], std::abs(at[i + lane]));
                    flaw[lane] += at[i + lane] - at[i + lane];
                }
            }
            for (; i < size; ++i) {
                peak[0] = std::max(peak[0], std::abs(at[i]));
                flaw[0] += at[i] - at[i];
            }
            for (int64_t lane = 0; lane < LANES; ++lane) peaks[block] = std::max(peaks[block], peak[lane]);
            for (int64_t lane = 0; lane < LANES; ++lane) peaks[block] += flaw[lane];
        }
    });
    float peak = 0;
    for (const float value : peaks) {
        if (std::isnan(value)) return value;
        peak = std::max(peak, value);
    }
    return peak;
}

}  // namespace

at::Tensor times_transposed(const at::Tensor& a, const at::Tensor& b) {
    if (one_on_cpu(a) && b.dim() == 2 && a.scalar_type() == at::kFloat && 2 * a.size(0) * a.size(1) * b.size(0) >= ONEDNN_FROM_FLOPS) {
        if (auto product = onednn(a, b)) return *product;
    }
    return at::matmul(a, b.mT());
}

at::Tensor full_times_transposed(const at::Tensor& a, const at::Tensor& b) {
    const FullPrecision guard;
    return times_transposed(a, b);
}

at::Tensor gram(const at::Tensor& rows) { return full_times_transposed(rows, rows); }

at::Tensor large_gram(const at::Tensor& rows) {
    const int64_t size = rows.size(-2), strip = (size + 3) / 4;
    if (!one_on_cpu(rows) || size < 128) return gram(rows);
    const FullPrecision guard;
    const at::Tensor dense = rows.contiguous();
    at::Tensor product = at::empty({size, size}, rows.options());
    for (int64_t start = 0; start < size; start += strip) {
        const int64_t stop = std::min(start + strip, size);
        product.slice(0, start, stop).slice(1, start).copy_(times_transposed(dense.slice(0, start, stop), dense.slice(0, start)));
    }
    AT_DISPATCH_FLOATING_TYPES(product.scalar_type(), "large_gram", [&] { mirror_upper(product.mutable_data_ptr<scalar_t>(), size); });
    return product;
}

at::Tensor peak_of(const at::Tensor& grad) {
    const bool dense = grad.is_contiguous() || grad.mT().is_contiguous();
    if (one_on_cpu(grad) && dense && grad.scalar_type() == at::kFloat) {
        return at::scalar_tensor(peak_of_contiguous(grad.const_data_ptr<float>(), grad.numel()), grad.options().dtype(at::kDouble));
    }
    // In the gradient's own dtype, where a maximum is exact: with another one torch may copy all of it.
    return at::linalg_vector_norm(grad, std::numeric_limits<double>::infinity(), at::IntArrayRef{-2, -1}).to(at::kDouble);
}

Gradients::Gradients(at::TensorList grads) {
    if (grads.size() > 1) {
        apart_ = grads.vec();
    } else {
        together_ = grads[0].dim() > 2 ? grads[0] : grads[0].unsqueeze(0);
    }
}

at::Tensor Gradients::multiply(const at::Tensor& xt, bool transposed) const {
    const auto oriented = [transposed](const at::Tensor& grad) { return transposed ? grad.mT() : grad; };
    const at::Tensor factor = xt.to(first().scalar_type());
    const FullAccumulation guard;
    if (apart_.empty()) return times_transposed(factor, oriented(together_)).to(dtype());
    const int64_t count = static_cast<int64_t>(apart_.size()), length = oriented(first()).size(0);
    const at::Tensor product = at::empty({count, xt.size(-2), length}, factor.options());
    for (int64_t i = 0; i < count; ++i) {
        at::Tensor out = product.select(0, i);
        at::mm_out(out, factor.dim() == 2 ? factor : factor.select(0, i), oriented(apart_[i]).mT());
    }
    return product.to(dtype());
}

at::Tensor Gradients::image(const at::Tensor& xt) const { return multiply(xt, false); }

at::Tensor Gradients::coimage(const at::Tensor& qt) const { return multiply(qt, true); }

at::Tensor Gradients::joined() const { return (apart_.empty() ? together_ : at::stack(apart_)).to(dtype()); }

}  // namespace lowrank_kernels
