/* tests/test_laws.c - the laws of the whole model, bit for bit, in each arithmetic and weight type:
 * prefill == decode == any chunking == any batch == any number of threads == restored.  One arithmetic of a GPU excepted. */
#include "lib_tiny.h"
#include <math.h>

enum { T = 150, MOST = 4 };

typedef struct law { bm_dtype type; bm_arith arith; rig r; bm_token ids[T]; float *want, *got; } law;

static void law_open(law *w, int threads, int slots, int chunk) {
    rig_open(&w->r, tiny_gguf(w->type), threads, (bm_session_options){ .slots = slots, .chunk = chunk, .arith = w->arith });
    random_ids(w->ids, T, w->r.V, 3);
    w->want = malloc(sizeof(float) * T * (size_t)w->r.V);
    w->got = calloc(T * (size_t)w->r.V, sizeof(float));
    assert_true(w->want && w->got);
}
static void law_close(law *w) {
    rig_close(&w->r);
    free(w->want);
    free(w->got);
}
static bool on_gpu(void) { return !strncmp(test_device(), "cuda", 4); }
/* On a GPU several kernels make native products, which sum in other orders: one up to 5 rows, another to 128 (1,024), a third from there on.
 * Across them the law is a bound, a rounding to bf16 in each of 12 products (docs/NUMERICS.md). */
static bool several_kernels(const law *w) { return w->type != BM_F32 && w->arith != BM_ARITH_F32 && on_gpu(); }
static void near(const law *w, const char *what) {
    const size_t n = T * (size_t)w->r.V;
    double peak = 0, most = 0;
    for (size_t i = 0; i < n; i++) {
        peak = fmax(peak, fabs((double)w->want[i]));
        most = fmax(most, fabs((double)w->want[i] - (double)w->got[i]));
    }
    if (!(most <= sqrt(12) / 256 * peak)) fail_msg("%s, native: %s is off by %g of %g", bm_dtype_name(w->type), what, most, peak);
    memset(w->got, 0, sizeof(float) * n);
}
static void same_bits(const law *w, const char *what) {
    if (memcmp(w->want, w->got, sizeof(float) * T * (size_t)w->r.V))
        fail_msg("%s, %s: %s differs", bm_dtype_name(w->type), w->arith == BM_ARITH_F32 ? "f32" : "native", what);
    memset(w->got, 0, sizeof(float) * T * (size_t)w->r.V);
}
static void same(const law *w, const char *what) {
    if (several_kernels(w)) near(w, what);
    else same_bits(w, what);
}

static void in_steps(law *w, int slot, const size_t *step, size_t n_steps) {
    OK(bm_state_set(w->r.s, slot, NULL));
    for (size_t at = 0, k = 0; at < T; k++) {
        const size_t n = step[k % n_steps] < T - at ? step[k % n_steps] : T - at;
        all_logits(w->r.s, slot, w->ids + at, n, w->got + at * (size_t)w->r.V);
        at += n;
    }
}

/* The whole text in a session of its own, against what another gave. */
static void another(law *w, float *want, int threads, int chunk, const char *what) {
    law_open(w, threads, 1, chunk);
    free(w->want);
    w->want = want;
    all_logits(w->r.s, 0, w->ids, T, w->got);
    same(w, what);
    w->want = NULL;
    law_close(w);
}

static void chunking(law *w) {
    law_open(w, 1, 1, 512);
    all_logits(w->r.s, 0, w->ids, T, w->want);
    in_steps(w, 0, (size_t[]){ 1 }, 1);
    same(w, "token by token");
    in_steps(w, 0, (size_t[]){ 3, 1, 17, 2, 64 }, 5);
    same(w, "uneven pieces");
    float *want = w->want, *pieces = malloc(sizeof(float) * T * (size_t)w->r.V);
    assert_non_null(pieces);
    in_steps(w, 0, (size_t[]){ 128, T - 128 }, 2);
    memcpy(pieces, w->got, sizeof(float) * T * (size_t)w->r.V);
    same(w, "two pieces");
    w->want = pieces;
    in_steps(w, 0, (size_t[]){ 40, 9, T - 49 }, 3);
    same_bits(w, "pieces that one kernel makes");
    law_close(w);
    for (int chunk = 1; chunk < 70; chunk += 11) another(w, want, 2, chunk, "another chunk size");
    for (int threads = 2; threads <= 5; threads++) another(w, want, threads, 512, "another number of threads");
    free(want);
}

