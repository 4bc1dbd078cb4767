/* few.cu - products of 9 to 128 rows with bf16 weights and activations on Hopper's tensor cores.  Room: cuda.
 *
 * What they cost is their weights' way from memory, so copies of weights are always under way.  A block takes one tile after
 * another: 64 rows of weights (or 32 of gate and 32 of up) and up to SLOTS rows of a group.  A warp has the copy engine bring 64
 * columns of k of weights at a time into a ring of stages, one those of activations, and a warpgroup multiplies them (wgmma) with
 * the weights as the side of 64.  A step is 8 KB: what a warp does besides must stay below a third of a microsecond.
 * Weights that are known to be wanted are brought while the kernel before still works.
 * Where there are few tiles, the blocks of a cluster share a tile's k and send what they have to each other, to be added in the
 * order of their ranks.  Which block sums which k depends on the shape of the weights alone: an output has the same bits whatever
 * rows are beside it. */
#include "cuda/hopper.cuh"

enum { TALL = 64, MULTIPLIERS = 128, THREADS = MULTIPLIERS + 64, ROOM = 108 * 1024, LD = TALL + 4 };

/* COLS columns of outputs, turned round PIECE rows at a time.  Two blocks of ROOM fit a multiprocessor: one that works, one that
 * makes ready, or two that work. */
template <int SLOTS, int END> struct shape {
    enum { COLS = END == GATED ? TALL / 2 : TALL, PIECE = SLOTS < 32 ? SLOTS : 32, PAPER = PIECE * LD * 4, DESK = SLOTS * TALL * 4 };
    enum { APART = PAPER > DESK ? PAPER : DESK, WEIGHTS = TALL * LINE, BYTES = WEIGHTS + SLOTS * LINE,
           STAGES = (ROOM - APART) / BYTES, SHARED = STAGES * BYTES + APART + 1024 };
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Block `rank` of the `blocks` of a cluster, which is one of `clusters`; its steps of k. */
typedef struct place { int rank, blocks, cluster, clusters, begin, end; } place;

__device__ static place place_of(int K) {
    place w;
    const int steps = (K + DEPTH - 1) / DEPTH;
    w.rank = rank_in_cluster();
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(w.blocks));
    w.cluster = (int)blockIdx.x / w.blocks, w.clusters = (int)gridDim.x / w.blocks;
    w.begin = steps * w.rank / w.blocks, w.end = steps * (w.rank + 1) / w.blocks;
    return w;
}

__device__ static void expect(const CUtensorMap *map, int k, int row, int e) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];"
                 :: "l"(map), "r"(k), "r"(row), "r"(e) : "memory");
}
__device__ static void look_up(const CUtensorMap *map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }

/* ---- bringing ------------------------------------------------------------------------------------------ */

/* Where in the ring: the stage, and whether it is used for an odd time. */
typedef struct turn { int stage; unsigned odd; } turn;
template <int STAGES> __device__ static void go_on(turn *t) {
    if (++t->stage < STAGES) return;
    t->stage = 0;
    t->odd ^= 1;
}
__device__ static int rows_of(const tile &at, int most) { return at.end - at.row < most ? at.end - at.row : most; }

__device__ static void bring_once(void *to, const CUtensorMap *map, uint64_t *b, int k, const tile &at, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;"
                 :: "r"(address(to)), "l"(map), "r"(k * DEPTH), "r"(at.col), "r"(at.e), "r"(address(b)), "l"(policy) : "memory");
}

/* Where they are not known yet: into the second cache what the first tile is if each group has one row of tiles. */
template <int COLS> __device__ static void
expect_weights(const bm_product &p, const place &w, const CUtensorMap *weights, const CUtensorMap *gate) {
    const int cols = (p.N + COLS - 1) / COLS, e = w.cluster / cols, col = w.cluster % cols * COLS;
    for (int k = w.begin; k < w.end && e < p.X; k++) {
        if (COLS < TALL) expect(gate, k * DEPTH, col, e);
        expect(weights, k * DEPTH, col, e);
    }
}

