/* src/model/forward.c - the network, written once.  Room: model.
 *
 * In: M rows of tokens of Q sequences, their states.  Out: the residual stream after the last layer.
 * Reads weights and activations as opaque pointers and asks the backend for every number.  The same
 * code is prefill, ragged batches, decode of any subset of slots, and the forward of training. */
#include "model/model.h"

bm_widths bm_config_widths(const bm_config *c) {
    bm_widths w = { .X = 1, .F = 1, .most = (size_t)c->d_model, .read = (size_t)c->n_vocab * (size_t)c->d_model };
    for (int l = 0; l < c->n_layers; l++) {
        const bm_layer_config *k = &c->layer[l];
        const size_t D = (size_t)c->d_model, I = (size_t)c->d_inner, X = (size_t)k->n_experts, F = (size_t)k->d_ff;
        const bool mamba = k->mixer == BM_MIXER_MAMBA, attention = k->mixer == BM_MIXER_ATTENTION;
        const size_t qkv = attention ? D + 2 * (size_t)c->n_kv_heads * (D / (size_t)c->n_heads) : 0;
        const size_t xz = mamba ? 2 * I : qkv, y = mamba ? I : attention ? D : 0, xdbl = (size_t)c->dt_rank + 2 * (size_t)c->d_state;
        if (mamba) w.inner = I;
        if (mamba) w.xdbl = xdbl;
        if (xz > w.xz) w.xz = xz;
        if (y > w.y) w.y = y;
        if (X > w.X) w.X = X;
        if (F > w.F) w.F = F;
        const size_t read[] = { D * xz, I * xdbl, D * y, X * F * D * (c->gated ? 2 : 1) };
        for (int i = 0; i < 4; i++) if (read[i] > w.read) w.read = read[i];
    }
    if (w.xz > w.most) w.most = w.xz;
    if (w.xdbl > w.most) w.most = w.xdbl;
    if (w.F > w.most) w.most = w.F;
    return w;
}

size_t bm_state_floats(const bm_config *c, size_t *at) {
    size_t n = 0;
    for (int l = 0; l < c->n_layers; l++) {
        if (at) at[l] = n;
        if (c->layer[l].mixer == BM_MIXER_MAMBA) n += (size_t)c->d_inner * (size_t)(c->d_conv - 1 + c->d_state);
        if (c->layer[l].mixer == BM_MIXER_ATTENTION)
            n += bm_attention_floats(c->n_kv_heads, c->d_model / c->n_heads, bm_attention_window(c));
    }
    return n;
}

/* out (M,D) = Mamba(norm (M,D)).  Gu & Dao 2023 (arXiv 2312.00752), algorithm 2. */
static void mamba_forward(const bm_pass *p, int l) {
    const bm_config *c = p->config;
    const bm_layer *w = &p->w->layer[l];
    const bm_acts *a = &p->acts[l];
    bm_backend *be = p->be;
    const int M = p->M, I = c->d_inner, N = c->d_state, R = c->dt_rank, B = R + 2 * N;
    float *conv_state = p->state + p->state_at[l], *ssm_state = conv_state + (size_t)(c->d_conv - 1) * (size_t)I;

    be->linear(be, &(bm_op_linear){ .M = M, .ldx = c->d_model, .w = &w->in, .x = a->norm, .bias = w->in_bias, .y = a->xz,
                                    .arith = p->arith });                           /* xz (M,2I): x | z */
    bm_profile_mark(p, BM_STAGE_PROJECTIONS);
    be->conv(be, &(bm_op_conv){ .M = M, .Q = p->Q, .start = p->start, .slot = p->slot, .I = I, .K = c->d_conv, .ldx = 2 * I, .x = a->xz,
                                .weight = w->conv, .bias = w->conv_bias, .y = a->u, .state = conv_state, .stride = p->stride });
    bm_profile_mark(p, BM_STAGE_CONV);
    be->linear(be, &(bm_op_linear){ .M = M, .ldx = I, .w = &w->x, .x = a->u, .y = a->xdbl, .arith = p->arith });
    be->linear(be, &(bm_op_linear){ .M = M, .ldx = B, .w = &w->dt, .x = a->xdbl, .y = a->dt, .arith = p->arith });
    bm_profile_mark(p, BM_STAGE_PROJECTIONS);
    be->scan(be, &(bm_op_scan){ .M = M, .Q = p->Q, .start = p->start, .slot = p->slot, .I = I, .N = N, .ldz = 2 * I, .ldbc = B, .u = a->u,
                                .dt = a->dt, .dt_bias = w->dt_bias, .A = w->A, .B = a->xdbl + R, .C = a->xdbl + R + N, .D = w->D,
                                .z = a->xz + I, .y = a->y, .state = ssm_state, .stride = p->stride, .kept = a->kept });
    bm_profile_mark(p, BM_STAGE_SCAN);
    be->linear(be, &(bm_op_linear){ .M = M, .ldx = I, .w = &w->out, .x = a->y, .bias = w->out_bias, .y = p->out,
                                    .arith = p->arith });
    bm_profile_mark(p, BM_STAGE_PROJECTIONS);
}

bm_op_attention bm_attention_op(const bm_pass *p, int l) {
    const bm_config *c = p->config;
    return (bm_op_attention){ .M = p->M, .Q = p->Q, .start = p->start, .slot = p->slot, .H = c->n_heads, .G = c->n_kv_heads,
                              .E = c->d_model / c->n_heads, .window = bm_attention_window(c), .rope_base = c->rope_base,
                              .qkv = p->acts[l].xz, .y = p->acts[l].y, .state = p->state + p->state_at[l], .stride = p->stride };
}

