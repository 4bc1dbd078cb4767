/* optim.c - AdamW and what else goes over all parameters, elements over threads.  Room: cpu. */
#include "cpu/kernels.h"

enum { STEP = 4096, PARTS = 1024 };     /* elements, whole cache lines of any type; parts of a sum, at most */
typedef struct job {
    bm_cpu *c; const bm_op_adamw *a;
    float *y; const float *x; float p, q;
    void *dst; bm_dtype type;
} job;

static void adamw_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.adamw(j->a, (size_t)begin, (size_t)end);
}
void bm_cpu_adamw(bm_backend *b, const bm_op_adamw *a) {
    job j = { .c = (bm_cpu *)b, .a = a };
    if (!j.c->failed) bm_parallel(j.c->pool, (int64_t)a->n, STEP, adamw_part, &j);
}

/* Parts of a length that only n decides, each summed by itself, added up in order. */
typedef struct sum_job { bm_cpu *c; const float *x; size_t n, part; double sum[PARTS]; } sum_job;

static void sum_part(void *arg, int64_t begin, int64_t end, int thread) {
    sum_job *j = arg;
    (void)thread;
    for (size_t i = (size_t)begin; i < (size_t)end; i++) {
        const size_t at = i * j->part, left = j->n - at;
        j->sum[i] = j->c->k.sumsq(j->x + at, left < j->part ? left : j->part);
    }
}
void bm_cpu_sumsq(bm_backend *b, double *out, const float *x, size_t n) {
    sum_job j = { .c = (bm_cpu *)b, .x = x, .n = n, .part = bm_round_up(n / PARTS + 1, 4 * STEP) };
    const size_t parts = (n + j.part - 1) / j.part;
    double sum = 0;
    if (j.c->failed) return;
    bm_parallel(j.c->pool, (int64_t)parts, 1, sum_part, &j);
    for (size_t i = 0; i < parts; i++) sum += j.sum[i];
    *out = sum;
}

static void blend_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.blend(j->y + begin, j->p, j->x + begin, j->q, (size_t)(end - begin));
}
void bm_cpu_blend(bm_backend *b, float *y, float p, const float *x, float q, size_t n) {
    job j = { .c = (bm_cpu *)b, .y = y, .p = p, .x = x, .q = q };
    if (!j.c->failed) bm_parallel(j.c->pool, (int64_t)n, STEP, blend_part, &j);
}

static void narrow_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    uint8_t *dst = (uint8_t *)j->dst + bm_dtype_bytes(j->type, (size_t)begin);
    if (j->type == BM_BF16) j->c->k.narrow_bf16((uint16_t *)(void *)dst, j->x + begin, (size_t)(end - begin));
    else bm_narrow(dst, j->type, j->x + begin, (size_t)(end - begin));
}
void bm_cpu_narrow(bm_backend *b, void *dst, bm_dtype type, const float *x, size_t n) {
    job j = { .c = (bm_cpu *)b, .dst = dst, .type = type, .x = x };
    if (!j.c->failed) bm_parallel(j.c->pool, (int64_t)n, STEP, narrow_part, &j);
}

static void decay_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.decay(j->y + begin, j->x + begin, (size_t)(end - begin));
}
void bm_cpu_decay(bm_backend *b, float *A, const float *A_log, size_t n) {
    job j = { .c = (bm_cpu *)b, .y = A, .x = A_log };
    if (!j.c->failed) bm_parallel(j.c->pool, (int64_t)n, STEP, decay_part, &j);
}
