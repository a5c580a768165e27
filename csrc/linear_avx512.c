/* linear_avx512.c - AVX-512 (F, BW, DQ, VL) inner loops of linear.c.
 *
 * Products by table look-up: four columns of q have 16 signed sums, which fill one register; a line
 * is the index register of vpermd, which uses the low 4 bits of every lane, so that 16 rows x 4
 * columns cost one shift, one look-up and one addition. */
#include <stddef.h>
#include <string.h>

#include "avx512.h"
#include "dtype.h"
#include "kernels.h"

#if BD_AVX512
AVX512_BEGIN

enum {
    LUT_ROWS = 4,         /* rows that share the shifted lines */
    LUT_BLOCK_LINES = 32, /* lines whose tables of LUT_ROWS rows take 64 KB */
    LUT_LINE_TABLES = 8,  /* tables of a line: one for every four columns */
    PREFETCH_LINES = 96   /* 6 KB ahead in every strip */
};

/* ---- quantize -------------------------------------------------------------------------------- */

INLINE __m512
load_scaled(const void *x, bd_dtype dtype, const float *column, int64_t k, __mmask16 mask)
{
    __m512 u = load_masked(x, dtype, k, mask);
    return column == NULL ? u : _mm512_mul_ps(u, _mm512_maskz_loadu_ps(mask, column + k));
}

INLINE int
quantize_typed(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
               int16_t *q, int *exponent)
{
    /* Without their signs, fp32 numbers are ordered like their bits. */
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = 0; k < K; k += 16) {
        __m512 u = load_scaled(x, dtype, column, k, tail_mask(K - k));
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(u), magnitude));
    }
    int bits = _mm512_reduce_max_epi32(largest);
    if (bits >= 0x7F800000) {
        return 1;
    }
    int e = bits == 0 ? 0 : (bits >> 23) - 126;
    if (e < BD_MIN_EXPONENT) {
        e = BD_MIN_EXPONENT;
    }
    *exponent = e;
    const __m512 factor = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 15 - e) << 23));
    for (int64_t k = 0; k < K_padded; k += 16) {
        __m512 u = load_scaled(x, dtype, column, k, tail_mask(K - k));
        __m512i rounded = _mm512_cvt_roundps_epi32(_mm512_mul_ps(u, factor),
                                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256((void *)(q + k), _mm512_cvtsepi32_epi16(rounded));
    }
    return 0;
}

static int
quantize(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
         int16_t *q, int *exponent)
{
    BD_BY_DTYPE(dtype, T, return quantize_typed(x, T, column, K, K_padded, q, exponent));
}

/* ---- products by look-up ----------------------------------------------------------------------
 *
 * prepared: at most LUT_ROWS rows; the tables stand in the order of their use:
 * [line][four columns][row][16 sums]. */

static int64_t
lut_prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    return n_rows * n_lines * LUT_LINE_TABLES * 64;
}

static int64_t
lut_scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    (void)n_strips, (void)n_lines, (void)n_rows;
    return 0;
}

/* Entry i: the sum of q[b], negated where bit b of i is 0. */
INLINE __m512i
sign_sums(const int16_t *q)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i a = _mm512_set1_epi32(q[0]), b = _mm512_set1_epi32(q[1]);
    __m512i c = _mm512_set1_epi32(q[2]), d = _mm512_set1_epi32(q[3]);
    a = _mm512_mask_sub_epi32(a, 0x5555, zero, a);
    c = _mm512_mask_sub_epi32(c, 0x0F0F, zero, c);
    a = _mm512_mask_sub_epi32(_mm512_add_epi32(a, b), 0x3333, a, b);
    c = _mm512_mask_sub_epi32(_mm512_add_epi32(c, d), 0x00FF, c, d);
    return _mm512_add_epi32(a, c);
}

static void
lut_prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    const int64_t n_tables = n_lines * LUT_LINE_TABLES;
    __m512i *table = prepared;
    for (int64_t t = 0; t < n_tables; t++) {
        for (int64_t r = 0; r < n_rows; r++) {
            _mm512_store_si512(table++, sign_sums(q + r * q_stride + 4 * t));
        }
    }
}

