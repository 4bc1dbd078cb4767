/* cuda.cu - the backend on an NVIDIA GPU: memory, order, failures, opening.  Room: cuda.
 *
 * In: a GPU's number.  Out: a door whose operations follow one another on one stream. */
#include "cuda/cuda.h"
#include <stdlib.h>
#include <string.h>

bool bm_cuda_check(bm_cuda *c, cudaError_t e, const char *what) {
    if (e == cudaSuccess) return true;
    if (!c->failed) snprintf(c->sentence, sizeof c->sentence, "%s: %s: %s", c->door.name, what, cudaGetErrorString(e));
    if (!c->failed) c->failed = BM_EDEVICE;
    return false;
}

/* The first failure of all before a wait that went like this. */
static bm_status told(bm_cuda *c, cudaError_t waited) {
    bm_cuda_check(c, waited, "waiting for the GPU");
    const bm_status s = c->failed;
    c->failed = BM_OK;
    return s ? c->fail(s, "%s", c->sentence) : BM_OK;
}
static bm_status cuda_sync(bm_backend *b) { return told(cuda_of(b), cudaStreamSynchronize(cuda_of(b)->stream)); }
static void cuda_mark(bm_backend *b, int place) {
    bm_cuda_check(cuda_of(b), cudaEventRecord(cuda_of(b)->place[place], cuda_of(b)->stream), "marking a place");
}
static bm_status cuda_reach(bm_backend *b, int place) { return told(cuda_of(b), cudaEventSynchronize(cuda_of(b)->place[place])); }

static bm_status cuda_alloc(bm_backend *b, void *out, size_t bytes, const char *what) {
    bm_cuda *c = cuda_of(b);
    void *p = NULL;
    *(void **)out = NULL;
    const cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e) {
        size_t left = 0, all = 0;
        cudaGetLastError();     /* a failed allocation must not look like a failed kernel */
        cudaMemGetInfo(&left, &all);
        return c->fail(e == cudaErrorMemoryAllocation ? BM_EMEMORY : BM_EDEVICE,
                       "%s: %zu bytes for %s: %s; %zu of %zu bytes of its memory are free", b->name, bytes, what,
                       cudaGetErrorString(e), left, all);
    }
    bm_cuda_check(c, cudaMemsetAsync(p, 0, bytes, c->stream), "clearing memory");
    *(void **)out = p;
    return BM_OK;
}
static void cuda_release(bm_backend *b, void *p) {
    bm_cuda_check(cuda_of(b), cudaStreamSynchronize(cuda_of(b)->stream), "waiting for the GPU");
    cudaFree(p);
}
static bm_status cuda_alloc_host(bm_backend *b, void *out, size_t bytes, const char *what) {
    void *p = NULL;
    const cudaError_t e = cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocMapped | cudaHostAllocPortable);
    *(void **)out = NULL;
    if (e) {
        cudaGetLastError();
        return cuda_of(b)->fail(e == cudaErrorMemoryAllocation ? BM_EMEMORY : BM_EDEVICE,
                                "%s: %zu bytes of pinned memory for %s: %s", b->name, bytes, what, cudaGetErrorString(e));
    }
    *(void **)out = memset(p, 0, bytes);
    return BM_OK;
}
static void cuda_release_host(bm_backend *b, void *p) {
    bm_cuda_check(cuda_of(b), cudaStreamSynchronize(cuda_of(b)->stream), "waiting for the GPU");
    cudaFreeHost(p);
}
static void move(bm_backend *b, void *dst, const void *src, size_t bytes) {
    bm_cuda *c = cuda_of(b);
    bm_cuda_rounded(c, NULL, 0, 0);
    if (!c->failed && bytes) bm_cuda_check(c, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, c->stream), "copying");
}
/* Other memory than alloc_host's: put returns when the bytes were taken, get when they are there. */
static void cuda_put(bm_backend *b, void *dst, const void *host, size_t n) { move(b, dst, host, n); }
static void cuda_get(bm_backend *b, void *host, const void *src, size_t n) { move(b, host, src, n); }
static void cuda_copy(bm_backend *b, void *dst, const void *src, size_t n) { move(b, dst, src, n); }
static void cuda_zero(bm_backend *b, void *dst, size_t n) {
    bm_cuda *c = cuda_of(b);
    if (!c->failed) bm_cuda_check(c, cudaMemsetAsync(dst, 0, n, c->stream), "clearing memory");
}

static uint64_t cuda_left(bm_backend *b) {
    size_t left = 0, all = 0;
    bm_cuda_check(cuda_of(b), cudaMemGetInfo(&left, &all), "asking for free memory");
    return left;
}
static double cuda_waited(bm_backend *, bool) { return 0; }

