/* test_back_products.c - linear_back and experts_back of the CPU: every instruction set of this machine against
 * sums in f64, stage by stage, with a bound each; gradients of experts against central differences of an f64
 * forward; what is accumulated, what is written and what must stay untouched; the number of threads. */
#include "lib_kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4096 };

static bm_backend *open_back(int level, int threads) {
    bm_backend *b = open_level(level, threads);
    if (!b) return NULL;
    assert_int_equal(b->reserve(b, 512, MOST), BM_OK);
    assert_int_equal(b->reserve_back(b, 512, MOST, 1024), BM_OK);
    return b;
}
/* What a product in native arithmetic makes of an f32 operand beside such weights. */
static double operand(bm_dtype type, bm_arith arith, float x) {
    return arith == BM_ARITH_NATIVE && type == BM_BF16 ? bm_bf16_f32(bm_f32_bf16(x)) : x;
}
/* A sum of n products in f32 in any order, each product and each addition rounded once: n + 1 roundings of
 * at most 2^-24 of the sum of magnitudes, and one more for what it is added to. */
static void check_sum(double found, double expected, double size, int n, const char *what) {
    check_near(found, expected, (n + 2) * ldexp(size + fabs(expected), -24) + 1e-37, what);
}

/* ---- linear ------------------------------------------------------------------------------------------- */

/* variant bits: 1 add_dx, 2 no dx, 4 no dw, 8 dbias, 16 rows of x apart */
typedef struct linear_case { bm_dtype type; bm_arith arith; int M, rows, cols, variant; } linear_case;
typedef struct linear_data { matrix w; int ldx; float *x, *dy, *dx, *dw, *dbias, *dx0, *dw0, *dbias0; } linear_data;

