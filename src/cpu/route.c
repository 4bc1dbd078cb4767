/* route.c - which experts each row goes through, running and training, and what that teaches the router.  Room: cpu.
 *
 * In: logits (M,X).  Out: k choices of each row, their gates, the order that groups rows by expert.  Training adds,
 * over groups of rows that are routed together: Sinkhorn (docs/MODEL.md, "Training"), capacity, the load-balance loss
 * (Fedus et al. 2021, arXiv 2101.03961, equation 4) and the z-loss (Zoph et al. 2022, arXiv 2202.08906, equation 5). */
#include "cpu/kernels.h"
#include <math.h>
#include <string.h>

enum { ROWS = 64 };         /* rows a thread takes at least */
static const double EPS = 1e-8, HIGHEST = 80;       /* of Sinkhorn; exponents past HIGHEST would not fit f32 */

typedef struct job {
    bm_cpu *c; const bm_op_route *a;
    double *norm;           /* Sinkhorn: of each group, its (X,S) matrix, from group[g] * X on */
    int g;                  /* the group at hand */
    const double *share;    /* (X) of the group's choices */
} job;

/* ---- one row -------------------------------------------------------------------------- */

/* The largest of v that is not taken; NaN never wins, the lowest index does when equal. */
static int best_of(const double *v, int X, const bool *taken) {
    int best = -1;
    for (int e = 0; e < X; e++)
        if (!taken[e] && (best < 0 || v[e] > v[best] || (isnan(v[best]) && !isnan(v[e])))) best = e;
    return best;
}
static void best_k(const double *v, int X, int k, int *pick) {
    bool taken[BM_MAX_EXPERTS];
    memset(taken, 0, sizeof *taken * (size_t)X);
    for (int j = 0; j < k; j++) {
        pick[j] = best_of(v, X, taken);
        taken[pick[j]] = true;
    }
}
/* p (X) = exp(l - max), unless NULL; returns their sum. */
static float exp_row(const float *l, int X, int max, float *p) {
    float sum = 0;
    for (int e = 0; e < X; e++) {
        const float v = expf(l[e] - l[max]);
        if (p) p[e] = v;
        sum += v;
    }
    return sum;
}
static int max_of(const float *l, int X) {
    int best = 0;
    for (int e = 1; e < X; e++)
        if (l[e] > l[best] || (isnan(l[best]) && !isnan(l[e]))) best = e;
    return best;
}
/* The k choices of row i, row s of the S rows of its group. */
static void pick_row(const job *j, int i, int s, int S, int *pick) {
    const bm_op_route *a = j->a;
    const size_t X = (size_t)a->X;
    const float *l = a->logits + (size_t)i * X;
    double v[BM_MAX_EXPERTS];
    if (!j->norm && a->k == 1) {
        *pick = max_of(l, a->X);
        return;
    }
    const double *norm = j->norm ? j->norm + (size_t)(i - s) * X + s : NULL;
    for (size_t e = 0; e < X; e++) v[e] = norm ? norm[e * (size_t)S] : (double)l[e];
    best_k(v, a->X, a->k, pick);
}
static float gate_of(const float *l, int e, int max, float sum, bm_routing rule) {
    return rule == BM_ROUTE_SIGMOID ? 1.0f / (1.0f + expf(-l[e])) : e == max ? 1.0f / sum : expf(l[e] - l[max]) / sum;
}
static void choose_row(const job *j, int i, int s, int S) {
    const bm_op_route *a = j->a;
    const float *l = a->logits + (size_t)i * (size_t)a->X;
    int pick[BM_MAX_EXPERTS];
    pick_row(j, i, s, S, pick);
    const int max = a->rule == BM_ROUTE_SOFTMAX ? max_of(l, a->X) : 0;
    const float sum = a->rule == BM_ROUTE_SOFTMAX ? exp_row(l, a->X, max, NULL) : 1;
    for (int n = 0; n < a->k; n++) {
        const size_t at = (size_t)n * (size_t)a->M + (size_t)i;
        a->expert[at] = pick[n];
        a->gate[at] = gate_of(l, pick[n], max, sum, a->rule);
    }
}

