/* src/model/params.c - the one list of parameters.  Room: model.
 *
 * Loader, converter, initialiser, counting and hash walk it; names and shapes stand nowhere else.
 * In: a configuration and a layout.  Out: the tensors a file of that layout holds, in order. */
#include "model/model.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DIM_1, DIM_V, DIM_D, DIM_I, DIM_2I, DIM_K, DIM_R, DIM_N, DIM_R2N, DIM_X, DIM_F, DIM_QKV };
/* Which blocks have it.  HEAD: untied; HEAD_BIAS, *_BIAS: with biases; GATE: gated. */
enum { MODEL, HEAD, HEAD_BIAS, FINAL_BIAS, BLOCK, PARALLEL, MAMBA, MAMBA_BIAS, CONV_BIAS, ATTENTION,
       ATTENTION_BIAS, MOE, EXPERT_GATE, EXPERT, EXPERT_GATE_BIAS,
       EXPERT_BIAS, DENSE_GATE, DENSE, DENSE_GATE_BIAS, DENSE_BIAS };

#define W(f) offsetof(bm_weights, f)
#define L(f) offsetof(bm_layer, f)
#define MATRIX (BM_P_MATRIX | BM_P_DECAY)
#define EXPERTS (MATRIX | BM_P_EXPERT)
#define PRE "decoder.layers.%l."
#define HF "backbone.layers.%l."
#define BLK "blk.%l."

