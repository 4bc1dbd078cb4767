/* tests/test_golden.c - the whole model against the outputs of the original code, in f32. */
#include "lib_golden.h"
#include <math.h>

static const char *const goldens[] = { "moe-f32", "bias-gelu", "dense-mamba", "parallel", "moe-bf16", "long" };

typedef struct rows { const float *want; size_t V; double worst, peak; } rows;

static bm_status compare(void *user, size_t index, const float *logits) {
    rows *r = user;
    for (size_t v = 0; v < r->V; v++) {
        const double want = (double)r->want[index * r->V + v], d = fabs((double)logits[v] - want);
        if (d > r->worst || isnan(d)) r->worst = d;
        if (fabs(want) > r->peak) r->peak = fabs(want);
    }
    return BM_OK;
}

/* Every ids.N: the largest difference over the largest logit. */
static void check_logits(const golden *g, bm_session *s, int V) {
    int found = 0;
    for (int N = 1; N < 4096; N++) {
        char name[32];
        size_t n, n_logits;
        int64_t dim[4];
        snprintf(name, sizeof name, "ids.%d", N);
        bm_token *ids = golden_ids(g, name, &n, dim);
        if (!ids) continue;
        snprintf(name, sizeof name, "logits.%d", N);
        rows r = { golden_f32(g, name, &n_logits, dim), (size_t)V, 0, 0 };
        assert_non_null(r.want);
        assert_int_equal(n_logits, n * (size_t)V);
        OK(bm_state_set(s, 0, NULL));
        OK(bm_forward(s, &(bm_input){ .tokens = ids, .n = n, .want = BM_WANT_ALL, .fn = compare, .user = &r }, 1));
        print_message("  %s: %.2g of the largest logit\n", name, r.worst / r.peak);
        assert_true(r.worst <= 2e-5 * r.peak);
        free(ids);
        found++;
    }
    assert_true(found > 0);
}

static bm_token argmax(const float *x, int V) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (x[v] > x[best]) best = v;
    return best;
}

/* The prompt in one go, then 32 greedy tokens; greedy_step: the same, the prompt token by token. */
static void check_greedy(const golden *g, bm_session *s, int V, const char *name, bool step) {
    size_t n, n_want;
    int64_t dim[4];
    bm_token *prompt = golden_ids(g, "prompt", &n, dim), *want = golden_ids(g, name, &n_want, dim);
    assert_non_null(prompt);
    assert_non_null(want);
    OK(bm_state_set(s, 0, NULL));
    for (size_t i = 0; step && i + 1 < n; i++) OK(bm_forward(s, &(bm_input){ .tokens = prompt + i, .n = 1 }, 1));
    const bm_token *feed = step ? prompt + n - 1 : prompt;
    size_t left = step ? 1 : n, same = 0;
    bm_token next;
    for (size_t i = 0; i < n_want; i++, feed = &next, left = 1) {
        OK(bm_forward(s, &(bm_input){ .tokens = feed, .n = left, .want = BM_WANT_LAST }, 1));
        next = argmax(bm_logits(s, 0), V);
        same += next == want[i];
    }
    print_message("  %s: %zu of %zu\n", name, same, n_want);
    assert_int_equal(same, n_want);
    free(prompt);
    free(want);
}

static void check_loss(const golden *g, bm_session *s) {
    size_t n, n_loss;
    int64_t dim[4];
    bm_token *ids = golden_ids(g, "train.ids", &n, dim);
    const float *want = golden_f32(g, "train.loss", &n_loss, (int64_t[4]){ 0 });
    assert_non_null(ids);
    assert_non_null(want);
    const size_t B = (size_t)dim[0], T = (size_t)dim[1];
    double sum = 0;
    float *nll = malloc(T * sizeof *nll);
    for (size_t b = 0; b < B; b++) {
        OK(bm_state_set(s, 0, NULL));
        OK(bm_score(s, 0, ids + b * T, T, nll));
        for (size_t t = 0; t + 1 < T; t++) sum += (double)nll[t];
    }
    const double loss = sum / (double)(B * (T - 1));
    print_message("  train.loss: %.7f, expected %.7f\n", loss, (double)*want);
    assert_true(fabs(loss - (double)*want) <= 1e-5);
    free(nll);
    free(ids);
}

static void golden_model(void **state) {
    const char *folder = golden_path(*state);
    if (!folder) {
        print_message("  %s: shared golden files are absent, skipped\n", (const char *)*state);
        skip();
    }
    if ((getenv("BM_EMULATOR") || getenv("BM_QUICK")) && !strcmp(*state, "long")) {
        print_message("  long: takes minutes emulated or watched, skipped\n");
        skip();
    }
    golden g;
    bm_device *d;
    bm_model *m;
    bm_session *s;
    golden_open(&g, folder, "golden.safetensors");
    OK(bm_device_open(&d, test_device(), 0));
    OK(bm_model_open(&m, d, folder));
    OK(bm_session_open(&s, m, &(bm_session_options){ .arith = BM_ARITH_F32 }));
    const int V = bm_model_config(m)->n_vocab;
    check_logits(&g, s, V);
    check_greedy(&g, s, V, "greedy", false);
    check_greedy(&g, s, V, "greedy_step", true);
    check_loss(&g, s);
    bm_session_close(s);
    bm_model_close(m);
    bm_device_close(d);
    golden_close(&g);
}

int main(void) {
    struct CMUnitTest test[6];
    for (int i = 0; i < 6; i++)
        test[i] = (struct CMUnitTest){ .name = goldens[i], .test_func = golden_model, .initial_state = (void *)goldens[i] };
    return cmocka_run_group_tests_name("golden", test, NULL, NULL);
}
