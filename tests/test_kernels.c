/* test_kernels.c - the CPU backend, operation by operation: every instruction set of this machine
 * against a reference in f64 and against scalar, with a bound each; and the law, bit for bit:
 * a result does not depend on the number of rows, chunks, groups, slots or threads. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "cpu/kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LEVELS = 3, GUARD = 16, MAX_M = 67 };
static const char *const levels[LEVELS] = { "scalar", "avx2", "avx512" };
static uint64_t counter;

/* NULL when this machine lacks the level. */
static bm_backend *open_level(int level, int threads) {
    bm_backend *b = NULL;
    const bm_status s = bm_backend_open_cpu_level(&b, threads, levels[level]);
    assert_true(s == BM_OK || s == BM_ENOSUPPORT);
    if (b) assert_int_equal(b->reserve(b, MAX_M, 1024), BM_OK);
    return b;
}
static void done(bm_backend *b) {
    assert_int_equal(b->sync(b), BM_OK);
    b->close(b);
}

/* Floats with guard words on both sides, which no kernel may touch. */
static float *floats(size_t n) {
    float *p = calloc(n + 2 * GUARD, sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < GUARD; i++) p[i] = p[GUARD + n + i] = 12345.0f;
    return p + GUARD;
}
static void check_guards(const float *p, size_t n) {
    for (size_t i = 0; i < GUARD; i++)
        if (p[-1 - (int)i] != 12345.0f || p[n + i] != 12345.0f) fail_msg("a guard word was overwritten");
}
static void drop(float *p) { free(p - GUARD); }
static float *normals(size_t n, float scale) {
    float *p = floats(n);
    for (size_t i = 0; i < n; i++) p[i] = scale * (float)bm_rng_normal(7, 1, counter++);
    return p;
}
static float *copy_of(const float *p, size_t n) {
    float *q = floats(n);
    memcpy(q, p, n * sizeof *q);
    return q;
}
static void check_equal(const float *a, const float *b, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a))
            fail_msg("%s: element %zu is %.9g, expected the bits of %.9g", what, i, a[i], b[i]);
}
static void check_near(double found, double expected, double bound, const char *what) {
    if (!(fabs(found - expected) <= bound))
        fail_msg("%s: found %.9g, expected %.9g within %.3g", what, found, expected, bound);
}

/* A matrix of any type at an odd address, NaN (in any type) behind it, and the same values in f32. */
typedef struct matrix { bm_tensor t; uint8_t *base; float *wide; } matrix;
static matrix make_matrix(bm_dtype type, int rows, int cols) {
    const size_t n = (size_t)rows * (size_t)cols, bytes = bm_dtype_bytes(type, n);
    matrix m = { .base = malloc(bytes + 1 + 64), .wide = normals(n, 1.0f / sqrtf((float)cols)) };
    assert_non_null(m.base);
    memset(m.base + 1 + bytes, 0xff, 64);
    bm_narrow(m.base + 1, type, m.wide, n);
    bm_widen(m.wide, type, m.base + 1, n);
    m.t = (bm_tensor){ m.base + 1, type, rows, cols };
    return m;
}
static void drop_matrix(matrix *m) {
    free(m->base);
    drop(m->wide);
}

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

