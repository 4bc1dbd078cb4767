/* src/text/train.c - a vocabulary from texts: byte pair encoding, trained.  Room: text.
 *
 * In: texts.  Out: a tokenizer: special tokens first, then the 256 bytes in the order of their ByteLevel letters,
 * then one token a merge (Sennrich et al. 2016).  Merged is always the pair that stands most often in the texts;
 * of equally frequent ones that with the smallest left id, then right id: the order of Hugging Face's trainer.
 * The result is a function of the texts and the options: no hash, thread or size of a piece shows in it.
 *
 * Distinct words lie in cells, one a byte, a wall before, between and behind them.  A token fills as many cells
 * as it has bytes; the first and the last of them hold its id.  Each pair lists the places where it once stood;
 * a place counts while its two ids still do.  So a merge costs what it changes, however long a word is.  A heap
 * holds each pair once, with a count that was right when it was put there; counts only fall in between, so the
 * top is the best pair when its count still holds, and goes back with the right one when not. */
#include "text/parts.h"
#include <stdlib.h>
#include <xxhash.h>

#define NONE UINT32_MAX                 /* no token, no place; in cells: a wall */
#define GONE (UINT32_MAX - 1)           /* a cell inside a token */
#define BANNED (UINT32_MAX - 1)         /* a pair that would spell a special token */

typedef struct pair {
    uint64_t key, count, queued;        /* left id, right id; in all words; as in the heap, 0: not there */
    uint32_t place, out;                /* first of its places; what it becomes, NONE: not merged yet */
} pair;
typedef struct place { uint32_t at, word, next; } place;
typedef struct node { uint64_t count; uint32_t pair; } node;

struct bm_bpe_trainer {
    const bm_tokenizer_train_options *o;
    bm_counts *counts;
    size_t n_special; const char *const *special;

    uint32_t *cell; size_t n_cells;
    uint64_t *word_count;
    pair *pair; uint32_t *slot; size_t n_pairs, cap_pairs, mask;        /* slot: number of a pair from 1 */
    place *place; size_t n_places, cap_places; uint32_t free_place;
    node *heap; size_t n_heap, cap_heap;
    uint32_t *touched; size_t n_touched, cap_touched;   /* pairs with a larger count than before */

    bm_text bytes;                      /* of all tokens */
    size_t *begin, n_tokens, cap_tokens;/* by id, n_tokens + 1 */
    uint32_t *token_slot; size_t token_mask;            /* bytes -> id + 1 */
    struct bm_vocab_merge *merge; size_t n_merges, cap_merges;
};

/* ---- tokens ------------------------------------------------------------------------ */

static size_t token_length(const bm_bpe_trainer *t, uint32_t id) { return t->begin[id + 1] - t->begin[id]; }

static uint32_t *token_find(const bm_bpe_trainer *t, const char *s, size_t n) {
    size_t i = (size_t)XXH3_64bits(s, n) & t->token_mask;
    for (; t->token_slot[i]; i = (i + 1) & t->token_mask) {
        const uint32_t id = t->token_slot[i] - 1;
        if (token_length(t, id) == n && !memcmp(t->bytes.s + t->begin[id], s, n)) break;
    }
    return &t->token_slot[i];
}

static bm_status token_rehash(bm_bpe_trainer *t, size_t size) {
    uint32_t *slot;
    BM_TRY(bm_alloc(&slot, size * sizeof *slot, "a vocabulary"));
    free(t->token_slot);
    t->token_slot = slot;
    t->token_mask = size - 1;
    for (uint32_t id = 0; id < t->n_tokens; id++)
        if (token_length(t, id)) *token_find(t, t->bytes.s + t->begin[id], token_length(t, id)) = id + 1;
    return BM_OK;
}

/* Takes the bytes behind the last token as the next one, unless an earlier one has the same. */
static bm_status token_put(bm_bpe_trainer *t, uint32_t *id) {
    const size_t at = t->begin[t->n_tokens], n = t->bytes.n - at;
    if (2 * t->n_tokens > t->token_mask) BM_TRY(token_rehash(t, 2 * (t->token_mask + 1)));
    uint32_t *slot = token_find(t, t->bytes.s + at, n);
    if (*slot) {
        t->bytes.n = at;
        *id = *slot - 1;
        return BM_OK;
    }
    BM_TRY(bm_grow(&t->begin, &t->cap_tokens, t->n_tokens + 2, sizeof *t->begin, "a vocabulary"));
    *id = (uint32_t)t->n_tokens++;
    t->begin[t->n_tokens] = t->bytes.n;
    *slot = *id + 1;
    return BM_OK;
}

