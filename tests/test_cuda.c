/* test_cuda.c - each operation on the first NVIDIA GPU against the scalar CPU, over shapes with tails, strides and every
 * type of weights; both sums are in f32, in another order.  What is recorded: test_cuda_recorded.c; whole models: make check-cuda. */
#include "lib_cuda.h"
#include "lib_scratch.h"
#include <unistd.h>

static void linear_in(bm_arith arith, bm_dtype type, int M, int N, int K, bool accumulate, double bound) {
    const int ldx = K + 4 * (M % 3);
    pair w = make_pair(type, N, K);
    twin x = random_twin((size_t)M * (size_t)ldx, 1), bias = random_twin((size_t)N, 1), y = random_twin((size_t)M * (size_t)N, 1);
    bm_tensor half = rounded(&w.host);
    const bool rounds = arith == BM_ARITH_NATIVE && type != BM_F32;
    bm_op_linear a = { .M = M, .ldx = ldx, .w = rounds ? &half : &w.host, .x = x.host, .bias = M % 2 ? bias.host : NULL, .y = y.host,
                       .accumulate = accumulate, .arith = BM_ARITH_F32 };
    if (rounds) round_all(&x);
    cpu->linear(cpu, &a);
    a.arith = arith, a.w = &w.at, a.x = x.at, a.bias = M % 2 ? bias.at : NULL, a.y = y.at;
    gpu->linear(gpu, &a);
    agree(&y, bound, bm_dtype_name(type));
    end(&x); end(&bias); end(&y); end_pair(&w); end_rounded(&half);
}
static void linear_case(bm_dtype type, int M, int N, int K, bool accumulate) {
    linear_in(BM_ARITH_F32, type, M, N, K, accumulate, 3e-6);
    linear_in(BM_ARITH_NATIVE, type, M, N, K, accumulate, 3e-6);
}
static void test_linear(void **state) {
    static const int rows[] = { 1, 2, 3, 8, 9, 40 };
    (void)state;
    for (int t = 0; t < BM_DTYPE_COUNT; t++)
        for (int i = 0; i < 6; i++) {
            const int block = (int)bm_dtype_block((bm_dtype)t);
            linear_case((bm_dtype)t, rows[i], 37, block > 1 ? 3 * block : 72, i % 2);
            linear_case((bm_dtype)t, rows[i], 5, block > 1 ? block : 1, !(i % 2));
            if (block == 1) linear_case((bm_dtype)t, rows[i], 9, 301, false);
            if (t == BM_F32) linear_case(BM_F32, 60 + 7 * i, 8 - i, 1160, i % 2);
            linear_case((bm_dtype)t, rows[i], 130, 1280, false);
        }
}

/* Many rows of bf16, or of quants by way of it: other kernels, tiles of rows, columns and k that end anywhere; also what they
 * leave to the others. */
static void test_wide(void **state) {
    static const int rows[] = { 64, 65, 128, 129, 200, 330 }, size[][2] = { { 37, 72 }, { 130, 200 }, { 104, 2304 }, { 192, 64 },
                                                                          { 391, 1152 }, { 128, 8 }, { 200, 68 }, { 100, 136 } };
    (void)state;
    for (int i = 0; i < 6; i++)
        for (int k = 0; k < 8; k++) linear_in(BM_ARITH_NATIVE, BM_BF16, rows[i], size[k][0], size[k][1], (i + k) % 2, 1e-5);
    static const int large[][2] = { { 1500, 2304 }, { 2048, 1152 }, { 1408, 2304 }, { 2048, 4608 }, { 1400, 1152 },
                                    { 1024, 1152 } };      /* every size of tiles */
    for (int i = 0; i < 6; i++) linear_in(BM_ARITH_NATIVE, BM_BF16, large[i][0], large[i][1], 72, false, 1e-5);
    for (int t = BM_F16; t < BM_DTYPE_COUNT; t++) {
        linear_in(BM_ARITH_NATIVE, (bm_dtype)t, 65, 130, 1280, false, 1e-5);
        linear_in(BM_ARITH_NATIVE, (bm_dtype)t, 200, 37, 256, true, 1e-5);
        linear_in(BM_ARITH_NATIVE, (bm_dtype)t, 80, 2304, 1280, false, 1e-5);       /* larger than the work space */
    }
}

