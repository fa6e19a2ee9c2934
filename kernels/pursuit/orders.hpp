// The pursuit itself: atoms added one by one, polished, and taken away again down to one, each order kept.
//
// Atoms live in slots: columns, images and inner products of a slot stay where they are while other atoms come and go,
// and are made again only when its atom gets a new base. A scene does no more steps than it needs.
#pragma once
#include <algorithm>

#include "scene.hpp"

namespace RIS_NS {
namespace pursuit {

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

}  // namespace pursuit
}  // namespace RIS_NS
