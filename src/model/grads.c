/* src/model/grads.c - gradients of one batch in a file, to compare with other implementations.  Room: model.
 * In: a model and texts of one length.  Out: a safetensors file, train.loss and grad.<name>. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>

typedef struct job {
    bm_source *source;
    bm_config config;
    bm_learner *l;
    bm_token *token, *target;
    int32_t *start;
    bm_layout layout;
    float *grad;                /* host: the arena's */
    double loss;
} job;

/* rows texts of T + 1 tokens. */
static bm_status batch(job *j, const bm_token *tokens, int rows, int T) {
    const size_t M = (size_t)rows * (size_t)T;
    BM_TRY(bm_alloc(&j->token, M * sizeof *j->token, "a batch"));
    BM_TRY(bm_alloc(&j->target, M * sizeof *j->target, "a batch"));
    BM_TRY(bm_alloc(&j->start, ((size_t)rows + 1) * sizeof *j->start, "a batch"));
    for (int b = 0; b < rows; b++) {
        const bm_token *row = tokens + (size_t)b * ((size_t)T + 1);
        memcpy(j->token + (size_t)b * (size_t)T, row, (size_t)T * sizeof *row);
        memcpy(j->target + (size_t)b * (size_t)T, row + 1, (size_t)T * sizeof *row);
        j->start[b + 1] = (b + 1) * T;
    }
    return BM_OK;
}

static bm_status compute(job *j, bm_backend *be, int rows, int T) {
    const int M = rows * T;
    const int32_t group[2] = { 0, M };
    float *loss;
    BM_TRY(bm_learner_open(&j->l, &j->config, be, &(bm_learner_options){ .rows = M, .sequences = rows, .groups = 1, .arith = BM_ARITH_F32 }));
    const size_t bytes = j->l->arena.n * sizeof *j->grad;
    BM_TRY(bm_alloc(&j->grad, bytes, "gradients"));
    BM_TRY(bm_arena_load(&j->l->arena, j->grad, j->source));
    be->put(be, j->l->master, j->grad, bytes);
    bm_learner_refresh(j->l);
    BM_TRY(bm_learner_step(j->l, &(bm_micro){ .M = M, .Q = rows, .G = 1, .token = j->token, .target = j->target, .start = j->start,
                                              .group = group, .scale = 1.0f / (float)M }, true));
    be->get(be, j->grad, j->l->grad, bytes);
    BM_TRY(bm_alloc(&loss, (size_t)M * sizeof *loss, "losses"));
    be->get(be, loss, j->l->loss, (size_t)M * sizeof *loss);
    const bm_status s = be->sync(be);
    for (int i = 0; i < M; i++) j->loss += (double)loss[i] / M;
    free(loss);
    return s;
}

/* "grad." and the name a walk gives. */
typedef struct grad_name { char text[140]; } grad_name;

static bm_status declare(const job *j, bm_entry **list, grad_name **name, size_t *n) {
    bm_file_tensor t;
    size_t cap = 0, cap_name = 0;
    *n = 0;
    for (bm_walk w = bm_params_walk(&j->config, j->layout); bm_walk_next(&w, &t); ) ++*n;
    BM_TRY(bm_grow(list, &cap, *n + 1, sizeof **list, "a list of tensors"));
    BM_TRY(bm_grow(name, &cap_name, *n, sizeof **name, "a list of tensors"));
    (*list)[0] = (bm_entry){ .name = "train.loss", .type = BM_F32, .n_dims = 1, .dim = { 1 } };
    size_t i = 0;
    for (bm_walk w = bm_params_walk(&j->config, j->layout); bm_walk_next(&w, &t); i++) {
        snprintf((*name)[i].text, sizeof (*name)[i].text, "grad.%s", t.name);
        (*list)[i + 1] = (bm_entry){ .name = (*name)[i].text, .type = BM_F32, .n_dims = t.n_dims };
        memcpy((*list)[i + 1].dim, t.dim, sizeof t.dim);
    }
    ++*n;
    return BM_OK;
}

static bm_status write_tensors(const job *j, bm_sink *sink) {
    const float loss = (float)j->loss;
    bm_file_tensor t;
    BM_TRY(bm_sink_write(sink, &loss, sizeof loss));
    for (bm_walk w = bm_params_walk(&j->config, j->layout); bm_walk_next(&w, &t); ) {
        float *x;
        const size_t n = (size_t)t.n_parts * (size_t)t.first.rows * (size_t)t.first.cols;
        BM_TRY(bm_alloc(&x, n * sizeof *x, t.name));
        bm_arena_get(&j->l->arena, j->grad, 0, j->layout, &t, x);
        const bm_status s = bm_sink_write(sink, x, n * sizeof *x);
        free(x);
        BM_TRY(s);
    }
    return BM_OK;
}

static bm_status write_file(const job *j, const char *out) {
    bm_entry *list = NULL;
    grad_name *name = NULL;
    bm_sink *sink = NULL;
    size_t n;
    bm_status s = declare(j, &list, &name, &n);
    if (!s) s = bm_safetensors_create(&sink, out, list, n);
    if (!s) s = write_tensors(j, sink);
    if (!s) s = bm_sink_finish(&sink);
    if (sink) bm_sink_abort(&sink);
    free(list);
    free(name);
    return s;
}

static bm_status check(const job *j, const bm_token *tokens, size_t n, int rows) {
    if (rows < 1 || n % (size_t)rows || n / (size_t)rows < 2 || n > 1 << 24)
        return bm_fail(BM_EARG, "tokens: found %zu for %d rows, expected rows of one length, 2 or more", n, rows);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= j->config.n_vocab)
            return bm_fail(BM_EARG, "token %zu: found id %d, expected 0 to %d", i, (int)tokens[i], j->config.n_vocab - 1);
    return BM_OK;
}

bm_status bm_grads(bm_device *d, const char *model, const bm_token *tokens, size_t n, int rows, const char *out, double *loss) {
    job j = { 0 };
    pthread_mutex_lock(&d->lock);
    bm_status s = bm_source_open(&j.source, model);
    if (!s) s = bm_config_of(&j.config, j.source);
    if (!s) s = check(&j, tokens, n, rows);
    if (!s) j.layout = bm_layout_of(&j.config, bm_source_format(j.source));
    if (!s) s = batch(&j, tokens, rows, (int)(n / (size_t)rows) - 1);
    if (!s) s = compute(&j, d->be, rows, (int)(n / (size_t)rows) - 1);
    if (!s) s = write_file(&j, out);
    if (!s) *loss = j.loss;
    bm_learner_close(j.l);
    pthread_mutex_unlock(&d->lock);
    bm_source_close(j.source);
    free(j.token);
    free(j.target);
    free(j.start);
    free(j.grad);
    return s;
}
