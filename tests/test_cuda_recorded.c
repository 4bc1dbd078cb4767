/* test_cuda_recorded.c - operations recorded on the first NVIDIA GPU, where some become one kernel, against the same one by one;
 * and a whole token. */
#include "lib_cuda.h"
#include "lib_scratch.h"
#include <unistd.h>

/* Both have the same bits. */
static void same_bits(const twin of[2]) {
    float *want = fetched(&of[0]), *got = fetched(&of[1]);
    assert_memory_equal(got, want, of->n * sizeof *got);
    drop(want);
    drop(got);
}
/* A number that no operation makes, first in an array; whether it is still there. */
static const float mark = 1234;
static void put_mark(const twin *t) {
    gpu->put(gpu, t->at, &mark, sizeof mark);
    OK(gpu->sync(gpu));
}
static bool has_mark(const twin *t) {
    float *got = fetched(t);
    const bool has = got[0] == mark;
    drop(got);
    return has;
}

/* A recorded router, which is one kernel for few rows, gives the bits of a product and a choice; or of those and a norm before, which
 * any rows have. */
static void router_case(int T, int X, int K, bool norms) {
    pair w = make_pair(BM_F32, X, K);
    const size_t rows = (size_t)T, n[3] = { rows, rows, (size_t)(X + 1) };
    twin x = random_twin((size_t)(T * K), 1), bias = random_twin((size_t)X, 1), logits[2], gate[2], stream[2], y[2];
    twin weight = random_twin((size_t)K, 1), past = random_twin(x.n, 1);
    int32_t *host[3] = { calloc(rows, 4), calloc(rows, 4), calloc(n[2], 4) }, *at[2][3];
    for (int k = 0; k < K; k++) x.host[k] = 0, x.host[K + k] = NAN;         /* experts that are all alike; no number */
    gpu->put(gpu, x.at, x.host, x.n * sizeof(float));
    for (int r = 0; r < 2; r++) {
        logits[r] = empty_twin((size_t)(T * X));
        gate[r] = empty_twin(rows);
        stream[r] = empty_twin(x.n);
        y[r] = empty_twin(x.n);
        for (int i = 0; i < 3; i++) at[r][i] = put_ints(host[i], n[i]);
        for (int again = 0; again < 2; again++) {
            if (r && gpu->replay(gpu, &w, T)) break;
            if (norms) gpu->norm(gpu, &(bm_op_norm){ .M = T, .D = K, .eps = 1e-5f, .x = x.at, .residual = past.at, .weight = weight.at,
                                                     .sum = stream[r].at, .y = y[r].at });
            gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = K, .w = &w.at, .x = norms ? y[r].at : x.at, .bias = T % 2 ? bias.at : NULL, .y = logits[r].at,
                                              .arith = BM_ARITH_F32 });
            gpu->route(gpu, &(bm_op_route){ .M = T, .X = X, .k = 1, .rule = T % 2 ? BM_ROUTE_SOFTMAX : BM_ROUTE_SIGMOID, .logits = logits[r].at,
                                            .expert = at[r][0], .order = at[r][1], .first = at[r][2], .gate = gate[r].at });
            if (r) gpu->recorded(gpu);
        }
        OK(gpu->sync(gpu));
    }
    gpu->forget(gpu, &w);
    same_bits(logits);
    same_bits(gate);
    same_bits(stream);
    same_bits(y);
    for (int i = 0; i < 3; i++) {
        gpu->get(gpu, host[i], at[0][i], n[i] * 4);
        OK(gpu->sync(gpu));
        same(host[i], at[1][i], n[i], i == 0 ? "experts" : i == 1 ? "order" : "first");
        free(host[i]);
    }
    for (int r = 0; r < 2; r++) {
        for (int i = 0; i < 3; i++) gpu->release(gpu, at[r][i]);
        end(&logits[r]); end(&gate[r]); end(&stream[r]); end(&y[r]);
    }
    end(&x); end(&bias); end(&weight); end(&past); end_pair(&w);
}
static void test_router(void **state) {
    (void)state;
    for (int i = 0; i < 5; i++) {
        const int rows = (int[]){ 9, 40, 128, 257, 1030 }[i];
        for (int norms = 0; norms < 2; norms++) {
            router_case(rows, 8, 1160, norms);
            router_case(rows, 3, 64, norms);
            router_case(rows, 3, 1544, norms);
            router_case(rows, 8, 2056, norms);
        }
    }
}

