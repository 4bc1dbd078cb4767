/* tests/test_train.c - configurations of a run, schedules, the optimizer's settings, and runs. */
#include "lib_train.h"
#include <math.h>

/* cmocka's own takes floats, which the f64 build has not. */
static void near(double found, double expected, double most) {
    if (!(fabs(found - expected) <= most)) fail_msg("found %.9g, expected %.9g within %g", found, expected, most);
}

static bm_device *device;
static int open_device(void **state) {
    (void)state;
    return bm_device_open(&device, "cpu", 2);
}
static int close_device(void **state) {
    (void)state;
    bm_device_close(device);
    return 0;
}

/* ---- configurations ------------------------------------------------------------------------- */

static bm_train_config *parsed(const char *extra, const char *const *set, int n) {
    const char *text = train_config(extra);
    bm_train_config *c;
    OK(bm_train_config_parse(&c, text, strlen(text), "test.json", set, n));
    return c;
}

static void refused(const char *text, const char *set, const char *words) {
    bm_train_config *c;
    assert_int_not_equal(bm_train_config_parse(&c, text, strlen(text), "test.json", &set, set != NULL), BM_OK);
    assert_null(c);
    if (!strstr(bm_error(), words)) fail_msg("found \"%s\", expected \"%s\" in it", bm_error(), words);
}

static void wrong_configurations_say_what_is_wrong(void **state) {
    (void)state;
    const char *good = train_config("");
    static const char *const set[][2] = {
        { "optimizer.learning_rate=1", "optimizer.learning_rate: no such key; the nearest is optimizer" },
        { "optimizer.lrr=1", "optimizer.lrr: no such key; the nearest is optimizer.lr" },
        { "optimzer.lr=1", "the nearest is optimizer.lr" },
        { "lr=1", "the nearest is optimizer.lr" },
        { "stps=1", "stps: no such key; the nearest is steps" },
        { "optimiser={}", "optimiser: no such key; the nearest is optimizer" },
        { "optimizer.lr=fast", "--set: optimizer.lr: found \"fast\", expected a number from 0 to 100" },
        { "optimizer.lr=-1", "--set: optimizer.lr: found -1" },
        { "steps=1.5", "steps: found 1.5, expected a whole number" },
        { "steps=0", "found none of steps and tokens" },
        { "tokens=5", "found both of steps and tokens" },
        { "precision=f64", "precision: found \"f64\", expected one of f32|bf16" },
        { "recompute=1", "recompute: found 1, expected true or false" },
        { "freeze=all", "freeze: found \"all\", expected a list of texts" },
        { "batch=8", "batch: found 8, expected an object" },
        { "model.hiden_size=8", "model.hiden_size: no such key; the nearest is hidden_size" },
        { "model.hidden_size=x", "hidden_size" },
        { "model=/nowhere", "'/nowhere', which is not there" },
        { "data.sources=[]", "data.sources: found []" },
        { "data.sources=[{\"path\":\"a\",\"wieght\":1}]", "data.sources[0].wieght: no such key; the nearest is "
          "weight" },
        { "data.sources=[{\"path\":\"a\",\"weight\":1},{\"path\":\"b\"}]", "found weights of some" },
        { "optimizer.groups=[{\"match\":[\"*\"],\"beta\":1}]",
          "optimizer.groups[0].beta: no such key; the nearest is beta1" },
        { "optimizer.groups=[{\"lr\":1}]", "optimizer.groups[0].match: found nothing" },
        { "routing.route_group=3", "batch.sequences: found 8, expected a multiple of routing.route_group, 3" },
        { "batch.from=16", "batch.from: found 16, expected at most batch.sequences, 8" },
        { "nothing", "found 'nothing', expected key=value" },
    };
    for (size_t i = 0; i < sizeof set / sizeof *set; i++) refused(good, set[i][0], set[i][1]);
    refused("[]", NULL, "test.json: found [], expected an object");
    refused("{\"steps\": 1,}", NULL, "test.json: line 1");
    refused("{\"steps\": 1, \"model\": {}, \"date\": {}}", NULL, "test.json: date: no such key; the nearest is data");
    refused("{\"steps\": 1, \"model\": {}, \"data\": {\"seq_len\": 0}}", NULL,
            "data.seq_len: found 0, expected a whole number from 1");
}

