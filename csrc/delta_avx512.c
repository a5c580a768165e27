/* delta_avx512.c - AVX-512 (F, BW, DQ, VL) inner loops of delta.c: 16 columns a register, masks for
 * tails and for the bits. */
#include "avx512.h"
#include "dtype.h"
#include "kernels.h"

#if BD_AVX512

#if defined(BD_AVX512_EMULATED)
#include "avx512_emulation_delta.h"
#endif

#include <math.h>
#include <stddef.h>

#include "checksum_words.h"

AVX512_BEGIN

enum { PREFETCH_BYTES = 2048 }; /* ahead in each stream */

/* ---- 16 columns ------------------------------------------------------------------------------- */

INLINE int
is_whole(__mmask16 mask)
{
    return mask == 0xFFFF;
}

/* fp32 to bf16 in the lower halves, ties to even. */
INLINE __m512i
round_bf16(__m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_srli_epi32(rounded, 16);
}

INLINE void
store_columns(void *out, bd_dtype dtype, int64_t k, __mmask16 mask, __m512 value, int is_streamed)
{
    if (dtype == BD_F32) {
        if (is_streamed) {
            _mm512_stream_ps((float *)out + k, value);
        } else {
            _mm512_mask_storeu_ps((float *)out + k, mask, value);
        }
        return;
    }
    __m256i half = dtype == BD_F16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                                   : _mm512_cvtepi32_epi16(round_bf16(value));
    if (is_streamed) {
        _mm256_stream_si256((void *)((uint16_t *)out + k), half);
    } else {
        _mm256_mask_storeu_epi16((uint16_t *)out + k, mask, half);
    }
}

/* Bits of the columns of mask. */
INLINE __mmask16
pack_columns(__m512 d, __mmask16 mask)
{
    return (__mmask16)(_mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NLT_UQ) & mask);
}

/* 16 fp64 sums += |d|. */
INLINE void
add_lanes(__m512 d, __m512d sums[2])
{
    __m512 a = _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(d), _mm512_set1_epi32(0x7FFFFFFF)));
    sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
}

INLINE void
clear_words(uint32_t *words, int64_t line, int64_t n_lines)
{
    for (; line < n_lines; line++) {
        words[line * BD_STRIP_ROWS] = 0;
    }
}

/* ---- extraction ------------------------------------------------------------------------------- */

/* A line, or the n_left columns of one that are left. */
INLINE uint32_t
extract_line(const void *base, bd_dtype base_dtype, const void *finetuned, bd_dtype finetuned_dtype,
             int64_t k, int64_t n_left, float *residual, __m512d sums[2])
{
    uint32_t word = 0;
    for (int i = 0; i < 2; i++) {
        __mmask16 mask = tail_mask(n_left - 16 * i);
        __m512 d = _mm512_sub_ps(load_masked(finetuned, finetuned_dtype, k + 16 * i, mask),
                                 load_masked(base, base_dtype, k + 16 * i, mask));
        if (residual != NULL) {
            _mm512_mask_storeu_ps(residual + k + 16 * i, mask, d);
        }
        add_lanes(d, sums);
        word |= (uint32_t)pack_columns(d, mask) << 16 * i;
    }
    return word;
}

INLINE void
prefetch_line(const void *data, bd_dtype dtype, int64_t k)
{
    const char *bytes = (const char *)data + k * (int64_t)bd_dtype_bytes(dtype) + PREFETCH_BYTES;
    _mm_prefetch(bytes, _MM_HINT_T0);
    if (dtype == BD_F32) {
        _mm_prefetch(bytes + 64, _MM_HINT_T0);
    }
}

