/* cmd_bench.c - blackmamba bench: how fast this machine reads memory and runs a model.  Room: app.
 *
 * In: a model or none.  Out: reading bandwidth; tokens a second of prefill and decode, bytes a second
 * of decode and their share of the bandwidth.  All are measured in turn, round by round, and the
 * medians reported, so a machine that slows down slows them all. */
#include "app.h"
#include <stdlib.h>
#include <string.h>

static struct {
    const char *model;
    int prompt, gen, rounds, threads, arith;
    bool bandwidth, json;
} o = {.prompt = 512, .gen = 128, .rounds = 5};

static const app_option options[] = {
    APP_MODEL(&o.model),
    {0, "bandwidth", NULL, NULL, APP_FLAG, &o.bandwidth, 0, 0, NULL,
     "only the bandwidth of reading memory, over 1 GiB"},
    {0, "prompt", NULL, "N", APP_INT, &o.prompt, 1, 1 << 20, NULL, "tokens of prefill in a round (512)"},
    {0, "gen", NULL, "N", APP_INT, &o.gen, 1, 1 << 20, NULL, "tokens of decode in a round (128)"},
    {'r', "rounds", NULL, "N", APP_INT, &o.rounds, 1, 99, NULL, "rounds; the medians are reported (5)"},
    APP_THREADS(&o.threads),
    APP_ARITH(&o.arith, "native"),
    APP_JSON(&o.json),
    {0},
};

typedef struct samples { double bandwidth[99], prefill[99], decode[99]; int n; } samples;

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, ascending);
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

static const size_t WINDOW = (size_t)1 << 30;

/* ---- one round ------------------------------------------------------------------------- */

static bm_status round_run(const app_engine *e, const bm_token *ids, samples *m) {
    bm_input in = {.tokens = ids, .n = (size_t)o.prompt, .want = BM_WANT_LAST};
    bm_status s = bm_device_bandwidth(e->device, WINDOW, 3, &m->bandwidth[m->n]);
    if (!s) s = bm_state_set(e->session, 0, NULL);
    double start = app_seconds();
    if (!s) s = bm_forward(e->session, &in, 1);
    double middle = app_seconds();
    for (int i = 0; !s && i < o.gen; i++) {
        in = (bm_input){.tokens = ids + o.prompt + i, .n = 1, .want = BM_WANT_LAST};
        s = bm_forward(e->session, &in, 1);
        if (app_interrupt()) return BM_ECANCELLED;
    }
    m->prefill[m->n] = o.prompt / (middle - start);
    m->decode[m->n] = o.gen / (app_seconds() - middle);
    m->n++;
    return s;
}

static int report(const app_engine *e, samples *m) {
    bm_info info;
    bm_model_info(e->model, &info);
    double bandwidth = median(m->bandwidth, m->n), prefill = median(m->prefill, m->n), decode = median(m->decode, m->n);
    double rate = decode * (double)info.weight_bytes_per_token;
    if (o.json)
        return app_print_json(json_pack("{s:s, s:s, s:I, s:I, s:I, s:s, s:o, s:o, s:I, s:o, s:o, s:o}",
            "model", e->path, "device", bm_device_name(e->device), "prompt", (json_int_t)o.prompt, "gen",
                (json_int_t)o.gen,
            "rounds", (json_int_t)m->n, "arith", o.arith == BM_ARITH_F32 ? "f32" : "native",
            "prefill_tokens_per_s", app_json_real(prefill), "decode_tokens_per_s", app_json_real(decode),
            "bytes_per_token", (json_int_t)info.weight_bytes_per_token, "decode_bytes_per_s", app_json_real(rate),
            "bandwidth_bytes_per_s", app_json_real(bandwidth), "bandwidth_share", app_json_real(rate / bandwidth)));
    printf("device        %s, arithmetic %s, median of %d rounds\n", bm_device_name(e->device),
           o.arith == BM_ARITH_F32 ? "f32" : "native", m->n);
    printf("prefill       %10.1f tokens/s  (%d tokens)\n", prefill, o.prompt);
    printf("decode        %10.1f tokens/s  (%d tokens, %.1f MB a token)\n", decode, o.gen,
           1e-6 * (double)info.weight_bytes_per_token);
    printf("              %10.2f GB/s, %.0f%% of the bandwidth\n", 1e-9 * rate, 100 * rate / bandwidth);
    printf("bandwidth     %10.2f GB/s\n", 1e-9 * bandwidth);
    return APP_OK;
}

/* Ids without pattern, so that the experts are used as by a mixed text. */
static bm_token *ids_make(size_t n, int32_t V) {
    bm_token *ids = malloc(n * sizeof *ids);
    uint32_t x = 1;
    for (size_t i = 0; ids && i < n; i++) {
        x = x * 1664525u + 1013904223u;
        ids[i] = (bm_token)((x >> 8) % (uint32_t)V);
    }
    return ids;
}

static int model_run(void) {
    app_engine e = {0};
    samples m = {0};
    bm_token *ids = NULL;
    int code = app_engine_open(&e, o.model, o.threads);
    if (!code) code = app_engine_session(&e, o.arith, 1);
    if (code) goto out;
    ids = ids_make((size_t)o.prompt + (size_t)o.gen, bm_model_config(e.model)->n_vocab);
    if (!ids) {
        code = app_error("out of memory: %d ids", o.prompt + o.gen);
        goto out;
    }
    app_catch_interrupts();
    for (int i = 0; !code && i < o.rounds; i++) {
        bm_status s = round_run(&e, ids, &m);
        if (!s && app_interrupt()) s = BM_ECANCELLED;
        if (s) code = app_failed(s);
    }
    if (!code) code = report(&e, &m);
out:
    app_engine_close(&e);
    free(ids);
    return code;
}

static int bandwidth_run(void) {
    bm_device *d = NULL;
    double rate = 0;
    bm_status s = bm_device_open(&d, "cpu", o.threads);
    if (!s) s = bm_device_bandwidth(d, WINDOW, o.rounds, &rate);
    int code = s ? app_failed(s) : APP_OK;
    if (!code && o.json)
        code = app_print_json(json_pack("{s:s, s:o, s:I}", "device", bm_device_name(d), "bandwidth_bytes_per_s",
                                        app_json_real(rate), "bytes", (json_int_t)WINDOW));
    else if (!code) printf("reading memory: %.2f GB/s (%s, 1 GiB, median of %d)\n", 1e-9 * rate, bm_device_name(d),
                           o.rounds);
    if (d) bm_device_close(d);
    return code;
}

static int run(char **operand) {
    (void)operand;
    if (o.bandwidth && o.model) return app_usage(&app_bench,
                                                 "--bandwidth measures no model; with -m both are measured");
    return o.bandwidth ? bandwidth_run() : model_run();
}

const app_command app_bench = {
    "bench", "(--bandwidth | [-m MODEL] [--prompt N] [--gen N]) [-r N] [-t N] [--arith native|f32] [--json]",
    "Measures the speed of a model and of this machine's memory.",
    "Decode reads every weight a token uses once, so bytes a second over the bandwidth tells how much of the machine "
    "it reaches. Without -m the bundled model is measured.", options, 0, run,
};
