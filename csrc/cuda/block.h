// One kernel body, two machines: a thread block on a GPU, and on a host a loop over the threads of one.
//
// A body is a template over a Block. It is written as phases `block.each(count, f)`, in which thread t runs f(t), f(t + threads), …, and
// barriers `block.sync()` between a phase that writes what another thread of the next phase reads (or reads what it writes). Code outside
// `each` is run by every thread alike: it may read shared memory and branch on what all threads compute to the same bits, never write.
//
// HostBlock is a race detector as well. It runs the threads of a phase in ascending, descending or shuffled order, and an Array knows
// which thread last read and wrote each element since the last barrier: two threads at one element, one of them writing, are a fault
// whatever the order. So is an index out of range. A body with no fault needs no further barrier.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define LRK_BODY __device__ __forceinline__
#define LRK_EITHER_SIDE __host__ __device__
#define LRK_UNROLL _Pragma("unroll")
#else
#include <algorithm>
#include <random>
#include <vector>
#define LRK_BODY inline
#define LRK_EITHER_SIDE
#define LRK_UNROLL
#endif

namespace lowrank_kernels::cuda {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;

#if defined(__CUDACC__)

// Expects blockDim = (a multiple of 32, 1, 1).
class DeviceBlock {
 public:
    template <typename T>
    using Array = T*;

    // N values of each thread that outlive a barrier, in registers.
    template <typename T, int N>
    struct Locals {
        T value[N];
        __device__ __forceinline__ T* mine() { return value; }
    };

    template <typename T, int N>
    __device__ __forceinline__ Locals<T, N> locals() const {
        return {};
    }

    template <typename Index, typename Function>
    __device__ __forceinline__ void each(Index count, Function function) const {
        for (Index i = threadIdx.x; i < count; i += blockDim.x) function(i);
    }

    __device__ __forceinline__ void sync() const { __syncthreads(); }

    // total[c] = Σ_i of what function(i, sums) adds to sums[c]; every thread gets the same bits. The order is fixed by the number of
    // threads: strided within a thread, a butterfly within a warp, then warps in order.
    template <typename T, int N, typename Index, typename Function>
    __device__ __forceinline__ void sum(Index count, Function function, T (&total)[N]) const {
        __shared__ T scratch[N * MAX_WARPS];
        LRK_UNROLL
        for (int c = 0; c < N; ++c) total[c] = T(0);
        for (Index i = threadIdx.x; i < count; i += blockDim.x) function(i, total);
        LRK_UNROLL
        for (int c = 0; c < N; ++c) {
            LRK_UNROLL
            for (int lane = WARP / 2; lane > 0; lane /= 2) total[c] += __shfl_xor_sync(0xFFFFFFFFu, total[c], lane);
        }
        const int warps = blockDim.x / WARP;
        if (warps == 1) return;
        if (threadIdx.x % WARP == 0) {
            LRK_UNROLL
            for (int c = 0; c < N; ++c) scratch[threadIdx.x / WARP * N + c] = total[c];
        }
        __syncthreads();
        LRK_UNROLL
        for (int c = 0; c < N; ++c) {
            total[c] = T(0);
            for (int warp = 0; warp < warps; ++warp) total[c] += scratch[warp * N + c];
        }
        __syncthreads();  // scratch may be written again
    }
};

#else

enum class Order { ASCENDING, DESCENDING, SHUFFLED };

class HostBlock {
 public:
    static constexpr int EVERY_THREAD = -1;

    HostBlock(int threads, Order order, uint64_t seed) : threads_(threads), order_(order), engine_(seed), turns_(threads) {
        for (int t = 0; t < threads; ++t) turns_[t] = order == Order::DESCENDING ? threads - 1 - t : t;
    }

    // Memory that several threads may touch; size elements at data.
    template <typename T>
    class Array {
     public:
        class Cell {
         public:
            Cell(Array& array, int64_t index) : array_(array), index_(index) {}
            operator T() const { return array_.read(index_); }
            Cell& operator=(T value) {
                array_.write(index_, value);
                return *this;
            }
            Cell& operator=(const Cell& other) { return *this = static_cast<T>(other); }

