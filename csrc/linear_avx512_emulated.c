/* linear_avx512_emulated.c - linear_avx512.c on plain C, so that its arithmetic is tested on every
 * machine. */
#include "kernels.h"

#define BD_AVX512_EMULATED
#define bd_fill_avx512_linear bd_fill_avx512_linear_emulated
#include "linear_avx512.c"
