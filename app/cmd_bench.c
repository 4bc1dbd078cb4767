/* cmd_bench.c - blackmamba bench: how fast this machine reads, multiplies and runs a model.  Room: app.
 *
 * In: a model, a preset or none.  Out: tokens a second of decode, prefill and batches beside the
 * bandwidth and the arithmetic peak that bound them.  All are measured in turn, round by round, and the
 * medians reported, so a machine that slows down slows them all. */
#include "bench.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
    const char *model, *device, *preset, *prompt, *batch, *json, *csv;
    int type, gen, rounds, threads, arith, vram;
    bool type_given, gen_given, bandwidth, kernels;
} o = {.device = "cpu", .type = BM_BF16, .prompt = "512", .gen = 128, .rounds = 5, .batch = "1,4,16,32"};

static const app_option options[] = {
    APP_MODEL(&o.model),
    {0, "preset", NULL, "NAME|FILE", APP_TEXT, &o.preset, 0, 0, NULL,
     "random weights of this configuration, made in memory for the time of the run; as for init"},
    {0, "type", NULL, APP_DTYPES, APP_CHOICE, &o.type, 0, 0, &o.type_given, "type of their matrices (bf16)"},
    {0, "prompt", NULL, "N,N,...", APP_TEXT, &o.prompt, 0, 0, NULL, "tokens of prefill in a round (512)"},
    {0, "gen", NULL, "N", APP_INT, &o.gen, 1, 1 << 20, &o.gen_given, "tokens of decode in a round (128; 256 on a GPU)"},
    {0, "batch", NULL, "N,N,...", APP_TEXT, &o.batch, 0, 0, NULL,
     "texts decoded at once, up to 32 tokens each (on a GPU as many as --gen says); 0: none (1,4,16,32)"},
    {'r', "rounds", NULL, "N", APP_INT, &o.rounds, 1, BENCH_ROUNDS, NULL, "rounds; the medians are reported (5)"},
    {0, "bandwidth", NULL, NULL, APP_FLAG, &o.bandwidth, 0, 0, NULL,
     "only the bandwidth of reading memory, over 1 GiB"},
    {0, "kernels", NULL, NULL, APP_FLAG, &o.kernels, 0, 0, NULL,
     "only each operation by itself, at each instruction set of this machine"},
    APP_DEVICE(&o.device),
    APP_VRAM(&o.vram),
    APP_THREADS(&o.threads),
    APP_ARITH(&o.arith, "native"),
    {0, "json", NULL, "FILE", APP_TEXT, &o.json, 0, 0, NULL, "write one JSON object; -: instead of the table"},
    {0, "csv", NULL, "FILE", APP_TEXT, &o.csv, 0, 0, NULL,
     "write lines for bench/MACHINE.csv, on a GPU with columns of their own; -: instead of the table"},
    {0},
};

static const size_t WINDOW = (size_t)1 << 30;
enum { MOST_TEXTS = 1024, MOST_PROMPT = 1 << 24, BATCH_STEPS = 32, PIECE = 2048, GPU_PIECE = 8192, GPU_STEPS = 256 };

static bool table_wanted(void) { return !((o.json && !strcmp(o.json, "-")) || (o.csv && !strcmp(o.csv, "-"))); }

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bench_summary bench_summarize(const bench_series *s) {
    bench_series t = *s;
    if (!t.n) return (bench_summary){0};
    qsort(t.v, (size_t)t.n, sizeof *t.v, ascending);
    const double median = t.n % 2 ? t.v[t.n / 2] : 0.5 * (t.v[t.n / 2 - 1] + t.v[t.n / 2]);
    return (bench_summary){median, t.v[0], t.v[t.n - 1]};
}

static void series_add(bench_series *s, double x) { if (s->n < BENCH_ROUNDS) s->v[s->n++] = x; }

/* ---- one pass of a line ---------------------------------------------------------------- */

