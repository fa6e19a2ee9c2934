// Newtonized orthogonal matching pursuit with elimination (search.py) of a batch of scenes: network inputs and factor
// columns, one scene at a time per thread.
//
// Atoms live in slots: columns, images and inner products of a slot stay where they are while other atoms come and go,
// and are made again only when its atom gets a new base. A scene does no more steps than it needs.
//
// Everything of a scene stays in the thread's scratch: P = G^H G and its images in the second-level cache for small
// arrays; for large ones G is applied through H and the codes and nothing of N x N exists. A scene goes through the
// same operations in the same order whatever the batch and the number of threads, so its bits are its own.
#include <algorithm>
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

// D^H P D and D^H b of slots with a new base, against the first `slots` slots.
inline void project(const Scratch& s, const Shared& shared, const Scene& scene, int64_t slots) {
    const Sizes& z = s.z;
    const int64_t stride = T * z.slots(), plane = z.dense ? z.wide : z.received();
    for (int64_t k = 0; k < slots; ++k) {
        if (!s.stale()[k]) continue;
        float *column = s.columns + 2 * T * k * z.wide, *image = s.images + 2 * T * k * plane;
        tangents(column, shared.arms, shared.g, s.base + 3 * k, s.slopes, z.wide);
        if (z.dense) image_of(image, s.gram, column, 1, z.elements, z.wide);
        else
            for (int64_t t = 0; t < T; ++t)
                apply(image + 2 * t * plane, scene.channel, scene.codes.re, scene.codes.im, column + 2 * t * z.wide, scene.root,
                      scene.rest * scene.column, z.antennas, z.elements, z.wide, z.lp);
        inner_tile<T, 1>(s.moment_re + T * k, s.moment_im + T * k, column, s.moment, z.wide, 1);
    }
    const float* left = z.dense ? s.columns : s.images;
    for (int64_t j = 0; j < slots; ++j)
        for (int64_t i = 0; i <= j; ++i)
            if (s.stale()[i] || s.stale()[j]) inner_block(s.gram_re, s.gram_im, left, s.images, i, j, stride, plane);
    for (int64_t k = 0; k < slots; ++k) s.stale()[k] = 0;
}

// What the fit of `count` live atoms sees: D^H P D and D^H b with a + sum_d offset_d t_d in the place of a, compact.
inline void shift(const Scratch& s, int64_t count) {
    const int64_t stride = T * s.z.slots(), full = T * count;
    for (int64_t p = 0; p < count; ++p) {
        const int64_t i = s.live()[p];
        const float* left = s.offset + 3 * i;
        float *re = s.fit_moment_re + T * p, *im = s.fit_moment_im + T * p;
        for (int t = 0; t < T; ++t) re[t] = s.moment_re[T * i + t], im[t] = s.moment_im[T * i + t];
        for (int d = 0; d < 3; ++d) re[0] += left[d] * re[d + 1], im[0] += left[d] * im[d + 1];
        for (int64_t q = 0; q < count; ++q) {
            const int64_t j = s.live()[q];
            const float* right = s.offset + 3 * j;
            const float* const from[] = {s.gram_re + T * i * stride + T * j, s.gram_im + T * i * stride + T * j};
            float* const to[] = {s.fit_re + T * p * full + T * q, s.fit_im + T * p * full + T * q};
            for (int part = 0; part < 2; ++part) {
                float rows[T][T];
                for (int t = 0; t < T; ++t) {
                    for (int c = 0; c < T; ++c) rows[t][c] = from[part][t * stride + c];
                    rows[t][0] += right[0] * rows[t][1] + right[1] * rows[t][2] + right[2] * rows[t][3];
                }
                for (int c = 0; c < T; ++c) rows[0][c] += left[0] * rows[1][c] + left[1] * rows[2][c] + left[2] * rows[3][c];
                for (int t = 0; t < T; ++t)
                    for (int c = 0; c < T; ++c) to[part][t * full + c] = rows[t][c];
            }
        }
    }
}

// Amplitudes of the live atoms by ridge least squares where they are.
inline void fit(const Scratch& s, const Shared& shared, const Scene& scene, int64_t count, int64_t slots) {
    project(s, shared, scene, slots);
    shift(s, count);
    amplitudes(s.amplitude, s.matrix, s.ridge, s.fit_re, s.fit_im, s.fit_moment_re, s.fit_moment_im, scene.weight, count);
}

// |y - G x|^2 + weight |s|^2 of that fit, which least squares makes |y|^2 - Re s^H b.
inline float cost(const Scratch& s, const Scene& scene, int64_t count) {
    float left = scene.energy;
    for (int64_t k = 0; k < count; ++k) left -= s.amplitude[k] * s.fit_moment_re[T * k] + s.amplitude[count + k] * s.fit_moment_im[T * k];
    return left;
}

