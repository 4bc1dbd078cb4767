/* ring.cuh - a block's rows of every matrix of a token (token.cu): which they are, how they come, their products.  Room: cuda.
 *
 * In: a program (program.cu).  One warp copies rows into a ring in shared memory, a tile at a time, as far ahead as the ring allows; the
 * others multiply tiles by activations of up to SLOTS texts and release them. */
#ifndef BM_CUDA_RING_H
#define BM_CUDA_RING_H
#include "cuda/steps.cuh"
#include "cuda/token.h"
#include "cuda/weights.cuh"

enum { WARPS = BM_CUDA_WARPS, THREADS = 32 * WARPS, SLOTS = BM_CUDA_SLOTS, MOST_X = BM_CUDA_MOST_X, GROUP = BM_CUDA_GROUP };
enum { STEP = 32, RING_TILES = 16, UNDER_WAY = 48 << 10 };     /* elements; tiles in the ring, at most; bytes that come while words
                                                                    * are told */

template <int TYPE> constexpr bool PLAIN = TYPE == BM_BF16 || TYPE == BM_F16;     /* else quants */

typedef bm_cuda_layer layer;
typedef bm_cuda_program program;
typedef enum kind { INPUT, OUTPUT, EXPERT, DOWN, HEAD, KINDS } kind;

/* A block's rows of a stage that has a product: n of one matrix or of each of two, in groups of as many as GROUP takes of both, `apart`
 * from `from` on; h rows are a tile, tiles are multiplied together, `coming` are on their way at most. */
typedef struct plan { int from, n, apart, spans, K, h, tiles; unsigned coming; } plan;

/* Tiles multiplied together, at most: of out and down a block seldom has two, of the head each is waited for. */
__device__ constexpr int batch_of(int stage) { return stage == INPUT || stage == EXPERT ? 2 : 1; }
/* Matrices whose rows go together, their columns. */
INLINE int spans_of(const program &p, int stage) { return stage == INPUT || (stage == EXPERT && p.gated) ? 2 : 1; }
INLINE int columns_of(const program &p, int stage) { return stage == OUTPUT ? p.I : stage == DOWN ? p.F : p.D; }

/* From row to row in the ring: what a warp reads of several rows at once meets no bank twice, but where a tile
 * goes on at the ring's beginning. */
template <int TYPE> __device__ constexpr int row_step(int K) {
    return PLAIN<TYPE> ? 2 * K + 16 : TYPE == BM_Q8_0 ? (row_bytes<TYPE>(K) + 31) / 32 * 32 | 32 : row_bytes<TYPE>(K) | 16;
}
/* Rows in units that stay together, as evenly as can be; of the head in groups that go to blocks in turn, so that all read near each
 * other: memory gives more then. */
template <int TYPE> __device__ static plan plan_of(const program &p, int stage) {
    const int b = (int)blockIdx.x, G = (int)gridDim.x;
    const int all = stage == INPUT ? p.I : stage == EXPERT ? p.F : stage == HEAD ? p.V : p.D;
    const bool pairs = stage == INPUT || stage == EXPERT;
    const int unit = pairs ? 2 : 1;
    plan q;
    q.spans = spans_of(p, stage);
    if (stage == HEAD) {
        q.from = GROUP * b, q.apart = GROUP * G;
        q.n = all / q.apart * GROUP + max(0, min((int)GROUP, all % q.apart - q.from));
    } else {
        q.from = all / unit * b / G * unit, q.apart = GROUP / q.spans;
        q.n = all / unit * (b + 1) / G * unit - q.from;
    }
    q.K = columns_of(p, stage);
    const int rows = min(q.n * q.spans, GROUP), most = min(16, p.ring / 2 / row_step<TYPE>(q.K)), tiles = (rows + most - 1) / most;
    q.h = tiles ? (rows + tiles - 1) / tiles : 1;
    q.tiles = max(1, min(batch_of(stage), p.ring / 2 / (q.h * row_step<TYPE>(q.K))));
    const int under_way = p.most_X && pairs ? 2 * UNDER_WAY : UNDER_WAY;    /* with a router memory rests until it has chosen */
    q.coming = stage == HEAD ? (unsigned)RING_TILES         /* no words to hold up */
                             : (unsigned)max(1, min((int)RING_TILES, under_way / (q.h * row_step<TYPE>(q.K))));
    return q;
}

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
INLINE int tid() { return (int)(threadIdx.x % 1024); }      /* says that it is not negative, where all that follows needs no sign */
INLINE int lane_of() { return tid() % 32; }
INLINE int warp_of() { return tid() / 32; }

