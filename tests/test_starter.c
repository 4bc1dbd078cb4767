/* tests/test_starter.c - the trained model against its reference, and the bundled file made from it. */
#include "lib_tiny.h"
#include "text/text.h"
#include <math.h>
#include <unistd.h>

enum { ROWS = 20, T = 513 };
static const char bundled[] = "models/starter.gguf";

static double mean_loss(const char *model, bm_arith arith, int rows) {
    golden g;
    size_t n;
    int64_t dim[4];
    rig r;
    float nll[T];
    double sum = 0;
    golden_open(&g, shared_path("starter"), "reference.safetensors");
    bm_token *ids = golden_ids(&g, "val_ids", &n, dim);
    assert_int_equal(n, ROWS * T);
    rig_open(&r, model, 0, (bm_session_options){ .arith = arith });
    for (int i = 0; i < rows; i++) {
        OK(bm_state_set(r.s, 0, NULL));
        OK(bm_score(r.s, 0, ids + i * T, T, nll));
        for (int t = 0; t < T - 1; t++) sum += (double)nll[t];
    }
    rig_close(&r);
    free(ids);
    golden_close(&g);
    return sum / (rows * (T - 1.0));
}

static void test_loss(void **state) {
    (void)state;
    if (!shared_path("starter") || getenv("BM_QUICK")) skip();
    char path[1300];
    snprintf(path, sizeof path, "%s", shared_path("starter"));
    const double loss = mean_loss(path, BM_ARITH_F32, ROWS);
    print_message("  f32: %.6f, expected 3.602838\n", loss);
    assert_true(fabs(loss - 3.60284) <= 0.0005);
}

/* The bundled type stays within 1% of bf16, both in native arithmetic. */
static void test_bundled_loss(void **state) {
    (void)state;
    if (!shared_path("starter") || access(bundled, R_OK)) skip();
    char path[1300];
    snprintf(path, sizeof path, "%s", shared_path("starter"));
    const int rows = getenv("BM_QUICK") ? 4 : ROWS;
    const double bf16 = mean_loss(path, BM_ARITH_NATIVE, rows), small = mean_loss(bundled, BM_ARITH_NATIVE, rows);
    print_message("  native: bf16 %.5f, bundled %.5f, %+.2f%%\n", bf16, small, 100 * (small / bf16 - 1));
    assert_true(small <= 1.01 * bf16);
    size_t n;
    free(read_file(bundled, &n));
    assert_true(n <= 26u << 20);
}

static void test_first_logits(void **state) {
    (void)state;
    if (!shared_path("starter")) skip();
    golden g;
    size_t n, n_ids;
    int64_t dim[4];
    rig r;
    golden_open(&g, shared_path("starter"), "reference.safetensors");
    bm_token *ids = golden_ids(&g, "val_ids", &n_ids, dim);
    const float *want = golden_f32(&g, "logits_first128", &n, dim);
    assert_int_equal(dim[0], 128);
    char path[1300];
    snprintf(path, sizeof path, "%s", shared_path("starter"));
    rig_open(&r, path, 0, (bm_session_options){ .arith = BM_ARITH_F32 });
    float *got = malloc(n * sizeof *got);
    double worst = 0, peak = 0;
    all_logits(r.s, 0, ids, 128, got);
    for (size_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)got[i] - (double)want[i]));
        peak = fmax(peak, fabs((double)want[i]));
    }
    print_message("  first 128 rows: %.2g of the largest logit\n", worst / peak);
    assert_true(worst <= 2e-5 * peak);
    rig_close(&r);
    free(got);
    free(ids);
    golden_close(&g);
}

/* The three greedy texts, ids equal, in f32. */
static void test_greedy(void **state) {
    (void)state;
    if (!shared_path("starter")) skip();
    char path[1300];
    snprintf(path, sizeof path, "%s", shared_path("starter"));
    json_error_t e;
    json_t *o = json_load_file(shared_path("starter/reference.json"), 0, &e), *list = json_object_get(o, "greedy");
    rig r;
    bm_tokenizer *t;
    assert_true(json_array_size(list) >= 3);
    rig_open(&r, path, 0, (bm_session_options){ .arith = BM_ARITH_F32 });
    OK(bm_tokenizer_open(&t, path));
    for (size_t k = 0; k < json_array_size(list); k++) {
        const json_t *c = json_array_get(list, k), *ids = json_object_get(c, "ids");
        const char *prompt = json_string_value(json_object_get(c, "prompt"));
        const size_t n_prompt = (size_t)json_integer_value(json_object_get(c, "n_prompt")), n_ids = json_array_size(ids);
        bm_sampling greedy = bm_sampling_default();
        greedy.temperature = 0;
        bm_stream *g;
        bm_piece p;
        size_t n;
        OK(bm_stream_open(&g, r.s, 0, t, &greedy));
        OK(bm_stream_add_text(g, prompt, strlen(prompt), bm_tokenizer_adds_bos(t)));
        bm_stream_tokens(g, &n);
        assert_int_equal(n, n_prompt);
        for (size_t i = n; i < n_ids; i++) OK(bm_stream_next(g, true, &p, NULL, NULL));
        const bm_token *got = bm_stream_tokens(g, &n);
        assert_int_equal(n, n_ids);
        for (size_t i = 0; i < n; i++) assert_int_equal(got[i], json_integer_value(json_array_get(ids, i)));
        char *text;
        size_t n_text;
        OK(bm_detokenize(t, got, n, true, true, &text, &n_text));
        const json_t *want = json_object_get(c, "text");
        assert_int_equal(n_text, json_string_length(want));
        assert_memory_equal(text, json_string_value(want), n_text);
        bm_free(text);
        bm_stream_close(g);
    }
    bm_tokenizer_close(t);
    rig_close(&r);
    json_decref(o);
}

/* Always there: the bundled model writes text, the same for the same seed. */
static void test_bundled_text(void **state) {
    (void)state;
    char text[2][2000] = { "", "" };
    for (int k = 0; k < 2; k++) {
        rig r;
        bm_tokenizer *t;
        bm_stream *g;
        bm_piece p;
        bm_sampling q = bm_sampling_default();
        q.seed = 3;
        rig_open(&r, bundled, k + 1, (bm_session_options){ 0 });
        OK(bm_tokenizer_open(&t, bundled));
        assert_int_equal(bm_tokenizer_bos(t), 0);
        assert_true(bm_tokenizer_adds_bos(t));
        OK(bm_stream_open(&g, r.s, 0, t, &q));
        OK(bm_stream_add_text(g, "It was a dark", 13, true));
        for (int i = 0; i < 60; i++) {
            OK(bm_stream_next(g, false, &p, NULL, NULL));
            if (p.finish) break;
            strncat(text[k], p.text, 20);
        }
        bm_stream_close(g);
        bm_tokenizer_close(t);
        rig_close(&r);
    }
    assert_true(strlen(text[0]) > 60);
    assert_string_equal(text[0], text[1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss),   cmocka_unit_test(test_bundled_loss), cmocka_unit_test(test_first_logits),
        cmocka_unit_test(test_greedy), cmocka_unit_test(test_bundled_text),
    };
    return cmocka_run_group_tests_name("starter", tests, NULL, NULL);
}