static void configuration_fills_defaults_in(void **state) {
    (void)state;
    static const char *const set[] = { "optimizer.lr=0.5", "samples.prompts=[\"a\", \"b\"]", "precision=bf16",
                                       "batch.sequences=16" };
    bm_train_config *c = parsed("\"carry\": true, ", set, 4);
    near(c->lr, 0.5, 0);
    near(c->beta2, 0.95, 0);
    assert_int_equal(c->prompts.n, 2);
    assert_string_equal(c->prompts.item[1], "b");
    assert_int_equal(c->precision, BM_PRECISION_BF16);
    assert_true(c->carry);
    assert_int_equal(c->batch.micro, 16);
    assert_int_equal(c->balance.choice, BM_CHOOSE_SINKHORN);
    assert_true(c->balance.paper_start);
    /* the JSON that is kept says the same, and every default */
    char *text = json_dumps(c->json, JSON_REAL_PRECISION(15));
    bm_train_config *again;
    OK(bm_train_config_parse(&again, text, strlen(text), "again", NULL, 0));
    near(again->lr, 0.5, 0);
    assert_int_equal(again->batch.sequences, 16);
    assert_non_null(strstr(text, "\"beta2\": 0.95"));
    free(text);
    bm_train_config_free(again);
    bm_train_config_free(c);
}

/* ---- schedules --------------------------------------------------------------------------------- */

static void schedules(void **state) {
    (void)state;
    static const char *const set[] = { "steps=110", "optimizer.lr=1", "optimizer.warmup=10", "optimizer.min_lr=0.1" };
    bm_train_config *c = parsed("", set, 4);
    assert_int_equal(bm_schedule_steps(c), 110);
    near(bm_schedule_lr(c, 0), 0.1, 1e-12);
    near(bm_schedule_lr(c, 9), 1, 1e-12);
    near(bm_schedule_lr(c, 10), 1, 1e-12);
    near(bm_schedule_lr(c, 35), 0.1 + 0.9 * (0.5 + 0.25 * sqrt(2)), 1e-9);
    near(bm_schedule_lr(c, 60), 0.55, 1e-12);
    near(bm_schedule_lr(c, 110), 0.1, 1e-12);
    c->curve = BM_CURVE_LINEAR;
    near(bm_schedule_lr(c, 35), 0.1 + 0.9 * 0.75, 1e-12);
    c->curve = BM_CURVE_CONSTANT;
    near(bm_schedule_lr(c, 109), 1, 0);
    c->curve = BM_CURVE_WSD;
    c->wsd_share = 0.2;
    near(bm_schedule_lr(c, 88), 1, 0);
    near(bm_schedule_lr(c, 99), 0.55, 1e-12);
    near(bm_schedule_lr(c, 110), 0.1, 1e-12);
    bm_train_config_free(c);
}

static void warmups_of_the_batch(void **state) {
    (void)state;
    static const char *const set[] = { "steps=0", "tokens=5000", "batch.sequences=16", "batch.from=4", "batch.warmup=6",
                                       "routing.route_group=2", "batch.seq_len_from=8", "batch.seq_len_warmup=3" };
    bm_train_config *c = parsed("", set, 8);
    static const int sequences[] = { 4, 6, 8, 10, 12, 14, 16, 16 }, length[] = { 8, 16, 24, 32, 32, 32, 32, 32 };
    uint64_t before = 0, tokens = 0;
    for (uint64_t s = 0; s < 8; s++) {
        assert_int_equal(bm_schedule_sequences(c, s), sequences[s]);
        assert_int_equal(bm_schedule_length(c, s), length[s]);
        assert_int_equal(bm_schedule_before(c, s), before);
        before += (uint64_t)sequences[s];
    }
    uint64_t steps = bm_schedule_steps(c);
    for (uint64_t s = 0; s < steps; s++) {
        assert_true(tokens < 5000);
        tokens += (uint64_t)(bm_schedule_sequences(c, s) * bm_schedule_length(c, s));
    }
    assert_true(tokens >= 5000);
    bm_train_config_free(c);
}

/* ---- settings of the optimizer -------------------------------------------------------------------- */

static bool decays(const bm_part *p) {
    static const char *const never[] = { "norm", "A_log", "mixer.D", "conv1d", "bias", "router" };
    for (size_t i = 0; i < sizeof never / sizeof *never; i++)
        if (strstr(p->param->name[BM_LAYOUT_RELEASED], never[i])) return false;
    return true;
}