/* Other types give the bits of a bf16 copy. */
static void copy_gives(bm_dtype type, int rows, int N, int K) {
    pair w = make_pair(type, N, K);
    bm_tensor half = rounded(&w.host), copy = half;
    twin x = random_twin((size_t)(rows * K), 1), y = empty_twin((size_t)(rows * N)), z = empty_twin((size_t)(rows * N));
    void *at;
    OK(gpu->alloc(gpu, &at, 2 * (size_t)(N * K), "a test"));
    gpu->put(gpu, at, half.data, 2 * (size_t)(N * K));
    copy.data = at;
    bm_op_linear a = { .M = rows, .ldx = K, .w = &w.at, .x = x.at, .y = y.at, .arith = BM_ARITH_NATIVE };
    gpu->linear(gpu, &a);
    a.w = &copy, a.y = z.at;
    gpu->linear(gpu, &a);
    float *got = fetched(&y), *want = fetched(&z);
    if (memcmp(got, want, y.n * sizeof *got)) fail_msg("%d rows by %s (%d,%d) and by a bf16 copy differ", rows, bm_dtype_name(type), N, K);
    drop(got);
    drop(want);
    gpu->release(gpu, at);
    end_rounded(&half);
    end(&x); end(&y); end(&z); end_pair(&w);
}
/* 6 to 128 rows of bf16, f16, q8_0 and q4_0: tiles of 64 columns and 64 of k that end anywhere, k shared by blocks; weights at an odd
 * place. */
static void test_few(void **state) {
    static const int rows[] = { 6, 9, 16, 17, 32, 33, 63, 64, 65, 127, 128 };
    static const int size[][2] = { { 37, 72 }, { 130, 200 }, { 104, 2304 }, { 192, 64 }, { 391, 1152 }, { 64, 8 }, { 200, 68 } };
    static const bm_dtype others[] = { BM_F16, BM_Q8_0, BM_Q4_0 };
    (void)state;
    for (int i = 0; i < 11; i++)
        for (int k = 0; k < 7; k++) {
            const int K = (size[k][1] + 31) / 32 * 32;
            linear_in(BM_ARITH_NATIVE, BM_BF16, rows[i], size[k][0], size[k][1], (i + k) % 2, 1e-5);
            linear_in(BM_ARITH_NATIVE, others[i % 3], rows[i], size[k][0], K, k % 2, 1e-5);
            for (int t = 0; t < 3; t++) copy_gives(others[t], rows[i], size[k][0], K);
        }
    pair w = make_pair(BM_BF16, 65, 64);
    twin x = random_twin(20 * 64, 1), y = empty_twin(20 * 64);
    bm_op_linear a = { .M = 20, .ldx = 64, .w = &w.host, .x = x.host, .y = y.host, .arith = BM_ARITH_F32 };
    round_all(&x);
    w.host.rows = w.at.rows = 64;
    w.host.data = (const char *)w.host.data + 2, w.at.data = (const char *)w.at.data + 2;
    cpu->linear(cpu, &a);
    a.arith = BM_ARITH_NATIVE, a.w = &w.at, a.x = x.at, a.y = y.at;
    gpu->linear(gpu, &a);
    agree(&y, 1e-5, "weights at an odd place");
    w.host.data = (const char *)w.host.data - 2, w.at.data = (const char *)w.at.data - 2;
    end(&x); end(&y); end_pair(&w);
}

/* A product with few columns leaves them rounded too: a product of them has the bits it has where it rounds them itself. */
static void test_narrow(void **state) {
    (void)state;
    for (int k = 0; k < 10; k++) {
        const int rows = (int[]){ 6, 40, 129, 1000, 2200 }[k / 2], I = 264, N = k % 2 ? 160 : 104, R = k % 2 ? 128 : 72;
        const size_t n = (size_t)(rows * I);
        pair in = make_pair(BM_BF16, N, I), dt = make_pair(BM_BF16, I, R);
        twin x = random_twin(n, 1), between = empty_twin((size_t)(rows * N)), y = empty_twin(n), z = empty_twin(n);
        bm_op_linear a = { .M = rows, .ldx = N, .w = &dt.at, .x = between.at, .y = y.at, .arith = BM_ARITH_NATIVE };
        gpu->linear(gpu, &(bm_op_linear){ .M = rows, .ldx = I, .w = &in.at, .x = x.at, .y = between.at, .arith = BM_ARITH_NATIVE });
        gpu->linear(gpu, &a);
        float *same = fetched(&between);
        gpu->put(gpu, between.at, same, between.n * sizeof *same);      /* what was left is forgotten */
        a.y = z.at;
        gpu->linear(gpu, &a);
        float *got = fetched(&y), *want = fetched(&z);
        assert_memory_equal(got, want, n * sizeof *got);
        drop(same);
        drop(got);
        drop(want);
        end(&x); end(&between); end(&y); end(&z); end_pair(&in); end_pair(&dt);
    }
}

