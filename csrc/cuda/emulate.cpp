// The kernels' bodies on a host, for tests where there is no GPU. Needs a C++17 compiler and nothing of CUDA:
//
//     g++ -O2 -shared -fPIC -std=c++17 emulate.cpp
//
// All pointers are to contiguous arrays of the shapes that cholesky_inverse.h, jacobi.h and sketch.h state. `threads` of 0 stands for what
// the launcher takes, `order` for the order in which the threads of a phase run: ascending, descending, shuffled by `seed`. What is
// returned is the number of races, of divergent barriers and of indices out of range.
#include "block.h"
#include "cholesky_inverse.cuh"
#include "eigensolvers.h"
#include "jacobi.cuh"
#include "sketch.cuh"

namespace {

using namespace lowrank_kernels;
using cuda::HostBlock;
using cuda::Order;

template <typename T>
int64_t cholesky_inverse(const T* gram, T* inverse, int l, int64_t batch, T shift, int threads, int order, uint64_t seed) {
    int64_t faults = 0;
    for (int64_t matrix = 0; matrix < batch; ++matrix) {
        HostBlock block(threads > 0 ? threads : cuda::cholesky_inverse_threads(l), static_cast<Order>(order), seed + matrix);
        std::vector<T> shared(cuda::packed_size(l), std::nan(""));  // a GPU's shared memory begins with anything
        const HostBlock::Array<T> packed(block, shared.data(), cuda::packed_size(l));
        cuda::cholesky_inverse_body(block, gram + matrix * l * l, inverse + matrix * l * l, l, shift, packed);
        faults += block.faults();
    }
    return faults;
}

template <typename T>
int64_t jacobi(T* vectors, int l, int64_t rows, int64_t batch, int* flags, int max_sweeps, int threads, int order, uint64_t seed) {
    int64_t faults = 0;
    std::mt19937_64 engine(seed);
    std::vector<int> turns(batch * (l / 2));
    for (size_t i = 0; i < turns.size(); ++i) turns[i] = static_cast<int>(i);
    std::fill(flags, flags + max_sweeps * batch, 0);
    for (int sweep = 0; sweep < max_sweeps; ++sweep) {
        for (int round = 0; round < cuda::tournament_rounds(l); ++round) {
            if (order == static_cast<int>(Order::DESCENDING)) std::reverse(turns.begin(), turns.end());
            if (order == static_cast<int>(Order::SHUFFLED)) std::shuffle(turns.begin(), turns.end(), engine);
            for (int turn : turns) {
                const int64_t matrix = turn / (l / 2);
                if (sweep > 0 && flags[(sweep - 1) * batch + matrix] == 0) continue;
                const cuda::Pair pair = cuda::tournament_pair(l, round, turn % (l / 2));
                T* columns = vectors + matrix * l * rows;
                HostBlock block(threads > 0 ? threads : cuda::jacobi_threads(rows), static_cast<Order>(order), engine());
                const HostBlock::Array<T> first(block, columns + pair.first * rows, rows);
                const HostBlock::Array<T> second(block, columns + pair.second * rows, rows);
                if (cuda::rotate_pair<T>(block, first, second, rows)) flags[sweep * batch + matrix] = 1;
                faults += block.faults();
            }
        }
    }
    return faults;
}

template <typename Values, typename Out>
void fill(Out* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id) {
    for (int64_t row = 0; row < batch; ++row) {
        for (int64_t group = 0; group < cuda::group_count(count); ++group) {
            cuda::fill_group<Values>(out + row * count, count, group, static_cast<uint64_t>(seeds[row]), stream_id);
        }
    }
}

// Each thread reads its neighbour's element, then writes its own; in the end all read the element at `index`.
int64_t shift_by_one(bool with_barrier, int64_t index) {
    constexpr int COUNT = 64;
    HostBlock block(COUNT, Order::SHUFFLED, 1);
    std::vector<float> memory(COUNT, 1.0f), results(COUNT);
    const HostBlock::Array<float> shared(block, memory.data(), COUNT);
    block.each(COUNT, [&](int i) { results[i] = shared[(i + 1) % COUNT]; });
    if (with_barrier) block.sync();
    block.each(COUNT, [&](int i) { shared[i] = results[i]; });
    block.sync();
    results[0] = shared[index];
    return block.faults();
}

}  // namespace

