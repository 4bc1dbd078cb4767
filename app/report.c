/* report.c - the page about a training run, or about several side by side.  Room: app.
 *
 * In: runs as columns.  Out: report.html, which needs no network and no script; the same charts as SVG
 * files. */
#include "report.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int report_open(report *r, const char *const *paths, int n) {
    *r = (report){0};
    if (n > REPORT_MOST_RUNS) return app_error("found %d runs, expected at most %d in one report", n, REPORT_MOST_RUNS);
    r->run = calloc((size_t)n, sizeof *r->run);
    if (!r->run) return app_error("out of memory for %d runs", n);
    for (int i = 0; i < n; i++, r->n++) {
        int code = report_run_read(&r->run[i], paths[i]);
        if (code) return report_close(r), code;
    }
    return APP_OK;
}

void report_close(report *r) {
    for (int i = 0; i < r->n; i++) report_run_free(&r->run[i]);
    free(r->run);
    *r = (report){0};
}

/* ---- what charts show ------------------------------------------------------------------ */

/* As it is, or with means around; means of layers and their least; a point where there is one. */
typedef enum view_kind { VIEW_LOSS, VIEW_PLAIN, VIEW_MEAN, VIEW_EVENNESS, VIEW_POINTS } view_kind;

enum { LOG_X = 1, LOG_Y = 2, ZERO = 4, PERCENT = 8, BOTH = 16 };        /* BOTH: also on a page of several runs */
static const struct view {
    const char *file, *title, *x_label;
    view_kind kind;
    report_column x, y;
    int flags;
} views[] = {
    {"loss_tokens", "Loss over tokens", "tokens", VIEW_LOSS, RC_TOKENS, RC_LOSS, BOTH},
    {"loss_flops", "Loss over FLOPs", "floating-point operations", VIEW_LOSS, RC_FLOPS, RC_LOSS, LOG_X | BOTH},
    {"loss_time", "Loss over time", NULL, VIEW_LOSS, RC_SECONDS, RC_LOSS, BOTH},
    {"bits_per_byte", "Bits per byte of the validation texts", "tokens", VIEW_LOSS, RC_TOKENS, RC_BITS, BOTH},
    {"learning_rate", "Learning rate", "tokens", VIEW_PLAIN, RC_TOKENS, RC_LR, ZERO | BOTH},
    {"gradient_norm", "Norm of the gradient", "tokens", VIEW_MEAN, RC_TOKENS, RC_GRAD_NORM, LOG_Y | BOTH},
    {"tokens_s", "Tokens a second", "tokens", VIEW_MEAN, RC_TOKENS, RC_TOKENS_S, ZERO | BOTH},
    {"peak_share", "Share of the arithmetic peak", "tokens", VIEW_MEAN, RC_TOKENS, RC_PEAK_SHARE,
     ZERO | PERCENT | BOTH},
    {"evenness", "Evenness of the load (entropy, 1: even)", "tokens", VIEW_EVENNESS, RC_TOKENS, RC_EVEN_MEAN, BOTH},
    {"dead_experts", "Experts without a token", "tokens", VIEW_PLAIN, RC_TOKENS, RC_DEAD, ZERO | BOTH},
    {"sweeps", "Sinkhorn sweeps, most of any layer", "tokens", VIEW_MEAN, RC_TOKENS, RC_SWEEPS, ZERO},
    {"noise_scale", "Gradient noise scale, in tokens", "tokens", VIEW_POINTS, RC_TOKENS, RC_NOISE, LOG_Y},
    {"load_loss", "Load-balance loss", "tokens", VIEW_MEAN, RC_TOKENS, RC_LOAD_LOSS, 0},
    {"z_loss", "Router z-loss", "tokens", VIEW_MEAN, RC_TOKENS, RC_Z_LOSS, 0},
};
enum { VIEWS = sizeof views / sizeof *views, CURVES = 5 * REPORT_MOST_RUNS };

/* Columns made for one chart. */
typedef struct made {
    double *column[CURVES]; int n;
    chart_curve curve[CURVES]; int n_curves;
    double second;              /* in units of the time axis */
    bool failed;
} made;

