/* test_operations.c - what the CPU backend does beside products: elementary functions, norm, loss,
 * convolution, scan, routing; every instruction set of this machine against a reference in f64, and the law,
 * bit for bit: a result does not depend on chunks, slots or threads. */
#include "lib_kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int widths[] = { 1, 7, 20, 31, 32, 33, 64, 72, 96, 100, 300, 320 };
enum { WIDTHS = sizeof widths / sizeof *widths };

/* ---- elementary functions ------------------------------------------------------------- */

static void test_activations(void **state) {
    (void)state;
    enum { N = 40001 };
    float *x = floats(N), *y = floats(N), *up = normals(N, 1), one;
    for (int i = 0; i < N; i++) x[i] = (float)(i - N / 2) * (i % 2 ? 0.005f : 0.0005f);
    for (int level = 0; level < LEVELS; level++) {
        bm_kernels k;
        if (!has_level(level, &k)) continue;
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
    b->scan(b, &(bm_op_scan){ .M = 1, .Q = 1, .start = start, .slot = slot, .I = I, .N = 1, .ldz = I, .ldbc = 1, .u = u,
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
        b->scan(b, &(bm_op_scan){ .M = start[Q], .Q = Q, .start = start, .slot = slot, .I = s->I, .N = s->N, .ldz = 2 * s->I,
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

/* ---- route ---------------------------------------------------------------------------- */

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

/* The first of the largest among the columns that count; NaN is none, and nothing above -inf is -1. */
static void test_best(void **state) {
    (void)state;
    enum { M = 6, V = 5, LD = 6 };
    const float l[M][LD] = { { 1, 3, 2, 3, 0, 9 }, { NAN, -5, NAN, -6, NAN, 9 }, { NAN, NAN, NAN, NAN, NAN, 9 },
                             { -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, 9 }, { -0.0f, 0, -1, -0.0f, -2, 9 },
                             { 1, INFINITY, NAN, INFINITY, -INFINITY, 9 } };
    const bm_token want[M] = { 1, 1, -1, -1, 0, 1 };
    bm_token got[M] = { 0 }, again[M] = { 0 };
    bm_backend *b = open_level(0, 2);
    b->best(b, &(bm_op_best){ .M = M, .V = V, .ld = LD, .logits = l[0], .best = got, .again = again });
    assert_memory_equal(want, got, sizeof got);
    assert_memory_equal(want, again, sizeof again);
    done(b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_activations), cmocka_unit_test(test_exp_softplus),
        cmocka_unit_test(test_norm), cmocka_unit_test(test_loss),
        cmocka_unit_test(test_conv), cmocka_unit_test(test_scan), cmocka_unit_test(test_scan_in_place),
        cmocka_unit_test(test_route), cmocka_unit_test(test_best),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
