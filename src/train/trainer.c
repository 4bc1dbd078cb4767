/* src/train/trainer.c - a run: opening it, its steps, what happens between them.  Room: train.
 *
 * In: a configuration, packed data, perhaps a checkpoint.  Out: masters that have learned, metrics, checkpoints. */
#include "train/train.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

/* ---- what a run takes ------------------------------------------------------------------------------------------- */

static double peak_of(bm_backend *be, const bm_train_config *c) {
    const bool half = c->precision == BM_PRECISION_BF16;
    double peak = 0;
    if (be->peak(be, half ? BM_ARITH_NATIVE : BM_ARITH_F32, half ? BM_BF16 : BM_F32, &peak)) return NAN;
    return peak;
}

/* Operations of one target token, forward and backward; what is computed again is not counted. */
static double flops_of(const bm_train_config *c, int64_t seq) { return 3 * (double)bm_config_flops(&c->model, seq); }

enum { PEAK_SECONDS = 10 };
/* Measured beside the steps: a processor that is shared or warm does not keep what it reached when the run began. */
static void measure_peak(bm_trainer *t) {
    if (t->peak_at > 0 && bm_now() - t->peak_at < PEAK_SECONDS) return;
    t->peak = peak_of(t->device->be, t->config);
    t->peak_at = bm_now();
}

static uint64_t tokens_before(const bm_train_config *c, uint64_t step) {
    const int64_t ramp = c->batch.warmup > c->batch.len_warmup ? c->batch.warmup : c->batch.len_warmup;
    const uint64_t slow = step < (uint64_t)ramp ? step : (uint64_t)ramp;
    uint64_t n = (step - slow) * (uint64_t)(c->batch.sequences * c->seq_len);
    for (uint64_t s = 0; s < slow; s++) n += (uint64_t)bm_schedule_sequences(c, s) * (uint64_t)bm_schedule_length(c, s);
    return n;
}

static bm_status tokenizer_open(bm_tokenizer **out, const bm_batch *b) {
    char *path = bm_strf("%s/tokenizer.json", bm_data_path(b->source[0]));
    if (!path) return BM_EMEMORY;
    const bm_status s = bm_tokenizer_open(out, path);
    free(path);
    return s;
}

/* This process as it is: programs, threads, what was opened so far. */
static uint64_t process_bytes(void) {
    struct rusage r;
    return getrusage(RUSAGE_SELF, &r) ? 0 : (uint64_t)r.ru_maxrss * 1024;
}

/* Two of the largest region and as much again for a tensor, while a checkpoint is written. */
static uint64_t checkpoint_bytes(const bm_arena *a) {
    size_t most = 0, begin = 0;
    for (size_t i = 1; i <= a->n_parts; i++) {
        const size_t end = i < a->n_parts ? a->part[i].at : a->n;
        if (i < a->n_parts && a->part[i].part.layer == a->part[begin].part.layer &&
            bm_part_of_model(&a->part[i].part) == bm_part_of_model(&a->part[begin].part)) continue;
        if (end - a->part[begin].at > most) most = end - a->part[begin].at;
        begin = i;
    }
    return 3 * (uint64_t)most * sizeof(float);
}

/* What does not depend on sizes: the data, their tokenizer, the measured peak. */
static bm_status look(bm_train_plan *p, bm_learner_options *o, bm_backend *be, const bm_train_config *c,
                      const bm_comm *comm) {
    bm_batch *b;
    bm_tokenizer *t = NULL;
    BM_TRY(bm_batch_open(&b, c, comm));
    const bm_status s = tokenizer_open(&t, b);
    *o = b->most;
    p->peak = peak_of(be, c) * comm->size;
    p->bytes = process_bytes();
    bm_tokenizer_close(t);
    bm_batch_close(b);
    return s;
}

