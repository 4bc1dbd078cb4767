/* src/train/optim.c - AdamW over the arena: regions and their owners, settings by name, clipping, skipping.
 * Room: train.
 *
 * In: gradients of this rank's share of a batch.  Out: masters moved on, the same on every rank.  A region of the
 * arena is summed over ranks as soon as it is complete, each rank updates the slice it owns, and all get all. */
#include "train/train.h"
#include <fnmatch.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct bm_setting { double lr, decay, beta1, beta2, eps; bool frozen; } setting;
/* Floats [at, at + n) of the arena, whose m, v and average begin at own. */
typedef struct bm_stretch { size_t at, n, own; uint16_t setting; } stretch;

/* ---- settings: by name of the tensor in a file ---------------------------------------------------------------- */

static bool matches(const bm_texts *t, const char *name, bool *used) {
    bool any = false;
    for (size_t i = 0; i < t->n; i++) {
        if (fnmatch(t->item[i], name, 0)) continue;
        any = used[i] = true;
    }
    return any;
}

static setting setting_for(const bm_train_config *c, const bm_param *p, const char *name, bool **used) {
    setting s = { .lr = 1, .decay = p->flags & BM_P_DECAY ? c->decay : 0, .beta1 = c->beta1, .beta2 = c->beta2,
                  .eps = c->eps };
    s.frozen = matches(&c->freeze, name, used[0]);
    for (size_t i = 0; i < c->n_rules; i++) {
        const bm_rule *r = &c->rule[i];
        if (!matches(&r->match, name, used[i + 1])) continue;
        s = (setting){ s.lr * r->lr, s.decay * r->decay, r->beta1, r->beta2, r->eps, s.frozen };
    }
    return s;
}

static size_t part_index(const bm_arena *a, size_t at) {
    size_t lo = 0, hi = a->n_parts;
    while (hi - lo > 1) {
        const size_t mid = (lo + hi) / 2;
        if (a->part[mid].at <= at) lo = mid;
        else hi = mid;
    }
    return lo;
}

/* The place of s among those there are, added if it is new; there are at most a few. */
static bm_status intern(bm_optim *o, size_t *n, size_t *cap, const setting *s, uint16_t *out) {
    size_t i = 0;
    for (; i < *n; i++) {
        const setting *t = &o->setting[i];
        if (t->lr == s->lr && t->decay == s->decay && t->beta1 == s->beta1 && t->beta2 == s->beta2 &&
            t->eps == s->eps && t->frozen == s->frozen) break;
    }
    if (i == *n) {
        if (i > UINT16_MAX)
            return bm_fail(BM_EARG, "optimizer.groups: found more than %d different settings", UINT16_MAX);
        BM_TRY(bm_grow(&o->setting, cap, i + 1, sizeof *o->setting, "an optimizer"));
        o->setting[(*n)++] = *s;
    }
    *out = (uint16_t)i;
    return BM_OK;
}

static bm_layout file_layout(const bm_optim *o) { return bm_layout_of(o->l->config, BM_FORMAT_SAFETENSORS); }

static bm_status set_all(bm_optim *o, bool **used) {
    const bm_arena *a = &o->l->arena;
    size_t n = 0, cap = 0;
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(o->l->config, file_layout(o)); bm_walk_next(&w, &t); )
        for (int i = 0; i < t.n_parts; i++) {
            const bm_part p = bm_file_tensor_part(&t, i);
            const setting s = setting_for(o->c, p.param, t.name, used);
            BM_TRY(intern(o, &n, &cap, &s, &o->setting_of[part_index(a, bm_arena_at(a, &p))]));
        }
    return BM_OK;
}

static bm_status all_used(const bm_optim *o, const bm_texts *t, const bool *used, const char *key) {
    const bool mamba = o->l->config->family == BM_MAMBA;
    const char *name = mamba ? "backbone.layers.0.mixer.in_proj.weight" : "decoder.layers.0.mixer.in_proj.weight";
    for (size_t i = 0; i < t->n; i++)
        if (!used[i])
            return bm_fail(BM_EARG, "%s: %s: found '%.80s', which no tensor's name matches; names are such as %s",
                           o->c->path, key, t->item[i], name);
    return BM_OK;
}

