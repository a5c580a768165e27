/* calibrate.c - signs that minimise ||X (D - Q)^T|| for given scales, Q[n, k] = sum_p +-row_p column_p.
 *
 * H = X^T X = V diag V^T, V unit upper triangular, in the order in which columns are visited, so
 *     ||X (D - Q)^T||^2 = sum_n sum_k diag[k] (d[n, k] - q[n, k] + sum_{j<k} V[j, k] (d - q)[n, j])^2
 * and column after column q takes the level nearest to r = d + sum V (d - q): the error feedback of
 * GPTQ (arXiv 2210.17323), which needs no inverse in this form. Rows are independent: a task is a few
 * strips of 16. The order of every sum is fixed: j ascending. */
#include <stdlib.h>
#include <string.h>

#include "calibrate.h"
#include "float_state.h"
#include "kernels.h"
#include "pool.h"

enum {
    STRIP = BD_STRIP_ROWS,
    GROUP = BD_FEEDBACK_COLUMNS,
    TILE = 2,    /* strips of a task: what is read of the factor serves all of them */
    BLOCK = 64,  /* columns whose feedback from the columns before is summed first */
    ERRORS = 128 /* of a strip at a time: 8 KB, which stay in L1 */
};

typedef struct {
    const bd_kernels *kernels;
    const bd_fit_args *args;
    bd_scales scales;
    int64_t N, K, n_lines, plane_words;
    char *scratch; /* [workers, scratch_bytes]: a `space`, then its errors */
    int64_t scratch_bytes;
} fit;

/* A worker's own, for one tile. */
typedef struct {
    bd_lanes levels[TILE][BD_MAX_LEVELS];
    bd_lanes wanted[TILE][BLOCK]; /* r */
    bd_lanes errors[];            /* e: [TILE, K], d before its turn comes */
} space;

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

/* wanted = d + what the columns before the block feed back. */
static void
feed_block(const fit *fit, int64_t n_strips, int64_t begin, int64_t n, space *space)
{
    const float *factor = fit->args->factor;
    for (int64_t t = 0; t < n_strips; t++) {
        memcpy(space->wanted[t], space->errors + t * fit->K + begin, (size_t)n * sizeof(bd_lanes));
    }
    for (int64_t j = 0; factor != NULL && j < begin; j += ERRORS) {
        const int64_t n_errors = begin - j < ERRORS ? begin - j : ERRORS;
        for (int64_t t = 0; t < n_strips; t++) {
            for (int64_t c = 0; c < n; c += GROUP) {
                fit->kernels->feedback(factor + (begin + c) * fit->K + j, fit->K,
                                       n - c < GROUP ? n - c : GROUP, space->errors[t * fit->K + j],
                                       n_errors, space->wanted[t][c]);
            }
        }
    }
}

/* The block's columns of one strip, each after those before it in the block. */
static void
choose_block(const fit *fit, int64_t s, int64_t t, int64_t begin, int64_t n, space *space)
{
    const bd_fit_args *args = fit->args;
    bd_lanes *levels = space->levels[t], *errors = space->errors + t * fit->K + begin;
    for (int64_t c = 0; c < n; c++) {
        float *r = space->wanted[t][c];
        const float *factor =
            args->factor + (args->factor == NULL ? 0 : (begin + c) * fit->K + begin);
        if (args->factor != NULL && c % GROUP == 0) {
            fit->kernels->feedback(factor, fit->K, n - c < GROUP ? n - c : GROUP, errors[0], c, r);
        }
        for (int64_t j = c / GROUP * GROUP; args->factor != NULL && j < c; j++) {
            for (int i = 0; i < STRIP; i++) {
                r[i] += factor[j] * errors[j][i];
            }
        }
        bd_lanes chosen;
        int32_t codes[STRIP];
        const int64_t k = args->order[begin + c];
        if (args->column != NULL || begin + c == 0) {
            bd_fill_levels(&fit->scales, s * STRIP, k, levels);
        }
        bd_choose(1 << args->P, levels, r, chosen, codes);
        for (int i = 0; i < STRIP; i++) {
            errors[c][i] -= chosen[i];
        }
        store_bits(fit, s, k, codes);
    }
}

static void
tile_task(void *argument, int64_t tile, int worker)
{
    const fit *fit = argument;
    space *space = (void *)(fit->scratch + worker * fit->scratch_bytes);
    const int64_t first = tile * TILE, n_left = bd_n_strips(fit->N) - first;
    const int64_t n_strips = n_left < TILE ? n_left : TILE;
    const bd_float_state saved = bd_set_float_state();
    for (int64_t t = 0; t < n_strips; t++) {
        gather(fit, first + t, space->errors[t * fit->K]);
        for (int p = 0; p < fit->args->P; p++) {
            memset(fit->args->sign + p * fit->plane_words + (first + t) * fit->n_lines * STRIP, 0,
                   (size_t)(fit->n_lines * STRIP) * sizeof *fit->args->sign);
        }
    }
    for (int64_t k = 0; k < fit->K; k += BLOCK) {
        const int64_t n = fit->K - k < BLOCK ? fit->K - k : BLOCK;
        feed_block(fit, n_strips, k, n, space);
        for (int64_t t = 0; t < n_strips; t++) {
            choose_block(fit, first + t, t, k, n, space);
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
               .scales = {args->row, args->column, N, K, args->P},
               .N = N,
               .K = K,
               .n_lines = bd_n_lines(K),
               .plane_words = bd_plane_words(N, K),
               .scratch_bytes = (int64_t)sizeof(space) + TILE * K * (int64_t)sizeof(bd_lanes)};
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
    bd_parallel(ctx->pool, (bd_n_strips(N) + TILE - 1) / TILE, tile_task, &fit);
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
