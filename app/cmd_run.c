/* cmd_run.c - blackmamba run: a prompt in, text out as it is written.  Room: app.
 *
 * In: a model, a prompt from the command line, a file, standard input or a terminal.  Out: text, ids
 * or JSON on standard output; seed and speeds on standard error. */
#include "app.h"
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { LENGTH = 256, TURN_LENGTH = 128 };       /* tokens written when -n is not given */

static struct {
    const char *model, *device, *tokenizer, *prompt, *file, *tokens, *session;
    int n, threads, arith, vram, top_k, window;
    float temperature, top_p, min_p, typical, repeat, presence, frequency;
    uint64_t seed;
    app_texts bias, stops;
    bool n_given, seed_given, seed_unknown, sampling_given, interactive, no_bos, ignore_eos, echo, json;
} o = {.device = "cpu", .temperature = 0.8f, .top_p = 0.95f, .typical = 1, .repeat = 1, .window = 64};

#define SAMPLING &o.sampling_given
static const app_option options[] = {
    APP_MODEL(&o.model),
    {'p', "prompt", NULL, "TEXT", APP_TEXT, &o.prompt, 0, 0, NULL, "the text to go on with"},
    {'f', "file", NULL, "FILE", APP_TEXT, &o.file, 0, 0, NULL,
     "read it from FILE; - is standard input. One line end at its end is dropped"},
    {0, "tokens", NULL, "FILE", APP_TEXT, &o.tokens, 0, 0, NULL,
     "read it as ids separated by white space, and print ids"},
    {'i', "interactive", NULL, NULL, APP_FLAG, &o.interactive, 0, 0, NULL,
     "an interactive session, as with a terminal and no prompt"},
    {'n', "n-predict", "predict", "N", APP_INT, &o.n, -1, 2147483647, &o.n_given,
     "write at most N tokens; -1: until the text ends (256; 128 a turn when interactive)"},
    {0, "temp", NULL, "T", APP_FLOAT, &o.temperature, 0, 100, SAMPLING,
     "temperature; 0: always the likeliest token (0.8)"},
    {0, "top-k", NULL, "K", APP_INT, &o.top_k, 0, 2147483647, SAMPLING, "sample among the K likeliest; 0: off (0)"},
    {0, "top-p", NULL, "P", APP_FLOAT, &o.top_p, 0, 1, SAMPLING,
     "sample among the likeliest that hold P of the probability; 1: off (0.95)"},
    {0, "min-p", NULL, "P", APP_FLOAT, &o.min_p, 0, 1, SAMPLING,
     "drop tokens less likely than P times the likeliest; 0: off (0)"},
    {0, "typical", NULL, "P", APP_FLOAT, &o.typical, 0, 1, SAMPLING, "locally typical sampling; 1: off (1)"},
    {0, "repeat-penalty", NULL, "R", APP_FLOAT, &o.repeat, 0.01, 100, SAMPLING,
     "divide positive and multiply negative logits of recent tokens; 1: off (1)"},
    {0, "presence-penalty", NULL, "A", APP_FLOAT, &o.presence, -100, 100, SAMPLING,
     "subtract A from the logits of recent tokens (0)"},
    {0, "frequency-penalty", NULL, "A", APP_FLOAT, &o.frequency, -100, 100, SAMPLING,
     "subtract A for each time a token is among the recent ones (0)"},
    {0, "repeat-last-n", "penalty-window", "N", APP_INT, &o.window, 0, 65536, SAMPLING,
     "how many tokens are recent (64)"},
    {0, "logit-bias", NULL, "ID=B", APP_TEXTS, &o.bias, 0, 0, SAMPLING,
     "add B to the logit of token ID; may be given again"},
    {'s', "seed", NULL, "S", APP_SEED, &o.seed, 0, 0, &o.seed_given,
     "seed of the random numbers; the same seed writes the same text (a new one, which is reported)"},
    {0, "stop", NULL, "S", APP_TEXTS, &o.stops, 0, 0, NULL, "stop before the text S; may be given again"},
    {0, "ignore-eos", NULL, NULL, APP_FLAG, &o.ignore_eos, 0, 0, NULL, "go on after the end-of-text token"},
    {0, "no-bos", NULL, NULL, APP_FLAG, &o.no_bos, 0, 0, NULL,
     "do not begin the text with the BOS token the tokenizer asks for"},
    {0, "session", NULL, "FILE", APP_TEXT, &o.session, 0, 0, NULL,
     "go on from FILE if it exists, with its sampling settings unless some are given; save to it at the end"},
    {0, "echo", NULL, NULL, APP_FLAG, &o.echo, 0, 0, NULL, "print the prompt too"},
    APP_TOKENIZER(&o.tokenizer),
    APP_DEVICE(&o.device),
    APP_VRAM(&o.vram),
    APP_THREADS(&o.threads),
    APP_ARITH(&o.arith, "native"),
    {0, "json", NULL, NULL, APP_FLAG, &o.json, 0, 0, NULL,
     "print one JSON object at the end instead of text as it comes"},
    {0},
};