INLINE void
extract_typed(const void *base, bd_dtype base_dtype, const void *finetuned,
              bd_dtype finetuned_dtype, int64_t K, float *residual, uint32_t *words,
              double lanes[16], bd_crc_chains *checksum)
{
    uint32_t unused[1], *word = words == NULL ? unused : words;
    int64_t word_step = words == NULL ? 0 : BD_STRIP_ROWS;
    int64_t k = 0, n_whole = K / BD_WORD_BITS * BD_WORD_BITS;
    __m512d sums[2] = {_mm512_loadu_pd(lanes), _mm512_loadu_pd(lanes + 8)};
    if (checksum != NULL) {
        /* As many words a chain as a line of base has. */
        int64_t n_words = (int64_t)bd_dtype_bytes(base_dtype);
        bd_crc_chains chains = *checksum;
        int64_t n_summed = chains.n_words / n_words * BD_WORD_BITS;
        for (; k < n_whole && k < n_summed; k += BD_WORD_BITS, word += word_step) {
            prefetch_line(base, base_dtype, k);
            prefetch_line(finetuned, finetuned_dtype, k);
            bd_crc_add_words(&chains, n_words);
            *word = extract_line(base, base_dtype, finetuned, finetuned_dtype, k, BD_WORD_BITS,
                                 residual, sums);
        }
        *checksum = chains;
    }
    for (; k < n_whole; k += BD_WORD_BITS, word += word_step) {
        prefetch_line(base, base_dtype, k);
        prefetch_line(finetuned, finetuned_dtype, k);
        *word = extract_line(base, base_dtype, finetuned, finetuned_dtype, k, BD_WORD_BITS,
                             residual, sums);
    }
    if (k < K) {
        *word =
            extract_line(base, base_dtype, finetuned, finetuned_dtype, k, K - k, residual, sums);
    }
    _mm512_storeu_pd(lanes, sums[0]);
    _mm512_storeu_pd(lanes + 8, sums[1]);
}

static int
extract_row(const void *base, bd_dtype base_dtype, const void *finetuned, bd_dtype finetuned_dtype,
            int64_t K, float *residual, uint32_t *words, double lanes[16], bd_crc_chains *checksum)
{
#define CASE(b, f, r)                                                       \
    if (base_dtype == (b) && finetuned_dtype == (f)) {                      \
        extract_typed(base, b, finetuned, f, K, r, words, lanes, checksum); \
        goto done;                                                          \
    }
    if (residual == NULL) {
        CASE(BD_BF16, BD_BF16, NULL)
        CASE(BD_F16, BD_F16, NULL)
        CASE(BD_F32, BD_F32, NULL)
    }
    CASE(BD_BF16, BD_BF16, residual)
    CASE(BD_BF16, BD_F16, residual)
    CASE(BD_BF16, BD_F32, residual)
    CASE(BD_F16, BD_BF16, residual)
    CASE(BD_F16, BD_F16, residual)
    CASE(BD_F16, BD_F32, residual)
    CASE(BD_F32, BD_BF16, residual)
    CASE(BD_F32, BD_F16, residual)
    CASE(BD_F32, BD_F32, residual)
#undef CASE
done:
    if (words != NULL) {
        clear_words(words, (K + BD_WORD_BITS - 1) / BD_WORD_BITS, bd_n_lines(K));
    }
    int is_bad = 0;
    for (int i = 0; i < 16; i++) {
        is_bad |= !isfinite(lanes[i]);
    }
    return is_bad;
}

/* ---- signed scales ---------------------------------------------------------------------------- */

/* s * scale: the sign flips where the bit is 0. */
INLINE __m512
signed_scale(__m512 scale, uint32_t bits)
{
    __m512i value = _mm512_castps_si512(scale);
    __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_mask_xor_epi32(value, (__mmask16)~bits, value, sign));
}

/* Scale at 16 columns, column pointing to the first or NULL. */
INLINE __m512
scale_columns(float row, const float *column, __mmask16 mask)
{
    __m512 scale = _mm512_set1_ps(row);
    return column == NULL ? scale : _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, column));
}

static void
residual_row(float *residual, const uint32_t *words, float row, const float *column, int64_t K,
             uint32_t *next, double lanes[16])
{
    __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    if (next != NULL) {
        sums[0] = _mm512_loadu_pd(lanes);
        sums[1] = _mm512_loadu_pd(lanes + 8);
    }
    int64_t n_words = (K + BD_WORD_BITS - 1) / BD_WORD_BITS;
    for (int64_t line = 0; line < n_words; line++) {
        uint32_t word = words[line * BD_STRIP_ROWS], bits = 0;
        for (int i = 0; i < 2; i++) {
            int64_t k = line * BD_WORD_BITS + 16 * i;
            __mmask16 mask = tail_mask(K - k);
            __m512 scale = scale_columns(row, column == NULL ? NULL : column + k, mask);
            __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, residual + k),
                                     signed_scale(scale, word >> 16 * i));
            _mm512_mask_storeu_ps(residual + k, mask, d);
            if (next != NULL) {
                add_lanes(_mm512_maskz_mov_ps(mask, d), sums);
                bits |= (uint32_t)pack_columns(d, mask) << 16 * i;
            }
        }
        if (next != NULL) {
            next[line * BD_STRIP_ROWS] = bits;
        }
    }
    if (next != NULL) {
        clear_words(next, n_words, bd_n_lines(K));
        _mm512_storeu_pd(lanes, sums[0]);
        _mm512_storeu_pd(lanes + 8, sums[1]);
    }
}

