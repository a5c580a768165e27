/* linear_avx2.c - AVX2 (with FMA, F16C) inner loops of linear.c.
 *
 * Products by table look-up: vpshufb looks up 32 rows at once in a table of 16 bytes, whose index is
 * the signs of four columns. The sum of the four q under the bits, from its least value on, has at most
 * 18 bits: three tables hold its digits of 6 bits. Bytes take four digits before they are widened. */
#if defined(__x86_64__)

#include <stddef.h>
#include <string.h>

#include "avx2.h"
#include "kernels.h"
#include "linear_avx2.h"

AVX2_BEGIN

enum {
    GROUPS = 8,          /* of four columns in a line */
    DIGITS = 3,          /* 6, 6 and 5 bits */
    TABLE = 16 * DIGITS, /* bytes: the tables of a group */
    HEAD_BYTES = 64,     /* before a row's tables: minus the sum of |q| */
    BLOCK = 32,          /* lines whose indices and tables stay in the L1 cache */
    SINGLE_LINES = 64,   /* the same, for one row of x and no indices; sums of digits fit int16 */
    PAIRS = 2,           /* of strips, whose indices of a block are extracted at once */
    FEW_ROWS = 4,        /* rows whose tables of all lines stay in the L2 cache */
    MANY_ROWS = 16       /* rows whose tables of a block do */
};

/* ---- tables ----------------------------------------------------------------------------------- */

/* The tables of four columns: entry i is the sum of the q under the bits of i, less the sum of the
 * negative ones, 0 .. 2^17, as digits. 2^17, which would need another bit, is written as 31, 63, 64 or
 * 31, 64, 0, by turns (shift = 0 or 6), so that 4 of the lower and 8 of the upper digits fit a byte. */
INLINE void
make_tables(const int16_t *q, __m128i *table, const int shift)
{
    /* Entries 0-3 and 8-11, then 4-7 and 12-15: what packing joins in order. */
    const __m256i bit0 = _mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1);
    const __m256i bit1 = _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1);
    const __m256i bit3 = _mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1);
    const __m256i low6 = _mm256_set1_epi32(63);
    const int least = (q[0] < 0 ? q[0] : 0) + (q[1] < 0 ? q[1] : 0) + (q[2] < 0 ? q[2] : 0) +
                      (q[3] < 0 ? q[3] : 0);
    __m256i sum[2], digit[DIGITS][2];
    sum[0] = _mm256_and_si256(_mm256_set1_epi32(q[0]), bit0);
    sum[0] = _mm256_add_epi32(sum[0], _mm256_and_si256(_mm256_set1_epi32(q[1]), bit1));
    sum[0] = _mm256_add_epi32(sum[0], _mm256_and_si256(_mm256_set1_epi32(q[3]), bit3));
    sum[0] = _mm256_sub_epi32(sum[0], _mm256_set1_epi32(least));
    sum[1] = _mm256_add_epi32(sum[0], _mm256_set1_epi32(q[2]));
    for (int i = 0; i < 2; i++) {
        const __m256i over = _mm256_srli_epi32(sum[i], 17);
        sum[i] = _mm256_sub_epi32(sum[i], _mm256_slli_epi32(over, shift));
        digit[0][i] = _mm256_and_si256(sum[i], low6);
        digit[1][i] = _mm256_and_si256(_mm256_srli_epi32(sum[i], 6), low6);
        digit[2][i] = _mm256_srli_epi32(sum[i], 12);
        digit[shift / 6][i] = _mm256_add_epi32(digit[shift / 6][i], over);
    }
    __m256i d0 = _mm256_packus_epi32(digit[0][0], digit[0][1]);
    __m256i d1 = _mm256_packus_epi32(digit[1][0], digit[1][1]);
    __m256i d2 = _mm256_packus_epi32(digit[2][0], digit[2][1]);
    d0 = _mm256_permute4x64_epi64(_mm256_packus_epi16(d0, d1), 0xD8);
    d2 = _mm256_permute4x64_epi64(_mm256_packus_epi16(d2, d2), 0xD8);
    _mm_store_si128(table, _mm256_castsi256_si128(d0));
    _mm_store_si128(table + 4, _mm256_extracti128_si256(d0, 1));
    _mm_store_si128(table + 8, _mm256_castsi256_si128(d2));
}