static bm_status keep_row(void *user, size_t index, const float *logits) {
    law *w = ((void **)user)[0];
    float *out = ((void **)user)[1];
    memcpy(out + index * (size_t)w->r.V, logits, sizeof(float) * (size_t)w->r.V);
    return BM_OK;
}

/* Ragged texts side by side, then one token each, against each alone. */
static void batch(law *w) {
    const bool some = several_kernels(w);       /* then texts of 6 rows and more, and not the token */
    const size_t len[MOST] = { 37, some ? 11 : 1, 64, 20 };
    law_open(w, 2, MOST, 48);
    const size_t V = (size_t)w->r.V;
    float *alone = malloc(sizeof(float) * MOST * T * V), *together = calloc(MOST * T * V, sizeof(float));
    assert_true(alone && together);
    for (int i = 0; i < MOST; i++) {
        OK(bm_state_set(w->r.s, 0, NULL));
        all_logits(w->r.s, 0, w->ids + i, len[i] + 1, alone + (size_t)i * T * V);
    }
    for (int i = 0; i < MOST; i++) OK(bm_state_set(w->r.s, i, NULL));
    bm_input in[MOST];
    void *user[MOST][2];
    for (int i = 0; i < MOST; i++) {
        user[i][0] = w;
        user[i][1] = together + (size_t)i * T * V;
        in[i] = (bm_input){ .slot = MOST - 1 - i, .tokens = w->ids + i, .n = len[i], .want = BM_WANT_ALL, .fn = keep_row, .user = user[i] };
    }
    OK(bm_forward(w->r.s, in, MOST));
    for (int i = 0; i < MOST; i++) {
        in[i].tokens += len[i];
        in[i].n = 1;
        in[i].want = BM_WANT_LAST;
    }
    OK(bm_forward(w->r.s, in, MOST));
    for (int i = 0; i < MOST; i++)
        memcpy(together + ((size_t)i * T + len[i]) * V, bm_logits(w->r.s, MOST - 1 - i), sizeof(float) * V);
    for (int i = 0; i < MOST; i++)
        if (memcmp(alone + (size_t)i * T * V, together + (size_t)i * T * V, sizeof(float) * (len[i] + !some) * V))
            fail_msg("%s, %s: text %d of a batch differs from the same text alone", bm_dtype_name(w->type),
                     w->arith == BM_ARITH_F32 ? "f32" : "native", i);
    free(alone);
    free(together);
    law_close(w);
}

/* A state taken in the middle, put into another slot, and a copy, go on as if nothing had happened. */
static void restored(law *w) {
    law_open(w, 1, 3, 512);
    const size_t V = (size_t)w->r.V, half = 70;
    void *state = malloc(bm_state_bytes(w->r.s));
    assert_non_null(state);
    all_logits(w->r.s, 0, w->ids, half, w->want);
    all_logits(w->r.s, 0, w->ids + half, T - half, w->want + half * V);
    OK(bm_state_set(w->r.s, 0, NULL));
    all_logits(w->r.s, 0, w->ids, half, w->got);
    OK(bm_state_get(w->r.s, 0, state));
    OK(bm_state_copy(w->r.s, 1, 0));
    all_logits(w->r.s, 1, w->ids + half, T - half, w->got + half * V);
    same_bits(w, "a copied slot");
    OK(bm_state_set(w->r.s, 2, state));
    memcpy(w->got, w->want, sizeof(float) * half * V);
    all_logits(w->r.s, 2, w->ids + half, T - half, w->got + half * V);
    same_bits(w, "a restored slot");
    free(state);
    law_close(w);
}

/* bm_score is -log softmax of the logits. */
static void score(law *w) {
    law_open(w, 2, 1, 512);
    float *nll = malloc(sizeof(float) * T), *again = malloc(sizeof(float) * T);
    assert_true(nll && again);
    OK(bm_score(w->r.s, 0, w->ids, T, nll));
    OK(bm_state_set(w->r.s, 0, NULL));
    OK(bm_score(w->r.s, 0, w->ids, 130, again));
    assert_memory_equal(nll, again, 129 * sizeof *nll);
    OK(bm_state_set(w->r.s, 0, NULL));
    all_logits(w->r.s, 0, w->ids, T, w->got);
    for (size_t t = 0; t + 1 < T; t++) {
        const float *l = w->got + t * (size_t)w->r.V;
        double sum = 0;
        for (int v = 0; v < w->r.V; v++) sum += exp((double)l[v]);
        assert_true(fabs((double)nll[t] - (log(sum) - (double)l[w->ids[t + 1]])) < 1e-5);
    }
    free(nll);
    free(again);
    law_close(w);
}