static const int widths[] = { 1, 7, 20, 31, 32, 33, 64, 72, 96, 100, 300, 320 };
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
                    if (bm_dtype_blocked(type) && widths[i] % 32) continue;
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
        for (int threads = 1; threads <= 3; threads++)
            for (int arith = 0; arith < 2; arith++)
                for (int type = 0; type < BM_DTYPE_COUNT; type++) {
                    law_case(level, threads, type, arith, 37, bm_dtype_blocked(type) ? 96 : 100);
                    law_case(level, threads, type, arith, 5, bm_dtype_blocked(type) ? 320 : 20);
                }
}
static void test_linear_threads(void **state) {
    (void)state;
    enum { M = 33, N = 300, K = 320 };
    for (int level = 0; level < LEVELS; level++)
        for (int type = 0; type < BM_DTYPE_COUNT; type++) {
            matrix w = make_matrix(type, N, K);
            float *x = normals(M * K, 1), *y[4] = { NULL };
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

/* ---- elementary functions ------------------------------------------------------------- */

static double gelu(double x) { return 0.5 * x * erfc(-x / sqrt(2.0)); }
static double silu(double x) { return x / (1 + exp(-x)); }
static double softplus(double x) { return x > 20 ? x : log1p(exp(x)); }

static void test_activations(void **state) {
    (void)state;
    enum { N = 40001 };
    float *x = floats(N), *y = floats(N), *up = normals(N, 1), one;
    for (int i = 0; i < N; i++) x[i] = (float)(i - N / 2) * (i % 2 ? 0.005f : 0.0005f);
    for (int level = 0; level < LEVELS; level++) {
        bm_kernels k;
        assert_int_equal(bm_kernels_choose(&k, levels[level]), BM_OK);
        for (int f = 0; f < 2; f++) {
            k.activate(y, NULL, x, N, f);
            for (int i = 0; i < N; i++) {
                const double e = f == BM_GELU ? gelu(x[i]) : silu(x[i]);
                check_near(y[i], e, 3e-7 * fabs(e) + (f == BM_GELU ? 5e-8 * fabs(x[i]) : 0) + 3e-37,
                    f ? "silu" : "gelu");
            }
            for (int n = 1; n <= 40; n++) {
                k.activate(y, x + n, up, n, f);
                check_guards(y, N);
                for (int i = 0; i < n; i++) {
                    k.activate(&one, x + n + i, up + i, 1, f);
                    check_equal(y + i, &one, 1, "an element's place in its vector");
                }
            }
            const float odd[6] = { 0, -0.0f, 1e30f, -1e30f, 200, -200 };
            k.activate(y, NULL, odd, 6, f);
            for (int i = 0; i < 6; i++) check_near(y[i], odd[i] > 0 ? odd[i] : 0, 1e-30, "activation at its ends");
            const float nan_in = NAN;
            k.activate(y, NULL, &nan_in, 1, f);
            assert_true(isnan(y[0]));
        }
    }
    drop(x); drop(y); drop(up);
}

/* The scan of one state shows exp and softplus bare: dt = 32 leaves d = 32, and u = 0 leaves
 * h = exp(32 A) h; A = -inf leaves h = softplus(dt) u B. */
static void scan_bare(bm_backend *b, int I, const float *dt, const float *A, const float *u, float *h) {
    float *zero = floats((size_t)I), *y = floats((size_t)I);
    const int32_t start[2] = { 0, 1 }, slot[1] = { 0 };
    const float unit = 1;
    b->scan(b, &(bm_op_scan){ .Q = 1, .start = start, .slot = slot, .I = I, .N = 1, .ldz = I, .ldbc = 1, .u = u,
                              .dt = dt, .dt_bias = zero, .A = A, .B = &unit, .C = &unit, .D = zero, .z = zero, .y = y,
                              .state = h, .stride = (size_t)I });
    drop(zero); drop(y);
}
static void test_exp_softplus(void **state) {
    (void)state;
    enum { I = 30011 };
    float *dt = floats(I), *A = floats(I), *u = floats(I), *h = floats(I);
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        if (!b) continue;
        for (int i = 0; i < I; i++) {
            dt[i] = 32;
            u[i] = 0;
            h[i] = 1;
            A[i] = ((float)i * (200.0f / I) - 110) / 32;
        }
        A[0] = 0; A[1] = -1e30f; A[2] = 3; A[3] = NAN; A[4] = -INFINITY;
        scan_bare(b, I, dt, A, u, h);
        assert_true(h[0] == 1 && h[1] == 0 && isinf(h[2]) && isnan(h[3]) && h[4] == 0);
        for (int i = 5; i < I; i++) {
            const double e = exp((double)(32 * A[i]));
            if (e < 3.4e38) check_near(h[i], e, 1.8e-7 * e + 1.5e-45, "exp");
        }
        for (int i = 0; i < I; i++) {
            dt[i] = (float)i * (120.0f / I) - 90;
            u[i] = 1;
            h[i] = 0;
            A[i] = -INFINITY;
        }
        dt[0] = -1e30f; dt[1] = 1e30f; dt[2] = NAN;
        for (int i = 0; i < I; i++) if (dt[i] > 0 || i < 3) A[i] = -1e38f;
        scan_bare(b, I, dt, A, u, h);
        assert_true(h[0] == 0 && h[1] == 1e30f && isnan(h[2]));
        for (int i = 3; i < I; i++)
            check_near(h[i], softplus(dt[i]), 4e-7 * softplus(dt[i]) + 1.5e-45, "softplus");
        done(b);
    }
    drop(dt); drop(A); drop(u); drop(h);
}

/* ---- norm, loss, embed ---------------------------------------------------------------- */

static void norm_case(bm_backend *b, int D, bool centered, int nulls) {
    enum { M = 5 };
    const size_t n = (size_t)M * (size_t)D;
    float *x = normals(n, 2), *r = normals(n, 2), *w = normals((size_t)D, 1), *bias = normals((size_t)D, 1),
        *y = floats(n);
    float *before = copy_of(r, n);
    bm_op_norm op = { .M = M, .D = D, .eps = 1e-5f, .centered = centered, .x = nulls == 1 ? NULL : x,
                      .residual = nulls == 2 ? NULL : r,
                      .weight = w, .bias = centered ? bias : NULL, .sum = nulls == 3 ? NULL : r, .y = y };
    b->norm(b, &op);
    for (int i = 0; i < M; i++) {
        double s[400], mean = 0, square = 0;
        for (int k = 0; k < D; k++) {
            s[k] = (nulls == 1 ? 0.0f : x[i * D + k]) + (nulls == 2 ? 0.0f : before[i * D + k]);
            if (nulls != 3) check_near(r[i * D + k], s[k], 1e-6, "norm's sum");
            mean += s[k] / D;
        }
        for (int k = 0; k < D; k++) square += (s[k] - (centered ? mean : 0)) * (s[k] - (centered ? mean : 0)) / D;
        for (int k = 0; k < D; k++) {
            const double v = (s[k] - (centered ? mean : 0)) / sqrt(square + 1e-5) * w[k] + (centered ? bias[k] : 0);
            /* a row of one element has no variance: what is left is rounding times 1 / sqrt(eps) */
            check_near(y[i * D + k], v, 4e-6 * (1 + fabs(v)) + (D < 3 ? 1e-3 : 0), b->name);
        }
    }
    check_guards(y, n);
    check_guards(r, n);
    drop(x); drop(r); drop(w); drop(bias); drop(y); drop(before);
}
static void test_norm(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int i = 0; b && i < WIDTHS; i++)
            for (int c = 0; c < 2; c++)
                for (int nulls = 0; nulls < 4; nulls++) norm_case(b, widths[i], c, nulls);
        if (b) done(b);
    }
}
static void test_loss(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int i = 0; b && i < WIDTHS; i++) {
            enum { M = 3 };
            const int V = widths[i];
            float *l = normals((size_t)(M * V), 6), *loss = floats(M);
            const bm_token target[M] = { 0, V / 2, V - 1 };
            b->loss(b, &(bm_op_loss){ .M = M, .V = V, .logits = l, .target = target, .loss = loss });
            for (int r = 0; r < M; r++) {
                double sum = 0;
                for (int k = 0; k < V; k++) sum += exp((double)l[r * V + k] - l[r * V + target[r]]);
                check_near(loss[r], log(sum), 1e-6 * (1 + log(sum)), b->name);
            }
            check_guards(loss, M);
            drop(l); drop(loss);
        }
        if (b) done(b);
    }
}
static void test_embed(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int type = 0; b && type < BM_DTYPE_COUNT; type++)
            for (int i = 0; i < WIDTHS; i++) {
                if (bm_dtype_blocked(type) && widths[i] % 32) continue;
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

/* ---- conv and scan: sequences --------------------------------------------------------- */

/* One set of inputs for both: T tokens in all, I channels, N states, K taps, 4 slots of state. */
enum { T = 41, SLOTS = 4 };
typedef struct sequence { int I, N, K; float *xz, *w, *bias, *dt, *A, *BC, *D, *y, *state; } sequence;

static sequence make_sequence(int I, int N, int K) {
    sequence s = { .I = I, .N = N, .K = K, .xz = normals((size_t)(T * 2 * I), 1), .w = normals((size_t)(K * I), 1),
                   .bias = normals((size_t)I, 1),
                   .dt = normals((size_t)(T * I), 1), .A = normals((size_t)(N * I), 1),
                   .BC = normals((size_t)(T * (2 * N + 3)), 1),
                   .D = normals((size_t)I, 1), .y = floats((size_t)(T * I)),
                   .state = normals((size_t)(SLOTS * (K + N) * I), 1) };
    for (int i = 0; i < N * I; i++) s.A[i] = -fabsf(s.A[i]) * (float)(1 + i / I);
    return s;
}
static void drop_sequence(sequence *s) {
    check_guards(s->y, (size_t)(T * s->I));
    check_guards(s->state, (size_t)(SLOTS * (s->K + s->N) * s->I));
    drop(s->xz); drop(s->w); drop(s->bias); drop(s->dt); drop(s->A);
    drop(s->BC); drop(s->D); drop(s->y); drop(s->state);
}
/* Rows [first, first + start[Q]) of s, through conv or scan, into y. */
static void run(bm_backend *b, const sequence *s, bool scan, int first, int Q, const int32_t *start,
                const int32_t *slot, float *y, float *state) {
    const size_t I = (size_t)s->I, at = (size_t)first * I, stride = (size_t)(s->K + s->N) * I;
    const int ldbc = 2 * s->N + 3;
    if (scan)
        b->scan(b, &(bm_op_scan){ .Q = Q, .start = start, .slot = slot, .I = s->I, .N = s->N, .ldz = 2 * s->I,
                                  .ldbc = ldbc, .u = s->xz + at,
                                  .dt = s->dt + at, .dt_bias = s->bias, .A = s->A, .B = s->BC + first * ldbc,
                                  .C = s->BC + first * ldbc + s->N,
                                  .D = s->D, .z = s->xz + 2 * at + I, .y = y + at, .state = state, .stride = stride });
    else
        b->conv(b, &(bm_op_conv){ .Q = Q, .start = start, .slot = slot, .I = s->I, .K = s->K, .ldx = 2 * s->I,
                                  .x = s->xz + 2 * at, .weight = s->w,
                                  .bias = s->N % 2 ? s->bias : NULL, .y = y + at, .state = state, .stride = stride });
}
static void reference_conv(const sequence *s, int c, double *y, double *window) {
    for (int t = 0; t < T; t++) {
        double v = s->N % 2 ? s->bias[c] : 0;
        window[s->K - 1] = s->xz[t * 2 * s->I + c];
        for (int k = 0; k < s->K; k++) v += s->w[k * s->I + c] * window[k];
        memmove(window, window + 1, sizeof *window * (size_t)(s->K - 1));
        y[t] = silu(v);
    }
}
static void reference_scan(const sequence *s, int c, double *y, double *h) {
    for (int t = 0; t < T; t++) {
        const float *B = s->BC + t * (2 * s->N + 3), *C = B + s->N;
        const double u = s->xz[t * s->I + c], d = softplus((double)s->dt[t * s->I + c] + s->bias[c]);
        double v = s->D[c] * u;
        for (int n = 0; n < s->N; n++) {
            h[n] = exp(d * s->A[n * s->I + c]) * h[n] + d * u * B[n];
            v += C[n] * h[n];
        }
        y[t] = v * silu(s->xz[t * 2 * s->I + s->I + c]);
    }
}
/* One sequence in slot 2 against f64; the other slots keep their bits. */
static void sequence_reference(bm_backend *b, bool scan, int I, int N, int K) {
    sequence s = make_sequence(I, N, K);
    const int32_t start[2] = { 0, T }, slot[1] = { 2 };
    const size_t stride = (size_t)((K + N) * I);
    float *before = copy_of(s.state, SLOTS * stride);
    run(b, &s, scan, 0, 1, start, slot, s.y, s.state);
    const int kept = scan ? N : K - 1;
    for (int c = 0; c < I; c++) {
        double y[T], carried[128];
        for (int n = 0; n < kept; n++) carried[n] = before[2 * stride + (size_t)(n * I + c)];
        (scan ? reference_scan : reference_conv)(&s, c, y, carried);
        for (int t = 0; t < T; t++) check_near(s.y[t * I + c], y[t], 3e-5 * (1 + fabs(y[t])), b->name);
        for (int n = 0; n < kept; n++)
            check_near(s.state[2 * stride + (size_t)(n * I + c)], carried[n], 1e-5 * (1 + fabs(carried[n])), "state");
    }
    check_equal(s.state, before, 2 * stride, "slots before");
    check_equal(s.state + 3 * stride, before + 3 * stride, stride, "the slot after");
    const size_t used = (size_t)(kept * I), end = 2 * stride + used;
    check_equal(s.state + end, before + end, stride - used, "past the state");
    drop(before);
    drop_sequence(&s);
}
/* All at once; token by token; in uneven chunks; as four sequences interleaved, one token each or
 * ragged; y in place of an input. */
static void sequence_law(int level, bool scan, int I, int N, int K) {
    sequence s = make_sequence(I, N, K);
    const size_t stride = (size_t)((K + N) * I), n = (size_t)(T * I);
    float *whole_state = NULL, *whole = NULL;
    for (int threads = 1; threads <= 3; threads++) {
        bm_backend *b = open_level(level, threads);
        if (!b) break;
        for (int chunk = T; chunk >= 1; chunk = chunk > 7 ? 7 : chunk - 3) {
            float *state = copy_of(s.state, SLOTS * stride);
            for (int t = 0; t < T; t += chunk) {
                const int32_t start[2] = { 0, t + chunk < T ? chunk : T - t }, slot[1] = { 1 };
                run(b, &s, scan, t, 1, start, slot, s.y, state);
            }
            if (!whole) whole = copy_of(s.y, n), whole_state = copy_of(state, SLOTS * stride);
            check_equal(s.y, whole, n, "chunks");
            check_equal(state, whole_state, SLOTS * stride, "state after chunks");
            drop(state);
        }
        /* slots 3, 0, 1 take rows 0..5, 5..25, 25..41 together, or one after another */
        float *together = copy_of(s.state, SLOTS * stride), *apart = copy_of(s.state, SLOTS * stride), *y = floats(n);
        const int32_t start[5] = { 0, 5, 25, 25, T }, slot[4] = { 3, 0, 2, 1 };
        run(b, &s, scan, 0, 4, start, slot, s.y, together);
        for (int q = 0; q < 4; q++) {
            const int32_t own[2] = { 0, start[q + 1] - start[q] };
            run(b, &s, scan, start[q], 1, own, slot + q, y, apart);
        }
        check_equal(s.y, y, n, "sequences");
        check_equal(together, apart, SLOTS * stride, "state after sequences");
        drop(together); drop(apart); drop(y);
        done(b);
    }
    if (whole) drop(whole), drop(whole_state);
    drop_sequence(&s);
}
static void test_conv(void **state) {
    (void)state;
    static const int taps[] = { 1, 2, 4, 16, 60 };
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int i = 0; b && i < 5; i++) {
            sequence_reference(b, false, 7, 1, taps[i]);
            sequence_reference(b, false, 100, 2, taps[i]);
            sequence_law(level, false, 147, 1, taps[i]);
        }
        if (b) done(b);
    }
}
static void test_scan(void **state) {
    (void)state;
    static const int states[] = { 1, 8, 16, 65 };      /* 65: more than a block holds on the stack */
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int i = 0; b && i < 4; i++) {
            sequence_reference(b, true, 7, states[i], 4);
            sequence_reference(b, true, 100, states[i], 4);
            sequence_law(level, true, 147, states[i], 4);
        }
        if (b) done(b);
    }
}
static void test_scan_in_place(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        if (!b) continue;
        sequence s = make_sequence(33, 16, 4);
        const int32_t start[2] = { 0, T }, slot[1] = { 0 };
        float *saved = copy_of(s.state, (size_t)(SLOTS * 20 * 33)), *dt = s.dt;
        run(b, &s, true, 0, 1, start, slot, s.y, s.state);
        s.dt = copy_of(dt, T * 33);
        run(b, &s, true, 0, 1, start, slot, s.dt, saved);
        check_equal(s.dt, s.y, T * 33, "y in place of dt");
        drop(saved); drop(dt);
        drop_sequence(&s);
        done(b);
    }
}

