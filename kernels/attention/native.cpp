// Self-attention of few tokens on a CPU: one head of one scene per task, all of it in the first-level cache.
//
// Letters: L tokens, d channels of a head. Rows of scratch are padded with zeros to whole vectors. Formulas are those
// of reference.py; heads are independent, so the bits do not depend on the number of threads. The softmax is computed
// again in the backward pass: for few tokens that costs less than reading it back.
#include <cmath>

#include "native/product.hpp"
#include "native/scratch.hpp"

namespace RIS_NS {
namespace attention {

struct BFloat16 {
    uint16_t bits;
};

inline float read(float x) { return x; }
inline double read(double x) { return x; }
inline float read(BFloat16 x) {
    const uint32_t wide = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
}
inline void write(float& to, float x) { to = x; }
inline void write(double& to, double x) { to = x; }
inline void write(BFloat16& to, float x) {  // rounds to nearest, ties to even; a NaN stays one
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof(wide));
    const uint32_t rounded = (wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16;
    to.bits = uint16_t(x == x ? rounded : 0x7FC0u);
}

struct Sizes {
    int64_t tokens, channels, heads;
};

template <class T> struct Scratch {
    int64_t wide_l, wide_d;  // padded lengths of rows over tokens and over channels
    float* block = nullptr;
    T *q, *k, *v, *g, *kt, *vt, *p, *s, *out;
    Sizes z;

    explicit Scratch(const Sizes& sizes)
        : wide_l(round_up(sizes.tokens, lanes<T>)), wide_d(round_up(sizes.channels, lanes<T>)), z(sizes) {
        block = allocate(*this, true);
    }
    ~Scratch() { std::free(block); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void cut(Cutter& c) {
        T **rows[] = {&q, &k, &v, &g, &out}, **turned[] = {&kt, &vt}, **squares[] = {&p, &s};
        for (T** each : rows) c.part(*each, z.tokens * wide_d);
        for (T** each : turned) c.part(*each, z.channels * wide_l);
        for (T** each : squares) c.part(*each, z.tokens * wide_l);
    }
};

// exp(x) for x <= 0; below -87 the least normal number; NaN stays NaN. 2^k e^f with |f| <= ln(2)/2, Taylor to f^7.
inline Vec<float> exponential(Vec<float> x) {
    typedef int32_t Ints __attribute__((vector_size(RIS_VECTOR_BYTES)));
    const Vec<float> least = splat(-87.0f), shift = splat(12582912.0f);  // 1.5 * 2^23 rounds to an integer
    x = x < least ? least : x;
    const Vec<float> k = (x * 1.44269504f + shift) - shift;
    const Vec<float> f = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    Vec<float> e = splat(1.0f / 5040);
    constexpr float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 8
    for (float term : terms) e = e * f + term;
    const Ints bits = (__builtin_convertvector(k, Ints) + 127) << 23;
    Vec<float> power;
    std::memcpy(&power, &bits, sizeof(power));
    return e * power;
}
inline Vec<double> exponential(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// Softmax of a padded row in place; the padding becomes zero.
template <class T> inline void softmax(T* row, int64_t tokens, int64_t wide) {
    constexpr int W = lanes<T>;
    T most = row[0], total = 0;
    for (int64_t j = 1; j < tokens; ++j) most = row[j] > most ? row[j] : most;
    for (int64_t at = 0; at < wide; at += W) store(row + at, exponential(load(row + at) - splat(most)));
    for (int64_t j = tokens; j < wide; ++j) row[j] = 0;
    Vec<T> sums = {};
    for (int64_t at = 0; at < wide; at += W) sums += load(row + at);
    total = sum<T>(sums);
    for (int64_t at = 0; at < wide; at += W) store(row + at, load(row + at) / splat(total));
}

// Rows of one head, `stride` apart, times `scale` into padded rows.
template <class T, class E>
inline void gather(T* rows, int64_t wide, const E* from, int64_t stride, int64_t tokens, int64_t channels, T scale) {
    for (int64_t l = 0; l < tokens; ++l)
        for (int64_t c = 0; c < channels; ++c) rows[l * wide + c] = scale * read(from[l * stride + c]);
}
template <class T> inline void transpose(T* to, int64_t wide, const T* rows, int64_t row, int64_t tokens, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t l = 0; l < tokens; ++l) to[c * wide + l] = rows[l * row + c];
}
template <class T, class E>
inline void scatter(E* to, int64_t stride, const T* rows, int64_t wide, int64_t tokens, int64_t channels, T scale) {
    for (int64_t l = 0; l < tokens; ++l)
        for (int64_t c = 0; c < channels; ++c) write(to[l * stride + c], scale * rows[l * wide + c]);
}

// Reads a head and leaves the softmax in p.
template <class T, class E> inline void weigh(const Scratch<T>& s, const E* qkv, T scale) {
    const int64_t l = s.z.tokens, d = s.z.channels, width = s.z.heads * d;
    gather(s.q, s.wide_d, qkv, 3 * width, l, d, scale);
    gather(s.k, s.wide_d, qkv + width, 3 * width, l, d, T(1));
    gather(s.v, s.wide_d, qkv + 2 * width, 3 * width, l, d, T(1));
    transpose(s.kt, s.wide_l, s.k, s.wide_d, l, d);
    product(s.p, l, s.wide_l, s.q, s.wide_d, int64_t(1), s.kt, d);
    for (int64_t i = 0; i < l; ++i) softmax(s.p + i * s.wide_l, l, s.wide_l);
}

template <class T, class E> inline void forward(const Scratch<T>& s, E* out, const E* qkv, T scale) {
    const int64_t l = s.z.tokens, d = s.z.channels;
    weigh(s, qkv, scale);
    product(s.out, l, s.wide_d, s.p, s.wide_l, int64_t(1), s.v, l);
    scatter(out, s.z.heads * d, s.out, s.wide_d, l, d, T(1));
}

// P o (dP - rowsum(P o dP)) in place of dP; the padding stays zero, since P is zero there.
template <class T> inline void through_softmax(T* slope, const T* p, int64_t wide) {
    Vec<T> sums = {};
    for (int64_t at = 0; at < wide; at += lanes<T>) sums += load(p + at) * load(slope + at);
    const Vec<T> mean = splat(sum<T>(sums));
    for (int64_t at = 0; at < wide; at += lanes<T>) store(slope + at, load(p + at) * (load(slope + at) - mean));
}

template <class T, class E> inline void backward(const Scratch<T>& s, E* out, const E* grad, const E* qkv, T scale) {
    const int64_t l = s.z.tokens, d = s.z.channels, width = s.z.heads * d;
    weigh(s, qkv, scale);
    gather(s.g, s.wide_d, grad, width, l, d, T(1));
    transpose(s.vt, s.wide_l, s.v, s.wide_d, l, d);
    product(s.s, l, s.wide_l, s.g, s.wide_d, int64_t(1), s.vt, d);
    for (int64_t i = 0; i < l; ++i) through_softmax(s.s + i * s.wide_l, s.p + i * s.wide_l, s.wide_l);
    product(s.out, l, s.wide_d, s.s, s.wide_l, int64_t(1), s.k, l);
    scatter(out, 3 * width, s.out, s.wide_d, l, d, scale);
    product(s.out, l, s.wide_d, s.s, int64_t(1), s.wide_l, s.q, l);  // q carries the scale
    scatter(out + width, 3 * width, s.out, s.wide_d, l, d, T(1));
    product(s.out, l, s.wide_d, s.p, int64_t(1), s.wide_l, s.g, l);
    scatter(out + 2 * width, 3 * width, s.out, s.wide_d, l, d, T(1));
}

// Every head of every scene; grad: of the result, or null for the forward pass. Returns 0, or 1 without memory.
template <class T, class E>
int run(E* out, const E* grad, const E* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
    const Sizes z{tokens, channels, heads};
    const T scale = T(1 / std::sqrt(double(channels)));
    const int64_t in_row = 3 * heads * channels, out_row = grad ? in_row : heads * channels;
    int failed = 0;
#pragma omp parallel if (batch * heads > 16)
    {
        const Scratch<T> s(z);
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < batch * heads; ++task) {
            if (!s.block) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            const int64_t scene = task / heads, at = task % heads * channels;
            const E* in = qkv + scene * tokens * in_row + at;
            E* to = out + scene * tokens * out_row + at;
            if (grad)
                backward(s, to, grad + scene * tokens * heads * channels + at, in, scale);
            else
                forward(s, to, in, scale);
        }
    }
    return failed;
}

}  // namespace attention
}  // namespace RIS_NS

// qkv (B, L, 3, H, d), contiguous; grad null: out (B, L, H, d) = attention; else grad (B, L, H, d), out that of qkv.
RIS_EXPORT(int, attention_f32)
(float* out, const float* grad, const float* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
    return RIS_NS::attention::run<float>(out, grad, qkv, batch, tokens, heads, channels);
}
RIS_EXPORT(int, attention_f64)
(double* out, const double* grad, const double* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
    return RIS_NS::attention::run<double>(out, grad, qkv, batch, tokens, heads, channels);
}
RIS_EXPORT(int, attention_bf16)
(void* out, const void* grad, const void* qkv, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
    using RIS_NS::attention::BFloat16;
    return RIS_NS::attention::run<float>(static_cast<BFloat16*>(out), static_cast<const BFloat16*>(grad),
                                         static_cast<const BFloat16*>(qkv), batch, tokens, heads, channels);
}
