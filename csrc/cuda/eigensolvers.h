// Which solver takes a batch of symmetric eigenproblems on a GPU, and what a call of cuSOLVER's takes at most. Nothing of CUDA or torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace lowrank_kernels::cuda {

enum class Eigensolver {
    JACOBI,    // jacobi.h: l − 1 launches a sweep, 20 sweeps at most, whatever the batch
    CUSOLVER,  // syev_batched.h: cusolverDnXsyevBatched, a call for many matrices
};

struct EigensolverRow {
    int64_t l_up_to, batch_from;
    Eigensolver solver;
};

// The first row whose limits hold serves `batch` matrices (l, l). Estimates: neither solver was measured on a GPU yet, and the benchmark's
// refresh suite times one beside the other. Where l is small Jacobi has few launches to make.
constexpr EigensolverRow EIGENSOLVERS[] = {
    {32, 1, Eigensolver::JACOBI},
    {std::numeric_limits<int64_t>::max(), 1, Eigensolver::CUSOLVER},
};

// `cusolver`: whether it can be called at all. Jacobi always can.
constexpr Eigensolver eigensolver_for(int64_t l, int64_t batch, bool cusolver) {
    for (const EigensolverRow& row : EIGENSOLVERS) {
        if (l <= row.l_up_to && batch >= row.batch_from) return cusolver ? row.solver : Eigensolver::JACOBI;
    }
    return Eigensolver::JACOBI;
}

// Matrices that one call of cuSOLVER takes. Its documentation states no limit for a batch. Users met one near 2^15 matrices
// (mujocolab/mjlab, pull request 732), and JAX keeps the elements of a call within 32 bits. This stays below both.
constexpr int64_t matrices_per_call(int64_t l) {
    return std::clamp<int64_t>(std::numeric_limits<int32_t>::max() / std::max<int64_t>(l * l, 1), 1, int64_t{1} << 14);
}

}  // namespace lowrank_kernels::cuda
