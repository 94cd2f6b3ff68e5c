// Leading left singular vectors and values of a gradient: the randomized range finder (Halko, Martinsson, Tropp, SIAM Review 53, 2011).
#pragma once

#include "products.h"

namespace lowrank_kernels {

// Both are NaN for a matrix of a batch whose eigenproblem was not solved.
struct Spectrum {
    at::Tensor vectors;  // (…, k, m): orthonormal rows, to 1e-5
    at::Tensor sigma;    // (…, k), descending; of no use for a matrix that is not finite, whose vectors are random
};

struct Accuracy {
    int64_t oversample, power_iters, seed;
};

// The leading `count` left ones: count ≤ min(m, n). `peak` is `peak_of` G, and only needed of a batch.
//
// With l = count + oversample, one of three ways, by shape alone:
//   l ≥ min(m, n):      the whole spectrum, from the Gram matrix of the short side;
//   5·l ≥ min(m, n):    subspace iteration on that Gram matrix, which costs less than four products with G, and more of it is nearly free;
//   else:               Y = G·Ω;  q times: Y = G·orth(Gᵀ·orth(Y));  Q = orth(Y);  QᵀG = W·Σ·Xᵀ;  U = Q·W.
Spectrum leading(const Gradients& grad, int64_t count, const Accuracy& accuracy, const at::Tensor& peak);

// All k = min(m, n) values and singular vectors (…, k, k) on the short side, those nearly orthonormal, of which `count` are wanted.
//
// One matrix on a CPU: from a Gram matrix in the dtype of G. In fp32 that knows no σ under 3e-4·σ₁, but its vectors are good to a rounding
// error of σ₁, so that σ = ‖Gᵀu‖ is: of values that the Gram matrix cannot tell apart those are averages, of their squares. Where fewer
// than 2·count values stand out of rounding, and in a batch always, from one in fp64.
Spectrum short_side_spectrum(const Gradients& grad, int64_t count);

}  // namespace lowrank_kernels
