/* gradient.h - what linear_transposed.cu and linear_gradient.cu share: a call, and sums over a tenant's rows.
 *
 * A unit of work is a block of 8 rows of a tenant (plan.h) and a tile of outputs. Sums over rows are made in
 * two steps of fixed order: those of a block where its products are, in fp64, into `partial`; then of the
 * blocks of a tenant, ascending, by bd_launch_sum_blocks. */
#ifndef BITDELTA_GRADIENT_H_
#define BITDELTA_GRADIENT_H_

#include "linear.h"

typedef struct {
    bd_matrix dy, x;
    bd_matrix g; /* data NULL: not wanted */
    const bd_cuda_delta *deltas;
    int64_t n_deltas, N, K;
    int max_planes, has_columns;
    bd_plan plan;
    bd_quantized quantized;
    double *partial; /* [blocks, max_planes, width], or NULL */
    int64_t width;   /* K or N */
} bd_gradient_job;

/* out [T, max_planes, width] = the sums of partial over each tenant's blocks; with needs_column 1, zero
 * where the tenant has no column scale. */
bd_status bd_launch_sum_blocks(const bd_cuda_context *ctx, const bd_gradient_job *job,
                               int needs_column, float *out);

/* Checks the sizes, fills a job and quantises dy * row (is_transposed) or x. */
bd_status bd_begin_gradient(const bd_cuda_context *ctx, const bd_cuda_gradient_args *args,
                            int is_transposed, const float *wanted, bd_gradient_job *job);

/* 256 columns each. */
static __device__ __forceinline__ int64_t
bd_groups_of(int64_t K)
{
    return (K + BD_PAD_COLUMNS - 1) / BD_PAD_COLUMNS;
}

/* How many of 8 warps share a unit's steps, so that most blocks have work to the end. */
static __device__ __forceinline__ int
bd_choose_split(int n_rows, int n_units, int n_steps)
{
    for (int split = 1;; split *= 2) {
        const int units = BD_TILE_WARPS / split;
        const int64_t n = static_cast<int64_t>(n_rows) * ((n_units + units - 1) / units);
        const int64_t n_blocks = gridDim.x, n_rounds = (n + n_blocks - 1) / n_blocks;
        if (split == BD_TILE_WARPS || 2 * split > n_steps || 5 * n >= 4 * n_rounds * n_blocks) {
            return split;
        }
    }
}

/* What a block of rows works on. */
struct bd_gradient_view {
    int tenant, n_rows, place;
    bd_cuda_delta delta;
    int n_planes, is_lost;
};

static __device__ __forceinline__ bd_gradient_view
bd_look_at_block(const bd_gradient_job &job, int block)
{
    const volatile int2 *own = job.plan.blocks + block; /* read anew: see bd_view */
    bd_gradient_view view;
    view.tenant = own->x;
    view.n_rows = own->y;
    view.place = block * BD_ROW_BLOCK;
    view.delta = bd_read_delta(job.deltas, view.tenant);
    view.is_lost =
        view.tenant == BD_LOST || bd_is_lost(view.delta, job.max_planes, job.has_columns);
    view.n_planes = view.is_lost ? 0 : static_cast<int>(view.delta.P);
    return view;
}

/* Sum over the 8 rows of a block, of which lane 4 g + t has 2t and 2t + 1: folded 4, 2, 1. */
static __device__ __forceinline__ double
bd_fold_rows(double even, double odd)
{
    even = __dadd_rn(even, __shfl_xor_sync(0xFFFFFFFFu, even, 2));
    odd = __dadd_rn(odd, __shfl_xor_sync(0xFFFFFFFFu, odd, 2));
    even = __dadd_rn(even, __shfl_xor_sync(0xFFFFFFFFu, even, 1));
    odd = __dadd_rn(odd, __shfl_xor_sync(0xFFFFFFFFu, odd, 1));
    return __dadd_rn(even, odd);
}

/* value * fp32(z) * 2^(e-15), exactly but for fp32's rounding of z: a term of a scale's gradient. */
static __device__ __forceinline__ double
bd_gradient_term(float value, float z, const bd_row_scale &scale)
{
    if (scale.exponent == BD_ROW_LOST) {
        return static_cast<double>(__uint_as_float(0x7FC00000u));
    }
    return __dmul_rn(static_cast<double>(value), static_cast<double>(z));
}

#endif /* BITDELTA_GRADIENT_H_ */