/* With gradients of zero a step moves exactly what decays, by lr * factor * decay * factor. */
static void settings_by_name(void **state) {
    (void)state;
    static const char *const set[] = { "freeze=[\"*.0.mixer.in_proj.*\"]", "optimizer.decay=0.5",
        "optimizer.groups=[{\"match\": [\"embedding.*\"], \"lr\": 2}, {\"match\": [\"*.out_proj.*\", "
            "\"embedding.*\"], \"decay\": 0}, "
        "{\"match\": [\"*.linear_fc2.weight\"], \"lr\": 0.5, \"decay\": 0.5}]" };
    bm_trainer *t = train_open(device, "", NULL, set, 3);
    const bm_arena *a = &t->learner->arena;
    bm_optim_result r;
    float *before = malloc(a->n * sizeof *before);
    memcpy(before, t->learner->master, a->n * sizeof *before);
    for (int layer = 3; layer >= -1; layer--) bm_optim_ready(&t->optim, layer);
    OK(bm_optim_step(&t->optim, 0.1, 1, 1.0, &r));
    assert_false(r.skipped);
    near(r.norm, 0, 0);
    int moved = 0;
    for (size_t i = 0; i < a->n_parts; i++) {
        const bm_part *p = &a->part[i].part;
        const char *name = p->param->name[BM_LAYOUT_RELEASED];
        double shrink = decays(p) ? 0.1 * 0.5 : 0;
        if (strstr(name, "out_proj") || strstr(name, "embedding") || (p->layer == 0 &&
                                                                      strstr(name, "in_proj"))) shrink = 0;
        if (strstr(name, "linear_fc2")) shrink *= 0.25;
        moved += shrink > 0;
        for (size_t k = a->part[i].at; k < a->part[i].at + (size_t)p->rows * (size_t)p->cols; k++)
            if (fabs((double)t->learner->master[k] - (double)before[k] * (1 - shrink)) > 1e-6 * fabs((double)before[k]))
                fail_msg("%s of layer %d: found %g, was %g, expected a shrink of %g", name, p->layer,
                         (double)t->learner->master[k],
                         (double)before[k], shrink);
    }
    assert_int_equal(moved, 2 * 2 + 1 + 2 * 4 * 3);     /* x and dt, in of layer 2, experts */
    free(before);
    bm_trainer_close(t);
}

static void patterns_that_match_nothing_are_refused(void **state) {
    (void)state;
    static const char *const set[] = { "freeze=[\"embeding.*\"]", "optimizer.groups=[{\"match\": [\"*.rooter.*\"]}]" };
    const char *text = train_config("");
    bm_trainer *t;
    for (int i = 0; i < 2; i++) {
        const bm_trainer_options o = { .config = text, .n_config = strlen(text), .set = set + i, .n_set = 1 };
        assert_int_equal(bm_trainer_open(&t, device, &o), BM_EARG);
        assert_non_null(strstr(bm_error(), i ? "'*.rooter.*', which no tensor's name matches"
                               : "'embeding.*', which no tensor's"));
    }
}

/* ---- runs --------------------------------------------------------------------------------------------- */

typedef struct seen { double loss[64], norm[64], valid[64]; int n, skipped; int stop_after; } seen;
static bool see(void *user, const bm_train_news *n) {
    seen *s = user;
    if (n->event == BM_TRAIN_EVALUATED) s->valid[s->n - 1] = n->valid_loss;
    if (n->event != BM_TRAIN_STEP) return true;
    s->loss[s->n] = n->loss;
    s->norm[s->n++] = n->grad_norm;
    s->skipped += n->skipped;
    return !s->stop_after || s->n < s->stop_after;
}

/* Runs to the end; masters, malloc'ed, when `master` is given. */
static seen run(bm_device *d, const char *extra, const char *const *set, int n, float **master) {
    seen s = { .n = 0 };
    bm_trainer *t = train_open(d, extra, NULL, set, n);
    OK(bm_trainer_run(t, see, &s));
    if (master) {
        *master = malloc(t->learner->arena.n * sizeof **master);
        memcpy(*master, t->learner->master, t->learner->arena.n * sizeof **master);
    }
    bm_trainer_close(t);
    return s;
}

static void loss_falls(void **state) {
    (void)state;
    static const char *const set[] = { "steps=60" };
    const seen s = run(device, "", set, 1, NULL);
    assert_int_equal(s.n, 60);
    near(s.loss[0], log(TRAIN_VOCAB), 0.3);
    assert_true(s.loss[59] < s.loss[0] - 1.5);
    assert_true(s.valid[59] < s.loss[0] - 1);
    assert_int_equal(s.skipped, 0);
}

