/* Kernels that test the emulation itself: the right ones against plain loops in test_emulation.py, and each
 * misuse that must be found. Not part of the package. */
#include "gpu.h"

#define LANES 0xFFFFFFFFu

/* ---- right ---- */

/* C[16, 8] = A[16, k] B[8, k]^T by one warp a block, fragments read as gpu.h draws them. Both kinds have 8
 * words a row and step. `swap` exchanges two registers of A. */
template <bool is_b1>
static __global__ void
product(const unsigned *A, const unsigned *B, int *C, int n_steps, int swap)
{
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    int d[4] = {0, 0, 0, 0};
    for (int step = 0; step < n_steps; step++) {
        const unsigned *rows = A + 8 * step, *columns = B + 8 * step;
        const int stride = 8 * n_steps;
        unsigned a[4] = {rows[g * stride + t], rows[(g + 8) * stride + t], rows[g * stride + 4 + t],
                         rows[(g + 8) * stride + 4 + t]};
        const unsigned b[2] = {columns[g * stride + t], columns[g * stride + 4 + t]};
        if (swap) {
            const unsigned other = a[1];
            a[1] = a[2];
            a[2] = other;
        }
        if (is_b1) {
            bd_mma_b1(d, a, b);
        } else {
            bd_mma_u8s8(d, a, b);
        }
    }
    C[g * 8 + 2 * t] = d[0];
    C[g * 8 + 2 * t + 1] = d[1];
    C[(g + 8) * 8 + 2 * t] = d[2];
    C[(g + 8) * 8 + 2 * t + 1] = d[3];
}

/* Prefix sums of each block's 4 * blockDim.x numbers, by copies in two groups, shuffles and barriers. n may
 * end in the middle of a vector. out[n + block] counts the odd ones, by ballots and atomics. */
static __global__ void
prefix_sums(const int *in, int *out, int n)
{
    BD_SHARED(int, numbers);
    const int size = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
    int *sums = numbers + 4 * size, *n_odd = sums + 32;
    const int first = static_cast<int>(blockIdx.x) * 4 * size, begin = first + 4 * i;
    const int n_bytes = min(max(4 * (n - begin), 0), 16);
    if (i % 2 == 0) {
        bd_copy_async16(numbers + 4 * i, n_bytes > 0 ? in + begin : in, n_bytes);
    }
    bd_copy_async_commit();
    if (i % 2 == 1) {
        bd_copy_async16(numbers + 4 * i, n_bytes > 0 ? in + begin : in, n_bytes);
    }
    bd_copy_async_commit();
    if (i == 0) {
        *n_odd = 0;
    }
    bd_copy_async_wait<1>();
    bd_copy_async_wait<0>();
    __syncthreads();
    int own[4], sum = 0;
    BD_UNROLL
    for (int j = 0; j < 4; j++) {
        own[j] = sum += numbers[4 * i + j];
        const unsigned odd = __ballot_sync(LANES, numbers[4 * i + j] & 1);
        if (i % 32 == 0) {
            atomicAdd(n_odd, __popc(odd));
        }
    }
    int before = sum;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(LANES, before, static_cast<unsigned>(distance));
        before += i % 32 >= distance ? other : 0;
    }
    if (i % 32 == 31) {
        sums[i / 32] = before;
    }
    __syncthreads();
    before -= sum;
    for (int warp = 0; warp < i / 32; warp++) {
        before += sums[warp];
    }
    BD_UNROLL
    for (int j = 0; j < 4; j++) {
        if (begin + j < n) {
            out[begin + j] = before + own[j];
        }
    }
    if (i == 0) {
        out[n + static_cast<int>(blockIdx.x)] = *n_odd;
    }
}

/* out[lane] of each shuffle, in segments of 8, with the lanes of each parity on their own. */
static __global__ void
shuffles(const unsigned long long *in, unsigned long long *out)
{
    const unsigned lane = threadIdx.x;
    const unsigned mask = lane % 2 == 0 ? 0x55555555u : 0xAAAAAAAAu;
    const unsigned long long value = in[lane];
    if (lane % 2 == 0) {
        out[lane] = __shfl_sync(mask, value, 2, 8);
    } else {
        out[lane] = __shfl_sync(mask, value, 3, 8);
    }
    out[32 + lane] = __shfl_xor_sync(mask, value, 6, 8);
    out[64 + lane] = __shfl_down_sync(mask, value, 2u, 8);
    out[96 + lane] = __shfl_up_sync(mask, value, 2u, 8);
    out[128 + lane] = static_cast<unsigned long long>(__any_sync(mask, lane == 5)) << 1 |
                      static_cast<unsigned long long>(__all_sync(mask, lane != 6));
}