/* Rows [0, M) are one group where there are none. */
static int group_begin(const bm_op_route *a, int g) { return a->balance ? a->group[g] : 0; }
static int group_end(const bm_op_route *a, int g) { return a->balance ? a->group[g + 1] : a->M; }
static int group_of(const bm_op_route *a, int i) {
    int g = 0;
    while (group_end(a, g) <= i) g++;
    return g;
}
static void choose_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    for (int i = (int)begin, g = group_of(j->a, i); i < (int)end; i++) {
        while (group_end(j->a, g) <= i) g++;
        const int first = group_begin(j->a, g);
        choose_row(j, i, i - first, group_end(j->a, g) - first);
    }
}

/* ---- Sinkhorn ------------------------------------------------------------------------- */

/* Column s of C (X,S) = exp(scale l), the row shifted by its maximum where that would be too large. */
static void exponents(double *C, const float *l, int s, int S, int X, double scale) {
    const double top = scale * (double)l[max_of(l, X)], shift = top > HIGHEST ? top : 0;
    for (int e = 0; e < X; e++) C[(size_t)e * (size_t)S + (size_t)s] = exp(scale * (double)l[e] - shift);
}
/* d1 (X) after it has settled, before (X) that of the sweep before; returns the sweeps. */
static int settle(const bm_kernels *k, const double *C, int S, int X, const bm_balance *b, double *d1, double *before) {
    for (int e = 0; e < X; e++) {
        double sum = 0;
        for (int s = 0; b->paper_start && s < S; s++) sum += C[(size_t)e * (size_t)S + (size_t)s];
        d1[e] = b->paper_start ? 1 / (X * sum) : 1;
    }
    for (int n = 1; ; n++) {
        double change = 0, size = 0;
        memcpy(before, d1, sizeof *d1 * (size_t)X);
        k->sinkhorn(C, S, X, EPS, before, d1);
        for (int e = 0; e < X; e++) change += fabs(before[e] - d1[e]) / X, size += fabs(d1[e]) / X;
        if (n >= b->sweeps) return n;
        if (b->stop != BM_STOP_FIXED && !(change > (b->stop == BM_STOP_RELATIVE ? b->tol * size : b->tol))) return n;
    }
}
/* C (X,S) becomes d1 C d0. */
static int normalise(const bm_kernels *k, double *C, int S, int X, const bm_balance *b) {
    double d1[BM_MAX_EXPERTS], before[BM_MAX_EXPERTS];
    const int sweeps = settle(k, C, S, X, b, d1, before);
    for (size_t s = 0; s < (size_t)S; s++) {
        double sum = 0;
        for (size_t e = 0; e < (size_t)X; e++) sum += C[e * (size_t)S + s] * before[e];
        const double d0 = 1.0 / S / (sum + EPS);
        for (size_t e = 0; e < (size_t)X; e++) C[e * (size_t)S + s] *= d1[e] * d0;
    }
    return sweeps;
}
void bm_sinkhorn(const bm_kernels *k, double *norm, int32_t *sweeps, const float *logits, int S, int X,
                 const bm_balance *b) {
    for (int s = 0; s < S; s++) exponents(norm, logits + (size_t)s * (size_t)X, s, S, X, b->scale);
    *sweeps = normalise(k, norm, S, X, b);
}

static void exponents_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    const bm_op_route *a = j->a;
    const size_t X = (size_t)a->X;
    (void)thread;
    for (int i = (int)begin, g = group_of(a, i); i < (int)end; i++) {
        while (group_end(a, g) <= i) g++;
        const int first = a->group[g];
        exponents(j->norm + (size_t)first * X, a->logits + (size_t)i * X, i - first, a->group[g + 1] - first, a->X,
                  a->balance->scale);
    }
}
static void normalise_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    const bm_op_route *a = j->a;
    (void)thread;
    for (int g = (int)begin; g < (int)end; g++) {
        const int S = a->group[g + 1] - a->group[g];
        const int n = S ? normalise(&j->c->k, j->norm + (size_t)a->group[g] * (size_t)a->X, S, a->X, a->balance) : 0;
        if (a->sweeps) a->sweeps[g] = n;
    }
}
/* Sets j->norm where experts are chosen by Sinkhorn.  False: no room. */
static bool balance_groups(job *j) {
    const bm_op_route *a = j->a;
    j->norm = NULL;
    if (!a->balance) return true;
    if (a->balance->choice != BM_CHOOSE_SINKHORN) {
        if (a->sweeps) memset(a->sweeps, 0, sizeof *a->sweeps * (size_t)a->G);
        return true;
    }
    if (!bm_cpu_scratch(j->c, sizeof(double) * (size_t)a->M * (size_t)a->X)) return false;
    j->norm = (double *)(void *)j->c->scratch;
    bm_parallel(j->c->pool, a->M, ROWS, exponents_part, j);
    bm_parallel(j->c->pool, a->G, 1, normalise_part, j);
    return true;
}

