/* src/model/session.c - slots of constant-size state, and tokens through them.  Room: model.
 *
 * In: tokens for some slots, any lengths.  Out: logits where asked for, states moved on.
 * Rows of all inputs are packed one behind the other, `chunk` at a time, without padding. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>

enum { HEAD_ROWS = 64, HEAD_ROWS_GPU = 1024, MAX_SLOTS = 4096, MAX_CHUNK = 8192, CHUNK = 512, CHUNK_GPU = 2048, CHUNK_LIMITED = 64 };

/* An input on its way: what of it was fed, and where scores go. */
typedef struct bm_feed {
    const bm_input *in;
    size_t fed;
    float *nll;                 /* bm_score: one per fed token */
} feed;

/* A row of the chunk whose logits, or what comes of them, somebody wants. */
typedef struct bm_wanted { feed *f; size_t index; int row; } wanted;

/* ---- open, close ---------------------------------------------------------------------------------- */

static int reserved_rows(const bm_session *s) { return s->chunk > s->head_rows ? s->chunk : s->head_rows; }

/* Allocates the device's part of a session, or only adds up what it will take. */
static bm_status work_alloc(bm_session *s, uint64_t *bytes) {
    const bm_config *c = &s->m->config;
    const size_t M = (size_t)s->chunk, D = (size_t)c->d_model, V = (size_t)c->n_vocab, k = (size_t)c->top_k;
    const size_t H = (size_t)s->head_rows;
    const bm_widths w = bm_config_widths(c);
    bm_pass *p = &s->pass;
    bm_acts *a = &s->acts;
    const struct { void *out; size_t n; } want[] = {
        { &p->start, M + 1 }, { &p->slot, M }, { &p->out, M * D }, { &a->sum, M * D }, { &a->norm, M * D },
        { &a->xz, M * w.xz }, { &a->u, M * (w.inner > w.y ? w.inner : w.y) }, { &a->xdbl, M * w.xdbl }, { &a->dt, M * w.inner },
        { &a->logits, M * w.X }, { &a->gate, k * M }, { &a->hidden, k * M * 2 * w.F }, { &a->expert, k * M }, { &a->order, k * M },
        { &a->first, k * (w.X + 1) }, { &s->head_in, H * D }, { &s->head_out, H * V }, { &s->head_loss, H },
        { &s->head_target, H }, { &s->head_fed[0], H }, { &s->head_fed[1], H }, { &p->state, (size_t)s->slots * p->stride },
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        const size_t n = want[i].n * sizeof(float);
        if (bytes) *bytes += bm_taken(s->be, n);
        else BM_TRY(s->be->alloc(s->be, want[i].out, n, "a session"));
    }
    if (bytes && s->be->widening) *bytes += bm_taken(s->be, s->be->widening(s->be, reserved_rows(s), s->m->types, w.read));
    if (bytes && s->be->reserving) *bytes += bm_taken(s->be, s->be->reserving(s->be, reserved_rows(s), (int)w.most));
    return BM_OK;
}

static bm_status work_open(bm_session *s) {
    const bm_config *c = &s->m->config;
    const bm_widths w = bm_config_widths(c);
    bm_pass *p = &s->pass;
    bm_acts *a = &s->acts;
    BM_TRY(work_alloc(s, NULL));
    BM_TRY(s->be->alloc_host(s->be, &p->token, (size_t)s->chunk * sizeof *p->token, "a session"));
    for (int i = 0; i < 2; i++)
        BM_TRY(s->be->alloc_host(s->be, &s->head_best[i], (size_t)s->head_rows * sizeof *s->head_best[i], "a session"));
    a->y = a->u;
    a->ffn_norm = a->norm;
    for (int l = 0; l < c->n_layers; l++) p->acts[l] = *a;
    if (s->be->reserve_widened) BM_TRY(s->be->reserve_widened(s->be, reserved_rows(s), s->m->types, w.read));
    return s->be->reserve(s->be, reserved_rows(s), (int)w.most);
}