static bm_token largest(const float *l, int n) {
    int best = 0;
    for (int v = 1; v < n; v++) if (l[v] > l[best]) best = v;
    return best;
}

/* The best token is that of the logits, a text at once, token by token and beside others; of the session's ids only. */
static void best(law *w) {
    enum { IDS = 60, STEPS = 12 };
    law_open(w, 2, MOST, 48);
    bm_session *s;
    bm_input in[MOST];
    bm_token next[MOST];
    OK(bm_session_open(&s, w->r.m, &(bm_session_options){ .slots = MOST, .chunk = 16, .arith = w->arith, .ids = IDS }));
    char *state = malloc(2 * bm_state_bytes(s));
    assert_non_null(state);
    for (int i = 0; i < MOST; i++) in[i] = (bm_input){ .slot = i, .tokens = w->ids + i, .n = (size_t)(1 + 9 * i) };
    for (int step = 0; step < STEPS; step++) {
        for (int i = 0; i < MOST; i++) in[i].want = BM_WANT_LAST;
        OK(bm_forward(w->r.s, in, MOST));
        assert_int_equal(bm_best(w->r.s, 1), -1);
        for (int i = 0; i < MOST; i++)
            in[i].want = step % 3 == 1 && i == 2 ? BM_WANT_NONE : step % 3 == 2 && i ? BM_WANT_LAST : BM_WANT_BEST;
        OK(bm_forward(s, in, MOST));
        for (int i = 0; i < MOST; i++) {
            const float *l = bm_logits(w->r.s, i);
            next[i] = largest(l, IDS);
            assert_int_equal(bm_best(s, i), in[i].want == BM_WANT_BEST ? next[i] : -1);
            assert_int_equal(bm_logits(s, i) != NULL, in[i].want == BM_WANT_LAST);
            if (bm_logits(s, i)) assert_memory_equal(l, bm_logits(s, i), sizeof *l * (size_t)w->r.V);
            in[i].tokens = &next[i];
            in[i].n = 1;
        }
    }
    for (int i = 0; i < 2 * MOST; i++) {                /* a text at a time, and two in turn */
        bm_input one[2] = { in[i % MOST], in[(i + 2) % MOST] };
        one[0].want = one[1].want = BM_WANT_LAST;
        OK(bm_forward(w->r.s, one, 1 + i / MOST));
        one[0].want = one[1].want = BM_WANT_BEST;
        OK(bm_forward(s, one, 1 + i / MOST));
        assert_int_equal(bm_best(s, i % MOST), largest(bm_logits(w->r.s, i % MOST), IDS));
        next[i % MOST] = bm_best(s, i % MOST);
    }
    for (size_t n = 1; n < 3; n++) {                    /* as many rows in all, other lengths */
        for (int i = 0; i < 2; i++) in[i] = (bm_input){ .slot = i, .tokens = w->ids, .n = i ? 3 - n : n, .want = BM_WANT_LAST };
        for (int i = 0; i < 2; i++) OK(bm_forward(w->r.s, &in[i], 1));
        in[0].want = in[1].want = BM_WANT_BEST;
        OK(bm_forward(s, in, 2));
        for (int i = 0; i < 2; i++) {
            OK(bm_state_get(w->r.s, i, state));
            OK(bm_state_get(s, i, state + bm_state_bytes(s)));
            assert_memory_equal(state, state + bm_state_bytes(s), bm_state_bytes(s));
        }
    }
    OK(bm_state_copy(s, 3, 0));
    assert_int_equal(bm_best(s, 3), bm_best(s, 0));
    OK(bm_state_set(s, 0, NULL));
    assert_int_equal(bm_best(s, 0), -1);
    assert_int_equal(bm_best(s, MOST), -1);
    free(state);
    bm_session_close(s);
    assert_int_equal(bm_session_open(&s, w->r.m, &(bm_session_options){ .ids = w->r.V + 1 }), BM_EARG);
    law_close(w);
}

