/* dispatch.c - the inner loops of this machine: processor and OS features -> tables of functions.
 *
 * A set is usable when cpuid reports its instructions and the OS saves its registers (XCR0). The
 * tables are filled once, at the first call, and constant from then on. */
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* syscall */
#endif

#include "kernels.h"

#include <pthread.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* ---- what the machine has --------------------------------------------------------------------- */

static int
always(void)
{
    return 1;
}

#if defined(__x86_64__)

/* All of the 1 bits of mask are set in value. */
static int
has_all(unsigned long long value, unsigned long long mask)
{
    return (value & mask) == mask;
}

/* XCR0, the register states that the OS saves; 0 without XGETBV. */
static unsigned long long
os_states(void)
{
    unsigned a, b, c = 0, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) {
        return 0;
    }
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

enum {
    STATE_AVX = 1 << 1 | 1 << 2,             /* xmm, ymm */
    STATE_AVX512 = 1 << 5 | 1 << 6 | 1 << 7, /* k, zmm0-15 above ymm, zmm16-31 */
    STATE_TILES = 1 << 17 | 1 << 18,         /* tile configuration, tile data */
    LEAF7_EDX_TILES = 1 << 24 | 1 << 25      /* AMX-TILE, AMX-INT8 */
};

static int
has_avx2(void)
{
    unsigned a, b, c = 0, d;
    if (!has_all(os_states(), STATE_AVX) || !__get_cpuid(1, &a, &b, &c, &d) ||
        !has_all(c, bit_AVX | bit_FMA | bit_F16C)) {
        return 0;
    }
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has_all(b, bit_AVX2);
}

static int
has_avx512(void)
{
    unsigned a, b = 0, c, d;
    return has_avx2() && has_all(os_states(), STATE_AVX512) &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           has_all(b, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL);
}

static int
has_amx(void)
{
    unsigned a, b, c, d = 0;
    return has_avx512() && has_all(os_states(), STATE_TILES) &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && has_all(d, LEAF7_EDX_TILES);
}

#endif /* __x86_64__ */

/* ---- what each set replaces ------------------------------------------------------------------- */

static void
fill_generic(bd_kernels *table)
{
    bd_fill_generic_linear(table);
    bd_fill_generic_delta(table);
    bd_fill_generic_calibrate(table);
    bd_fill_generic_sweep(table);
}

static void
fill_avx512_emulated(bd_kernels *table)
{
    fill_generic(table);
    bd_fill_avx512_linear_emulated(table);
    bd_fill_avx512_delta_emulated(table);
}

static void
fill_amx_emulated(bd_kernels *table)
{
    fill_avx512_emulated(table);
    bd_fill_amx_emulated(table);
}

#if defined(__x86_64__)

static void
fill_avx2(bd_kernels *table)
{
    fill_generic(table);
    bd_fill_avx2_linear(table);
    bd_fill_avx2_delta(table);
    bd_fill_avx2_calibrate(table);
}

static void
fill_avx512(bd_kernels *table)
{
    fill_avx2(table);
    bd_fill_avx512_linear(table);
    bd_fill_avx512_delta(table);
}

static void
fill_amx(bd_kernels *table)
{
    fill_avx512(table);
    bd_fill_amx(table);
}

#elif defined(__aarch64__)

static void
fill_neon(bd_kernels *table)
{
    fill_generic(table);
    bd_fill_neon_linear(table);
}

#endif

/* ---- the tables ------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    int (*usable)(void);
    void (*fill)(bd_kernels *table);
} instruction_set;

/* Best first. */
static const instruction_set SETS[] = {
#if defined(__x86_64__)
    {"amx", has_amx, fill_amx},
    {"avx512", has_avx512, fill_avx512},
    {"avx2", has_avx2, fill_avx2},
#elif defined(__aarch64__)
    {"neon", always, fill_neon},
#endif
    {"generic", always, fill_generic},
    {"avx512-emulated", always, fill_avx512_emulated},
    {"amx-emulated", always, fill_amx_emulated},
};

enum { N_SETS = sizeof SETS / sizeof SETS[0] };

/* The usable sets, best first; the only data that is not constant, and constant once filled. */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bd_kernels tables[N_SETS];
static const char *names[N_SETS + 1];

static void
fill_tables(void)
{
    int n = 0;
    for (int i = 0; i < N_SETS; i++) {
        if (SETS[i].usable()) {
            SETS[i].fill(&tables[n]);
            tables[n].isa = SETS[i].name;
            names[n++] = SETS[i].name;
        }
    }
}

const bd_kernels *
bd_select_kernels(const char *isa)
{
    pthread_once(&once, fill_tables);
    for (int i = 0; names[i] != NULL; i++) {
        if (isa == NULL || strcmp(isa, names[i]) == 0) {
            return &tables[i];
        }
    }
    return NULL;
}

const char *const *
bd_available_isas(void)
{
    pthread_once(&once, fill_tables);
    return names;
}

/* ---- permission to use tiles ------------------------------------------------------------------ */

#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)

static pthread_once_t amx_once = PTHREAD_ONCE_INIT;
static int amx_permitted;

/* https://docs.kernel.org/arch/x86/xstate.html. It enlarges signal frames for good, so it is asked
 * when tiles are about to be used, not when they are found; it is refused where an alternate signal
 * stack is too small. Threads and children inherit it. */
static void
ask_for_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    amx_permitted =
        has_amx() && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

int
bd_amx_permit(void)
{
    pthread_once(&amx_once, ask_for_tiles);
    return amx_permitted;
}

#else

int
bd_amx_permit(void)
{
    return 0;
}

#endif
