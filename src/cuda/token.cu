/* token.cu - one token of up to SLOTS sequences by one kernel that stays on the GPU from the first layer to the last.
 * Room: cuda.
 *
 * In: a program (program.cu).  Out: logits and the best token of each slot; states moved on.
 *
 * A block per multiprocessor makes its share of rows of every matrix, in stages:
 *   INPUT   norm, in, convolution                          its channels
 *   XPROJ   x                                              its rows
 *   SCAN    dt, scan, gate                                 its channels
 *   OUTPUT  out, residual                                  its part of the stream
 *   EXPERT  norm, router, choice, gate and up, activation  its hidden units of the chosen experts
 *   DOWN    down, residual                                 its part of the stream
 *   HEAD    norm, head                                     its logits
 * No barrier parts them: what a block makes it stores in words of a value and the number of its stage, and who reads a
 * word reads it until the number is right.  Every block makes something in each stage whose results all read (XPROJ apart,
 * which an idle block does not read for), so a buffer is written again only after all have read it.
 * One warp copies the block's rows into a ring in shared memory, as far ahead as the ring allows.  An expert's rows wait for
 * the choice, but for a single text: there the router is asked before the Mamba layer in front of it, and what it says is
 * copied; where the choice is another after all, those rows are dropped.  The other warps multiply by tensor cores: up to 16
 * rows of weights by 8 slots; steps of 32 elements go to warps in turn, whose sums are added in order.  No sum depends on the
 * number of slots. */
#include "cuda/steps.cuh"
#include "cuda/token.h"
#include "cuda/weights.cuh"

enum { WARPS = BM_CUDA_WARPS, THREADS = 32 * WARPS, SLOTS = BM_CUDA_SLOTS, MOST_X = BM_CUDA_MOST_X, GROUP = BM_CUDA_GROUP };
enum { STEP = 32, BATCH = 2, RING_TILES = 16 };         /* elements, tiles multiplied together, tiles at most */
/* Pairs of words a thread hears; columns of dt a lane holds. */
enum { AT_ONCE = BM_CUDA_PAIRS / THREADS, HELD_R = 9, ROUNDS = SLOTS * GROUP / THREADS };

template <int TYPE> constexpr bool PLAIN = TYPE == BM_BF16 || TYPE == BM_F16;     /* else quants */

typedef bm_cuda_layer layer;
typedef bm_cuda_program program;
typedef enum kind { INPUT, XPROJ, SCAN, OUTPUT, EXPERT, DOWN, HEAD, KINDS } kind;

/* A block's rows of a stage: n from `from` on, of one matrix or of each of two; h rows are a tile, tiles are multiplied together. */
typedef struct plan { int from, n, spans, K, steps, h, tiles; } plan;

/* From row to row in the ring: what a warp reads of several rows at once meets no bank twice. */
template <int TYPE> __device__ constexpr int row_step(int K) {
    return PLAIN<TYPE> ? 2 * K + 16 : TYPE == BM_Q8_0 ? (row_bytes<TYPE>(K) + 31) / 32 * 32 | 32 : row_bytes<TYPE>(K) | 16;
}
/* Rows in units that stay together, as evenly as can be. */
template <int TYPE> __device__ static plan plan_of(const program &p, int stage) {
    const int B = p.R + 2 * p.N, b = (int)blockIdx.x, G = (int)gridDim.x;
    const int all = stage == INPUT || stage == SCAN ? p.I : stage == XPROJ ? B : stage == EXPERT ? p.F : stage == HEAD ? p.V : p.D;
    const int unit = stage == INPUT || stage == SCAN || stage == EXPERT ? 2 : 1;
    plan q;
    q.from = all / unit * b / G * unit;
    q.n = all / unit * (b + 1) / G * unit - q.from;
    q.spans = stage == INPUT || (stage == EXPERT && p.gated) ? 2 : 1;
    q.K = stage == XPROJ || stage == OUTPUT ? p.I : stage == DOWN ? p.F : p.D;
    q.steps = q.K / STEP;
    const int rows = min(q.n * q.spans, GROUP), most = min(16, p.ring / 2 / row_step<TYPE>(q.K)), tiles = (rows + most - 1) / most;
    q.h = tiles ? (rows + tiles - 1) / tiles : 1;
    q.tiles = max(1, min(BATCH, p.ring / 2 / (q.h * row_step<TYPE>(q.K))));
    return q;
}

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
INLINE int tid() { return (int)threadIdx.x; }
INLINE int lane_of() { return (int)threadIdx.x % 32; }
INLINE int warp_of() { return (int)threadIdx.x / 32; }

