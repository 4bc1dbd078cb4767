/* cmd_report.c - blackmamba report: a page about training runs.  Room: app.
 *
 * In: folders of runs.  Out: one HTML file, charts as SVG when asked, and the final numbers as a table or as
 * JSON. */
#include "report.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct { const char *out, *svg; bool json; } o;

static const app_option options[] = {
    {'o', "output", NULL, "FILE", APP_TEXT, &o.out, 0, 0, NULL,
     "the page to write, written over when it exists (RUN/report.html, of several runs ./report.html)"},
    {0, "svg", NULL, "DIR", APP_TEXT, &o.svg, 0, 0, NULL, "also write each chart as a file of DIR, which is made"},
    APP_JSON(&o.json),
    {0},
};

static json_t *run_json(const report_run *r) {
    const report_summary s = report_summarize(r);
    const struct { const char *key; double v; } number[] = {
        {"step", s.step}, {"tokens", s.tokens}, {"flops", s.flops}, {"seconds", s.seconds},
        {"parameters", s.parameters}, {"parameters_active", s.parameters_active}, {"loss", s.loss},
        {"eval_loss", s.eval_loss}, {"best_loss", s.best_loss}, {"bits_per_byte", s.bits_per_byte},
        {"tokens_s", s.tokens_s}, {"peak_share", s.peak_share}, {"skipped", (double)r->n_skipped}, {"damaged", (double)r->n_damaged},
    };
    json_t *one = json_object();
    page name = {0}, path = {0};                /* a path may be no UTF-8: as the page shows it */
    page_text(&name, r->name, strlen(r->name));
    page_text(&path, r->path, strlen(r->path));
    bool bad = name.failed || path.failed || json_object_set_new(one, "name", json_stringn(name.s, name.n)) ||
               json_object_set_new(one, "path", json_stringn(path.s, path.n));
    for (size_t i = 0; i < sizeof number / sizeof *number && !bad; i++) {
        const double v = number[i].v;
        json_t *j = v == floor(v) && fabs(v) < 9e15 ? json_integer((json_int_t)v) : app_json_real(v);
        bad = json_object_set_new(one, number[i].key, j);
    }
    free(name.s);
    free(path.s);
    if (bad) json_decref(one);
    return bad ? NULL : one;
}

static int print_json(const report *r) {
    json_t *runs = json_array();
    for (int i = 0; i < r->n && runs; i++)
        if (json_array_append_new(runs, run_json(&r->run[i]))) json_decref(runs), runs = NULL;
    return app_print_json(json_pack("{s:o}", "runs", runs));
}

/* A name as a terminal may show it, cut to a column. */
static void print_name(const char *name) {
    int n = 0;
    for (; name[n] && n < 24; n++) putchar((unsigned char)name[n] < 0x20 || name[n] == 0x7f ? '?' : name[n]);
    printf("%*s", 24 - n, "");
}

static void print_table(const report *r) {
    printf("%-24s %8s %8s %8s %8s %9s %9s %9s %9s %7s %14s\n", "run", "steps", "tokens", "params", "of token",
           "training", "eval", "bits/byte", "tokens/s", "of peak", "time");
    for (int i = 0; i < r->n; i++) {
        const report_summary s = report_summarize(&r->run[i]);
        char v[10][32];
        number_short(v[0], s.step);
        number_short(v[1], s.tokens);
        number_short(v[2], s.parameters);
        number_short(v[3], s.parameters_active);
        number_fixed(v[4], s.loss, 4, 1, "");
        number_fixed(v[5], s.eval_loss, 4, 1, "");
        number_fixed(v[6], s.bits_per_byte, 4, 1, "");
        number_short(v[7], s.tokens_s);
        number_fixed(v[8], s.peak_share, 1, 100, "%");
        number_time(v[9], s.seconds);
        print_name(r->run[i].name);
        printf(" %8s %8s %8s %8s %9s %9s %9s %9s %7s %14s\n", v[0], v[1], v[2], v[3], v[4], v[5], v[6],
               v[7], v[8], v[9]);
    }
}

static void warn_damaged(const report *r) {
    for (int i = 0; i < r->n; i++)
        if (r->run[i].n_damaged)
            fprintf(stderr, "blackmamba: warning: %s/metrics.jsonl: lines that are no records, passed over: %zu\n",
                    r->run[i].path, r->run[i].n_damaged);
}

static bool is_page(const char *path) {
    const size_t n = strlen(path);
    return n > 5 && strcmp(path + n - 5, ".html") == 0;
}

static int run(char **operand) {
    int n = 0;
    while (operand[n]) n++;
    char *standard = malloc(strlen(operand[0]) + sizeof "/report.html");
    if (!standard) return app_error("out of memory");
    sprintf(standard, "%s/report.html", n > 1 ? "." : operand[0]);
    const char *out = o.out ? o.out : standard;
    report r = {0};
    int code = APP_OK;
    if (!is_page(out)) code = app_usage(&app_report, "-o: found '%s', expected a name that ends in .html", out);
    if (!code) code = report_open(&r, (const char *const *)operand, n);
    if (!code) code = report_html(&r, out);
    if (!code && o.svg) code = report_svg(&r, o.svg);
    if (!code) warn_damaged(&r);
    if (!code && o.json) code = print_json(&r);
    else if (!code) {
        print_table(&r);
        printf("%s\n", out);
    }
    report_close(&r);
    free(standard);
    return code;
}

const app_command app_report = {
    "report", "RUN... [-o FILE.html] [--svg DIR] [--json]",
    "Makes a page about training runs, side by side when they are several.",
    "A RUN is a folder that train writes, finished or not. The page needs no network and no script.", options, -1, run,
};
