/* src/train/schedule.c - what a step is like: learning rate, sizes of its batch.  Room: train.
 *
 * In: the configuration and a step.  Out: numbers that depend on nothing else, so that a run may stop anywhere. */
#include "train/train.h"
#include <math.h>

/* from at step 0, to from step `over` on; a straight line of whole numbers between. */
static int64_t line(int64_t from, int64_t to, uint64_t step, int64_t over) {
    if (step >= (uint64_t)over) return to;
    return from + (int64_t)((double)(to - from) * (double)step / (double)over);
}

int bm_schedule_sequences(const bm_train_config *c, uint64_t step) {
    const int64_t g = c->route_group;
    return (int)(g * line(c->batch.from / g, c->batch.sequences / g, step, c->batch.warmup));
}

int bm_schedule_length(const bm_train_config *c, uint64_t step) {
    return (int)line(c->batch.len_from, c->seq_len, step, c->batch.len_warmup);
}

uint64_t bm_schedule_before(const bm_train_config *c, uint64_t step) {
    const uint64_t ramp = (uint64_t)c->batch.warmup < step ? (uint64_t)c->batch.warmup : step;
    uint64_t n = (step - ramp) * (uint64_t)c->batch.sequences;
    for (uint64_t s = 0; s < ramp; s++) n += (uint64_t)bm_schedule_sequences(c, s);
    return n;
}

uint64_t bm_schedule_steps(const bm_train_config *c) {
    if (c->steps) return (uint64_t)c->steps;
    const int64_t ramp = c->batch.warmup > c->batch.len_warmup ? c->batch.warmup : c->batch.len_warmup;
    const uint64_t full = (uint64_t)(c->batch.sequences * c->seq_len);
    uint64_t left = (uint64_t)c->tokens, s = 0;
    for (; s < (uint64_t)ramp && left; s++) {
        const uint64_t now = (uint64_t)bm_schedule_sequences(c, s) * (uint64_t)bm_schedule_length(c, s);
        left -= now < left ? now : left;
    }
    return s + (left + full - 1) / full;
}

/* Warmup: a straight line to lr.  Then, p of the way to the last step, between lr and lr * min_lr. */
double bm_schedule_lr(const bm_train_config *c, uint64_t step) {
    const double steps = (double)bm_schedule_steps(c), warm = (double)c->warmup, s = (double)step;
    double p = 0, high = 1;
    if (s < warm) return c->lr * (s + 1) / warm;
    switch ((bm_curve)c->curve) {
    case BM_CURVE_COSINE:       /* arXiv 1608.03983, eq. 5 */
        p = fmin(1, (s - warm) / fmax(1, steps - warm));
        high = 0.5 * (1 + cos(acos(-1) * p));
        break;
    case BM_CURVE_LINEAR:
        high = 1 - fmin(1, (s - warm) / fmax(1, steps - warm));
        break;
    case BM_CURVE_CONSTANT: break;
    case BM_CURVE_WSD:          /* arXiv 2404.06395, section 4: constant, then down at the end */
        p = steps * (1 - c->wsd_share);
        if (s > p) high = 1 - fmin(1, (s - p) / fmax(1, steps - p));
        break;
    }
    return c->lr * (c->min_lr + (1 - c->min_lr) * high);
}