static void threads_change_no_bit(void **state) {
    (void)state;
    bm_device *one;
    float *a, *b;
    OK(bm_device_open(&one, "cpu", 1));
    const seen x = run(one, "", NULL, 0, &a), y = run(device, "", NULL, 0, &b);
    bm_device_close(one);
    assert_memory_equal(x.loss, y.loss, sizeof x.loss);
    assert_memory_equal(x.norm, y.norm, sizeof x.norm);
    bm_train_config *c = parsed("", NULL, 0);
    bm_arena arena;
    OK(bm_arena_open(&arena, &c->model));
    assert_memory_equal(a, b, arena.n * sizeof *a);
    bm_arena_close(&arena);
    bm_train_config_free(c);
    free(a);
    free(b);
}

static void close_losses(const seen *a, const seen *b, double most) {
    assert_int_equal(a->n, b->n);
    for (int i = 0; i < a->n; i++)
        if (fabs(a->loss[i] - b->loss[i]) > most * a->loss[i] || fabs(a->norm[i] - b->norm[i]) > 20 * most * a->norm[i])
            fail_msg("step %d: loss %.9g and %.9g, norm %.9g and %.9g", i + 1, a->loss[i], b->loss[i], a->norm[i],
                     b->norm[i]);
}

static void accumulation_changes_rounding_only(void **state) {
    (void)state;
    static const char *const whole[] = { "routing.route_group=2", "batch.micro=8", "routing.load=0.01",
                                         "routing.z=0.001" },
                      *const four[] = { "routing.route_group=2", "batch.micro=2", "routing.load=0.01",
                                        "routing.z=0.001" };
    const seen a = run(device, "", whole, 4, NULL), b = run(device, "", four, 4, NULL);
    close_losses(&a, &b, 2e-6);
}

static void recompute_changes_no_bit(void **state) {
    (void)state;
    float *a, *b;
    const seen x = run(device, "", NULL, 0, &a), y = run(device, "\"recompute\": true, ", NULL, 0, &b);
    assert_memory_equal(x.loss, y.loss, sizeof x.loss);
    assert_memory_equal(x.norm, y.norm, sizeof x.norm);
    free(a);
    free(b);
}

/* Lines are short documents: more segments than a micro-batch was given room for, so it is cut. */
static void many_short_documents(void **state) {
    (void)state;
    char set[1400];
    snprintf(set, sizeof set, "data.sources=[{\"path\": \"%s\"}]", train_data_lines());
    const char *const all[] = { set, "data.seq_len=128", "batch.micro=8" };
    const seen s = run(device, "", all, 3, NULL);
    assert_int_equal(s.skipped, 0);
    assert_true(s.loss[s.n - 1] < s.loss[0]);
}

static void a_step_that_is_not_finite_is_skipped(void **state) {
    (void)state;
    bm_trainer *t = train_open(device, "", NULL, NULL, 0);
    bm_optim_result r;
    const bm_arena *a = &t->learner->arena;
    const size_t bytes = a->n * sizeof(float);
    float *before = malloc(bytes);
    memcpy(before, t->learner->master, bytes);
    for (size_t i = 0; i < a->n; i++) t->learner->grad[i] = 1e-3f;
    for (size_t i = 0; i < a->n_parts; i++)
        if (strstr(a->part[i].part.param->name[BM_LAYOUT_RELEASED], "x_proj") && a->part[i].part.layer == 2)
            t->learner->grad[a->part[i].at + 5] = NAN;
    for (int layer = 3; layer >= -1; layer--) bm_optim_ready(&t->optim, layer);
    OK(bm_optim_step(&t->optim, 0.1, 1, 1.0, &r));
    assert_true(r.skipped);
    assert_string_equal(r.not_finite, "the gradient of decoder.layers.2.mixer.x_proj.weight");
    assert_memory_equal(before, t->learner->master, bytes);
    free(before);

    seen s = { .n = 0 };                        /* and in a run: the counters go on, the weights stay */
    t->learner->master[a->part[0].at] = NAN;
    bm_learner_refresh(t->learner);
    OK(bm_trainer_run(t, see, &s));
    assert_int_equal(s.n, 6);
    assert_int_equal(s.skipped, 6);
    assert_int_equal(t->at.step, 6);
    assert_int_equal(t->at.updates, 0);
    bm_trainer_close(t);

    t = train_open(device, "\"stop_on_nonfinite\": true, ", NULL, NULL, 0);
    t->learner->master[0] = NAN;
    bm_learner_refresh(t->learner);
    assert_int_equal(bm_trainer_run(t, see, &s), BM_ECANCELLED);
    assert_non_null(strstr(bm_error(), "step 1: the gradient of embedding.word_embeddings.weight is not finite"));
    bm_trainer_close(t);
}

