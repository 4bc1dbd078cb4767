/* src/model/stream_file.c - session files.  Room: model.
 *
 * In, out: a stream and a path.  Layout (docs/FORMAT.md), little-endian: magic, model hash, arithmetic,
 * sampling settings and counter, tokens, fed, turns, unfinished text, state, XXH3-128 of all before it. */
#include "model/stream.h"
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

static const char magic[8] = "BMSESS01";
enum { MAX_TOKENS = 1 << 28, MAX_HELD = 1 << 20 };

/* The fixed part, as it lies in the file; no padding between fields. */
typedef struct fixed {
    char magic[8];
    uint64_t hash[2], seed, counter, n_bias, n_tokens, fed, n_turns, n_held, state_bytes;
    int32_t arith, top_k, penalty_window, n_pending;
    bm_f32 temperature, top_p, min_p, typical_p, repetition, presence, frequency, zero;
    uint8_t pending[8];
} fixed;
_Static_assert(sizeof(fixed) == 8 + 10 * 8 + 4 * 4 + 8 * 4 + 8, "no padding");

/* ---- save ------------------------------------------------------------------------------------------- */

typedef struct writer { bm_out *out; XXH3_state_t *hash; bm_status status; } writer;

static void put(writer *w, const void *bytes, size_t n) {
    if (w->status || !n) return;
    XXH3_128bits_update(w->hash, bytes, n);
    w->status = bm_out_write(w->out, bytes, n);
}

static bm_status describe(const bm_stream *g, fixed *f) {
    const bm_sampling *p = bm_sampler_settings(g->sampler);
    *f = (fixed){ .seed = p->seed, .counter = bm_sampler_counter(g->sampler), .n_bias = p->n_bias, .n_tokens = g->n, .fed = g->fed,
                  .n_turns = g->n_turns, .n_held = g->n_held, .state_bytes = bm_state_bytes(g->s), .arith = g->s->arith,
                  .top_k = p->top_k, .penalty_window = p->penalty_window, .n_pending = g->utf8.n, .temperature = p->temperature,
                  .top_p = p->top_p, .min_p = p->min_p, .typical_p = p->typical_p, .repetition = p->repetition_penalty,
                  .presence = p->presence_penalty, .frequency = p->frequency_penalty };
    memcpy(f->magic, magic, sizeof magic);
    memcpy(f->pending, g->utf8.pending, sizeof g->utf8.pending);
    return bm_model_hash(g->s->m, f->hash);
}

static void put_all(writer *w, const bm_stream *g, const fixed *f, const void *state) {
    const bm_sampling *p = bm_sampler_settings(g->sampler);
    put(w, f, sizeof *f);
    put(w, p->bias, p->n_bias * sizeof *p->bias);
    put(w, g->token, g->n * sizeof *g->token);
    for (size_t i = 0; i < g->n_turns; i++) put(w, &(uint64_t){ g->turn[i] }, 8);
    put(w, g->held, g->n_held);
    put(w, state, f->state_bytes);
    if (w->status) return;
    XXH128_canonical_t sum;
    XXH128_canonicalFromHash(&sum, XXH3_128bits_digest(w->hash));
    w->status = bm_out_write(w->out, &sum, sizeof sum);
}

/* state (zeros) becomes the slot's, after *fed tokens: before the last one, of which nobody has seen what it gives. */
static bm_status state_before_last(const bm_stream *g, uint64_t *fed, void *state) {
    size_t i = g->n_snaps;
    if (!g->n || g->fed < g->n) return bm_state_get(g->s, g->slot, state);
    while (i && g->snap[i - 1].at >= g->n) i--;
    *fed = i ? g->snap[i - 1].at : 0;
    if (i) memcpy(state, g->snap[i - 1].state, bm_state_bytes(g->s));
    return BM_OK;
}

bm_status bm_stream_save(const bm_stream *g, const char *path) {
    fixed f;
    void *state = NULL;
    writer w = { 0 };
    bm_status st = describe(g, &f);
    if (!st) st = bm_alloc(&state, f.state_bytes, "a session file");
    if (!st) st = state_before_last(g, &f.fed, state);
    if (!st && !(w.hash = XXH3_createState())) st = bm_fail_memory(sizeof *w.hash, "a checksum");
    if (!st) st = bm_out_open(&w.out, path);
    if (!st) {
        XXH3_128bits_reset(w.hash);
        put_all(&w, g, &f, state);
        st = w.status;
    }
    if (!st) st = bm_out_finish(&w.out);
    bm_out_abort(&w.out);
    XXH3_freeState(w.hash);
    free(state);
    return st;
}

/* ---- load ------------------------------------------------------------------------------------------- */

/* What a file holds, checked but not yet in force. */
typedef struct loaded {
    fixed f;
    bm_sampler *sampler;
    bm_token *token;
    size_t *turn;
    char *held;
    const uint8_t *state;
} loaded;

static bm_status damaged(const char *path, const char *what) {
    return bm_fail(BM_EFORMAT, "%s: %s; the session file is damaged, the stream is unchanged", path, what);
}

