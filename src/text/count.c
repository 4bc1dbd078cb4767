/* src/text/count.c - the words of texts and how often each stands there.  Room: text.
 *
 * In: texts, in pieces of any size.  Out: every distinct word with its count.  Words are those of encoding:
 * ill-formed bytes become U+FFFD, the text is put into NFC, special tokens and markers part it and belong to no
 * word, the GPT-2 pattern splits what is left.  Memory holds the distinct words, not the text.
 *
 * A text is cut into pieces that many threads count at once, at places that change no word (cut.c).  Where pieces
 * end depends on the text alone. */
#include "text/parts.h"
#include <stdlib.h>
#include <xxhash.h>

enum { PIECE = 1 << 18, BATCH = 64 * PIECE, LONGEST_WORD = 1 << 16, LONGEST_STOP = 1000 };

typedef struct piece { size_t at, n, bad, text; } piece;

typedef struct counter {                /* of one thread */
    bm_words words;
    pcre2_match_data *md;
    bm_text mended, normal;
    uint64_t total;                     /* words */
    bm_status status; char sentence[160];
} counter;

struct bm_counts {
    bm_pool *pool;
    counter *thread; int threads;
    pcre2_code *pattern;
    bm_vocab stop; bm_match match; size_t longest;      /* what parts a text; bytes of the longest */
    bool lines;
    bm_text text; size_t cut;           /* not counted yet; of it already in pieces */
    piece *piece; size_t n_pieces, cap_pieces;
    size_t texts;                       /* ended */
    uint64_t bytes, bad; size_t first_bad;
};

/* ---- distinct words ---------------------------------------------------------------- */

static bm_status words_rehash(bm_words *w, size_t size) {
    bm_words_slot *slot;
    BM_TRY(bm_alloc(&slot, size * sizeof *slot, "words"));
    for (size_t i = 0; w->slot && i <= w->mask; i++) {
        if (!w->slot[i].number) continue;
        size_t k = w->slot[i].hash & (size - 1);
        while (slot[k].number) k = (k + 1) & (size - 1);
        slot[k] = w->slot[i];
    }
    free(w->slot);
    w->slot = slot;
    w->mask = size - 1;
    return BM_OK;
}

static bm_status words_add(bm_words *w, const char *s, size_t n, uint64_t count) {
    const uint32_t hash = (uint32_t)XXH3_64bits(s, n);
    if (!w->slot || w->n * 2 > w->mask) {
        if (w->n >= UINT32_MAX / 2) return bm_fail_memory(SIZE_MAX, "more than 2147483647 distinct words");
        BM_TRY(words_rehash(w, w->slot ? 2 * (w->mask + 1) : 1 << 12));
    }
    size_t i = hash & w->mask;
    for (; w->slot[i].number; i = (i + 1) & w->mask) {
        if (w->slot[i].hash != hash) continue;
        bm_word *known = &w->word[w->slot[i].number - 1];
        if (known->n != n || memcmp(w->text.s + known->at, s, n)) continue;
        known->count += count;
        return BM_OK;
    }
    BM_TRY(bm_grow(&w->word, &w->cap, w->n + 1, sizeof *w->word, "words"));
    const size_t at = w->text.n;
    BM_TRY(bm_text_put(&w->text, s, n));
    w->word[w->n++] = (bm_word){at, (uint32_t)n, count};
    w->slot[i] = (bm_words_slot){hash, (uint32_t)w->n};
    return BM_OK;
}

static void words_free(bm_words *w) {
    free(w->text.s);
    free(w->word);
    free(w->slot);
    memset(w, 0, sizeof *w);
}

/* ---- counting a piece -------------------------------------------------------------- */

