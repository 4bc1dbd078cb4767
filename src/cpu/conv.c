/* conv.c - causal depthwise convolution, channels over threads.  Room: cpu. */
#include "cpu/kernels.h"

enum { CHANNELS = 64 };     /* whole cache lines for each thread */
typedef struct job { bm_cpu *c; const bm_op_conv *a; } job;

static void part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.conv(j->a, (int)begin, (int)end);
}

void bm_cpu_conv(bm_backend *b, const bm_op_conv *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->I, CHANNELS, part, &j);
}

static void back_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.conv_back(j->a, (int)begin, (int)end);
}

void bm_cpu_conv_back(bm_backend *b, const bm_op_conv *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->I, CHANNELS, back_part, &j);
}