extern "C" {

int64_t cholesky_inverse_f32(const float* gram, float* inverse, int l, int64_t batch, float shift, int threads, int order, uint64_t seed) {
    return cholesky_inverse(gram, inverse, l, batch, shift, threads, order, seed);
}

int64_t cholesky_inverse_f64(const double* gram, double* inverse, int l, int64_t batch, double shift, int threads, int order,
                             uint64_t seed) {
    return cholesky_inverse(gram, inverse, l, batch, shift, threads, order, seed);
}

int64_t cholesky_inverse_shared_bytes(int l, int64_t itemsize) { return cuda::packed_bytes(l, itemsize); }

int cholesky_inverse_max_columns(int64_t shared_limit, int64_t itemsize) { return cuda::packed_max_columns(shared_limit, itemsize); }

int cholesky_inverse_threads(int l) { return cuda::cholesky_inverse_threads(l); }

int64_t jacobi_f32(float* vectors, int l, int64_t rows, int64_t batch, int* flags, int max_sweeps, int threads, int order, uint64_t seed) {
    return jacobi(vectors, l, rows, batch, flags, max_sweeps, threads, order, seed);
}

int64_t jacobi_f64(double* vectors, int l, int64_t rows, int64_t batch, int* flags, int max_sweeps, int threads, int order, uint64_t seed) {
    return jacobi(vectors, l, rows, batch, flags, max_sweeps, threads, order, seed);
}

int tournament_rounds(int l) { return cuda::tournament_rounds(l); }

void tournament_pair(int l, int round, int index, int* pair) {
    const cuda::Pair players = cuda::tournament_pair(l, round, index);
    pair[0] = players.first;
    pair[1] = players.second;
}

// Whether the table of eigensolvers.h gives `batch` matrices (l, l) to cuSOLVER.
int cusolver_takes(int64_t l, int64_t batch, int can_be_called) {
    return cuda::eigensolver_for(l, batch, can_be_called != 0) == cuda::Eigensolver::CUSOLVER;
}

int64_t matrices_per_call(int64_t l) { return cuda::matrices_per_call(l); }

void philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
    const philox::Words words = philox::philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    for (int i = 0; i < 4; ++i) out[i] = words.value[i];
}

void philox_words(uint64_t seed, uint32_t stream_id, uint64_t block, uint32_t* out) {
    const philox::Words words = philox::words(seed, stream_id, block);
    for (int i = 0; i < 4; ++i) out[i] = words.value[i];
}

uint64_t derive_seed(uint64_t seed, uint64_t part) { return philox::derive_seed(seed, part); }

void normal_f32(float* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id) {
    fill<cuda::NormalValues>(out, count, seeds, batch, stream_id);
}

void normal_f64(double* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id) {
    fill<cuda::NormalValues>(out, count, seeds, batch, stream_id);
}

void gumbel(float* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id) {
    fill<cuda::GumbelValues>(out, count, seeds, batch, stream_id);
}

void gumbel_of_words(const uint32_t* words, float* out) { cuda::GumbelValues::make({words[0], words[1], words[2], words[3]}, out); }

void normal_of_words(const uint32_t* words, float* out) { cuda::NormalValues::make({words[0], words[1], words[2], words[3]}, out); }

void words(int64_t* out, int64_t count, const int64_t* seeds, int64_t batch, uint32_t stream_id) {
    fill<cuda::WordValues>(out, count, seeds, batch, stream_id);
}

// What the detector finds in a body of 64 threads that needs a barrier.
int64_t faults_of_a_shift(int with_barrier, int64_t index) { return shift_by_one(with_barrier != 0, index); }
}
