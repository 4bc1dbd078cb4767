/* report.h - a training run as a page: what its files share.  Room: app.
 *
 * In: RUN/metrics.jsonl and RUN/train.json (else RUN/config.json).  Out: one HTML file that needs nothing
 * else, charts as SVG files, a table, JSON.  Texts and names come from anywhere and reach a page only
 * through page_text. */
#ifndef BM_REPORT_H
#define BM_REPORT_H
#include "app.h"

/* Reads n >= 1 folders of runs and writes the page about them; what cmd_train calls as a run goes on. */
int report_write(const char *const *runs, int n, const char *out_html);

/* ---- report_page.c: growing text, numbers for people, files -------------------------------------- */

typedef struct page { char *s; size_t n, cap; bool failed; } page;     /* failed: memory ran out, told at the end */
void page_put(page *p, const char *markup);
void page_f(page *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Any bytes, escaped for HTML and SVG; a byte or character that may not stand there is shown by a sign. */
void page_text(page *p, const char *s, size_t n);
int  page_write(page *p, const char *path);     /* the file appears whole or not at all; p is emptied */
void number_short(char out[32], double v);      /* 12.3M; "-" for NAN */
void number_fixed(char out[32], double v, int decimals, double scale, const char *unit);
void number_power(char out[48], double v);      /* 3·10⁻⁵ */
void number_time(char out[32], double seconds); /* 1 h 02 min */

/* ---- report_run.c: a run as columns -------------------------------------------------------------- */

enum { REPORT_MOST_RUNS = 24, REPORT_BINS = 240, REPORT_SAMPLES = 24, REPORT_CELLS = 1 << 14 };

typedef enum report_column {
    RC_STEP, RC_TOKENS, RC_FLOPS, RC_SECONDS, RC_LOSS, RC_LOAD_LOSS, RC_Z_LOSS, RC_LR, RC_GRAD_NORM, RC_TOKENS_S,
    RC_PEAK_SHARE, RC_NOISE, RC_SKIPPED, RC_BITS, RC_AVERAGE,
    RC_EVEN_MEAN, RC_EVEN_LEAST, RC_DEAD, RC_SWEEPS,    /* over layers: mean and least entropy, sum, most */
    RC_COUNT
} report_column;
typedef struct report_table { size_t n, cap; double *column[RC_COUNT]; } report_table;     /* NAN: absent */

typedef struct report_layer {
    int layer, n_experts;
    float *load;                /* (REPORT_BINS, X) load over the mean load, summed over the records of a bin */
} report_layer;

typedef struct report_run {
    const char *path;
    char *name;
    report_table train, eval;
    int n_layers; report_layer *layer;
    int n_bins, width, filled;          /* bins of `width` records each, the last one of `filled` */
    double bin_from[REPORT_BINS], bin_to;       /* tokens where each begins, and where the last ends */
    json_t *sample[REPORT_SAMPLES]; int n_samples;      /* the newest records, oldest first */
    json_t *sources;                    /* of the last evaluation; NULL */
    json_t *start;                      /* the last record of a start; NULL */
    json_t *config;                     /* NULL: there is none, or it is no JSON */
    size_t n_starts, n_skipped, n_damaged;      /* steps without an update; lines that are no records */
} report_run;

int  report_run_read(report_run *r, const char *path);
void report_run_free(report_run *r);

typedef struct report_summary {         /* NAN: absent */
    double step, tokens, flops, seconds, parameters, parameters_active;
    double loss, tokens_s, peak_share;  /* means over the last fiftieth of the steps */
    double eval_loss, bits_per_byte, best_loss;
} report_summary;
report_summary report_summarize(const report_run *r);
/* The mean around each of n values, over n / 50 on both sides, as many as there are before and after; NAN are passed
 * over. */
void report_smooth(const double *v, size_t n, double *out);

/* ---- report_svg.c and report_heat.c: charts ------------------------------------------------------- */

typedef enum chart_look { CHART_LINE, CHART_FAINT, CHART_POINTS } chart_look;
typedef struct chart_curve {
    const double *x, *y; size_t n;      /* NAN in y: a gap */
    int color;                          /* and dash and marker, 0.. */
    chart_look look;
    const char *label;                  /* NULL: not in the legend */
} chart_curve;
typedef struct chart {
    const char *title, *x_label;
    const chart_curve *curve; int n;
    bool log_x, log_y, zero, percent;   /* zero: y begins there; percent: y is a fraction */
    bool powers;                        /* x is written in powers of ten */
    double lead;                        /* this part of x, at its beginning, may leave the frame */
} chart;
enum { CHART_WIDTH = 420, CHART_LEFT = 52, CHART_RIGHT = 18, CHART_POINTS_MOST = 1000 };
extern const char chart_style[];        /* CSS of what charts draw, light and dark */
void chart_begin(page *p, const char *title, int height, bool alone);  /* alone: a file of its own, with its style */
void chart_draw(page *p, const chart *c, bool alone);
void chart_heat(page *p, const report_run *r, int layer, bool alone);
/* Marks of an axis of `pixels` from lo to hi inside the frame at x, y. */
typedef struct chart_axis { double lo, hi; bool log, percent, powers; double pixels; } chart_axis;
double chart_at(const chart_axis *a, double v);                         /* 0 .. pixels */
void chart_axis_x(page *p, const chart_axis *a, int x, int y, int height, const char *label);

/* ---- report.c: pages ------------------------------------------------------------------------------- */

typedef struct report { report_run *run; int n; } report;
int  report_open(report *r, const char *const *paths, int n);
void report_close(report *r);
int  report_html(const report *r, const char *path);
int  report_svg(const report *r, const char *folder);  /* each chart as a file; the folder is made */
/* report_config.c: a table of the keys in which configurations differ. */
void report_differences(page *p, const report *r);

#endif