static const char notes[] =
    "Without a prompt, standard input is read; when it is a terminal, an interactive session begins, where /help "
    "lists the commands. Without -m the bundled model runs.";

/* ---- settings -------------------------------------------------------------------------- */

static int bias_parse(bm_logit_bias **out) {
    *out = NULL;
    if (!o.bias.n) return APP_OK;
    bm_logit_bias *b = calloc((size_t)o.bias.n, sizeof *b);
    if (!b) return app_error("out of memory: %d logit biases", o.bias.n);
    for (int i = 0; i < o.bias.n; i++) {
        const char *word = o.bias.item[i], *sign = strchr(word, '=');
        char id[24] = "";
        long long v;
        double x;
        if (sign && sign - word < 24) memcpy(id, word, (size_t)(sign - word));
        if (!app_number_int(id, &v) || v < 0 || v > INT32_MAX || !app_number_float(sign + 1, &x) || x < -1e6
            || x > 1e6) {
            free(b);
            return app_usage(&app_run, "--logit-bias: found '%s', expected ID=B, an id and a number, as in 50=-2.5",
                             word);
        }
        b[i] = (bm_logit_bias){(bm_token)v, (float)x};
    }
    *out = b;
    return APP_OK;
}

static uint64_t seed_new(void) {
    uint32_t seed;
    if (getrandom(&seed, sizeof seed, 0) != sizeof seed) seed = (uint32_t)time(NULL);
    return seed;
}

static bm_sampling sampling_of(const bm_logit_bias *bias) {
    bm_sampling p = bm_sampling_default();
    p.temperature = o.temperature;
    p.top_k = o.top_k;
    p.top_p = o.top_p;
    p.min_p = o.min_p;
    p.typical_p = o.typical;
    p.repetition_penalty = o.repeat;
    p.presence_penalty = o.presence;
    p.frequency_penalty = o.frequency;
    p.penalty_window = o.window;
    p.seed = o.seed;
    p.n_bias = (size_t)o.bias.n;
    p.bias = bias;
    return p;
}

static int check(bool *interactive) {
    int prompts = (o.prompt != NULL) + (o.file != NULL) + (o.tokens != NULL);
    *interactive = o.interactive || (!prompts && isatty(STDIN_FILENO));
    if (prompts > 1) return app_usage(&app_run,
                                      "-p, -f and --tokens are three ways to give one prompt; found %d of them",
                                          prompts);
    if (*interactive && (o.file || o.tokens)) return app_usage(&app_run,
                                                               "--interactive takes its first text from -p only");
    if (*interactive && (o.json || o.echo)) return app_usage(&app_run, "%s needs a prompt: -p, -f or --tokens",
                                                             o.json ? "--json" : "--echo");
    if (!o.n_given) o.n = *interactive ? TURN_LENGTH : LENGTH;
    if (!o.seed_given) o.seed = seed_new();
    return APP_OK;
}

/* ---- prompt ---------------------------------------------------------------------------- */

typedef struct prompt { char *text; size_t n; bm_token *ids; size_t n_ids; } prompt;

static int prompt_read(prompt *p) {
    if (o.tokens) return app_ids_read(o.tokens, &p->ids, &p->n_ids);
    if (!o.prompt) {
        int code = app_read(o.file, &p->text, &p->n);
        if (!code && p->n && p->text[p->n - 1] == '\n') p->n--;
        return code;
    }
    p->text = strdup(o.prompt);
    p->n = strlen(o.prompt);
    return p->text ? APP_OK : app_error("out of memory for the prompt");
}

static int prompt_add(const app_engine *e, bm_stream *s, const prompt *p, app_turn *t, size_t *added) {
    size_t before, after;
    bm_stream_tokens(s, &before);
    *added = 0;
    if (before && !p->n && !p->n_ids) return APP_OK;    /* bytes that wait are finished by what comes */
    int code = app_turn_flush(s, t);
    if (code) return code;
    bool bos = !before && !o.no_bos && e->tokenizer && bm_tokenizer_adds_bos(e->tokenizer);
    bm_status st = o.tokens ? bm_stream_add_tokens(s, p->ids, p->n_ids) : bm_stream_add_text(s, p->text, p->n, bos);
    if (st) return app_failed(st);
    bm_stream_tokens(s, &after);
    *added = after - before;
    if (!after) return app_error("the prompt is empty and the tokenizer begins with nothing; give some text");
    if (o.echo && !o.json && !o.tokens) fwrite(p->text, 1, p->n, stdout);
    return APP_OK;
}

/* ---- report ---------------------------------------------------------------------------- */

static double per_second(size_t n, double s) { return s > 0 ? (double)n / s : 0; }

