/* cmd_grads.c - blackmamba grads: gradients of one batch, for conformance checks.  Room: app.
 * In: a model and a file of ids.  Out: a safetensors file. */
#include "app.h"
#include <stdlib.h>

static struct {
    const char *model, *tokens, *out;
    int threads, rows;
    bool json;
} o = {.rows = 1};

static const app_option options[] = {
    APP_MODEL(&o.model),
    {0, "tokens", NULL, "FILE", APP_TEXT, &o.tokens, 0, 0, NULL, "ids separated by white space; - is standard input"},
    {0, "rows", NULL, "B", APP_INT, &o.rows, 1, 1 << 20, NULL, "the ids are B texts of one length, one behind the other (1)"},
    {'o', "output", NULL, "OUT", APP_TEXT, &o.out, 0, 0, NULL, "the safetensors file to write"},
    APP_THREADS(&o.threads),
    APP_JSON(&o.json),
    {0},
};

static int run(char **operand) {
    bm_device *d = NULL;
    bm_token *ids = NULL;
    size_t n = 0;
    double loss = 0;
    (void)operand;
    if (!o.model || !o.tokens || !o.out)
        return app_usage(&app_grads, "%s is missing", !o.model ? "-m MODEL" : !o.tokens ? "--tokens FILE" : "-o OUT");
    int code = app_ids_read(o.tokens, &ids, &n);
    if (!code && app_path_is_folder(o.out)) code = app_error("%s: a folder of that name exists; name a file", o.out);
    bm_status s = BM_OK;
    if (!code) s = bm_device_open(&d, "cpu", o.threads);
    if (!code && !s) s = bm_grads(d, o.model, ids, n, o.rows, o.out, &loss);
    if (s) code = app_failed(s);
    if (!code && o.json)
        code = app_print_json(json_pack("{s:s, s:I, s:I, s:o}", "file", o.out, "tokens", (json_int_t)n, "rows", (json_int_t)o.rows,
                                        "loss", app_json_real(loss)));
    else if (!code) printf("loss %.7f, gradients in %s\n", loss, o.out);
    bm_device_close(d);
    free(ids);
    return code;
}

const app_command app_grads = {
    "grads", "-m MODEL --tokens FILE [--rows B] -o OUT.safetensors [-t N] [--json]",
    "Writes the loss and every gradient of one batch to a safetensors file.",
    "OUT holds train.loss and grad.NAME for each tensor of MODEL, f32.  Experts are chosen as when running.", options, 0, run,
};
