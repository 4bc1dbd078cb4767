/* src/model/config_file.c - configurations in files: config.json of both families, keys of a GGUF.
 * Room: model.  In: a source.  Out: a checked bm_config; and the other way. */
#include "model/model.h"
#include <stdlib.h>
#include <string.h>

enum { MAX = 1 << 30 };

static bm_status get_i32(const json_t *o, const char *path, const char *key, int32_t *out) {
    int64_t v;
    BM_TRY(bm_json_int(o, path, key, 0, MAX, &v));
    *out = (int32_t)v;
    return BM_OK;
}
static bm_status get_i32_or(const json_t *o, const char *path, const char *key, int32_t fallback, int32_t *out) {
    *out = fallback;
    return json_object_get(o, key) ? get_i32(o, path, key, out) : BM_OK;
}
static bm_status get_bool_or(const json_t *o, const char *path, const char *key, bool fallback, bool *out) {
    *out = fallback;
    return json_object_get(o, key) ? bm_json_bool(o, path, key, out) : BM_OK;
}
static bm_status get_eps(const json_t *o, const char *path, const char *key, float *out) {
    double v = 1e-5;
    if (json_object_get(o, key)) BM_TRY(bm_json_real(o, path, key, &v));
    *out = (float)v;
    return BM_OK;
}

/* Which of two words an optional string is. */
static bm_status choose(const char *path, const char *key, const char *word, const char *a, const char *b, int *out) {
    if (!strcmp(word, a)) *out = 0;
    else if (!strcmp(word, b)) *out = 1;
    else return bm_fail(BM_EFORMAT, "%s: %s: found '%.40s', expected %s or %s", path, key, word, a, b);
    return BM_OK;
}
static bm_status get_choice(const json_t *o, const char *path, const char *key, const char *a, const char *b, int *out) {
    const json_t *v = json_object_get(o, key);
    *out = 0;
    if (!v) return BM_OK;
    if (!json_is_string(v)) return bm_fail(BM_EFORMAT, "%s: %s: found something else, expected a string", path, key);
    return choose(path, key, json_string_value(v), a, b, out);
}

static const double ROPE_BASE = 10000;

/* Without feed-forward or attention layers their form means nothing: one value, so that equal models have equal
 * configurations. */
static void settle(bm_config *c) {
    bool ffn = false, attention = false;
    for (int l = 0; l < c->n_layers; l++) {
        ffn |= c->layer[l].ffn != BM_FFN_NONE;
        attention |= c->layer[l].mixer == BM_MIXER_ATTENTION;
    }
    if (!ffn) c->gated = true;
    if (!attention) c->n_heads = c->n_kv_heads = 0;
    if (!attention) c->rope_base = 0;
}

/* ---- config.json, released keys ------------------------------------------------------------------------ */

/* "r", "a", "1", "8", "r8", "42", "a32": Mamba, attention, dense MLP, n experts, or one of the first two beside one of
 * the others. */
static bm_status layer_code(bm_layer_config *k, const char *code, int32_t d_ff, int l, const char *path) {
    const char *p = code;
    *k = (bm_layer_config){ 0 };
    if (*p == 'r' || *p == 'a') k->mixer = *p++ == 'r' ? BM_MIXER_MAMBA : BM_MIXER_ATTENTION;
    const size_t digits = strspn(p, "0123456789");
    if (p[digits] || digits > 4 || (p == code && !digits) || *p == '0')
        return bm_fail(BM_EFORMAT, "%s: mamba_moe_layers[%d]: found '%.20s', expected r, a, a number of experts, or both (r8)", path,
                       l, code);
    if (!digits) return BM_OK;
    k->n_experts = atoi(p);
    k->ffn = k->n_experts == 1 ? BM_FFN_DENSE : BM_FFN_MOE;
    k->d_ff = d_ff;
    return BM_OK;
}

