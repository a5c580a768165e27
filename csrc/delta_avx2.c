/* delta_avx2.c - AVX2 inner loops of bd_extract, 32 columns, one word, at a time; a row's tail runs
 * through zero-padded copies. */
#include "delta_avx2.h"

#if defined(__x86_64__)

#include <math.h>
#include <stddef.h>

#include "checksum_words.h"
#include "dtype.h"
#include "integers.h"

AVX2_BEGIN

enum { PREFETCH_BYTES = 2048 }; /* ahead in each stream: 0.93 of read bandwidth, 0.86 without */

/* ---- 32 columns ------------------------------------------------------------------------------- */

INLINE __m256
clear_sign(__m256 value)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
}

/* All ones where the bit is 1. */
INLINE __m256i
is_positive(__m256 d)
{
    return _mm256_castps_si256(_mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_NLT_UQ));
}

INLINE uint32_t
pack_line(const __m256 d[4])
{
    __m256i lower = _mm256_packs_epi32(is_positive(d[0]), is_positive(d[1]));
    __m256i upper = _mm256_packs_epi32(is_positive(d[2]), is_positive(d[3]));
    __m256i bytes = _mm256_packs_epi16(lower, upper); /* by fours: 0 2 4 6 1 3 5 7 */
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return (uint32_t)_mm256_movemask_epi8(bytes);
}

INLINE uint32_t
pack_pairs(const __m256 d[4])
{
    __m256i lower = _mm256_blend_epi16(is_positive(d[0]), is_positive(d[1]), 0xAA);
    __m256i upper = _mm256_blend_epi16(is_positive(d[2]), is_positive(d[3]), 0xAA);
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(lower, upper), 0xD8);
    return (uint32_t)_mm256_movemask_epi8(bytes);
}