/* ---- the ring ------------------------------------------------------------------------------------------------ */

typedef struct ring {
    uint64_t full[RING_TILES], empty[RING_TILES], routed, foreseen, decided;    /* routed: a router is there */
    int4 tile[RING_TILES];                      /* of each where rows lie (row_at); w: bytes, a gap at the end of the ring included */
    unsigned guessed, chosen;                   /* a bit for each expert */
} ring;
INLINE void ring_make(ring *r) {
    if (lane_of() < RING_TILES) {
        barrier_make(&r->full[lane_of()], 1);
        barrier_make(&r->empty[lane_of()], WARPS);
    }
    if (lane_of() == 0) {
        barrier_make(&r->decided, 1);
        barrier_make(&r->routed, 1);
        barrier_make(&r->foreseen, 1);
    }
    barriers_made();
}
/* The copier's side. */
typedef struct copier { int at, used; unsigned made, freed; } copier;

/* Where row i of a tile lies: the first at t.x; from row t.y on they go on at the ring's beginning, t.z bytes before. */
INLINE int row_at(const int4 &t, int i, int step) { return t.x + i * step - (i < t.y ? 0 : t.z); }
/* Room for the oldest tile, once it has been multiplied. */
INLINE void wait_for_room(ring *r, copier *c) {
    const int old = c->freed % RING_TILES;
    barrier_wait(&r->empty[old], c->freed++ / RING_TILES);
    c->used -= r->tile[old].w;
    __syncwarp();
}
/* A tile of h rows in the ring; its number. */
INLINE int place(const program &p, ring *r, copier *c, int h, int step) {
    while (c->made - c->freed == RING_TILES) wait_for_room(r, c);
    const int i = c->made++ % RING_TILES, before = __popc(__ballot_sync(~0u, c->at + (lane_of() + 1) * step <= p.ring) & ((1u << h) - 1));
    const int back = c->at + before * step, gap = before < h ? p.ring - back : 0;
    if (lane_of() == 0) r->tile[i] = make_int4(c->at, before, back, h * step + gap);
    __syncwarp();
    return i;
}
/* This block's rows of a stage, of each expert chosen: from a, and from b where there are two matrices.
 * No more at once than the plan says, whatever came before: it holds up other blocks' words.  Not inlined: once for each stage it
 * makes 16 KB more of code, and a token 3% longer. */