/* released | GGUF | Hugging Face mamba; where, rows, cols, initialisation, flags, field */
static const bm_param table[] = {
    { { "embedding.word_embeddings.weight", "token_embd.weight", "backbone.embeddings.weight" },
      MODEL, DIM_V, DIM_D, BM_INIT_EMBED, MATRIX, W(embedding) },
    { { PRE "norm.weight", BLK "attn_norm.weight", HF "norm.weight" }, BLOCK, DIM_1, DIM_D, BM_INIT_ONE, 0, L(norm) },
    { { PRE "norm_moe.weight", BLK "ffn_norm.weight", NULL }, PARALLEL, DIM_1, DIM_D, BM_INIT_ONE, 0, L(ffn_norm) },

    { { PRE "mixer.in_proj.weight", BLK "ssm_in.weight", HF "mixer.in_proj.weight" },
      MAMBA, DIM_2I, DIM_D, BM_INIT_LINEAR, MATRIX, L(in) },
    { { PRE "mixer.in_proj.bias", BLK "ssm_in.bias", HF "mixer.in_proj.bias" },
      MAMBA_BIAS, DIM_1, DIM_2I, BM_INIT_ZERO, 0, L(in_bias) },
    { { PRE "mixer.conv1d.weight", BLK "ssm_conv1d.weight", HF "mixer.conv1d.weight" },
      MAMBA, DIM_I, DIM_K, BM_INIT_CONV, BM_P_TRANSPOSED | BM_P_CONV, L(conv) },
    { { PRE "mixer.conv1d.bias", BLK "ssm_conv1d.bias", HF "mixer.conv1d.bias" },
      CONV_BIAS, DIM_1, DIM_I, BM_INIT_CONV, 0, L(conv_bias) },
    { { PRE "mixer.x_proj.weight", BLK "ssm_x.weight", HF "mixer.x_proj.weight" },
      MAMBA, DIM_R2N, DIM_I, BM_INIT_LINEAR, MATRIX, L(x) },
    { { PRE "mixer.dt_proj.weight", BLK "ssm_dt.weight", HF "mixer.dt_proj.weight" },
      MAMBA, DIM_I, DIM_R, BM_INIT_DT_WEIGHT, MATRIX, L(dt) },
    { { PRE "mixer.dt_proj.bias", BLK "ssm_dt.bias", HF "mixer.dt_proj.bias" },
      MAMBA, DIM_1, DIM_I, BM_INIT_DT_BIAS, 0, L(dt_bias) },
    { { PRE "mixer.A_log", BLK "ssm_a", HF "mixer.A_log" },
      MAMBA, DIM_I, DIM_N, BM_INIT_ALOG, BM_P_ALOG | BM_P_TRANSPOSED, L(A) },
    { { PRE "mixer.D", BLK "ssm_d", HF "mixer.D" }, MAMBA, DIM_1, DIM_I, BM_INIT_ONE, 0, L(D) },
    { { PRE "mixer.out_proj.weight", BLK "ssm_out.weight", HF "mixer.out_proj.weight" },
      MAMBA, DIM_D, DIM_I, BM_INIT_OUT, MATRIX, L(out) },
    { { PRE "mixer.out_proj.bias", BLK "ssm_out.bias", HF "mixer.out_proj.bias" },
      MAMBA_BIAS, DIM_1, DIM_D, BM_INIT_ZERO, 0, L(out_bias) },

    { { PRE "mixer.qkv_proj.weight", BLK "attn_qkv.weight", NULL }, ATTENTION, DIM_QKV, DIM_D, BM_INIT_LINEAR, MATRIX, L(in) },
    { { PRE "mixer.qkv_proj.bias", BLK "attn_qkv.bias", NULL }, ATTENTION_BIAS, DIM_1, DIM_QKV, BM_INIT_ZERO, 0, L(in_bias) },
    { { PRE "mixer.o_proj.weight", BLK "attn_output.weight", NULL }, ATTENTION, DIM_D, DIM_D, BM_INIT_OUT, MATRIX, L(out) },
    { { PRE "mixer.o_proj.bias", BLK "attn_output.bias", NULL }, ATTENTION_BIAS, DIM_1, DIM_D, BM_INIT_ZERO, 0, L(out_bias) },

    { { PRE "%f.router.weight", BLK "ffn_gate_inp.weight", NULL }, MOE, DIM_X, DIM_D, BM_INIT_LINEAR, BM_P_TENSOR, L(router) },
    { { PRE "%f.router.bias", BLK "ffn_gate_inp.bias", NULL }, MOE, DIM_1, DIM_X, BM_INIT_ZERO, 0, L(router_bias) },
    { { PRE "%f.local_experts.%e.linear_fc1.weight", BLK "ffn_gate_exps.weight", NULL },
      EXPERT_GATE, DIM_F, DIM_D, BM_INIT_LINEAR, EXPERTS | BM_P_JOINED, L(gate) },
    { { PRE "%f.local_experts.%e.linear_fc1.weight", BLK "ffn_up_exps.weight", NULL },
      EXPERT, DIM_F, DIM_D, BM_INIT_LINEAR, EXPERTS, L(up) },
    { { PRE "%f.local_experts.%e.linear_fc1.bias", BLK "ffn_gate_exps.bias", NULL },
      EXPERT_GATE_BIAS, DIM_1, DIM_F, BM_INIT_ZERO, BM_P_EXPERT | BM_P_JOINED, L(gate_bias) },
    { { PRE "%f.local_experts.%e.linear_fc1.bias", BLK "ffn_up_exps.bias", NULL },
      EXPERT_BIAS, DIM_1, DIM_F, BM_INIT_ZERO, BM_P_EXPERT, L(up_bias) },
    { { PRE "%f.local_experts.%e.linear_fc2.weight", BLK "ffn_down_exps.weight", NULL },
      EXPERT, DIM_D, DIM_F, BM_INIT_LINEAR, EXPERTS, L(down) },
    { { PRE "%f.local_experts.%e.linear_fc2.bias", BLK "ffn_down_exps.bias", NULL },
      EXPERT_BIAS, DIM_1, DIM_D, BM_INIT_ZERO, BM_P_EXPERT, L(down_bias) },

    { { PRE "%f.linear_fc1.weight", BLK "ffn_gate.weight", NULL },
      DENSE_GATE, DIM_F, DIM_D, BM_INIT_LINEAR, EXPERTS | BM_P_JOINED, L(gate) },
    { { PRE "%f.linear_fc1.weight", BLK "ffn_up.weight", NULL }, DENSE, DIM_F, DIM_D, BM_INIT_LINEAR, EXPERTS, L(up) },
    { { PRE "%f.linear_fc1.bias", BLK "ffn_gate.bias", NULL },
      DENSE_GATE_BIAS, DIM_1, DIM_F, BM_INIT_ZERO, BM_P_EXPERT | BM_P_JOINED, L(gate_bias) },
    { { PRE "%f.linear_fc1.bias", BLK "ffn_up.bias", NULL }, DENSE_BIAS, DIM_1, DIM_F, BM_INIT_ZERO, BM_P_EXPERT, L(up_bias) },
    { { PRE "%f.linear_fc2.weight", BLK "ffn_down.weight", NULL }, DENSE, DIM_D, DIM_F, BM_INIT_LINEAR, EXPERTS, L(down) },
    { { PRE "%f.linear_fc2.bias", BLK "ffn_down.bias", NULL }, DENSE_BIAS, DIM_1, DIM_D, BM_INIT_ZERO, BM_P_EXPERT, L(down_bias) },

    { { "decoder.final_layernorm.weight", "output_norm.weight", "backbone.norm_f.weight" },
      MODEL, DIM_1, DIM_D, BM_INIT_ONE, 0, W(final_norm) },
    { { "decoder.final_layernorm.bias", "output_norm.bias", NULL },
      FINAL_BIAS, DIM_1, DIM_D, BM_INIT_ZERO, 0, W(final_norm_bias) },
    { { NULL, "output.weight", "lm_head.weight" }, HEAD, DIM_V, DIM_D, BM_INIT_LINEAR, MATRIX, W(head) },
    { { "output_layer.bias", "output.bias", NULL }, HEAD_BIAS, DIM_1, DIM_V, BM_INIT_ZERO, 0, W(head_bias) },
};
enum { ROWS = sizeof table / sizeof *table };

