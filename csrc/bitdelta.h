/* bitdelta.h - the contract of the arithmetic core. Plain C11: no Python, no CUDA.
 *
 * A fine-tuned weight is stored as its base plus P sign planes with scales (BitDelta,
 * arXiv 2402.10193):  finetuned ~= base + sum_p row_p[n] * column_p[k] * S_p[n, k],  S = +-1.
 *
 * Letters, everywhere: N output rows, K input columns, P planes, M activation rows, T tenants,
 * S = ceil(N/16) strips, L = 8*ceil(K/256) lines a strip.
 *
 * Layout of the signs (format version 1): uint32 [P, S, L, 16], 64-byte aligned. Line l of strip s
 * holds, for its 16 rows n = 16 s + i, the word of columns 32 l .. 32 l + 31; bit j of word i is
 * column 32 l + j; 1 means +scale. Rows beyond N and columns beyond K are zero bits.
 *
 * The delta term is defined in integers ("fixed16"), so every instruction set, thread count and
 * batch gives the same bits:
 *   u = x[k], or fp32(x[k] * column_p[k]);  any u not finite: the row of y is the quiet NaN
 *   e = max(frexp exponent of max |u|, -96)
 *   q = clamp(round_ties_even(u * 2^(15-e)), -32768, 32767);  z = sum_k s[n, k] q[k], exactly
 *   term_p[n] = (fp32(z) * 2^(e-15)) * row_p[n], each product rounded to fp32
 *   y = terms in plane order, + base product, + bias, each sum rounded to fp32; then to y's dtype
 *
 * Preconditions (shapes, strides, alignment, overlap) are checked by the caller; functions return a
 * status and are reentrant. A context is never used by two pools at once: see pool.h. */
#ifndef BITDELTA_BITDELTA_H_
#define BITDELTA_BITDELTA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BD_STRIP_ROWS 16   /* output rows of a strip: one 64-byte line of words */
#define BD_WORD_BITS 32    /* columns of a word */
#define BD_PAD_COLUMNS 256 /* K is padded to this: 8 lines, 512 bytes */
#define BD_MAX_PLANES 8
#define BD_MIN_EXPONENT (-96)
#define BD_INT32_COLUMNS 65280 /* largest padded K whose z is sure to fit int32 (K <= 65535) */

typedef enum {
    BD_OK = 0,
    BD_ERR_MEMORY,    /* an allocation failed */
    BD_ERR_NONFINITE, /* NaN, Inf, or a difference beyond fp32; see bd_position */
    BD_ERR_ARGUMENT,  /* a precondition that only the core can see */
    BD_ERR_CUDA       /* a GPU call failed: bd_gpu_message says how */
} bd_status;

typedef enum { BD_F32 = 0, BD_F16 = 1, BD_BF16 = 2 } bd_dtype;

typedef enum {
    BD_SCALE_TENSOR = 0, /* one scale a plane */
    BD_SCALE_ROW = 1,    /* one scale a row and plane */
    BD_SCALE_RANK1 = 2   /* row scale times column scale */
} bd_scale_form;

typedef enum { BD_FIXED16 = 0, BD_FLOAT32 = 1 } bd_precision;

/* Matrix in memory: rows of contiguous columns. Not owned. */
typedef struct {
    void *data;
    bd_dtype dtype;
    int64_t n_rows, n_columns;
    int64_t row_stride; /* elements, >= n_columns */
} bd_matrix;

/* One tenant's delta of one weight. Not owned. */
typedef struct {
    const uint32_t *sign; /* [P, S, L, 16], 64-byte aligned */
    const float *row;     /* [P, N] */
    const float *column;  /* [P, K], or NULL for 1 */
    int64_t N, K;
    int P;
} bd_delta;

typedef struct {
    int64_t row, column;
    int in_base; /* 1: the base weight, 0: the finetuned weight, -1: only their difference */
} bd_position;

typedef struct bd_pool bd_pool;       /* pool.h */
typedef struct bd_kernels bd_kernels; /* kernels.h */

/* What a call runs with. Neither pointer is owned; pool may be NULL (one thread). */
typedef struct {
    bd_pool *pool;
    const bd_kernels *kernels;
} bd_context;

static inline int64_t
bd_n_strips(int64_t N)
{
    return (N + BD_STRIP_ROWS - 1) / BD_STRIP_ROWS;
}
static inline int64_t
bd_n_lines(int64_t K)
{
    return (K + BD_PAD_COLUMNS - 1) / BD_PAD_COLUMNS * (BD_PAD_COLUMNS / BD_WORD_BITS);
}
/* Words of one plane. */
static inline int64_t
bd_plane_words(int64_t N, int64_t K)
{
    return bd_n_strips(N) * bd_n_lines(K) * BD_STRIP_ROWS;
}

/* delta.c: extraction and expansion. */

/* d = fp32(finetuned) - fp32(base) -> P planes. Plane p+1 takes r = fp32(r - s * scale), the scale
 * being fp32(row * column) for BD_SCALE_RANK1. sign [P, S, L, 16] is written whole; scale is [P] for
 * BD_SCALE_TENSOR, else [P, N]; column [P, K] for BD_SCALE_RANK1, else NULL. base and finetuned:
 * [N, K], dtypes may differ. base_crc32c: NULL, or set to the CRC-32C of base's N * K elements.
 * BD_ERR_NONFINITE: *bad is the first in row-major order; outputs are then undefined. */
