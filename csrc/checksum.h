/* checksum.h - joining CRC-32C sums of pieces of equal length, which the contract's combine repeats. */
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

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_CHECKSUM_H_ */