/* By one thread. */
template <int SLOTS, int END> __device__ static void
bring_weights(const bm_product &p, const ring &r, const place &w, int box, bool known, const CUtensorMap *weights,
              const CUtensorMap *gate) {
    typedef shape<SLOTS, END> S;
    const uint64_t policy = passing();
    tile at = { -1 };
    turn now = { 0, 1 };
    if (!known) {
        expect_weights<S::COLS>(p, w, weights, gate);
        previous_done();
    }
    for (int t = w.cluster; find(p, false, &at, t, SLOTS, S::COLS); t += w.clusters) {
        const int bytes = S::WEIGHTS + (rows_of(at, SLOTS) + box - 1) / box * box * LINE;
        for (int k = w.begin; k < w.end; k++, go_on<S::STAGES>(&now)) {
            uint8_t *to = r.stage + now.stage * S::BYTES;
            uint64_t *full = &r.full[now.stage];
            barrier_wait(&r.empty[now.stage], now.odd);
            barrier_expect(full, bytes);
            if (END == GATED) bring_once(to, gate, full, k, at, policy);
            bring_once(to + (TALL - S::COLS) * LINE, weights, full, k, at, policy);
        }
    }
}
/* By a warp, `box` rows at a time: one by one where they may lie anywhere. */
template <int SLOTS, int END> __device__ static void
bring_rows(const bm_product &p, const ring &r, const place &w, int box, const CUtensorMap *x) {
    typedef shape<SLOTS, END> S;
    enum { MINE = (SLOTS + 31) / 32 };
    const int lane = threadIdx.x % 32;
    tile at = { -1 };
    turn now = { 0, 1 };
    previous_done();
    for (int t = w.cluster; find(p, false, &at, t, SLOTS, S::COLS); t += w.clusters) {
        int row[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int first = (lane + 32 * i) * box;
            row[i] = first >= rows_of(at, SLOTS) ? -1 : p.from ? p.from[at.row + first] : at.row + first;
        }
        for (int k = w.begin; k < w.end; k++, go_on<S::STAGES>(&now)) {
            uint8_t *to = r.stage + now.stage * S::BYTES + S::WEIGHTS + lane * box * LINE;
            barrier_wait(&r.empty[now.stage], now.odd);
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (row[i] >= 0) bring(to + 32 * i * box * LINE, x, &r.full[now.stage], k * DEPTH, row[i], 0);
        }
    }
}

/* ---- multiplying --------------------------------------------------------------------------------------- */

/* Four columns of row i of the groups. */
__device__ static void put(const bm_product &p, const ending &end, int e, int i, int n, float4 v) {
    const int row = p.to ? p.to[i] : i;
    const float scale = p.scale ? p.scale[row] : 1;
    const float2 a = biased(p, e, n, v.x, v.y, scale), b = biased(p, e, n + 2, v.z, v.w, scale);
    float *y = p.y + (size_t)row * p.ldy + n;
    v = make_float4(a.x, a.y, b.x, b.y);
    if (!p.accumulate && n + 4 <= p.N && (uintptr_t)y % 16 == 0) *(float4 *)y = v;
    else put_four(p, y, n, v);
    if (end.copy) *(uint2 *)(end.copy + (size_t)row * p.N + n) = halves(v);
}

/* The same of row i of a tile, with what becomes of hidden columns. */
template <int END> __device__ static void
put_either(const bm_product &p, const ending &end, const tile &at, int i, int col, float4 v, float4 up) {
    const int n = at.col + col, row = at.row + i;
    if (n >= p.N) return;
    if constexpr (END == PLAIN) put(p, end, at.e, row, n, v);
    else {
        const uint32_t a = hidden<END>(p, end, at.e, n, make_float2(v.x, v.y), make_float2(up.x, up.y));
        const uint32_t b = hidden<END>(p, end, at.e, n + 2, make_float2(v.z, v.w), make_float2(up.z, up.w));
        *(uint2 *)(end.act + (size_t)row * p.N + n) = make_uint2(a, b);
    }
}

/* Rows [from, from + COUNT) of outputs onto paper (COUNT,LD).  A lane holds columns lane / 4 and 8 on of 16, two rows of each
 * eight. */
template <int COUNT, int ALL> __device__ static void lay(const float (&c)[ALL], int from, float *paper) {
    const int lane = threadIdx.x % 32, col = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < COUNT / 2; j++)
        paper[(j / 4 * 8 + lane % 4 * 2 + j % 2) * LD + col + j / 2 % 2 * 8] = c[from / 2 + j];
}

