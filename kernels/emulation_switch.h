/* emulation_switch.h - coroutines: two stacks and a jump between them.
 *
 * What a call must preserve is pushed, the stack pointers are exchanged, and the other's registers popped.
 * Elsewhere ucontext does it, with a system call for the signal mask each time: a barrier then takes some
 * 590 ns a thread instead of 53 (x86-64). */
#ifndef BITDELTA_EMULATION_SWITCH_H_
#define BITDELTA_EMULATION_SWITCH_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(BD_UCONTEXT)

namespace bd_gpu
{

struct context {
    void *stack; /* where the registers lie */
};

/* Leaves `from`, to return when somebody enters it, and enters `to`. */
extern "C" void bd_gpu_switch(context *from, const context *to)
    __attribute__((visibility("hidden")));

#if defined(__x86_64__)
#define BD_SWITCH_WORDS 8 /* six registers, the return address, and one that keeps the alignment */
#define BD_SWITCH_ENTRY 6
__asm__(
    ".pushsection .text\n"
    ".weak bd_gpu_switch\n"
    ".hidden bd_gpu_switch\n"
    ".type bd_gpu_switch, @function\n"
    "bd_gpu_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq "
    "%r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq (%rsi), %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size bd_gpu_switch, . - bd_gpu_switch\n"
    ".popsection\n");
#else
#define BD_SWITCH_WORDS 20 /* x19 to x30, d8 to d15 */
#define BD_SWITCH_ENTRY 11
__asm__(
    ".pushsection .text\n"
    ".weak bd_gpu_switch\n"
    ".hidden bd_gpu_switch\n"
    ".type bd_gpu_switch, %function\n"
    "bd_gpu_switch:\n"
    "    sub sp, sp, #160\n"
    "    stp x19, x20, [sp]\n    stp x21, x22, [sp, #16]\n    stp x23, x24, [sp, #32]\n"
    "    stp x25, x26, [sp, #48]\n    stp x27, x28, [sp, #64]\n    stp x29, x30, [sp, #80]\n"
    "    stp d8, d9, [sp, #96]\n    stp d10, d11, [sp, #112]\n    stp d12, d13, [sp, #128]\n"
    "    stp d14, d15, [sp, #144]\n"
    "    mov x9, sp\n    str x9, [x0]\n    ldr x9, [x1]\n    mov sp, x9\n"
    "    ldp x19, x20, [sp]\n    ldp x21, x22, [sp, #16]\n    ldp x23, x24, [sp, #32]\n"
    "    ldp x25, x26, [sp, #48]\n    ldp x27, x28, [sp, #64]\n    ldp x29, x30, [sp, #80]\n"
    "    ldp d8, d9, [sp, #96]\n    ldp d10, d11, [sp, #112]\n    ldp d12, d13, [sp, #128]\n"
    "    ldp d14, d15, [sp, #144]\n"
    "    add sp, sp, #160\n"
    "    ret\n"
    ".size bd_gpu_switch, . - bd_gpu_switch\n"
    ".popsection\n");
#endif

/* A context whose first entry calls `entry`, which never returns, on the n_bytes at stack. */
static inline void
make_context(context *made, char *stack, size_t n_bytes, void (*entry)())
{
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + n_bytes) & ~uintptr_t{15};
    void **words = reinterpret_cast<void **>(top) - BD_SWITCH_WORDS;
    for (int i = 0; i < BD_SWITCH_WORDS; i++) {
        words[i] = nullptr;
    }
    words[BD_SWITCH_ENTRY] = reinterpret_cast<void *>(entry);
    made->stack = words;
}

} /* namespace bd_gpu */

#else

#include <ucontext.h>

namespace bd_gpu
{

struct context {
    ucontext_t state;
};

static inline void
bd_gpu_switch(context *from, const context *to)
{
    (void)swapcontext(&from->state, &to->state);
}

static inline void
make_context(context *made, char *stack, size_t n_bytes, void (*entry)())
{
    (void)getcontext(&made->state);
    made->state.uc_stack.ss_sp = stack;
    made->state.uc_stack.ss_size = n_bytes;
    made->state.uc_link = nullptr;
    makecontext(&made->state, entry, 0);
}

} /* namespace bd_gpu */

#endif

#endif /* BITDELTA_EMULATION_SWITCH_H_ */
