/* src/model/stream.c - one text in one slot: prompt in, text out, turned back.  Room: model.
 *
 * In: text or tokens, sampling settings.  Out: pieces of text.  Snapshots of the slot every
 * BM_STREAM_SNAPSHOT_EVERY tokens and at each turn make turning back a copy and a short replay;
 * a replay gives the same bits, whatever it was chunked like. */
#include "model/stream.h"
#include <stdlib.h>
#include <string.h>

/* ---- open, close ------------------------------------------------------------------------------------ */

static void stops_free(char **stop, int n) {
    for (int i = 0; stop && i < n; i++) free(stop[i]);
    free(stop);
}

void bm_stream_close(bm_stream *g) {
    if (!g) return;
    bm_stream_drop_snapshots(g, 0);
    bm_sampler_close(g->sampler);
    stops_free(g->stop, g->n_stops);
    free(g->snap);
    free(g->allowed);
    free(g->token);
    free(g->turn);
    free(g->held);
    free(g->out);
    free(g);
}

static bm_status stream_init(bm_stream *g, const bm_sampling *p) {
    const int V = g->s->m->config.n_vocab;
    BM_TRY(bm_sampler_open(&g->sampler, p, V));
    BM_TRY(bm_alloc(&g->snap, sizeof *g->snap * (BM_STREAM_SNAPSHOTS + 1), "a stream"));
    g->best = g->s->ids == V || g->t;
    if (!g->t) return BM_OK;
    BM_TRY(bm_alloc(&g->allowed, (size_t)V, "a stream"));
    for (int i = 0; i < V; i++) {
        g->allowed[i] = bm_token_known(g->t, i);
        g->best = g->best && g->allowed[i] == (i < g->s->ids);
    }
    return BM_OK;
}

bm_status bm_stream_open(bm_stream **out, bm_session *s, int slot, const bm_tokenizer *t, const bm_sampling *p) {
    *out = NULL;
    const bm_sampling plain = bm_sampling_default();
    if (slot < 0 || slot >= s->slots) return bm_fail(BM_EARG, "slot: found %d, expected 0 to %d", slot, s->slots - 1);
    if (t && bm_tokenizer_size(t) > (size_t)s->m->config.n_vocab)
        return bm_fail(BM_EARG, "tokenizer: found %zu tokens, the model has %d; it belongs to another model", bm_tokenizer_size(t),
                       s->m->config.n_vocab);
    bm_stream *g;
    BM_TRY(bm_alloc(&g, sizeof *g, "a stream"));
    g->s = s;
    g->slot = slot;
    g->t = t;
    bm_status st = stream_init(g, p ? p : &plain);
    if (!st) st = bm_state_set(s, slot, NULL);
    if (st) bm_stream_close(g);
    else *out = g;
    return st;
}

bm_status bm_stream_sampling(bm_stream *g, const bm_sampling *p) {
    bm_sampler *s;
    BM_TRY(bm_sampler_open(&s, p, g->s->m->config.n_vocab));
    bm_sampler_close(g->sampler);
    g->sampler = s;
    return BM_OK;
}

bm_status bm_stream_stops(bm_stream *g, const char *const *stops, int n) {
    char **copy;
    if (n < 0 || n > 256) return bm_fail(BM_EARG, "stop strings: found %d, expected 0 to 256", n);
    BM_TRY(bm_alloc(&copy, sizeof *copy * (size_t)n, "stop strings"));
    for (int i = 0; i < n; i++) {
        bm_status st = BM_OK;
        if (!*stops[i]) st = bm_fail(BM_EARG, "stop string %d is empty, expected text", i);
        else if (!(copy[i] = bm_strndup(stops[i], strlen(stops[i])))) st = BM_EMEMORY;
        if (!st) continue;
        stops_free(copy, i);
        return st;
    }
    stops_free(g->stop, g->n_stops);
    g->stop = copy;
    g->n_stops = n;
    return BM_OK;
}

/* ---- text in ------------------------------------------------------------------------------------------ */

void bm_stream_sync_utf8(bm_stream *g) {
    char scratch[256];
    g->utf8 = (bm_utf8){ 0 };
    g->n_held = 0;
    if (!g->t) return;
    for (size_t i = g->n > 8 ? g->n - 8 : 0; i < g->n; i++) {
        size_t n = 0;
        const char *b = bm_token_bytes(g->t, g->token[i], &n);
        for (size_t k = n > 8 ? n - 8 : 0; k < n; k++) bm_utf8_push(&g->utf8, b + k, 1, scratch);
    }
}

bm_status bm_stream_add_tokens(bm_stream *g, const bm_token *tokens, size_t n) {
    const int V = g->s->m->config.n_vocab;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= V)
            return bm_fail(BM_EARG, "token %zu: found id %d, expected 0 to %d", i, (int)tokens[i], V - 1);
    BM_TRY(bm_grow(&g->token, &g->cap, g->n + n + 1, sizeof *g->token, "tokens"));
    if (n) memcpy(g->token + g->n, tokens, n * sizeof *tokens);
    g->n += n;
    bm_stream_sync_utf8(g);
    return BM_OK;
}