bm_layout bm_layout_of(const bm_config *c, bm_format f) {
    if (f == BM_FORMAT_GGUF) return BM_LAYOUT_GGUF;
    return c->family == BM_MAMBA ? BM_LAYOUT_HF : BM_LAYOUT_RELEASED;
}

static bool of_model(const bm_param *p) { return p->where <= FINAL_BIAS; }

uint64_t bm_part_number(const bm_part *p) {
    return ((uint64_t)(p->param - table) * BM_MAX_LAYERS + (uint64_t)p->layer) * BM_MAX_EXPERTS + (uint64_t)p->expert;
}

bool bm_part_of_model(const bm_part *p) { return of_model(p->param); }

static bool model_has(const bm_config *c, const bm_param *p) {
    switch (p->where) {
    case HEAD: return !c->tied_head;
    case HEAD_BIAS: return c->bias && c->family == BM_BLACKMAMBA;
    case FINAL_BIAS: return c->final_norm == BM_LAYERNORM;
    default: return true;
    }
}

static bool layer_has(const bm_config *c, int l, const bm_param *p) {
    const bm_layer_config *k = &c->layer[l];
    const bool mamba = k->mixer == BM_MIXER_MAMBA, attention = k->mixer == BM_MIXER_ATTENTION, moe = k->ffn == BM_FFN_MOE, dense = k->ffn == BM_FFN_DENSE;
    switch (p->where) {
    case BLOCK: return true;
    case PARALLEL: return bm_layer_parallel(k);
    case MAMBA: return mamba;
    case MAMBA_BIAS: return mamba && c->bias;
    case CONV_BIAS: return mamba && c->conv_bias;
    case ATTENTION: return attention;
    case ATTENTION_BIAS: return attention && c->bias;
    case MOE: return moe;
    case EXPERT: return moe;
    case EXPERT_BIAS: return moe && c->bias;
    case EXPERT_GATE: return moe && c->gated;
    case EXPERT_GATE_BIAS: return moe && c->gated && c->bias;
    case DENSE: return dense;
    case DENSE_BIAS: return dense && c->bias;
    case DENSE_GATE: return dense && c->gated;
    case DENSE_GATE_BIAS: return dense && c->gated && c->bias;
    default: return false;
    }
}

static int32_t dim_of(const bm_config *c, int l, int dim) {
    switch (dim) {
    case DIM_V: return c->n_vocab;
    case DIM_D: return c->d_model;
    case DIM_I: return c->d_inner;
    case DIM_2I: return 2 * c->d_inner;
    case DIM_K: return c->d_conv;
    case DIM_R: return c->dt_rank;
    case DIM_N: return c->d_state;
    case DIM_R2N: return c->dt_rank + 2 * c->d_state;
    case DIM_X: return c->layer[l].n_experts;
    case DIM_F: return c->layer[l].d_ff;
    case DIM_QKV: return c->d_model + 2 * c->n_kv_heads * (c->d_model / c->n_heads);
    default: return 1;
    }
}

static bm_part part_at(const bm_config *c, const bm_param *p, int l, int e) {
    return (bm_part){ p, l, e, dim_of(c, l, p->rows), dim_of(c, l, p->cols) };
}

