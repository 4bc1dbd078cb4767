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
    LINES = 64,                         /* of B that a thread packs at a time */
    PACKED_B = 1 << 21,                 /* floats of B that are packed at once, unless one block of K is more */
    WHOLE_B = 1 << 19,                  /* of one product; if that has more, it goes along K in rounds of ... */
    ROUND_B = 1 << 18,                  /* ... so many; every run of rows reads them again, from a cache */
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
    fail(c, BM_ENOSUPPORT,
         "cpu: backward found quantized weights, expected f32, bf16 or f16; train those and quantize after");
    return false;
}

/* ---- products ----------------------------------------------------------------------------------------- */

/* A product and what of it is packed now: blocks of K from element k0 on, B at b. */
typedef struct part {
    const bm_outer *p;
    int each, steps, all;               /* elements of a step; steps of a block, all blocks of K */
    int k0, blocks;
    int panels;                         /* of B */
    int lines, run;                     /* units of work: lines of B to pack, panels of A to multiply */
    float *b;
} part;
enum { TOGETHER = 32 };                 /* products that share the threads */
typedef struct batch { bm_cpu *c; part part[TOGETHER]; int n, from, to; } batch;   /* from, to: parts at work now */

static int least(int a, int b) { return a < b ? a : b; }
/* Panels lie an odd number of cache lines apart, so that a step of many spreads over the sets. */
static size_t gap_of(int steps, int width) { return (size_t)steps * (size_t)width + 16; }
static size_t block_floats(const bm_kernels *k, const part *t) {
    return (size_t)t->panels * gap_of(t->steps, k->outer_n);
}

static part part_of(const bm_cpu *c, const bm_outer *p) {
    part t = { .p = p, .each = p->form == BM_FORM_BF16 ? 2 : 1, .panels = panels_of(p->N, c->k.outer_n) };
    const int total = panels_of(p->K, t.each);
    t.all = panels_of(total, STEPS);
    t.steps = panels_of(total, t.all);
    t.lines = panels_of(LINES, t.each) * t.each;
    t.run = least(PANELS, panels_of(panels_of(p->M, c->k.outer_m), 4 * c->door.threads));
    return t;
}
static int elements(const part *t) { return least(t->blocks * t->steps * t->each, t->p->K - t->k0); }

typedef int (*units_fn)(const batch *b, const part *t);
static int packs_of(const batch *b, const part *t) {
    (void)b;
    return panels_of(elements(t), t->lines);
}
static int runs_of(const batch *b, const part *t) { return panels_of(t->p->M, t->run * b->c->k.outer_m); }

/* The part that a unit of work belongs to; *unit becomes its number there. */
static const part *part_at(const batch *b, units_fn units, int64_t *unit) {
    const part *t = b->part + b->from;
    for (int n; *unit >= (n = units(b, t)); t++) *unit -= n;
    return t;
}
static void run_units(batch *b, units_fn units, bm_range_fn fn) {
    int64_t n = 0;
    for (int i = b->from; i < b->to; i++) n += units(b, &b->part[i]);
    bm_parallel_each(b->c->pool, n, fn, b);
}

static void pack_lines(const batch *b, const part *t, int begin, int end) {
    const int width = b->c->k.outer_n, block_k = t->steps * t->each;
    for (int k = begin, k1; k < end; k = k1) {
        const int block = k / block_k;
        k1 = least(end, (block + 1) * block_k);
        b->c->k.pack(&t->p->b, &(bm_panels){
            .to = t->b + (size_t)block * block_floats(&b->c->k, t) + (size_t)((k - block * block_k) / t->each * width),
            .gap = gap_of(t->steps, width), .width = width, .tile = width, .form = t->p->form,
            .k0 = t->k0 + k, .k1 = t->k0 + k1, .n = t->p->N });
    }
}
static void pack_part(void *arg, int64_t begin, int64_t end, int thread) {
    const batch *b = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        int64_t unit = i;
        const part *t = part_at(b, packs_of, &unit);
        pack_lines(b, t, (int)unit * t->lines, least(((int)unit + 1) * t->lines, elements(t)));
    }
}