static bm_status plan(bm_train_plan *out, bm_backend *be, const bm_train_config *c, bm_comm *comm) {
    bm_learner_options o;
    bm_arena a;
    bm_info info;
    uint64_t learner;
    bm_train_plan p = { .rank = comm->rank, .ranks = comm->size, .steps = bm_schedule_steps(c) };
    BM_TRY(look(&p, &o, be, c, comm));
    BM_TRY(bm_learner_bytes(&c->model, be, &o, &learner));
    BM_TRY(bm_optim_bytes(c, comm->size, &p.bytes_optimizer));
    BM_TRY(bm_arena_open(&a, &c->model));
    p.bytes_weights = a.n * (2 * sizeof(float) + (c->precision == BM_PRECISION_BF16 ? 2 : 0));
    if (c->average > 0) p.bytes_optimizer += a.n * sizeof(float);
    bm_config_info(&c->model, BM_F32, &info);
    p.bytes_activations = learner - p.bytes_weights + (uint64_t)o.rows * (2 * sizeof(bm_token) + sizeof(float));
    p.bytes += p.bytes_weights + p.bytes_optimizer + p.bytes_activations + checkpoint_bytes(&a);
    bm_arena_close(&a);
    p.parameters = info.parameters;
    p.parameters_per_token = info.parameters_per_token;
    p.tokens = tokens_before(c, p.steps);
    p.tokens_per_step = (uint64_t)(c->batch.sequences * c->seq_len);
    p.flops = flops_of(c, c->seq_len) * (double)p.tokens;
    *out = p;
    return BM_OK;
}

static bm_status parse(bm_train_config **out, const bm_trainer_options *o) {
    if (!o->config) return bm_fail(BM_EARG, "training: found no configuration, expected JSON");
    return bm_train_config_parse(out, o->config, o->n_config, o->config_name ? o->config_name : "configuration", o->set,
                                 o->n_set);
}

bm_status bm_train_plan_make(bm_train_plan *out, bm_device *d, const bm_trainer_options *o) {
    bm_train_config *c = NULL;
    bm_comm *comm = NULL;
    memset(out, 0, sizeof *out);
    bm_status s = parse(&c, o);
    if (!s) s = bm_comm_open(&comm);
    if (!s) {
        pthread_mutex_lock(&d->lock);
        s = plan(out, d->be, c, comm);
        pthread_mutex_unlock(&d->lock);
    }
    if (comm) comm->close(comm, s);
    bm_train_config_free(c);
    return s;
}

/* ---- opening ------------------------------------------------------------------------------------------------- */

/* Masters from the model to go on from, or from the seed. */
static bm_status weights_open(bm_trainer *t) {
    const bm_train_config *c = t->config;
    bm_learner *l = t->learner;
    bm_backend *be = l->be;
    float *x = l->master;
    bm_source *source = NULL;
    if (!be->reads_host) BM_TRY(bm_alloc(&x, l->arena.n * sizeof *x, "weights"));
    bm_status s = BM_OK;
    if (c->model_path) s = bm_source_open(&source, c->model_path);
    else bm_arena_init(&l->arena, x, (uint64_t)c->seed_init);
    if (!s && source) s = bm_arena_load(&l->arena, x, source);
    bm_source_close(source);
    if (x != l->master) {
        if (!s) be->put(be, l->master, x, l->arena.n * sizeof *x);
        const bm_status put = be->sync(be);
        if (!s) s = put;
        free(x);
    }
    if (!s) bm_learner_refresh(l);
    return s;
}

static bm_status write_json(const char *run, const char *name, const json_t *o) {
    char *text = json_dumps(o, JSON_INDENT(1) | JSON_REAL_PRECISION(15)), *path = bm_strf("%s/%s", run, name);
    bm_status s = text && path ? bm_file_write(path, text, strlen(text)) : bm_fail_memory(1 << 16, name);
    free(text);
    free(path);
    return s;
}

