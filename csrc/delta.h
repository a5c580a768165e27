/* delta.h - what the files delta*.c share of one extraction. Private. */
#ifndef BITDELTA_DELTA_H_
#define BITDELTA_DELTA_H_

#include <stdint.h>

#include "bitdelta.h"
#include "checksum.h"
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const bd_context *ctx;
    const bd_matrix *base, *finetuned; /* [N, K] */
    int P;
    bd_scale_form form;
    uint32_t *sign; /* [P, S, L, 16] */
    float *scale;   /* [P], or [P, N] */
    float *column;  /* [P, K], or NULL */
    int64_t N, K, n_lines, plane_words;

    int64_t rows_per_task, n_tasks; /* whole strips */
    int plane;                      /* of this pass */
    int64_t bad_row;                /* atomic: first row that is not finite; N: none */

    float *residuals; /* [workers, residual_stride], or NULL */
    int64_t residual_stride;
    double *row_sums;    /* [N]: sums of |residual|; rank 1: the fitted row scales */
    double *fit_column;  /* [K], rank 1: the fitted column scales */
    uint32_t *checksums; /* [n_tasks], or NULL */
    bd_crc_plan crc_plan;
} bd_extraction;

/* Word of line 0 of row n in plane p. */
static inline uint32_t *
bd_row_words(const bd_extraction *x, int p, int64_t n)
{
    return x->sign + p * x->plane_words + n / BD_STRIP_ROWS * x->n_lines * BD_STRIP_ROWS +
           n % BD_STRIP_ROWS;
}

/* delta_residual.c */

/* lanes, folded 8, 4, 2, 1. */
double bd_fold_lanes(double lanes[16]);

/* Columns begin .. end - 1 (begin a multiple of 256) of row n of what planes 0 .. p - 1 leave of d; not
 * checked. */
void bd_residual_piece(const bd_extraction *x, int64_t n, int64_t begin, int64_t end, int p,
                       float *residual);

/* delta_rank1.c: scale and column of plane p by alternating least squares. */
void bd_fit_rank1(bd_extraction *x, int p);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_DELTA_H_ */
