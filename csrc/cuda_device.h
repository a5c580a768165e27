/* cuda_device.h - what the border asks about GPUs. Defined by kernels/device.cu for real ones and by
 * kernels/emulation*.cpp for the emulated one; absent from a build without CUDA. */
#ifndef BITDELTA_CUDA_DEVICE_H_
#define BITDELTA_CUDA_DEVICE_H_

#include <stddef.h>

#include "bitdelta.h"

#ifdef __cplusplus
extern "C" {
#endif

/* NULL when a GPU can be used, else what is missing. */
const char *bd_gpu_missing(void);

/* What the latest call of this thread that returned BD_ERR_CUDA said. Valid until the next one. */
const char *bd_gpu_message(void);

/* Makes a GPU the calling thread's, and tells what kernels are launched by: 10 * major + minor of its
 * compute capability, and its processors. bd_gpu_leave makes `before` the thread's again. */
bd_status bd_gpu_enter(int device, int *before, int *capability, int *n_processors);
void bd_gpu_leave(int before);

/* Copies n_bytes from the host to device memory in the order of the stream; `from` stays as it is until the
 * stream has come past it. Not while the stream is captured. */
bd_status bd_gpu_put(void *to, const void *from, size_t n_bytes, void *stream);

/* Whether what is launched on the stream is being recorded into a CUDA graph. */
int bd_gpu_is_captured(void *stream);

/* 1 when "device memory" is host memory, of which kernels may touch only what is lent to them. */
int bd_gpu_is_emulated(void);

/* Lends n_bytes at data to kernels until it is taken back, as often as lent. On a GPU nothing happens.
 * BD_ERR_MEMORY when the list cannot grow. */
bd_status bd_gpu_lend(const void *data, size_t n_bytes, int is_writable);
void bd_gpu_take_back(const void *data, size_t n_bytes, int is_writable);

#ifdef __cplusplus
}
#endif

#endif /* BITDELTA_CUDA_DEVICE_H_ */
