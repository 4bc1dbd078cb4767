/* cmd_data.c - blackmamba data pack, data stats: texts into tokens for training, and what is in them.  Room: app.
 *
 * In: texts and a tokenizer; a folder of packed data.  Out: that folder; numbers about it. */
#include "app.h"
#include <stdlib.h>
#include <string.h>

static struct {
    const char *out, *model, *tokenizer, *split, *field;
    app_texts valid_file;
    float valid;
    int valid_every, shard_tokens, threads, show;
    bool lines, verify, json, of_pack, of_stats;
} o;

static const app_option options[] = {
    {'o', "output", NULL, "DIR", APP_TEXT, &o.out, 0, 0, &o.of_pack, "pack: the folder to write, a new one"},
    {'m', "model", NULL, "MODEL", APP_TEXT, &o.model, 0, 0, &o.of_pack, "pack: take the tokenizer of this model"},
    {0, "tokenizer", NULL, "FILE", APP_TEXT, &o.tokenizer, 0, 0, &o.of_pack,
     "pack: tokenizer.json, or a folder or .gguf that holds one (the bundled model's)"},
    {0, "split", NULL, "MARKER", APP_TEXT, &o.split, 0, 0, &o.of_pack,
     "pack: MARKER stands between documents, such as '<|endoftext|>'"},
    {0, "lines", NULL, NULL, APP_FLAG, &o.lines, 0, 0, &o.of_pack, "pack: each line is a document"},
    {0, "field", NULL, "NAME", APP_TEXT, &o.field, 0, 0, &o.of_pack,
     "pack: where the text of a .jsonl row is (text); given, standard input is .jsonl too"},
    {0, "valid", NULL, "SHARE", APP_FLOAT, &o.valid, 0, 0.999, &o.of_pack,
     "pack: keep this share of the documents for validation, drawn at random, always the same (0)"},
    {0, "valid-every", NULL, "N", APP_INT, &o.valid_every, 2, 1 << 30, &o.of_pack,
     "pack: keep every N-th document for validation"},
    {0, "valid-file", NULL, "IN", APP_TEXTS, &o.valid_file, 0, 0, &o.of_pack,
     "pack: a text of its own for validation; may be given again"},
    {0, "shard-tokens", NULL, "N", APP_INT, &o.shard_tokens, 1, 0x7fffffff, &o.of_pack,
     "pack: begin another file after the document that reaches N tokens (100000000)"},
    {'t', "threads", NULL, "N", APP_INT, &o.threads, 0, 1024, &o.of_pack, "pack: threads; 0: one per processor (0)"},
    {0, "verify", NULL, NULL, APP_FLAG, &o.verify, 0, 0, &o.of_stats,
     "stats: check every file against its checksum first"},
    {0, "show", NULL, "N", APP_INT, &o.show, 0, 1000, &o.of_stats, "stats: the beginnings of N documents (0)"},
    APP_JSON(&o.json),
    {0},
};

/* ---- pack ------------------------------------------------------------------------------------------- */

static int open_tokenizer(bm_tokenizer **out) {
    char *bundled = NULL;
    const char *path = o.tokenizer ? o.tokenizer : o.model;
    if (!path) {
        const int code = app_bundled_model(&bundled);
        if (code) return code;
        path = bundled;
    }
    const bm_status s = bm_tokenizer_open(out, path);
    free(bundled);
    return s ? app_failed(s) : APP_OK;
}

static json_t *split_json(const bm_data *d, bm_split s) {
    const uint64_t tokens = bm_data_tokens(d, s), bytes = bm_data_bytes(d, s);
    json_t *ratio = tokens ? app_json_real((double)bytes / (double)tokens) : json_null();
    return json_pack("{s:I, s:I, s:I, s:o, s:I}", "tokens", (json_int_t)tokens, "documents",
                     (json_int_t)bm_data_documents(d, s), "bytes", (json_int_t)bytes, "bytes_per_token", ratio,
                     "shards", (json_int_t)bm_data_shards(d, s));
}