/* Convolution to scan of rows with a sequence each, recorded: few rows are two kernels, whose second keeps dt to itself.  The bits of
 * one operation after the other, in what the next product makes and in the states. */
static void between_case(int T, int I, int R, int N) {
    enum { K = 4, D = 72 };
    const int X = R + 2 * N;
    const size_t n = (size_t)T * (size_t)I, stride = (size_t)I * (size_t)(N + K - 1);
    pair wx = make_pair(BM_BF16, X, I), wd = make_pair(BM_BF16, I, R), wo = make_pair(BM_BF16, D, I);
    twin xz = random_twin(2 * n, 1), conv = random_twin((size_t)(K * I), 1), bias = random_twin((size_t)I, 1), A = random_twin((size_t)(N * I), 1);
    twin first = random_twin(stride * (size_t)T, 1), u = empty_twin(n), xdbl = empty_twin((size_t)(T * X)), dt = empty_twin(n), state[2], y[2];
    int32_t *rows = malloc(sizeof *rows * 2 * (size_t)(T + 1));
    for (size_t k = 0; k < A.n; k++) A.host[k] = -fabsf(A.host[k]) - 0.1f;
    gpu->put(gpu, A.at, A.host, A.n * sizeof(float));
    for (int i = 0; i <= T; i++) rows[i] = i, rows[T + 1 + i] = T - 1 - i;
    int32_t *s = put_ints(rows, (size_t)(T + 1)), *l = put_ints(rows + T + 1, (size_t)T);
    for (int r = 0; r < 2; r++) {
        state[r] = made(floats(first.n), first.n);
        y[r] = empty_twin((size_t)(T * D));
        gpu->put(gpu, state[r].at, first.host, first.n * sizeof(float));
        put_mark(&dt);
        for (int again = 0; again < 2; again++) {
            if (r && gpu->replay(gpu, &wx, T)) break;
            gpu->conv(gpu, &(bm_op_conv){ .M = T, .Q = T, .start = s, .slot = l, .I = I, .K = K, .ldx = 2 * I, .x = xz.at, .weight = conv.at,
                                          .bias = T % 2 ? bias.at : NULL, .y = u.at, .state = state[r].at, .stride = stride });
            gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = I, .w = &wx.at, .x = u.at, .y = xdbl.at });
            gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = X, .w = &wd.at, .x = xdbl.at, .y = dt.at });
            gpu->scan(gpu, &(bm_op_scan){ .M = T, .Q = T, .start = s, .slot = l, .I = I, .N = N, .ldz = 2 * I, .ldbc = X, .u = u.at, .dt = dt.at,
                                          .dt_bias = bias.at, .A = A.at, .B = xdbl.at + R, .C = xdbl.at + R + N, .D = bias.at, .z = xz.at + I,
                                          .y = u.at, .state = state[r].at + (K - 1) * I, .stride = stride });
            gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = I, .w = &wo.at, .x = u.at, .y = y[r].at });
            if (r) gpu->recorded(gpu);
            else OK(gpu->sync(gpu));        /* as an embedding would: states are read ahead */
        }
        OK(gpu->sync(gpu));
        const bool joined = r && T <= 128 && gpu->reserving(gpu, T, I);     /* else there are no such kernels */
        if (I <= 1088) assert_true(has_mark(&dt) == joined);                /* of more channels a small chip takes none */
        else assert_true(joined || !has_mark(&dt));
    }
    gpu->forget(gpu, &wx);
    float *want[2] = { fetched(&y[0]), fetched(&state[0]) }, *got[2] = { fetched(&y[1]), fetched(&state[1]) };
    for (int i = 0; i < 2; i++) {
        const size_t count = i ? first.n : y[0].n;
        for (size_t k = 0; k < count; k++)
            if (memcmp(&want[i][k], &got[i][k], sizeof(float)))
                fail_msg("%d rows, I %d, R %d, N %d: %s %zu is %.9g, expected %.9g", T, I, R, N, i ? "state" : "output", k, (double)got[i][k],
                         (double)want[i][k]);
        drop(want[i]);
        drop(got[i]);
    }
    for (int r = 0; r < 2; r++) end(&state[r]), end(&y[r]);
    gpu->release(gpu, s); gpu->release(gpu, l);
    free(rows);
    end(&xz); end(&conv); end(&bias); end(&A); end(&first); end(&u); end(&xdbl); end(&dt); end_pair(&wx); end_pair(&wd); end_pair(&wo);
}
static void test_between(void **state) {
    static const int rows[] = { 6, 16, 17, 40, 64, 100, 128, 129 };
    (void)state;
    for (int i = 0; i < 8; i++) {
        between_case(rows[i], 1024, 32, 16);
        between_case(rows[i], 1088, 72, 7);
        between_case(rows[i], 960, 64, 16);
    }
    between_case(17, 4096, 128, 16);
    between_case(64, 4096, 128, 16);
    between_case(100, 2304, 72, 16);
    between_case(128, 2304, 72, 16);
}