/* Rows [i0, i1) of C, at most PANELS panels, and one block of K. */
static void multiply(const batch *b, const part *t, int block, int i0, int i1, float *packed) {
    const bm_kernels *k = &b->c->k;
    const bm_outer *p = t->p;
    const int tile = k->outer_m, k0 = t->k0 + block * t->steps * t->each, k1 = least(k0 + t->steps * t->each, p->K);
    const int steps = panels_of(k1 - k0, t->each);
    const size_t gap = gap_of(steps, k->outer_a);
    (p->turned ? k->pack_turned : k->pack)(&p->a, &(bm_panels){
        .to = packed, .gap = gap, .width = k->outer_a, .tile = tile, .form = p->form, .k0 = k0, .k1 = k1,
        .at = i0, .n = i1 - i0 });
    const float *panel = t->b + (size_t)block * block_floats(k, t);
    for (int at = 0; at < p->N; at += k->outer_n, panel += gap_of(t->steps, k->outer_n))
        for (int i = i0, n = 0; i < i1; i += tile, n++) {
            float *c[32];
            const int m = least(tile, i1 - i);
            for (int r = 0; r < m; r++) c[r] = (float *)(uintptr_t)bm_line(&p->c, i + r) + at;
            k->outer(packed + (size_t)n * gap, panel, steps, p->form, c, m, least(k->outer_n, p->N - at), p->add || k0);
        }
}
static void multiply_part(void *arg, int64_t begin, int64_t end, int thread) {
    const batch *b = arg;
    float *packed = b->c->panels + (size_t)thread * packed_a(&b->c->k);
    for (int64_t i = begin; i < end; i++) {
        int64_t unit = i;
        const part *t = part_at(b, runs_of, &unit);
        const int rows = t->run * b->c->k.outer_m, i0 = (int)unit * rows, i1 = least(i0 + rows, t->p->M);
        for (int block = 0; block < t->blocks; block++) multiply(b, t, block, i0, i1, packed);
        if (t->p->then && t->k0 + elements(t) == t->p->K) t->p->then(t->p->arg, i0, i1);
    }
}
static void run_batch(batch *b) {
    b->from = 0;
    b->to = b->n;
    run_units(b, packs_of, pack_part);
    for (; b->from < b->n; b->from = b->to) {
        for (b->to = b->from + 1; b->to < b->n && !b->part[b->to].p->late; ) b->to++;
        run_units(b, runs_of, multiply_part);
    }
    b->n = 0;
}

void bm_cpu_outer(bm_cpu *c, const bm_outer *p, int n) {
    const size_t used = packed_a(&c->k) * (size_t)c->door.threads;
    batch b = { .c = c };
    size_t at = used;
    for (int i = 0; i < n && !c->failed; i++) {
        if (p[i].M <= 0 || p[i].N <= 0 || p[i].K <= 0) continue;
        part t = part_of(c, &p[i]);
        const size_t block = block_floats(&c->k, &t);
        const int most = block * (size_t)t.all <= WHOLE_B ? t.all : block < ROUND_B ? (int)(ROUND_B / block) : 1;
        if (b.n == TOGETHER || (b.n && c->panel_floats - at < block * (size_t)most)) {
            run_batch(&b);
            at = used;
        }
        if (c->panel_floats < at + block * (size_t)most) {
            fail(c, BM_EDEVICE, "cpu: work space of the backward is too small; reserve_back() it first");
            return;
        }
        t.b = c->panels + at;
        for (int done = 0; done < t.all; done += t.blocks) {
            if (done) run_batch(&b);
            t.k0 = done * t.steps * t.each;
            t.blocks = least(t.all - done, most);
            b.part[b.n++] = t;
        }
        at += block * (size_t)most;
    }
    if (b.n) run_batch(&b);
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
    bm_outer p[2];
    int n = 0;
    if (a->dx)
        p[n++] = (bm_outer){
            .M = a->M, .N = w->cols, .K = w->rows, .form = form, .turned = true, .add = a->add_dx, .a = dy,
            .b = { .base = { w->data }, .stride = bm_dtype_bytes(w->type, (size_t)w->cols), .type = w->type },
            .c = { .base = { a->dx }, .stride = stride } };
    if (a->dw)
        p[n++] = (bm_outer){
            .M = w->rows, .N = w->cols, .K = a->M, .form = form, .add = true, .a = dy,
            .b = { .base = { a->x }, .stride = stride, .type = BM_F32 },
            .c = { .base = { a->dw }, .stride = sizeof(float) * (size_t)w->cols } };
    bm_cpu_outer(c, p, n);
    if (a->dbias) bm_cpu_sum_lines(c, a->dbias, &dy, a->M, w->rows);
}
