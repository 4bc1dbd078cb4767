/* src/model/backward.c - forward.c read from the bottom up.  Room: model.
 *
 * In: a pass that has run, the gradient of its last residual stream.  Out: gradients of every parameter,
 * added to those there, and of the embedded rows. */
#include "model/model.h"

#define G(p) ((float *)(uintptr_t)(p))       /* a gradient lies where bm_weights has a const weight */

static void *data_of(const bm_tensor *t) { return (void *)(uintptr_t)t->data; }

/* d.norm (M,D) = gradient of norm, through Mamba. */
static void mamba_back(const bm_pass *p, const bm_back *k, int l) {
    const bm_config *c = p->config;
    const bm_layer *w = &p->w->layer[l], *g = &k->g->layer[l];
    const bm_acts *a = &p->acts[l];
    const bm_dacts *d = &k->d;
    bm_backend *be = p->be;
    const int M = p->M, I = c->d_inner, N = c->d_state, R = c->dt_rank, B = R + 2 * N;
    float *conv_state = k->before + p->state_at[l], *ssm_state = conv_state + (size_t)(c->d_conv - 1) * (size_t)I;

    be->linear_back(be, &(bm_op_linear){ .M = M, .ldx = I, .w = &w->out, .x = a->y, .arith = p->arith, .dy = k->dsum, .dx = d->y,
                                         .dw = data_of(&g->out), .dbias = G(g->out_bias) });
    be->scan_back(be, &(bm_op_scan){ .M = M, .Q = p->Q, .start = p->start, .slot = p->slot, .I = I, .N = N, .ldz = 2 * I, .ldbc = B,
                                     .u = a->u, .dt = a->dt, .dt_bias = w->dt_bias, .A = w->A, .B = a->xdbl + R,
                                     .C = a->xdbl + R + N, .D = w->D, .z = a->xz + I, .state = ssm_state, .stride = p->stride,
                                     .kept = a->kept, .dy = d->y, .du = d->u, .ddt = d->dt, .dz = d->xz + I, .dB = d->xdbl + R,
                                     .dC = d->xdbl + R + N, .ddt_bias = G(g->dt_bias), .dA_log = G(g->A), .dD = G(g->D),
                                     .work = d->scan_work });
    be->linear_back(be, &(bm_op_linear){ .M = M, .ldx = B, .w = &w->dt, .x = a->xdbl, .arith = p->arith, .dy = d->dt, .dx = d->xdbl,
                                         .dw = data_of(&g->dt) });
    be->linear_back(be, &(bm_op_linear){ .M = M, .ldx = I, .w = &w->x, .x = a->u, .arith = p->arith, .dy = d->xdbl, .dx = d->u,
                                         .add_dx = true, .dw = data_of(&g->x) });
    be->conv_back(be, &(bm_op_conv){ .Q = p->Q, .start = p->start, .slot = p->slot, .I = I, .K = c->d_conv, .ldx = 2 * I,
                                     .x = a->xz, .weight = w->conv, .bias = w->conv_bias, .state = conv_state, .stride = p->stride,
                                     .dy = d->u, .dx = d->xz, .dweight = G(g->conv), .dbias = G(g->conv_bias) });
    be->linear_back(be, &(bm_op_linear){ .M = M, .ldx = c->d_model, .w = &w->in, .x = a->norm, .arith = p->arith, .dy = d->xz,
                                         .dx = d->norm, .dw = data_of(&g->in), .dbias = G(g->in_bias) });
}

/* d.norm (M,D) = gradient of norm, through attention. */
static void attention_back(const bm_pass *p, const bm_back *k, int l) {
    const bm_layer *w = &p->w->layer[l], *g = &k->g->layer[l];
    const bm_acts *a = &p->acts[l];
    const bm_dacts *d = &k->d;
    const int D = p->config->d_model;
    bm_op_attention op = bm_attention_op(p, l);
    op.state = k->before + p->state_at[l];
    op.dy = d->y;
    op.dqkv = d->xz;
    p->be->linear_back(p->be, &(bm_op_linear){ .M = p->M, .ldx = D, .w = &w->out, .x = a->y, .arith = p->arith, .dy = k->dsum,
                                               .dx = d->y, .dw = data_of(&g->out), .dbias = G(g->out_bias) });
    p->be->attention_back(p->be, &op);
    p->be->linear_back(p->be, &(bm_op_linear){ .M = p->M, .ldx = D, .w = &w->in, .x = a->norm, .arith = p->arith, .dy = d->xz,
                                               .dx = d->norm, .dw = data_of(&g->in), .dbias = G(g->in_bias) });
}

static void mixer_back(const bm_pass *p, const bm_back *k, int l) {
    if (p->config->layer[l].mixer == BM_MIXER_MAMBA) mamba_back(p, k, l);
    else attention_back(p, k, l);
}

