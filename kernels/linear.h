/* linear.h - what linear_decode.cu and linear_medium.cu share: the walk over tiles, sums over the warps
 * that share a tile, and the end of a row.
 *
 * A warp multiplies a pair of strips, 32 rows n, with all rows of a segment: 1 KB of signs a step, which
 * is 16 aligned bytes from each of two lines a lane (words 2t and 2t + 1 of rows 4 (g % 4) .. + 3 of strip
 * g / 4, lane = 4 g + t). A tile is 8 / split pairs of one segment and part: `split` warps share a pair and
 * divide its columns. Where there are few tiles, they are split until most blocks have as many; sums are
 * integers, so the split changes no bit.
 *
 * Signs are read once, straight into registers; quantised rows are read by all warps of a block at about
 * the same time, through the L1 cache. 16 warps an SM with 2 to 4 KB of loads each in flight are more
 * than the some 26 KB that hide the memory's latency (4.3 TB/s for some 0.8 us over 132 SMs). */
#ifndef BITDELTA_LINEAR_H_
#define BITDELTA_LINEAR_H_

#include "convert.h"
#include "cuda.h"
#include "plan.h"
#include "quantize.h"

#define BD_TILE_WARPS 8
#define BD_TILE_THREADS (32 * BD_TILE_WARPS)
#define BD_PAIR_ROWS (2 * BD_STRIP_ROWS)

typedef struct {
    bd_cuda_part parts[BD_CUDA_MAX_PARTS];
    int n_parts, max_planes, has_columns;
    int64_t K;
    bd_plan plan;
    bd_quantized quantized;
} bd_linear_job;

bd_status bd_launch_decode(const bd_cuda_context *ctx, const bd_linear_job *job);
bd_status bd_launch_medium(const bd_cuda_context *ctx, const bd_linear_job *job);

/* ---- tiles ------------------------------------------------------------------------------------ */

/* How a grid divides the work; the same in every thread. */
struct bd_walk {
    int n_segments, split, n_columns_of_tiles;
};

static __device__ __forceinline__ int
bd_n_pairs(int64_t N)
{
    return static_cast<int>((N + BD_PAIR_ROWS - 1) / BD_PAIR_ROWS);
}

static __device__ __forceinline__ int
bd_tiles_of_part(const bd_linear_job &job, int part, int split)
{
    const int pairs = BD_TILE_WARPS / split;
    return (bd_n_pairs(job.parts[part].N) + pairs - 1) / pairs;
}

static __device__ __forceinline__ bd_walk
bd_plan_walk(const bd_linear_job &job, int n_segments)
{
    bd_walk walk = {n_segments, 1, 0};
    for (;; walk.split *= 2) {
        walk.n_columns_of_tiles = 0;
        for (int part = 0; part < job.n_parts; part++) {
            walk.n_columns_of_tiles += bd_tiles_of_part(job, part, walk.split);
        }
        const int64_t n = static_cast<int64_t>(n_segments) * walk.n_columns_of_tiles;
        const int64_t n_blocks = gridDim.x, n_rounds = (n + n_blocks - 1) / n_blocks;
        const bool is_even = 5 * n >= 4 * n_rounds * n_blocks; /* 4 of 5 blocks busy to the end */
        if (walk.split == BD_TILE_WARPS || 2 * walk.split > job.quantized.n_groups || is_even) {
            return walk;
        }
    }
}

/* A warp's share of a tile. */
struct bd_tile {
    int part, pair;
    int share; /* of the columns: 0 .. split - 1 */
    int first_group, end_group;
};

/* Tile `column` of a segment, for this warp; no groups where the pair does not exist. */
static __device__ __forceinline__ bd_tile
bd_find_tile(const bd_linear_job &job, const bd_walk &walk, int column)
{
    const int warp = static_cast<int>(threadIdx.x / 32), n_groups = job.quantized.n_groups;
    bd_tile tile;
    tile.part = 0;
    while (column >= bd_tiles_of_part(job, tile.part, walk.split)) {
        column -= bd_tiles_of_part(job, tile.part, walk.split);
        tile.part++;
    }
    tile.share = warp % walk.split;
    tile.pair = column * (BD_TILE_WARPS / walk.split) + warp / walk.split;
    const int n = (n_groups + walk.split - 1) / walk.split;
    const bool is_empty = tile.pair >= bd_n_pairs(job.parts[tile.part].N);
    tile.first_group = is_empty ? n_groups : min(tile.share * n, n_groups);
    tile.end_group = is_empty ? n_groups : min(tile.first_group + n, n_groups);
    return tile;
}