/* With lr 0, rows that carry their state read a text as one long sequence; some rows begin where a document does. */
static void carried_states_read_one_text(void **state) {
    (void)state;
    enum { T = 8, ROWS = 60 };
    char lines[1400];
    snprintf(lines, sizeof lines, "data.sources=[{\"path\": \"%s\"}]", train_data_lines());
    const char *const set[] = { "optimizer.lr=0", "optimizer.warmup=0", "batch.sequences=1", "routing.choice=best",
                                "steps=60", "data.seq_len=8", lines };
    bm_trainer *t = train_open(device, "\"carry\": true, ", NULL, set, 7);
    seen s = { .n = 0 };
    bm_token tokens[T + 1], all[ROWS * T + 1];
    int32_t starts[T], begin[ROWS * T + 1];
    float nll[ROWS * T];
    bm_row r;
    int n_begin = 0, fresh = 0, inside = 0;
    for (uint64_t i = 0; i < ROWS; i++) {
        OK(bm_order_carry(t->batch->order, 0, 1, i * T, T, tokens, starts, &r));
        memcpy(all + i * T, tokens, sizeof tokens);
        for (int k = 0; k < r.n_starts; k++)
            if (k || r.fresh || !i) begin[n_begin++] = (int32_t)(i * T) + starts[k];
        fresh += i && r.fresh;
        inside += r.n_starts > 1;
    }
    assert_true(fresh > 0 && inside > 0);
    begin[n_begin] = ROWS * T;
    bm_session *session;
    const bm_model m = { .config = t->config->model, .device = device, .be = device->be, .w = t->learner->w };
    OK(bm_session_open(&session, &m, &(bm_session_options){ .arith = BM_ARITH_F32 }));
    for (int i = 0; i < n_begin; i++) {
        OK(bm_state_set(session, 0, NULL));
        OK(bm_score(session, 0, all + begin[i], (size_t)(begin[i + 1] - begin[i]) + 1, nll + begin[i]));
    }
    bm_session_close(session);
    OK(bm_trainer_run(t, see, &s));
    for (int i = 0; i < ROWS; i++) {
        double sum = 0;
        for (int k = 0; k < T; k++) sum += (double)nll[i * T + k];
        near(s.loss[i], sum / T, 1e-5);
    }
    bm_trainer_close(t);
}

/* Step s has the rows after those of the steps before it, each once, also while the batch grows. */
static void steps_read_one_row_after_the_other(void **state) {
    (void)state;
    static const char *const set[] = { "batch.warmup=3", "batch.from=2", "batch.micro=2" };
    bm_trainer *t = train_open(device, "", NULL, set, 3);
    bm_token tokens[33];
    int32_t starts[32];
    bm_micro m;
    bm_row r;
    uint64_t row = 0;
    for (uint64_t step = 0; step < 5; step++) {
        bm_batch_begin(t->batch, t->comm, step);
        while (t->batch->next < t->batch->end) {
            OK(bm_batch_next(t->batch, t->learner, &m));
            assert_int_equal(m.group[m.G], m.M);
            for (int i = 0; i < m.M; i += 32) {
                OK(bm_order_row(t->batch->order, row++, 32, tokens, starts, &r));
                assert_memory_equal(m.token + i, tokens, 32 * sizeof *tokens);
                assert_memory_equal(m.target + i, tokens + 1, 32 * sizeof *tokens);
            }
        }
        assert_int_equal(row, bm_schedule_before(t->config, step + 1));
    }
    bm_trainer_close(t);
}

