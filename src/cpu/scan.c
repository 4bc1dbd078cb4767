/* scan.c - the selective state-space recurrence, channels over threads.  Room: cpu.
 * Time and states of a channel stay in order on one thread. */
#include "cpu/kernels.h"

enum { CHANNELS = 64 };     /* the kernels' block of channels */
typedef struct job { bm_cpu *c; const bm_op_scan *a; } job;

static void part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.scan(j->a, (int)begin, (int)end);
}

void bm_cpu_scan(bm_backend *b, const bm_op_scan *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->I, CHANNELS, part, &j);
}

/* ---- backward ------------------------------------------------------------------------- */

/* Cut by shape alone: blocks of channels, which leave their sums of dB and dC, times groups of sequences, which
 * leave theirs of parameters.  Then both are added up in order. */
enum { BLOCK = 64, GROUPS = 16, ROWS = 64 };
typedef struct back_job {
    bm_cpu *c; const bm_op_scan *a;
    int M, blocks, groups;
    float *bc, *sums, *work;            /* (blocks,M,2N) (groups,N+2,I) (threads,...) */
} back_job;

size_t bm_cpu_scan_back_floats(bm_backend *b, int M, int I, int N) {
    const size_t blocks = ((size_t)I + BLOCK - 1) / BLOCK, params = ((size_t)N + 2) * (size_t)I;
    return blocks * (size_t)M * 2 * (size_t)N + GROUPS * params + (size_t)b->threads * bm_scan_work_floats(N);
}

/* Sequences of a group: those whose first row lies in its share of all rows. */
static int group_start(const back_job *j, int g) {
    int q = 0;
    while (q < j->a->Q && (int64_t)j->a->start[q] * j->groups < (int64_t)g * j->M) q++;
    return q;
}
static void back_part(void *arg, int64_t begin, int64_t end, int thread) {
    const back_job *j = arg;
    const bm_op_scan *a = j->a;
    for (int64_t i = begin; i < end; i++) {
        const int block = (int)(i % j->blocks), g = (int)(i / j->blocks), c0 = block * BLOCK;
        j->c->k.scan_back(&(bm_scan_part){
            .a = a, .q0 = group_start(j, g), .q1 = g + 1 < j->groups ? group_start(j, g + 1) : a->Q,
            .c0 = c0, .c1 = c0 + BLOCK < a->I ? c0 + BLOCK : a->I,
            .bc = j->bc + (size_t)block * (size_t)j->M * 2 * (size_t)a->N,
            .sums = j->sums + (size_t)g * ((size_t)a->N + 2) * (size_t)a->I,
            .work = j->work + (size_t)thread * bm_scan_work_floats(a->N),
        });
    }
}
static void add_rows(void *arg, int64_t begin, int64_t end, int thread) {
    const back_job *j = arg;
    const bm_op_scan *a = j->a;
    const size_t N = (size_t)a->N, block = (size_t)j->M * 2 * N;
    (void)thread;
    for (size_t m = (size_t)begin; m < (size_t)end; m++)
        for (size_t k = 0; k < 2 * N; k++) {
            float s = 0;
            for (size_t i = 0; i < (size_t)j->blocks; i++) s += j->bc[i * block + m * 2 * N + k];
            *(k < N ? a->dB + m * (size_t)a->ldbc + k : a->dC + m * (size_t)a->ldbc + k - N) = s;
        }
}
static void add_params(void *arg, int64_t begin, int64_t end, int thread) {
    const back_job *j = arg;
    const bm_op_scan *a = j->a;
    const size_t N = (size_t)a->N, I = (size_t)a->I;
    (void)thread;
    for (size_t k = 0; k < N + 2; k++) {
        float *to = k < N ? a->dA_log + k * I : k == N ? a->dD : a->ddt_bias;
        for (size_t i = (size_t)begin; i < (size_t)end; i++) {
            float s = 0;
            for (size_t g = 0; g < (size_t)j->groups; g++) s += j->sums[(g * (N + 2) + k) * I + i];
            to[i] += s;
        }
    }
}

void bm_cpu_scan_back(bm_backend *b, const bm_op_scan *a) {
    back_job j = { .c = (bm_cpu *)b, .a = a, .M = a->start[a->Q], .blocks = (a->I + BLOCK - 1) / BLOCK,
                   .groups = a->Q < GROUPS ? a->Q : GROUPS };
    if (j.c->failed || !j.M) return;
    j.work = a->work;
    j.sums = j.work + (size_t)b->threads * bm_scan_work_floats(a->N);
    j.bc = j.sums + GROUPS * ((size_t)a->N + 2) * (size_t)a->I;
    bm_parallel(j.c->pool, (int64_t)j.blocks * j.groups, 1, back_part, &j);
    bm_parallel(j.c->pool, j.M, ROWS, add_rows, &j);
    bm_parallel(j.c->pool, a->I, BLOCK, add_params, &j);
}
