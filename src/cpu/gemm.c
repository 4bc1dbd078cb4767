/* gemm.c - matrix products: activations converted once, outputs cut into parts for threads and
 * caches.  Room: cpu.  In: weights as mapped, f32 activations; out: f32.
 *
 * K is never cut, so how the outputs are cut changes no bit of them. */
#include "cpu/kernels.h"

enum { PANEL_BYTES = 640 << 10 };       /* converted activations that stay in the second-level cache */
enum { UNIT = 1 << 15 };                /* multiplications that are worth waking a thread for */

typedef struct convert_job {
    bm_cpu *c;
    bm_form form;
    const float *x; size_t ldx;
    const int32_t *map;
    uint8_t *dst; size_t stride;
    int K;
} convert_job;

static void convert_part(void *arg, int64_t begin, int64_t end, int thread) {
    const convert_job *j = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const size_t r = (size_t)(j->map ? j->map[i] : i);
        j->c->k.convert(j->dst + (size_t)i * j->stride, j->form, j->x + r * j->ldx, j->K);
    }
}

bool bm_cpu_scratch(bm_cpu *c, size_t bytes) {
    if (bytes <= c->scratch_bytes) return true;
    if (!c->failed)
        snprintf(c->sentence, sizeof c->sentence, "cpu: work space found for %zu bytes, expected %zu; reserve() it first",
                 c->scratch_bytes, bytes);
    c->failed = BM_EDEVICE;
    return false;
}

bool bm_cpu_convert(bm_cpu *c, bm_gemm *g, bm_form form, const float *x, size_t ldx, const int32_t *map) {
    if (form == BM_FORM_F32 && !map) {
        g->x = (const uint8_t *)x;
        g->x_stride = sizeof *x * ldx;
        return true;
    }
    const size_t stride = bm_form_bytes(form, (size_t)g->K);
    if (!bm_cpu_scratch(c, (size_t)g->M * stride)) return false;
    convert_job j = { c, form, x, ldx, map, c->scratch, stride, g->K };
    bm_parallel(c->pool, g->M, 1 + 8192 / g->K, convert_part, &j);
    g->x = c->scratch;
    g->x_stride = stride;
    return true;
}

typedef struct gemm_job { const bm_gemm *g; bm_gemm_fn fn; bool by_rows; int panel; } gemm_job;

static void gemm_part(void *arg, int64_t begin, int64_t end, int thread) {
    const gemm_job *j = arg;
    const bm_gemm *g = j->g;
    const int i0 = j->by_rows ? (int)begin : 0, i1 = j->by_rows ? (int)end : g->M;
    const int j0 = j->by_rows ? 0 : (int)begin, j1 = j->by_rows ? g->N : (int)end;
    (void)thread;
    for (int i = i0; i < i1; i += j->panel) j->fn(g, i, i + j->panel < i1 ? i + j->panel : i1, j0, j1);
}

void bm_cpu_gemm(bm_cpu *c, const bm_gemm *g, bm_gemm_fn fn) {
    const int64_t rows = g->M / 12, cols = g->N / 8;
    gemm_job j = { g, fn, rows > cols, 12 };
    while (j.panel < g->M && (size_t)(j.panel + 12) * g->x_stride <= PANEL_BYTES) j.panel += 12;
    const int64_t one = (int64_t)g->K * (j.by_rows ? g->N : g->M);      /* multiplications per row or column */
    const int64_t step = j.by_rows ? 12 : 8;
    bm_parallel(c->pool, j.by_rows ? g->M : g->N, (UNIT / one / step + 1) * step, gemm_part, &j);
}

void bm_cpu_linear(bm_backend *b, const bm_op_linear *a) {
    bm_cpu *c = (bm_cpu *)b;
    const bm_tensor *w = a->w;
    if (c->failed || a->M <= 0) return;
    bm_gemm g = {
        .w = w->data, .w_stride = bm_dtype_bytes(w->type, (size_t)w->cols),
        .M = a->M, .N = w->rows, .K = w->cols,
        .bias = a->bias, .y = a->y, .ldy = (size_t)w->rows, .accumulate = a->accumulate,
    };
    if (!bm_cpu_convert(c, &g, c->k.form[a->arith][w->type], a->x, (size_t)a->ldx, NULL)) return;
    bm_cpu_gemm(c, &g, c->k.gemm[a->arith][w->type]);
}