/* A product, a norm and a product of its rows, recorded: two kernels, whose activations are rounded before they are divided by the
 * root, not behind.  The stream has the same bits, and an output those it has without the rows beside it. */
static void norm_case(int T, int alone, int K, int D, bool in_place) {
    enum { N = 200 };
    pair out = make_pair(BM_BF16, D, K), in = make_pair(BM_BF16, N, D);
    twin x = random_twin((size_t)(T * K), 1), past = random_twin((size_t)(T * D), 1), weight = random_twin((size_t)D, 1);
    twin y = empty_twin(past.n), normed = empty_twin(past.n), bias = random_twin((size_t)D, 1), sum[3], z[3];
    for (int r = 0; r < 3; r++) {       /* operation by operation; recorded; recorded, the last rows alone */
        const int rows = r < 2 ? T : alone, from = T - rows;
        sum[r] = made(copy_of(past.host, (int)past.n), past.n);
        z[r] = empty_twin((size_t)(T * N));
        if (r) assert_false(gpu->replay(gpu, &in, rows));
        gpu->linear(gpu, &(bm_op_linear){ .M = rows, .ldx = K, .w = &out.at, .x = x.at + from * K, .y = y.at, .arith = BM_ARITH_NATIVE,
                                          .bias = T % 2 ? bias.at : NULL });
        gpu->norm(gpu, &(bm_op_norm){ .M = rows, .D = D, .eps = 1e-5f, .x = y.at, .residual = (in_place ? sum[r].at : past.at) + from * D,
                                      .weight = weight.at, .sum = sum[r].at + from * D, .y = normed.at });
        gpu->linear(gpu, &(bm_op_linear){ .M = rows, .ldx = D, .w = &in.at, .x = normed.at, .y = z[r].at + from * N, .arith = BM_ARITH_NATIVE });
        if (r) gpu->recorded(gpu);
        OK(gpu->sync(gpu));
        gpu->forget(gpu, &in);
    }
    float *s[3], *got[3];
    for (int r = 0; r < 3; r++) s[r] = fetched(&sum[r]), got[r] = fetched(&z[r]);
    const size_t own = (size_t)((T - alone) * D), row = (size_t)((T - alone) * N);
    assert_memory_equal(s[1], s[0], past.n * sizeof **s);
    assert_memory_equal(s[2] + own, s[0] + own, (past.n - own) * sizeof **s);
    assert_memory_equal(got[2] + row, got[1] + row, (z[0].n - row) * sizeof **s);
    if (gpu->reserving(gpu, T, D) && D == 192)      /* else there are no such kernels, or none for so many columns */
        assert_true(memcmp(got[1], got[0], z[0].n * sizeof **s) != 0);
    double peak = 0;
    for (size_t i = 0; i < z[0].n; i++) peak = fmax(peak, fabs((double)got[0][i]));
    /* two roundings by 2^-9 of D elements each, which differ in sign */
    for (size_t i = 0; i < z[0].n; i++) check_near((double)got[1][i], (double)got[0][i], 1e-2 * peak, "a product behind a norm");
    for (int r = 0; r < 3; r++) {
        drop(s[r]);
        drop(got[r]);
        end(&sum[r]); end(&z[r]);
    }
    end(&x); end(&past); end(&weight); end(&bias); end(&y); end(&normed); end_pair(&out); end_pair(&in);
}
static void test_norm_between(void **state) {
    static const int rows[][2] = { { 7, 6 }, { 16, 9 }, { 40, 17 }, { 128, 64 }, { 128, 65 } };
    (void)state;
    for (int i = 0; i < 5; i++) for (int k = 0; k < 4; k++) norm_case(rows[i][0], rows[i][1], k % 2 ? 64 : 264, 192, k / 2);
    norm_case(7, 6, 64, 17024, false);
}