bm_status bm_stream_add_text(bm_stream *g, const char *text, size_t n, bool add_bos) {
    bm_token *ids;
    size_t count;
    if (!g->t) return bm_fail(BM_EARG, "this model has no tokenizer: give one (--tokenizer FILE), or token ids (--tokens FILE)");
    BM_TRY(bm_tokenize(g->t, text, n, add_bos, &ids, &count));
    const bm_status st = bm_stream_add_tokens(g, ids, count);
    bm_free(ids);
    return st;
}

/* ---- snapshots ------------------------------------------------------------------------------------------ */

void bm_stream_drop_snapshots(bm_stream *g, size_t past) {
    while (g->n_snaps && (g->snap[g->n_snaps - 1].at > past || !past)) free(g->snap[--g->n_snaps].state);
}

/* Keeps the slot as it is now.  Past BM_STREAM_SNAPSHOTS the one that is least missed goes: the one
 * whose neighbours are nearest to each other, relative to how far back it lies. */
static bm_status snapshot(bm_stream *g) {
    if (!g->fed || (g->n_snaps && g->snap[g->n_snaps - 1].at == g->fed)) return BM_OK;
    void *state = NULL;
    if (g->n_snaps == BM_STREAM_SNAPSHOTS) {
        size_t worst = 0;
        double least = 1e300;
        for (size_t i = 0; i + 1 < g->n_snaps; i++) {
            const size_t before = i ? g->snap[i - 1].at : 0, after = g->snap[i + 1].at;
            const double miss = (double)(after - before) / (double)(g->fed - g->snap[i].at + 1);
            if (miss < least) {
                least = miss;
                worst = i;
            }
        }
        state = g->snap[worst].state;
        memmove(g->snap + worst, g->snap + worst + 1, (--g->n_snaps - worst) * sizeof *g->snap);
    }
    if (!state) BM_TRY(bm_alloc(&state, bm_state_bytes(g->s), "a snapshot"));
    const bm_status st = bm_state_get(g->s, g->slot, state);
    if (st) {
        free(state);
        return st;
    }
    g->snap[g->n_snaps++] = (bm_snapshot){ g->fed, state };
    return BM_OK;
}

static bm_status snapshot_due(bm_stream *g) {
    const size_t kept = g->n_snaps ? g->snap[g->n_snaps - 1].at : 0;
    return g->fed - kept >= BM_STREAM_SNAPSHOT_EVERY ? snapshot(g) : BM_OK;
}

/* The slot as it was after at most `limit` tokens. */
static bm_status restore(bm_stream *g, size_t limit) {
    bm_stream_drop_snapshots(g, limit);
    const bm_snapshot *last = g->n_snaps ? &g->snap[g->n_snaps - 1] : NULL;
    g->fed = last ? last->at : 0;
    return bm_state_set(g->s, g->slot, last ? last->state : NULL);
}

bm_status bm_stream_rewind(bm_stream *g, size_t n_tokens) {
    if (n_tokens > g->n) return bm_fail(BM_EARG, "rewind: found %zu tokens, expected at most %zu", n_tokens, g->n);
    g->n = n_tokens;
    while (g->n_turns && g->turn[g->n_turns - 1] > n_tokens) g->n_turns--;
    const size_t limit = n_tokens ? n_tokens - 1 : 0;       /* the last token stays unfed */
    const bm_status st = g->fed > limit ? restore(g, limit) : BM_OK;
    bm_stream_sync_utf8(g);
    return st;
}

bm_status bm_stream_reset(bm_stream *g) { return bm_stream_rewind(g, 0); }

bm_status bm_stream_turn(bm_stream *g) {
    if (g->n_turns && g->turn[g->n_turns - 1] == g->n) return BM_OK;
    BM_TRY(bm_grow(&g->turn, &g->cap_turns, g->n_turns + 1, sizeof *g->turn, "turns"));
    BM_TRY(snapshot(g));
    g->turn[g->n_turns++] = g->n;
    return BM_OK;
}

int bm_stream_turns(const bm_stream *g) { return (int)g->n_turns; }

bm_status bm_stream_back(bm_stream *g, int turns) {
    if (turns < 0 || (size_t)turns > g->n_turns)
        return bm_fail(BM_EARG, "turns: found %d, expected 0 to %zu", turns, g->n_turns);
    if (!turns) return BM_OK;
    const size_t left = g->n_turns - (size_t)turns;
    return bm_stream_rewind(g, left ? g->turn[left - 1] : 0);
}

const bm_token *bm_stream_tokens(const bm_stream *g, size_t *n) {
    *n = g->n;
    return g->token;
}

/* ---- text out ------------------------------------------------------------------------------------------- */

/* Bytes of held that can go out: all but the longest end that begins a stop string. *stopped when one is whole. */
static size_t settled(const bm_stream *g, bool *stopped) {
    for (size_t at = 0; at < g->n_held; at++)
        for (int i = 0; i < g->n_stops; i++) {
            const size_t n = strlen(g->stop[i]), left = g->n_held - at;
            if (memcmp(g->held + at, g->stop[i], n < left ? n : left)) continue;
            *stopped = n <= left;
            return at;
        }
    *stopped = false;
    return g->n_held;
}

