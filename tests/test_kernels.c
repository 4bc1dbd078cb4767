/* test_kernels.c - matrix products, experts and the backend itself: every instruction set of this machine
 * against a reference in f64 and against scalar, with a bound each; and the law, bit for bit:
 * a result does not depend on the number of rows, groups or threads. */
#include "lib_kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __aarch64__
#define FOREIGN_LEVEL "avx2"
#else
#define FOREIGN_LEVEL "neon"
#endif

/* What native arithmetic makes of a row of activations before it multiplies, in f32 or better. */
static void native_row(double *out, bm_dtype type, const float *x, int n) {
    for (int k = 0; k < n; k++) out[k] = type == BM_BF16 ? bm_bf16_f32(bm_f32_bf16(x[k])) : x[k];
    if (!bm_dtype_blocked(type)) return;
    for (int b = 0; b < n; b += 32) {
        float top = 0;
        for (int k = 0; k < 32; k++) top = fmaxf(top, fabsf(x[b + k]));
        for (int k = 0; k < 32; k++) out[b + k] = (double)rintf(x[b + k] * (127.0f / top)) * (top / 127.0f);
    }
}
/* sum_k w[k] x[k], and the sum of magnitudes that bounds its rounding. */
static double dot_reference(const float *w, const float *x, int K, bm_dtype type, bm_arith arith, double *size) {
    double row[1024], s = 0;
    *size = 0;
    if (arith == BM_ARITH_NATIVE) native_row(row, type, x, K);
    for (int k = 0; k < K; k++) {
        const double p = (arith == BM_ARITH_NATIVE ? row[k] : (double)x[k]) * w[k];
        s += p;
        *size += fabs(p);
    }
    return s;
}

/* ---- linear --------------------------------------------------------------------------- */

static const int widths[] = { 1, 7, 20, 31, 32, 33, 64, 72, 96, 100, 256, 300, 320, 768 };
enum { WIDTHS = sizeof widths / sizeof *widths };

static void linear_case(bm_backend *b, bm_dtype type, bm_arith arith, int M, int N, int K) {
    matrix w = make_matrix(type, N, K);
    const int ldx = K + 3;
    float *x = normals((size_t)M * (size_t)ldx, 1), *y = normals((size_t)M * (size_t)N, 1),
        *bias = normals((size_t)N, 1);
    float *before = copy_of(y, (size_t)M * (size_t)N);
    for (int i = 0; i < M; i++) x[i * ldx + K] = NAN;       /* between rows: not to be read */
    const bool accumulate = M % 2, biased = N % 2;
    b->linear(b, &(bm_op_linear){ .M = M, .ldx = ldx, .w = &w.t, .x = x, .bias = biased ? bias : NULL, .y = y,
                                  .accumulate = accumulate, .arith = arith });
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double size, s = dot_reference(w.wide + j * K, x + i * ldx, K, type, arith, &size);
            if (biased) s += bias[j];
            if (accumulate) s += before[i * N + j];
            check_near(y[i * N + j], s, 1e-6 * (size + 1), b->name);
        }
    check_guards(y, (size_t)M * (size_t)N);
    drop(x); drop(y); drop(bias); drop(before);
    drop_matrix(&w);
}
static void test_linear(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int arith = 0; b && arith < 2; arith++)
            for (int type = 0; type < BM_DTYPE_COUNT; type++)
                for (int i = 0; i < WIDTHS; i++) {
                    if (widths[i] % (int)bm_dtype_block(type)) continue;
                    for (int N = 1; N <= 9; N++) linear_case(b, type, arith, 1 + (N + i) % 14, N, widths[i]);
                }
        if (b) done(b);
    }
}