/* An output's bits are the same whatever rows are beside it: the last n of M rows, and those n alone. */
static void rows_alone(int M, int n, int N, int K) {
    pair w = make_pair(BM_BF16, N, K);
    twin x = random_twin((size_t)(M * K), 1), y = empty_twin((size_t)(M * N)), z = empty_twin((size_t)(n * N));
    bm_op_linear a = { .M = M, .ldx = K, .w = &w.at, .x = x.at, .y = y.at, .arith = BM_ARITH_NATIVE };
    gpu->linear(gpu, &a);
    a.M = n, a.x = x.at + (M - n) * K, a.y = z.at;
    gpu->linear(gpu, &a);
    float *all = fetched(&y), *some = fetched(&z);
    if (memcmp(all + (M - n) * N, some, sizeof *some * (size_t)(n * N))) fail_msg("%d of %d rows by (%d,%d) differ alone", n, M, N, K);
    drop(all);
    drop(some);
    end(&x); end(&y); end(&z); end_pair(&w);
}
/* Row i goes to expert chosen[i] of X. */
static void grouped(const int32_t *chosen, int M, int X, int32_t *order, int32_t *first) {
    int n = 0;
    for (int e = 0; e < X; e++) {
        first[e] = n;
        for (int i = 0; i < M; i++) if (chosen[i] == e) order[n++] = i;
    }
    first[X] = n;
}
static void experts_alone(int M, int n, int D, int F, bool gated) {
    enum { X = 5, MOST = 128 };
    pair m[3][X];
    bm_tensor w[3][X];
    twin x = random_twin((size_t)(M * D), 1), gate = random_twin((size_t)M, 1), hidden = empty_twin((size_t)(M * 2 * F));
    twin y = empty_twin((size_t)(M * D)), z = empty_twin((size_t)(n * D));
    int32_t chosen[MOST], order[MOST], first[X + 1];
    for (int i = 0; i < M; i++) chosen[i] = i % 7 < 4 ? 1 : i % 3 + 2;        /* nobody takes expert 0, most take 1 */
    for (int i = 0; i < 3; i++) {
        make_pairs(m[i], X, BM_BF16, i < 2 ? F : D, i < 2 ? D : F, true);
        for (int e = 0; e < X; e++) w[i][e] = m[i][e].at;
    }
    for (int few = 0; few < 2; few++) {
        const int rows = few ? n : M, from = M - rows;
        grouped(chosen + from, rows, X, order, first);
        int32_t *at[2] = { put_ints(order, (size_t)rows), put_ints(first, X + 1) };
        const bm_op_route route = { .M = rows, .X = X, .k = 1, .order = at[0], .first = at[1], .gate = gate.at + from };
        gpu->experts(gpu, &(bm_op_experts){ .M = rows, .D = D, .F = F, .X = X, .activation = BM_SILU, .arith = BM_ARITH_NATIVE,
                                            .route = &route, .gate = gated ? w[0] : NULL, .up = w[1], .down = w[2],
                                            .x = x.at + from * D, .hidden = hidden.at, .y = few ? z.at : y.at });
        OK(gpu->sync(gpu));
        gpu->release(gpu, at[0]); gpu->release(gpu, at[1]);
    }
    float *all = fetched(&y), *some = fetched(&z);
    if (memcmp(all + (M - n) * D, some, sizeof *some * (size_t)(n * D))) fail_msg("experts: %d of %d rows differ alone", n, M);
    drop(all);
    drop(some);
    for (int i = 0; i < 3; i++) end_pairs(m[i], X);
    end(&x); end(&gate); end(&hidden); end(&y); end(&z);
}
static void test_alone(void **state) {
    static const int size[][2] = { { 104, 2304 }, { 391, 1152 }, { 1152, 600 }, { 64, 72 } };
    (void)state;
    for (int k = 0; k < 4; k++)
        for (int n = 6; n < 128; n = 2 * n - 1) rows_alone(128, n, size[k][0], size[k][1]);
    for (int gated = 0; gated < 2; gated++)
        for (int n = 6; n < 128; n = 2 * n - 1) experts_alone(128, n, 200, 328, gated);
}

/* Rows of two sequences, one of them empty in between, in slots 2 and 0. */
enum { M = 103, Q = 3, SLOTS = 3 };
static const int32_t start[Q + 1] = { 0, 9, 9, M }, slot[Q] = { 2, 1, 0 };

