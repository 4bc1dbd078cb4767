/* bench_report.c - the results of blackmamba bench as tables, JSON and CSV.  Room: app.
 *
 * In: series of a bench_result.  Out: standard output or a file.  Rates are GB/s and GFLOP/s, 1e9 of
 * each; fractions are 0 to 1. */
#include "bench.h"
#include "commit.h"
#include <errno.h>
#include <math.h>
#include <string.h>

static const char *arith_name(int arith) { return arith == BM_ARITH_F32 ? "f32" : "native"; }

/* ---- what lines say -------------------------------------------------------------------- */

static double tokens(const bench_line *l) { return (double)l->n * l->steps; }

static void line_name(char out[32], const bench_line *l) {
    static const char *const kind[] = {"decode", "prefill", "batch"};
    snprintf(out, 32, "%s", kind[l->kind]);
    if (l->kind != BENCH_DECODE) snprintf(out, 32, "%s %d", kind[l->kind], l->kind == BENCH_BATCH ? l->n : l->steps);
}

/* Tokens a second that bandwidth and peak allow. */
static double roof(const bench_result *r, const bench_line *l) {
    return tokens(l) / bench_roof_seconds(l, bench_summarize(&r->bandwidth).median, bench_summarize(&r->peak).median);
}

/* Of what its roof allows: of each round's on a CPU, whose memory is slower in some minutes; a GPU's is not. */
static double share(const bench_result *r, const bench_line *l) {
    return r->machine.gpu ? bench_summarize(&l->rate).median / roof(r, l) : bench_summarize(&l->fraction).median;
}

static double experts(const bench_line *l) {
    return l->times.moe_layers ? (double)l->times.experts / (double)l->times.moe_layers : 0;
}

static double stage_share(const bench_line *l, double seconds) {
    double all = 0;
    for (int i = 0; i < BM_STAGE_COUNT; i++) all += l->times.stage[i];
    return all > 0 ? seconds / all : 0;
}

/* ---- table ----------------------------------------------------------------------------- */

static void print_machine(const bench_machine *m) {
    if (m->gpu) printf("device     %s, driver %s, CUDA %s, this program %s\n", m->cpu, m->driver, m->cuda, BENCH_COMMIT);
    if (m->gpu) return;
    printf("machine    %s, %s, %d thread%s, pages of %s, caches %ld / %ld / %ld KiB\n", m->cpu, m->level, m->threads,
           m->threads == 1 ? "" : "s", m->pages, m->cache[0] / 1024, m->cache[1] / 1024, m->cache[2] / 1024);
}

static void print_head(const bench_result *r) {
    const bench_summary w = bench_summarize(&r->bandwidth);
    const double peak = bench_summarize(&r->peak).median, f32 = bench_summarize(&r->peak_f32).median;
    print_machine(&r->machine);
    printf("model      %s, %s, arithmetic %s; medians of %d round%s\n", r->model, bm_dtype_name(r->type),
           arith_name(r->arith), r->rounds, r->rounds == 1 ? "" : "s");
    if (r->machine.gpu)
        printf("memory     %.0f MB of weights, %.0f MB of states and work space\n", 1e-6 * (double)r->info.weight_bytes,
               1e-6 * (double)r->session_bytes);
    else
        printf("memory     %.0f MB at most, %.0f MB of it not the file's\n", 1e-6 * r->peak_memory, 1e-6 * r->anonymous_memory);
    if (r->pages.pages)
        printf("experts    %d on the GPU in %.0f MB, %.1f%% of those chosen were there\n", r->pages.pages,
               1e-6 * (double)r->pages.bytes, 100 * app_hit_rate(&r->pages));
    printf("bandwidth  %.2f GB/s, %.2f to %.2f\n", 1e-9 * w.median, 1e-9 * w.min, 1e-9 * w.max);
    printf("peak       %.0f GFLOP/s in products of this model, %.0f in f32\n", 1e-9 * peak, 1e-9 * f32);
}

static void print_long(const bench_result *r, const bench_line *l) {
    if (!l->first.n) return;
    const double a = bench_summarize(&l->first).median, b = bench_summarize(&l->last).median;
    printf("\nlong text  %.1f us a token in the first 2048, %.1f in the last (%+.1f%%); resident memory %+.1f MB "
           "between\n", 1e6 * a, 1e6 * b, 100 * (b / a - 1), 1e-6 * (r->memory_last - r->memory_first));
}

