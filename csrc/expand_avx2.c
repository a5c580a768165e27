/* expand_avx2.c - AVX2 (with F16C) inner loops of bd_expand and bd_to_float32, 32 columns at a time; a
 * row's tail runs through zero-padded copies. */
#include "delta_avx2.h"

#if defined(__x86_64__)

#include <stddef.h>

#include "dtype.h"

AVX2_BEGIN

/* ---- expansion -------------------------------------------------------------------------------- */

/* fp32 to bf16 in the upper halves, ties to even; the lower halves are rubbish. */
INLINE __m256i
round_bf16(__m256 value)
{
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, is_nan);
}

INLINE void
store_256(void *out, __m256i value, int is_streamed)
{
    if (is_streamed) {
        _mm256_stream_si256(out, value);
    } else {
        _mm256_storeu_si256(out, value);
    }
}

INLINE void
store_line(void *out, bd_dtype dtype, int64_t k, const __m256 v[4], int has_pairs, int is_streamed)
{
    for (int i = 0; i < 4 && dtype == BD_F32; i++) {
        store_256((float *)out + k + 8 * i, _mm256_castps_si256(v[i]), is_streamed);
    }
    for (int i = 0; i < 4 && dtype != BD_F32; i += 2) {
        __m256i halves;
        if (dtype == BD_F16) {
            halves = _mm256_set_m128i(_mm256_cvtps_ph(v[i + 1], _MM_FROUND_TO_NEAREST_INT),
                                      _mm256_cvtps_ph(v[i], _MM_FROUND_TO_NEAREST_INT));
        } else if (has_pairs) {
            halves = _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(v[i]), 16),
                                        round_bf16(v[i + 1]), 0xAA);
        } else {
            halves = _mm256_packus_epi32(_mm256_srli_epi32(round_bf16(v[i]), 16),
                                         _mm256_srli_epi32(round_bf16(v[i + 1]), 16));
            halves = _mm256_permute4x64_epi64(halves, 0xD8);
        }
        store_256((uint16_t *)out + k + 8 * i, halves, is_streamed);
    }
}

/* What the planes add to a row. */
typedef struct {
    const uint32_t *words;
    int64_t plane_stride;
    int P;
    const float *row;
    int64_t row_stride;
    const float *column; /* or NULL */
    int64_t K;
} planes;

/* The terms of plane p at column k; in pairs only without a column scale. */
INLINE void
plane_terms(const planes *d, int p, int64_t k, int has_pairs, __m256 term[4])
{
    uint32_t word = d->words[p * d->plane_stride + k / BD_WORD_BITS * BD_STRIP_ROWS];
    __m256 row = _mm256_set1_ps(d->row[p * d->row_stride]);
    for (int i = 0; i < 4; i++) {
        __m256 scale = row;
        if (!has_pairs && d->column != NULL) {
            scale = _mm256_mul_ps(row, _mm256_loadu_ps(d->column + p * d->K + k + 8 * i));
        }
        term[i] = signed_scale(word, i, has_pairs, scale);
    }
}

INLINE void
expand_line(const void *base, bd_dtype dtype, const planes *d, int64_t k, int has_pairs, void *out,
            bd_dtype out_dtype, int is_streamed)
{
    __m256 b[4], sum[4], term[4];
    if (has_pairs) {
        load_pairs(base, k, b);
    } else if (base != NULL) {
        load_line(base, dtype, k, b);
    } else {
        b[0] = b[1] = b[2] = b[3] = _mm256_setzero_ps();
    }
    plane_terms(d, 0, k, has_pairs, sum);
    for (int p = 1; p < d->P; p++) {
        plane_terms(d, p, k, has_pairs, term);
        for (int i = 0; i < 4; i++) {
            sum[i] = _mm256_add_ps(sum[i], term[i]);
        }
    }
    for (int i = 0; i < 4; i++) {
        sum[i] = _mm256_add_ps(b[i], sum[i]);
    }
    store_line(out, out_dtype, k, sum, has_pairs, is_streamed);
}

