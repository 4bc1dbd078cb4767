/* src/train/train_config.c - the configuration of a run: JSON into values, every key known and in range.
 * Room: train.
 *
 * In: JSON, and overrides "optimizer.lr=3e-4".  Out: bm_train_config, and the same JSON with its defaults filled
 * in.  One table says what there is; docs/TRAINING.md says what it means. */
#include "train/train.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef bm_train_config config;

/* ---- the table -------------------------------------------------------------------------------------------- */

typedef enum kind { INT, REAL, BOOL, CHOICE, LIST, OTHER } kind;
typedef struct row {
    const char *key;            /* dotted */
    kind kind;                  /* int64_t, double, bool, int, bm_texts; OTHER: read by a function below */
    size_t at;
    double min, max, standard;  /* CHOICE: standard is the place of the word */
    const char *words;          /* of CHOICE, separated by | */
} row;

#define AT(f) offsetof(config, f)
#define MANY 1e15
static const row table[] = {
    { "model", OTHER, 0, 0, 0, 0, NULL },
    { "freeze", LIST, AT(freeze), 0, 0, 0, NULL },
    { "data.sources", OTHER, 0, 0, 0, 0, NULL },
    { "data.seq_len", INT, AT(seq_len), 1, 1 << 20, 512, NULL },
    { "steps", INT, AT(steps), 0, MANY, 0, NULL },
    { "tokens", INT, AT(tokens), 0, MANY, 0, NULL },
    { "batch.sequences", INT, AT(batch.sequences), 1, 1 << 20, 8, NULL },
    { "batch.micro", INT, AT(batch.micro), 0, 1 << 20, 0, NULL },
    { "batch.warmup", INT, AT(batch.warmup), 0, 1e6, 0, NULL },
    { "batch.from", INT, AT(batch.from), 0, 1 << 20, 0, NULL },
    { "batch.seq_len_warmup", INT, AT(batch.len_warmup), 0, 1e6, 0, NULL },
    { "batch.seq_len_from", INT, AT(batch.len_from), 0, 1 << 20, 0, NULL },
    { "routing.choice", CHOICE, AT(routing.choice), 0, 0, 0, "auto|best|sinkhorn" },
    { "routing.start", CHOICE, AT(routing.start), 0, 0, 1, "vanilla|paper" },
    { "routing.stop", CHOICE, AT(routing.stop), 0, 0, 0, "absolute|relative|fixed" },
    { "routing.tol", REAL, AT(routing.tol), 0, 1e6, 1e-4, NULL },
    { "routing.sweeps", INT, AT(routing.sweeps), 1, 10000, 100, NULL },
    { "routing.scale", REAL, AT(routing.scale), 0, 1000, 2, NULL },
    { "routing.capacity", REAL, AT(routing.capacity), 0, 1e6, 0, NULL },
    { "routing.load", REAL, AT(routing.load), 0, 1e6, 0, NULL },
    { "routing.z", REAL, AT(routing.z), 0, 1e6, 0, NULL },
    { "routing.route_group", INT, AT(route_group), 1, 1 << 20, 1, NULL },
    { "optimizer.lr", REAL, AT(lr), 0, 100, 1e-3, NULL },
    { "optimizer.beta1", REAL, AT(beta1), 0, 0.99999999, 0.9, NULL },
    { "optimizer.beta2", REAL, AT(beta2), 0, 0.99999999, 0.95, NULL },
    { "optimizer.eps", REAL, AT(eps), 0, 1, 1e-8, NULL },
    { "optimizer.decay", REAL, AT(decay), 0, 100, 0.1, NULL },
    { "optimizer.clip", REAL, AT(clip), 0, 1e9, 1, NULL },
    { "optimizer.groups", OTHER, 0, 0, 0, 0, NULL },
    { "optimizer.schedule", CHOICE, AT(curve), 0, 0, 0, "cosine|linear|constant|wsd" },
    { "optimizer.warmup", INT, AT(warmup), 0, MANY, 100, NULL },
    { "optimizer.min_lr", REAL, AT(min_lr), 0, 1, 0.1, NULL },
    { "optimizer.wsd_share", REAL, AT(wsd_share), 0, 1, 0.2, NULL },
    { "precision", CHOICE, AT(precision), 0, 0, 0, "f32|bf16" },
    { "expert_ranks", BOOL, AT(expert_ranks), 0, 0, 0, NULL },
    { "recompute", BOOL, AT(recompute), 0, 0, 0, NULL },
    { "carry", BOOL, AT(carry), 0, 0, 0, NULL },
    { "average", REAL, AT(average), 0, 0.99999999, 0, NULL },
    { "noise_scale", BOOL, AT(noise_scale), 0, 0, 0, NULL },
    { "stop_on_nonfinite", BOOL, AT(stop_on_nonfinite), 0, 0, 0, NULL },
    { "seeds.init", INT, AT(seed_init), 0, 9e15, 0, NULL },
    { "seeds.data", INT, AT(seed_data), 0, 9e15, 0, NULL },
    { "seeds.sample", INT, AT(seed_sample), 0, 9e15, 0, NULL },
    { "evaluate.every", INT, AT(evaluate_every), 0, MANY, 100, NULL },
    { "evaluate.windows", INT, AT(evaluate_windows), 0, MANY, 0, NULL },
    { "samples.prompts", LIST, AT(prompts), 0, 0, 0, NULL },
    { "samples.every", INT, AT(sample_every), 0, MANY, 0, NULL },
    { "samples.tokens", INT, AT(sample_tokens), 1, 1 << 20, 64, NULL },
    { "samples.temperature", REAL, AT(sample_temperature), 0, 100, 0.8, NULL },
    { "samples.top_k", INT, AT(sample_top_k), 0, 1 << 22, 0, NULL },
    { "samples.top_p", REAL, AT(sample_top_p), 0, 1, 0.95, NULL },
    { "checkpoint.every", INT, AT(checkpoint_every), 0, MANY, 1000, NULL },
    { "checkpoint.keep", INT, AT(checkpoint_keep), 1, 1 << 20, 3, NULL },
    { "checkpoint.best", BOOL, AT(checkpoint_best), 0, 0, 1, NULL },
    { NULL, OTHER, 0, 0, 0, 0, NULL },
};
static const char *const source_keys[] = { "path", "weight", NULL };
static const char *const group_keys[] = { "match", "lr", "decay", "beta1", "beta2", "eps", NULL };
static const char *const model_keys[] = {
    "model_type", "num_layers", "hidden_size", "state_size", "conv_dimension", "vocab_size", "expansion_factor",
    "mamba_moe_layers", "ffn_hidden_size", "add_bias_linear", "swiglu", "max_sequence_length", "activation", "routing",
    "layernorm_epsilon", "dt_rank", "num_attention_heads", "num_key_value_heads", "rope_base", "top_k", "architectures",
    "num_hidden_layers", "intermediate_size", "conv_kernel", "time_step_rank", "layer_norm_epsilon", "use_bias",
    "use_conv_bias", "tie_word_embeddings", "hidden_act", NULL,
};

