/* cmd_inspect.c - blackmamba inspect: what a model is and what it needs.  Room: app.
 *
 * In: a model folder or .gguf.  Out: configuration, counts, memory and, when asked, every tensor, as a
 * table or as JSON. */
#include "app.h"
#include <stdlib.h>
#include <string.h>

static struct { bool json, tensors; } o;

static const app_option options[] = {
    {0, "tensors", NULL, NULL, APP_FLAG, &o.tensors, 0, 0, NULL, "list every tensor"},
    APP_JSON(&o.json),
    {0},
};

static const char *activation_name(const bm_config *c) { return c->activation == BM_SILU ? "silu" : "gelu"; }
static const char *routing_name(const bm_config *c) { return c->routing == BM_ROUTE_SOFTMAX ? "softmax" : "sigmoid"; }
static const char *norm_name(const bm_config *c) { return c->final_norm == BM_LAYERNORM ? "layernorm" : "rmsnorm"; }
static const char *family_name(const bm_config *c) { return c->family == BM_MAMBA ? "mamba" : "blackmamba"; }
static const char *ffn_name(int ffn) { return ffn == BM_FFN_MOE ? "moe" : ffn == BM_FFN_DENSE ? "dense" : "none"; }

/* ---- the table ------------------------------------------------------------------------- */

static void row_count(const char *name, uint64_t n, const char *unit) {
    char text[32];
    app_format_count(text, n);
    printf("%-24s%s%s\n", name, text, unit);
}

static void row_bytes(const char *name, uint64_t n, const char *more) {
    char text[32];
    app_format_bytes(text, (double)n);
    printf("%-24s%s%s\n", name, text, more);
}

static bool layer_same(const bm_layer_config *a, const bm_layer_config *b) {
    return a->mixer == b->mixer && a->ffn == b->ffn && a->n_experts == b->n_experts && a->d_ff == b->d_ff;
}

/* "6 x mamba", "6 x moe of 8 experts, width 640": one row for each kind of layer. */
static void layers_print(const bm_config *c) {
    for (int i = 0; i < c->n_layers; i++) {
        const bm_layer_config *l = &c->layer[i];
        int n = 0, before = 0;
        for (int k = 0; k < c->n_layers; k++) {
            n += layer_same(&c->layer[k], l);
            before += k < i && layer_same(&c->layer[k], l);
        }
        if (before) continue;
        printf("%-24s%d x %s", "", n, l->mixer ? "mamba" : "");
        if (l->mixer && l->ffn) printf(" beside ");
        if (l->ffn == BM_FFN_MOE) printf("moe of %d experts, width %d", (int)l->n_experts, (int)l->d_ff);
        if (l->ffn == BM_FFN_DENSE) printf("dense, width %d", (int)l->d_ff);
        putchar('\n');
    }
}

static void config_print(const bm_config *c) {
    printf("%-24s%s\n", "family", family_name(c));
    printf("%-24s%d\n", "layers", (int)c->n_layers);
    layers_print(c);
    row_count("vocabulary", (uint64_t)c->n_vocab, "");
    printf("%-24smodel %d, inner %d, state %d, conv %d, dt rank %d\n", "sizes", (int)c->d_model, (int)c->d_inner,
           (int)c->d_state,
           (int)c->d_conv, (int)c->dt_rank);
    printf("%-24s%s%s%s\n", "feed-forward", activation_name(c),
           c->gated ? ", gated, routed by " : ", plain, routed by ",
           routing_name(c));
    printf("%-24s%s, eps %g\n", "final norm", norm_name(c), (double)c->norm_eps);
    printf("%-24sprojections %s, conv %s\n", "biases", c->bias ? "yes" : "no", c->conv_bias ? "yes" : "no");
    printf("%-24s%s\n", "head", c->tied_head ? "the embedding" : "its own");
    printf("%-24s%d tokens (nothing stops at it)\n", "trained length", (int)c->max_len);
}

static void info_print(const bm_info *i, uint64_t session) {
    putchar('\n');
    row_count("parameters", i->parameters, "");
    row_count("  one token uses", i->parameters_per_token, "");
    row_count("FLOPs per token", i->flops_per_token, "");
    row_count("tensors", i->tensors, "");
    row_bytes("weights", i->weight_bytes, "");
    row_bytes("  read for one token", i->weight_bytes_per_token, "");
    row_bytes("state of one text", i->state_bytes, ", whatever its length");
    row_bytes("memory needed", i->weight_bytes + session, " for weights, one text and working space");
}

