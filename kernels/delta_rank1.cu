/* delta_rank1.cu - the rank-1 scale, row [N] times column [K], close to |r| in least squares: the sums of
 * csrc/delta_rank1.c in the same order.
 *
 * The column starts at 1; then, SWEEPS times,
 *     row[n]    = sum_k |r[n, k]| column[k] / sum_k column[k]^2      (lanes; delta.cu's pass over strips)
 *     column[k] = sum_n |r[n, k]| row[n]    / sum_n row[n]^2         (n ascending)
 * and at last the column is divided by its mean, which the row takes. All in fp64. When every row is 0 the
 * fit ends; the launches that are left do nothing. */
#include "gpu.h"
#include "delta.h"

namespace
{

enum {
    SWEEPS = 20,
    LANES = 32,
    WARPS = 8,
    THREADS = LANES * WARPS,
    WARP_ROWS = 8, /* loads in flight of a thread */
    TILE_ROWS = WARPS * WARP_ROWS
};

/* Σ row[n]^2, one addition after the other. */
__global__ void
__launch_bounds__(LANES) sum_row_squares(const bd_extract_job job)
{
    if (job.state->has_ended) {
        return;
    }
    double sum = 0.0;
    for (int64_t first = 0; first < job.N; first += LANES) {
        const int64_t n = first + threadIdx.x;
        const double own = n < job.N ? job.row_sums[n] : 0.0, square = __dmul_rn(own, own);
        for (int lane = 0; lane < LANES; lane++) {
            sum = __dadd_rn(sum, __shfl_sync(0xFFFFFFFFu, square, lane));
        }
    }
    __syncwarp();
    if (threadIdx.x == 0) {
        job.state->norm = sum;
        job.state->has_ended = sum == 0.0;
    }
}

/* fold of the column, or of its squares; threads 0 .. 15 are the lanes. */
__device__ double
fold_column(const bd_extract_job &job, bool is_squared)
{
    double sum = 0.0;
    for (int64_t k = threadIdx.x; threadIdx.x < 16 && k < job.K; k += 16) {
        const double own = job.fit_column[k];
        sum = __dadd_rn(sum, is_squared ? __dmul_rn(own, own) : own);
    }
    for (int width = 8; width > 0; width /= 2) {
        sum = __dadd_rn(sum, __shfl_down_sync(0xFFFFFFFFu, sum, static_cast<unsigned>(width)));
    }
    return __shfl_sync(0xFFFFFFFFu, sum, 0);
}

__global__ void
__launch_bounds__(LANES) sum_column_squares(const bd_extract_job job)
{
    const double sum = fold_column(job, true);
    if (threadIdx.x == 0 && !job.state->has_ended) {
        job.state->norm = sum;
    }
}

/* 32 columns: eight warps make products of 64 rows, side by side; the first adds them up in order, while
 * the others are at the next 64. */
__global__ void
__launch_bounds__(THREADS) fit_columns(const bd_extract_job job, int p)
{
    BD_SHARED(double, products); /* [2, TILE_ROWS, 32] */
    if (job.state->has_ended) {
        return;
    }
    const int lane = static_cast<int>(threadIdx.x % LANES),
              warp = static_cast<int>(threadIdx.x / LANES);
    const int64_t k = static_cast<int64_t>(blockIdx.x) * LANES + lane;
    double sum = 0.0;
    for (int64_t first = 0; first < job.N; first += TILE_ROWS) {
        double *tile = products + first / TILE_ROWS % 2 * TILE_ROWS * LANES;
        BD_UNROLL
        for (int i = 0; i < WARP_ROWS; i++) {
            const int64_t n = first + warp * WARP_ROWS + i;
            double product = 0.0; /* adds nothing */
            if (n < job.N && k < job.K) {
                const float r = bd_residual_at(job, n, k, p);
                product = __dmul_rn(static_cast<double>(fabsf(r)), job.row_sums[n]);
            }
            tile[(warp * WARP_ROWS + i) * LANES + lane] = product;
        }
        __syncthreads();
        for (int row = 0; warp == 0 && row < TILE_ROWS; row++) {
            sum = __dadd_rn(sum, tile[row * LANES + lane]);
        }
    }
    if (warp == 0 && k < job.K) {
        job.fit_column[k] = sum / job.state->norm;
    }
}

__global__ void
__launch_bounds__(THREADS) begin_fit(const bd_extract_job job)
{
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (thread == 0) {
        job.state->has_ended = 0;
    }
    for (int64_t k = thread; k < job.K; k += static_cast<int64_t>(gridDim.x) * THREADS) {
        job.fit_column[k] = 1.0;
    }
}

/* The fitted scales to fp32, the column with mean 1. Every warp makes the mean for itself. */
__global__ void
__launch_bounds__(LANES) store_scales(const bd_extract_job job, int p)
{
    const double mean = fold_column(job, false) / static_cast<double>(job.K);
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * LANES + threadIdx.x;
    const int64_t n_threads = static_cast<int64_t>(gridDim.x) * LANES;
    for (int64_t k = thread; k < job.K; k += n_threads) {
        job.column[p * job.K + k] = static_cast<float>(job.fit_column[k] / mean);
    }
    for (int64_t n = thread; n < job.N; n += n_threads) {
        job.scale[p * job.N + n] = static_cast<float>(__dmul_rn(job.row_sums[n], mean));
    }
}

} /* namespace */

bd_status
bd_launch_rank1(const bd_cuda_context *ctx, const bd_extract_job *job, int p)
{
    const dim3 columns(static_cast<unsigned>((job->K + LANES - 1) / LANES));
    const size_t shared_bytes = 2 * TILE_ROWS * LANES * sizeof(double);
    bd_status status = BD_LAUNCH(begin_fit, dim3(16), dim3(THREADS), 0, ctx->stream, *job);
    for (int sweep = 0; sweep < SWEEPS && status == BD_OK; sweep++) {
        if (sweep > 0) {
            status = BD_LAUNCH(sum_column_squares, dim3(1), dim3(LANES), 0, ctx->stream, *job);
            status = status == BD_OK ? bd_launch_fit_rows(ctx, job, p) : status;
        }
        if (status == BD_OK) {
            status = BD_LAUNCH(sum_row_squares, dim3(1), dim3(LANES), 0, ctx->stream, *job);
        }
        if (status == BD_OK) {
            status =
                BD_LAUNCH(fit_columns, columns, dim3(THREADS), shared_bytes, ctx->stream, *job, p);
        }
    }
    return status == BD_OK ? BD_LAUNCH(store_scales, dim3(16), dim3(LANES), 0, ctx->stream, *job, p)
                           : status;
}
