/* checksum.c - CRC-32C (Castagnoli; RFC 3720 B.4) by the processor's instruction, or by a table.
 *
 * Sums are polynomials over GF(2), reflected: bit 31 is x^0. The instruction has a latency of three
 * cycles and starts one a cycle, so three pieces of a block run side by side; a piece's sum moves past
 * the next piece by a multiplication with x^(8 bytes), which for fixed lengths is a look-up. */
#include "bitdelta.h"
#include "checksum.h"

#include <string.h>

#if defined(__x86_64__) && defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

#define POLYNOMIAL 0x82F63B78u

/* ---- joining ---------------------------------------------------------------------------------- */

/* a times b mod the polynomial. */
static uint32_t
multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int i = 31; i >= 0; i--) {
        product ^= b & (0u - (a >> i & 1u));
        b = b >> 1 ^ (POLYNOMIAL & (0u - (b & 1u)));
    }
    return product;
}

uint32_t
bd_crc32c_shift(uint64_t n_bytes)
{
    uint32_t power = 0x00800000u; /* x^8, squared at every bit of n_bytes */
    uint32_t shift = 0x80000000u;
    for (; n_bytes != 0; n_bytes >>= 1) {
        if (n_bytes & 1u) {
            shift = multiply(shift, power);
        }
        power = multiply(power, power);
    }
    return shift;
}

uint32_t
bd_crc32c_join(uint32_t crc_a, uint32_t shift, uint32_t crc_b)
{
    return multiply(crc_a, shift) ^ crc_b;
}

uint32_t
bd_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b)
{
    return bd_crc32c_join(crc_a, bd_crc32c_shift(n_bytes_b), crc_b);
}

/* ---- summing ---------------------------------------------------------------------------------- */

/* The sum goes on by one byte, or by eight (little-endian). */
#if defined(__x86_64__) && defined(__SSE4_2__)

#define ADD_BYTE(crc, byte) _mm_crc32_u8(crc, byte)
#define ADD_WORD(crc, word) ((uint32_t)_mm_crc32_u64(crc, word))

#elif defined(__ARM_FEATURE_CRC32)

#define ADD_BYTE(crc, byte) __crc32cb(crc, byte)
#define ADD_WORD(crc, word) __crc32cd(crc, word)

#else

static inline uint32_t
add_byte(uint32_t crc, unsigned byte)
{
    /* by_nibble[v]: what the 4 bits v leave when they move out. */
    static const uint32_t by_nibble[16] = {0x00000000, 0x105EC76F, 0x20BD8EDE, 0x30E349B1,
                                           0x417B1DBC, 0x5125DAD3, 0x61C69362, 0x7198540D,
                                           0x82F63B78, 0x92A8FC17, 0xA24BB5A6, 0xB21572C9,
                                           0xC38D26C4, 0xD3D3E1AB, 0xE330A81A, 0xF36E6F75};
    crc ^= byte;
    crc = crc >> 4 ^ by_nibble[crc & 15u];
    return crc >> 4 ^ by_nibble[crc & 15u];
}

static inline uint32_t
add_word(uint32_t crc, uint64_t word)
{
    for (int i = 0; i < 64; i += 8) {
        crc = add_byte(crc, (unsigned)(word >> i & 255u));
    }
    return crc;
}

#define ADD_BYTE(crc, byte) add_byte(crc, byte)
#define ADD_WORD(crc, word) add_word(crc, word)

#endif

