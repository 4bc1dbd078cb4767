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
    int e, row, M, work;                /* grouped rows [row, row + M), from row `work` on in dhidden and dact */
    const int32_t *map; const float *gate;      /* where they are in x and dy, their gates there; NULL: as is, 1 */
} rows;
/* Experts whose products share the threads, and their rows: dhidden and dact of so many stay in a cache. */
enum { GROUP = 8, GROUP_ROWS = 1024, PRODUCTS = 6 * GROUP };

static bm_lines lines_of(const float *p, int columns, const int32_t *map) {
    return (bm_lines){ .base = { p }, .stride = sizeof *p * (size_t)columns, .type = BM_F32, .map = map };
}
static bm_lines matrix_of(const bm_tensor *t) {
    return (bm_lines){ .base = { t->data }, .stride = bm_dtype_bytes(t->type, (size_t)t->cols), .type = t->type };
}
static float *dhidden(const rows *r) { return r->a->dhidden + (size_t)r->work * 2 * (size_t)r->a->F; }
static float *dact(const rows *r) { return r->a->dact + (size_t)r->work * (size_t)r->a->F; }

/* Through the activation, once dact of these rows is whole. */
static void act_back(void *arg, int begin, int end) {
    const rows *r = arg;
    const bm_op_experts *a = r->a;
    const size_t F = (size_t)a->F, D = (size_t)a->D;
    for (int i = begin; i < end; i++) {
        const size_t at = r->map ? (size_t)r->map[i] : (size_t)i;
        const float *pre = a->hidden + (size_t)(r->row + i) * 2 * F;
        float *d = dhidden(r) + (size_t)i * 2 * F;
        const float g = r->gate ? r->gate[at] : 1;
        float s = r->c->k.activate_back(a->gate ? pre : NULL, pre + F, dact(r) + (size_t)i * F, g, d, d + F, a->F,
                                        a->activation);
        if (a->down_bias) s += r->c->k.dot(a->dy + at * D, a->down_bias + (size_t)r->e * D, a->D);
        if (a->dgate && r->gate) a->dgate[at] = s;
    }
}
/* d act = dy W_down. */
static bm_outer act_product(rows *r) {
    const bm_op_experts *a = r->a;
    const bm_tensor *down = &a->down[r->e];
    return (bm_outer){ .M = r->M, .N = a->F, .K = a->D, .form = r->c->k.form[a->arith][down->type], .turned = true,
                       .a = lines_of(a->dy, a->D, r->map), .b = matrix_of(down), .c = lines_of(dact(r), a->F, NULL),
                       .then = act_back, .arg = r };
}
/* dW_down += (g dy)^T act. */
static bm_outer down_product(const rows *r) {
    const bm_op_experts *a = r->a;
    bm_lines dy = lines_of(a->dy, a->D, r->map);
    dy.scale = r->gate;
    return (bm_outer){ .M = a->D, .N = a->F, .K = r->M, .form = r->c->k.form[a->arith][a->down[r->e].type], .add = true,
                       .a = dy, .b = lines_of(a->act + (size_t)r->row * (size_t)a->F, a->F, NULL),
                       .c = matrix_of(&a->dw_down[r->e]) };
}
/* Of matrices that read x, one or two that are one under the other: dx and dW, whose gradients are columns of
 * dhidden from `at` on.  Returns how many products that are. */
