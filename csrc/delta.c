/* delta.c - extraction of sign planes and scales, and expansion, over rows and threads.
 *
 * One pass over base and finetuned makes signs, sums of |d| and the base's checksum. Sums are fp64 in 16 lanes (k mod 16) of a row,
 * folded 8, 4, 2, 1, rows ascending: no thread or instruction set can change them.
 *
 * Memory: with more planes, one fp32 row a worker; for one scale a tensor and for rank 1 (delta_rank1.c)
 * every further pass makes the residual anew from base and finetuned. Nothing is as large as [N, K]. */
#include "delta.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "checksum.h"
#include "dtype.h"
#include "float_state.h"
#include "integers.h"
#include "pool.h"

#define TASK_ELEMENTS 131072     /* at least, in whole strips: some 40 us */
#define STREAMED_BYTES 0x2000000 /* 32 MB: outputs that no cache keeps bypass it */

/* ---- rows ------------------------------------------------------------------------------------- */

static int64_t
bad_row(const bd_extraction *x)
{
    return __atomic_load_n(&x->bad_row, __ATOMIC_RELAXED);
}

/* Remembers the first row that is not finite. */
static void
note_bad_row(bd_extraction *x, int64_t row)
{
    int64_t first = bad_row(x);
    while (row < first && !__atomic_compare_exchange_n(&x->bad_row, &first, row, 1,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

/* Signs of plane 0 and sums of row n; d into residual when not NULL. */
static int
extract_first(const bd_extraction *x, int64_t n, float *residual, double lanes[16],
              bd_crc_chains *checksum)
{
    return x->ctx->kernels->extract_row(bd_element(x->base, n, 0), x->base->dtype,
                                        bd_element(x->finetuned, n, 0), x->finetuned->dtype, x->K,
                                        residual, bd_row_words(x, 0, n), lanes, checksum);
}

/* All planes of row n, one scale a row. */
static int
extract_all(bd_extraction *x, int64_t n, float *residual, bd_crc_chains *checksum)
{
    double lanes[16] = {0};
    if (extract_first(x, n, residual, lanes, checksum)) {
        return 1;
    }
    float scale = (float)(bd_fold_lanes(lanes) / (double)x->K);
    x->scale[n] = scale;
    for (int p = 1; p < x->P; p++) {
        double sums[16] = {0};
        x->ctx->kernels->residual_row(residual, bd_row_words(x, p - 1, n), scale, NULL, x->K,
                                      bd_row_words(x, p, n), sums);
        scale = (float)(bd_fold_lanes(sums) / (double)x->K);
        x->scale[p * x->N + n] = scale;
    }
    return 0;
}

/* Plane p of row n, whose sum of |residual| is kept. */
static int
extract_plane(bd_extraction *x, int64_t n, int p, float *residual, bd_crc_chains *checksum)
{
    double lanes[16] = {0};
    if (p == 0) {
        int is_bad = extract_first(x, n, NULL, lanes, checksum);
        x->row_sums[n] = bd_fold_lanes(lanes);
        return is_bad;
    }
    bd_residual_piece(x, n, 0, x->K, p - 1, residual);
    int is_tensor = x->form == BD_SCALE_TENSOR;
    float row = is_tensor ? x->scale[p - 1] : x->scale[(p - 1) * x->N + n];
    const float *column = x->column == NULL ? NULL : x->column + (p - 1) * x->K;
    x->ctx->kernels->residual_row(residual, bd_row_words(x, p - 1, n), row, column, x->K,
                                  bd_row_words(x, p, n), lanes);
    x->row_sums[n] = bd_fold_lanes(lanes);
    return !isfinite(x->row_sums[n]);
}

/* ---- strips and passes ------------------------------------------------------------------------ */

/* Rows beyond N are zero bits. */
static void
clear_last_strip(bd_extraction *x, int p)
{
    if (x->N % BD_STRIP_ROWS != 0) {
        size_t strip_words = (size_t)(x->n_lines * BD_STRIP_ROWS);
        uint32_t *strip = bd_row_words(x, p, x->N / BD_STRIP_ROWS * BD_STRIP_ROWS);
        memset(strip, 0, strip_words * sizeof *strip);
    }
}

/* One row of the pass. The row before is summed meanwhile: it is still in the caches, and its sum
 * takes other units of the processor. */
static int
extract_one(bd_extraction *x, int64_t n, float *residual, bd_crc_chains *checksum)
{
    return x->form == BD_SCALE_ROW ? extract_all(x, n, residual, checksum)
                                   : extract_plane(x, n, x->plane, residual, checksum);
}

static void
extract_strips(void *argument, int64_t index, int worker)
{
    bd_extraction *x = argument;
    int64_t begin = index * x->rows_per_task, end = min_i64(begin + x->rows_per_task, x->N);
    if (bad_row(x) < begin) {
        return;
    }
    bd_float_state state = bd_set_float_state();
    float *residual = x->residuals == NULL ? NULL : x->residuals + worker * x->residual_stride;
    int has_checksum = x->checksums != NULL && x->plane == 0;
    bd_crc_chains chains;
    uint32_t crc = 0;
    for (int64_t n = begin; n < end; n++) {
        int is_summing = has_checksum && n > begin;
        if (is_summing) {
            bd_crc_begin_row(&x->crc_plan, crc, bd_element(x->base, n - 1, 0), &chains);
        }
        if (extract_one(x, n, residual, is_summing ? &chains : NULL)) {
            note_bad_row(x, n);
            break;
        }
        if (is_summing) {
            crc = bd_crc_end_row(&x->crc_plan, &chains);
        }
    }
    if (has_checksum) {
        x->checksums[index] =
            bd_crc32c(crc, bd_element(x->base, end - 1, 0), (size_t)x->crc_plan.n_bytes);
    }
    bd_restore_float_state(state);
}

/* One scale a tensor: the mean over all rows, ascending. */
static void
set_tensor_scale(bd_extraction *x, int p)
{
    bd_float_state state = bd_set_float_state();
    double sum = 0.0;
    for (int64_t n = 0; n < x->N; n++) {
        sum += x->row_sums[n];
    }
    x->scale[p] = (float)(sum / ((double)x->N * (double)x->K));
    bd_restore_float_state(state);
}

static bd_status
extract_passes(bd_extraction *x)
{
    for (int p = 0; p < x->P; p++) {
        clear_last_strip(x, p);
    }
    int n_passes = x->form == BD_SCALE_ROW ? 1 : x->P;
    for (x->plane = 0; x->plane < n_passes; x->plane++) {
        bd_parallel(x->ctx->pool, x->n_tasks, extract_strips, x);
        if (bad_row(x) < x->N) {
            return BD_ERR_NONFINITE;
        }
        if (x->form == BD_SCALE_TENSOR) {
            set_tensor_scale(x, x->plane);
        } else if (x->form == BD_SCALE_RANK1) {
            bd_fit_rank1(x, x->plane);
        }
    }
    return BD_OK;
}

/* ---- the whole call --------------------------------------------------------------------------- */

/* First element of the bad row that is not finite: of d, or, where rank-1 scales went beyond fp32, of
 * what the planes before left of it. */
static void
find_bad_position(const bd_extraction *x, bd_position *bad)
{
    int64_t n = bad_row(x);
    const void *base = bd_element(x->base, n, 0), *finetuned = bd_element(x->finetuned, n, 0);
    *bad = (bd_position){.row = n, .column = 0, .in_base = -1};
    if (x->plane > 0) {
        bd_residual_piece(x, n, 0, x->K, x->plane, x->residuals);
        while (bad->column + 1 < x->K && bd_is_finite(x->residuals[bad->column])) {
            bad->column++;
        }
        return;
    }
    for (int64_t k = 0; k < x->K; k++) {
        float b = bd_load(base, x->base->dtype, k);
        float f = bd_load(finetuned, x->finetuned->dtype, k);
        if (!bd_is_finite(f - b)) {
            bad->column = k;
            bad->in_base = !bd_is_finite(b) ? 1 : !bd_is_finite(f) ? 0 : -1;
            return;
        }
    }
}

static uint32_t
join_checksums(const bd_extraction *x)
{
    uint64_t row_bytes = (uint64_t)x->K * bd_dtype_bytes(x->base->dtype);
    uint32_t crc = 0, shift = bd_crc32c_shift((uint64_t)x->rows_per_task * row_bytes);
    for (int64_t i = 0; i < x->n_tasks; i++) {
        int64_t n_rows = min_i64(x->rows_per_task, x->N - i * x->rows_per_task);
        if (n_rows < x->rows_per_task) {
            shift = bd_crc32c_shift((uint64_t)n_rows * row_bytes);
        }
        crc = bd_crc32c_join(crc, shift, x->checksums[i]);
    }
    return crc;
}

/* Not empty; for free(). */
static void *
allocate_aligned(size_t n_bytes)
{
    return aligned_alloc(64, (n_bytes + 64) / 64 * 64);
}

/* Scratch of the call: NULL stays NULL where the form needs none. */
static bd_status
allocate(bd_extraction *x, int wants_checksum)
{
    int n_workers = bd_pool_size(x->ctx->pool);
    int has_residuals = x->P > 1 || x->form == BD_SCALE_RANK1;
    if (has_residuals) {
        x->residual_stride = bd_n_lines(x->K) * BD_WORD_BITS;
        size_t n_bytes = (size_t)(n_workers * x->residual_stride) * sizeof(float);
        x->residuals = allocate_aligned(n_bytes);
    }
    if (x->form != BD_SCALE_ROW) {
        x->row_sums = allocate_aligned((size_t)x->N * sizeof(double));
    }
    if (x->form == BD_SCALE_RANK1) {
        x->fit_column = allocate_aligned((size_t)x->K * sizeof(double));
    }
    if (wants_checksum) {
        bd_crc_plan_row(&x->crc_plan, x->K * (int64_t)bd_dtype_bytes(x->base->dtype));
        x->checksums = allocate_aligned((size_t)x->n_tasks * sizeof(uint32_t));
    }
    if ((has_residuals && x->residuals == NULL) ||
        (x->form != BD_SCALE_ROW && x->row_sums == NULL) ||
        (x->form == BD_SCALE_RANK1 && x->fit_column == NULL) ||
        (wants_checksum && x->checksums == NULL)) {
        return BD_ERR_MEMORY;
    }
    return BD_OK;
}

static void
clear_outputs(const bd_extraction *x, uint32_t *base_crc32c)
{
    size_t n_scales = (size_t)(x->form == BD_SCALE_TENSOR ? x->P : x->P * x->N);
    memset(x->sign, 0, (size_t)(x->P * x->plane_words) * sizeof *x->sign);
    memset(x->scale, 0, n_scales * sizeof *x->scale);
    for (int64_t i = 0; x->column != NULL && i < x->P * x->K; i++) {
        x->column[i] = 1.0f;
    }
    if (base_crc32c != NULL) {
        *base_crc32c = 0;
    }
}

bd_status
bd_extract(const bd_context *ctx, const bd_matrix *base, const bd_matrix *finetuned, int P,
           bd_scale_form form, uint32_t *sign, float *scale, float *column, uint32_t *base_crc32c,
           bd_position *bad)
{
    int64_t N = base->n_rows, K = base->n_columns;
    bd_extraction x = {.ctx = ctx,
                       .base = base,
                       .finetuned = finetuned,
                       .P = P,
                       .form = form,
                       .sign = sign,
                       .scale = scale,
                       .column = form == BD_SCALE_RANK1 ? column : NULL,
                       .N = N,
                       .K = K,
                       .n_lines = bd_n_lines(K),
                       .bad_row = N,
                       .plane_words = bd_plane_words(N, K)};
    if (N == 0 || K == 0) {
        clear_outputs(&x, base_crc32c);
        return BD_OK;
    }
    int64_t n_strips = (TASK_ELEMENTS + BD_STRIP_ROWS * K - 1) / (BD_STRIP_ROWS * K);
    x.rows_per_task = BD_STRIP_ROWS * max_i64(1, n_strips);
    x.n_tasks = (N + x.rows_per_task - 1) / x.rows_per_task;
    bd_status status = allocate(&x, base_crc32c != NULL);
    if (status == BD_OK) {
        status = extract_passes(&x);
    }
    if (status == BD_ERR_NONFINITE) {
        find_bad_position(&x, bad);
    }
    if (status == BD_OK && base_crc32c != NULL) {
        *base_crc32c = join_checksums(&x);
    }
    free(x.residuals);
    free(x.row_sums);
    free(x.fit_column);
    free(x.checksums);
    return status;
}

/* ---- expansion -------------------------------------------------------------------------------- */

typedef struct {
    const bd_context *ctx;
    const bd_matrix *base; /* or NULL */
    const bd_delta *delta;
    const bd_matrix *out;
    int64_t row_begin, row_end, rows_per_task;
    int is_streamed;
} expansion;

static void
expand_rows(void *argument, int64_t index, int worker)
{
    (void)worker;
    const expansion *x = argument;
    const bd_delta *delta = x->delta;
    int64_t n_lines = bd_n_lines(delta->K);
    int64_t begin = x->row_begin + index * x->rows_per_task;
    int64_t end = min_i64(begin + x->rows_per_task, x->row_end);
    bd_float_state state = bd_set_float_state();
    for (int64_t n = begin; n < end; n++) {
        const uint32_t *words = delta->sign + n / BD_STRIP_ROWS * n_lines * BD_STRIP_ROWS;
        x->ctx->kernels->expand_row(
            x->base == NULL ? NULL : bd_element(x->base, n, 0),
            x->base == NULL ? BD_F32 : x->base->dtype, words + n % BD_STRIP_ROWS,
            bd_plane_words(delta->N, delta->K), delta->P, delta->row + n, delta->N, delta->column,
            delta->K, bd_element(x->out, n - x->row_begin, 0), x->out->dtype, x->is_streamed);
    }
#if defined(__x86_64__)
    if (x->is_streamed) {
        _mm_sfence(); /* stores that bypass the caches have no order without it */
    }
#endif
    bd_restore_float_state(state);
}

bd_status
bd_expand(const bd_context *ctx, const bd_matrix *base, const bd_delta *delta, int64_t row_begin,
          int64_t row_end, const bd_matrix *out)
{
    int64_t n_rows = row_end - row_begin;
    if (n_rows == 0 || delta->K == 0) {
        return BD_OK;
    }
    int64_t n_bytes = n_rows * delta->K * (int64_t)bd_dtype_bytes(out->dtype);
    int is_in_place = base != NULL && base->data == out->data;
    expansion x = {.ctx = ctx,
                   .base = base,
                   .delta = delta,
                   .out = out,
                   .row_begin = row_begin,
                   .row_end = row_end,
                   .rows_per_task = max_i64(1, TASK_ELEMENTS / delta->K),
                   .is_streamed = n_bytes >= STREAMED_BYTES && !is_in_place};
    bd_parallel(ctx->pool, (n_rows + x.rows_per_task - 1) / x.rows_per_task, expand_rows, &x);
    return BD_OK;
}
