/* test_back.c - backward of norm, embedding, loss, convolution and scan, and the optimizer: every instruction set of
 * this machine against references in f64, which central differences have judged; and the laws: parameters'
 * gradients are added and activations' written, bits do not depend on threads. */
#include "lib_kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int widths[] = { 1, 7, 16, 33, 64, 100, 147 };
enum { WIDTHS = sizeof widths / sizeof *widths };

/* ---- what every operation is asked ---------------------------------------------------- */

enum { MOST = 12 };
/* Gradients of one backward, beside what they should be; an activation's rows of `cols` lie `ld` apart. */
typedef struct grad { const char *name; bool added; int rows, cols, ld; float *is; double *want; } grad;
typedef struct grads { int n; grad g[MOST]; } grads;

static size_t size_of(const grad *g) { return (size_t)g->rows * (size_t)g->ld; }
static float *add_grad(grads *s, const char *name, bool added, int rows, int cols, int ld) {
    grad *g = &s->g[s->n++];
    assert_true(s->n <= MOST);
    *g = (grad){ name, added, rows, cols, ld, NULL, NULL };
    g->is = floats(size_of(g) + 1);
    g->want = calloc(size_of(g) + 1, sizeof *g->want);
    assert_non_null(g->want);
    return g->is;
}
static double *wanted(grads *s, const char *name) {
    for (int i = 0; i < s->n; i++)
        if (!strcmp(s->g[i].name, name)) return s->g[i].want;
    fail_msg("no gradient %s", name);
    return NULL;
}
/* Before a backward: parameters at `start`, activations NaN, what lies between their rows 7. */
static void prepare(grads *s, float start) {
    for (int i = 0; i < s->n; i++)
        for (size_t k = 0; k < size_of(&s->g[i]); k++)
            s->g[i].is[k] = k % (size_t)s->g[i].ld >= (size_t)s->g[i].cols ? 7 : s->g[i].added ? start : NAN;
}
/* Within tol of the largest entry. */
static void check_grads(const grads *s, float start, double tol, const char *level) {
    for (int i = 0; i < s->n; i++) {
        const grad *g = &s->g[i];
        double most = 1e-30;
        for (size_t k = 0; k < size_of(g); k++) most = fmax(most, fabs(g->want[k]));
        for (size_t k = 0; k < size_of(g); k++) {
            if (k % (size_t)g->ld >= (size_t)g->cols) {
                if (g->is[k] != 7) fail_msg("%s: %s: element %zu between the rows was written", level, g->name, k);
                continue;
            }
            const double want = g->want[k] + (g->added ? (double)start : 0);
            if (!(fabs((double)g->is[k] - want) <= tol * most + 1e-6 * fabs((double)start)))
                fail_msg("%s: %s: element %zu of %zu is %.9g, expected %.9g, largest %.3g", level, g->name, k,
                         size_of(g), (double)g->is[k], want, most);
        }
        check_guards(g->is, size_of(g) + 1);
    }
}
typedef void (*back_fn)(bm_backend *b, void *op);
static void laws(int level, back_fn back, void *op, grads *s, double tol, bool doubles) {
    float *once[MOST];
    for (int threads = 1; threads <= 3; threads += 2) {
        bm_backend *b = open_level(level, threads);
        prepare(s, 0);
        back(b, op);
        check_grads(s, 0, tol, b->name);
        for (int i = 0; i < s->n; i++) {
            if (threads == 1) once[i] = copy_of(s->g[i].is, size_of(&s->g[i]));
            else check_equal(s->g[i].is, once[i], size_of(&s->g[i]), "threads");
        }
        back(b, op);
        for (int i = 0; i < s->n; i++)
            for (size_t k = 0; k < size_of(&s->g[i]); k++) {
                const float one = once[i][k], two = s->g[i].is[k];
                if (s->g[i].added && doubles ? two != 2 * one : !s->g[i].added && memcmp(&one, &two, sizeof one))
                    fail_msg("%s: %s: twice gives %.9g after %.9g", b->name, s->g[i].name, (double)two, (double)one);
            }
        prepare(s, 3);
        back(b, op);
        check_grads(s, 3, tol, b->name);
        done(b);
    }
    for (int i = 0; i < s->n; i++) drop(once[i]);
}
static void drop_grads(grads *s) {
    for (int i = 0; i < s->n; i++) drop(s->g[i].is), free(s->g[i].want);
    s->n = 0;
}
static double silu_back(double v) { const double s = 1 / (1 + exp(-v)); return s * (1 + v * (1 - s)); }