static linear_data make_linear(const linear_case *k) {
    const size_t M = (size_t)k->M, rows = (size_t)k->rows, cols = (size_t)k->cols;
    linear_data d = { .w = make_matrix(k->type, k->rows, k->cols), .ldx = k->cols + (k->variant & 16 ? 5 : 0) };
    const size_t ldx = (size_t)d.ldx;
    d.x = normals(M * ldx, 1);
    d.dy = normals(M * rows, 1);
    d.dx = normals(M * ldx, 1);
    d.dw = normals(rows * cols, 1);
    d.dbias = normals(rows, 1);
    for (size_t i = 0; i < M; i++)
        for (size_t j = cols; j < ldx; j++) d.x[i * ldx + j] = NAN;      /* between rows: not to be read */
    d.dx0 = copy_of(d.dx, M * ldx);
    d.dw0 = copy_of(d.dw, rows * cols);
    d.dbias0 = copy_of(d.dbias, rows);
    return d;
}
static void drop_linear(linear_data *d) {
    drop(d->x); drop(d->dy); drop(d->dx); drop(d->dw); drop(d->dbias); drop(d->dx0); drop(d->dw0); drop(d->dbias0);
    drop_matrix(&d->w);
}
static void run_linear(bm_backend *b, const linear_case *k, const linear_data *d) {
    b->linear_back(b, &(bm_op_linear){
        .M = k->M, .ldx = d->ldx, .w = &d->w.t, .x = d->x, .arith = k->arith, .dy = d->dy, .add_dx = k->variant & 1,
        .dx = k->variant & 2 ? NULL : d->dx, .dw = k->variant & 4 ? NULL : d->dw,
        .dbias = k->variant & 8 ? d->dbias : NULL });
}
static void check_dx(bm_backend *b, const linear_case *k, const linear_data *d, int m) {
    for (int j = 0; j < d->ldx; j++) {
        const size_t at = (size_t)m * (size_t)d->ldx + (size_t)j;
        double s = 0, size = 0;
        if (j >= k->cols || k->variant & 2) {
            check_equal(d->dx + at, d->dx0 + at, 1, "dx that is not wanted");
            continue;
        }
        for (int o = 0; o < k->rows; o++) {
            const double p = operand(k->type, k->arith, d->dy[(size_t)m * (size_t)k->rows + (size_t)o])
                             * d->w.wide[(size_t)o * (size_t)k->cols + (size_t)j];
            s += p;
            size += fabs(p);
        }
        if (k->variant & 1) s += d->dx0[at];
        check_sum(d->dx[at], s, size, k->rows, b->name);
    }
}
static void check_dw(bm_backend *b, const linear_case *k, const linear_data *d, int o) {
    for (int j = 0; j < k->cols; j++) {
        const size_t at = (size_t)o * (size_t)k->cols + (size_t)j;
        double s = 0, size = 0;
        for (int m = 0; m < k->M && !(k->variant & 4); m++) {
            const double p = operand(k->type, k->arith, d->dy[(size_t)m * (size_t)k->rows + (size_t)o])
                             * operand(k->type, k->arith, d->x[(size_t)m * (size_t)d->ldx + (size_t)j]);
            s += p;
            size += fabs(p);
        }
        if (k->variant & 4) check_equal(d->dw + at, d->dw0 + at, 1, "dw that is not wanted");
        else check_sum(d->dw[at], s + d->dw0[at], size, k->M, b->name);
    }
    double s = 0, size = 0;
    for (int m = 0; m < k->M; m++) {
        s += d->dy[(size_t)m * (size_t)k->rows + (size_t)o];
        size += fabs(d->dy[(size_t)m * (size_t)k->rows + (size_t)o]);
    }
    if (k->variant & 8) check_sum(d->dbias[o], s + d->dbias0[o], size, k->M, "dbias");
    else check_equal(d->dbias + o, d->dbias0 + o, 1, "dbias that is not wanted");
}
static void run_linear_case(bm_backend *b, const linear_case *k) {
    linear_data d = make_linear(k);
    run_linear(b, k, &d);
    for (int m = 0; m < k->M; m++) check_dx(b, k, &d, m);
    for (int o = 0; o < k->rows; o++) check_dw(b, k, &d, o);
    check_guards(d.dx, (size_t)k->M * (size_t)d.ldx);
    check_guards(d.dw, (size_t)k->rows * (size_t)k->cols);
    check_guards(d.dbias, (size_t)k->rows);
    drop_linear(&d);
}
static const int shapes[][3] = {
    { 1, 1, 1 }, { 1, 9, 40 }, { 3, 5, 7 }, { 14, 32, 32 }, { 15, 33, 31 }, { 29, 64, 40 }, { 43, 20, 100 },
    { 7, 14, 64 }, { 410, 17, 35 }, { 13, 910, 33 }, { 160, 30, 66 },
};
enum { SHAPES = sizeof shapes / sizeof *shapes };
static const bm_dtype types[3] = { BM_F32, BM_BF16, BM_F16 };