/* The folder, and in it what the run is: config.json of the model, train.json with every key. */
static bm_status folder_open(bm_trainer *t) {
    json_t *model;
    if (mkdir(t->run, 0777) && errno != EEXIST) return bm_fail_errno("make the folder", t->run);
    BM_TRY(bm_config_to_json(&t->config->model, &model));
    bm_status s = write_json(t->run, "config.json", model);
    json_decref(model);
    return s ? s : write_json(t->run, "train.json", t->config->json);
}

static bm_status folder_free(const bm_trainer *t) {
    char *path = bm_strf("%s/train.json", t->run);
    if (!path) return BM_EMEMORY;
    const bool taken = bm_path_exists(path);
    free(path);
    if (!taken) return BM_OK;
    return bm_fail(BM_EARG, "%s: found a run in it; go on with it (resume), or name another folder", t->run);
}

static bm_status run_open(bm_trainer *t, bool resume) {
    bool found = false;
    t->at = (bm_counters){ .best_loss = NAN };
    if (!t->run) return BM_OK;
    if (resume) BM_TRY(bm_checkpoint_load(t, &found));
    else BM_TRY(bm_comm_agree(t->comm, t->comm->rank ? BM_OK : folder_free(t)));
    if (found) bm_log(1, "%s: going on after step %llu", t->run, (unsigned long long)t->at.step);
    else if (resume) bm_log(1, "%s: no checkpoint yet, beginning at step 0", t->run);
    bm_status s = t->comm->rank ? BM_OK : folder_open(t);
    if (!s && !t->comm->rank) s = bm_metrics_open(&t->metrics, t->run, t->at.step);
    return bm_comm_agree(t->comm, s);
}

static bm_status put_start(bm_trainer *t) {
    if (!t->metrics) return BM_OK;
    const bm_config *c = &t->config->model;
    bm_metric_record r = bm_trainer_record(t, BM_METRIC_RUN);
    r.parameters = (double)t->info.parameters;
    r.parameters_active = (double)t->info.parameters_per_token - (double)c->n_vocab * c->d_model;
    r.peak = t->peak * t->comm->size;
    r.ranks = t->comm->size;
    r.device = bm_device_name(t->device);
    return bm_metrics_put(t->metrics, &r);
}

static bm_status open_all(bm_trainer *t, const bm_trainer_options *o) {
    bm_backend *be = t->device->be;
    BM_TRY(parse(&t->config, o));
    if (o->run && !(t->run = bm_strndup(o->run, strlen(o->run)))) return BM_EMEMORY;
    BM_TRY(bm_comm_open(&t->comm));
    BM_TRY(bm_batch_open(&t->batch, t->config, t->comm));
    BM_TRY(tokenizer_open(&t->tokenizer, t->batch));
    BM_TRY(bm_learner_open(&t->learner, &t->config->model, be, &t->batch->most));
    BM_TRY(weights_open(t));
    BM_TRY(bm_optim_open(&t->optim, t->config, t->learner, t->comm));
    BM_TRY(bm_tally_open(&t->tally, t->learner));
    if (t->config->expert_ranks && t->comm->size > 1)
        BM_TRY(bm_expert_ranks_open(&t->experts, &t->config->model, t->comm, be));
    if (t->config->average > 0)
        BM_TRY(be->alloc(be, &t->aside, t->learner->arena.n * sizeof(float), "an average of the weights"));
    bm_config_info(&t->config->model, BM_F32, &t->info);
    measure_peak(t);
    BM_TRY(run_open(t, o->resume));
    return put_start(t);
}

bm_status bm_trainer_open(bm_trainer **out, bm_device *d, const bm_trainer_options *o) {
    bm_trainer *t;
    *out = NULL;
    BM_TRY(bm_alloc(&t, sizeof *t, "training"));
    t->device = d;
    pthread_mutex_lock(&d->lock);
    const bm_status s = open_all(t, o);
    pthread_mutex_unlock(&d->lock);
    t->failed = s;
    if (s) bm_trainer_close(t);
    else *out = t;
    return s;
}