INLINE int32_t
sum_of_magnitudes(const int16_t *q, int64_t n_lines)
{
    /* |q| as unsigned words, so that -32768 keeps its size. */
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < 2 * n_lines; i++) {
        __m256i a = _mm256_abs_epi16(_mm256_loadu_si256((const void *)(q + 16 * i)));
        sum = _mm256_add_epi32(sum, _mm256_and_si256(a, low));
        sum = _mm256_add_epi32(sum, _mm256_srli_epi32(a, 16));
    }
    int32_t lane[8];
    _mm256_storeu_si256((void *)lane, sum);
    return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
}

/* ---- signs to indices ------------------------------------------------------------------------- */

/* Byte b of the words of two lines, 32 rows: rows 0-3 and 8-11 of either, then 4-7 and 12-15. */
INLINE void
load_bytes(const uint32_t *line0, const uint32_t *line1, __m256i byte[4])
{
    const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                           4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i a = _mm256_shuffle_epi8(_mm256_load_si256((const void *)line0), order);
    __m256i b = _mm256_shuffle_epi8(_mm256_load_si256((const void *)(line0 + 8)), order);
    __m256i c = _mm256_shuffle_epi8(_mm256_load_si256((const void *)line1), order);
    __m256i d = _mm256_shuffle_epi8(_mm256_load_si256((const void *)(line1 + 8)), order);
    __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    byte[0] = _mm256_unpacklo_epi64(ab0, cd0);
    byte[1] = _mm256_unpackhi_epi64(ab0, cd0);
    byte[2] = _mm256_unpacklo_epi64(ab1, cd1);
    byte[3] = _mm256_unpackhi_epi64(ab1, cd1);
}

INLINE __m256i
low_nibbles(__m256i byte)
{
    return _mm256_and_si256(byte, _mm256_set1_epi8(15));
}

INLINE __m256i
high_nibbles(__m256i byte)
{
    return low_nibbles(_mm256_mulhi_epu16(byte, _mm256_set1_epi16(1 << 12)));
}

/* ---- sums ------------------------------------------------------------------------------------- */

/* Keeps a value in its register here: compilers would else reorder sums, and spill. */
#define HOLD(value) __asm__ __volatile__("" : "+x"(value))

/* A digit's sums: pairs of bytes as words, and their upper bytes alone. Words may wrap: the lower
 * bytes' sum is words - 256 * upper, modulo 2^16. */
typedef struct {
    __m256i words, upper;
} digit_sums;

INLINE void
widen(digit_sums *sums, __m256i bytes)
{
    sums->words = _mm256_add_epi16(sums->words, bytes);
    HOLD(sums->words);
    sums->upper =
        _mm256_add_epi16(sums->upper, _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 << 8)));
    HOLD(sums->upper);
}

