// Newtonized orthogonal matching pursuit (search.py) of a batch of scenes: network inputs and factor columns, one
// scene at a time per thread.
//
// Everything of a scene stays in the thread's scratch: P = G^H G and its images in the second-level cache for small
// arrays; for large ones G is applied through H and the codes and nothing of N x N exists. A scene goes through the
// same operations in the same order whatever the batch and the number of threads, so its bits are its own.
#include <cmath>

#include "grid.hpp"
#include "native/scratch.hpp"
#include "step.hpp"

namespace RIS_NS {
namespace pursuit {

constexpr float TINY = 1e-12f;
constexpr float NOTHING = 1e-18f;  // of search.py
constexpr float LEAST_DB = -40.0f, MOST_DB = 20.0f;  // WORKING_SNR_DB of reference.py, which says why

struct Sizes {
    int64_t antennas, elements, snapshots, atoms, positions, wide, lp;
    bool dense;  // P in panels; else G through H and the codes
    int64_t scores;  // floats that a search of the grid takes
    bool own_codes;  // one set of codes a scene; else one for all
    int64_t early() const { return atoms * (atoms - 1) / 2; }
    int64_t columns() const { return T * atoms; }
    int64_t rank() const { return columns() + early(); }
    int64_t width() const { return atoms * (3 + 1 + 1 + 3 * T + 2 * atoms) + 4 * early() + 2; }
    int64_t received() const { return antennas * lp; }  // floats a plane of one snapshot matrix
};

// One set of codes, planar (N, lp); and where P is formed, in planes (L, 2, wide), and sum_l conj(c_ln) c_lm in the panels of P.
struct Codes {
    float *re, *im, *planes, *overlap;

    void cut(Cutter& c, const Sizes& z) {
        c.part(re, z.elements * z.lp);
        c.part(im, z.elements * z.lp);
        c.part(planes, z.dense ? 2 * z.snapshots * z.wide : 0);
        c.part(overlap, z.dense ? 2 * z.wide * z.elements : 0);
    }
    void fill(const float* codes, const Sizes& z) const {
        for (int64_t i = 0; i < z.elements; ++i)
            for (int64_t l = 0; l < z.lp; ++l) {
                const float* c = codes + 2 * (l * z.elements + i);
                re[i * z.lp + l] = l < z.snapshots ? c[0] : 0.0f;
                im[i * z.lp + l] = l < z.snapshots ? c[1] : 0.0f;
            }
        if (!z.dense) return;
        for (int64_t l = 0; l < z.snapshots; ++l)
            for (int64_t i = 0; i < z.wide; ++i) {
                planes[2 * l * z.wide + i] = i < z.elements ? codes[2 * (l * z.elements + i)] : 0.0f;
                planes[(2 * l + 1) * z.wide + i] = i < z.elements ? codes[2 * (l * z.elements + i) + 1] : 0.0f;
            }
        gram_of<false>(overlap, overlap, planes, 1.0f, z.snapshots, z.elements, z.wide);
    }
};

// What all scenes of a call share; written once, then read by every thread.
struct Shared {
    Sizes z;
    const Geometry& g;
    Arms arms;
    Factors factors;
    Codes codes;
    float* block;

    void cut(Cutter& c) {
        float** rows[] = {&arms.x, &arms.y, &arms.curvature, &arms.level, &arms.along_u, &arms.along_v, &arms.along_w};
        for (float** row : rows) c.part(*row, z.wide);
        c.part(factors.along_x, factors.size_x());
        c.part(factors.along_y, factors.size_y());
        if (!z.own_codes) codes.cut(c, z);
    }
    Shared(const Sizes& sizes, const Geometry& geometry, const float* given) : z(sizes), g(geometry), factors(factors_of(geometry)) {
        z.scores = factors.nu ? 2 * W * factors.ny : 2 * z.positions;
        block = allocate(*this);
        if (!block) return;
        fill_arms(arms, g, z.wide);
        if (factors.nu) fill_factors(factors, g);
        if (!z.own_codes) codes.fill(given, z);
    }
    ~Shared() { std::free(block); }
};

// One thread's scratch.
struct Scratch {
    const Sizes& z;
    float *planes, *gram, *received, *rest, *moment, *residual, *columns, *images, *slopes, *scores;
    float *gram_re, *gram_im, *moment_re, *moment_im, *fit_re, *fit_im, *residual_correlation, *matrix, *ridge, *amplitude, *change;
    float *position, *stage_positions, *stage_amplitudes, *gains, *basis;
    Codes codes;
    float* block;

