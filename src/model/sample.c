/* src/model/sample.c - from logits to a token.  Room: model.
 *
 * In: logits (V), recent tokens, settings.  Out: one id.  Order: bias, penalties, then greedy, or
 * top-k, typical (Meister et al. 2202.00666), top-p (Holtzman et al. 1904.09751), min-p, temperature,
 * one uniform number, a function of (seed, counter).  Ties go to the lower id. */
#include "model/model.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct candidate { float logit, key; bm_token id; } candidate;     /* ordered by key, descending */

struct bm_sampler {
    bm_sampling p;
    bm_logit_bias *bias;
    uint64_t counter;
    int n_vocab;
    float *logits;              /* (V) after bias and penalties */
    candidate *c;               /* (V) */
    int32_t *count;             /* (V) occurrences among the recent tokens; all 0 between calls */
};

bm_sampling bm_sampling_default(void) {
    return (bm_sampling){ .temperature = 1, .top_p = 1, .typical_p = 1, .repetition_penalty = 1, .penalty_window = 64 };
}

static bm_status in_range(const char *what, double v, double min, double max) {
    if (v >= min && v <= max) return BM_OK;
    return bm_fail(BM_EARG, "%s: found %g, expected %g to %g", what, v, min, max);
}

bm_status bm_sampling_check(const bm_sampling *p, int n_vocab) {
    BM_TRY(in_range("temperature", (double)p->temperature, 0, 1000));
    BM_TRY(in_range("top-k", p->top_k, 0, INT_MAX));
    BM_TRY(in_range("top-p", (double)p->top_p, 0, 1));
    BM_TRY(in_range("min-p", (double)p->min_p, 0, 1));
    BM_TRY(in_range("typical", (double)p->typical_p, 0, 1));
    BM_TRY(in_range("repetition penalty", (double)p->repetition_penalty, 1e-3, 1000));
    BM_TRY(in_range("presence penalty", (double)p->presence_penalty, -1000, 1000));
    BM_TRY(in_range("frequency penalty", (double)p->frequency_penalty, -1000, 1000));
    BM_TRY(in_range("penalty window", p->penalty_window, 0, 65536));
    BM_TRY(in_range("number of logit biases", (double)p->n_bias, 0, n_vocab));
    for (size_t i = 0; i < p->n_bias; i++) {
        BM_TRY(in_range("logit bias: token", p->bias[i].id, 0, n_vocab - 1));
        if (isnan(p->bias[i].bias)) return bm_fail(BM_EARG, "logit bias of token %d: found nan, expected a number", (int)p->bias[i].id);
    }
    return BM_OK;
}

void bm_sampler_close(bm_sampler *s) {
    if (!s) return;
    free(s->bias);
    free(s->logits);
    free(s->c);
    free(s->count);
    free(s);
}

bm_status bm_sampler_open(bm_sampler **out, const bm_sampling *p, int n_vocab) {
    *out = NULL;
    BM_TRY(bm_sampling_check(p, n_vocab));
    bm_sampler *s;
    const size_t V = (size_t)n_vocab;
    BM_TRY(bm_alloc(&s, sizeof *s, "a sampler"));
    bm_status st = bm_alloc(&s->bias, sizeof *s->bias * p->n_bias, "a sampler");
    if (!st) st = bm_alloc(&s->logits, sizeof *s->logits * V, "a sampler");
    if (!st) st = bm_alloc(&s->c, sizeof *s->c * V, "a sampler");
    if (!st) st = bm_alloc(&s->count, sizeof *s->count * V, "a sampler");
    if (st) {
        bm_sampler_close(s);
        return st;
    }
    if (p->n_bias) memcpy(s->bias, p->bias, sizeof *s->bias * p->n_bias);
    s->p = *p;
    s->p.bias = s->bias;
    s->n_vocab = n_vocab;
    *out = s;
    return BM_OK;
}

static bool has_penalty(const bm_sampling *p) {
    return p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
}

const bm_sampling *bm_sampler_settings(const bm_sampler *s) { return &s->p; }
uint64_t bm_sampler_counter(const bm_sampler *s) { return s->counter; }
void bm_sampler_set_counter(bm_sampler *s, uint64_t n) { s->counter = n; }

bool bm_sampler_greedy(const bm_sampler *s) { return s->p.temperature == 0 && !s->p.n_bias && !has_penalty(&s->p); }

/* ---- what changes logits ------------------------------------------------------------------------- */

/* Repetition: CTRL (1909.05858), section 4.1; presence and frequency are subtracted. */
static void penalize(bm_sampler *s, const bm_token *recent, size_t n) {
    const bm_sampling *p = &s->p;
    if (!has_penalty(p)) return;
    if (n > (size_t)p->penalty_window) {
        recent += n - (size_t)p->penalty_window;
        n = (size_t)p->penalty_window;
    }
    for (size_t i = 0; i < n; i++) s->count[recent[i]]++;
    for (size_t i = 0; i < n; i++) {
        const int32_t times = s->count[recent[i]];
        float *l = &s->logits[recent[i]];
        if (!times) continue;
        *l = *l > 0 ? *l / p->repetition_penalty : *l * p->repetition_penalty;
        *l -= p->presence_penalty + p->frequency_penalty * (float)times;
        s->count[recent[i]] = 0;
    }
}

bm_status bm_sampler_none(void) {
    return bm_fail(BM_EARG, "no token can be sampled: every logit is -inf, nan or of an id without a token");
}

