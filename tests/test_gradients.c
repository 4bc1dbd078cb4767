/* tests/test_gradients.c - gradients of whole models: against the original code's in f32, and in the f64 build
 * against central differences; the laws of a training step in both. */
#include "lib_golden.h"
#include "model/model.h"
#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { ROWS = 40, VOCAB = 29 };
#define EPSILON (sizeof(float) == 8 ? DBL_EPSILON : (double)FLT_EPSILON)

/* A model, a backend, a micro-batch of two packed texts in each of two routing groups. */
typedef struct rig {
    bm_config c;
    bm_backend *be;
    bm_learner *l;
    bm_token token[ROWS], target[ROWS];
    int32_t start[8], group[3];
    bm_micro b;
} rig;

static bm_config small(void) {
    bm_config c = { .family = BM_BLACKMAMBA, .n_layers = 1, .n_vocab = VOCAB, .d_model = 8, .d_inner = 16, .d_state = 3, .d_conv = 4,
                    .dt_rank = 2, .max_len = 64, .activation = BM_GELU, .final_norm = BM_LAYERNORM, .norm_eps = 1e-5f, .gated = true,
                    .conv_bias = true, .tied_head = true, .top_k = 1, .n_heads = 2, .n_kv_heads = 2, .rope_base = 100 };
    c.layer[0] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_NONE, 0, 0 };
    return c;
}

static void rig_open(rig *r, const bm_config *c, int slots, bool recompute) {
    static const int32_t start[] = { 0, 7, 20, 25, 40 }, group[] = { 0, 20, 40 };
    memset(r, 0, sizeof *r);
    r->c = *c;
    OK(bm_backend_open_cpu(&r->be, 2));
    OK(bm_learner_open(&r->l, &r->c, r->be, &(bm_learner_options){ .rows = ROWS, .sequences = 4, .groups = 2, .slots = slots,
                                                                  .arith = BM_ARITH_F32, .recompute = recompute }));
    bm_arena_init(&r->l->arena, r->l->master, 11);
    for (size_t i = 0; i < r->l->arena.n; i++)                  /* nothing is 0 or 1: every path is felt */
        r->l->master[i] += (float)(0.3 * bm_rng_normal(5, 1, i));
    bm_learner_refresh(r->l);
    for (int i = 0; i < ROWS; i++) {
        r->token[i] = (bm_token)(bm_rng_u64(3, 0, (uint64_t)i) % VOCAB);
        r->target[i] = i % 13 == 5 ? -1 : (bm_token)(bm_rng_u64(3, 1, (uint64_t)i) % VOCAB);
    }
    memcpy(r->start, start, sizeof start);
    memcpy(r->group, group, sizeof group);
    r->b = (bm_micro){ .M = ROWS, .Q = 4, .G = 2, .token = r->token, .target = r->target, .start = r->start, .group = r->group,
                       .scale = 1.0f / 36, .loss_scale = 0.5f };
}

static void rig_close(rig *r) {
    bm_learner_close(r->l);
    r->be->close(r->be);
}

static void gradient(rig *r) {
    memset(r->l->grad, 0, r->l->arena.n * sizeof(float));
    OK(bm_learner_step(r->l, &r->b, true));
}

/* ---- against the original code --------------------------------------------------------------------------- */

#ifndef BM_F64
static const char *const goldens[] = { "moe-f32", "bias-gelu", "dense-mamba", "parallel", "moe-bf16", "long" };

static double compare_tensor(const bm_learner *l, bm_layout layout, const bm_file_tensor *t, const float *want, size_t n) {
    float *x = malloc(n * sizeof *x);
    double worst = 0, most = 0;
    assert_non_null(x);
    bm_arena_get(&l->arena, l->grad, 0, layout, t, x);
    for (size_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)x[i] - (double)want[i]));
        most = fmax(most, fabs((double)want[i]));
        if (isnan(x[i])) worst = INFINITY;
    }
    free(x);
    if (most > 0) return worst / most;
    if (worst != 0) fail_msg("%s: found a gradient of %g, expected exactly 0", t->name, worst);
    return 0;
}

