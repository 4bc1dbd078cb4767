/* src/dist/mpi/mpi.c - ranks by MPI; a shared object of its own.  Room: dist.
 * In: what mpirun or srun started.  Out: a bm_comm.  MPI's errors are returned, with its words in the sentence. */
#include "dist/mpi.h"
#include <limits.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

typedef struct mpi {
    bm_comm door;               /* first: a bm_comm * is a mpi * */
    bm_mpi_fail_fn fail;
    MPI_Datatype real;
    bool owns;                  /* MPI was not running before */
} mpi;

/* A reduction begun; what this rank gets comes out at x and belongs at `at`. */
typedef struct pending { MPI_Request request; float *x; size_t at, n; int *counts, *places; } pending;

static bm_status checked(const mpi *m, int error, const char *what) {
    char text[MPI_MAX_ERROR_STRING];
    int n = 0;
    if (error == MPI_SUCCESS) return BM_OK;
    MPI_Error_string(error, text, &n);
    return m->fail(BM_EDEVICE, "rank %d of %d: %s: %.*s", m->door.rank, m->door.size, what, n, text);
}

static bm_status sum(bm_comm *c, double *x, size_t n) {
    mpi *m = (mpi *)c;
    if (n > INT_MAX) return m->fail(BM_EARG, "sum over ranks: found %zu numbers, expected at most %d", n, INT_MAX);
    return checked(m, MPI_Allreduce(MPI_IN_PLACE, x, (int)n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD), "sum over ranks");
}

static void drop(pending *p) {
    free(p->counts);
    free(p->places);
    free(p);
}

/* at[0] = 0 .. at[size] as counts and places of MPI. */
static bm_status begin(mpi *m, float *x, const size_t *at, pending **out) {
    const int ranks = m->door.size;
    if (at[ranks] > INT_MAX)
        return m->fail(BM_EARG, "parameters of one layer: found %zu, expected at most %d", at[ranks], INT_MAX);
    pending *p = calloc(1, sizeof *p);
    if (p) {
        p->counts = malloc(sizeof *p->counts * (size_t)ranks);
        p->places = malloc(sizeof *p->places * (size_t)ranks);
    }
    if (!p || !p->counts || !p->places) {
        if (p) drop(p);
        return m->fail(BM_EMEMORY, "out of memory: counts of %d ranks", ranks);
    }
    for (int r = 0; r < ranks; r++) {
        p->counts[r] = (int)(at[r + 1] - at[r]);
        p->places[r] = (int)at[r];
    }
    p->x = x;
    p->at = at[m->door.rank];
    *out = p;
    return BM_OK;
}

static bm_status reduce_scatter(bm_comm *c, float *x, const size_t *at, bm_request *begun) {
    mpi *m = (mpi *)c;
    pending *p;
    bm_status s = begin(m, x, at, &p);
    begun->handle = NULL;
    if (s) return s;
    p->n = (size_t)p->counts[c->rank];
    s = checked(m, MPI_Ireduce_scatter(MPI_IN_PLACE, p->x, p->counts, m->real, MPI_SUM, MPI_COMM_WORLD, &p->request), "reduce-scatter");
    if (s) drop(p);
    else begun->handle = p;
    return s;
}

static bm_status all_gather(bm_comm *c, float *x, const size_t *at, bm_request *begun) {
    mpi *m = (mpi *)c;
    pending *p;
    bm_status s = begin(m, x, at, &p);
    begun->handle = NULL;
    if (s) return s;
    s = checked(m, MPI_Iallgatherv(MPI_IN_PLACE, 0, m->real, p->x, p->counts, p->places, m->real, MPI_COMM_WORLD, &p->request), "all-gather");
    if (s) drop(p);
    else begun->handle = p;
    return s;
}

