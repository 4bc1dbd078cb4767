/* src/model/forward.c - the network, written once.  Room: model.
 *
 * In: M rows of tokens of Q sequences, their states.  Out: the residual stream after the last layer.
 * Reads weights and activations as opaque pointers and asks the backend for every number.  The same
 * code is prefill, ragged batches and decode of any subset of slots. */
#include "model/model.h"

/* out (M,D) = Mamba(norm (M,D)).  Gu & Dao 2023 (arXiv 2312.00752), algorithm 2. */
static void mamba_forward(bm_session *s, int l, int M, int Q) {
    const bm_config *c = &s->m->config;
    const bm_layer *p = &s->m->w.layer[l];
    const bm_work *w = &s->w;
    bm_backend *be = s->be;
    const int I = c->d_inner, N = c->d_state, R = c->dt_rank, B = R + 2 * N;
    float *conv_state = s->state + s->state_at[l], *ssm_state = conv_state + (size_t)(c->d_conv - 1) * (size_t)I;

    be->linear(be, &(bm_op_linear){ .M = M, .ldx = c->d_model, .w = &p->in, .x = w->norm, .bias = p->in_bias, .y = w->xz,
                                    .arith = s->arith });                           /* xz (M,2I): x | z */
    bm_profile_mark(s, BM_STAGE_PROJECTIONS);
    be->conv(be, &(bm_op_conv){ .Q = Q, .start = w->start, .slot = w->slot, .I = I, .K = c->d_conv, .ldx = 2 * I, .x = w->xz,
                                .weight = p->conv, .bias = p->conv_bias, .y = w->u, .state = conv_state, .stride = s->stride });
    bm_profile_mark(s, BM_STAGE_CONV);
    be->linear(be, &(bm_op_linear){ .M = M, .ldx = I, .w = &p->x, .x = w->u, .y = w->xdbl, .arith = s->arith });
    be->linear(be, &(bm_op_linear){ .M = M, .ldx = B, .w = &p->dt, .x = w->xdbl, .y = w->dt, .arith = s->arith });
    bm_profile_mark(s, BM_STAGE_PROJECTIONS);
    be->scan(be, &(bm_op_scan){ .Q = Q, .start = w->start, .slot = w->slot, .I = I, .N = N, .ldz = 2 * I, .ldbc = B, .u = w->u,
                                .dt = w->dt, .dt_bias = p->dt_bias, .A = p->A, .B = w->xdbl + R, .C = w->xdbl + R + N, .D = p->D,
                                .z = w->xz + I, .y = w->u, .state = ssm_state, .stride = s->stride });
    bm_profile_mark(s, BM_STAGE_SCAN);
    be->linear(be, &(bm_op_linear){ .M = M, .ldx = I, .w = &p->out, .x = w->u, .bias = p->out_bias, .y = w->out,
                                    .arith = s->arith });
    bm_profile_mark(s, BM_STAGE_PROJECTIONS);
}

/* out (M,D) (+)= gate * expert[argmax](norm), or a dense MLP.  arXiv 2402.01771, section 3; running rule of docs/MODEL.md. */
static void ffn_forward(bm_session *s, int l, int M) {
    const bm_config *c = &s->m->config;
    const bm_layer_config *k = &c->layer[l];
    const bm_layer *p = &s->m->w.layer[l];
    const bm_work *w = &s->w;
    bm_backend *be = s->be;
    const bm_op_route route = { .M = M, .X = k->n_experts, .k = 1, .rule = c->routing, .logits = w->logits, .expert = w->expert,
                                .order = w->order, .first = w->first, .gate = w->gate };
    const bool moe = k->ffn == BM_FFN_MOE;

    if (moe) {
        be->linear(be, &(bm_op_linear){ .M = M, .ldx = c->d_model, .w = &p->router, .x = w->norm, .bias = p->router_bias,
                                        .y = w->logits, .arith = BM_ARITH_F32 });
        be->route(be, &route);
        bm_profile_experts(s, l);
    }
    be->experts(be, &(bm_op_experts){ .M = M, .D = c->d_model, .F = k->d_ff, .X = k->n_experts, .activation = c->activation,
                                      .arith = s->arith, .route = moe ? &route : NULL, .gate = p->gate, .up = p->up,
                                      .down = p->down, .gate_bias = p->gate_bias, .up_bias = p->up_bias,
                                      .down_bias = p->down_bias, .x = w->norm, .hidden = w->hidden, .y = w->out,
                                      .accumulate = bm_layer_parallel(k) });
    bm_profile_mark(s, BM_STAGE_EXPERTS);
}

/* The residual stream is f32: sum_l = out_{l-1} + sum_{l-1}; out_l = block(norm(sum_l)). */
void bm_forward_layers(bm_session *s, int M, int Q) {
    const bm_config *c = &s->m->config;
    const bm_work *w = &s->w;
    bm_backend *be = s->be;

    be->embed(be, &(bm_op_embed){ .M = M, .table = &s->m->w.embedding, .token = w->token, .y = w->out });
    for (int l = 0; l < c->n_layers; l++) {
        const bm_layer *p = &s->m->w.layer[l];
        bm_op_norm norm = { .M = M, .D = c->d_model, .eps = c->norm_eps, .x = w->out, .residual = l ? w->sum : NULL,
                            .weight = p->norm, .sum = w->sum, .y = w->norm };
        be->norm(be, &norm);
        bm_profile_mark(s, BM_STAGE_NORM);
        if (c->layer[l].mixer) mamba_forward(s, l, M, Q);
        if (bm_layer_parallel(&c->layer[l])) {          /* the other half: its own norm of the same residual */
            norm = (bm_op_norm){ .M = M, .D = c->d_model, .eps = c->norm_eps, .residual = w->sum, .weight = p->ffn_norm, .y = w->norm };
            be->norm(be, &norm);
            bm_profile_mark(s, BM_STAGE_NORM);
        }
        if (c->layer[l].ffn) ffn_forward(s, l, M);
    }
}
