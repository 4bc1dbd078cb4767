/* tests/test_stream.c - streams: turning back, session files, samplers. */
#include "lib_tiny.h"
#include "model/stream.h"
#include <math.h>

enum { N = 90 };

static void generate(bm_stream *g, size_t n) {
    bm_piece p;
    for (size_t i = 0; i < n; i++) OK(bm_stream_next(g, true, &p, NULL, NULL));
}
static bm_token *tokens_of(const bm_stream *g, size_t *n) {
    const bm_token *t = bm_stream_tokens(g, n);
    bm_token *copy = malloc(*n * sizeof *copy + 1);
    memcpy(copy, t, *n * sizeof *t);
    return copy;
}
static void same_tokens(const bm_stream *g, const bm_token *want, size_t n_want) {
    size_t n;
    const bm_token *t = bm_stream_tokens(g, &n);
    assert_int_equal(n, n_want);
    assert_memory_equal(t, want, n * sizeof *t);
}

static bm_sampling settings(void) {
    static const bm_logit_bias bias[2] = { { 3, 1.5f }, { 9, -2 } };
    bm_sampling p = bm_sampling_default();
    p.temperature = 3;          /* random weights are sure of themselves */
    p.top_k = 50;
    p.top_p = 0.98f;
    p.typical_p = 0.99f;
    p.min_p = 0.001f;
    p.repetition_penalty = 1.1f;
    p.frequency_penalty = 0.1f;
    p.presence_penalty = 0.1f;
    p.seed = 5;
    p.n_bias = 2;
    p.bias = bias;
    return p;
}

typedef struct desk { rig r; bm_stream *g; } desk;
static void desk_open(desk *d, bm_arith arith) {
    bm_token ids[N];
    const bm_sampling p = settings();
    rig_open(&d->r, tiny_gguf(BM_BF16), 2, (bm_session_options){ .slots = 2, .chunk = 32, .arith = arith });
    random_ids(ids, N, d->r.V, 2);
    OK(bm_stream_open(&d->g, d->r.s, 0, NULL, &p));
    OK(bm_stream_add_tokens(d->g, ids, N));
}
static void desk_close(desk *d) {
    bm_stream_close(d->g);
    rig_close(&d->r);
}

/* Greedy text after any turning back equals the text never turned back. */
static void test_back(void **state) {
    (void)state;
    desk d;
    size_t n, n_mid;
    desk_open(&d, BM_ARITH_NATIVE);
    bm_sampling greedy = bm_sampling_default();
    greedy.temperature = 0;
    OK(bm_stream_sampling(d.g, &greedy));
    generate(d.g, 40);
    OK(bm_stream_turn(d.g));
    bm_token *mid = tokens_of(d.g, &n_mid);
    for (int turn = 0; turn < 5; turn++) {
        OK(bm_stream_add_tokens(d.g, (bm_token[]){ 7, (bm_token)turn }, 2));
        generate(d.g, 400);
        OK(bm_stream_turn(d.g));
    }
    bm_token *all = tokens_of(d.g, &n);
    assert_int_equal(bm_stream_turns(d.g), 6);
    assert_true(d.g->n_snaps <= BM_STREAM_SNAPSHOTS);
    OK(bm_stream_back(d.g, 2));
    assert_int_equal(bm_stream_turns(d.g), 4);
    same_tokens(d.g, all, n - 2 * 402);
    for (int turn = 3; turn < 5; turn++) {
        OK(bm_stream_add_tokens(d.g, (bm_token[]){ 7, (bm_token)turn }, 2));
        generate(d.g, 400);
    }
    same_tokens(d.g, all, n);
    OK(bm_stream_rewind(d.g, 95));
    generate(d.g, n_mid - 95);
    same_tokens(d.g, mid, n_mid);
    assert_int_equal(bm_stream_back(d.g, 1), BM_EARG);
    assert_int_equal(bm_stream_rewind(d.g, n_mid + 1), BM_EARG);
    OK(bm_stream_reset(d.g));
    bm_piece p;
    assert_int_equal(bm_stream_next(d.g, true, &p, NULL, NULL), BM_EARG);
    free(mid);
    free(all);
    desk_close(&d);
}

