/* emulation_launch.h - a launch as emulation.cpp runs it and emulation_memory.cpp watches it. */
#ifndef BITDELTA_EMULATION_LAUNCH_H_
#define BITDELTA_EMULATION_LAUNCH_H_

#include "emulation.h"
#include "emulation_switch.h"

namespace bd_gpu
{

#define BD_MAX_THREADS 1024
#define BD_MAX_SHARED (99 * 1024)        /* what a block may have on every target */
#define BD_STACK_BYTES (size_t{1} << 16) /* of a coroutine */
#define BD_MAX_BLOCKS (1u << 22)
#define BD_MAX_COPIES 128 /* of a thread, not waited for */

/* When and by whom a byte was accessed, 0 for never. Two times order accesses: the block's goes up at each
 * __syncthreads, and from block to block; a warp's goes up at each __syncwarp and with the block's. */
struct stamp {
    uint64_t block_time : 26, warp_time : 26, thread : 10;
    uint64_t by_lanes : 1; /* reads: by several lanes of this warp at this time */
    uint64_t by_warps
        : 1; /* reads: by several warps at this block time; writes: by atomics alone */
};

struct cell {
    stamp written, read;
};

/* Global memory that was lent, and the cells of what may be written. */
struct buffer {
    uintptr_t begin, end;
    int is_writable;
    cell *cells;
};

struct copy {
    void *shared;
    const void *global;
    int n_bytes;
    unsigned group;
};

enum thread_state { READY, WAITS_FOR_BLOCK, WAITS_FOR_WARP, RETURNED };

struct thread {
    context state_of_cpu;
    char *stack;
    unsigned id; /* in the block */
    dim3 index;
    thread_state state;
    function at; /* what it waits at, and where */
    unsigned mask;
    const char *file;
    int line;
    bd_gpu::exchange *lane;
    int has_fenced;    /* since its latest write to global memory */
    int has_seen;      /* by an atomic, what other blocks have published */
    unsigned n_groups; /* of copies, closed */
    int n_copies;
    copy *copies; /* BD_MAX_COPIES, apart: threads are walked over often */
};

struct block_record {
    uint64_t began;    /* block time */
    int has_published; /* its writes, by a fence and an atomic */
};

struct launch_state {
    launch_shape shape;
    void (*call)(void *);
    uintptr_t parameters, parameters_end;
    unsigned n_threads;
    thread *threads;
    copy *copies;
    char *stacks;
    context scheduler;
    thread *running;
    dim3 block;
    int has_failed;

    uint64_t block_time;
    uint64_t warp_time[BD_MAX_THREADS / 32];
    unsigned waiting[BD_MAX_THREADS / 32]; /* lanes that wait at a warp function */
    unsigned absent[BD_MAX_THREADS / 32];  /* lanes that have returned or never were */
    unsigned n_at_barrier;
    const char *barrier_file;
    int barrier_line;

    unsigned char
        *shared; /* BD_MAX_SHARED bytes, 128-byte aligned; the block has shape.shared_bytes */
    cell *shared_cells;
    buffer *buffers;
    size_t n_buffers, latest_buffer;

    uint64_t n_blocks, n_begun;
    block_record *blocks; /* in the order in which they run */
    int has_acquired;     /* this block may read what earlier ones have published */
};

/* The launch that the calling thread runs, or NULL. It is asked for at every access. */
extern __thread launch_state *current_launch;
static inline launch_state *
current()
{
    return current_launch;
}

/* Ends the launch with a message that names kernel, block and thread. In a coroutine it does not return;
 * in the scheduler and outside a launch it does. */
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One more step of the block's time. */
void pass_time(launch_state *launch);

/* Memory: emulation_memory.cpp. */
bd_status start_memory(launch_state *launch);
void end_memory(launch_state *launch);
void start_block(launch_state *launch);
void check_copies_landed(thread *own);

} /* namespace bd_gpu */

#endif /* BITDELTA_EMULATION_LAUNCH_H_ */
