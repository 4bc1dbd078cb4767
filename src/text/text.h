/* src/text/text.h - the tokenizer inside the library.  Room: text (knows characters and tokens).
 *
 * In: tokenizer.json as a JSON value, or a vocabulary as plain data.  Out: bm_tokenizer of blackmamba.h.
 * Where they come from (bytes, folder, GGUF keys) is the file room's business: src/file/vocab.c. */
#ifndef BM_TEXT_H
#define BM_TEXT_H
#include "base/base.h"
#include <jansson.h>
#pragma GCC visibility push(hidden)

typedef enum bm_token_kind { BM_TOKEN_UNUSED, BM_TOKEN_NORMAL, BM_TOKEN_ADDED, BM_TOKEN_SPECIAL } bm_token_kind;

/* The common ground of tokenizer.json and GGUF's keys, in id order.  Normal tokens and merges are in
 * the ByteLevel alphabet; added and special ones are plain text, not empty.  No two texts are equal. */
typedef struct bm_vocab {
    size_t n;                   /* ids 0 .. n-1, gaps UNUSED */
    struct bm_vocab_token {
        char *text;             /* n bytes of UTF-8 and a NUL; NULL when UNUSED */
        size_t n;
        uint8_t kind;
        bool raw;               /* added, special: matched in raw text (special ones mostly), else in normalized */
    } *token;
    size_t n_merges;
    struct bm_vocab_merge { bm_token left, right, out; } *merge;       /* by rank */
    bm_token bos, eos, pad;     /* -1: none */
    bool add_bos;
    bool nfc;                   /* text is normalized to NFC */
    bool ignore_merges;         /* a word that is a token is that token */
    bool prefix_space;          /* text that begins with none gets a space */
} bm_vocab;
void bm_vocab_free(bm_vocab *v);
/* Empty, n ids all UNUSED, room for n_merges. */
bm_status bm_vocab_make(bm_vocab *v, size_t n, size_t n_merges);
/* Fills an UNUSED id; raw is set for SPECIAL. */
bm_status bm_vocab_put(bm_vocab *v, size_t id, const char *text, size_t n, bm_token_kind kind);

/* Finds tokens by text; v outlives it. */
typedef struct bm_index { const bm_vocab *v; bm_token *slot; size_t mask; } bm_index;
bm_status bm_index_open(bm_index *x, const bm_vocab *v, const char *name);     /* equal texts: BM_EFORMAT */
bm_token  bm_index_find(const bm_index *x, const char *s, size_t n);           /* -1: none */
void      bm_index_close(bm_index *x);
/* v->merge[i] from its halves, which and whose union must be tokens. */
bm_status bm_vocab_put_merge(bm_vocab *v, const bm_index *x, size_t i, const char *left, size_t n_left,
                             const char *right, size_t n_right, const char *name);

/* root: tokenizer.json, of `size` bytes, which no id exceeds.  config: tokenizer_config.json, NULL when there
 * is none.  Names are for sentences. */
bm_status bm_tokenizer_from_json(bm_tokenizer **out, const json_t *root, size_t size, const char *name,
                                 const json_t *config, const char *config_name);
bm_status bm_tokenizer_from_vocab(bm_tokenizer **out, bm_vocab *v, const char *name);  /* takes v's memory on success */
const bm_vocab *bm_tokenizer_vocab(const bm_tokenizer *t);
/* tokenizer.json and tokenizer_config.json that read back as the same vocabulary; malloc'ed. */
bm_status bm_tokenizer_to_json(const bm_tokenizer *t, char **json, size_t *n, char **config, size_t *n_config);

/* ---- train.c: a vocabulary from texts ---- */

typedef struct bm_bpe_trainer bm_bpe_trainer;
/* Of o the paths and threads are not looked at; o and pool outlive it. */
bm_status bm_bpe_trainer_open(bm_bpe_trainer **out, const bm_tokenizer_train_options *o, bm_pool *pool);
bm_status bm_bpe_trainer_add(bm_bpe_trainer *t, const char *s, size_t n);      /* more of the text, any bytes */
bm_status bm_bpe_trainer_end(bm_bpe_trainer *t);                               /* of the text */
bm_status bm_bpe_trainer_finish(bm_bpe_trainer *t, bm_tokenizer **out, bm_tokenizer_train_info *info);
void bm_bpe_trainer_close(bm_bpe_trainer *t);

/* ---- cut.c: texts in pieces ---- */

/* May a text, of which s holds n bytes, be cut before s[at], 0 < at < n?  The ids of both parts are those of the whole. */
bool   bm_text_cuts(const bm_tokenizer *t, const char *s, size_t n, size_t at);
size_t bm_text_bad(const char *s, size_t n);    /* ill-formed sequences, each of which becomes a U+FFFD */

/* ---- utf8.c ---- */

/* Turns bytes of tokens into whole characters: what is not yet a character waits. */
typedef struct bm_utf8 { uint8_t pending[4]; int n; } bm_utf8;
/* Appends to dst (room for 3*n + 12) the characters completed by src; invalid bytes become U+FFFD.
 * Returns the bytes written. */
size_t bm_utf8_push(bm_utf8 *u, const char *src, size_t n, char *dst);
size_t bm_utf8_flush(bm_utf8 *u, char *dst);    /* what still waits becomes one U+FFFD (room for 3) */

#pragma GCC visibility pop
#endif
