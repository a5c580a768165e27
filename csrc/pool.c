/* pool.c - the thread pool of pool.h: POSIX threads, one job at a time, no global state.
 *
 * A job is open while its caller still claims tasks. A worker joins an open job under the lock, claims
 * tasks from one atomic counter and leaves under the lock; the caller closes the job and waits for
 * those who joined. A worker that wakes too late finds the job closed, so a slow wake-up costs nothing.
 * After fork only the forking thread exists: the pid tells, and the child starts over. */
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* signal masks */
#endif

#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ __volatile__("yield")
#else
#define PAUSE() ((void)0)
#endif

#define SPINS 2000 /* about 50 us: longer than the gap between two products of a decode step */

struct bd_pool {
    int n_threads; /* with the caller; fixed */
    atomic_int n_references;
    atomic_int pid;       /* process that owns the fields below; 0 while a child starts over */
    pthread_mutex_t busy; /* held by the caller whose job has the workers */
    pthread_mutex_t lock; /* guards the fields below */
    pthread_cond_t wake, left;
    pthread_t *threads; /* [n_threads - 1], the first n_started are running */
    int n_started;
    int is_open, is_stopping;
    int n_joined; /* workers inside the job */
    bd_task task;
    void *argument;
    int64_t n_tasks;
    _Atomic int64_t next_task;
    _Atomic uint64_t n_jobs; /* grows with every job: what a spinning worker watches */
};

typedef struct {
    bd_pool *pool;
    int worker;
} worker_start;

static void
init_shared(bd_pool *pool)
{
    pthread_mutex_init(&pool->busy, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->left, NULL);
    pool->n_started = 0;
    pool->is_open = pool->is_stopping = pool->n_joined = 0;
    atomic_store(&pool->pid, (int)getpid());
}

bd_pool *
bd_pool_create(int n_threads)
{
    bd_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) {
        return NULL;
    }
    pool->n_threads = n_threads < 1 ? 1 : n_threads;
    pool->threads = calloc((size_t)pool->n_threads, sizeof *pool->threads);
    if (pool->threads == NULL) {
        free(pool);
        return NULL;
    }
    atomic_init(&pool->n_references, 1);
    init_shared(pool);
    return pool;
}

void
bd_pool_retain(bd_pool *pool)
{
    if (pool != NULL) {
        atomic_fetch_add(&pool->n_references, 1);
    }
}

void
bd_pool_release(bd_pool *pool)
{
    if (pool == NULL || atomic_fetch_sub(&pool->n_references, 1) != 1) {
        return;
    }
    if (atomic_load(&pool->pid) == (int)getpid()) { /* a child has no threads to join */
        pthread_mutex_lock(&pool->lock);
        pool->is_stopping = 1;
        atomic_fetch_add(&pool->n_jobs, 1);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->n_started; i++) {
            pthread_join(pool->threads[i], NULL);
        }
        pthread_mutex_destroy(&pool->busy);
        pthread_mutex_destroy(&pool->lock);
        pthread_cond_destroy(&pool->wake);
        pthread_cond_destroy(&pool->left);
    }
    free(pool->threads);
    free(pool);
}

int
bd_pool_size(const bd_pool *pool)
{
    return pool == NULL ? 1 : pool->n_threads;
}

static void
run_tasks(bd_pool *pool, int worker)
{
    int64_t index;
    while ((index = atomic_fetch_add(&pool->next_task, 1)) < pool->n_tasks) {
        pool->task(pool->argument, index, worker);
    }
}

static void *
worker_main(void *start)
{
    bd_pool *pool = ((worker_start *)start)->pool;
    int worker = ((worker_start *)start)->worker;
    uint64_t seen = 0;
    free(start);
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool->n_jobs) == seen; i++) {
            PAUSE();
        }
        pthread_mutex_lock(&pool->lock);
        while (!pool->is_stopping && !(pool->is_open && atomic_load(&pool->n_jobs) != seen)) {
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
        if (pool->is_stopping) {
            pthread_mutex_unlock(&pool->lock);
            return NULL;
        }
        seen = atomic_load(&pool->n_jobs);
        pool->n_joined++;
        pthread_mutex_unlock(&pool->lock);

        run_tasks(pool, worker);

        pthread_mutex_lock(&pool->lock);
        if (--pool->n_joined == 0) {
            pthread_cond_signal(&pool->left);
        }
        pthread_mutex_unlock(&pool->lock);
    }
}

/* Starts what is missing; fewer threads than asked for is no error, the caller does the work. */
static void
start_workers(bd_pool *pool)
{
    sigset_t all, before;
    if (pool->n_started == pool->n_threads - 1) {
        return;
    }
    sigfillset(&all); /* signals are the host program's: workers inherit a mask of all */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->n_started < pool->n_threads - 1) {
        worker_start *start = malloc(sizeof *start);
        if (start == NULL) {
            break;
        }
        *start = (worker_start){.pool = pool, .worker = pool->n_started + 1};
        if (pthread_create(&pool->threads[pool->n_started], NULL, worker_main, start) != 0) {
            free(start);
            break;
        }
        pool->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* In a forked child the threads are gone and the locks may be held by nobody: the first caller
 * starts over, others of the child run alone meanwhile. Returns 0 when the pool may be used. */
static int
take_over_after_fork(bd_pool *pool)
{
    int pid = (int)getpid();
    int owner = atomic_load(&pool->pid);
    if (owner == pid) {
        return 0;
    }
    if (owner == 0 || !atomic_compare_exchange_strong(&pool->pid, &owner, 0)) {
        return -1;
    }
    init_shared(pool);
    return 0;
}

static void
run_job(bd_pool *pool, int64_t n_tasks, bd_task task, void *argument)
{
    start_workers(pool);
    pthread_mutex_lock(&pool->lock);
    pool->task = task;
    pool->argument = argument;
    pool->n_tasks = n_tasks;
    atomic_store(&pool->next_task, 0);
    pool->is_open = 1;
    atomic_fetch_add(&pool->n_jobs, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    run_tasks(pool, 0);

    pthread_mutex_lock(&pool->lock);
    pool->is_open = 0;
    while (pool->n_joined > 0) {
        pthread_cond_wait(&pool->left, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
}

void
bd_parallel(bd_pool *pool, int64_t n_tasks, bd_task task, void *argument)
{
    if (n_tasks > 1 && pool != NULL && pool->n_threads > 1 && take_over_after_fork(pool) == 0 &&
        pthread_mutex_trylock(&pool->busy) == 0) {
        run_job(pool, n_tasks, task, argument);
        pthread_mutex_unlock(&pool->busy);
        return;
    }
    for (int64_t index = 0; index < n_tasks; index++) {
        task(argument, index, 0);
    }
}
