/* avx512.h - AVX-512 (F, BW, DQ, VL) for the files that use it: the processor's intrinsics, or plain
 * C when BD_AVX512_EMULATED is defined. Code stands between AVX512_BEGIN and AVX512_END, under
 * #if BD_AVX512. */
#ifndef BITDELTA_AVX512_H_
#define BITDELTA_AVX512_H_

#include <stdint.h>

#include "bitdelta.h"

#define BD_PRAGMA(text) BD_PRAGMA_TEXT(text)
#define BD_PRAGMA_TEXT(text) _Pragma(#text)

#if defined(BD_AVX512_EMULATED)

#include "avx512_emulation.h"
#define BD_AVX512 1
#define AVX512_BEGIN
#define AVX512_END
#define INLINE static __attribute__((unused))
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

#if BD_AVX512
AVX512_BEGIN

/* Lanes of a register whose first column has n_left columns from it to the row's end. */
INLINE __mmask16
tail_mask(int64_t n_left)
{
    return (__mmask16)(n_left >= 16 ? 0xFFFFu : n_left <= 0 ? 0u : (1u << n_left) - 1u);
}

/* Sixteen values of any dtype as fp32, 0 where the mask is. */
INLINE __m512
load_masked(const void *data, bd_dtype dtype, int64_t index, __mmask16 mask)
{
    if (dtype == BD_F32) {
        return _mm512_maskz_loadu_ps(mask, (const float *)data + index);
    }
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)data + index);
    if (dtype == BD_F16) {
        return _mm512_cvtph_ps(half);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512_END
#endif

#endif /* BITDELTA_AVX512_H_ */
