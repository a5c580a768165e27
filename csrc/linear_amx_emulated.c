/* linear_amx_emulated.c - linear_amx.c on plain C, so that its arithmetic is tested on every machine. */
#include "kernels.h"

#define BD_AVX512_EMULATED
#define BD_AMX_EMULATED
#define bd_fill_amx bd_fill_amx_emulated
#define bd_fill_avx512_linear bd_fill_avx512_linear_emulated
#include "linear_amx.c"