static void work_free(bm_session *s) {
    for (int i = 0; s->be->forget && i < 2; i++) s->be->forget(s->be, &s->head_best[i]);
    if (s->be->forget) s->be->forget(s->be, s);
    const bm_pass *p = &s->pass;
    const bm_acts *a = &s->acts;
    void *const host[] = { p->token, s->head_best[0], s->head_best[1], s->logits };
    void *const all[] = { p->start, p->slot, p->out, a->sum, a->norm, a->xz, a->u, a->xdbl, a->dt, a->logits, a->gate,
                          a->hidden, a->expert, a->order, a->first, s->head_in, s->head_out, s->head_loss, s->head_target, s->head_fed[0],
                          s->head_fed[1], p->state };
    for (size_t k = 0; k < sizeof all / sizeof *all; k++)
        if (all[k]) s->be->release(s->be, all[k]);
    for (size_t k = 0; k < sizeof host / sizeof *host; k++)
        if (host[k]) s->be->release_host(s->be, host[k]);
}

static bm_status session_init(bm_session *s) {
    const bm_config *c = &s->m->config;
    const size_t layers = (size_t)c->n_layers;
    BM_TRY(bm_alloc(&s->state_at, sizeof *s->state_at * layers, "a session"));
    BM_TRY(bm_alloc(&s->pass.acts, sizeof *s->pass.acts * layers, "a session"));
    bm_state_floats(c, s->state_at);
    s->pass.state_at = s->state_at;
    BM_TRY(bm_alloc(&s->start, sizeof *s->start * ((size_t)s->chunk + 1), "a session"));
    BM_TRY(bm_alloc(&s->slot, sizeof *s->slot * (size_t)s->chunk, "a session"));
    BM_TRY(bm_alloc(&s->feeds, sizeof *s->feeds * (size_t)s->slots, "a session"));
    BM_TRY(bm_alloc(&s->wanted, sizeof *s->wanted * (size_t)s->chunk, "a session"));
    BM_TRY(bm_alloc(&s->has_logits, sizeof *s->has_logits * (size_t)s->slots, "a session"));
    BM_TRY(bm_alloc(&s->best, sizeof *s->best * (size_t)s->slots, "a session"));
    BM_TRY(bm_alloc(&s->next, sizeof *s->next * (size_t)s->slots, "a session"));
    for (int i = 0; i < s->slots; i++) s->best[i] = -1;
    return work_open(s);
}

/* What options ask for; no memory yet. */
static bm_status session_plan(bm_session *s, const bm_model *m, const bm_session_options *opt) {
    const bm_session_options o = opt ? *opt : (bm_session_options){ 0 };
    if (o.slots < 0 || o.slots > MAX_SLOTS) return bm_fail(BM_EARG, "slots: found %d, expected 1 to %d", o.slots, MAX_SLOTS);
    if (o.chunk < 0 || o.chunk > MAX_CHUNK) return bm_fail(BM_EARG, "chunk: found %d, expected 1 to %d", o.chunk, MAX_CHUNK);
    if (o.ids < 0 || o.ids > m->config.n_vocab)
        return bm_fail(BM_EARG, "ids: found %d, expected 1 to %d", o.ids, m->config.n_vocab);
    if ((unsigned)o.arith > BM_ARITH_F32) return bm_fail(BM_EARG, "arith: found %d, expected f32 or native", (int)o.arith);
    *s = (bm_session){ .m = m, .be = m->be, .slots = o.slots ? o.slots : 1, .arith = o.arith,
                       .ids = o.ids ? o.ids : m->config.n_vocab };
    s->chunk = o.chunk ? o.chunk : m->device->limit ? CHUNK_LIMITED : m->be->reads_host ? CHUNK : CHUNK_GPU;
    s->head_rows = m->be->reads_host ? HEAD_ROWS : s->chunk < HEAD_ROWS_GPU ? s->chunk : HEAD_ROWS_GPU;
    s->pass = (bm_pass){ .be = s->be, .config = &m->config, .w = &m->w, .arith = s->arith,
                         .stride = bm_state_floats(&m->config, NULL), .experts = bm_pages_door(m->pages) };
    return BM_OK;
}

