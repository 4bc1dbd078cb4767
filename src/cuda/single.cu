/* single.cu - a Mamba layer between its two large products, for 6 to 128 sequences with one row each: convolution and x by one
 * kernel, dt and scan by another.  Room: cuda.
 *
 * In: those operations as they were noted (graph.cu), weights of bf16.  Out: the bits of one after the other: x and dt are summed
 * as few.cu does it.  The way from one kernel to the next takes longer than the small ones of them, and memory rests then.  Here
 * states and weights are on their way while the kernel before still works.  64 rows of weights are multiplied by eight to
 * twenty-four of texts at a time (wgmma). */
#include "cuda/hopper.cuh"

enum { TILE = TALL * LINE, N16 = SCAN_STATES };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Where element k of a row lies as the copy engine would put it: in rows of 128 bytes, `rows` to each 64 k, swizzled. */
INLINE int place_of(int rows, int row, int k) {
    return (k / DEPTH * rows + row) * LINE + ((k % DEPTH / 8 ^ row % 8) << 4) + k % 8 * 2;
}
/* c (64,8) = w (64,16) x (8,16)^T, added to c or not. */
INLINE void multiply(float (&c)[4], uint32_t w, uint32_t x, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;}" : F4(0) : "l"(described(w)), "l"(described(x)), "r"(add));
}
/* 64 k more of c (64, 8, 16 or 24). */
template <int ALL> INLINE void multiply_line(float (&c)[ALL], const uint8_t *w, const uint8_t *x, int add) {
    const uint32_t weights = matrix(w), rows = matrix(x);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++) multiply(c, weights + 2 * i, rows + 2 * i, add || i);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
INLINE void multiplied(void) { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
#endif

/* ---- convolution and x ---------------------------------------------------------------------------------------------- */

/* The blocks of a cluster share k: each makes u of its channels, which are its k, and sends what they give of x to the blocks that
 * add it up, one for each text of eight.  A warpgroup has 64 rows of x's weights.  A block has more than half of a multiprocessor's
 * registers: two clusters side by side were slower.  So an H100 has room for CLUSTERS at once; where eight texts each are too few,
 * they have sixteen. */
enum { RANKS = 8, CLUSTERS = 15, GROUPS = 4, CONV_THREADS = 128 * GROUPS, MOST_STAGES = 12, MOST_C = 512 };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
INLINE void send_one(float *to, float v, uint64_t *b, int rank) {
    asm volatile("{.reg .b32 t, r; mapa.shared::cluster.u32 t, %0, %3; mapa.shared::cluster.u32 r, %1, %3;"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [t], %2, [r];}"
                 :: "r"(address(to)), "r"(address(b)), "f"(v), "r"(rank) : "memory");
}
#endif

/* X: rows of x's weights; tiles: of 64 of them; stages: a multiple of tiles, so that a place in the ring belongs to one warpgroup;
 * at: bytes up to the desk, the same in all blocks. */
typedef struct share { int X, tiles, stages, at; } share;

/* A block of a cluster: its steps of 64 k, the first text and how many. */
typedef struct part { int rank, begin, steps, q0, texts; } part;
/* Of a thread: texts set, set + sets, ... of `part`, MOST at most, four channels from c on; what the convolution needs of them.  State
 * NULL: no text. */