static double *made_column(made *m, size_t n) {
    double *v = malloc((n ? n : 1) * sizeof *v);
    if (!v || m->n == CURVES) return free(v), m->failed = true, NULL;
    return m->column[m->n++] = v;
}

static void made_free(made *m) {
    for (int i = 0; i < m->n; i++) free(m->column[i]);
}

static bool column_empty(const double *v, size_t n) {
    for (size_t i = 0; i < n; i++) if (!isnan(v[i])) return false;
    return true;
}

static void curve_add(made *m, const double *x, const double *y, size_t n, int color, chart_look look,
                      const char *label) {
    if (!x || !y || column_empty(y, n) || m->n_curves == CURVES) return;
    m->curve[m->n_curves++] = (chart_curve){x, y, n, color, look, label};
}

/* The unit of time that suits the longest run. */
static const char *time_unit(const report *r, double *second) {
    double most = 0;
    for (int i = 0; i < r->n; i++) most = fmax(most, report_summarize(&r->run[i]).seconds);
    *second = most < 300 ? 1 : most < 4 * 3600 ? 1. / 60 : 1. / 3600;
    return most < 300 ? "seconds" : most < 4 * 3600 ? "minutes" : "hours";
}

static const double *x_of(made *m, const report_table *t, report_column c) {
    if (c != RC_SECONDS) return t->column[c];
    double *v = made_column(m, t->n);
    for (size_t i = 0; v && i < t->n; i++) v[i] = t->column[c][i] * m->second;
    return v;
}

/* Each value faint, if they are one run's, and their mean around it. */
static void smooth_add(made *m, const report_table *t, report_column x, report_column y, int color, bool faint,
                       const char *label) {
    if (!t->n || column_empty(t->column[y], t->n)) return;
    const double *at = x_of(m, t, x);
    double *v = made_column(m, t->n);
    if (v) report_smooth(t->column[y], t->n, v);
    if (faint) curve_add(m, at, t->column[y], t->n, color, CHART_FAINT, "each step");
    curve_add(m, at, v, t->n, color, CHART_LINE, label);
}

/* Evaluations by the weights themselves, or by their average. */
static void eval_add(made *m, const report_table *t, report_column x, report_column y, int color, bool average,
                     const char *label) {
    if (!t->n) return;
    const double *at = x_of(m, t, x);
    double *v = made_column(m, t->n);
    for (size_t i = 0; v && i < t->n; i++) v[i] = (t->column[RC_AVERAGE][i] > 0) == average ? t->column[y][i] : NAN;
    curve_add(m, at, v, t->n, color, CHART_POINTS, label);
}

static void run_add(made *m, const struct view *w, const report_run *r, int i, bool one) {
    const char *name = one ? NULL : r->name;
    if (w->kind == VIEW_EVENNESS) {
        smooth_add(m, &r->train, w->x, RC_EVEN_MEAN, one ? 0 : i, false, one ? "mean of the layers" : name);
        if (one) smooth_add(m, &r->train, w->x, RC_EVEN_LEAST, 1, false, "least even layer");
    } else if (w->kind == VIEW_MEAN) {
        smooth_add(m, &r->train, w->x, w->y, i, one, one ? "mean around it" : name);
    } else if (w->kind != VIEW_LOSS) {
        curve_add(m, r->train.column[w->x], r->train.column[w->y], r->train.n, i,
                  w->kind == VIEW_POINTS ? CHART_POINTS : CHART_LINE, name);
    } else {
        smooth_add(m, &r->train, w->x, w->y, i, one, one ? "training, smoothed" : name);
        eval_add(m, &r->eval, w->x, w->y, one ? 1 : i, false, one ? "evaluation" : w->y == RC_BITS ? name : NULL);
        eval_add(m, &r->eval, w->x, w->y, one ? 2 : i, true, one ? "evaluation, averaged weights" : NULL);
    }
}