template <int TYPE> __device__ __noinline__ static void copy_stage(const program &p, const plan &q, ring *r, uint8_t *memory, copier *c,
                                                                   const uint8_t *const *a, const uint8_t *const *b, unsigned chosen) {
    const int most = GROUP / q.spans, bytes = row_bytes<TYPE>(q.K), step = row_step<TYPE>(q.K);
#pragma unroll 1
    for (int g = 0, from = q.from; g < q.n; g += most, from += q.apart) {
        const int n = min(most, q.n - g), rows = n * q.spans;
#pragma unroll 1
        for (unsigned left = chosen; left; left &= left - 1) {
            const int x = __ffs(left) - 1;
#pragma unroll 1
            for (int t = 0; t < rows; t += q.h) {
                const int h = min(q.h, rows - t), i = place(p, r, c, h, step), row = t + lane_of();
                const unsigned last = c->made - 1 - q.coming;
                const int4 tile = r->tile[i];
                if (c->made > q.coming) barrier_wait(&r->full[last % RING_TILES], last / RING_TILES);
                if (lane_of() == 0) barrier_expect(&r->full[i], h * bytes);
                __syncwarp();
                /* A row as soon as there is room for it and those before. */
                const int needs = (lane_of() + 1) * step + (lane_of() < tile.y ? 0 : tile.w - h * step);
                for (bool there = lane_of() >= h;;) {
                    if (!there && needs <= p.ring - c->used) {
                        const uint8_t *at = row < n ? a[x] + (size_t)(from + row) * bytes : b[x] + (size_t)(from + row - n) * bytes;
                        copy_row(memory + row_at(tile, lane_of(), step), at, bytes, &r->full[i]);
                        there = true;
                    }
                    if (__all_sync(~0u, there)) break;
                    wait_for_room(r, c);
                }
                c->at = row_at(tile, h - 1, step) + step;
                c->used += tile.w;
            }
        }
    }
}
/* Whether layer l's expert is guessed while the layer before runs. */
INLINE bool foreseen(const program &p, const layer *a, const layer *before) { return p.M == 1 && a->router && before && !before->X; }
/* A layer's router (X,D) and the weights of its norm behind it. */
INLINE void router_copy(const program &p, const layer *a, ring *r, uint8_t *memory) {
    if (!a->router || lane_of()) return;
    barrier_expect(&r->routed, 4 * (a->X + 1) * p.D);
    copy_row(memory + p.at_router, (const uint8_t *)a->router, 4 * a->X * p.D, &r->routed);
    copy_row(memory + p.at_router + 4 * a->X * p.D, (const uint8_t *)a->norm, 4 * p.D, &r->routed);
}
template <int TYPE> __device__ __noinline__ static void copy_all(const program &p, const plan *q, ring *r, uint8_t *memory) {
    copier c = {};
    unsigned guesses = 0, choices = 0;
    router_copy(p, p.layers, r, memory);
#pragma unroll 1
    for (int l = 0; l < p.L; l++) {
        const layer *a = p.layers + l;
        unsigned guessed = 0;
        if (!a->X) {
            const uint8_t *second = a->in + (size_t)p.I * row_bytes<TYPE>(p.D);
            if (l + 1 < p.L) router_copy(p, a + 1, r, memory);      /* the choice before was told: nobody reads its router */
            copy_stage<TYPE>(p, q[INPUT], r, memory, &c, &a->in, &second, 1);
            copy_stage<TYPE>(p, q[OUTPUT], r, memory, &c, &a->out, NULL, 1);
            continue;
        }
        if (foreseen(p, a, l ? a - 1 : NULL)) {
            barrier_wait(&r->foreseen, guesses++);
            guessed = r->guessed;
        }
#pragma unroll 1
        for (int pass = 0; pass < 2; pass++) {
            if (pass && a->router) barrier_wait(&r->decided, choices++);
            const unsigned which = pass ? (a->router ? r->chosen : 1u) & ~guessed : guessed;
            copy_stage<TYPE>(p, q[EXPERT], r, memory, &c, p.gated ? a->gate : a->up, a->up, which);
            copy_stage<TYPE>(p, q[DOWN], r, memory, &c, a->down, NULL, which);
        }
        if (l + 1 < p.L && a[1].X) router_copy(p, a + 1, r, memory);
    }
    copy_stage<TYPE>(p, q[HEAD], r, memory, &c, &p.head, NULL, 1);
}

/* ---- products ------------------------------------------------------------------------------------------------ */

/* Two quants as bf16, exactly.  q8_0, bytes 0 and 2: 128 and their low bits, less 128 or, by their sign, 256.  q4_0, nibbles 0
 * and 4: 128 and they, less 136. */
