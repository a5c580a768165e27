/* cuda_call.h - one call on a GPU: its tensors, its device, its stream. C only.
 *
 *   cuda_call call = {0};
 *   if (cuda_begin(&call) == 0 && (x = cuda_acquire(state, &call, object, "x", TENSOR_INPUT)) != NULL) {
 *       Py_BEGIN_ALLOW_THREADS
 *           status = cuda_enter(&call);
 *           if (status == BD_OK) { status = bd_cuda_...(&call.ctx, ...); cuda_leave(&call); }
 *       Py_END_ALLOW_THREADS
 *   }
 *   cuda_end(&call);
 *
 * All tensors of a call are on one GPU; it runs on the current stream of whoever made the first one. */
#ifndef BITDELTA_CUDA_CALL_H_
#define BITDELTA_CUDA_CALL_H_

#include "cuda.h"
#include "cuda_device.h"
#include "tensor.h"

#define CUDA_MAX_TENSORS 16

typedef struct {
    bd_cuda_context ctx;
    int before; /* the thread's GPU */
    int n_tensors, n_lent;
    tensor tensors[CUDA_MAX_TENSORS];
} cuda_call;

/* 0, or -1 with DeviceError that says what is missing. */
int cuda_begin(cuda_call *call);

/* The next tensor, or NULL with an exception. The call holds it until cuda_end. */
tensor *cuda_acquire(module_state *state, cuda_call *call, PyObject *object, const char *name,
                     int mode);

/* Without the GIL: makes the GPU current, and lends the tensors to emulated kernels. */
bd_status cuda_enter(cuda_call *call);
void cuda_leave(cuda_call *call);

void cuda_end(cuda_call *call);

/* As return_status; BD_ERR_CUDA is a DeviceError with CUDA's own words. */
PyObject *cuda_return_status(bd_status status);

#endif /* BITDELTA_CUDA_CALL_H_ */