static void expand(char out[128], const char *fmt, const bm_config *c, int l, int e) {
    size_t n = 0;
    for (; *fmt && n < 100; fmt++) {
        if (*fmt != '%') out[n++] = *fmt;
        else if (*++fmt == 'l') n += (size_t)sprintf(out + n, "%d", l);
        else if (*fmt == 'e') n += (size_t)sprintf(out + n, "%d", e);
        else n += (size_t)sprintf(out + n, "%s", bm_layer_parallel(&c->layer[l]) ? "moe" : "mixer");
    }
    out[n] = 0;
}

bm_part bm_file_tensor_part(const bm_file_tensor *t, int i) {
    bm_part p = t->first;
    if (t->joined) p.param += i;
    else p.expert += i;
    return p;
}

static void shape(bm_file_tensor *t, const bm_config *c, bm_layout layout, bool joined) {
    const bm_part *p = &t->first;
    const bool stacked = layout == BM_LAYOUT_GGUF && p->param->where != DENSE && p->param->where != DENSE_GATE &&
                         p->param->where != DENSE_BIAS && p->param->where != DENSE_GATE_BIAS && p->param->flags & BM_P_EXPERT;
    t->n_parts = stacked ? c->layer[p->layer].n_experts : joined ? 2 : 1;
    t->joined = joined;
    t->n_dims = 0;
    if (stacked) t->dim[t->n_dims++] = t->n_parts;
    if (p->param->rows != DIM_1) t->dim[t->n_dims++] = joined ? 2 * (int64_t)p->rows : p->rows;
    if (p->param->flags & BM_P_CONV && layout != BM_LAYOUT_GGUF) t->dim[t->n_dims++] = 1;
    t->dim[t->n_dims++] = joined && p->param->rows == DIM_1 ? 2 * (int64_t)p->cols : p->cols;
}

bm_walk bm_params_walk(const bm_config *c, bm_layout layout) { return (bm_walk){ c, layout, 0, 0, 0 }; }

/* Steps to the next (row, layer, expert): rows of the model once, rows of blocks layer by layer. */
static void advance(bm_walk *w, bool per_expert) {
    if (per_expert && ++w->expert < w->c->layer[w->layer].n_experts) return;
    w->expert = 0;
    const bool block = !of_model(&table[w->row]);
    w->row++;
    if (block && (w->row == ROWS || of_model(&table[w->row])) && ++w->layer < w->c->n_layers)
        while (w->row > 0 && !of_model(&table[w->row - 1])) w->row--;
}

/* Experts of released files: fc1 and fc2 of one expert follow each other only by name, so order is by row. */
bool bm_walk_next(bm_walk *w, bm_file_tensor *out) {
    while (w->row < ROWS) {
        const bm_param *p = &table[w->row];
        const bool block = !of_model(p), there = block ? layer_has(w->c, w->layer, p) : model_has(w->c, p);
        const bool released = w->layout != BM_LAYOUT_GGUF;
        const bool joined = released && p->flags & BM_P_JOINED;
        /* up, where gate was there, is the second half of the tensor already given */
        const bool second = released && there && w->row > 0 && p[-1].flags & BM_P_JOINED && layer_has(w->c, w->layer, p - 1);
        if (!there || second || !p->name[w->layout]) {
            advance(w, false);
            continue;
        }
        const int l = block ? w->layer : 0;
        out->first = part_at(w->c, p, l, w->expert);
        shape(out, w->c, w->layout, joined);
        expand(out->name, p->name[w->layout], w->c, l, w->expert);
        advance(w, released && p->flags & BM_P_EXPERT);
        return true;
    }
    return false;
}

/* ---- a source against the list ------------------------------------------------------------------ */

static void print_shape(char out[96], const int64_t *dim, int n) {
    int at = 0;
    for (int i = 0; i < n; i++) at += snprintf(out + at, (size_t)(96 - at), "%s%lld", i ? ", " : "", (long long)dim[i]);
}

/* Equal but for dimensions of 1: (I,1,K) and (I,K) hold the same bytes. */
static bool same_shape(const bm_file_tensor *t, const bm_entry *e) {
    int i = 0, j = 0;
    for (;;) {
        while (i < t->n_dims && t->dim[i] == 1) i++;
        while (j < e->n_dims && e->dim[j] == 1) j++;
        if (i == t->n_dims || j == e->n_dims) return i == t->n_dims && j == e->n_dims;
        if (t->dim[i++] != e->dim[j++]) return false;
    }
}

