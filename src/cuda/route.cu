/* route.cu - the experts of each row and the order that groups rows by expert; all of it stays on the device.
 * Room: cuda.  The running rule; how experts are chosen while training: cpu/route.c. */
#include "cuda/steps.cuh"

enum { THREADS = 128, SORTERS = 1024 };
enum { ROUTED = 8, EIGHTS = 8 };        /* experts; eights of a row that a lane holds, where norm or logits are made too */

/* a is a better choice than b: NaN never wins. */
__device__ static bool better(float a, float b) { return a > b || (isnan(b) && !isnan(a)); }

/* The k best of row i with logits l, the lowest index where equal; gates by sigmoid or softmax.  Which was that choice. */
__device__ static int choose_row(const bm_op_route &a, const float *l, int i, int choice) {
    float top = l[0], last = 0;
    int before = -1, found = -1;
#pragma unroll 8
    for (int e = 1; e < a.X; e++) if (better(l[e], top)) top = l[e];
    const float sum = a.rule == BM_ROUTE_SOFTMAX ? gate_sum(l, a.X, top) : 0;
    for (int j = 0; j < a.k; j++) {
        int best = -1;          /* of those that come after `before` in the order of choices */
        float value = 0;
#pragma unroll 8
        for (int e = 0; e < a.X; e++) {
            const float v = l[e];
            if (before >= 0 && (e == before || better(v, last) || (!better(last, v) && e < before))) continue;
            if (best < 0 || better(v, value)) best = e, value = v;
        }
        before = best, last = value;
        if (j == choice) found = best;
        const size_t at = (size_t)j * a.M + i;
        a.expert[at] = best;
        a.gate[at] = a.rule == BM_ROUTE_SIGMOID ? gate_sigmoid(value) : j ? expf(value - top) / sum : 1 / sum;
    }
    return found;
}
/* Zeros past the end. */
__device__ static float4 four_of(const float *row, int k, int K) {
    return k < K ? *(const float4 *)(row + k) : make_float4(0, 0, 0, 0);
}
__global__ void __launch_bounds__(THREADS) choose(bm_op_route a) {
    after_previous();
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i < a.M) choose_row(a, a.logits + (size_t)i * a.X, i, 0);
}

/* Up to 32 experts, choice `choice`, by a block: a warp counts and places a run of rows, the first lane of an expert for it.  own: the
 * expert of a thread's row where each has one at most. */
