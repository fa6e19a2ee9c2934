// Makes scenes one at a time, everything but the results in the first-level cache; the model is that of reference.py.
//
// Complex arrays are interleaved (re, im) in memory and planar in scratch. Every scene goes through the same
// operations in the same order whatever the batch and the number of threads, so its bits are its own.
#include "native/scratch.hpp"
#include "philox/philox.hpp"

namespace RIS_NS {
namespace scenes {

typedef Vec<float> V;
constexpr int W = lanes<float>;

struct Sizes {
    int64_t antennas, elements, snapshots, sources, symbols;
    int64_t padded() const { return round_up(snapshots, W); }
};

// One thread's scratch, cut from one allocation.
struct Scratch {
    const Sizes& z;
    float *steer_re, *steer_im, *field, *code_re, *code_im, *coded_re, *coded_im, *even, *odd, *clean, *noise, *block;

    explicit Scratch(const Sizes& sizes) : z(sizes) { block = allocate(*this); }
    void cut(Cutter& c) {
        const int64_t lp = z.padded(), n = z.elements;
        float** coded[] = {&code_re, &code_im, &coded_re, &coded_im};
        c.part(steer_re, n);
        c.part(steer_im, n);
        c.part(field, 2 * z.symbols * n);
        for (float** part : coded) c.part(*part, n * lp);
        c.part(even, 2 * n);
        c.part(odd, 2 * n);
        c.part(clean, 2 * lp * z.antennas);
        c.part(noise, 2 * z.snapshots * z.antennas);
    }
    ~Scratch() { std::free(block); }
};

// cos and sin of any number of quarter turns.
inline __attribute__((always_inline)) philox::Pair unit(float quarters) {
    const float whole = (quarters + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: to the nearest integer
    return philox::direction(int(whole), quarters - whole);
}

// Direction cosines u = sin(azimuth) cos(elevation), v = sin(elevation).
inline philox::Pair cosines(const float* place) {
    constexpr float quarters_a_radian = 0.636619772367581343f;
    const philox::Pair azimuth = unit(place[0] * quarters_a_radian), elevation = unit(place[1] * quarters_a_radian);
    return {azimuth.second * elevation.first, elevation.second};
}

// Unit-norm near-field vector of a place (azimuth, elevation, range); x, y and range in wavelengths.
template <bool spherical> void steer(float* re, float* im, const float* x, const float* y, const float* place, int64_t n) {
    const philox::Pair towards = cosines(place);
    const float u = towards.first, v = towards.second, r = place[2], scale = 1.0f / __builtin_sqrtf(float(n)), half = 0.5f / r;
    for (int64_t i = 0; i < n; ++i) {
        const float bow = x[i] * x[i] + y[i] * y[i], plane = u * x[i] + v * y[i];
        const float excess = bow - 2.0f * r * plane;
        const float turns = spherical ? -excess / (r + __builtin_sqrtf(r * r + excess)) : plane - bow * half;
        const philox::Pair entry = unit(4.0f * turns);
        re[i] = entry.first * scale;
        im[i] = entry.second * scale;
    }
}

// Codes (L, N, 2) to planar (N, L), padded with zeros: once a thread, or once a scene that has its own.
inline void transpose_codes(const Scratch& s, const float* codes, const Sizes& z) {
    const int64_t lp = z.padded();
    for (int64_t i = 0; i < z.elements; ++i)
        for (int64_t l = 0; l < lp; ++l) {
            const float* c = codes + 2 * (l * z.elements + i);
            s.code_re[i * lp + l] = l < z.snapshots ? c[0] : 0.0f;
            s.code_im[i * lp + l] = l < z.snapshots ? c[1] : 0.0f;
        }
}

// Field of every symbol, planar (S, 2, N), and the factor (N, K, 2).
template <bool spherical>
void sources(const Scratch& s, float* factor, const float* x, const float* y, const float* source, const float* amplitude,
             const float* power, const Sizes& z) {
    const int64_t n = z.elements, k_max = z.sources;
    std::memset(s.field, 0, size_t(2 * z.symbols * n) * sizeof(float));
    for (int64_t k = 0; k < k_max; ++k) {
        const float root = __builtin_sqrtf(power[k]);
        if (root == 0.0f) {
            for (int64_t i = 0; i < n; ++i) factor[2 * (i * k_max + k)] = factor[2 * (i * k_max + k) + 1] = 0.0f;
            continue;
        }
        steer<spherical>(s.steer_re, s.steer_im, x, y, source + 3 * k, n);
        for (int64_t t = 0; t < z.symbols; ++t) {
            const float ar = amplitude[2 * (t * k_max + k)], ai = amplitude[2 * (t * k_max + k) + 1];
            float *fr = s.field + 2 * t * n, *fi = fr + n;
            for (int64_t i = 0; i < n; ++i) {
                fr[i] += ar * s.steer_re[i] - ai * s.steer_im[i];
                fi[i] += ar * s.steer_im[i] + ai * s.steer_re[i];
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            factor[2 * (i * k_max + k)] = root * s.steer_re[i];
            factor[2 * (i * k_max + k) + 1] = root * s.steer_im[i];
        }
    }
}

// c_l o x_l, planar (N, L).
inline void encode(const Scratch& s, const Sizes& z) {
    const int64_t lp = z.padded(), n = z.elements;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t l = 0; l < lp; ++l) {
            const int64_t t = z.symbols == 1 || l >= z.snapshots ? 0 : l;
            const float fr = s.field[2 * t * n + i], fi = s.field[2 * t * n + n + i];
            const float cr = s.code_re[i * lp + l], ci = s.code_im[i * lp + l];
            s.coded_re[i * lp + l] = cr * fr - ci * fi;
            s.coded_im[i * lp + l] = cr * fi + ci * fr;
        }
}

// H = sqrt(k/(k+1)) b a^H + W / sqrt(2 M (k+1)), in place of W, k the Rician factor, b of half a wavelength's spacing. Even and odd entries share one loop: even = (re, -im), odd = (im, re) of a.
template <bool spherical>
void line_of_sight(const Scratch& s, float* channel, const float* x, const float* y, const float* los_direction, float rician, const Sizes& z) {
    steer<spherical>(s.steer_re, s.steer_im, x, y, los_direction, z.elements);
    for (int64_t i = 0; i < z.elements; ++i) {
        s.even[2 * i] = s.odd[2 * i + 1] = s.steer_re[i];
        s.odd[2 * i] = s.steer_im[i];
        s.even[2 * i + 1] = -s.steer_im[i];
    }
    const float sine = cosines(los_direction).first, antennas = float(z.antennas);
    const float weight = __builtin_sqrtf(rician / (rician + 1.0f) / antennas);
    const float scatter = __builtin_sqrtf(0.5f / (antennas * (rician + 1.0f)));
    for (int64_t m = 0; m < z.antennas; ++m) {
        float* row = channel + 2 * m * z.elements;
        const philox::Pair b = unit(2.0f * (float(m) - 0.5f * float(z.antennas - 1)) * sine);
        const float br = weight * b.first, bi = weight * b.second;
        for (int64_t j = 0; j < 2 * z.elements; ++j) row[j] = scatter * row[j] + (br * s.even[j] + bi * s.odd[j]);
    }
}

// R rows of H times the coded field: planar (R, 2, L).
template <int R> void rows(float* clean, const float* channel, const float* coded_re, const float* coded_im, int64_t n, int64_t lp) {
    for (int64_t l = 0; l < lp; l += W) {
        V re[R] = {}, im[R] = {};
        for (int64_t i = 0; i < n; ++i) {
            const V xr = load(coded_re + i * lp + l), xi = load(coded_im + i * lp + l);
            for (int r = 0; r < R; ++r) {
                const float hr = channel[2 * (r * n + i)], hi = channel[2 * (r * n + i) + 1];
                re[r] += hr * xr;
                re[r] -= hi * xi;
                im[r] += hr * xi;
                im[r] += hi * xr;
            }
        }
        for (int r = 0; r < R; ++r) {
            store(clean + 2 * r * lp + l, re[r]);
            store(clean + (2 * r + 1) * lp + l, im[r]);
        }
    }
}

inline void receive(const Scratch& s, const float* channel, const Sizes& z) {
    constexpr int R = RIS_LEVEL_NUMBER == 2 ? 8 : 4;
    const int64_t lp = z.padded(), n = z.elements;
    int64_t m = 0;
    for (; m + R <= z.antennas; m += R) rows<R>(s.clean + 2 * m * lp, channel + 2 * m * n, s.coded_re, s.coded_im, n, lp);
    for (; m < z.antennas; ++m) rows<1>(s.clean + 2 * m * lp, channel + 2 * m * n, s.coded_re, s.coded_im, n, lp);
}

// Snapshots (L, M, 2) from the planar (M, 2, L) clean ones and the noise.
inline void add_noise(const Scratch& s, float* snapshots, float snr_db, const Sizes& z) {
    const int64_t lp = z.padded(), values = 2 * z.snapshots * z.antennas;
    double power = 0;
    for (int64_t m = 0; m < z.antennas; ++m)
        for (int64_t l = 0; l < z.snapshots; ++l)
            for (int64_t part = 0; part < 2; ++part) {
                const float value = s.clean[(2 * m + part) * lp + l];
                snapshots[2 * (l * z.antennas + m) + part] = value;
                power += double(value) * value;
            }
    const double variance = power / double(values) * __builtin_pow(10.0, -0.1 * double(snr_db));  // of one part
    const float deviation = __builtin_sqrtf(float(variance));
    for (int64_t i = 0; i < values; ++i) snapshots[i] += deviation * s.noise[i];
}

}  // namespace scenes
}  // namespace RIS_NS

// channel (B, M, N, 2), snapshots (B, L, M, 2), factor (B, N, K, 2) from index (B), positions (2, N), codes (L, N, 2), or (B, L, N, 2)
// where own_codes is 1, source (B, K, 3), amplitude (B, S, K, 2), power (B, K), los_direction (B, 3), Rician factor (B), the channel if it is given and not drawn, snr in dB (B).
// Returns 0, or 1 if there was no memory for scratch.
RIS_EXPORT(int, scenes)
(float* channel, float* snapshots, float* factor, const int64_t* index, const float* positions, const float* codes,
 const float* source, const float* amplitude, const float* power, const float* los_direction, const float* rician, const float* given, const float* snr_db, int64_t batch, int64_t antennas, int64_t elements, int64_t n_snapshots, int64_t n_sources, int64_t symbols,
 int64_t seed, int64_t channel_stream, int64_t noise_stream, int64_t spherical, int64_t own_codes) {
    using namespace RIS_NS;
    const scenes::Sizes z{antennas, elements, n_snapshots, n_sources, symbols};
    const float *x = positions, *y = positions + elements;
    const int64_t h = 2 * antennas * elements, v = 2 * n_snapshots * antennas;
    int failed = 0;
#pragma omp parallel if (batch > 4)
    {
        const scenes::Scratch s(z);
        if (s.block && !own_codes) scenes::transpose_codes(s, codes, z);
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < batch; ++b) {
            if (!s.block) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            if (own_codes) scenes::transpose_codes(s, codes + 2 * b * n_snapshots * elements, z);
            float *H = channel + b * h, *S = factor + 2 * b * elements * n_sources;
            const float *q = source + 3 * b * n_sources, *g = amplitude + 2 * b * symbols * n_sources, *p = power + b * n_sources;
            if (given) std::memcpy(H, given + b * h, size_t(h) * sizeof(float));
            else philox::fill_row<philox::normal_block>(H, 0, (h + 3) / 4, h, uint32_t(channel_stream), uint64_t(index[b]), uint64_t(seed));
            philox::fill_row<philox::normal_block>(s.noise, 0, (v + 3) / 4, v, uint32_t(noise_stream), uint64_t(index[b]), uint64_t(seed));
            if (spherical) {
                scenes::sources<true>(s, S, x, y, q, g, p, z);
                if (!given) scenes::line_of_sight<true>(s, H, x, y, los_direction + 3 * b, rician[b], z);
            } else {
                scenes::sources<false>(s, S, x, y, q, g, p, z);
                if (!given) scenes::line_of_sight<false>(s, H, x, y, los_direction + 3 * b, rician[b], z);
            }
            scenes::encode(s, z);
            scenes::receive(s, H, z);
            scenes::add_noise(s, snapshots + b * v, snr_db[b], z);
        }
    }
    return failed;
}
