/* src/text/cut.c - texts in pieces that are tokenized alone.  Room: text.
 *
 * In: part of a text.  Out: places where it may be cut.  A place stands before white space that follows something
 * else: the GPT-2 pattern always ends a word there, nothing composes across it in NFC, and no added token may reach
 * over it. */
#include "text/parts.h"

static bool is_space(uint8_t b) { return b == ' ' || (b >= '\t' && b <= '\r'); }

/* Last bytes of the characters that the pattern takes for white space, and of many others. */
static bool may_end_space(uint8_t b) {
    return is_space(b) || (b >= 0x80 && b <= 0x8a) || b == 0x9f || b == 0xa0 || b == 0xa8 || b == 0xa9 || b == 0xaf;
}

bool bm_words_part(const char *s, size_t at) { return is_space((uint8_t)s[at]) && !may_end_space((uint8_t)s[at - 1]); }

/* Might an added token begin before `at` and end after it? */
static bool token_over(const bm_vocab *v, const char *s, size_t n, size_t at) {
    for (size_t i = 0; i < v->n; i++) {
        const struct bm_vocab_token *t = &v->token[i];
        if (t->kind < BM_TOKEN_ADDED) continue;
        for (size_t j = 1; j < t->n && j <= at; j++) {
            const size_t behind = n - at < t->n - j ? n - at : t->n - j;
            if (t->text[j] == s[at] && !memcmp(s + at - j, t->text, j) && !memcmp(s + at, t->text + j, behind))
                return true;
        }
    }
    return false;
}

bool bm_text_cuts(const bm_tokenizer *t, const char *s, size_t n, size_t at) {
    const bm_vocab *v = bm_tokenizer_vocab(t);
    if (v->prefix_space && s[at] != ' ') return false;  /* the piece would get one of its own */
    return bm_words_part(s, at) && !token_over(v, s, n, at);
}

size_t bm_text_bad(const char *s, size_t n) {
    size_t bad = 0, len;
    for (size_t i = 0; (i += bm_utf8_valid(s + i, n - i)) < n; i += len, bad++)
        bm_utf8_look((const uint8_t *)s + i, n - i, &len);
    return bad;
}
