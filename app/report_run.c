/* report_run.c - reads a run: RUN/metrics.jsonl into columns, RUN/train.json.  Room: app.
 *
 * In: lines of JSON, docs/FORMAT.md, "A training run".  Out: a number a record and column; loads of experts
 * gathered into bins over time, so that memory does not grow with them; the last sample texts. */
#include "report.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { LONGEST_LINE = 1 << 24, LONGEST_CONFIG = 1 << 20 };

static const struct { const char *key; report_column column; } scalars[] = {
    {"step", RC_STEP}, {"tokens", RC_TOKENS}, {"flops", RC_FLOPS}, {"seconds", RC_SECONDS}, {"loss", RC_LOSS},
    {"load_loss", RC_LOAD_LOSS}, {"z_loss", RC_Z_LOSS}, {"lr", RC_LR}, {"grad_norm", RC_GRAD_NORM},
    {"tokens_s", RC_TOKENS_S}, {"peak_share", RC_PEAK_SHARE}, {"noise_scale", RC_NOISE}, {"skipped", RC_SKIPPED},
    {"bits_per_byte", RC_BITS}, {"average", RC_AVERAGE},
};

/* NAN for what is no number, or one that no run has. */
static double number(const json_t *v) {
    double x = json_is_number(v) ? json_number_value(v) : NAN;
    return fabs(x) < 1e-30 ? 0 : fabs(x) <= 1e30 ? x : NAN;
}

/* ---- records --------------------------------------------------------------------------- */

static bool table_grow(report_table *t) {
    size_t cap = t->cap ? 2 * t->cap : 256;
    if (t->n < t->cap) return true;
    if (cap > SIZE_MAX / sizeof(double)) return false;
    for (int c = 0; c < RC_COUNT; c++) {
        double *p = realloc(t->column[c], cap * sizeof *p);
        if (!p) return false;
        t->column[c] = p;
    }
    t->cap = cap;
    return true;
}

/* Of an array of numbers: least, sum, most; NAN when there is none. */
static void over_layers(const json_t *array, double *least, double *sum, double *most, size_t *n) {
    *least = *sum = *most = NAN;
    *n = 0;
    for (size_t i = 0; i < json_array_size(array); i++) {
        double v = number(json_array_get(array, i));
        if (isnan(v)) continue;
        *sum = (*n)++ ? *sum + v : v;
        *least = fmin(*least, v);
        *most = fmax(*most, v);
    }
}

static bool table_add(report_table *t, const json_t *record) {
    double least, sum, most;
    size_t n;
    if (!table_grow(t)) return false;
    for (int c = 0; c < RC_COUNT; c++) t->column[c][t->n] = NAN;
    for (size_t i = 0; i < sizeof scalars / sizeof *scalars; i++)
        t->column[scalars[i].column][t->n] = number(json_object_get(record, scalars[i].key));
    over_layers(json_object_get(record, "entropy"), &least, &sum, &most, &n);
    t->column[RC_EVEN_MEAN][t->n] = n ? sum / (double)n : NAN;
    t->column[RC_EVEN_LEAST][t->n] = least;
    over_layers(json_object_get(record, "dead_experts"), &least, &sum, &most, &n);
    t->column[RC_DEAD][t->n] = sum;
    over_layers(json_object_get(record, "sweeps"), &least, &sum, &most, &n);
    t->column[RC_SWEEPS][t->n++] = most;
    return true;
}

/* ---- loads ----------------------------------------------------------------------------- */

/* Layers as the first record with loads has them; more cells than a page can show are left out. */
static bool layers_make(report_run *r, const json_t *load, const json_t *layers) {
    size_t n = json_array_size(load), cells = 0;
    for (size_t i = 0; i < n; i++) {
        size_t x = json_array_size(json_array_get(load, i));
        cells = x > REPORT_CELLS ? REPORT_CELLS + 1 : cells + x;
        if (!x || cells > REPORT_CELLS) return true;
    }
    r->layer = calloc(n, sizeof *r->layer);
    if (!r->layer) return false;
    for (size_t i = 0; i < n; i++, r->n_layers++) {
        report_layer *l = &r->layer[i];
        double place = number(json_array_get(layers, i));
        l->layer = place >= 0 && place < 1e6 ? (int)place : (int)i;
        l->n_experts = (int)json_array_size(json_array_get(load, i));
        l->load = calloc((size_t)l->n_experts * REPORT_BINS, sizeof *l->load);
        if (!l->load) return false;
    }
    r->width = 1;
    return true;
}

/* Halves the bins: each becomes two. */
static void bins_merge(report_run *r) {
    for (int i = 0; i < r->n_layers; i++) {
        const size_t x = (size_t)r->layer[i].n_experts;
        float *load = r->layer[i].load;
        for (size_t b = 0; b < REPORT_BINS / 2; b++)
            for (size_t e = 0; e < x; e++) load[b * x + e] = load[2 * b * x + e] + load[(2 * b + 1) * x + e];
        memset(load + REPORT_BINS / 2 * x, 0, REPORT_BINS / 2 * x * sizeof *load);
    }
    for (int b = 0; b < REPORT_BINS / 2; b++) r->bin_from[b] = r->bin_from[2 * b];
    r->n_bins = REPORT_BINS / 2;
    r->width *= 2;
    r->filled = r->width;
}

