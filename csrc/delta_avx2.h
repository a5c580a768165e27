/* delta_avx2.h - 32 columns in AVX2 registers, for delta_avx2.c and expand_avx2.c. Private.
 *
 * bf16 with bf16 needs no widening: an even column is its 32-bit pair shifted left, an odd one the
 * pair with the lower half cleared. The loops "of pairs" keep evens and odds in registers of their
 * own; the others hold columns in order. */
#ifndef BITDELTA_DELTA_AVX2_H_
#define BITDELTA_DELTA_AVX2_H_

#if defined(__x86_64__)

#include "avx2.h"
#include "kernels.h"

/* expand_avx2.c: entries of the table. */
void bd_expand_row_avx2(const void *base, bd_dtype dtype, const uint32_t *words,
                        int64_t plane_stride, int P, const float *row, int64_t row_stride,
                        const float *column, int64_t K, void *out, bd_dtype out_dtype,
                        int is_streamed);
void bd_to_float32_avx2(const void *data, bd_dtype dtype, int64_t n, float *out);

AVX2_BEGIN

INLINE void
load_line(const void *data, bd_dtype dtype, int64_t k, __m256 v[4])
{
    for (int i = 0; i < 4; i++) {
        v[i] = load_eight(data, dtype, k + 8 * i);
    }
}

/* 32 bf16 as evens 0 .. 14, odds 1 .. 15, evens 16 .. 30, odds 17 .. 31. */
INLINE void
load_pairs(const void *data, int64_t k, __m256 v[4])
{
    for (int i = 0; i < 2; i++) {
        __m256i pair = _mm256_loadu_si256((const __m256i *)((const uint16_t *)data + k + 16 * i));
        v[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        v[2 * i + 1] =
            _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int)0xFFFF0000u)));
    }
}

/* Sign bits of 0 where the word's bit is 1; first: the bit of lane 0, step: bits between lanes. */
INLINE __m256
sign_of_bits(uint32_t word, int first, int step)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i shift = _mm256_sub_epi32(_mm256_set1_epi32(31 - first),
                                     step == 2 ? _mm256_add_epi32(lane, lane) : lane);
    __m256i moved = _mm256_sllv_epi32(_mm256_set1_epi32((int)~word), shift);
    return _mm256_and_ps(_mm256_castsi256_ps(moved), _mm256_set1_ps(-0.0f));
}

/* s * scale of 8 of the 32 columns: the i-th register of a line, or of pairs. */
INLINE __m256
signed_scale(uint32_t word, int i, int has_pairs, __m256 scale)
{
    int first = has_pairs ? i / 2 * 16 + i % 2 : 8 * i;
    return _mm256_xor_ps(scale, sign_of_bits(word, first, has_pairs ? 2 : 1));
}

AVX2_END

#endif /* __x86_64__ */

#endif /* BITDELTA_DELTA_AVX2_H_ */
