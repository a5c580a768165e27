/* linear_generic.c - the inner loops of linear.c in plain C: what the faster sets must equal. */
#include <stddef.h>
#include <string.h>

#include "dtype.h"
#include "kernels.h"

/* ---- quantize -------------------------------------------------------------------------------- */

static inline float
scaled(const void *x, bd_dtype dtype, const float *column, int64_t k)
{
    float u = bd_load(x, dtype, k);
    return column == NULL ? u : u * column[k];
}

static inline int
quantize_typed(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
               int16_t *q, int *exponent)
{
    /* Without their signs, fp32 numbers are ordered like their bits. */
    uint32_t largest = 0;
    for (int64_t k = 0; k < K; k++) {
        uint32_t magnitude = bd_float_bits(scaled(x, dtype, column, k)) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7F800000u) {
        return 1;
    }
    int e = largest == 0 ? 0 : (int)(largest >> 23) - 126;
    if (e < BD_MIN_EXPONENT) {
        e = BD_MIN_EXPONENT;
    }
    *exponent = e;
    const float factor = bd_bits_float((uint32_t)(127 + 15 - e) << 23);
    const float integers = 12582912.0f; /* 1.5 * 2^23: sums near it are rounded to integers */
    for (int64_t k = 0; k < K; k++) {
        float rounded = (scaled(x, dtype, column, k) * factor + integers) - integers;
        q[k] = (int16_t)(rounded > 32767.0f ? 32767.0f : rounded);
    }
    memset(q + K, 0, (size_t)(K_padded - K) * sizeof *q);
    return 0;
}

static int
quantize(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
         int16_t *q, int *exponent)
{
    BD_BY_DTYPE(dtype, T, return quantize_typed(x, T, column, K, K_padded, q, exponent));
}

/* ---- products ---------------------------------------------------------------------------------
 *
 * sum of +-q = 2 * (sum of q under the bits) - (sum of q). prepared: q, contiguous. */

static int64_t
plain_prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    return n_rows * n_lines * BD_WORD_BITS * (int64_t)sizeof(int16_t);
}

static int64_t
plain_scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    (void)n_strips, (void)n_lines, (void)n_rows;
    return 0;
}

static void
plain_prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    const int64_t n_columns = n_lines * BD_WORD_BITS;
    int16_t *out = prepared;
    for (int64_t m = 0; m < n_rows; m++) {
        memcpy(out + m * n_columns, q + m * q_stride, (size_t)n_columns * sizeof *q);
    }
}

/* The 16 rows of a strip side by side, so that compilers make vectors of them. */
static void
plain_strip(const uint32_t *sign, int64_t n_lines, const int16_t *q, int32_t *z)
{
    uint32_t under[BD_STRIP_ROWS] = {0},
             total = 0; /* twice the sum may wrap, the result does not */
    for (int64_t l = 0; l < n_lines; l++, sign += BD_STRIP_ROWS, q += BD_WORD_BITS) {
        for (int j = 0; j < BD_WORD_BITS; j++) {
            const uint32_t value = (uint32_t)(int32_t)q[j];
            for (int i = 0; i < BD_STRIP_ROWS; i++) {
                under[i] += (0u - ((sign[i] >> j) & 1u)) & value;
            }
            total += value;
        }
    }
    for (int i = 0; i < BD_STRIP_ROWS; i++) {
        z[i] = (int32_t)(2u * under[i] - total);
    }
}

static void
plain_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
              const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    const int16_t *q = prepared;
    (void)scratch;
    for (int64_t s = 0; s < n_strips; s++) {
        for (int64_t m = 0; m < n_rows; m++) {
            plain_strip(sign + s * strip_stride, n_lines, q + m * n_lines * BD_WORD_BITS,
                        z + m * z_stride + s * BD_STRIP_ROWS);
        }
    }
}

/* ---- base products of few rows ---------------------------------------------------------------- */

enum { LANES = 16 };

static inline float
dot_typed(const float *x, const void *weight, bd_dtype dtype, int64_t K)
{
    float lane[LANES] = {0};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        for (int i = 0; i < LANES; i++) {
            lane[i] += x[k + i] * bd_load(weight, dtype, k + i);
        }
    }
    for (int i = 0; k < K; k++, i++) {
        lane[i] += x[k] * bd_load(weight, dtype, k);
    }
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            lane[i] += lane[i + half];
        }
    }
    return lane[0];
}

static void
stream_rows(const float *x, int64_t x_stride, int64_t M, const void *weight, bd_dtype dtype,
            int64_t weight_stride, int64_t n_rows, int64_t K, float *out, int64_t out_stride)
{
    for (int64_t n = 0; n < n_rows; n++) {
        const void *row = (const char *)weight + n * weight_stride * (int64_t)bd_dtype_bytes(dtype);
        for (int64_t m = 0; m < M; m++) {
            const float *u = x + m * x_stride;
            out[m * out_stride + n] = dtype == BD_F32   ? dot_typed(u, row, BD_F32, K)
                                      : dtype == BD_F16 ? dot_typed(u, row, BD_F16, K)
                                                        : dot_typed(u, row, BD_BF16, K);
        }
    }
}

/* ---- transposed ------------------------------------------------------------------------------- */

static void
transposed_strip(const uint32_t *sign, int64_t n_lines, const int16_t *q, int32_t *z)
{
    for (int64_t l = 0; l < n_lines; l++, sign += BD_STRIP_ROWS, z += BD_WORD_BITS) {
        for (int i = 0; i < BD_STRIP_ROWS; i++) {
            for (int j = 0; j < BD_WORD_BITS; j++) {
                z[j] += (sign[i] >> j) & 1u ? q[i] : -q[i];
            }
        }
    }
}

void
bd_fill_generic_linear(bd_kernels *table)
{
    static const bd_product plain = {
        .name = "plain",
        .max_rows = INT64_MAX,
        .prepared_bytes = plain_prepared_bytes,
        .scratch_bytes = plain_scratch_bytes,
        .prepare = plain_prepare,
        .product = plain_product,
    };
    table->isa = "generic";
    table->quantize = quantize;
    table->stream_rows = stream_rows;
    table->transposed_strip = transposed_strip;
    table->products[0] = plain;
    table->products[1] = (bd_product){0};
}
