/* tests/test_counts.c - parameters and operations by part: released models against docs/MODEL.md, sums against
 * bm_config_info, transformers by their formula, and every kind of file that holds a configuration. */
#include "lib_tiny.h"
#include <math.h>
#include <string.h>

typedef struct sum { uint64_t parameters, active, flops, square; } sum;

static sum sum_of(const bm_config *c, int layer, int64_t seq) {
    bm_config_part part[BM_MOST_PARTS];
    sum s = {0};
    const int n = bm_config_parts(c, layer, seq, part);
    assert_true(n > 0 && n <= BM_MOST_PARTS);
    for (int i = 0; i < n; i++) {
        s.parameters += part[i].parameters;
        s.active += part[i].active;
        s.flops += part[i].flops;
        s.square += part[i].flops_square;
        for (int k = 0; k < i; k++)
            assert_false(!strcmp(part[i].block, part[k].block) && !strcmp(part[i].name, part[k].name));
    }
    return s;
}

static sum sum_of_all(const bm_config *c, int64_t seq) {
    sum all = {0};
    for (int l = -1; l < c->n_layers; l++) {
        const sum s = sum_of(c, l, seq);
        all.parameters += s.parameters;
        all.active += s.active;
        all.flops += s.flops;
        all.square += s.square;
    }
    return all;
}

static bm_config_part part_of(const bm_config *c, int layer, int64_t seq, const char *name) {
    bm_config_part part[BM_MOST_PARTS];
    for (int i = bm_config_parts(c, layer, seq, part); i-- > 0; ) if (!strcmp(part[i].name, name)) return part[i];
    fail_msg("layer %d has no part %s", layer, name);
    return part[0];
}

/* Both halves of a hundredth or a tenth of a million. */
#define MILLIONS(found, want, unit) assert_true(fabs((double)(found) * 1e-6 - (want)) <= 0.5 * (unit) + 1e-9)

static void released_models(void **state) {
    (void)state;
    static const struct {
        const char *name;
        double mamba, moe, expert, head, all, active;
        uint64_t parameters;
    } want[] = {
        { "blackmamba-1.5b", 17.02, 21.25, 21.23, 115.9, 689.9, 343.69, 1458462072 },
        { "blackmamba-2.8b", 27.63, 34.22, 34.20, 148.1, 1261.4, 628.77, 2783213584 } };
    for (int i = 0; i < 2; i++) {
        bm_config c;
        OK(bm_config_preset(&c, want[i].name));
        const sum all = sum_of_all(&c, 2048);
        MILLIONS(sum_of(&c, 0, 2048).flops, want[i].mamba, 0.01);
        MILLIONS(sum_of(&c, 1, 2048).flops, want[i].moe, 0.01);
        MILLIONS(part_of(&c, 1, 0, "experts").flops, want[i].expert, 0.01);
        MILLIONS(part_of(&c, -1, 0, "head").flops, want[i].head, 0.1);
        MILLIONS(all.flops, want[i].all, 0.1);
        MILLIONS(all.active, want[i].active, 0.01);
        assert_int_equal(all.parameters, want[i].parameters);
        assert_int_equal(all.square, all.flops);
        const uint64_t D = (uint64_t)c.d_model, I = 2 * D, N = 16, K = 4, R = (uint64_t)c.dt_rank;
        const uint64_t X = 8, F = (uint64_t)c.layer[1].d_ff;
        assert_int_equal(sum_of(&c, 0, 0).parameters,
                         D + 2 * I * D + I * K + I + I * (R + 2 * N) + I * R + I + I * N + I + I * D);
        assert_int_equal(sum_of(&c, 0, 0).flops, I * (11 * N + 4 * R + 1) + 6 * I * D + 2 * I * K);
        assert_int_equal(sum_of(&c, 1, 0).parameters, D + X * D + X + X * 3 * D * F);
        assert_int_equal(sum_of(&c, 1, 0).flops, 6 * D * F + 2 * D * X);
        assert_int_equal(part_of(&c, -1, 0, "embedding").parameters, D * 50304);
        assert_int_equal(part_of(&c, -1, 0, "head").parameters, 0);
    }
}

/* Every kind of block, gated or not, with and without biases, tied or not, one expert or two a token. */
static bm_config mixture(int variant) {
    bm_config c;
    OK(bm_config_preset(&c, "blackmamba-1.5b"));
    c.n_layers = 8;
    c.n_vocab = 100;
    c.d_model = 24;
    c.d_inner = 48;
    c.d_state = 5;
    c.dt_rank = 3;
    c.gated = variant & 1;
    c.bias = variant & 2;
    c.top_k = variant & 4 ? 2 : 1;
    c.tied_head = !(variant & 8);
    c.n_heads = 6;
    c.n_kv_heads = 2;
    c.rope_base = 10000;
    static const bm_layer_config layer[8] = {
        { BM_MIXER_MAMBA, 0, 0, 0 }, { 0, BM_FFN_MOE, 4, 32 }, { BM_MIXER_ATTENTION, 0, 0, 0 },
        { 0, BM_FFN_DENSE, 1, 16 }, { BM_MIXER_MAMBA, BM_FFN_MOE, 3, 8 }, { BM_MIXER_MAMBA, BM_FFN_DENSE, 1, 64 },
        { BM_MIXER_ATTENTION, BM_FFN_DENSE, 1, 40 }, { BM_MIXER_ATTENTION, BM_FFN_MOE, 5, 24 } };
    memcpy(c.layer, layer, sizeof layer);
    return c;
}

