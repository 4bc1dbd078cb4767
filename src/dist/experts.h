/* src/dist/experts.h - experts shared out among ranks.  Room: dist.
 *
 * Rank r computes experts [X*r/ranks, X*(r+1)/ranks) of every layer for the rows of all ranks: rows travel there
 * after the route and their outputs back (arXiv 2006.16668, section 3.2).  Weights and gradients of every expert still
 * lie on every rank; a rank's gradients of experts it does not compute are 0, so the sum over ranks is right. */
#ifndef BM_DIST_EXPERTS_H
#define BM_DIST_EXPERTS_H
#include "dist/comm.h"
#include "model/model.h"
#pragma GCC visibility push(hidden)

typedef struct bm_expert_ranks bm_expert_ranks;
/* For bm_pass.experts.  Models whose rows go through one expert (top_k 1), devices that read host memory. */
bm_status bm_expert_ranks_open(bm_expert_ranks **out, const bm_config *c, bm_comm *comm, const bm_backend *be);
bm_expert_door *bm_expert_ranks_door(bm_expert_ranks *e);
bm_status bm_expert_ranks_status(bm_expert_ranks *e);      /* the first failure since the last call */
void      bm_expert_ranks_close(bm_expert_ranks *e);

#pragma GCC visibility pop
#endif
