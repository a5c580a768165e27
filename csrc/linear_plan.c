/* linear_plan.c - see linear_plan.h. */
#include "linear_plan.h"

#include <stdlib.h>
#include <string.h>

#include "integers.h"
#include "pool.h"

enum {
    PASS_ELEMENTS = 1 << 20, /* of x: 12 bytes each, prepared for AVX2 */
    MIN_SEGMENT = 16,        /* rows of one tenant, to share what is read of its signs */
    MAX_SEGMENT = 64,        /* rows whose sums of a chunk stay in the L2 cache */
    TILE_STRIPS = 8,         /* strips that kernels like to have at once */
    TASKS_A_WORKER = 4,      /* so that a slow worker delays little */
};

/* Takes bytes of an arena that is first measured (base == NULL), then allocated. */
typedef struct {
    char *base;
    int64_t used;
} arena;

static void *
carve(arena *memory, int64_t bytes)
{
    char *start = memory->base == NULL ? NULL : memory->base + memory->used;
    memory->used += (bytes + 63) / 64 * 64;
    return start;
}

/* ---- layout ----------------------------------------------------------------------------------- */

static void
split_into_segments(bd_linear_job *job, int n_workers)
{
    const int64_t *ids = job->args->tenant_ids;
    /* One worker prepares a segment: there should be one for each. */
    const int64_t n_fair = (job->n_rows / n_workers + 15) / 16 * 16;
    const int64_t n_most = min_i64(MAX_SEGMENT, max_i64(MIN_SEGMENT, n_fair));
    job->n_segments = 0;
    for (int64_t first = 0, end; first < job->n_rows; first = end) {
        bd_segment *next = &job->segments[job->n_segments++];
        const int64_t tenant = ids[job->order[first]];
        for (end = first + 1; end < job->n_rows && end - first < n_most; end++) {
            if (ids[job->order[end]] != tenant) {
                break;
            }
        }
        *next = (bd_segment){.tenant = tenant, .first = first, .n_rows = end - first};
        if (tenant >= 0) {
            const bd_delta *delta = &job->args->deltas[tenant];
            next->n_prepared = delta->column == NULL ? 1 : delta->P;
            next->product = job->kernels->products;
            while (next->n_rows > next->product->max_rows) {
                next->product++;
            }
        }
    }
}

static int64_t
prepared_bytes(const bd_segment *segment, int64_t n_lines)
{
    return (segment->product->prepared_bytes(n_lines, segment->n_rows) + 63) / 64 * 64;
}

static void
lay_out_segment(const bd_linear_job *job, bd_segment *segment, arena *memory)
{
    if (segment->tenant < 0) {
        return;
    }
    if (job->args->precision == BD_FIXED16) {
        const int64_t n_full = job->n_lines / BD_BLOCK_LINES,
                      n_rest = job->n_lines % BD_BLOCK_LINES;
        segment->block_bytes = prepared_bytes(segment, BD_BLOCK_LINES);
        segment->plane_bytes = n_full * segment->block_bytes + prepared_bytes(segment, n_rest);
    } else {
        segment->plane_bytes = segment->n_rows * job->n_lines * BD_WORD_BITS * 4;
    }
    segment->prepared = carve(memory, segment->n_prepared * segment->plane_bytes);
    segment->exponents = carve(memory, segment->n_prepared * segment->n_rows * 4);
}

static void
lay_out_buffers(const bd_linear_job *job, bd_buffers *buffers, arena *memory)
{
    const int64_t n_columns = job->chunk_strips * BD_STRIP_ROWS;
    const int64_t n_lines = min_i64(job->n_lines, BD_BLOCK_LINES);
    int64_t n_rows = 0, product_bytes = 0;
    for (int64_t s = 0; s < job->n_segments; s++) {
        const bd_segment *segment = &job->segments[s];
        n_rows = max_i64(n_rows, segment->n_rows);
        if (segment->product != NULL) {
            product_bytes = max_i64(
                product_bytes,
                segment->product->scratch_bytes(job->chunk_strips, n_lines, segment->n_rows));
        }
    }
    buffers->q = carve(memory, n_rows * job->n_lines * BD_WORD_BITS * 2);
    buffers->product = carve(memory, product_bytes);
    buffers->z = carve(memory, n_rows * n_columns * 4);
    buffers->wide = carve(memory, job->n_lines > BD_BLOCK_LINES ? n_rows * n_columns * 8 : 0);
    buffers->sum = carve(memory, n_rows * n_columns * 4);
    buffers->bias = carve(memory, n_columns * 4);
    buffers->base = carve(memory, job->args->weight == NULL ? 0 : job->n_rows * n_columns * 4);
}

