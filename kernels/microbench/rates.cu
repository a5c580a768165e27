/* rates.cu - what the units of a GPU do in a clock: the numbers that the kernels' design rests on.
 *
 * A program of its own: prints one JSON object. Built and run by rates.py; no part of the package.
 *
 *   mma      multiply-adds a clock and processor, of b1, u8 x s8 and half tensor core products, and of
 *            warp-group products of b1 where the target has them
 *   alu      warp instructions a clock and processor: LOP3, SHF, IMAD, and two or three kinds at once
 *   read     bytes a second of a sum over 20 MB to 2 GB, each pass over other memory
 *   gap      microseconds between kernels of a CUDA graph, plain and with programmatic launch
 *
 * Loops run between two reads of clock64() in every block; operands are random, results go nowhere but
 * into a word that is written if they are zero, which the compiler cannot know. */
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "gpu.h"

namespace
{

enum { LOOPS = 256, CHAINS = 8, REPEATS = 16, WARPS_OF_GROUP = 4 };

#define CHECK(call)                                                        \
    do {                                                                   \
        const cudaError_t error = (call);                                  \
        if (error != cudaSuccess) {                                        \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            exit(1);                                                       \
        }                                                                  \
    } while (0)

struct result {
    long long *clocks; /* [blocks] */
    unsigned *sink;
};

__device__ __forceinline__ void
finish(const result &to, long long start, unsigned mixed)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        to.clocks[blockIdx.x] = clock64() - start;
    }
    if (mixed == 0x9E3779B9u) {
        *to.sink = mixed;
    }
}

__device__ __forceinline__ long long
begin()
{
    __syncthreads();
    return clock64();
}

/* ---- tensor cores ---- */

struct b1 {
    static constexpr int PRODUCTS = 16 * 8 * 256;
    static __device__ __forceinline__ void multiply(int d[4], const unsigned a[4],
                                                    const unsigned b[2])
    {
        bd_mma_b1(d, a, b);
    }
};

struct int8 {
    static constexpr int PRODUCTS = 16 * 8 * 32;
    static __device__ __forceinline__ void multiply(int d[4], const unsigned a[4],
                                                    const unsigned b[2])
    {
        bd_mma_u8s8(d, a, b);
    }
};

struct half {
    static constexpr int PRODUCTS = 16 * 8 * 16;
    static __device__ __forceinline__ void multiply(int d[4], const unsigned a[4],
                                                    const unsigned b[2])
    {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

/* CHAINS independent products a warp in every loop. Halves of random words may be Inf: no rate changes. */
template <class Kind>
__global__ void
mma_rate(const unsigned *random, result to)
{
    int d[CHAINS][4] = {};
    unsigned a[CHAINS][4], b[2] = {random[threadIdx.x], random[threadIdx.x + 1024]};
    BD_UNROLL
    for (int c = 0; c < CHAINS; c++) {
        BD_UNROLL
        for (int i = 0; i < 4; i++) {
            a[c][i] = random[(threadIdx.x + 37 * (4 * c + i)) % 2048];
        }
    }
    const long long start = begin();
#pragma unroll 1
    for (int i = 0; i < LOOPS; i++) {
        BD_UNROLL
        for (int c = 0; c < CHAINS; c++) {
            Kind::multiply(d[c], a[c], b);
        }
    }
    unsigned mixed = 0;
    BD_UNROLL
    for (int c = 0; c < CHAINS; c++) {
        mixed ^= static_cast<unsigned>(d[c][0] ^ d[c][1] ^ d[c][2] ^ d[c][3]);
    }
    finish(to, start, mixed);
}

/* ---- warp-group products: m64nNk256, signs from registers, planes from shared memory ---- */

#define WORDS4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define WORDS16(d, i) WORDS4(d, i), WORDS4(d, i + 4), WORDS4(d, i + 8), WORDS4(d, i + 12)
#define NAMES4 "%0, %1, %2, %3"
#define NAMES8 NAMES4 ", %4, %5, %6, %7"
#define NAMES16 NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES24 NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES32 NAMES24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define GROUP_PRODUCT(N, names, a0, a1, a2, a3, b, ...)                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc {" names \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", 1;"                         \
                 : __VA_ARGS__                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(planes))

template <int N>
__global__ void
group_rate(const unsigned *random, result to)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    BD_SHARED(unsigned, shared); /* 64 columns of 256 bits */
    for (int i = static_cast<int>(threadIdx.x); i < N * 8; i += static_cast<int>(blockDim.x)) {
        shared[i] = random[i];
    }
    int d[N / 2] = {};
    unsigned a[4];
    BD_UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = random[(threadIdx.x + 37 * i) % 2048];
    }
    /* PTX ISA 9.7.15.5.1: address, leading and stride offset in 16 bytes; not swizzled */
    const unsigned long long at =
        static_cast<unsigned>(__cvta_generic_to_shared(shared)) / 16 & 0x3FFF;
    const unsigned long long planes = at | 8ull << 16 | 16ull << 32;
    asm volatile("fence.proxy.async;" ::: "memory");
    const long long start = begin();
