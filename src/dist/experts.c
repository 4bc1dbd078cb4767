/* src/dist/experts.c - experts shared out among ranks.  Room: dist.  In: rows grouped by expert.  Out: rows where they
 * came from.  All ranks come here for the same layers in the same order. */
#include "dist/experts.h"
#include <stdlib.h>
#include <string.h>

/* Rows a rank got for its experts of one layer, kept from the forward to the backward. */
typedef struct visit {
    int rows, cap, F;
    int32_t *give, *take;       /* (ranks) rows */
    int32_t *order, *first;     /* (cap) (X+1) of the experts here */
    float *x, *gate, *y, *hidden, *act;     /* (cap,D) (cap) (cap,D) (cap,2F) (cap,F) */
} visit;

struct bm_expert_ranks {
    bm_expert_door door;        /* first */
    const bm_config *config;
    bm_comm *comm;
    visit *layer;               /* (layers) */
    int32_t *counts;            /* (2, ranks, most experts of a rank) */
    float *sent, *numbers; int cap_sent;    /* rows of this rank in the order of experts: (cap,D) (cap) */
    float *dx, *dhidden, *dact, *dgate; int cap_back; size_t back_F;
    bm_status failed; char sentence[256];
};

static int first_of(int X, int r, int ranks) { return (int)((int64_t)X * r / ranks); }

static void note(bm_expert_ranks *e, bm_status s) {
    if (!s || e->failed) return;
    e->failed = s;
    snprintf(e->sentence, sizeof e->sentence, "%s", bm_error());
}

bm_status bm_expert_ranks_status(bm_expert_ranks *e) {
    const bm_status s = e->failed;
    e->failed = BM_OK;
    return s ? bm_fail(s, "%s", e->sentence) : BM_OK;
}

static bm_status regrow(float **p, size_t n) {
    free(*p);
    *p = NULL;
    return bm_alloc(p, n * sizeof **p, "rows of experts");
}

static bm_status make_room(visit *v, int rows, size_t D, size_t F) {
    if (rows <= v->cap && (int)F == v->F) return BM_OK;
    const size_t n = (size_t)rows + (size_t)rows / 4 + 1;
    v->cap = 0;
    BM_TRY(regrow(&v->x, n * D));
    BM_TRY(regrow(&v->gate, n));
    BM_TRY(regrow(&v->y, n * D));
    BM_TRY(regrow(&v->hidden, n * 2 * F));
    BM_TRY(regrow(&v->act, n * F));
    free(v->order);
    v->order = NULL;
    BM_TRY(bm_alloc(&v->order, n * sizeof *v->order, "rows of experts"));
    v->cap = (int)n;
    v->F = (int)F;
    return BM_OK;
}

/* Rows are grouped by expert, so by rank; what comes is grouped by rank, then by expert: order groups it by expert. */
static bm_status plan(bm_expert_ranks *e, visit *v, const bm_op_experts *a) {
    const int ranks = e->comm->size, me = e->comm->rank, X = a->X, most = (X + ranks - 1) / ranks;
    const int lo = first_of(X, me, ranks), here = first_of(X, me + 1, ranks) - lo;
    int32_t *mine = e->counts, *theirs = e->counts + (size_t)ranks * (size_t)most;
    memset(mine, 0, sizeof *mine * (size_t)ranks * (size_t)most);
    for (int r = 0; r < ranks; r++) {
        const int begin = first_of(X, r, ranks), end = first_of(X, r + 1, ranks);
        for (int x = begin; x < end; x++) mine[r * most + x - begin] = a->route->first[x + 1] - a->route->first[x];
        v->give[r] = a->route->first[end] - a->route->first[begin];
    }
    BM_TRY(e->comm->exchange_counts(e->comm, mine, theirs, most));
    v->rows = 0;
    for (int r = 0; r < ranks; r++) {
        v->take[r] = 0;
        for (int x = 0; x < here; x++) v->take[r] += theirs[r * most + x];
        v->rows += v->take[r];
    }
    BM_TRY(make_room(v, v->rows, (size_t)a->D, (size_t)a->F));
    int n = 0;
    for (int x = 0; x < here; x++) {
        v->first[x] = n;
        for (int r = 0, at = 0; r < ranks; at += v->take[r++]) {
            int begin = at;
            for (int before = 0; before < x; before++) begin += theirs[r * most + before];
            for (int i = 0; i < theirs[r * most + x]; i++) v->order[n++] = begin + i;
        }
    }
    v->first[here] = n;
    return BM_OK;
}

