/* calibrate.c - signs that minimise ||X (D - Q)^T|| for given scales, Q[n, k] = sum_p +-row_p column_p.
 *
 * H = X^T X = V diag V^T, V unit upper triangular, in the order in which columns are visited, so
 *     ||X (D - Q)^T||^2 = sum_n sum_k diag[k] (d[n, k] - q[n, k] + sum_{j<k} V[j, k] (d - q)[n, j])^2
 * and column after column q takes the level nearest to r = d + sum V (d - q): the error feedback of
 * GPTQ (arXiv 2210.17323), which needs no inverse in this form. Rows are independent: a task is one
 * strip of 16, its columns' errors stay in cache. The order of every sum is fixed: j ascending. */
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "float_state.h"
#include "kernels.h"
#include "pool.h"

enum { STRIP = BD_STRIP_ROWS, MAX_LEVELS = 1 << BD_MAX_PLANES, GROUP = BD_FEEDBACK_COLUMNS };

typedef struct {
    const bd_kernels *kernels;
    const bd_fit_args *args;
    int64_t N, K, n_lines, plane_words;
    char *scratch; /* [workers, scratch_bytes] */
    int64_t scratch_bytes;
} fit;

/* Levels of 16 rows at column k: the planes' terms summed in order, as bd_expand does; bit p of the
 * index is plane p's sign. */
static void
fill_levels(const fit *fit, int64_t first_row, int64_t k, float (*levels)[STRIP])
{
    const bd_fit_args *args = fit->args;
    for (int p = 0; p < args->P; p++) {
        for (int64_t i = 0; i < STRIP; i++) {
            const int64_t n = first_row + i < fit->N ? first_row + i : fit->N - 1;
            const float row = args->row[p * fit->N + n];
            const float scale = args->column == NULL ? row : row * args->column[p * fit->K + k];
            for (int c = (1 << p) - 1; c >= 0; c--) { /* downwards: level c itself is used last */
                const float before = levels[c][i];
                levels[c | 1 << p][i] = p == 0 ? scale : before + scale;
                levels[c][i] = p == 0 ? -scale : before - scale;
            }
        }
    }
}

/* e = d, r = what is wanted: the nearest level, of equal ones that with the highest index, to
 * codes; e becomes d - level. */
static void
choose(int n_levels, float (*levels)[STRIP], const float *r, float *e, int32_t *codes)
{
    float best[STRIP], chosen[STRIP];
    for (int i = 0; i < STRIP; i++) {
        const float level = levels[n_levels - 1][i], away = r[i] - level;
        best[i] = away < 0 ? -away : away;
        chosen[i] = level;
        codes[i] = n_levels - 1;
    }
    for (int c = n_levels - 2; c >= 0; c--) {
        for (int i = 0; i < STRIP; i++) {
            const float level = levels[c][i], away = r[i] - level;
            const float distance = away < 0 ? -away : away;
            const int is_nearer = distance < best[i];
            best[i] = is_nearer ? distance : best[i];
            chosen[i] = is_nearer ? level : chosen[i];
            codes[i] = is_nearer ? c : codes[i];
        }
    }
    for (int i = 0; i < STRIP; i++) {
        e[i] -= chosen[i];
    }
}

/* The bits of column k of a strip, for its rows below N. */
static void
store_bits(const fit *fit, int64_t s, int64_t k, const int32_t *codes)
{
    const int64_t n_left = fit->N - s * STRIP, n = n_left < STRIP ? n_left : STRIP;
    uint32_t *line = fit->args->sign + (s * fit->n_lines + k / BD_WORD_BITS) * STRIP;
    for (int p = 0; p < fit->args->P; p++, line += fit->plane_words) {
        for (int64_t i = 0; i < n; i++) {
            line[i] |= (uint32_t)(codes[i] >> p & 1) << k % BD_WORD_BITS;
        }
    }
}

