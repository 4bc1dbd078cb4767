/* src/train/order.c - which tokens a row of training has.  Room: train.
 *
 * In: packed data with weights, a seed, the number of a row.  Out: its tokens.  Every answer is computed from the
 * number alone: no list of windows, no state, so that any rank and any resumed run finds the same row.
 *
 *     row -> block of 4096 rows and a place in it -> permuted place -> source, and number k of its rows
 *     k   -> pass k / W and a place in it         -> permuted place -> window w of the W of the source
 *
 * A permutation of [0, n) is a Feistel network (Luby and Rackoff 1988) over the next power of 4, its round function
 * Philox, walked until it lands below n (Black and Rogaway 2002, cycle walking). */
#include "train/data.h"
#include <math.h>
#include <stdlib.h>

enum { BLOCK = 4096, ROUNDS = 6 };
#define ONE ((uint64_t)1 << 32)

struct bm_order {
    const bm_data *source[BM_MAX_SOURCES];
    uint64_t weight[BM_MAX_SOURCES];            /* of ONE */
    int n, largest;
    uint64_t seed;
    int max_T;
};

static uint64_t permute(uint64_t x, uint64_t n, uint64_t key) {
    int half = 0;
    while ((uint64_t)1 << 2 * half < n) half++;
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    if (n < 2) return 0;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (int i = 0; i < ROUNDS; i++) {
            const uint64_t next = left ^ (bm_rng_u64(key, (uint64_t)i, right) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= n);
    return x;
}

/* ---- the mixture ------------------------------------------------------------------------------------------- */

/* floor(rows * weight / ONE) without a product that wraps. */
static uint64_t share(uint64_t rows, uint64_t weight) {
    return (rows >> 32) * weight + ((rows & (ONE - 1)) * weight >> 32);
}

/* Source of a row, and how many of its rows have lower numbers k.  In the blocks before q a source of weight w had
 * floor(q * BLOCK * w) rows, the one of largest weight all that are left. */
static int pick(const bm_order *o, uint64_t row, uint64_t *k) {
    const uint64_t before = row / BLOCK * BLOCK;
    if (o->n == 1) return *k = row, 0;
    uint64_t place = permute(row % BLOCK, BLOCK, bm_rng_u64(o->seed, 0, row / BLOCK)), rest = before;
    for (int i = 0; i < o->n; i++) {
        if (i == o->largest) continue;
        const uint64_t had = share(before, o->weight[i]), has = share(before + BLOCK, o->weight[i]);
        if (place < has - had) return *k = had + place, i;
        place -= has - had;
        rest -= had;
    }
    return *k = rest + place, o->largest;
}

static bm_status set_weights(bm_order *o, const double *weight) {
    double sum = 0, w[BM_MAX_SOURCES];
    uint64_t total = 0;
    for (int i = 0; i < o->n; i++) {
        w[i] = weight ? weight[i] : (double)bm_data_tokens(o->source[i], BM_SPLIT_TRAIN);
        if (!(w[i] > 0) || !isfinite(w[i]))
            return bm_fail(BM_EARG, "%s: weight is %g, expected a number above 0", bm_data_path(o->source[i]), w[i]);
        sum += w[i];
    }
    for (int i = 0; i < o->n; i++) {
        o->weight[i] = (uint64_t)(w[i] / sum * (double)ONE + 0.5);
        if (o->weight[i] > o->weight[o->largest]) o->largest = i;
        total += o->weight[i];
        if (o->weight[i]) continue;
        return bm_fail(BM_EARG, "%s: weight is %g of %g, expected a share of at least 2^-32; leave it out",
                       bm_data_path(o->source[i]), w[i], sum);
    }
    o->weight[o->largest] += ONE - total;
    return BM_OK;
}

bm_status bm_order_open(bm_order **out, const bm_data *const *source, const double *weight, int n, uint64_t seed,
                        int max_T) {
    bm_order *o;
    *out = NULL;
    if (n < 1 || n > BM_MAX_SOURCES || max_T < 1)
        return bm_fail(BM_EARG, "order: found %d data and rows of %d tokens, expected 1 to %d and at least 1", n,
                       max_T, BM_MAX_SOURCES);
    for (int i = 0; i < n; i++) {
        const uint64_t tokens = bm_data_tokens(source[i], BM_SPLIT_TRAIN);
        if (tokens <= (uint64_t)max_T)
            return bm_fail(BM_EARG, "%s: found %llu tokens to train on, expected at least %lld for rows of %d targets; "
                           "pack more text or take shorter rows", bm_data_path(source[i]), (unsigned long long)tokens,
                           max_T + 1LL, max_T);
    }
    BM_TRY(bm_alloc(&o, sizeof *o, "the order of training"));
    o->n = n;
    o->seed = seed;
    o->max_T = max_T;
    for (int i = 0; i < n; i++) o->source[i] = source[i];
    const bm_status st = set_weights(o, weight);
    if (st) bm_order_close(o);
    else *out = o;
    return st;
}

void bm_order_close(bm_order *o) { free(o); }
int bm_order_sources(const bm_order *o) { return o->n; }
const bm_data *bm_order_source(const bm_order *o, int i) { return o->source[i]; }
double bm_order_weight(const bm_order *o, int i) { return (double)o->weight[i] / (double)ONE; }

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static bm_status check_length(const bm_order *o, int T) {
    return T >= 1 && T <= o->max_T ? BM_OK
        : bm_fail(BM_EARG, "order: found rows of %d targets asked for, expected 1 to %d", T, o->max_T);
}

bm_status bm_order_row(const bm_order *o, uint64_t row, int T, bm_token *tokens, int32_t *starts, bm_row *out) {
    uint64_t k;
    BM_TRY(check_length(o, T));
    const int source = pick(o, row, &k);
    const bm_data *d = o->source[source];
    const uint64_t windows = (bm_data_tokens(d, BM_SPLIT_TRAIN) - 1) / (uint64_t)T;
    const uint64_t key = bm_rng_u64(o->seed, (uint64_t)(source + 1) << 32 | (uint64_t)T, k / windows);
    const uint64_t w = permute(k % windows, windows, key);
    BM_TRY(bm_data_row(d, BM_SPLIT_TRAIN, w * (uint64_t)T, T, tokens, starts, out));
    out->source = source;
    return BM_OK;
}

/* Lanes before those of source i: the nearest whole number to its share of all. */
static int lanes_before(const bm_order *o, int i, int lanes) {
    uint64_t sum = 0;
    for (int j = 0; j < i; j++) sum += o->weight[j];
    return (int)(((uint64_t)lanes * sum + ONE / 2) >> 32);
}

bm_status bm_order_lanes(const bm_order *o, int lanes) {
    if (lanes < 1) return bm_fail(BM_EARG, "order: found %d lanes, expected at least 1", lanes);
    for (int i = 0; i < o->n; i++) {
        if (lanes_before(o, i + 1, lanes) > lanes_before(o, i, lanes)) continue;
        return bm_fail(BM_EARG, "%s: gets none of %d sequences that carry their state, by its weight of %.3g; expected "
                       "at least one: take more sequences, a larger weight, or no carry", bm_data_path(o->source[i]),
                       lanes, bm_order_weight(o, i));
    }
    return BM_OK;
}

bm_status bm_order_carry(const bm_order *o, int lane, int lanes, uint64_t at, int T, bm_token *tokens, int32_t *starts,
                         bm_row *out) {
    int source = 0;
    BM_TRY(check_length(o, T));
    if (lane < 0 || lane >= lanes) return bm_fail(BM_EARG, "order: found lane %d, expected one of %d", lane, lanes);
    while (lane >= lanes_before(o, source + 1, lanes)) source++;
    const bm_data *d = o->source[source];
    const uint64_t n = bm_data_tokens(d, BM_SPLIT_TRAIN), first = (uint64_t)lanes_before(o, source, lanes);
    const uint64_t own = (uint64_t)lanes_before(o, source + 1, lanes) - first, j = (uint64_t)lane - first;
    const uint64_t begin = n / own * j + n % own * j / own;             /* floor(n * j / own) */
    BM_TRY(bm_data_row(d, BM_SPLIT_TRAIN, (begin + at % n) % n, T, tokens, starts, out));
    out->source = source;
    if (at == 0) out->fresh = true;
    return BM_OK;
}
