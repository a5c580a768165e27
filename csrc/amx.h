/* amx.h - the AMX instructions that linear_amx.c uses: the processor's, or plain C when
 * BD_AMX_EMULATED is defined. Tile numbers are literal.
 *
 * In assembler, since compilers learnt the intrinsics at different times, and gcc 12 lets stores pass
 * its tile loads. Semantics: Intel 64 and IA-32 Software Developer's Manual, volume 1, chapter 18. */
#ifndef BITDELTA_AMX_H_
#define BITDELTA_AMX_H_

#include <stdint.h>

/* Operand of ldtilecfg. */
typedef struct {
    uint8_t palette; /* 1: eight tiles of at most 16 rows of 64 bytes */
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_rows[16];
} bd_tile_config;

#if defined(BD_AMX_EMULATED)

#include "amx_emulation.h"
#define BD_AMX 1

#elif defined(__x86_64__)

#define BD_AMX 1
#define TILES_PERMITTED() bd_amx_permit()

#define TILE_NAME(tile) TILE_NAME_(tile)
#define TILE_NAME_(tile) "%%tmm" #tile
#define TILE_ASM(tiles, ...)                      \
    do {                                          \
        (void)(tiles);                            \
        __asm__ volatile(__VA_ARGS__ : "memory"); \
    } while (0)

typedef struct {
    char none; /* the processor has them */
} bd_tiles;

#define TILE_CONFIGURE(tiles, config) TILE_ASM(tiles, "ldtilecfg %0" : : "m"(*(config)))
#define TILE_RELEASE(tiles) TILE_ASM(tiles, "tilerelease" : :)
#define TILE_ZERO(tiles, tile) TILE_ASM(tiles, "tilezero " TILE_NAME(tile) : :)

/* Rows of a tile, row_bytes apart in memory. */
#define TILE_LOAD(tiles, tile, address, row_bytes)                            \
    TILE_ASM(tiles, "tileloadd (%0,%1,1), " TILE_NAME(tile) : : "r"(address), \
             "r"((int64_t)(row_bytes)))
#define TILE_STORE(tiles, tile, address, row_bytes)                               \
    TILE_ASM(tiles, "tilestored " TILE_NAME(tile) ", (%0,%1,1)" : : "r"(address), \
             "r"((int64_t)(row_bytes)))

/* int32 c[m][n] += sum over k of a[m][k] b[k / 4][4 n + k % 4]; b is signed, a signed or unsigned. */
#define TILE_DOT_SIGNED(tiles, c, a, b) \
    TILE_ASM(tiles, "tdpbssd " TILE_NAME(b) ", " TILE_NAME(a) ", " TILE_NAME(c) : :)
#define TILE_DOT_UNSIGNED(tiles, c, a, b) \
    TILE_ASM(tiles, "tdpbusd " TILE_NAME(b) ", " TILE_NAME(a) ", " TILE_NAME(c) : :)

#else
#define BD_AMX 0
#endif

#endif /* BITDELTA_AMX_H_ */