static bm_status prepare(bm_sampler *s, const float *logits, const bm_token *recent, size_t n_recent, const bool *allowed) {
    int usable = 0;
    memcpy(s->logits, logits, sizeof *logits * (size_t)s->n_vocab);
    for (size_t i = 0; i < s->p.n_bias; i++) s->logits[s->bias[i].id] += s->bias[i].bias;
    penalize(s, recent, n_recent);
    for (int i = 0; i < s->n_vocab; i++) {
        if (isnan(s->logits[i]) || (allowed && !allowed[i])) s->logits[i] = -INFINITY;
        usable += s->logits[i] > -INFINITY;
    }
    return usable ? BM_OK : bm_sampler_none();
}

/* ---- order ----------------------------------------------------------------------------------------- */

static int by_key(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->key != y->key) return x->key > y->key ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* The first k of c (n), in order: quickselect, then a sort of the k. */
static void order_prefix(candidate *c, int n, int k) {
    int lo = 0, hi = n - 1;
    while (k < n && lo < hi) {
        const candidate pivot = c[lo + (hi - lo) / 2];
        int i = lo, j = hi;
        while (i <= j) {
            while (by_key(&c[i], &pivot) < 0) i++;
            while (by_key(&c[j], &pivot) > 0) j--;
            if (i > j) break;
            const candidate t = c[i];
            c[i++] = c[j];
            c[j--] = t;
        }
        if (k <= j) hi = j;
        else if (k >= i) lo = i;
        else break;
    }
    qsort(c, (size_t)(k < n ? k : n), sizeof *c, by_key);
}

/* ln sum exp of the logits of c. */
static double log_sum(const candidate *c, int n) {
    float top = -INFINITY;
    double sum = 0;
    for (int i = 0; i < n; i++) top = fmaxf(top, c[i].logit);
    for (int i = 0; i < n; i++) sum += exp((double)c[i].logit - (double)top);
    return (double)top + log(sum);
}

/* How many of c (n), in the order of key, reach a mass of p; at least one.  The prefix is ordered. */
static int reach(candidate *c, int n, double p) {
    if (p >= 1) return n;
    const double z = log_sum(c, n);
    for (int k = 128; ; k = k > n / 4 ? n : k * 4) {
        if (k > n) k = n;
        order_prefix(c, n, k);
        double mass = 0;
        for (int i = 0; i < k; i++) {
            mass += exp((double)c[i].logit - z);
            if (mass >= p) return i + 1;
        }
        if (k == n) return n;
    }
}

static int typical(candidate *c, int n, double p) {
    if (p >= 1) return n;
    const double z = log_sum(c, n);
    double entropy = 0;
    for (int i = 0; i < n; i++) {
        const double l = (double)c[i].logit - z;
        entropy -= exp(l) * l;
    }
    for (int i = 0; i < n; i++) c[i].key = (float)-fabs(z - (double)c[i].logit - entropy);
    n = reach(c, n, p);
    for (int i = 0; i < n; i++) c[i].key = c[i].logit;
    return n;
}

static int min_p(candidate *c, int n, double p) {
    if (p <= 0) return n;
    float top = -INFINITY;
    int kept = 0;
    for (int i = 0; i < n; i++) top = fmaxf(top, c[i].logit);
    for (int i = 0; i < n; i++)
        if (exp((double)c[i].logit - (double)top) >= p) c[kept++] = c[i];
    return kept;
}

/* One of c (n) by exp(logit / temperature).  Candidates go in the order of ids, so that the number
 * drawn means the same whatever filter left them. */
static int by_id(const void *a, const void *b) {
    const bm_token x = ((const candidate *)a)->id, y = ((const candidate *)b)->id;
    return x < y ? -1 : x > y;
}
static bm_token draw(candidate *c, int n, double temperature, double u) {
    float top = -INFINITY;
    double sum = 0;
    qsort(c, (size_t)n, sizeof *c, by_id);
    for (int i = 0; i < n; i++) top = fmaxf(top, c[i].logit);
    for (int i = 0; i < n; i++) sum += exp(((double)c[i].logit - (double)top) / temperature);
    double left = u * sum;
    int last = 0;
    for (int i = 0; i < n; i++) {
        const double w = exp(((double)c[i].logit - (double)top) / temperature);
        if (w > 0) last = i;
        if ((left -= w) < 0) return c[i].id;
    }
    return c[last].id;
}

bm_status bm_sampler_pick(bm_sampler *s, const float *logits, const bm_token *recent, size_t n_recent, const bool *allowed,
                          bm_token *out) {
    const bm_sampling *p = &s->p;
    BM_TRY(prepare(s, logits, recent, n_recent, allowed));
    int n = 0, best = 0;
    for (int i = 0; i < s->n_vocab; i++) {
        if (s->logits[i] > s->logits[best]) best = i;
        if (s->logits[i] > -INFINITY) s->c[n++] = (candidate){ s->logits[i], s->logits[i], i };
    }
    *out = best;
    if (p->temperature == 0) return BM_OK;
    if (s->logits[best] == INFINITY) return BM_OK;          /* certain, and past arithmetic */
    if (p->top_k > 0 && p->top_k < n) {
        order_prefix(s->c, n, p->top_k);
        n = p->top_k;
    }
    n = typical(s->c, n, (double)p->typical_p);
    n = reach(s->c, n, (double)p->top_p);
    n = min_p(s->c, n, (double)p->min_p);
    *out = draw(s->c, n, (double)p->temperature, bm_rng_uniform(p->seed, 0, s->counter++));
    return BM_OK;
}
