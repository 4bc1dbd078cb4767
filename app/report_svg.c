/* report_svg.c - curves as SVG: axes, marks, legends.  Room: app.
 *
 * In: columns of numbers.  Out: an <svg> for a page, whose style it shares, or a file of its own.  Colours are
 * those of Okabe and Ito, which people with any colour vision can tell apart, brightened on dark pages;
 * curves past the seventh repeat them in dashes.  The frame is an <svg> inside the first one: it clips. */
#include "report.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

const char chart_style[] =
    ".chart{font:12px system-ui,sans-serif}.bg{fill:#fff}.t{fill:#333}.m{fill:#666}.h{font-weight:600;font-size:13px}"
    ".g{stroke:#ddd}.x{stroke:#999;fill:none}.l{fill:none;stroke-width:1.8;stroke-linejoin:round}"
    ".w{fill:none;stroke-width:1;opacity:.25}"
    ".s0{stroke:#0072b2}.s1{stroke:#d55e00}.s2{stroke:#009e73}.s3{stroke:#cc79a7}.s4{stroke:#b88600}.s5{stroke:#56b4e9}"
    ".s6{stroke:#555}"
    ".f0{fill:#0072b2}.f1{fill:#d55e00}.f2{fill:#009e73}.f3{fill:#cc79a7}.f4{fill:#b88600}.f5{fill:#56b4e9}"
    ".f6{fill:#555}"
    ".e0{fill:#08306b}.e1{fill:#2171b5}.e2{fill:#6baed6}.e3{fill:#c6dbef}.e4{fill:#f2f2f2}.e5{fill:#fdd0a2}"
    ".e6{fill:#fd8d3c}"
    ".e7{fill:#d94801}.e8{fill:#7f2704}.ed{fill:#000}"
    "@media(prefers-color-scheme:dark){.bg{fill:#16181c}.t{fill:#ddd}.m{fill:#999}.g{stroke:#33363c}.x{stroke:#777}"
    ".s0{stroke:#4da3e0}.s1{stroke:#ff8c42}.s2{stroke:#2bc295}.s3{stroke:#e8a3c9}.s4{stroke:#f0b429}.s5{stroke:#a5dcff}"
    ".s6{stroke:#bbb}"
    ".f0{fill:#4da3e0}.f1{fill:#ff8c42}.f2{fill:#2bc295}.f3{fill:#e8a3c9}.f4{fill:#f0b429}.f5{fill:#a5dcff}"
    ".f6{fill:#bbb}"
    ".e0{fill:#9ecbff}.e1{fill:#5a9fe0}.e2{fill:#2f6fae}.e3{fill:#24425f}.e4{fill:#2b2d31}.e5{fill:#5c3b1e}"
    ".e6{fill:#a85a1c}"
    ".e7{fill:#e8812f}.e8{fill:#ffc38a}.ed{fill:#fff}}";

enum { COLORS = 7, PLOT_HEIGHT = 190, LEGEND_ROW = 17, TITLE = 24, BOTTOM = 36,
       PLOT_WIDTH = CHART_WIDTH - CHART_LEFT - CHART_RIGHT };