/* ---- norm and embedding --------------------------------------------------------------- */

static void norm_reference(const bm_op_norm *a, double *ds, double *dw, double *db) {
    for (int i = 0; i < a->M; i++) {
        const float *s = a->sum + (size_t)i * (size_t)a->D, *dy = a->dy + (size_t)i * (size_t)a->D;
        double mean = 0, var = 0, g = 0, gv = 0;
        for (int k = 0; a->centered && k < a->D; k++) mean += s[k] / (double)a->D;
        for (int k = 0; k < a->D; k++) var += (s[k] - mean) * (s[k] - mean) / a->D;
        const double r = 1 / sqrt(var + (double)a->eps);
        for (int k = 0; k < a->D; k++) {
            g += (double)dy[k] * a->weight[k] / a->D;
            gv += (double)dy[k] * a->weight[k] * (s[k] - mean) * r / a->D;
            dw[k] += dy[k] * (s[k] - mean) * r;
            if (db) db[k] += dy[k];
        }
        for (int k = 0; k < a->D; k++)
            ds[(size_t)i * (size_t)a->D + (size_t)k] = r * ((double)dy[k] * a->weight[k] - (a->centered ? g : 0)
                                                            - (s[k] - mean) * r * gv);
    }
}
static void norm_run(bm_backend *b, void *op) { b->norm_back(b, op); }
static void norm_case(int level, int M, int D, bool centered) {
    const size_t n = (size_t)M * (size_t)D;
    grads s = { 0 };
    float *sum = normals(n, 2), *w = normals((size_t)D, 1), *dy = normals(n, 1);
    for (size_t i = 0; i < n; i++) sum[i] += 0.5f;
    bm_op_norm op = { .M = M, .D = D, .eps = D == 1 ? 0.1f : 1e-5f, .centered = centered, .weight = w, .sum = sum,
                      .dy = dy };
    op.dsum = add_grad(&s, "dsum", true, M, D, D);
    op.dweight = add_grad(&s, "dweight", true, 1, D, D);
    if (centered) op.dbias = add_grad(&s, "dbias", true, 1, D, D);
    norm_reference(&op, wanted(&s, "dsum"), wanted(&s, "dweight"), centered ? wanted(&s, "dbias") : NULL);
    laws(level, norm_run, &op, &s, centered && D == 1 ? 1e-4 : 5e-6, true);
    drop_grads(&s);
    drop(sum); drop(w); drop(dy);
}
/* The reference itself: d (p . norm(s)) / d s by central differences. */
static double norm_forward(const double *s, const double *w, const double *p, int D, bool centered) {
    double mean = 0, var = 0, out = 0;
    for (int k = 0; centered && k < D; k++) mean += s[k] / D;
    for (int k = 0; k < D; k++) var += (s[k] - mean) * (s[k] - mean) / D;
    for (int k = 0; k < D; k++) out += p[k] * (s[k] - mean) / sqrt(var + 1e-5) * w[k];
    return out;
}
static void norm_differences(bool centered) {
    enum { D = 9 };
    float *f = normals(3 * D, 1);
    double s[D], w[D], p[D], ds[D] = { 0 }, dw[D] = { 0 };
    for (int k = 0; k < D; k++) s[k] = f[k], w[k] = f[D + k], p[k] = f[2 * D + k];
    norm_reference(&(bm_op_norm){ .M = 1, .D = D, .eps = 1e-5f, .centered = centered, .sum = f, .weight = f + D,
                                  .dy = f + 2 * D },
                   ds, dw, NULL);
    for (int k = 0; k < D; k++) {
        double *of[2] = { s, w }, *is[2] = { ds, dw };
        for (int i = 0; i < 2; i++) {
            const double keep = of[i][k];
            of[i][k] = keep + 1e-6;
            const double up = norm_forward(s, w, p, D, centered);
            of[i][k] = keep - 1e-6;
            check_near(is[i][k], (up - norm_forward(s, w, p, D, centered)) / 2e-6, 1e-7, "norm's reference");
            of[i][k] = keep;
        }
    }
    drop(f);
}
static void test_norm(void **state) {
    (void)state;
    norm_differences(false);
    norm_differences(true);
    for (int level = 0; level < LEVELS; level++)
        for (int i = 0; has_level(level, NULL) && i < WIDTHS; i++)
            for (int c = 0; c < 2; c++) {
                norm_case(level, 5, widths[i], c);
                if (i % 3 == 0) norm_case(level, 300, widths[i], c);
            }
}

