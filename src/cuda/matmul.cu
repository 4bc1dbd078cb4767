/* matmul.cu - products of many rows with bf16 weights and activations on Hopper's tensor cores.  Room: cuda.
 *
 * Activations are rounded to bf16 first, gathered in the order of groups.  A block takes one tile of outputs after another: two
 * threads have the copy engine bring 64 columns of k of activations and weights at a time into a ring of stages, and warpgroups
 * of 64 rows each multiply them (wgmma).  Two blocks side by side bring half of their rows each, for both: apart, the second cache
 * would bound large products.  An output sums its k in order, 16 at a time, whatever rows are beside it.
 * Up to 128 rows, of one matrix with few columns up to 1,024: few.cu; other chips, types and fewer rows: gemm.cu. */
#include "cuda/hopper.cuh"
#include <limits.h>
#include <stdlib.h>

enum { PAPER = 16 * 40 * 4 };                   /* bytes in which a warp turns its outputs round */

struct bm_cuda_wide {
    PFN_cuTensorMapEncodeTiled_v12000 encode;
    void *memory; size_t bytes;                 /* what follows lies in it */
    float *squares; uint16_t *normed;           /* of FEW rows between a product and the next: a norm's sums, rows times its weights */
    uint16_t *narrow;                           /* those that a product with few columns left, up to NARROWEST each */
    uint16_t *half; size_t room;                /* activations as bf16, and how many fit: rows by widest */
    int rows, widest;
    const float *of; int cols;                  /* whose rows are there, until a product has read them; else NULL */
    const uint16_t *there; bool grouped;        /* grouped: in the order of groups */
};

/* A tile is 64 GROUPS rows by BN columns of w.  CTAS blocks make tiles beside each other and share their rows of x. */
template <int BN, int GROUPS, int CTAS> struct shape {
    enum { ROWS = 64 * GROUPS, THREADS = 128 * GROUPS + 128, BYTES = (ROWS + BN) * LINE, BESIDE = 4 * GROUPS * PAPER + 1024,
           STAGES = (226 * 1024 - BESIDE) / BYTES, SHARED = STAGES * BYTES + BESIDE };
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* To the same place in both blocks, each barrier told of its own. */
__device__ static void bring_both(void *to, const CUtensorMap *map, uint64_t *b, int k, int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3, %4}], [%5], %6;"
                 :: "r"(address(to)), "l"(map), "r"(k), "r"(row), "r"(0), "r"(address(b)), "h"((uint16_t)3) : "memory");
}

/* ---- two threads bring, warpgroups multiply ------------------------------------------------ */

/* By one thread: rows of x, `box` at a time as far as the tile has some, or those of w. */
template <int BN, int GROUPS, int CTAS, int END> __device__ static void
bring_tiles(const bm_product &p, const ending &end, const ring &r, int rank, bool rows, int box, const CUtensorMap *x,
            const CUtensorMap *w, const CUtensorMap *gate) {
    typedef shape<BN, GROUPS, CTAS> S;
    enum { COLS = END == GATED ? BN / 2 : BN };
    tile at = { -1 };
    turn now = { 0, 1 };
    for (int t = blockIdx.x / CTAS; find(p, end.apart, &at, t, S::ROWS, COLS * CTAS); t += gridDim.x / CTAS) {
        const int col = at.col + rank * COLS, left = at.end - at.row < S::ROWS ? at.end - at.row : S::ROWS;
        const int brought = (left + CTAS * box - 1) / (CTAS * box) * CTAS * box;
        for (int k = 0; k < p.K; k += DEPTH, go_on<S::STAGES>(&now)) {
            uint8_t *to = r.stage + now.stage * S::BYTES;
            uint64_t *full = &r.full[now.stage];
            barrier_wait(&r.empty[now.stage], now.odd);
            if (rows) {
                for (int i = rank * box; i < brought; i += CTAS * box)
                    if (CTAS == 1) bring(to + i * LINE, x, full, k, at.row + i, 0);
                    else bring_both(to + i * LINE, x, full, k, at.row + i);
                continue;
            }
            barrier_expect(full, (brought + BN) * LINE);
            to += S::ROWS * LINE;
            if (END == GATED) bring(to, gate, full, k, col, at.e);
            bring(to + (BN - COLS) * LINE, w, full, k, col, at.e);
        }
    }
    if (rows) next_may_start();     /* earlier, its blocks would crowd where this kernel's end first */
}