/* Moves n bytes from held to out. */
static bm_status emit(bm_stream *g, size_t n, bm_piece *out) {
    BM_TRY(bm_grow(&g->out, &g->cap_out, n + 1, 1, "text"));
    memcpy(g->out, g->held, n);
    g->out[n] = 0;
    memmove(g->held, g->held + n, g->n_held - n);
    g->n_held -= n;
    out->text = g->out;
    out->n = n;
    return BM_OK;
}

static bm_status take_token(bm_stream *g, bm_token id, bool ignore_eos, bm_piece *out) {
    *out = (bm_piece){ .token = id, .text = "" };
    if (!g->t) return BM_OK;
    if (id == bm_tokenizer_eos(g->t) && !ignore_eos) {
        out->finish = BM_FINISH_EOS;
        return BM_OK;
    }
    size_t n = 0;
    const char *b = bm_token_bytes(g->t, id, &n);
    if (bm_token_special(g->t, id)) n = 0;
    BM_TRY(bm_grow(&g->held, &g->cap_held, g->n_held + 3 * n + 12, 1, "text"));
    g->n_held += bm_utf8_push(&g->utf8, b, n, g->held + g->n_held);
    bool stopped;
    const size_t ready = settled(g, &stopped);
    BM_TRY(emit(g, ready, out));
    if (stopped) {
        out->finish = BM_FINISH_STOP;
        g->n_held = 0;
        g->utf8 = (bm_utf8){ 0 };
    }
    return BM_OK;
}

/* After a failure that emptied the slot: back to a snapshot of at most `limit` tokens, the text stays. */
static bm_status emptied(bm_stream *g, bm_status st, size_t limit) {
    char why[512];
    snprintf(why, sizeof why, "%s", bm_error());
    restore(g, limit);
    return bm_fail(st, "%s", why);
}

/* Feeds tokens up to the last; what is wanted of the last is there afterwards. */
static bm_status feed_all(bm_stream *g, bm_want want, bm_progress_fn progress, void *user) {
    while (g->fed < g->n) {
        const size_t left = g->n - g->fed, step = left < (size_t)g->s->chunk ? left : (size_t)g->s->chunk;
        const bm_input in = { .slot = g->slot, .tokens = g->token + g->fed, .n = step,
                              .want = step == left ? want : BM_WANT_NONE };
        const bm_status st = bm_forward(g->s, &in, 1);
        if (st) return emptied(g, st, g->fed);
        g->fed += step;
        BM_TRY(snapshot_due(g));
        if (progress && !progress(user, g->fed, g->n) && g->fed < g->n) return bm_fail(BM_ECANCELLED, "stopped while reading the text");
    }
    return BM_OK;
}

/* The likeliest token, which is being fed when it is told. */
static bm_status next_ahead(bm_stream *g, bm_token *id) {
    const bm_status st = bm_next(g->s, &g->slot, 1);
    if (st) return emptied(g, st, g->n - 1);
    *id = bm_best(g->s, g->slot);
    return *id < 0 ? emptied(g, bm_sampler_none(), g->n - 1) : BM_OK;       /* it was fed what is no token */
}

bm_status bm_stream_next(bm_stream *g, bool ignore_eos, bm_piece *out, bm_progress_fn progress, void *user) {
    bm_token id;
    *out = (bm_piece){ .token = -1, .text = "" };
    if (!g->n) return bm_fail(BM_EARG, "nothing to go on from: give a prompt");
    BM_TRY(bm_grow(&g->token, &g->cap, g->n + 1, sizeof *g->token, "tokens"));
    const bool best = g->best && bm_sampler_greedy(g->sampler), ahead = best && bm_runs_ahead(g->s);
    const bool known = ahead && bm_best(g->s, g->slot) >= 0;    /* what the last token gives, or it is being fed */
    if (g->fed == g->n && !known) BM_TRY(restore(g, g->n - 1));
    BM_TRY(feed_all(g, best ? BM_WANT_BEST : BM_WANT_LAST, progress, user));
    const size_t window = (size_t)bm_sampler_settings(g->sampler)->penalty_window, recent = g->n < window ? g->n : window;
    if (ahead) BM_TRY(next_ahead(g, &id));
    else if (!best) BM_TRY(bm_sampler_pick(g->sampler, bm_logits(g->s, g->slot), g->token + g->n - recent, recent, g->allowed, &id));
    else if ((id = bm_best(g->s, g->slot)) < 0) return bm_sampler_none();
    g->token[g->n++] = id;
    if (ahead) g->fed = g->n;
    if (ahead) BM_TRY(snapshot_due(g));
    return take_token(g, id, ignore_eos, out);
}

bm_status bm_stream_flush(bm_stream *g, bm_piece *out) {
    *out = (bm_piece){ .token = -1, .text = "" };
    BM_TRY(bm_grow(&g->held, &g->cap_held, g->n_held + 3, 1, "text"));
    g->n_held += bm_utf8_flush(&g->utf8, g->held + g->n_held);
    return emit(g, g->n_held, out);
}