bd_status bd_extract(const bd_context *ctx, const bd_matrix *base, const bd_matrix *finetuned,
                     int P, bd_scale_form form, uint32_t *sign, float *scale, float *column,
                     uint32_t *base_crc32c, bd_position *bad);

/* Rows row_begin .. row_end - 1 of round(fp32(base) + t), t = the planes' fp32(row * column) * s
 * summed in order in fp32. base: [N, K], or NULL for zeros; out: [row_end - row_begin, K]. out may be
 * base itself (same data, dtype and stride, all rows), else it must not overlap. */
bd_status bd_expand(const bd_context *ctx, const bd_matrix *base, const bd_delta *delta,
                    int64_t row_begin, int64_t row_end, const bd_matrix *out);

/* calibrate.c: signs fitted to the inputs of a layer. */

typedef struct {
    const bd_matrix *d; /* fp32 [N, K]: finetuned - base, finite */
    const float
        *factor; /* fp32 [K, K], in visiting order; [k, j], j < k: V[j, k] of X^T X = V diag V^T,
                             V unit upper triangular; the rest is not read. NULL: V = 1 */
    const int64_t *order; /* [K]: the columns in visiting order, each once */
    int P;
    const float *row;    /* [P, N] */
    const float *column; /* [P, K], or NULL for 1 */
    uint32_t *sign;      /* out: [P, S, L, 16] */
} bd_fit_args;

/* Columns in order: r = d[k] + sum_{j<k} V[j, k] e[j], each product and sum rounded to fp32, j
 * ascending; the signs are those of the level nearest to r, |r - level| in fp32, among the 2^P of
 * Q = sum_p +-fp32(row column), summed in plane order; of equal ones the one with the most +, the
 * last plane's counting first; e[k] = fp32(d[k] - level). */
bd_status bd_fit_signs(const bd_context *ctx, const bd_fit_args *args);

/* sweep.c: the same, column after column. */

typedef struct {
    float *pull;          /* fp32 [N, K]: G = (D - Q) H, and what it becomes */
    const float *hessian; /* H = X^T X: fp32 [K, K], or [K] when it is diagonal; diagonal > 0 */
    int is_diagonal;
    int64_t N, K;
    int P;
    const float *row;    /* [P, N] */
    const float *column; /* [P, K], or NULL for 1 */
    uint32_t *sign;      /* in and out: [P, S, L, 16] */
} bd_sweep_args;

/* Columns 0 .. K - 1 of every row: want = q + fp32(G[k] / H[k, k]), q the level of the signs as they are; the
 * level nearest to want is chosen as in bd_fit_signs; where it is nearer than fp32(|want - q| * 0.9999f),
 * the signs become its and G -= fp32(fp32(level - q) * H[k]), all in fp32. */
bd_status bd_sweep(const bd_context *ctx, const bd_sweep_args *args);

/* linear.c: products. */

typedef struct {
    const bd_matrix *x;       /* [M, K] */
    const bd_matrix *weight;  /* [N, K], or NULL: no base product from weights */
    const bd_matrix *product; /* fp32 [M, N], base product made by the caller, or NULL */
    int add;                  /* 1: y is read as the base product, and -1 rows stay as they are;
                                  weight, product and bias are then NULL */
    const void *bias;         /* [N] of dtype bias_dtype, or NULL */
    bd_dtype bias_dtype;
    const bd_delta *deltas; /* [T], all of shape [N, K] */
    int64_t n_deltas;
    const int64_t *tenant_ids; /* [M], -1 .. T-1 */
    bd_precision precision;    /* BD_FLOAT32 runs the scalar definition in fp32 */
    const bd_matrix *y;        /* [M, N]; overlaps no input */
} bd_linear_args;

/* y[m] = sum_p term_p(t) + base product + bias, t = tenant_ids[m]. */
bd_status bd_linear(const bd_context *ctx, const bd_linear_args *args);

/* g[m] = sum_p (sum_n u_p[n] S_p[n, :]) * column_p, u_p = fp32(dy[m] * row_p), the sum over n by
 * fixed16; -1 rows are zero. dy [M, N], g [M, K]. */
bd_status bd_linear_transposed(const bd_context *ctx, const bd_matrix *dy, const bd_delta *deltas,
                               int64_t n_deltas, const int64_t *tenant_ids, const bd_matrix *g);

/* Number of rows up to which bd_linear's own base product beats BLAS panels. */
#define BD_STREAM_ROWS 16

/* dtype.c: rows [n_rows, n_columns] of any dtype to fp32, threaded (panels for BLAS). out is
 * fp32 [n_rows, n_columns], contiguous. */
bd_status bd_to_float32(const bd_context *ctx, const bd_matrix *matrix, float *out);

/* checksum.c: CRC-32C (Castagnoli, reflected; RFC 3720 B.4) of n bytes after those that gave `crc`
 * (0 at the start), and of A followed by B from their own sums. */
uint32_t bd_crc32c(uint32_t crc, const void *data, size_t n);
uint32_t bd_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b);

/* read.c: reads n_bytes, threaded, and returns their exclusive or as little-endian words (so that
 * nothing is optimised away): measures what reading alone costs. */
uint64_t bd_read(const bd_context *ctx, const void *data, size_t n_bytes);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_BITDELTA_H_ */