void bm_trainer_close(bm_trainer *t) {
    if (!t) return;
    bm_backend *be = t->device->be;
    pthread_mutex_lock(&t->device->lock);
    if (t->aside) be->release(be, t->aside);
    bm_optim_close(&t->optim);
    bm_tally_close(t->tally);
    bm_expert_ranks_close(t->experts);
    bm_learner_close(t->learner);
    pthread_mutex_unlock(&t->device->lock);
    bm_metrics_close(t->metrics);
    bm_tokenizer_close(t->tokenizer);
    bm_batch_close(t->batch);
    if (t->comm) t->comm->close(t->comm, t->failed);
    bm_train_config_free(t->config);
    free(t->run);
    free(t);
}

int bm_trainer_rank(const bm_trainer *t) { return t->comm->rank; }

/* ---- a step -------------------------------------------------------------------------------------------------- */

/* The first micro-batch's gradient, for the noise scale. */
static bm_status note_small(bm_trainer *t, double targets, int M) {
    double square;
    BM_TRY(bm_optim_square(&t->optim, &square));
    const double share = targets / M;
    t->tally->sum[BM_TALLY_SMALL] = square * share * share;
    t->tally->sum[BM_TALLY_SMALL_TARGETS] = M;
    t->tally->sum[BM_TALLY_SMALL_COUNT] = 1;
    return BM_OK;
}

/* Whether this rank, or where experts are shared out any rank, has another micro-batch. */
static bm_status any_left(bm_trainer *t, bool mine, bool *any) {
    double n = mine;
    if (t->experts) BM_TRY(t->comm->sum(t->comm, &n, 1));
    *any = n > 0;
    return BM_OK;
}

/* The rank's part of the step's gradients, each micro-batch added to those before.  A rank that has no more keeps
 * computing its experts for the others, with micro-batches of no rows. */
static bm_status gradients(bm_trainer *t, double targets, int groups) {
    static const int32_t nothing[1];
    bm_learner *l = t->learner;
    bm_tally *y = t->tally;
    bm_batch *b = t->batch;
    bool left, began = false;
    l->be->zero(l->be, l->grad, l->arena.n * sizeof(float));
    bm_tally_zero(y);
    y->user = &t->optim;
    if (t->experts) l->pass.experts = bm_expert_ranks_door(t->experts);
    BM_TRY(any_left(t, b->next < b->end, &left));
    for (bool first = true; left; first = false) {
        bm_micro micro = { .start = nothing, .group = nothing };
        const bool mine = b->next < b->end;
        if (mine) BM_TRY(bm_batch_next(b, l, &micro));
        micro.balance = &t->config->balance;
        micro.scale = (float)(1 / targets);
        micro.loss_scale = (float)(1.0 / groups);
        began = b->next == b->end && !t->experts;
        y->ready = began ? bm_optim_ready : NULL;
        BM_TRY(bm_learner_step(l, &micro, true));
        if (t->experts) BM_TRY(bm_expert_ranks_status(t->experts));
        if (mine) BM_TRY(bm_tally_micro(y, &micro));
        if (first && mine && t->config->noise_scale && b->next < b->end) BM_TRY(note_small(t, targets, micro.M));
        BM_TRY(any_left(t, b->next < b->end, &left));
    }
    l->pass.experts = NULL;         /* an evaluation is each rank's own */
    for (int layer = t->config->model.n_layers - 1; !began && layer >= -1; layer--) bm_optim_ready(&t->optim, layer);
    return t->comm->sum(t->comm, y->sum, y->n);
}

/* The simple noise scale (arXiv 1812.06162, equations A.2 and A.3): squared norms of a small and of the whole batch's
 * gradient, each unbiased estimate averaged over steps. */