/* G strips x R rows; first: z is set, else added to. */
INLINE void
lut_tile(const uint32_t *sign, int64_t strip_stride, int64_t n_lines, const __m512i *table,
         int32_t *z, int64_t z_stride, int first, const int G, const int R)
{
    __m512i sum[16], word[8];
    UNROLL(16)
    for (int i = 0; i < G * R; i++) {
        sum[i] = _mm512_setzero_si512();
    }
    for (int64_t l = 0; l < n_lines; l++) {
        /* Past the end of a strip, on to the same place G strips on. */
        const int64_t ahead = l + PREFETCH_LINES < n_lines
                                  ? 16 * PREFETCH_LINES
                                  : G * strip_stride + 16 * (PREFETCH_LINES - n_lines);
        UNROLL(8)
        for (int g = 0; g < G; g++) {
            const uint32_t *line = sign + g * strip_stride + l * 16;
            word[g] = _mm512_load_si512(line);
            _mm_prefetch((const char *)(line + ahead), _MM_HINT_T1);
        }
        /* Not unrolled: the compiler would sum the look-ups of all steps first, and spill them. */
        UNROLL(1)
        for (int j = 0; j < LUT_LINE_TABLES; j++) {
            UNROLL(4)
            for (int r = 0; r < R; r++) {
                __m512i sums = _mm512_load_si512(table + r);
                UNROLL(8)
                for (int g = 0; g < G; g++) {
                    sum[g * R + r] =
                        _mm512_add_epi32(sum[g * R + r], _mm512_permutexvar_epi32(word[g], sums));
                }
            }
            table += R;
            UNROLL(8)
            for (int g = 0; g < G; g++) {
                word[g] = _mm512_srli_epi32(word[g], 4);
            }
        }
    }
    UNROLL(8)
    for (int g = 0; g < G; g++) {
        UNROLL(4)
        for (int r = 0; r < R; r++) {
            int32_t *out = z + r * z_stride + 16 * g;
            __m512i total = sum[g * R + r];
            if (!first) {
                total = _mm512_add_epi32(total, _mm512_loadu_si512(out));
            }
            _mm512_storeu_si512(out, total);
        }
    }
}

/* All strips in tiles of G, then of 4, 2 and 1. */
INLINE void
lut_strips(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
           const __m512i *table, int32_t *z, int64_t z_stride, int first, const int G, const int R)
{
    int64_t s = 0;
    for (; s + G <= n_strips; s += G) {
        lut_tile(sign + s * strip_stride, strip_stride, n_lines, table, z + 16 * s, z_stride, first,
                 G, R);
    }
    if (s + 4 <= n_strips) {
        lut_tile(sign + s * strip_stride, strip_stride, n_lines, table, z + 16 * s, z_stride, first,
                 4, R);
        s += 4;
    }
    if (s + 2 <= n_strips) {
        lut_tile(sign + s * strip_stride, strip_stride, n_lines, table, z + 16 * s, z_stride, first,
                 2, R);
        s += 2;
    }
    if (s < n_strips) {
        lut_tile(sign + s * strip_stride, strip_stride, n_lines, table, z + 16 * s, z_stride, first,
                 1, R);
    }
}

/* n_rows <= LUT_ROWS rows with their tables of n_lines lines. */
INLINE void
lut_rows(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
         const __m512i *table, int64_t n_rows, int32_t *z, int64_t z_stride, int first)
{
    switch (n_rows) {
        case 1:
            lut_strips(sign, strip_stride, n_strips, n_lines, table, z, z_stride, first, 8, 1);
            break;
        case 2:
            lut_strips(sign, strip_stride, n_strips, n_lines, table, z, z_stride, first, 8, 2);
            break;
        case 3:
            lut_strips(sign, strip_stride, n_strips, n_lines, table, z, z_stride, first, 4, 3);
            break;
        default:
            lut_strips(sign, strip_stride, n_strips, n_lines, table, z, z_stride, first, 4, 4);
            break;
    }
}

/* Few rows read the signs once and in order: their tables stay in the L2 cache. */
static void
lut_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
            const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    (void)scratch;
    lut_rows(sign, strip_stride, n_strips, n_lines, prepared, n_rows, z, z_stride, 1);
}

/* ---- products by look-up, many rows -----------------------------------------------------------
 *
 * prepared: q, contiguous. The tables of a piece of the columns are made when they are used, for
 * LUT_ROWS rows at a time, and stay in a near cache for all strips of the call. */