typedef struct bench {
    app_engine e;
    bench_result r;
    bm_token *ids;              /* of text i from i on */
    bm_input *in; bm_token *next; int *slots;       /* one for each text of the largest batch */
    bool gpu;                   /* each text is fed the token it gave */
    int piece;                  /* tokens of a long prompt fed at once */
    bool timed;                 /* this pass counts */
} bench;

static bm_status feed(bench *b, int from, int n, bool last) {
    bm_input in = {.tokens = b->ids + from, .n = (size_t)n, .want = last ? BM_WANT_LAST : BM_WANT_NONE};
    if (app_interrupt()) return BM_ECANCELLED;
    return bm_forward(b->e.session, &in, 1);
}

/* Seconds of n tokens at once; a prompt of more than two pieces is fed in pieces, the odd one second. */
static bm_status prefill_pass(bench *b, bench_line *l, int n, double *seconds) {
    bm_status s = bm_state_set(b->e.session, 0, NULL);
    const int piece = b->piece;
    const bool pieces = n > 2 * piece;
    const double start = app_seconds();
    double mark = start;
    for (int at = 0; !s && at < n; ) {
        const int odd = n % piece, take = !pieces ? n : at == piece && odd ? odd : piece;
        mark = app_seconds();
        s = feed(b, at, take, at + take == n);
        const double spent = app_seconds() - mark;
        if (pieces && b->timed && at == 0) {
            series_add(&l->first, spent / take);
            b->r.memory_first = bench_memory("VmRSS:");
        }
        at += take;
        if (pieces && b->timed && at == n) series_add(&l->last, spent / take);
    }
    *seconds = app_seconds() - start;
    if (pieces && b->timed) b->r.memory_last = bench_memory("VmRSS:");
    return s;
}

/* Seconds of so many steps of n texts, a token each; the step before them is not counted.  A processor is given tokens
 * without pattern and asked for logits; a GPU chooses the tokens, which is part of the time, and where stages are not looked
 * at the next step is under way while a token is told. */
static bm_status decode_pass(bench *b, const bench_line *l, double *seconds) {
    bm_status s = BM_OK;
    double start = 0;
    bm_times forget;
    for (int i = 0; !s && i < l->n; i++) {
        s = bm_state_set(b->e.session, i, NULL);
        b->in[i] = (bm_input){.slot = i, .tokens = &b->next[i], .n = 1, .want = b->gpu ? BM_WANT_BEST : BM_WANT_LAST};
        b->next[i] = b->ids[i * BATCH_STEPS];
        b->slots[i] = i;
    }
    for (int step = -1; !s && step < l->steps; step++) {
        if (step == 0) {
            bm_session_times(b->e.session, &forget);
            start = app_seconds();
        }
        for (int i = 0; !b->gpu && i < l->n; i++) b->next[i] = b->ids[1 + step + i * BATCH_STEPS];
        if (app_interrupt()) s = BM_ECANCELLED;
        else if (b->gpu && b->timed && step >= 0) s = bm_next(b->e.session, b->slots, l->n);
        else s = bm_forward(b->e.session, b->in, l->n);
        for (int i = 0; !s && b->gpu && i < l->n; i++) b->next[i] = bm_best(b->e.session, i);
    }
    if (!s && b->gpu) s = bm_forward(b->e.session, NULL, 0);        /* the last step ends */
    *seconds = app_seconds() - start;
    return s;
}

double bench_roof_seconds(const bench_line *l, double bandwidth, double peak) {
    if (l->kind == BENCH_PREFILL) return l->ops / peak;
    const double reading = (l->bytes + l->moved) / bandwidth, computing = l->kind == BENCH_BATCH ? l->ops / peak : 0;
    return reading > computing ? reading : computing;
}

static double tokens_of(const bench_line *l) { return l->kind == BENCH_PREFILL ? l->steps : (double)l->n * l->steps; }

