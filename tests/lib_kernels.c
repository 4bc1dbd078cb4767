/* tests/lib_kernels.c - what the tests of the CPU backend share: levels, guarded arrays, matrices, references. */
#include "lib_kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const levels[LEVELS] = { "scalar", "avx2", "avx512", "neon" };
static uint64_t counter;

bool has_level(int level, bm_kernels *k) {
    bm_kernels own;
    if (!k) k = &own;
    return bm_kernels_choose(k, levels[level]) == BM_OK && !strcmp(k->level, levels[level]);
}
bm_backend *open_level(int level, int threads) {
    bm_backend *b = NULL;
    const bm_status s = bm_backend_open_cpu_level(&b, threads, levels[level]);
    assert_true(s == BM_OK || s == BM_ENOSUPPORT);
    if (b) assert_int_equal(b->reserve(b, MAX_M, 1024), BM_OK);
    return b;
}
void done(bm_backend *b) {
    assert_int_equal(b->sync(b), BM_OK);
    b->close(b);
}

int one_in(int n) { return getenv("BM_EMULATOR") ? n : 1; }
int least_threads(void) { return getenv("BM_EMULATOR") ? 3 : 1; }

enum { GUARD = 16 };

float *floats(size_t n) {
    float *p = calloc(n + 2 * GUARD, sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < GUARD; i++) p[i] = p[GUARD + n + i] = 12345.0f;
    return p + GUARD;
}
void check_guards(const float *p, size_t n) {
    for (size_t i = 0; i < GUARD; i++)
        if (p[-1 - (int)i] != 12345.0f || p[n + i] != 12345.0f) fail_msg("a guard word was overwritten");
}
void drop(float *p) { free(p - GUARD); }
float *normals(size_t n, float scale) {
    float *p = floats(n);
    for (size_t i = 0; i < n; i++) p[i] = scale * (float)bm_rng_normal(7, 1, counter++);
    return p;
}
float *copy_of(const float *p, size_t n) {
    float *q = floats(n);
    memcpy(q, p, n * sizeof *q);
    return q;
}
void check_equal(const float *a, const float *b, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a))
            fail_msg("%s: element %zu is %.9g, expected the bits of %.9g", what, i, a[i], b[i]);
}
void check_near(double found, double expected, double bound, const char *what) {
    if (!(fabs(found - expected) <= bound))
        fail_msg("%s: found %.9g, expected %.9g within %.3g", what, found, expected, bound);
}

matrix make_matrix(bm_dtype type, int rows, int cols) {
    const size_t n = (size_t)rows * (size_t)cols, bytes = bm_dtype_bytes(type, n);
    matrix m = { .base = malloc(bytes + 1 + 64), .wide = normals(n, 1.0f / sqrtf((float)cols)) };
    assert_non_null(m.base);
    memset(m.base + 1 + bytes, 0xff, 64);
    bm_narrow(m.base + 1, type, m.wide, n);
    bm_widen(m.wide, type, m.base + 1, n);
    m.t = (bm_tensor){ m.base + 1, type, rows, cols };
    return m;
}
void drop_matrix(matrix *m) {
    free(m->base);
    drop(m->wide);
}

double gelu(double x) { return 0.5 * x * erfc(-x / sqrt(2.0)); }
double silu(double x) { return x / (1 + exp(-x)); }
double softplus(double x) { return x > 20 ? x : log1p(exp(x)); }

void route_rows(bm_backend *b, routing *r, const float *logits, int M, int X, bm_routing rule) {
    r->op = (bm_op_route){ .M = M, .X = X, .k = 1, .rule = rule, .logits = logits, .expert = r->expert, .order = r->order,
                           .first = r->first, .gate = r->gate };
    b->route(b, &r->op);
}
