/* linear.c - products with deltas:
 *   y[m] = sum_p term_p(t) + base product + bias, t = tenant_ids[m]   (bitdelta.h, kernels.h)
 *
 * Rows are grouped by tenant into segments. A first round of tasks quantises each segment's rows and
 * prepares them for its product; a second goes over chunks of strips, and each task does everything
 * for its output columns: the streamed base product, all segments, planes, bias and the one rounding.
 * The sums of a row depend neither on the rows beside it nor on the chunks. */
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "float_state.h"
#include "integers.h"
#include "kernels.h"
#include "linear_plan.h"
#include "pool.h"

/* ---- first round: rows of x ------------------------------------------------------------------- */

/* u as fp32, for BD_FLOAT32. Returns 1 when some u is not finite. */
static int
scale_row(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded, float *u)
{
    int is_bad = 0;
    for (int64_t k = 0; k < K; k++) {
        u[k] = column == NULL ? bd_load(x, dtype, k) : bd_load(x, dtype, k) * column[k];
        is_bad |= !bd_is_finite(u[k]);
    }
    memset(u + K, 0, (size_t)(K_padded - K) * sizeof *u);
    return is_bad;
}

static void
prepare_plane(const bd_linear_job *job, const bd_segment *segment, int p, int16_t *q)
{
    const bd_matrix *x = job->args->x;
    const bd_delta *delta = &job->args->deltas[segment->tenant];
    const float *column = delta->column == NULL ? NULL : delta->column + p * job->K;
    const int64_t K_padded = job->n_lines * BD_WORD_BITS;
    char *prepared = segment->prepared + p * segment->plane_bytes;
    for (int64_t r = 0; r < segment->n_rows; r++) {
        const void *row = bd_element(x, job->order[segment->first + r], 0);
        int exponent = 0, is_bad;
        if (job->args->precision == BD_FIXED16) {
            int16_t *out = q + r * K_padded;
            is_bad =
                job->kernels->quantize(row, x->dtype, column, job->K, K_padded, out, &exponent);
            if (is_bad) {
                memset(out, 0, (size_t)K_padded * sizeof *out);
            }
        } else {
            float *out = (float *)(void *)prepared + r * K_padded;
            is_bad = scale_row(row, x->dtype, column, job->K, K_padded, out);
        }
        segment->exponents[p * segment->n_rows + r] = is_bad ? BD_NONFINITE : exponent;
    }
    if (job->args->precision == BD_FIXED16) {
        for (int64_t l = 0; l < job->n_lines; l += BD_BLOCK_LINES) {
            segment->product->prepare(q + l * BD_WORD_BITS, K_padded,
                                      min_i64(job->n_lines - l, BD_BLOCK_LINES), segment->n_rows,
                                      prepared + l / BD_BLOCK_LINES * segment->block_bytes);
        }
    }
}

static void
prepare_task(void *argument, int64_t index, int worker)
{
    const bd_linear_job *job = argument;
    const bd_segment *segment = &job->segments[index];
    const bd_matrix *x = job->args->x;
    const bd_float_state saved = bd_set_float_state();
    for (int64_t r = segment->first; job->x != NULL && r < segment->first + segment->n_rows; r++) {
        const void *row = bd_element(x, job->order[r], 0);
        for (int64_t k = 0; k < job->K; k++) {
            job->x[r * job->x_stride + k] = bd_load(row, x->dtype, k);
        }
    }
    for (int p = 0; p < segment->n_prepared; p++) {
        prepare_plane(job, segment, p, job->buffers[worker].q);
    }
    bd_restore_float_state(saved);
}

/* ---- second round: output columns ------------------------------------------------------------- */

/* Columns of y that a task makes. */
typedef struct {
    int64_t strip, n_strips;
    int64_t n, n_columns; /* n_columns <= 16 n_strips: without the padding of N */
    int64_t stride;       /* of rows in the buffers */
} chunk;

/* The scalar definition of BD_FLOAT32: sum of +-u in fp32, line by line, for a strip and a row. */
static void
float_strip(const uint32_t *sign, int64_t n_lines, const float *u, float *z)
{
    memset(z, 0, BD_STRIP_ROWS * sizeof *z);
    for (int64_t l = 0; l < n_lines; l++, sign += BD_STRIP_ROWS, u += BD_WORD_BITS) {
        float sum[BD_STRIP_ROWS] = {0};
        for (int j = 0; j < BD_WORD_BITS; j++) {
            for (int i = 0; i < BD_STRIP_ROWS; i++) {
                sum[i] += (sign[i] >> j) & 1u ? u[j] : -u[j];
            }
        }
        for (int i = 0; i < BD_STRIP_ROWS; i++) {
            z[i] += sum[i];
        }
    }
}