/* ---- words --------------------------------------------------------------------------------------------------- */

/* Of the warps that multiply. */
INLINE void meet() { meet_of<THREADS>(); }

INLINE bool said(const uint4 &v, unsigned number) { return v.y == number && v.w == number; }
/* Words of a row, two at a time: pair tid() + i THREADS of n is v[i].  A warp looks at its first pair until that is there, then at
 * those that are not: what all blocks ask of the second cache holds up what it brings. */
INLINE void hear(uint4 v[AT_ONCE], const uint2 *row, int n, unsigned number) {
    const int first = tid() / 32 * 32;
    bool all;
    if (first < n) while (!said(look(row + 2 * first), number)) { }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) v[i].y = ~number;
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (tid() + i * THREADS < n && !said(v[i], number)) v[i] = look(row + 2 * (tid() + i * THREADS));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) all = all && (tid() + i * THREADS >= n || said(v[i], number));
    } while (!all);
}

/* ---- the ring ------------------------------------------------------------------------------------------------ */

typedef struct ring {
    uint64_t full[RING_TILES], empty[RING_TILES], routed, foreseen, decided;    /* routed: a router is there */
    int at[RING_TILES], bytes[RING_TILES];      /* of a tile: its place; the copier's: what it takes, gaps included */
    unsigned guessed, chosen;                   /* a bit for each expert */
} ring;
/* The copier's side. */
typedef struct copier { int at, used; unsigned made, freed; } copier;