/* d of a strip in visiting order, [K, 16]; rows beyond N are zero. */
static void
gather(const fit *fit, int64_t s, float *e)
{
    const bd_matrix *d = fit->args->d;
    memset(e, 0, (size_t)(fit->K * STRIP) * sizeof *e);
    for (int64_t i = 0; i < STRIP && s * STRIP + i < fit->N; i++) {
        const float *row = (const float *)d->data + (s * STRIP + i) * d->row_stride;
        for (int64_t at = 0; at < fit->K; at++) {
            e[at * STRIP + i] = row[fit->args->order[at]];
        }
    }
}

static void
strip_task(void *argument, int64_t s, int worker)
{
    const fit *fit = argument;
    const bd_fit_args *args = fit->args;
    const int64_t K = fit->K;
    float (*levels)[STRIP] = (void *)(fit->scratch + worker * fit->scratch_bytes);
    float *e = levels[MAX_LEVELS];
    const bd_float_state saved = bd_set_float_state();
    gather(fit, s, e);
    for (int p = 0; p < args->P; p++) {
        memset(args->sign + p * fit->plane_words + s * fit->n_lines * STRIP, 0,
               (size_t)(fit->n_lines * STRIP) * sizeof *args->sign);
    }
    for (int64_t k = 0; k < K; k += GROUP) {
        float r[GROUP * STRIP] = {0};
        const int64_t n = K - k < GROUP ? K - k : GROUP;
        memcpy(r, e + k * STRIP, (size_t)(n * STRIP) * sizeof *r);
        if (args->factor != NULL) {
            fit->kernels->feedback(args->factor + k * K, K, n, e, k, r);
        }
        for (int64_t c = 0; c < n; c++) {
            int32_t codes[STRIP];
            for (int64_t j = k; args->factor != NULL && j < k + c; j++) {
                const float factor = args->factor[(k + c) * K + j];
                for (int i = 0; i < STRIP; i++) {
                    r[c * STRIP + i] += factor * e[j * STRIP + i];
                }
            }
            const int64_t column = args->order[k + c];
            if (args->column != NULL || k + c == 0) {
                fill_levels(fit, s * STRIP, column, levels);
            }
            choose(1 << args->P, levels, r + c * STRIP, e + (k + c) * STRIP, codes);
            store_bits(fit, s, column, codes);
        }
    }
    bd_restore_float_state(saved);
}

bd_status
bd_fit_signs(const bd_context *ctx, const bd_fit_args *args)
{
    const int64_t N = args->d->n_rows, K = args->d->n_columns;
    fit fit = {.kernels = ctx->kernels,
               .args = args,
               .N = N,
               .K = K,
               .n_lines = bd_n_lines(K),
               .plane_words = bd_plane_words(N, K),
               .scratch_bytes = (MAX_LEVELS + K) * STRIP * (int64_t)sizeof(float)};
    for (int64_t k = 0; k < K; k++) {
        if (args->order[k] < 0 || args->order[k] >= K) {
            return BD_ERR_ARGUMENT;
        }
    }
    char *allocated = malloc((size_t)(bd_pool_size(ctx->pool) * fit.scratch_bytes + 64));
    if (allocated == NULL) {
        return BD_ERR_MEMORY;
    }
    fit.scratch = (void *)(((uintptr_t)allocated + 63) / 64 * 64);
    bd_parallel(ctx->pool, bd_n_strips(N), strip_task, &fit);
    free(allocated);
    return BD_OK;
}

static void
feedback(const float *factor, int64_t stride, int64_t n_columns, const float *e, int64_t n,
         float *r)
{
    for (int64_t c = 0; c < n_columns; c++, factor += stride, r += STRIP) {
        float sum[STRIP];
        memcpy(sum, r, sizeof sum);
        for (int64_t j = 0; j < n; j++) {
            for (int i = 0; i < STRIP; i++) {
                sum[i] += factor[j] * e[j * STRIP + i];
            }
        }
        memcpy(r, sum, sizeof sum);
    }
}

void
bd_fill_generic_calibrate(bd_kernels *table)
{
    table->feedback = feedback;
}
