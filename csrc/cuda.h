/* cuda.h - the contract of the GPU kernels (kernels/): the operations of bitdelta.h, with the same bits.
 *
 * A call launches on ctx->stream and returns: it allocates nothing, waits for nothing, and its grid
 * depends on sizes alone, so it may be recorded into a CUDA graph. Pointers are to device memory, those
 * inside bd_matrix and bd_delta too, unless a comment says "host"; the structs themselves are on the host.
 * Memory that a call needs is the caller's: `workspace`, 256-byte aligned, of the size that the function
 * next to it tells; its content means nothing between calls.
 *
 * BD_ERR_ARGUMENT: a size beyond what is said here. BD_ERR_CUDA: bd_gpu_message(). */
#ifndef BITDELTA_CUDA_H_
#define BITDELTA_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BD_CUDA_MAX_TENANTS 4096      /* counted in the shared memory of one block */
#define BD_CUDA_MAX_COLUMNS (1 << 20) /* N and K: sums of 8-bit pieces fit int32 */
#define BD_CUDA_MAX_ROWS (1 << 24)
#define BD_CUDA_MAX_PARTS 4

/* What a call runs with. */
typedef struct {
    void *stream;     /* cudaStream_t */
    int n_processors; /* of the device: the size of the grids that walk over a work list */
    int capability;   /* 10 * major + minor; decides b1 or int8 products (bd_gpu_has_b1) */
} bd_cuda_context;

/* A tenant's delta of one weight, in a table [T] on the device. */
typedef struct {
    const uint32_t *sign; /* [P, S, L, 16], 64-byte aligned */
    const float *row;     /* [P, N] */
    const float *column;  /* [P, K], or NULL for 1 */
    int64_t P;            /* 0: no delta of this weight, as tenant -1; below 0: an empty slot, whose
                             rows become NaN, as do those with P > max_planes and those with a column
                             where has_columns is 0 */
} bd_cuda_delta;

/* ---- plan.cu ---------------------------------------------------------------------------------- */

size_t bd_cuda_plan_bytes(int64_t M, int64_t T);

/* Groups the rows of a batch by tenant; one plan serves every product of the batch. tenant_ids [M]:
 * 0 .. T-1, -1 = base only; rows with other ids become NaN. plan: 256-byte aligned.
 * M <= BD_CUDA_MAX_ROWS, T <= BD_CUDA_MAX_TENANTS. */
bd_status bd_cuda_plan(const bd_cuda_context *ctx, const int64_t *tenant_ids, int64_t M, int64_t T,
                       void *plan);

/* ---- quantize.cu ------------------------------------------------------------------------------ */

/* fixed16 of the rows of x [M, K], or of fp32(x * column): q int16 [M, K_padded] with zero padding,
 * exponents [M], INT32_MAX where some u is not finite (q of that row is then zero). column [K] or NULL. */
bd_status bd_cuda_quantize(const bd_cuda_context *ctx, const bd_matrix *x, const float *column,
                           int16_t *q, int32_t *exponents);

/* ---- linear_*.cu ------------------------------------------------------------------------------ */

/* One of the weights that share x: q, k and v, or gate and up. */
typedef struct {
    const bd_cuda_delta *deltas; /* [T], all of shape [N, K] */
    int64_t N;
    const float
        *product; /* [M, N] with product_stride, the base product made by the caller, or NULL */
    int64_t product_stride;
    int add; /* 1: y is read as the base product, and rows without a delta stay as they are;
                         product and bias are then NULL */
    const void *bias; /* [N] of dtype bias_dtype, or NULL */
    bd_dtype bias_dtype;
    bd_matrix y; /* [M, N]; overlaps no input */
} bd_cuda_part;

typedef struct {
    const bd_matrix *x; /* [M, K] */
    const void *plan;   /* of this batch's M and T */
    int64_t n_deltas;   /* T */
    int max_planes;     /* of all tables */
    int has_columns;    /* some delta of some table has a column scale */
    int64_t max_rows;   /* the most rows that a tenant has, M if not known: M > 4 costs a launch */
    int n_parts;        /* 1 .. BD_CUDA_MAX_PARTS */
    bd_cuda_part parts[BD_CUDA_MAX_PARTS];
    void *workspace;
} bd_cuda_linear_args;