/* A place for a tile; its number in the ring. */
INLINE int place(const program &p, ring *r, copier *c, int bytes) {
    const bool wraps = c->at + bytes > p.ring;
    const int gap = wraps ? p.ring - c->at : 0;
    while (c->used + gap + bytes > p.ring || c->made - c->freed == RING_TILES) {
        const int old = c->freed % RING_TILES;
        barrier_wait(&r->empty[old], c->freed / RING_TILES);
        c->used -= r->bytes[old];
        c->freed++;
        __syncwarp();
    }
    const int i = c->made++ % RING_TILES;
    if (wraps) c->at = 0;
    if (lane_of() == 0) {
        r->at[i] = c->at;
        r->bytes[i] = gap + bytes;
    }
    c->used += gap + bytes;
    return i;
}
/* This block's rows of a stage, of each expert chosen: from a, and from b where there are two matrices. */
template <int TYPE> INLINE void copy_stage(const program &p, const plan &q, ring *r, uint8_t *memory, copier *c, const uint8_t *const *a,
                                           const uint8_t *const *b, unsigned chosen) {
    const int most = GROUP / q.spans, bytes = row_bytes<TYPE>(q.K), step = row_step<TYPE>(q.K);
#pragma unroll 1
    for (int g = 0; g < q.n; g += most) {
        const int n = min(most, q.n - g), rows = n * q.spans;
#pragma unroll 1
        for (unsigned left = chosen; left; left &= left - 1) {
            const int x = __ffs(left) - 1;
#pragma unroll 1
            for (int t = 0; t < rows; t += q.h) {
                const int h = min(q.h, rows - t), i = place(p, r, c, h * step), row = t + lane_of();
                if (lane_of() == 0) barrier_expect(&r->full[i], h * bytes);
                __syncwarp();
                if (lane_of() < h) {
                    const uint8_t *from = row < n ? a[x] + (size_t)(q.from + g + row) * bytes
                                                  : b[x] + (size_t)(q.from + g + row - n) * bytes;
                    copy_row(memory + c->at + lane_of() * step, from, bytes, &r->full[i]);
                }
                c->at += h * step;
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
            copy_stage<TYPE>(p, q[XPROJ], r, memory, &c, &a->x, NULL, 1);
            copy_stage<TYPE>(p, q[OUTPUT], r, memory, &c, &a->out, NULL, 1);
            continue;
        }
        if (foreseen(p, a, l ? a - 1 : NULL)) {
            barrier_wait(&r->foreseen, guesses++);
            guessed = r->guessed;
        }
#pragma unroll 1
        for (int pass = 0; pass < 2; pass++) {
            if (pass) barrier_wait(&r->decided, choices++);
            const unsigned which = pass ? r->chosen & ~guessed : guessed;
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
 * add 0. */
template <int TYPE, int TILES> INLINE void multiply(const plan &q, ring *r, uint32_t memory, unsigned tile, int rows, uint32_t x,
                                                    bool use, int M, float *part, int t, bool more) {
    const int lane = lane_of(), g = lane / 4, l = lane % 4, step = row_step<TYPE>(q.K);
    uint32_t at[TILES][2];      /* a row of ldmatrix's; of quants rows g and g + 8 */
    float c[TILES][2][4] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        barrier_wait(&r->full[(tile + j) % RING_TILES], (tile + j) / RING_TILES);
        const uint32_t first = memory + r->at[(tile + j) % RING_TILES];
        const int last = min(q.h, rows - j * q.h) - 1;
        if (PLAIN<TYPE>) at[j][0] = first + min(lane % 16, last) * step + lane / 16 * 16;
        else at[j][0] = first + min(g, last) * step, at[j][1] = first + min(g + 8, last) * step;
    }
#pragma unroll (TYPE == BM_BF16 ? 4 : 2)
    for (int k = warp_of(); k < q.steps; k += WARPS) {
        quad b = matrices(x + 64 * k);
        if (!use) b = {};
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

/* ---- what stages begin with -------------------------------------------------------------------------------- */

typedef struct shared { uint8_t *x; float *f, *part, *u, *z, *sum, *router; const bm_token *token; } shared;

/* (M,K) of two bf16 a word. */
INLINE void hear_rows(const program &p, const shared &s, const uint2 *from, int K, unsigned number) {
    uint4 v[AT_ONCE];
#pragma unroll 1
    for (int m = 0; m < p.M; m++) {
        hear(v, from + (size_t)m * (K / 2), K / 4, number);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = tid() + i * THREADS;
            if (k < K / 4) *(uint2 *)(s.x + m * p.ldx + 8 * k) = make_uint2(v[i].x, v[i].z);
        }
    }
    meet();
}

template <int TYPE> INLINE float embedded(const program &p, const bm_token *token, int m, int k) {
    if (p.table_f32) return __ldg((const float *)p.table + (size_t)token[m] * p.D + k);
    return weight_at<TYPE>(p.table + (size_t)token[m] * row_bytes<TYPE>(p.D), k, p.D);
}
INLINE float over_warps(const float *red) {
    float v = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) v += red[w];
    return v;
}
/* The stream, normed: bf16 into s.x and as it is, or before the norm, into s.f. */
template <int TYPE> INLINE void norm_rows(const program &p, const shared &s, const float *weight, const float *bias, float eps,
                                          bool centered, bool first, bool raw, unsigned number) {
    __shared__ float red[2][SLOTS][WARPS];
    const int D = p.D;
    float2 w[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
        w[i] = tid() + i * THREADS < D / 2 ? __ldg((const float2 *)weight + tid() + i * THREADS) : make_float2(0, 0);
#pragma unroll 1
    for (int m = 0; m < p.M; m++) {
        uint4 v[AT_ONCE];
        float total = 0, square = 0;
        if (!first) hear(v, p.stream + (size_t)m * D, D / 2, number);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = tid() + i * THREADS;
            if (k >= D / 2) break;
            const float2 x = first ? make_float2(embedded<TYPE>(p, s.token, m, 2 * k), embedded<TYPE>(p, s.token, m, 2 * k + 1))
                                   : make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].z));
            *(float2 *)(s.f + m * D + 2 * k) = x;
            total += x.x + x.y;
            square = fmaf(x.y, x.y, fmaf(x.x, x.x, square));
        }
        square = warp_sum(square);
        if (centered) total = warp_sum(total);
        if (lane_of() == 0) {
            red[0][m][warp_of()] = square;
            red[1][m][warp_of()] = total;
        }
    }
    meet();
    if (centered) {
#pragma unroll 1
        for (int m = 0; m < p.M; m++) {
            const float mean = over_warps(red[1][m]) / (float)D;
            float square = 0;
            for (int k = tid(); k < D / 2; k += THREADS) {
                float2 *f = (float2 *)(s.f + m * D) + k;
                f->x -= mean, f->y -= mean;
                square = fmaf(f->y, f->y, fmaf(f->x, f->x, square));
            }
            square = warp_sum(square);
            if (lane_of() == 0) red[0][m][warp_of()] = square;
        }
        meet();
    }
#pragma unroll 1
    for (int m = 0; m < p.M; m++) {
        const float r = norm_scale(over_warps(red[0][m]) / (float)D, eps);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = tid() + i * THREADS;
            if (k >= D / 2) break;
            float2 y = *(const float2 *)(s.f + m * D + 2 * k);
            y.x = norm_out(y.x, r, w[i].x, bias ? bias[2 * k] : 0);
            y.y = norm_out(y.y, r, w[i].y, bias ? bias[2 * k + 1] : 0);
            if (!raw) *(float2 *)(s.f + m * D + 2 * k) = y;
            *(uint32_t *)(s.x + m * p.ldx + 4 * k) = halves(y.x, y.y);
        }
    }
    meet();
}

