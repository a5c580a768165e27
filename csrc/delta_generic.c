/* delta_generic.c - the inner loops of delta.c in scalar C: their definition, and the fallback. */
#include "kernels.h"

#include <math.h>
#include <stddef.h>

#include "dtype.h"
#include "integers.h"

/* s * scale for bit 1 or 0: the sign flips, exactly. */
static inline float
signed_scale(float scale, uint32_t bit)
{
    return bd_bits_float(bd_float_bits(scale) ^ (bit ^ 1u) << 31);
}

static inline float
scale_at(float row, const float *column, int64_t k)
{
    return column == NULL ? row : row * column[k];
}

/* ---- extraction ------------------------------------------------------------------------------- */

/* The sign bits of d [n], n <= 32; lanes[k mod 16] += |d|. */
static uint32_t
pack_word(const float *d, int64_t n, double lanes[16])
{
    uint32_t word = 0;
    for (int64_t j = 0; j < n; j++) {
        word |= (uint32_t)!(d[j] < 0.0f) << j;
        lanes[j % 16] += (double)fabsf(d[j]);
    }
    return word;
}

static int
extract_row(const void *base, bd_dtype base_dtype, const void *finetuned, bd_dtype finetuned_dtype,
            int64_t K, float *residual, uint32_t *words, double lanes[16],
            struct bd_crc_chains *checksum)
{
    (void)checksum;
    float d[BD_WORD_BITS];
    int64_t n_lines = bd_n_lines(K);
    for (int64_t line = 0; line < n_lines; line++) {
        int64_t k = line * BD_WORD_BITS, n = min_i64(K - k, BD_WORD_BITS);
        for (int64_t j = 0; j < n; j++) {
            d[j] = bd_load(finetuned, finetuned_dtype, k + j) - bd_load(base, base_dtype, k + j);
        }
        uint32_t word = pack_word(d, n, lanes);
        if (words != NULL) {
            words[line * BD_STRIP_ROWS] = word;
        }
        if (residual != NULL && n > 0) {
            memcpy(residual + k, d, (size_t)n * sizeof *d);
        }
    }
    for (int lane = 0; lane < 16; lane++) {
        if (!isfinite(lanes[lane])) { /* fp32 terms are too few and too small to overflow fp64 */
            return 1;
        }
    }
    return 0;
}

static void
residual_row(float *residual, const uint32_t *words, float row, const float *column, int64_t K,
             uint32_t *next, double lanes[16])
{
    int64_t n_lines = bd_n_lines(K);
    for (int64_t line = 0; line < n_lines; line++) {
        int64_t k = line * BD_WORD_BITS, n = min_i64(K - k, BD_WORD_BITS);
        uint32_t word = words[line * BD_STRIP_ROWS];
        for (int64_t j = 0; j < n; j++) {
            residual[k + j] -= signed_scale(scale_at(row, column, k + j), word >> j & 1u);
        }
        if (next != NULL) {
            next[line * BD_STRIP_ROWS] = pack_word(residual + k, n, lanes);
        }
    }
}

/* ---- expansion -------------------------------------------------------------------------------- */

static void
expand_row(const void *base, bd_dtype dtype, const uint32_t *words, int64_t plane_stride, int P,
           const float *row, int64_t row_stride, const float *column, int64_t K, void *out,
           bd_dtype out_dtype, int is_streamed)
{
    (void)is_streamed;
    for (int64_t k = 0; k < K; k++) {
        float sum = 0.0f;
        for (int p = 0; p < P; p++) {
            uint32_t word = words[p * plane_stride + k / BD_WORD_BITS * BD_STRIP_ROWS];
            float scale = scale_at(row[p * row_stride], column == NULL ? NULL : column + p * K, k);
            float term = signed_scale(scale, word >> k % BD_WORD_BITS & 1u);
            sum = p == 0 ? term : sum + term;
        }
        bd_store(out, out_dtype, k, (base == NULL ? 0.0f : bd_load(base, dtype, k)) + sum);
    }
}

static void
to_float32(const void *data, bd_dtype dtype, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        out[i] = bd_load(data, dtype, i);
    }
}

void
bd_fill_generic_delta(bd_kernels *table)
{
    table->extract_row = extract_row;
    table->residual_row = residual_row;
    table->expand_row = expand_row;
    table->to_float32 = to_float32;
}
