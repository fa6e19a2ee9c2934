// The small systems of the pursuit, without pivoting, in the scratch of a thread: amplitudes, a joint Gauss-Newton step, and
// what an atom is worth.
//
// K atoms, T = 4 columns each. gram and moment are D^H P D and D^H b, row-major, real and imaginary parts apart.
#pragma once
#include <cmath>

#include "products.hpp"

namespace RIS_NS {
namespace pursuit {

// Solves (A + diag(ridge)) x = r; a holds rows of `stride` floats (a multiple of the lanes, above n), r in column n.
// Only the upper triangle is read; a pivot below 1e-6 of its diagonal entry is raised to that. a is destroyed.
// Returns the logarithm of the determinant.
inline float spd_solve(float* x, float* a, const float* ridge, int64_t n, int64_t stride) {
    for (int64_t k = 0; k < n; ++k) a[k * stride + k] += ridge[k];
    for (int64_t k = 0; k < n; ++k) x[k] = 1e-6f * a[k * stride + k];
    float log_det = 0;
    for (int64_t k = 0; k < n; ++k) {
        float* row = a + k * stride;
        const float pivot = row[k] > x[k] ? row[k] : x[k], inverse = 1.0f / pivot;
        log_det += std::log(pivot);
        for (int64_t i = k + 1; i < n; ++i) {
            const float factor = row[i] * inverse;
            float* other = a + i * stride;
            for (int64_t j = i / W * W; j <= n; j += W) store(other + j, load(other + j) - factor * load(row + j));
        }
        x[k] = inverse;
    }
    for (int64_t k = n - 1; k >= 0; --k) {
        const float* row = a + k * stride;
        float value = row[n];
        for (int64_t j = k + 1; j < n; ++j) value -= row[j] * x[j];
        x[k] = value * x[k];
    }
    return log_det;
}

inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// Ridge least squares over the amplitudes alone: s (re: K, im: K).
inline void amplitudes(float* s, float* a, float* ridge, const float* gram_re, const float* gram_im, const float* moment_re,
                       const float* moment_im, float weight, int64_t atoms) {
    const int64_t n = 2 * atoms, stride = padded(n + 1), full = T * atoms;
    for (int64_t k = 0; k < atoms; ++k) {
        float *upper = a + k * stride, *lower = upper + atoms * stride;
        for (int64_t j = 0; j < atoms; ++j) {
            const float re = gram_re[T * k * full + T * j], im = gram_im[T * k * full + T * j];
            upper[j] = lower[atoms + j] = re;
            upper[atoms + j] = -im;
            lower[j] = im;
        }
        upper[n] = moment_re[T * k];
        lower[n] = moment_im[T * k];
        ridge[k] = ridge[atoms + k] = weight;
    }
    spd_solve(s, a, ridge, n, stride);
}

// What the joint step changes: (K, 5) of (re s, im s, u, v, w), moves in units of the aperture's phase spread. Returns the
// logarithm of the system's determinant.
// correlation: scratch of 2 T K floats; trust: the move that noise is damped to.
inline float newton(float* change, float* a, float* ridge, float* correlation, const float* gram_re, const float* gram_im, const float* moment_re,
                   const float* moment_im, const float* s, const float* trust, float noise, float weight, int64_t atoms) {
    const int64_t n = 5 * atoms, stride = padded(n + 1), full = T * atoms;
    const float* s_im = s + atoms;
    for (int64_t i = 0; i < full; ++i) {
        float re = moment_re[i], im = moment_im[i];
        for (int64_t j = 0; j < atoms; ++j) {
            const float gr = gram_re[i * full + T * j], gi = gram_im[i * full + T * j];
            re -= gr * s[j] - gi * s_im[j];
            im -= gr * s_im[j] + gi * s[j];
        }
        correlation[i] = re;
        correlation[full + i] = im;
    }
    for (int64_t k = 0; k < atoms; ++k) {
        const float turn_re[5] = {1, 0, s[k], s[k], s[k]}, turn_im[5] = {0, 1, s_im[k], s_im[k], s_im[k]};
        for (int i = 0; i < 5; ++i) {
            const int64_t from = T * k + (i ? i - 1 : 0), at = 5 * k + i;
            float* row = a + at * stride;
            row[n] = correlation[from] * turn_re[i] + correlation[full + from] * turn_im[i];
            ridge[at] = i < 2 ? weight : noise / (trust[i - 2] * trust[i - 2]);
            for (int64_t j = k; j < atoms; ++j) {  // the upper triangle is all that is read
                const float *gr = gram_re + from * full + T * j, *gi = gram_im + from * full + T * j;
                // conj(turn) gram, then times the other turn, real part
                float cr[T], ci[T];
                for (int t = 0; t < T; ++t) {
                    cr[t] = turn_re[i] * gr[t] + turn_im[i] * gi[t];
                    ci[t] = turn_re[i] * gi[t] - turn_im[i] * gr[t];
                }
                row[5 * j] = cr[0];
                row[5 * j + 1] = -ci[0];
                for (int t = 1; t < T; ++t) row[5 * j + 1 + t] = cr[t] * s[j] - ci[t] * s_im[j];
            }
        }
    }
    return spd_solve(change, a, ridge, n, stride);
}

// Diagonal of the inverse of the complex normal matrix of the amplitudes, ridge included: (K). a: scratch of 2 K^2 floats.
// By L D L^H, whose inverse has the diagonal sum_i |(L^-1)_ij|^2 / d_i.
inline void inverse_diagonal(float* out, float* a, const float* gram_re, const float* gram_im, float weight, int64_t atoms) {
    const int64_t n = atoms, full = T * atoms;
    float *re = a, *im = a + n * n;  // lower triangle: L below the diagonal, then L^-1 in its place
    for (int64_t j = 0; j < n; ++j) {
        const float diagonal = gram_re[T * j * full + T * j] + weight;
        float pivot = diagonal;
        for (int64_t k = 0; k < j; ++k) pivot -= (re[j * n + k] * re[j * n + k] + im[j * n + k] * im[j * n + k]) * re[k * n + k];
        pivot = pivot > 1e-6f * diagonal ? pivot : 1e-6f * diagonal;
        re[j * n + j] = pivot;
        for (int64_t i = j + 1; i < n; ++i) {
            float vr = gram_re[T * i * full + T * j], vi = gram_im[T * i * full + T * j];
            for (int64_t k = 0; k < j; ++k) {
                const float d = re[k * n + k], lr = re[i * n + k], li = im[i * n + k], mr = re[j * n + k], mi = im[j * n + k];
                vr -= (lr * mr + li * mi) * d;
                vi -= (li * mr - lr * mi) * d;
            }
            re[i * n + j] = vr / pivot;
            im[i * n + j] = vi / pivot;
        }
    }
    for (int64_t j = 0; j < n; ++j) {
        out[j] = 1.0f / re[j * n + j];
        for (int64_t i = j + 1; i < n; ++i) {  // column j of L^-1, from the top
            float vr = -re[i * n + j], vi = -im[i * n + j];
            for (int64_t k = j + 1; k < i; ++k) {
                const float lr = re[i * n + k], li = im[i * n + k], mr = re[k * n + j], mi = im[k * n + j];
                vr -= lr * mr - li * mi;
                vi -= lr * mi + li * mr;
            }
            re[i * n + j] = vr;
            im[i * n + j] = vi;
            out[j] += (vr * vr + vi * vi) / re[i * n + i];
        }
    }
}

}  // namespace pursuit
}  // namespace RIS_NS