static void drop(bm_cuda *c) {
    cudaFree(c->rows);
    cudaFree(c->widened);
    for (int i = 0; i < 2; i++) if (c->place[i]) cudaEventDestroy(c->place[i]);
    if (c->stream) cudaStreamDestroy(c->stream);
    free(c);
}
static void cuda_close(bm_backend *b) {
    if (!b) return;
    bm_cuda_forget(b, NULL);
    bm_cuda_wide_close(cuda_of(b));
    drop(cuda_of(b));
}

/* The driver, the number and the chip, or a sentence. */
static bm_status choose(bm_cuda *c, int device, bm_cuda_fail_fn fail) {
    int n = 0, driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (!driver) return fail(BM_ENOSUPPORT, "cuda: found no NVIDIA driver");
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaErrorInsufficientDriver)
        return fail(BM_ENOSUPPORT, "cuda: found a driver for CUDA %d.%d, expected one for %d.%d or later", driver / 1000,
                    driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (e || !n) return fail(BM_ENOSUPPORT, "cuda: found no GPU (%s)", cudaGetErrorString(e ? e : cudaErrorNoDevice));
    if (device < 0 || device >= n) return fail(BM_EARG, "cuda: found GPU %d, expected 0 to %d", device, n - 1);
    e = cudaGetDeviceProperties(&c->chip, device);
    if (e) return fail(BM_EDEVICE, "cuda:%d: %s", device, cudaGetErrorString(e));
    if (c->chip.major < 8)
        return fail(BM_ENOSUPPORT, "cuda:%d: found %s of compute capability %d.%d, expected 8.0 or later", device, c->chip.name,
                    c->chip.major, c->chip.minor);
    if (!e) e = cudaSetDevice(device);
    if (!e) e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    for (int i = 0; !e && i < 2; i++) e = cudaEventCreateWithFlags(&c->place[i], cudaEventDisableTiming);
    if (!e) e = cudaMalloc(&c->rows, BM_CUDA_BEST_ROWS * sizeof *c->rows);
    if (!e) e = cudaMemsetAsync(c->rows, 0, BM_CUDA_BEST_ROWS * sizeof *c->rows, c->stream);
    return e ? fail(BM_EDEVICE, "cuda:%d: %s", device, cudaGetErrorString(e)) : BM_OK;
}

extern "C" __attribute__((visibility("default"))) bm_status bm_cuda_open(bm_backend **out, int device, bm_cuda_fail_fn fail) {
    bm_cuda *c = (bm_cuda *)calloc(1, sizeof *c);
    *out = NULL;
    if (!c) return fail(BM_EMEMORY, "out of memory: %zu bytes for a backend", sizeof *c);
    const bm_status s = choose(c, device, fail);
    if (s) {
        drop(c);
        return s;
    }
    bm_backend *b = &c->door;
    c->fail = fail;
    b->threads = 1;
    b->grain = (size_t)2 << 20;
    b->left = cuda_left;
    b->alloc = cuda_alloc, b->release = cuda_release;
    b->alloc_host = cuda_alloc_host, b->release_host = cuda_release_host;
    b->packed = bm_cuda_packed, b->pack = bm_cuda_pack, b->unpack = bm_cuda_unpack;
    b->put = cuda_put, b->get = cuda_get, b->copy = cuda_copy;
    b->zero = cuda_zero, b->sync = cuda_sync, b->mark = cuda_mark, b->reach = cuda_reach, b->close = cuda_close;
    b->reserve = bm_cuda_reserve, b->reserving = bm_cuda_reserving;
    b->reserve_widened = bm_cuda_reserve_widened, b->widening = bm_cuda_widening;
    b->reserved = bm_cuda_reserved, b->bandwidth = bm_cuda_bandwidth, b->peak = bm_cuda_peak, b->waited = cuda_waited;
    b->embed = bm_cuda_embed, b->norm = bm_cuda_norm, b->linear = bm_cuda_linear, b->conv = bm_cuda_conv;
    b->scan = bm_cuda_scan, b->route = bm_cuda_route, b->experts = bm_cuda_experts, b->loss = bm_cuda_loss;
    b->attention = bm_cuda_attention, b->best = bm_cuda_best;
    b->replay = bm_cuda_replay, b->recorded = bm_cuda_recorded, b->forget = bm_cuda_forget;
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    snprintf(b->name, sizeof b->name, "cuda:%d, %.40s", device, c->chip.name);
    snprintf(b->version, sizeof b->version, "CUDA %d.%d, driver for %d.%d", runtime / 1000, runtime % 1000 / 10, driver / 1000,
             driver % 1000 / 10);
    *out = b;
    return BM_OK;
}
