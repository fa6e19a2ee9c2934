// What a network reads of the orders: its inputs, and the basis of its factors.
#pragma once
#include "orders.hpp"

namespace RIS_NS {
namespace pursuit {

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