static void test_linear_back(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_back(level, 2);
        for (int i = 0; b && i < SHAPES * 32; i += one_in(5)) {
            const int *s = shapes[i / 32];
            for (int t = 0; t < 6; t++)
                if ((i + t) % 3 == 0)
                    run_linear_case(b, &(linear_case){ types[t / 2], t % 2, s[0], s[1], s[2], i % 32 });
        }
        if (b) done(b);
    }
}
/* More of B than is packed at once. */
static void test_linear_back_large(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_back(level, 3);
        for (int t = 0; b && t < 2; t++)
            run_linear_case(b, &(linear_case){ types[t], BM_ARITH_NATIVE, 3, 4001, 301, 9 });
        if (b) done(b);
    }
}
static void test_linear_back_threads(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++)
        for (int i = 0; i < SHAPES; i++)
            for (int t = 0; t < 3; t++) {
                const linear_case k = { types[t], BM_ARITH_NATIVE, shapes[i][0], shapes[i][1], shapes[i][2], 8 };
                const size_t x = (size_t)(k.M * k.cols), w = (size_t)(k.rows * k.cols), rows = (size_t)k.rows;
                linear_data d = make_linear(&k);
                float *dx = NULL, *dw = NULL, *dbias = NULL;
                for (int threads = 1; threads <= 3; threads++) {
                    bm_backend *b = open_back(level, threads);
                    if (!b) break;
                    memcpy(d.dw, d.dw0, w * sizeof *d.dw);
                    memcpy(d.dbias, d.dbias0, rows * sizeof *d.dbias);
                    run_linear(b, &k, &d);
                    done(b);
                    if (threads == 1) {
                        dx = copy_of(d.dx, x);
                        dw = copy_of(d.dw, w);
                        dbias = copy_of(d.dbias, rows);
                    }
                    check_equal(d.dx, dx, x, "dx by threads");
                    check_equal(d.dw, dw, w, "dw by threads");
                    check_equal(d.dbias, dbias, rows, "dbias by threads");
                }
                if (dx) drop(dx), drop(dw), drop(dbias);
                drop_linear(&d);
            }
}
/* A second backward doubles what is accumulated: bit for bit while K is one block, and leaves dx as it was. */
static void test_linear_back_twice(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_back(level, 2);
        const linear_case k = { BM_BF16, BM_ARITH_NATIVE, 43, 20, 100, 8 };
        linear_data d = make_linear(&k);
        memset(d.dw, 0, sizeof *d.dw * 2000);
        memset(d.dbias, 0, sizeof *d.dbias * 20);
        if (b) {
            run_linear(b, &k, &d);
            float *dx = copy_of(d.dx, 4300), *dw = copy_of(d.dw, 2000), *dbias = copy_of(d.dbias, 20);
            for (int i = 0; i < 2000; i++) dw[i] *= 2;
            for (int i = 0; i < 20; i++) dbias[i] *= 2;
            run_linear(b, &k, &d);
            check_equal(d.dx, dx, 4300, "dx again");
            check_equal(d.dw, dw, 2000, "dw twice");
            check_equal(d.dbias, dbias, 20, "dbias twice");
            drop(dx); drop(dw); drop(dbias);
            done(b);
        }
        drop_linear(&d);
    }
}

/* ---- experts ------------------------------------------------------------------------------------------ */

enum { X = 4, M = 61, D = 44, F = 52 };
/* Bits of a variant; FROZEN: no gradient of gate's matrices is wanted, so gate and up are products of their own. */
enum { PLAIN = 1, BIASED = 2, ADD_DX = 4, SILU = 8, DENSE = 16, FROZEN = 32, VARIANTS = 64 };

typedef struct moe {
    int variant; bm_dtype type; bm_arith arith;
    matrix w[3][X];                     /* gate, up, down */
    bm_tensor t[3][X], dt[3][X];
    float *bias[3], *db[3], *dw[3], *dw0[3], *db0[3];       /* dw: X matrices one after another */
    float *x, *dy, *y, *dx, *dx0, *hidden, *act, *dhidden, *dact, *gate, *dgate;
    int32_t expert[M], order[M], first[X + 1];
    bm_op_route route;
    bm_op_experts op;
} moe;

static const int sizes[3][2] = { { F, D }, { F, D }, { D, F } };