/* What a tile works on. Looked up anew after each product instead of kept: the accumulators leave no
 * registers for it, and a few cached loads a tile cost less than spills. */
struct bd_view {
    int tenant, place, n_rows;
    bd_tile tile;
    bd_cuda_delta delta;
    int n_planes, is_lost;
    int n; /* first output row of this lane: 4 (g % 4) of strip g / 4 of the pair */
};

static __device__ __forceinline__ bd_view
bd_look(const bd_linear_job &job, const bd_walk &walk, const int4 *segments, int segment,
        int column)
{
    const int lane = static_cast<int>(threadIdx.x % 32);
    const volatile int4 *own = segments + segment;
    bd_view view;
    view.tenant = own->x;
    view.place = own->y;
    view.n_rows = own->z;
    view.tile = bd_find_tile(job, walk, column);
    view.delta = bd_read_delta(job.parts[view.tile.part].deltas, view.tenant);
    view.is_lost =
        view.tenant == BD_LOST || bd_is_lost(view.delta, job.max_planes, job.has_columns);
    view.n_planes = view.is_lost ? 0 : static_cast<int>(view.delta.P);
    view.n = view.tile.pair * BD_PAIR_ROWS + lane / 16 * BD_STRIP_ROWS + lane / 4 % 4 * 4;
    return view;
}

/* Where plane p of the view's first row is, among the scales of quantised rows. */
static __device__ __forceinline__ int64_t
bd_scale_index(const bd_linear_job &job, const bd_view &view, int p)
{
    const int which =
        bd_prepared_index(view.delta, view.tile.part, p, job.max_planes, job.has_columns);
    return which * job.quantized.n_places + view.place;
}

/* ---- signs ------------------------------------------------------------------------------------ */

/* 16 bytes that are read once: they do not push rows out of the L1 cache. */
static __device__ __forceinline__ uint4
bd_load_once(const uint4 *address)
{
#if defined(BD_EMULATE)
    return __ldg(address);
#else
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
#endif
}

/* Where a lane reads the signs of a pair of strips; NULL where its strip is beyond the last. */
static __device__ __forceinline__ const uint4 *
bd_lane_signs(const bd_cuda_delta &delta, int p, int64_t N, int n_groups, int pair)
{
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    const int64_t n_lines = static_cast<int64_t>(n_groups) * BD_GROUP_LINES;
    const int64_t n_strips = (N + BD_STRIP_ROWS - 1) / BD_STRIP_ROWS;
    const int64_t strip = static_cast<int64_t>(pair) * 2 + g / 4;
    const int64_t line = (p * n_strips + strip) * n_lines + 2 * t;
    return strip < n_strips ? reinterpret_cast<const uint4 *>(delta.sign) + line * 4 + g % 4 : NULL;
}

/* Words 2t (0) and 2t + 1 (1) of a group; zeros from group `end` on. */
static __device__ __forceinline__ void
bd_load_signs(const uint4 *signs, int group, int end, uint4 line[2])
{
    line[0] = make_uint4(0, 0, 0, 0);
    line[1] = line[0];
    if (signs != NULL && group < end) {
        line[0] = bd_load_once(signs + group * BD_GROUP_LINES * 4);
        line[1] = bd_load_once(signs + group * BD_GROUP_LINES * 4 + 4);
    }
}

/* ---- sums ------------------------------------------------------------------------------------- */

/* Sums of n values a lane over the warps that share a pair, to the first of them. buffer: n a thread. */
template <int n, typename Z>
static __device__ __forceinline__ void
bd_sum_shares(Z *buffer, int split, int share, Z *value)
{
    if (split == 1) {
        return;
    }
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads(); /* the sums before are read */
    BD_UNROLL
    for (int i = 0; i < n; i++) {
        buffer[i * BD_TILE_THREADS + thread] = value[i];
    }
    __syncthreads();
    for (int other = 1; share == 0 && other < split; other++) {
        BD_UNROLL
        for (int i = 0; i < n; i++) {
            value[i] += buffer[i * BD_TILE_THREADS + thread + 32 * other];
        }
    }
}