#pragma unroll 1
    for (int i = 0; i < LOOPS; i++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        BD_UNROLL
        for (int c = 0; c < REPEATS; c++) {
            if constexpr (N == 8) {
                GROUP_PRODUCT(8, NAMES4, "%4", "%5", "%6", "%7", "%8", WORDS4(d, 0));
            } else if constexpr (N == 16) {
                GROUP_PRODUCT(16, NAMES8, "%8", "%9", "%10", "%11", "%12", WORDS4(d, 0),
                              WORDS4(d, 4));
            } else if constexpr (N == 32) {
                GROUP_PRODUCT(32, NAMES16, "%16", "%17", "%18", "%19", "%20", WORDS16(d, 0));
            } else {
                GROUP_PRODUCT(64, NAMES32, "%32", "%33", "%34", "%35", "%36", WORDS16(d, 0),
                              WORDS16(d, 16));
            }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    unsigned mixed = 0;
    BD_UNROLL
    for (int i = 0; i < N / 2; i++) {
        mixed ^= static_cast<unsigned>(d[i]);
    }
    finish(to, start, mixed);
#else
    (void)random, (void)to;
#endif
}

/* ---- integer units ---- */

enum { LOP3 = 1, SHF = 2, IMAD = 4 };

/* Of every kind in KINDS, CHAINS * REPEATS instructions a loop: the loop's own hardly count. */
template <int KINDS>
__global__ void
alu_rate(const unsigned *random, result to)
{
    unsigned x[CHAINS], y[CHAINS], z[CHAINS];
    const unsigned mask = random[threadIdx.x], one = random[threadIdx.x + 1024];
    BD_UNROLL
    for (int c = 0; c < CHAINS; c++) {
        x[c] = y[c] = z[c] = random[(threadIdx.x + 31 * c) % 2048];
    }
    const long long start = begin();
#pragma unroll 1
    for (int i = 0; i < LOOPS; i++) {
        BD_UNROLL
        for (int j = 0; j < CHAINS * REPEATS; j++) {
            const int c = j % CHAINS;
            if constexpr ((KINDS & LOP3) != 0) {
                asm volatile("lop3.b32 %0, %0, %1, %2, 0x6A;" : "+r"(x[c]) : "r"(mask), "r"(one));
            }
            if constexpr ((KINDS & SHF) != 0) {
                asm volatile("shf.l.wrap.b32 %0, %0, %1, %2;" : "+r"(y[c]) : "r"(mask), "r"(one));
            }
            if constexpr ((KINDS & IMAD) != 0) {
                asm volatile("mad.lo.u32 %0, %0, %1, %2;" : "+r"(z[c]) : "r"(mask), "r"(one));
            }
        }
    }
    unsigned mixed = 0;
    BD_UNROLL
    for (int c = 0; c < CHAINS; c++) {
        mixed ^= x[c] ^ y[c] ^ z[c];
    }
    finish(to, start, mixed);
}

/* ---- memory and launches ---- */

/* 4 loads of 16 bytes a thread in flight. */
__global__ void
sum_all(const uint4 *from, size_t n, unsigned *sink)
{
    unsigned sum = 0;
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += 4 * step) {
        BD_UNROLL
        for (int u = 0; u < 4; u++) {
            if (i + static_cast<size_t>(u) * step < n) {
                const uint4 word = __ldcs(from + i + static_cast<size_t>(u) * step);
                sum ^= word.x ^ word.y ^ word.z ^ word.w;
            }
        }
    }
    if (sum == 0x9E3779B9u) {
        *sink = sum;
    }
}

