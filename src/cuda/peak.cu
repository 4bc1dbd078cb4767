/* peak.cu - what this GPU allows: bandwidth of reading, rate of products.  Room: cuda. */
#include "cuda/cuda.h"
#include <stdlib.h>

enum { THREADS = 512, STEPS = 4096, RUNS = 5 };

__global__ void __launch_bounds__(THREADS) read_all(const uint4 *p, size_t n, unsigned *out) {
    unsigned s = 0;
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
        const uint4 v = __ldcs(p + i);
        s ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (s == 0xdeadbeef) *out = s;      /* nothing may be left out */
}
/* Chains of independent products in registers, as many as hide their latency. */
__global__ void __launch_bounds__(THREADS) multiply_f32(float *out, float x) {
    float a[16];
#pragma unroll
    for (int i = 0; i < 16; i++) a[i] = (float)i;
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
        for (int i = 0; i < 16; i++) a[i] = fmaf(a[i], x, x);
    }
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += a[i];
    if (sum == 12345.0f) *out = sum;
}
__global__ void __launch_bounds__(THREADS) multiply_bf16(float *out, unsigned x) {
    float c[8][4] = {};
    for (int s = 0; s < STEPS / 8; s++) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                         : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3]) : "r"(x));
    }
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    if (sum == 12345.0f) *out = sum;
}

static int compare(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

typedef struct work { bm_cuda *c; const uint4 *p; size_t n; void *out; bool half; } work;
static void read_once(const work *w) {
    read_all<<<8 * w->c->chip.multiProcessorCount, THREADS, 0, w->c->stream>>>(w->p, w->n, (unsigned *)w->out);
}
static void multiply_once(const work *w) {
    const int blocks = 4 * w->c->chip.multiProcessorCount;
    if (w->half) multiply_bf16<<<blocks, THREADS, 0, w->c->stream>>>((float *)w->out, 0);
    else multiply_f32<<<blocks, THREADS, 0, w->c->stream>>>((float *)w->out, 0.5f);
}

/* Median seconds of once() over repeats, by events, after one that does not count. */
static bm_status timed(const work *w, void (*once)(const work *w), int repeats, double *out) {
    bm_cuda *c = w->c;
    cudaEvent_t event[2] = {};
    float *ms = (float *)calloc((size_t)repeats, sizeof *ms);
    if (!ms) return c->fail(BM_EMEMORY, "out of memory: timings");
    bm_cuda_check(c, cudaEventCreate(&event[0]), "timing");
    bm_cuda_check(c, cudaEventCreate(&event[1]), "timing");
    once(w);
    for (int i = 0; i < repeats && !c->failed; i++) {
        cudaEventRecord(event[0], c->stream);
        once(w);
        cudaEventRecord(event[1], c->stream);
        bm_cuda_check(c, cudaEventSynchronize(event[1]), "timing");
        cudaEventElapsedTime(&ms[i], event[0], event[1]);
    }
    qsort(ms, (size_t)repeats, sizeof *ms, compare);
    *out = 1e-3 * (double)ms[repeats / 2];
    for (int i = 0; i < 2; i++) if (event[i]) cudaEventDestroy(event[i]);
    free(ms);
    return c->door.sync(&c->door);
}

bm_status bm_cuda_bandwidth(bm_backend *b, size_t bytes, int repeats, double *out) {
    work w = {};
    double seconds = 0;
    void *p;
    w.c = cuda_of(b);
    if (bytes < 4096 || repeats < 1) return w.c->fail(BM_EARG, "bandwidth: found %zu bytes and %d repeats, expected at least 4096 and 1", bytes, repeats);
    bm_status s = b->alloc(b, &p, bytes, "measuring bandwidth");
    if (s) return s;
    w.p = (const uint4 *)p, w.n = bytes / sizeof(uint4), w.out = p;
    s = timed(&w, read_once, repeats, &seconds);
    b->release(b, p);
    if (!s) *out = (double)bytes / seconds;
    return s;
}

/* Tensor cores by mma.sync where activations are rounded, else FMA. */
bm_status bm_cuda_peak(bm_backend *b, bm_arith arith, bm_dtype type, double *out) {
    work w = {};
    double seconds = 0;
    w.c = cuda_of(b);
    w.half = arith == BM_ARITH_NATIVE && type != BM_F32;
    bm_status s = b->alloc(b, &w.out, sizeof(float), "measuring products");
    if (s) return s;
    s = timed(&w, multiply_once, RUNS, &seconds);
    b->release(b, w.out);
    const double threads = 4.0 * w.c->chip.multiProcessorCount * THREADS;
    const double ops = w.half ? threads / 32 * STEPS * (2.0 * 16 * 8 * 16) : threads * STEPS * 16 * 2;
    if (!s) *out = ops / seconds;
    return s;
}