/* shift_n[i][v]: v << 4 i times x^(8 n). */
static const uint32_t shift_1024[8][16] = {
    {0x00000000, 0xFE314258, 0xF98EF241, 0x07BFB019, 0xF6F19273, 0x08C0D02B, 0x0F7F6032, 0xF14E226A,
     0xE80F5217, 0x163E104F, 0x1181A056, 0xEFB0E20E, 0x1EFEC064, 0xE0CF823C, 0xE7703225,
     0x1941707D},
    {0x00000000, 0xD5F2D2DF, 0xAE09D34F, 0x7BFB0190, 0x59FFD06F, 0x8C0D02B0, 0xF7F60320, 0x2204D1FF,
     0xB3FFA0DE, 0x660D7201, 0x1DF67391, 0xC804A14E, 0xEA0070B1, 0x3FF2A26E, 0x4409A3FE,
     0x91FB7121},
    {0x00000000, 0x6213374D, 0xC4266E9A, 0xA63559D7, 0x8DA0ABC5, 0xEFB39C88, 0x4986C55F, 0x2B95F212,
     0x1EAD217B, 0x7CBE1636, 0xDA8B4FE1, 0xB89878AC, 0x930D8ABE, 0xF11EBDF3, 0x572BE424,
     0x3538D369},
    {0x00000000, 0x3D5A42F6, 0x7AB485EC, 0x47EEC71A, 0xF5690BD8, 0xC833492E, 0x8FDD8E34, 0xB287CCC2,
     0xEF3E6141, 0xD26423B7, 0x958AE4AD, 0xA8D0A65B, 0x1A576A99, 0x270D286F, 0x60E3EF75,
     0x5DB9AD83},
    {0x00000000, 0xDB90B473, 0xB2CD1E17, 0x695DAA64, 0x60764ADF, 0xBBE6FEAC, 0xD2BB54C8, 0x092BE0BB,
     0xC0EC95BE, 0x1B7C21CD, 0x72218BA9, 0xA9B13FDA, 0xA09ADF61, 0x7B0A6B12, 0x1257C176,
     0xC9C77505},
    {0x00000000, 0x84355D8D, 0x0D86CDEB, 0x89B39066, 0x1B0D9BD6, 0x9F38C65B, 0x168B563D, 0x92BE0BB0,
     0x361B37AC, 0xB22E6A21, 0x3B9DFA47, 0xBFA8A7CA, 0x2D16AC7A, 0xA923F1F7, 0x20906191,
     0xA4A53C1C},
    {0x00000000, 0x6C366F58, 0xD86CDEB0, 0xB45AB1E8, 0xB535CB91, 0xD903A4C9, 0x6D591521, 0x016F7A79,
     0x6F87E1D3, 0x03B18E8B, 0xB7EB3F63, 0xDBDD503B, 0xDAB22A42, 0xB684451A, 0x02DEF4F2,
     0x6EE89BAA},
    {0x00000000, 0xDF0FC3A6, 0xBBF3F1BD, 0x64FC321B, 0x720B958B, 0xAD04562D, 0xC9F86436, 0x16F7A790,
     0xE4172B16, 0x3B18E8B0, 0x5FE4DAAB, 0x80EB190D, 0x961CBE9D, 0x49137D3B, 0x2DEF4F20,
     0xF2E08C86},
};
static const uint32_t shift_128[8][16] = {
    {0x00000000, 0x6992CEA2, 0xD3259D44, 0xBAB753E6, 0xA3A74C79, 0xCA3582DB, 0x7082D13D, 0x19101F9F,
     0x42A2EE03, 0x2B3020A1, 0x91877347, 0xF815BDE5, 0xE105A27A, 0x88976CD8, 0x32203F3E,
     0x5BB2F19C},
    {0x00000000, 0x8545DC06, 0x0F67CEFD, 0x8A2212FB, 0x1ECF9DFA, 0x9B8A41FC, 0x11A85307, 0x94ED8F01,
     0x3D9F3BF4, 0xB8DAE7F2, 0x32F8F509, 0xB7BD290F, 0x2350A60E, 0xA6157A08, 0x2C3768F3,
     0xA972B4F5},
    {0x00000000, 0x7B3E77E8, 0xF67CEFD0, 0x8D429838, 0xE915A951, 0x922BDEB9, 0x1F694681, 0x64573169,
     0xD7C72453, 0xACF953BB, 0x21BBCB83, 0x5A85BC6B, 0x3ED28D02, 0x45ECFAEA, 0xC8AE62D2,
     0xB390153A},
    {0x00000000, 0xAA623E57, 0x51280A5F, 0xFB4A3408, 0xA25014BE, 0x08322AE9, 0xF3781EE1, 0x591A20B6,
     0x414C5F8D, 0xEB2E61DA, 0x106455D2, 0xBA066B85, 0xE31C4B33, 0x497E7564, 0xB234416C,
     0x18567F3B},
    {0x00000000, 0x8298BF1A, 0x00DD08C5, 0x8245B7DF, 0x01BA118A, 0x8322AE90, 0x0167194F, 0x83FFA655,
     0x03742314, 0x81EC9C0E, 0x03A92BD1, 0x813194CB, 0x02CE329E, 0x80568D84, 0x02133A5B,
     0x808B8541},
    {0x00000000, 0x06E84628, 0x0DD08C50, 0x0B38CA78, 0x1BA118A0, 0x1D495E88, 0x167194F0, 0x1099D2D8,
     0x37423140, 0x31AA7768, 0x3A92BD10, 0x3C7AFB38, 0x2CE329E0, 0x2A0B6FC8, 0x2133A5B0,
     0x27DBE398},
    {0x00000000, 0x6E846280, 0xDD08C500, 0xB38CA780, 0xBFFDFCF1, 0xD1799E71, 0x62F539F1, 0x0C715B71,
     0x7A178F13, 0x1493ED93, 0xA71F4A13, 0xC99B2893, 0xC5EA73E2, 0xAB6E1162, 0x18E2B6E2,
     0x7666D462},
    {0x00000000, 0xF42F1E26, 0xEDB24ABD, 0x199D549B, 0xDE88E38B, 0x2AA7FDAD, 0x333AA936, 0xC715B710,
     0xB8FDB1E7, 0x4CD2AFC1, 0x554FFB5A, 0xA160E57C, 0x6675526C, 0x925A4C4A, 0x8BC718D1,
     0x7FE806F7},
};