/* ---- Mamba --------------------------------------------------------------------------------------------------- */

/* What the convolution of one channel of one slot needs besides its newest input. */
typedef struct convolution { float old[3], w[4], bias, bias_x, bias_z, *state; } convolution;
INLINE convolution convolution_of(const program &p, const layer &a, int m, int channel) {
    convolution v = {};
    v.state = a.conv_state + (size_t)p.slot[m] * p.stride + channel;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int from = k - (4 - p.K);         /* the newest last */
        if (from >= 0) v.w[k] = __ldg(a.conv + (size_t)from * p.I + channel);
        if (from >= 0 && k < 3) v.old[k] = v.state[(size_t)from * p.I];
    }
    if (a.conv_bias) v.bias = __ldg(a.conv_bias + channel);
    if (a.in_bias) v.bias_x = __ldg(a.in_bias + channel), v.bias_z = __ldg(a.in_bias + p.I + channel);
    return v;
}
/* u of an input x; the state moves on. */
INLINE float convolve(const program &p, const convolution &v, float x) {
    float sum = v.bias;
#pragma unroll
    for (int k = 0; k < 3; k++) if (k >= 4 - p.K) sum = conv_step(sum, v.w[k], v.old[k]);
#pragma unroll
    for (int k = 0; k < 3; k++) if (k >= 4 - p.K) v.state[(size_t)(k - (4 - p.K)) * p.I] = k < 2 ? v.old[k < 2 ? k + 1 : 2] : x;
    return silu(conv_step(sum, v.w[3], x));
}

