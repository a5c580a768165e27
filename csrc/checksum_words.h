/* checksum_words.h - a row's CRC-32C goes on by some words, inside a loop of vector instructions.
 *
 * The CRC instruction uses units that such a loop leaves idle. On x86-64, or after its emulation.
 * Private. */
#ifndef BITDELTA_CHECKSUM_WORDS_H_
#define BITDELTA_CHECKSUM_WORDS_H_

#if defined(__SSE4_2__) || defined(BD_AVX512_EMULATED)

#if !defined(BD_AVX512_EMULATED)
#include <nmmintrin.h>
#endif
#include <string.h>

#include "checksum.h"

/* n_words more of every chain; at least as many are left. */
static inline __attribute__((always_inline)) void
bd_crc_add_words(bd_crc_chains *chains, int64_t n_words)
{
    for (int64_t i = 0; i < n_words; i++) {
        for (int chain = 0; chain < BD_CRC_CHAINS; chain++) {
            uint64_t word;
            memcpy(&word, chains->bytes + 8 * (chain * chains->n_words + chains->n_done),
                   sizeof word);
            chains->sums[chain] = _mm_crc32_u64(chains->sums[chain], word);
        }
        chains->n_done++;
    }
}

#endif

#endif /* BITDELTA_CHECKSUM_WORDS_H_ */
