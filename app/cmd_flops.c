/* cmd_flops.c - blackmamba flops: parameters and operations by part, of one model or of several side by side.
 * Room: app.
 *
 * In: configurations of any kind, or presets' names.  Out: a table or JSON. */
#include "app.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FORWARD_AND_BACK = 3, WITH_RECOMPUTE = 4 };
static const double NEAR = 0.02;                /* as far apart as equal models may be */

static struct { app_texts preset; int seq; bool json; } o;

static const app_option options[] = {
    {0, "preset", NULL, "NAME", APP_TEXTS, &o.preset, 0, 0, NULL, "a configuration by name; may be given again"},
    {0, "seq", NULL, "T", APP_INT, &o.seq, 1, 1 << 30, NULL,
     "tokens of a sequence, which attention depends on (the trained length, else 2048)"},
    APP_JSON(&o.json),
    {0},
};

typedef struct sum { uint64_t parameters, active, flops, flops_square; } sum;

typedef struct subject {
    const char *name;
    bm_config config;
    int seq;
    sum all, bare;                              /* bare: without the embedding */
} subject;

static void sum_add(sum *s, const bm_config_part *p, int times) {
    s->parameters += p->parameters * (uint64_t)times;
    s->active += p->active * (uint64_t)times;
    s->flops += p->flops * (uint64_t)times;
    s->flops_square += p->flops_square * (uint64_t)times;
}

/* ---- kinds of layers -------------------------------------------------------------------- */

static bool same(const bm_layer_config *a, const bm_layer_config *b) {
    return a->mixer == b->mixer && a->ffn == b->ffn && a->n_experts == b->n_experts && a->d_ff == b->d_ff;
}

/* How many layers are like layer l, 0 when an earlier one is. */
static int count_like(const bm_config *c, int l) {
    int n = 0;
    for (int k = 0; k < c->n_layers; k++) {
        if (!same(&c->layer[k], &c->layer[l])) continue;
        if (k < l) return 0;
        n++;
    }
    return n;
}

static void layer_name(char out[96], const bm_config *c, const bm_layer_config *k) {
    int n = 0;
    *out = 0;
    if (k->mixer == BM_MIXER_MAMBA) n = snprintf(out, 96, "mamba");
    if (k->mixer == BM_MIXER_ATTENTION)
        n = snprintf(out, 96, "attention of %d heads, %d for keys", (int)c->n_heads, (int)c->n_kv_heads);
    if (k->mixer && k->ffn) n += snprintf(out + n, (size_t)(96 - n), " beside ");
    if (k->ffn == BM_FFN_MOE)
        snprintf(out + n, (size_t)(96 - n), "moe, %d of %d experts, width %d", (int)c->top_k, (int)k->n_experts,
                 (int)k->d_ff);
    if (k->ffn == BM_FFN_DENSE) snprintf(out + n, (size_t)(96 - n), "mlp, width %d", (int)k->d_ff);
}

/* ---- one model ----------------------------------------------------------------------------- */

static bool has_attention(const bm_config *c) {
    for (int l = 0; l < c->n_layers; l++) if (c->layer[l].mixer == BM_MIXER_ATTENTION) return true;
    return false;
}

static int subject_open(subject *s, const char *name) {
    bm_config_part part[BM_MOST_PARTS];
    s->name = name;
    int code = app_config_read(&s->config, name);
    if (code) return code;
    s->seq = o.seq ? o.seq : s->config.max_len ? (int)s->config.max_len : 2048;
    for (int l = -1; l < s->config.n_layers; l++) {
        const int times = l < 0 ? 1 : count_like(&s->config, l);
        const int n = times ? bm_config_parts(&s->config, l, s->seq, part) : 0;
        for (int i = 0; i < n; i++) sum_add(&s->all, &part[i], times);
        for (int i = 0; i < n; i++) if (strcmp(part[i].name, "embedding")) sum_add(&s->bare, &part[i], times);
    }
    return APP_OK;
}

static void print_row(const char *name, int indent, int layers, const sum *s, uint64_t whole) {
    char parameters[32], active[32], count[16] = "";
    app_format_count(parameters, s->parameters);
    app_format_count(active, s->active);
    if (layers) snprintf(count, sizeof count, "%d x", layers);
    printf("%*s%-*s %6s %16s %16s %10.3f %5.1f%%\n", indent, "", 44 - indent, name, count, parameters, active,
           1e-6 * (double)s->flops, 100.0 * (double)s->flops / (double)whole * (layers ? layers : 1));
}

