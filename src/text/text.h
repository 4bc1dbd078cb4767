/* src/text/text.h - the tokenizer inside the library.  Room: text (knows characters and tokens).
 *
 * In: tokenizer.json's text, or a vocabulary as plain data.  Out: bm_tokenizer of blackmamba.h.
 * Where they come from (folder, GGUF keys) is the file room's business: src/file/vocab.c. */
#ifndef BM_TEXT_H
#define BM_TEXT_H
#include "base/base.h"
#pragma GCC visibility push(hidden)

typedef enum bm_token_kind { BM_TOKEN_UNUSED, BM_TOKEN_NORMAL, BM_TOKEN_ADDED, BM_TOKEN_SPECIAL } bm_token_kind;

/* The common ground of tokenizer.json and GGUF's keys, in id order.  Normal tokens and merges are in
 * the ByteLevel alphabet; added and special ones are plain text.  Added: matched in normalized text;
 * special: in raw text. */
typedef struct bm_vocab {
    size_t n;                   /* ids 0 .. n-1, gaps UNUSED */
    struct bm_vocab_token { char *text; size_t n; uint8_t kind; } *token;
    size_t n_merges;
    struct bm_vocab_merge { bm_token left, right, out; } *merge;       /* by rank */
    bm_token bos, eos, pad;     /* -1: none */
    bool add_bos;
} bm_vocab;
void bm_vocab_free(bm_vocab *v);

/* config, n_config: tokenizer_config.json, NULL when there is none.  Names are for sentences. */
bm_status bm_tokenizer_from_json(bm_tokenizer **out, const char *json, size_t n, const char *name,
                                 const char *config, size_t n_config, const char *config_name);
bm_status bm_tokenizer_from_vocab(bm_tokenizer **out, bm_vocab *v, const char *name);  /* takes v's memory on success */
const bm_vocab *bm_tokenizer_vocab(const bm_tokenizer *t);
/* tokenizer.json and tokenizer_config.json that read back as the same vocabulary; malloc'ed. */
bm_status bm_tokenizer_to_json(const bm_tokenizer *t, char **json, size_t *n, char **config, size_t *n_config);

/* Turns bytes of tokens into whole characters: what is not yet a character waits. */
typedef struct bm_utf8 { uint8_t pending[4]; int n; } bm_utf8;
/* Appends to dst (room for 3*n + 12) the characters completed by src; invalid bytes become U+FFFD.
 * Returns the bytes written. */
size_t bm_utf8_push(bm_utf8 *u, const char *src, size_t n, char *dst);
size_t bm_utf8_flush(bm_utf8 *u, char *dst);    /* what still waits becomes one U+FFFD (room for 3) */

#pragma GCC visibility pop
#endif
