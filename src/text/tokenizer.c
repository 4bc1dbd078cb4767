/* src/text/tokenizer.c - text to ids and back.  Room: text.
 *
 * In: a vocabulary, then texts or ids.  Out: ids or texts, as Hugging Face's tokenizers gives them for
 * normalizer NFC or none, pre-tokenizer ByteLevel with the GPT-2 pattern, model BPE.  One difference is meant:
 * added tokens decode to their text, whatever letters it has (there, one written wholly in the ByteLevel
 * alphabet turns into the bytes of its letters: "<\u00e9>" into an ill-formed byte).
 *
 * A tokenizer never changes once open: several threads may use it at once. */
#include "text/parts.h"
#include <stdlib.h>

struct bm_tokenizer {
    bm_vocab v;
    bm_index index;
    bm_bpe bpe;
    bm_match raw, normalized;
    pcre2_code *words;
    char *bytes;                        /* of all tokens, one after the other */
    size_t *begin;                      /* by id, n + 1 */
    size_t longest;                     /* text of a token, bytes */
};

/* ---- open and close ------------------------------------------------------------------- */

static bm_status check_token(const bm_vocab *v, bm_token id, const char *what, const char *name) {
    if (id < 0 || ((size_t)id < v->n && v->token[id].kind != BM_TOKEN_UNUSED)) return BM_OK;
    return bm_fail(BM_EFORMAT, "%s: %s is %d, expected the id of a token", name, what, (int)id);
}

static bm_status check_vocab(const bm_vocab *v, const char *name) {
    for (size_t i = 0; i < v->n; i++) {
        const struct bm_vocab_token *t = &v->token[i];
        if (t->kind == BM_TOKEN_UNUSED) continue;
        if (bm_utf8_valid(t->text, t->n) != t->n)
            return bm_fail(BM_EFORMAT, "%s: token %zu is not valid UTF-8, expected text", name, i);
        if (t->kind >= BM_TOKEN_ADDED && t->n == 0)
            return bm_fail(BM_EFORMAT, "%s: added token %zu is empty, expected at least one character", name, i);
    }
    BM_TRY(check_token(v, v->bos, "bos_token", name));
    BM_TRY(check_token(v, v->eos, "eos_token", name));
    BM_TRY(check_token(v, v->pad, "pad_token", name));
    if (v->add_bos && v->bos < 0)
        return bm_fail(BM_EFORMAT, "%s: add_bos_token is true and bos_token is missing, expected both or neither",
                       name);
    return BM_OK;
}

/* Bytes of each token: normal ones through the alphabet, where one is wholly in it. */
static bm_status lay_out_bytes(bm_tokenizer *t) {
    const bm_vocab *v = &t->v;
    size_t total = 0;
    for (size_t i = 0; i < v->n; i++) {
        total += v->token[i].n;
        if (v->token[i].n > t->longest) t->longest = v->token[i].n;
    }
    BM_TRY(bm_alloc(&t->bytes, total + 1, "bytes of tokens"));
    BM_TRY(bm_alloc(&t->begin, (v->n + 1) * sizeof *t->begin, "bytes of tokens"));
    for (size_t i = 0, at = 0; i < v->n; i++) {
        const struct bm_vocab_token *k = &v->token[i];
        size_t n = k->n;
        bool plain = k->kind != BM_TOKEN_NORMAL || !bm_alphabet_read(k->text, k->n, t->bytes + at, &n);
        if (plain && k->n) memcpy(t->bytes + at, k->text, n = k->n);
        t->begin[i] = at;
        at += n;
        t->begin[i + 1] = at;
    }
    return BM_OK;
}

static bm_status build(bm_tokenizer *t, const char *name) {
    bm_token byte[256];
    BM_TRY(bm_index_open(&t->index, &t->v, name));
    BM_TRY(lay_out_bytes(t));
    for (int b = 0; b < 256; b++) {
        char c = (char)b, s[4];
        byte[b] = bm_index_find(&t->index, s, bm_alphabet_write(&c, 1, s));
    }
    BM_TRY(bm_bpe_open(&t->bpe, &t->v, byte));
    BM_TRY(bm_match_open(&t->raw, &t->v, true));
    BM_TRY(bm_match_open(&t->normalized, &t->v, false));
    return bm_words_open(&t->words);
}

