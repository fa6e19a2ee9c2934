// Tells the loader which instruction sets this processor has; compiled for the baseline only.
#if defined(_OPENMP)
#include <omp.h>
#endif

extern "C" {

// 0 baseline, 1 AVX2 + FMA, 2 AVX-512 (F, DQ, BW, VL).
__attribute__((visibility("default"))) int ris_simd_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 2 : avx2 ? 1 : 0;
#else
    return 0;
#endif
}

// SHA-256 of the sources that this library was built from.
__attribute__((visibility("default"))) const char* ris_source_hash() { return RIS_SOURCE_HASH; }

// Threads that a parallel region would use now; 1 where the library was built without OpenMP.
__attribute__((visibility("default"))) int ris_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}
}