/* The sum of all blocks' parts in the order of the blocks, by whichever block is last. */
static __global__ void
sum_by_the_last_block(const int *in, int *parts, unsigned *counter, int *out)
{
    BD_SHARED(int, is_last);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = in[blockIdx.x];
        __threadfence();
        *is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (*is_last && threadIdx.x == 1) {
        int sum = 0;
        for (unsigned i = 0; i < gridDim.x; i++) {
            sum = sum * 3 + parts[i];
        }
        *out = sum;
    }
}

static __global__ void
nothing(int n_barriers)
{
    for (int i = 0; i < n_barriers; i++) {
        __syncthreads();
    }
}

/* ---- wrong ---- */

static __device__ int table[4] = {1, 2, 3, 4};

/* 64 threads, 1024 bytes of shared memory, in[256] and out[256] in global memory. */
template <int which>
static __global__ void
misuse(const int *in, int *out)
{
    BD_SHARED(int, shared);
    const int i = static_cast<int>(threadIdx.x);
    switch (which) {
        case 0: /* nothing wrong */
            shared[i] = in[i] + table[i % 4];
            __syncthreads();
            out[i] = shared[63 - i];
            break;
        case 1: /* no barrier before another thread reads */
            shared[i] = 0;
            __syncthreads();
            shared[i] = in[i];
            out[i] = shared[63 - i];
            break;
        case 2: /* no barrier before another thread overwrites */
            shared[i] = in[i];
            __syncthreads();
            out[i] = shared[63 - i];
            shared[i] = 0;
            break;
        case 3: /* two threads write */
            shared[i / 2] = in[i];
            break;
        case 4: /* a barrier of the warp alone, another warp reads */
            shared[i] = 0;
            __syncthreads();
            shared[i] = in[i];
            __syncwarp();
            out[i] = shared[63 - i];
            break;
        case 5: /* a shuffle is no barrier */
            shared[i] = 0;
            __syncthreads();
            shared[i] = in[i];
            out[i] = __shfl_sync(LANES, 1, 0) + shared[i ^ 1];
            break;
        case 6: /* uninitialised */
            out[i] = shared[i];
            break;
        case 7: /* a barrier that some threads leave out */
            if (i < 40) {
                __syncthreads();
            }
            break;
        case 8: /* two barriers in two branches */
            if (i < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
            break;
        case 9: /* a lane of the mask that does not come */
            if (i != 7) {
                out[i] = __shfl_sync(LANES, i, 0);
            }
            break;
        case 10: /* a lane that the mask leaves out is read */
            if (i % 32 < 16) {
                out[i] = __shfl_sync(0xFFFFu, i, 20);
            }
            break;
        case 11: /* a mask without the caller */
            out[i] = static_cast<int>(__ballot_sync(0xFFFFu, i));
            break;
        case 12: /* different functions in the branches of a warp */
            out[i] = i % 32 < 16 ? __any_sync(LANES, i) : __shfl_sync(LANES, i, 0);
            break;
        case 13: /* a copy that is not waited for */
            bd_copy_async16(shared + 4 * i, in + 4 * i);
            bd_copy_async_commit();
            out[i] = shared[4 * i];
            break;
        case 14: /* only an older group is waited for */
            bd_copy_async_commit();
            bd_copy_async16(shared + 4 * i, in + 4 * i);
            bd_copy_async_commit();
            bd_copy_async_wait<1>();
            out[i] = shared[4 * i];
            break;
        case 15: /* waited for, but not by a barrier */
            shared[4 * i] = 0;
            __syncthreads();
            bd_copy_async16(shared + 4 * i, in + 4 * i);
            bd_copy_async_commit();
            bd_copy_async_wait<0>();
            out[i] = shared[4 * (63 - i)];
            break;
        case 16: /* never waited for */
            bd_copy_async16(shared + 4 * i, in + 4 * i);
            break;
        case 17: /* copied over what others still read */
            shared[i] = 1;
            __syncthreads();
            out[i] = shared[63 - i];
            if (i < 16) {
                bd_copy_async16(shared + 4 * i, in + 4 * i);
            }
            break;
        case 18: /* a misaligned copy */
            bd_copy_async16(shared + 4 * i, in + 4 * i + 1);
            break;
        case 19: /* beyond shared memory */
            shared[256 + i] = i;
            break;
        case 20: /* beyond global memory, read */
            out[i] = in[256 + i];
            break;
        case 21: /* before it, written */
            out[i - 1] = i;
            break;
        case 22: /* an input written to */
            const_cast<int *>(in)[i] = i;
            break;
        case 23: /* a misaligned vector */
            out[i] = reinterpret_cast<const int4 *>(in + i)->x;
            break;
        case 24: { /* an index beyond a fragment */
            int d[4] = {i, i, i, i};
            out[i] = d[i];
            break;
        }
        case 25: /* a shift by the width */
            out[i] = static_cast<int>(1u << i);
            break;
        case 26: /* signed overflow */
            out[i] = 2147483647 - 10 + i;
            break;
        case 27: /* a float beyond int */
            out[i] = static_cast<int>(static_cast<float>(i) * 1e9f);
            break;
        case 28: /* written by every block */
            out[i] = i;
            break;
        case 29: /* another block's part read without an order */
            if (i == 0 && blockIdx.x == 0) {
                out[0] = 1;
            }
            if (i == 0 && blockIdx.x == 1) {
                out[1] = out[0];
            }
            break;
        case 30: { /* a tensor core product of half a warp */
            int d[4] = {0, 0, 0, 0};
            const unsigned a[4] = {1, 1, 1, 1}, b[2] = {1, 1};
            if (i % 32 < 16) {
                bd_mma_b1(d, a, b);
            }
            out[i] = d[0];
            break;
        }
        case 31: /* a variable of the program written to */
            table[i % 4] = i;
            break;
        case 32: { /* a local variable of another thread */
            int own = i;
            int **pointers = reinterpret_cast<int **>(shared);
            pointers[i] = &own;
            __syncthreads();
            out[i] = *pointers[63 - i];
            break;
        }
        case 33: /* an atomic and a plain write */
            if (i == 0) {
                out[0] = 0;
            }
            atomicAdd(out, 1);
            break;
        case 34: /* __ldg of what is not global */
            shared[i] = i;
            out[i] = __ldg(shared + i);
            break;
    }
}

/* ---- for ctypes ---- */

typedef bd_status (*misuse_launch)(int n_blocks, const int *in, int *out);

template <int which>
static bd_status
launch_misuse(int n_blocks, const int *in, int *out)
{
    return BD_LAUNCH(misuse<which>, static_cast<unsigned>(n_blocks), 64, 1024, nullptr, in, out);
}

template <int... which>
static misuse_launch
find_misuse(int wanted, std::integer_sequence<int, which...>)
{
    static const misuse_launch launches[] = {launch_misuse<which>...};
    return launches[wanted];
}

extern "C" bd_status
run_misuse(int which, int n_blocks, const int *in, int *out)
{
    return find_misuse(which, std::make_integer_sequence<int, 35>())(n_blocks, in, out);
}

extern "C" bd_status
run_product(int is_b1, const unsigned *A, const unsigned *B, int *C, int n_steps, int swap)
{
    return is_b1 ? BD_LAUNCH(product<true>, 1, 32, 0, nullptr, A, B, C, n_steps, swap)
                 : BD_LAUNCH(product<false>, 1, 32, 0, nullptr, A, B, C, n_steps, swap);
}

extern "C" bd_status
run_prefix_sums(const int *in, int *out, int n, int block)
{
    const unsigned size = static_cast<unsigned>(block);
    return BD_LAUNCH(prefix_sums, (static_cast<unsigned>(n) + 4 * size - 1) / (4 * size), size,
                     16 * size + 33 * 4, nullptr, in, out, n);
}

extern "C" bd_status
run_shuffles(const unsigned long long *in, unsigned long long *out)
{
    return BD_LAUNCH(shuffles, 1, 32, 0, nullptr, in, out);
}

extern "C" bd_status
run_sum(const int *in, int *parts, unsigned *counter, int *out, int n)
{
    return BD_LAUNCH(sum_by_the_last_block, static_cast<unsigned>(n), 2, 4, nullptr, in, parts,
                     counter, out);
}

extern "C" int
has_b1(int capability)
{
    return bd_gpu_has_b1(capability);
}

extern "C" bd_status
run_nothing(int grid, int block, int shared_bytes, int n_barriers)
{
    return BD_LAUNCH(nothing, static_cast<unsigned>(grid), static_cast<unsigned>(block),
                     static_cast<size_t>(shared_bytes), nullptr, n_barriers);
}
