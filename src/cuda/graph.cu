/* graph.cu - operations recorded once and launched together from then on.  Room: cuda.
 * In: operations between replay() and recorded().  Out: for each owner and number of rows one kernel that does a whole
 * token (token.cu), or a CUDA graph of their kernels; without an owner their kernels, once.  Neighbours that one kernel
 * makes are made by it. */
#include "cuda/token.h"
#include <stdlib.h>
#include <string.h>

enum { MOST = 64 };         /* recordings kept; the one not used for longest makes room */
typedef struct recording { const void *owner; int M; cudaGraphExec_t graph; bm_cuda_token *token; uint64_t used; } recording;
struct bm_cuda_graphs {
    recording r[MOST], once, *now;          /* once: not kept */
    uint64_t clock;
    bm_backend door;        /* as it was before operations were noted */
    bm_cuda_op *op; int n, room;
};

static void drop(recording *r) {
    if (r->graph) cudaGraphExecDestroy(r->graph);
    bm_cuda_token_free(r->token);
    *r = {};
}
static bool made(const recording *r) { return r->graph || r->token; }

static recording *place_for(bm_cuda_graphs *g, const void *owner, int M) {
    recording *oldest = &g->r[0];
    for (int i = 0; i < MOST; i++) {
        if (made(&g->r[i]) && g->r[i].owner == owner && g->r[i].M == M) return &g->r[i];
        if (g->r[i].used < oldest->used) oldest = &g->r[i];
    }
    drop(oldest);
    oldest->owner = owner;
    oldest->M = M;
    return oldest;
}

/* ---- noting: the door's operations while recording ------------------------------------------------------- */

static bm_cuda_op *noted(bm_backend *b, bm_cuda_kind kind) {
    bm_cuda_graphs *g = cuda_of(b)->graphs;
    if (g->n == g->room) {
        const int room = g->room ? 2 * g->room : 256;
        bm_cuda_op *more = (bm_cuda_op *)realloc(g->op, sizeof *more * (size_t)room);
        if (!more) {
            bm_cuda_check(cuda_of(b), cudaErrorMemoryAllocation, "recording");
            return NULL;
        }
        g->op = more;
        g->room = room;
    }
    g->op[g->n].kind = kind;
    return &g->op[g->n++];
}
#define NOTE(name, KIND)                                                            \
    static void note_##name(bm_backend *b, const bm_op_##name *a) {                 \
        bm_cuda_op *o = noted(b, KIND);                                             \
        if (o) o->name = *a;                                                        \
    }
BM_CUDA_PLAIN_OPS(NOTE)
static void note_experts(bm_backend *b, const bm_op_experts *a) {
    bm_cuda_op *o = noted(b, BM_CUDA_EXPERTS);
    if (!o) return;
    o->experts = *a;
    if (a->route) o->of = *a->route;
}

static void issue(bm_backend *b, const bm_cuda_op *o) {
#define ISSUE(name, KIND) case KIND: bm_cuda_##name(b, &o->name); break;
    switch (o->kind) {
    BM_CUDA_PLAIN_OPS(ISSUE)
    ISSUE(experts, BM_CUDA_EXPERTS)
    }
#undef ISSUE
}

/* ---- replay, record --------------------------------------------------------------------------------------- */

static bool launch(bm_cuda *c, const recording *r) {
    if (r->token) return bm_cuda_token_run(c, r->token);
    return bm_cuda_check(c, cudaGraphLaunch(r->graph, c->stream), "a recorded token");
}

bool bm_cuda_replay(bm_backend *b, const void *owner, int M) {
    bm_cuda *c = cuda_of(b);
    if (c->failed) return false;
    bm_cuda_rounded(c, NULL, 0, 0);
    if (!c->graphs) c->graphs = (bm_cuda_graphs *)calloc(1, sizeof *c->graphs);
    bm_cuda_graphs *g = c->graphs;
    if (!g) return false;
    recording *r = owner ? place_for(g, owner, M) : &g->once;
    r->used = ++g->clock;
    if (made(r)) return launch(c, r);
    g->now = r;
    g->n = 0;
    g->door = *b;
#define TAKE(name, KIND) b->name = note_##name;
    BM_CUDA_PLAIN_OPS(TAKE)
#undef TAKE
    b->experts = note_experts;
    return false;
}