static void embed_run(bm_backend *b, void *op) { b->embed_back(b, op); }
static void test_embed(void **state) {
    (void)state;
    enum { M = 40, V = 11 };
    for (int level = 0; level < LEVELS; level++)
        for (int i = 0; has_level(level, NULL) && i < WIDTHS; i++) {
            const int D = widths[i];
            grads s = { 0 };
            bm_token token[M];
            float *dy = normals((size_t)(M * D), 1);
            const bm_tensor table = { NULL, BM_F32, V, D };
            bm_op_embed op = { .M = M, .table = &table, .token = token, .dy = dy };
            op.dtable = add_grad(&s, "dtable", true, V, D, D);
            double *want = wanted(&s, "dtable");
            for (int m = 0; m < M; m++) {
                token[m] = m * m % V;
                for (int k = 0; k < D; k++) want[token[m] * D + k] += (double)dy[m * D + k];
            }
            laws(level, embed_run, &op, &s, 2e-6, false);
            drop_grads(&s);
            drop(dy);
        }
}

/* ---- loss ----------------------------------------------------------------------------- */

static void loss_case(bm_backend *b, int V, bool in_place) {
    enum { M = 7 };
    const size_t n = (size_t)M * (size_t)V;
    const float scale = 0.37f;
    float *l = normals(n, 6), *keep = copy_of(l, n), *d = in_place ? l : floats(n);
    float *loss = floats(M), *bare = floats(M);
    bm_token target[M] = { 0, V / 2, V - 1, -1, V / 3, -1, 0 };
    l[6 * V] = keep[6 * V] = 200;           /* a row that is sure */
    b->loss(b, &(bm_op_loss){ .M = M, .V = V, .logits = keep, .target = target, .loss = bare });
    b->loss(b, &(bm_op_loss){ .M = M, .V = V, .logits = l, .target = target, .loss = loss, .dlogits = d,
                              .scale = scale });
    check_equal(loss, bare, M, "loss with and without gradient");
    for (int i = 0; i < M; i++) {
        double top = -1e30, sum = 0;
        for (int k = 0; k < V; k++) top = fmax(top, (double)keep[i * V + k]);
        for (int k = 0; k < V; k++) sum += exp((double)keep[i * V + k] - top);
        const double want = target[i] < 0 ? 0 : log(sum) + top - (double)keep[i * V + target[i]];
        check_near((double)loss[i], want, target[i] < 0 ? 0 : 1e-6 * (1 + want), b->name);
        for (int k = 0; k < V; k++) {
            const double p = exp((double)keep[i * V + k] - top) / sum;
            check_near((double)d[i * V + k], target[i] < 0 ? 0 : (double)scale * (p - (k == target[i])),
                       2e-7 * (double)scale, b->name);
            if (target[i] < 0) assert_true(d[i * V + k] == 0);
        }
    }
    check_guards(d, n);
    check_guards(loss, M);
    if (!in_place) drop(d);
    drop(l); drop(keep); drop(loss); drop(bare);
}
static void test_loss(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 2);
        for (int i = 0; b && i < WIDTHS; i++) {
            loss_case(b, widths[i], false);
            loss_case(b, widths[i], true);
        }
        if (b) loss_case(b, 5003, true);
        if (b) done(b);
    }
}

/* ---- sequences ------------------------------------------------------------------------ */

/* Six sequences, two of which carry a state and one of which is empty. */
enum { Q = 6, M = 269, SLOTS = 3 };
static const int32_t start[Q + 1] = { 0, 70, 71, 71, 200, 264, M }, slot[Q] = { -1, 2, -1, 0, 1, -1 };

