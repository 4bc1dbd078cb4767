/* scan.cu - the selective scan (arXiv 2312.00752, equation 2), one step after another.  Room: cuda.
 * long_rows, N <= 16: eight lanes a channel, a pair of states each.  A second warp makes d and d u of each 16 steps before, a third
 *   sums C h after, by way of shared memory.
 * single_rows, N <= 16, one row a sequence: a thread for one or two channels, the same arithmetic and so the same bits.
 * many_rows, N 16, the same of many sequences on Hopper: states come into shared memory and leave it by its copy engine.
 * wide_rows, N > 16: a thread for each channel, states where they are kept, sums over N in order. */
#include "cuda/steps.cuh"

enum { N16 = SCAN_STATES, LANES = N16 / 2, SETS = 5, CHANNELS = SETS * 32 / LANES, GROUP = 16, TILE = 2 * GROUP };
enum { ROLE = 32 * SETS, THREADS = 3 * ROLE };         /* a block of d_inner 2304 for nearly each of 132 processors */
enum { AHEAD = 4, PAD = 12, HELD = 2 };                 /* tiles in memory; a stride that meets no bank twice; pairs of steps held */
enum { WIDTH = 128 };                                   /* threads of a block where each has channels of its own */

__device__ static float *state_of(const bm_op_scan &a, int q) { return a.state + (size_t)a.slot[q] * a.stride; }

/* Zeros where nothing is. */
__device__ static void copy4_async(float *to, const float *from, bool there) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(at), "l"(from), "r"(there ? 4 : 0));
}
__device__ static void copy16_async(float *to, const float *from, int left, bool aligned) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    if (aligned) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(left > 0 ? 16 : 0));
    else for (int i = 0; i < 4; i++) copy4_async(to + i, from + i, i < left);
}

/* What a tile of rows brings: B and C; dt, u and z of the block's channels.  Then what goes between warps: d, du; sums of two
 * C h by step and lane; y of tiles that are made, and of one that is written. */
typedef struct tile { float b[TILE][N16], c[TILE][N16], row[3][TILE][CHANNELS]; } tile;
typedef struct memory {
    tile tiles[AHEAD];
    float2 step[3][CHANNELS][GROUP + 2];
    float part[2][CHANNELS][GROUP * PAD + LANES], out[3][TILE][CHANNELS];
} memory;

/* Of thread `id` of a role: four columns of row id / (CHANNELS / 4), from c on, and of the first 128 four states of row
 * id / 4. */
typedef struct places { int id, t, c, end; bool states_aligned, aligned; uint16_t *half; } places;

__device__ static void fetch(tile *to, const bm_op_scan &a, const places &p, int t0) {
    const int s = p.id / 4, n = p.id % 4 * 4, k = p.id % (CHANNELS / 4) * 4, left = t0 + p.t < p.end ? a.I - p.c : 0;
    const size_t at = (size_t)(t0 + p.t) * a.I + p.c, bc = (size_t)(t0 + s) * a.ldbc + n;
    if (s < TILE) {
        copy16_async(&to->b[s][n], a.B + bc, t0 + s < p.end ? a.N - n : 0, p.states_aligned);
        copy16_async(&to->c[s][n], a.C + bc, t0 + s < p.end ? a.N - n : 0, p.states_aligned);
    }
    copy16_async(&to->row[0][p.t][k], a.dt + at, left, p.aligned);
    copy16_async(&to->row[1][p.t][k], a.u + at, left, p.aligned);
    copy16_async(&to->row[2][p.t][k], a.z + (size_t)(t0 + p.t) * a.ldz + p.c, left, p.aligned);
    asm volatile("cp.async.commit_group;");
}
/* Rows [t0, t0 + TILE) of y. */
__device__ static void put_rows(const float (*out)[CHANNELS], const bm_op_scan &a, const places &p, int t0) {
    if (t0 + p.t >= p.end || p.c >= a.I) return;
    const float *v = &out[p.t][p.id % (CHANNELS / 4) * 4];
    const size_t at = (size_t)(t0 + p.t) * a.I + p.c;
    if (a.y && p.aligned) *(float4 *)(a.y + at) = *(const float4 *)v;
    else for (int i = 0; a.y && i < 4 && p.c + i < a.I; i++) a.y[at + i] = v[i];
    if (p.half) *(uint2 *)(p.half + at) = halves(*(const float4 *)v);
}

