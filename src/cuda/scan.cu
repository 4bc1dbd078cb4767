/* scan.cu - the selective scan (arXiv 2312.00752, equation 2), one step after another.  Room: cuda.
 * long_rows, N <= 16: eight lanes a channel, states 2 m and 2 m + 1 in lane m.  For each 16 steps d and d u are made by the lanes
 *   of the steps' numbers, and so are the sums of C h, both through shared memory, by way of which all rows come and go.
 * single_rows, N <= 16, one row a sequence: a thread for each channel, the same arithmetic and so the same bits.
 * wide_rows, N > 16: a thread for each channel, states where they are kept, sums over N in order. */
#include "cuda/steps.cuh"

enum { N16 = SCAN_STATES, LANES = N16 / 2, CHANNELS = 8, THREADS = CHANNELS * LANES, GROUP = 16, TILE = 2 * GROUP };
enum { AHEAD = 4, LD = CHANNELS + 4, PAD = 12 };    /* tiles in memory; strides that meet no bank twice */
enum { WIDTH = 128 };                               /* threads of a block where each has a channel */

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

/* What a tile of rows brings: B and C; dt, u and z of the block's channels.  Then what goes between lanes of a channel: d, du; sums
 * of two C h by step and lane, of this group and the last; y of tiles that are made, and of one that is written. */
typedef struct tile { float b[TILE][N16], c[TILE][N16], row[3][TILE][LD]; } tile;
typedef struct memory {
    tile tiles[AHEAD];
    float2 step[2][CHANNELS][GROUP + 2];
    float part[2][CHANNELS][GROUP * PAD + LANES], out[3][TILE][LD];
} memory;

/* Rows come 16 bytes at a time; aligned tells of rows of channels, then of those of states. */
typedef struct places { int c0, end; bool aligned[2]; } places;

__device__ static void fetch(tile *to, const bm_op_scan &a, const places &p, int t0) {
    for (int i = threadIdx.x; i < TILE * N16 / 4; i += THREADS) {
        const int t = i / (N16 / 4), n = i % (N16 / 4) * 4, left = t0 + t < p.end ? a.N - n : 0;
        const size_t at = (size_t)(t0 + t) * a.ldbc + n;
        copy16_async(&to->b[t][n], a.B + at, left, p.aligned[1]);
        copy16_async(&to->c[t][n], a.C + at, left, p.aligned[1]);
    }
    const int t = threadIdx.x / 2, k = threadIdx.x % 2 * 4, left = t0 + t < p.end ? a.I - p.c0 - k : 0;
    const size_t at = (size_t)(t0 + t) * a.I + p.c0 + k;
    copy16_async(&to->row[0][t][k], a.dt + at, left, p.aligned[0]);
    copy16_async(&to->row[1][t][k], a.u + at, left, p.aligned[0]);
    copy16_async(&to->row[2][t][k], a.z + (size_t)(t0 + t) * a.ldz + p.c0 + k, left, p.aligned[0]);
    asm volatile("cp.async.commit_group;");
}
/* Rows [t0, t0 + TILE) of y. */
__device__ static void put_rows(const float (*out)[LD], const bm_op_scan &a, const places &p, int t0, uint16_t *half) {
    const int t = threadIdx.x / 2, k = threadIdx.x % 2 * 4;
    if (t0 + t >= p.end || p.c0 + k >= a.I) return;
    const float4 v = *(const float4 *)&out[t][k];
    const size_t at = (size_t)(t0 + t) * a.I + p.c0 + k;
    if (p.aligned[0]) *(float4 *)(a.y + at) = v;
    else for (int i = 0; i < 4 && p.c0 + k + i < a.I; i++) a.y[at + i] = out[t][k + i];
    if (half) *(uint2 *)(half + at) = halves(v);
}