static bm_status settings_open(bm_optim *o) {
    const bm_train_config *c = o->c;
    const size_t lists = c->n_rules + 1;
    bool **used;
    bm_status s = bm_alloc(&used, lists * sizeof *used, "an optimizer");
    for (size_t i = 0; !s && i < lists; i++)
        s = bm_alloc(&used[i], (i ? c->rule[i - 1].match.n : c->freeze.n) + 1, "an optimizer");
    if (!s) s = bm_alloc(&o->setting_of, o->l->arena.n_parts * sizeof *o->setting_of, "an optimizer");
    if (!s) s = set_all(o, used);
    if (!s) s = all_used(o, &c->freeze, used[0], "freeze");
    for (size_t i = 0; !s && i < c->n_rules; i++) s = all_used(o, &c->rule[i].match, used[i + 1], "optimizer.groups");
    for (size_t i = 0; used && i < lists; i++) free(used[i]);
    free(used);
    return s;
}

/* ---- regions and slices -------------------------------------------------------------------------------------- */

int bm_optim_region_of(const bm_optim *o, const bm_part *p) {
    if (!bm_part_of_model(p)) return 1 + p->layer;
    return p->param->init == BM_INIT_EMBED ? 0 : o->n_regions - 1;
}

/* Slices are whole multiples of 16 floats, as tensors begin at; the last takes what is left. */
static bm_status regions_open(bm_optim *o) {
    const bm_arena *a = &o->l->arena;
    const size_t ranks = (size_t)o->comm->size, rank = (size_t)o->comm->rank;
    o->n_regions = o->l->config->n_layers + 2;
    BM_TRY(bm_alloc(&o->region, (size_t)o->n_regions * sizeof *o->region, "an optimizer"));
    size_t part = 0;
    for (int r = 0; r < o->n_regions; r++) {
        bm_region *g = &o->region[r];
        g->begin = part < a->n_parts ? a->part[part].at : a->n;
        while (part < a->n_parts && bm_optim_region_of(o, &a->part[part].part) == r) part++;
        const size_t n = (part < a->n_parts ? a->part[part].at : a->n) - g->begin;
        BM_TRY(bm_alloc(&g->cut, (ranks + 1) * sizeof *g->cut, "an optimizer"));
        for (size_t k = 0; k <= ranks; k++) g->cut[k] = k == ranks ? n : n / 16 * k / ranks * 16;
        g->own = o->n_own;
        o->n_own += g->cut[rank + 1] - g->cut[rank];
    }
    return BM_OK;
}

static bm_status add_stretch(bm_optim *o, size_t *cap, const stretch *s) {
    stretch *last = o->n_stretches ? &o->stretch[o->n_stretches - 1] : NULL;
    if (last && last->setting == s->setting && last->at + last->n == s->at && last->own + last->n == s->own) {
        last->n += s->n;
        return BM_OK;
    }
    BM_TRY(bm_grow(&o->stretch, cap, o->n_stretches + 1, sizeof *o->stretch, "an optimizer"));
    o->stretch[o->n_stretches++] = *s;
    return BM_OK;
}

/* A part's part of this rank's slice of its region, padding behind it included; n 0: nothing. */
static stretch cut(const bm_optim *o, size_t part) {
    const bm_arena *a = &o->l->arena;
    const bm_region *g = &o->region[bm_optim_region_of(o, &a->part[part].part)];
    const size_t begin = g->begin + g->cut[o->comm->rank], end = g->begin + g->cut[o->comm->rank + 1];
    size_t from = a->part[part].at, to = part + 1 < a->n_parts ? a->part[part + 1].at : a->n;
    if (from < begin) from = begin;
    if (to > end) to = end;
    if (from >= to) return (stretch){ 0 };
    return (stretch){ from, to - from, g->own + (from - begin), o->setting_of[part] };
}

static bm_status stretches_open(bm_optim *o) {
    const size_t n_parts = o->l->arena.n_parts;
    size_t cap = 0;
    for (size_t i = 0; i < n_parts; i++) {
        const stretch s = cut(o, i);
        if (s.n) BM_TRY(add_stretch(o, &cap, &s));
    }
    return bm_alloc(&o->sums, n_parts * sizeof *o->sums, "an optimizer");      /* a stretch holds a part at least */
}

/* ---- open, close --------------------------------------------------------------------------------------------- */

bm_status bm_optim_bytes(const bm_train_config *c, int ranks, uint64_t *out) {
    bm_arena a;
    BM_TRY(bm_arena_open(&a, &c->model));
    const uint64_t copies = c->average > 0 ? 3 : 2;
    *out = copies * sizeof(float) * a.n / (uint64_t)ranks + a.n_parts * sizeof(double);
    bm_arena_close(&a);
    return BM_OK;
}

