/* report_heat.c - the load of a layer's experts over time as a map of colours.  Room: app.
 *
 * In: loads over their mean, by bins of time.  Out: an <svg>; a row an expert, the first on top; blue less than
 * its share, orange more, black (white on dark pages) nothing at all. */
#include "report.h"
#include <math.h>
#include <string.h>

enum { CLASSES = 9, DEAD = CLASSES, TOP = 44, BOTTOM = 36, WIDTH = CHART_WIDTH - CHART_LEFT - CHART_RIGHT };

/* By log2 of load over mean: the middle is within a sixth of even. */
static int class_of(double ratio) {
    static const double edge[CLASSES - 1] = {-2, -1, -0.55, -0.22, 0.22, 0.55, 1, 2};
    int c = 0;
    if (!(ratio > 0)) return DEAD;
    while (c < CLASSES - 1 && log2(ratio) > edge[c]) c++;
    return c;
}

static double height_of(const report_layer *l) { return fmin(fmax(12.0 * l->n_experts, 60), 260); }

static void legend(page *p) {
    double x = CHART_LEFT;
    page_f(p, "<rect class=\"ed\" x=\"%.0f\" y=\"26\" width=\"14\" height=\"9\"/><text class=\"m\" x=\"%.0f\" y=\"35\">"
           "none</text><text class=\"m\" x=\"%.0f\" y=\"35\">¼</text>\n", x, x + 19, x + 60);
    x += 74;
    for (int i = 0; i < CLASSES; i++, x += 15)
        page_f(p, "<rect class=\"e%d\" x=\"%.0f\" y=\"26\" width=\"14\" height=\"9\"/>", i, x);
    page_f(p, "<text class=\"m\" x=\"%.0f\" y=\"35\">4 times its share</text>\n", x + 4);
}

static int bin_class(const report_run *r, const report_layer *l, int bin, size_t expert) {
    const double load = l->load[(size_t)bin * (size_t)l->n_experts + expert];
    return class_of(load / (bin + 1 < r->n_bins ? r->width : r->filled));
}

/* All cells of one class as one path; neighbours in time are one rectangle. */
static void cells(page *p, const report_run *r, const report_layer *l, const chart_axis *x, double row, int class) {
    bool any = false;
    for (size_t e = 0; e < (size_t)l->n_experts; e++)
        for (int b = 0; b < r->n_bins; b++) {
            int end = b;
            while (end < r->n_bins && bin_class(r, l, end, e) == class) end++;
            if (end == b) continue;
            double from = chart_at(x, r->bin_from[b]), to = chart_at(x, end < r->n_bins ? r->bin_from[end] : r->bin_to);
            if (!any) page_f(p, "<path class=\"e%c\" d=\"", class == DEAD ? 'd' : '0' + class);
            any = true;
            page_f(p, "M%.1f %.2fh%.1fv%.2fh%.1fz", from, row * (double)e, to - from, row, from - to);
            b = end;
        }
    if (any) page_put(p, "\"/>\n");
}

static void experts(page *p, const report_layer *l, double row) {
    int every = 1;
    while (every * row < 12) every *= 2;
    for (int e = 0; e < l->n_experts; e += every)
        page_f(p, "<text class=\"m\" text-anchor=\"end\" x=\"%d\" y=\"%.1f\">%d</text>", CHART_LEFT - 5,
               TOP + row * (e + 0.5) + 4, e);
    page_put(p, "\n");
}

void chart_heat(page *p, const report_run *r, int layer, bool alone) {
    const report_layer *l = &r->layer[layer];
    const double height = height_of(l), row = height / l->n_experts;
    const chart_axis x = {.lo = r->bin_from[0], .hi = r->bin_to > r->bin_from[0] ? r->bin_to : r->bin_from[0] + 1,
                          .pixels = WIDTH};
    char title[64];
    snprintf(title, sizeof title, "Layer %d: load of its %d experts", l->layer, l->n_experts);
    chart_begin(p, title, (int)(TOP + height + BOTTOM), alone);
    legend(p);
    experts(p, l, row);
    chart_axis_x(p, &x, CHART_LEFT, TOP, (int)height, "tokens");
    page_f(p, "<svg x=\"%d\" y=\"%d\" width=\"%d\" height=\"%.1f\" overflow=\"hidden\" "
           "shape-rendering=\"crispEdges\">\n", CHART_LEFT, TOP, WIDTH, height);
    for (int c = 0; c <= DEAD; c++) cells(p, r, l, &x, row, c);
    page_put(p, "</svg></svg>\n");
}
