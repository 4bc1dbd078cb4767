/* src/dist/comm.h - ranks: processes that train one model together.  Room: dist (knows ranks, no network).
 *
 * Every call but rank-local ones is made by all ranks in the same order.  Memory is the host's.  Sums are
 * made in an order that depends on the number of ranks only.  On failure the sentence names the operation;
 * a rank that dies ends the others (MPI's launcher does). */
#ifndef BM_COMM_H
#define BM_COMM_H
#include "base/base.h"
#pragma GCC visibility push(hidden)

typedef struct bm_comm bm_comm;
typedef struct bm_request { void *handle; } bm_request;    /* of something begun; empty: nothing to wait for */
struct bm_comm {
    int rank, size;
    bm_status (*sum)(bm_comm *c, double *x, size_t n);                          /* all ranks get the sums */
    /* Of x (at[size] floats, at[0] = 0), rank r ends with the sum of [at[r], at[r+1]) in place; the rest is undefined. */
    bm_status (*reduce_scatter)(bm_comm *c, float *x, const size_t *at, bm_request *begun);
    bm_status (*all_gather)(bm_comm *c, float *x, const size_t *at, bm_request *begun);   /* rank r gives [at[r], at[r+1]) */
    bm_status (*wait)(bm_comm *c, bm_request *r);
    /* Rows of row_bytes: give[r] rows to rank r, take[r] from it, both in the order of ranks. */
    bm_status (*exchange)(bm_comm *c, const void *from, const int32_t *give, void *to, const int32_t *take, size_t row_bytes);
    bm_status (*exchange_counts)(bm_comm *c, const int32_t *give, int32_t *take, int n);  /* n numbers to and from each rank */
    bm_status (*broadcast)(bm_comm *c, void *x, size_t bytes);                  /* rank 0's */
    bm_status (*barrier)(bm_comm *c);
    void (*close)(bm_comm *c, bm_status s);     /* s a failure: ends all ranks */
};
/* The same for all ranks: a rank's own failure, or that another has failed. */
bm_status bm_comm_agree(bm_comm *c, bm_status s);
/* One rank alone; every call is trivial. */
bm_status bm_comm_open_self(bm_comm **out);
/* MPI when started by mpirun or srun and built in (a shared object opened at run time), else self. */
bm_status bm_comm_open(bm_comm **out);

#pragma GCC visibility pop
#endif
