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
/* On a GPU native products with bf16 weights are made by one kernel up to 64 rows and by another, which sums in another order,
 * from there on: across the two the law is a bound, a rounding to bf16 in each of 12 products (docs/NUMERICS.md). */
enum { MANY = 65 };
static bool two_kernels(const law *w) {
    return w->type == BM_BF16 && w->arith == BM_ARITH_NATIVE && strncmp(test_device(), "cuda", 4) == 0;
}
static void near(const law *w, const char *what) {
    const size_t n = T * (size_t)w->r.V;
    double peak = 0, most = 0;
    for (size_t i = 0; i < n; i++) {
        peak = fmax(peak, fabs((double)w->want[i]));
        most = fmax(most, fabs((double)w->want[i] - (double)w->got[i]));
    }
    if (!(most <= sqrt(12) / 256 * peak)) fail_msg("bf16, native: %s is off by %g of %g", what, most, peak);
    memset(w->got, 0, sizeof(float) * n);
}
static void same_bits(const law *w, const char *what) {
    if (memcmp(w->want, w->got, sizeof(float) * T * (size_t)w->r.V))
        fail_msg("%s, %s: %s differs", bm_dtype_name(w->type), w->arith == BM_ARITH_F32 ? "f32" : "native", what);
    memset(w->got, 0, sizeof(float) * T * (size_t)w->r.V);
}
static void same(const law *w, const char *what) {
    if (two_kernels(w)) near(w, what);
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
    in_steps(w, 0, (size_t[]){ MANY, T - MANY }, 2);
    same_bits(w, "pieces of many rows");
    float *want = w->want;
    w->want = NULL;
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
    static const size_t len[MOST] = { 37, 1, 64, 20 };
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
        if (memcmp(alone + (size_t)i * T * V, together + (size_t)i * T * V, sizeof(float) * (len[i] + 1) * V))
            fail_msg("text %d of a batch differs from the same text alone", i);
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
    all_logits(w->r.s, 0, w->ids, T, w->want);
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
    OK(bm_score(w->r.s, 0, w->ids, 100, again));
    assert_memory_equal(nll, again, 99 * sizeof *nll);
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

static void every(void (*fn)(law *)) {
    for (int t = 0; t < BM_DTYPE_COUNT; t++)
        for (int a = BM_ARITH_NATIVE; a <= BM_ARITH_F32; a++) fn(&(law){ .type = (bm_dtype)t, .arith = (bm_arith)a });
}
static void test_chunking(void **state) { (void)state; every(chunking); }
static void test_batch(void **state) { (void)state; every(batch); }
static void test_restored(void **state) { (void)state; every(restored); }
static void test_score(void **state) { (void)state; every(score); }

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
        cmocka_unit_test(test_chunking), cmocka_unit_test(test_batch),    cmocka_unit_test(test_restored),
        cmocka_unit_test(test_score),    cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests_name("laws", tests, NULL, NULL);
}