static int64_t
many_prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    return n_rows * n_lines * 64;
}

static int64_t
many_scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    (void)n_strips, (void)n_lines, (void)n_rows;
    return (int64_t)LUT_ROWS * LUT_BLOCK_LINES * LUT_LINE_TABLES * 64;
}

static void
many_prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    int16_t *out = prepared;
    for (int64_t m = 0; m < n_rows; m++, q += q_stride, out += 32 * n_lines) {
        memcpy(out, q, (size_t)n_lines * 64);
    }
}

static void
many_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
             const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    const int64_t q_stride = 32 * n_lines;
    for (int64_t l = 0; l < n_lines; l += LUT_BLOCK_LINES) {
        int64_t n = n_lines - l < LUT_BLOCK_LINES ? n_lines - l : LUT_BLOCK_LINES;
        for (int64_t m = 0; m < n_rows; m += LUT_ROWS) {
            int64_t n_block = n_rows - m < LUT_ROWS ? n_rows - m : LUT_ROWS;
            const int16_t *q = (const int16_t *)prepared + m * q_stride + 32 * l;
            lut_prepare(q, q_stride, n, n_block, scratch);
            lut_rows(sign + 16 * l, strip_stride, n_strips, n, scratch, n_block, z + m * z_stride,
                     z_stride, l == 0);
        }
    }
}

/* ---- base products of few rows ----------------------------------------------------------------
 */

/* n_weights x n_rows sums. Every sum has its own 16 lanes, k ascending by 16, and one fold,
 * whatever the tile, so a row's bits do not depend on the rows beside it. */
INLINE void
stream_tile(const float *x, int64_t x_stride, const void *weight, bd_dtype dtype,
            int64_t weight_stride, int64_t K, float *out, int64_t out_stride, const int W,
            const int R)
{
    __m512 sum[24], w[8];
    UNROLL(24)
    for (int i = 0; i < W * R; i++) {
        sum[i] = _mm512_setzero_ps();
    }
    /* Into the L2 cache in memory order: the next W weights, as this tile reads its own. */
    const int64_t bytes = dtype == BD_F32 ? 4 : 2;
    const char *ahead = (const char *)weight + W * weight_stride * bytes;
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        UNROLL(8)
        for (int64_t b = 0; b < 16 * W * bytes; b += 64) {
            _mm_prefetch(ahead + k * W * bytes + b, _MM_HINT_T1);
        }
        UNROLL(8)
        for (int n = 0; n < W; n++) {
            w[n] = load_masked(weight, dtype, n * weight_stride + k, 0xFFFF);
        }
        UNROLL(6)
        for (int m = 0; m < R; m++) {
            __m512 u = _mm512_loadu_ps(x + m * x_stride + k);
            UNROLL(8)
            for (int n = 0; n < W; n++) {
                sum[m * W + n] = _mm512_fmadd_ps(u, w[n], sum[m * W + n]);
            }
        }
    }
    if (k < K) {
        const __mmask16 mask = tail_mask(K - k);
        UNROLL(8)
        for (int n = 0; n < W; n++) {
            w[n] = load_masked(weight, dtype, n * weight_stride + k, mask);
        }
        UNROLL(6)
        for (int m = 0; m < R; m++) {
            __m512 u = _mm512_maskz_loadu_ps(mask, x + m * x_stride + k);
            UNROLL(8)
            for (int n = 0; n < W; n++) {
                sum[m * W + n] = _mm512_fmadd_ps(u, w[n], sum[m * W + n]);
            }
        }
    }
    UNROLL(6)
    for (int m = 0; m < R; m++) {
        UNROLL(8)
        for (int n = 0; n < W; n++) {
            out[m * out_stride + n] = _mm512_reduce_add_ps(sum[m * W + n]);
        }
    }
}

