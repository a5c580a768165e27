/* sweep.c - every column in turn moves to the level that lowers ||X (D - Q)^T|| most, the others as they are.
 *
 * With H = X^T X and G = (D - Q) H that level is the nearest to q + G / H[k, k]; moving by `change` takes
 * change * H[k] from G's row. Rows are independent. A task is a few strips of 16, so that what is read of
 * H serves many rows; a block of columns is visited before what moved in it is taken from the rest of G.
 * Every element of G loses its terms in the order of the columns, so blocks and tasks change no bit. */
#include <stdlib.h>

#include "calibrate.h"
#include "float_state.h"
#include "kernels.h"
#include "pool.h"

enum {
    STRIP = BD_STRIP_ROWS,
    TILE = 4,            /* strips of a task */
    ROWS = TILE * STRIP, /* of a task */
    BLOCK = 128,         /* columns visited before the rest of G is brought up to date */
    CHUNK = 512 /* columns of G that are brought up to date at a time: their H stays in L2 */
};

typedef struct {
    const bd_kernels *kernels;
    const bd_sweep_args *args;
    bd_scales scales;
    int64_t N, K, n_lines, plane_words;
    struct space *spaces; /* [workers] */
} sweep;

/* A worker's own: what moved in the block at hand. */
typedef struct space {
    bd_lanes levels[BD_MAX_LEVELS];
    int32_t n_moved[ROWS];
    int32_t columns[ROWS][BLOCK]; /* of the block, ascending */
    float changes[ROWS][BLOCK];
} space;

static uint32_t *
words(const sweep *sweep, int p, int64_t s, int64_t k)
{
    return sweep->args->sign + p * sweep->plane_words +
           (s * sweep->n_lines + k / BD_WORD_BITS) * STRIP;
}

static float
distance(float a, float b)
{
    return a - b < 0 ? -(a - b) : a - b;
}

/* Row i of a strip goes to another level of column k; t: the strip's place in the task. */
static void
move(const sweep *sweep, int64_t s, int64_t t, int64_t i, int64_t k, float change, int32_t code,
     space *space)
{
    const bd_sweep_args *args = sweep->args;
    const int64_t K = sweep->K, begin = k / BLOCK * BLOCK, row = t * STRIP + i;
    const int32_t column = (int32_t)(k - begin);
    float *pull = args->pull + (s * STRIP + i) * K;
    for (int p = 0; p < args->P; p++) {
        uint32_t *word = words(sweep, p, s, k) + i;
        *word = (*word & ~(1u << k % BD_WORD_BITS)) | (uint32_t)(code >> p & 1) << k % BD_WORD_BITS;
    }
    if (args->is_diagonal) {
        pull[k] -= change * args->hessian[k];
        return;
    }
    space->columns[row][space->n_moved[row]] = column;
    space->changes[row][space->n_moved[row]++] = change;
    sweep->kernels->take_rows(pull + begin, K - begin < BLOCK ? K - begin : BLOCK,
                              args->hessian + begin * K + begin, K, &column, &change, 1);
}

/* Columns begin .. begin + n - 1 of one strip. */
static void
visit_block(const sweep *sweep, int64_t s, int64_t t, int64_t begin, int64_t n, space *space)
{
    const bd_sweep_args *args = sweep->args;
    const int64_t first = s * STRIP, n_left = sweep->N - first;
    const int64_t n_rows = n_left < STRIP ? n_left : STRIP;
    for (int64_t k = begin; k < begin + n; k++) {
        const float diagonal = args->hessian[args->is_diagonal ? k : k * sweep->K + k];
        int32_t codes[STRIP] = {0};
        bd_lanes now = {0}, want = {0}, level;
        if (args->column != NULL || k == begin) {
            bd_fill_levels(&sweep->scales, first, k, space->levels);
        }
        for (int p = 0; p < args->P; p++) {
            const uint32_t *word = words(sweep, p, s, k);
            for (int i = 0; i < STRIP; i++) {
                codes[i] |= (int32_t)(word[i] >> k % BD_WORD_BITS & 1) << p;
            }
        }
        for (int64_t i = 0; i < n_rows; i++) {
            now[i] = space->levels[codes[i]][i];
            want[i] = now[i] + args->pull[(first + i) * sweep->K + k] / diagonal;
        }
        bd_choose(1 << args->P, space->levels, want, level, codes);
        for (int64_t i = 0; i < n_rows; i++) {
            if (distance(want[i], level[i]) < distance(want[i], now[i]) * 0.9999f) {
                move(sweep, s, t, i, k, level[i] - now[i], codes[i], space);
            }
        }
    }
}

/* Takes what moved in the block from columns from .. to - 1 of the task's rows. */
static void
take_block(const sweep *sweep, int64_t first_row, int64_t n_rows, int64_t begin, int64_t from,
           int64_t to, space *space)
{
    const int64_t K = sweep->K;
    for (int64_t k = from; k < to; k += CHUNK) {
        const int64_t n = to - k < CHUNK ? to - k : CHUNK;
        for (int64_t row = 0; row < n_rows; row++) {
            sweep->kernels->take_rows(sweep->args->pull + (first_row + row) * K + k, n,
                                      sweep->args->hessian + begin * K + k, K, space->columns[row],
                                      space->changes[row], space->n_moved[row]);
        }
    }
}

static void
tile_task(void *argument, int64_t tile, int worker)
{
    const sweep *sweep = argument;
    space *space = &sweep->spaces[worker];
    const int64_t K = sweep->K, first_row = tile * ROWS;
    const int64_t n_rows = sweep->N - first_row < ROWS ? sweep->N - first_row : ROWS;
    const bd_float_state saved = bd_set_float_state();
    for (int64_t begin = 0; begin < K; begin += BLOCK) {
        const int64_t n = K - begin < BLOCK ? K - begin : BLOCK;
        for (int64_t row = 0; row < n_rows; row++) {
            space->n_moved[row] = 0;
        }
        for (int64_t t = 0; t * STRIP < n_rows; t++) {
            visit_block(sweep, tile * TILE + t, t, begin, n, space);
        }
        if (!sweep->args->is_diagonal) {
            take_block(sweep, first_row, n_rows, begin, 0, begin, space);
            take_block(sweep, first_row, n_rows, begin, begin + n, K, space);
        }
    }
    bd_restore_float_state(saved);
}

bd_status
bd_sweep(const bd_context *ctx, const bd_sweep_args *args)
{
    const int64_t N = args->N, K = args->K;
    sweep sweep = {.kernels = ctx->kernels,
                   .args = args,
                   .scales = {args->row, args->column, N, K, args->P},
                   .N = N,
                   .K = K,
                   .n_lines = bd_n_lines(K),
                   .plane_words = bd_plane_words(N, K),
                   .spaces = malloc((size_t)bd_pool_size(ctx->pool) * sizeof(space))};
    if (sweep.spaces == NULL) {
        return BD_ERR_MEMORY;
    }
    bd_parallel(ctx->pool, (N + ROWS - 1) / ROWS, tile_task, &sweep);
    free(sweep.spaces);
    return BD_OK;
}

static void
take_rows(float *g, int64_t n, const float *h, int64_t stride, const int32_t *rows,
          const float *change, int64_t n_rows)
{
    for (int64_t m = 0; m < n_rows; m++) {
        const float *row = h + rows[m] * stride;
        for (int64_t c = 0; c < n; c++) {
            g[c] -= change[m] * row[c];
        }
    }
}

void
bd_fill_generic_sweep(bd_kernels *table)
{
    table->take_rows = take_rows;
}