/* Sixteen steps of two states: d, du of the channel, two steps at a time; B, C of the states; the sum of both C h by step. */
__device__ static void sixteen(float2 *h, float2 rate, const float4 *step, const float *b, const float *c, float *part) {
    float4 x[GROUP / 2];
    float2 B[GROUP], C[GROUP];
#pragma unroll
    for (int s = 0; s < GROUP / 2; s++) x[s] = step[s];
#pragma unroll
    for (int s = 0; s < GROUP; s++) B[s] = *(const float2 *)(b + s * N16), C[s] = *(const float2 *)(c + s * N16);
#pragma unroll
    for (int s = 0; s < GROUP; s++) {
        const float d = s % 2 ? x[s / 2].z : x[s / 2].x, du = s % 2 ? x[s / 2].w : x[s / 2].y;
        h->x = scan_state(h->x, d, rate.x, du, B[s].x);
        h->y = scan_state(h->y, d, rate.y, du, B[s].y);
        C[s].x = __fadd_rn(__fmul_rn(C[s].x, h->x), __fmul_rn(C[s].y, h->y));
    }
#pragma unroll
    for (int s = 0; s < GROUP; s++) part[s * PAD] = C[s].x;
}

/* d of a lane's two steps of a group, and what their outputs want of u and z. */
typedef struct pair { float d[2], u[2], z[2]; } pair;
__device__ static pair prepare(const tile &w, int g, int m, int own, int left, float bias) {
    pair v;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int t = g + m + r * LANES;
        const float d = softplus(w.row[0][t][own] + bias);
        v.d[r] = t < left ? d : 0;          /* 0: h stays what it is */
        v.u[r] = w.row[1][t][own], v.z[r] = silu(w.row[2][t][own]);
    }
    return v;
}

/* In a round a warp goes through a group, prepares the next and sums the last: three things that do not wait for each other. */
__global__ void __launch_bounds__(THREADS) long_rows(const bm_op_scan a, bool rows_aligned, bool states_aligned, uint16_t *half) {
    extern __shared__ float4 shared[];
    memory &w = *(memory *)shared;
    const int m = threadIdx.x % LANES, own = threadIdx.x / LANES, q = blockIdx.y, begin = a.start[q];
    const places p = { (int)blockIdx.x * CHANNELS, a.start[q + 1], { rows_aligned, states_aligned } };
    const int c = p.c0 + own, T = p.end - begin;
    if (!T) return;
    const bool channel = c < a.I, first = channel && 2 * m < a.N, second = channel && 2 * m + 1 < a.N;
    const float bias = channel ? a.dt_bias[c] : 0, D = channel ? a.D[c] : 0;
    const size_t at = (size_t)(2 * m) * a.I + c;
    float *state = state_of(a, q) + at;
    float2 h = make_float2(first ? state[0] : 0, second ? state[a.I] : 0);
    const float2 rate = make_float2(first ? scan_rate(a.A[at]) : 0, second ? scan_rate(a.A[at + a.I]) : 0);
    for (int i = 0; i < AHEAD - 1; i++) fetch(&w.tiles[i], a, p, begin + i * TILE);
    asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 2));
    __syncthreads();
    pair last, now = prepare(w.tiles[0], 0, m, own, T, bias);
    for (int t0 = 0, i = 0; t0 < T + GROUP; t0 += TILE, i++) {          /* the last sums come a round later */
        asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 3));      /* this tile and the next are there */
        __syncthreads();
        fetch(&w.tiles[(i + AHEAD - 1) % AHEAD], a, p, begin + t0 + (AHEAD - 1) * TILE);
        if (i > 1) put_rows(w.out[(i + 1) % 3], a, p, begin + t0 - 2 * TILE, half);
#pragma unroll
        for (int g = 0; g < TILE / GROUP; g++) {
            const tile &here = w.tiles[i % AHEAD], &behind = w.tiles[(i + g) % AHEAD];
#pragma unroll
            for (int r = 0; r < 2; r++) w.step[g][own][m + r * LANES] = make_float2(now.d[r], now.d[r] * now.u[r]);
            __syncwarp();
            const pair next = prepare(behind, g ? 0 : GROUP, m, own, T - t0 - g * TILE, bias);
            float sum[2][LANES];
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int k = 0; k < LANES; k += 4)
                    *(float4 *)(sum[r] + k) = *(const float4 *)&w.part[g ^ 1][own][(m + r * LANES) * PAD + k];
            const float *b = &here.b[g * GROUP][2 * m], *c2 = &here.c[g * GROUP][2 * m];
            sixteen(&h, rate, (const float4 *)w.step[g][own], b, c2, &w.part[g][own][m]);
            float (*out)[LD] = &w.out[(i + 2 + g) % 3][g ? 0 : GROUP];      /* of the tile before, or of this one */