/* What two steps of a lane take: d, du of its channel, B and C of its states. */
typedef struct two { float4 x; float2 B[2], C[2]; } two;
__device__ static two read_two(const float4 *step, const tile &w, int t, int m) {
    two v = { *step };
#pragma unroll
    for (int r = 0; r < 2; r++) v.B[r] = *(const float2 *)&w.b[t + r][2 * m], v.C[r] = *(const float2 *)&w.c[t + r][2 * m];
    return v;
}
/* Two steps of two states; the sum of both C h by step. */
__device__ static void two_steps(float2 *h, float2 rate, const two &v, float *part) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float d = r ? v.x.z : v.x.x, du = r ? v.x.w : v.x.y;
        h->x = scan_state(h->x, d, rate.x, du, v.B[r].x);
        h->y = scan_state(h->y, d, rate.y, du, v.B[r].y);
        part[r * PAD] = scan_pair(v.C[r].x, h->x, v.C[r].y, h->y);
    }
}

/* d and du of a lane's two steps of a group; `left` rows from the tile's first on. */
__device__ static void prepare(const tile &w, float2 *step, int g, int m, int own, int left, float bias) {
    float dt[2], u[2];          /* all reads first: the compiler moves none before a write */
#pragma unroll
    for (int r = 0; r < 2; r++) dt[r] = w.row[0][g + m + r * LANES][own], u[r] = w.row[1][g + m + r * LANES][own];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float made = softplus(dt[r] + bias);
        dt[r] = g + m + r * LANES < left ? made : 0;        /* 0: h stays what it is */
    }
#pragma unroll
    for (int r = 0; r < 2; r++) step[m + r * LANES] = make_float2(dt[r], dt[r] * u[r]);
}
/* D u and silu(z) of a lane's two steps of a group; the outputs. */
typedef struct gates { float u[2], z[2]; } gates;
__device__ static gates read_gates(const tile &w, int g, int m, int own) {
    gates v;
#pragma unroll
    for (int r = 0; r < 2; r++) v.u[r] = w.row[1][g + m + r * LANES][own], v.z[r] = silu(w.row[2][g + m + r * LANES][own]);
    return v;
}
__device__ static void finish(const float *part, const gates &v, float D, int m, int own, float (*out)[CHANNELS]) {
    float p[2][LANES];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int k = 0; k < LANES; k += 4) *(float4 *)(p[r] + k) = *(const float4 *)(part + (m + r * LANES) * PAD + k);
#pragma unroll
    for (int r = 0; r < 2; r++) out[m + r * LANES][own] = scan_gate(scan_sum(p[r]), D, v.u[r], v.z[r]);
}

/* All warps meet between tiles, the three of four channels between groups.  Barrier 0 is for threads at one place of the code. */
__device__ static void meet_all(void) { asm volatile("barrier.sync %0, %1;" :: "n"(1 + (int)SETS), "n"((int)THREADS) : "memory"); }
__device__ static void meet(int g, int set) {
    if (g) asm volatile("barrier.sync %0, 96;" :: "r"(1 + set) : "memory");
    else meet_all();
}

/* In a round one warp goes through group R, one prepares R + 2, one finishes R - 1; so T rows take a round more.  Lanes 2 i and 2 i + 1
 * read the same B and C: shared memory gives such to both halves of a warp at once. */
