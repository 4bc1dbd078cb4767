/* src/train/tally.c - what the micro-batches of a step add up to: losses, expert loads, sweeps.  Room: train.
 *
 * In: a learner after each micro-batch.  Out: sums to add over ranks, and the record of a step.  Routing is read
 * layer by layer while the backward runs: with recompute a layer's activations are gone afterwards. */
#include "train/train.h"
#include <math.h>
#include <stdlib.h>

enum { QUIET = 100 };                       /* steps between two warnings about a layer */

typedef struct bm_tally_layer {
    int layer, X;
    size_t at;                              /* of its loads in sum */
    int32_t *first, *sweeps; float *loss;   /* host: (k,X+1) (G) (G,2) */
    uint64_t *load, told;                   /* told: step of the last warning, plus one */
} tally_layer;

static bool has_experts(const bm_config *c, int l) { return c->layer[l].ffn == BM_FFN_MOE; }

static void read_layer(void *user, int layer) {
    bm_tally *t = user;
    bm_backend *be = t->l->be;
    const size_t G = (size_t)t->l->pass.G, k = (size_t)t->l->config->top_k;
    for (int i = 0; i < t->n_layers; i++) {
        tally_layer *a = &t->layer[i];
        if (a->layer != layer) continue;
        const bm_acts *acts = &t->l->pass.acts[layer];
        be->get(be, a->first, acts->first, k * ((size_t)a->X + 1) * sizeof *a->first);
        if (!t->l->pass.balance) continue;
        be->get(be, a->sweeps, acts->sweeps, G * sizeof *a->sweeps);
        be->get(be, a->loss, acts->loss, 2 * G * sizeof *a->loss);
    }
    if (t->ready) t->ready(t->user, layer);
}

static bm_status tally_init(bm_tally *t) {
    const bm_config *c = t->l->config;
    const size_t G = (size_t)t->l->opt.groups, k = (size_t)c->top_k;
    t->n = BM_TALLY_FIXED;
    BM_TRY(bm_alloc(&t->layer, (size_t)c->n_layers * sizeof *t->layer, "sums of a step"));
    BM_TRY(bm_alloc(&t->record, (size_t)c->n_layers * sizeof *t->record, "sums of a step"));
    for (int l = 0; l < c->n_layers; l++) {
        if (!has_experts(c, l)) continue;
        tally_layer *a = &t->layer[t->n_layers++];
        *a = (tally_layer){ .layer = l, .X = c->layer[l].n_experts, .at = t->n };
        t->n += (size_t)a->X + 1;
        BM_TRY(bm_alloc(&a->first, k * ((size_t)a->X + 1) * sizeof *a->first, "sums of a step"));
        BM_TRY(bm_alloc(&a->sweeps, G * sizeof *a->sweeps, "sums of a step"));
        BM_TRY(bm_alloc(&a->loss, 2 * G * sizeof *a->loss, "sums of a step"));
        BM_TRY(bm_alloc(&a->load, (size_t)a->X * sizeof *a->load, "sums of a step"));
    }
    BM_TRY(bm_alloc(&t->sum, t->n * sizeof *t->sum, "sums of a step"));
    return bm_alloc(&t->loss, (size_t)t->l->opt.rows * sizeof *t->loss, "sums of a step");
}

bm_status bm_tally_open(bm_tally **out, bm_learner *l) {
    bm_tally *t;
    *out = NULL;
    BM_TRY(bm_alloc(&t, sizeof *t, "sums of a step"));
    t->l = l;
    const bm_status s = tally_init(t);
    if (s) {
        bm_tally_close(t);
        return s;
    }
    l->back.ready = read_layer;
    l->back.user = t;
    *out = t;
    return BM_OK;
}

void bm_tally_close(bm_tally *t) {
    if (!t) return;
    for (int i = 0; i < t->n_layers; i++) {
        free(t->layer[i].first);
        free(t->layer[i].sweeps);
        free(t->layer[i].loss);
        free(t->layer[i].load);
    }
    free(t->layer);
    free(t->record);
    free(t->sum);
    free(t->loss);
    free(t);
}

void bm_tally_zero(bm_tally *t) {
    for (size_t i = 0; i < t->n; i++) t->sum[i] = 0;
}

static void add_layer(bm_tally *t, const tally_layer *a, int G) {
    const size_t X = (size_t)a->X;
    for (size_t j = 0; j < (size_t)t->l->config->top_k; j++)
        for (size_t e = 0; e < X; e++) t->sum[a->at + e] += a->first[j * (X + 1) + e + 1] - a->first[j * (X + 1) + e];
    if (!t->l->pass.balance) return;
    for (int g = 0; g < G; g++) {
        t->sum[a->at + X] += a->sweeps[g];
        t->sum[BM_TALLY_LOAD] += (double)a->loss[2 * g];
        t->sum[BM_TALLY_Z] += (double)a->loss[2 * g + 1];
    }
}

bm_status bm_tally_micro(bm_tally *t, const bm_micro *b) {
    bm_backend *be = t->l->be;
    be->get(be, t->loss, t->l->loss, (size_t)b->M * sizeof *t->loss);
    BM_TRY(be->sync(be));
    for (int i = 0; i < b->M; i++) {
        t->sum[BM_TALLY_LOSS] += (double)t->loss[i];
        t->sum[BM_TALLY_TARGETS] += b->target[i] >= 0;
    }
    t->sum[BM_TALLY_GROUPS] += b->G;
    for (int i = 0; i < t->n_layers; i++) add_layer(t, &t->layer[i], b->G);
    return BM_OK;
}

void bm_tally_record(bm_tally *t, bm_metric_record *r) {
    const double groups = t->sum[BM_TALLY_GROUPS];
    const bm_balance *b = t->l->pass.balance;
    r->loss = t->sum[BM_TALLY_LOSS] / t->sum[BM_TALLY_TARGETS];
    if (!t->n_layers) return;
    if (b && b->load > 0) r->load_loss = t->sum[BM_TALLY_LOAD] / groups;
    if (b && b->z > 0) r->z_loss = t->sum[BM_TALLY_Z] / groups;
    for (int i = 0; i < t->n_layers; i++) {
        tally_layer *a = &t->layer[i];
        for (int e = 0; e < a->X; e++) a->load[e] = (uint64_t)t->sum[a->at + (size_t)e];
        const bool sinkhorn = b && b->choice == BM_CHOOSE_SINKHORN;
        t->record[i] = (bm_metric_layer){ .layer = a->layer, .n_experts = a->X, .load = a->load,
                                          .sweeps = sinkhorn ? t->sum[a->at + (size_t)a->X] / groups : NAN };
    }
    r->layer = t->record;
    r->n_layers = t->n_layers;
}

/* After bm_tally_record. */
void bm_tally_warn(bm_tally *t, uint64_t step) {
    for (int i = 0; i < t->n_layers; i++) {
        tally_layer *a = &t->layer[i];
        const int dead = bm_metric_load_of(a->load, a->X).dead;
        if (!dead || (a->told && step + 1 < a->told + QUIET)) continue;
        a->told = step + 1;
        bm_log(0, "step %llu: layer %d: %d of %d experts got no token", (unsigned long long)step, a->layer, dead, a->X);
    }
}