template <int SLOTS, int END> __device__ static void
put_alone(const bm_product &p, const ending &end, const tile &at, const float (&c)[SLOTS / 2], float *paper) {
    enum { PIECE = shape<SLOTS, END>::PIECE, COLS = shape<SLOTS, END>::COLS, FOURS = COLS / 4 };
    const int col = threadIdx.x % FOURS * 4, rows = rows_of(at, SLOTS);
#pragma unroll
    for (int piece = 0; piece < SLOTS; piece += PIECE) {
        if (piece >= rows) break;
        meet_of<MULTIPLIERS>();
        lay<PIECE>(c, piece, paper);
        meet_of<MULTIPLIERS>();
        for (int i = threadIdx.x / FOURS; i < PIECE && piece + i < rows; i += MULTIPLIERS / FOURS) {
            const float *v = paper + i * LD + col;
            put_either<END>(p, end, at, piece + i, col, *(const float4 *)v, *(const float4 *)(v + TALL - COLS));
        }
    }
}

/* To the same place in another block of the cluster, whose barrier is told. */
__device__ static void send(float *to, float4 v, uint64_t *b, int rank) {
    asm volatile("{.reg .b32 t, r; mapa.shared::cluster.u32 t, %0, %6; mapa.shared::cluster.u32 r, %1, %6;"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [t], {%2, %3, %4, %5}, [r];}"
                 :: "r"(address(to)), "r"(address(b)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(rank) : "memory");
}
/* The sum over the blocks of a cluster, `apart` floats from one to the next. */
__device__ static float4 sum_over(const float *v, int blocks, int apart) {
    float4 sum = *(const float4 *)v;
    for (int rank = 1; rank < blocks; rank++) {
        const float4 a = *(const float4 *)(v + rank * apart);
        sum = make_float4(sum.x + a.x, sum.y + a.y, sum.z + a.z, sum.w + a.w);
    }
    return sum;
}
/* Block r of the cluster writes rows r, r + blocks, ...; what others have of them comes to its desk (blocks,SLOTS/blocks,TALL).
 * A cluster has one tile: the ring is done with and serves as paper. */
template <int SLOTS, int END> __device__ static void
put_shared(const bm_product &p, const ending &end, const place &w, const tile &at, const float (&c)[SLOTS / 2], float *paper,
           float *desk, uint64_t *sent) {
    enum { COLS = shape<SLOTS, END>::COLS, FOURS = COLS / 4 };
    const int rows = rows_of(at, SLOTS), own = (rows - w.rank + w.blocks - 1) / w.blocks, apart = SLOTS / w.blocks * TALL;
    meet_of<MULTIPLIERS>();
    lay<SLOTS>(c, 0, paper);
    if (!threadIdx.x) barrier_expect(sent, own * w.blocks * TALL * 4);
    meet_of<MULTIPLIERS>();
    for (int i = threadIdx.x / 16; i < rows; i += MULTIPLIERS / 16) {
        const int four = threadIdx.x % 16 * 4;
        send(desk + w.rank * apart + i / w.blocks * TALL + four, *(const float4 *)(paper + i * LD + four), sent, i % w.blocks);
    }
    barrier_wait(sent, 0);
    for (int i = threadIdx.x / FOURS; i < own; i += MULTIPLIERS / FOURS) {
        const int col = threadIdx.x % FOURS * 4;
        const float *v = desk + i * TALL + col;
        put_either<END>(p, end, at, w.rank + i * w.blocks, col, sum_over(v, w.blocks, apart),
                              END == GATED ? sum_over(v + COLS, w.blocks, apart) : make_float4(0, 0, 0, 0));
    }
}

template <int SLOTS, int END> __device__ static void
multiply_steps(const bm_product &p, const ending &end, const ring &r, const place &w, uint64_t *sent) {
    typedef shape<SLOTS, END> S;
    float c[SLOTS / 2];
    tile at = { -1 };
    float *apart = (float *)(r.stage + S::STAGES * S::BYTES);
    turn now = { 0, 0 };
    for (int t = w.cluster; find(p, false, &at, t, SLOTS, S::COLS); t += w.clusters) {
        int last = 0;
        for (int k = w.begin; k < w.end; k++, last = now.stage, go_on<S::STAGES>(&now)) {
            const uint8_t *stage = r.stage + now.stage * S::BYTES;
            const uint64_t weights = matrix(stage), x = matrix(stage + S::WEIGHTS);
            barrier_wait(&r.full[now.stage], now.odd);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int i = 0; i < DEPTH / 16; i++) multiply(c, weights + 2 * i, x + 2 * i, k > w.begin || i);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (k > w.begin && threadIdx.x % 32 == 0) barrier_arrive(&r.empty[last]);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (threadIdx.x % 32 == 0) barrier_arrive(&r.empty[last]);
        if (w.blocks == 1) put_alone<SLOTS, END>(p, end, at, c, apart);
        else put_shared<SLOTS, END>(p, end, w, at, c, (float *)r.stage, apart, sent);
    }
}
#endif