static bm_status match_one(const bm_source *s, const bm_file_tensor *t, const bm_entry **out) {
    const char *path = bm_source_path(s);
    const bm_entry *e = bm_source_find(s, t->name);
    if (!e) return bm_fail(BM_EFORMAT, "%s: tensor '%s' is missing, expected by the configuration", path, t->name);
    char want[96], found[96];
    print_shape(want, t->dim, t->n_dims);
    print_shape(found, e->dim, e->n_dims);
    if (!same_shape(t, e))
        return bm_fail(BM_ESHAPE, "%s: tensor '%s' has shape (%s), the configuration says (%s)", path, t->name, found, want);
    if (bm_dtype_blocked(e->type) && !(t->first.param->flags & BM_P_MATRIX))
        return bm_fail(BM_EFORMAT, "%s: tensor '%s' is %s, expected f32, bf16 or f16: only matrices may be quantized", path,
                       t->name, bm_dtype_name(e->type));
    if ((size_t)t->first.cols % bm_dtype_block(e->type))
        return bm_fail(BM_EFORMAT, "%s: tensor '%s' is %s with rows of %d, expected a multiple of %zu", path, t->name,
                       bm_dtype_name(e->type), (int)t->first.cols, bm_dtype_block(e->type));
    *out = e;
    return BM_OK;
}

static int by_address(const void *a, const void *b) {
    const uintptr_t x = (uintptr_t)*(const bm_entry *const *)a, y = (uintptr_t)*(const bm_entry *const *)b;
    return x < y ? -1 : x > y;
}

/* Names a tensor of the file that no row of the list asked for. */
static bm_status nothing_left(const bm_config *c, const bm_source *s, const bm_entry *const *used, size_t n) {
    const bm_entry **sorted;
    BM_TRY(bm_alloc(&sorted, n * sizeof *sorted, "a list of tensors"));
    memcpy(sorted, used, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, by_address);
    bm_status status = BM_OK;
    for (size_t i = 0; !status && i < bm_source_count(s); i++) {
        const bm_entry *e = bm_source_entry(s, i);
        if (bsearch(&e, sorted, n, sizeof *sorted, by_address)) continue;
        if (c->tied_head && c->family == BM_MAMBA && !strcmp(e->name, "lm_head.weight")) continue;   /* the embedding again */
        status = bm_fail(BM_EFORMAT, "%s: tensor '%s' is not part of the configured model (%d layers)", bm_source_path(s),
                         e->name, c->n_layers);
    }
    free(sorted);
    return status;
}

bm_status bm_params_match(const bm_config *c, const bm_source *s, const bm_entry ***entry, size_t *n) {
    *entry = NULL;
    const bm_layout layout = bm_layout_of(c, bm_source_format(s));
    const bm_entry **list = NULL;
    size_t cap = 0, count = 0;
    bm_status status = BM_OK;
    bm_file_tensor t;
    for (bm_walk w = bm_params_walk(c, layout); !status && bm_walk_next(&w, &t); count++) {
        status = bm_grow(&list, &cap, count + 1, sizeof *list, "a list of tensors");
        if (!status) status = match_one(s, &t, &list[count]);
    }
    if (!status) status = nothing_left(c, s, list, count);
    if (status) {
        free(list);
        return status;
    }
    *entry = list;
    *n = count;
    return BM_OK;
}

/* ---- A ---------------------------------------------------------------------------------------------- */

float bm_A_from_log(float A_log) { return (float)-exp((double)A_log); }

/* -exp loses up to a unit in the last place, so several A_log can stand behind one A.  The 16-bit
 * one is what a 16-bit checkpoint held; else the nearest float that gives A back. */
float bm_A_to_log(float A) {
    const double x = log(-(double)A);
    const float b = bm_bf16_f32(bm_f32_bf16((float)x)), h = bm_f16_f32(bm_f32_f16((float)x)), f = (float)x;
    if (bm_A_from_log(b) == A) return b;
    if (bm_A_from_log(h) == A) return h;
    if (bm_A_from_log(f) == A) return f;
    const float up = nextafterf(f, INFINITY), down = nextafterf(f, -INFINITY);
    if (bm_A_from_log(up) == A) return up;
    return bm_A_from_log(down) == A ? down : f;
}
