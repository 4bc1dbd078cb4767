/* test_profile.c - measuring: times of a session, peaks, operations by themselves, levels by name. */
#include "lib_tiny.h"

enum { TEXTS = 3, LENGTH = 40 };

static double sum_of(const bm_times *t) {
    double s = 0;
    for (int i = 0; i < BM_STAGE_COUNT; i++) s += t->stage[i];
    return s;
}

/* Logits with and without marks are the same bits; the stages are no longer than the clock on the wall. */
static void test_same_bits(void **state) {
    (void)state;
    rig r;
    bm_times t;
    bm_token ids[LENGTH];
    rig_open(&r, tiny_gguf(BM_BF16), 2, (bm_session_options){ .chunk = 16 });
    random_ids(ids, LENGTH, r.V, 1);
    float *a = malloc(sizeof *a * LENGTH * (size_t)r.V), *b = malloc(sizeof *b * LENGTH * (size_t)r.V);
    all_logits(r.s, 0, ids, LENGTH, a);
    bm_session_times(r.s, &t);
    assert_true(t.chunks == 0 && sum_of(&t) == 0);          /* off */
    OK(bm_state_set(r.s, 0, NULL));
    OK(bm_session_profile(r.s, true));
    const double start = bm_now();
    all_logits(r.s, 0, ids, LENGTH, b);
    const double wall = bm_now() - start;
    assert_memory_equal(a, b, sizeof *a * LENGTH * (size_t)r.V);
    bm_session_times(r.s, &t);
    for (int i = 0; i < BM_STAGE_COUNT; i++) assert_true(t.stage[i] > 0);
    assert_true(sum_of(&t) <= wall && sum_of(&t) > 0.5 * wall && t.waiting >= 0 && t.waiting < sum_of(&t));
    assert_int_equal(t.chunks, 3);
    assert_int_equal(t.moe_layers, 6);
    uint64_t experts = 0;
    for (int l = 0; l < BM_MAX_LAYERS; l++) experts += t.layer_experts[l];
    assert_true(experts == t.experts && t.layer_experts[1] >= 3 && !t.layer_experts[0]);
    bm_session_times(r.s, &t);
    assert_true(t.chunks == 0 && sum_of(&t) == 0 && t.weight_bytes == 0);   /* since the last call */
    OK(bm_session_profile(r.s, false));
    OK(bm_forward(r.s, &(bm_input){ .tokens = ids, .n = 1 }, 1));
    bm_session_times(r.s, &t);
    assert_true(t.chunks == 0);
    free(a);
    free(b);
    rig_close(&r);
}

/* One token reads what the model says a token reads; several texts read each expert that one of them reads. */
static void test_bytes(void **state) {
    (void)state;
    rig r;
    bm_info info;
    bm_times one[TEXTS], all;
    bm_token ids[TEXTS];
    bm_input in[TEXTS];
    rig_open(&r, tiny_gguf(BM_Q8_0), 1, (bm_session_options){ .slots = TEXTS });
    bm_model_info(r.m, &info);
    random_ids(ids, TEXTS, r.V, 3);
    OK(bm_session_profile(r.s, true));
    uint64_t most = 0;
    for (int i = 0; i < TEXTS; i++) {
        in[i] = (bm_input){ .slot = i, .tokens = &ids[i], .n = 1, .want = BM_WANT_LAST };
        OK(bm_forward(r.s, &in[i], 1));
        bm_session_times(r.s, &one[i]);
        assert_int_equal(one[i].weight_bytes, info.weight_bytes_per_token);
        assert_int_equal(one[i].experts, one[i].moe_layers);
        assert_int_equal(one[i].moe_layers, 2);
        most += one[i].experts;
        OK(bm_state_set(r.s, i, NULL));
    }
    OK(bm_forward(r.s, in, TEXTS));
    bm_session_times(r.s, &all);
    assert_int_equal(all.moe_layers, 2);
    assert_in_range(all.experts, 2, most);
    const uint64_t expert = bm_dtype_bytes(BM_Q8_0, 3 * 64 * 256);
    assert_int_equal(all.weight_bytes, info.weight_bytes_per_token + (all.experts - 2) * expert);
    rig_close(&r);
}

static void test_peak(void **state) {
    (void)state;
    bm_device *d;
    double x, y;
    OK(bm_device_open(&d, "cpu:scalar", 1));
    assert_non_null(strstr(bm_device_name(d), "scalar"));
    OK(bm_device_peak(d, BM_ARITH_F32, BM_F32, &x));
    OK(bm_device_peak(d, BM_ARITH_NATIVE, BM_Q8_0, &y));
    assert_true(x > 1e7 && x < 1e15 && y > 1e7 && y < 1e15);
    assert_int_equal(bm_device_peak(d, BM_ARITH_F32, BM_DTYPE_COUNT, &x), BM_EARG);
    assert_int_equal(bm_device_peak(d, (bm_arith)2, BM_F32, &x), BM_EARG);
    bm_device_close(d);
    assert_int_equal(bm_device_open(&d, "gpu", 1), BM_ENOSUPPORT);
    assert_null(d);
    assert_int_equal(bm_device_open(&d, "cpu:avx3", 1), BM_EARG);
    assert_non_null(strstr(bm_error(), "avx3"));
}

static bool three(void *user, const bm_kernel_time *t) {
    int *n = user;
    assert_true(t->rate > 0 && t->roof > 0 && t->M > 0 && t->N > 0 && t->K > 0);
    assert_string_equal(t->kernel, "linear");
    return ++*n < 3;
}

static void test_kernels(void **state) {
    (void)state;
    bm_device *d;
    int n = 0;
    OK(bm_device_open(&d, "cpu", 2));
    assert_int_equal(bm_device_kernels(d, three, &n), BM_ECANCELLED);
    assert_int_equal(n, 3);
    bm_device_close(d);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_same_bits), cmocka_unit_test(test_bytes),
                                        cmocka_unit_test(test_peak), cmocka_unit_test(test_kernels) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