/* Nothing when no run has such numbers; *drawn tells. */
static void view_draw(page *p, const struct view *w, const report *r, bool alone, bool *drawn) {
    made *m = calloc(1, sizeof *m);
    *drawn = false;
    if (!m) {
        p->failed = true;
        return;
    }
    const char *unit = time_unit(r, &m->second);
    for (int i = 0; i < r->n; i++) run_add(m, w, &r->run[i], i, r->n == 1);
    p->failed = p->failed || m->failed;
    *drawn = m->n_curves > 0;
    if (*drawn)
        chart_draw(p, &(chart){.title = w->title, .x_label = w->x_label ? w->x_label : unit, .curve = m->curve,
                               .n = m->n_curves, .log_x = w->flags & LOG_X, .log_y = w->flags & LOG_Y,
                               .zero = w->flags & ZERO, .percent = w->flags & PERCENT, .powers = w->x == RC_FLOPS,
                               .lead = w->kind == VIEW_LOSS ? 0.08 : 0}, alone);
    made_free(m);
    free(m);
}

/* ---- pieces of the page ------------------------------------------------------------------ */

static const char style[] =
    ":root{color-scheme:light dark;--bg:#fff;--fg:#1b1d20;--soft:#666;--line:#ddd;--box:#f5f6f7}"
    "@media(prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#e4e6e8;--soft:#999;--line:#33363c;--box:#1f2227}}"
    "*{box-sizing:border-box}"
    "body{margin:0 auto;padding:12px;max-width:1320px;background:var(--bg);color:var(--fg);"
    "font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}h1{font-size:22px;margin:6px 0}"
    "h2{font-size:17px;margin:26px 0 8px}p{margin:6px 0}.soft{color:var(--soft)}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:8px}"
    ".tile{background:var(--box);border-radius:8px;padding:8px 10px}"
    ".tile b{display:block;font-size:18px;white-space:nowrap}"
    ".charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:14px}"
    ".chart{display:block;width:100%;height:auto}.wide{overflow-x:auto}table{border-collapse:collapse}"
    "th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}"
    "th{font-weight:600}th:first-child{text-align:left}td.left{text-align:left}"
    "pre{background:var(--box);border-radius:8px;padding:10px;margin:6px 0;white-space:pre-wrap;"
    "unicode-bidi:isolate;max-height:70vh;overflow:auto;font:13px/1.5 ui-monospace,monospace}"
    "pre b{color:var(--soft);font-weight:400}summary{cursor:pointer;margin:8px 0}"
    ".key{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px}";

static void text(page *p, const char *s) { page_text(p, s, strlen(s)); }

static void tile(page *p, const char *label, const char *value) {
    if (strcmp(value, "-") == 0) return;
    page_put(p, "<div class=\"tile\"><b>");
    text(p, value);
    page_f(p, "</b>%s</div>\n", label);
}

static void tiles(page *p, const report_run *r) {
    const report_summary s = report_summarize(r);
    char v[48];
    page_put(p, "<div class=\"tiles\">\n");
    number_fixed(v, s.loss, 4, 1, ""), tile(p, "training loss at the end", v);
    number_fixed(v, s.eval_loss, 4, 1, ""), tile(p, "evaluation loss", v);
    number_fixed(v, s.best_loss, 4, 1, ""), tile(p, "best evaluation", v);
    number_fixed(v, s.bits_per_byte, 4, 1, ""), tile(p, "bits per byte", v);
    number_short(v, s.tokens), tile(p, "tokens", v);
    number_short(v, s.step), tile(p, "steps", v);
    number_time(v, s.seconds), tile(p, "time", v);
    number_power(v, s.flops), tile(p, "floating-point operations", v);
    number_short(v, s.parameters), tile(p, "parameters", v);
    number_short(v, s.parameters_active), tile(p, "parameters of a token", v);
    number_short(v, s.tokens_s), tile(p, "tokens a second", v);
    number_fixed(v, s.peak_share, 1, 100, "%"), tile(p, "of the arithmetic peak", v);
    page_put(p, "</div>\n");
}

/* Sentences about what a reader should know. */
static void notes(page *p, const report_run *r) {
    const char *device = json_string_value(json_object_get(r->start, "device"));
    page_put(p, "<p class=\"soft\">");
    if (device) text(p, device), page_put(p, ". ");
    if (r->n_starts > 1) page_f(p, "Started %zu times. ", r->n_starts);
    if (r->n_skipped) page_f(p, "%zu step%s skipped: a number was not finite. ", r->n_skipped,
                             r->n_skipped > 1 ? "s were" : " was");
    if (r->n_damaged) page_f(p, "Lines of metrics.jsonl that are no records, passed over: %zu. ", r->n_damaged);
    page_put(p, "</p>\n");
}

