/* gemm_back.c - matrix products of the backward: both sides packed, outputs cut into parts for threads and
 * caches.  Room: cpu.  In: f32 gradients and activations, weights as stored; out: f32.
 *
 * K is cut into blocks that depend on K alone; each block is summed from 0 in registers and added to the
 * output in the order of K, so how the outputs are cut changes no bit of them. */
#include "cpu/kernels.h"
#include <stdlib.h>

enum {
    STEPS = 384,                        /* of a block of K at most: a panel of B that nearly stays in the first cache */
    PANELS = 10,                        /* of A that stay in the second-level cache of a thread */
    PACKED_B = 1 << 20,                 /* floats of B that are packed at once, unless one block of K is more */
};

/* ---- work space --------------------------------------------------------------------------------------- */

static size_t packed_a(const bm_kernels *k) { return (size_t)PANELS * ((size_t)k->outer_a * STEPS + 16); }

static int panels_of(int n, int width) { return (int)(((int64_t)n + width - 1) / width); }

bm_status bm_cpu_reserve_back(bm_backend *b, int M, int rows, int cols) {
    bm_cpu *c = (bm_cpu *)b;
    const int most = rows > cols ? rows : cols;
    const uint64_t row = (uint64_t)panels_of(most, c->k.outer_n) * ((uint64_t)c->k.outer_n * STEPS + 16);
    const uint64_t floats = packed_a(&c->k) * (uint64_t)b->threads + (row > PACKED_B ? row : PACKED_B);
    (void)M;
    if (floats <= c->panel_floats) return BM_OK;
    float *p;
    BM_TRY(bm_alloc(&p, sizeof *p * floats, "work space of the backward"));
    free(c->panels);
    c->panels = p;
    c->panel_floats = floats;
    return BM_OK;
}

static void fail(bm_cpu *c, bm_status s, const char *sentence) {
    if (!c->failed) snprintf(c->sentence, sizeof c->sentence, "%s", sentence);
    c->failed = s;
}
bool bm_cpu_back_type(bm_cpu *c, bm_dtype type) {
    if (type == BM_F32 || type == BM_BF16 || type == BM_F16) return true;
    fail(c, BM_ENOSUPPORT, "cpu: backward found quantized weights, expected f32, bf16 or f16; train those and quantize after");
    return false;
}

/* ---- one product -------------------------------------------------------------------------------------- */

typedef struct outer_job {
    bm_cpu *c;
    const bm_outer *p;
    int steps, each;                    /* of a block of K at most; elements of a step */
    int k0, blocks; bool last;          /* what of K is packed now; nothing is left after it */
    int panels;                         /* of B */
    float *b;
} outer_job;

static int least(int a, int b) { return a < b ? a : b; }
/* Panels lie an odd number of cache lines apart, so that a step of many spreads over the sets. */
static size_t gap_of(int steps, int width) { return (size_t)steps * (size_t)width + 16; }
static float *packed_block(const outer_job *j, int block) {
    return j->b + (size_t)block * (size_t)j->panels * gap_of(j->steps, j->c->k.outer_n);
}

static void pack_b_part(void *arg, int64_t begin, int64_t end, int thread) {
    const outer_job *j = arg;
    const bm_outer *p = j->p;
    const int width = j->c->k.outer_n, block_k = j->steps * j->each;
    (void)thread;
    for (int k = (int)begin, k1; k < end; k = k1) {
        const int block = k / block_k;
        k1 = least((int)end, (block + 1) * block_k);
        j->c->k.pack(&p->b, &(bm_panels){
            .to = packed_block(j, block) + (size_t)(k - block * block_k) / (size_t)j->each * (size_t)width,
            .gap = gap_of(j->steps, width), .width = width, .tile = width, .form = p->form,
            .k0 = j->k0 + k, .k1 = j->k0 + k1, .n = p->N });
    }
}

