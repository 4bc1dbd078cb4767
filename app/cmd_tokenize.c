/* cmd_tokenize.c - blackmamba tokenize: text to ids and back.  Room: app.
 *
 * In: a tokenizer and a text, ids, or lines of JSON.  Out: ids separated by spaces, the exact bytes of
 * ids, or lines of JSON. */
#include "app.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *model, *tokenizer, *prompt, *file;
    bool decode, jsonl, no_bos, json;
} o;

static const app_option options[] = {
    APP_MODEL(&o.model),
    APP_TOKENIZER(&o.tokenizer),
    {'p', "prompt", NULL, "TEXT", APP_TEXT, &o.prompt, 0, 0, NULL, "the text (with --decode, the ids)"},
    {'f', "file", NULL, "FILE", APP_TEXT, &o.file, 0, 0, NULL, "read it from FILE, every byte; - is standard input"},
    {'d', "decode", NULL, NULL, APP_FLAG, &o.decode, 0, 0, NULL, "ids in, their exact bytes out, special tokens too"},
    {0, "jsonl", NULL, NULL, APP_FLAG, &o.jsonl, 0, 0, NULL,
     "lines {\"text\": ...} in, lines {\"ids\": [...], \"decoded\": ...} out"},
    {0, "no-bos", NULL, NULL, APP_FLAG, &o.no_bos, 0, 0, NULL,
     "do not begin with the BOS token the tokenizer asks for"},
    APP_JSON(&o.json),
    {0},
};

/* ---- text to ids ----------------------------------------------------------------------- */

static int encode(const bm_tokenizer *t, const char *text, size_t n) {
    bm_token *ids = NULL;
    size_t n_ids = 0;
    bm_status s = bm_tokenize(t, text, n, !o.no_bos && bm_tokenizer_adds_bos(t), &ids, &n_ids);
    if (s) return app_failed(s);
    int code = APP_OK;
    if (o.json) {
        code = app_print_json(json_pack("{s:o, s:I}", "ids", app_json_ids(ids, n_ids), "n", (json_int_t)n_ids));
    } else {
        for (size_t i = 0; i < n_ids; i++) printf("%s%d", i ? " " : "", (int)ids[i]);
        putchar('\n');
    }
    bm_free(ids);
    return code;
}

/* ---- ids to text ----------------------------------------------------------------------- */

static int decode(const bm_tokenizer *t, const char *text, size_t n, const char *name) {
    bm_token *ids = NULL;
    size_t n_ids = 0, n_out = 0;
    char *out = NULL;
    int code = app_ids_parse(text, n, name, &ids, &n_ids);
    if (code) return code;
    for (size_t i = 0; i < n_ids; i++) {
        if ((size_t)ids[i] < bm_tokenizer_size(t)) continue;
        code = app_error("%s: number %zu: found id %d, expected one from 0 to %zu, the tokens of this tokenizer",
                         name, i + 1,
                         (int)ids[i], bm_tokenizer_size(t) - 1);
        goto out;
    }
    bm_status s = bm_detokenize(t, ids, n_ids, false, o.json, &out, &n_out);
    if (s) code = app_failed(s);
    else if (o.json) code = app_print_json(json_pack("{s:o}", "text", json_stringn(out, n_out)));
    else fwrite(out, 1, n_out, stdout);
out:
    bm_free(out);
    free(ids);
    return code;
}

/* ---- lines of JSON --------------------------------------------------------------------- */

static int line_encode(const bm_tokenizer *t, const char *line, size_t n, const char *name, size_t number) {
    bm_token *ids = NULL;
    size_t n_ids = 0, n_out = 0;
    char *out = NULL;
    json_error_t e;
    int code = APP_OK;
    json_t *in = json_loadb(line, n, JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES, &e), *text = json_object_get(in, "text");
    if (!in) return app_error("%s: line %zu, byte %d: %s; expected {\"text\": ...}", name, number, e.position, e.text);
    if (!json_is_string(text)) {
        code = app_error("%s: line %zu: no \"text\" that is a string, expected {\"text\": ...}", name, number);
        goto out;
    }
    bm_status s = bm_tokenize(t, json_string_value(text), json_string_length(text), !o.no_bos
                              && bm_tokenizer_adds_bos(t), &ids,
                              &n_ids);
    if (!s) s = bm_detokenize(t, ids, n_ids, false, true, &out, &n_out);
    if (s) code = app_failed(s);
    else code = app_print_json(json_pack("{s:o, s:o}", "ids", app_json_ids(ids, n_ids), "decoded",
                                         json_stringn(out, n_out)));
out:
    json_decref(in);
    bm_free(ids);
    bm_free(out);
    return code;
}

static int lines_encode(const bm_tokenizer *t) {
    bool standard = !o.file || strcmp(o.file, "-") == 0;
    const char *name = standard ? "standard input" : o.file;
    FILE *f = standard ? stdin : fopen(o.file, "rb");
    char *line = NULL;
    size_t cap = 0, number = 0;
    ssize_t n;
    int code = APP_OK;
    if (!f) return app_error("cannot open %s: %s", name, strerror(errno));
    errno = 0;
    while (!code && !ferror(stdout) && (n = getline(&line, &cap, f)) >= 0) {
        number++;
        if (strspn(line, " \t\r\n") == (size_t)n) continue;
        code = line_encode(t, line, (size_t)n, name, number);
    }
    if (!code && !feof(f) && !ferror(stdout)) code = app_error("cannot read %s: %s", name, strerror(errno));
    free(line);
    if (!standard) fclose(f);
    return code;
}

/* ---- the command ----------------------------------------------------------------------- */

static int run(char **operand) {
    bm_tokenizer *t = NULL;
    char *text = NULL;
    size_t n = 0;
    (void)operand;
    if (!o.model == !o.tokenizer) return app_usage(&app_tokenize, "give -m MODEL or --tokenizer FILE, one of them");
    if (o.prompt && o.file) return app_usage(&app_tokenize, "-p and -f are two ways to give one text");
    if (o.jsonl && (o.decode || o.prompt || o.json)) return app_usage(&app_tokenize,
                                                                      "--jsonl goes with -f and --no-bos only");
    bm_status s = bm_tokenizer_open(&t, o.tokenizer ? o.tokenizer : o.model);
    if (s) return app_failed(s);
    int code = APP_OK;
    if (o.jsonl) {
        code = lines_encode(t);
    } else {
        if (!o.prompt) code = app_read(o.file, &text, &n);
        const char *in = o.prompt ? o.prompt : text, *name = o.prompt ? "--prompt" : o.file ? o.file : "standard input";
        if (o.prompt) n = strlen(o.prompt);
        if (!code) code = o.decode ? decode(t, in, n, name) : encode(t, in, n);
    }
    free(text);
    bm_tokenizer_close(t);
    return code;
}

const app_command app_tokenize = {
    "tokenize", "(-m MODEL | --tokenizer FILE) [-p TEXT | -f FILE] [--decode | --jsonl] [--no-bos] [--json]",
    "Turns text into token ids, or ids into text.",
    "Without -p and -f, standard input is read. Ids are decimal numbers separated by white space.", options, 0, run,
};