/* Expert 1 has no rows, every eleventh row is dropped. */
static void route_by_hand(moe *m) {
    static const int32_t turn[4] = { 0, 3, 3, 2 };
    for (int i = 0, n = 0; i < M; i++) m->expert[i] = m->variant & DENSE ? 0 : i % 11 == 7 ? -1 : turn[n++ % 4];
    for (int e = 0, n = 0; e <= X; e++) {
        m->first[e] = n;
        for (int i = 0; i < M; i++)
            if (m->expert[i] == e) m->order[n++] = i;
    }
    m->route = (bm_op_route){ .M = M, .X = X, .k = 1, .expert = m->expert, .order = m->order, .first = m->first,
                              .gate = m->gate };
}
static moe *make_moe(int variant, bm_dtype type, bm_arith arith) {
    moe *m = calloc(1, sizeof *m);
    assert_non_null(m);
    *m = (moe){ .variant = variant, .type = type, .arith = arith };
    for (int i = 0; i < 3; i++) {
        const size_t size = (size_t)(sizes[i][0] * sizes[i][1]), rows = (size_t)sizes[i][0];
        m->bias[i] = normals(X * rows, 1);
        m->db[i] = normals(X * rows, 1);
        m->dw[i] = normals(X * size, 1);
        m->db0[i] = copy_of(m->db[i], X * rows);
        m->dw0[i] = copy_of(m->dw[i], X * size);
        for (size_t e = 0; e < X; e++) {
            m->w[i][e] = make_matrix(type, sizes[i][0], sizes[i][1]);
            m->t[i][e] = m->w[i][e].t;
            m->dt[i][e] = (bm_tensor){ m->dw[i] + e * size, BM_F32, sizes[i][0], sizes[i][1] };
        }
    }
    float **const rows[] = { &m->x, &m->dy, &m->dx, &m->y, &m->act, &m->dact, &m->hidden, &m->dhidden, &m->gate,
                             &m->dgate };
    const int width[] = { D, D, D, D, F, F, 2 * F, 2 * F, 1, 1 };
    for (int i = 0; i < 10; i++) *rows[i] = normals((size_t)(M * width[i]), 1);
    m->dx0 = copy_of(m->dx, M * D);
    m->gate[3] = 0;                     /* its dgate is not found by dividing */
    route_by_hand(m);
    const bool plain = variant & PLAIN, biased = variant & BIASED;
    m->op = (bm_op_experts){
        .M = M, .D = D, .F = F, .X = variant & DENSE ? 1 : X, .arith = arith,
        .activation = variant & SILU ? BM_SILU : BM_GELU,
        .route = variant & DENSE ? NULL : &m->route, .gate = plain ? NULL : m->t[0], .up = m->t[1], .down = m->t[2],
        .gate_bias = biased && !plain ? m->bias[0] : NULL, .up_bias = biased ? m->bias[1] : NULL,
        .down_bias = biased ? m->bias[2] : NULL, .x = m->x, .hidden = m->hidden, .act = m->act, .y = m->y,
        .dy = m->dy, .dx = m->dx, .add_dx = variant & ADD_DX, .dgate = m->dgate,
        .dw_gate = plain || variant & FROZEN ? NULL : m->dt[0],
        .dw_up = m->dt[1], .dw_down = m->dt[2], .db_gate = biased && !plain ? m->db[0] : NULL,
        .db_up = biased ? m->db[1] : NULL, .db_down = biased ? m->db[2] : NULL, .dhidden = m->dhidden, .dact = m->dact,
    };
    return m;
}
static void drop_moe(moe *m) {
    for (int i = 0; i < 3; i++) {
        for (int e = 0; e < X; e++) drop_matrix(&m->w[i][e]);
        drop(m->bias[i]); drop(m->db[i]); drop(m->dw[i]); drop(m->db0[i]); drop(m->dw0[i]);
    }
    drop(m->x); drop(m->dy); drop(m->y); drop(m->dx); drop(m->dx0); drop(m->hidden); drop(m->act); drop(m->dhidden);
    drop(m->dact); drop(m->gate); drop(m->dgate);
    free(m);
}
static double gate_of(const moe *m, int row) { return m->variant & DENSE ? 1 : (double)m->gate[row]; }
static int row_of(const moe *m, int r) { return m->variant & DENSE ? r : m->order[r]; }
static int rows_of(const moe *m, int e, int *begin) {
    if (m->variant & DENSE) {
        *begin = 0;
        return e ? 0 : M;
    }
    *begin = m->first[e];
    return m->first[e + 1];
}
static double slope(double x, int variant) {
    if (variant & SILU) return 1 / (1 + exp(-x)) * (1 + x * (1 - 1 / (1 + exp(-x))));
    return 0.5 * erfc(-x / sqrt(2.0)) + x * exp(-0.5 * x * x) / sqrt(2 * acos(-1));
}
static double value(double x, int variant) { return variant & SILU ? silu(x) : gelu(x); }

