/* test_route.c - routing: the running rule for one and several experts a row, Sinkhorn against the original's, groups,
 * capacity, losses and the gradient of the router against a reference in f64 and its differences. */
#include "lib_golden.h"
#include "lib_kernels.h"
#include <math.h>

enum { ROWS = 700, WIDEST = 70, MOST_K = 3, MOST_G = 8 };
typedef struct rig {
    int32_t expert[MOST_K * ROWS], order[MOST_K * ROWS], first[MOST_K * (WIDEST + 1)], sweeps[MOST_G];
    float gate[MOST_K * ROWS], loss[2 * MOST_G], *dlogits;
    bm_op_route op;
} rig;

static bm_backend *open_wide(int level, int threads) {
    bm_backend *b = open_level(level, threads);
    if (b) assert_int_equal(b->reserve(b, ROWS, 2 * WIDEST), BM_OK);
    return b;
}
static rig *make_rig(int M, int X, int k, bm_routing rule, const float *logits) {
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    assert_true(M <= ROWS && X <= WIDEST && k <= MOST_K);
    r->dlogits = floats((size_t)(M * X));
    r->op = (bm_op_route){ .M = M, .X = X, .k = k, .rule = rule, .logits = logits, .expert = r->expert,
                           .order = r->order, .first = r->first, .gate = r->gate, .sweeps = r->sweeps,
                           .loss = r->loss, .dlogits = r->dlogits };
    return r;
}
static void drop_rig(rig *r) {
    check_guards(r->dlogits, (size_t)(r->op.M * r->op.X));
    drop(r->dlogits);
    free(r);
}
static void same_routes(const rig *a, const rig *b) {
    const size_t n = (size_t)(a->op.k * a->op.M);
    assert_memory_equal(a->expert, b->expert, n * sizeof *a->expert);
    assert_memory_equal(a->order, b->order, n * sizeof *a->order);
    assert_memory_equal(a->first, b->first, (size_t)(a->op.k * (a->op.X + 1)) * sizeof *a->first);
    check_equal(a->gate, b->gate, n, "gates");
    check_equal(a->loss, b->loss, 2 * MOST_G, "losses");
    assert_memory_equal(a->sweeps, b->sweeps, sizeof a->sweeps);
    check_equal(a->dlogits, b->dlogits, (size_t)(a->op.M * a->op.X), "dlogits");
}
/* Every row that has an expert is in the order list of its choice once, expert by expert, ascending. */
static void check_order(const rig *r) {
    const int M = r->op.M, X = r->op.X;
    for (int j = 0; j < r->op.k; j++) {
        const int32_t *expert = r->expert + j * M, *order = r->order + j * M, *first = r->first + j * (X + 1);
        int kept = 0;
        for (int i = 0; i < M; i++) kept += expert[i] >= 0;
        assert_int_equal(first[0], 0);
        assert_int_equal(first[X], kept);
        for (int e = 0; e < X; e++)
            for (int i = first[e]; i < first[e + 1]; i++) {
                assert_int_equal(expert[order[i]], e);
                assert_true(i == first[e] || order[i] > order[i - 1]);
            }
    }
}
/* The j-th best of v (X): lowest index of equals. */
static int nth_best(const double *v, int X, int n) {
    for (int e = 0; e < X; e++) {
        int better = 0;
        for (int i = 0; i < X; i++) better += v[i] > v[e] || (v[i] == v[e] && i < e);
        if (better == n) return e;
    }
    return -1;
}
static double logsumexp(const float *l, int X) {
    double top = -1e300, sum = 0;
    for (int e = 0; e < X; e++) top = fmax(top, (double)l[e]);
    for (int e = 0; e < X; e++) sum += exp((double)l[e] - top);
    return top + log(sum);
}
static double gate_want(const float *l, int X, int e, bm_routing rule) {
    return rule == BM_ROUTE_SIGMOID ? 1 / (1 + exp(-(double)l[e])) : exp((double)l[e] - logsumexp(l, X));
}

