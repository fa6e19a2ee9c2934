// Covariance NMSE and its gradient on CPU: one scene per task, everything of a scene in the cache of one core.
//
// Letters: N elements, Q factor columns, X sample columns, K target columns, P columns in all. Scratch is planar:
// column p has its real parts at re + p * stride and its imaginary parts at im + p * stride, zero-padded.
// Formulas are those of triton_kernels.py; scenes are independent, so the bits do not depend on the thread count.
#include <cmath>
#include <cstdlib>

#include "native/simd.hpp"

// Tile loops have constant bounds and must vanish: accumulators that stay an array live on the stack, four times slower.
#define RIS_UNROLL _Pragma("GCC unroll 16")

namespace RIS_NS {

constexpr int kLine = 64;       // bytes of a cache line
constexpr int kChunk = 192;     // elements of a column that a Gram pass keeps in the first-level cache
constexpr int kRows = 4;        // rows of R that a dense tile computes at once
constexpr double kResidual = 1e-9;  // below this NMSE the Gram form's 1e-15 begins to show: use the residual

struct Shape {
    int64_t n, q, k, x, p, stride;
};

struct Settings {
    double blend, loading, target_loading;
    int gradients;
};

// Per-scene scalars: R = pred * (...) + c_R I, T = truth * (...) + c_T I, eye = c_R - c_T.
struct Scene {
    double factor, sample, truth, eye, eye_truth;
};

inline Scene scene_of(const Settings& s, double alpha, bool has_sample) {
    const double pred = (1 - alpha) / (1 + s.loading), truth = (1 - alpha) / (1 + s.target_loading);
    const double eye_truth = truth * s.target_loading + alpha;
    const double eye = s.loading == s.target_loading ? 0.0 : pred * s.loading + alpha - eye_truth;
    return {has_sample ? pred * (1 - s.blend) : pred, pred * s.blend, truth, eye, eye_truth};
}

inline double shrink_weight(double snr_db, double shrink) {
    const double alpha = shrink * std::pow(10.0, -snr_db / 20);
    return alpha < 1e-4 ? 1e-4 : alpha > 5e-2 ? 5e-2 : alpha;  // a NaN stays NaN
}

inline double normaliser(double power, int64_t n) { return power == 0 ? 0.0 : double(n) / power; }

template <class T> inline double power_of(const T* x, int64_t count) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += double(x[i]) * double(x[i]);
    return total;
}

// sum += a conj(b), lane by lane.
template <class V>
inline __attribute__((always_inline)) void add_product(V& sum_re, V& sum_im, const V& ar, const V& ai, const V& br, const V& bi) {
    sum_re += ar * br;
    sum_im += ai * br;
    sum_re += ai * bi;
    sum_im -= ar * bi;
}

// (n, columns, 2) interleaved -> planar columns.
template <class T, class W> void to_planar(const T* x, int64_t n, int64_t columns, W* re, W* im, int64_t stride) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < columns; ++c) {
            re[c * stride + i] = W(x[(i * columns + c) * 2]);
            im[c * stride + i] = W(x[(i * columns + c) * 2 + 1]);
        }
}

template <class T, class W> void from_planar(const W* re, const W* im, int64_t n, int64_t columns, T* x, int64_t stride) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < columns; ++c) {
            x[(i * columns + c) * 2] = T(re[c * stride + i]);
            x[(i * columns + c) * 2 + 1] = T(im[c * stride + i]);
        }
}

// In double, because the scale of a tiny or huge factor need not be a float.
template <class T> void scale_by(T* x, int64_t count, double scale) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = T(double(x[i]) * scale);
}