/* hidden and act as the forward keeps them, and y of rows in no group. */
static void check_kept(bm_backend *b, moe *m) {
    const bool plain = m->variant & PLAIN;
    float *y = copy_of(m->y, M * D), *work = floats(M * 2 * F);
    for (int r = 0; r < rows_of(m, X - 1, &(int){ 0 }) && !(m->variant & DENSE); r++)
        for (int f = 0; f < F; f++) {
            const float *h = m->hidden + r * 2 * F;
            const double act = value(plain ? h[F + f] : h[f], m->variant) * (plain ? 1 : h[F + f]);
            check_near(m->act[r * F + f], act, 1e-6 * (1 + fabs(act)), "act");
        }
    for (int i = 0; i < M; i++)
        if (m->expert[i] < 0)
            for (int d = 0; d < D; d++) assert_true(m->y[i * D + d] == 0);
    bm_op_experts op = m->op;
    op.act = NULL;
    op.hidden = work;
    b->experts(b, &op);
    check_equal(m->y, y, M * D, "y without kept act");
    drop(y); drop(work);
}
/* The work space of every expert, which it has in common with the others, by the backward of each one alone; nothing
 * else is wanted of that. */
static void gather_work(bm_backend *b, moe *m) {
    for (int e = 0; e < X && !(m->variant & DENSE); e++) {
        int32_t first[X + 1] = { 0 };
        int begin, end = rows_of(m, e, &begin);
        for (int i = e + 1; i <= X; i++) first[i] = end - begin;
        bm_op_route route = m->route;
        route.order = m->order + begin;
        route.first = first;
        bm_op_experts op = m->op;
        op.route = &route;
        op.hidden += begin * 2 * F;
        op.act += begin * F;
        op.dhidden += begin * 2 * F;
        op.dact += begin * F;
        op.dx = op.dgate = op.db_gate = op.db_up = op.db_down = NULL;
        op.dw_gate = op.dw_up = op.dw_down = NULL;
        b->experts_back(b, &op);
    }
}
/* Sums over d of row r: what down brings back, its product with act and bias, and through the activation. */
static void check_down(const moe *m, int e, int r) {
    const int row = row_of(m, r);
    const float *dy = m->dy + row * D, *dact = m->dact + r * F;
    const float *h = m->hidden + r * 2 * F, *dh = m->dhidden + r * 2 * F;
    double dgate = 0, size = 0;
    for (int f = 0; f < F; f++) {
        double s = 0, magnitude = 0;
        for (int d = 0; d < D; d++) {
            const double p = operand(m->type, m->arith, dy[d]) * m->w[2][e].wide[d * F + f];
            s += p;
            magnitude += fabs(p);
        }
        check_sum(dact[f], s, magnitude, D, "dact");
        dgate += (double)m->act[r * F + f] * dact[f];
        size += fabs((double)m->act[r * F + f] * dact[f]);
        const double g = gate_of(m, row) * dact[f], up = h[F + f], pre = h[f];
        const double dup = g * (m->variant & PLAIN ? slope(up, m->variant) : value(pre, m->variant));
        check_near(dh[F + f], dup, 2e-6 * (1 + fabs(g)), "gradient before up");
        if (!(m->variant & PLAIN))
            check_near(dh[f], g * up * slope(pre, m->variant), 2e-6 * (1 + fabs(g * up)), "gradient before gate");
    }
    if (m->variant & BIASED)
        for (int d = 0; d < D; d++) {
            const double p = (double)dy[d] * m->bias[2][e * D + d];
            dgate += p;
            size += fabs(p);
        }
    if (!(m->variant & DENSE)) check_sum(m->dgate[row], dgate, size, F + D, "dgate");
}
/* d of matrix i of expert e: sum over its rows of left x right, and of left. */
static void check_matrix(const moe *m, int i, int e) {
    const int rows = sizes[i][0], cols = sizes[i][1];
    int begin, end = rows_of(m, e, &begin);
    for (int o = 0; o < rows; o++) {
        double bias = 0, bias_size = 0;
        for (int j = 0; j < cols; j++) {
            double s = 0, size = 0;
            bias = bias_size = 0;
            for (int r = begin; r < end; r++) {
                const int row = row_of(m, r);
                const float left = i == 2 ? m->dy[row * D + o] * (float)gate_of(m, row)
                                          : m->dhidden[r * 2 * F + i * F + o];
                const float right = i == 2 ? m->act[r * F + j] : m->x[row * D + j];
                const double p = operand(m->type, m->arith, left) * operand(m->type, m->arith, right);
                s += p;
                size += fabs(p);
                bias += left;
                bias_size += fabs(left);
            }
            const size_t at = (size_t)((e * rows + o) * cols + j);
            if (begin == end || (i == 0 && m->variant & FROZEN))
                check_equal(m->dw[i] + at, m->dw0[i] + at, 1, "gradient of an expert without rows, or not wanted");
            else check_sum(m->dw[i][at], s + m->dw0[i][at], size, end - begin, "gradient of an expert");
        }
        const size_t at = (size_t)(e * rows + o);
        if (m->variant & BIASED && begin < end)
            check_sum(m->db[i][at], bias + m->db0[i][at], bias_size, end - begin, "bias of an expert");
        else
            check_equal(m->db[i] + at, m->db0[i] + at, 1, "bias of an expert, untouched");
    }
}
static void check_input(const moe *m, int e, int r) {
    const int row = row_of(m, r);
    for (int d = 0; d < D; d++) {
        double s = m->variant & ADD_DX ? m->dx0[row * D + d] : 0, size = fabs(s);
        for (int i = m->variant & PLAIN ? 1 : 0; i < 2; i++)
            for (int f = 0; f < F; f++) {
                const double p = operand(m->type, m->arith, m->dhidden[r * 2 * F + i * F + f])
                                 * m->w[i][e].wide[f * D + d];
                s += p;
                size += fabs(p);
            }
        check_sum(m->dx[row * D + d], s, size, 2 * F, "dx of experts");
    }
}
static void check_moe(moe *m) {
    for (int e = 0; e < X; e++) {
        int begin, end = rows_of(m, e, &begin);
        for (int r = begin; r < end; r++) {
            check_down(m, e, r);
            check_input(m, e, r);
        }
        for (int i = m->variant & PLAIN ? 1 : 0; i < 3; i++) check_matrix(m, i, e);
    }
    for (int i = 0; i < M; i++) {
        if (m->expert[i] >= 0) continue;
        assert_true(m->dgate[i] == 0);
        for (int d = 0; d < D; d++) assert_true(m->dx[i * D + d] == (m->variant & ADD_DX ? m->dx0[i * D + d] : 0));
    }
    for (int i = 0; i < 3; i++) {
        check_guards(m->dw[i], (size_t)(X * sizes[i][0] * sizes[i][1]));
        check_guards(m->db[i], (size_t)(X * sizes[i][0]));
    }
    check_guards(m->dx, M * D);
    check_guards(m->dgate, M);
    check_guards(m->dhidden, M * 2 * F);
    check_guards(m->dact, M * F);
    check_guards(m->act, M * F);
    check_guards(m->hidden, M * 2 * F);
}
static void test_experts_back(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_back(level, 2);
        for (int variant = 0; b && variant < VARIANTS; variant++)
            for (int t = variant % one_in(6); t < 6; t += one_in(6)) {
                moe *m = make_moe(variant, types[t / 2], t % 2);
                b->experts(b, &m->op);
                check_kept(b, m);
                b->experts_back(b, &m->op);
                gather_work(b, m);
                check_moe(m);
                drop_moe(m);
            }
        if (b) done(b);
    }
}
static void test_experts_back_threads(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++)
        for (int t = 0; t < 2; t++) {
            moe *m = make_moe(BIASED, types[t], BM_ARITH_NATIVE);
            float *dx = NULL, *dw[3];
            for (int threads = 1; threads <= 3; threads++) {
                bm_backend *b = open_back(level, threads);
                if (!b) break;
                for (int i = 0; i < 3; i++) memcpy(m->dw[i], m->dw0[i], sizeof(float) * (size_t)(X * F * D));
                b->experts(b, &m->op);
                b->experts_back(b, &m->op);
                done(b);
                if (!dx) {
                    dx = copy_of(m->dx, M * D);
                    for (int i = 0; i < 3; i++) dw[i] = copy_of(m->dw[i], X * F * D);
                }
                check_equal(m->dx, dx, M * D, "dx by threads");
                for (int i = 0; i < 3; i++) check_equal(m->dw[i], dw[i], X * F * D, "dw by threads");
            }
            if (dx) {
                drop(dx);
                for (int i = 0; i < 3; i++) drop(dw[i]);
            }
            drop_moe(m);
        }
}

