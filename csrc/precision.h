// fp32 products in fp32, whatever torch's settings allow outside: the C++ half of lowrank_kernels/precision.py.
#pragma once

#include <ATen/Context.h>
#include <torch/version.h>

namespace lowrank_kernels {

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 9

// Of one backend. A setting that allows nothing narrower is left alone, so that it goes on following torch's global one.
class FullPrecisionOf {
   public:
    explicit FullPrecisionOf(at::Float32Backend backend)
        : backend_(backend), before_(at::globalContext().float32Precision(backend, at::Float32Op::MATMUL)) {
        if (narrower()) set(at::Float32Precision::IEEE);
    }
    ~FullPrecisionOf() {
        if (narrower()) set(before_);
    }
    FullPrecisionOf(const FullPrecisionOf&) = delete;
    FullPrecisionOf& operator=(const FullPrecisionOf&) = delete;

   private:
    bool narrower() const { return before_ == at::Float32Precision::TF32 || before_ == at::Float32Precision::BF16; }
    void set(at::Float32Precision precision) const {
        at::globalContext().setFloat32Precision(backend_, at::Float32Op::MATMUL, precision);
    }
    const at::Float32Backend backend_;
    const at::Float32Precision before_;
};

struct FullPrecision {
    FullPrecisionOf cuda{at::Float32Backend::CUDA}, mkldnn{at::Float32Backend::MKLDNN};
};

#else

class FullPrecision {
   public:
    FullPrecision() : before_(at::globalContext().float32MatmulPrecision()) {
        at::globalContext().setFloat32MatmulPrecision(at::Float32MatmulPrecision::HIGHEST);
    }
    ~FullPrecision() { at::globalContext().setFloat32MatmulPrecision(before_); }
    FullPrecision(const FullPrecision&) = delete;
    FullPrecision& operator=(const FullPrecision&) = delete;

   private:
    const at::Float32MatmulPrecision before_;
};

#endif

}  // namespace lowrank_kernels