/* Products of M = 1..67 rows equal products of one row, whatever the level, type and threads. */
static void law_case(int level, int threads, bm_dtype type, bm_arith arith, int N, int K) {
    bm_backend *b = open_level(level, threads);
    if (!b) return;
    matrix w = make_matrix(type, N, K);
    float *x = normals((size_t)MAX_M * (size_t)K, 1), *y = floats((size_t)MAX_M * (size_t)N),
        *one = floats((size_t)MAX_M * (size_t)N);
    for (int i = 0; i < MAX_M; i++)
        b->linear(b, &(bm_op_linear){ .M = 1, .ldx = K, .w = &w.t, .x = x + i * K, .y = one + i * N, .arith = arith });
    for (int M = 1; M <= MAX_M; M++) {
        b->linear(b, &(bm_op_linear){ .M = M, .ldx = K, .w = &w.t, .x = x, .y = y, .arith = arith });
        check_equal(y, one, (size_t)M * (size_t)N, b->name);
    }
    /* one output row at a time: neighbours in the matrix do not matter either */
    for (int j = 0; j < N; j++) {
        const bm_tensor row = { (const uint8_t *)w.t.data + (size_t)j * bm_dtype_bytes(type, (size_t)K), type, 1, K };
        b->linear(b, &(bm_op_linear){ .M = MAX_M, .ldx = K, .w = &row, .x = x, .y = y, .arith = arith });
        for (int i = 0; i < MAX_M; i++) check_equal(y + i, one + i * N + j, 1, "a single output row");
    }
    drop(x); drop(y); drop(one);
    drop_matrix(&w);
    done(b);
}
static void test_linear_law(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++)
        for (int threads = least_threads(); threads <= 3; threads++)
            for (int arith = 0; arith < 2; arith++)
                for (int type = 0; type < BM_DTYPE_COUNT; type++) {
                    const size_t block = bm_dtype_block(type);
                    law_case(level, threads, type, arith, 37, block == 1 ? 100 : block == 32 ? 96 : 256);
                    law_case(level, threads, type, arith, 5, block == 1 ? 20 : block == 32 ? 320 : 768);
                }
}
static void test_linear_threads(void **state) {
    (void)state;
    enum { M = 33, N = 300 };
    for (int level = 0; level < LEVELS; level++)
        for (int type = 0; type < BM_DTYPE_COUNT; type++) {
            const int K = bm_dtype_block(type) > 32 ? 512 : 320;
            matrix w = make_matrix(type, N, K);
            float *x = normals((size_t)(M * K), 1), *y[4] = { NULL };
            for (int t = 1; t <= 3; t++) {
                bm_backend *b = open_level(level, t);
                y[t] = floats(M * N);
                if (!b) continue;
                b->linear(b, &(bm_op_linear){ .M = M, .ldx = K, .w = &w.t, .x = x, .y = y[t],
                    .arith = BM_ARITH_NATIVE });
                done(b);
            }
            check_equal(y[2], y[1], M * N, "two threads");
            check_equal(y[3], y[1], M * N, "three threads");
            for (int t = 1; t <= 3; t++) drop(y[t]);
            drop(x);
            drop_matrix(&w);
        }
}

static void test_embed(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int type = 0; b && type < BM_DTYPE_COUNT; type++)
            for (int i = 0; i < WIDTHS; i++) {
                if (widths[i] % (int)bm_dtype_block(type)) continue;
                matrix w = make_matrix(type, 9, widths[i]);
                const bm_token token[3] = { 8, 0, 5 };
                float *y = floats((size_t)(3 * widths[i]));
                b->embed(b, &(bm_op_embed){ .M = 3, .table = &w.t, .token = token, .y = y });
                for (int r = 0; r < 3; r++)
                    check_equal(y + r * widths[i], w.wide + token[r] * widths[i], (size_t)widths[i], "embed");
                check_guards(y, (size_t)(3 * widths[i]));
                drop(y);
                drop_matrix(&w);
            }
        if (b) done(b);
    }
}

/* ---- experts -------------------------------------------------------------------------- */

enum { MOST_D = 256, X = 4, M_MOE = 29 };
static int D, F;       /* 64 and 96, or blocks of 256 */
typedef struct moe {
    matrix gate[X], up[X], down[X];
    bm_tensor t[3][X];
    float *gate_bias, *up_bias, *down_bias, *x;
} moe;