template <class T> void zero(T* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

// ---- low-rank target: Gram form in double --------------------------------------------------------------------

constexpr int kTile = RIS_LEVEL_NUMBER == 2 ? 3 : 2;  // columns x columns of one Gram tile: what the registers hold

// G[i, j] += z_i^H z_j over one chunk, for one tile of columns.
inline void gram_tile(const double* re, const double* im, int64_t stride, int64_t from, int64_t to, int64_t i0, int64_t j0, double* g, int64_t ld) {
    typedef Vec<double> V;
    V acc_re[kTile][kTile] = {}, acc_im[kTile][kTile] = {};
    for (int64_t n = from; n < to; n += lanes<double>) {
        V jr[kTile], ji[kTile];
        RIS_UNROLL for (int j = 0; j < kTile; ++j) {
            jr[j] = load(re + (j0 + j) * stride + n);
            ji[j] = load(im + (j0 + j) * stride + n);
        }
        RIS_UNROLL for (int i = 0; i < kTile; ++i) {
            const V ir = load(re + (i0 + i) * stride + n), ii = load(im + (i0 + i) * stride + n);
            RIS_UNROLL for (int j = 0; j < kTile; ++j) add_product(acc_re[i][j], acc_im[i][j], jr[j], ji[j], ir, ii);
        }
    }
    RIS_UNROLL for (int i = 0; i < kTile; ++i)
        RIS_UNROLL for (int j = 0; j < kTile; ++j) {
            g[((i0 + i) * ld + j0 + j) * 2] += sum<double>(acc_re[i][j]);
            g[((i0 + i) * ld + j0 + j) * 2 + 1] += sum<double>(acc_im[i][j]);
        }
}

// Upper tiles, then the mirror image; ld is P rounded up to tiles.
void gram(const double* re, const double* im, const Shape& s, double* g, int64_t ld) {
    const int64_t padded = round_up(s.n, lanes<double>);
    zero(g, ld * ld * 2);
    for (int64_t from = 0; from < padded; from += kChunk) {
        const int64_t to = from + kChunk < padded ? from + kChunk : padded;
        for (int64_t i = 0; i < ld; i += kTile)
            for (int64_t j = i; j < ld; j += kTile) gram_tile(re, im, s.stride, from, to, i, j, g, ld);
    }
    for (int64_t i = 0; i < ld; ++i)
        for (int64_t j = i + 1; j < ld; ++j) {
            g[(j * ld + i) * 2] = g[(i * ld + j) * 2];
            g[(j * ld + i) * 2 + 1] = -g[(i * ld + j) * 2 + 1];
        }
}

inline double magnitude(const double* g, int64_t index) { return g[2 * index] * g[2 * index] + g[2 * index + 1] * g[2 * index + 1]; }

// out_q = sum_p z_p C[p, q] for kOut columns q at a time; C is (P, ld) complex, row p.
constexpr int kOut = 4, kSpan = RIS_LEVEL_NUMBER == 2 ? 2 : 1;
template <int span> inline void apply_block(const double* re, const double* im, const Shape& s, const double* c, int64_t ld, int64_t n, double* out_re, double* out_im) {
    typedef Vec<double> V;
    V acc_re[kOut][span] = {}, acc_im[kOut][span] = {};
    for (int64_t p = 0; p < s.p; ++p) {
        V zr[span], zi[span];
        RIS_UNROLL for (int u = 0; u < span; ++u) {
            zr[u] = load(re + p * s.stride + n + u * lanes<double>);
            zi[u] = load(im + p * s.stride + n + u * lanes<double>);
        }
        RIS_UNROLL for (int q = 0; q < kOut; ++q) {
            const V cr = splat(c[(p * ld + q) * 2]), ci = splat(c[(p * ld + q) * 2 + 1]);
            RIS_UNROLL for (int u = 0; u < span; ++u) {
                acc_re[q][u] += zr[u] * cr;
                acc_im[q][u] += zr[u] * ci;
                acc_re[q][u] -= zi[u] * ci;
                acc_im[q][u] += zi[u] * cr;
            }
        }
    }
    RIS_UNROLL for (int q = 0; q < kOut; ++q)
        RIS_UNROLL for (int u = 0; u < span; ++u) {
            store(out_re + q * s.stride + n + u * lanes<double>, acc_re[q][u]);
            store(out_im + q * s.stride + n + u * lanes<double>, acc_im[q][u]);
        }
}

void apply(const double* re, const double* im, const Shape& s, const double* c, int64_t ld, int64_t columns, double* out_re, double* out_im) {
    const int64_t padded = round_up(s.n, lanes<double>);
    for (int64_t n = 0; n < padded;) {
        const bool full = n + kSpan * lanes<double> <= padded;
        for (int64_t q = 0; q < columns; q += kOut) {
            double *r = out_re + q * s.stride, *i = out_im + q * s.stride;
            if (full) apply_block<kSpan>(re, im, s, c + 2 * q, ld, n, r, i);
            else apply_block<1>(re, im, s, c + 2 * q, ld, n, r, i);
        }
        n += full ? kSpan * lanes<double> : lanes<double>;
    }
}

// |Z diag(w) Z^H + e I|^2 entry by entry: exact near zero, O(N^2 P), only where the Gram form is not.
double residual(const double* re, const double* im, const Shape& s, const double* w, double eye, double* row) {
    double total = 0;
    double *row_re = row, *row_im = row + s.stride;
    for (int64_t i = 0; i < s.n; ++i) {
        zero(row, 2 * s.stride);
        for (int64_t p = 0; p < s.p; ++p) {
            const double a = w[p] * re[p * s.stride + i], b = w[p] * im[p * s.stride + i];
            const double *zr = re + p * s.stride, *zi = im + p * s.stride;
            for (int64_t j = 0; j < s.n; ++j) {
                row_re[j] += a * zr[j] + b * zi[j];
                row_im[j] += b * zr[j] - a * zi[j];
            }
        }
        row_re[i] += eye;
        for (int64_t j = 0; j < s.n; ++j) total += row_re[j] * row_re[j] + row_im[j] * row_im[j];
    }
    return total;
}

template <class T> struct LowRank {
    Shape s;
    int64_t ld, outs, bytes;
    LowRank(int64_t n, int64_t q, int64_t k, int64_t x) {
        const int64_t line = kLine / int64_t(sizeof(double));
        s = {n, q, k, x, q + x + k, round_up(n, line) + line};  // the odd line keeps columns out of one cache set
        ld = round_up(s.p, kTile);
        outs = round_up(q > x ? q : x, kOut);
        bytes = 8 * (2 * ld * s.stride + 2 * outs * s.stride + 2 * ld * ld + 2 * s.p * outs + ld + 2 * s.stride);
    }
    void run(const T* f, const T* target, const T* sample, const Scene& c, const Settings& o, double* scratch, T* loss, T* grad_f, T* grad_x) const;
};

template <class T>
void LowRank<T>::run(const T* f, const T* target, const T* sample, const Scene& c, const Settings& o, double* scratch, T* loss, T* grad_f, T* grad_x) const {
    const int64_t n = s.n, q = s.q, x = s.x, k = s.k, p = s.p, first_k = q + x;
    double *re = scratch, *im = re + ld * s.stride, *out_re = im + ld * s.stride, *out_im = out_re + outs * s.stride;
    double *g = out_im + outs * s.stride, *coef = g + 2 * ld * ld, *w = coef + 2 * p * outs, *row = w + ld;
    to_planar(f, n, q, re, im, s.stride);
    if (x) to_planar(sample, n, x, re + q * s.stride, im + q * s.stride, s.stride);
    to_planar(target, n, k, re + first_k * s.stride, im + first_k * s.stride, s.stride);
    gram(re, im, s, g, ld);

    double power[3] = {0, 0, 0};
    for (int64_t i = 0; i < p; ++i) power[i < q ? 0 : i < first_k ? 1 : 2] += g[(i * ld + i) * 2];
    const double weight[3] = {c.factor * normaliser(power[0], n), c.sample * normaliser(power[1], n), -c.truth * normaliser(power[2], n)};
    for (int64_t i = 0; i < p; ++i) w[i] = weight[i < q ? 0 : i < first_k ? 1 : 2];

    double error = c.eye * c.eye * n, truth = 0, target_trace = 0;
    for (int64_t i = 0; i < p; ++i) {
        double line = 0;
#pragma omp simd reduction(+ : line)
        for (int64_t j = 0; j < p; ++j) line += w[j] * magnitude(g, i * ld + j);
        error += w[i] * (line + 2 * c.eye * g[(i * ld + i) * 2]);
        if (i < first_k) continue;
        target_trace -= w[i] * g[(i * ld + i) * 2];
        for (int64_t j = first_k; j < p; ++j) truth += w[i] * w[j] * magnitude(g, i * ld + j);
    }
    truth += 2 * c.eye_truth * target_trace + c.eye_truth * c.eye_truth * n;

    if (error < kResidual * truth) error = residual(re, im, s, w, c.eye, row);
    *loss = T(error / truth);

    for (int side = 0; side < o.gradients; ++side) {
        const int64_t first = side ? q : 0, columns = side ? x : q;
        if (weight[side] == 0) {
            const T nothing = T(0 / truth);  // NaN where the target itself is not a number or zero
            for (int64_t i = 0; i < 2 * n * columns; ++i) (side ? grad_x : grad_f)[i] = nothing;
            continue;
        }
        double along = c.eye * power[side];
        for (int64_t i = 0; i < p; ++i)
            for (int64_t j = first; j < first + columns; ++j) along += w[i] * magnitude(g, i * ld + j);
        along /= power[side];
        const int64_t wide = round_up(columns, kOut);
        for (int64_t i = 0; i < p; ++i)
            for (int64_t j = 0; j < wide; ++j) {
                const bool in = j < columns;
                coef[(i * outs + j) * 2] = in ? w[i] * g[(i * ld + first + j) * 2] : 0;
                coef[(i * outs + j) * 2 + 1] = in ? w[i] * g[(i * ld + first + j) * 2 + 1] : 0;
            }
        for (int64_t j = 0; j < columns; ++j) coef[((first + j) * outs + j) * 2] += c.eye - along;
        apply(re, im, s, coef, outs, columns, out_re, out_im);
        scale_by(out_re, columns * s.stride, 4 * weight[side] / truth);
        scale_by(out_im, columns * s.stride, 4 * weight[side] / truth);
        from_planar(out_re, out_im, n, columns, side ? grad_x : grad_f, s.stride);
    }
}

// ---- dense target: the difference itself, tile by tile, T read once ------------------------------------------------

template <class T> struct Dense {
    Shape s;
    int64_t rows, bytes;
    Dense(int64_t n, int64_t q, int64_t x) {
        const int64_t line = kLine / int64_t(sizeof(T));
        s = {n, q, 0, x, q + x, round_up(n, line) + line};
        rows = round_up(n, kRows);
        bytes = int64_t(sizeof(T)) * (4 * s.p * s.stride + 2 * rows * s.p + 2 * s.stride);
    }
    template <int span> void tile(const T* const target[kRows], int64_t ld_row, int64_t j, T tau, const T* re, const T* im, const T* rowwise, int64_t pulled,
                                  T* out_re, T* out_im, Vec<T>& error, Vec<T>& truth) const;
    void add_identity(const T* re, const T* im, const T* target, double tau, const Scene& c, double& error, double& truth) const;
    void run(const T* f, const T* target, const T* sample, const Scene& c, const Settings& o, char* scratch, T* loss, T* grad_f, T* grad_x) const;
};

// What the multiples of I add to |D|^2 and |T|^2.
template <class T>
void Dense<T>::add_identity(const T* re, const T* im, const T* target, double tau, const Scene& c, double& error,
                            double& truth) const {
    double trace_d = 0, trace_truth = 0;
    for (int64_t i = 0; i < s.n; ++i) {
        double r = 0;
        for (int64_t j = 0; j < s.p; ++j) {
            const double a = re[j * s.stride + i], b = im[j * s.stride + i];
            r += a * a + b * b;
        }
        const double t = tau * double(target[2 * i * (s.n + 1)]);
        trace_d += r - t;
        trace_truth += t;
    }
    error += 2 * c.eye * trace_d + c.eye * c.eye * s.n;
    truth += 2 * c.eye_truth * trace_truth + c.eye_truth * c.eye_truth * s.n;
}

// One tile of kRows x (span vectors): D = A A^H - tau T, its squares, and its share of D^H A = D A.
template <class T>
template <int span>
inline void Dense<T>::tile(const T* const target[kRows], int64_t ld_row, int64_t j, T tau, const T* re, const T* im, const T* rowwise, int64_t pulled, T* out_re, T* out_im,
                           Vec<T>& error, Vec<T>& truth) const {
    typedef Vec<T> V;
    constexpr int w = lanes<T>;
    V dr[kRows][span] = {}, di[kRows][span] = {};
    for (int64_t p = 0; p < s.p; ++p) {
        V jr[span], ji[span];
        RIS_UNROLL for (int u = 0; u < span; ++u) {
            jr[u] = load(re + p * s.stride + j + u * w);
            ji[u] = load(im + p * s.stride + j + u * w);
        }
        RIS_UNROLL for (int r = 0; r < kRows; ++r) {
            const V ar = splat(rowwise[(p * kRows + r) * 2]), ai = splat(rowwise[(p * kRows + r) * 2 + 1]);
            RIS_UNROLL for (int u = 0; u < span; ++u) add_product(dr[r][u], di[r][u], ar, ai, jr[u], ji[u]);
        }
    }
    const V scale = splat(tau);
    RIS_UNROLL for (int r = 0; r < kRows; ++r)
        RIS_UNROLL for (int u = 0; u < span; ++u) {
            V tr, ti;
            const T* next = target[r] + 2 * (kRows * ld_row + j + u * w);  // the same place, one row block on
            __builtin_prefetch(next);
            __builtin_prefetch(next + w);
            split<T>(load(target[r] + 2 * (j + u * w)), load(target[r] + 2 * (j + u * w) + w), tr, ti);
            tr = tr * scale, ti = ti * scale;
            truth += tr * tr + ti * ti;
            dr[r][u] -= tr, di[r][u] -= ti;
            error += dr[r][u] * dr[r][u] + di[r][u] * di[r][u];
        }
    for (int64_t q = 0; q < pulled; ++q) {
        V accr[span], acci[span];
        RIS_UNROLL for (int u = 0; u < span; ++u) {
            accr[u] = load(out_re + q * s.stride + j + u * w);
            acci[u] = load(out_im + q * s.stride + j + u * w);
        }
        RIS_UNROLL for (int r = 0; r < kRows; ++r) {
            const V ar = splat(rowwise[(q * kRows + r) * 2]), ai = splat(rowwise[(q * kRows + r) * 2 + 1]);
            RIS_UNROLL for (int u = 0; u < span; ++u) add_product(accr[u], acci[u], ar, ai, dr[r][u], di[r][u]);
        }
        RIS_UNROLL for (int u = 0; u < span; ++u) {
            store(out_re + q * s.stride + j + u * w, accr[u]);
            store(out_im + q * s.stride + j + u * w, acci[u]);
        }
    }
}

template <class T>
void Dense<T>::run(const T* f, const T* target, const T* sample, const Scene& c, const Settings& o, char* scratch, T* loss, T* grad_f, T* grad_x) const {
    typedef Vec<T> V;
    constexpr int w = lanes<T>;
    const int64_t n = s.n, q = s.q, x = s.x, p = s.p, pulled = o.gradients == 0 ? 0 : o.gradients == 1 ? q : p;
    T *re = reinterpret_cast<T*>(scratch), *im = re + p * s.stride, *out_re = im + p * s.stride, *out_im = out_re + p * s.stride;
    T* rowwise = out_im + p * s.stride;

    const double power[2] = {power_of(f, 2 * n * q), x ? power_of(sample, 2 * n * x) : 0};
    const double weight[2] = {c.factor * normaliser(power[0], n), c.sample * normaliser(power[1], n)};
    double trace = 0;
    for (int64_t i = 0; i < n; ++i) trace += double(target[2 * i * (n + 1)]);
    const double tau = c.truth * normaliser(trace, n);
    to_planar(f, n, q, re, im, s.stride);
    if (x) to_planar(sample, n, x, re + q * s.stride, im + q * s.stride, s.stride);
    for (int half = 0; half < 2; ++half) {
        T* part = half ? im : re;
        scale_by(part, q * s.stride, std::sqrt(weight[0]));
        scale_by(part + q * s.stride, x * s.stride, std::sqrt(weight[1]));
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < p; ++j) {
            T* to = rowwise + (i / kRows * kRows * p + j * kRows + i % kRows) * 2;
            to[0] = re[j * s.stride + i], to[1] = im[j * s.stride + i];
        }
    zero(out_re, 2 * p * s.stride);

    double error = 0, truth = 0;
    constexpr int span = RIS_LEVEL_NUMBER == 2 ? 2 : 1;
    for (int64_t i = 0; i < n; i += kRows) {
        const T *rows_at[kRows], *tail_at[kRows];
        T padded[kRows][2 * w] = {}, nothing[2 * w] = {};
        const int64_t whole = n / w * w;
        V e = {}, t = {};
        const int present = n - i < kRows ? int(n - i) : kRows;
        for (int r = 0; r < present; ++r) {
            rows_at[r] = target + (i + r) * n * 2;
            for (int64_t j = whole; j < n; ++j) padded[r][2 * (j - whole)] = rows_at[r][2 * j], padded[r][2 * (j - whole) + 1] = rows_at[r][2 * j + 1];
            tail_at[r] = padded[r] - 2 * whole;
        }
        const T* mine = rowwise + i * p * 2;
        int64_t j = 0;
        if (present == kRows) {
            for (; j + span * w <= whole; j += span * w) tile<span>(rows_at, n, j, T(tau), re, im, mine, pulled, out_re, out_im, e, t);
            for (; j < whole; j += w) tile<1>(rows_at, n, j, T(tau), re, im, mine, pulled, out_re, out_im, e, t);
        } else {  // last rows: the missing ones have a zero factor and read zeros as target
            for (; j < whole; j += w) {
                RIS_UNROLL for (int r = 0; r < kRows; ++r) tail_at[r] = r < present ? rows_at[r] : nothing - 2 * j;
                tile<1>(tail_at, n, j, T(tau), re, im, mine, pulled, out_re, out_im, e, t);
            }
            RIS_UNROLL for (int r = 0; r < kRows; ++r) tail_at[r] = (r < present ? padded[r] : nothing) - 2 * whole;
        }
        if (whole < n) tile<1>(tail_at, n, whole, T(tau), re, im, mine, pulled, out_re, out_im, e, t);
        error += double(sum<T>(e));
        truth += double(sum<T>(t));
    }

    if (c.eye != 0 || c.eye_truth != 0) add_identity(re, im, target, tau, c, error, truth);
    *loss = T(error / truth);

    for (int side = 0; side < o.gradients; ++side) {
        const int64_t first = side ? q : 0, columns = side ? x : q;
        double along = 0, length = 0;
        for (int64_t j = first; j < first + columns; ++j) {
            T *pull_re = out_re + j * s.stride, *pull_im = out_im + j * s.stride;
            const T *own_re = re + j * s.stride, *own_im = im + j * s.stride;
            for (int64_t i = 0; c.eye != 0 && i < n; ++i) {
                pull_re[i] = T(pull_re[i] + c.eye * own_re[i]);
                pull_im[i] = T(pull_im[i] + c.eye * own_im[i]);
            }
#pragma omp simd reduction(+ : along, length)
            for (int64_t i = 0; i < n; ++i) {
                along += double(own_re[i]) * pull_re[i] + double(own_im[i]) * pull_im[i];
                length += double(own_re[i]) * own_re[i] + double(own_im[i]) * own_im[i];
            }
        }
        along = length == 0 ? 0 : along / length;
        const double scale = 4 * std::sqrt(weight[side]) / truth;
        for (int half = 0; half < 2; ++half) {
            T* pull = (half ? out_im : out_re) + first * s.stride;
            const T* own = (half ? im : re) + first * s.stride;
#pragma omp simd
            for (int64_t i = 0; i < columns * s.stride; ++i) pull[i] = T((double(pull[i]) - along * own[i]) * scale);
        }
        from_planar(out_re + first * s.stride, out_im + first * s.stride, n, columns, side ? grad_x : grad_f, s.stride);
    }
}

inline void* scratch_of(int64_t bytes) {
    void* p = nullptr;
    return posix_memalign(&p, kLine, size_t(round_up(bytes, kLine))) == 0 ? p : nullptr;
}

// 0, or 1 where memory ran out.
template <class T>
int all_scenes(const T* f, const T* target_factor, const T* target_cov, const T* sample, const T* snr, T* loss, T* grad_f, T* grad_x, int64_t b, int64_t n, int64_t q,
               int64_t k, int64_t x, double shrink, const Settings& o) {
    const LowRank<T> low(n, q, k, x);
    const Dense<T> dense(n, q, x);
    const int64_t bytes = target_cov ? dense.bytes : low.bytes;
    int failed = 0;
#pragma omp parallel if (b > 1) reduction(| : failed)
    {
        char* scratch = static_cast<char*>(scratch_of(bytes));
        failed = scratch == nullptr;
        if (scratch) zero(scratch, bytes);  // the padding is never written again
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b; ++i) {
            if (!scratch) continue;
            const Scene c = scene_of(o, shrink == 0 ? 0.0 : shrink_weight(double(snr[i]), shrink), x > 0);
            T *gf = grad_f + i * n * q * 2, *gx = grad_x + i * n * x * 2;
            const T* mine = sample + i * n * x * 2;
            if (target_cov) dense.run(f + i * n * q * 2, target_cov + i * n * n * 2, mine, c, o, scratch, loss + i, gf, gx);
            else low.run(f + i * n * q * 2, target_factor + i * n * k * 2, mine, c, o, reinterpret_cast<double*>(scratch), loss + i, gf, gx);
        }
        std::free(scratch);
    }
    return failed;
}

}  // namespace RIS_NS

#define COV_NMSE(T, NAME)                                                                                              \
    RIS_EXPORT(int, NAME)                                                                                              \
    (const T* f, const T* target_factor, const T* target_cov, const T* sample, const T* snr, T* loss, T* grad_f,       \
     T* grad_x, int64_t b, int64_t n, int64_t q, int64_t k, int64_t x, double blend, double loading,                   \
     double target_loading, double shrink, int gradients) {                                                            \
        return RIS_NS::all_scenes<T>(f, target_factor, target_cov, sample, snr, loss, grad_f, grad_x, b, n, q, k, x,   \
                                     shrink, {blend, loading, target_loading, gradients});                             \
    }

COV_NMSE(float, cov_nmse_f32)
COV_NMSE(double, cov_nmse_f64)
