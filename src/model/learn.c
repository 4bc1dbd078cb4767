/* src/model/learn.c - memory and steps of training on one device.  Room: model.
 *
 * In: micro-batches of packed texts.  Out: losses, and gradients added to an arena.  Knows no optimizer, no
 * step, no data: whoever owns a bm_learner changes master and calls bm_learner_refresh. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>

enum { HEAD_ROWS = 512 };       /* rows whose logits exist at a time */

/* ---- memory ------------------------------------------------------------------------------------- */

/* Walks through what a learner needs: counts it, or allocates it too. */
typedef struct needs { bm_learner *l; uint64_t bytes; bool allocate; bm_status s; } needs;

static void need(needs *w, void *out, size_t n, size_t size) {
    void *p = NULL;
    uint64_t bytes;
    memset(out, 0, sizeof p);
    if (w->s) return;
    if (!bm_mul(n, size, &bytes) || !bm_add(w->bytes, bytes, &w->bytes)) w->s = bm_fail_memory(SIZE_MAX, "training");
    if (w->s || !w->allocate) return;
    bm_learner *l = w->l;
    w->s = bm_grow(&l->owned, &l->cap_owned, l->n_owned + 1, sizeof *l->owned, "training");
    if (!w->s) w->s = l->be->alloc(l->be, &p, bytes, "training");
    if (w->s) return;
    l->owned[l->n_owned++] = p;
    memcpy(out, &p, sizeof p);
}
static void floats(needs *w, void *out, size_t n) { need(w, out, n, sizeof(float)); }
static void ints(needs *w, void *out, size_t n) { need(w, out, n, sizeof(int32_t)); }

/* Activations of one layer, or of every kind of layer at once (k NULL). */
static void need_acts(needs *w, bm_acts *a, const bm_layer_config *k) {
    const bm_config *c = w->l->config;
    const bm_learner_options *o = &w->l->opt;
    const bm_widths full = bm_config_widths(c);
    const size_t M = (size_t)o->rows, D = (size_t)c->d_model, top = (size_t)c->top_k, N = (size_t)c->d_state, G = (size_t)o->groups;
    const size_t states = M / BM_SCAN_CHUNK + (size_t)o->sequences + 1;
    const bool mixer = !k || k->mixer, mamba = !k || k->mixer == BM_MIXER_MAMBA, ffn = !k || k->ffn;
    const size_t inner = mamba ? full.inner : 0, F = k ? (size_t)k->d_ff : full.F, X = k ? (size_t)k->n_experts : full.X;
    floats(w, &a->norm, M * D);
    if (!k || bm_layer_parallel(k)) floats(w, &a->ffn_norm, M * D);
    if (mixer) {
        floats(w, &a->xz, M * full.xz);
        floats(w, &a->u, M * inner);
        floats(w, &a->xdbl, mamba ? M * full.xdbl : 0);
        floats(w, &a->dt, M * inner);
        floats(w, &a->y, M * full.y);
        floats(w, &a->kept, states * inner * N);
    }
    if (!ffn) return;
    floats(w, &a->logits, M * X);
    floats(w, &a->gate, top * M);
    floats(w, &a->hidden, top * M * 2 * F);
    floats(w, &a->act, top * M * F);
    floats(w, &a->loss, 2 * G);
    ints(w, &a->expert, top * M);
    ints(w, &a->order, top * M);
    ints(w, &a->first, top * (X + 1));
    ints(w, &a->sweeps, G);
}

static void need_back(needs *w) {
    bm_learner *l = w->l;
    const bm_config *c = l->config;
    const bm_widths full = bm_config_widths(c);
    const size_t M = (size_t)l->opt.rows, D = (size_t)c->d_model, S = l->opt.slots ? (size_t)l->opt.slots : 1;
    bm_back *k = &l->back;
    bool parallel = false;
    for (int i = 0; i < c->n_layers; i++) parallel |= bm_layer_parallel(&c->layer[i]);
    floats(w, &k->d.norm, M * D);
    floats(w, &k->d.xz, M * full.xz);
    floats(w, &k->d.u, M * full.inner);
    floats(w, &k->d.xdbl, M * full.xdbl);
    floats(w, &k->d.dt, M * full.inner);
    floats(w, &k->d.y, M * full.y);
    floats(w, &k->d.logits, M * full.X);
    floats(w, &k->d.gate, (size_t)c->top_k * M);
    floats(w, &k->d.hidden, M * 2 * full.F);
    floats(w, &k->d.act, M * full.F);
    floats(w, &k->d.scan_work, full.inner ? l->be->scan_back_floats(l->be, l->opt.rows, c->d_inner, c->d_state) : 0);
    floats(w, &k->dsum, M * D);
    floats(w, &k->waiting, parallel ? M * D : 0);
    floats(w, &l->pass.state, S * l->pass.stride);
    floats(w, &k->before, S * l->pass.stride);
    floats(w, &k->scratch, l->opt.recompute ? S * l->pass.stride : 0);
}

