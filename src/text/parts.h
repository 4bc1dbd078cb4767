/* src/text/parts.h - what the files of the text room share.  Room: text.
 *
 * In: bytes.  Out: characters (utf8.c), normalized characters (nfc.c), words (words.c), the strings of
 * added tokens (match.c), ids (bpe.c), vocabularies (vocab.c, vocab_json.c), new ones (count.c, train.c). */
#ifndef BM_TEXT_PARTS_H
#define BM_TEXT_PARTS_H
#include "text/text.h"
#include <string.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#pragma GCC visibility push(hidden)

/* ---- growing buffers ------------------------------------------------------------------ */

typedef struct bm_text { char *s; size_t n, cap; } bm_text;
typedef struct bm_ids { bm_token *id; size_t n, cap; } bm_ids;
bm_status bm_text_put(bm_text *t, const void *s, size_t n);
bm_status bm_ids_put(bm_ids *list, bm_token id);

/* ---- utf8.c --------------------------------------------------------------------------- */

typedef enum bm_utf8_kind { BM_UTF8_WHOLE, BM_UTF8_BAD, BM_UTF8_CUT } bm_utf8_kind;
/* What the n > 0 bytes at p begin with: a whole character of *len bytes, a maximal subpart of *len
 * bytes that no character continues (Unicode 15, 3.9, U+FFFD substitution), or a character cut short. */
bm_utf8_kind bm_utf8_look(const uint8_t *p, size_t n, size_t *len);
uint32_t bm_utf8_get(const char *s, size_t *len);              /* the code point at s, valid UTF-8 */
size_t bm_utf8_put(uint32_t c, char *dst);                     /* room for 4; bytes written */
size_t bm_utf8_valid(const char *s, size_t n);                 /* leading bytes that are valid */
bm_status bm_utf8_mend(bm_text *out, const char *s, size_t n); /* appends, invalid bytes as U+FFFD */

/* ---- nfc.c ---------------------------------------------------------------------------- */

bm_status bm_nfc(bm_text *out, const char *s, size_t n);       /* appends NFC of valid UTF-8; linear time */

/* ---- words.c: the GPT-2 pattern ------------------------------------------------------- */

bm_status bm_words_open(pcre2_code **out);
/* The end of the word that begins at `at` < n. */
bm_status bm_words_next(const pcre2_code *re, pcre2_match_data *md, const char *s, size_t n, size_t at, size_t *end);

/* cut.c: a word surely ends before s[at], 0 < at, whatever else the text holds; of all such places most. */
bool bm_words_part(const char *s, size_t at);

/* ---- match.c: strings of added tokens, leftmost, longest ------------------------------ */

typedef struct bm_match_item { const char *s; size_t n; char *own; bm_token id; } bm_match_item;
typedef struct bm_match { bm_match_item *item; size_t n; uint32_t first[257]; } bm_match;
bm_status bm_match_open(bm_match *m, const bm_vocab *v, bool raw);
void bm_match_close(bm_match *m);
/* From `at` on: where the next one begins and ends; false when there is none. */
bool bm_match_next(const bm_match *m, const char *s, size_t n, size_t at, size_t *begin, size_t *end, bm_token *id);

/* ---- bpe.c: merging ------------------------------------------------------------------- */

typedef struct bm_bpe_slot { uint64_t pair; uint32_t rank; } bm_bpe_slot;
typedef struct bm_bpe {
    bm_bpe_slot *slot;                  /* (left, right) -> rank, open addressing */
    size_t mask, n_merges;
    const struct bm_vocab_merge *merge;
    bm_token byte[256];                 /* -1: the vocabulary lacks it, the byte is dropped */
} bm_bpe;
typedef struct bm_bpe_work bm_bpe_work; /* memory of one call, kept from word to word */
bm_status bm_bpe_open(bm_bpe *b, const bm_vocab *v, const bm_token byte[256]);
void bm_bpe_close(bm_bpe *b);
bm_status bm_bpe_word(const bm_bpe *b, bm_bpe_work **w, const char *s, size_t n, bm_ids *out);
void bm_bpe_work_free(bm_bpe_work *w);

/* ---- count.c: distinct words of texts ------------------------------------------------- */

typedef struct bm_word { size_t at; uint32_t n; uint64_t count; } bm_word;     /* n bytes of text.s from at */
typedef struct bm_words_slot { uint32_t hash, number; } bm_words_slot;         /* number from 1; 0: free */
typedef struct bm_words {
    bm_text text;
    bm_word *word; size_t n, cap;
    bm_words_slot *slot; size_t mask;
} bm_words;

typedef struct bm_counts bm_counts;
/* Words never reach over one of the stop strings, which are not counted; of the lines nor over a line's end,
 * which belongs to its line. */
bm_status bm_counts_open(bm_counts **out, bm_pool *pool, const char *const *stop, size_t n_stop, bool lines);
bm_status bm_counts_add(bm_counts *c, const char *s, size_t n);        /* more of the text, any bytes */
bm_status bm_counts_end(bm_counts *c);                                 /* of the text: no word goes on */
/* The words, which stay c's, in no order, and how many stand in the texts. */
bm_status bm_counts_finish(bm_counts *c, bm_words **out, uint64_t *total);
uint64_t  bm_counts_bytes(const bm_counts *c);                         /* added so far */
/* Ill-formed sequences in texts counted so far, and the number of the first text with one. */
uint64_t  bm_counts_bad(const bm_counts *c, size_t *text);
void      bm_counts_close(bm_counts *c);

/* ---- vocab.c -------------------------------------------------------------------------- */

/* Bytes in the ByteLevel alphabet (GPT-2's bytes_to_unicode): s as UTF-8, room for 2 * n. */
size_t bm_alphabet_write(const char *bytes, size_t n, char *s);
/* The way back, room for n; false when s holds a character outside the alphabet. */
bool bm_alphabet_read(const char *s, size_t n, char *bytes, size_t *n_bytes);

#pragma GCC visibility pop
#endif