/* A channel of a slot is eight lanes, two states each, summed as scan_sum does. */
INLINE float over_8(float v) {
    for (int d = 4; d; d /= 2) v = __fadd_rn(v, __shfl_xor_sync(~0u, v, d));
    return v;
}
INLINE void hear_xdbl(const program &p, const shared &s, int B, unsigned number) {
#pragma unroll 1
    for (int m = 0; m < p.M; m++) {
        uint4 v[AT_ONCE];
        hear(v, p.xdbl + (size_t)m * B, B / 2, number);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (tid() + i * THREADS < B / 2)
                *(float2 *)(s.f + m * B + 2 * (tid() + i * THREADS)) = make_float2(__uint_as_float(v[i].x), __uint_as_float(v[i].z));
    }
    meet();
}
/* A weight of dt's, of the bits at p. */
template <int TYPE> INLINE float dt_weight(const uint16_t *p) {
    const uint16_t bits = __ldg(p);
    return TYPE == BM_F16 ? rounded(__half2float(__ushort_as_half(bits))) : bf16_at(bits);
}
template <int TYPE> INLINE void scan(const program &p, const shared &s, const layer &a, const plan &q, unsigned number) {
    const int n = tid() % 8, B = p.R + 2 * p.N, most = p.M * q.n, begin = warp_of() * 4;
#pragma unroll 1
    for (int first = begin; first == begin || first < most; first += WARPS * 4) {
        const int pair = min(first + tid() / 8 % 4, most - 1), m = pair / q.n, c = pair - m * q.n, channel = q.from + c;
        const bool real = first + tid() / 8 % 4 < most;
        float *state = a.state + (size_t)p.slot[m] * p.stride + channel;
        const float *x = s.f + m * B, D = __ldg(a.D + channel), bias = __ldg(a.dt_bias + channel);
        const uint16_t *w = (const uint16_t *)a.dt + (size_t)channel * p.R;
        float h[2], rate[2], C[2], d = 0, dt[HELD_R];
#pragma unroll
        for (int i = 0; i < HELD_R; i++) dt[i] = n + 8 * i < p.R ? dt_weight<TYPE>(w + n + 8 * i) : 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool in = 2 * n + i < p.N;
            h[i] = in ? state[(size_t)(2 * n + i) * p.I] : 0;
            rate[i] = in ? scan_rate(__ldg(a.A + (size_t)(2 * n + i) * p.I + channel)) : 0;
        }
        if (first == begin) hear_xdbl(p, s, B, number);
#pragma unroll
        for (int i = 0; i < HELD_R; i++) if (n + 8 * i < p.R) d = fmaf(dt[i], rounded(x[n + 8 * i]), d);
        for (int r = n + 8 * HELD_R; r < p.R; r += 8) d = fmaf(dt_weight<TYPE>(w + r), rounded(x[r]), d);
        const float u = s.u[m * q.n + c];
        d = softplus(over_8(d) + bias);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool in = 2 * n + i < p.N;
            h[i] = scan_state(h[i], d, rate[i], __fmul_rn(d, u), in ? x[p.R + 2 * n + i] : 0);
            C[i] = in ? x[p.R + p.N + 2 * n + i] : 0;
            if (real && in) state[(size_t)(2 * n + i) * p.I] = h[i];
        }
        const float sum = over_8(scan_pair(C[0], h[0], C[1], h[1])), out = scan_out(sum, D, u, s.z[m * q.n + c]);
        const float next = __shfl_down_sync(~0u, out, 8);
        if (real && n == 0 && c % 2 == 0) tell(p.y + (size_t)m * (p.I / 2) + channel / 2, halves(out, next), number + 1);
    }
}

/* ---- experts -------------------------------------------------------------------------------------------------- */

typedef struct chosen { int expert[SLOTS]; float gate[SLOTS]; } chosen;

/* A warp's product of x (D) with a router's row w (D); norm: weights of x's elements, NULL: none. */
INLINE float routed(int D, const float *x, const float *w, const float *norm) {
    float v = 0;
#pragma unroll 3
    for (int k = 4 * lane_of(); k < D; k += 128) {
        float4 a = *(const float4 *)(x + k);
        const float4 b = *(const float4 *)(w + k);
        if (norm) {
            const float4 n = *(const float4 *)(norm + k);
            a = make_float4(a.x * n.x, a.y * n.y, a.z * n.z, a.w * n.w);
        }
        v = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, v))));
    }
    return warp_sum(v);
}
/* A warp's largest of n <= 32: NaN never wins, the lowest index where equal. */
INLINE int largest(const float *of, int n) {
    const float v = lane_of() < n ? of[lane_of()] : -INFINITY, top = warp_max(v);       /* of NaN and a number the number */
    const unsigned best = __ballot_sync(~0u, lane_of() < n && v == top);
    return best ? __ffs(best) - 1 : 0;
}
/* What a layer's router says of s.f, the stream before the layer in front of it: most often that layer does not change it. */
INLINE void guess(const program &p, const shared &s, const layer &a, ring *r, unsigned round) {
    __shared__ float logit[MOST_X];
    barrier_wait(&r->routed, round);
#pragma unroll 1
    for (int e = warp_of(); e < a.X; e += WARPS) {
        const float v = routed(p.D, s.f, s.router + e * p.D, s.router + a.X * p.D);
        if (lane_of() == 0) logit[e] = v;
    }
    meet();
    if (warp_of()) return;
    const int expert = largest(logit, a.X);
    if (lane_of()) return;
    r->guessed = 1u << expert;
    barrier_arrive(&r->foreseen);
}
/* The choice of every slot, a bit for each that some slot made. */
INLINE unsigned choose(const program &p, const shared &s, const layer &a, ring *r, unsigned round, chosen *out) {
    __shared__ float logit[SLOTS][MOST_X];
    const int lane = lane_of(), m = warp_of();
    if (a.router) {
        barrier_wait(&r->routed, round);
#pragma unroll 1
        for (int i = 0; i < p.M; i++)
#pragma unroll 1
            for (int e = warp_of(); e < a.X; e += WARPS) {
                const float v = routed(p.D, s.f + i * p.D, s.router + e * p.D, NULL);
                if (lane == 0) logit[i][e] = v + (a.router_bias ? __ldg(a.router_bias + e) : 0);
            }
        meet();
        if (m < p.M) {      /* a warp for each slot */
            const int expert = largest(logit[m], a.X);
            if (lane == 0) out->expert[m] = expert;
        }
    } else if (tid() < p.M) out->expert[tid()] = 0;
    meet();
    const unsigned all = __reduce_or_sync(~0u, lane < p.M ? 1u << out->expert[lane] : 0);
    if (tid() == 0) {
        r->chosen = all;
        barrier_arrive(&r->decided);
    }
    if (tid() < p.M) {      /* while the weights are on their way */
        const float *l = logit[tid()], top = l[out->expert[tid()]];
        float sum = 0;
        for (int e = 0; a.router && a.softmax && e < a.X; e++) sum += expf(l[e] - top);
        out->gate[tid()] = !a.router ? 1 : a.softmax ? 1 / sum : 1 / (1 + expf(-top));
    }
    return all;
}