template <int MOST> struct own { int set, sets, at, c; float4 x[MOST][4], filter[4], bias; float *state[MOST]; };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* By one thread: x's weights, as many steps as there are stages; the rest into the second cache. */
INLINE void begin_weights(const CUtensorMap *weights, const share &w, const part &here, uint8_t *stage, uint64_t *full) {
#pragma unroll 1
    for (int n = 0; n < here.steps * w.tiles; n++) {
        const int k = (here.begin + n / w.tiles) * DEPTH, row = n % w.tiles * TALL;
        if (n >= w.stages) {
            expect(weights, k, row, 0);
            continue;
        }
        barrier_expect(&full[n], TILE);
        bring(stage + n * TILE, weights, &full[n], k, row, 0);
    }
}
/* What was there before the kernel before: nobody has written to states since the token before. */
template <int MOST> INLINE void ask(const bm_op_conv &a, const part &here, own<MOST> &o) {
    const int fours = here.steps * DEPTH / 4;
    o.sets = CONV_THREADS / fours, o.set = threadIdx.x / fours, o.at = threadIdx.x % fours * 4;
    o.c = here.begin * DEPTH + o.at;
    o.bias = make_float4(0, 0, 0, 0);
    if (o.set < o.sets) {
        if (a.bias) o.bias = *(const float4 *)(a.bias + o.c);
#pragma unroll
        for (int k = 0; k < 4; k++) o.filter[k] = *(const float4 *)(a.weight + (size_t)k * a.I + o.c);
    }
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int t = o.set + i * o.sets;
        o.state[i] = NULL;
        if (o.set >= o.sets || t >= here.texts) continue;
        o.state[i] = a.state + (size_t)a.slot[here.q0 + t] * a.stride + o.c;
#pragma unroll
        for (int k = 0; k < 3; k++) o.x[i][k] = __ldcg((const float4 *)(o.state[i] + (size_t)k * a.I));
    }
}
/* u, also as bf16 where wgmma reads it; states move on. */
template <int TEXTS, int MOST> INLINE void convolve(const bm_op_conv &a, const part &here, own<MOST> &o, uint8_t *half) {
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (o.state[i]) o.x[i][3] = *(const float4 *)(a.x + (size_t)(here.q0 + o.set + i * o.sets) * a.ldx + o.c);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int t = o.set + i * o.sets;
        if (!o.state[i]) continue;
        float4 s = o.bias;
#pragma unroll
        for (int k = 0; k < 4; k++) s = conv_step(s, o.filter[k], o.x[i][k]);
#pragma unroll
        for (int k = 0; k < 3; k++) *(float4 *)(o.state[i] + (size_t)k * a.I) = o.x[i][k + 1];
        s = make_float4(silu(s.x), silu(s.y), silu(s.z), silu(s.w));
        *(float4 *)(a.y + (size_t)(here.q0 + t) * a.I + o.c) = s;
        *(uint2 *)(half + place_of(TEXTS, t, o.at)) = halves(s);
    }
}
/* A warpgroup's 64 rows of x by the block's k, sent to the blocks of their texts. */
template <int TEXTS> INLINE void
multiply_x(const CUtensorMap *weights, const share &w, const part &here, uint8_t *stage, const uint8_t *half, uint64_t *full,
           uint64_t *empty, float *desk, uint64_t *sent) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32, all = here.steps * w.tiles;
    float sum[TEXTS / 2];
#pragma unroll 1
    for (int k = 0; k < here.steps; k++) {
        const int n = k * w.tiles + group, s = n % w.stages, odd = n / w.stages % 2;
        barrier_wait(&full[s], odd);
        multiply_line(sum, stage + s * TILE, half + k * TEXTS * LINE, k);
        multiplied();
        if (n + w.stages >= all) continue;
        if (lane == 0) barrier_arrive(&empty[s]);
        if (threadIdx.x % 128 == 0) {
            barrier_wait(&empty[s], odd);
            barrier_expect(&full[s], TILE);
            bring(stage + s * TILE, weights, &full[s], (here.begin + (n + w.stages) / w.tiles) * DEPTH, group * TALL, 0);
        }
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < TEXTS / 2; i++) {
        const int j = group * TALL + threadIdx.x % 128 / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
        if (j < w.X) send_one(desk + (i / 4 * RANKS + here.rank) * w.X + j, sum[i], sent, lane % 4 * 2 + i % 2);
    }
}
#endif

