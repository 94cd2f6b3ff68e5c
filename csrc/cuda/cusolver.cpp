#include "cusolver.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#if defined(LOWRANK_KERNELS_CUSOLVER)  // setup.py found the headers
#include <ATen/cuda/CUDAContextLight.h>
#include <cusolverDn.h>
#endif

#include "syev_batched.h"

namespace lowrank_kernels::cuda {

#if defined(CUSOLVER_VERSION) && CUSOLVER_VERSION >= 11701
namespace {

void check(cusolverStatus_t status, const char* call) {
    TORCH_CHECK(status == CUSOLVER_STATUS_SUCCESS, call, " failed with status ", static_cast<int>(status));
}

// eigh_by's library. Eigenvectors lie in the columns of column-major matrices: each is contiguous. Of a symmetric matrix the lower triangle
// in columns is the upper one in rows.
class Cusolver {
 public:
    explicit Cusolver(cudaStream_t stream) : handle_(at::cuda::getCurrentCUDASolverDnHandle()), stream_(stream) {
        check(cusolverDnCreateParams(&params_), "cusolverDnCreateParams");
    }
    ~Cusolver() { cusolverDnDestroyParams(params_); }
    Cusolver(const Cusolver&) = delete;
    Cusolver& operator=(const Cusolver&) = delete;

    WorkspaceBytes workspace(int64_t l, const double* matrices, const double* values, int64_t batch) {
        WorkspaceBytes bytes;
        check(cusolverDnXsyevBatched_bufferSize(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, l, CUDA_R_64F, matrices,
                                                l, CUDA_R_64F, values, CUDA_R_64F, &bytes.device, &bytes.host, batch),
              "cusolverDnXsyevBatched_bufferSize");
        return bytes;
    }

    void solve(int64_t l, double* matrices, double* values, void* device, size_t device_bytes, void* host, size_t host_bytes, int* info,
               int64_t batch) {
        check(cusolverDnXsyevBatched(handle_, params_, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, l, CUDA_R_64F, matrices, l,
                                     CUDA_R_64F, values, CUDA_R_64F, device, device_bytes, host, host_bytes, info, batch),
              "cusolverDnXsyevBatched");
    }

    // Copies from and to this memory may still be on their way: the stream frees it behind them.
    void release_when_done(std::unique_ptr<std::byte[]> memory) {
        C10_CUDA_CHECK(cudaLaunchHostFunc(
            stream_, [](void* bytes) { delete[] static_cast<std::byte*>(bytes); }, memory.get()));
        memory.release();
    }

 private:
    cusolverDnHandle_t handle_;
    cudaStream_t stream_;
    cusolverDnParams_t params_ = nullptr;
};

}  // namespace

bool cusolver_serves() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None; }

std::tuple<at::Tensor, at::Tensor> eigh_by_cusolver(const at::Tensor& gram) {
    const c10::cuda::CUDAGuard guard(gram.device());
    TORCH_CHECK(cusolver_serves(), "cuSOLVER's eigensolver is not called while a CUDA graph is captured");
    Cusolver library(c10::cuda::getCurrentCUDAStream(gram.device().index()).stream());
    return eigh_by(library, gram);
}

#else

bool cusolver_serves() { return false; }

std::tuple<at::Tensor, at::Tensor> eigh_by_cusolver(const at::Tensor&) {
    TORCH_CHECK(false, "this build has no cusolverDnXsyevBatched: it needs the headers of CUDA 12.6.2 or newer, cuSOLVER's among them");
}

#endif

}  // namespace lowrank_kernels::cuda
