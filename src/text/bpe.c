/* src/text/bpe.c - byte pair merging.  Room: text.
 *
 * In: the bytes of one word.  Out: its ids: of all neighbours the pair of the lowest rank is merged, the
 * leftmost first, until no pair has a rank (Sennrich et al. 2016, in the order of Hugging Face's library).
 *
 * Short words look for the lowest rank by scanning.  Long ones keep a heap of runs: a run holds places of one
 * rank from left to right, the heap their first places.  Places come almost in order, so there are few runs:
 * ten million equal letters are one.  At worst each place is a run of its own: O(n log n). */
#include "text/parts.h"
#include <stdlib.h>

#define NONE UINT32_MAX
enum { SHORT = 64 };

typedef struct symbol { bm_token id; uint32_t prev, next; } symbol;    /* id -1: merged away */
typedef struct place { uint32_t at, next; } place;                     /* next: in its run, or in the free list */
typedef struct run { uint32_t rank, head, tail; } run;                 /* head: first place, or next free run */
typedef struct node { uint64_t key; uint32_t run; } node;              /* key: rank, then position */

struct bm_bpe_work {
    symbol *symbol;
    place *place;
    run *run;
    node *heap;
    uint32_t *last_run;                 /* by rank: the run that grows, NONE */
    size_t n_place, n_run, n_heap, cap_symbol, cap_place, cap_run, cap_heap;
    uint32_t free_place, free_run;
};

/* ---- ranks ---------------------------------------------------------------------------- */

static uint64_t pair_key(bm_token left, bm_token right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

static size_t pair_hash(uint64_t pair) {
    pair *= 0x9E3779B97F4A7C15u;
    return (size_t)(pair ^ pair >> 29);
}

static bm_bpe_slot *find_slot(const bm_bpe *b, uint64_t pair) {
    size_t i = pair_hash(pair) & b->mask;
    while (b->slot[i].rank != NONE && b->slot[i].pair != pair) i = (i + 1) & b->mask;
    return &b->slot[i];
}

static uint32_t rank_of(const bm_bpe *b, bm_token left, bm_token right) {
    return find_slot(b, pair_key(left, right))->rank;
}

bm_status bm_bpe_open(bm_bpe *b, const bm_vocab *v, const bm_token byte[256]) {
    size_t size = 16;
    while (size < v->n_merges * 2) size *= 2;
    memset(b, 0, sizeof *b);
    BM_TRY(bm_alloc(&b->slot, size * sizeof *b->slot, "merges"));
    for (size_t i = 0; i < size; i++) b->slot[i].rank = NONE;
    b->mask = size - 1;
    b->merge = v->merge;
    b->n_merges = v->n_merges;
    memcpy(b->byte, byte, sizeof b->byte);
    for (size_t i = 0; i < v->n_merges; i++) {          /* of a pair given twice the last one holds */
        uint64_t pair = pair_key(v->merge[i].left, v->merge[i].right);
        *find_slot(b, pair) = (bm_bpe_slot){pair, (uint32_t)i};
    }
    return BM_OK;
}

void bm_bpe_close(bm_bpe *b) {
    free(b->slot);
    memset(b, 0, sizeof *b);
}

/* ---- short words ---------------------------------------------------------------------- */

static size_t merge_short(const bm_bpe *b, bm_token *id, size_t n) {
    uint32_t rank[SHORT];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = rank_of(b, id[i], id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) if (rank[i] < rank[best]) best = i;
        if (rank[best] == NONE) break;
        id[best] = b->merge[rank[best]].out;
        n--;
        for (size_t i = best + 1; i < n; i++) { id[i] = id[i + 1]; rank[i - 1] = rank[i]; }
        if (best > 0) rank[best - 1] = rank_of(b, id[best - 1], id[best]);
        if (best + 1 < n) rank[best] = rank_of(b, id[best], id[best + 1]);
    }
    return n;
}

/* ---- long words ----------------------------------------------------------------------- */

static void sift_up(node *h, size_t i) {
    node x = h[i];
    for (; i > 0 && h[(i - 1) / 2].key > x.key; i = (i - 1) / 2) h[i] = h[(i - 1) / 2];
    h[i] = x;
}

static void sift_down(node *h, size_t n, size_t i) {
    node x = h[i];
    for (;;) {
        size_t kid = 2 * i + 1;
        if (kid >= n) break;
        if (kid + 1 < n && h[kid + 1].key < h[kid].key) kid++;
        if (h[kid].key >= x.key) break;
        h[i] = h[kid];
        i = kid;
    }
    h[i] = x;
}

static bm_status take_place(bm_bpe_work *w, uint32_t at, uint32_t *out) {
    uint32_t p = w->free_place;
    if (p != NONE) w->free_place = w->place[p].next;
    else {
        BM_TRY(bm_grow(&w->place, &w->cap_place, w->n_place + 1, sizeof *w->place, "merging"));
        p = (uint32_t)w->n_place++;
    }
    w->place[p] = (place){at, NONE};
    *out = p;
    return BM_OK;
}