/* Once without the clock: caches warm, stages, bytes read, operations. */
static bm_status line_profile(bench *b, bench_line *l) {
    const bm_config *c = bm_model_config(b->e.model);
    const double head = 2.0 * c->d_model * c->n_vocab, token = (double)b->r.info.flops_per_token;
    const int part = l->steps < b->piece ? l->steps : b->piece;     /* of a long prompt the beginning */
    double seconds, share = 1;
    bm_times t;
    bm_session_times(b->e.session, &t);
    bm_status s = l->kind == BENCH_PREFILL ? prefill_pass(b, l, part, &seconds) : decode_pass(b, l, &seconds);
    if (l->kind == BENCH_PREFILL) share = (double)l->steps / part;
    bm_session_times(b->e.session, &l->times);
    l->bytes = share * (double)l->times.weight_bytes;
    if (b->gpu) l->moved = 2 * tokens_of(l) * (double)b->r.info.state_bytes;
    l->ops = tokens_of(l) * token - (l->kind == BENCH_PREFILL ? (l->steps - 1) * head : 0);
    return s;
}

static bm_status bandwidth_once(bench *b, bench_series *w) {
    double x = 0;
    bm_status s = app_interrupt() ? BM_ECANCELLED : bm_device_bandwidth(b->e.device, WINDOW, 3, &x);
    series_add(w, x);
    return s;
}

static bm_status peaks_once(bench *b, double *peak) {
    double f32 = 0;
    bm_status s = bm_device_peak(b->e.device, (bm_arith)o.arith, b->r.type, peak);
    if (!s) s = bm_device_peak(b->e.device, BM_ARITH_F32, BM_F32, &f32);
    series_add(&b->r.peak, *peak);
    series_add(&b->r.peak_f32, f32);
    return s;
}

/* Bandwidth before and after each line that it bounds, the peak after prefill.  A batch is bounded by both. */
static bm_status round_run(bench *b) {
    bench_series w = {.n = 0};
    double peak = 0;
    bm_status s = bandwidth_once(b, &w);
    for (int i = 0; !s && i < b->r.n_lines; i++) {
        bench_line *l = &b->r.line[i];
        const bool prefill = l->kind == BENCH_PREFILL;
        double seconds;
        s = prefill ? prefill_pass(b, l, l->steps, &seconds) : decode_pass(b, l, &seconds);
        if (!s) s = prefill ? peaks_once(b, &peak) : bandwidth_once(b, &w);
        if (s) break;
        const double bandwidth = prefill ? 0 : 0.5 * (w.v[w.n - 2] + w.v[w.n - 1]);
        series_add(&l->rate, tokens_of(l) / seconds);
        series_add(&l->fraction, bench_roof_seconds(l, bandwidth, peak) / seconds);
    }
    series_add(&b->r.bandwidth, bench_summarize(&w).median);
    return s;
}

/* ---- a model --------------------------------------------------------------------------- */

/* A line of that kind for each number of a list. */
static int lines_add(bench_result *r, bench_kind kind, const char *option, const char *list, int most) {
    for (const char *p = list; ; p++) {
        char word[16];
        long long n = 0;
        const size_t length = strcspn(p, ",");
        snprintf(word, sizeof word, "%.*s", (int)(length < 15 ? length : 15), p);
        if (!app_number_int(word, &n) || n < 1 || n > most)
            return app_usage(&app_bench, "--%s: found '%s', expected numbers from 1 to %d with commas between", option, word,
                             most);
        if (r->n_lines == BENCH_LINES)
            return app_usage(&app_bench, "--%s: found more than %d lines to measure, expected fewer", option, BENCH_LINES);
        const bool batch = kind == BENCH_BATCH;
        r->line[r->n_lines++] = (bench_line){.kind = kind, .n = batch ? (int)n : 1, .steps = batch ? BATCH_STEPS : (int)n};
        p += length;
        if (!*p) return APP_OK;
    }
}

