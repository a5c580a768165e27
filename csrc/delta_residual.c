/* delta_residual.c - what planes leave of a difference, and sums in lanes: for delta.c and delta_rank1.c. */
#include "delta.h"

#include "dtype.h"

double
bd_fold_lanes(double lanes[16])
{
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            lanes[i] += lanes[i + width];
        }
    }
    return lanes[0];
}

void
bd_residual_piece(const bd_extraction *x, int64_t n, int64_t begin, int64_t end, int p,
                  float *residual)
{
    const bd_kernels *kernels = x->ctx->kernels;
    double unused[16] = {0};
    kernels->extract_row(bd_element(x->base, n, begin), x->base->dtype,
                         bd_element(x->finetuned, n, begin), x->finetuned->dtype, end - begin,
                         residual, NULL, unused, NULL);
    for (int plane = 0; plane < p; plane++) {
        const float *column = x->column == NULL ? NULL : x->column + plane * x->K + begin;
        float row = x->form == BD_SCALE_TENSOR ? x->scale[plane] : x->scale[plane * x->N + n];
        kernels->residual_row(residual,
                              bd_row_words(x, plane, n) + begin / BD_WORD_BITS * BD_STRIP_ROWS, row,
                              column, end - begin, NULL, NULL);
    }
}
