/* scan.cu - the selective scan (arXiv 2312.00752, equation 2), one step after another.  Room: cuda.
 * long_rows, N <= 16: a warp has eight channels, lane (m, i) states 2 m and 2 m + 1 of channels i and i + 4.  For each 16 steps d
 *   and d u are made by the lanes of the steps' numbers, and so are the sums of C h, both by way of shared memory.
 * single_rows, N <= 16, one row a sequence: a thread for each channel, the same arithmetic and so the same bits.
 * wide_rows, N > 16: a thread for each channel, states where they are kept, sums over N in order. */
#include "cuda/steps.cuh"

enum { N16 = SCAN_STATES, LANES = N16 / 2, CHANNELS = 8, HALF = CHANNELS / 2, GROUP = 16, TILE = 2 * GROUP };
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

/* Where a lane reads: rows of B and C lane / 4 and every eighth on, columns 4 (lane % 4); of channels lane / 2 and 16 on, columns
 * 4 (lane % 2), and writes there.  `left` rows are to come.  Aligned: 16 bytes at a time. */
typedef struct places {
    const float *b, *c, *dt, *u, *z;
    float *y;
    uint16_t *half;
    size_t ldbc, ld, ldz;
    int left, states, channels;     /* of the four columns, how many there are */
    bool states_aligned, aligned;
} places;

__device__ static places begin_at(const bm_op_scan &a, int t, int T, int c0, bool states_aligned, bool aligned, uint16_t *half) {
    const int lane = threadIdx.x, n = lane % 4 * 4, k = c0 + lane % 2 * 4;
    const size_t bc = (size_t)(t + lane / 4) * a.ldbc + n, at = (size_t)(t + lane / 2) * a.I + k;
    const float *z = a.z + (size_t)(t + lane / 2) * a.ldz + k;
    return places{ a.B + bc, a.C + bc, a.dt + at, a.u + at, z, a.y + at, half ? half + at : NULL, (size_t)a.ldbc,
                   (size_t)a.I, (size_t)a.ldz, T, a.N - n, a.I - k, states_aligned, aligned };
}
/* The next tile. */
__device__ static void fetch(tile *to, places *p) {
    const int t = threadIdx.x / 4, n = threadIdx.x % 4 * 4, r = threadIdx.x / 2, k = threadIdx.x % 2 * 4;
#pragma unroll
    for (int i = 0; i < TILE; i += 8, p->b += 8 * p->ldbc, p->c += 8 * p->ldbc) {
        const int there = t + i < p->left ? p->states : 0;
        copy16_async(&to->b[t + i][n], p->b, there, p->states_aligned);
        copy16_async(&to->c[t + i][n], p->c, there, p->states_aligned);
    }
#pragma unroll
    for (int i = 0; i < TILE; i += 16, p->dt += 16 * p->ld, p->u += 16 * p->ld, p->z += 16 * p->ldz) {
        const int there = r + i < p->left ? p->channels : 0;
        copy16_async(&to->row[0][r + i][k], p->dt, there, p->aligned);
        copy16_async(&to->row[1][r + i][k], p->u, there, p->aligned);
        copy16_async(&to->row[2][r + i][k], p->z, there, p->aligned);
    }
    p->left -= TILE;
    asm volatile("cp.async.commit_group;");
}
/* The next tile of y, of which `rows` are there. */
__device__ static void put_rows(const float (*out)[LD], places *p, int rows) {
    const int r = threadIdx.x / 2, k = threadIdx.x % 2 * 4;
#pragma unroll
    for (int i = 0; i < TILE; i += 16, p->y += 16 * p->ld) {
        const float4 v = *(const float4 *)&out[r + i][k];
        if (r + i < rows && p->channels > 0) {
            if (p->aligned) *(float4 *)p->y = v;
            else for (int j = 0; j < 4 && j < p->channels; j++) p->y[j] = out[r + i][k + j];
            if (p->half) *(uint2 *)p->half = halves(v);
        }
        if (p->half) p->half += 16 * p->ld;
    }
}