static void need_all(needs *w) {
    bm_learner *l = w->l;
    const bm_config *c = l->config;
    const size_t M = (size_t)l->opt.rows, Q = (size_t)l->opt.sequences, D = (size_t)c->d_model, L = (size_t)c->n_layers;
    const size_t block = M < HEAD_ROWS ? M : HEAD_ROWS;
    bm_acts shared = { 0 };
    floats(w, &l->master, l->arena.n);
    floats(w, &l->grad, l->arena.n);
    floats(w, &l->A, L * bm_config_widths(c).inner * (size_t)c->d_state);
    if (l->opt.arith == BM_ARITH_NATIVE) need(w, &l->half, l->arena.n, sizeof *l->half);
    ints(w, &l->pass.token, M);
    ints(w, &l->target, M);
    ints(w, &l->pass.start, Q + 1);
    ints(w, &l->pass.slot, Q);
    ints(w, &l->pass.group, (size_t)l->opt.groups + 1);
    floats(w, &l->pass.out, M * D);
    floats(w, &l->loss, M);
    floats(w, &l->final_norm, M * D);
    floats(w, &l->final_sum, M * D);
    floats(w, &l->head, block * (size_t)c->n_vocab);
    if (l->opt.recompute) need_acts(w, &shared, NULL);
    for (int i = 0; i < c->n_layers; i++) {
        bm_acts one = shared;
        if (!l->opt.recompute) need_acts(w, &one, &c->layer[i]);
        floats(w, &one.sum, M * D);
        if (w->allocate) l->pass.acts[i] = one;
    }
    need_back(w);
}

static bm_status check(const bm_config *c, const bm_backend *be, const bm_learner_options *o) {
    BM_TRY(bm_config_check(c, "configuration"));
    if (!be->scan_back || !be->linear_back || !be->experts_back || !be->adamw)
        return bm_fail(BM_ENOSUPPORT, "device %s: found no gradients, expected a device that can train", be->name);
    if (o->rows < 1 || o->sequences < 1 || o->sequences > o->rows || o->groups < 1 || o->groups > o->rows || o->slots < 0)
        return bm_fail(BM_EARG, "training: found %d rows, %d sequences, %d groups and %d slots, expected 1 or more rows, and no more "
                       "sequences and groups than rows", o->rows, o->sequences, o->groups, o->slots);
    return BM_OK;
}

static bm_status reserve(const bm_learner *l) {
    const int rows = l->opt.rows, most = (int)bm_config_widths(l->config).most;
    BM_TRY(l->be->reserve(l->be, rows > HEAD_ROWS ? rows : HEAD_ROWS, most));
    BM_TRY(l->be->reserve_back(l->be, rows, most, most));
    return l->be->reserve_back(l->be, HEAD_ROWS, l->config->n_vocab, l->config->d_model);
}

bm_status bm_learner_bytes(const bm_config *c, bm_backend *be, const bm_learner_options *o, uint64_t *out) {
    bm_learner l = { .config = c, .be = be, .opt = *o };
    BM_TRY(check(c, be, o));
    BM_TRY(bm_arena_open(&l.arena, c));
    l.pass.stride = bm_state_floats(c, NULL);
    needs w = { .l = &l };
    need_all(&w);
    bm_arena_close(&l.arena);
    BM_TRY(w.s);
    BM_TRY(reserve(&l));
    *out = w.bytes + be->reserved(be);
    return BM_OK;
}

/* ---- open, close ---------------------------------------------------------------------------------- */

static bm_status learner_init(bm_learner *l) {
    const bm_config *c = l->config;
    const size_t layers = (size_t)c->n_layers;
    BM_TRY(bm_arena_open(&l->arena, c));
    BM_TRY(bm_weights_alloc(&l->w, c));
    BM_TRY(bm_weights_alloc(&l->g, c));
    BM_TRY(bm_alloc(&l->state_at, layers * sizeof *l->state_at, "training"));
    BM_TRY(bm_alloc(&l->pass.acts, layers * sizeof *l->pass.acts, "training"));
    BM_TRY(bm_alloc(&l->no_slot, (size_t)l->opt.sequences * sizeof *l->no_slot, "training"));
    for (int i = 0; i < l->opt.sequences; i++) l->no_slot[i] = -1;
    l->pass.stride = bm_state_floats(c, l->state_at);
    needs w = { .l = l, .allocate = true };
    need_all(&w);
    BM_TRY(w.s);
    l->bytes = (size_t)w.bytes;
    bm_arena_bind(&l->arena, &l->w, l->master, l->half, l->A);
    bm_arena_bind(&l->arena, &l->g, l->grad, NULL, NULL);
    l->pass.be = l->be;
    l->pass.config = c;
    l->pass.w = &l->w;
    l->pass.arith = l->opt.arith;
    l->pass.state_at = l->state_at;
    l->back.g = &l->g;
    l->back.recompute = l->opt.recompute;
    l->back.slots = l->opt.slots;
    return reserve(l);
}

bm_status bm_learner_open(bm_learner **out, const bm_config *c, bm_backend *be, const bm_learner_options *o) {
    bm_learner *l;
    *out = NULL;
    BM_TRY(check(c, be, o));
    BM_TRY(bm_alloc(&l, sizeof *l, "training"));
    l->config = c;
    l->be = be;
    l->opt = *o;
    const bm_status s = learner_init(l);
    if (s) bm_learner_close(l);
    else *out = l;
    return s;
}

