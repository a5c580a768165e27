/* emulation.h - CUDA's words for a host C++ compiler: how kernels are tested without a GPU.
 *
 * What runs. A launch runs its blocks one after the other, and the threads of a block as coroutines on the
 * calling thread (emulation.cpp). A coroutine runs until it must wait: at __syncthreads for its block, at a
 * warp function for the lanes of its mask. Threads and blocks go in ascending order, or in descending order
 * with BITDELTA_EMULATION_ORDER=descending; a kernel's results must not depend on it. The GPU has two
 * processors and compute capability 8.0, or 10.0 with BITDELTA_EMULATION_CAPABILITY=100.
 *
 * What is watched. Kernels are compiled with -fsanitize=thread and parts of -fsanitize=undefined, but not
 * linked with their libraries: emulation_memory.cpp defines the functions they call before each load and
 * store. So a kernel uses plain pointers, and every access is checked:
 *
 *   - Global memory is what bd_gpu_lend names, for writing where it says so. All else is out of bounds.
 *   - Shared memory is the block's own, and has no value before a thread of this block has written it.
 *   - Two accesses to a byte, of them one a write, by two threads, need an order: a __syncthreads between
 *     them, or within a warp a __syncwarp of the whole warp. (Shuffles and ballots order no memory.) Between
 *     blocks: __threadfence and an atomic of the one, then an atomic and __threadfence of the other. Two
 *     atomics need none. The order in which threads happen to run here is no excuse.
 *   - An asynchronous copy lands when its thread waits for it; until then nobody touches its destination.
 *     From then on it is a write by that thread, and others need a barrier.
 *   - __syncthreads: every thread of the block, at the same line. Warp functions: every lane that the mask
 *     names, with the same function and mask; shuffles read lanes of the mask only. Tensor core products
 *     take all 32 lanes. Threads that wait for one another, or for one that has returned, are named.
 *   - Misaligned vectors, indices beyond an array's type, shifts by the width, signed overflow, division by
 *     zero, floats beyond the integer they are converted to: where the hardware and C++ differ.
 *
 * A finding ends the launch: BD_LAUNCH returns BD_ERR_CUDA, and bd_gpu_message() names kernel, block, thread
 * and cause. To see the call stack, put a breakpoint on bd_gpu::fail.
 *
 * What is not watched: values of global memory that nothing has written, memcpy of a size that the compiler
 * does not know, bank conflicts, registers, time. */
#ifndef BITDELTA_EMULATION_H_
#define BITDELTA_EMULATION_H_

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#include "bitdelta.h"
#include "cuda_device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define BD_UNROLL

/* ---- types ---- */

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

#define BD_VECTOR2(name, type, bytes)              \
    struct alignas(bytes) name {                   \
        type x, y;                                 \
    };                                             \
    static inline name make_##name(type x, type y) \
    {                                              \
        return {x, y};                             \
    }
#define BD_VECTOR4(name, type, bytes)                              \
    struct alignas(bytes) name {                                   \
        type x, y, z, w;                                           \
    };                                                             \
    static inline name make_##name(type x, type y, type z, type w) \
    {                                                              \
        return {x, y, z, w};                                       \
    }
BD_VECTOR2(uint2, unsigned, 8)
BD_VECTOR2(int2, int, 8)
BD_VECTOR2(float2, float, 8)
BD_VECTOR2(ushort2, unsigned short, 4)
BD_VECTOR4(uint4, unsigned, 16)
BD_VECTOR4(int4, int, 16)
BD_VECTOR4(float4, float, 16)
BD_VECTOR4(ushort4, unsigned short, 8)

/* ---- what emulation.cpp and emulation_memory.cpp do ---- */

namespace bd_gpu
{

/* Where a kernel calls from, as default arguments. */
#define BD_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum function {
    SYNCTHREADS,
    SYNCWARP,
    SHUFFLE,
    SHUFFLE_XOR,
    SHUFFLE_UP,
    SHUFFLE_DOWN,
    BALLOT,
    MMA_B1,
    MMA_U8S8
};

/* What a lane brings to a warp function and takes from it. */
struct exchange {
    uint64_t value; /* shuffle: the value, then the one received; ballot: predicate, then ballot */
    int operand, width; /* shuffle: lane, lane mask or distance, and the width of a segment */
    unsigned a[4], b[2], d[4]; /* tensor core */
};

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void *shared_memory();
void sync_threads(const char *file, int line);
void warp(function which, unsigned mask, exchange *lane, const char *file, int line);
void fence();
void atomic_access(const void *address, size_t n_bytes);
void require_global(const void *address);
void copy_async(void *shared, const void *global, int n_bytes, const char *file, int line);
void copy_async_commit();
void copy_async_wait(int n_groups);

