/* delta.h - what delta.cu and delta_rank1.cu share: an extraction, and what planes leave of a difference.
 *
 *   d = fp32(finetuned) - fp32(base);  r is d, then fp32(r - s * scale) for each plane, s = not (r < 0) */
#ifndef BITDELTA_DELTA_KERNELS_H_
#define BITDELTA_DELTA_KERNELS_H_

#include "convert.h"
#include "cuda.h"

typedef struct {
    double norm;           /* of one side of a rank-1 fit, squared */
    int has_ended, unused; /* every row is 0: the fit stops */
} bd_fit_state;

typedef struct {
    bd_matrix base, finetuned;
    int P;
    bd_scale_form form;
    uint32_t *sign;
    float *scale, *column; /* column: NULL but for rank 1 */
    int64_t N, K;
    int64_t n_lines, plane_words;
    unsigned long long *bad;
    double *row_sums;   /* [N] of the plane at hand; for rank 1 the rows of the fit */
    double *fit_column; /* [K] */
    bd_fit_state *state;
} bd_extract_job;

/* Scale of plane j at [n, k]; not through the read-only cache, the same launch may have written it. */
static __device__ __forceinline__ float
bd_row_scale_of(const bd_extract_job &job, int j, int64_t n)
{
    return job.form == BD_SCALE_TENSOR ? job.scale[j] : job.scale[j * job.N + n];
}

/* r - s * scale. */
static __device__ __forceinline__ float
bd_next_residual(float r, float scale)
{
    return __fsub_rn(r, r < 0.0f ? -scale : scale);
}

/* One element of r, before plane p. */
static __device__ __forceinline__ float
bd_residual_at(const bd_extract_job &job, int64_t n, int64_t k, int p)
{
    const float b = bd_load_any(job.base.data, job.base.dtype, n * job.base.row_stride + k);
    const float f =
        bd_load_any(job.finetuned.data, job.finetuned.dtype, n * job.finetuned.row_stride + k);
    float r = __fsub_rn(f, b);
    for (int j = 0; j < p; j++) {
        const float row = bd_row_scale_of(job, j, n);
        r = bd_next_residual(r,
                             job.column == NULL ? row : __fmul_rn(row, job.column[j * job.K + k]));
    }
    return r;
}

/* Sum of 16 lanes, 8, 4, 2, 1. */
static __device__ __forceinline__ double
bd_fold(double lane[16])
{
    BD_UNROLL
    for (int width = 8; width > 0; width /= 2) {
        BD_UNROLL
        for (int i = 0; i < width; i++) {
            lane[i] = __dadd_rn(lane[i], lane[i + width]);
        }
    }
    return lane[0];
}

/* delta.cu: row_sums[n] = fold(|r[n]| fit_column) / norm before plane p, for delta_rank1.cu. */
bd_status bd_launch_fit_rows(const bd_cuda_context *ctx, const bd_extract_job *job, int p);

/* delta_rank1.cu: row and column scales of plane p; row_sums holds the means of the rows. */
bd_status bd_launch_rank1(const bd_cuda_context *ctx, const bd_extract_job *job, int p);

#endif /* BITDELTA_DELTA_KERNELS_H_ */
