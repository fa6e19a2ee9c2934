// The products of the pursuit as register tiles: P = G^H G, P D, G D, G^H e and inner products of columns.
//
// Planar throughout: an array of complex vectors is [vector][re: n floats | im: n floats], n a multiple of the lanes,
// zeros beyond the end. P lies in panels [panel of W rows][column][re: W | im: W], so that a tile reads it in order.
#pragma once
#include "native/simd.hpp"

namespace RIS_NS {
namespace pursuit {

typedef Vec<float> V;
constexpr int W = lanes<float>;
constexpr int T = 4;  // columns of an atom: itself and its derivatives along u, v and w
constexpr int PANELS = RIS_LEVEL_NUMBER == 2 ? 3 : 1;  // panels a tile of P D takes: 8 PANELS accumulators
constexpr int ROWS = RIS_LEVEL_NUMBER == 2 ? 8 : 4;    // rows of H a tile of G D or G^H e takes

inline int64_t padded(int64_t n) { return round_up(n, W); }

// Columns m .. m + R - 1 of the panel of P that starts at row p: weight sum_a conj(h_an) h_am times the codes' overlap,
// or the sum alone where there is no overlap.
template <int R, bool CODED>
void gram_tile(float* gram, const float* overlap, const float* planes, float weight, int64_t p, int64_t m, int64_t antennas, int64_t wide) {
    V re[R] = {}, im[R] = {};
    for (int64_t a = 0; a < antennas; ++a) {
        const float* row = planes + 2 * a * wide;
        const V hr = load(row + p), hi = load(row + wide + p);
        for (int r = 0; r < R; ++r) {
            const float gr = row[m + r], gi = row[m + r + wide];
            re[r] += gr * hr;
            re[r] += gi * hi;
            im[r] += gi * hr;
            im[r] -= gr * hi;
        }
    }
    for (int r = 0; r < R; ++r) {
        if (!CODED) {
            store(gram + 2 * W * r, re[r]);
            store(gram + 2 * W * r + W, im[r]);
            continue;
        }
        const V cr = weight * load(overlap + 2 * W * r), ci = weight * load(overlap + 2 * W * r + W);
        store(gram + 2 * W * r, re[r] * cr - im[r] * ci);
        store(gram + 2 * W * r + W, re[r] * ci + im[r] * cr);
    }
}

// P (panels) from H in planes (M, 2, wide); overlap: sum_l conj(c_ln) c_lm in the same panels, which is the gram of the codes alone.
template <bool CODED>
void gram_of(float* gram, const float* overlap, const float* planes, float weight, int64_t antennas, int64_t n, int64_t wide) {
    constexpr int R = RIS_LEVEL_NUMBER == 2 ? 12 : 6;
    for (int64_t p = 0; p < wide; p += W) {
        int64_t m = 0;
        const int64_t panel = 2 * p * n;
        for (; m + R <= n; m += R)
            gram_tile<R, CODED>(gram + panel + 2 * W * m, overlap + panel + 2 * W * m, planes, weight, p, m, antennas, wide);
        for (; m < n; ++m)
            gram_tile<1, CODED>(gram + panel + 2 * W * m, overlap + panel + 2 * W * m, planes, weight, p, m, antennas, wide);
    }
}

// P times the four columns of one atom, R panels of rows.
template <int R> void image_tile(float* out, const float* gram, const float* columns, int64_t n, int64_t wide) {
    V re[R][T] = {}, im[R][T] = {};
    const float *c0 = columns, *c1 = c0 + 2 * wide, *c2 = c1 + 2 * wide, *c3 = c2 + 2 * wide;
    for (int64_t m = 0; m < n; ++m) {
        V pr[R], pi[R];
        for (int r = 0; r < R; ++r) {
            pr[r] = load(gram + 2 * W * (r * n + m));
            pi[r] = load(gram + 2 * W * (r * n + m) + W);
        }
        const float dr[T] = {c0[m], c1[m], c2[m], c3[m]};
        const float di[T] = {c0[wide + m], c1[wide + m], c2[wide + m], c3[wide + m]};
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r) {
                re[r][t] += dr[t] * pr[r];
                im[r][t] += dr[t] * pi[r];
                re[r][t] -= di[t] * pi[r];
                im[r][t] += di[t] * pr[r];
            }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            store(out + 2 * t * wide + r * W, re[r][t]);
            store(out + (2 * t + 1) * wide + r * W, im[r][t]);
        }
}

// P D for `atoms` atoms.
inline void image_of(float* image, const float* gram, const float* columns, int64_t atoms, int64_t n, int64_t wide) {
    int64_t p = 0;
    for (; p + PANELS * W <= wide; p += PANELS * W)
        for (int64_t k = 0; k < atoms; ++k)
            image_tile<PANELS>(image + 2 * T * k * wide + p, gram + 2 * p * n, columns + 2 * T * k * wide, n, wide);
    for (; p < wide; p += W)
        for (int64_t k = 0; k < atoms; ++k)
            image_tile<1>(image + 2 * T * k * wide + p, gram + 2 * p * n, columns + 2 * T * k * wide, n, wide);
}

// Rows of H times scale diag(c_l) d for one vector of codes l: out (re plane, im plane a `plane` further on; rows `lp` apart).
template <int R>
void apply_tile(float* out, const float* channel, const float* code_re, const float* code_im, const float* column, float scale,
                float weight, int64_t n, int64_t wide, int64_t lp, int64_t plane) {
    V re[R] = {}, im[R] = {};
    for (int64_t i = 0; i < n; ++i) {
        const V cr = load(code_re + i * lp), ci = load(code_im + i * lp);
        const float dr = scale * column[i], di = scale * column[wide + i];
        const V xr = cr * dr - ci * di, xi = cr * di + ci * dr;
        for (int r = 0; r < R; ++r) {
            const float hr = channel[2 * (r * n + i)], hi = channel[2 * (r * n + i) + 1];
            re[r] += hr * xr;
            im[r] += hr * xi;
            re[r] -= hi * xi;
            im[r] += hi * xr;
        }
    }
    for (int r = 0; r < R; ++r) {
        store(out + r * lp, weight * re[r]);
        store(out + plane + r * lp, weight * im[r]);
    }
}

// G d for one column: planar (2, M, lp), y_l = scale H (c_l o d) times weight; a scale keeps H of any unit representable.
inline void apply(float* out, const float* channel, const float* code_re, const float* code_im, const float* column, float scale,
                  float weight, int64_t antennas, int64_t n, int64_t wide, int64_t lp) {
    const int64_t plane = antennas * lp;
    for (int64_t l = 0; l < lp; l += W) {
        int64_t m = 0;
        for (; m + ROWS <= antennas; m += ROWS)
            apply_tile<ROWS>(out + m * lp + l, channel + 2 * m * n, code_re + l, code_im + l, column, scale, weight, n, wide, lp, plane);
        for (; m < antennas; ++m)
            apply_tile<1>(out + m * lp + l, channel + 2 * m * n, code_re + l, code_im + l, column, scale, weight, n, wide, lp, plane);
    }
}

// G^H e at R elements, times weight: sum_l conj(c_ln) sum_m conj(h_mn) e_ml; H in planes, e planar (2, M, lp).
template <int R>
void adjoint_tile(float* out, const float* planes, const float* code_re, const float* code_im, const float* e, float weight,
                  int64_t antennas, int64_t wide, int64_t lp) {
    V total_re[R] = {}, total_im[R] = {};
    for (int64_t l = 0; l < lp; l += W) {
        V re[R] = {}, im[R] = {};
        for (int64_t m = 0; m < antennas; ++m) {
            const V er = load(e + m * lp + l), ei = load(e + (antennas + m) * lp + l);
            const float* row = planes + 2 * m * wide;
            for (int r = 0; r < R; ++r) {
                re[r] += row[r] * er;
                im[r] += row[r] * ei;
                re[r] += row[wide + r] * ei;
                im[r] -= row[wide + r] * er;
            }
        }
        for (int r = 0; r < R; ++r) {
            const V cr = load(code_re + r * lp + l), ci = load(code_im + r * lp + l);
            total_re[r] += cr * re[r] + ci * im[r];
            total_im[r] += cr * im[r] - ci * re[r];
        }
    }
    for (int r = 0; r < R; ++r) {
        out[r] = weight * sum<float>(total_re[r]);
        out[wide + r] = weight * sum<float>(total_im[r]);
    }
}

inline void adjoint(float* out, const float* planes, const float* code_re, const float* code_im, const float* e, float weight,
                    int64_t antennas, int64_t n, int64_t wide, int64_t lp) {
    int64_t i = 0;
    for (; i + ROWS <= n; i += ROWS) adjoint_tile<ROWS>(out + i, planes + i, code_re + i * lp, code_im + i * lp, e, weight, antennas, wide, lp);
    for (; i < n; ++i) adjoint_tile<1>(out + i, planes + i, code_re + i * lp, code_im + i * lp, e, weight, antennas, wide, lp);
    for (; i < wide; ++i) out[i] = out[wide + i] = 0.0f;
}

// conj(a_i) . b_j for A columns a and C columns b of `size` floats a plane, into re[i * stride + j] and im likewise.
template <int A, int C>
void inner_tile(float* re, float* im, const float* a, const float* b, int64_t size, int64_t stride) {
    V sr[A][C] = {}, si[A][C] = {};
    for (int64_t i = 0; i < size; i += W) {
        V br[C], bi[C];
        for (int c = 0; c < C; ++c) {
            br[c] = load(b + 2 * c * size + i);
            bi[c] = load(b + (2 * c + 1) * size + i);
        }
        for (int r = 0; r < A; ++r) {
            const V ar = load(a + 2 * r * size + i), ai = load(a + (2 * r + 1) * size + i);
            for (int c = 0; c < C; ++c) {
                sr[r][c] += ar * br[c];
                si[r][c] += ar * bi[c];
                sr[r][c] += ai * bi[c];
                si[r][c] -= ai * br[c];
            }
        }
    }
    for (int r = 0; r < A; ++r)
        for (int c = 0; c < C; ++c) {
            re[r * stride + c] = sum<float>(sr[r][c]);
            im[r * stride + c] = sum<float>(si[r][c]);
        }
}

// left^H right of slots i <= j, T columns each, and its mirror image: into rows of `stride` floats.
inline void inner_block(float* re, float* im, const float* left, const float* right, int64_t i, int64_t j, int64_t stride, int64_t size) {
    for (int64_t c = 0; c < T; c += 2)
        for (int64_t r = 0; r < T; r += 2) {
            const int64_t at = (T * i + r) * stride + T * j + c;
            inner_tile<2, 2>(re + at, im + at, left + 2 * (T * i + r) * size, right + 2 * (T * j + c) * size, size, stride);
        }
    if (i == j) return;
    for (int64_t r = T * i; r < T * i + T; ++r)
        for (int64_t c = T * j; c < T * j + T; ++c) {
            re[c * stride + r] = re[r * stride + c];
            im[c * stride + r] = -im[r * stride + c];
        }
}

// out = start - columns x coefficient, `count` complex columns of `size` floats a plane; out and start planar too.
inline void subtract(float* out, const float* start, const float* columns, const float* fit_re, const float* fit_im, int64_t count, int64_t size) {
    for (int64_t i = 0; i < size; i += W) {
        V re = load(start + i), im = load(start + size + i);
        for (int64_t c = 0; c < count; ++c) {
            const V cr = load(columns + 2 * c * size + i), ci = load(columns + (2 * c + 1) * size + i);
            re -= fit_re[c] * cr;
            im -= fit_re[c] * ci;
            re += fit_im[c] * ci;
            im -= fit_im[c] * cr;
        }
        store(out + i, re);
        store(out + size + i, im);
    }
}

}  // namespace pursuit
}  // namespace RIS_NS