template <int TEXTS> __global__ void __launch_bounds__(CONV_THREADS)
conv_x(const __grid_constant__ bm_op_conv a, const __grid_constant__ CUtensorMap weights, const share w, float *xdbl) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t memory[];
    __shared__ uint64_t barriers[2 * MOST_STAGES + 1];
    uint64_t *full = anchored(barriers), *empty = full + MOST_STAGES, *sent = empty + MOST_STAGES;
    uint8_t *stage = anchored(aligned(memory)), *half = stage + w.stages * TILE;
    float *desk = (float *)(stage + w.at);                  /* (TEXTS/RANKS,RANKS,X) of texts rank, rank + RANKS, ... */
    const int rank = rank_in_cluster(), all = a.I / DEPTH, begin = all * rank / RANKS, q0 = (int)blockIdx.x / RANKS * TEXTS;
    const part here = { rank, begin, all * (rank + 1) / RANKS - begin, q0, a.Q - q0 < TEXTS ? a.Q - q0 : TEXTS };
    own<TEXTS / 4> o;
    if (!threadIdx.x) {
        for (int s = 0; s < w.stages; s++) {
            barrier_make(&full[s], 1);
            barrier_make(&empty[s], 4);
        }
        barrier_make(sent, 1);
        barriers_made();
        barrier_expect(sent, 4 * TEXTS * w.X);
        begin_weights(&weights, w, here, stage, full);
    }
    ask(a, here, o);
    next_may_start();
    __syncwarp();               /* whose first lane was away */
    cluster_meet();
    previous_done();
    convolve<TEXTS>(a, here, o, half);
    written();
    __syncthreads();
    if ((int)threadIdx.x / 128 < w.tiles) multiply_x<TEXTS>(&weights, w, here, stage, half, full, empty, desk, sent);
    barrier_wait(sent, 0);
    for (int t = rank; t < here.texts; t += RANKS, desk += RANKS * w.X)
        for (int j = threadIdx.x; j < w.X; j += CONV_THREADS) {
            float v = desk[j];
            for (int k = 1; k < RANKS; k++) v += desk[k * w.X + j];
            xdbl[(size_t)(q0 + t) * w.X + j] = v;
        }
#endif
}

bool bm_cuda_conv_x(bm_backend *b, const bm_op_conv *a, const bm_op_linear *l) {
    bm_cuda *c = cuda_of(b);
    const int I = a->I, X = l->w->rows, tiles = blocks_of((size_t)X, TALL), steps = I / DEPTH, most = blocks_of((size_t)steps, RANKS);
    const bm_product p = bm_cuda_product_of(l);
    const uintptr_t all = (uintptr_t)a->x | (uintptr_t)a->weight | (uintptr_t)a->bias | (uintptr_t)a->y | (uintptr_t)a->state |
                          4 * (uintptr_t)a->ldx | (uintptr_t)(4 * a->stride);
    if (c->failed || a->M != a->Q || a->M > FEW || p.type != BM_BF16 || !bm_cuda_wide_takes(c, &p)) return false;
    if (l->x != a->y || l->ldx != I || l->bias || l->accumulate) return false;
    if (a->K != 4 || I % DEPTH || I > RANKS * MOST_C || tiles > GROUPS || all % 16) return false;
    if (bm_cuda_sharing(c, &p) != RANKS) return false;
    share w = { X, tiles, tiles * (most < MOST_STAGES / tiles ? most : MOST_STAGES / tiles) };
    const int texts = a->M <= CLUSTERS * RANKS ? RANKS : 2 * RANKS;
    w.at = w.stages * TILE + most * texts * LINE;
    const int shared = w.at + 4 * texts * X + 1024;
    CUtensorMap map;
    if (!bm_cuda_describe_weights(c, &map, &p, TALL, CU_TENSOR_MAP_L2_PROMOTION_L2_128B)) return false;
    bm_cuda_rounded(c, NULL, 0, 0);
    const auto kernel = texts == RANKS ? conv_x<RANKS> : conv_x<2 * RANKS>;
    const int blocks = RANKS * blocks_of((size_t)a->Q, (size_t)texts);
    return bm_cuda_start_clusters(c, NULL, kernel, blocks, RANKS, CONV_THREADS, shared, *a, map, w, l->y);
}

/* ---- dt and scan ------------------------------------------------------------------------------------------------------ */

/* A block makes 64 channels of its texts: dt, then as single_rows (scan.cu), a thread a channel of some texts.  States and weights
 * are on their way while the kernel before ends. */