/* One hidden unit f of slot m, of the expert it chose. */
INLINE float expert_end(const program &p, const layer &a, const plan &q, const chosen *k, int m, int f, float first, float second) {
    const size_t bias = (size_t)k->expert[m] * p.F + q.from + f;
    if (p.gated && a.gate_bias) first += a.gate_bias[bias];
    if (!p.gated && a.up_bias) first += a.up_bias[bias];
    if (p.gated && a.up_bias) second += a.up_bias[bias];
    const float v = a.gelu ? gelu(first) : silu(first);
    return p.gated ? v * second : v;
}

/* ---- the kernel ------------------------------------------------------------------------------------------------------ */

/* The largest logits of all blocks; the last block to end says what they are. */
INLINE void best_end(const program &p, const unsigned long long *top) {
    __shared__ unsigned before;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int m = tid() / GROUP + i * (THREADS / GROUP);
        unsigned long long key = top[i];
        for (int d = 16; d; d /= 2) key = max(key, __shfl_xor_sync(~0u, key, d));
        if (lane_of() == 0 && m < p.M) atomicMax(p.key + m, key);
    }
    __threadfence();
    meet();
    if (tid() == 0) before = atomicAdd(p.ended, 1);
    meet();
    if (before + 1 < gridDim.x) return;
    if (tid() < p.M) p.best[tid()] = key_column(atomicExch(p.key + tid(), 0));
    if (tid() == 0) *p.ended = 0;
}

/* What all stages share. */
typedef struct state {
    ring *r; uint8_t *memory;
    unsigned number, tile, round;       /* of the last stage; tiles and routers so far */
    unsigned long long top[ROUNDS];     /* of this thread's rows of logits */
    chosen *k; unsigned experts;        /* of this layer; a bit for each expert that some slot chose */
    uint32_t x;                         /* where this lane reads activations */
} state;

/* Row `row` of a group of n rows that begins at g, of slot m: what it becomes and who hears of it. */
template <int STAGE> INLINE void row_end(const program &p, const shared &s, const layer &a, const plan &q, state &t, const convolution &conv,
                                         unsigned long long *top, int g, int n, int m, int row) {
    const bool mine = row < n;
    const int at = q.from + g + row;
    float v = mine ? made(s.part, p.M, row, m) : 0;
    if (STAGE == INPUT || STAGE == EXPERT) {
        const float second = mine && q.spans == 2 ? made(s.part, p.M, n + row, m) : 0;
        if (STAGE == EXPERT && mine) v = expert_end(p, a, q, t.k, m, g + row, v, second);
        if (STAGE == INPUT && mine) {
            v = convolve(p, conv, v + conv.bias_x);
            s.u[m * q.n + g + row] = v;
            s.z[m * q.n + g + row] = second + conv.bias_z;
        }
        const float next = __shfl_down_sync(~0u, v, 1);
        uint2 *to = STAGE == INPUT ? p.u + (size_t)m * (p.I / 2) : p.act + (size_t)m * (p.F / 2);
        if (mine && row % 2 == 0) tell(to + at / 2, halves(v, next), t.number);
        return;
    }
    if (!mine) return;
    if (STAGE == XPROJ) tell(p.xdbl + m * (p.R + 2 * p.N) + at, __float_as_uint(v), t.number);
    if (STAGE == HEAD) {
        v += p.head_bias ? p.head_bias[at] : 0;
        p.logits[(size_t)m * p.V + at] = v;
        if (at < p.ids) *top = max(*top, logit_key(v, at));
    }
    if (STAGE == OUTPUT || STAGE == DOWN) {
        if (STAGE == OUTPUT && a.out_bias) v += a.out_bias[at];
        if (STAGE == DOWN) v = (v + (a.down_bias ? a.down_bias[(size_t)t.k->expert[m] * p.D + at] : 0)) * t.k->gate[m];
        tell(p.stream + m * p.D + at, __float_as_uint(s.sum[m * q.n + row] += v), t.number);
    }
}

