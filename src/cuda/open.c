/* src/cuda/open.c - finds the GPU's part of the library.  Room: cuda.
 * In: the number of a GPU.  Out: a backend; what knows CUDA is a shared object opened at run time, so that the
 * library and the command start on machines without it. */
#include "cuda/cuda.h"
#include <string.h>

static const char OBJECT[] = "blackmamba-cuda.so";

bm_status bm_backend_open_cuda(bm_backend **out, int device) {
    const char *why;
    bm_cuda_open_fn open_cuda;
    *out = NULL;
    void *symbol = bm_object_find(OBJECT, BM_CUDA_SYMBOL, &why);
    if (!symbol) return bm_fail(BM_ENOSUPPORT, "cuda: %s does not open (%s); build where CUDA's compiler nvcc is", OBJECT, why);
    memcpy(&open_cuda, &symbol, sizeof open_cuda);
    return open_cuda(out, device, bm_fail);
}
