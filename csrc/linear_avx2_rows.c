/* linear_avx2_rows.c - AVX2 (with FMA, F16C): fixed16, base products of few rows, transposed signs. */
#if defined(__x86_64__)

#include <stddef.h>
#include <string.h>

#include "avx2.h"
#include "dtype.h"
#include "linear_avx2.h"

AVX2_BEGIN

/* The n < 8 last values, and zeros. */
INLINE __m256
load_tail(const void *data, bd_dtype dtype, int64_t index, int64_t n)
{
    float value[8] = {0};
    for (int64_t i = 0; i < n; i++) {
        value[i] = bd_load(data, dtype, index + i);
    }
    return _mm256_loadu_ps(value);
}

/* ---- quantize --------------------------------------------------------------------------------- */

INLINE __m256
load_scaled(const void *x, bd_dtype dtype, const float *column, int64_t k, int64_t K)
{
    if (k + 8 <= K) {
        __m256 u = load_eight(x, dtype, k);
        return column == NULL ? u : _mm256_mul_ps(u, _mm256_loadu_ps(column + k));
    }
    if (k >= K) {
        return _mm256_setzero_ps();
    }
    __m256 u = load_tail(x, dtype, k, K - k);
    return column == NULL ? u : _mm256_mul_ps(u, load_tail(column, BD_F32, k, K - k));
}

INLINE int
quantize_typed(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
               int16_t *q, int *exponent)
{
    /* Without their signs, fp32 numbers are ordered like their bits. */
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t k = 0; k < K; k += 8) {
        __m256i bits = _mm256_castps_si256(load_scaled(x, dtype, column, k, K));
        largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
    }
    int32_t lane[8], bits = 0;
    _mm256_storeu_si256((void *)lane, largest);
    for (int i = 0; i < 8; i++) {
        bits = lane[i] > bits ? lane[i] : bits;
    }
    if (bits >= 0x7F800000) {
        return 1;
    }
    int e = bits == 0 ? 0 : (bits >> 23) - 126;
    if (e < BD_MIN_EXPONENT) {
        e = BD_MIN_EXPONENT;
    }
    *exponent = e;
    const __m256 factor = _mm256_castsi256_ps(_mm256_set1_epi32((127 + 15 - e) << 23));
    for (int64_t k = 0; k < K_padded; k += 16) {
        /* Rounded as MXCSR says: ties to even. Packing saturates. */
        __m256 a = _mm256_mul_ps(load_scaled(x, dtype, column, k, K), factor);
        __m256 b = _mm256_mul_ps(load_scaled(x, dtype, column, k + 8, K), factor);
        __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
        _mm256_storeu_si256((void *)(q + k), _mm256_permute4x64_epi64(both, 0xD8));
    }
    return 0;
}

int
bd_quantize_avx2(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
                 int16_t *q, int *exponent)
{
    BD_BY_DTYPE(dtype, T, return quantize_typed(x, T, column, K, K_padded, q, exponent));
}

/* ---- base products of few rows ---------------------------------------------------------------- */

INLINE float
fold(__m256 sum)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* W weights x R rows. Every sum has its own 8 lanes, k ascending by 8, and one fold, whatever the
 * tile, so that a row's bits do not depend on the rows beside it. */