    void cut(Cutter& c) {
        const int64_t full = z.columns(), k = z.atoms, system = 5 * k;
        c.part(planes, 2 * z.antennas * z.wide);
        c.part(gram, z.dense ? 2 * z.wide * z.elements : 0);
        c.part(received, 2 * z.received());
        c.part(rest, 2 * z.received());
        c.part(moment, 2 * z.wide);
        c.part(residual, 2 * z.wide);
        c.part(columns, 2 * full * z.wide);
        c.part(images, 2 * full * (z.dense ? z.wide : z.received()));
        c.part(slopes, 3 * z.wide);
        c.part(scores, z.scores);
        c.part(gram_re, full * full);
        c.part(gram_im, full * full);
        float** rows[] = {&moment_re, &moment_im, &fit_re, &fit_im};
        for (float** row : rows) c.part(*row, full);
        c.part(residual_correlation, 2 * full);
        c.part(matrix, system * padded(system + 1));
        c.part(ridge, system);
        c.part(amplitude, 2 * k);
        c.part(change, system);
        c.part(position, 3 * k);
        c.part(stage_positions, 3 * z.early());
        c.part(stage_amplitudes, 2 * z.early());
        c.part(gains, k);
        c.part(basis, 2 * z.early() * z.wide);
        if (z.own_codes) codes.cut(c, z);
    }
    explicit Scratch(const Sizes& sizes) : z(sizes) { block = allocate(*this); }
    ~Scratch() { std::free(block); }
};

// One scene's numbers beyond its arrays.
struct Scene {
    const float *snapshots, *channel;
    const Codes& codes;
    float snr_db, noise, weight, column;  // sigma^2; sigma^2 over the expected |x|^2; 1/sqrt of G's mean squared column
    float scale, root, rest;              // power of two that takes the channel's largest entry into [1, 4) = root times rest, of like size
    float energy;
};

inline float at_least(float x, float low) { return x < low ? low : x; }

// 2^k for k in -126 .. 127.
inline float power_of_two(int32_t k) {
    const int32_t bits = (k + 127) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// k of the 2^k that takes the largest |value| into [1, 4), as kernels/scale.py: exact, so it changes no bit of ordinary numbers.
inline int32_t unit_exponent(const float* values, int64_t count) {
    int32_t peak = 0, bits;
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7fffffff;  // |value|; floats above zero order as their bits
        peak = bits > peak ? bits : peak;
    }
    const int32_t exponent = peak >> 23;
    return 127 - (exponent < 1 ? 1 : exponent > 253 ? 253 : exponent);
}

// Sum of squares of scaled values, in lanes, in a fixed order; above zero, so that scenes of zeros divide by it.
inline float energy_of(const float* values, float scale, int64_t count) {
    V total = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) total += (scale * load(values + i)) * (scale * load(values + i));
    float rest = sum<float>(total);
    for (; i < count; ++i) rest += (scale * values[i]) * (scale * values[i]);
    return at_least(rest, NOTHING);
}

// Units where y has mean power 1 and P has mean diagonal 1; planes of H and y, P where it is wanted, b = G^H y.
inline void normal_equations(const Scratch& s, Scene& scene) {
    const Sizes& z = s.z;
    const int64_t n = z.elements, plane = z.received();
    const float unit = power_of_two(unit_exponent(scene.snapshots, 2 * z.antennas * z.snapshots));
    const int32_t exponent = unit_exponent(scene.channel, 2 * z.antennas * n);
    scene.scale = power_of_two(exponent);
    scene.root = power_of_two(exponent / 2);
    scene.rest = power_of_two(exponent - exponent / 2);
    const float column = energy_of(scene.channel, scene.scale, 2 * z.antennas * n) * (float(z.snapshots) / float(n));
    const float level = energy_of(scene.snapshots, unit, 2 * z.antennas * z.snapshots) / float(z.antennas * z.snapshots);
    const float snr = std::pow(10.0f, scene.snr_db / 10.0f), size = float(z.snapshots * z.antennas);
    scene.energy = size;
    scene.noise = 1.0f / (1.0f + snr);
    scene.weight = scene.noise / (size * snr / (1.0f + snr));
    scene.column = 1.0f / __builtin_sqrtf(column);
    for (int64_t m = 0; m < z.antennas; ++m) {
        float* row = s.planes + 2 * m * z.wide;
        const float* from = scene.channel + 2 * m * n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
            row[i] = scene.scale * from[2 * i];
            row[z.wide + i] = scene.scale * from[2 * i + 1];
        }
        for (int64_t i = n; i < z.wide; ++i) row[i] = row[z.wide + i] = 0.0f;
        for (int64_t l = 0; l < z.lp; ++l) {
            const bool inside = l < z.snapshots;
            const float* y = scene.snapshots + 2 * ((inside ? l : 0) * z.antennas + m);
            s.received[m * z.lp + l] = inside ? unit * y[0] / __builtin_sqrtf(level) : 0.0f;
            s.received[plane + m * z.lp + l] = inside ? unit * y[1] / __builtin_sqrtf(level) : 0.0f;
        }
    }
    if (z.dense) gram_of<true>(s.gram, scene.codes.overlap, s.planes, 1.0f / column, z.antennas, n, z.wide);
    adjoint(s.moment, s.planes, scene.codes.re, scene.codes.im, s.received, scene.column, z.antennas, n, z.wide, z.lp);
}