/* A special token in letters of the alphabet takes the place of the bytes these stand for, so that no merge makes
 * the same text; others take none. */
static bm_status put_special(bm_bpe_trainer *t, size_t i) {
    const char *s = t->special[i];
    size_t n = strlen(s);
    uint32_t id;
    if (bm_utf8_valid(s, n) != n)
        return bm_fail(BM_EARG, "special token %zu: found bytes that are no UTF-8, expected text", i);
    for (size_t k = 0; k < i; k++)
        if (!strcmp(s, t->special[k])) return bm_fail(BM_EARG, "special token '%.40s': found twice, expected once", s);
    BM_TRY(bm_grow(&t->bytes.s, &t->bytes.cap, t->bytes.n + n, 1, "a vocabulary"));
    if (bm_alphabet_read(s, n, t->bytes.s + t->bytes.n, &n)) {
        if (n == 1)
            return bm_fail(BM_EARG, "special token '%.40s': found the letter of a byte, expected a longer text", s);
        t->bytes.n += n;
        return token_put(t, &id);
    }
    BM_TRY(bm_grow(&t->begin, &t->cap_tokens, t->n_tokens + 2, sizeof *t->begin, "a vocabulary"));
    t->begin[++t->n_tokens] = t->bytes.n;
    return BM_OK;
}

/* Ids of the 256 bytes: by the code points of their letters. */
static bm_status put_bytes(bm_bpe_trainer *t, uint32_t id[256]) {
    uint32_t letter[256];
    char s[4];
    size_t len;
    for (int b = 0; b < 256; b++) {
        char c = (char)b;
        bm_alphabet_write(&c, 1, s);
        letter[b] = bm_utf8_get(s, &len);
    }
    for (uint32_t c = 0; c < 0x200; c++) {
        for (int b = 0; b < 256; b++) {
            char byte = (char)b;
            if (letter[b] != c) continue;
            BM_TRY(bm_text_put(&t->bytes, &byte, 1));
            BM_TRY(token_put(t, &id[b]));
        }
    }
    return BM_OK;
}

static bm_status open_tokens(bm_bpe_trainer *t, uint32_t id[256]) {
    BM_TRY(token_rehash(t, 1024));
    BM_TRY(bm_grow(&t->begin, &t->cap_tokens, 1, sizeof *t->begin, "a vocabulary"));
    t->begin[0] = 0;
    for (size_t i = 0; i < t->n_special; i++) BM_TRY(put_special(t, i));
    return put_bytes(t, id);
}

/* ---- pairs ------------------------------------------------------------------------- */

static uint64_t key_of(uint32_t left, uint32_t right) { return (uint64_t)left << 32 | right; }

static uint32_t *pair_slot(const bm_bpe_trainer *t, uint64_t key) {
    uint64_t h = key * 0x9E3779B97F4A7C15u;
    size_t i = (size_t)(h ^ h >> 29) & t->mask;
    while (t->slot[i] && t->pair[t->slot[i] - 1].key != key) i = (i + 1) & t->mask;
    return &t->slot[i];
}

static bm_status pair_get(bm_bpe_trainer *t, uint32_t left, uint32_t right, uint32_t *out) {
    if (!t->slot || 2 * t->n_pairs > t->mask) {
        const size_t size = t->slot ? 2 * (t->mask + 1) : 1 << 12;
        uint32_t *slot;
        BM_TRY(bm_alloc(&slot, size * sizeof *slot, "pairs"));
        free(t->slot);
        t->slot = slot;
        t->mask = size - 1;
        for (size_t i = 0; i < t->n_pairs; i++) *pair_slot(t, t->pair[i].key) = (uint32_t)i + 1;
    }
    uint32_t *slot = pair_slot(t, key_of(left, right));
    if (!*slot) {
        BM_TRY(bm_grow(&t->pair, &t->cap_pairs, t->n_pairs + 1, sizeof *t->pair, "pairs"));
        t->pair[t->n_pairs++] = (pair){key_of(left, right), 0, 0, NONE, NONE};
        *slot = (uint32_t)t->n_pairs;
    }
    *out = *slot - 1;
    return BM_OK;
}