static int lines_make(bench_result *r) {
    r->line[r->n_lines++] = (bench_line){.kind = BENCH_DECODE, .n = 1};
    int code = lines_add(r, BENCH_PREFILL, "prompt", o.prompt, MOST_PROMPT);
    if (!code && strcmp(o.batch, "0")) code = lines_add(r, BENCH_BATCH, "batch", o.batch, MOST_TEXTS);
    r->prompt = r->line[1].steps;
    return code;
}

/* What depends on the device: how many tokens a pass decodes, how many rows go through at once. */
static void lines_fit(bench *b) {
    bench_machine_ask(&b->r.machine, b->e.device);
    b->gpu = b->r.machine.gpu;
    b->piece = b->gpu ? GPU_PIECE : PIECE;
    if (b->gpu && !o.gen_given) o.gen = GPU_STEPS;
    b->r.gen = o.gen;
    for (int i = 0; i < b->r.n_lines; i++) {
        bench_line *l = &b->r.line[i];
        if (l->kind == BENCH_DECODE) l->steps = o.gen;
        if (l->kind == BENCH_BATCH) l->steps = b->gpu || o.gen < BATCH_STEPS ? o.gen : BATCH_STEPS;
    }
}

static int session_open(bench *b, int texts, int longest) {
    const int most = longest > texts ? longest : texts;
    const bm_session_options p = {.slots = texts, .arith = (bm_arith)o.arith,
                                  .chunk = !b->gpu || o.vram ? 0 : most < GPU_PIECE ? most : GPU_PIECE};
    bm_status s = bm_session_bytes(b->e.model, &p, &b->r.session_bytes);
    if (!s) s = bm_session_open(&b->e.session, b->e.model, &p);
    return s ? app_failed(s) : APP_OK;
}

static int most_texts(const bench_result *r) {
    int n = 1;
    for (int i = 0; i < r->n_lines; i++) if (r->line[i].n > n) n = r->line[i].n;
    return n;
}

/* Ids without pattern, so that the experts are used as by a mixed text. */
static int ids_make(bench *b) {
    const int texts = most_texts(&b->r);
    int longest = 512;
    for (int i = 0; i < b->r.n_lines; i++) {
        const bench_line *l = &b->r.line[i];
        if (l->kind == BENCH_PREFILL && l->steps > longest) longest = l->steps;
    }
    size_t n = (size_t)(longest > o.gen ? longest : o.gen) + 1 + (size_t)texts * BATCH_STEPS;
    uint32_t x = 1, V = (uint32_t)bm_model_config(b->e.model)->n_vocab;
    b->ids = malloc(n * sizeof *b->ids);
    b->in = calloc((size_t)texts, sizeof *b->in);
    b->next = calloc((size_t)texts, sizeof *b->next);
    b->slots = calloc((size_t)texts, sizeof *b->slots);
    if (!b->ids || !b->in || !b->next || !b->slots) return app_error("out of memory: %zu ids", n);
    for (size_t i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        b->ids[i] = (bm_token)((x >> 8) % V);
    }
    return session_open(b, texts, longest);
}

/* The type of most weights. */
static bm_dtype type_of(const bm_model *m, const bm_info *info) {
    double bytes[BM_DTYPE_COUNT] = {0};
    int best = 0;
    for (uint64_t i = 0; i < info->tensors; i++) {
        bm_tensor_info t;
        size_t n = 1;
        if (bm_model_tensor(m, i, &t)) continue;
        for (int d = 0; d < t.n_dims; d++) n *= (size_t)t.dim[d];
        bytes[t.type] += (double)bm_dtype_bytes(t.type, n);
    }
    for (int t = 1; t < BM_DTYPE_COUNT; t++) if (bytes[t] > bytes[best]) best = t;
    return (bm_dtype)best;
}

/* The last part of a path, without what names its form. */
static void name_of(char *out, size_t size, const char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    size_t at = n;
    while (at && path[at - 1] != '/') at--;
    snprintf(out, size, "%.*s", (int)(n - at), path + at);
    char *dot = strrchr(out, '.');
    if (dot && (!strcmp(dot, ".gguf") || !strcmp(dot, ".json"))) *dot = 0;
}

