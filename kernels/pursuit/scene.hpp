// What a pursuit keeps of a call, of a thread and of a scene, and the normal equations that it starts from.
#pragma once
#include <cmath>

#include "grid.hpp"
#include "native/scratch.hpp"
#include "step.hpp"

namespace RIS_NS {
namespace pursuit {

constexpr float TINY = 1e-12f;
constexpr float NOTHING = 1e-18f, TINY_POWER = 1e-12f, REBASE = 0.05f, NOISE_REBASE = 0.5f, DOUBT = 1.5f, SHARE = 0.1f;  // of search.py
constexpr int64_t POLISH = 2, EXTRA = 3;   // of search.py
constexpr float LEAST_DB = -40.0f, MOST_DB = 20.0f;  // WORKING_SNR_DB of reference.py, which says why

struct Sizes {
    int64_t antennas, elements, snapshots, atoms, positions, wide, lp;
    bool dense;  // P in panels; else G through H and the codes
    int64_t scores;  // floats that a search of the grid takes
    bool own_codes;  // one set of codes a scene; else one for all
    int64_t early() const { return atoms * (atoms - 1) / 2; }
    int64_t columns() const { return T * atoms; }
    int64_t slots() const { return atoms + EXTRA; }
    int64_t rank() const { return columns() + early(); }
    int64_t width() const { return atoms * (3 + 1 + 1 + 1 + T + 2 * atoms) + 4 * early() + 2; }
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

// One thread's scratch. Arrays of S = K + EXTRA slots, then of the atoms in the fit (compact), then of the answer.
struct Scratch {
    const Sizes& z;
    float *planes, *gram, *received, *rest, *moment, *residual, *columns, *images, *slopes, *scores;
    float *gram_re, *gram_im, *moment_re, *moment_im, *base, *offset;                          // of slots
    float *fit_re, *fit_im, *fit_moment_re, *fit_moment_im, *amplitude, *coefficient, *change, *correlation;  // of the fit
    float *matrix, *ridge;
    float *raw_positions, *raw_amplitudes, *costs, *log_det;  // of orders 1 to K, in the order of the slots
    float *diagonal, *inner, *positions, *amplitudes, *basis;  // of the answer: positions and amplitudes of orders 1 to K, sorted
    float* integers;
    Codes codes;
    float* block;

    int64_t* live() const { return reinterpret_cast<int64_t*>(integers); }  // slots of the fit
    int64_t* stale() const { return live() + z.slots(); }                   // whether a slot has a new base
    int64_t* dropped() const { return stale() + z.slots(); }                // place of the atom that left order k
    int64_t* order() const { return dropped() + z.slots(); }

    void cut(Cutter& c) {
        const int64_t slots = z.slots(), full = T * slots, k = z.atoms, system = 5 * slots, all = z.early() + k;
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
        float** squares[] = {&gram_re, &gram_im, &fit_re, &fit_im};
        for (float** square : squares) c.part(*square, full * full);
        float** rows[] = {&moment_re, &moment_im, &fit_moment_re, &fit_moment_im};
        for (float** row : rows) c.part(*row, full);
        c.part(base, 3 * slots);
        c.part(offset, 3 * slots);
        c.part(amplitude, 2 * slots);
        c.part(coefficient, 2 * full);
        c.part(change, system);
        c.part(correlation, 2 * full);
        c.part(matrix, system * padded(system + 1));
        c.part(ridge, system);
        c.part(raw_positions, 3 * all);
        c.part(raw_amplitudes, 2 * all);
        c.part(costs, k + 1);
        c.part(log_det, k);
        c.part(diagonal, T * k);
        c.part(inner, 2 * k * k);
        c.part(positions, 3 * all);
        c.part(amplitudes, 2 * all);
        c.part(basis, 2 * z.early() * z.wide);
        c.part(integers, 4 * slots * int64_t(sizeof(int64_t) / sizeof(float)));
        if (z.own_codes) codes.cut(c, z);
    }
    explicit Scratch(const Sizes& sizes) : z(sizes) { block = allocate(*this); }
    ~Scratch() { std::free(block); }
};

// One scene's numbers beyond its arrays.
struct Scene {
    const float *snapshots, *channel;
    const Codes& codes;
    float snr_db, noise, weight, column;  // sigma^2; sigma^2 over the expected |s|^2 of an atom; 1/sqrt of G's mean squared column
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
    scene.weight = scene.noise / (SHARE * size * snr / (1.0f + snr));
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

}  // namespace pursuit
}  // namespace RIS_NS