// D^H P D and D^H b of the first `atoms` atoms, whose positions have moved.
inline void project(const Scratch& s, const Shared& shared, const Scene& scene, int64_t atoms) {
    const Sizes& z = s.z;
    for (int64_t k = 0; k < atoms; ++k) tangents(s.columns + 2 * T * k * z.wide, shared.arms, shared.g, s.position + 3 * k, s.slopes, z.wide);
    if (z.dense) {
        image_of(s.images, s.gram, s.columns, atoms, z.elements, z.wide);
        inner_products(s.gram_re, s.gram_im, s.columns, s.images, atoms, z.wide);
    } else {
        for (int64_t c = 0; c < T * atoms; ++c)
            apply(s.images + 2 * c * z.received(), scene.channel, scene.codes.re, scene.codes.im, s.columns + 2 * c * z.wide, scene.root,
                  scene.rest * scene.column, z.antennas, z.elements, z.wide, z.lp);
        inner_products(s.gram_re, s.gram_im, s.images, s.images, atoms, z.received());
    }
    for (int64_t c = 0; c < T * atoms; c += T) inner_tile<T, 1>(s.moment_re + c, s.moment_im + c, s.columns + 2 * c * z.wide, s.moment, z.wide, 1);
}

// b - P x of the linearised fit x.
inline void residual(const Scratch& s, const Scene& scene, int64_t atoms) {
    const Sizes& z = s.z;
    if (z.dense) {
        subtract(s.residual, s.moment, s.images, s.fit_re, s.fit_im, T * atoms, z.wide);
        return;
    }
    subtract(s.rest, s.received, s.images, s.fit_re, s.fit_im, T * atoms, z.received());
    adjoint(s.residual, s.planes, scene.codes.re, scene.codes.im, s.rest, scene.column, z.antennas, z.elements, z.wide, z.lp);
}

