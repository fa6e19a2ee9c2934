// One aligned allocation of floats, cut into parts. Included once per instruction set, like simd.hpp.
#pragma once
#include <cstdlib>

#include "simd.hpp"

namespace RIS_NS {

// Hands out parts of one allocation, 64-byte aligned: first counts, then cuts.
struct Cutter {
    float* next = nullptr;
    int64_t total = 0;
    void part(float*& where, int64_t size) {
        size = round_up(size, 16);
        if (next) where = next + total;
        total += size;
    }
};
template <class Parts> float* allocate(Parts& parts) {
    Cutter counting;
    parts.cut(counting);
    float* block = static_cast<float*>(std::aligned_alloc(64, size_t(counting.total + 16) * sizeof(float)));
    Cutter cutting{block, 0};
    if (block) parts.cut(cutting);
    return block;
}

}  // namespace RIS_NS
