// R⁻¹ of RᵀR = S + shift·I, the body of one thread block. Formula, cost and layout: cholesky_inverse.h.
#pragma once

#include "block.h"

namespace lowrank_kernels::cuda {

constexpr int PANEL = 8;
constexpr int CHOLESKY_THREADS = 384;        // l ≤ 384: each row and each column has a thread of its own
constexpr int CHOLESKY_SMALL_THREADS = 128;  // for l ≤ 64

constexpr int cholesky_inverse_threads(int l) { return l <= CHOLESKY_SMALL_THREADS / 2 ? CHOLESKY_SMALL_THREADS : CHOLESKY_THREADS; }

constexpr int64_t packed_size(int64_t l) { return l * (l + 1) / 2; }

constexpr int64_t packed_bytes(int64_t l, size_t itemsize) { return packed_size(l) * static_cast<int64_t>(itemsize); }

constexpr int packed_max_columns(int64_t shared_limit, size_t itemsize) {
    int l = 0;
    while (l < CHOLESKY_THREADS && packed_bytes(l + 1, itemsize) <= shared_limit) ++l;
    return l;
}

// Where row `row` of a packed lower triangle begins. 32 lanes at one column of 32 rows 32w … 32w + 31 hit 32 different banks, since
// row·(row + 1)/2 takes each value mod 32 once there: a column costs what a row does.
LRK_BODY int packed_row(int row) { return row * (row + 1) / 2; }

// The lower triangle of rows and columns first … first + 7; the identity where these pass l. Read by every thread.
template <typename T, typename Array>
LRK_BODY void load_diagonal(const Array& packed, int l, int first, T (&diagonal)[PANEL][PANEL]) {
    LRK_UNROLL
    for (int r = 0; r < PANEL; ++r) {
        LRK_UNROLL
        for (int c = 0; c <= r; ++c) diagonal[r][c] = first + r < l ? T(packed[packed_row(first + r) + first + c]) : T(r == c);
    }
}

// In place: L of an 8 × 8 A = LLᵀ, with 1 / L_cc on the diagonal. False if a pivot is not positive and finite.
template <typename T>
LRK_BODY bool factor_diagonal(T (&diagonal)[PANEL][PANEL]) {
    bool positive = true;
    LRK_UNROLL
    for (int c = 0; c < PANEL; ++c) {
        const T pivot = diagonal[c][c];
        positive = positive && pivot > T(0) && std::isfinite(pivot);
        diagonal[c][c] = T(1) / std::sqrt(pivot);
        LRK_UNROLL
        for (int r = c + 1; r < PANEL; ++r) diagonal[r][c] *= diagonal[c][c];
        LRK_UNROLL
        for (int r = c + 1; r < PANEL; ++r) {
            LRK_UNROLL
            for (int s = c + 1; s <= r; ++s) diagonal[r][s] -= diagonal[r][c] * diagonal[s][c];
        }
    }
    return positive;
}

// packed: the lower triangle of A → L with 1 / L_ii on its diagonal, left-looking, eight columns at a time. False if A is not positive
// definite; all threads agree, as each factors the diagonal blocks itself.
template <typename T, typename Block, typename Array>
LRK_BODY bool factor(Block& block, const Array& packed, int l) {
    for (int first = 0; first < l; first += PANEL) {
        // A_ic − Σ_q L_iq·L_cq over the columns q < first. Rows first … first + 7 are read by all, at columns that nobody writes.
        block.each(l, [&](int row) {
            if (row < first) return;
            const int own = packed_row(row);
            T sums[PANEL] = {};
            for (int q = 0; q < first; ++q) {
                const T left = packed[own + q];
                LRK_UNROLL
                for (int c = 0; c < PANEL; ++c) {
                    const int other = first + c < l ? first + c : l - 1;
                    sums[c] += left * packed[packed_row(other) + q];
                }
            }
            LRK_UNROLL
            for (int c = 0; c < PANEL; ++c) {
                if (first + c <= row) packed[own + first + c] = packed[own + first + c] - sums[c];
            }
        });
        block.sync();

        T diagonal[PANEL][PANEL];
        load_diagonal<T>(packed, l, first, diagonal);
        if (!factor_diagonal(diagonal)) return false;
        block.sync();

        // Rows of the diagonal block come out as factor_diagonal's, by the same operations.
        block.each(l, [&](int row) {
            if (row < first) return;
            const int own = packed_row(row) + first;
            T solved[PANEL];
            LRK_UNROLL
            for (int c = 0; c < PANEL; ++c) {
                if (first + c > row) break;
                T value = packed[own + c];
                LRK_UNROLL
                for (int s = 0; s < c; ++s) value -= solved[s] * diagonal[c][s];
                solved[c] = value * diagonal[c][c];
                packed[own + c] = first + c == row ? diagonal[c][c] : solved[c];
            }
        });
        block.sync();
    }
    return true;
}

// packed: L with 1 / L_ii on its diagonal → X = L⁻¹, by forward substitution, eight rows at a time. Thread j alone reads and writes
// column j of X; all read the rows of L that come next, so one barrier before these are overwritten is enough.
template <typename T, typename Block, typename Array>
LRK_BODY void invert(Block& block, const Array& packed, int l) {
    for (int first = 0; first < l; first += PANEL) {
        const int columns = first + PANEL < l ? first + PANEL : l;
        T diagonal[PANEL][PANEL];
        load_diagonal<T>(packed, l, first, diagonal);
        auto results = block.template locals<T, PANEL>();
        block.each(columns, [&](int column) {
            T* x = results.mine();
            LRK_UNROLL
            for (int r = 0; r < PANEL; ++r) x[r] = T(0);
            // The lanes of a warp start together, so that they read the same element of L.
            for (int q = column / WARP * WARP; q < first; ++q) {
                const T right = q >= column ? T(packed[packed_row(q) + column]) : T(0);
                LRK_UNROLL
                for (int r = 0; r < PANEL; ++r) {
                    const int other = first + r < l ? first + r : l - 1;
                    x[r] += packed[packed_row(other) + q] * right;
                }
            }
            LRK_UNROLL
            for (int r = 0; r < PANEL; ++r) {
                T value = T(first + r == column) - x[r];
                LRK_UNROLL
                for (int s = 0; s < r; ++s) value -= diagonal[r][s] * x[s];
                x[r] = value * diagonal[r][r];
            }
        });
        block.sync();
        block.each(columns, [&](int column) {
            const T* x = results.mine();
            LRK_UNROLL
            for (int r = 0; r < PANEL; ++r) {
                if (first + r >= column && first + r < l) packed[packed_row(first + r) + column] = x[r];
            }
        });
    }
    block.sync();
}

// gram, inverse: one (l, l) row-major matrix each. packed: packed_size(l) elements of shared memory.
template <typename T, typename Block, typename Array>
LRK_BODY void cholesky_inverse_body(Block& block, const T* gram, T* inverse, int l, T shift, const Array& packed) {
    block.each(l * WARP, [&](int i) {
        const int row = i / WARP;
        for (int column = i % WARP; column <= row; column += WARP) {
            packed[packed_row(row) + column] = gram[row * l + column] + (row == column ? shift : T(0));
        }
    });
    block.sync();
    const bool positive = factor<T>(block, packed, l);
    if (positive) invert<T>(block, packed, l);
    block.each(l * WARP, [&](int i) {
        const int row = i / WARP;
        for (int column = i % WARP; column < l; column += WARP) {
            T value = T(row == column);
            if (positive) value = column >= row ? T(packed[packed_row(column) + row]) : T(0);
            inverse[row * l + column] = value;
        }
    });
}

}  // namespace lowrank_kernels::cuda
