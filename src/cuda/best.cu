/* best.cu - the largest logit of each row.  Room: cuda.
 * Of few rows several blocks have each, the last of which to end says what they found; a product that nothing else
 * reads leaves keys of its rows instead of logits. */
#include "cuda/cuda.h"

enum { THREADS = 512, BLOCKS = 32, TOGETHER = 1024 };       /* at most: blocks of a row, of all rows that share */

/* Row blockIdx.y, of which block blockIdx.x takes every gridDim.x-th piece; between: what blocks of a row share, zeros
 * before and after. */
__global__ void __launch_bounds__(THREADS) best_of(bm_op_best a, bool aligned, bm_cuda_row *between) {
    after_previous();
    __shared__ unsigned long long part[THREADS / 32];
    const float *l = a.logits + (size_t)blockIdx.y * a.ld;
    const int first = blockIdx.x * THREADS + threadIdx.x, all = gridDim.x * THREADS, fours = aligned ? a.V / 4 : 0;
    unsigned long long key = 0;
#pragma unroll 4
    for (int k = first; k < fours; k += all) {
        const float4 v = ((const float4 *)l)[k];
        key = max(key, max(max(logit_key(v.x, 4 * k), logit_key(v.y, 4 * k + 1)),
                           max(logit_key(v.z, 4 * k + 2), logit_key(v.w, 4 * k + 3))));
    }
    for (int k = 4 * fours + first; k < a.V; k += all) key = max(key, logit_key(l[k], k));
    key = largest_key<32>(key);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = key;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < THREADS / 32; i++) key = max(key, part[i]);
    if (gridDim.x > 1) {
        bm_cuda_row *r = between + blockIdx.y;
        atomicMax(&r->key, key);
        __threadfence();
        if (atomicAdd(&r->blocks, 1) + 1 < gridDim.x) return;
        key = atomicExch(&r->key, 0);
        r->blocks = 0;
    }
    tell_key(key, a.best, a.again, blockIdx.y);
}

/* Of keys that a product raised. */
__global__ void __launch_bounds__(THREADS) best_of_keys(bm_op_best a, bm_cuda_row *row) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    after_previous();
    if (i >= a.M) return;
    tell_key(row[i].key, a.best, a.again, i);
    row[i].key = 0;
}
bool bm_cuda_make_keys(bm_cuda *c, bm_product *p, const bm_op_best *a) {
    if (!a->only || a->logits != p->y || a->M != p->M || a->ld != p->N || p->accumulate) return false;
    if (a->M > BM_CUDA_BEST_ROWS || !bm_cuda_is_wide(c, p)) return false;
    p->best = c->rows;
    p->ids = a->V;
    return true;
}
void bm_cuda_tell_keys(bm_cuda *c, const bm_op_best *a) {
    if (c->failed) return;
    bm_cuda_start(c, best_of_keys, blocks_of((size_t)a->M, THREADS), THREADS, 0, *a, c->rows);
    bm_cuda_check(c, cudaGetLastError(), "best");
}

void bm_cuda_best(bm_backend *b, const bm_op_best *a) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M) return;
    const int pieces = blocks_of((size_t)a->V, THREADS), most = pieces < BLOCKS ? pieces : BLOCKS, share = TOGETHER / a->M;
    const int blocks = a->M > BM_CUDA_BEST_ROWS ? 1 : share < most ? share : most;
    const bool aligned = a->ld % 4 == 0 && (uintptr_t)a->logits % 16 == 0;
    bm_cuda_start(c, best_of, dim3(blocks, a->M), THREADS, 0, *a, aligned, c->rows);
    bm_cuda_check(c, cudaGetLastError(), "best");
}
