/* src/model/bench.c - every operation of the door by itself, against the clock.  Room: model.
 *
 * In: a device.  Out: a bm_kernel_time for each operation, type of weights and arithmetic.  Weights
 * of one-row products come from so much memory that no cache keeps them.  The backward has sizes of training. */
#include "model/model.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { D = 1152, F = 3072, I = 2 * D, N = 16, R = 72, X = 8, V = 50304, ROWS = 512, LOSS_ROWS = 64, MOST = 64 };
enum { NOISE = LOSS_ROWS * V, PATTERN_ROWS = 64 };
static const size_t WEIGHTS = (size_t)256 << 20;

typedef struct bench bench;
typedef void (*once_fn)(bench *b);
struct bench {
    bm_backend *be;
    bool (*fn)(void *user, const bm_kernel_time *t);
    void *user;
    double bandwidth;
    float *noise, *out;             /* (NOISE): what operations read and write */
    float *state, *A;               /* (N + 3, I) (N, I) */
    int32_t *start, *expert, *order, *first, *target;
    uint8_t *weights;               /* WEIGHTS bytes of the type at hand, copies of one matrix */
    float *host;                    /* (NOISE) */
    uint8_t *packed;                /* PATTERN_ROWS rows of F, of any type; those of quants again, as the backend packs them */
    bm_tensor w;                    /* the matrix of linear; its copies lie behind it */
    int copies, M;
    bm_arith arith;
    double amount;                  /* what one pass does, in the unit of the line */
};

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Passes of `once` for 60 ms, at least 3 unless they are slow; then the line, with the median. */
static bm_status measure(bench *b, once_fn once, bm_kernel_time t) {
    double seconds[MOST], total = 0;
    int n = 0;
    while (n < MOST && (total < 0.06 || (n < 3 && total < 0.5))) {
        const double start = bm_now();
        once(b);
        BM_TRY(b->be->sync(b->be));
        seconds[n] = bm_now() - start;
        total += seconds[n++];
    }
    qsort(seconds, (size_t)n, sizeof *seconds, ascending);
    t.rate = b->amount / seconds[n / 2];
    return b->fn(b->user, &t) ? BM_OK : bm_fail(BM_ECANCELLED, "stopped by the reader of kernel times");
}

/* ---- products ------------------------------------------------------------------------------------------ */

/* Fills the weights with copies of a (rows, cols) matrix. */
static void weights_fill(bench *b, bm_dtype type, int rows, int cols) {
    const size_t pattern = bm_matrix_bytes(b->be, type, PATTERN_ROWS, (size_t)cols);
    const uint8_t *from = b->packed;
    bm_narrow(b->packed, type, b->host, (size_t)PATTERN_ROWS * (size_t)cols);
    if (bm_packs(b->be, type)) {
        uint8_t *to = b->packed + bm_dtype_bytes(type, (size_t)PATTERN_ROWS * (size_t)cols);
        b->be->pack(to, from, type, PATTERN_ROWS, (size_t)cols);
        from = to;
    }
    for (size_t at = 0; at < WEIGHTS; at += pattern)
        b->be->put(b->be, b->weights + at, from, pattern < WEIGHTS - at ? pattern : WEIGHTS - at);
    b->w = (bm_tensor){ b->weights, type, rows, cols };
    b->copies = (int)(WEIGHTS / bm_matrix_bytes(b->be, type, (size_t)rows, (size_t)cols));
}

static bm_tensor copy_of(const bench *b, int i) {
    bm_tensor t = b->w;
    t.data = b->weights + (size_t)(i % b->copies) * bm_matrix_bytes(b->be, t.type, (size_t)t.rows, (size_t)t.cols);
    return t;
}

static void linear_once(bench *b) {
    for (int i = 0; i < (b->M == 1 ? b->copies : 1); i++) {
        const bm_tensor w = copy_of(b, i);
        b->be->linear(b->be, &(bm_op_linear){ .M = b->M, .ldx = w.cols, .w = &w, .x = b->noise, .y = b->out,
                                              .arith = b->arith });
    }
}