static bm_status count_words(const bm_counts *c, counter *k, const char *s, size_t n) {
    for (size_t at = 0, end; at < n; at = end) {
        BM_TRY(bm_words_next(c->pattern, k->md, s, n, at, &end));
        k->total++;
        for (size_t from = at, len; from < end; from += len) {
            len = end - from < LONGEST_WORD ? end - from : LONGEST_WORD;
            BM_TRY(words_add(&k->words, s + from, len, 1));
        }
    }
    return BM_OK;
}

static bm_status count_piece(const bm_counts *c, counter *k, piece *p) {
    const char *s = c->text.s + p->at;
    size_t n = p->n;
    if (bm_utf8_valid(s, n) != n) {
        k->mended.n = 0;
        p->bad = bm_text_bad(s, n);
        BM_TRY(bm_utf8_mend(&k->mended, s, n));
        s = k->mended.s;
        n = k->mended.n;
    }
    k->normal.n = 0;
    BM_TRY(bm_nfc(&k->normal, s, n));
    s = k->normal.s;
    n = k->normal.n;
    for (size_t at = 0, end; at < n; at = end) {
        const char *line = c->lines ? memchr(s + at, '\n', n - at) : NULL;
        end = line ? (size_t)(line - s) + 1 : n;
        BM_TRY(count_words(c, k, s + at, end - at));
    }
    return BM_OK;
}

static void count_range(void *arg, int64_t begin, int64_t end, int thread) {
    bm_counts *c = arg;
    counter *k = &c->thread[thread];
    for (int64_t i = begin; i < end && !k->status; i++) {
        k->status = count_piece(c, k, &c->piece[i]);
        if (k->status) snprintf(k->sentence, sizeof k->sentence, "%s", bm_error());
    }
}

static bm_status count_batch(bm_counts *c) {
    bm_parallel(c->pool, (int64_t)c->n_pieces, 1, count_range, c);
    for (int i = 0; i < c->threads; i++)
        if (c->thread[i].status) return bm_fail(c->thread[i].status, "%s", c->thread[i].sentence);
    for (size_t i = 0; i < c->n_pieces; i++) {
        if (c->piece[i].bad && !c->bad) c->first_bad = c->piece[i].text;
        c->bad += c->piece[i].bad;
    }
    c->n_pieces = 0;
    if (c->cut) memmove(c->text.s, c->text.s + c->cut, c->text.n - c->cut);
    c->text.n -= c->cut;
    c->cut = 0;
    return BM_OK;
}

/* ---- cutting ----------------------------------------------------------------------- */

/* Where to cut the first PIECE bytes of s; at the beginning of a character when no place is right. */
static size_t find_cut(const bm_counts *c, const char *s) {
    for (size_t i = PIECE; c->lines && i > 0; i--) if (s[i - 1] == '\n') return i;
    for (size_t i = PIECE; i > 0; i--) if (bm_words_part(s, i)) return i;
    size_t i = PIECE;
    while (i > PIECE - 3 && ((uint8_t)s[i] & 0xC0) == 0x80) i--;
    return i;
}

/* Takes the next piece from what is not cut yet, when enough lies there to know where it ends. */
static bool next_piece(bm_counts *c, bool ended, piece *p) {
    const char *s = c->text.s + c->cut;
    const size_t n = c->text.n - c->cut, enough = PIECE + c->longest + 1;
    size_t begin, end;
    bm_token id;
    if (n == 0 || (!ended && n < enough)) return false;
    *p = (piece){c->cut, n, 0, c->texts};
    if (bm_match_next(&c->match, s, n < enough ? n : enough, 0, &begin, &end, &id) && begin <= PIECE) {
        p->n = begin;
        c->cut += end;
        return true;
    }
    if (n > PIECE) p->n = find_cut(c, s);
    c->cut += p->n;
    return true;
}

static bm_status cut_text(bm_counts *c, bool ended) {
    piece p;
    while (next_piece(c, ended, &p)) {
        if (p.n == 0) continue;
        BM_TRY(bm_grow(&c->piece, &c->cap_pieces, c->n_pieces + 1, sizeof *c->piece, "pieces of text"));
        c->piece[c->n_pieces++] = p;
    }
    return BM_OK;
}

