/* src/train/batch.c - rows of packed data as micro-batches of whole routing groups.  Room: train.
 *
 * In: a step.  Out: this rank's share of its global batch, a micro-batch at a time, on the host.  Routing group g is
 * rows g * route_group and on of the global batch, whichever rank and micro-batch holds them.
 *
 * With `carry` a sequence has two slots of the learner: a row's first segment goes on in one, its last segment begins
 * in the other, which holds the state from then on. */
#include "train/train.h"
#include <stdlib.h>
#include <string.h>

/* ---- sizes ----------------------------------------------------------------------------------------------------- */

/* Segments of a row of T tokens of a split, at most: documents that begin in it, and what was there before. */
static int64_t segments(const bm_data *d, bm_split s, int64_t T) {
    const uint64_t n = bm_data_documents(d, s);
    uint64_t first = 0, most = 0;
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t begin = bm_data_document(d, s, i);
        while (bm_data_document(d, s, first) + (uint64_t)T <= begin) first++;
        if (i - first + 1 > most) most = i - first + 1;
    }
    return (int64_t)most + 1 < T ? (int64_t)most + 1 : T;
}

/* Room for any one routing group, and for four times the usual number of segments in a full micro-batch. */
static bm_status sizes(bm_batch *b, const bm_comm *comm) {
    const bm_train_config *c = b->c;
    const int64_t T = c->seq_len, groups = c->batch.sequences / c->route_group;
    const int64_t share = (groups + comm->size - 1) / comm->size * c->route_group;
    const int64_t micro = c->batch.micro < share ? c->batch.micro : share;
    int64_t worst = 1;
    double usual = 1;
    for (size_t i = 0; i < b->n_sources; i++) {
        const bm_data *d = b->source[i];
        for (int s = 0; s < BM_SPLITS; s++) {
            const int64_t most = segments(d, (bm_split)s, T);
            const double documents = (double)bm_data_documents(d, (bm_split)s);
            const double tokens = (double)bm_data_tokens(d, (bm_split)s);
            const double mean = 1 + (double)T * documents / (tokens + 1);
            if (most > worst) worst = most;
            if (mean > usual) usual = mean;
        }
    }
    int64_t sequences = (int64_t)(4 * usual) * micro;
    if (sequences < worst * c->route_group) sequences = worst * c->route_group;
    if (sequences > worst * micro) sequences = worst * micro;
    b->most = (bm_learner_options){ .rows = (int)(micro * T), .sequences = (int)sequences,
                                    .groups = (int)(micro / c->route_group), .recompute = c->recompute,
                                    .slots = c->carry ? (int)(2 * share) : 0,
                                    .arith = c->precision == BM_PRECISION_BF16 ? BM_ARITH_NATIVE : BM_ARITH_F32 };
    return BM_OK;
}

/* ---- open, close --------------------------------------------------------------------------------------------- */

static bm_status sources_open(bm_batch *b) {
    const bm_train_config *c = b->c;
    BM_TRY(bm_alloc(&b->source, c->n_data * sizeof *b->source, "data"));
    for (size_t i = 0; i < c->n_data; i++) {
        BM_TRY(bm_data_open(&b->source[i], c->data[i].path));
        b->n_sources = i + 1;
        const bm_data *d = b->source[i];
        if (bm_data_vocab(d) > (size_t)c->model.n_vocab)
            return bm_fail(BM_EARG, "%s: found a vocabulary of %zu, the model of %s has %d: give it vocab_size %zu or "
                           "more", bm_data_path(d), bm_data_vocab(d), c->path, c->model.n_vocab, bm_data_vocab(d));
        if (bm_data_tokenizer_hash(d) != bm_data_tokenizer_hash(b->source[0]))
            return bm_fail(BM_EARG, "%s: found another tokenizer than that of %s, expected the same: pack both with "
                           "one", bm_data_path(d), bm_data_path(b->source[0]));
    }
    return BM_OK;
}

static bm_status order_open(bm_batch *b) {
    const bm_train_config *c = b->c;
    double weight[BM_MAX_SOURCES];
    for (size_t i = 0; i < c->n_data; i++) weight[i] = c->data[i].weight;
    BM_TRY(bm_order_open(&b->order, (const bm_data *const *)b->source, weight[0] > 0 ? weight : NULL, (int)b->n_sources,
                         (uint64_t)c->seed_data, (int)c->seq_len));
    return c->carry ? bm_order_lanes(b->order, (int)c->batch.sequences) : BM_OK;
}