/* ---- route and experts ---------------------------------------------------------------- */

typedef struct routing { int32_t expert[MAX_M], order[MAX_M], first[65]; float gate[MAX_M]; bm_op_route op; } routing;

static void route_rows(bm_backend *b, routing *r, const float *logits, int M, int X, bm_routing rule) {
    r->op = (bm_op_route){ .M = M, .X = X, .rule = rule, .logits = logits, .expert = r->expert, .order = r->order,
                           .first = r->first, .gate = r->gate };
    b->route(b, &r->op);
}
static void test_route(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int X = 1; b && X <= 64; X += 9)
            for (int rule = 0; rule < 2; rule++) {
                float *l = normals((size_t)(MAX_M * X), 3);
                routing r;
                for (int e = 0; e < X; e++) l[e] = 1;                   /* row 0: all equal */
                for (int e = 0; e < X; e++) l[X + e] = NAN;             /* row 1: nothing to choose */
                l[2 * X] = NAN;                                         /* row 2: NaN first */
                route_rows(b, &r, l, MAX_M, X, rule);
                assert_int_equal(r.expert[0], 0);
                assert_in_range(r.expert[1], 0, X - 1);
                int seen[MAX_M] = { 0 };
                assert_int_equal(r.first[0], 0);
                assert_int_equal(r.first[X], MAX_M);
                for (int e = 0; e < X; e++)
                    for (int i = r.first[e]; i < r.first[e + 1]; i++) {
                        assert_int_equal(r.expert[r.order[i]], e);
                        assert_true(i == r.first[e] || r.order[i] > r.order[i - 1]);
                        seen[r.order[i]]++;
                    }
                for (int i = 0; i < MAX_M; i++) {
                    assert_int_equal(seen[i], 1);
                    if (i < 3) continue;
                    double sum = 0;
                    for (int e = 0; e < X; e++) {
                        assert_true(l[i * X + e] <= l[i * X + r.expert[i]]);
                        sum += exp((double)l[i * X + e] - l[i * X + r.expert[i]]);
                    }
                    const double sigmoid = 1 / (1 + exp(-(double)l[i * X + r.expert[i]]));
                    check_near(r.gate[i], rule == BM_ROUTE_SOFTMAX ? 1 / sum : sigmoid, 2e-6, "gate");
                }
                if (X > 1) assert_true(r.expert[2] != 0);
                drop(l);
            }
        if (b) done(b);
    }
}

