// Products of small matrices in register tiles, for operands that the first- and second-level cache hold.
#pragma once
#include "simd.hpp"

namespace RIS_NS {

// R rows and N vectors of C = A B.
template <class T, int R, int N>
inline __attribute__((always_inline)) void tile(T* c, int64_t c_stride, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_stride, int64_t inner) {
    Vec<T> sum[R][N] = {};
    for (int64_t i = 0; i < inner; ++i) {
        Vec<T> right[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) right[n] = load(b + i * b_stride + n * lanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec<T> left = splat(a[r * a_row + i * a_column]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[r][n] += left * right[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(c + r * c_stride + n * lanes<T>, sum[r][n]);
}

template <class T, int R>
inline void row_block(T* c, int64_t wide, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t inner) {
    constexpr int W = lanes<T>;
    int64_t at = 0;
    for (; at + 2 * W <= wide; at += 2 * W) tile<T, R, 2>(c + at, wide, a, a_row, a_column, b + at, wide, inner);
    if (at < wide) tile<T, R, 1>(c + at, wide, a, a_row, a_column, b + at, wide, inner);
}

// C (rows, wide) = A B with A (rows, inner) of any strides and B (inner, wide); wide is whole vectors.
template <class T>
void product(T* c, int64_t rows, int64_t wide, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t inner) {
    int64_t r = 0;
    if (RIS_LEVEL_NUMBER == 2)
        for (; r + 8 <= rows; r += 8) row_block<T, 8>(c + r * wide, wide, a + r * a_row, a_row, a_column, b, inner);
    for (; r + 4 <= rows; r += 4) row_block<T, 4>(c + r * wide, wide, a + r * a_row, a_row, a_column, b, inner);
    for (; r < rows; ++r) row_block<T, 1>(c + r * wide, wide, a + r * a_row, a_row, a_column, b, inner);
}

}  // namespace RIS_NS