/* One layer of each kind, then the share of all of them. */
static void print_parts(const subject *s, int layer, int times) {
    bm_config_part part[BM_MOST_PARTS];
    char name[96] = "";
    sum all = {0};
    const int n = bm_config_parts(&s->config, layer, s->seq, part);
    for (int i = 0; i < n; i++) sum_add(&all, &part[i], 1);
    if (layer >= 0) {
        layer_name(name, &s->config, &s->config.layer[layer]);
        print_row(name, 0, times, &all, s->all.flops);
    }
    for (int i = 0; i < n; i++) {
        sum one = {0};
        sum_add(&one, &part[i], 1);
        if (layer < 0) print_row(part[i].name, 0, 1, &one, s->all.flops);
        else print_row(part[i].name, 2, times, &one, s->all.flops);
    }
}

static void print_flops(const char *name, const sum *s, int times) {
    printf("%-44s %*s %10.3f", name, 40, "", 1e-6 * (double)s->flops * times);
    if (s->flops_square != s->flops)
        printf("   (%.3f with the whole square of attention)", 1e-6 * (double)s->flops_square * times);
    putchar('\n');
}

static void print_one(const subject *s) {
    printf("%s", s->name);
    if (has_attention(&s->config)) printf(", sequences of %d tokens", s->seq);
    printf("\n\n%-44s %6s %16s %16s %10s %6s\n", "one layer of each kind", "layers", "parameters", "of one token",
           "MFLOP", "of all");
    print_parts(s, -1, 1);
    for (int l = 0; l < s->config.n_layers; l++)
        if (count_like(&s->config, l)) print_parts(s, l, count_like(&s->config, l));
    putchar('\n');
    print_row("in all", 0, 0, &s->all, s->all.flops);
    print_row("without the embedding", 0, 0, &s->bare, s->all.flops);
    print_flops("forward, a token", &s->all, 1);
    print_flops("training, a token", &s->all, FORWARD_AND_BACK);
    print_flops("training with full recompute", &s->all, WITH_RECOMPUTE);
}

/* ---- several side by side -------------------------------------------------------------------- */

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static double ratio_of(const subject *s, const subject *first) {
    return (double)s->bare.active / (double)first->bare.active;
}

static void print_line(const char *name, const subject *s, int n, size_t offset) {
    char text[32];
    printf("%-36s", name);
    for (int i = 0; i < n; i++) {
        uint64_t v;
        memcpy(&v, (const char *)&s[i] + offset, sizeof v);
        app_format_count(text, v);
        printf(" %20s", text);
    }
    putchar('\n');
}

static void print_millions(const char *name, const subject *s, int n, size_t offset, int times) {
    printf("%-36s", name);
    for (int i = 0; i < n; i++) {
        uint64_t v;
        memcpy(&v, (const char *)&s[i] + offset, sizeof v);
        printf(" %20.1f", 1e-6 * (double)v * times);
    }
    putchar('\n');
}

static bool all_equal(const subject *s, int n) {
    for (int i = 1; i < n; i++) if (fabs(ratio_of(&s[i], s) - 1) > NEAR) return false;
    return true;
}

static bool one_vocabulary(const subject *s, int n) {
    for (int i = 1; i < n; i++) if (s[i].config.n_vocab != s[0].config.n_vocab) return false;
    return true;
}

static void print_side_by_side(const subject *s, int n) {
    printf("%-36s", "");
    for (int i = 0; i < n; i++) printf(" %20.20s", base_name(s[i].name));
    putchar('\n');
    print_line("parameters", s, n, offsetof(subject, all.parameters));
    print_line("  without the embedding", s, n, offsetof(subject, bare.parameters));
    print_line("parameters of one token", s, n, offsetof(subject, all.active));
    print_line("  without the embedding", s, n, offsetof(subject, bare.active));
    printf("%-36s", "  over those of the first");
    for (int i = 0; i < n; i++) printf(" %20.4f", ratio_of(&s[i], s));
    putchar('\n');
    printf("%-36s", "tokens of a sequence");
    for (int i = 0; i < n; i++) printf(" %20d", s[i].seq);
    putchar('\n');
    print_millions("MFLOP a token, forward", s, n, offsetof(subject, all.flops), 1);
    print_millions("  with the whole square", s, n, offsetof(subject, all.flops_square), 1);
    print_millions("  training", s, n, offsetof(subject, all.flops), FORWARD_AND_BACK);
    printf("\nactive parameters without the embedding: %s within %g%%; vocabularies: %s\n",
           all_equal(s, n) ? "equal" : "not equal", 100 * NEAR, one_vocabulary(s, n) ? "the same" : "different");
}

