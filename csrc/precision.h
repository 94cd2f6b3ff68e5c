// fp32 products in fp32, whatever torch's settings allow outside: the C++ half of lowrank_kernels/precision.py.
#pragma once

#include <ATen/Context.h>
#include <torch/version.h>

#include <mutex>
#include <string>

namespace lowrank_kernels {

// What one backend's matrix products may be computed in. Torch's settings have changed their form twice.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
struct Allowed {
    at::Float32Precision cuda = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
    at::Float32Precision mkldnn = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);

    static void set(at::Float32Backend backend, at::Float32Precision before, bool full) {
        // A setting that allows nothing narrower is left alone, so that it goes on following torch's global one.
        if (before != at::Float32Precision::TF32 && before != at::Float32Precision::BF16) return;
        at::globalContext().setFloat32Precision(backend, at::Float32Op::MATMUL, full ? at::Float32Precision::IEEE : before);
    }
    void set(bool full) const {
        set(at::Float32Backend::CUDA, cuda, full);
        set(at::Float32Backend::MKLDNN, mkldnn, full);
    }
};
#elif TORCH_VERSION_MINOR == 9
struct Allowed {
    std::string cuda = at::globalContext().float32Precision("cuda", "matmul");
    std::string mkldnn = at::globalContext().float32Precision("mkldnn", "matmul");

    static void set(const std::string& backend, const std::string& before, bool full) {
        if (before == "tf32" || before == "bf16") at::globalContext().setFloat32Precision(backend, "matmul", full ? "ieee" : before);
    }
    void set(bool full) const {
        set("cuda", cuda, full);
        set("mkldnn", mkldnn, full);
    }
};
#else
struct Allowed {
    at::Float32MatmulPrecision before = at::globalContext().float32MatmulPrecision();
    void set(bool full) const { at::globalContext().setFloat32MatmulPrecision(full ? at::Float32MatmulPrecision::HIGHEST : before); }
};
#endif

// The settings are the whole process's: the first of several threads in here changes them, the last one puts them back.
class FullPrecision {
   public:
    FullPrecision() {
        const std::lock_guard lock(mutex());
        if (users()++ == 0) {
            before() = Allowed();
            before().set(true);
        }
    }
    ~FullPrecision() {
        const std::lock_guard lock(mutex());
        if (--users() == 0) before().set(false);
    }
    FullPrecision(const FullPrecision&) = delete;
    FullPrecision& operator=(const FullPrecision&) = delete;

   private:
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static int& users() {
        static int count = 0;
        return count;
    }
    static Allowed& before() {
        static Allowed allowed;
        return allowed;
    }
};

}  // namespace lowrank_kernels