static bm_status make_sent(bm_expert_ranks *e, int rows, size_t D) {
    if (rows <= e->cap_sent) return BM_OK;
    e->cap_sent = 0;
    BM_TRY(regrow(&e->sent, (size_t)rows * D));
    BM_TRY(regrow(&e->numbers, (size_t)rows));
    e->cap_sent = rows;
    return BM_OK;
}

static void gather_rows(bm_backend *be, float *to, const float *from, const bm_op_experts *a) {
    const size_t D = (size_t)a->D;
    for (int i = 0; i < a->route->first[a->X]; i++)
        be->copy(be, to + (size_t)i * D, from + (size_t)a->route->order[i] * D, D * sizeof *to);
}

/* Rows back to where they were; rows in no group become 0, or keep what they have when adding. */
static void scatter_rows(bm_backend *be, float *to, const float *from, const bm_op_experts *a, bool add) {
    const size_t D = (size_t)a->D;
    if (!add) be->zero(be, to, (size_t)a->M * D * sizeof *to);
    for (int i = 0; i < a->route->first[a->X]; i++)
        be->blend(be, to + (size_t)a->route->order[i] * D, 1, from + (size_t)i * D, 1, D);
}

/* The operation of this rank's experts on the rows that came. */
static bm_op_experts local(const bm_expert_ranks *e, const visit *v, const bm_op_experts *a, bm_op_route *route) {
    const int lo = first_of(a->X, e->comm->rank, e->comm->size), here = first_of(a->X, e->comm->rank + 1, e->comm->size) - lo;
    const size_t F = (size_t)lo * (size_t)a->F, D = (size_t)lo * (size_t)a->D;
    *route = (bm_op_route){ .M = v->rows, .X = here, .k = 1, .order = v->order, .first = v->first, .gate = v->gate };
    return (bm_op_experts){ .M = v->rows, .D = a->D, .F = a->F, .X = here, .activation = a->activation, .arith = a->arith,
                            .route = route, .gate = a->gate ? a->gate + lo : NULL, .up = a->up + lo, .down = a->down + lo,
                            .gate_bias = a->gate_bias ? a->gate_bias + F : NULL, .up_bias = a->up_bias ? a->up_bias + F : NULL,
                            .down_bias = a->down_bias ? a->down_bias + D : NULL, .x = v->x, .hidden = v->hidden,
                            .act = a->act ? v->act : NULL, .y = v->y };
}

static bm_status forward(bm_expert_ranks *e, bm_backend *be, visit *v, const bm_op_experts *a) {
    bm_comm *c = e->comm;
    const size_t row = (size_t)a->D * sizeof(float);
    BM_TRY(plan(e, v, a));
    BM_TRY(make_sent(e, a->M, (size_t)a->D));
    gather_rows(be, e->sent, a->x, a);
    for (int i = 0; i < a->route->first[a->X]; i++) e->numbers[i] = a->route->gate[a->route->order[i]];
    BM_TRY(c->exchange(c, e->sent, v->give, v->x, v->take, row));
    BM_TRY(c->exchange(c, e->numbers, v->give, v->gate, v->take, sizeof(float)));
    BM_TRY(be->reserve(be, v->rows, a->D > a->F ? a->D : a->F));
    bm_op_route route;
    const bm_op_experts op = local(e, v, a, &route);
    if (v->rows) be->experts(be, &op);
    BM_TRY(c->exchange(c, v->y, v->take, e->sent, v->give, row));
    scatter_rows(be, a->y, e->sent, a, a->accumulate);
    return BM_OK;
}

static bm_status make_back(bm_expert_ranks *e, int rows, size_t D, size_t F) {
    if (rows <= e->cap_back && F <= e->back_F) return BM_OK;
    const size_t n = (size_t)rows + (size_t)rows / 4 + 1;
    e->cap_back = 0;
    BM_TRY(regrow(&e->dx, n * D));
    BM_TRY(regrow(&e->dhidden, n * 2 * F));
    BM_TRY(regrow(&e->dact, n * F));
    BM_TRY(regrow(&e->dgate, n));
    e->cap_back = (int)n;
    e->back_F = F;
    return BM_OK;
}

