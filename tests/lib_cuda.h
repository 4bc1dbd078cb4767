/* lib_cuda.h - what the tests of operations on the first NVIDIA GPU share: arrays and weights on both sides, opening, running. */
#ifndef LIB_CUDA_H
#define LIB_CUDA_H
#include "lib_kernels.h"
#include "lib_golden.h"
#include "model/model.h"
#include <math.h>

static bm_backend *gpu, *cpu;

/* An array on both sides. */
typedef struct twin { float *host, *at; size_t n; } twin;
static inline twin made(float *host, size_t n) {
    twin t = { host, NULL, n };
    OK(gpu->alloc(gpu, &t.at, n * sizeof *host + 4, "a test"));
    gpu->put(gpu, t.at, host, n * sizeof *host);
    return t;
}
static inline twin random_twin(size_t n, float scale) { return made(normals(n, scale), n); }
static inline twin empty_twin(size_t n) { return made(floats(n), n); }
static inline void end(twin *t) {
    gpu->release(gpu, t->at);
    drop(t->host);
}
/* What the GPU wrote. */
static inline float *fetched(const twin *t) {
    float *got = floats(t->n);
    OK(gpu->sync(gpu));
    gpu->get(gpu, got, t->at, t->n * sizeof *got);
    OK(gpu->sync(gpu));
    return got;
}
/* What the GPU wrote is near what the CPU wrote, by the largest entry. */
static inline void agree(const twin *t, double bound, const char *what) {
    float *got = fetched(t);
    double peak = 0;
    for (size_t i = 0; i < t->n; i++) peak = fabs((double)t->host[i]) > peak ? fabs((double)t->host[i]) : peak;
    for (size_t i = 0; i < t->n; i++) check_near((double)got[i], (double)t->host[i], bound * peak + 1e-30, what);
    drop(got);
}
static inline void same(const int32_t *want, const int32_t *at, size_t n, const char *what) {
    int32_t *got = malloc(n * sizeof *got);
    gpu->get(gpu, got, at, n * sizeof *got);
    OK(gpu->sync(gpu));
    for (size_t i = 0; i < n; i++) if (got[i] != want[i]) fail_msg("%s: element %zu is %d, expected %d", what, i, got[i], want[i]);
    free(got);
}
/* The same ints on the GPU. */
static inline int32_t *put_ints(const int32_t *host, size_t n) {
    int32_t *p;
    OK(gpu->alloc(gpu, &p, n * sizeof *p, "a test"));
    gpu->put(gpu, p, host, n * sizeof *p);
    return p;
}

/* rows x cols weights of a type, on both sides. */
typedef struct pair { bm_tensor host, at; } pair;
static inline void fill_pair(pair *m, uint8_t *at, bm_dtype type, int rows, int cols) {
    const size_t n = (size_t)rows * (size_t)cols, bytes = bm_dtype_bytes(type, n);
    const size_t packed = bm_matrix_bytes(gpu, type, (size_t)rows, (size_t)cols);
    float *x = normals(n, 0.5f);
    void *host = malloc(bytes), *form = malloc(packed);
    bm_narrow(host, type, x, n);
    if (bm_packs(gpu, type)) gpu->pack(form, host, type, (size_t)rows, (size_t)cols);
    else memcpy(form, host, bytes);
    gpu->put(gpu, at, form, packed);
    drop(x);
    free(form);
    *m = (pair){ { host, type, rows, cols }, { at, type, rows, cols } };
}
/* X of them, one behind the other on the GPU, but for the last where they are not even. */
static inline void make_pairs(pair *m, int X, bm_dtype type, int rows, int cols, bool even) {
    const size_t apart = bm_matrix_bytes(gpu, type, (size_t)rows, (size_t)cols), gap = even ? 0 : 256;
    uint8_t *at;
    OK(gpu->alloc(gpu, &at, (size_t)X * apart + gap, "a test"));
    for (int e = 0; e < X; e++) fill_pair(&m[e], at + (size_t)e * apart + (e && e + 1 == X ? gap : 0), type, rows, cols);
}
static inline void end_pairs(pair *m, int X) {
    gpu->release(gpu, (void *)(uintptr_t)m->at.data);
    for (int e = 0; e < X; e++) free((void *)(uintptr_t)m[e].host.data);
}
static inline pair make_pair(bm_dtype type, int rows, int cols) {
    pair m;
    make_pairs(&m, 1, type, rows, cols, true);
    return m;
}
static inline void end_pair(pair *m) { end_pairs(m, 1); }

/* The same weights rounded to bf16. */
static inline bm_tensor rounded(const bm_tensor *w) {
    const size_t n = (size_t)w->rows * (size_t)w->cols;
    float *x = floats(n);
    void *half = malloc(2 * n);
    bm_widen(x, w->type, w->data, n);
    bm_narrow(half, BM_BF16, x, n);
    drop(x);
    return (bm_tensor){ half, BM_BF16, w->rows, w->cols };
}
static inline void end_rounded(bm_tensor *w) { free((void *)(uintptr_t)w->data); }

/* Rounded to bf16: for products of them the scalar CPU in f32 is the reference too. */
static inline void round_all(twin *t) {
    for (size_t i = 0; i < t->n; i++) t->host[i] = bm_bf16_f32(bm_f32_bf16(t->host[i]));
    gpu->put(gpu, t->at, t->host, t->n * sizeof *t->host);
}

/* Runs tests, those that match the first word of the command line if there is one: compute-sanitizer --tool racecheck takes minutes
 * for some.  Without a GPU it says how many are skipped.  Returns what main returns. */
static inline int run_cuda(const char *name, const struct CMUnitTest *test, size_t n, int argc, char **argv) {
    const bm_status s = bm_backend_open_cuda(&gpu, 0);
    if (s == BM_ENOSUPPORT) {
        printf("%s: %zu skipped\n", bm_error(), n);
        return 0;
    }
    assert_int_equal(s, BM_OK);
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    assert_int_equal(bm_backend_open_cpu_level(&cpu, 1, "scalar"), BM_OK);
    assert_int_equal(cpu->reserve(cpu, 2500, 2304), BM_OK);
    assert_int_equal(gpu->reserve(gpu, 1500, 2304), BM_OK);
    assert_int_equal(gpu->reserve_widened(gpu, 1500, ~0u, 1 << 20), BM_OK);
    const int failed = _cmocka_run_group_tests(name, test, n, NULL, NULL);
    gpu->close(gpu);
    cpu->close(cpu);
    return failed;
}
#endif