static double conv_at(const bm_op_conv *a, int q, int t, int c) {
    if (t >= 0) return (double)a->x[(size_t)(a->start[q] + t) * (size_t)a->ldx + (size_t)c];
    return a->slot[q] < 0 ? 0 : (double)a->state[(size_t)a->slot[q] * a->stride + (size_t)((a->K - 1 + t) * a->I + c)];
}
static double conv_sum(const bm_op_conv *a, int q, int t, int c) {
    double v = a->bias ? (double)a->bias[c] : 0;
    for (int k = 0; k < a->K; k++) v += (double)a->weight[k * a->I + c] * conv_at(a, q, t - a->K + 1 + k, c);
    return v;
}
static void conv_reference(const bm_op_conv *a, double *dx, double *dw, double *db) {
    for (int q = 0; q < a->Q; q++)
        for (int t = 0; t < a->start[q + 1] - a->start[q]; t++)
            for (int c = 0; c < a->I; c++) {
                const size_t row = (size_t)(a->start[q] + t);
                const double d = (double)a->dy[row * (size_t)a->I + (size_t)c] * silu_back(conv_sum(a, q, t, c));
                if (db) db[c] += d;
                for (int k = 0; k < a->K; k++) {
                    const int from = t - a->K + 1 + k;
                    dw[k * a->I + c] += d * conv_at(a, q, from, c);
                    const size_t to = (size_t)(a->start[q] + from) * (size_t)a->ldx + (size_t)c;
                    if (from >= 0) dx[to] += d * (double)a->weight[k * a->I + c];
                }
            }
}
static void conv_run(bm_backend *b, void *op) { b->conv_back(b, op); }
static void conv_case(int level, int I, int K, bool bias) {
    const int ld = I + 5;
    const size_t states = (size_t)SLOTS * (size_t)K * (size_t)I;
    grads s = { 0 };
    float *x = normals((size_t)M * (size_t)ld, 1), *w = normals((size_t)(K * I), 1), *b = normals((size_t)I, 1),
          *dy = normals((size_t)(M * I), 1), *state = normals(states, 1), *y = floats((size_t)(M * I));
    bm_op_conv op = { .Q = Q, .start = start, .slot = slot, .I = I, .K = K, .ldx = ld, .x = x, .weight = w,
                      .bias = bias ? b : NULL,
                      .y = y, .state = copy_of(state, states), .stride = (size_t)(K * I), .dy = dy };
    bm_backend *be = open_level(level, 2);
    be->conv(be, &op);                      /* slot -1 starts from zeros */
    done(be);
    drop(op.state);
    op.state = state;
    for (int q = 0; q < Q; q++)
        for (int t = 0; t < start[q + 1] - start[q]; t++)
            for (int c = 0; c < I; c++) {
                const double v = silu(conv_sum(&op, q, t, c));
                check_near((double)y[(start[q] + t) * I + c], v, 1e-5 * (1 + fabs(v)), "conv of packed texts");
            }
    op.dx = add_grad(&s, "dx", false, M, I, ld);
    op.dweight = add_grad(&s, "dweight", true, K, I, I);
    if (bias) op.dbias = add_grad(&s, "dbias", true, 1, I, I);
    conv_reference(&op, wanted(&s, "dx"), wanted(&s, "dweight"), bias ? wanted(&s, "dbias") : NULL);
    laws(level, conv_run, &op, &s, 5e-6, true);
    check_guards(state, states);
    drop_grads(&s);
    drop(x); drop(w); drop(b); drop(dy); drop(state); drop(y);
}
static void test_conv(void **state) {
    (void)state;
    static const int taps[] = { 1, 2, 4, 5, 64 };
    for (int level = 0; level < LEVELS; level++)
        for (int i = 0; has_level(level, NULL) && i < WIDTHS; i++)
            for (int k = 0; k < 5; k++)
                if (k < 3 || i % 3 == 1) conv_case(level, widths[i], taps[k], k % 2 == 0);
}

/* ---- scan ----------------------------------------------------------------------------- */

/* Inputs of a scan, in f64 with rows side by side; h (M,N) after each row of one channel. */
typedef struct scan_in { const bm_op_scan *a; int q, c; double h[M * 80]; } scan_in;