static bm_status backward(bm_expert_ranks *e, bm_backend *be, visit *v, const bm_op_experts *a) {
    bm_comm *c = e->comm;
    const size_t row = (size_t)a->D * sizeof(float);
    const int lo = first_of(a->X, c->rank, c->size);
    BM_TRY(make_sent(e, a->M, (size_t)a->D));
    BM_TRY(make_back(e, v->rows, (size_t)a->D, (size_t)a->F));
    gather_rows(be, e->sent, a->dy, a);
    BM_TRY(c->exchange(c, e->sent, v->give, v->y, v->take, row));      /* y's place holds dy now */
    BM_TRY(be->reserve_back(be, v->rows, a->D > a->F ? a->D : a->F, a->D > a->F ? a->D : a->F));
    bm_op_route route;
    bm_op_experts op = local(e, v, a, &route);
    op.dy = v->y;
    op.dx = e->dx;
    op.dgate = e->dgate;
    op.dw_gate = a->dw_gate ? a->dw_gate + lo : NULL;
    op.dw_up = a->dw_up + lo;
    op.dw_down = a->dw_down + lo;
    op.db_gate = a->db_gate ? a->db_gate + (size_t)lo * (size_t)a->F : NULL;
    op.db_up = a->db_up ? a->db_up + (size_t)lo * (size_t)a->F : NULL;
    op.db_down = a->db_down ? a->db_down + (size_t)lo * (size_t)a->D : NULL;
    op.dhidden = e->dhidden;
    op.dact = e->dact;
    if (v->rows) be->experts_back(be, &op);
    BM_TRY(c->exchange(c, e->dx, v->take, e->sent, v->give, row));
    BM_TRY(c->exchange(c, e->dgate, v->take, e->numbers, v->give, sizeof(float)));
    scatter_rows(be, a->dx, e->sent, a, a->add_dx);
    be->zero(be, a->dgate, (size_t)a->M * sizeof(float));
    for (int i = 0; i < a->route->first[a->X]; i++) a->dgate[a->route->order[i]] = e->numbers[i];
    return BM_OK;
}

static void door_forward(bm_expert_door *d, bm_backend *be, int l, const bm_op_experts *a) {
    bm_expert_ranks *e = (bm_expert_ranks *)d;
    if (!e->failed) note(e, forward(e, be, &e->layer[l], a));
}
static void door_backward(bm_expert_door *d, bm_backend *be, int l, const bm_op_experts *a) {
    bm_expert_ranks *e = (bm_expert_ranks *)d;
    if (!e->failed) note(e, backward(e, be, &e->layer[l], a));
}

bm_expert_door *bm_expert_ranks_door(bm_expert_ranks *e) { return &e->door; }

static bm_status init(bm_expert_ranks *e) {
    const size_t ranks = (size_t)e->comm->size;
    int most = 1;
    BM_TRY(bm_alloc(&e->layer, sizeof *e->layer * (size_t)e->config->n_layers, "experts of ranks"));
    for (int l = 0; l < e->config->n_layers; l++) {
        const bm_layer_config *k = &e->config->layer[l];
        if (k->ffn != BM_FFN_MOE) continue;
        if (k->n_experts > most) most = k->n_experts;
        BM_TRY(bm_alloc(&e->layer[l].give, ranks * sizeof(int32_t), "experts of ranks"));
        BM_TRY(bm_alloc(&e->layer[l].take, ranks * sizeof(int32_t), "experts of ranks"));
        BM_TRY(bm_alloc(&e->layer[l].first, ((size_t)k->n_experts + 1) * sizeof(int32_t), "experts of ranks"));
    }
    return bm_alloc(&e->counts, 2 * (ranks * ((size_t)most / ranks + 1)) * sizeof *e->counts, "experts of ranks");
}

bm_status bm_expert_ranks_open(bm_expert_ranks **out, const bm_config *c, bm_comm *comm, const bm_backend *be) {
    bm_expert_ranks *e;
    *out = NULL;
    if (c->top_k != 1) return bm_fail(BM_ENOSUPPORT, "experts of ranks: found %d experts a token, expected 1", c->top_k);
    if (!be->reads_host) return bm_fail(BM_ENOSUPPORT, "experts of ranks: found device %s, expected one that reads host memory", be->name);
    BM_TRY(bm_alloc(&e, sizeof *e, "experts of ranks"));
    e->door = (bm_expert_door){ door_forward, door_backward };
    e->config = c;
    e->comm = comm;
    const bm_status s = init(e);
    if (s) bm_expert_ranks_close(e);
    else *out = e;
    return s;
}

void bm_expert_ranks_close(bm_expert_ranks *e) {
    if (!e) return;
    for (int l = 0; e->layer && l < e->config->n_layers; l++) {
        visit *v = &e->layer[l];
        void *const all[] = { v->give, v->take, v->order, v->first, v->x, v->gate, v->y, v->hidden, v->act };
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    }
    void *const all[] = { e->layer, e->counts, e->sent, e->numbers, e->dx, e->dhidden, e->dact, e->dgate, e };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}
