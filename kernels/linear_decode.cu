/* linear_decode.cu - tenants with up to 4 rows, by one-bit tensor core products; rows without a tenant.
 *
 *   z = sum_k s q = 2 sum_p 2^p popcount(signs AND plane p of q) - sum_k q,   plane 15 counting -2^15
 *
 * The packed words of the signs are the A operand of m16n8k256 as they lie in memory: nothing is
 * expanded. The 16 bit planes of a row of q are columns of two B operands. For 8192 weights a warp issues
 * 2 loads of signs, and for each row 1 load of planes and 4 products: 7 to 22 instructions, where
 * expanding the bits to bytes would take some 150. Memory delivers 8192 weights in some 62 clocks of an SM.
 *
 * Fragments: row g of A is row 4 (g % 4) + 2 i of strip g / 4, row g + 8 is the one after it, for the
 * products i = 0, 1; column words 2t and 2t + 1 stand at k = 32 t and 128 + 32 t, in B as well. */
#include "gpu.h"
#include "linear.h"

namespace
{

/* Groups whose signs are in flight: 2 to 4 KB a warp, what the accumulators of R rows leave room for. */
template <int R>
struct step {
    enum { GROUPS = R == 4 ? 2 : 4 };
};

/* Products of up to R rows with a pair of strips: c[r][2 i + half], half: planes 0 .. 7 or 8 .. 15. */
template <int R>
__device__ __forceinline__ void
multiply(const uint4 *signs, const uint4 *planes, int row_units, const bd_tile &tile,
         int c[R][4][4])
{
    BD_UNROLL
    for (int r = 0; r < R; r++) {
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            c[r][i][0] = c[r][i][1] = c[r][i][2] = c[r][i][3] = 0;
        }
    }
    constexpr int STEP = step<R>::GROUPS;
    for (int group = tile.first_group; group < tile.end_group; group += STEP) {
        uint4 line[STEP][2];
        BD_UNROLL
        for (int u = 0; u < STEP; u++) {
            bd_load_signs(signs, group + u, tile.end_group, line[u]);
        }
        BD_UNROLL
        for (int u = 0; u < STEP; u++) {
            if (group + u >= tile.end_group) {
                break;
            }
            const unsigned a0[4] = {line[u][0].x, line[u][0].y, line[u][1].x, line[u][1].y};
            const unsigned a1[4] = {line[u][0].z, line[u][0].w, line[u][1].z, line[u][1].w};
            BD_UNROLL
            for (int r = 0; r < R; r++) {
                const uint4 b = __ldg(planes + r * row_units + (group + u) * BD_GROUP_UNITS);
                const unsigned low[2] = {b.x, b.y}, high[2] = {b.z, b.w};
                bd_mma_b1(c[r][0], a0, low);
                bd_mma_b1(c[r][1], a0, high);
                bd_mma_b1(c[r][2], a1, low);
                bd_mma_b1(c[r][3], a1, high);
            }
        }
    }
}

/* Sum over the planes: a lane has planes 2t and 2t + 1 of each half; all lanes of a quad get the sum. */
template <typename Z>
__device__ __forceinline__ Z
sum_planes(const int *low, const int *high)
{
    const int t = static_cast<int>(threadIdx.x % 4);
    const Z last = static_cast<Z>(static_cast<unsigned>(high[1])) << (9 + 2 * t);
    Z sum = (static_cast<Z>(static_cast<unsigned>(low[0])) << 2 * t) +
            (static_cast<Z>(static_cast<unsigned>(low[1])) << (2 * t + 1)) +
            (static_cast<Z>(static_cast<unsigned>(high[0])) << (8 + 2 * t)) +
            (t == 3 ? static_cast<Z>(0) - last : last);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    return sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
}

/* Lane 4 g + t gets the sums under the bits of row t: of output rows 4 (g % 4) .. + 3 of strip g / 4. */
template <int R, typename Z>
__device__ __forceinline__ void
sums_of_rows(const uint4 *signs, const uint4 *planes, int row_units, const bd_tile &tile,
             Z under[4])
{
    int c[R][4][4];
    multiply<R>(signs, planes, row_units, tile, c);
    BD_UNROLL
    for (int r = 0; r < R; r++) {
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            const int at = i / 2 * 2, element = i % 2 * 2;
            const Z sum = sum_planes<Z>(c[r][at] + element, c[r][at + 1] + element);
            under[i] = static_cast<int>(threadIdx.x % 4) == r ? sum : under[i];
        }
    }
}