/* Tiles that nobody needs. */
INLINE void release(state &t, int n) {
    for (; n; n--, t.tile++) {
        barrier_wait(&t.r->full[t.tile % RING_TILES], t.tile / RING_TILES);
        if (lane_of() == 0) barrier_arrive(&t.r->empty[t.tile % RING_TILES]);
    }
}
/* Tiles of a stage, of one expert. */
INLINE int tiles_of(const plan &q) {
    const int most = q.spans == 2 ? GROUP / 2 : GROUP, rest = q.n % most * q.spans;
    return q.n / most * ((most * q.spans + q.h - 1) / q.h) + (rest + q.h - 1) / q.h;
}
/* A stage after what it begins with: products of the block's rows, a group at a time. */
template <int TYPE, int STAGE> INLINE void rows_end(const program &p, const shared &s, const layer &a, const plan q, state &t) {
    const uint32_t memory = address(t.memory);
    const int most = q.spans == 2 ? GROUP / 2 : GROUP, row = tid() % GROUP, mine = t.k->expert[lane_of() / 4];
    t.number++;
#pragma unroll 1
    for (int g = 0; g < q.n; g += most) {
        const int n = min(most, q.n - g), rows = n * q.spans;
        convolution conv[ROUNDS] = {};
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int m = tid() / GROUP + i * (THREADS / GROUP);
            if (STAGE == INPUT && m < p.M && row < n) conv[i] = convolution_of(p, a, m, q.from + g + row);
        }
        const bool experts = STAGE == EXPERT || STAGE == DOWN;
        bool more = false;
#pragma unroll 1
        for (unsigned left = experts ? t.experts : 1; left; left &= left - 1, more = true) {
            const bool use = !experts || mine == __ffs(left) - 1;
#pragma unroll 1
            for (int r = 0; r < rows; r += q.tiles * q.h) {
                const int part = min(q.tiles * q.h, rows - r), tiles = part <= q.h ? 1 : BATCH;
                if (tiles == 1) multiply<TYPE, 1>(q, t.r, memory, t.tile, part, t.x, use, p.M, s.part, r, more);
                else multiply<TYPE, BATCH>(q, t.r, memory, t.tile, part, t.x, use, p.M, s.part, r, more);
                t.tile += tiles;
            }
        }
        meet();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int m = tid() / GROUP + i * (THREADS / GROUP);
            if (m < p.M) row_end<STAGE>(p, s, a, q, t, conv[i], &t.top[i], g, n, m, row);
        }
        if (g + most < q.n) meet();
    }
}

