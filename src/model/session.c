/* src/model/session.c - slots of constant-size state, and tokens through them.  Room: model.
 *
 * In: tokens for some slots, any lengths.  Out: logits where asked for, states moved on.
 * Rows of all inputs are packed one behind the other, `chunk` at a time, without padding. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>

enum { HEAD_ROWS = 64, MAX_SLOTS = 4096, MAX_CHUNK = 8192 };

/* An input on its way: what of it was fed, and where scores go. */
typedef struct bm_feed {
    const bm_input *in;
    size_t fed;
    float *nll;                 /* bm_score: one per fed token */
} feed;

/* A row of the chunk whose logits somebody wants. */
typedef struct wanted { feed *f; size_t index; } wanted;

/* ---- open, close ---------------------------------------------------------------------------------- */

static bm_status work_alloc(bm_session *s) {
    const bm_config *c = &s->m->config;
    const size_t M = (size_t)s->chunk, D = (size_t)c->d_model, V = (size_t)c->n_vocab, k = (size_t)c->top_k;
    const bm_widths w = bm_config_widths(c);
    bm_pass *p = &s->pass;
    bm_acts *a = &s->acts;
    const struct { void *out; size_t n; } want[] = {
        { &p->token, M }, { &p->start, M + 1 }, { &p->slot, M }, { &p->out, M * D }, { &a->sum, M * D }, { &a->norm, M * D },
        { &a->xz, M * w.xz }, { &a->u, M * (w.inner > w.y ? w.inner : w.y) }, { &a->xdbl, M * w.xdbl }, { &a->dt, M * w.inner },
        { &a->logits, M * w.X }, { &a->gate, k * M }, { &a->hidden, k * M * 2 * w.F }, { &a->expert, k * M }, { &a->order, k * M },
        { &a->first, k * (w.X + 1) }, { &s->head_in, HEAD_ROWS * D }, { &s->head_out, HEAD_ROWS * V }, { &s->head_loss, HEAD_ROWS },
        { &s->head_target, HEAD_ROWS }, { &p->state, (size_t)s->slots * p->stride },
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        BM_TRY(s->be->alloc(s->be, want[i].out, want[i].n * sizeof(float), "a session"));
    a->y = a->u;
    a->ffn_norm = a->norm;
    for (int l = 0; l < c->n_layers; l++) p->acts[l] = *a;
    return s->be->reserve(s->be, s->chunk > HEAD_ROWS ? s->chunk : HEAD_ROWS, (int)w.most);
}

static void work_free(bm_session *s) {
    if (s->be->forget) s->be->forget(s->be, s);
    const bm_pass *p = &s->pass;
    const bm_acts *a = &s->acts;
    void *const all[] = { p->token, p->start, p->slot, p->out, a->sum, a->norm, a->xz, a->u, a->xdbl, a->dt, a->logits, a->gate,
                          a->hidden, a->expert, a->order, a->first, s->head_in, s->head_out, s->head_loss, s->head_target, p->state };
    for (size_t k = 0; k < sizeof all / sizeof *all; k++)
        if (all[k]) s->be->release(s->be, all[k]);
}

static bm_status session_init(bm_session *s) {
    const bm_config *c = &s->m->config;
    const size_t layers = (size_t)c->n_layers;
    s->pass = (bm_pass){ .be = s->be, .config = c, .w = &s->m->w, .arith = s->arith };
    BM_TRY(bm_alloc(&s->state_at, sizeof *s->state_at * layers, "a session"));
    BM_TRY(bm_alloc(&s->pass.acts, sizeof *s->pass.acts * layers, "a session"));
    s->pass.stride = bm_state_floats(c, s->state_at);
    s->pass.state_at = s->state_at;
    BM_TRY(bm_alloc(&s->host, sizeof *s->host * (3 * (size_t)s->chunk + 1), "a session"));
    BM_TRY(bm_alloc(&s->feeds, sizeof *s->feeds * (size_t)s->slots, "a session"));
    BM_TRY(bm_alloc(&s->has_logits, sizeof *s->has_logits * (size_t)s->slots, "a session"));
    BM_TRY(bm_alloc(&s->logits, sizeof *s->logits * (size_t)s->slots * (size_t)c->n_vocab, "logits"));
    return work_alloc(s);
}

bm_status bm_session_open(bm_session **out, const bm_model *m, const bm_session_options *opt) {
    *out = NULL;
    const bm_session_options o = opt ? *opt : (bm_session_options){ 0 };
    if (o.slots < 0 || o.slots > MAX_SLOTS) return bm_fail(BM_EARG, "slots: found %d, expected 1 to %d", o.slots, MAX_SLOTS);
    if (o.chunk < 0 || o.chunk > MAX_CHUNK) return bm_fail(BM_EARG, "chunk: found %d, expected 1 to %d", o.chunk, MAX_CHUNK);
    if ((unsigned)o.arith > BM_ARITH_F32) return bm_fail(BM_EARG, "arith: found %d, expected f32 or native", (int)o.arith);
    bm_session *s;
    BM_TRY(bm_alloc(&s, sizeof *s, "a session"));
    s->m = m;
    s->be = m->be;
    s->slots = o.slots ? o.slots : 1;
    s->chunk = o.chunk ? o.chunk : 512;
    s->arith = o.arith;
    pthread_mutex_lock(&m->device->lock);
    const bm_status st = session_init(s);
    pthread_mutex_unlock(&m->device->lock);
    if (st) bm_session_close(s);
    else *out = s;
    return st;
}

void bm_session_close(bm_session *s) {
    if (!s) return;
    pthread_mutex_lock(&s->m->device->lock);
    work_free(s);
    pthread_mutex_unlock(&s->m->device->lock);
    free(s->state_at);
    free(s->pass.acts);
    free(s->host);
    free(s->feeds);
    free(s->has_logits);
    free(s->logits);
    free(s->pass.profile);
    free(s);
}

/* ---- head ------------------------------------------------------------------------------------------- */

/* Logits of n <= HEAD_ROWS rows of head_in, to whoever wanted them. */
static bm_status head_rows(bm_session *s, const wanted *w, int n) {
    const bm_config *c = &s->m->config;
    const size_t V = (size_t)c->n_vocab;
    bm_backend *be = s->be;
    float nll[HEAD_ROWS];
    bm_token target[HEAD_ROWS];
    be->linear(be, &(bm_op_linear){ .M = n, .ldx = c->d_model, .w = &s->m->w.head, .x = s->head_in, .bias = s->m->w.head_bias,
                                    .y = s->head_out, .arith = s->arith });
    const bool score = w[0].f->nll != NULL;
    if (score) {
        for (int i = 0; i < n; i++) target[i] = w[i].f->in->tokens[w[i].index + 1];
        be->put(be, s->head_target, target, (size_t)n * sizeof *target);
        be->loss(be, &(bm_op_loss){ .M = n, .V = c->n_vocab, .logits = s->head_out, .target = s->head_target, .loss = s->head_loss });
        be->get(be, nll, s->head_loss, (size_t)n * sizeof *nll);
        for (int i = 0; i < n; i++) w[i].f->nll[w[i].index] = nll[i];
        return BM_OK;
    }
    for (int i = 0; i < n; i++) {
        const bm_input *in = w[i].f->in;
        float *at = s->logits + (size_t)in->slot * V;
        be->get(be, at, s->head_out + (size_t)i * V, V * sizeof *at);
        s->has_logits[in->slot] = true;
        if (in->want != BM_WANT_ALL) continue;
        BM_TRY(be->sync(be));
        const bm_status st = in->fn(in->user, w[i].index, at);
        if (st) return st == BM_ECANCELLED ? bm_fail(st, "stopped by the reader of logits") : st;
    }
    return BM_OK;
}

/* ---- one chunk ---------------------------------------------------------------------------------------- */

static bool wants(const feed *f, size_t index) {
    if (f->nll) return true;
    return f->in->want == BM_WANT_ALL || (f->in->want == BM_WANT_LAST && index + 1 == f->in->n);
}

/* Takes up to `chunk` rows from the inputs, in order; M rows of Q sequences. */
static void pack(bm_session *s, feed *f, int n, bm_token *token, int32_t *start, int32_t *slot, int *M, int *Q) {
    *M = *Q = 0;
    for (int i = 0; i < n && *M < s->chunk; i++) {
        const bm_input *in = f[i].in;
        size_t take = in->n - f[i].fed;
        if (take > (size_t)(s->chunk - *M)) take = (size_t)(s->chunk - *M);
        if (!take) continue;
        start[*Q] = *M;
        slot[(*Q)++] = in->slot;
        memcpy(token + *M, in->tokens + f[i].fed, take * sizeof *token);
        *M += (int)take;
    }
    start[*Q] = *M;
}

/* Final norm of all rows, then head in blocks over the rows wanted; moves every `fed` on. */
static bm_status deliver(bm_session *s, feed *f, int n, int M) {
    const bm_config *c = &s->m->config;
    const size_t D = (size_t)c->d_model;
    bm_backend *be = s->be;
    wanted w[HEAD_ROWS];
    int row = 0, have = 0;
    bool normed = false;
    for (int i = 0; i < n && row < M; i++) {
        const size_t left = f[i].in->n - f[i].fed, take = left < (size_t)(M - row) ? left : (size_t)(M - row);
        for (size_t k = 0; k < take; k++, row++) {
            const size_t index = f[i].fed + k;
            if (!wants(&f[i], index)) continue;
            if (!normed)
                be->norm(be, &(bm_op_norm){ .M = M, .D = c->d_model, .eps = c->norm_eps, .centered = c->final_norm == BM_LAYERNORM,
                                            .x = s->pass.out, .residual = s->acts.sum, .weight = s->m->w.final_norm,
                                            .bias = s->m->w.final_norm_bias, .y = s->acts.norm });
            normed = true;
            be->copy(be, s->head_in + (size_t)have * D, s->acts.norm + (size_t)row * D, D * sizeof(float));
            w[have++] = (wanted){ &f[i], index };
            if (have < HEAD_ROWS) continue;
            BM_TRY(head_rows(s, w, have));
            have = 0;
        }
        f[i].fed += take;
    }
    return have ? head_rows(s, w, have) : BM_OK;
}

/* A token of each sequence is the same operations over the same memory every time. */
static void forward(bm_session *s) {
    const bm_pass *p = &s->pass;
    const bool again = s->be->replay && p->M == p->Q && !p->profile;
    if (again && s->be->replay(s->be, s, p->M)) return;
    bm_forward_layers(p);
    if (again) s->be->recorded(s->be);
}

static bm_status run(bm_session *s, feed *f, int n) {
    int32_t *host = s->host, *start = host + s->chunk, *slot = start + s->chunk + 1;
    bm_status st = BM_OK;
    bm_profile_start(s);
    while (!st) {
        int M, Q;
        pack(s, f, n, host, start, slot, &M, &Q);
        if (!M) break;
        s->be->put(s->be, s->pass.token, host, (size_t)M * sizeof *host);
        s->be->put(s->be, s->pass.start, start, (size_t)(Q + 1) * sizeof *host);
        s->be->put(s->be, s->pass.slot, slot, (size_t)Q * sizeof *host);
        s->pass.M = M;
        s->pass.Q = Q;
        forward(s);
        st = deliver(s, f, n, M);
        bm_profile_mark(&s->pass, BM_STAGE_HEAD);
        const bm_status device = s->be->sync(s->be);
        if (!st) st = device;
    }
    const bm_status marked = bm_profile_stop(s);
    return st ? st : marked;
}

static bm_status check_inputs(const bm_session *s, const bm_input *in, int n) {
    const int V = s->m->config.n_vocab;
    if (n < 0 || n > s->slots) return bm_fail(BM_EARG, "inputs: found %d, expected 0 to %d, the number of slots", n, s->slots);
    for (int i = 0; i < n; i++) {
        if (in[i].slot < 0 || in[i].slot >= s->slots)
            return bm_fail(BM_EARG, "slot: found %d, expected 0 to %d", in[i].slot, s->slots - 1);
        for (int j = 0; j < i; j++)
            if (in[j].slot == in[i].slot) return bm_fail(BM_EARG, "slot: found %d twice, expected distinct slots", in[i].slot);
        if (in[i].n && !in[i].tokens) return bm_fail(BM_EARG, "tokens: found none, expected %zu", in[i].n);
        if (in[i].want == BM_WANT_ALL && !in[i].fn) return bm_fail(BM_EARG, "fn: found none, expected a reader of all rows");
        for (size_t k = 0; k < in[i].n; k++)
            if (in[i].tokens[k] < 0 || in[i].tokens[k] >= V)
                return bm_fail(BM_EARG, "token %zu: found id %d, expected 0 to %d", k, (int)in[i].tokens[k], V - 1);
    }
    return BM_OK;
}

static void slot_zero(bm_session *s, int slot) {
    s->be->zero(s->be, s->pass.state + (size_t)slot * s->pass.stride, s->pass.stride * sizeof(float));
    s->has_logits[slot] = false;
}

static bm_status run_locked(bm_session *s, feed *f, int n) {
    pthread_mutex_lock(&s->m->device->lock);
    for (int i = 0; i < n; i++) s->has_logits[f[i].in->slot] = false;
    const bm_status st = run(s, f, n);
    for (int i = 0; st && i < n; i++) slot_zero(s, f[i].in->slot);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}

bm_status bm_forward(bm_session *s, const bm_input *in, int n) {
    BM_TRY(check_inputs(s, in, n));
    for (int i = 0; i < n; i++) s->feeds[i] = (feed){ .in = &in[i] };
    return run_locked(s, s->feeds, n);
}

const float *bm_logits(const bm_session *s, int slot) {
    if (slot < 0 || slot >= s->slots || !s->has_logits[slot]) return NULL;
    return s->logits + (size_t)slot * (size_t)s->m->config.n_vocab;
}

bm_status bm_score(bm_session *s, int slot, const bm_token *tokens, size_t n, float *nll) {
    if (n < 2) return bm_fail(BM_EARG, "tokens to score: found %zu, expected at least 2", n);
    const bm_input all = { .slot = slot, .tokens = tokens, .n = n }, in = { .slot = slot, .tokens = tokens, .n = n - 1 };
    BM_TRY(check_inputs(s, &all, 1));
    return run_locked(s, &(feed){ .in = &in, .nll = nll }, 1);
}

/* ---- states ------------------------------------------------------------------------------------------- */

static bm_status check_slot(const bm_session *s, int slot) {
    if (slot >= 0 && slot < s->slots) return BM_OK;
    return bm_fail(BM_EARG, "slot: found %d, expected 0 to %d", slot, s->slots - 1);
}

size_t bm_state_bytes(const bm_session *s) { return s->pass.stride * sizeof(float); }

bm_status bm_state_get(const bm_session *s, int slot, void *buf) {
    BM_TRY(check_slot(s, slot));
    pthread_mutex_lock(&s->m->device->lock);
    s->be->get(s->be, buf, s->pass.state + (size_t)slot * s->pass.stride, bm_state_bytes(s));
    const bm_status st = s->be->sync(s->be);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}

bm_status bm_state_set(bm_session *s, int slot, const void *buf) {
    BM_TRY(check_slot(s, slot));
    pthread_mutex_lock(&s->m->device->lock);
    slot_zero(s, slot);
    if (buf) s->be->put(s->be, s->pass.state + (size_t)slot * s->pass.stride, buf, bm_state_bytes(s));
    const bm_status st = s->be->sync(s->be);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}

bm_status bm_state_copy(bm_session *s, int dst, int src) {
    BM_TRY(check_slot(s, dst));
    BM_TRY(check_slot(s, src));
    if (dst == src) return BM_OK;
    const size_t V = (size_t)s->m->config.n_vocab;
    pthread_mutex_lock(&s->m->device->lock);
    s->be->copy(s->be, s->pass.state + (size_t)dst * s->pass.stride, s->pass.state + (size_t)src * s->pass.stride, bm_state_bytes(s));
    const bm_status st = s->be->sync(s->be);
    s->has_logits[dst] = s->has_logits[src];
    if (s->has_logits[src]) memcpy(s->logits + (size_t)dst * V, s->logits + (size_t)src * V, V * sizeof *s->logits);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}