/* fp32(z), z = 2 * (sum of q under the bits) - (sum of q), modulo the width of Z, which z fits. */
static __device__ __forceinline__ float
bd_signed_sum(uint32_t under, int64_t total)
{
    return __int2float_rn(static_cast<int>(2u * under - static_cast<uint32_t>(total)));
}
static __device__ __forceinline__ float
bd_signed_sum(unsigned long long under, int64_t total)
{
    return __ll2float_rn(
        static_cast<long long>(2ull * under - static_cast<unsigned long long>(total)));
}

static __device__ __forceinline__ float
bd_scale_factor(int exponent)
{
    return __uint_as_float(static_cast<unsigned>(127 - 15 + exponent) << 23);
}

/* sum[i] = or += (fp32(z) * 2^(e-15)) * row scale of n + i. */
template <typename Z>
static __device__ __forceinline__ void
bd_add_term(const Z under[4], const bd_row_scale &scale, const float *row, int64_t n, int64_t N,
            int is_first, float sum[4])
{
    const float factor = bd_scale_factor(scale.exponent == BD_ROW_LOST ? 0 : scale.exponent);
    BD_UNROLL
    for (int i = 0; i < 4; i++) {
        const float z = __fmul_rn(bd_signed_sum(under[i], scale.total), factor);
        const float term = __fmul_rn(z, n + i < N ? __ldg(row + n + i) : 0.0f);
        sum[i] = is_first ? term : __fadd_rn(sum[i], term);
    }
}

/* The term of row `row` of a view and four outputs, added to those of the planes before, which wait in
 * shared memory: kept, a thread's own, [4][threads]. */
template <typename Z>
static __device__ __forceinline__ void
bd_add_row_term(const bd_linear_job &job, const bd_view &view, int p, int row, const Z under[4],
                float *kept)
{
    const int N = static_cast<int>(job.parts[view.tile.part].N);
    float sum[4] = {0, 0, 0, 0};
    BD_UNROLL
    for (int i = 0; i < 4; i++) {
        sum[i] = p > 0 ? kept[i * BD_TILE_THREADS] : 0.0f;
    }
    bd_add_term(under, job.quantized.scales[bd_scale_index(job, view, p) + row],
                view.delta.row + static_cast<int64_t>(p) * N, view.n, N, p == 0, sum);
    BD_UNROLL
    for (int i = 0; i < 4; i++) {
        kept[i * BD_TILE_THREADS] = sum[i];
    }
}

/* ---- the end of a row -------------------------------------------------------------------------- */

/* y[m, n .. n + 3] = kept sums + base product + bias, rounded once. has_terms 0: nothing is kept. */
static __device__ __forceinline__ void
bd_finish_row(const bd_cuda_part &part, int64_t m, int64_t n, const float *kept, int has_terms,
              int is_lost)
{
    if (!has_terms && !is_lost && part.add) {
        return;
    }
    const int64_t at = m * part.y.row_stride + n;
    BD_UNROLL
    for (int i = 0; i < 4; i++) {
        if (n + i >= part.N) {
            return;
        }
        float value =
            has_terms ? kept[i * BD_TILE_THREADS] : -0.0f; /* -0 adds nothing, not even a sign */
        if (part.add) {
            value = __fadd_rn(value, bd_read_any(part.y.data, part.y.dtype, at + i));
        } else if (part.product != NULL) {
            value = __fadd_rn(value, __ldg(part.product + m * part.product_stride + n + i));
        } else if (!has_terms) {
            value = 0.0f;
        }
        if (part.bias != NULL) {
            value = __fadd_rn(value, bd_load_any(part.bias, part.bias_dtype, n + i));
        }
        value = is_lost || value != value ? __uint_as_float(0x7FC00000u) : value;
        bd_store_any(part.y.data, part.y.dtype, at + i, value);
    }
}

/* Whether row r of a view is NaN: its tenant cannot be used, or some plane's u is not finite. */
static __device__ __forceinline__ int
bd_is_row_lost(const bd_linear_job &job, const bd_view &view, int r)
{
    int is_lost = view.is_lost;
    for (int p = 0; p < view.n_planes; p++) {
        is_lost |= job.quantized.scales[bd_scale_index(job, view, p) + r].exponent == BD_ROW_LOST;
    }
    return is_lost;
}

#endif /* BITDELTA_LINEAR_H_ */