static void golden_gradients(void **state) {
    const char *folder = golden_path(*state);
    if (!folder) {
        print_message("  %s: shared golden files are absent, skipped\n", (const char *)*state);
        skip();
    }
    golden g;
    bm_source *s;
    bm_config c;
    bm_backend *be;
    bm_learner *l;
    size_t n, checked = 0;
    int64_t dim[4];
    golden_open(&g, folder, "golden.safetensors");
    OK(bm_source_open(&s, folder));
    OK(bm_config_of(&c, s));
    OK(bm_backend_open_cpu(&be, 0));
    bm_token *ids = golden_ids(&g, "train.ids", &n, dim), *token, *target;
    assert_non_null(ids);
    const int B = (int)dim[0], T = (int)dim[1] - 1, M = B * T;
    int32_t start[9], group[2] = { 0, M };
    assert_in_range(B, 1, 8);
    token = malloc(sizeof *token * (size_t)M);
    target = malloc(sizeof *target * (size_t)M);
    for (int b = 0; b < B; b++) {
        start[b] = b * T;
        memcpy(token + b * T, ids + b * (T + 1), sizeof *ids * (size_t)T);
        memcpy(target + b * T, ids + b * (T + 1) + 1, sizeof *ids * (size_t)T);
    }
    start[B] = M;
    OK(bm_learner_open(&l, &c, be, &(bm_learner_options){ .rows = M, .sequences = B, .groups = 1, .arith = BM_ARITH_F32 }));
    OK(bm_arena_load(&l->arena, l->master, s));
    bm_learner_refresh(l);
    OK(bm_learner_step(l, &(bm_micro){ .M = M, .Q = B, .G = 1, .token = token, .target = target, .start = start, .group = group,
                                       .scale = 1.0f / (float)M }, true));
    double loss = 0, worst = 0;
    for (int i = 0; i < M; i++) loss += (double)l->loss[i] / M;
    const float *want = golden_f32(&g, "train.loss", &n, dim);
    print_message("  loss off by %.1e\n", fabs(loss - (double)*want));
    assert_true(fabs(loss - (double)*want) <= 1e-5);
    const bm_layout layout = bm_layout_of(&c, bm_source_format(s));
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(&c, layout); bm_walk_next(&w, &t); checked++) {
        char name[160];
        snprintf(name, sizeof name, "grad.%s", t.name);
        const float *x = golden_f32(&g, name, &n, dim);
        if (!x) fail_msg("%s is not in the golden file", name);
        const double off = compare_tensor(l, layout, &t, x, n);
        if (off > 2e-4) fail_msg("%s: off by %g of its largest entry", name, off);
        worst = fmax(worst, off);
    }
    assert_int_equal(checked, bm_source_count(s));
    print_message("  %zu gradients, worst %.1e of a tensor's largest entry\n", checked, worst);
    bm_learner_close(l);
    be->close(be);
    bm_source_close(s);
    golden_close(&g);
    free(ids);
    free(token);
    free(target);
}
#endif

/* ---- against central differences, and laws, for every kind of block ----------------------------------------- */

enum { KINDS = 15 };
typedef struct kind { const char *name; bm_config c; bm_balance balance; bool balanced; } kind;
static kind kinds[KINDS];

