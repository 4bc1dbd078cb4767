/* src/text/match.c - strings of added tokens found in a text.  Room: text.
 *
 * In: the vocabulary's added and special tokens, a text.  Out: where the next one stands, leftmost, and of
 * those that begin there the longest (Aho-Corasick's LeftmostLongest in Hugging Face's library).
 *
 * Strings are sorted; the ones that share the first d bytes of the text are a range, which each further
 * byte narrows.  The first byte's ranges are a table. */
#include "text/parts.h"
#include <stdlib.h>

static int compare(const void *a, const void *b) {
    const bm_match_item *x = a, *y = b;
    int d = memcmp(x->s, y->s, x->n < y->n ? x->n : y->n);
    if (d) return d;
    if (x->n != y->n) return x->n < y->n ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* Raw tokens as they are; others as normalization leaves them, for they meet normalized text. */
static bm_status add_item(bm_match *m, const struct bm_vocab_token *t, bm_token id, bool nfc) {
    bm_match_item *item = &m->item[m->n];
    bm_text own = {0};
    *item = (bm_match_item){.s = t->text, .n = t->n, .id = id};
    m->n++;
    if (!nfc) return BM_OK;
    bm_status st = bm_nfc(&own, t->text, t->n);
    item->own = own.s;
    item->s = own.s;
    item->n = own.n;
    return st;
}

bm_status bm_match_open(bm_match *m, const bm_vocab *v, bool raw) {
    size_t count = 0;
    bm_status st;
    memset(m, 0, sizeof *m);
    for (size_t i = 0; i < v->n; i++) count += v->token[i].kind >= BM_TOKEN_ADDED && v->token[i].raw == raw;
    if (count == 0) return BM_OK;
    BM_TRY(bm_alloc(&m->item, count * sizeof *m->item, "added tokens"));
    for (size_t i = 0; i < v->n; i++) {
        if (v->token[i].kind < BM_TOKEN_ADDED || v->token[i].raw != raw) continue;
        st = add_item(m, &v->token[i], (bm_token)i, v->nfc && !raw);
        if (st) { bm_match_close(m); return st; }
    }
    qsort(m->item, m->n, sizeof *m->item, compare);
    for (size_t b = 0, i = 0; b < 257; b++) {
        while (i < m->n && (uint8_t)m->item[i].s[0] < b) i++;
        m->first[b] = (uint32_t)i;
    }
    return BM_OK;
}

void bm_match_close(bm_match *m) {
    for (size_t i = 0; i < m->n; i++) free(m->item[i].own);
    free(m->item);
    memset(m, 0, sizeof *m);
}

/* Of items [low, high), which agree on d bytes and are longer, the first whose byte d is >= b. */
static size_t lower_bound(const bm_match *m, size_t low, size_t high, size_t d, unsigned b) {
    while (low < high) {
        size_t mid = (low + high) / 2;
        if ((uint8_t)m->item[mid].s[d] < b) low = mid + 1;
        else high = mid;
    }
    return low;
}

/* The longest item that s begins with; NULL when there is none. */
static const bm_match_item *longest(const bm_match *m, const char *s, size_t n) {
    size_t low = m->first[(uint8_t)s[0]], high = m->first[(uint8_t)s[0] + 1];
    const bm_match_item *best = NULL;
    for (size_t d = 1; low < high; d++) {
        if (m->item[low].n == d) best = &m->item[low];
        while (low < high && m->item[low].n == d) low++;
        if (d == n || low == high) break;
        unsigned b = (uint8_t)s[d];
        low = lower_bound(m, low, high, d, b);
        high = lower_bound(m, low, high, d, b + 1);
    }
    return best;
}

bool bm_match_next(const bm_match *m, const char *s, size_t n, size_t at, size_t *begin, size_t *end, bm_token *id) {
    if (m->n == 0) return false;
    for (size_t i = at; i < n; i++) {
        if (m->first[(uint8_t)s[i]] == m->first[(uint8_t)s[i] + 1]) continue;
        const bm_match_item *item = longest(m, s + i, n - i);
        if (!item) continue;
        *begin = i;
        *end = i + item->n;
        *id = item->id;
        return true;
    }
    return false;
}