/* A warp's 16 rows from row0 on, 32 columns at a time: a lane holds two columns of each eight of rows lane / 4 and 8 on, and
 * writes 16 bytes of a row with its neighbours beside it. */
template <int BN> __device__ static void
put_rows(const bm_product &p, uint16_t *copy, const tile &at, int row0, int col0, const float (&c)[BN / 2], float *paper) {
    enum { LD = 40 };
    const int lane = threadIdx.x % 32, own = lane / 4, n0 = 2 * (lane % 4), far = 4 * (lane % 8);
    const bool whole = !p.accumulate && p.ldy % 4 == 0 && (uintptr_t)p.y % 16 == 0 && col0 + BN <= p.N;
    float scale[2], *y[4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = row0 + own + 8 * h;
        scale[h] = p.scale && i < at.end ? p.scale[p.to ? p.to[i] : i] : 1;
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = row0 + lane / 8 + 4 * r;
        y[r] = i < at.end ? p.y + (size_t)(p.to ? p.to[i] : i) * p.ldy + col0 + far : NULL;
    }
#pragma unroll
    for (int j = 0; j < BN / 8; j += 4) {
        const int eights = BN / 8 - j < 4 ? BN / 8 - j : 4;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < eights; k++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float *v = c + 4 * (j + k) + 2 * h;
                const int n = 8 * k + n0;
                *(float2 *)(paper + (own + 8 * h) * LD + n) = biased(p, at.e, col0 + 8 * j + n, v[0], v[1], scale[h]);
            }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float4 v = *(const float4 *)(paper + (lane / 8 + 4 * r) * LD + far);
            const int n = col0 + 8 * j + far;
            if (!y[r] || far >= 8 * eights) continue;
            if (whole) *(float4 *)(y[r] + 8 * j) = v;
            else put_four(p, y[r] + 8 * j, n, v);
            if (copy && n < p.N) *(uint2 *)(copy + (size_t)(row0 + lane / 8 + 4 * r) * p.N + n) = halves(v);
        }
    }
}
/* The same of hidden columns, of which there are whole eights. */
template <int BN, int END, bool GELU> __device__ static void
put_hidden(const bm_product &p, const ending &end, const tile &at, int row0, int col0, const float (&c)[BN / 2],
           uint32_t *paper) {
    enum { COLS = END == GATED ? BN / 2 : BN, LD = 20 };
    const int lane = threadIdx.x % 32, own = lane / 4, pair = lane % 4;
#pragma unroll
    for (int j = 0; j < COLS / 8; j += 4) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int h = 0; h < 2; h++)
            {
                const float *v = c + 4 * (j + k) + 2 * h, *up = END == GATED ? v + BN / 4 : v;
                paper[(own + 8 * h) * LD + 4 * k + pair] = hidden<END, GELU>(p, end, at.e, col0 + 8 * (j + k) + 2 * pair,
                                                                             make_float2(v[0], v[1]), make_float2(up[0], up[1]));
            }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = row0 + own + 8 * h, n = col0 + 8 * (j + pair);
            const uint4 v = *(const uint4 *)(paper + (own + 8 * h) * LD + 4 * pair);
            if (i < at.end && n < p.N) *(uint4 *)(end.act + (size_t)i * p.N + n) = v;
        }
    }
}
/* The keys of these rows, raised to those of their largest outputs. */
template <int BN> __device__ static void raise_keys(const bm_product &p, const tile &at, int row0, int col0, const float (&c)[BN / 2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = row0 + lane / 4 + 8 * h;
        largest of = { -INFINITY };
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            const int n = col0 + 8 * j + 2 * (lane % 4);
            const float2 v = biased(p, at.e, n, c[4 * j + 2 * h], c[4 * j + 2 * h + 1], 1);
            compare(p, &of, v.x, n);
            compare(p, &of, v.y, n + 1);
        }
        const unsigned long long key = largest_key<4>(logit_key(of.v, of.column));
        if (lane % 4 == 0 && i < at.end) atomicMax(&p.best[i].key, key);
    }
}

