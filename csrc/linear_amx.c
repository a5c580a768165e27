/* linear_amx.c - products of many rows of one tenant with AMX int8 tiles; the rest of the table is
 * that of AVX-512.
 *
 * q = 256 high + low, a signed and an unsigned byte, so z = 256 (sum of +-high) + (sum of +-low), both
 * exact in int32. Tiles of 64 columns: A is rows of q; B has in its row r, for each of the 16 rows of a
 * strip, the signs of columns 4 r .. 4 r + 3 as bytes +1 and -1, which is what one vpermd makes of a
 * line shifted by 4 r bits. Two strips share the tiles of q. */
#include <string.h>

#include "avx512.h"
#include "amx.h"
#include "kernels.h"

#if BD_AVX512 && BD_AMX
AVX512_BEGIN

enum {
    LUT_ROWS = 3,        /* from 4 rows on tiles are faster (394 to 525 us, 4096 x 4096) */
    TILE_ROWS = 16,      /* most rows of a tile */
    TILE_BYTES = 1024,   /* 16 rows of 64 bytes */
    LINE_BYTES = 512,    /* a line as bytes +1 and -1: half a tile */
    BLOCK_LINES = 32,    /* expanded at a time: two strips take 32 KB, which the L1 cache holds */
    PREFETCH_LINES = 96, /* 6 KB ahead in both strips */
};

/* Tiles of the sums of the first and second strip, of q, and of the signs. */
#define HIGH_0 0
#define LOW_0 1
#define HIGH_1 2
#define LOW_1 3
#define Q_HIGH 4
#define Q_LOW 5
#define SIGN_0 6
#define SIGN_1 7

/* Entry i: byte b is +1 where bit b of i is 1, else -1. */
static const uint32_t NIBBLE_SIGNS[16] = {
    0xFFFFFFFF, 0xFFFFFF01, 0xFFFF01FF, 0xFFFF0101, 0xFF01FFFF, 0xFF01FF01, 0xFF0101FF, 0xFF010101,
    0x01FFFFFF, 0x01FFFF01, 0x01FF01FF, 0x01FF0101, 0x0101FFFF, 0x0101FF01, 0x010101FF, 0x01010101,
};

/* A call of `product`. The rows are divided evenly into tiles, so one configuration serves all. */
typedef struct {
    const uint32_t *sign;
    int64_t strip_stride, n_strips, n_lines;
    const uint8_t *q; /* prepared: [row tile][64 columns][high, low][rows of a tile][64] */
    int64_t n_rows, n_tiles, tile_rows;
    uint8_t *signs; /* scratch: [2][BLOCK_LINES][LINE_BYTES] */
    int32_t *sums;  /* scratch: [4][TILE_ROWS][16] */
    int32_t *z;
    int64_t z_stride;
    bd_tiles *tiles;
} amx_call;

static int64_t
count_tiles(int64_t n_rows)
{
    return (n_rows + TILE_ROWS - 1) / TILE_ROWS;
}

static int64_t
count_tile_rows(int64_t n_rows)
{
    const int64_t n_tiles = count_tiles(n_rows);
    return (n_rows + n_tiles - 1) / n_tiles;
}

/* ---- where the system refuses tiles ----------------------------------------------------------- */

static bd_product
without_tiles(void)
{
    bd_kernels table;
    memset(&table, 0, sizeof table);
    bd_fill_avx512_linear(&table);
    return table.products[1];
}

/* ---- preparation ------------------------------------------------------------------------------ */

static int64_t
amx_prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    if (!TILES_PERMITTED()) {
        return without_tiles().prepared_bytes(n_lines, n_rows);
    }
    return count_tiles(n_rows) * count_tile_rows(n_rows) * n_lines * 64;
}

static int64_t
amx_scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    if (!TILES_PERMITTED()) {
        return without_tiles().scratch_bytes(n_strips, n_lines, n_rows);
    }
    return 2 * BLOCK_LINES * LINE_BYTES + 4 * TILE_BYTES;
}

static void
split_bytes(const int16_t *q, uint8_t *high, uint8_t *low)
{
    for (int k = 0; k < 64; k++) {
        high[k] = (uint8_t)((uint16_t)q[k] >> 8);
        low[k] = (uint8_t)q[k];
    }
}