static double noise_scale(bm_trainer *t, double norm, double targets) {
    const double *sum = t->tally->sum, count = sum[BM_TALLY_SMALL_COUNT];
    if (count == 0 || !isfinite(norm)) return NAN;
    const double small = sum[BM_TALLY_SMALL] / count, whole = norm * norm;
    const double b = sum[BM_TALLY_SMALL_TARGETS] / count, keep = 0.95;
    t->at.signal = keep * t->at.signal + (1 - keep) * (targets * whole - b * small) / (targets - b);
    t->at.noise = keep * t->at.noise + (1 - keep) * (small - whole) / (1 / b - 1 / targets);
    return t->at.signal > 0 ? t->at.noise / t->at.signal : NAN;
}

/* Moves at.seconds on. */
static void tick(bm_trainer *t) {
    const double now = bm_now();
    t->at.seconds += now - t->clock;
    t->clock = now;
}

bm_metric_record bm_trainer_record(bm_trainer *t, bm_metric_kind kind) {
    bm_metric_record r = bm_metric_start(kind, t->at.step);
    r.tokens = t->at.tokens;
    r.flops = t->at.flops;
    r.seconds = t->at.seconds;
    return r;
}

static bm_status one_step(bm_trainer *t, bm_train_news *news, bm_optim_result *result) {
    const bm_train_config *c = t->config;
    const uint64_t step = t->at.step;
    measure_peak(t);
    const double lr = bm_schedule_lr(c, step), began = bm_now();
    const int sequences = bm_schedule_sequences(c, step), groups = sequences / (int)c->route_group;
    const double targets = (double)sequences * bm_schedule_length(c, step);
    bm_batch_begin(t->batch, t->comm, step);
    BM_TRY(gradients(t, targets, groups));
    BM_TRY(bm_optim_step(&t->optim, lr, (int64_t)t->at.updates + 1, t->tally->sum[BM_TALLY_LOSS], result));
    if (result->skipped && c->carry) {      /* a state that is not finite would never leave */
        bm_learner *l = t->learner;
        l->be->zero(l->be, l->pass.state, (size_t)l->opt.slots * l->pass.stride * sizeof(float));
        BM_TRY(l->be->sync(l->be));
    }
    const double spent = bm_now() - began, flops = flops_of(c, bm_schedule_length(c, step)) * targets;
    t->at.step++;
    t->at.updates += !result->skipped;
    t->at.tokens += (uint64_t)targets;
    t->at.flops += flops;
    tick(t);
    bm_metric_record r = bm_trainer_record(t, BM_METRIC_TRAIN);
    bm_tally_record(t->tally, &r);
    r.lr = lr;
    r.grad_norm = result->norm;
    r.tokens_s = targets / spent;
    r.peak_share = flops / spent / (t->peak * t->comm->size);
    r.skipped = result->skipped;
    if (result->skipped) r.not_finite = result->not_finite;
    if (c->noise_scale) r.noise_scale = noise_scale(t, result->norm, targets);
    *news = (bm_train_news){ .event = BM_TRAIN_STEP, .loss = r.loss, .lr = lr, .grad_norm = r.grad_norm,
                             .tokens_s = r.tokens_s, .peak_share = r.peak_share, .skipped = result->skipped,
                             .valid_loss = NAN, .bits_per_byte = NAN,
                             .not_finite = result->skipped ? result->not_finite : NULL };
    if (t->comm->rank == 0) bm_tally_warn(t->tally, t->at.step);
    return t->metrics ? bm_metrics_put(t->metrics, &r) : BM_OK;
}

/* ---- between steps ------------------------------------------------------------------------------------------- */

typedef struct teller { bm_train_fn fn; void *user; bool stop; } teller;

static void tell(bm_trainer *t, teller *to, bm_train_news *news, bm_train_event event) {
    const uint64_t steps = bm_schedule_steps(t->config), done = t->at.step - t->first_step;
    news->event = event;
    news->step = t->at.step;
    news->steps = steps;
    news->tokens = t->at.tokens;
    news->seconds = t->at.seconds;
    news->seconds_left = done ? (bm_now() - t->began) / (double)done * (double)(steps - t->at.step) : NAN;
    if (to->fn && !to->fn(to->user, news)) to->stop = true;
}

