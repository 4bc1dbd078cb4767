/* tests/test_convert.c - models from one layout into another, byte by byte; counts; what is refused. */
#include "lib_tiny.h"
#include <math.h>
#include <unistd.h>

static const char *const goldens[] = { "moe-f32", "bias-gelu", "dense-mamba", "parallel", "moe-bf16" };

static void convert(const char *in, const char *out, int type) {
    OK(bm_convert(in, out, &(bm_convert_options){ .type = type, .embedding_type = -1 }));
}

/* Same names, types, shapes and bytes in both. */
static void same_tensors(const char *a, const char *b) {
    bm_source *x, *y;
    OK(bm_source_open(&x, a));
    OK(bm_source_open(&y, b));
    assert_int_equal(bm_source_count(x), bm_source_count(y));
    for (size_t i = 0; i < bm_source_count(x); i++) {
        const bm_entry *e = bm_source_entry(x, i), *f = bm_source_find(y, e->name);
        assert_non_null(f);
        assert_int_equal(e->type, f->type);
        assert_int_equal(e->n_dims, f->n_dims);
        assert_memory_equal(e->dim, f->dim, (size_t)e->n_dims * sizeof *e->dim);
        void *p = malloc(e->bytes), *q = malloc(f->bytes);
        OK(bm_source_read(x, e, p));
        OK(bm_source_read(y, f, q));
        if (memcmp(p, q, e->bytes)) fail_msg("%s and %s: tensor %s differs", a, b, e->name);
        free(p);
        free(q);
    }
    bm_source_close(x);
    bm_source_close(y);
}

static void same_logits(const char *a, const char *b, bm_arith arith) {
    enum { N = 40 };
    rig x, y;
    bm_token ids[N];
    rig_open(&x, a, 1, (bm_session_options){ .arith = arith });
    rig_open(&y, b, 1, (bm_session_options){ .arith = arith });
    random_ids(ids, N, x.V, 11);
    float *p = malloc(sizeof(float) * N * (size_t)x.V), *q = malloc(sizeof(float) * N * (size_t)x.V);
    all_logits(x.s, 0, ids, N, p);
    all_logits(y.s, 0, ids, N, q);
    assert_memory_equal(p, q, sizeof(float) * N * (size_t)x.V);
    uint64_t h[2], k[2];
    OK(bm_model_hash(x.m, h));
    OK(bm_model_hash(y.m, k));
    assert_memory_equal(h, k, sizeof h);
    free(p);
    free(q);
    rig_close(&x);
    rig_close(&y);
}

static const char *named(const char *base, const char *end) {
    char name[100];
    snprintf(name, sizeof name, "%s%s", base, end);
    return scratch_path(name);
}

/* .bin -> folder: every byte.  .bin -> GGUF: the same logits to the bit.  GGUF -> folder -> GGUF: every byte.
 * 16-bit .bin -> GGUF -> folder of that type: every byte, A_log too. */
static void test_goldens(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof goldens / sizeof *goldens; i++) {
        const char *in = golden_path(goldens[i]);
        if (!in) continue;
        char bin[300], st[1300], gguf[1300], back[1300], again[1300];
        snprintf(bin, sizeof bin, "%s", in);
        snprintf(st, sizeof st, "%s", named(goldens[i], "-st"));
        snprintf(gguf, sizeof gguf, "%s", named(goldens[i], ".gguf"));
        snprintf(back, sizeof back, "%s", named(goldens[i], "-back"));
        snprintf(again, sizeof again, "%s", named(goldens[i], "-again.gguf"));
        convert(bin, st, -1);
        same_tensors(bin, st);
        convert(bin, gguf, -1);
        same_logits(bin, gguf, BM_ARITH_NATIVE);
        same_logits(bin, gguf, BM_ARITH_F32);
        same_logits(st, gguf, BM_ARITH_NATIVE);
        convert(gguf, back, -1);
        convert(back, again, -1);
        same_files(gguf, again);
        if (strcmp(goldens[i], "moe-bf16")) continue;
        convert(gguf, named(goldens[i], "-bf16"), BM_BF16);
        same_tensors(bin, named(goldens[i], "-bf16"));
    }
}

static char note[200];
static void keep_note(void *user, int level, const char *line) {
    (void)user;
    if (level == 1) snprintf(note, sizeof note, "%s", line);
}