static int report_pack(const bm_data *d, double seconds) {
    char tokens[32], documents[32], bytes[32], valid[32];
    const uint64_t all = bm_data_bytes(d, BM_SPLIT_TRAIN) + bm_data_bytes(d, BM_SPLIT_VALID);
    if (o.json)
        return app_print_json(json_pack("{s:s, s:o, s:o, s:o}", "path", bm_data_path(d), "train",
                                        split_json(d, BM_SPLIT_TRAIN), "valid", split_json(d, BM_SPLIT_VALID),
                                        "seconds", app_json_real(seconds)));
    app_format_count(tokens, bm_data_tokens(d, BM_SPLIT_TRAIN));
    app_format_count(documents, bm_data_documents(d, BM_SPLIT_TRAIN));
    app_format_count(valid, bm_data_tokens(d, BM_SPLIT_VALID));
    app_format_bytes(bytes, (double)all);
    printf("%s: %s tokens in %s documents to train on, %s tokens for validation, from %s of text; "
           "%.1f s, %.1f MB/s\n", bm_data_path(d), tokens, documents, valid, bytes, seconds,
           (double)all / 1e6 / (seconds > 0 ? seconds : 1e-9));
    return APP_OK;
}

static int run_pack(char **operand, size_t n) {
    bm_tokenizer *t = NULL;
    bm_data *d = NULL;
    if (n == 0) return app_usage(&app_data, "pack: the texts are missing");
    if (!o.out) return app_usage(&app_data, "pack: -o DIR is missing");
    if (o.of_stats) return app_usage(&app_data, "--verify and --show are options of stats");
    if (o.lines && o.split) return app_usage(&app_data, "--lines and --split are two ways to part texts");
    if (o.model && o.tokenizer) return app_usage(&app_data, "-m and --tokenizer both name a tokenizer");
    if (o.valid > 0 && o.valid_every)
        return app_usage(&app_data, "--valid and --valid-every are two ways to choose documents");
    if (o.split && !*o.split)
        return app_usage(&app_data, "--split: found an empty marker, expected at least one character");
    int code = app_output_check(o.out, false);
    if (!code) code = open_tokenizer(&t);
    if (code) return code;
    app_progress p = app_progress_start("packing", true);
    app_catch_interrupts();
    const double start = app_seconds();
    bm_status s = bm_data_pack(&(bm_pack_options){
        .in = (const char *const *)operand, .n_in = n, .valid = o.valid_file.item, .n_valid = (size_t)o.valid_file.n,
        .out = o.out, .tokenizer = t, .split = o.split, .lines = o.lines, .field = o.field,
        .valid_share = (double)o.valid, .valid_every = (uint64_t)o.valid_every,
        .shard_tokens = (uint64_t)o.shard_tokens, .threads = o.threads, .progress = app_progress_step, .user = &p });
    const double seconds = app_seconds() - start;
    app_progress_end(&p);
    bm_tokenizer_close(t);
    if (!s) s = bm_data_open(&d, o.out);
    code = s ? app_failed(s) : report_pack(d, seconds);
    bm_data_close(d);
    return code;
}

/* ---- stats: counting ----------------------------------------------------------------------------------- */

enum { BINS = 64, TOP = 20, BAR = 50, SHOWN = 64, BLOCK = 1 << 16 };

typedef struct stats {
    bm_data *d;
    bm_tokenizer *t;
    uint64_t tokens, documents;         /* of both splits */
    uint64_t bin[BINS];                 /* documents of 2^i to 2^(i+1) - 1 tokens */
    uint64_t shortest, longest;
    uint64_t *count, used;              /* (vocabulary) */
    bm_token top[TOP]; int n_top;
} stats;

static void count_lengths(stats *z, bm_split s) {
    const uint64_t n = bm_data_documents(z->d, s);
    for (uint64_t i = 0, begin = 0; i < n; i++) {
        const uint64_t end = bm_data_document(z->d, s, i + 1), length = end > begin ? end - begin : 1;
        z->bin[63 - __builtin_clzll(length)]++;
        if (!z->shortest || length < z->shortest) z->shortest = length;
        if (length > z->longest) z->longest = length;
        begin = end;
    }
    z->documents += n;
}

