/* linear_avx512_vnni.c - products of many rows of one tenant with AVX-512 VNNI.
 *
 * The signs of two strips are expanded to int16 +-1 once for a piece of the columns, and all rows use
 * them: vpdpwssd multiplies pairs of columns, 16 outputs at a time, exactly in int32. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <stddef.h>

#include "linear_avx512.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    ROWS = 8,        /* rows of a tile: 2 x 8 sums stay in registers */
    STRIPS = 2,      /* strips of a tile */
    BLOCK_LINES = 8, /* a piece of the columns: 16 KB of expanded signs */
    LINE_PAIRS = 16  /* pairs of columns of a line */
};

/* prepared: for each block of ROWS rows [pair of columns][ROWS] pairs, missing rows zero. */
static int64_t
prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    return (n_rows + ROWS - 1) / ROWS * ROWS * n_lines * LINE_PAIRS * 4;
}

static int64_t
scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    (void)n_strips;
    (void)n_lines;
    (void)n_rows;
    return (int64_t)STRIPS * BLOCK_LINES * LINE_PAIRS * 64;
}

static void
prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    const int64_t n_pairs = n_lines * LINE_PAIRS;
    int16_t *out = prepared;
    for (int64_t m = 0; m < n_rows; m += ROWS) {
        for (int64_t p = 0; p < n_pairs; p++) {
            for (int64_t r = m; r < m + ROWS; r++, out += 2) {
                out[0] = r < n_rows ? q[r * q_stride + 2 * p] : (int16_t)0;
                out[1] = r < n_rows ? q[r * q_stride + 2 * p + 1] : (int16_t)0;
            }
        }
    }
}

/* [line][pair][strip] registers of 16 outputs x 2 columns. */
INLINE void
expand_signs(const uint32_t *sign, int64_t strip_stride, int64_t n_lines, __m512i *expanded,
             const int G)
{
    const int mm = -1, pm = (int)0xFFFF0001u, mp = 0x0001FFFF, pp = 0x00010001;
    const __m512i pairs =
        _mm512_setr_epi32(mm, pm, mp, pp, mm, pm, mp, pp, mm, pm, mp, pp, mm, pm, mp, pp);
    for (int64_t l = 0; l < n_lines; l++) {
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) {
            __m512i word = _mm512_load_si512(sign + g * strip_stride + 16 * l);
#pragma GCC unroll 16
            for (int p = 0; p < LINE_PAIRS; p++) {
                _mm512_store_si512(expanded + (l * LINE_PAIRS + p) * G + g,
                                   _mm512_permutexvar_epi32(word, pairs));
                word = _mm512_srli_epi32(word, 2);
            }
        }
    }
}

/* G strips x R rows (of which n_rows are wanted) over n_pairs pairs of columns. */
INLINE void
tile(const __m512i *expanded, int64_t n_pairs, const int32_t *q, int64_t n_rows, int32_t *z,
     int64_t z_stride, int first, const int G, const int R)
{
    __m512i sum[STRIPS * ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < G * R; i++) {
        sum[i] = _mm512_setzero_si512();
    }
    for (int64_t p = 0; p < n_pairs; p++, q += ROWS, expanded += G) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512i pair = _mm512_set1_epi32(q[r]);
#pragma GCC unroll 2
            for (int g = 0; g < G; g++) {
                sum[r * G + g] = _mm512_dpwssd_epi32(sum[r * G + g], expanded[g], pair);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        if (r < n_rows) {
#pragma GCC unroll 2
            for (int g = 0; g < G; g++) {
                int32_t *out = z + r * z_stride + 16 * g;
                __m512i total = sum[r * G + g];
                if (!first) {
                    total = _mm512_add_epi32(total, _mm512_loadu_si512(out));
                }
                _mm512_storeu_si512(out, total);
            }
        }
    }
}

INLINE void
strips(const uint32_t *sign, int64_t strip_stride, int64_t n_lines, const int32_t *q,
       int64_t n_rows, int32_t *z, int64_t z_stride, __m512i *expanded, const int G)
{
    for (int64_t l = 0; l < n_lines; l += BLOCK_LINES) {
        expand_signs(sign + 16 * l, strip_stride, BLOCK_LINES, expanded, G);
        for (int64_t m = 0; m < n_rows; m += ROWS) {
            const int32_t *pairs = q + (m * n_lines + l * ROWS) * LINE_PAIRS;
            int64_t n = n_rows - m;
            if (n <= 4) {
                tile(expanded, BLOCK_LINES * LINE_PAIRS, pairs, n, z + m * z_stride, z_stride,
                     l == 0, G, 4);
            } else {
                tile(expanded, BLOCK_LINES * LINE_PAIRS, pairs, n, z + m * z_stride, z_stride,
                     l == 0, G, ROWS);
            }
        }
    }
}

static void
product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
        const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    int64_t s = 0;
    for (; s + STRIPS <= n_strips; s += STRIPS) {
        strips(sign + s * strip_stride, strip_stride, n_lines, prepared, n_rows, z + 16 * s,
               z_stride, scratch, STRIPS);
    }
    if (s < n_strips) {
        strips(sign + s * strip_stride, strip_stride, n_lines, prepared, n_rows, z + 16 * s,
               z_stride, scratch, 1);
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bd_product bd_avx512_vnni_product = {
    .name = "vnni",
    .max_rows = INT64_MAX,
    .prepared_bytes = prepared_bytes,
    .scratch_bytes = scratch_bytes,
    .prepare = prepare,
    .product = product,
};

#endif /* __x86_64__ */