template <int BN, int GROUPS, int CTAS, int END> __device__ static void
multiply_tiles(const bm_product &p, const ending &end, const ring &r, int rank) {
    typedef shape<BN, GROUPS, CTAS> S;
    enum { COLS = END == GATED ? BN / 2 : BN };
    const int own = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32, steps = (p.K + DEPTH - 1) / DEPTH;
    float *paper = (float *)(r.stage + S::STAGES * S::BYTES + threadIdx.x / 32 * PAPER), c[BN / 2];
    tile at = { -1 };
    turn now = { 0, 0 };
    for (int t = blockIdx.x / CTAS; find(p, end.apart, &at, t, S::ROWS, COLS * CTAS); t += gridDim.x / CTAS) {
        const bool any = at.row + own < at.end;     /* else the warpgroup's rows belong to nobody */
        int last = 0;
        for (int k = 0; k < steps; k++, last = now.stage, go_on<S::STAGES>(&now)) {
            const uint8_t *x = r.stage + now.stage * S::BYTES, *w = x + S::ROWS * LINE;
            barrier_wait(&r.full[now.stage], now.odd);
            if (any) {
                const uint32_t mx = matrix(x + own * LINE), mw = matrix(w);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < DEPTH / 16; i++) multiply(c, mx + 2 * i, mw + 2 * i, k || i);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            }
            if (k && lane < CTAS) barrier_arrive(&r.empty[last], lane);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane < CTAS) barrier_arrive(&r.empty[last], lane);
        if (!any) continue;
        const int row = at.row + 16 * (threadIdx.x / 32), col = at.col + rank * COLS;
        if constexpr (END == KEYS) raise_keys<BN>(p, at, row, col, c);
        else if constexpr (END == PLAIN) put_rows<BN>(p, end.copy, at, row, col, c, paper);
        else if (end.is_gelu) put_hidden<BN, END, true>(p, end, at, row, col, c, (uint32_t *)paper);
        else put_hidden<BN, END, false>(p, end, at, row, col, c, (uint32_t *)paper);
    }
}
#endif

/* known: is_known(). */
template <int BN, int GROUPS, int CTAS, int END> __global__ void __launch_bounds__(shape<BN, GROUPS, CTAS>::THREADS, 1)
wide(const __grid_constant__ bm_product p, const ending end, int box, bool known, const __grid_constant__ CUtensorMap x,
     const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap gate) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef shape<BN, GROUPS, CTAS> S;
    extern __shared__ uint8_t memory[];
    __shared__ uint64_t full[S::STAGES], empty[S::STAGES];
    const ring r = { memory + (1024 - address(memory) % 1024) % 1024, full, empty };
    const int rank = CTAS == 1 ? 0 : rank_in_cluster();
    if (!threadIdx.x) {
        for (int s = 0; s < S::STAGES; s++) {
            barrier_make(&full[s], 1);
            barrier_make(&empty[s], 4 * GROUPS * CTAS);
        }
        barriers_made();
    }
    __syncthreads();
    cluster_meet();
    if (threadIdx.x >= 128 * GROUPS) {      /* registers go to where outputs are held */
        if (GROUPS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(GROUPS == 3 ? 32 : 40));
        const int one = threadIdx.x - 128 * GROUPS;
        if (one == 0 || (one == 32 && !known)) previous_done();
        if (one == 0 || one == 32) bring_tiles<BN, GROUPS, CTAS, END>(p, end, r, rank, one == 0, box, &x, &w, &gate);
    } else {
        previous_done();
        if (GROUPS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(GROUPS == 3 ? 160 : 232));
        multiply_tiles<BN, GROUPS, CTAS, END>(p, end, r, rank);
    }
    __syncwarp();
    cluster_meet();             /* the other block's memory is written to until it is done */
#endif
}

/* ---- activations as bf16 ------------------------------------------------------------------- */

enum { ROUNDERS = 256, APIECE = 8 };