/* Shares of the time, or on a GPU microseconds of a step: there the marks between stages cost some themselves. */
static void print_stages(const bench_result *r) {
    const bool gpu = r->machine.gpu;
    char name[32];
    printf("\n%-14s", gpu ? "us a step" : "% of the time");
    for (int k = 0; k < BM_STAGE_COUNT; k++) printf(" %11s", bm_stage_name((bm_stage)k));
    printf(gpu ? "\n" : " %11s\n", "(waiting)");
    for (int i = 0; i < r->n_lines; i++) {
        const bench_line *l = &r->line[i];
        const double chunks = l->times.chunks ? (double)l->times.chunks : 1;
        line_name(name, l);
        printf("%-14s", name);
        for (int k = 0; k < BM_STAGE_COUNT; k++)
            printf(" %11.1f", gpu ? 1e6 * l->times.stage[k] / chunks : 100 * stage_share(l, l->times.stage[k]));
        if (gpu) putchar('\n');
        else printf(" %11.1f\n", 100 * stage_share(l, l->times.waiting));
    }
}

void bench_print(const bench_result *r) {
    char name[32];
    print_head(r);
    printf("\n%-14s %9s %9s %9s %9s %8s %9s %9s %6s %8s\n", "", "tokens/s", "least", "most", "MB/token", "GB/s",
           "GFLOP/s", "roof", "share", "experts");
    for (int i = 0; i < r->n_lines; i++) {
        const bench_line *l = &r->line[i];
        const bench_summary s = bench_summarize(&l->rate);
        const double bytes = l->bytes / tokens(l), ops = l->ops / tokens(l);
        line_name(name, l);
        printf("%-14s %9.1f %9.1f %9.1f %9.2f %8.2f %9.1f %9.1f %5.0f%%", name, s.median, s.min, s.max, 1e-6 * bytes,
               1e-9 * bytes * s.median, 1e-9 * ops * s.median, roof(r, l), 100 * share(r, l));
        if (l->times.moe_layers) printf(" %8.2f\n", experts(l));
        else printf(" %8s\n", "-");
    }
    print_stages(r);
    for (int i = 0; i < r->n_lines; i++) print_long(r, &r->line[i]);
}

/* "GB/s" and what a rate must be multiplied with. */
static const char *unit_of(const bm_kernel_time *t, double *scale) {
    *scale = 1e-9;
    if (strcmp(t->unit, "B") == 0) return "GB/s";
    if (strcmp(t->unit, "op") == 0) return "GFLOP/s";
    if (strcmp(t->unit, "updates") == 0) return "G updates/s";
    *scale = 1e-6;
    return "M rows/s";
}

static bool has_weights(const bm_kernel_time *t) {
    return !strncmp(t->kernel, "linear", 6) || !strncmp(t->kernel, "experts", 7);
}

void bench_kernel_print(const bench_kernels *k, size_t i) {
    const bm_kernel_time *t = &k->time[i];
    double scale;
    const char *unit = unit_of(t, &scale);
    if (!i) {
        print_machine(&k->machine);
        printf("%-12s %-7s %-6s %5s %6s %5s %12s %-12s %s\n", "kernel", "weights", "arith", "M", "N", "K", "rate", "",
               "of roof");
    }
    printf("%-12s %-7s %-6s %5d %6d %5d %12.2f %-12s", t->kernel, has_weights(t) ? bm_dtype_name(t->type) : "-",
           has_weights(t) ? arith_name(t->arith) : "-", t->M, t->N, t->K, scale * t->rate, unit);
    if (t->roof > 0) printf(" %5.0f%%\n", 100 * t->rate / t->roof);
    else printf(" %6s\n", "-");
}

/* ---- JSON ------------------------------------------------------------------------------ */

static json_t *json_machine(const bench_machine *m) {
    json_t *o = json_pack("{s:s, s:s, s:i, s:s, s:[I, I, I]}", "cpu", m->cpu, "level", m->level, "threads", m->threads,
                          "pages", m->pages, "caches", (json_int_t)m->cache[0], (json_int_t)m->cache[1],
                          (json_int_t)m->cache[2]);
    if (o && m->gpu) json_object_set_new(o, "driver", json_string(m->driver));
    if (o && m->gpu) json_object_set_new(o, "cuda", json_string(m->cuda));
    return o;
}