/* Matrices with rows of 256, of 64 and of 4 are in the type asked for or in what stands in for it. */
static void check_falls(const char *path, bm_dtype t) {
    bm_source *s;
    OK(bm_source_open(&s, path));
    assert_int_equal(bm_source_find(s, "blk.0.ssm_out.weight")->type, t);
    assert_int_equal(bm_source_find(s, "blk.2.ffn_down_exps.weight")->type, t);
    assert_int_equal(bm_source_find(s, "blk.0.ssm_in.weight")->type, bm_dtype_fitting(t, 64));
    assert_int_equal(bm_source_find(s, "blk.0.ssm_dt.weight")->type, BM_BF16);
    bm_source_close(s);
}

/* The same with every block kind, in each type a folder holds; and quantized files stay as they are. */
static void test_types(void **state) {
    (void)state;
    bm_log_to(keep_note, NULL);
    for (int t = BM_F32; t <= BM_F16; t++) {
        char folder[1300], again[1300];
        snprintf(folder, sizeof folder, "%s", named(bm_dtype_name((bm_dtype)t), "-folder"));
        snprintf(again, sizeof again, "%s", named(bm_dtype_name((bm_dtype)t), "-again.gguf"));
        convert(tiny_gguf((bm_dtype)t), folder, -1);
        convert(folder, again, -1);
        same_files(tiny_gguf((bm_dtype)t), again);
    }
    for (int t = BM_Q8_0; t < BM_DTYPE_COUNT; t++) {
        char again[1300];
        snprintf(again, sizeof again, "%s", named(bm_dtype_name((bm_dtype)t), "-again.gguf"));
        convert(tiny_gguf((bm_dtype)t), again, -1);
        same_files(tiny_gguf((bm_dtype)t), again);
        *note = 0;
        convert(tiny_gguf(BM_F32), named(bm_dtype_name((bm_dtype)t), "-from-f32.gguf"), t);
        assert_non_null(strstr(note, "of the weight bytes"));
        same_files(tiny_gguf((bm_dtype)t), named(bm_dtype_name((bm_dtype)t), "-from-f32.gguf"));
        check_falls(tiny_gguf((bm_dtype)t), (bm_dtype)t);
        assert_int_equal(bm_convert(again, scratch_path("q-folder"), NULL), BM_ENOSUPPORT);
        assert_non_null(strstr(bm_error(), "safetensors holds no q"));
        assert_int_not_equal(access(scratch_path("q-folder"), F_OK), 0);
    }
    bm_log_to(NULL, NULL);
    assert_int_equal(bm_convert(tiny_gguf(BM_F32), scratch_path("f32-folder"), NULL), BM_EARG);
    assert_non_null(strstr(bm_error(), "exists already"));
}

/* One seed, one model: whichever form it is written in. */
static void test_init(void **state) {
    (void)state;
    const bm_config c = tiny_config();
    OK(bm_init(&c, 7, BM_BF16, scratch_path("seven"), NULL, NULL, NULL));
    same_logits(tiny_gguf(BM_BF16), scratch_path("seven"), BM_ARITH_NATIVE);
}

/* A Mamba of the wider world: Hugging Face's names and its GGUF. */
static void test_mamba(void **state) {
    (void)state;
    bm_config c;
    OK(bm_config_preset(&c, "mamba-130m"));
    c.n_layers = 3;
    c.d_model = 48;
    c.d_inner = 96;
    c.dt_rank = 3;
    c.n_vocab = 99;
    for (int tied = 0; tied < 2; tied++) {
        char gguf[1300], folder[1300], again[1300];
        c.tied_head = tied;
        snprintf(gguf, sizeof gguf, "%s", named("mamba", tied ? "-tied.gguf" : ".gguf"));
        snprintf(folder, sizeof folder, "%s", named("mamba", tied ? "-tied-hf" : "-hf"));
        snprintf(again, sizeof again, "%s", named("mamba", tied ? "-tied-again.gguf" : "-again.gguf"));
        OK(bm_init(&c, 1, BM_F32, gguf, NULL, NULL, NULL));
        convert(gguf, folder, -1);
        convert(folder, again, -1);
        same_files(gguf, again);
        same_logits(gguf, folder, BM_ARITH_F32);
        bm_source *s;
        OK(bm_source_open(&s, folder));
        assert_non_null(bm_source_find(s, "backbone.layers.2.mixer.A_log"));
        assert_true((bm_source_find(s, "lm_head.weight") != NULL) != tied);
        bm_source_close(s);
    }
}