bm_status bm_session_bytes(const bm_model *m, const bm_session_options *opt, uint64_t *out) {
    bm_session s;
    *out = 0;
    BM_TRY(session_plan(&s, m, opt));
    return work_alloc(&s, out);
}

bm_status bm_session_open(bm_session **out, const bm_model *m, const bm_session_options *opt) {
    *out = NULL;
    bm_session *s;
    uint64_t bytes;
    BM_TRY(bm_session_bytes(m, opt, &bytes));
    BM_TRY(bm_alloc(&s, sizeof *s, "a session"));
    session_plan(s, m, opt);
    pthread_mutex_lock(&m->device->lock);
    bm_status st = bm_fits(s->be, bytes, "a session", "fewer texts or rows at once");
    if (!st && m->pages && m->taken + bytes > m->device->limit)
        st = bm_fail(BM_EMEMORY, "a session of %d texts needs %.0f MB, found %.0f MB of the limit left; plan it with the limit",
                     s->slots, 1e-6 * (double)bytes, 1e-6 * (double)(m->device->limit - m->taken));
    if (!st) st = session_init(s);
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
    free(s->start);
    free(s->slot);
    free(s->feeds);
    free(s->wanted);
    free(s->has_logits);
    free(s->best);
    free(s->next);
    free(s->pass.profile);
    free(s);
}

/* ---- head ------------------------------------------------------------------------------------------- */

/* head_out: logits of n <= head_rows rows of the chunk; rows side by side share a norm.  head_best[turn], head_fed[turn] (n);
 * turn -1: not asked for; only: nothing else is. */
static void head(bm_session *s, const wanted *w, int n, int turn, bool only) {
    const bm_config *c = &s->m->config;
    const size_t D = (size_t)c->d_model;
    bm_backend *be = s->be;
    for (int i = 0, m; i < n; i += m) {
        const size_t from = (size_t)w[i].row * D;
        for (m = 1; i + m < n && w[i + m].row == w[i].row + m; ) m++;
        be->norm(be, &(bm_op_norm){ .M = m, .D = c->d_model, .eps = c->norm_eps, .centered = c->final_norm == BM_LAYERNORM,
                                    .x = s->pass.out + from, .residual = s->acts.sum + from, .weight = s->m->w.final_norm,
                                    .bias = s->m->w.final_norm_bias, .y = s->head_in + (size_t)i * D });
    }
    be->linear(be, &(bm_op_linear){ .M = n, .ldx = c->d_model, .w = &s->m->w.head, .x = s->head_in, .bias = s->m->w.head_bias,
                                    .y = s->head_out, .arith = s->arith });
    if (turn >= 0) be->best(be, &(bm_op_best){ .M = n, .V = s->ids, .ld = c->n_vocab, .logits = s->head_out, .best = s->head_best[turn],
                                               .again = s->head_fed[turn], .only = only });
}

/* Scores of n rows of head_out, which follow one another in one text. */
static bm_status score(bm_session *s, const wanted *w, int n) {
    bm_backend *be = s->be;
    be->put(be, s->head_target, w->f->in->tokens + w->index + 1, (size_t)n * sizeof *s->head_target);
    be->loss(be, &(bm_op_loss){ .M = n, .V = s->m->config.n_vocab, .logits = s->head_out, .target = s->head_target,
                                .loss = s->head_loss });
    be->get(be, w->f->nll + w->index, s->head_loss, (size_t)n * sizeof *w->f->nll);
    return be->sync(be);
}

/* How many rows, from the first on, have places for their logits side by side. */
static int side_by_side(const wanted *w, int n) {
    int m = 1;
    while (m < n && w->f->in->want == BM_WANT_LAST && w[m].f->in->want == BM_WANT_LAST &&
           w[m].f->in->slot == w->f->in->slot + m) m++;
    return m;
}

