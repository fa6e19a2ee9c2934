// Fills rows with counter-based uniforms or normals; the mapping is that of reference.py.
#include "philox/philox.hpp"

namespace RIS_NS {
namespace philox {

constexpr int64_t CHUNK = 1024;  // blocks a thread takes at a time

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

// Blocks [begin, end) of one row; a last block that is wanted only in part goes through a small buffer.
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

template <void (*block)(float*, const Words&)>
void fill(float* out, const int64_t* index, int64_t rows, int64_t count, uint64_t seed, uint32_t stream) {
    const int64_t blocks = (count + 3) / 4, chunks = (blocks + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (rows * blocks > CHUNK)
    for (int64_t task = 0; task < rows * chunks; ++task) {
        const int64_t row = task / chunks, begin = task % chunks * CHUNK;
        const int64_t end = begin + CHUNK < blocks ? begin + CHUNK : blocks;
        fill_row<block>(out + row * count, begin, end, count, stream, uint64_t(index[row]), seed);
    }
}

}  // namespace philox
}  // namespace RIS_NS

// out (rows, count); index (rows); seed and stream as unsigned bits.
RIS_EXPORT(void, philox_uniform)
(float* out, const int64_t* index, int64_t rows, int64_t count, int64_t seed, int64_t stream) {
    using namespace RIS_NS::philox;
    fill<uniform_block>(out, index, rows, count, uint64_t(seed), uint32_t(stream));
}

RIS_EXPORT(void, philox_normal)
(float* out, const int64_t* index, int64_t rows, int64_t count, int64_t seed, int64_t stream) {
    using namespace RIS_NS::philox;
    fill<normal_block>(out, index, rows, count, uint64_t(seed), uint32_t(stream));
}