/* ---- running rule --------------------------------------------------------------------- */

/* One expert a row, the bits of f32 arithmetic in this order. */
static float first_gate(const float *l, int X, bm_routing rule, int best) {
    if (rule == BM_ROUTE_SIGMOID) return 1.0f / (1.0f + expf(-l[best]));
    float sum = 0;
    for (int e = 0; e < X; e++) sum += expf(l[e] - l[best]);
    return 1.0f / sum;
}
static void running_case(bm_backend *b, int M, int X, int k, bm_routing rule) {
    float *l = normals((size_t)(M * X), 3);
    for (int e = 0; e < X; e++) l[e] = (float)(e / 2);                /* row 0: pairs of equals */
    for (int e = 0; e < X; e++) l[X + e] = 1;                         /* row 1: all equal */
    rig *r = make_rig(M, X, k, rule, l);
    b->route(b, &r->op);
    check_order(r);
    for (int i = 0; i < M; i++) {
        double v[WIDEST];
        for (int e = 0; e < X; e++) v[e] = (double)l[i * X + e];
        for (int j = 0; j < k; j++) {
            const int e = nth_best(v, X, j);
            assert_int_equal(r->expert[j * M + i], e);
            check_near((double)r->gate[j * M + i], gate_want(l + i * X, X, e, rule), 1e-6, "gate");
        }
        const float bits = first_gate(l + i * X, X, rule, r->expert[i]);
        check_equal(r->gate + i, &bits, 1, "gate of the best");
    }
    drop_rig(r);
    drop(l);
}
static void test_running(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_wide(level, 2);
        for (int X = 2; b && X <= WIDEST; X = X * 2 + 1)
            for (int k = 1; k <= MOST_K && k <= X; k++)
                for (int rule = 0; rule < 2; rule++) running_case(b, k == 2 ? 1 + X % 3 + 2 : ROWS, X, k, rule);
        if (b) done(b);
    }
}

/* ---- Sinkhorn ------------------------------------------------------------------------- */

static const bm_balance plain = { .choice = BM_CHOOSE_SINKHORN, .stop = BM_STOP_ABSOLUTE, .tol = 1e-4,
                                  .sweeps = 1000, .scale = 2 };

