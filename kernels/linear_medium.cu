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

/* Products of 8 B rows with a pair of strips: c[b][2 i + piece], piece 0 high, 1 low. */
template <int B>
__device__ __forceinline__ void
multiply(const uint4 *signs, const uint4 *pieces, int64_t block_units, const bd_tile &tile,
         int c[B][4][4])
{
    BD_UNROLL
    for (int b = 0; b < B; b++) {
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            c[b][i][0] = c[b][i][1] = c[b][i][2] = c[b][i][3] = 0;
        }
    }
    uint4 next[2];
    bd_load_signs(signs, tile.first_group, tile.end_group, next);
    for (int group = tile.first_group; group < tile.end_group; group++) {
        const uint4 line[2] = {next[0], next[1]};
        bd_load_signs(signs, group + 1, tile.end_group, next);
        BD_UNROLL
        for (int i = 0; i < 8; i++) {
            const unsigned ones = 0x01010101u;
            const unsigned a0[4] = {line[0].x >> i & ones, line[0].y >> i & ones,
                                    line[1].x >> i & ones, line[1].y >> i & ones};
            const unsigned a1[4] = {line[0].z >> i & ones, line[0].w >> i & ones,
                                    line[1].z >> i & ones, line[1].w >> i & ones};
            BD_UNROLL
            for (int b = 0; b < B; b++) {
                const uint4 piece =
                    __ldg(pieces + b * block_units +
                          (group * BD_GROUP_UNITS + i * 4) * BD_ROW_BLOCK);
                const unsigned high[2] = {piece.x, piece.y}, low[2] = {piece.z, piece.w};
                bd_mma_u8s8(c[b][0], a0, high);
                bd_mma_u8u8(c[b][1], a0, low);
                bd_mma_u8s8(c[b][2], a1, high);
                bd_mma_u8u8(c[b][3], a1, low);
            }
        }
    }
}

/* What the warps of a tile work on. */
struct task {
    const bd_linear_job *job;
    const bd_cuda_part *part;
    const bd_cuda_delta *delta;
    int p, n_rows;
    int64_t at; /* of the segment's first row, among scales */
    int64_t n;  /* first output row of this lane */
};

/* One plane of up to 8 B rows. Lane 4 g + t has rows 2t and 2t + 1 of each block of 8, and output rows
 * 4 (g % 4) .. + 3 of strip g / 4; sums: [4 B rows of a lane x 4][threads], in shared memory. */
template <int B, typename Z>
__device__ __forceinline__ void
add_plane(const task &task, const bd_walk &walk, const bd_tile &tile, Z *buffer, float *sums)
{
    const bd_quantized &quantized = task.job->quantized;
    const int thread = static_cast<int>(threadIdx.x), t = thread % 4;
    const int64_t row_units = static_cast<int64_t>(quantized.n_groups) * BD_GROUP_UNITS;
    int c[B][4][4];
    multiply<B>(bd_lane_signs(*task.delta, task.p, task.part->N, quantized.n_groups, tile.pair),
                quantized.units + task.at * row_units + thread % 32, row_units * BD_ROW_BLOCK, tile, c);
    BD_UNROLL
    for (int b = 0; b < B; b++) {
        Z under[8];
        BD_UNROLL
        for (int i = 0; i < 8; i++) { /* rows 2t and 2t + 1, four outputs each */
            const int product = i % 4 / 2 * 2, element = i % 2 * 2 + i / 4;
            under[i] = bd_join_pieces<Z>(c[b][product][element], c[b][product + 1][element]);
        }
        bd_sum_shares<8>(buffer, walk.split, tile.share, under);
        BD_UNROLL
        for (int r = 0; r < 2; r++) {
            const int row = b * BD_ROW_BLOCK + 2 * t + r;
            if (tile.share == 0 && row < task.n_rows) {
                float sum[4] = {0, 0, 0, 0};
                float *kept = sums + (b * 8 + r * 4) * BD_TILE_THREADS + thread;
                BD_UNROLL
                for (int i = 0; task.p > 0 && i < 4; i++) {
                    sum[i] = kept[i * BD_TILE_THREADS];
                }
                bd_add_term(under + 4 * r, quantized.scales[task.at + row],
                            task.delta->row + task.p * task.part->N, task.n, task.part->N,
                            task.p == 0, sum);
                BD_UNROLL
                for (int i = 0; i < 4; i++) {
                    kept[i * BD_TILE_THREADS] = sum[i];
                }
            }
        }
    }
}