/* ---- losses, capacity ----------------------------------------------------------------- */

/* share (X): of the k choices of the rows of group g, before any is dropped. */
static void shares(const job *j, int g, bool dropped, double *share) {
    const bm_op_route *a = j->a;
    const int begin = a->group[g], S = a->group[g + 1] - begin;
    int pick[BM_MAX_EXPERTS];
    for (int e = 0; e < a->X; e++) share[e] = 0;
    for (int i = begin; i < begin + S; i++) {
        if (dropped) pick_row(j, i, i - begin, S, pick);
        for (int n = 0; n < a->k; n++) share[dropped ? pick[n] : a->expert[(size_t)n * (size_t)a->M + (size_t)i]] += 1;
    }
    for (int e = 0; e < a->X; e++) share[e] /= (double)a->k * S;
}
/* load X sum f P and z mean(logsumexp^2) of a group; P: mean probabilities. */
static void losses(const job *j, int g, float *loss) {
    const bm_op_route *a = j->a;
    const bm_balance *b = a->balance;
    const int begin = a->group[g], end = a->group[g + 1];
    double share[BM_MAX_EXPERTS], P[BM_MAX_EXPERTS] = { 0 }, z = 0, load = 0;
    float p[BM_MAX_EXPERTS];
    loss[0] = loss[1] = 0;
    if (begin == end || (b->load == 0 && b->z == 0)) return;
    shares(j, g, false, share);
    for (int i = begin; i < end; i++) {
        const float *l = a->logits + (size_t)i * (size_t)a->X;
        const int max = max_of(l, a->X);
        const double sum = (double)exp_row(l, a->X, max, p), lse = (double)l[max] + log(sum);
        for (int e = 0; e < a->X; e++) P[e] += (double)p[e] / sum;
        z += lse * lse;
    }
    for (int e = 0; e < a->X; e++) load += share[e] * P[e];
    loss[0] = (float)((double)b->load * a->X * load / (end - begin));
    loss[1] = (float)((double)b->z * z / (end - begin));
}
static void losses_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    (void)thread;
    for (int g = (int)begin; g < (int)end; g++) losses(j, g, j->a->loss + 2 * g);
}

/* Rows an expert keeps of a group; a capacity that f32 rounded up asks for no row more. */
static int capacity(const bm_op_route *a, int S) {
    const double rows = (double)a->balance->capacity * a->k * S / a->X;
    return (int)ceil(rows - rows * 1e-6);
}
static void drop_rows(const bm_op_route *a, int g) {
    const int begin = a->group[g], end = a->group[g + 1], most = capacity(a, end - begin);
    int kept[BM_MAX_EXPERTS] = { 0 };
    for (int n = 0; n < a->k; n++)
        for (int i = begin; i < end; i++) {
            const size_t at = (size_t)n * (size_t)a->M + (size_t)i;
            if (kept[a->expert[at]]++ < most) continue;
            a->expert[at] = -1;
            a->gate[at] = 0;
        }
}

/* ---- the operation -------------------------------------------------------------------- */

