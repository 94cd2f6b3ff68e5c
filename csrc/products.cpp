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
// Elements from which a list of matrices is multiplied one by one on a GPU; smaller ones are copied into one batch.
constexpr int64_t APART_FROM_ELEMENTS = 1 << 20;

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

// Largest magnitude and sum of squares of contiguous memory. Partial results of fixed blocks are joined in order, so that neither hangs
// on the number of threads.
template <typename T>
Size size_of_contiguous(const T* values, int64_t count, const at::TensorOptions& options) {
    constexpr int64_t BLOCK = 1 << 14, LANES = 16;
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<double> peaks(blocks), squares(blocks);
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const T* at = values + block * BLOCK;
            const int64_t size = std::min(BLOCK, count - block * BLOCK);
            // Lanes that the compiler turns into vectors. x − x is 0, or NaN where x is not finite, which a maximum would drop.
            T peak[LANES] = {}, flaw[LANES] = {};
            double square[LANES] = {};
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) {
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const T value = at[i + lane];
                    peak[lane] = std::max(peak[lane], std::abs(value));
                    flaw[lane] += value - value;
                    square[lane] += static_cast<double>(value) * static_cast<double>(value);
                }
            }
            for (; i < size; ++i) {
                peak[0] = std::max(peak[0], std::abs(at[i]));
                flaw[0] += at[i] - at[i];
                square[0] += static_cast<double>(at[i]) * static_cast<double>(at[i]);
            }
            for (int64_t lane = 0; lane < LANES; ++lane) {
                peaks[block] = std::max(peaks[block], static_cast<double>(peak[lane]));
                squares[block] += square[lane] + static_cast<double>(flaw[lane]);
            }
        }
    });
    double peak = 0, sum = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        peak = std::max(peak, peaks[block]);
        sum += squares[block];
    }
    if (!std::isfinite(sum) && sizeof(T) == sizeof(float)) peak = std::numeric_limits<double>::quiet_NaN();
    const auto scalar = options.dtype(at::kDouble);
    return {at::scalar_tensor(peak, scalar), at::scalar_tensor(sum, scalar)};
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

Size size_of(const at::Tensor& grad) {
    const bool dense = grad.is_contiguous() || grad.mT().is_contiguous();
    if (one_on_cpu(grad) && dense && grad.scalar_type() == at::kFloat) {
        return size_of_contiguous(grad.const_data_ptr<float>(), grad.numel(), grad.options());
    }
    const int64_t matrix[] = {-2, -1};
    const auto peak = at::linalg_vector_norm(grad, std::numeric_limits<double>::infinity(), matrix, false, at::kDouble);
    return {peak, at::linalg_vector_norm(grad, 2, matrix, false, at::kDouble).square()};
}

Gradients::Gradients(std::vector<at::Tensor> matrices) {
    if (matrices.size() == 1) {
        together_ = matrices.front().unsqueeze(0);
    } else if (matrices.front().numel() < APART_FROM_ELEMENTS) {
        together_ = at::stack(matrices);
    } else {
        apart_ = std::move(matrices);
    }
}

at::Tensor Gradients::multiply(const at::Tensor& xt, bool transposed) const {
    const auto oriented = [transposed](const at::Tensor& grad) { return transposed ? grad.mT() : grad; };
    const at::Tensor factor = xt.to(first().scalar_type());
    if (apart_.empty()) return times_transposed(factor, oriented(together_)).to(xt.scalar_type());
    const int64_t count = static_cast<int64_t>(apart_.size()), length = oriented(first()).size(0);
    const at::Tensor product = at::empty({count, xt.size(-2), length}, factor.options());
    for (int64_t i = 0; i < count; ++i) {
        at::Tensor out = product.select(0, i);
        at::mm_out(out, factor.dim() == 2 ? factor : factor.select(0, i), oriented(apart_[i]).mT());
    }
    return product.to(xt.scalar_type());
}

at::Tensor Gradients::image(const at::Tensor& xt) const { return multiply(xt, false); }

at::Tensor Gradients::coimage(const at::Tensor& qt) const { return multiply(qt, true); }

Size Gradients::size() const {
    if (apart_.empty()) return size_of(together_);
    std::vector<at::Tensor> peaks, squares;
    for (const auto& matrix : apart_) {
        const auto [peak, square] = size_of(matrix);
        peaks.push_back(peak);
        squares.push_back(square);
    }
    return {at::stack(peaks), at::stack(squares)};
}

at::Tensor Gradients::joined() const { return (apart_.empty() ? together_ : at::stack(apart_)).to(dtype()); }

}  // namespace lowrank_kernels