__device__ static void step_rounds(memory &w, const bm_op_scan &a, int q, int c0, int T, int set) {
    const int lane = threadIdx.x % 32, m = lane / 2 % 2 + lane / 8 * 2, own = set * 4 + lane % 2 + lane / 4 % 2 * 2;
    const int here = c0 + own < a.I ? a.N - 2 * m : 0;
    const size_t at = (size_t)(2 * m) * a.I + c0 + own;
    float *state = state_of(a, q) + at;
    float2 h = make_float2(here > 0 ? state[0] : 0, here > 1 ? state[a.I] : 0);
    const float2 rate = make_float2(here > 0 ? scan_rate(a.A[at]) : 0, here > 1 ? scan_rate(a.A[at + a.I]) : 0);
    two next[HELD];
    for (int t0 = 0, i = 0, round = 0; t0 < T + GROUP; t0 += TILE, i++) {
#pragma unroll
        for (int g = 0; g < TILE / GROUP; g++, round++) {
            const float4 *step = (const float4 *)w.step[round % 3][own], *then = (const float4 *)w.step[(round + 1) % 3][own];
            const tile &now = w.tiles[i % AHEAD], &after = w.tiles[(i + g) % AHEAD];
            meet(g, set);
            if (!round)
#pragma unroll
                for (int s = 0; s < HELD; s++) next[s] = read_two(step + s, now, 2 * s, m);
#pragma unroll
            for (int s = 0; s < GROUP / 2; s++) {
                const int ahead = s + HELD, k = ahead % (GROUP / 2);
                const two v = next[s % HELD];
                next[s % HELD] = ahead < GROUP / 2 ? read_two(step + k, now, g * GROUP + 2 * k, m)
                                                   : read_two(then + k, after, (g ^ 1) * GROUP + 2 * k, m);
                two_steps(&h, rate, v, &w.part[g][own][2 * s * PAD + m]);
            }
        }
    }
    if (here > 0) state[0] = h.x;
    if (here > 1) state[a.I] = h.y;
}
__device__ static void prepare_rounds(memory &w, const bm_op_scan &a, const places &p, int begin, int c0, int T, int set) {
    const int m = p.id % LANES, own = set * 4 + p.id % 32 / LANES, c = c0 + own;
    const float bias = c < a.I ? a.dt_bias[c] : 0;
    prepare(w.tiles[0], w.step[0][own], 0, m, own, T, bias);
    prepare(w.tiles[0], w.step[1][own], GROUP, m, own, T, bias);
    for (int t0 = 0, i = 0, round = 0; t0 < T + GROUP; t0 += TILE, i++) {
        asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 3));      /* this tile and the next are there */
#pragma unroll
        for (int g = 0; g < TILE / GROUP; g++, round++) {
            meet(g, set);
            prepare(w.tiles[(i + 1) % AHEAD], w.step[(round + 2) % 3][own], g * GROUP, m, own, T - t0 - TILE, bias);
            if (g == 0) fetch(&w.tiles[(i + AHEAD - 1) % AHEAD], a, p, begin + t0 + (AHEAD - 1) * TILE);
        }
    }
}
__device__ static void finish_rounds(memory &w, const bm_op_scan &a, const places &p, int begin, int c0, int T, int set) {
    const int m = p.id % LANES, own = set * 4 + p.id % 32 / LANES;
    const float D = c0 + own < a.I ? a.D[c0 + own] : 0;
    gates last = {};
    for (int t0 = 0, i = 0; t0 < T + GROUP; t0 += TILE, i++) {
#pragma unroll
        for (int g = 0; g < TILE / GROUP; g++) {
            meet(g, set);
            const gates now = read_gates(w.tiles[i % AHEAD], g * GROUP, m, own);
            float (*out)[CHANNELS] = &w.out[(i + 2 + g) % 3][g ? 0 : GROUP];        /* of the tile before, or of this one */
            finish(w.part[g ^ 1][own], last, D, m, own, out);
            last = now;
            if (g && i > 1) put_rows(w.out[(i + 1) % 3], a, p, begin + t0 - 2 * TILE);
        }
    }
}
__global__ void __launch_bounds__(THREADS) long_rows(const bm_op_scan a, bool states_aligned, bool aligned, uint16_t *half) {
    after_previous();
    extern __shared__ float4 shared[];
    memory &w = *(memory *)shared;
    const int q = blockIdx.y, begin = a.start[q], end = a.start[q + 1], T = end - begin, c0 = (int)blockIdx.x * CHANNELS;
    const int warp = threadIdx.x / 32;      /* warps w, w + 4, ... share a scheduler: two of five that step, with one other */
    const bool steps = warp < 4 || warp == 7, finishes = warp >= 2 * SETS;
    const int set = steps ? (warp < 4 ? warp : 4) : finishes ? warp - 2 * SETS : warp - 4 - (warp > 7);
    const int id = 32 * set + (int)threadIdx.x % 32;
    const places p = { id, id / (CHANNELS / 4), c0 + id % (CHANNELS / 4) * 4, end, states_aligned, aligned, half };
    if (!T) return;
    const bool prepares = !steps && !finishes;
    for (int i = 0; prepares && i < AHEAD - 1; i++) fetch(&w.tiles[i], a, p, begin + i * TILE);
    asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 2));      /* the first tile is there */
    meet_all();
    if (steps) step_rounds(w, a, q, c0, T, set);
    else if (finishes) finish_rounds(w, a, p, begin, c0, T, set);
    else prepare_rounds(w, a, p, begin, c0, T, set);
    meet_all();
    const int tiles = (T + GROUP + TILE - 1) / TILE;
    for (int i = tiles > 1 ? tiles - 2 : 0; finishes && i < tiles; i++) put_rows(w.out[i % 3], a, p, begin + i * TILE);
}

