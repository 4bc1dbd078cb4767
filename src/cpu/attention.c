/* attention.c - causal attention with rotary positions and a bounded cache.  Room: cpu.
 * In: rows of q | k | v, which are rotated where they lie.  Out: rows of heads, the cache moved on. */
#include "cpu/kernels.h"
#include <math.h>
#include <string.h>

enum { MOST_PAIRS = 128 };      /* half of the widest head */
typedef struct job { bm_cpu *c; const bm_op_attention *a; float *rows; int heads; double turn; } job;

static const float *state_of(const bm_op_attention *a, int q) {
    return a->slot[q] < 0 ? NULL : a->state + (size_t)a->slot[q] * a->stride;
}

static int sequence_of(const bm_op_attention *a, int row) {
    int lo = 0, hi = a->Q;
    while (hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        if (a->start[mid] <= row) lo = mid;
        else hi = mid;
    }
    while (a->start[lo + 1] <= row) lo++;      /* past sequences without rows */
    return lo;
}

/* Pair (i, i + E/2) of position p turns by p base^(-2i/E): arXiv 2104.09864, equation 34. */
static void rotate_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    const bm_op_attention *a = j->a;
    const int half = a->E / 2;
    float c[MOST_PAIRS], s[MOST_PAIRS];
    (void)thread;
    for (int64_t row = begin; row < end; row++) {
        const int q = sequence_of(a, (int)row), p = bm_attention_count(state_of(a, q)) + (int)row - a->start[q];
        for (int i = 0; i < half; i++) {
            const double angle = p * pow((double)a->rope_base, -2.0 * i / a->E);
            c[i] = (float)cos(angle);
            s[i] = (float)(j->turn * sin(angle));
        }
        for (int h = 0; h < j->heads; h++) {
            float *x = j->rows + ((size_t)row * (size_t)(a->H + 2 * a->G) + (size_t)h) * (size_t)a->E;
            for (int i = 0; i < half; i++) {
                const float u = x[i], v = x[i + half];
                x[i] = u * c[i] - v * s[i];
                x[i + half] = u * s[i] + v * c[i];
            }
        }
    }
}

static void attend_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int row = (int)(i / j->a->H);
        j->c->k.attend(j->a, sequence_of(j->a, row), row, (int)(i % j->a->H));
    }
}

/* Keys and values of a sequence's last rows into the ring. */
static void keep_part(void *arg, int64_t begin, int64_t end, int thread) {
    const bm_op_attention *a = ((const job *)arg)->a;
    const size_t GE = (size_t)a->G * (size_t)a->E, width = (size_t)(a->H + 2 * a->G) * (size_t)a->E;
    (void)thread;
    for (int64_t q = begin; q < end; q++) {
        float *state = (float *)(uintptr_t)state_of(a, (int)q);
        const int n = a->start[q + 1] - a->start[q];
        if (!state || !n) continue;
        const int32_t p0 = bm_attention_count(state), after = p0 + n;
        for (int i = n > a->window ? n - a->window : 0; i < n; i++) {
            float *at = state + BM_ATTENTION_HEAD + (size_t)((p0 + i) % a->window) * GE;
            const float *k = a->qkv + (size_t)(a->start[q] + i) * width + (size_t)a->H * (size_t)a->E;
            memcpy(at, k, GE * sizeof *at);
            memcpy(at + (size_t)a->window * GE, k + GE, GE * sizeof *at);
        }
        memcpy(state, &after, sizeof after);
    }
}

void bm_cpu_attention(bm_backend *b, const bm_op_attention *a) {
    job j = { .c = (bm_cpu *)b, .a = a, .rows = a->qkv, .heads = a->H + a->G, .turn = 1 };
    const int M = a->start[a->Q];
    if (j.c->failed || !M) return;
    bm_parallel(j.c->pool, M, 16, rotate_part, &j);
    bm_parallel(j.c->pool, (int64_t)M * a->H, 8, attend_part, &j);
    bm_parallel(j.c->pool, a->Q, 1, keep_part, &j);
}

static void back_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) j->c->k.attend_back(j->a, (int)(i / j->a->G), (int)(i % j->a->G));
}

void bm_cpu_attention_back(bm_backend *b, const bm_op_attention *a) {
    job j = { .c = (bm_cpu *)b, .a = a, .rows = a->dqkv, .heads = a->H + a->G, .turn = -1 };
    const int M = a->start[a->Q];
    if (j.c->failed || !M) return;
    bm_parallel(j.c->pool, (int64_t)a->Q * a->G, 1, back_part, &j);
    bm_parallel(j.c->pool, M, 16, rotate_part, &j);
}
