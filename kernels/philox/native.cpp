// Fills rows with counter-based uniforms or normals; the mapping is that of reference.py.
#include "philox/philox.hpp"

namespace RIS_NS {
namespace philox {

constexpr int64_t CHUNK = 1024;  // blocks a thread takes at a time; below sixteen of them threads cost more than they give

template <void (*block)(float*, const Words&)>
void fill(float* out, const int64_t* index, int64_t rows, int64_t count, uint64_t seed, uint32_t stream) {
    const int64_t blocks = (count + 3) / 4, chunks = (blocks + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (rows * blocks > 16 * CHUNK)
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