static bm_status linear_lines(bench *b, bm_dtype type, bm_arith arith, double peak) {
    const int size[2][2] = { { F, D }, { D, F } };      /* rows, cols */
    b->arith = arith;
    for (int i = 0; i < 2; i++) {
        const int rows = size[i][0], cols = size[i][1];
        if (bm_dtype_fitting(type, (size_t)cols) != type) continue;
        weights_fill(b, type, rows, cols);
        b->M = 1;
        b->amount = (double)b->copies * (double)bm_dtype_bytes(type, (size_t)rows * (size_t)cols);
        bm_kernel_time t = { .kernel = "linear", .type = type, .arith = arith, .M = 1, .N = rows, .K = cols,
                             .unit = "B", .roof = b->bandwidth };
        BM_TRY(measure(b, linear_once, t));
        t.M = b->M = ROWS;
        t.unit = "op";
        t.roof = peak;
        b->amount = 2.0 * ROWS * rows * cols;
        BM_TRY(measure(b, linear_once, t));
    }
    return BM_OK;
}

/* ROWS rows over X experts, as many for each. */
static void experts_once(bench *b) {
    bm_tensor up[X], gate[X], down[X];
    for (int e = 0; e < X; e++) {
        gate[e] = copy_of(b, 3 * e);
        up[e] = copy_of(b, 3 * e + 1);
        down[e] = copy_of(b, 3 * e + 2);
        down[e].rows = D;
        down[e].cols = F;
    }
    const bm_op_route route = { .M = ROWS, .X = X, .k = 1, .expert = b->expert, .order = b->order, .first = b->first,
                                .gate = b->noise };
    b->be->experts(b->be, &(bm_op_experts){ .M = ROWS, .D = D, .F = F, .X = X, .arith = b->arith, .route = &route,
                                            .gate = gate, .up = up, .down = down, .x = b->noise, .hidden = b->out,
                                            .y = b->out + NOISE });
}

static bm_status product_lines(bench *b) {
    for (int type = 0; type < BM_DTYPE_COUNT; type++) {
        const bool same = type == BM_F32 || type == BM_F16;     /* native is f32 for these */
        BM_TRY(b->be->bandwidth(b->be, WEIGHTS, 5, &b->bandwidth));
        for (int arith = same ? BM_ARITH_F32 : BM_ARITH_NATIVE; arith <= BM_ARITH_F32; arith++) {
            double peak;
            BM_TRY(b->be->peak(b->be, (bm_arith)arith, (bm_dtype)type, &peak));
            BM_TRY(linear_lines(b, (bm_dtype)type, (bm_arith)arith, peak));
            if (bm_dtype_fitting((bm_dtype)type, D) != (bm_dtype)type) continue;
            weights_fill(b, (bm_dtype)type, F, D);
            b->amount = 6.0 * ROWS * F * D;
            BM_TRY(measure(b, experts_once, (bm_kernel_time){ .kernel = "experts", .type = (bm_dtype)type,
                           .arith = (bm_arith)arith, .M = ROWS, .N = F, .K = D, .unit = "op", .roof = peak }));
        }
    }
    return BM_OK;
}

/* ---- products of the backward, at sizes of the starter --------------------------------------------------- */

enum { BACK_D = 320, BACK_F = 640, BACK_I = 640, BACK_V = 8192, BACK_ROWS = 4096 };
enum { BACK_WEIGHTS = 3 * BACK_D * BACK_F, BACK_PATTERN = BACK_D * BACK_F / 5 };      /* of an expert; put at a time */
typedef struct back {               /* the bench is first: a bench * is a back * */
    bench b;
    float *x, *dy, *dx, *dw, *hidden, *act, *dhidden, *dact, *gate;
    void *weights;
    int32_t *order, *first;
    bm_dtype type;
    int rows, cols;
} back;

