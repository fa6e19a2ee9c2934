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

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T> inline Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));  // unaligned load
    return v;
}
template <class T> inline void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof(v)); }
template <class T> inline Vec<T> splat(T x) { return x - Vec<T>{}; }
// Sum of the lanes by halving: a fixed order, the same bits everywhere at one level.
template <class T, int width> struct Halves {
    typedef T type __attribute__((vector_size(width * sizeof(T))));
    static inline T sum(const type& v) {
        typename Halves<T, width / 2>::type low, high;
        std::memcpy(&low, &v, sizeof(low));
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
        return Halves<T, width / 2>::sum(low + high);
    }
};
template <class T> struct Halves<T, 1> {
    typedef T type;
    static inline T sum(const type& v) { return v; }
};
template <class T> inline T sum(const Vec<T>& v) {
    typename Halves<T, lanes<T>>::type whole;
    std::memcpy(&whole, &v, sizeof(v));
    return Halves<T, lanes<T>>::sum(whole);
}

// Splits interleaved pairs (re, im, re, im, ...) of two vectors into a vector of re and one of im.
#if defined(__clang__)
template <int... I> struct Ints {};
template <int n, int... I> struct Count : Count<n - 1, n - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Ints<I...> type; };
template <class T, int... I> inline void split(const Vec<T>& a, const Vec<T>& b, Vec<T>& re, Vec<T>& im, Ints<I...>) {
    re = __builtin_shufflevector(a, b, (2 * I)...);
    im = __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <class T> inline void split(const Vec<T>& a, const Vec<T>& b, Vec<T>& re, Vec<T>& im) {
    split<T>(a, b, re, im, typename Count<lanes<T>>::type());
}
#else
template <int bytes> struct IntOf;
template <> struct IntOf<4> { typedef int32_t type; };
template <> struct IntOf<8> { typedef int64_t type; };
template <class T> inline void split(const Vec<T>& a, const Vec<T>& b, Vec<T>& re, Vec<T>& im) {
    typedef typename IntOf<sizeof(T)>::type Index;
    typedef Index Mask __attribute__((vector_size(RIS_VECTOR_BYTES)));
    Mask even, odd;
    for (int i = 0; i < lanes<T>; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;  // folded to constants
    re = __builtin_shuffle(a, b, even);
    im = __builtin_shuffle(a, b, odd);
}
#endif

}  // namespace RIS_NS