static void report(const app_engine *e, const app_turn *t, size_t added) {
    bm_page_times p;
    size_t decoded = t->n_sampled ? t->n_sampled - 1 : 0;
    if (isatty(STDOUT_FILENO) && t->last && t->last != '\n' && !t->ids) putchar('\n'), fflush(stdout);
    fprintf(stderr, "\nprompt   %7zu tokens %8.2f s %9.1f tokens/s\n", added, t->prompt_s,
            per_second(added, t->prompt_s));
    fprintf(stderr, "written  %7zu tokens %8.2f s %9.1f tokens/s\n", t->n_sampled, t->write_s,
            per_second(decoded, t->write_s));
    bm_model_pages(e->model, &p);
    if (p.pages) fprintf(stderr, "experts  %7d on the GPU in %.0f MB, %.1f%% of those chosen were there\n", p.pages,
                         1e-6 * (double)p.bytes, 100 * app_hit_rate(&p));
    fprintf(stderr, "first token after %.2f s, ended by %s, ", t->first_s, t->finish);
    if (o.seed_unknown) fputs("seed of the session\n", stderr);
    else fprintf(stderr, "seed %llu\n", (unsigned long long)o.seed);
}

static int report_json(const app_turn *t, size_t added) {
    size_t decoded = t->n_sampled ? t->n_sampled - 1 : 0;
    json_t *text = t->ids ? json_null() : json_stringn(t->text ? t->text : "", t->n_text);
    json_t *timings = json_pack("{s:o, s:o, s:o, s:o, s:o}", "prompt_s", app_json_real(t->prompt_s),
        "prompt_tokens_per_s", app_json_real(per_second(added, t->prompt_s)), "generate_s", app_json_real(t->write_s),
        "generated_tokens_per_s", app_json_real(per_second(decoded, t->write_s)), "first_token_s",
            app_json_real(t->first_s));
    return app_print_json(json_pack("{s:o, s:o, s:I, s:I, s:o, s:o, s:s}", "text", text, "tokens",
        app_json_ids(t->token, t->n_tokens), "prompt_tokens", (json_int_t)added, "generated_tokens",
        (json_int_t)t->n_sampled, "timings", timings, "seed",
        o.seed_unknown ? json_null() : json_integer((json_int_t)o.seed), "finish", t->finish));
}

/* ---- the command ----------------------------------------------------------------------- */

static int open_all(app_engine *e, bool interactive) {
    int code = app_engine_open_within(e, o.model, o.device, o.threads, o.vram, interactive ? APP_BRANCHES : 1);
    if (code) return code;
    if (!o.tokens || o.tokenizer) code = app_engine_tokenizer(e, o.tokenizer);
    else if (bm_tokenizer_open(&e->tokenizer, e->path)) e->tokenizer = NULL;    /* ids do without one */
    if (code) return code;
    return app_engine_session(e, o.arith, interactive ? APP_BRANCHES : 1);
}

static int stream_start(const app_engine *e, const bm_sampling *p, bm_stream **s) {
    bm_status st = bm_stream_open(s, e->session, 0, e->tokenizer, p);
    if (!st && o.session && app_path_exists(o.session)) {
        st = bm_stream_load(*s, o.session);
        o.seed_unknown = !o.sampling_given && !o.seed_given;
        if (!st && !o.seed_unknown) st = bm_stream_sampling(*s, p);
    }
    if (!st && o.stops.n) st = bm_stream_stops(*s, o.stops.item, o.stops.n);
    return st ? app_failed(st) : APP_OK;
}

static int write_text(const app_engine *e, bm_stream *s, const prompt *p) {
    app_turn t = {.limit = o.n, .ignore_eos = o.ignore_eos, .ids = o.tokens != NULL, .keep = o.json,
                  .unfinished = o.session != NULL};
    size_t added;
    int code = prompt_add(e, s, p, &t, &added);
    if (!code) code = app_generate(s, &t);
    if (!code) {
        if (o.json) code = report_json(&t, added);
        else report(e, &t, added);
    }
    if (!code && o.session) {
        bm_status st = bm_stream_turn(s);
        if (!st) st = bm_stream_save(s, o.session);
        if (st) code = app_failed(st);
    }
    if (!code && strcmp(t.finish, "interrupted") == 0) code = APP_CANCELLED;
    app_turn_free(&t);
    return code;
}

static int run(char **operand) {
    app_engine e = {0};
    bm_stream *s = NULL;
    bm_logit_bias *bias = NULL;
    prompt p = {0};
    bool interactive;
    (void)operand;
    int code = check(&interactive);
    if (!code) code = bias_parse(&bias);
    if (!code && !interactive) code = prompt_read(&p);
    if (!code) code = open_all(&e, interactive);
    if (code) goto out;
    bm_sampling sampling = sampling_of(bias);
    code = stream_start(&e, &sampling, &s);
    if (code) goto out;
    app_catch_interrupts();
    if (interactive) {
        bool bos = !o.no_bos && bm_tokenizer_adds_bos(e.tokenizer);
        code = app_chat_run(&(app_chat){&e, sampling, o.stops, o.n, o.ignore_eos, bos, o.prompt, o.session}, s);
    } else {
        code = write_text(&e, s, &p);
    }
out:
    if (s) bm_stream_close(s);
    app_engine_close(&e);
    free(bias);
    free(p.text);
    free(p.ids);
    free(o.bias.item);
    free(o.stops.item);
    return code;
}

const app_command app_run = {
    "run", "[-m MODEL] [-p TEXT | -f FILE | --tokens FILE] [-n N] [options]",
    "Writes text: goes on with a prompt, or talks on the terminal.", notes, options, 0, run,
};
