/* calibrate_avx2.c - AVX2 inner loops of bd_fit_signs and bd_sweep. Products and sums round apart, as in
 * the scalar ones, so the bits are the same. */
#include "delta_avx2.h"

#if defined(__x86_64__)

#include "kernels.h"

AVX2_BEGIN

/* Four columns: eight sums in registers for the whole of e. */
INLINE void
feedback_group(const float *factor, int64_t stride, const float *e, int64_t n, float *r)
{
    __m256 low[BD_FEEDBACK_COLUMNS], high[BD_FEEDBACK_COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < BD_FEEDBACK_COLUMNS; c++) {
        low[c] = _mm256_loadu_ps(r + 16 * c);
        high[c] = _mm256_loadu_ps(r + 16 * c + 8);
    }
    for (int64_t j = 0; j < n; j++) {
        const __m256 e_low = _mm256_load_ps(e + 16 * j), e_high = _mm256_load_ps(e + 16 * j + 8);
#pragma GCC unroll 4
        for (int c = 0; c < BD_FEEDBACK_COLUMNS; c++) {
            const __m256 f = _mm256_broadcast_ss(factor + c * stride + j);
            low[c] = _mm256_add_ps(low[c], _mm256_mul_ps(f, e_low));
            high[c] = _mm256_add_ps(high[c], _mm256_mul_ps(f, e_high));
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < BD_FEEDBACK_COLUMNS; c++) {
        _mm256_storeu_ps(r + 16 * c, low[c]);
        _mm256_storeu_ps(r + 16 * c + 8, high[c]);
    }
}

static void
feedback(const float *factor, int64_t stride, int64_t n_columns, const float *e, int64_t n,
         float *r)
{
    if (n_columns == BD_FEEDBACK_COLUMNS) {
        feedback_group(factor, stride, e, n, r);
        return;
    }
    for (int64_t c = 0; c < n_columns; c++, factor += stride, r += 16) {
        __m256 low = _mm256_loadu_ps(r), high = _mm256_loadu_ps(r + 8);
        for (int64_t j = 0; j < n; j++) {
            const __m256 f = _mm256_broadcast_ss(factor + j);
            low = _mm256_add_ps(low, _mm256_mul_ps(f, _mm256_load_ps(e + 16 * j)));
            high = _mm256_add_ps(high, _mm256_mul_ps(f, _mm256_load_ps(e + 16 * j + 8)));
        }
        _mm256_storeu_ps(r, low);
        _mm256_storeu_ps(r + 8, high);
    }
}

/* 64 columns at a time stay in registers while the rows are taken from them. */
static void
take_rows(float *g, int64_t n, const float *h, int64_t stride, const int32_t *rows,
          const float *change, int64_t n_rows)
{
    enum { VECTORS = 8 };
    int64_t c = 0;
    for (; n_rows > 0 && c + 8 * VECTORS <= n; c += 8 * VECTORS) {
        __m256 sum[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            sum[v] = _mm256_loadu_ps(g + c + 8 * v);
        }
        for (int64_t m = 0; m < n_rows; m++) {
            const float *row = h + rows[m] * stride + c;
            const __m256 factor = _mm256_broadcast_ss(change + m);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                sum[v] = _mm256_sub_ps(sum[v], _mm256_mul_ps(factor, _mm256_loadu_ps(row + 8 * v)));
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            _mm256_storeu_ps(g + c + 8 * v, sum[v]);
        }
    }
    for (; c < n; c++) {
        for (int64_t m = 0; m < n_rows; m++) {
            g[c] -= change[m] * h[rows[m] * stride + c];
        }
    }
}

AVX2_END

void
bd_fill_avx2_calibrate(bd_kernels *table)
{
    table->feedback = feedback;
    table->take_rows = take_rows;
}

#endif
