// Steering vectors with their tangents, and the search of the grid for the position that a residual points at.
//
// psi = u x + v y - w c (Fresnel; x, y, c in radians, c the curvature) or the exact path (spherical). On a rectangular
// array and grid the Fresnel steering vector is a product of one along x and one along y for each w, so the search is
// two short products instead of one with a whole dictionary.
#pragma once
#include "philox/philox.hpp"
#include "products.hpp"

namespace RIS_NS {
namespace pursuit {

// What the array and the grid say, as the caller gives it.
struct Geometry {
    const float *x, *y, *curvature, *scale, *low, *high, *trust, *grid, *dictionary;
    int64_t elements, positions;
    float wavenumber;  // 0: Fresnel
};

// The factors of a rectangular grid over a rectangular array; nu = 0: there are none.
struct Factors {
    int64_t nx = 0, ny = 0, nu = 0, nv = 0, nw = 0;
    float *along_x = nullptr, *along_y = nullptr;  // [w][vector of u][x][re: W | im: W] and [w][v][y][2]
    int64_t wide_u() const { return padded(nu); }
    int64_t size_x() const { return 2 * nw * wide_u() * nx; }
    int64_t size_y() const { return 2 * nw * nv * ny; }
};

// cos and sin of a phase in radians; the quarter turn is taken off in two parts, so that a large phase loses nothing.
inline __attribute__((always_inline)) philox::Pair unit(float radians) {
    const float whole = (radians * 0.636619772367581343f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: to the nearest integer
    float rest = philox::madd(whole, -1.5703125f, radians);          // pi / 2 in three parts, the first two of 8 and 11 bits
    rest = philox::madd(whole, -4.837512969970703e-4f, rest);
    rest = philox::madd(whole, -7.549789948768648e-8f, rest);
    return philox::direction(int(whole), rest * 0.636619772367581343f);
}

// Whether the array is a rectangle with x fastest and the grid a box with w fastest, and their sizes.
inline Factors factors_of(const Geometry& g) {
    Factors f, none;
    const int64_t n = g.elements;
    if (g.wavenumber != 0.0f || n == 0 || g.positions == 0) return none;
    for (f.nx = 1; f.nx < n && g.y[f.nx] == g.y[0];) ++f.nx;
    f.ny = n / f.nx;
    if (f.nx * f.ny != n) return none;
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = g.curvature[i] > largest ? g.curvature[i] : largest;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = i / f.nx * f.nx, column = i - row;
        const float bend = g.curvature[row] + (g.curvature[column] - g.curvature[0]) - g.curvature[i];
        if (g.x[i] != g.x[column] || g.y[i] != g.y[row] || !(bend * bend <= 1e-10f * largest * largest)) return none;
    }
    for (f.nw = 1; f.nw < g.positions && g.grid[3 * f.nw + 1] == g.grid[1] && g.grid[3 * f.nw] == g.grid[0];) ++f.nw;
    for (f.nv = 1; f.nv * f.nw < g.positions && g.grid[3 * f.nv * f.nw] == g.grid[0];) ++f.nv;
    f.nu = g.positions / (f.nv * f.nw);
    if (f.nu * f.nv * f.nw != g.positions) return none;
    for (int64_t i = 0; i < g.positions; ++i) {
        const float* position = g.grid + 3 * i;
        if (position[0] != g.grid[3 * (i / (f.nv * f.nw) * f.nv * f.nw)] || position[1] != g.grid[3 * (i / f.nw % f.nv * f.nw) + 1] ||
            position[2] != g.grid[3 * (i % f.nw) + 2])
            return none;
    }
    return f;
}

inline void fill_factors(const Factors& f, const Geometry& g) {
    const int64_t wide = f.wide_u();
    for (int64_t w = 0; w < f.nw; ++w) {
        const float bend = g.grid[3 * w + 2];
        for (int64_t u = 0; u < wide; ++u)
            for (int64_t i = 0; i < f.nx; ++i) {
                float* at = f.along_x + 2 * (w * wide + u / W * W) * f.nx + 2 * W * i + u % W;
                const bool inside = u < f.nu;
                const float position = inside ? g.grid[3 * u * f.nv * f.nw] : 0.0f;
                const philox::Pair e = unit(position * g.x[i] - bend * (g.curvature[i] - g.curvature[0]));
                at[0] = inside ? e.first : 0.0f;
                at[W] = inside ? e.second : 0.0f;
            }
        for (int64_t v = 0; v < f.nv; ++v)
            for (int64_t j = 0; j < f.ny; ++j) {
                const philox::Pair e = unit(g.grid[3 * v * f.nw + 1] * g.y[j * f.nx] - bend * g.curvature[j * f.nx]);
                float* at = f.along_y + 2 * ((w * f.nv + v) * f.ny + j);
                at[0] = e.first;
                at[1] = e.second;
            }
    }
}

// R rows of the residual against every x of W values of u: out [row][re: W | im: W].
template <int R> void along_x(float* out, const float* table, const float* re, const float* im, int64_t nx) {
    V sr[R] = {}, si[R] = {};
    for (int64_t i = 0; i < nx; ++i) {
        const V er = load(table + 2 * W * i), ei = load(table + 2 * W * i + W);
        for (int r = 0; r < R; ++r) {
            const float rr = re[r * nx + i], ri = im[r * nx + i];
            sr[r] += rr * er;
            si[r] += ri * er;
            sr[r] += ri * ei;
            si[r] -= rr * ei;
        }
    }
    for (int r = 0; r < R; ++r) {
        store(out + 2 * W * r, sr[r]);
        store(out + 2 * W * r + W, si[r]);
    }
}

struct Best {
    typedef int32_t Index __attribute__((vector_size(RIS_VECTOR_BYTES)));
    V score = splat<float>(-1.0f);
    Index code = {};
    inline void offer(const V& value, int32_t label) {
        const Index better = value > score;
        score = better ? value : score;
        code = better ? label - Index{} : code;
    }
};

// R values of v: |a^H r|^2 for W values of u each.
template <int R> void along_y(Best& best, const float* table, const float* rows, int64_t ny, int32_t label, int32_t label_step) {
    V sr[R] = {}, si[R] = {};
    for (int64_t j = 0; j < ny; ++j) {
        const V ar = load(rows + 2 * W * j), ai = load(rows + 2 * W * j + W);
        for (int r = 0; r < R; ++r) {
            const float cr = table[2 * (r * ny + j)], ci = table[2 * (r * ny + j) + 1];
            sr[r] += cr * ar;
            si[r] += cr * ai;
            sr[r] += ci * ai;
            si[r] -= ci * ar;
        }
    }
    for (int r = 0; r < R; ++r) best.offer(sr[r] * sr[r] + si[r] * si[r], label + r * label_step);
}

// Grid position with the largest |a^H r|, by the factors; rows: scratch of 2 W ny floats. Padded positions score 0.
inline int64_t strongest(const Factors& f, const float* re, const float* im, float* rows) {
    Best best;
    const int64_t vectors = f.wide_u() / W;
    for (int64_t w = 0; w < f.nw; ++w)
        for (int64_t p = 0; p < vectors; ++p) {
            const float *table = f.along_x + 2 * W * (w * vectors + p) * f.nx, *other = f.along_y + 2 * w * f.nv * f.ny;
            int64_t j = 0, v = 0;
            for (; j + 4 <= f.ny; j += 4) along_x<4>(rows + 2 * W * j, table, re + j * f.nx, im + j * f.nx, f.nx);
            for (; j < f.ny; ++j) along_x<1>(rows + 2 * W * j, table, re + j * f.nx, im + j * f.nx, f.nx);
            const auto label = [&](int64_t at) { return int32_t((p * f.nv + at) * f.nw + w); };
            for (; v + 4 <= f.nv; v += 4) along_y<4>(best, other + 2 * v * f.ny, rows, f.ny, label(v), int32_t(f.nw));
            for (; v < f.nv; ++v) along_y<1>(best, other + 2 * v * f.ny, rows, f.ny, label(v), 0);
        }
    int64_t found = 0;
    float score = -1.0f;
    for (int lane = 0; lane < W; ++lane) {
        const int64_t block = f.nv * f.nw, vector = best.code[lane] / block, u = vector * W + lane;
        if (u >= f.nu || !(best.score[lane] > score)) continue;
        score = best.score[lane];
        found = u * block + best.code[lane] % block;
    }
    return found;
}

// The same with a whole dictionary (2 N, 2 G), whose row 2 n holds [re a_n | -im a_n] and row 2 n + 1 [im a_n | re a_n].
inline int64_t strongest(const Geometry& g, const float* re, const float* im, float* sums) {
    const int64_t count = g.positions;
    float *sr = sums, *si = sums + count;
    std::memset(sums, 0, size_t(2 * count) * sizeof(float));
    for (int64_t i = 0; i < g.elements; ++i) {
        const float *ar = g.dictionary + 4 * i * count, *ai = ar + 2 * count, rr = re[i], ri = im[i];
#pragma GCC ivdep
        for (int64_t p = 0; p < count; ++p) {
            sr[p] += rr * ar[p] + ri * ai[p];
            si[p] += ri * ar[p] - rr * ai[p];
        }
    }
    int64_t found = 0;
    float score = -1.0f;
    for (int64_t p = 0; p < count; ++p) {
        const float value = sr[p] * sr[p] + si[p] * si[p];
        if (value > score) score = value, found = p;
    }
    return found;
}

// What the tangents of every position share: level_n = 1/sqrt(N) on the array and 0 beyond, the arms centred and scaled.
struct Arms {
    float *x, *y, *curvature, *level, *along_u, *along_v, *along_w;  // wide floats each
};

// (values - mean) * sign / scale, zero beyond the end.
inline void centre(float* out, const float* values, float sign, float scale, int64_t n) {
    float total = 0;
    for (int64_t i = 0; i < n; ++i) total += values[i];
    for (int64_t i = 0; i < n; ++i) out[i] = sign * (values[i] - total / float(n)) / scale;
}

inline void fill_arms(const Arms& a, const Geometry& g, int64_t wide) {
    float* all[] = {a.x, a.y, a.curvature, a.level, a.along_u, a.along_v, a.along_w};
    for (float* each : all) std::memset(each, 0, size_t(wide) * sizeof(float));
    const size_t bytes = size_t(g.elements) * sizeof(float);
    std::memcpy(a.x, g.x, bytes);
    std::memcpy(a.y, g.y, bytes);
    std::memcpy(a.curvature, g.curvature, bytes);
    for (int64_t i = 0; i < g.elements; ++i) a.level[i] = 1.0f / __builtin_sqrtf(float(g.elements));
    centre(a.along_u, g.x, 1.0f, g.scale[0], g.elements);
    centre(a.along_v, g.y, 1.0f, g.scale[1], g.elements);
    centre(a.along_w, g.curvature, -1.0f, g.scale[2], g.elements);
}

// exp(j psi) / sqrt(N) at one position (u, v, w): planar (2, wide).
inline void steer(float* out, const Arms& a, const float* position, float wavenumber, int64_t wide) {
    const float u = position[0], v = position[1], w = position[2], k = wavenumber;
    if (k == 0.0f) {
#pragma GCC ivdep
        for (int64_t i = 0; i < wide; ++i) {
            const philox::Pair e = unit(u * a.x[i] + v * a.y[i] - a.curvature[i] * w);
            out[i] = e.first * a.level[i];
            out[wide + i] = e.second * a.level[i];
        }
        return;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < wide; ++i) {
        const float line = u * a.x[i] + v * a.y[i], bend = a.curvature[i];
        const float square = 1.0f + 2.0f / k * w * (w * bend - line), q = __builtin_sqrtf(square > 1e-12f ? square : 1e-12f);
        const philox::Pair e = unit(2.0f * (line - w * bend) / (1.0f + q));
        out[i] = e.first * a.level[i];
        out[wide + i] = e.second * a.level[i];
    }
}

// Slopes of the spherical phase by u, v and w at one position, into three rows of `wide` floats.
inline void spherical_slopes(float* out, const Arms& a, const float* position, float k, int64_t wide) {
    const float u = position[0], v = position[1], w = position[2];
#pragma GCC ivdep
    for (int64_t i = 0; i < wide; ++i) {
        const float line = u * a.x[i] + v * a.y[i], bend = a.curvature[i];
        const float square = 1.0f + 2.0f / k * w * (w * bend - line), q = __builtin_sqrtf(square > 1e-12f ? square : 1e-12f);
        const float psi = 2.0f * (line - w * bend) / (1.0f + q);
        out[i] = a.x[i] / q;
        out[wide + i] = a.y[i] / q;
        out[2 * wide + i] = -(2.0f * bend + psi * (2.0f * w * bend - line) / (k * q)) / (1.0f + q);
    }
}

// One atom: a and j (psi' - mean psi') a / scale for u, v, w, planar (T, 2, wide). slopes: scratch of 3 wide floats.
inline void tangents(float* out, const Arms& a, const Geometry& g, const float* position, float* slopes, int64_t wide) {
    steer(out, a, position, g.wavenumber, wide);
    const float* arms[] = {a.along_u, a.along_v, a.along_w};
    if (g.wavenumber != 0.0f) {
        spherical_slopes(slopes, a, position, g.wavenumber, wide);
        for (int d = 0; d < 3; ++d) {
            centre(slopes + d * wide, slopes + d * wide, 1.0f, g.scale[d], g.elements);
            arms[d] = slopes + d * wide;
        }
    }
    for (int d = 0; d < 3; ++d)
        for (int64_t i = 0; i < wide; i += W) {
            const V arm = load(arms[d] + i);
            store(out + 2 * (d + 1) * wide + i, -arm * load(out + wide + i));
            store(out + (2 * d + 3) * wide + i, arm * load(out + i));
        }
}

}  // namespace pursuit
}  // namespace RIS_NS
