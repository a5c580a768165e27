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

enum { STEP = 4 /* groups whose signs are in flight: 4 KB a warp */ };

/* Products of up to R rows with a pair of strips: c[r][2 i + half], half: planes 0 .. 7 or 8 .. 15. */
template <int R>
__device__ __forceinline__ void
multiply(const uint4 *signs, const uint4 *planes, int64_t row_units, const bd_tile &tile,
         int c[R][4][4])
{
    BD_UNROLL
    for (int r = 0; r < R; r++) {
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            c[r][i][0] = c[r][i][1] = c[r][i][2] = c[r][i][3] = 0;
        }
    }
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
sums_of_rows(const uint4 *signs, const uint4 *planes, int64_t row_units, const bd_tile &tile,
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

/* A segment's rows of one tile: all planes, then the end of the rows. */
template <typename Z>
__device__ void
run_tile(const bd_linear_job &job, const bd_walk &walk, const int4 segment, const bd_tile &tile,
         Z *buffer)
{
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    const bd_cuda_part &part = job.parts[tile.part];
    const int64_t row_units = static_cast<int64_t>(job.quantized.n_groups) * BD_GROUP_UNITS;
    const int64_t n = static_cast<int64_t>(tile.pair) * BD_PAIR_ROWS + g / 4 * BD_STRIP_ROWS + g % 4 * 4;
    const int64_t place = segment.y;
    bd_cuda_delta delta = {NULL, NULL, NULL, 0};
    if (segment.x >= 0) {
        delta = part.deltas[segment.x];
    }
    int is_lost = segment.x == BD_LOST || bd_is_lost(delta, job.max_planes, job.has_columns);
    const int n_planes = is_lost ? 0 : static_cast<int>(delta.P);
    float sum[4] = {0, 0, 0, 0};
    for (int p = 0; p < n_planes; p++) {
        const int which = bd_prepared_index(delta, tile.part, p, job.max_planes, job.has_columns);
        const int64_t at = which * job.quantized.n_places + place;
        const uint4 *planes = job.quantized.units + at * row_units + lane;
        const uint4 *signs = bd_lane_signs(delta, p, part.N, job.quantized.n_groups, tile.pair);
        Z under[4] = {0, 0, 0, 0};
        if (segment.z == 1) {
            sums_of_rows<1>(signs, planes, row_units, tile, under);
        } else if (segment.z == 2) {
            sums_of_rows<2>(signs, planes, row_units, tile, under);
        } else {
            sums_of_rows<BD_FEW_ROWS>(signs, planes, row_units, tile, under);
        }
        bd_sum_shares<4>(buffer, walk.split, tile.share, under);
        if (tile.share == 0 && t < segment.z) {
            bd_add_term(under, job.quantized.scales[at + t], delta.row + p * part.N, n, part.N, p == 0,
                        sum);
        }
    }
    if (tile.share == 0 && t < segment.z && n < part.N) {
        is_lost |= bd_is_row_lost(job, delta, tile.part, n_planes, place + t);
        bd_finish_row(part, job.plan.batch[place + t], n, sum, n_planes > 0, is_lost);
    }
}

/* Z: uint32_t where z fits int32 for every K of the job, else unsigned long long. */
template <typename Z>
__global__ void __launch_bounds__(BD_TILE_THREADS, 2)
multiply_few(const bd_linear_job job)
{
    BD_SHARED(Z, buffer);
    const bd_walk walk = bd_plan_walk(job, job.plan.counts[0]);
    const int64_t n_tiles = static_cast<int64_t>(walk.n_segments) * walk.n_columns_of_tiles;
    for (int64_t index = blockIdx.x; index < n_tiles; index += gridDim.x) {
        const int4 segment = job.plan.few[index / walk.n_columns_of_tiles];
        const int column = static_cast<int>(index % walk.n_columns_of_tiles);
        run_tile<Z>(job, walk, segment, bd_find_tile(job, walk, column), buffer);
    }
}

} /* namespace */

bd_status
bd_launch_decode(const bd_cuda_context *ctx, const bd_linear_job *job)
{
    const dim3 grid(static_cast<unsigned>(2 * ctx->n_processors)), block(BD_TILE_THREADS);
    const size_t n_values = 4 * BD_TILE_THREADS;
    if (job->K <= 65535) {
        return BD_LAUNCH(multiply_few<uint32_t>, grid, block, n_values * 4, ctx->stream, *job);
    }
    return BD_LAUNCH(multiply_few<unsigned long long>, grid, block, n_values * 8, ctx->stream, *job);
}