static bm_status batch_init(bm_batch *b, const bm_comm *comm) {
    BM_TRY(sources_open(b));
    BM_TRY(order_open(b));
    BM_TRY(sizes(b, comm));
    const size_t T = (size_t)b->c->seq_len, M = (size_t)b->most.rows;
    const size_t Q = (size_t)b->most.sequences, G = (size_t)b->most.groups;
    BM_TRY(bm_alloc(&b->token, M * sizeof *b->token, "a batch"));
    BM_TRY(bm_alloc(&b->target, M * sizeof *b->target, "a batch"));
    BM_TRY(bm_alloc(&b->tokens, (T + 1) * sizeof *b->tokens, "a batch"));
    BM_TRY(bm_alloc(&b->start, (Q + 1) * sizeof *b->start, "a batch"));
    BM_TRY(bm_alloc(&b->slot, Q * sizeof *b->slot, "a batch"));
    BM_TRY(bm_alloc(&b->group, (G + 1) * sizeof *b->group, "a batch"));
    BM_TRY(bm_alloc(&b->starts, T * sizeof *b->starts, "a batch"));
    return bm_alloc(&b->which, (size_t)b->c->batch.sequences * sizeof *b->which, "a batch");
}

bm_status bm_batch_open(bm_batch **out, const bm_train_config *c, const bm_comm *comm) {
    bm_batch *b;
    *out = NULL;
    BM_TRY(bm_alloc(&b, sizeof *b, "a batch"));
    b->c = c;
    const bm_status s = batch_init(b, comm);
    if (s) bm_batch_close(b);
    else *out = b;
    return s;
}

void bm_batch_close(bm_batch *b) {
    if (!b) return;
    bm_order_close(b->order);
    for (size_t i = 0; i < b->n_sources; i++) bm_data_close(b->source[i]);
    free(b->source);
    free(b->token);
    free(b->target);
    free(b->tokens);
    free(b->start);
    free(b->slot);
    free(b->group);
    free(b->starts);
    free(b->which);
    free(b);
}

/* ---- rows of a micro-batch ----------------------------------------------------------------------------------- */

static bool fits(const bm_batch *b, const bm_row *r) {
    return b->M + r->n <= b->most.rows && b->Q + r->n_starts <= b->most.sequences;
}

/* The row in tokens and starts, behind those there are. */
static void append(bm_batch *b, const bm_row *r) {
    memcpy(b->token + b->M, b->tokens, (size_t)r->n * sizeof *b->token);
    memcpy(b->target + b->M, b->tokens + 1, (size_t)r->n * sizeof *b->target);
    for (int i = 0; i < r->n_starts; i++) {
        b->start[b->Q] = b->M + b->starts[i];
        b->slot[b->Q++] = -1;
    }
    b->M += r->n;
    b->start[b->Q] = b->M;
}

/* Slots of the row appended last, of `lane` of the global batch; the first lane of this rank's share is `base`. */
static void carry(bm_batch *b, bm_learner *l, const bm_row *r, int lane, int base) {
    const size_t bytes = l->pass.stride * sizeof(float);
    int32_t *slot = b->slot + b->Q - r->n_starts;
    const int here = 2 * (lane - base) + b->which[lane], other = 2 * (lane - base) + !b->which[lane];
    if (r->fresh) l->be->zero(l->be, l->pass.state + (size_t)here * l->pass.stride, bytes);
    slot[0] = here;
    if (r->n_starts == 1) return;
    l->be->zero(l->be, l->pass.state + (size_t)other * l->pass.stride, bytes);
    slot[r->n_starts - 1] = other;
}

static void empty(bm_batch *b) {
    b->M = b->Q = b->G = 0;
    b->start[0] = b->group[0] = 0;
}

static void give(const bm_batch *b, bm_micro *out) {
    *out = (bm_micro){ .M = b->M, .Q = b->Q, .G = b->G, .token = b->token, .target = b->target, .start = b->start,
                       .slot = b->slot, .group = b->group };
}

static int share_begin(const bm_comm *comm, int groups, int rank) { return (int)((int64_t)groups * rank / comm->size); }

void bm_batch_begin(bm_batch *b, const bm_comm *comm, uint64_t step) {
    const int groups = bm_schedule_sequences(b->c, step) / (int)b->c->route_group;
    b->step = step;
    b->T = bm_schedule_length(b->c, step);
    b->next = share_begin(comm, groups, comm->rank);
    b->end = share_begin(comm, groups, comm->rank + 1);
    b->base = b->next * (int)b->c->route_group;
    b->first = bm_schedule_before(b->c, step);
}

