/* host_memory.cu - lets a GPU use memory of the host where it lies, for the tests of single kernels. */
#include <cuda_runtime.h>

/* Whole pages. From here on their addresses mean the same to the GPU, as on every 64-bit Linux. */
extern "C" int
test_pin(void *pages, size_t n_bytes)
{
    return cudaHostRegister(pages, n_bytes, cudaHostRegisterMapped);
}

extern "C" int
test_unpin(void *pages)
{
    return cudaHostUnregister(pages);
}

extern "C" int
test_wait()
{
    return cudaDeviceSynchronize();
}
