/* src/text/vocab.c - the vocabulary as plain data.  Room: text.
 *
 * In: texts of tokens by id, merges as two texts.  Out: bm_vocab, an index from text to id, and the
 * ByteLevel alphabet in which normal tokens are written. */
#include "text/parts.h"
#include <stdlib.h>

/* ---- growing buffers ------------------------------------------------------------------ */

bm_status bm_text_put(bm_text *t, const void *s, size_t n) {
    uint64_t need;
    if (n == 0) return BM_OK;
    if (!bm_add(t->n, n, &need)) return bm_fail_memory(n, "text");
    BM_TRY(bm_grow(&t->s, &t->cap, need, 1, "text"));
    memcpy(t->s + t->n, s, n);
    t->n = need;
    return BM_OK;
}

bm_status bm_ids_put(bm_ids *list, bm_token id) {
    BM_TRY(bm_grow(&list->id, &list->cap, list->n + 1, sizeof *list->id, "token ids"));
    list->id[list->n++] = id;
    return BM_OK;
}

/* ---- the ByteLevel alphabet ----------------------------------------------------------- */

/* Printable Latin-1 stands for itself, the other 68 bytes for U+0100 .. U+0143 in order. */
static bool stands_for_itself(unsigned b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
}

static uint32_t letter_of(unsigned b) {
    if (stands_for_itself(b)) return b;
    if (b <= 32) return 256 + b;
    return b <= 160 ? 256 + 33 + (b - 127) : 256 + 67;         /* 127 .. 160, 173 */
}

static int byte_of(uint32_t c) {
    if (c < 256) return stands_for_itself(c) ? (int)c : -1;
    if (c <= 256 + 32) return (int)c - 256;
    if (c < 256 + 67) return (int)c - 256 - 33 + 127;
    return c == 256 + 67 ? 173 : -1;
}

size_t bm_alphabet_write(const char *bytes, size_t n, char *s) {
    size_t at = 0;
    for (size_t i = 0; i < n; i++) at += bm_utf8_put(letter_of((uint8_t)bytes[i]), s + at);
    return at;
}

bool bm_alphabet_read(const char *s, size_t n, char *bytes, size_t *n_bytes) {
    size_t at = 0;
    for (size_t i = 0, len; i < n; i += len) {
        int b = byte_of(bm_utf8_get(s + i, &len));
        if (b < 0) return false;
        bytes[at++] = (char)b;
    }
    *n_bytes = at;
    return true;
}

/* ---- vocabulary ----------------------------------------------------------------------- */

bm_status bm_vocab_make(bm_vocab *v, size_t n, size_t n_merges) {
    uint64_t tokens, merges;
    memset(v, 0, sizeof *v);
    v->bos = v->eos = v->pad = -1;
    if (n > INT32_MAX || n_merges > INT32_MAX || !bm_mul(n, sizeof *v->token, &tokens)
        || !bm_mul(n_merges, sizeof *v->merge, &merges))
        return bm_fail(BM_EFORMAT, "a vocabulary of %zu tokens and %zu merges is too large", n, n_merges);
    BM_TRY(bm_alloc(&v->token, tokens, "a vocabulary"));
    v->n = n;
    bm_status st = bm_alloc(&v->merge, merges, "merges");
    if (st) bm_vocab_free(v);
    else v->n_merges = n_merges;
    return st;
}

void bm_vocab_free(bm_vocab *v) {
    for (size_t i = 0; i < v->n; i++) free(v->token[i].text);
    free(v->token);
    free(v->merge);
    memset(v, 0, sizeof *v);
    v->bos = v->eos = v->pad = -1;
}

bm_status bm_vocab_put(bm_vocab *v, size_t id, const char *text, size_t n, bm_token_kind kind) {
    struct bm_vocab_token *t = &v->token[id];
    t->text = bm_strndup(text, n);
    if (!t->text) return BM_EMEMORY;
    t->n = n;
    t->kind = (uint8_t)kind;
    t->raw = kind == BM_TOKEN_SPECIAL;
    return BM_OK;
}

/* ---- index from text to id ------------------------------------------------------------ */

static size_t hash_text(const char *s, size_t n) {             /* FNV-1a, 64 bits */
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * 0x100000001B3u;
    return (size_t)(h ^ h >> 32);
}

static bm_token *find_slot(const bm_index *x, const char *s, size_t n) {
    size_t i = hash_text(s, n) & x->mask;
    for (; x->slot[i] >= 0; i = (i + 1) & x->mask) {
        const struct bm_vocab_token *t = &x->v->token[x->slot[i]];
        if (t->n == n && memcmp(t->text, s, n) == 0) break;
    }
    return &x->slot[i];
}

bm_status bm_index_open(bm_index *x, const bm_vocab *v, const char *name) {
    size_t size = 16;
    while (size < v->n * 2) size *= 2;
    memset(x, 0, sizeof *x);
    BM_TRY(bm_alloc(&x->slot, size * sizeof *x->slot, "an index of tokens"));
    memset(x->slot, 0xFF, size * sizeof *x->slot);
    x->mask = size - 1;
    x->v = v;
    for (size_t i = 0; i < v->n; i++) {
        const struct bm_vocab_token *t = &v->token[i];
        if (t->kind == BM_TOKEN_UNUSED) continue;
        bm_token *slot = find_slot(x, t->text, t->n);
        if (*slot >= 0) {
            bm_token first = *slot;
            bm_index_close(x);
            return bm_fail(BM_EFORMAT, "%s: tokens %d and %zu have the same text \"%.40s\", expected all to differ",
                           name, (int)first, i, t->text);
        }
        *slot = (bm_token)i;
    }
    return BM_OK;
}

bm_token bm_index_find(const bm_index *x, const char *s, size_t n) { return *find_slot(x, s, n); }

void bm_index_close(bm_index *x) {
    free(x->slot);
    memset(x, 0, sizeof *x);
}

bm_status bm_vocab_put_merge(bm_vocab *v, const bm_index *x, size_t i, const char *left, size_t n_left,
                             const char *right, size_t n_right, const char *name) {
    struct bm_vocab_merge *m = &v->merge[i];
    bm_text both = {0};
    const char *lost = NULL;
    if (memchr(left, ' ', n_left) || memchr(right, ' ', n_right))
        return bm_fail(BM_EFORMAT, "%s: merge %zu has a space inside a token, expected the ByteLevel alphabet, which "
                       "writes a space as U+0120", name, i);
    bm_status st = bm_text_put(&both, left, n_left);
    if (st == BM_OK) st = bm_text_put(&both, right, n_right);
    if (st) goto out;
    m->left = bm_index_find(x, left, n_left);
    m->right = bm_index_find(x, right, n_right);
    m->out = bm_index_find(x, both.n ? both.s : "", both.n);
    lost = m->left < 0 ? "left half" : m->right < 0 ? "right half" : m->out < 0 ? "result" : NULL;
    if (lost) st = bm_fail(BM_EFORMAT, "%s: merge %zu (\"%.*s\", \"%.*s\"): its %s is not in the vocabulary, "
                           "expected a token", name, i, (int)(n_left < 40 ? n_left : 40), left,
                           (int)(n_right < 40 ? n_right : 40), right, lost);
out:
    free(both.s);
    return st;
}