/* The pair stands at cell `at` of a word from now on. */
static bm_status gain(bm_bpe_trainer *t, uint32_t left, uint32_t right, uint32_t at, uint32_t word) {
    uint32_t p, k = t->free_place;
    BM_TRY(pair_get(t, left, right, &p));
    if (k != NONE) t->free_place = t->place[k].next;
    else {
        BM_TRY(bm_grow(&t->place, &t->cap_places, t->n_places + 1, sizeof *t->place, "places of pairs"));
        if (t->n_places >= GONE) return bm_fail_memory(SIZE_MAX, "more than 4294967293 places of pairs");
        k = (uint32_t)t->n_places++;
    }
    t->place[k] = (place){at, word, t->pair[p].place};
    t->pair[p].place = k;
    t->pair[p].count += t->word_count[word];
    if (t->n_touched && t->touched[t->n_touched - 1] == p) return BM_OK;
    BM_TRY(bm_grow(&t->touched, &t->cap_touched, t->n_touched + 1, sizeof *t->touched, "pairs"));
    t->touched[t->n_touched++] = p;
    return BM_OK;
}

static void lose(bm_bpe_trainer *t, uint32_t left, uint32_t right, uint32_t word) {
    t->pair[*pair_slot(t, key_of(left, right)) - 1].count -= t->word_count[word];
}

/* ---- the heap: largest count, then smallest ids ------------------------------------ */

static bool before(const bm_bpe_trainer *t, node a, node b) {
    return a.count != b.count ? a.count > b.count : t->pair[a.pair].key < t->pair[b.pair].key;
}

static void sift_down(bm_bpe_trainer *t, node x) {
    node *h = t->heap;
    size_t i = 0;
    for (size_t kid; (kid = 2 * i + 1) < t->n_heap; i = kid) {
        if (kid + 1 < t->n_heap && before(t, h[kid + 1], h[kid])) kid++;
        if (!before(t, h[kid], x)) break;
        h[i] = h[kid];
    }
    h[i] = x;
}

static bm_status heap_put(bm_bpe_trainer *t, uint32_t p) {
    BM_TRY(bm_grow(&t->heap, &t->cap_heap, t->n_heap + 1, sizeof *t->heap, "a heap of pairs"));
    const node x = {t->pair[p].count, p};
    size_t i = t->n_heap++;
    for (; i > 0 && before(t, x, t->heap[(i - 1) / 2]); i = (i - 1) / 2) t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = x;
    t->pair[p].queued = x.count;
    return BM_OK;
}

static bm_status queue_touched(bm_bpe_trainer *t) {
    for (size_t i = 0; i < t->n_touched; i++) {
        const pair *x = &t->pair[t->touched[i]];
        if (x->count > x->queued) BM_TRY(heap_put(t, t->touched[i]));
    }
    t->n_touched = 0;
    return BM_OK;
}

/* The best pair leaves the heap; false: none is left. */
static bool heap_take(bm_bpe_trainer *t, uint32_t *p) {
    while (t->n_heap) {
        const node top = t->heap[0];
        pair *x = &t->pair[top.pair];
        const bool holds = top.count == x->queued;      /* else another entry with a larger count took its place */
        if (holds && x->count && x->count < top.count) {
            x->queued = x->count;
            sift_down(t, (node){x->count, top.pair});
            continue;
        }
        const node last = t->heap[--t->n_heap];
        if (t->n_heap) sift_down(t, last);
        if (!holds) continue;
        x->queued = 0;
        *p = top.pair;
        if (x->count) return true;
    }
    return false;
}

/* ---- merging ----------------------------------------------------------------------- */

static bm_status merge_at(bm_bpe_trainer *t, uint32_t at, uint32_t word, const struct bm_vocab_merge *m) {
    const uint32_t left = (uint32_t)m->left, right = (uint32_t)m->right, out = (uint32_t)m->out;
    const uint32_t middle = at + (uint32_t)token_length(t, left), end = middle + (uint32_t)token_length(t, right);
    uint32_t *c = t->cell;
    const uint32_t previous = c[at - 1], next = c[end];
    if (previous != NONE) lose(t, previous, left, word);
    if (next != NONE) lose(t, right, next, word);
    c[middle - 1] = c[middle] = GONE;
    c[at] = c[end - 1] = out;
    if (previous != NONE) BM_TRY(gain(t, previous, out, at - (uint32_t)token_length(t, previous), word));
    return next != NONE ? gain(t, out, next, at, word) : BM_OK;
}

/* One place of the pair; of a run of equal tokens all pairs from its left end. */
static bm_status merge_place(bm_bpe_trainer *t, place k, const struct bm_vocab_merge *m) {
    const uint32_t left = (uint32_t)m->left, right = (uint32_t)m->right;
    const uint32_t n = (uint32_t)token_length(t, left);
    if (t->cell[k.at] != left || t->cell[k.at + n] != right) return BM_OK;
    if (left != right) return merge_at(t, k.at, k.word, m);
    while (t->cell[k.at - 1] == left) k.at -= n;
    for (; t->cell[k.at] == left && t->cell[k.at + n] == left; k.at += 2 * n) BM_TRY(merge_at(t, k.at, k.word, m));
    return BM_OK;
}

