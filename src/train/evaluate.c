/* src/train/evaluate.c - how good the weights are now: validation losses, sample texts.  Room: train.
 *
 * In: a trainer between two steps.  Out: records in its metrics.  Routing is the running rule: nothing is balanced and
 * nothing dropped. */
#include "train/train.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SAMPLE_ROWS = 64 };

/* ---- validation ----------------------------------------------------------------------------------------------- */

typedef struct sums { double loss, targets; } sums;

static bm_status add_micro(bm_trainer *t, const bm_micro *m, sums *to) {
    bm_learner *l = t->learner;
    float *loss = t->tally->loss;
    BM_TRY(bm_learner_step(l, m, false));
    l->be->get(l->be, loss, l->loss, (size_t)m->M * sizeof *loss);
    BM_TRY(l->be->sync(l->be));
    for (int i = 0; i < m->M; i++) to->loss += (double)loss[i];
    to->targets += m->M;
    return BM_OK;
}

/* Ranks take turns at windows; all get the sums. */
static bm_status one_source(bm_trainer *t, int source, sums *out) {
    const uint64_t limit = (uint64_t)t->config->evaluate_windows, size = (uint64_t)t->comm->size;
    const uint64_t of = bm_data_windows(t->batch->source[source], BM_SPLIT_VALID, (int)t->config->seq_len);
    const uint64_t n = limit && limit < of ? limit : of;
    bm_micro m;
    *out = (sums){ 0 };
    for (uint64_t w = (uint64_t)t->comm->rank; w < n; ) {
        BM_TRY(bm_batch_valid(t->batch, source, &w, size, n, of, &m));
        BM_TRY(add_micro(t, &m, out));
    }
    double both[2] = { out->loss, out->targets };
    BM_TRY(t->comm->sum(t->comm, both, 2));
    *out = (sums){ both[0], both[1] };
    return BM_OK;
}

/* Bits of a byte of text; where not all windows were read, their share of the bytes. */
static double bits_per_byte(const bm_trainer *t, int source, const sums *s) {
    const bm_data *d = t->batch->source[source];
    const double tokens = (double)bm_data_tokens(d, BM_SPLIT_VALID), bytes = (double)bm_data_bytes(d, BM_SPLIT_VALID);
    return s->loss / log(2) / (bytes * s->targets / (tokens - 1));
}

/* With the weights as they lie in the learner. */
static bm_status all_sources(bm_trainer *t, bool average, double *loss, double *bits) {
    bm_metric_source source[BM_MAX_SOURCES];
    double sum = 0, targets = 0, bytes = 0;
    int n = 0;
    *loss = *bits = NAN;
    for (int i = 0; i < (int)t->batch->n_sources; i++) {
        sums s;
        BM_TRY(one_source(t, i, &s));
        if (s.targets == 0) continue;
        const double b = bits_per_byte(t, i, &s);
        source[n++] = (bm_metric_source){ bm_data_name(t->batch->source[i]), s.loss / s.targets, b };
        sum += s.loss;
        targets += s.targets;
        bytes += s.loss / log(2) / b;
    }
    if (!n) return BM_OK;
    *loss = sum / targets;
    *bits = sum / log(2) / bytes;
    if (!t->metrics) return BM_OK;
    bm_metric_record r = bm_trainer_record(t, BM_METRIC_EVAL);
    r.loss = *loss;
    r.bits_per_byte = *bits;
    r.average = t->optim.average ? average : NAN;
    r.source = source;
    r.n_sources = n;
    return bm_metrics_put(t->metrics, &r);
}