/* Every row of the step is in the load of one expert of each layer, however the batch was cut. */
static void loads_count_every_row(void **state) {
    (void)state;
    static const char *const set[] = { "steps=1", "batch.micro=2", "routing.route_group=2" };
    for (int again = 0; again < 2; again++) {
        bm_trainer *t = train_open(device, again ? "\"recompute\": true, " : "", NULL, set, 3);
        OK(bm_trainer_run(t, NULL, NULL));
        assert_int_equal(t->tally->n_layers, 2);
        for (int i = 0; i < 2; i++) {
            const bm_metric_layer *l = &t->tally->record[i];
            uint64_t rows = 0;
            for (int e = 0; e < l->n_experts; e++) rows += l->load[e];
            assert_int_equal(l->layer, 1 + 2 * i);
            assert_int_equal(rows, 8 * 32);
            assert_true(l->load[0] != l->load[1] || l->load[1] != l->load[2]);
            assert_true(l->sweeps >= 1);
        }
        bm_trainer_close(t);
    }
}

static void warmups_run(void **state) {
    (void)state;
    static const char *const set[] = { "batch.warmup=4", "batch.from=2", "batch.seq_len_warmup=4",
                                       "batch.seq_len_from=8", "noise_scale=true",
                                       "batch.micro=2", "average=0.9", "optimizer.schedule=wsd" };
    const seen s = run(device, "", set, 8, NULL);
    assert_int_equal(s.n, 6);
    assert_true(s.loss[5] < s.loss[0]);
    assert_true(isfinite(s.valid[5]));
}

/* ema = keep * ema + (1 - keep) * w, keep growing to `average`. */
static void average_of_the_weights(void **state) {
    (void)state;
    static const char *const set[] = { "average=0.5", "steps=1" };
    bm_trainer *t = train_open(device, "", NULL, set, 2);
    const size_t n = t->learner->arena.n;
    float *before = malloc(n * sizeof *before);
    memcpy(before, t->learner->master, n * sizeof *before);
    OK(bm_trainer_run(t, NULL, NULL));
    const double keep = 2.0 / 11;
    for (size_t i = 0; i < n; i++)
        near(t->optim.average[i], keep * (double)before[i] + (1 - keep) * (double)t->learner->master[i], 1e-6);
    free(before);
    bm_trainer_close(t);
}

/* The evaluation is bm_score over windows from the empty text, segment by segment. */
static void evaluation_is_the_running_rule(void **state) {
    (void)state;
    static const char *const set[] = { "steps=3", "routing.load=1" };
    bm_trainer *t = train_open(device, "", NULL, set, 2);
    seen s = { .n = 0 };
    OK(bm_trainer_run(t, see, &s));
    const bm_data *d = t->batch->source[0];
    const bm_model m = { .config = t->config->model, .device = device, .be = device->be, .w = t->learner->w };
    bm_session *session;
    bm_token tokens[33];
    int32_t starts[33];
    float nll[32];
    double sum = 0, n = 0;
    bm_row r;
    OK(bm_session_open(&session, &m, &(bm_session_options){ .arith = BM_ARITH_F32 }));
    for (uint64_t w = 0; w < bm_data_windows(d, BM_SPLIT_VALID, 32); w++) {
        OK(bm_data_window(d, BM_SPLIT_VALID, w, 32, tokens, starts, &r));
        for (int i = 0; i < r.n_starts; i++) {
            const int end = i + 1 < r.n_starts ? starts[i + 1] : r.n;
            OK(bm_state_set(session, 0, NULL));
            OK(bm_score(session, 0, tokens + starts[i], (size_t)(end - starts[i]) + 1, nll));
            for (int k = 0; k < end - starts[i]; k++) sum += (double)nll[k];
        }
        n += r.n;
    }
    assert_int_equal(n, bm_data_tokens(d, BM_SPLIT_VALID) - 1);
    near(s.valid[2], sum / n, 1e-5);
    bm_session_close(session);
    bm_trainer_close(t);
}

