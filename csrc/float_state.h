/* float_state.h - the floating-point control state of the calling thread, saved, set and restored.
 *
 * Callers (PyTorch among them) may flush denormals to zero or change the rounding; the definitions
 * of this package round to nearest and keep denormals, so every task runs between these two. */
#ifndef BITDELTA_FLOAT_STATE_H_
#define BITDELTA_FLOAT_STATE_H_

#include <stdint.h>

#if defined(__x86_64__)

#include <immintrin.h>

typedef uint32_t bd_float_state;

static inline bd_float_state
bd_set_float_state(void)
{
    bd_float_state saved = _mm_getcsr();
    _mm_setcsr(0x1F80u); /* exceptions masked, nearest, denormals kept */
    return saved;
}

static inline void
bd_restore_float_state(bd_float_state saved)
{
    _mm_setcsr(saved);
}

#elif defined(__aarch64__)

typedef uint64_t bd_float_state;

static inline bd_float_state
bd_set_float_state(void)
{
    uint64_t saved, zero = 0;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(saved));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(zero) : "memory");
    return saved;
}

static inline void
bd_restore_float_state(bd_float_state saved)
{
    __asm__ __volatile__("msr fpcr, %0" : : "r"(saved) : "memory");
}

#else

#include <fenv.h>

typedef fenv_t bd_float_state;

static inline bd_float_state
bd_set_float_state(void)
{
    fenv_t saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return saved;
}

static inline void
bd_restore_float_state(bd_float_state saved)
{
    fesetenv(&saved);
}

#endif

#endif /* BITDELTA_FLOAT_STATE_H_ */