/* Products that read what others write, in units long enough that threads meet. */
static void test_experts_back_order(void **state) {
    (void)state;
    enum { ROWS = 600, WIDE = 160, HIDDEN = 192 };
    const size_t size = WIDE * HIDDEN, n = ROWS * WIDE;
    matrix w[3] = { make_matrix(BM_F32, HIDDEN, WIDE), make_matrix(BM_F32, HIDDEN, WIDE),
                    make_matrix(BM_F32, WIDE, HIDDEN) };
    const bm_tensor *const t[3] = { &w[0].t, &w[1].t, &w[2].t };
    float *x = normals(n, 1), *dy = normals(n, 1);
    float *hidden = normals(2 * ROWS * HIDDEN, 1), *act = normals(ROWS * HIDDEN, 1);
    float *dhidden = floats(2 * ROWS * HIDDEN), *dact = floats(ROWS * HIDDEN), *dx[2], *dw[2];
    for (int i = 0; i < 2; i++) dx[i] = floats(n), dw[i] = floats(3 * size);
    for (int level = 0; level < LEVELS; level++)
        for (int threads = 1; threads <= 9; threads++) {
            bm_backend *b = open_back(level, threads < 4 ? threads : 2);
            const int i = threads > 1;
            if (!b) break;
            memset(dw[i], 0, sizeof(float) * 3 * size);
            memset(dhidden, 0, sizeof(float) * 2 * ROWS * HIDDEN);
            const bm_tensor d[3] = { { dw[i], BM_F32, HIDDEN, WIDE }, { dw[i] + size, BM_F32, HIDDEN, WIDE },
                                     { dw[i] + 2 * size, BM_F32, WIDE, HIDDEN } };
            b->experts_back(b, &(bm_op_experts){
                .M = ROWS, .D = WIDE, .F = HIDDEN, .X = 1, .gate = t[0], .up = t[1], .down = t[2], .x = x,
                .hidden = hidden, .act = act, .dy = dy, .dx = dx[i], .dw_gate = &d[0], .dw_up = &d[1], .dw_down = &d[2],
                .dhidden = dhidden, .dact = dact, .arith = BM_ARITH_F32 });
            done(b);
            check_equal(dx[i], dx[0], n, "dx, threads that wait for each other");
            check_equal(dw[i], dw[0], 3 * size, "dw, threads that wait for each other");
        }
    drop(x); drop(dy); drop(hidden); drop(act); drop(dhidden); drop(dact);
    for (int i = 0; i < 2; i++) drop(dx[i]), drop(dw[i]);
    for (int i = 0; i < 3; i++) drop_matrix(&w[i]);
}