static bm_status start_run(bm_bpe_work *w, uint32_t rank, uint32_t p) {
    uint32_t r = w->free_run;
    BM_TRY(bm_grow(&w->heap, &w->cap_heap, w->n_heap + 1, sizeof *w->heap, "merging"));
    if (r != NONE) w->free_run = w->run[r].head;
    else {
        BM_TRY(bm_grow(&w->run, &w->cap_run, w->n_run + 1, sizeof *w->run, "merging"));
        r = (uint32_t)w->n_run++;
    }
    w->run[r] = (run){rank, p, p};
    w->last_run[rank] = r;
    w->heap[w->n_heap] = (node){(uint64_t)rank << 32 | w->place[p].at, r};
    sift_up(w->heap, w->n_heap++);
    return BM_OK;
}

/* Notes that the pair which begins at symbol `at` may be merged, if it has a rank. */
static bm_status push(const bm_bpe *b, bm_bpe_work *w, uint32_t at) {
    uint32_t next = w->symbol[at].next, p;
    if (next == NONE) return BM_OK;
    uint32_t rank = rank_of(b, w->symbol[at].id, w->symbol[next].id);
    if (rank == NONE) return BM_OK;
    BM_TRY(take_place(w, at, &p));
    uint32_t r = w->last_run[rank];
    if (r == NONE || w->place[w->run[r].tail].at > at) return start_run(w, rank, p);
    w->place[w->run[r].tail].next = p;
    w->run[r].tail = p;
    return BM_OK;
}

/* The lowest rank's leftmost place; the heap is not empty. */
static void pop(bm_bpe_work *w, uint32_t *rank, uint32_t *at) {
    uint32_t r = w->heap[0].run, p = w->run[r].head, next = w->place[p].next;
    *rank = w->run[r].rank;
    *at = w->place[p].at;
    w->place[p].next = w->free_place;
    w->free_place = p;
    if (next != NONE) {
        w->run[r].head = next;
        w->heap[0].key = (uint64_t)*rank << 32 | w->place[next].at;
    } else {
        if (w->last_run[*rank] == r) w->last_run[*rank] = NONE;
        w->run[r].head = w->free_run;
        w->free_run = r;
        w->heap[0] = w->heap[--w->n_heap];
    }
    if (w->n_heap) sift_down(w->heap, w->n_heap, 0);
}

static bm_status merge_symbols(const bm_bpe *b, bm_bpe_work *w) {
    while (w->n_heap) {
        uint32_t rank, at;
        pop(w, &rank, &at);
        symbol *s = &w->symbol[at];
        const struct bm_vocab_merge *m = &b->merge[rank];
        if (s->id != m->left || s->next == NONE || w->symbol[s->next].id != m->right) continue;
        symbol *gone = &w->symbol[s->next];
        s->id = m->out;
        s->next = gone->next;
        gone->id = -1;
        if (s->next != NONE) w->symbol[s->next].prev = at;
        if (s->prev != NONE) BM_TRY(push(b, w, s->prev));
        BM_TRY(push(b, w, at));
    }
    return BM_OK;
}

static bm_status work_open(const bm_bpe *b, bm_bpe_work **out) {
    bm_bpe_work *w;
    if (*out) return BM_OK;
    BM_TRY(bm_alloc(&w, sizeof *w, "merging"));
    bm_status st = bm_alloc(&w->last_run, (b->n_merges + 1) * sizeof *w->last_run, "merging");
    if (st) { free(w); return st; }
    for (size_t i = 0; i < b->n_merges; i++) w->last_run[i] = NONE;
    *out = w;
    return BM_OK;
}

static bm_status merge_long(const bm_bpe *b, bm_bpe_work **work, const char *s, size_t n, bm_ids *out) {
    uint32_t k = 0;
    if (n > INT32_MAX) return bm_fail(BM_EARG, "a word of %zu bytes is too long to encode; at most 2147483647", n);
    BM_TRY(work_open(b, work));
    bm_bpe_work *w = *work;
    BM_TRY(bm_grow(&w->symbol, &w->cap_symbol, n, sizeof *w->symbol, "merging"));
    for (size_t i = 0; i < n; i++) {
        bm_token id = b->byte[(uint8_t)s[i]];
        if (id < 0) continue;
        w->symbol[k] = (symbol){id, k ? k - 1 : NONE, k + 1};
        k++;
    }
    if (k == 0) return BM_OK;
    w->symbol[k - 1].next = NONE;
    w->n_place = w->n_run = w->n_heap = 0;
    w->free_place = w->free_run = NONE;
    for (uint32_t i = 0; i < k; i++) BM_TRY(push(b, w, i));
    BM_TRY(merge_symbols(b, w));
    for (uint32_t i = 0; i != NONE; i = w->symbol[i].next) BM_TRY(bm_ids_put(out, w->symbol[i].id));
    return BM_OK;
}

bm_status bm_bpe_word(const bm_bpe *b, bm_bpe_work **w, const char *s, size_t n, bm_ids *out) {
    bm_token id[SHORT];
    size_t k = 0;
    if (n > SHORT) return merge_long(b, w, s, n, out);
    for (size_t i = 0; i < n; i++) if (b->byte[(uint8_t)s[i]] >= 0) id[k++] = b->byte[(uint8_t)s[i]];
    k = merge_short(b, id, k);
    for (size_t i = 0; i < k; i++) BM_TRY(bm_ids_put(out, id[i]));
    return BM_OK;
}

void bm_bpe_work_free(bm_bpe_work *w) {
    if (!w) return;
    free(w->symbol);
    free(w->place);
    free(w->run);
    free(w->heap);
    free(w->last_run);
    free(w);
}