static void
float_product(const bd_linear_job *job, const bd_segment *segment, const uint32_t *sign,
              const float *u, const chunk *chunk, float *z)
{
    for (int64_t s = 0; s < chunk->n_strips; s++) {
        for (int64_t r = 0; r < segment->n_rows; r++) {
            float_strip(sign + s * job->n_lines * BD_STRIP_ROWS, job->n_lines,
                        u + r * job->n_lines * BD_WORD_BITS,
                        z + r * chunk->stride + s * BD_STRIP_ROWS);
        }
    }
}

/* z, or wide where K needs more than one block of columns. */
static void
fixed_product(const bd_linear_job *job, const bd_segment *segment, const uint32_t *sign,
              const char *prepared, const chunk *chunk, const bd_buffers *own)
{
    const int64_t n_sums = segment->n_rows * chunk->stride;
    for (int64_t l = 0; l < job->n_lines; l += BD_BLOCK_LINES) {
        segment->product->product(sign + l * BD_STRIP_ROWS, job->n_lines * BD_STRIP_ROWS,
                                  chunk->n_strips, min_i64(job->n_lines - l, BD_BLOCK_LINES),
                                  prepared + l / BD_BLOCK_LINES * segment->block_bytes,
                                  segment->n_rows, own->z, chunk->stride, own->product);
        if (job->n_lines > BD_BLOCK_LINES) {
            for (int64_t i = 0; i < n_sums; i++) {
                own->wide[i] = l == 0 ? own->z[i] : own->wide[i] + own->z[i];
            }
        }
    }
}

/* sum = or += (fp32(z) * 2^(exponent - 15)) * scale, over n columns. */
static void
add_term(const bd_linear_job *job, const bd_buffers *own, int64_t at, int exponent,
         const float *scale, int64_t n, int is_first)
{
    float *sum = own->sum + at, term[BD_MAX_CHUNK * BD_STRIP_ROWS];
    const float factor = bd_bits_float((uint32_t)(127 - 15 + exponent) << 23);
    if (job->args->precision == BD_FLOAT32) {
        memcpy(term, own->z + at, (size_t)n * sizeof *term);
    } else if (job->n_lines > BD_BLOCK_LINES) {
        for (int64_t i = 0; i < n; i++) {
            term[i] = (float)own->wide[at + i] * factor;
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            term[i] = (float)own->z[at + i] * factor;
        }
    }
    if (is_first) {
        for (int64_t i = 0; i < n; i++) {
            sum[i] = term[i] * scale[i];
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            sum[i] += term[i] * scale[i];
        }
    }
}

/* All planes of a segment, into own->sum. */
static void
add_planes(const bd_linear_job *job, const bd_segment *segment, const chunk *chunk,
           const bd_buffers *own)
{
    const bd_delta *delta = &job->args->deltas[segment->tenant];
    for (int p = 0; p < delta->P; p++) {
        const int which = segment->n_prepared == 1 ? 0 : p;
        const uint32_t *sign = delta->sign + p * bd_plane_words(job->N, job->K) +
                               chunk->strip * job->n_lines * BD_STRIP_ROWS;
        char *prepared = segment->prepared + which * segment->plane_bytes;
        if (job->args->precision == BD_FIXED16) {
            fixed_product(job, segment, sign, prepared, chunk, own);
        } else {
            float_product(job, segment, sign, (float *)(void *)prepared, chunk,
                          (float *)(void *)own->z);
        }
        for (int64_t r = 0; r < segment->n_rows; r++) {
            const int exponent = segment->exponents[which * segment->n_rows + r];
            add_term(job, own, r * chunk->stride, exponent == BD_NONFINITE ? 0 : exponent,
                     delta->row + p * job->N + chunk->n, chunk->n_columns, p == 0);
        }
    }
}

static int
is_finite_row(const bd_segment *segment, int64_t r)
{
    for (int p = 0; p < segment->n_prepared; p++) {
        if (segment->exponents[p * segment->n_rows + r] == BD_NONFINITE) {
            return 0;
        }
    }
    return 1;
}

static void
store_row(void *out, bd_dtype dtype, const float *values, int64_t n)
{
    if (dtype == BD_F32) {
        memcpy(out, values, (size_t)n * sizeof *values);
    } else if (dtype == BD_F16) {
        for (int64_t i = 0; i < n; i++) {
            bd_store(out, BD_F16, i, values[i]);
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            bd_store(out, BD_BF16, i, values[i]);
        }
    }
}

static void
add_row(float *sum, const void *values, bd_dtype dtype, int64_t n)
{
    if (dtype == BD_F32) {
        for (int64_t i = 0; i < n; i++) {
            sum[i] += ((const float *)values)[i];
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            sum[i] += bd_load(values, dtype, i);
        }
    }
}