__global__ void
fill(unsigned *to, size_t n)
{
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        unsigned x = static_cast<unsigned>(i) * 0x9E3779B9u; /* mixed as by MurmurHash3's end */
        x = (x ^ x >> 16) * 0x85EBCA6Bu;
        x = (x ^ x >> 13) * 0xC2B2AE35u;
        to[i] = x ^ x >> 16;
    }
}

__global__ void
nothing(unsigned *sink)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize(); /* returns at once without programmatic launch */
#endif
    if (sink == nullptr) {
        __trap();
    }
}

/* ---- the host ---- */

struct machine {
    int processors;
    unsigned *random; /* device, 2 GB */
    size_t random_bytes;
    result to;
    cudaStream_t stream;
    cudaEvent_t events[2];
};

double
milliseconds(const machine &gpu)
{
    float took = 0;
    CHECK(cudaEventSynchronize(gpu.events[1]));
    CHECK(cudaEventElapsedTime(&took, gpu.events[0], gpu.events[1]));
    return took;
}

/* Amounts a clock and processor, one block of n_warps on each; the median block's clocks, the second run. */
template <class Kernel>
double
per_clock(const machine &gpu, Kernel kernel, int n_warps, double amount_of_warp)
{
    std::vector<long long> clocks(static_cast<size_t>(gpu.processors));
    for (int run = 0; run < 2; run++) {
        kernel<<<gpu.processors, 32 * n_warps, 4096, gpu.stream>>>(gpu.random, gpu.to);
        CHECK(cudaGetLastError());
        CHECK(cudaStreamSynchronize(gpu.stream));
    }
    CHECK(cudaMemcpy(clocks.data(), gpu.to.clocks, clocks.size() * sizeof clocks[0],
                     cudaMemcpyDeviceToHost));
    for (size_t i = 1; i < clocks.size(); i++) {
        for (size_t j = i; j > 0 && clocks[j] < clocks[j - 1]; j--) {
            const long long other = clocks[j];
            clocks[j] = clocks[j - 1];
            clocks[j - 1] = other;
        }
    }
    return amount_of_warp * n_warps / static_cast<double>(clocks[clocks.size() / 2]);
}

template <class Kernel>
void
print_rates(const machine &gpu, const char *name, Kernel kernel, double amount_of_warp,
            const char *end)
{
    printf("\"%s\": {", name);
    for (int n_warps = 4; n_warps <= 16; n_warps *= 2) {
        printf("\"%d warps\": %.1f%s", n_warps, per_clock(gpu, kernel, n_warps, amount_of_warp),
               n_warps < 16 ? ", " : "}");
    }
    printf("%s", end);
}

/* Bytes a second of passes over n_bytes, each over the memory after the last one's. */
double
read_rate(const machine &gpu, size_t n_bytes)
{
    const int n_passes = 40;
    const size_t n_places = gpu.random_bytes / n_bytes;
    for (int run = 0; run < 2; run++) {
        CHECK(cudaEventRecord(gpu.events[0], gpu.stream));
        for (int i = 0; i < n_passes; i++) {
            const unsigned *from = gpu.random + static_cast<size_t>(i) % n_places * (n_bytes / 4);
            sum_all<<<8 * gpu.processors, 256, 0, gpu.stream>>>(
                reinterpret_cast<const uint4 *>(from), n_bytes / 16, gpu.to.sink);
        }
        CHECK(cudaEventRecord(gpu.events[1], gpu.stream));
    }
    return n_passes * static_cast<double>(n_bytes) / milliseconds(gpu) * 1e3;
}

/* Microseconds a kernel of a graph of many that do nothing, each after the one before. */
double
gap(const machine &gpu, bool programmatic)
{
    const int n_kernels = 1000;
    cudaGraph_t graph;
    cudaGraphExec_t runnable;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(gpu.processors));
    config.blockDim = dim3(128);
    config.stream = gpu.stream;
    config.attrs = &attribute;
    config.numAttrs = programmatic ? 1 : 0;
    CHECK(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n_kernels; i++) {
        CHECK(cudaLaunchKernelEx(&config, nothing, gpu.to.sink));
    }
    CHECK(cudaStreamEndCapture(gpu.stream, &graph));
    CHECK(cudaGraphInstantiate(&runnable, graph, 0));
    for (int run = 0; run < 2; run++) {
        CHECK(cudaEventRecord(gpu.events[0], gpu.stream));
        CHECK(cudaGraphLaunch(runnable, gpu.stream));
        CHECK(cudaEventRecord(gpu.events[1], gpu.stream));
    }
    const double took = milliseconds(gpu);
    CHECK(cudaGraphExecDestroy(runnable));
    CHECK(cudaGraphDestroy(graph));
    return took / n_kernels * 1e3;
}

