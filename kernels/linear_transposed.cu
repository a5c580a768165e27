/* linear_transposed.cu - products with the transposed signs, for gradients, and the column scales' own:
 *   g[m] = sum_p (sum_n u_p[n] S_p[n, :]) * column_p,  u_p = fp32(dy[m] * row_p)
 *
 * The same words as everywhere, as the A operand of u8 products whose rows are columns k and whose depth is
 * n. Lane 4 g + t loads rows 4t .. 4t + 3 of line g, of two strips. A transposition of 4 x 4 bytes (in
 * registers, 4 byte permutations for two bytes) gives words whose byte b belongs to row 4t + b, so
 * (word >> i) & 0x01010101 is a fragment: column 8 j + i of line g, depth 4t + b; i and i + 1 are rows g and
 * g + 8. Pieces of u_p are in natural order and serve all columns.
 *
 * A warp takes 8 rows m and 16 columns of each of 8 lines: 64 accumulators. For 32 rows n it issues some 72
 * shifts, ANDs and permutations for 16 products of two clocks each: the two are about even. */
#include "gpu.h"
#include "gradient.h"
#include "pieces.h"

namespace
{

enum { STEPS = 8 /* products of 16 columns */, VALUES = 4 * STEPS /* outputs of a thread */ };

/* Bytes 2 half and 2 half + 1 of four words: word j of the result has those of byte 2 half + j. */
__device__ __forceinline__ void
transpose_bytes(const uint4 line, int half, unsigned word[2])
{
    const unsigned selector = half == 0 ? 0x5140u : 0x7362u;
    const unsigned a = __byte_perm(line.x, line.y, selector);
    const unsigned b = __byte_perm(line.z, line.w, selector);
    word[0] = __byte_perm(a, b, 0x5410u);
    word[1] = __byte_perm(a, b, 0x7632u);
}

/* What a warp multiplies. */
struct unit {
    int group, half; /* 8 lines of columns, and which 16 of each 32 */
    int share;
    int first_chunk, end_chunk; /* of 32 rows n: two strips */
};

__device__ __forceinline__ unit
find_unit(const bd_gradient_job &job, int split, int tile)
{
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int n_units = 2 * static_cast<int>(bd_groups_of(job.K));
    const int n_chunks = bd_n_pairs(job.N), n = (n_chunks + split - 1) / split;
    const int index = tile * (BD_TILE_WARPS / split) + warp / split;
    unit own;
    own.group = index / 2;
    own.half = index % 2;
    own.share = warp % split;
    own.first_chunk = index >= n_units ? n_chunks : min(own.share * n, n_chunks);
    own.end_chunk = index >= n_units ? n_chunks : min(own.first_chunk + n, n_chunks);
    return own;
}

/* The lane's words of both strips of a chunk. */
__device__ __forceinline__ void
load_chunk(const uint4 *signs, int strip_units, int n_strips, int chunk, int end, uint4 strip[2])
{
    strip[0] = strip[1] = make_uint4(0, 0, 0, 0);
    if (chunk < end) {
        strip[0] = bd_load_once(signs + static_cast<int64_t>(2 * chunk) * strip_units);
        if (2 * chunk + 1 < n_strips) {
            strip[1] = bd_load_once(signs + static_cast<int64_t>(2 * chunk + 1) * strip_units);
        }
    }
}

/* c[step][piece]: step 4 j + i / 2, piece 0 high, 1 low. LOADS_AHEAD: the signs of the next 32 rows are in
 * flight meanwhile; 64-bit sums leave no registers for it. */
template <bool LOADS_AHEAD>
__device__ __forceinline__ void
multiply(const bd_gradient_job &job, const bd_cuda_delta &delta, int p, const uint4 *pieces,
         const unit &own, int c[STEPS][2][4])
{
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int n_strips = static_cast<int>((job.N + BD_STRIP_ROWS - 1) / BD_STRIP_ROWS);
    const int strip_units = static_cast<int>(bd_groups_of(job.K)) * BD_GROUP_LINES * 4;
    const uint4 *signs = reinterpret_cast<const uint4 *>(delta.sign) +
                         static_cast<int64_t>(p * n_strips) * strip_units +
                         (own.group * BD_GROUP_LINES + lane / 4) * 4 + lane % 4;
    BD_UNROLL
    for (int s = 0; s < STEPS; s++) {
        BD_UNROLL
        for (int piece = 0; piece < 2; piece++) {
            c[s][piece][0] = c[s][piece][1] = c[s][piece][2] = c[s][piece][3] = 0;
        }
    }
    uint4 next[2];
    if (LOADS_AHEAD) {
        load_chunk(signs, strip_units, n_strips, own.first_chunk, own.end_chunk, next);
    }
    for (int chunk = own.first_chunk; chunk < own.end_chunk; chunk++) {
        unsigned upper[2], lower[2];
        if (!LOADS_AHEAD) {
            load_chunk(signs, strip_units, n_strips, chunk, own.end_chunk, next);
        }
        transpose_bytes(next[0], own.half, upper);
        transpose_bytes(next[1], own.half, lower);
        if (LOADS_AHEAD) {
            load_chunk(signs, strip_units, n_strips, chunk + 1, own.end_chunk, next);
        }
        const uint4 b = __ldg(pieces + chunk * BD_GROUP_UNITS);
        const unsigned high[2] = {b.x, b.y}, low[2] = {b.z, b.w};
        BD_UNROLL
        for (int s = 0; s < STEPS; s++) {
            const int j = s / 4, i = s % 4 * 2;
            const unsigned ones = 0x01010101u;
            const unsigned a[4] = {upper[j] >> i & ones, upper[j] >> (i + 1) & ones,
                                   lower[j] >> i & ones, lower[j] >> (i + 1) & ones};
            bd_mma_u8s8(c[s][0], a, high);
            bd_mma_u8u8(c[s][1], a, low);
        }
    }
}

/* How a plane's sums of rows 2t and 2t + 1 become fp32. */
struct plane_rows {
    int p;
    bd_row_scale scale[2];
    float factor[2];
};

/* Read anew for every step, as bd_view. */
__device__ __forceinline__ plane_rows
rows_of_plane(const bd_gradient_job &job, const bd_gradient_view &view, int p)
{
    const int t = static_cast<int>(threadIdx.x % 4);
    plane_rows rows;
    rows.p = p;
    BD_UNROLL
    for (int r = 0; r < 2; r++) {
        const int row = 2 * t + r < view.n_rows ? 2 * t + r : 0;
        const volatile bd_row_scale *scale =
            job.quantized.scales + p * job.quantized.n_places + view.place + row;
        const int e = scale->exponent;
        rows.scale[r].exponent = e;
        rows.scale[r].unused = 0;
        rows.scale[r].total = scale->total;
        rows.factor[r] = bd_scale_factor(e == BD_ROW_LOST ? 0 : e);
    }
    return rows;
}

/* One column's two rows: adds the terms of g, and sums the block's part of the column's gradient. */
template <typename Z>
__device__ __forceinline__ void
finish_column(const bd_gradient_job &job, const bd_gradient_view &view, const plane_rows &own,
              int block, int64_t k, const Z under[2], float *kept)
{
    const int t = static_cast<int>(threadIdx.x % 4);
    const bool has_column = k < job.K;
    double product[2] = {0.0, 0.0};
    BD_UNROLL
    for (int r = 0; r < 2; r++) {
        const float z = __fmul_rn(bd_signed_sum(under[r], own.scale[r].total), own.factor[r]);
        float term = z;
        if (view.delta.column != NULL && has_column) {
            term = __fmul_rn(z, __ldg(view.delta.column + own.p * job.K + k));
        }
        float *sum = kept + r * BD_TILE_THREADS;
        *sum = own.p == 0 ? term : __fadd_rn(*sum, term);
        if (job.partial != NULL && has_column && 2 * t + r < view.n_rows) {
            const int64_t m = job.plan.batch[view.place + 2 * t + r];
            const float x = bd_load_any(job.x.data, job.x.dtype, m * job.x.row_stride + k);
            product[r] = bd_gradient_term(x, z, own.scale[r]);
        }
    }
    if (job.partial != NULL) {
        const double sum = bd_fold_rows(product[0], product[1]);
        if (has_column && t == 0) {
            job.partial[(static_cast<int64_t>(block) * job.max_planes + own.p) * job.width + k] =
                sum;
        }
    }
}

/* The lane's first column. */
__device__ __forceinline__ int64_t
first_column(const unit &own)
{
    return static_cast<int64_t>(own.group) * BD_PAD_COLUMNS + threadIdx.x % 32 / 4 * BD_WORD_BITS +
           own.half * 16;
}

/* One plane of one block of rows and one tile. kept: [16 columns][2 rows][threads]. */
template <typename Z>
__device__ __forceinline__ void
add_plane(const bd_gradient_job &job, int split, int block, int tile, int p, Z *buffer, float *kept)
{
    const int thread = static_cast<int>(threadIdx.x);
    int c[STEPS][2][4];
    {
        const bd_gradient_view view = bd_look_at_block(job, block);
        const uint4 *pieces = job.quantized.units +
                              (p * job.quantized.n_places + view.place) *
                                  (static_cast<int64_t>(job.quantized.n_groups) * BD_GROUP_UNITS) +
                              thread % 32;
        multiply<sizeof(Z) == 4>(job, view.delta, p, pieces, find_unit(job, split, tile), c);
    }
    BD_UNROLL
    for (int s = 0; s < STEPS; s++) {
        const bd_gradient_view view = bd_look_at_block(job, block);
        const unit own = find_unit(job, split, tile);
        Z under[4]; /* two columns, two rows of each */
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            under[i] = bd_join_pieces<Z>(c[s][0][i], c[s][1][i]);
        }
        bd_sum_shares<4>(buffer, split, own.share, under);
        if (own.share == 0) {
            const plane_rows rows = rows_of_plane(job, view, p);
            BD_UNROLL
            for (int i = 0; i < 2; i++) {
                const int at = 2 * s + i;
                finish_column(job, view, rows, block, first_column(own) + at, under + 2 * i,
                              kept + 2 * at * BD_TILE_THREADS);
            }
        }
    }
}