/* Sixteen steps of two states of two channels: d, du of a channel, two steps at a time; B, C of the states; sums of two C h. */
__device__ static void
sixteen(float2 (&h)[2], const float2 (&rate)[2], const float4 *step, const float *b, const float *c, float *part) {
    float4 x[2][GROUP / 2];
    float2 B[GROUP], C[GROUP];
#pragma unroll
    for (int s = 0; s < GROUP; s++) {
        B[s] = *(const float2 *)(b + s * N16), C[s] = *(const float2 *)(c + s * N16);
        if (s % 2) continue;
        for (int i = 0; i < 2; i++) x[i][s / 2] = step[i * HALF * (GROUP + 2) / 2 + s / 2];
    }
#pragma unroll
    for (int s = 0; s < GROUP; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 v = x[i][s / 2];
            h[i].x = scan_state(h[i].x, s % 2 ? v.z : v.x, rate[i].x, s % 2 ? v.w : v.y, B[s].x);
            h[i].y = scan_state(h[i].y, s % 2 ? v.z : v.x, rate[i].y, s % 2 ? v.w : v.y, B[s].y);
            part[i * HALF * (GROUP * PAD + LANES) + s * PAD] = scan_pair(C[s].x, h[i].x, C[s].y, h[i].y);
        }
}

/* d of a lane's two steps of a group, for each of its channels, and what their outputs want of u and z. */
typedef struct prepared { float d[2][2], u[2][2], z[2][2]; } prepared;
__device__ static prepared prepare(const tile &w, int g, int left, const float (&bias)[2]) {
    const int m = threadIdx.x % LANES, own = threadIdx.x / LANES;
    prepared v;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int t = g + m + r * LANES, c = own + i * HALF;
            const float d = softplus(w.row[0][t][c] + bias[i]);
            v.d[i][r] = t < left ? d : 0;           /* 0: h stays what it is */
            v.u[i][r] = w.row[1][t][c], v.z[i][r] = silu(w.row[2][t][c]);
        }
    return v;
}
/* The sums of a lane's steps of a group, in part, gated. */
__device__ static void finish(const memory &w, int g, const prepared &v, const float (&D)[2], float (*out)[LD]) {
    const int m = threadIdx.x % LANES, own = threadIdx.x / LANES;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float p[LANES];
#pragma unroll
            for (int k = 0; k < LANES; k += 4)
                *(float4 *)(p + k) = *(const float4 *)&w.part[g][own + i * HALF][(m + r * LANES) * PAD + k];
            out[m + r * LANES][own + i * HALF] = scan_gate(scan_sum(p), D[i], v.u[i][r], v.z[i][r]);
        }
}

/* In a round the warp goes through a group, prepares the next and finishes the last: things that do not wait for each other. */
__global__ void __launch_bounds__(32) long_rows(const bm_op_scan a, bool states_aligned, bool aligned, uint16_t *half) {
    after_previous();
    extern __shared__ float4 shared[];
    memory &w = *(memory *)shared;
    const int m = threadIdx.x % LANES, own = threadIdx.x / LANES, q = blockIdx.y, begin = a.start[q], T = a.start[q + 1] - begin;
    const int c0 = (int)blockIdx.x * CHANNELS;
    if (!T) return;
    places p = begin_at(a, begin, T, c0, states_aligned, aligned, half);
    float *state = state_of(a, q), bias[2], D[2];
    float2 h[2], rate[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int c = c0 + own + i * HALF, here = c < a.I ? a.N - 2 * m : 0;
        const size_t at = (size_t)(2 * m) * a.I + c;
        bias[i] = c < a.I ? a.dt_bias[c] : 0, D[i] = c < a.I ? a.D[c] : 0;
        h[i] = make_float2(here > 0 ? state[at] : 0, here > 1 ? state[at + a.I] : 0);
        rate[i] = make_float2(here > 0 ? scan_rate(a.A[at]) : 0, here > 1 ? scan_rate(a.A[at + a.I]) : 0);
    }
    for (int i = 0; i < AHEAD - 1; i++) fetch(&w.tiles[i], &p);
    asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 2));
    __syncwarp();
    prepared last, now = prepare(w.tiles[0], 0, T, bias);
    for (int t0 = 0, i = 0; t0 < T + GROUP; t0 += TILE, i++) {          /* the last sums come a round later */
        asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 3));      /* this tile and the next are there */
        __syncwarp();
        fetch(&w.tiles[(i + AHEAD - 1) % AHEAD], &p);
        if (i > 1) put_rows(w.out[(i + 1) % 3], &p, TILE);