__device__ static void group_rows(const bm_op_route &a, int choice, int own) {
    __shared__ int count[SORTERS / 32][32];
    const int32_t *expert = a.expert + (size_t)choice * a.M;
    int32_t *order = a.order + (size_t)choice * a.M, *first = a.first + (size_t)choice * (a.X + 1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, run = (a.M + SORTERS - 1) / SORTERS * 32;
    const int begin = warp * run, end = begin + run < a.M ? begin + run : a.M;
    const int warps = (a.M + run - 1) / run;
    const unsigned below = (1u << lane) - 1;
    const bool at_once = a.M <= SORTERS;
    count[warp][lane] = 0;
    __syncwarp();
    for (int i = begin + lane; i - lane < end; i += 32) {
        const int mine = at_once ? own : i < end ? expert[i] : -1;
        const unsigned same = __match_any_sync(~0u, mine);
        if (mine >= 0 && !(same & below)) count[warp][mine] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    if (!warp) {                /* where each warp's rows of each expert begin */
        int total = 0, before = 0;
        for (int w = 0; w < warps; w++) total += count[w][lane];
        for (int e = 0; e < a.X; e++) {
            const int of = __shfl_sync(~0u, total, e);
            if (e < lane) before += of;
        }
        if (lane < a.X) first[lane] = before;
        if (lane == a.X - 1) first[a.X] = before + total;
        for (int w = 0; w < warps; w++) {
            const int own = count[w][lane];
            count[w][lane] = before;
            before += own;
        }
    }
    __syncthreads();
    for (int i = begin + lane; i - lane < end; i += 32) {
        const int mine = at_once ? own : i < end ? expert[i] : -1;
        const unsigned same = __match_any_sync(~0u, mine);
        if (mine >= 0) order[count[warp][mine] + __popc(same & below)] = i;
        __syncwarp();
        if (mine >= 0 && !(same & below)) count[warp][mine] += __popc(same);
        __syncwarp();
    }
}
/* Up to SORTERS rows are chosen for by their threads before, unless they are `chosen`. */
__global__ void __launch_bounds__(SORTERS) group_few(bm_op_route a, bool chosen) {
    after_previous();
    const int i = (int)threadIdx.x, choice = (int)blockIdx.x;
    const int32_t *expert = a.expert + (size_t)choice * a.M;
    group_rows(a, choice, a.M > SORTERS || i >= a.M ? -1 : chosen ? expert[i] : choose_row(a, a.logits + (size_t)i * a.X, i, choice));
}

/* Of a row to be normed, what a thread needs besides x. */
typedef struct held { float4 r[NORM_HELD], w[NORM_HELD]; } held;
/* A thread's j-th four of D. */
__device__ static int four_at(int j, int D) {
    const int threads = norm_threads(D);
    return (int)threadIdx.x < threads ? 4 * (int)(threadIdx.x + j * threads) : D;
}
/* Past the first cache, where what was there before may lie. */
__device__ static void ask_residual(const bm_op_norm &a, int i, held &h) {
#pragma unroll
    for (int j = 0; j < NORM_HELD; j++) {
        const int k = four_at(j, a.D);
        h.r[j] = a.residual && k < a.D ? __ldcg((const float4 *)(a.residual + (size_t)i * a.D + k)) : make_float4(0, 0, 0, 0);
    }
}
/* Row i as norm_rows makes it (norm.cu), RMSNorm; also into y (D). */
__device__ static void norm_row(const bm_op_norm &a, int i, const held &h, uint16_t *half, float *y) {
    const size_t at = (size_t)i * a.D;
    float4 s[NORM_HELD];
    float square = 0;
#pragma unroll
    for (int j = 0; j < NORM_HELD; j++) s[j] = a.x ? four_of(a.x + at, four_at(j, a.D), a.D) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < NORM_HELD; j++) {
        s[j] = plus(s[j], h.r[j]);
        square += norm_squares(s[j]);
    }
    const float scale = norm_scale(block_sum(square) / (float)a.D, a.eps);
#pragma unroll
    for (int j = 0; j < NORM_HELD; j++) {
        const int k = four_at(j, a.D);
        if (k >= a.D) continue;
        const float4 v = make_float4(norm_out(s[j].x, scale, h.w[j].x, 0), norm_out(s[j].y, scale, h.w[j].y, 0),
                                     norm_out(s[j].z, scale, h.w[j].z, 0), norm_out(s[j].w, scale, h.w[j].w, 0));
        *(float4 *)(y + k) = v;
        if (a.sum) *(float4 *)(a.sum + at + k) = s[j];
        *(float4 *)(a.y + at + k) = v;
        if (half) *(uint2 *)(half + at + k) = halves(v);
    }
    __syncthreads();
}

/* The same by a warp, in the same order: weight (D), x, residual and y (D) in shared memory; a.y may be NULL. */
__device__ static void
norm_by_warp(const bm_op_norm &a, int i, const float4 *weight, const float4 *x, const float4 *residual, uint16_t *half, float4 *y) {
    const size_t at = (size_t)i * a.D;
    const int lane = threadIdx.x % 32, warps = norm_threads(a.D) / 32;
    float even = 0, odd = 0;        /* as block_sum adds what four warps have */
    for (int v = 0; v < warps; v++) {
        float square = 0;
        for (int k = lane + 32 * v; 4 * k < a.D; k += 32 * warps) {
            const float4 sum = plus(x[k], residual[k]);
            y[k] = sum;
            if (a.sum) ((float4 *)(a.sum + at))[k] = sum;
            square += norm_squares(sum);
        }
        (v % 2 ? odd : even) += warp_sum(square);
    }
    const float scale = norm_scale((even + odd) / (float)a.D, a.eps);
    __syncwarp();
#pragma unroll 4
    for (int k = lane; 4 * k < a.D; k += 32) {
        const float4 v = y[k], w = weight[k];
        const float4 out = make_float4(norm_out(v.x, scale, w.x, 0), norm_out(v.y, scale, w.y, 0), norm_out(v.z, scale, w.z, 0),
                                       norm_out(v.w, scale, w.w, 0));
        y[k] = out;
        if (a.y) ((float4 *)(a.y + at))[k] = out;
        if (half) ((uint2 *)(half + at))[k] = halves(out);
    }
    __syncwarp();
}
/* On its way, row i of M. */
__device__ static void fetch_row(const bm_op_norm &a, int i, int M, float4 *x, float4 *residual) {
    const size_t at = (size_t)i * a.D;
    for (int k = threadIdx.x % 32; i < M && 4 * k < a.D; k += 32) {
        if (a.x) copy_four(x + k, (const float4 *)(a.x + at) + k);
        if (a.residual) copy_four(residual + k, (const float4 *)(a.residual + at) + k);
    }
}
/* What was written before is there for who adds later; how many had. */
__device__ static unsigned add_one(unsigned *count) {
    unsigned was;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(was) : "l"(count) : "memory");
    return was;
}
/* Block i makes the logits of row i, a warp each, and chooses; the last block to end groups, and leaves *ended 0.  A logit is
 * summed as by `dots` (gemm.cu).  NORMS: of the row that it norms before; early: whose residual is there before the kernel before. */