/* What is in head_out and head_best, to whoever wanted it. */
static bm_status hand_out(bm_session *s, const wanted *w, int n) {
    const size_t V = (size_t)s->m->config.n_vocab;
    bm_backend *be = s->be;
    if (w->f->nll) return score(s, w, n);
    for (int i = 0, m; i < n; i += m) {
        const bm_input *in = w[i].f->in;
        m = side_by_side(w + i, n - i);
        if (in->want == BM_WANT_BEST) continue;
        float *at = s->logits + (size_t)in->slot * V;
        be->get(be, at, s->head_out + (size_t)i * V, (size_t)m * V * sizeof *at);
        for (int k = 0; k < m; k++) s->has_logits[in->slot + k] = true;
        if (in->want != BM_WANT_ALL) continue;
        BM_TRY(be->sync(be));
        const bm_status st = in->fn(in->user, w[i].index, at);
        if (st) return st == BM_ECANCELLED ? bm_fail(st, "stopped by the reader of logits") : st;
    }
    BM_TRY(be->sync(be));
    for (int i = 0; i < n; i++)
        if (w[i].f->in->want == BM_WANT_BEST) s->best[w[i].f->in->slot] = s->head_best[0][i];
    return BM_OK;
}

/* ---- one chunk ---------------------------------------------------------------------------------------- */

static bool wants(const feed *f, size_t index) {
    if (f->nll || f->in->want == BM_WANT_ALL) return true;
    return f->in->want != BM_WANT_NONE && index + 1 == f->in->n;
}

/* Takes up to `chunk` rows from the inputs, in order, and moves every `fed` on: pass.M rows of pass.Q sequences, of
 * which it returns how many are wanted.  Where rows begin and whose they are goes to the device when it is news. */
static int pack(bm_session *s, feed *f, int n) {
    bm_pass *p = &s->pass;
    bool news = !s->sent;
    int W = 0;
    p->M = p->Q = 0;
    for (int i = 0; i < n && p->M < s->chunk; i++) {
        const bm_input *in = f[i].in;
        size_t take = in->n - f[i].fed;
        if (take > (size_t)(s->chunk - p->M)) take = (size_t)(s->chunk - p->M);
        if (!take) continue;
        memcpy(p->token + p->M, in->tokens + f[i].fed, take * sizeof *p->token);
        for (size_t k = 0; k < take; k++)
            if (wants(&f[i], f[i].fed + k)) s->wanted[W++] = (wanted){ &f[i], f[i].fed + k, p->M + (int)k };
        news = news || s->start[p->Q] != p->M || s->slot[p->Q] != in->slot;
        s->start[p->Q] = p->M;
        s->slot[p->Q++] = in->slot;
        p->M += (int)take;
        f[i].fed += take;
    }
    if (!p->M || (!news && s->start[p->Q] == p->M)) return W;
    s->start[p->Q] = p->M;
    s->sent = true;
    s->be->put(s->be, p->start, s->start, (size_t)(p->Q + 1) * sizeof *s->start);
    s->be->put(s->be, p->slot, s->slot, (size_t)p->Q * sizeof *s->slot);
    return W;
}

/* A token of each sequence, all of them wanted, is the same operations over the same memory every time. */
static bool recordable(const bm_session *s) { return s->be->replay && !s->pass.profile && !s->pass.experts; }
/* only: of the owner's steps best tokens alone are wanted. */
static void step(bm_session *s, const void *owner, bm_token *token, int turn, bool only) {
    bm_pass p = s->pass;
    p.token = token;
    if (recordable(s) && s->be->replay(s->be, owner, p.M)) return;
    bm_forward_layers(&p);
    head(s, s->wanted, p.M, turn, only);
    if (recordable(s)) s->be->recorded(s->be);
}

