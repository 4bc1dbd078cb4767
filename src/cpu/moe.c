/* moe.c - experts.  Room: cpu.
 *
 * An expert's rows are gathered while they are converted, go through the same products as any
 * linear layer, and are scattered as they are written; all threads share each expert. */
#include "cpu/kernels.h"
#include <string.h>

typedef struct act_job { bm_cpu *c; const float *hidden; float *act; size_t ldact; int F; bool gated; bm_activation f; } act_job;

static void act_part(void *arg, int64_t begin, int64_t end, int thread) {
    const act_job *j = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const float *h = j->hidden + (size_t)i * 2 * (size_t)j->F;
        j->c->k.activate(j->act + (size_t)i * j->ldact, j->gated ? h : NULL, h + j->F, j->F, j->f);
    }
}

/* Expert e on rows [row, row + M) of the grouped order; map says where they are in x and y. */
static void expert(bm_cpu *c, const bm_op_experts *a, int e, int row, int M, const int32_t *map, const float *scale) {
    const size_t F = (size_t)a->F, D = (size_t)a->D;
    const bm_form *form = c->k.form[a->arith];
    const bm_gemm_fn *gemm = c->k.gemm[a->arith];
    float *hidden = a->hidden + (size_t)row * 2 * F;
    const bm_tensor *w[2] = { a->gate ? &a->gate[e] : NULL, &a->up[e] };
    const float *bias[2] = { a->gate_bias, a->up_bias };
    bm_gemm g = { .M = M, .N = a->F, .K = a->D, .ldy = 2 * F };
    for (int i = 0; i < 2; i++) {
        if (!w[i]) continue;
        const bool converted = i == 1 && w[0] && form[w[0]->type] == form[w[1]->type];
        if (!converted && !bm_cpu_convert(c, &g, form[w[i]->type], a->x, D, map)) return;
        g.w = w[i]->data;
        g.w_stride = bm_dtype_bytes(w[i]->type, D);
        g.bias = bias[i] ? bias[i] + (size_t)e * F : NULL;
        g.y = hidden + (size_t)i * F;
        bm_cpu_gemm(c, &g, gemm[w[i]->type]);
    }
    float *act = a->act ? a->act + (size_t)row * F : hidden;
    const size_t ldact = a->act ? F : 2 * F;
    act_job j = { c, hidden, act, ldact, a->F, a->gate != NULL, a->activation };
    bm_parallel(c->pool, M, 1 + 4096 / a->F, act_part, &j);

    const bm_tensor *down = &a->down[e];
    g = (bm_gemm){
        .w = down->data, .w_stride = bm_dtype_bytes(down->type, F), .M = M, .N = a->D, .K = a->F,
        .bias = a->down_bias ? a->down_bias + (size_t)e * D : NULL, .scale = scale, .map = map,
        .y = a->y, .ldy = D, .accumulate = a->accumulate,
    };
    if (bm_cpu_convert(c, &g, form[down->type], act, ldact, NULL)) bm_cpu_gemm(c, &g, gemm[down->type]);
}

void bm_cpu_experts(bm_backend *b, const bm_op_experts *a) {
    bm_cpu *c = (bm_cpu *)b;
    const bm_op_route *r = a->route;
    if (!r && a->M > 0 && !c->failed) expert(c, a, 0, 0, a->M, NULL, NULL);
    if (r && r->first[a->X] < a->M && !a->accumulate && !c->failed)    /* rows in no group */
        memset(a->y, 0, sizeof *a->y * (size_t)a->M * (size_t)a->D);
    for (int e = 0; r && e < a->X; e++) {
        const int M = r->first[e + 1] - r->first[e];
        if (M > 0 && !c->failed) expert(c, a, e, r->first[e], M, r->order + r->first[e], r->gate);
    }
}