static double scan_start(const bm_op_scan *a, int q, int n, int c) {
    return a->slot[q] < 0 ? 0 : (double)a->state[(size_t)a->slot[q] * a->stride + (size_t)(n * a->I + c)];
}
static double scan_raw(const bm_op_scan *a, size_t m, int c) {
    return (double)a->dt[m * (size_t)a->I + (size_t)c] + (double)a->dt_bias[c];
}
/* States and outputs before the gate of one channel of one sequence. */
static void scan_forward(scan_in *s, double *pre) {
    const bm_op_scan *a = s->a;
    for (int t = 0; t < a->start[s->q + 1] - a->start[s->q]; t++) {
        const size_t m = (size_t)(a->start[s->q] + t);
        const double d = softplus(scan_raw(a, m, s->c)), u = (double)a->u[m * (size_t)a->I + (size_t)s->c];
        pre[t] = (double)a->D[s->c] * u;
        for (int n = 0; n < a->N; n++) {
            const double before = t ? s->h[(t - 1) * a->N + n] : scan_start(a, s->q, n, s->c);
            s->h[t * a->N + n] = exp(d * (double)a->A[n * a->I + s->c]) * before
                + d * u * (double)a->B[m * (size_t)a->ldbc + (size_t)n];
            pre[t] += s->h[t * a->N + n] * (double)a->C[m * (size_t)a->ldbc + (size_t)n];
        }
    }
}
typedef struct scan_want { double *du, *ddt, *dz, *dB, *dC, *bias, *A, *D; } scan_want;
static void scan_reference_channel(scan_in *s, const scan_want *w) {
    const bm_op_scan *a = s->a;
    const size_t I = (size_t)a->I, c = (size_t)s->c;
    double pre[M], dh[80] = { 0 };
    scan_forward(s, pre);
    for (int t = a->start[s->q + 1] - a->start[s->q] - 1; t >= 0; t--) {
        const size_t m = (size_t)(a->start[s->q] + t), bc = m * (size_t)a->ldbc;
        const double raw = scan_raw(a, m, s->c), d = softplus(raw), u = (double)a->u[m * I + c];
        const double z = (double)a->z[m * (size_t)a->ldz + c];
        const double dy = (double)a->dy[m * I + c], dp = dy * silu(z);
        double du = dp * (double)a->D[c], dd = 0;
        w->dz[m * (size_t)a->ldz + c] = dy * pre[t] * silu_back(z);
        w->D[c] += dp * u;
        for (int n = 0; n < a->N; n++) {
            const double A = (double)a->A[(size_t)n * I + c], e = exp(d * A), B = (double)a->B[bc + (size_t)n];
            const double before = t ? s->h[(t - 1) * a->N + n] : scan_start(a, s->q, n, s->c);
            w->dC[bc + (size_t)n] += dp * s->h[t * a->N + n];
            dh[n] += dp * (double)a->C[bc + (size_t)n];
            dd += dh[n] * before * e * A + dh[n] * u * B;
            du += dh[n] * d * B;
            w->dB[bc + (size_t)n] += dh[n] * d * u;
            w->A[(size_t)n * I + c] += dh[n] * before * e * d * A;
            dh[n] *= e;
        }
        w->du[m * I + c] = du;
        w->ddt[m * I + c] = dd * (raw > 20 ? 1 : 1 / (1 + exp(-raw)));
        w->bias[c] += w->ddt[m * I + c];
    }
}

