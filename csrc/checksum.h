/* checksum.h - CRC-32C of rows, summed in chains while other work runs. Private. */
#ifndef BITDELTA_CHECKSUM_H_
#define BITDELTA_CHECKSUM_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What n_bytes more bytes multiply a sum by: x^(8 n_bytes) mod the polynomial. */
uint32_t bd_crc32c_shift(uint64_t n_bytes);

/* Sum of A followed by B, shift = bd_crc32c_shift(bytes of B). */
uint32_t bd_crc32c_join(uint32_t crc_a, uint32_t shift, uint32_t crc_b);

#define BD_CRC_CHAINS 4 /* more than the latency of the instruction, and whole words of a line */

/* How rows of n_bytes are summed: as chains of n_words 8-byte words, one after the other, and a rest. */
typedef struct {
    int64_t n_bytes, n_words;
    uint32_t shift[8][16]; /* [i][v]: v << 4 i, moved past a chain */
} bd_crc_plan;

/* A row on its way: the first n_done words of every chain are in the sums. */
struct bd_crc_chains {
    const unsigned char *bytes;
    int64_t n_words, n_done;
    uint64_t sums[BD_CRC_CHAINS]; /* 32 bits, as wide as the instruction's registers */
};
typedef struct bd_crc_chains bd_crc_chains;

void bd_crc_plan_row(bd_crc_plan *plan, int64_t n_bytes);

/* The row that goes on from the sum `crc`; then the sum with it, whatever of it was done between. */
void bd_crc_begin_row(const bd_crc_plan *plan, uint32_t crc, const void *row,
                      bd_crc_chains *chains);
uint32_t bd_crc_end_row(const bd_crc_plan *plan, bd_crc_chains *chains);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_CHECKSUM_H_ */