static void linear_back_once(bench *b) {
    const back *k = (const back *)b;
    const bm_tensor w = { k->weights, k->type, k->rows, k->cols };
    b->be->linear_back(b->be, &(bm_op_linear){ .M = b->M, .ldx = k->cols, .w = &w, .x = k->x, .arith = BM_ARITH_NATIVE,
                                               .dy = k->dy, .dx = k->dx, .dw = k->dw });
}
static void experts_back_once(bench *b) {
    const back *k = (const back *)b;
    const size_t each = (size_t)BACK_D * BACK_F, bytes = bm_dtype_bytes(k->type, each);
    bm_tensor w[3][X], dw[3][X];
    for (size_t i = 0; i < 3 * X; i++) {
        const int rows = i % 3 == 2 ? BACK_D : BACK_F, cols = i % 3 == 2 ? BACK_F : BACK_D;
        w[i % 3][i / 3] = (bm_tensor){ (const uint8_t *)k->weights + i * bytes, k->type, rows, cols };
        dw[i % 3][i / 3] = (bm_tensor){ k->dw + i * each, BM_F32, rows, cols };
    }
    const bm_op_route route = { .M = BACK_ROWS, .X = X, .k = 1, .order = k->order, .first = k->first, .gate = k->gate };
    b->be->experts_back(b->be, &(bm_op_experts){
        .M = BACK_ROWS, .D = BACK_D, .F = BACK_F, .X = X, .arith = BM_ARITH_NATIVE, .route = &route,
        .gate = w[0], .up = w[1], .down = w[2], .x = k->x, .hidden = k->hidden, .act = k->act, .dy = k->dy, .dx = k->dx,
        .dgate = k->gate + BACK_ROWS, .dw_gate = dw[0], .dw_up = dw[1], .dw_down = dw[2],
        .dhidden = k->dhidden, .dact = k->dact });
}
static bm_status back_measure(back *k) {
    static const int size[3][3] = {      /* M, N, K: into a block, out of it, the head */
        { BACK_ROWS, 2 * BACK_I, BACK_D }, { BACK_ROWS, BACK_D, BACK_I }, { 512, BACK_V, BACK_D },
    };
    static const bm_dtype type[] = { BM_F32, BM_BF16 };
    bench *b = &k->b;
    for (int t = 0; t < 2; t++) {
        double peak;
        k->type = type[t];
        const size_t bytes = bm_dtype_bytes(k->type, BACK_PATTERN);
        bm_narrow(b->packed, k->type, b->host, BACK_PATTERN);
        for (size_t i = 0; i < X * BACK_WEIGHTS / BACK_PATTERN; i++)
            b->be->put(b->be, (uint8_t *)k->weights + i * bytes, b->packed, bytes);
        BM_TRY(b->be->peak(b->be, BM_ARITH_NATIVE, k->type, &peak));
        bm_kernel_time line = { .kernel = "linear_back", .type = k->type, .arith = BM_ARITH_NATIVE, .unit = "op",
                                .roof = peak };
        for (int i = 0; i < 3; i++) {
            line.M = b->M = size[i][0];
            line.N = k->rows = size[i][1];
            line.K = k->cols = size[i][2];
            b->amount = 4.0 * line.M * line.N * line.K;
            BM_TRY(measure(b, linear_back_once, line));
        }
        b->amount = 12.0 * BACK_ROWS * BACK_F * BACK_D;
        line.kernel = "experts_back";
        line.M = BACK_ROWS;
        line.N = BACK_F;
        line.K = BACK_D;
        BM_TRY(measure(b, experts_back_once, line));
    }
    return BM_OK;
}
static bm_status back_fill(back *k) {
    bm_backend *be = k->b.be;
    const size_t M = BACK_ROWS, f = sizeof(float);
    const struct { void *out; size_t bytes; } want[] = {
        { &k->x, M * BACK_I * f }, { &k->dy, M * 2 * BACK_I * f }, { &k->dx, M * BACK_I * f },
        { &k->dw, X * BACK_WEIGHTS * f }, { &k->hidden, M * 2 * BACK_F * f }, { &k->act, M * BACK_F * f },
        { &k->dhidden, M * 2 * BACK_F * f }, { &k->dact, M * BACK_F * f }, { &k->gate, 2 * M * f },
        { &k->weights, X * BACK_WEIGHTS * f }, { &k->order, M * sizeof(int32_t) },
        { &k->first, (X + 1) * sizeof(int32_t) },
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        BM_TRY(be->alloc(be, want[i].out, want[i].bytes, "measuring the backward"));
    int32_t order[BACK_ROWS], first[X + 1];
    for (int i = 0; i < BACK_ROWS; i++) order[i] = i % (BACK_ROWS / X) * X + i / (BACK_ROWS / X);
    for (int e = 0; e <= X; e++) first[e] = e * (BACK_ROWS / X);
    be->put(be, k->order, order, sizeof order);
    be->put(be, k->first, first, sizeof first);
    float *const filled[] = { k->x, k->dy, k->hidden, k->act };
    const size_t wide[] = { BACK_I, 2 * BACK_I, 2 * BACK_F, BACK_F };
    for (int i = 0; i < 4; i++)
        for (size_t at = 0, n = M * wide[i], run; at < n; at += run) {
            run = n - at < NOISE ? n - at : NOISE;
            be->put(be, filled[i] + at, k->b.host, run * f);
        }
    be->put(be, k->gate, k->b.host, M * f);
    return be->reserve_back(be, BACK_ROWS, BACK_V, BACK_I);
}
static bm_status back_lines(const bench *b) {
    back k = { .b = *b };
    if (!b->be->linear_back || !b->be->experts_back) return BM_OK;
    bm_status s = back_fill(&k);
    if (!s) s = back_measure(&k);
    void *const all[] = { k.x, k.dy, k.dx, k.dw, k.hidden, k.act, k.dhidden, k.dact, k.gate, k.weights, k.order,
                          k.first };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]) b->be->release(b->be, all[i]);
    return s;
}

