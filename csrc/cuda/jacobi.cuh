// One pair of vectors made orthogonal, and who meets whom: the body of one thread block. Formulas and use: jacobi.h.
#pragma once

#include "block.h"

namespace lowrank_kernels::cuda {

// A pair whose |cos| is above ROTATE is rotated; a sweep that met none above CONVERGED is the last. Rotating by less than what counts as
// orthogonal costs no sweep and leaves vectors orthogonal to the rounding of their own elements.
template <typename T>
struct Jacobi;

template <>
struct Jacobi<float> {
    static constexpr float ROTATE = 0x1p-23f, CONVERGED = 0x1p-20f;
    static constexpr float LARGE = 0x1p13f;  // 1 + x² rounds to x² above this x
};

template <>
struct Jacobi<double> {
    static constexpr double ROTATE = 0x1p-52, CONVERGED = 0x1p-49;
    static constexpr double LARGE = 0x1p27;
};

struct Pair {
    int first, second;
};

// Threads for a pair: a warp for short vectors, more where there is work for them.
constexpr int JACOBI_MAX_THREADS = 256;

constexpr int jacobi_threads(int64_t rows) { return rows <= 128 ? WARP : rows <= 1024 ? 2 * WARP : JACOBI_MAX_THREADS; }

LRK_EITHER_SIDE constexpr int tournament_rounds(int l) { return l % 2 == 0 ? l - 1 : l; }

// Pair `index` < l / 2 of a round: the circle method. In tournament_rounds(l) rounds every two meet once; the pairs of a round are
// disjoint. An odd l plays with one more, who does not exist: whoever meets it sits out. first < second.
LRK_EITHER_SIDE inline Pair tournament_pair(int l, int round, int index) {
    const int circle = tournament_rounds(l);
    const int place = index + l % 2;  // place 0 meets the one who stands still
    const int left = (round + place) % circle;
    const int right = place == 0 ? circle : (round - place + circle) % circle;
    return left < right ? Pair{left, right} : Pair{right, left};
}

// Rotates two vectors of `rows` elements so that they are orthogonal. True if they were far from it, by CONVERGED: every thread gets the
// same answer.
template <typename T, typename Block, typename Array>
LRK_BODY bool rotate_pair(Block& block, const Array& first, const Array& second, int64_t rows) {
    T dots[3];
    block.sum(
        rows,
        [&](int64_t i, T(&sums)[3]) {
            const T x = first[i], y = second[i];
            sums[0] += x * x;
            sums[1] += y * y;
            sums[2] += x * y;
        },
        dots);
    const T x_squared = dots[0], y_squared = dots[1], product = dots[2];

    // Roots apart: the product of the squares may underflow. Zero vectors and NaN compare false.
    const T lengths = std::sqrt(x_squared) * std::sqrt(y_squared);
    if (!(lengths > T(0) && std::fabs(product) > Jacobi<T>::ROTATE * lengths)) return false;

    // x' = c·x − s·y, y' = s·x + c·y. The tangent of the smaller angle, |t| ≤ 1, is a root of t² + 2ζt − 1.
    const T zeta = (y_squared - x_squared) / (2 * product);
    const T size = std::fabs(zeta);
    const T root = size > Jacobi<T>::LARGE ? T(0.5) / size : T(1) / (size + std::sqrt(T(1) + zeta * zeta));
    const T tangent = zeta < T(0) ? -root : root;
    const T cosine = T(1) / std::sqrt(T(1) + tangent * tangent);
    const T sine = cosine * tangent;
    // c = 1 − s·tan(θ/2): a rounded cosine would lengthen both vectors a little in every small rotation.
    const T tangent_of_half = sine / (T(1) + cosine);
    block.each(rows, [&](int64_t i) {
        const T x = first[i], y = second[i];
        first[i] = x - sine * (y + tangent_of_half * x);
        second[i] = y + sine * (x - tangent_of_half * y);
    });
    return std::fabs(product) > Jacobi<T>::CONVERGED * lengths;
}

}  // namespace lowrank_kernels::cuda
