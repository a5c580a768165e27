/* linear_transposed.c - products with the transposed signs, for gradients:
 *   g[m] = sum_p (sum_n u_p[n] S_p[n, :]) * column_p,  u_p = fp32(dy[m] * row_p)
 *
 * The integer definition of linear.c, over n. Few rows of a tenant: a first round of tasks quantises
 * every row for every plane; a second goes over chunks of lines (32 columns each) for all rows. Many
 * rows: the signs are transposed, and the rest is linear.c's, with row and column scales exchanged. */
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "float_state.h"
#include "kernels.h"
#include "pool.h"

enum {
    PASS_ROWS = 64,   /* rows quantised at once: bounds the memory of a call */
    CHUNK_LINES = 16, /* one KB of every strip */
    MANY_ROWS = 3,    /* of a tenant: transposing its signs takes as long as two products */
    GROUP_LINES = 8,  /* lines that a task transposes */
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

/* ---- many rows: the transposed signs -----------------------------------------------------------
 */

typedef struct {
    const uint32_t *from; /* [strips of N][lines of K][16] */
    uint32_t *to;         /* [strips of K][lines of N][16] */
} plane;

typedef struct {
    const plane *planes;
    int64_t N, K;
} transposition;

/* Word c of the result holds the bits c of the 32 words: halves, quarters, ... change places. */
static void
transpose_words(uint32_t word[BD_WORD_BITS])
{
    uint32_t mask = 0x0000FFFFu;
    for (int half = 16; half > 0; half /= 2, mask ^= mask << half) {
        for (int first = 0; first < BD_WORD_BITS; first += 2 * half) {
            for (int i = first; i < first + half; i++) {
                const uint32_t change = ((word[i] >> half) ^ word[i + half]) & mask;
                word[i] ^= change << half;
                word[i + half] ^= change;
            }
        }
    }
}

static void
transpose_task(void *argument, int64_t index, int worker)
{
    const transposition *job = argument;
    const int64_t n_strips = bd_n_strips(job->N), n_lines = bd_n_lines(job->K);
    const int64_t n_strips_out = bd_n_strips(job->K), n_lines_out = bd_n_lines(job->N);
    const int64_t n_groups = n_lines / GROUP_LINES;
    const plane *plane = &job->planes[index / n_groups];
    const int64_t first = index % n_groups * GROUP_LINES;
    (void)worker;
    for (int64_t s = 0; s < 2 * n_lines_out; s += 2) {
        for (int64_t l = first; l < first + GROUP_LINES && 2 * l < n_strips_out; l++) {
            uint32_t word[BD_WORD_BITS] = {0};
            for (int64_t i = 0; i < 2 && s + i < n_strips; i++) {
                memcpy(word + i * BD_STRIP_ROWS,
                       plane->from + ((s + i) * n_lines + l) * BD_STRIP_ROWS, 64);
            }
            transpose_words(word);
            for (int64_t i = 0; i < 2 && 2 * l + i < n_strips_out; i++) {
                memcpy(plane->to + ((2 * l + i) * n_lines_out + s / 2) * BD_STRIP_ROWS,
                       word + i * BD_STRIP_ROWS, 64);
            }
        }
    }
}

/* The deltas with rows and columns exchanged: those of [T] that have rows, others are left out.
 * signs: room for all their planes; planes: what is to be transposed. */
static void
exchange(const bd_delta *deltas, int64_t n_deltas, const unsigned char *is_used, const float *ones,
         uint32_t *signs, plane *planes, bd_delta *exchanged)
{
    int64_t n_planes = 0;
    for (int64_t t = 0; t < n_deltas; t++) {
        const bd_delta *delta = &deltas[t];
        const int64_t words = bd_plane_words(delta->K, delta->N);
        exchanged[t] = (bd_delta){.N = delta->K, .K = delta->N, .P = delta->P};
        if (!is_used[t]) {
            continue;
        }
        exchanged[t].sign = signs + n_planes * words;
        exchanged[t].row = delta->column == NULL ? ones : delta->column;
        exchanged[t].column = delta->row;
        for (int p = 0; p < delta->P; p++, n_planes++) {
            planes[n_planes] = (plane){delta->sign + p * bd_plane_words(delta->N, delta->K),
                                       signs + n_planes * words};
        }
    }
}

/* BD_ERR_MEMORY: nothing was done. */
static bd_status
multiply_exchanged(const bd_context *ctx, const job *job, int64_t n_deltas,
                   const unsigned char *is_used, int64_t n_planes)
{
    const int64_t N = job->dy->n_columns, K = job->g->n_columns;
    const int64_t sign_bytes = n_planes * bd_plane_words(K, N) * 4;
    const int64_t plane_bytes = n_planes * (int64_t)sizeof(plane);
    const int64_t delta_bytes = n_deltas * (int64_t)sizeof(bd_delta);
    const int64_t one_bytes = BD_MAX_PLANES * K * 4;
    char *allocated = malloc((size_t)(sign_bytes + plane_bytes + delta_bytes + one_bytes + 64));
    if (allocated == NULL) {
        return BD_ERR_MEMORY;
    }
    uint32_t *signs = (void *)(((uintptr_t)allocated + 63) / 64 * 64);
    plane *planes = (void *)((char *)signs + sign_bytes);
    bd_delta *exchanged = (void *)((char *)planes + plane_bytes);
    float *ones = (void *)((char *)exchanged + delta_bytes);
    for (int64_t k = 0; k < BD_MAX_PLANES * K; k++) {
        ones[k] = 1.0f;
    }
    exchange(job->deltas, n_deltas, is_used, ones, signs, planes, exchanged);
    transposition transposition = {.planes = planes, .N = N, .K = K};
    bd_parallel(ctx->pool, n_planes * bd_n_lines(K) / GROUP_LINES, transpose_task, &transposition);
    const bd_linear_args args = {.x = job->dy,
                                 .deltas = exchanged,
                                 .n_deltas = n_deltas,
                                 .tenant_ids = job->tenant_ids,
                                 .precision = BD_FIXED16,
                                 .y = job->g};
    bd_status status = bd_linear(ctx, &args);
    free(allocated);
    return status;
}

/* Whether the rows share their tenants' signs so often that transposing them pays; then *status. */
static int
try_many(const bd_context *ctx, const job *job, int64_t n_deltas, bd_status *status)
{
    int64_t n_products = 0, n_planes = 0;
    unsigned char *is_used = calloc((size_t)n_deltas + 1, 1);
    if (is_used == NULL) {
        return 0;
    }
    for (int64_t m = 0; m < job->dy->n_rows; m++) {
        const int64_t t = job->tenant_ids[m];
        if (t >= 0) {
            n_products += job->deltas[t].P;
            n_planes += is_used[t] ? 0 : job->deltas[t].P;
            is_used[t] = 1;
        }
    }
    *status = BD_ERR_MEMORY;
    if (n_planes > 0 && n_products >= MANY_ROWS * n_planes) {
        *status = multiply_exchanged(ctx, job, n_deltas, is_used, n_planes);
    }
    free(is_used);
    return *status != BD_ERR_MEMORY; /* without the memory it goes row by row */
}

/* ---- the call ---------------------------------------------------------------------------------- */

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
    bd_status status;
    if (try_many(ctx, &job, n_deltas, &status)) {
        return status;
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