static bm_status merge_pair(bm_bpe_trainer *t, uint32_t p, const struct bm_vocab_merge *m) {
    for (uint32_t k = t->pair[p].place, next; k != NONE; k = next) {
        next = t->place[k].next;
        BM_TRY(merge_place(t, t->place[k], m));
        t->place[k].next = t->free_place;
        t->free_place = k;
    }
    t->pair[p].place = NONE;
    t->pair[p].count = 0;
    return queue_touched(t);
}

/* What the pair becomes: a new token, or one that other halves made already. */
static bm_status choose_token(bm_bpe_trainer *t, uint32_t p, struct bm_vocab_merge *m) {
    pair *x = &t->pair[p];
    const uint32_t half[2] = {(uint32_t)(x->key >> 32), (uint32_t)x->key};
    if (x->out == NONE) {
        for (int i = 0; i < 2; i++) {
            const size_t n = token_length(t, half[i]);
            BM_TRY(bm_grow(&t->bytes.s, &t->bytes.cap, t->bytes.n + n, 1, "a vocabulary"));
            memcpy(t->bytes.s + t->bytes.n, t->bytes.s + t->begin[half[i]], n);
            t->bytes.n += n;
        }
        BM_TRY(token_put(t, &x->out));
        if (x->out < t->n_special) x->out = BANNED;
        else {
            BM_TRY(bm_grow(&t->merge, &t->cap_merges, t->n_merges + 1, sizeof *t->merge, "merges"));
            t->merge[t->n_merges++] = (struct bm_vocab_merge){(bm_token)half[0], (bm_token)half[1], (bm_token)x->out};
        }
    }
    *m = (struct bm_vocab_merge){(bm_token)half[0], (bm_token)half[1], (bm_token)x->out};
    return BM_OK;
}

static bm_status merge_all(bm_bpe_trainer *t) {
    const uint64_t least = t->o->min_count ? t->o->min_count : 2;
    enum { BETWEEN = 64 };
    uint32_t p;
    for (size_t n = 0; t->n_tokens < t->o->n_vocab && heap_take(t, &p) && t->pair[p].count >= least; n++) {
        struct bm_vocab_merge m;
        BM_TRY(choose_token(t, p, &m));
        if ((uint32_t)m.out != BANNED) BM_TRY(merge_pair(t, p, &m));
        if (t->o->merging && n % BETWEEN == 0 && !t->o->merging(t->o->user, t->n_tokens, t->o->n_vocab))
            return bm_fail(BM_ECANCELLED, "training a tokenizer was stopped");
    }
    return BM_OK;
}

/* ---- from words to cells ----------------------------------------------------------- */

static bm_status lay_out(bm_bpe_trainer *t, const bm_words *w, const uint32_t id[256]) {
    size_t n = 1;
    for (size_t i = 0; i < w->n; i++) n += w->word[i].n + 1;
    if (n >= GONE)
        return bm_fail(BM_ENOSUPPORT, "texts: found distinct words of %zu bytes in all, expected at most %u", n, GONE);
    BM_TRY(bm_alloc(&t->cell, n * sizeof *t->cell, "words"));
    BM_TRY(bm_alloc(&t->word_count, (w->n + 1) * sizeof *t->word_count, "words"));
    t->cell[t->n_cells++] = NONE;
    for (size_t i = 0; i < w->n; i++) {
        t->word_count[i] = w->word[i].count;
        for (size_t k = 0; k < w->word[i].n; k++) t->cell[t->n_cells++] = id[(uint8_t)w->text.s[w->word[i].at + k]];
        t->cell[t->n_cells++] = NONE;
    }
    return BM_OK;
}

static bm_status count_pairs(bm_bpe_trainer *t) {
    uint32_t word = 0;
    for (size_t i = 1; i < t->n_cells; i++) {
        if (t->cell[i] == NONE) word++;
        else if (t->cell[i + 1] != NONE) BM_TRY(gain(t, t->cell[i], t->cell[i + 1], (uint32_t)i, word));
    }
    return queue_touched(t);
}

/* ---- the trainer ------------------------------------------------------------------- */

static const char *const END_OF_TEXT[] = {"<|endoftext|>"};