template <bool NORMS> __global__ void __launch_bounds__(32 * ROUTED)
route_rows(bm_op_norm n, bool early, uint16_t *half, bm_op_linear l, const float *w, int K, bm_op_route a, unsigned *ended) {
    extern __shared__ float4 normed[];
    __shared__ float logit[ROUTED];
    __shared__ bool last;
    const int lane = threadIdx.x % 32, e = threadIdx.x / 32, i = blockIdx.x;
    const float *row = w + (size_t)e * K, *x = NORMS ? (const float *)normed : l.x + (size_t)i * l.ldx;
    float4 v[EIGHTS][2], u[EIGHTS][2];
    float sum = 0;
    next_may_start();
#pragma unroll
    for (int s = 0; s < EIGHTS; s++)
        for (int h = 0; h < 2; h++) v[s][h] = four_of(row, 8 * (lane + 32 * s) + 4 * h, K);
    if (NORMS) {
        held of;
#pragma unroll
        for (int j = 0; j < NORM_HELD; j++) of.w[j] = four_of(n.weight, four_at(j, n.D), n.D);
        if (early) ask_residual(n, i, of);
        previous_done();
        if (!early) ask_residual(n, i, of);
        norm_row(n, i, of, half, (float *)normed);
    } else previous_done();
#pragma unroll
    for (int s = 0; s < EIGHTS; s++)
        for (int h = 0; h < 2; h++) u[s][h] = four_of(x, 8 * (lane + 32 * s) + 4 * h, K);
#pragma unroll
    for (int s = 0; s < EIGHTS; s++)
        for (int h = 0; h < 2; h++) sum = dot_four(v[s][h], u[s][h], sum);
    sum = warp_sum(sum);
    if (!lane) l.y[(size_t)i * a.X + e] = logit[e] = sum + (l.bias ? l.bias[e] : 0);
    __syncthreads();
    const int best = warp_largest(logit, a.X);
    if (!threadIdx.x) {
        a.expert[i] = best;
        last = add_one(ended) + 1 == gridDim.x;
    }
    if (e + 1 == a.X && !lane) a.gate[i] = gate_best(a.rule == BM_ROUTE_SOFTMAX, logit, a.X, best);
    __syncthreads();
    if (!last) return;
    if (!threadIdx.x) *ended = 0;
    group_rows(a, 0, (int)threadIdx.x < a.M ? __ldcg(a.expert + threadIdx.x) : -1);
}

/* Many rows, a warp one after another: norm, logits and choice, as by route_rows.  Shared memory: weights by expert, half of eight k,
 * and k / 8; the norm's; of each warp x and residual of the next row, and y of this, then its logits. */
enum { LEAST_WARPS = 4, MOST_WARPS = 12 };
__global__ void __launch_bounds__(32 * MOST_WARPS, 1)
norm_routes(const bm_op_norm n, uint16_t *half, const bm_op_linear l, const float4 *w, const bm_op_route a) {
    extern __shared__ float4 memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (int)blockDim.x / 32, eights = n.D / 8, fours = n.D / 4, X = a.X;
    const int first = (int)blockIdx.x * warps + warp, apart = (int)gridDim.x * warps;
    float4 *weight = memory + X * fours, *x = weight + (1 + 3 * warp) * fours, *residual = x + fours, *y = residual + fours;
    next_may_start();
    for (int i = threadIdx.x; i < X * fours; i += 32 * warps) {
        const int e = i / fours, k = i % fours;
        copy_four(&memory[(2 * e + k % 2) * eights + k / 2], w + i);
    }
    for (int k = threadIdx.x; k < fours; k += 32 * warps) copy_four(weight + k, (const float4 *)n.weight + k);
    for (int k = lane; k < fours; k += 32) x[k] = residual[k] = make_float4(0, 0, 0, 0);
    words_wait();
    __syncthreads();
    previous_done();
    fetch_row(n, first, a.M, x, residual);
    for (int i = first; i < a.M; i += apart) {
        words_wait();
        __syncwarp();
        norm_by_warp(n, i, weight, x, residual, half, y);
        fetch_row(n, i + apart, a.M, x, residual);
        float sum[ROUTED] = {};
        for (int k = lane; k < eights; k += 32) {
            const float4 v[2] = { y[2 * k], y[2 * k + 1] };
#pragma unroll
            for (int e = 0; e < ROUTED; e++)
#pragma unroll
                for (int h = 0; h < 2; h++) sum[e] = dot_four(memory[(2 * (e < X ? e : 0) + h) * eights + k], v[h], sum[e]);
        }
        float *logit = (float *)y;
        __syncwarp();
#pragma unroll
        for (int e = 0; e < ROUTED; e++) {
            const float v = warp_sum(sum[e]);
            if (lane == e && e < X) l.y[(size_t)i * X + e] = logit[e] = v + (l.bias ? l.bias[e] : 0);
        }
        __syncwarp();
        const int best = warp_largest(logit, X);
        if (!lane) {
            a.expert[i] = best;
            a.gate[i] = gate_best(a.rule == BM_ROUTE_SOFTMAX, logit, X, best);
        }
    }
}