/* A run of six steps == three, stopped, and three more; metrics too. */
static void resume_is_the_same_run(void **state) {
    (void)state;
    static const char *const set[] = { "samples.prompts=[\"the\"]", "samples.tokens=4" };
    char whole[1280], halves[1280], a[1400], b[1400];
    snprintf(whole, sizeof whole, "%s", scratch_path("whole"));
    snprintf(halves, sizeof halves, "%s", scratch_path("halves"));
    bm_trainer *t = train_open(device, "\"carry\": true, \"average\": 0.9, ", whole, set, 2);
    seen s = { .n = 0 }, h = { .stop_after = 3 };
    OK(bm_trainer_run(t, see, &s));
    bm_trainer_close(t);
    t = train_open(device, "\"carry\": true, \"average\": 0.9, ", halves, set, 2);
    assert_int_equal(bm_trainer_run(t, see, &h), BM_ECANCELLED);
    assert_int_equal(h.n, 3);
    bm_trainer_close(t);
    const char *text = train_config("\"carry\": true, \"average\": 0.9, ");
    bm_trainer_options o = { .config = text, .n_config = strlen(text), .set = set, .n_set = 2, .run = halves };
    assert_int_equal(bm_trainer_open(&t, device, &o), BM_EARG);
    assert_non_null(strstr(bm_error(), "found a run in it"));
    o.resume = true;
    OK(bm_trainer_open(&t, device, &o));
    h.stop_after = 0;
    OK(bm_trainer_run(t, see, &h));
    bm_trainer_close(t);
    assert_memory_equal(s.loss, h.loss, sizeof s.loss);
    assert_memory_equal(s.norm, h.norm, sizeof s.norm);
    static const char *const files[] = { "model", "optimizer", "average", "carry" };
    for (int i = 0; i < 4; i++) {
        snprintf(a, sizeof a, "%s/checkpoints/step-00000006/%s.safetensors", whole, files[i]);
        snprintf(b, sizeof b, "%s/checkpoints/step-00000006/%s.safetensors", halves, files[i]);
        same_files(a, b);
    }
}

static void data_that_does_not_fit_is_refused(void **state) {
    (void)state;
    static const char *const set[][2] = {
        { "model.vocab_size=100", "the model of test.json has 100: give it vocab_size" },
        { "data.seq_len=100000", "tokens to train on" },
        { "data.sources=[{\"path\": \"/nowhere\"}]", "/nowhere" },
    };
    const char *text = train_config("");
    bm_trainer *t;
    for (size_t i = 0; i < sizeof set / sizeof *set; i++) {
        const bm_trainer_options o = { .config = text, .n_config = strlen(text), .config_name = "test.json",
                                       .set = &set[i][0],
                                       .n_set = 1 };
        assert_int_not_equal(bm_trainer_open(&t, device, &o), BM_OK);
        if (!strstr(bm_error(), set[i][1])) fail_msg("found \"%s\", expected \"%s\" in it", bm_error(), set[i][1]);
    }
}

static void plan_tells_the_memory(void **state) {
    (void)state;
    const char *text = train_config("");
    const bm_trainer_options o = { .config = text, .n_config = strlen(text) };
    bm_train_plan p;
    OK(bm_train_plan_make(&p, device, &o));
    bm_trainer *t = train_open(device, "", NULL, NULL, 0);
    assert_int_equal(p.steps, 6);
    assert_int_equal(p.tokens, 6 * 8 * 32);
    assert_int_equal(p.parameters, t->info.parameters);
    const double told = (double)(p.bytes_weights + p.bytes_optimizer + p.bytes_activations);
    const double taken = (double)(t->learner->bytes + device->be->reserved(device->be) + 2 * sizeof(float) *
                                  t->optim.n_own);
    assert_true(told >= taken);
    assert_true(told < 1.05 * taken);
    assert_true((double)p.bytes > told);
    bm_trainer_close(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_configurations_say_what_is_wrong),
        cmocka_unit_test(configuration_fills_defaults_in),
        cmocka_unit_test(schedules),
        cmocka_unit_test(warmups_of_the_batch),
        cmocka_unit_test(settings_by_name),
        cmocka_unit_test(patterns_that_match_nothing_are_refused),
        cmocka_unit_test(loss_falls),
        cmocka_unit_test(threads_change_no_bit),
        cmocka_unit_test(accumulation_changes_rounding_only),
        cmocka_unit_test(recompute_changes_no_bit),
        cmocka_unit_test(many_short_documents),
        cmocka_unit_test(a_step_that_is_not_finite_is_skipped),
        cmocka_unit_test(carried_states_read_one_text),
        cmocka_unit_test(steps_read_one_row_after_the_other),
        cmocka_unit_test(loads_count_every_row),
        cmocka_unit_test(warmups_run),
        cmocka_unit_test(average_of_the_weights),
        cmocka_unit_test(evaluation_is_the_running_rule),
        cmocka_unit_test(resume_is_the_same_run),
        cmocka_unit_test(data_that_does_not_fit_is_refused),
        cmocka_unit_test(plan_tells_the_memory),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
