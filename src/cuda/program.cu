/* program.cu - a token's operations, in the order model/forward.c asks for them, read as layers.  Room: cuda. */
#include "cuda/token.h"

typedef struct reader { const bm_cuda_op *op; int n, at; } reader;
static const bm_cuda_op *next_is(reader *r, bm_cuda_kind kind) {
    return r->at < r->n && r->op[r->at].kind == kind ? &r->op[r->at++] : NULL;
}
static bool fits(const bm_tensor *w) { return w->type == BM_BF16 && w->cols % 32 == 0 && w->cols / 4 <= BM_CUDA_PAIRS; }
static const uint8_t *data_of(const bm_tensor *w) { return (const uint8_t *)w->data; }

/* Each of these fills what it read; false: not that, or not as the kernel does it.  y: the stream's place, which blocks write. */

/* A linear in native arithmetic. */
static const bm_op_linear *linear_is(reader *r) {
    const bm_cuda_op *o = next_is(r, BM_CUDA_LINEAR);
    return o && !o->linear.accumulate && o->linear.arith == BM_ARITH_NATIVE && fits(o->linear.w) ? &o->linear : NULL;
}

static bool mamba_is(reader *r, bm_cuda_program *p, bm_cuda_layer *a, const float *y) {
    const bm_op_linear *in = linear_is(r);
    const bm_cuda_op *conv = in ? next_is(r, BM_CUDA_CONV) : NULL;
    const bm_op_linear *x = conv ? linear_is(r) : NULL;
    const bm_cuda_op *dt = x ? next_is(r, BM_CUDA_LINEAR) : NULL, *scan = dt ? next_is(r, BM_CUDA_SCAN) : NULL;
    const bm_op_linear *out = scan ? linear_is(r) : NULL;
    if (!out || out->y != y || x->bias || dt->linear.w->type != BM_BF16 || dt->linear.bias) return false;
    if (scan->scan.N > 16 || scan->scan.kept || conv->conv.K > 4) return false;
    const bm_op_conv *c = &conv->conv;
    const bm_op_scan *s = &scan->scan;
    p->I = s->I, p->N = s->N, p->K = c->K, p->R = dt->linear.w->cols;
    p->stride = s->stride;
    p->slot = s->slot;
    a->in = data_of(in->w), a->x = data_of(x->w), a->dt = data_of(dt->linear.w), a->out = data_of(out->w);
    a->in_bias = in->bias, a->out_bias = out->bias;
    a->conv = c->weight, a->conv_bias = c->bias, a->conv_state = c->state;
    a->dt_bias = s->dt_bias, a->A = s->A, a->D = s->D, a->state = s->state;
    return true;
}

static bool experts_are(reader *r, bm_cuda_program *p, bm_cuda_layer *a, const float *y) {
    const bm_cuda_op *router = next_is(r, BM_CUDA_LINEAR), *route = router ? next_is(r, BM_CUDA_ROUTE) : NULL;
    const bm_cuda_op *o = next_is(r, BM_CUDA_EXPERTS);
    if (!o || (router && !route)) return false;
    const bm_op_experts *e = &o->experts;
    if (e->y != y || e->accumulate || e->act || e->arith != BM_ARITH_NATIVE) return false;
    if (p->F && (p->F != e->F || p->gated != (e->gate != NULL))) return false;
    p->F = e->F;
    p->gated = e->gate != NULL;
    a->X = route ? e->X : 1;
    if (a->X > BM_CUDA_MOST_X) return false;
    if (route && (route->route.k != 1 || route->route.balance || router->linear.w->type != BM_F32)) return false;
    for (int i = 0; i < a->X; i++) {
        if ((e->gate && !fits(&e->gate[i])) || !fits(&e->up[i]) || !fits(&e->down[i])) return false;
        a->gate[i] = e->gate ? data_of(&e->gate[i]) : NULL;
        a->up[i] = data_of(&e->up[i]);
        a->down[i] = data_of(&e->down[i]);
    }
    a->gate_bias = e->gate_bias, a->up_bias = e->up_bias, a->down_bias = e->down_bias;
    a->gelu = e->activation == BM_GELU;
    if (route) {
        a->router = (const float *)router->linear.w->data;
        a->router_bias = router->linear.bias;
        a->softmax = route->route.rule == BM_ROUTE_SOFTMAX;
        if (a->X > p->most_X) p->most_X = a->X;
    }
    return true;
}

static bool head_is(reader *r, bm_cuda_program *p, const float *y, const float *sum) {
    const bm_cuda_op *norm = next_is(r, BM_CUDA_NORM);
    const bm_op_linear *head = norm ? linear_is(r) : NULL;
    const bm_cuda_op *best = head ? next_is(r, BM_CUDA_BEST) : NULL;
    if (!best || norm->norm.x != y || norm->norm.residual != sum) return false;
    p->last_norm = norm->norm.weight, p->last_bias = norm->norm.bias;
    p->last_eps = norm->norm.eps, p->centered = norm->norm.centered;
    p->head = data_of(head->w);
    p->head_bias = head->bias;
    p->logits = head->y;
    p->V = head->w->rows;
    p->best = best->best.best;
    p->ids = best->best.V;
    return best->best.logits == p->logits && best->best.ld == p->V;
}

bool bm_cuda_program_is(const bm_cuda_op *op, int n, bm_cuda_program *p, bm_cuda_layer *a) {
    reader all = { op, n, 0 }, *r = &all;
    const bm_cuda_op *o = next_is(r, BM_CUDA_EMBED);
    if (!o || o->embed.M > BM_CUDA_SLOTS || (o->embed.table->type != BM_BF16 && o->embed.table->type != BM_F32)) return false;
    p->M = o->embed.M, p->D = o->embed.table->cols;
    p->token = o->embed.token;
    p->table = data_of(o->embed.table);
    p->table_f32 = o->embed.table->type == BM_F32;
    const float *y = o->embed.y, *sum = NULL;
    while (r->at + 3 < r->n) {      /* norm, head and best are left */
        const bm_cuda_op *norm = next_is(r, BM_CUDA_NORM);
        if (!norm || norm->norm.centered || norm->norm.bias || norm->norm.x != y || !norm->norm.sum) return false;
        a->norm = norm->norm.weight;
        a->eps = norm->norm.eps;
        sum = norm->norm.sum;
        const bool mamba = r->at + 1 < r->n && r->op[r->at + 1].kind == BM_CUDA_CONV;
        if (!(mamba ? mamba_is(r, p, a, y) : experts_are(r, p, a, y))) return false;
        a++;
        p->L++;
    }
    return p->L && p->I && p->D / 2 <= BM_CUDA_PAIRS && head_is(r, p, y, sum) && r->at == r->n;
}