/* The last n < 32 columns. */
INLINE void
expand_tail(const void *base, bd_dtype dtype, const planes *d, int64_t k, int64_t n, void *out,
            bd_dtype out_dtype)
{
    float row[BD_MAX_PLANES], column[BD_MAX_PLANES * BD_WORD_BITS] = {0};
    float b[BD_WORD_BITS] = {0}, result[BD_WORD_BITS];
    uint32_t words[BD_MAX_PLANES];
    size_t b_bytes = bd_dtype_bytes(dtype), out_bytes = bd_dtype_bytes(out_dtype);
    for (int p = 0; p < d->P; p++) {
        row[p] = d->row[p * d->row_stride];
        words[p] = d->words[p * d->plane_stride + k / BD_WORD_BITS * BD_STRIP_ROWS];
        if (d->column != NULL) {
            memcpy(column + p * BD_WORD_BITS, d->column + p * d->K + k, (size_t)n * sizeof *row);
        }
    }
    if (base != NULL) {
        memcpy(b, (const char *)base + (size_t)k * b_bytes, (size_t)n * b_bytes);
    }
    planes tail = {words, 1, d->P, row, 1, d->column == NULL ? NULL : column, BD_WORD_BITS};
    expand_line(base == NULL ? NULL : b, dtype, &tail, 0, 0, result, out_dtype, 0);
    memcpy((char *)out + (size_t)k * out_bytes, result, (size_t)n * out_bytes);
}

INLINE void
expand_typed(const void *base, bd_dtype dtype, const planes *d, int has_pairs, void *out,
             bd_dtype out_dtype, int is_streamed)
{
    int64_t n_whole = d->K / BD_WORD_BITS * BD_WORD_BITS;
    if (is_streamed && (uintptr_t)out % 32 == 0) {
        for (int64_t k = 0; k < n_whole; k += BD_WORD_BITS) {
            expand_line(base, dtype, d, k, has_pairs, out, out_dtype, 1);
        }
    } else {
        for (int64_t k = 0; k < n_whole; k += BD_WORD_BITS) {
            expand_line(base, dtype, d, k, has_pairs, out, out_dtype, 0);
        }
    }
    if (n_whole < d->K) {
        expand_tail(base, dtype, d, n_whole, d->K - n_whole, out, out_dtype);
    }
}

void
bd_expand_row_avx2(const void *base, bd_dtype dtype, const uint32_t *words, int64_t plane_stride,
                   int P, const float *row, int64_t row_stride, const float *column, int64_t K,
                   void *out, bd_dtype out_dtype, int is_streamed)
{
    planes d = {words, plane_stride, P, row, row_stride, column, K};
#define CASE(from, to, has_pairs)                                      \
    if (dtype == (from) && out_dtype == (to)) {                        \
        expand_typed(base, from, &d, has_pairs, out, to, is_streamed); \
        return;                                                        \
    }
    if (P == 1 && column == NULL && base != NULL) { /* the common case: no loop over planes */
        d.P = 1;
        CASE(BD_BF16, BD_BF16, 1)
    }
    if (column == NULL && base != NULL) {
        CASE(BD_BF16, BD_BF16, 1)
    }
    CASE(BD_BF16, BD_BF16, 0)
    CASE(BD_BF16, BD_F16, 0)
    CASE(BD_BF16, BD_F32, 0)
    CASE(BD_F16, BD_BF16, 0)
    CASE(BD_F16, BD_F16, 0)
    CASE(BD_F16, BD_F32, 0)
    CASE(BD_F32, BD_BF16, 0)
    CASE(BD_F32, BD_F16, 0)
    expand_typed(base, BD_F32, &d, 0, out, BD_F32, is_streamed);
#undef CASE
}

/* ---- conversion ------------------------------------------------------------------------------- */

INLINE void
convert_typed(const void *data, bd_dtype dtype, int64_t n, float *out)
{
    int64_t i = 0;
    for (; i + BD_WORD_BITS <= n; i += BD_WORD_BITS) {
        __m256 v[4];
        load_line(data, dtype, i, v);
        store_line(out, BD_F32, i, v, 0, 0);
    }
    for (; i < n; i++) {
        out[i] = bd_load(data, dtype, i);
    }
}

void
bd_to_float32_avx2(const void *data, bd_dtype dtype, int64_t n, float *out)
{
    BD_BY_DTYPE(dtype, T, convert_typed(data, T, n, out));
}

AVX2_END

#endif /* __x86_64__ */