static void
amx_prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    if (!TILES_PERMITTED()) {
        without_tiles().prepare(q, q_stride, n_lines, n_rows, prepared);
        return;
    }
    const int64_t tile_rows = count_tile_rows(n_rows), tile_bytes = tile_rows * 64;
    uint8_t *tile = prepared;
    for (int64_t first = 0; first < n_rows; first += tile_rows) {
        for (int64_t k = 0; k < n_lines * BD_WORD_BITS; k += 64, tile += 2 * tile_bytes) {
            for (int64_t r = 0; r < tile_rows; r++) {
                uint8_t *high = tile + r * 64, *low = high + tile_bytes;
                if (first + r < n_rows) {
                    split_bytes(q + (first + r) * q_stride + k, high, low);
                } else {
                    memset(high, 0, 64);
                    memset(low, 0, 64);
                }
            }
        }
    }
}

/* ---- product ---------------------------------------------------------------------------------- */

static void
configure(const amx_call *call)
{
    bd_tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.n_rows[t] = t < SIGN_0 ? (uint8_t)call->tile_rows : TILE_ROWS;
    }
    TILE_CONFIGURE(call->tiles, &config);
}

/* Signs of n lines of S strips from line l on -> bytes, in the order of B tiles. Expanded by the block,
 * since tile loads cannot take their bytes from stores still under way. */
INLINE void
expand(const amx_call *call, int64_t strip, int64_t l, int64_t n, const int S)
{
    const __m512i signs = _mm512_loadu_si512(NIBBLE_SIGNS);
    for (int s = 0; s < S; s++) {
        const uint32_t *line = call->sign + (strip + s) * call->strip_stride + l * 16;
        uint8_t *out = call->signs + s * BLOCK_LINES * LINE_BYTES;
        for (int64_t i = 0; i < n; i++, line += 16, out += LINE_BYTES) {
            /* Past the end of a strip, on to the same place two strips on. */
            const int64_t ahead =
                l + i + PREFETCH_LINES < call->n_lines
                    ? 16 * PREFETCH_LINES
                    : 2 * call->strip_stride + 16 * (PREFETCH_LINES - call->n_lines);
            _mm_prefetch((const char *)(line + ahead), _MM_HINT_T1);
            __m512i word = _mm512_load_si512(line);
            UNROLL(8)
            for (int j = 0; j < 8; j++) {
                _mm512_store_si512(out + 64 * j, _mm512_permutexvar_epi32(word, signs));
                word = _mm512_srli_epi32(word, 4);
            }
        }
    }
}

INLINE void
zero_sums(const amx_call *call, const int S)
{
    TILE_ZERO(call->tiles, HIGH_0);
    TILE_ZERO(call->tiles, LOW_0);
    if (S == 2) {
        TILE_ZERO(call->tiles, HIGH_1);
        TILE_ZERO(call->tiles, LOW_1);
    }
}

/* Adds the products of row tile t with the n expanded lines, which begin at line l. */
INLINE void
add_products(const amx_call *call, int64_t t, int64_t l, int64_t n, const int S)
{
    const int64_t tile_bytes = call->tile_rows * 64;
    const uint8_t *q = call->q + (t * call->n_lines + l) * tile_bytes;
    const uint8_t *sign = call->signs;
    for (int64_t i = 0; i < n; i += 2, q += 2 * tile_bytes, sign += TILE_BYTES) {
        TILE_LOAD(call->tiles, SIGN_0, sign, 64);
        TILE_LOAD(call->tiles, Q_HIGH, q, 64);
        TILE_DOT_SIGNED(call->tiles, HIGH_0, Q_HIGH, SIGN_0);
        TILE_LOAD(call->tiles, Q_LOW, q + tile_bytes, 64);
        TILE_DOT_UNSIGNED(call->tiles, LOW_0, Q_LOW, SIGN_0);
        if (S == 2) {
            TILE_LOAD(call->tiles, SIGN_1, sign + BLOCK_LINES * LINE_BYTES, 64);
            TILE_DOT_SIGNED(call->tiles, HIGH_1, Q_HIGH, SIGN_1);
            TILE_DOT_UNSIGNED(call->tiles, LOW_1, Q_LOW, SIGN_1);
        }
    }
}