enum { SETS = 8, SCAN_THREADS = SETS * TALL, MOST_STEPS = 3 };
enum { PER = 2, WIDEST = 20 };          /* blocks of a multiprocessor; the most texts of one then */
template <int MANY> struct memory {
    enum { ROWS = (MANY + 7) / 8 * 8 };     /* of wgmma */
    float h[MANY][N16][TALL], dt[ROWS][TALL], b[MANY][N16], c[MANY][N16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* On their way: states of the block's texts and channels; rows of dt's weights, where wgmma reads them. */
template <int MANY> INLINE void
ask(const bm_op_scan &a, const uint16_t *weights, int R, int steps, int c0, int q0, int texts, memory<MANY> &m, uint8_t *w) {
    enum { FOURS = TALL / 4, SIDE = SCAN_THREADS / FOURS / N16, EACH = MANY / SIDE };       /* texts at once; of a thread */
    const int four = threadIdx.x % FOURS * 4, n = threadIdx.x / FOURS % N16, t0 = threadIdx.x / FOURS / N16;
    int slot[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) slot[j] = t0 + j * SIDE < texts ? a.slot[q0 + t0 + j * SIDE] : 0;
#pragma unroll
    for (int j = 0; j < EACH; j++)
        if (t0 + j * SIDE < texts && n < a.N)
            copy_four((float4 *)&m.h[t0 + j * SIDE][n][four],
                      (const float4 *)(a.state + (size_t)slot[j] * a.stride + (size_t)n * a.I + c0 + four));
    const int row = threadIdx.x / 8;
#pragma unroll 1
    for (int k = threadIdx.x % 8 * 8; k < steps * DEPTH; k += DEPTH) {
        uint8_t *to = w + place_of(TALL, row, k);
        if (k < R) copy_four((float4 *)to, (const float4 *)(weights + (size_t)(c0 + row) * R + k));
        else *(float4 *)to = make_float4(0, 0, 0, 0);
    }
}
/* What x left: dt's activations as bf16, B and C. */
template <int MANY> INLINE void
read_x(const bm_op_scan &a, const float *xdbl, int R, int steps, int q0, int texts, memory<MANY> &m, uint8_t *x) {
    enum { ROWS = memory<MANY>::ROWS, WARPS = SCAN_THREADS / 32, EACH = (ROWS + WARPS - 1) / WARPS };
    const int pair = threadIdx.x % 32 * 2, t0 = threadIdx.x / 32, own = threadIdx.x / N16, n = threadIdx.x % N16;
    const bool there = own < texts && n < a.N;
    const size_t at = (size_t)(q0 + own) * a.ldbc + n;
    const float b = there ? a.B[at] : 0, c = there ? a.C[at] : 0;
    float2 v[EACH][MOST_STEPS];
#pragma unroll
    for (int j = 0; j < EACH; j++)
#pragma unroll
        for (int s = 0; s < MOST_STEPS; s++) {
            const int t = t0 + j * WARPS, k = s * DEPTH + pair;
            const float *row = xdbl + (size_t)(q0 + t) * a.ldbc + k;
            v[j][s] = t < texts && k < R ? make_float2(row[0], row[1]) : make_float2(0, 0);
        }
#pragma unroll
    for (int j = 0; j < EACH; j++)
#pragma unroll
        for (int s = 0; s < MOST_STEPS; s++) {
            const int t = t0 + j * WARPS;
            if (t < ROWS && s < steps) *(uint32_t *)(x + place_of(ROWS, t, s * DEPTH + pair)) = halves(v[j][s].x, v[j][s].y);
        }
    if (own < MANY) m.b[own][n] = b, m.c[own][n] = c;
}
#endif

template <int MANY> __global__ void __launch_bounds__(SCAN_THREADS, PER)
dt_scan(const __grid_constant__ bm_op_scan a, const uint16_t *weights, const float *xdbl, int R, uint16_t *half, bool whole) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    enum { EACH = (MANY + SETS - 1) / SETS, ROWS = memory<MANY>::ROWS };
    extern __shared__ uint8_t bytes[];
    const int steps = (R + DEPTH - 1) / DEPTH, c0 = (int)blockIdx.x * TALL, q0 = (int)blockIdx.y * MANY;
    const int texts = a.Q - q0 < MANY ? a.Q - q0 : MANY, own = threadIdx.x % TALL, set = threadIdx.x / TALL, c = c0 + own;
    uint8_t *w = aligned(bytes), *x = w + steps * TILE;
    memory<MANY> &m = *(memory<MANY> *)(x + steps * ROWS * LINE);
    float rate[N16], u[EACH], z[EACH];
    next_may_start();
    ask<MANY>(a, weights, R, steps, c0, q0, texts, m, w);
#pragma unroll
    for (int n = 0; n < N16; n++) rate[n] = n < a.N ? scan_rate(a.A[(size_t)n * a.I + c]) : 0;
    const float bias = a.dt_bias[c], D = a.D[c];
    previous_done();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int t = set + i * SETS;
        const size_t q = (size_t)(q0 + t);
        u[i] = t < texts ? a.u[q * a.I + c] : 0, z[i] = t < texts ? a.z[q * a.ldz + c] : 0;
    }
    read_x<MANY>(a, xdbl, R, steps, q0, texts, m, x);
    words_wait();
    written();
    __syncthreads();
    if (threadIdx.x < 128) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
        float d[ROWS / 2];
        for (int k = 0; k < steps; k++) multiply_line(d, w + k * TILE, x + k * ROWS * LINE, k);
        multiplied();
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) m.dt[i / 4 * 8 + t + i % 2][row + i / 2 % 2 * 8] = d[i];
    }
    __syncthreads();
