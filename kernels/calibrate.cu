/* calibrate.cu - signs that minimise ||X (D - Q)^T|| for given scales: the inner loop of csrc/calibrate.c.
 *
 * Columns in order: r = d[k] + sum_{j<k} V[j, k] e[j], j ascending, each product and sum rounded; the level
 * nearest to r is chosen, e[k] = d[k] - level. Rows are independent: a block takes a strip of 16 rows, a
 * half-warp a row, and goes over panels of 64 columns. First the panel's sums over all columns before, as a
 * product of tiles in shared memory: a thread has 4 columns of its row, so that 4 steps of j are 5 loads of
 * 16 bytes for 32 multiplications and additions. Then the panel itself, column after column, without leaving
 * the half-warp: its 16 threads share the levels among them and update the columns that follow.
 *
 * K^2 / 2 sums a row, two rounded operations each: 4096 x 4096 is 7e10 of them, against 64 MB of V that
 * come from the L2 for each strip: arithmetic is the bound. */
#include "gpu.h"
#include "cuda.h"
#include "levels.h"

namespace
{

enum {
    ROWS = BD_STRIP_ROWS,
    LANES = 16, /* threads of a row */
    THREADS = ROWS * LANES,
    OWN = 4, /* columns of a thread: lane, lane + 16, ... */
    PANEL = OWN * LANES,
    DEPTH = 32,          /* j of a tile */
    STRIDE = DEPTH + 4,  /* of its rows: float4 reads of 8 lanes hit 32 banks */
    TRIANGLE = PANEL + 1 /* likewise */
};

struct fit_job {
    bd_matrix d;
    const float *factor; /* or NULL */
    const int64_t *order;
    const float *row, *column;
    uint32_t *sign;
    int P;
    int64_t N, K, n_lines, plane_words;
    float *errors;    /* [strips, 16, K_padded] */
    int64_t K_padded; /* to PANEL */
};

struct shared_tiles {
    float factor[2][PANEL][STRIDE];
    float error[2][ROWS][STRIDE];
    float triangle[PANEL][TRIANGLE]; /* V among the panel's own columns */
    float column[BD_MAX_PLANES][PANEL];
    int order[PANEL]; /* -1: no such column */
};

/* A thread's place. */
struct worker {
    int i, lane;   /* row of the strip, thread of the row */
    int64_t n;     /* row of d; beyond the last: of no consequence */
    float *errors; /* of its row */
};

/* Columns j .. j + 31 of V for the panel and of e, into tile `at`. */
__device__ void
fill_tile(const fit_job &job, shared_tiles *tiles, int64_t panel, int64_t j, int at)
{
    const bool is_aligned = job.K % 4 == 0 && reinterpret_cast<uintptr_t>(job.factor) % 16 == 0;
    const int64_t strip = blockIdx.x;
    for (int unit = static_cast<int>(threadIdx.x); unit < PANEL * DEPTH / 4; unit += THREADS) {
        const int c = unit / (DEPTH / 4), first = unit % (DEPTH / 4) * 4;
        const bool has_column = panel + c < job.K;
        const float *from = job.factor + (has_column ? (panel + c) * job.K + j + first : 0);
        float *to = &tiles->factor[at][c][first];
        if (is_aligned) {
            bd_copy_async16(to, from, has_column ? 16 : 0);
        } else {
            for (int i = 0; i < 4; i++) {
                to[i] = has_column ? __ldg(from + i) : 0.0f;
            }
        }
    }
    for (int unit = static_cast<int>(threadIdx.x); unit < ROWS * DEPTH / 4; unit += THREADS) {
        const int i = unit / (DEPTH / 4), first = unit % (DEPTH / 4) * 4;
        bd_copy_async16(&tiles->error[at][i][first],
                        job.errors + (strip * ROWS + i) * job.K_padded + j + first);
    }
    bd_copy_async_commit();
}

/* r += sum of V[j, k] e[j] over one tile, j ascending. */
__device__ __forceinline__ void
add_tile(const shared_tiles *tiles, const worker &own, int at, float r[OWN])
{
    BD_UNROLL
    for (int j = 0; j < DEPTH; j += 4) {
        const float4 error = *reinterpret_cast<const float4 *>(&tiles->error[at][own.i][j]);
        BD_UNROLL
        for (int q = 0; q < OWN; q++) {
            const float4 factor =
                *reinterpret_cast<const float4 *>(&tiles->factor[at][own.lane + LANES * q][j]);
            r[q] = __fadd_rn(r[q], __fmul_rn(factor.x, error.x));
            r[q] = __fadd_rn(r[q], __fmul_rn(factor.y, error.y));
            r[q] = __fadd_rn(r[q], __fmul_rn(factor.z, error.z));
            r[q] = __fadd_rn(r[q], __fmul_rn(factor.w, error.w));
        }
    }
}

/* All columns before the panel. The next tile is copied while one is added. */
__device__ void
add_columns_before(const fit_job &job, shared_tiles *tiles, const worker &own, int64_t panel,
                   float r[OWN])
{
    if (panel > 0) {
        fill_tile(job, tiles, panel, 0, 0);
    }
    for (int64_t j = 0; j < panel; j += DEPTH) {
        const int at = static_cast<int>(j / DEPTH % 2);
        if (j + DEPTH < panel) {
            fill_tile(job, tiles, panel, j + DEPTH, 1 - at);
            bd_copy_async_wait<1>();
        } else {
            bd_copy_async_wait<0>();
        }
        __syncthreads();
        add_tile(tiles, own, at, r);
        __syncthreads();
    }
}

/* The panel's own V, its columns' places and scales. */
__device__ void
load_panel(const fit_job &job, shared_tiles *tiles, int64_t panel)
{
    const int thread = static_cast<int>(threadIdx.x);
    for (int c = thread; c < PANEL; c += THREADS) {
        const int64_t column = panel + c < job.K ? __ldg(job.order + panel + c) : -1;
        tiles->order[c] = column >= 0 && column < job.K ? static_cast<int>(column) : -1;
    }
    __syncthreads();
    for (int at = thread; job.column != NULL && at < job.P * PANEL; at += THREADS) {
        const int p = at / PANEL, c = at % PANEL, column = tiles->order[c];
        tiles->column[p][c] = column < 0 ? 0.0f : __ldg(job.column + p * job.K + column);
    }
    for (int at = thread; job.factor != NULL && at < PANEL * PANEL; at += THREADS) {
        const int c = at / PANEL, before = at % PANEL;
        const bool is_there = before < c && panel + c < job.K;
        tiles->triangle[c][before] =
            is_there ? __ldg(job.factor + (panel + c) * job.K + panel + before) : 0.0f;
    }
    __syncthreads();
}

/* Column c of the panel: chosen, stored, and taken into the columns after it. */
__device__ __forceinline__ void
fit_column(const fit_job &job, const shared_tiles *tiles, const worker &own, int64_t panel, int c,
           const float row[BD_MAX_PLANES], float want, float d, float r[OWN])
{
    float scale[BD_MAX_PLANES];
    BD_UNROLL
    for (int p = 0; p < BD_MAX_PLANES; p++) {
        scale[p] =
            job.column != NULL && p < job.P ? __fmul_rn(row[p], tiles->column[p][c]) : row[p];
    }
    const int code = bd_nearest<LANES>(want, own.lane, job.P, scale);
    const float error = __fsub_rn(d, bd_level_of(code, job.P, scale));
    const int column = tiles->order[c];
    if (own.lane == c % LANES) {
        own.errors[panel + c] = error;
    }
    if (own.lane < job.P && own.n < job.N && column >= 0 && (code >> own.lane & 1)) {
        /* each bit is set once: adding it is setting it, and needs no answer */
        const int64_t line = static_cast<int64_t>(blockIdx.x) * job.n_lines + column / BD_WORD_BITS;
        atomicAdd(job.sign + own.lane * job.plane_words + line * ROWS + own.i,
                  1u << column % BD_WORD_BITS);
    }
    if (job.factor != NULL) {
        BD_UNROLL
        for (int q = 0; q < OWN; q++) {
            const int after = own.lane + LANES * q;
            if (after > c) {
                r[q] = __fadd_rn(r[q], __fmul_rn(tiles->triangle[after][c], error));
            }
        }
    }
}

/* The panel's columns, one after the other. */
__device__ void
fit_panel(const fit_job &job, const shared_tiles *tiles, const worker &own, int64_t panel,
          const float row[BD_MAX_PLANES], const float d[OWN], float r[OWN])
{
    BD_UNROLL
    for (int q = 0; q < OWN; q++) {
        for (int lane = 0; lane < LANES && panel + q * LANES + lane < job.K; lane++) {
            const float want = __shfl_sync(0xFFFFFFFFu, r[q], lane, LANES);
            const float own_d = __shfl_sync(0xFFFFFFFFu, d[q], lane, LANES);
            fit_column(job, tiles, own, panel, q * LANES + lane, row, want, own_d, r);
        }
    }
}

__device__ void
clear_signs(const fit_job &job)
{
    const int64_t words = job.n_lines * ROWS;
    for (int p = 0; p < job.P; p++) {
        uint32_t *strip = job.sign + p * job.plane_words + blockIdx.x * words;
        for (int64_t at = threadIdx.x; at < words; at += THREADS) {
            strip[at] = 0;
        }
    }
}

__global__ void
__launch_bounds__(THREADS, 2) fit_strip(const fit_job job)
{
    BD_SHARED(shared_tiles, tiles);
    worker own;
    own.i = static_cast<int>(threadIdx.x / LANES);
    own.lane = static_cast<int>(threadIdx.x % LANES);
    own.n = static_cast<int64_t>(blockIdx.x) * ROWS + own.i;
    own.errors = job.errors + own.n * job.K_padded;
    const int64_t n = own.n < job.N ? own.n : job.N - 1;
    float row[BD_MAX_PLANES];
    BD_UNROLL
    for (int p = 0; p < BD_MAX_PLANES; p++) {
        row[p] = p < job.P ? __ldg(job.row + p * job.N + n) : 0.0f;
    }
    clear_signs(job);
    for (int64_t panel = 0; panel < job.K; panel += PANEL) {
        float d[OWN], r[OWN];
        load_panel(job, tiles, panel);
        BD_UNROLL
        for (int q = 0; q < OWN; q++) {
            const int column = tiles->order[own.lane + LANES * q];
            d[q] =
                column < 0
                    ? 0.0f
                    : __ldg(static_cast<const float *>(job.d.data) + n * job.d.row_stride + column);
            r[q] = d[q];
        }
        if (job.factor != NULL) {
            add_columns_before(job, tiles, own, panel, r);
        }
        fit_panel(job, tiles, own, panel, row, d, r);
        __syncthreads();
    }
}

} /* namespace */