static bm_status count_tokens(stats *z, bm_split s, app_progress *p) {
    bm_token block[BLOCK];
    const uint64_t n = bm_data_tokens(z->d, s);
    const uint64_t all = bm_data_tokens(z->d, BM_SPLIT_TRAIN) + bm_data_tokens(z->d, BM_SPLIT_VALID);
    for (uint64_t at = 0; at < n; ) {
        const size_t m = n - at < BLOCK ? (size_t)(n - at) : BLOCK;
        const bm_status st = bm_data_read(z->d, s, at, m, block);
        if (st) return st;
        for (size_t i = 0; i < m; i++) z->count[block[i]]++;
        at += m;
        z->tokens += m;
        if (!app_progress_step(p, z->tokens, all)) return BM_ECANCELLED;
    }
    return BM_OK;
}

/* The most frequent ones, the lower id first of equals. */
static void choose_top(stats *z) {
    for (size_t id = 0; id < bm_data_vocab(z->d); id++) {
        if (!z->count[id]) continue;
        int at = z->n_top < TOP ? z->n_top++ : TOP;
        for (; at > 0 && z->count[z->top[at - 1]] < z->count[id]; at--) if (at < TOP) z->top[at] = z->top[at - 1];
        if (at < TOP) z->top[at] = (bm_token)id;
        z->used++;
    }
}

static int count_all(stats *z) {
    app_progress p = app_progress_start("counting", false);
    z->count = calloc(bm_data_vocab(z->d), sizeof *z->count);
    if (!z->count) return app_error("out of memory: counts of %zu tokens", bm_data_vocab(z->d));
    bm_status s = BM_OK;
    for (int k = 0; k < BM_SPLITS && !s; k++) {
        count_lengths(z, (bm_split)k);
        s = count_tokens(z, (bm_split)k, &p);
    }
    app_progress_end(&p);
    choose_top(z);
    return s ? app_failed(s) : APP_OK;
}

/* ---- stats: telling -------------------------------------------------------------------------------------- */

static void print_escaped(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)s[i];
        if (c == '\n') fputs("\\n", stdout);
        else if (c == '\t') fputs("\\t", stdout);
        else if (c == '\\') fputs("\\\\", stdout);
        else if (c < ' ' || c == 0x7f) printf("\\x%02x", c);
        else putchar(c);
    }
}

static int token_text(const stats *z, const bm_token *ids, size_t n_ids, char **text, size_t *n) {
    const bm_status s = bm_detokenize(z->t, ids, n_ids, false, true, text, n);
    return s ? app_failed(s) : APP_OK;
}

static void print_split(const bm_data *d, bm_split s, const char *name) {
    char tokens[32], documents[32], bytes[32];
    const uint64_t n = bm_data_tokens(d, s), documents_n = bm_data_documents(d, s);
    app_format_count(tokens, n);
    app_format_count(documents, documents_n);
    app_format_count(bytes, bm_data_bytes(d, s));
    printf("  %-10s %15s %13s %15s %13.2f %13.1f %8zu\n", name, tokens, documents, bytes,
           n ? (double)bm_data_bytes(d, s) / (double)n : 0, documents_n ? (double)n / (double)documents_n : 0,
           bm_data_shards(d, s));
}

static void print_lengths(const stats *z) {
    uint64_t most = 1;
    char n[32], from[32], to[32];
    int first = -1, last = -1;
    for (int i = 0; i < BINS; i++) {
        if (!z->bin[i]) continue;
        if (first < 0) first = i;
        last = i;
        if (z->bin[i] > most) most = z->bin[i];
    }
    app_format_count(from, z->shortest);
    app_format_count(to, z->longest);
    printf("\ntokens of a document, separator included (shortest %s, longest %s):\n", from, to);
    for (int i = first; i >= 0 && i <= last; i++) {
        app_format_count(n, z->bin[i]);
        app_format_count(from, (uint64_t)1 << i);
        app_format_count(to, ((uint64_t)2 << i) - 1);
        printf("  %13s to %13s %12s  ", from, to, n);
        const int bar = (int)((double)z->bin[i] / (double)most * BAR + 0.999);
        for (int k = 0; k < bar; k++) putchar('#');
        putchar('\n');
    }
}