/* A product of whose rows only the largest of the first columns are wanted, recorded: those of its outputs, which stay unmade where there
 * are kernels for it.  Behind a product and a norm, too; rows of no numbers, of one column twice. */
static void best_case(int T, int D, int N, bm_dtype type, bool behind) {
    enum { LEFT_OUT = 3 };
    pair w = make_pair(type, N, D), out = make_pair(BM_BF16, D, D);
    twin x = random_twin((size_t)(T * D), 1), weight = random_twin(D, 1), y = empty_twin(x.n), normed = empty_twin(x.n), sum = empty_twin(x.n);
    twin bias = random_twin((size_t)N, 1), past = empty_twin(x.n), logits = empty_twin((size_t)T * (size_t)N);
    bm_token *best[2], *again;
    for (int k = 0; k < D; k++) x.host[k] = NAN, x.host[(T - 1) * D + k] = 0;       /* the last row: all alike but for the bias */
    gpu->put(gpu, x.at, x.host, x.n * sizeof(float));
    for (int i = 0; i < N; i++) bias.host[i] = i % 7 == 3 ? 1 : -0.0f;
    for (int i = N - LEFT_OUT; i < N; i++) bias.host[i] = 100;
    gpu->put(gpu, bias.at, bias.host, bias.n * sizeof(float));
    OK(gpu->alloc(gpu, &again, sizeof *again * (size_t)T, "a test"));
    for (int r = 0; r < 2; r++) {
        OK(gpu->alloc_host(gpu, &best[r], sizeof *best[r] * (size_t)T, "a test"));
        put_mark(&logits);
        for (int round = 0; round < 2; round++) {           /* the first leaves nothing behind */
            memset(best[r], 1, sizeof *best[r] * (size_t)T);
            if (gpu->replay(gpu, &w, T)) continue;
            if (behind) {
                gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = D, .w = &out.at, .x = x.at, .y = y.at, .arith = BM_ARITH_NATIVE });
                gpu->norm(gpu, &(bm_op_norm){ .M = T, .D = D, .eps = 1e-5f, .x = y.at, .residual = past.at, .weight = weight.at, .sum = sum.at,
                                              .y = normed.at });
            }
            gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = D, .w = &w.at, .x = behind ? normed.at : x.at, .bias = behind ? NULL : bias.at,
                                              .y = logits.at, .arith = BM_ARITH_NATIVE });
            gpu->best(gpu, &(bm_op_best){ .M = T, .V = N - LEFT_OUT, .ld = N, .logits = logits.at, .best = best[r], .again = again, .only = r });
            gpu->recorded(gpu);
        }
        OK(gpu->sync(gpu));
        gpu->forget(gpu, &w);
        const bool unmade = r && T >= 6 && gpu->reserving(gpu, T, D);
        if (has_mark(&logits) != unmade) fail_msg("%d rows of %d, type %d: logits were %smade", T, N, type, unmade ? "" : "not ");
        same(best[r], again, (size_t)T, "best token told again");
    }
    for (int i = 0; i < T; i++)
        if (best[0][i] != best[1][i]) fail_msg("best of row %d of %d, %d columns: found %d, expected %d", i, T, N, best[1][i], best[0][i]);
    assert_int_equal(best[1][0], -1);
    if (!behind) assert_int_equal(best[1][T - 1], 3);
    for (int r = 0; r < 2; r++) gpu->release_host(gpu, best[r]);
    gpu->release(gpu, again);
    end(&x); end(&weight); end(&y); end(&normed); end(&sum); end(&bias); end(&past); end(&logits); end_pair(&w); end_pair(&out);
}
static void test_best_alone(void **state) {
    (void)state;
    for (int i = 0; i < 9; i++) {
        const int rows = (int[]){ 3, 6, 17, 40, 64, 128, 129, 300, 1000 }[i];
        best_case(rows, 192, 1000, BM_BF16, false);
        best_case(rows, 192, 5003, BM_BF16, false);
        best_case(rows, 192, 1003, BM_BF16, true);
        best_case(rows, 192, 1000, BM_Q8_0, false);
        best_case(rows, 768, 1000, BM_BF16, true);          /* blocks share k; those of more than 128 rows, too */
        best_case(rows, 768, 200, BM_BF16, false);
    }
}