/* z = or += 256 high + low, for the rows of tile t. */
INLINE void
write_sums(const amx_call *call, int64_t t, int64_t strip, int first, const int S)
{
    TILE_STORE(call->tiles, HIGH_0, call->sums, 64);
    TILE_STORE(call->tiles, LOW_0, call->sums + 256, 64);
    if (S == 2) {
        TILE_STORE(call->tiles, HIGH_1, call->sums + 512, 64);
        TILE_STORE(call->tiles, LOW_1, call->sums + 768, 64);
    }
    const int64_t row = t * call->tile_rows, left = call->n_rows - row;
    const int64_t n_rows = left < call->tile_rows ? left : call->tile_rows;
    for (int64_t r = 0; r < n_rows; r++) {
        for (int s = 0; s < S; s++) {
            const int32_t *high = call->sums + 512 * s + 16 * r, *low = high + 256;
            int32_t *z = call->z + (row + r) * call->z_stride + 16 * (strip + s);
            for (int i = 0; i < 16; i++) {
                z[i] = (first ? 0 : z[i]) + (high[i] * 256 + low[i]);
            }
        }
    }
}

/* All rows in one tile: the sums stay in their tiles for all columns. */
INLINE void
few_rows(const amx_call *call, int64_t strip, const int S)
{
    zero_sums(call, S);
    for (int64_t l = 0; l < call->n_lines; l += BLOCK_LINES) {
        const int64_t left = call->n_lines - l, n = left < BLOCK_LINES ? left : BLOCK_LINES;
        expand(call, strip, l, n, S);
        add_products(call, 0, l, n, S);
    }
    write_sums(call, 0, strip, 1, S);
}

/* Several tiles of rows: a block of signs is expanded once for all of them. */
INLINE void
many_rows(const amx_call *call, int64_t strip, int64_t l, const int S)
{
    const int64_t left = call->n_lines - l, n = left < BLOCK_LINES ? left : BLOCK_LINES;
    expand(call, strip, l, n, S);
    for (int64_t t = 0; t < call->n_tiles; t++) {
        zero_sums(call, S);
        add_products(call, t, l, n, S);
        write_sums(call, t, strip, l == 0, S);
    }
}

static void
all_strips(const amx_call *call)
{
    const int64_t n_pairs = call->n_strips / 2, odd = call->n_strips % 2;
    if (call->n_tiles == 1) {
        for (int64_t i = 0; i < n_pairs; i++) {
            few_rows(call, 2 * i, 2);
        }
        if (odd) {
            few_rows(call, 2 * n_pairs, 1);
        }
        return;
    }
    for (int64_t l = 0; l < call->n_lines; l += BLOCK_LINES) {
        for (int64_t i = 0; i < n_pairs; i++) {
            many_rows(call, 2 * i, l, 2);
        }
        if (odd) {
            many_rows(call, 2 * n_pairs, l, 1);
        }
    }
}

static void
amx_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
            const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    if (!TILES_PERMITTED()) {
        without_tiles().product(sign, strip_stride, n_strips, n_lines, prepared, n_rows, z,
                                z_stride, scratch);
        return;
    }
    bd_tiles tiles;
    const amx_call call = {
        .sign = sign,
        .strip_stride = strip_stride,
        .n_strips = n_strips,
        .n_lines = n_lines,
        .q = prepared,
        .n_rows = n_rows,
        .n_tiles = count_tiles(n_rows),
        .tile_rows = count_tile_rows(n_rows),
        .signs = scratch,
        .sums = (int32_t *)scratch + 2 * BLOCK_LINES * LINE_BYTES / 4,
        .z = z,
        .z_stride = z_stride,
        .tiles = &tiles,
    };
    /* Set and left by every call: other libraries of this thread configure tiles for themselves. */
    configure(&call);
    all_strips(&call);
    TILE_RELEASE(call.tiles);
}

AVX512_END

/* On top of bd_fill_avx512_linear: few rows keep its look-ups. */
void
bd_fill_amx(bd_kernels *table)
{
    static const bd_product tiles = {
        .name = "tiles",
        .max_rows = INT64_MAX,
        .prepared_bytes = amx_prepared_bytes,
        .scratch_bytes = amx_scratch_bytes,
        .prepare = amx_prepare,
        .product = amx_product,
    };
    table->products[0].max_rows = LUT_ROWS;
    table->products[1] = tiles;
    table->products[2] = (bd_product){0};
}

#endif /* BD_AVX512 && BD_AMX */