size_t bd_cuda_linear_workspace_bytes(int64_t M, int64_t K, int64_t T, int n_parts, int max_planes,
                                      int has_columns);

/* y[m] = sum_p term_p(t) + base product + bias of every part, as bd_linear. */
bd_status bd_cuda_linear(const bd_cuda_context *ctx, const bd_cuda_linear_args *args);

typedef struct {
    const bd_matrix *dy; /* [M, N] */
    const bd_matrix *x;  /* [M, K], for the gradients */
    const void *plan;
    const bd_cuda_delta *deltas; /* [T], all of shape [N, K] */
    int64_t n_deltas;
    int max_planes;
    int has_columns;
    int64_t K;
    const bd_matrix *g; /* out: [M, K], or NULL */
    float *drow;        /* out: [T, max_planes, N], or NULL */
    float *dcolumn;     /* out: [T, max_planes, K], or NULL */
    void *workspace;
} bd_cuda_gradient_args;

size_t bd_cuda_gradient_workspace_bytes(int64_t M, int64_t N, int64_t K, int64_t T, int max_planes);

/* g[m] = sum_p (sum_n u_p[n] S_p[n, :]) * column_p, u_p = fp32(dy[m] * row_p), as
 * bd_linear_transposed; -1 rows are zero. And, where dcolumn is not NULL:
 *   dcolumn_p[k] = sum_m x[m, k] (sum_n u_p[n] S_p[n, k])
 * over a tenant's rows in the batch's order, each inner sum rounded to fp32 as in g. Products are exact in
 * fp64; those of 8 rows are folded 4, 2, 1 (rows that are not there count 0), then the eights are added
 * ascending. Zero for tenants without rows or without a column. */
bd_status bd_cuda_linear_transposed(const bd_cuda_context *ctx, const bd_cuda_gradient_args *args);

/* drow_p[n] = sum_m dy[m, n] (sum_k u_p[k] S_p[n, k]), u_p = x or fp32(x * column_p): inner sums as in
 * bd_cuda_linear without the row scale, outer ones as for dcolumn. */
bd_status bd_cuda_row_gradient(const bd_cuda_context *ctx, const bd_cuda_gradient_args *args);

/* ---- delta.cu, expand.cu ---------------------------------------------------------------------- */

size_t bd_cuda_extract_workspace_bytes(int64_t N, int64_t K, bd_scale_form form);

/* As bd_extract, without the checksum. *bad becomes BD_CUDA_NO_BAD, or tells the first element that is
 * not finite; outputs are then undefined. */
#define BD_CUDA_NO_BAD UINT64_MAX
bd_status bd_cuda_extract(const bd_cuda_context *ctx, const bd_matrix *base,
                          const bd_matrix *finetuned, int P, bd_scale_form form, uint32_t *sign,
                          float *scale, float *column, uint64_t *bad, void *workspace);

/* What *bad tells: plane, then place in row-major order, then what is not finite there. */
static inline bd_position
bd_cuda_bad_position(uint64_t bad, int64_t K)
{
    const int64_t at = (int64_t)(bad << 4 >> 6), what = (int64_t)(bad & 3u);
    bd_position position = {at / K, at % K, what == 2 ? -1 : (int)what};
    return position;
}

/* As bd_expand: rows row_begin .. row_end - 1 of round(fp32(base) + t). */
bd_status bd_cuda_expand(const bd_cuda_context *ctx, const bd_matrix *base, const bd_delta *delta,
                         int64_t row_begin, int64_t row_end, const bd_matrix *out);

/* ---- calibrate.cu, sweep.cu ------------------------------------------------------------------- */

size_t bd_cuda_fit_workspace_bytes(int64_t N, int64_t K);

/* As bd_fit_signs. Columns that `order` names wrongly are left out. */
bd_status bd_cuda_fit_signs(const bd_cuda_context *ctx, const bd_fit_args *args, void *workspace);

/* As bd_sweep. */
bd_status bd_cuda_sweep(const bd_cuda_context *ctx, const bd_sweep_args *args);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_CUDA_H_ */