/* ---- sentences ---------------------------------------------------------------------------------------------- */

/* A value as a sentence shows it. */
typedef struct shown { char s[48]; } shown;
static shown show(const json_t *v) {
    shown out;
    char *text = v ? json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII) : NULL;
    snprintf(out.s, sizeof out.s, "%.40s%s", text ? text : "nothing", text && strlen(text) > 40 ? "..." : "");
    free(text);
    return out;
}

/* Levenshtein distance, letters changed, added or taken away; 99 for words of more than 31. */
static int distance(const char *a, const char *b) {
    int row_[32];
    const size_t n = strlen(b);
    if (strlen(a) > 31 || n > 31) return 99;
    for (size_t j = 0; j <= n; j++) row_[j] = (int)j;
    for (size_t i = 0; a[i]; i++) {
        int corner = row_[0];
        row_[0] = (int)i + 1;
        for (size_t j = 0; j < n; j++) {
            const int change = corner + (a[i] != b[j]), drop = row_[j + 1] + 1, add = row_[j] + 1;
            corner = row_[j + 1];
            row_[j + 1] = change < drop ? change : drop;
            if (add < row_[j + 1]) row_[j + 1] = add;
        }
    }
    return row_[n];
}

static const char *last_word(const char *key) {
    const char *dot = strrchr(key, '.');
    return dot ? dot + 1 : key;
}