struct launch_shape {
    const char *name;
    dim3 grid, block;
    size_t shared_bytes;
};
bd_status run(const launch_shape &shape, void (*call)(void *), void *parameters, size_t n_bytes);

/* What these do to their own variables need not be watched. */
#define BD_UNWATCHED __attribute__((no_sanitize("thread"))) inline

template <class T>
BD_UNWATCHED T
shuffle(function which, unsigned mask, T value, int operand, int width, const char *file, int line)
{
    static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                  "4 or 8 bytes");
    exchange lane = {};
    memcpy(&lane.value, &value, sizeof value);
    lane.operand = operand;
    lane.width = width;
    warp(which, mask, &lane, file, line);
    memcpy(&value, &lane.value, sizeof value);
    return value;
}

BD_UNWATCHED void
mma(function which, int d[4], const unsigned a[4], const unsigned b[2], const char *file, int line)
{
    exchange lane = {};
    memcpy(lane.a, a, sizeof lane.a);
    memcpy(lane.b, b, sizeof lane.b);
    memcpy(lane.d, d, sizeof lane.d);
    warp(which, 0xFFFFFFFFu, &lane, file, line);
    memcpy(d, lane.d, sizeof lane.d);
}

template <class... Parameters, class... Arguments>
inline bd_status
launch(const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
       void *stream, Arguments... arguments)
{
    (void)stream; /* launches run at once */
    struct call_data {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> parameters;
    } data = {kernel, std::tuple<Parameters...>(arguments...)};
    auto call = [](void *pointer) {
        call_data *own = static_cast<call_data *>(pointer);
        std::apply(own->kernel, own->parameters);
    };
    return run({name, grid, block, shared_bytes}, call, &data, sizeof data);
}

} /* namespace bd_gpu */

/* ---- the words ---- */

#define threadIdx (bd_gpu::thread_index())
#define blockIdx (bd_gpu::block_index())
#define blockDim (bd_gpu::block_size())
#define gridDim (bd_gpu::grid_size())
#define BD_SHARED(type, name) type *const name = static_cast<type *>(bd_gpu::shared_memory())
#define BD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    bd_gpu::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

static inline void
__syncthreads(BD_PLACE)
{
    bd_gpu::sync_threads(file, line);
}
static BD_UNWATCHED void
__syncwarp(unsigned mask = 0xFFFFFFFFu, BD_PLACE)
{
    bd_gpu::exchange lane = {};
    bd_gpu::warp(bd_gpu::SYNCWARP, mask, &lane, file, line);
}
template <class T>
static inline T
__shfl_sync(unsigned mask, T value, int lane, int width = 32, BD_PLACE)
{
    return bd_gpu::shuffle(bd_gpu::SHUFFLE, mask, value, lane, width, file, line);
}
template <class T>
static inline T
__shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, BD_PLACE)
{
    return bd_gpu::shuffle(bd_gpu::SHUFFLE_XOR, mask, value, lanes, width, file, line);
}
template <class T>
static inline T
__shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, BD_PLACE)
{
    return bd_gpu::shuffle(bd_gpu::SHUFFLE_UP, mask, value, static_cast<int>(distance), width, file,
                           line);
}
template <class T>
static inline T
__shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, BD_PLACE)
{
    return bd_gpu::shuffle(bd_gpu::SHUFFLE_DOWN, mask, value, static_cast<int>(distance), width,
                           file, line);
}
static BD_UNWATCHED unsigned
__ballot_sync(unsigned mask, int predicate, BD_PLACE)
{
    bd_gpu::exchange lane = {};
    lane.value = predicate != 0;
    bd_gpu::warp(bd_gpu::BALLOT, mask, &lane, file, line);
    return static_cast<unsigned>(lane.value);
}
static inline int
__any_sync(unsigned mask, int predicate, BD_PLACE)
{
    return __ballot_sync(mask, predicate, file, line) != 0;
}
static inline int
__all_sync(unsigned mask, int predicate, BD_PLACE)
{
    return __ballot_sync(mask, !predicate, file, line) == 0;
}
static inline void
__threadfence()
{
    bd_gpu::fence();
}
template <class T>
static inline T
__ldg(const T *address)
{
    bd_gpu::require_global(address);
    return *address;
}

