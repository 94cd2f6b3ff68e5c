// Philox4x32-10: random numbers as a pure function of (seed, stream, element), the same on a host and in a kernel.
//
//     word[i] = philox(key = seed, counter = (i / 4, stream, 0))[i % 4]
//
// The integer words are those of lowrank_kernels/philox.py bit for bit; what is computed from them agrees to rounding.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LRK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LRK_HOST_DEVICE inline
#endif

namespace lowrank_kernels::philox {

// Streams keep the draws of one seed apart. The numbers are part of the format: changing one changes every run.
enum Stream : uint32_t { SKETCH = 0, TAIL = 1, GUMBEL = 2, COMPLETION = 3, BASIS = 4 };

struct Words {
    uint32_t value[4];
};

LRK_HOST_DEVICE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(counter.value[0]) * 0xD2511F53u;
        const uint64_t product1 = static_cast<uint64_t>(counter.value[2]) * 0xCD9E8D57u;
        counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.value[1] ^ key0, static_cast<uint32_t>(product1),
                   static_cast<uint32_t>(product0 >> 32) ^ counter.value[3] ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Words 4·block … 4·block + 3 of a stream.
LRK_HOST_DEVICE Words words(uint64_t seed, uint32_t stream, uint64_t block) {
    return philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0u}, static_cast<uint32_t>(seed),
                      static_cast<uint32_t>(seed >> 32));
}

// (0, 1), exactly: 23 bits and a half.
LRK_HOST_DEVICE float unit23(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

// [0, 1], all 32 bits rounded to fp32.
LRK_HOST_DEVICE float unit32(uint32_t word) { return (static_cast<float>(word) + 0.5f) * 0x1p-32f; }

// Two N(0, 1) from two words, by Box-Muller in fp32; |z| < 5.8.
LRK_HOST_DEVICE void normal_pair(uint32_t first, uint32_t second, float* out) {
    const float radius = sqrtf(-2.0f * logf(unit23(first)));
    const float angle = unit23(second) * 6.2831853071795864769f;
    out[0] = radius * cosf(angle);
    out[1] = radius * sinf(angle);
}

// splitmix64's finaliser over one part of a place, as philox.derive_seed does for each part in turn.
LRK_HOST_DEVICE uint64_t derive_seed(uint64_t seed, uint64_t part) {
    uint64_t state = seed + 0x9E3779B97F4A7C15ull * (part + 1);
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
    return state ^ (state >> 31);
}

}  // namespace lowrank_kernels::philox