/* A and A_log: exact for 16-bit values, and there and back for every A a float A_log can give. */
static void test_A_log(void **state) {
    (void)state;
    double worst = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        const float b = bm_bf16_f32((uint16_t)h);
        if (!(fabsf(b) < 10) || b == 0) continue;
        const float A = bm_A_from_log(b);
        if (A == -1) continue;                  /* |A_log| below 2^-25: -1 holds none of it */
        assert_true(bm_A_from_log(bm_A_to_log(A)) == A);
        if (fabsf(b) >= 0x1p-15f) assert_true(bm_A_to_log(A) == b);
    }
    for (uint64_t i = 0; i < 200000; i++) {
        const float x = (float)(bm_rng_uniform(5, 0, i) * 6 - 3), A = bm_A_from_log(x), y = bm_A_to_log(A);
        assert_true(bm_A_from_log(y) == A);
        const double ulp = fabs((double)nextafterf(x, 10) - (double)x), off = fabs((double)y - (double)x) / fmax(ulp, 0x1p-23);
        if (off > worst) worst = off;
    }
    print_message("  A_log through A: at most %.2f ulp (of values of 1 and above)\n", worst);
    assert_true(worst <= 1);
}

static void test_counts(void **state) {
    (void)state;
    static const struct { const char *name; uint64_t parameters, tensors; } want[] = {
        { "blackmamba-1.5b", 1458462072, 438 }, { "blackmamba-2.8b", 2783213584, 525 }
    };
    bm_config c;
    bm_info info;
    for (int i = 0; i < 2; i++) {
        OK(bm_config_preset(&c, want[i].name));
        bm_config_info(&c, BM_BF16, &info);
        assert_int_equal(info.parameters, want[i].parameters);
        assert_int_equal(info.tensors, want[i].tensors);
    }
    assert_true(fabs((double)info.parameters_per_token - 628.77e6) < 5e3);
    assert_true(fabs((double)info.flops_per_token - 1261.4e6) < 5e4);
    assert_int_equal(info.state_bytes, 18 * 4 * 2944 * (3 + 16));
    OK(bm_config_preset(&c, "blackmamba-1.5b"));
    bm_config_info(&c, BM_BF16, &info);
    assert_true(fabs((double)info.parameters_per_token - 343.69e6) < 5e3);
    assert_true(fabs((double)info.flops_per_token - 689.9e6) < 5e4);
    assert_int_equal(bm_config_preset(&c, "blackmamba-7b"), BM_EARG);
    for (int i = 0; bm_config_preset_name(i); i++) OK(bm_config_preset(&c, bm_config_preset_name(i)));
}

/* ---- wrong input ------------------------------------------------------------------------------------------- */

static const char good[] = "{\"num_layers\": 2, \"hidden_size\": 8, \"state_size\": 4, \"conv_dimension\": 3, \"vocab_size\": 16, "
                           "\"expansion_factor\": 2, \"mamba_moe_layers\": [\"r\", \"2\"], \"ffn_hidden_size\": 8, "
                           "\"add_bias_linear\": false, \"swiglu\": true, \"max_sequence_length\": 64}";

static bm_status read_config(const char *text, bm_config *c) {
    const char *path = scratch_path("config.json");
    OK(bm_file_write(path, text, strlen(text)));
    return bm_config_read(c, path);
}