template <int TYPE> INLINE uint32_t quants(uint32_t v) {
    if (TYPE == BM_Q8_0) return minus_bf16(masked(v, 0x007f007f, 0x43004300), masked(v, 0x00800080, 0x43004300));
    return minus_bf16(masked(v, 0x000f000f, 0x43004300), 0x43084308);
}
/* A lane's eight of row at[0] and of row at[1], in step k. */
template <int TYPE> INLINE void fragments(const uint32_t (&at)[2], int k, quad (&a)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint2 v;
        if (TYPE == BM_Q8_0) v = load<uint2>(at[i] + 32 * k + lane_of() % 4 * 8);
        else v.x = load<uint32_t>(at[i] + 16 * k + lane_of() % 4 * 4), v.y = v.x >> 8;
        a[0].v[i] = quants<TYPE>(v.x);
        a[0].v[i + 2] = quants<TYPE>(v.x >> (TYPE == BM_Q8_0 ? 8 : 4));
        a[1].v[i] = quants<TYPE>(v.y);
        a[1].v[i + 2] = quants<TYPE>(v.y >> (TYPE == BM_Q8_0 ? 8 : 4));
    }
}
/* A fragment of weights; of f16: rounded. */
template <int TYPE> INLINE quad weights(uint32_t at) {
    quad a = matrices(at);
#pragma unroll
    for (int i = 0; TYPE == BM_F16 && i < 4; i++) {
        const float2 v = __half22float2(*(const __half2 *)&a.v[i]);
        a.v[i] = halves(v.x, v.y);
    }
    return a;
}
/* c += a step of 16 rows; of quants: their block's products, exact but for sums, times the scales of the rows. */
template <int TYPE> INLINE void multiply_step(float (&c)[2][4], const uint32_t (&at)[2], int K, int k, const quad &b) {
    if (PLAIN<TYPE>) {
        multiply_bf16(c[0], weights<TYPE>(at[0] + 64 * k), b.v[0], b.v[1]);
        multiply_bf16(c[1], weights<TYPE>(at[0] + 64 * k + 32), b.v[2], b.v[3]);
        return;
    }
    quad a[2];
    float v[4] = {};
    fragments<TYPE>(at, k, a);
    multiply_bf16(v, a[0], b.v[0], b.v[1]);
    multiply_bf16(v, a[1], b.v[2], b.v[3]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float scale = __half2float(load<__half>(at[i] + (TYPE == BM_Q8_0 ? K : K / 2) + 2 * k));
        c[0][2 * i] = fmaf(scale, v[2 * i], c[0][2 * i]);
        c[0][2 * i + 1] = fmaf(scale, v[2 * i + 1], c[0][2 * i + 1]);
    }
}
/* part (WARPS,M,GROUP) (+)= this warp's steps of TILES tiles of h rows, `rows` in all, the first of which is row t of the
 * group.  x: where this lane reads activations; use: the slot of its fragment is multiplied by these weights, the others
 * add 0; more: to what is there. */
template <int TYPE, int TILES> INLINE void multiply(const plan &q, ring *r, uint32_t memory, unsigned tile, int rows, uint32_t x,
                                                    bool use, int M, float *part, int t, bool more) {
    const int lane = lane_of(), g = lane / 4, l = lane % 4, step = row_step<TYPE>(q.K);
    uint32_t at[TILES][2];      /* a row of ldmatrix's; of quants rows g and g + 8 */
    float c[TILES][2][4] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        barrier_wait(&r->full[(tile + j) % RING_TILES], (tile + j) / RING_TILES);
        const int4 from = r->tile[(tile + j) % RING_TILES];
        const int last = min(q.h, rows - j * q.h) - 1;
        if (PLAIN<TYPE>) at[j][0] = memory + row_at(from, min(lane % 16, last), step) + lane / 16 * 16;
        else at[j][0] = memory + row_at(from, min(g, last), step), at[j][1] = memory + row_at(from, min(g + 8, last), step);
    }
#pragma unroll (TYPE == BM_BF16 ? 4 : 2)
    for (int k = warp_of(); k < q.K / STEP; k += WARPS) {
        quad b = M == 1 ? load<quad>(x + 64 * k) : matrices(x + 64 * k);
        if (M > 1 && !use) b = {};
#pragma unroll
        for (int j = 0; j < TILES; j++) multiply_step<TYPE>(c[j], at[j], q.K, k, b);
    }
    __syncwarp();
    float *to = part + (warp_of() * M + 2 * l) * GROUP + t + g;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        if (lane == 0) barrier_arrive(&r->empty[(tile + j) % RING_TILES]);
        if (2 * l >= M) continue;
        const int h = min(q.h, rows - j * q.h);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (g + 8 * (i / 2) < h && (i % 2 == 0 || 2 * l + 1 < M)) {
                float *v = to + j * q.h + i % 2 * GROUP + 8 * (i / 2);
                *v = (more ? *v : 0) + (c[j][0][i] + c[j][1][i]);
            }
    }
}
/* Row r of slot m. */
INLINE float made(const float *part, int M, int r, int m) {
    float v[2] = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) v[w % 2] += part[(w * M + m) * GROUP + r];
    return v[0] + v[1];
}
#endif
#endif