#pragma unroll
            for (int r = 0; r < 2; r++) out[m + r * LANES][own] = scan_gate(scan_sum_pairs(sum[r]), D, last.u[r], last.z[r]);
            last = now, now = next;
        }
    }
    __syncthreads();
    const int tiles = (T + GROUP + TILE - 1) / TILE;
    for (int i = tiles > 1 ? tiles - 2 : 0; i < tiles; i++) put_rows(w.out[i % 3], a, p, begin + i * TILE, half);
    if (first) state[0] = h.x;
    if (second) state[a.I] = h.y;
}

/* Row q is the one row of sequence q. */
__global__ void __launch_bounds__(WIDTH) single_rows(bm_op_scan a, uint16_t *half) {
    __shared__ float B[N16], C[N16];
    const int c = (int)(blockIdx.x * WIDTH + threadIdx.x), q = blockIdx.y;
    if (threadIdx.x < N16) {
        const int n = threadIdx.x;
        B[n] = n < a.N ? a.B[(size_t)q * a.ldbc + n] : 0;
        C[n] = n < a.N ? a.C[(size_t)q * a.ldbc + n] : 0;
    }
    __syncthreads();
    if (c >= a.I) return;
    const size_t at = (size_t)q * a.I + c;
    float *state = state_of(a, q) + c, h[N16], p[N16];
#pragma unroll
    for (int n = 0; n < N16; n++) h[n] = n < a.N ? state[(size_t)n * a.I] : 0;
    const float u = a.u[at], d = softplus(a.dt[at] + a.dt_bias[c]), du = d * u;
#pragma unroll
    for (int n = 0; n < N16; n++) {
        h[n] = scan_state(h[n], d, n < a.N ? scan_rate(a.A[(size_t)n * a.I + c]) : 0, du, B[n]);
        p[n] = __fmul_rn(C[n], h[n]);
        if (n < a.N) state[(size_t)n * a.I] = h[n];
    }
    const float y = scan_out(scan_sum(p), a.D[c], u, a.z[(size_t)q * a.ldz + c]);
    a.y[at] = y;
    if (half) half[at] = (uint16_t)halves(y, 0);
}

__global__ void __launch_bounds__(WIDTH) wide_rows(bm_op_scan a) {
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

void bm_cuda_scan(bm_backend *b, const bm_op_scan *a) {
    bm_cuda *c = cuda_of(b);
    const bool wide = a->N > N16, single = a->M == a->Q;
    const uintptr_t of_rows = (uintptr_t)a->dt | (uintptr_t)a->u | (uintptr_t)a->z | (uintptr_t)a->y;
    const bool rows = of_rows % 16 == 0 && (a->I | a->ldz) % 4 == 0;
    const bool states = ((uintptr_t)a->B | (uintptr_t)a->C) % 16 == 0 && (a->N | a->ldbc) % 4 == 0;
    const dim3 grid(blocks_of((size_t)a->I, WIDTH), a->Q), eights(blocks_of((size_t)a->I, CHANNELS), a->Q);
    if (c->failed || !a->M) return;
    uint16_t *half = !wide && a->I % 8 == 0 ? bm_cuda_rounded(c, a->y, a->M, a->I) : NULL;
    if (wide) wide_rows<<<grid, WIDTH, 0, c->stream>>>(*a);
    else if (single) single_rows<<<grid, WIDTH, 0, c->stream>>>(*a, half);
    else {
        cudaFuncSetAttribute(long_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(memory));
        long_rows<<<eights, THREADS, sizeof(memory), c->stream>>>(*a, rows, states, half);
    }
    bm_cuda_check(c, cudaGetLastError(), "scan");
}