/* out (M,D) = causal attention of norm (M,D), heads of keys and values shared (arXiv 2305.13245). */
static void attention_forward(const bm_pass *p, int l) {
    const bm_layer *w = &p->w->layer[l];
    const bm_acts *a = &p->acts[l];
    const bm_op_attention op = bm_attention_op(p, l);
    const int D = p->config->d_model;
    p->be->linear(p->be, &(bm_op_linear){ .M = p->M, .ldx = D, .w = &w->in, .x = a->norm, .bias = w->in_bias, .y = a->xz,
                                          .arith = p->arith });
    bm_profile_mark(p, BM_STAGE_PROJECTIONS);
    p->be->attention(p->be, &op);
    bm_profile_mark(p, BM_STAGE_SCAN);
    p->be->linear(p->be, &(bm_op_linear){ .M = p->M, .ldx = D, .w = &w->out, .x = a->y, .bias = w->out_bias, .y = p->out,
                                          .arith = p->arith });
    bm_profile_mark(p, BM_STAGE_PROJECTIONS);
}

/* out (M,D) (+)= gate * expert[argmax](norm), or a dense MLP.  arXiv 2402.01771, section 3; docs/MODEL.md. */
static void ffn_forward(const bm_pass *p, int l) {
    const bm_config *c = p->config;
    const bm_layer_config *k = &c->layer[l];
    const bm_layer *w = &p->w->layer[l];
    const bm_acts *a = &p->acts[l];
    bm_backend *be = p->be;
    const size_t M = (size_t)p->M, X = (size_t)k->n_experts, F = (size_t)k->d_ff;
    const bool moe = k->ffn == BM_FFN_MOE;
    const float *x = bm_layer_parallel(k) ? a->ffn_norm : a->norm;
    const int choices = moe ? c->top_k : 1;

    if (moe) {
        be->linear(be, &(bm_op_linear){ .M = p->M, .ldx = c->d_model, .w = &w->router, .x = x, .bias = w->router_bias,
                                        .y = a->logits, .arith = BM_ARITH_F32 });
        be->route(be, &(bm_op_route){ .M = p->M, .X = k->n_experts, .k = choices, .rule = c->routing, .logits = a->logits,
                                      .expert = a->expert, .order = a->order, .first = a->first, .gate = a->gate,
                                      .balance = p->balance, .G = p->G, .group = p->group, .sweeps = a->sweeps, .loss = a->loss });
        bm_profile_experts(p, l);
    }
    for (size_t j = 0; j < (size_t)choices; j++) {      /* choice j of every row, added to those before it */
        const bm_op_route route = { .M = p->M, .X = k->n_experts, .k = 1, .expert = a->expert + j * M, .order = a->order + j * M,
                                    .first = a->first + j * (X + 1), .gate = a->gate + j * M };
        const bm_op_experts e = { .M = p->M, .D = c->d_model, .F = k->d_ff, .X = k->n_experts, .activation = c->activation,
                                  .arith = p->arith, .route = moe ? &route : NULL, .gate = w->gate, .up = w->up, .down = w->down,
                                  .gate_bias = w->gate_bias, .up_bias = w->up_bias, .down_bias = w->down_bias, .x = x,
                                  .hidden = a->hidden + j * M * 2 * F, .act = a->act ? a->act + j * M * F : NULL, .y = p->out,
                                  .accumulate = j > 0 || bm_layer_parallel(k) };
        if (moe && p->experts) p->experts->forward(p->experts, be, l, &e);
        else be->experts(be, &e);
    }
    bm_profile_mark(p, BM_STAGE_EXPERTS);
}

/* out = block(norm(sum)); a parallel block's halves have their own norms of the same residual. */
static void block_after_norm(const bm_pass *p, int l) {
    const bm_config *c = p->config;
    if (c->layer[l].mixer == BM_MIXER_MAMBA) mamba_forward(p, l);
    if (c->layer[l].mixer == BM_MIXER_ATTENTION) attention_forward(p, l);
    if (bm_layer_parallel(&c->layer[l])) {
        p->be->norm(p->be, &(bm_op_norm){ .M = p->M, .D = c->d_model, .eps = c->norm_eps, .residual = p->acts[l].sum,
                                          .weight = p->w->layer[l].ffn_norm, .y = p->acts[l].ffn_norm });
        bm_profile_mark(p, BM_STAGE_NORM);
    }
    if (c->layer[l].ffn) ffn_forward(p, l);
}

void bm_forward_block(const bm_pass *p, int l) {
    p->be->norm(p->be, &(bm_op_norm){ .M = p->M, .D = p->config->d_model, .eps = p->config->norm_eps, .residual = p->acts[l].sum,
                                      .weight = p->w->layer[l].norm, .y = p->acts[l].norm });
    block_after_norm(p, l);
}

/* The residual stream is f32: sum_l = out_{l-1} + sum_{l-1}; out_l = block(norm(sum_l)). */
void bm_forward_layers(const bm_pass *p) {
    const bm_config *c = p->config;
    bm_backend *be = p->be;

    be->embed(be, &(bm_op_embed){ .M = p->M, .table = &p->w->embedding, .token = p->token, .y = p->out });
    for (int l = 0; l < c->n_layers; l++) {
        be->norm(be, &(bm_op_norm){ .M = p->M, .D = c->d_model, .eps = c->norm_eps, .x = p->out,
                                    .residual = l ? p->acts[l - 1].sum : NULL, .weight = p->w->layer[l].norm, .sum = p->acts[l].sum,
                                    .y = p->acts[l].norm });
        bm_profile_mark(p, BM_STAGE_NORM);
        block_after_norm(p, l);
    }
}
