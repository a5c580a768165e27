/* amx_emulation.h - the instructions of amx.h in plain C.
 *
 * Faults are kept: tiles that are used without a configuration, or in shapes that do not fit, trap.
 * Rows beyond a tile's own are neither read nor written. */
#ifndef BITDELTA_AMX_EMULATION_H_
#define BITDELTA_AMX_EMULATION_H_

#include <stdint.h>
#include <string.h>

#if !defined(BD_AMX_EMULATED)
#define BD_AMX_EMULATED
#endif
#include "amx.h" /* bd_tile_config */

#if !defined(TILES_PERMITTED)
#define TILES_PERMITTED() 1
#endif

typedef struct {
    bd_tile_config config; /* palette 0: none */
    uint8_t bytes[8][16][64];
} bd_tiles;

static inline void
tile_require(int condition)
{
    if (!condition) {
        __builtin_trap();
    }
}

static inline void
tile_configure(bd_tiles *tiles, const bd_tile_config *config)
{
    tile_require(config->palette == 1 && config->start_row == 0);
    for (int t = 0; t < 16; t++) {
        const int rows = config->n_rows[t], bytes = config->row_bytes[t];
        tile_require(t < 8 ? rows <= 16 && bytes <= 64 : rows == 0 && bytes == 0);
        tile_require((rows == 0) == (bytes == 0));
    }
    memset(tiles, 0, sizeof *tiles);
    tiles->config = *config;
}

static inline void
tile_release(bd_tiles *tiles)
{
    memset(tiles, 0, sizeof *tiles);
}

/* Rows of a tile, which must be configured. */
static inline int
tile_rows(const bd_tiles *tiles, int tile)
{
    tile_require(tiles->config.palette == 1 && tiles->config.n_rows[tile] > 0);
    return tiles->config.n_rows[tile];
}

static inline void
tile_load(bd_tiles *tiles, int tile, const void *address, int64_t row_bytes)
{
    const int n_rows = tile_rows(tiles, tile);
    memset(tiles->bytes[tile], 0, sizeof tiles->bytes[tile]);
    for (int r = 0; r < n_rows; r++) {
        memcpy(tiles->bytes[tile][r], (const char *)address + r * row_bytes,
               tiles->config.row_bytes[tile]);
    }
}

static inline void
tile_store(const bd_tiles *tiles, int tile, void *address, int64_t row_bytes)
{
    const int n_rows = tile_rows(tiles, tile);
    for (int r = 0; r < n_rows; r++) {
        memcpy((char *)address + r * row_bytes, tiles->bytes[tile][r],
               tiles->config.row_bytes[tile]);
    }
}

static inline void
tile_zero(bd_tiles *tiles, int tile)
{
    (void)tile_rows(tiles, tile);
    memset(tiles->bytes[tile], 0, sizeof tiles->bytes[tile]);
}

/* c[m][n] += a[m][4 r + i] * b[r][4 n + i] over r and i < 4, modulo 2^32. */
static inline void
tile_dot(bd_tiles *tiles, int c, int a, int b, int a_is_signed)
{
    const bd_tile_config *config = &tiles->config;
    const int M = tile_rows(tiles, c), R = tile_rows(tiles, b), N = config->row_bytes[c] / 4;
    tile_require(c != a && c != b && a != b && M == tile_rows(tiles, a));
    tile_require(config->row_bytes[a] == 4 * R && config->row_bytes[b] == 4 * N);
    for (int m = 0; m < M; m++) {
        uint32_t sums[16];
        memcpy(sums, tiles->bytes[c][m], sizeof sums);
        for (int k = 0; k < 4 * R; k++) {
            const uint8_t byte = tiles->bytes[a][m][k];
            const int32_t left = a_is_signed ? (int8_t)byte : byte;
            for (int n = 0; n < N; n++) {
                sums[n] += (uint32_t)(left * (int8_t)tiles->bytes[b][k / 4][4 * n + k % 4]);
            }
        }
        memcpy(tiles->bytes[c][m], sums, sizeof sums);
    }
}

#define TILE_CONFIGURE(tiles, config) tile_configure(tiles, config)
#define TILE_RELEASE(tiles) tile_release(tiles)
#define TILE_ZERO(tiles, tile) tile_zero(tiles, tile)
#define TILE_LOAD(tiles, tile, address, row_bytes) tile_load(tiles, tile, address, row_bytes)
#define TILE_STORE(tiles, tile, address, row_bytes) tile_store(tiles, tile, address, row_bytes)
#define TILE_DOT_SIGNED(tiles, c, a, b) tile_dot(tiles, c, a, b, 1)
#define TILE_DOT_UNSIGNED(tiles, c, a, b) tile_dot(tiles, c, a, b, 0)

#endif /* BITDELTA_AMX_EMULATION_H_ */
