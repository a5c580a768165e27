/* delta_avx512_emulated.c - delta_avx512.c on plain C, so that its arithmetic is tested on every
 * machine. */
#include "kernels.h"

#define BD_AVX512_EMULATED
#define bd_fill_avx512_delta bd_fill_avx512_delta_emulated
#include "delta_avx512.c"