static bm_status wait_for(bm_comm *c, bm_request *r) {
    mpi *m = (mpi *)c;
    pending *p = r->handle;
    if (!p) return BM_OK;
    const bm_status s = checked(m, MPI_Wait(&p->request, MPI_STATUS_IGNORE), "waiting for the other ranks");
    if (!s && p->n) memmove(p->x + p->at, p->x, p->n * sizeof *p->x);
    drop(p);
    r->handle = NULL;
    return s;
}

static bm_status exchange(bm_comm *c, const void *from, const int32_t *give, void *to, const int32_t *take, size_t row_bytes) {
    mpi *m = (mpi *)c;
    const int ranks = c->size;
    int *n = malloc(sizeof *n * 4 * (size_t)ranks);
    MPI_Datatype row;
    if (!n) return m->fail(BM_EMEMORY, "out of memory: counts of %d ranks", ranks);
    int *place = n + 2 * ranks;
    for (int r = 0; r < ranks; r++) {
        n[r] = give[r];
        n[ranks + r] = take[r];
        place[r] = r ? place[r - 1] + give[r - 1] : 0;
        place[ranks + r] = r ? place[ranks + r - 1] + take[r - 1] : 0;
    }
    bm_status s = checked(m, MPI_Type_contiguous((int)row_bytes, MPI_BYTE, &row), "exchange of rows");
    if (!s) {
        s = checked(m, MPI_Type_commit(&row), "exchange of rows");
        if (!s) s = checked(m, MPI_Alltoallv(from, n, place, row, to, n + ranks, place + ranks, row, MPI_COMM_WORLD), "exchange of rows");
        MPI_Type_free(&row);
    }
    free(n);
    return s;
}

static bm_status exchange_counts(bm_comm *c, const int32_t *give, int32_t *take, int n) {
    return checked((mpi *)c, MPI_Alltoall(give, n, MPI_INT32_T, take, n, MPI_INT32_T, MPI_COMM_WORLD), "exchange of counts");
}

static bm_status broadcast(bm_comm *c, void *x, size_t bytes) {
    mpi *m = (mpi *)c;
    for (size_t at = 0; at < bytes; at += INT_MAX) {
        const size_t n = bytes - at < INT_MAX ? bytes - at : INT_MAX;
        const bm_status s = checked(m, MPI_Bcast((char *)x + at, (int)n, MPI_BYTE, 0, MPI_COMM_WORLD), "broadcast");
        if (s) return s;
    }
    return BM_OK;
}

static bm_status barrier(bm_comm *c) { return checked((mpi *)c, MPI_Barrier(MPI_COMM_WORLD), "barrier"); }

static void close_mpi(bm_comm *c, bm_status s) {
    mpi *m = (mpi *)c;
    if (s) MPI_Abort(MPI_COMM_WORLD, 1);
    if (m->owns) MPI_Finalize();
    free(m);
}

__attribute__((visibility("default"))) bm_status bm_mpi_open(bm_comm **out, bm_mpi_fail_fn fail, int float_bytes) {
    int running = 0, level = 0;
    if (float_bytes != (int)sizeof(float))
        return fail(BM_ENOSUPPORT, "blackmamba-mpi.so: found floats of %d bytes, expected %d: another build's", (int)sizeof(float), float_bytes);
    mpi *m = calloc(1, sizeof *m);
    if (!m) return fail(BM_EMEMORY, "out of memory: ranks");
    MPI_Initialized(&running);
    if (!running && MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) {
        free(m);
        return fail(BM_EDEVICE, "MPI does not start");
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    m->door = (bm_comm){ .sum = sum, .reduce_scatter = reduce_scatter, .all_gather = all_gather, .wait = wait_for, .exchange = exchange,
                         .exchange_counts = exchange_counts, .broadcast = broadcast, .barrier = barrier, .close = close_mpi };
    MPI_Comm_rank(MPI_COMM_WORLD, &m->door.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &m->door.size);
    m->fail = fail;
    m->real = sizeof(float) == 8 ? MPI_DOUBLE : MPI_FLOAT;
    m->owns = !running;
    *out = &m->door;
    return BM_OK;
}
