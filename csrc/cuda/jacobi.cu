#include <climits>

#include "jacobi.cuh"
#include "jacobi.h"

namespace lowrank_kernels::cuda {

namespace {

// before: the flags of the sweep before, null in the first. Launches of a stream run one after another, so all its stores are done.
template <typename T>
__global__ void __launch_bounds__(JACOBI_MAX_THREADS)
    jacobi_round_kernel(T* vectors, int l, int64_t rows, int round, const int* before, int* flags) {
    const unsigned pairs = l / 2;
    const int64_t matrix = blockIdx.x / pairs;
    if (before != nullptr && before[matrix] == 0) return;
    const Pair pair = tournament_pair(l, round, blockIdx.x % pairs);
    T* columns = vectors + matrix * l * rows;
    DeviceBlock block;
    const bool changed = rotate_pair<T>(block, columns + pair.first * rows, columns + pair.second * rows, rows);
    if (changed && threadIdx.x == 0) flags[matrix] = 1;
}

}  // namespace

template <typename T>
cudaError_t jacobi(T* vectors, int l, int64_t rows, int64_t batch, int* flags, int max_sweeps, cudaStream_t stream) {
    if (l < 0 || rows < 0 || batch < 0 || max_sweeps < 0) return cudaErrorInvalidValue;
    const int64_t pairs = l / 2;
    if (batch > INT_MAX || pairs * batch > INT_MAX) return cudaErrorInvalidValue;
    if (batch == 0 || max_sweeps == 0) return cudaSuccess;
    const cudaError_t status = cudaMemsetAsync(flags, 0, sizeof(int) * max_sweeps * batch, stream);
    if (status != cudaSuccess || pairs == 0 || rows == 0) return status;
    const unsigned blocks = static_cast<unsigned>(pairs * batch);
    for (int sweep = 0; sweep < max_sweeps; ++sweep) {
        int* now = flags + sweep * batch;
        const int* before = sweep == 0 ? nullptr : now - batch;
        for (int round = 0; round < tournament_rounds(l); ++round) {
            jacobi_round_kernel<T><<<blocks, jacobi_threads(rows), 0, stream>>>(vectors, l, rows, round, before, now);
            const cudaError_t launched = cudaGetLastError();
            if (launched != cudaSuccess) return launched;
        }
    }
    return cudaSuccess;
}

template cudaError_t jacobi(float*, int, int64_t, int64_t, int*, int, cudaStream_t);
template cudaError_t jacobi(double*, int, int64_t, int64_t, int*, int, cudaStream_t);

}  // namespace lowrank_kernels::cuda