static void sums_agree(void **state) {
    (void)state;
    for (int variant = 0; variant < 16; variant++) {
        const bm_config c = mixture(variant);
        bm_info info;
        bm_config_info(&c, BM_F32, &info);
        const sum all = sum_of_all(&c, 0);
        assert_int_equal(all.parameters, info.parameters);
        assert_int_equal(all.active, info.parameters_per_token);
        assert_int_equal(all.flops, info.flops_per_token);
        assert_int_equal(info.weight_bytes, 4 * info.parameters);
        const sum moe = sum_of(&c, 1, 0);
        const uint64_t one = (uint64_t)(c.gated ? 3 : 2) * 24 * 32 + (c.bias ? (c.gated ? 64 : 32) + 24 : 0);
        assert_int_equal(moe.parameters - moe.active, (4 - (uint64_t)c.top_k) * one);
        assert_int_equal(moe.flops, 2 * 24 * 4 + (uint64_t)c.top_k * (c.gated ? 6 : 4) * 24 * 32);
        assert_int_equal(part_of(&c, -1, 0, "head").parameters, (c.tied_head ? 0 : 2400) + (c.bias ? 100 : 0));
    }
    const bm_config c = mixture(0);
    bm_config_part part[BM_MOST_PARTS];
    assert_int_equal(bm_config_parts(&c, 8, 0, part), 0);
    assert_int_equal(bm_config_parts(&c, -2, 0, part), 0);
}

/* Per sequence of s: 2 s h^2 (1 + 2 r) + 2 s h^2 + 4 s^2 h, with r = 2 of 6 heads; causal work is half. */
static void attention(void **state) {
    (void)state;
    const bm_config c = mixture(1);
    const uint64_t h = 24, s = 512;
    const sum layer = sum_of(&c, 2, (int64_t)s);
    assert_int_equal(3 * s * layer.square, 3 * (2 * s * h * h + 2 * s * h * h + 4 * s * s * h) + 4 * s * h * h);
    assert_int_equal(s * (layer.square - layer.flops), 2 * s * s * h);
    assert_int_equal(layer.parameters, h + (6 + 4) * 4 * h + h * h);
    assert_int_equal(part_of(&c, 2, 0, "qkv").parameters, 40 * h);
    assert_int_equal(part_of(&c, 2, 0, "out").parameters, h * h);
    const sum beside = sum_of(&c, 6, (int64_t)s), mlp = sum_of(&c, 3, 0);
    assert_int_equal(beside.flops, layer.flops + mlp.flops / 16 * 40);
}

/* ---- files that hold a configuration --------------------------------------------------------------------- */

static const char sizes[] = "{\"num_layers\": 2, \"hidden_size\": 8, \"state_size\": 4, \"conv_dimension\": 3, "
    "\"vocab_size\": 16, \"expansion_factor\": 2, \"mamba_moe_layers\": [\"r\", \"2\"], \"ffn_hidden_size\": 8, "
    "\"add_bias_linear\": false, \"swiglu\": true, \"max_sequence_length\": 64}";

static const char *written(const char *name, const char *fmt, const char *arg) {
    char text[4000];
    const char *path = scratch_path(name);
    OK(bm_file_write(path, text, (size_t)snprintf(text, sizeof text, fmt, arg)));
    return path;
}

static void files(void **state) {
    (void)state;
    bm_config c, want;
    OK(bm_config_read(&want, written("config.json", "%s", sizes)));
    OK(bm_config_read(&c, scratch_folder()));
    assert_memory_equal(&c, &want, sizeof c);
    OK(bm_config_read(&c, written("train.json", "{\"steps\": 5, \"model\": %s}", sizes)));
    assert_memory_equal(&c, &want, sizeof c);
    OK(bm_config_read(&c, written("path.json", "{\"model\": \"%s\"}", scratch_folder())));
    assert_memory_equal(&c, &want, sizeof c);
    OK(bm_config_read(&c, written("preset.json", "{\"model\": \"%s\"}", "mamba-130m")));
    assert_int_equal(c.d_model, 768);
    OK(bm_config_read(&c, tiny_gguf(BM_F32)));
    assert_true(sum_of_all(&c, 1).parameters > 0);
    const char *loop = written("loop.json", "{\"model\": \"%s\"}", scratch_path("loop.json"));
    assert_int_equal(bm_config_read(&c, loop), BM_EFORMAT);
    assert_non_null(strstr(bm_error(), "expected sizes"));
    assert_int_equal(bm_config_read(&c, written("bad.json", "{\"model\": %s}", "{\"num_layers\": 2}")), BM_EFORMAT);
    assert_non_null(strstr(bm_error(), "bad.json: model: "));
    assert_int_equal(bm_config_read(&c, written("bad.json", "{\"model\": %s}", "7")), BM_EFORMAT);
    assert_int_equal(bm_config_read(&c, written("bad.json", "{\"model\": \"%s\"}", scratch_path("absent"))), BM_EIO);
    assert_int_equal(bm_config_read(&c, written("bad.gguf", "%s", "GGUF")), BM_EFORMAT);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(released_models), cmocka_unit_test(sums_agree),
                                        cmocka_unit_test(attention), cmocka_unit_test(files) };
    return cmocka_run_group_tests_name("counts", tests, NULL, NULL);
}
