// The fused step on flat float32 buffers: formulas in reference.py, slots and tables in layout.py.
//
// Work is cut into chunks that never cross a tensor; every chunk leaves its sums in an array and one thread adds them
// in order, so the bits do not depend on the number of threads. Sums run in float32 lanes over at most 1,024 elements
// and in float64 from there. A chunk whose sum of squares is not finite is read again in float64 and counted, so a
// gradient that merely overflows when squared is told apart from one that is not finite.
#include <cmath>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "native/simd.hpp"

namespace RIS_NS {
namespace fused_step {

constexpr int64_t ROW = 64, BLOCK = 1024, PARALLEL = 32768;  // PARALLEL: elements under which one thread is faster
constexpr int LANES = lanes<float>;
using V = Vec<float>;
enum Hyper { MAX_NORM, EMA_DECAY, EMA_WARMUP, TELEMETRY, DYNAMIC, GROWTH_INTERVAL, GROUPS = 8 };
enum Group { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, SIGN, DECOUPLED, GROUP_SLOTS = 8 };
enum State {
    ATTEMPTED, APPLIED, SKIPPED, CLIPPED, NORM, CLIP, SCALE, GROWTH, EXTERNAL_SCALE, EXTERNAL_BAD, SKIP, EMA_WEIGHT,
    FIRST_BAD, SUMSQ, BAD
};
enum Coefficient { C_GRADIENT, C_DECAY, C_L2, C_MOMENT1, C_BETA2, C_MOMENT2, C_STEP, C_ROOT, C_EPS, C_SLOTS = 12 };

struct Segment { int64_t first, chunks, group, start, padded; };
struct Chunk { int64_t start, length, segment; };
struct Sums { double a, b; };
inline Sums operator+(Sums x, Sums y) { return {x.a + y.a, x.b + y.b}; }

// Where a chunk's gradient is: `whole` elements, a multiple of ROW, at `at`, and a last row, of a tensor that is not padded, in `tail`.
struct Gradient {
    float* at;
    int64_t whole, rest;
    alignas(64) float tail[ROW];

    // sources: address and number of elements of each tensor's own gradient, or null for the flat buffer.
    Gradient(float* flat, const int64_t* sources, int64_t tensors, const Chunk& chunk, const Segment* segments)
        : at(flat + chunk.start), whole(chunk.length), rest(0) {
        if (!sources) return;
        const int64_t offset = chunk.start - segments[chunk.segment].start, left = sources[tensors + chunk.segment] - offset;
        at = reinterpret_cast<float*>(sources[chunk.segment]) + offset;
        if (left >= chunk.length) return;
        whole = left / ROW * ROW;
        rest = left - whole;
        std::memset(tail, 0, sizeof(tail));
        std::memcpy(tail, at + whole, size_t(rest) * sizeof(float));
    }
};

inline V square_root(V x) {  // GCC has no operator for it
#if RIS_LEVEL_NUMBER == 2
    return V(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(x)));  // the plain one warns in GCC 12
#elif RIS_LEVEL_NUMBER == 1
    return V(_mm256_sqrt_ps(__m256(x)));
#elif defined(__x86_64__)
    return V(_mm_sqrt_ps(__m128(x)));
#else
    for (int j = 0; j < LANES; ++j) x[j] = std::sqrt(x[j]);
    return x;
#endif
}

inline double add_lanes(V x) {
    double total = 0;
    for (int j = 0; j < LANES; ++j) total += double(x[j]);
    return total;
}

// Sum of squares and non-finite count of `length` elements, a multiple of ROW.
inline Sums squares(const float* g, int64_t length) {
    double total = 0;
    for (int64_t begin = 0; begin < length; begin += BLOCK) {
        const int64_t end = begin + BLOCK < length ? begin + BLOCK : length;
        V chain[4] = {};  // four additions in flight; a row is at least one round of them
        for (int64_t i = begin; i < end; i += 4 * LANES)
            for (int k = 0; k < 4; ++k) {
                const V x = load(g + i + k * LANES);
                chain[k] += x * x;
            }
        total += add_lanes((chain[0] + chain[1]) + (chain[2] + chain[3]));
    }
    if (std::isfinite(total)) return {total, 0.0};
    double bad = 0;
    total = 0;
    for (int64_t i = 0; i < length; ++i) {
        total += double(g[i]) * double(g[i]);
        bad += !std::isfinite(g[i]);
    }
    return {total, bad};
}

// Adds the chunks' sums per tensor and over all tensors, in order.
inline void add_chunks(const Segment* segments, int64_t tensors, const Sums* partial, Sums* sums, double* state) {
    state[SUMSQ] = state[BAD] = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        Sums total = {0, 0};
        for (int64_t c = segments[t].first; c < segments[t].first + segments[t].chunks; ++c) {
            total.a += partial[c].a;
            total.b += partial[c].b;
        }
        sums[t] = total;
        state[SUMSQ] += total.a;
        state[BAD] += total.b;
    }
}