typedef struct scan_case { bm_op_scan op; float *x[10]; size_t states; } scan_case;
static scan_case make_scan(int I, int N) {
    const int ldz = I + 3, ldbc = 2 * N + 5;
    const size_t MI = (size_t)(M * I), IN = (size_t)(I * N);
    scan_case s = { .states = SLOTS * IN };
    float *x[] = { normals(MI, 1), normals(MI, 2), normals((size_t)I, 1), normals(IN, 1),
                   normals((size_t)(M * ldbc), 1), normals((size_t)I, 1), normals((size_t)(M * ldz), 1),
                   normals(MI, 1), normals(s.states, 1), floats(MI) };
    memcpy(s.x, x, sizeof x);
    for (int i = 0; i < I * N; i++) x[3][i] = -fabsf(x[3][i]) * (float)(1 + i / I);
    for (int i = 0; i < M * I; i += 97) x[1][i] = 25 + (float)(i % 10);         /* past the bend of softplus */
    s.op = (bm_op_scan){ .M = M, .Q = Q, .start = start, .slot = slot, .I = I, .N = N, .ldz = ldz, .ldbc = ldbc, .u = x[0],
                         .dt = x[1], .dt_bias = x[2], .A = x[3], .B = x[4], .C = x[4] + N, .D = x[5], .z = x[6],
                         .dy = x[7], .state = x[8],
                         .stride = IN, .y = x[9] };
    return s;
}
static void drop_scan(scan_case *s) {
    for (int i = 0; i < 10; i++) drop(s->x[i]);
}
static void scan_grads(grads *s, bm_op_scan *a, scan_want *w) {
    *s = (grads){ 0 };
    a->du = add_grad(s, "du", false, M, a->I, a->I);
    a->ddt = add_grad(s, "ddt", false, M, a->I, a->I);
    a->dz = add_grad(s, "dz", false, M, a->I, a->ldz);
    a->dB = add_grad(s, "dB", false, M, a->N, a->ldbc);
    a->dC = add_grad(s, "dC", false, M, a->N, a->ldbc);
    a->ddt_bias = add_grad(s, "ddt_bias", true, 1, a->I, a->I);
    a->dA_log = add_grad(s, "dA_log", true, a->N, a->I, a->I);
    a->dD = add_grad(s, "dD", true, 1, a->I, a->I);
    *w = (scan_want){ wanted(s, "du"), wanted(s, "ddt"), wanted(s, "dz"), wanted(s, "dB"), wanted(s, "dC"),
                      wanted(s, "ddt_bias"), wanted(s, "dA_log"), wanted(s, "dD") };
}
static void scan_reference(scan_in *in, const bm_op_scan *a, const scan_want *w) {
    in->a = a;
    for (in->q = 0; in->q < Q; in->q++)
        for (in->c = 0; in->c < a->I; in->c++) scan_reference_channel(in, w);
}
/* The forward in training: same bits as without kept states; slot -1 as a slot of zeros; what was kept. */
static void scan_kept(bm_backend *b, const bm_op_scan *op, scan_in *in, size_t states, size_t kept_floats) {
    const size_t n = (size_t)M * (size_t)op->I, IN = op->stride;
    float *state = copy_of(op->state, states), *bare = floats(n), *plain = floats(states + IN);
    static const int32_t zeros[Q] = { 3, 2, 3, 0, 1, 3 };
    bm_op_scan a = *op;
    a.state = state;
    b->scan(b, &a);
    memcpy(plain, op->state, states * sizeof *plain);
    a.state = plain;
    a.kept = NULL;
    a.y = bare;
    for (int q = 0; q < Q; q++) {
        a.Q = 1;
        a.start = start + q;
        a.slot = zeros + q;
        memset(plain + states, 0, IN * sizeof *plain);
        b->scan(b, &a);
    }
    check_equal(op->y, bare, n, "training's forward");
    check_equal(state, plain, states, "states after training's forward");
    for (in->q = 0; in->q < Q; in->q++)
        for (in->c = 0; in->c < op->I; in->c++) {
            double pre[M];
            scan_forward(in, pre);
            for (int t = 0; t < start[in->q + 1] - start[in->q]; t += BM_SCAN_CHUNK)
                for (int k = 0; k < op->N; k++) {
                    const double h = t ? in->h[(t - 1) * op->N + k] : scan_start(op, in->q, k, in->c);
                    const size_t at = (size_t)(start[in->q] / BM_SCAN_CHUNK + in->q + t / BM_SCAN_CHUNK) * IN;
                    check_near((double)op->kept[at + (size_t)(k * op->I + in->c)], h, 1e-5 * (1 + fabs(h)),
                               "kept state");
                }
        }
    check_guards(op->kept, kept_floats);
    drop(state); drop(bare); drop(plain);
}
static void scan_run(bm_backend *b, void *op) {
    bm_op_scan a = *(bm_op_scan *)op;
    const size_t n = b->scan_back_floats(b, M, a.I, a.N);
    a.work = floats(n);
    for (size_t i = 0; i < n; i++) a.work[i] = NAN;         /* nothing in it may be relied on */
    b->scan_back(b, &a);
    check_guards(a.work, n);
    drop(a.work);
}
static void scan_case_run(int level, int I, int N) {
    const size_t kept_floats = (size_t)(M / BM_SCAN_CHUNK + Q) * (size_t)I * (size_t)N;
    scan_case s = make_scan(I, N);
    scan_in *in = calloc(1, sizeof *in);
    grads g;
    scan_want w;
    assert_non_null(in);
    scan_grads(&g, &s.op, &w);
    scan_reference(in, &s.op, &w);
    s.op.kept = floats(kept_floats);
    bm_backend *b = open_level(level, 2);
    scan_kept(b, &s.op, in, s.states, kept_floats);
    done(b);
    laws(level, scan_run, &s.op, &g, 2e-5, true);
    check_guards(s.op.kept, kept_floats);
    drop(s.op.kept);
    drop_grads(&g);
    drop_scan(&s);
    free(in);
}
/* The reference itself against central differences of its forward. */
static double scan_value(scan_in *in, const bm_op_scan *a) {
    double sum = 0;
    in->a = a;
    for (in->q = 0; in->q < Q; in->q++)
        for (in->c = 0; in->c < a->I; in->c++) {
            double pre[M];
            scan_forward(in, pre);
            for (int t = 0; t < start[in->q + 1] - start[in->q]; t++) {
                const size_t m = (size_t)(start[in->q] + t);
                const double z = (double)a->z[m * (size_t)a->ldz + (size_t)in->c];
                sum += (double)a->dy[m * (size_t)a->I + (size_t)in->c] * pre[t] * silu(z);
            }
        }
    return sum;
}
static void scan_differences(void) {
    scan_case s = make_scan(2, 3);
    scan_in *in = calloc(1, sizeof *in);
    grads g;
    scan_want w;
    assert_non_null(in);
    scan_grads(&g, &s.op, &w);
    scan_reference(in, &s.op, &w);
    struct { float *x; const double *d; int n; bool log; } of[] = {
        { s.x[0], w.du, M * 2, false }, { s.x[1], w.ddt, M * 2, false }, { s.x[2], w.bias, 2, false },
        { s.x[3], w.A, 6, true },
        { s.x[4], w.dB, 40, false }, { s.x[5], w.D, 2, false }, { s.x[6], w.dz, 40, false } };
    for (size_t k = 0; k < sizeof of / sizeof *of; k++)
        for (int i = 0; i < of[k].n; i += 1 + (of[k].n > 100 ? 23 : 0)) {
            const float keep = of[k].x[i], step = 1.0f / 512;
            if (of[k].x == s.x[4] && i % s.op.ldbc >= 3) continue;      /* C, gaps */
            if (of[k].x == s.x[6] && i % s.op.ldz >= 2) continue;
            of[k].x[i] = keep + step;
            const double up = scan_value(in, &s.op), high = (double)of[k].x[i];
            of[k].x[i] = keep - step;
            const double slope = (up - scan_value(in, &s.op)) / (high - (double)of[k].x[i]);
            of[k].x[i] = keep;
            check_near(of[k].d[i], slope * (of[k].log ? (double)keep : 1), 2e-3 * (1 + fabs(slope)),
                       "scan's reference");
        }
    drop_grads(&g);
    drop_scan(&s);
    free(in);
}
static void test_scan(void **state) {
    (void)state;
    static const int states[] = { 1, 3, 8, 16, 65 };        /* 65: more than a block of the forward holds */
    scan_differences();
    for (int level = 0; level < LEVELS; level++)
        for (int i = 0; has_level(level, NULL) && i < WIDTHS; i++)
            for (int n = 0; n < 5; n++)
                if (i % 2 == n % 2 || states[n] == 16) scan_case_run(level, widths[i], states[n]);
}
/* More sequences than groups of them, most of one row. */
static void test_scan_many(void **state) {
    (void)state;
    enum { MANY = 100, I = 70, N = 4 };
    int32_t begin[MANY + 1] = { 0 }, none[MANY];
    for (int q = 0; q < MANY; q++) begin[q + 1] = begin[q] + (q % 9 == 4 ? 13 : 1), none[q] = -1;
    const int rows = begin[MANY];
    assert_true(rows <= M);
    for (int level = 0; level < LEVELS; level++) {
        if (!has_level(level, NULL)) continue;
        scan_case s = make_scan(I, N);
        grads together, apart;
        scan_want w;
        bm_op_scan a = s.op;
        bm_backend *b = open_level(level, 3);
        a.Q = MANY, a.start = begin, a.slot = none, a.state = NULL;
        a.kept = floats((size_t)(rows / BM_SCAN_CHUNK + MANY) * I * N);
        scan_grads(&together, &a, &w);
        prepare(&together, 0);
        b->scan(b, &a);
        scan_run(b, &a);
        bm_op_scan one = a;
        scan_grads(&apart, &one, &w);
        prepare(&apart, 0);
        one.Q = 1;
        for (int q = 0; q < MANY; q++) {        /* one sequence at a time, from its own row on */
            const int32_t own[2] = { 0, begin[q + 1] - begin[q] };
            const size_t at = (size_t)begin[q];
            bm_op_scan p = one;
            p.start = own;
            p.u += at * I, p.dt += at * I, p.y += at * I, p.dy += at * I, p.du += at * I, p.ddt += at * I;
            p.z += at * (size_t)p.ldz, p.dz += at * (size_t)p.ldz;
            p.B += at * (size_t)p.ldbc, p.C += at * (size_t)p.ldbc, p.dB += at * (size_t)p.ldbc,
                p.dC += at * (size_t)p.ldbc;
            b->scan(b, &p);
            scan_run(b, &p);
        }
        for (int i = 0; i < together.n; i++) {
            const grad *t = &together.g[i], *o = &apart.g[i];
            const size_t n = t->added ? size_of(t) : (size_t)rows * (size_t)t->ld;
            for (size_t k = 0; t->added && k < n; k++)
                check_near((double)t->is[k], (double)o->is[k], 1e-5 * (10 + fabs((double)o->is[k])), t->name);
            if (!t->added) check_equal(t->is, o->is, n, t->name);
        }
        drop(a.kept);
        drop_grads(&together);
        drop_grads(&apart);
        drop_scan(&s);
        done(b);
    }
}

