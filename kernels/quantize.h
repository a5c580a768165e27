/* quantize.h - fixed16 rows in the order in which tensor core fragments want them.
 *
 * u -> q 2^(e-15), q in -32768 .. 32767 (bitdelta.h). 256 columns of a row are 512 bytes in every form,
 * and a warp reads 16 bytes a lane. The columns of a group are words l = 0 .. 7 of 32 bits, column
 * 32 l + 8 b + i; fragments take the words 2t and 2t + 1 in lanes 4 g + t (linear_decode.cu).
 *
 * Bit planes (b1), [place][group][lane = 4 g + t] of
 *     {plane g of words 2t, 2t + 1; plane g + 8 of words 2t, 2t + 1}; plane 15 counts -2^15
 * Pieces (u8 x s8 and u8 x u8), q = 256 high + low with high signed and low not, [block of 8 places]
 * [group][i][row 0 .. 7][t] of 16 bytes, each word the 4 bytes b = 0 .. 3 of
 *     {high of word 2t, 2t + 1; low of word 2t, 2t + 1}
 * Pieces in natural order, for the transposed product, [block][group][32 columns][row][t] of 16 bytes:
 *     {high of columns 4t + b, 16 + 4t + b; low of the same} */
#ifndef BITDELTA_QUANTIZE_H_
#define BITDELTA_QUANTIZE_H_

#include "cuda.h"
#include "plan.h"

#define BD_GROUP_LINES 8      /* lines of the signs in a group */
#define BD_GROUP_UNITS 32     /* of 16 bytes: a group of a row */
#define BD_ROW_LOST INT32_MAX /* in place of an exponent */

/* Beside a quantised row. */
typedef struct {
    int exponent, unused;
    int64_t total; /* sum of q */
} bd_row_scale;

/* Quantised rows of a call, [n_prepared][n_places]: one for all where no delta has a column scale, else
 * one for every part and plane. */
typedef struct {
    uint4 *units;         /* [n_prepared, n_places * n_groups * 32] */
    bd_row_scale *scales; /* [n_prepared, n_places] */
    int64_t n_places;
    int n_groups, n_prepared;
} bd_quantized;

static inline bd_quantized
bd_quantized_parts(void *start, int64_t n_places, int64_t K, int n_prepared, size_t *n_bytes)
{
    bd_quantized parts;
    parts.n_places = n_places;
    parts.n_groups = static_cast<int>(bd_n_lines(K) / BD_GROUP_LINES);
    parts.n_prepared = n_prepared;
    parts.units = static_cast<uint4 *>(start);
    const int64_t n_units = n_prepared * n_places * parts.n_groups * BD_GROUP_UNITS;
    parts.scales = reinterpret_cast<bd_row_scale *>(parts.units + n_units);
    *n_bytes = static_cast<size_t>(n_units * 16 + n_prepared * n_places * 16);
    return parts;
}

/* Which quantised rows plane p of a part takes. */
static inline __device__ int
bd_prepared_index(const bd_cuda_delta &delta, int part, int p, int max_planes, int has_columns)
{
    return has_columns ? part * max_planes + (delta.column != NULL ? p : 0) : 0;
}

/* A slot that cannot be used: its rows become NaN. */
static inline __device__ bool
bd_is_lost(const bd_cuda_delta &delta, int max_planes, int has_columns)
{
    return delta.P < 0 || delta.P > max_planes || (delta.column != NULL && !has_columns);
}

/* The delta of a tenant; of none (negative) an empty one. Read anew at each call, whatever was read before. */
static __device__ __forceinline__ bd_cuda_delta
bd_read_delta(const bd_cuda_delta *deltas, int tenant)
{
    bd_cuda_delta delta;
    delta.P = 0;
    delta.sign = NULL;
    delta.row = delta.column = NULL;
    if (tenant >= 0) {
        const volatile bd_cuda_delta *slot = deltas + tenant;
        delta.sign = slot->sign;
        delta.row = slot->row;
        delta.column = slot->column;
        delta.P = slot->P;
    }
    return delta;
}

/* quantize.cu: the rows of a plan, of x and, where has_columns, each delta's columns. */
typedef struct {
    bd_matrix x;
    bd_plan plan;
    const bd_cuda_delta *deltas[BD_CUDA_MAX_PARTS];
    int max_planes, has_columns;
    int is_transposed; /* 1: u = x * row scale for every plane, pieces in natural order */
    int is_in_pieces;  /* 1: rows of tenants with few rows, too */
    bd_quantized out;
} bd_quantize_job;

bd_status bd_launch_quantize(const bd_cuda_context *ctx, const bd_quantize_job *job, int64_t M);

#endif /* BITDELTA_QUANTIZE_H_ */