/* The sums of 32 rows, in order, as int32. */
INLINE void
join_digits(const digit_sums digit[DIGITS], __m256i sum[4])
{
    const __m256i weights = _mm256_set1_epi32(64 << 16 | 1);
    __m256i lower[DIGITS];
    for (int d = 0; d < DIGITS; d++) {
        lower[d] = _mm256_sub_epi16(digit[d].words, _mm256_slli_epi16(digit[d].upper, 8));
    }
    const __m256i zero = _mm256_setzero_si256();
#define JOIN(unpack, which0, which1, which2)                             \
    _mm256_add_epi32(_mm256_madd_epi16(unpack(which0, which1), weights), \
                     _mm256_slli_epi32(unpack(which2, zero), 12))
    __m256i even0 = JOIN(_mm256_unpacklo_epi16, lower[0], lower[1], lower[2]);
    __m256i even1 = JOIN(_mm256_unpackhi_epi16, lower[0], lower[1], lower[2]);
    __m256i odd0 = JOIN(_mm256_unpacklo_epi16, digit[0].upper, digit[1].upper, digit[2].upper);
    __m256i odd1 = JOIN(_mm256_unpackhi_epi16, digit[0].upper, digit[1].upper, digit[2].upper);
#undef JOIN
    sum[0] = _mm256_unpacklo_epi32(even0, odd0);
    sum[1] = _mm256_unpackhi_epi32(even0, odd0);
    sum[2] = _mm256_unpacklo_epi32(even1, odd1);
    sum[3] = _mm256_unpackhi_epi32(even1, odd1);
}

/* z of two strips (or of the first alone): 2 * sum + start, or that added to what is there. */
INLINE void
store_sums(const __m256i sum[4], int n_strips, int32_t *z, int is_added, int32_t start)
{
    for (int i = 0; i < 2 * n_strips; i++) {
        __m256i before =
            is_added ? _mm256_loadu_si256((const void *)(z + 8 * i)) : _mm256_set1_epi32(start);
        before = _mm256_add_epi32(before, _mm256_slli_epi32(sum[i], 1));
        _mm256_storeu_si256((void *)(z + 8 * i), before);
    }
}

/* ---- products ---------------------------------------------------------------------------------
 *
 * prepared: for every row HEAD_BYTES, then tables in the order of their use:
 * [line][half a line][digit][four groups][16]. */

static int64_t
row_bytes(int64_t n_lines)
{
    return HEAD_BYTES + n_lines * GROUPS * TABLE;
}

static int64_t
lut_prepared_bytes(int64_t n_lines, int64_t n_rows)
{
    return n_rows * row_bytes(n_lines);
}

static int64_t
lut_scratch_bytes(int64_t n_strips, int64_t n_lines, int64_t n_rows)
{
    (void)n_strips, (void)n_lines, (void)n_rows;
    return PAIRS * BLOCK * GROUPS * 32;
}

static void
lut_prepare(const int16_t *q, int64_t q_stride, int64_t n_lines, int64_t n_rows, void *prepared)
{
    for (int64_t r = 0; r < n_rows; r++, q += q_stride) {
        char *row = (char *)prepared + r * row_bytes(n_lines);
        __m128i *table = (void *)(row + HEAD_BYTES);
        *(int32_t *)(void *)row = -sum_of_magnitudes(q, n_lines);
        for (int64_t k = 0; k < 32 * n_lines; k += 16, table += 4 * DIGITS) {
            make_tables(q + k, table, 0);
            make_tables(q + k + 4, table + 1, 6);
            make_tables(q + k + 8, table + 2, 0);
            make_tables(q + k + 12, table + 3, 6);
        }
    }
}

/* The indices of two strips: [line][group] of 32 rows. ahead: words from here to what is read next. */
INLINE void
extract_indices(const uint32_t *strip0, const uint32_t *strip1, int64_t ahead, int64_t n_lines,
                __m256i *index)
{
    for (int64_t l = 0; l < n_lines; l++, index += GROUPS) {
        __m256i byte[4];
        load_bytes(strip0 + 16 * l, strip1 + 16 * l, byte);
        _mm_prefetch((const char *)(strip0 + 16 * l + ahead), _MM_HINT_T1);
        _mm_prefetch((const char *)(strip1 + 16 * l + ahead), _MM_HINT_T1);
        for (int b = 0; b < 4; b++) {
            index[2 * b] = low_nibbles(byte[b]);
            index[2 * b + 1] = high_nibbles(byte[b]);
        }
    }
}