static bm_status layer_list(bm_config *c, const json_t *o, const char *path, int32_t d_ff) {
    const json_t *list = json_object_get(o, "mamba_moe_layers");
    if (c->n_layers > BM_MAX_LAYERS)
        return bm_fail(BM_EFORMAT, "%s: num_layers: found %d, expected at most %d", path, c->n_layers, BM_MAX_LAYERS);
    if (!list || json_is_null(list) || (json_is_string(list) && !json_string_length(list))) {
        for (int l = 0; l < c->n_layers; l++) c->layer[l] = (bm_layer_config){ .mixer = BM_MIXER_MAMBA };
        return BM_OK;
    }
    if (!json_is_array(list) || json_array_size(list) != (size_t)c->n_layers)
        return bm_fail(BM_EFORMAT, "%s: mamba_moe_layers: found %zu codes, expected a list of num_layers = %d", path,
                       json_array_size(list), c->n_layers);
    for (int l = 0; l < c->n_layers; l++) {
        const char *code = json_string_value(json_array_get(list, (size_t)l));
        if (!code) return bm_fail(BM_EFORMAT, "%s: mamba_moe_layers[%d]: found no string, expected a layer code", path, l);
        BM_TRY(layer_code(&c->layer[l], code, d_ff, l, path));
    }
    return BM_OK;
}

static bm_status from_released(bm_config *c, const json_t *o, const char *path) {
    int32_t expansion, d_ff = 0;
    int activation, routing;
    BM_TRY(get_i32(o, path, "num_layers", &c->n_layers));
    BM_TRY(get_i32(o, path, "hidden_size", &c->d_model));
    BM_TRY(get_i32(o, path, "state_size", &c->d_state));
    BM_TRY(get_i32(o, path, "conv_dimension", &c->d_conv));
    BM_TRY(get_i32(o, path, "vocab_size", &c->n_vocab));
    BM_TRY(get_i32(o, path, "expansion_factor", &expansion));
    BM_TRY(get_i32_or(o, path, "ffn_hidden_size", 0, &d_ff));
    BM_TRY(bm_json_bool(o, path, "add_bias_linear", &c->bias));
    BM_TRY(bm_json_bool(o, path, "swiglu", &c->gated));
    BM_TRY(get_i32_or(o, path, "max_sequence_length", 0, &c->max_len));
    BM_TRY(get_choice(o, path, "activation", "gelu", "silu", &activation));
    BM_TRY(get_choice(o, path, "routing", "sigmoid", "softmax", &routing));
    BM_TRY(get_eps(o, path, "layernorm_epsilon", &c->norm_eps));
    BM_TRY(get_i32_or(o, path, "dt_rank", (c->d_model + 15) / 16, &c->dt_rank));
    if ((int64_t)expansion * c->d_model > MAX)
        return bm_fail(BM_EFORMAT, "%s: expansion_factor: found %d, expected at most 16", path, expansion);
    c->d_inner = expansion * c->d_model;
    c->family = BM_BLACKMAMBA;
    c->activation = activation ? BM_SILU : BM_GELU;
    c->routing = routing ? BM_ROUTE_SOFTMAX : BM_ROUTE_SIGMOID;
    c->final_norm = BM_LAYERNORM;
    c->conv_bias = c->tied_head = true;
    BM_TRY(get_i32_or(o, path, "top_k", 1, &c->top_k));
    BM_TRY(get_i32_or(o, path, "num_attention_heads", 0, &c->n_heads));
    BM_TRY(get_i32_or(o, path, "num_key_value_heads", c->n_heads, &c->n_kv_heads));
    double base = ROPE_BASE;
    if (json_object_get(o, "rope_base")) BM_TRY(bm_json_real(o, path, "rope_base", &base));
    c->rope_base = (float)base;
    return layer_list(c, o, path, d_ff);
}

/* ---- config.json, Hugging Face mamba --------------------------------------------------------------------- */

