// Philox4x32-10 and its uniforms and normals for one block, written so that a loop over blocks vectorises.
//
// Everything is branch-free integer and single-precision arithmetic: no library call, so no vector math library is
// needed. madd pins down where a product and a sum are fused; a value then has the same bits in the vector body of a
// loop and in its scalar tail, whatever the count.
#pragma once
#include "native/simd.hpp"

namespace RIS_NS {
namespace philox {

struct Words {
    uint32_t w0, w1, w2, w3;
};
struct Pair {
    float first, second;
};

inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

// Salmon et al., SC 2011, section 3.3; counter (block, stream, index low, index high), key = seed low, seed high.
inline __attribute__((always_inline)) Words words(uint32_t block, uint32_t stream, uint64_t index, uint64_t seed) {
    uint32_t c0 = block, c1 = stream, c2 = uint32_t(index), c3 = uint32_t(index >> 32);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

inline int ticks(uint32_t word) { return int(word >> 8) + 1; }  // uniform = ticks / 2^24, in (0, 1]

// sqrt(-2 ln(ticks / 2^24)), within 1 ulp. The mantissa is taken to [sqrt(1/2), sqrt(2)), so ln has no cancellation
// near 1; ln(1 + f) = f - f^2/2 + f^3 q(f) with q minimax in the relative error (6e-9).
inline float radius(int tick) {
    const uint32_t bits = bits_of(float(tick));
    const int exponent = int(bits - 0x3F3504F3u) >> 23;
    const float f = float_of(bits - (uint32_t(exponent) << 23)) - 1.0f, f2 = f * f, e = float(exponent - 24);
    float q = -0.07634503825928572f;
    q = madd(q, f, 0.12761578850076574f);
    q = madd(q, f, -0.13160179895629298f);
    q = madd(q, f, 0.14201757140973303f);
    q = madd(q, f, -0.16623357455511995f);
    q = madd(q, f, 0.20001226922882104f);
    q = madd(q, f, -0.25000821035016474f);
    q = madd(q, f, 0.3333333170832008f);
    // ln 2 in two parts, the first short enough to be exact times e
    const float small = madd(e, 1.428606765330187e-06f, madd(q * f, f2, -0.5f * f2));
    return __builtin_sqrtf(-2.0f * madd(e, 0.693145751953125f, small + f));
}

// cos and sin of (quarter + t) quarter turns, |t| <= 1/2.
inline __attribute__((always_inline)) Pair direction(int quarter, float t) {
    const float t2 = t * t;
    float s = madd(-0.004601658182648317f, t2, 0.07968003282320685f);
    s = madd(madd(s, t2, -0.6459634602305683f), t2, 1.5707963217079541f) * t;
    float c = madd(0.0009034159658328494f, t2, -0.020860000074886056f);
    c = madd(madd(madd(c, t2, 0.25366920329074144f), t2, -1.2337005417391813f), t2, 1.0f);
    const bool odd = quarter & 1;
    const uint32_t cosine = bits_of(odd ? s : c) ^ ((uint32_t(quarter + 1) & 2u) << 30);
    const uint32_t sine = bits_of(odd ? c : s) ^ ((uint32_t(quarter) & 2u) << 30);
    return {float_of(cosine), float_of(sine)};
}

// cos and sin of 2 pi ticks / 2^24. The quarter turn is split off in integers, so nothing is lost by the reduction.
inline Pair turn(int tick) {
    const int quarter = (tick + (1 << 21)) >> 22;
    return direction(quarter, float(tick - (quarter << 22)) * 0x1p-22f);
}

// Box-Muller: two words to two normals. A uniform of 1 counts as the one before it, so that no pair is exactly zero.
inline Pair normals(uint32_t first, uint32_t second) {
    const int tick = ticks(first);
    const float r = radius(tick < 1 << 24 ? tick : (1 << 24) - 1);
    const Pair unit = turn(ticks(second));
    return {r * unit.first, r * unit.second};
}

inline __attribute__((always_inline)) void uniform_block(float* out, const Words& w) {
    out[0] = float(ticks(w.w0)) * 0x1p-24f;
    out[1] = float(ticks(w.w1)) * 0x1p-24f;
    out[2] = float(ticks(w.w2)) * 0x1p-24f;
    out[3] = float(ticks(w.w3)) * 0x1p-24f;
}

inline __attribute__((always_inline)) void normal_block(float* out, const Words& w) {
    const Pair a = normals(w.w0, w.w1), b = normals(w.w2, w.w3);
    out[0] = a.first;
    out[1] = a.second;
    out[2] = b.first;
    out[3] = b.second;
}

// Blocks [begin, end) of one row of `count` values; a last block wanted only in part goes through a small buffer.
template <void (*block)(float*, const Words&)>
void fill_row(float* out, int64_t begin, int64_t end, int64_t count, uint32_t stream, uint64_t index, uint64_t seed) {
    const int64_t whole = end * 4 <= count ? end : end - 1;
    for (int64_t j = begin; j < whole; ++j) block(out + 4 * j, words(uint32_t(j), stream, index, seed));
    if (whole < end) {
        float last[4];
        block(last, words(uint32_t(whole), stream, index, seed));
        for (int64_t i = 4 * whole; i < count; ++i) out[i] = last[i - 4 * whole];
    }
}

}  // namespace philox
}  // namespace RIS_NS