INLINE void
stream_tile(const float *x, int64_t x_stride, const void *weight, bd_dtype dtype,
            int64_t weight_stride, int64_t K, float *out, int64_t out_stride, const int W,
            const int R)
{
    __m256 sum[12], w[8];
#pragma GCC unroll 12
    for (int i = 0; i < W * R; i++) {
        sum[i] = _mm256_setzero_ps();
    }
    /* Into the L2 cache in memory order: the next W weights, as this tile reads its own. */
    const int64_t bytes = dtype == BD_F32 ? 4 : 2;
    const char *ahead = (const char *)weight + W * weight_stride * bytes;
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
        for (int64_t b = 0; b < 8 * W * bytes; b += 64) {
            _mm_prefetch(ahead + k * W * bytes + b, _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int n = 0; n < W; n++) {
            w[n] = load_eight(weight, dtype, n * weight_stride + k);
        }
#pragma GCC unroll 4
        for (int m = 0; m < R; m++) {
            __m256 u = _mm256_loadu_ps(x + m * x_stride + k);
#pragma GCC unroll 8
            for (int n = 0; n < W; n++) {
                sum[m * W + n] = _mm256_fmadd_ps(u, w[n], sum[m * W + n]);
            }
        }
    }
    if (k < K) {
        for (int n = 0; n < W; n++) {
            w[n] = load_tail(weight, dtype, n * weight_stride + k, K - k);
        }
        for (int m = 0; m < R; m++) {
            __m256 u = load_tail(x, BD_F32, m * x_stride + k, K - k);
            for (int n = 0; n < W; n++) {
                sum[m * W + n] = _mm256_fmadd_ps(u, w[n], sum[m * W + n]);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
#pragma GCC unroll 8
        for (int n = 0; n < W; n++) {
            out[m * out_stride + n] = fold(sum[m * W + n]);
        }
    }
}

/* W weights x M rows, in tiles of rows as equal as may be. */
INLINE void
stream_weights(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
               int64_t weight_stride, int64_t K, float *out, int64_t out_stride, const int W)
{
#define TILE(R)                                                                  \
    case R:                                                                      \
        stream_tile(x + m * x_stride, x_stride, weight, dtype, weight_stride, K, \
                    out + m * out_stride, out_stride, W, R);                     \
        m += R;                                                                  \
        break
    for (int64_t m = 0; m < M;) {
        const int64_t n_left = M - m;
        switch (n_left == 5 || n_left == 6 || n_left == 9 ? 3 : n_left) {
            TILE(1);
            TILE(2);
            TILE(3);
            default:
                TILE(4);
        }
    }
#undef TILE
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
    for (; n + 3 <= n_rows; n += 3, row += 3 * row_bytes) {
        stream_weights(x, x_stride, M, row, dtype, weight_stride, K, out + n, out_stride, 3);
    }
    for (; n < n_rows; n++, row += row_bytes) {
        stream_weights(x, x_stride, M, row, dtype, weight_stride, K, out + n, out_stride, 1);
    }
}

void
bd_stream_rows_avx2(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
                    int64_t weight_stride, int64_t n_rows, int64_t K, float *out,
                    int64_t out_stride)
{
    BD_BY_DTYPE(dtype, T,
                stream_typed(x, x_stride, M, weight, T, weight_stride, n_rows, K, out, out_stride));
}

/* ---- transposed ------------------------------------------------------------------------------- */

/* Eight columns a register: a column's bit moves to the top of its lane and chooses q or -q. */
void
bd_transposed_strip_avx2(const uint32_t *sign, int64_t n_lines, const int16_t *q, int32_t *z)
{
    __m256 plus[BD_STRIP_ROWS], minus[BD_STRIP_ROWS];
    __m256i shift[4], sum[4];
    for (int i = 0; i < BD_STRIP_ROWS; i++) {
        plus[i] = _mm256_castsi256_ps(_mm256_set1_epi32(q[i]));
        minus[i] = _mm256_castsi256_ps(_mm256_set1_epi32(-q[i]));
    }
    for (int j = 0; j < 4; j++) {
        shift[j] = _mm256_sub_epi32(_mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24),
                                    _mm256_set1_epi32(8 * j));
    }
    for (int64_t l = 0; l < n_lines; l++, sign += BD_STRIP_ROWS, z += BD_WORD_BITS) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sum[j] = _mm256_loadu_si256((const void *)(z + 8 * j));
        }
#pragma GCC unroll 16
        for (int i = 0; i < BD_STRIP_ROWS; i++) {
            const __m256i word = _mm256_set1_epi32((int32_t)sign[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m256 top = _mm256_castsi256_ps(_mm256_sllv_epi32(word, shift[j]));
                const __m256 value = _mm256_blendv_ps(minus[i], plus[i], top);
                sum[j] = _mm256_add_epi32(sum[j], _mm256_castps_si256(value));
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            _mm256_storeu_si256((void *)(z + 8 * j), sum[j]);
        }
    }
}

AVX2_END

#endif /* __x86_64__ */
