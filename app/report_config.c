/* report_config.c - in which keys the configurations of runs differ.  Room: app.
 *
 * In: a JSON value a run.  Out: a table, a row for each path of keys whose values are not all the same. */
#include "report.h"
#include <stdlib.h>
#include <string.h>

enum { MOST_ROWS = 200, DEEPEST = 12 };

typedef struct walk { page *p; const json_t *value[REPORT_MOST_RUNS]; int n, rows; page path; } walk;

static bool all_equal(const walk *w) {
    for (int i = 1; i < w->n; i++) {
        if (!w->value[0] != !w->value[i]) return false;
        if (w->value[0] && !json_equal(w->value[0], w->value[i])) return false;
    }
    return true;
}

static void cell(page *p, const json_t *v) {
    char *text = v ? json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    size_t n = text ? strlen(text) : 0;
    page_put(p, "<td>");
    page_text(p, text ? text : v ? "?" : "", text ? n < 200 ? n : 200 : v != NULL);
    page_put(p, n > 200 ? "…</td>" : "</td>");
    free(text);
}

static void row(walk *w) {
    if (w->rows++ >= MOST_ROWS) return;
    page_put(w->p, "<tr><th>");
    page_text(w->p, w->path.s, w->path.n);
    page_put(w->p, "</th>");
    for (int i = 0; i < w->n; i++) cell(w->p, w->value[i]);
    page_put(w->p, "</tr>\n");
}

static void descend(walk *w, int depth);

/* The values behind one key, and the path with it. */
static void below(walk *w, const char *key, int depth) {
    const json_t *above[REPORT_MOST_RUNS];
    const size_t n = w->path.n;
    memcpy(above, w->value, sizeof above);
    for (int i = 0; i < w->n; i++) w->value[i] = json_object_get(above[i], key);
    if (n) page_put(&w->path, ".");
    page_f(&w->path, "%s", key);
    descend(w, depth + 1);
    w->path.n = n;
    memcpy(w->value, above, sizeof above);
}

static bool seen_before(const walk *w, int run, const char *key) {
    for (int i = 0; i < run; i++) if (json_object_get(w->value[i], key)) return true;
    return false;
}

static void descend(walk *w, int depth) {
    bool objects = depth < DEEPEST;
    if (w->rows >= MOST_ROWS || all_equal(w)) return;
    for (int i = 0; i < w->n; i++) objects = objects && (!w->value[i] || json_is_object(w->value[i]));
    if (!objects) {
        row(w);
        return;
    }
    for (int i = 0; i < w->n; i++) {
        const char *key;
        json_t *value;
        json_object_foreach((json_t *)w->value[i], key, value) {
            (void)value;
            if (!seen_before(w, i, key)) below(w, key, depth);
        }
    }
}

void report_differences(page *p, const report *r) {
    page rows = {0};
    walk w = {.p = &rows, .n = r->n};
    for (int i = 0; i < r->n; i++) w.value[i] = r->run[i].config;
    descend(&w, 0);
    if (w.rows) {
        page_put(p, "<h2>What differs</h2>\n<div class=\"wide\"><table><tr><th></th>");
        for (int i = 0; i < r->n; i++) {
            page_put(p, "<th>");
            page_text(p, r->run[i].name, strlen(r->run[i].name));
            page_put(p, "</th>");
        }
        page_put(p, "</tr>\n");
        if (rows.s) page_f(p, "%.*s", (int)rows.n, rows.s);
        page_put(p, "</table></div>\n");
    }
    p->failed = p->failed || rows.failed || w.path.failed;
    free(rows.s);
    free(w.path.s);
}