/* Puts the average of the weights in place of the masters, or the masters back. */
static bm_status swap_in(bm_trainer *t) {
    bm_learner *l = t->learner;
    bm_optim *o = &t->optim;
    float *x;
    l->be->copy(l->be, t->aside, l->master, l->arena.n * sizeof(float));
    BM_TRY(l->be->sync(l->be));
    for (int r = 0; r < o->n_regions; r++) {
        const size_t from = o->region[r].begin, n = o->region[r].cut[t->comm->size];
        BM_TRY(bm_alloc(&x, n * sizeof *x, "an average of the weights"));
        bm_status s = bm_optim_get(o, BM_STATE_AVERAGE, r, x);
        l->be->put(l->be, l->master + from, x, n * sizeof *x);
        const bm_status put = l->be->sync(l->be);
        free(x);
        if (s || put) return s ? s : put;
    }
    bm_learner_refresh(l);
    return l->be->sync(l->be);
}

static bm_status swap_out(bm_trainer *t) {
    bm_learner *l = t->learner;
    l->be->copy(l->be, l->master, t->aside, l->arena.n * sizeof(float));
    bm_learner_refresh(l);
    return l->be->sync(l->be);
}

bm_status bm_trainer_evaluate(bm_trainer *t, double *loss, double *bits) {
    pthread_mutex_lock(&t->device->lock);
    bm_status s = all_sources(t, false, loss, bits);
    if (!s && t->optim.average) {
        s = swap_in(t);
        if (!s) s = all_sources(t, true, loss, bits);
        const bm_status back = swap_out(t);
        if (!s) s = back;
    }
    pthread_mutex_unlock(&t->device->lock);
    return s;
}

/* ---- samples ------------------------------------------------------------------------------------------------- */

typedef struct writing { char *text; size_t n, cap; } writing;

static bm_status take(writing *w, const bm_piece *p) {
    BM_TRY(bm_grow(&w->text, &w->cap, w->n + p->n + 1, 1, "a sample"));
    if (p->n) memcpy(w->text + w->n, p->text, p->n);
    w->n += p->n;
    return BM_OK;
}

static bm_status write_text(bm_stream *g, int64_t tokens, writing *w) {
    bm_piece p = { .finish = BM_FINISH_NONE };
    for (int64_t i = 0; i < tokens && p.finish == BM_FINISH_NONE; i++) {
        BM_TRY(bm_stream_next(g, false, &p, NULL, NULL));
        BM_TRY(take(w, &p));
    }
    BM_TRY(bm_stream_flush(g, &p));
    return take(w, &p);
}

static bm_status one_sample(bm_trainer *t, bm_session *s, size_t i) {
    const bm_train_config *c = t->config;
    const char *prompt = c->prompts.item[i];
    bm_sampling p = bm_sampling_default();
    bm_stream *g;
    writing w = { 0 };
    p.temperature = (float)c->sample_temperature;
    p.top_k = (int32_t)c->sample_top_k;
    p.top_p = (float)c->sample_top_p;
    p.seed = bm_rng_u64((uint64_t)c->seed_sample, i, t->at.step);
    BM_TRY(bm_stream_open(&g, s, 0, t->tokenizer, &p));
    bm_status st = bm_stream_add_text(g, prompt, strlen(prompt), bm_tokenizer_adds_bos(t->tokenizer));
    if (!st) st = write_text(g, c->sample_tokens, &w);
    if (!st && t->metrics) {
        bm_metric_record r = bm_trainer_record(t, BM_METRIC_SAMPLE);
        r.prompt = (bm_metric_text){ prompt, strlen(prompt) };
        r.text = (bm_metric_text){ w.text, w.n };
        st = bm_metrics_put(t->metrics, &r);
    }
    free(w.text);
    bm_stream_close(g);
    return st;
}

/* A session over the learner's weights, which nobody changes meanwhile. */
bm_status bm_trainer_sample(bm_trainer *t) {
    bm_session *s;
    if (t->comm->rank) return BM_OK;
    const bm_model m = { .config = t->config->model, .device = t->device, .be = t->device->be, .w = t->learner->w };
    const bm_session_options o = { .slots = 1, .chunk = SAMPLE_ROWS, .arith = t->learner->opt.arith };
    BM_TRY(bm_session_open(&s, &m, &o));
    bm_status st = BM_OK;
    for (size_t i = 0; !st && i < t->config->prompts.n; i++) st = one_sample(t, s, i);
    bm_session_close(s);
    return st;
}