/* ---- JSON --------------------------------------------------------------------------------------- */

static json_t *part_json(const bm_config_part *p, const char *layer, int layers) {
    return json_pack("{s:s, s:i, s:s, s:s, s:I, s:I, s:I, s:I}", "layer", layer, "layers", layers, "block", p->block,
                     "part", p->name, "parameters", (json_int_t)p->parameters, "active", (json_int_t)p->active,
                     "flops", (json_int_t)p->flops, "flops_whole_square", (json_int_t)p->flops_square);
}

/* Of one layer of each kind, with how many there are. */
static json_t *parts_json(const subject *s) {
    bm_config_part part[BM_MOST_PARTS];
    json_t *list = json_array();
    bool bad = !list;
    for (int l = -1; !bad && l < s->config.n_layers; l++) {
        char name[96] = "model";
        const int times = l < 0 ? 1 : count_like(&s->config, l);
        const int n = times ? bm_config_parts(&s->config, l, s->seq, part) : 0;
        if (l >= 0) layer_name(name, &s->config, &s->config.layer[l]);
        for (int i = 0; !bad && i < n; i++) bad = json_array_append_new(list, part_json(&part[i], name, times)) != 0;
    }
    if (!bad) return list;
    json_decref(list);
    return NULL;
}

static json_t *sum_json(const sum *s) {
    return json_pack("{s:I, s:I, s:I, s:I}", "parameters", (json_int_t)s->parameters, "active", (json_int_t)s->active,
                     "flops", (json_int_t)s->flops, "flops_whole_square", (json_int_t)s->flops_square);
}

static json_t *subject_json(const subject *s, const subject *first) {
    return json_pack("{s:s, s:i, s:i, s:o, s:o, s:I, s:I, s:o, s:o}", "model", s->name, "seq", s->seq, "n_vocab",
        (int)s->config.n_vocab, "all", sum_json(&s->all), "without_embedding", sum_json(&s->bare), "training_flops",
        (json_int_t)(FORWARD_AND_BACK * s->all.flops), "training_flops_recompute",
        (json_int_t)(WITH_RECOMPUTE * s->all.flops), "active_ratio", app_json_real(ratio_of(s, first)), "parts",
        parts_json(s));
}

static int print_json(const subject *s, int n) {
    if (n == 1) return app_print_json(subject_json(s, s));
    json_t *list = json_array();
    for (int i = 0; list && i < n; i++)
        if (json_array_append_new(list, subject_json(&s[i], s))) json_decref(list), list = NULL;
    return app_print_json(json_pack("{s:o, s:b, s:b}", "models", list, "equal", (int)all_equal(s, n), "same_vocabulary",
                                    (int)one_vocabulary(s, n)));
}

static int run(char **operand) {
    int words = 0, n = 0, code = APP_OK;
    while (operand[words]) words++;
    const int all = words + o.preset.n;
    if (!all) return app_usage(&app_flops, "name a configuration, a model or a preset");
    subject *s = calloc((size_t)all, sizeof *s);
    if (!s) return app_error("out of memory: %d configurations", all);
    for (; !code && n < all; n++) code = subject_open(&s[n], n < words ? operand[n] : o.preset.item[n - words]);
    if (!code && o.json) code = print_json(s, n);
    else if (!code && n == 1) print_one(s);
    else if (!code) print_side_by_side(s, n);
    free(s);
    return code;
}

const app_command app_flops = {
    "flops", "CONFIG | MODEL | --preset NAME ... [--seq T] [--json]", "Counts parameters and operations by part.",
    "CONFIG is a config.json or a configuration of training, MODEL a folder or .gguf. Of one, every part is told; "
    "several stand side by side, with the ratio of the parameters that one token uses, the embedding left out: equal "
    "models are within 2%. A multiplication and an addition are two operations; attention is causal, half the square, "
    "unless said. Training is 3 times the forward pass, 4 times with full recompute.", options, APP_ANY, run,
};
