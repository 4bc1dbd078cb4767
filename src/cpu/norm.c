/* norm.c - residual add and norm, rows over threads.  Room: cpu. */
#include "cpu/kernels.h"

typedef struct job { bm_cpu *c; const bm_op_norm *a; } job;

static void part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.norm(j->a, (int)begin, (int)end);
}

void bm_cpu_norm(bm_backend *b, const bm_op_norm *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->M, 1 + 8192 / a->D, part, &j);
}