static bool due(int64_t every, uint64_t step) { return every && step % (uint64_t)every == 0; }

static bm_status save(bm_trainer *t, teller *to, bm_train_news *news) {
    if (!t->run) return BM_OK;
    tick(t);
    if (t->metrics) BM_TRY(bm_metrics_sync(t->metrics));
    pthread_mutex_lock(&t->device->lock);
    const bm_status s = bm_checkpoint_save(t);
    pthread_mutex_unlock(&t->device->lock);
    if (!s) tell(t, to, news, BM_TRAIN_SAVED);
    return s;
}

/* Evaluation, samples and checkpoint where they are due. */
static bm_status after_step(bm_trainer *t, teller *to, bm_train_news *news) {
    const bm_train_config *c = t->config;
    const uint64_t step = t->at.step;
    const bool last = step == bm_schedule_steps(c), look = last || due(c->evaluate_every, step);
    bool best = false;
    if (look) {
        BM_TRY(bm_trainer_evaluate(t, &news->valid_loss, &news->bits_per_byte));
        best = isfinite(news->valid_loss) && !(news->valid_loss >= t->at.best_loss);
        if (best) {
            t->at.best_loss = news->valid_loss;
            t->at.best_step = step;
        }
    }
    if (c->prompts.n && (last || (c->sample_every ? due(c->sample_every, step) : look))) BM_TRY(bm_trainer_sample(t));
    tick(t);
    if (look) tell(t, to, news, BM_TRAIN_EVALUATED);
    if (last || due(c->checkpoint_every, step) || (best && c->checkpoint_best)) return save(t, to, news);
    return BM_OK;
}

/* Whether some rank was asked to stop. */
static bm_status agree(bm_trainer *t, teller *to) {
    double stop = to->stop;
    BM_TRY(t->comm->sum(t->comm, &stop, 1));
    to->stop = stop > 0;
    return BM_OK;
}

static bm_status step_and_after(bm_trainer *t, teller *to) {
    bm_train_news news;
    bm_optim_result result;
    pthread_mutex_lock(&t->device->lock);
    const bm_status s = one_step(t, &news, &result);
    pthread_mutex_unlock(&t->device->lock);
    if (s) return s;
    if (result.skipped && t->comm->rank == 0)
        bm_log(0, "step %llu: %s is not finite, no update (loss %g)", (unsigned long long)t->at.step, result.not_finite,
               news.loss);
    tell(t, to, &news, BM_TRAIN_STEP);
    BM_TRY(agree(t, to));
    if (result.skipped && t->config->stop_on_nonfinite) {
        BM_TRY(save(t, to, &news));
        return bm_fail(BM_ECANCELLED, "step %llu: %s is not finite, and stop_on_nonfinite is set",
                       (unsigned long long)t->at.step, result.not_finite);
    }
    if (!to->stop) {
        BM_TRY(after_step(t, to, &news));
        BM_TRY(agree(t, to));
        if (!to->stop || t->at.step == bm_schedule_steps(t->config)) return BM_OK;
    }
    BM_TRY(save(t, to, &news));
    return bm_fail(BM_ECANCELLED, "stopped after step %llu", (unsigned long long)t->at.step);
}

bm_status bm_trainer_run(bm_trainer *t, bm_train_fn fn, void *user) {
    teller to = { fn, user, false };
    bm_status s = BM_OK;
    t->clock = t->began = bm_now();
    t->first_step = t->at.step;
    while (!s && t->at.step < bm_schedule_steps(t->config)) s = step_and_after(t, &to);
    if (!s && t->metrics) s = bm_metrics_sync(t->metrics);
    t->failed = s == BM_ECANCELLED ? BM_OK : s;
    return s;
}
