/* tests/fuzz/fuzz_tokenizer.c - tokenizer.json, tokenizer_config.json and texts of any bytes.
 *
 * In: up to three parts, a byte 0 between them: tokenizer.json, a text, tokenizer_config.json.  Whatever
 * opens must encode the text to known ids, decode them, stream them, and survive being written and read. */
#include <stdlib.h>
#include "file/file.h"
#include "text/text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool good) { if (!good) abort(); }

static void read_text(const bm_tokenizer *t, const char *text, size_t n) {
    bm_token *ids;
    char *s, *streamed;
    size_t k, n_s, at = 0, len;
    bm_utf8 u = {0};
    if (bm_tokenize(t, text, n, false, &ids, &k)) return;
    for (size_t i = 0; i < k; i++) must(bm_token_known(t, ids[i]));
    if (bm_detokenize(t, ids, k, false, true, &s, &n_s) == BM_OK) {
        streamed = malloc(3 * n_s + 12 + 3 * k);
        for (size_t i = 0; streamed && i < k; i++) {
            const char *b = bm_token_bytes(t, ids[i], &len);
            char *piece = malloc(3 * len + 12);
            if (!piece) break;
            size_t got = bm_utf8_push(&u, b, len, piece);
            must(at + got <= n_s);
            for (size_t c = 0; c < got; c++) streamed[at++] = piece[c];
            free(piece);
        }
        if (streamed) {
            at += bm_utf8_flush(&u, streamed + at);
            must(at == n_s);
            for (size_t c = 0; c < at; c++) must(streamed[c] == s[c]);
        }
        free(streamed);
        bm_free(s);
    }
    bm_free(ids);
}

static void write_and_read(const bm_tokenizer *t) {
    char *json, *config;
    size_t n, n_config;
    bm_tokenizer *again;
    if (bm_tokenizer_to_json(t, &json, &n, &config, &n_config)) return;
    bm_status st = bm_vocab_parse(&again, json, n, "json", config, n_config, "config");
    must(st == BM_OK || st == BM_EMEMORY);
    if (again) must(bm_tokenizer_size(again) == bm_tokenizer_size(t) && bm_tokenizer_bos(again) == bm_tokenizer_bos(t));
    bm_tokenizer_close(again);
    bm_free(json);
    bm_free(config);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *part[3];
    size_t n[3] = {0}, at = 0;
    for (int i = 0; i < 3; i++) {
        part[i] = (const char *)data + at;
        while (at < size && (i == 2 || data[at])) { at++; n[i]++; }
        if (at < size) at++;
    }
    bm_tokenizer *t;
    if (bm_vocab_parse(&t, part[0], n[0], "json", n[2] ? part[2] : NULL, n[2], "config")) {
        must(t == NULL && bm_error()[0]);
        return 0;
    }
    read_text(t, part[1], n[1]);
    read_text(t, (const char *)data, size);
    write_and_read(t);
    bm_tokenizer_close(t);
    return 0;
}
