#include <climits>

#include "cholesky_inverse.cuh"
#include "cholesky_inverse.h"

namespace lowrank_kernels::cuda {

namespace {

constexpr int64_t STATIC_LIMIT = 48 * 1024;  // bytes of dynamic shared memory that need no attribute

template <typename T>
__global__ void __launch_bounds__(CHOLESKY_THREADS) cholesky_inverse_kernel(const T* gram, T* inverse, int l, T shift) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * l * l;
    DeviceBlock block;
    cholesky_inverse_body(block, gram + offset, inverse + offset, l, shift, reinterpret_cast<T*>(shared));
}

}  // namespace

int64_t cholesky_inverse_shared_bytes(int l, size_t itemsize) { return packed_bytes(l, itemsize); }

int cholesky_inverse_max_columns(int64_t shared_limit, size_t itemsize) { return packed_max_columns(shared_limit, itemsize); }

template <typename T>
cudaError_t cholesky_inverse(const T* gram, T* inverse, int l, int64_t batch, T shift, cudaStream_t stream) {
    if (l < 0 || l > CHOLESKY_THREADS || batch < 0 || batch > INT_MAX) return cudaErrorInvalidValue;
    if (l == 0 || batch == 0) return cudaSuccess;
    const int64_t bytes = packed_bytes(l, sizeof(T));
    if (bytes > STATIC_LIMIT) {
        const cudaError_t status =
            cudaFuncSetAttribute(cholesky_inverse_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
        if (status != cudaSuccess) return status;
    }
    cholesky_inverse_kernel<T><<<static_cast<unsigned>(batch), cholesky_inverse_threads(l), bytes, stream>>>(gram, inverse, l, shift);
    return cudaGetLastError();
}

template cudaError_t cholesky_inverse(const float*, float*, int, int64_t, float, cudaStream_t);
template cudaError_t cholesky_inverse(const double*, double*, int, int64_t, double, cudaStream_t);

}  // namespace lowrank_kernels::cuda