/* The text of best tokens is the text of logits from which the largest is picked, which a bias of nothing asks for. */
static void test_greedy(void **state) {
    (void)state;
    static const bm_logit_bias nothing = { 3, 0 };
    bm_sampling p = bm_sampling_default();
    desk d;
    size_t n;
    desk_open(&d, BM_ARITH_NATIVE);
    p.temperature = 0;
    OK(bm_stream_sampling(d.g, &p));
    generate(d.g, 60);
    assert_true(bm_best(d.r.s, 0) >= 0 && !bm_logits(d.r.s, 0));
    bm_token *want = tokens_of(d.g, &n);
    OK(bm_stream_rewind(d.g, n - 60));
    p.n_bias = 1;
    p.bias = &nothing;
    OK(bm_stream_sampling(d.g, &p));
    generate(d.g, 60);
    assert_true(bm_best(d.r.s, 0) < 0 && bm_logits(d.r.s, 0));
    same_tokens(d.g, want, n);
    free(want);
    desk_close(&d);
}

/* Saved, loaded elsewhere, gone on: the same tokens as without. */
static void test_session_file(void **state) {
    (void)state;
    desk d, e;
    size_t n;
    for (int a = BM_ARITH_NATIVE; a <= BM_ARITH_F32; a++) {
        const char *path = scratch_path("a.session");
        bm_sampling p = bm_sampling_default();
        if (a == BM_ARITH_F32) p.temperature = 0;           /* on a GPU the last token is fed by then */
        desk_open(&d, (bm_arith)a);
        OK(bm_stream_sampling(d.g, &p));
        generate(d.g, 30);
        OK(bm_stream_turn(d.g));
        generate(d.g, 7);
        OK(bm_stream_save(d.g, path));
        generate(d.g, 50);
        bm_token *want = tokens_of(d.g, &n);
        desk_open(&e, (bm_arith)a);
        OK(bm_stream_reset(e.g));
        OK(bm_stream_load(e.g, path));
        assert_int_equal(bm_stream_turns(e.g), 1);
        generate(e.g, 50);
        same_tokens(e.g, want, n);
        OK(bm_stream_back(e.g, 1));
        OK(bm_stream_load(d.g, path));
        generate(d.g, 50);
        same_tokens(d.g, want, n);
        free(want);
        desk_close(&d);
        desk_close(&e);
    }
}

static bool records_nothing(bm_backend *b, const void *owner, int M) {
    (void)b, (void)owner, (void)M;
    return false;
}
static void recorded_nothing(bm_backend *b) { (void)b; }
static void forgets_nothing(bm_backend *b, const void *owner) { (void)b, (void)owner; }
/* As where steps are recorded: the last token is fed while it is told. */
static void run_ahead(desk *d) {
    bm_backend *b = d->r.d->be;
    if (!b->replay) b->replay = records_nothing, b->recorded = recorded_nothing, b->forget = forgets_nothing;
}

/* Fed while they are told, the tokens are the same: turned back, saved, and where every other is picked from logits. */
static void test_ahead(void **state) {
    (void)state;
    static const bm_logit_bias nothing = { 3, 0 };
    const char *path = scratch_path("ahead.session");
    bm_sampling best = bm_sampling_default(), picked;
    desk d, e;
    size_t n;
    best.temperature = 0;
    picked = best;
    picked.n_bias = 1;
    picked.bias = &nothing;
    desk_open(&d, BM_ARITH_F32);
    OK(bm_stream_sampling(d.g, &best));
    generate(d.g, 160);
    bm_token *want = tokens_of(d.g, &n);
    desk_open(&e, BM_ARITH_F32);
    run_ahead(&e);
    OK(bm_stream_sampling(e.g, &best));
    generate(e.g, 100);
    assert_int_equal(e.g->fed, e.g->n);
    OK(bm_stream_save(e.g, path));
    generate(e.g, 60);
    same_tokens(e.g, want, n);
    OK(bm_stream_load(e.g, path));
    generate(e.g, 60);
    same_tokens(e.g, want, n);
    OK(bm_stream_rewind(e.g, n - 90));
    for (int i = 0; i < 90; i++) {
        OK(bm_stream_sampling(e.g, i % 3 ? &best : &picked));
        generate(e.g, 1);
    }
    same_tokens(e.g, want, n);
    free(want);
    desk_close(&d);
    desk_close(&e);
}