/* ---- expansion -------------------------------------------------------------------------------- */

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

/* The term of plane p at columns k .. k + 15. */
INLINE __m512
plane_term(const planes *d, int p, int64_t k, __mmask16 mask)
{
    uint32_t word = d->words[p * d->plane_stride + k / BD_WORD_BITS * BD_STRIP_ROWS];
    const float *column = d->column == NULL ? NULL : d->column + p * d->K + k;
    return signed_scale(scale_columns(d->row[p * d->row_stride], column, mask),
                        word >> k % BD_WORD_BITS);
}

INLINE void
expand_columns(const void *base, bd_dtype dtype, const planes *d, int64_t k, __mmask16 mask,
               void *out, bd_dtype out_dtype, int is_streamed)
{
    __m512 sum = plane_term(d, 0, k, mask);
    for (int p = 1; p < d->P; p++) {
        sum = _mm512_add_ps(sum, plane_term(d, p, k, mask));
    }
    __m512 b = base == NULL ? _mm512_setzero_ps() : load_masked(base, dtype, k, mask);
    store_columns(out, out_dtype, k, mask, _mm512_add_ps(b, sum), is_streamed && is_whole(mask));
}

INLINE void
expand_typed(const void *base, bd_dtype dtype, const planes *d, void *out, bd_dtype out_dtype,
             int is_streamed)
{
    int64_t k = 0;
    if (is_streamed && (uintptr_t)out % 64 == 0) {
        for (; k + 16 <= d->K; k += 16) {
            expand_columns(base, dtype, d, k, 0xFFFF, out, out_dtype, 1);
        }
    }
    for (; k + 16 <= d->K; k += 16) {
        expand_columns(base, dtype, d, k, 0xFFFF, out, out_dtype, 0);
    }
    if (k < d->K) {
        expand_columns(base, dtype, d, k, tail_mask(d->K - k), out, out_dtype, 0);
    }
}

static void
expand_row(const void *base, bd_dtype dtype, const uint32_t *words, int64_t plane_stride, int P,
           const float *row, int64_t row_stride, const float *column, int64_t K, void *out,
           bd_dtype out_dtype, int is_streamed)
{
    planes d = {words, plane_stride, P, row, row_stride, column, K};
#define CASE(from, to)                                      \
    if (dtype == (from) && out_dtype == (to)) {             \
        expand_typed(base, from, &d, out, to, is_streamed); \
        return;                                             \
    }
    if (P == 1 && column == NULL && base != NULL) { /* the common case: nothing to test inside */
        d.P = 1;
        d.column = NULL;
        CASE(BD_BF16, BD_BF16)
    }
    CASE(BD_BF16, BD_BF16)
    CASE(BD_BF16, BD_F16)
    CASE(BD_BF16, BD_F32)
    CASE(BD_F16, BD_BF16)
    CASE(BD_F16, BD_F16)
    CASE(BD_F16, BD_F32)
    CASE(BD_F32, BD_BF16)
    CASE(BD_F32, BD_F16)
    CASE(BD_F32, BD_F32)
#undef CASE
}

/* ---- conversion ------------------------------------------------------------------------------- */

INLINE void
convert_typed(const void *data, bd_dtype dtype, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = tail_mask(n - i);
        _mm512_mask_storeu_ps(out + i, mask, load_masked(data, dtype, i, mask));
    }
}

static void
to_float32(const void *data, bd_dtype dtype, int64_t n, float *out)
{
    BD_BY_DTYPE(dtype, T, convert_typed(data, T, n, out));
}

AVX512_END

void
bd_fill_avx512_delta(bd_kernels *table)
{
    table->extract_row = extract_row;
    table->residual_row = residual_row;
    table->expand_row = expand_row;
    table->to_float32 = to_float32;
}

#endif /* BD_AVX512 */