/* M rows of Q sequences of `slots` slots, whose states lie `gap` floats apart. */
typedef struct ragged { int M, Q, slots, gap; const int32_t *start, *slot; } ragged;
static void conv_scan(ragged r, int I, int N, int K, bool biased) {
    const int ld = 2 * N + 4 - r.gap % 2;
    const size_t stride = (size_t)I * (size_t)(N + K) + (size_t)r.gap, n = (size_t)r.M * (size_t)I, from = (size_t)(K * I);
    int32_t *s = put_ints(r.start, (size_t)r.Q + 1), *l = put_ints(r.slot, (size_t)r.Q);
    twin xz = random_twin(2 * n, 1), w = random_twin((size_t)(K * I), 1), bias = random_twin((size_t)I, 1), u = empty_twin(n);
    twin h = random_twin(stride * (size_t)r.slots, 1), dt = random_twin(n, 1), A = random_twin((size_t)(N * I), 1);
    twin D = random_twin((size_t)I, 1), bc = random_twin((size_t)(r.M * ld), 1), y = empty_twin(n);
    for (size_t k = 0; k < A.n; k++) A.host[k] = -fabsf(A.host[k]) - 0.1f;
    gpu->put(gpu, A.at, A.host, A.n * sizeof(float));
    bm_op_conv c = { .M = r.M, .Q = r.Q, .start = r.start, .slot = r.slot, .I = I, .K = K, .ldx = 2 * I, .x = xz.host, .weight = w.host,
                     .bias = biased ? bias.host : NULL, .y = u.host, .state = h.host, .stride = stride };
    cpu->conv(cpu, &c);
    c.start = s, c.slot = l, c.x = xz.at, c.weight = w.at, c.bias = biased ? bias.at : NULL, c.y = u.at, c.state = h.at;
    gpu->conv(gpu, &c);
    agree(&u, 2e-6, "conv");
    agree(&h, 0, "conv's state");
    bm_op_scan a = { .M = r.M, .Q = r.Q, .start = r.start, .slot = r.slot, .I = I, .N = N, .ldz = 2 * I, .ldbc = ld, .u = u.host,
                     .dt = dt.host, .dt_bias = bias.host, .A = A.host, .B = bc.host, .C = bc.host + N, .D = D.host, .z = xz.host + I,
                     .y = y.host, .state = h.host + from, .stride = stride };
    cpu->scan(cpu, &a);
    a.start = s, a.slot = l, a.u = u.at, a.dt = dt.at, a.dt_bias = bias.at, a.A = A.at, a.B = bc.at, a.C = bc.at + N, a.D = D.at;
    a.z = xz.at + I, a.y = y.at, a.state = h.at + from;
    gpu->scan(gpu, &a);
    agree(&y, 5e-6, "scan");
    agree(&h, 5e-6, "scan's state");
    gpu->release(gpu, s); gpu->release(gpu, l);
    end(&xz); end(&w); end(&bias); end(&u); end(&h); end(&dt); end(&A); end(&D); end(&bc); end(&y);
}
static void test_conv_scan(void **state) {
    static const struct { int I, N, K; } size[] = { { 33, 16, 4 }, { 64, 1, 2 }, { 20, 40, 3 }, { 300, 7, 4 }, { 300, 16, 4 },
                                                    { 1028, 16, 4 } };
    enum { MANY = 131, HALF = 512, MORE = 1400 };
    int32_t first[MORE + 1], own[MORE];
    (void)state;
    for (int i = 0; i <= MORE; i++) first[i] = i;
    for (int i = 0; i < MORE; i++) own[i] = MORE - 1 - i;
    for (int i = 0; i < 6; i++) {
        conv_scan((ragged){ M, Q, SLOTS, 5, start, slot }, size[i].I, size[i].N, size[i].K, i % 2);
        for (int gap = 4; gap < 6; gap++)       /* a row each: by the copy engine or two channels a thread, one */
            conv_scan((ragged){ MANY, MANY, MANY, gap, first, own + MORE - MANY }, size[i].I, size[i].N, size[i].K, gap % 2);
    }
    /* A ring of stages goes round and round. */
    conv_scan((ragged){ HALF, HALF, HALF, 4, first, own + MORE - HALF }, 2304, 16, 4, false);
    conv_scan((ragged){ MORE, MORE, MORE, 4, first, own }, 304, 16, 4, true);
}

/* quants: F32: gate and up are bf16, down is that or f32, by arith. */
typedef struct experts { int M, D, F, X, k; bm_routing rule; bool gated, accumulate; bm_arith arith; double bound; bm_dtype quants; } experts;