/* d.norm (M,D) = gradient of the ffn's input, through every choice of experts and the router. */
static void ffn_back(const bm_pass *p, const bm_back *k, int l) {
    const bm_config *c = p->config;
    const bm_layer_config *kind = &c->layer[l];
    const bm_layer *w = &p->w->layer[l], *g = &k->g->layer[l];
    const bm_acts *a = &p->acts[l];
    const bm_dacts *d = &k->d;
    bm_backend *be = p->be;
    const size_t M = (size_t)p->M, X = (size_t)kind->n_experts, F = (size_t)kind->d_ff;
    const bool moe = kind->ffn == BM_FFN_MOE;
    const float *x = bm_layer_parallel(kind) ? a->ffn_norm : a->norm;
    const int choices = moe ? c->top_k : 1;

    for (size_t j = 0; j < (size_t)choices; j++) {
        const bm_op_route route = { .M = p->M, .X = kind->n_experts, .k = 1, .expert = a->expert + j * M, .order = a->order + j * M,
                                    .first = a->first + j * (X + 1), .gate = a->gate + j * M };
        const bm_op_experts e = { .M = p->M, .D = c->d_model, .F = kind->d_ff, .X = kind->n_experts, .activation = c->activation,
                                  .arith = p->arith, .route = moe ? &route : NULL, .gate = w->gate, .up = w->up, .down = w->down,
                                  .gate_bias = w->gate_bias, .up_bias = w->up_bias, .down_bias = w->down_bias, .x = x,
                                  .hidden = a->hidden + j * M * 2 * F, .act = a->act + j * M * F, .dy = k->dsum, .dx = d->norm,
                                  .add_dx = j > 0, .dgate = moe ? d->gate + j * M : NULL, .dw_gate = g->gate, .dw_up = g->up,
                                  .dw_down = g->down, .db_gate = G(g->gate_bias), .db_up = G(g->up_bias),
                                  .db_down = G(g->down_bias), .dhidden = d->hidden, .dact = d->act };
        if (moe && p->experts) p->experts->backward(p->experts, be, l, &e);
        else be->experts_back(be, &e);
    }
    if (!moe) return;
    be->route_back(be, &(bm_op_route){ .M = p->M, .X = kind->n_experts, .k = choices, .rule = c->routing, .logits = a->logits,
                                       .expert = a->expert, .order = a->order, .first = a->first, .gate = a->gate,
                                       .balance = p->balance, .G = p->G, .group = p->group, .sweeps = a->sweeps, .loss = a->loss,
                                       .dgate = d->gate, .dlogits = d->logits, .loss_scale = p->loss_scale });
    be->linear_back(be, &(bm_op_linear){ .M = p->M, .ldx = c->d_model, .w = &w->router, .x = x, .arith = BM_ARITH_F32,
                                         .dy = d->logits, .dx = d->norm, .add_dx = true, .dw = data_of(&g->router),
                                         .dbias = G(g->router_bias) });
}

static void norm_back(const bm_pass *p, const bm_back *k, int l, float *into, const float *weight, const float *dweight) {
    p->be->norm_back(p->be, &(bm_op_norm){ .M = p->M, .D = p->config->d_model, .eps = p->config->norm_eps, .weight = weight,
                                           .sum = p->acts[l].sum, .dy = k->d.norm, .dsum = into, .dweight = G(dweight) });
}

/* Layer l's activations again, from its sum; states as they were before. */
static void recompute(const bm_pass *p, const bm_back *k, int l) {
    bm_pass again = *p;
    if (k->slots) p->be->copy(p->be, k->scratch, k->before, (size_t)k->slots * p->stride * sizeof(float));
    again.state = k->scratch;
    bm_forward_block(&again, l);
}

/* The residual stream passes its gradient on unchanged; each block adds what came through its norm.  A parallel
 * block's halves both read dsum as it came, so what the first adds waits in another buffer. */
static void block_back(const bm_pass *p, const bm_back *k, int l) {
    const bm_layer_config *kind = &p->config->layer[l];
    const bm_layer *w = &p->w->layer[l], *g = &k->g->layer[l];
    const size_t bytes = (size_t)p->M * (size_t)p->config->d_model * sizeof(float);
    if (bm_layer_parallel(kind)) {
        p->be->copy(p->be, k->waiting, k->dsum, bytes);
        ffn_back(p, k, l);
        norm_back(p, k, l, k->waiting, w->ffn_norm, g->ffn_norm);
        mixer_back(p, k, l);
        norm_back(p, k, l, k->waiting, w->norm, g->norm);
        p->be->copy(p->be, k->dsum, k->waiting, bytes);
        return;
    }
    if (kind->mixer) mixer_back(p, k, l);
    else ffn_back(p, k, l);
    norm_back(p, k, l, k->dsum, w->norm, g->norm);
}

void bm_backward_layers(const bm_pass *p, const bm_back *k) {
    for (int l = p->config->n_layers - 1; l >= 0; l--) {
        if (k->recompute) recompute(p, k, l);
        block_back(p, k, l);
        if (k->ready) k->ready(k->user, l);
    }
    p->be->embed_back(p->be, &(bm_op_embed){ .M = p->M, .table = &p->w->embedding, .token = p->token, .dy = k->dsum,
                                             .dtable = data_of(&k->g->embedding) });
    if (k->ready) k->ready(k->user, -1);
}