static int print_tokens(const stats *z) {
    char used[32], vocab[32], n_text[32];
    app_format_count(used, z->used);
    app_format_count(vocab, bm_data_vocab(z->d));
    printf("\nvocabulary: %s of %s ids occur, %.1f%%\nmost frequent:\n", used, vocab, 100.0 * (double)z->used /
           (double)bm_data_vocab(z->d));
    for (int i = 0; i < z->n_top; i++) {
        char *text;
        size_t n;
        const int code = token_text(z, &z->top[i], 1, &text, &n);
        if (code) return code;
        app_format_count(n_text, z->count[z->top[i]]);
        printf("  %8d %14s %6.2f%%  '", (int)z->top[i], n_text,
               100.0 * (double)z->count[z->top[i]] / (double)z->tokens);
        print_escaped(text, n);
        puts("'");
        bm_free(text);
    }
    return APP_OK;
}

/* The i-th of the documents to show: they lie evenly over all, those of validation behind. */
static int beginning(const stats *z, uint64_t i, bm_split *s, uint64_t *number, size_t *n_tokens, char **text,
                     size_t *n) {
    bm_token ids[SHOWN];
    const uint64_t train = bm_data_documents(z->d, BM_SPLIT_TRAIN), asked = (uint64_t)o.show;
    const uint64_t shown = asked < z->documents ? asked : z->documents;
    *number = z->documents / shown * i + z->documents % shown * i / shown;
    *s = *number < train ? BM_SPLIT_TRAIN : BM_SPLIT_VALID;
    if (*s == BM_SPLIT_VALID) *number -= train;
    const uint64_t at = bm_data_document(z->d, *s, *number), end = bm_data_document(z->d, *s, *number + 1);
    *n_tokens = end > at ? (size_t)(end - at) : 1;
    const size_t m = *n_tokens - 1 < SHOWN ? *n_tokens - 1 : SHOWN;
    const bm_status st = m ? bm_data_read(z->d, *s, at + 1, m, ids) : BM_OK;
    return st ? app_failed(st) : token_text(z, ids, m, text, n);
}

static int print_beginnings(const stats *z) {
    for (uint64_t i = 0; i < (uint64_t)o.show && i < z->documents; i++) {
        bm_split s;
        uint64_t number;
        size_t n_tokens, n;
        char *text;
        const int code = beginning(z, i, &s, &number, &n_tokens, &text, &n);
        if (code) return code;
        printf("%s%s %llu, %zu tokens: ", i ? "" : "\n", s ? "validation document" : "document",
               (unsigned long long)number, n_tokens);
        print_escaped(text, n);
        puts(n_tokens > SHOWN + 1 ? " ..." : "");
        bm_free(text);
    }
    return APP_OK;
}

static int print_stats(const stats *z) {
    printf("%s%s\n", bm_data_path(z->d), o.verify ? ", every checksum right" : "");
    printf("  %-10s %15s %13s %15s %13s %13s %8s\n", "split", "tokens", "documents", "bytes of text", "bytes/token",
           "tokens/doc.", "shards");
    print_split(z->d, BM_SPLIT_TRAIN, "train");
    print_split(z->d, BM_SPLIT_VALID, "valid");
    print_lengths(z);
    const int code = print_tokens(z);
    return code ? code : print_beginnings(z);
}

/* ---- stats: as JSON ---------------------------------------------------------------------------------------- */

static int json_tops(const stats *z, json_t *list) {
    for (int i = 0; i < z->n_top; i++) {
        char *text;
        size_t n;
        const int code = token_text(z, &z->top[i], 1, &text, &n);
        if (code) return code;
        json_array_append_new(list, json_pack("{s:i, s:o, s:I}", "id", (int)z->top[i], "text", json_stringn(text, n),
                                              "count", (json_int_t)z->count[z->top[i]]));
        bm_free(text);
    }
    return APP_OK;
}