void
print_mma(const machine &gpu, int capability)
{
    const double chains = static_cast<double>(LOOPS) * CHAINS;
    printf("\"mma\": {");
    if (bd_gpu_has_b1(capability)) {
        print_rates(gpu, "b1 m16n8k256", mma_rate<b1>, chains * b1::PRODUCTS, ", ");
    }
    if (capability == 90) {
        const double group = static_cast<double>(LOOPS) * REPEATS * 64 * 256 /
                             WARPS_OF_GROUP; /* of a warp, a column */
        print_rates(gpu, "b1 m64n8k256", group_rate<8>, group * 8, ", ");
        print_rates(gpu, "b1 m64n16k256", group_rate<16>, group * 16, ", ");
        print_rates(gpu, "b1 m64n32k256", group_rate<32>, group * 32, ", ");
        print_rates(gpu, "b1 m64n64k256", group_rate<64>, group * 64, ", ");
    }
    print_rates(gpu, "u8 x s8 m16n8k32", mma_rate<int8>, chains * int8::PRODUCTS, ", ");
    print_rates(gpu, "half m16n8k16", mma_rate<half>, chains * half::PRODUCTS, "},\n");
}

void
print_alu(const machine &gpu)
{
    const double chains = static_cast<double>(LOOPS) * CHAINS * REPEATS;
    printf("\"alu\": {");
    print_rates(gpu, "LOP3", alu_rate<LOP3>, chains, ", ");
    print_rates(gpu, "SHF", alu_rate<SHF>, chains, ", ");
    print_rates(gpu, "IMAD", alu_rate<IMAD>, chains, ", ");
    print_rates(gpu, "LOP3 + SHF", alu_rate<LOP3 | SHF>, 2 * chains, ", ");
    print_rates(gpu, "LOP3 + IMAD", alu_rate<LOP3 | IMAD>, 2 * chains, ", ");
    print_rates(gpu, "LOP3 + SHF + IMAD", alu_rate<LOP3 | SHF | IMAD>, 3 * chains, "},\n");
}

} /* namespace */

int
main()
{
    machine gpu = {};
    cudaDeviceProp facts;
    CHECK(cudaGetDeviceProperties(&facts, 0));
    gpu.processors = facts.multiProcessorCount;
    gpu.random_bytes = static_cast<size_t>(2000) << 20;
    CHECK(cudaMalloc(&gpu.random, gpu.random_bytes));
    CHECK(cudaMalloc(&gpu.to.clocks, static_cast<size_t>(gpu.processors) * sizeof(long long)));
    CHECK(cudaMalloc(&gpu.to.sink, 4));
    CHECK(cudaStreamCreate(&gpu.stream));
    CHECK(cudaEventCreate(&gpu.events[0]));
    CHECK(cudaEventCreate(&gpu.events[1]));
    for (int i = 0; i < 1000; i++) { /* half a second: an idle GPU has lowered its clocks */
        fill<<<8 * gpu.processors, 256, 0, gpu.stream>>>(gpu.random, gpu.random_bytes / 4);
    }
    CHECK(cudaStreamSynchronize(gpu.stream));
    printf("{\"gpu\": \"%s\", \"processors\": %d,\n", facts.name, gpu.processors);
    print_mma(gpu, 10 * facts.major + facts.minor);
    print_alu(gpu);
    printf("\"read\": {");
    for (const int megabytes : {20, 60, 200, 2000}) {
        printf("\"%d MB\": %.4g%s", megabytes, read_rate(gpu, static_cast<size_t>(megabytes) << 20),
               megabytes < 2000 ? ", " : "},\n");
    }
    printf("\"gap\": {\"plain\": %.3f, \"programmatic\": ", gap(gpu, false));
    if (facts.major >= 9) {
        printf("%.3f}}\n", gap(gpu, true));
    } else {
        printf("null}}\n");
    }
    return 0;
}
