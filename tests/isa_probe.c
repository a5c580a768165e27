/* isa_probe.c - what test_isa.py cannot see from Python: the tables' entries, the faults of the
 * emulations, and what the AMX file does where the system refuses tiles. One word says which. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tiles_permitted = 1;
#define TILES_PERMITTED() tiles_permitted
#define BD_AVX512_EMULATED
#define BD_AMX_EMULATED
#define bd_fill_amx fill_amx_here
#define bd_fill_avx512_linear bd_fill_avx512_linear_emulated
#include "linear_amx.c"

/* A line for each set: its name, its products, and the entries that are not the generic ones. */
static int
tables(void)
{
    const bd_kernels *generic = bd_select_kernels("generic");
    for (const char *const *name = bd_available_isas(); *name != NULL; name++) {
        const bd_kernels *table = bd_select_kernels(*name);
        printf("%s", table->isa);
        for (int i = 0; i < BD_MAX_PRODUCTS && table->products[i].name != NULL; i++) {
            printf(" %s<=%lld", table->products[i].name, (long long)table->products[i].max_rows);
        }
#define ENTRY(entry) printf("%s", table->entry != generic->entry ? " " #entry : "")
        ENTRY(quantize);
        ENTRY(stream_rows);
        ENTRY(transposed_strip);
        ENTRY(extract_row);
        ENTRY(residual_row);
        ENTRY(expand_row);
        ENTRY(to_float32);
        printf("\n");
    }
    return bd_select_kernels("sse9") == NULL ? 0 : 1;
}

/* 40 rows of 1280 columns with 3 strips, by the second product of a table. */
enum { ROWS = 40, LINES = 40, STRIPS = 3 };

static void
fill_random(void *data, size_t n, uint32_t seed)
{
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        ((uint8_t *)data)[i] = (uint8_t)(seed >> 24);
    }
}

static void
multiply(int32_t *z)
{
    bd_kernels table;
    memset(&table, 0, sizeof table);
    bd_fill_avx512_linear_emulated(&table);
    fill_amx_here(&table);
    const bd_product *product = &table.products[1];
    uint32_t *sign = aligned_alloc(64, STRIPS * LINES * 64);
    int16_t *q = malloc(ROWS * LINES * 64);
    const int64_t bytes = product->prepared_bytes(LINES, ROWS);
    const int64_t scratch_bytes = product->scratch_bytes(STRIPS, LINES, ROWS);
    void *prepared = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    void *scratch = aligned_alloc(64, (size_t)(scratch_bytes + 63) / 64 * 64);
    fill_random(sign, STRIPS * LINES * 64, 1);
    fill_random(q, ROWS * LINES * 64, 2);
    product->prepare(q, LINES * 32, LINES, ROWS, prepared);
    product->product(sign, LINES * 16, STRIPS, LINES, prepared, ROWS, z, STRIPS * 16, scratch);
    free(sign), free(q), free(prepared), free(scratch);
}

static int
refused(void)
{
    static int32_t with[ROWS * STRIPS * 16], without[ROWS * STRIPS * 16];
    multiply(with);
    tiles_permitted = 0;
    multiply(without);
    return memcmp(with, without, sizeof with) != 0;
}

static bd_tiles tiles;
static uint8_t memory[1024];

static void
configure_tiles(int a_rows, int b_rows)
{
    bd_tile_config config = {.palette = 1};
    for (int t = 0; t < 3; t++) {
        config.row_bytes[t] = 64;
        config.n_rows[t] = (uint8_t)(t == 2 ? b_rows : a_rows);
    }
    TILE_CONFIGURE(&tiles, &config);
}

/* Tiles are used as they should be, or in one wrong way. */
static int
use_tiles(const char *how)
{
    if (strcmp(how, "unconfigured") != 0) {
        configure_tiles(5, strcmp(how, "shapes") == 0 ? 15 : 16);
    }
    if (strcmp(how, "released") == 0) {
        TILE_RELEASE(&tiles);
    }
    fill_random(memory, sizeof memory, 3);
    TILE_LOAD(&tiles, 1, memory, 64);
    TILE_LOAD(&tiles, 2, memory, 64);
    TILE_ZERO(&tiles, 0);
    TILE_DOT_SIGNED(&tiles, 0, 1, 2);
    if (strcmp(how, "same") == 0) {
        TILE_DOT_SIGNED(&tiles, 0, 1, 1);
    }
    TILE_LOAD(&tiles, strcmp(how, "unknown") == 0 ? 3 : 1, memory, 64);
    memset(memory, 0xAA, sizeof memory);
    TILE_STORE(&tiles, 0, memory, 64);
    return memory[5 * 64] == 0xAA ? 0 : 1; /* rows beyond the tile's are not written */
}

/* The dot product of one element against its formula, for both signs of a. */
static int
dot(void)
{
    uint8_t a[16 * 64], b[16 * 64];
    int32_t c[16 * 16];
    fill_random(a, sizeof a, 4);
    fill_random(b, sizeof b, 5);
    int n_wrong = 0;
    for (int is_signed = 0; is_signed < 2; is_signed++) {
        configure_tiles(16, 16);
        TILE_LOAD(&tiles, 1, a, 64);
        TILE_LOAD(&tiles, 2, b, 64);
        if (is_signed) {
            TILE_DOT_SIGNED(&tiles, 0, 1, 2);
        } else {
            TILE_DOT_UNSIGNED(&tiles, 0, 1, 2);
        }
        TILE_STORE(&tiles, 0, c, 64);
        for (int m = 0; m < 16; m++) {
            for (int n = 0; n < 16; n++) {
                int32_t sum = 0;
                for (int k = 0; k < 64; k++) {
                    const uint8_t byte = a[m * 64 + k];
                    sum +=
                        (is_signed ? (int8_t)byte : byte) * (int8_t)b[k / 4 * 64 + 4 * n + k % 4];
                }
                n_wrong += c[16 * m + n] != sum;
            }
        }
    }
    return n_wrong != 0;
}

/* Registers are read from an aligned address, from any, or from a wrong one. */
static int
use_registers(const char *how)
{
    uint8_t *lines = aligned_alloc(64, 192);
    fill_random(lines, 192, 6);
    __m512i any = _mm512_loadu_si512(lines + 4);
    __m512i aligned = _mm512_load_si512(lines + (strcmp(how, "unaligned") == 0 ? 4 : 64));
    const int n_wrong = memcmp(&any, lines + 4, 64) != 0 || memcmp(&aligned, lines + 64, 64) != 0;
    free(lines);
    return n_wrong;
}

int
main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "", *how = argc > 2 ? argv[2] : "";
    if (strcmp(what, "tables") == 0) {
        return tables();
    }
    if (strcmp(what, "refused") == 0) {
        return refused();
    }
    if (strcmp(what, "tiles") == 0) {
        return use_tiles(how);
    }
    if (strcmp(what, "registers") == 0) {
        return use_registers(how);
    }
    return strcmp(what, "dot") == 0 ? dot() : 2;
}
