/* dtype.c - whole matrices to fp32, in pieces over the pool. */
#include "bitdelta.h"
#include "dtype.h"

#include "float_state.h"
#include "kernels.h"
#include "pool.h"

#define PIECE_ELEMENTS 65536 /* 256 KB of fp32: some 20 us */

typedef struct {
    const bd_context *ctx;
    const bd_matrix *matrix;
    float *out;
    int64_t rows_per_task;
    int64_t pieces_per_row; /* 1 when a task takes whole rows */
} conversion;

static void
convert_piece(void *argument, int64_t index, int worker)
{
    (void)worker;
    const conversion *c = argument;
    const bd_matrix *matrix = c->matrix;
    bd_float_state state = bd_set_float_state();
    int64_t begin = index / c->pieces_per_row * c->rows_per_task;
    int64_t end = begin + c->rows_per_task;
    end = end < matrix->n_rows ? end : matrix->n_rows;
    int64_t column = index % c->pieces_per_row * PIECE_ELEMENTS;
    int64_t n = matrix->n_columns - column;
    n = c->pieces_per_row > 1 && n > PIECE_ELEMENTS ? PIECE_ELEMENTS : n;
    for (int64_t row = begin; row < end; row++) {
        c->ctx->kernels->to_float32(bd_element(matrix, row, column), matrix->dtype, n,
                                    c->out + row * matrix->n_columns + column);
    }
    bd_restore_float_state(state);
}

bd_status
bd_to_float32(const bd_context *ctx, const bd_matrix *matrix, float *out)
{
    if (matrix->n_rows == 0 || matrix->n_columns == 0) {
        return BD_OK;
    }
    conversion c = {.ctx = ctx, .matrix = matrix, .out = out};
    c.pieces_per_row = (matrix->n_columns + PIECE_ELEMENTS - 1) / PIECE_ELEMENTS;
    c.rows_per_task = c.pieces_per_row > 1 ? 1 : PIECE_ELEMENTS / matrix->n_columns;
    int64_t n_groups = (matrix->n_rows + c.rows_per_task - 1) / c.rows_per_task;
    bd_parallel(ctx->pool, n_groups * c.pieces_per_row, convert_piece, &c);
    return BD_OK;
}
