/* linear_avx2.h - the two halves of the AVX2 set: linear_avx2.c fills the table with both. Private. */
#ifndef BITDELTA_LINEAR_AVX2_H_
#define BITDELTA_LINEAR_AVX2_H_

#include <stdint.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

/* linear_avx2_rows.c; meaning as in kernels.h. */
int bd_quantize_avx2(const void *x, bd_dtype dtype, const float *column, int64_t K,
                     int64_t K_padded, int16_t *q, int *exponent);
void bd_stream_rows_avx2(const float *x, int64_t x_stride, int64_t M, const void *weight,
                         bd_dtype dtype, int64_t weight_stride, int64_t n_rows, int64_t K,
                         float *out, int64_t out_stride);
void bd_transposed_strip_avx2(const uint32_t *sign, int64_t n_lines, const int16_t *q, int32_t *z);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_LINEAR_AVX2_H_ */
