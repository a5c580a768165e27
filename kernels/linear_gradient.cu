/* linear_gradient.cu - the gradient of row scales, drow_p[n] = sum_m dy[m, n] (sum_k u_p[k] S_p[n, k]): the
 * products of linear_medium.cu with another end, and sums over a tenant's rows in fixed order. */
#include "gpu.h"
#include "gradient.h"
#include "pieces.h"

namespace
{

enum { SUM_THREADS = 256 };

/* A warp's pair of strips, as bd_find_tile. */
__device__ __forceinline__ bd_tile
find_pair(const bd_gradient_job &job, int split, int tile)
{
    const int warp = static_cast<int>(threadIdx.x / 32), n_groups = job.quantized.n_groups;
    const int n = (n_groups + split - 1) / split;
    bd_tile own;
    own.part = 0;
    own.share = warp % split;
    own.pair = tile * (BD_TILE_WARPS / split) + warp / split;
    const bool is_empty = own.pair >= bd_n_pairs(job.N);
    own.first_group = is_empty ? n_groups : min(own.share * n, n_groups);
    own.end_group = is_empty ? n_groups : min(own.first_group + n, n_groups);
    return own;
}

/* dy[m, n] z of output row n, summed over the block's rows. under: of rows 2t and 2t + 1. */
template <typename Z>
__device__ __forceinline__ void
finish_output(const bd_gradient_job &job, const bd_gradient_view &view, int64_t scales_at,
              int block, int p, int64_t n, Z even, Z odd)
{
    const int t = static_cast<int>(threadIdx.x % 4);
    const Z under[2] = {even, odd};
    double product[2] = {0.0, 0.0};
    BD_UNROLL
    for (int r = 0; r < 2; r++) {
        if (n < job.N && 2 * t + r < view.n_rows) {
            const bd_row_scale scale = job.quantized.scales[scales_at + 2 * t + r];
            const int e = scale.exponent == BD_ROW_LOST ? 0 : scale.exponent;
            const float z = __fmul_rn(bd_signed_sum(under[r], scale.total), bd_scale_factor(e));
            const int64_t m = job.plan.batch[view.place + 2 * t + r];
            const float dy = bd_load_any(job.dy.data, job.dy.dtype, m * job.dy.row_stride + n);
            product[r] = bd_gradient_term(dy, z, scale);
        }
    }
    const double sum = bd_fold_rows(product[0], product[1]);
    if (n < job.N && t == 0) {
        job.partial[(static_cast<int64_t>(block) * job.max_planes + p) * job.width + n] = sum;
    }
}

template <typename Z>
__device__ __forceinline__ void
run_plane(const bd_gradient_job &job, int split, int block, int tile, int p, Z *buffer)
{
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int row_units = job.quantized.n_groups * BD_GROUP_UNITS;
    const bd_gradient_view view = bd_look_at_block(job, block);
    const bd_tile own = find_pair(job, split, tile);
    const int which = bd_prepared_index(view.delta, 0, p, job.max_planes, job.has_columns);
    const int64_t at = which * job.quantized.n_places + view.place;
    int c[1][4][4];
    bd_multiply_pieces<1>(bd_lane_signs(view.delta, p, job.N, job.quantized.n_groups, own.pair),
                          job.quantized.units + at * row_units + lane, row_units * BD_ROW_BLOCK,
                          own, c);
    Z under[8];
    BD_UNROLL
    for (int i = 0; i < 8; i++) { /* four outputs, rows 2t and 2t + 1 of each */
        const int product = i / 4 * 2, element = i / 2 % 2 * 2 + i % 2;
        under[i] = bd_join_pieces<Z>(c[0][product][element], c[0][product + 1][element]);
    }
    bd_sum_shares<8>(buffer, split, own.share, under);
    if (own.share == 0) {
        const int64_t n = static_cast<int64_t>(own.pair) * BD_PAIR_ROWS +
                          lane / 16 * BD_STRIP_ROWS + lane / 4 % 4 * 4;
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            finish_output(job, view, at, block, p, n + i, under[2 * i], under[2 * i + 1]);
        }
    }
}

template <typename Z>
__global__ void
__launch_bounds__(BD_TILE_THREADS, 2) multiply_for_rows(const bd_gradient_job job)
{
    BD_SHARED(Z, buffer);
    const int n_blocks = job.plan.counts[2], n_pairs = bd_n_pairs(job.N);
    const int split = bd_choose_split(n_blocks, n_pairs, job.quantized.n_groups);
    const int pairs = BD_TILE_WARPS / split, n_tiles = (n_pairs + pairs - 1) / pairs;
    int tile = 0, block = static_cast<int>(blockIdx.x);
    for (; n_blocks > 0; block += static_cast<int>(gridDim.x)) {
        for (; block >= n_blocks; block -= n_blocks) {
            tile++;
        }
        if (tile >= n_tiles) {
            return;
        }
        for (int p = 0; p < bd_look_at_block(job, block).n_planes; p++) {
            run_plane<Z>(job, split, block, tile, p, buffer);
        }
    }
}