/* known: weights and groups were there before the kernel before this one. */
template <int SLOTS, int END> __global__ void __launch_bounds__(THREADS)
few(const __grid_constant__ bm_product p, const ending end, int box, bool known, const __grid_constant__ CUtensorMap x,
    const __grid_constant__ CUtensorMap w, const __grid_constant__ CUtensorMap gate) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef shape<SLOTS, END> S;
    extern __shared__ uint8_t memory[];
    __shared__ uint64_t full[S::STAGES], empty[S::STAGES], sent;
    const ring r = { memory + (1024 - address(memory) % 1024) % 1024, full, empty };
    const place here = place_of(p.K);
    if (!p.first) next_may_start();
    if (threadIdx.x == MULTIPLIERS) {
        look_up(&x);
        look_up(&w);
        if (END == GATED) look_up(&gate);
    }
    if (!threadIdx.x) {
        for (int s = 0; s < S::STAGES; s++) {
            barrier_make(&full[s], 1);
            barrier_make(&empty[s], MULTIPLIERS / 32);
        }
        barrier_make(&sent, 1);
        barriers_made();
    }
    __syncthreads();
    cluster_meet();
    if (threadIdx.x >= MULTIPLIERS + 32) bring_rows<SLOTS, END>(p, r, here, box, &x);
    else if (threadIdx.x == MULTIPLIERS) bring_weights<SLOTS, END>(p, r, here, box, known, &w, &gate);
    else if (threadIdx.x < MULTIPLIERS) {
        previous_done();
        if (p.first) next_may_start();      /* a kernel that starts knows the groups */
        multiply_steps<SLOTS, END>(p, end, r, here, &sent);
    }
#endif
}

/* ---- launches -------------------------------------------------------------------------------------------- */

/* Blocks that share a tile's k: enough that all multiprocessors have some. */
static int sharing(const bm_cuda *c, const bm_product *p) {
    const int tiles = blocks_of((size_t)p->N, TALL), steps = blocks_of((size_t)p->K, DEPTH);
    int blocks = 1;
    while (!p->first && blocks < 8 && tiles * blocks < c->chip.multiProcessorCount && steps >= 4 * blocks) blocks *= 2;
    return blocks;
}

template <int SLOTS, int END> static bool launch(bm_cuda *c, const job *j) {
    typedef shape<SLOTS, END> S;
    bm_product p = *j->p;
    CUtensorMap x, w, gate = {};
    const int box = j->from ? 1 : p.first ? 8 : SLOTS;
    const CUtensorMapL2promotion ahead = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;        /* as much as a stage's; 256: 3% slower */
    bool good = bm_cuda_describe_rows(c, &x, j, box) && bm_cuda_describe_weights(c, &w, &p, S::COLS, ahead);
    if (END == GATED) good = good && bm_cuda_describe_weights(c, &gate, j->gate, S::COLS, ahead);
    if (!good) return bm_cuda_check(c, cudaErrorInvalidValue, "a matrix product");
    const int blocks = sharing(c, &p), all = c->chip.multiProcessorCount;
    const int tiles = (p.first ? p.M / SLOTS + p.X : blocks_of((size_t)p.M, SLOTS)) * blocks_of((size_t)p.N, S::COLS);
    const int clusters = tiles * blocks <= 2 * all ? tiles : (p.first ? 2 : 1) * all / blocks;
    p.from = j->from;
    return bm_cuda_start_clusters(c, few<SLOTS, END>, clusters * blocks, blocks, THREADS, S::SHARED, p, j->end, box,
                                  !p.made && (!p.first || p.half), x, w, gate);
}
template <int SLOTS> static bool launch_end(bm_cuda *c, const job *j) {
    return j->gate ? launch<SLOTS, GATED>(c, j) : j->end.act ? launch<SLOTS, ACT>(c, j) : launch<SLOTS, PLAIN>(c, j);
}
/* Slots for most groups; of larger ones weights are read more than once. */
bool bm_cuda_few(bm_cuda *c, const job *j) {
    const int M = j->p->M, most = M / j->p->X * 3 / 2 + 4, rows = j->p->first && most < M ? most : M;
    if (rows <= 16) return launch_end<16>(c, j);
    if (rows <= 32) return launch_end<32>(c, j);
    return rows <= 64 ? launch_end<64>(c, j) : launch_end<128>(c, j);
}