// What a Gauss-Newton step changes, moves within twice the trust; returns the logarithm of its system's determinant.
inline float direction(const Scratch& s, const Geometry& g, const Scene& scene, int64_t count) {
    const float log_det = newton(s.change, s.matrix, s.ridge, s.correlation, s.fit_re, s.fit_im, s.fit_moment_re, s.fit_moment_im, s.amplitude,
                                 g.trust, scene.noise, scene.weight, count);
    for (int64_t k = 0; k < count; ++k)
        for (int d = 0; d < 3; ++d) s.change[5 * k + 2 + d] = clamp(s.change[5 * k + 2 + d], -2 * g.trust[d], 2 * g.trust[d]);
    return log_det;
}

// Takes the moves; whether an atom got a new base.
inline bool move(const Scratch& s, const Geometry& g, const Scene& scene, int64_t count) {
    bool any = false;
    for (int64_t k = 0; k < count; ++k) {
        const int64_t slot = s.live()[k];
        float *base = s.base + 3 * slot, *offset = s.offset + 3 * slot, target[3], length = 0;
        for (int d = 0; d < 3; ++d) {
            target[d] = clamp(base[d] + (offset[d] + s.change[5 * k + 2 + d]) / g.scale[d], g.low[d], g.high[d]);
            offset[d] = (target[d] - base[d]) * g.scale[d];
            length += offset[d] * offset[d];
        }
        const float re = s.amplitude[k], im = s.amplitude[count + k];
        if (!(length > at_least(NOISE_REBASE * scene.noise / at_least(re * re + im * im, TINY_POWER), REBASE * REBASE))) continue;
        for (int d = 0; d < 3; ++d) base[d] = target[d], offset[d] = 0;
        s.stale()[slot] = 1;
        any = true;
    }
    return any;
}

// b - P x of x = sum_k c_k (a_k + sum_d move_d t_d) over the first `atoms` slots, all live; moves: whether the last step counts.
inline void residual(const Scratch& s, const Scene& scene, int64_t atoms, bool moves) {
    const Sizes& z = s.z;
    float *re = s.coefficient, *im = re + T * z.slots();
    for (int64_t k = 0; k < atoms; ++k) {
        const float* change = s.change + 5 * k;
        re[T * k] = s.amplitude[k] + (moves ? change[0] : 0);
        im[T * k] = s.amplitude[atoms + k] + (moves ? change[1] : 0);
        for (int d = 0; d < 3; ++d) {
            const float offset = s.offset[3 * k + d] + (moves ? change[2 + d] : 0);
            re[T * k + 1 + d] = re[T * k] * offset;
            im[T * k + 1 + d] = im[T * k] * offset;
        }
    }
    if (z.dense) {
        subtract(s.residual, s.moment, s.images, re, im, T * atoms, z.wide);
        return;
    }
    subtract(s.rest, s.received, s.images, re, im, T * atoms, z.received());
    adjoint(s.residual, s.planes, scene.codes.re, scene.codes.im, s.rest, scene.column, z.antennas, z.elements, z.wide, z.lp);
}

// Atoms from `have` on, up to `want`, each where the residual points and followed by a step of all.
inline void extend(const Scratch& s, const Shared& shared, const Scene& scene, int64_t have, int64_t want) {
    const Sizes& z = s.z;
    for (int64_t slot = have; slot < want; ++slot) {
        const float* from = slot ? s.residual : s.moment;
        const int64_t best = shared.factors.nu ? strongest(shared.factors, from, from + z.wide, s.scores)
                                               : strongest(shared.g, from, from + z.wide, s.scores);
        for (int d = 0; d < 3; ++d) s.base[3 * slot + d] = shared.g.grid[3 * best + d], s.offset[3 * slot + d] = 0;
        s.live()[slot] = slot;
        s.stale()[slot] = 1;
        fit(s, shared, scene, slot + 1, slot + 1);
        direction(s, shared.g, scene, slot + 1);
        if (slot + 1 < want) residual(s, scene, slot + 1, true);
        move(s, shared.g, scene, slot + 1);
    }
}

// Steps until none gives an atom a new base, POLISH at most, then the fit; returns the last step's log determinant.
inline float polish(const Scratch& s, const Shared& shared, const Scene& scene, int64_t count, int64_t slots) {
    float log_det = 0;
    for (int64_t step = 0; step < POLISH; ++step) {
        fit(s, shared, scene, count, slots);
        log_det = direction(s, shared.g, scene, count);
        if (!move(s, shared.g, scene, count)) break;
    }
    fit(s, shared, scene, count, slots);
    return log_det;
}