static bool loads_fit(const report_run *r, const json_t *load) {
    if (json_array_size(load) != (size_t)r->n_layers) return false;
    for (int i = 0; i < r->n_layers; i++)
        if (json_array_size(json_array_get(load, (size_t)i)) != (size_t)r->layer[i].n_experts) return false;
    return true;
}

static void loads_add(report_run *r, const json_t *load, double tokens) {
    if (!r->n_layers || !loads_fit(r, load)) return;
    if (r->filled == r->width && r->n_bins == REPORT_BINS) bins_merge(r);
    if (!r->n_bins || r->filled == r->width) {
        r->bin_from[r->n_bins++] = r->bin_to;
        r->filled = 0;
    }
    for (int i = 0; i < r->n_layers; i++) {
        const size_t x = (size_t)r->layer[i].n_experts;
        const json_t *row = json_array_get(load, (size_t)i);
        double sum = 0;
        for (size_t e = 0; e < x; e++) sum += fmax(0, number(json_array_get(row, e)));
        for (size_t e = 0; e < x && sum > 0; e++)
            r->layer[i].load[(size_t)(r->n_bins - 1) * x + e] +=
                (float)(fmax(0, number(json_array_get(row, e))) * (double)x / sum);
    }
    r->filled++;
    if (tokens > r->bin_to) r->bin_to = tokens;
}

/* ---- lines ----------------------------------------------------------------------------- */

static void keep(json_t **slot, json_t *value) {
    json_decref(*slot);
    *slot = json_incref(value);
}

static void sample_add(report_run *r, json_t *record) {
    if (!json_is_string(json_object_get(record, "text"))) return;
    if (r->n_samples == REPORT_SAMPLES) {
        json_decref(r->sample[0]);
        memmove(r->sample, r->sample + 1, sizeof *r->sample * (REPORT_SAMPLES - 1));
        r->n_samples--;
    }
    r->sample[r->n_samples++] = json_incref(record);
}

/* false: memory ran out. */
static bool record_add(report_run *r, json_t *record) {
    const char *kind = json_string_value(json_object_get(record, "kind"));
    json_t *load = json_object_get(record, "load");
    if (!kind || isnan(number(json_object_get(record, "step")))) return r->n_damaged++, true;
    if (strcmp(kind, "run") == 0) return r->n_starts++, keep(&r->start, record), true;
    if (strcmp(kind, "sample") == 0) return sample_add(r, record), true;
    if (strcmp(kind, "eval") == 0) {
        if (json_is_array(json_object_get(record, "sources"))) keep(&r->sources, json_object_get(record, "sources"));
        return table_add(&r->eval, record);
    }
    if (strcmp(kind, "train") != 0) return true;
    if (number(json_object_get(record, "skipped")) > 0) r->n_skipped++;
    if (load && !r->layer && !layers_make(r, load, json_object_get(record, "layers"))) return false;
    loads_add(r, load, number(json_object_get(record, "tokens")));
    return table_add(&r->train, record);
}

/* The next line that ends, without its end; longer ones come empty.  false at the end of the file, or with
 * *failed when memory runs out. */
static bool line_next(FILE *f, char **line, size_t *cap, size_t *n, bool *failed) {
    *n = 0;
    for (int c; (c = getc_unlocked(f)) != EOF;) {
        if (c == '\n') {
            if (*n > LONGEST_LINE) *n = 0;
            return true;
        }
        if (*n == *cap && *n <= LONGEST_LINE) {
            size_t more = *cap ? 2 * *cap : 4096;
            char *p = realloc(*line, more);
            if (!p) return *failed = true, false;
            *line = p;
            *cap = more;
        }
        if (*n <= LONGEST_LINE) (*line)[(*n)++] = (char)c;
    }
    return false;
}

static int lines_read(report_run *r, FILE *f, const char *path) {
    char *line = NULL;
    size_t cap = 0, n;
    bool failed = false;
    while (!failed && line_next(f, &line, &cap, &n, &failed)) {
        json_error_t e = {.line = 0};
        json_t *record = n ? json_loadb(line, n, JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES, &e) : NULL;
        if (record) failed = !record_add(r, record);
        else if (n && json_error_code(&e) == json_error_out_of_memory) failed = true;
        else r->n_damaged++;
        json_decref(record);
    }
    free(line);
    if (failed) return app_error("out of memory for %s", path);
    if (ferror(f)) return app_error("cannot read %s: %s", path, strerror(errno));
    return APP_OK;
}

/* ---- files ----------------------------------------------------------------------------- */

static char *path_in(const char *folder, const char *name) {
    char *path = malloc(strlen(folder) + strlen(name) + 2);
    if (path) sprintf(path, "%s/%s", folder, name);
    return path;
}