/* Rows [i0, i1) of C, at most PANELS panels, and one block of K. */
static void multiply(const outer_job *j, int block, int i0, int i1, float *packed) {
    const bm_kernels *k = &j->c->k;
    const bm_outer *p = j->p;
    const int tile = k->outer_m, k0 = j->k0 + block * j->steps * j->each, k1 = least(k0 + j->steps * j->each, p->K);
    const int steps = (k1 - k0 + j->each - 1) / j->each;
    const size_t gap_a = gap_of(steps, k->outer_a), gap_b = gap_of(j->steps, k->outer_n);
    (p->turned ? k->pack_turned : k->pack)(&p->a, &(bm_panels){
        .to = packed, .gap = gap_a, .width = k->outer_a, .tile = tile, .form = p->form, .k0 = k0, .k1 = k1, .at = i0, .n = i1 - i0 });
    for (int panel = 0; panel < j->panels; panel++) {
        const float *b = packed_block(j, block) + (size_t)panel * gap_b;
        const int at = panel * k->outer_n, width = least(k->outer_n, p->N - at);
        for (int i = i0, n = 0; i < i1; i += tile, n++) {
            float *c[32];
            const int m = least(tile, i1 - i);
            for (int r = 0; r < m; r++) c[r] = (float *)(uintptr_t)bm_line(&p->c, i + r) + at;
            k->outer(packed + (size_t)n * gap_a, b, steps, p->form, c, m, width, p->add || k0);
        }
    }
}
static void multiply_part(void *arg, int64_t begin, int64_t end, int thread) {
    const outer_job *j = arg;
    const int tile = j->c->k.outer_m, panels = panels_of((int)(end - begin), tile), runs = panels_of(panels, PANELS);
    float *packed = j->c->panels + (size_t)thread * packed_a(&j->c->k);
    for (int run = 0; run < runs; run++) {
        const int i0 = (int)begin + panels * run / runs * tile, i1 = (int)begin + panels * (run + 1) / runs * tile;
        for (int block = 0; block < j->blocks; block++) multiply(j, block, i0, least(i1, (int)end), packed);
        if (j->last && j->p->then) j->p->then(j->p->arg, i0, least(i1, (int)end));
    }
}

void bm_cpu_outer(bm_cpu *c, const bm_outer *p) {
    if (c->failed || p->M <= 0 || p->N <= 0 || p->K <= 0) return;
    outer_job j = { .c = c, .p = p, .each = p->form == BM_FORM_BF16 ? 2 : 1 };
    const int total = (p->K + j.each - 1) / j.each, all = panels_of(total, STEPS);
    j.steps = panels_of(total, all);
    j.panels = panels_of(p->N, c->k.outer_n);
    const size_t used = packed_a(&c->k) * (size_t)c->door.threads;
    const size_t block = (size_t)j.panels * gap_of(j.steps, c->k.outer_n);
    if (c->panel_floats < used + block) {
        fail(c, BM_EDEVICE, "cpu: work space of the backward is too small; reserve_back() it first");
        return;
    }
    j.b = c->panels + used;
    const size_t most = (c->panel_floats - used) / block;
    for (int done = 0; done < all; done += j.blocks) {
        j.blocks = (size_t)(all - done) < most ? all - done : (int)most;
        j.k0 = done * j.steps * j.each;
        j.last = done + j.blocks == all;
        bm_parallel(c->pool, least(j.blocks * j.steps * j.each, p->K - j.k0), 32, pack_b_part, &j);
        bm_parallel(c->pool, p->M, c->k.outer_m, multiply_part, &j);
    }
}

/* ---- sums of columns ---------------------------------------------------------------------------------- */

typedef struct sum_job { bm_cpu *c; float *y; const bm_lines *l; int lines; } sum_job;

static void sum_part(void *arg, int64_t begin, int64_t end, int thread) {
    const sum_job *j = arg;
    (void)thread;
    j->c->k.sum_lines(j->y, j->l, j->lines, (int)begin, (int)end);
}
void bm_cpu_sum_lines(bm_cpu *c, float *y, const bm_lines *l, int lines, int columns) {
    sum_job j = { c, y, l, lines };
    if (!c->failed) bm_parallel(c->pool, columns, 64, sum_part, &j);
}

/* ---- linear ------------------------------------------------------------------------------------------- */

void bm_cpu_linear_back(bm_backend *b, const bm_op_linear *a) {
    bm_cpu *c = (bm_cpu *)b;
    const bm_tensor *w = a->w;
    if (c->failed || a->M <= 0 || !bm_cpu_back_type(c, w->type)) return;
    const size_t row = sizeof(float) * (size_t)w->rows, stride = sizeof(float) * (size_t)a->ldx;
    const bm_form form = c->k.form[a->arith][w->type];
    const bm_lines dy = { .base = { a->dy }, .stride = row, .type = BM_F32 };
    if (a->dx)
        bm_cpu_outer(c, &(bm_outer){
            .M = a->M, .N = w->cols, .K = w->rows, .form = form, .turned = true, .add = a->add_dx, .a = dy,
            .b = { .base = { w->data }, .stride = bm_dtype_bytes(w->type, (size_t)w->cols), .type = w->type },
            .c = { .base = { a->dx }, .stride = stride } });
    if (a->dw)
        bm_cpu_outer(c, &(bm_outer){
            .M = w->rows, .N = w->cols, .K = a->M, .form = form, .add = true, .a = dy,
            .b = { .base = { a->x }, .stride = stride, .type = BM_F32 },
            .c = { .base = { a->dw }, .stride = sizeof(float) * (size_t)w->cols } });
    if (a->dbias) bm_cpu_sum_lines(c, a->dbias, &dy, a->M, w->rows);
}