static bm_status optim_init(bm_optim *o) {
    bm_backend *be = o->l->be;
    if (o->comm->size > 1 && !be->reads_host)
        return bm_fail(BM_ENOSUPPORT, "device %s: found %d ranks, expected one: its memory is not the host's", be->name,
                       o->comm->size);
    BM_TRY(settings_open(o));
    BM_TRY(regions_open(o));
    BM_TRY(stretches_open(o));
    const size_t bytes = (o->n_own ? o->n_own : 1) * sizeof(float);
    BM_TRY(be->alloc(be, &o->m, bytes, "an optimizer"));
    BM_TRY(be->alloc(be, &o->v, bytes, "an optimizer"));
    BM_TRY(be->alloc(be, &o->square, o->l->arena.n_parts * sizeof(double), "an optimizer"));
    if (o->c->average <= 0) return BM_OK;
    BM_TRY(be->alloc(be, &o->average, bytes, "an average of the weights"));
    for (int r = 0; r < o->n_regions; r++) {
        const bm_region *g = &o->region[r];
        const size_t at = g->cut[o->comm->rank], n = g->cut[o->comm->rank + 1] - at;
        be->copy(be, o->average + g->own, o->l->master + g->begin + at, n * sizeof(float));
    }
    return be->sync(be);
}

bm_status bm_optim_open(bm_optim *o, const bm_train_config *c, bm_learner *l, bm_comm *comm) {
    *o = (bm_optim){ .c = c, .l = l, .comm = comm };
    const bm_status s = optim_init(o);
    if (s) bm_optim_close(o);
    return s;
}

void bm_optim_close(bm_optim *o) {
    if (!o->l) return;
    bm_backend *be = o->l->be;
    if (o->m) be->release(be, o->m);
    if (o->v) be->release(be, o->v);
    if (o->average) be->release(be, o->average);
    if (o->square) be->release(be, o->square);
    for (int r = 0; o->region && r < o->n_regions; r++) free(o->region[r].cut);
    free(o->region);
    free(o->setting);
    free(o->setting_of);
    free(o->stretch);
    free(o->sums);
    memset(o, 0, sizeof *o);
}

/* ---- a step -------------------------------------------------------------------------------------------------- */

static void begin_sum(bm_optim *o, int r) {
    bm_region *g = &o->region[r];
    if (!o->failed) o->failed = o->comm->reduce_scatter(o->comm, o->l->grad + g->begin, g->cut, &g->request);
}

void bm_optim_ready(void *optim, int layer) {
    bm_optim *o = optim;
    if (layer >= 0) {
        begin_sum(o, 1 + layer);
        return;
    }
    begin_sum(o, o->n_regions - 1);
    begin_sum(o, 0);
}

static bm_status wait_all(bm_optim *o) {
    bm_status s = o->failed;
    for (int r = 0; r < o->n_regions; r++) {
        const bm_status one = o->comm->wait(o->comm, &o->region[r].request);
        if (!s) s = one;
    }
    o->failed = BM_OK;
    return s;
}

bm_status bm_optim_square(bm_optim *o, double *out) {
    const bm_arena *a = &o->l->arena;
    bm_backend *be = o->l->be;
    for (size_t i = 0; i < a->n_parts; i++) {
        const size_t end = i + 1 < a->n_parts ? a->part[i + 1].at : a->n;
        be->sumsq(be, o->square + i, o->l->grad + a->part[i].at, end - a->part[i].at);
    }
    be->get(be, o->sums, o->square, a->n_parts * sizeof *o->sums);
    BM_TRY(be->sync(be));
    *out = 0;
    for (size_t i = 0; i < a->n_parts; i++)
        if (!o->setting[o->setting_of[i]].frozen) *out += o->sums[i];
    return BM_OK;
}

/* Sum of squares of all gradients that count, over all ranks. */
static bm_status square(bm_optim *o, double *out) {
    bm_backend *be = o->l->be;
    *out = 0;
    for (size_t i = 0; i < o->n_stretches; i++)
        be->sumsq(be, o->square + i, o->l->grad + o->stretch[i].at, o->stretch[i].n);
    be->get(be, o->sums, o->square, o->n_stretches * sizeof *o->sums);
    BM_TRY(be->sync(be));
    for (size_t i = 0; i < o->n_stretches; i++)
        if (!o->setting[o->stretch[i].setting].frozen) *out += o->sums[i];
    return o->comm->sum(o->comm, out, 1);
}

/* The name a file has for the first tensor that some rank found bad; bad: by part. */
static void name_first(const bm_optim *o, const double *bad, char out[160]) {
    const bm_arena *a = &o->l->arena;
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(o->l->config, file_layout(o)); bm_walk_next(&w, &t); )
        for (int i = 0; i < t.n_parts; i++) {
            const bm_part p = bm_file_tensor_part(&t, i);
            if (bad[part_index(a, bm_arena_at(a, &p))] == 0) continue;
            snprintf(out, 160, "the gradient of %s", t.name);
            return;
        }
    snprintf(out, 160, "the loss");
}