/* Counting sort of one choice's rows; first[e] runs ahead while rows are placed, then is moved back by one. */
static void order_rows(const int32_t *expert, int M, int X, int32_t *order, int32_t *first) {
    memset(first, 0, sizeof *first * ((size_t)X + 1));
    for (int i = 0; i < M; i++)
        if (expert[i] >= 0) first[expert[i] + 1]++;
    for (int e = 0; e < X; e++) first[e + 1] += first[e];
    for (int i = 0; i < M; i++)
        if (expert[i] >= 0) order[first[expert[i]]++] = i;
    for (int e = X; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

void bm_cpu_route(bm_backend *b, const bm_op_route *a) {
    job j = { .c = (bm_cpu *)b, .a = a };
    const size_t M = (size_t)a->M, X = (size_t)a->X;
    if (j.c->failed || !balance_groups(&j)) return;
    bm_parallel(j.c->pool, a->M, ROWS, choose_part, &j);
    if (a->balance && a->loss) bm_parallel(j.c->pool, a->G, 1, losses_part, &j);
    for (int g = 0; a->balance && a->balance->capacity > 0 && g < a->G; g++) drop_rows(a, g);
    for (size_t n = 0; n < (size_t)a->k; n++)
        order_rows(a->expert + n * M, a->M, a->X, a->order + n * M, a->first + n * (X + 1));
}

/* ---- backward ------------------------------------------------------------------------- */

/* dl += dgate of choice e: g (1 - g) for a sigmoid, g (1 at e - p) for a probability. */
static void gate_back(float *dl, const float *p, int X, int e, float gate, float dgate, bm_routing rule) {
    if (rule == BM_ROUTE_SIGMOID) {
        dl[e] += dgate * gate * (1 - gate);
        return;
    }
    for (int i = 0; i < X; i++) dl[i] -= dgate * gate * p[i];
    dl[e] += dgate * gate;
}
/* dl += loss_scale times the gradient of the group's losses:  load X / S p (f - sum f p) + 2 z / S logsumexp p. */
static void losses_back(const job *j, float *dl, const float *p, double lse, int S) {
    const bm_op_route *a = j->a;
    double mean = 0;
    for (int e = 0; e < a->X; e++) mean += j->share[e] * (double)p[e];
    const double load = (double)a->loss_scale * (double)a->balance->load * a->X / S;
    const double z = 2 * (double)a->loss_scale * (double)a->balance->z * lse / S;
    for (int e = 0; e < a->X; e++) dl[e] += (float)((double)p[e] * (load * (j->share[e] - mean) + z));
}
static void back_part(void *arg, int64_t begin, int64_t end, int thread) {
    const job *j = arg;
    const bm_op_route *a = j->a;
    const int first = group_begin(a, j->g), S = group_end(a, j->g) - first;
    float p[BM_MAX_EXPERTS];
    (void)thread;
    for (int i = first + (int)begin; i < first + (int)end; i++) {
        const float *l = a->logits + (size_t)i * (size_t)a->X;
        float *dl = a->dlogits + (size_t)i * (size_t)a->X;
        double lse = 0;
        memset(dl, 0, sizeof *dl * (size_t)a->X);
        if (j->share || a->rule == BM_ROUTE_SOFTMAX) {
            const int max = max_of(l, a->X);
            const float sum = exp_row(l, a->X, max, p);
            for (int e = 0; e < a->X; e++) p[e] /= sum;
            lse = (double)l[max] + log((double)sum);
        }
        for (int n = 0; n < a->k; n++) {
            const size_t at = (size_t)n * (size_t)a->M + (size_t)i;
            if (a->expert[at] >= 0) gate_back(dl, p, a->X, a->expert[at], a->gate[at], a->dgate[at], a->rule);
        }
        if (j->share) losses_back(j, dl, p, lse, S);
    }
}

void bm_cpu_route_back(bm_backend *b, const bm_op_route *a) {
    job j = { .c = (bm_cpu *)b, .a = a };
    const bm_balance *l = a->balance;
    const bool lost = l && (l->load != 0 || l->z != 0), dropped = l && l->load != 0 && l->capacity > 0;
    double share[BM_MAX_EXPERTS] = { 0 };
    if (j.c->failed || (dropped && !balance_groups(&j))) return;
    for (j.g = 0; j.g < (l ? a->G : 1); j.g++) {
        const int S = group_end(a, j.g) - group_begin(a, j.g);
        if (lost && l->load != 0 && S) shares(&j, j.g, dropped, share);
        j.share = lost ? share : NULL;
        bm_parallel(j.c->pool, S, ROWS, back_part, &j);
    }
}