/* A thread takes an element of [max_planes, width] of one tenant. */
__global__ void
__launch_bounds__(SUM_THREADS) sum_blocks(const bd_gradient_job job, int needs_column, float *out)
{
    const int64_t n_values = job.max_planes * job.width, tenant = blockIdx.y;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * SUM_THREADS + threadIdx.x;
    if (i >= n_values) {
        return;
    }
    const int first = job.plan.starts[tenant + 2], n_rows = job.plan.starts[tenant + 3] - first;
    const bd_cuda_delta delta = job.deltas[tenant];
    double sum = 0.0;
    if (n_rows > 0 && bd_is_lost(delta, job.max_planes, job.has_columns)) {
        sum = static_cast<double>(__uint_as_float(0x7FC00000u));
    } else if (n_rows > 0 && i / job.width < delta.P && (delta.column != NULL || !needs_column)) {
        const int64_t block = job.plan.rows[first].z / BD_ROW_BLOCK;
        for (int64_t b = 0; b * BD_ROW_BLOCK < n_rows; b++) {
            sum = __dadd_rn(sum, job.partial[(block + b) * n_values + i]);
        }
    }
    out[tenant * n_values + i] = static_cast<float>(sum);
}

} /* namespace */

bd_status
bd_launch_sum_blocks(const bd_cuda_context *ctx, const bd_gradient_job *job, int needs_column,
                     float *out)
{
    const int64_t n_values = job->max_planes * job->width;
    const dim3 grid(static_cast<unsigned>((n_values + SUM_THREADS - 1) / SUM_THREADS),
                    static_cast<unsigned>(job->n_deltas));
    return job->n_deltas == 0 || n_values == 0 ? BD_OK
                                               : BD_LAUNCH(sum_blocks, grid, dim3(SUM_THREADS), 0,
                                                           ctx->stream, *job, needs_column, out);
}

extern "C" size_t
bd_cuda_gradient_workspace_bytes(int64_t M, int64_t N, int64_t K, int64_t T, int max_planes)
{
    const int64_t n_places = bd_plan_places(M, T), width = N > K ? N : K;
    size_t n_bytes;
    bd_quantized_parts(NULL, n_places, width, max_planes, &n_bytes);
    return n_bytes +
           static_cast<size_t>(n_places / BD_ROW_BLOCK * max_planes * width) * sizeof(double);
}

bd_status
bd_begin_gradient(const bd_cuda_context *ctx, const bd_cuda_gradient_args *args, int is_transposed,
                  const float *wanted, bd_gradient_job *job)
{
    const int64_t M = args->dy->n_rows, N = args->dy->n_columns, T = args->n_deltas;
    if (M > BD_CUDA_MAX_ROWS || N > BD_CUDA_MAX_COLUMNS || args->K > BD_CUDA_MAX_COLUMNS ||
        T > BD_CUDA_MAX_TENANTS || args->max_planes < 1 || args->max_planes > BD_MAX_PLANES ||
        (wanted != NULL && args->x == NULL)) {
        return BD_ERR_ARGUMENT;
    }
    size_t n_bytes;
    bd_quantize_job quantize = {};
    *job = {};
    job->dy = *args->dy;
    if (args->x != NULL) {
        job->x = *args->x;
    }
    if (is_transposed && args->g != NULL) {
        job->g = *args->g;
    }
    job->deltas = args->deltas;
    job->n_deltas = T;
    job->N = N;
    job->K = args->K;
    job->max_planes = args->max_planes;
    job->has_columns = args->has_columns;
    job->plan = bd_plan_parts(const_cast<void *>(args->plan), M, T, &n_bytes);
    job->width = is_transposed ? args->K : N;
    job->quantized = bd_quantized_parts(args->workspace, bd_plan_places(M, T),
                                        is_transposed ? N : args->K, args->max_planes, &n_bytes);
    if (wanted != NULL) {
        job->partial = reinterpret_cast<double *>(static_cast<char *>(args->workspace) + n_bytes);
    }
    quantize.x = is_transposed ? job->dy : job->x;
    quantize.plan = job->plan;
    quantize.deltas[0] = args->deltas;
    quantize.max_planes = args->max_planes;
    quantize.has_columns = args->has_columns;
    quantize.is_transposed = is_transposed;
    quantize.is_in_pieces = 1;
    quantize.out = job->quantized;
    quantize.out.n_prepared = is_transposed || args->has_columns ? args->max_planes : 1;
    return M == 0 ? BD_OK : bd_launch_quantize(ctx, &quantize, M);
}

extern "C" bd_status
bd_cuda_row_gradient(const bd_cuda_context *ctx, const bd_cuda_gradient_args *args)
{
    bd_gradient_job job;
    bd_status status = bd_begin_gradient(ctx, args, 0, args->drow, &job);
    if (status != BD_OK || args->drow == NULL) {
        return status == BD_OK ? BD_ERR_ARGUMENT : status;
    }
    const dim3 grid(static_cast<unsigned>(2 * ctx->n_processors)), block(BD_TILE_THREADS);
    const size_t n_values = 8 * BD_TILE_THREADS;
    if (args->dy->n_rows > 0 && job.K <= 65535) {
        status =
            BD_LAUNCH(multiply_for_rows<uint32_t>, grid, block, n_values * 4, ctx->stream, job);
    } else if (args->dy->n_rows > 0) {
        status = BD_LAUNCH(multiply_for_rows<unsigned long long>, grid, block, n_values * 8,
                           ctx->stream, job);
    }
    return status == BD_OK ? bd_launch_sum_blocks(ctx, &job, 0, args->drow) : status;
}
