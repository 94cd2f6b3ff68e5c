// fp32 products in fp32, and sums of bf16 products too, whatever torch's settings allow outside: the C++ half of
// lowrank_kernels/precision.py.
#pragma once

#include <ATen/Context.h>
#include <torch/version.h>

#include <mutex>
#include <string>

namespace lowrank_kernels {

// What one backend's matrix products may be computed in. Torch's settings have changed their form twice.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
struct Fp32Products {
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
struct Fp32Products {
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
struct Fp32Products {
    at::Float32MatmulPrecision before = at::globalContext().float32MatmulPrecision();
    void set(bool full) const { at::globalContext().setFloat32MatmulPrecision(full ? at::Float32MatmulPrecision::HIGHEST : before); }
};
#endif

// Whether cuBLAS may add up a product of bf16 matrices in bf16, where it splits the sums. A bool until torch 2.8, an enumeration since.
inline bool reduces_in_bf16(bool allowed) { return allowed; }
template <typename Option>
bool reduces_in_bf16(Option option) {
    return option == Option::AllowReducedPrecisionWithSplitK;
}

struct Bf16Sums {
    bool allowed = reduces_in_bf16(at::globalContext().allowBF16ReductionCuBLAS());
    void set(bool full) const {
        if (allowed) at::globalContext().setAllowBF16ReductionCuBLAS(!full);  // else it stays what it is, split sums or not
    }
};

// The settings are the whole process's: the first of several threads in here changes them, the last one puts them back.
template <typename Settings>
class Full {
 public:
    Full() {
        const std::lock_guard lock(mutex());
        if (users() == 0) {
            before() = Settings();
            before().set(true);
        }
        ++users();
    }
    ~Full() {
        const std::lock_guard lock(mutex());
        if (--users() == 0) before().set(false);
    }
    Full(const Full&) = delete;
    Full& operator=(const Full&) = delete;

 private:
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static int& users() {
        static int count = 0;
        return count;
    }
    static Settings& before() {
        static Settings settings;
        return settings;
    }
};

// fp32 products in fp32.
using FullPrecision = Full<Fp32Products>;
// Products of bf16 matrices with sums in fp32.
using FullAccumulation = Full<Bf16Sums>;

}  // namespace lowrank_kernels