#pragma unroll
        for (int g = 0; g < TILE / GROUP; g++) {
            const tile &here = w.tiles[i % AHEAD], &behind = w.tiles[(i + g) % AHEAD];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float d = now.d[k / 2][k % 2];
                w.step[g][own + k / 2 * HALF][m + k % 2 * LANES] = make_float2(d, d * now.u[k / 2][k % 2]);
            }
            __syncwarp();
            const prepared next = prepare(behind, g ? 0 : GROUP, T - t0 - g * TILE, bias);
            finish(w, g ^ 1, last, D, &w.out[(i + 2 + g) % 3][g ? 0 : GROUP]);      /* of the tile before, or of this one */
            const float *b = &here.b[g * GROUP][2 * m], *c = &here.c[g * GROUP][2 * m];
            sixteen(h, rate, (const float4 *)w.step[g][own], b, c, &w.part[g][own][m]);
            last = now, now = next;
        }
    }
    __syncwarp();
    const int tiles = (T + GROUP + TILE - 1) / TILE;
    for (int i = tiles > 1 ? tiles - 2 : 0; i < tiles; i++) put_rows(w.out[i % 3], &p, T - i * TILE);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int c = c0 + own + i * HALF, here = c < a.I ? a.N - 2 * m : 0;
        const size_t at = (size_t)(2 * m) * a.I + c;
        if (here > 0) state[at] = h[i].x;
        if (here > 1) state[at + a.I] = h[i].y;
    }
}

/* Row q is the one row of sequence q; a block makes its channels of SOME sequences. */
enum { SOME = 4 };
__global__ void __launch_bounds__(WIDTH) single_rows(bm_op_scan a, uint16_t *half) {
    after_previous();
    __shared__ float B[2][N16], C[2][N16];
    const int c = (int)(blockIdx.x * WIDTH + threadIdx.x), q0 = (int)blockIdx.y * SOME, q1 = q0 + SOME < a.Q ? q0 + SOME : a.Q;
    const bool channel = c < a.I;
    const float bias = channel ? a.dt_bias[c] : 0, D = channel ? a.D[c] : 0;
    float rate[N16];
#pragma unroll
    for (int n = 0; n < N16; n++) rate[n] = channel && n < a.N ? scan_rate(a.A[(size_t)n * a.I + c]) : 0;
    for (int q = q0; q < q1; q++) {
        const size_t at = (size_t)q * a.I + c;
        float *state = state_of(a, q) + c, h[N16], p[LANES], (&b)[N16] = B[q % 2], (&w)[N16] = C[q % 2];
#pragma unroll
        for (int n = 0; n < N16; n++) h[n] = channel && n < a.N ? state[(size_t)n * a.I] : 0;
        const float u = channel ? a.u[at] : 0, dt = channel ? a.dt[at] : 0, z = channel ? a.z[(size_t)q * a.ldz + c] : 0;
        if (threadIdx.x < N16) {
            const int n = threadIdx.x;
            b[n] = n < a.N ? a.B[(size_t)q * a.ldbc + n] : 0;
            w[n] = n < a.N ? a.C[(size_t)q * a.ldbc + n] : 0;
        }
        __syncthreads();
        if (!channel) continue;
        const float d = softplus(dt + bias), du = d * u;
#pragma unroll
        for (int n = 0; n < N16; n++) {
            h[n] = scan_state(h[n], d, rate[n], du, b[n]);
            if (n < a.N) state[(size_t)n * a.I] = h[n];
        }
#pragma unroll
        for (int n = 0; n < N16; n += 2) p[n / 2] = scan_pair(w[n], h[n], w[n + 1], h[n + 1]);
        const float y = scan_out(scan_sum(p), D, u, z);
        a.y[at] = y;
        if (half) half[at] = (uint16_t)halves(y, 0);
    }
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

void bm_cuda_scan(bm_backend *b, const bm_op_scan *a) {
    bm_cuda *c = cuda_of(b);
    const bool wide = a->N > N16, single = a->M == a->Q;
    const uintptr_t of_rows = (uintptr_t)a->dt | (uintptr_t)a->u | (uintptr_t)a->z | (uintptr_t)a->y;
    const bool rows = of_rows % 16 == 0 && (a->I | a->ldz) % 4 == 0;
    const bool states = ((uintptr_t)a->B | (uintptr_t)a->C) % 16 == 0 && (a->N | a->ldbc) % 4 == 0;
    const int blocks = blocks_of((size_t)a->I, WIDTH);
    if (c->failed || !a->M) return;
    uint16_t *half = !wide && a->I % 8 == 0 ? bm_cuda_rounded(c, a->y, a->M, a->I) : NULL;
    if (wide) bm_cuda_start(c, wide_rows, dim3(blocks, a->Q), WIDTH, 0, *a);
    else if (single) bm_cuda_start(c, single_rows, dim3(blocks, blocks_of((size_t)a->Q, SOME)), WIDTH, 0, *a, half);
    else {
        cudaFuncSetAttribute(long_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(memory));
        cudaFuncSetAttribute(long_rows, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        bm_cuda_start(c, long_rows, dim3(blocks_of((size_t)a->I, CHANNELS), a->Q), 32, sizeof(memory), *a, states, rows, half);
    }
    bm_cuda_check(c, cudaGetLastError(), "scan");
}