// Amplitudes and positions of the first `atoms` atoms take one Gauss-Newton step; fit is the tangent space's.
inline void step(const Scratch& s, const Geometry& g, const Scene& scene, int64_t atoms) {
    amplitudes(s.amplitude, s.matrix, s.ridge, s.gram_re, s.gram_im, s.moment_re, s.moment_im, scene.weight, atoms);
    newton(s.change, s.matrix, s.ridge, s.residual_correlation, s.gram_re, s.gram_im, s.moment_re, s.moment_im, s.amplitude, g.trust, scene.noise, scene.weight, atoms);
    for (int64_t k = 0; k < atoms; ++k) {
        const float *change = s.change + 5 * k, re = s.amplitude[k], im = s.amplitude[atoms + k];
        s.fit_re[T * k] = re + change[0];
        s.fit_im[T * k] = im + change[1];
        for (int d = 0; d < 3; ++d) {
            const float move = clamp(change[2 + d], -2 * g.trust[d], 2 * g.trust[d]);
            s.fit_re[T * k + 1 + d] = re * move;
            s.fit_im[T * k + 1 + d] = im * move;
            s.position[3 * k + d] = clamp(s.position[3 * k + d] + move / g.scale[d], g.low[d], g.high[d]);
        }
    }
}

// All stages: positions, fit, gram, correlation of the residual, gains and what earlier stages said.
inline void pursue(const Scratch& s, const Shared& shared, const Scene& scene) {
    const Sizes& z = s.z;
    float explained = 0;
    for (int64_t atoms = 1, early = 0; atoms <= z.atoms; early += atoms++) {
        const float* from = atoms == 1 ? s.moment : s.residual;
        const int64_t best = shared.factors.nu ? strongest(shared.factors, from, from + z.wide, s.scores)
                                               : strongest(shared.g, from, from + z.wide, s.scores);
        std::memcpy(s.position + 3 * (atoms - 1), shared.g.grid + 3 * best, 3 * sizeof(float));
        project(s, shared, scene, atoms);
        step(s, shared.g, scene, atoms);
        correlate_residual(s.residual_correlation, s.gram_re, s.gram_im, s.moment_re, s.moment_im, s.fit_re, s.fit_im, atoms);
        float reached = 0;
        for (int64_t c = 0; c < T * atoms; ++c)
            reached += s.fit_re[c] * (s.moment_re[c] + s.residual_correlation[c]) + s.fit_im[c] * (s.moment_im[c] + s.residual_correlation[T * atoms + c]);
        s.gains[atoms - 1] = reached - explained;
        explained = reached;
        if (atoms == z.atoms) return;
        residual(s, scene, atoms);
        std::memcpy(s.stage_positions + 3 * early, s.position, size_t(3 * atoms) * sizeof(float));
        for (int64_t k = 0; k < atoms; ++k) {
            s.stage_amplitudes[2 * (early + k)] = s.fit_re[T * k];
            s.stage_amplitudes[2 * (early + k) + 1] = s.fit_im[T * k];
        }
    }
}