static void sample(page *p, const json_t *record) {
    const json_t *prompt = json_object_get(record, "prompt"), *body = json_object_get(record, "text");
    page_f(p, "<p class=\"soft\">after step %.0f</p><pre dir=\"auto\"><b>",
           json_number_value(json_object_get(record, "step")));
    if (prompt) page_text(p, json_string_value(prompt), json_string_length(prompt));
    page_put(p, "</b>");
    page_text(p, json_string_value(body), json_string_length(body));
    page_put(p, "</pre>\n");
}

/* Those of the last step in sight, older ones folded away. */
static void samples(page *p, const report_run *r) {
    if (!r->n_samples) return;
    const json_t *last = json_object_get(r->sample[r->n_samples - 1], "step");
    int from = r->n_samples - 1;
    while (from > 0 && json_equal(json_object_get(r->sample[from - 1], "step"), last)) from--;
    page_put(p, "<h2>Sample texts</h2>\n");
    for (int i = from; i < r->n_samples; i++) sample(p, r->sample[i]);
    if (!from) return;
    page_put(p, "<details><summary>earlier ones</summary>\n");
    for (int i = from - 1; i >= 0; i--) sample(p, r->sample[i]);
    page_put(p, "</details>\n");
}

static void sources(page *p, const report_run *r) {
    char loss[32], bits[32];
    if (json_array_size(r->sources) < 2) return;
    page_put(p, "<h2>Last evaluation by source</h2>\n<div class=\"wide\"><table><tr><th>source</th>"
             "<th>loss</th><th>bits per byte</th></tr>\n");
    for (size_t i = 0; i < json_array_size(r->sources) && i < 200; i++) {
        const json_t *s = json_array_get(r->sources, i), *name = json_object_get(s, "name");
        const json_t *l = json_object_get(s, "loss"), *b = json_object_get(s, "bits_per_byte");
        number_fixed(loss, json_is_number(l) ? json_number_value(l) : NAN, 4, 1, "");
        number_fixed(bits, json_is_number(b) ? json_number_value(b) : NAN, 4, 1, "");
        page_put(p, "<tr><th>");
        if (json_is_string(name)) page_text(p, json_string_value(name), json_string_length(name));
        page_f(p, "</th><td>%s</td><td>%s</td></tr>\n", loss, bits);
    }
    page_put(p, "</table></div>\n");
}

static void config(page *p, const report_run *r) {
    if (!r->config) return;
    char *dump = json_dumps(r->config, JSON_INDENT(2) | JSON_ENCODE_ANY | JSON_REAL_PRECISION(9));
    if (!dump) p->failed = true;
    else {
        page_put(p, "<h2>Configuration</h2>\n<details><summary>show</summary><pre>");
        text(p, dump);
        page_put(p, "</pre></details>\n");
    }
    free(dump);
}

static void heats(page *p, const report_run *r) {
    if (!r->n_layers || !r->n_bins) return;
    page_put(p, "<h2>Load of the experts</h2>\n<div class=\"charts\">\n");
    for (int i = 0; i < r->n_layers; i++) chart_heat(p, r, i, false);
    page_put(p, "</div>\n");
}

static void charts(page *p, const report *r) {
    bool drawn;
    page_put(p, "<div class=\"charts\">\n");
    for (int i = 0; i < VIEWS; i++) if (r->n == 1 || views[i].flags & BOTH) view_draw(p, &views[i], r, false, &drawn);
    page_put(p, "</div>\n");
}

/* ---- pages ------------------------------------------------------------------------------- */

static void head(page *p, const char *title) {
    page_f(p, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
           "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
           "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';"
           "style-src 'unsafe-inline'\"><title>");
    text(p, title);
    page_f(p, "</title><style>%s%s</style></head>\n<body>\n<h1>", style, chart_style);
    text(p, title);
    page_put(p, "</h1>\n");
}

static void page_of_one(page *p, const report *r) {
    head(p, r->run[0].name);
    notes(p, &r->run[0]);
    tiles(p, &r->run[0]);
    page_put(p, "<h2>Curves</h2>\n");
    charts(p, r);
    heats(p, &r->run[0]);
    sources(p, &r->run[0]);
    samples(p, &r->run[0]);
    config(p, &r->run[0]);
}