/* crowded: everybody takes expert 1. */
static void experts_in(experts c, bool crowded) {
    const int T = c.M, D = c.D, F = c.F, X = c.X, k = c.k;
    const size_t rows = (size_t)(T * k), bytes = sizeof(bm_tensor) * (size_t)X, MD = (size_t)(T * D), XF = (size_t)(X * F);
    twin logits = random_twin((size_t)(T * X), 1), gate = empty_twin(rows), x = random_twin(MD, 1), y = random_twin(MD, 1);
    twin hidden = empty_twin((size_t)T * 2 * (size_t)F), bias[3] = { random_twin(XF, 1), random_twin(XF, 1), random_twin((size_t)(X * D), 1) };
    int32_t *host[3], *at[3];
    const size_t n[3] = { rows, rows, (size_t)(k * (X + 1)) };
    bm_tensor *w[3][2];
    pair *m = malloc(sizeof *m * 3 * (size_t)X);
    bm_tensor *half = malloc(sizeof *half * 3 * (size_t)X);
    logits.host[3] = logits.host[1];        /* a tie; a NaN never wins, but softmax has no sum with it; nobody takes expert 2 */
    if (c.rule == BM_ROUTE_SIGMOID) logits.host[X] = NAN;
    for (int i = 0; X > 3 && i < T; i++) logits.host[i * X + 2] = -99;
    for (int i = 0; crowded && i < T; i++) logits.host[i * X + 1] = 99;
    gpu->put(gpu, logits.at, logits.host, logits.n * sizeof(float));
    for (int i = 0; i < 3; i++) {
        host[i] = calloc(n[i], sizeof(int32_t));
        at[i] = put_ints(host[i], n[i]);
        for (int side = 0; side < 2; side++) w[i][side] = malloc(bytes);
        const bm_dtype type = c.quants ? c.quants : i < 2 || c.arith == BM_ARITH_NATIVE ? BM_BF16 : BM_F32;
        make_pairs(m + i * X, X, type, i < 2 ? F : D, i < 2 ? D : F, !c.accumulate);
        for (int e = 0; e < X; e++) {
            half[i * X + e] = rounded(&m[i * X + e].host);
            w[i][0][e] = c.arith == BM_ARITH_NATIVE ? half[i * X + e] : m[i * X + e].host;
            w[i][1][e] = m[i * X + e].at;
        }
    }
    bm_op_route r = { .M = T, .X = X, .k = k, .rule = c.rule, .logits = logits.host, .expert = host[0], .order = host[1], .first = host[2],
                      .gate = gate.host };
    cpu->route(cpu, &r);
    r.logits = logits.at, r.expert = at[0], r.order = at[1], r.first = at[2], r.gate = gate.at;
    gpu->route(gpu, &r);
    for (int i = 0; i < 3; i++) same(host[i], at[i], n[i], i == 0 ? "experts" : i == 1 ? "order" : "first");
    agree(&gate, 1e-6, "gate");
    const bm_op_route one[2] = { { .M = T, .X = X, .k = 1, .expert = host[0], .order = host[1], .first = host[2], .gate = gate.host },
                                 { .M = T, .X = X, .k = 1, .expert = at[0], .order = at[1], .first = at[2], .gate = gate.at } };
    bm_op_experts a = { .M = T, .D = D, .F = F, .X = X, .activation = X % 2 ? BM_SILU : BM_GELU, .arith = c.arith,
                        .accumulate = c.accumulate };
    for (int side = 0; side < 2; side++) {
        a.route = &one[side];
        a.gate = c.gated ? w[0][side] : NULL, a.up = w[1][side], a.down = w[2][side];
        a.gate_bias = side ? bias[0].at : bias[0].host, a.up_bias = side ? bias[1].at : bias[1].host;
        a.down_bias = side ? bias[2].at : bias[2].host;
        a.x = side ? x.at : x.host, a.hidden = side ? hidden.at : hidden.host, a.y = side ? y.at : y.host;
        (side ? gpu : cpu)->experts(side ? gpu : cpu, &a);
    }
    agree(&y, c.bound, "experts");
    for (int i = 0; i < 3; i++) {
        free(host[i]);
        gpu->release(gpu, at[i]);
        for (int side = 0; side < 2; side++) free(w[i][side]);
        end(&bias[i]);
    }
    for (int i = 0; i < 3; i++) end_pairs(m + i * X, X);
    for (int i = 0; i < 3 * X; i++) end_rounded(&half[i]);
    free(m);
    free(half);
    end(&logits); end(&gate); end(&x); end(&y); end(&hidden);
}
static void experts_case(experts c) { experts_in(c, false); }
static void test_experts(void **state) {
    (void)state;
    experts_case((experts){ 23, 40, 72, 8, 1, BM_ROUTE_SIGMOID, true, false, BM_ARITH_F32, 5e-6, BM_F32 });
    experts_case((experts){ 23, 40, 72, 70, 1, BM_ROUTE_SIGMOID, true, true, BM_ARITH_F32, 5e-6, BM_F32 });
    experts_case((experts){ 23, 40, 72, 5, 2, BM_ROUTE_SOFTMAX, false, false, BM_ARITH_F32, 5e-6, BM_F32 });
    experts_case((experts){ 300, 40, 72, 130, 3, BM_ROUTE_SOFTMAX, true, false, BM_ARITH_F32, 5e-6, BM_F32 });
    experts_case((experts){ 2500, 8, 16, 3, 2, BM_ROUTE_SOFTMAX, true, false, BM_ARITH_F32, 5e-6, BM_F32 });
}
/* Many rows in bf16.  What is rounded before `down` may round to the other side where sums differ in their last bits. */
static void test_wide_experts(void **state) {
    (void)state;
    for (int gated = 0; gated < 2; gated++) {
        experts_case((experts){ 300, 72, 136, 8, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, BM_F32 });
        experts_case((experts){ 331, 200, 328, 5, 1, BM_ROUTE_SIGMOID, gated, true, BM_ARITH_NATIVE, 2e-3, BM_F32 });
        experts_case((experts){ 300, 1208, 136, 8, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, BM_F32 });
        experts_case((experts){ 1500, 72, gated ? 1152 : 2304, 5, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, BM_F32 });
        experts_case((experts){ 129, 64, 64, 70, 2, BM_ROUTE_SOFTMAX, gated, false, BM_ARITH_NATIVE, 2e-3, BM_F32 });
        experts_case((experts){ 90, 60, 100, 3, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, BM_F32 });    /* no whole 16 bytes */
        for (int t = BM_F16; t <= BM_Q5_1; t++) {
            experts_case((experts){ 331, 64, 160, 5, 1, BM_ROUTE_SIGMOID, gated, true, BM_ARITH_NATIVE, 2e-3, (bm_dtype)t });
            experts_case((experts){ 100, 64, 160, 5, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, (bm_dtype)t });
            experts_case((experts){ 23, 64, 160, 8, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, (bm_dtype)t });
            experts_case((experts){ 23, 64, 160, 8, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_F32, 5e-6, (bm_dtype)t });
        }
        experts_case((experts){ 150, 512, 256, 3, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, BM_Q4_K });
        experts_case((experts){ 150, 512, 256, 3, 1, BM_ROUTE_SIGMOID, gated, false, BM_ARITH_NATIVE, 2e-3, BM_Q6_K });
    }
}