/* The sum of four groups' digits. */
INLINE __m256i
look_up(const __m128i *table, const __m256i index[4])
{
#define FOUND(i) _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table[i]), index[i])
    return _mm256_add_epi8(_mm256_add_epi8(FOUND(0), FOUND(1)),
                           _mm256_add_epi8(FOUND(2), FOUND(3)));
#undef FOUND
}

INLINE void
load_four(const __m256i *index, __m256i four[4])
{
    for (int i = 0; i < 4; i++) {
        four[i] = index[i];
        HOLD(four[i]);
    }
}

/* Three digits of 32 rows' sums, as they grow line by line. */
typedef struct {
    digit_sums low, middle, high;
    __m256i upper; /* the high digits of the first half of a line */
} line_sums;

INLINE line_sums
no_sums(void)
{
    const __m256i zero = _mm256_setzero_si256();
    return (line_sums){{zero, zero}, {zero, zero}, {zero, zero}, zero};
}

INLINE void
add_first_half(line_sums *sums, const __m128i *table, const __m256i index[4])
{
    widen(&sums->low, look_up(table, index));
    widen(&sums->middle, look_up(table + 4, index));
    sums->upper = look_up(table + 8, index);
    HOLD(sums->upper);
}

INLINE void
add_second_half(line_sums *sums, const __m128i *table, const __m256i index[4])
{
    widen(&sums->low, look_up(table + 12, index));
    widen(&sums->middle, look_up(table + 16, index));
    widen(&sums->high, _mm256_add_epi8(sums->upper, look_up(table + 20, index)));
}

/* Sums of 32 rows of the signs and one of x, over n_lines <= BLOCK lines. */
INLINE void
sum_lines(const __m256i *index, const __m128i *table, int64_t n_lines, __m256i sum[4])
{
    line_sums sums = no_sums();
    for (int64_t l = 0; l < n_lines; l++, index += GROUPS, table += GROUPS * DIGITS) {
        __m256i half[4];
        load_four(index, half);
        add_first_half(&sums, table, half);
        load_four(index + 4, half);
        add_second_half(&sums, table, half);
    }
    const digit_sums digit[DIGITS] = {sums.low, sums.middle, sums.high};
    join_digits(digit, sum);
}

/* The same for a single row of x, from the signs themselves. */
INLINE void
sum_signs(const uint32_t *strip0, const uint32_t *strip1, int64_t ahead, const __m128i *table,
          int64_t n_lines, __m256i sum[4])
{
    line_sums sums = no_sums();
    for (int64_t l = 0; l < n_lines; l++, table += GROUPS * DIGITS) {
        __m256i byte[4], half[4];
        load_bytes(strip0 + 16 * l, strip1 + 16 * l, byte);
        HOLD(byte[2]);
        HOLD(byte[3]);
        _mm_prefetch((const char *)(strip0 + 16 * l + ahead), _MM_HINT_T1);
        _mm_prefetch((const char *)(strip1 + 16 * l + ahead), _MM_HINT_T1);
        half[0] = low_nibbles(byte[0]), half[1] = high_nibbles(byte[0]);
        half[2] = low_nibbles(byte[1]), half[3] = high_nibbles(byte[1]);
        add_first_half(&sums, table, half);
        half[0] = low_nibbles(byte[2]), half[1] = high_nibbles(byte[2]);
        half[2] = low_nibbles(byte[3]), half[3] = high_nibbles(byte[3]);
        add_second_half(&sums, table, half);
    }
    const digit_sums digit[DIGITS] = {sums.low, sums.middle, sums.high};
    join_digits(digit, sum);
}

static void
single_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
               const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    (void)n_rows, (void)z_stride, (void)scratch;
    for (int64_t l = 0; l < n_lines; l += SINGLE_LINES) {
        const int64_t n_block = n_lines - l < SINGLE_LINES ? n_lines - l : SINGLE_LINES;
        const __m128i *table =
            (const void *)((const char *)prepared + HEAD_BYTES + l * GROUPS * TABLE);
        for (int64_t s = 0; s < n_strips; s += 2) {
            const uint32_t *strip = sign + s * strip_stride + 16 * l;
            __m256i sum[4];
            sum_signs(strip, s + 1 < n_strips ? strip + strip_stride : strip, 2 * strip_stride,
                      table, n_block, sum);
            store_sums(sum, s + 1 < n_strips ? 2 : 1, z + 16 * s, l > 0,
                       *(const int32_t *)prepared);
        }
    }
}