bm_status bm_counts_add(bm_counts *c, const char *s, size_t n) {
    c->bytes += n;
    while (n) {
        const size_t room = BATCH > c->text.n ? BATCH - c->text.n : 0, k = n < room ? n : room;
        BM_TRY(bm_text_put(&c->text, s, k));
        s += k;
        n -= k;
        if (c->text.n < BATCH) continue;
        BM_TRY(cut_text(c, false));
        BM_TRY(count_batch(c));
    }
    return BM_OK;
}

bm_status bm_counts_end(bm_counts *c) {
    BM_TRY(cut_text(c, true));
    c->texts++;
    return BM_OK;
}

bm_status bm_counts_finish(bm_counts *c, bm_words **out, uint64_t *total) {
    counter *all = &c->thread[0];
    BM_TRY(count_batch(c));
    for (int i = 1; i < c->threads; i++) {
        bm_words *w = &c->thread[i].words;
        for (size_t k = 0; k < w->n; k++)
            BM_TRY(words_add(&all->words, w->text.s + w->word[k].at, w->word[k].n, w->word[k].count));
        words_free(w);
        all->total += c->thread[i].total;
    }
    *out = &all->words;
    *total = all->total;
    return BM_OK;
}

uint64_t bm_counts_bytes(const bm_counts *c) { return c->bytes; }

uint64_t bm_counts_bad(const bm_counts *c, size_t *text) {
    *text = c->first_bad;
    return c->bad;
}

/* ---- open and close ---------------------------------------------------------------- */

static bm_status open_stops(bm_counts *c, const char *const *stop, size_t n) {
    BM_TRY(bm_vocab_make(&c->stop, n, 0));
    for (size_t i = 0; i < n; i++) {
        const size_t len = strlen(stop[i]);
        if (len < 1 || len > LONGEST_STOP)
            return bm_fail(BM_EARG, "what parts texts: found '%.40s' of %zu bytes, expected 1 to %d", stop[i], len,
                           LONGEST_STOP);
        BM_TRY(bm_vocab_put(&c->stop, i, stop[i], len, BM_TOKEN_SPECIAL));
        if (c->stop.token[i].n > c->longest) c->longest = c->stop.token[i].n;
    }
    return bm_match_open(&c->match, &c->stop, true);
}

bm_status bm_counts_open(bm_counts **out, bm_pool *pool, const char *const *stop, size_t n_stop, bool lines) {
    bm_counts *c;
    *out = NULL;
    BM_TRY(bm_alloc(&c, sizeof *c, "a count of words"));
    c->pool = pool;
    c->threads = bm_pool_threads(pool);
    c->lines = lines;
    bm_status st = bm_alloc(&c->thread, (size_t)c->threads * sizeof *c->thread, "a count of words");
    if (st == BM_OK) st = open_stops(c, stop, n_stop);
    if (st == BM_OK) st = bm_words_open(&c->pattern);
    for (int i = 0; i < c->threads && st == BM_OK; i++) {
        c->thread[i].md = pcre2_match_data_create(1, NULL);
        if (!c->thread[i].md) st = bm_fail_memory(64, "splitting a text into words");
    }
    if (st) bm_counts_close(c);
    else *out = c;
    return st;
}

void bm_counts_close(bm_counts *c) {
    if (!c) return;
    for (int i = 0; c->thread && i < c->threads; i++) {
        words_free(&c->thread[i].words);
        pcre2_match_data_free(c->thread[i].md);
        free(c->thread[i].mended.s);
        free(c->thread[i].normal.s);
    }
    free(c->thread);
    pcre2_code_free(c->pattern);
    bm_match_close(&c->match);
    bm_vocab_free(&c->stop);
    free(c->text.s);
    free(c->piece);
    free(c);
}