/* Groups of up to SORTERS rows, each of one of ROUTED experts at most, and the rows (D) themselves in their order; a block moves MOVED. */
enum { MOVERS = 256, MOVED = 8, PASSES = SORTERS / MOVERS };
__global__ void __launch_bounds__(MOVERS) group_moves(bm_op_route a, const uint16_t *half, int D, uint16_t *to) {
    __shared__ int all[MOVERS / 32][ROUTED], before[MOVERS / 32][ROUTED], place[MOVED];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i0 = (int)blockIdx.x * MOVED, rows = min((int)MOVED, a.M - i0);
    const int eights = D / 8;
    int expert[PASSES];
    uint4 v[MOVED];
    after_previous();
#pragma unroll
    for (int j = 0; j < PASSES; j++) {
        const int i = j * MOVERS + (int)threadIdx.x;
        expert[j] = i < a.M ? a.expert[i] : -1;
    }
    const int own = warp == 0 && lane < rows ? a.expert[i0 + lane] : -1;
#pragma unroll
    for (int r = 0; r < MOVED; r++)
        if (r < rows && (int)threadIdx.x < eights) v[r] = ((const uint4 *)half)[(size_t)(i0 + r) * eights + threadIdx.x];
#pragma unroll
    for (int e = 0; e < ROUTED; e++) {
        int n = 0, m = 0;
#pragma unroll
        for (int j = 0; j < PASSES; j++) {
            n += __popc(__ballot_sync(~0u, expert[j] == e));
            m += __popc(__ballot_sync(~0u, expert[j] == e && j * MOVERS + (int)threadIdx.x < i0));
        }
        if (!lane) all[warp][e] = n, before[warp][e] = m;
    }
    __syncthreads();
    if (!warp) {
        int n = 0, m = 0, first = 0;
        for (int w = 0; lane < ROUTED && w < MOVERS / 32; w++) n += all[w][lane], m += before[w][lane];
        for (int e = 0; e < ROUTED; e++) {
            const int of = __shfl_sync(~0u, n, e);
            if (e < lane) first += of;
        }
        if (!blockIdx.x && lane <= a.X) a.first[lane] = first;
        const unsigned same = __match_any_sync(~0u, own);
        const int at = __shfl_sync(~0u, first + m, max(own, 0)) + __popc(same & ((1u << lane) - 1));
        if (own >= 0) a.order[place[lane] = at] = i0 + lane;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < MOVED; r++)
        if (r < rows && (int)threadIdx.x < eights) ((uint4 *)to)[(size_t)place[r] * eights + threadIdx.x] = v[r];
}

/* Any number: a warp counts and places the rows of an expert, in order. */
__global__ void __launch_bounds__(SORTERS) group(bm_op_route a) {
    after_previous();
    const int32_t *expert = a.expert + (size_t)blockIdx.x * a.M;
    int32_t *order = a.order + (size_t)blockIdx.x * a.M, *first = a.first + (size_t)blockIdx.x * (a.X + 1);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int e = warp; e < a.X; e += SORTERS / 32) {
        int n = 0;
        for (int i = lane; i < (a.M + 31) / 32 * 32; i += 32) n += __popc(__ballot_sync(~0u, i < a.M && expert[i] == e));
        if (!lane) first[e + 1] = n;
    }
    __syncthreads();
    if (!threadIdx.x) {
        first[0] = 0;
        for (int e = 0; e < a.X; e++) first[e + 1] += first[e];
    }
    __syncthreads();
    for (int e = warp; e < a.X; e += SORTERS / 32) {
        int at = first[e];
        for (int i = lane; i < (a.M + 31) / 32 * 32; i += 32) {
            const bool mine = i < a.M && expert[i] == e;
            const unsigned all = __ballot_sync(~0u, mine);
            if (mine) order[at + __popc(all & ((1u << lane) - 1))] = i;
            at += __popc(all);
        }
    }
}

