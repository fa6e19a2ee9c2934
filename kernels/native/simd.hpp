// What every native.cpp shares: the per-instruction-set name, the export macro and portable vectors.
//
// Each native.cpp is compiled once per instruction set. RIS_NS is a namespace of that build's own: put everything in
// it, because two builds of one inline function under one name would be merged by the linker into whichever came
// first, and a baseline machine would then run AVX-512 code. For the same reason use no standard containers here.
#pragma once
#include <cstdint>
#include <cstring>

#define RIS_JOIN2(a, b) a##_##b
#define RIS_JOIN(a, b) RIS_JOIN2(a, b)
#define RIS_NS RIS_JOIN(ris, RIS_LEVEL)
// RIS_EXPORT(int, cov_nmse_f32)(args) { ... } becomes the C function cov_nmse_f32_avx512 and so on.
#define RIS_EXPORT(type, name) extern "C" __attribute__((visibility("default"))) type RIS_JOIN(name, RIS_LEVEL)

#if RIS_LEVEL_NUMBER == 2
#define RIS_VECTOR_BYTES 64
#elif RIS_LEVEL_NUMBER == 1
#define RIS_VECTOR_BYTES 32
#else
#define RIS_VECTOR_BYTES 16
#endif

namespace RIS_NS {

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(RIS_VECTOR_BYTES))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(RIS_VECTOR_BYTES))); };
template <class T> using Vec = typename VectorOf<T>::type;  // GCC/Clang vector: + - * / work lane by lane
template <class T> constexpr int lanes = RIS_VECTOR_BYTES / int(sizeof(T));

template <class T> inline Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));  // unaligned load
    return v;
}
template <class T> inline void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof(v)); }
template <class T> inline Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> inline T sum(Vec<T> v) {  // fixed order: the same bits everywhere at one level
    T s = 0;
    for (int i = 0; i < lanes<T>; ++i) s += v[i];
    return s;
}

}  // namespace RIS_NS