/* One plane of the rows of a tile. */
template <typename Z>
__device__ __forceinline__ void
multiply_plane(const bd_linear_job &job, const bd_view &view, int p, Z under[4])
{
    const int row_units = job.quantized.n_groups * BD_GROUP_UNITS;
    const uint4 *planes =
        job.quantized.units + bd_scale_index(job, view, p) * row_units + threadIdx.x % 32;
    const uint4 *signs = bd_lane_signs(view.delta, p, job.parts[view.tile.part].N,
                                       job.quantized.n_groups, view.tile.pair);
    if (view.n_rows == 1) {
        sums_of_rows<1>(signs, planes, row_units, view.tile, under);
    } else if (view.n_rows == 2) {
        sums_of_rows<2>(signs, planes, row_units, view.tile, under);
    } else {
        sums_of_rows<BD_FEW_ROWS>(signs, planes, row_units, view.tile, under);
    }
}

/* A segment's rows of one tile: all planes, then the end of the rows. Lane 4 g + t ends row t. */
template <typename Z>
__device__ __forceinline__ void
run_tile(const bd_linear_job &job, const bd_walk &walk, int segment, int column, Z *buffer)
{
    const int t = static_cast<int>(threadIdx.x % 4);
    float *const kept = reinterpret_cast<float *>(buffer + 4 * BD_TILE_THREADS) + threadIdx.x;
    for (int p = 0;; p++) {
        const bd_view before = bd_look(job, walk, job.plan.few, segment, column);
        if (p >= before.n_planes) {
            break;
        }
        Z under[4] = {0, 0, 0, 0};
        multiply_plane(job, before, p, under);
        const bd_view view = bd_look(job, walk, job.plan.few, segment, column);
        bd_sum_shares<4>(buffer, walk.split, view.tile.share, under);
        if (view.tile.share == 0 && t < view.n_rows) {
            bd_add_row_term(job, view, p, t, under, kept);
        }
    }
    const bd_view view = bd_look(job, walk, job.plan.few, segment, column);
    if (view.tile.share == 0 && t < view.n_rows) {
        bd_finish_row(job.parts[view.tile.part], job.plan.batch[view.place + t], view.n, kept,
                      view.n_planes > 0, bd_is_row_lost(job, view, t));
    }
}

/* Z: uint32_t where z fits int32 for every K of the job, else unsigned long long. Tiles of a segment run
 * fastest: signs are read in order. */
template <typename Z>
__global__ void
__launch_bounds__(BD_TILE_THREADS, 2) multiply_few(const bd_linear_job job)
{
    BD_SHARED(Z, buffer); /* 4 a thread, then 4 sums a thread */
    const bd_walk walk = bd_plan_walk(job, job.plan.counts[0]);
    int segment = 0, column = static_cast<int>(blockIdx.x);
    for (; walk.n_columns_of_tiles > 0; column += static_cast<int>(gridDim.x)) {
        for (; column >= walk.n_columns_of_tiles; column -= walk.n_columns_of_tiles) {
            segment++;
        }
        if (segment >= walk.n_segments) {
            return;
        }
        run_tile<Z>(job, walk, segment, column, buffer);
    }
}

} /* namespace */

bd_status
bd_launch_decode(const bd_cuda_context *ctx, const bd_linear_job *job)
{
    const dim3 grid(static_cast<unsigned>(2 * ctx->n_processors)), block(BD_TILE_THREADS);
    const size_t n_values = 4 * BD_TILE_THREADS, sums_bytes = n_values * sizeof(float);
    if (job->K <= 65535) {
        return BD_LAUNCH(multiply_few<uint32_t>, grid, block, n_values * 4 + sums_bytes,
                         ctx->stream, *job);
    }
    return BD_LAUNCH(multiply_few<unsigned long long>, grid, block, n_values * 8 + sums_bytes,
                     ctx->stream, *job);
}
