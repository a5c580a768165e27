/* kernels.h - the table of inner loops that an instruction set fills; one file per set.
 *
 * linear.c and delta.c hold the loops over rows, planes and threads; linear_generic.c and delta_generic.c
 * the scalar kernels; linear_avx2.c, linear_avx512.c, delta_avx2.c, ... replace single entries.
 * Every entry is exact: same bits as the scalar one (only `stream_rows` is a float sum of free order). */
#ifndef BITDELTA_KERNELS_H_
#define BITDELTA_KERNELS_H_

#include <stdint.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

struct bd_crc_chains; /* checksum.h */

/* z[m * z_stride + 16 * s + i] = sum over the columns of the block of +-q[m], 0 <= s < n_strips.
 * sign: the block's first line of the first strip; the next strip is strip_stride words on.
 * n_lines: lines of the block, a multiple of 8, at most BD_INT32_COLUMNS / 32 (int32 is enough).
 * prepared: n_rows rows made by `prepare` of the same entry. z is overwritten. */
typedef void (*bd_product_fn)(const uint32_t *sign, int64_t strip_stride, int64_t n_strips,
                              int64_t n_lines, const void *prepared, int64_t n_rows, int32_t *z,
                              int64_t z_stride, void *scratch);

/* One way to make products. The driver takes the first in the table with n_rows <= max_rows. */
typedef struct {
    const char *name;
    int64_t max_rows; /* rows of one tenant up to which this one is the best */
    /* Bytes of `prepared` (64-byte aligned by the driver) and of per-worker `scratch`. */
    int64_t (*prepared_bytes)(int64_t n_lines, int64_t n_rows);
    int64_t (*scratch_bytes)(int64_t n_strips, int64_t n_lines, int64_t n_rows);
    /* q: int16 [n_rows, 32 * n_lines], rows q_stride apart -> prepared. */
    void (*prepare)(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows,
                    void *prepared);
    bd_product_fn product;
} bd_product;

#define BD_MAX_PRODUCTS 4
#define BD_FEEDBACK_COLUMNS 4

struct bd_kernels {
    const char *isa; /* "generic", "avx2", "avx512", "amx", "neon" */

    /* fixed16 of one row: x[0..K) of dtype, times column when not NULL, -> q[0..K_padded), zero from
     * K on, and *exponent = e. Returns 0, or 1 when some u is not finite (q is then undefined). */
    int (*quantize)(const void *x, bd_dtype dtype, const float *column, int64_t K, int64_t K_padded,
                    int16_t *q, int *exponent);

    bd_product products[BD_MAX_PRODUCTS]; /* ended by name == NULL or the array's end; the last
                                             has max_rows INT64_MAX */

    /* Base products of few rows: out[m * out_stride + n] = sum_k x[m, k] weight[n, k] in fp32,
     * 0 <= n < n_rows_of_weight, m < M <= BD_STREAM_ROWS. x: fp32 [M, K], rows x_stride apart
     * (64-byte aligned rows). A row's bits depend on neither M nor the other rows. */
    void (*stream_rows)(const float *x, int64_t x_stride, int64_t M, const void *weight,
                        bd_dtype dtype, int64_t weight_stride, int64_t n_rows, int64_t K,
                        float *out, int64_t out_stride);

    /* Transposed block: z[k] += sum over the 16 rows of a strip of +-q[i], k < 32 * n_lines.
     * sign: [n_lines, 16]; q: int16 [16]. z: int32 (at most 4080 strips between resets). */
    void (*transposed_strip)(const uint32_t *sign, int64_t n_lines, const int16_t *q, int32_t *z);