bm_status bm_tokenizer_from_vocab(bm_tokenizer **out, bm_vocab *v, const char *name) {
    bm_tokenizer *t;
    *out = NULL;
    while (v->n && v->token[v->n - 1].kind == BM_TOKEN_UNUSED) v->n--;
    BM_TRY(check_vocab(v, name));
    BM_TRY(bm_alloc(&t, sizeof *t, "a tokenizer"));
    t->v = *v;
    bm_status st = build(t, name);
    if (st) {
        memset(&t->v, 0, sizeof t->v);          /* still the caller's */
        bm_tokenizer_close(t);
        return st;
    }
    memset(v, 0, sizeof *v);
    v->bos = v->eos = v->pad = -1;
    *out = t;
    return BM_OK;
}

void bm_tokenizer_close(bm_tokenizer *t) {
    if (!t) return;
    pcre2_code_free(t->words);
    bm_match_close(&t->raw);
    bm_match_close(&t->normalized);
    bm_bpe_close(&t->bpe);
    bm_index_close(&t->index);
    bm_vocab_free(&t->v);
    free(t->bytes);
    free(t->begin);
    free(t);
}

/* ---- text to ids ---------------------------------------------------------------------- */

typedef struct job {                    /* one call of bm_tokenize */
    const bm_tokenizer *t;
    pcre2_match_data *md;
    bm_bpe_work *merging;
    bm_text mended, normal, spaced, word;
    bm_ids ids;
} job;

/* The word is a token as it is (the option ignore_merges). */
static bm_status whole_word(job *j, const char *s, size_t n, bm_token *id) {
    *id = -1;
    if (n > j->t->longest) return BM_OK;
    BM_TRY(bm_grow(&j->word.s, &j->word.cap, 2 * n, 1, "a word"));
    *id = bm_index_find(&j->t->index, j->word.s, bm_alphabet_write(s, n, j->word.s));
    return BM_OK;
}

/* Normalized text without added tokens. */
static bm_status encode_words(job *j, const char *s, size_t n) {
    if (n == 0) return BM_OK;
    if (j->t->v.prefix_space && s[0] != ' ') {
        j->spaced.n = 0;
        BM_TRY(bm_text_put(&j->spaced, " ", 1));
        BM_TRY(bm_text_put(&j->spaced, s, n));
        s = j->spaced.s;
        n = j->spaced.n;
    }
    for (size_t at = 0, end; at < n; at = end) {
        bm_token id = -1;
        BM_TRY(bm_words_next(j->t->words, j->md, s, n, at, &end));
        if (j->t->v.ignore_merges) BM_TRY(whole_word(j, s + at, end - at, &id));
        if (id >= 0) BM_TRY(bm_ids_put(&j->ids, id));
        else BM_TRY(bm_bpe_word(&j->t->bpe, &j->merging, s + at, end - at, &j->ids));
    }
    return BM_OK;
}

/* Raw text without the tokens that are matched in raw text. */
static bm_status encode_normalized(job *j, const char *s, size_t n) {
    size_t at = 0, begin, end;
    bm_token id;
    if (j->t->v.nfc) {
        j->normal.n = 0;
        BM_TRY(bm_nfc(&j->normal, s, n));
        s = j->normal.s;
        n = j->normal.n;
    }
    for (; bm_match_next(&j->t->normalized, s, n, at, &begin, &end, &id); at = end) {
        BM_TRY(encode_words(j, s + at, begin - at));
        BM_TRY(bm_ids_put(&j->ids, id));
    }
    return encode_words(j, s + at, n - at);
}