static bm_status from_hf(bm_config *c, const json_t *o, const char *path) {
    const json_t *rank = json_object_get(o, "time_step_rank");
    BM_TRY(get_i32(o, path, "num_hidden_layers", &c->n_layers));
    BM_TRY(get_i32(o, path, "hidden_size", &c->d_model));
    BM_TRY(get_i32_or(o, path, "intermediate_size", 2 * c->d_model, &c->d_inner));
    BM_TRY(get_i32_or(o, path, "state_size", 16, &c->d_state));
    BM_TRY(get_i32_or(o, path, "conv_kernel", 4, &c->d_conv));
    BM_TRY(get_i32(o, path, "vocab_size", &c->n_vocab));
    c->top_k = 1;
    c->dt_rank = (c->d_model + 15) / 16;
    if (rank && !json_is_string(rank)) BM_TRY(get_i32(o, path, "time_step_rank", &c->dt_rank));
    else if (rank && strcmp(json_string_value(rank), "auto"))
        return bm_fail(BM_EFORMAT, "%s: time_step_rank: found '%.40s', expected a number or auto", path, json_string_value(rank));
    BM_TRY(get_eps(o, path, "layer_norm_epsilon", &c->norm_eps));
    BM_TRY(get_bool_or(o, path, "use_bias", false, &c->bias));
    BM_TRY(get_bool_or(o, path, "use_conv_bias", true, &c->conv_bias));
    BM_TRY(get_bool_or(o, path, "tie_word_embeddings", true, &c->tied_head));
    BM_TRY(get_i32_or(o, path, "max_sequence_length", 0, &c->max_len));
    int act;
    BM_TRY(get_choice(o, path, "hidden_act", "silu", "swish", &act));
    c->family = BM_MAMBA;
    c->activation = BM_SILU;
    c->final_norm = BM_RMSNORM;
    c->gated = true;
    for (int l = 0; l < c->n_layers && l < BM_MAX_LAYERS; l++) c->layer[l].mixer = BM_MIXER_MAMBA;
    return BM_OK;
}

bm_status bm_config_from_json(bm_config *c, const json_t *o, const char *path) {
    memset(c, 0, sizeof *c);
    if (!json_is_object(o)) return bm_fail(BM_EFORMAT, "%s: found no JSON object, expected one with the model's sizes", path);
    const json_t *type = json_object_get(o, "model_type");
    const char *word = json_is_string(type) ? json_string_value(type) : "";
    if (*word && strcmp(word, "mamba") && strcmp(word, "blackmamba"))
        return bm_fail(BM_ENOSUPPORT, "%s: model_type: found '%.40s', expected blackmamba or mamba", path, word);
    const bool hf = json_object_get(o, "num_hidden_layers") || !strcmp(word, "mamba");
    BM_TRY(hf ? from_hf(c, o, path) : from_released(c, o, path));
    BM_TRY(bm_config_check(c, path));
    settle(c);
    return BM_OK;
}

/* ---- any of them -------------------------------------------------------------------------------------------- */

static bm_status config_read(bm_config *out, const char *path, bool nested);

/* A configuration of training holds the model's under "model": an object, or a name to look under, once. */
static bm_status from_any_json(bm_config *out, const json_t *o, const char *path, bool nested) {
    const json_t *m = json_object_get(o, "model");
    if (!m) return bm_config_from_json(out, o, path);
    const char *name = json_string_value(m);
    if (name && nested)
        return bm_fail(BM_EFORMAT, "%s: model: found '%.200s' in a configuration that another one names, expected sizes", path, name);
    for (int i = 0; name && bm_config_preset_name(i); i++)
        if (!strcmp(name, bm_config_preset_name(i))) return bm_config_preset(out, name);
    if (name) return config_read(out, name, true);
    char *place = bm_strf("%s: model", path);
    if (!place) return BM_EMEMORY;
    const bm_status s = bm_config_from_json(out, m, place);
    free(place);
    return s;
}

static bm_status config_read_json(bm_config *out, const char *path, bool nested) {
    char *text;
    size_t n;
    json_t *o = NULL;
    BM_TRY(bm_file_read(path, 1 << 20, &text, &n));
    bm_status s = bm_json_parse(&o, text, n, path);
    if (!s) s = from_any_json(out, o, path, nested);
    json_decref(o);
    free(text);
    return s;
}

static bm_status config_read(bm_config *out, const char *path, bool nested) {
    if (bm_ends_with(path, ".gguf")) {
        bm_source *source;
        BM_TRY(bm_source_open(&source, path));
        const bm_status s = bm_config_of(out, source);
        bm_source_close(source);
        return s;
    }
    if (!bm_path_is_folder(path)) return config_read_json(out, path, nested);
    char *file = bm_strf("%s/config.json", path);
    if (!file) return BM_EMEMORY;
    const bm_status s = config_read_json(out, file, nested);
    free(file);
    return s;
}