/* Rows from[0], from[1], ... of x, to the last of the groups: a thread rounds eight elements, or copies what is there of them. */
__global__ void __launch_bounds__(ROUNDERS) round_rows(const bm_product p, bool aligned, const uint16_t *there, uint16_t *half) {
    after_previous();
    const int eight = (int)(blockIdx.x * ROUNDERS + threadIdx.x), i = eight / (p.K / 8), k = eight % (p.K / 8) * 8;
    if (i >= (p.first ? p.first[p.X] : p.M)) return;
    const size_t at = (size_t)(p.from ? p.from[i] : i) * p.ldx + k;
    uint4 *to = (uint4 *)(half + (size_t)i * p.K + k);
    if (there) {
        *to = *(const uint4 *)(there + at);
        return;
    }
    const float *in = p.x + at;
    float4 v[2];
    if (aligned) v[0] = *(const float4 *)in, v[1] = *(const float4 *)(in + 4);
    else v[0] = make_float4(in[0], in[1], in[2], in[3]), v[1] = make_float4(in[4], in[5], in[6], in[7]);
    const uint2 a = halves(v[0]), b = halves(v[1]);
    *to = make_uint4(a.x, a.y, b.x, b.y);
}

uint16_t *bm_cuda_rounded(bm_cuda *c, const float *x, int M, int cols) {
    bm_cuda_wide *w = c->wide;
    if (!w) return NULL;
    const bool wanted = M >= LEAST && (size_t)M * cols <= w->room;
    w->of = wanted ? x : NULL;
    w->cols = cols;
    w->there = w->half, w->grouped = false;
    return wanted ? w->half : NULL;
}

/* Activations as the kernel before left them, or rounded in the order of groups. */
static void find_activations(bm_cuda *c, job *j) {
    bm_cuda_wide *w = c->wide;
    const bm_product *p = j->p;
    j->x = p->half, j->ldx = (size_t)p->K;
    if (p->half) return;
    const bool near = !p->from || (p->M <= FEW && p->M <= APIECE * p->X);       /* else gathering them first is faster */
    const bool there = w->of == p->x && p->ldx == (size_t)w->cols;
    w->of = NULL;
    if (there && (near || w->grouped)) {
        j->x = w->there, j->ldx = p->ldx, j->from = w->grouped ? NULL : p->from;
        return;
    }
    const bool aligned = ((uintptr_t)p->x | 4 * p->ldx) % 16 == 0;
    const int blocks = blocks_of((size_t)p->M * (p->K / 8), ROUNDERS);
    const bool gathers = there && w->there == w->half && bm_cuda_gathers(c, p);
    uint16_t *to = w->half + (gathers ? (size_t)p->M * p->K : 0);
    bm_cuda_start(c, round_rows, blocks, ROUNDERS, 0, *p, aligned, gathers ? w->half : NULL, to);
    j->x = to;
}
uint16_t *bm_cuda_grouped(bm_cuda *c, int M, int cols) {
    bm_cuda_wide *w = c->wide;
    w->grouped = true;
    return (uint16_t *)(w->there = w->half + (size_t)M * cols);
}
bool bm_cuda_gathers(const bm_cuda *c, const bm_product *p) {
    return p->from && p->M > FEW && 2 * (size_t)p->M * p->K <= c->wide->room;
}

/* ---- launches ------------------------------------------------------------------------------ */

/* Rows of a group from which weights are not read once more for its end alone; on average, to which nearly all fit 192.  Columns, and
 * rows of so many, for which few.cu's clusters, which share k, are more blocks. */
enum { APART = 512, SMALL = 160, NARROWEST = 256, THIN = 1024 };

/* Matrices of words (count,rows,columns), `row` and `each` bytes from one to the next, read `box` rows and `depth` columns at a
 * time; zeros past the edges. */
typedef struct words { CUtensorMapDataType type; const void *data; int columns, rows, count, depth; size_t row, each; } words;

