// A batch of symmetric eigenproblems by a library's batched solver, on tensors: scaling, the cut into calls, workspaces, failures.
//
// The library is a class, so that tests put LAPACK in the place of cuSOLVER (cusolver.cpp, emulate_eigh.cpp). Its `solve` overwrites
// matrices (batch, l, l) with eigenvectors, each contiguous in memory, and writes eigenvalues (batch, l), ascending, and info (batch),
// which is 0 for a matrix that is solved. It reads one triangle. All three lie on the device, and nothing is read back.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>

#include "eigensolvers.h"

namespace lowrank_kernels::cuda {

struct WorkspaceBytes {
    size_t device = 0, host = 0;
};

// gram (…, l, l) fp64 → values (…, l), descending, and vectors (…, l, l), as rows. NaN for a matrix whose info is not 0.
//
// Each matrix is divided by its largest diagonal element, which no element of a positive semidefinite matrix exceeds. A matrix that is not
// finite counts as zero, as it does for Jacobi.
template <typename Library>
std::tuple<at::Tensor, at::Tensor> eigh_by(Library& library, const at::Tensor& gram) {
    const int64_t l = gram.size(-1), batch = gram.numel() / (l * l);
    const at::Tensor largest = gram.diagonal(0, -2, -1).amax(-1, true).reshape({batch, 1});
    const at::Tensor usable = at::isfinite(largest).logical_and_(largest > 0);
    const at::Tensor scale = at::where(usable, largest, 1.0);
    const at::Tensor scaled = at::where(usable.unsqueeze(-1), gram.reshape({batch, l, l}) / scale.unsqueeze(-1), 0.0);
    const at::Tensor rows = scaled.contiguous();  // not `gram` itself, which is overwritten
    const at::Tensor ascending = at::empty({batch, l}, gram.options());
    const at::Tensor info = at::zeros({batch}, gram.options().dtype(at::kInt));
    double* const matrices = rows.mutable_data_ptr<double>();
    double* const values = ascending.mutable_data_ptr<double>();
    int* const reports = info.mutable_data_ptr<int>();
    const int64_t most = matrices_per_call(l);
    for (int64_t first = 0; first < batch; first += most) {
        const int64_t count = std::min(most, batch - first);
        double *const part = matrices + first * l * l, *const part_values = values + first * l;
        const WorkspaceBytes bytes = library.workspace(l, part, part_values, count);
        // Goes back to the allocator after the call, and from there only to work behind it on this stream.
        const at::Tensor device = at::empty({static_cast<int64_t>(bytes.device)}, gram.options().dtype(at::kByte));
        std::unique_ptr<std::byte[]> host(bytes.host > 0 ? new std::byte[bytes.host] : nullptr);
        library.solve(l, part, part_values, device.mutable_data_ptr(), bytes.device, host.get(), bytes.host, reports + first, count);
        if (host) library.release_when_done(std::move(host));
    }
    const at::Tensor solved = info.eq(0).unsqueeze(-1);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const at::Tensor found = at::where(solved, ascending.clamp_min(0.0).mul_(at::where(usable, largest, 0.0)), nan);
    const at::Tensor vectors = at::where(solved.unsqueeze(-1), rows, nan);
    return {found.flip(-1).reshape(gram.sizes().slice(0, gram.dim() - 1)), vectors.flip(-2).reshape(gram.sizes())};
}

}  // namespace lowrank_kernels::cuda