void chart_begin(page *p, const char *title, int height, bool alone) {
    page_f(p, "<svg class=\"chart\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"", CHART_WIDTH, height);
    page_text(p, title, strlen(title));
    page_put(p, "\"");
    if (alone) page_f(p, " xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\"><style>%s</style>"
                      "<rect class=\"bg\" width=\"100%%\" height=\"100%%\"/", 3 * CHART_WIDTH / 2, 3 * height / 2,
                      chart_style);
    page_put(p, "><text class=\"t h\" x=\"8\" y=\"16\">");
    page_text(p, title, strlen(title));
    page_put(p, "</text>\n");
}

/* ---- axes ------------------------------------------------------------------------------ */

double chart_at(const chart_axis *a, double v) {
    if (a->log) return a->pixels * (log(fmax(v, 1e-300)) - log(a->lo)) / (log(a->hi) - log(a->lo));
    return a->pixels * (v - a->lo) / (a->hi - a->lo);
}

/* Room around [lo, hi], which may be one number or none. */
static chart_axis axis_make(double lo, double hi, bool log_scale, double pad) {
    if (!(lo <= hi)) lo = log_scale ? 1 : 0, hi = log_scale ? 10 : 1;
    if (log_scale) {
        double by = pow(fmax(hi / lo, 1.05), pad);
        if (hi / lo < 1.05) by = 1.05;
        return (chart_axis){.lo = lo / by, .hi = hi * by, .log = true};
    }
    double room = pad * (hi - lo);
    if (hi - lo <= 1e-9 * fmax(fabs(lo), fabs(hi))) room = lo == 0 && hi == 0 ? 1 : 0.05 * fmax(fabs(lo), fabs(hi));
    return (chart_axis){.lo = lo - room, .hi = hi + room};
}

/* 1, 2 or 5 times a power of ten, so that a span holds about five. */
static double nice_step(double span) {
    double raw = span / 5, power = pow(10, floor(log10(raw))), m = raw / power;
    return power * (m <= 1.4 ? 1 : m <= 2.8 ? 2 : m <= 7 ? 5 : 10);
}

/* A mark's words: as many digits as marks `step` apart need. */
static void mark_words(char out[48], const chart_axis *a, double v, double step) {
    static const struct { double from, by; const char *unit; } units[] = {
        {1e12, 1e12, "T"}, {1e9, 1e9, "B"}, {1e6, 1e6, "M"}, {1e4, 1e3, "k"}, {0, 1, ""}};
    double big = fmax(fabs(a->lo), fabs(a->hi)), of = a->log ? fabs(v) : big;
    int u = 0;
    if (a->percent) v *= 100, step *= 100, of *= 100;
    if (fabs(v) < step * 1e-6) {
        snprintf(out, 48, a->percent ? "0%%" : "0");
        return;
    }
    if (a->powers || (!a->percent && (of >= 1e15 || big < 1e-2))) {
        number_power(out, v);
        return;
    }
    while (of < units[u].from) u++;
    int decimals = (int)ceil(-log10(step / units[u].by) - 1e-9);
    snprintf(out, 48, "%.*f%s%s", decimals > 0 ? decimals < 9 ? decimals : 9 : 0, v / units[u].by, units[u].unit,
             a->percent ? "%" : "");
}

enum { MARKS = 12 };
/* Up to MARKS values and how far apart they are as far as digits go. */
static int marks(const chart_axis *a, double value[MARKS], double step[MARKS]) {
    double decades = a->log ? log10(a->hi / a->lo) : 0;
    int n = 0;
    if (decades < 1) {
        double s = nice_step(a->hi - a->lo);
        for (double i = ceil(a->lo / s - 1e-9); i * s <= a->hi + 1e-9 * s && n < MARKS; i++)
            value[n] = i * s, step[n++] = s;
        return n;
    }
    static const double in_decade[] = {1, 2, 5};
    int per = decades < 2.5 ? 3 : 1, every = (int)ceil(decades / 7);
    for (int e = (int)floor(log10(a->lo)); e <= (int)ceil(log10(a->hi)); e += every)
        for (int k = 0; k < per && n < MARKS; k++) {
            double v = in_decade[k] * pow(10, e);
            if (v >= a->lo && v <= a->hi) value[n] = v, step[n++] = pow(10, e);
        }
    return n;
}

void chart_axis_x(page *p, const chart_axis *a, int x, int y, int height, const char *label) {
    double value[MARKS], step[MARKS];
    char words[48];
    int n = marks(a, value, step);
    for (int i = 0; i < n; i++) {
        double at = x + chart_at(a, value[i]);
        mark_words(words, a, value[i], step[i]);
        page_f(p, "<path class=\"g\" d=\"M%.1f %dv%d\"/><text class=\"m\" text-anchor=\"middle\" x=\"%.1f\" "
               "y=\"%d\">%s</text>\n", at, y, height, at, y + height + 14, words);
    }
    page_f(p, "<text class=\"m\" text-anchor=\"end\" x=\"%d\" y=\"%d\">%s</text>\n", CHART_WIDTH - CHART_RIGHT,
           y + height + 29, label);
}

static void axis_y(page *p, const chart_axis *a, int y) {
    double value[MARKS], step[MARKS];
    char words[48];
    int n = marks(a, value, step);
    for (int i = 0; i < n; i++) {
        double at = y + a->pixels - chart_at(a, value[i]);
        mark_words(words, a, value[i], step[i]);
        page_f(p, "<path class=\"g\" d=\"M%d %.1fh%d\"/><text class=\"m\" text-anchor=\"end\" x=\"%d\" "
               "y=\"%.1f\">%s</text>\n", CHART_LEFT, at, PLOT_WIDTH, CHART_LEFT - 5, at + 4, words);
    }
}

/* ---- extents --------------------------------------------------------------------------- */

typedef struct extent { double lo, hi; } extent;
static extent extent_none(void) { return (extent){INFINITY, -INFINITY}; }
static void extent_add(extent *e, double v) {
    if (v < e->lo) e->lo = v;
    if (v > e->hi) e->hi = v;
}

static bool shown(const chart *c, double x, double y) {
    return isfinite(x) && isfinite(y) && (!c->log_x || x > 0) && (!c->log_y || y > 0);
}

static extent extent_x(const chart *c) {
    extent e = extent_none();
    for (int k = 0; k < c->n; k++)
        for (size_t i = 0; i < c->curve[k].n; i++)
            if (shown(c, c->curve[k].x[i], c->curve[k].y[i])) extent_add(&e, c->curve[k].x[i]);
    if (!c->log_x && e.lo > 0 && e.lo < 0.5 * e.hi) e.lo = 0;
    if (c->log_x && e.hi > 100 * e.lo) e.lo = e.hi / 100;
    return e;
}

/* Of what lies past the lead; one value in fifty of a faint curve may stick out on either side. */
static void extent_curve(const chart *c, const chart_curve *k, double from, extent *e) {
    extent all = extent_none();
    for (size_t i = 0; i < k->n; i++)
        if (k->x[i] >= from && shown(c, k->x[i], k->y[i])) extent_add(&all, k->y[i]);
    if (k->look == CHART_FAINT && all.lo < all.hi) {
        enum { CELLS = 400 };
        size_t count[CELLS] = {0}, n = 0, lo = 0, hi = CELLS - 1;
        const double width = (all.hi - all.lo) / CELLS;
        for (size_t i = 0; i < k->n; i++) {
            if (k->x[i] < from || !shown(c, k->x[i], k->y[i])) continue;
            count[(size_t)fmin(CELLS - 1, (k->y[i] - all.lo) / width)]++;
            n++;
        }
        for (size_t sum = count[lo]; sum <= n / 50; sum += count[lo]) lo++;
        for (size_t sum = count[hi]; sum <= n / 50; sum += count[hi]) hi--;
        all = (extent){all.lo + (double)lo * width, all.lo + (double)(hi + 1) * width};
    }
    if (!(all.lo <= all.hi)) return;
    extent_add(e, all.lo);
    extent_add(e, all.hi);
}

static extent extent_y(const chart *c, const extent *x) {
    extent e = extent_none();
    double from = -INFINITY;
    if (c->lead > 0) from = c->log_x ? x->lo * pow(x->hi / x->lo, 3 * c->lead) : x->lo + c->lead * (x->hi - x->lo);
    for (int k = 0; k < c->n; k++) extent_curve(c, &c->curve[k], from, &e);
    for (int k = 0; k < c->n && !(e.lo <= e.hi); k++) extent_curve(c, &c->curve[k], -INFINITY, &e);
    if (c->zero && e.lo > 0) e.lo = 0;
    return e;
}

/* ---- curves ---------------------------------------------------------------------------- */

typedef struct plot { page *p; const chart *c; chart_axis x, y; bool down; } plot;     /* down: a point precedes */

static void plot_to(plot *f, double x, double y) {
    if (!shown(f->c, x, y)) {
        f->down = false;
        return;
    }
    double px = chart_at(&f->x, x), py = f->y.pixels - chart_at(&f->y, y);
    page_f(f->p, "%c%.1f %.1f", f->down ? 'L' : 'M', fmin(fmax(px, -1e4), 1e4), fmin(fmax(py, -1e4), 1e4));
    f->down = true;
}

/* Where stretch s of `parts` begins among n points: as long as the others on the axis, if points are even along x. */
static size_t stretch_at(const plot *f, size_t n, size_t s, size_t parts) {
    if (!f->x.log || !s) return n * s / parts;
    return (size_t)((double)n * pow(f->x.lo / f->x.hi, 1 - (double)s / (double)parts));
}

/* Least and most of each of 500 stretches, in their order, so that no spike is lost. */
static void plot_stretches(plot *f, const chart_curve *k) {
    const size_t parts = CHART_POINTS_MOST / 2;
    for (size_t s = 0; s < parts; s++) {
        const size_t from = stretch_at(f, k->n, s, parts);
        const size_t to = s + 1 < parts ? stretch_at(f, k->n, s + 1, parts) : k->n;
        if (from >= to) continue;
        size_t least = from, most = from;
        for (size_t i = from; i < to; i++) {
            if (isnan(k->y[least]) || k->y[i] < k->y[least]) least = i;
            if (isnan(k->y[most]) || k->y[i] > k->y[most]) most = i;
        }
        const size_t a = least < most ? least : most, b = least < most ? most : least;
        plot_to(f, k->x[a], k->y[a]);
        if (a != b) plot_to(f, k->x[b], k->y[b]);
    }
}

static void plot_line(plot *f, const chart_curve *k) {
    static const char *const dash[] = {"", " stroke-dasharray=\"7 3\"", " stroke-dasharray=\"2 3\"",
                                       " stroke-dasharray=\"9 3 2 3\""};
    page_f(f->p, "<path class=\"%c s%d\"%s d=\"", k->look == CHART_FAINT ? 'w' : 'l', k->color % COLORS,
           dash[k->color / COLORS % 4]);
    f->down = false;
    if (k->n <= CHART_POINTS_MOST) for (size_t i = 0; i < k->n; i++) plot_to(f, k->x[i], k->y[i]);
    else plot_stretches(f, k);
    page_put(f->p, "\"/>\n");
}

/* Shapes tell runs apart as well. */
static void marker(page *p, double x, double y, int color) {
    static const char *const shape[] = {"m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z", "m-3 -3h6v6h-6z",
                                        "m0 -4l4 7h-8z", "m0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z", "m0 4l4 -7h-8z",
                                        "m-4 -1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
                                        "m-4 -1.6h8v3.2h-8z"};
    page_f(p, "M%.1f %.1f%s", x, y, shape[color % COLORS]);
}

/* A hundred of them, evenly, the last one among them. */
static void plot_points(plot *f, const chart_curve *k) {
    enum { MOST = 100 };
    size_t n = 0, left;
    for (size_t i = 0; i < k->n; i++) n += shown(f->c, k->x[i], k->y[i]);
    const size_t every = (n + MOST - 1) / MOST;
    page_f(f->p, "<path class=\"f%d\" d=\"", k->color % COLORS);
    left = n;
    for (size_t i = 0; i < k->n; i++) {
        if (!shown(f->c, k->x[i], k->y[i]) || --left % every) continue;
        double x = chart_at(&f->x, k->x[i]), y = f->y.pixels - chart_at(&f->y, k->y[i]);
        if (x > -0.1 && x < f->x.pixels + 0.1 && y > -0.1 && y < f->y.pixels + 0.1) marker(f->p, x, y, k->color);
    }
    page_put(f->p, "\"/>\n");
}

/* ---- legend ---------------------------------------------------------------------------- */

enum { LABEL_MOST = 44 };      /* characters */
/* Bytes and characters of a label, cut where it is long. */
static size_t label_cut(const char *s, size_t *chars) {
    size_t n = 0;
    for (*chars = 0; s[n] && *chars < LABEL_MOST; ++*chars) {
        n++;
        while (((unsigned char)s[n] & 0xC0) == 0x80) n++;
    }
    return n;
}

static bool curve_empty(const chart *c, const chart_curve *k) {
    for (size_t i = 0; i < k->n; i++) if (shown(c, k->x[i], k->y[i])) return false;
    return true;
}

static void legend_entry(page *p, const chart_curve *k, double x, int y, size_t n) {
    if (k->look == CHART_POINTS) {
        page_f(p, "<path class=\"f%d\" d=\"", k->color % COLORS);
        marker(p, x + 9, y - 4, k->color);
        page_put(p, "\"/>");
    } else {
        const double at[2] = {0, 18}, up[2] = {0, 0};
        plot f = {.p = p, .c = &(chart){.n = 0}, .x = {.hi = 18, .pixels = 18}, .y = {.lo = -1, .hi = 1}};
        page_f(p, "<g transform=\"translate(%.1f %d)\">", x, y - 4);
        plot_line(&f, &(chart_curve){.x = at, .y = up, .n = 2, .color = k->color, .look = k->look});
        page_put(p, "</g>");
    }
    page_f(p, "<text class=\"t\" x=\"%.1f\" y=\"%d\">", x + 22, y);
    page_text(p, k->label, n);
    page_put(p, k->label[n] ? "…</text>\n" : "</text>\n");
}

/* Draws when p; returns rows. */
static int legend(page *p, const chart *c) {
    double x = CHART_LEFT;
    int rows = 0;
    for (int k = 0; k < c->n; k++) {
        size_t chars, n;
        if (!c->curve[k].label || curve_empty(c, &c->curve[k])) continue;
        n = label_cut(c->curve[k].label, &chars);
        double width = 36 + 6.6 * (double)(chars + (c->curve[k].label[n] != 0));
        if (!rows || x + width - 14 > CHART_WIDTH - CHART_RIGHT) rows++, x = CHART_LEFT;
        if (p) legend_entry(p, &c->curve[k], x, TITLE + LEGEND_ROW * rows - 5, n);
        x += width;
    }
    return rows;
}

/* ---- the chart ------------------------------------------------------------------------- */

static bool leaves_top(const chart *c, double top) {
    for (int k = 0; k < c->n; k++)
        for (size_t i = 0; c->curve[k].look != CHART_FAINT && i < c->curve[k].n; i++)
            if (shown(c, c->curve[k].x[i], c->curve[k].y[i]) && c->curve[k].y[i] > top) return true;
    return false;
}

void chart_draw(page *p, const chart *c, bool alone) {
    const int top = TITLE + LEGEND_ROW * legend(NULL, c) + 4;
    const extent ex = extent_x(c), ey = extent_y(c, &ex);
    plot f = {.p = p, .c = c, .x = axis_make(ex.lo, ex.hi, c->log_x, 0), .y = axis_make(ey.lo, ey.hi, c->log_y, 0.05)};
    f.x.pixels = PLOT_WIDTH;
    f.y.pixels = PLOT_HEIGHT;
    f.y.percent = c->percent;
    f.x.powers = c->powers;
    if (c->zero && f.y.lo < 0 && ey.lo >= 0) f.y.lo = 0;
    chart_begin(p, c->title, top + PLOT_HEIGHT + BOTTOM, alone);
    legend(p, c);
    chart_axis_x(p, &f.x, CHART_LEFT, top, PLOT_HEIGHT, c->x_label);
    axis_y(p, &f.y, top);
    page_f(p, "<svg x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" overflow=\"hidden\">\n", CHART_LEFT, top, PLOT_WIDTH,
           PLOT_HEIGHT);
    for (int k = 0; k < c->n; k++) if (c->curve[k].look != CHART_POINTS) plot_line(&f, &c->curve[k]);
    page_f(p, "</svg>\n<g transform=\"translate(%d %d)\">", CHART_LEFT, top);
    for (int k = 0; k < c->n; k++) if (c->curve[k].look == CHART_POINTS) plot_points(&f, &c->curve[k]);
    page_put(p, "</g>\n");
    page_f(p, "<path class=\"x\" d=\"M%d %dv%dh%d\"/>", CHART_LEFT, top, PLOT_HEIGHT, PLOT_WIDTH);
    if (leaves_top(c, f.y.hi))
        page_f(p, "<text class=\"m\" text-anchor=\"end\" x=\"%d\" y=\"16\">the first steps lie above</text>",
               CHART_WIDTH - CHART_RIGHT);
    page_put(p, "</svg>\n");
}