static void make_kinds(void) {
    const bm_balance sinkhorn = { .choice = BM_CHOOSE_SINKHORN, .tol = 1e-4, .sweeps = 100, .scale = 2 };
    const bm_balance capacity = { .choice = BM_CHOOSE_BEST, .capacity = 0.8f, .load = 0.01f, .z = 0.001f };
    for (int i = 0; i < KINDS; i++) kinds[i].c = small();
    int k = 0;
    kinds[k++].name = "Mamba";
    kinds[k].name = "Mamba with biases, RMS final norm, own head";
    kinds[k].c.bias = true;
    kinds[k].c.final_norm = BM_RMSNORM;
    kinds[k++].c.tied_head = false;
    kinds[k].name = "Mamba without conv bias";
    kinds[k++].c.conv_bias = false;
    kinds[k].name = "dense MLP, GELU, gated";
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_DENSE, 1, 10 };
    kinds[k].name = "dense MLP, SiLU, plain, biases";
    kinds[k].c.gated = false;
    kinds[k].c.activation = BM_SILU;
    kinds[k].c.bias = true;
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_DENSE, 1, 10 };
    kinds[k].name = "experts, sigmoid, running rule";
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 6 };
    kinds[k].name = "experts, Sinkhorn, biases";
    kinds[k].c.bias = true;
    kinds[k].balance = sinkhorn;
    kinds[k].balanced = true;
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 6 };
    kinds[k].name = "experts, Switch: softmax, capacity, load and z losses";
    kinds[k].c.routing = BM_ROUTE_SOFTMAX;
    kinds[k].balance = capacity;
    kinds[k].balanced = true;
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 6 };
    kinds[k].name = "experts, two a token, softmax";
    kinds[k].c.routing = BM_ROUTE_SOFTMAX;
    kinds[k].c.top_k = 2;
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 6 };
    kinds[k].name = "Mamba and experts in parallel";
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_MOE, 3, 6 };
    kinds[k].name = "Mamba and dense MLP in parallel";
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_DENSE, 1, 6 };
    kinds[k].name = "attention";
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_ATTENTION, BM_FFN_NONE, 0, 0 };
    kinds[k].name = "attention, key heads shared, biases, a short window";
    kinds[k].c.bias = true;
    kinds[k].c.n_kv_heads = 1;
    kinds[k].c.max_len = 9;
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_ATTENTION, BM_FFN_NONE, 0, 0 };
    kinds[k].name = "attention and experts in parallel";
    kinds[k++].c.layer[0] = (bm_layer_config){ BM_MIXER_ATTENTION, BM_FFN_MOE, 3, 6 };
    kinds[k].name = "all of them";
    kinds[k].c.n_layers = 5;
    kinds[k].c.layer[4] = (bm_layer_config){ BM_MIXER_ATTENTION, BM_FFN_NONE, 0, 0 };
    kinds[k].balance = sinkhorn;
    kinds[k].balanced = true;
    kinds[k].c.layer[1] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 6 };
    kinds[k].c.layer[2] = (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_MOE, 3, 6 };
    kinds[k++].c.layer[3] = (bm_layer_config){ BM_MIXER_NONE, BM_FFN_DENSE, 1, 6 };
    assert_int_equal(k, KINDS);
}

static void kind_open(rig *r, const kind *k, int slots, bool recompute) {
    rig_open(r, &k->c, slots, recompute);
    if (k->balanced) r->b.balance = &k->balance;
}

#ifdef BM_F64
enum { CHOICES = 5 * 2 * ROWS };
static const double NOISE = 1e-11;      /* rounding of the loss over the step; parts without any gradient */

/* What the gradient is of: scaled losses of rows and routing groups. */
static double loss_of(rig *r) {
    bm_learner *l = r->l;
    OK(bm_learner_step(l, &r->b, false));
    double sum = 0;
    for (int i = 0; i < r->b.M; i++) sum += (double)l->loss[i] * (double)r->b.scale;
    for (int i = 0; r->b.balance && i < r->c.n_layers; i++)
        if (r->c.layer[i].ffn == BM_FFN_MOE)
            for (int g = 0; g < 2 * r->b.G; g++) sum += (double)l->pass.acts[i].loss[g] * (double)r->b.loss_scale;
    return sum;
}

static void part_name(char out[128], const bm_part *p) {
    snprintf(out, 128, "%s (layer %d, expert %d)", p->param->name[BM_LAYOUT_GGUF], p->layer, p->expert);
}