// The network's numbers, in the order of the definition: (width).
inline void inputs(float* out, const Scratch& s, const Geometry& g, const Scene& scene) {
    const int64_t atoms = s.z.atoms, full = T * atoms, early = s.z.early();
    float* const powers = s.ridge;  // 5 K floats that the last step is done with
    float total = 0, gains = 0;
    for (int64_t k = 0; k < atoms; ++k) {
        powers[k] = at_least(s.fit_re[T * k] * s.fit_re[T * k] + s.fit_im[T * k] * s.fit_im[T * k], TINY);
        total += powers[k];
        gains += s.gains[k];
    }
    for (int64_t k = 0; k < atoms; ++k)
        for (int d = 0; d < 3; ++d)
            *out++ = (s.position[3 * k + d] - (g.high[d] + g.low[d]) / 2) / at_least((g.high[d] - g.low[d]) / 2, TINY);
    for (int64_t stage = 1, e = 0; stage < atoms; ++stage)
        for (int64_t k = 0; k < stage; ++k, ++e)
            for (int d = 0; d < 3; ++d) *out++ = clamp((s.stage_positions[3 * e + d] - s.position[3 * k + d]) * g.scale[d], -3, 3);
    for (int64_t k = 0; k < atoms; ++k) *out++ = std::log(at_least(powers[k] / total, 1e-6f)) / 4;
    for (int64_t e = 0; e < early; ++e) {
        const float re = s.stage_amplitudes[2 * e], im = s.stage_amplitudes[2 * e + 1];
        *out++ = std::log(at_least((re * re + im * im) / total, 1e-6f)) / 4;
    }
    for (int64_t k = 0; k < atoms; ++k) *out++ = std::log1p(at_least(s.gains[k], 0) / scene.noise) / 4 - 1;
    for (int64_t i = 0; i < full; ++i) {
        const int64_t k = i / T;
        const float information = at_least(powers[k] * s.gram_re[i * full + i] / scene.noise, TINY);
        const float re = s.fit_re[T * k], im = s.fit_im[T * k], unit = 1.0f / (scene.noise * __builtin_sqrtf(information));
        out[i] = std::log1p(information) / 4 - 1;
        out[full + i] = clamp((re * s.residual_correlation[i] + im * s.residual_correlation[full + i]) * unit, -4, 4) / 2;
        out[2 * full + i] = clamp((re * s.residual_correlation[full + i] - im * s.residual_correlation[i]) * unit, -4, 4) / 2;
    }
    out += 3 * full;
    for (int64_t i = 0; i < atoms; ++i)
        for (int64_t j = 0; j < atoms; ++j) {
            const float unit_i = 1.0f / __builtin_sqrtf(powers[i]), unit_j = 1.0f / __builtin_sqrtf(powers[j]);
            const float ar = s.fit_re[T * i] * unit_i, ai = s.fit_im[T * i] * unit_i;
            const float br = s.fit_re[T * j] * unit_j, bi = s.fit_im[T * j] * unit_j;
            const float gr = s.gram_re[T * i * full + T * j], gi = s.gram_im[T * i * full + T * j];
            const float cr = gr * br - gi * bi, ci = gr * bi + gi * br;
            out[i * atoms + j] = ar * cr + ai * ci;
            out[(atoms + i) * atoms + j] = ar * ci - ai * cr;
        }
    out += 2 * atoms * atoms;
    out[0] = scene.snr_db / 10 - 1;
    out[1] = clamp(std::log(at_least(scene.energy - gains, TINY) / (scene.energy * scene.noise)), -4, 4);
}

// columns *= s, planar complex.
inline void scale_column(float* column, float re, float im, int64_t wide) {
    for (int64_t i = 0; i < wide; i += W) {
        const V cr = load(column + i), ci = load(column + wide + i);
        store(column + i, re * cr - im * ci);
        store(column + wide + i, re * ci + im * cr);
    }
}

// Columns (count, 2, wide) to rows: out[i * stride + c] the real part of element i of column c, the imaginary one `apart` on.
inline void transpose(float* out, const float* columns, int64_t count, int64_t n, int64_t wide, int64_t stride, int64_t apart) {
    for (int64_t c = 0; c < count; ++c)
        for (int64_t i = 0; i < n; ++i) {
            out[i * stride + c] = columns[2 * c * wide + i];
            out[i * stride + apart + c] = columns[(2 * c + 1) * wide + i];
        }
}

