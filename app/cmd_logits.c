/* cmd_logits.c - blackmamba logits: the logits of every position, for conformance checks.  Room: app.
 *
 * In: a model and a file of ids.  Out: a safetensors file with `logits` (T, V) f32, row by row as they
 * are computed. */
#include "app.h"
#include <stdlib.h>

static struct {
    const char *model, *device, *tokens, *out;
    int threads, arith;
    bool json;
} o = {.device = "cpu", .arith = BM_ARITH_F32};

static const app_option options[] = {
    APP_MODEL(&o.model),
    {0, "tokens", NULL, "FILE", APP_TEXT, &o.tokens, 0, 0, NULL, "ids separated by white space; - is standard input"},
    {'o', "output", NULL, "OUT", APP_TEXT, &o.out, 0, 0, NULL, "the safetensors file to write"},
    APP_DEVICE(&o.device),
    APP_THREADS(&o.threads),
    APP_ARITH(&o.arith, "f32"),
    APP_JSON(&o.json),
    {0},
};

typedef struct rows {
    bm_writer *writer;
    app_progress progress;
    size_t row_bytes, n;
} rows;

static bm_status row_put(void *user, size_t index, const float *logits) {
    rows *r = user;
    if (!app_progress_step(&r->progress, index + 1, r->n)) return BM_ECANCELLED;
    return bm_writer_put(r->writer, logits, r->row_bytes);
}

static int write_logits(const app_engine *e, const bm_token *ids, size_t n, int64_t V) {
    bm_tensor_info info = {"logits", BM_F32, 2, {(int64_t)n, V}};
    rows r = {.progress = app_progress_start("logits", false), .row_bytes = 4 * (size_t)V, .n = n};
    bm_status s = bm_writer_open(&r.writer, o.out, &info, 1);
    if (s) return app_failed(s);
    bm_input in = {.tokens = ids, .n = n, .want = BM_WANT_ALL, .fn = row_put, .user = &r};
    s = bm_forward(e->session, &in, 1);
    if (!s) s = bm_writer_finish(&r.writer);
    app_progress_end(&r.progress);
    int code = s ? app_failed(s) : APP_OK;
    if (r.writer) bm_writer_abort(r.writer);
    return code;
}

static int run(char **operand) {
    app_engine e = {0};
    bm_token *ids = NULL;
    size_t n = 0;
    (void)operand;
    if (!o.model || !o.tokens || !o.out) return app_usage(&app_logits, "%s is missing", !o.model ? "-m MODEL" :
                                                          !o.tokens ? "--tokens FILE" : "-o OUT");
    int code = app_ids_read(o.tokens, &ids, &n);
    if (!code && !n) code = app_error("%s: found no id, expected at least one", o.tokens);
    if (!code && app_path_is_folder(o.out)) code = app_error("%s: a folder of that name exists; name a file", o.out);
    if (!code) code = app_engine_open(&e, o.model, o.device, o.threads);
    if (!code) code = app_engine_session(&e, o.arith, 1);
    if (code) goto out;
    app_catch_interrupts();
    double start = app_seconds();
    int64_t V = bm_model_config(e.model)->n_vocab;
    code = write_logits(&e, ids, n, V);
    double spent = app_seconds() - start;
    if (!code && o.json)
        code = app_print_json(json_pack("{s:s, s:I, s:I, s:o}", "file", o.out, "tokens", (json_int_t)n, "vocabulary",
                                        (json_int_t)V, "seconds", app_json_real(spent)));
    else if (!code) fprintf(stderr, "logits (%zu, %lld) f32 in %s, %.1f tokens/s\n", n, (long long)V, o.out,
                            (double)n / spent);
out:
    app_engine_close(&e);
    free(ids);
    return code;
}

const app_command app_logits = {
    "logits", "-m MODEL --tokens FILE -o OUT.safetensors [-t N] [--arith native|f32] [--json]",
    "Writes the logits of every position to a safetensors file.",
    "OUT holds one tensor, logits (T, V) f32: row i is of the token after the first i + 1 ids. No BOS is added.",
        options, 0,
    run,
};
