/* failing_malloc.c - loaded before libc (LD_PRELOAD): lets a chosen allocation fail. glibc only.
 *
 * Counts the calls of malloc, calloc and aligned_alloc made by bitdelta._C itself, or all of them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_memalign(size_t, size_t);

static atomic_long n_left = -1; /* until the one that fails; -1: none will */
static atomic_long n_failed;
static int is_core_only, is_lasting;

/* From here on, allocation `n` fails, and with `lasting` every later one. */
void
fail_allocation(long n, int core_only, int lasting)
{
    is_core_only = core_only;
    is_lasting = lasting;
    atomic_store(&n_failed, 0);
    atomic_store(&n_left, n);
}

/* How many failed since. */
long
stop_failing(void)
{
    atomic_store(&n_left, -1);
    return atomic_load(&n_failed);
}

static int
fails(const void *caller)
{
    Dl_info info;
    if (atomic_load(&n_left) < 0) {
        return 0;
    }
    if (is_core_only && !(dladdr(caller, &info) && strstr(info.dli_fname, "bitdelta/_C"))) {
        return 0;
    }
    if (atomic_fetch_sub(&n_left, 1) > 0) {
        return 0;
    }
    if (is_lasting) {
        atomic_store(&n_left, 0);
    }
    atomic_fetch_add(&n_failed, 1);
    return 1;
}

void *
malloc(size_t n)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(n);
}

void *
calloc(size_t n, size_t size)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, size);
}

void *
aligned_alloc(size_t alignment, size_t n)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, n);
}