#pragma unroll 1
    for (int t = set; t < texts; t += SETS) {
        const int q = q0 + t;
        const float d = softplus(m.dt[t][own] + bias), du = d * u[0];
        float *state = a.state + (size_t)a.slot[q] * a.stride + c, h[N16], p[N16 / 2];
#pragma unroll
        for (int n = 0; n < N16; n++) {
            h[n] = scan_state(n < a.N ? m.h[t][n][own] : 0, d, rate[n], du, m.b[t][n]);
            if (n < a.N) state[(size_t)n * a.I] = h[n];
        }
#pragma unroll
        for (int n = 0; n < N16; n += 2) p[n / 2] = scan_pair(m.c[t][n], h[n], m.c[t][n + 1], h[n + 1]);
        const float y = scan_out(scan_sum(p), D, u[0], z[0]);
        if (whole) a.y[(size_t)q * a.I + c] = y;
        if (half) half[(size_t)q * a.I + c] = (uint16_t)halves(y, 0);
#pragma unroll      /* the next text's are u[0] and z[0] then: by an index that a loop counts they would lie in memory */
        for (int i = 0; i + 1 < EACH; i++) u[i] = u[i + 1], z[i] = z[i + 1];
    }
#endif
}

template <int MANY> static size_t shared_of(int steps) {
    return (size_t)steps * (TILE + memory<MANY>::ROWS * LINE) + sizeof(memory<MANY>) + 1024;
}
template <int MANY> static void
launch(bm_cuda *c, const bm_op_linear *l, const bm_op_scan *a, int steps, uint16_t *half, bool whole) {
    const size_t shared = shared_of<MANY>(steps);
    cudaFuncSetAttribute(dt_scan<MANY>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    bm_cuda_start(c, dt_scan<MANY>, dim3(a->I / TALL, blocks_of((size_t)a->Q, MANY)), SCAN_THREADS, shared, *a,
                  (const uint16_t *)l->w->data, l->x, l->w->cols, half, whole);
}

bool bm_cuda_dt_scan(bm_backend *b, const bm_op_linear *l, const bm_op_scan *a, const bm_op_linear *out) {
    bm_cuda *c = cuda_of(b);
    const bm_product p = bm_cuda_product_of(l);
    const int steps = blocks_of((size_t)l->w->cols, DEPTH), room = PER * c->chip.multiProcessorCount;
    const int tall = a->I / TALL, small = tall * blocks_of((size_t)a->Q, 8), large = tall * blocks_of((size_t)a->Q, 16);
    const size_t of_block = shared_of<WIDEST>(steps) + 1024;        /* 1,024 are the system's */
    const bool widest = tall * blocks_of((size_t)a->Q, WIDEST) <= room && PER * of_block <= c->chip.sharedMemPerMultiprocessor;
    const uintptr_t all = (uintptr_t)l->w->data | (uintptr_t)a->state | 4 * (uintptr_t)a->I | (uintptr_t)(4 * a->stride);
    if (c->failed || a->M != a->Q || a->M > FEW || p.type != BM_BF16 || !bm_cuda_wide_takes(c, &p)) return false;
    if (l->y != a->dt || l->bias || l->accumulate || l->ldx != a->ldbc) return false;
    if (a->N > N16 || a->I % TALL || steps > MOST_STEPS || all % 16) return false;     /* no kernel shares k of so few steps */
    if (large > room && !widest && (large - 1) % room < room / 2) return false;         /* most of the chip would wait for a few */
    uint16_t *half = bm_cuda_rounded(c, a->y, a->M, a->I);
    const bool whole = !half || !bm_cuda_takes_rounded(c, out, a->y, a->M, a->I);
    if (small <= room) launch<8>(c, l, a, steps, half, whole);
    else if (large <= room || !widest) launch<16>(c, l, a, steps, half, whole);
    else launch<WIDEST>(c, l, a, steps, half, whole);
    return bm_cuda_check(c, cudaGetLastError(), "scan");
}