/* A norm whose rows one product alone reads, done once: the bits of both operations; the rows are there as bf16 only. */
static void rounded_case(int T) {
    enum { D = 264, N = 200 };
    pair w = make_pair(BM_BF16, N, D);
    twin x = random_twin((size_t)(T * D), 1), past = random_twin(x.n, 1), weight = random_twin(D, 1), normed = empty_twin(x.n);
    twin sum[2] = { empty_twin(x.n), empty_twin(x.n) }, z[2] = { empty_twin((size_t)(T * N)), empty_twin((size_t)(T * N)) };
    for (int r = 0; r < 2; r++) {
        put_mark(&normed);
        if (r) assert_false(gpu->replay(gpu, NULL, T));
        gpu->norm(gpu, &(bm_op_norm){ .M = T, .D = D, .eps = 1e-5f, .x = x.at, .residual = past.at, .weight = weight.at, .sum = sum[r].at,
                                      .y = normed.at });
        gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = D, .w = &w.at, .x = normed.at, .y = z[r].at, .arith = BM_ARITH_NATIVE });
        if (r) gpu->recorded(gpu);
        const bool alone = r && T >= 6 && gpu->reserving(gpu, T, D);        /* else there are no such kernels */
        assert_true(has_mark(&normed) == alone);
    }
    same_bits(z);
    same_bits(sum);
    for (int r = 0; r < 2; r++) end(&sum[r]), end(&z[r]);
    end(&x); end(&past); end(&weight); end(&normed); end_pair(&w);
}
static void test_rounded(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) rounded_case((int[]){ 3, 7, 128, 300 }[i]);
}

/* Norm, router, choice and experts, done once: the bits of one after the other with the norm's rows rounded where they are read; of
 * many rows those are there as bf16 only. */
static void gathered_case(int T, bool gated) {
    enum { D = 264, F = 96, X = 4 };
    pair router = make_pair(BM_F32, X, D), own[3 * X];
    bm_tensor w[3 * X];         /* gate, up, down of each expert */
    for (int i = 0; i < 3 * X; i++) own[i] = i < 2 * X ? make_pair(BM_BF16, F, D) : make_pair(BM_BF16, D, F), w[i] = own[i].at;
    twin x = random_twin((size_t)(T * D), 1), past = random_twin(x.n, 1), weight = random_twin(D, 1), normed = empty_twin(x.n);
    twin logits = empty_twin((size_t)(T * X)), gate = empty_twin((size_t)T), hidden = empty_twin((size_t)(T * 2 * F));
    twin sum[2] = { empty_twin(x.n), empty_twin(x.n) }, y[2] = { empty_twin(x.n), empty_twin(x.n) };
    int32_t *none = calloc((size_t)T, sizeof *none), *at[3];
    for (int i = 0; i < 3; i++) at[i] = put_ints(none, i < 2 ? (size_t)T : X + 1);
    const bm_op_route route = { .M = T, .X = X, .k = 1, .rule = BM_ROUTE_SIGMOID, .logits = logits.at, .expert = at[0], .order = at[1],
                                .first = at[2], .gate = gate.at };
    for (int r = 0; r < 2; r++) {
        put_mark(&normed);
        if (r) assert_false(gpu->replay(gpu, NULL, T));
        gpu->norm(gpu, &(bm_op_norm){ .M = T, .D = D, .eps = 1e-5f, .x = x.at, .residual = past.at, .weight = weight.at, .sum = sum[r].at,
                                      .y = normed.at });
        gpu->linear(gpu, &(bm_op_linear){ .M = T, .ldx = D, .w = &router.at, .x = normed.at, .y = logits.at, .arith = BM_ARITH_F32 });
        gpu->route(gpu, &route);
        if (!r) {               /* what was left is forgotten */
            float *same = fetched(&normed);
            gpu->put(gpu, normed.at, same, normed.n * sizeof *same);
            OK(gpu->sync(gpu));
            drop(same);
        }
        gpu->experts(gpu, &(bm_op_experts){ .M = T, .D = D, .F = F, .X = X, .activation = BM_GELU, .arith = BM_ARITH_NATIVE, .route = &route,
                                            .gate = gated ? w : NULL, .up = w + X, .down = w + 2 * X, .x = normed.at, .hidden = hidden.at,
                                            .y = y[r].at });
        if (r) gpu->recorded(gpu);
        const bool alone = r && T > 32 * X && gpu->reserving(gpu, T, D);        /* else there are no such kernels */
        assert_true(has_mark(&normed) == alone);
    }
    same_bits(y);
    same_bits(sum);
    for (int r = 0; r < 2; r++) end(&sum[r]), end(&y[r]);
    for (int i = 0; i < 3; i++) gpu->release(gpu, at[i]);
    for (int i = 0; i < 3 * X; i++) end_pair(&own[i]);
    free(none);
    end(&x); end(&past); end(&weight); end(&normed); end(&logits); end(&gate); end(&hidden); end_pair(&router);
}
static void test_gathered(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) for (int gated = 0; gated < 2; gated++) gathered_case((int[]){ 100, 129, 1000, 1030 }[i], gated);
}

