// Included before every source (CMakeLists.txt). From glibc 2.29 on the linker gives pow and exp a newer version, which
// differs only in how errno is set, and a library that asks for it does not load on an older system. The first version
// is in every glibc of x86-64. Other functions have no version beyond 2.28; tests/kernels/test_native.py looks.
#pragma once
#include <cstdlib>  // says whether this is glibc

#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver pow, pow@GLIBC_2.2.5");
__asm__(".symver exp, exp@GLIBC_2.2.5");
#endif