/* types: of gate, up, down */
static moe *make_moe(const int *types) {
    moe *m = calloc(1, sizeof *m);
    assert_non_null(m);
    for (int e = 0; e < X; e++) {
        m->gate[e] = make_matrix(types[0], F, D);
        m->up[e] = make_matrix(types[1], F, D);
        m->down[e] = make_matrix(types[2], D, F);
        m->t[0][e] = m->gate[e].t;
        m->t[1][e] = m->up[e].t;
        m->t[2][e] = m->down[e].t;
    }
    m->gate_bias = normals((size_t)(X * F), 1);
    m->up_bias = normals((size_t)(X * F), 1);
    m->down_bias = normals((size_t)(X * D), 1);
    m->x = normals((size_t)(M_MOE * D), 1);
    return m;
}
static void drop_moe(moe *m) {
    for (int e = 0; e < X; e++) drop_matrix(&m->gate[e]), drop_matrix(&m->up[e]), drop_matrix(&m->down[e]);
    drop(m->gate_bias); drop(m->up_bias); drop(m->down_bias); drop(m->x);
    free(m);
}
/* variant bits: 1 plain, 2 biases, 4 accumulate, 8 SiLU */
static void run_moe(bm_backend *b, const moe *m, int row, int M, const routing *r, int variant, bm_arith arith,
                    float *y) {
    float *hidden = floats((size_t)(M * 2 * F));
    b->experts(b, &(bm_op_experts){
        .M = M, .D = D, .F = F, .X = r ? X : 1, .activation = variant & 8 ? BM_SILU : BM_GELU, .arith = arith,
        .route = r ? &r->op : NULL,
        .gate = variant & 1 ? NULL : m->t[0], .up = m->t[1], .down = m->t[2],
        .gate_bias = variant & 2 ? m->gate_bias : NULL, .up_bias = variant & 2 ? m->up_bias : NULL,
        .down_bias = variant & 2 ? m->down_bias : NULL,
        .x = m->x + row * D, .hidden = hidden, .y = y, .accumulate = variant & 4 });
    check_guards(hidden, (size_t)(M * 2 * F));
    drop(hidden);
}
static void moe_reference(const moe *m, int i, int e, double g, int variant, bm_arith arith, double *y) {
    float h[MOST_D];
    double size;
    for (int f = 0; f < F; f++) {
        const float *x = m->x + i * D;
        double up = dot_reference(m->up[e].wide + f * D, x, D, m->up[e].t.type, arith, &size);
        double gate = dot_reference(m->gate[e].wide + f * D, x, D, m->gate[e].t.type, arith, &size);
        if (variant & 2) up += m->up_bias[e * F + f], gate += m->gate_bias[e * F + f];
        const double a = variant & 1 ? up : gate, act = variant & 8 ? silu(a) : gelu(a);
        h[f] = (float)(variant & 1 ? act : act * up);
    }
    for (int d = 0; d < D; d++) {
        y[d] = dot_reference(m->down[e].wide + d * F, h, F, m->down[e].t.type, arith, &size);
        y[d] = g * (y[d] + (variant & 2 ? m->down_bias[e * D + d] : 0));
    }
}
static void moe_case(bm_backend *b, const int *types, int variant, bm_arith arith, bool dense) {
    bool wide = false;
    for (int i = 0; i < 3; i++) wide |= bm_dtype_block(types[i]) > 64;
    D = wide ? MOST_D : 64;
    F = wide ? MOST_D : 96;
    moe *m = make_moe(types);
    routing r;
    float *logits = normals(M_MOE * X, 2), *y = normals((size_t)(M_MOE * D), 1), *before = copy_of(y, (size_t)(M_MOE * D)),
        *single = copy_of(y, (size_t)(M_MOE * D));
    for (int i = 0; i < M_MOE; i++) logits[i * X + 1] -= 20;        /* an expert without rows */
    route_rows(b, &r, logits, M_MOE, X, BM_ROUTE_SIGMOID);
    run_moe(b, m, 0, M_MOE, dense ? NULL : &r, variant, arith, y);
    /* native: a hidden value that falls on the other side of a rounding step moves by that step */
    const double bound = arith == BM_ARITH_F32 ? 5e-6 : 2e-2;
    for (int i = 0; i < M_MOE; i++) {
        double e[MOST_D];
        moe_reference(m, i, dense ? 0 : r.expert[i], dense ? 1 : (double)r.gate[i], variant, arith, e);
        for (int d = 0; d < D; d++)
            check_near(y[i * D + d], e[d] + (variant & 4 ? before[i * D + d] : 0), bound * (1 + fabs(e[d])), b->name);
    }
    for (int i = 0; i < M_MOE; i++) {
        routing one;
        route_rows(b, &one, logits + i * X, 1, X, BM_ROUTE_SIGMOID);
        run_moe(b, m, i, 1, dense ? NULL : &one, variant, arith, single + i * D);
    }
    check_equal(y, single, (size_t)(M_MOE * D), "experts, grouped and single");
    check_guards(y, (size_t)(M_MOE * D));
    drop(logits); drop(y); drop(before); drop(single);
    drop_moe(m);
}
static void test_experts(void **state) {
    (void)state;
    static const int mixed[3] = { BM_BF16, BM_Q8_0, BM_Q4_0 };
    for (int level = 0; level < LEVELS; level++)
        for (int threads = least_threads(); threads <= 3; threads++) {
            bm_backend *b = open_level(level, threads);
            for (int variant = 0; b && variant < 16; variant += one_in(3))
                for (int arith = 0; arith < 2; arith++) {
                    const int t = variant % BM_DTYPE_COUNT, same[3] = { t, t, t };
                    moe_case(b, same, variant, arith, variant == 6 || variant == 9);
                    moe_case(b, mixed, variant, arith, false);
                }
            if (b) done(b);
        }
}