static bm_status tensors_print(const bm_model *m, uint64_t n) {
    bm_tensor_info t;
    putchar('\n');
    for (uint64_t i = 0; i < n; i++) {
        bm_status s = bm_model_tensor(m, i, &t);
        if (s) return s;
        printf("%-6s", bm_dtype_name(t.type));
        int width = 0;
        for (int k = 0; k < t.n_dims; k++) width += printf("%s%lld", k ? " x " : "", (long long)t.dim[k]);
        printf("%*s%s\n", width < 24 ? 24 - width : 1, "", t.name);
    }
    return BM_OK;
}

/* ---- JSON ------------------------------------------------------------------------------ */

/* The shortest decimal that is this float, near enough: 1e-05, not 9.99999974738e-06. */
static json_t *real_json(float x) {
    char text[32];
    snprintf(text, sizeof text, "%.7g", (double)x);
    return app_json_real(strtod(text, NULL));
}

static json_t *config_json(const bm_config *c) {
    json_t *layers = json_array();
    for (int i = 0; layers && i < c->n_layers; i++) {
        const bm_layer_config *l = &c->layer[i];
        json_t *one = json_pack("{s:s, s:s, s:i, s:i}", "mixer", l->mixer ? "mamba" : "none", "ffn", ffn_name(l->ffn),
                                "n_experts",
                                (int)l->n_experts, "d_ff", (int)l->d_ff);
        if (json_array_append_new(layers, one)) json_decref(layers), layers = NULL;
    }
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:s, s:s, s:o, s:b, s:b, s:b, s:b, s:o}",
        "family", family_name(c), "n_layers", (int)c->n_layers, "n_vocab", (int)c->n_vocab, "d_model", (int)c->d_model,
        "d_inner", (int)c->d_inner, "d_state", (int)c->d_state, "d_conv", (int)c->d_conv, "dt_rank", (int)c->dt_rank,
        "max_len", (int)c->max_len, "activation", activation_name(c), "routing", routing_name(c), "final_norm",
            norm_name(c),
        "norm_eps", real_json(c->norm_eps), "gated", (int)c->gated, "bias", (int)c->bias, "conv_bias",
        (int)c->conv_bias, "tied_head", (int)c->tied_head, "layers", layers);
}

static json_t *tensors_json(const bm_model *m, uint64_t n) {
    json_t *all = json_array();
    bm_tensor_info t;
    for (uint64_t i = 0; all && i < n; i++) {
        json_t *shape = json_array();
        bool bad = bm_model_tensor(m, i, &t) != BM_OK;
        for (int k = 0; !bad && k < t.n_dims; k++) bad = json_array_append_new(shape, json_integer(t.dim[k]));
        json_t *one = bad ? NULL : json_pack("{s:s, s:s, s:O}", "name", t.name, "type", bm_dtype_name(t.type),
                                             "shape", shape);
        json_decref(shape);
        if (json_array_append_new(all, one)) json_decref(all), all = NULL;
    }
    return all;
}

static int print_json(const app_engine *e, const bm_info *i, uint64_t session) {
    json_t *object = json_pack("{s:s, s:s, s:o, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "path", e->path, "format",
        bm_model_format(e->model), "config", config_json(bm_model_config(e->model)), "parameters",
            (json_int_t)i->parameters,
        "parameters_per_token", (json_int_t)i->parameters_per_token, "flops_per_token", (json_int_t)i->flops_per_token,
        "weight_bytes", (json_int_t)i->weight_bytes, "weight_bytes_per_token", (json_int_t)i->weight_bytes_per_token,
        "state_bytes", (json_int_t)i->state_bytes, "memory_bytes", (json_int_t)(i->weight_bytes + session),
        "session_bytes", (json_int_t)session, "n_tensors", (json_int_t)i->tensors);
    if (object && o.tensors && json_object_set_new(object, "tensors", tensors_json(e->model, i->tensors)))
        json_decref(object), object = NULL;
    return app_print_json(object);
}

static int run(char **operand) {
    app_engine e = {0};
    bm_info info;
    uint64_t session;
    int code = app_engine_open(&e, operand[0], "cpu", 1);
    if (code) goto out;
    bm_model_info(e.model, &info);
    bm_status s = bm_session_bytes(e.model, NULL, &session);
    if (s) code = app_failed(s);
    else if (o.json) code = print_json(&e, &info, session);
    if (code || o.json) goto out;
    printf("%-24s%s, %s\n", "model", e.path, bm_model_format(e.model));
    config_print(bm_model_config(e.model));
    info_print(&info, session);
    s = o.tensors ? tensors_print(e.model, info.tensors) : BM_OK;
    if (s) code = app_failed(s);
out:
    app_engine_close(&e);
    return code;
}

const app_command app_inspect = {
    "inspect", "MODEL [--tensors] [--json]", "Tells what a model is and what it needs.", NULL, options, 1, run,
};