    /* One row, or a piece of one that starts at a multiple of 256 columns, of extraction.
     * d[k] = fp32(finetuned) - fp32(base) for k < K, into residual (fp32 [K], or NULL);
     * words[l * 16] gets the sign bits of columns 32 l .. (zero beyond K), l < bd_n_lines(K), unless
     * words is NULL; lanes[k mod 16] += |d| in fp64, k ascending. checksum, if not NULL, is another
     * row's CRC-32C, which may go on meanwhile, as far as it likes. Returns 0, or 1 when some lane,
     * and so some d, is not finite. */
    int (*extract_row)(const void *base, bd_dtype base_dtype, const void *finetuned,
                       bd_dtype finetuned_dtype, int64_t K, float *residual, uint32_t *words,
                       double lanes[16], struct bd_crc_chains *checksum);

    /* What a plane leaves of a row, and the next plane: residual[k] -= s * scale, the bits of s from
     * words, scale = row, or fp32(row * column[k]) when column is not NULL. Then next and lanes as in
     * extract_row, for d = residual; neither when next is NULL. */
    void (*residual_row)(float *residual, const uint32_t *words, float row, const float *column,
                         int64_t K, uint32_t *next, double lanes[16]);

    /* One row of expand: out[k] = round(fp32(base[k]) + t[k]), base NULL: zeros; plane p's words are
     * at words + p * plane_stride, one per line, 16 apart; row [P] (stride row_stride) and column
     * (NULL or [P, K]) as in bd_delta. is_streamed: out may bypass the caches (a fence follows). */
    void (*expand_row)(const void *base, bd_dtype dtype, const uint32_t *words,
                       int64_t plane_stride, int P, const float *row, int64_t row_stride,
                       const float *column, int64_t K, void *out, bd_dtype out_dtype,
                       int is_streamed);

    /* r[c * 16 + i] += factor[c * stride + j] * e[j * 16 + i], j < n ascending, product and sum rounded
     * apart, c < n_columns <= BD_FEEDBACK_COLUMNS, i < 16. e: 64-byte aligned. */
    void (*feedback)(const float *factor, int64_t stride, int64_t n_columns, const float *e,
                     int64_t n, float *r);

    /* g[c] -= change[m] * h[rows[m] * stride + c], m < n_rows ascending, product and difference rounded
     * apart, c < n. */
    void (*take_rows)(float *g, int64_t n, const float *h, int64_t stride, const int32_t *rows,
                      const float *change, int64_t n_rows);

    /* out[i] = fp32(data[i]), i < n. */
    void (*to_float32)(const void *data, bd_dtype dtype, int64_t n, float *out);
};

/* dispatch.c */

/* The table of `isa`, or of the best set of this machine when isa is NULL; NULL when this machine or
 * this build lacks it. "avx512-emulated" and "amx-emulated" run the same source files on a plain C
 * emulation of their instructions, anywhere and slowly: for tests, never chosen by NULL. */
const bd_kernels *bd_select_kernels(const char *isa);
/* Names that bd_select_kernels accepts here, best first, ended by NULL. */
const char *const *bd_available_isas(void);

/* Each replaces its entries of *table; called by dispatch.c. */
void bd_fill_generic_linear(bd_kernels *table);
void bd_fill_generic_delta(bd_kernels *table);
void bd_fill_generic_calibrate(bd_kernels *table);
void bd_fill_generic_sweep(bd_kernels *table);
void bd_fill_avx2_linear(bd_kernels *table);
void bd_fill_avx2_delta(bd_kernels *table);
void bd_fill_avx2_calibrate(bd_kernels *table);
void bd_fill_avx512_linear(bd_kernels *table);
void bd_fill_avx512_delta(bd_kernels *table);
void bd_fill_avx512_linear_emulated(bd_kernels *table); /* the same code on the emulation */
void bd_fill_avx512_delta_emulated(bd_kernels *table);
void bd_fill_amx(bd_kernels *table);
void bd_fill_amx_emulated(bd_kernels *table);
void bd_fill_neon_linear(bd_kernels *table);
int bd_amx_permit(void); /* asks the kernel once; 1 when tiles may be used */

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_KERNELS_H_ */