/* A token told while it is fed is that of step after step, whichever texts go on and whatever comes between. */
static void ahead(law *w) {
    enum { STEPS = 9 };
    static const int slots[MOST] = { 3, 1, 0, 2 };
    law_open(w, 2, MOST, 48);
    bm_session *s;
    bm_input in[MOST];
    bm_token next[MOST];
    OK(bm_session_open(&s, w->r.m, &(bm_session_options){ .slots = MOST, .chunk = 16, .arith = w->arith }));
    char *state = malloc(2 * bm_state_bytes(s));
    assert_non_null(state);
    for (int i = 0; i < MOST; i++)
        in[i] = (bm_input){ .slot = slots[i], .tokens = w->ids + i, .n = (size_t)(1 + 9 * i), .want = BM_WANT_BEST };
    OK(bm_forward(w->r.s, in, MOST));
    OK(bm_forward(s, in, MOST));
    for (int step = 0; step < STEPS; step++) {
        const int n = step % 4 == 3 ? 2 : MOST;
        OK(bm_next(s, slots, n));
        for (int i = 0; i < n; i++) {
            next[i] = bm_best(w->r.s, slots[i]);
            assert_int_equal(bm_best(s, slots[i]), next[i]);
            in[i].tokens = &next[i];
            in[i].n = 1;
        }
        OK(bm_forward(w->r.s, in, n));
        if (step == 4) OK(bm_forward(s, NULL, 0));
        if (step == 5) OK(bm_state_copy(w->r.s, slots[3], slots[0]));
        if (step == 5) OK(bm_state_copy(s, slots[3], slots[0]));
        for (int i = 0; step == 4 && i < MOST; i++) assert_int_equal(bm_best(s, i), bm_best(w->r.s, i));
        if (step == 6) OK(bm_forward(w->r.s, &in[1], 1));
        if (step == 6) OK(bm_forward(s, &in[1], 1));
    }
    for (int i = 0; i < MOST; i++) {
        OK(bm_state_get(w->r.s, i, state));
        OK(bm_state_get(s, i, state + bm_state_bytes(s)));
        assert_memory_equal(state, state + bm_state_bytes(s), bm_state_bytes(s));
    }
    OK(bm_state_set(s, 0, NULL));
    assert_int_equal(bm_next(s, slots, MOST), BM_EARG);
    assert_non_null(strstr(bm_error(), "slot 0: found no best token"));
    assert_int_equal(bm_next(s, (int[]){ 1, 1 }, 2), BM_EARG);
    assert_int_equal(bm_next(s, (int[]){ MOST }, 1), BM_EARG);
    assert_int_equal(bm_next(s, slots, MOST + 1), BM_EARG);
    OK(bm_next(s, slots, 1));
    free(state);
    bm_session_close(s);
    law_close(w);
}

/* The same of n texts side by side, of which a GPU may leave no logits; asked for once in between. */
static void many(law *w, int n) {
    enum { STEPS = 6, CHUNK = 256 };
    law_open(w, 2, n, CHUNK);
    bm_session *s;
    bm_input *in = calloc((size_t)n, sizeof *in);
    bm_token *next = calloc((size_t)n, sizeof *next);
    int *slots = calloc((size_t)n, sizeof *slots);
    assert_true(in && next && slots);
    OK(bm_session_open(&s, w->r.m, &(bm_session_options){ .slots = n, .chunk = CHUNK, .arith = w->arith }));
    for (int i = 0; i < n; i++) {
        slots[i] = i;
        next[i] = (5 + 13 * i) % w->r.V;
        in[i] = (bm_input){ .slot = i, .tokens = &next[i], .n = 1, .want = BM_WANT_BEST };
    }
    OK(bm_forward(w->r.s, in, n));
    OK(bm_forward(s, in, n));
    for (int step = 0; step < STEPS; step++) {
        if (step == STEPS / 2) {
            OK(bm_forward(s, NULL, 0));
            for (int i = 0; i < n; i++) assert_int_equal(bm_best(s, i), next[i] = bm_best(w->r.s, i));
            for (int i = 0; i < n; i++) in[i].want = BM_WANT_LAST;
            OK(bm_forward(w->r.s, in, n));
            OK(bm_forward(s, in, n));
            for (int i = 0; i < n; i++) {
                assert_memory_equal(bm_logits(s, i), bm_logits(w->r.s, i), sizeof(float) * (size_t)w->r.V);
                next[i] = largest(bm_logits(s, i), w->r.V);
                in[i].want = BM_WANT_BEST;
            }
            OK(bm_forward(w->r.s, in, n));
            OK(bm_forward(s, in, n));
        }
        OK(bm_next(s, slots, n));
        for (int i = 0; i < n; i++) assert_int_equal(bm_best(s, i), next[i] = bm_best(w->r.s, i));
        OK(bm_forward(w->r.s, in, n));
    }
    free(in);
    free(next);
    free(slots);
    bm_session_close(s);
    law_close(w);
}
static void many_texts(law *w) {
    many(w, 8);
    many(w, on_gpu() ? 130 : 64);       /* a CPU takes no more at once */
}