static void final_row(page *p, const report_run *r, int color) {
    const report_summary s = report_summarize(r);
    char v[10][48];
    number_fixed(v[0], s.loss, 4, 1, "");
    number_fixed(v[1], s.eval_loss, 4, 1, "");
    number_fixed(v[2], s.bits_per_byte, 4, 1, "");
    number_short(v[3], s.tokens);
    number_power(v[4], s.flops);
    number_time(v[5], s.seconds);
    number_short(v[6], s.tokens_s);
    number_fixed(v[7], s.peak_share, 1, 100, "%");
    number_short(v[8], s.parameters);
    number_short(v[9], s.parameters_active);
    page_f(p, "<tr><th><svg class=\"key\" viewBox=\"0 0 9 9\"><rect class=\"f%d\" width=\"9\" height=\"9\"/></svg>",
           color % 7);
    text(p, r->name);
    page_put(p, "</th>");
    for (int i = 0; i < 10; i++) page_f(p, "<td>%s</td>", v[i]);
    page_put(p, "</tr>\n");
}

static void page_of_many(page *p, const report *r) {
    char title[40];
    snprintf(title, sizeof title, "%d training runs", r->n);
    head(p, title);
    page_put(p, "<div class=\"wide\"><table><tr><th>run</th><th>training loss</th><th>evaluation</th><th>bits/byte</th>"
             "<th>tokens</th><th>FLOPs</th><th>time</th><th>tokens/s</th><th>of peak</th><th>parameters</th>"
             "<th>of a token</th></tr>\n");
    for (int i = 0; i < r->n; i++) final_row(p, &r->run[i], i);
    page_put(p, "</table></div>\n<p class=\"soft\">Training loss: mean of the last fiftieth of the steps. "
             "Of a token: parameters used by one, without the embedding.</p>\n<h2>Curves</h2>\n");
    charts(p, r);
    report_differences(p, r);
    for (int i = 0; i < r->n; i++) {
        page_put(p, "<h2>");
        text(p, r->run[i].name);
        page_put(p, "</h2>\n<details><summary>experts, texts, configuration</summary>\n");
        notes(p, &r->run[i]);
        heats(p, &r->run[i]);
        sources(p, &r->run[i]);
        samples(p, &r->run[i]);
        config(p, &r->run[i]);
        page_put(p, "</details>\n");
    }
}

int report_html(const report *r, const char *path) {
    page p = {0};
    if (r->n == 1) page_of_one(&p, r);
    else page_of_many(&p, r);
    page_f(&p, "<p class=\"soft\">blackmamba %s</p>\n</body></html>\n", bm_version());
    return page_write(&p, path);
}

static int svg_write(page *p, const char *folder, const char *name) {
    char *path = malloc(strlen(folder) + strlen(name) + 8);
    int code = APP_FAILED;
    if (path) sprintf(path, "%s/%s.svg", folder, name), code = page_write(p, path);
    else app_error("out of memory for %s", folder);
    free(path);
    return code;
}

int report_svg(const report *r, const char *folder) {
    char name[32];
    int code = APP_OK;
    if (mkdir(folder, 0777) && errno != EEXIST) return app_error("cannot create %s: %s", folder, strerror(errno));
    for (int i = 0; i < VIEWS && !code; i++) {
        page p = {0};
        bool drawn;
        view_draw(&p, &views[i], r, true, &drawn);
        if (drawn || p.failed) code = svg_write(&p, folder, views[i].file);
    }
    for (int i = 0; r->n == 1 && r->run[0].n_bins && i < r->run[0].n_layers && !code; i++) {
        page p = {0};
        chart_heat(&p, &r->run[0], i, true);
        snprintf(name, sizeof name, "load_layer_%03d", r->run[0].layer[i].layer);
        code = svg_write(&p, folder, name);
    }
    return code;
}

int report_write(const char *const *runs, int n, const char *out_html) {
    report r;
    int code = report_open(&r, runs, n);
    if (!code) code = report_html(&r, out_html);
    report_close(&r);
    return code;
}