bm_status bm_config_read(bm_config *out, const char *path) { return config_read(out, path, false); }

/* ---- keys of a GGUF ---------------------------------------------------------------------------------------- */

/* "blackmamba.block_count" */
static const char *key_of(char buf[80], const char *arch, const char *key) {
    snprintf(buf, 80, "%s.%s", arch, key);
    return buf;
}
static bm_status meta_i32(const bm_meta *m, const char *path, const char *arch, const char *key, int32_t *out) {
    char k[80];
    uint64_t v;
    BM_TRY(bm_meta_u64(m, key_of(k, arch, key), &v));
    if (v > MAX) return bm_fail(BM_EFORMAT, "%s: %s: found %llu, expected at most %d", path, k, (unsigned long long)v, MAX);
    *out = (int32_t)v;
    return BM_OK;
}
/* A number for all layers, or one per layer. */
static bm_status meta_layer(const bm_meta *m, const char *path, const char *arch, const char *key, int l, int n, int32_t *out) {
    char k[80];
    if (!bm_meta_is_array(m, key_of(k, arch, key))) return meta_i32(m, path, arch, key, out);
    size_t count;
    uint64_t v;
    BM_TRY(bm_meta_count(m, k, &count));
    if (count != (size_t)n) return bm_fail(BM_EFORMAT, "%s: %s: found %zu numbers, expected one per layer, %d", path, k, count, n);
    BM_TRY(bm_meta_item_u64(m, k, (size_t)l, &v));
    if (v > MAX) return bm_fail(BM_EFORMAT, "%s: %s[%d]: found %llu, expected at most %d", path, k, l, (unsigned long long)v, MAX);
    *out = (int32_t)v;
    return BM_OK;
}

static bool has_tensor(const bm_source *s, int l, const char *name) {
    char buf[64];
    snprintf(buf, sizeof buf, "blk.%d.%s", l, name);
    return bm_source_find(s, buf) != NULL;
}

static bm_status meta_word(const bm_meta *m, const char *path, const char *key, const char *a, const char *b, int *out) {
    const char *word;
    size_t n;
    char copy[41];
    *out = 0;
    if (!bm_meta_has(m, key)) return BM_OK;
    BM_TRY(bm_meta_text(m, key, &word, &n));
    snprintf(copy, sizeof copy, "%.*s", n < 40 ? (int)n : 40, word);
    return choose(path, key, copy, a, b, out);
}

static bm_status layers_from_meta(bm_config *c, const bm_source *s, const char *arch) {
    const bm_meta *m = bm_source_meta(s);
    const char *path = bm_source_path(s);
    if (c->n_layers > BM_MAX_LAYERS)
        return bm_fail(BM_EFORMAT, "%s: %s.block_count: found %d, expected at most %d", path, arch, c->n_layers, BM_MAX_LAYERS);
    c->gated = c->family == BM_MAMBA;
    c->bias = bm_source_find(s, "output.bias") != NULL;
    for (int l = 0; l < c->n_layers; l++) {
        bm_layer_config *k = &c->layer[l];
        c->bias |= has_tensor(s, l, "ssm_in.bias");
        c->conv_bias |= has_tensor(s, l, "ssm_conv1d.bias");
        c->bias |= has_tensor(s, l, "attn_qkv.bias");
        k->mixer = has_tensor(s, l, "ssm_in.weight") ? BM_MIXER_MAMBA : has_tensor(s, l, "attn_qkv.weight") ? BM_MIXER_ATTENTION : BM_MIXER_NONE;
        if (c->family == BM_MAMBA) continue;
        BM_TRY(meta_layer(m, path, arch, "feed_forward_length", l, c->n_layers, &k->d_ff));
        if (!k->d_ff) continue;
        BM_TRY(meta_layer(m, path, arch, "expert_count", l, c->n_layers, &k->n_experts));
        k->ffn = k->n_experts > 1 ? BM_FFN_MOE : BM_FFN_DENSE;
        k->n_experts += k->n_experts == 0;
        c->gated |= has_tensor(s, l, "ffn_gate_exps.weight") || has_tensor(s, l, "ffn_gate.weight");
    }
    return BM_OK;
}