/* Measured when memory->base is NULL. */
static void
lay_out(bd_linear_job *job, int n_workers, arena *memory)
{
    for (int64_t s = 0; s < job->n_segments; s++) {
        lay_out_segment(job, &job->segments[s], memory);
    }
    if (job->args->weight != NULL) {
        /* A KB beyond a multiple of 4 KB, lest the rows share a few sets of the L1 cache. */
        job->x_stride = (job->K + 1023) / 1024 * 1024 + 256;
        job->x = carve(memory, job->n_rows * job->x_stride * 4);
    }
    job->buffers = carve(memory, n_workers * (int64_t)sizeof(bd_buffers));
    for (int w = 0; w < n_workers; w++) {
        bd_buffers unused, *own = job->buffers == NULL ? &unused : &job->buffers[w];
        lay_out_buffers(job, own, memory);
    }
}

/* Whether threads can gain more than they cost to wake: about 30 us of work. */
static int
is_worth_threads(const bd_linear_job *job)
{
    const double columns = (double)job->N * (double)job->K;
    double work = job->args->weight == NULL ? 0.0 : columns * 2.0 / 10e3;
    for (int64_t r = 0; r < job->n_rows; r++) {
        const int64_t tenant = job->args->tenant_ids[job->order[r]];
        work += tenant < 0 ? 0.0 : job->args->deltas[tenant].P * columns / 50e3;
    }
    return work > 30.0;
}

static int64_t
strips_a_task(int64_t n_strips, int n_workers)
{
    int64_t n = min_i64(BD_MAX_CHUNK, n_strips);
    if (n_workers > 1) {
        n = min_i64(n, max_i64(1, n_strips / (TASKS_A_WORKER * n_workers)));
    }
    return n > TILE_STRIPS ? n / TILE_STRIPS * TILE_STRIPS : n;
}

bd_status
bd_plan_pass(const bd_context *ctx, bd_linear_job *job)
{
    job->pool = is_worth_threads(job) ? ctx->pool : NULL;
    const int n_workers = bd_pool_size(job->pool);
    split_into_segments(job, n_workers);
    job->chunk_strips = strips_a_task(bd_n_strips(job->N), n_workers);
    arena memory = {.base = NULL};
    lay_out(job, n_workers, &memory);
    job->allocated = malloc((size_t)memory.used + 64);
    if (job->allocated == NULL) {
        return BD_ERR_MEMORY;
    }
    memory = (arena){.base = (char *)(((uintptr_t)job->allocated + 63) / 64 * 64)};
    lay_out(job, n_workers, &memory);
    return BD_OK;
}

bd_status
bd_group_rows(const int64_t *tenant_ids, int64_t M, int64_t n_deltas, int64_t *starts,
              int64_t *order)
{
    memset(starts, 0, (size_t)(n_deltas + 2) * sizeof *starts);
    for (int64_t m = 0; m < M; m++) {
        if (tenant_ids[m] < -1 || tenant_ids[m] >= n_deltas) {
            return BD_ERR_ARGUMENT;
        }
        starts[tenant_ids[m] + 2]++; /* the last one counts for nothing */
    }
    for (int64_t t = 1; t <= n_deltas; t++) {
        starts[t] += starts[t - 1];
    }
    for (int64_t m = 0; m < M; m++) {
        order[starts[tenant_ids[m] + 1]++] = m;
    }
    return BD_OK;
}

int64_t
bd_pass_rows(int64_t K)
{
    return min_i64(BD_PASS_ROWS, max_i64(BD_STREAM_ROWS, PASS_ELEMENTS / max_i64(K, 1)));
}
