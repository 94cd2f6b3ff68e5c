// Four elements of a stream from one Philox counter: what a thread makes, and how it stores them.
#pragma once

#include <cstring>
#include <type_traits>

#include "../philox.h"

namespace lowrank_kernels::cuda {

constexpr int GROUP = 4;

struct NormalValues {
    using Value = float;
    static LRK_HOST_DEVICE void make(const philox::Words& words, float* out) {
        philox::normal_pair(words.value[0], words.value[1], out);
        philox::normal_pair(words.value[2], words.value[3], out + 2);
    }
};

// −log(E), E = −log(1 − u) exponential, in fp32.
struct GumbelValues {
    using Value = float;
    static LRK_HOST_DEVICE void make(const philox::Words& words, float* out) {
        for (int i = 0; i < GROUP; ++i) {
            const float unit = (static_cast<float>(words.value[i]) + 0.5f) * 0x1p-32f;
            out[i] = -logf(-log1pf(-fminf(unit, 1.0f - 0x1p-24f)));
        }
    }
};

struct WordValues {
    using Value = uint32_t;
    static LRK_HOST_DEVICE void make(const philox::Words& words, uint32_t* out) {
        for (int i = 0; i < GROUP; ++i) out[i] = words.value[i];
    }
};

// One rounding to what is stored. sketch.cu specialises it for 16-bit types, whose conversion operators PyTorch takes from extensions.
template <typename Out, typename Value>
LRK_HOST_DEVICE Out stored_as(Value value) {
    return static_cast<Out>(value);
}

// Stored at once, in pieces of at most 16 bytes.
template <typename Out>
struct alignas(sizeof(Out) * GROUP > 16 ? 16 : sizeof(Out) * GROUP) Four {
    Out value[GROUP];
};

// __stwb is the plain store as one instruction; nvcc takes an assignment apart into elements here.
template <typename Out>
LRK_HOST_DEVICE void store(Out* out, const Four<Out>& four) {
#if defined(__CUDA_ARCH__)
    using Piece = std::conditional_t<sizeof(Four<Out>) == 8, uint2, uint4>;
    Piece pieces[sizeof(four) / sizeof(Piece)];
    memcpy(pieces, &four, sizeof(four));
    for (size_t i = 0; i < sizeof(four) / sizeof(Piece); ++i) __stwb(reinterpret_cast<Piece*>(out) + i, pieces[i]);
#else
    *reinterpret_cast<Four<Out>*>(out) = four;
#endif
}

LRK_HOST_DEVICE constexpr int64_t group_count(int64_t count) { return (count + GROUP - 1) / GROUP; }

// Elements 4·group … 4·group + 3 of a row of `count`, whatever its address is a multiple of.
template <typename Values, typename Out>
LRK_HOST_DEVICE void fill_group(Out* row, int64_t count, int64_t group, uint64_t seed, uint32_t stream_id) {
    typename Values::Value values[GROUP];
    Values::make(philox::words(seed, stream_id, static_cast<uint64_t>(group)), values);
    Four<Out> four;
    for (int i = 0; i < GROUP; ++i) four.value[i] = stored_as<Out>(values[i]);
    Out* out = row + GROUP * group;
    const int64_t left = count - GROUP * group;
    if (left >= GROUP && reinterpret_cast<uintptr_t>(out) % alignof(Four<Out>) == 0) {
        store(out, four);
    } else {
        for (int i = 0; i < GROUP && i < left; ++i) out[i] = four.value[i];
    }
}

}  // namespace lowrank_kernels::cuda