/* ---- experts against central differences --------------------------------------------------------------- */

/* sum of dy . y of one row, in f64, with one number of it moved */
typedef struct nudge { int kind, e, at; double by; } nudge;     /* kind: 0 to 2 matrix, 3 to 5 its bias, 6 x, 7 gate */
static double moved(const nudge *n, int kind, int e, int at, double v) {
    return n->kind == kind && n->e == e && n->at == at ? v + n->by : v;
}
static double row_loss(const moe *m, int row, int e, const nudge *n) {
    double pre[2][F], act[F], s = 0;
    for (int i = 0; i < 2; i++)
        for (int f = 0; f < F; f++) {
            pre[i][f] = m->variant & BIASED ? moved(n, 3 + i, e, f, m->bias[i][e * F + f]) : 0;
            for (int d = 0; d < D; d++)
                pre[i][f] += moved(n, i, e, f * D + d, m->w[i][e].wide[f * D + d])
                             * moved(n, 6, 0, row * D + d, m->x[row * D + d]);
        }
    for (int f = 0; f < F; f++) {
        const bool plain = m->variant & PLAIN;
        act[f] = value(pre[plain ? 1 : 0][f], m->variant) * (plain ? 1 : pre[1][f]);
    }
    for (int d = 0; d < D; d++) {
        double y = m->variant & BIASED ? moved(n, 5, e, d, m->bias[2][e * D + d]) : 0;
        for (int f = 0; f < F; f++) y += moved(n, 2, e, d * F + f, m->w[2][e].wide[d * F + f]) * act[f];
        s += m->dy[row * D + d] * y * moved(n, 7, 0, row, gate_of(m, row));
    }
    return s;
}
static double difference(const moe *m, nudge n) {
    double s = 0;
    for (int side = -1; side <= 1; side += 2) {
        n.by = side * 1e-5;
        for (int i = 0; i < M; i++)
            if (m->expert[i] >= 0) s += side * row_loss(m, i, m->expert[i], &n);
    }
    return s / 2e-5;
}
static void test_experts_differences(void **state) {
    (void)state;
    bm_backend *b = open_back(0, 1);
    for (int variant = 0; variant < VARIANTS; variant++) {
        if (variant & (ADD_DX | FROZEN)) continue;
        moe *m = make_moe(variant, BM_F32, BM_ARITH_F32);
        b->experts(b, &m->op);
        b->experts_back(b, &m->op);
        for (int probe = 0; probe < 6; probe++) {
            const int e = variant & DENSE ? 0 : (int[]){ 0, 2, 3 }[probe % 3], at = 311 * probe % (D * F);
            for (int i = variant & PLAIN ? 1 : 0; i < 3; i++) {
                const size_t rows = (size_t)sizes[i][0], o = (size_t)(at / sizes[i][1]);
                check_near(m->dw[i][e * D * F + at] - m->dw0[i][e * D * F + at],
                           difference(m, (nudge){ .kind = i, .e = e, .at = at }), 2e-4, "matrix by differences");
                if (variant & BIASED)
                    check_near(m->db[i][(size_t)e * rows + o] - m->db0[i][(size_t)e * rows + o],
                               difference(m, (nudge){ .kind = 3 + i, .e = e, .at = (int)o }), 2e-4, "by differences");
            }
            check_near(m->dx[at], difference(m, (nudge){ .kind = 6, .at = at }), 2e-4, "dx by differences");
            const int row = probe * 3;
            if (!(variant & DENSE) && m->expert[row] >= 0)
                check_near(m->dgate[row], difference(m, (nudge){ .kind = 7, .at = row }), 2e-4, "dgate by differences");
        }
        drop_moe(m);
    }
    done(b);
}