/* How far `word`, as somebody wrote it, is from a key: its whole path or its last word. */
static int away(const char *word, const char *key) {
    const int whole = distance(word, key), last = distance(last_word(word), last_word(key)) + (strcmp(word, key) != 0);
    return whole < last ? whole : last;
}

static bm_status unknown(const char *path, const char *prefix, const char *word, const char *near) {
    return bm_fail(BM_EFORMAT, "%s: %s%.60s: no such key; the nearest is %s", path, prefix, word, near);
}

/* BM_OK when word is one of the keys. */
static bm_status among(const char *path, const char *prefix, const char *word, const char *const *keys) {
    const char *near = keys[0];
    for (int i = 0; keys[i]; i++) {
        if (!strcmp(word, keys[i])) return BM_OK;
        if (distance(word, keys[i]) < distance(word, near)) near = keys[i];
    }
    return unknown(path, prefix, word, near);
}

static bm_status all_among(const char *path, const char *prefix, json_t *o, const char *const *keys) {
    const char *key;
    json_t *v;
    json_object_foreach(o, key, v) BM_TRY(among(path, prefix, key, keys));
    return BM_OK;
}

static const row *find(const char *key) {
    for (const row *r = table; r->key; r++)
        if (!strcmp(r->key, key)) return r;
    return NULL;
}
/* A section: some key begins with it and a dot. */
static bool is_section(const char *word) {
    const size_t n = strlen(word);
    for (const row *r = table; r->key; r++)
        if (!strncmp(r->key, word, n) && r->key[n] == '.') return true;
    return false;
}
static bm_status known(const char *path, const char *key) {
    const char *near = table->key;
    char section[64];
    int least = 99;
    if (find(key) || is_section(key) || !strncmp(key, "model.", 6)) return BM_OK;
    for (const row *r = table; r->key; r++) {
        if (away(key, r->key) >= least) continue;
        near = r->key;
        least = away(key, near);
    }
    for (const row *r = table; r->key && !strchr(key, '.'); r++) {
        const int n = (int)strcspn(r->key, ".");
        char word[64];
        snprintf(word, sizeof word, "%.*s", n, r->key);
        if (distance(key, word) >= least) continue;
        memcpy(section, word, sizeof word);
        near = section;
        least = distance(key, word);
    }
    return unknown(path, "", key, near);
}

/* Every key of the whole object is one of the table. */
static bm_status all_known(const char *path, json_t *root) {
    const char *section, *key;
    char name[128];
    json_t *v, *w;
    json_object_foreach(root, section, v) {
        if (!is_section(section)) {
            BM_TRY(known(path, section));
            continue;
        }
        if (!json_is_object(v))
            return bm_fail(BM_EFORMAT, "%s: %s: found %s, expected an object", path, section, show(v).s);
        json_object_foreach(v, key, w) {
            snprintf(name, sizeof name, "%s.%.90s", section, key);
            BM_TRY(known(path, name));
        }
    }
    return BM_OK;
}

/* ---- members by dotted path ------------------------------------------------------------------------------------ */

static json_t *member(const json_t *root, const char *key) {
    const char *dot = strchr(key, '.');
    char section[64];
    if (!dot) return json_object_get(root, key);
    snprintf(section, sizeof section, "%.*s", (int)(dot - key < 60 ? dot - key : 60), key);
    return json_object_get(json_object_get(root, section), dot + 1);
}

/* Takes value's reference. */
static bm_status put_member(json_t *root, const char *key, json_t *value) {
    const char *dot = strchr(key, '.');
    char section[64];
    if (!dot) return json_object_set_new(root, key, value) ? bm_fail_memory(64, "a configuration") : BM_OK;
    snprintf(section, sizeof section, "%.*s", (int)(dot - key < 60 ? dot - key : 60), key);
    json_t *o = json_object_get(root, section);
    if (!o && json_object_set_new(root, section, o = json_object())) o = NULL;
    return json_object_set_new(o, dot + 1, value) ? bm_fail_memory(64, "a configuration") : BM_OK;
}

