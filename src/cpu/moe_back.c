/* moe_back.c - the backward of experts.  Room: cpu.
 *
 * An expert's rows lie together in hidden and act, as the forward left them, and anywhere in x and dy: products
 * gather them as they pack and scatter them as they add.  All threads share each expert.  With g the gate of a
 * row, h = act(gate) * up and d = W_down^T dy:
 *   dgate of the route = h . d + dy . down_bias,   dW_down += (g dy)^T h,   dh = g d. */
#include "cpu/kernels.h"
#include <string.h>

typedef struct rows {                   /* of one expert */
    bm_cpu *c;
    const bm_op_experts *a;
    int e, row, M;                      /* grouped rows [row, row + M) */
    const int32_t *map; const float *gate;      /* where they are in x and dy, and their gates there; NULL: as they are, 1 */
} rows;

static bm_lines lines_of(const float *p, int columns, const int32_t *map) {
    return (bm_lines){ .base = { p }, .stride = sizeof *p * (size_t)columns, .type = BM_F32, .map = map };
}
static bm_lines matrix_of(const bm_tensor *t) {
    return (bm_lines){ .base = { t->data }, .stride = bm_dtype_bytes(t->type, (size_t)t->cols), .type = t->type };
}
static float *grouped(const rows *r, float *p, int columns) { return p + (size_t)r->row * (size_t)columns; }

static void act_part(void *arg, int64_t begin, int64_t end, int thread) {
    const rows *r = arg;
    const bm_op_experts *a = r->a;
    const size_t F = (size_t)a->F, D = (size_t)a->D;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const size_t at = r->map ? (size_t)r->map[i] : (size_t)i;
        const float *pre = grouped(r, a->hidden, 2 * a->F) + (size_t)i * 2 * F, *h = grouped(r, a->act, a->F) + (size_t)i * F;
        float *d = grouped(r, a->dhidden, 2 * a->F) + (size_t)i * 2 * F;
        float s = r->c->k.activate_back(a->gate ? pre : NULL, pre + F, h, grouped(r, a->dact, a->F) + (size_t)i * F,
                                        r->gate ? r->gate[at] : 1, d, d + F, a->F, a->activation);
        if (a->down_bias) s += r->c->k.dot(a->dy + at * D, a->down_bias + (size_t)r->e * D, a->D);
        if (a->dgate && r->gate) a->dgate[at] = s;
    }
}

/* Through down and the activation: dact, dhidden, dgate, and the gradients of down. */
static void down_back(const rows *r) {
    const bm_op_experts *a = r->a;
    bm_cpu *c = r->c;
    const bm_tensor *down = &a->down[r->e];
    const bm_form form = c->k.form[a->arith][down->type];
    bm_lines dy = lines_of(a->dy, a->D, r->map);
    bm_cpu_outer(c, &(bm_outer){ .M = r->M, .N = a->F, .K = a->D, .form = form, .turned = true, .a = dy, .b = matrix_of(down),
                                 .c = lines_of(grouped(r, a->dact, a->F), a->F, NULL) });
    if (c->failed) return;
    bm_parallel(c->pool, r->M, 1 + 4096 / a->F, act_part, (void *)(uintptr_t)r);
    dy.scale = r->gate;
    if (a->dw_down)
        bm_cpu_outer(c, &(bm_outer){ .M = a->D, .N = a->F, .K = r->M, .form = form, .add = true, .a = dy,
                                     .b = lines_of(grouped(r, a->act, a->F), a->F, NULL), .c = matrix_of(&a->dw_down[r->e]) });
    if (a->db_down) bm_cpu_sum_lines(c, a->db_down + (size_t)r->e * (size_t)a->D, &dy, r->M, a->D);
}

/* One of the matrices that read x, whose gradients start at column `at` of dhidden. */
static void in_back(const rows *r, int at, const bm_tensor *w, const bm_tensor *dw, float *db, bool add) {
    const bm_op_experts *a = r->a;
    bm_cpu *c = r->c;
    const bm_form form = c->k.form[a->arith][w->type];
    const bm_lines d = lines_of(grouped(r, a->dhidden, 2 * a->F) + at, 2 * a->F, NULL);
    if (dw)
        bm_cpu_outer(c, &(bm_outer){ .M = a->F, .N = a->D, .K = r->M, .form = form, .add = true, .a = d,
                                     .b = lines_of(a->x, a->D, r->map), .c = matrix_of(&dw[r->e]) });
    if (db) bm_cpu_sum_lines(c, db + (size_t)r->e * (size_t)a->F, &d, r->M, a->F);
    if (a->dx)
        bm_cpu_outer(c, &(bm_outer){ .M = r->M, .N = a->D, .K = a->F, .form = form, .turned = true, .add = add, .a = d,
                                     .b = matrix_of(w), .c = lines_of(a->dx, a->D, r->map) });
}

static void expert_back(const rows *r) {
    const bm_op_experts *a = r->a;
    if (!bm_cpu_back_type(r->c, a->up[r->e].type) || !bm_cpu_back_type(r->c, a->down[r->e].type)
        || (a->gate && !bm_cpu_back_type(r->c, a->gate[r->e].type))) return;
    down_back(r);
    if (a->gate) in_back(r, 0, &a->gate[r->e], a->dw_gate, a->db_gate, a->add_dx);
    in_back(r, a->F, &a->up[r->e], a->dw_up, a->db_up, a->add_dx || a->gate);
}

void bm_cpu_experts_back(bm_backend *b, const bm_op_experts *a) {
    bm_cpu *c = (bm_cpu *)b;
    const bm_op_route *r = a->route;
    if (c->failed || a->M <= 0) return;
    if (!r) {
        expert_back(&(rows){ c, a, 0, 0, a->M, NULL, NULL });
        return;
    }
    if (r->first[a->X] < a->M) {        /* rows in no group */
        if (a->dx && !a->add_dx) memset(a->dx, 0, sizeof *a->dx * (size_t)a->M * (size_t)a->D);
        if (a->dgate) memset(a->dgate, 0, sizeof *a->dgate * (size_t)a->M);
    }
    for (int e = 0; e < a->X; e++) {
        const int M = r->first[e + 1] - r->first[e];
        if (M > 0 && !c->failed) expert_back(&(rows){ c, a, e, r->first[e], M, r->order + r->first[e], r->gate });
    }
}
