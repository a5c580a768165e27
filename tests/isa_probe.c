/* isa_probe.c - what test_isa.py cannot see from Python: the tables' entries, the faults of the
 * emulations, what the AMX file does where the system refuses tiles, and other machines' products on an
 * emulator. One word says which. */
#include "kernels.h"

#include <math.h>
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

enum { MAX_ROWS = 40, LINES = 40, STRIPS = 3 };

static void
fill_random(void *data, size_t n, uint32_t seed)
{
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        ((uint8_t *)data)[i] = (uint8_t)(seed >> 24);
    }
}

static void *
allocate(int64_t bytes)
{
    return aligned_alloc(64, (size_t)(bytes / 64 + 1) * 64);
}

/* n_rows rows of 1280 columns with 3 strips. */
static void
multiply(const bd_product *product, int64_t n_rows, int32_t *z)
{
    uint32_t *sign = allocate(STRIPS * LINES * 64);
    int16_t *q = allocate(n_rows * LINES * 64);
    void *prepared = allocate(product->prepared_bytes(LINES, n_rows));
    void *scratch = allocate(product->scratch_bytes(STRIPS, LINES, n_rows));
    fill_random(sign, STRIPS * LINES * 64, 1);
    fill_random(q, (size_t)n_rows * LINES * 64, 2);
    product->prepare(q, LINES * 32, LINES, n_rows, prepared);
    product->product(sign, LINES * 16, STRIPS, LINES, prepared, n_rows, z, STRIPS * 16, scratch);
    free(sign), free(q), free(prepared), free(scratch);
}

/* Every product of every set against the generic one. */
static int
products(void)
{
    static int32_t expected[MAX_ROWS * STRIPS * 16], z[MAX_ROWS * STRIPS * 16];
    int n_wrong = 0;
    for (int64_t n_rows = 1; n_rows <= MAX_ROWS; n_rows += n_rows / 2 + 1) {
        multiply(&bd_select_kernels("generic")->products[0], n_rows, expected);
        for (const char *const *name = bd_available_isas(); *name != NULL; name++) {
            const bd_product *product = bd_select_kernels(*name)->products;
            for (; product->name != NULL; product++) {
                if (n_rows <= product->max_rows) {
                    multiply(product, n_rows, z);
                    n_wrong += memcmp(z, expected, (size_t)n_rows * STRIPS * 64) != 0;
                }
            }
        }
    }
    return n_wrong != 0;
}

/* Base products of every set are near the generic ones, and a row's bits its own. */
static int
streams(void)
{
    enum { K = 45, N = 5, M = 6, STRIDE = 48 };
    static _Alignas(64) float x[M * STRIDE], weight[N * K], expected[M * N], out[M * N], own[N];
    uint16_t half[N * K];
    for (int i = 0; i < M * STRIDE; i++) {
        x[i] = (float)(i * 37 % 101) / 50.0f - 1.0f;
    }
    for (int i = 0; i < N * K; i++) {
        weight[i] = (float)(i * 53 % 97) / 48.0f - 1.0f;
        half[i] = (uint16_t)(0x3800 + i * 89 % 512);
    }
    int n_wrong = 0;
    for (const char *const *name = bd_available_isas(); *name != NULL; name++) {
        const bd_kernels *table = bd_select_kernels(*name);
        for (int d = 0; d < 3; d++) {
            const void *w = d == BD_F32 ? (void *)weight : half;
            bd_select_kernels("generic")->stream_rows(x, STRIDE, M, w, (bd_dtype)d, K, N, K,
                                                      expected, N);
            table->stream_rows(x, STRIDE, M, w, (bd_dtype)d, K, N, K, out, N);
            for (int i = 0; i < M * N; i++) {
                n_wrong += fabsf(out[i] - expected[i]) > 1e-4f;
            }
            for (int m = 0; m < M; m++) {
                table->stream_rows(x + m * STRIDE, STRIDE, 1, w, (bd_dtype)d, K, N, K, own, N);
                n_wrong += memcmp(own, out + m * N, sizeof own) != 0;
            }
        }
    }
    return n_wrong != 0;
}

static int
refused(void)
{
    static int32_t with[MAX_ROWS * STRIPS * 16], without[MAX_ROWS * STRIPS * 16];
    bd_kernels table;
    memset(&table, 0, sizeof table);
    bd_fill_avx512_linear_emulated(&table);
    fill_amx_here(&table);
    multiply(&table.products[1], MAX_ROWS, with);
    tiles_permitted = 0;
    multiply(&table.products[1], MAX_ROWS, without);
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
    if (strcmp(what, "products") == 0) {
        return products();
    }
    if (strcmp(what, "streams") == 0) {
        return streams();
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