/* JSON, or a text when it is none. */
static bm_status read_override(const char *key, const char *value, json_t **out) {
    json_t *o = NULL;
    char *text = bm_strf("{\"v\": %s}", value);
    *out = NULL;
    if (!text) return BM_EMEMORY;
    const bm_status s = bm_json_parse(&o, text, strlen(text), "--set");
    free(text);
    if (s == BM_EMEMORY) return s;
    if (!s && json_object_size(o) == 1) *out = json_incref(json_object_get(o, "v"));
    else *out = json_string(value);
    json_decref(o);
    return *out ? BM_OK : bm_fail(BM_EARG, "--set: %s: found a value that is not UTF-8, expected JSON or a text", key);
}

/* "key=value" into root. */
static bm_status override(json_t *root, const char *set) {
    const char *equals = strchr(set, '=');
    char key[128];
    if (!equals || equals == set || equals - set > 100)
        return bm_fail(BM_EARG, "--set: found '%.60s', expected key=value, such as optimizer.lr=3e-4", set);
    snprintf(key, sizeof key, "%.*s", (int)(equals - set), set);
    BM_TRY(known("--set", key));
    const char *dot = strchr(key, '.');
    const json_t *model = json_object_get(root, "model");
    if (dot && model && !strncmp(key, "model.", 6) && !json_is_object(model))
        return bm_fail(BM_EARG, "--set: %s: the configuration names a model by its path, whose sizes are what they are",
                       key);
    if (dot && strncmp(key, "model.", 6)) {
        char section[64];
        snprintf(section, sizeof section, "%.*s", (int)(dot - key < 60 ? dot - key : 60), key);
        json_t *o = json_object_get(root, section);
        if (o && !json_is_object(o)) return BM_OK;              /* all_known() says so */
    }
    json_t *value;
    BM_TRY(read_override(key, equals + 1, &value));
    return put_member(root, key, value);
}

/* ---- values of the table --------------------------------------------------------------------------------------- */

static json_t *standard_value(const row *r) {
    char word[32];
    const char *w = r->words;
    switch (r->kind) {
    case INT: return json_integer((json_int_t)r->standard);
    case REAL: return json_real(r->standard);
    case BOOL: return json_boolean(r->standard != 0);
    case CHOICE:
        for (int i = 0; i < (int)r->standard; i++) w = strchr(w, '|') + 1;
        snprintf(word, sizeof word, "%.*s", (int)strcspn(w, "|"), w);
        return json_string(word);
    default: return json_array();
    }
}

static bm_status read_texts(const char *path, const char *key, const json_t *v, bm_texts *out) {
    size_t i;
    json_t *t;
    if (!json_is_array(v))
        return bm_fail(BM_EFORMAT, "%s: %s: found %s, expected a list of texts", path, key, show(v).s);
    BM_TRY(bm_alloc(&out->item, (json_array_size(v) + 1) * sizeof *out->item, "a configuration"));
    json_array_foreach((json_t *)v, i, t) {
        if (!json_is_string(t) || !json_string_length(t))
            return bm_fail(BM_EFORMAT, "%s: %s[%zu]: found %s, expected a text", path, key, i, show(t).s);
        out->item[i] = bm_strndup(json_string_value(t), json_string_length(t));
        if (!out->item[i]) return BM_EMEMORY;
        out->n = i + 1;
    }
    return BM_OK;
}

static bm_status read_word(const char *path, const row *r, const json_t *v, int *out) {
    const char *w = r->words, *s = json_is_string(v) ? json_string_value(v) : "";
    for (int i = 0; w; i++) {
        const size_t n = strcspn(w, "|");
        if (strlen(s) == n && !memcmp(s, w, n)) {
            *out = i;
            return BM_OK;
        }
        w = w[n] ? w + n + 1 : NULL;
    }
    return bm_fail(BM_EFORMAT, "%s: %s: found %s, expected one of %s", path, r->key, show(v).s, r->words);
}