/* Choice, if there is none yet, and groups. */
static void route(bm_cuda *c, const bm_op_route *a, bool chosen) {
    const bool few = a->X <= 32, at_once = few && a->M <= SORTERS;
    if (!at_once && !chosen) bm_cuda_start(c, choose, blocks_of((size_t)a->M, THREADS), THREADS, 0, *a);
    if (few) bm_cuda_start(c, group_few, a->k, at_once ? 32 * blocks_of((size_t)a->M, 32) : SORTERS, 0, *a, chosen);
    else bm_cuda_start(c, group, a->k, SORTERS, 0, *a);
    bm_cuda_check(c, cudaGetLastError(), "routing");
}
void bm_cuda_route(bm_backend *b, const bm_op_route *a) {
    bm_cuda *c = cuda_of(b);
    if (!c->failed && a->M) route(c, a, false);
}

/* fit: warps whose rows there is shared memory for. */
static bool route_many(bm_cuda *c, const bm_op_norm *n, uint16_t *half, const bm_op_linear *l, const bm_op_route *a, const bm_op_experts *e,
                       int fit) {
    const int blocks = c->chip.multiProcessorCount, share = blocks_of((size_t)a->M, (size_t)blocks);
    const int most = fit < MOST_WARPS ? fit : MOST_WARPS, warps = share < LEAST_WARPS ? LEAST_WARPS : share < most ? share : most;
    const int wanted = blocks_of((size_t)a->M, (size_t)warps);
    const size_t shared = sizeof(float) * (size_t)(a->X + 1 + 3 * warps) * n->D;
    bm_op_norm rounded = *n;
    if (e && e->x == n->y && bm_cuda_experts_gather(c, e)) rounded.y = NULL;
    cudaFuncSetAttribute(norm_routes, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    bm_cuda_start(c, norm_routes, wanted < blocks ? wanted : blocks, 32 * warps, shared, rounded, half, *l, (const float4 *)l->w->data, *a);
    if (rounded.y || a->M > SORTERS) route(c, a, true);
    else bm_cuda_start(c, group_moves, blocks_of((size_t)a->M, MOVED), MOVERS, 0, *a, half, n->D, bm_cuda_grouped(c, a->M, n->D));
    return bm_cuda_check(c, cudaGetLastError(), "routing");
}
bool bm_cuda_router(bm_backend *b, const bm_op_norm *n, const bm_op_linear *l, const bm_op_route *a, const bm_op_experts *e) {
    bm_cuda *c = cuda_of(b);
    const int K = l->w->cols;
    uintptr_t all = (uintptr_t)l->x | (uintptr_t)l->w->data | (uintptr_t)(4 * l->ldx);
    if (n) all |= (uintptr_t)n->x | (uintptr_t)n->residual | (uintptr_t)n->weight | (uintptr_t)n->sum;
    if (c->failed || l->w->type != BM_F32 || l->y != a->logits || l->accumulate) return false;
    const bool few = a->M <= 32 * a->X;
    const int rows = (int)(c->chip.sharedMemPerBlockOptin / (sizeof(float) * (size_t)K)), fit = (rows - a->X - 1) / 3;
    if (a->k != 1 || a->X > ROUTED || (!few && (!n || fit < LEAST_WARPS))) return false;
    if (K % 8 || K > 256 * EIGHTS || all % 16) return false;
    if (n && (n->y != l->x || n->D != K || l->ldx != K || n->M != a->M || n->centered || n->bias || (few && norm_threads(K) > 32 * a->X)))
        return false;
    uint16_t *half = n ? bm_cuda_rounded(c, n->y, n->M, K) : NULL;
    if (!few) return route_many(c, n, half, l, a, e, fit);
    const bool early = n && bm_cuda_reads_early(c, n);
    bm_cuda_start(c, n ? route_rows<true> : route_rows<false>, a->M, 32 * a->X, n ? 4 * (size_t)K : 0, n ? *n : (bm_op_norm){}, early,
                  half, *l, (const float *)l->w->data, K, *a, &c->rows->blocks);
    return bm_cuda_check(c, cudaGetLastError(), "routing");
}