static bm_status from_meta(bm_config *c, const bm_source *s) {
    const bm_meta *m = bm_source_meta(s);
    const char *path = bm_source_path(s), *name;
    size_t n;
    int activation, routing;
    double eps = 1e-5;
    char arch[16], key[80];
    memset(c, 0, sizeof *c);
    BM_TRY(bm_meta_text(m, "general.architecture", &name, &n));
    snprintf(arch, sizeof arch, "%.*s", n < 15 ? (int)n : 15, name);
    if (strcmp(arch, "blackmamba") && strcmp(arch, "mamba"))
        return bm_fail(BM_ENOSUPPORT, "%s: general.architecture: found '%s', expected blackmamba or mamba", path, arch);
    c->family = *arch == 'm' ? BM_MAMBA : BM_BLACKMAMBA;
    BM_TRY(meta_i32(m, path, arch, "block_count", &c->n_layers));
    BM_TRY(meta_i32(m, path, arch, "embedding_length", &c->d_model));
    BM_TRY(meta_i32(m, path, arch, "ssm.conv_kernel", &c->d_conv));
    BM_TRY(meta_i32(m, path, arch, "ssm.inner_size", &c->d_inner));
    BM_TRY(meta_i32(m, path, arch, "ssm.state_size", &c->d_state));
    BM_TRY(meta_i32(m, path, arch, "ssm.time_step_rank", &c->dt_rank));
    uint64_t used = 1;
    if (bm_meta_has(m, key_of(key, arch, "expert_used_count"))) BM_TRY(bm_meta_u64(m, key, &used));
    if (used > BM_MAX_EXPERTS)
        return bm_fail(BM_EFORMAT, "%s: %s: found %llu, expected at most %d", path, key, (unsigned long long)used, BM_MAX_EXPERTS);
    c->top_k = used ? (int32_t)used : 1;
    if (bm_meta_has(m, key_of(key, arch, "context_length"))) BM_TRY(meta_i32(m, path, arch, "context_length", &c->max_len));
    if (bm_meta_has(m, key_of(key, arch, "attention.layer_norm_rms_epsilon"))) BM_TRY(bm_meta_f64(m, key, &eps));
    BM_TRY(meta_word(m, path, "blackmamba.activation", "gelu", "silu", &activation));
    BM_TRY(meta_word(m, path, "blackmamba.routing", "sigmoid", "softmax", &routing));
    c->norm_eps = (float)eps;
    c->final_norm = c->family == BM_MAMBA ? BM_RMSNORM : BM_LAYERNORM;
    c->activation = c->family == BM_MAMBA || activation ? BM_SILU : BM_GELU;
    c->routing = routing ? BM_ROUTE_SOFTMAX : BM_ROUTE_SIGMOID;
    c->tied_head = !bm_source_find(s, "output.weight");
    double base = ROPE_BASE;
    if (bm_meta_has(m, key_of(key, arch, "attention.head_count"))) BM_TRY(meta_i32(m, path, arch, "attention.head_count", &c->n_heads));
    c->n_kv_heads = c->n_heads;
    if (bm_meta_has(m, key_of(key, arch, "attention.head_count_kv"))) BM_TRY(meta_i32(m, path, arch, "attention.head_count_kv", &c->n_kv_heads));
    if (bm_meta_has(m, key_of(key, arch, "rope.freq_base"))) BM_TRY(bm_meta_f64(m, key, &base));
    c->rope_base = (float)base;
    const bm_entry *e = bm_source_find(s, "token_embd.weight");
    if (!e || e->n_dims != 2 || e->dim[0] > MAX)
        return bm_fail(BM_EFORMAT, "%s: tensor 'token_embd.weight': found %s, expected a matrix (vocabulary, hidden size)", path,
                       e ? "another shape" : "none");
    c->n_vocab = (int32_t)e->dim[0];
    return layers_from_meta(c, s, arch);
}

bm_status bm_config_of(bm_config *out, const bm_source *s) {
    if (bm_source_config(s)) {
        char *path = bm_strf("%s/config.json", bm_source_path(s));
        if (!path) return BM_EMEMORY;
        const bm_status st = bm_config_from_json(out, bm_source_config(s), path);
        free(path);
        return st;
    }
    BM_TRY(from_meta(out, s));
    BM_TRY(bm_config_check(out, bm_source_path(s)));
    settle(out);
    return BM_OK;
}