void bm_learner_close(bm_learner *l) {
    if (!l) return;
    for (size_t i = 0; i < l->n_owned; i++) l->be->release(l->be, l->owned[i]);
    free(l->owned);
    free(l->state_at);
    free(l->no_slot);
    free(l->pass.acts);
    bm_weights_free(&l->w, l->config);
    bm_weights_free(&l->g, l->config);
    bm_arena_close(&l->arena);
    free(l);
}

void bm_learner_refresh(bm_learner *l) {
    const size_t n = (size_t)l->config->d_inner * (size_t)l->config->d_state;
    for (int i = 0; i < l->config->n_layers; i++)
        if (l->config->layer[i].mixer == BM_MIXER_MAMBA) {
            const size_t at = (size_t)(l->g.layer[i].A - l->grad);     /* A_log's place */
            l->be->decay(l->be, l->A + (size_t)i * n, l->master + at, n);
        }
    if (l->half) l->be->narrow(l->be, l->half, BM_BF16, l->master, l->arena.n);
}

/* ---- a step --------------------------------------------------------------------------------------- */

/* Final norm, head and loss, the logits of HEAD_ROWS rows at a time; back: also d.norm = gradient of final_norm. */
static void head_and_loss(bm_learner *l, const bm_micro *b, bool back) {
    const bm_config *c = l->config;
    bm_backend *be = l->be;
    be->norm(be, &(bm_op_norm){ .M = b->M, .D = c->d_model, .eps = c->norm_eps, .centered = c->final_norm == BM_LAYERNORM,
                                .x = l->pass.out, .residual = l->pass.acts[c->n_layers - 1].sum, .weight = l->w.final_norm,
                                .bias = l->w.final_norm_bias, .sum = l->final_sum, .y = l->final_norm });
    for (int r = 0; r < b->M; r += HEAD_ROWS) {
        const size_t at = (size_t)r * (size_t)c->d_model;
        bm_op_linear head = { .M = b->M - r < HEAD_ROWS ? b->M - r : HEAD_ROWS, .ldx = c->d_model, .w = &l->w.head,
                              .x = l->final_norm + at, .bias = l->w.head_bias, .y = l->head, .arith = l->opt.arith };
        be->linear(be, &head);
        be->loss(be, &(bm_op_loss){ .M = head.M, .V = c->n_vocab, .logits = l->head, .target = l->target + r, .loss = l->loss + r,
                                    .dlogits = back ? l->head : NULL, .scale = b->scale });
        if (!back) continue;
        head.dy = l->head;
        head.dx = l->back.d.norm + at;
        head.dw = (float *)(uintptr_t)l->g.head.data;
        head.dbias = (float *)(uintptr_t)l->g.head_bias;
        be->linear_back(be, &head);
    }
}

bm_status bm_learner_step(bm_learner *l, const bm_micro *b, bool back) {
    const bm_config *c = l->config;
    bm_backend *be = l->be;
    bm_pass *p = &l->pass;
    const size_t M = (size_t)b->M, Q = (size_t)b->Q;
    if (b->M > l->opt.rows || b->Q > l->opt.sequences || b->G > l->opt.groups)
        return bm_fail(BM_EARG, "micro-batch: found %d rows, %d sequences and %d groups, expected at most %d, %d and %d", b->M, b->Q,
                       b->G, l->opt.rows, l->opt.sequences, l->opt.groups);
    be->put(be, p->token, b->token, M * sizeof *b->token);
    be->put(be, l->target, b->target, M * sizeof *b->target);
    be->put(be, p->start, b->start, (Q + 1) * sizeof *b->start);
    be->put(be, p->group, b->group, ((size_t)b->G + 1) * sizeof *b->group);
    if (b->slot) be->put(be, p->slot, b->slot, Q * sizeof *b->slot);
    else be->put(be, p->slot, l->no_slot, Q * sizeof *p->slot);
    p->M = b->M;
    p->Q = b->Q;
    p->G = b->G;
    p->balance = b->balance;
    p->loss_scale = b->loss_scale;
    if (l->opt.slots) be->copy(be, l->back.before, p->state, (size_t)l->opt.slots * p->stride * sizeof(float));
    bm_forward_layers(p);
    head_and_loss(l, b, back);
    if (back) {
        be->zero(be, l->back.dsum, M * (size_t)c->d_model * sizeof(float));
        be->norm_back(be, &(bm_op_norm){ .M = b->M, .D = c->d_model, .eps = c->norm_eps, .centered = c->final_norm == BM_LAYERNORM,
                                         .weight = l->w.final_norm, .sum = l->final_sum, .dy = l->back.d.norm, .dsum = l->back.dsum,
                                         .dweight = (float *)(uintptr_t)l->g.final_norm,
                                         .dbias = (float *)(uintptr_t)l->g.final_norm_bias });
        bm_backward_layers(p, &l->back);
    }
    return be->sync(be);
}