/* ---- the others ------------------------------------------------------------------------------------------ */

static void conv_once(bench *b) {
    b->be->conv(b->be, &(bm_op_conv){ .Q = 1, .start = b->start, .slot = b->first, .I = I, .K = 4, .ldx = 2 * I,
                                      .x = b->noise, .weight = b->noise, .bias = b->noise, .y = b->out,
                                      .state = b->state });
}
static void scan_once(bench *b) {
    const float *bc = b->noise + R;
    b->be->scan(b->be, &(bm_op_scan){ .M = ROWS, .Q = 1, .start = b->start, .slot = b->first, .I = I, .N = N, .ldz = 2 * I,
                                      .ldbc = R + 2 * N, .u = b->noise, .dt = b->noise + I, .dt_bias = b->noise,
                                      .A = b->A, .B = bc, .C = bc + N, .D = b->noise, .z = b->noise + I, .y = b->out,
                                      .state = b->state });
}
static void norm_once(bench *b) {
    b->be->norm(b->be, &(bm_op_norm){ .M = ROWS, .D = D, .eps = 1e-5f, .x = b->noise, .residual = b->noise + ROWS * D,
                                      .weight = b->noise, .sum = b->out, .y = b->out + ROWS * D });
}
static void route_once(bench *b) {
    b->be->route(b->be, &(bm_op_route){ .M = ROWS, .X = X, .k = 1, .logits = b->noise, .expert = b->target,
                                        .order = b->target + ROWS, .first = b->target + 2 * ROWS, .gate = b->out });
}
static void loss_once(bench *b) {
    b->be->loss(b->be, &(bm_op_loss){ .M = LOSS_ROWS, .V = V, .logits = b->noise, .target = b->expert,
                                      .loss = b->out });
}

