/* cmd_tokenizer.c - blackmamba tokenizer train: a tokenizer from texts.  Room: app.
 *
 * In: text files, the size of the vocabulary.  Out: a tokenizer.json. */
#include "app.h"
#include <string.h>

static struct {
    const char *out, *split;
    app_texts special;
    int n_vocab, min_count, threads;
    bool lines, force, json;
} o = {.min_count = 2};

static const app_option options[] = {
    {0, "vocab", NULL, "N", APP_INT, &o.n_vocab, 257, 1 << 24, NULL,
     "tokens to end with: the special ones, 256 bytes, one a merge"},
    {'o', "output", NULL, "FILE", APP_TEXT, &o.out, 0, 0, NULL, "the tokenizer.json to write"},
    {0, "special", NULL, "TOKEN", APP_TEXTS, &o.special, 0, 0, NULL,
     "a special token, ids from 0 in the order given; may be given again (<|endoftext|>)"},
    {0, "min-frequency", NULL, "N", APP_INT, &o.min_count, 1, 1 << 30, NULL,
     "merge no pair that is seen less often (2)"},
    {0, "lines", NULL, NULL, APP_FLAG, &o.lines, 0, 0, NULL, "each line is a text of its own"},
    {0, "split", NULL, "MARKER", APP_TEXT, &o.split, 0, 0, NULL,
     "the files hold several texts with MARKER between them; special tokens part texts too"},
    APP_THREADS(&o.threads),
    {0, "force", NULL, NULL, APP_FLAG, &o.force, 0, 0, NULL, "write over a file that exists"},
    APP_JSON(&o.json),
    {0},
};

typedef struct phases { app_progress reading, merging; } phases;

static bool step_reading(void *user, uint64_t done, uint64_t total) {
    return app_progress_step(&((phases *)user)->reading, done, total);
}

static bool step_merging(void *user, uint64_t done, uint64_t total) {
    phases *p = user;
    app_progress_end(&p->reading);
    if (!p->merging.what) p->merging = app_progress_start("merging", false);
    return app_progress_step(&p->merging, done, total);
}

static int report(const bm_tokenizer_train_info *i, double seconds) {
    char bytes[32], words[32], distinct[32];
    if (o.json)
        return app_print_json(json_pack("{s:I, s:I, s:I, s:I, s:I, s:o}", "tokens", (json_int_t)i->n_vocab, "merges",
            (json_int_t)i->n_merges, "bytes", (json_int_t)i->bytes, "words", (json_int_t)i->words, "distinct_words",
            (json_int_t)i->distinct, "seconds", app_json_real(seconds)));
    app_format_bytes(bytes, (double)i->bytes);
    app_format_count(words, i->words);
    app_format_count(distinct, i->distinct);
    printf("%s: %zu tokens, %zu of them merges, from %s: %s words, %s distinct; %.1f s\n", o.out, i->n_vocab,
           i->n_merges, bytes, words, distinct, seconds);
    return APP_OK;
}

static int run(char **operand) {
    bm_tokenizer_train_info info;
    phases p = {0};
    size_t n = 0;
    for (; operand[n]; n++) if (!strcmp(operand[n], "-")) operand[n] = "/dev/stdin";
    if (strcmp(operand[0], "train"))
        return app_usage(&app_tokenizer, "found '%s', expected train; 'blackmamba tokenize' turns text into ids",
                         operand[0]);
    if (!o.n_vocab) return app_usage(&app_tokenizer, "--vocab N is missing");
    if (!o.out) return app_usage(&app_tokenizer, "-o FILE is missing");
    if (o.lines && o.split) return app_usage(&app_tokenizer, "--lines and --split are two ways to part texts");
    int code = app_output_check(o.out, o.force);
    if (code) return code;
    p.reading = app_progress_start("reading", true);
    app_catch_interrupts();
    const double start = app_seconds();
    const bm_status s = bm_tokenizer_train(&(bm_tokenizer_train_options){
        .in = (const char *const *)operand + 1, .n_in = n - 1, .out = o.out, .n_vocab = (size_t)o.n_vocab,
        .special = o.special.item, .n_special = (size_t)o.special.n, .split = o.split, .lines = o.lines,
        .min_count = (uint64_t)o.min_count, .threads = o.threads, .reading = step_reading, .merging = step_merging,
        .user = &p }, &info);
    app_progress_end(&p.reading);
    app_progress_end(&p.merging);
    return s ? app_failed(s) : report(&info, app_seconds() - start);
}

const app_command app_tokenizer = {
    "tokenizer", "train IN... --vocab N -o FILE [--special TOKEN]... [--min-frequency N] [--lines | --split MARKER] "
    "[-t N] [--force] [--json]",
    "Makes a tokenizer from texts.",
    "IN are text files in UTF-8, plain or compressed with gzip, xz or zstd; - is standard input. The tokenizer is "
    "byte-level BPE, the file as Hugging Face's library writes it. The same texts and options make the same "
    "tokenizer, whatever the number of threads.", options, -2, run,
};