static json_t *json_small(const char *path) {
    FILE *f = fopen(path, "rb");
    char *text = f ? malloc(LONGEST_CONFIG + 1) : NULL;
    size_t n = text ? fread(text, 1, LONGEST_CONFIG + 1, f) : 0;
    json_t *v = n && n <= LONGEST_CONFIG ? json_loadb(text, n, JSON_ALLOW_NUL, NULL) : NULL;
    free(text);
    if (f) fclose(f);
    return v;
}

/* What ran, as far as the folder tells. */
static bool config_read(report_run *r) {
    static const char *const name[] = {"train.json", "config.json"};
    for (int i = 0; i < 2 && !r->config; i++) {
        char *path = path_in(r->path, name[i]);
        if (!path) return false;
        r->config = json_small(path);
        free(path);
    }
    return true;
}

/* The last word of the folder's real path. */
static char *run_name(const char *path) {
    char *real = realpath(path, NULL);
    const char *whole = real ? real : path, *slash = strrchr(whole, '/');
    char *name = strdup(slash && slash[1] ? slash + 1 : whole);
    free(real);
    return name;
}

static int metrics_read(report_run *r, const char *path) {
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f && errno == ENOENT)
        return app_error("%s: no such file; expected the folder of a training run, which has one", path);
    if (!f) return app_error("cannot open %s: %s", path, strerror(errno));
    bool regular = fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode);
    int code = regular ? lines_read(r, f, path) : app_error("%s: found something that is not a file", path);
    fclose(f);
    if (!code && !r->train.n && !r->eval.n)
        code = app_error("%s: found no record of a step or an evaluation (lines that are no records: %zu); nothing to "
                         "report yet", path, r->n_damaged);
    return code;
}

int report_run_read(report_run *r, const char *path) {
    *r = (report_run){.path = path};
    char *file = path_in(path, "metrics.jsonl");
    int code = APP_FAILED;
    r->name = run_name(path);
    if (!file || !r->name || !config_read(r)) app_error("out of memory for %s", path);
    else code = metrics_read(r, file);
    free(file);
    if (code) report_run_free(r);
    return code;
}

void report_run_free(report_run *r) {
    for (int c = 0; c < RC_COUNT; c++) free(r->train.column[c]), free(r->eval.column[c]);
    for (int i = 0; i < r->n_layers; i++) free(r->layer[i].load);
    for (int i = 0; i < r->n_samples; i++) json_decref(r->sample[i]);
    free(r->layer);
    free(r->name);
    json_decref(r->sources);
    json_decref(r->start);
    json_decref(r->config);
    *r = (report_run){0};
}

/* ---- numbers of a run ------------------------------------------------------------------ */

void report_smooth(const double *v, size_t n, double *out) {
    const size_t half = n / 50;
    double sum = 0;
    size_t count = 0, from = 0, to = 0;         /* the window is [from, to) */
    for (size_t i = 0; i < n; i++) {
        const size_t left = i < half ? i : half, right = left < n - 1 - i ? left : n - 1 - i;
        for (; to <= i + right; to++) if (!isnan(v[to])) sum += v[to], count++;
        for (; from < i - left; from++) if (!isnan(v[from])) sum -= v[from], count--;
        out[i] = count ? sum / (double)count : NAN;
    }
}

static double last_mean(const report_table *t, report_column c) {
    double sum = 0;
    size_t count = 0;
    for (size_t i = t->n - t->n / 50 - (t->n > 0); i < t->n; i++)
        if (!isnan(t->column[c][i])) sum += t->column[c][i], count++;
    return count ? sum / (double)count : NAN;
}

static double last_of(const report_run *r, report_column c) {
    double v = NAN;
    if (r->train.n) v = r->train.column[c][r->train.n - 1];
    if (r->eval.n) v = fmax(v, r->eval.column[c][r->eval.n - 1]);
    return v;
}

report_summary report_summarize(const report_run *r) {
    const report_table *e = &r->eval;
    report_summary s = {
        .step = last_of(r, RC_STEP), .tokens = last_of(r, RC_TOKENS), .flops = last_of(r, RC_FLOPS),
        .seconds = last_of(r, RC_SECONDS), .parameters = number(json_object_get(r->start, "parameters")),
        .parameters_active = number(json_object_get(r->start, "parameters_active")),
        .loss = last_mean(&r->train, RC_LOSS), .tokens_s = last_mean(&r->train, RC_TOKENS_S),
        .peak_share = last_mean(&r->train, RC_PEAK_SHARE),
        .eval_loss = NAN, .bits_per_byte = NAN, .best_loss = NAN,
    };
    for (size_t i = 0; i < e->n; i++) {
        s.best_loss = fmin(s.best_loss, e->column[RC_LOSS][i]);
        if (e->column[RC_AVERAGE][i] > 0) continue;
        s.eval_loss = e->column[RC_LOSS][i];
        s.bits_per_byte = e->column[RC_BITS][i];
    }
    return s;
}
