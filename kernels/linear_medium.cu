/* linear_medium.cu - tenants with more rows, by int8 tensor core products of pieces; bd_cuda_linear.
 *
 *   z = 2 (256 sum of high under the bits + sum of low under the bits) - sum_k q,  q = 256 high + low
 *
 * The signs become bytes 0 and 1 once, shift and AND, and are shared by up to 32 rows. For 8192 weights a
 * warp spends some 120 instructions on them and 64 products on 16 rows, 128 on 32. Memory delivers as much
 * in some 62 clocks of an SM, so tenants with up to 8 rows are bound by memory and by the expansion alike,
 * beyond by the tensor cores, where a row costs what it costs in half precision.
 *
 * Fragments: byte b of word (w >> i) & 0x01010101 is column 8 b + i of w, so step i = 0 .. 7 multiplies
 * columns 8 b + i of the words 2t (k = 4t + b) and 2t + 1 (k = 16 + 4t + b). Rows as in linear_decode.cu. */
#include "gpu.h"
#include "linear.h"
#include "pieces.h"

namespace
{

/* Sums of up to 8 B rows with a plane's signs, as c of bd_multiply_pieces. */
template <int B>
__device__ __forceinline__ void
multiply_plane(const bd_linear_job &job, const bd_view &view, int p, int c[B][4][4])
{
    const int row_units = job.quantized.n_groups * BD_GROUP_UNITS;
    const uint4 *pieces =
        job.quantized.units + bd_scale_index(job, view, p) * row_units + threadIdx.x % 32;
    bd_multiply_pieces<B>(bd_lane_signs(view.delta, p, job.parts[view.tile.part].N,
                                        job.quantized.n_groups, view.tile.pair),
                          pieces, row_units * BD_ROW_BLOCK, view.tile, c);
}

/* One plane of up to 8 B rows. Lane 4 g + t has rows 2t and 2t + 1 of each block of 8, and output rows
 * 4 (g % 4) .. + 3 of strip g / 4; sums: [4 B rows of a lane x 4][threads], in shared memory. */
template <int B, typename Z>
__device__ __forceinline__ void
add_plane(const bd_linear_job &job, const bd_walk &walk, int segment, int column, int p, Z *buffer,
          float *sums)
{
    const int thread = static_cast<int>(threadIdx.x), t = thread % 4;
    int c[B][4][4];
    multiply_plane<B>(job, bd_look(job, walk, job.plan.many, segment, column), p, c);
    BD_UNROLL
    for (int b = 0; b < B; b++) {
        const bd_view view = bd_look(job, walk, job.plan.many, segment, column);
        BD_UNROLL
        for (int r = 0; r < 2; r++) {
            const int row = b * BD_ROW_BLOCK + 2 * t + r;
            Z under[4];
            BD_UNROLL
            for (int i = 0; i < 4; i++) {
                const int product = i / 2 * 2, element = i % 2 * 2 + r;
                under[i] = bd_join_pieces<Z>(c[b][product][element], c[b][product + 1][element]);
            }
            bd_sum_shares<4>(buffer, walk.split, view.tile.share, under);
            if (view.tile.share == 0 && row < view.n_rows) {
                bd_add_row_term(job, view, p, row, under,
                                sums + (b * 8 + r * 4) * BD_TILE_THREADS + thread);
            }
        }
    }
}

template <typename Z>
__device__ __forceinline__ void
run_tile(const bd_linear_job &job, const bd_walk &walk, int segment, int column, Z *buffer,
         float *sums)
{
    const int thread = static_cast<int>(threadIdx.x), t = thread % 4;
    for (int p = 0;; p++) {
        const bd_view view = bd_look(job, walk, job.plan.many, segment, column);
        if (p >= view.n_planes) {
            break;
        }
        if (view.n_rows <= BD_ROW_BLOCK) {
            add_plane<1>(job, walk, segment, column, p, buffer, sums);
        } else if (view.n_rows <= 2 * BD_ROW_BLOCK) {
            add_plane<2>(job, walk, segment, column, p, buffer, sums);
        } else {
            add_plane<4>(job, walk, segment, column, p, buffer, sums);
        }
    }
    const bd_view view = bd_look(job, walk, job.plan.many, segment, column);
    for (int row = 2 * t; view.tile.share == 0 && row < view.n_rows;
         row += row % 2 == 0 ? 1 : BD_ROW_BLOCK - 1) {
        const int at = row / BD_ROW_BLOCK * 8 + row % 2 * 4;
        bd_finish_row(job.parts[view.tile.part], job.plan.batch[view.place + row], view.n,
                      sums + at * BD_TILE_THREADS + thread, view.n_planes > 0,
                      bd_is_row_lost(job, view, row));
    }
}

/* Segments run fastest: blocks that work at the same time share signs, which then come from the L2. */
template <typename Z>
__global__ void
__launch_bounds__(BD_TILE_THREADS, sizeof(Z) == 4 ? 2 : 1) multiply_many(const bd_linear_job job)
{
    BD_SHARED(Z, buffer);                                                        /* 4 a thread */
    float *const sums = reinterpret_cast<float *>(buffer + 4 * BD_TILE_THREADS); /* 32 a thread */
    const bd_walk walk = bd_plan_walk(job, job.plan.counts[1]);
    int column = 0, segment = static_cast<int>(blockIdx.x);
    for (; walk.n_segments > 0; segment += static_cast<int>(gridDim.x)) {
        for (; segment >= walk.n_segments; segment -= walk.n_segments) {
            column++;
        }
        if (column >= walk.n_columns_of_tiles) {
            return;
        }
        run_tile<Z>(job, walk, segment, column, buffer, sums);
    }
}

} /* namespace */

bd_status
bd_launch_medium(const bd_cuda_context *ctx, const bd_linear_job *job)
{
    const dim3 grid(static_cast<unsigned>(2 * ctx->n_processors)), block(BD_TILE_THREADS);
    const size_t sums_bytes = BD_MANY_ROWS * BD_TILE_THREADS * sizeof(float);
    const size_t n_values = 4 * BD_TILE_THREADS;
    if (job->K <= 65535) {
        return BD_LAUNCH(multiply_many<uint32_t>, grid, block, n_values * 4 + sums_bytes,
                         ctx->stream, *job);
    }
    return BD_LAUNCH(multiply_many<unsigned long long>, grid, block, n_values * 8 + sums_bytes,
                     ctx->stream, *job);
}