static json_t *json_stages(const bench_line *l) {
    json_t *o = json_object();
    for (int k = 0; o && k < BM_STAGE_COUNT; k++)
        json_object_set_new(o, bm_stage_name((bm_stage)k), app_json_real(stage_share(l, l->times.stage[k])));
    if (o) json_object_set_new(o, "waiting", app_json_real(stage_share(l, l->times.waiting)));
    return o;
}

/* An object that was made, or NULL after a sentence, to path. */
static int json_write(json_t *object, const char *path) {
    if (!object || strcmp(path, "-") == 0) return app_print_json(object);
    FILE *f = fopen(path, "w");
    const bool bad = !f || json_dumpf(object, f, JSON_REAL_PRECISION(12)) || fputc('\n', f) == EOF;
    const int at = errno;
    json_decref(object);
    if (f && fclose(f) == 0 && !bad) return APP_OK;
    return app_error("cannot write %s: %s", path, strerror(bad ? at : errno));
}

/* The keys of one line, each name behind `prefix`. */
static void json_rate(json_t *to, const char *prefix, const bench_result *r, const bench_line *l) {
    const bench_summary s = bench_summarize(&l->rate);
    const struct { const char *name; double x; } key[] = {
        {"tok_s", s.median}, {"tok_s_min", s.min}, {"tok_s_max", s.max},
        {"fraction", share(r, l)},
    };
    for (size_t i = 0; i < sizeof key / sizeof *key; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s%s", prefix, key[i].name);
        json_object_set_new(to, name, app_json_real(key[i].x));
    }
}

/* Distinct experts that got rows in a step: the mean of each MoE layer. */
static json_t *json_experts(const bench_line *l) {
    json_t *o = json_array();
    for (int k = 0; o && k < BM_MAX_LAYERS; k++)
        if (l->times.layer_experts[k])
            json_array_append_new(o, app_json_real((double)l->times.layer_experts[k] / (double)l->times.chunks));
    return o;
}

/* A batch or a prefill: n texts, or one of n tokens. */
static json_t *json_line(const bench_result *r, const bench_line *l) {
    json_t *o = json_pack("{s:i, s:o, s:o, s:o, s:o, s:o}", "n", l->kind == BENCH_BATCH ? l->n : l->steps, "roof_tok_s",
                          app_json_real(roof(r, l)), "experts_per_layer", app_json_real(experts(l)), "experts_by_layer",
                          json_experts(l), "bytes_per_token", app_json_real(l->bytes / tokens(l)), "stages", json_stages(l));
    if (o) json_rate(o, "", r, l);
    return o;
}

static json_t *json_lines(const bench_result *r, bench_kind kind) {
    json_t *all = json_array();
    for (int i = 0; all && i < r->n_lines; i++)
        if (r->line[i].kind == kind) json_array_append_new(all, json_line(r, &r->line[i]));
    return all;
}

static void json_long(json_t *o, const bench_result *r, const bench_line *l) {
    if (!l->first.n) return;
    json_object_set_new(o, "prefill_first_us_per_token", app_json_real(1e6 * bench_summarize(&l->first).median));
    json_object_set_new(o, "prefill_last_us_per_token", app_json_real(1e6 * bench_summarize(&l->last).median));
    json_object_set_new(o, "resident_growth_bytes", app_json_real(r->memory_last - r->memory_first));
}