/* Experts of every row, to see that a difference did not change a choice. */
static void choices(const rig *r, int32_t *out) {
    for (int l = 0; l < r->c.n_layers; l++)
        if (r->c.layer[l].ffn == BM_FFN_MOE)
            memcpy(out + l * 2 * ROWS, r->l->pass.acts[l].expert, sizeof *out * (size_t)(r->c.top_k * ROWS));
}

/* Central difference of fourth order in *v; false when experts changed on the way. */
static bool difference(rig *r, float *v, const int32_t *frozen, double *out) {
    static const double step[4] = { 1, -1, 2, -2 }, weight[4] = { 8, -8, -1, 1 };
    const double keep = *v, h = 2e-4;
    int32_t now[CHOICES] = { 0 };
    bool same = true;
    *out = 0;
    for (int i = 0; i < 4; i++) {
        *v = keep + step[i] * h;
        bm_learner_refresh(r->l);
        *out += weight[i] * loss_of(r) / (12 * h);
        choices(r, now);
        same &= !memcmp(now, frozen, sizeof now);
    }
    *v = keep;
    bm_learner_refresh(r->l);
    return same;
}

static void central_differences(void **state) {
    rig r;
    int32_t frozen[CHOICES] = { 0 };
    kind_open(&r, *state, 0, false);
    bm_learner *l = r.l;
    gradient(&r);
    choices(&r, frozen);
    double worst = 0;
    size_t probed = 0, moved = 0;
    for (size_t i = 0; i < l->arena.n_parts; i++) {
        const bm_part *p = &l->arena.part[i].part;
        const size_t n = (size_t)p->rows * (size_t)p->cols;
        double most = 0, off = 0, want;
        for (size_t e = 0; e < n; e++, probed++) {
            const size_t at = l->arena.part[i].at + e;
            if (!difference(&r, l->master + at, frozen, &want)) {
                moved++;
                continue;
            }
            most = fmax(most, fabs(want));
            off = fmax(off, fabs(l->grad[at] - want));
        }
        char name[128];
        part_name(name, p);
        if (off > 1e-6 * most && off > NOISE) fail_msg("%s: off by %g, largest entry %g", name, off, most);
        if (most > NOISE) worst = fmax(worst, off / most);
    }
    print_message("  %zu elements of %zu parts, worst %.1e of a part's largest entry; experts changed at %zu\n", probed,
                  l->arena.n_parts, worst, moved);
    assert_true(moved < probed / 10);
    rig_close(&r);
}
#endif

static void same_floats(const char *what, const float *a, const float *b, size_t n, double factor) {
    for (size_t i = 0; i < n; i++)
        if ((double)a[i] != factor * (double)b[i]) fail_msg("%s: element %zu is %g, expected %g", what, i, (double)a[i], factor * (double)b[i]);
}

/* Twice is double; recomputing changes no bit; nor does the number of threads. */
static void twice_and_recompute(void **state) {
    rig r, again;
    kind_open(&r, *state, 0, false);
    gradient(&r);
    float *once = malloc(r.l->arena.n * sizeof *once);
    memcpy(once, r.l->grad, r.l->arena.n * sizeof *once);
    kind_open(&again, *state, 0, true);
    gradient(&again);
    same_floats("recomputed", again.l->grad, once, r.l->arena.n, 1);
    rig_close(&again);
    for (size_t i = 0; i < r.l->arena.n; i++)
        if (!isfinite(once[i])) fail_msg("element %zu is not finite", i);
    OK(bm_learner_step(r.l, &r.b, true));
    for (size_t i = 0; i < r.l->arena.n; i++)
        if (fabs((double)r.l->grad[i] - 2 * (double)once[i]) > 64 * EPSILON * (fabs((double)once[i]) + 1e-2))
            fail_msg("twice: element %zu is %g, expected %g", i, (double)r.l->grad[i], 2 * (double)once[i]);
    free(once);
    rig_close(&r);
}