static bm_status other_lines(bench *b) {
    const struct { once_fn once; double amount; bm_kernel_time t; } line[] = {
        { conv_once, 8.0 * ROWS * I, { .kernel = "conv", .M = ROWS, .N = I, .K = 4, .unit = "B" } },
        { scan_once, (double)ROWS * I * N, { .kernel = "scan", .M = ROWS, .N = I, .K = N, .unit = "updates" } },
        { scan_once, (double)I * N, { .kernel = "scan", .M = 1, .N = I, .K = N, .unit = "updates" } },
        { norm_once, 16.0 * ROWS * D, { .kernel = "norm", .M = ROWS, .N = D, .K = 1, .unit = "B" } },
        { route_once, ROWS, { .kernel = "route", .M = ROWS, .N = X, .K = 1, .unit = "rows" } },
        { loss_once, 4.0 * LOSS_ROWS * V, { .kernel = "loss", .M = LOSS_ROWS, .N = V, .K = 1, .unit = "B" } },
    };
    BM_TRY(b->be->bandwidth(b->be, WEIGHTS, 5, &b->bandwidth));
    for (size_t i = 0; i < sizeof line / sizeof *line; i++) {
        bm_kernel_time t = line[i].t;
        const int32_t start[2] = { 0, t.M };
        b->be->put(b->be, b->start, start, sizeof start);
        b->amount = line[i].amount;
        if (*t.unit == 'B') t.roof = b->bandwidth;
        BM_TRY(measure(b, line[i].once, t));
    }
    return BM_OK;
}

/* ---- open, close ------------------------------------------------------------------------------------------- */

static bm_status buffers_make(bench *b) {
    bm_backend *be = b->be;
    const struct { void *out; size_t bytes; } want[] = {
        { &b->noise, NOISE * sizeof(float) }, { &b->out, ((size_t)NOISE + ROWS * D) * sizeof(float) },
        { &b->state, (size_t)(N + 3) * I * sizeof(float) }, { &b->A, (size_t)N * I * sizeof(float) },
        { &b->start, 2 * sizeof(int32_t) }, { &b->expert, ROWS * sizeof(int32_t) },
        { &b->order, ROWS * sizeof(int32_t) }, { &b->first, (X + 1) * sizeof(int32_t) },
        { &b->target, (2 * ROWS + X + 1) * sizeof(int32_t) }, { &b->weights, WEIGHTS },
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        BM_TRY(be->alloc(be, want[i].out, want[i].bytes, "measuring kernels"));
    BM_TRY(bm_alloc(&b->host, NOISE * sizeof(float), "measuring kernels"));
    BM_TRY(bm_alloc(&b->packed, (size_t)PATTERN_ROWS * F * sizeof(float), "measuring kernels"));
    return be->reserve(be, ROWS, 2 * F);
}

static void buffers_fill(bench *b) {
    bm_backend *be = b->be;
    int32_t expert[ROWS], order[ROWS], first[X + 1];
    for (int i = 0; i < N * I; i++) b->host[i] = -1.0f - (float)(i / I);
    be->put(be, b->A, b->host, (size_t)N * I * sizeof(float));
    for (int i = 0; i < NOISE; i++) b->host[i] = (float)(2 * bm_rng_uniform(0, 0, (uint64_t)i) - 1);
    be->put(be, b->noise, b->host, NOISE * sizeof(float));
    for (int i = 0; i < ROWS; i++) {
        expert[i] = i % X;
        order[i] = i % (ROWS / X) * X + i / (ROWS / X);
    }
    for (int e = 0; e <= X; e++) first[e] = e * (ROWS / X);
    be->put(be, b->expert, expert, sizeof expert);
    be->put(be, b->order, order, sizeof order);
    be->put(be, b->first, first, sizeof first);
}

static void buffers_free(bench *b) {
    void *const all[] = { b->noise, b->out, b->state, b->A, b->start, b->expert, b->order, b->first, b->target,
                          b->weights };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]) b->be->release(b->be, all[i]);
    free(b->host);
    free(b->packed);
}

bm_status bm_device_kernels(bm_device *d, bool (*fn)(void *user, const bm_kernel_time *t), void *user) {
    bench b = { .be = d->be, .fn = fn, .user = user };
    pthread_mutex_lock(&d->lock);
    bm_status s = buffers_make(&b);
    if (!s) {
        buffers_fill(&b);
        s = product_lines(&b);
    }
    if (!s) s = other_lines(&b);
    if (!s) s = back_lines(&b);
    buffers_free(&b);
    pthread_mutex_unlock(&d->lock);
    return s;
}