/* Row q is the one row of sequence q; a block makes the channels of its threads, EACH neighbours, of `some` sequences: one where there
 * are few.  Blocks on a processor: more would spill registers. */
enum { SOME = 2, FEW = 128, AT_ONCE = 6 };
template <int EACH> struct __align__(4 * EACH) channels { float v[EACH]; };
/* Zeros where nothing is. */
template <int EACH> __device__ static channels<EACH> read(const float *p, bool there) {
    channels<EACH> v = {};
    return there ? *(const channels<EACH> *)p : v;
}
template <int EACH> __device__ static void read_state(const bm_op_scan &a, int q, int c, channels<EACH> (&h)[N16]) {
    const float *state = state_of(a, q) + c;
#pragma unroll
    for (int n = 0; n < N16; n++) h[n] = read<EACH>(state + (size_t)n * a.I, c < a.I && n < a.N);
}
/* A step of a row: what of it lies where, B and C (N16) in shared memory. */
template <int EACH> struct row { channels<EACH> dt, u, z; const float *B, *C; };
/* Its outputs; states h, whose rates are `rate`, moved on by two at a time, n and n + 1, for `leave(n, both)`. */
template <int EACH, class H, class RATE, class LEAVE> __device__ __forceinline__ static channels<EACH>
step_row(const row<EACH> &x, const channels<EACH> &bias, const channels<EACH> &D, H h, RATE rate, LEAVE leave) {
    channels<EACH> d, du, p[LANES / 2], y;
#pragma unroll
    for (int k = 0; k < EACH; k++) d.v[k] = softplus(x.dt.v[k] + bias.v[k]), du.v[k] = d.v[k] * x.u.v[k];
#pragma unroll
    for (int m = 0; m < LANES; m++) {
        const int n = 2 * m;
        channels<EACH> v[2] = { h(n), h(n + 1) };
        const channels<EACH> r[2] = { rate(n), rate(n + 1) };
#pragma unroll
        for (int k = 0; k < EACH; k++) {
#pragma unroll
            for (int i = 0; i < 2; i++) v[i].v[k] = scan_state(v[i].v[k], d.v[k], r[i].v[k], du.v[k], x.B[n + i]);
            const float sum = scan_pair(x.C[n], v[0].v[k], x.C[n + 1], v[1].v[k]);
            p[m % 4].v[k] = m < 4 ? sum : __fadd_rn(p[m % 4].v[k], sum);
        }
        leave(n, v);
    }
#pragma unroll
    for (int k = 0; k < EACH; k++)
        y.v[k] = scan_out(scan_fold(p[0].v[k], p[1].v[k], p[2].v[k], p[3].v[k]), D.v[k], x.u.v[k], x.z.v[k]);
    return y;
}
/* Of a.y and half those that there are. */
template <int EACH> __device__ static void put_row(const bm_op_scan &a, uint16_t *half, size_t at, const channels<EACH> &y) {
    if (a.y) *(channels<EACH> *)(a.y + at) = y;
    if (!half) return;
    if constexpr (EACH == 2) *(uint32_t *)(half + at) = halves(y.v[0], y.v[1]);
    else half[at] = (uint16_t)halves(y.v[0], 0);
}
template <int EACH> __device__ static channels<EACH> read_rate(const bm_op_scan &a, int n, int c, bool there) {
    channels<EACH> A = read<EACH>(a.A + (size_t)n * a.I + c, there && n < a.N);
#pragma unroll
    for (int k = 0; k < EACH; k++) A.v[k] = scan_rate(A.v[k]);
    return A;
}
template <int EACH> __global__ void __launch_bounds__(WIDTH, AT_ONCE) single_rows(bm_op_scan a, int some, uint16_t *half) {
    next_may_start();
    __shared__ float B[2][N16], C[2][N16];
    __shared__ channels<EACH> rate[N16][WIDTH];
    const int c = EACH * (int)(blockIdx.x * WIDTH + threadIdx.x), q0 = (int)blockIdx.y * some, q1 = q0 + some < a.Q ? q0 + some : a.Q;
    const bool there = c < a.I;
    const channels<EACH> bias = read<EACH>(a.dt_bias + c, there), D = read<EACH>(a.D + c, there);
    channels<EACH> h[N16];
    read_state(a, q0, c, h);        /* nobody has written to states since the token before: bm_cuda_embed */
#pragma unroll
    for (int n = 0; n < N16; n++) rate[n][threadIdx.x] = read_rate<EACH>(a, n, c, there);
    previous_done();
#pragma unroll 1
    for (int q = q0; q < q1; q++) {
        const size_t at = (size_t)q * a.I + c;
        float *state = state_of(a, q) + c, (&b)[N16] = B[q % 2], (&w)[N16] = C[q % 2];
        if (q > q0) read_state(a, q, c, h);
        const row<EACH> x = { read<EACH>(a.dt + at, there), read<EACH>(a.u + at, there), read<EACH>(a.z + (size_t)q * a.ldz + c, there),
                              b, w };
        if (threadIdx.x < N16) {
            const int n = threadIdx.x;
            b[n] = n < a.N ? a.B[(size_t)q * a.ldbc + n] : 0;
            w[n] = n < a.N ? a.C[(size_t)q * a.ldbc + n] : 0;
        }
        __syncthreads();
        if (!there) continue;
        put_row(a, half, at, step_row<EACH>(x, bias, D, [&](int n) { return h[n]; }, [&](int n) { return rate[n][threadIdx.x]; },
                                            [&](int n, const channels<EACH> (&v)[2]) {
#pragma unroll
            for (int i = 0; i < 2; i++) if (n + i < a.N) *(channels<EACH> *)(state + (size_t)(n + i) * a.I) = v[i];
        }));
    }
}