/* A whole token by one kernel (token.cu): the same bits alone and beside others, near what the same text gives at once, and
 * the best token is that of the logits.  Where few.cu runs it takes 6 texts and more. */
enum { TEXTS = 8, LENGTH = 20 };
static void in_step(bm_session *s, int from, int n, bm_token ids[TEXTS][LENGTH], bm_want want) {
    bm_input in[TEXTS];
    for (int t = 0; t < LENGTH; t++) {
        for (int i = 0; i < n; i++) in[i] = (bm_input){ .slot = from + i, .tokens = &ids[from + i][t], .n = 1, .want = want };
        OK(bm_forward(s, in, n));
    }
}
/* Tokens that stay on the GPU are those that bm_forward gives one by one, beside another session that does the same; half way all
 * texts but one stop. */
static void next_of(bm_model *m, int n) {
    const bm_session_options o = { .slots = TEXTS };
    const int slots[] = { 0, 1, 2 };
    bm_token best[2][LENGTH][3];
    bm_session *s[2], *by;
    OK(bm_session_open(&by, m, &o));
    for (int k = 0; k < 2; k++) {
        OK(bm_session_open(&s[k], m, &o));
        for (int i = 0; i < n; i++) {
            bm_token id = k * 13 + i * 71;
            OK(bm_forward(s[k], &(bm_input){ .slot = i, .tokens = &id, .n = 1, .want = BM_WANT_BEST }, 1));
            OK(bm_state_set(by, i, NULL));
            for (int t = 0; t < LENGTH; t++) {
                OK(bm_forward(by, &(bm_input){ .slot = i, .tokens = &id, .n = 1, .want = BM_WANT_BEST }, 1));
                best[k][t][i] = id = bm_best(by, i);
            }
        }
    }
    for (int t = 0; t < LENGTH; t++)
        for (int k = 0; k < 2; k++) {
            const int left = t < LENGTH / 2 ? n : 1;
            const bool alone = t > LENGTH / 4;      /* then one session, then the other */
            if (alone && k) continue;
            OK(bm_next(s[k], slots, left));
            for (int i = 0; i < left; i++) assert_int_equal(bm_best(s[k], i), best[k][t][i]);
        }
    for (int t = LENGTH / 4 + 1; t < LENGTH; t++) {
        OK(bm_next(s[1], slots, n));
        for (int i = 0; i < n; i++) assert_int_equal(bm_best(s[1], i), best[1][t][i]);
    }
    bm_session_close(s[0]);
    bm_session_close(s[1]);
    bm_session_close(by);
}
static void token_of(bm_dtype type) {
    bm_config c = { .family = BM_BLACKMAMBA, .n_layers = 6, .n_vocab = 3300, .d_model = 64, .d_inner = 128, .d_state = 16, .d_conv = 4,
                    .dt_rank = 4, .max_len = 64, .activation = BM_GELU, .final_norm = BM_LAYERNORM, .norm_eps = 1e-5f, .gated = true,
                    .conv_bias = true, .tied_head = true, .top_k = 1 };
    const char *path = scratch_path("token.gguf");
    const bm_session_options o = { .slots = TEXTS };
    bm_token ids[TEXTS][LENGTH];
    bm_device *d;
    bm_model *m;
    bm_session *s;
    for (int l = 0; l < c.n_layers; l++)
        c.layer[l] = l == 5 ? (bm_layer_config){ BM_MIXER_NONE, BM_FFN_DENSE, 1, 96 }
                   : l % 2 ? (bm_layer_config){ BM_MIXER_NONE, BM_FFN_MOE, 4, 96 } : (bm_layer_config){ BM_MIXER_MAMBA, BM_FFN_NONE, 0, 0 };
    for (int i = 0; i < TEXTS; i++)
        for (int t = 0; t < LENGTH; t++) ids[i][t] = (i * 71 + t * 29) % c.n_vocab;
    OK(bm_init(&c, 138, type, path, NULL, NULL, NULL));     /* no two experts so near that rounding decides: 0.0046 at least */
    OK(bm_device_open(&d, "cuda:0", 0));
    OK(bm_model_open(&m, d, path));
    OK(bm_session_open(&s, m, &o));
    const size_t V = (size_t)c.n_vocab;
    float *alone = floats(TEXTS * V);
    for (int i = 0; i < TEXTS; i++) {
        in_step(s, i, 1, ids, BM_WANT_LAST);
        memcpy(alone + (size_t)i * V, bm_logits(s, i), V * sizeof *alone);
    }
    const int most = gpu->reserving(gpu, TEXTS, c.d_model) ? 5 : TEXTS;
    for (int n = 1; n <= most; n++) {
        for (int i = 0; i < n; i++) OK(bm_state_set(s, i, NULL));
        in_step(s, 0, n, ids, BM_WANT_LAST);
        for (int i = 0; i < n; i++) assert_memory_equal(bm_logits(s, i), alone + (size_t)i * V, V * sizeof *alone);
        for (int i = 0; i < n; i++) OK(bm_state_set(s, i, NULL));
        in_step(s, 0, n, ids, BM_WANT_BEST);
        for (int i = 0; i < n; i++) {
            size_t best = 0;
            for (size_t v = 1; v < V; v++) if (alone[(size_t)i * V + v] > alone[(size_t)i * V + best]) best = v;
            assert_int_equal(bm_best(s, i), best);
        }
    }
    for (int i = 0; i < TEXTS; i++) {
        double peak = 0;
        OK(bm_state_set(s, i, NULL));
        OK(bm_forward(s, &(bm_input){ .slot = i, .tokens = ids[i], .n = LENGTH, .want = BM_WANT_LAST }, 1));
        for (size_t v = 0; v < V; v++) peak = fmax(peak, fabs((double)alone[(size_t)i * V + v]));
        /* in each of 12 products activations rounded to bf16, and weights of quants, or behind norms before and after their roots:
         * docs/NUMERICS.md */
        const double bound = sqrt(12) * 1.5 / 256 * peak;
        for (size_t v = 0; v < V; v++)
            check_near((double)bm_logits(s, i)[v], (double)alone[(size_t)i * V + v], bound, bm_dtype_name(type));
    }
    drop(alone);
    bm_session_close(s);
    next_of(m, 1);
    next_of(m, 3);
    bm_model_close(m);
    bm_device_close(d);
    unlink(path);
}
static void test_token(void **state) {
    (void)state;
    token_of(BM_BF16);
    token_of(BM_F16);
    token_of(BM_Q8_0);
    token_of(BM_Q4_0);
}

int main(int argc, char **argv) {
    const struct CMUnitTest test[] = {
        cmocka_unit_test(test_token), cmocka_unit_test(test_router), cmocka_unit_test(test_between), cmocka_unit_test(test_norm_between),
        cmocka_unit_test(test_best_alone), cmocka_unit_test(test_rounded), cmocka_unit_test(test_gathered),
    };
    return run_cuda("cuda, recorded", test, sizeof test / sizeof *test, argc, argv);
}