static bm_status find_bad(bm_optim *o, char out[160]) {
    bm_backend *be = o->l->be;
    const size_t n = o->l->arena.n_parts;
    be->zero(be, o->square, n * sizeof *o->square);
    for (size_t i = 0; i < n; i++) {
        const stretch s = cut(o, i);
        if (s.n && !o->setting[s.setting].frozen) be->sumsq(be, o->square + i, o->l->grad + s.at, s.n);
    }
    be->get(be, o->sums, o->square, n * sizeof *o->sums);
    BM_TRY(be->sync(be));
    for (size_t i = 0; i < n; i++) o->sums[i] = !isfinite(o->sums[i]);
    BM_TRY(o->comm->sum(o->comm, o->sums, n));
    name_first(o, o->sums, out);
    return BM_OK;
}

static void update_all(bm_optim *o, double lr, int64_t update, double scale) {
    bm_backend *be = o->l->be;
    for (size_t i = 0; i < o->n_stretches; i++) {
        const stretch *s = &o->stretch[i];
        const setting *k = &o->setting[s->setting];
        if (k->frozen) continue;
        be->adamw(be, &(bm_op_adamw){ .n = s->n, .w = o->l->master + s->at, .m = o->m + s->own, .v = o->v + s->own,
                                      .g = o->l->grad + s->at, .lr = (float)(lr * k->lr), .beta1 = (float)k->beta1,
                                      .beta2 = (float)k->beta2, .eps = (float)k->eps, .decay = (float)k->decay,
                                      .scale = (float)scale, .step = update });
    }
    if (!o->average) return;
    /* young averages forget faster: the weights they began with are no model */
    const double young = (1.0 + (double)update) / (10.0 + (double)update), keep = fmin(o->c->average, young);
    for (size_t i = 0; i < o->n_stretches; i++) {
        const stretch *s = &o->stretch[i];
        be->blend(be, o->average + s->own, (float)keep, o->l->master + s->at, (float)(1 - keep), s->n);
    }
}

static bm_status gather(bm_optim *o, float *x) {
    for (int r = 0; r < o->n_regions; r++) {
        bm_region *g = &o->region[r];
        if (!o->failed) o->failed = o->comm->all_gather(o->comm, x + g->begin, g->cut, &g->request);
    }
    return wait_all(o);
}

bm_status bm_optim_step(bm_optim *o, double lr, int64_t update, double loss, bm_optim_result *out) {
    double sum;
    *out = (bm_optim_result){ .norm = NAN };
    BM_TRY(wait_all(o));
    BM_TRY(square(o, &sum));
    out->norm = sqrt(sum);
    out->skipped = !isfinite(sum) || !isfinite(loss);
    if (out->skipped) return find_bad(o, out->not_finite);
    update_all(o, lr, update, o->c->clip > 0 && out->norm > o->c->clip ? o->c->clip / out->norm : 1);
    BM_TRY(gather(o, o->l->master));
    bm_learner_refresh(o->l);
    return o->l->be->sync(o->l->be);
}

/* ---- checkpoints --------------------------------------------------------------------------------------------- */

static float *owned(const bm_optim *o, bm_state kind, int r) {
    const bm_region *g = &o->region[r];
    switch (kind) {
    case BM_STATE_M: return o->m + g->own;
    case BM_STATE_V: return o->v + g->own;
    case BM_STATE_AVERAGE: return o->average + g->own;
    default: return o->l->master + g->begin + g->cut[o->comm->rank];
    }
}

bm_status bm_optim_get(bm_optim *o, bm_state kind, int r, float *x) {
    bm_backend *be = o->l->be;
    bm_region *g = &o->region[r];
    const size_t at = g->cut[o->comm->rank], n = g->cut[o->comm->rank + 1] - at;
    be->get(be, x + at, owned(o, kind, r), n * sizeof *x);
    BM_TRY(be->sync(be));
    BM_TRY(o->comm->all_gather(o->comm, x, g->cut, &g->request));
    return o->comm->wait(o->comm, &g->request);
}

bm_status bm_optim_set(bm_optim *o, bm_state kind, int r, const float *x) {
    bm_backend *be = o->l->be;
    const bm_region *g = &o->region[r];
    const size_t at = g->cut[o->comm->rank], n = g->cut[o->comm->rank + 1] - at;
    if (kind == BM_STATE_MASTER) be->put(be, o->l->master + g->begin, x, g->cut[o->comm->size] * sizeof *x);
    else be->put(be, owned(o, kind, r), x + at, n * sizeof *x);
    return be->sync(be);
}