/* Group b->next, row by row; *whole false: there was no room, and nothing of it is left. */
static bm_status add_group(bm_batch *b, bm_learner *l, bool *whole) {
    const int route_group = (int)b->c->route_group, M = b->M, Q = b->Q, lanes = (int)b->c->batch.sequences;
    bm_row r;
    *whole = true;
    for (int i = 0; i < route_group; i++) {
        const int lane = b->next * route_group + i;
        if (b->c->carry) BM_TRY(bm_order_carry(b->order, lane, lanes, b->step * (uint64_t)b->T, b->T, b->tokens,
                                               b->starts, &r));
        else BM_TRY(bm_order_row(b->order, b->first + (uint64_t)lane, b->T, b->tokens, b->starts, &r));
        if (!fits(b, &r)) {
            *whole = false;
            b->M = M;
            b->Q = Q;
            b->start[Q] = M;
            return BM_OK;
        }
        append(b, &r);
        if (b->c->carry) carry(b, l, &r, lane, b->base);
    }
    b->group[++b->G] = b->M;
    b->next++;
    return BM_OK;
}

/* Which slot holds each lane's state once the micro-batch has run. */
static void turn(bm_batch *b) {
    for (int q = 0; q < b->Q; q++)
        if (b->slot[q] >= 0) b->which[b->base + b->slot[q] / 2] = (uint8_t)(b->slot[q] % 2);
}

bm_status bm_batch_next(bm_batch *b, bm_learner *l, bm_micro *out) {
    bool whole = true;
    empty(b);
    while (whole && b->next < b->end && b->G < b->most.groups) BM_TRY(add_group(b, l, &whole));
    turn(b);
    give(b, out);
    return BM_OK;
}

/* ---- carried states ------------------------------------------------------------------------------------------ */

size_t bm_carry_floats(const struct bm_trainer *t) {
    return t->config->carry ? (size_t)t->config->batch.sequences * t->learner->pass.stride : 0;
}

bm_status bm_carry_get(struct bm_trainer *t, float *x) {
    bm_batch *b = t->batch;
    bm_learner *l = t->learner;
    const size_t stride = l->pass.stride;
    const int groups = (int)(b->c->batch.sequences / b->c->route_group), size = t->comm->size;
    size_t *at;
    bm_request begun;
    BM_TRY(bm_alloc(&at, ((size_t)size + 1) * sizeof *at, "carried states"));
    for (int r = 0; r <= size; r++)
        at[r] = (size_t)share_begin(t->comm, groups, r) * (size_t)b->c->route_group * stride;
    for (size_t i = at[t->comm->rank] / stride; i < at[t->comm->rank + 1] / stride; i++) {
        const size_t slot = 2 * (i - at[t->comm->rank] / stride) + b->which[i];
        l->be->get(l->be, x + i * stride, l->pass.state + slot * stride, stride * sizeof *x);
    }
    bm_status s = l->be->sync(l->be);
    if (!s) s = t->comm->all_gather(t->comm, x, at, &begun);
    if (!s) s = t->comm->wait(t->comm, &begun);
    free(at);
    return s;
}

bm_status bm_carry_set(struct bm_trainer *t, const float *x) {
    bm_batch *b = t->batch;
    bm_learner *l = t->learner;
    const size_t stride = l->pass.stride;
    const int groups = (int)(b->c->batch.sequences / b->c->route_group), route_group = (int)b->c->route_group;
    const int begin = share_begin(t->comm, groups, t->comm->rank) * route_group;
    const int end = share_begin(t->comm, groups, t->comm->rank + 1) * route_group;
    memset(b->which, 0, (size_t)b->c->batch.sequences);
    for (int i = begin; i < end; i++)
        l->be->put(l->be, l->pass.state + 2 * (size_t)(i - begin) * stride, x + (size_t)i * stride, stride * sizeof *x);
    return l->be->sync(l->be);
}

/* ---- validation ---------------------------------------------------------------------------------------------- */

bm_status bm_batch_valid(bm_batch *b, int source, uint64_t *w, uint64_t step, uint64_t n, uint64_t of, bm_micro *out) {
    const int T = (int)b->c->seq_len;
    bm_row r;
    empty(b);
    for (; *w < n; *w += step) {
        BM_TRY(bm_data_window(b->source[source], BM_SPLIT_VALID, *w * of / n, T, b->tokens, b->starts, &r));
        if (!fits(b, &r)) break;
        append(b, &r);
    }
    b->group[++b->G] = b->M;
    give(b, out);
    return BM_OK;
}
