/* linear_transposed.c - products with the transposed signs, for gradients:
 *   g[m] = sum_p (sum_n u_p[n] S_p[n, :]) * column_p,  u_p = fp32(dy[m] * row_p)
 *
 * The integer definition of linear.c, over n. A first round of tasks quantises every row for every
 * plane; a second goes over chunks of lines (32 columns each) for all rows. */
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "float_state.h"
#include "kernels.h"
#include "pool.h"

enum {
    PASS_ROWS = 64,   /* rows quantised at once: bounds the memory of a call */
    CHUNK_LINES = 16, /* one KB of every strip */
    CHUNK_COLUMNS = CHUNK_LINES * BD_WORD_BITS,
    BLOCK_STRIPS = BD_INT32_COLUMNS / BD_STRIP_ROWS /* strips whose sums fit int32 */
};

#define NONFINITE INT32_MAX /* in place of an exponent */

typedef struct {
    const bd_kernels *kernels;
    const bd_matrix *dy, *g;
    const bd_delta *deltas;
    const int64_t *tenant_ids;
    int64_t first, n_rows; /* of this pass */
    int64_t n_strips, n_lines, max_planes;
    int16_t *q;         /* [n_rows, max_planes, 16 n_strips] */
    int32_t *exponents; /* [n_rows, max_planes], or NONFINITE */
} job;

static void
quantize_task(void *argument, int64_t r, int worker)
{
    const job *job = argument;
    const int64_t tenant = job->tenant_ids[job->first + r], N = job->dy->n_columns;
    const bd_float_state saved = bd_set_float_state();
    (void)worker;
    for (int p = 0; tenant >= 0 && p < job->deltas[tenant].P; p++) {
        const int64_t at = r * job->max_planes + p, N_padded = job->n_strips * BD_STRIP_ROWS;
        int exponent = 0;
        int is_bad = job->kernels->quantize(bd_element(job->dy, job->first + r, 0), job->dy->dtype,
                                            job->deltas[tenant].row + p * N, N, N_padded,
                                            job->q + at * N_padded, &exponent);
        job->exponents[at] = is_bad ? NONFINITE : exponent;
    }
    bd_restore_float_state(saved);
}

/* term[k] = fp32(sum over all strips of +-q), exactly summed, for n_lines lines of a plane. */
static void
sum_strips(const job *job, const uint32_t *sign, int64_t n_lines, const int16_t *q, float *term)
{
    int32_t z[CHUNK_COLUMNS];
    int64_t wide[CHUNK_COLUMNS];
    const int64_t n = n_lines * BD_WORD_BITS, strip_words = job->n_lines * BD_STRIP_ROWS;
    for (int64_t s = 0; s < job->n_strips;) {
        const int64_t end = s + BLOCK_STRIPS < job->n_strips ? s + BLOCK_STRIPS : job->n_strips;
        memset(z, 0, (size_t)n * sizeof *z);
        const int is_first = s == 0;
        for (; s < end; s++) {
            job->kernels->transposed_strip(sign + s * strip_words, n_lines, q + s * BD_STRIP_ROWS,
                                           z);
        }
        for (int64_t k = 0; k < n; k++) {
            wide[k] = is_first ? z[k] : wide[k] + z[k];
        }
    }
    for (int64_t k = 0; k < n; k++) {
        term[k] = job->n_strips <= BLOCK_STRIPS ? (float)z[k] : (float)wide[k];
    }
}

/* Row r, columns k .. k + n - 1: the planes' terms in order, summed in fp32. Returns 0 when some u of
 * the row is not finite. */