/* Whether an operation before the next norm reads x, of those that model/forward.c lets read a norm's rows. */
static bool is_read(const bm_cuda_op *o, int n, const float *x) {
    for (int i = 0; i < n && o[i].kind != BM_CUDA_NORM; i++)
        if ((o[i].kind == BM_CUDA_LINEAR && o[i].linear.x == x) || (o[i].kind == BM_CUDA_EXPERTS && o[i].experts.x == x)) return true;
    return false;
}
static bool are(const bm_cuda_op *o, int n, bm_cuda_kind first, bm_cuda_kind second) {
    return n > 1 && o[0].kind == first && o[1].kind == second;
}
/* How many operations from o on, of n, were done by fewer kernels, or the first one by less; 0: none. */
static int from_norm(bm_backend *b, const bm_cuda_op *o, int n) {
    const bm_op_norm *a = &o[0].norm;
    if (!are(o, n, BM_CUDA_NORM, BM_CUDA_LINEAR)) return 0;
    if (!is_read(o + 2, n - 2, a->y) && bm_cuda_norm_rounded(b, a, &o[1].linear)) return 1;
    if (n < 3 || o[2].kind != BM_CUDA_ROUTE) return 0;
    const bool alone = n > 3 && o[3].kind == BM_CUDA_EXPERTS && !is_read(o + 4, n - 4, a->y);
    return bm_cuda_router(b, a, &o[1].linear, &o[2].route, alone ? &o[3].experts : NULL) ? 3 : 0;
}
/* Has p, o's product, make keys where it serves for nothing but best tokens. */
static bool make_keys(bm_cuda *c, const bm_cuda_op *o, int n, bm_product *p) {
    return are(o, n, BM_CUDA_LINEAR, BM_CUDA_BEST) && bm_cuda_make_keys(c, p, &o[1].best);
}
static int from_linear(bm_backend *b, const bm_cuda_op *o, int n) {
    bm_cuda *c = cuda_of(b);
    const bm_op_linear *a = &o[0].linear;
    if (are(o, n, BM_CUDA_LINEAR, BM_CUDA_ROUTE)) return bm_cuda_router(b, NULL, a, &o[1].route, NULL) ? 2 : 0;
    bm_product p = bm_cuda_product_of(a);
    if (make_keys(c, o, n, &p)) {
        bm_cuda_product(c, &p);
        bm_cuda_tell_keys(c, &o[1].best);
        return 2;
    }
    if (n < 3 || o[2].kind != BM_CUDA_LINEAR) return 0;
    if (o[1].kind == BM_CUDA_SCAN) return bm_cuda_dt_scan(b, a, &o[1].scan, &o[2].linear) ? 2 : 0;
    if (o[1].kind != BM_CUDA_NORM || is_read(o + 3, n - 3, o[1].norm.y)) return 0;
    if (!bm_cuda_norm_follows(c, &p, &o[1].norm, &o[2].linear)) return 0;
    bm_product next = bm_cuda_product_of(&o[2].linear);
    const bool keys = make_keys(c, o + 2, n - 2, &next);
    bm_cuda_product_norm(c, &p, &o[1].norm);
    bm_cuda_normed_product(c, &o[1].norm, &next);
    if (keys) bm_cuda_tell_keys(c, &o[3].best);
    return keys ? 4 : 3;
}
static int joined(bm_backend *b, const bm_cuda_op *o, int n) {
    if (o->kind == BM_CUDA_NORM) return from_norm(b, o, n);
    if (o->kind == BM_CUDA_LINEAR) return from_linear(b, o, n);
    if (are(o, n, BM_CUDA_CONV, BM_CUDA_LINEAR)) return bm_cuda_conv_x(b, &o[0].conv, &o[1].linear) ? 2 : 0;
    return are(o, n, BM_CUDA_SCAN, BM_CUDA_LINEAR) && bm_cuda_scan_rounded(b, &o[0].scan, &o[1].linear) ? 1 : 0;
}

static void issue_all(bm_backend *b) {
    const bm_cuda_graphs *g = cuda_of(b)->graphs;
    for (int i = 0; i < g->n; i++)      /* all are noted: they move no more */
        if (g->op[i].kind == BM_CUDA_EXPERTS && g->op[i].experts.route) g->op[i].experts.route = &g->op[i].of;
    for (int i = 0, n; i < g->n; i += n ? n : 1) {
        n = joined(b, &g->op[i], g->n - i);
        if (!n) issue(b, &g->op[i]);
    }
}
static void capture(bm_backend *b, recording *r) {
    bm_cuda *c = cuda_of(b);
    cudaGraph_t graph = NULL;
    if (!bm_cuda_check(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "recording")) return;
    issue_all(b);
    if (bm_cuda_check(c, cudaStreamEndCapture(c->stream, &graph), "recording"))
        bm_cuda_check(c, cudaGraphInstantiate(&r->graph, graph, 0), "recording");
    if (graph) cudaGraphDestroy(graph);
}

void bm_cuda_recorded(bm_backend *b) {
    bm_cuda *c = cuda_of(b);
    bm_cuda_graphs *g = c->graphs;
    if (!g || !g->now) return;
    recording *r = g->now;
    g->now = NULL;
    *b = g->door;
    if (c->failed) return;
    if (r == &g->once) return issue_all(b);
    r->token = bm_cuda_token_make(c, g->op, g->n);
    if (!r->token) capture(b, r);
    if (c->failed) drop(r);         /* part of it may be missing */
    else launch(c, r);
}

void bm_cuda_forget(bm_backend *b, const void *owner) {
    bm_cuda_graphs *g = cuda_of(b)->graphs;
    for (int i = 0; g && i < MOST; i++)
        if (made(&g->r[i]) && (!owner || g->r[i].owner == owner)) drop(&g->r[i]);
    if (owner || !g) return;
    free(g->op);
    free(g);
    cuda_of(b)->graphs = NULL;
}