/* ---- optimizer ------------------------------------------------------------------------ */

static void adamw_case(bm_backend *b, size_t n) {
    float *w = normals(n, 1), *m = normals(n, 1), *v = normals(n, 1), *g = normals(n, 3);
    for (size_t i = 0; i < n; i++) v[i] = v[i] * v[i];
    for (int64_t step = 1; step < 2000; step = step * 7 + 2) {
        float *was[3] = { copy_of(w, n), copy_of(m, n), copy_of(v, n) };
        const bm_op_adamw op = { .n = n, .w = w, .m = m, .v = v, .g = g, .lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f,
                                 .eps = 1e-8f, .decay = 0.1f, .scale = 0.25f, .step = step };
        b->adamw(b, &op);
        for (size_t i = 0; i < n; i++) {
            const double b1 = (double)op.beta1, b2 = (double)op.beta2, d = (double)g[i] * 0.25;
            const double mi = b1 * (double)was[1][i] + (1 - b1) * d, vi = b2 * (double)was[2][i] + (1 - b2) * d * d;
            const double up = mi / (1 - pow(b1, (double)step)) / (sqrt(vi / (1 - pow(b2, (double)step))) + 1e-8);
            const double wi = (double)was[0][i] - (double)op.lr * (up + (double)op.decay * (double)was[0][i]);
            check_near((double)m[i], mi, 3e-7 * (fabs(mi) + fabs(d)), "m");
            check_near((double)v[i], vi, 3e-7 * vi, "v");
            check_near((double)w[i], wi, 3e-7 * (1 + fabs(wi) + fabs(up)), "w");
        }
        for (int i = 0; i < 3; i++) drop(was[i]);
    }
    check_guards(w, n); check_guards(m, n); check_guards(v, n);
    drop(w); drop(m); drop(v); drop(g);
}
static void elements_case(bm_backend *b, size_t n) {
    float *x = normals(n, 2), *y = normals(n, 2), *was = copy_of(y, n), *A = floats(n);
    uint16_t *h = calloc(n + 1, sizeof *h), *want = calloc(n + 1, sizeof *want);
    assert_non_null(h);
    assert_non_null(want);
    b->blend(b, y, 0.75f, x, -0.5f, n);
    b->decay(b, A, x, n);
    for (size_t i = 0; i < n; i++) {
        check_near((double)y[i], 0.75 * (double)was[i] - 0.5 * (double)x[i], 1e-6 * (1 + fabs((double)x[i])
            + fabs((double)was[i])), "blend");
        check_near((double)A[i], -exp((double)x[i]), 2e-7 * exp((double)x[i]), "decay");
    }
    check_guards(y, n);
    check_guards(A, n);
    if (n > 4) x[0] = NAN, x[1] = INFINITY, x[2] = 1e-40f, x[3] = 3.4e38f;
    h[n] = 77;
    b->narrow(b, h, BM_BF16, x, n);
    bm_narrow(want, BM_BF16, x, n);
    assert_memory_equal(h, want, n * sizeof *h);
    assert_int_equal(h[n], 77);
    drop(x); drop(y); drop(was); drop(A);
    free(h);
    free(want);
}
static void test_elements(void **state) {
    (void)state;
    static const size_t sizes[] = { 1, 5, 16, 31, 100, 4097, 9001 };
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_level(level, 3);
        for (int i = 0; b && i < 7; i++) {
            adamw_case(b, sizes[i]);
            elements_case(b, sizes[i]);
        }
        if (b) done(b);
    }
}
static void test_sumsq(void **state) {
    (void)state;
    enum { N = 300007 };
    float *x = normals(N, 1);
    x[5] = 1e25f;                           /* its square is past f32 */
    for (int level = 0; level < LEVELS; level++) {
        double first = 0;
        for (int threads = 1; threads <= 3 && has_level(level, NULL); threads++) {
            bm_backend *b = open_level(level, threads);
            for (size_t n = 0; n < N - 6; n = n * 3 + 1) {
                double is = -1, want = 0;
                for (size_t i = 0; i < n; i++) want += (double)x[6 + i] * (double)x[6 + i];
                b->sumsq(b, &is, x + 6, n);
                check_near(is, want, 1e-12 * want, "sumsq");
            }
            double all;
            b->sumsq(b, &all, x, N);
            assert_true(all > 0.999e50 && all < 1.001e50 && (threads == 1 || all == first));
            first = all;
            done(b);
        }
    }
    drop(x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm), cmocka_unit_test(test_embed), cmocka_unit_test(test_loss),
        cmocka_unit_test(test_conv), cmocka_unit_test(test_scan), cmocka_unit_test(test_scan_many),
        cmocka_unit_test(test_elements), cmocka_unit_test(test_sumsq),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