enum { D = 64, F = 96, X = 4, M_MOE = 29 };
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
    m->gate_bias = normals(X * F, 1);
    m->up_bias = normals(X * F, 1);
    m->down_bias = normals(X * D, 1);
    m->x = normals(M_MOE * D, 1);
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
    float h[F];
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
    moe *m = make_moe(types);
    routing r;
    float *logits = normals(M_MOE * X, 2), *y = normals(M_MOE * D, 1), *before = copy_of(y, M_MOE * D),
        *single = copy_of(y, M_MOE * D);
    for (int i = 0; i < M_MOE; i++) logits[i * X + 1] -= 20;        /* an expert without rows */
    route_rows(b, &r, logits, M_MOE, X, BM_ROUTE_SIGMOID);
    run_moe(b, m, 0, M_MOE, dense ? NULL : &r, variant, arith, y);
    /* native: a hidden value that falls on the other side of a rounding step moves by that step */
    const double bound = arith == BM_ARITH_F32 ? 5e-6 : 2e-2;
    for (int i = 0; i < M_MOE; i++) {
        double e[D];
        moe_reference(m, i, dense ? 0 : r.expert[i], dense ? 1 : (double)r.gate[i], variant, arith, e);
        for (int d = 0; d < D; d++)
            check_near(y[i * D + d], e[d] + (variant & 4 ? before[i * D + d] : 0), bound * (1 + fabs(e[d])), b->name);
    }
    for (int i = 0; i < M_MOE; i++) {
        routing one;
        route_rows(b, &one, logits + i * X, 1, X, BM_ROUTE_SIGMOID);
        run_moe(b, m, i, 1, dense ? NULL : &one, variant, arith, single + i * D);
    }
    check_equal(y, single, M_MOE * D, "experts, grouped and single");
    check_guards(y, M_MOE * D);
    drop(logits); drop(y); drop(before); drop(single);
    drop_moe(m);
}
static void test_experts(void **state) {
    (void)state;
    static const int mixed[3] = { BM_BF16, BM_Q8_0, BM_Q4_0 };
    for (int level = 0; level < LEVELS; level++)
        for (int threads = 1; threads <= 3; threads++) {
            bm_backend *b = open_level(level, threads);
            for (int variant = 0; b && variant < 16; variant++)
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
    enum { M = 9, N = 33, K = 320 };
    for (int arith = 0; arith < 2; arith++)
        for (int type = 0; type < BM_DTYPE_COUNT; type++) {
            matrix w = make_matrix(type, N, K);
            float *x = normals(M * K, 1), *y[LEVELS] = { NULL };
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
        cmocka_unit_test(test_levels_agree), cmocka_unit_test(test_activations), cmocka_unit_test(test_exp_softplus),
        cmocka_unit_test(test_norm), cmocka_unit_test(test_loss), cmocka_unit_test(test_embed),
        cmocka_unit_test(test_conv), cmocka_unit_test(test_scan), cmocka_unit_test(test_scan_in_place),
        cmocka_unit_test(test_route), cmocka_unit_test(test_experts),
        cmocka_unit_test(test_memory), cmocka_unit_test(test_reserve), cmocka_unit_test(test_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