static inline uint32_t
move(const uint32_t shift[8][16], uint32_t crc)
{
    uint32_t moved = 0;
    for (int i = 0; i < 8; i++) {
        moved ^= shift[i][crc >> 4 * i & 15u];
    }
    return moved;
}

static inline uint64_t
load_word(const unsigned char *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

/* Sums of 3 n bytes, n a multiple of 64; shift moves past n bytes. Three places at once hide the stream
 * from the processor's own prefetching: the next 3 n bytes are asked for by name. */
static inline uint32_t
sum_three(uint32_t crc, const unsigned char *bytes, size_t n, const uint32_t shift[8][16])
{
    uint32_t second = 0, third = 0;
    for (size_t line = 0; line < n; line += 64) {
        __builtin_prefetch(bytes + 3 * n + 3 * line);
        __builtin_prefetch(bytes + 3 * n + 3 * line + 64);
        __builtin_prefetch(bytes + 3 * n + 3 * line + 128);
        for (size_t i = line; i < line + 64; i += 8) {
            crc = ADD_WORD(crc, load_word(bytes + i));
            second = ADD_WORD(second, load_word(bytes + n + i));
            third = ADD_WORD(third, load_word(bytes + 2 * n + i));
        }
    }
    return move(shift, move(shift, crc) ^ second) ^ third;
}

uint32_t
bd_crc32c(uint32_t crc, const void *data, size_t n)
{
    const unsigned char *bytes = data;
    crc = ~crc;
    for (; n >= 3 * 1024; n -= 3 * 1024, bytes += 3 * 1024) {
        crc = sum_three(crc, bytes, 1024, shift_1024);
    }
    for (; n >= 3 * 128; n -= 3 * 128, bytes += 3 * 128) {
        crc = sum_three(crc, bytes, 128, shift_128);
    }
    for (; n >= 8; n -= 8, bytes += 8) {
        crc = ADD_WORD(crc, load_word(bytes));
    }
    for (; n > 0; n--, bytes++) {
        crc = ADD_BYTE(crc, *bytes);
    }
    return ~crc;
}

/* ---- rows ------------------------------------------------------------------------------------- */

void
bd_crc_plan_row(bd_crc_plan *plan, int64_t n_bytes)
{
    plan->n_bytes = n_bytes;
    plan->n_words = n_bytes / (8 * BD_CRC_CHAINS);
    uint32_t past_chain = bd_crc32c_shift((uint64_t)plan->n_words * 8);
    for (int i = 0; i < 8; i++) {
        for (uint32_t v = 0; v < 16; v++) {
            plan->shift[i][v] = multiply(past_chain, v << 4 * i);
        }
    }
}

void
bd_crc_begin_row(const bd_crc_plan *plan, uint32_t crc, const void *row, bd_crc_chains *chains)
{
    *chains = (bd_crc_chains){.bytes = row, .n_words = plan->n_words, .sums = {~crc}};
}

uint32_t
bd_crc_end_row(const bd_crc_plan *plan, bd_crc_chains *chains)
{
    uint64_t *sums = chains->sums;
    const unsigned char *bytes = chains->bytes;
    for (int64_t i = chains->n_done; i < plan->n_words; i++) {
        for (int chain = 0; chain < BD_CRC_CHAINS; chain++) {
            sums[chain] = ADD_WORD(sums[chain], load_word(bytes + 8 * (chain * plan->n_words + i)));
        }
    }
    uint32_t crc = (uint32_t)sums[0];
    for (int chain = 1; chain < BD_CRC_CHAINS; chain++) {
        crc = move(plan->shift, crc) ^ (uint32_t)sums[chain];
    }
    int64_t n_done = plan->n_words * 8 * BD_CRC_CHAINS;
    return bd_crc32c(~crc, bytes + n_done, (size_t)(plan->n_bytes - n_done));
}