INLINE void
stream_weights(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
               int64_t weight_stride, int64_t K, float *out, int64_t out_stride, const int W)
{
    for (int64_t m = 0; m < M; m += 6) {
        const float *rows = x + m * x_stride;
        float *sums = out + m * out_stride;
        switch (M - m) {
            case 1:
                stream_tile(rows, x_stride, weight, dtype, weight_stride, K, sums, out_stride, W,
                            1);
                break;
            case 2:
                stream_tile(rows, x_stride, weight, dtype, weight_stride, K, sums, out_stride, W,
                            2);
                break;
            case 3:
                stream_tile(rows, x_stride, weight, dtype, weight_stride, K, sums, out_stride, W,
                            3);
                break;
            case 4:
                stream_tile(rows, x_stride, weight, dtype, weight_stride, K, sums, out_stride, W,
                            4);
                break;
            case 5:
                stream_tile(rows, x_stride, weight, dtype, weight_stride, K, sums, out_stride, W,
                            5);
                break;
            default:
                stream_tile(rows, x_stride, weight, dtype, weight_stride, K, sums, out_stride, W,
                            6);
                break;
        }
    }
}

INLINE void
stream_typed(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
             int64_t weight_stride, int64_t n_rows, int64_t K, float *out, int64_t out_stride)
{
    const int64_t row_bytes = weight_stride * (dtype == BD_F32 ? 4 : 2);
    const char *row = weight;
    int64_t n = 0;
    for (; M == 1 && n + 8 <= n_rows; n += 8, row += 8 * row_bytes) {
        stream_tile(x, x_stride, row, dtype, weight_stride, K, out + n, out_stride, 8, 1);
    }
    for (; n + 4 <= n_rows; n += 4, row += 4 * row_bytes) {
        stream_weights(x, x_stride, M, row, dtype, weight_stride, K, out + n, out_stride, 4);
    }
    for (; n < n_rows; n++, row += row_bytes) {
        stream_weights(x, x_stride, M, row, dtype, weight_stride, K, out + n, out_stride, 1);
    }
}

static void
stream_rows(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
            int64_t weight_stride, int64_t n_rows, int64_t K, float *out, int64_t out_stride)
{
    BD_BY_DTYPE(dtype, T,
                stream_typed(x, x_stride, M, weight, T, weight_stride, n_rows, K, out, out_stride));
}

/* ---- transposed -------------------------------------------------------------------------------
 */

/* sum of +-q = 2 * (sum of q under the bits) - (sum of q); a word is two masks of 16 columns. */
static void
transposed_strip(const uint32_t *sign, int64_t n_lines, const int16_t *q, int32_t *z)
{
    __m512i twice[16];
    int32_t total = 0;
    for (int i = 0; i < 16; i++) {
        twice[i] = _mm512_set1_epi32(2 * q[i]);
        total += q[i];
    }
    const __m512i minus = _mm512_set1_epi32(-total);
    for (int64_t l = 0; l < n_lines; l++, sign += 16, z += 32) {
        __m512i low = _mm512_add_epi32(_mm512_loadu_si512(z), minus);
        __m512i high = _mm512_add_epi32(_mm512_loadu_si512(z + 16), minus);
        UNROLL(16)
        for (int i = 0; i < 16; i++) {
            low = _mm512_mask_add_epi32(low, (__mmask16)sign[i], low, twice[i]);
            high = _mm512_mask_add_epi32(high, (__mmask16)(sign[i] >> 16), high, twice[i]);
        }
        _mm512_storeu_si512(z, low);
        _mm512_storeu_si512(z + 16, high);
    }
}

AVX512_END

void
bd_fill_avx512_linear(bd_kernels *table)
{
    static const bd_product few = {
        .name = "lut",
        .max_rows = LUT_ROWS,
        .prepared_bytes = lut_prepared_bytes,
        .scratch_bytes = lut_scratch_bytes,
        .prepare = lut_prepare,
        .product = lut_product,
    };
    static const bd_product many = {
        .name = "lut-blocks",
        .max_rows = INT64_MAX,
        .prepared_bytes = many_prepared_bytes,
        .scratch_bytes = many_scratch_bytes,
        .prepare = many_prepare,
        .product = many_product,
    };
    /* VNNI has nothing to add: 64 products a look-up, 32 a vpdpwssd or a pair of vpdpbusd. */
    table->quantize = quantize;
    table->stream_rows = stream_rows;
    table->transposed_strip = transposed_strip;
    table->products[0] = few;
    table->products[1] = many;
    table->products[2] = (bd_product){0};
}

#endif /* BD_AVX512 */