extern "C" size_t
bd_cuda_fit_workspace_bytes(int64_t N, int64_t K)
{
    return static_cast<size_t>(bd_n_strips(N) * ROWS * ((K + PANEL - 1) / PANEL * PANEL)) *
           sizeof(float);
}

extern "C" bd_status
bd_cuda_fit_signs(const bd_cuda_context *ctx, const bd_fit_args *args, void *workspace)
{
    fit_job job = {};
    job.d = *args->d;
    job.factor = args->factor;
    job.order = args->order;
    job.row = args->row;
    job.column = args->column;
    job.sign = args->sign;
    job.P = args->P;
    job.N = args->d->n_rows;
    job.K = args->d->n_columns;
    job.n_lines = bd_n_lines(job.K);
    job.plane_words = bd_plane_words(job.N, job.K);
    job.errors = static_cast<float *>(workspace);
    job.K_padded = (job.K + PANEL - 1) / PANEL * PANEL;
    if (job.P < 1 || job.P > BD_MAX_PLANES || job.N > INT32_MAX || job.K > INT32_MAX) {
        return BD_ERR_ARGUMENT;
    }
    if (job.N == 0 || job.K == 0) {
        return BD_OK;
    }
    return BD_LAUNCH(fit_strip, dim3(static_cast<unsigned>(bd_n_strips(job.N))), dim3(THREADS),
                     sizeof(shared_tiles), ctx->stream, job);
}