static bm_status read_number(const char *path, const char *key, const json_t *v, double min, double max, bool whole,
                             double *out) {
    const double x = json_number_value(v);
    const char *what = whole ? "a whole number" : "a number";
    if ((whole ? !json_is_integer(v) : !json_is_number(v)) || !(x >= min && x <= max))
        return bm_fail(BM_EFORMAT, "%s: %s: found %s, expected %s from %.10g to %.10g", path, key, show(v).s, what, min,
                       max);
    *out = x;
    return BM_OK;
}

static bm_status read_value(config *c, const char *path, const row *r, const json_t *v) {
    char *at = (char *)c + r->at;
    double x = 0;
    switch (r->kind) {
    case INT:
        BM_TRY(read_number(path, r->key, v, r->min, r->max, true, &x));
        *(int64_t *)at = (int64_t)json_integer_value(v);
        return BM_OK;
    case REAL:
        BM_TRY(read_number(path, r->key, v, r->min, r->max, false, &x));
        *(double *)at = x;
        return BM_OK;
    case BOOL:
        if (!json_is_boolean(v))
            return bm_fail(BM_EFORMAT, "%s: %s: found %s, expected true or false", path, r->key, show(v).s);
        *(bool *)at = json_is_true(v);
        return BM_OK;
    case CHOICE: return read_word(path, r, v, (int *)at);
    case LIST: return read_texts(path, r->key, v, (bm_texts *)at);
    default: return BM_OK;
    }
}

/* ---- what is no single value ------------------------------------------------------------------------------------- */

static bm_status read_sources(config *c, const char *path) {
    const json_t *list = member(c->json, "data.sources");
    const size_t n = json_array_size(list);
    char at[48];
    if (json_is_string(list))
        return bm_fail(BM_EFORMAT, "%s: data.sources: found %s, expected a list such as [{\"path\": %s}]", path,
                       show(list).s, show(list).s);
    if (!n || n > BM_MAX_SOURCES)
        return bm_fail(BM_EFORMAT, "%s: data.sources: found %s, expected a list of 1 to %d {\"path\": FOLDER, "
                       "\"weight\": W}", path, show(list).s, BM_MAX_SOURCES);
    BM_TRY(bm_alloc(&c->data, n * sizeof *c->data, "a configuration"));
    for (size_t i = 0; i < n; i++) {
        json_t *o = json_array_get(list, i), *name = json_object_get(o, "path"), *weight = json_object_get(o, "weight");
        snprintf(at, sizeof at, "data.sources[%zu].", i);
        BM_TRY(all_among(path, at, o, source_keys));
        if (!json_is_string(name) || !json_string_length(name))
            return bm_fail(BM_EFORMAT, "%s: %spath: found %s, expected a folder of packed data", path, at,
                           show(name).s);
        strcat(at, "weight");
        if (weight) BM_TRY(read_number(path, at, weight, 1e-9, 1e9, false, &c->data[i].weight));
        if (!(c->data[i].path = bm_strndup(json_string_value(name), json_string_length(name)))) return BM_EMEMORY;
        c->n_data = i + 1;
        if (!c->data[i].weight != !c->data[0].weight)
            return bm_fail(BM_EFORMAT, "%s: data.sources: found weights of some, expected weights of all, or of none: "
                           "by tokens", path);
    }
    return BM_OK;
}

static bm_status read_group(config *c, const char *path, size_t i, json_t *o) {
    bm_rule *g = &c->rule[i];
    const struct { const char *key; double *to, standard, max; } number[] = {
        { "lr", &g->lr, 1, 1e6 }, { "decay", &g->decay, 1, 1e6 }, { "beta1", &g->beta1, c->beta1, 0.99999999 },
        { "beta2", &g->beta2, c->beta2, 0.99999999 }, { "eps", &g->eps, c->eps, 1 },
    };
    char at[64];
    snprintf(at, sizeof at, "optimizer.groups[%zu].", i);
    if (!json_is_object(o))
        return bm_fail(BM_EFORMAT, "%s: optimizer.groups[%zu]: found %s, expected an object", path, i, show(o).s);
    BM_TRY(all_among(path, at, o, group_keys));
    for (size_t k = 0; k < sizeof number / sizeof *number; k++) {
        json_t *v = json_object_get(o, number[k].key);
        snprintf(at, sizeof at, "optimizer.groups[%zu].%s", i, number[k].key);
        *number[k].to = number[k].standard;
        if (v) BM_TRY(read_number(path, at, v, 0, number[k].max, false, number[k].to));
    }
    snprintf(at, sizeof at, "optimizer.groups[%zu].match", i);
    BM_TRY(read_texts(path, at, json_object_get(o, "match"), &g->match));
    if (!g->match.n)
        return bm_fail(BM_EFORMAT, "%s: %s: found an empty list, expected patterns of tensor names", path, at);
    return BM_OK;
}