static bool describe(const bm_cuda *c, CUtensorMap *map, const words &w, int box, CUtensorMapSwizzle swizzle,
                     CUtensorMapL2promotion promotion) {
    const cuuint64_t size[3] = { (cuuint64_t)w.columns, (cuuint64_t)w.rows, (cuuint64_t)w.count }, stride[2] = { w.row, w.each };
    const cuuint32_t part[3] = { (cuuint32_t)w.depth, (cuuint32_t)box, 1 }, step[3] = { 1, 1, 1 };
    return !c->wide->encode(map, w.type, 3, (void *)(uintptr_t)w.data, size, stride, part, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                            swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
bool bm_cuda_describe_rows(const bm_cuda *c, CUtensorMap *map, const job *j, int box) {
    const size_t row = sizeof *j->x * j->ldx;
    const words w = { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, j->x, j->p->K, j->p->M, 1, DEPTH, row, row * j->p->M };
    return describe(c, map, w, box, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}
static size_t apart(const bm_product *p) { return p->X > 1 ? (size_t)(p->w[1] - p->w[0]) : p->w_stride * p->N; }
bool bm_cuda_describe_weights(const bm_cuda *c, CUtensorMap *map, const bm_product *p, int box,
                              CUtensorMapL2promotion promotion) {
    const words w = { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, p->w[0], p->K, p->N, p->X, DEPTH, p->w_stride, apart(p) };
    return describe(c, map, w, box, CU_TENSOR_MAP_SWIZZLE_128B, promotion);
}
bool bm_cuda_describe_quants(const bm_cuda *c, CUtensorMap *quants, CUtensorMap *scales, const bm_product *p, int box) {
    const int per = p->type == BM_Q8_0 ? 1 : 2;
    const CUtensorMapL2promotion ahead = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    const words q = { CU_TENSOR_MAP_DATA_TYPE_UINT8, p->w[0], p->K / per, p->N, p->X, DEPTH / per, p->w_stride, apart(p) };
    const words s = { CU_TENSOR_MAP_DATA_TYPE_UINT16, p->w[0] + p->K / per, p->K / 32, p->N, p->X, SCALES, p->w_stride, apart(p) };
    return describe(c, quants, q, box, CU_TENSOR_MAP_SWIZZLE_NONE, ahead) &&
           describe(c, scales, s, box, CU_TENSOR_MAP_SWIZZLE_NONE, ahead);
}

/* Whether most groups end within their first tile. */
static bool is_ragged(const bm_product *p) { return p->X > 1 && p->M <= SMALL * p->X; }
template <int BN, int GROUPS, int CTAS, int END> static bool launch(bm_cuda *c, const job *j) {
    typedef shape<BN, GROUPS, CTAS> S;
    enum { COLS = END == GATED ? BN / 2 : BN };
    const auto kernel = wide<BN, GROUPS, CTAS, END>;
    const bm_product *p = j->p;
    CUtensorMap x, w, gate = {};
    const CUtensorMapL2promotion ahead = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
    const int box = is_ragged(p) ? 64 / CTAS : S::ROWS / CTAS;
    bool good = bm_cuda_describe_rows(c, &x, j, box) && bm_cuda_describe_weights(c, &w, p, COLS, ahead);
    if (END == GATED) good = good && bm_cuda_describe_weights(c, &gate, j->gate, COLS, ahead);
    if (!good) return bm_cuda_check(c, cudaErrorInvalidValue, "a matrix product");
    const int most = (p->M / S::ROWS + p->X) * blocks_of((size_t)p->N, COLS * CTAS), all = c->chip.multiProcessorCount / CTAS;
    const int clusters = most < all ? most : all;
    const float *wrote = END == PLAIN ? p->y : NULL;
    return bm_cuda_start_clusters(c, wrote, kernel, CTAS * clusters, CTAS, S::THREADS, S::SHARED, *p, j->end, box, is_known(j), x, w, gate);
}
/* Tiles of 64 groups rows by cols columns, of which a gated one has half of each; what one costs.  Smaller ones read more.  The last
 * two are for groups that end within a tile. */
typedef struct size { int groups, cols, each; } size;
static const size sizes[] = { { 3, 192, 30 }, { 2, 192, 22 }, { 3, 144, 23 }, { 2, 144, 17 }, { 2, 96, 13 }, { 2, 72, 11 },
                              { 3, 96, 13 }, { 3, 72, 11 } };
enum { SIZES = sizeof sizes / sizeof *sizes, RAGGED = SIZES - 2 };

/* Of sizes first to end - 1 the first whose rounds cost least, all blocks at once.  Groups of rows end anywhere in a tile. */
static int cheapest(const bm_cuda *c, const bm_product *p, bool gated, int first, int end) {
    int best = first, least = INT_MAX;
    for (int i = first; i < end; i++) {
        const int rows = 64 * sizes[i].groups, cols = sizes[i].cols * (gated ? 1 : 2);
        const int down = is_ragged(p) ? p->X : p->M / rows + (p->X > 1 ? p->X / 2 : p->M % rows > 0);
        const int tiles = down * blocks_of((size_t)p->N, (size_t)cols);
        const int cost = blocks_of((size_t)tiles, c->chip.multiProcessorCount / 2) * sizes[i].each;
        if (cost < least) best = i, least = cost;
    }
    return best;
}
template <int END> static bool launch_tall(bm_cuda *c, const job *j) {
    const bool ragged = is_ragged(j->p), plain = END == PLAIN;
    const int first = ragged && plain ? RAGGED : 0, end = ragged ? (plain ? SIZES : 1) : !plain ? 2 : j->p->X > 1 ? 4 : RAGGED;
    switch (cheapest(c, j->p, END == GATED, first, end)) {
    case 0: return launch<192, 3, 2, END>(c, j);
    case 1: return launch<192, 2, 2, END>(c, j);
    case 2: return launch<144, 3, 2, PLAIN>(c, j);
    case 3: return launch<144, 2, 2, PLAIN>(c, j);
    case 4: return launch<96, 2, 2, PLAIN>(c, j);
    case 5: return launch<72, 2, 2, PLAIN>(c, j);
    case RAGGED: return launch<96, 3, 2, PLAIN>(c, j);
    default: return launch<72, 3, 2, PLAIN>(c, j);
    }
}
static bool launch_any(bm_cuda *c, const job *j) {
    if (j->p->M <= FEW) return bm_cuda_few(c, j);
    if (j->gate) return launch_tall<GATED>(c, j);
    if (j->end.act) return launch_tall<ACT>(c, j);
    const bool thin = j->p->N <= NARROWEST && 4 * blocks_of((size_t)j->p->M, 64) <= c->chip.multiProcessorCount;
    if (thin && j->p->M <= THIN && !j->p->first) return bm_cuda_few(c, j);
    if (j->p->best) return launch_tall<KEYS>(c, j);
    if (thin) return launch<32, 1, 1, PLAIN>(c, j);         /* a block brings less a step */
    return j->p->N <= 128 ? launch<128, 1, 1, PLAIN>(c, j) : launch_tall<PLAIN>(c, j);
}

/* One matrix as far from the last as the others: the copy engine goes from one to the next. */
static bool even(const bm_product *p) {
    for (int e = 1; e < p->X; e++)
        if (p->w[e] < p->w[e - 1] || p->w[e] - p->w[e - 1] != p->w[1] - p->w[0]) return false;
    return true;
}
static bm_product group_of(const bm_product *p, int e) {
    bm_product one = *p;
    one.w[0] = p->w[e];
    one.X = 1;
    if (p->first) one.first = p->first + e;
    if (p->bias) one.bias = p->bias + (size_t)e * p->bias_stride;
    return one;
}
static void run(bm_cuda *c, const job *j) {
    const bool one = even(j->p) && (!j->gate || even(j->gate));
    if (one) launch_any(c, j);
    else for (int e = 0; e < j->p->X; e++) {
        const bm_product up = group_of(j->p, e), gate = group_of(j->gate ? j->gate : j->p, e);
        job k = *j;
        k.p = &up, k.gate = j->gate ? &gate : NULL;
        if (k.end.gate_bias) k.end.gate_bias += (size_t)e * j->p->bias_stride;
        if (!launch_any(c, &k)) return;
    }
}

bool bm_cuda_wide_takes(const bm_cuda *c, const bm_product *p) {
    const bm_cuda_wide *w = c->wide;
    bool good = w && p->rounded && taken_as_is(p->type, p->M) && p->M >= LEAST && (size_t)p->M * p->K <= w->room;
    good = good && p->w_stride % 16 == 0 && p->K % 8 == 0;
    for (int e = 0; e < p->X; e++) good = good && (uintptr_t)p->w[e] % 16 == 0;
    return good;
}
void bm_cuda_wide_product(bm_cuda *c, const bm_product *p) {
    bm_cuda_wide *w = c->wide;
    job j = { .p = p, .end = { .apart = p->M >= APART * p->X } };
    const bool narrow = p->N <= NARROWEST && p->N % 8 == 0 && p->ldy == (size_t)p->N;
    /* A Mamba layer's x, which dt reads. */
    const bool copied = narrow && p->M <= w->rows && !p->first && !p->to && !p->accumulate && !p->best;
    find_activations(c, &j);
    if (copied) j.end.copy = w->narrow, w->there = w->narrow, w->grouped = false, w->of = p->y, w->cols = p->N;
    run(c, &j);
}
bool bm_cuda_takes_rounded(const bm_cuda *c, const bm_op_linear *next, const float *x, int M, int cols) {
    const bm_product p = bm_cuda_product_of(next);
    return bm_cuda_wide_takes(c, &p) && next->x == x && next->M == M && next->ldx == cols && next->w->cols == cols;
}
bool bm_cuda_norm_follows(const bm_cuda *c, const bm_product *p, const bm_op_norm *n, const bm_op_linear *next) {
    const uintptr_t all = (uintptr_t)n->sum | (uintptr_t)n->residual | (uintptr_t)n->weight;
    if (!bm_cuda_wide_takes(c, p) || !bm_cuda_takes_rounded(c, next, n->y, n->M, n->D) || p->M > FEW || n->M != p->M) return false;
    if (!is_one_each(c, p->N / TALL)) return false;
    if (n->x != p->y || n->D != p->N || p->N % TALL || p->ldy != (size_t)p->N || p->accumulate || n->centered || n->bias) return false;
    return !next->bias && !next->accumulate && n->sum && n->residual && all % 16 == 0;
}
void bm_cuda_product_norm(bm_cuda *c, const bm_product *p, const bm_op_norm *n) {
    job j = { .p = p };
    j.end = { .copy = c->wide->normed, .sum = n->sum, .squares = c->wide->squares, .residual = n->residual, .weight = n->weight };
    find_activations(c, &j);
    run(c, &j);
}
void bm_cuda_normed_product(bm_cuda *c, const bm_op_norm *n, const bm_product *p) {
    const job j = { .p = p, .end = { .of = c->wide->squares, .eps = n->eps }, .x = c->wide->normed, .ldx = (size_t)p->K };
    c->wide->of = NULL;
    run(c, &j);
}
void bm_cuda_wide_hidden(bm_cuda *c, const bm_product *gate, const bm_product *up, bool is_gelu, uint16_t *act) {
    job j = { .p = up, .gate = gate };
    j.end = { .act = act, .gate_bias = gate ? gate->bias : NULL, .is_gelu = is_gelu, .apart = up->M >= APART * up->X };
    find_activations(c, &j);
    run(c, &j);
}

/* ---- few columns --------------------------------------------------------------------------- */

enum { NARROW = 8, WARPS = 8, FEW_WARPS = 4, WIDEST = 192 * 1024 / (4 * (NARROW + FEW_WARPS)) };

/* Up to NARROW columns of f32 weights, a router's: an output is summed as `dots` does (gemm.cu).  Weights lie in shared memory by
 * n, half of eight k, and k / 8; behind them the rows of x of each warp where there is one a warp. */
template <int PER_WARP> __global__ void __launch_bounds__(32 * WARPS) narrow(const bm_product p) {
    extern __shared__ float4 w[];
    const int lane = threadIdx.x % 32, row0 = PER_WARP * (int)((blockIdx.x * blockDim.x + threadIdx.x) / 32), eights = p.K / 8;
    next_may_start();
    for (int i = threadIdx.x; i < p.N * 2 * eights; i += blockDim.x) {
        const int n = i / (2 * eights), k4 = i % (2 * eights);
        copy_four(&w[(2 * n + k4 % 2) * eights + k4 / 2], (const float4 *)(p.w[0] + n * p.w_stride) + k4);
    }
    previous_done();
    const float4 *x[PER_WARP];
    float sum[PER_WARP][NARROW] = {};
    for (int i = 0; i < PER_WARP; i++) x[i] = (const float4 *)(p.x + (size_t)(row0 + i < p.M ? row0 + i : p.M - 1) * p.ldx);
    if (PER_WARP == 1) {
        float4 *own = w + (p.N + threadIdx.x / 32) * 2 * eights;
        for (int k = lane; k < 2 * eights; k += 32) copy_four(own + k, x[0] + k);
        x[0] = own;
    }
    words_wait();
    __syncthreads();
    if (row0 >= p.M) return;
#pragma unroll 3
    for (int k = lane; k < eights; k += 32) {
        float4 v[PER_WARP][2];
#pragma unroll
        for (int i = 0; i < PER_WARP; i++) v[i][0] = x[i][2 * k], v[i][1] = x[i][2 * k + 1];
#pragma unroll
        for (int n = 0; n < NARROW; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float4 a = w[(2 * (n < p.N ? n : 0) + h) * eights + k];
#pragma unroll
                for (int i = 0; i < PER_WARP; i++) sum[i][n] = dot_four(a, v[i][h], sum[i][n]);
            }
    }
#pragma unroll
    for (int i = 0; i < PER_WARP; i++)
#pragma unroll
        for (int n = 0; n < NARROW; n++) {
            float v = warp_sum(sum[i][n]);
            if (lane != i * NARROW + n || n >= p.N || row0 + i >= p.M) continue;
            float *y = p.y + (size_t)(row0 + i) * p.ldy + n;
            if (p.bias) v += p.bias[n];
            *y = p.accumulate ? *y + v : v;
        }
}
bool bm_cuda_narrow_takes(const bm_product *p) {
    return p->type == BM_F32 && p->X == 1 && p->N <= NARROW && p->M >= LEAST && p->K % 8 == 0 && p->K <= WIDEST && !p->first &&
           !p->from && !p->to && !p->scale && ((uintptr_t)p->x | 4 * p->ldx | (uintptr_t)p->w[0] | p->w_stride) % 16 == 0;
}
void bm_cuda_narrow_product(bm_cuda *c, const bm_product *p) {
    const bool few = p->M <= FEW;           /* then more processors share them */
    const int warps = few ? FEW_WARPS : WARPS, rows = few ? warps : 2 * warps;
    const auto kernel = few ? narrow<1> : narrow<2>;
    const size_t shared = 4 * (size_t)(p->N + (few ? warps : 0)) * p->K;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    bm_cuda_start(c, kernel, blocks_of((size_t)p->M, (size_t)rows), 32 * warps, shared, *p);
}

/* ---- room ---------------------------------------------------------------------------------- */

static bm_cuda_wide *opened(bm_cuda *c) {
    void *encode = NULL;
    cudaDriverEntryPointQueryResult found;
    if (c->wide || c->chip.major != 9) return c->wide;
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (e || found != cudaDriverEntryPointSuccess) return NULL;
    c->wide = (bm_cuda_wide *)calloc(1, sizeof *c->wide);
    if (c->wide) c->wide->encode = (PFN_cuTensorMapEncodeTiled_v12000)encode;
    return c->wide;
}

/* Floats of squares; halves of all that follows. */
static size_t squares_of(int cols) { return FEW * ((size_t)cols / TALL + 1); }
static size_t bytes_of(int rows, int cols) {
    return sizeof(float) * squares_of(cols) + sizeof(uint16_t) * ((size_t)(FEW + rows) * cols + (size_t)rows * NARROWEST);
}

static int most(int a, int b) { return a > b ? a : b; }
size_t bm_cuda_reserving(bm_backend *b, int rows, int cols) {
    const bm_cuda_wide *w = rows >= LEAST ? opened(cuda_of(b)) : NULL;
    return w ? bytes_of(most(rows, w->rows), most(cols, w->widest)) : 0;
}
bm_status bm_cuda_reserve(bm_backend *b, int rows, int cols) {
    bm_cuda *c = cuda_of(b);
    bm_cuda_wide *w = rows >= LEAST ? opened(c) : NULL;
    void *all;
    if (!w || (rows <= w->rows && cols <= w->widest)) return BM_OK;
    rows = most(rows, w->rows), cols = most(cols, w->widest);       /* what was promised before stays */
    const bm_status s = b->alloc(b, &all, bytes_of(rows, cols), "activations as bf16");
    if (s) return s;
    bm_cuda_forget(b, NULL);        /* what was recorded writes to the old ones */
    if (w->memory) b->release(b, w->memory);
    w->memory = all;
    w->bytes = bytes_of(rows, cols);
    w->squares = (float *)all;
    w->normed = (uint16_t *)(w->squares + squares_of(cols));
    w->narrow = w->normed + FEW * (size_t)cols;
    w->half = w->narrow + (size_t)rows * NARROWEST;
    w->room = (size_t)rows * (size_t)cols;
    w->rows = rows, w->widest = cols;
    w->of = NULL;
    return BM_OK;
}
size_t bm_cuda_reserved(bm_backend *b) {
    const bm_cuda_wide *w = cuda_of(b)->wide;
    return w ? w->bytes : 0;
}

void bm_cuda_wide_close(bm_cuda *c) {
    if (c->wide) cudaFree(c->wide->memory);
    free(c->wide);
}