enum { EXPERTS = 4, ALL = 4 + 3 };     /* of the first MoE layer of a tiny model, and of both */

/* The model again, with room for n experts. */
static void open_limited(law *w, int n) {
    bm_page_times t;
    uint64_t session;
    w->r.d->limit = (uint64_t)1 << 40;
    OK(bm_model_open(&w->r.m, w->r.d, tiny_gguf(w->type)));
    OK(bm_session_bytes(w->r.m, NULL, &session));
    bm_model_pages(w->r.m, &t);
    assert_int_equal(t.pages, ALL);
    w->r.d->limit = w->r.m->taken - bm_taken(w->r.m->be, t.bytes) + session + w->r.d->be->grain + (uint64_t)n * (t.bytes / ALL) + 1;
    bm_model_close(w->r.m);
    OK(bm_model_open(&w->r.m, w->r.d, tiny_gguf(w->type)));
    assert_true(w->r.m->taken + session <= w->r.d->limit);
    bm_model_pages(w->r.m, &t);
    assert_int_equal(t.pages, n);
    OK(bm_session_open(&w->r.s, w->r.m, &(bm_session_options){ .arith = w->arith }));
}
static void close_model(law *w) {
    bm_session_close(w->r.s);
    bm_model_close(w->r.m);
}
/* Back to a law that can be closed. */
static void open_unlimited(law *w) {
    w->r.d->limit = 0;
    OK(bm_model_open(&w->r.m, w->r.d, tiny_gguf(w->type)));
    OK(bm_session_open(&w->r.s, w->r.m, NULL));
}

/* Experts copied in as they are chosen change no bit; the fewest pages that do are those of one layer. */
static void pages(law *w) {
    bm_page_times t;
    uint64_t last = 0;
    law_open(w, 2, 1, 48);
    all_logits(w->r.s, 0, w->ids, T, w->want);
    bm_model_pages(w->r.m, &t);
    assert_true(!t.pages && !t.hits);
    close_model(w);
    w->r.d->limit = 1;
    assert_int_equal(bm_model_open(&w->r.m, w->r.d, tiny_gguf(w->type)), BM_EMEMORY);
    assert_non_null(strstr(bm_error(), "limit: found 0 MB"));
    for (int n = EXPERTS; n <= ALL; n++) {
        open_limited(w, n);
        all_logits(w->r.s, 0, w->ids, 100, w->got);
        for (size_t i = 100; i < T; i++) all_logits(w->r.s, 0, w->ids + i, 1, w->got + i * (size_t)w->r.V);
        same(w, "experts in pages");
        bm_model_pages(w->r.m, &t);
        assert_true(t.hits && t.misses >= ALL - 1 && (n > EXPERTS || t.misses > ALL) && (n < ALL || t.misses <= ALL));
        assert_true(!last || t.misses <= last);
        last = t.misses;
        bm_session *other;
        assert_int_equal(bm_session_open(&other, w->r.m, &(bm_session_options){ .slots = 4000 }), BM_EMEMORY);
        close_model(w);
    }
    open_unlimited(w);
    law_close(w);
}