/* ---- the other way ------------------------------------------------------------------------------------------- */

static void put(json_t *o, bool *ok, const char *key, json_t *value) { *ok &= !json_object_set_new(o, key, value); }

static bm_status json_layers(const bm_config *c, json_t *o, bool *ok, int32_t *d_ff) {
    json_t *list = json_array();
    bool dense = true;
    *d_ff = 0;
    for (int l = 0; l < c->n_layers; l++) {
        const bm_layer_config *k = &c->layer[l];
        const char *mixer = k->mixer == BM_MIXER_MAMBA ? "r" : k->mixer ? "a" : "";
        char code[16];
        if (k->ffn) snprintf(code, sizeof code, "%s%d", mixer, k->n_experts);
        else snprintf(code, sizeof code, "%s", mixer);
        *ok &= !json_array_append_new(list, json_string(code));
        dense &= k->ffn == BM_FFN_NONE && k->mixer == BM_MIXER_MAMBA;
        if (k->ffn && *d_ff && *d_ff != k->d_ff) {
            json_decref(list);
            return bm_fail(BM_ENOSUPPORT, "config.json has one ffn_hidden_size: found layers of %d and %d; write a .gguf instead",
                           *d_ff, k->d_ff);
        }
        if (k->ffn) *d_ff = k->d_ff;
    }
    if (dense) {
        json_decref(list);
        list = json_string("");
    }
    put(o, ok, "mamba_moe_layers", list);
    return BM_OK;
}

static bm_status released_json(const bm_config *c, json_t *o, bool *ok) {
    int32_t d_ff;
    if (!c->tied_head || !c->conv_bias)
        return bm_fail(BM_ENOSUPPORT, "a released folder has a convolution bias and the embedding as its head: found a model "
                       "without; write a .gguf instead");
    if (c->d_inner % c->d_model)
        return bm_fail(BM_ENOSUPPORT, "config.json needs an inner size that is a multiple of the hidden size: found %d and %d; "
                       "write a .gguf instead", c->d_inner, c->d_model);
    put(o, ok, "num_layers", json_integer(c->n_layers));
    put(o, ok, "hidden_size", json_integer(c->d_model));
    put(o, ok, "state_size", json_integer(c->d_state));
    put(o, ok, "conv_dimension", json_integer(c->d_conv));
    put(o, ok, "vocab_size", json_integer(c->n_vocab));
    put(o, ok, "expansion_factor", json_integer(c->d_inner / c->d_model));
    BM_TRY(json_layers(c, o, ok, &d_ff));
    put(o, ok, "ffn_hidden_size", json_integer(d_ff));
    put(o, ok, "add_bias_linear", json_boolean(c->bias));
    put(o, ok, "swiglu", json_boolean(c->gated));
    put(o, ok, "max_sequence_length", json_integer(c->max_len));
    if (c->activation != BM_GELU) put(o, ok, "activation", json_string("silu"));
    if (c->routing != BM_ROUTE_SIGMOID) put(o, ok, "routing", json_string("softmax"));
    if (c->top_k != 1) put(o, ok, "top_k", json_integer(c->top_k));
    if (c->n_heads) {
        put(o, ok, "num_attention_heads", json_integer(c->n_heads));
        put(o, ok, "num_key_value_heads", json_integer(c->n_kv_heads));
        put(o, ok, "rope_base", json_real((double)c->rope_base));
    }
    if (c->norm_eps != 1e-5f) put(o, ok, "layernorm_epsilon", json_real((double)c->norm_eps));
    if (c->dt_rank != (c->d_model + 15) / 16) put(o, ok, "dt_rank", json_integer(c->dt_rank));
    return BM_OK;
}

