/* avx2.h - AVX2 (with FMA, F16C) for the files that use it: code stands between AVX2_BEGIN and AVX2_END,
 * under #if defined(__x86_64__). Private. */
#ifndef BITDELTA_AVX2_H_
#define BITDELTA_AVX2_H_

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>

#include "bitdelta.h"

#define BD_AVX2_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define AVX2_BEGIN  \
    BD_AVX2_PRAGMA( \
        clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function))
#define AVX2_END BD_AVX2_PRAGMA(clang attribute pop)
#else
#define AVX2_BEGIN BD_AVX2_PRAGMA(GCC push_options) BD_AVX2_PRAGMA(GCC target("avx2,fma,f16c"))
#define AVX2_END BD_AVX2_PRAGMA(GCC pop_options)
#endif

#define INLINE static inline __attribute__((always_inline))

AVX2_BEGIN

/* Eight values of any dtype as fp32. */
INLINE __m256
load_eight(const void *data, bd_dtype dtype, int64_t index)
{
    if (dtype == BD_F32) {
        return _mm256_loadu_ps((const float *)data + index);
    }
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)data + index));
    if (dtype == BD_F16) {
        return _mm256_cvtph_ps(half);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2_END

#endif /* __x86_64__ */

#endif /* BITDELTA_AVX2_H_ */
