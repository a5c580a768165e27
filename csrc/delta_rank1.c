/* delta_rank1.c - the rank-1 scale: row [N] times column [K], close to |r| in least squares.
 *
 * r is what the planes before left of d. The column starts at 1; then, SWEEPS times,
 *     row[n]    = sum_k |r[n, k]| column[k] / sum_k column[k]^2
 *     column[k] = sum_n |r[n, k]| row[n]    / sum_n row[n]^2
 * and at last the column is divided by its mean, which the row takes. All in fp64: sums over k in 16
 * lanes (k mod 16) folded 8, 4, 2, 1; sums over n ascending. When every row is 0 the column stays.
 * Rows are shared out over the threads for the first line, columns for the second; r is made anew from
 * base and finetuned each time. */
#include "delta.h"

#include <math.h>
#include <string.h>

#include "float_state.h"
#include "pool.h"

enum {
    SWEEPS = 20,
    COLUMN_BLOCK = 512 /* of a task: 1 KB of bf16 a row, and sums that stay in the L1 cache */
};

typedef struct {
    bd_extraction *x;
    int plane;
    double norm; /* of the other side, squared */
} fit;

static double
sum_of_squares(const double *value, int64_t n)
{
    double lanes[16] = {0};
    for (int64_t i = 0; i < n; i++) {
        lanes[i % 16] += value[i] * value[i];
    }
    return bd_fold_lanes(lanes);
}

/* lanes[k mod 16] += |r[k]| * column[k]. */
static void
dot_lanes(const float *r, const double *column, int64_t K, double lanes[16])
{
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        for (int i = 0; i < 16; i++) {
            lanes[i] += (double)fabsf(r[k + i]) * column[k + i];
        }
    }
    for (int64_t i = 0; k + i < K; i++) {
        lanes[i] += (double)fabsf(r[k + i]) * column[k + i];
    }
}

static void
fit_rows(void *argument, int64_t index, int worker)
{
    const fit *f = argument;
    bd_extraction *x = f->x;
    bd_float_state state = bd_set_float_state();
    float *residual = x->residuals + worker * x->residual_stride;
    int64_t end = (index + 1) * x->rows_per_task;
    for (int64_t n = index * x->rows_per_task; n < x->N && n < end; n++) {
        double lanes[16] = {0};
        bd_residual_piece(x, n, 0, x->K, f->plane, residual);
        dot_lanes(residual, x->fit_column, x->K, lanes);
        x->row_sums[n] = bd_fold_lanes(lanes) / f->norm;
    }
    bd_restore_float_state(state);
}

static void
fit_columns(void *argument, int64_t index, int worker)
{
    const fit *f = argument;
    bd_extraction *x = f->x;
    bd_float_state state = bd_set_float_state();
    float *residual = x->residuals + worker * x->residual_stride;
    double sums[COLUMN_BLOCK] = {0};
    int64_t begin = index * COLUMN_BLOCK, left = x->K - begin;
    int64_t n_columns = left < COLUMN_BLOCK ? left : COLUMN_BLOCK;
    for (int64_t n = 0; n < x->N; n++) {
        double row = x->row_sums[n];
        bd_residual_piece(x, n, begin, begin + n_columns, f->plane, residual);
        for (int64_t k = 0; k < n_columns; k++) {
            sums[k] += (double)fabsf(residual[k]) * row;
        }
    }
    for (int64_t k = 0; k < n_columns; k++) {
        x->fit_column[begin + k] = sums[k] / f->norm;
    }
    bd_restore_float_state(state);
}

/* The fitted scales to fp32, the column with mean 1. */
static void
store_scales(bd_extraction *x, int p)
{
    double lanes[16] = {0};
    for (int64_t k = 0; k < x->K; k++) {
        lanes[k % 16] += x->fit_column[k];
    }
    double mean = bd_fold_lanes(lanes) / (double)x->K;
    for (int64_t k = 0; k < x->K; k++) {
        x->column[p * x->K + k] = (float)(x->fit_column[k] / mean);
    }
    for (int64_t n = 0; n < x->N; n++) {
        x->scale[p * x->N + n] = (float)(x->row_sums[n] * mean);
    }
}

void
bd_fit_rank1(bd_extraction *x, int p)
{
    fit f = {.x = x, .plane = p};
    bd_float_state state = bd_set_float_state();
    for (int64_t k = 0; k < x->K; k++) {
        x->fit_column[k] = 1.0;
    }
    for (int64_t n = 0; n < x->N; n++) {
        x->row_sums[n] /= (double)x->K; /* the pass that packed the signs summed for column = 1 */
    }
    int64_t n_blocks = (x->K + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    for (int sweep = 0; sweep < SWEEPS; sweep++) {
        if (sweep > 0) {
            f.norm = sum_of_squares(x->fit_column, x->K);
            bd_parallel(x->ctx->pool, x->n_tasks, fit_rows, &f);
        }
        f.norm = 0.0;
        for (int64_t n = 0; n < x->N; n++) {
            f.norm += x->row_sums[n] * x->row_sums[n];
        }
        if (f.norm == 0.0) {
            break;
        }
        bd_parallel(x->ctx->pool, n_blocks, fit_columns, &f);
    }
    store_scales(x, p);
    bd_restore_float_state(state);
}