inline void measure(const float* grad, const int64_t* sources, const Chunk* chunks, int64_t count, const Segment* segments,
                    int64_t tensors, Sums* partial, Sums* sums, double* state, bool parallel) {
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t c = 0; c < count; ++c) {
        const Gradient g(const_cast<float*>(grad), sources, tensors, chunks[c], segments);
        partial[c] = squares(g.at, g.whole);
        if (g.rest) partial[c] = partial[c] + squares(g.tail, ROW);
    }
    add_chunks(segments, tensors, partial, sums, state);
}

inline void count_step(const double* hyper, const Sums* sums, int64_t tensors, double* s, double norm, bool skip, double clip) {
    s[ATTEMPTED] += 1;
    s[APPLIED] += !skip;
    s[SKIPPED] += skip;
    s[CLIPPED] += !skip && clip < 1;
    s[NORM] = norm;
    s[CLIP] = clip;
    s[SKIP] = skip;
    if (skip) {
        s[FIRST_BAD] = -1;
        for (int64_t t = tensors - 1; t >= 0; --t)
            if (sums[t].b > 0) s[FIRST_BAD] = double(t);
    }
    double decay = hyper[EMA_DECAY];
    const double warm = (1 + s[APPLIED]) / (10 + s[APPLIED]);
    if (hyper[EMA_WARMUP] > 0 && warm < decay) decay = warm;
    s[EMA_WEIGHT] = 1 - decay;
    const double growth = skip ? 0 : s[GROWTH] + 1;
    const bool dynamic = hyper[DYNAMIC] > 0, grow = growth >= hyper[GROWTH_INTERVAL];
    if (dynamic) s[SCALE] *= skip ? 0.5 : grow ? 2.0 : 1.0;
    s[GROWTH] = dynamic && !grow ? growth : 0;
}

inline void coefficients_of(const double* group, double t, double gradient, float* row) {
    const bool decoupled = group[DECOUPLED] > 0;
    row[C_GRADIENT] = float(group[SIGN] * gradient);
    row[C_DECAY] = decoupled ? float(1 - group[LR] * group[WEIGHT_DECAY]) : 1.0f;
    row[C_L2] = decoupled ? 0.0f : float(group[WEIGHT_DECAY]);
    row[C_MOMENT1] = float(1 - group[BETA1]);
    row[C_BETA2] = float(group[BETA2]);
    row[C_MOMENT2] = float(1 - group[BETA2]);
    row[C_STEP] = float(group[LR] / (1 - std::pow(group[BETA1], t)));
    row[C_ROOT] = float(1 / std::sqrt(1 - std::pow(group[BETA2], t)));
    row[C_EPS] = float(group[EPS]);
}

inline void decide(const Segment* segments, int64_t tensors, const double* hyper, const Sums* sums, float* telemetry,
                   float* steps, float* coefficients, double* state) {
    const double scale = state[SCALE] * state[EXTERNAL_SCALE], norm = std::sqrt(state[SUMSQ]) / scale;
    const bool skip = state[BAD] + state[EXTERNAL_BAD] > 0 || !std::isfinite(norm);
    const double limit = hyper[MAX_NORM] / (norm + 1e-6), clip = limit > 1 ? 1 : limit;
    count_step(hyper, sums, tensors, state, norm, skip, clip);
    const float* same = nullptr;  // the last row written: tensors of one group and age share theirs
    double same_group = -1, same_step = -1;
    for (int64_t t = 0; t < tensors; ++t) {
        const bool live = segments[t].chunks > 0;
        telemetry[4 * t] = float(std::sqrt(sums[t].a) / scale);
        telemetry[4 * t + 3] = float(sums[t].b);
        if (skip || !live) telemetry[4 * t + 2] = 0;
        else steps[t] += 1;
        const double step = steps[t] < 1 ? 1 : double(steps[t]);
        float* row = coefficients + C_SLOTS * t;
        if (same && double(segments[t].group) == same_group && step == same_step) std::memcpy(row, same, C_SLOTS * sizeof(float));
        else coefficients_of(hyper + GROUPS + GROUP_SLOTS * segments[t].group, step, clip / scale, row);
        same = row, same_group = double(segments[t].group), same_step = step;
    }
}