/* One row through expert e of a layer. */
static void choose(law *w, int layer, int e) {
    const int X = w->r.m->config.layer[layer].n_experts;
    const bm_layer *l = &w->r.m->w.layer[layer];
    int32_t expert = e, order = 0, first[EXPERTS + 1];
    float gate = 1, x[64] = { 0 }, y[64], hidden[2 * 256];
    for (int i = 0; i <= X; i++) first[i] = i > e;
    const bm_op_route route = { .M = 1, .X = X, .k = 1, .expert = &expert, .order = &order, .first = first, .gate = &gate };
    const bm_op_experts op = { .M = 1, .D = 64, .F = 256, .X = X, .arith = BM_ARITH_F32, .route = &route, .gate = l->gate,
                               .up = l->up, .down = l->down, .x = x, .hidden = hidden, .y = y };
    bm_expert_door *door = bm_pages_door(w->r.m->pages);
    door->forward(door, w->r.m->be, layer, &op);
    OK(bm_pages_failed(w->r.m->pages));
}
/* The expert used longest ago makes room, not the one that came first. */
static void test_oldest(void **state) {
    (void)state;
    law w = { .type = BM_F32, .arith = BM_ARITH_F32 };
    bm_page_times t;
    law_open(&w, 1, 1, 16);
    if (w.r.d->be->reads_host) {            /* the operation's arrays are this function's */
        close_model(&w);
        open_limited(&w, EXPERTS);
        for (int e = 0; e < EXPERTS; e++) choose(&w, 1, e);
        choose(&w, 1, 0);
        choose(&w, 2, 0);                   /* over expert 1 */
        choose(&w, 1, 0);
        choose(&w, 1, 2);
        bm_model_pages(w.r.m, &t);
        assert_int_equal(t.misses, EXPERTS + 1);
        choose(&w, 1, 1);
        bm_model_pages(w.r.m, &t);
        assert_int_equal(t.misses, EXPERTS + 2);
        assert_int_equal(t.hits, 3);
        close_model(&w);
        open_unlimited(&w);
    }
    law_close(&w);
}

static void every(void (*fn)(law *)) {
    for (int t = 0; t < BM_DTYPE_COUNT; t++)
        if (!getenv("BM_QUICK") || t == BM_F32 || t == BM_BF16 || t == BM_Q8_0)
            for (int a = BM_ARITH_NATIVE; a <= BM_ARITH_F32; a++) fn(&(law){ .type = (bm_dtype)t, .arith = (bm_arith)a });
}
static void test_chunking(void **state) { (void)state; every(chunking); }
static void test_batch(void **state) { (void)state; every(batch); }
static void test_restored(void **state) { (void)state; every(restored); }
static void test_score(void **state) { (void)state; every(score); }
static void test_best(void **state) { (void)state; every(best); }
static void test_ahead(void **state) { (void)state; every(ahead); }
static void test_many(void **state) { (void)state; every(many_texts); }
static void test_pages(void **state) { (void)state; every(pages); }

/* A failing reader, a wrong id: the slot is empty, or untouched. */
static bm_status refuse(void *user, size_t index, const float *logits) {
    (void)user;
    (void)logits;
    return index == 5 ? BM_ECANCELLED : BM_OK;
}
static void test_failures(void **state) {
    (void)state;
    law w = { .type = BM_BF16 };
    law_open(&w, 1, 2, 16);
    const size_t bytes = bm_state_bytes(w.r.s);
    char *a = malloc(bytes), *zero = calloc(1, bytes);
    assert_true(a && zero);
    OK(bm_forward(w.r.s, &(bm_input){ .tokens = w.ids, .n = 9, .want = BM_WANT_LAST }, 1));
    OK(bm_state_get(w.r.s, 0, a));
    bm_token bad[3] = { 1, 100, 2 };
    assert_int_equal(bm_forward(w.r.s, &(bm_input){ .tokens = bad, .n = 3 }, 1), BM_EARG);
    assert_non_null(strstr(bm_error(), "found id 100, expected 0 to 99"));
    char *b = malloc(bytes);
    OK(bm_state_get(w.r.s, 0, b));
    assert_memory_equal(a, b, bytes);
    assert_non_null(bm_logits(w.r.s, 0));
    assert_int_equal(bm_forward(w.r.s, (bm_input[]){ { .slot = 1, .n = 1, .tokens = bad }, { .slot = 1, .n = 1, .tokens = bad } }, 2), BM_EARG);
    assert_int_equal(bm_forward(w.r.s, &(bm_input){ .tokens = w.ids, .n = 20, .want = BM_WANT_ALL, .fn = refuse }, 1), BM_ECANCELLED);
    OK(bm_state_get(w.r.s, 0, b));
    assert_memory_equal(zero, b, bytes);
    assert_null(bm_logits(w.r.s, 0));
    free(a);
    free(b);
    free(zero);
    law_close(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunking), cmocka_unit_test(test_batch), cmocka_unit_test(test_restored),
        cmocka_unit_test(test_score),    cmocka_unit_test(test_best),  cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_many),     cmocka_unit_test(test_pages), cmocka_unit_test(test_oldest),
        cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests_name("laws", tests, NULL, NULL);
}
