/* src/model/arena.c - all parameters of a model as f32, one behind the other.  Room: model.
 *
 * In: a configuration.  Out: where each part lies; the same numbers as a model's weights, as gradients, and as
 * the tensors of a file.  Host values are (n) floats in the order of the arena. */
#include "model/model.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t elements(const bm_part *p) { return (size_t)p->rows * (size_t)p->cols; }

static int by_number(const void *a, const void *b) {
    const uint64_t x = ((const struct bm_arena_number *)a)->number, y = ((const struct bm_arena_number *)b)->number;
    return x < y ? -1 : x > y;
}

/* Experts of a tensor lie without gaps (biases are read stacked); tensors begin at multiples of 16 floats. */
bm_status bm_arena_open(bm_arena *out, const bm_config *c) {
    bm_arena a = { .config = c };
    bm_file_tensor t;
    size_t cap = 0;
    bm_status s = BM_OK;
    memset(out, 0, sizeof *out);
    for (bm_walk w = bm_params_walk(c, BM_LAYOUT_GGUF); !s && bm_walk_next(&w, &t); ) {
        a.n = (a.n + 15) / 16 * 16;
        s = bm_grow(&a.part, &cap, a.n_parts + (size_t)t.n_parts, sizeof *a.part, "a list of parameters");
        for (int i = 0; !s && i < t.n_parts; i++) {
            const bm_part p = bm_file_tensor_part(&t, i);
            a.part[a.n_parts++] = (struct bm_arena_part){ p, a.n };
            a.n += elements(&p);
        }
    }
    a.n = (a.n + 15) / 16 * 16;
    if (!s) s = bm_alloc(&a.by_number, a.n_parts * sizeof *a.by_number, "a list of parameters");
    if (s) {
        bm_arena_close(&a);
        return s;
    }
    for (size_t i = 0; i < a.n_parts; i++) a.by_number[i] = (struct bm_arena_number){ bm_part_number(&a.part[i].part), a.part[i].at };
    qsort(a.by_number, a.n_parts, sizeof *a.by_number, by_number);
    *out = a;
    return BM_OK;
}

void bm_arena_close(bm_arena *a) {
    free(a->part);
    free(a->by_number);
    memset(a, 0, sizeof *a);
}

size_t bm_arena_at(const bm_arena *a, const bm_part *p) {
    const uint64_t want = bm_part_number(p);
    size_t lo = 0, hi = a->n_parts;
    while (hi - lo > 1) {
        const size_t mid = (lo + hi) / 2;
        if (a->by_number[mid].number <= want) lo = mid;
        else hi = mid;
    }
    return a->by_number[lo].at;
}

void bm_arena_bind(const bm_arena *a, bm_weights *w, float *base, uint16_t *half, float *A) {
    for (size_t i = 0; i < a->n_parts; i++) {
        const bm_part *p = &a->part[i].part;
        const size_t at = a->part[i].at;
        const int flags = p->param->flags;
        void *f = bm_weights_field(w, p);
        const bool halved = half && flags & BM_P_MATRIX;
        const bm_tensor t = { halved ? (void *)(half + at) : (void *)(base + at), halved ? BM_BF16 : BM_F32, p->rows, p->cols };
        if (flags & BM_P_TENSOR || (flags & BM_P_MATRIX && !(flags & BM_P_EXPERT))) *(bm_tensor *)f = t;
        else if (flags & BM_P_MATRIX) (*(bm_tensor **)f)[p->expert] = t;
        else if (flags & BM_P_ALOG && A) *(float **)f = A + (size_t)p->layer * elements(p);
        else if (p->expert == 0) *(float **)f = base + at;
    }
    if (a->config->tied_head) w->head = w->embedding;
}

/* ---- files --------------------------------------------------------------------------------------- */

static void copy_part(const bm_part *p, bool as_A, float *held, float *file, bool to_file) {
    const size_t rows = (size_t)p->rows, cols = (size_t)p->cols;
    const bool turned = p->param->flags & BM_P_TRANSPOSED, A = as_A && p->param->flags & BM_P_ALOG;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            float *h = held + (turned ? c * rows + r : r * cols + c), *f = file + r * cols + c;
            if (to_file) *f = A ? bm_A_from_log(*h) : *h;
            else *h = A ? bm_A_to_log(*f) : *f;
        }
}