/* Row r of a segment: sum (the terms) + base product + bias, rounded into y. */
static void
finish_row(const bd_linear_job *job, const bd_segment *segment, int64_t r, const chunk *chunk,
           const bd_buffers *own)
{
    const bd_linear_args *args = job->args;
    const int64_t m = job->order[segment->first + r], n = chunk->n_columns;
    void *out = bd_element(args->y, m, chunk->n);
    float *sum = own->sum + r * chunk->stride;
    if (segment->tenant < 0) {
        if (args->add) {
            return;
        }
        for (int64_t i = 0; i < n; i++) {
            sum[i] = -0.0f; /* adds nothing, not even a sign */
        }
    }
    if (args->add) {
        add_row(sum, out, args->y->dtype, n);
    } else if (args->product != NULL) {
        add_row(sum, bd_element(args->product, m, chunk->n), BD_F32, n);
    } else if (args->weight != NULL) {
        add_row(sum, own->base + (segment->first + r) * chunk->stride, BD_F32, n);
    } else if (segment->tenant < 0) {
        memset(sum, 0, (size_t)n * sizeof *sum);
    }
    if (args->bias != NULL) {
        add_row(sum, own->bias, BD_F32, n);
    }
    const float quiet_nan = bd_bits_float(0x7FC00000u);
    const int is_finite = is_finite_row(segment, r);
    for (int64_t i = 0; i < n; i++) {
        sum[i] = is_finite && sum[i] == sum[i] ? sum[i] : quiet_nan;
    }
    store_row(out, args->y->dtype, sum, n);
}

static void
linear_task(void *argument, int64_t index, int worker)
{
    const bd_linear_job *job = argument;
    const bd_linear_args *args = job->args;
    const bd_buffers *own = &job->buffers[worker];
    const bd_float_state saved = bd_set_float_state();
    chunk chunk = {.strip = index * job->chunk_strips, .stride = job->chunk_strips * BD_STRIP_ROWS};
    chunk.n_strips = min_i64(job->chunk_strips, bd_n_strips(job->N) - chunk.strip);
    chunk.n = chunk.strip * BD_STRIP_ROWS;
    chunk.n_columns = min_i64(chunk.n_strips * BD_STRIP_ROWS, job->N - chunk.n);
    for (int64_t m = 0; args->weight != NULL && m < job->n_rows; m += BD_STREAM_ROWS) {
        job->kernels->stream_rows(
            job->x + m * job->x_stride, job->x_stride, min_i64(job->n_rows - m, BD_STREAM_ROWS),
            bd_element(args->weight, chunk.n, 0), args->weight->dtype, args->weight->row_stride,
            chunk.n_columns, job->K, own->base + m * chunk.stride, chunk.stride);
    }
    for (int64_t i = 0; args->bias != NULL && i < chunk.n_columns; i++) {
        own->bias[i] = bd_load(args->bias, args->bias_dtype, chunk.n + i);
    }
    for (int64_t s = 0; s < job->n_segments; s++) {
        const bd_segment *segment = &job->segments[s];
        if (segment->tenant >= 0) {
            add_planes(job, segment, &chunk, own);
        }
        for (int64_t r = 0; r < segment->n_rows; r++) {
            finish_row(job, segment, r, &chunk, own);
        }
    }
    bd_restore_float_state(saved);
}

/* ---- the call --------------------------------------------------------------------------------- */

static bd_status
run_pass(const bd_context *ctx, bd_linear_job *job)
{
    bd_status status = bd_plan_pass(ctx, job);
    if (status == BD_OK) {
        const int64_t n_tasks = (bd_n_strips(job->N) + job->chunk_strips - 1) / job->chunk_strips;
        bd_parallel(job->n_segments > 1 ? job->pool : NULL, job->n_segments, prepare_task, job);
        bd_parallel(job->pool, n_tasks, linear_task, job);
        free(job->allocated);
    }
    return status;
}

bd_status
bd_linear(const bd_context *ctx, const bd_linear_args *args)
{
    const int64_t M = args->x->n_rows, T = args->n_deltas;
    if (M == 0 || args->y->n_columns == 0) {
        return BD_OK;
    }
    int64_t *starts = malloc((size_t)(T + 3 + M) * sizeof *starts);
    bd_segment *segments = malloc((size_t)min_i64(M, BD_PASS_ROWS) * sizeof *segments);
    bd_status status = starts == NULL || segments == NULL ? BD_ERR_MEMORY : BD_OK;
    if (status == BD_OK) {
        status = bd_group_rows(args->tenant_ids, M, T, starts, starts + T + 3);
    }
    const int64_t n_pass = bd_pass_rows(args->x->n_columns);
    for (int64_t first = 0; status == BD_OK && first < M; first += n_pass) {
        bd_linear_job pass = {.args = args,
                              .kernels = ctx->kernels,
                              .order = starts + T + 3 + first,
                              .n_rows = min_i64(M - first, n_pass),
                              .N = args->y->n_columns,
                              .K = args->x->n_columns,
                              .n_lines = bd_n_lines(args->x->n_columns),
                              .segments = segments};
        status = run_pass(ctx, &pass);
    }
    free(segments);
    free(starts);
    return status;
}