/* Damaged files, another model, another arithmetic: a sentence, and the stream goes on as if nothing happened. */
static bm_stream *victim;
static bm_status try_load(const uint8_t *data, size_t n) {
    const char *path = scratch_path("damaged.session");
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    if (n) assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
    return bm_stream_load(victim, path);
}
static void test_session_damage(void **state) {
    (void)state;
    bm_config c = tiny_config();
    c.n_layers = 1;
    c.d_model = 8;
    c.d_inner = 16;
    c.d_state = 4;
    c.n_vocab = 20;
    rig r, other;
    size_t n, n_want;
    OK(bm_init(&c, 1, BM_F32, scratch_path("one.gguf"), NULL, NULL, NULL));
    OK(bm_init(&c, 2, BM_F32, scratch_path("two.gguf"), NULL, NULL, NULL));
    rig_open(&r, scratch_path("one.gguf"), 1, (bm_session_options){ 0 });
    rig_open(&other, scratch_path("two.gguf"), 1, (bm_session_options){ 0 });
    OK(bm_stream_open(&victim, r.s, 0, NULL, NULL));
    OK(bm_stream_add_tokens(victim, (bm_token[]){ 1, 2, 3 }, 3));
    generate(victim, 5);
    OK(bm_stream_turn(victim));
    OK(bm_stream_save(victim, scratch_path("good.session")));
    generate(victim, 5);
    bm_token *want = tokens_of(victim, &n_want);
    uint8_t *data = read_file(scratch_path("good.session"), &n);
    assert_int_equal(damage(data, n, try_load), 0);
    same_tokens(victim, want, n_want);
    bm_stream *g;
    OK(bm_stream_open(&g, other.s, 0, NULL, NULL));
    assert_int_equal(bm_stream_load(g, scratch_path("good.session")), BM_EARG);
    assert_non_null(strstr(bm_error(), "saved with another model"));
    bm_stream_close(g);
    free(data);
    free(want);
    bm_stream_close(victim);
    rig_close(&r);
    rig_close(&other);
}

/* ---- samplers --------------------------------------------------------------------------------------------- */

enum { V = 6, DRAWS = 20000 };
/* Probabilities .4 .3 .15 .1 .04 .01 at temperature 1. */
static const double prob[V] = { 0.4, 0.3, 0.15, 0.1, 0.04, 0.01 };

static void frequencies(const bm_sampling *p, const bm_token *recent, size_t n_recent, const bool *allowed, double out[V]) {
    float logits[V];
    bm_sampler *s;
    bm_token id;
    for (int i = 0; i < V; i++) {
        logits[i] = (float)log(prob[i]) + 2;
        out[i] = 0;
    }
    OK(bm_sampler_open(&s, p, V));
    for (int k = 0; k < DRAWS; k++) {
        OK(bm_sampler_pick(s, logits, recent, n_recent, allowed, &id));
        assert_in_range(id, 0, V - 1);
        out[id] += 1.0 / DRAWS;
    }
    bm_sampler_close(s);
}
/* Weights, normalized, against what was drawn. */
static void expect(const bm_sampling *p, const bm_token *recent, size_t n_recent, const bool *allowed, const double weight[V]) {
    double got[V], sum = 0;
    frequencies(p, recent, n_recent, allowed, got);
    for (int i = 0; i < V; i++) sum += weight[i];
    for (int i = 0; i < V; i++) {
        const double want = weight[i] / sum;
        if (fabs(got[i] - want) > 0.012 || (want == 0 && got[i] > 0)) fail_msg("id %d: drawn %.4f, expected %.4f", i, got[i], want);
    }
}