static bm_status read_groups(config *c, const char *path) {
    const json_t *list = member(c->json, "optimizer.groups");
    const size_t n = json_array_size(list);
    if (!json_is_array(list) || n > 1000)
        return bm_fail(BM_EFORMAT, "%s: optimizer.groups: found %s, expected a list of at most 1000 objects", path,
                       show(list).s);
    BM_TRY(bm_alloc(&c->rule, (n + 1) * sizeof *c->rule, "a configuration"));
    for (size_t i = 0; i < n; i++) {
        c->n_rules = i + 1;
        BM_TRY(read_group(c, path, i, json_array_get(list, i)));
    }
    return BM_OK;
}

/* A preset's name or a config.json: sizes.  Anything else: weights to go on from. */
static bm_status model_by_name(config *c, const char *path, const char *name) {
    bm_source *s;
    for (int i = 0; bm_config_preset_name(i); i++)
        if (!strcmp(name, bm_config_preset_name(i))) return bm_config_preset(&c->model, name);
    if (bm_ends_with(name, ".json")) return bm_config_read(&c->model, name);
    if (!bm_path_exists(name))
        return bm_fail(BM_EFORMAT, "%s: model: found '%.200s', which is not there; expected a model to go on from, a "
                       "config.json, a preset's name, or an object of sizes", path, name);
    BM_TRY(bm_source_open(&s, name));
    const bm_status st = bm_config_of(&c->model, s);
    bm_source_close(s);
    if (st) return st;
    c->model_path = bm_strndup(name, strlen(name));
    return c->model_path ? BM_OK : BM_EMEMORY;
}

static bm_status read_model(config *c, const char *path) {
    json_t *m = json_object_get(c->json, "model");
    if (json_is_string(m)) return model_by_name(c, path, json_string_value(m));
    if (!json_is_object(m))
        return bm_fail(BM_EFORMAT, "%s: model: found %s, expected an object of sizes, or the path of a model to go on "
                       "from", path, show(m).s);
    BM_TRY(all_among(path, "model.", m, model_keys));
    char *name = bm_strf("%s: model", path);
    if (!name) return BM_EMEMORY;
    const bm_status s = bm_config_from_json(&c->model, m, name);
    free(name);
    return s;
}

/* ---- what goes together -------------------------------------------------------------------------------------- */

static void settle_routing(config *c) {
    const bool sinkhorn = c->routing.choice ? c->routing.choice == 2 : c->model.routing == BM_ROUTE_SIGMOID;
    c->balance = (bm_balance){ .choice = sinkhorn ? BM_CHOOSE_SINKHORN : BM_CHOOSE_BEST,
                               .paper_start = c->routing.start == 1, .stop = (bm_sinkhorn_stop)c->routing.stop,
                               .tol = c->routing.tol, .sweeps = (int)c->routing.sweeps, .scale = c->routing.scale,
                               .capacity = (float)c->routing.capacity, .load = (float)c->routing.load,
                               .z = (float)c->routing.z };
}

static bm_status whole_groups(const config *c, const char *path, const char *key, int64_t n) {
    if (n % c->route_group == 0) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: %s: found %lld, expected a multiple of routing.route_group, %lld", path, key,
                   (long long)n, (long long)c->route_group);
}