int bench_json(const bench_result *r, const char *path) {
    const bench_line *decode = &r->line[0], *prefill = &r->line[1];
    const bench_summary w = bench_summarize(&r->bandwidth), p = bench_summarize(&r->peak);
    const double rate = bench_summarize(&decode->rate).median, speed = bench_summarize(&prefill->rate).median;
    json_t *o = json_pack(
        "{s:s, s:s, s:s, s:o, s:s, s:s, s:s, s:i, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:I, s:o, s:o, s:o, s:o, s:o}",
        "version", bm_version(), "commit", BENCH_COMMIT, "device", r->machine.device, "machine",
        json_machine(&r->machine), "model", r->model, "type",
        bm_dtype_name(r->type), "arith", arith_name(r->arith), "prompt", r->prompt, "gen", r->gen, "rounds", r->rounds,
        "bandwidth_gb_s",
        app_json_real(1e-9 * w.median), "bandwidth_gb_s_min", app_json_real(1e-9 * w.min), "bandwidth_gb_s_max",
        app_json_real(1e-9 * w.max), "peak_gflop_s", app_json_real(1e-9 * p.median), "peak_f32_gflop_s",
        app_json_real(1e-9 * bench_summarize(&r->peak_f32).median), "bytes_per_token",
        (json_int_t)r->info.weight_bytes_per_token, "read_gb_s",
        app_json_real(1e-9 * rate * decode->bytes / tokens(decode)), "prefill_gflop_s",
        app_json_real(1e-9 * speed * prefill->ops / tokens(prefill)), "stages", json_pack("{s:o, s:o}", "decode",
        json_stages(decode), "prefill", json_stages(prefill)), "peak_memory_bytes", app_json_real(r->peak_memory),
        "anonymous_memory_bytes", app_json_real(r->anonymous_memory));
    if (o) {
        json_rate(o, "decode_", r, decode);
        json_rate(o, "prefill_", r, prefill);
        json_long(o, r, prefill);
        json_object_set_new(o, "session_bytes", json_integer((json_int_t)r->session_bytes));
        if (r->pages.pages)
            json_object_set_new(o, "pages", json_pack("{s:i, s:I, s:o}", "n", r->pages.pages, "bytes", (json_int_t)r->pages.bytes,
                                                      "hit_rate", app_json_real(app_hit_rate(&r->pages))));
        json_object_set_new(o, "prefill", json_lines(r, BENCH_PREFILL));
        json_object_set_new(o, "batch", json_lines(r, BENCH_BATCH));
    }
    return json_write(o, path);
}

int bench_bandwidth_json(const bench_machine *m, const bench_series *s, const char *path) {
    const bench_summary w = bench_summarize(s);
    return json_write(json_pack("{s:o, s:o, s:o, s:o}", "machine", json_machine(m), "bandwidth_gb_s",
                                app_json_real(1e-9 * w.median), "bandwidth_gb_s_min", app_json_real(1e-9 * w.min),
                                "bandwidth_gb_s_max", app_json_real(1e-9 * w.max)), path);
}

int bench_kernels_json(const bench_kernels *k, int n, const char *path) {
    json_t *all = json_array();
    for (int i = 0; i < n; i++)
        for (size_t j = 0; j < k[i].n; j++) {
            const bm_kernel_time *t = &k[i].time[j];
            json_array_append_new(all, json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:s, s:o, s:o}",
                "level", k[i].machine.level, "kernel", t->kernel, "type", has_weights(t) ? bm_dtype_name(t->type) : "",
                "arith", has_weights(t) ? arith_name(t->arith) : "", "M", t->M, "N", t->N, "K", t->K, "unit", t->unit,
                "rate",
                app_json_real(t->rate), "fraction", t->roof > 0 ? app_json_real(t->rate / t->roof) : json_null()));
        }
    return json_write(json_pack("{s:o, s:o}", "machine", json_machine(&k[n - 1].machine), "kernels", all), path);
}

/* ---- CSV ------------------------------------------------------------------------------- */

static FILE *csv_open(const char *path) {
    FILE *f = strcmp(path, "-") ? fopen(path, "w") : stdout;
    if (!f) app_error("cannot write %s: %s", path, strerror(errno));
    return f;
}

static int csv_close(FILE *f, const char *path) {
    const bool bad = ferror(f);
    if (f == stdout) return APP_OK;
    if (fclose(f) == 0 && !bad) return APP_OK;
    return app_error("cannot write %s: %s", path, strerror(errno));
}

/* In quotation marks; marks inside are doubled (RFC 4180). */
static void csv_text(FILE *f, const char *text) {
    fputc('"', f);
    for (; *text; text++) {
        if (*text == '"') fputc('"', f);
        fputc(*text, f);
    }
    fputc('"', f);
}

static void csv_machine(FILE *f, const bench_machine *m) {
    csv_text(f, m->cpu);
    fprintf(f, ",%s,%d,%s,", m->level, m->threads, m->pages);
}

