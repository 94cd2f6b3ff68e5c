// The way of an eigenproblem by cuSOLVER on a host, for tests where there is no GPU: eigh_by with LAPACK in cuSOLVER's place, and the parts
// of a refresh that need an eigenproblem, on batches, which then take the way of a GPU. Needs a torch for CPUs:
//
//     g++ -shared -fPIC -std=c++20 -fopenmp -I.. -I<torch's headers> emulate_eigh.cpp -ltorch_cpu -lc10
//
// It is one library with all of csrc/ but operators.cpp and eigh.cpp, whose `eigh` stands here.
#include <cstring>
#include <vector>

#include "../eigh.h"
#include "../orthonormalise.cpp"
#include "../products.cpp"
#include "../small.cpp"
#include "../spectrum.cpp"
#include "syev_batched.h"

namespace lowrank_kernels {
namespace {

// What is noted of a call: its order of matrices and its batch, the place of its first matrix, and its workspaces.
struct Call {
    int64_t l, first, batch, device_bytes, host_bytes;
};

// Behaves as syev_batched.h says of a library. `failing`: the matrix of the whole batch that is not solved, or −1. It leaves finite numbers
// in the place of a result then, as a solver does that gave up. Its workspaces are written to from end to end.
struct Lapack {
    int64_t failing, host_bytes;
    std::vector<Call> calls;
    int64_t faults = 0, held = 0, released = 0, seen = 0;
    bool asked = false;

    void expect(bool holds) { faults += !holds; }

    cuda::WorkspaceBytes workspace(int64_t l, const double* matrices, const double* values, int64_t batch) {
        expect(l > 0 && batch > 0 && matrices != nullptr && values != nullptr && !asked);
        asked = true;
        calls.push_back({l, seen, batch, 8 * l * batch + 64, host_bytes});
        return {static_cast<size_t>(calls.back().device_bytes), static_cast<size_t>(host_bytes)};
    }

    void solve(int64_t l, double* matrices, double* values, void* device, size_t device_size, void* host, size_t host_size, int* info,
               int64_t batch) {
        const Call& call = calls.back();
        expect(asked && l == call.l && batch == call.batch);
        expect(static_cast<int64_t>(device_size) == call.device_bytes && static_cast<int64_t>(host_size) == call.host_bytes);
        expect(device != nullptr && reinterpret_cast<uintptr_t>(device) % 16 == 0 && (host != nullptr) == (host_size > 0));
        asked = false;
        std::memset(device, 0xFF, device_size);
        if (host_size > 0) std::memset(host, 0xFF, host_size);
        held += host_size > 0;
        at::Tensor all = at::from_blob(matrices, {batch, l, l}, at::kDouble), found = at::from_blob(values, {batch, l}, at::kDouble);
        expect(at::isfinite(all).all().item<bool>());  // what cuSOLVER does with a NaN is not documented
        // The lower triangle of columns is the upper one of rows; the other must not matter.
        const auto [ascending, vectors] = at::linalg_eigh(all.triu(), "U");
        found.copy_(ascending);
        all.copy_(vectors.mT());
        for (int64_t matrix = 0; matrix < batch; ++matrix) {
            expect(info[matrix] == 0);
            if (seen + matrix != failing) continue;
            info[matrix] = 1;
            all[matrix].fill_(0.5);
            found[matrix].fill_(0.25);
        }
        seen += batch;
    }

    void release_when_done(std::unique_ptr<std::byte[]> memory) { released += memory != nullptr; }
};

int64_t failing_in_eigh = -1;

at::Tensor copied(const float* values, at::IntArrayRef sizes) { return at::from_blob(const_cast<float*>(values), sizes, at::kFloat).clone(); }

void store(const Spectrum& found, float* vectors, float* sigma) {
    at::from_blob(vectors, found.vectors.sizes(), at::kFloat).copy_(found.vectors);
    at::from_blob(sigma, found.sigma.sizes(), at::kFloat).copy_(found.sigma);
}

}  // namespace

Eigen eigh(const at::Tensor& gram, int64_t, std::optional<cuda::Eigensolver>) {
    Lapack library{failing_in_eigh, 0};
    auto [values, vectors] = cuda::eigh_by(library, gram);
    TORCH_CHECK(library.faults == 0, library.faults, " arguments of the solver are not as they should be");
    return {values, vectors};
}

}  // namespace lowrank_kernels

using namespace lowrank_kernels;
#define EXPORTED extern "C" __attribute__((visibility("default")))

// values (batch, l), vectors (batch, l, l), calls (≥ number of calls, 5). Returns that number, or −1 if anything about the calls is wrong.
EXPORTED int64_t eigh_by_lapack(const double* gram, double* values, double* vectors, int64_t l, int64_t batch, int64_t failing,
                                int64_t host_bytes, int64_t* calls) {
    Lapack library{failing, host_bytes};
    const at::Tensor matrices = at::from_blob(const_cast<double*>(gram), {batch, l, l}, at::kDouble);
    const auto [found_values, found_vectors] = cuda::eigh_by(library, matrices);
    at::from_blob(values, {batch, l}, at::kDouble).copy_(found_values);
    at::from_blob(vectors, {batch, l, l}, at::kDouble).copy_(found_vectors);
    std::memcpy(calls, library.calls.data(), library.calls.size() * sizeof(Call));
    const bool right = library.faults == 0 && library.held == library.released && !library.asked;
    return right ? static_cast<int64_t>(library.calls.size()) : -1;
}

// The operators `leading` and `short_side_spectrum` on grads (batch, m, n), with the eigenproblem of matrix `failing` not solved: vectors
// (batch, count, m) or (batch, k, k) as rows, sigma (batch, count) or (batch, k).
EXPORTED void leading_as_on_a_gpu(const float* grads, int64_t batch, int64_t m, int64_t n, int64_t count, int64_t oversample,
                                  int64_t power_iters, int64_t seed, int64_t failing, float* vectors, float* sigma) {
    failing_in_eigh = failing;
    const Gradients all(copied(grads, {batch, m, n}));
    store(leading(all, count, {oversample, power_iters, seed}, peak_of(all.joined())), vectors, sigma);
}

EXPORTED void short_side_spectrum_as_on_a_gpu(const float* grads, int64_t batch, int64_t m, int64_t n, int64_t count, int64_t failing,
                                              float* vectors, float* sigma) {
    failing_in_eigh = failing;
    store(short_side_spectrum(Gradients(copied(grads, {batch, m, n})), count), vectors, sigma);
}
