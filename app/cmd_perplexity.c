/* cmd_perplexity.c - blackmamba perplexity: how well a model predicts a text.  Room: app.
 *
 * In: a model and a text or ids.  Out: perplexity, mean loss, their standard errors, bits per byte.
 * The ids are cut into windows of C + 1 that share none; each window gives C predictions. */
#include "app.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *model, *device, *tokenizer, *file, *tokens;
    int ctx, threads, arith;
    bool carry, no_bos, json;
} o = {.device = "cpu", .ctx = 512};

static const app_option options[] = {
    APP_MODEL(&o.model),
    {'f', "file", NULL, "TEXT", APP_TEXT, &o.file, 0, 0, NULL, "the text, every byte; - is standard input"},
    {0, "tokens", NULL, "FILE", APP_TEXT, &o.tokens, 0, 0, NULL, "ids separated by white space instead of a text"},
    {'c', "ctx", NULL, "C", APP_INT, &o.ctx, 1, 1 << 24, NULL, "predictions in a window (512)"},
    {0, "carry", NULL, NULL, APP_FLAG, &o.carry, 0, 0, NULL,
     "keep the state from window to window instead of starting each from nothing"},
    {0, "no-bos", NULL, NULL, APP_FLAG, &o.no_bos, 0, 0, NULL,
     "do not begin the text with the BOS token the tokenizer asks for"},
    APP_TOKENIZER(&o.tokenizer),
    APP_DEVICE(&o.device),
    APP_THREADS(&o.threads),
    APP_ARITH(&o.arith, "native"),
    APP_JSON(&o.json),
    {0},
};

typedef struct result {
    size_t tokens, windows, n, bytes;       /* n: predictions; bytes: of the predicted tokens */
    double sum, squares, seconds;           /* of the losses */
} result;

/* One window of n ids, n >= 2.  Carried on, the last id of the window before is still to be fed: it
 * goes first, and its prediction across the border does not count. */
static bm_status window_score(bm_session *s, const bm_token *ids, size_t n, bool carried, float *nll, result *r) {
    bm_status st = carried ? BM_OK : bm_state_set(s, 0, NULL);
    if (!st) st = bm_score(s, 0, ids - carried, n + carried, nll);
    for (size_t i = carried; !st && i + 1 < n + carried; i++) {
        r->sum += (double)nll[i];
        r->squares += (double)nll[i] * (double)nll[i];
        r->n++;
    }
    return st;
}

static int score(const app_engine *e, const bm_token *ids, size_t n, result *r) {
    size_t window = (size_t)o.ctx + 1;
    float *nll = malloc((window + 1) * sizeof *nll);
    app_progress progress = app_progress_start("perplexity", false);
    double start = app_seconds();
    bm_status s = BM_OK;
    if (!nll) return app_error("out of memory: %zu losses", window);
    r->tokens = n;
    for (size_t i = 0; !s && i + 1 < n; i += window) {
        size_t here = n - i < window ? n - i : window;
        s = window_score(e->session, ids + i, here, o.carry && i, nll, r);
        r->windows++;
        for (size_t k = i + 1; e->tokenizer && k < i + here; k++) {
            size_t bytes = 0;
            bm_token_bytes(e->tokenizer, ids[k], &bytes);
            r->bytes += bytes;
        }
        if (!s && !app_progress_step(&progress, i + here, n)) s = BM_ECANCELLED;
    }
    app_progress_end(&progress);
    free(nll);
    r->seconds = app_seconds() - start;
    return s ? app_failed(s) : APP_OK;
}

/* Standard error of the mean: sample deviation over sqrt(n); of the perplexity: exp' times that. */
static int report(const result *r) {
    double n = (double)r->n, mean = r->sum / n, spread = r->squares / n - mean * mean;
    double error = r->n > 1 && spread > 0 ? sqrt(spread / (n - 1)) : 0, ppl = exp(mean);
    double bits = r->bytes ? r->sum / (M_LN2 * (double)r->bytes) : NAN, speed = n / r->seconds;
    if (o.json)
        return app_print_json(json_pack("{s:o, s:o, s:o, s:o, s:o, s:I, s:I, s:I, s:o, s:o}",
            "perplexity", app_json_real(ppl), "perplexity_error", app_json_real(ppl * error), "loss",
                app_json_real(mean),
            "loss_error", app_json_real(error), "bits_per_byte", app_json_real(bits), "tokens", (json_int_t)r->tokens,
            "predictions", (json_int_t)r->n, "windows", (json_int_t)r->windows, "seconds", app_json_real(r->seconds),
            "tokens_per_s", app_json_real(speed)));
    printf("perplexity      %.4f +- %.4f\n", ppl, ppl * error);
    printf("mean loss       %.5f +- %.5f\n", mean, error);
    if (r->bytes) printf("bits per byte   %.4f\n", bits);
    printf("predictions     %zu in %zu windows of at most %d, of %zu tokens\n", r->n, r->windows, o.ctx, r->tokens);
    printf("speed           %.1f tokens/s\n", speed);
    return APP_OK;
}

static int text_tokenize(app_engine *e, bm_token **ids, size_t *n) {
    char *text = NULL;
    size_t bytes = 0;
    int code = app_engine_tokenizer(e, o.tokenizer);
    if (!code) code = app_read(o.file, &text, &bytes);
    if (code) return code;
    bool bos = !o.no_bos && bm_tokenizer_adds_bos(e->tokenizer);
    bm_status s = bm_tokenize(e->tokenizer, text, bytes, bos, ids, n);
    free(text);
    return s ? app_failed(s) : APP_OK;
}

static int run(char **operand) {
    app_engine e = {0};
    bm_token *ids = NULL;
    size_t n = 0;
    result r = {0};
    (void)operand;
    if (!o.model) return app_usage(&app_perplexity, "-m MODEL is missing");
    if (!o.file == !o.tokens) return app_usage(&app_perplexity,
                                               "give a text with -f or ids with --tokens, one of them");
    int code = o.tokens ? app_ids_read(o.tokens, &ids, &n) : APP_OK;
    if (!code) code = app_engine_open(&e, o.model, o.device, o.threads);
    if (!code && o.file) code = text_tokenize(&e, &ids, &n);
    if (!code && n < 2) code = app_error("%s: found %zu tokens, expected at least 2", o.file ? o.file : o.tokens, n);
    if (!code) code = app_engine_session(&e, o.arith, 1);
    if (code) goto out;
    app_catch_interrupts();
    code = score(&e, ids, n, &r);
    if (!code) code = report(&r);
out:
    app_engine_close(&e);
    if (o.file) bm_free(ids);
    else free(ids);
    return code;
}

const app_command app_perplexity = {
    "perplexity", "-m MODEL (-f TEXT | --tokens FILE) [--ctx C] [--carry] [options]",
    "Measures how well a model predicts a text.",
    "The ids are cut into windows of C + 1 that share none; each starts from nothing and gives C predictions; a "
    "shorter last one counts. With --carry each goes on from the state the one before left; the predictions are the "
    "same. Bits per byte needs a text.", options, 0, run,
};