/* int, unsigned and unsigned long long alone: sums of floats would depend on the order. */
template <class T>
static BD_UNWATCHED T
atomicAdd(T *address, std::common_type_t<T> value)
{
    static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value ||
                      std::is_same<T, unsigned long long>::value,
                  "");
    bd_gpu::atomic_access(address, sizeof(T));
    const T before = *address;
    *address = static_cast<T>(static_cast<std::make_unsigned_t<T>>(before) +
                              static_cast<std::make_unsigned_t<T>>(value));
    return before;
}
template <class T>
static BD_UNWATCHED T
atomicMin(T *address, std::common_type_t<T> value)
{
    static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value ||
                      std::is_same<T, unsigned long long>::value,
                  "");
    bd_gpu::atomic_access(address, sizeof(T));
    const T before = *address;
    *address = value < before ? value : before;
    return before;
}

static inline void
bd_mma_b1(int d[4], const unsigned a[4], const unsigned b[2], BD_PLACE)
{
    bd_gpu::mma(bd_gpu::MMA_B1, d, a, b, file, line);
}
static inline void
bd_mma_u8s8(int d[4], const unsigned a[4], const unsigned b[2], BD_PLACE)
{
    bd_gpu::mma(bd_gpu::MMA_U8S8, d, a, b, file, line);
}
static inline void
bd_copy_async16(void *shared, const void *global, int n_bytes = 16, BD_PLACE)
{
    bd_gpu::copy_async(shared, global, n_bytes, file, line);
}
static inline void
bd_copy_async_commit()
{
    bd_gpu::copy_async_commit();
}
template <int n>
static inline void
bd_copy_async_wait()
{
    bd_gpu::copy_async_wait(n);
}

/* ---- arithmetic ---- */

static inline float
__fadd_rn(float a, float b)
{
    return a + b;
}
static inline float
__fsub_rn(float a, float b)
{
    return a - b;
}
static inline float
__fmul_rn(float a, float b)
{
    return a * b;
}
static inline float
__fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float
__fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
static inline double
__dadd_rn(double a, double b)
{
    return a + b;
}
static inline double
__dmul_rn(double a, double b)
{
    return a * b;
}
static inline unsigned
__float_as_uint(float value)
{
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float
__uint_as_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline int
__float_as_int(float value)
{
    return static_cast<int>(__float_as_uint(value));
}
static inline float
__int_as_float(int bits)
{
    return __uint_as_float(static_cast<unsigned>(bits));
}
/* Ties to even; saturates; NaN gives 0. */
static inline int
__float2int_rn(float value)
{
    if (value >= 0x1p31f) {
        return INT32_MAX;
    }
    return value >= -0x1p31f ? static_cast<int>(nearbyintf(value)) : value < 0.0f ? INT32_MIN : 0;
}
static inline float
__int2float_rn(int value)
{
    return static_cast<float>(value);
}
static inline float
__ll2float_rn(long long value)
{
    return static_cast<float>(value);
}
static inline int
__popc(unsigned word)
{
    return __builtin_popcount(word);
}
static inline int
__clz(int word)
{
    return word == 0 ? 32 : __builtin_clz(static_cast<unsigned>(word));
}
static inline int
__ffs(int word)
{
    return __builtin_ffs(word);
}
static inline unsigned
__brev(unsigned word)
{
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) {
        reversed = reversed << 1 | (word >> i & 1u);
    }
    return reversed;
}
/* Byte i of the result is byte (selector >> 4i & 7) of {y, x}, or its sign repeated when bit 3 is set. */
static inline unsigned
__byte_perm(unsigned x, unsigned y, unsigned selector)
{
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned pick = selector >> 4 * i & 15u;
        unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7u)) & 0xFFu;
        if (pick & 8u) {
            byte = byte & 0x80u ? 0xFFu : 0u;
        }
        result |= byte << 8 * i;
    }
    return result;
}
static inline unsigned
__funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
static inline unsigned
__funnelshift_l(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
template <class T>
static constexpr inline T
min(T a, T b)
{
    return b < a ? b : a;
}
template <class T>
static constexpr inline T
max(T a, T b)
{
    return a < b ? b : a;
}

#endif /* BITDELTA_EMULATION_H_ */