static bm_status check_fixed(const bm_stream *g, const fixed *f, size_t left, const char *path) {
    uint64_t hash[2], need = f->state_bytes;
    BM_TRY(bm_model_hash(g->s->m, hash));
    if (memcmp(hash, f->hash, sizeof hash))
        return bm_fail(BM_EARG, "%s: the session was saved with another model (found %016llx, this one is %016llx)", path,
                       (unsigned long long)f->hash[0], (unsigned long long)hash[0]);
    if (f->arith != (int32_t)g->s->arith)
        return bm_fail(BM_EARG, "%s: the session was saved with --arith %s, found --arith %s; use the same", path,
                       f->arith == BM_ARITH_F32 ? "f32" : "native", g->s->arith == BM_ARITH_F32 ? "f32" : "native");
    if (f->n_tokens > MAX_TOKENS || f->n_held > MAX_HELD || f->n_turns > f->n_tokens || f->n_bias > (uint64_t)g->s->m->config.n_vocab ||
        f->state_bytes != bm_state_bytes(g->s) || (f->n_tokens ? f->fed >= f->n_tokens : f->fed > 0) || f->n_pending < 0 ||
        f->n_pending > 3)
        return damaged(path, "a count in its header is out of range");
    need += f->n_bias * sizeof(bm_logit_bias) + f->n_tokens * sizeof(bm_token) + f->n_turns * 8 + f->n_held;
    if (need != left) return damaged(path, "its length differs from what its header says");
    return BM_OK;
}

static bm_status read_settings(loaded *l, const bm_stream *g, bm_reader *r) {
    const fixed *f = &l->f;
    bm_logit_bias *bias;
    BM_TRY(bm_alloc(&bias, f->n_bias * sizeof *bias, "logit biases"));
    bm_take_to(r, bias, f->n_bias * sizeof *bias);
    const bm_sampling p = { .temperature = f->temperature, .top_k = f->top_k, .top_p = f->top_p, .min_p = f->min_p,
                            .typical_p = f->typical_p, .repetition_penalty = f->repetition, .presence_penalty = f->presence,
                            .frequency_penalty = f->frequency, .penalty_window = f->penalty_window, .seed = f->seed,
                            .n_bias = f->n_bias, .bias = bias };
    const bm_status st = bm_sampler_open(&l->sampler, &p, g->s->m->config.n_vocab);
    free(bias);
    if (!st) bm_sampler_set_counter(l->sampler, f->counter);
    return st;
}

static bm_status read_text(loaded *l, const bm_stream *g, bm_reader *r, const char *path) {
    const fixed *f = &l->f;
    BM_TRY(bm_alloc(&l->token, (f->n_tokens + 1) * sizeof *l->token, "tokens"));
    BM_TRY(bm_alloc(&l->turn, (f->n_turns + 1) * sizeof *l->turn, "turns"));
    BM_TRY(bm_alloc(&l->held, f->n_held + 1, "text"));
    bm_take_to(r, l->token, f->n_tokens * sizeof *l->token);
    for (uint64_t i = 0; i < f->n_tokens; i++)
        if (l->token[i] < 0 || l->token[i] >= g->s->m->config.n_vocab) return damaged(path, "a token is out of range");
    for (uint64_t i = 0; i < f->n_turns; i++) {
        uint64_t at = 0;
        bm_take_u64(r, &at);
        if (at > f->n_tokens || (i && at <= l->turn[i - 1])) return damaged(path, "a turn is out of range");
        l->turn[i] = at;
    }
    bm_take_to(r, l->held, f->n_held);
    l->state = bm_take(r, f->state_bytes);
    return BM_OK;
}

static bm_status parse(loaded *l, const bm_stream *g, const uint8_t *data, size_t size, const char *path) {
    if (size < sizeof l->f + sizeof(XXH128_canonical_t) || memcmp(data, magic, sizeof magic))
        return bm_fail(BM_EFORMAT, "%s: found no session, expected a file written by /save or --session", path);
    bm_reader r = { data, data + size - sizeof(XXH128_canonical_t), data };
    XXH128_canonical_t sum;
    memcpy(&sum, r.end, sizeof sum);
    if (!XXH128_isEqual(XXH128_hashFromCanonical(&sum), XXH3_128bits(data, bm_left(&r)))) return damaged(path, "its checksum differs");
    bm_take_to(&r, &l->f, sizeof l->f);
    BM_TRY(check_fixed(g, &l->f, bm_left(&r), path));
    BM_TRY(read_settings(l, g, &r));
    return read_text(l, g, &r, path);
}

static void replace(bm_stream *g, loaded *l) {
    const fixed *f = &l->f;
    bm_stream_drop_snapshots(g, 0);
    bm_sampler_close(g->sampler);
    free(g->token);
    free(g->turn);
    free(g->held);
    g->sampler = l->sampler;
    g->token = l->token;
    g->n = f->n_tokens;
    g->cap = f->n_tokens + 1;
    g->fed = f->fed;
    g->turn = l->turn;
    g->n_turns = f->n_turns;
    g->cap_turns = f->n_turns + 1;
    g->held = l->held;
    g->n_held = f->n_held;
    g->cap_held = f->n_held + 1;
    g->utf8.n = f->n_pending;
    memcpy(g->utf8.pending, f->pending, sizeof g->utf8.pending);
    *l = (loaded){ 0 };
}

bm_status bm_stream_load(bm_stream *g, const char *path) {
    loaded l = { 0 };
    char *data;
    size_t size;
    const size_t most = bm_state_bytes(g->s) + sizeof l.f + (size_t)MAX_TOKENS * 12 + MAX_HELD;
    BM_TRY(bm_file_read(path, most, &data, &size));
    bm_status st = parse(&l, g, (const uint8_t *)data, size, path);
    if (!st) st = bm_state_set(g->s, g->slot, l.state);
    if (!st) replace(g, &l);
    bm_sampler_close(l.sampler);
    free(l.token);
    free(l.turn);
    free(l.held);
    free(data);
    return st;
}