template <int TYPE> __device__ static void work(const program &p, const plan *plans, ring *r, layer *kept, uint8_t *memory,
                                                const bm_token *token) {
    __shared__ chosen k;
    const int own = SLOTS * plans[SCAN].n, lane = lane_of();
    float *u = (float *)(memory + p.at_own);
    const shared s = { memory + p.at_x, (float *)(memory + p.at_f), (float *)(memory + p.at_part), u, u + own, u + 2 * own,
                       (float *)(memory + p.at_router), token };
    state t = { r, memory, *p.number };
    t.k = &k;
    t.x = address(s.x) + min(lane % 8, p.M - 1) * p.ldx + lane / 8 * 16;
    for (int i = tid(); i < p.M * plans[OUTPUT].n; i += THREADS) {
        const int m = i / plans[OUTPUT].n;
        s.sum[i] = embedded<TYPE>(p, token, m, plans[OUTPUT].from + i - m * plans[OUTPUT].n);
    }
    bool guessed = false;
#pragma unroll 1
    for (int l = 0; l < p.L; l++) {
        const layer &a = kept[l % 2];
        norm_rows<TYPE>(p, s, a.norm, NULL, a.eps, false, l == 0, !a.X, t.number);
        for (int i = tid(); l + 1 < p.L && i < (int)(sizeof(layer) / 8); i += THREADS)      /* nobody reads what was there */
            copy_word((uint64_t *)&kept[(l + 1) % 2] + i, (const uint64_t *)(p.layers + l + 1) + i);
        if (a.X) {
            t.experts = choose(p, s, a, r, t.round, &k);
            if (a.router) t.round++;
            if (guessed && r->guessed != t.experts) release(t, tiles_of(plans[EXPERT]) + tiles_of(plans[DOWN]));
            guessed = false;
            rows_end<TYPE, EXPERT>(p, s, a, plans[EXPERT], t);
            hear_rows(p, s, p.act, p.F, t.number);
            rows_end<TYPE, DOWN>(p, s, a, plans[DOWN], t);
        } else {
            rows_end<TYPE, INPUT>(p, s, a, plans[INPUT], t);
            words_wait();
            meet();
            guessed = l + 1 < p.L && foreseen(p, &kept[(l + 1) % 2], &a);
            if (guessed) guess(p, s, kept[(l + 1) % 2], r, t.round);
            if (plans[XPROJ].n) hear_rows(p, s, p.u, p.I, t.number);
            rows_end<TYPE, XPROJ>(p, s, a, plans[XPROJ], t);
            scan<TYPE>(p, s, a, plans[SCAN], t.number++);
            hear_rows(p, s, p.y, p.I, t.number);
            rows_end<TYPE, OUTPUT>(p, s, a, plans[OUTPUT], t);
        }
        words_wait();
        meet();
    }
    norm_rows<TYPE>(p, s, p.last_norm, p.last_bias, p.last_eps, p.centered, false, true, t.number);
    rows_end<TYPE, HEAD>(p, s, kept[0], plans[HEAD], t);
    best_end(p, t.top);
    if (blockIdx.x == 0 && tid() == 0) *p.number = t.number;
}
#endif

template <int TYPE> __global__ void __launch_bounds__(THREADS + 32, 1) token_kernel(const __grid_constant__ program p) {
#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
    uint8_t *memory = shared_memory();
    __shared__ layer kept[2];
    __shared__ plan plans[KINDS];
    __shared__ ring r;
    __shared__ bm_token token[SLOTS];
    if (tid() < p.M) token[tid()] = max(p.token[tid()], 0);
    if (tid() < KINDS) plans[tid()] = plan_of<TYPE>(p, tid());
    if (tid() < RING_TILES) {
        barrier_make(&r.full[tid()], 1);
        barrier_make(&r.empty[tid()], WARPS);
        if (tid() == 0) barrier_make(&r.decided, 1);
        if (tid() == 0) barrier_make(&r.routed, 1);
        if (tid() == 0) barrier_make(&r.foreseen, 1);
        barriers_made();
    }
    for (int i = tid(); i < (int)(sizeof(layer) / 8); i += THREADS + 32) ((uint64_t *)&kept[0])[i] = ((const uint64_t *)p.layers)[i];
    __syncthreads();
    if (tid() >= THREADS) copy_all<TYPE>(p, plans, &r, memory);
    else work<TYPE>(p, plans, &r, kept, memory, token);
#endif
}

/* ---- what starts it ------------------------------------------------------------------------------------------------- */

const void *bm_cuda_token_kernel(bm_dtype type, int *threads) {
    *threads = THREADS + 32;
    switch (type) {
    case BM_F16:  return (const void *)token_kernel<BM_F16>;
    case BM_Q8_0: return (const void *)token_kernel<BM_Q8_0>;
    case BM_Q4_0: return (const void *)token_kernel<BM_Q4_0>;
    default:      return (const void *)token_kernel<BM_BF16>;
    }
}