/* sums[0 .. 3] += |d[0]|, |d[1]|, then |d[2]|, |d[3]|: 16 fp64 lanes. */
INLINE void
add_lanes(const __m256 d[4], __m256d sums[4])
{
    for (int i = 0; i < 4; i++) {
        __m256 a = clear_sign(d[i]);
        __m256d *sum = sums + 2 * (i & 1);
        sum[0] = _mm256_add_pd(sum[0], _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
        sum[1] = _mm256_add_pd(sum[1], _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    }
}

/* Lane of the i-th fp64 of add_lanes. */
INLINE int
lane_of(int i, int has_pairs)
{
    return has_pairs ? i % 8 * 2 + i / 8 : i;
}

INLINE void
load_lanes(const double lanes[16], int has_pairs, __m256d sums[4])
{
    double ordered[16];
    for (int i = 0; i < 16; i++) {
        ordered[i] = lanes[lane_of(i, has_pairs)];
    }
    for (int i = 0; i < 4; i++) {
        sums[i] = _mm256_loadu_pd(ordered + 4 * i);
    }
}

INLINE void
store_lanes(const __m256d sums[4], int has_pairs, double lanes[16])
{
    double ordered[16];
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_pd(ordered + 4 * i, sums[i]);
    }
    for (int i = 0; i < 16; i++) {
        lanes[lane_of(i, has_pairs)] = ordered[i];
    }
}

/* Bits of n < 32 columns. */
INLINE uint32_t
tail_bits(int64_t n)
{
    return (1u << n) - 1u;
}

INLINE void
clear_words(uint32_t *words, int64_t line, int64_t n_lines)
{
    for (; line < n_lines; line++) {
        words[line * BD_STRIP_ROWS] = 0;
    }
}

/* ---- extraction ------------------------------------------------------------------------------- */

/* Both streams, beyond what the processor fetches by itself. */
INLINE void
prefetch_line(const void *data, bd_dtype dtype, int64_t k)
{
    const char *bytes = (const char *)data + k * (int64_t)bd_dtype_bytes(dtype) + PREFETCH_BYTES;
    _mm_prefetch(bytes, _MM_HINT_T0);
    if (dtype == BD_F32) {
        _mm_prefetch(bytes + 64, _MM_HINT_T0);
    }
}

INLINE uint32_t
extract_line(const void *base, bd_dtype base_dtype, const void *finetuned, bd_dtype finetuned_dtype,
             int64_t k, int has_pairs, float *residual, __m256d sums[4])
{
    __m256 b[4], d[4];
    if (has_pairs) {
        load_pairs(base, k, b);
        load_pairs(finetuned, k, d);
    } else {
        load_line(base, base_dtype, k, b);
        load_line(finetuned, finetuned_dtype, k, d);
    }
    for (int i = 0; i < 4; i++) {
        d[i] = _mm256_sub_ps(d[i], b[i]);
    }
    if (residual != NULL) {
        for (int i = 0; i < 4; i++) {
            _mm256_storeu_ps(residual + k + 8 * i, d[i]);
        }
    }
    add_lanes(d, sums);
    return has_pairs ? pack_pairs(d) : pack_line(d);
}

INLINE int
extract_typed(const void *base, bd_dtype base_dtype, const void *finetuned,
              bd_dtype finetuned_dtype, int64_t K, int has_pairs, float *residual, uint32_t *words,
              double lanes[16], bd_crc_chains *checksum)
{
    uint32_t unused[1], *word = words == NULL ? unused : words;
    int64_t word_step = words == NULL ? 0 : BD_STRIP_ROWS;
    int64_t n_whole = K / BD_WORD_BITS * BD_WORD_BITS, n_left = K - n_whole;
    __m256d sums[4];
    load_lanes(lanes, has_pairs, sums);
    /* As many words a chain as a line of base has. */
    int64_t k = 0, n_words = (int64_t)bd_dtype_bytes(base_dtype);
    if (checksum != NULL) {
        bd_crc_chains chains = *checksum;
        int64_t n_summed = min_i64(n_whole, chains.n_words / n_words * BD_WORD_BITS);
        for (; k < n_summed; k += BD_WORD_BITS, word += word_step) {
            prefetch_line(base, base_dtype, k);
            prefetch_line(finetuned, finetuned_dtype, k);
            bd_crc_add_words(&chains, n_words);
            *word = extract_line(base, base_dtype, finetuned, finetuned_dtype, k, has_pairs,
                                 residual, sums);
        }
        *checksum = chains;
    }
    for (; k < n_whole; k += BD_WORD_BITS, word += word_step) {
        prefetch_line(base, base_dtype, k);
        prefetch_line(finetuned, finetuned_dtype, k);
        *word = extract_line(base, base_dtype, finetuned, finetuned_dtype, k, has_pairs, residual,
                             sums);
    }
    if (n_left > 0) {
        size_t b_bytes = bd_dtype_bytes(base_dtype), f_bytes = bd_dtype_bytes(finetuned_dtype);
        float b[BD_WORD_BITS] = {0}, f[BD_WORD_BITS] = {0}, d[BD_WORD_BITS];
        memcpy(b, (const char *)base + (size_t)n_whole * b_bytes, (size_t)n_left * b_bytes);
        memcpy(f, (const char *)finetuned + (size_t)n_whole * f_bytes, (size_t)n_left * f_bytes);
        *word = extract_line(b, base_dtype, f, finetuned_dtype, 0, has_pairs,
                             residual == NULL ? NULL : d, sums) &
                tail_bits(n_left);
        if (residual != NULL) {
            memcpy(residual + n_whole, d, (size_t)n_left * sizeof *d);
        }
    }
    if (words != NULL) {
        clear_words(words, (K + BD_WORD_BITS - 1) / BD_WORD_BITS, bd_n_lines(K));
    }
    store_lanes(sums, has_pairs, lanes);
    int is_bad = 0;
    for (int i = 0; i < 16; i++) {
        is_bad |= !isfinite(lanes[i]);
    }
    return is_bad;
}

static int
extract_row(const void *base, bd_dtype base_dtype, const void *finetuned, bd_dtype finetuned_dtype,
            int64_t K, float *residual, uint32_t *words, double lanes[16], bd_crc_chains *checksum)
{
#define CASE(b, f, has_pairs, r)                                                              \
    if (base_dtype == (b) && finetuned_dtype == (f)) {                                        \
        return extract_typed(base, b, finetuned, f, K, has_pairs, r, words, lanes, checksum); \
    }
    if (residual == NULL) {
        CASE(BD_BF16, BD_BF16, 1, NULL)
        CASE(BD_F16, BD_F16, 0, NULL)
        CASE(BD_F32, BD_F32, 0, NULL)
    }
    CASE(BD_BF16, BD_BF16, 0, residual)
    CASE(BD_BF16, BD_F16, 0, residual)
    CASE(BD_BF16, BD_F32, 0, residual)
    CASE(BD_F16, BD_BF16, 0, residual)
    CASE(BD_F16, BD_F16, 0, residual)
    CASE(BD_F16, BD_F32, 0, residual)
    CASE(BD_F32, BD_BF16, 0, residual)
    CASE(BD_F32, BD_F16, 0, residual)
    return extract_typed(base, BD_F32, finetuned, BD_F32, K, 0, residual, words, lanes, checksum);
#undef CASE
}

/* ---- residuals -------------------------------------------------------------------------------- */

INLINE uint32_t
subtract_line(float *r, uint32_t word, float row, const float *column, __m256d sums[4])
{
    __m256 d[4], scale = _mm256_set1_ps(row);
    for (int i = 0; i < 4; i++) {
        __m256 s = column == NULL ? scale : _mm256_mul_ps(scale, _mm256_loadu_ps(column + 8 * i));
        d[i] = _mm256_sub_ps(_mm256_loadu_ps(r + 8 * i), signed_scale(word, i, 0, s));
        _mm256_storeu_ps(r + 8 * i, d[i]);
    }
    if (sums == NULL) {
        return 0;
    }
    add_lanes(d, sums);
    return pack_line(d);
}

static void
residual_row(float *residual, const uint32_t *words, float row, const float *column, int64_t K,
             uint32_t *next, double lanes[16])
{
    int64_t n_words = (K + BD_WORD_BITS - 1) / BD_WORD_BITS, n_lines = bd_n_lines(K);
    __m256d sums[4];
    if (next != NULL) {
        load_lanes(lanes, 0, sums);
    }
    for (int64_t line = 0; line < n_words; line++) {
        int64_t k = line * BD_WORD_BITS, n = K - k;
        uint32_t word = words[line * BD_STRIP_ROWS], bits;
        const float *c = column == NULL ? NULL : column + k;
        if (n >= BD_WORD_BITS) {
            bits = subtract_line(residual + k, word, row, c, next == NULL ? NULL : sums);
        } else {
            float r[BD_WORD_BITS] = {0}, tail_column[BD_WORD_BITS] = {0};
            memcpy(r, residual + k, (size_t)n * sizeof *r);
            if (c != NULL) {
                memcpy(tail_column, c, (size_t)n * sizeof *c);
            }
            (void)subtract_line(r, word, row, c == NULL ? NULL : tail_column, NULL);
            memcpy(residual + k, r, (size_t)n * sizeof *r);
            memset(r + n, 0, (size_t)(BD_WORD_BITS - n) * sizeof *r);
            bits = 0;
            if (next != NULL) {
                __m256 d[4];
                load_line(r, BD_F32, 0, d);
                add_lanes(d, sums);
                bits = pack_line(d) & tail_bits(n);
            }
        }
        if (next != NULL) {
            next[line * BD_STRIP_ROWS] = bits;
        }
    }
    if (next != NULL) {
        clear_words(next, n_words, n_lines);
        store_lanes(sums, 0, lanes);
    }
}

AVX2_END

void
bd_fill_avx2_delta(bd_kernels *table)
{
    table->extract_row = extract_row;
    table->residual_row = residual_row;
    table->expand_row = bd_expand_row_avx2;
    table->to_float32 = bd_to_float32_avx2;
}

#endif /* __x86_64__ */