/* The same of 6 to 128 rows: groups that are empty, of a few rows, of more than a tile's, and one that has all. */
static void test_few_experts(void **state) {
    static const int rows[] = { 6, 16, 31, 64, 100, 128 };
    (void)state;
    for (int i = 0; i < 6; i++)
        for (int gated = 0; gated < 2; gated++) {
            const bool odd = i % 2;
            const bm_dtype quants = i % 3 == 0 ? BM_F16 : odd ? BM_Q8_0 : BM_Q4_0;
            experts_case((experts){ rows[i], 224, 352, 8, 1, BM_ROUTE_SIGMOID, gated, odd, BM_ARITH_NATIVE, 2e-3, quants });
            experts_case((experts){ rows[i], 200, 328, 8, 1, BM_ROUTE_SIGMOID, gated, odd, BM_ARITH_NATIVE, 2e-3, BM_F32 });
            experts_in((experts){ rows[i], 72, 136, 8, 1, BM_ROUTE_SIGMOID, gated, !odd, BM_ARITH_NATIVE, 2e-3, BM_F32 }, true);
            experts_case((experts){ rows[i], 64, 64, 70, 2, BM_ROUTE_SOFTMAX, gated, odd, BM_ARITH_NATIVE, 2e-3, BM_F32 });
        }
}