// Takes the atom away without which the fit's cost rises least; returns its place among the live ones.
inline int64_t drop(const Scratch& s, const Scene& scene, int64_t count) {
    inverse_diagonal(s.change, s.matrix, s.fit_re, s.fit_im, scene.weight, count);
    int64_t least = 0;
    float lowest = 0;
    for (int64_t k = 0; k < count; ++k) {
        const float re = s.amplitude[k], im = s.amplitude[count + k], rise = (re * re + im * im) / s.change[k];
        if (k && !(rise < lowest)) continue;
        lowest = rise;
        least = k;
    }
    std::memmove(s.live() + least, s.live() + least + 1, size_t(count - 1 - least) * sizeof(int64_t));
    return least;
}

// One order's estimate, atoms in the order of the slots.
inline void keep(const Scratch& s, const Geometry& g, const Scene& scene, int64_t count, float log_det) {
    float *positions = s.raw_positions + 3 * (count * (count - 1) / 2), *found = s.raw_amplitudes + count * (count - 1);
    for (int64_t k = 0; k < count; ++k) {
        const int64_t slot = s.live()[k];
        for (int d = 0; d < 3; ++d) positions[3 * k + d] = s.base[3 * slot + d] + s.offset[3 * slot + d] / g.scale[d];
        found[2 * k] = s.amplitude[k];
        found[2 * k + 1] = s.amplitude[count + k];
    }
    s.costs[count] = cost(s, scene, count);
    s.log_det[count - 1] = log_det;
}

// Inner products of the atoms of the highest order, in the order of the slots.
inline void keep_products(const Scratch& s, int64_t count) {
    const int64_t full = T * count;
    for (int64_t i = 0; i < full; ++i) s.diagonal[i] = s.fit_re[i * full + i];
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < count; ++j) {
            s.inner[2 * (i * count + j)] = s.fit_re[T * i * full + T * j];
            s.inner[2 * (i * count + j) + 1] = s.fit_im[T * i * full + T * j];
        }
}

// Every order's atoms, the last to be dropped first.
inline void sort(const Scratch& s) {
    int64_t* order = s.order();
    for (int64_t count = 1; count <= s.z.atoms; ++count) {
        const int64_t gone = count > 1 ? s.dropped()[count - 1] : 0, from = count * (count - 1) / 2;
        for (int64_t k = 0; k < count - 1; ++k) order[k] += order[k] >= gone;
        order[count - 1] = gone;
        for (int64_t k = 0; k < count; ++k) {
            std::memcpy(s.positions + 3 * (from + k), s.raw_positions + 3 * (from + order[k]), 3 * sizeof(float));
            std::memcpy(s.amplitudes + 2 * (from + k), s.raw_amplitudes + 2 * (from + order[k]), 2 * sizeof(float));
        }
    }
}

// The sources at every order.
inline void pursue(const Scratch& s, const Shared& shared, const Scene& scene) {
    const int64_t atoms = s.z.atoms, slots = s.z.slots();
    extend(s, shared, scene, 0, atoms);
    float log_det = polish(s, shared, scene, atoms, atoms);
    int64_t used = atoms;
    const bool enough = 2 * std::min(s.z.elements, s.z.antennas * s.z.snapshots) >= 5 * slots;  // beyond, atoms would fit anything
    if (enough && cost(s, scene, atoms) > scene.noise * (scene.energy - 2.5f * float(atoms) + DOUBT * __builtin_sqrtf(scene.energy))) {
        residual(s, scene, atoms, false);
        extend(s, shared, scene, atoms, slots);
        polish(s, shared, scene, slots, slots);
        for (int64_t count = slots; count > atoms; --count) {
            drop(s, scene, count);
            log_det = polish(s, shared, scene, count - 1, slots);
        }
        used = slots;
    }
    keep_products(s, atoms);
    keep(s, shared.g, scene, atoms, log_det);
    for (int64_t count = atoms; count > 1; --count) {
        s.dropped()[count - 1] = drop(s, scene, count);
        log_det = polish(s, shared, scene, count - 1, used);
        keep(s, shared.g, scene, count - 1, log_det);
    }
    s.costs[0] = scene.energy;
    sort(s);
}