static bm_status encode(job *j, const char *s, size_t n) {
    size_t at = 0, begin, end;
    bm_token id;
    if (n == 0) return BM_OK;
    if (bm_utf8_valid(s, n) != n) {
        BM_TRY(bm_utf8_mend(&j->mended, s, n));
        s = j->mended.s;
        n = j->mended.n;
    }
    for (; bm_match_next(&j->t->raw, s, n, at, &begin, &end, &id); at = end) {
        if (begin > at) BM_TRY(encode_normalized(j, s + at, begin - at));
        BM_TRY(bm_ids_put(&j->ids, id));
    }
    return n > at ? encode_normalized(j, s + at, n - at) : BM_OK;
}

bm_status bm_tokenize(const bm_tokenizer *t, const char *text, size_t n, bool add_bos, bm_token **ids, size_t *n_ids) {
    job j = {.t = t};
    bm_status st;
    *ids = NULL;
    *n_ids = 0;
    if (add_bos && t->v.bos < 0)
        return bm_fail(BM_EARG, "the tokenizer has no BOS token to begin the text with; leave it out or name one "
                       "(bos_token) in tokenizer_config.json");
    j.md = pcre2_match_data_create(1, NULL);
    if (!j.md) return bm_fail_memory(64, "splitting a text into words");
    st = bm_grow(&j.ids.id, &j.ids.cap, n / 4 + 8, sizeof *j.ids.id, "token ids");
    if (st == BM_OK && add_bos) st = bm_ids_put(&j.ids, t->v.bos);
    if (st == BM_OK) st = encode(&j, text, n);
    pcre2_match_data_free(j.md);
    bm_bpe_work_free(j.merging);
    free(j.mended.s);
    free(j.normal.s);
    free(j.spaced.s);
    free(j.word.s);
    if (st) { free(j.ids.id); return st; }
    *ids = j.ids.id;
    *n_ids = j.ids.n;
    return BM_OK;
}

/* ---- ids to text ---------------------------------------------------------------------- */

bool bm_token_known(const bm_tokenizer *t, bm_token id) {
    return id >= 0 && (size_t)id < t->v.n && t->v.token[id].kind != BM_TOKEN_UNUSED;
}

bool bm_token_special(const bm_tokenizer *t, bm_token id) {
    return bm_token_known(t, id) && t->v.token[id].kind == BM_TOKEN_SPECIAL;
}

const char *bm_token_bytes(const bm_tokenizer *t, bm_token id, size_t *n) {
    if (!bm_token_known(t, id)) { *n = 0; return ""; }
    *n = t->begin[id + 1] - t->begin[id];
    return t->bytes + t->begin[id];
}

bm_status bm_detokenize(const bm_tokenizer *t, const bm_token *ids, size_t n_ids, bool skip_special, bool valid,
                        char **text, size_t *n) {
    bm_text all = {0}, mended = {0};
    bm_status st = bm_grow(&all.s, &all.cap, n_ids + 1, 1, "text");
    *text = NULL;
    *n = 0;
    for (size_t i = 0; i < n_ids && st == BM_OK; i++) {
        size_t len;
        const char *s = bm_token_bytes(t, ids[i], &len);
        if (!(skip_special && bm_token_special(t, ids[i]))) st = bm_text_put(&all, s, len);
    }
    if (st == BM_OK && valid && bm_utf8_valid(all.s, all.n) != all.n) {
        st = bm_utf8_mend(&mended, all.s, all.n);
        free(all.s);
        all = mended;
    }
    if (st == BM_OK) st = bm_text_put(&all, "", 1);    /* a NUL that n does not count */
    if (st) { free(all.s); return st; }
    *text = all.s;
    *n = all.n - 1;
    return BM_OK;
}

/* ---- what is known -------------------------------------------------------------------- */

bm_token bm_tokenizer_bos(const bm_tokenizer *t) { return t->v.bos; }
bm_token bm_tokenizer_eos(const bm_tokenizer *t) { return t->v.eos; }
bool bm_tokenizer_adds_bos(const bm_tokenizer *t) { return t->v.add_bos; }
size_t bm_tokenizer_size(const bm_tokenizer *t) { return t->v.n; }
const bm_vocab *bm_tokenizer_vocab(const bm_tokenizer *t) { return &t->v; }