static bm_status check_options(const bm_bpe_trainer *t) {
    const size_t least = 256 + t->n_special, most = 1 << 24;
    if (t->o->n_vocab >= least && t->o->n_vocab <= most) return BM_OK;
    return bm_fail(BM_EARG, "size of the vocabulary: found %zu, expected %zu (256 bytes and %zu special token%s) to "
                   "%zu", t->o->n_vocab, least, t->n_special, t->n_special == 1 ? "" : "s", most);
}

static bm_status open_counts(bm_bpe_trainer *t, bm_pool *pool) {
    const char **stop;
    size_t n = t->n_special;
    BM_TRY(bm_alloc(&stop, (n + 1) * sizeof *stop, "special tokens"));
    for (size_t i = 0; i < n; i++) stop[i] = t->special[i];
    if (t->o->split) stop[n++] = t->o->split;
    bm_status st = bm_counts_open(&t->counts, pool, stop, n, t->o->lines);
    free(stop);
    return st;
}

bm_status bm_bpe_trainer_open(bm_bpe_trainer **out, const bm_tokenizer_train_options *o, bm_pool *pool) {
    bm_bpe_trainer *t;
    *out = NULL;
    BM_TRY(bm_alloc(&t, sizeof *t, "a tokenizer in training"));
    t->o = o;
    t->special = o->n_special ? o->special : END_OF_TEXT;
    t->n_special = o->n_special ? o->n_special : 1;
    t->free_place = NONE;
    bm_status st = check_options(t);
    if (st == BM_OK) st = open_counts(t, pool);
    if (st) bm_bpe_trainer_close(t);
    else *out = t;
    return st;
}

bm_status bm_bpe_trainer_add(bm_bpe_trainer *t, const char *s, size_t n) { return bm_counts_add(t->counts, s, n); }

bm_status bm_bpe_trainer_end(bm_bpe_trainer *t) { return bm_counts_end(t->counts); }

static bm_status make_tokenizer(const bm_bpe_trainer *t, bm_tokenizer **out) {
    bm_vocab v;
    bm_text s = {0};
    BM_TRY(bm_vocab_make(&v, t->n_tokens, t->n_merges));
    bm_status st = BM_OK;
    v.nfc = true;
    for (size_t i = 0; i < t->n_special && st == BM_OK; i++) {
        st = bm_vocab_put(&v, i, t->special[i], strlen(t->special[i]), BM_TOKEN_SPECIAL);
        if (!strcmp(t->special[i], END_OF_TEXT[0])) v.bos = v.eos = (bm_token)i;
    }
    for (size_t i = t->n_special; i < t->n_tokens && st == BM_OK; i++) {
        const size_t n = token_length(t, (uint32_t)i);
        st = bm_grow(&s.s, &s.cap, 2 * n, 1, "a token");
        if (st) break;
        st = bm_vocab_put(&v, i, s.s, bm_alphabet_write(t->bytes.s + t->begin[i], n, s.s), BM_TOKEN_NORMAL);
    }
    if (t->n_merges) memcpy(v.merge, t->merge, t->n_merges * sizeof *t->merge);
    if (st == BM_OK) st = bm_tokenizer_from_vocab(out, &v, "the new tokenizer");
    bm_vocab_free(&v);
    free(s.s);
    return st;
}

bm_status bm_bpe_trainer_finish(bm_bpe_trainer *t, bm_tokenizer **out, bm_tokenizer_train_info *info) {
    bm_words *words;
    uint32_t id[256];
    *out = NULL;
    info->bytes = bm_counts_bytes(t->counts);
    BM_TRY(bm_counts_finish(t->counts, &words, &info->words));
    info->bad = bm_counts_bad(t->counts, &info->first_bad);
    info->distinct = words->n;
    if (!words->n) return bm_fail(BM_EFORMAT, "texts: found not one word, expected some text to learn from");
    BM_TRY(open_tokens(t, id));
    BM_TRY(lay_out(t, words, id));
    bm_counts_close(t->counts);
    t->counts = NULL;
    BM_TRY(count_pairs(t));
    BM_TRY(merge_all(t));
    info->n_vocab = t->n_tokens;
    info->n_merges = t->n_merges;
    return make_tokenizer(t, out);
}

void bm_bpe_trainer_close(bm_bpe_trainer *t) {
    if (!t) return;
    bm_counts_close(t->counts);
    void *const owned[] = {t->cell, t->word_count, t->pair, t->slot, t->place, t->heap, t->touched, t->bytes.s,
                           t->begin, t->token_slot, t->merge};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
    free(t);
}