static int json_beginnings(const stats *z, json_t *list) {
    for (uint64_t i = 0; i < (uint64_t)o.show && i < z->documents; i++) {
        bm_split s;
        uint64_t number;
        size_t n_tokens, n;
        char *text;
        const int code = beginning(z, i, &s, &number, &n_tokens, &text, &n);
        if (code) return code;
        json_array_append_new(list, json_pack("{s:s, s:I, s:I, s:o}", "split", s ? "valid" : "train", "document",
                                              (json_int_t)number, "tokens", (json_int_t)n_tokens, "text",
                                              json_stringn(text, n)));
        bm_free(text);
    }
    return APP_OK;
}

static int json_stats(const stats *z) {
    json_t *tops = json_array(), *shown = json_array(), *lengths = json_array();
    int code = json_tops(z, tops);
    if (!code) code = json_beginnings(z, shown);
    for (int i = 0; i < BINS && !code; i++)
        if (z->bin[i])
            json_array_append_new(lengths, json_pack("{s:I, s:I, s:I}", "from", (json_int_t)((uint64_t)1 << i), "to",
                                                     (json_int_t)(((uint64_t)2 << i) - 1), "documents",
                                                     (json_int_t)z->bin[i]));
    if (code) {
        json_decref(tops);
        json_decref(shown);
        json_decref(lengths);
        return code;
    }
    return app_print_json(json_pack("{s:s, s:b, s:o, s:o, s:I, s:I, s:i, s:I, s:I, s:o, s:o, s:o}",
        "path", bm_data_path(z->d), "verified", o.verify, "train", split_json(z->d, BM_SPLIT_TRAIN), "valid",
        split_json(z->d, BM_SPLIT_VALID), "vocabulary", (json_int_t)bm_data_vocab(z->d), "vocabulary_used",
        (json_int_t)z->used, "separator", (int)bm_data_separator(z->d), "shortest", (json_int_t)z->shortest,
        "longest", (json_int_t)z->longest, "lengths", lengths, "most_frequent", tops, "beginnings", shown));
}

static int verify(const bm_data *d) {
    app_progress p = app_progress_start("verifying", true);
    const bm_status s = bm_data_verify(d, app_progress_step, &p);
    app_progress_end(&p);
    return s ? app_failed(s) : APP_OK;
}

static int run_stats(char **operand, size_t n) {
    stats z = {0};
    if (n != 1) return app_usage(&app_data, "stats: found %zu folders, expected one", n);
    if (o.of_pack)
        return app_usage(&app_data, "stats takes --verify, --show and --json; the other options are of pack");
    app_catch_interrupts();
    bm_status s = bm_data_open(&z.d, operand[0]);
    if (!s) s = bm_tokenizer_open(&z.t, operand[0]);
    int code = s ? app_failed(s) : APP_OK;
    if (!code && bm_tokenizer_size(z.t) != bm_data_vocab(z.d))
        code = app_error("%s: found a tokenizer.json of %zu tokens, expected %zu as index.json says", operand[0],
                         bm_tokenizer_size(z.t), bm_data_vocab(z.d));
    if (!code && o.verify) code = verify(z.d);
    if (!code) code = count_all(&z);
    if (!code) code = o.json ? json_stats(&z) : print_stats(&z);
    free(z.count);
    bm_tokenizer_close(z.t);
    bm_data_close(z.d);
    return code;
}

static int run(char **operand) {
    size_t n = 0;
    while (operand[n]) n++;
    if (!strcmp(operand[0], "pack")) return run_pack(operand + 1, n - 1);
    if (!strcmp(operand[0], "stats")) return run_stats(operand + 1, n - 1);
    return app_usage(&app_data, "found '%s', expected pack or stats", operand[0]);
}

const app_command app_data = {
    "data", "pack IN... -o DIR [-m MODEL | --tokenizer FILE] [--split MARKER | --lines] [--valid SHARE | "
    "--valid-every N] [--valid-file IN]... [-t N] | stats DIR [--verify] [--show N] [--json]",
    "Turns texts into tokens for training; tells what is in them.",
    "IN are texts in UTF-8, plain or compressed with gzip, xz or zstd; - is standard input. A file is a document, "
    "unless --split or --lines parts it; of .jsonl each row is one, in its field \"text\". Before each document "
    "stands the tokenizer's end-of-text token. The same texts and options give the same files, whatever the number "
    "of threads. DIR holds the tokenizer too, and appears whole or not at all.", options, -1, run,
};
