// Random matrices as a function of (seed, stream, element), the draws of lowrank_kernels/philox.py made in one pass over the output.
//
//     out[b][i] = f(word[i]),  word = Philox4x32-10(key = seeds[b], counter = (i / 4, stream_id, 0))
//
// The words agree bit for bit with the Python version, normals and Gumbels to the rounding of log, sin and cos; all are computed in fp32
// and rounded once to the output. Memory: the output is written once; a thread stores four elements together where its row's address
// allows. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

struct __nv_bfloat16;
struct __half;

namespace lowrank_kernels::cuda {

// Everywhere: seeds (batch) int64 on the device, out (batch, count_per_seed) contiguous. Asynchronous.

// N(0, 1). Out is float, double, __nv_bfloat16 or __half.
template <typename Out>
cudaError_t normal(Out* out, int64_t count_per_seed, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream);

extern template cudaError_t normal(float*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);
extern template cudaError_t normal(double*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);
extern template cudaError_t normal(__nv_bfloat16*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);
extern template cudaError_t normal(__half*, int64_t, const int64_t*, int64_t, uint32_t, cudaStream_t);

// Standard Gumbel: −log(−log(1 − u)).
cudaError_t gumbel(float* out, int64_t count_per_seed, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream);

// Uniform uint32 values.
cudaError_t words(int64_t* out, int64_t count_per_seed, const int64_t* seeds, int64_t batch, uint32_t stream_id, cudaStream_t stream);

}  // namespace lowrank_kernels::cuda
