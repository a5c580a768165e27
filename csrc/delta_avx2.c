/* delta_avx2.c - AVX2 (with F16C) inner loops of delta.c, 32 columns, one word, at a time.
 *
 * bf16 with bf16 needs no widening: an even column is its 32-bit pair shifted left, an odd one the
 * pair with the lower half cleared. The loops "of pairs" keep evens and odds in registers of their
 * own; the others hold columns in order. A row's tail runs through zero-padded copies. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stddef.h>

#include "checksum_words.h"
#include "dtype.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define INLINE static inline __attribute__((always_inline))

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

INLINE void
load_line(const void *data, bd_dtype dtype, int64_t k, __m256 v[4])
{
    for (int i = 0; i < 4; i++) {
        if (dtype == BD_F32) {
            v[i] = _mm256_loadu_ps((const float *)data + k + 8 * i);
            continue;
        }
        __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)data + k + 8 * i));
        v[i] = dtype == BD_F16
                   ? _mm256_cvtph_ps(half)
                   : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
}

/* 32 bf16 as evens 0 .. 14, odds 1 .. 15, evens 16 .. 30, odds 17 .. 31. */
INLINE void
load_pairs(const void *data, int64_t k, __m256 v[4])
{
    for (int i = 0; i < 2; i++) {
        __m256i pair = _mm256_loadu_si256((const void *)((const uint16_t *)data + k + 16 * i));
        v[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        v[2 * i + 1] =
            _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int)0xFFFF0000u)));
    }
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

INLINE int64_t
min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
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

/* ---- signed scales ---------------------------------------------------------------------------- */

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

static void
expand_row(const void *base, bd_dtype dtype, const uint32_t *words, int64_t plane_stride, int P,
           const float *row, int64_t row_stride, const float *column, int64_t K, void *out,
           bd_dtype out_dtype, int is_streamed)
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

static void
to_float32(const void *data, bd_dtype dtype, int64_t n, float *out)
{
    if (dtype == BD_F32) {
        convert_typed(data, BD_F32, n, out);
    } else if (dtype == BD_F16) {
        convert_typed(data, BD_F16, n, out);
    } else {
        convert_typed(data, BD_BF16, n, out);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

void
bd_fill_avx2_delta(bd_kernels *table)
{
    table->extract_row = extract_row;
    table->residual_row = residual_row;
    table->expand_row = expand_row;
    table->to_float32 = to_float32;
}

#else

typedef int bd_delta_avx2_is_empty; /* C has no empty files */

#endif /* __x86_64__ */