void bm_arena_get(const bm_arena *a, const float *values, size_t from, bm_layout layout, const bm_file_tensor *t, float *out) {
    for (int i = 0; i < t->n_parts; i++) {
        const bm_part p = bm_file_tensor_part(t, i);
        copy_part(&p, layout == BM_LAYOUT_GGUF, (float *)values + (bm_arena_at(a, &p) - from), out + (size_t)i * elements(&p), true);
    }
}

void bm_arena_set(const bm_arena *a, float *values, size_t from, bm_layout layout, const bm_file_tensor *t, const float *in) {
    for (int i = 0; i < t->n_parts; i++) {
        const bm_part p = bm_file_tensor_part(t, i);
        copy_part(&p, layout == BM_LAYOUT_GGUF, values + (bm_arena_at(a, &p) - from), (float *)in + (size_t)i * elements(&p), false);
    }
}

static bm_status load_tensor(const bm_arena *a, float *values, const bm_source *s, const bm_file_tensor *t, const bm_entry *e) {
    const bm_layout layout = bm_layout_of(a->config, bm_source_format(s));
    void *bytes;
    float *x;
    BM_TRY(bm_alloc(&bytes, e->bytes, e->name));
    bm_status st = bm_alloc(&x, e->n * sizeof *x, e->name);
    if (!st) st = bm_source_read(s, e, bytes);
    if (!st) {
        bm_widen(x, e->type, bytes, e->n);
        bm_arena_set(a, values, 0, layout, t, x);
    }
    free(x);
    free(bytes);
    return st;
}

bm_status bm_arena_load(const bm_arena *a, float *values, const bm_source *s) {
    const bm_entry **entry;
    size_t n, i = 0;
    bm_file_tensor t;
    BM_TRY(bm_params_match(a->config, s, &entry, &n));
    bm_status st = BM_OK;
    for (bm_walk w = bm_params_walk(a->config, bm_layout_of(a->config, bm_source_format(s))); !st && bm_walk_next(&w, &t); i++)
        st = load_tensor(a, values, s, &t, entry[i]);
    free(entry);
    return st;
}

/* ---- initialisation: docs/MODEL.md, "Training" ------------------------------------------------------- */

/* Bound of the uniform initialisations, 0 for the others. */
static double bound_of(const bm_config *c, const bm_part *p) {
    switch (p->param->init) {
    case BM_INIT_LINEAR: return 1 / sqrt(p->cols);
    case BM_INIT_OUT: return 1 / sqrt(p->cols) / sqrt(c->n_layers);
    case BM_INIT_CONV: return 1 / sqrt(c->d_conv);
    case BM_INIT_DT_WEIGHT: return 1 / sqrt(c->dt_rank);
    default: return 0;
    }
}

/* Element i of the others; u is its number in [0, 1). */
static float initial(const bm_config *c, const bm_part *p, uint64_t seed, uint64_t i, double u) {
    double v;
    switch (p->param->init) {
    case BM_INIT_EMBED: return (float)(0.02 * bm_rng_normal(seed, bm_part_number(p), i));
    case BM_INIT_ONE: return 1;
    case BM_INIT_DT_BIAS:
        v = fmax(1e-4, exp(log(1e-3) + u * (log(1e-1) - log(1e-3))));
        return (float)(v + log(-expm1(-v)));
    case BM_INIT_ALOG: return (float)log((double)(i % (uint64_t)c->d_state + 1));
    default: return 0;
    }
}

void bm_part_init(const bm_config *c, const bm_part *p, uint64_t seed, uint64_t first, float *x, size_t n) {
    const float bound = (float)bound_of(c, p);
    bm_rng_fill(seed, bm_part_number(p), first, x, n);
    for (size_t i = 0; i < n; i++)
        x[i] = bound > 0 ? (2 * x[i] - 1) * bound : initial(c, p, seed, first + i, (double)x[i]);
}

void bm_arena_init(const bm_arena *a, float *values, uint64_t seed) {
    for (size_t i = 0; i < a->n_parts; i++) {
        const bm_part *p = &a->part[i].part;
        const size_t n = elements(p), rows = (size_t)p->rows, cols = (size_t)p->cols;
        float *x = values + a->part[i].at;
        if (!(p->param->flags & BM_P_TRANSPOSED)) bm_part_init(a->config, p, seed, 0, x, n);
        else for (size_t e = 0; e < n; e++) bm_part_init(a->config, p, seed, e, x + e % cols * rows + e / cols, 1);
    }
}
