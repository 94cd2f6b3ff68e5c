#include "eigh.h"

#if defined(LOWRANK_KERNELS_CUDA)
#include "cuda/binding.h"
#endif

namespace lowrank_kernels {

Eigen eigh(const at::Tensor& gram, [[maybe_unused]] int64_t terms, std::optional<cuda::Eigensolver> solver) {
#if defined(LOWRANK_KERNELS_CUDA)
    if (gram.is_cuda()) {
        auto [values, vectors] = cuda::eigh(gram, terms, solver);
        return {values, vectors};
    }
#endif
    TORCH_CHECK(!solver, "on a ", gram.device().type(), " device LAPACK solves eigenproblems, and no other solver can be named");
    const auto [values, vectors] = at::linalg_eigh(gram);
    return {values.flip(-1), vectors.mT().flip(-2)};
}

}  // namespace lowrank_kernels