static int
sum_planes(const job *job, int64_t r, int64_t k, int64_t n, float *sum)
{
    const bd_delta *delta = &job->deltas[job->tenant_ids[job->first + r]];
    float term[CHUNK_COLUMNS];
    for (int p = 0; p < delta->P; p++) {
        const int64_t at = r * job->max_planes + p, l = k / BD_WORD_BITS;
        if (job->exponents[at] == NONFINITE) {
            return 0;
        }
        const uint32_t *sign =
            delta->sign + p * bd_plane_words(delta->N, delta->K) + l * BD_STRIP_ROWS;
        const int64_t n_left = job->n_lines - l;
        sum_strips(job, sign, n_left < CHUNK_LINES ? n_left : CHUNK_LINES,
                   job->q + at * job->n_strips * BD_STRIP_ROWS, term);
        const float factor = bd_bits_float((uint32_t)(127 - 15 + job->exponents[at]) << 23);
        const float *column = delta->column == NULL ? NULL : delta->column + p * delta->K + k;
        for (int64_t i = 0; i < n; i++) {
            const float z = term[i] * factor, value = column == NULL ? z : z * column[i];
            sum[i] = p == 0 ? value : sum[i] + value;
        }
    }
    return 1;
}

static void
columns_task(void *argument, int64_t index, int worker)
{
    const job *job = argument;
    const int64_t k = index * CHUNK_COLUMNS, n_left = job->g->n_columns - k;
    const int64_t n = n_left < CHUNK_COLUMNS ? n_left : CHUNK_COLUMNS;
    const bd_float_state saved = bd_set_float_state();
    (void)worker;
    for (int64_t r = 0; r < job->n_rows; r++) {
        float sum[CHUNK_COLUMNS] = {0};
        const float quiet_nan = bd_bits_float(0x7FC00000u);
        const int is_finite = job->tenant_ids[job->first + r] < 0 || sum_planes(job, r, k, n, sum);
        void *out = bd_element(job->g, job->first + r, k);
        for (int64_t i = 0; i < n; i++) {
            float value = is_finite && sum[i] == sum[i] ? sum[i] : quiet_nan;
            bd_store(out, job->g->dtype, i, value);
        }
    }
    bd_restore_float_state(saved);
}

bd_status
bd_linear_transposed(const bd_context *ctx, const bd_matrix *dy, const bd_delta *deltas,
                     int64_t n_deltas, const int64_t *tenant_ids, const bd_matrix *g)
{
    const int64_t M = dy->n_rows, K = g->n_columns;
    job job = {.kernels = ctx->kernels,
               .dy = dy,
               .g = g,
               .deltas = deltas,
               .tenant_ids = tenant_ids,
               .n_strips = bd_n_strips(dy->n_columns),
               .n_lines = bd_n_lines(K)};
    for (int64_t m = 0; m < M; m++) {
        if (tenant_ids[m] < -1 || tenant_ids[m] >= n_deltas) {
            return BD_ERR_ARGUMENT;
        }
        const int64_t P = tenant_ids[m] < 0 ? 0 : deltas[tenant_ids[m]].P;
        job.max_planes = P > job.max_planes ? P : job.max_planes;
    }
    if (M == 0 || K == 0) {
        return BD_OK;
    }
    const int64_t n_kept = (M < PASS_ROWS ? M : PASS_ROWS) * job.max_planes;
    const int64_t row_bytes = job.n_strips * BD_STRIP_ROWS * 2;
    char *allocated = malloc((size_t)(n_kept * (row_bytes + 4) + 64));
    if (allocated == NULL) {
        return BD_ERR_MEMORY;
    }
    job.q = (void *)(((uintptr_t)allocated + 63) / 64 * 64);
    job.exponents = (void *)((char *)job.q + n_kept * row_bytes);
    for (job.first = 0; job.first < M; job.first += PASS_ROWS) {
        job.n_rows = M - job.first < PASS_ROWS ? M - job.first : PASS_ROWS;
        const double work = (double)job.n_rows * (double)dy->n_columns * (double)K;
        bd_pool *pool = work > 1e6 ? ctx->pool : NULL; /* about 30 us */
        bd_parallel(job.n_rows > 1 ? pool : NULL, job.n_rows, quantize_task, &job);
        bd_parallel(pool, (K + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS, columns_task, &job);
    }
    free(allocated);
    return BD_OK;
}