static void test_config(void **state) {
    (void)state;
    static const struct { const char *find, *put, *sentence; } wrong[] = {
        { "\"hidden_size\": 8, ", "", "hidden_size" },
        { "\"hidden_size\": 8", "\"hidden_size\": \"8\"", "hidden_size" },
        { "\"hidden_size\": 8", "\"hidden_size\": 0", "hidden size: found 0, expected 1 to" },
        { "\"hidden_size\": 8", "\"hidden_size\": 99999999999999999999", "" },
        { "\"vocab_size\": 16", "\"vocab_size\": 1000000000", "vocabulary: found 1000000000" },
        { "[\"r\", \"2\"]", "[\"r\"]", "mamba_moe_layers: found 1 codes" },
        { "[\"r\", \"2\"]", "[\"r\", \"x\"]", "mamba_moe_layers[1]: found 'x'" },
        { "[\"r\", \"2\"]", "[\"r\", \"r0\"]", "mamba_moe_layers[1]: found 'r0'" },
        { "[\"r\", \"2\"]", "[\"r\", 2]", "mamba_moe_layers[1]" },
        { "\"ffn_hidden_size\": 8, ", "", "layer 1: found feed-forward width 0" },
        { "\"num_layers\": 2", "\"num_layers\": 3", "found 2 codes, expected a list of num_layers = 3" },
        { "\"num_layers\": 2", "\"num_layers\": 100000", "num_layers" },
        { "\"swiglu\": true", "\"swiglu\": true, \"activation\": \"relu\"", "activation: found 'relu', expected gelu or silu" },
        { "\"swiglu\": true", "\"swiglu\": true, \"model_type\": \"llama\"", "model_type: found 'llama'" },
        { "\"expansion_factor\": 2", "\"expansion_factor\": 1000000000", "expansion_factor" },
    };
    bm_config c;
    OK(read_config(good, &c));
    assert_int_equal(c.layer[1].n_experts, 2);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char text[1024];
        const char *at = strstr(good, wrong[i].find);
        assert_non_null(at);
        snprintf(text, sizeof text, "%.*s%s%s", (int)(at - good), good, wrong[i].put, at + strlen(wrong[i].find));
        assert_int_not_equal(read_config(text, &c), BM_OK);
        if (!strstr(bm_error(), wrong[i].sentence)) fail_msg("found the sentence '%s', expected '%s' in it", bm_error(), wrong[i].sentence);
        assert_non_null(strstr(bm_error(), "config.json"));
    }
}

/* A released folder of at most 16 KiB, as PyTorch writes it. */
static bm_config small_config(void) {
    bm_config c;
    OK(read_config(good, &c));
    return c;
}

static bm_device *device;
static bm_status open_and_run(const char *path) {
    bm_model *m;
    bm_session *s = NULL;
    const bm_token ids[2] = { 1, 2 };
    bm_status st = bm_model_open(&m, device, path);
    if (!st) st = bm_session_open(&s, m, &(bm_session_options){ .chunk = 4 });
    if (!st) st = bm_forward(s, &(bm_input){ .tokens = ids, .n = 2, .want = BM_WANT_LAST }, 1);
    bm_session_close(s);
    bm_model_close(m);
    return st;
}
static void write_plain(const char *path, const uint8_t *data, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    if (n) assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}
static bm_status try_gguf(const uint8_t *data, size_t n) {
    write_plain(scratch_path("damaged.gguf"), data, n);
    return open_and_run(scratch_path("damaged.gguf"));
}
static bm_status try_folder(const uint8_t *data, size_t n) {
    write_plain(scratch_path("small/model.safetensors"), data, n);
    return open_and_run(scratch_path("small"));
}
static bm_status try_config(const uint8_t *data, size_t n) {
    write_plain(scratch_path("small/config.json"), data, n);
    return open_and_run(scratch_path("small"));
}

/* Truncated at every byte, each byte flipped: a sentence or a model, never a crash. */
static void test_damage(void **state) {
    (void)state;
    const bm_config c = small_config();
    size_t n;
    OK(bm_device_open(&device, "cpu", 1));
    OK(bm_init(&c, 3, BM_BF16, scratch_path("small.gguf"), NULL, NULL, NULL));
    convert(scratch_path("small.gguf"), scratch_path("small"), BM_BF16);
    OK(open_and_run(scratch_path("small")));
    uint8_t *data = read_file(scratch_path("small.gguf"), &n);
    assert_true(n <= 16384);
    print_message("  GGUF, %zu bytes: %zu variants still a model\n", n, damage(data, n, try_gguf));
    free(data);
    data = read_file(scratch_path("small/model.safetensors"), &n);
    assert_true(n <= 16384);
    print_message("  safetensors, %zu bytes: %zu variants still a model\n", n, damage(data, n, try_folder));
    write_plain(scratch_path("small/model.safetensors"), data, n);
    free(data);
    data = read_file(scratch_path("small/config.json"), &n);
    print_message("  config.json, %zu bytes: %zu variants still a model\n", n, damage(data, n, try_config));
    free(data);
    bm_device_close(device);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens), cmocka_unit_test(test_types),  cmocka_unit_test(test_init),  cmocka_unit_test(test_mamba),  cmocka_unit_test(test_A_log),
        cmocka_unit_test(test_counts),  cmocka_unit_test(test_config), cmocka_unit_test(test_damage),
    };
    return cmocka_run_group_tests_name("convert", tests, NULL, NULL);
}
