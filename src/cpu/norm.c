/* norm.c - residual add and norm, rows over threads, and backward: gradients of rows, then of columns.  Room: cpu. */
#include "cpu/kernels.h"

enum { COLUMNS = 64 };      /* whole cache lines for each thread */
typedef struct job { bm_cpu *c; const bm_op_norm *a; float *stat; } job;

static void part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.norm(j->a, (int)begin, (int)end);
}

void bm_cpu_norm(bm_backend *b, const bm_op_norm *a) {
    job j = { (bm_cpu *)b, a, NULL };
    if (!j.c->failed) bm_parallel(j.c->pool, a->M, 1 + 8192 / a->D, part, &j);
}

static void rows_back(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.norm_back(j->a, j->stat, (int)begin, (int)end);
}
static void columns_back(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.norm_params(j->a, j->stat, (int)begin, (int)end);
}

void bm_cpu_norm_back(bm_backend *b, const bm_op_norm *a) {
    bm_cpu *c = (bm_cpu *)b;
    if (c->failed || !bm_cpu_scratch(c, 2 * sizeof(float) * (size_t)a->M)) return;
    job j = { c, a, (float *)(void *)c->scratch };
    bm_parallel(c->pool, a->M, 1 + 8192 / a->D, rows_back, &j);
    bm_parallel(c->pool, a->D, COLUMNS, columns_back, &j);
}
