// Products with a gradient and between thin matrices.
//
// Thin matrices are kept as rows: l vectors of length k are an (l, k) tensor, row-major, in every file here. A matrix Y of l columns
// is written Yt. Every product is then a·bᵀ of two row-major operands, the form that both oneDNN and cuBLAS are fastest in.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace lowrank_kernels {

// Whether results may be looked at on the way: one matrix on a CPU. A batch takes one way for all, and looking would stall a GPU.
inline bool one_on_cpu(const at::Tensor& matrix) { return matrix.is_cpu() && matrix.dim() == 2; }

// a·bᵀ: (…, i, k), (…, j, k) → (…, i, j). Large fp32 products on a CPU go to oneDNN, everything else to ATen's matmul.
at::Tensor times_transposed(const at::Tensor& a, const at::Tensor& b);

// The same in full precision: for everything that makes a basis orthonormal.
at::Tensor full_times_transposed(const at::Tensor& a, const at::Tensor& b);

// S = Y·Yᵀ of the rows, in full precision: (…, l, k) → (…, l, l).
at::Tensor gram(const at::Tensor& rows);

// The Gram matrix as above, computing little more than its upper triangle; for matrices that are not thin. On a CPU (k, n) only.
at::Tensor large_gram(const at::Tensor& rows);

// The largest |Gᵢⱼ|, (…) fp64: not finite exactly where G is not.
at::Tensor peak_of(const at::Tensor& grad);

// One matrix (m, n), a batch (batch, m, n), or a list of matrices that are multiplied where they lie instead of being copied together.
// fp32, fp64, or bf16 on a GPU.
class Gradients {
 public:
    explicit Gradients(at::Tensor matrices) : together_(std::move(matrices)) {}
    explicit Gradients(at::TensorList grads);  // one batch, or matrices

    // (G·X)ᵀ: (…, l, n) → (…, l, m), at G's precision with fp32 sums, in `dtype()`. Xt may lack the batch dimension: one for all.
    at::Tensor image(const at::Tensor& xt) const;
    // (Gᵀ·Q)ᵀ: (…, l, m) → (…, l, n).
    at::Tensor coimage(const at::Tensor& qt) const;

    int64_t rows() const { return first().size(-2); }
    int64_t columns() const { return first().size(-1); }
    // fp64 for fp64, else fp32: the dtype of bases and of everything l × l.
    at::ScalarType dtype() const { return first().scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
    at::TensorOptions options() const { return first().options().dtype(dtype()); }
    // Of the operands of products with G.
    at::TensorOptions product_options() const { return first().options(); }
    // All in one tensor (…, m, n) of `dtype()`.
    at::Tensor joined() const;

 private:
    const at::Tensor& first() const { return apart_.empty() ? together_ : apart_.front(); }
    at::Tensor multiply(const at::Tensor& xt, bool transposed) const;
    at::Tensor together_;
    std::vector<at::Tensor> apart_;
};

}  // namespace lowrank_kernels
