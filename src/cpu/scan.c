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