/* A gated layer without experts whose tiles, of half the columns, are more than there are blocks at once. */
static void test_few_dense(void **state) {
    enum { M_DENSE = 40, D = 768, F = 3072 };
    pair m[3] = { make_pair(BM_BF16, F, D), make_pair(BM_BF16, F, D), make_pair(BM_BF16, D, F) };
    twin x = random_twin(M_DENSE * D, 1), y = empty_twin(M_DENSE * D), hidden = empty_twin(M_DENSE * 2 * F);
    (void)state;
    for (int side = 0; side < 2; side++) {
        const bm_tensor w[3] = { side ? m[0].at : m[0].host, side ? m[1].at : m[1].host, side ? m[2].at : m[2].host };
        (side ? gpu : cpu)->experts(side ? gpu : cpu, &(bm_op_experts){ .M = M_DENSE, .D = D, .F = F, .X = 1, .activation = BM_SILU,
            .arith = BM_ARITH_NATIVE, .gate = &w[0], .up = &w[1], .down = &w[2], .x = side ? x.at : x.host,
            .hidden = side ? hidden.at : hidden.host, .y = side ? y.at : y.host });
        if (side) OK(gpu->sync(gpu));
    }
    agree(&y, 2e-3, "a dense layer");
    for (int i = 0; i < 3; i++) end_pair(&m[i]);
    end(&x); end(&y); end(&hidden);
}

static void test_rows(void **state) {
    (void)state;
    for (int D = 1; D < 1300; D = D * 3 + 1)
        for (int c = 0; c < 2; c++) {
            const size_t n = (size_t)(M * D);
            twin x = random_twin(n, 1), r = random_twin(n, 1), w = random_twin((size_t)D, 1), y = empty_twin(n), loss = empty_twin(M);
            bm_op_norm a = { .M = M, .D = D, .eps = 1e-5f, .centered = c, .x = x.host, .residual = r.host, .weight = w.host,
                             .bias = c ? w.host : NULL, .sum = r.host, .y = y.host };
            cpu->norm(cpu, &a);
            a.x = x.at, a.residual = a.sum = r.at, a.weight = w.at, a.bias = c ? w.at : NULL, a.y = y.at;
            gpu->norm(gpu, &a);
            agree(&r, 0, "norm's sum");
            agree(&y, D < 3 ? 1e-3 : 5e-6, "norm");     /* one element has no variance: rounding times 1 / sqrt(eps) */
            int32_t target[M];
            for (int i = 0; i < M; i++) target[i] = i % D - (i == 5);
            bm_token *t = put_ints(target, M);
            bm_op_loss l = { .M = M, .V = D, .logits = x.host, .target = target, .loss = loss.host };
            cpu->loss(cpu, &l);
            l.logits = x.at, l.target = t, l.loss = loss.at;
            gpu->loss(gpu, &l);
            agree(&loss, 1e-6, "loss");
            gpu->release(gpu, t);
            end(&x); end(&r); end(&w); end(&y); end(&loss);
        }
}

/* Few rows and many, whole ids and a part, ties, -0 beside 0, NaN, rows of nothing else; into memory of both sides. */
static void test_best(void **state) {
    static const struct { int M, V, ld; } size[] = { { 1, 50304, 50304 }, { 3, 1, 2 }, { 9, 700, 703 }, { 64, 513, 513 },
                                                      { 65, 8000, 8192 } };
    (void)state;
    for (int i = 0; i < 5; i++) {
        const int rows = size[i].M, V = size[i].V, ld = size[i].ld;
        twin l = random_twin((size_t)(rows * ld), 1);
        bm_token *want = calloc((size_t)rows, sizeof *want), *got, *again;
        OK(gpu->alloc_host(gpu, &got, (size_t)rows * sizeof *got, "a test"));
        OK(gpu->alloc(gpu, &again, (size_t)rows * sizeof *again, "a test"));
        for (int r = 0; r < rows; r++) {
            float *row = l.host + r * ld;
            if (V < ld) row[V] = 9;                         /* not among the ids that count */
            for (int k = 0; k < V && r % 4 > 1; k++) row[k] = r % 4 == 2 ? NAN : -INFINITY;
            if (r % 4 == 2) row[V / 2] = -3e38f;
            if (r % 4 == 1) row[V / 3] = row[V - 1] = INFINITY;
            for (int k = 0; k < V && r % 8 == 4; k++) row[k] = k % 3 == 1 ? 0 : -0.0f;
        }
        gpu->put(gpu, l.at, l.host, l.n * sizeof(float));
        cpu->best(cpu, &(bm_op_best){ .M = rows, .V = V, .ld = ld, .logits = l.host, .best = want });
        for (int round = 0; round < 2; round++) {           /* the first leaves nothing behind */
            gpu->best(gpu, &(bm_op_best){ .M = rows, .V = V, .ld = ld, .logits = l.at, .best = got, .again = round ? again : NULL });
            OK(gpu->sync(gpu));
            for (int r = 0; r < rows; r++)
                if (got[r] != want[r]) fail_msg("best of row %d of %d: found %d, expected %d", r, rows, got[r], want[r]);
            memset(got, 0, (size_t)rows * sizeof *got);
        }
        gpu->get(gpu, got, again, (size_t)rows * sizeof *got);
        OK(gpu->sync(gpu));
        assert_memory_equal(got, want, (size_t)rows * sizeof *got);
        gpu->release(gpu, again);
        gpu->release_host(gpu, got);
        free(want);
        end(&l);
    }
}