/* Row r of the lane's two to g. */
__device__ __forceinline__ void
store_row(const bd_gradient_job &job, const bd_gradient_view &view, int row, int64_t k,
          const float *kept)
{
    int is_lost = view.is_lost;
    for (int p = 0; p < view.n_planes; p++) {
        const int64_t at = p * job.quantized.n_places + view.place + row;
        is_lost |= job.quantized.scales[at].exponent == BD_ROW_LOST;
    }
    const int64_t m = job.plan.batch[view.place + row];
    for (int i = 0; i < 16 && k + i < job.K; i++) {
        float value = view.n_planes > 0 ? kept[2 * i * BD_TILE_THREADS] : 0.0f;
        value = is_lost || value != value ? __uint_as_float(0x7FC00000u) : value;
        bd_store_any(job.g.data, job.g.dtype, m * job.g.row_stride + k + i, value);
    }
}

template <typename Z>
__global__ void
__launch_bounds__(BD_TILE_THREADS, 2) multiply_transposed(const bd_gradient_job job)
{
    BD_SHARED(Z, buffer); /* 4 a thread, then 32 sums a thread */
    float *const kept = reinterpret_cast<float *>(buffer + 4 * BD_TILE_THREADS) + threadIdx.x;
    const int n_blocks = job.plan.counts[2], n_units = 2 * static_cast<int>(bd_groups_of(job.K));
    const int split = bd_choose_split(n_blocks, n_units, bd_n_pairs(job.N));
    const int units = BD_TILE_WARPS / split, n_tiles = (n_units + units - 1) / units;
    int tile = 0,
        block = static_cast<int>(blockIdx.x); /* blocks run fastest, as in linear_medium.cu */
    for (; n_blocks > 0; block += static_cast<int>(gridDim.x)) {
        for (; block >= n_blocks; block -= n_blocks) {
            tile++;
        }
        if (tile >= n_tiles) {
            return;
        }
        for (int p = 0; p < bd_look_at_block(job, block).n_planes; p++) {
            add_plane<Z>(job, split, block, tile, p, buffer, kept);
        }
        const bd_gradient_view view = bd_look_at_block(job, block);
        const unit own = find_unit(job, split, tile);
        for (int r = 0; r < 2; r++) {
            const int row = static_cast<int>(threadIdx.x % 4) * 2 + r;
            if (job.g.data != NULL && own.share == 0 && row < view.n_rows) {
                store_row(job, view, row, first_column(own), kept + r * BD_TILE_THREADS);
            }
        }
    }
}

} /* namespace */

extern "C" bd_status
bd_cuda_linear_transposed(const bd_cuda_context *ctx, const bd_cuda_gradient_args *args)
{
    bd_gradient_job job;
    bd_status status = bd_begin_gradient(ctx, args, 1, args->dcolumn, &job);
    if (status != BD_OK || args->dy->n_rows == 0 || args->K == 0) {
        return status;
    }
    const dim3 grid(static_cast<unsigned>(2 * ctx->n_processors)), block(BD_TILE_THREADS);
    const size_t sums_bytes = VALUES * BD_TILE_THREADS * sizeof(float),
                 n_values = 4 * BD_TILE_THREADS;
    if (job.N <= 65535) {
        status = BD_LAUNCH(multiply_transposed<uint32_t>, grid, block, n_values * 4 + sums_bytes,
                           ctx->stream, job);
    } else {
        status = BD_LAUNCH(multiply_transposed<unsigned long long>, grid, block,
                           n_values * 8 + sums_bytes, ctx->stream, job);
    }
    return status == BD_OK && args->dcolumn != NULL
               ? bd_launch_sum_blocks(ctx, &job, 1, args->dcolumn)
               : status;
}