template <typename Z>
__device__ void
run_tile(const bd_linear_job &job, const bd_walk &walk, const int4 segment, const bd_tile &tile,
         Z *buffer, float *sums)
{
    const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
    const bd_cuda_part &part = job.parts[tile.part];
    const bd_cuda_delta delta = part.deltas[segment.x];
    const int is_lost = bd_is_lost(delta, job.max_planes, job.has_columns);
    const int n_planes = is_lost ? 0 : static_cast<int>(delta.P);
    const int64_t n = static_cast<int64_t>(tile.pair) * BD_PAIR_ROWS + g / 4 * BD_STRIP_ROWS + g % 4 * 4;
    for (int p = 0; p < n_planes; p++) {
        const int which = bd_prepared_index(delta, tile.part, p, job.max_planes, job.has_columns);
        const task task = {&job, &part, &delta, p, segment.z,
                           which * job.quantized.n_places + segment.y, n};
        if (segment.z <= BD_ROW_BLOCK) {
            add_plane<1>(task, walk, tile, buffer, sums);
        } else if (segment.z <= 2 * BD_ROW_BLOCK) {
            add_plane<2>(task, walk, tile, buffer, sums);
        } else {
            add_plane<4>(task, walk, tile, buffer, sums);
        }
    }
    for (int row = 2 * t; tile.share == 0 && n < part.N && row < segment.z;
         row += row % 2 == 0 ? 1 : BD_ROW_BLOCK - 1) {
        const int at = row / BD_ROW_BLOCK * 8 + row % 2 * 4;
        float sum[4] = {0, 0, 0, 0};
        BD_UNROLL
        for (int i = 0; n_planes > 0 && i < 4; i++) {
            sum[i] = sums[(at + i) * BD_TILE_THREADS + thread];
        }
        const int64_t place = segment.y + row;
        bd_finish_row(part, job.plan.batch[place], n, sum, n_planes > 0,
                      is_lost | bd_is_row_lost(job, delta, tile.part, n_planes, place));
    }
}

/* Segments run fastest: blocks that work at the same time share signs, which then come from the L2. */
template <typename Z>
__global__ void __launch_bounds__(BD_TILE_THREADS, 2)
multiply_many(const bd_linear_job job)
{
    BD_SHARED(Z, buffer); /* 8 a thread */
    float *const sums = reinterpret_cast<float *>(buffer + 8 * BD_TILE_THREADS); /* 32 a thread */
    const bd_walk walk = bd_plan_walk(job, job.plan.counts[1]);
    const int64_t n_tiles = static_cast<int64_t>(walk.n_segments) * walk.n_columns_of_tiles;
    for (int64_t index = blockIdx.x; index < n_tiles; index += gridDim.x) {
        const int4 segment = job.plan.many[index % walk.n_segments];
        const int column = static_cast<int>(index / walk.n_segments);
        run_tile<Z>(job, walk, segment, bd_find_tile(job, walk, column), buffer, sums);
    }
}

} /* namespace */

bd_status
bd_launch_medium(const bd_cuda_context *ctx, const bd_linear_job *job)
{
    const dim3 grid(static_cast<unsigned>(2 * ctx->n_processors)), block(BD_TILE_THREADS);
    const size_t sums_bytes = BD_MANY_ROWS * BD_TILE_THREADS * sizeof(float);
    const size_t n_values = 8 * BD_TILE_THREADS;
    if (job->K <= 65535) {
        return BD_LAUNCH(multiply_many<uint32_t>, grid, block, n_values * 4 + sums_bytes, ctx->stream,
                         *job);
    }
    return BD_LAUNCH(multiply_many<unsigned long long>, grid, block, n_values * 8 + sums_bytes,
                     ctx->stream, *job);
}