/* ---- the backend itself --------------------------------------------------------------- */

static void test_levels_agree(void **state) {
    (void)state;
    enum { M = 9, N = 33 };
    for (int arith = 0; arith < 2; arith++)
        for (int type = 0; type < BM_DTYPE_COUNT; type++) {
            const int K = bm_dtype_block(type) > 32 ? 512 : 320;
            matrix w = make_matrix(type, N, K);
            float *x = normals((size_t)(M * K), 1), *y[LEVELS] = { NULL };
            for (int level = 0; level < LEVELS; level++) {
                bm_backend *b = open_level(level, 1);
                if (!b) continue;
                y[level] = floats(M * N);
                b->linear(b, &(bm_op_linear){ .M = M, .ldx = K, .w = &w.t, .x = x, .y = y[level], .arith = arith });
                for (int i = 0; i < M * N; i++)
                    check_near(y[level][i], y[0][i], 5e-6 * (1 + fabs(y[0][i])), levels[level]);
                done(b);
            }
            for (int level = 0; level < LEVELS; level++) if (y[level]) drop(y[level]);
            drop(x);
            drop_matrix(&w);
        }
}
static void test_memory(void **state) {
    (void)state;
    bm_backend *b;
    assert_int_equal(bm_backend_open_cpu(&b, 2), BM_OK);
    assert_true(b->reads_host && b->threads == 2 && !strncmp(b->name, "cpu ", 4) && strstr(b->name, ", 2 threads"));
    float *p, back[4];
    assert_int_equal(b->alloc(b, &p, 64, "a test"), BM_OK);
    for (int i = 0; i < 16; i++) assert_true(p[i] == 0);
    const float host[4] = { 1, 2, 3, 4 };
    b->put(b, p, host, sizeof host);
    b->copy(b, p + 4, p, sizeof host);
    b->zero(b, p, 8);
    b->get(b, back, p + 4, sizeof back);
    assert_memory_equal(back, host, sizeof host);
    assert_true(p[0] == 0 && p[1] == 0 && p[2] == 3);
    b->release(b, p);
    b->release(b, NULL);
    double speed = 0;
    assert_int_equal(b->bandwidth(b, 1 << 22, 3, &speed), BM_OK);
    assert_true(speed > 1e8 && speed < 1e13);
    assert_int_equal(b->bandwidth(b, 1, 3, &speed), BM_EARG);
    done(b);
}
/* Work that was not reserved fails once, sticks until sync, and leaves the output alone. */
static void test_reserve(void **state) {
    (void)state;
    bm_backend *b;
    assert_int_equal(bm_backend_open_cpu(&b, 1), BM_OK);
    matrix w = make_matrix(BM_Q8_0, 4, 64);
    float *x = normals(3 * 64, 1), *y = floats(3 * 4);
    const bm_op_linear op = { .M = 3, .ldx = 64, .w = &w.t, .x = x, .y = y, .arith = BM_ARITH_NATIVE };
    b->linear(b, &op);
    b->linear(b, &op);
    assert_true(y[0] == 0);
    assert_int_equal(b->sync(b), BM_EDEVICE);
    assert_non_null(strstr(bm_error(), "reserve"));
    assert_int_equal(b->sync(b), BM_OK);
    assert_int_equal(b->reserve(b, 3, 64), BM_OK);
    assert_int_equal(b->reserve(b, 1, 32), BM_OK);      /* keeps the larger one */
    b->linear(b, &op);
    assert_true(y[0] != 0);
    assert_int_equal(b->reserve(b, INT_MAX, INT_MAX), BM_EMEMORY);
    b->linear(b, &op);
    drop(x); drop(y);
    drop_matrix(&w);
    done(b);
}
static void test_open(void **state) {
    (void)state;
    bm_backend *b = NULL;
    assert_int_equal(bm_backend_open_cpu(&b, -1), BM_EARG);
    assert_null(b);
    assert_int_equal(bm_backend_open_cpu(&b, 100000), BM_EARG);
    static const char *const bad[] = { "two", "0", "-1", "3x", "99999999999999999999" };
    for (int i = 0; i < 5; i++) {
        setenv("BM_THREADS", bad[i], 1);
        assert_int_equal(bm_backend_open_cpu(&b, 0), BM_EARG);
        assert_non_null(strstr(bm_error(), "BM_THREADS"));
    }
    setenv("BM_THREADS", "3", 1);
    assert_int_equal(bm_backend_open_cpu(&b, 0), BM_OK);
    assert_int_equal(b->threads, 3);
    b->close(b);
    unsetenv("BM_THREADS");
    assert_int_equal(bm_backend_open_cpu(&b, 0), BM_OK);
    assert_true(b->threads >= 1);
    b->close(b);
    char *old = getenv("BM_CPU") ? strdup(getenv("BM_CPU")) : NULL;
    setenv("BM_CPU", "avx3", 1);
    assert_int_equal(bm_backend_open_cpu(&b, 0), BM_EARG);
    assert_non_null(strstr(bm_error(), "BM_CPU"));
    setenv("BM_CPU", FOREIGN_LEVEL, 1);
    assert_int_equal(bm_backend_open_cpu(&b, 1), BM_ENOSUPPORT);
    assert_non_null(strstr(bm_error(), FOREIGN_LEVEL));
    setenv("BM_CPU", "scalar", 1);
    assert_int_equal(bm_backend_open_cpu(&b, 1), BM_OK);
    assert_string_equal(b->name, "cpu scalar, 1 thread");
    b->close(b);
    if (old) setenv("BM_CPU", old, 1);
    else unsetenv("BM_CPU");
    free(old);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear), cmocka_unit_test(test_linear_law), cmocka_unit_test(test_linear_threads),
        cmocka_unit_test(test_levels_agree), cmocka_unit_test(test_embed), cmocka_unit_test(test_experts),
        cmocka_unit_test(test_memory), cmocka_unit_test(test_reserve), cmocka_unit_test(test_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
