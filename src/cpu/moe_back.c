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

/* Through the activation, once dact of these rows is whole. */
static void act_back(void *arg, int begin, int end) {
    const rows *r = arg;
    const bm_op_experts *a = r->a;
    const size_t F = (size_t)a->F, D = (size_t)a->D;
    for (int i = begin; i < end; i++) {
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
static void down_back(rows *r) {
    const bm_op_experts *a = r->a;
    bm_cpu *c = r->c;
    const bm_tensor *down = &a->down[r->e];
    const bm_form form = c->k.form[a->arith][down->type];
    bm_lines dy = lines_of(a->dy, a->D, r->map);
    bm_cpu_outer(c, &(bm_outer){ .M = r->M, .N = a->F, .K = a->D, .form = form, .turned = true, .a = dy, .b = matrix_of(down),
                                 .c = lines_of(grouped(r, a->dact, a->F), a->F, NULL), .then = act_back, .arg = r });
    dy.scale = r->gate;
    if (a->dw_down)
        bm_cpu_outer(c, &(bm_outer){ .M = a->D, .N = a->F, .K = r->M, .form = form, .add = true, .a = dy,
                                     .b = lines_of(grouped(r, a->act, a->F), a->F, NULL), .c = matrix_of(&a->dw_down[r->e]) });
    if (a->db_down) bm_cpu_sum_lines(c, a->db_down + (size_t)r->e * (size_t)a->D, &dy, r->M, a->D);
}

/* Matrices that read x, one or two that are one under the other: w and dw, whose rows have their gradients from
 * column `at` of dhidden on. */
static void in_back(const rows *r, int at, int count, const bm_tensor *const *w, const bm_tensor *const *dw, bool add) {
    const bm_op_experts *a = r->a;
    bm_cpu *c = r->c;
    const bm_form form = c->k.form[a->arith][w[0]->type];
    const bm_lines d = lines_of(grouped(r, a->dhidden, 2 * a->F) + at, 2 * a->F, NULL);
    bm_lines weights = matrix_of(w[0]), gradients = dw[0] ? matrix_of(dw[0]) : d;
    if (count == 2) {
        weights.split = gradients.split = a->F;
        weights.base[1] = w[1]->data;
        gradients.base[1] = dw[1] ? dw[1]->data : NULL;
    }
    if (dw[0])
        bm_cpu_outer(c, &(bm_outer){ .M = count * a->F, .N = a->D, .K = r->M, .form = form, .add = true, .a = d,
                                     .b = lines_of(a->x, a->D, r->map), .c = gradients });
    if (a->dx)
        bm_cpu_outer(c, &(bm_outer){ .M = r->M, .N = a->D, .K = count * a->F, .form = form, .turned = true, .add = add, .a = d,
                                     .b = weights, .c = lines_of(a->dx, a->D, r->map) });
}
static void bias_back(const rows *r, int at, float *db) {
    const bm_op_experts *a = r->a;
    const bm_lines d = lines_of(grouped(r, a->dhidden, 2 * a->F) + at, 2 * a->F, NULL);
    if (db) bm_cpu_sum_lines(r->c, db + (size_t)r->e * (size_t)a->F, &d, r->M, a->F);
}

static void expert_back(rows *r) {
    const bm_op_experts *a = r->a;
    const bm_tensor *w[2] = { a->gate ? &a->gate[r->e] : NULL, &a->up[r->e] };
    const bm_tensor *dw[2] = { a->dw_gate ? &a->dw_gate[r->e] : NULL, a->dw_up ? &a->dw_up[r->e] : NULL };
    for (int i = a->gate ? 0 : 1; i < 2; i++)
        if (!bm_cpu_back_type(r->c, w[i]->type)) return;
    if (!bm_cpu_back_type(r->c, a->down[r->e].type)) return;
    down_back(r);
    if (a->gate && w[0]->type == w[1]->type && !dw[0] == !dw[1]) {
        in_back(r, 0, 2, w, dw, a->add_dx);
    } else {
        if (a->gate) in_back(r, 0, 1, w, dw, a->add_dx);
        in_back(r, a->F, 1, w + 1, dw + 1, a->add_dx || a->gate);
    }
    if (a->gate) bias_back(r, 0, a->db_gate);
    bias_back(r, a->F, a->db_up);
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
