/* src/model/counts.c - parameters and operations by part: docs/MODEL.md, "Counting".  Room: model.
 * In: a configuration and the length of a sequence.  Out: one row for each part of a layer, or of what stands before
 * and behind the layers.  Parameters are those of the table of parameters; operations are formulas. */
#include "model/model.h"
#include <string.h>

typedef struct rows { bm_config_part *row; int n; } rows;

static bm_config_part *row_of(rows *r, const char *block, const char *name) {
    for (int i = 0; i < r->n; i++)
        if (!strcmp(r->row[i].block, block) && !strcmp(r->row[i].name, name)) return &r->row[i];
    r->row[r->n] = (bm_config_part){ .block = block, .name = name };
    return &r->row[r->n++];
}

static void add_flops(rows *r, const char *block, const char *name, uint64_t flops) {
    bm_config_part *p = row_of(r, block, name);
    p->flops += flops;
    p->flops_square += flops;
}

/* ---- operations of one token ------------------------------------------------------------------------------ */

static const char *block_of(const bm_layer_config *k, bool ffn) {
    if (ffn) return k->ffn == BM_FFN_MOE ? "moe" : "mlp";
    return k->mixer == BM_MIXER_ATTENTION ? "attention" : "mamba";
}

static void mamba_flops(rows *r, const bm_config *c) {
    const uint64_t D = (uint64_t)c->d_model, I = (uint64_t)c->d_inner;
    const uint64_t N = (uint64_t)c->d_state, R = (uint64_t)c->dt_rank;
    add_flops(r, "mamba", "in", 4 * I * D);
    add_flops(r, "mamba", "conv", 2 * I * (uint64_t)c->d_conv);
    add_flops(r, "mamba", "x", 2 * I * (R + 2 * N));
    add_flops(r, "mamba", "dt", 2 * I * R);
    add_flops(r, "mamba", "scan", I * (7 * N + 1));
    add_flops(r, "mamba", "out", 2 * I * D);
}

/* 2 h^2 (1 + 2 r) + 2 h^2 + 4 s h: of the last, causal work is half. */
static void attention_flops(rows *r, const bm_config *c, int64_t seq) {
    const uint64_t D = (uint64_t)c->d_model, shared = (uint64_t)c->n_kv_heads * (D / (uint64_t)c->n_heads);
    add_flops(r, "attention", "qkv", 2 * D * (D + 2 * shared));
    add_flops(r, "attention", "scores", 2 * D * (uint64_t)seq);
    row_of(r, "attention", "scores")->flops_square += 2 * D * (uint64_t)seq;
    add_flops(r, "attention", "out", 2 * D * D);
}

static void ffn_flops(rows *r, const bm_config *c, const bm_layer_config *k) {
    const uint64_t one = (c->gated ? 6u : 4u) * (uint64_t)c->d_model * (uint64_t)k->d_ff;
    if (k->ffn == BM_FFN_DENSE) add_flops(r, "mlp", "up, down", one);
    if (k->ffn != BM_FFN_MOE) return;
    add_flops(r, "moe", "router", 2 * (uint64_t)k->n_experts * (uint64_t)c->d_model);
    add_flops(r, "moe", "experts", one * (uint64_t)c->top_k);
}

/* Of one layer, or of the model when layer is -1. */
static void add_all_flops(rows *r, const bm_config *c, int layer, int64_t seq) {
    if (layer < 0) {
        add_flops(r, "model", "embedding", 0);
        add_flops(r, "model", "head", 2 * (uint64_t)c->d_model * (uint64_t)c->n_vocab);
        return;
    }
    const bm_layer_config *k = &c->layer[layer];
    if (k->mixer == BM_MIXER_MAMBA) mamba_flops(r, c);
    if (k->mixer == BM_MIXER_ATTENTION) attention_flops(r, c, seq);
    ffn_flops(r, c, k);
}

uint64_t bm_config_flops(const bm_config *c, int64_t seq) {
    bm_config_part part[BM_MOST_PARTS];
    uint64_t sum = 0;
    for (int l = -1; l < c->n_layers; l++) {
        rows r = { part, 0 };
        add_all_flops(&r, c, l, seq);
        for (int i = 0; i < r.n; i++) sum += part[i].flops;
    }
    return sum;
}

/* ---- parameters -------------------------------------------------------------------------------------------- */

static const char *part_of_model(const bm_param *p) {
    if (p->field == offsetof(bm_weights, embedding)) return "embedding";
    return p->field == offsetof(bm_weights, head) || p->field == offsetof(bm_weights, head_bias) ? "head" : "norm";
}

static const char *part_of_mixer(const bm_param *p, bool attention) {
#define IS(f) (p->field == offsetof(bm_layer, f))
    if (IS(in) || IS(in_bias)) return attention ? "qkv" : "in";
    if (IS(conv) || IS(conv_bias)) return "conv";
    if (IS(x)) return "x";
    if (IS(dt) || IS(dt_bias)) return "dt";
    if (IS(A) || IS(D)) return "scan";
    if (IS(out) || IS(out_bias)) return "out";
    return NULL;
}

static void add_parameters(rows *r, const bm_config *c, const bm_file_tensor *t) {
    const bm_param *p = t->first.param;
    const bm_layer_config *k = &c->layer[t->first.layer];
    const uint64_t one = (uint64_t)t->first.rows * (uint64_t)t->first.cols;
    const bool experts = p->flags & BM_P_EXPERT, moe = k->ffn == BM_FFN_MOE;
    const char *block = "model", *name = part_of_model(p);
    if (!bm_part_of_model(&t->first)) {
        name = part_of_mixer(p, k->mixer == BM_MIXER_ATTENTION);
        block = block_of(k, !name && !(IS(norm) && k->mixer));
        if (!name && (IS(norm) || IS(ffn_norm))) name = "norm";
        if (!name) name = !experts ? "router" : moe ? "experts" : "up, down";
    }
#undef IS
    bm_config_part *row = row_of(r, block, name);
    row->parameters += one * (uint64_t)t->n_parts;
    row->active += one * (experts && moe ? (uint64_t)c->top_k : 1);
}

int bm_config_parts(const bm_config *c, int layer, int64_t seq, bm_config_part out[BM_MOST_PARTS]) {
    rows r = { out, 0 };
    bm_file_tensor t;
    if (layer >= c->n_layers || layer < -1) return 0;
    add_all_flops(&r, c, layer, seq);
    for (bm_walk w = bm_params_walk(c, BM_LAYOUT_GGUF); bm_walk_next(&w, &t); )
        if (bm_part_of_model(&t.first) ? layer < 0 : t.first.layer == layer) add_parameters(&r, c, &t);
    return r.n;
}
