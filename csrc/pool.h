/* pool.h - a small thread pool: lazy, fork-safe, the caller takes part, tasks claimed one by one. */
#ifndef BITDELTA_POOL_H_
#define BITDELTA_POOL_H_

#include <stdint.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Runs task `index`, 0 <= index < n_tasks. worker is 0 for the caller, 1 .. n_threads-1 for the
 * pool's own threads, so that scratch can be one slot a worker. Never throws, never forks. */
typedef void (*bd_task)(void *argument, int64_t index, int worker);

/* A pool of fixed size, with one reference; NULL when out of memory. n_threads counts the caller and
 * is at least 1. No thread starts before the first bd_parallel. */
bd_pool *bd_pool_create(int n_threads);

/* References, so that the size may be changed (by a new pool) while calls run on the old one.
 * Atomic; the last release joins the threads. NULL is allowed. */
void bd_pool_retain(bd_pool *pool);
void bd_pool_release(bd_pool *pool);

/* Workers a bd_parallel call may use: sizes per-worker scratch. pool may be NULL: 1. */
int bd_pool_size(const bd_pool *pool);

/* Runs all tasks and returns when the last one has finished. Safe from many threads at once: while
 * one call has the workers, others run on their caller alone. After fork the child's pool starts
 * its threads anew. pool may be NULL. */
void bd_parallel(bd_pool *pool, int64_t n_tasks, bd_task task, void *argument);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_POOL_H_ */
