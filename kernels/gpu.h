/* gpu.h - the words of the kernels; first include of every .cu.
 *
 * They mean CUDA's own under nvcc, and emulation.h's under a host C++ compiler with -DBD_EMULATE. What
 * CUDA names alike needs nothing here: threadIdx, __syncthreads, __shfl_sync and so on; emulation.h lists
 * all of them. The rest:
 *
 *   BD_SHARED(type, name)            the block's dynamic shared memory, 128-byte aligned, as type *name.
 *                                    There is no other shared memory.
 *   BD_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
 *                                    -> bd_status; never synchronises. A template with commas goes in
 *                                    parentheses. bd_gpu_message() says what went wrong.
 *   bd_mma_b1, bd_mma_u8s8           d += A B on a tensor core, whole warps only; fragments below
 *   bd_copy_async16                  16 bytes, global to shared, both 16-byte aligned; of them n_bytes are
 *                                    read and the rest is zero. Landed for the thread that asked once it has
 *                                    waited, for others after a barrier as well.
 *   bd_copy_async_commit, _wait<n>   closes a group; waits for all groups but the n latest
 *   BD_UNROLL                        before a loop: unroll it whole
 *
 * Fragments (PTX ISA 9.7.14.5), lane = 4 g + t, g < 8, t < 4:
 *   b1, m16n8k256, bit i of a register is column k + i:
 *     a0 (row g, k 32t)  a1 (g+8, 32t)  a2 (g, 128+32t)  a3 (g+8, 128+32t)   b0 (k 32t, column g)  b1 (128+32t, g)
 *   u8 x s8, m16n8k32, byte i of a register is column k + i:
 *     a0 (row g, k 4t)   a1 (g+8, 4t)   a2 (g, 16+4t)    a3 (g+8, 16+4t)     b0 (k 4t, column g)   b1 (16+4t, g)
 *   d of both:  d0 (row g, column 2t)  d1 (g, 2t+1)  d2 (g+8, 2t)  d3 (g+8, 2t+1)
 *
 * Which tensor core path a target has is a table: BD_HAS_B1, and bd_gpu_has_b1 for the host. */
#ifndef BITDELTA_GPU_H_
#define BITDELTA_GPU_H_

#include <stddef.h>
#include <stdint.h>

#include "bitdelta.h"
#include "cuda_device.h"

/* b1 products are native on compute capability 8.0 to 9.0; elsewhere ptxas spells them out in some hundred
 * instructions, so the int8 path is taken. `capability` is 10 * major + minor. */
static inline int
bd_gpu_has_b1(int capability)
{
    return capability >= 80 && capability <= 90;
}

#if defined(BD_EMULATE)

#define BD_HAS_B1 1
#include "emulation.h"

#else

#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__)
#define BD_HAS_B1 (__CUDA_ARCH__ >= 800 && __CUDA_ARCH__ <= 900)
#else
#define BD_HAS_B1 1 /* the host's pass over device code, which is thrown away */
#endif

#define BD_UNROLL _Pragma("unroll")

#define BD_SHARED(type, name)                                   \
    extern __shared__ __align__(128) unsigned char bd_shared[]; \
    type *const name = reinterpret_cast<type *>(bd_shared)

#define BD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    bd_launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

/* Keeps the text of an error for bd_gpu_message, and clears it. */
bd_status bd_gpu_status(const char *what, cudaError_t error);

template <class... Parameters, class... Arguments>
inline bd_status
bd_launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
          size_t shared_bytes, void *stream, Arguments... arguments)
{
    if (shared_bytes > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
        if (error != cudaSuccess) {
            return bd_gpu_status(name, error);
        }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return bd_gpu_status(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

static __device__ __forceinline__ void
bd_mma_b1(int d[4], const unsigned a[4], const unsigned b[2])
{
#if BD_HAS_B1
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    (void)d, (void)a, (void)b;
    __trap(); /* never launched here: bd_gpu_has_b1 */
#endif
}

static __device__ __forceinline__ void
bd_mma_u8s8(int d[4], const unsigned a[4], const unsigned b[2])
{
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void
bd_copy_async16(void *shared, const void *global, int n_bytes = 16)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(n_bytes)
                 : "memory");
}

static __device__ __forceinline__ void
bd_copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int n>
static __device__ __forceinline__ void
bd_copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

#endif

#endif /* BITDELTA_GPU_H_ */