/* The chunk through all layers, then W wanted rows through the head, head_rows at a time; waits for the device. */
static bm_status compute(bm_session *s, int W) {
    const bm_pass *p = &s->pass;
    const wanted *w = s->wanted;
    bm_backend *be = s->be;
    if (recordable(s) && p->M == p->Q && W == p->M && W <= s->head_rows && !w->f->nll) {
        step(s, s, p->token, 0, false);
        return hand_out(s, w, W);
    }
    if (recordable(s)) be->replay(be, NULL, p->M);
    bm_forward_layers(p);
    if (recordable(s)) be->recorded(be);
    BM_TRY(bm_pages_failed(s->m->pages));
    for (int at = 0, n; at < W; at += n) {
        bool best = false;
        n = W - at < s->head_rows ? W - at : s->head_rows;
        for (int i = 0; i < n; i++) best = best || w[at + i].f->in->want == BM_WANT_BEST;
        head(s, w + at, n, best ? 0 : -1, false);
        BM_TRY(hand_out(s, w + at, n));
    }
    return W ? BM_OK : be->sync(be);
}

static bm_status run(bm_session *s, feed *f, int n) {
    bm_status st = BM_OK;
    bm_profile_start(s);
    while (!st) {
        const int W = pack(s, f, n);
        if (!s->pass.M) break;
        st = compute(s, W);
        if (st) s->sent = false;
        bm_profile_mark(&s->pass, BM_STAGE_HEAD);
    }
    if (st) s->be->sync(s->be);         /* a reader stopped while the device went on */
    const bm_status marked = bm_profile_stop(s);
    return st ? st : marked;
}