// (N, 2 R): tangents at the final positions times amplitude, then how each earlier estimate differs; amplitudes of norm one.
inline void basis(float* out, const Scratch& s, const Shared& shared) {
    const Sizes& z = s.z;
    const int64_t wide = z.wide, rank = z.rank();
    float total = 0;
    for (int64_t k = 0; k < z.atoms; ++k) total += s.fit_re[T * k] * s.fit_re[T * k] + s.fit_im[T * k] * s.fit_im[T * k];
    const float unit = 1.0f / __builtin_sqrtf(at_least(total, TINY));
    for (int64_t k = 0; k < z.atoms; ++k) {
        tangents(s.columns + 2 * T * k * wide, shared.arms, shared.g, s.position + 3 * k, s.slopes, wide);
        for (int t = 0; t < T; ++t) scale_column(s.columns + 2 * (T * k + t) * wide, s.fit_re[T * k] * unit, s.fit_im[T * k] * unit, wide);
    }
    for (int64_t stage = 1, e = 0; stage < z.atoms; ++stage)
        for (int64_t k = 0; k < stage; ++k, ++e) {
            float* column = s.basis + 2 * e * wide;
            steer(column, shared.arms, s.stage_positions + 3 * e, shared.g.wavenumber, wide);
            scale_column(column, s.stage_amplitudes[2 * e] * unit, s.stage_amplitudes[2 * e + 1] * unit, wide);
            const float* now = s.columns + 2 * T * k * wide;
            for (int64_t i = 0; i < 2 * wide; i += W) store(column + i, load(column + i) - load(now + i));
        }
    transpose(out, s.columns, z.columns(), z.elements, wide, 2 * rank, rank);
    transpose(out + z.columns(), s.basis, z.early(), z.elements, wide, 2 * rank, rank);
}

}  // namespace pursuit
}  // namespace RIS_NS

// inputs (B, width) and basis (B, N, 2 rank) from snapshots (B, L, M, 2), channel (B, M, N, 2), codes (L, N, 2), or
// (B, L, N, 2) where own_codes is 1, snr in dB (B), and the constants of the geometry: x, y, curvature (N), scale, low, high, trust (3), grid (G, 3), dictionary
// (2 N, 2 G), which may be null where the grid has factors. wavenumber 0: Fresnel. dense: 1 to form P, 0 to go through H, -1 to choose.
// Returns 0, 1 if there was no memory for scratch, or 2 if there is neither a dictionary nor a grid with factors.
RIS_EXPORT(int, pursuit_features)
(float* inputs, float* basis, const float* snapshots, const float* channel, const float* codes, const float* snr_db, const float* x,
 const float* y, const float* curvature, const float* scale, const float* low, const float* high, const float* trust, const float* grid,
 const float* dictionary, float wavenumber, int64_t batch, int64_t antennas, int64_t elements, int64_t n_snapshots, int64_t atoms,
 int64_t positions, int64_t dense, int64_t own_codes) {
    using namespace RIS_NS::pursuit;
    const int64_t wide = padded(elements), lp = padded(n_snapshots), rounds = 2 * atoms * (atoms + 1);
    const bool small = elements <= 256 && elements * (antennas + rounds) <= antennas * n_snapshots * rounds;
    const Geometry g{x, y, curvature, scale, low, high, trust, grid, dictionary, elements, positions, wavenumber};
    const Shared shared({antennas, elements, n_snapshots, atoms, positions, wide, lp, dense < 0 ? small : dense > 0, 0, own_codes > 0}, g, codes);
    const Sizes& z = shared.z;
    int failed = !shared.block;
    if (failed) return 1;
    if (!shared.factors.nu && !dictionary) return 2;
#pragma omp parallel if (batch > 1)
    {
        const Scratch s(z);
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t b = 0; b < batch; ++b) {
            if (!s.block) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            if (own_codes) s.codes.fill(codes + 2 * b * n_snapshots * elements, z);
            Scene scene{snapshots + 2 * b * n_snapshots * antennas, channel + 2 * b * antennas * elements, own_codes ? s.codes : shared.codes,
                        clamp(snr_db[b], LEAST_DB, MOST_DB), 0, 0, 0, 0, 0, 0, 0};
            normal_equations(s, scene);
            pursue(s, shared, scene);
            RIS_NS::pursuit::inputs(inputs + b * z.width(), s, g, scene);
            RIS_NS::pursuit::basis(basis + 2 * b * elements * z.rank(), s, shared);
        }
    }
    return failed;
}
