/* Known numbers of the instructions that kernels/resources.py counts. Not part of the package. */
#include "gpu.h"

__global__ void
five_b1(int *d, const unsigned *a)
{
    int sums[5][4] = {};
    const unsigned left[4] = {a[0], a[1], a[2], a[3]};
    BD_UNROLL
    for (int j = 0; j < 5; j++) {
        const unsigned right[2] = {a[4 + j], a[5 + j]};
        bd_mma_b1(sums[j], left, right);
    }
    BD_UNROLL
    for (int j = 0; j < 20; j++) {
        d[j] = sums[j / 4][j % 4];
    }
}

__global__ void
three_int8(int *d, const unsigned *a)
{
    int sums[3][4] = {};
    const unsigned left[4] = {a[0], a[1], a[2], a[3]};
    BD_UNROLL
    for (int j = 0; j < 3; j++) {
        const unsigned right[2] = {a[4 + j], a[5 + j]};
        bd_mma_u8s8(sums[j], left, right);
    }
    BD_UNROLL
    for (int j = 0; j < 12; j++) {
        d[j] = sums[j / 4][j % 4];
    }
}

/* Each needs the one before it, so none can be merged or left out. */
__global__ void
nine_lop3(unsigned *d)
{
    unsigned z = d[0];
    BD_UNROLL
    for (int j = 0; j < 9; j++) {
        asm volatile("lop3.b32 %0, %0, %1, %2, 0x6A;"
                     : "+r"(z)
                     : "r"(d[2 * j + 1]), "r"(d[2 * j + 2]));
    }
    d[0] = z;
}