         private:
            Array& array_;
            int64_t index_;
        };

        Array(HostBlock& block, T* data, int64_t size) : block_(&block), data_(data), history_(size) {}
        Cell operator[](int64_t index) const { return {const_cast<Array&>(*this), index}; }

     private:
        struct Access {
            int64_t read_epoch = -1, write_epoch = -1;
            int reader = 0, writer = 0;
        };

        bool outside(int64_t index) {
            if (index >= 0 && index < static_cast<int64_t>(history_.size())) return false;
            ++block_->faults_;
            return true;
        }

        T read(int64_t index) {
            if (outside(index)) return T(0);
            Access& last = history_[index];
            const int64_t epoch = block_->epoch_;
            const int thread = block_->thread_;
            if (last.write_epoch == epoch && last.writer != thread) ++block_->faults_;
            last.reader = last.read_epoch == epoch && last.reader != thread ? EVERY_THREAD : thread;
            last.read_epoch = epoch;
            return data_[index];
        }

        void write(int64_t index, T value) {
            if (outside(index)) return;
            Access& last = history_[index];
            const int64_t epoch = block_->epoch_;
            const int thread = block_->thread_;
            const bool shared = thread == EVERY_THREAD || (last.write_epoch == epoch && last.writer != thread) ||
                                (last.read_epoch == epoch && last.reader != thread);
            if (shared) ++block_->faults_;
            last.writer = thread;
            last.write_epoch = epoch;
            data_[index] = value;
        }

        HostBlock* block_;
        T* data_;
        std::vector<Access> history_;
    };

    template <typename T, int N>
    class Locals {
     public:
        explicit Locals(HostBlock& block) : block_(&block), values_(static_cast<size_t>(block.threads_) * N) {}
        // A thread with two indices of a phase would find the values of the other one here.
        T* mine() {
            if (block_->thread_ == EVERY_THREAD || block_->strided_) ++block_->faults_;
            return values_.data() + static_cast<size_t>(std::max(block_->thread_, 0)) * N;
        }

     private:
        HostBlock* block_;
        std::vector<T> values_;
    };

    template <typename T, int N>
    Locals<T, N> locals() {
        return Locals<T, N>(*this);
    }

    template <typename Index, typename Function>
    void each(Index count, Function function) {
        if (order_ == Order::SHUFFLED) std::shuffle(turns_.begin(), turns_.end(), engine_);
        strided_ = count > threads_;
        for (int thread : turns_) {
            thread_ = thread;
            for (Index i = thread; i < count; i += threads_) function(i);
        }
        thread_ = EVERY_THREAD;
    }

    void sync() {
        if (thread_ != EVERY_THREAD) ++faults_;  // a barrier that not every thread reaches
        ++epoch_;
    }

    // Adds in the order of DeviceBlock::sum.
    template <typename T, int N, typename Index, typename Function>
    void sum(Index count, Function function, T (&total)[N]) {
        struct Sums {
            T value[N] = {};
        };
        std::vector<Sums> own(threads_);
        each(count, [&](Index i) { function(i, own[thread_].value); });
        for (int lane = WARP / 2; lane > 0; lane /= 2) {
            const std::vector<Sums> before = own;
            for (int t = 0; t < threads_; ++t) {
                for (int c = 0; c < N; ++c) own[t].value[c] += before[t ^ lane].value[c];
            }
        }
        for (int c = 0; c < N; ++c) {
            total[c] = own[0].value[c];
            if (threads_ == WARP) continue;
            total[c] = T(0);
            for (int t = 0; t < threads_; t += WARP) total[c] += own[t].value[c];
        }
        if (threads_ > WARP) epoch_ += 2;  // the two barriers inside
    }

    int64_t faults() const { return faults_; }

 private:
    int threads_;
    Order order_;
    std::mt19937_64 engine_;
    std::vector<int> turns_;
    int thread_ = EVERY_THREAD;
    bool strided_ = false;
    int64_t epoch_ = 0;
    int64_t faults_ = 0;
};

#endif

}  // namespace lowrank_kernels::cuda
