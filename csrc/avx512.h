/* avx512.h - AVX-512 (F, BW, DQ, VL) for the files that use it: the processor's intrinsics, or plain
 * C when BD_AVX512_EMULATED is defined. Code stands between AVX512_BEGIN and AVX512_END, under
 * #if BD_AVX512. */
#ifndef BITDELTA_AVX512_H_
#define BITDELTA_AVX512_H_

#define BD_PRAGMA(text) BD_PRAGMA_TEXT(text)
#define BD_PRAGMA_TEXT(text) _Pragma(#text)

#if defined(BD_AVX512_EMULATED)

#include "avx512_emulation.h"
#define BD_AVX512 1
#define AVX512_BEGIN
#define AVX512_END
#define INLINE static
#define UNROLL(n)

#elif defined(__x86_64__)

#include <immintrin.h>
#define BD_AVX512 1
#define AVX512_TARGET target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#if defined(__clang__)
#define AVX512_BEGIN \
    BD_PRAGMA(clang attribute push(__attribute__((AVX512_TARGET)), apply_to = function))
#define AVX512_END BD_PRAGMA(clang attribute pop)
#else
#define AVX512_BEGIN BD_PRAGMA(GCC push_options) BD_PRAGMA(GCC AVX512_TARGET)
#define AVX512_END BD_PRAGMA(GCC pop_options)
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL(n) BD_PRAGMA(GCC unroll n)

#else
#define BD_AVX512 0
#endif

#endif /* BITDELTA_AVX512_H_ */