static bm_status settle(config *c, const char *path) {
    settle_routing(c);
    if (!c->steps == !c->tokens)
        return bm_fail(BM_EFORMAT, "%s: found %s of steps and tokens, expected one: how long to train", path,
                       c->steps ? "both" : "none");
    if (!c->batch.from) c->batch.from = c->batch.sequences < c->route_group ? c->batch.sequences : c->route_group;
    if (!c->batch.len_from) c->batch.len_from = c->seq_len < 64 ? c->seq_len : 64;
    if (c->batch.from > c->batch.sequences)
        return bm_fail(BM_EFORMAT, "%s: batch.from: found %lld, expected at most batch.sequences, %lld", path,
                       (long long)c->batch.from, (long long)c->batch.sequences);
    if (c->batch.len_from > c->seq_len)
        return bm_fail(BM_EFORMAT, "%s: batch.seq_len_from: found %lld, expected at most data.seq_len, %lld", path,
                       (long long)c->batch.len_from, (long long)c->seq_len);
    BM_TRY(whole_groups(c, path, "batch.sequences", c->batch.sequences));
    BM_TRY(whole_groups(c, path, "batch.micro", c->batch.micro));
    BM_TRY(whole_groups(c, path, "batch.from", c->batch.from));
    if (!c->batch.micro) {                          /* about 4096 rows */
        const int64_t groups = 4096 / (c->seq_len * c->route_group);
        c->batch.micro = (groups > 1 ? groups : 1) * c->route_group;
    }
    if (c->batch.micro > c->batch.sequences) c->batch.micro = c->batch.sequences;
    if (c->batch.micro * c->seq_len > 1 << 24)
        return bm_fail(BM_EFORMAT, "%s: batch.micro: found %lld sequences of %lld, expected at most %d tokens in a "
                       "micro-batch", path, (long long)c->batch.micro, (long long)c->seq_len, 1 << 24);
    if (c->carry && (c->batch.warmup || c->batch.len_warmup))
        return bm_fail(BM_EFORMAT, "%s: carry: found a warmup of the batch or of seq_len beside it, expected "
                       "sequences that go on where they stopped; leave out one of the two", path);
    return BM_OK;
}

/* ---- all of it ----------------------------------------------------------------------------------------------- */

static bool was_set(const char *key, const char *const *set, int n_set) {
    const size_t n = strlen(key);
    for (int i = 0; i < n_set; i++)
        if (!strncmp(set[i], key, n) && set[i][n] == '=') return true;
    return false;
}

static bm_status read_all(config *c, const char *path, const char *const *set, int n_set) {
    for (int i = 0; i < n_set; i++) BM_TRY(override(c->json, set[i]));
    BM_TRY(all_known(path, c->json));
    for (const row *r = table; r->key; r++) {
        const char *from = was_set(r->key, set, n_set) ? "--set" : path;
        if (!strcmp(r->key, "model") || !strcmp(r->key, "data.sources")) continue;
        if (!member(c->json, r->key)) BM_TRY(put_member(c->json, r->key, standard_value(r)));
        BM_TRY(read_value(c, from, r, member(c->json, r->key)));
    }
    BM_TRY(read_sources(c, path));
    BM_TRY(read_groups(c, path));
    BM_TRY(read_model(c, path));
    return settle(c, path);
}

bm_status bm_train_config_parse(bm_train_config **out, const char *text, size_t n, const char *path,
                                const char *const *set, int n_set) {
    config *c;
    *out = NULL;
    BM_TRY(bm_alloc(&c, sizeof *c, "a configuration"));
    bm_status s = bm_json_parse(&c->json, text, n, path);
    if (!s && !(c->path = bm_strndup(path, strlen(path)))) s = BM_EMEMORY;
    if (!s && !json_is_object(c->json))
        s = bm_fail(BM_EFORMAT, "%s: found %s, expected an object", path, show(c->json).s);
    if (!s) s = read_all(c, path, set, n_set);
    if (s) bm_train_config_free(c);
    else *out = c;
    return s;
}

static void texts_free(bm_texts *t) {
    for (size_t i = 0; i < t->n; i++) free(t->item[i]);
    free(t->item);
}

void bm_train_config_free(bm_train_config *c) {
    if (!c) return;
    texts_free(&c->freeze);
    texts_free(&c->prompts);
    for (size_t i = 0; i < c->n_data; i++) free(c->data[i].path);
    for (size_t i = 0; i < c->n_rules; i++) texts_free(&c->rule[i].match);
    free(c->data);
    free(c->rule);
    free(c->model_path);
    free(c->path);
    json_decref(c->json);
    free(c);
}