struct Streams { float *param, *grad, *exp_avg, *exp_avg_sq, *ema; };

// Updates `length` elements; returns sums of squares of the new weights and of the change.
template <bool EMA, bool CLEAR, bool NORMS>
inline Sums update(const Streams& s, int64_t length, const float* c, float average) {
    const float gradient = c[C_GRADIENT], decay = c[C_DECAY], l2 = c[C_L2], w1 = c[C_MOMENT1], b2 = c[C_BETA2];
    const float w2 = c[C_MOMENT2], step = c[C_STEP], root = c[C_ROOT], eps = c[C_EPS];
    Sums total = {0, 0};
    for (int64_t begin = 0; begin < length; begin += BLOCK) {
        const int64_t end = begin + BLOCK < length ? begin + BLOCK : length;
        V weight = {}, change = {};
        for (int64_t i = begin; i < end; i += LANES) {
            const V old = load(s.param + i), raw = load(s.grad + i) * gradient + l2 * old;
            V first = load(s.exp_avg + i), second = load(s.exp_avg_sq + i) * b2 + w2 * raw * raw;
            first += w1 * (raw - first);
            const V now = old * decay - step * first / (square_root(second) * root + eps);
            store(s.exp_avg + i, first);
            store(s.exp_avg_sq + i, second);
            store(s.param + i, now);
            if (EMA) {
                const V mean = load(s.ema + i);
                store(s.ema + i, mean + average * (now - mean));
            }
            if (CLEAR) store(s.grad + i, V{});
            if (NORMS) {
                weight += now * now;
                change += (now - old) * (now - old);
            }
        }
        if (NORMS) {
            total.a += add_lanes(weight);
            total.b += add_lanes(change);
        }
    }
    return total;
}

template <bool EMA, bool CLEAR, bool NORMS>
inline void apply_chunks(Streams s, const int64_t* sources, const Chunk* chunks, int64_t count, const Segment* segments, int64_t tensors,
                         Sums* partial, const float* coefficients, float average, bool parallel) {
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t c = 0; c < count; ++c) {
        Gradient g(s.grad, sources, tensors, chunks[c], segments);
        const float* row = coefficients + C_SLOTS * chunks[c].segment;
        const auto run = [&](float* grad, int64_t at, int64_t length) {
            const Streams here = {s.param + at, grad, s.exp_avg + at, s.exp_avg_sq + at, EMA ? s.ema + at : nullptr};
            return update<EMA, CLEAR, NORMS>(here, length, row, average);
        };
        partial[c] = run(g.at, chunks[c].start, g.whole);
        if (g.rest) partial[c] = partial[c] + run(g.tail, chunks[c].start + g.whole, ROW);
    }
}

using Apply = void (*)(Streams, const int64_t*, const Chunk*, int64_t, const Segment*, int64_t, Sums*, const float*, float, bool);
constexpr Apply APPLY[8] = {apply_chunks<0, 0, 0>, apply_chunks<0, 0, 1>, apply_chunks<0, 1, 0>, apply_chunks<0, 1, 1>,
                            apply_chunks<1, 0, 0>, apply_chunks<1, 0, 1>, apply_chunks<1, 1, 0>, apply_chunks<1, 1, 1>};

inline void write_norms(const Segment* segments, int64_t tensors, const Sums* partial, float* telemetry) {
    for (int64_t t = 0; t < tensors; ++t) {
        if (segments[t].chunks == 0) continue;
        Sums total = {0, 0};
        for (int64_t c = segments[t].first; c < segments[t].first + segments[t].chunks; ++c) {
            total.a += partial[c].a;
            total.b += partial[c].b;
        }
        telemetry[4 * t + 1] = float(std::sqrt(total.a));
        telemetry[4 * t + 2] = float(std::sqrt(total.b));
    }
}

