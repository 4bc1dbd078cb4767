/* loss.c - tokens in, loss or the next token out: embedding rows, -log softmax and their gradients, the largest logit.
 * Room: cpu. */
#include "cpu/kernels.h"
#include <math.h>

typedef struct job { bm_cpu *c; const void *a; } job;

static void embed_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    const bm_op_embed *a = j->a;
    const bm_tensor *t = a->table;
    const size_t D = (size_t)t->cols, bytes = bm_dtype_bytes(t->type, D);
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const size_t row = a->token[i] < 0 ? 0 : (size_t)a->token[i];
        j->c->k.widen(a->y + (size_t)i * D, t->type, (const uint8_t *)t->data + row * bytes, t->cols);
    }
}

void bm_cpu_embed(bm_backend *b, const bm_op_embed *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->M, 1 + 16384 / a->table->cols, embed_part, &j);
}

static void loss_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.loss(j->a, (int)begin, (int)end);
}

void bm_cpu_loss(bm_backend *b, const bm_op_loss *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->M, 1, loss_part, &j);
}

static void best_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    const bm_op_best *a = j->a;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const float *l = a->logits + (size_t)i * (size_t)a->ld;
        float top = -INFINITY;
        bm_token best = -1;
        for (int v = 0; v < a->V; v++)
            if (l[v] > top) top = l[v], best = v;
        a->best[i] = best;
        if (a->again) a->again[i] = best;
    }
}

void bm_cpu_best(bm_backend *b, const bm_op_best *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->M, 1, best_part, &j);
}

enum { COLUMNS = 64 };      /* whole cache lines for each thread, which adds all rows in order */

static void embed_back_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    j->c->k.embed_back(j->a, (int)begin, (int)end);
}

void bm_cpu_embed_back(bm_backend *b, const bm_op_embed *a) {
    job j = { (bm_cpu *)b, a };
    if (!j.c->failed) bm_parallel(j.c->pool, a->table->cols, COLUMNS, embed_back_part, &j);
}