/* A preset's random weights in a file that vanishes as soon as it is open. */
static int preset_open(bench *b) {
    static bm_config c;
    char folder[512], path[600];
    bm_info info;
    int code = app_config_read(&c, o.preset);
    if (code) return code;
    bm_config_info(&c, (bm_dtype)o.type, &info);
    snprintf(folder, sizeof folder, "%.400s/blackmamba-bench-XXXXXX", bench_folder((double)info.weight_bytes));
    if (!mkdtemp(folder))
        return app_error("cannot make the folder %s: %s; name another with TMPDIR", folder, strerror(errno));
    snprintf(path, sizeof path, "%s/random.gguf", folder);
    app_progress progress = app_progress_start("making weights", true);
    bm_status s = bm_init(&c, 0, (bm_dtype)o.type, path, NULL, app_progress_step, &progress);
    app_progress_end(&progress);
    code = s ? app_failed(s) : app_engine_open_within(&b->e, path, o.device, o.threads, o.vram, most_texts(&b->r));
    unlink(path);
    rmdir(folder);
    return code;
}

static int report(const bench_result *r) {
    int code = APP_OK;
    if (table_wanted()) bench_print(r);
    if (o.json) code = bench_json(r, o.json);
    if (!code && o.csv) code = bench_csv(r, o.csv);
    return code;
}

static int lines_run(bench *b) {
    bm_status s = feed(b, 0, b->r.prompt < 512 ? b->r.prompt : 512, false);      /* every page of the file once */
    if (!s) s = bm_session_profile(b->e.session, true);
    for (int i = 0; !s && i < b->r.n_lines; i++) s = line_profile(b, &b->r.line[i]);
    if (!s) s = bm_session_profile(b->e.session, false);
    b->r.peak_memory = bench_memory("VmHWM:");
    b->r.anonymous_memory = bench_memory("RssAnon:");
    bench_machine_ask(&b->r.machine, b->e.device);
    b->timed = true;
    for (int i = 0; !s && i < o.rounds; i++) s = round_run(b);
    bm_model_pages(b->e.model, &b->r.pages);
    return s ? app_failed(s) : APP_OK;
}

static int model_run(void) {
    static bench b;
    bench_result *r = &b.r;
    *r = (bench_result){.arith = o.arith, .rounds = o.rounds};
    int code = lines_make(r);
    if (code) return code;
    app_catch_interrupts();
    code = o.preset ? preset_open(&b) : app_engine_open_within(&b.e, o.model, o.device, o.threads, o.vram, most_texts(r));
    if (!code) {
        bm_model_info(b.e.model, &r->info);
        r->type = type_of(b.e.model, &r->info);
        name_of(r->model, sizeof r->model, o.preset ? o.preset : b.e.path);
        lines_fit(&b);
        code = ids_make(&b);
    }
    if (!code) code = lines_run(&b);
    if (!code) code = report(r);
    app_engine_close(&b.e);
    free(b.ids);
    free(b.in);
    free(b.next);
    free(b.slots);
    return code;
}

/* ---- without a model ------------------------------------------------------------------- */

static int bandwidth_run(void) {
    bm_device *d = NULL;
    bench_machine m;
    bench_series w = {.n = 0};
    bm_status s = bm_device_open(&d, o.device, o.threads);
    for (int i = 0; !s && i < o.rounds; i++) {
        double rate = 0;
        s = bm_device_bandwidth(d, WINDOW, 1, &rate);
        series_add(&w, rate);
    }
    if (s) {
        if (d) bm_device_close(d);
        return app_failed(s);
    }
    bench_machine_ask(&m, d);
    const bench_summary sum = bench_summarize(&w);
    if (table_wanted())
        printf("reading memory: %.2f GB/s, %.2f to %.2f (%s, 1 GiB, median of %d)\n", 1e-9 * sum.median, 1e-9 * sum.min,
               1e-9 * sum.max, bm_device_name(d), w.n);
    int code = o.json ? bench_bandwidth_json(&m, &w, o.json) : APP_OK;
    if (!code && o.csv) code = bench_bandwidth_csv(&m, &w, o.csv);
    bm_device_close(d);
    return code;
}

