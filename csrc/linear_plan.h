/* linear_plan.h - how linear.c divides a call: rows by tenant into segments, columns into chunks, and
 * the memory that both need. Private to linear*.c. */
#ifndef BITDELTA_LINEAR_PLAN_H_
#define BITDELTA_LINEAR_PLAN_H_

#include <stdint.h>

#include "bitdelta.h"
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BD_PASS_ROWS 256 /* most rows of a pass */
#define BD_MAX_CHUNK 32  /* strips of a task */
#define BD_BLOCK_LINES (BD_INT32_COLUMNS / BD_WORD_BITS)
#define BD_NONFINITE INT32_MAX /* in place of an exponent */

/* Rows of one tenant, a few dozen at most. */
typedef struct {
    int64_t tenant; /* -1: base only */
    int64_t first;  /* of its rows in `order` */
    int64_t n_rows;
    const bd_product *product;
    int n_prepared;      /* P, or 1 when no column scale tells the planes apart */
    int64_t block_bytes; /* of BD_BLOCK_LINES lines, prepared */
    int64_t plane_bytes; /* of all lines, prepared */
    char *prepared;      /* [n_prepared][plane_bytes] */
    int32_t *exponents;  /* [n_prepared, n_rows], or BD_NONFINITE */
} bd_segment;

/* A worker's own buffers, for a chunk of n_columns output columns. */
typedef struct {
    int16_t *q;    /* [n_rows of a segment, K padded] */
    void *product; /* scratch of the kernel */
    int32_t *z;    /* [n_rows, n_columns]; fp32 for BD_FLOAT32 */
    int64_t *wide; /* the same, where K needs it */
    float *sum;    /* [n_rows, n_columns] */
    float *bias;   /* [n_columns] */
    float *base;   /* [rows of the pass, n_columns] */
} bd_buffers;

/* Some rows of a call: at most BD_PASS_ROWS. */
typedef struct {
    const bd_linear_args *args;
    const bd_kernels *kernels;
    const int64_t *order; /* [n_rows] rows of x, sorted by tenant */
    int64_t n_rows, N, K, n_lines, chunk_strips;
    bd_segment *segments;
    int64_t n_segments;
    float *x;            /* fp32 [n_rows, x_stride] in the order of `order`, or NULL */
    int64_t x_stride;    /* a multiple of 64 bytes */
    bd_buffers *buffers; /* [workers] */
    bd_pool *pool;       /* NULL where threads would cost more than they gain */
    void *allocated;
} bd_linear_job;

/* Rows prepared at once, at most BD_PASS_ROWS: bounds the memory of a call. */
int64_t bd_pass_rows(int64_t K);

/* order [M]: the rows by tenant, -1 first; rows of one tenant keep their order.
 * starts [n_deltas + 2] is working space. BD_ERR_ARGUMENT: an id is out of range. */
bd_status bd_group_rows(const int64_t *tenant_ids, int64_t M, int64_t n_deltas, int64_t *starts,
                        int64_t *order);

/* Fills the rest of a pass whose args, kernels, order, n_rows, N, K, n_lines and segments (room for
 * n_rows) are set, in one allocation, which the caller frees: job->allocated. */
bd_status bd_plan_pass(const bd_context *ctx, bd_linear_job *job);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_LINEAR_PLAN_H_ */
