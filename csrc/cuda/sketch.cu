#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "sketch.cuh"
#include "sketch.h"

namespace lowrank_kernels::cuda {

template <>
LRK_HOST_DEVICE __nv_bfloat16 stored_as<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

template <>
LRK_HOST_DEVICE __half stored_as<__half>(float value) {
    return __float2half_rn(value);
}

namespace {

constexpr int THREADS = 256;
constexpr int64_t MAX_BLOCKS = 1 << 20;  // along a row; a thread goes on with the next group
constexpr int64_t MAX_ROWS = 65535;      // the limit of gridDim.y; a block goes on with the next row

template <typename Values, typename Out>
__global__ void __launch_bounds__(THREADS) fill_kernel(Out* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id) {
    const int64_t groups = group_count(count);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t row = blockIdx.y; row < batch; row += gridDim.y) {
        const uint64_t seed = static_cast<uint64_t>(seeds[row]);
        for (int64_t group = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; group < groups; group += stride) {
            fill_group<Values>(out + row * count, count, group, seed, stream_id);
        }
    }
}

template <typename Values, typename Out>
cudaError_t fill(Out* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream) {
    if (count < 0 || batch < 0) return cudaErrorInvalidValue;
    if (count == 0 || batch == 0) return cudaSuccess;
    const int64_t blocks = std::min((group_count(count) + THREADS - 1) / THREADS, MAX_BLOCKS);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(batch, MAX_ROWS)));
    fill_kernel<Values><<<grid, THREADS, 0, stream>>>(out, count, seeds, batch, stream_id);
    return cudaGetLastError();
}

}  // namespace

template <typename Out>
cudaError_t normal(Out* out, int64_t count_per_seed, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream) {
    return fill<NormalValues>(out, count_per_seed, seeds, batch, stream_id, stream);
}

template cudaError_t normal(float*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);
template cudaError_t normal(double*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);
template cudaError_t normal(__nv_bfloat16*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);
template cudaError_t normal(__half*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);

cudaError_t gumbel(float* out, int64_t count_per_seed, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream) {
    return fill<GumbelValues>(out, count_per_seed, seeds, batch, stream_id, stream);
}

cudaError_t words(int64_t* out, int64_t count_per_seed, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream) {
    return fill<WordValues>(out, count_per_seed, seeds, batch, stream_id, stream);
}

}  // namespace lowrank_kernels::cuda