/* Blocks that stay, each for the channels of its threads, two neighbours, of every `apart`-th sequence: one warp has the copy engine bring
 * rows into a ring of stages and states back out of it, the others step. */
enum { STEPPERS = 128, FLOW = 2 * STEPPERS, LARGE = 512 };      /* threads that step, their channels; sequences that are very many */
typedef struct __align__(128) stage { float h[N16][FLOW], dt[FLOW], u[FLOW], z[FLOW], B[N16], C[N16]; } stage;
typedef struct stages { stage *at; uint64_t *full, *done; } stages;
/* Of a block: `wide` channels from c0 on, of n sequences. */
typedef struct part { int c0, wide, first, apart, n; } part;

#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
/* Of the block's i-th sequence: states, a lane a row of them; then what the kernels before this one make, by the lanes behind. */
template <int STAGES> INLINE void bring_states(const bm_op_scan &a, const part &p, const stages &r, int i) {
    const int lane = threadIdx.x % 32;
    uint64_t *full = &r.full[i % STAGES];
    if (lane == 0) barrier_expect(full, 4 * ((N16 + 3) * p.wide + 2 * N16));
    __syncwarp();
    if (lane < N16) copy_in(r.at[i % STAGES].h[lane], state_of(a, p.first + i * p.apart) + (size_t)lane * a.I + p.c0, 4 * p.wide, full);
}
template <int STAGES> INLINE void bring_rows(const bm_op_scan &a, const part &p, const stages &r, int i) {
    stage *to = &r.at[i % STAGES];
    const size_t q = (size_t)(p.first + i * p.apart);
    const int which = threadIdx.x % 32 - N16;
    uint64_t *full = &r.full[i % STAGES];
    if (which == 0) copy_in(to->dt, a.dt + q * a.I + p.c0, 4 * p.wide, full);
    if (which == 1) copy_in(to->u, a.u + q * a.I + p.c0, 4 * p.wide, full);
    if (which == 2) copy_in(to->z, a.z + q * a.ldz + p.c0, 4 * p.wide, full);
    if (which == 3) copy_in(to->B, a.B + q * a.ldbc, 4 * N16, full);
    if (which == 4) copy_in(to->C, a.C + q * a.ldbc, 4 * N16, full);
}
template <int STAGES> INLINE void copy_rows(const bm_op_scan &a, const part &p, const stages &r) {
    const int lane = threadIdx.x % 32, begin = min(p.n, STAGES);
#pragma unroll 1
    for (int i = 0; i < begin; i++) bring_states<STAGES>(a, p, r, i);       /* as single_rows reads its first */
    previous_done();
#pragma unroll 1
    for (int i = 0; i < begin; i++) bring_rows<STAGES>(a, p, r, i);
#pragma unroll 1
    for (int i = 0; i < p.n; i++) {
        float *state = state_of(a, p.first + i * p.apart) + (size_t)lane * a.I + p.c0;
        barrier_wait(&r.done[i % STAGES], i / STAGES);
        if (lane < N16) copy_out(state, r.at[i % STAGES].h[lane], 4 * p.wide);
        copies_read();
        if (i + STAGES >= p.n) continue;
        bring_states<STAGES>(a, p, r, i + STAGES);
        bring_rows<STAGES>(a, p, r, i + STAGES);
    }
    copies_written();
}
template <int STAGES> INLINE void step_rows(const bm_op_scan &a, const part &p, const stages &r, uint16_t *half) {
    const int own = 2 * (int)threadIdx.x, c = p.c0 + own;
    const bool there = own < p.wide;
    const channels<2> bias = read<2>(a.dt_bias + c, there), D = read<2>(a.D + c, there);
    channels<2> rate[N16];
#pragma unroll
    for (int n = 0; n < N16; n++) rate[n] = read_rate<2>(a, n, c, there);
#pragma unroll 1
    for (int i = 0; i < p.n; i++) {
        stage &s = r.at[i % STAGES];
        barrier_wait(&r.full[i % STAGES], i / STAGES);
        if (there) {
            const row<2> x = { read<2>(&s.dt[own], true), read<2>(&s.u[own], true), read<2>(&s.z[own], true), s.B, s.C };
            put_row(a, half, (size_t)(p.first + i * p.apart) * a.I + c,
                    step_row<2>(x, bias, D, [&](int n) { return read<2>(&s.h[n][own], true); }, [&](int n) { return rate[n]; },
                                [&](int n, const channels<2> (&v)[2]) {
                *(channels<2> *)&s.h[n][own] = v[0], *(channels<2> *)&s.h[n + 1][own] = v[1];
            }));
        }
        written();
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&r.done[i % STAGES]);
    }
}
#endif
template <int STAGES, int PER> __global__ void __launch_bounds__(STEPPERS + 32, PER)
many_rows(const __grid_constant__ bm_op_scan a, int apart, uint16_t *half) {
#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 900
    __shared__ uint64_t full[STAGES], done[STAGES];
    uint8_t *memory = shared_memory();
    const stages r = { (stage *)memory, full, done };
    const int tiles = (int)gridDim.x / apart, c0 = (int)blockIdx.x % tiles * FLOW, first = (int)blockIdx.x / tiles;
    const part p = { c0, min(a.I - c0, (int)FLOW), first, apart, (a.Q - first + apart - 1) / apart };
    if (!threadIdx.x) {
        for (int s = 0; s < STAGES; s++) {
            barrier_make(&full[s], 1);
            barrier_make(&done[s], STEPPERS / 32);
        }
        barriers_made();
    }
    next_may_start();
    __syncthreads();
    if (threadIdx.x < STEPPERS) step_rows<STAGES>(a, p, r, half);
    else copy_rows<STAGES>(a, p, r);
#endif
}
/* PER blocks a processor: three begin sooner; two, with more stages, bring more. */
template <int STAGES, int PER> static void start_many(bm_cuda *c, const bm_op_scan *a, uint16_t *half) {
    const int tiles = blocks_of((size_t)a->I, FLOW), most = PER * c->chip.multiProcessorCount / tiles, apart = most < a->Q ? most : a->Q;
    const int shared = STAGES * (int)sizeof(stage);
    cudaFuncSetAttribute(many_rows<STAGES, PER>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    bm_cuda_start(c, many_rows<STAGES, PER>, tiles * apart, STEPPERS + 32, shared, *a, apart, half);
}

__global__ void __launch_bounds__(WIDTH) wide_rows(bm_op_scan a) {
    after_previous();
    const int c = (int)(blockIdx.x * WIDTH + threadIdx.x), q = blockIdx.y;
    if (c >= a.I) return;
    float *state = state_of(a, q) + c;
    for (int t = a.start[q]; t < a.start[q + 1]; t++) {
        const size_t at = (size_t)t * a.I + c;
        const float *B = a.B + (size_t)t * a.ldbc, *C = a.C + (size_t)t * a.ldbc;
        const float u = a.u[at], d = softplus(a.dt[at] + a.dt_bias[c]), du = d * u;
        float y = 0;
        for (int n = 0; n < a.N; n++) {
            float *h = state + (size_t)n * a.I;
            *h = scan_state(*h, d, scan_rate(a.A[(size_t)n * a.I + c]), du, B[n]);
            y = fmaf(C[n], *h, y);
        }
        a.y[at] = scan_out(y, a.D[c], u, a.z[(size_t)t * a.ldz + c]);
    }
}

/* half: y as bf16 too, or NULL. */
static void scan(bm_cuda *c, const bm_op_scan *a, uint16_t *half) {
    const bool wide = a->N > N16, single = a->M == a->Q;
    const uintptr_t of_rows = (uintptr_t)a->dt | (uintptr_t)a->u | (uintptr_t)a->z | (uintptr_t)a->y;
    const bool rows = of_rows % 16 == 0 && (a->I | a->ldz) % 4 == 0;
    const bool states = ((uintptr_t)a->B | (uintptr_t)a->C) % 16 == 0 && (a->N | a->ldbc) % 4 == 0;
    const uintptr_t of_pairs = of_rows | (uintptr_t)a->A | (uintptr_t)a->D | (uintptr_t)a->dt_bias | (uintptr_t)a->state;
    const bool pairs = of_pairs % 8 == 0 && (a->I | a->ldz | (int)(a->stride % 2)) % 2 == 0;
    const uintptr_t of_fours = of_pairs | (uintptr_t)a->B | (uintptr_t)a->C | (uintptr_t)(4 * a->stride);
    const bool fours = of_fours % 16 == 0 && (a->I | a->ldz | a->ldbc) % 4 == 0;
    const bool many = single && fours && a->N == N16 && a->Q > FEW && a->I <= FLOW * c->chip.multiProcessorCount && c->chip.major == 9;
    const int blocks = blocks_of((size_t)a->I, WIDTH), some = a->Q <= FEW ? 1 : SOME, groups = blocks_of((size_t)a->Q, some);
    if (wide) bm_cuda_start(c, wide_rows, dim3(blocks, a->Q), WIDTH, 0, *a);
    else if (many && a->Q > LARGE) start_many<5, 2>(c, a, half);
    else if (many) start_many<3, 3>(c, a, half);
    else if (single && pairs) bm_cuda_start(c, single_rows<2>, dim3(blocks_of((size_t)a->I, 2 * WIDTH), groups), WIDTH, 0, *a, some, half);
    else if (single) bm_cuda_start(c, single_rows<1>, dim3(blocks, groups), WIDTH, 0, *a, some, half);
    else {
        const size_t all = c->chip.sharedMemPerBlockOptin, most = sizeof(memory) > all / 2 + 1 ? sizeof(memory) : all / 2 + 1;
        const size_t shared = a->Q == 1 ? most : sizeof(memory);    /* of one sequence no two blocks on a processor */
        cudaFuncSetAttribute(long_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        bm_cuda_start(c, long_rows, dim3(blocks_of((size_t)a->I, CHANNELS), a->Q), THREADS, shared, *a, states, rows, half);
    }
    bm_cuda_check(c, cudaGetLastError(), "scan");
}
static bool rounds(const bm_op_scan *a) { return a->N <= N16 && a->I % 8 == 0; }
void bm_cuda_scan(bm_backend *b, const bm_op_scan *a) {
    bm_cuda *c = cuda_of(b);
    if (!c->failed && a->M) scan(c, a, rounds(a) ? bm_cuda_rounded(c, a->y, a->M, a->I) : NULL);
}
bool bm_cuda_scan_rounded(bm_backend *b, const bm_op_scan *a, const bm_op_linear *next) {
    bm_cuda *c = cuda_of(b);
    if (c->failed || !a->M || !rounds(a) || !bm_cuda_takes_rounded(c, next, a->y, a->M, a->I)) return false;
    bm_op_scan rounded = *a;
    rounded.y = NULL;
    scan(c, &rounded, bm_cuda_rounded(c, a->y, a->M, a->I));
    return true;
}
