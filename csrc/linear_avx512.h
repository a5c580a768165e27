/* linear_avx512.h - what the AVX-512 files share. */
#ifndef BITDELTA_LINEAR_AVX512_H_
#define BITDELTA_LINEAR_AVX512_H_

#include "kernels.h"

/* Rows of one tenant up to which table look-ups beat the expanded signs. */
#define BD_AVX512_LUT_ROWS 16

/* int16 products with vpdpwssd on expanded signs. */
extern const bd_product bd_avx512_vnni_product;

#endif /* BITDELTA_LINEAR_AVX512_H_ */