/* work, batch: decode and how many texts at once, or prefill and how many tokens. */
static int csv_gpu(const bench_result *r, const char *path) {
    FILE *f = csv_open(path);
    if (!f) return APP_FAILED;
    fputs("model,type,work,batch,tok_s,roof_tok_s,fraction,copy_gb_s,product_tflops,commit,driver,cuda\n", f);
    for (int i = 0; i < r->n_lines; i++) {
        const bench_line *l = &r->line[i];
        const bool prefill = l->kind == BENCH_PREFILL;
        csv_text(f, r->model);
        fprintf(f, ",%s,%s,%d,%.1f,%.1f,%.4f", bm_dtype_name(r->type), prefill ? "prefill" : "decode", prefill ? l->steps : l->n,
                bench_summarize(&l->rate).median, roof(r, l), share(r, l));
        fprintf(f, ",%.1f,%.1f,%s,%s,%s\n", 1e-9 * bench_summarize(&r->bandwidth).median,
                1e-12 * bench_summarize(&r->peak).median, BENCH_COMMIT, r->machine.driver, r->machine.cuda);
    }
    return csv_close(f, path);
}

int bench_csv(const bench_result *r, const char *path) {
    if (r->machine.gpu) return csv_gpu(r, path);
    FILE *f = csv_open(path);
    if (!f) return APP_FAILED;
    fputs("machine,level,threads,pages,version,model,type,arith,line,tokens,tok_s,tok_s_min,tok_s_max,"
          "bytes_per_token,gb_s,gflop_s,roof_tok_s,fraction,experts_per_layer,bandwidth_gb_s,peak_gflop_s,"
          "peak_memory_mb,rounds", f);
    for (int k = 0; k < BM_STAGE_COUNT; k++) fprintf(f, ",%s", bm_stage_name((bm_stage)k));
    fputs(",waiting\n", f);
    for (int i = 0; i < r->n_lines; i++) {
        const bench_line *l = &r->line[i];
        const bench_summary s = bench_summarize(&l->rate);
        char name[32];
        line_name(name, l);
        csv_machine(f, &r->machine);
        fprintf(f, "%s,", bm_version());
        csv_text(f, r->model);
        fprintf(f, ",%s,%s,%s,%.0f,%.2f,%.2f,%.2f", bm_dtype_name(r->type), arith_name(r->arith), name, tokens(l),
                s.median, s.min, s.max);
        fprintf(f, ",%.0f,%.3f,%.2f,%.2f,%.4f,%.3f", l->bytes / tokens(l), 1e-9 * l->bytes / tokens(l) * s.median,
                1e-9 * l->ops / tokens(l) * s.median, roof(r, l), bench_summarize(&l->fraction).median, experts(l));
        fprintf(f, ",%.3f,%.1f,%.1f,%d", 1e-9 * bench_summarize(&r->bandwidth).median,
                1e-9 * bench_summarize(&r->peak).median, 1e-6 * r->peak_memory, r->rounds);
        for (int k = 0; k < BM_STAGE_COUNT; k++) fprintf(f, ",%.4f", stage_share(l, l->times.stage[k]));
        fprintf(f, ",%.4f\n", stage_share(l, l->times.waiting));
    }
    return csv_close(f, path);
}

int bench_bandwidth_csv(const bench_machine *m, const bench_series *s, const char *path) {
    const bench_summary w = bench_summarize(s);
    FILE *f = csv_open(path);
    if (!f) return APP_FAILED;
    fputs("machine,level,threads,pages,line,bandwidth_gb_s,bandwidth_gb_s_min,bandwidth_gb_s_max,rounds\n", f);
    csv_machine(f, m);
    fprintf(f, "bandwidth,%.3f,%.3f,%.3f,%d\n", 1e-9 * w.median, 1e-9 * w.min, 1e-9 * w.max, s->n);
    return csv_close(f, path);
}

int bench_kernels_csv(const bench_kernels *k, int n, const char *path) {
    FILE *f = csv_open(path);
    if (!f) return APP_FAILED;
    fputs("machine,level,threads,pages,version,kernel,type,arith,M,N,K,unit,rate,fraction\n", f);
    for (int i = 0; i < n; i++)
        for (size_t j = 0; j < k[i].n; j++) {
            const bm_kernel_time *t = &k[i].time[j];
            csv_machine(f, &k[i].machine);
            fprintf(f, "%s,%s,%s,%s,%d,%d,%d,%s/s,%.4e,", bm_version(), t->kernel,
                    has_weights(t) ? bm_dtype_name(t->type) : "", has_weights(t) ? arith_name(t->arith) : "", t->M,
                    t->N, t->K, t->unit, t->rate);
            if (t->roof > 0) fprintf(f, "%.4f", t->rate / t->roof);
            fputc('\n', f);
        }
    return csv_close(f, path);
}