static void hf_json(const bm_config *c, json_t *o, bool *ok) {
    put(o, ok, "architectures", json_pack("[s]", "MambaForCausalLM"));
    put(o, ok, "model_type", json_string("mamba"));
    put(o, ok, "num_hidden_layers", json_integer(c->n_layers));
    put(o, ok, "hidden_size", json_integer(c->d_model));
    put(o, ok, "intermediate_size", json_integer(c->d_inner));
    put(o, ok, "state_size", json_integer(c->d_state));
    put(o, ok, "conv_kernel", json_integer(c->d_conv));
    put(o, ok, "time_step_rank", json_integer(c->dt_rank));
    put(o, ok, "layer_norm_epsilon", json_real((double)c->norm_eps));
    put(o, ok, "use_bias", json_boolean(c->bias));
    put(o, ok, "use_conv_bias", json_boolean(c->conv_bias));
    put(o, ok, "hidden_act", json_string("silu"));
    put(o, ok, "vocab_size", json_integer(c->n_vocab));
    put(o, ok, "tie_word_embeddings", json_boolean(c->tied_head));
    if (c->max_len) put(o, ok, "max_sequence_length", json_integer(c->max_len));
}

bm_status bm_config_to_json(const bm_config *c, json_t **out) {
    json_t *o = json_object();
    *out = NULL;
    if (!o) return bm_fail_memory(64, "config.json");
    bm_status s = BM_OK;
    bool ok = true;
    if (c->family == BM_MAMBA) hf_json(c, o, &ok);
    else s = released_json(c, o, &ok);
    if (!s && !ok) s = bm_fail_memory(64, "config.json");
    if (s) json_decref(o);
    else *out = o;
    return s;
}

static bm_status put_layers(bm_meta *m, const char *arch, const bm_config *c) {
    uint32_t ff[BM_MAX_LAYERS], experts[BM_MAX_LAYERS], most = 0, width = 0;
    char key[80];
    bool same = true;
    for (int l = 0; l < c->n_layers; l++) {
        ff[l] = (uint32_t)c->layer[l].d_ff;
        experts[l] = (uint32_t)c->layer[l].n_experts;
        if (!experts[l]) continue;
        same &= !most || experts[l] == most;
        most = experts[l] > most ? experts[l] : most;
        width = ff[l] > width ? ff[l] : width;
    }
    BM_TRY(bm_meta_put_u32s(m, key_of(key, arch, "feed_forward_length"), ff, (size_t)c->n_layers));
    if (same) BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "expert_count"), most));
    else BM_TRY(bm_meta_put_u32s(m, key_of(key, arch, "expert_count"), experts, (size_t)c->n_layers));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "expert_used_count"), most ? (uint32_t)c->top_k : 0));
    return bm_meta_put_u32(m, key_of(key, arch, "expert_feed_forward_length"), width);
}

bm_status bm_config_to_meta(const bm_config *c, bm_meta *m) {
    const char *arch = c->family == BM_MAMBA ? "mamba" : "blackmamba";
    char key[80];
    BM_TRY(bm_meta_put_text(m, "general.architecture", arch, strlen(arch)));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "block_count"), (uint32_t)c->n_layers));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "context_length"), (uint32_t)c->max_len));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "embedding_length"), (uint32_t)c->d_model));
    if (c->family == BM_MAMBA) BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "feed_forward_length"), 0));
    else BM_TRY(put_layers(m, arch, c));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "attention.head_count"), (uint32_t)c->n_heads));
    if (c->n_heads) {
        BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "attention.head_count_kv"), (uint32_t)c->n_kv_heads));
        BM_TRY(bm_meta_put_f32(m, key_of(key, arch, "rope.freq_base"), c->rope_base));
    }
    BM_TRY(bm_meta_put_f32(m, key_of(key, arch, "attention.layer_norm_rms_epsilon"), c->norm_eps));
    BM_TRY(bm_meta_put_f32(m, key_of(key, arch, "attention.layer_norm_epsilon"), c->norm_eps));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "ssm.conv_kernel"), (uint32_t)c->d_conv));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "ssm.inner_size"), (uint32_t)c->d_inner));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "ssm.state_size"), (uint32_t)c->d_state));
    BM_TRY(bm_meta_put_u32(m, key_of(key, arch, "ssm.time_step_rank"), (uint32_t)c->dt_rank));
    if (c->family == BM_MAMBA) return BM_OK;
    BM_TRY(bm_meta_put_text(m, "blackmamba.activation", c->activation == BM_SILU ? "silu" : "gelu", 4));
    return bm_meta_put_text(m, "blackmamba.routing", c->routing == BM_ROUTE_SOFTMAX ? "softmax" : "sigmoid", 7);
}