// The network's numbers, in the order of the definition: (width).
inline void inputs(float* out, const Scratch& s, const Geometry& g, const Scene& scene) {
    const int64_t atoms = s.z.atoms, early = s.z.early();
    const float *positions = s.positions + 3 * early, *found = s.amplitudes + 2 * early;  // of the highest order
    const int64_t* order = s.order();
    float* const powers = s.ridge;  // floats that the last step is done with
    float total = 0;
    for (int64_t k = 0; k < atoms; ++k) {
        powers[k] = at_least(found[2 * k] * found[2 * k] + found[2 * k + 1] * found[2 * k + 1], TINY);
        total += powers[k];
    }
    for (int64_t k = 0; k < atoms; ++k)
        for (int d = 0; d < 3; ++d)
            *out++ = (positions[3 * k + d] - (g.high[d] + g.low[d]) / 2) / at_least((g.high[d] - g.low[d]) / 2, TINY);
    for (int64_t count = 1, e = 0; count < atoms; ++count)
        for (int64_t k = 0; k < count; ++k, ++e)
            for (int d = 0; d < 3; ++d) *out++ = clamp((s.positions[3 * e + d] - positions[3 * k + d]) * g.scale[d], -3, 3);
    for (int64_t k = 0; k < atoms; ++k) *out++ = std::log(at_least(powers[k] / total, 1e-6f)) / 4;
    for (int64_t e = 0; e < early; ++e) {
        const float re = s.amplitudes[2 * e], im = s.amplitudes[2 * e + 1];
        *out++ = std::log(at_least((re * re + im * im) / total, 1e-6f)) / 4;
    }
    for (int64_t k = 0; k < atoms; ++k) *out++ = std::log1p(at_least(s.costs[k] - s.costs[k + 1], 0) / scene.noise) / 4 - 1;
    for (int64_t k = 0; k < atoms; ++k)
        for (int t = 0; t < T; ++t) *out++ = std::log1p(at_least(powers[k] * s.diagonal[T * order[k] + t] / scene.noise, TINY)) / 4 - 1;
    for (int64_t i = 0; i < atoms; ++i)
        for (int64_t j = 0; j < atoms; ++j) {
            const float unit_i = 1.0f / __builtin_sqrtf(powers[i]), unit_j = 1.0f / __builtin_sqrtf(powers[j]);
            const float ar = found[2 * i] * unit_i, ai = found[2 * i + 1] * unit_i;
            const float br = found[2 * j] * unit_j, bi = found[2 * j + 1] * unit_j;
            const float* inner = s.inner + 2 * (order[i] * atoms + order[j]);
            const float cr = inner[0] * br - inner[1] * bi, ci = inner[0] * bi + inner[1] * br;
            out[i * atoms + j] = ar * cr + ai * ci;
            out[(atoms + i) * atoms + j] = ar * ci - ai * cr;
        }
    out += 2 * atoms * atoms;
    for (int64_t k = 0; k < atoms; ++k) *out++ = (s.log_det[k] / float(5 * (k + 1)) - std::log(scene.noise)) / 4 - 1;
    out[0] = scene.snr_db / 10 - 1;
    out[1] = clamp(std::log(at_least(s.costs[atoms], TINY) / (scene.energy * scene.noise)), -4, 4);
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

// (N, 2 R): tangents at the final positions times amplitude, then how each lower order differs; amplitudes of norm one.
inline void basis(float* out, const Scratch& s, const Shared& shared) {
    const Sizes& z = s.z;
    const int64_t wide = z.wide, rank = z.rank(), early = z.early();
    const float *positions = s.positions + 3 * early, *found = s.amplitudes + 2 * early;
    float total = 0;
    for (int64_t k = 0; k < 2 * z.atoms; ++k) total += found[k] * found[k];
    const float unit = 1.0f / __builtin_sqrtf(at_least(total, TINY));
    for (int64_t k = 0; k < z.atoms; ++k) {
        tangents(s.columns + 2 * T * k * wide, shared.arms, shared.g, positions + 3 * k, s.slopes, wide);
        for (int t = 0; t < T; ++t) scale_column(s.columns + 2 * (T * k + t) * wide, found[2 * k] * unit, found[2 * k + 1] * unit, wide);
    }
    for (int64_t count = 1, e = 0; count < z.atoms; ++count)
        for (int64_t k = 0; k < count; ++k, ++e) {
            float* column = s.basis + 2 * e * wide;
            steer(column, shared.arms, s.positions + 3 * e, shared.g.wavenumber, wide);
            scale_column(column, s.amplitudes[2 * e] * unit, s.amplitudes[2 * e + 1] * unit, wide);
            const float* now = s.columns + 2 * T * k * wide;
            for (int64_t i = 0; i < 2 * wide; i += W) store(column + i, load(column + i) - load(now + i));
        }
    transpose(out, s.columns, z.columns(), z.elements, wide, 2 * rank, rank);
    transpose(out + z.columns(), s.basis, early, z.elements, wide, 2 * rank, rank);
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