inline float widen(float x) { return x; }
inline float widen(uint16_t bits) {  // bfloat16
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
}

template <class T>
inline void add_gradient(const T* from, float* to, int64_t length, float scale, bool overwrite) {
    if (overwrite)
        for (int64_t i = 0; i < length; ++i) to[i] = scale * widen(from[i]);
    else
        for (int64_t i = 0; i < length; ++i) to[i] += scale * widen(from[i]);
}

}  // namespace fused_step
}  // namespace RIS_NS

using namespace RIS_NS::fused_step;

// grad (P), or sources (2, T): addresses and lengths of gradients elsewhere; chunks (C, 3); segments (T, 5); partial (C, 2);
// sums (T, 2); state (16). Writes partial, sums and totals.
RIS_EXPORT(void, fused_step_measure_from)
(const float* grad, const int64_t* sources, int64_t elements, const Chunk* chunks, int64_t count, const Segment* segments,
 int64_t tensors, Sums* partial, Sums* sums, double* state) {
    measure(grad, sources, chunks, count, segments, tensors, partial, sums, state, elements > PARALLEL);
}

// hyper (8 + 8 G); telemetry (T, 4); steps (T); coefficients (T, 12). Reads the totals in state.
RIS_EXPORT(void, fused_step_decide)
(const Segment* segments, int64_t tensors, const double* hyper, const Sums* sums, float* telemetry, float* steps,
 float* coefficients, double* state) {
    decide(segments, tensors, hyper, sums, telemetry, steps, coefficients, state);
}

// Pass two over P elements; ema may be null; sources as above, or null: with them `clear` must be 0.
RIS_EXPORT(void, fused_step_apply_from)
(float* param, float* grad, float* exp_avg, float* exp_avg_sq, float* ema, const int64_t* sources, int64_t elements, const Chunk* chunks,
 int64_t count, const Segment* segments, int64_t tensors, const double* hyper, Sums* partial, float* telemetry,
 const float* coefficients, const double* state, int clear) {
    const bool parallel = elements > PARALLEL;
    if (state[SKIP] > 0) {
        if (!clear) return;
#pragma omp parallel for schedule(static) if (parallel)
        for (int64_t c = 0; c < count; ++c) std::memset(grad + chunks[c].start, 0, size_t(chunks[c].length) * sizeof(float));
        return;
    }
    const bool norms = hyper[TELEMETRY] > 0;
    const Apply run = APPLY[4 * (ema != nullptr) + 2 * (clear != 0) + norms];
    run({param, grad, exp_avg, exp_avg_sq, ema}, sources, chunks, count, segments, tensors, partial, coefficients, float(state[EMA_WEIGHT]),
        parallel);
    if (norms) write_norms(segments, tensors, partial, telemetry);
}

// grad <- (0 or grad) + scale * source, chunk by chunk; sources[t] float32 or bfloat16 (half[t] != 0) with numels[t]
// elements. With `norm` also what fused_step_measure_from does, while the chunk is at hand.
RIS_EXPORT(void, fused_step_accumulate)
(const void* const* sources, const int64_t* numels, const int32_t* half, float* grad, int64_t elements,
 const Chunk* chunks, int64_t count, const Segment* segments, int64_t tensors, Sums* partial, Sums* sums, double* state,
 float scale, int overwrite, int norm) {
#pragma omp parallel for schedule(static) if (elements > PARALLEL)
    for (int64_t c = 0; c < count; ++c) {
        const int64_t t = chunks[c].segment, offset = chunks[c].start - segments[t].start;
        const int64_t left = numels[t] - offset, length = left < chunks[c].length ? left : chunks[c].length;
        float* to = grad + chunks[c].start;
        if (half[t]) add_gradient(static_cast<const uint16_t*>(sources[t]) + offset, to, length, scale, overwrite != 0);
        else add_gradient(static_cast<const float*>(sources[t]) + offset, to, length, scale, overwrite != 0);
        if (norm) partial[c] = squares(to, chunks[c].length);
    }
    if (norm) add_chunks(segments, tensors, partial, sums, state);
}