/* The definition, row by row: norm (S,X); returns the sweeps. */
static int sinkhorn_want(double *norm, const float *l, int S, int X, const bm_balance *b) {
    double *C = malloc(sizeof *C * (size_t)(S * X)), *d0 = malloc(sizeof *d0 * (size_t)S), d1[WIDEST];
    int sweeps = 0;
    assert_true(C && d0);
    for (int i = 0; i < S * X; i++) C[i] = exp(b->scale * (double)l[i]);
    for (int e = 0; e < X; e++) {
        double sum = 0;
        for (int s = 0; s < S; s++) sum += C[s * X + e];
        d1[e] = b->paper_start ? 1 / (X * sum) : 1;
    }
    for (bool more = true; more; ) {
        double change = 0, size = 0;
        for (int s = 0; s < S; s++) {
            double sum = 0;
            for (int e = 0; e < X; e++) sum += C[s * X + e] * d1[e];
            d0[s] = 1.0 / S / (sum + 1e-8);
        }
        for (int e = 0; e < X; e++) {
            double sum = 0;
            for (int s = 0; s < S; s++) sum += C[s * X + e] * d0[s];
            const double next = 1.0 / X / (sum + 1e-8);
            change += fabs(next - d1[e]) / X;
            d1[e] = next;
            size += next / X;
        }
        sweeps++;
        more = b->stop == BM_STOP_FIXED ? sweeps < b->sweeps
                                        : change > b->tol * (b->stop == BM_STOP_RELATIVE ? size : 1);
        more = more && sweeps < b->sweeps;
    }
    for (int s = 0; s < S; s++)
        for (int e = 0; e < X; e++) norm[s * X + e] = d1[e] * C[s * X + e] * d0[s];
    free(C);
    free(d0);
    return sweeps;
}
static void test_golden(void **state) {
    (void)state;
    const char *path = shared_path("golden/sinkhorn.safetensors");
    golden g;
    if (!path) skip();
    snprintf(g.path, sizeof g.path, "%s", path);
    OK(bm_map_open(&g.map, path));
    for (int i = 0; i < 5; i++) {
        char name[32];
        size_t n, two;
        int64_t dim[4];
        snprintf(name, sizeof name, "norm.%d", i);
        const float *norm = golden_f32(&g, name, &n, dim);
        snprintf(name, sizeof name, "logits.%d", i);
        const float *logits = golden_f32(&g, name, &n, dim);
        snprintf(name, sizeof name, "iters.%d", i);
        bm_token *iters = golden_ids(&g, name, &two, (int64_t[4]){ 0 });
        assert_true(norm && logits && iters && two == 2);
        const int S = (int)dim[0], X = (int)dim[1];
        double *is = malloc(n * sizeof *is), most = 0;
        assert_non_null(is);
        for (size_t k = 0; k < n; k++) most = fmax(most, (double)norm[k]);
        for (int level = 0; level < LEVELS; level++)
            for (int paper = 0; paper < 2; paper++) {
                bm_kernels k;
                bm_balance b = plain;
                int32_t sweeps;
                if (!has_level(level, &k)) continue;
                b.paper_start = paper;
                bm_sinkhorn(&k, is, &sweeps, logits, S, X, &b);
                assert_int_equal(sweeps, iters[paper]);
                for (int s = 0; s < S && paper; s++)
                    for (int e = 0; e < X; e++)
                        check_near(is[e * S + s], (double)norm[s * X + e], 1e-6 * most, "the original's matrix");
            }
        free(is);
        free(iters);
    }
    bm_map_close(&g.map);
}
static void sinkhorn_case(bm_backend *b, int X, int k, const bm_balance *balance, bm_routing rule) {
    static const int32_t group[] = { 0, 1, 9, 9, 210, ROWS };
    float *l = normals((size_t)(ROWS * X), 2);
    rig *r = make_rig(ROWS, X, k, rule, l);
    double *norm = malloc(sizeof *norm * (size_t)(ROWS * X));
    assert_non_null(norm);
    r->op.balance = balance;
    r->op.G = 5;
    r->op.group = group;
    b->route(b, &r->op);
    check_order(r);
    for (int g = 0; g < 5; g++) {
        const int S = group[g + 1] - group[g];
        if (!S) continue;
        assert_int_equal(r->sweeps[g], sinkhorn_want(norm, l + group[g] * X, S, X, balance));
        for (int s = 0; s < S; s++)
            for (int j = 0; j < k; j++) {
                const int i = group[g] + s, is = r->expert[j * ROWS + i], want = nth_best(norm + s * X, X, j);
                const double a = norm[s * X + is], w = norm[s * X + want];
                if (is != want && fabs(a - w) > 1e-12 * w)
                    fail_msg("row %d, choice %d: found expert %d of %.17g, expected %d of %.17g", i, j, is, a, want, w);
                check_near((double)r->gate[j * ROWS + i], gate_want(l + i * X, X, is, rule), 1e-6, "gate");
            }
        /* a group alone is routed as among others */
        rig *alone = make_rig(S, X, k, rule, l + group[g] * X);
        alone->op.balance = balance;
        alone->op.G = 1;
        alone->op.group = (int32_t[]){ 0, S };
        b->route(b, &alone->op);
        for (int j = 0; j < k; j++) {
            assert_memory_equal(alone->expert + j * S, r->expert + j * ROWS + group[g], sizeof *r->expert * (size_t)S);
            check_equal(alone->gate + j * S, r->gate + j * ROWS + group[g], (size_t)S, "a group alone");
        }
        assert_int_equal(alone->sweeps[0], r->sweeps[g]);
        drop_rig(alone);
    }
    free(norm);
    drop_rig(r);
    drop(l);
}
static void test_sinkhorn(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_wide(level, 2);
        for (int X = 2; b && X <= WIDEST; X = X * 2 + 1)
            for (int i = X % one_in(2); i < 6; i += one_in(2)) {
                bm_balance balance = plain;
                balance.paper_start = i & 1;
                balance.stop = (bm_sinkhorn_stop)(i / 2);
                balance.sweeps = i / 2 == BM_STOP_FIXED ? 7 : 200;
                balance.scale = i < 3 ? 2 : 1;
                sinkhorn_case(b, X, X > 2 ? 1 + i % MOST_K : 1 + i % 2, &balance, i % 3 == 0);
            }
        if (b) done(b);
    }
}
/* Logits past what exp can hold, infinities and NaN: every row still has an expert, and large rows the right one. */
static void test_extremes(void **state) {
    (void)state;
    enum { M = 64, X = 8 };
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_wide(level, 2);
        if (!b) continue;
        float *l = normals(M * X, 1);
        for (int i = 0; i < 8 * X; i++) l[i] += 5000;
        for (int i = 8 * X; i < 16 * X; i++) l[i] -= 5000;
        for (int i = 0; i < 8; i++) l[i * X + i] += 30;             /* row i of those: expert i, far ahead */
        rig *r = make_rig(M, X, 2, BM_ROUTE_SOFTMAX, l);
        bm_balance balance = plain;
        balance.load = balance.z = 0.1f;
        r->op.balance = &balance;
        r->op.G = 1;
        r->op.group = (int32_t[]){ 0, M };
        b->route(b, &r->op);
        check_order(r);
        for (int i = 0; i < 8; i++) assert_int_equal(r->expert[i], i);
        assert_true(isfinite(r->loss[0]) && isfinite(r->loss[1]));
        l[20 * X] = NAN, l[21 * X + 3] = INFINITY, l[22 * X + 1] = -INFINITY;
        b->route(b, &r->op);
        check_order(r);
        for (int i = 0; i < 2 * M; i++) assert_in_range(r->expert[i], 0, X - 1);
        for (int i = 0; i < M; i++) assert_int_not_equal(r->expert[i], r->expert[M + i]);
        drop_rig(r);
        drop(l);
        done(b);
    }
}

