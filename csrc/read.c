/* read.c - reads memory and does nothing with it: the yardstick of the bench.
 *
 * Each task reads a block as four streams, which fills the load buffers better than one. */
#include <stdatomic.h>
#include <string.h>

#include "bitdelta.h"
#include "pool.h"

#define BLOCK_BYTES \
    ((size_t)1 << 22) /* large against a task's cost, small against a core's share */
#define STREAMS 4
#define STEP 64 /* bytes of one stream at a time: a line */

typedef struct {
    const unsigned char *data;
    size_t n_bytes;
    _Atomic uint64_t folded;
} reading;

/* Exclusive or of n_bytes of each of four streams; n_bytes is a multiple of STEP. */
static uint64_t
fold_streams(const unsigned char *data, size_t n_bytes)
{
    uint64_t sums[STEP / 8] = {0}, words[STREAMS][STEP / 8], folded = 0;

    for (size_t i = 0; i < n_bytes; i += STEP) {
        for (size_t s = 0; s < STREAMS; s++) {
            memcpy(words[s], data + s * n_bytes + i, STEP);
        }
        for (size_t j = 0; j < STEP / 8; j++) {
            sums[j] ^= words[0][j] ^ words[1][j] ^ words[2][j] ^ words[3][j];
        }
    }
    for (size_t j = 0; j < STEP / 8; j++) {
        folded ^= sums[j];
    }
    return folded;
}

static void
read_block(void *argument, int64_t index, int worker)
{
    reading *job = argument;
    size_t begin = (size_t)index * BLOCK_BYTES;
    size_t left = job->n_bytes - begin < BLOCK_BYTES ? job->n_bytes - begin : BLOCK_BYTES;
    size_t whole = left / (STREAMS * STEP) * STEP;
    uint64_t folded = fold_streams(job->data + begin, whole);

    (void)worker;
    for (size_t i = whole * STREAMS; i < left; i++) {
        folded ^= (uint64_t)job->data[begin + i] << (8 * (i % 8));
    }
    atomic_fetch_xor_explicit(&job->folded, folded, memory_order_relaxed);
}

uint64_t
bd_read(const bd_context *ctx, const void *data, size_t n_bytes)
{
    reading job = {.data = data, .n_bytes = n_bytes};
    int64_t n_blocks = (int64_t)((n_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES);

    bd_parallel(ctx->pool, n_blocks, read_block, &job);
    return atomic_load(&job.folded);
}