static void test_filters(void **state) {
    (void)state;
    bm_sampling p = bm_sampling_default();
    p.seed = 1;
    expect(&p, NULL, 0, NULL, prob);
    p.temperature = 0.5f;
    expect(&p, NULL, 0, NULL, (double[V]){ 0.16, 0.09, 0.0225, 0.01, 0.0016, 0.0001 });
    p.temperature = 0;
    expect(&p, NULL, 0, NULL, (double[V]){ 1 });
    p = bm_sampling_default();
    p.top_k = 2;
    expect(&p, NULL, 0, NULL, (double[V]){ 0.4, 0.3 });
    p = bm_sampling_default();
    p.top_p = 0.75f;
    expect(&p, NULL, 0, NULL, (double[V]){ 0.4, 0.3, 0.15 });
    p.top_p = 0;
    expect(&p, NULL, 0, NULL, (double[V]){ 1 });
    p = bm_sampling_default();
    p.min_p = 0.2f;
    expect(&p, NULL, 0, NULL, (double[V]){ 0.4, 0.3, 0.15, 0.1 });
    p = bm_sampling_default();
    p.typical_p = 0.4f;         /* entropy 1.42 nats: .3 (1.20) is nearest, then .15 (1.90) */
    expect(&p, NULL, 0, NULL, (double[V]){ 0, 0.3, 0.15 });
    p = bm_sampling_default();
    const bool allowed[V] = { true, false, true, false, true, true };
    expect(&p, NULL, 0, allowed, (double[V]){ 0.4, 0, 0.15, 0, 0.04, 0.01 });
    bm_sampler *s;
    bm_token id;
    OK(bm_sampler_open(&s, &p, V));
    assert_int_equal(bm_sampler_pick(s, (float[V]){ NAN, NAN, NAN, NAN, NAN, NAN }, NULL, 0, NULL, &id), BM_EARG);
    OK(bm_sampler_pick(s, (float[V]){ NAN, -INFINITY, 1, -INFINITY, NAN, NAN }, NULL, 0, NULL, &id));
    assert_int_equal(id, 2);
    bm_sampler_close(s);
}

static void test_penalties(void **state) {
    (void)state;
    const bm_token recent[4] = { 1, 0, 0, 0 };
    bm_sampling p = bm_sampling_default();
    p.penalty_window = 3;       /* id 1 has left it */
    p.presence_penalty = 1;
    p.frequency_penalty = 0.5f;
    expect(&p, recent, 4, NULL, (double[V]){ 0.4 * exp(-2.5), 0.3, 0.15, 0.1, 0.04, 0.01 });
    p = bm_sampling_default();
    p.repetition_penalty = 2;   /* logit ln .4 + 2, halved */
    expect(&p, recent, 4, NULL, (double[V]){ exp((log(0.4) + 2) / 2 - 2), exp((log(0.3) + 2) / 2 - 2), 0.15, 0.1, 0.04, 0.01 });
    const bm_logit_bias bias[2] = { { 5, 3 }, { 0, -INFINITY } };
    p = bm_sampling_default();
    p.n_bias = 2;
    p.bias = bias;
    expect(&p, NULL, 0, NULL, (double[V]){ 0, 0.3, 0.15, 0.1, 0.04, 0.01 * exp(3) });
    p.temperature = NAN;
    bm_sampler *s;
    assert_int_equal(bm_sampler_open(&s, &p, V), BM_EARG);
    p.temperature = 1;
    p.bias = &(bm_logit_bias){ V, 0 };
    p.n_bias = 1;
    assert_int_equal(bm_sampler_open(&s, &p, V), BM_EARG);
}

/* Large vocabularies take the partial sorts; the result is that of a full one. */
static void test_large(void **state) {
    (void)state;
    enum { L = 50304 };
    float *logits = malloc(sizeof *logits * L);
    bm_token id, most = 0;
    bm_sampler *s;
    bm_sampling p = bm_sampling_default();
    for (size_t i = 0; i < L; i++) logits[i] = (float)bm_rng_normal(9, 0, i);
    p.top_p = 0.5f;
    OK(bm_sampler_open(&s, &p, L));
    float *sorted = malloc(sizeof *sorted * L);
    memcpy(sorted, logits, sizeof *logits * L);
    double z = 0, mass = 0;
    for (int i = 0; i < L; i++) z += exp((double)logits[i]);
    float cut = 10;
    while (mass < 0.5 * z) {    /* the smallest logit still inside */
        float next = -10;
        for (int i = 0; i < L; i++)
            if (sorted[i] < cut && sorted[i] > next) next = sorted[i];
        cut = next;
        mass = 0;
        for (int i = 0; i < L; i++) mass += sorted[i] >= cut ? exp((double)sorted[i]) : 0;
        if (mass < 0.45 * z) cut -= 0.01f;
    }
    for (int k = 0; k < 200; k++) {
        OK(bm_sampler_pick(s, logits, NULL, 0, NULL, &id));
        assert_true(logits[id] >= cut - 1e-4f);
        if (id > most) most = id;
    }
    assert_true(most > L / 2);
    bm_sampler_close(s);
    free(logits);
    free(sorted);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_back),    cmocka_unit_test(test_greedy),       cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_session_file), cmocka_unit_test(test_session_damage),
        cmocka_unit_test(test_filters), cmocka_unit_test(test_penalties),    cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests_name("stream", tests, NULL, NULL);
}
