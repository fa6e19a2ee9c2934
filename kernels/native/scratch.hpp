// One aligned allocation of floats, cut into parts. Included once per instruction set, like simd.hpp.
#pragma once
#include <cstdlib>

#include "simd.hpp"

namespace RIS_NS {

// Hands out parts of one allocation, 64-byte aligned: first counts, then cuts.
struct Cutter {
    float* next = nullptr;
    int64_t total = 0;
    template <class T> void part(T*& where, int64_t size) {
        if (next) where = reinterpret_cast<T*>(next + total);
        total += round_up(size * int64_t(sizeof(T) / sizeof(float)), 16);
    }
};
// zeros: everything starts as 0, so that rows stay padded with zeros where nothing is written.
template <class Parts> float* allocate(Parts& parts, bool zeros = false) {
    Cutter counting;
    parts.cut(counting);
    const size_t bytes = size_t(counting.total + 16) * sizeof(float);
    float* block = static_cast<float*>(std::aligned_alloc(64, bytes));
    Cutter cutting{block, 0};
    if (block) parts.cut(cutting);
    if (block && zeros) std::memset(block, 0, bytes);
    return block;
}

}  // namespace RIS_NS