static bm_status check_inputs(const bm_session *s, const bm_input *in, int n) {
    const int V = s->m->config.n_vocab;
    int top = -1;
    if (n < 0 || n > s->slots) return bm_fail(BM_EARG, "inputs: found %d, expected 0 to %d, the number of slots", n, s->slots);
    for (int i = 0; i < n; i++) {
        if (in[i].slot < 0 || in[i].slot >= s->slots)
            return bm_fail(BM_EARG, "slot: found %d, expected 0 to %d", in[i].slot, s->slots - 1);
        const bool above = in[i].slot > top;        /* of all before it: no repetition */
        top = above ? in[i].slot : top;
        for (int j = 0; j < i && !above; j++)
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
    s->best[slot] = -1;
}

/* Where logits come to, once somebody wants them. */
static bm_status logits_alloc(bm_session *s, const bm_input *in, int n) {
    bool want = false;
    for (int i = 0; i < n; i++) want = want || in[i].want == BM_WANT_LAST || in[i].want == BM_WANT_ALL;
    if (!want || s->logits) return BM_OK;
    return s->be->alloc_host(s->be, &s->logits, sizeof *s->logits * (size_t)s->slots * (size_t)s->m->config.n_vocab, "logits");
}

/* What a step of bm_next, waited for with this outcome, gave: its best tokens lie in head_best[turn]. */
static bm_status tell(bm_session *s, bm_status st, int turn) {
    for (int i = 0; i < s->pass.Q; i++)
        if (st) slot_zero(s, s->slot[i]);
        else s->best[s->slot[i]] = s->head_best[turn][i];
    if (st) s->ahead = s->sent = false;
    return st;
}
/* Waits for the step that is under way: none is then. */
static bm_status settle(bm_session *s) {
    if (!s->ahead) return BM_OK;
    s->ahead = false;
    return tell(s, s->be->sync(s->be), s->turn);
}

static bm_status run_locked(bm_session *s, feed *f, int n) {
    pthread_mutex_lock(&s->m->device->lock);
    const bm_status before = settle(s);
    if (before) {
        pthread_mutex_unlock(&s->m->device->lock);
        return before;
    }
    for (int i = 0; i < n; i++) {
        s->has_logits[f[i].in->slot] = false;
        s->best[f[i].in->slot] = -1;
    }
    const bm_status st = run(s, f, n);
    for (int i = 0; st && i < n; i++) slot_zero(s, f[i].in->slot);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}

bm_status bm_forward(bm_session *s, const bm_input *in, int n) {
    BM_TRY(check_inputs(s, in, n));
    BM_TRY(logits_alloc(s, in, n));
    for (int i = 0; i < n; i++) s->feeds[i] = (feed){ .in = &in[i] };
    return run_locked(s, s->feeds, n);
}

/* Whether these are the texts of the step under way. */
static bool same_texts(const bm_session *s, const int *slots, int n) {
    bool same = s->ahead && n == s->pass.Q;
    for (int i = 0; same && i < n; i++) same = s->slot[i] == slots[i];
    return same;
}
static void next_step(bm_session *s, const void *owner, bm_token *token, int turn) {
    s->turn = turn;
    s->ahead = true;
    step(s, owner, token, turn, owner != s);       /* steps of s are bm_forward's, too */
    if (s->be->mark) s->be->mark(s->be, turn);
}
/* A step of n texts whose best tokens are known. */
static bm_status next_of_known(bm_session *s, const int *slots, int n) {
    BM_TRY(settle(s));
    for (int i = 0; i < n; i++) {
        if (bm_best(s, slots[i]) < 0)
            return bm_fail(BM_EARG, "slot %d: found no best token, expected one: feed it with BM_WANT_BEST", slots[i]);
        s->next[i] = (bm_input){ .slot = slots[i], .tokens = &s->best[slots[i]], .n = 1, .want = BM_WANT_BEST };
        s->feeds[i] = (feed){ .in = &s->next[i] };
    }
    BM_TRY(check_inputs(s, s->next, n));
    for (int i = 0; i < n; i++) s->has_logits[slots[i]] = false;
    pack(s, s->feeds, n);
    next_step(s, s, s->pass.token, 0);
    return BM_OK;
}
/* The same where the device knows them, or soon will; then those of the step before are told. */
static bm_status next_of_device(bm_session *s) {
    const int before = s->turn;
    next_step(s, &s->head_best[!before], s->head_fed[before], !before);
    return tell(s, s->be->reach ? s->be->reach(s->be, before) : s->be->sync(s->be), before);
}

bool bm_runs_ahead(const bm_session *s) { return recordable(s); }

bm_status bm_next(bm_session *s, const int *slots, int n) {
    const int most = s->head_rows < s->chunk ? s->head_rows : s->chunk;
    if (n < 1 || n > s->slots || n > most)
        return bm_fail(BM_EARG, "texts: found %d, expected 1 to %d", n, s->slots < most ? s->slots : most);
    pthread_mutex_lock(&s->m->device->lock);
    const bm_status st = same_texts(s, slots, n) ? next_of_device(s) : next_of_known(s, slots, n);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}

const float *bm_logits(const bm_session *s, int slot) {
    if (slot < 0 || slot >= s->slots || !s->has_logits[slot]) return NULL;
    return s->logits + (size_t)slot * (size_t)s->m->config.n_vocab;
}

bm_token bm_best(const bm_session *s, int slot) { return slot < 0 || slot >= s->slots ? -1 : s->best[slot]; }

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
    const bm_status before = settle(s);
    slot_zero(s, slot);
    if (buf) s->be->put(s->be, s->pass.state + (size_t)slot * s->pass.stride, buf, bm_state_bytes(s));
    const bm_status st = before ? before : s->be->sync(s->be);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}

bm_status bm_state_copy(bm_session *s, int dst, int src) {
    BM_TRY(check_slot(s, dst));
    BM_TRY(check_slot(s, src));
    if (dst == src) return BM_OK;
    const size_t V = (size_t)s->m->config.n_vocab;
    pthread_mutex_lock(&s->m->device->lock);
    const bm_status before = settle(s);
    s->be->copy(s->be, s->pass.state + (size_t)dst * s->pass.stride, s->pass.state + (size_t)src * s->pass.stride, bm_state_bytes(s));
    const bm_status st = before ? before : s->be->sync(s->be);
    s->has_logits[dst] = s->has_logits[src];
    s->best[dst] = s->best[src];
    if (s->has_logits[src]) memcpy(s->logits + (size_t)dst * V, s->logits + (size_t)src * V, V * sizeof *s->logits);
    pthread_mutex_unlock(&s->m->device->lock);
    return st;
}
