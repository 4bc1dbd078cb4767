/* src/model/profile.c - where the time of a session goes.  Room: model.
 *
 * In: marks between the stages of the network, the routes of its MoE layers.  Out: bm_times.  A mark
 * waits for the device, gives the time since the last mark to one stage, and keeps what failed. */
#include "model/model.h"
#include <stdlib.h>

typedef struct bm_profile {
    bm_times times;
    double since;               /* of the last mark */
    uint64_t dense_bytes;       /* weights that every chunk reads */
    bm_status failed;
    int32_t first[BM_MAX_EXPERTS + 1];
} bm_profile;

const char *bm_stage_name(bm_stage s) {
    static const char *const name[BM_STAGE_COUNT] = { "projections", "conv", "scan", "experts", "norm", "head" };
    return (unsigned)s < BM_STAGE_COUNT ? name[s] : "?";
}

static uint64_t bytes_of(const bm_tensor *t) { return bm_dtype_bytes(t->type, (size_t)t->rows * (size_t)t->cols); }

/* Matrices and biases of one expert. */
static uint64_t expert_bytes(const bm_pass *p, int l, int e) {
    const bm_layer *w = &p->w->layer[l];
    const size_t F = (size_t)p->config->layer[l].d_ff, D = (size_t)p->config->d_model;
    const size_t biases = (w->gate_bias ? F : 0) + (w->up_bias ? F : 0) + (w->down_bias ? D : 0);
    return (w->gate ? bytes_of(&w->gate[e]) : 0) + bytes_of(&w->up[e]) + bytes_of(&w->down[e]) + biases * sizeof(float);
}

bm_status bm_session_profile(bm_session *s, bool on) {
    free(s->pass.profile);
    s->pass.profile = NULL;
    if (!on) return BM_OK;
    bm_profile *p;
    bm_info info;
    BM_TRY(bm_alloc(&p, sizeof *p, "measuring a session"));
    bm_model_info(s->m, &info);
    p->dense_bytes = info.weight_bytes_per_token;
    for (int l = 0; l < s->m->config.n_layers; l++)
        if (s->m->config.layer[l].ffn == BM_FFN_MOE) p->dense_bytes -= expert_bytes(&s->pass, l, 0);
    s->pass.profile = p;
    return BM_OK;
}

void bm_session_times(bm_session *s, bm_times *out) {
    bm_profile *p = s->pass.profile;
    *out = p ? p->times : (bm_times){ 0 };
    if (p) p->times = (bm_times){ 0 };
}

void bm_profile_start(bm_session *s) {
    bm_profile *p = s->pass.profile;
    if (!p) return;
    p->failed = BM_OK;
    s->be->waited(s->be, true);
    p->since = bm_now();
}

void bm_profile_mark(const bm_pass *pass, bm_stage stage) {
    bm_profile *p = pass->profile;
    if (!p) return;
    const bm_status st = pass->be->sync(pass->be);
    if (!p->failed) p->failed = st;
    const double now = bm_now();
    p->times.stage[stage] += now - p->since;
    p->since = now;
    if (stage != BM_STAGE_HEAD) return;     /* the last one of a chunk */
    p->times.chunks++;
    p->times.weight_bytes += p->dense_bytes;
}

void bm_profile_experts(const bm_pass *pass, int l) {
    bm_profile *p = pass->profile;
    if (!p) return;
    const int X = pass->config->layer[l].n_experts;
    pass->be->get(pass->be, p->first, pass->acts[l].first, sizeof *p->first * ((size_t)X + 1));
    bm_profile_mark(pass, BM_STAGE_NORM);
    p->times.moe_layers++;
    for (int e = 0; e < X; e++) {
        if (p->first[e + 1] == p->first[e]) continue;
        p->times.experts++;
        p->times.layer_experts[l]++;
        p->times.weight_bytes += expert_bytes(pass, l, e);
    }
}

bm_status bm_profile_stop(bm_session *s) {
    bm_profile *p = s->pass.profile;
    if (!p) return BM_OK;
    p->times.waiting += s->be->waited(s->be, false);
    return p->failed;
}