/* Texts packed behind one another give the losses and, summed, the gradients of texts alone. */
static void packed_is_separate(void **state) {
    rig r;
    const kind *k = *state;
    kind_open(&r, k, 0, false);
    gradient(&r);
    const size_t n = r.l->arena.n;
    float *packed = malloc(n * sizeof *packed), loss[ROWS];
    memcpy(packed, r.l->grad, n * sizeof *packed);
    memcpy(loss, r.l->loss, sizeof loss);
    memset(r.l->grad, 0, n * sizeof(float));
    for (int q = 0; q < 4; q++) {
        const int32_t at = r.start[q], len = r.start[q + 1] - at, start[2] = { 0, len };
        OK(bm_learner_step(r.l, &(bm_micro){ .M = len, .Q = 1, .G = 1, .token = r.token + at, .target = r.target + at, .start = start,
                                             .group = start, .scale = r.b.scale }, true));
        same_floats("loss", r.l->loss, loss + at, (size_t)len, 1);
    }
    for (size_t i = 0; i < n; i++)
        if (fabs((double)r.l->grad[i] - (double)packed[i]) > 64 * EPSILON * (fabs((double)packed[i]) + 1e-2))
            fail_msg("element %zu is %g, expected %g", i, (double)r.l->grad[i], (double)packed[i]);
    free(packed);
    rig_close(&r);
}

/* A text in two windows with its state carried has the losses of the whole; recomputed or not, the same gradient. */
static void carried(void **state) {
    rig r, again;
    const kind *k = *state;
    kind_open(&r, k, 2, false);
    kind_open(&again, k, 2, true);
    const int32_t whole[2] = { 0, ROWS }, half[2] = { 0, ROWS / 2 }, slot[1] = { 1 };
    float loss[ROWS];
    bm_micro b = { .M = ROWS, .Q = 1, .G = 1, .token = r.token, .target = r.target, .start = whole, .group = whole, .scale = 1 };
    OK(bm_learner_step(r.l, &b, false));
    memcpy(loss, r.l->loss, sizeof loss);
    b = (bm_micro){ .M = ROWS / 2, .Q = 1, .G = 1, .token = r.token, .target = r.target, .start = half, .slot = slot, .group = half, .scale = 1 };
    for (int w = 0; w < 2; w++, b.token += ROWS / 2, b.target += ROWS / 2) {
        OK(bm_learner_step(r.l, &b, true));
        OK(bm_learner_step(again.l, &b, true));
        same_floats("loss", r.l->loss, loss + w * (ROWS / 2), ROWS / 2, 1);
        same_floats("recomputed", again.l->grad, r.l->grad, r.l->arena.n, 1);
    }
    rig_close(&r);
    rig_close(&again);
}

int main(void) {
    struct CMUnitTest test[6 + 4 * KINDS];
    int n = 0;
    make_kinds();
#ifndef BM_F64
    for (int i = 0; i < 6; i++)
        test[n++] = (struct CMUnitTest){ .name = goldens[i], .test_func = golden_gradients, .initial_state = (void *)goldens[i] };
#endif
    for (int i = 0; i < KINDS; i++) {
#ifdef BM_F64
        test[n++] = (struct CMUnitTest){ .name = kinds[i].name, .test_func = central_differences, .initial_state = &kinds[i] };
#endif
        test[n++] = (struct CMUnitTest){ .name = kinds[i].name, .test_func = twice_and_recompute, .initial_state = &kinds[i] };
        if (kinds[i].balanced) continue;        /* a text alone would be another routing group */
        test[n++] = (struct CMUnitTest){ .name = kinds[i].name, .test_func = packed_is_separate, .initial_state = &kinds[i] };
        test[n++] = (struct CMUnitTest){ .name = kinds[i].name, .test_func = carried, .initial_state = &kinds[i] };
    }
    return _cmocka_run_group_tests("gradients", test, (size_t)n, NULL, NULL);
}