static bool kernel_keep(void *user, const bm_kernel_time *t) {
    bench_kernels *k = user;
    if (app_interrupt() || !app_grow(&k->time, k->n, sizeof *k->time)) return false;
    k->time[k->n++] = *t;
    if (!table_wanted()) return true;
    bench_kernel_print(k, k->n - 1);
    return app_flush() == APP_OK;
}

static int kernels_run(void) {
    static const char *const level[] = {"cpu:scalar", "cpu:avx2", "cpu:avx512", "cpu:neon"};
    enum { LEVELS = sizeof level / sizeof *level };
    bench_kernels k[LEVELS] = {{.n = 0}};
    int n = 0, code = APP_OK;
    app_catch_interrupts();
    for (int i = 0; !code && i < LEVELS; i++) {
        bm_device *d;
        bm_status s = bm_device_open(&d, level[i], o.threads);
        if (s == BM_ENOSUPPORT || s == BM_EARG) continue;       /* this machine or this build lacks it */
        if (s) {
            code = app_failed(s);
            break;
        }
        bench_machine_ask(&k[n].machine, d);
        s = bm_device_kernels(d, kernel_keep, &k[n++]);
        bm_device_close(d);
        if (s) code = app_flush() ? APP_FAILED : app_failed(s);     /* nobody reads on: told at the end */
    }
    if (!code && o.json) code = bench_kernels_json(k, n, o.json);
    if (!code && o.csv) code = bench_kernels_csv(k, n, o.csv);
    for (int i = 0; i < n; i++) free(k[i].time);
    return code;
}

/* That a result can be written, before minutes are spent on it. */
static int output_try(const char *path) {
    if (!path || !strcmp(path, "-")) return APP_OK;
    const bool there = app_path_exists(path);
    FILE *f = fopen(path, "a");
    if (!f) return app_error("cannot write %s: %s", path, strerror(errno));
    fclose(f);
    if (!there) unlink(path);
    return APP_OK;
}

static int run(char **operand) {
    (void)operand;
    if (o.bandwidth && o.kernels) return app_usage(&app_bench, "--bandwidth and --kernels: expected one of them");
    if ((o.bandwidth || o.kernels) && (o.model || o.preset))
        return app_usage(&app_bench, "--%s measures no model; -m and --preset measure the rest",
                         o.bandwidth ? "bandwidth" : "kernels");
    if (o.model && o.preset) return app_usage(&app_bench, "-m and --preset: expected one of them");
    if (o.type_given && !o.preset)
        return app_usage(&app_bench, "--type goes with --preset; a model has its types, "
                                     "'blackmamba convert' makes others");
    if (o.json && o.csv && !strcmp(o.json, "-") && !strcmp(o.csv, "-"))
        return app_usage(&app_bench, "--json and --csv: only one of them can be standard output");
    int code = output_try(o.json);
    if (!code) code = output_try(o.csv);
    if (code) return code;
    return o.bandwidth ? bandwidth_run() : o.kernels ? kernels_run() : model_run();
}

const app_command app_bench = {
    "bench", "[-m MODEL | --preset NAME|FILE [--type TYPE] | --bandwidth | --kernels] [--prompt N,N,...] [--gen N] "
    "[--batch N,N,...] [-r N] [-t N] [--arith native|f32] [--json FILE] [--csv FILE]",
    "Measures the speed of a model and of this machine.",
    "Decode reads every weight a token uses once, so its roof is the bandwidth of reading memory over these bytes; a "
    "batch reads the experts its texts chose together. Prefill is products, so its roof is the arithmetic peak. "
    "Bandwidth and peak are measured between the lines. Without -m or --preset the bundled model is measured.",
    options, 0, run,
};