static int in_products(const rows *r, int at, int count, const bm_tensor *const *w, const bm_tensor *const *dw,
                       bool add, bm_outer *p) {
    const bm_op_experts *a = r->a;
    const bm_form form = r->c->k.form[a->arith][w[0]->type];
    const bm_lines d = lines_of(dhidden(r) + at, 2 * a->F, NULL);
    int n = 0;
    if (a->dx) {
        bm_lines weights = matrix_of(w[0]);
        weights.base[1] = w[count - 1]->data;
        weights.split = count == 2 ? a->F : 0;
        p[n++] = (bm_outer){ .M = r->M, .N = a->D, .K = count * a->F, .form = form, .turned = true, .add = add, .a = d,
                             .b = weights, .c = lines_of(a->dx, a->D, r->map) };
    }
    if (dw[0]) {
        bm_lines gradients = matrix_of(dw[0]);
        gradients.base[1] = dw[count - 1]->data;
        gradients.split = count == 2 ? a->F : 0;
        p[n++] = (bm_outer){ .M = count * a->F, .N = a->D, .K = r->M, .form = form, .add = true, .a = d,
                             .b = lines_of(a->x, a->D, r->map), .c = gradients };
    }
    return n;
}
static void biases_back(const rows *r) {
    const bm_op_experts *a = r->a;
    bm_lines dy = lines_of(a->dy, a->D, r->map);
    dy.scale = r->gate;
    const bm_lines gate = lines_of(dhidden(r), 2 * a->F, NULL), up = lines_of(dhidden(r) + a->F, 2 * a->F, NULL);
    if (a->db_down) bm_cpu_sum_lines(r->c, a->db_down + (size_t)r->e * (size_t)a->D, &dy, r->M, a->D);
    if (a->db_gate && a->gate) bm_cpu_sum_lines(r->c, a->db_gate + (size_t)r->e * (size_t)a->F, &gate, r->M, a->F);
    if (a->db_up) bm_cpu_sum_lines(r->c, a->db_up + (size_t)r->e * (size_t)a->F, &up, r->M, a->F);
}

static bool known_types(const rows *r) {
    const bm_op_experts *a = r->a;
    return bm_cpu_back_type(r->c, a->up[r->e].type) && bm_cpu_back_type(r->c, a->down[r->e].type)
           && (!a->gate || bm_cpu_back_type(r->c, a->gate[r->e].type));
}
/* The products of an expert once its dhidden is there.  Pass 0: gate and up in one, or gate alone; pass 1: up, where
 * it is left. */
static int pass_products(const rows *r, int pass, bm_outer *p) {
    const bm_op_experts *a = r->a;
    const bm_tensor *w[2] = { a->gate ? &a->gate[r->e] : NULL, &a->up[r->e] };
    const bm_tensor *dw[2] = { a->dw_gate ? &a->dw_gate[r->e] : NULL, a->dw_up ? &a->dw_up[r->e] : NULL };
    const bool one = w[0] && w[0]->type == w[1]->type && !dw[0] == !dw[1];
    int n = 0;
    if (pass == 0) {
        if (w[0]) n = in_products(r, 0, one ? 2 : 1, w, dw, a->add_dx, p);
        if (a->dw_down) p[n++] = down_product(r);
    } else if (!one) {
        n = in_products(r, a->F, 1, w + 1, dw + 1, a->add_dx || w[0], p);
    }
    return n;
}
static void group_back(rows *r, int count) {
    bm_outer p[PRODUCTS];
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (!known_types(&r[i])) return;
        p[n++] = act_product(&r[i]);
    }
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0, start = n; i < count; i++) {
            const int more = pass_products(&r[i], pass, p + n);
            if (n == start && more) p[n].late = true;
            n += more;
        }
    bm_cpu_outer(r->c, p, n);
    for (int i = 0; i < count; i++) biases_back(&r[i]);
}

void bm_cpu_experts_back(bm_backend *b, const bm_op_experts *a) {
    bm_cpu *c = (bm_cpu *)b;
    const bm_op_route *r = a->route;
    if (c->failed || a->M <= 0) return;
    if (!r) {
        group_back(&(rows){ c, a, 0, 0, a->M, 0, NULL, NULL }, 1);
        return;
    }
    if (r->first[a->X] < a->M) {        /* rows in no group */
        if (a->dx && !a->add_dx) memset(a->dx, 0, sizeof *a->dx * (size_t)a->M * (size_t)a->D);
        if (a->dgate) memset(a->dgate, 0, sizeof *a->dgate * (size_t)a->M);
    }
    rows group[GROUP];
    int n = 0, work = 0;
    for (int e = 0; e < a->X && !c->failed; e++) {
        const int first = r->first[e], M = r->first[e + 1] - first;
        if (n == GROUP || (n && work + M > GROUP_ROWS)) {
            group_back(group, n);
            n = work = 0;
        }
        if (M > 0) group[n++] = (rows){ c, a, e, first, M, work, r->order + first, r->gate };
        work += M;
    }
    if (n && !c->failed) group_back(group, n);
}