static void test_attention(void **state) {
    enum { H = 4, G = 2, E = 24, WINDOW = 11, WIDTH = (H + 2 * G) * E };
    (void)state;
    const size_t stride = bm_attention_floats(G, E, WINDOW);
    int32_t *s = put_ints(start, Q + 1), *l = put_ints(slot, Q);
    twin h = empty_twin(stride * SLOTS), y = empty_twin(M * H * E);
    for (int round = 0; round < 3; round++) {           /* the ring fills and comes round */
        twin qkv = random_twin(M * WIDTH, 1);
        bm_op_attention a = { .M = M, .Q = Q, .start = start, .slot = slot, .H = H, .G = G, .E = E, .window = WINDOW, .rope_base = 10000,
                              .qkv = qkv.host, .y = y.host, .state = h.host, .stride = stride };
        cpu->attention(cpu, &a);
        a.start = s, a.slot = l, a.qkv = qkv.at, a.y = y.at, a.state = h.at;
        gpu->attention(gpu, &a);
        agree(&y, 1e-5, "attention");
        agree(&qkv, 2e-6, "rotated rows");
        end(&qkv);
    }
    gpu->release(gpu, s); gpu->release(gpu, l);
    end(&h); end(&y);
}

/* An impossible allocation is a sentence, and the next operation works. */
static void test_memory(void **state) {
    void *p;
    (void)state;
    assert_int_equal(gpu->alloc(gpu, &p, (size_t)1 << 44, "a test"), BM_EMEMORY);
    assert_null(p);
    assert_non_null(strstr(bm_error(), "a test"));
    linear_case(BM_F32, 1, 8, 8, false);
}

/* What a model and a session take is told beforehand, within 5%; what never fits is refused before it is copied. */
static void told_of(bm_dtype type) {
    bm_config c;
    bm_device *d;
    bm_model *m;
    bm_session *s;
    uint64_t session;
    const char *path = scratch_path("told.gguf");
    const bm_session_options o = { .slots = 100, .chunk = 2048 };
    OK(bm_config_preset(&c, "mamba-130m"));
    OK(bm_init(&c, 1, type, path, NULL, NULL, NULL));
    OK(bm_device_open(&d, "cuda:0", 0));
    const uint64_t before = gpu->left(gpu);
    OK(bm_model_open(&m, d, path));
    OK(bm_session_bytes(m, &o, &session));
    OK(bm_session_open(&s, m, &o));
    const double took = (double)(before - gpu->left(gpu)), told = (double)(m->taken + session);
    if (fabs(told / took - 1) > 0.05) fail_msg("told %.0f bytes, found %.0f taken", told, took);
    assert_int_equal(bm_fits(gpu, (uint64_t)1 << 44, "a test", "less"), BM_EMEMORY);
    assert_non_null(strstr(bm_error(), "a test needs 17592186 MB"));
    bm_session_close(s);
    bm_model_close(m);
    bm_device_close(d);
    unlink(path);
}
static void test_told(void **state) {
    (void)state;
    told_of(BM_BF16);
    told_of(BM_Q8_0);
}

int main(int argc, char **argv) {
    const struct CMUnitTest test[] = {
        cmocka_unit_test(test_linear), cmocka_unit_test(test_conv_scan), cmocka_unit_test(test_experts),
        cmocka_unit_test(test_wide), cmocka_unit_test(test_wide_experts), cmocka_unit_test(test_rows),
        cmocka_unit_test(test_best), cmocka_unit_test(test_attention), cmocka_unit_test(test_memory),
        cmocka_unit_test(test_told), cmocka_unit_test(test_few), cmocka_unit_test(test_alone),
        cmocka_unit_test(test_few_experts), cmocka_unit_test(test_few_dense), cmocka_unit_test(test_narrow),
    };
    return run_cuda("cuda", test, sizeof test / sizeof *test, argc, argv);
}
