/* graph.cu - operations recorded once and launched together from then on.  Room: cuda.
 * In: operations between replay() and recorded().  Out: one CUDA graph for each owner and number of rows. */
#include "cuda/cuda.h"
#include <stdlib.h>

enum { MOST = 64 };         /* graphs kept; the one not used for longest makes room */
typedef struct recording { const void *owner; int M; cudaGraphExec_t graph; uint64_t used; } recording;
struct bm_cuda_graphs { recording r[MOST]; recording *now; uint64_t clock; };

static void drop(recording *r) {
    if (r->graph) cudaGraphExecDestroy(r->graph);
    *r = {};
}

static recording *place_for(bm_cuda_graphs *g, const void *owner, int M) {
    recording *oldest = &g->r[0];
    for (int i = 0; i < MOST; i++) {
        if (g->r[i].graph && g->r[i].owner == owner && g->r[i].M == M) return &g->r[i];
        if (g->r[i].used < oldest->used) oldest = &g->r[i];
    }
    drop(oldest);
    oldest->owner = owner;
    oldest->M = M;
    return oldest;
}

bool bm_cuda_replay(bm_backend *b, const void *owner, int M) {
    bm_cuda *c = cuda_of(b);
    if (c->failed) return false;
    bm_cuda_rounded(c, NULL, 0, 0);
    if (!c->graphs) c->graphs = (bm_cuda_graphs *)calloc(1, sizeof *c->graphs);
    bm_cuda_graphs *g = c->graphs;
    if (!g) return false;
    recording *r = place_for(g, owner, M);
    r->used = ++g->clock;
    if (r->graph) return bm_cuda_check(c, cudaGraphLaunch(r->graph, c->stream), "a recorded token");
    if (bm_cuda_check(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "recording")) g->now = r;
    return false;
}

void bm_cuda_recorded(bm_backend *b) {
    bm_cuda *c = cuda_of(b);
    cudaGraph_t graph = NULL;
    if (!c->graphs || !c->graphs->now) return;
    recording *r = c->graphs->now;
    c->graphs->now = NULL;
    bool good = bm_cuda_check(c, cudaStreamEndCapture(c->stream, &graph), "recording");
    if (good) good = bm_cuda_check(c, cudaGraphInstantiate(&r->graph, graph, 0), "recording");
    if (graph) cudaGraphDestroy(graph);
    if (good) bm_cuda_check(c, cudaGraphLaunch(r->graph, c->stream), "a recorded token");
    else drop(r);
}

void bm_cuda_forget(bm_backend *b, const void *owner) {
    bm_cuda_graphs *g = cuda_of(b)->graphs;
    for (int i = 0; g && i < MOST; i++)
        if (g->r[i].graph && (!owner || g->r[i].owner == owner)) drop(&g->r[i]);
    if (owner) return;
    free(g);
    cuda_of(b)->graphs = NULL;
}
