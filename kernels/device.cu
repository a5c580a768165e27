/* device.cu - cuda_device.h for real GPUs, by the CUDA runtime, which is linked in. */
#include "gpu.h"

#if !defined(BD_EMULATE)

#include <stdio.h>

/* Of this thread alone, as CUDA's own last error is. */
static thread_local char message[256];
static thread_local char missing[256];

bd_status
bd_gpu_status(const char *what, cudaError_t error)
{
    if (error == cudaSuccess) {
        return BD_OK;
    }
    (void)cudaGetLastError(); /* said here, so not to be found by the next call */
    (void)snprintf(message, sizeof message, "%s: %s (%s)", what, cudaGetErrorString(error),
                   cudaGetErrorName(error));
    return BD_ERR_CUDA;
}

const char *
bd_gpu_message(void)
{
    return message;
}

const char *
bd_gpu_missing(void)
{
    int driver = 0, n_devices = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        return "no NVIDIA driver was found (libcuda.so.1)";
    }
    const cudaError_t error = cudaGetDeviceCount(&n_devices);
    (void)cudaGetLastError();
    if (error == cudaErrorInsufficientDriver) {
        (void)snprintf(missing, sizeof missing,
                       "the NVIDIA driver is for CUDA %d.%d, this build needs %d.%d or newer",
                       driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                       CUDART_VERSION % 1000 / 10);
        return missing;
    }
    if (error == cudaErrorNoDevice || (error == cudaSuccess && n_devices == 0)) {
        return "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES may hide it)";
    }
    if (error != cudaSuccess) {
        (void)snprintf(missing, sizeof missing, "the NVIDIA driver says: %s",
                       cudaGetErrorString(error));
        return missing;
    }
    return nullptr;
}

bd_status
bd_gpu_enter(int device, int *before, int *capability, int *n_processors)
{
    int major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(before);
    if (error == cudaSuccess && *before != device) {
        error = cudaSetDevice(device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(n_processors, cudaDevAttrMultiProcessorCount, device);
    }
    *capability = 10 * major + minor;
    return bd_gpu_status("the GPU", error);
}

void
bd_gpu_leave(int before)
{
    int now = before;
    if (cudaGetDevice(&now) == cudaSuccess && now != before) {
        (void)cudaSetDevice(before);
    }
}

bd_status
bd_gpu_put(void *to, const void *from, size_t n_bytes, void *stream)
{
    return bd_gpu_status("copying to the GPU",
                         cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice,
                                         static_cast<cudaStream_t>(stream)));
}

int
bd_gpu_is_captured(void *stream)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    /* cudaErrorStreamCaptureImplicit: the legacy stream while another is captured */
    (void)cudaGetLastError();
    return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

int
bd_gpu_is_emulated(void)
{
    return 0;
}

bd_status
bd_gpu_lend(const void *data, size_t n_bytes, int is_writable)
{
    (void)data, (void)n_bytes, (void)is_writable;
    return BD_OK;
}

void
bd_gpu_take_back(const void *data, size_t n_bytes, int is_writable)
{
    (void)data, (void)n_bytes, (void)is_writable;
}

#endif