/* ---- what is refused ----------------------------------------------------------------------------------- */

static void test_refused(void **state) {
    (void)state;
    bm_backend *b;
    assert_int_equal(bm_backend_open_cpu(&b, 1), BM_OK);
    const linear_case k = { BM_F32, BM_ARITH_F32, 3, 5, 7, 0 };
    linear_data d = make_linear(&k);
    run_linear(b, &k, &d);
    check_equal(d.dw, d.dw0, 35, "dw without work space");
    assert_int_equal(b->sync(b), BM_EDEVICE);
    assert_non_null(strstr(bm_error(), "reserve_back"));
    assert_int_equal(b->reserve_back(b, 3, 64, 64), BM_OK);
    assert_int_equal(b->reserve_back(b, 1, 5, 7), BM_OK);       /* keeps the larger one */
    run_linear(b, &k, &d);
    assert_int_equal(b->sync(b), BM_OK);
    assert_true(d.dw[0] != d.dw0[0]);
    drop_linear(&d);
    matrix w = make_matrix(BM_Q8_0, 4, 64);
    float *x = normals(64, 1), *dy = normals(4, 1), *dx = floats(64);
    b->linear_back(b, &(bm_op_linear){ .M = 1, .ldx = 64, .w = &w.t, .x = x, .dy = dy, .dx = dx });
    assert_int_equal(b->sync(b), BM_ENOSUPPORT);
    assert_non_null(strstr(bm_error(), "quantized"));
    drop(x); drop(dy); drop(dx);
    drop_matrix(&w);
    done(b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear_back), cmocka_unit_test(test_linear_back_large),
        cmocka_unit_test(test_linear_back_threads), cmocka_unit_test(test_linear_back_twice),
        cmocka_unit_test(test_experts_back), cmocka_unit_test(test_experts_back_threads),
        cmocka_unit_test(test_experts_back_order),
        cmocka_unit_test(test_experts_differences), cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