static void
lut_rows(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
         const char *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, __m256i *index)
{
    /* Few rows read strips as they lie; many read their tables once for all strips. */
    const int64_t stretch = n_rows <= FEW_ROWS ? n_lines : BLOCK;
    for (int64_t l0 = 0; l0 < n_lines; l0 += stretch) {
        for (int64_t s0 = 0; s0 < n_strips; s0 += 2 * PAIRS) {
            for (int64_t l = l0; l < l0 + stretch && l < n_lines; l += BLOCK) {
                const int64_t n_block = n_lines - l < BLOCK ? n_lines - l : BLOCK;
                const int64_t s1 = s0 + 2 * PAIRS < n_strips ? s0 + 2 * PAIRS : n_strips;
                const int64_t ahead = l + BLOCK < l0 + stretch && l + BLOCK < n_lines
                                          ? 16 * BLOCK
                                          : 2 * PAIRS * strip_stride - 16 * (l - l0);
                for (int64_t s = s0; s < s1; s += 2) {
                    const uint32_t *strip = sign + s * strip_stride + 16 * l;
                    extract_indices(strip, s + 1 < n_strips ? strip + strip_stride : strip, ahead,
                                    n_block, index + (s - s0) / 2 * BLOCK * GROUPS);
                }
                for (int64_t r = 0; r < n_rows; r++) {
                    const char *row = prepared + r * row_bytes(n_lines);
                    const __m128i *table = (const void *)(row + HEAD_BYTES + l * GROUPS * TABLE);
                    for (int64_t s = s0; s < s1; s += 2) {
                        __m256i sum[4];
                        sum_lines(index + (s - s0) / 2 * BLOCK * GROUPS, table, n_block, sum);
                        store_sums(sum, s + 1 < n_strips ? 2 : 1, z + r * z_stride + 16 * s, l > 0,
                                   *(const int32_t *)(const void *)row);
                    }
                }
            }
        }
    }
}

static void
lut_product(const uint32_t *sign, int64_t strip_stride, int64_t n_strips, int64_t n_lines,
            const void *prepared, int64_t n_rows, int32_t *z, int64_t z_stride, void *scratch)
{
    for (int64_t r = 0; r < n_rows; r += MANY_ROWS) {
        lut_rows(
            sign, strip_stride, n_strips, n_lines, (const char *)prepared + r * row_bytes(n_lines),
            n_rows - r < MANY_ROWS ? n_rows - r : MANY_ROWS, z + r * z_stride, z_stride, scratch);
    }
}

AVX2_END

void
bd_fill_avx2_linear(bd_kernels *table)
{
    static const bd_product single = {
        .name = "lut-single",
        .max_rows = 1,
        .prepared_bytes = lut_prepared_bytes,
        .scratch_bytes = lut_scratch_bytes,
        .prepare = lut_prepare,
        .product = single_product,
    };
    static const bd_product lut = {
        .name = "lut",
        .max_rows = INT64_MAX,
        .prepared_bytes = lut_prepared_bytes,
        .scratch_bytes = lut_scratch_bytes,
        .prepare = lut_prepare,
        .product = lut_product,
    };
    table->isa = "avx2";
    table->quantize = bd_quantize_avx2;
    table->stream_rows = bd_stream_rows_avx2;
    table->transposed_strip = bd_transposed_strip_avx2;
    table->products[0] = single;
    table->products[1] = lut;
    table->products[2] = (bd_product){0};
}

#endif /* __x86_64__ */