/* ---- capacity, losses, backward ------------------------------------------------------- */

static const int32_t three[] = { 0, 40, 41, 130 };

/* Choice by choice, row by row: the first `most` of each expert stay. */
static void check_capacity(const rig *r, const rig *all) {
    const bm_op_route *a = &r->op;
    for (int g = 0; g < a->G; g++) {
        const int S = a->group[g + 1] - a->group[g];
        int count[WIDEST] = { 0 };
        const int most = (int)ceil((double)a->balance->capacity * a->k * S / a->X - 1e-4);
        for (int j = 0; j < a->k; j++)
            for (int i = a->group[g]; i < a->group[g + 1]; i++) {
                const int e = all->expert[j * a->M + i];
                const bool kept = count[e]++ < most;
                assert_int_equal(r->expert[j * a->M + i], kept ? e : -1);
                check_near((double)r->gate[j * a->M + i], kept ? (double)all->gate[j * a->M + i] : 0, 0,
                           "gate of a row kept or dropped");
            }
    }
}
/* Both losses of a group; share: of choices before dropping. */
static void losses_want(const bm_op_route *a, const double *l, const int32_t *chosen, int g, double *load, double *z) {
    const int begin = a->group[g], end = a->group[g + 1];
    double P[WIDEST] = { 0 }, f[WIDEST] = { 0 };
    *load = *z = 0;
    for (int i = begin; i < end; i++) {
        double sum = 0;
        for (int e = 0; e < a->X; e++) sum += exp(l[i * a->X + e]);
        for (int e = 0; e < a->X; e++) P[e] += exp(l[i * a->X + e]) / sum / (end - begin);
        for (int j = 0; j < a->k; j++) f[chosen[j * a->M + i]] += 1.0 / a->k / (end - begin);
        *z += (double)a->balance->z * log(sum) * log(sum) / (end - begin);
    }
    for (int e = 0; e < a->X; e++) *load += (double)a->balance->load * a->X * f[e] * P[e];
}
/* What route_back differentiates, with chosen experts frozen: dgate . gate + loss_scale sum of losses. */
static double objective(const bm_op_route *a, const double *l, const int32_t *chosen) {
    double sum = 0;
    for (int j = 0; j < a->k; j++)
        for (int i = 0; i < a->M; i++) {
            const int e = a->expert[j * a->M + i];
            double all = 0;
            if (e < 0) continue;
            for (int x = 0; x < a->X; x++) all += exp(l[i * a->X + x] - l[i * a->X + e]);
            sum += (double)a->dgate[j * a->M + i] * (a->rule == BM_ROUTE_SIGMOID ? 1 / (1 + exp(-l[i * a->X + e]))
                                                     : 1 / all);
        }
    for (int g = 0; a->balance && g < a->G; g++) {
        double load, z;
        losses_want(a, l, chosen, g, &load, &z);
        sum += (double)a->loss_scale * (load + z);
    }
    return sum;
}
static void check_back(const rig *r, const int32_t *chosen) {
    const bm_op_route *a = &r->op;
    const int n = a->M * a->X;
    double *l = malloc(sizeof *l * (size_t)n), most = 1e-6;
    assert_non_null(l);
    for (int i = 0; i < n; i++) l[i] = (double)a->logits[i], most = fmax(most, fabs((double)r->dlogits[i]));
    for (int i = 0; i < n; i++) {
        const double keep = l[i];
        l[i] = keep + 1e-5;
        const double up = objective(a, l, chosen);
        l[i] = keep - 1e-5;
        check_near((double)r->dlogits[i], (up - objective(a, l, chosen)) / 2e-5, 2e-6 * most + 1e-8, "dlogits");
        l[i] = keep;
    }
    free(l);
}
static rig *train(bm_backend *b, const float *l, const float *dgate, int M, int X, int k, bm_routing rule,
                  const bm_balance *balance) {
    rig *r = make_rig(M, X, k, rule, l);
    r->op.balance = balance;
    r->op.G = balance ? 3 : 0;
    r->op.group = balance ? three : NULL;
    r->op.dgate = dgate;
    r->op.loss_scale = 0.7f;
    for (int i = 0; i < M * X; i++) r->dlogits[i] = NAN;
    b->route(b, &r->op);
    check_order(r);
    b->route_back(b, &r->op);
    return r;
}
static void training_case(int level, int X, int k, bm_routing rule, const bm_balance *balance) {
    enum { M = 130 };
    float *l = normals((size_t)(M * X), 1.5f), *dgate = normals((size_t)(M * k), 1);
    bm_balance whole = balance ? *balance : plain;
    rig *once = NULL, *all = NULL;
    whole.capacity = 0;
    for (int threads = 1; threads <= 3; threads += 2) {
        bm_backend *b = open_wide(level, threads);
        rig *r = train(b, l, dgate, M, X, k, rule, balance);
        if (!once) {
            once = r;
            all = train(b, l, dgate, M, X, k, rule, balance ? &whole : NULL);
            if (balance && balance->capacity > 0) check_capacity(r, all);
            if (threads == 1) check_back(r, all->expert);
            double load, z, *wide = malloc(sizeof *wide * (size_t)(M * X));
            assert_non_null(wide);
            for (int i = 0; i < M * X; i++) wide[i] = (double)l[i];
            for (int g = 0; balance && g < 3; g++) {
                losses_want(&r->op, wide, all->expert, g, &load, &z);
                check_near((double)r->loss[2 * g], load, 1e-6 * (1 + load), "load loss");
                check_near((double)r->loss[2 * g + 1], z, 1e-6 * (1 + z), "z loss");
            }
            free(wide);
        } else {
            same_routes(once, r);
            drop_rig(r);
        }
        done(b);
    }
    drop_rig(once);
    drop_rig(all);
    drop(l);
    drop(dgate);
}
static void test_training(void **state) {
    (void)state;
    for (int level = 0; level < LEVELS; level++) {
        if (!has_level(level, NULL)) continue;
        for (int i = level % one_in(3); i < 32; i += one_in(3)) {
            const int X = i & 1 ? 8 : 5, k = 1 + i / 2 % 2;
            const bm_routing rule = i / 4 % 2 ? BM_ROUTE_SOFTMAX : BM_ROUTE_SIGMOID;
            bm_balance balance = plain;
            balance.choice = i / 8 % 2 ? BM_CHOOSE_BEST : BM_CHOOSE_SINKHORN;
            balance.capacity = i / 16 ? 1.1f : 0;
            balance.load = i % 3 ? 0.3f : 0;
            balance.z = i % 5 ? 0.2f : 0;
            training_case(level, X, k, rule, &balance);
            if (i < 8) training_case(level, X, k, rule, NULL);
        }
    }
}
/* A capacity that f32 rounds up: 1.1 * 80 / 8 rows are 11, not 12. */
static void test_capacity_rounding(void **state) {
    (void)state;
    enum { M = 80, X = 8 };
    bm_backend *b = open_wide(0, 1);
    float l[M * X] = { 0 };
    for (int i = 0; i < M; i++) l[i * X] = 1;
    rig *r = make_rig(M, X, 1, BM_ROUTE_SOFTMAX, l);
    r->op.balance = &(bm_balance){ .choice = BM_CHOOSE_BEST, .capacity = 1.1f };
    r->op.G = 1;
    r->op.group = (int32_t[]){ 0, M };
    b->route(b, &r->op);
    assert_int_equal(r->first[X], 11);
    drop_rig(r);
    done(b);
}
/* The same routes at every level, Sinkhorn's included. */
static void test_levels(void **state) {
    (void)state;
    enum { M = 130, X = 13 };
    float *l = normals(M * X, 1.5f), *dgate = normals(M, 1);
    rig *first = NULL;
    for (int level = 0; level < LEVELS; level++) {
        bm_backend *b = open_wide(level, 2);
        if (!b) continue;
        rig *r = train(b, l, dgate, M, X, 1, BM_ROUTE_SIGMOID, &plain);
        if (first) same_routes(first, r), drop_rig(r);
        else first = r;
        done(b);
    }
    drop_rig(first);
    drop(l);
    drop(dgate);
}
static void test_no_room(void **state) {
    (void)state;
    bm_backend *b = NULL;
    float l[64] = { 0 };
    OK(bm_backend_open_cpu_level(&b, 1, "scalar"));
    rig *r = make_rig(8, 8, 1, BM_ROUTE_SIGMOID, l);
    r->op.balance = &plain;
    r->op.G = 1;
    r->op.group = (int32_t[]){ 0, 8 };
    b->route(b, &r->op);
    assert_int_equal(b->sync(b), BM_EDEVICE);
    assert_non_null(strstr(bm_error(), "reserve"));
    drop_rig(r);
    done(b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_running), cmocka_unit_test(test_golden), cmocka_unit_test(test_sinkhorn),
        cmocka_unit_test(test_extremes), cmocka_unit_test(test_training), cmocka_unit_test(test_capacity_rounding),
        cmocka_unit_test(test_levels), cmocka_unit_test(test_no_room),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
